"""The noise levels that a sampler walks down, as components of a recipe: EDM's, and sub-sequences of a VP table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gambeson.errors import require
from gambeson.schedules import (
    AlphaBar,
    Timesteps,
    cosine_alpha_bar,
    ddim_sigmas,
    ddim_timesteps,
    karras_sigmas,
    linear_alpha_bar,
)


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """The noise levels that a sampler walks down (Karras et al. 2022, eq. 5)."""

    steps: int = 12  # number of steps; Heun calls the network 2 steps - 1 times
    sigma_min: float = 0.002  # lowest noise level before 0
    sigma_max: float = 80.0  # noise level of the start
    rho: float = 7.0  # how strongly the steps gather at low noise

    def __post_init__(self) -> None:
        """UserError (a ValueError) for numbers out of range."""
        require(self.steps >= 1, "levels.steps", "a whole number above 0", self.steps)
        ordered = 0 < self.sigma_min < self.sigma_max < math.inf
        ends = (self.sigma_min, self.sigma_max)
        require(ordered, "levels.sigma_min, sigma_max", "0 < sigma_min < sigma_max (EDM: .002 and 80)", ends)
        require(self.rho > 0, "levels.rho", "a number above 0 (EDM: 7)", self.rho)

    def sigmas(self) -> Tensor:
        """[steps + 1] float64, decreasing, the last one 0."""
        return karras_sigmas(self.steps, self.sigma_min, self.sigma_max, self.rho)


@dataclass(frozen=True, kw_only=True)
class TimestepLevels:
    """The noise levels at a sub-sequence of the timesteps a VP model was trained at (DDPM, DDIM, minimal-diffusion).

    The defaults are CDP's for CIFAR-10: 187 distinct steps, or all 200 of the authors with `keep_repeats`. Its traffic
    signs (minimal-diffusion): schedule 'cosine', kind 'even', 250 steps.
    """

    schedule: Literal["linear", "cosine"] = "linear"  # how the table of signal powers is made
    table_steps: int = 1000  # length of the table: the timesteps of training
    beta_start: float = 1e-4  # first beta of the linear table
    beta_end: float = 0.02  # last beta of the linear table
    kind: Literal["uniform", "quad", "even"] = "quad"  # which timesteps: every k-th, squares, or even up to the last
    steps: int = 200  # how many timesteps are asked for, repeated ones counted
    keep_repeats: bool = False  # keep quad's repeated timesteps, as the authors did: wasted network calls

    def __post_init__(self) -> None:
        """UserError (a ValueError) for numbers out of range and unknown words."""
        require(self.schedule in ("linear", "cosine"), "levels.schedule", "'linear' or 'cosine'", self.schedule)
        require(self.kind in ("uniform", "quad", "even"), "levels.kind", "'uniform', 'quad' or 'even'", self.kind)
        require(self.table_steps >= 1, "levels.table_steps", "a whole number above 0", self.table_steps)
        within = 1 <= self.steps <= self.table_steps
        require(within, "levels.steps", f"1 to {self.table_steps}, the length of the table", self.steps)
        betas = (self.beta_start, self.beta_end)
        ordered = 0 < self.beta_start <= self.beta_end < 1
        require(ordered, "levels.beta_start, beta_end", "0 < beta_start <= beta_end < 1 (DDPM: 1e-4 and .02)", betas)

    def alpha_bar(self) -> AlphaBar:
        """[table_steps] float64 signal powers of the whole table."""
        if self.schedule == "cosine":
            return cosine_alpha_bar(self.table_steps)
        return linear_alpha_bar(self.table_steps, self.beta_start, self.beta_end)

    def timesteps(self) -> Timesteps:
        """[N] int64 ascending indices into the table; equal neighbours only with `keep_repeats`."""
        return ddim_timesteps(self.steps, self.kind, self.table_steps, drop_repeats=not self.keep_repeats)

    def sigmas(self) -> Tensor:
        """[N + 1] float64 of the timesteps, noisiest first, and 0; N may differ from `steps` (see `ddim_timesteps`)."""
        return ddim_sigmas(self.alpha_bar(), self.timesteps(), repeats=self.keep_repeats)
