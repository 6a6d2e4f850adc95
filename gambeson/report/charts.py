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
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from gambeson.report.material import GuidanceEnergy, TrainingCurve
from gambeson.report.rows import CurvePoint
from gambeson.report.statistics import Interval

ARM_COLOURS = ("#4b5563", "#c2570c", "#0369a1", "#0f8a5f", "#a21caf", "#92400e")
INK, FAINT, PAPER = "#2b3038", "#d9dce1", "#ffffff"
SCHEME = {
    INK: "--ink",
    "#5b636e": "--soft",
    "#9aa1ab": "--axis",
    "#eceef1": "--rule",
    FAINT: "--line",
    PAPER: "--card",
    **{colour: f"--arm-{place}" for place, colour in enumerate(ARM_COLOURS)},
}
"""What each fixed colour of a chart is called in page.css, so that charts follow the reader's light or dark scheme."""
LEGIBLE = (0.16, 0.29)
"""Relative luminances that stand out by 3 to 1 (WCAG 1.4.11) from the page's cards, white and dark alike."""
MOST_MARKED = 24
"""Lines of a chart of training up to which each carries marks."""
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

    @property
    def css(self) -> str:
        """The colour as CSS: a variable of page.css that follows the scheme, the fixed colour where it has none."""
        return f"var({SCHEME[self.colour]}, {self.colour})" if self.colour in SCHEME else self.colour


# Okabe and Ito's colours, darkened where white paper needs it; marker and dash tell the arms apart without colour.
LOOKS = (
    Look(ARM_COLOURS[0], "o", "●", "-"),
    Look(ARM_COLOURS[1], "s", "■", (0, (4, 1.5))),
    Look(ARM_COLOURS[2], "^", "▲", (0, (6, 1.5, 1.5, 1.5))),
    Look(ARM_COLOURS[3], "D", "◆", "-"),
    Look(ARM_COLOURS[4], "v", "▼", (0, (2, 1.2))),
    Look(ARM_COLOURS[5], "P", "✚", (0, (5, 2))),
)


def look(position: int) -> Look:
    """The look of the arm at that position in the run; they repeat after six."""
    return LOOKS[position % len(LOOKS)]


def class_colours(classes: int) -> list[str]:
    """A colour per class: ten well-known ones, or as many hues as needed, each legible on white and on dark paper."""
    if classes <= 10:
        named = matplotlib.colormaps["tab10"](np.arange(10))[:classes]
    else:
        named = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, classes))
    return [_hex(_legible(colour[:3])) for colour in named]


def luminance(colour: Float[np.ndarray, "rgb=3"]) -> float:
    """The relative luminance (WCAG 2.2) of a colour (red, green, blue) in [0, 1]: 0 black, 1 white."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def _legible(colour: Float[np.ndarray, "rgb=3"]) -> Float[np.ndarray, "rgb=3"]:
    """The colour mixed with as little black or white as brings its luminance between the two of LEGIBLE."""
    low, high = LEGIBLE
    towards = np.zeros(3) if luminance(colour) > high else np.ones(3)
    mixes = (colour + (towards - colour) * share for share in np.linspace(0, 1, 101))
    return next(mixed for mixed in mixes if low <= luminance(mixed) <= high)


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
    signs: Sequence[str],
    limits: tuple[float, float, float, float],
    key: str,
    label: str,
) -> str:
    """One panel of the t-SNE: points coloured by class, the classes' signs ('' for none) at their medians."""
    colours = np.array(class_colours(len(signs)))
    with _styled(key):
        figure, axes = _figure(3.6, 3.6)
        axes.scatter(points[:, 0], points[:, 1], s=12, c=colours[labels], linewidths=0)
        for k in (each for each in np.unique(labels) if signs[int(each)]):
            middle = np.median(points[labels == k], axis=0)
            box = {"boxstyle": "round,pad=0.15", "facecolor": PAPER, "edgecolor": colours[k], "alpha": 0.85}
            axes.text(
                float(middle[0]), float(middle[1]), signs[int(k)], ha="center", va="center", fontsize=10, bbox=box
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


def steps(
    edges: Float[np.ndarray, " bins_and_one"],
    groups: Sequence[tuple[Look, Integer[np.ndarray, " bins"]]],
    xlabel: str,
    key: str,
    label: str,
) -> str:
    """Histograms that were counted before, as outlines over faint areas between the same edges."""
    with _styled(key):
        figure, axes = _figure(4.4, 2.9)
        for style, counts in groups:
            axes.stairs(counts, edges, color=style.colour, fill=True, alpha=0.13)
            axes.stairs(counts, edges, color=style.colour, linestyle=style.line, linewidth=1.6)
        axes.set(xlabel=xlabel, ylabel="images")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, key, label)


def energy(found: GuidanceEnergy, label: str) -> str:
    """Guidance's shift of the denoised image against sigma (log axis, noise first), a band from 5 to 95 %.

    Steps of sigma 0 have no place on the axis and are left out.
    """
    drawn = np.flatnonzero(found.sigma > 0)
    sigma = found.sigma[drawn]
    with _styled("energy"):
        figure, axes = _figure(5.2, 3.2)
        axes.fill_between(sigma, found.low[drawn], found.high[drawn], color=LOOKS[2].colour, alpha=0.16, linewidth=0)
        axes.plot(sigma, found.shift[drawn], color=LOOKS[2].colour, marker="o", markersize=4)
        axes.set(xscale="log", xlabel="sigma (noise, log scale)", ylabel="root mean square shift", ylim=(0, None))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.invert_xaxis()
        return _svg(figure, "energy", label)


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
    axes.plot([x], [interval.estimate], style.marker, color=style.colour, markerfacecolor=PAPER, markersize=6, zorder=5)


def _lines(lines: list[tuple[Look, list[int], list[float]]], key: str, ylabel: str, percent: bool, label: str) -> str:
    """Many lines are drawn with fewer points and no marks, to stay small; their colours and dashes remain."""
    most, marked = int(np.clip(4000 // len(lines), 40, 160)), len(lines) <= MOST_MARKED
    with _styled(key):
        figure, axes = _figure(4.4, 3.2)
        for style, steps, values in lines:
            x, y = _thinned(steps, most), _thinned(values, most)
            marks: Any = {"marker": style.marker, "markevery": max(1, len(x) // 6), "markersize": 3.5} if marked else {}
            axes.plot(x, y, color=style.colour, linestyle=style.line, linewidth=1.2, alpha=0.85, **marks)
        axes.set(xlabel="step", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return _svg(figure, key, label)


def _thinned(values: Sequence[float] | Sequence[int], most: int) -> np.ndarray:
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
    body = re.sub(r"<[^>]*>", lambda tag: _own(tag.group(), key), body)  # tags alone: a text may say what it likes
    return f'<svg class="chart" role="img" aria-label="{escape(label)}" {box.group()}>{body}'


def _own(tag: str, key: str) -> str:
    """A tag with the names of its page's chart, and colours that follow the page's scheme."""
    tag = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', tag)
    tag = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", tag)
    return re.sub(r"(fill|stroke): (#[0-9a-f]{6})\b", _in_scheme, tag)


def _in_scheme(found: re.Match[str]) -> str:
    """'fill: #2b3038' -> 'fill: var(--ink, #2b3038)'; other colours stay."""
    way, colour = found.groups()
    return f"{way}: var({SCHEME[colour]}, {colour})" if colour in SCHEME else found.group()
