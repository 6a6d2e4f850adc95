"""What all samplers share: the walk of a noisy state down the sigmas of one space, x = x0 + sigma n (METHOD 1.3).

A step is: network -> guidance (a shift of x0-hat) -> clamp of x0-hat, if any -> the sampler's own update.
The state is kept in float64 (the cosine schedule reaches sigma 2e4); network and guidance see the noise's dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from gambeson.errors import require
from gambeson.randomness import or_fresh
from gambeson.types import Denoiser, Guidance, Sigmas, Step

_WITHOUT_FLOAT64 = {"mps"}


class NotFiniteError(ValueError):
    """The network or the guidance returned NaN or infinity; the message names step, sigma and block."""


def final(walk: Iterator[Step]) -> Step:
    """The last Step of a walk, whose x is the sample; one step at a time in memory, however many there are."""
    return deque(walk, maxlen=1).pop()


def state_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the state on a device: float64, or float32 where there is no float64 (Apple's mps)."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """x0-hat [B, ...] scaled into [-1, 1], image by image (Saharia et al. 2022, section 2.3, "dynamic thresholding").

    s = max(1, the quantile of |x0| over an image); clamp to [-s, s], divide by s. An image in [-1, 1] stays as it is.
    """
    size = x0.flatten(1).abs()
    s = torch.quantile(size.to(state_dtype(x0.device)), quantile, dim=1).clamp_min(1).to(x0)
    s = s.reshape(-1, *[1] * (x0.dim() - 1))
    return x0.clamp(-s, s) / s


@dataclass(kw_only=True)
class Evaluation:
    """Network, guidance and clamp at one point; carries the guidance's state and the generator through a block."""

    denoise: Denoiser
    guidance: Guidance | None
    labels: Tensor | None
    bound: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    generator: Generator
    block: int
    steps: int
    state: Any = None

    def __call__(
        self,
        index: int,
        x: Tensor,
        sigma: float,
        previous: Step | None,
        *,
        stage: int = 0,
        guide: bool = True,
        level: float | None = None,
    ) -> Step:
        """The Step at (x, sigma): x0-hat before and after guidance and clamp, in the network's dtype.

        level: the schedule's sigma, where the sampler has raised its own.
        NotFiniteError where network or guidance return NaN or infinity, ValueError for another shape than x's.
        """
        seen = x.to(self.dtype)
        with torch.no_grad():
            raw = self.denoise(seen, sigma, self.labels).to(self.dtype)
        self._inspect(raw, seen, f"the denoiser at step {index} (stage {stage}, sigma {sigma:.4g})")
        before = None if previous is None else replace(previous, previous=None)
        step = Step(
            index=index,
            stage=stage,
            x=seen,
            sigma=sigma,
            raw=raw,
            guided=raw,
            labels=self.labels,
            previous=before,
            level=sigma if level is None else level,
        )
        return replace(step, guided=self.bound(self._guided(step) if guide else raw))

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


def _check_sigmas(sigmas: Tensor, repeats: bool, sampler: str) -> None:
    """ValueError unless finite, above 0, decreasing (or equal, where the sampler allows repeats) and ending with 0."""
    form = (
        len(sigmas) >= 2 and bool(sigmas.isfinite().all()) and bool(sigmas[-1] == 0) and bool((sigmas[:-1] > 0).all())
    )
    if not form or (sigmas.diff() > 0).any():
        raise ValueError(
            "sigmas: expected at least 2 finite, strictly decreasing values (but for repeated timesteps) of which only "
            f"the last is 0, got {sigmas.tolist()[:6]}... of length {len(sigmas)}; karras_sigmas and ddim_sigmas give "
            "such"
        )
    if not repeats and (sigmas.diff() == 0).any():
        twice = float(sigmas[:-1][sigmas.diff() == 0][0])
        raise ValueError(
            f"{sampler}: expected strictly decreasing sigmas, got {twice:.4g} twice in a row, where its multistep "
            "formula divides by 0; drop the repeated timesteps (keep_repeats=False), or use DDIM, where a repeat does "
            "not move"
        )


def _check_noise(noise: Tensor, labels: Tensor | None) -> None:
    """ValueError unless the noise is finite and there is a label for each row of it, or none at all."""
    if not noise.is_floating_point() or not noise.isfinite().all():
        bad = int((~noise.isfinite()).sum())
        raise ValueError(f"noise: expected finite floating-point normals, got {noise.dtype} with {bad} not finite")
    if labels is not None and labels.shape != noise.shape[:1]:
        raise ValueError(
            f"labels: expected one class per row of noise, shape {tuple(noise.shape[:1])}, got {tuple(labels.shape)}"
        )


@dataclass(frozen=True, kw_only=True)
class Walk(ABC):
    """The part of a sampler that is the same in all of them; a sampler adds numbers of its own and `_advance`."""

    order: ClassVar[int]
    """Order of convergence to the solution of the probability-flow ODE, where the sampler adds no noise."""
    repeats: ClassVar[bool] = True
    """Whether equal neighbouring sigmas are accepted; the network is called there, but the state does not move."""

    vp_start: bool = False  # start at sqrt(1 + sigma^2) noise, as VP models do, instead of sigma noise
    clip: float | None = None  # clamp the guided x0-hat to [-clip, clip]; none: leave it
    quantile: float | None = field(  # dynamic thresholding (Imagen): share of an image kept unclamped; none: off
        default=None, metadata={"neutral": None}
    )

    def __post_init__(self) -> None:
        """UserError (a ValueError) for a clamp that is none."""
        bound = self.clip is None or 0 < self.clip < math.inf
        require(bound, "clip", "none or a bound above 0 (images live in [-1, 1], so 1)", self.clip)
        share = self.quantile is None or 0 < self.quantile <= 1
        require(share, "quantile", "none or a share above 0, at most 1 (Imagen: .995)", self.quantile)
        both = self.clip is not None and self.quantile is not None
        require(
            not both, "quantile", f"none beside clip={self.clip} (two ways to bound x0-hat: use one)", self.quantile
        )

    def bound(self, x0: Tensor) -> Tensor:
        """The guided x0-hat [B, ...] after the clamp or the dynamic threshold, if any."""
        if self.quantile is not None:
            return dynamic_threshold(x0, self.quantile)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

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
        """Walk `noise` down `sigmas`: N + 1 Steps, each with the state that was evaluated, the last one the sample.

        noise [B, ...] unit normal, sigmas [N + 1] decreasing to 0, labels [B] or None; the generator feeds the fresh
        noise of a stochastic sampler and the guidance. The start is sigma n (EDM), or sqrt(1 + sigma^2) n, which has
        unit variance in VP coordinates. ValueError at once for bad inputs, NotFiniteError where the network breaks.
        """
        _check_sigmas(sigmas, self.repeats, type(self).__name__)
        _check_noise(noise, labels)
        levels: list[float] = sigmas.tolist()
        evaluate = Evaluation(
            denoise=denoise,
            guidance=guidance,
            labels=labels,
            bound=self.bound,
            dtype=noise.dtype,
            generator=or_fresh(generator),
            block=block,
            steps=len(levels) - 1,
        )
        evaluate.state = None if guidance is None else guidance.init(block, evaluate.generator)
        scale = math.sqrt(1 + levels[0] ** 2) if self.vp_start else levels[0]
        return self._walk(evaluate, noise.detach().to(state_dtype(noise.device)) * scale, levels)

    def _walk(self, evaluate: Evaluation, x: Tensor, levels: list[float]) -> Iterator[Step]:
        """The loop: N evaluated Steps, then the sample as a Step at sigma 0."""
        step: Step | None = None
        for index, (sigma, lower) in enumerate(pairwise(levels)):
            if lower == sigma:
                step = evaluate(index, x, sigma, step)
            else:
                step, x = self._advance(evaluate, index, x, sigma, lower, step)
            yield step
        assert step is not None
        last = replace(step, previous=None)
        yield replace(last, index=evaluate.steps, x=x.to(evaluate.dtype), sigma=0.0, level=0.0, previous=last)

    @abstractmethod
    def _advance(
        self, evaluate: Evaluation, index: int, x: Tensor, sigma: float, lower: float, previous: Step | None
    ) -> tuple[Step, Tensor]:
        """The Step at (x, sigma) and the state at the next sigma, `lower`."""
