"""The guidance figures drawn: small multiples on the same axes, the same bytes for the same numbers, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gambeson.disk import atomic
from gambeson.theory.guidance_figure import FRAME
from gambeson.theory.world import Classes, Points, class_means, two_gaussians

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#2b3038", "#9aa1ab"
CLASS_LOOKS = (("#0072B2", "o", "class 0"), ("#D55E00", "^", "class 1"))
"""Okabe and Ito's blue and vermilion, and a marker for those who see no difference between them."""
DPI = 100
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gambeson guidance figure",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small multiple: labelled points below a title and lines of numbers."""

    title: str
    lines: tuple[str, ...]
    points: Points
    classes: Classes


def draw(panels: Sequence[Panel], columns: int, heading: str, note: str) -> Figure:
    """The panels in rows of `columns`, 12 inches (1,200 pixels) wide, between heading and note; drawn in `STYLE`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    wide = 12 / columns
    figure = Figure(figsize=(12, rows * (wide + 0.42) + 1.0), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for place, panel in zip(axes, panels, strict=True):
        _panel(place, panel)
    figure.suptitle(heading + "\n", fontsize=11, linespacing=0.6)  # air below it
    handles, names = axes[0].get_legend_handles_labels()
    legend = {"title": note, "title_fontsize": 8.5, "fontsize": 9, "frameon": False, "ncols": len(names)}
    figure.legend(handles, names, loc="outside lower center", **legend).get_title().set_multialignment("center")
    return figure


def _panel(axes: Axes, panel: Panel) -> None:
    for k, (colour, marker, name) in enumerate(CLASS_LOOKS):
        x, y = panel.points[panel.classes == k].T.tolist()
        axes.plot(x, y, marker, color=colour, markersize=3.6, markeredgewidth=0, alpha=0.7, label=name)
    _means(axes, two_gaussians().means.tolist(), "+", "mean of a class in the world", markersize=11)
    own = class_means(panel.points, panel.classes).tolist()
    _means(axes, own, "D", "mean of its samples", markersize=5.5, markerfacecolor=INK)
    axes.set(xlim=(-FRAME, FRAME), ylim=(-FRAME, FRAME), aspect="equal", xticks=(-4, 0, 4), yticks=(-4, 0, 4))
    axes.tick_params(length=2, labelsize=8)
    axes.grid(color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title("\n".join(panel.lines), fontsize=8.5, pad=5, linespacing=1.25)
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
    axes.text(0.03, 0.97, panel.title, transform=axes.transAxes, va="top", fontweight="bold", bbox=box, zorder=6)


def _means(axes: Axes, means: list[list[float]], marker: str, label: str, **look: Any) -> None:
    x, y = zip(*means, strict=True)
    axes.plot(x, y, marker, color="white", markersize=look["markersize"] + 2, markeredgewidth=3.2, zorder=4)
    axes.plot(x, y, marker, color=INK, markeredgewidth=1.4, zorder=5, label=label, **look)


def write(panels: Sequence[Panel], columns: int, heading: str, note: str, stem: Path) -> list[Path]:
    """Draws STEM.svg and STEM.png, each whole or not at all; their paths. EnvironmentFault where they cannot be."""
    return save(lambda: draw(panels, columns, heading, note), heading, stem)


def save(figure: Callable[[], Figure], heading: str, stem: Path) -> list[Path]:
    """Draws a figure in `STYLE` and saves it as STEM.svg and STEM.png, the same bytes each time; their paths."""
    import matplotlib

    style: Any = STYLE
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    told = ({"Title": heading, "Date": None, "Creator": None}, {"Title": heading, "Software": None})
    with matplotlib.rc_context(style):
        drawn = figure()
        for path, metadata in zip(paths, told, strict=True):
            with atomic(path) as draft:
                drawn.savefig(draft, format=path.suffix[1:], metadata=metadata)
    return paths
