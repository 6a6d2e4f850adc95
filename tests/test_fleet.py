"""Workers of any fleet do every item once, whoever is killed; their pace is told, and a disk that is too small."""

import itertools
import os
import signal
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fleet_tools import open_failing, open_mortal, open_square

from gambeson.data.synthetic import StoreWriter, SyntheticStore
from gambeson.errors import EnvironmentFault, UserError
from gambeson.fleet import Aloud, Here, Local, Waiting
from gambeson.machine import Machine
from gambeson.options import take_machine
from gambeson.store import Workspace
from gambeson.synthesis import label as labelling
from gambeson.synthesis import room, scorers
from gambeson.synthesis.label import Labeling
from gambeson.synthesis.pace import Pace, stragglers, told
from gambeson.synthesis.pool import LabelFile
from gambeson.synthesis.select import Selection, select


def squares(count: int) -> list[tuple[int, int]]:
    return [(i, i * i) for i in range(count)]


def test_every_item_is_done_once_and_tools_are_opened_once(tmp_path: Path) -> None:
    """By one process and by two, which take items of an endless row as they get free, and are gone afterwards."""
    assert [(d.item, d.result[0]) for d in Here().each(open_square, (tmp_path,), range(7))] == squares(7)
    assert len(list(tmp_path.iterdir())) == 2  # opened and did, by this process
    place, taken = tmp_path / "two", itertools.count()
    place.mkdir()
    with closing(Local(2).each(open_square, (place, 0.02), taken)) as endless:
        found = list(itertools.islice(endless, 60))
    assert next(taken) <= 60 + 2 * 2
    assert len({d.item for d in found}) == 60
    assert all(d.result[0] == d.item**2 and d.seconds >= 0.02 for d in found)
    assert {d.worker for d in found} == {"worker 1", "worker 2"}
    processes = {d.result[1] for d in found}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert [p.read_text() for p in place.glob("opened-*")] == ["opened\n"] * 2
    assert not [p for p in processes if Path(f"/proc/{p}").exists()]


def test_no_process_is_started_for_nothing(tmp_path: Path) -> None:
    assert list(Local(2).each(open_square, (tmp_path,), [])) == []
    assert list(tmp_path.iterdir()) == []
    assert [d.result[1] for d in Local(2).each(open_square, (tmp_path,), [3])] == [os.getpid()]


def test_the_item_of_a_killed_worker_is_done_by_another(tmp_path: Path) -> None:
    """Killed twice over one item, by SIGKILL in the middle of it."""
    lines: list[str] = []
    found = list(Local(2).each(open_mortal, (tmp_path, 3, 2), range(8), lines.append))
    assert sorted((d.item, d.result) for d in found) == squares(8)
    assert len(lines) == 2
    assert all("ended from outside; another does item 3" in line for line in lines)


def test_a_worker_that_was_stopped_holds_nobody_up(tmp_path: Path) -> None:
    """SIGSTOP: it hears of no polite signal, and the end would wait for it for ever."""
    with closing(Local(2).each(open_square, (tmp_path, 0.02), itertools.count())) as endless:
        ids = {done.result[1] for done in itertools.islice(endless, 20)}
        os.kill(max(ids), signal.SIGSTOP)
        rescue = threading.Timer(20, os.kill, (max(ids), signal.SIGCONT))
        rescue.start()
        began = time.monotonic()
    rescue.cancel()
    assert time.monotonic() - began < 10


def test_an_item_that_ends_its_workers_is_named() -> None:
    """Three that began it; those that only had it before them do not count."""
    waiting = Waiting(iter([1, 2]))
    for _ in range(2):
        first, second = waiting.take(), waiting.take()
        waiting.give_back(first)
        waiting.give_back(second, counts=False)
    assert (first, second, waiting.lost) == (1, 2, {1: 2})
    assert waiting.some()
    with pytest.raises(EnvironmentFault, match="item 1: 3 workers that did it were ended from outside"):
        waiting.give_back(1)


def test_an_error_is_raised_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the caller's mistake") as told_here:
        list(Here().each(open_failing, ("the caller's mistake",), range(4)))
    with pytest.raises(UserError, match="the caller's mistake") as told_there:
        list(Local(2).each(open_failing, ("the caller's mistake",), range(4)))
    assert (told_here.type, told_here.value.args) == (told_there.type, told_there.value.args)
    assert "fleet_tools.py" in str(told_there.value.__cause__)


# ---- labels and scores -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    """26 images of 8 x 8 in shards of 8, 8, 8 and 2."""
    root = tmp_path_factory.mktemp("images") / "store"
    writer = StoreWriter(root=root, blocks=7, blocks_per_shard=2)
    draw = np.random.default_rng(0)
    for block in range(7):
        size = 2 if block == 6 else 4
        images = draw.integers(0, 256, (size, 8, 8, 1), dtype=np.uint8)
        writer.put(block, images, (np.arange(size) + 4 * block) % 3)
    writer.finish({"why": "test", "class_names": ["a", "b", "c"]})
    return SyntheticStore.open(root)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory):
    """A classifier on disk."""
    from gambeson.models.classifiers import classifier_header
    from gambeson.models.files import save_tensors
    from gambeson.models.resnet import ResNetSpec
    from gambeson.robustness.subjects import subject_of

    folder = tmp_path_factory.mktemp("teacher")
    model = ResNetSpec(width=4).build(1, 3, 0)
    save_tensors(folder / "classifier.safetensors", model.state_dict(), classifier_header(model, (1, 8, 8)))
    return subject_of(str(folder), (1, 8, 8))


def test_labels_and_scores_do_not_depend_on_workers(
    store: SyntheticStore, teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, and after a break too; labels in pieces are those in one."""
    folders = [tmp_path / name for name in ("one", "pieces", "two")]
    for folder, piece, workers in zip(folders, (1 << 12, 4, 4), (1, 1, 2), strict=True):
        folder.mkdir()
        monkeypatch.setattr(labelling, "PIECE", piece)
        work = Workspace(folder, machine=Machine(workers=workers))
        labelling.label.work(work, Labeling(batch_size=2), store, teacher)
        assert not (folder / "parts").exists()
    first, *others = [(folder / "labels.parquet").read_bytes() for folder in folders]
    assert all(other == first for other in others)
    labels, spec = LabelFile(folders[0] / "labels.parquet"), Selection(score=scorers.Separability(), per_class=3)
    tables = []
    for workers in (1, 2):
        folder = tmp_path / f"select-{workers}"
        folder.mkdir()
        select.work(Workspace(folder, machine=Machine(workers=workers)), spec, store, labels, teacher)
        (kept,) = (store.root / "scores").iterdir()
        tables.append([pq.read_table(path) for path in sorted(kept.glob("*.parquet"))])
        assert (kept / "centroids.safetensors").is_file()
        for path in sorted(kept.glob("*.parquet"))[1:] if workers == 1 else []:
            path.unlink()  # all but the first shard are scored again, by the centroids that were kept
    assert tables[0] == tables[1]
    chosen = [pq.read_table(tmp_path / f"select-{n}" / "chosen.parquet") for n in (1, 2)]
    assert chosen[0].equals(chosen[1])


# ---- pace and room ---------------------------------------------------------------------------------------------------


def test_rates_stragglers_and_estimate_by_hand() -> None:
    """Two workers at 10 images/s, one at 2: it is slow; 1,000,000 images at 10/s are 27.8 hours."""
    now, lines = [0.0], list[str]()
    pace = Pace("generate", 1_000_000, 0, "GPU", lines.append, lambda: now[0])
    for worker, seconds in (("a", 10.0), ("b", 10.0), ("a", 10.0)):
        pace.note(worker, 100, seconds)
    assert lines == [
        "estimate: 1,000,000 images: about 28 GPU-hours at the measured rate (10 images/s a worker); 13.9 h left with "
        "2 workers"
    ]
    now[0] = 11.0
    pace.note("c", 100, 50.0)
    assert pace.rates(now[0]) == {"c": 2.0, "a": 10.0, "b": 10.0}
    assert stragglers(pace.rates(now[0])) == {"c": 2.0}
    assert lines[1] == "generate: 22 images/s from 3 workers (2 to 10 each); slow: c at 2"
    assert isinstance(lines[1], Aloud)
    assert lines[1].workers == {"c": 2.0, "a": 10.0, "b": 10.0}
    now[0] = 10_000.0
    pace.note("a", 100, 10.0)
    assert list(pace.rates(now[0])) == ["a"]  # the others have not been heard of
    assert stragglers({"a": 1.0}) == {}
    assert told({}) == "no worker has been heard of lately"


def test_the_first_blocks_tell_what_all_cost_only_where_some_are_left() -> None:
    lines: list[str] = []
    pace = Pace("generate", 30, 0, say=lines.append)
    for _ in range(3):
        pace.note("a", 10, 1.0)
    assert lines == []


def test_a_store_takes_the_bytes_that_are_foretold(store: SyntheticStore, tmp_path: Path) -> None:
    """Pixels to the byte; tables and records are overestimated a little, never under."""
    need = room.store_bytes(26, 4, 2, (1, 8, 8))
    pixels = sum(p.stat().st_size for p in (store.root / "shards").glob("*.npy"))
    assert pixels == 26 * 64 + 4 * 128
    whole = sum(p.stat().st_size for p in store.root.rglob("*") if p.is_file() and "scores" not in str(p))
    assert pixels < whole <= need
    room.check_room(tmp_path / "new" / "images", need, "26 images")
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(EnvironmentFault, match=r"GB free for many images, got .*Nothing was started") as refused:
        room.check_room(tmp_path / "new" / "images", 2 * free, "many images")
    assert refused.value.code == 3
    assert not (tmp_path / "new").exists()


def test_files_that_go_while_they_are_counted_count_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").write_bytes(b"x" * 5000)
    gone, real = tmp_path / "gone", Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: [*real(folder, pattern), gone])
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # it was there a moment ago
    assert room.taken(tmp_path) == (tmp_path / "kept").stat().st_blocks * 512 > 0


def test_machines_say_who_works() -> None:
    assert isinstance(Machine().fleet, Here)
    assert Machine(workers=3).fleet == Local(3)
    words = ["--engine", "ray", "--address", "10.0.0.1:6379", "--workers", "8"]
    machine = take_machine(words, cluster=True)
    assert (words, machine.engine, machine.address, machine.cluster_workers) == ([], "ray", "10.0.0.1:6379", 8)
    assert take_machine(["--workers", "3"], cluster=True) == Machine(workers=3)
    for wrong in ({"engine": "slurm"}, {"address": "10.0.0.1:6379"}):
        with pytest.raises(UserError, match="engine"):
            replace(Machine(), **wrong)
    assert torch.get_num_threads() == 1
