"""Who makes a run: one driver at a time, on files and object stores alike, without clocks and leases.

A run's folder has owner/000001.json, owner/000002.json, ...: each is created only if it is not there, so that of any
number of drivers one makes it, and the highest owns. Who ends leaves owner/000002.released. A driver of this machine
that is provably dead is followed at once; one that lives, or that another machine started, is told of.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gambeson.disk import alive
from gambeson.engine import News
from gambeson.errors import EnvironmentFault
from gambeson.place import Missing, Place
from gambeson.progress import this_process

FOLDER = "owner"
EVERY = 10.0
"""Seconds between two looks whether a run is still one's own, while a stage goes on."""


class RunTaken(EnvironmentFault):
    """Another driver makes the run."""


@dataclass
class Owner:
    """This process as the driver of a run."""

    place: Place  # of the run's folder
    number: int
    looked: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raises RunTaken where another has taken the run over."""
        self.looked = time.monotonic()
        numbers = _numbers(self.place)
        if numbers and numbers[-1] > self.number:
            raise RunTaken(
                f"{self.place.shown}: expected to be the only one that makes this run, but it was taken over: "
                f"{_told(_facts(self.place, numbers[-1]))}. What was finished is kept; the other goes on with it"
            )

    def watch(self, news: News) -> None:
        """`check` whenever a stage is asked for, begins or is finished, and every few seconds in between."""
        turn = news.event in ("asked", "begun") or (news.event == "reached" and not news.total)
        if turn or (news.event in ("reached", "said") and time.monotonic() - self.looked >= EVERY):
            self.check()

    def release(self) -> None:
        """Lets the run go. Where that cannot be said, this process will soon be seen to be dead."""
        with suppress(EnvironmentFault):
            (self.place / FOLDER / f"{self.number:06d}.released").write(b"{}\n")


@contextmanager
def own(place: Place, command: str, take_over: bool = False) -> Iterator[Owner]:
    """Makes this process the driver of the run at this place, for the length of the block.

    Raises RunTaken where another is: it lives on this machine; or another machine started it, which nobody can look
    into from here, and `take_over` is not given.
    """
    owner = claim(place, command, take_over)
    try:
        yield owner
    finally:
        owner.release()


def claim(place: Place, command: str, take_over: bool = False) -> Owner:
    """As `own`, until the process ends."""
    token = uuid.uuid4().hex
    mine = json.dumps({**this_machine(), "command": command, "since": _now(), "token": token}, indent=1)
    while True:
        last = (_numbers(place) or [0])[-1]
        if last:
            _check_free(place, last, take_over)
        number = last + 1
        made = (place / FOLDER / f"{number:06d}.json").create(mine.encode())
        if not made and _facts(place, number).get("token") != token:  # ours: a file server's answer was lost
            continue
        if _numbers(place)[-1:] == [number]:  # else others came and went meanwhile, and this number was free again
            _forget(place, last)
            return Owner(place, number)


def this_machine() -> dict[str, Any]:
    """What tells this process from all others: `progress.this_process`, and which machine it is on."""
    facts = this_process(os.getpid())
    with suppress(OSError):
        if name := Path("/etc/machine-id").read_bytes():  # empty in many images of containers
            facts["machine"] = hashlib.sha256(name).hexdigest()[:16]
    return facts


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _numbers(place: Place) -> list[int]:
    """Of the owners there are and were, ascending."""
    names = (name.partition(".") for name in (place / FOLDER).names())
    return sorted(int(stem) for stem, _, ending in names if stem.isdigit() and ending == "json")


def _facts(place: Place, number: int) -> dict[str, Any]:
    """What an owner says of itself. Raises EnvironmentFault where it is damaged."""
    path, pauses = place / FOLDER / f"{number:06d}.json", [1.0, 0.2, 0.05]
    while True:
        try:
            return json.loads(path.read())
        except Missing:
            return {}  # it was followed in the meantime
        except ValueError as error:
            if not pauses:
                told = f"{path.shown}: expected JSON, got damaged text ({error}); remove the file"
                raise EnvironmentFault(told) from error
        time.sleep(pauses.pop())  # without hard links (disk.create) its content comes a moment after its name


def _check_free(place: Place, number: int, take_over: bool) -> None:
    """RunTaken where this owner may still be at work."""
    if (place / FOLDER / f"{number:06d}.released").exists():
        return
    facts = _facts(place, number)
    if not facts or gone(facts) or (take_over and not _is_here(facts)):
        return
    here = _is_here(facts)
    way = (
        f"Wait until it ends, or stop it (kill {facts.get('pid')}) and start the same command again, which goes on"
        if here
        else "Wait until it ends; if you know that it is dead, start the same command again with --take-over"
    )
    raise RunTaken(
        f"{place.shown}: expected to be the only one that makes this run, got another: {_told(facts)}. {way}"
    )


def _told(facts: dict[str, Any]) -> str:
    return (
        f"process {facts.get('pid')} on {facts.get('host')}, since {facts.get('since')}, which is "
        f"'{facts.get('command')}'"
    )


def _is_here(facts: dict[str, Any]) -> bool:
    """Whether a process is of this machine and of this namespace of process numbers, so that its life can be seen."""
    mine = this_machine()
    return all(facts.get(name) == mine.get(name) for name in ("host", "machine", "boot", "namespace"))


def gone(facts: dict[str, Any]) -> bool:
    """Whether a process is provably dead: of this machine, which was started anew since, or whose number is free or
    means another process by now."""
    mine = this_machine()
    if any(facts.get(name) != mine.get(name) for name in ("host", "machine")):
        return False
    if facts.get("boot") != mine.get("boot"):
        return facts.get("machine") is not None  # a name alone may be two machines'
    if facts.get("namespace") != mine.get("namespace"):
        return False
    pid = facts.get("pid", 0)
    return not alive(pid) or this_process(pid).get("ticks") != facts.get("ticks") or _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and only its parent has not asked for that yet (Linux)."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _forget(place: Place, last: int) -> None:
    """Removes who owned before: numbers only rise, and the highest is all that counts."""
    with suppress(EnvironmentFault):
        for name in (place / FOLDER).names():
            stem = name.partition(".")[0]
            if stem.isdigit() and int(stem) <= last:
                (place / FOLDER / name).remove()
