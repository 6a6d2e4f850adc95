"""The report's charts as inline SVG strings: matplotlib without pyplot, the same bytes for the same numbers.

Legends are left to the page, which can wrap them on a phone; every text in a chart is drawn as text, never as mathtext.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gambeson.report.material import TrainingCurve
from gambeson.report.rows import CurvePoint
from gambeson.report.statistics import Interval

INK, FAINT = "#2b3038", "#d9dce1"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b636e",
    "ytick.color": "#5b636e",
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Look:
    """How one arm is drawn: colour, matplotlib marker, the same marker as a letter for the legend, and line style."""

    colour: str
    marker: str
    glyph: str
    line: Any


# Okabe and Ito's colours, darkened where white paper needs it; marker and dash tell the arms apart without colour.
LOOKS = (
    Look("#4b5563", "o", "●", "-"),
    Look("#c2570c", "s", "■", (0, (4, 1.5))),
    Look("#0369a1", "^", "▲", (0, (6, 1.5, 1.5, 1.5))),
    Look("#0f8a5f", "D", "◆", "-"),
    Look("#a21caf", "v", "▼", (0, (2, 1.2))),
    Look("#92400e", "P", "✚", (0, (5, 2))),
)


def look(position: int) -> Look:
    """The look of the arm at that position in the run; they repeat after six."""
    return LOOKS[position % len(LOOKS)]


def class_colours(classes: int) -> list[str]:
    """A colour per class: ten well-known ones, or as many hues as needed."""
    if classes <= 10:
        named = matplotlib.colormaps["tab10"](np.arange(10))
        return [_hex(colour) for colour in named[:classes]]
    return [_hex(colour) for colour in matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, classes))]


def robustness(
    curves: Sequence[tuple[Look, Sequence[CurvePoint]]],
    worst: Sequence[tuple[Look, Interval]],
    epsilon: float,
    label: str,
) -> str:
    """Accuracy against epsilon, one line and band per arm; hollow marks with bars are the worst case at `epsilon`."""
    with _styled("robustness"):
        figure, axes = _figure(5.2, 3.5)
        for style, points in curves:
            _band(axes, style, points)
        widest = max([epsilon, *(p.epsilon for _, points in curves for p in points)])
        axes.axvline(epsilon, color="#9aa1ab", linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        for place, (style, interval) in enumerate(worst):
            shift = widest * 0.014 * (place - (len(worst) - 1) / 2)
            _mark(axes, style, epsilon + shift, interval)
        axes.set(
            xlabel="epsilon (pixels in [0, 1])", ylabel="accuracy", ylim=(0, 1.0), xlim=(-0.02 * widest, 1.04 * widest)
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return _svg(figure, "robustness", label)


def training_loss(curves: Sequence[tuple[Look, Sequence[TrainingCurve]]], label: str) -> str:
    """The training loss against the step, one thin line per seed; long curves are averaged down to 160 points."""
    lines = [(style, run.steps, run.loss) for style, runs in curves for run in runs]
    return _lines(lines, "loss", "training loss", percent=False, label=label)


def validation(curves: Sequence[tuple[Look, Sequence[TrainingCurve]]], column: str, label: str) -> str:
    """Validation accuracy ('clean' or 'robust') against the step, one thin line per seed."""
    field = {"clean": "validation_clean", "robust": "validation_robust"}[column]
    lines = [(style, run.validation_steps, getattr(run, field)) for style, runs in curves for run in runs]
    return _lines(lines, f"validation-{column}", f"{column} accuracy", percent=True, label=label)


def embedding(
    points: Float[np.ndarray, "n 2"],
    labels: Integer[np.ndarray, " n"],
    class_names: Sequence[str],
    limits: tuple[float, float, float, float],
    key: str,
    label: str,
) -> str:
    """One panel of the t-SNE: points coloured by class, short class names at the class medians, shared `limits`."""
    colours = np.array(class_colours(len(class_names)))
    with _styled(key):
        figure, axes = _figure(3.6, 3.6)
        axes.scatter(points[:, 0], points[:, 1], s=13, c=colours[labels], alpha=0.8, linewidths=0)
        for k in np.unique(labels) if max(map(len, class_names)) <= 10 else ():
            middle = np.median(points[labels == k], axis=0)
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colours[k], "alpha": 0.85}
            axes.text(
                float(middle[0]), float(middle[1]), class_names[int(k)], ha="center", va="center", fontsize=9, bbox=box
            )
        axes.set(xlim=limits[:2], ylim=limits[2:], xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=FAINT)
        return _svg(figure, key, label)


def histogram(groups: Sequence[tuple[Look, np.ndarray]], edges: np.ndarray, xlabel: str, label: str) -> str:
    """Counts of each group's values between the same edges, as outlines over faint areas; a line marks 0."""
    with _styled("histogram"):
        figure, axes = _figure(5.2, 3.0)
        for style, values in groups:
            counts, _ = np.histogram(values, edges)
            axes.stairs(counts, edges, color=style.colour, fill=True, alpha=0.13)
            axes.stairs(counts, edges, color=style.colour, linestyle=style.line, linewidth=1.6)
        axes.axvline(0, color="#9aa1ab", linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        axes.set(xlabel=xlabel, ylabel="images")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, "histogram", label)


def _styled(salt: str) -> AbstractContextManager[None]:
    """The charts' style for a while; `salt` makes matplotlib's hashed ids the same in every run."""
    style: Any = {**STYLE, "svg.hashsalt": salt}
    return matplotlib.rc_context(style)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _band(axes: Axes, style: Look, points: Sequence[CurvePoint]) -> None:
    x = [p.epsilon for p in points]
    low, high = [p.accuracy.low for p in points], [p.accuracy.high for p in points]
    axes.fill_between(x, low, high, color=style.colour, alpha=0.13, linewidth=0)
    y = [p.accuracy.estimate for p in points]
    axes.plot(x, y, color=style.colour, marker=style.marker, linestyle=style.line, markersize=4.5)


def _mark(axes: Axes, style: Look, x: float, interval: Interval) -> None:
    axes.plot([x, x], [interval.low, interval.high], color=style.colour, linewidth=1.4, zorder=4)
    axes.plot(
        [x], [interval.estimate], style.marker, color=style.colour, markerfacecolor="white", markersize=6, zorder=5
    )


def _lines(lines: list[tuple[Look, list[int], list[float]]], key: str, ylabel: str, percent: bool, label: str) -> str:
    with _styled(key):
        figure, axes = _figure(4.4, 3.2)
        for style, steps, values in lines:
            x, y = _thinned(steps), _thinned(values)
            every = max(1, len(x) // 6)
            axes.plot(x, y, color=style.colour, linestyle=style.line, marker=style.marker, markevery=every,
                      linewidth=1.2, markersize=3.5, alpha=0.85)  # fmt: skip
        axes.set(xlabel="step", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return _svg(figure, key, label)


def _thinned(values: Sequence[float] | Sequence[int], most: int = 160) -> np.ndarray:
    """Means of at most `most` equal stretches of the values."""
    array = np.asarray(values, dtype=float)
    return array if len(array) <= most else np.array([part.mean() for part in np.array_split(array, most)])


def _hex(colour: Any) -> str:
    return "#" + "".join(f"{round(255 * float(c)):02x}" for c in colour[:3])


def _svg(figure: Figure, key: str, label: str) -> str:
    """The figure as an <svg> element that scales, speaks its label, and shares no id with another chart."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    body = text[text.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", body)
    return f'<svg class="chart" role="img" aria-label="{escape(label)}" {box.group()}>{body}'
