"""From the labelled parts that a data set is distributed in to an image set: what is chosen first, then what is read.

Only images that are kept are decoded, and only as many as the memory that is free can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gambeson.data.imageset import ImageSet, Split, balanced_part, held_out
from gambeson.data.npz import check_memory
from gambeson.errors import UserError, require
from gambeson.randomness import derive
from gambeson.types import Images

Places = np.ndarray
"""int64 [n]: which images of a part."""


@dataclass(frozen=True)
class Part:
    """A labelled part whose images are read when they are wanted."""

    labels: np.ndarray  # int64 [N]
    read: Callable[[Places], np.ndarray]  # places -> uint8 [n, H, W, C]

    @staticmethod
    def of(pixels: np.ndarray, labels: np.ndarray) -> Part:
        """Images uint8 [N, H, W, C] that are in memory already."""
        return Part(labels.astype(np.int64), pixels.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which images of train and test make the parts of an image set."""

    train: Places
    validation: Places  # places in train
    test: Places


def chosen(
    name: str, train: np.ndarray, test: np.ndarray, names: Sequence[str], validation: int, count: int, split_seed: int
) -> Chosen:
    """`validation` images of train held out, stratified, and `count` of the others kept, balanced (0: all).

    The validation part depends on the seed and its own size alone, and a smaller train part lies in a larger one.
    """
    seed = derive(split_seed, f"{name} split")
    held, rest = held_out(train, np.arange(len(train)), validation, seed, names, "data.validation_images")
    if count:
        rest = balanced_part(train, rest, count, seed, names, "data.train_images")
    return Chosen(train=rest, validation=held, test=np.arange(len(test)))


def assembled(
    name: str, train: Part, test: Part, names: tuple[str, ...], where: Chosen, side: int, *, flip_safe: bool
) -> ImageSet:
    """The image set of the chosen images, averaged down to `side` pixels where they are a multiple of it.

    Raises UserError for labels outside the classes, and for more images than half of the free memory holds.
    """
    for part, labels in (("train", train.labels), ("test", test.labels)):
        check_labels(f"{name}, {part}", labels, len(names))
    _check_size(name, train, where, side)

    def split(part: Part, places: Places) -> Split:
        return Split(shrunk(as_images(part.read(places)), side), torch.from_numpy(part.labels[places]))

    return ImageSet(
        name=name,
        train=split(train, where.train),
        validation=split(train, where.validation),
        test=split(test, where.test),
        class_names=names,
        flip_safe=flip_safe,
    )


def as_images(pixels: np.ndarray) -> Images:
    """uint8 NHWC -> float32 NCHW in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float().div_(255)


def shrunk(images: Images, side: int) -> Tensor:
    """Images of `side` x `side` pixels, each the mean of a square of the images' own; UserError where none fit."""
    height, width = images.shape[2:]
    require(height == width and height % side == 0, "data.side", f"a divisor of {height} x {width} pixels", side)
    return F.avg_pool2d(images, height // side) if side < height else images


def check_labels(where: str, labels: np.ndarray, classes: int) -> None:
    """UserError for no labels, labels outside 0 .. classes - 1, and classes without any."""
    require(len(labels) > 0, where, "at least one image", 0)
    low, high = int(labels.min()), int(labels.max())
    require(low >= 0 and high < classes, f"{where}: labels", f"0 to {classes - 1}", f"{low} to {high}")


def check_counts(validation: int, train: int, classes: int, most: int) -> None:
    """UserError for numbers of images that no split of the set can have."""
    held = classes <= validation <= most
    require(held, "data.validation_images", f"{classes} to {most}, some of each class", validation)
    fits = train % classes == 0 and train >= 0
    require(fits, "data.train_images", f"0 for all, or a multiple of the {classes} classes", train)


def _check_size(name: str, train: Part, where: Chosen, side: int) -> None:
    """UserError where the chosen images do not fit; one is read to see their size."""
    height, width, channels = train.read(where.train[:1]).shape[1:]
    count = len(where.train) + len(where.validation) + len(where.test)
    try:
        check_memory(name, count * height * width * channels * 4)
    except UserError as error:
        raise UserError(f"{error}; choose fewer train_images, or a smaller side than {side}") from None
