"""The kernel distance KID: squared maximum mean discrepancy under a cubic kernel, unbiased at any number of images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.quality import intervals
from gambeson.quality.measured import Measured
from gambeson.quality.space import Sample, comparable

ROWS = 512
"""Images whose kernels with all others are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """KID (Binkowski et al. 2018, "Demystifying MMD GANs"): k(x, y) = (x.y / D + 1)^3, the unbiased U-statistic.

    All pairs of up to `most` images are used, where the paper averages over blocks of 1,000: the same mean, less
    chance. The interval is Student's, with the U-statistic's own unbiased variance from groups of images.
    """

    most: int = 10000  # images of either kind that are compared, drawn by the seed
    groups: int = 20  # groups whose mean kernels give the interval

    def __post_init__(self) -> None:
        require(self.groups >= 5, "KernelDistance groups", "at least 5", self.groups)
        require(self.most >= 2 * self.groups, "KernelDistance most", f"at least {2 * self.groups}", self.most)

    def __call__(self, real: Sample, synthetic: Sample, *, seed: int) -> list[Measured]:
        """UserError for other spaces, and for fewer than two images a group."""
        comparable(real, synthetic)
        for what, sample in (("KID, real", real), ("KID, synthetic", synthetic)):
            intervals.enough(what, len(sample), 2 * self.groups, "two a group")
        x, y = (_shuffled(sample, self.most, seed) for sample in (real, synthetic))
        sums = [group_sums(*pair, self.groups) for pair in ((x, x), (y, y), (x, y))]
        value = _unbiased(sums, len(x), len(y))
        low, high = intervals.student(value, _error(sums, len(x), len(y)), self.groups - 1)
        return [
            Measured(
                name="KID",
                value=value,
                low=low,
                high=high,
                better="lower",
                ideal=0.0,
                space=real.space,
                real=len(x),
                synthetic=len(y),
                randomness=f"the distance of the distributions, over images; U-statistic over {self.groups} groups, "
                f"seed {seed}",
                note="unbiased, so it may fall below 0 where the sets are alike",
            )
        ]


def kid(x: Tensor, y: Tensor) -> float:
    """The unbiased KID of features [N, D] and [M, D], over all pairs."""
    return _unbiased([group_sums(*pair, 1) for pair in ((x, x), (y, y), (x, y))], len(x), len(y))


@dataclass(frozen=True)
class GroupSums:
    """Sums of the kernel over the pairs of each two groups [G, G], and over the pairs of an image with itself."""

    pairs: Tensor
    itself: float


def group_sums(x: Tensor, y: Tensor, number: int) -> GroupSums:
    """Sums over consecutive groups of features [N, D] and [M, D]; a block of kernels is in memory at once.

    `itself` is only meant where y is x.
    """
    of_x, of_y = _members(len(x), number), _members(len(y), number)
    scaled = y.double().T / y.shape[1]
    sums = torch.zeros(number, number, dtype=torch.float64)
    for part, member in zip(x.split(ROWS), of_x.split(ROWS), strict=True):
        sums += member.T @ ((part.double() @ scaled + 1).pow(3) @ of_y)
    own = float((x.double().square().sum(1) / x.shape[1] + 1).pow(3).sum())
    return GroupSums(sums, own)


def _members(count: int, number: int) -> Tensor:
    """Indicators float64 [N, G] of `number` consecutive groups whose sizes differ by 1 at most."""
    group = torch.cat([torch.full((len(p),), i) for i, p in enumerate(torch.empty(count).tensor_split(number))])
    return torch.nn.functional.one_hot(group, number).double()


def _shuffled(sample: Sample, most: int, seed: int) -> Tensor:
    """Features of at most that many images, in random order, so that consecutive groups are random ones."""
    return sample.features[torch.cat(intervals.groups(len(sample), 1, seed, "kernel"))[:most]]


def _unbiased(sums: list[GroupSums], n: int, m: int) -> float:
    """MMD^2 over all pairs but those of an image with itself."""
    xx, yy, xy = sums
    within = (xx.pairs.sum() - xx.itself) / (n * (n - 1)) + (yy.pairs.sum() - yy.itself) / (m * (m - 1))
    return float(within - 2 * xy.pairs.sum() / (n * m))


def _error(sums: list[GroupSums], n: int, m: int) -> float:
    """The standard error of the U-statistic over pairs of different groups, which leaves out 1/G of the pairs."""
    number = len(sums[0].pairs)
    a, b = (_members(count, number).sum(0) for count in (n, m))
    h = sums[0].pairs / torch.outer(a, a) + sums[1].pairs / torch.outer(b, b)
    crossed = sums[2].pairs / torch.outer(a, b)
    return math.sqrt(u_variance(h - crossed - crossed.T))


def u_variance(h: Tensor) -> float:
    """Unbiased variance of the mean of h [G, G] off the diagonal, h(i, j) symmetric in independent i and j; G >= 4.

    The square of the mean, less an unbiased estimate of the squared expectation from pairs of pairs that share nothing
    (Hoeffding 1948 has the theory). By chance that may be negative: never less than chance among the pairs alone,
    which is all there is when the two distributions are equal.
    """
    g = len(h)
    h = h - torch.diag(h.diagonal())
    total, rows, squares = float(h.sum()), float(h.sum(1).square().sum()), float(h.square().sum())
    pairs = g * (g - 1)
    expected = (total**2 - 4 * rows + 2 * squares) / (pairs * (g - 2) * (g - 3))
    alone = 2 * max(squares / pairs - (total / pairs) ** 2, 0.0) / pairs
    return max((total / pairs) ** 2 - expected, alone)
