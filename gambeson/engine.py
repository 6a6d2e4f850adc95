"""The local engine: jobs side by side in processes of one thread each, their progress on one screen.

A job may wait for a stage that another job is making (store.Store.once holds a lock); a worker whose parent dies stops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any, Protocol, runtime_checkable

from gambeson.processes import CONTEXT, pool
from gambeson.store import Machine, Store


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


def run_jobs(jobs: Sequence[Job], root: Path, workers: int, screen: Screen, machine: Machine = Machine()) -> list[Any]:
    """The jobs' results in order. The first failure stops the rest and is raised as it was."""
    if workers == 1:
        return _in_this_process(jobs, root, screen, machine)
    queue = CONTEXT.Queue()
    with pool(min(workers, len(jobs)), _take_queue, queue) as executor:
        futures = [executor.submit(_work, job, root, machine) for job in jobs]
        return _collect(futures, queue, screen)


def _in_this_process(jobs: Sequence[Job], root: Path, screen: Screen, machine: Machine) -> list[Any]:
    import torch

    threads, results = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for job in jobs:
            report = partial(_tell, screen, job.name)
            results.append(job.work(*job.arguments, Store(root, report, machine).once))
    finally:
        torch.set_num_threads(threads)
    return results


def _tell(screen: Screen, job: str, stage: str, done: int, total: int) -> None:
    screen.show(News(job, stage, done, total))


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


def _take_queue(queue: Any) -> None:
    global _queue
    _queue = queue


def _work(job: Job, root: Path, machine: Machine) -> Any:
    last = [0.0]

    def report(stage: str, done: int, total: int) -> None:
        if done == total or not total or time.monotonic() - last[0] > 0.2:
            last[0] = time.monotonic()
            _queue.put(News(job.name, stage, done, total))

    return job.work(*job.arguments, Store(root, report, machine).once)
