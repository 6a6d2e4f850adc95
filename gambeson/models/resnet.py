"""A small pre-activation residual network (He et al. 2016) for images of 8 to 28 pixels, normalisation inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import UserError
from gambeson.models.network import ClassifierNetwork
from gambeson.randomness import seeded
from gambeson.types import Features, Images


@dataclass(frozen=True, kw_only=True)
class ResNetSpec:
    """The architecture of a small residual classifier."""

    width: int = 16  # channels of the first stage
    multipliers: tuple[int, ...] = (1, 2, 4)  # channels of each stage, times width; each further one halves the image
    blocks: int = 1  # residual blocks per stage

    def __post_init__(self) -> None:
        if self.width < 1 or self.blocks < 1 or not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"ResNet: expected width, blocks and multipliers of at least 1, got {self}")

    def build(self, channels: int, classes: int, seed: int = 0) -> SmallResNet:
        """The network with weights drawn from the seed (the global generator is left as it was)."""
        with seeded(seed):
            return SmallResNet(self, channels, classes)


class Block(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input; a changed shape activates both branches."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        skip = x if self.skip is None else self.skip(h)
        return skip + self.conv2(F.silu(self.norm2(self.conv1(h))))


class SmallResNet(ClassifierNetwork):
    """Images [B, C, H, W] in [0, 1] -> logits [B, classes]; `features` is the penultimate layer."""

    spec: ResNetSpec

    def __init__(self, spec: ResNetSpec, channels: int, classes: int) -> None:
        super().__init__()
        self.spec, self.channels, self.classes = spec, channels, classes
        widths = [spec.width * m for m in spec.multipliers]
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(spec.blocks):
                layers.append(Block(before, width, stride=2 if stage and block == 0 else 1))
                before = width
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(before)
        self.head = nn.Linear(before, classes)

    def features(self, images: Images) -> Features:
        """[B, D] activations before the last layer."""
        x = self.layers(self.enter(images * 2 - 1))
        return F.silu(self.norm(x)).mean(dim=(2, 3))

    @property
    def logits(self) -> nn.Linear:  # pyright: ignore[reportIncompatibleVariableOverride] files call this layer `head`
        """The last layer."""
        return self.head

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Pixels are taken to [-1, 1]."""
        return (0.5,), (0.5,)
