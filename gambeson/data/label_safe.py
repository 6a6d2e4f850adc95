"""Augmentation of training batches that keeps the class (Cutout, chains) or mixes it as exactly as the pixels (CutMix).

Every draw comes from the caller's generator, on the CPU, image by image: a batch of another size means the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Generator, Tensor

from gambeson.data.augment import PadCrop
from gambeson.data.rand_augment import RandAugment
from gambeson.errors import require
from gambeson.types import Images

Targets = Float[Tensor, "b k"]
"""[B, K] one share for each class, summing to 1."""


@dataclass(frozen=True, kw_only=True)
class Cutout:
    """Fills a square whose centre is anywhere in the image, so that part of it may lie outside (DeVries & Taylor 2017).

    The paper fills with 0 after normalisation, which is about the mean colour: hence the grey here.
    """

    size: float = 0.5  # side of the square as a share of the image's shorter side
    probability: float = 1.0  # chance that an image is cut
    fill: float = 0.5  # value of the filled pixels, in [0, 1]

    def __post_init__(self) -> None:
        for name in ("size", "probability", "fill"):
            require(0 <= getattr(self, name) <= 1, f"cutout.{name}", "0 to 1", getattr(self, name))

    def __call__(self, images: Images, generator: Generator, flip_safe: bool) -> Images:
        """Images [B, C, H, W] -> the same shape."""
        b, _, h, w = images.shape
        centres = _centres(b, h, w, generator)
        chosen = torch.rand(b, generator=generator) < self.probability
        side = torch.full((b,), round(self.size * min(h, w))) * chosen
        return images.masked_fill(_boxes(centres, side, side, h, w).to(images.device), self.fill)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Augmentations one after the other."""

    parts: tuple[PadCrop | Cutout | RandAugment, ...] = (PadCrop(),)  # what is done, in this order

    def __call__(self, images: Images, generator: Generator, flip_safe: bool) -> Images:
        """Images [B, C, H, W] -> the same shape."""
        for part in self.parts:
            images = part(images, generator, flip_safe)
        return images


Augmentation = PadCrop | Cutout | RandAugment | Chain
"""What keeps the class: called as (images, generator, flip_safe) -> images."""


@dataclass(frozen=True, kw_only=True)
class CutMix:
    """Pastes a box of another image of the batch, and its share of the class (Yun et al. 2019).

    Ours: the coin, the box and its size are drawn for each image instead of once a batch, so that the batch size does
    not change what is learned from. The partner comes from one permutation, as published. The weight of a class is the
    share of pixels, counted after the box is cut off at the border.
    """

    alpha: float = 1.0  # the kept share is Beta(alpha, alpha) distributed before the border cuts the box; 1: uniform
    probability: float = 0.5  # chance that an image gets a box

    def __post_init__(self) -> None:
        require(self.alpha > 0, "cutmix.alpha", "above 0", self.alpha)
        require(0 <= self.probability <= 1, "cutmix.probability", "0 to 1", self.probability)

    def __call__(self, images: Images, targets: Targets, generator: Generator) -> tuple[Images, Targets]:
        """Images [B, C, H, W] and targets [B, K] -> both mixed, of the same shapes."""
        b, _, h, w = images.shape
        partner = torch.randperm(b, generator=generator)
        centres = _centres(b, h, w, generator)
        ratio = self._sides(b, generator)
        box = _boxes(centres, (ratio * h).long(), (ratio * w).long(), h, w)
        return mixed(images, targets, box.to(images.device), partner.to(images.device))

    def _sides(self, count: int, generator: Generator) -> Tensor:
        """[count] float64: side of each box as a share of the image's, sqrt(1 - lambda); 0 where the coin says no."""
        seed = int(torch.randint(2**62, (1,), generator=generator))  # torch draws no Beta from a generator
        kept = torch.from_numpy(np.random.default_rng(seed).beta(self.alpha, self.alpha, count))
        return (1 - kept).sqrt() * (torch.rand(count, generator=generator) < self.probability)


def mixed(
    images: Images, targets: Targets, box: Bool[Tensor, "b 1 h w"], partner: Int64[Tensor, " b"]
) -> tuple[Images, Targets]:
    """Images with their partner's pixels inside the box, and targets weighted by the pixels of each."""
    share = box.flatten(1).to(targets.dtype).mean(1, keepdim=True).to(targets.device)
    return torch.where(box, images[partner], images), torch.lerp(targets, targets[partner.to(targets.device)], share)


def _centres(count: int, height: int, width: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows and columns [count] of pixels, uniform over the image."""
    rows = torch.randint(height, (count,), generator=generator)
    return rows, torch.randint(width, (count,), generator=generator)


def _boxes(centres: tuple[Tensor, Tensor], tall: Tensor, wide: Tensor, height: int, width: int) -> Tensor:
    """[B, 1, H, W] bool: inside a box of `tall` by `wide` pixels around the centre, cut off at the border."""
    rows, columns = _reach(centres[0], tall, height), _reach(centres[1], wide, width)
    return rows[:, None, :, None] & columns[:, None, None, :]


def _reach(centre: Tensor, length: Tensor, side: int) -> Tensor:
    """[B, side] bool: the `length` places around `centre`; for an even length one more before it than after."""
    places = torch.arange(side) - (centre - length // 2)[:, None]
    return (places >= 0) & (places < length[:, None])
