"""The Square attack: random search by square windows, from the network's answers alone (Andriushchenko et al. 2020).

Under L1 it is the variant of Croce & Hein 2021 ("Mind the Box"). Every image has a window of its own size and place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gambeson.errors import require
from gambeson.randomness import uniform
from gambeson.robustness.attack_losses import Network, threat_of
from gambeson.robustness.attacks import chase
from gambeson.robustness.pursuit import Lanes, grown, looked_up, where
from gambeson.robustness.views import View
from gambeson.threat import Norm, ThreatModel
from gambeson.types import Images, Labels

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after each of which the window's share of the image halves (section 3.1)."""
POWER = {"l2": 2, "l1": 1}
"""Norm -> exponent of the mass that windows hand on: the sum of |delta| ** power."""


@dataclass(frozen=True, kw_only=True)
class SquareLanes(Lanes):
    """Lanes with the memory of random search."""

    best_x: Tensor  # [b, C, H, W] the point of largest margin loss of this climb
    best_loss: Tensor  # [b]


def window_sides(norm: Norm, height: int, width: int, p_init: float) -> list[int]:
    """The window's side in pixels after 0, 1, .. 9 halvings of the share p of the image that it covers.

    linf: at least 1. l2, l1: odd and at least 3, since a window holds two centres. Never larger than the image.
    """
    sides = [round(math.sqrt(p_init / 2**k * height * width)) for k in range(len(HALVINGS) + 1)]
    sides = [max(s, 1) if norm == "linf" else max(s, 3) // 2 * 2 + 1 for s in sides]
    return [min(s, height, width) for s in sides]


def halvings(asked: Tensor, horizon: int) -> Tensor:
    """[b] how often the window's share has halved after `asked` [b] candidates, the schedule stretched to `horizon`."""
    return torch.bucketize(asked * 10000 // horizon, torch.tensor(HALVINGS, device=asked.device))


def bump(height: int, width: int, power: int) -> Tensor:
    """[height, width] the published eta, squares around one centre: sum over j from the Chebyshev distance to it to n
    of (j + 1) ** -2 under L2, ** -4 under L1 (equation 3); scaled to mass 1."""
    rows, columns = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (height, width))
    distance = torch.maximum(rows.abs()[:, None], columns.abs()[None, :]).long()
    terms = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** -(4.0 if power == 1 else 2.0)
    return _unit(terms.flip(0).cumsum(0).flip(0)[distance], power)


def eta(side: int, power: int) -> Tensor:
    """[side, side] an upper bump of plus and a lower bump of minus, of mass 1 together (figure 2, equation 4)."""
    upper = side // 2
    halves = [bump(upper, side, power)] if upper else []
    return _unit(torch.cat([*halves, -bump(side - upper, side, power)]), power)


def _unit(x: Tensor, power: int) -> Tensor:
    """The last two dimensions scaled to mass 1; zeros stay."""
    return x / mass(x, power).clamp_min(1e-12)[..., None, None] ** (1 / power)


def mass(x: Tensor, power: int) -> Tensor:
    """[..., H, W] -> [...] the sum of |x| ** power, in float64: whatever the zeros around a window, the same number."""
    return (x.abs() if power == 1 else x.square()).sum((-2, -1), dtype=torch.float64)


@lru_cache(maxsize=16)
def _etas(sides: tuple[int, ...], power: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[2, len(sides), S, S] every eta, and every one turned on its side, in the corner of a square of zeros."""
    most = max(sides)
    upright = torch.stack([F.pad(eta(s, power), (0, most - s, 0, most - s)) for s in sides])
    return torch.stack([upright, upright.mT]).to(device, dtype)


@dataclass(frozen=True)
class Window:
    """A square per image, seen through boxes of one size [n, n] that lie in the image and hold the squares."""

    rows: Tensor  # [b, n] the box's rows, counted from the top of the square
    columns: Tensor  # [b, n]
    side: Tensor  # [b] of the square
    index: Tensor  # [b, 1, n * n] places of the box in the flattened image

    @staticmethod
    def at(draws: Tensor, side: Tensor, height: int, width: int) -> Window:
        """Squares of `side` [b], each placed in the image by two uniform draws [b, 2]."""
        n = int(side.max())
        extent = torch.tensor([height, width], device=side.device)
        corner = (draws * (extent - side[:, None] + 1)).long()
        first = torch.minimum(corner, extent - n)
        places = first[:, :, None] + torch.arange(n, device=side.device)
        rows, columns = (places - corner[:, :, None]).unbind(1)
        index = places[:, 0, :, None] * width + places[:, 1, None, :]
        return Window(rows, columns, side, index.flatten(1)[:, None])

    @cached_property
    def inside(self) -> Tensor:
        """[b, 1, n, n] which pixels of the box are of the square."""
        rows, columns = ((at >= 0) & (at < self.side[:, None]) for at in (self.rows, self.columns))
        return (rows[:, :, None] & columns[:, None, :])[:, None]

    def take(self, images: Tensor) -> Tensor:
        """[b, C, H, W] -> [b, C, n, n] what the squares hold, and 0 around them."""
        flat = images.flatten(2)
        box = flat.gather(2, self.index.expand(-1, flat.shape[1], -1))
        return box.unflatten(2, self.inside.shape[2:]) * self.inside

    def add(self, images: Tensor, values: Tensor) -> None:
        """Adds the values [b, C, n, n], 0 outside the squares, to contiguous images [b, C, H, W], in place."""
        flat = images.view(*images.shape[:2], -1)
        flat.scatter_add_(2, self.index.expand(-1, flat.shape[1], -1), values.flatten(2))

    def lift(self, images: Tensor) -> Tensor:
        """As `take`, and leaves zeros in the squares, in place."""
        held = self.take(images)
        self.add(images, -held)
        return held

    def shape(self, etas: Tensor, level: Tensor, turned: Tensor) -> Tensor:
        """[b, 1, n, n] the eta of each square's level, turned or not, and 0 around it."""
        rows, columns = (at.clamp(0, etas.shape[-1] - 1) for at in (self.rows, self.columns))
        found = etas[turned.long()[:, None, None], level[:, None, None], rows[:, :, None], columns[:, None, :]]
        return found[:, None] * self.inside


def signs(draws: Tensor, like: Tensor) -> Tensor:
    """-1 or 1 for uniform draws, in the precision of `like`."""
    return (draws >= 0.5).to(like) * 2 - 1


def stripes(threat: ThreatModel, origin: Tensor, key: Tensor, run: Tensor) -> Tensor:
    """The linf start: columns of one pixel, each channel at one side of the ball (section 3.2)."""
    _, channels, _, width = origin.shape
    draws = uniform(key, "Square/start", (channels, 1, width), run)
    return threat.project(origin + threat.epsilon * signs(draws, origin), origin)


def tiles(threat: ThreatModel, origin: Tensor, key: Tensor, run: Tensor) -> Tensor:
    """The l2 and l1 start: a grid of about 5 x 5 etas of random sign and turn that fills the ball (section 3.3)."""
    _, channels, height, width = origin.shape
    side = max(min(height, width) // 5, 1)
    down, across, power = height // side, width // side, POWER[threat.norm]
    draws = uniform(key, "Square/start", (channels + 1, down, across), run)
    shape = _etas((side,), power, origin.device, origin.dtype)[(draws[:, -1] >= 0.5).long(), 0]
    grid = shape[:, None] * signs(draws[:, :-1], origin)[..., None, None]
    grid = grid.transpose(3, 4).reshape(len(origin), channels, down * side, across * side)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta = F.pad(grid, (left, width - across * side - left, top, height - down * side - top))
    if threat.norm == "l2":
        delta = delta * (threat.epsilon / delta.flatten(1).norm(dim=1))[:, None, None, None]
    return threat.project(origin + delta, origin)


@dataclass(frozen=True)
class Draw:
    """What one candidate of each image is made from."""

    level: Tensor  # [b] int64 halvings so far
    side: Tensor  # [b] int64 of the window
    places: Tensor  # [b, 4] uniform: where two windows lie
    turn: Tensor  # [b] uniform: which way an eta stands
    channels: Tensor  # [b, C] uniform: the sign of each channel


def flipped_window(threat: ThreatModel, lanes: SquareLanes, sides: tuple[int, ...], draw: Draw) -> Tensor:
    """The linf candidate: a window at one side of the ball per channel, which is where a step of 2 epsilon ends."""
    origin, x = lanes.origin, lanes.best_x.clone(memory_format=torch.contiguous_format)
    window = Window.at(draw.places[:, :2], draw.side, *origin.shape[2:])
    window.lift(x)
    step = threat.epsilon * signs(draw.channels, origin)[:, :, None, None]
    window.add(x, (window.take(origin) + step).clamp_(0, 1) * window.inside)
    return x


def moved_mass(threat: ThreatModel, lanes: SquareLanes, sides: tuple[int, ...], draw: Draw) -> Tensor:
    """The l2 and l1 candidate: a second window's mass, and what the ball has left, go into the first, where an eta is
    added to the direction there (algorithm 3). Under L1 that overshoots on purpose, and the ball cuts it back."""
    power, origin, channels = POWER[threat.norm], lanes.origin, lanes.origin.shape[1]
    to, off = (Window.at(draw.places[:, i : i + 2], draw.side, *origin.shape[2:]) for i in (0, 2))
    delta = (lanes.best_x - origin).contiguous()
    left = threat.epsilon**power - _whole(delta, power)[:, None]
    old = to.lift(delta)
    here = mass(old, power)
    both = here + mass(off.lift(delta), power)
    shape = to.shape(_etas(sides, power, origin.device, origin.dtype), draw.level, draw.turn >= 0.5)
    fresh = shape * signs(draw.channels, origin)[:, :, None, None] + old / _root(here, power, origin)
    goal = left / channels + both if power == 2 else (left.clamp_min(0) / channels + both) * channels
    to.add(delta, fresh * (_root(goal, power, origin) / _root(mass(fresh, power), power, origin)))
    if threat.norm == "l2":
        return delta.add_(origin).clamp_(0, 1)
    return threat.project(delta.add_(origin), origin)


def _whole(delta: Tensor, power: int) -> Tensor:
    """[b] the mass of whole images; their size is fixed, so that their own precision sums it the same every time."""
    flat = delta.flatten(1)
    return flat.abs().sum(1) if power == 1 else flat.norm(dim=1).square()


def _root(total: Tensor, power: int, like: Tensor) -> Tensor:
    """[b, C] masses -> [b, C, 1, 1] norms, never zero."""
    return (total.clamp_min(0) ** (1 / power) + 1e-12).to(like)[:, :, None, None]


Start = Callable[[ThreatModel, Tensor, Tensor, Tensor], Tensor]
Move = Callable[[ThreatModel, SquareLanes, tuple[int, ...], Draw], Tensor]
SEARCH: dict[str, tuple[Start, Move]] = {
    "linf": (stripes, flipped_window),
    "l2": (tiles, moved_mass),
    "l1": (tiles, moved_mass),
}
"""Norm -> how a search starts and moves."""


@dataclass(frozen=True, kw_only=True)
class Square:
    """Random search on the margin: a random change of a square window is kept if the margin falls (algorithm 1)."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    queries: int = 5000  # looks at the network in each restart, the start counted
    restarts: int = 1  # random starts; later ones only see the images still standing
    p_init: float = 0.8  # share of the image that the first windows cover
    horizon: int | None = None  # queries over which windows shrink; none: `queries`; standard AutoAttack has 10,000

    def __post_init__(self) -> None:
        require(self.queries >= 1, "Square queries", "at least 1", self.queries)
        require(self.restarts >= 1, "Square restarts", "at least 1", self.restarts)
        require(0 < self.p_init <= 1, "Square p_init", "above 0, at most 1", self.p_init)
        require(self.horizon is None or self.horizon >= 1, "Square horizon", "None or at least 1", self.horizon)

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]; as PGD, but the network needs no gradient."""
        return chase(self, model, images, labels, seed).best

    def runs(self, classes: int) -> int:
        """One search per restart."""
        return self.restarts

    def aim(self, ranked: Tensor, run: Tensor) -> Tensor:
        """The most likely other class, though the search looks at all of them."""
        return ranked[:, 0]

    def begin(self, lanes: Lanes) -> SquareLanes:
        """At the norm's random start."""
        threat = threat_of(self)
        start = SEARCH[threat.norm][0](threat, lanes.origin, lanes.key, lanes.run)
        return grown(lanes, SquareLanes, best_x=start, best_loss=lanes.loss)

    def advance(self, view: View, lanes: SquareLanes) -> SquareLanes:
        """One candidate of every image, or a look at its start."""
        threat, (height, width) = threat_of(self), lanes.origin.shape[2:]
        sides = tuple(window_sides(threat.norm, height, width, self.p_init))
        candidate = SEARCH[threat.norm][1](threat, lanes, sides, self._draw(lanes, sides))
        x = where(lanes.first, lanes.best_x, candidate) if lanes.first.any() else candidate
        new = lanes.seen(x, view.logits(x))
        loss = -new.margin
        better = loss > lanes.best_loss
        best_x, best_loss = where(better, x, lanes.best_x), torch.where(better, loss, lanes.best_loss)
        return replace(new, loss=loss, best_x=best_x, best_loss=best_loss)

    def finished(self, lanes: Lanes) -> Tensor:
        """After `queries` looks."""
        return lanes.step >= self.queries

    def _draw(self, lanes: SquareLanes, sides: tuple[int, ...]) -> Draw:
        """The draws of every lane's next candidate; those of a fresh lane are not used."""
        level = halvings((lanes.step - 1).clamp_min(0), self.horizon or self.queries)
        counter = lanes.run * self.queries + lanes.step
        draws = uniform(lanes.key, "Square", (5 + lanes.origin.shape[1],), counter)
        places, turn, channels = draws.split([4, 1, lanes.origin.shape[1]], 1)
        return Draw(level, looked_up(sides, level), places, turn[:, 0], channels)
