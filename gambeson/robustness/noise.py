"""Training under Gaussian noise: the base classifiers of randomised smoothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator

from gambeson.errors import require
from gambeson.randomness import or_fresh
from gambeson.robustness.attack_losses import Network
from gambeson.robustness.objectives import Plain
from gambeson.robustness.terms import Targets
from gambeson.types import Images, PerImage


@dataclass(frozen=True, kw_only=True)
class GaussianNoise:
    """The inner loss on x + sigma n, n ~ N(0, 1), a new n in each step (Lecuyer et al. 2019; Cohen et al. 2019, 4).

    The base classifier of randomised smoothing is trained so, with the sigma that it will be certified with. Images
    with noise are not clamped to [0, 1]: the noise that certifies is not either.
    """

    loss: Plain = Plain()  # the loss on the images with noise
    sigma: float = 0.25  # standard deviation of the noise, in pixels of [0, 1]

    def __post_init__(self) -> None:
        require(0 < self.sigma < math.inf, "GaussianNoise sigma", "above 0 (0.25 is usual)", self.sigma)

    def __call__(self, model: Network, images: Images, labels: Targets, generator: Generator | None = None) -> PerImage:
        """[B] losses at images with noise drawn from `generator` (None: a fresh one seeded 0)."""
        return self.value(model, images, self.adversarial(model, images, labels, generator), labels)

    def adversarial(
        self, model: Network, images: Images, labels: Targets, generator: Generator | None = None
    ) -> Images:
        """The images with noise; nothing attacks.

        One uniform draw a pixel, as the attacks' random starts take, so that processes that share a batch can go on in
        the stream where those before them end; then sqrt(2) erfinv, whose argument is exact and never +-1.
        """
        given = or_fresh(generator, images.device)
        draws = torch.rand(images.shape, generator=given, device=given.device).to(images.device)
        noise = math.sqrt(2) * torch.erfinv(2 * draws - 1 + 2.0**-24)
        return images + self.sigma * noise.to(images.dtype)

    def value(self, model: Network, images: Images, adversarial: Images, labels: Targets) -> PerImage:
        """[B] losses of the inner loss at the images with noise."""
        return self.loss.value(model, images, adversarial, labels)

    def at(self, progress: float) -> GaussianNoise:
        """Itself: the same throughout."""
        return self
