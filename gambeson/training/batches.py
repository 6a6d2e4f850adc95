"""The batches of a classifier's training: mixed, augmented by source, softened, cut into shares and parts.

A batch depends on (seed, step) alone. Processes that train together each make the whole of it and keep their share, so
that their number changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gambeson import distributed
from gambeson.data.imageset import ImageSet
from gambeson.data.label_safe import Augmentation, CutMix
from gambeson.data.mixture import Mixture
from gambeson.errors import require
from gambeson.randomness import generator
from gambeson.types import Images


@dataclass(frozen=True)
class Batch:
    """This process's share: images, labels [b] or soft labels [b, K], and the generator that its attack starts from."""

    images: Images
    labels: Tensor
    draw: Generator

    def parts(self, count: int, device: str, layout: torch.memory_format) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels on the device, part by part. UserError where a part would be empty."""
        have = f"1 to the {len(self.images)} images that this process has of a batch"
        require(count <= len(self.images), "accumulate", have, count)
        for images, labels in zip(self.images.tensor_split(count), self.labels.tensor_split(count), strict=True):
            yield (
                images.to(device, memory_format=layout, non_blocking=True),
                labels.to(device, non_blocking=True),
            )


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Step -> batch. The augmentations draw from one generator, and the random start of the attack goes on with it."""

    mixture: Mixture
    real: ImageSet
    seed: int
    augment: Augmentation
    augment_synthetic: Augmentation | None
    mix: CutMix | None
    smooth_synthetic: float

    def __call__(self, step: int) -> Batch:
        images, labels, synthetic = self.mixture.batch(step)
        draw = generator(self.seed, "classifier step", step)
        images = self._augmented(images, int((~synthetic).sum()), draw)
        if self.smooth_synthetic or self.mix is not None:
            labels = self._softened(labels, synthetic)
        if self.mix is not None:
            images, labels = self.mix(images, labels, draw)
        return self._share(images, labels, draw)

    def blame(self, step: int) -> dict[str, list[int]]:
        """Positions of a step's images in the real train images and in the synthetic ones."""
        places = self.mixture.places(step)
        return {"real": places.real.tolist(), "synthetic": places.synthetic.tolist()}

    def _augmented(self, images: Images, real: int, draw: Generator) -> Images:
        """The real images stand first; where both sources are treated alike, they are treated at once."""
        safe = self.real.flip_safe
        if self.augment_synthetic is None:
            return self.augment(images, draw, safe)
        return torch.cat([self.augment(images[:real], draw, safe), self.augment_synthetic(images[real:], draw, safe)])

    def _softened(self, labels: Tensor, synthetic: Tensor) -> Tensor:
        """[B, K] label rows: those of synthetic images give up a share to all classes."""
        classes = len(self.real.class_names)
        share = (self.smooth_synthetic * synthetic.float())[:, None]
        rows = labels if labels.dim() == 2 else F.one_hot(labels, classes)
        return (1 - share) * rows + share / classes

    def _share(self, images: Images, labels: Tensor, draw: Generator) -> Batch:
        """The rows of this process; its draws begin where those of the rows before it end."""
        world, rank = distributed.world(), distributed.rank()
        if world == 1:
            return Batch(images, labels, draw)
        require(len(images) >= world, "batch_size", f"at least {world} images, one for each process", len(images))
        before = [len(part) for part in images.tensor_split(world)][:rank]
        torch.rand(sum(before) * images[0].numel(), generator=draw)
        return Batch(images.tensor_split(world)[rank], labels.tensor_split(world)[rank], draw)


class Ahead:
    """Makes the next batch in a thread while an accelerator works on this one; the batches are the same."""

    def __init__(self, make: Callable[[int], Any], last: int) -> None:
        """make: step -> batch, for steps below `last`."""
        self.make, self.last = make, last
        self.thread = ThreadPoolExecutor(1)
        self.next: tuple[int, Future[Any]] | None = None

    def __call__(self, step: int) -> Any:
        """The batch of this step; the one after it is begun."""
        now = self.next[1].result() if self.next is not None and self.next[0] == step else self.make(step)
        self.next = (step + 1, self.thread.submit(self.make, step + 1)) if step + 1 < self.last else None
        return now

    def close(self) -> None:
        """Waits for the thread and ends it."""
        self.thread.shutdown(cancel_futures=True)
