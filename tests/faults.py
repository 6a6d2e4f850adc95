"""Kill schedules for test_faults and test_cluster: who is killed when, and that nothing shows it afterwards."""

import hashlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from fault_driver import BLOCKS, PER_SHARD, SPEC, images

from gambeson.data.synthetic import StoreWriter, SyntheticStore

Kill = Callable[[subprocess.Popen[bytes]], bool]
"""Kills something of a running driver's; whether it was the driver itself."""


def contents(root: Path) -> dict[str, str]:
    """SHA-256 of every file of the finished images; every block is there exactly once and every checksum right."""
    (folder,) = (root / "stages" / "generate").glob("*/images")
    store = SyntheticStore.open(folder).verify()
    found = [b for shard in range(len(store.rows)) for b in store.facts_of(shard)["block"].to_pylist()]
    assert found == [block for block in range(BLOCKS) for _ in range(SPEC.size(block))]
    assert (folder.parent / "done.json").exists()
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def faultless(root: Path) -> dict[str, str]:
    """The same of images that were generated in this process, left alone."""
    images(root)
    return contents(root)


def prepared(whole: Path, root: Path) -> Path:
    """A root with the denoiser of another, and no images."""
    shutil.copytree(whole / "stages" / "train_denoiser", root / "stages" / "train_denoiser")
    return root


def blocks_done(root: Path) -> int:
    """Blocks that are written."""
    found = list((root / "stages" / "generate").glob("*/images"))
    if not found:
        return 0
    writer = StoreWriter(root=found[0], blocks=BLOCKS, blocks_per_shard=PER_SHARD)
    return sum(writer.has(block) for block in range(BLOCKS))


def suffer(root: Path, start: Callable[[], subprocess.Popen[bytes]], kills: dict[str, Kill], seed: int) -> list[str]:
    """One schedule: up to three kills at random moments; the driver is started again where it ended. What was hit."""
    times, hit = random.Random(seed), list[str]()
    process = start()
    for _ in range(times.randint(1, 3)):
        bar, pause, who = times.randint(0, BLOCKS - 2), times.uniform(0, 0.1), times.choice(sorted(kills))
        while process.poll() is None and blocks_done(root) < bar:
            time.sleep(0.005)
        time.sleep(pause)
        if process.poll() is not None:
            break
        hit.append(f"{who} at {blocks_done(root)}")
        if kills[who](process):
            process.wait()
            process = start()
    for _ in range(4):
        if process.wait(timeout=600) == 0:
            return hit
        process = start()
    raise AssertionError(f"it did not end well after {hit}: {process.wait()}")


def driver(process: subprocess.Popen[bytes]) -> bool:
    """Kills the driver."""
    process.send_signal(signal.SIGKILL)
    return True


def children(pid: int, word: str) -> list[int]:
    """Children of a process whose command line has a word in it."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                words = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if word.encode() in words:
                found.append(int(child))
    return found


def no_leftovers(root: Path) -> None:
    """No half-written file, and no block twice."""
    assert not list(root.rglob("*.part"))
    assert not list(root.rglob("blocks/*.npz"))
    tables = [pq.read_table(path) for path in root.glob("stages/generate/*/images/shards/*.parquet")]
    assert sum(table.num_rows for table in tables) == SPEC.count
