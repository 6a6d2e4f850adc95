"""Trains a diffusion model on the real training images: EDM's loss or a VP model's, averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from gambeson import distributed
from gambeson.data.augment import NonLeaking, PadCrop
from gambeson.data.datasets import ImageSet, Split
from gambeson.data.mixture import Mixture
from gambeson.errors import UserError, require
from gambeson.heritage import noted
from gambeson.models.denoiser import EDM, VP, NetworkDenoiser, denoiser_header
from gambeson.models.files import save_tensors
from gambeson.models.unet import UNetSpec
from gambeson.randomness import derive, generator, seeded
from gambeson.store import Workspace, stage
from gambeson.training.cards import denoiser_card
from gambeson.training.journal import journal
from gambeson.training.loop import Losses, Optimisation, TrainingState, fit

HELD_OUT = 1000
"""Images, at most, on which the denoising loss is measured in training."""


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """A denoiser and how it is trained."""

    network: UNetSpec = UNetSpec()  # the U-Net
    preconditioning: EDM | VP = EDM()  # what turns the network into a denoiser
    optimisation: Optimisation = Optimisation(
        steps=2000, learning_rate=1e-3, momentum=0.0, weight_decay=0.0, average=0.999
    )  # how it is fitted
    augment: PadCrop = PadCrop(padding=0, flip=False)  # off: it leaks, what is augmented is generated later
    label_dropout: float = 0.0  # share of labels replaced by the null class (classifier-free guidance)
    conditional: bool = field(default=True, metadata={"neutral": True})  # whether it is told the class
    non_leaking: NonLeaking | None = field(
        default=None, metadata={"neutral": None}
    )  # augmentation that the network is told and that is not generated (EDM); none: off
    seed: int | None = field(
        default=None, metadata={"neutral": None}
    )  # its own seed, so that all seeds of a run share one model; none: a model for each seed of the run
    keep: Literal["last", "best"] = field(
        default="last", metadata={"neutral": "last"}
    )  # whose averaged weights are kept: the end's, or those of the least held-out loss, before it copies its images

    def __post_init__(self) -> None:
        require(0 <= self.label_dropout < 1, "label_dropout", "a share from 0 to below 1", self.label_dropout)
        allowed = self.conditional or self.label_dropout == 0
        require(allowed, "label_dropout", "0 without classes (conditional: false)", self.label_dropout)
        counts = "0: it follows from non_leaking"
        require(self.network.augment in (0, self._network.augment), "network.augment", counts, self.network.augment)

    @property
    def _network(self) -> UNetSpec:
        """The network, told as many augmentation parameters as there are."""
        return replace(self.network, augment=self.non_leaking.parameters if self.non_leaking else 0)

    def build(self, shape: tuple[int, int, int], classes: int, seed: int) -> NetworkDenoiser:
        """The untrained denoiser of images [C, H, W]. UserError for sides that the U-Net cannot halve."""
        self.network.check(shape)
        told = classes if self.conditional else 0
        return NetworkDenoiser(
            self._network.build(shape[0], told, seed),
            self.preconditioning,
            spec=self._network,
            classes=told,
            shape=shape,
            conditional_only=self.conditional and self.label_dropout == 0,
        )


@stage(revision=2, together=True, card=partial(denoiser_card, held_out=HELD_OUT))
def train_denoiser(work: Workspace, spec: DenoiserTraining, real: ImageSet, *, seed: int) -> None:
    """Writes denoiser.safetensors (averaged weights; in its header the curves of the loss).

    Every 50 steps `loss` is recorded, the mean since; every eighth of the steps also the averaged weights' `held_out`
    loss on validation images and, with the same noise, the loss on as many `seen` training images: where the first
    rises while the second falls, the model copies. UserError where the best is to be kept without validation images.
    """
    if spec.keep == "best" and not len(real.validation):
        raise UserError(
            f"{real.name}: expected validation images, got none; the denoiser's `keep: best` looks for the least loss "
            "on them. Hold some out, or choose `keep: last`"
        )
    denoiser = spec.build(real.shape, len(real.class_names), derive(seed, "denoiser weights")).to(work.machine.device)
    state = TrainingState.start(denoiser, spec.optimisation)
    averaged = state.averaged
    assert isinstance(averaged, NetworkDenoiser)
    with journal(work.folder) as write:
        for step in fit(state, spec.optimisation, _losses(spec, denoiser, real, seed), work):
            eighths = [8 * done // spec.optimisation.steps for done in (step - 1, step)]
            due = eighths[0] < eighths[1] and distributed.leads()
            measured = _curves(averaged, spec, real, seed) if due else {}
            if measured or step % 50 == 0 or step == spec.optimisation.steps:
                state.log.append({"step": step, "loss": state.recent_loss(50), **measured})
                write({**state.log[-1], "rate": spec.optimisation.rate(step - 1)})
            if spec.keep == "best" and measured and _best_of(state.log)["step"] == step:
                state.remember()
    if distributed.leads():
        header = {**denoiser_header(denoiser), "log": state.log, **noted(work.heritage)}
        if spec.keep == "best":
            averaged.load_state_dict(state.best)
            header["kept"] = _best_of(state.log)["step"]
        save_tensors(work.folder / "denoiser.safetensors", averaged.network.state_dict(), header)


def _best_of(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The first look with the least held-out loss."""
    return min((line for line in log if "held_out" in line), key=lambda line: line["held_out"])


def _losses(spec: DenoiserTraining, denoiser: NetworkDenoiser, real: ImageSet, seed: int) -> Losses:
    mixture = Mixture(real.train, None, 0.0, spec.optimisation.batch_size, derive(seed, "denoiser batches"))
    device, parts = next(denoiser.parameters()).device, spec.optimisation.accumulate

    def loss_of(step: int) -> Iterator[Tensor]:
        images, labels, _ = mixture.batch(step)
        draw = generator(seed, "denoiser step", step)
        images, augmented = spec.augment(images, draw, real.flip_safe), None
        if spec.non_leaking:  # from a generator of its own: the noise is the same with and without
            warps = generator(seed, "denoiser augmentation", step)
            images, augmented = spec.non_leaking(images, warps, real.flip_safe)
            augmented = augmented.to(device)
        told = labels.to(device) if spec.conditional else None
        whole = denoiser.noised((images * 2 - 1).to(device), told, draw, spec.label_dropout, augmented)
        batch = distributed.share(whole.split(distributed.shares(len(images))))  # each process makes all, keeps its own
        for part, some in enumerate(batch.split(parts), distributed.rank() * parts):
            with seeded(derive(seed, "denoiser dropout", step, part), device):
                losses = denoiser.errors(some)
            yield losses

    return loss_of


def _curves(averaged: NetworkDenoiser, spec: DenoiserTraining, real: ImageSet, seed: int) -> dict[str, float]:
    """The loss on held-out and on as many seen images, noise and choice always the same; {} without validation."""
    count = min(len(real.validation), len(real.train), HELD_OUT)
    parts = {"held_out": real.validation, "seen": real.train} if count else {}
    size = spec.optimisation.batch_size
    return {
        name: mean_loss(averaged, part, count, size, generator(seed, "denoiser curves")) for name, part in parts.items()
    }


@torch.no_grad()
def mean_loss(denoiser: NetworkDenoiser, part: Split, count: int, size: int, draw: Generator) -> float:
    """The mean training loss over `count` images of a part that `draw` picks, `size` at a time."""
    device, total = next(denoiser.parameters()).device, 0.0
    for chosen in torch.randperm(len(part), generator=draw)[:count].split(size):
        images = (part.images[chosen] * 2 - 1).to(device)
        labels = part.labels[chosen].to(device) if denoiser.classes else None
        total += denoiser.loss(images, labels, draw).sum().item()
    return total / count
