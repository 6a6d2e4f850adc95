"""minimal-diffusion's class-conditional U-Net: that of Dhariwal and Nichol 2021 (ADM) in its UNet and UNetSmall sizes.

Predicts eps under the cosine schedule; parameter names are those of the published files. Written from the paper and
the layout of the files; dropout, which only training needs, is left out.
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
class ADMUNetSpec:
    """The architecture; the defaults are minimal-diffusion's UNet, `small()` is its UNetSmall."""

    width: int = 64  # channels at full resolution, times the first multiplier
    multipliers: tuple[int, ...] = (1, 2, 2, 2)  # channels at each resolution, times width
    blocks: int = 3  # residual blocks per resolution on the way down; one more on the way up
    attention: tuple[int, ...] = (0, 1, 2)  # resolutions with self-attention after each block; 0 is full resolution
    embedding: int = 4  # width of the time embedding, times width
    head_width: int = 64  # channels of an attention head, which no shape in the file tells

    def __post_init__(self) -> None:
        name = "ADM U-Net"
        require(self.width > 0 and self.width % GROUPS == 0, f"{name}, width", "a multiple of 32", self.width)
        check_levels(name, self.multipliers, self.blocks, self.attention)
        require(self.embedding >= 1, f"{name}, embedding", "at least 1", self.embedding)
        seen = [self.multipliers[i] * self.width for i in self.attention] + [self.multipliers[-1] * self.width]
        fits = self.head_width >= 1 and not any(c % self.head_width for c in seen)
        require(fits, f"{name}, head width", f"a divisor of the attended widths {seen}", self.head_width)

    @classmethod
    def small(cls, width: int = 32) -> ADMUNetSpec:
        """minimal-diffusion's UNetSmall."""
        return cls(width=width, blocks=2, embedding=2, head_width=32)

    @classmethod
    def read(cls, tensors: Tensors) -> tuple[ADMUNetSpec, int, int]:
        """(spec, image channels, classes) of a file's weights; UserError where they are not such a network's.

        Everything but the heads is told by names and shapes; UNet (embedding 4) has heads of 64 channels, UNetSmall
        (embedding 2) of 32. Other networks of the family (OpenAI's guided-diffusion) may share the names: with other
        heads, qkv order or schedule they cannot be told apart and would denoise wrongly.
        """
        embedding, width = shape_of(tensors, "time_embed.0.weight")
        first, channels, *_ = shape_of(tensors, "input_blocks.0.0.weight")
        leaving = shape_of(tensors, "out.2.weight")[0]
        require(leaving == channels, "ADM U-Net, out.2.weight", f"{channels} channels (no learned variance)", leaving)
        outputs = numbered(tensors, "output_blocks.{}.")
        levels = 1 + sum(f"output_blocks.{i}.{j}.in_layers.0.weight" in tensors for i in range(outputs) for j in (1, 2))
        stride = outputs // levels  # blocks of a resolution plus one: the halving or the first convolution
        starts = [1 + level * stride for level in range(levels)]
        widths = [shape_of(tensors, f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in starts]
        heads = {4: 64, 2: 32}
        require(embedding // width in heads, "ADM U-Net, time_embed.0.weight", "2 or 4 times the width", embedding)
        spec = cls(
            width=width,
            multipliers=tuple(w // width for w in widths),
            blocks=stride - 1,
            attention=tuple(n for n, i in enumerate(starts) if f"input_blocks.{i}.1.qkv.weight" in tensors),
            embedding=embedding // width,
            head_width=heads[embedding // width],
        )
        classes = shape_of(tensors, "label_emb.weight")[0] if "label_emb.weight" in tensors else 0
        require(first == widths[0], "ADM U-Net, input_blocks.0.0.weight", f"{widths[0]} rows", first)
        return spec, channels, classes

    @property
    def side(self) -> int | None:
        """The side of the images where minimal-diffusion's own sizes (UNet, UNetSmall of any width) tell it; else None.

        Its multipliers go by the side, with self-attention at 32, 16 and 8 pixels.
        """
        made = {((1, 2, 2, 2), (0, 1, 2)): 32, ((1, 2, 3, 4), (1, 2, 3)): 64, ((1, 1, 2, 3, 4), (2, 3, 4)): 128}
        sizes = ((3, 4, 64), (2, 2, 32))
        fits = (self.blocks, self.embedding, self.head_width) in sizes
        return made.get((self.multipliers, self.attention)) if fits else None

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError where images of (channels, height, width) cannot be halved at every resolution."""
        check_sides("ADM U-Net", len(self.multipliers), shape)

    def build(self, channels: int, classes: int, seed: int = 0) -> ADMUNet:
        """The network with weights drawn from the seed; classes 0: unconditional."""
        with seeded(seed):
            return ADMUNet(self, channels, classes)


class Residual(nn.Module):
    """norm, SiLU, (resample,) conv, norm, scale and shift by the embedding, SiLU, conv, plus the (resampled) input."""

    def __init__(self, inputs: int, outputs: int, embedding: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outputs))
        self.out_layers = nn.Sequential(  # the identity keeps dropout's number in the names
            nn.GroupNorm(GROUPS, outputs), nn.SiLU(), nn.Identity(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def resample(self, x: Tensor) -> Tensor:
        """The image at half, the same or twice the resolution."""
        if self.scale == 1:
            return x
        return F.avg_pool2d(x, 2) if self.scale < 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:](torch.addcmul(shift, self.out_layers[0](h), 1 + scale))
        return self.skip_connection(self.resample(x)) + h


class Attention(nn.Module):
    """Self-attention over the pixels, plus the input; q, k and v are split first, then each into heads."""

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        self.heads = channels // head_width
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x.flatten(2))).chunk(3, dim=1)
        q, k, v = (p.unflatten(1, (self.heads, -1)).mT for p in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)
        return x + self.proj_out(mixed).reshape(x.shape)


class Layers(nn.ModuleList):
    """Blocks and attention one after the other, each told the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding)
        return x


class ADMUNet(nn.Module):
    """(x [B, C, H, W], noise [B] = index t of the table, labels [B] or None) -> eps [B, C, H, W].

    Labels are 0 to classes - 1 where classes > 0 (there is no null class), None where classes = 0.
    """

    def __init__(self, spec: ADMUNetSpec, channels: int, classes: int) -> None:
        super().__init__()
        self.spec, self.channels, self.classes = spec, channels, classes
        embedding = spec.width * spec.embedding
        widths = [spec.width * m for m in spec.multipliers]
        self.time_embed = nn.Sequential(nn.Linear(spec.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if classes:
            self.label_emb = nn.Embedding(classes, embedding)
        enter = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1))
        self.input_blocks = nn.ModuleList([enter, *self._inputs(widths, embedding)])
        low = widths[-1]
        middle = (Residual(low, low, embedding), Attention(low, spec.head_width), Residual(low, low, embedding))
        self.middle_block = Layers(middle)
        self.output_blocks = nn.ModuleList(self._outputs(widths, embedding))
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1)
        )

    def _layer(self, level: int, inputs: int, outputs: int, embedding: int) -> Layers:
        """A block and, at the resolutions that have it, attention."""
        layer = Layers([Residual(inputs, outputs, embedding)])
        if level in self.spec.attention:
            layer.append(Attention(outputs, self.spec.head_width))
        return layer

    def _inputs(self, widths: list[int], embedding: int) -> Iterator[Layers]:
        """The way down: blocks of each resolution, then a halving block."""
        current = widths[0]
        for level, width in enumerate(widths):
            for _ in range(self.spec.blocks):
                yield self._layer(level, current, width, embedding)
                current = width
            if level < len(widths) - 1:
                yield Layers([Residual(width, width, embedding, scale=0.5)])

    def _outputs(self, widths: list[int], embedding: int) -> Iterator[Layers]:
        """The way up: each block takes a skip; the last of a resolution is followed by a doubling block."""
        for level, width in reversed(list(enumerate(widths))):
            skips = [width] * self.spec.blocks + [widths[max(level - 1, 0)]]
            currents = [widths[min(level + 1, len(widths) - 1)]] + [width] * self.spec.blocks
            for i, (current, skip) in enumerate(zip(currents, skips, strict=True)):
                layer = self._layer(level, current + skip, width, embedding)
                if level and i == self.spec.blocks:
                    layer.append(Residual(width, width, embedding, scale=2.0))
                yield layer

    def _embedding(self, noise: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        sines, cosines = waves(noise, self.spec.width, dtype, endpoint=False)
        embedding = self.time_embed(torch.cat([cosines, sines], dim=1))
        if (labels is None) == bool(self.classes):
            need = f"labels 0 to {self.classes - 1}" if self.classes else "no labels (it is unconditional)"
            raise ValueError(f"ADM U-Net: expected {need}, got {'none' if labels is None else 'some'}")
        return embedding if labels is None else embedding + self.label_emb(labels)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self._embedding(noise, labels, x.dtype)
        enter, *inputs = self.input_blocks
        skips = [x := enter(x)]
        for layers in inputs:
            skips.append(x := layers(x, embedding))
        x = self.middle_block(x, embedding)
        for layers in self.output_blocks:
            x = layers(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.out(x)
