"""The Gaussian control (IRGD): images drawn from one normal distribution per class, the low end of the scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gambeson.canonical import plain
from gambeson.data.datasets import ImageSet
from gambeson.data.exchange.store_card import images_card
from gambeson.data.mixture import to_uint8
from gambeson.data.synthetic import StoreWriter, inherited
from gambeson.errors import UserError
from gambeson.heritage import seen
from gambeson.randomness import block_noise, derive
from gambeson.store import Workspace, stage


@dataclass(frozen=True, kw_only=True)
class GaussianControl:
    """A normal distribution fitted to each class of the training images."""

    count: int = 4000  # synthetic images to draw, over all classes in turn
    block: int = 100  # images per block
    blocks_per_shard: int = 10  # whole blocks per shard file
    shrinkage: float = 0.1  # weight of the class's mean variance on the diagonal (few images, many pixels)

    def __post_init__(self) -> None:
        if min(self.count, self.block, self.blocks_per_shard) < 1 or not 0 <= self.shrinkage <= 1:
            raise UserError(f"control: expected counts above 0 and a shrinkage from 0 to 1, got {self}")


def fit_classes(images: Tensor, labels: Tensor, classes: int, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Means [K, D] and Cholesky factors [K, D, D] of each class, covariances shrunk to a multiple of the identity."""
    flat = images.double().flatten(1)
    means = torch.stack([flat[labels == k].mean(0) for k in range(classes)])
    covariances = torch.stack([flat[labels == k].T.cov() for k in range(classes)])
    level = covariances.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(flat.shape[1], dtype=torch.float64)
    shrunk = (1 - shrinkage) * covariances + (shrinkage * level + 1e-9) * eye
    return means, torch.linalg.cholesky(shrunk)


@stage(revision=1, card=images_card)
def gaussian_control(work: Workspace, spec: GaussianControl, real: ImageSet, *, seed: int) -> None:
    """Writes images/, a SyntheticStore of Gaussian images cut to [0, 1]."""
    classes = len(real.class_names)
    means, factors = fit_classes(real.train.images, real.train.labels, classes, spec.shrinkage)
    blocks = -(-spec.count // spec.block)
    origin = {
        "control": plain(spec),
        "seed": seed,
        "real": real.digest,
        "class_names": list(real.class_names),
        **inherited(),
        **seen(work.heritage),
    }
    writer = StoreWriter(
        root=work.folder / "images", blocks=blocks, blocks_per_shard=spec.blocks_per_shard, origin=origin
    )
    for block in range(blocks):
        if not writer.has(block):
            size = min(spec.block, spec.count - block * spec.block)
            labels = (torch.arange(size) + block * spec.block) % classes
            noise = block_noise(derive(seed, "gaussian"), block, (size, means.shape[1]), torch.float64)
            flat = means[labels] + torch.einsum("bij,bj->bi", factors[labels], noise)
            writer.put(block, to_uint8(flat.float().reshape(size, *real.shape)), labels.numpy())
        work.progress(block + 1, blocks)
    writer.finish(origin)
