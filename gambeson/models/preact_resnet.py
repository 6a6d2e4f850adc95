"""Pre-activation residual networks (He et al. 2016) in the form of the robustness zoo's DeepMind networks.

The names of the weights are the zoo's, so its state dicts (the ResNet-18 entries of Gowal, Rebuffi, Rade and others)
load strictly: see `wideresnet.zoo_state_dict` for their files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import require
from gambeson.models.network import (
    CIFAR_MEAN,
    CIFAR_STD,
    Activation,
    ClassifierNetwork,
    Normalise,
    activate,
    check_activation,
    check_normalisation,
)
from gambeson.randomness import seeded
from gambeson.types import Features, Images

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Depth -> residual blocks of each of the four stages."""


@dataclass(frozen=True, kw_only=True)
class PreActResNetSpec:
    """The architecture of a pre-activation residual network, e.g. PreActResNet-18."""

    depth: Literal[18, 34] = 18  # layers with weights, shortcuts not counted
    width: int = 64  # channels of the first stage; each of the three further ones has twice as many (the zoo has 64)
    activation: Activation = "silu"  # the zoo's networks have silu
    mean: tuple[float, ...] = CIFAR_MEAN  # taken off the pixels in [0, 1]: one for each channel, or one for all
    std: tuple[float, ...] = CIFAR_STD  # then divided by: one for each channel, or one for all

    def __post_init__(self) -> None:
        require(self.depth in BLOCKS, "PreActResNet depth", "18 or 34", self.depth)
        require(self.width >= 1, "PreActResNet width", "at least 1", self.width)
        check_activation("PreActResNet", self.activation)
        check_normalisation("PreActResNet", self.mean, self.std)

    def build(self, channels: int, classes: int, seed: int = 0) -> PreActResNet:
        """The network with weights drawn from the seed (the global generator is left as it was)."""
        with seeded(seed):
            return PreActResNet(self, channels, classes)


class Block(nn.Module):
    """norm, activation, conv, norm, activation, conv, plus the input; a changed shape convolves the input as it came.

    A halving convolution pads below and right only (TensorFlow's 'same'); the shortcut is a 3x3 one like the first.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.halves = stride == 2
        padding = 0 if self.halves else 1
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_2d_1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=padding, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_2d_2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = self.halves or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=padding, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = activate(self.batchnorm_0(x), self.activation)
        skip = x if self.shortcut is None else self.shortcut(self._padded(x))
        h = self.conv_2d_1(self._padded(h))
        return skip + self.conv_2d_2(activate(self.batchnorm_1(h), self.activation))

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1)) if self.halves else x


def _stage(inputs: int, outputs: int, blocks: int, stride: int, activation: Activation) -> nn.Sequential:
    """The blocks of one resolution."""
    first = Block(inputs, outputs, stride, activation)
    return nn.Sequential(first, *(Block(outputs, outputs, 1, activation) for _ in range(blocks - 1)))


class PreActResNet(ClassifierNetwork):
    """Images [B, C, H, W] in [0, 1] -> logits [B, classes]; `features` is the penultimate layer, [B, 8 width]."""

    spec: PreActResNetSpec

    def __init__(self, spec: PreActResNetSpec, channels: int, classes: int) -> None:
        super().__init__()
        self.spec, self.channels, self.classes = spec, channels, classes
        self.normalise = Normalise("PreActResNet", channels, spec.mean, spec.std)
        widths, blocks = [spec.width * m for m in (1, 2, 4, 8)], BLOCKS[spec.depth]
        self.conv_2d = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.layer_0 = _stage(widths[0], widths[0], blocks[0], 1, spec.activation)
        self.layer_1 = _stage(widths[0], widths[1], blocks[1], 2, spec.activation)
        self.layer_2 = _stage(widths[1], widths[2], blocks[2], 2, spec.activation)
        self.layer_3 = _stage(widths[2], widths[3], blocks[3], 2, spec.activation)
        self.batchnorm = nn.BatchNorm2d(widths[3])
        self.logits = nn.Linear(widths[3], classes)

    def features(self, images: Images) -> Features:
        """[B, 8 width] activations before the last layer, averaged over the pixels (4x4 of them for 32x32 images).

        Raises UserError for images of other channels than the network's, or with sides of fewer than 8 pixels, which
        cannot be halved three times.
        """
        least = min(images.shape[2:])
        require(least >= 8, "PreActResNet images", "sides of 8 pixels or more", list(images.shape))
        x = self.conv_2d(self.normalise(images))
        for stage in (self.layer_0, self.layer_1, self.layer_2, self.layer_3):
            x = stage(x)
        return activate(self.batchnorm(x), self.spec.activation).mean(dim=(2, 3))
