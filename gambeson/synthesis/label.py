"""Labels synthetic images: by the class each was generated for, or by a teacher; the teacher's logits are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gambeson.data.mixture import from_uint8
from gambeson.data.scores import as_arrow
from gambeson.data.synthetic import SyntheticStore
from gambeson.errors import UserError, require
from gambeson.models.classifiers import load_classifier
from gambeson.models.network import ClassifierNetwork
from gambeson.store import Artifact, Workspace, atomic, stage
from gambeson.types import Labels, Logits


@dataclass(frozen=True, kw_only=True)
class ByCondition:
    """The label is the class that the image was generated for."""

    def __call__(self, condition: Labels, logits: Logits) -> Labels:
        """Classes [B] and the teacher's logits [B, K] -> labels [B]. UserError for images generated without one."""
        if bool((condition < 0).any()):
            raise UserError(
                "labeling.by: expected ByTeacher, since these images were generated without a class; got ByCondition"
            )
        return condition


@dataclass(frozen=True, kw_only=True)
class ByTeacher:
    """The label is the teacher's prediction (a pseudo-label): the second step where the denoiser is unconditional."""

    def __call__(self, condition: Labels, logits: Logits) -> Labels:
        """Classes [B] and the teacher's logits [B, K] -> labels [B]."""
        return logits.argmax(1)


@dataclass(frozen=True, kw_only=True)
class Labeling:
    """Where labels come from."""

    by: ByCondition | ByTeacher = ByCondition()  # whose word counts
    batch_size: int = 512  # images per teacher call

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "labeling.batch_size", "at least 1", self.batch_size)


PART = 1 << 16
"""Images, about, that are labelled before their labels are kept: what a break loses, and what is in memory."""


@stage(revision=1)
def label(work: Workspace, spec: Labeling, synthetic: Artifact, teacher: Artifact) -> None:
    """Writes labels.parquet: label, condition and the teacher's logits (float32) of every image.

    A part of the images at a time is in memory; a start after a break goes on with the next part.
    """
    store = SyntheticStore.open(synthetic.folder / "images").check()
    model = load_classifier(teacher.file("classifier.safetensors")).to(work.machine.device)
    size = max(PART // spec.batch_size, 1) * spec.batch_size  # whole batches: the same ones whatever was done before
    parts = {first: work.folder / "parts" / f"{first:012d}.parquet" for first in range(0, len(store), size)}
    for first, path in parts.items():
        if not path.is_file():
            table = _labelled(work, spec, store, model, range(first, min(first + size, len(store))))
            with atomic(path) as temporary:
                pq.write_table(table, temporary)
        work.progress(min(first + size, len(store)), len(store))
    with atomic(work.folder / "labels.parquet") as temporary:
        _join(list(parts.values()), temporary)
    for path in parts.values():
        path.unlink()
    (work.folder / "parts").rmdir()


def _labelled(
    work: Workspace, spec: Labeling, store: SyntheticStore, model: ClassifierNetwork, rows: range
) -> pa.Table:
    """Labels, conditions and logits of these images, batch by batch."""
    labels, conditions, logits = [], [], []
    for start in rows[:: spec.batch_size]:
        stop = min(start + spec.batch_size, rows.stop)
        pixels, condition = store.stretch(start, stop)
        with torch.no_grad():
            logits.append(model(from_uint8(pixels).to(work.machine.device)).float().cpu())
        conditions.append(condition)
        labels.append(spec.by(torch.from_numpy(condition), logits[-1]))
        work.progress(stop, len(store))
    columns = {"label": torch.cat(labels).numpy(), "condition": np.concatenate(conditions)}
    return pa.table({**columns, "logits": as_arrow(torch.cat(logits).numpy())})


def _join(parts: list[Path], path: Path) -> None:
    """One file of several, a part at a time in memory."""
    with pq.ParquetWriter(path, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))
