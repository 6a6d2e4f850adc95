"""The evaluation that people quote: AutoAttack on test images, chunk by chunk, resumable to the bit, one row per image.

A chunk is a fixed set of images that one process attacks; its state is saved on the way, and neither a kill nor the
number of processes changes which images share a batch. So it is with the points of the curve of accuracies.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gambeson import distributed
from gambeson.data.imageset import ImageSet, spread
from gambeson.disk import atomic, write_json
from gambeson.errors import require
from gambeson.machine import Machine, make_repeatable
from gambeson.processes import pool
from gambeson.randomness import derive
from gambeson.robustness.attack_losses import Margin, Network, threat_of
from gambeson.robustness.attacks import APGD, PGD
from gambeson.robustness.autoattack import BLACK_BOX, AutoAttack, expected_cost, table_of
from gambeson.robustness.checks import Check, run_checks, square_not_stronger
from gambeson.robustness.chunks import CHUNKS, Chunk, CurvePart, Ledger, Part, StateFile, Teller, nothing, tidy
from gambeson.robustness.kept import Held, Kept, Pictures, table_at
from gambeson.robustness.verdicts import robust_after
from gambeson.store import Workspace, stage

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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a process needs to make its share of the parts. What workers are sent has no image in it."""

    spec: Assessment
    subject: Subject
    pictures: Pictures  # those that are measured
    seed: int
    machine: Machine
    seconds: float  # between two states

    def make(self, parts: list[Part], heard: Callable[[], None] = nothing) -> None:
        """The parts in this process, one after another; `heard` is called when there is news of them."""
        make_repeatable(self.machine)
        model = self.subject.open(self.machine.device)
        for part in parts:
            if isinstance(part, Chunk):
                self._attack(part, model, Teller(part, heard))
            elif isinstance(part, CurvePart):
                self._measure(part, model, Teller(part, heard))
            tidy(part)
            heard()

    def _attack(self, chunk: Chunk, model: Network, teller: Teller) -> None:
        """Writes the chunk's rows, going on from its saved state."""
        journal, device = StateFile(chunk.path("state.pt"), self.seconds), self.machine.device
        part = self.pictures.some(chunk.which)
        images, labels = part.images.to(device), part.labels.to(device)
        found = self.spec.autoattack(model, images, labels, self.spec.batch_size, teller.standing, journal)
        with atomic(chunk.path("rows.parquet")) as temporary:
            pq.write_table(table_of({"index": chunk.index} | found.columns), temporary)

    def _measure(self, point: CurvePart, model: Network, teller: Teller) -> None:
        """Writes whether each image of the curve stands at this epsilon."""
        threat, device = threat_of(self.spec.autoattack), self.machine.device
        attack = replace(self.spec.curve_attack, threat=replace(threat, epsilon=point.epsilon))
        part = self.pictures.some(point.which)
        images, labels, seed = part.images.to(device), part.labels.to(device), derive(self.seed, "curve")
        right = robust_after(attack, model, images, labels, self.spec.batch_size, seed, teller.point)
        with atomic(point.path("rows.parquet")) as temporary:
            pq.write_table(pa.table({"robust": right.cpu().numpy()}), temporary)


def chosen(spec: Assessment, real: ImageSet) -> np.ndarray:
    """The places of the images that are measured among the test images."""
    return spread(len(real.test), spec.images or len(real.test))


def chunks_of(spec: Assessment, real: ImageSet, folder: Path) -> list[Chunk]:
    """The test images that are measured, cut into chunks."""
    places = chosen(spec, real)
    parts = [(start, places[start : start + spec.chunk]) for start in range(0, len(places), spec.chunk)]
    return [
        Chunk(folder=folder, name=f"{number:06d}", images=len(index), index=index, start=start)
        for number, (start, index) in enumerate(parts)
    ]


def curve_of(spec: Assessment, subject: Subject, real: ImageSet, folder: Path) -> list[CurvePart]:
    """The points of the curve, each on the same images; none without gradients."""
    which = spread(len(chosen(spec, real)), spec.curve_images)
    epsilons = [multiple * threat_of(spec.autoattack).epsilon for multiple in spec.curve] if subject.gradients else []
    columns = {f"robust@{epsilon:.6g}": epsilon for epsilon in epsilons}
    return [
        CurvePart(folder=folder, name=f"curve-{k:03d}", images=len(which), epsilon=epsilon, column=column, which=which)
        for k, (column, epsilon) in enumerate(columns.items())
    ]


def _make_all(work: Workspace, plan: Plan, real: ImageSet, chunks: list[Chunk], curve: list[CurvePart]) -> None:
    """This process's parts, with its workers; under torchrun every process takes its share.

    One chunk alone is attacked in this process, with all its threads, and so is its curve.
    """
    every, world, rank = [*chunks, *curve], distributed.world(), distributed.rank()
    mine = [part for number, part in enumerate(every) if number % world == rank and not part.finished]
    spec, machine = plan.spec, work.machine
    whole = sum(expected_cost(attack, len(real.class_names)) for attack in spec.autoattack.chosen().values())
    steps = spec.curve_attack.steps * spec.curve_attack.restarts
    ledger = Ledger(work, chunks, curve, 3.0 * steps / whole)
    if machine.device != "cpu" or machine.workers == 1 or len(chunks) == 1:
        if mine:
            plan.make(mine, ledger.show)
    elif mine:
        kept = Kept.written(real.test, chosen(spec, real), work.folder / CHUNKS / f"images-{rank}")
        _side_by_side(replace(plan, pictures=kept), mine, machine.workers, ledger)
    ledger.show()


def _side_by_side(plan: Plan, parts: list[Part], workers: int, ledger: Ledger) -> None:
    """The parts in several processes of one thread."""
    shares = [share for w in range(workers) if (share := parts[w::workers])]
    with pool(len(shares)) as processes:
        pending = {processes.submit(plan.make, share) for share in shares}
        while pending:
            finished, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            ledger.show()


@stage(revision=2, together=True, reads_test=True)
def assess(work: Workspace, spec: Assessment, subject: Subject, real: ImageSet, *, seed: int) -> None:
    """Writes rows.parquet (one row per test image), checks.json and facts.json.

    rows: index, label, prediction, margin, robust, broken_by, precision; of every attack NAME: NAME (withstood; null:
    not tried), NAME_margin, NAME_queries, NAME_seconds; robust@EPS (null: not measured). Only seconds differ from one
    time to another.
    """
    spec = replace(spec, autoattack=replace(spec.autoattack, seed=derive(seed, "autoattack", spec.autoattack.seed)))
    if not distributed.told((work.folder / FACTS).exists()):  # killed between the last file and the stage's record
        (work.folder / CHUNKS).mkdir(parents=True, exist_ok=True)
        chunks, curve = chunks_of(spec, real, work.folder), curve_of(spec, subject, real, work.folder)
        if kept := sum(chunk.images for chunk in chunks if chunk.begun):
            images = sum(chunk.images for chunk in chunks)
            work.say(f"going on: {kept} of {images} images were begun before this start")
        plan = Plan(
            spec=spec,
            subject=subject,
            pictures=Held(real.test, chosen(spec, real)),
            seed=seed,
            machine=replace(work.machine, workers=1),
            seconds=work.checkpoint_seconds,
        )
        _make_all(work, plan, real, chunks, curve)
        distributed.wait()
        if distributed.leads():
            _finish(work, plan, real, chunks, curve)
    if distributed.leads():
        shutil.rmtree(work.folder / CHUNKS, ignore_errors=True)


def _finish(work: Workspace, plan: Plan, real: ImageSet, chunks: list[Chunk], curve: list[CurvePart]) -> None:
    """The rows of all chunks together, the curve, the doubts and the facts."""
    table = pa.concat_tables([table_at(chunk.path("rows.parquet")) for chunk in chunks])
    for point in curve:
        verdicts = np.full(len(table), -1, dtype=np.int8)
        verdicts[point.which] = table_at(point.path("rows.parquet"))["robust"].to_numpy()
        table = table.append_column(point.column, table_of({point.column: verdicts})[point.column])
    with atomic(work.folder / "rows.parquet") as temporary:
        pq.write_table(table, temporary)
    work.say("checks: the evaluation doubts itself")
    write_json(work.folder / "checks.json", [asdict(check) for check in doubts(plan, table)])
    write_json(work.folder / FACTS, facts(plan.spec, plan.subject, real, len(table)))


def doubts(plan: Plan, table: pa.Table) -> list[Check]:
    """The evaluation's doubts about itself, on some of the images of the curve."""
    spec, device = plan.spec, plan.machine.device
    measured = spread(len(table), spec.curve_images)
    places = measured[spread(len(measured), spec.check_images)]
    part, threat = plan.pictures.some(places), threat_of(spec.autoattack)
    white = stood_white_box(spec, table)
    names = [name for name in table.column_names if name.startswith("robust@")]
    curve = [(float(name[len("robust@") :]), float(np.mean(table[name].to_numpy()[places]))) for name in names]
    here = [(threat.epsilon, float(white[places].mean()))] if curve else []
    checks = run_checks(
        plan.subject.open(device),
        part.images.to(device),
        part.labels.to(device),
        threat,
        whitebox_robust=torch.from_numpy(white[places]).to(device),
        accuracies=sorted(curve + here),
        seed=derive(plan.seed, "checks"),
        batch_size=spec.batch_size,
        gradients=plan.subject.gradients,
    )
    if _after_gradients(spec):
        tried = table["square"].to_pylist()
        checks.append(square_not_stronger(tried.count(False), len(tried) - tried.count(None)))
    return checks


def _after_gradients(spec: Assessment) -> bool:
    """Whether Square saw what attacks with gradients had left: only then does it tell of them."""
    names = spec.autoattack.names
    return "square" in names and bool(set(names[: names.index("square")]) - set(BLACK_BOX))


def stood_white_box(spec: Assessment, table: pa.Table) -> np.ndarray:
    """[N] bool: what stood before the black box had its turn; all that stood, where no gradients came before it."""
    robust = table["robust"].to_numpy()
    broken_by = np.array(table["broken_by"].to_pylist(), dtype=object)
    return robust | np.isin(broken_by, BLACK_BOX) if _after_gradients(spec) else robust


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
