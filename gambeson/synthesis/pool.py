"""The labelled images that a selection is made from, read from front to back a few at a time, and what scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gambeson.data.imageset import ImageSet
from gambeson.data.intact import Intact
from gambeson.data.mixture import from_uint8, to_uint8
from gambeson.data.scores import as_numpy
from gambeson.data.shards import batches_of
from gambeson.data.synthetic import SyntheticStore
from gambeson.disk import checksum
from gambeson.errors import UserError, require
from gambeson.heritage import told
from gambeson.mirror import have
from gambeson.models.network import ClassifierNetwork
from gambeson.quality.memorisation import CopyTest
from gambeson.quality.space import Pixels, embed
from gambeson.store import Artifact
from gambeson.synthesis.label import about_labels, open_labels
from gambeson.types import Images, Labels, Logits, PerImage

LABELS = "labels.parquet"
"""The file that the labelling writes."""
READ = 1 << 16
"""Rows of labels.parquet that are read at once."""
TOGETHER = 256
"""Images that are in a network at once, where nothing else is asked for."""
Role = Literal["teacher", "encoder"]
"""The classifiers of a recipe: the standard one that labels, the robust one that steers guidance."""


@dataclass
class Rows:
    """Some images of a pool: labels [B], the labelling's logits [B, K], positions [B] in the store; images if asked."""

    labels: Labels
    logits: Logits
    positions: torch.Tensor
    read: Callable[[], Images] = field(repr=False)

    @cached_property
    def images(self) -> Images:
        """[B, C, H, W] in [0, 1], read now, on the device of the labels."""
        return self.read()


Score = Callable[[Rows], PerImage]
"""Rows -> [B] scores, larger is better; of each image by itself, whatever others are beside it."""


@dataclass(frozen=True)
class LabelFile:
    """A labels.parquet where it lies, as an input of a stage."""

    path: Path

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return checksum(self.path)

    @property
    def heritage(self) -> dict[str, Any]:
        """What the classifiers that labelled carry, and the images."""
        with open_labels(self.path) as file:
            return {"name": self.path.name, "images": file.metadata.num_rows, **told(about_labels(file))}


@dataclass(frozen=True)
class Piece:
    """Rows of the pool from `start` on, in one shard: the labels of all; rows: those of the images that have one."""

    shard: int
    start: int
    labels: np.ndarray
    conditions: np.ndarray
    said: np.ndarray  # the class that the labelling's classifier says
    inside: np.ndarray  # which of them have a label
    rows: Rows

    def spread(self, scores: np.ndarray) -> np.ndarray:
        """Scores of the rows as scores of all; 0 for images that were left out."""
        every = np.zeros(len(self.labels), scores.dtype)
        every[self.inside] = scores
        return every


@dataclass(frozen=True)
class Pool:
    """A store and a labels.parquet of its images. UserError for labels of other images or another number of them."""

    store: SyntheticStore
    labels: LabelFile
    device: str = "cpu"
    together: int = TOGETHER

    def __post_init__(self) -> None:
        rows, told = self.about
        path = self.labels.path
        require(rows > 0, f"{path}", "labels of at least one image", 0)
        if rows != len(self.store) or told.get("images", self.store.digest) != self.store.digest:
            raise self._of_others(f"{rows} others")

    def _of_others(self, found: str) -> UserError:
        return UserError(
            f"{self.labels.path}: expected labels of the {len(self.store)} images of {self.store.root}, got those of "
            f"{found}; label this store (gambeson label)"
        )

    @cached_property
    def about(self) -> tuple[int, dict[str, Any]]:
        """Number of rows and what the labelling says of itself. UserError for a file that is none of a labelling."""
        with self.open() as file:
            missing = {"label", "condition", "logits"} - set(file.schema_arrow.names)
            require(not missing, f"{self.labels.path}", "columns label, condition and logits", file.schema_arrow.names)
            return file.metadata.num_rows, about_labels(file)

    def open(self) -> Intact:
        """labels.parquet. UserError where there is none, EnvironmentFault, naming it, where it is damaged."""
        require(have(self.labels.path), "labels", "a labels.parquet", f"{self.labels.path}")
        return open_labels(self.labels.path)

    @cached_property
    def classes(self) -> int:
        """How many classes the labelling's classifier knows."""
        with self.open() as file:
            return as_numpy(next(batches_of(file, 1, ["logits"]))["logits"]).shape[1]

    def pieces(self, looks: bool = True, shard: int | None = None) -> Iterator[Piece]:
        """The pool, or one shard of it, from front to back, always cut alike. UserError for labels beyond the classes.

        looks: whether images will be asked for, so that few rows come at once.
        """
        starts, size = np.cumsum([0, *self.store.rows]), self.together if looks else READ
        bounds = (0, len(self.store)) if shard is None else (int(starts[shard]), int(starts[shard + 1]))
        with self.open() as file:
            for place, batch in _overlapping(file, range(*bounds)):
                labels, conditions, logits = (as_numpy(batch[name]) for name in ("label", "condition", "logits"))
                for own, part in _cuts(place, len(labels), starts, size):
                    if shard in (None, own):
                        yield self._piece(own, place, part, labels[part], conditions[part], logits[part])

    def _piece(
        self, shard: int, place: int, part: slice, labels: np.ndarray, conditions: np.ndarray, logits: np.ndarray
    ) -> Piece:
        low, high = int(labels.min()), int(labels.max())
        expected = f"labels from -1 (left out) to {logits.shape[1] - 1}"
        require(low >= -1 and high < logits.shape[1], f"{self.labels.path}", expected, f"{low} to {high}")
        start, inside = place + part.start, np.flatnonzero(labels >= 0)
        if not np.array_equal(conditions, self.store.compact_labels[start : start + len(labels)]):
            raise self._of_others("others")

        def read() -> Images:
            return from_uint8(self.store.stretch(start, start + len(labels))[0][inside]).to(self.device)

        columns = (labels[inside].astype(np.int64), logits[inside].astype(np.float32), inside + start)
        given = (torch.from_numpy(column).to(self.device) for column in columns)
        return Piece(shard, start, labels, conditions, logits.argmax(1), inside, Rows(*given, read=read))


def _overlapping(file: pq.ParquetFile, rows: range) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, batch of the labels) of those that have some of these rows; row groups without any are not read."""
    end = 0
    for group in range(file.num_row_groups):
        place, end = end, end + file.metadata.row_group(group).num_rows
        if place >= rows.stop or end <= rows.start:
            continue
        for batch in file.iter_batches(READ, row_groups=[group], columns=["label", "condition", "logits"]):
            if place < rows.stop and place + len(batch) > rows.start:
                yield place, batch
            place += len(batch)


def _cuts(place: int, count: int, starts: np.ndarray, size: int) -> Iterator[tuple[int, slice]]:
    """(shard, rows of these `count` from `place` on), cut where a shard begins and after every `size` rows of it."""
    position, stop = place, place + count
    while position < stop:
        shard = int(np.searchsorted(starts, position, side="right")) - 1
        first = int(starts[shard])
        end = min(stop, int(starts[shard + 1]), first + ((position - first) // size + 1) * size)
        yield shard, slice(position - place, end - place)
        position = end


@dataclass(frozen=True)
class TrainedScore:
    """A score by networks that were trained for it; digest: of their weights."""

    score: Score
    digest: str

    def __call__(self, rows: Rows) -> PerImage:
        """Scores [B], larger is better."""
        return self.score(rows)


@dataclass(frozen=True)
class Context:
    """What a scorer may use: the pool, and of classifiers and real images those that it says it needs."""

    pool: Pool
    once: Callable[..., Artifact]
    teacher: ClassifierNetwork | None = None
    encoder: ClassifierNetwork | None = None
    real: ImageSet | None = None
    ahead: Any = None  # what a scorer that prepares has made of the whole pool or of real images

    def network(self, role: Role) -> ClassifierNetwork:
        """One of the classifiers, frozen, in eval mode, on the pool's device."""
        found = self.teacher if role == "teacher" else self.encoder
        assert found is not None, f"the scorer did not say that it needs the {role}"
        return found

    def real_set(self) -> ImageSet:
        """The real images, without the test part."""
        assert self.real is not None, "the scorer did not say that it needs real images"
        return self.real

    @cached_property
    def copies(self) -> CopyTest:
        """What tells copies of real train images, by their pixels in 8 bits: all that a store has of an image.

        UserError where the real validation images are too few for a yardstick.
        """
        real = self.real_set()
        parts = (from_uint8(to_uint8(part.images)) for part in (real.train, real.validation))
        train, held_out = (embed(Pixels(), images) for images in parts)
        return CopyTest.against(train, held_out, queries=len(self.pool.store))


@runtime_checkable
class Scorer(Protocol):
    """What makes an image good: a component of plain numbers. `looks`: whether it looks at images."""

    looks: ClassVar[bool]

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs besides the pool, in this order, of: teacher, encoder (classifiers), real (image set)."""
        ...

    def bind(self, context: Context) -> Score:
        """The score of one image, by the networks and images at hand."""
        ...


@runtime_checkable
class PreparingScorer(Scorer, Protocol):
    """A scorer with a pass over the pool or over real images before the first score: it is made once for all workers.

    `prepared`: what it makes, which can be pickled; `bind` finds it in `Context.ahead`, or makes it itself.
    """

    def prepared(self, context: Context) -> Any: ...


@runtime_checkable
class TrainingScorer(Scorer, Protocol):
    """A scorer that trains networks of its own, which come out otherwise elsewhere: scores are theirs alone."""

    def trained(self, context: Context) -> TrainedScore:
        """`bind`, with what tells these networks from others."""
        ...
