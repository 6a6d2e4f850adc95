"""The classification accuracy score: train on synthetic images, test on real ones (Ravuri & Vinyals 2019).

Beside it stands the same training on as many real images, since the score alone tells of the training as much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gambeson.data.imageset import ImageSet, Split
from gambeson.data.mixture import LabelledSource, check_synthetic
from gambeson.errors import require
from gambeson.models.classifiers import load_classifier
from gambeson.quality.discriminator import Once, Origin, pictures
from gambeson.quality.measured import Measured
from gambeson.randomness import derive
from gambeson.robustness.attacks import APGD, PGD
from gambeson.robustness.inputs import logits_of
from gambeson.robustness.intervals import Interval
from gambeson.robustness.losses import Plain
from gambeson.robustness.verdicts import robust_after
from gambeson.store import Artifact
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, train_classifier

Verdicts = dict[str, np.ndarray]
"""What is measured ("accuracy", "robust accuracy ...") -> bool [seeds, images]."""


@dataclass(frozen=True, kw_only=True)
class TrainOnSynthetic:
    """Accuracy on real images of classifiers trained on synthetic ones alone, and of those trained on as many real."""

    training: ClassifierTraining = ClassifierTraining(
        loss=Plain(), threat=ThreatModel(), validations=1
    )  # how both are trained; the weights of the end are kept, since real images must not choose them
    images: int | None = None  # training images of either kind at most; none: as many as both sources have
    attack: APGD | PGD | None = None  # measures robust accuracy too, under its own threat; none: clean alone
    seeds: int = 1  # trainings of either kind
    batch_size: int = 256  # images in the network at once where it is tested

    def __post_init__(self) -> None:
        require(self.seeds >= 1, "train_on_synthetic.seeds", "at least 1", self.seeds)
        require(self.images is None or self.images >= 1, "train_on_synthetic.images", "1 or more", self.images)
        whole = self.training.keep == "last" and self.training.patience is None
        require(whole, "train_on_synthetic.training", "keep 'last' and no patience", self.training.keep)

    def __call__(
        self,
        real: ImageSet,
        synthetic: LabelledSource,
        *,
        held_out: Split,
        once: Once,
        seed: int,
        device: str = "cpu",
    ) -> list[Measured]:
        """The score, the accuracy of the same training on real images, and their paired difference.

        real: its train part is the other side; its validation part only goes into the training's log. held_out: real
        images in neither. The trainings are stages of `once`. UserError for synthetic images that do not fit the real
        ones, or that lack a class.
        """
        check_synthetic(synthetic, real)
        require(len(held_out) > 0, "held-out images", "at least one", 0)
        count = min(len(real.train), len(synthetic), self.images or len(real.train))
        origins: dict[str, Origin] = {"synthetic": synthetic, "real": real.train}
        found: dict[str, Verdicts] = {}
        nothing = Split(real.train.images[:0], real.train.labels[:0])  # what is trained depends on no test image
        for kind, origin in origins.items():
            drawn = pictures(origin, count, derive(seed, "train on"), kind)
            found[kind] = self._trained(replace(real, train=drawn, test=nothing), held_out, once, seed, device)
        names = list(found["real"])
        return [row for name in names for row in self._rows(name, found, count, len(held_out))]

    def _trained(self, images: ImageSet, held_out: Split, once: Once, seed: int, device: str) -> Verdicts:
        runs = [
            self._tested(once(train_classifier, self.training, images, None, seed=derive(seed, run)), held_out, device)
            for run in range(self.seeds)
        ]
        return {name: np.stack([run[name] for run in runs]) for name in runs[0]}

    def _tested(self, trained: Artifact, held_out: Split, device: str) -> Verdicts:
        model = load_classifier(trained.file("classifier.safetensors")).to(device)
        images, labels = held_out.images.to(device), held_out.labels.to(device)
        right = logits_of(model, images, self.batch_size).argmax(1) == labels
        found = {"accuracy": right.cpu().numpy()}
        if self.attack is not None:
            stood = robust_after(self.attack, model, images, labels, self.batch_size)
            found[f"robust accuracy ({self.attack.threat})"] = stood.cpu().numpy()
        return found

    def _rows(self, name: str, found: dict[str, Verdicts], count: int, held_out: int) -> list[Measured]:
        """Of one kind of accuracy: trained on synthetic, on real, and the difference."""
        from gambeson.report.statistics import Difference, mean_accuracy, paired_difference

        synthetic, real = found["synthetic"][name], found["real"][name]
        gap = paired_difference(synthetic, real)
        over = "held-out real images" + (f" and training ({self.seeds} seeds)" if self.seeds > 1 else "; not training")
        note = f"{count} training images of either kind, {self.training.optimisation.steps} steps."
        rows: list[tuple[str, Interval | Difference, float | None, int, int]] = [
            (f"{name} on real images, trained on synthetic", mean_accuracy(synthetic), None, 0, count),
            (f"{name} on real images, trained on as many real", mean_accuracy(real), None, count, 0),
            (f"{name}, trained on synthetic minus on real", gap, 0.0, count, count),
        ]
        return [
            Measured(
                name=label,
                value=interval.estimate,
                low=interval.low,
                high=interval.high,
                better="higher",
                ideal=ideal,
                space=None,
                real=of_real + held_out,
                synthetic=made,
                randomness=over,
                note=note,
            )
            for label, interval, ideal, of_real, made in rows
        ]
