"""One measured number with its interval, and what every measure of synthetic data looks like."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from gambeson.errors import require
from gambeson.quality.space import Sample

Better = Literal["lower", "higher", "near"]
"""Which way is better; "near": near the ideal value."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measured number between the ends of its 95 % interval; plain values only, so that it can be written as JSON.

    UserError for numbers that are not finite, and for an interval with one end only, or that leaves its value out.
    """

    name: str  # of the measure, such as "FID"
    value: float  # the estimate
    low: float | None  # lower end of the 95 % interval; none: `note` says why there is none
    high: float | None  # upper end
    better: Better  # which way is better
    ideal: float | None  # what a perfect synthetic set would have; none: unknown
    space: str | None  # the feature space; none: images themselves, or a classifier's decisions
    real: int  # real images that went in
    synthetic: int  # synthetic images that went in
    randomness: str  # what the interval stands for, and how it was drawn
    note: str = ""  # what a reader has to know: bias, bounds that were hit, what the interval does not cover

    def __post_init__(self) -> None:
        ends = [end for end in (self.low, self.high) if end is not None]
        require(all(map(math.isfinite, (self.value, *ends))), self.name, "finite numbers", (self.value, *ends))
        require(len(ends) != 1, f"{self.name}: interval", "both ends or none", (self.low, self.high))
        require(len(ends) == 2 or bool(self.note), f"{self.name}: note", "why there is no interval", self.note)
        inside = not ends or ends[0] <= self.value <= ends[1]
        require(inside, f"{self.name}: interval", "low <= value <= high", (self.low, self.value, self.high))

    def plain(self) -> dict[str, Any]:
        """A dictionary of strings and numbers; `Measured(**plain)` is the same again."""
        return asdict(self)


@runtime_checkable
class Measure(Protocol):
    """A frozen dataclass of plain numbers: real and synthetic features of one space -> numbers with intervals."""

    def __call__(self, real: Sample, synthetic: Sample, *, seed: int) -> list[Measured]: ...


@runtime_checkable
class HeldOutMeasure(Protocol):
    """A measure that needs a second part of the real images: `real` is train, `held_out` was never trained on."""

    def __call__(self, real: Sample, synthetic: Sample, *, held_out: Sample, seed: int) -> list[Measured]: ...
