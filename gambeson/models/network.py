"""What every classifier of clean images is: images in [0, 1] -> features -> logits, the normalisation inside.

Also its pixels' normalisation, its activations, and how it is kept in a folder as the hub's libraries do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import UserError, require
from gambeson.types import Features, Images, Logits

Activation = Literal["silu", "relu"]
Network = TypeVar("Network", bound="ClassifierNetwork")

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
"""Mean of CIFAR-10's red, green and blue, pixels in [0, 1]: what the zoo's networks take off."""
CIFAR_STD = (0.2471, 0.2435, 0.2616)
"""Their standard deviations, what the zoo's networks divide by."""


@runtime_checkable
class ClassifierSpec(Protocol):
    """The architecture of a classifier: a frozen dataclass of plain numbers that builds the network."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, channels: int, classes: int, seed: int = 0) -> ClassifierNetwork: ...


class ClassifierNetwork(nn.Module, ABC):
    """Images [B, C, H, W] in [0, 1] -> logits [B, classes]; `logits(features(images))` on every network.

    `spec` describes the architecture: spec.build(channels, classes) is this network with new weights. `logits` is the
    last layer, [B, D] -> [B, classes], whatever its name among the weights is.
    """

    spec: Any
    channels: int
    classes: int
    logits: nn.Module

    @abstractmethod
    def features(self, images: Images) -> Features:
        """[B, D] activations before the last layer."""

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What the network takes off the pixels in [0, 1], and then divides them by."""
        return self.spec.mean, self.spec.std

    def forward(self, images: Images) -> Logits:
        return self.logits(self.features(images))

    def save_pretrained(self, folder: str | Path, **card: Any) -> None:
        """Writes weights, config.json and a model card into a new folder: see `gambeson.models.hub.save_pretrained`."""
        from gambeson.models.hub import save_pretrained

        save_pretrained(self, folder, **card)

    @classmethod
    def from_pretrained(cls: type[Network], place: str | Path, revision: str | None = None) -> Network:
        """The network of a folder or a hub id (org/name), frozen, in eval mode.

        Raises UserError, naming both, for a network of another architecture (the base class takes any); otherwise as
        `gambeson.models.hub.from_pretrained` does.
        """
        from gambeson.models.hub import from_pretrained

        model = from_pretrained(place, revision)
        if not isinstance(model, cls):
            raise UserError(
                f"{place}: expected the weights of a {cls.__name__}, got those of a {type(model).__name__} "
                f"({model.spec}); call {type(model).__name__}.from_pretrained, or ClassifierNetwork.from_pretrained, "
                "which takes any architecture"
            )
        return model


class Normalise(nn.Module):
    """Pixels in [0, 1] minus a mean, over a standard deviation; one of each for every channel, or one for all.

    Neither is in the state dict, as in the zoo's files: they belong to the architecture. Raises UserError for a mean
    that fits neither one nor all channels, and for images of other channels. `name` is the network's, for the errors.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        require(len(mean) in (1, channels), f"{name} mean", f"1 or {channels} values (the channels)", mean)
        self.name, self.channels = name, channels
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Images) -> Images:
        expected = f"[B, {self.channels}, H, W]"
        require(images.shape[1] == self.channels, f"{self.name} images", expected, list(images.shape))
        return (images - self.mean) / self.std


def check_normalisation(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """UserError unless there are as many deviations as means, all above 0."""
    require(len(mean) == len(std), f"{name} std", f"{len(mean)} values, as mean has", std)
    require(all(s > 0 for s in std), f"{name} std", "values above 0", std)


def check_activation(name: str, activation: str) -> None:
    """UserError for an activation that there is not."""
    require(activation in ("silu", "relu"), f"{name} activation", "'silu' or 'relu'", activation)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """SiLU (x sigmoid(x)) or ReLU of every number."""
    return F.silu(x) if activation == "silu" else F.relu(x)
