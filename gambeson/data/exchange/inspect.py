"""What a store holds: how many images of which class, their mean and spread, and a few of every class to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gambeson.data.exchange.incoming import block_size
from gambeson.data.exchange.outgoing import BLOCK, class_counts, class_names, numbered, store_of
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.types import Progress, silent

RUN = 256
"""Images that are read in one go where only some are looked at."""
ROWS = 1 << 20


@dataclass(frozen=True)
class Statistics:
    """Numbers about a set; mean and std [C] of pixels in [0, 1] over `looked_at` images, evenly spread ones."""

    images: int
    without_class: int
    per_class: tuple[tuple[str, int], ...]
    shards: int
    bytes_on_disk: int
    looked_at: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def statistics(source: SyntheticStore | Chosen, images: int, report: Progress = silent) -> Statistics:
    """The numbers; `images`: how many are read for mean and std at most. A block is in memory at once."""
    none, counts = class_counts(source.compact_labels)
    names = class_names(source) or numbered(len(counts))
    every = [*counts.tolist(), *[0] * (len(names) - len(counts))]
    store = store_of(source)
    mean, std, looked_at = _moments(source, images, report)
    return Statistics(
        images=len(source),
        without_class=none,
        per_class=tuple(zip(names, every, strict=False)),
        shards=len(store.rows),
        bytes_on_disk=_size(store.root),
        looked_at=looked_at,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
    )


def _moments(source: SyntheticStore | Chosen, images: int, report: Progress) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and standard deviation of each channel, and of how many images: sums of whole numbers, which are exact."""
    channels, done = source.shape[2], 0
    first, second = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    spans = _spans(len(source), images, block_size(source.shape, BLOCK))
    total = sum(stop - start for start, stop in spans)
    for start, stop in spans:
        pixels = source.stretch(start, stop)[0].reshape(-1, channels)
        first += pixels.sum(0, dtype=np.int64)
        second += np.einsum("nc,nc->c", pixels, pixels, dtype=np.int64, casting="safe")
        done += stop - start
        report(done, total)
    count = total * math.prod(source.shape[:2])
    mean = first / count
    return mean / 255, np.sqrt(np.maximum(second / count - mean**2, 0)) / 255, total


def _spans(count: int, images: int, size: int) -> list[tuple[int, int]]:
    """Stretches of positions to look at: all of them, or evenly spread ones of RUN images."""
    if images >= count:
        return [(start, min(start + size, count)) for start in range(0, count, size)]
    runs = max(images // RUN, 1)
    each = min(images, RUN)
    return [(start, start + each) for start in np.linspace(0, count - each, runs).astype(int).tolist()]


def _size(root: Path) -> int:
    """Bytes of the files of a store."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def first_of_each_class(source: SyntheticStore | Chosen, images: int, classes: int) -> dict[int, np.ndarray]:
    """Positions of the first images of the first classes that have any (-1: of none), as many as there are of each."""
    none, counts = class_counts(source.compact_labels)
    there = [*([-1] if none else []), *np.flatnonzero(counts).tolist()][:classes]
    found: dict[int, list[int]] = {label: [] for label in there}
    for start in range(0, len(source), ROWS):
        labels = source.compact_labels[start : start + ROWS]
        for label in (label for label in there if len(found[label]) < images):
            places = np.flatnonzero(labels == label)[: images - len(found[label])]
            found[label] += (places + start).tolist()
    return {label: np.array(places, np.int64) for label, places in found.items()}
