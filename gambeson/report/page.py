"""One self-contained HTML page for a run: no network, no script, every string from data escaped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gambeson.report import charts, evaluation_rows, rows, verdict
from gambeson.report.charts import Look
from gambeson.report.embedding import LEAST_POINTS, embed, limits
from gambeson.report.images import MOST_IMAGES, strip
from gambeson.report.material import ArmMaterial, CheckRecord, FeatureSet, Grids, RunMaterial, StageRecord
from gambeson.report.verdict import Comparison

MOST_CLASSES = 20


@dataclass(frozen=True)
class Chart:
    """An SVG with the heading and the caption (each may be empty) that the page sets around it."""

    title: str
    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class GridRow:
    """The samples of one class as data URIs; None where a set of samples is missing."""

    class_name: str
    plain: str | None
    guided: str | None


@dataclass(frozen=True)
class Bar:
    """An interval drawn beside its numbers: where it starts, its width and its estimate, in percent of the track."""

    left: float
    width: float
    estimate: float
    shown: bool


@dataclass(frozen=True)
class StageCost:
    """A stage of an arm over its seeds: total seconds, greatest peak memory, and how many runs were reused."""

    stage: str
    arm: str
    runs: int
    reused: int
    seconds: float
    peak_mb: float


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
    """The whole page as HTML text. Parts the material lacks are said to be missing."""
    found = verdict.judge(material)
    checks = _named((*rows.row_checks(material), *material.checks), material)
    looks = {arm.key: charts.look(place) for place, arm in enumerate(material.arms)}
    return environment().get_template("page.html.j2").render(
        run=material,
        verdict=found,
        columns=verdict.COLUMNS,
        looks=looks,
        bars=_bars(found.comparisons),
        robustness=_robustness(material, looks),
        grid=_grid(material.grids, material.class_names),
        grid_note=_grid_note(material.grids),
        autoattack=_autoattack(material),
        embedding=_embedding(material.features, material.class_names),
        class_colours=charts.class_colours(len(material.class_names)),
        training=_training(material.arms, looks),
        checks=checks,
        failures=[c for c in checks if not c.passed],
        check_lines=_check_lines(checks),
        stages=_stage_costs(material.stages, material),
    )  # fmt: skip


def write(material: RunMaterial, path: Path | str) -> Path:
    """Renders into `path` whole or not at all (a temporary file in the same folder, then os.replace)."""
    path = Path(path)
    text = render(material)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def environment() -> Environment:
    """The templates beside this file, every string from data escaped, with the filters for numbers."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=verdict.percent, points=verdict.points, duration=_duration, memory=_memory)
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


def _robustness(material: RunMaterial, looks: dict[str, Look]) -> Chart | None:
    """Accuracy against epsilon; None when no arm has a curve."""
    curves = [(arm, rows.curve(arm)) for arm in material.arms if arm.rows is not None]
    if not any(points for _, points in curves):
        return None
    worst = [(looks[arm.key], found) for arm, _ in curves if (found := rows.accuracy(arm, verdict.HEADLINE))]
    sizes = sorted({p.images for _, points in curves for p in points})
    ends = [f"{arm.title} {verdict.percent(points[-1].accuracy.estimate)} %" for arm, points in curves if points]
    last = max(p.epsilon for _, points in curves for p in points)
    label = f"Line chart of accuracy under PGD against epsilon. At epsilon {last:g}: {', '.join(ends)}."
    svg = charts.robustness([(looks[a.key], points) for a, points in curves], worst, material.epsilon, label)
    caption = (
        f"Lines: {material.attacks.get('curve', f'PGD on {_join(sizes)} test images')}, with 95 % bands. "
        f"Hollow marks: the worst case over all test images at epsilon {material.epsilon:g} (dotted line), with 95 % "
        "intervals; they are set side by side to be readable."
    )
    return Chart("", Markup(svg), caption)


def _training(arms: Sequence[ArmMaterial], looks: dict[str, Look]) -> list[Chart]:
    """Loss, clean and robust validation accuracy against the step; none without curves."""
    curves = [(looks[arm.key], arm.curves) for arm in arms if arm.curves]
    if not curves:
        return []
    panels = [Chart("Training loss", Markup(charts.training_loss(curves, "Line chart of the training loss by step.")))]
    for column in ("clean", "robust"):
        ends = [f"{a.title} {_last(a, column)}" for a in arms if a.curves]
        label = f"Line chart of {column} validation accuracy by step. At the end: {'; '.join(ends)}."
        caption = _overfitting(arms) if column == "robust" else ""
        panels.append(Chart(f"Validation, {column}", Markup(charts.validation(curves, column, label)), caption))
    return panels


def _overfitting(arms: Sequence[ArmMaterial]) -> str:
    """Best minus last robust validation accuracy of each arm, the mean of its runs (Rice et al. 2020)."""
    lost = [
        (arm.title, [100 * (max(c.validation_robust) - c.validation_robust[-1]) for c in arm.curves])
        for arm in arms
        if arm.curves and all(c.validation_robust for c in arm.curves)
    ]
    told = [f"{title} {sum(points) / len(points):.1f}" for title, points in lost]
    return f"Robust overfitting, best minus last in points: {'; '.join(told)}." if told else ""


def _last(arm: ArmMaterial, column: str) -> str:
    """The last validation accuracies of an arm's runs, in words."""
    values = [curve.validation_clean if column == "clean" else curve.validation_robust for curve in arm.curves]
    ends = [verdict.percent(v[-1]) + " %" for v in values if v]
    return ", ".join(ends) or "not measured"


def _embedding(sets: Sequence[FeatureSet], class_names: tuple[str, ...]) -> list[Chart]:
    """One t-SNE panel per set of features, on shared axes."""
    if sum(len(each.labels) for each in sets) < LEAST_POINTS:
        return []
    panels = embed(sets)
    box = limits(panels)
    return [
        Chart(
            f"{panel.name} ({len(panel.labels)})",
            Markup(charts.embedding(panel.points, panel.labels, class_names, box, f"tsne-{place}",
                f"t-SNE scatter plot of {len(panel.labels)} {panel.name} images, coloured by class.")),
        )
        for place, panel in enumerate(panels)
    ]  # fmt: skip


def _grid(grids: Grids | None, class_names: tuple[str, ...]) -> list[GridRow]:
    if grids is None or (grids.plain is None and grids.guided is None):
        return []
    sets = [grids.plain, grids.guided]
    classes = max(len(images) for images in sets if images is not None)
    return [
        GridRow(name, *(None if images is None else strip(images[k]) for images in sets))
        for k, name in enumerate(class_names[: min(classes, MOST_CLASSES)])
    ]


def _grid_note(grids: Grids | None) -> str:
    """How the grid is to be read, and what it leaves out."""
    if grids is None:
        return ""
    both = grids.plain is not None and grids.guided is not None
    shape = next((g.shape for g in (grids.plain, grids.guided) if g is not None), (0, 0))
    note = "Each guided image stands at the place of the plain image drawn from the same noise. " if both else ""
    if shape[0] > MOST_CLASSES or shape[1] > MOST_IMAGES:
        shown = (
            f"{min(shape[0], MOST_CLASSES)} of {shape[0]} classes, {min(shape[1], MOST_IMAGES)} of {shape[1]} images"
        )
        note += f"Shown: the first {shown} per class. "
    return note + "The first samples, not chosen ones; before labelling and selection."


def _stage_costs(stages: Sequence[StageRecord], material: RunMaterial) -> list[StageCost]:
    """Stages in the order they first came, seeds together."""
    groups: dict[tuple[str, str], list[StageRecord]] = {}
    for record in stages:
        groups.setdefault((record.stage, _title(record.arm, material)), []).append(record)
    return [
        StageCost(stage, arm, len(group), sum(r.reused for r in group), sum(r.seconds for r in group),
                  max(r.peak_mb for r in group))
        for (stage, arm), group in groups.items()
    ]  # fmt: skip


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


def _join(numbers: Sequence[int]) -> str:
    return " or ".join(f"{n:,}" for n in numbers)


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
