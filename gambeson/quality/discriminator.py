"""Networks that learn to tell real images from synthetic ones under attack, and the score that they give an image.

They are classifiers of two classes, trained by `train_classifier` like any other; PORT (Sehwag et al. 2022) measures a
synthetic set by how long they keep apart what an attack moves, and picks the images that look most real to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from gambeson import canonical
from gambeson.data.augment import PadCrop
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.label_safe import Augmentation
from gambeson.data.mixture import SyntheticSource, from_uint8, to_uint8
from gambeson.errors import UserError, require
from gambeson.models.classifiers import load_classifier
from gambeson.models.resnet import ResNetSpec
from gambeson.randomness import derive, uniform
from gambeson.robustness.attack_losses import Network
from gambeson.robustness.inputs import logits_of
from gambeson.robustness.losses import PGDAdversarial, Plain
from gambeson.store import Artifact, Store, Workspace
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, Networks, train_classifier
from gambeson.training.loop import Optimisation
from gambeson.types import Images, PerImage

Once = Callable[..., Artifact]
"""(stage, its part of the recipe, *inputs, seed) -> the finished stage: `Store.once`, or `inside(work)`."""
Origin = Split | SyntheticSource
"""Where images come from: memory, a store, a selection."""
SYNTHETIC, REAL = 0, 1
"""The two classes."""
FOLDS = 2
"""Parts of the synthetic images; each is scored by the network that was trained on the other."""


@dataclass(frozen=True, kw_only=True)
class Discrimination:
    """How a network learns to tell real from synthetic images, as many of either: PGD-AT (Madry et al. 2018)."""

    network: Networks = ResNetSpec()  # the architecture
    norm: Literal["linf", "l2"] = "linf"  # which norm bounds the attack
    epsilon: float = 8 / 255  # radius of the attack, pixels in [0, 1]; 0: trained without one
    steps: int = 10  # steps of the inner attack
    optimisation: Optimisation = Optimisation()  # how it is fitted
    augment: Augmentation = PadCrop(padding=1, flip=False)  # of images of either source; never mirrored
    images: int = 5000  # of either source at most, drawn by the seed
    held_out: float = 0.3  # share of either source that it is not trained on

    def __post_init__(self) -> None:
        require(self.epsilon >= 0, "discrimination.epsilon", "0 or more", self.epsilon)
        require(self.images >= 8, "discrimination.images", "at least 8", self.images)
        require(0 < self.held_out < 1, "discrimination.held_out", "a share between 0 and 1", self.held_out)

    @property
    def threat(self) -> ThreatModel | None:
        """What it withstands; None where it is trained without an attack."""
        return ThreatModel(norm=self.norm, epsilon=self.epsilon) if self.epsilon else None

    @property
    def training(self) -> ClassifierTraining:
        """The training of a classifier that this is."""
        threat = self.threat
        return ClassifierTraining(
            network=self.network,
            loss=Plain() if threat is None else PGDAdversarial(threat=threat, steps=self.steps),
            optimisation=self.optimisation,
            augment=self.augment,
            balanced=True,
            validations=1,
            validation_steps=self.steps if threat else 1,
            threat=threat or ThreatModel(norm=self.norm, epsilon=1 / 255),  # the log attacks in any case
        )


def inside(work: Workspace) -> Once:
    """The `once` of a stage that needs trainings of its own: they lie below its folder, and resume as it does."""
    return Store(work.folder / "trainings", machine=work.machine, say=work.say).once


def pictures(origin: Origin, count: int | None, seed: int, purpose: str) -> Split:
    """`count` of the images with their labels, drawn without replacement, in their order; None, or too many: all.

    All have passed through 8 bits, so that nothing tells the sources apart but what they show.
    """
    size = len(origin)
    require(size > 0, f"{purpose} images", "at least one", 0)
    if count is None or count >= size:
        return _read(origin, np.arange(size))
    draw = np.random.default_rng(derive(seed, purpose))
    return _read(origin, np.sort(draw.choice(size, count, replace=False, shuffle=False)))


def _read(origin: Origin, places: np.ndarray) -> Split:
    if isinstance(origin, Split):
        chosen = torch.from_numpy(places)
        return Split(from_uint8(to_uint8(origin.images[chosen])), origin.labels[chosen])
    pixels, labels = origin.read(places)
    return Split(from_uint8(pixels), torch.from_numpy(labels))


def two_sources(spec: Discrimination, real: Tensor, synthetic: Tensor, seed: int) -> ImageSet:
    """The set of two classes, as many images of either source: [N, C, H, W] and [M, C, H, W], in [0, 1].

    `test` is held out; a tenth of the others is for the log of the training alone. UserError for images of two shapes,
    and for fewer than 8 of a source.
    """
    shapes = [list(part.shape[1:]) for part in (real, synthetic)]
    require(shapes[0] == shapes[1], "synthetic images", f"of the shape {shapes[0]} of the real ones", shapes[1])
    count = min(len(real), len(synthetic), spec.images)
    require(count >= 8, "images of either source", "at least 8", count)
    held = min(max(round(spec.held_out * count), 1), count - 2)
    logged = max((count - held) // 10, 1)
    parts = (_parts(SYNTHETIC, synthetic, count, held, logged, seed), _parts(REAL, real, count, held, logged, seed))
    test, validation, train = (
        Split(torch.cat([p.images for p in pair]), torch.cat([p.labels for p in pair]))
        for pair in zip(*parts, strict=True)
    )
    names = ("synthetic", "real")
    return ImageSet(
        name="two sources", train=train, validation=validation, test=test, class_names=names, flip_safe=False
    )


def _parts(label: int, images: Images, count: int, held: int, logged: int, seed: int) -> list[Split]:
    """Held out, for the log, for the training."""
    draw = torch.Generator().manual_seed(derive(seed, "two sources", label))
    order = torch.randperm(len(images), generator=draw)[:count]
    parts = order.split([held, logged, count - held - logged])
    return [Split(images[places], torch.full((len(places),), label)) for places in parts]


def train_discriminator(once: Once, spec: Discrimination, pair: ImageSet, *, seed: int) -> Artifact:
    """The training of a discriminator on `two_sources`, made, resumed or found; its test part is not read."""
    return once(train_classifier, spec.training, pair, None, seed=seed)


def open_discriminator(trained: Artifact, device: str = "cpu") -> Network:
    """The discriminator, frozen, on the device."""
    return load_classifier(trained.file("classifier.safetensors")).to(device)


def discriminator_scores(model: Network, images: Images) -> PerImage:
    """[B] logit of "real" minus logit of "synthetic": the log odds, larger looks more real.

    PORT's score of a sample is the robust discriminator's word on how synthetic it is, the least synthetic being kept;
    as remembered, from the abstract and summaries, without its code: a probability, which orders the images as log odds
    do. UserError for a network that does not answer with two logits.
    """
    logits = logits_of(model, images, max(len(images), 1))
    require(logits.shape[1] == 2, "discriminator", "two logits (synthetic, real)", logits.shape[1])
    return logits[:, REAL] - logits[:, SYNTHETIC]


def fold_of(positions: Int64[Tensor, " b"], seed: int) -> Int64[Tensor, " b"]:
    """[B] 0 or 1: the part that an image at this position of its source belongs to, drawn by position alone."""
    keys = positions + derive(seed, "fold") % (1 << 62)
    return (uniform(keys, "fold", (1,))[:, 0] * FOLDS).long()


@dataclass(frozen=True)
class Judge:
    """One discriminator with the mean and the deviation of its scores on images that it was not trained on."""

    model: Network
    mean: float
    deviation: float
    accuracy: float  # share of held-out images, as many of either source, that it tells rightly

    def __call__(self, images: Images) -> PerImage:
        """[B] scores in deviations from the mean."""
        return (discriminator_scores(self.model, images) - self.mean) / self.deviation


@dataclass(frozen=True)
class CrossFitted:
    """Scores of synthetic images by two discriminators, each for the half that it was not trained on.

    Both are in units of their own spread over the other's images, so that neither half is favoured for a network that
    speaks louder.
    """

    judges: tuple[Judge, Judge]
    seed: int
    digest: str

    def __call__(self, positions: Int64[Tensor, " b"], images: Images) -> PerImage:
        """[B] scores of images at these positions of the source, larger looks more real."""
        scores, fold = images.new_zeros(len(images)), fold_of(positions, self.seed).to(images.device)
        for trained_on, judge in enumerate(self.judges):
            own = fold != trained_on
            if own.any():
                scores[own] = judge(images[own])
        return scores


@dataclass(frozen=True, kw_only=True)
class DiscriminatorScore:
    """How real an image looks to a discriminator that was trained on other images: the score of PORT, cross-fitted."""

    discrimination: Discrimination = Discrimination()  # how the two discriminators are trained

    def fit(
        self, once: Once, real: Origin, synthetic: SyntheticSource, *, seed: int, device: str = "cpu"
    ) -> CrossFitted:
        """Trains one discriminator on each half of the synthetic images (found again where they were trained before).

        real: images of the real set's train part, which are not scored. UserError for fewer than 8 images in a half.
        """
        spec = self.discrimination
        there = pictures(real, spec.images, seed, "real").images
        halves = [_half(synthetic, fold, spec.images, seed) for fold in range(FOLDS)]
        pairs = [two_sources(spec, there, half, seed) for half in halves]
        trained = [train_discriminator(once, spec, pair, seed=derive(seed, "half", k)) for k, pair in enumerate(pairs)]
        first, second = (
            _judge(open_discriminator(made, device), halves[1 - k].to(device), pairs[k].test)
            for k, made in enumerate(trained)
        )
        digest = canonical.digest({"folds": FOLDS, "seed": seed, "discriminators": [made.digest for made in trained]})
        return CrossFitted((first, second), seed, digest)


def _half(source: SyntheticSource, fold: int, most: int, seed: int) -> Images:
    """Up to `most` images of one half, drawn by the seed."""
    drawn = np.random.default_rng(derive(seed, "halves")).choice(
        len(source), min(len(source), 4 * FOLDS * most), replace=False
    )
    places = drawn[(fold_of(torch.from_numpy(drawn), seed) == fold).numpy()][:most]
    if len(places) < 8:
        raise UserError(
            f"discriminator score: expected at least 8 synthetic images in each of {FOLDS} halves, got {len(places)} "
            f"of {len(source)}; generate more, or take another score"
        )
    return _read(source, np.sort(places)).images


def _judge(model: Network, others: Images, held_out: Split) -> Judge:
    """others: images of the half that the model was not trained on."""
    scores = torch.cat([discriminator_scores(model, part) for part in others.split(500)]).double()
    parts = held_out.images.to(others.device).split(500)
    found = torch.cat([discriminator_scores(model, part) > 0 for part in parts]).cpu()
    deviation = float(scores.std())
    right = (found == (held_out.labels == REAL)).double().mean()
    return Judge(model, float(scores.mean()), deviation if deviation > 0 else 1.0, float(right))
