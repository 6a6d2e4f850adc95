"""Samplers: generators of Steps that walk noise down the sigmas of one space, x = x0 + sigma n (METHOD 1.3).

A step is: network -> guidance (a shift of x0-hat) -> clamp of x0-hat, if any -> the sampler's own update.
The trajectory is kept in float64 (the cosine schedule reaches sigma 2e4); network and guidance see the noise's dtype.
Each Step holds the state that was evaluated; the last one, at sigma 0, the sample: `*_, last = sampler(...)`, `last.x`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from gambeson.randomness import or_fresh
from gambeson.types import Denoiser, Guidance, Sigmas, Step


class NotFiniteError(ValueError):
    """The network or the guidance returned NaN or infinity; the message names step, sigma and block."""


@dataclass(kw_only=True)
class _Evaluation:
    """Network, guidance and clamp at one point; carries the guidance's state and the generator through a block."""

    denoise: Denoiser
    guidance: Guidance | None
    labels: Tensor | None
    clip: float | None
    dtype: torch.dtype
    generator: Generator
    block: int
    steps: int
    state: Any = None

    def __call__(
        self, index: int, x: Tensor, sigma: float, previous: Step | None, stage: int = 0, guide: bool = True
    ) -> Step:
        """The Step at (x, sigma): x0-hat before and after guidance and clamp."""
        seen = x.to(self.dtype)
        with torch.no_grad():
            raw = self.denoise(seen, sigma, self.labels).to(self.dtype)
        self._inspect(raw, seen, f"the denoiser at step {index} (stage {stage}, sigma {sigma:.4g})")
        before = None if previous is None else replace(previous, previous=None)
        step = Step(
            index=index, stage=stage, x=seen, sigma=sigma, raw=raw, guided=raw, labels=self.labels, previous=before
        )
        guided = self._guided(step) if guide else raw
        return replace(step, guided=guided if self.clip is None else guided.clamp(-self.clip, self.clip))

    def _guided(self, step: Step) -> Tensor:
        if self.guidance is None:
            return step.raw
        shift, self.state = self.guidance(self.state, step)
        if shift is None:
            return step.raw
        self._inspect(shift, step.x, f"the guidance at step {step.index} (stage {step.stage}, sigma {step.sigma:.4g})")
        return step.raw + shift

    def _inspect(self, out: Tensor, x: Tensor, source: str) -> None:
        if out.shape != x.shape:
            raise ValueError(
                f"{source}: expected the shape of x, {tuple(x.shape)}, got {tuple(out.shape)}; "
                "a network that also predicts variances has to drop those channels in its wrapper"
            )
        finite = out.isfinite().flatten(1).all(1)
        if not finite.all():
            raise NotFiniteError(
                f"{source} of block {self.block}: expected finite numbers, got NaN or infinity in "
                f"{int((~finite).sum())} of {len(finite)} images, the first is {int((~finite).nonzero()[0])}; "
                "usual causes: half precision, a guidance strength too large, weights that do not fit the wrapper"
            )

    def noise(self, x: Tensor) -> Tensor:
        """Fresh standard normal numbers of x's shape, drawn where the generator lives, in the network's dtype."""
        drawn = torch.randn(x.shape, generator=self.generator, device=self.generator.device, dtype=self.dtype)
        return drawn.to(x)


@runtime_checkable
class _Update(Protocol):
    """What differs between samplers."""

    @property
    def vp_start(self) -> bool: ...
    @property
    def clip(self) -> float | None: ...
    def _advance(
        self, evaluate: _Evaluation, index: int, x: Tensor, sigma: float, lower: float, previous: Step | None
    ) -> tuple[Step, Tensor]:
        """The Step at (x, sigma) and the state at the next sigma, `lower`."""
        ...


def _check(noise: Tensor, sigmas: Tensor, labels: Tensor | None) -> None:
    """ValueError, before anything runs, for what would only fail or mislead later."""
    if len(sigmas) < 2 or sigmas[-1] != 0 or not (sigmas.diff() < 0).all():
        raise ValueError(
            f"sigmas: expected at least 2 strictly decreasing values that end with 0, got {sigmas.tolist()[:6]}... "
            f"of length {len(sigmas)}; karras_sigmas and ddim_sigmas give such"
        )
    if not noise.is_floating_point() or not noise.isfinite().all():
        bad = int((~noise.isfinite()).sum())
        raise ValueError(f"noise: expected finite floating-point normals, got {noise.dtype} with {bad} not finite")
    if labels is not None and labels.shape != noise.shape[:1]:
        raise ValueError(
            f"labels: expected one class per row of noise, shape {tuple(noise.shape[:1])}, got {tuple(labels.shape)}"
        )


def _open(
    update: _Update,
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    guidance: Guidance | None,
    labels: Tensor | None,
    generator: Generator | None,
    block: int,
) -> Iterator[Step]:
    """Check, then start: at sigma n (EDM), or at sqrt(1 + sigma^2) n, unit variance in VP coordinates (DDPM, DDIM)."""
    _check(noise, sigmas, labels)
    levels: list[float] = sigmas.double().tolist()
    evaluate = _Evaluation(
        denoise=denoise,
        guidance=guidance,
        labels=labels,
        clip=update.clip,
        dtype=noise.dtype,
        generator=or_fresh(generator),
        block=block,
        steps=len(levels) - 1,
    )
    evaluate.state = None if guidance is None else guidance.init(block, evaluate.generator)
    x = noise.detach().double() * (math.sqrt(1 + levels[0] ** 2) if update.vp_start else levels[0])
    return _walk(update, evaluate, x, levels)


def _walk(update: _Update, evaluate: _Evaluation, x: Tensor, levels: list[float]) -> Iterator[Step]:
    """The loop all samplers share: N evaluated Steps, then the sample as a Step at sigma 0."""
    step: Step | None = None
    for index, (sigma, lower) in enumerate(pairwise(levels)):
        step, x = update._advance(evaluate, index, x, sigma, lower, step)
        yield step
    assert step is not None
    last = replace(step, previous=None)
    yield replace(last, index=evaluate.steps, x=x.to(evaluate.dtype), sigma=0.0, previous=last)


def _check_clip(clip: float | None) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected None or a bound above 0 (images live in [-1, 1], so 1), got {clip}")


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """DDIM (Song et al. 2021, eq. 12 and 16), written in sigma space.

    eta 0 is Euler's method on the probability-flow ODE (order 1), eta 1 the DDPM ancestral sampler with its smaller
    variance; one network call per step. Calling it: noise [B, ...] unit normal, sigmas [N + 1] decreasing to 0,
    labels [B] or None -> N + 1 Steps. ValueError at once for bad inputs, NotFiniteError where the network breaks.
    """

    eta: float = 0.0  # share of fresh noise: 0 deterministic, 1 ancestral
    vp_start: bool = False  # start at sqrt(1 + sigma^2) noise, as VP models do, instead of sigma noise
    clip: float | None = None  # clamp the guided x0-hat to [-clip, clip]; none: leave it

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM eta: expected 0 (deterministic) to 1 (ancestral), got {self.eta}")
        _check_clip(self.clip)

    def __call__(
        self,
        denoise: Denoiser,
        noise: Tensor,
        sigmas: Sigmas,
        guidance: Guidance | None = None,
        *,
        labels: Tensor | None = None,
        generator: Generator | None = None,
        block: int = 0,
    ) -> Iterator[Step]:
        """Walk `noise` down `sigmas`; the generator feeds only the fresh noise of eta > 0 and the guidance."""
        return _open(self, denoise, noise, sigmas, guidance, labels, generator, block)

    def _advance(
        self, evaluate: _Evaluation, index: int, x: Tensor, sigma: float, lower: float, previous: Step | None
    ) -> tuple[Step, Tensor]:
        step = evaluate(index, x, sigma, previous)
        x0 = step.guided.double()
        eps = (x - x0) / sigma
        up = self.eta * lower * math.sqrt(sigma**2 - lower**2) / sigma  # eq. 16 divided by sqrt(abar of the next step)
        x = x0 + math.sqrt(lower**2 - up**2) * eps
        return step, x + up * evaluate.noise(x) if up > 0 else x


@dataclass(frozen=True, kw_only=True)
class Heun:
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2): order 2, 2N - 1 network calls, exact ODE at churn 0.

    With churn, a Step holds the raised state and sigma, which is what network and guidance saw. The second evaluation
    (stage 1, its `previous` is the start of the step) is not yielded. Calling it: as `DDIM`.
    """

    churn: float = 0.0  # total amount of noise added and removed again; 0: deterministic
    s_min: float = 0.0  # lowest sigma with churn
    s_max: float | None = None  # highest sigma with churn; none: no bound
    s_noise: float = 1.0  # scale of the added noise
    guide_second: bool = False  # guide the second evaluation of a step as well
    vp_start: bool = False  # start at sqrt(1 + sigma^2) noise, as VP models do, instead of sigma noise
    clip: float | None = None  # clamp the guided x0-hat to [-clip, clip]; none: leave it

    def __post_init__(self) -> None:
        if self.churn < 0 or self.s_noise < 0 or (self.s_max is not None and self.s_min > self.s_max):
            raise ValueError(f"Heun: expected churn >= 0, s_noise >= 0 and s_min <= s_max, got {self}")
        _check_clip(self.clip)

    def __call__(
        self,
        denoise: Denoiser,
        noise: Tensor,
        sigmas: Sigmas,
        guidance: Guidance | None = None,
        *,
        labels: Tensor | None = None,
        generator: Generator | None = None,
        block: int = 0,
    ) -> Iterator[Step]:
        """Walk `noise` down `sigmas`; the generator feeds only the churn and the guidance."""
        return _open(self, denoise, noise, sigmas, guidance, labels, generator, block)

    def _advance(
        self, evaluate: _Evaluation, index: int, x: Tensor, sigma: float, lower: float, previous: Step | None
    ) -> tuple[Step, Tensor]:
        churned = self.s_min <= sigma and (self.s_max is None or sigma <= self.s_max)
        gamma = min(self.churn / evaluate.steps, math.sqrt(2) - 1) if churned else 0.0
        raised = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(raised**2 - sigma**2) * self.s_noise * evaluate.noise(x)
        step = evaluate(index, x, raised, previous)
        d = (x - step.guided.double()) / raised
        euler = x + (lower - raised) * d
        if lower == 0:
            return step, euler
        second = evaluate(index, euler, lower, step, stage=1, guide=self.guide_second)
        d2 = (euler - second.guided.double()) / lower
        return step, x + (lower - raised) * (d + d2) / 2
