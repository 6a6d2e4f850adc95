"""Label-safe augmentation of tensor batches, every draw from the caller's generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator

from gambeson.errors import require
from gambeson.types import Images


@dataclass(frozen=True, kw_only=True)
class PadCrop:
    """Pads with zeros and crops back at a random place; flips left-right where the data set says it is label-safe."""

    padding: int = 4  # pixels of padding on each side; 0 switches the crop off
    flip: bool = True  # mirror half of the images, only if the data set declares mirroring label-safe

    def __post_init__(self) -> None:
        require(self.padding >= 0, "augment.padding", "0 or more pixels", self.padding)

    def __call__(self, images: Images, generator: Generator, flip_safe: bool) -> Images:
        """Images [B, C, H, W] -> the same shape."""
        if self.padding:
            images = _shift(images, self.padding, generator)
        if self.flip and flip_safe:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None].to(images.device), images.flip(3), images)
        return images


def _shift(images: Images, padding: int, generator: Generator) -> Images:
    b, c, h, w = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, b), generator=generator).to(images.device)
    rows = (top[:, None] + torch.arange(h, device=images.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(w, device=images.device))[:, None, None, :]
    image = torch.arange(b, device=images.device)[:, None, None, None]
    channel = torch.arange(c, device=images.device)[None, :, None, None]
    return F.pad(images, [padding] * 4)[image, channel, rows, columns]
