"""Stages that run once: each writes into the folder of its digest, `done.json` last; what is finished is never redone.

A folder is runs/stages/STAGE/DIGEST, the digest taken over the stage's name and revision, its part of the recipe, its
seed and the digests of its inputs. A killed stage leaves a folder without `done.json`; the next start resumes there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from filelock import FileLock

import gambeson
from gambeson import canonical, distributed
from gambeson.energy import joules_so_far, used
from gambeson.errors import EnvironmentFault, UserError, require
from gambeson.heritage import heritage_of, sources
from gambeson.processes import peak_memory_mb, reset_peak_memory
from gambeson.types import Progress, silent, unheard

RESUME = "state.safetensors"
"""What an unfinished stage goes on from; removed when it is finished."""
README = "README.md"
"""The card of a stage's result, for those who find it."""
NO_RESULTS = ("attempts.json", "log.jsonl", "not_finite.json", RESUME)
"""Files of a stage's folder that say how it went, or were needed on the way."""


_REDO = "It was changed after it was written: move its folder away and start the same command again to redo the stage"


@runtime_checkable
class Digested(Protocol):
    """Whatever may be the input of a stage."""

    @property
    def digest(self) -> str: ...


@runtime_checkable
class HoldsTest(Protocol):
    """An input of which stages that do not evaluate get a copy without test images."""

    def without_test(self) -> Any: ...


def alive(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def sweep(folder: Path) -> None:
    """Removes what processes that are dead left half-written below a folder."""
    for path in folder.rglob(".*.part"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not alive(int(pid)):
            path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours. Raises EnvironmentFault, naming it, where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EnvironmentFault(f"{path}: expected JSON, got damaged text ({error}). {_REDO}") from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed.

    No two processes share it, on this machine or on any other: process ids alone repeat among containers and machines
    that share a folder. Raises EnvironmentFault, naming the file, when the disk is full or nothing may be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: expected to write this file, got: {error.strerror or error}. Nothing half-written was kept; free "
            "some space or choose another folder (--runs DIR, --out PATH), then start the same command again, which "
            "resumes"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def open_folder(folder: Path) -> None:
    """Makes a folder. Raises EnvironmentFault, naming it, where nothing may be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{folder}: expected a folder I may write to, got: {error.strerror}. Choose another with --runs DIR "
            "(or --out PATH)"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where stages compute, and in what portions: none of it in a recipe, all of it in the execution record."""

    device: str = "cpu"  # torch's name of the device: cpu, cuda, cuda:1, mps
    micro_batch: int | None = None  # images of a block that are in the networks at once; none: the whole block
    workers: int = 1  # processes of one thread that a stage may use for its blocks; their number changes no bit
    compile: bool = False  # networks in training go through torch.compile: a minute first, then faster

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", "at least 1", self.workers)
        require(self.micro_batch is None or self.micro_batch >= 1, "micro-batch", "at least 1", self.micro_batch)
        if self.device != "cpu":
            self._probe()

    def _probe(self) -> None:
        """UserError where there is no such device; a process of several looks at its own card, when it knows it."""
        if self.device == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device: expected one that this machine has, got {self.device!r} ({str(error).splitlines()[0]}); "
                f"cuda is {'there' if torch.cuda.is_available() else 'not there'}, cpu always works"
            ) from None


def make_repeatable(machine: Machine) -> None:
    """On CUDA: deterministic kernels only, so that the same work gives the same bits; the CPU needs nothing."""
    if machine.device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs, for nothing
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32


def execution(machine: Machine = Machine(), config: Any = None, together: bool = False) -> dict[str, Any]:
    """What bit-identity depends on besides the recipe (METHOD 1.3): recorded beside every stage.

    `config` is the stage's part of the recipe in plain form, which says whether it computes in lower precision.
    `together`: the stage computes in this process (and its like), not in workers of one thread.
    """
    on_gpu = machine.device.startswith("cuda")
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(machine.device) if on_gpu else machine.device,
        "dtype": "bfloat16" if '"bfloat16"' in json.dumps(config) else "float32",
        "threads": 1 if machine.workers > 1 and not together else torch.get_num_threads(),  # of each process
        "machine": platform.machine(),
        "micro_batch": machine.micro_batch,
        "compiled": machine.compile,
        "processes": distributed.world(),  # that train together
    }


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    import numpy
    import scipy
    import sklearn

    libraries = {m.__name__: m.__version__ for m in (torch, numpy, scipy, sklearn)}
    return {"gambeson": gambeson.__version__, "python": platform.python_version(), **libraries}


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
            raise EnvironmentFault(f"{path}: expected a file of the finished stage '{self.stage}', found none. {_REDO}")
        if checksum(path) != expected:
            raise EnvironmentFault(f"{path}: expected SHA-256 {expected[:16]}..., got another content. {_REDO}")
        return path

    @property
    def finished(self) -> bool:
        """Whether its work has been done."""
        return (self.folder / "done.json").exists()

    @property
    def record(self) -> dict[str, Any]:
        """done.json: configuration, inputs, execution, time, memory, files."""
        return read_json(self.folder / "done.json")

    @property
    def heritage(self) -> dict[str, Any]:
        """What it carries from all that it was made from (heritage.py); empty for one of an earlier version."""
        return {**(self.record.get("heritage") or {} if self.finished else {}), "stage": self.stage}


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
                if made := distributed.told(not artifact.finished):
                    self._work(stage, artifact, asked, config, inputs, seed)
                distributed.wait()
        self.report(stage.name, int(made), 0)
        return artifact

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
        sweep(artifact.folder)
        attempts = _attempts(artifact.folder)
        execution_now = execution(self.machine, asked["config"], stage.together)
        write_json(artifact.folder / "attempts.json", [*attempts, {"began": time.time(), **execution_now}])
        start, energy = time.monotonic(), None if attempts else joules_so_far(self.machine.device)
        reset_peak_memory()
        with contextlib.nullcontext() if stage.together else distributed.apart():
            stage.work(workspace, config, *inputs, **arguments)
        facts = {
            **asked,
            "digest": artifact.digest,
            "execution": execution_now,
            "heritage": heritage,
            "sources": sources(stage.work, inputs),
            "versions": versions(),
        }
        if stage.card is not None:  # before the record, which has its checksum; without a clock, as equal work is equal
            with atomic(artifact.folder / README) as temporary:
                temporary.write_text(stage.card(artifact.folder, facts), encoding="utf-8")
        record = {
            **facts,
            "attempts": len(attempts) + 1,
            "bit_identical": all(a | execution_now == a for a in attempts),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": time.monotonic() - start + sum(a["worked"] for a in attempts),
            "peak_mb": peak_memory_mb(),
            **used(self.machine.device, energy),  # of work that was not interrupted
            "files": {p.name: checksum(p) for p in sorted(artifact.folder.iterdir()) if _is_result(p)},
        }
        write_json(artifact.folder / "done.json", record)
        (artifact.folder / RESUME).unlink(missing_ok=True)


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
