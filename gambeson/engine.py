"""The local engine: jobs side by side in processes of one thread each, their progress on one screen.

A job may wait for a stage that another job is making (store.Store.once holds a lock); a worker whose parent dies stops.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any, Protocol, runtime_checkable

from gambeson.errors import EnvironmentFault
from gambeson.store import Store


@dataclass(frozen=True)
class Job:
    """A named piece of work: `work(*arguments, once)` in some process."""

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class News:
    """A stage of a job has come this far; total 0: it has ended, made now (done 1) or there already (done 0)."""

    job: str
    stage: str
    done: int
    total: int


@runtime_checkable
class Screen(Protocol):
    """Whoever shows the news."""

    def show(self, news: News) -> None: ...


def run_jobs(jobs: Sequence[Job], root: Path, workers: int, screen: Screen) -> list[Any]:
    """The jobs' results in order. The first failure stops the rest and is raised as it was."""
    if workers == 1:
        return _in_this_process(jobs, root, screen)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (os.getpid(), queue))
    try:
        futures = [pool.submit(_work, job, root) for job in jobs]
        return _collect(futures, queue, screen)
    except BrokenProcessPool as error:
        raise EnvironmentFault(
            "a worker process was ended from outside, most often because memory ran out. Start the same command again "
            f"with fewer --workers (now {workers}): finished stages and saved states are kept"
        ) from error
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _in_this_process(jobs: Sequence[Job], root: Path, screen: Screen) -> list[Any]:
    import torch

    threads, results = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for job in jobs:
            store = Store(root, lambda stage, done, total, name=job.name: screen.show(News(name, stage, done, total)))
            results.append(job.work(*job.arguments, store.once))
    finally:
        torch.set_num_threads(threads)
    return results


def _collect(futures: list[Future[Any]], queue: Any, screen: Screen) -> list[Any]:
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
        _drain(queue, screen)
        for future in finished:
            future.result()
    return [future.result() for future in futures]


def _drain(queue: Any, screen: Screen) -> None:
    try:
        while True:
            screen.show(queue.get_nowait())
    except Empty:
        pass


_queue: Any = None


def _start_worker(parent: int, queue: Any) -> None:
    global _queue
    _queue = queue
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """Ends this process when its parent is gone (SIGKILL leaves no other sign)."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def _work(job: Job, root: Path) -> Any:
    last = [0.0]

    def report(stage: str, done: int, total: int) -> None:
        if done == total or not total or time.monotonic() - last[0] > 0.2:
            last[0] = time.monotonic()
            _queue.put(News(job.name, stage, done, total))

    return job.work(*job.arguments, Store(root, report).once)
