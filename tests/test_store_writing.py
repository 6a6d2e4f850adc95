"""Stores written by many: the layout to the byte, places of blocks, crashes anywhere, torn blocks, opening at once."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gambeson.data import reading, writing
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore, inherited, open_synthetic
from gambeson.errors import EnvironmentFault, UserError
from gambeson.models.files import save_tensors
from gambeson.sampling.guidance import Contrastive
from gambeson.store import Store
from gambeson.synthesis.gaussian import GaussianControl, gaussian_control
from gambeson.synthesis.generate import Sources, _origin
from gambeson.synthesis.generation import Generation

FORK = multiprocessing.get_context("fork")
BLOCKS, PER_SHARD = 7, 3
"""Shards of 3, 3 and 1 blocks; the last block has 2 images, the others 4."""


def block(number: int) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    size = 2 if number == BLOCKS - 1 else 4
    images = np.random.default_rng(number).integers(0, 256, (size, 3, 2, 1), dtype=np.uint8)
    return images, np.arange(size, dtype=np.int64) + number % 2, {"clipped": number / 10, "shift": 1.5}


def writer_of(root: Path, **more) -> StoreWriter:
    return StoreWriter(root=root, blocks=BLOCKS, blocks_per_shard=PER_SHARD, **more)


def write(root: Path, order=range(BLOCKS), **more) -> StoreWriter:
    writer = writer_of(root, **more)
    for number in order:
        if not writer.has(number):
            writer.put(number, *block(number))
    return writer


def whole(root: Path, order=range(BLOCKS), **more) -> dict[str, bytes]:
    write(root, order, **more).finish({"why": "test"})
    return contents(root)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return whole(tmp_path_factory.mktemp("straight") / "s")


def as_before(root: Path) -> dict[str, bytes]:
    """The shards as the first writer of this layout made them: np.save of all pixels, pyarrow of all columns."""
    for shard, members in enumerate(([0, 1, 2], [3, 4, 5], [6])):
        blocks = [block(number) for number in members]
        sizes = [len(labels) for _, labels, _ in blocks]
        columns = {
            "label": np.concatenate([labels for _, labels, _ in blocks]),
            "block": np.repeat(members, sizes),
            "index": np.concatenate([np.arange(size) for size in sizes]),
            "clipped": np.repeat([facts["clipped"] for _, _, facts in blocks], sizes),
            "shift": np.repeat([facts["shift"] for _, _, facts in blocks], sizes),
        }
        root.mkdir(exist_ok=True)
        np.save(root / f"{shard:05d}.npy", np.concatenate([images for images, _, _ in blocks]))
        pq.write_table(pa.table(columns), root / f"{shard:05d}.parquet")
        sums = {e: hashlib.sha256((root / f"{shard:05d}.{e}").read_bytes()).hexdigest() for e in ("npy", "parquet")}
        record = {"rows": sum(sizes), "shape": [3, 2, 1], "sha256": sums}
        (root / f"{shard:05d}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return contents(root)


def test_shards_are_those_of_the_first_writer_to_the_byte(straight: dict[str, bytes], tmp_path: Path) -> None:
    shards = {name.removeprefix("shards/"): data for name, data in straight.items() if name.startswith("shards/")}
    assert shards == as_before(tmp_path / "before")
    assert sorted(set(straight) - {f"shards/{name}" for name in shards}) == ["labels.npy", "store.json"]


@pytest.mark.parametrize("last", [2, 3])
def test_a_block_has_its_place_in_whatever_order(last: int, tmp_path: Path) -> None:
    """Also the last one, of another size, where it comes before any block that would tell its place."""
    found = set()
    for turn, order in enumerate(itertools.permutations(range(4))):
        writer = StoreWriter(root=tmp_path / f"{turn}", blocks=4, blocks_per_shard=last + 1)
        for number in order:
            images, labels, facts = block(number)
            keep = 4 if number < 3 else 3
            writer.put(number, images[:keep], labels[:keep], facts)
        writer.finish({})
        found.add(hashlib.sha256(repr(contents(tmp_path / f"{turn}")).encode()).hexdigest())
        assert not (tmp_path / f"{turn}/blocks").exists()
    assert len(found) == 1


def test_what_the_images_are_made_of_stands_in_each_shard_and_leaves_the_digest_alone(tmp_path: Path) -> None:
    origin = {"denoiser": "abc", "guidance": None, **inherited({"licence": "MIT"}, {"additional_data": ["faces"]})}
    whole(tmp_path / "plain")
    noted = whole(tmp_path / "noted", origin=origin)
    assert whole(tmp_path / "again", reversed(range(BLOCKS)), origin=origin) == noted
    plain, made = (SyntheticStore.open(tmp_path / name).verify() for name in ("plain", "noted"))
    assert made.digest == plain.digest
    for shard in range(3):
        assert json.loads(made.facts_of(shard).schema.metadata[writing.PROVENANCE]) == origin
        assert made.facts_of(shard).equals(plain.facts_of(shard))
    assert made.facts_of(0)["block"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(UserError, match="shard: expected 0 to 2"):
        made.facts_of(3)


def test_licences_and_sets_are_inherited_from_every_part() -> None:
    assert inherited() == {"licence": None, "additional_data": []}
    parts = [{"licence": "MIT", "additional_data": ["b"]}, {"licence": None}, {"licence": "CC-BY-4.0"}, {"x": 1}]
    once = inherited(*parts, {"additional_data": ["a", "b"]})
    assert once == {"licence": "CC-BY-4.0; MIT", "additional_data": ["a", "b"]}
    assert inherited(once, {"licence": "MIT"}) == once


def slow_writer(root: Path, seed: int, pause: float) -> None:
    """All blocks in an order of its own, without asking anyone; killed from outside at some point."""
    order = random.Random(seed).sample(range(BLOCKS), BLOCKS)
    pwrite = os.pwrite

    def torn(handle: int, data: bytes, offset: int) -> int:
        half = max(len(data) // 2, 1)
        written = pwrite(handle, bytes(data)[:half], offset)
        time.sleep(pause)
        return written

    os.pwrite = torn
    write(root, order)


@pytest.mark.parametrize("seed", range(3))
def test_killed_writers_lose_the_block_they_were_at(seed: int, straight: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "s"
    writers = [FORK.Process(target=slow_writer, args=(root, 10 * seed + i, 0.02)) for i in range(3)]
    for process in writers:
        process.start()
    deadline = time.monotonic() + 20
    while len(list(root.glob("blocks/*.npz"))) + 3 * len(list(root.glob("shards/*.json"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in writers:
        process.kill()
        process.join()
    assert {process.exitcode for process in writers} <= {-signal.SIGKILL, 0}
    left = writer_of(root).missing()
    again = [FORK.Process(target=write, args=(root, left[i:] + left[:i])) for i in range(2)]
    for process in again:
        process.start()
    for process in again:
        process.join(30)
    assert [process.exitcode for process in again] == [0, 0]
    writer_of(root).finish({"why": "test"})
    assert {k: v for k, v in contents(root).items() if not k.endswith(".part")} == straight


STEPS = ["os.ftruncate", "os.fsync", "write_table", "os.replace", "write_json", "unlink"]


def at(monkeypatch: pytest.MonkeyPatch, step: str, turn: int, act: Callable[[], None]) -> list[str]:
    """Does something just before the `turn`-th call of a step of finalising; returns what was done."""
    done: list[str] = []
    owner, name = {
        "write_table": (writing.pq, "write_table"),
        "write_json": (writing, "write_json"),
        "unlink": (Path, "unlink"),
    }.get(step, (writing.os, step.removeprefix("os.")))
    true = getattr(owner, name)
    calls = itertools.count()

    def stepped(*args, **kwargs):
        if next(calls) == turn and not done:
            done.append(step)
            act()
        return true(*args, **kwargs)

    monkeypatch.setattr(owner, name, stepped)
    return done


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("step", STEPS)
def test_two_finalise_a_shard_at_once(
    step: str, turn: int, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one does all of it at every point of this one's work."""
    root = tmp_path / "s"
    write(root, [0, 1, 3, 4])
    (root / "blocks/000002.npz").parent.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "complete", lambda writer, shard: False)
        write(root, [2])
    done = at(monkeypatch, step, turn, lambda: writer_of(root).missing())
    assert writer_of(root).complete(0) or done
    monkeypatch.undo()
    write(root)
    writer_of(root).finish({"why": "test"})
    assert contents(root) == straight


@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_finalising_goes_on_after_a_crash_at_any_point(
    step: str, turn: int, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "s"
    write(root, [6, 0, 1, 3, 4])

    def crash() -> None:
        raise KeyboardInterrupt

    done = at(monkeypatch, step, turn, crash)
    try:
        write(root, [2, 5])
    except KeyboardInterrupt:
        assert done
    monkeypatch.undo()
    left = writer_of(root).missing()
    assert set(left) <= {2, 5}  # nothing that had its marker is made again
    write(root, left)
    writer_of(root).finish({"why": "test"})
    assert contents(root) == straight


def test_many_processes_finalise_at_once(straight: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "s"
    original = StoreWriter.complete
    StoreWriter.complete = lambda writer, shard: False  # type: ignore[method-assign]
    try:
        write(root)
    finally:
        StoreWriter.complete = original  # type: ignore[method-assign]
    everyone = [FORK.Process(target=lambda: writer_of(root).finish({"why": "test"})) for _ in range(5)]
    for process in everyone:
        process.start()
    for process in everyone:
        process.join(30)
    assert [process.exitcode for process in everyone] == [0] * 5
    assert contents(root) == straight


@pytest.mark.parametrize("damage", ["flip", "cut", "zeros", "gone"])
def test_a_torn_block_is_found_and_made_again(damage: str, straight: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "s"
    write(root, [0, 1])
    part = root / "shards/00000.npy.part"
    data = bytearray(part.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    part.write_bytes({"cut": data[:-5], "zeros": data[:-24] + bytes(24)}.get(damage, data))
    if damage == "gone":
        part.unlink()
    writer = write(root, [2])
    torn = [0, 1] if damage == "gone" else [1]
    assert writer.missing() == [*torn, 3, 4, 5, 6]
    assert not (root / "shards/00000.json").exists()
    assert whole(root) == straight


@pytest.mark.parametrize("carry", [False, True])
def test_a_flipped_bit_of_a_marker_is_a_damaged_marker_or_none(carry: bool, tmp_path: Path) -> None:
    """Each bit of its lists of arrays: what says how they are packed, their names, their lengths."""
    images = np.zeros((2, 2, 2, 1), np.uint8)
    whole = writing.Marker.of(images, np.arange(2), {"clipped": 0.5}, carry)
    data, path = whole.packed(), tmp_path / "0.npz"
    for place in range(data.index(b"PK\x01\x02"), len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            found = writing.Marker.read(path)
            if found is not None:
                assert (found.shape, found.crc, list(found.facts)) == (whole.shape, whole.crc, ["clipped"])
                assert (found.images is not None) is carry
    path.write_bytes(data)
    assert writing.Marker.read(path) is not None


def test_a_torn_block_is_found_when_the_shard_had_its_name_already(
    straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "s"
    write(root, range(6))
    shards = root / "shards"
    assert not (shards / "00001.npy.part").exists()
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "complete", lambda writer, shard: False)
        write(tmp_path / "other", [3, 4, 5])
    (root / "blocks").mkdir(exist_ok=True)
    for marker in (tmp_path / "other/blocks").iterdir():
        marker.rename(root / "blocks" / marker.name)
    (shards / "00001.json").unlink()  # as if power was lost after the renaming, and took some bytes
    data = bytearray((shards / "00001.npy").read_bytes())
    data[-1] ^= 1
    (shards / "00001.npy").write_bytes(data)
    assert writer_of(root).missing() == [5, 6]
    assert whole(root) == straight


def test_a_full_disk_is_an_environment_fault_and_the_rest_is_kept(
    straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "s"
    write(root, [0])
    pwrite = os.pwrite

    def full(handle: int, data: bytes, offset: int) -> int:
        if len(data) <= 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(handle, bytes(data)[:12], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(EnvironmentFault, match=r"00000\.npy: .*No space left"):
        writer_of(root).put(1, *block(1))
    monkeypatch.undo()
    assert [number for number in range(BLOCKS) if writer_of(root).has(number)] == [0]
    assert whole(root) == straight


def test_short_writes_are_continued(
    straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: pwrite(handle, bytes(data)[:5], offset))
    assert whole(tmp_path / "s") == straight


def test_a_folder_that_cannot_be_written_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="expected to write this file"):
        writer_of(tmp_path / "file/s").put(0, *block(0))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_an_environment_fault(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentFault, match="Permission denied"):
        writer_of(tmp_path / "s").put(0, *block(0))


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = write(tmp_path / "s", [0])
    images, labels, facts = block(1)
    bad = {
        "images of a block: expected uint8": (images.astype(np.float32), labels, facts),
        r"expected uint8 \[m": (images[0], labels, facts),
        "labels of a block: expected 4 whole": (images, labels[:3], facts),
        "labels of a block": (images, labels.astype(np.float32), facts),
        r"block 1: expected images \[4, 3, 2, 1\]": (images[:3], labels[:3], facts),
        "block 1: expected images": (images.reshape(4, 2, 3, 1), labels, facts),
        "block 1: expected the facts": (images, labels, {"clipped": 1.0}),
        "with m above 0": (images[:0], labels[:0], facts),
    }
    for message, arguments in bad.items():
        with pytest.raises(UserError, match=message):
            writer.put(1, *arguments)
    with pytest.raises(UserError, match="block: expected 0 to 6"):
        writer.put(7, *block(1))
    assert writer.missing() == [1, 2, 3, 4, 5, 6]
    write(tmp_path / "s", [1, 2])  # a finished shard tells what fits, too
    with pytest.raises(UserError, match="block 3: expected images"):
        writer.put(3, images[:, :2], labels, facts)
    with pytest.raises(UserError, match="block 6: expected images"):
        writer.put(6, images[:, :2], labels, facts)
    with pytest.raises(UserError, match="blocks_per_shard"):
        StoreWriter(root=tmp_path, blocks=1, blocks_per_shard=0)


def test_two_first_blocks_that_do_not_fit_are_found_when_the_shard_is_full(tmp_path: Path) -> None:
    images, labels, facts = block(0)
    StoreWriter(root=tmp_path, blocks=3, blocks_per_shard=2).put(0, images, labels, facts)
    other = StoreWriter(root=tmp_path / "other", blocks=3, blocks_per_shard=2)
    other.put(1, images[:3], labels[:3], facts)
    (tmp_path / "other/blocks/000001.npz").rename(tmp_path / "blocks/000001.npz")
    with pytest.raises(UserError, match="block 1: expected shape and facts of block 0"):
        StoreWriter(root=tmp_path, blocks=3, blocks_per_shard=2).missing()


def test_a_block_that_is_there_is_not_written_again(straight: dict[str, bytes], tmp_path: Path) -> None:
    writer = write(tmp_path / "s")
    images, labels, facts = block(0)
    writer.put(0, 255 - images, labels, facts)
    writer.finish({"why": "test"})
    assert contents(tmp_path / "s") == straight


def test_a_store_is_not_finished_without_all_blocks(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"expected all 7 blocks, 2 are missing .*\(2, 6\)"):
        write(tmp_path / "s", [0, 1, 3, 4, 5]).finish({})
    assert not (tmp_path / "s/store.json").exists()


def test_finished_blocks_of_the_first_writer_are_taken_over(straight: dict[str, bytes], tmp_path: Path) -> None:
    """An unfinished store of an earlier version: whole blocks as .npz."""
    root = tmp_path / "s"
    (root / "blocks").mkdir(parents=True)
    for number in (0, 4):
        images, labels, facts = block(number)
        columns = {f"fact_{name}": np.full(len(labels), value) for name, value in facts.items()}
        np.savez(root / f"blocks/{number:06d}.npz", images=images, labels=labels, **columns)
    assert writer_of(root).missing() == [1, 2, 3, 5, 6]
    assert whole(root) == straight


def test_what_a_late_writer_of_a_finished_block_left_is_removed(straight: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "s"
    writer = write(root)
    (root / "blocks").mkdir(exist_ok=True)
    (root / "blocks/000001.npz").write_bytes(b"late")
    (root / "shards/00000.npy.part").write_bytes(b"late")
    writer.finish({"why": "test"})
    writer.finish({"why": "test"})
    assert contents(root) == straight


def test_opening_reads_no_image_and_sees_what_is_missing_or_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(tmp_path / "s")
    shard = tmp_path / "s/shards/00001.npy"
    data = shard.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    shard.write_bytes(flipped)
    store = SyntheticStore.open(tmp_path / "s")
    with pytest.raises(EnvironmentFault, match=r"00001\.npy: expected SHA-256"):
        store.verify()
    with pytest.raises(EnvironmentFault, match=r"00001\.npy: expected SHA-256"):
        open_synthetic(tmp_path / "s")  # a small one is compared whenever it is used
    monkeypatch.setattr(reading, "VERIFIED_AT_ONCE", 71)
    assert len(open_synthetic(tmp_path / "s")) == 26  # of 156 bytes: a large one only when asked to
    shard.write_bytes(data[:-1])
    with pytest.raises(EnvironmentFault, match=r"00001\.npy: expected 200 bytes, got 199 bytes"):
        SyntheticStore.open(tmp_path / "s")
    with pytest.raises(EnvironmentFault, match="a file cut short"):
        store.stretch(12, 24)
    shard.unlink()
    with pytest.raises(EnvironmentFault, match=r"00001\.npy: expected 200 bytes, got no file"):
        SyntheticStore.open(tmp_path / "s")
    shard.write_bytes(data)
    record = shard.with_suffix(".json")
    text = record.read_text()
    record.write_text(text.replace('"rows": 12', '"rows": 13'))
    with pytest.raises(EnvironmentFault, match=r"00001\.json: expected a record of"):
        SyntheticStore.open(tmp_path / "s")
    record.write_text(text)
    shard.with_suffix(".parquet").unlink()
    with pytest.raises(EnvironmentFault, match=r"00001\.parquet: expected a file, got no file"):
        SyntheticStore.open(tmp_path / "s")


def test_verifying_tells_how_far_it_is(tmp_path: Path) -> None:
    whole(tmp_path / "s")
    told: list[tuple[int, int]] = []
    SyntheticStore.open(tmp_path / "s").verify(lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_labels_are_mapped_and_made_again_where_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(tmp_path / "s")
    path = tmp_path / "s/labels.npy"
    expected = np.concatenate([block(number)[1] for number in range(BLOCKS)])
    stored = path.read_bytes()
    for wrong in (None, b"", stored[:-1], b"\x93NUMPY"):
        path.unlink() if wrong is None else path.write_bytes(wrong)
        labels = SyntheticStore.open(tmp_path / "s").compact_labels
        assert isinstance(labels, np.memmap)
        assert labels.dtype == np.uint8
        assert labels.tolist() == expected.tolist()
        assert path.read_bytes() == stored
    path.write_bytes(stored[:-1] + b"\x07")
    with pytest.raises(
        EnvironmentFault, match=r"labels\.npy: expected the labels of the shards, got others in shard 2"
    ):
        SyntheticStore.open(tmp_path / "s").verify()
    path.unlink()

    def refused(*_: object) -> None:
        raise EnvironmentFault("read-only")

    monkeypatch.setattr(reading, "write_labels", refused)
    assert SyntheticStore.open(tmp_path / "s").compact_labels.tolist() == expected.tolist()
    assert not path.exists()


def test_a_store_travels_to_other_processes_without_its_maps(tmp_path: Path) -> None:
    whole(tmp_path / "s")
    store = SyntheticStore.open(tmp_path / "s")
    store.read(np.arange(26))
    assert len(pickle.dumps(store)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read(np.arange(26))[0], store.read(np.arange(26))[0])


def test_stretches_are_what_reading_gives(tmp_path: Path) -> None:
    whole(tmp_path / "s")
    store = SyntheticStore.open(tmp_path / "s")
    everything = store.read(np.arange(26))
    positions = np.array([25, 0, 1, 2, 13, 12, 12, 5])
    Chosen.write(tmp_path / "chosen.parquet", store, positions, np.arange(8))
    chosen = Chosen.open(tmp_path / "chosen.parquet")
    for start, stop in ((0, 26), (0, 0), (11, 13), (12, 24), (3, 25), (26, 26)):
        for ours, all_of_it in zip(store.stretch(start, stop), everything, strict=True):
            assert np.array_equal(ours, all_of_it[start:stop])
    for start, stop in ((0, 8), (0, 0), (1, 4), (4, 8)):
        images, labels = chosen.stretch(start, stop)
        assert np.array_equal(images, everything[0][positions[start:stop]])
        assert labels.tolist() == list(range(start, stop))
    with pytest.raises(UserError, match="store positions: expected 0 to 26"):
        store.stretch(5, 27)


def test_a_selection_is_mapped_and_its_maps_are_never_stale(tmp_path: Path) -> None:
    whole(tmp_path / "s")
    store, path = SyntheticStore.open(tmp_path / "s"), tmp_path / "chosen.parquet"
    Chosen.write(path, store, np.array([3, 1]), np.array([0, 1]))
    first = Chosen.open(path)
    assert isinstance(first.positions, np.memmap)
    maps = sorted(p.name for p in tmp_path.glob("chosen.*.npy"))
    assert len(maps) == 2
    held = path.read_bytes()
    Chosen.write(path, store, np.array([3, 1]), np.array([1, 0]))  # other labels, in a file of the same size
    assert path.stat().st_size == len(held)
    assert Chosen.open(path).compact_labels.tolist() == [1, 0]
    assert len(list(tmp_path.glob("chosen.*.npy"))) == 2  # the old ones are gone
    path.write_bytes(held)  # another's file in its place: the maps are not its own
    again = Chosen.open(path)
    assert not isinstance(again.positions, np.memmap)
    assert (again.positions.tolist(), again.compact_labels.tolist()) == ([3, 1], [0, 1])
    assert again.digest == first.digest
    with pytest.raises(UserError, match="selection: expected at least one image"):
        Chosen.write(tmp_path / "none.parquet", store, np.arange(0), np.arange(0))
    assert not list(tmp_path.glob("*none*"))


def test_a_hundred_million_rows_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 shards of half a million 32 x 32 x 3 images, as holes; only what is read at the start is really there."""
    shards, rows = 200, 500_000
    (tmp_path / "s/shards").mkdir(parents=True)
    record = {"rows": rows, "shape": [32, 32, 3], "sha256": {"npy": "0" * 64, "parquet": "0" * 64}}
    for shard in range(shards):
        with open(tmp_path / f"s/shards/{shard:05d}.npy", "wb") as file:
            file.write(writing.head_of(rows, (32, 32, 3)))
            file.truncate(128 + rows * 3072)
        (tmp_path / f"s/shards/{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"s/shards/{shard:05d}.json").write_text(json.dumps(record))
    labels = np.lib.format.open_memmap(tmp_path / "s/labels.npy", "w+", np.uint8, (shards * rows,))
    labels[-1] = 9
    labels.flush()
    header = {"format": 1, "rows": [rows] * shards, "shape": [32, 32, 3], "provenance": {}}
    (tmp_path / "s/store.json").write_text(json.dumps(header))
    begun = time.process_time()
    store = open_synthetic(tmp_path / "s")
    assert isinstance(store, SyntheticStore)
    images, found = store.read(np.array([len(store) - 1, 0]))
    assert time.process_time() - begun < 1
    assert len(store) == 100_000_000
    assert found.tolist() == [9, 0]
    assert not images.any()


def test_stages_say_what_their_images_are_made_of(tmp_path: Path) -> None:
    """The Gaussian control whole; generation by its part that says so, with networks that name licences and sets."""
    part = Split(torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2)
    real = ImageSet(name="r", train=part, validation=part, test=part, class_names=("a", "b"), flip_safe=False)
    made = Store(tmp_path).once(gaussian_control, GaussianControl(count=10, block=4, blocks_per_shard=2), real, seed=1)
    store = SyntheticStore.open(made.folder / "images").verify()
    assert store.provenance["real"] == real.digest
    assert (store.provenance["licence"], store.provenance["additional_data"]) == (None, [])
    for shard in range(2):
        assert json.loads(store.facts_of(shard).schema.metadata[writing.PROVENANCE]) == store.provenance

    for name, header in (("denoiser", {"licence": "MIT"}), ("encoder", {"additional_data": ["faces"], "log": []})):
        save_tensors(tmp_path / f"{name}.safetensors", {"a": torch.zeros(1)}, {"kind": name, **header})
    sources = Sources(denoiser=tmp_path / "denoiser.safetensors", encoder=tmp_path / "encoder.safetensors")
    inputs = {"denoiser": made, "encoder": None, "embedding": None}
    plain, guided = (_origin(Generation(guidance=g), sources, inputs, 3) for g in (None, Contrastive(strength=2.0)))
    assert (guided["licence"], guided["additional_data"]) == ("MIT", ["faces"])
    assert (guided["denoiser"], guided["encoder"], guided["seed"]) == (made.digest, None, 3)
    assert plain["guidance"] is None
    assert len(guided["guidance"]) == 64
    assert guided["generation"]["guidance"]["strength"] == 2.0
