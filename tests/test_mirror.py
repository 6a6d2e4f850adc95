"""Runs and stores in an object store: made, broken, lost, found again; over the real S3 protocol, faults included."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import object_store
import pytest
from tiny import attempts, fingerprints, tiny_recipe

from gambeson import cli, mirror, mirrored_runs
from gambeson import files as recipes
from gambeson.cli import main
from gambeson.data import reading, writing
from gambeson.data.datasets import Digits
from gambeson.data.synthetic import StoreWriter, SyntheticStore, open_synthetic
from gambeson.disk import write_json
from gambeson.errors import EnvironmentFault, UserError
from gambeson.mirror import Mirror
from gambeson.place import Place
from gambeson.recipe import Arm
from gambeson.store import Artifact, Store, Workspace, stage
from gambeson.synthesis.gaussian import GaussianControl, gaussian_control

BLOCKS, PER_SHARD = 7, 3
"""Shards of 3, 3 and 1 blocks; the last block has 2 images, the others 4."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_store.object_store() as url:
        yield url


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new bucket; this machine's scratch is empty."""
    monkeypatch.setenv("GAMBESON_SCRATCH", str(tmp_path / "scratch"))
    name = f"bucket-{tmp_path.parent.name}-{abs(hash(tmp_path)) % 10**9}"
    object_store.bucket(server, name)
    return name


def block(number: int) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    size = 2 if number == BLOCKS - 1 else 4
    images = np.random.default_rng(number).integers(0, 256, (size, 3, 2, 1), dtype=np.uint8)
    return images, np.arange(size, dtype=np.int64) + number % 2, {"clipped": number / 10, "shift": 1.5}


def writer_of(root: Path, blocks: int = BLOCKS) -> StoreWriter:
    return StoreWriter(root=root, blocks=blocks, blocks_per_shard=PER_SHARD, origin={"why": "test"})


def write(root: Path, order=range(BLOCKS)) -> StoreWriter:
    writer = writer_of(root)
    for number in order:
        if not writer.has(number):
            writer.put(number, *block(number))
    return writer


def whole(root: Path, order=range(BLOCKS)) -> None:
    writer = write(root, order)
    for number in writer.missing():
        writer.put(number, *block(number))
    writer.finish({"why": "test"})


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the same store on a disk, without faults."""
    root = tmp_path_factory.mktemp("straight") / "s"
    whole(root)
    return files(root)


def there(server: str, bucket: str) -> dict[str, bytes]:
    """The files of the store s3://BUCKET/s."""
    return {name.removeprefix("s/"): data for name, data in object_store.contents(server, bucket).items()}


def machine(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is another machine, with a disk of its own."""
    monkeypatch.setenv("GAMBESON_SCRATCH", str(tmp_path / f"machine-{number}"))


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [range(BLOCKS), [6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 4, 2, 5]])
def test_a_store_in_an_object_store_is_that_on_a_disk(order, server: str, bucket: str, straight) -> None:
    root = mirror.local(f"s3://{bucket}/s")
    whole(root, order)
    assert there(server, bucket) == straight
    assert {name: data for name, data in files(root).items() if not name.startswith(".")} == straight


def test_several_machines_write_one_store_and_a_block_counts_once(
    server: str, bucket: str, straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks by turns from three machines; one sends some that others have made; another one ends the store."""
    for number in range(BLOCKS):
        machine(number % 3, tmp_path, monkeypatch)
        write(mirror.local(f"s3://{bucket}/s"), [number])
    machine(0, tmp_path, monkeypatch)
    root = mirror.local(f"s3://{bucket}/s")
    writer = writer_of(root)
    assert [writer.has(number) for number in range(BLOCKS)] == [True] * BLOCKS
    assert not [name for name in there(server, bucket) if name.startswith("blocks/")]
    other = np.zeros((4, 3, 2, 1), np.uint8)  # a slow worker is only now ready with a block of a shard that is final
    machine(4, tmp_path, monkeypatch)
    writer_of(mirror.local(f"s3://{bucket}/s")).put(1, other, np.zeros(4, np.int64), {"clipped": 0.0, "shift": 0.0})
    machine(3, tmp_path, monkeypatch)
    whole(mirror.local(f"s3://{bucket}/s"))
    assert there(server, bucket) == straight


def test_of_two_writers_of_a_block_the_first_counts_on_every_machine(
    server: str, bucket: str, straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(mirror.local(f"s3://{bucket}/s"), [0, 1])
    machine(1, tmp_path, monkeypatch)
    late = writer_of(mirror.local(f"s3://{bucket}/s"))
    assert late._remote is not None
    late._remote.surveyed = True  # it asked before they were there
    images, labels, facts = block(0)
    late.put(0, 255 - images, labels, facts)
    for number in range(2, BLOCKS):
        late.put(number, *block(number))
    late.finish({"why": "test"})
    assert there(server, bucket) == straight


PUTTING = """
import os, sys, time
sys.path.insert(0, {tests!r})
import test_mirror as t
writer = t.writer_of(t.mirror.local({url!r}))
print("ready", flush=True)
for number in {order!r}:
    if not writer.has(number):
        writer.put(number, *t.block(number))
    print(number, flush=True)
    time.sleep({pause!r})
writer.finish({{"why": "test"}})
"""


def putting(url: str, order: list[int], pause: float = 0.0, **environment: str) -> subprocess.Popen[str]:
    code = PUTTING.format(tests=str(Path(__file__).parent), url=url, order=order, pause=pause)
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | environment)


def test_a_killed_writer_loses_the_block_it_was_at(server: str, bucket: str, straight, tmp_path: Path) -> None:
    """SIGKILL between blocks and in the middle of one; what was made is there for another machine."""
    url = f"s3://{bucket}/s"
    with putting(url, [0, 1, 2, 3, 4], pause=0.3) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.strip() == "3":
                break
        running.send_signal(signal.SIGKILL)
    kept = set(there(server, bucket))
    assert {"shards/00000.json", "blocks/000003.npz"} <= kept
    shutil.rmtree(tmp_path / "scratch")
    writer = writer_of(mirror.local(url))
    assert writer.missing() in ([4, 5, 6], [5, 6])
    whole(mirror.local(url))
    assert there(server, bucket) == straight


@pytest.mark.slow
def test_two_processes_with_disks_of_their_own_write_one_store(
    server: str, bucket: str, straight, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/s"
    orders = ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0])
    both = [putting(url, order, GAMBESON_SCRATCH=str(tmp_path / f"{n}")) for n, order in enumerate(orders)]
    for running in both:
        assert running.wait(timeout=120) in (0, 1)  # 1: it ended first, while the other was at a block still
        assert running.stdout is not None
        running.stdout.close()
    whole(mirror.local(url))
    assert there(server, bucket) == straight


@pytest.mark.parametrize("broken", ["npy", "parquet", "json"])
def test_a_shard_whose_sending_broke_off_is_sent(
    broken: str, server: str, bucket: str, straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any of the three objects of a shard; this machine goes on, or another that knows nothing."""
    real = Mirror.send

    def send(self: Mirror, path: Path, replace: bool = True) -> bool:
        if path.name == f"00000.{broken}":
            raise KeyboardInterrupt
        return real(self, path, replace)

    for scratch in ("kept", "lost"):
        url = f"s3://{bucket}/{scratch}"
        monkeypatch.setattr(Mirror, "send", send)
        with pytest.raises(KeyboardInterrupt):
            write(mirror.local(url))
        monkeypatch.setattr(Mirror, "send", real)
        if scratch == "lost":
            machine(1, tmp_path, monkeypatch)
        whole(mirror.local(url))
        found = {n.removeprefix(scratch + "/"): d for n, d in there(server, bucket).items() if n.startswith(scratch)}
        assert found == straight


def test_a_block_that_was_damaged_in_the_bucket_is_made_again(
    server: str, bucket: str, straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(mirror.local(f"s3://{bucket}/s"), [0, 1])
    data = bytearray(there(server, bucket)["blocks/000001.npz"])
    data[len(data) // 2] ^= 1
    object_store.put(server, bucket, "s/blocks/000001.npz", bytes(data))
    machine(1, tmp_path, monkeypatch)
    writer = write(mirror.local(f"s3://{bucket}/s"), [2])
    assert writer.missing() == [1, 3, 4, 5, 6]
    whole(mirror.local(f"s3://{bucket}/s"))
    assert there(server, bucket) == straight


def test_a_server_that_refuses_for_a_while_costs_time_alone(
    server: str, bucket: str, straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "refuse"
    with object_store.process("proxy", server.rpartition(":")[2], str(flag)) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between)
        root, ended = mirror.local(f"s3://{bucket}/s"), threading.Event()

        def on_and_off() -> None:
            while not ended.wait(0.7):
                flag.touch()
                time.sleep(0.7)
                flag.unlink()

        turns = threading.Thread(target=on_and_off)
        turns.start()
        whole(root)
        ended.set()
        turns.join()
    assert there(server, bucket) == straight


def test_a_full_disk_here_loses_nothing_there(server: str, bucket: str, tmp_path: Path, monkeypatch) -> None:
    """On a real file system of 256 kB; the store goes on where there is space."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no rights to mount a small disk")
    try:
        monkeypatch.setenv("GAMBESON_SCRATCH", str(small))
        images, labels = np.full((40, 32, 32, 3), 7, np.uint8), np.zeros(40, np.int64)
        writer = writer_of(mirror.local(f"s3://{bucket}/s"), blocks=3)
        writer.put(0, images, labels)
        with pytest.raises(EnvironmentFault, match=r"No space left on device.* free some space"):
            [writer.put(number, images, labels) for number in (1, 2)]
        assert "blocks/000000.npz" in there(server, bucket)
    finally:
        subprocess.run(["umount", small], check=True)
    machine(1, tmp_path, monkeypatch)
    root = mirror.local(f"s3://{bucket}/s")
    writer = writer_of(root, blocks=3)
    for number in writer.missing():
        writer.put(number, images, labels)
    writer.finish({})
    assert np.array_equal(SyntheticStore.open(root).verify().read(np.arange(120))[0], np.concatenate([images] * 3))


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_what_is_read_is_fetched_and_nothing_else(
    server: str, bucket: str, straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/s"
    whole(mirror.local(url))
    machine(1, tmp_path, monkeypatch)
    store = SyntheticStore.open(url)
    assert not list(store.root.rglob("*.npy"))
    images, labels = store.read(np.array([13, 12]))
    assert np.array_equal(images, np.stack([block(3)[0][1], block(3)[0][0]]))
    assert labels.tolist() == [2, 1]
    assert sorted(p.name for p in store.root.rglob("*.npy")) == ["00001.npy", "labels.npy"]
    assert np.array_equal(store.stretch(24, 26)[0], block(6)[0])
    assert store.verify().digest == SyntheticStore.open(url).digest
    assert len(open_synthetic(url)) == 26
    with pytest.raises(UserError, match="expected a synthetic store"):
        SyntheticStore.open(f"s3://{bucket}/none")


def test_a_shard_that_was_changed_in_the_bucket_is_named(
    server: str, bucket: str, straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/s"
    whole(mirror.local(url))
    data = bytearray(straight["shards/00001.npy"])
    data[-1] ^= 1
    object_store.put(server, bucket, "s/shards/00001.npy", bytes(data))
    told = rf"^s3://{bucket}/s/shards/00001\.npy: expected SHA-256"
    with pytest.raises(EnvironmentFault, match=told):
        SyntheticStore.open(url).verify()  # though the copy here is as it was
    machine(1, tmp_path, monkeypatch)
    store = SyntheticStore.open(url)
    assert np.array_equal(store.stretch(0, 12)[0], np.concatenate([block(n)[0] for n in range(3)]))
    for act in (lambda: store.stretch(0, 26), lambda: store.read(np.array([13])), store.verify):
        with pytest.raises(EnvironmentFault, match=told):
            act()
    assert not (store.root / "shards/00001.npy").exists()


def test_a_damaged_copy_is_fetched_again_once_it_is_removed(bucket: str, straight) -> None:
    url = f"s3://{bucket}/s"
    whole(mirror.local(url))
    store = SyntheticStore.open(url)
    path = store.root / "shards/00001.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(EnvironmentFault, match=rf"copy of {url}/shards/00001.npy on this machine: remove it"):
        store.verify()
    path.unlink()
    assert SyntheticStore.open(url).verify().digest == store.digest


def test_a_store_of_many_shards_opens_from_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk: equal with and without the index, which a store of an earlier version gets; a wrong one is found."""
    for module in (reading, writing):
        monkeypatch.setattr(module, "WORTH_AN_INDEX", many := 6)
    for shards in (many - 1, many):
        writer = StoreWriter(root=tmp_path / f"{shards}", blocks=shards, blocks_per_shard=1)
        for number in range(shards):
            writer.put(number, np.full((1, 1, 1, 1), number, np.uint8), np.array([number % 3]))
        writer.finish({})
        assert (tmp_path / f"{shards}/index.json").exists() == (shards == many)
    root = tmp_path / f"{many}"
    index = (root / "index.json").read_text()
    digest = SyntheticStore.open(root).verify().digest
    for other in (None, "{", '{"format": 1, "shards": []}'):
        (root / "index.json").unlink() if other is None else (root / "index.json").write_text(other)
        assert SyntheticStore.open(root).digest == digest
        assert (root / "index.json").read_text() == index
    (root / "index.json").write_text(index.replace('"rows": 1', '"rows": 2', 1))
    with pytest.raises(EnvironmentFault, match=r"00000\.json: expected a record of"):
        SyntheticStore.open(root)
    record = root / "shards/00004.json"
    (root / "index.json").write_text(index)
    record.write_text(record.read_text().replace('"npy": "', '"npy": "0'))
    with pytest.raises(EnvironmentFault, match=r"00004\.json: expected the record that index\.json has"):
        SyntheticStore.open(root).verify()
    record.unlink()
    with pytest.raises(EnvironmentFault, match=r"00004\.json: expected a file, got no file"):
        SyntheticStore.open(root)


# ---- stages ----------------------------------------------------------------------------------------------------------


@stage(revision=1)
def count(work: Workspace, config: dict, *, seed: int) -> None:
    """Writes two files and one that no result is."""
    write_json(work.folder / "counted.json", {"seed": seed, **config})
    (work.folder / "state.safetensors").write_bytes(b"on the way")
    (work.folder / "large.bin").write_bytes(bytes(range(256)) * 100)


def test_a_stage_is_made_once_for_all_machines(
    server: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []

    def once(seed: int = 1) -> Artifact:
        root = mirror.local(f"s3://{bucket}/runs")
        return Store(root, report=lambda stage, done, total: told.append((stage, done))).once(
            count, {"a": 1}, seed=seed
        )

    here = once()
    names = {name.rpartition("/")[2] for name in object_store.contents(server, bucket)}
    assert names == {"counted.json", "large.bin", "done.json"}
    record = here.record
    machine(1, tmp_path, monkeypatch)
    found = once()
    assert told == [("count", 1), ("count", 0)]
    assert found.folder != here.folder
    assert found.record == record
    assert found.file("large.bin").read_bytes() == here.file("large.bin").read_bytes()
    once()
    assert told[2:] == [("count", 0)]
    (found.folder / ".delivered").unlink()
    (found.folder / "done.json").unlink()  # as a kill would leave it, between the files and the record
    once()
    assert told[3:] == [("count", 0)]
    machine(2, tmp_path, monkeypatch)
    named = Artifact("count", found.digest, mirror.local(f"s3://{bucket}/runs/stages/count") / found.folder.name)
    assert named.file("large.bin").read_bytes() == here.file("large.bin").read_bytes()  # as a run's record names it
    object_store.put(server, bucket, f"runs/stages/count/{found.folder.name}/large.bin", b"changed")
    machine(3, tmp_path, monkeypatch)
    with pytest.raises(EnvironmentFault, match=rf"s3://{bucket}/runs/stages/count/.*/large\.bin: expected SHA-256"):
        once()


def test_a_stage_that_was_not_sent_is_sent_at_the_next_start(
    server: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object) -> bool:
        raise EnvironmentFault("away")

    root, real = mirror.local(f"s3://{bucket}/runs"), Mirror.send
    monkeypatch.setattr(Mirror, "send", refuse)
    with pytest.raises(EnvironmentFault, match="away"):
        Store(root).once(count, {}, seed=1)
    monkeypatch.setattr(Mirror, "send", real)
    told: list[int] = []
    Store(root, report=lambda stage, done, total: told.append(done)).once(count, {}, seed=1)
    assert told == [0]  # the work was not done again
    assert len(object_store.contents(server, bucket)) == 3


def test_of_two_machines_that_make_one_stage_the_first_result_is_everyones(
    server: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @stage(revision=1)
    def slow(work: Workspace, config: dict, *, seed: int) -> None:
        machine(1, tmp_path, monkeypatch)
        other = stage(revision=1)(lambda work, config, seed: (work.folder / "x").write_text("other hardware"))
        named = type(other)("slow", 1, other.work)
        Store(mirror.local(f"s3://{bucket}/r")).once(named, config, seed=seed)
        (work.folder / "x").write_text("own hardware")

    artifact = Store(mirror.local(f"s3://{bucket}/r")).once(slow, {}, seed=1)
    assert artifact.file("x").read_text() == "other hardware"


def test_two_machines_that_send_one_stage_at_once_leave_a_whole_one(
    server: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looked before the first's record was there, and its files, of other hardware, go over the first's."""

    def make(text: str) -> None:
        @stage(revision=1)
        def pair(work: Workspace, config: dict, *, seed: int) -> None:
            (work.folder / "x").write_text(text)
            (work.folder / "y").write_text("of both")

        Store(mirror.local(f"s3://{bucket}/r")).once(pair, {}, seed=1)

    real, looked = mirror._record, list[Path]()

    def record(there: Mirror, folder: Path):
        found = real(there, folder)
        looked.append(folder)
        if len(looked) == 2:  # `delivered` of the second, after `brought`
            scratch = os.environ["GAMBESON_SCRATCH"]
            monkeypatch.setattr(mirror, "_record", real)
            machine(1, tmp_path, monkeypatch)
            make("first")
            monkeypatch.setenv("GAMBESON_SCRATCH", scratch)
        return found

    monkeypatch.setattr(mirror, "_record", record)
    make("second")
    assert len(looked) == 2
    for number in (1, 2):  # the first, and one that has nothing
        machine(number, tmp_path, monkeypatch)
        make("third")
    (folder,) = (mirror.local(f"s3://{bucket}/r") / "stages/pair").iterdir()
    files_there = {n.rpartition("/")[2]: d for n, d in object_store.contents(server, bucket).items()}
    assert (files_there["x"], (folder / "x").read_bytes()) == (b"second", b"second")


def test_a_record_that_leads_elsewhere_is_refused(
    server: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = mirror.local(f"s3://{bucket}/runs")
    made = Store(root).once(count, {}, seed=1)
    record = made.record
    record["files"]["../../outside"] = "0" * 64
    key = f"runs/stages/count/{made.folder.name}/done.json"
    object_store.put(server, bucket, key, json.dumps(record).encode())
    machine(1, tmp_path, monkeypatch)
    with pytest.raises(EnvironmentFault, match=r"done\.json: expected the record of a stage"):
        Store(mirror.local(f"s3://{bucket}/runs")).once(count, {}, seed=1)


def test_images_of_a_stage_are_the_same_on_a_disk_and_on_every_machine(
    server: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Digits(train_images=60, validation_images=1500).load()
    spec = GaussianControl(count=90, block=20, blocks_per_shard=2)
    on_disk = Store(tmp_path / "disk").once(gaussian_control, spec, real, seed=3)
    store = SyntheticStore.open(on_disk.folder / "images")
    for number in range(3):
        machine(number, tmp_path, monkeypatch)
        made = Store(mirror.local(f"s3://{bucket}/runs")).once(gaussian_control, spec, real, seed=3)
        found = SyntheticStore.open(made.folder / "images").verify()
        assert found.digest == store.digest
        assert np.array_equal(found.stretch(0, 90)[0], store.stretch(0, 90)[0])
        assert made.digest == on_disk.digest
    prefix = f"runs/stages/gaussian_control/{made.folder.name}/"
    names = {name.removeprefix(prefix) for name in object_store.contents(server, bucket)}
    assert names == {str(p.relative_to(on_disk.folder)) for p in on_disk.folder.rglob("*") if p.is_file()} - {
        ".lock",
        "attempts.json",
    }


def test_a_store_that_makes_no_condition_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some servers overwrite all the same; the trial object is gone in any case."""
    monkeypatch.setattr(Place, "create", lambda self, data: self.write(data) is None)
    with pytest.raises(
        EnvironmentFault, match="expected an object store that makes an object only where there is none"
    ):
        Store(mirror.local(f"s3://{bucket}/runs")).once(count, {}, seed=1)


# ---- paths, URLs and commands ----------------------------------------------------------------------------------------


def test_a_file_that_grows_goes_on_from_the_longest(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path() -> Path:
        return mirror.local(f"s3://{bucket}/runs/tiny/progress.jsonl")

    mirror.caught_up(path())  # nowhere yet
    assert not path().exists()
    path().parent.mkdir(parents=True)
    path().write_text("one\n")
    mirror.sent(path())
    machine(1, tmp_path, monkeypatch)
    mirror.caught_up(path())
    assert path().read_text() == "one\n"
    path().write_text("one\ntwo\n")  # not sent yet
    mirror.caught_up(path())
    assert path().read_text() == "one\ntwo\n"
    mirror.sent(path())
    machine(0, tmp_path, monkeypatch)
    mirror.caught_up(path())
    assert path().read_text() == "one\ntwo\n"
    mirror.caught_up(tmp_path / "elsewhere.jsonl")  # no mirror: nothing to do


def test_a_path_in_a_mirror_has_a_url_for_other_machines(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mirror.local(f"s3://{bucket}/runs/stages/x/y.bin")
    assert mirror.url_of(path) == f"s3://{bucket}/runs/stages/x/y.bin"
    assert mirror.place_of(path) == Place.of(f"s3://{bucket}/runs/stages/x/y.bin")
    assert mirror.local(mirror.url_of(path)) == path
    assert mirror.local(f"s3://{bucket}").joinpath("runs/stages/x/y.bin") == path
    assert mirror.url_of(tmp_path / "x") == str(tmp_path / "x")
    assert mirror.local(f"file://{tmp_path}/x") == tmp_path / "x"
    assert mirror.local("runs") == Path("runs")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    mirror.sent(path)
    mirror.sent(tmp_path / "nothing there, and no mirror")
    machine(1, tmp_path, monkeypatch)
    path = mirror.local(f"s3://{bucket}/runs/stages/x/y.bin")
    assert mirror.have(path)
    assert path.read_bytes() == b"abc"
    assert not mirror.have(path.with_name("z"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # another server's bucket is another bucket
    assert mirror.local(f"s3://{bucket}/runs/stages/x/y.bin") != path


@pytest.mark.parametrize("text", ['{"name": "mine"}', "[1]", '{"url": "s3://a-bucket"}', "no JSON"])
def test_a_file_of_that_name_makes_no_mirror(text: str, tmp_path: Path) -> None:
    """Somebody's own remote.json above the runs."""
    (tmp_path / "remote.json").write_text(text)
    assert Mirror.of(tmp_path / "runs") is None
    assert mirror.url_of(tmp_path / "runs/x") == str(tmp_path / "runs/x")


def test_what_could_not_be_sent_at_the_end_fails_the_command(
    bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 3; a command that failed by itself keeps its own fault."""

    def work(fails: bool) -> None:
        folder = mirrored_runs.open_runs(f"s3://{bucket}/runs", []) / "tiny"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text("{}")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        if fails:
            raise UserError("its own")

    monkeypatch.setenv("GAMBESON_PATIENCE", "0.3")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for fails, code in ((False, 3), (True, 2)):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setitem(cli.COMMANDS, "runs", lambda words, fails=fails: work(fails))
        found, text = told(["runs"], capsys)
        assert found == code
        assert f"s3://{bucket}/runs/tiny/run.json: expected to write it within 0.3 s" in text
        assert ("its own" in text) is fails


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(words)
    out = capsys.readouterr()
    return code, out.out + out.err


def test_secrets_and_servers_that_are_away_end_a_command_as_they_should(
    bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = told(["runs", "--runs", f"s3://AKIAX:hunter2@{bucket}/runs"], capsys)
    assert code == 2
    assert "hunter2" not in text
    assert "credentials" in text
    code, text = told(["runs", "--runs", f"s3://{bucket}/runs"], capsys)
    assert (code, text) == (0, f"no runs in {mirror.local(f's3://{bucket}/runs')}; `gambeson run digits` makes one\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("GAMBESON_PATIENCE", "0.5")
    code, text = told(["runs", "--runs", f"s3://{bucket}/runs"], capsys)
    assert code == 3
    assert f"s3://{bucket}/runs: expected to list it within 0.5 s" in text


@pytest.mark.slow
def test_a_whole_run_in_an_object_store_is_that_on_a_disk(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made, listed, shown and gone on with on machines that have nothing but the URL."""
    recipe = tiny_recipe(arms=(Arm.REAL, Arm.GAUSSIAN))
    recipes.save(recipe, tmp_path / "tiny.yaml")
    run = ["run", str(tmp_path / "tiny.yaml"), "--workers", "1"]
    assert told([*run, "--runs", str(tmp_path / "disk")], capsys)[0] == 0
    url = ["--runs", f"s3://{bucket}/runs"]
    assert told(run + url, capsys)[0] == 0
    roots = [tmp_path / "disk", mirror.local(url[1])]
    prints = [fingerprints(root / "stages") for root in roots]
    assert prints[0] == prints[1]
    name = f"tiny-{recipe.digest[:10]}"
    machine(1, tmp_path, monkeypatch)
    code, text = told(["runs", *url], capsys)
    assert (code, text.split()[:2]) == (0, [name, "complete"])
    code, text = told(["show", "tiny", *url], capsys)
    assert code == 0
    machine(2, tmp_path, monkeypatch)
    assert told(run + url, capsys)[0] == 0
    assert set(attempts(mirror.local(url[1])).values()) == {1}
    starts = [line for line in (mirror.local(url[1]) / name / "progress.jsonl").open() if '"start"' in line]
    assert len(starts) == 2, "the first machine's lines stay"
    assert (mirror.local(url[1]) / name / "report.html").is_file()
    assert fingerprints(mirror.local(url[1]) / "stages").items() <= prints[0].items()
