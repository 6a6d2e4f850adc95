"""Copies of training images: the nearest train image of every image, beside what held-out real images have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.quality import intervals
from gambeson.quality.measured import Measured
from gambeson.quality.neighbours import EXACT_PAIRS, Index, index_of, method_of
from gambeson.quality.space import Sample, comparable
from gambeson.randomness import image_keys
from gambeson.robustness.intervals import wilson

SAME = 1e-4
"""Of the median distance of held-out images to train: below, two images are the same but for a network's rounding.

One 8-bit level in one pixel of digits (8 x 8) is 3e-3 of it, of CIFAR-10 about 4e-4.
"""


@dataclass(frozen=True)
class CopyTest:
    """Which images lie nearer to a train image than nearly all held-out real images do.

    `threshold` is the distance's quantile over held-out images, so that share of honest images is called a copy too.
    """

    index: Index  # of the train images
    threshold: float  # L2 distance in the feature space
    same: float  # distance up to which two images are the same
    space: str
    quantile: float
    yardstick: Tensor  # distances float32 [H] of the held-out images to their nearest train image

    @staticmethod
    def against(
        train: Sample, held_out: Sample, *, quantile: float = 0.01, queries: int = 0, exact_pairs: int = EXACT_PAIRS
    ) -> CopyTest:
        """From train and held-out real images. queries: how many images will be tested, which decides the index.

        UserError for other spaces, for fewer than 1/quantile held-out images, and where they are the train images.
        """
        comparable(train, held_out)
        require(0 < quantile < 1, "copies: quantile", "a number between 0 and 1, such as 0.01", quantile)
        least = math.ceil(1 / quantile - 1e-9) - 1
        intervals.enough("copies: held-out", len(held_out), least, f"for the {quantile:g} quantile of their distances")
        index = index_of(train.features, max(queries, len(held_out)), exact_pairs)
        apart = index.nearest(held_out.features, 1)[0][:, 0]
        middle = float(apart.median())
        require(middle > 0, "copies: held-out", "images that are not in train: they are the yardstick", middle)
        return CopyTest(index, _quantile(apart, quantile), SAME * middle, train.space, quantile, apart)

    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Distance float32 [B] to the nearest train image, and its position int64 [B]."""
        distances, positions = self.index.nearest(features, 1)
        return distances[:, 0], positions[:, 0]

    def __call__(self, features: Tensor) -> Tensor:
        """bool [B]: whether each image is a copy, which the same image always is."""
        return self.nearest(features)[0] <= max(self.threshold, self.same)


def repeated(features: Tensor) -> Tensor:
    """bool [N]: whether an equal image comes before it in the set, so that leaving these out keeps one of each."""
    # 64-bit keys of the contents; + 0 makes -0 and 0 one
    parts = [image_keys(part + 0.0, torch.zeros(len(part), dtype=torch.int64)) for part in features.split(4096)]
    _, which = torch.cat(parts).unique(return_inverse=True)
    order = which.argsort(stable=True)
    again = torch.zeros(len(features), dtype=torch.bool)
    again[order[1:]] = which[order[1:]] == which[order[:-1]]
    return again


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Shares of synthetic images that are copies of train images, that equal one, and that equal each other.

    A copy lies nearer to its nearest train image than the `quantile` of held-out real images do, so honest images have
    that share. Its interval counts the chance of the synthetic images and of the yardstick, not that of train.
    """

    quantile: float = 0.01  # of the held-out images' distances to train: nearer than that is called a copy

    def __post_init__(self) -> None:
        require(0 < self.quantile < 1, "Memorisation quantile", "between 0 and 1, such as 0.01", self.quantile)

    def __call__(self, real: Sample, synthetic: Sample, *, held_out: Sample, seed: int) -> list[Measured]:
        """real: train. UserError as `CopyTest.against` says."""
        comparable(real, synthetic)
        test = CopyTest.against(real, held_out, quantile=self.quantile, queries=len(synthetic))
        apart = test.nearest(synthetic.features)[0]
        n, how = len(synthetic), f"nearest neighbours {method_of(test.index)}"
        near, same = int((apart <= max(test.threshold, test.same)).sum()), int((apart <= test.same).sum())
        again = int(repeated(synthetic.features).sum())
        note = (
            f"nearer than {test.threshold:.4g}, the {100 * self.quantile:g} % point of {len(held_out)} held-out "
            f"images; median {float(apart.median()):.4g} against {float(test.yardstick.median()):.4g}; {how}"
        )
        given, over = "synthetic images, given train", "synthetic images and the held-out yardstick, given train"
        equal = f"within {test.same:.2g} of it; {how}"
        rows = _Rows(real, held_out, synthetic)
        ends = _against_yardstick(apart, test)
        return [
            rows.row("copies of train", near, ends, self.quantile, over, note),
            rows.row("exact copies of train", same, _ends(same, n), 0.0, given, equal),
            rows.row("repeated images", again, _ends(again, n), 0.0, "synthetic images", REPEATED),
        ]


REPEATED = "further copies of an image of the same set (features equal to the bit); grows with the number of images"


@dataclass(frozen=True)
class _Rows:
    """What the rows have in common."""

    train: Sample
    held_out: Sample
    synthetic: Sample

    def row(self, name: str, hits: int, ends: tuple[float, float], ideal: float, over: str, note: str) -> Measured:
        """The share of `hits` among the synthetic images."""
        return Measured(
            name=name,
            value=hits / len(self.synthetic),
            low=ends[0],
            high=ends[1],
            better="lower",
            ideal=ideal,
            space=self.train.space,
            real=len(self.train) + len(self.held_out),
            synthetic=len(self.synthetic),
            randomness=over,
            note=note,
        )


def _ends(hits: int, count: int) -> tuple[float, float]:
    found = wilson(hits, count)
    return found.low, found.high


def _against_yardstick(apart: Tensor, test: CopyTest) -> tuple[float, float]:
    """Interval of the share of distances [N] below the yardstick's quantile: chance of both squared and added.

    That of the images is Wilson's. That of the yardstick: the share below its quantiles at the ends of the interval of
    the quantile's own level (`_below`). (Newcombe 1998 and Zou and Donner 2008 add the squared distances of both ends
    in this way.)
    """
    value = _below(apart, test, test.quantile)
    low, high = _ends(round(value * len(apart)), len(apart))
    held_out = len(test.yardstick)
    level = wilson(round(test.quantile * held_out), held_out)
    less, more = (_below(apart, test, p) for p in (min(level.low, test.quantile), max(level.high, test.quantile)))
    below, above = math.hypot(value - low, value - less), math.hypot(high - value, more - value)
    return max(value - below, 0.0), min(value + above, 1.0)


def _below(apart: Tensor, test: CopyTest, level: float) -> float:
    """Share of the distances up to the yardstick's quantile at this level.

    Where no held-out image marks that quantile it lies somewhere below the smallest distance of all: of the images
    between that and its half as large a part counts as of the level is left. What is nearer than half counts in full,
    however low the level: there are next to no honest images (their share falls as a high power of the distance).
    """
    reached = max(level, 1 / (len(test.yardstick) + 1))
    limit = max(_quantile(test.yardstick, reached), test.same)
    up_to = float((apart <= limit).double().mean())
    if level == reached:
        return up_to
    surely = float((apart <= max(limit / 2, test.same)).double().mean())
    return surely + (up_to - surely) * level / reached


def _quantile(yardstick: Tensor, level: float) -> float:
    """By Weibull's plotting positions: the mean share of new real images below is the level, however few there are."""
    return float(np.quantile(yardstick.double().numpy(), level, method="weibull"))
