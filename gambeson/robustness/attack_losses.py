"""What attacks climb: one number per image from its logits, the slope at a point, and a network held still."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from gambeson.threat import ThreatModel
from gambeson.types import Images, Labels, Logits, PerImage

Network = Callable[[Tensor], Tensor]
"""Images in [0, 1] -> logits; usually an nn.Module, any callable will do."""
Verdicts = Bool[Tensor, " b"]
"""[B] True where the image is still classified as its label."""


@runtime_checkable
class HasThreat(Protocol):
    """Anything that carries a threat model, or None while the caller has not put one in."""

    @property
    def threat(self) -> ThreatModel | None: ...


def threat_of(component: HasThreat) -> ThreatModel:
    """The component's threat model; ValueError if none has been put in."""
    if component.threat is None:
        name = type(component).__name__
        raise ValueError(
            f"{name}: expected a threat model, got None; use {name}(threat=ThreatModel(...)) or "
            "dataclasses.replace(component, threat=...)"
        )
    return component.threat


@contextmanager
def frozen(model: Network) -> Iterator[None]:
    """Inside, an nn.Module is in eval mode and its parameters ask for no gradient; every flag is put back after."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    try:
        for module in modules:
            module.training = False
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def true_float32() -> Iterator[None]:
    """Inside, products on a GPU keep float32's 24 bits (torch's default cuts those of convolutions to TF32's 11)."""
    backends: Any = torch.backends
    places = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


@runtime_checkable
class AttackLoss(Protocol):
    """Logits [B, K], labels [B] and a target class [B] -> [B], one number per image, to be made large."""

    def __call__(self, logits: Tensor, labels: Tensor, target: Tensor) -> Tensor: ...


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    """[B] the logit of one class per image."""
    return logits.gather(1, classes[:, None]).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """-log p_y: logits [B, K], labels [B] -> [B]. Its float32 gradient vanishes on very confident networks."""

    def __call__(self, logits: Logits, labels: Labels, target: Labels | None = None) -> PerImage:
        return F.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Margin:
    """max_{j != y} z_j - z_y (Carlini & Wagner 2017): logits [B, K], labels [B] -> [B]; above 0 means fooled."""

    def __call__(self, logits: Logits, labels: Labels, target: Labels | None = None) -> PerImage:
        others = logits.scatter(1, labels[:, None], -math.inf)
        return others.amax(1) - _pick(logits, labels)


@dataclass(frozen=True, kw_only=True)
class DLR:
    """Difference of logits ratio, -(z_y - max_{j != y} z_j) / (z_(1) - z_(3)) (Croce & Hein 2020, eq. 6).

    logits [B, K], labels [B] -> [B]. It does not change when the logits are shifted or scaled. With 2 classes there is
    no third logit and the margin stands in.
    """

    def __call__(self, logits: Logits, labels: Labels, target: Labels | None = None) -> PerImage:
        margin = Margin()(logits, labels)
        if logits.shape[1] < 3:
            return margin
        top = logits.topk(3, dim=1).values
        return margin / (top[:, 0] - top[:, 2] + 1e-12)


@dataclass(frozen=True, kw_only=True)
class TargetedDLR:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) (Croce & Hein 2020, eq. 7).

    logits [B, K], labels [B], target classes [B] -> [B]. With fewer than 4 classes the targeted margin
    z_t - z_y stands in.
    """

    def __call__(self, logits: Logits, labels: Labels, target: Labels) -> PerImage:
        margin = _pick(logits, target) - _pick(logits, labels)
        if logits.shape[1] < 4:
            return margin
        top = logits.topk(4, dim=1).values
        return margin / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


class NoGradient(ValueError):
    """The network's output does not depend on its input in a way that autograd can follow."""


def loss_and_gradient(
    model: Network, loss: AttackLoss, x: Images, labels: Labels, target: Labels
) -> tuple[PerImage, Images, Verdicts]:
    """At each point x: its loss [B], the gradient with respect to x [B, C, H, W], and whether it is classified right.

    Raises NoGradient (a ValueError) if the network is not differentiable with respect to its input.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        value = loss(logits, labels, target)
        found = torch.autograd.grad(value.sum(), x, allow_unused=True) if value.requires_grad else (None,)
    if found[0] is None:
        raise NoGradient(
            "attack: expected logits that depend on the images through autograd, got none. Usually the network "
            "detaches, rounds through numpy or runs under no_grad; give the attack the differentiable network"
        )
    return value.detach(), found[0], logits.detach().argmax(1) == labels
