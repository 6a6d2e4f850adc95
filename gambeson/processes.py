"""Worker processes: spawned, of one thread each, deaf to Ctrl-C, gone as soon as their parent is; our own memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gambeson.errors import EnvironmentFault

CONTEXT = multiprocessing.get_context("spawn")
"""Spawned, never forked: a fork copies torch's threads in an undefined state."""
GRACE = 5.0
"""Seconds that a worker may take to end."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pool(workers: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of worker processes, ended with the block; `prepare(*arguments)` runs first in each.

    Raises EnvironmentFault when a worker is ended from outside.
    """
    executor = ProcessPoolExecutor(workers, CONTEXT, _start, (os.getpid(), prepare, arguments))
    try:
        yield executor
    except BrokenProcessPool as error:
        raise EnvironmentFault(
            "a worker process was ended from outside, most often because memory ran out. Start the same command again "
            f"with fewer --workers (now {workers}): finished stages and saved states are kept"
        ) from error
    finally:
        _end(list((executor._processes or {}).values()))
        executor.shutdown(wait=True, cancel_futures=True)


def _end(processes: list[BaseProcess]) -> None:
    """Asks processes to end, and ends those that have not within GRACE, such as stopped ones (SIGSTOP)."""
    for process in processes:
        process.terminate()
    left, deadline = {process.sentinel: process for process in processes}, time.monotonic() + GRACE
    while left and (gone := wait(list(left), max(deadline - time.monotonic(), 0.0))):
        left = {sentinel: process for sentinel, process in left.items() if sentinel not in gone}
    for process in left.values():
        process.kill()


def begin_worker(parent: int) -> None:
    """What a worker process begins with: one thread, deaf to Ctrl-C, ended as soon as its parent is gone."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _start(parent: int, prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    begin_worker(parent)
    if prepare is not None:
        prepare(*arguments)


def _watch(parent: int) -> None:
    """Ends this process when its parent is gone (SIGKILL leaves no other sign)."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def reset_peak_memory() -> None:
    """Lets `peak_memory_mb` count from now (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak resident memory of this process since the last reset, in MB (Linux: VmHWM)."""
    with contextlib.suppress(OSError, IndexError):
        line = Path("/proc/self/status").read_text().split("VmHWM:")[1].split("\n")[0]
        return int(line.split()[0]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
