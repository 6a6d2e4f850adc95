"""The inner attack of adversarial training: where it starts, how it climbs, and what batch norms do meanwhile.

It makes no parameter gradients and leaves running statistics alone; images stay float32 whatever autocast does inside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gambeson.errors import require
from gambeson.randomness import or_fresh
from gambeson.robustness.attack_losses import Network, frozen, threat_of
from gambeson.robustness.terms import wide
from gambeson.threat import ThreatModel
from gambeson.types import Images

AttackMode = Literal["eval", "train"]
"""Batch norms during the attack: eval = running statistics; train = those of the batch at hand, running ones kept."""
Statistics = Literal["together", "both", "clean", "adversarial"]
"""Which images pass together, and which of them move the running statistics (`clean_and_moved`)."""
Ascent = Callable[[Tensor], Tensor]
"""The gradient of the climbed objective at x [B, C, H, W] -> the step to take, in pixels."""


@dataclass(frozen=True, kw_only=True)
class SteepestSteps:
    """Steps of the loss's step_size along the unit step of the norm: sign(g) for linf, g / ||g|| for l2."""

    def ascent(self, threat: ThreatModel, step_size: float) -> Ascent:
        """The rule for one attack."""
        return lambda gradient: step_size * threat.steepest(gradient)


@dataclass(frozen=True, kw_only=True)
class AdamSteps:
    """Adam on every pixel, then the projection (IRGD's JAX code, METHOD 2); the loss's step_size is not used.

    Kingma & Ba 2015, algorithm 1, betas .9 and .999, epsilon 1e-9. With rates this far above epsilon the first steps
    go from wall to wall of the ball, the later ones settle.
    """

    learning_rate: float = 0.1  # of the first steps, in pixels
    later_rate: float = 0.01  # of the later steps, in pixels
    later_from: int = 5  # the first step, from 0, that takes the later rate

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "AdamSteps learning_rate", "above 0, in pixels", self.learning_rate)
        require(self.later_rate > 0, "AdamSteps later_rate", "above 0, in pixels", self.later_rate)
        require(self.later_from >= 0, "AdamSteps later_from", "0 or more", self.later_from)

    def ascent(self, threat: ThreatModel, step_size: float) -> Ascent:
        """The rule for one attack; it holds the attack's moments."""
        return _Adam(self)


class _Adam:
    """The moments of one attack."""

    def __init__(self, rule: AdamSteps) -> None:
        self.rule, self.taken = rule, 0
        self.mean: Tensor | None = None
        self.square: Tensor | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        m = torch.zeros_like(gradient) if self.mean is None else self.mean
        v = torch.zeros_like(gradient) if self.square is None else self.square
        self.mean, self.square = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
        rate = self.rule.learning_rate if self.taken < self.rule.later_from else self.rule.later_rate
        self.taken += 1
        root = (self.square / (1 - 0.999**self.taken)).sqrt()
        return rate * (self.mean / (1 - 0.9**self.taken)) / (root + 1e-9)


@runtime_checkable
class Inner(Protocol):
    """A training loss with an inner attack: what `ascend` reads of it."""

    @property
    def threat(self) -> ThreatModel | None: ...

    @property
    def steps(self) -> int: ...

    @property
    def step_size(self) -> float | None: ...

    @property
    def attack_mode(self) -> AttackMode: ...

    @property
    def climb(self) -> SteepestSteps | AdamSteps: ...


REACH = {"linf": 2.5, "l2": 150 / 128}
"""Norm -> steps x step size over epsilon, where no step size is given: 10 steps of 2/255 for linf 8/255 (METHOD 2),
10 of 15/255 for L2 128/255 (remembered of the same codes)."""


def step_size_of(loss: Inner) -> float:
    """The inner step in pixels: the loss's own, or one with which its steps reach as far as `REACH` says.

    One step alone is no longer than 1.25 epsilon (Wong et al. 2020 find FGSM's best there).
    """
    if loss.step_size is not None:
        return loss.step_size
    threat = threat_of(loss)
    usual = "linf or l2, or a step_size of your own (under l1 a step moves one pixel, which trains poorly)"
    require(threat.norm in REACH, f"{type(loss).__name__} threat", usual, str(threat))
    return threat.epsilon * min(REACH[threat.norm] / loss.steps, 1.25)


def _batch_norms(model: Network) -> list[_BatchNorm]:
    """Every batch norm of a module, synchronised ones too; none of any other callable."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)] if isinstance(model, nn.Module) else []


@contextmanager
def untracked(model: Network) -> Iterator[None]:
    """Inside, batch norms in training mode normalise by the batch at hand and their running statistics stay."""
    norms = _batch_norms(model)
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, before in zip(norms, tracked, strict=True):
            norm.track_running_stats = before


@contextmanager
def attacked(model: Network, mode: AttackMode) -> Iterator[None]:
    """Inside, the model is frozen; under `train` those batch norms that train go by the batch at hand."""
    trained = [norm for norm in _batch_norms(model) if norm.training and mode == "train"]
    with frozen(model), untracked(model) if trained else nullcontext():
        for norm in trained:
            norm.training = True
        yield


def random_start(threat: ThreatModel, images: Tensor, generator: Generator | None) -> Tensor:
    """A random point of each ball; the draws are made where the generator lives (None: a fresh one seeded 0)."""
    given = or_fresh(generator, images.device)
    return threat.random(images, torch.rand(images.shape, generator=given, device=given.device, dtype=images.dtype))


def ascend(
    loss: Inner, model: Network, images: Images, start: Images, slope: Callable[[Tensor], Tensor]
) -> Iterator[Images]:
    """The inner attack of `loss`: yields the adversarial images after each step, in the ball around `images`.

    slope: logits [B, K], float32 or wider -> gradient of the climbed objective with respect to them, [B, K].
    The model is frozen during each step and as it was when a point is yielded.
    """
    threat, x = threat_of(loss), start
    ascent = loss.climb.ascent(threat, step_size_of(loss))
    for _ in range(loss.steps):
        with attacked(model, loss.attack_mode), torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = model(x)
            (gradient,) = torch.autograd.grad(logits, x, slope(wide(logits.detach())).to(logits.dtype))
        x = threat.project(x.detach() + ascent(gradient), images)
        yield x


def last(points: Iterator[Images]) -> Images:
    """The attack's last point; the others are let go."""
    return deque(points, maxlen=1).pop()


def clean_probabilities(loss: Inner, model: Network, images: Images) -> Tensor:
    """[B, K] what the attack moves away from: the frozen model's probabilities of the clean images."""
    with attacked(model, loss.attack_mode), torch.no_grad():
        return wide(model(images)).softmax(1)


def clean_and_moved(
    model: Network, images: Images, adversarial: Images, statistics: Statistics
) -> tuple[Tensor, Tensor]:
    """Logits [B, K] of clean and of adversarial images, float32 or wider, in the model's own mode.

    together: one pass; training batch norms see both as one batch. Else two passes, clean first, each normalised by
    its own batch; `both` move the running statistics, or only `clean`, or only `adversarial`.
    """
    if statistics == "together":
        clean, moved = wide(model(torch.cat([images, adversarial]))).chunk(2)
        return clean, moved
    with untracked(model) if statistics == "adversarial" else nullcontext():
        clean = model(images)
    with untracked(model) if statistics == "clean" else nullcontext():
        return wide(clean), wide(model(adversarial))
