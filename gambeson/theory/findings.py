"""What the measured guidances say about CDP's statements on its Figures 2 to 4: which of them hold, which do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gambeson.theory.guidance_figure import STARTS, Result

HARD = ("hnm", "hnm-conditional")
CONDITIONAL = ("hnm-conditional",)
OTHERS = (
    "infonce",
    "infonce-paper",
    "hnm",
    "debiased",
    "infonce-real-positives",
    "hnm-real-positives",
    "infonce-real-negatives",
    "hnm-real-negatives",
)
"""What appendix C.2 counts as all losses but the class-conditional one; the supervised contrastive loss is ours.

Which loss goes with its real pairs the paper does not say, so there are two of each.
"""
CIRCLE = "appendix C.2: every loss but the class-conditional one forms a circle within each class"
STATEMENTS = (
    ("section 4.2, Figure 2: hard negatives give a much smaller variance", HARD, "within", -1),
    ("section 4.2, Figure 2: hard negatives make the samples more distinguishable", HARD, "separation", 1),
    ("section 4.2: given the classes, the loss makes the two more separable", CONDITIONAL, "agreement", 1),
    (CIRCLE, OTHERS, "core", -1),
)
"""(what CDP says, of which variants, the statistic that shows it, the sign of its difference to the unguided one)."""
LOBED = 1 / 3
"""From this mean of `lobes` on, a hollow class is two heaps rather than a circle (evenly spread: about .1)."""


def paired_difference(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Mean of the differences, seed by seed, and the half width of its 95 % interval (Student's t)."""
    from scipy.stats import t

    n = len(values)
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    return {"mean": mean, "half_width": float(t.ppf(0.975, n - 1)) * math.sqrt(variance / n)}


def against_plain(panels: Sequence[Result], start: str) -> dict[str, dict[str, dict[str, float]]]:
    """variant -> statistic -> paired difference to the unguided samples of the same noise."""
    own = [r for r in panels if r.start == start]
    (plain,) = (r for r in own if r.guidance is None)
    return {
        r.variant.name: {name: paired_difference(values, plain.values[name]) for name, values in r.values.items()}
        for r in own
        if r is not plain
    }


def verdict(differences: dict[str, dict[str, float]], statistic: str, sign: int, lobes: float) -> str:
    """Whether the 95 % interval of a difference excludes 0: 'holds', 'opposite' or 'no clear difference'.

    A hollow class (less `core`) that lies in two heaps is no circle: 'hollow, but in two heaps'.
    """
    mean = differences[statistic]["mean"]
    if abs(mean) <= differences[statistic]["half_width"]:
        return "no clear difference"
    if mean * sign < 0:
        return "opposite"
    return "hollow, but in two heaps" if statistic == "core" and lobes >= LOBED else "holds"


def findings(panels: Sequence[Result]) -> list[dict[str, Any]]:
    """One record per statement, start and variant: statistic, difference to the unguided samples, verdict."""
    differences = {start: against_plain(panels, start) for start in STARTS}
    lobes = {(r.start, r.variant.name): r.mean("lobes") for r in panels}
    return [
        {
            "paper": text,
            "start": start,
            "variant": variant,
            "statistic": statistic,
            "expected": "smaller" if sign < 0 else "larger",
            "difference": differences[start][variant][statistic],
            "verdict": verdict(differences[start][variant], statistic, sign, lobes[start, variant]),
        }
        for text, names, statistic, sign in STATEMENTS
        for start in STARTS
        for variant in names
    ]


def summary(records: Sequence[dict[str, Any]]) -> list[str]:
    """The findings as lines: each statement, and below it per start which variants bear it out and which do not."""
    lines: list[str] = []
    for text, _, statistic, _ in STATEMENTS:
        lines.append(f"CDP, {text} [{statistic}]")
        for start in STARTS:
            own = [r for r in records if r["paper"] == text and r["start"] == start]
            told: dict[str, list[str]] = {}
            for r in own:
                told.setdefault(r["verdict"], []).append(r["variant"])
            lines += [f"  {start}: {word}: {', '.join(names)}" for word, names in told.items()]
    return lines
