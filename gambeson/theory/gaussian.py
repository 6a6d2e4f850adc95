"""Closed forms of CDP's Gaussian world (section 3, appendix A.1): accuracies of linear classifiers, the best ones.

The world: y is -1 or +1, equally likely, x | y ~ N(y mu, sigma^2 I), the classifier is sign(theta . x).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from gambeson.errors import UserError, require

Vectors = Tensor | NDArray[Any] | Sequence[Any]
"""[..., d], anything that torch.as_tensor reads; computed in float64."""
Number = float | int | Tensor
"""One number, or a tensor that broadcasts against the leading dimensions of the vectors."""
Norm = Literal["linf", "l2"]
"""The norm of the attacker's budget."""


class ZeroOptimum(UserWarning):
    """Says that the best robust classifier is the zero vector: epsilon is at least as large as the class mean."""


def vectors(value: Vectors, name: str, *, zero: bool = True) -> Tensor:
    """[..., d] float64. UserError for no dimension, non-finite entries, and zero vectors unless `zero`."""
    try:
        found = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name}: expected vectors of numbers [..., d], got {type(value).__name__} ({error})"
        ) from error
    require(found.ndim > 0 and found.shape[-1] > 0, name, "vectors [..., d] with d from 1 on", tuple(found.shape))
    bad = int((~found.isfinite()).sum())
    require(bad == 0, name, "finite entries", f"{bad} that are not finite")
    if not zero:
        require(bool((found != 0).any(-1).all()), name, "vectors other than zero", "a zero vector")
    return found


def number(value: Number, name: str, *, positive: bool) -> Tensor:
    """A float64 tensor. UserError unless finite and above 0 (`positive`) or at least 0."""
    found = torch.as_tensor(value, dtype=torch.float64)
    holds = found.isfinite() & (found > 0 if positive else found >= 0)
    require(bool(holds.all()), name, "a finite number above 0" if positive else "a finite number from 0 on", value)
    return found


def dual(theta: Tensor, norm: Norm) -> Tensor:
    """[...] the dual norm: how far theta . x moves per unit of the attacker's budget (L1 for linf, L2 for l2)."""
    require(norm in ("linf", "l2"), "norm", "linf or l2", norm)
    return theta.abs().sum(-1) if norm == "linf" else theta.norm(dim=-1)


def _pair(theta: Vectors, mu: Vectors) -> tuple[Tensor, Tensor]:
    left, right = vectors(theta, "theta"), vectors(mu, "mu", zero=False)
    same = left.shape[-1] == right.shape[-1]
    require(same, "theta and mu", "vectors of the same length d", (left.shape[-1], right.shape[-1]))
    return left, right


def clean_accuracy(theta: Vectors, mu: Vectors, sigma: Number = 1.0) -> Tensor:
    """[...] float64: Phi(mu.theta / (sigma |theta|)) (CDP, equation 6); leading dimensions broadcast.

    The zero vector calls everything one class: 1/2. UserError for a zero mu, sigma <= 0, non-finite entries, other d.
    """
    return robust_accuracy(theta, mu, 0.0, sigma)


def robust_accuracy(theta: Vectors, mu: Vectors, epsilon: Number, sigma: Number = 1.0, norm: Norm = "linf") -> Tensor:
    """[...] float64: Phi((mu.theta - epsilon |theta|_dual) / (sigma |theta|)) (CDP, equation 7), exact.

    The dual norm is L1 for linf and L2 for l2. The zero vector calls everything one class, whatever the attack: 1/2.
    UserError as `clean_accuracy`, and for epsilon < 0.
    """
    theta, mu = _pair(theta, mu)
    epsilon, sigma = number(epsilon, "epsilon", positive=False), number(sigma, "sigma", positive=True)
    length = theta.norm(dim=-1)
    margin = (theta * mu).sum(-1) - epsilon * dual(theta, norm)
    score = margin / (sigma * torch.where(length > 0, length, 1.0))
    return torch.special.ndtr(torch.where(length > 0, score, 0.0))


def soft_threshold(mu: Tensor, epsilon: Number, norm: Norm = "linf") -> Tensor:
    """[..., d]: each entry (linf) or the whole vector (l2) moved towards zero by epsilon, not beyond it."""
    epsilon = torch.as_tensor(epsilon, dtype=torch.float64)[..., None]
    if norm == "linf":
        return mu.sign() * (mu.abs() - epsilon).clamp(min=0)
    length = mu.norm(dim=-1, keepdim=True)
    return mu * (1 - epsilon / length).clamp(min=0)


def best_robust_theta(mu: Vectors, epsilon: Number, norm: Norm = "linf") -> Tensor:
    """[..., d] the theta of highest robust accuracy (CDP, appendix A.1; Deng et al. 2021), not normalised.

    linf: sign(mu_j) max(|mu_j| - epsilon, 0), which the paper shortens to mu - epsilon 1 under mu_j > epsilon for
    all j; l2: mu (1 - epsilon / |mu|). Where epsilon is at least every |mu_j| (l2: |mu|) it is the zero vector: a
    `ZeroOptimum` warning says so, and no linear classifier beats calling everything one class.
    """
    mu, epsilon = vectors(mu, "mu", zero=False), number(epsilon, "epsilon", positive=False)
    require(norm in ("linf", "l2"), "norm", "linf or l2", norm)
    found = soft_threshold(mu, epsilon, norm)
    if not (found != 0).any(-1).all():
        size = "every |mu_j|" if norm == "linf" else "|mu|"
        text = (
            f"epsilon is at least {size}: the robust optimum is the zero vector, which decides nothing (accuracy 1/2)"
        )
        warnings.warn(text, ZeroOptimum, stacklevel=2)
    return found


def best_accuracies(mu: Vectors, epsilon: Number, sigma: Number = 1.0, norm: Norm = "linf") -> dict[str, Tensor]:
    """clean: the most that any classifier reaches; robust: the most of a linear one (or of one constant answer)."""
    mu = vectors(mu, "mu", zero=False)
    best = soft_threshold(mu, number(epsilon, "epsilon", positive=False), norm)
    return {"clean": clean_accuracy(mu, mu, sigma), "robust": robust_accuracy(best, mu, epsilon, sigma, norm)}


def density(score: Tensor) -> Tensor:
    """The standard normal density."""
    return torch.exp(-score.square() / 2) / math.sqrt(2 * math.pi)


def pseudo_labelled_theta(inter: Vectors, synthetic: Vectors, sigma: Number = 1.0) -> Tensor:
    """[..., d] where the mean of y~ x~ goes as n~ grows, labels y~ = sign(theta_inter . x~), x~ of +-synthetic.

    gamma synthetic + 2 sigma phi(a / sigma) u, with u the direction of theta_inter, a = u . synthetic and gamma =
    2 Phi(a / sigma) - 1, the share of right labels minus that of wrong ones. CDP's proof (appendix A.2) has the first
    term alone: it takes the noise of an image for independent of its pseudo-label, which is chosen by that noise.
    """
    inter, synthetic = _pair(inter, synthetic)
    require(bool((inter != 0).any(-1).all()), "inter", "vectors other than zero", "a zero vector")
    sigma = number(sigma, "sigma", positive=True)[..., None]
    u = inter / inter.norm(dim=-1, keepdim=True)
    score = (u * synthetic).sum(-1, keepdim=True) / sigma
    gamma = 2 * torch.special.ndtr(score) - 1
    return gamma * synthetic + 2 * sigma * density(score) * u
