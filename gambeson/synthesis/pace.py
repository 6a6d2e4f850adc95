"""How fast a stage's workers are: images a second of each, stragglers by name, and what the whole will cost.

After the first items a line says what all images will take at their rate; from then on, every now and then, one says
how fast each worker is. Rates are those of a worker's last items, of its own clock, without what it waited for.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gambeson.fleet import Aloud, Done
from gambeson.types import unheard

TRIAL = 3
"""Items from which the cost of all is told."""
EVERY = 10.0
"""Seconds between two lines about the workers."""
LAST = 8
"""Items of a worker that its rate is taken over."""
SLOW = 0.5
"""A worker below this share of the median rate is a straggler."""
NAMED = 16
"""Workers that a line names at most, the slowest first."""


@dataclass
class Hand:
    """The last items of a worker: images and seconds of each, and when the last one came."""

    items: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=LAST))
    seen: float = 0.0

    @property
    def rate(self) -> float:
        """Images a second."""
        images, seconds = (sum(column) for column in zip(*self.items, strict=True))
        return images / max(seconds, 1e-9)

    def quiet(self, now: float) -> bool:
        """Whether it has not been heard of for so long that it is gone, or as good as that."""
        longest = max(seconds for _, seconds in self.items)
        return now - self.seen > max(60.0, 10 * longest)


@dataclass
class Pace:
    """Watches the items of a stage that are done, and says how it goes."""

    stage: str
    images: int  # of the whole stage
    done: int  # of these, done already
    unit: str = "core"  # what an hour is told of: core, GPU
    say: Callable[[str], None] = unheard
    clock: Callable[[], float] = time.monotonic
    hands: dict[str, Hand] = field(default_factory=dict)
    first: list[tuple[int, float]] = field(default_factory=list)
    told: float | None = None

    def watch(self, items: Iterator[Done], images: Callable[[Done], int]) -> Iterator[Done]:
        """The items as they come; what they take is noted, and told."""
        for item in items:
            self.note(item.worker, images(item), item.seconds)
            yield item
        if len(self.hands) > 1:
            self._say(self.clock())

    def note(self, worker: str, images: int, seconds: float) -> None:
        """An item of so many images is done."""
        now, self.done = self.clock(), self.done + images
        hand = self.hands.setdefault(worker, Hand())
        hand.items.append((images, seconds))
        hand.seen = now
        if len(self.first) < TRIAL:
            self.first.append((images, seconds))
            if len(self.first) == TRIAL and self.done < self.images:
                self.say(Aloud(self.estimate()))
        self.told = now if self.told is None else self.told
        if now - self.told >= EVERY:
            self._say(now)

    def estimate(self) -> str:
        """What all images take at the rate of the first items, and how long the rest will."""
        images, seconds = (sum(column) for column in zip(*self.first, strict=True))
        hours, left = self.images * seconds / images / 3600, (self.images - self.done) * seconds / images
        workers = max(len(self.hands), 1)
        return (
            f"estimate: {self.images:,} images: about {shown_hours(hours)} {self.unit}-hours at the measured rate "
            f"({images / seconds:,.3g} images/s a worker); {span(left / workers)} left with {workers} "
            f"worker{'s' if workers > 1 else ''}"
        )

    def rates(self, now: float) -> dict[str, float]:
        """Images a second of each worker that is heard of, the slowest first."""
        found = {name: hand.rate for name, hand in self.hands.items() if not hand.quiet(now)}
        return dict(sorted(found.items(), key=lambda pair: pair[1]))

    def _say(self, now: float) -> None:
        self.told, rates = now, self.rates(now)
        self.say(Aloud(f"{self.stage}: {told(rates)}", dict(list(rates.items())[:NAMED])))


def stragglers(rates: dict[str, float]) -> dict[str, float]:
    """The workers whose rate is below half the median."""
    if len(rates) < 2:
        return {}
    bar = SLOW * statistics.median(rates.values())
    return {name: rate for name, rate in rates.items() if rate < bar}


def told(rates: dict[str, float]) -> str:
    """Rates, slowest first, in words: '24.1 images/s from 2 workers (11.9 to 12.2 each)', and who is slow."""
    if not rates:
        return "no worker has been heard of lately"
    values, slow = list(rates.values()), list(stragglers(rates).items())[:NAMED]
    each = f" ({values[0]:,.3g} to {values[-1]:,.3g} each)" if len(values) > 1 else ""
    named = ", ".join(f"{name} at {rate:,.3g}" for name, rate in slow)
    line = f"{sum(values):,.3g} images/s from {len(values)} worker{'s' if len(values) > 1 else ''}{each}"
    return f"{line}; slow: {named}" if named else line


def shown_hours(hours: float) -> str:
    """'2.1', '0.004', '1,200'."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def span(seconds: float) -> str:
    """'45 s', '12 min', '3.5 h', '4 days'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
