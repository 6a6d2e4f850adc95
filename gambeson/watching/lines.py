"""Reads files that another process is writing, line by line: torn, foreign and damaged lines are skipped."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from gambeson.engine import Event
from gambeson.progress import LONGEST
from gambeson.run import STAGE

EVENTS = frozenset({*get_args(Event), "start", "made", "found", "complete", "stopped"})


PORTION = 2**24
"""Bytes of a file that one look reads, at most; the next look goes on."""


class Tail:
    """The lines that a file has gained since the last look; a file that was replaced or cut is read from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place, self.file = 0, 0

    def lines(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the file was begun anew, and the new whole lines that hold a JSON object; no file: no lines."""
        if not self.path.is_file():  # a pipe would be waited for
            return False, []
        try:
            with open(self.path, "rb") as handle:
                status = os.fstat(handle.fileno())
                anew = status.st_ino != self.file or status.st_size < self.place
                self.place, self.file = 0 if anew else self.place, status.st_ino
                handle.seek(self.place)
                data = handle.read(PORTION)
        except OSError:
            return False, []
        whole = data[: data.rfind(b"\n") + 1]
        self.place += len(whole)
        return anew, [found for line in whole.split(b"\n") if (found := parsed(line)) is not None]


def parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line; None where there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def text(value: Any) -> str:
    """A string without what would move a terminal's cursor, at most LONGEST characters; '' for anything else."""
    if not isinstance(value, str):
        return ""
    shown = " ".join(value[: 4 * LONGEST].split())
    return "".join(c for c in shown if c.isprintable())[:LONGEST]


def whole(value: Any) -> int:
    """A whole number from 0 on; 0 for anything else."""
    return value if type(value) is int and 0 <= value < 2**62 else 0


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if type(value) is int:
        return float(value) if abs(value) < 2**62 else None
    return value if type(value) is float and math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a progress record; what it does not say, or says wrongly, is empty or 0."""

    event: str
    time: float
    host: str
    pid: int
    job: str
    stage: str
    folder: str  # stages/STAGE/DIGEST, beside the run's own folder
    done: int
    total: int
    mb: float | None
    line: str
    facts: dict[str, Any]

    @staticmethod
    def of(given: dict[str, Any]) -> Line | None:
        """The line; None for one without a known event or a time."""
        event, time = text(given.get("event")), number(given.get("time"))
        if event not in EVENTS or time is None or not 0 < time < 1e11:
            return None
        folder = text(given.get("folder"))
        return Line(
            event=event,
            time=time,
            host=text(given.get("host")),
            pid=whole(given.get("pid")),
            job=text(given.get("job")),
            stage=text(given.get("stage")),
            folder=folder if STAGE.fullmatch(folder) else "",
            done=whole(given.get("done")),
            total=whole(given.get("total")),
            mb=number(given.get("mb")),
            line=text(given.get("line")),
            facts=given,
        )
