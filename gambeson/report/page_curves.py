"""The charts of the page with their headings, captions and spoken labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from gambeson.report import charts, rows, verdict
from gambeson.report.charts import Look
from gambeson.report.embedding import LEAST_POINTS, embed, limits
from gambeson.report.material import ArmMaterial, FeatureSet, GuidanceEnergy, RunMaterial, SelectionScores

MOST_SIGNS, SHORT = 20, 10
MOST_STUDENTS, MOST_STUDENT_POINTS = 6, 500
MOST_SELECTIONS = 8
KEPT, LEFT = replace(charts.look(2), line="-"), charts.look(1)


@dataclass(frozen=True)
class Chart:
    """An SVG with the heading and the caption (each may be empty) that the page sets around it."""

    title: str
    svg: Markup
    caption: str = ""


def robustness(material: RunMaterial, looks: dict[str, Look]) -> Chart | None:
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


def training(arms: Sequence[ArmMaterial], looks: dict[str, Look]) -> list[Chart]:
    """Loss, clean and robust validation accuracy against the step; none without curves."""
    curves = [(looks[arm.key], arm.curves) for arm in arms if arm.curves]
    if not curves:
        return []
    panels = [Chart("Training loss", Markup(charts.training_loss(curves, "Line chart of the training loss by step.")))]
    for column in ("clean", "robust"):
        ends = [f"{a.title} {_last(a, column)}" for a in arms if a.curves]
        label = f"Line chart of {column} validation accuracy by step. At the end: {'; '.join(ends)}."
        caption = overfitting(arms) if column == "robust" else ""
        panels.append(Chart(f"Validation, {column}", Markup(charts.validation(curves, column, label)), caption))
    return panels


def overfitting(arms: Sequence[ArmMaterial]) -> str:
    """Best minus last robust validation accuracy of each arm, the mean of its runs (Rice et al. 2020)."""
    lost = [
        (arm.title, [100 * (max(c.validation_robust) - c.validation_robust[-1]) for c in arm.curves])
        for arm in arms
        if arm.curves and all(c.validation_robust for c in arm.curves)
    ]
    told = [f"{title} {sum(points) / len(points):.1f}" for title, points in lost]
    return f"Robust overfitting, best minus last in points: {'; '.join(told)}." if told else ""


def signs(names: Sequence[str]) -> list[str]:
    """What stands for each class in a picture: its name where all are short and Latin, else its number, from 1.

    With more than 20 classes nothing does ('').
    """
    if len(names) > MOST_SIGNS:
        return [""] * len(names)
    if all(len(name) <= SHORT and all(ord(c) < 0x250 for c in name) for name in names):
        return list(names)
    return [str(k + 1) for k in range(len(names))]


def embedding(sets: Sequence[FeatureSet], names: Sequence[str]) -> list[Chart]:
    """One t-SNE panel per set of features, on shared axes; none for fewer than 10 points or broken ones."""
    if sum(len(each.labels) for each in sets) < LEAST_POINTS or not all(map(finite, sets)):
        return []
    panels = embed(sets)
    box = limits(panels)
    return [
        Chart(
            f"{panel.name} ({len(panel.labels)})",
            Markup(charts.embedding(panel.points, panel.labels, signs(names), box, f"tsne-{place}",
                f"t-SNE scatter plot of {len(panel.labels)} {panel.name} images, coloured by class.")),
        )
        for place, panel in enumerate(panels)
    ]  # fmt: skip


def finite(found: FeatureSet) -> bool:
    """Whether no feature is NaN or infinite, so that it can be drawn."""
    return bool(np.isfinite(found.features).all())


def students(sets: Sequence[FeatureSet], names: Sequence[str]) -> list[Chart]:
    """One t-SNE of the test images for each of the first six students, each in its own features (CDP, Figure 6)."""
    enough = [each for each in sets if len(each.labels) >= LEAST_POINTS and finite(each)]
    found = []
    for place, each in enumerate(enough[:MOST_STUDENTS]):
        (panel,) = embed([each], most=MOST_STUDENT_POINTS)
        label = f"t-SNE scatter plot of {len(panel.labels)} test images in features of {each.name}, coloured by class."
        drawn = charts.embedding(panel.points, panel.labels, signs(names), limits([panel]), f"student-{place}", label)
        found.append(Chart(f"{each.name} ({len(panel.labels)})", Markup(drawn), each.space))
    return found


def energy(found: GuidanceEnergy | None) -> Chart | None:
    """Guidance's shift along the trajectory; None where nothing of it is known."""
    if found is None or not (found.sigma > 0).any():
        return None
    top = int(np.argmax(found.shift))
    most = f"{found.shift[top]:.3g} at sigma {found.sigma[top]:.3g}"
    label = f"Line chart of guidance's shift of the denoised image against sigma; the largest is {most}."
    unseen = int((found.sigma <= 0).sum())
    caption = (
        "From noise (left) to image (right): how far guidance moves the denoised image at each step, root mean square "
        f"over pixels on the scale from -1 to 1; line: mean of {found.images:,} images, band: 5 to 95 % of them. The "
        f"largest: {most}. {found.how.rstrip('. ') + '. ' if found.how else ''}"
        f"{'Steps at sigma 0 have no place on the axis. ' if unseen else ''}"
    )
    return Chart("", Markup(charts.energy(found, label)), caption.strip())


def selections(found: Sequence[SelectionScores], arms: Sequence[ArmMaterial]) -> list[Chart]:
    """A histogram for each selection, the images kept against those left; eight at most."""
    titles = {arm.key: arm.title for arm in arms}
    return [
        _selection(each, titles.get(each.arm, each.arm), place) for place, each in enumerate(found[:MOST_SELECTIONS])
    ]


def _selection(found: SelectionScores, title: str, place: int) -> Chart:
    kept, left = int(found.kept.sum()), int(found.left.sum())
    told = f"{kept:,} kept, {left:,} left"
    groups, label = [(LEFT, found.left), (KEPT, found.kept)], f"Histogram of the {found.score} score: {told}."
    svg = charts.steps(found.edges, groups, f"{found.score} score", f"selection-{place}", label)
    return Chart(f"{title}, seed {found.seed}", Markup(svg), f"{told} by {found.score}.")


def _last(arm: ArmMaterial, column: str) -> str:
    """The last validation accuracies of an arm's runs, in words."""
    values = [curve.validation_clean if column == "clean" else curve.validation_robust for curve in arm.curves]
    ends = [verdict.percent(v[-1]) + " %" for v in values if v]
    return ", ".join(ends) or "not measured"


def _join(numbers: Sequence[int]) -> str:
    return " or ".join(f"{n:,}" for n in numbers)
