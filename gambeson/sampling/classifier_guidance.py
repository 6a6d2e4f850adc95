"""Classifier guidance, the nearest rival of contrastive guidance: at equal cost, in the same windows and profiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gambeson.sampling.features import check_eval, trial
from gambeson.sampling.windows import (
    ConstantStrength,
    StrengthProfile,
    TimestepWindow,
    Window,
    check_strengths,
    guided_steps,
)
from gambeson.types import Labels, Sigmas, Step


@dataclass(frozen=True, kw_only=True)
class TowardsClass:
    """What classifier guidance does (Dhariwal and Nichol 2021), on denoised images and without the denoiser's Jacobian.

    In its place stands that of Gaussian data, so that the shift, sigma^2 times the gradient in x, stays bounded:
    shift = strength * sigma^2 s^2 / (sigma^2 + s^2) * grad_{x0} log p(label | x0), with s = sigma_data. A guided step
    costs one forward and one backward of the classifier, as one of contrastive guidance costs of the encoder.
    """

    strength: float = 1.0  # 1: Bayes' rule; more sharpens the class
    sigma_data: float = 0.5  # standard deviation of images in [-1, 1]
    window: Window | TimestepWindow = Window()  # guided noise levels
    strength_profile: StrengthProfile = field(
        default=ConstantStrength(), metadata={"neutral": ConstantStrength()}
    )  # how the strength changes along the noise levels

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength) or not self.sigma_data > 0:
            raise ValueError(
                "TowardsClass: expected a finite strength and sigma_data above 0, got "
                f"strength={self.strength}, sigma_data={self.sigma_data}"
            )

    def guided_steps(self, sigmas: Sigmas) -> int:
        """How many steps of a schedule are guided, the first one included.

        ValueError where none is, or where the strength is not finite.
        """
        check_strengths(self.multiple, self.window, sigmas)
        return guided_steps(self.window, sigmas, first=0)

    def multiple(self, sigma: float, level: float | None = None) -> float:
        """The multiple of grad log p that x0-hat is shifted by; level: the schedule's sigma, which the profile sees."""
        s2, v = sigma**2, self.sigma_data**2
        factor = self.strength_profile.factor(sigma if level is None else level)
        return self.strength * factor * s2 * v / (s2 + v)


class ClassifierGuidance:
    """Guidance towards each image's label by a classifier of images in [0, 1] -> logits [B, K]; it keeps no state.

    micro_batch: classify so many images at a time, for less memory.
    """

    def __init__(
        self, spec: TowardsClass, classifier: Callable[[Tensor], Tensor], *, micro_batch: int | None = None
    ) -> None:
        check_eval(classifier, "classifier")
        self.spec, self.classifier, self.micro_batch = spec, classifier, micro_batch

    def check(
        self,
        sigmas: Sigmas,
        labels: Labels | None = None,
        batch: int | None = None,
        shape: tuple[int, ...] | None = None,
        device: str | torch.device = "cpu",
        classes: int | None = None,
    ) -> None:
        """Raise the ValueErrors of a whole run before it starts.

        No step in the window, a strength that is not finite, no labels; with the `shape` of an image, a classifier that
        cannot take it, or knows fewer classes than the labels, or than `classes`, where other batches have more labels.
        """
        self.spec.guided_steps(sigmas)
        own = self._labels(labels)
        if shape is not None:
            high = max(int(own.max()), (classes or 0) - 1)
            self._check_logits(trial(self.classifier, shape, device), int(own.min()), high)

    def _check_logits(self, images: Tensor, low: int, high: int) -> None:
        """Try the classifier on images of the right shape; labels go from low to high."""
        try:
            with torch.no_grad():
                logits: Any = self.classifier(images)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"classifier guidance: expected logits [B, K] of images in [0, 1] of shape {tuple(images.shape[1:])}, "
                f"but the classifier failed: {error}; use one of images of this size and number of channels, and none "
                "that has to be told a noise level"
            ) from error
        came = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        shaped = isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(images)
        if not shaped or not 0 <= low <= high < logits.shape[1]:
            raise ValueError(
                f"classifier guidance: expected logits [{len(images)}, K] with K above every label, {low} to {high}, "
                f"got {came}; use a classifier of the same data"
            )

    def init(self, block: int, generator: Generator | None = None) -> None:
        """Nothing to keep."""

    def __call__(self, state: None, step: Step) -> tuple[Tensor | None, None]:
        """(shift of x0-hat [B, ...] or None outside the window, None)."""
        labels = self._labels(step.labels)
        if not self.spec.window.contains(step.scheduled):
            return None, None
        pieces = zip(*(t.split(self.micro_batch or len(labels)) for t in (step.raw, labels)), strict=True)
        gradient = torch.cat([self._gradient(x0, own) for x0, own in pieces])
        return self.spec.multiple(step.sigma, step.scheduled) * gradient, None

    def _gradient(self, x0: Tensor, labels: Tensor) -> Tensor:
        """[B, ...] gradient in x0 of each image's log p(label | x0)."""
        x0 = x0.detach().requires_grad_()
        with torch.enable_grad():
            log_p = -F.cross_entropy(self.classifier((x0 + 1) / 2), labels, reduction="sum")
        return torch.autograd.grad(log_p, x0)[0]

    @staticmethod
    def _labels(labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("classifier guidance: expected labels to guide towards, got None; sample with labels")
        return labels
