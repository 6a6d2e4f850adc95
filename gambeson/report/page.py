"""One self-contained HTML page for a run: no network, no script, every string from data escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gambeson.disk import atomic
from gambeson.report import charts, evaluation_rows, page_classes, page_curves, page_pictures, rows, verdict
from gambeson.report.material import CheckRecord, RunMaterial, StageRecord
from gambeson.report.page_curves import Chart
from gambeson.report.verdict import Comparison

__all__ = ["Chart", "environment", "render", "write"]

MOST_NAMED = 100
"""Classes beyond so many are counted rather than listed."""
PARTS = (
    "run", "arms", "class_names", "grids", "nearest", "scores", "features", "student_features", "adversarial",
    "confusions", "energy", "selections", "curves", "stages", "checks", "versions", "licences",
)  # fmt: skip
"""Parts of the material whose absence is told in their own section; that of others is told at the end."""


@dataclass(frozen=True)
class Bar:
    """An interval drawn beside its numbers: where it starts, its width and its estimate, in percent of the track."""

    left: float
    width: float
    estimate: float
    shown: bool


@dataclass(frozen=True)
class StageCost:
    """A stage of an arm over its seeds: total seconds, greatest peak memory, and how many runs were reused.

    joules: of those runs that reported it; None where none did.
    """

    stage: str
    arm: str
    runs: int
    reused: int
    seconds: float
    peak_mb: float
    joules: float | None


@dataclass(frozen=True)
class AutoAttackLine:
    """What AutoAttack left of one student."""

    arm: str
    seed: int
    images: int
    falls: list[evaluation_rows.Fall]  # clean, then after each attack


@dataclass(frozen=True)
class CheckLine:
    """A check over all arms and seeds that it was made on."""

    name: str
    passed: int
    total: int


def render(material: RunMaterial) -> str:
    """The whole page as HTML text. Parts that the material lacks are said to be missing, with the reason if known."""
    found = verdict.judge(material)
    checks = _named((*rows.row_checks(material), *material.checks), material)
    template = environment().get_template("page.html.j2")
    return template.render(
        run=material,
        verdict=found,
        columns=verdict.COLUMNS,
        looks={arm.key: charts.look(place) for place, arm in enumerate(material.arms)},
        bars=_bars(found.comparisons),
        autoattack=_autoattack(material),
        checks=checks,
        failures=[c for c in checks if not c.passed],
        check_lines=_check_lines(checks),
        stages=_stage_costs(material.stages, material),
        unsaid={part: why for part, why in material.missing.items() if part not in PARTS},
        **_about_classes(material),
        **_drawn(material),
    )


def _about_classes(material: RunMaterial) -> dict[str, Any]:
    """What the page shows by class, or names classes in."""
    names = page_classes.shown(material.class_names)
    return {
        "names": names,
        "most_named": MOST_NAMED,
        "signs": page_curves.signs(names),
        "class_colours": charts.class_colours(len(names)),
        "class_table": page_classes.class_table(material, names),
        "confusions": page_classes.confusions(material, names),
        "broken": page_classes.broken(material),
        "standing": page_classes.STANDING,
        "alone": page_classes.ALONE,
        "grid": page_pictures.grid(material.grids, names),
        "grid_note": page_pictures.grid_note(material.grids),
        "examples": page_pictures.example_sets(material, names),
    }


def _drawn(material: RunMaterial) -> dict[str, Any]:
    """The charts."""
    names = page_classes.shown(material.class_names)
    looks = {arm.key: charts.look(place) for place, arm in enumerate(material.arms)}
    return {
        "robustness": page_curves.robustness(material, looks),
        "embedding": page_curves.embedding(material.features, names),
        "students": page_curves.students(material.student_features, names),
        "energy": page_curves.energy(material.energy),
        "selections": page_curves.selections(material.selections, material.arms),
        "selection_looks": (page_curves.KEPT, page_curves.LEFT),
        "training": page_curves.training(material.arms, looks),
    }


def write(material: RunMaterial, path: Path | str) -> Path:
    """Renders into `path`, whole or not at all. EnvironmentFault where it cannot be written."""
    path, text = Path(path), render(material)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def environment() -> Environment:
    """The templates beside this file, every string from data escaped, with the filters for numbers."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=verdict.percent,
        points=verdict.points,
        duration=_duration,
        memory=_memory,
        joules=_joules,
        moment=_moment,
    )
    return environment


def _autoattack(material: RunMaterial) -> list[AutoAttackLine]:
    """A line for each student that was assessed."""
    return [
        AutoAttackLine(each.arm, each.seed, len(each.rows), evaluation_rows.cascade(each.rows))
        for each in material.autoattack
    ]


def _bars(comparisons: Sequence[Comparison]) -> list[Bar | None]:
    """The worst-case intervals of the comparisons on one scale with 0 in the middle."""
    found = [comparison.differences[verdict.HEADLINE] for comparison in comparisons]
    reach = max([0.01, *(max(abs(d.low), abs(d.high)) for d in found if d)])
    return [
        d and Bar(50 + 50 * d.low / reach, 50 * (d.high - d.low) / reach, 50 + 50 * d.estimate / reach, d.shown)
        for d in found
    ]


def _stage_costs(stages: Sequence[StageRecord], material: RunMaterial) -> list[StageCost]:
    """Stages in the order they first came, seeds together."""
    groups: dict[tuple[str, str], list[StageRecord]] = {}
    for record in stages:
        groups.setdefault((record.stage, _title(record.arm, material)), []).append(record)
    return [
        StageCost(stage, arm, len(group), sum(r.reused for r in group), sum(r.seconds for r in group),
                  max(r.peak_mb for r in group), _total([r.joules for r in group]))
        for (stage, arm), group in groups.items()
    ]  # fmt: skip


def _total(joules: Sequence[float | None]) -> float | None:
    known = [each for each in joules if each is not None]
    return sum(known) if known else None


def _check_lines(checks: Sequence[CheckRecord]) -> list[CheckLine]:
    """Checks by name, those with failures first."""
    names = dict.fromkeys(check.name for check in checks)
    lines = [
        CheckLine(n, sum(c.passed for c in checks if c.name == n), sum(c.name == n for c in checks)) for n in names
    ]
    return sorted(lines, key=lambda line: line.passed == line.total)


def _named(checks: Sequence[CheckRecord], material: RunMaterial) -> list[CheckRecord]:
    """The same checks with the arm's title in place of its key."""
    return [
        CheckRecord(arm=_title(c.arm, material), seed=c.seed, name=c.name, passed=c.passed, detail=c.detail)
        for c in checks
    ]


def _title(key: str, material: RunMaterial) -> str:
    return {arm.key: arm.title for arm in material.arms}.get(key, key)


def _duration(seconds: float) -> str:
    """Seconds in words a reader can add up: '0.4 s', '12 s', '3 min 20 s', '2 h 5 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _memory(megabytes: float) -> str:
    return f"{megabytes:.0f} MB" if np.isfinite(megabytes) and megabytes > 0 else "–"


def _moment(text: str) -> str:
    """'2026-11-21T14:35:23+00:00' -> '2026-11-21 14:35 UTC'; other words as they are."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d(\.\d+)?)?\+00:00", text)
    return f"{found[1]} {found[2]} UTC" if found else text


def _joules(energy: float | None) -> str:
    """Joules as '850 J', '12.3 kJ' or '0.85 kWh', an en dash where nothing was reported."""
    if energy is None or not np.isfinite(energy):
        return "–"
    if energy < 1000:
        return f"{energy:.0f} J"
    return f"{energy / 1000:.1f} kJ" if energy < 3.6e5 else f"{energy / 3.6e6:.2f} kWh"
