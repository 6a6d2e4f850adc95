"""The threat model: the geometry of what an attacker may do to an image, and only the geometry."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[str, ...] = get_args(Norm)
CACHED = 2**17
"""Numbers that the projection onto the L1 ball works on at once on a CPU: its many passes then stay in the cache."""


def _flat_norm(x: Tensor) -> Tensor:
    """The L2 norm of each image, [B, 1, ...] for broadcasting."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))


def _l1_kept(size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """[B, D] min(max(size_i - c, 0), room_i) with the least c >= 0 for which they sum to no more than radius [B].

    size, room [B, D] >= 0, size 0 where room is. The sum falls piecewise linearly in c: Newton's steps, kept inside a
    bracket that bisection shrinks, end on the piece that holds the root, and so at the root itself up to rounding.
    """
    near = 8 * torch.finfo(size.dtype).eps * radius
    cut = low = over = sloped = torch.zeros_like(radius)
    high = size.amax(1)
    kept, spare, done = torch.empty_like(size), torch.empty_like(size), radius < 0
    for attempt in range(128):
        torch.sub(size, cut[:, None], out=kept).clamp_min_(0)
        boxed = torch.sub(kept, room, out=spare).clamp_min_(0).sign_().sum(1)  # coordinates that the box holds
        over = torch.minimum(kept, room, out=kept).sum(1) - radius
        sloped = torch.sign(kept, out=spare).sum(1) - boxed
        newton = cut + over / sloped
        done = done | ((over <= near) & ((over >= -near) | (cut == 0))) | (newton == cut)
        if done.all():
            break
        low, high = torch.where(over > 0, cut, low), torch.where(over < 0, cut, high)
        use = (newton > low) & (newton < high) & (attempt % 16 < 15)
        cut = torch.where(done, cut, torch.where(use, newton, (low + high) / 2))
    excess = torch.where(over > near, over / sloped, 0)  # where c is too large a number for steps as fine as needed
    return kept.sub_(spare.mul_((kept < room) * excess[:, None])).clamp_min_(0) if excess.any() else kept


@torch.no_grad()
def project_l1(x: Tensor, origin: Tensor, radius: Tensor) -> Tensor:
    """The Euclidean projection onto the L1 ball around `origin` cut to [0, 1]: x, origin [B, ...], radius [B].

    Every coordinate moves towards its origin by the same cut, but not past it nor out of [0, 1] (Croce & Hein 2021,
    "Mind the Box", proposition 2.1). What is cut to nothing equals its origin exactly. Gradients do not pass.
    """
    most = max(CACHED // max(origin[:1].numel(), 1), 1) if x.device.type == "cpu" else max(len(x), 1)
    parts = zip(*(t.split(most) for t in (x, origin, radius.to(x))), strict=True)
    return torch.cat([_projected_l1(*part) for part in parts])


def _projected_l1(x: Tensor, origin: Tensor, radius: Tensor) -> Tensor:
    delta = x - origin
    room = (delta.sign().clamp_min_(0) - origin).abs_()
    size = delta.abs().mul_(room.sign())
    kept = _l1_kept(size.flatten(1), room.flatten(1), radius).reshape(x.shape)
    return kept.copysign_(delta).add_(origin).clamp_(0, 1)


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """The ball of radius `epsilon` (pixels in [0, 1]) under `norm` around each image, cut to [0, 1].

    Raises ValueError for an unknown norm or an epsilon that is not positive and finite.
    """

    norm: Norm = "linf"  # which norm bounds the perturbation: linf, l2 or l1
    epsilon: float = 8 / 255  # radius of the ball, pixels in [0, 1]

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"threat norm: expected 'linf', 'l2' or 'l1', got {self.norm!r}")
        if isinstance(self.epsilon, str):
            raise ValueError(
                f"threat epsilon: expected a number such as 8 / 255, got the text {self.epsilon!r}; "
                "ThreatModel.parse('linf:8/255') reads text"
            )
        if not (isinstance(self.epsilon, Real) and 0 < self.epsilon <= sys.float_info.max):
            raise ValueError(
                f"threat epsilon: expected a finite number above 0, got {self.epsilon!r}. "
                "Pixels are in [0, 1], so the usual CIFAR-10 value is 8/255 = 0.0314"
            )

    @staticmethod
    def parse(text: str) -> ThreatModel:
        """'linf:8/255', 'l2:0.5' or 'l1:12' -> ThreatModel."""
        norm, colon, radius = text.partition(":")
        try:
            epsilon = float(Fraction(radius.strip()))
        except (ValueError, ZeroDivisionError):
            colon = ""
            epsilon = 0.0
        if not colon or norm not in NORMS:
            raise ValueError(f"threat: expected NORM:EPSILON such as 'linf:8/255', 'l2:0.5' or 'l1:12', got {text!r}")
        return ThreatModel(norm=norm, epsilon=epsilon)  # type: ignore[arg-type]

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The point of the ball around `origin` and of [0, 1] that the attack keeps: x [B, ...] -> [B, ...].

        linf, l1: the exact Euclidean projection. l2: shrink to the ball, then cut to [0, 1] (stays inside both, since
        `origin` lies in [0, 1]).
        """
        if self.norm == "linf":
            return torch.minimum(torch.maximum(x, origin - self.epsilon), origin + self.epsilon).clamp(0, 1)
        if self.norm == "l1":
            return project_l1(x, origin, x.new_full(x.shape[:1], self.epsilon))
        delta = x - origin
        return (origin + delta * (self.epsilon / _flat_norm(delta).clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)

    def random(self, origin: Tensor, draws: Tensor) -> Tensor:
        """A random point of the ball, cut to [0, 1]; `draws` are uniform [0, 1) numbers of origin's shape.

        linf: uniform in the ball. l2: uniform direction from Gaussian quantiles of the draws, full radius. l1: the
        point nearest to origin plus those quantiles (the start of APGD in Croce & Hein 2021).
        """
        draws = draws.to(origin)
        if self.norm == "linf":
            return (origin + self.epsilon * (2 * draws - 1)).clamp(0, 1)
        direction = torch.special.ndtri(draws.clamp(1e-6, 1 - 1e-6))
        if self.norm == "l1":
            return self.project(origin + direction, origin)
        return (origin + self.epsilon * direction / _flat_norm(direction).clamp_min(1e-12)).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit step of this norm that raises a linear function most (its dual vector).

        linf: the sign. l2: g / ||g||. l1: the sign of the one largest coordinate; see `gambeson.robustness.l1` for
        steps that move many.
        """
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "l1":
            flat = gradient.flatten(1)
            largest = flat.abs().argmax(1, keepdim=True)
            return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).reshape(gradient.shape)
        return gradient / _flat_norm(gradient).clamp_min(1e-12)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """[B] distance of each image from its origin under the norm."""
        delta = (x - origin).flatten(1)
        return delta.norm(p={"linf": math.inf, "l2": 2, "l1": 1}[self.norm], dim=1)

    def __str__(self) -> str:
        return f"{self.norm} eps {self.epsilon:.4g}"
