"""CDP's Figure 1 anew: the cases of Proposition 1 in the plane, with the accuracies that each synthetic mean gives."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gambeson.randomness import generator
from gambeson.theory.drawing import CLASS_LOOKS, DPI, FAINT, INK, save
from gambeson.theory.gaussian import best_accuracies, clean_accuracy, robust_accuracy, soft_threshold
from gambeson.theory.means import mean_at, orthogonal, scaled, shifted
from gambeson.theory.trials import Protocol, World, run_trials

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EPSILON = 0.5
COUNT, TRIALS = 10, 4000
"""Images a class, and trials, of the finite-sample numbers."""
FRAME = 3.9


@dataclass(frozen=True, kw_only=True)
class Case:
    """A panel: real mean, synthetic mean, and what a classifier learned from the synthetic images alone reaches.

    clean, robust: exact, of theta = mu~, the limit with the images' own classes as labels; trials: mean and deviation
    over trials with COUNT images a class, pseudo-labelled.
    """

    title: str
    mean: tuple[float, ...]
    synthetic: tuple[float, ...]
    clean: float
    robust: float
    optimum: dict[str, float]
    trials: dict[str, dict[str, float]]


def _case(title: str, mean: Tensor, synthetic: Tensor) -> Case:
    world = World(mean=tuple(mean.tolist()), synthetic=tuple(synthetic.tolist()), epsilon=EPSILON)
    outcome = run_trials(world, Protocol(), COUNT, COUNT, TRIALS, generator(0, "figure 1", title))
    return Case(
        title=title,
        mean=world.mean,
        synthetic=world.synthetic,
        clean=float(clean_accuracy(synthetic, mean)),
        robust=float(robust_accuracy(synthetic, mean, EPSILON)),
        optimum={name: float(value) for name, value in best_accuracies(mean, EPSILON).items()},
        trials={m: {"mean": outcome.mean(m), "deviation": outcome.deviation(m)} for m in ("clean", "robust")},
    )


def cases() -> list[Case]:
    """The three cases of the proposition, and the one where its third fails: an entry of mu below epsilon."""
    mu, below = mean_at(2, 20, math.sqrt(2)), mean_at(2, 30, 1.0)
    return [
        _case("Case 1: \u03bc\u0303 across \u03bc", mu, orthogonal(mu, 1.0, generator(0, "figure 1"))),
        _case("Case 2: \u03bc\u0303 = 1.5 \u03bc", mu, scaled(mu, 1.5)),
        _case("Case 3: \u03bc\u0303 = 1.5 (\u03bc \u2212 \u03b5\u00b71)", mu, shifted(mu, EPSILON, 1.5)),
        _case("Case 3 where \u03bc\u2082 < \u03b5 (Table 8)", below, shifted(below, EPSILON, 1.5)),
        _case("there the soft threshold is best", below, 1.5 * soft_threshold(below, EPSILON)),
    ]


HEADING = "Proposition 1 of Contrastive-DP in the plane (its Figure 1), \u03b5 = 0.5 in linf, \u03c3 = 1"
NOTE = (
    "circles: one standard deviation of a class, filled: real, dashed: synthetic; square: what the attacker reaches "
    "from a class mean; line: boundary of \u03b8 = \u03bc\u0303\n"
    f"clean and robust accuracy of \u03b8 = \u03bc\u0303, exact; below, mean \u00b1 deviation over {TRIALS:,} trials "
    f"of {COUNT} pseudo-labelled images a class; best: what no linear classifier exceeds"
)


def write(out: Path) -> list[Path]:
    """figure-1.svg, figure-1.png and figure-1.json in `out`; their paths."""
    from gambeson.disk import write_json

    found = cases()
    record = {"epsilon": EPSILON, "images_per_class": COUNT, "trials": TRIALS, "note": NOTE}
    write_json(out / "figure-1.json", {**record, "cases": [asdict(case) for case in found]})
    return [*save(lambda: _draw(found), HEADING, out / "figure-1"), out / "figure-1.json"]


def _draw(found: list[Case]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.0), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(1, len(found), sharex=True, sharey=True), found, strict=True):
        _panel(axes, case)
    figure.suptitle(HEADING + "\n", fontsize=11, linespacing=0.6)
    figure.supxlabel(NOTE, fontsize=8.5)
    return figure


def _panel(axes: Axes, case: Case) -> None:
    from matplotlib.patches import Circle, Rectangle

    for sign, (colour, marker, _) in zip((-1, 1), CLASS_LOOKS, strict=True):
        x, y = (sign * v for v in case.mean)
        axes.add_patch(Circle((x, y), 1, facecolor=colour, alpha=0.22))
        box = Rectangle((x - EPSILON, y - EPSILON), 2 * EPSILON, 2 * EPSILON, fill=False, edgecolor=colour)
        axes.add_patch(box)
        axes.plot([x], [y], marker, color=colour, markersize=6)
        other: Any = tuple(sign * v for v in case.synthetic)
        axes.add_patch(Circle(other, 1, fill=False, edgecolor=colour, linestyle="--"))
        axes.plot(*([v] for v in other), marker, markerfacecolor="none", color=colour, markersize=6)
    first, second = case.synthetic
    far = 3 * FRAME / math.hypot(first, second)
    axes.plot([-second * far, second * far], [first * far, -first * far], color=INK, linewidth=1.2)
    axes.set(xlim=(-FRAME, FRAME), ylim=(-FRAME, FRAME), aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    axes.grid(color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=2, labelsize=8, color=FAINT)
    axes.set_title(_numbers(case), fontsize=8.5, pad=5, linespacing=1.3)


def _numbers(case: Case) -> str:
    told = [case.title, f"clean {100 * case.clean:.1f} %, robust {100 * case.robust:.1f} %"]
    parts = [f"{100 * n['mean']:.1f} \u00b1 {100 * n['deviation']:.1f}" for n in case.trials.values()]
    told.append(f"trials: {parts[0]}, {parts[1]}")
    best = case.optimum
    return "\n".join([*told, f"best: {100 * best['clean']:.1f}, {100 * best['robust']:.1f}"])
