"""One self-contained HTML page for an evaluation: no network, one script of its own, every string from data escaped."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import numpy as np
from markupsafe import Markup

from gambeson.disk import atomic
from gambeson.report import charts
from gambeson.report import evaluation_rows as queries
from gambeson.report.evaluation_words import (
    TITLES,
    Measured,
    curve_attack,
    headline,
    name_of_version,
    percent,
    shortfalls,
    span,
    threat,
)
from gambeson.report.page import Chart, environment

CURVE, CLEAN = charts.Look("#0369a1", "o", "●", "-"), charts.look(0)
"""How the curve and the smallest margins are drawn, and how the clean margins are."""
BINS = 48
"""Of the histogram of margins."""


def render(found: Measured) -> str:
    """The whole page as HTML text."""
    images = len(found.rows)
    script = (Path(__file__).parent / "sort.js").read_text(encoding="utf-8")
    return environment().get_template("evaluation.html.j2").render(
        found=found,
        facts=found.facts,
        record=found.record,
        images=images,
        threat=threat(found.facts),
        headline=headline(found),
        version=name_of_version(found),
        shortfalls=shortfalls(found),
        titles=TITLES,
        cascade=queries.cascade(found.rows),
        attacks=queries.attacks(found.rows),
        by_class=queries.by_class(found.rows, found.facts["class_names"]),
        costs=queries.costs(found.rows),
        curve=_curve(found),
        curve_attack=curve_attack(found)[0],
        points=queries.curve(found.rows),
        margins=_margins(found),
        checks=sorted(found.checks, key=lambda check: check.passed),
        looks={"clean": CLEAN, "met": CURVE},
        pc=lambda share: percent(share, images),
        span=lambda interval: span(interval, images),
        amount=amount,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def write(found: Measured, path: Path) -> Path:
    """Renders into `path`, whole or not at all."""
    text = render(found)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def amount(number: float | None, digits: int = 3) -> str:
    """'1,234', '12.3', '0.0123' or an en dash: `digits` of them that count, whole thousands with commas."""
    if number is None:
        return "–"
    return f"{number:,.0f}" if abs(number) >= 10 ** (digits - 1) else f"{number:.{digits}g}"


def _curve(found: Measured) -> Chart | None:
    """Accuracy against epsilon with the measured point at the threat's own; None without a curve."""
    points = queries.curve(found.rows)
    if not points:
        return None
    epsilon, sizes = found.facts["epsilon"], points[0].images
    last, (name, attack) = points[-1], curve_attack(found)
    label = (
        f"Line chart of accuracy under {name} against epsilon, from {points[0].accuracy.estimate:.1%} at 0 to "
        f"{last.accuracy.estimate:.1%} at {last.epsilon:g}."
    )
    svg = charts.robustness([(CURVE, points)], [(CURVE, found.robust)], epsilon, label)
    caption = (
        f"Line: {attack}, each epsilon on its own, on {sizes:,} of the {len(found.rows):,} images, with "
        "95 % bands; an upper bound. "
        f"Hollow mark: the robust accuracy of this page at {threat(found.facts)} (dotted line), with its interval."
    )
    return Chart("", Markup(svg), caption)


def _margins(found: Measured) -> Chart:
    """The margins of the clean images, and the smallest that the attacks met."""
    clean, met = queries.margins(found.rows)
    both = np.concatenate([clean, met])
    low, high = (float(end) for end in np.quantile(both, (0.005, 0.995)))
    low, high = min(low, -1e-3), max(high, 1e-3)
    edges, outside = np.linspace(low, high, BINS + 1), int(((both < low) | (both > high)).sum())
    below = int((met < 0).sum())
    label = f"Histogram of margins: {below} of {len(met)} images have a smallest margin below 0."
    svg = charts.histogram([(CLEAN, clean), (CURVE, met)], edges, "logit of the label minus the largest other", label)
    left = f" {outside:,} values lie outside the picture." if outside else ""
    caption = (
        f"Below 0 (dotted) the image is misclassified: {below:,} of {len(met):,} at their smallest margin, "
        f"{int((clean < 0).sum()):,} clean. An attack stops at an image as soon as it is fooled, so what lies below 0 "
        f"shows no depth.{left}"
    )
    return Chart("", Markup(svg), caption)
