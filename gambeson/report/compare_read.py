"""Reads a run for a comparison: finished or not, moved away from its stages, or of an older version, as far as it goes.

What the stages recorded counts for more than the recipe file: it is what was done.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gambeson import canonical, files
from gambeson.disk import read_json
from gambeson.errors import EnvironmentFault, UserError
from gambeson.models.files import header_of
from gambeson.recipe import Arm, Recipe, class_table
from gambeson.report import evaluation_rows, rows
from gambeson.report.compare_material import AUTOATTACK, CLEAN, PGD, WORST, Contender, ContenderArm, Measure
from gambeson.report.compare_recipes import shortened
from gambeson.report.found import find
from gambeson.report.keeping import kept
from gambeson.report.material import ArmMaterial, CheckRecord, RunMaterial, StageRecord, TrainingCurve
from gambeson.run import artifacts_of
from gambeson.store import Artifact
from gambeson.threat import ThreatModel


@dataclass(frozen=True)
class Part:
    """One arm of one seed: its finished artifacts by role, and the digests of all of them."""

    arm: str
    seed: int
    finished: dict[str, Artifact]
    digests: dict[str, str]


def read(folder: Path, number: int, name: str) -> Contender:
    """The run or the evaluation in a folder. Raises UserError for a folder that is neither, EnvironmentFault for a
    file of it that is damaged."""
    if (folder / "recipe.yaml").exists():
        return _run(folder, number, name)
    if (folder / "facts.json").exists() and (folder / "rows.parquet").exists():
        return _evaluation(folder, number, name)
    raise UserError(
        f"{folder}: expected the folder of a run (with recipe.yaml) or of `gambeson evaluate` (with facts.json and "
        "rows.parquet), found neither; `gambeson runs` lists the runs"
    )


def _run(folder: Path, number: int, name: str) -> Contender:
    """A run's folder."""
    recipe, tree, notes = _recipe(folder)
    facts = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    parts, unfinished = _parts(folder, facts)
    edited = recipe is not None and facts.get("recipe_digest", recipe.digest) != recipe.digest
    if edited:
        recipe = None
        notes.append("Its recipe.yaml is not the one it was made with (another digest), and may not say what ran")
    threat, known = _threat(tree), None if edited else kept(folder)
    arms, more = _arms(folder, _spec(tree, edited), tree, parts, known)
    stages = tuple(_stages(parts)) or (() if known is None else known.stages)
    return Contender(
        number=number,
        name=name,
        folder=folder,
        kind="run",
        state=unfinished,
        tree=tree,
        recipe=recipe,
        data=_dict(tree.get("data")),
        data_digest=_data_digest(parts),
        evaluation=_spec(tree, edited),
        class_names=_class_names(parts, known),
        threat=str(threat) if threat else "threat not known",
        norm=threat.norm if threat else "",
        epsilon=threat.epsilon if threat else 0.0,
        arms=arms,
        **_checks(parts, arms, known),
        stages=stages,
        facts=_facts(facts, parts),
        command=str(facts.get("command", "")),
        notes=tuple(notes + more),
    )


def _recipe(folder: Path) -> tuple[Recipe | None, dict[str, Any], list[str]]:
    """The recipe, its plain form, and what has to be said of it; None and the file's own tree where it is of another
    version."""
    path = folder / "recipe.yaml"
    try:
        recipe = files.load(path, Recipe, class_table())
    except UserError as error:
        tree = files.parse_yaml(path.read_text(encoding="utf-8"), f"recipe file {path}")
        why = str(error).removeprefix(f"recipe file {path}: ")
        note = f"Its recipe is of another version of gambeson and is compared as its file has it ({shortened(why, 90)})"
        return None, _dict(tree), [note]
    return recipe, canonical.plain(recipe), []


def _threat(tree: Mapping[str, Any]) -> ThreatModel | None:
    """The threat of a recipe's plain form; None for one that says none or a strange one."""
    found = _dict(tree.get("threat"))
    try:
        return ThreatModel(norm=found["norm"], epsilon=float(found["epsilon"]))
    except (KeyError, TypeError, ValueError):
        return None


def _parts(folder: Path, facts: Mapping[str, Any]) -> tuple[list[Part], str]:
    """Every arm and seed of a run, and what an unfinished one is in words."""
    if facts:
        chapters = facts.get("chapters", [])
        try:
            return [_part(folder.parent, each) for each in chapters], ""
        except (KeyError, TypeError, AttributeError) as error:
            raise EnvironmentFault(f"{folder / 'run.json'}: expected the record of a run, got one without {error}; "
                                   "start the run again") from error  # fmt: skip
    told = "not finished; `gambeson run` on its recipe.yaml goes on with it"
    try:
        found = find(folder)
    except (UserError, OSError):
        return [], told
    return [
        Part(c.arm.value, c.seed, found.finished(c), {role: a.digest for role, a in c.artifacts.items()})
        for c in found.chapters
    ], told


def _part(root: Path, chapter: Mapping[str, Any]) -> Part:
    made = artifacts_of(chapter, root)
    there = {role: a for role, a in made.items() if (a.folder / "done.json").exists()}
    return Part(chapter["arm"], chapter["seed"], there, {role: a.digest for role, a in made.items()})


def _arms(
    folder: Path, spec: dict[str, Any], tree: Mapping[str, Any], parts: list[Part], known: RunMaterial | None
) -> tuple[tuple[ContenderArm, ...], list[str]]:
    """The arms in the recipe's order, and what has to be said of their rows."""
    tables, notes = _tables(folder, parts)
    keys = list(dict.fromkeys([*map(str, tree.get("arms") or ()), *(p.arm for p in parts), *tables]))
    arms = []
    for key in keys:
        mine = [p for p in parts if p.arm == key]
        try:
            arms.append(_arm(key, mine, tables.get(key), _hows(spec, mine), known))
        except (ValueError, KeyError) as error:
            notes.append(f"The rows of {_title(key)} cannot be used: {error}")
            arms.append(ContenderArm(key=key, title=_title(key)))
    if not any(arm.measures for arm in arms):
        notes.append("It has no rows: no classifier of it was measured")
    return tuple(arms), notes


def _title(key: str) -> str:
    return Arm(key).title if key in {arm.value for arm in Arm} else key


def _tables(folder: Path, parts: list[Part]) -> tuple[dict[str, pa.Table], list[str]]:
    """Rows by arm: from the stages, checksums verified, where all are there; else the run's own rows.parquet."""
    evaluated = [p for p in parts if "rows" in p.digests]
    stages = [p for p in parts if "rows" in p.finished]
    own = folder / "rows.parquet"
    if len(stages) < len(evaluated) and own.exists():
        try:
            table = pq.read_table(own)
            keys = table["arm"].unique().to_pylist()
        except (pa.ArrowInvalid, KeyError) as error:
            raise EnvironmentFault(
                f"{own}: expected the rows of a run, got a damaged file ({error}). Copy the run's folder anew, or "
                "leave this run out"
            ) from error
        note = "Its stages are not all beside it (it was moved, or they were removed): rows are the run's own copy"
        return {key: table.filter(pc.field("arm") == key).drop_columns(["arm"]) for key in keys}, [note]
    found: dict[str, list[pa.Table]] = {}
    for part in stages:
        found.setdefault(part.arm, []).append(pq.read_table(part.finished["rows"].file("rows.parquet")))
    return {key: pa.concat_tables(tables) for key, tables in found.items()}, []


def _hows(spec: dict[str, Any], parts: list[Part]) -> dict[str, dict[str, Any]]:
    """What measured each column: as the stages recorded it, else as the recipe says, its revision then unknown."""
    records = [p.finished["rows"].record for p in parts if "rows" in p.finished]
    done = [(r["config"], r["revision"]) for r in records]
    spec, revision = done[0] if done else (spec, None)
    if any(each != done[0] for each in done):
        revision = "several, of different seeds"
    attacks = {PGD: ("pgd",), WORST: ("apgd", "targeted")}
    hows = {column: {name: spec.get(name) for name in names} for column, names in attacks.items()}
    return {column: how | {"revision": revision} for column, how in hows.items()}


def _spec(tree: Mapping[str, Any], edited: bool) -> dict[str, Any]:
    """The evaluation of a recipe as its stage is given it, the threat filled in; {} where it may not be what ran."""
    if edited:
        return {}
    try:
        whole = files.build(dict(tree), Recipe, class_table()).with_threat_everywhere()
        return canonical.plain(whole.evaluation, drop_neutral=True)
    except UserError:
        return _filled(_dict(tree.get("evaluation")), tree.get("threat"))


def _filled(value: Any, threat: Any) -> Any:
    """The tree with the threat wherever a part leaves it open."""
    if not isinstance(value, dict):
        return value
    return {k: threat if k == "threat" and v in (None, "none") else _filled(v, threat) for k, v in value.items()}


def _arm(
    key: str, parts: list[Part], table: pa.Table | None, hows: dict[str, dict[str, Any]], known: RunMaterial | None
) -> ContenderArm:
    """One arm. Raises ValueError for rows that this version does not understand."""
    students = {p.seed: p.digests["student"] for p in parts if "student" in p.digests}
    evaluations = {p.seed: p.digests["rows"] for p in parts if "rows" in p.digests}
    remembered = {} if known is None else {arm.key: arm.curves for arm in known.arms}
    curves = tuple(_training(parts)) or remembered.get(key, ())
    bare = ContenderArm(key=key, title=_title(key), students=students, evaluations=evaluations, training=curves)
    if table is None:
        return bare
    arm = ArmMaterial(key=key, title=bare.title, rows=table)
    measures = {CLEAN: Measure(cells=rows.cells(table, CLEAN), how={})}
    measures |= {column: Measure(cells=rows.cells(table, column), how=hows[column]) for column in (PGD, WORST)}
    measures |= _assessed(parts)
    indices, labels = _labels(table)
    return replace(bare, measures=measures, indices=indices, labels=labels, curve=tuple(rows.curve(arm)))


def _labels(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the test images, ascending, and their labels."""
    indices, first = np.unique(table["index"].to_numpy(), return_index=True)
    return indices.astype(np.int64), table["label"].to_numpy()[first].astype(np.int64)


def _assessed(parts: list[Part]) -> dict[str, Measure]:
    """AutoAttack's verdicts, where every seed was assessed on the same images in the same way."""
    made = [(p.seed, p.finished["autoattack"]) for p in parts if "autoattack" in p.finished]
    if not made or len(made) < len([p for p in parts if "rows" in p.digests]):
        return {}
    hows = [_autoattack(read_json(a.file("facts.json"))) for _, a in made]
    found = [_stood(pq.read_table(a.file("rows.parquet")), seed) for seed, a in made]
    same = all(how == hows[0] for how in hows) and all(np.array_equal(c.indices, found[0].indices) for c in found)
    if not same:
        return {}
    order = np.argsort([seed for seed, _ in made])
    correct = np.concatenate([found[k].correct for k in order])
    seeds = np.array([made[k][0] for k in order], dtype=np.int64)
    return {AUTOATTACK: Measure(cells=rows.Cells(seeds, found[0].indices, correct), how=hows[0])}


def _stood(table: pa.Table, seed: int) -> rows.Cells:
    """AutoAttack's verdict on each image of one assessment."""
    order = np.argsort(table["index"].to_numpy())
    held = evaluation_rows.robust(table)[order]
    return rows.Cells(np.array([seed], dtype=np.int64), table["index"].to_numpy()[order].astype(np.int64), held[None])


def _autoattack(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What an assessment was, without the seeds of its draws."""
    attacks = {name: re.sub(r",? ?\bseed=\d+", "", text) for name, text in facts["attacks"].items()}
    return {name: facts[name] for name in ("norm", "epsilon", "precision", "gradients")} | {"attacks": attacks}


def _training(parts: list[Part]) -> Iterator[TrainingCurve]:
    """The curves in the headers of the trained students."""
    for part in parts:
        if "student" in part.finished:
            log = header_of(part.finished["student"].file("classifier.safetensors")).get("log", [])
            values = {name: [r[name] for r in log] for name in ("step", "loss", "clean", "robust")}
            steps = values["step"]
            yield TrainingCurve(
                seed=part.seed,
                steps=steps,
                loss=values["loss"],
                validation_steps=steps,
                validation_clean=values["clean"],
                validation_robust=values["robust"],
            )


def _data_digest(parts: list[Part]) -> str | None:
    """The digest of the image set that the evaluations read."""
    records = (p.finished["rows"].record for p in parts if "rows" in p.finished)
    return next((r["inputs"][1] for r in records), None)


def _class_names(parts: list[Part], known: RunMaterial | None) -> tuple[str, ...]:
    """From the weights of a student; () where nothing tells them."""
    if known is not None and "class_names" not in known.missing:  # otherwise they are only numbered
        return known.class_names
    for part in parts:
        if "student" in part.finished:
            told = header_of(part.finished["student"].file("classifier.safetensors")).get("class_names")
            return tuple(map(str, told or ()))
    return ()


def _checks(parts: list[Part], arms: Sequence[ContenderArm], known: RunMaterial | None) -> dict[str, Any]:
    """The evaluations' doubts about themselves, each with its arm in words, and whether they could be read."""
    made = [(p, p.finished[role]) for p in parts for role in ("rows", "autoattack") if role in p.finished]
    titles = {arm.key: arm.title for arm in arms}
    if not made:
        found = () if known is None else known.checks
        named = tuple(replace(c, arm=titles.get(c.arm, c.arm)) for c in found)
        return {"checks": named, "checked": bool(found)}
    checks = [
        CheckRecord(arm=titles.get(part.arm, part.arm), seed=part.seed, **check)
        for part, artifact in made
        for check in read_json(artifact.file("checks.json"))
    ]
    return {"checks": tuple(checks), "checked": True}


def _stages(parts: list[Part]) -> Iterator[StageRecord]:
    """Each stage that is there once, under the arm that named it first."""
    seen: set[str] = set()
    for part in parts:
        for role, artifact in part.finished.items():
            if artifact.digest not in seen:
                seen.add(artifact.digest)
                record = artifact.record
                yield StageRecord(
                    stage=role,
                    arm=part.arm,
                    seed=part.seed,
                    seconds=record["seconds"],
                    peak_mb=record["peak_mb"],
                    joules=record.get("joules"),
                )


def _facts(facts: Mapping[str, Any], parts: list[Part]) -> dict[str, str]:
    """Versions, machine and times, in words."""
    told = {name: str(version) for name, version in _dict(facts.get("versions")).items()}
    executions = [a.record.get("execution", {}) for p in parts for a in p.finished.values()]
    for name in ("device", "machine", "dtype", "threads", "compiled"):
        values = dict.fromkeys(str(e[name]) for e in executions if e.get(name) is not None)
        if values:
            told[name] = ", ".join(values)
    told |= {name: str(facts[name]) for name in ("workers", "started", "finished") if name in facts}
    if {"started", "finished"} <= facts.keys():
        lasted = datetime.fromisoformat(facts["finished"]) - datetime.fromisoformat(facts["started"])
        told["first start to end"] = f"{lasted.total_seconds() / 60:.1f} min"
    return told


def _evaluation(folder: Path, number: int, name: str) -> Contender:
    """The folder of `gambeson evaluate`: one classifier, one seed."""
    facts, table = read_json(folder / "facts.json"), pq.read_table(folder / "rows.parquet")
    checks = read_json(folder / "checks.json") if (folder / "checks.json").exists() else []
    order = np.argsort(table["index"].to_numpy())
    table = table.take(order)
    seed = np.zeros(1, dtype=np.int64)
    indices, labels = _labels(table)
    right = evaluation_rows.right(table)[None]
    measures = {
        CLEAN: Measure(cells=rows.Cells(seed, indices, right), how={}),
        AUTOATTACK: Measure(cells=_stood(table, 0), how=_autoattack(facts)),
    }
    arm = ContenderArm(key="classifier", title="classifier", measures=measures, indices=indices, labels=labels,
                       curve=tuple(evaluation_rows.curve(table)))  # fmt: skip
    notes = list(map(str, facts.get("notes", ())))
    return Contender(
        number=number,
        name=name,
        folder=folder,
        kind="evaluation",
        data={"name": facts["data"]},
        class_names=tuple(map(str, facts["class_names"])),
        threat=facts["threat"],
        norm=facts["norm"],
        epsilon=float(facts["epsilon"]),
        arms=(arm,),
        checks=tuple(CheckRecord(arm="classifier", seed=0, **check) for check in checks),
        checked=bool(checks),
        notes=tuple(note.rstrip(".") for note in notes),
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
