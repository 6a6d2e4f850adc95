"""What attacks of many steps share: images climb in lanes, all lanes look at the network at once, and a lane that ends
(fooled, or out of steps) is taken by the next image that waits, so that batches stay full.

Every draw belongs to its image, so verdicts do not depend on batch size or order (apart from the last bits that a
network's own kernels change with the shape of the batch).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gambeson.randomness import image_keys
from gambeson.robustness.attack_losses import HasThreat, Margin
from gambeson.robustness.views import View
from gambeson.types import Logits


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The images under attack; every field has one entry per image. An attack's own memory is a subclass."""

    row: Tensor  # [b] int64 the image's place on the board
    key: Tensor  # [b] int64 the image's random key: draws are uniform(key, purpose, shape, counter=run)
    origin: Tensor  # [b, C, H, W] the clean image
    labels: Tensor  # [b] int64
    target: Tensor  # [b] int64 the class that a targeted loss pulls to
    run: Tensor  # [b] int64 which climb of this image, from 0: restarts and targets
    step: Tensor  # [b] int64 points of this climb looked at so far; 0: `x` is a start that nobody has looked at
    x: Tensor  # [b, C, H, W] the point last looked at
    loss: Tensor  # [b] loss at x
    gradient: Tensor  # [b, C, H, W] its gradient
    right: Tensor  # [b] bool whether x is still classified as its label, or does not count (outside the ball)
    margin: Tensor  # [b] logit of the label minus the largest other one, at x; infinity where x does not count

    @property
    def first(self) -> Tensor:
        """[b] whether the point to look at next is the climb's first."""
        return self.step == 0

    def only(self, keep: Tensor) -> Any:
        """The images where `keep` [b] is True."""
        return replace(self, **{f.name: getattr(self, f.name)[keep] for f in fields(self)})

    def joined(self, more: Lanes) -> Any:
        """These and `more` images of the same attack behind them."""
        pairs = {f.name: (getattr(self, f.name), getattr(more, f.name)) for f in fields(self)}
        return replace(self, **{name: torch.cat(pair) for name, pair in pairs.items()})

    def seen(self, x: Tensor, logits: Logits, **changes: Tensor) -> Any:
        """Moved to x, where the network answered `logits`: step, verdict and margin follow, the rest by `changes`.

        A lane where the answer is not finite stays where it was, with what it knew there: such a point neither fools
        nor counts.
        """
        known = logits.isfinite().all(1)
        margin = torch.where(known, -Margin()(logits, self.labels), math.inf)
        right = (logits.argmax(1) == self.labels) | ~known
        if not known.all():
            x = where(known, x, self.x)
            changes = {name: where(known, value, getattr(self, name)) for name, value in changes.items()}
        return replace(self, x=x, step=self.step + 1, right=right, margin=margin.to(self.loss), **changes)


def grown(lanes: Lanes, kind: type[Lanes], **memory: Tensor) -> Any:
    """The lanes as `kind`, a subclass with a memory of its own."""
    return kind(**{f.name: getattr(lanes, f.name) for f in fields(Lanes)}, **memory)


def where(choose: Tensor, this: Tensor, that: Tensor) -> Tensor:
    """`this` for the images chosen [b], `that` for the others."""
    return torch.where(choose.reshape(-1, *[1] * (this.dim() - 1)), this, that)


@runtime_checkable
class Pursuit(HasThreat, Protocol):
    """An attack of many steps, one lane per image."""

    def runs(self, classes: int) -> int:
        """How many climbs an image gets, one after another, until one of them fools the network."""
        ...

    def aim(self, ranked: Tensor, run: Tensor) -> Tensor:
        """[b] the class each climb pulls to; `ranked` [b, K - 1] are the other classes, most likely first."""
        ...

    def begin(self, lanes: Lanes) -> Lanes:
        """Fresh lanes (step 0) at their starts, with the attack's memory: a subclass of Lanes."""
        ...

    def advance(self, view: View, lanes: Any) -> Any:
        """Every lane one point further; a fresh lane looks at its start."""
        ...

    def finished(self, lanes: Any) -> Tensor:
        """[b] bool whether a climb has come to its end."""
        ...


@runtime_checkable
class Patient(Protocol):
    """An attack that may want to see a climb to its end though the network was fooled on the way."""

    @property
    def patient(self) -> bool: ...


class Board:
    """What is known of each image [B]: whether it still stands, the best point met, and what it has cost.

    `right` is the verdict so far; `margin` the smallest margin met inside the ball, `best` the image it was met at (a
    fooling one, if any was met). `logits` are those of the clean images.
    """

    def __init__(self, images: Tensor, labels: Tensor, logits: Logits, seed: int) -> None:
        self.images, self.labels, self.best = images, labels, images.clone()
        self.keys = image_keys(images, labels, seed)
        self.right = logits.argmax(1) == labels
        self.margin = -Margin()(logits, labels)
        others = logits.scatter(1, labels[:, None], -math.inf)
        self.ranked = others.argsort(dim=1, descending=True, stable=True)[:, :-1]
        self.queries = torch.zeros_like(labels)
        self.seconds = torch.zeros(len(labels), dtype=torch.float64)

    @property
    def classes(self) -> int:
        """K."""
        return self.ranked.shape[1] + 1

    def standing(self) -> Tensor:
        """The rows not fooled yet."""
        return self.right.nonzero().flatten()

    def fresh(self, attack: Pursuit, rows: Tensor, run: Tensor) -> Any:
        """Lanes at the start of climb `run` [b] of these rows [b]."""
        origin, labels = self.images[rows], self.labels[rows]
        none = torch.zeros_like(self.margin[rows])
        lanes = Lanes(
            row=rows,
            key=self.keys[rows],
            origin=origin,
            labels=labels,
            target=attack.aim(self.ranked[rows], run),
            run=run,
            step=torch.zeros_like(run),
            x=origin,
            loss=none - math.inf,
            gradient=torch.zeros_like(origin),
            right=torch.ones_like(labels, dtype=torch.bool),
            margin=none + math.inf,
        )
        return attack.begin(lanes)

    def note(self, lanes: Lanes) -> None:
        """Writes down what these lanes have met."""
        fooled = ~lanes.right & self.right[lanes.row]
        better = fooled | (lanes.margin < self.margin[lanes.row])
        rows = lanes.row[better]
        self.best[rows], self.margin[rows] = lanes.x[better], lanes.margin[better]
        self.right[lanes.row] &= lanes.right

    def charge(self, rows: Tensor, queries: int, seconds: float) -> None:
        """Adds what one step of these rows has cost; time is shared out evenly."""
        self.queries[rows] += queries
        self.seconds[rows.cpu()] += seconds / max(len(rows), 1)

    TOLD = ("best", "right", "margin", "queries", "seconds")

    def save(self) -> dict[str, Tensor]:
        """Everything that a pursuit changes."""
        return {name: getattr(self, name) for name in self.TOLD}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Takes up what `save` gave, from whatever device."""
        for name in self.TOLD:
            setattr(self, name, saved[name].to(getattr(self, name).device))


@dataclass(kw_only=True)
class Chase:
    """One attack's pursuit of the images of a board: the lanes, and who waits for one."""

    attack: Pursuit
    view: View
    board: Board
    lanes: Any  # the working batch; None before the first image
    waiting: deque[tuple[int, int]]  # (row, run): who gets the next free lane
    batch_size: int
    climbed: int = 0  # climbs that those who wait have behind them

    @staticmethod
    def start(attack: Pursuit, view: View, board: Board, batch_size: int) -> Chase:
        """Every image that still stands waits for its first climb."""
        waiting = deque((row, 0) for row in board.standing().tolist())
        return Chase(attack=attack, view=view, board=board, lanes=None, waiting=waiting, batch_size=batch_size)

    @property
    def going(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting) or (self.lanes is not None and len(self.lanes.row) > 0)

    @property
    def left(self) -> int:
        """How many images are waiting or in a lane."""
        return len(self.waiting) + (0 if self.lanes is None else len(self.lanes.row))

    @property
    def weight(self) -> float:
        """The work left, in whole images: those in a lane count by the climbs they still have to make."""
        runs = self.attack.runs(self.board.classes)
        here = 0.0 if self.lanes is None else len(self.lanes.row) - int(self.lanes.run.sum()) / runs
        return here + len(self.waiting) - self.climbed / runs

    def advance(self) -> None:
        """Free lanes are taken, every lane looks once, and those that end leave."""
        begun = time.perf_counter()
        self._fill()
        asked = self.view.asked
        lanes = self.attack.advance(self.view, self.lanes)
        lanes = replace(lanes, right=self.view.confirm(lanes.x, lanes.labels, lanes.right))
        self.board.note(lanes)
        self.board.charge(lanes.row, self.view.asked - asked, time.perf_counter() - begun)
        self.lanes = self._leave(lanes)

    def _fill(self) -> None:
        free = self.batch_size - (0 if self.lanes is None else len(self.lanes.row))
        if not (self.waiting and free):
            return
        entering = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        self.climbed -= sum(run for _, run in entering)
        rows, runs = torch.tensor(entering, device=self.board.labels.device).unbind(1)
        fresh = self.board.fresh(self.attack, rows, runs)
        self.lanes = fresh if self.lanes is None else self.lanes.joined(fresh)

    def _leave(self, lanes: Any) -> Any:
        """The lanes that go on; an image whose climb ended standing waits, first in line, for its next one."""
        stands = self.board.right[lanes.row]
        finished = self.attack.finished(lanes)
        ended = finished & stands
        last = self.attack.runs(self.board.classes) - 1
        pairs = zip(lanes.row[ended].tolist(), lanes.run[ended].tolist(), strict=True)
        again = [(row, run + 1) for row, run in pairs if run < last]
        self.waiting.extendleft(reversed(again))
        self.climbed += sum(run for _, run in again)
        patient = isinstance(self.attack, Patient) and self.attack.patient
        going = ~finished if patient else stands & ~finished
        return lanes if going.all() else lanes.only(going)

    def save(self) -> dict[str, Any]:
        """Plain tensors and numbers, enough to go on to the bit."""
        lanes = None if self.lanes is None else {f.name: getattr(self.lanes, f.name) for f in fields(self.lanes)}
        return {"lanes": lanes, "waiting": list(self.waiting), "board": self.board.save()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes up what `save` gave."""
        self.board.restore(saved["board"])
        self.waiting = deque((row, run) for row, run in saved["waiting"])
        self.climbed = sum(run for _, run in self.waiting)
        if saved["lanes"] is not None:
            nobody = torch.zeros(0, dtype=torch.int64, device=self.board.labels.device)
            lanes = {name: part.to(nobody.device) for name, part in saved["lanes"].items()}
            self.lanes = replace(self.board.fresh(self.attack, nobody, nobody), **lanes)


def pursue(
    attack: Pursuit,
    view: View,
    board: Board,
    batch_size: int,
    each: Callable[[Chase], None] | None = None,
    saved: dict[str, Any] | None = None,
) -> None:
    """The attack on every image of the board that still stands; `each` is called after every step of the lanes.

    `saved` goes on where another pursuit of the same images stopped (`Chase.save`).
    """
    chase = Chase.start(attack, view, board, batch_size)
    if saved is not None:
        chase.restore(saved)
    with view.ready():
        while chase.going:
            chase.advance()
            if each is not None:
                each(chase)


def looked_up(table: Sequence[int | float], index: Tensor) -> Tensor:
    """[b] entries of a small table; `index` [b] int64."""
    return torch.tensor(table, device=index.device)[index]
