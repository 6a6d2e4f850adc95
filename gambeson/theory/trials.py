"""Finite-sample trials of CDP's section 3 under a stated protocol, exact in distribution and without drawing images.

The mean of n Gaussian images is Gaussian: one draw. With pseudo-labels it is not, but the label of an image looks only
along theta_inter: one number per image, one vector per trial, in place of d numbers per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from gambeson.errors import require
from gambeson.randomness import or_fresh
from gambeson.theory.gaussian import Norm, clean_accuracy, number, robust_accuracy, vectors

CHUNK = 1 << 21
"""Numbers drawn at once for pseudo-labels: 16 MB."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Real classes N(+-mean, sigma^2 I), synthetic ones N(+-synthetic, synthetic_sigma^2 I), the attacker's budget."""

    mean: tuple[float, ...]  # mu, the mean of class +1; that of class -1 is its negative
    synthetic: tuple[float, ...]  # mu~, the same for the synthetic images
    epsilon: float  # how far the attacker moves an image
    sigma: float = 1.0  # standard deviation of a coordinate within a real class
    synthetic_sigma: float = 1.0  # the same within a synthetic class
    norm: Norm = "linf"  # the norm of epsilon

    def __post_init__(self) -> None:
        """UserError for zero or non-finite means, other lengths, sigma <= 0, epsilon < 0."""
        vectors(self.mean, "mean", zero=False)
        vectors(self.synthetic, "synthetic")
        same = len(self.mean) == len(self.synthetic)
        require(same, "synthetic", f"a mean of {len(self.mean)} entries as the real one's", len(self.synthetic))
        number(self.sigma, "sigma", positive=True)
        number(self.synthetic_sigma, "synthetic_sigma", positive=True)
        number(self.epsilon, "epsilon", positive=False)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What the paper leaves open. The defaults are the protocol under which its Table 9 is met (METHOD, section 4)."""

    trained_on: Literal["real", "synthetic", "both"] = "synthetic"  # what theta_final is the mean of (equation 5: both)
    labels: Literal["true", "inter"] = "inter"  # of synthetic images: their class, or sign(theta_inter . x)
    counted: Literal["class", "total"] = "class"  # whether n counts the images of one class or of both

    def images(self, count: int) -> int:
        """Images of both classes together."""
        return 2 * count if self.counted == "class" else count


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Exact accuracies of each trial's classifier on infinitely many real images: [T] float64 each."""

    clean: Tensor
    robust: Tensor

    def mean(self, measure: str) -> float:
        """Mean over trials of `clean` or `robust`."""
        return float(self._of(measure).mean())

    def deviation(self, measure: str) -> float:
        """Standard deviation over trials (n - 1)."""
        return float(self._of(measure).std())

    def _of(self, measure: str) -> Tensor:
        return {"clean": self.clean, "robust": self.robust}[measure]


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pseudo_labelled_sum(inter: Tensor, world: World, images: int, generator: Generator) -> Tensor:
    """[T, d] sums of y~ x~ over `images` synthetic images, labelled by each trial's theta_inter [T, d]; exact.

    Times its own class, an image is mu~ + s e, e ~ N(0, I), and its label is right where b = sign(u.mu~ + s u.e) is 1.
    b and the noise across u are independent, so b times that noise is standard normal again: the sum is, along u, that
    of |u.mu~ + s u.e| over images, and across u, (sum of b) mu~ + s sqrt(images) N(0, I).
    """
    mean = torch.tensor(world.synthetic, dtype=torch.float64)
    u = inter / inter.norm(dim=1, keepdim=True)
    a = u @ mean
    along, right = torch.empty_like(a), torch.empty_like(a)
    step = max(1, CHUNK // images)
    for start in range(0, len(a), step):
        part = a[start : start + step, None]
        seen = part + world.synthetic_sigma * _normal((len(part), images), generator)
        along[start : start + step], right[start : start + step] = seen.abs().sum(1), seen.sign().sum(1)
    noise = world.synthetic_sigma * math.sqrt(images) * _normal((len(a), len(mean)), generator)
    across = noise + right[:, None] * mean
    return across + (along - (across * u).sum(1))[:, None] * u


def draw_theta(
    world: World, protocol: Protocol, real: int, synthetic: int, trials: int, generator: Generator | None = None
) -> Tensor:
    """[trials, d] float64 classifiers theta_final of independent trials with that many images (CDP, equation 5).

    `real` images train theta_inter and `synthetic` ones follow, counted as the protocol says. UserError for counts or
    trials below 1.
    """
    for name, value in {"real": real, "synthetic": synthetic, "trials": trials}.items():
        require(value >= 1, name, "a whole number from 1 on", value)
    generator = or_fresh(generator)
    mean = torch.tensor(world.mean, dtype=torch.float64)
    n, m, d = protocol.images(real), protocol.images(synthetic), len(mean)
    inter = mean + world.sigma / math.sqrt(n) * _normal((trials, d), generator)
    if protocol.trained_on == "real":
        return inter
    if protocol.labels == "inter":
        total = pseudo_labelled_sum(inter, world, m, generator)
    else:
        noise = world.synthetic_sigma * math.sqrt(m) * _normal((trials, d), generator)
        total = m * torch.tensor(world.synthetic, dtype=torch.float64) + noise
    return total / m if protocol.trained_on == "synthetic" else (n * inter + total) / (n + m)


def run_trials(
    world: World, protocol: Protocol, real: int, synthetic: int, trials: int, generator: Generator | None = None
) -> Outcome:
    """The exact accuracies of `draw_theta`'s classifiers."""
    theta = draw_theta(world, protocol, real, synthetic, trials, generator)
    robust = robust_accuracy(theta, world.mean, world.epsilon, world.sigma, world.norm)
    return Outcome(clean=clean_accuracy(theta, world.mean, world.sigma), robust=robust)
