"""The local engine: jobs side by side in processes of one thread each, their progress on one screen.

A job may wait for a stage that another job is making (store.Store.once holds a lock); a worker whose parent dies stops.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any, Literal, Protocol, runtime_checkable

from gambeson.fleet import Aloud
from gambeson.machine import Machine
from gambeson.processes import CONTEXT, pool
from gambeson.store import Artifact, Store

Event = Literal["reached", "asked", "begun", "said", "failed", "finished"]
"""Of a stage: how far it is, that it is asked for, that its work begins, a line for a person. Of a job: its end."""
PATIENCE = 5.0
"""Seconds that the news of a job which has ended may take to come."""


@dataclass(frozen=True)
class Job:
    """A named piece of work: `work(*arguments, once)` in some process."""

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class News:
    """A stage of a job has come this far; total 0: it has ended, made now (done 1) or there already (done 0).

    Screens are shown these; what keeps a record (`run_jobs`) is told the other events, too.
    """

    job: str
    stage: str
    done: int
    total: int
    event: Event = "reached"
    line: str = ""  # what was said, or why the job failed
    folder: Path | None = None  # of the stage, where its results and its journal are
    asked: dict[str, Any] = field(default_factory=dict)  # what the stage is made of, when it is asked for
    pid: int = field(default_factory=os.getpid)  # of the process that works
    aloud: bool = False  # whether a line that was said is shown, too
    workers: dict[str, float] = field(default_factory=dict)  # images a second of a stage's workers, the slowest first


@runtime_checkable
class Screen(Protocol):
    """Whoever shows the news."""

    def show(self, news: News) -> None: ...


@runtime_checkable
class SayingScreen(Screen, Protocol):
    """One that shows lines, too."""

    def say(self, line: str) -> None: ...


Tell = Callable[[News], None]


def unkept(news: News) -> None:
    """Keeps no record."""


def run_jobs(
    jobs: Sequence[Job],
    root: Path,
    workers: int,
    screen: Screen,
    machine: Machine = Machine(),
    keep: Tell = unkept,
) -> list[Any]:
    """The jobs' results in order. The first failure stops the rest and is raised as it was.

    `keep` is told all news, the screen how far stages are.
    """

    def tell(news: News) -> None:
        keep(news)
        if news.event == "reached":
            screen.show(news)
        elif news.aloud and isinstance(screen, SayingScreen):
            screen.say(news.line)

    with machine.reached() as machine:
        if workers == 1:
            return _in_this_process(jobs, root, tell, machine)
        queue = CONTEXT.Queue()
        with pool(min(workers, len(jobs)), _take_queue, queue) as executor:
            futures = {executor.submit(_work, job, root, machine): job.name for job in jobs}
            return _collect(futures, queue, tell)


def _in_this_process(jobs: Sequence[Job], root: Path, tell: Tell, machine: Machine) -> list[Any]:
    import torch

    threads, results = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for job in jobs:
            try:
                results.append(job.work(*job.arguments, Reporter(job.name, tell).store(root, machine).once))
            except Exception as error:
                tell(News(job.name, "", 0, 0, "failed", str(error)))
                raise
            tell(News(job.name, "", 0, 0, "finished"))
    finally:
        torch.set_num_threads(threads)
    return results


@dataclass
class Reporter:
    """Tells, as news of a job, what its store reports; how far a stage is at most every `patience` seconds."""

    job: str
    tell: Tell
    patience: float = 0.0
    stage: str = ""
    folder: Path | None = None
    last: float = 0.0

    def store(self, root: Path, machine: Machine) -> Store:
        """The store of the job."""
        return Store(root, self.report, machine, self.say, self.notice)

    def notice(self, event: str, artifact: Artifact, asked: dict[str, Any]) -> None:
        """As store.Notice."""
        self.stage, self.folder = artifact.stage, artifact.folder
        told: Event = "begun" if event == "begun" else "asked"
        self.tell(News(self.job, self.stage, 0, 0, told, folder=self.folder, asked=asked))

    def report(self, stage: str, done: int, total: int) -> None:
        """As store.Store.report."""
        if done == total or not total or time.monotonic() - self.last >= self.patience:
            self.last = time.monotonic()
            self.tell(News(self.job, stage, done, total, folder=self.folder))

    def say(self, line: str) -> None:
        """As store.Store.say."""
        aloud, rates = isinstance(line, Aloud), line.workers if isinstance(line, Aloud) else {}
        self.tell(News(self.job, self.stage, 0, 0, "said", str(line), self.folder, aloud=aloud, workers=rates))


def _collect(futures: dict[Future[Any], str], queue: Any, tell: Tell) -> list[Any]:
    pending, ended = set(futures), set[str]()  # ended: the jobs whose last news has come
    while pending:
        finished, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
        _drain(queue, tell, ended)
        for future in finished:
            error = future.exception()
            if not isinstance(error, BrokenExecutor):  # a worker that died sends no more
                _drain(queue, tell, ended, futures[future])
            tell(News(futures[future], "", 0, 0, "failed" if error else "finished", str(error or "")))
            future.result()
    return [future.result() for future in futures]


def _drain(queue: Any, tell: Tell, ended: set[str], until: str | None = None) -> None:
    """Tells the news that are there; with `until` all of that job's, as long as the next comes within PATIENCE."""
    try:
        while until is None or until not in ended:
            news = queue.get_nowait() if until is None else queue.get(timeout=PATIENCE)
            if isinstance(news, News):
                tell(news)
            else:
                ended.add(news)
    except Empty:
        pass


_queue: Any = None


def _take_queue(queue: Any) -> None:
    global _queue
    _queue = queue


def _work(job: Job, root: Path, machine: Machine) -> Any:
    try:
        return job.work(*job.arguments, Reporter(job.name, _queue.put, patience=0.2).store(root, machine).once)
    finally:
        _queue.put(job.name)  # its news end here
