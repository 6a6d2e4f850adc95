"""Where along the noise levels a guidance acts, and how strongly: windows in sigma or in timesteps, and profiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from gambeson.sampling.schedules import AlphaBar, cosine_alpha_bar, linear_alpha_bar, sigma_from_alpha_bar
from gambeson.types import Sigmas


@dataclass(frozen=True, kw_only=True)
class Window:
    """The noise levels at which a guidance acts, both ends included."""

    sigma_min: float = 0.0  # lowest guided sigma
    sigma_max: float | None = None  # highest guided sigma; none: no bound

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min <= (math.inf if self.sigma_max is None else self.sigma_max):
            raise ValueError(f"Window: expected 0 <= sigma_min <= sigma_max, got {self.sigma_min}, {self.sigma_max}")

    def contains(self, sigma: float) -> bool:
        """Whether steps at this sigma are guided."""
        return self.sigma_min <= sigma and (self.sigma_max is None or sigma <= self.sigma_max)

    @staticmethod
    def of_timesteps(alpha_bar: AlphaBar, first: int, last: int | None = None) -> Window:
        """Timesteps first..last of a VP table, both included; last None: up to the noisiest.

        The ends lie between two timesteps, so rounding cannot move a step across.
        ValueError unless 0 <= first <= last < len(alpha_bar).
        """
        end = len(alpha_bar) - 1 if last is None else last
        if not 0 <= first <= end < len(alpha_bar):
            raise ValueError(
                f"Window: expected 0 <= first <= last <= {len(alpha_bar) - 1}, got first={first}, last={last}"
            )
        sigma = sigma_from_alpha_bar(alpha_bar).tolist()
        low = 0.0 if first == 0 else math.sqrt(sigma[first - 1] * sigma[first])
        return Window(
            sigma_min=low, sigma_max=None if end == len(sigma) - 1 else math.sqrt(sigma[end] * sigma[end + 1])
        )


@dataclass(frozen=True, kw_only=True)
class TimestepWindow:
    """The timesteps first..last of a VP table at which a guidance acts, both included, on whatever levels are sampled.

    CDP's code: linear, first 400 (CIFAR-10); cosine, first 51, last 149 (traffic signs).
    """

    first: int = 400  # lowest guided timestep, counted from 0
    last: int | None = None  # highest guided timestep; none: up to the noisiest
    schedule: Literal["linear", "cosine"] = "linear"  # how the table of signal powers is made
    table_steps: int = 1000  # length of the table
    beta_start: float = 1e-4  # first beta of the linear table
    beta_end: float = 0.02  # last beta of the linear table

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"TimestepWindow schedule: expected 'linear' or 'cosine', got {self.schedule!r}")
        self.in_sigma()

    def in_sigma(self) -> Window:
        """The same window in sigma. ValueError for timesteps outside the table, or betas outside (0, 1)."""
        return _in_sigma(self)

    def contains(self, sigma: float) -> bool:
        """Whether steps at this sigma are guided."""
        return self.in_sigma().contains(sigma)


@cache
def _in_sigma(window: TimestepWindow) -> Window:
    if window.schedule == "cosine":
        table = cosine_alpha_bar(window.table_steps)
    else:
        table = linear_alpha_bar(window.table_steps, window.beta_start, window.beta_end)
    return Window.of_timesteps(table, window.first, window.last)


def guided_steps(window: Window | TimestepWindow, sigmas: Sigmas, first: int) -> int:
    """How many steps of a schedule, from index `first` on, lie in the window. ValueError where none does."""
    levels = sigmas[first:-1].tolist()
    count = sum(window.contains(sigma) for sigma in levels)
    if not count:
        raise ValueError(
            f"guidance: expected at least one guided step, got none: {window} holds no sigma of the schedule"
            f"{' after its first step' if first else ''}, {levels[0] if levels else 'none'} to "
            f"{levels[-1] if levels else 'none'}; TimestepWindow converts a range of timesteps"
        )
    return count


def check_strengths(multiple: Callable[[float], float], window: Window | TimestepWindow, sigmas: Sigmas) -> None:
    """ValueError unless `multiple`, of a schedule's sigma, is a number of float32 at every sigma in the window."""
    for sigma in (s for s in sigmas[:-1].tolist() if window.contains(s)):
        try:
            value = multiple(sigma)
        except OverflowError:
            value = math.inf
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"guidance: expected a finite strength at every guided noise level, got {value:.4g} at sigma "
                f"{sigma:.4g}; usual cause: a PowerStrength whose reference is far from the guided noise levels, or "
                "whose exponent is too large"
            )


def _check_finite(name: str, *numbers: float) -> None:
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name}: expected finite numbers, got {numbers}")


@dataclass(frozen=True, kw_only=True)
class ConstantStrength:
    """The same strength at every noise level."""

    def factor(self, sigma: float) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class PowerStrength:
    """Strength times (sigma / reference)^exponent: above 0 for more at high noise, below 0 for more at low noise."""

    exponent: float = 1.0  # power of sigma / reference
    reference: float = 1.0  # the sigma at which the strength is as given

    def __post_init__(self) -> None:
        _check_finite("PowerStrength", self.exponent, self.reference)
        if not self.reference > 0:
            raise ValueError(f"PowerStrength reference: expected a sigma above 0, got {self.reference}")

    def factor(self, sigma: float) -> float:
        """(sigma / reference)^exponent."""
        return (sigma / self.reference) ** self.exponent


@dataclass(frozen=True, kw_only=True)
class LinearStrength:
    """Strength times a factor that is linear in log sigma between two noise levels, and constant beyond them."""

    low: float = 0.0  # factor at sigma_min and below
    high: float = 1.0  # factor at sigma_max and above
    sigma_min: float = 0.002  # where the slope begins
    sigma_max: float = 80.0  # where the slope ends

    def __post_init__(self) -> None:
        _check_finite("LinearStrength", self.low, self.high, self.sigma_min, self.sigma_max)
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"LinearStrength: expected 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}"
            )

    def factor(self, sigma: float) -> float:
        """Between `low` and `high`."""
        inside = min(max(sigma, self.sigma_min), self.sigma_max)
        share = math.log(inside / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
        return self.low + share * (self.high - self.low)


StrengthProfile = ConstantStrength | PowerStrength | LinearStrength
"""How a strength changes along the noise levels."""
