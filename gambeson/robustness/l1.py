"""AutoPGD under L1: steps on few coordinates, how few following the sparsity of the best point (Croce & Hein 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.randomness import uniform
from gambeson.robustness.attack_losses import AttackLoss, CrossEntropy, threat_of
from gambeson.robustness.pursuit import Lanes, grown, looked_up, where
from gambeson.robustness.views import View
from gambeson.threat import ThreatModel, project_l1

RADII = (3, 2, 1)
"""The balls of a climb, in epsilons: large ones first, each started from the best point of the one before."""
SHARES = (0.3, 0.3, 0.4)
"""The share of the steps spent in each."""


@dataclass(frozen=True, kw_only=True)
class SparseLanes(Lanes):
    """Lanes with the memory of AutoPGD under L1."""

    step_size: Tensor  # [b] L1 length of the next step
    number: Tensor  # [b] int64 coordinates that the next step moves
    moved: Tensor  # [b] coordinates in which the best point of the last check differed from the image
    best_x: Tensor  # [b, C, H, W] of this ball
    best_loss: Tensor  # [b]
    best_gradient: Tensor  # [b, C, H, W]


def stages(steps: int) -> list[int]:
    """Steps in each ball of `RADII`; one of few steps goes into the last ball alone."""
    first, second = (math.ceil(share * steps) for share in SHARES[:2])
    return [first, second, steps - first - second] if steps > first + second else [0, 0, steps]


@cache
def timetable(steps: int) -> tuple[tuple[float, int, bool], ...]:
    """For each point that a climb looks at: radius in epsilons, steps made in this ball, whether a check comes before.

    Each ball opens with a look at its start (0 steps made). A check follows every 4 % of the ball's steps.
    """
    table = []
    for radius, count in zip(RADII, stages(steps), strict=True):
        window = max(int(0.04 * count), 1)
        table += [(float(radius), k, k > 1 and (k - 1) % window == 0) for k in range(count + 1 if count else 0)]
    return tuple(table)


def sparse_direction(gradient: Tensor, number: Tensor) -> Tensor:
    """The signs of the `number` [b] >= 1 of largest entries of each gradient [b, ...], scaled to L1 length 1.

    Entries level with the smallest of them move too; a gradient of zeros gives zeros.
    """
    size = gradient.flatten(1).abs()
    least = size.topk(int(number.max()), dim=1).values.gather(1, number[:, None] - 1)
    signs = torch.where(size >= least, gradient.flatten(1).sign(), 0)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).reshape(gradient.shape)


def coordinates_moved(x: Tensor, origin: Tensor) -> Tensor:
    """[b] how many coordinates differ from the image's."""
    return (x != origin).flatten(1).sum(1)


def _two_thirds(moved: Tensor) -> Tensor:
    """[b] how many coordinates to move when the best point differs in `moved` [b]: 1 / 1.5 of them, rounded up."""
    return ((2 * moved + 2) // 3).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class SparseClimb:
    """One climb of AutoPGD under L1 (Croce & Hein 2021, "Mind the Box", section 3 and algorithm 1).

    A step moves the coordinates of largest gradient, two thirds as many as those in which the best point differs from
    the image, and is projected onto the ball cut to [0, 1]. At a check a best point grown sparser resets the step
    to the radius and is returned to; otherwise the step shrinks by 1.5, to a tenth of the radius at least. The radius
    is 3, 2 and 1 epsilon for 30, 30 and 40 % of the steps; points of the larger balls decide nothing.
    """

    threat: ThreatModel | None  # an L1 ball
    steps: int = 100  # gradient steps in all
    loss: AttackLoss = CrossEntropy()  # what is climbed
    eot: int = 1  # looks that are averaged at each point: stochastic networks

    def __post_init__(self) -> None:
        require(self.threat is None or self.threat.norm == "l1", "SparseClimb threat", "an l1 ball", self.threat)
        require(self.steps >= 1, "SparseClimb steps", "at least 1", self.steps)

    def begin(self, lanes: Lanes) -> SparseLanes:
        """At a random point of the largest ball."""
        threat = threat_of(self)
        draws = uniform(lanes.key, "APGD", tuple(lanes.origin.shape[1:]), lanes.run)
        return self.at(lanes, replace(threat, epsilon=RADII[0] * threat.epsilon).random(lanes.origin, draws))

    def at(self, lanes: Lanes, start: Tensor) -> SparseLanes:
        """At the given points; each ball's start is projected onto it."""
        return grown(
            replace(lanes, x=start),
            SparseLanes,
            step_size=lanes.loss,
            number=torch.ones_like(lanes.step),
            moved=torch.zeros_like(lanes.step),
            best_x=start,
            best_loss=lanes.loss,
            best_gradient=lanes.gradient,
        )

    def advance(self, view: View, lanes: SparseLanes) -> SparseLanes:
        """One step of every image; a check due after a step is made when the next one begins."""
        table = timetable(self.steps)
        opens = looked_up([made == 0 for _, made, _ in table], lanes.step)
        radius = looked_up([r for r, _, _ in table], lanes.step).to(lanes.x) * threat_of(self).epsilon
        final = looked_up([r == 1 for r, _, _ in table], lanes.step)
        lanes = self._check(lanes, radius, looked_up([due for _, _, due in table], lanes.step))
        step = lanes.step_size.reshape(-1, 1, 1, 1) * sparse_direction(lanes.gradient, lanes.number)
        x = project_l1(where(opens, lanes.best_x, lanes.x + step), lanes.origin, radius)
        at = view.slope(self.loss, x, lanes.labels, lanes.target, self.eot)
        new = self._opened(lanes.seen(x, at.logits, loss=at.value, gradient=at.gradient), radius, opens)
        better = opens | (new.loss > lanes.best_loss)
        return replace(
            new,
            right=new.right | ~final,
            margin=torch.where(final, new.margin, math.inf),
            best_x=where(better, new.x, lanes.best_x),
            best_loss=torch.where(better, new.loss, lanes.best_loss),
            best_gradient=where(better, new.gradient, lanes.best_gradient),
        )

    def finished(self, lanes: Lanes) -> Tensor:
        """After the starts and steps of every ball."""
        return lanes.step >= len(timetable(self.steps))

    def _opened(self, lanes: SparseLanes, radius: Tensor, opens: Tensor) -> SparseLanes:
        """The lanes, with the full step and the sparsity of their start where a ball opens [b]."""
        moved = coordinates_moved(lanes.x, lanes.origin)
        return replace(
            lanes,
            step_size=torch.where(opens, radius, lanes.step_size),
            moved=torch.where(opens, moved, lanes.moved),
            number=torch.where(opens, _two_thirds(moved), lanes.number),
        )

    def _check(self, lanes: SparseLanes, radius: Tensor, due: Tensor) -> SparseLanes:
        """Where a check is due [b]: the sparsity of the best point sets the share and whether the step starts anew."""
        moved = coordinates_moved(lanes.best_x, lanes.origin)
        sparser = moved < 0.95 * lanes.moved
        size = torch.where(sparser, radius, torch.maximum(lanes.step_size / 1.5, radius / 10))
        return replace(
            lanes,
            step_size=torch.where(due, size, lanes.step_size),
            number=torch.where(due, _two_thirds(moved), lanes.number),
            moved=torch.where(due, moved, lanes.moved),
            x=where(due & sparser, lanes.best_x, lanes.x),
            gradient=where(due & sparser, lanes.best_gradient, lanes.gradient),
        )
