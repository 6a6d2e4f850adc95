"""Intervals of measures that are no plain means: from groups of images deleted in turn, or from random halves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from gambeson.errors import UserError
from gambeson.quality.space import Sample
from gambeson.randomness import generator
from gambeson.robustness.intervals import wilson

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Jackknifed:
    """An estimate with its bias of order 1/N taken off, its standard error and that error's degrees of freedom."""

    corrected: float
    error: float
    freedom: int


def groups(count: int, number: int, seed: int, purpose: str) -> list[Tensor]:
    """`count` positions shuffled and cut into `number` groups whose sizes differ by 1 at most."""
    order = torch.randperm(count, generator=generator(seed, "quality/groups", purpose))
    return list(order.tensor_split(number))


def enough(what: str, count: int, least: int, why: str) -> None:
    """UserError for fewer images than a measure needs."""
    if count < least:
        raise UserError(f"{what}: expected at least {least} images ({why}), got {count}; give more images")


def jackknife(whole: float, without: Sequence[float]) -> Jackknifed:
    """Delete-a-group jackknife (Quenouille 1956, Tukey 1958; Shao and Tu 1995, section 2.3).

    whole: the estimate from all images; without: those with one of the G groups left out. G whole - (G - 1) mean is
    free of a bias of order 1/N; the error counts chance from all images.
    """
    parts, number = np.asarray(without, dtype=np.float64), len(without)
    error = math.sqrt((number - 1) / number * float(np.square(parts - parts.mean()).sum()))
    return Jackknifed(number * whole - (number - 1) * float(parts.mean()), error, number - 1)


def half_errors(
    samples: Sequence[Sample], splits: int, seed: int, measure: Callable[[list[Sample]], Sequence[float]]
) -> list[float]:
    """The standard error of each number that `measure` takes from all samples; as many degrees of freedom as splits.

    All samples are split into random halves, which share no image: half the squared difference of what the halves give
    is, without bias, the variance at half as many images. Half of that is the variance at all of them, for numbers
    whose N times variance tends to a constant: shares of nearest neighbours do, though a bootstrap of them fails
    (repeated images are their own neighbours) and a jackknife is up to twice too wide (they are not smooth).
    """
    squares = []
    for split in range(splits):
        cut = [groups(len(s), 2, seed, f"halves/{split}/{i}") for i, s in enumerate(samples)]
        one, other = ([s.take(c[side]) for s, c in zip(samples, cut, strict=True)] for side in (0, 1))
        squares.append((np.asarray(measure(one)) - np.asarray(measure(other))) ** 2 / 4)
    return np.sqrt(np.mean(squares, axis=0)).tolist()


def student(centre: float, error: float, freedom: int) -> tuple[float, float]:
    """The ends of Student's 95 % interval."""
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return centre - half, centre + half


def share(successes: int, count: int, error: float, freedom: int) -> tuple[float, float]:
    """The interval of a share whose terms depend on each other: Student's, and never inside Wilson's.

    Where every term is 0 or 1 the error is 0, and Wilson's says what so many images can show.
    """
    ends, least = student(successes / count, error, freedom), wilson(successes, count)
    return max(min(ends[0], least.low), 0.0), min(max(ends[1], least.high), 1.0)


def around(
    value: float, low: float, high: float, lowest: float = -math.inf, highest: float = math.inf
) -> tuple[float, float]:
    """An interval cut to what is possible, and stretched to `value` where that lies outside."""
    return min(max(low, lowest), value), max(min(high, highest), value)
