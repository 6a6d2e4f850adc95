"""Which images a classifier is measured on: the test part of an image set, or what an .npz file holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gambeson.data.arrays import evaluation_images
from gambeson.data.datasets import Data, NpzImages
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.npz import TEST_IMAGES, keys_of, read_arrays
from gambeson.errors import require


def tested_images(data: Data, ours: bool, everything: bool) -> tuple[ImageSet, list[str]]:
    """The images, and what a reader must know about where they come from. Class names may be missing (none at all).

    An .npz file with test images alone gives those; one with images and labels all of them, but for a classifier of
    `ours` the share that training holds out, unless `everything` is wanted. Raises UserError as the doors do.
    """
    if not isinstance(data, NpzImages):
        require(not everything, "--all-images", "an .npz file as --data", type(data).__name__)
        return data.load(), []
    path = Path(data.path)
    tested = bool(data.test_path) or bool(set(TEST_IMAGES) & set(keys_of(path)))
    alone = tested and not data.test_path and not any(key in keys_of(path) for key in ("images", "image", "x_train"))
    if not alone and (tested or (ours and not everything)):
        split = f"Measured on the images of {path.name} that training holds out; --all-images takes all of them."
        return data.load(), [] if tested else [split]
    part, names = evaluation_images(path), ()
    if "class_names" in keys_of(path):
        names = tuple(map(str, read_arrays(path, {"names": ("class_names",)})["names"].tolist()))
    nothing = Split(part.images[:0], part.labels[:0])
    every = f"All images of {path.name} were taken for test images: none may have been trained on."
    real = ImageSet(name=path.stem, train=nothing, validation=nothing, test=part, class_names=names, flip_safe=False)
    return real, [] if tested else [every]


def with_names(real: ImageSet, classes: int) -> ImageSet:
    """The images, their classes called 0, 1, ... where nothing names them and a classifier of so many knows them all.

    UserError where there are no test images.
    """
    require(len(real.test) > 0, f"{real.name}: test images", "at least one", 0)
    unnamed = not real.class_names and int(real.test.labels.max()) < classes
    return replace(real, class_names=tuple(map(str, range(classes)))) if unnamed else real
