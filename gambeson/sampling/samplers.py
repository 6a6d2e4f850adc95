"""Samplers: generators of Steps that walk noise down the sigmas of one space, x = x0 + sigma n (METHOD 1.3).

Each Step holds the state that was evaluated; the last one, at sigma 0, the sample: `final(sampler(...)).x`.
A sampler is its update alone; start, guidance, clamp and checks are `gambeson.sampling.walk.Walk`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gambeson.errors import require
from gambeson.sampling.walk import Evaluation, NotFiniteError, Walk
from gambeson.types import Step

__all__ = ["DDIM", "DDPM", "DPMSolverPP", "Euler", "Heun", "NotFiniteError"]


@dataclass(frozen=True, kw_only=True)
class DDIM(Walk):
    """DDIM (Song et al. 2021, eq. 12 and 16), written in sigma space; one network call per step.

    eta 0 is Euler's method on the probability-flow ODE (CDP eq. 4), eta 1 the DDPM ancestral sampler with its smaller
    variance. Calling it: see `Walk.__call__`.
    """

    order: ClassVar[int] = 1
    eta: float = 0.0  # share of fresh noise: 0 deterministic, 1 ancestral

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.eta <= 1, "DDIM eta", "0 (deterministic) to 1 (ancestral)", self.eta)

    def _advance(
        self, evaluate: Evaluation, index: int, x: Tensor, sigma: float, lower: float, previous: Step | None
    ) -> tuple[Step, Tensor]:
        step = evaluate(index, x, sigma, previous)
        x0 = step.guided.to(x)
        eps = (x - x0) / sigma
        up = self.eta * lower * math.sqrt(sigma**2 - lower**2) / sigma  # eq. 16 divided by sqrt(abar of the next step)
        x = x0 + math.sqrt(lower**2 - up**2) * eps
        return step, x + up * evaluate.noise(x) if up > 0 else x


@dataclass(frozen=True, kw_only=True)
class DDPM(Walk):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2; CDP section 2.2), written in sigma space; one call per step.

    The posterior mean of q(x_s | x_t, x0) plus noise of variance beta~ ('small') or beta ('large'), where beta is that
    of the whole step, 1 - abar_t / abar_s, so that any sub-sequence of the timesteps can be walked (as 250 of 1,000 in
    minimal-diffusion). There is no noise in the last step, whose 'large' variance is therefore never used: the floor
    that OpenAI's code puts under its logarithm changes nothing. 'small' is DDIM with eta 1.
    """

    order: ClassVar[int] = 1
    vp_start: bool = True  # start at sqrt(1 + sigma^2) noise, as VP models do, instead of sigma noise
    variance: Literal["small", "large"] = "small"  # fresh noise: beta~, right for a point, or beta, right for N(0, I)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.variance in ("small", "large"), "DDPM variance", "'small' or 'large'", self.variance)

    def _advance(
        self, evaluate: Evaluation, index: int, x: Tensor, sigma: float, lower: float, previous: Step | None
    ) -> tuple[Step, Tensor]:
        step = evaluate(index, x, sigma, previous)
        if lower == 0:
            return step, step.guided.to(x)
        kept = (lower / sigma) ** 2  # Ho et al. eq. 7, divided by sqrt(abar of the next step)
        x0 = step.guided.to(x)
        # beta / abar_s with abar = 1 / (1 + sigma^2); beta~ is beta (1 - abar_s) / (1 - abar_t)
        scale = kept if self.variance == "small" else (1 + lower**2) / (1 + sigma**2)
        return step, x0 + kept * (x - x0) + math.sqrt(scale * (sigma**2 - lower**2)) * evaluate.noise(x)


@dataclass(frozen=True, kw_only=True)
class Churned(Walk):
    """EDM's churn (Karras et al. 2022, Algorithm 2, lines 4 to 6): noise is added before a step that removes it again.

    With churn, a Step holds the raised state and sigma, which is what network and guidance saw; its `level` is the
    schedule's sigma, by which a guidance decides whether and how strongly it acts.
    """

    churn: float = 0.0  # total amount of noise added and removed again; 0: deterministic
    s_min: float = 0.0  # lowest sigma with churn
    s_max: float | None = None  # highest sigma with churn; none: no bound
    s_noise: float = 1.0  # scale of the added noise

    def __post_init__(self) -> None:
        super().__post_init__()
        amounts = self.churn >= 0 and self.s_noise >= 0
        ends = self.s_min >= 0 and (self.s_max is None or self.s_min <= self.s_max)
        require(amounts and ends, type(self).__name__, "churn >= 0, s_noise >= 0 and 0 <= s_min <= s_max", self)

    def _raised(self, evaluate: Evaluation, x: Tensor, sigma: float) -> tuple[Tensor, float]:
        """The state and its sigma after the churn of this step."""
        inside = self.s_min <= sigma and (self.s_max is None or sigma <= self.s_max)
        gamma = min(self.churn / evaluate.steps, math.sqrt(2) - 1) if inside else 0.0
        raised = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(raised**2 - sigma**2) * self.s_noise * evaluate.noise(x)
        return x, raised


@dataclass(frozen=True, kw_only=True)
class Euler(Churned):
    """EDM's sampler without its correction (Karras et al. 2022, Algorithm 2, lines 4 to 8): one call per step.

    At churn 0 it is DDIM with eta 0. Calling it: see `Walk.__call__`.
    """

    order: ClassVar[int] = 1

    def _advance(
        self, evaluate: Evaluation, index: int, x: Tensor, sigma: float, lower: float, previous: Step | None
    ) -> tuple[Step, Tensor]:
        x, raised = self._raised(evaluate, x, sigma)
        step = evaluate(index, x, raised, previous, level=sigma)
        return step, x + (lower - raised) * (x - step.guided.to(x)) / raised


@dataclass(frozen=True, kw_only=True)
class Heun(Churned):
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2): 2N - 1 network calls, exact ODE at churn 0.

    The second evaluation (stage 1, its `previous` is the start of the step) is not yielded. Calling it: see
    `Walk.__call__`.
    """

    order: ClassVar[int] = 2
    guide_second: bool = False  # guide the second evaluation of a step as well

    def _advance(
        self, evaluate: Evaluation, index: int, x: Tensor, sigma: float, lower: float, previous: Step | None
    ) -> tuple[Step, Tensor]:
        x, raised = self._raised(evaluate, x, sigma)
        step = evaluate(index, x, raised, previous, level=sigma)
        d = (x - step.guided.to(x)) / raised
        euler = x + (lower - raised) * d
        if lower == 0:
            return step, euler
        second = evaluate(index, euler, lower, step, stage=1, guide=self.guide_second)
        d2 = (euler - second.guided.to(x)) / lower
        return step, x + (lower - raised) * (d + d2) / 2


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP(Walk):
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2), written in sigma space, where lambda = -log sigma.

    One network call per step; the slope of x0-hat comes from the step before, so what is remembered is the guided and
    clamped x0-hat. The first step is of order 1, and so is the last one, to sigma 0. Calling it: see `Walk.__call__`.
    """

    order: ClassVar[int] = 2
    repeats: ClassVar[bool] = False

    def _advance(
        self, evaluate: Evaluation, index: int, x: Tensor, sigma: float, lower: float, previous: Step | None
    ) -> tuple[Step, Tensor]:
        step = evaluate(index, x, sigma, previous)
        x0 = step.guided.to(x)
        if lower == 0:
            return step, x0
        if previous is not None:
            h, h_before = math.log(sigma / lower), math.log(previous.sigma / sigma)
            x0 = x0 + h / (2 * h_before) * (x0 - previous.guided.to(x))  # x0-hat in the middle of the step
        shrunk = lower / sigma
        return step, shrunk * x + (1 - shrunk) * x0
