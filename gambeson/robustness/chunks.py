"""The parts that an evaluation is made in, chunks of images and points of its curve: their files, and how far they are.

A part is made by one process from its beginning to its end; its state is saved on the way.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gambeson.disk import atomic
from gambeson.models.memory import lacks_memory
from gambeson.robustness.autoattack import Standing
from gambeson.robustness.intervals import wilson
from gambeson.robustness.kept import damaged, table_at
from gambeson.store import Workspace

CHUNKS = "chunks"
"""The folder of what unfinished evaluations keep."""
PATIENCE = 20
"""How many times as long as it takes to save a state nothing is saved after it."""


class StateFile:
    """A journal in one file, written whole or not at all, every `seconds`; more rarely where that takes long."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds, self.last, self.took = path, seconds, time.monotonic(), 0.0

    def load(self) -> dict[str, Any] | None:
        """What was saved last, on the CPU; None at first. Raises EnvironmentFault for a damaged file."""
        if not self.path.exists():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError) as error:
            if lacks_memory(error):
                raise
            raise damaged(self.path, "the state of an evaluation", error) from error
        if not isinstance(found, dict):
            raise damaged(self.path, "the state of an evaluation", TypeError(f"it holds a {type(found).__name__}"))
        return found

    def due(self) -> bool:
        """Whether it is time: `seconds` have passed, and PATIENCE times what the last saving took."""
        return time.monotonic() - self.last >= max(self.seconds, PATIENCE * self.took)

    def save(self, state: dict[str, Any]) -> None:
        """Writes the state. Raises EnvironmentFault where the disk is full."""
        begun = time.monotonic()
        with atomic(self.path) as temporary:
            try:
                with open(temporary, "wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:  # torch ends its archive after the disk has refused, and tells of that alone
                if isinstance(error.__context__, OSError):
                    raise OSError(error.__context__.errno, error.__context__.strerror) from error
                raise
        self.last = time.monotonic()
        self.took = self.last - begun


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of an evaluation, and where its files lie."""

    folder: Path  # of the stage
    name: str  # how its files begin
    images: int  # so many have a share in it

    def path(self, kind: str) -> Path:
        """Its file of a kind: rows.parquet, state.pt or standing.json."""
        return self.folder / CHUNKS / f"{self.name}.{kind}"

    @property
    def finished(self) -> bool:
        """Whether its rows are there."""
        return self.path("rows.parquet").exists()

    @property
    def begun(self) -> bool:
        """Whether anything of it was saved."""
        return self.finished or self.path("state.pt").exists()


@dataclass(frozen=True, kw_only=True)
class Chunk(Part):
    """Images that are attacked together, from the first attack to the last."""

    index: np.ndarray  # of the images among the test images
    start: int  # the number of the first among the images that are measured

    @property
    def which(self) -> np.ndarray:
        """The images' numbers among those that are measured."""
        return np.arange(self.start, self.start + len(self.index))


@dataclass(frozen=True, kw_only=True)
class CurvePart(Part):
    """One epsilon of the curve."""

    epsilon: float
    column: str  # of the rows
    which: np.ndarray  # the numbers of its images among those that are measured


def nothing() -> None:
    """Hears no news."""


@dataclass
class Teller:
    """Writes down, at most every half second, how far a part is, and tells that there is news."""

    part: Part
    heard: Callable[[], None] = nothing
    last: float = 0.0

    def standing(self, standing: Standing) -> None:
        """Takes the news of a chunk."""
        self._tell(asdict(standing))

    def point(self, done: int, total: int) -> None:
        """Takes the news of a point of the curve."""
        self._tell({"share": done / max(total, 1)})

    def _tell(self, news: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self.last > 0.5:
            self.last = now
            path = self.part.path("standing.json")
            temporary = path.with_suffix(".part")
            with suppress(OSError):  # a full disk: what has to be kept will tell of it
                temporary.write_text(json.dumps(news))
                temporary.replace(path)
            self.heard()


def tidy(part: Part) -> None:
    """Removes what a finished part was made from."""
    for kind in ("state.pt", "standing.json"):
        part.path(kind).unlink(missing_ok=True)


class Ledger:
    """What is known of all parts while they are made, for progress and the running robust accuracy.

    `weight`: what an image of a point of the curve costs, beside one that stands in a chunk.
    """

    def __init__(self, work: Workspace, chunks: Sequence[Chunk], curve: Sequence[CurvePart], weight: float) -> None:
        self.work, self.chunks, self.curve, self.weight = work, chunks, curve, weight
        self.robust: dict[str, int] = {}

    def show(self) -> None:
        """Tells progress, in images (of which the curve takes some), how many stand, and how far the curve is."""
        done, standing, known, images = 0.0, 0, 0, sum(chunk.images for chunk in self.chunks)
        for chunk in self.chunks:
            share, robust = self._of(chunk)
            done += share * chunk.images
            if robust is not None:
                standing, known = standing + robust, known + chunk.images
        shares = [self._share(point) for point in self.curve]
        done += self.weight * sum(share * point.images for share, point in zip(shares, self.curve, strict=True))
        total = images + self.weight * sum(point.images for point in self.curve)
        self.work.progress(int(images * done / total + 1e-6), images)
        if known:
            at = wilson(standing, known)
            interval = f"{at.estimate:.1%} ({at.low:.1%} to {at.high:.1%})"
            self.work.say(f"standing so far: {standing} of {known} images begun, {interval}")
        if any(shares):
            self.work.say(f"curve: {sum(share == 1 for share in shares)} of {len(shares)} epsilons measured")

    def _of(self, chunk: Chunk) -> tuple[float, int | None]:
        """(share of the work done, images standing; None before the first news)."""
        if chunk.name in self.robust:
            return 1.0, self.robust[chunk.name]
        if chunk.finished:
            rows = table_at(chunk.path("rows.parquet"), ["robust"])
            self.robust[chunk.name] = int(rows["robust"].to_numpy().sum())
            return 1.0, self.robust[chunk.name]
        news = _news(chunk)
        return news.get("share", 0.0), news.get("robust")

    @staticmethod
    def _share(point: CurvePart) -> float:
        return 1.0 if point.finished else min(_news(point).get("share", 0.0), 0.99)


def _news(part: Part) -> dict[str, Any]:
    """What was told of a part last; nothing where nothing was, or not whole (a power cut)."""
    try:
        return json.loads(part.path("standing.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
