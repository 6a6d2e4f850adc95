"""The threat model: the geometry of what an attacker may do to an image, and only the geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


def _flat_norm(x: Tensor) -> Tensor:
    """The L2 norm of each image, [B, 1, ...] for broadcasting."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """The ball of radius `epsilon` (pixels in [0, 1]) under `norm` around each image, cut to [0, 1].

    Raises ValueError for an unknown norm or an epsilon that is not positive and finite.
    """

    norm: Norm = "linf"  # which norm bounds the perturbation: linf or l2
    epsilon: float = 8 / 255  # radius of the ball, pixels in [0, 1]

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"threat norm: expected 'linf' or 'l2', got {self.norm!r}")
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(
                f"threat epsilon: expected a finite number above 0, got {self.epsilon!r}. "
                "Pixels are in [0, 1], so the usual CIFAR-10 value is 8/255 = 0.0314"
            )

    @staticmethod
    def parse(text: str) -> ThreatModel:
        """'linf:8/255' or 'l2:0.5' -> ThreatModel."""
        norm, colon, radius = text.partition(":")
        try:
            epsilon = float(Fraction(radius.strip()))
        except (ValueError, ZeroDivisionError):
            colon = ""
            epsilon = 0.0
        if not colon or norm not in ("linf", "l2"):
            raise ValueError(f"threat: expected NORM:EPSILON such as 'linf:8/255' or 'l2:0.5', got {text!r}")
        return ThreatModel(norm=norm, epsilon=epsilon)  # type: ignore[arg-type]

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The point of the ball around `origin` and of [0, 1] that the attack keeps: x [B, ...] -> [B, ...].

        linf: the exact Euclidean projection. l2: shrink to the ball, then cut to [0, 1] (stays inside both, since
        `origin` lies in [0, 1]).
        """
        if self.norm == "linf":
            return torch.minimum(torch.maximum(x, origin - self.epsilon), origin + self.epsilon).clamp(0, 1)
        delta = x - origin
        return (origin + delta * (self.epsilon / _flat_norm(delta).clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)

    def random(self, origin: Tensor, draws: Tensor) -> Tensor:
        """A random point of the ball, cut to [0, 1]; `draws` are uniform [0, 1) numbers of origin's shape.

        linf: uniform in the ball. l2: uniform direction from Gaussian quantiles of the draws, full radius.
        """
        draws = draws.to(origin)
        if self.norm == "linf":
            return (origin + self.epsilon * (2 * draws - 1)).clamp(0, 1)
        direction = torch.special.ndtri(draws.clamp(1e-6, 1 - 1e-6))
        return (origin + self.epsilon * direction / _flat_norm(direction).clamp_min(1e-12)).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit step of this norm that raises a linear function most (its dual vector): sign, or g / ||g||."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _flat_norm(gradient).clamp_min(1e-12)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """[B] distance of each image from its origin under the norm."""
        delta = (x - origin).flatten(1)
        return delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)

    def __str__(self) -> str:
        return f"{self.norm} eps {self.epsilon:.4g}"
