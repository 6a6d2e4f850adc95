"""Labels and positions of sets too large for 8 bytes an image: the smallest integer type, and an index by class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator

from gambeson.errors import require

CHUNK = 4_000_000
"""Labels that are sorted at once: what the index needs in memory beside itself is 8 bytes for each of these."""


def compact(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers [N] in the smallest of uint8, int8, int16, uint32 (positions), int32 and int64 that holds them."""
    if not len(numbers):
        return numbers.astype(np.uint8)
    low, high = int(numbers.min()), int(numbers.max())
    kinds = (np.uint8, np.int8, np.int16, np.int32, np.uint32, np.int64)
    fits = (kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return numbers.astype(next(fits), copy=False)


def write_column(path: Path, parts: Callable[[], Iterable[np.ndarray]]) -> None:
    """Writes whole numbers as .npy in the smallest type; `parts` is called twice, and gives them a part at a time."""
    low, high, count = 0, 0, 0
    for part in parts():
        if len(part):
            bounds = int(part.min()), int(part.max())
            low, high = (min(low, bounds[0]), max(high, bounds[1])) if count else bounds
            count += len(part)
    kind = compact(np.array([low, high][: 2 * min(count, 1)], np.int64)).dtype
    with open(path, "wb") as handle:
        head = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(handle, head)
        for part in parts():
            handle.write(np.ascontiguousarray(part.astype(kind, copy=False)).data)


def open_column(path: Path, rows: int) -> np.ndarray | None:
    """A memory map of such a file; None where there is none of so many numbers, or a damaged one."""
    try:
        found = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (rows,) and found.dtype.kind in "iu" else None


@dataclass(frozen=True)
class ByClass:
    """Positions grouped by class, 4 bytes each up to 4 billion images; `starts` [classes + 1]. No class is empty."""

    order: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(labels: np.ndarray) -> ByClass:
        """The index of labels [N], which may be -1 (left out). A counting sort in chunks: memory as said above."""
        classes = int(labels.max()) + 1 if len(labels) else 0
        require(classes >= 1, "labels", "at least one image with a class", f"{len(labels)} without")
        counts = np.sum([np.bincount(part[part >= 0], minlength=classes) for part in _chunks(labels)], axis=0)
        free = np.cumsum(counts) - counts  # the next free place of each class
        starts = np.append(free[counts > 0], counts.sum())
        order = np.empty(starts[-1], np.uint32 if len(labels) < 2**32 else np.int64)
        for number, part in enumerate(_chunks(labels)):
            _place(part, number * CHUNK, order, free)
        return ByClass(order, starts)

    def draw(self, count: int, generator: Generator) -> np.ndarray:
        """`count` positions int64, every class equally likely, with replacement."""
        chosen = torch.randint(len(self.starts) - 1, (count,), generator=generator).numpy()
        share = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
        sizes = np.diff(self.starts)[chosen]
        return self.order[self.starts[chosen] + (share * sizes).astype(np.int64)].astype(np.int64)


def _chunks(labels: np.ndarray) -> list[np.ndarray]:
    """Views of the labels, CHUNK each."""
    return [labels[start : start + CHUNK] for start in range(0, len(labels), CHUNK)]


def _place(part: np.ndarray, first: int, order: np.ndarray, free: np.ndarray) -> None:
    """Writes the positions of one chunk behind those of their class, and moves the free places on."""
    inside = part.argsort(kind="stable")
    found, begins = np.unique(part[inside], return_index=True)
    for label, members in zip(found.tolist(), np.split(inside, begins[1:]), strict=True):
        if label >= 0:
            order[free[label] : free[label] + len(members)] = members + first
            free[label] += len(members)
