"""The evaluation that people quote: AutoAttack on test images, chunk by chunk, resumable to the bit, one row per image.

A chunk is a fixed set of images that one process attacks; its state is saved on the way, and neither a kill nor the
number of processes changes which images share a batch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gambeson import distributed
from gambeson.data.imageset import ImageSet
from gambeson.errors import require
from gambeson.processes import pool
from gambeson.randomness import derive
from gambeson.robustness.attack_losses import Margin, Network, threat_of
from gambeson.robustness.attacks import APGD, PGD
from gambeson.robustness.autoattack import BLACK_BOX, AutoAttack, Standing, table_of
from gambeson.robustness.checks import Check, run_checks, square_not_stronger
from gambeson.robustness.intervals import wilson
from gambeson.robustness.verdicts import robust_after
from gambeson.store import Machine, Workspace, atomic, make_repeatable, stage, write_json

CHUNKS = "chunks"
"""The folder of what unfinished evaluations keep."""
FACTS = "facts.json"
"""The file that is written last."""


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What is measured, on which test images."""

    autoattack: AutoAttack = AutoAttack()  # the attacks whose worst case counts
    images: int | None = None  # test images, spread evenly; none: all
    curve: tuple[float, ...] = (0.25, 0.5, 0.75, 1.5, 2.0, 4.0)  # epsilons of the curve, in multiples of the threat's
    curve_attack: APGD | PGD = APGD(steps=40, loss=Margin())  # the attack of the curve
    curve_images: int = 500  # images the curve is measured on, spread evenly
    check_images: int = 200  # images of the curve that the evaluation's doubts about itself use
    batch_size: int = 256  # images in the network at once
    chunk: int = 512  # images that one process attacks together, from the first attack to the last

    def __post_init__(self) -> None:
        for name in ("curve_images", "check_images", "batch_size", "chunk"):
            require(getattr(self, name) >= 1, f"assessment {name}", "a whole number above 0", getattr(self, name))
        require(self.images is None or self.images >= 1, "assessment images", "none (all) or above 0", self.images)
        require(all(e > 0 for e in self.curve), "assessment curve", "multiples above 0 of epsilon", self.curve)


@runtime_checkable
class Subject(Protocol):
    """A classifier to be measured, which any process can open."""

    @property
    def digest(self) -> str: ...

    @property
    def gradients(self) -> bool:
        """Whether autograd can follow it; without, only black-box attacks are made."""
        ...

    def open(self, device: str) -> Network:
        """The classifier: images [B, C, H, W] in [0, 1] -> logits [B, K], in eval mode."""
        ...


def spread(total: int, wanted: int) -> np.ndarray:
    """Up to `wanted` positions, evenly spread over 0 .. total - 1."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(int))


class StateFile:
    """A journal in one file, written whole or not at all, every `seconds`."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds, self.last = path, seconds, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """What was saved last, on the CPU; None at first."""
        return torch.load(self.path, map_location="cpu", weights_only=True) if self.path.exists() else None

    def due(self) -> bool:
        """Whether `seconds` have passed since the last time."""
        return time.monotonic() - self.last >= self.seconds

    def save(self, state: dict[str, Any]) -> None:
        """Writes the state."""
        with atomic(self.path) as temporary:
            torch.save(state, temporary)
        self.last = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Images of one chunk, and where its files lie."""

    number: int
    index: np.ndarray  # of the images among the test images
    images: Tensor
    labels: Tensor
    folder: Path

    def path(self, kind: str) -> Path:
        """Its file of a kind: rows.parquet, state.pt or standing.json."""
        return self.folder / CHUNKS / f"{self.number:06d}.{kind}"

    @property
    def finished(self) -> bool:
        """Whether its rows are there."""
        return self.path("rows.parquet").exists()

    @property
    def begun(self) -> bool:
        """Whether anything of it was saved."""
        return self.finished or self.path("state.pt").exists()


def _nothing() -> None:
    pass


@dataclass
class Teller:
    """Writes down, at most every half second, how far a chunk is, and tells that there is news."""

    chunk: Chunk
    heard: Callable[[], None] = _nothing
    last: float = 0.0

    def __call__(self, standing: Standing) -> None:
        """Takes the news."""
        now = time.monotonic()
        if now - self.last > 0.5:
            self.last = now
            path = self.chunk.path("standing.json")
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(asdict(standing)))
            temporary.replace(path)
            self.heard()


def attack_chunk(spec: Assessment, tell: Teller, model: Network, seconds: float, device: str) -> None:
    """Writes the chunk's rows, going on from its saved state."""
    chunk = tell.chunk
    journal = StateFile(chunk.path("state.pt"), seconds)
    images, labels = chunk.images.to(device), chunk.labels.to(device)
    found = spec.autoattack(model, images, labels, spec.batch_size, tell, journal)
    with atomic(chunk.path("rows.parquet")) as temporary:
        pq.write_table(table_of({"index": chunk.index} | found.columns), temporary)
    for kind in ("state.pt", "standing.json"):
        chunk.path(kind).unlink(missing_ok=True)


def _attack_chunks(
    spec: Assessment,
    subject: Subject,
    chunks: list[Chunk],
    machine: Machine,
    seconds: float,
    heard: Callable[[], None] = _nothing,
) -> None:
    """The chunks in this process, one after another."""
    make_repeatable(machine)
    model = subject.open(machine.device)
    for chunk in chunks:
        attack_chunk(spec, Teller(chunk, heard), model, seconds, machine.device)
        heard()


class Ledger:
    """What is known of all chunks while they are attacked, for progress and the running robust accuracy."""

    def __init__(self, work: Workspace, chunks: list[Chunk]) -> None:
        self.work, self.chunks, self.images = work, chunks, sum(len(c.index) for c in chunks)
        self.robust: dict[int, int] = {}

    def show(self) -> None:
        """Tells progress, in images, and how many stand."""
        done, standing, known = 0.0, 0, 0
        for chunk in self.chunks:
            share, robust = self._of(chunk)
            done += share * len(chunk.index)
            if robust is not None:
                standing, known = standing + robust, known + len(chunk.index)
        self.work.progress(int(done), self.images)
        if known:
            at = wilson(standing, known)
            interval = f"{at.estimate:.1%} ({at.low:.1%} to {at.high:.1%})"
            self.work.say(f"standing so far: {standing} of {known} images begun, {interval}")

    def _of(self, chunk: Chunk) -> tuple[float, int | None]:
        """(share of the work done, images standing; None before the first news)."""
        if chunk.number in self.robust:
            return 1.0, self.robust[chunk.number]
        if chunk.finished:
            rows = pq.read_table(chunk.path("rows.parquet"), columns=["robust"])
            self.robust[chunk.number] = int(rows["robust"].to_numpy().sum())
            return 1.0, self.robust[chunk.number]
        try:
            news = json.loads(chunk.path("standing.json").read_text())
        except FileNotFoundError:
            return 0.0, None
        return news["share"], news["robust"]


def _attack_all(work: Workspace, spec: Assessment, subject: Subject, chunks: list[Chunk]) -> None:
    """This process's chunks, with its workers; under torchrun every process takes its share."""
    mine = [c for c in chunks if c.number % distributed.world() == distributed.rank() and not c.finished]
    workers, machine = min(work.machine.workers, len(mine)), replace(work.machine, workers=1)
    ledger, seconds = Ledger(work, chunks), work.checkpoint_seconds
    if not mine:
        return
    if work.machine.device == "cpu" and workers > 1:
        shares = [mine[w::workers] for w in range(workers)]
        with pool(workers) as processes:
            pending = {processes.submit(_attack_chunks, spec, subject, share, machine, seconds) for share in shares}
            while pending:
                finished, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                ledger.show()
        return
    _attack_chunks(spec, subject, mine, machine, seconds, ledger.show)


def chunks_of(spec: Assessment, real: ImageSet, folder: Path) -> list[Chunk]:
    """The test images that are measured, cut into chunks."""
    places = spread(len(real.test), spec.images or len(real.test))
    parts = [places[start : start + spec.chunk] for start in range(0, len(places), spec.chunk)]
    images, labels = real.test.images, real.test.labels
    return [
        Chunk(number=number, index=index, images=images[index], labels=labels[index], folder=folder)
        for number, index in enumerate(parts)
    ]


def curve_columns(
    spec: Assessment, model: Network, images: Tensor, labels: Tensor, seed: int, count: int, measured: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns robust@EPS, measured on the images at `measured`, NaN elsewhere; each epsilon on its own."""
    threat, columns = threat_of(spec.autoattack), {}
    for multiple in spec.curve:
        epsilon = multiple * threat.epsilon
        attack = replace(spec.curve_attack, threat=replace(threat, epsilon=epsilon))
        verdict = robust_after(attack, model, images, labels, spec.batch_size, derive(seed, "curve"))
        column = np.full(count, -1, dtype=np.int8)
        column[measured] = verdict.cpu().numpy()
        columns[f"robust@{epsilon:.6g}"] = column
    return columns


@stage(revision=1, together=True, reads_test=True)
def assess(work: Workspace, spec: Assessment, subject: Subject, real: ImageSet, *, seed: int) -> None:
    """Writes rows.parquet (one row per test image), checks.json and facts.json.

    rows: index, label, prediction, margin, robust, broken_by, precision; of every attack NAME: NAME (withstood; null:
    not tried), NAME_margin, NAME_queries, NAME_seconds; robust@EPS (null: not measured). Only seconds differ from one
    time to another.
    """
    spec = replace(spec, autoattack=replace(spec.autoattack, seed=derive(seed, "autoattack", spec.autoattack.seed)))
    if distributed.told((work.folder / FACTS).exists()):  # killed between the last file and the record of the stage
        return
    (work.folder / CHUNKS).mkdir(parents=True, exist_ok=True)
    chunks = chunks_of(spec, real, work.folder)
    if kept := sum(len(chunk.index) for chunk in chunks if chunk.begun):
        images = sum(len(chunk.index) for chunk in chunks)
        work.say(f"going on: {kept} of {images} images were begun before this start")
    _attack_all(work, spec, subject, chunks)
    distributed.wait()
    if distributed.leads():
        _finish(work, spec, subject, real, chunks, seed)
        shutil.rmtree(work.folder / CHUNKS)


def _finish(
    work: Workspace, spec: Assessment, subject: Subject, real: ImageSet, chunks: list[Chunk], seed: int
) -> None:
    """The rows of all chunks together, the curve, the doubts and the facts."""
    table = pa.concat_tables([pq.read_table(chunk.path("rows.parquet")) for chunk in chunks])
    device, index = work.machine.device, table["index"].to_numpy()
    model = subject.open(device)
    measured = spread(len(index), spec.curve_images)
    images, labels = (part[index[measured]].to(device) for part in (real.test.images, real.test.labels))
    curve: dict[str, np.ndarray] = {}
    if subject.gradients and spec.curve:
        curve = curve_columns(spec, model, images, labels, seed, len(index), measured)
    for name, column in table_of(curve).to_pydict().items():
        table = table.append_column(name, pa.array(column, pa.bool_()))
    with atomic(work.folder / "rows.parquet") as temporary:
        pq.write_table(table, temporary)
    checks = doubts(spec, model, images, labels, table, measured, seed)
    write_json(work.folder / "checks.json", [asdict(c) for c in checks])
    write_json(work.folder / FACTS, facts(spec, subject, real, len(index)))


def doubts(
    spec: Assessment, model: Network, images: Tensor, labels: Tensor, table: pa.Table, measured: np.ndarray, seed: int
) -> list[Check]:
    """The evaluation's doubts about itself, on some of the images of the curve."""
    threat, some = threat_of(spec.autoattack), spread(len(measured), spec.check_images)
    places = measured[some]
    robust = table["robust"].to_numpy()
    broken_by = np.array(table["broken_by"].to_pylist(), dtype=object)
    white = robust | np.isin(broken_by, BLACK_BOX)  # what stood before the black boxes
    names = [name for name in table.column_names if name.startswith("robust@")]
    curve = [(float(name[len("robust@") :]), float(np.mean(table[name].to_numpy()[places]))) for name in names]
    here = [(threat.epsilon, float(white[places].mean()))] if curve else []
    checks = run_checks(
        model,
        images[some],
        labels[some],
        threat,
        whitebox_robust=torch.from_numpy(white[places]).to(images.device),
        accuracies=sorted(curve + here),
        seed=derive(seed, "checks"),
    )
    if "square" in table.column_names and set(spec.autoattack.names) - set(BLACK_BOX):
        tried = table["square"].to_pylist()
        checks.append(square_not_stronger(tried.count(False), len(tried) - tried.count(None)))
    return checks


def facts(spec: Assessment, subject: Subject, real: ImageSet, count: int) -> dict[str, Any]:
    """What a reader must know to quote the number."""
    attack, threat, classes = spec.autoattack, threat_of(spec.autoattack), len(real.class_names)
    notes = attack.notes(classes)
    if not subject.gradients:
        notes.append("No gradients: only black-box attacks were made, which are weak. This is not a robust accuracy.")
    if count < len(real.test):
        notes.append(f"Measured on {count} of {len(real.test)} test images, spread evenly.")
    return {
        "version": attack.version,
        "official": attack.official and subject.gradients,
        "attacks": {name: repr(one) for name, one in attack.chosen().items()},
        "threat": str(threat),
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "precision": attack.precision,
        "gradients": subject.gradients,
        "data": real.name,
        "class_names": list(real.class_names),
        "images": count,
        "test_images": len(real.test),
        "batch_size": spec.batch_size,
        "chunk": spec.chunk,
        "notes": notes,
    }
