"""RandAugment (Cubuk et al. 2020) on tensor batches: each image draws its own operations, each runs once a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from gambeson.errors import require
from gambeson.types import Images, PerImage

LARGEST = 30
"""The magnitude at which every operation is at its strongest."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`layers` operations drawn for each image from the paper's 14, all at one strength, either way by a coin.

    None of them mirrors. Strengths as published: turns up to 30 degrees, shears to 0.3, shifts to 150/331 of the side
    in whole pixels, blends 1 +- 0.9, down to 4 bits. Ours: bilinear; every image has its own draws. Operations on
    pixel values count in 256 steps, as Pillow's do.
    """

    layers: int = 2  # operations on each image, N in the paper
    magnitude: float = 9.0  # strength of all of them, 0 to 30, M in the paper
    geometric: bool = True  # also turns, shears and shifts; without them five operations fewer
    fill: float = 0.0  # value of what comes in from outside the image, in [0, 1]

    def __post_init__(self) -> None:
        require(self.layers >= 0, "rand_augment.layers", "0 or more operations", self.layers)
        require(0 <= self.magnitude <= LARGEST, "rand_augment.magnitude", f"0 to {LARGEST}", self.magnitude)
        require(0 <= self.fill <= 1, "rand_augment.fill", "0 to 1", self.fill)

    def __call__(self, images: Images, generator: Generator, flip_safe: bool) -> Images:
        """Images [B, C, H, W] -> the same shape, in [0, 1]. Colour is left as it is unless there are 3 channels."""
        names = [*TONES, *WARPS] if self.geometric else list(TONES)
        for _ in range(self.layers):
            drawn = torch.randint(len(names), (len(images),), generator=generator)
            coin = torch.randint(2, (len(images),), generator=generator) * 2 - 1
            images = self._layer(images, names, drawn, coin * (self.magnitude / LARGEST))
        return images

    def _layer(self, images: Images, names: list[str], drawn: Tensor, strength: PerImage) -> Images:
        """Images sorted by operation, worked on group by group, and put back where they were."""
        order = drawn.argsort(stable=True)
        counts = drawn.bincount(minlength=len(names)).tolist()
        there, back = order.to(images.device), order.argsort().to(images.device)
        groups = zip(names, images[there].split(counts), strength[order].to(images).split(counts), strict=True)
        return torch.cat([operate(name, some, how, self.fill) for name, some, how in groups if len(some)])[back]


def operate(name: str, images: Images, strength: PerImage, fill: float = 0.0) -> Images:
    """One operation on images [B, C, H, W], each at its strength [B] from -1 to 1; `fill` comes in from outside."""
    if name in TONES:
        return TONES[name](images, strength)
    return warp(images, WARPS[name](strength, *images.shape[2:]), fill)


def _wide(numbers: PerImage) -> Float[Tensor, "b 1 1 1"]:
    return numbers[:, None, None, None]


def _steps(images: Images) -> Images:
    """Pixels as whole numbers from 0 to 255."""
    return (images * 255).round()


def _autocontrast(images: Images, strength: PerImage) -> Images:
    """Each channel stretched to [0, 1]; one of a single value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = high <= low
    return torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low)).clamp(0, 1)


def _equalize(images: Images, strength: PerImage) -> Images:
    """Each channel's values spread evenly, to the step what Pillow's table does."""
    values = _steps(images).long().flatten(0, 1).flatten(1)
    channel = torch.arange(len(values), device=images.device)[:, None]
    counts = (values + 256 * channel).flatten().bincount(minlength=256 * len(values)).view(-1, 256)
    last = counts.gather(1, values.amax(1, keepdim=True))
    step = (values.shape[1] - last) // 255
    spread = ((counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, spread, torch.arange(256, device=images.device))
    return (table.to(images.dtype) / 255).gather(1, values).view_as(images)


def _solarize(images: Images, strength: PerImage) -> Images:
    """Inverts what is brighter than a threshold that falls from beyond white to black."""
    return torch.where(_steps(images) >= 256 * (1 - _wide(strength.abs())), 1 - images, images)


def _posterize(images: Images, strength: PerImage) -> Images:
    """Keeps 8 to 4 bits, rounding down."""
    width = 2 ** (4 * _wide(strength.abs())).round()
    return (_steps(images) / width).floor() * width / 255


def _blend(images: Images, other: Tensor, strength: PerImage) -> Images:
    """Away from `other` (above 0) or towards it, by up to 0.9, as Pillow's enhancements."""
    return (other + (images - other) * (1 + 0.9 * _wide(strength))).clamp(0, 1)


def _grey(images: Images) -> Float[Tensor, "b 1 h w"]:
    """Luma of three channels (ITU-R 601, as Pillow), else the mean."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def _colour(images: Images, strength: PerImage) -> Images:
    return _blend(images, _grey(images), strength) if images.shape[1] == 3 else images


def _contrast(images: Images, strength: PerImage) -> Images:
    return _blend(images, _grey(images).mean((2, 3), keepdim=True), strength)


def _brightness(images: Images, strength: PerImage) -> Images:
    return _blend(images, torch.zeros_like(images), strength)


def _sharpness(images: Images, strength: PerImage) -> Images:
    """Against the mean of 3x3 pixels that counts the middle five times; the border stays."""
    middle = images[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (F.avg_pool2d(images, 3, 1) * 9 + 4 * middle) / 13
    return _blend(images, smooth, strength)


def _same(images: Images, strength: PerImage) -> Images:
    return images


TONES: dict[str, Callable[[Images, PerImage], Images]] = {
    "identity": _same,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "solarize": _solarize,
    "colour": _colour,
    "posterize": _posterize,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}
"""Operations that leave every pixel in its place: (images, strength [B]) -> images."""


def _matrices(strength: PerImage, entries: list[list[Tensor | float]]) -> Float[Tensor, "b 2 3"]:
    ones = torch.ones_like(strength)
    return torch.stack([torch.stack([ones * entry for entry in row], dim=1) for row in entries], dim=1)


def _rotate(strength: PerImage, height: int, width: int) -> Tensor:
    cos, sin = (strength * math.pi / 6).cos(), (strength * math.pi / 6).sin()
    x, y = width / 2, height / 2  # the middle stays
    return _matrices(strength, [[cos, sin, x - x * cos - y * sin], [-sin, cos, y + x * sin - y * cos]])


def _shear_x(strength: PerImage, height: int, width: int) -> Tensor:
    return _matrices(strength, [[1.0, 0.3 * strength, 0.0], [0.0, 1.0, 0.0]])


def _shear_y(strength: PerImage, height: int, width: int) -> Tensor:
    return _matrices(strength, [[1.0, 0.0, 0.0], [0.3 * strength, 1.0, 0.0]])


def _translate_x(strength: PerImage, height: int, width: int) -> Tensor:
    return _matrices(strength, [[1.0, 0.0, (strength * width * 150 / 331).trunc()], [0.0, 1.0, 0.0]])


def _translate_y(strength: PerImage, height: int, width: int) -> Tensor:
    return _matrices(strength, [[1.0, 0.0, 0.0], [0.0, 1.0, (strength * height * 150 / 331).trunc()]])


WARPS: dict[str, Callable[[PerImage, int, int], Tensor]] = {
    "rotate": _rotate,
    "shear x": _shear_x,
    "shear y": _shear_y,
    "translate x": _translate_x,
    "translate y": _translate_y,
}
"""Operations that move pixels: (strength [B], height, width) -> [B, 2, 3], from a place in the result to its source."""


def warp(images: Images, sources: Float[Tensor, "b 2 3"], fill: float = 0.0) -> Images:
    """The pixel at (x, y) is read, bilinearly, at sources @ (x, y, 1); pixels from the top left, centres at halves."""
    half = sources.new_tensor([images.shape[3] / 2, images.shape[2] / 2])  # the grid is in halves, from the middle
    linear, shift = sources[:, :, :2], sources[:, :, 2]
    moved = (linear @ half + shift - half) / half
    theta = torch.cat([linear * half / half[:, None], moved[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return (F.grid_sample(images - fill, grid, "bilinear", "zeros", align_corners=False) + fill).clamp(0, 1)
