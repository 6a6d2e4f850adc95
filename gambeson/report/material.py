"""Everything a report needs, as plain records: rows, curves, images, features, times and checks. No torch, no files.

Any part may be missing (an arm without rows, no grids, no features): the page then says so instead of guessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int64, Integer, UInt8

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

    The classes are the first ones (at most 20 of them), those that `classes` numbers where it does: a class without an
    image has no row. `sorted_by`: the arm whose labels say an image's class, where images were generated without one.
    `*_scores` are what selection scored each image with (`score_name`), `*_nearest` the nearest real train image of
    each, `*_distance` how far it is in `space`; `shrunk` says in words that images are shown smaller than they are, and
    how large they are.
    Raises ValueError when both are given with different shapes, or what belongs to an image has another shape.
    """

    plain: UInt8[np.ndarray, "classes k h w c"] | None = None
    guided: UInt8[np.ndarray, "classes k h w c"] | None = None
    plain_scores: Float[np.ndarray, "classes k"] | None = None
    guided_scores: Float[np.ndarray, "classes k"] | None = None
    score_name: str = ""
    plain_nearest: UInt8[np.ndarray, "classes k h w c"] | None = None
    guided_nearest: UInt8[np.ndarray, "classes k h w c"] | None = None
    plain_distance: Float[np.ndarray, "classes k"] | None = None
    guided_distance: Float[np.ndarray, "classes k"] | None = None
    space: str = ""
    shrunk: str = ""
    classes: tuple[int, ...] = ()
    sorted_by: str = ""

    def __post_init__(self) -> None:
        if self.plain is not None and self.guided is not None and self.plain.shape != self.guided.shape:
            raise ValueError(f"grids: expected one shape, got plain {self.plain.shape}, guided {self.guided.shape}")
        self._check("plain", self.plain, self.plain_scores, self.plain_nearest, self.plain_distance)
        self._check("guided", self.guided, self.guided_scores, self.guided_nearest, self.guided_distance)

    @staticmethod
    def _check(
        name: str,
        images: np.ndarray | None,
        scores: np.ndarray | None,
        nearest: np.ndarray | None,
        distance: np.ndarray | None,
    ) -> None:
        shape = () if images is None else images.shape
        _same(f"grids, scores of {name}", shape[:2], scores)
        _same(f"grids, nearest images of {name}", shape, nearest)
        _same(f"grids, distances of {name}", shape[:2], distance)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Adversarial:
    """Test images [n, H, W, C] uint8 of a student (`arm`: its key) and what `attack` (in words) made of them.

    The first ones in the order of the test set (`indices`) of each kind, withstood and broken; none picked by its look.
    `shrunk` says in words that pixels were left out for showing (never averaged), and how large the images are.
    Raises ValueError for arrays of different lengths.
    """

    arm: str
    seed: int
    attack: str
    images: UInt8[np.ndarray, "n h w c"]
    attacked: UInt8[np.ndarray, "n h w c"]
    labels: Integer[np.ndarray, " n"]
    predictions: Integer[np.ndarray, " n"]
    attacked_predictions: Integer[np.ndarray, " n"]
    indices: Integer[np.ndarray, " n"]
    shrunk: str = ""

    def __post_init__(self) -> None:
        _same(f"adversarial images of arm {self.arm!r}", self.images.shape, self.attacked)
        for values in (self.labels, self.predictions, self.attacked_predictions, self.indices):
            _same(f"adversarial images of arm {self.arm!r}", self.images.shape[:1], values)

    @property
    def withstood(self) -> np.ndarray:
        """bool [n]: the student was right about the image under attack, too."""
        return (self.attacked_predictions == self.labels) & (self.predictions == self.labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class Confusion:
    """Counts [K, K] over test images and `seeds`, clean and under `attack` (in words); row: the true class.

    Raises ValueError where they are not square or do not count the same images of each class.
    """

    arm: str
    seeds: tuple[int, ...]
    attack: str
    clean: Int64[np.ndarray, "k k"]
    attacked: Int64[np.ndarray, "k k"]

    def __post_init__(self) -> None:
        _same(f"confusion of arm {self.arm!r}", (len(self.clean), len(self.clean)), self.clean)
        _same(f"confusion of arm {self.arm!r}", self.clean.shape, self.attacked)
        if (self.clean.sum(1) != self.attacked.sum(1)).any():
            raise ValueError(f"confusion of arm {self.arm!r}: expected the same images clean and attacked, got "
                             f"{self.clean.sum()} and {self.attacked.sum()} with other classes")  # fmt: skip

    @property
    def images(self) -> int:
        """How many test images were looked at with each seed."""
        return int(self.clean.sum()) // max(len(self.seeds), 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class GuidanceEnergy:
    """How far guidance moved the denoised image at each step, in the order of the steps, over `images` images.

    shift: root mean square over an image's pixels (on the scale [-1, 1]), the mean over images; `low` and `high` are
    the 5 and 95 % quantiles over images; 0 where guidance does not act. `sigma` is the step's noise; `how`: in words.
    Raises ValueError for arrays of different lengths.
    """

    sigma: Float[np.ndarray, " steps"]
    shift: Float[np.ndarray, " steps"]
    low: Float[np.ndarray, " steps"]
    high: Float[np.ndarray, " steps"]
    images: int
    how: str = ""

    def __post_init__(self) -> None:
        for values in (self.shift, self.low, self.high):
            _same("guidance energy", (len(self.sigma),), values)


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectionScores:
    """Histograms of `score` over the synthetic images of an arm (its key): those that selection kept, and left.

    Raises ValueError unless there is one edge more than bins.
    """

    arm: str
    seed: int
    score: str
    edges: Float[np.ndarray, " bins_and_one"]
    kept: Int64[np.ndarray, " bins"]
    left: Int64[np.ndarray, " bins"]

    def __post_init__(self) -> None:
        for values in (self.kept, self.left):
            _same(f"selection scores of arm {self.arm!r}", (len(self.edges) - 1,), values)


def _same(what: str, shape: tuple[int, ...], values: np.ndarray | None) -> None:
    """Raises ValueError for values of another shape; None is no value."""
    if values is not None and values.shape != shape:
        raise ValueError(f"{what}: expected the shape {shape}, got {values.shape}")


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a stage cost: wall-clock seconds, peak memory in MB, energy where the hardware reports it; `reused` when it
    was already in the store."""

    stage: str
    arm: str
    seed: int
    seconds: float
    peak_mb: float
    reused: bool = False
    joules: float | None = None


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
    pgd, apgd and curve in words ('40 steps, 3 restarts'). `student_features` are those of test images in each trained
    student (name: the arm's title); `missing` tells why a part (a field's name) is not here; `synthetic` maps an arm's
    key to the synthetic images that its student was given; `licences` an artifact's role to the terms it came with;
    `moved` says why stages could not be read, empty where they could. `created` is empty where a run is not finished.
    Raises ValueError for arms with equal keys or titles, and for features or confusions of other classes.
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
    adversarial: tuple[Adversarial, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    student_features: tuple[FeatureSet, ...] = ()
    energy: GuidanceEnergy | None = None
    selections: tuple[SelectionScores, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    synthetic: Mapping[str, int] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)
    moved: str = ""

    def __post_init__(self) -> None:
        for names in ([arm.key for arm in self.arms], [arm.title for arm in self.arms]):
            if len(set(names)) < len(names):
                raise ValueError(f"arms: expected different keys and different titles, got {names}")
        for each in (*self.features, *self.student_features):
            if len(each.labels) and not 0 <= each.labels.min() <= each.labels.max() < len(self.class_names):
                raise ValueError(f"features {each.name!r}: expected labels of the {len(self.class_names)} classes, "
                                 f"got {each.labels.min()} to {each.labels.max()}")  # fmt: skip
        for counts in self.confusions:
            _same(f"confusion of arm {counts.arm!r}", (len(self.class_names),) * 2, counts.clean)
