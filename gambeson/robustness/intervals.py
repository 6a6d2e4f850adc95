"""The interval of one fraction, which evaluations and reports both need: Wilson's, over independent trials."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import ndtri


@dataclass(frozen=True)
class Interval:
    """An estimate between the ends of its confidence interval; fractions of 1."""

    estimate: float
    low: float
    high: float

    @staticmethod
    def around(estimate: float, centre: float, half: float, lowest: float) -> Interval:
        """centre +- half, cut to [lowest, 1] and never leaving the estimate out."""
        low, high = max(centre - half, lowest), min(centre + half, 1.0)
        return Interval(estimate, float(min(low, estimate)), float(max(high, estimate)))


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval (Wilson 1927) of a fraction: `successes` out of `n` independent trials.

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson: expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z, p = normal_quantile(confidence), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval.around(p, centre, half, 0.0)


def normal_quantile(confidence: float) -> float:
    """z with P(|N(0, 1)| <= z) = confidence. Raises ValueError unless confidence lies between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1 such as 0.95, got {confidence}")
    return float(ndtri((1 + confidence) / 2))
