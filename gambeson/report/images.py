"""Images as data URIs for the page: kept to the bit where they are few, smaller and compressed where they are many."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

LOSSLESS = 600_000
"""Bytes of pixels up to which a group of pictures is kept to the bit; beyond, it is compressed with loss."""
QUALITY = 80


def pictures(groups: Sequence[UInt8[np.ndarray, "_ _ _ _"]]) -> list[list[str]]:
    """Every image of every group as a data URI of its own: PNG, to the bit, while all of them together have at most
    LOSSLESS bytes of pixels, else WebP of QUALITY. Sizes are kept; see `smaller` and `sparser`.

    Raises ValueError unless images have 1 or 3 channels.
    """
    kind = "png" if sum(group.size for group in groups) <= LOSSLESS else "webp"
    return [[uri(_pil(image), kind) for image in group] for group in groups]


def smaller(images: UInt8[np.ndarray, "n h w c"], side: int) -> UInt8[np.ndarray, "n h2 w2 c"]:
    """The images with at most `side` pixels along the longer side, averaged over areas."""
    longest = max(images.shape[1:3])
    if longest <= side or not len(images):
        return images
    size = tuple(max(1, round(side * length / longest)) for length in images.shape[2:0:-1])
    small = [np.asarray(_pil(image).resize((size[0], size[1]), Image.Resampling.BOX)) for image in images]
    return np.stack(small).reshape(len(images), size[1], size[0], images.shape[-1])


def sparser(images: UInt8[np.ndarray, "n h w c"], side: int) -> UInt8[np.ndarray, "n h2 w2 c"]:
    """The images with at most `side` pixels along the longer side, pixels left out and none changed: an average would
    hide a perturbation."""
    every = -(-max(images.shape[1:3]) // side)
    return images[:, ::every, ::every]


def _pil(image: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels, got shape {image.shape}")
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def uri(image: Image.Image, kind: str = "png") -> str:
    """A picture as a data URI: `png`, to the bit, or `webp` of QUALITY."""
    buffer = io.BytesIO()
    ways = {"png": {"optimize": True}, "webp": {"quality": QUALITY, "method": 4}}
    image.save(buffer, format=kind.upper(), **ways[kind])
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
