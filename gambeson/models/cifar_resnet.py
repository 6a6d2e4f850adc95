"""The residual networks of He et al. 2016 (post-activation) as they are used for CIFAR's 32x32 images.

A 3x3 first convolution and no pooling after it. The names of the weights are those that most codes for CIFAR use.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class CifarResNetSpec:
    """The architecture of a residual network for small images; the defaults are ResNet-18."""

    width: int = 64  # channels of the first stage; each of the three further ones has twice as many
    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)  # residual blocks of each stage; 3 4 6 3 is ResNet-34
    activation: Activation = "relu"  # the usual networks have relu
    mean: tuple[float, ...] = CIFAR_MEAN  # taken off the pixels in [0, 1]: one for each channel, or one for all
    std: tuple[float, ...] = CIFAR_STD  # then divided by: one for each channel, or one for all

    def __post_init__(self) -> None:
        require(self.width >= 1, "CifarResNet width", "at least 1", self.width)
        fits = len(self.blocks) == 4 and min(self.blocks) >= 1
        require(fits, "CifarResNet blocks", "four numbers of at least 1", self.blocks)
        check_activation("CifarResNet", self.activation)
        check_normalisation("CifarResNet", self.mean, self.std)

    def build(self, channels: int, classes: int, seed: int = 0) -> CifarResNet:
        """The network with weights drawn from the seed (the global generator is left as it was)."""
        with seeded(seed):
            return CifarResNet(self, channels, classes)


class Block(nn.Module):
    """conv, norm, activation, conv, norm, plus the input, activation; a changed shape has a 1x1 conv and norm there."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(activate(self.bn1(self.conv1(x)), self.activation)))
        return activate(h + self.shortcut(x), self.activation)


def _stage(inputs: int, outputs: int, blocks: int, stride: int, activation: Activation) -> nn.Sequential:
    """The blocks of one resolution."""
    first = Block(inputs, outputs, stride, activation)
    return nn.Sequential(first, *(Block(outputs, outputs, 1, activation) for _ in range(blocks - 1)))


class CifarResNet(ClassifierNetwork):
    """Images [B, C, H, W] in [0, 1] -> logits [B, classes]; `features` is the penultimate layer, [B, 8 width]."""

    spec: CifarResNetSpec

    def __init__(self, spec: CifarResNetSpec, channels: int, classes: int) -> None:
        super().__init__()
        self.spec, self.channels, self.classes = spec, channels, classes
        self.normalise = Normalise("CifarResNet", channels, spec.mean, spec.std)
        widths = [spec.width * m for m in (1, 2, 4, 8)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], spec.blocks[0], 1, spec.activation)
        self.layer2 = _stage(widths[0], widths[1], spec.blocks[1], 2, spec.activation)
        self.layer3 = _stage(widths[1], widths[2], spec.blocks[2], 2, spec.activation)
        self.layer4 = _stage(widths[2], widths[3], spec.blocks[3], 2, spec.activation)
        self.linear = nn.Linear(widths[3], classes)

    @property
    def logits(self) -> nn.Linear:  # pyright: ignore[reportIncompatibleVariableOverride] files call it `linear`
        """The last layer."""
        return self.linear

    def features(self, images: Images) -> Features:
        """[B, 8 width] activations before the last layer, averaged over the pixels (4x4 of them for 32x32 images).

        Raises UserError for images of other channels than the network's.
        """
        x = activate(self.bn1(self.conv1(self.normalise(images))), self.spec.activation)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean(dim=(2, 3))
