"""The charts of a comparison: accuracy against epsilon of all runs' arms, and their trainings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from gambeson.report import charts
from gambeson.report.charts import ARM_COLOURS, Look
from gambeson.report.compare_material import Contender, ContenderArm
from gambeson.report.compare_words import listed, score
from gambeson.report.material import TrainingCurve
from gambeson.report.verdict import percent

MOST_LINES = 8
"""Lines that one chart can hold and still be read."""
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (7, 1.5, 1.2, 1.5)))


@dataclass(frozen=True, eq=False)
class Line:
    """An arm of a run as it is drawn."""

    contender: Contender
    arm: ContenderArm
    look: Look

    @property
    def title(self) -> str:
        """'2 real only': the number of its run, and the arm."""
        return f"{self.contender.number} {self.arm.title}"

    @property
    def dashes(self) -> str:
        """The dashes of the line for an SVG in the legend; empty for a whole line."""
        return "" if self.look.line == "-" else " ".join(f"{2 * float(n):g}" for n in self.look.line[1])


@dataclass(frozen=True, eq=False)
class Drawn:
    """A chart with its title (may be empty), caption and the lines in it."""

    title: str
    svg: Markup
    caption: str
    lines: tuple[Line, ...]


def lines_of(contenders: Sequence[Contender]) -> list[Line]:
    """Every measured or trained arm of every run. Colour and marker tell arms apart and dashes runs, or the other way
    round where there are more runs than kinds of arms; where each run has its own chart, arms alone are told apart."""
    told = [c for c in contenders if c.arms]
    keys = list(dict.fromkeys(arm.key for c in told for arm in c.arms))
    many = sum(len(c.arms) for c in told) > MOST_LINES  # each run then has a chart of its own
    by_arm = many or len(keys) >= len(told)
    return [
        Line(c, arm, _look(*((keys.index(arm.key), 0 if many else place) if by_arm else (place, keys.index(arm.key)))))
        for place, c in enumerate(told)
        for arm in c.arms
        if arm.measures or arm.training
    ]


def _look(first: int, second: int) -> Look:
    marker, glyph = MARKERS[first % len(MARKERS)]
    return Look(ARM_COLOURS[first % len(ARM_COLOURS)], marker, glyph, DASHES[second % len(DASHES)])


def robustness(lines: Sequence[Line]) -> list[Drawn]:
    """A chart for each threat; one for each run where that would be too many lines in one."""
    groups: dict[tuple[str, float], list[Line]] = {}
    for line in (each for each in lines if each.arm.curve):
        groups.setdefault((line.contender.norm, line.contender.epsilon), []).append(line)
    made = []
    for (norm, epsilon), group in groups.items():
        threat = f"{norm} eps {epsilon:.4g}" if len(groups) > 1 else ""
        for title, part in _parts(group, len(groups) > 1):
            heading = ", ".join(filter(None, (title, threat)))
            made.append(_robustness(heading, f"robustness-{len(made)}", part, epsilon))
    return made


def _parts(group: list[Line], several: bool) -> list[tuple[str, list[Line]]]:
    """The lines of one threat by chart, each with its run's name where it shows one run of several."""
    runs = {line.contender.number: line.contender for line in group}
    if len(group) <= MOST_LINES and (len(runs) > 1 or not several):
        return [("", group)]
    return [(f"{n} {run.name}", [line for line in group if line.contender is run]) for n, run in runs.items()]


def _robustness(title: str, key: str, lines: list[Line], epsilon: float) -> Drawn:
    ends = [f"{line.title} {percent(line.arm.curve[-1].accuracy.estimate)} % at {line.arm.curve[-1].epsilon:g}"
            for line in lines]  # fmt: skip
    label = f"Line chart of accuracy under attack against epsilon. {'; '.join(ends)}."
    worst = [
        (line.look, found) for line in lines if line.arm.headline and (found := score(line.arm, line.arm.headline))
    ]
    svg = charts.robustness([(line.look, line.arm.curve) for line in lines], worst, epsilon, label)
    sizes = listed([f"{n:,}" for n in sorted({p.images for line in lines for p in line.arm.curve})], "or")
    caption = (
        f"Lines: each run's own attack of the curve on {sizes} test images, 95 % bands. Hollow marks: under the "
        f"strongest attacks on all images, at epsilon {epsilon:.4g} (dotted line)."
    )
    return Drawn(title, Markup(_renamed(svg, key)), caption, tuple(lines))


def _renamed(svg: str, key: str) -> str:
    """The chart with ids that no other chart of the page has."""
    for place in ('id="', 'href="#', "url(#"):
        svg = svg.replace(place, f"{place}{key}-")
    return svg


def training(lines: Sequence[Line]) -> list[Drawn]:
    """Loss, clean and robust validation accuracy against the step, the mean of each arm's trainings; none without any,
    and none with more lines than can be told apart."""
    told = [(line, mean) for line in lines if (mean := mean_curve(line.arm.training)) is not None]
    if not told or len(told) > MOST_LINES:
        return []
    curves = [(line.look, (mean,)) for line, mean in told]
    drawn = tuple(line for line, _ in told)
    loss = charts.training_loss(curves, "Line chart of the training loss by step.")
    panels = [Drawn("Training loss", Markup(_renamed(loss, "loss")), "", drawn)]
    for column in ("clean", "robust"):
        ends = [f"{line.title} {percent(getattr(mean, f'validation_{column}')[-1])} %" for line, mean in told]
        label = f"Line chart of {column} validation accuracy by step. At the end: {'; '.join(ends)}."
        svg = charts.validation(curves, column, label)
        panels.append(Drawn(f"Validation, {column}", Markup(_renamed(svg, column)), "", drawn))
    return panels


def mean_curve(runs: Sequence[TrainingCurve]) -> TrainingCurve | None:
    """The mean of trainings over the steps that all of them have; None without one."""
    usable = [run for run in runs if run.validation_robust and run.loss]
    if not usable:
        return None
    steps = sorted(set(usable[0].steps).intersection(*(run.steps for run in usable[1:])))
    looks = sorted(set(usable[0].validation_steps).intersection(*(run.validation_steps for run in usable[1:])))
    if not steps or not looks:
        return None
    return TrainingCurve(
        seed=usable[0].seed,
        steps=steps,
        loss=_mean([dict(zip(run.steps, run.loss, strict=True)) for run in usable], steps),
        validation_steps=looks,
        validation_clean=_mean([dict(zip(r.validation_steps, r.validation_clean, strict=True)) for r in usable], looks),
        validation_robust=_mean(
            [dict(zip(r.validation_steps, r.validation_robust, strict=True)) for r in usable], looks
        ),
    )


def _mean(runs: list[dict[int, float]], steps: list[int]) -> list[float]:
    return [float(np.mean([run[step] for run in runs])) for step in steps]
