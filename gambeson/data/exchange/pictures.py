"""Single pictures as bytes: what the formats that keep a file for each image have in common."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tokenize import TokenError

import numpy as np
from PIL import Image, ImageOps

from gambeson.data.exchange.columns import head
from gambeson.data.exchange.incoming import MOST_PIXELS, Shape, block_size
from gambeson.data.pictures import DAMAGE, FORMATS, unlike
from gambeson.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
"""Endings by which a file is taken for a picture."""


@dataclass(frozen=True)
class Picture:
    """An image as it lies in its file; `name` says where, for a message."""

    name: str
    data: bytes
    label: int


def encoded(image: np.ndarray) -> bytes:
    """uint8 [H, W, 1 or 3] as PNG."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG")
    return file.getvalue()


def as_array(image: np.ndarray) -> bytes:
    """uint8 [H, W, C] as numpy's .npy."""
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def decoded(picture: Picture, wanted: Shape | None = None) -> np.ndarray:
    """uint8 [H, W, 1 or 3] from a PNG, JPEG or the like, or from numpy's .npy.

    UserError, naming it, for what is damaged, for 16 bits, palettes and transparency, and for another shape than the
    one wanted (that of the first image of a set), which is seen before pixels are read.
    """
    try:
        read = _from_array if picture.data[:6] == np.lib.format.MAGIC_PREFIX else _from_picture
        return read(picture, wanted)
    except UserError:
        raise
    except (*DAMAGE, TokenError) as error:  # the latter of numpy's heads
        raise UserError(
            f"{picture.name}: expected a picture (PNG, JPEG or .npy), got a damaged or another file ({error})"
        ) from error


def _from_picture(picture: Picture, wanted: Shape | None) -> np.ndarray:
    with Image.open(io.BytesIO(picture.data), formats=FORMATS) as opened:
        if (why := unlike(opened)) is not None:
            raise UserError(
                f"{picture.name}: expected 8 bits, grey or RGB, got {why} (Pillow's mode {opened.mode}); convert the "
                "pictures first"
            )
        channels = 3 if opened.mode == "RGB" else 1
        if wanted is None or opened.width * opened.height != wanted[0] * wanted[1]:  # before pixels are read
            _check(picture.name, (opened.height, opened.width, channels), wanted)
        pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L"))
    shape = (pixels.shape[0], pixels.shape[1], channels)
    _check(picture.name, shape, wanted)
    return pixels.reshape(shape)


def _from_array(picture: Picture, wanted: Shape | None) -> np.ndarray:
    column = head(Path(picture.name), None, io.BytesIO(picture.data))
    sides = (*column.sides, 1) if len(column.sides) == 2 else column.sides
    if column.kind != np.uint8 or len(sides) != 3 or sides[2] not in (1, 3):
        raise UserError(f"{picture.name}: expected uint8 [H, W, 1 or 3], got {column.kind} {list(column.sides)}")
    shape = (sides[0], sides[1], sides[2])
    _check(picture.name, shape, wanted)
    if len(picture.data) != column.skip + math.prod(shape):
        raise UserError(f"{picture.name}: expected {math.prod(shape)} bytes after its head, got another number")
    return np.frombuffer(picture.data, np.uint8, offset=column.skip).reshape(shape)


def _check(name: str, shape: Shape, wanted: Shape | None) -> None:
    """UserError for a shape that is not the one wanted, or beyond reason."""
    if wanted is None and not 0 < math.prod(shape) <= MOST_PIXELS * 3:
        raise UserError(f"{name}: expected a picture of up to {MOST_PIXELS:,} pixels, got {shape[0]} x {shape[1]}")
    if wanted is not None and shape != wanted:
        raise UserError(
            f"{name}: expected {wanted[0]} x {wanted[1]} pixels of {wanted[2]} channels, as the first image has, got "
            f"{shape[0]} x {shape[1]} of {shape[2]}; bring all images to one size first"
        )


def blocks_of(pictures: Iterator[Picture], shape: Shape, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures in order as images uint8 [n, H, W, C] and labels int64 [n], `size` at a time, fewer of large ones."""
    size = block_size(shape, size)
    while group := list(islice(pictures, size)):
        images = np.empty((len(group), *shape), np.uint8)
        for place, picture in enumerate(group):
            images[place] = decoded(picture, shape)
        yield images, np.array([picture.label for picture in group], np.int64)
