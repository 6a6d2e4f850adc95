"""What a comparison knows of each run: its arms with their verdicts and what measured them, its recipe, checks, costs.

Any part may be missing; `notes` says which and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from gambeson.recipe import Recipe
from gambeson.report.material import CheckRecord, StageRecord, TrainingCurve
from gambeson.report.rows import Cells, CurvePoint

CLEAN, PGD, WORST, AUTOATTACK = "clean", "pgd", "apgd", "autoattack"
COLUMNS = {CLEAN: "Clean", PGD: "PGD", WORST: "Worst case", AUTOATTACK: "Assessed"}
"""What may have been measured of an arm, and its heading."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """Verdicts [seeds, images] in a column, and `how` they came about: the attack with its threat in plain form."""

    cells: Cells
    how: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class ContenderArm:
    """One arm of a run: what was measured by column, its labels by test image, its curve, its students by seed.

    `indices` are the test images that were measured, ascending; `curve` is ascending in epsilon; `students` and
    `evaluations` are the digests of the training and of the evaluation of each seed, {} where unknown.
    """

    key: str
    title: str
    measures: Mapping[str, Measure] = field(default_factory=dict)
    indices: Int64[np.ndarray, " images"] | None = None
    labels: Int64[np.ndarray, " images"] | None = None
    curve: tuple[CurvePoint, ...] = ()
    students: Mapping[int, str] = field(default_factory=dict)
    evaluations: Mapping[int, str] = field(default_factory=dict)
    training: tuple[TrainingCurve, ...] = ()

    @property
    def headline(self) -> str | None:
        """The column that is spoken of: the worst case of the AutoPGD attacks, or AutoAttack; None: not measured."""
        return next((column for column in (WORST, AUTOATTACK) if column in self.measures), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Contender:
    """One of the runs that are compared; `number` counts from 1 in the order they were named.

    tree: the recipe in plain form ({}: none); recipe: the same as an object, None where this version cannot read it.
    data: where the images come from, in plain form; data_digest: of the image set, None where it is not known.
    threat: in words; norm and epsilon of the attacks. state: '' for a complete run, else what it is in words.
    """

    number: int
    name: str
    folder: Path
    kind: str  # run or evaluation
    state: str = ""
    tree: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    data_digest: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # as its stage was given it
    class_names: tuple[str, ...] = ()
    threat: str = ""
    norm: str = ""
    epsilon: float = 0.0
    arms: tuple[ContenderArm, ...] = ()
    checks: tuple[CheckRecord, ...] = ()
    checked: bool = False  # whether the evaluation's checks could be read
    stages: tuple[StageRecord, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)  # versions, device, times ... in words
    command: str = ""
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """'run 2 (digits-1f2e)'."""
        return f"run {self.number} ({self.name})"

    @property
    def measured(self) -> tuple[ContenderArm, ...]:
        """The arms that were measured."""
        return tuple(arm for arm in self.arms if arm.measures)

    @property
    def failures(self) -> list[CheckRecord]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]

    @property
    def images(self) -> int:
        """Test images that were measured."""
        return max((len(arm.indices) for arm in self.arms if arm.indices is not None), default=0)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that were measured."""
        found = {int(s) for arm in self.arms for m in arm.measures.values() for s in m.cells.seeds}
        return tuple(sorted(found))
