"""An image under attack at one radius after another: the prediction, the attack step by step, and the smallest radius
of the slider that was found to break it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from gambeson.robustness.attack_losses import Margin
from gambeson.robustness.attacks import APGD
from gambeson.robustness.inputs import clean_logits, logits_of
from gambeson.robustness.pursuit import Board, Chase
from gambeson.robustness.square import Square
from gambeson.robustness.views import View
from gambeson.threat import Norm, ThreatModel
from gambeson.tryout.desk import Line, Work
from gambeson.tryout.pictures import magnified, picture_of
from gambeson.tryout.subject import Tried
from gambeson.types import Images, Logits

TICKS, MULTIPLE = 32, 4
"""Positions of the slider above 0, and the last one's radius in multiples of the threat's."""
USUAL: dict[Norm, float] = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
"""Radii that are usual for each norm, where the classifier says nothing about it."""
TOP = 5
"""Classes that are shown."""
_KEPT = 4
"""Images and norms whose attacks are remembered."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an attack at one position of the slider came to."""

    tick: int
    broken: bool  # whether the answer changed, as a last look confirms
    steps: int  # made until then, or all of them
    of: int
    image: Images  # [1, C, H, W] the fooling image, or the one that came closest
    logits: Logits  # [1, K] the network's answer to it
    distance: float  # from the clean image, in the threat's norm


def grid(tried: Tried, norm: Norm) -> float:
    """The radius of one position of the slider."""
    own = tried.threat.epsilon if tried.threat.norm == norm else USUAL[norm]
    return own * MULTIPLE / TICKS


class Attacker:
    """Attacks images of one classifier: `answer` is all that a page shows; attacks are remembered. For one thread.

    The label is the network's own answer to the clean image: an attack that changes it has broken the prediction.
    """

    def __init__(self, tried: Tried, steps: int = 40, queries: int = 500, seed: int = 0) -> None:
        self.tried, self.seed = tried, seed
        self.attack = APGD(steps=steps, loss=Margin()) if tried.gradients else Square(queries=queries)
        self._known: OrderedDict[tuple[bytes, str], dict[int, Outcome]] = OrderedDict()

    @property
    def steps(self) -> int:
        """Steps of one attack at one radius."""
        return self.attack.steps if isinstance(self.attack, APGD) else self.attack.queries - 1

    def answer(self, image: Images, norm: Norm, tick: int) -> Work:
        """Lines for [1, C, H, W]: {"clean"}, {"attack"} while it climbs and at its end, {"smallest"}, {"done"}."""
        image = image.to(self.tried.device)
        logits = clean_logits(self.tried.network, image, logits_of(self.tried.network, image).argmax(1), 1)
        yield {"clean": self._answer_line(logits)}
        known = self._remembered(image, norm)
        if tick > 0:
            yield from self._shown(image, logits, norm, tick, known)
        else:
            none = {"tick": 0, "final": True, "none": True}
            yield {"attack": none | self._pictures(image, image) | self._answer_line(logits)}
        for searched in self.search(image, logits, norm, known):
            yield None if searched is None else {"smallest": searched}
        yield {"done": True}

    def _shown(self, image: Images, logits: Logits, norm: Norm, tick: int, known: dict[int, Outcome]) -> Work:
        told = 0.0
        if tick not in known:
            for step in self.climb(image, logits, norm, tick):
                if isinstance(step, Outcome):
                    known[tick] = step
                elif time.monotonic() - told > 0.05:
                    told = time.monotonic()
                    yield {"attack": {"tick": tick, "steps": step, "of": self.steps, "final": False}}
                else:
                    yield None
        yield {"attack": self._line(image, norm, tick, self._best(known, tick))}

    def climb(self, image: Images, logits: Logits, norm: Norm, tick: int) -> Generator[int | Outcome]:
        """Attacks at one position of the slider: yields the steps made after each, then the outcome."""
        threat = ThreatModel(norm=norm, epsilon=tick * grid(self.tried, norm))
        attack, view, label = replace(self.attack, threat=threat), View(self.tried.network), logits.argmax(1)
        board = Board(image, label, logits, self.seed)
        chase = Chase.start(attack, view, board, 1)
        while chase.going:
            with view.ready():
                chase.advance()
            yield self._made(board)
        answer = logits_of(self.tried.network, board.best)
        yield Outcome(
            tick=tick,
            broken=bool(answer.argmax(1) != label),
            steps=self._made(board),
            of=self.steps,
            image=board.best,
            logits=answer,
            distance=float(threat.distance(board.best, image)),
        )

    def _made(self, board: Board) -> int:
        """Steps so far: looks without the start's (under L1 APGD starts three times)."""
        return min(max(int(board.queries[0]) - 1, 0), self.steps)

    def search(self, image: Images, logits: Logits, norm: Norm, known: dict[int, Outcome]) -> Iterator[Line | None]:
        """The smallest position found to break the answer: the last one first, then by halves. Adds to `known`."""
        while (tick := _next_tick(known)) is not None:
            yield self._search_line(norm, known, final=False)
            for step in self.climb(image, logits, norm, tick):
                if isinstance(step, Outcome):
                    known[tick] = step
                else:
                    yield None
        yield self._search_line(norm, known, final=True)

    def _search_line(self, norm: Norm, known: dict[int, Outcome], final: bool) -> Line:
        tick = smallest(known)
        return {
            "tick": tick,
            "epsilon": None if tick is None else tick * grid(self.tried, norm),
            "final": final,
            "last": TICKS * grid(self.tried, norm),
        }

    def _remembered(self, image: Images, norm: Norm) -> dict[int, Outcome]:
        key = (image.cpu().numpy().tobytes(), norm)
        known = self._known.setdefault(key, {})
        self._known.move_to_end(key)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return known

    def _best(self, known: dict[int, Outcome], tick: int) -> Outcome:
        """What is known at a position: its own attack, or one that broke the answer in a smaller ball, inside this."""
        own, least = known[tick], smallest(known)
        return own if own.broken or least is None or least > tick else known[least]

    def _line(self, image: Images, norm: Norm, tick: int, found: Outcome) -> Line:
        facts = {"tick": tick, "found_at": found.tick, "steps": found.steps, "of": found.of, "broken": found.broken}
        facts |= {"final": True, "distance": float(f"{found.distance:.5g}")}
        return facts | self._pictures(image, found.image) | self._answer_line(found.logits)

    def _pictures(self, image: Images, attacked: Images) -> Line:
        difference, times = magnified(image, attacked)
        return {"attacked": picture_of(attacked), "difference": difference, "times": times}

    def _answer_line(self, logits: Logits) -> Line:
        """The most likely classes by name with their softmax, and the first one."""
        shares: Tensor = logits[0].double().softmax(0)
        top = shares.topk(min(TOP, len(shares)))
        names = [self.tried.class_names[k] for k in top.indices.tolist()]
        return {"classes": [[name, p] for name, p in zip(names, top.values.tolist(), strict=True)]}


def smallest(known: dict[int, Outcome]) -> int | None:
    """The smallest position that is known to break the answer."""
    return min((tick for tick, outcome in known.items() if outcome.broken), default=None)


def _next_tick(known: dict[int, Outcome]) -> int | None:
    """Where a search by halves looks next; None where it is at its end."""
    high = smallest(known)
    if high is None:
        return None if TICKS in known else TICKS
    low = max((tick for tick, outcome in known.items() if not outcome.broken and tick < high), default=0)
    return (low + high) // 2 if high - low > 1 else None


def about(attacker: Attacker) -> str:
    """The attack, in words."""
    if isinstance(attacker.attack, APGD):
        return (
            f"APGD (Croce & Hein 2020) on the margin of the logits, {attacker.steps} steps from one random start, "
            "white box: it follows the network's gradient"
        )
    return (
        f"Square (Andriushchenko et al. 2020), {attacker.steps + 1} queries, black box: this classifier gives no "
        "gradients, so nothing stronger can be tried here"
    )
