"""Labels synthetic images: by the class each was generated for, or by a teacher; the teacher's logits are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gambeson.data.mixture import from_uint8
from gambeson.data.synthetic import SyntheticStore
from gambeson.errors import UserError, require
from gambeson.models.classifiers import load_classifier
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


@stage(revision=1)
def label(work: Workspace, spec: Labeling, synthetic: Artifact, teacher: Artifact) -> None:
    """Writes labels.parquet: label, condition and the teacher's logits of every image."""
    store = SyntheticStore.open(synthetic.folder / "images").verify()
    device = work.machine.device
    model = load_classifier(teacher.file("classifier.safetensors")).to(device)
    labels, logits = [], []
    for start in range(0, len(store), spec.batch_size):
        pixels, condition = store.read(np.arange(start, min(start + spec.batch_size, len(store))))
        with torch.no_grad():
            logits.append(model(from_uint8(pixels).to(device)).cpu())
        labels.append(spec.by(torch.from_numpy(condition), logits[-1]))
        work.progress(min(start + spec.batch_size, len(store)), len(store))
    columns = {"label": torch.cat(labels).numpy(), "condition": store.labels, "logits": torch.cat(logits).tolist()}
    with atomic(work.folder / "labels.parquet") as temporary:
        pq.write_table(pa.table(columns), temporary)
