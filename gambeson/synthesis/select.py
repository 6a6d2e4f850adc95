"""Chooses which synthetic images to train on: one score per image, the best K of each class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from gambeson.data.scores import as_numpy
from gambeson.data.shards import batches_of
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.errors import UserError, require
from gambeson.store import Artifact, Workspace, stage, write_json
from gambeson.types import Labels, Logits, PerImage

CHUNK = 1 << 20
"""Images whose scores are in memory at once."""
DIGIT = 11
"""Bits of a score that a pass of the selection decides: a table of 2,048 counts for each class."""


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """The teacher's log-probability of the image's label (EDM-AT keeps the largest)."""

    def __call__(self, labels: Labels, logits: Logits) -> PerImage:
        """Labels [B] and logits [B, K] -> scores [B], larger is better."""
        return -F.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Minus the entropy of the teacher's prediction (CDP keeps the smallest entropies)."""

    def __call__(self, labels: Labels, logits: Logits) -> PerImage:
        """Labels [B] and logits [B, K] -> scores [B], larger is better."""
        return (logits.softmax(1) * logits.log_softmax(1)).sum(1)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which labelled images are kept."""

    score: Confidence | Entropy = Confidence()  # what makes an image good
    keep: float = 1.0  # share of the images to keep, the same number for each class

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError(f"selection.keep: expected a share above 0 and up to 1, got {self.keep}")


def top_per_class(scores: np.ndarray, labels: np.ndarray, classes: int, quota: int) -> np.ndarray:
    """Positions of the `quota` best scores of each class, ascending; ties go to the earlier image, not-a-number last.

    scores [N] float, labels [N] (outside 0 to `classes` - 1: left out); both may be memory maps.
    """
    return np.concatenate([np.empty(0, np.int64), *best_per_class(scores, labels, classes, quota)])


def best_per_class(scores: np.ndarray, labels: np.ndarray, classes: int, quota: int) -> Iterator[np.ndarray]:
    """The same a part at a time, exact and without sorting: memory grows with the classes, not with the images."""
    if quota < 1:
        return
    bar, places = _bars(scores, labels, classes, quota)
    for start, keys, kinds in _chunks(scores, labels, classes):
        inside = np.where(kinds < classes, keys > bar[kinds], False)
        level = np.flatnonzero((kinds < classes) & (keys == bar[kinds]))
        for kind in np.unique(kinds[level]).tolist():
            taken = level[kinds[level] == kind][: places[kind]]
            inside[taken] = True
            places[kind] -= len(taken)
        yield np.flatnonzero(inside) + start


def _bars(scores: np.ndarray, labels: np.ndarray, classes: int, quota: int) -> tuple[np.ndarray, np.ndarray]:
    """The key of each class's `quota`-th best score, and how many images with that key are kept (radix selection).

    The key is found from its highest bits down, DIGIT bits in a pass over all scores.
    """
    bits = scores.dtype.itemsize * 8
    bar = np.zeros(classes + 1, np.uint64)  # one more than classes, for images without a class
    places = np.full(classes + 1, quota)
    for shift in range((bits - 1) // DIGIT * DIGIT, -1, -DIGIT):
        counts = np.zeros((classes, 1 << DIGIT), np.int64)
        for _, keys, kinds in _chunks(scores, labels, classes):
            high = keys >> np.uint64(shift)
            here = (kinds < classes) & ((high >> np.uint64(DIGIT)) == bar[kinds])
            cell = kinds[here] << DIGIT | (high[here] & np.uint64((1 << DIGIT) - 1)).astype(np.int64)
            counts += np.bincount(cell, minlength=counts.size).reshape(counts.shape)
        better = counts[:, ::-1].cumsum(1)[:, ::-1] - counts  # images above each digit, of those that share the bar
        digit = (better < places[:classes, None]).argmax(1)  # the lowest digit that is needed to fill the places
        places[:classes] -= better[np.arange(classes), digit]
        bar[:classes] = bar[:classes] << np.uint64(DIGIT) | digit.astype(np.uint64)
    return bar, places


def _chunks(scores: np.ndarray, labels: np.ndarray, classes: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first position, keys uint64 in the order of the scores, classes int64); no class is the number `classes`."""
    for start in range(0, len(scores), CHUNK):
        kinds = labels[start : start + CHUNK].astype(np.int64)
        kinds[(kinds < 0) | (kinds >= classes)] = classes
        yield start, _keys(np.asarray(scores[start : start + CHUNK])), kinds


def _keys(scores: np.ndarray) -> np.ndarray:
    """Whole numbers in the order of floating-point ones: IEEE 754 bits, all turned where the sign is set."""
    bits = scores.dtype.itemsize * 8
    plain = (scores + scores.dtype.type(0)).view(f"u{scores.dtype.itemsize}").astype(np.uint64)  # -0 becomes 0
    sign, every = np.uint64(1 << (bits - 1)), np.uint64((1 << bits) - 1)
    keys = np.where(plain & sign, plain ^ every, plain | sign)
    return np.where(np.isnan(scores), np.uint64(0), keys)


@stage(revision=1)
def select(work: Workspace, spec: Selection, synthetic: Artifact, labelled: Artifact) -> None:
    """Writes chosen.parquet (positions and labels) and selection.json (quota, kept and missing images per class).

    Scores lie on disk meanwhile, so that memory does not grow with the images. UserError where none is left.
    """
    with pq.ParquetFile(labelled.file("labels.parquet")) as file, _beside(work.folder, file) as (scores, labels):
        classes, agreement = _score(spec, file, scores, labels)
        quota = max(round(spec.keep * len(labels) / classes), 1)
        kept = np.zeros(classes, np.int64)
        store = SyntheticStore.open(synthetic.folder / "images")
        best = best_per_class(scores, labels, classes, quota if spec.keep < 1 else len(labels))
        Chosen.write_parts(work.folder / "chosen.parquet", store, _counted(best, labels, kept))
    short = {str(k): int(quota - n) for k, n in enumerate(kept) if n < quota}
    facts = {"quota": quota, "kept": kept.tolist(), "short": short, "teacher_agrees_with_condition": agreement}
    write_json(work.folder / "selection.json", facts)


@contextmanager
def _beside(folder: Path, file: pq.ParquetFile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Room on disk for a score float32 and a label int32 of each image, for the time of the selection."""
    rows = file.metadata.num_rows
    require(rows > 0, "labels.parquet", "at least one image", 0)
    with TemporaryDirectory(dir=folder, prefix=".scores-") as place:
        path = Path(place)
        scores = np.memmap(path / "scores", np.float32, "w+", shape=(rows,))
        yield scores, np.memmap(path / "labels", np.int32, "w+", shape=(rows,))


def _score(spec: Selection, file: pq.ParquetFile, scores: np.ndarray, labels: np.ndarray) -> tuple[int, float | None]:
    """Fills scores and labels; number of classes, and how often the teacher agrees (None without conditions)."""
    start, agreed, classes, conditioned = 0, 0, 0, True
    for batch in batches_of(file, CHUNK // 16, ["label", "condition", "logits"]):
        logits, condition = torch.from_numpy(as_numpy(batch["logits"]).astype(np.float32)), as_numpy(batch["condition"])
        given = torch.from_numpy(as_numpy(batch["label"]).astype(np.int64))
        stop, classes = start + len(given), logits.shape[1]
        low, high = int(given.min()), int(given.max())
        require(low >= 0 and high < classes, "labels.parquet", f"labels from 0 to {classes - 1}", f"{low} to {high}")
        scores[start:stop], labels[start:stop] = spec.score(given, logits).numpy(), given.numpy()
        agreed += int((logits.argmax(1).numpy() == condition).sum())
        conditioned, start = conditioned and bool((condition >= 0).all()), stop
    return classes, agreed / start if conditioned else None


def _counted(
    parts: Iterator[np.ndarray], labels: np.ndarray, kept: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions with their labels; counts what is kept of each class."""
    for positions in parts:
        chosen = labels[positions].astype(np.int64)
        kept += np.bincount(chosen, minlength=len(kept))
        yield positions, chosen
