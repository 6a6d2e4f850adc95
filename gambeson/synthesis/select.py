"""Chooses which synthetic images to train on: one score per image, the best K of each class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.errors import UserError
from gambeson.store import Artifact, Workspace, stage, write_json
from gambeson.types import Labels, Logits, PerImage


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
    """Positions of the `quota` best scores of each class, ascending; ties go to the earlier image."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    return np.sort(np.concatenate([order[labels[order] == k][:quota] for k in range(classes)]))


@stage(revision=1)
def select(work: Workspace, spec: Selection, synthetic: Artifact, labelled: Artifact) -> None:
    """Writes chosen.parquet (positions and labels) and selection.json (quota, kept and missing images per class)."""
    table = pq.read_table(labelled.file("labels.parquet"))
    labels = table["label"].to_numpy()
    logits = torch.tensor(table["logits"].to_pylist())
    classes = logits.shape[1]
    scores = spec.score(torch.from_numpy(labels.copy()), logits).numpy()
    quota = max(round(spec.keep * len(labels) / classes), 1)
    positions = top_per_class(scores, labels, classes, quota if spec.keep < 1 else len(labels))
    kept = np.bincount(labels[positions], minlength=classes)
    short = {str(k): int(quota - n) for k, n in enumerate(kept) if n < quota}
    condition = table["condition"].to_numpy()
    agreement = float((logits.argmax(1).numpy() == condition).mean()) if (condition >= 0).all() else None
    store = SyntheticStore.open(synthetic.folder / "images")
    Chosen.write(work.folder / "chosen.parquet", store, positions, labels[positions])
    facts = {"quota": quota, "kept": kept.tolist(), "short": short, "teacher_agrees_with_condition": agreement}
    write_json(work.folder / "selection.json", facts)
