"""Wide residual networks (Zagoruyko & Komodakis 2016) in the form of the robustness zoo's DeepMind networks.

Pre-activation blocks, SiLU or ReLU, normalisation of the pixels inside. The names of the weights are the zoo's, so its
state dicts (RobustBench's WRN-28-10, WRN-34-20, WRN-70-16 of Gowal, Rebuffi, Rade, Wang and others) load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from gambeson.models.shapes import check_sides
from gambeson.randomness import seeded
from gambeson.types import Features, Images

_WRAPPERS = ("model_state_dict", "state_dict", "model")
_PREFIXES = ("module.", "model.", "0.", "1.")


@dataclass(frozen=True, kw_only=True)
class WideResNetSpec:
    """The architecture of a wide residual network, e.g. WRN-28-10."""

    depth: int = 28  # layers with weights: 4 more than a multiple of 6
    width: int = 10  # the three stages have 16, 32 and 64 channels times this
    activation: Activation = "silu"  # the zoo's networks have silu
    mean: tuple[float, ...] = CIFAR_MEAN  # taken off the pixels in [0, 1]: one for each channel, or one for all
    std: tuple[float, ...] = CIFAR_STD  # then divided by: one for each channel, or one for all

    def __post_init__(self) -> None:
        require(self.depth >= 10 and self.depth % 6 == 4, "WideResNet depth", "10, 16, 22, 28, ...", self.depth)
        require(self.width >= 1, "WideResNet width", "at least 1", self.width)
        check_activation("WideResNet", self.activation)
        check_normalisation("WideResNet", self.mean, self.std)

    def build(self, channels: int, classes: int, seed: int = 0) -> WideResNet:
        """The network with weights drawn from the seed (the global generator is left as it was)."""
        return WideResNet(
            self.depth,
            self.width,
            classes,
            self.activation,
            channels=channels,
            mean=self.mean,
            std=self.std,
            seed=seed,
        )


class Block(nn.Module):
    """norm, activation, conv, norm, activation, conv, plus the input; a changed width convolves the activated input.

    A halving convolution pads below and right only (TensorFlow's 'same'), as the zoo's weights were trained.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.halves = stride == 2
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=0 if self.halves else 1, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = activate(self.batchnorm_0(x), self.activation)
        skip = x if self.shortcut is None else self.shortcut(h)
        h = self.conv_0(F.pad(h, (0, 1, 0, 1)) if self.halves else h)
        return skip + self.conv_1(activate(self.batchnorm_1(h), self.activation))


class Group(nn.Module):
    """The blocks of one resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, blocks: int, activation: Activation) -> None:
        super().__init__()
        first = Block(inputs, outputs, stride, activation)
        self.block = nn.Sequential(first, *(Block(outputs, outputs, 1, activation) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class WideResNet(ClassifierNetwork):
    """Images [B, C, H, W] in [0, 1] -> logits [B, classes]; `features` is the penultimate layer, [B, 64 width].

    Raises UserError for a depth, width or activation that there is not, and for a mean or std that fits neither one
    nor all of the channels. The weights are drawn from the seed; the global generator is left as it was.
    """

    spec: WideResNetSpec

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        classes: int = 10,
        activation: Activation = "silu",
        *,
        channels: int = 3,
        mean: tuple[float, ...] = CIFAR_MEAN,
        std: tuple[float, ...] = CIFAR_STD,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.spec = WideResNetSpec(depth=depth, width=width, activation=activation, mean=mean, std=std)
        self.channels, self.classes = channels, classes
        self.normalise = Normalise("WideResNet", channels, mean, std)
        with seeded(seed):
            self._add_layers()

    def _add_layers(self) -> None:
        spec, blocks = self.spec, (self.spec.depth - 4) // 6
        widths = [16, 16 * spec.width, 32 * spec.width, 64 * spec.width]
        self.init_conv = nn.Conv2d(self.channels, widths[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            *(Group(widths[i], widths[i + 1], (1, 2, 2)[i], blocks, spec.activation) for i in range(3))
        )
        self.batchnorm = nn.BatchNorm2d(widths[-1])
        self.logits = nn.Linear(widths[-1], self.classes)

    def features(self, images: Images) -> Features:
        """[B, 64 width] activations before the last layer, averaged over the pixels (8x8 of them for 32x32 images).

        Raises ValueError for images of other channels than the network's, or with sides that cannot be halved twice.
        """
        check_sides("WideResNet", 3, (images.shape[1], images.shape[2], images.shape[3]))
        x = self.layer(self.init_conv(self.normalise(images)))
        return activate(self.batchnorm(x), self.spec.activation).mean(dim=(2, 3))


def zoo_state_dict(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The bare weights in a file of the zoo: wrappers opened, and prefixes that every name has cut off.

    Wrappers: model_state_dict (the averaged weights, where there are unaveraged ones beside them), state_dict, model.
    Prefixes: what DataParallel (module.), Sequential (0., or 1. after a normalisation) and a holder (model.) put
    before a name. What does not fit is left for strict loading (models.files.load_weights) to name.
    Raises ValueError where something else than tensors is left.
    """
    for wrapper in _WRAPPERS:
        if isinstance(tensors.get(wrapper), Mapping):
            return zoo_state_dict(tensors[wrapper])
    other = sorted(name for name, value in tensors.items() if not isinstance(value, Tensor))
    if other or not tensors:
        raise ValueError(
            f"zoo weights: expected named tensors, or one of {', '.join(_WRAPPERS)} with them inside, got "
            f"{f'other things under {other}' if other else 'nothing'}. Give the part of the file that holds the weights"
        )
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return zoo_state_dict({name.removeprefix(prefix): value for name, value in tensors.items()})
    return dict(tensors)
