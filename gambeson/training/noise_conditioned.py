"""Trains a noise-conditioned classifier: cross-entropy on real images under noise of every level of the sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gambeson import distributed
from gambeson.data.augment import PadCrop
from gambeson.data.datasets import ImageSet, Split
from gambeson.data.mixture import Mixture
from gambeson.errors import require
from gambeson.heritage import noted
from gambeson.models.classifiers import classifier_header
from gambeson.models.files import save_tensors
from gambeson.models.noise_conditioned import NoiseConditionedClassifier, NoiseConditionedSpec
from gambeson.randomness import derive, generator
from gambeson.store import Workspace, stage
from gambeson.training.cards import encoder_card
from gambeson.training.journal import journal
from gambeson.training.loop import Losses, Optimisation, TrainingState, fit


@dataclass(frozen=True, kw_only=True)
class NoisyEncoderTraining:
    """A noise-conditioned classifier and how it is trained (Dhariwal & Nichol 2021, section 4)."""

    network: NoiseConditionedSpec = NoiseConditionedSpec()  # the architecture
    optimisation: Optimisation = Optimisation(
        steps=2000, learning_rate=1e-3, momentum=0.0, weight_decay=0.05, average=0.995
    )  # how it is fitted
    augment: PadCrop = PadCrop(padding=1, flip=True)  # augmentation of every training image
    validations: int = 4  # how often the averaged weights are measured on the validation images
    levels: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 8.0)  # noise levels at which they are measured

    def __post_init__(self) -> None:
        require(self.validations >= 1, "validations", "at least 1", self.validations)
        levels_fit = bool(self.levels) and min(self.levels, default=-1.0) >= 0
        require(levels_fit, "levels", "one or more noise levels of 0 or more", self.levels)

    def sigmas(self, count: int, generator: Generator) -> Tensor:
        """[count] float32 noise levels on the CPU, log-uniform over the range that the network is told."""
        low, high = math.log(self.network.sigma_min), math.log(self.network.sigma_max)
        return (low + (high - low) * torch.rand(count, generator=generator)).exp()


def noised(images: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
    """x_vp = (x0 + sigma n) / sqrt(1 + sigma^2): images [B, C, H, W] in [0, 1], sigma [B], x0 = 2 images - 1.

    The noise is drawn on the generator's device.
    """
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
    sigma = sigma.to(images).reshape(-1, 1, 1, 1)
    return (images * 2 - 1 + sigma * noise) / (1 + sigma.square()).sqrt()


@stage(revision=1, together=True, card=encoder_card)
def train_noise_conditioned(work: Workspace, spec: NoisyEncoderTraining, real: ImageSet, *, seed: int) -> None:
    """Writes classifier.safetensors: averaged weights; in its header the curve of the loss and of the accuracy at each
    of the spec's noise levels, as [level, accuracy] pairs."""
    spec.network.check(real.shape)
    device = work.machine.device
    model = spec.network.build(real.shape[0], len(real.class_names), derive(seed, "encoder weights")).to(device)
    state = TrainingState.start(model, spec.optimisation)
    every = max(spec.optimisation.steps // spec.validations, 1)
    with journal(work.folder) as write:
        for step in fit(state, spec.optimisation, _loss(spec, model, real, seed, device), work):
            if step % every == 0 or step == spec.optimisation.steps:
                accuracy = _validate(state.averaged, real.validation, spec, seed, device) if distributed.leads() else []
                state.log.append({"step": step, "loss": state.recent_loss(every), "accuracy": accuracy})
                named = {f"accuracy at noise {level:g}": value for level, value in accuracy}
                rate = spec.optimisation.rate(step - 1)
                write({"step": step, "loss": state.log[-1]["loss"], "rate": rate, **named})
    if distributed.leads():
        header = {**classifier_header(model, real.shape), "log": state.log, **noted(work.heritage)}
        save_tensors(work.folder / "classifier.safetensors", state.averaged.state_dict(), header)


def _loss(
    spec: NoisyEncoderTraining, model: NoiseConditionedClassifier, real: ImageSet, seed: int, device: str
) -> Losses:
    mixture = Mixture(real.train, None, 0.0, spec.optimisation.batch_size, derive(seed, "encoder batches"))

    def loss_of(step: int) -> Iterator[Tensor]:
        images, labels, _ = mixture.batch(step)
        draw = generator(seed, "encoder step", step)
        images = spec.augment(images, draw, real.flip_safe)
        sigma = spec.sigmas(len(images), draw)
        shares = distributed.shares(len(images))  # each process makes the whole batch and keeps its share
        batch = [distributed.share(t.tensor_split(shares)) for t in (noised(images, sigma, draw), sigma, labels)]
        for x_vp, some, own in zip(*(t.tensor_split(spec.optimisation.accumulate) for t in batch), strict=True):
            yield F.cross_entropy(model(x_vp.to(device), some).float(), own.to(device), reduction="none")

    return loss_of


@torch.no_grad()
def _validate(
    model: torch.nn.Module, part: Split, spec: NoisyEncoderTraining, seed: int, device: str
) -> list[list[float]]:
    """[level, accuracy] of the averaged weights at each noise level; the same noise every time."""
    size, found = spec.optimisation.batch_size, []
    for place, level in enumerate(spec.levels):
        draw, right = generator(seed, "encoder validation", place), 0
        for images, labels in zip(part.images.split(size), part.labels.split(size), strict=True):
            sigma = torch.full((len(images),), level)
            predicted = model(noised(images, sigma, draw).to(device), sigma).argmax(1)
            right += int((predicted == labels.to(device)).sum())
        found.append([level, right / len(part)])
    return found
