"""Means of features by class, and the distances of images to them: what selection by separability is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gambeson.data.imageset import Split
from gambeson.errors import UserError, require
from gambeson.models.files import load_tensors, save_tensors
from gambeson.models.network import ClassifierNetwork
from gambeson.synthesis.pool import Pool
from gambeson.types import Features, Images, Labels


@dataclass(frozen=True)
class Centroids:
    """Means float64 [K, D] of each class's features; `present` [K]: the classes that have images."""

    means: Float[Tensor, "k d"]
    present: Bool[Tensor, " k"]

    def distances(self, features: Features) -> Float[Tensor, "b k"]:
        """[B, K] L2 distances in float64, of each image by itself; 0 for classes without images."""
        found = torch.cdist(features.to(self.means), self.means, compute_mode="donot_use_mm_for_euclid_dist")
        return found.masked_fill(~self.present, 0)

    def others(self, features: Features, labels: Labels) -> Float[Tensor, " b"]:
        """[B] distance to the nearest centroid of another class. UserError where no other class has images."""
        require(int(self.present.sum()) > 1, "centroids", "images of at least 2 classes", int(self.present.sum()))
        left_out = ~self.present | F.one_hot(labels, len(self.means)).bool()
        return self.distances(features).masked_fill(left_out, torch.inf).min(1).values

    def own(self, features: Features, labels: Labels) -> Float[Tensor, " b"]:
        """[B] distance to the centroid of the image's class."""
        return self.distances(features).gather(1, labels[:, None]).squeeze(1)


@torch.no_grad()
def features_of(model: ClassifierNetwork, images: Images) -> Features:
    """[B, D] before the last layer. UserError saying of how many images they are not finite."""
    found = model.features(images)
    broken = int((~found.isfinite().all(1)).sum())
    if broken:
        raise UserError(
            f"features: expected finite numbers, got NaN or infinity for {broken} of {len(found)} images; usually the "
            "classifier's training diverged: take another one"
        )
    return found


def class_means(parts: Iterable[tuple[Features, Labels]], classes: int) -> Centroids:
    """Centroids of features and labels that come a part at a time, summed in float64; memory for K rows of features."""
    sums: Tensor | None = None
    counts = torch.zeros(classes, dtype=torch.float64)
    for features, labels in parts:
        sums = torch.zeros(classes, features.shape[1], dtype=torch.float64) if sums is None else sums
        sums.index_add_(0, labels.cpu(), features.double().cpu())
        counts += torch.bincount(labels.cpu(), minlength=classes)
    if sums is None:
        raise UserError("centroids: expected at least one image, got none")
    return Centroids(sums / counts.clamp_min(1)[:, None], counts > 0)


def pool_centroids(model: ClassifierNetwork, pool: Pool) -> Centroids:
    """Centroids of a pool's own images by their labels: one pass through them."""

    def parts() -> Iterator[tuple[Features, Labels]]:
        for piece in pool.pieces():
            if len(piece.inside):
                yield features_of(model, piece.rows.images), piece.rows.labels

    return _moved(class_means(parts(), pool.classes), pool.device)


def real_centroids(model: ClassifierNetwork, real: Split, pool: Pool) -> Centroids:
    """Centroids of real images by their labels."""
    parts = zip(real.images.split(pool.together), real.labels.split(pool.together), strict=True)
    found = class_means(((features_of(model, x.to(pool.device)), y) for x, y in parts), pool.classes)
    return _moved(found, pool.device)


def save_centroids(path: Path, found: Centroids) -> None:
    """Keeps them beside the scores that they are needed for."""
    save_tensors(path, {"means": found.means.cpu(), "present": found.present.cpu()}, {"kind": "centroids"})


def kept_centroids(path: Path, device: str) -> Centroids:
    """Those that `save_centroids` kept, on a device."""
    tensors, _ = load_tensors(path)
    return _moved(Centroids(tensors["means"], tensors["present"]), device)


def _moved(found: Centroids, device: str) -> Centroids:
    kind = torch.float32 if device.startswith("mps") else torch.float64
    return Centroids(found.means.to(device, kind), found.present.to(device))
