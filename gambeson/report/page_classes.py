"""Queries for the page: accuracy by class, confusion under attack, and what each attack broke."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from gambeson.report import rows
from gambeson.report.material import ArmMaterial, Confusion, RunMaterial
from gambeson.report.statistics import Interval, mean_accuracy

MOST_CLASSES, LOWEST, HIGHEST = 100, 40, 10
"""Up to so many classes stand in the table; of more, those with the lowest and the highest worst-case accuracy."""
MOST_HEAT, MOST_PAIRS, MOST_CONFUSIONS = 20, 20, 6
MOST_NAME = 48


@dataclass(frozen=True)
class ClassCell:
    """One class of one arm: its accuracy in the worst case and clean."""

    worst: Interval
    clean: Interval


@dataclass(frozen=True)
class ClassLine:
    """One class: its number, its test images, and a cell for each evaluated arm."""

    name: str
    images: int
    cells: list[ClassCell]


@dataclass(frozen=True)
class ClassTable:
    """Lines for classes with test images, the arms they are about, and how many classes are left out."""

    arms: list[ArmMaterial]
    lines: list[ClassLine]
    left_out: int
    empty: int


@dataclass(frozen=True)
class HeatCell:
    """A share of a class's images, in words ('' for none), and whether it is on the diagonal."""

    text: str
    share: float
    right: bool


@dataclass(frozen=True)
class Pair:
    """A confusion: so many images of one class taken for another under attack, and clean; `share` of the class."""

    true: str
    taken: str
    attacked: int
    clean: int
    share: float


@dataclass(frozen=True)
class ConfusionView:
    """One student's confusion under attack: a heat map (name, cells), or the most frequent pairs of many classes."""

    arm: str
    attack: str
    images: int
    seeds: int
    heat: list[tuple[str, list[HeatCell]]]
    pairs: list[Pair]


@dataclass(frozen=True)
class BrokenLine:
    """One arm: what stands after each attack (of all test images, over its trainings), and what only one attack broke.

    alone: per column of attacks, images right on their own and broken by it only; counted over all trainings.
    """

    key: str
    title: str
    tried: int
    right: int
    standing: list[Interval]
    alone: list[int]
    held: float
    several: float


STANDING = ("Clean", "PGD", "APGD-CE", "APGD-CE, then targeted APGD", "All of them")
ALONE = ("PGD alone", "APGD-CE, not PGD", "Targeted APGD alone")


def shown(names: Sequence[str]) -> list[str]:
    """Class names as the page shows them: control characters and line ends out, at most 48 characters, never empty.

    The two joiners stay, which Persian, Indian scripts and emoji are written with.
    """
    plain = [
        " ".join("".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in name).split()) for name in names
    ]
    plain = [name or "(no name)" for name in plain]
    return [name if len(name) <= MOST_NAME else name[: MOST_NAME - 1].rstrip() + "…" for name in plain]


def class_table(material: RunMaterial, names: Sequence[str]) -> ClassTable | None:
    """Accuracy by class for every evaluated arm; None without any. Intervals are over test images and trainings."""
    arms = [arm for arm in material.arms if arm.rows is not None]
    if not arms:
        return None
    tables = [{column: rows.cells(arm.rows, column) for column in ("clean", "apgd")} for arm in arms if arm.rows]
    labels = [_labels(arm, table["clean"].indices) for arm, table in zip(arms, tables, strict=True)]
    counts = np.bincount(labels[0][labels[0] < len(names)], minlength=len(names))
    present = np.flatnonzero(counts)
    chosen = _chosen(present, [(table["apgd"].correct, of) for table, of in zip(tables, labels, strict=True)])
    lines = [
        ClassLine(names[k], int(counts[k]), [_cell(t, of == k) for t, of in zip(tables, labels, strict=True)])
        for k in chosen
    ]
    return ClassTable(arms, lines, len(present) - len(chosen), len(names) - len(present))


def confusions(material: RunMaterial, names: Sequence[str]) -> list[ConfusionView]:
    """A view of each student's confusion under attack, six at most."""
    titles = {arm.key: arm.title for arm in material.arms}
    return [_view(each, titles.get(each.arm, each.arm), names) for each in material.confusions[:MOST_CONFUSIONS]]


def broken(material: RunMaterial) -> list[BrokenLine]:
    """A line for each evaluated arm."""
    return [_broken(arm) for arm in material.arms if arm.rows is not None]


def _labels(arm: ArmMaterial, indices: Int64[np.ndarray, " images"]) -> Int64[np.ndarray, " images"]:
    """The label of each test image, in the order of `indices`."""
    assert arm.rows is not None
    index, first = np.unique(arm.rows["index"].to_numpy(), return_index=True)
    assert np.array_equal(index, indices)
    return arm.rows["label"].to_numpy()[first].astype(np.int64)


def _cell(table: dict[str, rows.Cells], mine: Bool[np.ndarray, " images"]) -> ClassCell:
    worst, clean = (mean_accuracy(table[column].correct[:, mine]) for column in ("apgd", "clean"))
    return ClassCell(worst, clean)


def _chosen(
    present: Int64[np.ndarray, " some"],
    arms: list[tuple[Bool[np.ndarray, "seeds images"], Int64[np.ndarray, " images"]]],
) -> list[int]:
    """All classes that are present, or the worst 40 and the best 10 by the mean of the arms, in this order."""
    if len(present) <= MOST_CLASSES:
        return present.tolist()
    n = int(present.max()) + 1
    shares = [np.bincount(of, right.mean(0), n)[:n] / np.bincount(of, minlength=n)[:n].clip(1) for right, of in arms]
    order = present[np.argsort(np.mean(shares, axis=0)[present], kind="stable")]
    return [*order[:LOWEST].tolist(), *order[-HIGHEST:].tolist()]


def _view(found: Confusion, title: str, names: Sequence[str]) -> ConfusionView:
    few = len(names) <= MOST_HEAT
    heat = _heat(found.attacked, names) if few else []
    pairs = [] if few else _pairs(found, names)
    return ConfusionView(title, found.attack, found.images, len(found.seeds), heat, pairs)


def _heat(counts: Int64[np.ndarray, "k k"], names: Sequence[str]) -> list[tuple[str, list[HeatCell]]]:
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    return [
        (name, [HeatCell(_whole(share), float(share), i == j) for j, share in enumerate(shares[i])])
        for i, name in enumerate(names)
    ]


def _whole(share: float) -> str:
    """A share in whole percent, '' for nothing at all."""
    return "" if share == 0 else "<1" if share < 0.005 else f"{100 * share:.0f}"


def _pairs(found: Confusion, names: Sequence[str]) -> list[Pair]:
    """The most frequent confusions under attack, most frequent first."""
    wrong = found.attacked.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    places = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    of_class = found.attacked.sum(1)
    return [
        Pair(names[i], names[j], int(wrong[i, j]), int(found.clean[i, j]), float(wrong[i, j] / of_class[i]))
        for i, j in places
    ]


def _broken(arm: ArmMaterial) -> BrokenLine:
    assert arm.rows is not None
    clean, pgd, ce, worst = (rows.cells(arm.rows, c).correct for c in ("clean", "pgd", "apgd_ce", "apgd"))
    held = pgd & worst
    alone = [clean & ~pgd & worst, clean & pgd & ~ce, clean & pgd & ce & ~worst]
    counts = [int(each.sum()) for each in alone]
    several = int((clean & ~held).sum()) - sum(counts)
    return BrokenLine(
        key=arm.key,
        title=arm.title,
        tried=clean.size,
        right=int(clean.sum()),
        standing=[mean_accuracy(each) for each in (clean, pgd, ce, worst, held)],
        alone=counts,
        held=float(held.mean()),
        several=several / clean.size,
    )
