"""What several processes work on: images that are written once and mapped into each, and tables of finished parts.

Sent to a process, a tensor takes a file descriptor and a place in shared memory, which containers have little of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gambeson.data.imageset import Split
from gambeson.disk import atomic
from gambeson.errors import EnvironmentFault

_PIECE = 256
"""Images that are copied at once on their way to the disk."""


@runtime_checkable
class Pictures(Protocol):
    """Images and labels that can be had by their numbers."""

    def some(self, which: np.ndarray) -> Split:
        """Those with these numbers, in memory."""
        ...


@dataclass(frozen=True)
class Held:
    """Images in this process: those at `places` of a part."""

    part: Split
    places: np.ndarray

    def some(self, which: np.ndarray) -> Split:
        """Those with these numbers among the places."""
        rows = self.places[which]
        return Split(self.part.images[rows], self.part.labels[rows])


@dataclass(frozen=True)
class Kept:
    """Images on disk (images.npy, labels.npy), which any process can map; nothing else travels."""

    folder: Path

    @staticmethod
    def written(part: Split, places: np.ndarray, folder: Path) -> Kept:
        """Those at `places` of a part, in a folder. Raises EnvironmentFault where the disk is full."""
        _write(part.images, places, folder / "images.npy")
        _write(part.labels, places, folder / "labels.npy")
        return Kept(folder)

    def some(self, which: np.ndarray) -> Split:
        """Copies of those with these numbers."""
        paths = (self.folder / f"{name}.npy" for name in ("images", "labels"))
        mapped = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
        images, labels = (torch.from_numpy(np.array(values[which])) for values in mapped)
        return Split(images, labels)


def _write(values: Tensor, places: np.ndarray, path: Path) -> None:
    """values[places] as a .npy file, piece by piece: neither twice in memory nor by a map, which a full disk kills."""
    kind = values[:0].numpy().dtype
    head = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False}
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {**head, "shape": (len(places), *values.shape[1:])})
        for start in range(0, len(places), _PIECE):
            file.write(values[places[start : start + _PIECE]].contiguous().numpy().tobytes())


def table_at(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a finished part. Raises EnvironmentFault, naming it and what to do, where it is damaged."""
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, "a Parquet table", error) from error


def damaged(path: Path, expected: str, error: Exception) -> EnvironmentFault:
    """What to say of a file that was whole once."""
    told = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return EnvironmentFault(
        f"{path}: expected {expected} that was written by this stage, got a damaged file ({told}). Remove it and start "
        "the same command again: that part alone begins anew"
    )
