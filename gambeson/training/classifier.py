"""Trains a classifier on real images, alone or mixed with chosen synthetic ones, by any loss of robustness.losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gambeson.data.augment import PadCrop
from gambeson.data.datasets import ImageSet, Split
from gambeson.data.mixture import Mixture, SyntheticSource
from gambeson.data.synthetic import Chosen
from gambeson.errors import require
from gambeson.models.classifiers import CleanClassifier, classifier_header
from gambeson.models.files import save_tensors
from gambeson.models.resnet import ResNetSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.randomness import derive, generator
from gambeson.robustness.attacks import PGD
from gambeson.robustness.losses import TRADES, PGDAdversarial, Plain
from gambeson.store import Artifact, Workspace, stage
from gambeson.threat import ThreatModel
from gambeson.training.loop import Losses, Optimisation, TrainingState, fit


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """A classifier and how it is trained."""

    network: ResNetSpec | WideResNetSpec = ResNetSpec()  # the architecture
    loss: TRADES | PGDAdversarial | Plain = TRADES()  # what is minimised
    optimisation: Optimisation = Optimisation()  # how it is fitted
    fraction: float = 0.7  # share of each batch that is synthetic, where there are synthetic images
    augment: PadCrop = PadCrop(padding=1, flip=True)  # augmentation of every training image
    validations: int = 8  # how often the averaged weights are measured on the validation images
    threat: ThreatModel | None = None  # threat of the validation's attack; none: the recipe's

    def __post_init__(self) -> None:
        require(0 <= self.fraction <= 1, "fraction", "a share from 0 to 1", self.fraction)
        require(self.validations >= 1, "validations", "at least 1", self.validations)


@stage(revision=1)
def train_classifier(
    work: Workspace, spec: ClassifierTraining, real: ImageSet, chosen: Artifact | None, *, seed: int
) -> None:
    """Writes classifier.safetensors (averaged weights; the curve of loss and validation accuracy in its header)."""
    source = Chosen.open(chosen.file("chosen.parquet")) if chosen is not None else None
    device = work.machine.device
    model = spec.network.build(real.shape[0], len(real.class_names), derive(seed, "classifier weights")).to(device)
    state = TrainingState.start(model, spec.optimisation)
    every = max(spec.optimisation.steps // spec.validations, 1)
    for step in fit(state, spec.optimisation, _loss(spec, model, real, source, seed, device), work):
        if step % every == 0 or step == spec.optimisation.steps:
            record = {"step": step, "loss": state.recent_loss(every)}
            state.log.append({**record, **_validate(state.averaged, real.validation, spec, device)})
    header = {**classifier_header(model, real.shape), "log": state.log}
    save_tensors(work.folder / "classifier.safetensors", state.averaged.state_dict(), header)


def _loss(
    spec: ClassifierTraining,
    model: CleanClassifier,
    real: ImageSet,
    source: SyntheticSource | None,
    seed: int,
    device: str,
) -> Losses:
    """The robust loss, a part of the batch after another; batch norms then see a part at a time."""
    mixture = Mixture(real.train, source, spec.fraction, spec.optimisation.batch_size, derive(seed, "batches"))

    def loss_of(step: int) -> Iterator[Tensor]:
        images, labels, _ = mixture.batch(step)
        draw = generator(seed, "classifier step", step)
        batch = spec.augment(images, draw, real.flip_safe), labels
        model.train()
        for some, own in zip(*(t.tensor_split(spec.optimisation.accumulate) for t in batch), strict=True):
            yield spec.loss(model, some.to(device), own.to(device), draw)

    return loss_of


def _validate(model: nn.Module, part: Split, spec: ClassifierTraining, device: str) -> dict[str, float]:
    """Clean and PGD-10 accuracy of the averaged weights on the validation images (margin loss, one start).

    As many images at a time as a training batch has: what fits there fits here.
    """
    model.eval()
    attack = PGD(threat=spec.threat, steps=10, restarts=1)
    right = {"clean": 0, "robust": 0}
    size = spec.optimisation.batch_size
    for images, labels in zip(part.images.split(size), part.labels.split(size), strict=True):
        images, labels = images.to(device), labels.to(device)
        attacked = attack(model, images, labels)
        with torch.no_grad():
            right["clean"] += int((model(images).argmax(1) == labels).sum())
            right["robust"] += int((model(attacked).argmax(1) == labels).sum())
    return {name: count / len(part) for name, count in right.items()}
