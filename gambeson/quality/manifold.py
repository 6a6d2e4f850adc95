"""Precision, recall, density and coverage: how far each set lies in the other's balls of nearest neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.quality import intervals
from gambeson.quality.measured import Measured
from gambeson.quality.neighbours import nearest_others, squared_distances
from gambeson.quality.space import Sample, comparable

NAMES = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Manifold:
    """What one comparison of real [N, D] and synthetic [M, D] features finds."""

    precise: Tensor  # bool [M]: the synthetic image lies in the ball of some real one
    recalled: Tensor  # bool [N]: the real image lies in the ball of some synthetic one
    balls: Tensor  # int64 [M]: in how many real balls the synthetic image lies
    covered: Tensor  # bool [N]: some synthetic image lies in the ball of the real one
    k: int

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """precision, recall, density, coverage (`NAMES`)."""
        precision, recall = (float(inside.double().mean()) for inside in (self.precise, self.recalled))
        return precision, recall, self.density, self.coverage

    @property
    def density(self) -> float:
        """Balls per synthetic image, over k: 1 on average for the same distribution."""
        return float(self.balls.double().mean()) / self.k

    @property
    def coverage(self) -> float:
        """Share of real images with a synthetic one in their ball."""
        return float(self.covered.double().mean())


def manifold(real: Tensor, synthetic: Tensor, k: int) -> Manifold:
    """Closed balls to the k-th nearest other image of the same set (up to float64's rounding), all pairs, in blocks.

    UserError for fewer than k + 1 images of either kind.
    """
    ours, theirs = (nearest_others(z, k, exact_pairs=len(z) ** 2).distances[:, -1].double() for z in (real, synthetic))
    n, m = len(real), len(synthetic)
    recalled, covered, balls = torch.zeros(n).bool(), torch.zeros(n).bool(), torch.zeros(m).long()
    scale = max(float(z.double().square().sum(1).max()) for z in (real, synthetic))
    for rows, columns, squares in squared_distances(synthetic, real):
        near = squares <= _closed(ours[columns], scale)[None, :]
        balls[rows] += near.sum(1)
        covered[columns] |= near.any(0)
        recalled[columns] |= (squares <= _closed(theirs[rows], scale)[:, None]).any(0)
    return Manifold(balls > 0, recalled, balls, covered, k)


def expected_coverage(real: int, synthetic: int, k: int) -> float:
    """Coverage's expectation where both sets come from one continuous distribution (Naeem et al. 2020, Lemma 2).

    1 - prod_{j=1..k} (N - j) / (N + M - j): that none of the k images nearest to a real one is synthetic.
    """
    return 1 - math.prod((real - j) / (real + synthetic - j) for j in range(1, k + 1))


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    All four depend on how many images there are, even at the same distributions: compare at equal numbers. The
    intervals count chance from both sets (`intervals.half_errors`) and are about each measure's mean at these numbers.
    """

    k: int = 5  # the radius of a ball reaches to this neighbour; Kynkaanniemi et al. take 3, Naeem et al. 5
    most: int = 10000  # images of either kind that are compared, drawn by the seed
    splits: int = 10  # splits of the images into random halves, which give the intervals

    def __post_init__(self) -> None:
        require(self.k >= 1, "PrecisionRecall k", "at least 1", self.k)
        require(self.splits >= 5, "PrecisionRecall splits", "at least 5", self.splits)
        least = 2 * (self.k + 1)
        require(self.most >= least, "PrecisionRecall most", f"at least 2 (k + 1) = {least}", self.most)

    def __call__(self, real: Sample, synthetic: Sample, *, seed: int) -> list[Measured]:
        """UserError for other spaces, and for fewer images than two halves with k + 1 each."""
        comparable(real, synthetic)
        for what, sample in (("precision and recall, real", real), ("precision and recall, synthetic", synthetic)):
            intervals.enough(what, len(sample), 2 * (self.k + 1), f"{self.k} neighbours in each half")
        drawn = [s.drawn(self.most, seed, f"quality/manifold/{i}") for i, s in enumerate((real, synthetic))]
        found = self._of(drawn)
        errors = intervals.half_errors(drawn, self.splits, seed, lambda half: self._of(half).numbers)
        inside = (found.precise, found.recalled, None, found.covered)
        ideals = (None, None, 1.0, expected_coverage(len(drawn[0]), len(drawn[1]), self.k))
        return [
            self._row(name, number, which, error, ideal, drawn, seed)
            for name, number, which, error, ideal in zip(NAMES, found.numbers, inside, errors, ideals, strict=True)
        ]

    def _of(self, samples: list[Sample]) -> Manifold:
        return manifold(samples[0].features, samples[1].features, self.k)

    def _row(
        self,
        name: str,
        value: float,
        inside: Tensor | None,
        error: float,
        ideal: float | None,
        drawn: list[Sample],
        seed: int,
    ) -> Measured:
        low, high = intervals.student(value, error, self.splits)
        if inside is not None:
            low, high = intervals.share(int(inside.sum()), len(inside), error, self.splits)
        same = "stays below 1 (hold a held-out part against it)" if ideal is None else f"has {ideal:.4g} on average"
        return Measured(
            name=name,
            value=value,
            low=max(low, 0.0),
            high=high,
            better="higher",
            ideal=ideal,
            space=drawn[0].space,
            real=len(drawn[0]),
            synthetic=len(drawn[1]),
            randomness=f"the mean at these numbers, over images of both kinds; {self.splits} splits in halves, "
            f"seed {seed}",
            note=f"k = {self.k}; the same distribution {same}",
        )


def _closed(radii: Tensor, scale: float) -> Tensor:
    """Squared radii, with float64's rounding of squared distances allowed for: a copy lies on its twin's bound."""
    return radii.square() * (1 + 1e-6) + 1e-13 * scale
