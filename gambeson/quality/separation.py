"""How far classes lie apart in a feature space: scatter between over within, and nearest centroids across halves.

What contrastive guidance is meant to raise (Contrastive-DP, section 3); synthetic images beside real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gambeson.errors import UserError, require
from gambeson.quality import intervals
from gambeson.quality.measured import Measured
from gambeson.quality.space import Sample, comparable
from gambeson.randomness import generator
from gambeson.robustness.intervals import Interval, wilson
from gambeson.types import Labels


@dataclass(frozen=True)
class Scatter:
    """Traces of the scatters: of the class centroids about the mean of all images, of images about their centroid."""

    between: float
    within: float

    @property
    def ratio(self) -> float:
        """between / within."""
        return self.between / self.within


def scatter(features: Tensor, labels: Labels) -> Scatter:
    """Of features [N, D]; `between` averages over the classes that occur, `within` over the images."""
    z, member = features.double(), _members(labels)
    centres = _centres(z, member)
    within = (z - centres[member]).square().sum(1).mean()
    return Scatter(float((centres - z.mean(0)).square().sum(1).mean()), float(within))


def centroid_hits(features: Tensor, labels: Labels, half: Tensor) -> Tensor:
    """bool [N]: whether the nearest class centroid is the image's own, the centroids being those of the other half.

    half: 0 or 1 for each image [N]. UserError for a class that is missing in one half.
    """
    z, member = features.double(), _members(labels)
    hits = torch.zeros(len(z), dtype=torch.bool)
    for part in (0, 1):
        own, other = half == part, half != part
        seen = len(member[other].unique())
        classes = int(member.max()) + 1
        require(seen == classes, "centroids across halves", f"images of all {classes} classes in each half", seen)
        hits[own] = torch.cdist(z[own], _centres(z[other], member[other])).argmin(1) == member[own]
    return hits


def alike_parts(labels: Labels, number: int, seed: int) -> Tensor:
    """A random part 0 .. number - 1 for each image [N]; the images of a class are spread evenly over the parts."""
    order = torch.randperm(len(labels), generator=generator(seed, "quality/separation", number))
    by_class = order[labels[order].argsort(stable=True)]
    return torch.empty_like(order).scatter(0, by_class, torch.arange(len(order)) % number)


@dataclass(frozen=True, kw_only=True)
class ClassSeparation:
    """Ratio of the scatter between classes to that within, and accuracy of the nearest centroid across random halves.

    Of the synthetic images; `ideal` is what as many real ones have, since few images raise the one and lower the other
    (of the larger set that many are drawn by the seed). The ratio, of real images too, is freed of its bias of order
    1/N (the centroids of few images scatter) by a jackknife over groups of images, which gives its interval as well,
    and is 0 where that falls below; the accuracy's interval is Wilson's, given the centroids of the halves.
    """

    groups: int = 20  # groups of images, alike in their classes, that are left out in turn

    def __post_init__(self) -> None:
        require(self.groups >= 5, "ClassSeparation groups", "at least 5", self.groups)

    def __call__(self, real: Sample, synthetic: Sample, *, seed: int) -> list[Measured]:
        """UserError for other spaces, missing labels, fewer than 2 classes, or a class with fewer than 2 images."""
        comparable(real, synthetic)
        count = min(len(real), len(synthetic))
        real, synthetic = (s.drawn(count, seed, "quality/separation") for s in (real, synthetic))
        theirs, ours = (_checked(s, what) for s, what in ((real, "real images"), (synthetic, "synthetic images")))
        over = f"the distributions' ratio, over images; jackknife of {self.groups} groups alike in classes, seed {seed}"
        halves = f"images, given the centroids of the halves, seed {seed}"
        plain = scatter(ours.features, ours.classes).ratio
        bias = f"; bias of order 1/N taken off: with it {plain:.4g}"
        return [
            _row("class separation", self._ratio(ours, seed), self._ratio(theirs, seed), real, synthetic, over, bias),
            _row("nearest centroid", _accuracy(ours, seed), _accuracy(theirs, seed), real, synthetic, halves),
        ]

    def _ratio(self, sample: Sample, seed: int) -> Interval:
        z, labels = sample.features, sample.classes
        part = alike_parts(labels, self.groups, seed)
        left_out = [scatter(z[part != g], labels[part != g]).ratio for g in range(self.groups)]
        found = intervals.jackknife(scatter(z, labels).ratio, left_out)
        ends = intervals.student(found.corrected, found.error, found.freedom)
        value = max(found.corrected, 0.0)
        return Interval(value, *intervals.around(value, *ends, 0.0))


def _accuracy(sample: Sample, seed: int) -> Interval:
    hits = centroid_hits(sample.features, sample.classes, alike_parts(sample.classes, 2, seed))
    return wilson(int(hits.sum()), len(hits))


def _checked(sample: Sample, what: str) -> Sample:
    """The sample. UserError where its classes cannot be told apart, or have no scatter."""
    classes, counts = sample.classes.unique(return_counts=True)
    require(len(classes) >= 2, f"class separation, {what}", "at least 2 classes", classes.tolist())
    few = classes[counts < 2].tolist()
    if few:
        raise UserError(
            f"class separation, {what}: expected at least 2 images of each class, got 1 of class "
            f"{', '.join(map(str, few[:10]))}; give more images, or leave those classes out"
        )
    spread = scatter(sample.features, sample.classes).within
    require(spread > 0, f"class separation, {what}", "images of a class that differ in their features", spread)
    return sample


def _row(
    name: str, ours: Interval, theirs: Interval, real: Sample, synthetic: Sample, over: str, told: str = ""
) -> Measured:
    return Measured(
        name=name,
        value=ours.estimate,
        low=ours.low,
        high=ours.high,
        better="higher",
        ideal=theirs.estimate,
        space=real.space,
        real=len(real),
        synthetic=len(synthetic),
        randomness=over,
        note=f"as many real images have {theirs.estimate:.4g} ({theirs.low:.4g} to {theirs.high:.4g}){told}",
    )


def _members(labels: Labels) -> Tensor:
    """Labels renumbered 0 .. K - 1 among the classes that occur."""
    return labels.unique(return_inverse=True)[1]


def _centres(z: Tensor, member: Tensor) -> Tensor:
    """Centroids [K, D]."""
    counts = torch.bincount(member)
    return torch.zeros(len(counts), z.shape[1], dtype=z.dtype).index_add_(0, member, z) / counts[:, None]
