"""A U-Net for images of 8 to 64 pixels, with or without classes, with one size dial (`width`).

The block is DDPM++'s (Song et al. 2021; Karras et al. 2022): group norm, SiLU, 3x3 convolution, noise and class
embedding as scale and shift between two of them, residual connections scaled by sqrt(1/2), self-attention at low
resolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import UserError, require
from gambeson.models.shapes import check_sides
from gambeson.models.waves import waves
from gambeson.randomness import seeded


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """The architecture of a U-Net."""

    width: int = 32  # channels at full resolution: the size dial
    multipliers: tuple[int, ...] = (1, 2)  # channels at each resolution, times width; each further one halves the image
    blocks: int = 1  # residual blocks per resolution
    attention: int = field(default=1, metadata={"neutral": 1})  # how many of the lowest resolutions have self-attention
    dropout: float = field(default=0.0, metadata={"neutral": 0.0})  # share of features dropped in a block, in training
    augment: int = field(
        default=0, metadata={"neutral": 0}
    )  # augmentation parameters it is told; 0: none (a training with non_leaking sets it)

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise UserError(f"U-Net width: expected a positive multiple of 8, got {self.width}")
        if not self.multipliers or min(self.multipliers) < 1 or self.blocks < 1:
            raise UserError(f"U-Net: expected multipliers and blocks of at least 1, got {self}")
        levels = len(self.multipliers)
        require(0 <= self.attention <= levels, "U-Net attention", f"0 to {levels}, the resolutions", self.attention)
        require(0 <= self.dropout < 1, "U-Net dropout", "a share from 0 to below 1", self.dropout)
        require(self.augment >= 0, "U-Net augment", "0 or more parameters", self.augment)

    @staticmethod
    def cifar10() -> UNetSpec:
        """35.7M parameters for 32x32 images in 10 classes: the size and resolutions of DDIM's U-Net (35.7M).

        As there (Ho et al. 2020, appendix B): 32 to 4 pixels, dropout 0.1; attention at 16 pixels, here also below.
        """
        return UNetSpec(width=120, multipliers=(1, 2, 2, 2), blocks=3, attention=3, dropout=0.1)

    @staticmethod
    def cifar10_large() -> UNetSpec:
        """56M parameters for 32x32 images in 10 classes: the size and resolutions of EDM's DDPM++ (55.7M).

        As there (Karras et al. 2022, Table 7): 32 to 8 pixels, all of twice the width, dropout 0.13. To train it:
        DenoiserTraining(network=UNetSpec.cifar10_large(), non_leaking=NonLeaking(flip_vertical=True)), with EDM's
        augmentation.
        """
        return UNetSpec(width=160, multipliers=(2, 2, 2), blocks=3, attention=2, dropout=0.13)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError where images of (channels, height, width) cannot be halved at every further resolution."""
        check_sides("U-Net", len(self.multipliers), shape)

    def build(self, channels: int, classes: int, seed: int = 0) -> UNet:
        """The network with weights drawn from the seed (the global generator is left as it was); classes 0: none."""
        with seeded(seed):
            return UNet(self, channels, classes)


class Residual(nn.Module):
    """norm, SiLU, conv, scale and shift by the embedding, SiLU, dropout, conv, plus the input."""

    def __init__(self, inputs: int, outputs: int, embedding: int, attention: bool, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(inputs // 8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(outputs // 8, outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(self.dropout(F.silu(torch.addcmul(shift, self.norm2(h), scale + 1))))
        return self.attention((self.skip(x) + h) * math.sqrt(0.5))


class Attention(nn.Module):
    """Single-head self-attention over the pixels, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).transpose(2, 3).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, c, h, w)
        return (x + self.out(mixed)) * math.sqrt(0.5)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts by adding nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class UNet(nn.Module):
    """(x [B, C, H, W], noise [B], labels [B] or None) -> [B, C, H, W]; H and W divisible by 2^(resolutions - 1).

    `noise` is the noise level in units of about 1. `labels` may hold `classes`, the null class of classifier-free
    guidance, which None means too; with 0 classes they are None. `augment` [B, spec.augment] says how the images were
    augmented; None means zeros, not at all. Dropout draws from the global generators.
    """

    def __init__(self, spec: UNetSpec, channels: int, classes: int) -> None:
        super().__init__()
        self.spec, self.channels, self.classes = spec, channels, classes
        widths = [spec.width * m for m in spec.multipliers]
        embedding = 4 * spec.width
        self.frequencies = spec.width
        self.noise = nn.Sequential(nn.Linear(spec.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding) if classes else None
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        lowest = len(widths) - spec.attention  # the first level with attention
        skips = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(spec.blocks):
                self.down.append(Residual(skips[-1], width, embedding, level >= lowest, spec.dropout))
                skips.append(width)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(spec.blocks):
                above = widths[min(level + 1, len(widths) - 1)] if len(self.up) % spec.blocks == 0 else width
                self.up.append(Residual(above + skips.pop(), width, embedding, level >= lowest, spec.dropout))
        self.norm = nn.GroupNorm(widths[0] // 8, widths[0])
        self.leave = _zero(nn.Conv2d(widths[0], channels, 3, padding=1))
        self.augment = nn.Linear(spec.augment, embedding, bias=False) if spec.augment else None  # zeros add nothing

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        embedding = self._embed(x, noise, labels, augment)
        blocks, levels = self.spec.blocks, len(self.spec.multipliers)
        x = self.enter(x)
        skips: list[Tensor] = []
        for i, layer in enumerate(self.down):
            if i and i % blocks == 0:
                x = F.avg_pool2d(x, 2)
            x = layer(x, embedding)
            skips.append(x)
        for i, layer in enumerate(self.up):
            if i and i % blocks == 0 and i // blocks < levels:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = layer(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.leave(F.silu(self.norm(x)))

    def _embed(self, x: Tensor, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """[B, embedding] of noise level, class and augmentation."""
        sines, cosines = waves(noise, self.frequencies, torch.float32, endpoint=True, scale=1000.0, reciprocal=True)
        embedded = self.noise(torch.cat([cosines, sines], dim=1).to(x.dtype))
        if self.label is None:
            assert labels is None, "labels for a U-Net without classes"
        else:
            labels = torch.full((len(x),), self.classes, device=x.device) if labels is None else labels
            embedded = embedded + self.label(labels)
        return F.silu(embedded if augment is None else embedded + self._augmented(augment))

    def _augmented(self, augment: Tensor) -> Tensor:
        """[B, embedding] of the augmentation; ValueError for other parameters than it was made for."""
        if self.augment is None or augment.shape[1:] != (self.spec.augment,):
            raise ValueError(
                f"U-Net: expected {self.spec.augment} augmentation parameters per image, got {list(augment.shape)}; "
                "UNetSpec.augment says how many it is told"
            )
        return self.augment(augment)
