"""White-box attacks: FGSM, PGD, AutoPGD and its targeted form, the losses they climb, and the verdict per image.

They climb in the lanes of `pursuit`: every draw belongs to its image, and a fooled image leaves the batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.randomness import uniform
from gambeson.robustness.attack_losses import (
    DLR,
    CrossEntropy,
    HasThreat,
    Margin,
    Network,
    TargetedDLR,
    threat_of,
)
from gambeson.robustness.inputs import clean_logits
from gambeson.robustness.l1 import SparseClimb, SparseLanes
from gambeson.robustness.pursuit import Board, Lanes, Pursuit, grown, looked_up, pursue, where
from gambeson.robustness.views import View
from gambeson.threat import ThreatModel
from gambeson.types import Images, Labels

Climbed = CrossEntropy | Margin | DLR | TargetedDLR
"""The losses that a recipe can have an attack climb."""


def chase(attack: Pursuit, model: Network, images: Images, labels: Labels, seed: int = 0) -> Board:
    """What is known of every image after the attack, all of them in one batch. Raises ValueError for inputs out of
    form, a missing threat, or a model in training mode."""
    threat_of(attack)
    board = Board(images, labels, clean_logits(model, images, labels, len(images)), seed)
    pursue(attack, View(model), board, len(images))
    return board


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """One step of size epsilon along the steepest direction from the clean image (Goodfellow et al. 2015, sec. 4)."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    loss: Climbed = CrossEntropy()  # what is climbed

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]; images that are wrong already come back unchanged. Draws nothing."""
        threat = threat_of(self)
        clean = clean_logits(model, images, labels, len(images))
        target = clean.scatter(1, labels[:, None], -math.inf).argmax(1)
        view = View(model)
        with view.ready():
            gradient = view.slope(self.loss, images, labels, target).gradient
        stepped = threat.project(images + threat.epsilon * threat.steepest(gradient), images)
        return where(clean.argmax(1) == labels, stepped, images)


def random_start(attack: HasThreat, lanes: Lanes) -> Lanes:
    """The lanes, each at its climb's own random point of the ball."""
    draws = uniform(lanes.key, type(attack).__name__, tuple(lanes.origin.shape[1:]), lanes.run)
    return replace(lanes, x=threat_of(attack).random(lanes.origin, draws))


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient ascent from random points of the ball (Madry et al. 2018, sec. 2.1), fixed step size."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    steps: int = 40  # gradient steps of each restart
    restarts: int = 3  # random starts; later ones only see the images still standing
    step_size: float | None = None  # in pixels; none: 2.5 * epsilon / steps
    loss: Climbed = Margin()  # what is climbed

    def __post_init__(self) -> None:
        require(self.steps >= 1, "PGD steps", "at least 1", self.steps)
        require(self.restarts >= 1, "PGD restarts", "at least 1", self.restarts)
        require(self.step_size is None or self.step_size > 0, "PGD step_size", "None or above 0", self.step_size)

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]: a fooling one if any was met, otherwise the one of smallest margin.

        A targeted loss is given each image's most likely other class. Images that are wrong already come back
        unchanged. Raises ValueError for inputs out of form, a missing threat, or a model in training mode.
        """
        return chase(self, model, images, labels, seed).best

    def runs(self, classes: int) -> int:
        """One climb per restart."""
        return self.restarts

    def aim(self, ranked: Tensor, run: Tensor) -> Tensor:
        """The most likely other class."""
        return ranked[:, 0]

    def begin(self, lanes: Lanes) -> Lanes:
        """At a random point of the ball."""
        return random_start(self, lanes)

    def advance(self, view: View, lanes: Lanes) -> Lanes:
        """One step of every image, or a look at its start."""
        threat = threat_of(self)
        size = 2.5 * threat.epsilon / self.steps if self.step_size is None else self.step_size
        moved = threat.project(lanes.x + size * threat.steepest(lanes.gradient), lanes.origin)
        x = where(lanes.first, lanes.x, moved)
        at = view.slope(self.loss, x, lanes.labels, lanes.target)
        return lanes.seen(x, at.logits, loss=at.value, gradient=at.gradient)

    def finished(self, lanes: Lanes) -> Tensor:
        """After the start and `steps` steps."""
        return lanes.step > self.steps


@dataclass(frozen=True, kw_only=True)
class APGDLanes(Lanes):
    """Lanes with the memory of AutoPGD."""

    previous: Tensor  # [b, C, H, W] the point that the last step was taken from
    step_size: Tensor  # [b] of the last step
    best_x: Tensor  # [b, C, H, W]
    best_loss: Tensor  # [b]
    best_gradient: Tensor  # [b, C, H, W]
    rises: Tensor  # [b] steps since the last check that raised the loss
    checked: Tensor  # [b] best loss at the last check
    halved: Tensor  # [b] whether the last check halved the step


def checkpoints(steps: int) -> dict[int, int]:
    """Steps after which AutoPGD checks its progress -> how many steps back it looks (Croce & Hein 2020, section 3.2).

    The first comes after 22 % of the steps, each next gap is 3 % shorter, but none shorter than 6 %.
    """
    gap, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    checks, at = {}, gap
    while at <= steps:
        checks[at] = gap
        gap = max(gap - shorter, least)
        at += gap
    return checks


@dataclass(frozen=True, kw_only=True)
class APGD:
    """AutoPGD (Croce & Hein 2020, algorithm 1): momentum, and a step per image that halves when progress stalls."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    steps: int = 100  # gradient steps of each restart
    restarts: int = 1  # random starts; later ones only see the images still standing
    rho: float = 0.75  # share of rising steps below which a check halves the step
    loss: Climbed = CrossEntropy()  # what is climbed
    eot: int = field(default=1, metadata={"neutral": 1})  # looks that are averaged at each point: stochastic networks

    def __post_init__(self) -> None:
        require(self.steps >= 1, "APGD steps", "at least 1", self.steps)
        require(self.restarts >= 1, "APGD restarts", "at least 1", self.restarts)
        require(self.eot >= 1, "APGD eot", "at least 1", self.eot)
        require(0 < self.rho < 1, "APGD rho", "between 0 and 1", self.rho)

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]; as PGD."""
        return chase(self, model, images, labels, seed).best

    def trace(
        self, model: Network, images: Images, labels: Labels, start: Images, target: Labels | None = None
    ) -> Iterator[APGDLanes]:
        """The climb at `start`, then after every step; no image is dropped. target None: the label (untargeted)."""
        require(threat_of(self).norm != "l1", "APGD trace", "a linf or l2 threat (l1: SparseClimb)", threat_of(self))
        view, board = View(model), Board(images, labels, clean_logits(model, images, labels, len(images)), 0)
        rows = torch.arange(len(images), device=images.device)
        lanes: Any = board.fresh(self, rows, torch.zeros_like(rows))
        lanes = replace(lanes, x=start, previous=start, best_x=start, target=labels if target is None else target)
        with view.ready():
            for _ in range(self.steps + 1):
                yield (lanes := self.advance(view, lanes))

    @property
    def patient(self) -> bool:
        """Whether a fooled image climbs on, to a point that fools a network which draws by more than chance."""
        return self.eot > 1

    def runs(self, classes: int) -> int:
        """One climb per restart."""
        return self.restarts

    def aim(self, ranked: Tensor, run: Tensor) -> Tensor:
        """The most likely other class."""
        return ranked[:, 0]

    def begin(self, lanes: Lanes) -> Lanes:
        """At a random point of the ball, with steps of twice the radius; under l1 as `SparseClimb`."""
        if threat_of(self).norm == "l1":
            return self._sparse.begin(lanes)
        at = random_start(self, lanes)
        return grown(
            at,
            APGDLanes,
            previous=at.x,
            step_size=torch.full_like(at.loss, 2 * threat_of(self).epsilon),
            best_x=at.x,
            best_loss=at.loss,
            best_gradient=at.gradient,
            rises=torch.zeros_like(at.step),
            checked=at.loss,
            halved=torch.ones_like(at.right),  # so that the first check judges by the rises alone
        )

    def advance(self, view: View, lanes: Any) -> Any:
        """One step of every image; a check due after a step is made when the next one begins."""
        if isinstance(lanes, SparseLanes):
            return self._sparse.advance(view, lanes)
        first, lanes = lanes.first, self._check(lanes, looked_up(self._windows, lanes.step))
        x = where(first, lanes.x, self._move(lanes))
        at = view.slope(self.loss, x, lanes.labels, lanes.target, self.eot)
        new = lanes.seen(x, at.logits, previous=lanes.x, loss=at.value, gradient=at.gradient)
        better = first | (new.loss > lanes.best_loss)
        return replace(
            new,
            rises=torch.where(first, 0, lanes.rises + (new.loss > lanes.loss)),
            checked=torch.where(first, new.loss, lanes.checked),
            best_x=where(better, new.x, lanes.best_x),
            best_loss=torch.where(better, new.loss, lanes.best_loss),
            best_gradient=where(better, new.gradient, lanes.best_gradient),
        )

    def finished(self, lanes: Lanes) -> Tensor:
        """After the start and `steps` steps."""
        return self._sparse.finished(lanes) if isinstance(lanes, SparseLanes) else lanes.step > self.steps

    @property
    def _sparse(self) -> SparseClimb:
        """What it does under l1."""
        return SparseClimb(threat=self.threat, steps=self.steps, loss=self.loss, eot=self.eot)

    @cached_property
    def _windows(self) -> tuple[int, ...]:
        """How far back to look before each step, 0 where no check is due."""
        due = checkpoints(self.steps)
        return (0, *(due.get(k, 0) for k in range(self.steps + 1)))

    def _move(self, lanes: APGDLanes) -> Tensor:
        """Algorithm 1, lines 7 and 8: a projected gradient step z, mixed with the previous move; the very first step
        has no previous one."""
        threat, x = threat_of(self), lanes.x
        z = threat.project(x + lanes.step_size.reshape(-1, 1, 1, 1) * threat.steepest(lanes.gradient), lanes.origin)
        momentum = torch.where(lanes.step == 1, 0.0, 0.25).to(x).reshape(-1, 1, 1, 1)
        return threat.project(x + (1 - momentum) * (z - x) + momentum * (x - lanes.previous), lanes.origin)

    def _check(self, lanes: APGDLanes, window: Tensor) -> APGDLanes:
        """Halve the step and go back to the best point where few of the last `window` [b] steps rose (condition 1), or
        where neither the step nor the best loss has changed since the last check (condition 2). Window 0: no check."""
        due = window > 0
        stalled = ~lanes.halved & (lanes.best_loss <= lanes.checked)
        halve = due & ((lanes.rises <= self.rho * window) | stalled)
        return replace(
            lanes,
            x=where(halve, lanes.best_x, lanes.x),
            gradient=where(halve, lanes.best_gradient, lanes.gradient),
            step_size=torch.where(halve, lanes.step_size / 2, lanes.step_size),
            rises=torch.where(due, 0, lanes.rises),
            checked=torch.where(due, lanes.best_loss, lanes.checked),
            halved=torch.where(due, halve, lanes.halved),
        )


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD:
    """AutoPGD on the targeted DLR loss, once for each other class by falling clean logit (Croce & Hein 2020, 4)."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    steps: int = 100  # gradient steps towards each target
    targets: int | None = None  # how many of the other classes, most likely first; none: all

    def __post_init__(self) -> None:
        require(self.steps >= 1, "TargetedAPGD steps", "at least 1", self.steps)
        require(self.targets is None or self.targets >= 1, "TargetedAPGD targets", "None or at least 1", self.targets)

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]; as PGD."""
        return chase(self, model, images, labels, seed).best

    @property
    def climb(self) -> APGD:
        """The attack towards one class."""
        return APGD(threat=self.threat, steps=self.steps, loss=TargetedDLR())

    def runs(self, classes: int) -> int:
        """One climb per target."""
        return min(self.targets or classes, classes - 1)

    def aim(self, ranked: Tensor, run: Tensor) -> Tensor:
        """The other classes, most likely first."""
        return ranked.gather(1, run[:, None]).squeeze(1)

    def begin(self, lanes: Lanes) -> Lanes:
        """As AutoPGD."""
        return self.climb.begin(lanes)

    def advance(self, view: View, lanes: Any) -> Any:
        """As AutoPGD."""
        return self.climb.advance(view, lanes)

    def finished(self, lanes: Lanes) -> Tensor:
        """As AutoPGD."""
        return self.climb.finished(lanes)
