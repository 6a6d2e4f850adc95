"""Batches with an exact fraction of synthetic images: real without replacement, synthetic with replacement.

A batch depends on (seed, step) alone, so a resumed training needs no data position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from gambeson.data.datasets import Split
from gambeson.randomness import generator


@runtime_checkable
class SyntheticSource(Protocol):
    """Synthetic images by position; a whole set in memory or a store on disk."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 NHWC and labels int64."""
        ...


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "real order", epoch))


@dataclass(frozen=True)
class Mixture:
    """`batch_size` images of which round(fraction * batch_size) are synthetic (CDP eq. 3 with a fixed fraction)."""

    real: Split
    synthetic: SyntheticSource | None
    fraction: float
    batch_size: int
    seed: int

    @property
    def synthetic_per_batch(self) -> int:
        """Synthetic images in every batch; 0 without a synthetic source."""
        return round(self.fraction * self.batch_size) if self.synthetic is not None else 0

    def real_indices(self, step: int) -> Tensor:
        """Positions in `real` for this step: consecutive pieces of one random permutation per pass."""
        each, size = self.batch_size - self.synthetic_per_batch, len(self.real)
        places = torch.arange(step * each, (step + 1) * each)
        passes = places // size
        return torch.cat([_permutation(self.seed, int(p), size)[places[passes == p] % size] for p in passes.unique()])

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1], labels [B], and which are synthetic (bool [B]; the real ones stand first)."""
        images, labels = [], []
        if self.synthetic_per_batch < self.batch_size:
            chosen = self.real_indices(step)
            images, labels = [self.real.images[chosen]], [self.real.labels[chosen]]
        if self.synthetic is not None and self.synthetic_per_batch:
            draw = generator(self.seed, "synthetic draw", step)
            places = torch.randint(len(self.synthetic), (self.synthetic_per_batch,), generator=draw)
            pixels, classes = self.synthetic.read(places.numpy())
            images.append(from_uint8(pixels))
            labels.append(torch.from_numpy(classes))
        synthetic = torch.arange(self.batch_size) >= self.batch_size - self.synthetic_per_batch
        return torch.cat(images), torch.cat(labels), synthetic


def from_uint8(pixels: np.ndarray) -> Tensor:
    """uint8 NHWC -> float32 NCHW in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255


def to_uint8(images: Tensor) -> np.ndarray:
    """Float NCHW in [0, 1] -> uint8 NHWC, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
