"""EDM's SongUNet in the DDPM++ configuration (Song et al. 2021; Karras et al. 2022, appendix F, "VP" networks).

Read: positional embedding, standard encoder and decoder, 2x2 box filter. Not read: NCSN++ ("VE": Fourier embedding,
residual encoder, filter [1, 3, 3, 1]) and DhariwalUNet ("ADM"). Parameter names are those of the published files;
dropout and augmentation labels, which only training needs, are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import UserError, require
from gambeson.models.shapes import Tensors, check_levels, check_sides, numbered, shape_of
from gambeson.models.waves import waves
from gambeson.randomness import seeded

HALF_VARIANCE = math.sqrt(0.5)  # a sum of two equals keeps their variance


@dataclass(frozen=True, kw_only=True)
class SongUNetSpec:
    """The architecture; the defaults are edm-cifar10-32x32-cond-vp. 64x64 (FFHQ, AFHQ): (1, 2, 2, 2), resolution 64."""

    resolution: int = 32  # image side, by which the published files name their layers
    width: int = 128  # channels, times the multipliers; a multiple of 4
    multipliers: tuple[int, ...] = (2, 2, 2)  # channels at each resolution, times width
    blocks: int = 4  # residual blocks per resolution on the way down; one more on the way up
    attention: tuple[int, ...] = (16,)  # image sides with self-attention
    embedding: int = 4  # width of the noise embedding, times width
    augment: int = 0  # numbers that described the augmentation in training (9 in published files); unused afterwards

    def __post_init__(self) -> None:
        name = "SongUNet"
        require(self.width > 0 and self.width % 4 == 0, f"{name}, width", "a positive multiple of 4", self.width)
        check_levels(name, self.multipliers, self.blocks, ())
        require(self.embedding >= 1, f"{name}, embedding", "at least 1", self.embedding)
        require(self.augment >= 0, f"{name}, augment", "at least 0", self.augment)
        self.check((1, self.resolution, self.resolution))

    @classmethod
    def read(cls, tensors: Tensors) -> tuple[SongUNetSpec, int, int]:
        """(spec, image channels, classes) of a file's weights; UserError where they are not such a network's."""
        sides = sorted({int(m[1]) for name in tensors if (m := re.match(r"enc\.(\d+)x\1_block0\.", name))})[::-1]
        require(bool(sides), "SongUNet", "names such as enc.32x32_block0.conv0.weight", list(tensors)[:3])
        width, channels, *_ = shape_of(tensors, f"enc.{sides[0]}x{sides[0]}_conv.weight")
        widths = [shape_of(tensors, f"enc.{s}x{s}_block0.conv0.weight")[0] for s in sides]
        spec = cls(
            resolution=sides[0],
            width=width,
            multipliers=tuple(w // width for w in widths),
            blocks=numbered(tensors, f"enc.{sides[0]}x{sides[0]}_block{{}}."),
            attention=tuple(s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in tensors),
            embedding=shape_of(tensors, "map_layer0.weight")[0] // width,
            augment=shape_of(tensors, "map_augment.weight")[1] if "map_augment.weight" in tensors else 0,
        )
        return spec, channels, shape_of(tensors, "map_label.weight")[1] if "map_label.weight" in tensors else 0

    @property
    def side(self) -> int:
        """The side of the images."""
        return self.resolution

    @property
    def sides(self) -> list[int]:
        """The image sides at the resolutions, the full one first."""
        return [self.resolution >> i for i in range(len(self.multipliers))]

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError for images of (channels, height, width) that are not of the spec's resolution."""
        check_sides("SongUNet", len(self.multipliers), shape)
        if shape[1:] != (self.resolution, self.resolution):
            raise UserError(f"SongUNet: expected images of side {self.resolution}, got {shape[1]}x{shape[2]} pixels")

    def build(self, channels: int, classes: int, seed: int = 0) -> SongUNet:
        """The network with weights drawn from the seed; classes 0: unconditional."""
        with seeded(seed):
            return SongUNet(self, channels, classes)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """norm, SiLU, (resample,) conv, plus the embedding, norm, SiLU, conv, plus the input; then attention if any."""

    def __init__(self, inputs: int, outputs: int, embedding: int, scale: float = 1.0, attention: bool = False) -> None:
        super().__init__()
        self.scale, self.attention = scale, attention
        self.norm0, self.norm1 = _norm(inputs), _norm(outputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, outputs)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs or scale != 1 else nn.Identity()
        if attention:
            self.norm2 = _norm(outputs)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def resample(self, x: Tensor) -> Tensor:
        """The image at half, the same or twice the resolution (the 2x2 box filter)."""
        if self.scale == 1:
            return x
        return F.avg_pool2d(x, 2) if self.scale < 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")

    def attend(self, x: Tensor) -> Tensor:
        """Single-head self-attention over the pixels; channel 3 c + (0, 1, 2) of qkv is (q, k, v) of channel c."""
        q, k, v = (p.flatten(2).mT for p in self.qkv(self.norm2(x)).unflatten(1, (-1, 3)).unbind(2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(self.resample(F.silu(self.norm0(x)))) + self.affine(embedding)[:, :, None, None]
        x = (self.skip(self.resample(x)) + self.conv1(F.silu(self.norm1(h)))) * HALF_VARIANCE
        return (x + self.attend(x)) * HALF_VARIANCE if self.attention else x


class SongUNet(nn.Module):
    """(x [B, C, H, W], noise [B] = EDM's c_noise, labels [B] or None) -> F of Karras et al., eq. 7, [B, C, H, W].

    No labels, or the label `classes`, give the network no class at all (a row of zeros).
    """

    def __init__(self, spec: SongUNetSpec, channels: int, classes: int) -> None:
        super().__init__()
        self.spec, self.channels, self.classes = spec, channels, classes
        embedding = spec.width * spec.embedding
        if classes:
            self.map_label = nn.Linear(classes, spec.width)
        if spec.augment:
            self.map_augment = nn.Linear(spec.augment, spec.width, bias=False)
        self.map_layer0 = nn.Linear(spec.width, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        widths = [spec.width * m for m in spec.multipliers]
        enter = nn.Conv2d(channels, spec.width, 3, padding=1)
        self.enc = nn.ModuleDict({f"{spec.resolution}x{spec.resolution}_conv": enter, **dict(self._encoder(widths))})
        self.dec = nn.ModuleDict(dict(self._decoder(widths)))
        self.dec[f"{spec.resolution}x{spec.resolution}_aux_norm"] = _norm(widths[0])
        self.dec[f"{spec.resolution}x{spec.resolution}_aux_conv"] = nn.Conv2d(widths[0], channels, 3, padding=1)

    def _encoder(self, widths: list[int]) -> Iterator[tuple[str, Block]]:
        current, embedding = self.spec.width, self.map_layer1.out_features
        for side, width in zip(self.spec.sides, widths, strict=True):
            if side != self.spec.resolution:
                yield f"{side}x{side}_down", Block(current, current, embedding, scale=0.5)
            for i in range(self.spec.blocks):
                yield f"{side}x{side}_block{i}", Block(current, width, embedding, 1.0, side in self.spec.attention)
                current = width

    def _decoder(self, widths: list[int]) -> Iterator[tuple[str, Block]]:
        current, embedding, lowest = widths[-1], self.map_layer1.out_features, self.spec.sides[-1]
        for level, side in reversed(list(enumerate(self.spec.sides))):
            if side == lowest:
                yield f"{side}x{side}_in0", Block(current, current, embedding, attention=True)
                yield f"{side}x{side}_in1", Block(current, current, embedding)
            else:
                yield f"{side}x{side}_up", Block(current, current, embedding, scale=2.0)
            entered = widths[level - 1] if level else self.spec.width
            for i, skip in enumerate([widths[level]] * self.spec.blocks + [entered]):
                attention = i == self.spec.blocks and side in self.spec.attention
                yield f"{side}x{side}_block{i}", Block(current + skip, widths[level], embedding, 1.0, attention)
                current = widths[level]

    def _embedding(self, noise: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        embedding = torch.cat(waves(noise, self.spec.width, dtype, endpoint=True), dim=1)
        if labels is not None and not self.classes:
            raise ValueError("SongUNet: expected no labels, got some; the network is unconditional")
        if self.classes:
            null = noise.new_full((len(noise),), self.classes, dtype=torch.int64)
            rows = F.one_hot(null if labels is None else labels, self.classes + 1)[:, : self.classes].to(dtype)
            embedding = embedding + self.map_label(rows * math.sqrt(self.classes))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self._embedding(noise, labels, x.dtype)
        enter, *encoder = self.enc.values()
        *decoder, norm, leave = self.dec.values()
        skips = [x := enter(x)]
        for block in encoder:
            skips.append(x := block(x, embedding))
        for name, block in zip(self.dec, decoder, strict=False):
            x = torch.cat([x, skips.pop()], dim=1) if "_block" in name else x
            x = block(x, embedding)
        return leave(F.silu(norm(x)))
