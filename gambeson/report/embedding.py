"""t-SNE of several sets of features in one shared plane, small and seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from gambeson.report.material import FeatureSet

MOST_POINTS, LEAST_POINTS = 900, 10


@dataclass(frozen=True)
class EmbeddedSet:
    """Points [n, 2] of one set of features, with their labels [n]."""

    name: str
    points: Float[np.ndarray, "n 2"]
    labels: Integer[np.ndarray, " n"]
    space: str


def embed(sets: Sequence[FeatureSet], seed: int = 0, most: int = MOST_POINTS) -> list[EmbeddedSet]:
    """t-SNE (van der Maaten and Hinton 2008) of all sets together, at most `most` points, the same number from each.

    Raises ValueError for fewer than 10 points in all, for features of different spaces or sizes, or not finite ones.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    chosen = [_sample(each, most // len(sets), seed) for each in sets]
    _check(chosen)
    together = np.concatenate([each.features for each in chosen]).astype(np.float64)
    together = (together - together.mean(axis=0)) / max(float(together.std()), 1e-12)
    start: Any = 1e-4 * _principal(together)  # scikit-learn's stubs know only its names
    perplexity = min(30.0, (len(together) - 1) / 3)
    with threadpool_limits(1):  # several OpenMP threads wait for each other: on a busy machine 20 times slower than one
        plane = TSNE(init=start, perplexity=perplexity, random_state=seed, n_jobs=1).fit_transform(together)
    parts = np.split(np.asarray(plane, dtype=float), np.cumsum([len(each.labels) for each in chosen])[:-1])
    return [EmbeddedSet(c.name, part, c.labels, c.space) for c, part in zip(chosen, parts, strict=True)]


def limits(sets: Sequence[EmbeddedSet]) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) around all points with a margin of 5 %; the axes of t-SNE have no common unit."""
    points = np.concatenate([each.points for each in sets])
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.05 * np.maximum(high - low, 1e-6)
    (left, bottom), (right, top) = low - margin, high + margin
    return float(left), float(right), float(bottom), float(top)


def _principal(centred: np.ndarray) -> np.ndarray:
    """The first two principal coordinates, each of unit spread (0 where the data has none), with a fixed sign."""
    left, size, right = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((len(centred), 2))
    for k in range(min(2, len(size))):
        sign = np.sign(right[k, np.abs(right[k]).argmax()])
        plane[:, k] = sign * left[:, k] * np.sqrt(len(centred)) * (size[k] > 1e-9)
    return plane


def _sample(features: FeatureSet, most: int, seed: int) -> FeatureSet:
    if len(features.labels) <= most:
        return features
    keep = np.sort(np.random.default_rng(seed).permutation(len(features.labels))[:most])
    return FeatureSet(
        name=features.name, features=features.features[keep], labels=features.labels[keep], space=features.space
    )


def _check(sets: Sequence[FeatureSet]) -> None:
    kinds = sorted({(each.space, each.features.shape[1]) for each in sets})
    if len(kinds) > 1:
        raise ValueError(f"t-SNE: expected features of one space and size, got {kinds}")
    if sum(len(each.labels) for each in sets) < LEAST_POINTS:
        raise ValueError(f"t-SNE: expected at least {LEAST_POINTS} points in all")
    broken = [each.name for each in sets if not np.isfinite(each.features).all()]
    if broken:
        raise ValueError(f"t-SNE: expected finite features, got NaN or infinity in {broken}")
