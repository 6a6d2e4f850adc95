"""Adversarial weight perturbation: the loss is taken where a small step in the weights has made it worse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from gambeson import distributed
from gambeson.errors import UserError, require
from gambeson.robustness.attack_losses import Network
from gambeson.robustness.inner import untracked
from gambeson.robustness.objectives import MART, SCORE, TRADES, PGDAdversarial
from gambeson.robustness.terms import Targets
from gambeson.types import Images, PerImage


class _Moved(nn.Module):
    """The network with other weights: its own modules, flags and buffers, so that what they do is done to them."""

    def __init__(self, network: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self.weights = weights

    def forward(self, images: Tensor) -> Any:
        """The network's output at the other weights."""
        return functional_call(self.network, self.weights, (images,))


@dataclass(frozen=True, kw_only=True)
class AWP:
    """The inner loss at weights w + v, v = gamma ||w|| g / ||g|| for each tensor (Wu, Xia & Wang 2020).

    x' is found at w; g is the gradient of the batch's mean loss at x', for tensors of 2 or more dimensions; one step,
    as in the authors' code. v is held constant, so gradients of the result land on the parameters as if taken at w + v,
    and nothing has to be put back. Running statistics move in the last pass only. Where a batch is trained in parts,
    each part has its own v; under several processes g is their average. Needs an nn.Module.
    """

    loss: TRADES | PGDAdversarial | MART | SCORE = TRADES()  # the loss that is taken at the perturbed weights
    gamma: float = 0.005  # size of the perturbation, relative to each weight tensor's norm
    warmup: float = 0.0  # share of the training without perturbation

    def __post_init__(self) -> None:
        require(self.gamma > 0, "AWP gamma", "above 0 (0.005 is usual)", self.gamma)
        require(0 <= self.warmup <= 1, "AWP warmup", "a share of the training from 0 to 1", self.warmup)

    def __call__(self, model: Network, images: Images, labels: Targets, generator: Generator | None = None) -> PerImage:
        """[B] losses at the perturbed weights, also during the warm-up (`at` gives the loss of a moment)."""
        return self.value(model, images, self.adversarial(model, images, labels, generator), labels)

    def adversarial(
        self, model: Network, images: Images, labels: Targets, generator: Generator | None = None
    ) -> Images:
        """The inner loss's adversarial images, at the weights as they are."""
        return self.loss.adversarial(model, images, labels, generator)

    def value(self, model: Network, images: Images, adversarial: Images, labels: Targets) -> PerImage:
        """[B] losses of the inner loss at the perturbed weights. UserError for a model that has none to perturb."""
        weights = _weights(model)
        assert isinstance(model, nn.Module)
        with torch.enable_grad(), untracked(model):
            mean = self.loss.value(model, images, adversarial, labels).mean()
            found = torch.autograd.grad(mean, list(weights.values()), allow_unused=True)
        used = {name: g for name, g in zip(weights, found, strict=True) if g is not None}
        distributed.average(used.values())
        moved = {name: weights[name] + self._step(weights[name], g) for name, g in used.items()}
        return self.loss.value(_Moved(model, moved), images, adversarial, labels)

    @torch.no_grad()
    def _step(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """v of one tensor; 0 where the gradient is."""
        return gradient * (self.gamma * weight.norm() / gradient.norm().clamp_min(1e-20))

    def at(self, progress: float) -> AWP | TRADES | PGDAdversarial | MART | SCORE:
        """The loss at a share 0..1 of the training: the bare one until the warm-up is over."""
        require(0 <= progress <= 1, "progress", "a share of the training from 0 to 1", progress)
        return self.loss if progress < self.warmup else self


def _weights(model: Network) -> dict[str, nn.Parameter]:
    """The trained tensors of 2 or more dimensions by name."""
    parameters: Iterator[tuple[str, nn.Parameter]] = iter(())
    if isinstance(model, nn.Module):
        parameters = model.named_parameters()
    weights = {name: p for name, p in parameters if p.requires_grad and p.dim() > 1}
    if not weights:
        raise UserError(
            f"AWP: expected an nn.Module with weights that train, got {type(model).__name__} without any; "
            "use the inner loss alone"
        )
    return weights
