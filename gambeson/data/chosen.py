"""A selection from a store: positions and labels, mapped into memory, and never a copy of the images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.compact import compact, open_column, write_column
from gambeson.data.reading import SyntheticStore
from gambeson.data.shards import batches_of
from gambeson.errors import UserError, require
from gambeson.store import atomic

ROWS = 1 << 20
"""Rows of a selection that are in memory at once."""
GAP = 8
"""Images between two chosen ones up to which reading on is cheaper than going there."""


@dataclass(frozen=True)
class Chosen:
    """A selection from a store: positions and labels, never a copy of the images.

    Beside its Parquet lie both columns as .npy, which are memory-mapped; without them the Parquet is read.
    """

    store: SyntheticStore
    positions: np.ndarray
    compact_labels: np.ndarray

    @staticmethod
    def write(path: Path, store: SyntheticStore, positions: np.ndarray, labels: np.ndarray) -> None:
        """Writes positions and labels as Parquet; the store's place is kept relative to the file."""
        Chosen.write_parts(path, store, [(positions, labels)])

    @staticmethod
    def write_all(path: Path, store: SyntheticStore) -> None:
        """Writes the selection of every image with the label it has."""
        pieces = ((start, min(start + ROWS, len(store))) for start in range(0, len(store), ROWS))
        Chosen.write_parts(path, store, ((np.arange(a, b), store.compact_labels[a:b]) for a, b in pieces))

    @staticmethod
    def write_parts(path: Path, store: SyntheticStore, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """The same from positions and labels that come a part at a time. UserError where there is not one image."""
        schema = pa.schema({"position": pa.int64(), "label": pa.int64()}.items(), metadata=_points_to(path, store))
        count = 0
        with atomic(path) as temporary:
            with pq.ParquetWriter(temporary, schema) as writer:
                for positions, labels in parts:
                    columns = {"position": positions.astype(np.int64), "label": labels.astype(np.int64)}
                    writer.write_table(pa.table(columns, schema=schema))
                    count += len(positions)
            require(count > 0, "selection", "at least one image; lower the bar, or label the images", "none")
        _write_columns(path)

    @staticmethod
    def open(path: Path) -> Chosen:
        """Opens a selection and the store that it points to, whose records are compared (`SyntheticStore.check`)."""
        try:
            with pq.ParquetFile(path) as file:
                place = (file.schema_arrow.metadata or {})[b"store"].decode()
                columns = [_column(file, path, name) for name in ("position", "label")]
        except (pa.ArrowInvalid, KeyError) as error:
            raise UserError(
                f"{path}: expected a selection from a store (chosen.parquet), got something else ({error}); give the "
                "folder of the store, or that of a selection"
            ) from error
        store = SyntheticStore.open((path.parent / place).resolve()).check()
        return Chosen(store, *columns)

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over positions, labels and the store's own: what makes two selections the same input of a stage."""
        state = hashlib.sha256(self.store.digest.encode())
        for column in (self.positions, self.compact_labels):
            state.update(f"{column.dtype}{column.shape}".encode())
            for start in range(0, len(column), ROWS):
                state.update(np.ascontiguousarray(column[start : start + ROWS]).data)
        return state.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        return self.store.shape

    @property
    def labels(self) -> np.ndarray:
        """[N] int64: the selection's labels; eight bytes each, made anew at every call."""
        return self.compact_labels.astype(np.int64)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, C] and the selection's labels int64 [n]."""
        return self.store.read(self.positions[indices])[0], self.compact_labels[indices].astype(np.int64)

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and the selection's labels from `start` to before `stop`; read as `SyntheticStore.stretch` does.

        Positions that lie close are read with what is between them: most selections keep a good share.
        """
        positions = self.positions[start:stop].astype(np.int64)
        require(0 <= start <= stop <= len(self), "positions", f"0 to {len(self)}", (start, stop))
        images = np.empty((len(positions), *self.shape), np.uint8)
        order = np.argsort(positions, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(positions[order]) > GAP) + 1) if len(order) else []:
            first, last = positions[group[0]], positions[group[-1]]
            images[group] = self.store.stretch(int(first), int(last) + 1)[0][positions[group] - first]
        return images, self.compact_labels[start:stop].astype(np.int64)


def _points_to(path: Path, store: SyntheticStore) -> dict[str, str]:
    """A selection's note of where its store lies, seen from itself."""
    return {"store": os.path.relpath(store.root.resolve(), path.parent.resolve())}


def _column_file(path: Path, name: str) -> Path:
    """The .npy of a column, named after the content of the Parquet that it was made from, so that it cannot be stale.

    The content is known by its size, its end (which has the sizes and bounds of all pages), and samples of the rest.
    """
    size = path.stat().st_size
    state = hashlib.sha256(f"{size}".encode())
    with path.open("rb") as file:
        for place in [*range(0, size, max(size // 64, 1 << 12)), max(size - (1 << 16), 0)]:
            file.seek(place)
            state.update(file.read(1 << 16 if size - place <= 1 << 16 else 1 << 12))
    return path.with_name(f"{path.stem}.{state.hexdigest()[:12]}.{name}.npy")


def _write_columns(path: Path) -> None:
    """The columns of a selection as .npy, in place of those of an earlier one."""
    for name in ("position", "label"):
        target = _column_file(path, name)
        with pq.ParquetFile(path) as file, atomic(target) as temporary:
            write_column(temporary, lambda file=file, name=name: _pieces(file, name))
        for old in path.parent.glob(f"{path.stem}.{'[0-9a-f]' * 12}.{name}.npy"):
            if old != target:
                old.unlink(missing_ok=True)


def _pieces(file: pq.ParquetFile, name: str) -> Iterator[np.ndarray]:
    for batch in batches_of(file, ROWS, [name]):
        yield batch.column(0).to_numpy()


def _column(file: pq.ParquetFile, path: Path, name: str) -> np.ndarray:
    """A column of whole numbers in the smallest type: mapped, else read piece by piece."""
    found = open_column(_column_file(path, name), file.metadata.num_rows)
    if found is None:
        pieces = [compact(piece) for piece in _pieces(file, name)]
        found = compact(np.concatenate(pieces)) if pieces else np.empty(0, np.uint8)
    return found
