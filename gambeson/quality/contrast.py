"""ARC: how far real and synthetic images stay apart for networks that an attack tries to confuse (Sehwag et al. 2022).

One discriminator is trained for every radius of a grid and attacked with that radius on images that it has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float
from scipy.integrate import trapezoid

from gambeson.data.imageset import ImageSet
from gambeson.disk import atomic
from gambeson.errors import require
from gambeson.quality.discriminator import (
    REAL,
    Discrimination,
    Once,
    Origin,
    open_discriminator,
    pictures,
    train_discriminator,
    two_sources,
)
from gambeson.quality.measured import Measured
from gambeson.randomness import derive
from gambeson.robustness.attack_losses import Margin
from gambeson.robustness.attacks import APGD, PGD
from gambeson.robustness.inputs import logits_of
from gambeson.robustness.intervals import Interval, wilson
from gambeson.robustness.verdicts import robust_after
from gambeson.store import Artifact, Workspace, stage

CHUNK = 1 << 22
"""Numbers in memory at once where images are drawn again."""
CHANCE = 0.5
"""What a network that cannot tell has, whatever the attack."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The attack that a discriminator must stand; none: clean images."""

    attack: APGD | PGD | None = None  # the attack, with its threat
    batch_size: int = 256  # images in the network at once


@stage(revision=1, reads_test=True)
def try_discriminator(work: Workspace, spec: Trial, trained: Artifact, pair: ImageSet, *, seed: int) -> None:
    """Writes verdicts.parquet: `source` (0 synthetic, 1 real) of each held-out image, and whether it is told rightly
    (`right`), whatever the attack does."""
    device = work.machine.device
    model = open_discriminator(trained, device)
    images, labels = pair.test.images.to(device), pair.test.labels.to(device)
    if spec.attack is None:
        right = logits_of(model, images, spec.batch_size).argmax(1) == labels
    else:
        right = robust_after(spec.attack, model, images, labels, spec.batch_size, seed, work.progress)
    table = pa.table({"source": pair.test.labels.numpy(), "right": right.cpu().numpy()})
    with atomic(work.folder / "verdicts.parquet") as temporary:
        pq.write_table(table, temporary)


def area_over_chance(epsilons: tuple[float, ...], accuracies: np.ndarray) -> np.ndarray:
    """The area [...] between curves [..., E] and chance where they lie above, by trapezoids: pixels times share.

    Below chance counts as chance, which a constant answer reaches under any attack: what is measured is the best
    discriminator.
    """
    return np.asarray(trapezoid(np.maximum(accuracies - CHANCE, 0.0), epsilons, axis=-1))


@dataclass(frozen=True, eq=False)
class Contrast:
    """The curve: whether each held-out image was told rightly by the discriminator of each epsilon, under its attack.

    right [E, N], as many images of either source; real [N], True for real images; epsilons [E] ascending from 0.
    """

    epsilons: tuple[float, ...]
    right: Bool[np.ndarray, "e n"]
    real: Bool[np.ndarray, " n"]

    @property
    def accuracies(self) -> list[Interval]:
        """Robust accuracy at each epsilon with Wilson's interval."""
        return [wilson(int(row.sum()), len(row)) for row in self.right]

    @property
    def largest(self) -> float:
        """The area of sources that are always told apart on this grid."""
        return CHANCE * (self.epsilons[-1] - self.epsilons[0])

    @property
    def area(self) -> float:
        """`area_over_chance` of the curve."""
        return float(area_over_chance(self.epsilons, self.right.mean(1)))

    def above(self, confidence: float = 0.95) -> Bool[np.ndarray, " e"]:
        """Epsilons whose accuracy surely lies above chance: by Wilson's lower end, all of them at once (Bonferroni)."""
        each = 1 - (1 - confidence) / len(self.right)
        return np.array([wilson(int(row.sum()), len(row), each).low > CHANCE for row in self.right])

    def interval(self, seed: int, resamples: int = 1000, confidence: float = 0.95) -> Interval:
        """The area with its percentile interval over held-out images, drawn again jointly along the curve.

        Its lower end is that of the signed area of the epsilons `above` chance, the others counting as chance, so 0
        where there is none: an area without its parts below chance is too large by chance, and of samples of samples
        it is so twice over. That leaves the upper end too high at worst.
        """
        curves, tail = self._resampled(seed, resamples), (1 - confidence) / 2
        surely = np.where(self.above(confidence), curves - CHANCE, 0.0)
        low = max(float(np.quantile(trapezoid(surely, self.epsilons, axis=-1), tail)), 0.0)
        high = float(np.quantile(area_over_chance(self.epsilons, curves), 1 - tail))
        return Interval(self.area, min(low, self.area), max(high, self.area))

    def _resampled(self, seed: int, resamples: int) -> Float[np.ndarray, "r e"]:
        """Accuracies of curves from held-out images with replacement.

        Real and synthetic ones are drawn apart, each with one right and one wrong image added (Agresti and Coull's,
        halved), so that the interval keeps a width where every image is told rightly.
        """
        stream, curves = np.random.default_rng(derive(seed, "contrast")), []
        each = max(CHUNK // self.right.shape[1], 1)
        for start in range(0, resamples, each):
            count = min(each, resamples - start)
            drawn = [_drawn(self.right[:, self.real == kind], count, stream) for kind in (True, False)]
            curves.append((drawn[0] + drawn[1]) / 2)
        return np.concatenate(curves)

    def plain(self) -> dict[str, Any]:
        """Epsilons, accuracies and the ends of their intervals, for a chart."""
        points = self.accuracies
        return {
            "epsilon": list(self.epsilons),
            "accuracy": [p.estimate for p in points],
            "low": [p.low for p in points],
            "high": [p.high for p in points],
        }


def _drawn(right: Bool[np.ndarray, "e n"], count: int, stream: np.random.Generator) -> Float[np.ndarray, "count e"]:
    """Accuracies of `count` samples with replacement of as many images, two pseudo-images added."""
    images = np.concatenate([right, np.ones((len(right), 1), bool), np.zeros((len(right), 1), bool)], axis=1)
    size = images.shape[1]
    weights = stream.multinomial(size, np.full(size, 1 / size), size=count)
    return weights @ images.T.astype(float) / size


@dataclass(frozen=True, kw_only=True)
class AdversarialContrast:
    """ARC: the area above chance of the robust accuracy of discriminators as their epsilon grows; smaller is closer.

    As remembered from PORT, whose text at hand does not spell it out: accuracy at each epsilon is that of a network
    trained for it, and the area lies between the curve and 1/2.
    """

    discrimination: Discrimination = Discrimination()  # how each network is trained; its epsilon is that of the grid
    epsilons: tuple[float, ...] = (0.0, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255)  # the grid, ascending from 0
    attack: APGD | PGD = APGD(steps=40, loss=Margin())  # what the networks must stand; its threat is the grid's
    resamples: int = 1000  # samples of the interval

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.epsilons, self.epsilons[1:], strict=False))
        fits = len(self.epsilons) > 1 and self.epsilons[0] == 0 and ascending
        require(fits, "contrast.epsilons", "two or more ascending numbers from 0 on", self.epsilons)
        require(self.resamples >= 100, "contrast.resamples", "at least 100", self.resamples)

    def curve(self, real: Origin, synthetic: Origin, *, once: Once, seed: int) -> Contrast:
        """Trains and tries the discriminators (stages of `once`, found again where they were made)."""
        spec = self.discrimination
        there, made = (
            pictures(origin, spec.images, seed, name).images
            for origin, name in ((real, "real"), (synthetic, "synthetic"))
        )
        pair = two_sources(spec, there, made, seed)
        right = [self._verdicts(epsilon, pair, once, seed) for epsilon in self.epsilons]
        return Contrast(self.epsilons, np.stack(right), pair.test.labels.numpy() == REAL)

    def _verdicts(self, epsilon: float, pair: ImageSet, once: Once, seed: int) -> np.ndarray:
        spec = replace(self.discrimination, epsilon=epsilon)
        trained = train_discriminator(once, spec, pair, seed=derive(seed, "discriminator"))
        attack = None if spec.threat is None else replace(self.attack, threat=spec.threat)
        tried = once(try_discriminator, Trial(attack=attack), trained, pair, seed=derive(seed, "trial"))
        return pq.read_table(tried.file("verdicts.parquet"))["right"].to_numpy()

    def __call__(self, real: Origin, synthetic: Origin, *, once: Once, seed: int) -> list[Measured]:
        """ARC first, then the discriminators' robust accuracy at every epsilon.

        real: any real images; those that the generator learned from tell of closeness to them, held-out ones of more.
        UserError for images of two shapes and for fewer than 8 of a source.
        """
        return self.rows(self.curve(real, synthetic, once=once, seed=seed), seed)

    def rows(self, curve: Contrast, seed: int) -> list[Measured]:
        """The same from a curve."""
        area = curve.interval(seed, self.resamples)
        held = curve.right.shape[1] // 2
        spec, name = self.discrimination, f"discriminator's accuracy, {self.discrimination.norm} eps"
        arc = Measured(
            name="ARC",
            value=area.estimate,
            low=area.low,
            high=area.high,
            better="lower",
            ideal=0.0,
            space=None,
            real=held,
            synthetic=held,
            randomness=f"held-out images ({self.resamples} samples along the whole curve); the training of the "
            "discriminators is not in it",
            note=f"{spec.norm}, epsilons up to {self.epsilons[-1]:.4g}; sources that are always told apart would have "
            f"{curve.largest:.4g}. Sets that differ in nothing have a little more than 0, since accuracies below "
            f"chance count as chance; the interval then begins at 0.{self._cut(curve)}",
        )
        return [arc] + [
            Measured(
                name=f"{name} {epsilon:.4g}",
                value=point.estimate,
                low=point.low,
                high=point.high,
                better="near",
                ideal=CHANCE,
                space=None,
                real=held,
                synthetic=held,
                randomness="held-out images (Wilson); training is not in it",
            )
            for epsilon, point in zip(self.epsilons, curve.accuracies, strict=True)
        ]

    def _cut(self, curve: Contrast) -> str:
        """A warning where the grid ends before the curve has come down."""
        above = curve.accuracies[-1].low > CHANCE
        return " The curve is still above chance at the end of the grid: the area goes on beyond it." if above else ""
