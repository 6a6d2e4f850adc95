"""The record of a run's progress, RUN/progress.jsonl: a JSON line per news, so that `gambeson watch` can follow it.

Lines are only ever appended, each in one write; a start writes a line `start` with who works where, then news with
time, host, pid, job, stage and folder. What cannot be written is left out: a record never makes a run fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from gambeson import canonical
from gambeson.engine import News
from gambeson.place import redacted

NAME = "progress.jsonl"
FORMAT = 1
OFTEN, SELDOM, SHARE = 0.5, 5.0, 1 / 100
"""Seconds between two lines of a stage: at least OFTEN; in a stage that goes on for long that share of its time, at
most SELDOM."""
HEARTBEAT = 10.0
"""Seconds between two touches of the file, by which others see that the process lives while nothing moves."""
LONGEST = 500
"""Characters of a text that are kept."""


def this_process(pid: int) -> dict[str, Any]:
    """Which process a number means, here and now: host, boot, number, namespace of numbers, start (Linux)."""
    facts: dict[str, Any] = {"host": platform.node(), "pid": pid}
    with contextlib.suppress(OSError, IndexError):
        facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        facts["namespace"] = os.readlink("/proc/self/ns/pid")
        facts["ticks"] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return facts


def memory_mb(pid: int) -> float | None:
    """Resident memory of a process of this machine in MB (Linux); None where it is not known."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return None


class Record:
    """A context manager that takes news (`engine.run_jobs`) and writes them down.

    facts: what the line `start` says besides: command, workers, names of the jobs, ...
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path, self.facts = path, facts
        self.handle: int | None = None
        self.torn, self.warned = False, False  # whether the file may end inside a line; whether a fault was told
        self.began: dict[tuple[str, str], float] = {}
        self.wrote: dict[tuple[str, str], float] = {}
        self.waiting: dict[str, dict[str, Any]] = {}  # a job's last line said, not yet written
        self.ended = threading.Event()

    def __enter__(self) -> Record:
        with self._unharmed():
            self.handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self.handle).st_size
            self.torn = size > 0 and os.pread(self.handle, 1, size - 1) != b"\n"
        self._write({"event": "start", "format": FORMAT, **this_process(os.getpid()), **self.facts})
        with contextlib.suppress(RuntimeError):  # no thread to be had: nothing but its sign of life is missing
            threading.Thread(target=self._live, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        for job in list(self.waiting):
            self._flush(job)
        if error is None:
            self._write({"event": "complete"})
        elif isinstance(error, KeyboardInterrupt):
            self._write({"event": "stopped", "line": "by hand (Ctrl-C)"})
        else:
            self._write({"event": "stopped", "line": (str(error) or type(error).__name__)[:LONGEST]})
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __call__(self, news: News) -> None:
        """Writes the news down, where it is time for that."""
        line = {"event": news.event, "host": platform.node(), "pid": news.pid, "job": news.job, "stage": news.stage}
        if news.folder is not None:
            line["folder"] = news.folder.relative_to(news.folder.parents[2]).as_posix()  # stages/STAGE/DIGEST
        if news.event == "said":
            self.waiting[news.job] = line | {"line": news.line[:LONGEST]} | _rates(news)
        elif news.event == "reached" and news.total:
            self._reached(news, line)
        else:
            self._turn(news, line)
        if news.job in self.waiting and self._due((news.job, "said")):
            self._flush(news.job)

    def _reached(self, news: News, line: dict[str, Any]) -> None:
        if self._due((news.job, news.stage)):
            self._write(line | {"done": int(news.done), "total": int(news.total), "mb": memory_mb(news.pid)})

    def _turn(self, news: News, line: dict[str, Any]) -> None:
        """An event that happens once for each stage or job."""
        self.began.pop((news.job, news.stage), None)
        self.wrote.pop((news.job, news.stage), None)
        if news.event == "reached":
            line["event"] = "made" if news.done else "found"
        if news.event == "asked":
            line |= made_of(news.asked)
        if news.line:
            line["line"] = news.line[:LONGEST]
        self._write(line)

    def _due(self, key: tuple[str, str]) -> bool:
        now = time.monotonic()
        age = now - self.began.setdefault(key, now)
        if now - self.wrote.get(key, -SELDOM) < min(max(OFTEN, SHARE * age), SELDOM):
            return False
        self.wrote[key] = now
        return True

    def _flush(self, job: str) -> None:
        self._write(self.waiting.pop(job))

    def _live(self) -> None:
        while not self.ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _write(self, line: dict[str, Any]) -> None:
        if self.handle is None:
            return
        text = redacted(json.dumps({"time": round(time.time(), 3), **line}))
        data = (b"\n" if self.torn else b"") + text.encode() + b"\n"
        with self._unharmed():
            self.torn = True  # until it is known that all was written
            self.torn = os.write(self.handle, data) < len(data)

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        """The run goes on where the record cannot be written; said once."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                self.warned = True
                told = f"{self.path}: cannot be written ({error.strerror or error}); the run goes on all the same"
                with contextlib.suppress(OSError, ValueError):  # no warning: those can be made errors
                    print(f"{told}, but `gambeson watch` will not see all of it", file=sys.stderr)


def _rates(news: News) -> dict[str, Any]:
    """Images a second of a stage's workers, where the news tell them."""
    return {"workers": {name: round(rate, 3) for name, rate in news.workers.items()}} if news.workers else {}


def made_of(asked: dict[str, Any]) -> dict[str, Any]:
    """What tells two stages of one name apart: digests of the configuration and of the inputs, shortened."""
    inputs = [None if digest is None else digest[:16] for digest in asked["inputs"]]
    return {"config": canonical.digest(asked["config"])[:16], "inputs": inputs, "seed": asked["seed"]}
