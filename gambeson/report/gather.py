"""Collects from a finished run what its page needs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from gambeson.data.datasets import ImageSet
from gambeson.data.mixture import from_uint8
from gambeson.data.synthetic import SyntheticStore
from gambeson.models.classifiers import load_classifier
from gambeson.models.files import load_tensors
from gambeson.pipeline import Chapter
from gambeson.recipe import Arm, Recipe
from gambeson.report.material import (
    ArmMaterial,
    AutoAttackMaterial,
    CheckRecord,
    FeatureSet,
    Grids,
    RunMaterial,
    StageRecord,
    TrainingCurve,
)
from gambeson.robustness.evaluate import spread
from gambeson.run import Run
from gambeson.store import Artifact

PER_CLASS = 6  # images of each class in the sample grids
SHOWN = 300  # images of each set in the embedding


def gather(run: Run) -> RunMaterial:
    """Everything the page shows, read from the run folder and its stages."""
    recipe, facts = run.recipe, run.facts
    real = recipe.data.load()
    first = {c.arm: c for c in run.chapters if c.seed == recipe.seed}
    return RunMaterial(
        name=run.folder.name,
        title=f"{recipe.name}: robustness from synthetic images",
        recipe_text=(run.folder / "recipe.yaml").read_text(encoding="utf-8"),
        digest=recipe.digest,
        threat=str(recipe.threat),
        epsilon=recipe.threat.epsilon,
        class_names=real.class_names,
        counts={"train": len(real.train), "validation": len(real.validation), "test": len(real.test)},
        arms=tuple(_arm(run, arm) for arm in recipe.arms),
        grids=_grids(first, len(real.class_names)),
        features=_features(first, real),
        stages=_stages(run),
        checks=tuple(check for chapter in run.chapters for check in _checks(chapter)),
        autoattack=tuple(map(_autoattack, (c for c in run.chapters if "autoattack" in c.artifacts))),
        versions=facts["versions"],
        command=facts["command"],
        created=facts["finished"],
        attacks=_attacks(recipe),
    )


def _attacks(recipe: Recipe) -> dict[str, str]:
    e = recipe.evaluation
    most = e.targeted.targets
    towards = "every other class" if most is None else f"each of the {most} most likely other classes"
    return {
        "pgd": f"{e.pgd.steps} steps, {e.pgd.restarts} restarts, margin loss",
        "apgd": f"APGD-CE ({e.apgd.steps} steps), then targeted APGD ({e.targeted.steps} steps for {towards})",
        "curve": f"PGD with {e.curve_attack.steps} steps on {e.curve_images} test images",
    }


def _arm(run: Run, arm: Arm) -> ArmMaterial:
    rows = run.rows()
    mine = rows.filter(pc.field("arm") == arm.value).drop_columns(["arm"])
    curves = tuple(_curve(c) for c in run.chapters if c.arm is arm)
    return ArmMaterial(key=arm.value, title=arm.title, rows=mine if len(mine) else None, curves=curves)


def _curve(chapter: Chapter) -> TrainingCurve:
    log: list[dict[str, Any]] = load_tensors(chapter.artifacts["student"].file("classifier.safetensors"))[1]["log"]
    steps = [r["step"] for r in log]
    return TrainingCurve(
        seed=chapter.seed,
        steps=steps,
        loss=[r["loss"] for r in log],
        validation_steps=steps,
        validation_clean=[r["clean"] for r in log],
        validation_robust=[r["robust"] for r in log],
    )


def _images(chapter: Chapter | None) -> tuple[SyntheticStore, np.ndarray] | None:
    """The synthetic images of an arm, and the labels that the student was given with them."""
    if chapter is None:
        return None
    labels = pq.read_table(chapter.artifacts["labelled"].file("labels.parquet"), columns=["label"])["label"]
    return SyntheticStore.open(chapter.artifacts["synthetic"].folder / "images"), labels.to_numpy()


def _grids(first: dict[Arm, Chapter], classes: int) -> Grids | None:
    """The first images of each class, plain and guided from the same noise."""
    plain, guided = (_class_rows(_images(first.get(arm)), classes) for arm in (Arm.PLAIN, Arm.GUIDED))
    return Grids(plain=plain, guided=guided) if plain is not None or guided is not None else None


def _class_rows(made: tuple[SyntheticStore, np.ndarray] | None, classes: int) -> np.ndarray | None:
    if made is None:
        return None
    store, labels = made
    places = [np.flatnonzero(labels == k)[:PER_CLASS] for k in range(classes)]
    fewest = min(len(p) for p in places)
    if fewest == 0:
        return None
    images = store.read(np.concatenate([p[:fewest] for p in places]))[0]
    return images.reshape(classes, fewest, *store.shape)


def _features(first: dict[Arm, Chapter], real: ImageSet) -> tuple[FeatureSet, ...]:
    """Real, plain and guided images in the feature space of the teacher, or of the real-only student without one."""
    model_of = next((c.artifacts["teacher"] for c in first.values() if "teacher" in c.artifacts), None)
    if model_of is None:
        return ()
    model, space = load_classifier(model_of.file("classifier.safetensors")), "standard teacher, penultimate layer"
    some = spread(len(real.train), SHOWN)  # of a set in the order of its classes, too
    sets = [("real", real.train.images[some], real.train.labels[some].numpy())]
    for arm in (Arm.PLAIN, Arm.GUIDED):
        made = _images(first.get(arm))
        if made is not None:
            store, labels = made
            pixels, _ = store.read(np.arange(min(SHOWN, len(store))))
            sets.append((arm.value, from_uint8(pixels), labels[: len(pixels)]))
    with torch.no_grad():
        return tuple(
            FeatureSet(name=name, features=model.features(images).double().numpy(), labels=labels, space=space)
            for name, images, labels in sets
        )


def _stages(run: Run) -> tuple[StageRecord, ...]:
    """Each stage once, under the arm that named it first."""
    seen: dict[str, StageRecord] = {}
    for chapter in run.chapters:
        for role, artifact in chapter.artifacts.items():
            seen.setdefault(artifact.digest, _stage(chapter, role, artifact, run.facts["started"]))
    return tuple(seen.values())


def _stage(chapter: Chapter, role: str, artifact: Artifact, started: str) -> StageRecord:
    record = artifact.record
    return StageRecord(
        stage=role,
        arm=chapter.arm.value,
        seed=chapter.seed,
        seconds=record["seconds"],
        peak_mb=record["peak_mb"],
        reused=record["finished"] < started,
    )


def _autoattack(chapter: Chapter) -> AutoAttackMaterial:
    made = chapter.artifacts["autoattack"]
    rows, facts = pq.read_table(made.file("rows.parquet")), json.loads(made.file("facts.json").read_text())
    return AutoAttackMaterial(arm=chapter.arm.title, seed=chapter.seed, rows=rows, facts=facts)


def _checks(chapter: Chapter) -> list[CheckRecord]:
    """The evaluations' doubts, and whether every stage was made in one execution environment."""
    made = [chapter.artifacts[role] for role in ("rows", "autoattack") if role in chapter.artifacts]
    found = [each for artifact in made for each in json.loads(artifact.file("checks.json").read_text())]
    mixed = [role for role, artifact in chapter.artifacts.items() if not artifact.record["bit_identical"]]
    detail = f"resumed with another torch, thread count or device: {', '.join(mixed) or 'none'}"
    found.append({"name": "repeatable to the bit", "passed": not mixed, "detail": detail})
    return [CheckRecord(arm=chapter.arm.value, seed=chapter.seed, **c) for c in found]
