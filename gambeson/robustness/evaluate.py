"""Measures a classifier on the test images: one row per image, every published number is a query over rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gambeson.data.datasets import ImageSet, Split
from gambeson.data.imageset import spread
from gambeson.disk import atomic, write_json
from gambeson.models.classifiers import load_classifier
from gambeson.robustness.attacks import APGD, PGD, TargetedAPGD
from gambeson.robustness.checks import run_checks
from gambeson.robustness.verdicts import robust_after
from gambeson.store import Artifact, Workspace, stage
from gambeson.threat import ThreatModel
from gambeson.types import Classifier


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The attacks that a classifier must stand."""

    pgd: PGD = PGD(steps=40, restarts=3)  # plain PGD, on every image
    apgd: APGD = APGD(steps=100)  # AutoPGD on cross-entropy, on every image
    targeted: TargetedAPGD = TargetedAPGD(steps=100)  # targeted AutoPGD, on what the untargeted one left
    curve: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # epsilons of the accuracy curve
    curve_attack: PGD = PGD(steps=20, restarts=1)  # the attack of the curve
    curve_images: int = 500  # test images the curve is measured on, spread evenly
    check_images: int = 200  # images of the curve that the checks of the evaluation use, spread evenly
    batch_size: int = 256  # images per batch

    def __post_init__(self) -> None:
        for name in ("curve_images", "check_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name}: expected a whole number above 0, got {getattr(self, name)}")
        if any(not 0 < epsilon <= 1 for epsilon in self.curve):
            raise ValueError(f"evaluation.curve: expected epsilons above 0 and up to 1, got {self.curve}")


Columns = dict[str, np.ndarray]
"""Column name -> one value per image."""


def evaluate_rows(spec: Evaluation, model: Classifier, part: Split, seed: int, work: Workspace) -> Columns:
    """Columns of one row per image: label, clean prediction and margin, and whether each attack was withstood.

    `apgd` is the worst case of `apgd_ce` and `apgd_t`; `apgd_t` is tried only where `apgd_ce` failed, False elsewhere.
    `robust@EPS` columns are measured on a subset, NaN elsewhere, each epsilon on its own.
    """
    total = 3 + len(spec.curve)
    with torch.no_grad():
        logits = torch.cat([model(images) for images in part.images.split(spec.batch_size)])
    right = logits.gather(1, part.labels[:, None])[:, 0]
    others = logits.scatter(1, part.labels[:, None], -torch.inf).amax(1)
    rows = {"label": part.labels, "prediction": logits.argmax(1), "margin": (right - others).double()}
    for done, name in enumerate(("pgd", "apgd")):
        column = "apgd_ce" if name == "apgd" else name
        rows[column] = robust_after(getattr(spec, name), model, part.images, part.labels, spec.batch_size, seed)
        work.progress(done + 1, total)
    left = rows["apgd_ce"].nonzero()[:, 0]
    rows["apgd_t"] = torch.zeros_like(rows["apgd_ce"])
    if len(left):
        images, labels = part.images[left], part.labels[left]
        rows["apgd_t"][left] = robust_after(spec.targeted, model, images, labels, spec.batch_size, seed)
    rows["apgd"] = rows["apgd_ce"] & rows["apgd_t"]
    work.progress(3, total)
    return {name: column.cpu().numpy() for name, column in rows.items()} | _curve(spec, model, part, seed, work)


def _curve(spec: Evaluation, model: Classifier, part: Split, seed: int, work: Workspace) -> Columns:
    places = spread(len(part), spec.curve_images)
    threat = spec.curve_attack.threat
    assert isinstance(threat, ThreatModel)
    columns = {}
    for done, epsilon in enumerate(spec.curve):
        attack = replace(spec.curve_attack, threat=replace(threat, epsilon=epsilon))
        verdict = robust_after(attack, model, part.images[places], part.labels[places], spec.batch_size, seed)
        columns[f"robust@{epsilon:g}"] = np.full(len(part), np.nan)
        columns[f"robust@{epsilon:g}"][places] = verdict.cpu().numpy()
        work.progress(4 + done, 3 + len(spec.curve))
    return columns


def rows_table(columns: Columns, seed: int) -> pa.Table:
    """Rows as a table: NaN of the `robust@` columns becomes null."""
    size = len(columns["label"])
    table: dict[str, pa.Array] = {"seed": pa.array(np.full(size, seed)), "index": pa.array(np.arange(size))}
    for name, values in columns.items():
        if name.startswith("robust@"):
            table[name] = pa.array([None if np.isnan(v) else bool(v) for v in values], pa.bool_())
        else:
            table[name] = pa.array(values)
    return pa.table(table)


@stage(revision=2, reads_test=True)
def evaluate(work: Workspace, spec: Evaluation, student: Artifact, real: ImageSet, *, seed: int) -> None:
    """Writes rows.parquet (one row per test image) and checks.json (the evaluation's doubts about itself)."""
    device = work.machine.device
    model = load_classifier(student.file("classifier.safetensors")).to(device)
    test = Split(real.test.images.to(device), real.test.labels.to(device))
    columns = evaluate_rows(spec, model, test, seed, work)
    with atomic(work.folder / "rows.parquet") as temporary:
        pq.write_table(rows_table(columns, seed), temporary)
    measured = spread(len(real.test), spec.curve_images)
    places = measured[spread(len(measured), spec.check_images)]
    curve = [(e, float(columns[f"robust@{e:g}"][places].mean())) for e in spec.curve]
    threat = spec.pgd.threat
    assert isinstance(threat, ThreatModel)
    verdicts = {name: torch.from_numpy(columns[name][places]).to(device) for name in ("pgd", "apgd")}
    checks = run_checks(
        model,
        test.images[places],
        test.labels[places],
        threat,
        whitebox_robust=verdicts["apgd"],
        accuracies=curve if len(curve) > 1 else (),
        pgd_robust=verdicts["pgd"],
        apgd_robust=verdicts["apgd"],
        seed=seed,
        batch_size=spec.batch_size,
    )
    write_json(work.folder / "checks.json", [asdict(c) for c in checks])
