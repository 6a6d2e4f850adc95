"""An exact world: a Gaussian mixture whose density, score and denoiser are known in closed form at every noise level.

For tests and first experiments: any sampler or guidance can be measured against the truth (HOUSE rule 11).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Generator, Tensor

from gambeson.randomness import or_fresh
from gambeson.types import Labels, PerImage


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianMixture:
    """K isotropic Gaussians, each belonging to a class: x0 | k ~ N(means_k, std_k^2 I).

    `denoiser` is a Denoiser; where labels are given, density, score and denoiser are those of that class.
    Shapes are [B, *shape] with the shape of one mean, flat or an image. Computed in float64, returned in x's dtype.
    """

    means: Float64[Tensor, "k ..."]
    std: Float64[Tensor, " k"]
    weights: Float64[Tensor, " k"]
    classes: Int64[Tensor, " k"]

    def __post_init__(self) -> None:
        if not ((self.weights > 0).all() and abs(float(self.weights.sum()) - 1) < 1e-9 and (self.std >= 0).all()):
            raise ValueError(
                "GaussianMixture: expected weights above 0 that sum to 1 and std of at least 0, "
                f"got weights {self.weights.tolist()}, std {self.std.tolist()}"
            )

    def _joint(self, x: Tensor, sigma: float | Tensor, labels: Labels | None) -> tuple[Tensor, Tensor, Tensor]:
        """log p(k, x) [B, K], x flat [B, D] and the variances std_k^2 + sigma^2, [B, K] or [1, K]; float64."""
        flat, means = x.double().flatten(1), self.means.flatten(1)
        v = self.std**2 + torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1) ** 2
        square = (flat[:, None, :] - means).square().sum(2)
        log_joint = self.weights.log() - means.shape[1] / 2 * (2 * math.pi * v).log() - square / (2 * v)
        if labels is None:
            return log_joint, flat, v
        own = labels[:, None] == self.classes
        if not own.any(1).all():
            raise ValueError(f"labels: expected classes of {self.classes.unique().tolist()}, got {labels.tolist()[:8]}")
        share = (own * self.weights).sum(1, keepdim=True).log()
        return (log_joint - share).masked_fill(~own, -math.inf), flat, v

    def log_density(self, x: Tensor, sigma: float | Tensor = 0.0, labels: Labels | None = None) -> PerImage:
        """[B] log p(x; sigma) in nats, of the mixture blurred by noise of that level."""
        return self._joint(x, sigma, labels)[0].logsumexp(1).to(x.dtype)

    def score(self, x: Tensor, sigma: float | Tensor = 0.0, labels: Labels | None = None) -> Tensor:
        """The gradient of `log_density` in x, [B, *shape]."""
        log_joint, flat, v = self._joint(x, sigma, labels)
        r = log_joint.softmax(1) / v
        return (r @ self.means.flatten(1) - r.sum(1, keepdim=True) * flat).reshape(x.shape).to(x.dtype)

    def denoiser(self, x: Tensor, sigma: float | Tensor, labels: Labels | None = None) -> Tensor:
        """The posterior mean E[x0 | x = x0 + sigma n], [B, *shape]; sigma above 0, a number or [B]."""
        log_joint, flat, v = self._joint(x, sigma, labels)
        r, kept = log_joint.softmax(1), self.std**2 / v  # posterior over components; share of x that is signal
        x0 = (r * kept).sum(1, keepdim=True) * flat + (r * (1 - kept)) @ self.means.flatten(1)
        return x0.reshape(x.shape).to(x.dtype)

    def sample(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Labels]:
        """n exact draws [n, *shape] float64 and their classes [n]."""
        generator = or_fresh(generator)
        k = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator).to(self.means.device)
        noise = torch.randn((n, *self.means.shape[1:]), generator=generator, dtype=torch.float64).to(self.means)
        return self.means[k] + self.std[k].reshape(-1, *[1] * (self.means.dim() - 1)) * noise, self.classes[k]
