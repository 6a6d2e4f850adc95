"""The items of a stage done by a Ray cluster (extra `gambeson[cluster]`): actors that open their tool once.

Ray brings workers, the health of machines and autoscaling; what is ours is small. At most two items are on their way to
a worker, and only small results come back, so that neither object store nor driver grows with the images. A worker or a
machine that is lost gives its items to others; a worker of another version is refused.
"""

from __future__ import annotations

import io
import os
import pickle
import platform
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gambeson
from gambeson.errors import EnvironmentFault, UserError
from gambeson.fleet import Aloud, Done, Failed, OpenTool, Waiting, answered, shown
from gambeson.mirror import Mirror, local, url_of
from gambeson.types import unheard

TRIES = 6
"""How many workers may be lost over one item: machines that are taken away are not its fault."""
STILLBORN = 5
"""How many workers in a row may be lost before their tools are open."""
AHEAD = 2
"""Items that are on their way to a worker at once: it need not wait for the next one."""
STORE_BYTES = 256 << 20
"""Of the object store of a cluster that is started on this machine: nothing large goes through it."""
PATIENCE = 300.0
"""Seconds without a single worker, after which a stage gives up."""
TOLD = 30.0
"""Seconds between two lines that say that workers are waited for."""


def the_engine(alone: bool = False) -> Any:
    """The module ray. UserError where it is not installed. alone: it will start a cluster of this machine's own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if alone:  # every server of the cluster listens on 127.0.0.1 then; read when ray is imported, on Linux as well
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"engine: expected Ray to be installed for --engine ray, got: {error}. Install it with "
            "`pip install gambeson[cluster]`, or leave --engine away"
        ) from error
    return ray


def versions() -> dict[str, str]:
    """What must be the same in every worker, or other bits could come out."""
    import torch

    python = ".".join(platform.python_version_tuple()[:2])
    return {"gambeson": gambeson.__version__, "torch": torch.__version__, "python": python}


@contextmanager
def reached(address: str | None, workers: int | None = None) -> Iterator[str]:
    """The address of the cluster; without one a cluster is started on this machine for the length of the block.

    Raises EnvironmentFault where it cannot be reached.
    """
    ray = the_engine(alone=address is None)
    if address is not None or ray.is_initialized():
        yield address or ray.get_runtime_context().gcs_address
        return
    _join(None, workers)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _join(address: str | None, workers: int | None) -> None:
    """Connects this process. A cluster of one's own listens on 127.0.0.1 alone, without a dashboard."""
    ray = the_engine(alone=address is None)
    if ray.is_initialized():
        return
    own = {"num_cpus": workers, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    given = {**own, "_node_ip_address": "127.0.0.1"} if address is None else {"address": address}
    try:
        ray.init(**given, log_to_driver=False, logging_level="error", configure_logging=False, namespace="gambeson")
    except Exception as error:  # Ray raises bare ones, too: a machine that is too busy to start in 30 s
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(
            f"cluster: expected Ray at {address or 'this machine'}, got: {reason}. See `ray status`; --address is "
            "HOST:PORT of its head (`ray start --head` prints it), with the same versions of Ray and Python there"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Workers of a Ray cluster; as many as it has, unless a number is given."""

    address: str | None = None  # HOST:PORT or auto; none: one is started on this machine
    workers: int | None = None
    gpu: bool = False  # whether each worker has an accelerator

    def each(
        self,
        open_tool: OpenTool,
        arguments: tuple[Any, ...],
        items: Iterable[Any],
        tell: Callable[[str], None] = unheard,
    ) -> Generator[Done, None, None]:
        """As `Fleet.each`."""
        waiting = Waiting(iter(items), tries=TRIES)
        if not waiting.some():
            return
        _join(self.address, self.workers)
        crew = _Crew(waiting, tell, self.gpu, the_engine().put(packed((open_tool, arguments))))
        try:
            crew.hire(self.workers or crew.places())
            while crew.works():
                yield from crew.round()
        finally:
            crew.dismiss()


def packed(work: Any) -> bytes:
    """What workers are given, pickled; a path in a mirror becomes its URL, and there a path of their own mirror."""
    out = io.BytesIO()
    _Packing(out, protocol=5).dump(work)
    return out.getvalue()


class _Packing(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Path) and obj.is_absolute() and Mirror.of(obj) is not None:
            return local, (url_of(obj),)
        return NotImplemented


class Worker:
    """What lives in a worker process: its tool, once that is open."""

    def open(self, work: bytes, wanted: dict[str, str]) -> dict[str, Any] | Failed:
        """Opens the tool; who and what this worker is. With other versions than wanted nothing is opened."""
        import torch

        torch.set_num_threads(1)
        facts = {"name": f"{platform.node()} {os.getpid()}", "versions": versions()}
        if facts["versions"] != wanted:
            return facts
        opened = answered(lambda: _opened(work))
        if isinstance(opened, Failed):
            return opened
        self.tool = opened[0]
        return facts

    def do(self, item: Any) -> tuple[Any, float] | Failed:
        """Does one item."""
        return answered(lambda: self.tool(item))


def _opened(work: bytes) -> Any:
    open_tool, arguments = pickle.loads(work)  # of the driver, who may run programs here anyway
    return open_tool(*arguments)


@dataclass
class _Hand:
    """An actor; name: once its tool is open. items: on their way, in order."""

    actor: Any
    name: str = ""
    items: deque[tuple[Any, Any]] = field(default_factory=deque)  # (reference, item)
    opening: Any = None


@dataclass
class _Crew:
    """Actors, and what they work off."""

    waiting: Waiting
    tell: Callable[[str], None]
    gpu: bool
    work: Any
    hands: list[_Hand] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    stillborn: int = 0
    heard: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)
    ray: Any = field(default_factory=the_engine)

    @property
    def kind(self) -> str:
        """What a worker computes on, as Ray names it."""
        return "GPU" if self.gpu else "CPU"

    def works(self) -> bool:
        """Whether anything is to be done or on its way; workers that only wait for room do not count."""
        return self.waiting.some() or any(hand.items for hand in self.hands)

    def places(self) -> int:
        """How many workers the cluster has room for now, at least one."""
        found = self.ray.cluster_resources()
        return max(int(found.get(self.kind, 0)), 1)

    def hire(self, count: int) -> None:
        """Asks for so many workers; those for whom there is no room yet wait, and an autoscaler sees that."""
        asked = {"num_cpus": 1, "num_gpus": int(self.gpu), "max_restarts": 0, "max_task_retries": 0}
        kind = self.ray.remote(**asked)(Worker)
        for _ in range(count):
            hand = _Hand(kind.remote())
            hand.opening = hand.actor.open.remote(self.work, versions())
            self.hands.append(hand)

    def round(self) -> Iterator[Done]:
        """Waits until one of them has something to say."""
        heads = {hand.opening if hand.opening is not None else hand.items[0][0]: hand for hand in self.hands}
        ready, _ = self.ray.wait(list(heads), num_returns=1, timeout=1.0)
        if not ready:
            self._check_patience()
            return
        hand = heads[ready[0]]
        try:
            answer = self.ray.get(ready[0])
        except self.ray.exceptions.RayError as error:
            self._replace(hand, error)
            return
        if isinstance(answer, Failed):
            answer.fail()
        if hand.opening is not None:
            self._welcome(hand, answer)
            return
        _, item = hand.items.popleft()
        self._feed(hand)
        yield Done(item, answer[0], hand.name, answer[1])

    def _welcome(self, hand: _Hand, facts: dict[str, Any]) -> None:
        """A worker has opened its tool, or is refused for its versions."""
        hand.opening, hand.name, mine = None, facts["name"], versions()
        self.stillborn = 0
        self.heard = time.monotonic()
        if facts["versions"] == mine:
            self._feed(hand)
            return
        other = ", ".join(f"{name} {facts['versions'].get(name)} (here {mine[name]})" for name in mine
                          if facts["versions"].get(name) != mine[name])  # fmt: skip
        self.refused.append(f"worker {hand.name}: {other}")
        self._let_go(hand)
        self.tell(Aloud(f"refused: {self.refused[-1]}; other versions make other bits"))
        if not self.hands:
            raise EnvironmentFault(
                f"cluster: expected workers of the versions here, got none: {'; '.join(self.refused[:5])}. Install "
                "the same versions on all machines (constraints.txt of gambeson names them)"
            )

    def _feed(self, hand: _Hand) -> None:
        """Gives a worker its next items, or lets it go where it has done all and there is none."""
        while len(hand.items) < AHEAD and (item := self.waiting.take()) is not None:
            hand.items.append((hand.actor.do.remote(item), item))
        if not hand.items:
            self._let_go(hand)

    def _replace(self, hand: _Hand, error: Exception) -> None:
        """A worker is lost, with its process or its machine: its items wait again, and another is asked for."""
        items = [item for _, item in hand.items]
        for place, item in enumerate(items):
            self.waiting.give_back(item, counts=place == 0)
        self._let_go(hand)
        did = f"; others do {', '.join(map(shown, items))}" if items else ""
        self.tell(Aloud(f"worker {hand.name or '(starting)'} was lost ({type(error).__name__}){did}"))
        self.stillborn += not hand.name
        if self.stillborn >= STILLBORN:
            raise EnvironmentFault(
                f"cluster: expected workers to start, lost {self.stillborn} in a row: {str(error).strip()[-600:]}. "
                "Install the same versions on all machines; `ray logs` says more"
            ) from error
        self.hire(1)

    def _let_go(self, hand: _Hand) -> None:
        self.hands.remove(hand)
        with suppress(Exception):
            self.ray.kill(hand.actor)

    def _check_patience(self) -> None:
        """EnvironmentFault where no worker has been there for long; says every now and then that one is waited for."""
        now = time.monotonic()
        if any(hand.opening is None for hand in self.hands):
            self.heard = now
        elif now - self.heard > PATIENCE:
            raise EnvironmentFault(
                f"cluster: expected a worker with a {self.kind} within {PATIENCE:.0f} s, got none; it has "
                f"{_listed(self.ray.cluster_resources())}, free are {_listed(self.ray.available_resources())}. See "
                "`ray status`; start the same command again when there is room: what is finished is kept"
            )
        elif now - self.told > TOLD:
            self.told = now
            self.tell(Aloud(f"waiting: no worker yet, for {now - self.heard:.0f} s"))

    def dismiss(self) -> None:
        """Ends all that are left, whatever they are doing."""
        for hand in list(self.hands):
            self._let_go(hand)


def _listed(resources: dict[str, float]) -> str:
    found = [f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")]
    return " and ".join(found)
