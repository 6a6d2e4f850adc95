"""Trains a classifier on real images, alone or mixed with chosen synthetic ones, by any loss of robustness.losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gambeson import distributed
from gambeson.data.augment import PadCrop
from gambeson.data.imageset import ImageSet
from gambeson.data.label_safe import Augmentation, CutMix
from gambeson.data.mixture import LabelledSource, Mixture, SyntheticOrder, check_synthetic
from gambeson.data.synthetic import Chosen
from gambeson.disk import checksum
from gambeson.errors import UserError, require
from gambeson.heritage import noted, told
from gambeson.models.cifar_resnet import CifarResNetSpec
from gambeson.models.classifiers import classifier_header, load_classifier
from gambeson.models.files import header_of, load_tensors, load_weights, save_tensors
from gambeson.models.hub import WEIGHTS, config_of, from_pretrained
from gambeson.models.network import ClassifierNetwork
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.timm_model import TimmSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.randomness import derive
from gambeson.robustness.inputs import NotFinite
from gambeson.robustness.losses import AWP, MART, SCORE, TRADES, Curriculum, GaussianNoise, PGDAdversarial, Plain
from gambeson.store import Artifact, Workspace, stage
from gambeson.threat import ThreatModel
from gambeson.training.batch_norm import average_statistics, share_batch_norm
from gambeson.training.batches import Ahead, Batch, Batches
from gambeson.training.cards import classifier_card
from gambeson.training.journal import Journal
from gambeson.training.loop import Losses, Optimisation, TrainingState, fit, not_finite
from gambeson.training.validation import best_of, check_validation, noisy_accuracy, score_of, validate

Networks = ResNetSpec | WideResNetSpec | PreActResNetSpec | CifarResNetSpec | TimmSpec
"""The architectures that can be trained."""
RobustLosses = TRADES | PGDAdversarial | MART | SCORE | Plain | AWP | Curriculum | GaussianNoise
"""What can be minimised."""


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """A classifier and how it is trained."""

    network: Networks = ResNetSpec()  # the architecture
    loss: RobustLosses = TRADES()  # what is minimised
    optimisation: Optimisation = Optimisation()  # how it is fitted
    fraction: float = 0.7  # share of each batch that is synthetic, where there are synthetic images
    augment: Augmentation = PadCrop(padding=1, flip=True)  # augmentation of every training image
    validations: int = 8  # how often the averaged weights are measured on the validation images
    threat: ThreatModel | None = None  # threat of the validation's attack; none: the recipe's
    augment_synthetic: Augmentation | None = field(
        default=None, metadata={"neutral": None}
    )  # augmentation of synthetic images; none: as the real ones
    mix: CutMix | None = field(default=None, metadata={"neutral": None})  # mixes images and labels of a batch
    smooth_synthetic: float = field(
        default=0.0, metadata={"neutral": 0.0}
    )  # label smoothing of the synthetic images alone, besides the loss's own of all
    balanced: bool = field(default=False, metadata={"neutral": False})  # classes drawn equally often, in either source
    real_repeats: int = field(
        default=1, metadata={"neutral": 1}
    )  # how often a real image stands in its batch, each time with its own augmentation
    epoch_images: int = field(default=50_000, metadata={"neutral": 50_000})  # images that logs call an epoch
    validation_steps: int = field(default=10, metadata={"neutral": 10})  # steps of the validation's PGD
    keep: Literal["last", "best"] = field(
        default="last", metadata={"neutral": "last"}
    )  # whose averaged weights are kept: the end's, or those of the best robust validation accuracy
    patience: int | None = field(
        default=None, metadata={"neutral": None}
    )  # validations without a better one after which training stops; none: never
    batch_norm: Literal["shared", "local"] = field(
        default="shared", metadata={"neutral": "shared"}
    )  # several processes normalise by the whole batch, or each by its own part
    synthetic_order: SyntheticOrder = field(
        default="anywhere", metadata={"neutral": "anywhere"}
    )  # synthetic images drawn from all with replacement, or block by block without: for sets larger than the memory

    def __post_init__(self) -> None:
        require(0 <= self.fraction <= 1, "fraction", "a share from 0 to 1", self.fraction)
        require(0 <= self.smooth_synthetic < 1, "smooth_synthetic", "from 0 to below 1", self.smooth_synthetic)
        for name in ("validations", "real_repeats", "epoch_images", "validation_steps"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.patience is None or self.patience >= 1, "patience", "at least 1, or none", self.patience)
        if not self.takes_soft_labels and (self.mix is not None or self.smooth_synthetic):
            raise UserError(
                "loss: expected one that takes soft labels together with mix or smooth_synthetic (TRADES, "
                "PGDAdversarial, SCORE), got MART, whose margin needs one class for each image"
            )

    @property
    def every(self) -> int:
        """Steps between two validations."""
        return max(self.optimisation.steps // self.validations, 1)

    @property
    def trained_threat(self) -> ThreatModel | None:
        """What the training withstands: the threat of the loss; None for a loss without an attack."""
        loss = _innermost(self.loss)
        return None if isinstance(loss, Plain) else loss.threat

    @property
    def takes_soft_labels(self) -> bool:
        """Whether the loss can be told probabilities in place of one class."""
        return not isinstance(_innermost(self.loss), MART)

    @property
    def noise(self) -> float | None:
        """Standard deviation of the Gaussian noise on the images that are trained on; None without."""
        return self.loss.sigma if isinstance(self.loss, GaussianNoise) else None

    @property
    def layout(self) -> torch.memory_format:
        """Order of the pixels in memory: channels last in bfloat16, where it is twice as fast on a CPU."""
        lower = self.optimisation.precision == "bfloat16"
        return torch.channels_last if lower else torch.contiguous_format


@dataclass(frozen=True)
class Checkpoint:
    """A classifier that training starts from: a folder of `save_pretrained`, a classifier.safetensors of ours, or the
    averaged weights in the state of an unfinished training."""

    place: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights' file. UserError where there is none."""
        path = Path(self.place)
        path = path / WEIGHTS if path.is_dir() else path
        require(path.is_file(), "--from", "a folder or a file with a classifier's weights", self.place)
        return checksum(path)

    @property
    def heritage(self) -> dict[str, Any]:
        """What the weights' file says that it carries."""
        path = Path(self.place)
        found = config_of(path) if path.is_dir() else header_of(path)
        return {"name": path.name, **told(found)}

    def fitting(self, model: ClassifierNetwork) -> ClassifierNetwork:
        """The classifier. UserError, naming both, where its architecture or its classes are not those of `model`."""
        path = Path(self.place)
        if path.is_file() and load_tensors(path)[1].get("kind") == "training":
            return _averaged(path, model)
        found = from_pretrained(path) if path.is_dir() else load_classifier(path)
        have, want = ((m.spec, m.channels, m.classes) for m in (found, model))
        if have != want:
            raise UserError(
                f"{path}: expected the weights of {want[0]} for {want[1]} channels and {want[2]} classes, got those of "
                f"{have[0]} for {have[1]} and {have[2]}; start from another one, or train that architecture"
            )
        return found


def _averaged(path: Path, model: ClassifierNetwork) -> ClassifierNetwork:
    """The averaged weights in a training's state, which has to be of a network like `model`."""
    found, prefix = deepcopy(model), "averaged/"
    tensors = {name[len(prefix) :]: t for name, t in load_tensors(path)[0].items() if name.startswith(prefix)}
    try:
        load_weights(found, tensors, str(path))
    except ValueError as error:
        raise UserError(f"{error}. Expected the state of a training of {model.spec}") from error
    return found


def _innermost(loss: RobustLosses) -> TRADES | PGDAdversarial | MART | SCORE | Plain:
    """The loss inside its wrappers."""
    while isinstance(loss, (AWP, Curriculum, GaussianNoise)):
        loss = loss.loss
    return loss


def check_network(spec: Networks, real: ImageSet) -> None:
    """Raises UserError, at no cost, where this architecture cannot take these images."""
    with torch.device("meta"):
        spec.build(real.shape[0], len(real.class_names)).eval()(torch.zeros(2, *real.shape))


@stage(revision=1, together=True, card=classifier_card)
def train_classifier(
    work: Workspace,
    spec: ClassifierTraining,
    real: ImageSet,
    chosen: Artifact | LabelledSource | None,
    start: Checkpoint | None = None,
    *,
    seed: int,
) -> None:
    """Writes classifier.safetensors: averaged weights; in its header the curve of loss and validation accuracy, the
    best and the last robust accuracy on the validation images, which of them these weights have, and the names of the
    classes.

    chosen: synthetic images to mix in, a selection's stage or the images themselves. start: weights to begin with.
    Raises UserError for synthetic images that do not fit the real ones, for soft labels with MART, for a class without
    validation images, for a start of another architecture, and for a batch smaller than the processes' parts;
    ValueError where the loss is not finite.
    """
    source = Chosen.open(chosen.file("chosen.parquet")) if isinstance(chosen, Artifact) else chosen
    check_validation(real)
    if source is not None:
        check_synthetic(source, real)
    batches = batches_of(spec, real, source, seed)
    _check_targets(spec, batches.mixture)
    model = _network(work, spec, real, start, seed)
    state = TrainingState.start(model, spec.optimisation)
    _ready(work, spec, model)
    _train(work, spec, state, batches, real)
    _write(work, spec, state, real)


def _check_targets(spec: ClassifierTraining, mixture: Mixture) -> None:
    """UserError for soft labels and a loss that needs one class for each image."""
    if mixture.soft is not None and not spec.takes_soft_labels:
        raise UserError(
            "loss: expected one that takes soft labels (TRADES, PGDAdversarial, SCORE) for images with soft labels, "
            "got MART, whose margin needs one class for each image; or label the images without --soft (labeling.soft)"
        )


def _network(
    work: Workspace, spec: ClassifierTraining, real: ImageSet, start: Checkpoint | None, seed: int
) -> ClassifierNetwork:
    model = spec.network.build(real.shape[0], len(real.class_names), derive(seed, "classifier weights"))
    if start is not None:
        model.load_state_dict(start.fitting(model).state_dict())
    return model.to(device=torch.device(work.machine.device), memory_format=spec.layout)  # type: ignore[call-overload]


def _ready(work: Workspace, spec: ClassifierTraining, model: ClassifierNetwork) -> None:
    """What the training network has and its average has not: shared batch norms, compiled kernels."""
    if distributed.together() and spec.batch_norm == "shared":
        share_batch_norm(model)
    if work.machine.compile:
        require(not _perturbs_weights(spec.loss), "--compile", "a loss without AWP", type(spec.loss).__name__)
        model.compile()


def _perturbs_weights(loss: RobustLosses) -> bool:
    return isinstance(loss, AWP) or (isinstance(loss, Curriculum) and isinstance(loss.loss, AWP))


def batches_of(spec: ClassifierTraining, real: ImageSet, source: LabelledSource | None, seed: int) -> Batches:
    """The batches that a training of this seed sees."""
    mixture = Mixture(
        real.train,
        source,
        spec.fraction,
        spec.optimisation.batch_size,
        derive(seed, "batches"),
        balanced=spec.balanced,
        real_repeats=spec.real_repeats,
        synthetic_order=spec.synthetic_order,
    )
    return Batches(
        mixture=mixture,
        real=real,
        seed=seed,
        augment=spec.augment,
        augment_synthetic=spec.augment_synthetic,
        mix=spec.mix,
        smooth_synthetic=spec.smooth_synthetic,
    )


def _train(work: Workspace, spec: ClassifierTraining, state: TrainingState, batches: Batches, real: ImageSet) -> None:
    """All steps, with a validation every now and then."""
    on_cpu = work.machine.device == "cpu"
    ahead = None if on_cpu else Ahead(batches, spec.optimisation.steps)
    losses = losses_of(spec, state, ahead or batches, work.machine.device)
    steps, journal = spec.optimisation.steps, None
    try:
        for step in fit(state, spec.optimisation, losses, work, batches.blame):
            journal = journal or Journal(work.folder, step)
            if distributed.together() and spec.batch_norm == "local":
                average_statistics(state.model)
                average_statistics(state.averaged)
            if step % spec.every == 0 or step == steps:
                _validate(work, spec, state, batches, real)
                journal.write({**state.log[-1], "epoch": step * spec.optimisation.batch_size / spec.epoch_images})
                if _stale(spec, state.log):
                    break
            elif step % max(steps // 100, 1) == 0:
                journal.write({"step": step, "loss": state.losses[-1], "rate": spec.optimisation.rate(step - 1)})
    finally:
        if journal is not None:
            journal.close()
        if ahead is not None:
            ahead.close()


def losses_of(spec: ClassifierTraining, state: TrainingState, batches: Callable[[int], Batch], device: str) -> Losses:
    """The robust loss, a part of the batch after another; batch norms then see a part at a time."""

    def loss_of(step: int) -> Iterator[Tensor]:
        batch, loss = batches(step), spec.loss.at(step / spec.optimisation.steps)
        state.model.train()
        for images, labels in batch.parts(spec.optimisation.accumulate, device, spec.layout):
            yield loss(state.model, images, labels, batch.draw)

    return loss_of


def _validate(
    work: Workspace, spec: ClassifierTraining, state: TrainingState, batches: Batches, real: ImageSet
) -> None:
    """Adds a record to the log; averaged weights better than all before are remembered."""
    steps, size = spec.validation_steps, spec.optimisation.batch_size
    try:
        found = validate(state.averaged, real.validation, spec.threat, steps, size)
    except NotFinite:
        raise not_finite(state.step, math.nan, work, batches.blame) from None
    if spec.noise is not None:
        found["noisy"] = noisy_accuracy(state.averaged, real.validation, spec.noise, size)
    state.log.append({"step": state.step, "loss": state.recent_loss(spec.every), **found})
    if spec.keep == "best" and best_of(state.log)["step"] == state.step:
        state.remember()


def _stale(spec: ClassifierTraining, log: list[dict[str, Any]]) -> bool:
    """Whether too many validations have brought nothing better."""
    since = len(log) - 1 - log.index(best_of(log))
    return spec.patience is not None and since >= spec.patience


def _write(work: Workspace, spec: ClassifierTraining, state: TrainingState, real: ImageSet) -> None:
    """The result."""
    if not distributed.leads():
        return
    best, last = best_of(state.log), state.log[-1]
    kept = best if spec.keep == "best" else last
    tensors = state.best if spec.keep == "best" else state.averaged.state_dict()
    selection = {
        "kept": kept["step"],
        "best": score_of(best),
        "last": score_of(last),
        "best_minus_last": score_of(best) - score_of(last),  # robust overfitting (Rice et al. 2020)
    }
    model = state.averaged
    assert isinstance(model, ClassifierNetwork)
    curves = {"class_names": list(real.class_names), "log": state.log, "selection": selection}
    header = {**classifier_header(model, real.shape), **curves, **noted(work.heritage)}
    if spec.noise is not None:
        header["noise"] = spec.noise
    save_tensors(Path(work.folder) / "classifier.safetensors", tensors, header)
