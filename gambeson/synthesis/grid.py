"""A grid of samples as one picture: a row for each class, the first images that `generate` would store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from gambeson.data.mixture import to_uint8
from gambeson.disk import atomic
from gambeson.machine import Machine, make_repeatable
from gambeson.randomness import derive
from gambeson.synthesis.generation import Generation, Networks, sample_block
from gambeson.types import Progress, silent

GAP, GOOD_SIDE = 2, 64


def samples(
    spec: Generation, networks: Networks, machine: Machine, seed: int, per_row: int, progress: Progress = silent
) -> UInt8[np.ndarray, "n h w c"]:
    """The first `per_row` images of every class, class by class; without classes the first `per_row` squared."""
    make_repeatable(machine)
    spec.check(networks, machine)
    denoiser = networks.denoiser
    wanted = per_row * (denoiser.classes or per_row)
    blocks = -(-wanted // spec.block)
    guidance, denoise, noise = spec.bind(networks, machine), spec.denoise(denoiser, machine), derive(seed, "generation")
    images: list[Tensor] = []
    for block in range(blocks):
        shape, classes = denoiser.shape, denoiser.classes
        images.append(sample_block(spec, denoise, guidance, shape, classes, block, noise, machine.device)[0])
        progress(block + 1, blocks)
    order = torch.arange(wanted).reshape(per_row, -1).T.flatten()  # classes come in turn: image i is of class i mod K
    return to_uint8(torch.cat(images)[order])


def picture(images: UInt8[np.ndarray, "n h w c"], per_row: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """[N, H, W, C] -> one RGB picture, white between the images, small ones enlarged by repeating pixels."""
    n, h, w, _ = images.shape
    times = max(GOOD_SIDE // max(h, w), 1)
    rows, tall, wide = -(-n // per_row), h * times + GAP, w * times + GAP
    canvas = np.full((rows * tall + GAP, per_row * wide + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // per_row * tall + GAP, i % per_row * wide + GAP
        tile = np.broadcast_to(image, (h, w, 3)).repeat(times, axis=0).repeat(times, axis=1)
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas


def write(path: Path, canvas: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes the picture as PNG, atomically."""
    with atomic(path) as temporary:
        Image.fromarray(canvas).save(temporary, format="PNG")
