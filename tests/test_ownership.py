"""One driver makes a run: of two one wins and the other says who did; a dead one is followed at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import tiny_recipe

from gambeson import files, ownership
from gambeson.cli import main
from gambeson.engine import News
from gambeson.errors import EnvironmentFault
from gambeson.ownership import FOLDER, Owner, RunTaken, claim, gone, own, this_machine
from gambeson.place import Place
from gambeson.recipe import Arm
from gambeson.run import folder_of

DRIVER = """
import sys, time
from pathlib import Path
from gambeson.ownership import RunTaken, claim
from gambeson.place import Place
place, go = Place.of(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
try:
    print("owns", claim(place, "gambeson run a").number, flush=True)
except RunTaken as error:
    print("taken", error, flush=True)
    sys.exit(error.code)
time.sleep(600)
"""


def driver(folder: Path) -> subprocess.Popen[str]:
    """A process that claims the run when `folder`/go is there, and then lives on."""
    words = [sys.executable, "-c", DRIVER, str(folder), str(folder.parent / "go")]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_two_drivers_at_once_one_wins_and_a_dead_one_is_followed(tmp_path: Path) -> None:
    """Real processes: the loser names the winner and exits with 3; the winner is killed, and the run is free."""
    folder, place = tmp_path / "run", Place.of(tmp_path / "run")
    two = [driver(folder), driver(folder)]
    try:
        assert [line(process) for process in two] == ["ready", "ready"]
        (tmp_path / "go").touch()
        said = {line(process): process for process in two}
        (won,), (lost,) = ([w for w in said if w.startswith(start)] for start in ("owns", "taken"))
        assert said[lost].wait(60) == 3
        assert won == "owns 1"
        winner = said[won]
        assert f"process {winner.pid} on " in lost
        assert "'gambeson run a'" in lost
        assert f"kill {winner.pid}" in lost
        for more in (False, True):  # one of this machine is stopped, not taken over
            with pytest.raises(RunTaken, match=f"process {winner.pid} on"):
                claim(place, "gambeson run b", take_over=more)
        winner.send_signal(signal.SIGKILL)
        while Path(f"/proc/{winner.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)  # dead, but nobody has waited for it
        began = time.monotonic()
        with own(place, "gambeson run b") as owner:
            assert owner.number == 2
            assert time.monotonic() - began < 1
            assert (place / FOLDER).names() == ["000002.json"]
    finally:
        for process in two:
            process.kill()
            process.wait()
    assert (place / FOLDER).names() == ["000002.json", "000002.released"]
    assert claim(place, "gambeson run c").number == 3


def written(place: Place, **other: object) -> dict[str, object]:
    """An owner that is this process but for what is given."""
    facts = {**this_machine(), "command": "gambeson run x", "since": "2026-11-22T01:00:00+00:00", **other}
    (place / FOLDER / "000007.json").write(json.dumps(facts).encode())
    return facts


def test_another_machine_s_run_is_taken_over_only_where_that_is_asked(tmp_path: Path) -> None:
    """The old driver, should it still live, sees it when its next stage begins, and ends with exit code 3."""
    place = Place.of(tmp_path)
    facts = written(place, host="elsewhere", pid=77)
    assert not gone(facts)
    with pytest.raises(RunTaken, match=r"process 77 on elsewhere, since 2026-11-22T01.*--take-over") as refused:
        claim(place, "b")
    assert refused.value.code == 3
    old = Owner(place, 7)
    old.check()
    assert claim(place, "b", take_over=True).number == 8
    old.watch(News("job", "generate", 1, 5))  # looked at not long ago
    for event in ("asked", "begun"):
        with pytest.raises(RunTaken, match=f"it was taken over: process {os.getpid()} on"):
            old.watch(News("job", "generate", 0, 0, event))
    old.watch(News("job", "", 0, 0, "failed"))


def test_what_proves_that_a_process_is_dead(tmp_path: Path) -> None:
    place, mine = Place.of(tmp_path), this_machine()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for other, dead in (
        ({}, False),
        ({"boot": "another start of this machine"}, True),
        ({"ticks": 1}, True),  # the number means another process by now
        ({"pid": int(ended.stdout)}, True),
        ({"namespace": "pid:[1]"}, False),  # a container: its numbers mean other processes
        ({"host": "elsewhere", "pid": int(ended.stdout)}, False),
        ({"machine": "0" * 16, "boot": "x"}, False),  # two machines of one name
    ):
        assert gone({**mine, **other}) is dead, other
    written(place, pid=int(ended.stdout))
    assert claim(place, "b").number == 8


def test_equal_names_alone_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of one name on two machines, without /etc/machine-id: the other's start is not an earlier one here."""
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"" if path.name == "machine-id" else real(path))
    mine = this_machine()
    assert "machine" not in mine
    assert not gone({**mine, "boot": "of another machine"})
    assert gone({**mine, "ticks": 1})


def test_a_number_that_is_free_again_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one looks, another owns and ends, and a third owns: the first must not make the second's number anew."""
    place, real = Place.of(tmp_path), ownership._check_free
    claim(place, "a").release()

    def late(there: Place, number: int, take_over: bool) -> None:
        real(there, number, take_over)
        monkeypatch.setattr(ownership, "_check_free", real)
        claim(there, "b").release()
        claim(there, "c")

    monkeypatch.setattr(ownership, "_check_free", late)
    with pytest.raises(RunTaken, match="'c'"):
        claim(place, "late")
    Owner(place, 3).check()


def test_who_lost_a_file_servers_answer_still_owns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the link was made, its answer lost; asked again, the server says that there is one."""
    real = os.link

    def link(*words: str) -> None:
        real(*words)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", link)
    assert claim(Place.of(tmp_path), "a").number == 1


def test_an_owner_whose_content_is_on_its_way_is_waited_for(tmp_path: Path) -> None:
    """On a file system without hard links the name comes first; one that stays empty is told of."""
    place = Place.of(tmp_path)
    path = tmp_path / FOLDER / "000001.json"
    path.parent.mkdir()
    path.touch()
    facts = {**this_machine(), "command": "gambeson run x", "since": "now"}
    comes = threading.Timer(0.3, lambda: (place / FOLDER / "000001.json").write(json.dumps(facts).encode()))
    comes.start()
    with pytest.raises(RunTaken, match="'gambeson run x'"):
        claim(place, "b")
    comes.join()
    path.write_bytes(b"")
    with pytest.raises(EnvironmentFault, match=r"000001\.json: expected JSON.*remove the file"):
        claim(place, "b")


def test_the_command_says_who_makes_the_run_and_exits_with_3(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is started, and the owner's run is left as it is; once it is let go it is free."""
    recipe = tiny_recipe((Arm.REAL,))
    files.save(recipe, tmp_path / "recipe.yaml")
    folder = folder_of(recipe, tmp_path / "runs")
    with own(Place.of(folder), "gambeson run other"):
        assert main(["run", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs"), "--workers", "1"]) == 3
        shown = " ".join(capfd.readouterr().err.split())
        assert f"expected to be the only one that makes this run, got another: process {os.getpid()} on" in shown
        assert sorted(path.name for path in folder.iterdir()) == [FOLDER]
    assert not (tmp_path / "runs" / "stages").exists()
