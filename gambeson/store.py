"""Stages that run once: each writes into the folder of its digest, `done.json` last; what is finished is never redone.

A folder is runs/stages/STAGE/DIGEST, the digest taken over the stage's name and revision, its part of the recipe, its
seed and the digests of its inputs. A killed stage leaves a folder without `done.json`; the next start resumes there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from filelock import FileLock

from gambeson import canonical, distributed, mirror
from gambeson.disk import REDO, atomic, checksum, open_folder, read_json, sweep, write_json
from gambeson.energy import joules_so_far, used
from gambeson.errors import EnvironmentFault
from gambeson.heritage import heritage_of, sources, told
from gambeson.machine import Machine, execution, make_repeatable, versions
from gambeson.processes import peak_memory_mb, reset_peak_memory
from gambeson.types import Progress, silent, unheard

RESUME = "state.safetensors"
"""What an unfinished stage goes on from; removed when it is finished."""
README = "README.md"
"""The card of a stage's result, for those who find it."""
NO_RESULTS = ("attempts.json", "log.jsonl", "not_finite.json", RESUME)
"""Files of a stage's folder that say how it went, or were needed on the way."""


@runtime_checkable
class Digested(Protocol):
    """Whatever may be the input of a stage."""

    @property
    def digest(self) -> str: ...


@runtime_checkable
class HoldsTest(Protocol):
    """An input of which stages that do not evaluate get a copy without test images."""

    def without_test(self) -> Any: ...


@dataclass(frozen=True)
class Artifact:
    """A finished stage."""

    stage: str
    digest: str
    folder: Path

    def file(self, name: str) -> Path:
        """The path of one of its files, its checksum verified. Raises EnvironmentFault naming a changed file."""
        path, expected = self.folder / name, self.record["files"].get(name)
        if expected is None or not path.is_file():
            raise EnvironmentFault(f"{path}: expected a file of the finished stage '{self.stage}', found none. {REDO}")
        if checksum(path) != expected:
            raise EnvironmentFault(f"{path}: expected SHA-256 {expected[:16]}..., got another content. {REDO}")
        return path

    @property
    def finished(self) -> bool:
        """Whether its work has been done."""
        return (self.folder / "done.json").exists()

    @property
    def record(self) -> dict[str, Any]:
        """done.json: configuration, inputs, execution, time, memory, files; fetched, with them, from a mirror."""
        mirror.brought(self.folder)
        return read_json(self.folder / "done.json")

    @property
    def heritage(self) -> dict[str, Any]:
        """What it carries from all that it was made from (heritage.py); of one of an earlier version what its images
        say."""
        found = self.record.get("heritage") if self.finished else None
        if found is None and (self.folder / "images" / "store.json").exists():
            found = told(read_json(self.folder / "images" / "store.json").get("provenance") or {})
        return {**(found or {}), "stage": self.stage}


@dataclass(frozen=True)
class Workspace:
    """What a stage function gets: where to write, whom to tell, and how often to save its state."""

    folder: Path
    progress: Progress = silent
    machine: Machine = Machine()
    checkpoint_seconds: float = field(default_factory=lambda: float(os.environ.get("GAMBESON_CHECKPOINT_SECONDS", 10)))
    say: Callable[[str], None] = unheard  # takes a line about how it goes, for a person
    heritage: dict[str, Any] = field(default_factory=dict)  # what its result inherits from the inputs


@dataclass(frozen=True)
class Stage:
    """A function (workspace, config, *inputs, seed) that fills a folder; `revision` rises when its meaning changes."""

    name: str
    revision: int
    work: Callable[..., None]
    together: bool = False  # whether processes that train together all do it; otherwise the first one alone
    reads_test: bool = False  # whether it evaluates; the others cannot read test images
    card: Callable[[Path, dict[str, Any]], str] | None = None  # README.md of what it made: folder and record -> text

    def given(self, inputs: tuple) -> tuple:
        """What the function gets of these inputs."""
        if self.reads_test:
            return inputs
        return tuple(given.without_test() if isinstance(given, HoldsTest) else given for given in inputs)


def stage(
    revision: int, together: bool = False, reads_test: bool = False, card: Callable[[Path, dict], str] | None = None
) -> Callable[[Callable[..., None]], Stage]:
    """Makes a stage of a function. One done `together` writes its results in the process that leads only; one that does
    not say `reads_test` gets image sets whose test part raises when it is read."""
    return lambda work: Stage(work.__name__, revision, work, together, reads_test, card)


Notice = Callable[[str, Artifact, dict[str, Any]], None]
"""("asked" or "begun", the stage, what it is made of: `Store.asked`), before it is looked for and when its work begins.

Between the two a process waits for another that makes the same stage."""


def unnoticed(event: str, artifact: Artifact, asked: dict[str, Any]) -> None:
    """Tells nobody of a stage."""


@dataclass(frozen=True)
class Store:
    """The content-addressed store of stages below `root`.

    `report` is told (stage, done, total) as a stage advances, and at its end (stage, 1, 0) if it was made now,
    (stage, 0, 0) if it was there already. `say` gets what a stage tells a person on the way. `notice` is told which
    stage is asked for, and when its work begins.
    """

    root: Path
    report: Callable[[str, int, int], None] = lambda stage, done, total: None
    machine: Machine = Machine()
    say: Callable[[str], None] = unheard
    notice: Notice = unnoticed

    def once(self, stage: Stage, config: Any, *inputs: Digested | None, seed: int | None = None) -> Artifact:
        """The finished stage for this configuration, seed and inputs: found, resumed or made.

        Processes that want the same stage at the same time wait for the first; a killed one's lock is freed by the
        kernel.
        """
        asked = self.asked(stage, config, *inputs, seed=seed)
        artifact, made = self.artifact(asked), False
        self.notice("asked", artifact, asked)
        if not distributed.told(artifact.finished):
            with self._locked(artifact):
                if made := distributed.told(not mirror.brought(artifact.folder)):
                    self._work(stage, artifact, asked, config, inputs, seed)
                self._shared(artifact)
                distributed.wait()
        self._shared(artifact)
        self.report(stage.name, int(made), 0)
        return artifact

    def sought(self, stage: Stage, config: Any, *inputs: Digested | None, seed: int | None = None) -> Artifact:
        """The stage that `once` would find or make, made or not; nothing is made."""
        return self.artifact(self.asked(stage, config, *inputs, seed=seed))

    @staticmethod
    def _shared(artifact: Artifact) -> None:
        """A stage that is finished, in the object store if there is one; and here, also in processes that did not make
        it."""
        mirror.delivered(artifact.folder) if distributed.leads() else mirror.brought(artifact.folder)

    @staticmethod
    def asked(stage: Stage, config: Any, *inputs: Digested | None, seed: int | None = None) -> dict[str, Any]:
        """All that a stage's digest is taken over."""
        return {
            "stage": stage.name,
            "revision": stage.revision,
            "config": canonical.plain(config, drop_neutral=True),
            "inputs": distributed.told(_digests(inputs) if distributed.leads() else None),
            "seed": seed,
        }

    def artifact(self, asked: dict[str, Any]) -> Artifact:
        """Where a stage is, or will be; nothing is made."""
        digest = canonical.digest(asked)
        return Artifact(asked["stage"], digest, self.root / "stages" / asked["stage"] / digest[:16])

    @staticmethod
    @contextlib.contextmanager
    def _locked(artifact: Artifact) -> Iterator[None]:
        """Holds the stage's lock; of processes that train together the first holds it for all."""
        open_folder(artifact.folder)
        with FileLock(artifact.folder / ".lock") if distributed.leads() else contextlib.nullcontext():
            yield

    def _work(
        self, stage: Stage, artifact: Artifact, asked: dict, config: Any, inputs: tuple, seed: int | None
    ) -> None:
        """The stage's work: by all processes or the first alone; the record is the first's."""
        make_repeatable(self.machine)
        inputs = stage.given(inputs)
        report, heritage = lambda done, total: self.report(stage.name, done, total), heritage_of(inputs)
        workspace = Workspace(artifact.folder, report, self.machine, say=self.say, heritage=heritage)
        arguments = {} if seed is None else {"seed": seed}
        if not distributed.leads():
            if stage.together:
                stage.work(workspace, config, *inputs, **arguments)
            return
        self.notice("begun", artifact, asked)
        mirror.ready(artifact.folder)
        sweep(artifact.folder)
        attempts = _attempts(artifact.folder)
        execution_now = execution(self.machine, asked["config"], stage.together)
        write_json(artifact.folder / "attempts.json", [*attempts, {"began": time.time(), **execution_now}])
        start, energy = time.monotonic(), None if attempts else joules_so_far(self.machine.device)
        reset_peak_memory()
        with contextlib.nullcontext() if stage.together else distributed.apart():
            stage.work(workspace, config, *inputs, **arguments)
        sweep(artifact.folder)  # what workers left that were killed while others went on
        facts = {
            **asked,
            "digest": artifact.digest,
            "execution": execution_now,
            "heritage": heritage,
            "sources": sources(stage.work, inputs),
            "versions": versions(),
        }
        self._write_card(stage, artifact, facts)  # before the record, which has its checksum
        record = {
            **facts,
            "attempts": len(attempts) + 1,
            "processes": sorted({a.get("processes", 1) for a in [*attempts, execution_now]}),  # of each attempt
            "bit_identical": all(a | execution_now == a for a in attempts),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": time.monotonic() - start + sum(a["worked"] for a in attempts),
            "peak_mb": peak_memory_mb(),
            **used(self.machine.device, energy),  # of work that was not interrupted
            "files": {p.name: checksum(p) for p in sorted(artifact.folder.iterdir()) if _is_result(p)},
        }
        write_json(artifact.folder / "done.json", record)
        (artifact.folder / RESUME).unlink(missing_ok=True)

    def _write_card(self, stage: Stage, artifact: Artifact, facts: dict[str, Any]) -> None:
        """README.md, without a clock, as equal work is equal. A fault in a card's text fails no finished work."""
        if stage.card is None:
            return
        try:
            text = stage.card(artifact.folder, facts)
        except Exception as error:
            self.say(f"{stage.name}: its card could not be written ({type(error).__name__}: {error})")
            return
        with atomic(artifact.folder / README) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _digests(inputs: Iterable[Digested | None]) -> list[str | None]:
    return [i.digest if i is not None else None for i in inputs]


def _attempts(folder: Path) -> list[dict[str, Any]]:
    """Earlier starts of an unfinished stage; `worked` seconds: from the start to the last file that it wrote."""
    path = folder / "attempts.json"
    attempts = read_json(path) if path.exists() else []
    if attempts and "worked" not in attempts[-1]:
        last = max(p.stat().st_mtime for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
        attempts[-1]["worked"] = max(last - attempts[-1]["began"], 0.0)
    return attempts


def _is_result(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.name not in NO_RESULTS
