"""The Fréchet distance between Gaussians fitted to features: FID, its bias at few images, and its limit without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.quality import intervals
from gambeson.quality.measured import Measured
from gambeson.quality.space import Sample, comparable


@dataclass(frozen=True)
class Moments:
    """Count, sum [D] and sum of outer products [D, D] of features, float64; moments of parts add and subtract."""

    count: int
    sum: Tensor
    outer: Tensor

    @staticmethod
    def of(features: Tensor, origin: Tensor) -> Moments:
        """Moments of features [N, D] about an origin [D] near their mean, which keeps the digits."""
        z = features.double() - origin
        return Moments(len(z), z.sum(0), z.T @ z)

    def without(self, part: Moments) -> Moments:
        """The moments of the images that are not in `part`."""
        return Moments(self.count - part.count, self.sum - part.sum, self.outer - part.outer)

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean [D] (about the origin) and unbiased covariance [D, D]."""
        mean = self.sum / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_gaussians(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017).

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), by eigenvalues, so singular covariances are no trouble.
    """
    values, vectors = torch.linalg.eigh(covariance_a.double())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    inner = root @ covariance_b.double() @ root
    crossed = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    apart = (mean_a.double() - mean_b.double()).square().sum()
    spread = covariance_a.diagonal().sum() + covariance_b.diagonal().sum()
    return max(float(apart + spread - 2 * crossed), 0.0)  # rounding may leave -1e-15 where both are equal


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features [N, D] and [M, D]."""
    origin = a.double().mean(0)
    return _between(Moments.of(a, origin), Moments.of(b, origin))


@dataclass(frozen=True, kw_only=True)
class FrechetDistance:
    """FID as everybody computes it, and extrapolated to infinitely many images.

    FID is a plug-in of fitted moments: its bias is positive and of order D/N (Chong and Forsyth 2020, "Effectively
    unbiased FID"), so values are compared at equal N only. Both intervals come from one jackknife over groups of
    images: that of FID is about its own mean at this N; that of the extrapolated value about the true distance.
    """

    groups: int = 20  # groups of images that are left out in turn; more take longer
    extrapolate: bool = True  # also give the value without the bias of order 1/N

    def __post_init__(self) -> None:
        require(self.groups >= 5, "FrechetDistance groups", "at least 5", self.groups)

    def __call__(self, real: Sample, synthetic: Sample, *, seed: int) -> list[Measured]:
        """UserError for other spaces, and for fewer than two images a group."""
        comparable(real, synthetic)
        for what, sample in (("FID, real", real), ("FID, synthetic", synthetic)):
            intervals.enough(what, len(sample), 2 * self.groups, "two for each group left out")
        origin = real.features.double().mean(0)
        ours = [Moments.of(sample.features, origin) for sample in (real, synthetic)]
        whole = _between(*ours)
        without = []
        for parts in zip(*[_groups(sample, self.groups, seed) for sample in (real, synthetic)], strict=True):
            left = [all_.without(Moments.of(part, origin)) for all_, part in zip(ours, parts, strict=True)]
            without.append(_between(*left))
        found = intervals.jackknife(whole, without)
        rows = [self._plain(real, synthetic, whole, found, seed)]
        if self.extrapolate and min(len(real), len(synthetic)) > real.dimensions:
            rows.append(self._extrapolated(real, synthetic, found, seed))
        return rows

    def _plain(self, real: Sample, synthetic: Sample, whole: float, found: intervals.Jackknifed, seed: int) -> Measured:
        """The usual FID."""
        fewest, d = min(len(real), len(synthetic)), real.dimensions
        note = f"biased upwards, by about {whole - found.corrected:.3g} here: compare at equal numbers only"
        if fewest <= d:
            note = (
                f"{fewest} images in {d} dimensions: a fitted covariance is singular and the value is mostly bias, so "
                f"nothing is extrapolated; give well over {d} images, or take a smaller feature space"
            )
        low, high = intervals.student(whole, found.error, found.freedom)
        return self._row("FID", real, synthetic, whole, intervals.around(whole, low, high, 0.0), seed, note)

    def _extrapolated(self, real: Sample, synthetic: Sample, found: intervals.Jackknifed, seed: int) -> Measured:
        """FID at infinitely many images, as the jackknife sees it."""
        value = found.corrected
        ends = intervals.student(value, found.error, found.freedom)
        note = "bias of order 1/N taken off (may fall below 0); what is left is of order (D/N)^2; wide where near 0"
        return self._row("FID extrapolated", real, synthetic, value, ends, seed, note)

    def _row(
        self, name: str, real: Sample, synthetic: Sample, value: float, ends: tuple[float, float], seed: int, note: str
    ) -> Measured:
        covers = "the mean of FID at these numbers of images" if name == "FID" else "the distance of the distributions"
        return Measured(
            name=name,
            value=value,
            low=ends[0],
            high=ends[1],
            better="lower",
            ideal=0.0,
            space=real.space,
            real=len(real),
            synthetic=len(synthetic),
            randomness=f"{covers}, over images; jackknife of {self.groups} groups, seed {seed}",
            note=note,
        )


def _between(a: Moments, b: Moments) -> float:
    return frechet_gaussians(*a.gaussian(), *b.gaussian())


def _groups(sample: Sample, number: int, seed: int) -> Iterator[Tensor]:
    """The features of each group."""
    for part in intervals.groups(len(sample), number, seed, "frechet"):
        yield sample.features[part]
