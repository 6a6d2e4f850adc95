"""Workers and drivers are killed at random moments, on real processes: what comes of it is the faultless store."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fault_driver import images
from faults import children, contents, driver, faultless, no_leftovers, prepared, suffer
from test_story import start as start_run
from tiny import fingerprints, tiny_recipe

from gambeson import files
from gambeson.data.synthetic import SyntheticStore
from gambeson.errors import EnvironmentFault
from gambeson.recipe import Arm

pytestmark = pytest.mark.slow

SCHEDULES = 45


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A root whose images nobody disturbed, and what they weigh."""
    root = tmp_path_factory.mktemp("whole")
    return root, faultless(root)


def one_worker(process: subprocess.Popen[bytes]) -> bool:
    for worker in children(process.pid, "spawn_main")[:1]:
        os.kill(worker, signal.SIGKILL)
    return False


def all_workers(process: subprocess.Popen[bytes]) -> bool:
    for worker in children(process.pid, "spawn_main"):
        os.kill(worker, signal.SIGKILL)
    return False


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_whoever_is_killed_the_store_is_the_faultless_one(
    seed: int, whole: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root = prepared(whole[0], tmp_path / "root")
    script = str(Path(__file__).with_name("fault_driver.py"))

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, script, str(root), "local"], stdout=subprocess.DEVNULL)

    hit = suffer(root, start, {"driver": driver, "a worker": one_worker, "all workers": all_workers}, seed)
    assert contents(root) == whole[1], hit
    no_leftovers(root)


def test_a_shard_that_is_corrupted_afterwards_is_named_and_made_anew(
    whole: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """One bit of one pixel; nothing reads on, and the stage without its folder is made to the same bytes."""
    root = prepared(whole[0], tmp_path / "root")
    folder = images(root).folder
    path = folder / "images" / "shards" / "00001.npy"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(EnvironmentFault, match=r"00001\.npy: expected SHA-256 .*move the folder"):
        SyntheticStore.open(folder / "images").check()
    folder.rename(tmp_path / "away")
    images(root)
    assert contents(root) == whole[1]


def test_two_drivers_on_one_run_one_wins_and_the_other_exits_with_3(tmp_path: Path) -> None:
    """By the command, at the same time; the winner's run is that of a driver alone. Killed, it is followed at once."""
    files.save(tiny_recipe((Arm.REAL,)), tmp_path / "recipe.yaml")
    alone = start_run(tmp_path / "recipe.yaml", tmp_path / "alone")
    assert alone.wait() == 0
    runs = tmp_path / "runs"
    two = [start_run(tmp_path / "recipe.yaml", runs) for _ in range(2)]
    codes = [process.wait() for process in two]
    assert sorted(codes) == [0, 3]
    lost = two[codes.index(3)]
    assert lost.stderr is not None
    assert f"got another: process {two[codes.index(0)].pid} on" in " ".join(lost.stderr.read().decode().split())
    assert fingerprints(runs) == fingerprints(tmp_path / "alone")
