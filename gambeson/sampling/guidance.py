"""Guidance: gradients of a contrastive loss, or of a classifier, that shift the denoiser's x0-hat inside a window.

The specs `Contrastive` and `TowardsClass` are plain numbers for recipes; `ContrastiveGuidance(spec, encoder)` adds the
network. Moving eps by delta moves x0-hat by -sigma delta: CDP's Algorithm 1 in sigma space (METHOD 1.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gambeson.sampling.contrastive import ConditionalHardNegative, HardNegative, InfoNCE, InfoNCEPaper
from gambeson.sampling.schedules import AlphaBar, sigma_from_alpha_bar
from gambeson.types import Encoder, Guidance, Labels, Sigmas, Step


@dataclass(frozen=True, kw_only=True)
class Window:
    """The noise levels at which a guidance acts, both ends included."""

    sigma_min: float = 0.0  # lowest guided sigma
    sigma_max: float | None = None  # highest guided sigma; none: no bound

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min <= (math.inf if self.sigma_max is None else self.sigma_max):
            raise ValueError(f"Window: expected 0 <= sigma_min <= sigma_max, got {self.sigma_min}, {self.sigma_max}")

    def contains(self, sigma: float) -> bool:
        """Whether steps at this sigma are guided."""
        return self.sigma_min <= sigma and (self.sigma_max is None or sigma <= self.sigma_max)

    @staticmethod
    def of_timesteps(alpha_bar: AlphaBar, first: int, last: int | None = None) -> Window:
        """Timesteps first..last of a VP table, both included; last None: up to the noisiest.

        CDP's code: linear table, first=400 (CIFAR-10); cosine, first=51, last=149 (traffic signs). The ends lie between
        two timesteps, so rounding cannot move a step across. ValueError unless 0 <= first <= last < len(alpha_bar).
        """
        end = len(alpha_bar) - 1 if last is None else last
        if not 0 <= first <= end < len(alpha_bar):
            raise ValueError(
                f"Window: expected 0 <= first <= last <= {len(alpha_bar) - 1}, got first={first}, last={last}"
            )
        sigma = sigma_from_alpha_bar(alpha_bar).tolist()
        low = 0.0 if first == 0 else math.sqrt(sigma[first - 1] * sigma[first])
        return Window(
            sigma_min=low, sigma_max=None if end == len(sigma) - 1 else math.sqrt(sigma[end] * sigma[end + 1])
        )


@runtime_checkable
class FeatureView(Protocol):
    """Which coordinate of a step the gradient is taken in, and which image of it the encoder sees."""

    def variable(self, step: Step) -> Tensor:
        """The coordinate, [B, ...]."""
        ...

    def image(self, variable: Tensor) -> Tensor:
        """What the encoder sees at that coordinate, [B, ...], differentiable in it."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoisyFeatures:
    """The encoder sees the noisy state x / sqrt(1 + sigma^2), in [-1, 1] scale, as in CDP's code."""

    def variable(self, step: Step) -> Tensor:
        """The state in VP coordinates, [B, ...]."""
        return step.x / math.sqrt(1 + step.sigma**2)

    def image(self, variable: Tensor) -> Tensor:
        """As it is."""
        return variable


@dataclass(frozen=True, kw_only=True)
class DenoisedFeatures:
    """The encoder sees the denoiser's x0-hat mapped to [0, 1]; the denoiser's Jacobian is left out."""

    def variable(self, step: Step) -> Tensor:
        """x0-hat before guidance and clamp, [B, ...]."""
        return step.raw

    def image(self, variable: Tensor) -> Tensor:
        """[-1, 1] -> [0, 1]."""
        return (variable + 1) / 2


PairLoss = InfoNCE | InfoNCEPaper | HardNegative | ConditionalHardNegative
"""The contrastive losses that a recipe can name."""


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """What contrastive guidance does. The defaults are CDP's CIFAR-10 numbers, with its class-conditional pairs.

    Convention 'sum' adds up the anchors' losses, so that an image's shift does not depend on how many others it is
    reduced with; 'paper' averages them: lambda = 100k at B = 512 (1,024 anchors) is a strength of 97.7 here.
    """

    loss: PairLoss = ConditionalHardNegative()  # the loss on pairs of embeddings that guidance descends
    strength: float = 97.65625  # multiple of the loss gradient that is added to eps
    strength_convention: Literal["sum", "paper"] = "sum"  # sum over the anchors' losses, or the paper's mean
    window: Window = Window(sigma_min=2.04)  # guided noise levels; 2.04 is t = 400 of the linear schedule
    features: NoisyFeatures | DenoisedFeatures = NoisyFeatures()  # what the encoder sees

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"Contrastive strength: expected a finite number, got {self.strength}")
        if self.strength_convention not in ("sum", "paper"):
            raise ValueError(f"strength_convention: expected 'sum' or 'paper', got {self.strength_convention!r}")


def _check_eval(network: Callable[..., Tensor], role: str) -> None:
    if isinstance(network, nn.Module) and network.training:
        raise ValueError(
            f"{role}: expected a network in eval mode, got one in train mode, whose output depends on the batch and on "
            "every batch before; call .eval()"
        )


def _check_window(window: Window, sigmas: Sigmas, first: int) -> None:
    levels = sigmas[first:-1].tolist()
    if not any(window.contains(sigma) for sigma in levels):
        raise ValueError(
            f"guidance: expected at least one guided step, got none: {window} holds no sigma of the schedule after its "
            f"first step, {levels[0] if levels else 'none'} to {levels[-1] if levels else 'none'}; "
            "Window.of_timesteps converts a range of timesteps"
        )


class ContrastiveGuidance:
    """CDP's guidance (Algorithm 1): pull each image towards its previous step, push it from others of its batch.

    shift = -sigma * strength * gradient of the summed losses, in the spec's coordinate. The positive is the image's own
    previous step, so the first step is never guided. Its features are last step's anchors', kept in the state: each
    image is encoded once per guided step. The encoder's parameters receive no gradient.

    encoder: images [B, ...] -> [B, D], L2-normalised here; negatives [M, D]: normalised embeddings, for example of real
    images, to be used instead of the batch's own (CDP appendix C.1, third choice of pairs).
    """

    def __init__(self, spec: Contrastive, encoder: Encoder, negatives: Tensor | None = None) -> None:
        _check_eval(encoder, "encoder")
        self.spec, self.encoder, self.negatives = spec, encoder, negatives

    def check(self, sigmas: Sigmas, labels: Labels | None = None, *, batch: int | None = None) -> None:
        """Raise the ValueErrors of a whole run before it starts: no step in the window, a batch or labels the loss
        cannot use (1 image, 1 class, none). Give labels [B], or the batch size where sampling is without labels."""
        _check_window(self.spec.window, sigmas, first=1)
        size = len(labels) if labels is not None else batch
        if size is not None:
            self._probe(torch.ones(size, 1), labels)

    def init(self, block: int, generator: Generator | None = None) -> None:
        """No features seen yet."""

    def __call__(self, state: Tensor | None, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """(shift of x0-hat [B, ...] or None outside the window, features [B, D] for the next evaluation or None)."""
        if step.index == 0 or step.previous is None:
            self._probe(step.x.new_ones(len(step.x), 1), step.labels)
            return None, None
        if not self.spec.window.contains(step.sigma):
            return None, None
        positive = self._features(step.previous) if state is None else state
        gradient, anchor = self._gradient(step, positive)
        # what comes next has the start of this step as its `previous`, whichever evaluation this is
        return -step.sigma * self.spec.strength * gradient, anchor if step.stage == 0 else positive

    def _probe(self, rows: Tensor, labels: Tensor | None) -> None:
        """A dry run of the loss: it raises now what it would raise at the first guided step."""
        self.spec.loss(rows, rows, None if self.negatives is None else rows[:1], labels)

    def _features(self, step: Step) -> Tensor:
        """[B, D] features of a step: of the one before the window, when the window has only just opened."""
        with torch.no_grad():
            return self._encode(self.spec.features.variable(step))

    def _gradient(self, step: Step, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the reduced loss in the spec's coordinate [B, ...], and the anchors' features [B, D]."""
        variable = self.spec.features.variable(step).detach().requires_grad_()
        with torch.enable_grad():
            anchor = self._encode(variable)
            losses = self.spec.loss(anchor, positive, self.negatives, step.labels)
            total = losses.sum() if self.spec.strength_convention == "sum" else losses.mean()
        return torch.autograd.grad(total, variable)[0], anchor.detach()

    def _encode(self, variable: Tensor) -> Tensor:
        return F.normalize(self.encoder(self.spec.features.image(variable)), dim=1)


@dataclass(frozen=True, kw_only=True)
class TowardsClass:
    """What classifier guidance does (Dhariwal and Nichol 2021), on denoised images and without the denoiser's Jacobian.

    In its place stands that of Gaussian data, so that the shift, sigma^2 times the gradient in x, stays bounded:
    shift = strength * sigma^2 s^2 / (sigma^2 + s^2) * grad_{x0} log p(label | x0), with s = sigma_data.
    """

    strength: float = 1.0  # 1: Bayes' rule; more sharpens the class
    sigma_data: float = 0.5  # standard deviation of images in [-1, 1]
    window: Window = Window()  # guided noise levels


class ClassifierGuidance:
    """Guidance towards each image's label by a classifier of images in [0, 1] -> logits [B, K]; it keeps no state."""

    def __init__(self, spec: TowardsClass, classifier: Callable[[Tensor], Tensor]) -> None:
        _check_eval(classifier, "classifier")
        self.spec, self.classifier = spec, classifier

    def check(self, sigmas: Sigmas, labels: Labels | None = None, *, batch: int | None = None) -> None:
        """Raise the ValueErrors of a whole run before it starts: no step in the window, no labels."""
        _check_window(self.spec.window, sigmas, first=0)
        self._labels(labels)

    def init(self, block: int, generator: Generator | None = None) -> None:
        """Nothing to keep."""

    def __call__(self, state: None, step: Step) -> tuple[Tensor | None, None]:
        """(shift of x0-hat [B, ...] or None outside the window, None)."""
        labels = self._labels(step.labels)
        if not self.spec.window.contains(step.sigma):
            return None, None
        x0 = step.raw.detach().requires_grad_()
        with torch.enable_grad():
            log_p = -F.cross_entropy(self.classifier((x0 + 1) / 2), labels, reduction="sum")
        s2, v = step.sigma**2, self.spec.sigma_data**2
        return self.spec.strength * s2 * v / (s2 + v) * torch.autograd.grad(log_p, x0)[0], None

    @staticmethod
    def _labels(labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("classifier guidance: expected labels to guide towards, got None; sample with labels")
        return labels


class GuidanceSum:
    """Several guidances at once: their shifts are added, each keeps its own state."""

    def __init__(self, *parts: Guidance) -> None:
        self.parts = parts

    def init(self, block: int, generator: Generator | None = None) -> tuple[Any, ...]:
        """The states of the parts, in order."""
        return tuple(part.init(block, generator) for part in self.parts)

    def __call__(self, state: tuple[Any, ...], step: Step) -> tuple[Tensor | None, tuple[Any, ...]]:
        """(sum of the shifts, None where no part acts; states)."""
        results = [part(own, step) for part, own in zip(self.parts, state, strict=True)]
        shifts = [shift for shift, _ in results if shift is not None]
        return (torch.stack(shifts).sum(0) if shifts else None), tuple(own for _, own in results)
