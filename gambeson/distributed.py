"""Several processes that train one network together: who we are, and sums over all of us. Alone, everything is itself.

Processes are started by torchrun, which tells each its rank; `joined` makes them a group (NCCL on CUDA, else Gloo).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gambeson.errors import require

PATIENCE = timedelta(hours=6)
"""How long processes wait for each other within a step; `wait` has no limit."""
PAUSE = 0.25
"""Seconds, at most, between two looks at whether all have come."""

T = TypeVar("T")
_apart: ContextVar[bool] = ContextVar("apart", default=False)
_meeting: ContextVar[Meeting | None] = ContextVar("meeting", default=None)


def together() -> bool:
    """Whether this process belongs to a group, and is not working apart from it."""
    return dist.is_available() and dist.is_initialized() and not _apart.get()


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process works as if it were alone."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if together() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if together() else 0


def leads() -> bool:
    """Whether this process writes files and talks: the first, or the only one."""
    return rank() == 0


@contextmanager
def joined(device: str = "cpu") -> Iterator[str]:
    """Inside, the processes that torchrun started are a group; yields this one's device (cuda: the card of its rank).

    Started by hand, a process is alone and keeps its device.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or together():
        yield device
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun starts each in a session of its own: nothing else ends them
        threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()
    on_cards = device == "cuda"
    if on_cards:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    kept, here, count = next(rendezvous("env://", timeout=PATIENCE))
    group = {"store": PrefixStore("default_pg", kept), "rank": here, "world_size": count, "timeout": PATIENCE}
    dist.init_process_group("nccl" if on_cards else "gloo", **group)
    token = _meeting.set(Meeting(PrefixStore("gambeson", kept), count))
    try:
        yield device
        wait()  # all leave together
    finally:
        _meeting.reset(token)
        dist.destroy_process_group()


def _end_after(parent: int) -> None:
    """Ends this process when torchrun is gone (SIGKILL leaves no other sign)."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code; one of several without Python's own clearing up.

    In that, Gloo's threads have been seen to abort a process that had done all its work (pytorch/pytorch#179291).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def shares(images: int) -> int:
    """How many parts a batch of so many images is cut into, one for each process. UserError for fewer than those."""
    require(images >= world(), "batch_size", f"at least {world()} images, one for each process", images)
    return world()


def share(parts: Sequence[T]) -> T:
    """This process's of the parts."""
    return parts[rank()]


@torch.no_grad()
def add(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over the processes, in place; those of one kind travel as one message."""
    if not together():
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for some in kinds.values():
        flat = torch.cat([t.flatten() for t in some])
        dist.all_reduce(flat)
        for tensor, total in zip(some, flat.split([t.numel() for t in some]), strict=True):
            tensor.copy_(total.view_as(tensor))


def average(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its mean over the processes, in place."""
    if together():
        tensors = list(tensors)
        add(tensors)
        for tensor in tensors:
            tensor.div_(world())


def total(number: float) -> float:
    """The sum of a number over the processes."""
    if not together():
        return number
    on_cards = dist.get_backend() == "nccl"
    found = torch.tensor([number], dtype=torch.float64, device="cuda" if on_cards else "cpu")
    dist.all_reduce(found)
    return found.item()


def told(thing: Any) -> Any:
    """What the first process knows, in every process."""
    if not together():
        return thing
    box = [thing]
    dist.broadcast_object_list(box)
    return box[0]


class Meeting:
    """Where processes wait for each other as long as it takes, without a card or a core at work meanwhile.

    What the first does alone (a million images) may take days, and a collective operation gives up before.
    """

    def __init__(self, kept: Store, count: int) -> None:
        """kept: the store of torchrun's processes, through which they found each other."""
        self.kept, self.count, self.met = kept, count, 0

    def __call__(self) -> None:
        """Returns when every process has come here as often as this one."""
        self.met += 1
        name, pause = f"wait {self.met}", 0.001
        come = self.kept.add(name, 1)
        while come < self.count:
            time.sleep(pause)
            come, pause = self.kept.add(name, 0), min(2 * pause, PAUSE)


def wait() -> None:
    """Returns when every process has come here."""
    if together():
        meeting = _meeting.get()
        if meeting is not None:
            meeting()
        dist.barrier()  # nobody goes on, and ends the store perhaps, before the last has seen that all are here
