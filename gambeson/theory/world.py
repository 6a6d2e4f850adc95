"""CDP's two-class Gaussian world in 2-D (section 3.1, appendix C.2), and what is measured of labelled points in it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gambeson.models.oracle import GaussianMixture

Points = Float[Tensor, "n 2"]
"""[N, 2] points of the world."""
Classes = Int64[Tensor, " n"]
"""[N] their classes, 0 or 1."""

MEAN = (1.0, 1.0)
"""Mean of class 1, that of class 0 is its negative: CDP's Figure 3 names N(+-1, I)."""


def expected(mean: float = 1.0, std: float = 1.0) -> dict[str, float]:
    """The `statistics` of infinitely many points of N(-+mean (1, 1), std^2 I); by default of the world itself.

    accuracy, agreement: Phi(sqrt(2) mean / std). core: 1 - 2^(-1/4), since |x|^2 / std^2 is
    chi-squared with 2 degrees of freedom.
    """
    between = mean * 2 * math.hypot(*MEAN)
    return {
        "within": std**2,
        "between": between,
        "separation": between / std,
        "accuracy": 0.5 * (1 + math.erf(between / std / 2**1.5)),
        "agreement": 0.5 * (1 + math.erf(between / std / 2**1.5)),
        "core": 1 - 2**-0.25,
        "lobes": 0.0,
        "turn": 0.0,
    }


def two_gaussians() -> GaussianMixture:
    """Class 0 is N(-(1, 1), I), class 1 is N((1, 1), I), both equally likely."""
    mean = torch.tensor(MEAN, dtype=torch.float64)
    return GaussianMixture(
        means=torch.stack([-mean, mean]),
        std=torch.ones(2, dtype=torch.float64),
        weights=torch.full((2,), 0.5, dtype=torch.float64),
        classes=torch.arange(2),
    )


def draw_balanced(count: int, generator: torch.Generator) -> tuple[Points, Classes]:
    """`count` exact draws [count, 2] float32 of the world and their classes, 0 and 1 in turn."""
    classes = torch.arange(count) % 2
    noise = torch.randn((count, 2), generator=generator, dtype=torch.float64)
    return (two_gaussians().means[classes] + noise).float(), classes


def class_means(points: Points, classes: Classes) -> Float[Tensor, "2 2"]:
    """[2, 2] mean of the points of each class."""
    return torch.stack([points[classes == k].mean(0) for k in (0, 1)])


def statistics(points: Points, classes: Classes) -> dict[str, float]:
    """What CDP's Figures 2 to 4 show, as numbers (float64); `expected` has their values in the world itself.

    within: variance of a coordinate within a class (mean over classes and coordinates). between: distance of the class
    means. separation: between / sqrt(within). accuracy: share of points nearest to the mean of their own class.
    agreement: share on the side of the plane that is their class's in the world, by its Bayes rule.
    core: share of a class within half the median distance from its mean: .159 for a Gaussian, 0 for a circle, and far
    points do not move it. lobes: length of the mean of exp(2 i angle) around the class mean, 1 where the points lie at
    two opposite sides, about 1 / sqrt(N / 2) where they lie evenly. turn: degrees between the line of the class means
    and that of the world, up to 180. ValueError unless both classes are there.
    """
    if classes.unique().tolist() != [0, 1]:
        raise ValueError(f"statistics: expected points of the classes 0 and 1, got {classes.unique().tolist()}")
    points = points.double()
    means = class_means(points, classes)
    offset = torch.view_as_complex((points - means[classes]).contiguous())
    own = [offset[classes == k] for k in (0, 1)]
    within = sum(float(z.abs().square().mean()) for z in own) / 4
    apart = means[1] - means[0]
    across = float(apart[1] - apart[0]), float(apart[0] + apart[1])  # sine and cosine of the angle to (1, 1)
    between = float(apart.norm())
    nearest = (points[:, None] - means).norm(dim=2).argmin(1)
    return {
        "within": within,
        "between": between,
        "separation": between / math.sqrt(within) if within > 0 else math.inf,
        "accuracy": float((nearest == classes).double().mean()),
        "agreement": float(((points.sum(1) > 0) == (classes == 1)).double().mean()),
        "core": sum(float((z.abs() < z.abs().quantile(0.5) / 2).double().mean()) for z in own) / 2,
        "lobes": sum(float((z.sgn() ** 2).mean().abs()) for z in own) / 2,
        "turn": math.degrees(abs(math.atan2(*across))),
    }
