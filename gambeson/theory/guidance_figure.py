"""The experiment behind CDP's Figures 2 to 4: what each contrastive guidance does to two Gaussian classes in 2-D.

The denoiser is exact, the encoder the identity (guidance L2-normalises it, so losses see directions), and every variant
is as strong as the others: its shift has the same mean length, relative to the step, along the unguided trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from gambeson.canonical import plain
from gambeson.errors import require
from gambeson.randomness import generator
from gambeson.sampling.contrastive import Debiased, HardNegative, InfoNCE, InfoNCEPaper, SupervisedContrastive
from gambeson.sampling.guidance import Contrastive, ContrastiveGuidance
from gambeson.sampling.levels import TimestepLevels
from gambeson.sampling.pairs import OtherClasses, RealImages, RealNegatives, RealPositives
from gambeson.sampling.samplers import DDIM
from gambeson.sampling.windows import Window
from gambeson.theory.world import Classes, Points, draw_balanced, expected, statistics, two_gaussians
from gambeson.types import Guidance, Step

STARTS = {"N(0, I)": 1.0, "N(0, 4I)": 2.0}
"""CDP's two initialisations (Figures 3 and 4) and the factor on the unit noise, in VP coordinates."""
CLIP = 10.0
"""Bound of one sample's change of eps relative to its eps, far above every mean ratio.

The gradient of a direction grows as 1 / |x|: without a bound a sample that passes the origin is thrown far away.
"""
FRAME = 6.0
"""The drawn part of the plane: both coordinates from -FRAME to FRAME."""
SAMPLER = DDIM(vp_start=True)
LEVELS = TimestepLevels(kind="uniform", steps=50)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is sampled, and how strongly it is guided."""

    images: int = 200  # points of a batch, half of each class
    seeds: int = 8  # batches per variant and start
    ratio: float = 0.25  # mean change of eps relative to mean eps, along the unguided trajectories
    swept: tuple[float, ...] = (0.1, 0.5)  # other ratios at which Figure 2's variants are measured

    def __post_init__(self) -> None:
        """UserError (a ValueError) for numbers out of range."""
        even = self.images >= 8 and self.images % 2 == 0
        require(even, "images", "an even number from 8 on, half of each class", self.images)
        require(self.seeds >= 2, "seeds", "at least 2, so that there is a spread", self.seeds)
        require(min(self.ratio, *self.swept) > 0, "ratio and swept", "numbers above 0", (self.ratio, self.swept))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A panel: its title and its guidance (loss and pairs, the strength still open); none: not guided."""

    name: str
    title: str
    guidance: Contrastive | None = None


def _variant(name: str, title: str, loss: Any, **pairs: Any) -> Variant:
    return Variant(name=name, title=title, guidance=Contrastive(loss=loss, strength=1.0, window=Window(), **pairs))


def variants(images: int) -> tuple[Variant, ...]:
    """All panels. CDP's numbers: InfoNCE temperature .1; hard negatives 10, tau+ .1 (0 where classes are known)."""
    positives, negatives = {"pairs": RealPositives()}, {"pairs": RealNegatives(count=images)}
    return (
        Variant(name="plain", title="no guidance (DDIM)"),
        _variant("infonce", "InfoNCE (code)", InfoNCE()),
        _variant("infonce-paper", "InfoNCE (paper)", InfoNCEPaper()),
        _variant("hnm", "hard negatives (HNM)", HardNegative()),
        _variant("debiased", "debiased", Debiased()),
        _variant("infonce-real-positives", "InfoNCE, real positives", InfoNCE(), **positives),
        _variant("hnm-real-positives", "HNM, real positives", HardNegative(), **positives),
        _variant("infonce-real-negatives", "InfoNCE, real negatives", InfoNCE(), **negatives),
        _variant("hnm-real-negatives", "HNM, real negatives", HardNegative(), **negatives),
        _variant("supervised", "supervised contrastive", SupervisedContrastive()),
        _variant("hnm-conditional", "HNM, class-conditional", HardNegative(tau_plus=0.0), pairs=OtherClasses()),
    )


FIGURE_2 = ("plain", "hnm", "hnm-conditional")
"""The variants of CDP's Figure 2, and the hard negatives without classes between them."""


def coordinates(points: Tensor) -> Tensor:
    """The encoder: a point's features [B, 2] are its coordinates."""
    return points


class Probe:
    """A guidance that shifts nothing and measures the shift of another one: sums of changes of eps and of eps."""

    def __init__(self, inner: ContrastiveGuidance) -> None:
        self.inner, self.change, self.eps = inner, 0.0, 0.0

    def init(self, block: int, generator: Generator | None = None) -> Any:
        """The other one's state."""
        return self.inner.init(block, generator)

    def __call__(self, state: Any, step: Step) -> tuple[None, Any]:
        """(None, the other one's state)."""
        shift, state = self.inner(state, step)
        if shift is not None:
            self.change += float(shift.norm(dim=1).mean()) / step.sigma
            self.eps += float((step.x - step.raw).norm(dim=1).mean()) / step.sigma
        return None, state


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The random numbers of one seed, the same for all variants and starts: noise and real points, their classes."""

    noise: Points
    classes: Classes
    real: RealImages

    @staticmethod
    def of(seed: int, images: int) -> Batch:
        """`images` unit normals, and twice as many points of the world."""
        noise = torch.randn((images, 2), generator=generator(seed, "guidance figure", "noise"))
        points, classes = draw_balanced(2 * images, generator(seed, "guidance figure", "real"))
        # guidance takes real images in [0, 1] for ones in [-1, 1]
        return Batch(noise=noise, classes=torch.arange(images) % 2, real=RealImages((points + 1) / 2, classes))


def sample(batch: Batch, scale: float, guidance: Guidance | None) -> Points:
    """[images, 2] samples, each of its class, from a start of that standard deviation in VP coordinates."""
    steps = SAMPLER(two_gaussians().denoiser, batch.noise * scale, LEVELS.sigmas(), guidance, labels=batch.classes)
    *_, last = steps
    return last.x


CALIBRATION = -1
"""The seed of the batch that strengths are found with; none of the measured ones."""


def calibrate(spec: Contrastive, scale: float, ratio: float, images: int) -> Contrastive:
    """The spec with the strength at which its mean change of eps is `ratio` times the mean eps, without moving along.

    Means are of lengths, over images and guided steps, on the unguided trajectories of a batch of its own.
    """
    batch = Batch.of(CALIBRATION, images)
    probe = Probe(ContrastiveGuidance(spec, coordinates, real=batch.real))
    sample(batch, scale, probe)
    return replace(spec, strength=spec.strength * ratio * probe.eps / probe.change, clip=CLIP)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One variant at one start and ratio: its guidance, statistics per seed, and the first seed's points."""

    variant: Variant
    start: str
    ratio: float | None
    guidance: Contrastive | None
    values: dict[str, list[float]]
    points: Points
    classes: Classes

    def mean(self, name: str) -> float:
        """Mean of a statistic over seeds."""
        return float(torch.tensor(self.values[name], dtype=torch.float64).mean())

    def spread(self, name: str) -> float:
        """Standard deviation of a statistic over seeds."""
        return float(torch.tensor(self.values[name], dtype=torch.float64).std())

    def record(self) -> dict[str, Any]:
        """JSON: names, guidance with its strength, and of each statistic mean, standard deviation and values."""
        numbers = {n: {"mean": self.mean(n), "std": self.spread(n), "values": v} for n, v in self.values.items()}
        return {
            "variant": self.variant.name,
            "title": self.variant.title,
            "start": self.start,
            "ratio": self.ratio,
            "guidance": plain(self.guidance),
            "images_per_seed": len(self.points),
            "seeds": len(self.values["within"]),
            **numbers,
        }


def outside(points: Points) -> float:
    """Share of points beyond the drawn frame."""
    return float((points.abs() > FRAME).any(1).double().mean())


def clipped(guidance: ContrastiveGuidance | None) -> float:
    """Share of a batch's guided samples x steps where the shift was cut to CLIP."""
    return 0.0 if guidance is None else guidance.tally["clipped"] / guidance.tally["guided"]


def measure(setting: Setting, variant: Variant, start: str, ratio: float) -> Result:
    """Samples every seed's batch under the variant, calibrated to `ratio`, and measures the points."""
    scale, spec = STARTS[start], variant.guidance
    if spec is not None:
        spec = calibrate(spec, scale, ratio, setting.images)
    batches = [Batch.of(seed, setting.images) for seed in range(setting.seeds)]
    drawn, rows = [], []
    for batch in batches:
        guidance = None if spec is None else ContrastiveGuidance(spec, coordinates, real=batch.real)
        points = sample(batch, scale, guidance)
        drawn.append(points)
        rows.append({**statistics(points, batch.classes), "outside": outside(points), "clipped": clipped(guidance)})
    return Result(
        variant=variant,
        start=start,
        ratio=None if spec is None else ratio,
        guidance=spec,
        values={name: [row[name] for row in rows] for name in rows[0]},
        points=drawn[0],
        classes=batches[0].classes,
    )


def run(
    setting: Setting,
    told: Callable[[str], None] = lambda line: None,
    starts: Sequence[str] = tuple(STARTS),
    names: Sequence[str] | None = None,
) -> tuple[list[Result], list[Result]]:
    """(every variant at every start; Figure 2's guided variants at the other ratios, from N(0, I)).

    With `names` only these variants, at these starts, and no other ratios.
    """
    panels = []
    known = [v for v in variants(setting.images) if names is None or v.name in names]
    for start in starts:
        told(f"start {start}: {len(known)} variants, {setting.seeds} seeds of {setting.images} samples each")
        panels += [measure(setting, variant, start, setting.ratio) for variant in known]
    if names is not None:
        return panels, []
    told(f"other strengths: {' and '.join(map(str, setting.swept))} of the step instead of {setting.ratio}")
    chosen = [v for v in known if v.name in FIGURE_2 and v.guidance is not None]
    first = next(iter(STARTS))
    return panels, [measure(setting, variant, first, ratio) for variant in chosen for ratio in setting.swept]


def ddim_alone(scale: float) -> dict[str, float]:
    """The expected statistics of unguided samples: DDIM maps noise to class means and variances linearly.

    A step to `lower` keeps g = l + (1 - l) / (1 + sigma^2) of the state, l = lower / sigma: x0-hat is linear in x.
    Accuracy is that of infinitely many points. Euler's steps lose some variance: .93 instead of 1 with these 50.
    """
    levels = LEVELS.sigmas().tolist()
    mean, std = 0.0, scale * math.hypot(1, levels[0])
    for sigma, lower in pairwise(levels):
        share, kept = lower / sigma, 1 / (1 + sigma**2)
        mean = (share + (1 - share) * kept) * mean + (1 - share) * (1 - kept)
        std *= share + (1 - share) * kept
    return expected(mean, std)
