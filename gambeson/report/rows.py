"""Queries over rows: every number in a report is one of these (HOUSE rule 15)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from gambeson.report.material import ArmMaterial, CheckRecord, RunMaterial
from gambeson.report.statistics import Correct, Difference, Interval, mean_accuracy, paired_difference

CURVE_PREFIX = "robust@"


@dataclass(frozen=True)
class Cells:
    """Correctness [seeds, images] with the seed of each row and the test-set index of each column."""

    seeds: Int64[np.ndarray, " seeds"]
    indices: Int64[np.ndarray, " images"]
    correct: Correct


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy at one epsilon, over `images` test images."""

    epsilon: float
    accuracy: Interval
    images: int


def cells(rows: pa.Table, column: str) -> Cells:
    """The column of a table of rows as [seeds, images]; 'clean' is prediction == label; nulls are left out.

    Raises ValueError when there are no rows or the seeds do not share one set of images.
    """
    seed, index, correct = _known(rows, column)
    order = np.lexsort((index, seed))
    seeds = np.unique(seed)
    if len(seeds) == 0 or len(seed) % len(seeds):
        raise ValueError(f"column {column!r}: expected the same images for every seed, got {_per_seed(seed)}")
    table = index[order].reshape(len(seeds), -1)
    whole = (seed[order].reshape(table.shape) == seeds[:, None]).all()
    if not whole or (table != table[0]).any() or (np.diff(table[0]) == 0).any():
        raise ValueError(f"column {column!r}: expected each image once for every seed, got {_per_seed(seed)}")
    return Cells(seeds, table[0], correct[order].reshape(table.shape))


def difference(a: ArmMaterial, b: ArmMaterial, column: str) -> Difference | None:
    """Arm `a` minus arm `b`, paired by image over the seeds both have; None when they share no seed or lack rows.

    Raises ValueError when they were evaluated on different images.
    """
    if a.rows is None or b.rows is None:
        return None
    x, y = cells(a.rows, column), cells(b.rows, column)
    if not np.array_equal(x.indices, y.indices):
        raise ValueError(f"arms {a.key!r} and {b.key!r}: expected the same test images, got {len(x.indices)} and "
                         f"{len(y.indices)} images with different indices")  # fmt: skip
    _, in_x, in_y = np.intersect1d(x.seeds, y.seeds, return_indices=True)
    return paired_difference(x.correct[in_x], y.correct[in_y]) if len(in_x) else None


def accuracy(arm: ArmMaterial, column: str) -> Interval | None:
    """The accuracy of an arm in a column with its interval; None when the arm has no rows."""
    return None if arm.rows is None else mean_accuracy(cells(arm.rows, column).correct)


def curve(arm: ArmMaterial) -> list[CurvePoint]:
    """Accuracy against epsilon, ascending, from the robust@ columns; epsilon 0 is the clean accuracy of that subset."""
    rows = arm.rows
    if rows is None:
        return []
    names = sorted((n for n in rows.schema.names if n.startswith(CURVE_PREFIX)), key=epsilon_of)
    measured = [(epsilon_of(name), cells(rows, name)) for name in names]
    if measured and measured[0][0] > 0:
        clean = cells(rows, "clean")
        subset = np.isin(clean.indices, measured[0][1].indices)
        measured.insert(0, (0.0, Cells(clean.seeds, clean.indices[subset], clean.correct[:, subset])))
    return [CurvePoint(epsilon, mean_accuracy(c.correct), c.correct.shape[1]) for epsilon, c in measured]


def seeds(arm: ArmMaterial) -> list[int]:
    """The seeds an arm was evaluated with, ascending."""
    return [] if arm.rows is None else sorted(set(arm.rows["seed"].to_pylist()))


def row_checks(material: RunMaterial) -> tuple[CheckRecord, ...]:
    """Failures of the rows to agree with themselves (none when all is well)."""
    failures = [(arm.key, *failure) for arm in material.arms if arm.rows is not None for failure in _quarrels(arm.rows)]
    return tuple(
        CheckRecord(arm=key, seed=seed, name="rows agree with themselves", passed=False, detail=detail)
        for key, seed, detail in failures
    )


def _quarrels(rows: pa.Table) -> list[tuple[int, str]]:
    """(seed, what is wrong) for rows that cannot be: robust though wrong, or a worst case that is not the worst."""
    values = {
        name: rows[name].to_numpy() for name in ("seed", "prediction", "label", "pgd", "apgd_ce", "apgd_t", "apgd")
    }
    right = values["prediction"] == values["label"]
    wrong = {
        "robust to an attack but wrong without one": ~right & (values["pgd"] | values["apgd_ce"] | values["apgd_t"]),
        "apgd is not apgd_ce and apgd_t": values["apgd"] != (values["apgd_ce"] & values["apgd_t"]),
    }
    return [
        (int(seed), f"{int(bad[values['seed'] == seed].sum())} images: {what}")
        for what, bad in wrong.items()
        for seed in np.unique(values["seed"][bad])
    ]


def _known(rows: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(seed, index, correct), one entry per row whose column is not null."""
    seed, index = rows["seed"].to_numpy(), rows["index"].to_numpy()
    if column == "clean":
        return seed, index, rows["prediction"].to_numpy() == rows["label"].to_numpy()
    known = rows[column].is_valid().to_numpy()
    return seed[known], index[known], rows[column].to_numpy()[known].astype(bool)


def _per_seed(seed: np.ndarray) -> str:
    found = [f"seed {s}: {n}" for s, n in zip(*np.unique(seed, return_counts=True), strict=True)]
    return "rows by " + ", ".join(found) if found else "no rows"


def epsilon_of(name: str) -> float:
    """The epsilon in a column's name (`robust@0.1`)."""
    return float(name.removeprefix(CURVE_PREFIX))
