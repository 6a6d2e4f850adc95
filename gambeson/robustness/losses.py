"""What attacks climb and what training descends: one number per image, and the ball it is taken in.

The training losses (TRADES, PGD-AT, plain) run their inner attack on a frozen copy of the flags: eval mode, so that
batch-norm statistics stay clean, and no parameter gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Generator, Tensor, nn

from gambeson.errors import require
from gambeson.randomness import or_fresh
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


def _start(threat: ThreatModel, images: Tensor, generator: Generator | None) -> Tensor:
    """A random point of each ball; the draws are made where the generator lives."""
    given = or_fresh(generator, images.device)
    return threat.random(images, torch.rand(images.shape, generator=given, device=given.device, dtype=images.dtype))


def ascend(
    model: Network,
    images: Images,
    start: Images,
    slope: Callable[[Tensor], Tensor],
    threat: ThreatModel,
    steps: int,
    step_size: float,
) -> Iterator[Images]:
    """The inner attack: yields the adversarial images after each step, projected to the ball around `images`.

    slope: logits [B, K] -> gradient of the climbed objective with respect to them, [B, K]. step_size in pixels.
    The model is frozen during each step and as it was when a point is yielded.
    """
    x = start
    for _ in range(steps):
        with frozen(model), torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = model(x)
            (gradient,) = torch.autograd.grad(logits, x, slope(logits.detach()).to(logits.dtype))
        x = threat.project(x.detach() + step_size * threat.steepest(gradient), images)
        yield x


def _check_inner(loss: TRADES | PGDAdversarial) -> None:
    """The fields that TRADES and PGD-AT share."""
    name = type(loss).__name__
    require(loss.steps >= 1, f"{name} steps", "at least 1", loss.steps)
    require(loss.step_size > 0, f"{name} step_size", "above 0, in pixels", loss.step_size)
    _check_smoothing(name, loss.label_smoothing)


def _check_smoothing(name: str, label_smoothing: float) -> None:
    require(0 <= label_smoothing < 1, f"{name} label_smoothing", "from 0 to below 1", label_smoothing)


def kl_divergence(p: Logits, q: Logits) -> PerImage:
    """KL(softmax(p) || softmax(q)) of each image: logits [B, K] twice -> [B], in nats."""
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@dataclass(frozen=True, kw_only=True)
class TRADES:
    """CE(f(x), y) + beta KL(f(x) || f(x')), x' the point of the ball that climbs the KL (Zhang et al. 2019, eq. 5)."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    beta: float = 6.0  # weight of the robust term
    steps: int = 10  # steps of the inner attack
    step_size: float = 2 / 255  # of the inner attack, in pixels
    label_smoothing: float = 0.0  # share of the label spread over all classes

    def __post_init__(self) -> None:
        _check_inner(self)
        require(self.beta >= 0, "TRADES beta", "0 or more", self.beta)

    def __call__(self, model: Network, images: Images, labels: Labels, generator: Generator | None = None) -> PerImage:
        """[B] losses. The inner attack starts at a random point drawn from `generator` (None: a fresh one seeded 0).

        Clean and adversarial images then pass in one forward call in the model's own mode, so in training mode the
        batch-norm statistics are those of both together.
        """
        *_, adversarial = self.attack(model, images, _start(threat_of(self), images, generator))
        clean, moved = model(torch.cat([images, adversarial])).chunk(2)
        ce = F.cross_entropy(clean, labels, reduction="none", label_smoothing=self.label_smoothing)
        return ce + self.beta * kl_divergence(clean, moved)

    def attack(self, model: Network, images: Images, start: Images) -> Iterator[Images]:
        """The inner attack's points after each step; the clean probabilities p are held constant."""
        with frozen(model), torch.no_grad():
            p = model(images).softmax(1)
        return ascend(model, images, start, lambda z: z.softmax(1) - p, threat_of(self), self.steps, self.step_size)


@dataclass(frozen=True, kw_only=True)
class PGDAdversarial:
    """CE(f(x'), y), x' the point of the ball that climbs the same cross-entropy (Madry et al. 2018, eq. 2.1)."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    steps: int = 10  # steps of the inner attack
    step_size: float = 2 / 255  # of the inner attack, in pixels
    label_smoothing: float = 0.0  # share of the label spread over all classes

    def __post_init__(self) -> None:
        _check_inner(self)

    def __call__(self, model: Network, images: Images, labels: Labels, generator: Generator | None = None) -> PerImage:
        """[B] losses; random start from `generator` (None: a fresh one seeded 0). Only adversarial images pass in the
        model's own mode, so batch-norm statistics are theirs."""
        *_, adversarial = self.attack(model, images, labels, _start(threat_of(self), images, generator))
        return F.cross_entropy(model(adversarial), labels, reduction="none", label_smoothing=self.label_smoothing)

    def attack(self, model: Network, images: Images, labels: Labels, start: Images) -> Iterator[Images]:
        """The inner attack's points after each step, climbing the cross-entropy without smoothing."""

        def slope(z: Tensor) -> Tensor:
            return z.softmax(1) - F.one_hot(labels, z.shape[1])

        return ascend(model, images, start, slope, threat_of(self), self.steps, self.step_size)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Ordinary cross-entropy on the clean images."""

    label_smoothing: float = 0.0  # share of the label spread over all classes

    def __post_init__(self) -> None:
        _check_smoothing("Plain", self.label_smoothing)

    def __call__(self, model: Network, images: Images, labels: Labels, generator: Generator | None = None) -> PerImage:
        """[B] losses; draws nothing."""
        return F.cross_entropy(model(images), labels, reduction="none", label_smoothing=self.label_smoothing)
