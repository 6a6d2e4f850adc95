"""Class means of real and synthetic images: the cases of CDP's Proposition 1, and directions beyond them."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from gambeson.errors import require
from gambeson.randomness import or_fresh
from gambeson.theory.gaussian import Norm, Number, Vectors, best_robust_theta, number, vectors


def _plane(dimension: int) -> tuple[Tensor, Tensor]:
    """Unit vectors [d]: the diagonal 1 / sqrt(d), and one across it with entries of alternating sign (zero sum)."""
    one = torch.ones(dimension, dtype=torch.float64)
    other = one.clone()
    other[1::2] = -1
    if dimension % 2:
        other[-1] = 0  # so that the sum is zero
    return one / one.norm(), other / other.norm()


def mean_at(dimension: int, degrees: float | int, length: float | int) -> Tensor:
    """[d] mu of that length, `degrees` from the diagonal 1_d (CDP, appendix B: the angle of mu and epsilon 1_d).

    d = 2: length (cos(45 - degrees), sin(45 - degrees)). UserError for a length <= 0, d < 1, and d = 1 off 0 degrees.
    """
    require(dimension >= 1, "dimension", "a whole number from 1 on", dimension)
    number(length, "length", positive=True)
    require(dimension > 1 or degrees == 0, "degrees", "0 where there is one dimension", degrees)
    if dimension == 1:
        return torch.tensor([length], dtype=torch.float64)
    one, other = _plane(dimension)
    return length * (math.cos(math.radians(degrees)) * one + math.sin(math.radians(degrees)) * other)


def _checked(mu: Vectors, c: Number) -> Tensor:
    number(c, "c", positive=True)
    return vectors(mu, "mu", zero=False)


def scaled(mu: Vectors, c: float | int) -> Tensor:
    """Case 2: c mu, best for clean accuracy. UserError for c <= 0."""
    return c * _checked(mu, c)


def shifted(mu: Vectors, epsilon: float | int, c: float | int) -> Tensor:
    """Case 3 as printed: c (mu - epsilon 1), best for robust accuracy only where every mu_j is above epsilon."""
    number(epsilon, "epsilon", positive=False)
    return c * (_checked(mu, c) - epsilon)


def thresholded(mu: Vectors, epsilon: float | int, c: float | int, norm: Norm = "linf") -> Tensor:
    """Case 3 as it holds for every mu: c times the soft-thresholded mu."""
    return c * best_robust_theta(_checked(mu, c), epsilon, norm)


def orthogonal(mu: Vectors, c: float | int, generator: Generator | None = None) -> Tensor:
    """Case 1: [d] of length c |mu| across mu, of uniform direction. UserError for d = 1, c <= 0."""
    mu = _checked(mu, c)
    require(mu.shape[-1] > 1, "mu", "two dimensions or more, to have something across it", mu.shape[-1])
    free = torch.randn(mu.shape, generator=or_fresh(generator), dtype=torch.float64)
    across = free - (free * mu).sum(-1, keepdim=True) / mu.square().sum(-1, keepdim=True) * mu
    return c * mu.norm(dim=-1, keepdim=True) * across / across.norm(dim=-1, keepdim=True)


def any_direction(mu: Vectors, c: float | int, generator: Generator | None = None) -> Tensor:
    """[d] of length c |mu|, of uniform direction."""
    mu = _checked(mu, c)
    free = torch.randn(mu.shape, generator=or_fresh(generator), dtype=torch.float64)
    return c * mu.norm(dim=-1, keepdim=True) * free / free.norm(dim=-1, keepdim=True)


def turned(mu: Vectors, degrees: float | int, c: float | int, generator: Generator | None = None) -> Tensor:
    """[d] of length c |mu|, `degrees` from mu, towards a uniform direction across it."""
    angle = math.radians(degrees)
    return math.cos(angle) * scaled(mu, c) + math.sin(angle) * orthogonal(mu, c, generator)
