"""White-box attacks: FGSM, PGD, AutoPGD and its targeted form, the losses they climb, and the verdict per image.

Every draw belongs to its image, and a fooled image leaves the working batch at once, so verdicts do not depend on
batch size or order (apart from the last bits that a network's own kernels change with the shape of the batch).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gambeson.errors import require
from gambeson.randomness import image_keys, uniform
from gambeson.robustness.attack_losses import (
    DLR,
    AttackLoss,
    CrossEntropy,
    HasThreat,
    Margin,
    Network,
    TargetedDLR,
    Verdicts,
    frozen,
    loss_and_gradient,
    threat_of,
)
from gambeson.threat import ThreatModel
from gambeson.types import Images, Labels, Logits, Progress, silent


class NotFinite(ValueError):
    """A classifier's logits are not numbers."""


def logits_of(model: Network, images: Images, batch_size: int = 256) -> Logits:
    """[B, K] logits without gradients, batch by batch, in the images' own precision (autocast off).

    Raises ValueError if the model is in training mode, or its output not [B, K] or not finite.
    """
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise ValueError("attack: expected a model in eval mode, got one in training mode; call model.eval() first")
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        logits = torch.cat([model(part) for part in images.split(batch_size)])
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"classifier: expected logits [B, at least 2 classes], got shape {list(logits.shape)}")
    if not logits.isfinite().all():
        raise NotFinite("classifier: expected finite logits, got NaN or infinity; usually the training diverged")
    return logits


def attack_input_checks(images: Tensor, labels: Tensor) -> None:
    """ValueError unless images are float [B, C, H, W] in [0, 1] with B >= 1, and labels int64 [B], none below 0."""
    if images.dtype == torch.uint8:
        raise ValueError("attack images: expected float in [0, 1], got uint8; divide first: images.float() / 255")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"attack images: expected float [B, C, H, W], got {images.dtype} {list(images.shape)}")
    if len(images) == 0:
        raise ValueError("attack images: expected at least one image, got none; usually a filter left nothing over")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"attack images: expected values in [0, 1], got {low:.4g} to {high:.4g}; "
            "normalisation belongs into the model"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"attack labels: expected int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}; "
            "try labels.long().flatten()"
        )
    if labels.min() < 0:
        raise ValueError(f"attack labels: expected class indices from 0, got {int(labels.min())}")


def _clean_logits(model: Network, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """Logits of the clean images, after every check of the inputs and of the model."""
    attack_input_checks(images, labels)
    clean = logits_of(model, images, batch_size)
    if labels.max() >= clean.shape[1]:
        raise ValueError(f"attack labels: expected below {clean.shape[1]} (the logits), got {int(labels.max())}")
    return clean


@dataclass(frozen=True, kw_only=True)
class Climb:
    """Where each image of a working batch stands; every field has one entry per image."""

    row: Tensor  # [b] its place in the caller's batch
    origin: Tensor  # [b, C, H, W] the clean image
    labels: Tensor  # [b]
    target: Tensor  # [b] the class that a targeted loss pulls to
    x: Tensor  # [b, C, H, W] the point last looked at
    loss: Tensor  # [b] loss at x
    gradient: Tensor  # [b, C, H, W] its gradient
    right: Tensor  # [b] whether x is still classified as its label

    def only(self, keep: Tensor) -> Any:
        """The images where `keep` [b] is True."""
        return replace(self, **{f.name: getattr(self, f.name)[keep] for f in fields(self)})


def _look(model: Network, loss: AttackLoss, climb: Any, x: Tensor, **changes: Tensor) -> Any:
    """The climb moved to x, with the loss, gradient and verdict found there."""
    value, gradient, right = loss_and_gradient(model, loss, x, climb.labels, climb.target)
    return replace(climb, x=x, loss=value, gradient=gradient, right=right, **changes)


def _place(model: Network, loss: AttackLoss, origin: Tensor, labels: Tensor, target: Tensor, start: Tensor) -> Climb:
    """A climb at its start."""
    value, gradient, right = loss_and_gradient(model, loss, start, labels, target)
    row = torch.arange(len(labels), device=labels.device)
    return Climb(
        row=row, origin=origin, labels=labels, target=target, x=start, loss=value, gradient=gradient, right=right
    )


class _Record:
    """The best image found for each row: a fooling one if any was met, otherwise the one of highest loss."""

    def __init__(self, model: Network, images: Tensor, labels: Tensor) -> None:
        clean = _clean_logits(model, images, labels, len(images))
        self.images, self.labels, self.best = images, labels, images.clone()
        self.right = clean.argmax(1) == labels
        self.loss = torch.full_like(clean[:, 0], -math.inf)
        others = clean.scatter(1, labels[:, None], -math.inf)
        self.targets = others.argsort(dim=1, descending=True, stable=True)[:, :-1]  # other classes, most likely first

    def standing(self) -> Tensor:
        """The rows not fooled yet."""
        return self.right.nonzero().flatten()

    def keep(self, climb: Any) -> Any:
        """Write down what this climb has met; return the climb of those still standing."""
        better = ~climb.right | (climb.loss > self.loss[climb.row])
        rows = climb.row[better]
        self.best[rows], self.loss[rows] = climb.x[better], climb.loss[better]
        self.right[climb.row] = climb.right
        return climb if climb.right.all() else climb.only(climb.right)


def _pursue(attack: PGD | APGD, model: Network, record: _Record, target: Tensor, keys: Tensor, run: int) -> None:
    """One climb of every image still standing, from its own random point; the fooled leave after each step."""
    rows = record.standing()
    origin = record.images[rows]
    draws = uniform(keys[rows], type(attack).__name__, tuple(origin.shape[1:]), run)
    start = threat_of(attack).random(origin, draws)
    climb: Any = attack.begin(model, origin, record.labels[rows], target[rows], start)
    climb = record.keep(replace(climb, row=rows))
    for k in range(attack.steps):
        if not len(climb.row):
            return
        climb = record.keep(attack.advance(model, climb, k))


def _pursue_all(attack: PGD | APGD, model: Network, record: _Record, targets: list[Tensor], seed: int) -> Tensor:
    """One climb per entry of `targets` (a class for every image); returns the best images found."""
    keys = image_keys(record.images, record.labels, seed)
    with frozen(model):
        for run, target in enumerate(targets):
            if record.right.any():
                _pursue(attack, model, record, target, keys, run)
    return record.best


Climbed = CrossEntropy | Margin | DLR | TargetedDLR
"""The losses that a recipe can have an attack climb."""


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """One step of size epsilon along the steepest direction from the clean image (Goodfellow et al. 2015, sec. 4)."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    loss: Climbed = CrossEntropy()  # what is climbed

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]; images that are wrong already come back unchanged. Draws nothing."""
        threat, record = threat_of(self), _Record(model, images, labels)
        with frozen(model):
            _, gradient, right = loss_and_gradient(model, self.loss, images, labels, record.targets[:, 0])
        stepped = threat.project(images + threat.epsilon * threat.steepest(gradient), images)
        return torch.where(right.reshape(-1, 1, 1, 1), stepped, images)


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient ascent from random points of the ball (Madry et al. 2018, sec. 2.1), fixed step size."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    steps: int = 40  # gradient steps of each restart
    restarts: int = 3  # random starts; later ones only see the images still standing
    step_size: float | None = None  # in pixels; none: 2.5 * epsilon / steps
    loss: Climbed = Margin()  # what is climbed

    def __post_init__(self) -> None:
        require(self.steps >= 1, "PGD steps", "at least 1", self.steps)
        require(self.restarts >= 1, "PGD restarts", "at least 1", self.restarts)
        require(self.step_size is None or self.step_size > 0, "PGD step_size", "None or above 0", self.step_size)

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]: a fooling one if any was met, otherwise the one of highest loss.

        A targeted loss is given each image's most likely other class. Images that are wrong already come back
        unchanged. Raises ValueError for inputs out of form, a missing threat, or a model in training mode.
        """
        threat_of(self)
        record = _Record(model, images, labels)
        return _pursue_all(self, model, record, [record.targets[:, 0]] * self.restarts, seed)

    def begin(self, model: Network, origin: Images, labels: Labels, target: Labels, start: Images) -> Climb:
        """The climb at its start."""
        return _place(model, self.loss, origin, labels, target, start)

    def advance(self, model: Network, climb: Climb, k: int) -> Climb:
        """Step k (from 0) of every image."""
        threat = threat_of(self)
        size = 2.5 * threat.epsilon / self.steps if self.step_size is None else self.step_size
        x = threat.project(climb.x + size * threat.steepest(climb.gradient), climb.origin)
        return _look(model, self.loss, climb, x)


@dataclass(frozen=True, kw_only=True)
class APGDClimb(Climb):
    """A climb with the memory of AutoPGD."""

    previous: Tensor  # [b, C, H, W] the point that the last step was taken from
    step_size: Tensor  # [b] of the last step
    best_x: Tensor  # [b, C, H, W]
    best_loss: Tensor  # [b]
    best_gradient: Tensor  # [b, C, H, W]
    rises: Tensor  # [b] steps since the last check that raised the loss
    checked: Tensor  # [b] best loss at the last check
    halved: Tensor  # [b] whether the last check halved the step


def checkpoints(steps: int) -> dict[int, int]:
    """Steps after which AutoPGD checks its progress -> how many steps back it looks (Croce & Hein 2020, section 3.2).

    The first comes after 22 % of the steps, each next gap is 3 % shorter, but none shorter than 6 %.
    """
    gap, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    checks, at = {}, gap
    while at <= steps:
        checks[at] = gap
        gap = max(gap - shorter, least)
        at += gap
    return checks


def _where(choose: Tensor, this: Tensor, that: Tensor) -> Tensor:
    """`this` for the images chosen [b], `that` for the others."""
    return torch.where(choose.reshape(-1, *[1] * (this.dim() - 1)), this, that)


@dataclass(frozen=True, kw_only=True)
class APGD:
    """AutoPGD (Croce & Hein 2020, algorithm 1): momentum, and a step per image that halves when progress stalls."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    steps: int = 100  # gradient steps of each restart
    restarts: int = 1  # random starts; later ones only see the images still standing
    rho: float = 0.75  # share of rising steps below which a check halves the step
    loss: Climbed = CrossEntropy()  # what is climbed

    def __post_init__(self) -> None:
        require(self.steps >= 1, "APGD steps", "at least 1", self.steps)
        require(self.restarts >= 1, "APGD restarts", "at least 1", self.restarts)
        require(0 < self.rho < 1, "APGD rho", "between 0 and 1", self.rho)

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]; as PGD."""
        threat_of(self)
        record = _Record(model, images, labels)
        return _pursue_all(self, model, record, [record.targets[:, 0]] * self.restarts, seed)

    def trace(
        self, model: Network, images: Images, labels: Labels, start: Images, target: Labels | None = None
    ) -> Iterator[APGDClimb]:
        """The climb at `start`, then after every step; no image is dropped. target None: the label (untargeted)."""
        with frozen(model):
            yield (climb := self.begin(model, images, labels, labels if target is None else target, start))
            for k in range(self.steps):
                yield (climb := self.advance(model, climb, k))

    def begin(self, model: Network, origin: Images, labels: Labels, target: Labels, start: Images) -> APGDClimb:
        """The climb at its start, with steps of twice the radius."""
        at = _place(model, self.loss, origin, labels, target, start)
        return APGDClimb(
            **vars(at),
            previous=start,
            step_size=torch.full_like(at.loss, 2 * threat_of(self).epsilon),
            best_x=start,
            best_loss=at.loss,
            best_gradient=at.gradient,
            rises=torch.zeros_like(labels),
            checked=at.loss,
            halved=torch.ones_like(at.right),  # so that the first check judges by the rises alone
        )

    def advance(self, model: Network, climb: APGDClimb, k: int) -> APGDClimb:
        """Step k (from 0) of every image; a check due after step k is made when the next step begins."""
        window = checkpoints(self.steps).get(k)
        climb = climb if window is None else self._check(climb, window)
        x = self._move(climb, momentum=0.25 if k else 0.0)
        new = _look(model, self.loss, climb, x, previous=climb.x, rises=climb.rises)
        better = new.loss > climb.best_loss
        return replace(
            new,
            rises=climb.rises + (new.loss > climb.loss),
            best_x=_where(better, new.x, climb.best_x),
            best_loss=_where(better, new.loss, climb.best_loss),
            best_gradient=_where(better, new.gradient, climb.best_gradient),
        )

    def _move(self, climb: APGDClimb, momentum: float) -> Tensor:
        """Algorithm 1, lines 7 and 8: a projected gradient step z, mixed with the previous move."""
        threat, x = threat_of(self), climb.x
        z = threat.project(x + climb.step_size.reshape(-1, 1, 1, 1) * threat.steepest(climb.gradient), climb.origin)
        return threat.project(x + (1 - momentum) * (z - x) + momentum * (x - climb.previous), climb.origin)

    def _check(self, climb: APGDClimb, window: int) -> APGDClimb:
        """Halve the step and go back to the best point where few of the last `window` steps rose (condition 1), or
        where neither the step nor the best loss has changed since the last check (condition 2)."""
        stalled = ~climb.halved & (climb.best_loss <= climb.checked)
        halve = (climb.rises <= self.rho * window) | stalled
        return replace(
            climb,
            x=_where(halve, climb.best_x, climb.x),
            gradient=_where(halve, climb.best_gradient, climb.gradient),
            step_size=_where(halve, climb.step_size / 2, climb.step_size),
            rises=torch.zeros_like(climb.rises),
            checked=climb.best_loss,
            halved=halve,
        )


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD:
    """AutoPGD on the targeted DLR loss, once for each other class by falling clean logit (Croce & Hein 2020, 4)."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    steps: int = 100  # gradient steps towards each target
    targets: int | None = None  # how many of the other classes, most likely first; none: all

    def __post_init__(self) -> None:
        require(self.steps >= 1, "TargetedAPGD steps", "at least 1", self.steps)
        require(self.targets is None or self.targets >= 1, "TargetedAPGD targets", "None or at least 1", self.targets)

    def __call__(self, model: Network, images: Images, labels: Labels, seed: int = 0) -> Images:
        """Adversarial images [B, C, H, W]; as PGD."""
        engine = APGD(threat=threat_of(self), steps=self.steps, loss=TargetedDLR())
        record = _Record(model, images, labels)
        targets = list(record.targets[:, : self.targets].unbind(1))
        return _pursue_all(engine, model, record, targets, seed)


@runtime_checkable
class SeededAttack(HasThreat, Protocol):
    """An attack with a threat model whose draws come from a seed."""

    def __call__(self, model: Network, images: Tensor, labels: Tensor, seed: int = 0) -> Tensor: ...


def _verify(attack: SeededAttack, model: Network, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """[B] whether each adversarial image, in the ball and in full precision, is classified as its label."""
    threat, adversarial = threat_of(attack), adversarial.detach().to(images.dtype)
    left = (threat.distance(adversarial, images) - threat.epsilon).max().item()
    if not (left <= 1e-5 * threat.epsilon + 1e-6 and adversarial.min() >= 0 and adversarial.max() <= 1):
        raise ValueError(
            f"{type(attack).__name__}: expected images within {threat} and [0, 1], got some {left:.3g} outside the "
            "ball or out of range; the attack must project its last step"
        )
    return logits_of(model, adversarial, len(images)).argmax(1) == labels


def robust_after(
    attack: SeededAttack,
    model: Network,
    images: Images,
    labels: Labels,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = silent,
) -> Verdicts:
    """[B] True where the clean image is right and the attack's image, checked again in full precision, is too.

    Only images still right are attacked, packed into full batches. Raises ValueError as the attack does, and if an
    adversarial image lies outside the ball or [0, 1].
    """
    robust = _clean_logits(model, images, labels, batch_size).argmax(1) == labels
    done = len(images) - int(robust.sum())
    for rows in robust.nonzero().flatten().split(batch_size):
        adversarial = attack(model, images[rows], labels[rows], seed=seed)
        robust[rows] = _verify(attack, model, images[rows], adversarial, labels[rows])
        progress(done := done + len(rows), len(images))
    return robust
