"""What the encoder sees of a step, in which coordinate the gradient is taken, and features with their way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gambeson.types import Encoder, Step


@runtime_checkable
class FeatureView(Protocol):
    """Which coordinate of a step the gradient is taken in (METHOD 1.3), and how the encoder is called there."""

    def variable(self, step: Step) -> Tensor:
        """The coordinate, [B, ...]."""
        ...

    def encode(self, encoder: Encoder, variable: Tensor, sigma: float) -> Any:
        """[B, D] features at that coordinate and noise level, differentiable in it."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoisyFeatures:
    """The encoder sees the noisy state x / sqrt(1 + sigma^2), in [-1, 1] scale, as in CDP's code."""

    def variable(self, step: Step) -> Tensor:
        """The state in VP coordinates, [B, ...]."""
        return step.x / math.sqrt(1 + step.sigma**2)

    def encode(self, encoder: Encoder, variable: Tensor, sigma: float) -> Any:
        """The encoder of the state as it is."""
        return encoder(variable)


@dataclass(frozen=True, kw_only=True)
class DenoisedFeatures:
    """The encoder sees the denoiser's x0-hat mapped to [0, 1]; the denoiser's Jacobian is left out."""

    def variable(self, step: Step) -> Tensor:
        """x0-hat before guidance and clamp, [B, ...]."""
        return step.raw

    def encode(self, encoder: Encoder, variable: Tensor, sigma: float) -> Any:
        """The encoder of [-1, 1] -> [0, 1]."""
        return encoder((variable + 1) / 2)


@dataclass(frozen=True, kw_only=True)
class NoiseConditionedFeatures:
    """The encoder sees the noisy state x / sqrt(1 + sigma^2) and is told sigma: it was trained on such images."""

    def variable(self, step: Step) -> Tensor:
        """The state in VP coordinates, [B, ...]."""
        return step.x / math.sqrt(1 + step.sigma**2)

    def encode(self, encoder: Encoder, variable: Tensor, sigma: float) -> Any:
        """The encoder of state and noise level."""
        return encoder(variable, sigma)


View = NoisyFeatures | DenoisedFeatures | NoiseConditionedFeatures
"""The views that a recipe can name."""


def clean(images: Tensor) -> Tensor:
    """Real images in [0, 1] in the coordinate of every view: at sigma 0 the state and x0-hat are the image itself."""
    return 2 * images - 1


def checked(features: Any, images: Tensor) -> Tensor:
    """The features. ValueError unless they are a [B, D] tensor with a row for each image."""
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
        came = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise ValueError(
            f"encoder: expected features [B, D] with a row for each of the {len(images)} images of shape "
            f"{tuple(images.shape[1:])}, got {came}; pass a classifier's `features` for images of this size, or pool "
            "and flatten what your network returns"
        )
    return features


def without_graph(encode: Callable[[Tensor], Tensor], variable: Tensor, micro_batch: int | None) -> Tensor:
    """[B, D] features, `micro_batch` images at a time."""
    with torch.no_grad():
        return torch.cat([encode(piece) for piece in variable.split(micro_batch or len(variable))])


def with_pullback(
    encode: Callable[[Tensor], Tensor], variable: Tensor, micro_batch: int | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features [B, D], detached, and the map from a gradient with respect to them to one with respect to `variable`.

    With micro_batch smaller than B the encoder keeps the graph of that many images only and runs once more on the way
    back (GradCache, Gao et al. 2021): the loss still sees the whole block.
    """
    variable = variable.detach()
    if micro_batch is None or micro_batch >= len(variable):
        features, back = _graph(encode, variable)
        return features, back

    def in_pieces(gradient: Tensor) -> Tensor:
        pairs = zip(variable.split(micro_batch), gradient.split(micro_batch), strict=True)
        return torch.cat([_graph(encode, piece)[1](own) for piece, own in pairs])

    return without_graph(encode, variable, micro_batch), in_pieces


def _graph(encode: Callable[[Tensor], Tensor], variable: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    leaf = variable.detach().requires_grad_()
    with torch.enable_grad():
        features = encode(leaf)
    if not features.requires_grad:
        raise ValueError(
            "encoder: expected features that depend differentiably on the image, got a constant; call the encoder "
            "without torch.no_grad() or detach()"
        )
    return features.detach(), lambda gradient: torch.autograd.grad(features, leaf, gradient)[0]


def _owner(network: Encoder) -> nn.Module | None:
    """The network itself, or the one whose method (`classifier.features`) is given; None for a plain function."""
    owner = network.__self__ if isinstance(network, MethodType) else network
    return owner if isinstance(owner, nn.Module) else None


def trial(network: Encoder, shape: tuple[int, ...], device: str | torch.device) -> Tensor:
    """[2, *shape] zeros in the dtype of the network's parameters, to try it on."""
    owner = _owner(network)
    parameter = None if owner is None else next(owner.parameters(), None)
    return torch.zeros(2, *shape, device=device, dtype=None if parameter is None else parameter.dtype)


def check_eval(network: Encoder, role: str) -> None:
    """ValueError for a network in train mode, also where one of its methods is given."""
    owner = _owner(network)
    if owner is not None and owner.training:
        raise ValueError(
            f"{role}: expected a network in eval mode, got one in train mode, whose output depends on the batch and on "
            "every batch before; call .eval()"
        )
