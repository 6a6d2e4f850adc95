"""Queries over the rows of an evaluation (`gambeson.robustness.assess`): every number of its page is one of these.

Wrong images count as not robust everywhere; verdicts that are null (never tried) count in nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from gambeson.report.rows import CURVE_PREFIX, CurvePoint, epsilon_of
from gambeson.robustness.intervals import Interval, wilson

CLEAN = "clean"
"""What `broken_by` says of images that were wrong before any attack."""
MARGIN, QUERIES, SECONDS = "_margin", "_queries", "_seconds"
"""Endings of an attack's columns."""


@dataclass(frozen=True)
class Fall:
    """One line of the cascade: an attack (or the clean images), the images it saw, how many fell, and what stands."""

    name: str
    seen: int
    fell: int
    standing: Interval  # of all images, after it


@dataclass(frozen=True)
class ClassLine:
    """One class: its images, the share right, the share robust, and how many fell to each attack."""

    name: str
    images: int
    clean: Interval
    robust: Interval
    broken: dict[str, int]


@dataclass(frozen=True)
class Price:
    """What an attack has cost on average for some images; None where there are none."""

    images: int
    queries: float | None
    seconds: float | None


@dataclass(frozen=True)
class Cost:
    """One attack (or all together): for each image that was robust in the end, and for each that it broke."""

    name: str
    robust: Price
    broken: Price
    seconds: float  # in all


def attacks(rows: pa.Table) -> list[str]:
    """The names of the attacks, in their order."""
    return [name.removesuffix(MARGIN) for name in rows.column_names if name.endswith(MARGIN)]


def right(rows: pa.Table) -> Bool[np.ndarray, " n"]:
    """[N] whether the clean image is classified as its label."""
    return rows["prediction"].to_numpy() == rows["label"].to_numpy()


def robust(rows: pa.Table) -> Bool[np.ndarray, " n"]:
    """[N] whether the image is right and stood every attack."""
    return rows["robust"].to_numpy()


def share(chosen: Bool[np.ndarray, " n"]) -> Interval:
    """The share that is True, with Wilson's 95 % interval. Raises ValueError for none at all."""
    return wilson(int(chosen.sum()), len(chosen))


def broken_by(rows: pa.Table) -> np.ndarray:
    """[N] the attack that broke each image, 'clean' for a wrong one, None for a robust one."""
    return np.array(rows["broken_by"].to_pylist(), dtype=object)


def cascade(rows: pa.Table) -> list[Fall]:
    """From the clean images through every attack: each sees what the ones before it left."""
    who, standing = broken_by(rows), right(rows)
    lines = [Fall(CLEAN, len(rows), int((~standing).sum()), share(standing))]
    for name in attacks(rows):
        seen, standing = len(rows) - rows[name].null_count, standing & (who != name)
        lines.append(Fall(name, seen, int((who == name).sum()), share(standing)))
    return lines


def by_class(rows: pa.Table, names: list[str]) -> list[ClassLine]:
    """A line for each class that has images, in the order of the classes."""
    label, who, held, correct = rows["label"].to_numpy(), broken_by(rows), robust(rows), right(rows)
    members = [(name, label == k) for k, name in enumerate(names)]
    return [
        ClassLine(
            name=name,
            images=int(mine.sum()),
            clean=share(correct[mine]),
            robust=share(held[mine]),
            broken={attack: int((who[mine] == attack).sum()) for attack in attacks(rows)},
        )
        for name, mine in members
        if mine.any()
    ]


def curve(rows: pa.Table) -> list[CurvePoint]:
    """Accuracy against epsilon, ascending; epsilon 0 is the clean accuracy of the same images. Empty: not measured."""
    names = sorted((n for n in rows.column_names if n.startswith(CURVE_PREFIX)), key=epsilon_of)
    if not names:
        return []
    subset = rows[names[0]].is_valid().to_numpy()
    columns = [(0.0, right(rows)[subset])]
    columns += [(epsilon_of(name), np.asarray(rows[name].drop_null().to_pylist(), dtype=bool)) for name in names]
    return [CurvePoint(epsilon, share(column), len(column)) for epsilon, column in columns]


def margins(rows: pa.Table) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """[N] the clean margin, and the smallest that any attack met (the clean one where none was tried)."""
    clean = rows["margin"].to_numpy().astype(float)
    met = [rows[name + MARGIN].to_numpy(zero_copy_only=False).astype(float) for name in attacks(rows)]
    return clean, np.fmin.reduce([clean, *met])


def costs(rows: pa.Table) -> list[Cost]:
    """A line for each attack, and one for all together where there are several."""
    names, who, held = attacks(rows), broken_by(rows), robust(rows)
    lines = [_cost(name, rows, [name], held, who == name) for name in names]
    if len(names) > 1:
        lines.append(_cost("all", rows, names, held, np.isin(who, names)))
    return lines


def _cost(name: str, rows: pa.Table, attacked: list[str], held: np.ndarray, fell: np.ndarray) -> Cost:
    queries = sum(rows[each + QUERIES].to_numpy().astype(float) for each in attacked)
    seconds = sum(rows[each + SECONDS].to_numpy().astype(float) for each in attacked)
    of_robust, of_broken = (_price(np.asarray(queries)[some], np.asarray(seconds)[some]) for some in (held, fell))
    return Cost(name, of_robust, of_broken, float(np.sum(seconds)))


def _price(queries: np.ndarray, seconds: np.ndarray) -> Price:
    some = len(queries) > 0
    return Price(len(queries), float(queries.mean()) if some else None, float(seconds.mean()) if some else None)
