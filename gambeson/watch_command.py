"""`gambeson watch`: what a run does that goes on in another process, or on another machine that shares the folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from gambeson import terminal
from gambeson.errors import EnvironmentFault, UserError, reading
from gambeson.options import take_flag, take_runs
from gambeson.run import Run, check_format, find_run, list_runs, open_run
from gambeson.screen import PATIENCE
from gambeson.watching import boards, unrecorded, verdict
from gambeson.watching.curves import BARS
from gambeson.watching.lines import Line
from gambeson.watching.state import Record, State
from gambeson.watching.telling import Story, words

HELP = """usage: gambeson watch RUN [OPTIONS]

Shows a run that goes on elsewhere: its jobs and stages, how far, how fast and how long still, curves of the trainings,
failures; the verdict when it is complete. Only reads: the run is not disturbed. Ctrl-C ends the watching, not the run.
RUN is a folder, a name, or the beginning of a name; of a run that has not started yet it is waited for.

  --once                print how it stands, and end
  --tensorboard [PORT]  also show the trainings' curves in TensorBoard on 127.0.0.1 (port 6006, or a free one)
  --runs DIR            where runs live (default ./runs or $GAMBESON_RUNS)

On a terminal the picture is renewed every second; elsewhere there are lines, at each turn and every {patience:.0f} s.
A run that was stopped is said to be, with the command that goes on, and is watched on until it is complete.
"""
TICK = 1.0
"""Seconds between two looks."""
SLOWLY = 30
"""Looks between two at the stages of a run that keeps no record: its images are read for that."""
PATIENT = 5
"""Looks that a run's folder may be missing (a shared folder can blink) before it is taken for gone."""


@dataclass(frozen=True)
class Asked:
    """What the command line asked for. `port`: None without TensorBoard."""

    word: str
    runs: Path
    once: bool
    port: int | None


def watch(argv: list[str]) -> None:
    """gambeson watch RUN [--once] [--tensorboard [PORT]]"""
    if not argv or {"--help", "-h"} & set(argv):
        print(HELP.format(patience=PATIENCE))
        return
    asked, console = _read(list(argv)), terminal.console()
    if asked.once:
        _once(find_run(asked.word, asked.runs).resolve(), console)
        return
    try:
        _live(asked, console)
    except KeyboardInterrupt:
        _print(console, "watched until here; the run is not touched by it")


def _live(asked: Asked, console: Console) -> None:
    """Until the run is complete; with TensorBoard until Ctrl-C."""
    folder = _awaited(asked, console).resolve()
    if asked.port is None:
        _follow(Watched(folder, _drawn(console)), console)
        return
    with boards.served(folder.parent, asked.port) as links:
        address = f"TensorBoard: http://127.0.0.1:{asked.port}/"
        _print(console, address)
        links.add(boards.finished_trainings(_follow(Watched(folder, _drawn(console), links), console)))
        _print(console, f"{address} stays until Ctrl-C")
        while True:
            time.sleep(TICK)


def _read(argv: list[str]) -> Asked:
    runs, once, port = take_runs(argv), take_flag(argv, "--once"), _take_port(argv)
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError(f"watch: expected one run, got {' '.join(argv) or 'nothing'}; see gambeson watch --help")
    if once and port is not None:
        raise UserError("watch: expected --once or --tensorboard, got both; TensorBoard ends with the watching")
    return Asked(argv[0], runs, once, port)


def _take_port(argv: list[str]) -> int | None:
    """The port of --tensorboard [PORT]; None where it is not asked for."""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name != "--tensorboard":
            continue
        del argv[i]
        if not equals and i < len(argv) and argv[i].isascii() and argv[i].isdigit():
            value = argv.pop(i)
        if (equals or value) and not (value.isascii() and value.isdigit() and 0 < int(value) < 65536):
            raise UserError(f"--tensorboard: expected a port from 1 to 65535, or none, got {value!r}")
        return boards.check(int(value) if value else None)
    return None


def _drawn(console: Console) -> bool:
    """Whether curves can be drawn with what the terminal is able to show."""
    try:
        BARS.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


@dataclass
class Watched:
    """A run that is looked at again and again."""

    folder: Path
    drawn: bool = True
    links: boards.Links | None = None
    looks: int = 0
    news: list[Line] = field(default_factory=list)  # of the last look
    _told: list[str] = field(default_factory=list)
    _found: State | None = None  # from the stages, where there is no record

    def __post_init__(self) -> None:
        self.record, self.story = Record(self.folder), Story(self.folder, self.drawn)

    @property
    def state(self) -> State:
        """What is known of the run."""
        return self._found or self.record.state

    def look(self) -> list[str]:
        """What there is to say now. UserError for a run of another format, EnvironmentFault where it has gone."""
        self.looks += 1
        if not (self.folder / "recipe.yaml").exists():
            return [f"{self.folder}: has no recipe.yaml; it was moved or removed, or has not begun"]
        check_format(self.folder)
        self.news = self.record.look()
        if self.record.state.starts:
            self._found, self._told = None, self.story.lines(self.record)
        elif self.looks % SLOWLY == 1 or not self._told:
            self._told = self._unrecorded()
        if self.links is not None:
            self.links.add(boards.trainings(self.state, self.story))
        return self._told

    def _unrecorded(self) -> list[str]:
        """The same where the run keeps no record."""
        recipe = self.story.recipe
        if recipe is None:
            return [f"{self.folder}: its recipe cannot be read by this version of gambeson, and it keeps no record"]
        try:
            self._found = unrecorded.state_of(recipe, self.folder.parent)
        except (OSError, ValueError) as error:
            return [f"{self.folder.name}: unfinished, keeps no record, and its stages cannot be found: {error}"]
        return self.story.unrecorded(self._found, time.time())

    @property
    def complete(self) -> Run | None:
        """The run, once it is complete and nobody works on it again."""
        if not (self.folder / "run.json").exists():
            return None
        state = self.record.state
        again = state.starts and state.end is None and self.record.life().lives
        return None if again else open_run(self.folder)

    @property
    def gone(self) -> bool:
        """Whether the folder of the run is not there."""
        return not (self.folder / "recipe.yaml").exists()


def _once(folder: Path, console: Console) -> None:
    watched = Watched(folder, _drawn(console))
    with reading(folder):
        watched.look()
        run = watched.complete
    if run is None:
        for line in watched.look():
            _print(console, line)
    else:
        _conclude(run, watched, console)


def _conclude(run: Run, watched: Watched, console: Console) -> None:
    """The end of a run that is complete."""
    finished = str(run.facts.get("finished", ""))[:16].replace("T", " ")
    _print(console, f"{run.folder.name}: complete, {finished} UTC")
    with reading(run.folder):
        for part in verdict.told(run):
            console.print(part)
    page = run.folder / "report.html"
    if page.exists():
        _print(console, f"report: {page}")
    elif watched.record.state.starts and watched.record.life().lives:
        _print(console, f"its report is being written: {page}")
    else:
        _print(console, f"no report yet; to write it: {words('report', run.folder)}")


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _awaited(asked: Asked, console: Console) -> Path:
    """The run's folder, waited for. Raises UserError where the word may mean several."""
    said = False
    while True:
        folder = _found(asked)
        if folder is not None:
            return folder
        if not said:
            there = ", ".join(p.name for p in list_runs(asked.runs)) or "none"
            _print(console, f"no run {asked.word!r} in {asked.runs} yet (there: {there}); waiting for it, Ctrl-C ends")
            said = True
        time.sleep(TICK)


def _found(asked: Asked) -> Path | None:
    if not (Path(asked.word) / "recipe.yaml").exists() and not any(
        p.name.startswith(asked.word) for p in list_runs(asked.runs)
    ):
        return None
    return find_run(asked.word, asked.runs)


def _follow(watched: Watched, console: Console) -> Run:
    """Shows the run until it is complete; the run. EnvironmentFault where its folder goes and stays away."""
    missing = 0
    with _screen(console) as show:
        while True:
            with reading(watched.folder):
                show(watched.look(), watched)
            run = watched.complete
            if run is not None:
                break
            missing = missing + 1 if watched.gone else 0
            if missing > PATIENT:
                raise EnvironmentFault(f"{watched.folder}: expected the run's folder, it has gone (moved or removed)")
            time.sleep(TICK)
    _conclude(run, watched, console)
    return run


Show = Callable[[list[str], Watched], None]


@contextmanager
def _screen(console: Console) -> Iterator[Show]:
    """What shows lines: on a terminal one picture that is renewed, elsewhere lines now and then."""
    if not console.is_terminal:
        yield Lines(console).show
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        yield lambda lines, watched: live.update(_picture(lines, console.width), refresh=True)


def _picture(lines: list[str], width: int) -> RenderableType:
    """The lines, what does not fit on one indented further below it; the first one bold, failures red."""
    parts = []
    for i, line in enumerate(map(terminal.harmless, lines)):  # what is live does not go through the console's hook
        indent = len(line) - len(line.lstrip()) + 6
        folded = wrap(line, max(width - 1, 20), subsequent_indent=" " * indent, drop_whitespace=True) or [""]
        parts += [Text(part, style="bold" if i == 0 else "red" if " FAILED" in line else "") for part in folded]
    return Group(*parts)


@dataclass
class Lines:
    """Prints what is new: turns of the run at once, how far it is every PATIENCE seconds."""

    console: Console
    before: list[str] = field(default_factory=list)
    when: float = float("-inf")

    def show(self, lines: list[str], watched: Watched) -> None:
        """Prints, if it is time for that."""
        turn = any(line.event not in ("reached", "said", "asked") for line in watched.news) or not self.before
        turn = turn or _stands(lines) != _stands(self.before)
        if lines == self.before or not (turn or time.monotonic() - self.when >= PATIENCE):
            return
        self.console.print(time.strftime("[%H:%M:%S]"), end=" ", markup=False, highlight=False)
        for line in lines:
            _print(self.console, line)
        self.before, self.when = lines, time.monotonic()
        sys.stdout.flush()


def _stands(lines: list[str]) -> str:
    """How it stands with the run as a whole: what its first line says before the numbers."""
    return lines[0].partition(",")[0] if lines else ""
