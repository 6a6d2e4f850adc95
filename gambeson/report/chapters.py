"""What one arm of one seed has to tell besides images: curve, checks, AutoAttack, costs, terms; from what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.heritage import carried, told
from gambeson.models.files import header_of, load_tensors
from gambeson.pipeline import Chapter
from gambeson.recipe import Arm
from gambeson.report.material import AutoAttackMaterial, CheckRecord, StageRecord, TrainingCurve
from gambeson.report.samples import kept_images
from gambeson.store import Artifact

Told = dict[str, Any]
"""curve, checks, autoattack, stages (by the stage's digest), synthetic, licences, rows: each only where it is known."""
_WEIGHTS = ("classifier.safetensors", "denoiser.safetensors", "embedding.safetensors")


def tell_of(chapter: Chapter, done: Mapping[str, Artifact], started: str, with_rows: bool) -> Told:
    """What the finished stages of a chapter say. EnvironmentFault, naming the file, for a damaged one."""
    found: Told = {
        "checks": tuple(checks_of(chapter, done)),
        "stages": {made.digest: stage_record(chapter, role, made, started) for role, made in done.items()},
        "licences": {role: terms for role, made in done.items() if (terms := _terms(made))},
    }
    if "student" in done:
        found["curve"] = _curve(chapter.seed, done["student"])
    if "autoattack" in done:
        found["autoattack"] = _autoattack(chapter, done["autoattack"])
    if chapter.arm is Arm.REAL or "chosen" in done:
        found["synthetic"] = kept_images(done["chosen"]) if "chosen" in done else 0
    if with_rows and "rows" in done:
        found["rows"] = rows_of(done["rows"])
    return found


def rows_of(made: Artifact) -> pa.Table:
    """One row per test image, the checksum compared."""
    return pq.read_table(made.file("rows.parquet"))


def stage_record(chapter: Chapter, role: str, artifact: Artifact, started: str) -> StageRecord:
    """What a stage cost."""
    record = artifact.record
    return StageRecord(
        stage=role,
        arm=chapter.arm.value,
        seed=chapter.seed,
        seconds=record["seconds"],
        peak_mb=record["peak_mb"],
        reused=record["finished"] < started,
        joules=record.get("joules"),
    )


def _curve(seed: int, student: Artifact) -> TrainingCurve:
    log: list[dict[str, Any]] = load_tensors(student.file("classifier.safetensors"))[1].get("log", [])
    steps = [r["step"] for r in log]
    return TrainingCurve(
        seed=seed,
        steps=steps,
        loss=[r["loss"] for r in log],
        validation_steps=steps,
        validation_clean=[r["clean"] for r in log],
        validation_robust=[r["robust"] for r in log],
    )


def _autoattack(chapter: Chapter, made: Artifact) -> AutoAttackMaterial:
    rows, facts = pq.read_table(made.file("rows.parquet")), json.loads(made.file("facts.json").read_text())
    return AutoAttackMaterial(arm=chapter.arm.title, seed=chapter.seed, rows=rows, facts=facts)


def checks_of(chapter: Chapter, done: Mapping[str, Artifact]) -> list[CheckRecord]:
    """The evaluations' doubts, and whether every stage was made in one execution environment."""
    made = [done[role] for role in ("rows", "autoattack") if role in done]
    found = [each for artifact in made for each in json.loads(artifact.file("checks.json").read_text())]
    if done:
        mixed = [role for role, artifact in done.items() if not artifact.record["bit_identical"]]
        detail = f"resumed with another torch, thread count or device: {', '.join(mixed) or 'none'}"
        found.append({"name": "repeatable to the bit", "passed": not mixed, "detail": detail})
    return [CheckRecord(arm=chapter.arm.value, seed=chapter.seed, **c) for c in found]


def _terms(made: Artifact) -> str:
    """Licence and additional real images that a stage's result came with, in words; '' where it says nothing."""
    found = _stated(made)
    licence, seen = found.get("licence"), found.get("additional_data") or []
    said = [f"licence: {licence}"] if isinstance(licence, str) and licence else []
    named = [name for name in seen if isinstance(name, str)] if isinstance(seen, list) else []
    return "; ".join([*said, *([f"has also seen {', '.join(named)}"] if named else [])])


def _stated(made: Artifact) -> Mapping[str, Any]:
    """What a stage carries; of one of an earlier version what its images or weights say."""
    found = made.heritage
    path = next((made.folder / name for name in _WEIGHTS if (made.folder / name).is_file()), None)
    return found if path is None or carried(found) else told(header_of(path))
