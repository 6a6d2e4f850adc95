"""The fast adaptive boundary attack (FAB): the nearest image that fools, by projections onto linearised boundaries.

It looks for minimal distances; as a lane attack it stops at the first fooling point inside the ball of its threat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.randomness import uniform
from gambeson.robustness.attack_losses import HasThreat, Margin, Network, threat_of
from gambeson.robustness.attacks import chase
from gambeson.robustness.inputs import clean_logits
from gambeson.robustness.multitargeted import TargetedMargin
from gambeson.robustness.pursuit import Board, Lanes, grown, where
from gambeson.robustness.views import Slope, View
from gambeson.threat import Norm, ThreatModel
from gambeson.types import Images, Labels, PerImage


def shortest_move(x: Tensor, w: Tensor, rise: Tensor, norm: Norm) -> Tensor:
    """The smallest d (linf or l2) with w . d = rise and x + d in [0, 1]; where none is, the d that comes closest.

    x [b, n] in [0, 1], w [b, n], rise [b] -> [b, n]. Pixel i moves min(t p_i, room_i) along
    sign(rise w_i), with p_i = 1 (linf) or |w_i| (l2). So w . d is a concave, piecewise linear function of t, and
    Newton's method from below reaches its root in finitely many passes (3 to 6 in practice), without a sort.
    """
    way, steep, wanted = w.sign() * rise.sign()[:, None], w.abs(), rise.abs()
    room = torch.where(way > 0, 1 - x, x).mul_(way.abs())
    gain = steep if norm == "linf" else steep.square()
    ends = room if norm == "linf" else torch.where(steep > 0, room / steep, 0)  # the t at which a pixel meets the box
    most, t = steep * room, wanted / gain.sum(1).clamp_min(1e-30)
    free, part = torch.empty_like(w), torch.empty_like(w)
    for _ in range(w.shape[1] + 1):
        torch.gt(ends, t[:, None], out=free)
        slope = torch.mul(gain, free, out=part).sum(1)
        held = torch.mul(most, free.neg_().add_(1), out=part).sum(1)
        root = torch.where(slope > 0, (wanted - held) / slope.clamp_min(1e-30), t)
        if not (root > t).any():
            break
        t = torch.maximum(t, root)
    return way * torch.minimum(t[:, None] if norm == "linf" else t[:, None] * steep, room)


@dataclass(frozen=True, kw_only=True)
class FABLanes(Lanes):
    """Lanes with the memory of FAB; `loss` and `gradient` are the height at x and its slope."""

    near: Tensor  # [b, C, H, W] the nearest point of this climb that lies beyond the boundary by its linearisation
    reach: Tensor  # [b] its distance, infinity before there is one


def _lengths(delta: Tensor, norm: Norm) -> Tensor:
    """[b, n] -> [b, 1], at least 1e-8."""
    return delta.norm(p=math.inf if norm == "linf" else 2, dim=1, keepdim=True).clamp_min(1e-8)


def _norm_of(attack: HasThreat) -> Norm:
    norm = threat_of(attack).norm
    if norm == "l1":
        raise ValueError(f"{type(attack).__name__}: expected a linf or l2 threat, got l1; use APGD or Square for l1")
    return norm


@dataclass(frozen=True, kw_only=True)
class FAB:
    """FAB towards the class whose linearised boundary is nearest (Croce & Hein 2020, algorithm 1): K gradients a step.

    The first climb begins at the clean image, later ones at random points half as far as the ball reaches.

    Only the verdict for the ball is asked here, so a step needs one look instead of the paper's two: points reached
    outside the ball are not checked. Most fool (99, 98, 98 and 78 % on four networks on digits), and all the check
    decides is whether the search goes on from there or from `beta` of the way. Nor is there a final search: the nearest
    point reached is put into the ball and looked at. `minimal_distance` does as the paper does.
    """

    threat: ThreatModel | None = None  # the ball of the attack, linf or l2; none: that of the recipe
    steps: int = 100  # projections of each climb
    restarts: int = 1  # climbs; later ones only see the images still standing
    alpha_max: float = 0.1  # largest weight of the step from the clean image
    eta: float = 1.05  # how far beyond the boundary a step goes: 1 would be onto it
    beta: float = 0.9  # where between the clean image and a fooling point the search goes on

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]: a fooling one inside the ball if any was met, otherwise the point there of
        smallest margin. Raises ValueError for l1, and as PGD does."""
        _norm_of(self)
        return chase(self, model, images, labels, seed).best

    def runs(self, classes: int) -> int:
        """One climb per restart."""
        return self.restarts

    def aim(self, ranked: Tensor, run: Tensor) -> Tensor:
        """The most likely other class; every step chooses its own."""
        return ranked[:, 0]

    def begin(self, lanes: Lanes) -> FABLanes:
        """At the clean image, or at a random point of half the ball."""
        return _begun(self, lanes)

    def look(self, view: View, x: Tensor, labels: Tensor, target: Tensor) -> Slope:
        """The height above the boundary nearest by its linearisation, among all other classes."""
        logits, gradients = view.jacobian(x)
        every = torch.arange(len(x), device=x.device)
        height = logits - logits[every, labels][:, None]
        slopes = gradients - gradients[every, labels][:, None]
        dual = slopes.flatten(2).norm(p=1 if _norm_of(self) == "linf" else 2, dim=2)
        away = (height.abs() / dual.clamp_min(1e-12)).scatter(1, labels[:, None], math.inf)
        chosen = away.argmin(1)
        return Slope(logits, height[every, chosen], slopes[every, chosen])

    def advance(self, view: View, lanes: FABLanes) -> FABLanes:
        """One projection of every image, or a look at its start, or the last look."""
        return _advanced(self, view, lanes)

    def finished(self, lanes: FABLanes) -> Tensor:
        """After the start, `steps` projections, and a last look at the nearest fooling point if there is one."""
        return lanes.step > self.steps + lanes.reach.isfinite()


@dataclass(frozen=True, kw_only=True)
class TargetedFAB:
    """FAB towards one class at a time, by falling clean logit: FAB-T of AutoAttack (Croce & Hein 2020).

    One gradient a step whatever the number of classes. The climbs of one class come one after another, as in the
    authors' code.
    """

    threat: ThreatModel | None = None  # the ball of the attack, linf or l2; none: that of the recipe
    steps: int = 100  # projections of each climb
    restarts: int = 1  # climbs towards each class; later ones only see the images still standing
    targets: int | None = 9  # how many of the other classes, most likely first; none: all
    alpha_max: float = 0.1  # largest weight of the step from the clean image
    eta: float = 1.05  # how far beyond the boundary a step goes: 1 would be onto it
    beta: float = 0.9  # where between the clean image and a fooling point the search goes on

    def __post_init__(self) -> None:
        _check(self)
        require(self.targets is None or self.targets >= 1, "TargetedFAB targets", "None or at least 1", self.targets)

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]; as FAB."""
        _norm_of(self)
        return chase(self, model, images, labels, seed).best

    def runs(self, classes: int) -> int:
        """Every target, `restarts` times each."""
        return self.restarts * min(self.targets or classes, classes - 1)

    def aim(self, ranked: Tensor, run: Tensor) -> Tensor:
        """The other classes, most likely first."""
        return ranked.gather(1, (run // self.restarts)[:, None]).squeeze(1)

    def begin(self, lanes: Lanes) -> FABLanes:
        """As FAB."""
        return _begun(self, lanes)

    def look(self, view: View, x: Tensor, labels: Tensor, target: Tensor) -> Slope:
        """The height above the boundary of the target class."""
        return view.slope(TargetedMargin(), x, labels, target)

    def advance(self, view: View, lanes: FABLanes) -> FABLanes:
        """As FAB."""
        return _advanced(self, view, lanes)

    def finished(self, lanes: FABLanes) -> Tensor:
        """As FAB."""
        return lanes.step > self.steps + lanes.reach.isfinite()


def _check(attack: FAB | TargetedFAB) -> None:
    name = type(attack).__name__
    require(attack.steps >= 1, f"{name} steps", "at least 1", attack.steps)
    require(attack.restarts >= 1, f"{name} restarts", "at least 1", attack.restarts)
    require(0 <= attack.alpha_max <= 1, f"{name} alpha_max", "0 to 1", attack.alpha_max)
    require(attack.eta >= 1, f"{name} eta", "at least 1", attack.eta)
    require(0 < attack.beta < 1, f"{name} beta", "between 0 and 1", attack.beta)


def _begun(attack: FAB | TargetedFAB, lanes: Lanes) -> FABLanes:
    half = ThreatModel(norm=_norm_of(attack), epsilon=threat_of(attack).epsilon / 2)
    draws = uniform(lanes.key, type(attack).__name__, tuple(lanes.origin.shape[1:]), lanes.run)
    x = where(lanes.run % attack.restarts == 0, lanes.origin, half.random(lanes.origin, draws))
    return grown(replace(lanes, x=x), FABLanes, near=x, reach=torch.full_like(lanes.loss, math.inf))


def _stepped(attack: FAB | TargetedFAB, lanes: FABLanes) -> Tensor:
    """The step of algorithm 1: beyond the boundary from x, drawn a little to where a step from the clean image itself
    would end."""
    norm, w, rise = _norm_of(attack), lanes.gradient.flatten(1), -lanes.loss
    x, origin = lanes.x.flatten(1), lanes.origin.flatten(1)
    here = shortest_move(x, w, rise, norm)
    there = shortest_move(origin, w, rise + (w * (x - origin)).sum(1), norm)
    a, b = _lengths(here, norm), _lengths(there, norm)
    alpha = (a / (a + b)).clamp_max(attack.alpha_max)
    ahead = (1 - alpha) * (x + attack.eta * here) + alpha * (origin + attack.eta * there)
    return ahead.clamp(0, 1).reshape(lanes.x.shape)


def _drawn_back(attack: FAB | TargetedFAB, x: Tensor, origin: Tensor) -> Tensor:
    """The backward step of algorithm 1: x [b, C, H, W] brought nearer to the clean image."""
    return origin + attack.beta * (x - origin)


def _advanced(attack: FAB | TargetedFAB, view: View, lanes: FABLanes) -> FABLanes:
    """One look further. What is reached inside the ball is looked at there, put exactly into it first. What is reached
    outside is taken to fool, and looked at where it is drawn back to: it could not count, and the slope is wanted
    there. The very last look is at the nearest such point, put into the ball."""
    threat, last = threat_of(attack), lanes.step > attack.steps
    tip = where(lanes.first, lanes.x, where(last, lanes.near, _stepped(attack, lanes)))
    inside = last | _inside(threat, tip, lanes.origin)
    x = where(inside, threat.project(tip, lanes.origin), _drawn_back(attack, tip, lanes.origin))
    at = attack.look(view, x, lanes.labels, lanes.target)
    counts = inside | _inside(threat, x, lanes.origin)
    new = lanes.seen(x, at.logits, loss=at.value, gradient=at.gradient)
    beyond = ~new.right | (at.value + (at.gradient * (tip - x)).flatten(1).sum(1) > 0)
    distance = threat.distance(tip, lanes.origin)
    nearer = ~inside & beyond & (distance < lanes.reach)
    return replace(
        new,
        near=where(nearer, tip, lanes.near),
        reach=torch.where(nearer, distance, lanes.reach),
        right=new.right | ~counts,
        margin=torch.where(counts, new.margin, math.inf),
    )


def _inside(threat: ThreatModel, x: Tensor, origin: Tensor) -> Tensor:
    """[b] whether x lies in the ball, up to rounding."""
    return threat.distance(x, origin) <= threat.epsilon * (1 + 1e-6) + 1e-7


def minimal_distance(
    attack: FAB | TargetedFAB, model: Network, images: Images, labels: Labels, seed: int = 0, search: int = 3
) -> PerImage:
    """[B] how far the nearest fooling image found is, under the norm of the threat: 0 where the clean image is wrong
    already, infinity where none was found.

    The paper's algorithm 1: every point reached is looked at, and every climb runs to its end; the radius of the threat
    only sets the random starts. `search` looks at the end go along the line from the clean image, to where the margin
    should vanish by linear interpolation (the paper's final search). Raises ValueError as the attack does.
    """
    _norm_of(attack)
    board, view = Board(images, labels, clean_logits(model, images, labels, len(images)), seed), View(model)
    rows = board.standing()
    found = torch.zeros_like(board.margin)
    if len(rows):
        with view.ready():
            found[rows] = _nearest(attack, view, board, rows, search)
    return found


def _nearest(attack: FAB | TargetedFAB, view: View, board: Board, rows: Tensor, search: int) -> Tensor:
    """[b] the distances of these rows."""
    best = board.fresh(attack, rows, torch.zeros_like(rows))
    for run in range(attack.runs(board.classes)):
        lanes = board.fresh(attack, rows, torch.full_like(rows, run))
        lanes = replace(lanes, near=best.near, reach=best.reach)
        for _ in range(attack.steps):
            lanes = _walked(attack, view, lanes)
        best = lanes
    near = _searched(view, best, board.margin[rows], search)
    return torch.where(best.reach.isfinite(), threat_of(attack).distance(near, best.origin), math.inf)


def _walked(attack: FAB | TargetedFAB, view: View, lanes: FABLanes) -> FABLanes:
    """A step of algorithm 1: the linearisation at x, the step, a look at what it reaches."""
    at = attack.look(view, lanes.x, lanes.labels, lanes.target)
    tip = _stepped(attack, replace(lanes, loss=at.value, gradient=at.gradient))
    fooled = view.logits(tip).argmax(1) != lanes.labels
    distance = threat_of(attack).distance(tip, lanes.origin)
    nearer = fooled & (distance < lanes.reach)
    return replace(
        lanes,
        x=where(fooled, _drawn_back(attack, tip, lanes.origin), tip),
        near=where(nearer, tip, lanes.near),
        reach=torch.where(nearer, distance, lanes.reach),
    )


def _searched(view: View, lanes: FABLanes, margin: Tensor, search: int) -> Tensor:
    """The nearest points, brought towards the clean image (of that margin [b]) by `search` looks along the secant."""
    low, high = torch.zeros_like(margin), torch.ones_like(margin)
    below, above = margin, -Margin()(view.logits(lanes.near), lanes.labels)
    for _ in range(search):
        t = low + (high - low) * below / (below - above).clamp_min(1e-12)
        logits = view.logits(torch.lerp(lanes.origin, lanes.near, t.reshape(-1, 1, 1, 1)))
        value, fooled = -Margin()(logits, lanes.labels), logits.argmax(1) != lanes.labels
        low, below = torch.where(fooled, low, t), torch.where(fooled, below, value)
        high, above = torch.where(fooled, t, high), torch.where(fooled, value, above)
    return torch.lerp(lanes.origin, lanes.near, high.reshape(-1, 1, 1, 1))
