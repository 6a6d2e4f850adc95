"""The door of an evaluation: test images and their labels alone, out of one .npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gambeson.data.imageset import Split
from gambeson.data.npz import IMAGES, LABELS, TEST_IMAGES, TEST_LABELS, keys_of, read_arrays, unrolled
from gambeson.errors import UserError, require
from gambeson.types import Images


def evaluation_images(path: str | Path) -> Split:
    """The test images of an .npz file, in the file's order: x_test and y_test, otherwise all its images and labels.

    Images uint8, or float in [0, 1]; [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, or rows of bytes
    as downsampled ImageNet has them (`npz.unrolled`).
    Nothing is split off: images that a model was trained on stay among them if the file holds them.
    Raises UserError for unknown keys, layouts, ranges and labels, and for a head that declares what is not there.
    """
    path = Path(path)
    tested = set(TEST_IMAGES) & set(keys_of(path))
    wanted = {"images": TEST_IMAGES, "labels": TEST_LABELS} if tested else {"images": IMAGES, "labels": LABELS}
    arrays = read_arrays(path, wanted)
    pixels, labels = unrolled(arrays["images"], arrays["labels"])
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) != len(pixels):
        raise UserError(
            f"{path}: expected one whole number for each of {len(pixels)} images as labels, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    require(len(labels) > 0, f"{path}: images", "at least one", 0)
    require(int(labels.min()) >= 0, f"{path}: labels", "classes from 0", int(labels.min()))
    return Split(_images(path, pixels), torch.from_numpy(labels.astype(np.int64)))


def _images(path: Path, pixels: np.ndarray) -> Images:
    """float32 [N, C, H, W] in [0, 1] from any layout whose channels can be told from its sides."""
    grey = pixels[..., None] if pixels.ndim == 3 else pixels
    last, first = (grey.ndim == 4 and grey.shape[place] in (1, 3) for place in (3, 1))
    require(min(grey.shape) > 0, f"{path}: images", "sides above 0", list(pixels.shape))
    if last == first or pixels.dtype.kind not in "uf" or (pixels.dtype.kind == "u" and pixels.dtype != np.uint8):
        raise UserError(
            f"{path}: expected images as uint8, or float in [0, 1], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels "
            f"(or [N, H, W]), got {pixels.dtype} {list(pixels.shape)}{'; which are the channels?' if last else ''}"
        )
    images = torch.from_numpy(np.ascontiguousarray(grey.transpose(0, 3, 1, 2) if last else grey)).float()
    images = images / 255 if pixels.dtype == np.uint8 else images
    low, high = images.min().item(), images.max().item()  # NaN makes both NaN, which no comparison passes
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"{path}: expected float images in [0, 1], got {low:.4g} to {high:.4g}; divide by 255, or leave the "
            "normalisation to the model"
        )
    return images
