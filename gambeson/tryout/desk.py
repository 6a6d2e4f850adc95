"""One thread that computes for all who ask: attacks before certificates, and of one kind only what was asked last.

Work is a generator of lines, so that between two of its steps something more urgent can come first, or nothing more.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from gambeson.errors import EnvironmentFault
from gambeson.models.memory import lacks_memory

Line = dict[str, Any]
"""One line of an answer, to be written as JSON."""
Work = Iterator[Line | None]
"""An answer in the making; None where a step was made and there is nothing to tell."""
KINDS = ("attack", "certificate")
"""What is asked for, the more urgent first."""
NEWER: Line = {"stopped": "Stopped, because something newer was asked for. Move the slider to go on here."}


@dataclass(eq=False)
class _Job:
    work: Work
    lines: SimpleQueue[Line | None] = field(default_factory=SimpleQueue)  # None: no more of them


class Desk:
    """Answers whoever asks, from a thread of its own, until it is closed."""

    def __init__(self) -> None:
        self._changed, self._jobs, self._open = threading.Condition(), dict[str, _Job](), True
        self._thread = threading.Thread(target=self._serve, name="gambeson try", daemon=True)
        self._thread.start()

    def ask(self, kind: str, work: Work) -> Generator[Line]:
        """The lines of this work as they come; it takes the place of unfinished work of its kind.

        What fails is told as {"error": words}. Closing the iterator drops the work.
        """
        job = _Job(work)
        with self._changed:
            self._replace(kind, job if self._open else None)
            if not self._open:
                job.lines.put(None)
        return self._lines(kind, job)

    def close(self) -> None:
        """Drops everything; who waits is told so."""
        with self._changed:
            self._open = False
            for kind in KINDS:
                self._replace(kind, None)
        self._thread.join(timeout=10)

    def _lines(self, kind: str, job: _Job) -> Generator[Line]:
        try:
            while (line := job.lines.get()) is not None:
                yield line
        finally:
            with self._changed:
                if self._jobs.get(kind) is job:
                    del self._jobs[kind]

    def _replace(self, kind: str, job: _Job | None) -> None:
        """Under the lock: the work of a kind from now on."""
        old = self._jobs.pop(kind, None)
        if old is not None:
            old.lines.put(NEWER)
            old.lines.put(None)
        if job is not None:
            self._jobs[kind] = job
        self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or not self._open)
                if not self._open:
                    return
                kind = next(kind for kind in KINDS if kind in self._jobs)
                job = self._jobs[kind]
            if not _stepped(job):
                with self._changed:
                    if self._jobs.get(kind) is job:
                        del self._jobs[kind]
                job.lines.put(None)


def _stepped(job: _Job) -> bool:
    """One step of the work; whether there is more."""
    try:
        line = next(job.work, NEWER)
    except Exception as error:  # somebody's network may raise anything, and the next image may be fine
        job.lines.put({"error": words_of(error)})
        return False
    if line is NEWER:
        return False
    if line is not None:
        job.lines.put(line)
    return True


def words_of(error: Exception) -> str:
    """What went wrong, for the page; what is no mistake of the caller's is told in the terminal, too."""
    told = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if lacks_memory(error):
        return f"There is not enough memory for this: {told}"
    if isinstance(error, (ValueError, EnvironmentFault)):
        return str(error)
    print(f"gambeson try: {type(error).__name__}: {told}", file=sys.stderr)
    return f"That could not be done for this image ({type(error).__name__}: {told[:300]})."
