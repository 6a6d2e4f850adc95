"""What the kept rows of a sheet say: accuracies, paired differences, the effects of a 2 x 2."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import stdtrit

from gambeson.errors import EnvironmentFault
from gambeson.report.rows import Cells, cells
from gambeson.report.statistics import (
    Correct,
    Difference,
    Interval,
    mean_accuracy,
    paired_difference,
    randomness,
    two_way_mean,
)
from gambeson.robustness.intervals import normal_quantile
from gambeson.tables.cells import Cell, Setting
from gambeson.tables.sheet import Part, Sheet

CLEAN, WORST, AUTOATTACK = "clean", "apgd", "autoattack"


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A cell minus another one, on the same images and seeds; and the same difference in the paper, percent."""

    other: str
    seeds: int
    clean: Difference
    robust: Difference
    printed_clean: float | None
    printed_robust: float | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A cell with what was measured of it; None and no seeds: not yet measured."""

    cell: Cell
    choice: str  # the setting that validation chose; empty where there is nothing to choose, or not yet chosen
    seeds: tuple[int, ...]  # measured on test images
    judged: int  # seeds measured on validation images
    images: int  # test images
    clean: Interval | None
    robust: Interval | None
    validation: tuple[float, float] | None  # clean and robust accuracy
    beside: tuple[Beside, ...]
    settings: dict[str, float]  # validation's robust accuracy of each setting that is chosen among
    failed_checks: tuple[str, ...]
    failures: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        cell = self.cell
        told = {
            "cell": cell.name,
            "about": cell.about,
            "amount": cell.amount,
            "keys": {setting.choice: setting.key for setting in cell.settings},
            "student_changes": cell.student_changes,
            "paper": None if cell.printed is None else asdict(cell.printed),
        }
        own = {name: getattr(self, name) for name in ("choice", "seeds", "judged", "images", "validation", "settings")}
        measured = {name: None if (v := getattr(self, name)) is None else asdict(v) for name in ("clean", "robust")}
        beside = [asdict(b) | {"shown": b.robust.shown} for b in self.beside]
        doubts = {"failed_checks": self.failed_checks, "failures": self.failures}
        return told | own | measured | {"beside": beside, "measured": self.clean is not None} | doubts


@dataclass(frozen=True, kw_only=True)
class Effect:
    """An effect of a 2 x 2 on robust accuracy, fractions of 1."""

    name: str
    robust: Difference


def lines(sheet: Sheet) -> list[Line]:
    """A line for every cell. EnvironmentFault where rows were made of different images."""
    _check_images(sheet)
    rows = {cell.name: _rows(sheet, cell, "test") for cell in sheet.cells}
    column = robust_column(rows)
    return [_line(sheet, cell, rows, column) for cell in sheet.cells]


def robust_column(rows: dict[str, pa.Table | None]) -> str:
    """AutoAttack where every measured cell has it, else the worst case of the AutoPGD attacks."""
    measured = [table for table in rows.values() if table is not None]
    whole = [AUTOATTACK in t.schema.names and t[AUTOATTACK].null_count < len(t) for t in measured]
    return AUTOATTACK if measured and all(whole) else WORST


def _check_images(sheet: Sheet) -> None:
    """EnvironmentFault for kept rows of several image sets, whose differences would mean nothing."""
    found = {
        record["data_digest"]
        for cell in sheet.cells
        for setting in cell.settings
        for seed in sheet.seeds
        if sheet.has(setting, seed, "validation") and (record := sheet.record(setting, seed))
    }
    if len(found) > 1 and sheet.facts.get("data_digest") is None:
        raise EnvironmentFault(
            f"{sheet.folder / 'rows'}: expected rows of one image set, got those of {len(found)}; move the rows of the "
            "others away, or give the command the images (--data-root) so that it knows which are meant"
        )


def _rows(sheet: Sheet, cell: Cell, part: Part) -> pa.Table | None:
    chosen = sheet.chosen(cell)
    return None if chosen is None else sheet.rows(chosen, part)


def _line(sheet: Sheet, cell: Cell, rows: dict[str, pa.Table | None], column: str) -> Line:
    chosen, test, judged = sheet.chosen(cell), rows[cell.name], _rows(sheet, cell, "validation")
    measured = {name: None if test is None else cells(test, name) for name in (CLEAN, column)}
    clean, robust = measured[CLEAN], measured[column]
    records = [] if chosen is None else [sheet.record(chosen, seed) for seed in sheet.seeds]
    return Line(
        cell=cell,
        choice="" if chosen is None else chosen.choice,
        seeds=() if clean is None else tuple(clean.seeds.tolist()),
        judged=0 if judged is None else len(set(judged["seed"].to_pylist())),
        images=0 if robust is None else len(robust.indices),
        clean=None if clean is None else mean_accuracy(clean.correct),
        robust=None if robust is None else mean_accuracy(robust.correct),
        validation=None if judged is None else _means(judged),
        beside=tuple(_beside(sheet, cell, rows, column)),
        settings=_settings(sheet, cell),
        failed_checks=tuple(c for r in records for c in r.get("parts", {}).get("test", {}).get("failed_checks", ())),
        failures=tuple(_failures(sheet, cell)),
    )


def _means(rows: pa.Table) -> tuple[float, float]:
    """Clean and robust accuracy on validation images."""
    clean, robust = cells(rows, CLEAN), cells(rows, WORST)
    return float(clean.correct.mean()), float(robust.correct.mean())


def _settings(sheet: Sheet, cell: Cell) -> dict[str, float]:
    """Validation's robust accuracy of the settings that were judged."""
    judged: list[Setting] = [s for s in cell.settings if cell.chooses and sheet.rows(s, "validation") is not None]
    return {setting.choice: sheet.validation_accuracy(setting) for setting in judged}


def _failures(sheet: Sheet, cell: Cell) -> list[str]:
    told = [(s, seed, sheet.failure(s, seed)) for s in cell.settings for seed in sheet.seeds]
    return [f"{setting.title}, seed {seed}: {reason}" for setting, seed, reason in told if reason is not None]


def _beside(sheet: Sheet, cell: Cell, rows: dict[str, pa.Table | None], column: str) -> list[Beside]:
    found, own = [], rows[cell.name]
    for other in cell.against:
        theirs = rows.get(other)
        if own is None or theirs is None:
            continue
        pairs = [(cells(own, c), cells(theirs, c)) for c in (CLEAN, column)]
        clean, robust = (_paired(a, b) for a, b in pairs)
        if clean is None or robust is None:
            continue
        a, b = cell.printed, sheet.cell(other).printed
        found.append(
            Beside(
                other=other,
                seeds=len(np.intersect1d(pairs[0][0].seeds, pairs[0][1].seeds)),
                clean=clean,
                robust=robust,
                printed_clean=_minus(a.clean if a else None, b.clean if b else None),
                printed_robust=_minus(a.robust if a else None, b.robust if b else None),
            )
        )
    return found


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a - b, 2)


def _paired(a: Cells, b: Cells) -> Difference | None:
    """The paired difference over the seeds that both have; None without one."""
    both = _together([a, b])
    return None if both is None else paired_difference(both[0], both[1])


def _together(found: list[Cells]) -> list[Correct] | None:
    """The verdicts of the seeds that all have, in the same order; None where there is none."""
    seeds = set(found[0].seeds.tolist()).intersection(*(f.seeds.tolist() for f in found))
    if not seeds:
        return None
    for each in found:
        if not np.array_equal(each.indices, found[0].indices):
            raise EnvironmentFault("rows: expected those of the same test images, got others; measure the cells anew")
    return [each.correct[np.isin(each.seeds, sorted(seeds))] for each in found]


def effects(sheet: Sheet) -> list[Effect]:
    """Of every 2 x 2 whose four cells are measured: both main effects and what they do together beyond their sum."""
    found: list[Effect] = []
    for square in sheet.squares:
        rows = {name: _rows(sheet, sheet.cell(name), "test") for name in square}
        tables = [table for table in rows.values() if table is not None]
        if len(tables) == 4:
            column = robust_column(rows)
            together = _together([cells(table, column) for table in tables])
            found += square_effects(square, together) if together is not None else []
    return found


def square_effects(names: tuple[str, str, str, str], correct: list[Correct]) -> list[Effect]:
    """Effects of a 2 x 2 from verdicts [seeds, images] of the cells neither, first, second, both.

    A main effect is the mean of its two differences; the interaction is the first factor's effect with the second one
    minus that without.
    """
    neither, first, second, both = (c.astype(float) for c in correct)
    return [
        Effect(name=f"{names[1]}: mean of its two differences", robust=contrast((first - neither + both - second) / 2)),
        Effect(name=f"{names[2]}: mean of its two differences", robust=contrast((second - neither + both - first) / 2)),
        Effect(
            name=f"interaction: {names[1]} with {names[2]}, minus without",
            robust=contrast(both - second - first + neither),
        ),
    ]


def contrast(values: np.ndarray, confidence: float = 0.95) -> Difference:
    """The mean of a contrast [seeds, images] with its interval: over images for one seed, crossed with seeds for more.

    Two images of +1 and -1 over the root of 2 are added, as `paired_difference` does, so that it keeps a width.
    """
    extra = np.tile([math.sqrt(0.5), -math.sqrt(0.5)], (len(values), 1))
    padded = np.concatenate([values, extra], axis=1)
    if len(values) == 1:
        centre, variance, quantile = padded.mean(), padded.var() / padded.size, normal_quantile(confidence)
    else:
        spread = two_way_mean(padded)
        centre, variance = spread.mean, spread.variance
        quantile = float(stdtrit(spread.freedom, (1 + confidence) / 2))
    half, estimate = quantile * math.sqrt(variance), float(values.mean())
    low, high = min(centre - half, estimate), max(centre + half, estimate)
    return Difference(estimate, float(low), float(high), randomness(len(values)))
