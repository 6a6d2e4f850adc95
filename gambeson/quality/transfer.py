"""Robustness transfer: what a classifier withstands on synthetic images beside what it withstands on real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxtyping import Bool
from torch import Tensor

from gambeson.data.imageset import Split
from gambeson.errors import UserError, require
from gambeson.quality.discriminator import Origin, pictures
from gambeson.quality.measured import Measured
from gambeson.randomness import derive
from gambeson.robustness.attack_losses import Margin, Network
from gambeson.robustness.attacks import APGD, PGD
from gambeson.robustness.inputs import logits_of
from gambeson.robustness.intervals import Interval, wilson
from gambeson.robustness.verdicts import robust_after
from gambeson.threat import ThreatModel


def newcombe(a: tuple[int, int], b: tuple[int, int], confidence: float = 0.95) -> Interval:
    """p_a - p_b of two independent samples, each (successes, trials): the hybrid score interval of Newcombe (1998,
    "Interval estimation for the difference between independent proportions", method 10), made of Wilson's.

    Raises ValueError as `wilson` does.
    """
    first, second = wilson(*a, confidence), wilson(*b, confidence)
    difference = first.estimate - second.estimate
    below = math.hypot(first.estimate - first.low, second.high - second.estimate)
    above = math.hypot(first.high - first.estimate, second.estimate - second.low)
    return Interval(difference, max(difference - below, -1.0), min(difference + above, 1.0))


@dataclass(frozen=True)
class Verdict:
    """How often a classifier is right about some images, clean and under attack: [N] each."""

    clean: Bool[Tensor, " n"]
    robust: Bool[Tensor, " n"]

    def counts(self, kind: str) -> tuple[int, int]:
        """(how many are right, how many there are); kind: clean or robust."""
        found: Tensor = getattr(self, kind)
        return int(found.sum()), len(found)


@dataclass(frozen=True, kw_only=True)
class RobustnessTransfer:
    """A classifier's clean and robust accuracy on synthetic and on real images, and the differences real - synthetic.

    PORT bounds the difference of robustness by a distance of the distributions (as remembered for the mean smallest
    perturbation, which is not the accuracy at one epsilon): no bound is claimed here.
    """

    threat: ThreatModel = ThreatModel()  # the ball of the attack
    attack: APGD | PGD = APGD(steps=40, loss=Margin())  # what the classifier must stand; its threat is the one above
    images: int = 1000  # of either source at most, drawn by the seed
    batch_size: int = 256  # images in the network at once

    def __post_init__(self) -> None:
        require(self.images >= 1, "transfer.images", "at least 1", self.images)
        require(self.batch_size >= 1, "transfer.batch_size", "at least 1", self.batch_size)

    def __call__(
        self, model: Network, real: Origin, synthetic: Origin, *, seed: int, name: str = "", device: str = "cpu"
    ) -> list[Measured]:
        """Accuracies and differences, clean and robust.

        model: images in [0, 1] -> logits, on the device, in eval mode (`Named.open`). real: images that it was not
        trained on; synthetic: labelled ones. name: what a reader is told that the model is. UserError for images
        without a class, ValueError where model and images do not fit.
        """
        drawn = {
            kind: _labelled(pictures(origin, self.images, derive(seed, "transfer"), kind), kind)
            for kind, origin in (("real", real), ("synthetic", synthetic))
        }
        found = {kind: self._judged(model, part, device, seed) for kind, part in drawn.items()}
        note = " ".join(filter(None, (f"Classifier: {name}." if name else "", _imbalance(drawn))))
        return [row for kind in ("clean", "robust") for row in self._rows(kind, found, note)]

    def _judged(self, model: Network, part: Split, device: str, seed: int) -> Verdict:
        images, labels = part.images.to(device), part.labels.to(device)
        clean = logits_of(model, images, self.batch_size).argmax(1) == labels
        attack = replace(self.attack, threat=self.threat)
        return Verdict(clean, robust_after(attack, model, images, labels, self.batch_size, derive(seed, "attack")))

    def _rows(self, kind: str, found: dict[str, Verdict], note: str) -> list[Measured]:
        """Two accuracies and their difference."""
        name = "accuracy" if kind == "clean" else f"robust accuracy ({self.threat})"
        counts = {source: verdict.counts(kind) for source, verdict in found.items()}
        sizes = {source: total for source, (_, total) in counts.items()}
        rows = [
            Measured(
                name=f"{name} on {source} images",
                value=(rate := wilson(*counts[source])).estimate,
                low=rate.low,
                high=rate.high,
                better="higher",
                ideal=None,
                space=None,
                real=sizes["real"] if source == "real" else 0,
                synthetic=sizes["synthetic"] if source == "synthetic" else 0,
                randomness=f"{source} images (Wilson)",
                note=note,
            )
            for source in ("real", "synthetic")
        ]
        gap = newcombe(counts["real"], counts["synthetic"])
        transfer = Measured(
            name=f"transfer of {name}, real minus synthetic",
            value=gap.estimate,
            low=gap.low,
            high=gap.high,
            better="near",
            ideal=0.0,
            space=None,
            **sizes,
            randomness="real and synthetic images, two independent samples (Newcombe)",
            note=note,
        )
        return [*rows, transfer]


def _labelled(part: Split, kind: str) -> Split:
    """The part. UserError where an image has no class."""
    missing = int((part.labels < 0).sum())
    if missing:
        raise UserError(
            f"{kind} images: expected a class for each, got none for {missing} of {len(part)}; let a teacher label "
            "them first"
        )
    return part


def _imbalance(drawn: dict[str, Split]) -> str:
    """A word where the two sets' classes are of other shares: then a difference is one of the classes too."""
    classes = 1 + max(int(part.labels.max()) for part in drawn.values())
    real, synthetic = (part.labels.bincount(minlength=classes) / len(part) for part in drawn.values())
    apart = float((real - synthetic).abs().sum() / 2)
    few = math.sqrt(classes * sum(1 / len(part) for part in drawn.values()))  # more than chance draws
    return f"The classes' shares differ by {apart:.0%} between the sets, which is in it." if apart > few else ""
