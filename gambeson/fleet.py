"""Who does the items of a stage (blocks, parts, shards): this process, processes beside it, or a cluster.

A worker opens its tool once (networks, files) and then does items one at a time; results are small, as pixels go to the
store. What an item makes depends on the item alone, so that the engine, the number of workers, their order and what was
lost on the way change no bit.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NoReturn, Protocol, runtime_checkable

from gambeson.errors import EnvironmentFault, require
from gambeson.processes import CONTEXT, begin_worker
from gambeson.types import Progress, silent, unheard

Tool = Callable[[Any], Any]
"""Does one item; what it returns is small and can be pickled."""
OpenTool = Callable[..., Tool]
"""Opens what a tool needs, once in each worker: a function of a module, whose arguments can be pickled."""
TRIES = 3
"""How many workers may end over one item before it is given up."""


@dataclass(frozen=True)
class Done:
    """An item that is done: what its tool said, which worker did it, and how long that took."""

    item: Any
    result: Any
    worker: str
    seconds: float


@runtime_checkable
class Fleet(Protocol):
    """Workers, as many as it has."""

    def each(
        self,
        open_tool: OpenTool,
        arguments: tuple[Any, ...],
        items: Iterable[Any],
        tell: Callable[[str], None] = unheard,
    ) -> Generator[Done, None, None]:
        """All items, in the order in which they are done; `open_tool(*arguments)` is called once in each worker.

        `tell` gets a line when a worker is lost or refused. Items are taken as workers get free, never all at once. An
        error of a tool is raised here as it was, and ends all. EnvironmentFault, naming the item, where workers that
        did it ended from outside `TRIES` times.
        """
        ...


class Aloud(str):
    """A line for a person that commands print, too. workers: who works at which rate; the run's record keeps it."""

    workers: dict[str, float]

    def __new__(cls, line: str, workers: dict[str, float] | None = None) -> Aloud:
        """The line with its numbers."""
        made = super().__new__(cls, line)
        made.workers = workers or {}
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Aloud, (str(self), self.workers)


@dataclass(frozen=True)
class Nearby:
    """Progress that a tool tells in the process that asked for it; sent to another one it is silence."""

    told: Progress = silent

    def __call__(self, done: int, total: int) -> None:
        """As `types.Progress`."""
        self.told(done, total)

    def __reduce__(self) -> tuple[Any, ...]:
        return Nearby, ()


@dataclass
class Waiting:
    """Items that are to be done, those first that a lost worker left; with how many workers each has cost."""

    items: Iterator[Any]
    back: deque[Any] = field(default_factory=deque)
    lost: dict[Any, int] = field(default_factory=dict)
    tries: int = TRIES

    def some(self) -> bool:
        """Whether there is any."""
        if not self.back:
            self.back.extend(islice(self.items, 1))
        return bool(self.back)

    def take(self) -> Any:
        """The next item; None where there is none."""
        return self.back.popleft() if self.back else next(self.items, None)

    def give_back(self, item: Any, counts: bool = True) -> None:
        """An item whose worker ended; `counts`: it had begun it. EnvironmentFault where that was once too often."""
        if counts:
            self.lost[item] = self.lost.get(item, 0) + 1
        if self.lost.get(item, 0) >= self.tries:
            raise EnvironmentFault(
                f"{shown(item)}: {self.tries} workers that did it were ended from outside, most often because memory "
                "ran out. Start the same command again with fewer --workers or a smaller --micro-batch: what is "
                "finished is kept"
            )
        self.back.append(item)


def shown(item: Any) -> str:
    """An item in words: 'item 12', or 'images 4096 to 8191'."""
    return f"images {item.start} to {item.stop - 1}" if isinstance(item, range) else f"item {item}"


@dataclass(frozen=True)
class Here:
    """This process, one item after another."""

    def each(
        self,
        open_tool: OpenTool,
        arguments: tuple[Any, ...],
        items: Iterable[Any],
        tell: Callable[[str], None] = unheard,
    ) -> Generator[Done, None, None]:
        """As `Fleet.each`, in order; without items nothing is opened."""
        tool: Tool | None = None
        for item in items:
            tool = tool or open_tool(*arguments)
            began = time.perf_counter()
            result = tool(item)
            yield Done(item, result, "this process", time.perf_counter() - began)


@dataclass(frozen=True)
class Local:
    """Processes of one thread on this machine; one that is killed is replaced, and its item given to another."""

    workers: int

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", "at least 1", self.workers)

    def each(
        self,
        open_tool: OpenTool,
        arguments: tuple[Any, ...],
        items: Iterable[Any],
        tell: Callable[[str], None] = unheard,
    ) -> Generator[Done, None, None]:
        """As `Fleet.each`; no more processes than items are started, and for a single item none."""
        rest = iter(items)
        first = deque(islice(rest, self.workers))
        if len(first) < 2:
            yield from Here().each(open_tool, arguments, first, tell)
            return
        crew = _Crew(open_tool, arguments, Waiting(rest, first), tell)
        try:
            for _ in range(len(first)):
                crew.hire()
            while crew.hands:
                yield from crew.round()
        finally:
            crew.dismiss()


@dataclass
class _Hand:
    """A worker process with the item that it does; None: it has been let go."""

    process: Any
    pipe: Any
    item: Any


@dataclass
class _Crew:
    """Worker processes and what they work off."""

    open_tool: OpenTool
    arguments: tuple[Any, ...]
    waiting: Waiting
    tell: Callable[[str], None]
    hands: list[_Hand] = field(default_factory=list)
    hired: int = 0

    def hire(self) -> None:
        """Starts a process, which opens its tool and does the next item first."""
        self.hired += 1
        (ours, theirs), item = CONTEXT.Pipe(), self.waiting.take()
        given, name = (theirs, self.open_tool, self.arguments, item), f"worker {self.hired}"
        process = CONTEXT.Process(target=_serve, args=given, name=name, daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the process
        self.hands.append(_Hand(process, ours, item))

    def round(self) -> Iterator[Done]:
        """Waits until a worker has something to say: that an item is done, how it failed, or that it is gone."""
        ready = multiprocessing.connection.wait([hand.pipe for hand in self.hands])
        for hand in [hand for hand in self.hands if hand.pipe in ready]:
            try:
                answer = pickle.loads(hand.pipe.recv_bytes())
            except (EOFError, OSError):
                self._replace(hand)
                continue
            if isinstance(answer, Failed):
                answer.fail()
            item, hand.item = hand.item, self.waiting.take()
            self._send(hand)  # it goes on while the result is looked at
            yield Done(item, answer[0], hand.process.name, answer[1])

    def _send(self, hand: _Hand) -> None:
        """Gives a worker its next item, or lets it go where there is none."""
        with contextlib.suppress(OSError):  # that it has ended is seen when its pipe is read
            hand.pipe.send(hand.item)
        if hand.item is None:
            self.hands.remove(hand)
            hand.pipe.close()
            hand.process.join()

    def _replace(self, hand: _Hand) -> None:
        """A worker was ended from outside: its item waits again, and another is hired."""
        self.hands.remove(hand)
        hand.process.join()
        self.waiting.give_back(hand.item)
        self.tell(Aloud(f"{hand.process.name} was ended from outside; another does {shown(hand.item)}"))
        self.hire()

    def dismiss(self) -> None:
        """Ends all that are left, whatever they are doing."""
        for hand in self.hands:
            hand.process.kill()  # one that was stopped (SIGSTOP) would not hear of anything less
        for hand in self.hands:
            hand.process.join()


@dataclass(frozen=True)
class Failed:
    """An error of a tool on its way to who asked: pickled, where that can be, and as text."""

    error: bytes
    text: str

    @staticmethod
    def of(error: BaseException) -> Failed:
        """The error that was just caught; one that cannot be pickled becomes a RuntimeError with its text."""
        text = "".join(traceback.format_exception(error))
        try:
            packed = pickle.dumps(error)
            pickle.loads(packed)
        except Exception:
            packed = pickle.dumps(RuntimeError(text))
        return Failed(packed, text)

    def fail(self) -> NoReturn:
        """Raises the error; its text in the worker is the cause."""
        error = pickle.loads(self.error)
        raise error from RuntimeError(f"in a worker:\n{self.text}")


def answered(work: Callable[[], Any]) -> tuple[Any, float] | Failed:
    """What the work returns, with its seconds; or how it failed."""
    began = time.perf_counter()
    try:
        return work(), time.perf_counter() - began
    except Exception as error:
        return Failed.of(error)


def _serve(pipe: Any, open_tool: OpenTool, arguments: tuple[Any, ...], item: Any) -> None:
    """A worker's life: opens the tool, then does what comes until nothing does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    begin_worker(parent.pid)
    opened = answered(lambda: open_tool(*arguments))
    with contextlib.suppress(EOFError, OSError):  # who asked is gone
        while item is not None:
            answer = opened if isinstance(opened, Failed) else answered(partial(opened[0], item))
            pipe.send_bytes(pickle.dumps(answer))
            item = pipe.recv()
