"""CDP's Tables 1, 7, 8 and 9 beside our trials: each cell with both means, its verdict, and why it cannot be met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

from gambeson.errors import require, unknown
from gambeson.randomness import generator
from gambeson.theory.gaussian import best_accuracies
from gambeson.theory.means import mean_at
from gambeson.theory.printed import EPSILONS, LENGTHS, TABLES, TRIALS, Cell, cells
from gambeson.theory.trials import Outcome, Protocol, World, run_trials

Verdict = Literal["met", "finite test set", "copied row", "not met"]
TEST_IMAGES = 10_000
"""The size of the test set that the paper's accuracies may come from; it names none."""

WORDS: dict[str, str] = {
    "met": "the means differ by at most one deviation of a trial",
    "finite test set": f"farther than that, but within two standard errors of one test set of {TEST_IMAGES:,} images "
    "shared by the trials and of the means; ours are exact accuracies",
    "copied row": "Table 1 repeats its c = 0.5 rows as `real`; Tables 7 and 9 have the real rows",
    "not met": "neither",
}
"""What the verdicts mean."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A printed number beside ours.

    deviation_used: the paper's, or ours where it prints the mean in its place. difference = paper - ours;
    in_deviations: in deviations of a trial; in_errors: in standard errors of the two means (50 trials, ours).
    ratio: the paper's deviation over ours. optimum: what no linear classifier exceeds.
    """

    cell: Cell
    mean: float
    deviation: float
    deviation_used: float
    difference: float
    in_deviations: float
    in_errors: float
    ratio: float | None
    optimum: float
    verdict: Verdict
    reasons: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """JSON: the cell's fields as `paper`, ours beside them."""
        return {**asdict(self), "cell": {**asdict(self.cell), "source": self.cell.source}}


def world_of(cell: Cell) -> World:
    """The Gaussian world of a cell; synthetic means c mu (those of real images where there are none)."""
    return _world(cell.dimension, cell.degrees, cell.c)


@cache
def _world(dimension: int, degrees: int, c: float | None) -> World:
    mean = mean_at(dimension, degrees, LENGTHS[dimension, degrees])
    other = mean * (1.0 if c is None else c)
    return World(mean=tuple(mean.tolist()), synthetic=tuple(other.tolist()), epsilon=EPSILONS[dimension])


def simulate(cell: Cell, protocol: Protocol, trials: int, seed: int) -> Outcome:
    """The cell's trials: n images train theta_inter and as many synthetic ones follow, n as the protocol counts."""
    if cell.c is None:
        protocol = replace(protocol, trained_on="real")
    name = f"{cell.dimension} {cell.degrees} {cell.c} {cell.count}"
    draws = generator(seed, "theory tables", name)
    return run_trials(world_of(cell), protocol, cell.count, cell.count, trials, draws)


def compare(tables: Sequence[int], protocol: Protocol, trials: int, seed: int = 0) -> list[Line]:
    """Every cell of these tables; a cell that two tables show is simulated once. UserError for others, trials < 2."""
    require(trials >= 2, "trials", "2 or more, so that there is a deviation", trials)
    for table in tables:
        if table not in TABLES:
            raise unknown("table", str(table), map(str, TABLES))
    found: dict[Any, Outcome] = {}
    lines = []
    for cell in (cell for table in tables for cell in cells(table)):
        key = (cell.dimension, cell.degrees, cell.c, cell.count)
        if key not in found:
            found[key] = simulate(cell, protocol, trials, seed)
        lines.append(judge(cell, found[key]))
    return lines


def judge(cell: Cell, outcome: Outcome) -> Line:
    """The printed number and our trials of the same cell, with verdict and reasons."""
    mean, own = outcome.mean(cell.measure), outcome.deviation(cell.measure)
    used = own if cell.deviation is None else cell.deviation
    difference, optimum = cell.mean - mean, float(_optimum(cell.dimension, cell.degrees)[cell.measure])
    error = math.hypot(used / math.sqrt(TRIALS), own / math.sqrt(len(outcome.clean)))
    return Line(
        cell=cell,
        mean=mean,
        deviation=own,
        deviation_used=used,
        difference=difference,
        in_deviations=difference / used,
        in_errors=difference / error,
        ratio=None if cell.deviation is None else cell.deviation / own,
        optimum=optimum,
        verdict=_verdict(cell, difference, used, error),
        reasons=tuple(_reasons(cell, own, optimum)),
    )


@cache
def _optimum(dimension: int, degrees: int) -> dict[str, float]:
    world = _world(dimension, degrees, None)
    return {k: float(v) for k, v in best_accuracies(world.mean, world.epsilon, world.sigma).items()}


def copied(cell: Cell) -> bool:
    """Whether the cell is one of Table 1's real rows, which are its c = 0.5 rows again."""
    return cell.table == 1 and cell.c is None


def _verdict(cell: Cell, difference: float, deviation: float, error: float) -> Verdict:
    if copied(cell):
        return "copied row"
    if abs(difference) <= deviation:
        return "met"
    test = math.sqrt(cell.mean * (1 - cell.mean) / TEST_IMAGES)
    return "finite test set" if abs(difference) <= 2 * math.hypot(test, error) else "not met"


def _reasons(cell: Cell, deviation: float, optimum: float) -> Iterable[str]:
    if copied(cell):
        yield "the paper repeats its c = 0.5 row here"
        return
    if cell.deviation is None:
        yield "the paper prints the mean as its own deviation"
    elif not 0.5 < cell.deviation / deviation < 2:
        more = (deviation / cell.deviation) ** (2 if cell.degrees in (30, 60) and cell.measure == "robust" else 1)
        yield f"the paper's deviation is {cell.deviation / deviation:.2g} times ours, as of {more:.2g} times the images"
    if cell.mean > optimum + 5e-5:
        yield f"above {optimum:.4f}, which no linear classifier exceeds: measured on a finite test set"


def tally(lines: Sequence[Line]) -> dict[str, int]:
    """How many cells have which verdict."""
    return {verdict: sum(line.verdict == verdict for line in lines) for verdict in WORDS}


def protocols() -> list[Protocol]:
    """All the readings of the paper: trained on, labelled by, counted per class or in total."""
    return [
        Protocol(trained_on=trained, labels=labels, counted=counted)
        for trained in ("synthetic", "both")
        for labels in ("inter", "true")
        for counted in ("class", "total")
    ]


def protocol_scores(tables: Sequence[int], trials: int, seed: int = 0) -> list[dict[str, Any]]:
    """For each reading: how many cells it meets, and the root mean square of its differences in deviations.

    Table 1's copied rows are left out.
    """
    rows = []
    for protocol in protocols():
        lines = [line for line in compare(tables, protocol, trials, seed) if not copied(line.cell)]
        square = sum(line.in_deviations**2 for line in lines) / len(lines)
        met = sum(line.verdict == "met" for line in lines)
        rows.append({**asdict(protocol), "cells": len(lines), "met": met, "rms_in_deviations": math.sqrt(square)})
    return sorted(rows, key=lambda row: row["rms_in_deviations"])


def implied_test_images(lines: Sequence[Line]) -> float | None:
    """The size of test set that would explain the means of the rows with most images (count 100), None for none.

    Trials of a group share a test set, and with 100 images a class they hardly differ: what is left of paper - ours
    is the test set's. p (1 - p) / size is the variance of an accuracy on it; the estimate is a ratio of sums.
    """
    chosen = [x for x in lines if x.cell.count == 100 and not copied(x.cell)]
    square = sum(x.difference**2 - x.deviation_used**2 / TRIALS for x in chosen)
    return sum(x.mean * (1 - x.mean) for x in chosen) / square if chosen and square > 0 else None
