"""A Ray cluster on this machine, of real processes on 127.0.0.1: bits, versions, and whatever is lost."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import object_store
import pytest
from fault_driver import images
from faults import children, contents, driver, faultless, no_leftovers, prepared, suffer
from fleet_tools import open_failing, open_mortal, open_square

import gambeson
from gambeson.errors import EnvironmentFault, UserError
from gambeson.machine import Machine

pytestmark = pytest.mark.slow

ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Of Ray: everything on 127.0.0.1."""
NODE = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20, "include_dashboard": False}


class Nodes:
    """A cluster of a head without workers and two machines of one worker each."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        from ray.cluster_utils import Cluster

        self.cluster, self.before = Cluster(), before
        self.add(num_cpus=0)
        self.workers = [self.add() for _ in range(2)]
        self.address = self.cluster.address

    def add(self, num_cpus: int = 1) -> Any:
        """A machine more; Ray gives a busy computer 30 s to start one."""
        self.before()  # what a machine starts with is what the environment says now
        for _ in range(3):
            try:
                return self.cluster.add_node(**NODE, num_cpus=num_cpus)
            except Exception as error:
                if "timed out" not in str(error):
                    raise
        raise AssertionError("this machine is too busy to start a node of Ray")

    def lose(self, place: int = 0) -> None:
        """A machine is gone, and another comes."""
        self.cluster.remove_node(self.workers.pop(place), allow_graceful=False)
        self.workers.append(self.add())

    def processes(self) -> list[int]:
        """Of the workers that have been started."""
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.workers]
        return [pid for raylet in raylets for pid in children(raylet, "ray::Worker")]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    before = {name: os.environ.get(name) for name in [*ALONE, "PYTHONPATH"]}
    here = str(Path(__file__).parent)
    os.environ.update(ALONE, PYTHONPATH=os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
    pytest.importorskip("ray")  # reads where its servers listen when it is imported: only now
    made = Nodes()
    yield made
    import ray

    ray.shutdown()
    made.cluster.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A root whose images this process made alone, and what they weigh."""
    root = tmp_path_factory.mktemp("whole")
    return root, faultless(root)


def ray_fleet(nodes: Nodes) -> Any:
    return Machine(engine="ray", address=nodes.address, cluster_workers=2).fleet


def test_a_cluster_s_images_are_this_process_s(
    nodes: Nodes, whole: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root = prepared(whole[0], tmp_path / "root")
    images(root, Machine(engine="ray", address=nodes.address, cluster_workers=2))
    assert contents(root) == whole[1]


def test_items_once_tools_once_errors_as_they_were(nodes: Nodes, tmp_path: Path) -> None:
    found = list(ray_fleet(nodes).each(open_square, (tmp_path, 0.2), range(20)))
    assert sorted((d.item, d.result[0]) for d in found) == [(i, i * i) for i in range(20)]
    workers = {d.result[1] for d in found}
    assert len(workers) == 2
    assert os.getpid() not in workers
    assert [p.read_text() for p in tmp_path.glob("opened-*")] == ["opened\n"] * 2
    with pytest.raises(UserError, match="the caller's mistake"):
        list(ray_fleet(nodes).each(open_failing, ("the caller's mistake",), range(4)))


def test_the_items_of_a_killed_worker_are_done_by_others(nodes: Nodes, tmp_path: Path) -> None:
    lines: list[str] = []
    found = list(ray_fleet(nodes).each(open_mortal, (tmp_path, 3, 2), range(8), lines.append))
    assert sorted((d.item, d.result) for d in found) == [(i, i * i) for i in range(8)]
    assert sum("was lost" in line and "others do item 3" in line for line in lines) == 2


def test_a_machine_that_is_lost_loses_nothing(nodes: Nodes, tmp_path: Path) -> None:
    """In the middle of its items: another machine comes, and does them."""
    lines: list[str] = []
    done: list[int] = []
    for item in ray_fleet(nodes).each(open_square, (tmp_path, 0.3), range(16), lines.append):
        done.append(item.item)
        if len(done) == 4:
            nodes.lose()
    assert sorted(done) == list(range(16))
    assert any("was lost" in line for line in lines), lines


def test_nothing_listens_on_a_public_interface(nodes: Nodes) -> None:
    """No process of the cluster has a listening socket elsewhere than on 127.0.0.1."""
    own = {pid for node in [nodes.cluster.head_node, *nodes.workers] for kind in node.all_processes.values()
           for pid in [kind[0].process.pid]}  # fmt: skip
    sockets = {os.readlink(path) for pid in own for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    inodes = {link[8:-1] for link in sockets if link.startswith("socket:[")}
    listening = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = row.split()
            if words[3] == "0A" and words[9] in inodes:
                listening.append(words[1].partition(":")[0])
    assert listening
    assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}, listening


REFUSED = """
import sys
from pathlib import Path
from gambeson.cluster import Ray
from gambeson.errors import EnvironmentFault
from fleet_tools import open_square
try:
    list(Ray(address=sys.argv[1], workers=1).each(open_square, (Path(sys.argv[2]),), range(3), print))
except EnvironmentFault as error:
    print("fault:", error)
    sys.exit(error.code)
"""


def test_a_worker_of_another_version_is_refused(tmp_path: Path) -> None:
    """A machine on which another gambeson is installed: both versions are named, and nothing is done there."""
    pytest.importorskip("ray")
    house, other = Path(gambeson.__file__).parent, tmp_path / "other" / "gambeson"
    shutil.copytree(house, other, ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "__init__.py"
    init.write_text(init.read_text().replace(gambeson.__version__, "9.9.9"))
    script = (
        "from ray.cluster_utils import Cluster\n"
        f"cluster = Cluster(initialize_head=True, head_node_args={ {**NODE, 'num_cpus': 1}!r})\n"
        "print(cluster.address, flush=True)\n"
        "input()\n"
        "cluster.shutdown()\n"
    )
    tests = str(Path(__file__).parent)
    rest = list(filter(None, [os.environ.get("PYTHONPATH")]))
    theirs = {**os.environ, **ALONE, "PYTHONPATH": os.pathsep.join([str(other.parent), tests, *rest])}
    mine = {**os.environ, **ALONE, "PYTHONPATH": os.pathsep.join([tests, *rest])}
    words = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    machine = subprocess.Popen([sys.executable, "-c", script], env=theirs, **words)
    assert machine.stdout is not None
    try:
        address = machine.stdout.readline().strip()
        told = subprocess.run(
            [sys.executable, "-c", REFUSED, address, str(tmp_path)], env=mine, cwd=tmp_path, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
    finally:
        machine.communicate("\n", timeout=60)
    assert told.returncode == 3, told
    assert f"gambeson 9.9.9 (here {gambeson.__version__})" in told.stdout
    assert "fault: cluster: expected workers of the versions here, got none" in told.stdout
    assert not list(tmp_path.glob("opened-*"))


@pytest.mark.parametrize("seed", range(5))
def test_whoever_is_killed_the_store_is_the_faultless_one(
    seed: int, nodes: Nodes, whole: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root = prepared(whole[0], tmp_path / "root")
    script = str(Path(__file__).with_name("fault_driver.py"))

    def start() -> subprocess.Popen[bytes]:
        words = [sys.executable, script, str(root), "ray", nodes.address]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL)

    def worker(process: subprocess.Popen[bytes]) -> bool:
        for pid in nodes.processes()[:1]:
            os.kill(pid, signal.SIGKILL)
        return False

    def machine(process: subprocess.Popen[bytes]) -> bool:
        nodes.lose()
        return False

    hit = suffer(root, start, {"driver": driver, "a worker": worker, "a machine": machine}, seed)
    assert contents(root) == whole[1], hit
    no_leftovers(root)


def test_in_a_bucket_the_images_are_those_on_a_disk(
    nodes: Nodes, whole: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No machine sees the disk of another or of the driver; one of them is lost on the way."""
    with object_store.object_store() as server:
        root, disks = object_store.bucket(server, "cluster") + "/runs", iter(range(9))
        (weights,) = (whole[0] / "stages" / "train_denoiser").iterdir()
        for path in [path for path in weights.iterdir() if path.is_file()]:
            key = f"runs/stages/train_denoiser/{weights.name}/{path.name}"
            object_store.put(server, "cluster", key, path.read_bytes())

        def own_disk() -> None:
            monkeypatch.setenv("GAMBESON_SCRATCH", str(tmp_path / f"machine-{next(disks)}"))

        there = Nodes(own_disk)
        words = [sys.executable, str(Path(__file__).with_name("fault_driver.py")), root, "ray", there.address]
        own_disk()
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not any(
                "/blocks/" in key or "/shards/" in key for key in object_store.contents(server, "cluster")
            ):
                time.sleep(0.1)
            there.lose()
            assert process.wait(timeout=600) == 0
        there.cluster.shutdown()
        found = object_store.contents(server, "cluster")
    images = {key.partition("/images/")[2]: hashlib.sha256(data).hexdigest() for key, data in found.items()}
    assert {name: sha for name, sha in images.items() if name} == whole[1]
    assert len(list(tmp_path.glob("machine-*"))) >= 3


def test_a_cluster_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install gambeson\[cluster\]"):
        list(Machine(engine="ray").fleet.each(open_square, (), range(3)))
    assert EnvironmentFault.code == 3
