"""Everything a report needs, as plain records: rows, curves, images, features, times and checks. No torch, no files.

Any part may be missing (an arm without rows, no grids, no features): the page then says so instead of guessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Integer, UInt8

ROW_COLUMNS = {
    "seed": pa.int64(),
    "index": pa.int64(),
    "label": pa.int64(),
    "prediction": pa.int64(),
    "margin": pa.float64(),
    "pgd": pa.bool_(),
    "apgd_ce": pa.bool_(),
    "apgd_t": pa.bool_(),
    "apgd": pa.bool_(),
}
"""The columns every table of rows has, one row per seed and test image.

`margin` is the clean logit margin; `pgd`, `apgd_ce`, `apgd_t` are True where the image stayed right under that attack,
`apgd` where it stayed right under both APGDs (the worst case). Columns named 'robust@0.05' may follow: right under PGD
at that epsilon, null for images outside the subset of the curve.
"""


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """One training run: the loss at `steps`, clean and robust validation accuracy (fractions) at `validation_steps`."""

    seed: int
    steps: list[int]
    loss: list[float]
    validation_steps: list[int]
    validation_clean: list[float]
    validation_robust: list[float]


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmMaterial:
    """One arm of the comparison: `rows` of all its seeds (None: not evaluated) and one training curve per seed.

    Raises ValueError when `rows` are empty, lack a column of ROW_COLUMNS, or hold nulls or another type in one.
    """

    key: str
    title: str
    rows: pa.Table | None = None
    curves: tuple[TrainingCurve, ...] = ()

    def __post_init__(self) -> None:
        if self.rows is None:
            return
        came = {name: self.rows.schema.field(name).type for name in self.rows.schema.names}
        wrong = [f"{name} {type}" for name, type in ROW_COLUMNS.items() if came.get(name) != type]
        if wrong:
            raise ValueError(f"rows of arm {self.key!r}: expected the columns {', '.join(wrong)}; got {came}")
        nulls = [name for name in ROW_COLUMNS if self.rows[name].null_count]
        if nulls or not self.rows.num_rows:
            raise ValueError(f"rows of arm {self.key!r}: expected rows without nulls (None for an arm that was not "
                             f"evaluated), got {self.rows.num_rows} rows with nulls in {nulls}")  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Grids:
    """Samples, [classes, k, H, W, C] uint8: `guided[c, j]` was drawn from the same noise as `plain[c, j]`.

    Raises ValueError when both are given with different shapes.
    """

    plain: UInt8[np.ndarray, "classes k h w c"] | None = None
    guided: UInt8[np.ndarray, "classes k h w c"] | None = None

    def __post_init__(self) -> None:
        if self.plain is not None and self.guided is not None and self.plain.shape != self.guided.shape:
            raise ValueError(f"grids: expected one shape, got plain {self.plain.shape}, guided {self.guided.shape}")


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSet:
    """Embeddings [n, D] of images called `name` (real, plain, guided) with labels [n]; `space` names the encoder."""

    name: str
    features: Float[np.ndarray, "n d"]
    labels: Integer[np.ndarray, " n"]
    space: str

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1]:
            shapes = f"{self.features.shape}, {self.labels.shape}"
            raise ValueError(f"features {self.name!r}: expected [n, D] and labels [n], got {shapes}")


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a stage cost: wall-clock seconds and peak memory in MB; `reused` when it was already in the store."""

    stage: str
    arm: str
    seed: int
    seconds: float
    peak_mb: float
    reused: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckRecord:
    """One doubt the evaluation raised about itself, and whether it held."""

    arm: str
    seed: int
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True, eq=False)
class AutoAttackMaterial:
    """The assessment of one student: its rows, and the facts that belong to the number (gambeson.robustness.assess)."""

    arm: str
    seed: int
    rows: pa.Table
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class RunMaterial:
    """A whole run, ready to be shown.

    `threat` is in words ('linf eps 0.15'), `epsilon` in pixels of [0, 1]; `counts` maps train, validation and test to
    numbers of images; the first arm is the one that the others are compared with. `attacks` may describe the columns
    pgd, apgd and curve in words ('40 steps, 3 restarts').
    Raises ValueError for arms with equal keys or titles, and for features with labels outside the classes.
    """

    name: str
    title: str
    recipe_text: str
    digest: str
    threat: str
    epsilon: float
    class_names: tuple[str, ...]
    counts: dict[str, int]
    arms: tuple[ArmMaterial, ...]
    command: str
    created: str
    grids: Grids | None = None
    features: tuple[FeatureSet, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    checks: tuple[CheckRecord, ...] = ()
    autoattack: tuple[AutoAttackMaterial, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    attacks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for names in ([arm.key for arm in self.arms], [arm.title for arm in self.arms]):
            if len(set(names)) < len(names):
                raise ValueError(f"arms: expected different keys and different titles, got {names}")
        for each in self.features:
            if len(each.labels) and not 0 <= each.labels.min() <= each.labels.max() < len(self.class_names):
                raise ValueError(f"features {each.name!r}: expected labels of the {len(self.class_names)} classes, "
                                 f"got {each.labels.min()} to {each.labels.max()}")  # fmt: skip
