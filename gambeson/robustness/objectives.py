"""The losses that training descends on images and their adversarial neighbours: TRADES, PGD-AT, MART, SCORE, plain.

Each first finds x' (`adversarial`), then measures there (`value`); calling it does both. Targets are class indices or
soft rows (`Targets`). All is computed in float32 or wider, also under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Generator, Tensor

from gambeson.errors import require
from gambeson.robustness.attack_losses import Network, threat_of
from gambeson.robustness.inner import (
    AdamSteps,
    AttackMode,
    Inner,
    Statistics,
    SteepestSteps,
    ascend,
    clean_and_moved,
    clean_probabilities,
    last,
    random_start,
)
from gambeson.robustness.terms import (
    Targets,
    against_runner_up,
    cross_entropy,
    distribution,
    kl_divergence,
    squared_distance,
    squared_distance_slope,
    unsure,
    wide,
)
from gambeson.threat import ThreatModel
from gambeson.types import Images, Logits, PerImage


@runtime_checkable
class TrainingLoss(Protocol):
    """A loss that training descends: one number per image."""

    def __call__(self, model: Network, images: Tensor, labels: Tensor, generator: Generator | None = None) -> Tensor:
        """adversarial, then value; None: a fresh generator seeded 0."""
        ...

    def adversarial(self, model: Network, images: Tensor, labels: Tensor, generator: Generator | None = None) -> Tensor:
        """The images that the inner attack finds, from a random start drawn from the generator."""
        ...

    def value(self, model: Network, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """[B] losses with the adversarial images given, in the model's own mode."""
        ...

    def at(self, progress: float) -> TrainingLoss:
        """The loss at a share 0..1 of the training."""
        ...


def _check_smoothing(name: str, label_smoothing: float) -> None:
    require(0 <= label_smoothing < 1, f"{name} label_smoothing", "from 0 to below 1", label_smoothing)


def _check_inner(loss: Inner, label_smoothing: float, beta: float = 0.0) -> None:
    """The fields that losses with an inner attack share."""
    name = type(loss).__name__
    require(loss.steps >= 1, f"{name} steps", "at least 1", loss.steps)
    fits = loss.step_size is None or loss.step_size > 0
    require(fits, f"{name} step_size", "above 0, in pixels, or none: in proportion to epsilon", loss.step_size)
    require(loss.attack_mode in ("eval", "train"), f"{name} attack_mode", "eval or train", loss.attack_mode)
    require(beta >= 0, f"{name} beta", "0 or more", beta)
    _check_smoothing(name, label_smoothing)


def _check_statistics(name: str, statistics: Statistics) -> None:
    known = ("together", "both", "clean", "adversarial")
    require(statistics in known, f"{name} statistics", "together, both, clean or adversarial", statistics)


def _climb_cross_entropy(
    loss: Inner, model: Network, images: Images, labels: Targets, start: Images
) -> Iterator[Images]:
    """The inner attack on the cross-entropy without smoothing."""

    def slope(z: Logits) -> Logits:
        return z.softmax(1) - distribution(labels, z)

    return ascend(loss, model, images, start, slope)


@dataclass(frozen=True, kw_only=True)
class TRADES:
    """CE(f(x), y) + beta KL(f(x) || f(x')), x' the point of the ball that climbs the KL (Zhang et al. 2019, eq. 5)."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    beta: float = 6.0  # weight of the robust term
    steps: int = 10  # steps of the inner attack
    step_size: float | None = None  # of the inner attack, in pixels; none: epsilon / 4 in 10 linf steps
    label_smoothing: float = 0.0  # share of the label spread over all classes
    statistics: Statistics = field(
        default="together", metadata={"neutral": "together"}
    )  # clean and adversarial images in one pass (together) or two, and which of them move batch norms' statistics
    attack_mode: AttackMode = field(
        default="eval", metadata={"neutral": "eval"}
    )  # batch norms during the attack: running statistics (eval) or those of the batch (train)
    climb: SteepestSteps | AdamSteps = field(
        default=SteepestSteps(), metadata={"neutral": SteepestSteps()}
    )  # how the inner attack steps

    def __post_init__(self) -> None:
        _check_inner(self, self.label_smoothing, self.beta)
        _check_statistics("TRADES", self.statistics)

    def __call__(self, model: Network, images: Images, labels: Targets, generator: Generator | None = None) -> PerImage:
        """[B] losses. The inner attack starts at a random point drawn from `generator` (None: a fresh one seeded 0)."""
        return self.value(model, images, self.adversarial(model, images, labels, generator), labels)

    def adversarial(
        self, model: Network, images: Images, labels: Targets, generator: Generator | None = None
    ) -> Images:
        """The inner attack's last point; labels play no part."""
        return last(self.attack(model, images, random_start(threat_of(self), images, generator)))

    def attack(self, model: Network, images: Images, start: Images) -> Iterator[Images]:
        """The inner attack's points after each step; the clean probabilities p are held constant."""
        p = clean_probabilities(self, model, images)
        return ascend(self, model, images, start, lambda z: z.softmax(1) - p)

    def value(self, model: Network, images: Images, adversarial: Images, labels: Targets) -> PerImage:
        """[B] losses at the adversarial images, in the model's own mode; `statistics` says how they pass."""
        clean, moved = clean_and_moved(model, images, adversarial, self.statistics)
        return cross_entropy(clean, labels, self.label_smoothing) + self.beta * kl_divergence(clean, moved)

    def at(self, progress: float) -> TRADES:
        """Itself: the same throughout."""
        return self


@dataclass(frozen=True, kw_only=True)
class PGDAdversarial:
    """CE(f(x'), y), x' the point of the ball that climbs the same cross-entropy (Madry et al. 2018, eq. 2.1)."""

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    steps: int = 10  # steps of the inner attack
    step_size: float | None = None  # of the inner attack, in pixels; none: epsilon / 4 in 10 linf steps
    label_smoothing: float = 0.0  # share of the label spread over all classes
    attack_mode: AttackMode = field(
        default="eval", metadata={"neutral": "eval"}
    )  # batch norms during the attack: running statistics (eval) or those of the batch (train)
    climb: SteepestSteps | AdamSteps = field(
        default=SteepestSteps(), metadata={"neutral": SteepestSteps()}
    )  # how the inner attack steps

    def __post_init__(self) -> None:
        _check_inner(self, self.label_smoothing)

    def __call__(self, model: Network, images: Images, labels: Targets, generator: Generator | None = None) -> PerImage:
        """[B] losses; random start from `generator` (None: a fresh one seeded 0)."""
        return self.value(model, images, self.adversarial(model, images, labels, generator), labels)

    def adversarial(
        self, model: Network, images: Images, labels: Targets, generator: Generator | None = None
    ) -> Images:
        """The inner attack's last point."""
        return last(self.attack(model, images, labels, random_start(threat_of(self), images, generator)))

    def attack(self, model: Network, images: Images, labels: Targets, start: Images) -> Iterator[Images]:
        """The inner attack's points after each step, climbing the cross-entropy without smoothing."""
        return _climb_cross_entropy(self, model, images, labels, start)

    def value(self, model: Network, images: Images, adversarial: Images, labels: Targets) -> PerImage:
        """[B] losses. Only adversarial images pass, in the model's own mode, so batch statistics are theirs."""
        return cross_entropy(wide(model(adversarial)), labels, self.label_smoothing)

    def at(self, progress: float) -> PGDAdversarial:
        """Itself: the same throughout."""
        return self


@dataclass(frozen=True, kw_only=True)
class MART:
    """BCE(f(x'), y) + beta KL(f(x) || f(x')) (1 - p_y(x)), x' climbs the cross-entropy (Wang et al. 2020).

    BCE = -log p_y(x') - log(1 - max_{k != y} p_k(x')). As in the published code gradients flow through the weight
    1 - p_y. That code adds 1.0001 - p + 1e-12 inside the second log and p + 1e-12 inside the KL's, which caps them at
    9.2 and 27.6 per image; here the logs are exact and grow with the logits. Needs one class per image.
    """

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    beta: float = 5.0  # weight of the KL term, the paper's lambda
    steps: int = 10  # steps of the inner attack
    step_size: float | None = None  # of the inner attack, in pixels; none: epsilon / 4 in 10 linf steps
    label_smoothing: float = 0.0  # share of the label spread over all classes, in -log p_y alone
    statistics: Statistics = "together"  # one pass (together) or two, and which of them move batch norms' statistics
    attack_mode: AttackMode = "eval"  # batch norms during the attack: running statistics, or the batch's (train)
    climb: SteepestSteps | AdamSteps = SteepestSteps()  # how the inner attack steps

    def __post_init__(self) -> None:
        _check_inner(self, self.label_smoothing, self.beta)
        _check_statistics("MART", self.statistics)

    def __call__(self, model: Network, images: Images, labels: Targets, generator: Generator | None = None) -> PerImage:
        """[B] losses; random start from `generator` (None: a fresh one seeded 0). UserError for soft targets."""
        return self.value(model, images, self.adversarial(model, images, labels, generator), labels)

    def adversarial(
        self, model: Network, images: Images, labels: Targets, generator: Generator | None = None
    ) -> Images:
        """The inner attack's last point."""
        return last(self.attack(model, images, labels, random_start(threat_of(self), images, generator)))

    def attack(self, model: Network, images: Images, labels: Targets, start: Images) -> Iterator[Images]:
        """The inner attack's points after each step, climbing the cross-entropy without smoothing."""
        _check_one_class(labels)
        return _climb_cross_entropy(self, model, images, labels, start)

    def value(self, model: Network, images: Images, adversarial: Images, labels: Targets) -> PerImage:
        """[B] losses at the adversarial images, in the model's own mode; `statistics` says how they pass."""
        _check_one_class(labels)
        clean, moved = clean_and_moved(model, images, adversarial, self.statistics)
        boosted = cross_entropy(moved, labels, self.label_smoothing) + against_runner_up(moved, labels)
        return boosted + self.beta * kl_divergence(clean, moved) * unsure(clean, labels)

    def at(self, progress: float) -> MART:
        """Itself: the same throughout."""
        return self


def _check_one_class(labels: Tensor) -> None:
    """UserError for soft targets: MART compares the class of an image with its runner-up."""
    expected = "class indices int64 [B], one class per image; use TRADES, PGDAdversarial or SCORE for soft targets"
    require(labels.dim() == 1, "MART labels", expected, f"{labels.dtype} {list(labels.shape)}")


@dataclass(frozen=True, kw_only=True)
class SCORE:
    """||p(x) - t||^2 + beta max(||p(x) - p(x')||^2 - clip, 0), x' climbs ||p(x') - p(x)||^2 (Pang et al. 2022).

    Squared errors of probabilities in TRADES's frame, attack and clip as in the authors' code for generated images
    (P2333/SCORE, gowal21uncovering). Their smoothing e gives 1 - e to the label and e / (K - 1) to each other class:
    label_smoothing = e K / (K - 1) here, 1/9 for their 0.1 and 10 classes.
    """

    threat: ThreatModel | None = None  # the ball of the attack; none: that of the recipe
    beta: float = 3.0  # weight of the robust term
    steps: int = 10  # steps of the inner attack
    step_size: float | None = None  # of the inner attack, in pixels; none: epsilon / 4 in 10 linf steps
    label_smoothing: float = 0.0  # share of the label spread over all classes
    clip: float = 0.0  # squared distance of clean and adversarial probabilities that costs nothing
    statistics: Statistics = "together"  # one pass (together) or two, and which of them move batch norms' statistics
    attack_mode: AttackMode = "eval"  # batch norms during the attack: running statistics, or the batch's (train)
    climb: SteepestSteps | AdamSteps = SteepestSteps()  # how the inner attack steps

    def __post_init__(self) -> None:
        _check_inner(self, self.label_smoothing, self.beta)
        _check_statistics("SCORE", self.statistics)
        require(0 <= self.clip < 2, "SCORE clip", "from 0 to below 2, the largest squared distance", self.clip)

    def __call__(self, model: Network, images: Images, labels: Targets, generator: Generator | None = None) -> PerImage:
        """[B] losses; random start from `generator` (None: a fresh one seeded 0)."""
        return self.value(model, images, self.adversarial(model, images, labels, generator), labels)

    def adversarial(
        self, model: Network, images: Images, labels: Targets, generator: Generator | None = None
    ) -> Images:
        """The inner attack's last point; labels play no part."""
        return last(self.attack(model, images, random_start(threat_of(self), images, generator)))

    def attack(self, model: Network, images: Images, start: Images) -> Iterator[Images]:
        """The inner attack's points after each step; the clean probabilities are held constant."""
        q = clean_probabilities(self, model, images)
        return ascend(self, model, images, start, lambda z: squared_distance_slope(z, q))

    def value(self, model: Network, images: Images, adversarial: Images, labels: Targets) -> PerImage:
        """[B] losses at the adversarial images, in the model's own mode; `statistics` says how they pass."""
        clean, moved = (z.softmax(1) for z in clean_and_moved(model, images, adversarial, self.statistics))
        robust = F.relu(squared_distance(clean, moved) - self.clip)
        return squared_distance(clean, distribution(labels, clean, self.label_smoothing)) + self.beta * robust

    def at(self, progress: float) -> SCORE:
        """Itself: the same throughout."""
        return self


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Ordinary cross-entropy on the clean images."""

    label_smoothing: float = 0.0  # share of the label spread over all classes

    def __post_init__(self) -> None:
        _check_smoothing("Plain", self.label_smoothing)

    def __call__(self, model: Network, images: Images, labels: Targets, generator: Generator | None = None) -> PerImage:
        """[B] losses; draws nothing."""
        return self.value(model, images, images, labels)

    def adversarial(
        self, model: Network, images: Images, labels: Targets, generator: Generator | None = None
    ) -> Images:
        """The images themselves."""
        return images

    def value(self, model: Network, images: Images, adversarial: Images, labels: Targets) -> PerImage:
        """[B] losses at the images given as adversarial."""
        return cross_entropy(wide(model(adversarial)), labels, self.label_smoothing)

    def at(self, progress: float) -> Plain:
        """Itself: the same throughout."""
        return self
