"""What a run's record says: its jobs, their stages, how fast they go, and whether the process that makes them lives."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gambeson.disk import alive
from gambeson.progress import FORMAT, HEARTBEAT, NAME, this_process
from gambeson.screen import span
from gambeson.watching.lines import Line, Tail, text, whole

WINDOW = 120.0
"""Seconds over which a stage's rate is measured."""
UNHEARD = 6 * HEARTBEAT
"""Seconds without a sign of life after which a process on another machine is taken for gone."""


@dataclass
class Stage:
    """A stage that a job asked for. `samples`: when how much was done, in this start of the run."""

    job: str
    name: str
    folder: str
    asked: float
    state: Literal["asked", "begun", "made", "found", "unfinished"] = "asked"
    since: float = 0.0  # when its work began
    done: int = 0
    total: int = 0
    samples: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=400))
    host: str = ""
    pid: int = 0
    mb: float | None = None
    config: str = ""
    inputs: tuple[str, ...] = ()  # digests; empty for an input that is none

    def reach(self, line: Line) -> None:
        """It is this far."""
        if line.total != self.total or line.done < self.done:
            self.samples.clear()
            if line.done == 1 and self.since:
                self.samples.append((self.since, 0))  # the first of its parts is done: it took since the beginning
        self.done, self.total, self.host, self.pid = line.done, line.total, line.host, line.pid
        self.mb = line.mb
        self.samples.append((line.time, line.done))
        self.state = "begun"

    def rate(self) -> float | None:
        """Parts a second over the last WINDOW; None where it is not known."""
        if len(self.samples) < 2:
            return None
        last, done = self.samples[-1]
        recent = [s for s in self.samples if s[0] >= last - WINDOW]
        first, before = recent[0] if len(recent) > 1 else self.samples[-2]
        return (done - before) / (last - first) if last > first and done > before else None

    def left(self, now: float) -> float | None:
        """Seconds until it is done, at that rate; None where it is not known."""
        rate = self.rate()
        if rate is None:
            return None
        return max((self.total - self.done) / rate - max(now - self.samples[-1][0], 0.0), 0.0)


@dataclass
class Job:
    """A job: its stages by folder, in the order in which it asked for them last; the last line that it said."""

    name: str
    stages: dict[str, Stage] = field(default_factory=dict)
    state: Literal["going", "finished", "failed"] = "going"
    line: str = ""
    said: str = ""

    @property
    def current(self) -> Stage | None:
        """The stage that it asked for last."""
        return next(reversed(self.stages.values()), None)

    def stage(self, line: Line) -> Stage:
        """The stage of a line."""
        found = self.stages.get(line.folder)
        if found is None:
            found = self.stages[line.folder] = Stage(line.job, line.stage, line.folder, line.time)
        return found


@dataclass
class State:
    """A run's record, folded. `starts`: how often the run was started; `end`: the line of its end, if it has ended."""

    jobs: dict[str, Job] = field(default_factory=dict)
    starts: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0
    moved: float = 0.0  # time of the last line
    end: Line | None = None

    @property
    def foreign(self) -> str:
        """What to say about a record of another version; '' for one of ours."""
        if not self.starts or self.facts.get("format") == FORMAT:
            return ""
        maker = text(self.facts.get("gambeson")) or "of another version"
        found = text(str(self.facts.get("format")))
        return (
            f"its record of progress is of format {found}, this version reads format {FORMAT}; watch it with gambeson "
            f"{maker}, which makes it"
        )

    def fold(self, lines: Iterable[dict[str, Any]]) -> list[Line]:
        """Takes further lines; those of them that are whole."""
        taken = [line for given in lines if (line := Line.of(given)) is not None]
        for line in taken:
            self._take(line)
        return taken

    def _take(self, line: Line) -> None:
        if line.event == "start":
            names = line.facts.get("jobs")
            named = [text(name) for name in names] if isinstance(names, list) else []
            self.jobs = {name: Job(name) for name in named if name}
            self.starts, self.facts, self.began, self.end = self.starts + 1, line.facts, line.time, None
        elif line.event in ("complete", "stopped"):
            self.end = line
        elif line.job:
            self._news(self.jobs.setdefault(line.job, Job(line.job)), line)
        self.moved = max(self.moved, line.time)

    def _news(self, job: Job, line: Line) -> None:
        if line.event == "finished" or line.event == "failed":
            job.state, job.line = line.event, line.line
        elif line.event == "said":
            job.said = line.line
        elif line.folder:
            self._stage(job, line)

    @staticmethod
    def _stage(job: Job, line: Line) -> None:
        if line.event == "asked":
            job.stages.pop(line.folder, None)
            inputs = line.facts.get("inputs")
            stage = job.stage(line)
            stage.config = text(line.facts.get("config"))
            stage.inputs = tuple(text(each) for each in inputs) if isinstance(inputs, list) else ()
            return
        stage = job.stage(line)
        if line.event == "begun":
            stage.state, stage.since, stage.host, stage.pid = "begun", line.time, line.host, line.pid
        elif line.event == "reached" and line.total:
            stage.reach(line)
        elif line.event == "made" or line.event == "found":
            stage.state = line.event

    def maker(self, stage: Stage) -> Stage | None:
        """The same stage in another job that is making it."""
        same = (job.stages.get(stage.folder) for job in self.jobs.values() if job.name != stage.job)
        return next((other for other in same if other is not None and other.state == "begun"), None)


@dataclass(frozen=True)
class Life:
    """Whether the process of the run's last start lives, and how that is known, in words."""

    lives: bool
    words: str


def life(facts: dict[str, Any], record: Path, now: float) -> Life:
    """By its number on this machine; on another by the age of its last touch of the record."""
    pid, host = whole(facts.get("pid")), text(facts.get("host"))
    name = f"process {pid} on {host or 'an unknown machine'}"
    here = this_process(pid)
    ours = host == platform.node() and facts.get("boot") in (None, here.get("boot"))  # machines may share a name
    if ours and facts.get("namespace") == here.get("namespace"):
        same = alive(pid) and facts.get("ticks") == here.get("ticks") and not _dead(pid)
        return Life(True, f"{name} lives") if pid and same else Life(False, f"{name} is gone")
    try:
        silent = max(now - record.stat().st_mtime, 0.0)
    except OSError:
        return Life(False, f"{name}: its record cannot be read")
    if silent < UNHEARD:
        return Life(True, f"{name} gave a sign of life {silent:.0f} s ago")
    return Life(False, f"{name} has given no sign of life for {span(silent)}: it or the connection to it is gone")


def _dead(pid: int) -> bool:
    """Whether a process has ended and only waits for its parent to notice (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return False


class Record:
    """A run's record, read on as it grows. `lines`: those of the last look."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.tail, self.state = Tail(self.path), State()

    @property
    def there(self) -> bool:
        """Whether the run keeps a record."""
        return self.path.exists()

    def look(self) -> list[Line]:
        """Reads what is new."""
        anew, lines = self.tail.lines()
        if anew:
            self.state = State()
        return self.state.fold(lines)

    def life(self) -> Life:
        """Whether the process of its last start lives."""
        return life(self.state.facts, self.path, time.time())
