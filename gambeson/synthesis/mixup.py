"""The mixup control (IRGD, table of complementarity): mixtures of two train images, close to train and nothing else.

A set that says little that is new, to stand beside diffusion: mixed once, as images with one class, not in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gambeson.canonical import plain
from gambeson.data.exchange.store_card import images_card
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.mixture import to_uint8
from gambeson.data.synthetic import StoreWriter, inherited
from gambeson.errors import UserError
from gambeson.heritage import seen
from gambeson.randomness import derive
from gambeson.store import Workspace, stage
from gambeson.types import Images, Labels


@dataclass(frozen=True, kw_only=True)
class MixupControl:
    """w a + (1 - w) b of two train images, w ~ Beta(alpha, alpha) (Zhang et al. 2018, eq. 1)."""

    count: int = 4000  # synthetic images to draw
    alpha: float = 1.0  # of the Beta distribution; 1: every weight equally likely
    block: int = 100  # images per block
    blocks_per_shard: int = 10  # whole blocks per shard file

    def __post_init__(self) -> None:
        if min(self.count, self.block, self.blocks_per_shard) < 1 or not self.alpha > 0:
            raise UserError(f"control: expected counts and alpha above 0, got {self}")


def mixtures(spec: MixupControl, train: Split, block: int, seed: int) -> tuple[Images, Labels]:
    """Images [block, C, H, W] and the class of the image that weighs more [block]; a block depends on (seed, block)."""
    size = min(spec.block, spec.count - block * spec.block)
    draw = np.random.default_rng(derive(seed, "mixup", block))
    weights = draw.beta(spec.alpha, spec.alpha, size)
    weights = np.maximum(weights, 1 - weights)  # the first image weighs more
    first, second = draw.integers(len(train), size=(2, size))
    w = train.images.new_tensor(weights)[:, None, None, None]
    return w * train.images[first] + (1 - w) * train.images[second], train.labels[first]


@stage(revision=1, card=images_card)
def mixup_control(work: Workspace, spec: MixupControl, real: ImageSet, *, seed: int) -> None:
    """Writes images/, a SyntheticStore of mixtures of the train images."""
    blocks = -(-spec.count // spec.block)
    made_of = {"control": plain(spec), "seed": seed, "real": real.digest}
    origin = {**made_of, "class_names": list(real.class_names), **inherited(), **seen(work.heritage)}
    writer = StoreWriter(
        root=work.folder / "images", blocks=blocks, blocks_per_shard=spec.blocks_per_shard, origin=origin
    )
    for block in range(blocks):
        if not writer.has(block):
            images, labels = mixtures(spec, real.train, block, seed)
            writer.put(block, to_uint8(images), labels.numpy())
        work.progress(block + 1, blocks)
    writer.finish(origin)
