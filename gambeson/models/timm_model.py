"""Any image model of the timm library, by its name, as a classifier of images in [0, 1].

Needs `pip install gambeson[timm]`: timm and the torchvision that was built for this machine's torch.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gambeson.errors import EnvironmentFault, UserError, nearest, require
from gambeson.models.network import ClassifierNetwork, Normalise, check_normalisation
from gambeson.randomness import seeded
from gambeson.types import Features, Images, Logits

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's red, green and blue, pixels in [0, 1]: what most pretrained models take off."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their standard deviations, what most pretrained models divide by."""

_OURS = ("num_classes", "in_chans", "pretrained", "checkpoint_path")


def library() -> Any:
    """The timm package. UserError saying what to do where it is missing, or torchvision does not fit this torch."""
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"networks of timm: expected the timm library with a torchvision built for torch {torch.__version__}, got "
            f"{type(error).__name__}: {error}; pip install gambeson[timm], and torchvision from where torch came from "
            "(for a torch without CUDA: --index-url https://download.pytorch.org/whl/cpu)"
        ) from error
    return timm


@dataclass(frozen=True, kw_only=True)
class TimmSpec:
    """A model of the timm library, described by its name there."""

    name: str = "resnet18"  # as timm.list_models() has it; `NAME.TAG` chooses among pretrained weights
    pretrained: bool = False  # starts from weights that timm downloads, with a new last layer
    options: str = "{}"  # more arguments of timm.create_model as a JSON object, such as {"img_size": 32}
    mean: tuple[float, ...] = IMAGENET_MEAN  # taken off the pixels in [0, 1]: one for each channel, or one for all
    std: tuple[float, ...] = IMAGENET_STD  # then divided by: one for each channel, or one for all

    def __post_init__(self) -> None:
        require(bool(self.name), "TimmNetwork name", "a name such as resnet18", self.name)
        check_normalisation("TimmNetwork", self.mean, self.std)
        taken = [name for name in _OURS if name in self.arguments]
        require(not taken, "TimmNetwork options", f"none of {', '.join(_OURS)}, which are set elsewhere", taken)

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as a dict. UserError where they are no JSON object."""
        try:
            return dict(json.loads(self.options).items())
        except (ValueError, AttributeError):
            raise UserError(
                f'TimmNetwork options: expected a JSON object like {{"img_size": 32}}, got {self.options!r}'
            ) from None

    def build(self, channels: int, classes: int, seed: int = 0) -> TimmNetwork:
        """The network with weights drawn from the seed (the global generator is left as it was), or pretrained ones.

        Nothing is downloaded on the meta device. Raises UserError for what timm does not have, EnvironmentFault where
        pretrained weights cannot be had.
        """
        with seeded(seed):
            return TimmNetwork(self, channels, classes)


class TimmNetwork(ClassifierNetwork):
    """Images [B, C, H, W] in [0, 1] -> logits [B, classes]; `features` is what timm calls the pre-logits, [B, D].

    Raises UserError for a model whose logits are not its last layer of these features (those distilled with two heads,
    for example): `features` would not be what it decides by.
    """

    spec: TimmSpec

    def __init__(self, spec: TimmSpec, channels: int, classes: int) -> None:
        super().__init__()
        self.spec, self.channels, self.classes = spec, channels, classes
        self.normalise = Normalise("TimmNetwork", channels, spec.mean, spec.std)
        self.net = _create(spec, channels, classes)
        self.size = _fixed_size(self.net, spec)
        self._check()

    @property
    def logits(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride] timm's models name it
        """The last layer."""
        layer = _last_layer(self.net)
        return Pointwise(layer) if isinstance(layer, nn.Conv2d) else layer

    def features(self, images: Images) -> Features:
        """[B, D] activations before the last layer.

        Raises UserError for images of other channels than the network's, or of another size than a network takes that
        is made for one.
        """
        x = self.normalise(images)
        if self.size is not None:
            require(
                tuple(images.shape[2:]) == self.size,
                f"timm {self.spec.name}, images",
                f'{self.size[0]}x{self.size[1]} pixels; for others give options such as {{"img_size": 32}}',
                list(images.shape),
            )
        return self._before_logits(x)

    def _before_logits(self, x: Tensor) -> Tensor:
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)

    @torch.no_grad()
    def _check(self) -> None:
        """UserError unless the last layer of the features gives timm's own logits (weights on meta: of this shape)."""
        layer = _last_layer(self.net)
        single = isinstance(layer, nn.Module) and not isinstance(layer, nn.Identity)
        require(single, f"timm {self.spec.name}", "a model with one last layer, for `features`", type(layer).__name__)
        height, width = self.size or self.net.pretrained_cfg["input_size"][1:]
        ramp = torch.arange(self.channels * height * width, dtype=torch.float32) % 251 / 125 - 1
        image, training = ramp.reshape(1, self.channels, height, width), self.net.training
        self.net.eval()
        own, features = self.net(image), self._before_logits(image)
        fits = features.dim() == 2 and own.shape == (1, self.classes)
        if fits and not own.is_meta:
            fits = torch.allclose(self.logits(features), own, rtol=1e-4, atol=1e-5)
        self.net.train(training)
        require(fits, f"timm {self.spec.name}", "logits that are its last layer of its pre-logits", "others")


class Pointwise(nn.Module):
    """A 1x1 convolution as a layer of features: [B, D] -> [B, classes]."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Features) -> Logits:
        return self.layer(features[:, :, None, None]).flatten(1)


def _last_layer(net: Any) -> Any:
    """timm's classifier: a module, or several of them for a model with more than one head."""
    return net.get_classifier()


def _fixed_size(net: Any, spec: TimmSpec) -> tuple[int, int] | None:
    """(height, width) of the images that the model is made for; None for one that takes any."""
    arguments = spec.arguments
    if not net.pretrained_cfg.get("fixed_input_size") or arguments.get("dynamic_img_size"):
        return None
    size = arguments.get("img_size", net.pretrained_cfg["input_size"][1:])
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _create(spec: TimmSpec, channels: int, classes: int) -> Any:
    """timm's model with a new last layer."""
    timm, arguments = library(), spec.arguments
    if not timm.is_model(spec.name):
        near = ", ".join(nearest(spec.name, timm.list_models())[:5])
        raise UserError(f"networks of timm: expected one of timm.list_models(), nearest {near}; got {spec.name!r}")
    pretrained = spec.pretrained and torch.empty(0).device.type != "meta"
    with _explained(spec):
        return timm.create_model(spec.name, pretrained=pretrained, num_classes=classes, in_chans=channels, **arguments)


@contextmanager
def _explained(spec: TimmSpec) -> Iterator[None]:
    """timm's errors in our words."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"timm {spec.name}: expected to download its pretrained weights, got {error}; check the connection, or "
            "start without them (pretrained: false)"
        ) from error
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"timm {spec.name}: expected options and a tag that this model knows, got {spec.options} ({error})"
        ) from error
