"""The U-Net of Ho et al. 2020 (DDPM, appendix B) as DDIM's PyTorch code stores it: 35,746,307 weights for CIFAR-10.

Unconditional, predicts eps; parameter names are those of the published files. Written from the paper and the layout of
the files; dropout, which only training needs, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import require
from gambeson.models.shapes import Tensors, check_levels, check_sides, numbered, shape_of
from gambeson.models.waves import waves
from gambeson.randomness import seeded

GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class DDIMUNetSpec:
    """The architecture of a DDPM/DDIM U-Net; the defaults are the published CIFAR-10 network."""

    width: int = 128  # channels at full resolution, a multiple of 32 (group norm has 32 groups)
    multipliers: tuple[int, ...] = (1, 2, 2, 2)  # channels at each resolution, times width
    blocks: int = 2  # residual blocks per resolution on the way down; one more on the way up
    attention: tuple[int, ...] = (1,)  # resolutions with self-attention after each block; 0 is full resolution

    def __post_init__(self) -> None:
        require(self.width > 0 and self.width % GROUPS == 0, "DDIM U-Net, width", "a multiple of 32", self.width)
        check_levels("DDIM U-Net", self.multipliers, self.blocks, self.attention)

    @classmethod
    def read(cls, tensors: Tensors) -> tuple[DDIMUNetSpec, int, int]:
        """(spec, image channels, 0 classes) of a file's weights; UserError where they are not such a network's."""
        width, channels, *_ = shape_of(tensors, "conv_in.weight")
        levels = range(numbered(tensors, "down.{}."))
        widths = [shape_of(tensors, f"down.{i}.block.0.conv1.weight")[0] for i in levels]
        spec = cls(
            width=width,
            multipliers=tuple(w // width for w in widths),
            blocks=numbered(tensors, "down.0.block.{}."),
            attention=tuple(i for i in levels if f"down.{i}.attn.0.q.weight" in tensors),
        )
        return spec, channels, 0

    @property
    def side(self) -> int | None:
        """The side of the images where the published configurations tell it: CIFAR-10, CelebA and LSUN; else None.

        All of them have self-attention at 16 pixels.
        """
        published = {((1, 2, 2, 2), (1,)): 32, ((1, 2, 2, 2, 4), (2,)): 64, ((1, 1, 2, 2, 4, 4), (4,)): 256}
        return published.get((self.multipliers, self.attention)) if (self.width, self.blocks) == (128, 2) else None

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError where images of (channels, height, width) cannot be halved at every resolution."""
        check_sides("DDIM U-Net", len(self.multipliers), shape)

    def build(self, channels: int, classes: int, seed: int = 0) -> DDIMUNet:
        """The network with weights drawn from the seed; UserError for classes other than 0 (it has no labels)."""
        require(classes == 0, "DDIM U-Net, classes", "0 (the network is unconditional)", classes)
        with seeded(seed):
            return DDIMUNet(self, channels)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class TimeEmbedding(nn.Module):
    """t [B] -> [B, 4 width]: waves, sines first, and two dense layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.dense = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        enter, leave = self.dense
        return leave(F.silu(enter(torch.cat(waves(time, self.width, dtype, endpoint=True), dim=1))))


class Residual(nn.Module):
    """norm, SiLU, conv, plus the embedding, norm, SiLU, conv, plus the input."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(embedding))[:, :, None, None]
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Single-head self-attention over the pixels, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT for layer in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2; one row and column of zeros at the far sides only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each pixel doubled, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, one per number of input channels, each with its attention if any."""

    def __init__(self, inputs: list[int], outputs: int, embedding: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(Residual(i, outputs, embedding) for i in inputs)
        self.attn = nn.ModuleList(Attention(outputs) for _ in inputs if attention)

    def layer(self, index: int, x: Tensor, embedding: Tensor) -> Tensor:
        """One block and its attention."""
        x = self.block[index](x, embedding)
        return self.attn[index](x) if len(self.attn) else x


class Down(Level):
    """A resolution on the way down: everything it computes goes onto the pile of skips."""

    def __init__(self, inputs: list[int], outputs: int, embedding: int, attention: bool, last: bool) -> None:
        super().__init__(inputs, outputs, embedding, attention)
        self.downsample = None if last else Downsample(outputs)

    def forward(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.block)):
            skips.append(x := self.layer(i, x, embedding))
        if self.downsample is not None:
            skips.append(x := self.downsample(x))
        return x


class Up(Level):
    """A resolution on the way up: each block takes one skip from the pile."""

    def __init__(self, inputs: list[int], outputs: int, embedding: int, attention: bool, last: bool) -> None:
        super().__init__(inputs, outputs, embedding, attention)
        self.upsample = nn.Identity() if last else Upsample(outputs)

    def forward(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.block)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), embedding)
        return self.upsample(x)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = (Residual(channels, channels, embedding) for _ in range(2))
        self.attn_1 = Attention(channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, embedding)), embedding)


class DDIMUNet(nn.Module):
    """(x [B, C, H, W], noise [B] = index t of the table of 1000, labels None) -> eps [B, C, H, W]."""

    def __init__(self, spec: DDIMUNetSpec, channels: int) -> None:
        super().__init__()
        self.spec, self.channels, self.classes = spec, channels, 0
        widths = [spec.width * m for m in spec.multipliers]
        self.temb = TimeEmbedding(spec.width)
        self.conv_in = nn.Conv2d(channels, spec.width, 3, padding=1)
        self.down = nn.ModuleList(self._down(widths))
        self.mid = Middle(widths[-1], 4 * spec.width)
        self.up = nn.ModuleList(self._up(widths))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def _down(self, widths: list[int]) -> Iterator[Down]:
        for i, width in enumerate(widths):
            inputs = [widths[i - 1] if i else self.spec.width] + [width] * (self.spec.blocks - 1)
            yield Down(inputs, width, 4 * self.spec.width, i in self.spec.attention, last=i == len(widths) - 1)

    def _up(self, widths: list[int]) -> Iterator[Up]:
        for i, width in enumerate(widths):
            # the skips of a resolution: its blocks in reverse, then what entered it from the finer one
            skips = [width] * self.spec.blocks + [widths[i - 1] if i else self.spec.width]
            currents = [widths[min(i + 1, len(widths) - 1)]] + [width] * self.spec.blocks
            inputs = [current + skip for current, skip in zip(currents, skips, strict=True)]
            yield Up(inputs, width, 4 * self.spec.width, i in self.spec.attention, last=i == 0)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            raise ValueError("DDIM U-Net: expected no labels, got some; the network is unconditional")
        embedding = self.temb(noise, x.dtype)
        skips = [x := self.conv_in(x)]
        for level in self.down:
            x = level(x, embedding, skips)
        x = self.mid(x, embedding)
        for level in reversed(self.up):
            x = level(x, embedding, skips)
        return self.conv_out(F.silu(self.norm_out(x)))
