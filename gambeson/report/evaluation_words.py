"""What an evaluation shows, in words and as a table for the terminal: the number, its interval, and what it is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from gambeson.report import evaluation_rows as queries
from gambeson.robustness.checks import Check
from gambeson.robustness.intervals import Interval, wilson

TITLES = {
    "clean": "clean images",
    "apgd-ce": "APGD, cross-entropy",
    "apgd-dlr": "APGD, DLR",
    "apgd-t": "APGD, targeted DLR",
    "fab": "FAB",
    "fab-t": "FAB, targeted",
    "square": "Square (black box)",
    "apgd-ce-x5": "APGD, cross-entropy, 5 starts",
    "apgd-dlr-x5": "APGD, DLR, 5 starts",
    "fab-x5": "FAB, 5 starts",
    "apgd-ce-eot": "APGD, cross-entropy, 20 looks",
    "apgd-dlr-eot": "APGD, DLR, 20 looks",
    "multitargeted": "MultiTargeted",
    "all": "all together",
}
"""The attacks' names for a reader."""
CURVE_ATTACKS = {"APGD": "AutoPGD", "PGD": "PGD"}
LOSSES = {"Margin": "the margin", "CrossEntropy": "cross-entropy", "DLR": "the DLR", "TargetedDLR": "the targeted DLR"}
"""Attacks of the curve, and what they climb, by the names of their classes."""
MANY = 1000
"""From so many images on, percentages have two decimals."""


@dataclass(frozen=True)
class CorruptionLine:
    """One corruption: the images that were right at each severity, of how many."""

    name: str
    right: dict[int, int]
    images: int

    @property
    def shares(self) -> dict[int, Interval]:
        """The accuracy at each severity."""
        return {severity: wilson(count, self.images) for severity, count in self.right.items()}

    @property
    def mean(self) -> float:
        """The mean accuracy over the severities."""
        return sum(self.right.values()) / (len(self.right) * self.images)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A finished evaluation: its rows, what must be known to quote it, its doubts, and how it was made."""

    rows: pa.Table  # of gambeson.robustness.assess
    facts: dict[str, Any]  # facts.json
    checks: tuple[Check, ...]  # checks.json
    record: dict[str, Any]  # done.json of the stage
    subject: str  # what was measured
    command: str  # the command that repeats it
    corruptions: tuple[CorruptionLine, ...] = ()  # none: not measured
    remarks: tuple[str, ...] = ()  # what the command has to add to the notes

    @property
    def robust(self) -> Interval:
        """The robust accuracy."""
        return queries.share(queries.robust(self.rows))

    @property
    def clean(self) -> Interval:
        """The clean accuracy."""
        return queries.share(queries.right(self.rows))

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]

    @property
    def notes(self) -> list[str]:
        """What a reader of the number must know, as sentences."""
        return [*self.facts["notes"], *self.remarks]


def percent(share: float, images: int) -> str:
    """0.47712 -> '47.7', or '47.71' of a thousand images and more."""
    return f"{100 * share:.{2 if images >= MANY else 1}f}"


def span(interval: Interval, images: int) -> str:
    """'39.2 to 56.3'."""
    return f"{percent(interval.low, images)} to {percent(interval.high, images)}"


def headline(found: Measured) -> str:
    """The number in one sentence, with all that belongs to it."""
    images, robust = len(found.rows), found.robust
    low = "" if found.facts["precision"] == "float32" else f", searched in {found.facts['precision']}"
    held = int(queries.robust(found.rows).sum())
    what = "robust accuracy" if found.facts["gradients"] else "accuracy under a black box (not a robust accuracy)"
    return (
        f"{percent(robust.estimate, images)} % {what} ({span(robust, images)}) under {threat(found.facts)}, "
        f"{name_of_version(found)}{low}: {held:,} of {images:,} test images of {found.facts['data']} stand"
    )


def threat(facts: dict[str, Any]) -> str:
    """'linf 8/255', 'l2 0.5'."""
    levels = facts["epsilon"] * 255
    whole = facts["norm"] == "linf" and abs(levels - round(levels)) < 1e-6
    return f"{facts['norm']} {f'{round(levels)}/255' if whole else format(facts['epsilon'], '.4g')}"


def name_of_version(found: Measured) -> str:
    """What the attacks are called together: only what RobustBench counts is called AutoAttack standard."""
    version = found.facts["version"]
    if not found.facts["gradients"]:
        return "black-box attacks only"
    if found.facts["official"] and not shortfalls(found):
        return "AutoAttack standard"
    if version == "custom":
        return f"{', '.join(queries.attacks(found.rows))} (not AutoAttack standard)"
    return "changed AutoAttack (not AutoAttack standard)" if version == "standard" else f"AutoAttack {version}"


def shortfalls(found: Measured) -> list[str]:
    """Why the number is not AutoAttack's standard one; empty where it is."""
    facts, spec = found.facts, found.record["config"]["autoattack"]
    usual = {"steps": 100, "targets": 9, "queries": 5000}
    changed = [f"{name} {spec[name]:,} (not {count:,})" for name, count in usual.items() if spec[name] != count]
    reasons = {
        "no gradients: black-box attacks only": not facts["gradients"],
        f"the version is {facts['version']}": facts["gradients"] and facts["version"] != "standard",
        f"other budgets: {', '.join(changed)}": bool(changed),
        f"the search ran in {facts['precision']}": facts["precision"] != "float32",
        "under l1 FAB is left out": facts["norm"] == "l1" and facts["version"] == "standard",
    }
    return [reason for reason, holds in reasons.items() if holds]


def curve_attack(found: Measured) -> tuple[str, str]:
    """('AutoPGD', 'AutoPGD on the margin, 40 steps from 1 start'): what measured the points of the curve."""
    spec = found.record["config"]["curve_attack"]
    name = CURVE_ATTACKS.get(spec["class"], str(spec["class"]))
    loss = LOSSES.get(spec["loss"]["class"], "another loss")
    starts = f"{spec['restarts']} start{'s' * (spec['restarts'] != 1)}"
    return name, f"{name} on {loss}, {spec['steps']} steps from {starts}"


def terminal_table(found: Measured) -> Table:
    """The cascade: what each attack saw, what it broke, and what stands after it."""
    images = len(found.rows)
    style = _style(found)
    table = Table(title=Text(found.subject), min_width=60)
    for heading in ("after", "saw", "broke", "standing %", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "after" else "right")
    lines = queries.cascade(found.rows)
    for fall in lines:
        end = style if fall is lines[-1] else ""
        cells = (f"{fall.seen:,}", f"{fall.fell:,}", percent(fall.standing.estimate, images))
        styled = [Text(cell, style=end) for cell in (*cells, span(fall.standing, images))]
        table.add_row(Text(TITLES.get(fall.name, fall.name)), *styled)
    return table


def _style(found: Measured) -> str:
    return "bold red" if found.failures or not found.facts["gradients"] else "bold"


def terminal_lines(found: Measured) -> Iterator[Text]:
    """What stands below the table: the number, why it is no standard one, failed checks in red, notes, corruptions."""
    yield Text(headline(found), style=_style(found))
    for reason in shortfalls(found):
        yield Text(f"not AutoAttack standard: {reason}", style="yellow" if found.facts["gradients"] else "bold red")
    for note in found.notes:
        yield Text(note, style="" if found.facts["gradients"] else "red")
    for check in found.failures:
        yield Text(f"check failed: {check.name}: {check.detail}", style="bold red")
    if not found.failures:
        yield Text(f"all {len(found.checks)} checks of the evaluation passed", style="green")
    if found.corruptions:
        mean = sum(line.mean for line in found.corruptions) / len(found.corruptions)
        severities = ", ".join(map(str, found.corruptions[0].right))
        yield Text(
            f"common corruptions: {100 * mean:.1f} % mean accuracy over {len(found.corruptions)} corruptions at "
            f"severity {severities}, {found.corruptions[0].images:,} images"
        )
