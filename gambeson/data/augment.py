"""Augmentation of tensor batches, every draw from the caller's generator: label-safe crops and flips for classifiers,
and warps for diffusion models that are told the warp, so that they do not generate it (Karras et al. 2020, 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gambeson.errors import require
from gambeson.types import Features, Images


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
    b, _, h, w = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, b), generator=generator).to(images.device)
    windows = F.pad(images, [padding] * 4).unfold(2, h, 1).unfold(3, w, 1)  # a view of every crop there is
    return windows[torch.arange(b, device=images.device), :, top, left]


@dataclass(frozen=True, kw_only=True)
class NonLeaking:
    """Random warps of the images a diffusion model learns from, with the labels that tell it which (EDM, appendix F.2).

    A label has 9 numbers: flipped left-right, upside down (0 or 1 each); zoom; cos - 1 and sin of the turn; strength of
    the stretch times cos and sin of its axis; shift right and down. Zoom, stretch and shift are in units of their field
    below, normally distributed; turns are uniform. All zero: the image as it is, which is what sampling asks for.
    Ours: shifts are of whole pixels, the images are interpolated bilinearly and mirrored at their borders.
    """

    probability: float = 0.12  # chance of each warp of an image; mirroring left-right: half of the images, as in EDM
    flip: bool = True  # mirror left-right, only if the data set declares mirroring label-safe
    flip_vertical: bool = False  # turn upside down half of those chosen, only if mirroring is label-safe
    scale: float = 0.2  # standard deviation of log2 of the zoom; 0: none
    rotate: float = 1.0  # largest turn in half circles, either way; 0: none
    anisotropy: float = 0.2  # standard deviation of log2 of the stretch along a random axis; 0: none
    translate: float = 0.125  # standard deviation of the shift as a share of the side, in whole pixels; 0: none

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "non_leaking.probability", "a share from 0 to 1", self.probability)
        require(0 <= self.rotate <= 1, "non_leaking.rotate", "0 to 1 half circles", self.rotate)
        for name in ("scale", "anisotropy", "translate"):
            require(getattr(self, name) >= 0, f"non_leaking.{name}", "0 or more", getattr(self, name))

    @property
    def parameters(self) -> int:
        """How many numbers a label has."""
        return 9

    def __call__(self, images: Images, generator: Generator, flip_safe: bool) -> tuple[Images, Features]:
        """Images [B, C, H, W] -> warped images of that shape, and the labels [B, 9] that say how."""
        labels = self.draw(len(images), images.shape[2:], generator, flip_safe).to(images)
        return self.warp(images, labels), labels

    def draw(self, count: int, sides: tuple[int, ...], generator: Generator, flip_safe: bool) -> Features:
        """[count, 9] labels for images of sides (H, W), drawn on the CPU; as many draws whatever is switched off."""
        chosen = torch.rand(count, 5, generator=generator) < self.probability
        mirrored = torch.rand(count, 2, generator=generator) < 0.5
        angle, axis = math.pi * (2 * torch.rand(2, count, generator=generator) - 1)
        zoom, stretch, right, down = torch.randn(4, count, generator=generator)
        mirrored[:, 1] &= chosen[:, 0]
        flips = mirrored & torch.tensor([self.flip, self.flip_vertical]) & flip_safe
        zoom, angle, stretch = zoom * bool(self.scale), angle * self.rotate, stretch * bool(self.anisotropy)
        labels = [flips[:, 0], flips[:, 1], zoom, angle.cos() - 1, angle.sin(), stretch * axis.cos()]
        labels += [stretch * axis.sin(), self._whole(right, sides[1]), self._whole(down, sides[0])]
        told = torch.stack([label.float() for label in labels], dim=1)
        return told * torch.cat([torch.ones(count, 2), chosen[:, [1, 2, 2, 3, 3, 4, 4]]], dim=1) + 0.0  # no -0.0

    def _whole(self, shift: Tensor, side: int) -> Tensor:
        """Shifts in units of `translate`, rounded to whole pixels."""
        unit = self.translate * side
        return (shift * unit).round() / unit if unit else torch.zeros_like(shift)

    def warp(self, images: Images, labels: Features) -> Images:
        """Images [B, C, H, W] warped as their labels [B, 9] say; those whose label is 0 to the bit as they were."""
        height, width = images.shape[2:]
        told = labels.double()
        back = torch.linalg.inv(self._matrix(told))
        shift = self.translate * told[:, 7:, None] * told.new_tensor([[width], [height]])
        half = told.new_tensor([width / 2, height / 2])  # the grid is in halves of the sides, from the middle
        theta = torch.cat([back * half, -back @ shift], dim=2) / half[:, None]
        grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.dtype)
        warped = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
        return torch.where((labels != 0).any(1)[:, None, None, None], warped, images)

    def _matrix(self, told: Tensor) -> Tensor:
        """[B, 2, 2] where the pixel at (x right, y down) of the middle goes: mirrored, zoomed, turned, stretched."""
        mirrored = torch.diag_embed((1 - 2 * told[:, :2]) * 2 ** (self.scale * told[:, 2:3]))
        strength, axis = torch.linalg.vector_norm(told[:, 5:7], dim=1), torch.atan2(told[:, 6], told[:, 5])
        along = 2 ** (self.anisotropy * strength)
        turned = _rotation(axis.cos(), axis.sin())
        stretched = turned @ torch.diag_embed(torch.stack([along, 1 / along], dim=1)) @ turned.mT
        return stretched @ _rotation(told[:, 3] + 1, told[:, 4]) @ mirrored


def _rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """[B, 2, 2], clockwise on the screen, whose y runs down."""
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
