"""Trains a class-conditional diffusion model on the real training images (EDM loss, averaged weights)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gambeson.data.augment import PadCrop
from gambeson.data.datasets import ImageSet
from gambeson.data.mixture import Mixture
from gambeson.errors import require
from gambeson.models.denoiser import EDM, NetworkDenoiser, denoiser_header
from gambeson.models.files import save_tensors
from gambeson.models.unet import UNetSpec
from gambeson.randomness import derive, generator
from gambeson.store import Workspace, stage
from gambeson.training.loop import Optimisation, TrainingState, fit


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """A denoiser and how it is trained."""

    network: UNetSpec = UNetSpec()  # the U-Net
    preconditioning: EDM = EDM()  # what turns the network into a denoiser
    optimisation: Optimisation = Optimisation(
        steps=2000, learning_rate=1e-3, momentum=0.0, weight_decay=0.0, average=0.999
    )  # how it is fitted
    augment: PadCrop = PadCrop(padding=0, flip=False)  # off by default: what is augmented here is generated later
    label_dropout: float = 0.0  # share of labels replaced by the null class (classifier-free guidance)

    def __post_init__(self) -> None:
        require(0 <= self.label_dropout < 1, "label_dropout", "a share from 0 to below 1", self.label_dropout)


@stage(revision=1)
def train_denoiser(work: Workspace, spec: DenoiserTraining, real: ImageSet, *, seed: int) -> None:
    """Writes denoiser.safetensors (averaged weights)."""
    spec.network.check(real.shape)
    network = spec.network.build(real.shape[0], len(real.class_names), derive(seed, "denoiser weights"))
    denoiser = NetworkDenoiser(network, spec.preconditioning, conditional_only=spec.label_dropout == 0)
    mixture = Mixture(real.train, None, 0.0, spec.optimisation.batch_size, derive(seed, "denoiser batches"))
    state = TrainingState.start(network, spec.optimisation)

    def loss_of(step: int) -> torch.Tensor:
        images, labels, _ = mixture.batch(step)
        draw = generator(seed, "denoiser step", step)
        images = spec.augment(images, draw, real.flip_safe)
        return denoiser.loss(images * 2 - 1, labels, draw, spec.label_dropout)

    for step in fit(state, spec.optimisation, loss_of, work):
        if step % 50 == 0 or step == spec.optimisation.steps:
            state.log.append({"step": step, "loss": state.recent_loss(50)})
    header = {**denoiser_header(denoiser), "log": state.log}
    save_tensors(work.folder / "denoiser.safetensors", state.averaged.state_dict(), header)
