"""What a training tells while it runs: JSON lines and TensorBoard events beside its state, taken up again on resume."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gambeson import distributed
from gambeson.disk import atomic

LOG = "log.jsonl"
"""File of the records, inside the stage's folder."""
EVENTS = "tensorboard"
"""Folder of the events, inside the stage's own: `tensorboard --logdir runs/stages` shows all."""


class Journal:
    """Curves of one training: log.jsonl, and TensorBoard events where the package is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        """Goes on at this step; what an interrupted attempt wrote from it on is dropped."""
        self.path, self.events = folder / LOG, None
        if not distributed.leads():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step(line) < step]
        with atomic(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        try:
            writers = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            return  # the JSON lines hold the same; a GPU machine may lack the package
        self.events = writers.SummaryWriter(str(folder / EVENTS), purge_step=step)

    def write(self, record: dict[str, Any]) -> None:
        """One record: `step` and numbers."""
        if not distributed.leads():
            return
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
        if self.events is not None:
            for name, value in record.items():
                if name != "step":
                    self.events.add_scalar(name, value, record["step"])
            self.events.flush()

    def close(self) -> None:
        """No more records."""
        if self.events is not None:
            self.events.close()


def _step(line: str) -> float:
    """The step of a line; infinity for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


@contextlib.contextmanager
def journal(folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what writes a record; the journal is taken up at the first record's step, and closed with the block."""
    opened: list[Journal] = []

    def write(record: dict[str, Any]) -> None:
        if not opened:
            opened.append(Journal(folder, record["step"]))
        opened[0].write(record)

    try:
        yield write
    finally:
        for each in opened:
            each.close()
