"""Differences between runs: paired over common seeds, or over the same images with other seeds in each run."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool
from scipy.special import stdtrit

from gambeson.report.rows import Cells
from gambeson.report.statistics import Difference, Interval, paired_difference
from gambeson.robustness.intervals import normal_quantile


def difference(a: Cells, b: Cells, confidence: float = 0.95) -> tuple[Difference, int] | None:
    """Accuracy of `a` minus that of `b` on the images that both have, and how many those are; None for fewer than 2.

    Paired over the seeds that both have; with no common seed over the same images, seeds apart (`apart_difference`).
    """
    images, in_a, in_b = np.intersect1d(a.indices, b.indices, return_indices=True)
    if len(images) < 2:
        return None
    x, y = a.correct[:, in_a], b.correct[:, in_b]
    _, rows_a, rows_b = np.intersect1d(a.seeds, b.seeds, return_indices=True)
    if len(rows_a):
        return paired_difference(x[rows_a], y[rows_b], confidence), len(images)
    return apart_difference(x, y, confidence), len(images)


def apart_difference(
    a: Bool[np.ndarray, "s images"], b: Bool[np.ndarray, "t images"], confidence: float = 0.95
) -> Difference:
    """The accuracy of `a` [S, I] minus that of `b` [T, I]: the same images, but trainings that have nothing in common.

    a[s, i] = mu_a + seed_s + image_i + rest, b likewise with its own seeds. The mean difference of each image over the
    seeds has the variance of images and rests, which its spread over images estimates; each arm's seeds add
    (MS_seed - MS_rest) / (S I), 0 where that is negative or S is 1. Satterthwaite's degrees of freedom (1946). As in
    `paired_difference` two pseudo-images of +-sqrt(1/2) keep a width where all images agree. One seed each: Agresti
    and Min's interval over the images alone. Raises ValueError where the images are not as many.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.size == 0 or b.size == 0:
        raise ValueError(f"apart_difference: expected [S, I] and [T, I] with the same images, got {a.shape}, {b.shape}")
    if len(a) == 1 and len(b) == 1:
        return paired_difference(a, b, confidence)
    extra = [math.sqrt(0.5), -math.sqrt(0.5)]
    x, y = (np.concatenate([v.astype(float), np.tile(p, (len(v), 1))], 1) for v, p in ((a, extra), (b, [0.0, 0.0])))
    each, n = x.mean(0) - y.mean(0), x.shape[1]
    terms = [(each.var(ddof=1) / n, n - 1), *_seed_terms(x), *_seed_terms(y)]
    variance = sum(value for value, _ in terms)
    squares = sum(value**2 / freedom for value, freedom in terms)
    freedom = variance**2 / squares if squares > 0 else math.inf
    least = min(f for value, f in terms if value > 0) if variance > 0 else 1
    quantile = float(stdtrit(max(freedom, least), (1 + confidence) / 2)) if squares > 0 else normal_quantile(confidence)
    estimate = float(a.mean() - b.mean())
    interval = Interval.around(estimate, float(each.mean()), quantile * math.sqrt(variance), -1.0)
    return Difference(estimate, interval.low, interval.high, _randomness(len(a), len(b)))


def _seed_terms(values: np.ndarray) -> list[tuple[float, int]]:
    """(variance, degrees of freedom) that the seeds of one arm add to its mean; none for one seed."""
    s, i = values.shape
    if s == 1:
        return []
    of_seed = values.mean(1)
    rest = values - of_seed[:, None] - values.mean(0) + values.mean()
    ms_seed, ms_rest = i * of_seed.var(ddof=1), (rest**2).sum() / ((s - 1) * (i - 1))
    if ms_seed <= ms_rest:
        return []
    return [(ms_seed / (s * i), s - 1), (-ms_rest / (s * i), (s - 1) * (i - 1))]


def _randomness(a: int, b: int) -> str:
    alone = "; the run with one seed hides how much its training varies" if 1 in (a, b) else ""
    return f"test images and training ({a} and {b} seeds, none in common{alone})"
