"""Learning rates, momenta and averages by step: linear warm-up and cosine, the one-cycle rate held for an epoch, and
stochastic weight averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gambeson.errors import require


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up (`Optimisation.warmup`), then cosine to 0, a new rate at every step; the momentum stays."""

    def factor(self, step: int, steps: int, warmup: float) -> float:
        """Share of the peak rate at step 0, 1, ..."""
        warm = warmup * steps
        if step + 1 <= warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))

    def momentum(self, step: int, steps: int, warmup: float, usual: float) -> float:
        """Momentum of that step."""
        return usual


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Smith & Topin 2019 as torch's OneCycleLR, stepped once for `held` steps: EDM-AT's published schedule.

    Half a cosine up from 1/25 of the peak, then half a cosine down to 1/250,000; the momentum runs against the rate.
    """

    held: int = 98  # steps that share one rate: an epoch; a fortieth of the training at most
    low: float = 0.85  # momentum at the peak rate
    high: float = 0.95  # momentum at both ends

    def __post_init__(self) -> None:
        require(self.held >= 1, "schedule.held", "at least 1 step", self.held)
        require(0 <= self.low <= self.high < 1, "schedule.low", "0 <= low <= high < 1", (self.low, self.high))

    def _between(self, step: int, steps: int, warmup: float, ends: tuple[float, float, float]) -> float:
        """The value at that step on the way start -> peak -> end, in half cosines."""
        held = max(min(self.held, steps // 40), 1)  # torch's own never rises where an epoch is all there is
        epochs = max(-(-steps // held), 1)
        top, last, epoch = warmup * epochs - 1, epochs - 1, step // held
        start, peak, end = ends
        if epoch <= top:
            return _half_cosine(start, peak, epoch / top if top else 1.0)
        return _half_cosine(peak, end, (epoch - top) / (last - top))

    def factor(self, step: int, steps: int, warmup: float) -> float:
        """Share of the peak rate at step 0, 1, ..."""
        return self._between(step, steps, warmup, (1 / 25, 1.0, 1 / 25e4))

    def momentum(self, step: int, steps: int, warmup: float, usual: float) -> float:
        """Momentum of that step; the usual one is not looked at."""
        return self._between(step, steps, warmup, (self.high, self.low, self.high))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True, kw_only=True)
class SWA:
    """Stochastic weight averaging (Izmailov et al. 2018): the plain mean of the weights at every `every`-th step.

    Before `start` the average is the network itself. Batch-norm statistics are averaged with the weights.
    """

    start: float = 0.75  # share of the training after which weights are collected
    every: int = 50  # steps between two collected weights

    def __post_init__(self) -> None:
        require(0 <= self.start < 1, "swa.start", "a share from 0 to below 1", self.start)
        require(self.every >= 1, "swa.every", "at least 1 step", self.every)

    def weight(self, step: int, steps: int) -> float:
        """How far the average moves to the network after step 1, 2, ...: all the way, not at all, or 1 / count."""
        since = step - math.floor(self.start * steps)
        if since <= 0:
            return 1.0
        return 1 / (since // self.every + 1) if since % self.every == 0 else 0.0
