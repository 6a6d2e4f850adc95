"""Rows of sample images as PNG data URIs, enlarged without smoothing."""

from __future__ import annotations

import base64
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

MOST_IMAGES, MOST_SIDE, GOOD_SIDE, GAP = 10, 64, 48, 4


def strip(images: UInt8[np.ndarray, "k h w c"]) -> str:
    """[k, H, W, C] uint8 (C = 1 or 3) -> one PNG data URI, images side by side with transparent gaps.

    Small images are enlarged by repeating pixels to at least 48 pixels, large ones shrunk to 64; at most 10 are shown.
    """
    tiles = [_tile(image) for image in images[:MOST_IMAGES]]
    height, width = tiles[0].shape[:2]
    canvas = np.zeros((height, len(tiles) * (width + GAP) - GAP, 4), dtype=np.uint8)
    for place, tile in enumerate(tiles):
        canvas[:, place * (width + GAP) : place * (width + GAP) + width] = tile
    buffer = io.BytesIO()
    Image.fromarray(canvas, "RGBA").save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _tile(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h2 w2 4"]:
    """[H, W, C] -> an opaque RGBA tile of a good size."""
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"sample images: expected 1 or 3 channels, got shape {image.shape}")
    rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    longest = max(rgb.shape[:2])
    if longest > MOST_SIDE:
        small = Image.fromarray(np.ascontiguousarray(rgb))
        small.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.BOX)
        rgb = np.asarray(small)
    times = -(-GOOD_SIDE // longest) if longest < GOOD_SIDE else 1
    rgb = rgb.repeat(times, axis=0).repeat(times, axis=1)
    return np.concatenate([rgb, np.full((*rgb.shape[:2], 1), 255, np.uint8)], axis=-1)
