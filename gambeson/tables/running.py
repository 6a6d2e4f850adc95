"""Makes the cells of a sheet, seed by seed, and writes the table anew after each, so that what is cut short is one.

Students are judged on validation images first; of settings to choose among only the chosen one is attacked on test
images, once all have been judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from gambeson.data.imageset import ImageSet, Split
from gambeson.disk import atomic, open_folder
from gambeson.engine import Job, Screen, run_jobs
from gambeson.machine import Machine, versions
from gambeson.models.classifiers import load_classifier
from gambeson.models.files import load_tensors
from gambeson.pipeline import Chapter, Once, check_plan, prepare_denoiser, tell
from gambeson.recipe import Arm
from gambeson.robustness.attacks import PGD
from gambeson.robustness.evaluate import Evaluation, evaluate_rows, rows_table
from gambeson.store import Artifact, Stage, Workspace, stage
from gambeson.tables.cells import Setting
from gambeson.tables.sheet import Part, Sheet
from gambeson.tables.telling import deliver

Todo = tuple[Setting, int, tuple[Part, ...]]
"""A setting, a seed, and the parts whose rows are missing."""


@stage(revision=1)
def judge_validation(work: Workspace, spec: Evaluation, student: Artifact, real: ImageSet, *, seed: int) -> None:
    """Writes rows.parquet: the validation images under the evaluation's AutoPGD attacks. Test images are not read."""
    device, part = work.machine.device, real.validation
    model = load_classifier(student.file("classifier.safetensors")).to(device)
    shown = Split(part.images.to(device), part.labels.to(device))
    with atomic(work.folder / "rows.parquet") as draft:
        pq.write_table(rows_table(evaluate_rows(spec, model, shown, seed, work), seed), draft)


def judging(spec: Evaluation) -> Evaluation:
    """The evaluation's AutoPGD attacks alone: no curve, and one step of the plain PGD that they do not need."""
    return replace(spec, curve=(), pgd=PGD(threat=spec.pgd.threat, steps=1, restarts=1))


def without_test(once: Once) -> Once:
    """The same, but stages that read test images are left out: an empty artifact stands for each."""

    def made(asked: Stage, *arguments: Any, **named: Any) -> Artifact:
        return Artifact(asked.name, "", Path()) if asked.reads_test else once(asked, *arguments, **named)

    return made


def study(sheet: Sheet, todo: Todo, once: Once) -> str | None:
    """A setting and seed, from images to kept rows, and the table with them; the reason where it cannot be made.

    What the machine cannot do (disk, memory) is raised: it concerns all cells.
    """
    setting, seed, parts = todo
    try:
        _study(sheet, setting, seed, parts, once)
        reason = None
    except ValueError as error:
        reason = f"{setting.title}, seed {seed}: {error}"
        sheet.keep_failure(setting, seed, str(error))
    publish(sheet)
    return reason


def _study(sheet: Sheet, setting: Setting, seed: int, parts: tuple[Part, ...], once: Once) -> None:
    recipe = setting.recipe.with_threat_everywhere()
    real = recipe.data.load()
    if "validation" in parts:
        chapter = tell(recipe, setting.arm, seed, without_test(once), real)
        judged = once(judge_validation, judging(recipe.evaluation), chapter.artifacts["student"], real, seed=seed)
        facts = _facts(replace(chapter, artifacts=chapter.artifacts | {"validation": judged}))
        sheet.keep(setting, seed, "validation", pq.read_table(judged.file("rows.parquet")), facts)
    if "test" in parts:
        chapter = tell(recipe, setting.arm, seed, once, real)
        sheet.keep(setting, seed, "test", _test_rows(chapter), _facts(chapter))


def _test_rows(chapter: Chapter) -> pa.Table:
    """The evaluation's rows; with AutoAttack's verdicts where it was asked for, null where it did not look."""
    rows = pq.read_table(chapter.artifacts["rows"].file("rows.parquet"))
    if "autoattack" not in chapter.artifacts:
        return rows
    found = pq.read_table(chapter.artifacts["autoattack"].file("rows.parquet"), columns=["index", "robust"])
    verdicts = dict(zip(found["index"].to_pylist(), found["robust"].to_pylist(), strict=True))
    column = [None if (v := verdicts.get(i)) is None else bool(v) for i in rows["index"].to_pylist()]
    return rows.append_column("autoattack", pa.array(column, pa.bool_()))


def _facts(chapter: Chapter) -> dict[str, Any]:
    """What the rows were made of: stages with their seconds, the student's validation curve, doubts, the machine."""
    made = {role: artifact for role, artifact in chapter.artifacts.items() if artifact.digest}
    records = {role: artifact.record for role, artifact in made.items()}
    curve = load_tensors(made["student"].file("classifier.safetensors"))[1]["log"]
    doubts = [c for role in ("rows", "autoattack") if role in made for c in _checks(made[role])]
    return {
        "stages": {
            role: {"stage": made[role].stage, "digest": made[role].digest, "seconds": round(record["seconds"], 1)}
            for role, record in records.items()
        },
        "curve": [[r["step"], r["clean"], r["robust"]] for r in curve],
        "failed_checks": [f"{c['name']}: {c['detail']}" for c in doubts if not c["passed"]],
        "execution": records["student"]["execution"],
        "versions": versions(),
    }


def _checks(artifact: Artifact) -> list[dict[str, Any]]:
    return json.loads(artifact.file("checks.json").read_text(encoding="utf-8"))


def publish(sheet: Sheet) -> None:
    """Writes table.json and table.md from the rows that are kept, one process at a time."""
    open_folder(sheet.folder)
    with FileLock(sheet.folder / ".lock"):
        deliver(sheet)


def missing(sheet: Sheet, test: bool) -> list[Todo]:
    """What is still to be made, all cells of a seed before the next seed's.

    test: whether test images are looked at; for cells that choose, only those of the chosen setting, when it is known.
    """
    found: list[Todo] = []
    for seed in sheet.seeds:
        for cell in sheet.made:
            chosen = sheet.chosen(cell)
            for setting in cell.settings:
                wanted: list[Part] = ["validation", "test"] if test and setting is chosen else ["validation"]
                parts: tuple[Part, ...] = tuple(part for part in wanted if not sheet.has(setting, seed, part))
                if parts:
                    found.append((setting, seed, parts))
    return found


def make(
    sheet: Sheet, runs: Path, workers: int, screen: Screen, machine: Machine = Machine(), *, test: bool = True
) -> list[str]:
    """Makes what is missing; the reasons of what cannot be made. Stopped at any time, the same call goes on.

    Twice: what is to be tested of cells that choose is known when all their settings have been judged.
    """
    for setting in {todo[0].folder: todo[0] for todo in missing(sheet, test)}.values():
        check_plan(setting.recipe, (setting.arm,))
    failed: list[str] = []
    for _ in range(2):
        todo = [t for t in missing(sheet, test) if not any(f.startswith(_name(t)) for f in failed)]
        results = run_jobs(list(_jobs(sheet, todo)), runs.resolve(), workers, screen, machine) if todo else []
        failed += [r for r in results if isinstance(r, str)]
    publish(sheet)
    return failed


def _name(todo: Todo) -> str:
    return f"{todo[0].title}, seed {todo[1]}:"


def _jobs(sheet: Sheet, todos: Iterable[Todo]) -> Iterator[Job]:
    """The jobs, each seed's diffusion models first, since most of its cells wait for them."""
    begun: set[tuple[str, int]] = set()
    todos = list(todos)
    for seed in sheet.seeds:
        own = [todo for todo in todos if todo[1] == seed]
        for setting, _, _ in own:
            key = repr((setting.recipe.denoiser, setting.recipe.data)), seed
            if setting.arm in (Arm.PLAIN, Arm.GUIDED) and key not in begun:
                begun.add(key)
                yield Job(f"seed {seed} diffusion model", prepare_denoiser, (setting.recipe, seed))
        for todo in own:
            yield Job(f"seed {seed} {todo[0].title}", study, (sheet, todo))
