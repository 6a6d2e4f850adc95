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
        self.tasks: dict[tuple[str, str], TaskID] = {}
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
        """Moves the bar of a stage; a stage that has ended leaves a line instead, so that only what runs has bars."""
        key = (news.job, news.stage)
        name = f"{news.job:28} {WORDS.get(news.stage, news.stage):22}"
        if not news.total:
            if key in self.tasks:
                self.bars.remove_task(self.tasks.pop(key))
            clock = time.monotonic() - self.started
            end = "done" if news.done else "there already"
            self.console.print(f"[{clock:5.0f} s] {name} {end}", markup=False, highlight=False)
            return
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(name, total=news.total)
        self.bars.update(self.tasks[key], completed=news.done, total=news.total)


WORDS = {
    "train_denoiser": "train diffusion model",
    "train_classifier": "train classifier",
    "generate": "generate images",
    "gaussian_control": "draw Gaussian images",
    "label": "label",
    "select": "select",
    "evaluate": "attack",
}
