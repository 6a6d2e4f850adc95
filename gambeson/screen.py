"""Shows what a run is doing: on a terminal a bar with time left for every stage, elsewhere a line for each.

What stages say on the way stands below the bars; elsewhere it is a line every now and then, with the time left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from gambeson import distributed, terminal
from gambeson.engine import News

PATIENCE = 20.0
"""Seconds between two lines of one kind where there is no terminal."""


class Bars(Progress):
    """The bars, and below them the last line of each kind that was said."""

    said: dict[str, str]

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn."""
        yield from super().get_renderables()
        for line in getattr(self, "said", {}).values():
            yield Text(line)


@dataclass(frozen=True)
class Pace:
    """How far a stage is, and since when and from where it has been watched."""

    since: float
    first: int
    done: int
    total: int

    def told(self) -> str:
        """'37 of 128, 2 min left'; no time before anything was done."""
        worked, took = self.done - self.first, time.monotonic() - self.since
        if worked <= 0 or took <= 0:
            return f"{self.done} of {self.total}"
        return f"{self.done} of {self.total}, {span(took * (self.total - self.done) / worked)} left"


def span(seconds: float) -> str:
    """'45 s', '12 min', '3 h 5 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


Shown = TypeVar("Shown", bound="WithBars")


class WithBars:
    """A context manager whose bars are on the screen while it is open."""

    bars: Progress

    def __enter__(self: Shown) -> Shown:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()


class ProgressScreen(WithBars):
    """A context manager that is a Screen."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or terminal.console()
        self.tasks: dict[tuple[str, str], TaskID] = {}
        self.paces: dict[tuple[str, str], Pace] = {}
        self.told: dict[str, float] = {}
        self.started = time.monotonic()
        self.said: dict[str, str] = {}
        bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(compact=True),
            TextColumn("took"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        bars.said, self.bars = self.said, bars

    def show(self, news: News) -> None:
        """Moves the bar of a stage; a stage that has ended leaves a line instead, so that only what runs has bars."""
        key = (news.job, news.stage)
        name = f"{news.job:28} {WORDS.get(news.stage, news.stage):22}"
        if not news.total:
            if key in self.tasks:
                self.bars.remove_task(self.tasks.pop(key))
            self.paces.pop(key, None)
            self._line(f"{name} {'done' if news.done else 'there already'}")
            return
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(name, total=news.total)
        before = self.paces.get(key, Pace(time.monotonic(), news.done, news.done, news.total))
        self.paces[key] = Pace(before.since, before.first, news.done, news.total)
        self.bars.update(self.tasks[key], completed=news.done, total=news.total)

    def say(self, line: str) -> None:
        """Shows a line; its kind is what stands before the colon, and a newer line of a kind replaces the older one.

        Elsewhere than on a terminal a kind has a line every PATIENCE seconds at most, the first one at once.
        """
        kind, now = line.partition(":")[0], time.monotonic()
        if self.console.is_terminal:
            self.said[kind] = line
            self.bars.refresh()
        elif now - self.told.get(kind, -PATIENCE) >= PATIENCE:
            self.told[kind] = now
            self._line("; ".join([line, *(pace.told() for pace in self.paces.values())]))

    def _line(self, text: str) -> None:
        clock = time.monotonic() - self.started
        self.console.print(f"[{clock:5.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)


WORDS = {
    "train_denoiser": "train diffusion model",
    "train_classifier": "train classifier",
    "generate": "generate images",
    "gaussian_control": "draw Gaussian images",
    "label": "label",
    "select": "select",
    "evaluate": "attack",
    "assess": "attack",
    "corrupt": "corrupt images",
}


Report = Callable[[str, int, int], None]
"""(stage, done, total), as `store.Store` reports."""


class Unseen:
    """A screen that shows nothing."""

    def show(self, news: News) -> None:
        """Nothing."""


@contextmanager
def following() -> Iterator[ProgressScreen | Unseen]:
    """A screen for the first process, or the only one; the others of a group show nothing."""
    if not distributed.leads():
        yield Unseen()
        return
    with ProgressScreen(terminal.console()) as screen:
        yield screen


@contextmanager
def shown(job: str) -> Iterator[tuple[Report, Callable[[str], None]]]:
    """What a store tells of one job and what its stages say, on the screen; silent in all processes but the first."""
    with following() as screen:
        if isinstance(screen, Unseen):
            yield lambda stage, done, total: None, lambda line: None
        else:
            yield lambda stage, done, total: screen.show(News(job, stage, done, total)), screen.say
