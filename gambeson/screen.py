"""Shows what a run is doing: on a terminal a bar with time left for every stage, elsewhere a line for each."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gambeson.engine import News


class ProgressScreen:
    """A context manager that is a Screen."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.tasks: dict[tuple[str, str, int], TaskID] = {}
        self.last: dict[str, tuple[str, int]] = {}
        self.rounds: dict[tuple[str, str], int] = {}
        self.started = time.monotonic()
        self.bars = Progress(
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

    def __enter__(self) -> ProgressScreen:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def show(self, news: News) -> None:
        """Moves the bar of a stage; a stage that turns up again in the same job after it ended gets a new bar."""
        turn = self._turn(news)
        key = (news.job, news.stage, turn)
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(
                f"{news.job:28} {WORDS.get(news.stage, news.stage):22}", total=news.total
            )
        self.bars.update(self.tasks[key], completed=news.done, total=news.total)
        if news.total == news.done == 1 and not self.console.is_terminal:
            clock = time.monotonic() - self.started
            self.console.print(
                f"[{clock:6.0f} s] {news.job:28} {WORDS.get(news.stage, news.stage)}: done", markup=False
            )

    def _turn(self, news: News) -> int:
        """How often this stage was finished in this job before."""
        place = (news.job, news.stage)
        turn = self.rounds.get(place, 0)
        if news.done == news.total == 1:
            self.rounds[place] = turn + 1
        return turn


WORDS = {
    "train_denoiser": "train diffusion model",
    "train_classifier": "train classifier",
    "generate": "generate images",
    "gaussian_control": "draw Gaussian images",
    "label": "label",
    "select": "select",
    "evaluate": "attack",
}
