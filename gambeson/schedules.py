"""Noise schedules: EDM's sigmas, the alpha-bar tables of VP models, DDIM's sub-sequences, and the bridge between them.

All tables are float64; sigma is the noise level of x = x0 + sigma n, alpha-bar (abar) the VP signal power (METHOD 1.3).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gambeson.types import Sigmas

AlphaBar = Float64[Tensor, " steps"]
"""[T] decreasing signal powers in (0, 1]; entry t is the product of (1 - beta) over 0..t."""
Timesteps = Int64[Tensor, " t"]
"""[S] ascending 0-based indices into an alpha-bar table."""


def _count(name: str, n: int) -> None:
    if n < 1:
        raise ValueError(f"{name}: expected at least 1, got {n}")


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Sigmas:
    """[n + 1] float64 noise levels from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5).

    Raises ValueError unless n >= 1, rho > 0 and 0 < sigma_min < sigma_max < inf.
    """
    _count("karras_sigmas, number of steps n", n)
    if not (0 < sigma_min < sigma_max < math.inf and rho > 0):
        raise ValueError(
            "karras_sigmas: expected 0 < sigma_min < sigma_max < inf and rho > 0, "
            f"got sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}; EDM uses .002, 80 and 7"
        )
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def linear_alpha_bar(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> AlphaBar:
    """[steps] abar of evenly spaced betas from `start` to `end` (Ho et al. 2020). ValueError unless both in (0, 1)."""
    _count("linear_alpha_bar, steps", steps)
    if not (0 < start < 1 and 0 < end < 1):
        raise ValueError(f"linear_alpha_bar: expected betas in (0, 1), got start={start}, end={end}")
    beta = torch.linspace(start, end, steps, dtype=torch.float64)
    return (1 - beta).cumprod(0)


def cosine_alpha_bar(steps: int = 1000) -> AlphaBar:
    """[steps] abar of the cosine schedule, betas cut at .999 (Nichol and Dhariwal 2021, eq. 17); ends at sigma 2e4."""
    _count("cosine_alpha_bar, steps", steps)
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp_max(0.999)
    return (1 - beta).cumprod(0)


def ddim_timesteps(
    n: int, kind: Literal["uniform", "quad", "even"] = "uniform", steps: int = 1000, drop_repeats: bool = True
) -> Timesteps:
    """Ascending sub-sequence of 0..steps-1 as in DDIM (Song et al. 2021, D.2), in CDP's code and in minimal-diffusion.

    uniform: every (steps // n)-th index from 0, which is more than n of them where n does not divide steps.
    quad: squares of n evenly spaced points of [0, sqrt(.8 steps)], cut to integers. 0 and small indices repeat when n
    is large (8 zeros at n = 200); each repeat is a wasted network call, so they are dropped unless asked for.
    even: n evenly spaced points from 0 to the last index, both included, cut to integers (minimal-diffusion).
    Raises ValueError unless 1 <= n <= steps and `kind` is known.
    """
    if not 1 <= n <= steps:
        raise ValueError(f"ddim_timesteps: expected 1 <= n <= steps, got n={n}, steps={steps}")
    if kind not in ("uniform", "quad", "even"):
        raise ValueError(f"ddim_timesteps, kind: expected 'uniform', 'quad' or 'even', got {kind!r}")
    if kind == "uniform":
        return torch.arange(0, steps, steps // n)
    points = np.linspace(0, steps - 1, n) if kind == "even" else np.linspace(0, math.sqrt(0.8 * steps), n) ** 2
    chosen = torch.from_numpy(points.astype(np.int64))
    return chosen.unique() if drop_repeats else chosen


def sigma_from_alpha_bar(alpha_bar: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """sigma = sqrt((1 - abar) / abar), elementwise. ValueError unless 0 < abar <= 1."""
    if not ((alpha_bar > 0) & (alpha_bar <= 1)).all():
        raise ValueError(
            f"alpha-bar: expected values in (0, 1], got {alpha_bar.min():.4g} to {alpha_bar.max():.4g}; "
            "a table of betas has to be turned into (1 - beta).cumprod(0) first"
        )
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def alpha_bar_from_sigma(sigma: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """abar = 1 / (1 + sigma^2), elementwise: the inverse of `sigma_from_alpha_bar`. ValueError below 0."""
    if not (sigma >= 0).all():
        raise ValueError(f"sigma: expected values of at least 0, got {sigma.min():.4g}")
    return 1 / (1 + sigma**2)


def ddim_sigmas(alpha_bar: AlphaBar, timesteps: Timesteps, repeats: bool = False) -> Sigmas:
    """[S + 1] float64 descending sigmas at ascending `timesteps` of a table, then 0 (DDIM's t = -1, abar 1).

    Raises ValueError where timesteps are empty, not ascending, outside the table, or, unless `repeats`, repeated.
    """
    inside = len(timesteps) > 0 and int(timesteps[0]) >= 0 and int(timesteps[-1]) < len(alpha_bar)
    steps = timesteps.diff()
    if not (inside and (steps >= 0 if repeats else steps > 0).all()):
        raise ValueError(
            f"ddim_sigmas: expected {'' if repeats else 'strictly '}ascending timesteps in 0..{len(alpha_bar) - 1}, "
            f"got {timesteps.tolist()[:8]}...; ddim_timesteps(..., drop_repeats=True) gives such"
        )
    return torch.cat([sigma_from_alpha_bar(alpha_bar[timesteps]).flip(0), torch.zeros(1, dtype=torch.float64)])
