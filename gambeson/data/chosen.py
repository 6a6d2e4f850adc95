"""A selection from a store: positions, labels, perhaps soft labels, mapped into memory; never a copy of the images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.compact import compact, open_column, write_column
from gambeson.data.intact import Intact
from gambeson.data.reading import SyntheticStore
from gambeson.data.scores import as_arrow, as_numpy
from gambeson.data.shards import batches_of
from gambeson.disk import atomic
from gambeson.errors import UserError, require
from gambeson.heritage import noted, told, united

ROWS = 1 << 20
"""Rows of a selection that are in memory at once."""
GAP = 8
"""Images between two chosen ones up to which reading on is cheaper than going there."""
HERITAGE = b"gambeson.heritage"
"""Where a selection's Parquet keeps, as JSON, what those who labelled and chose its images carry."""
SOFT = "probabilities"
"""The column of soft labels, where a selection has one."""
_OFF = 1e-2
"""How far from 1 a row of probabilities may add up to: more than rounding to float16 ever moves it."""

Part = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions [n], labels [n] and, in a selection with soft labels, probabilities [n, K]."""


@dataclass(frozen=True)
class Chosen:
    """A selection from a store: positions and labels, never a copy of the images.

    soft: float16 [N, K], the probabilities that are trained on in place of the labels; None: there are none. The labels
    still say what class an image counts for. Beside its Parquet lie all columns as .npy, which are memory-mapped;
    without them the Parquet is read. carries: licences and sets of real images of those that labelled and chose.
    """

    store: SyntheticStore
    positions: np.ndarray
    compact_labels: np.ndarray
    soft: np.ndarray | None = None
    carries: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def write(
        path: Path, store: SyntheticStore, positions: np.ndarray, labels: np.ndarray, soft: np.ndarray | None = None
    ) -> None:
        """Writes positions, labels and soft labels as Parquet; the store's place is kept relative to the file."""
        Chosen.write_parts(path, store, [(positions, labels) if soft is None else (positions, labels, soft)])

    @staticmethod
    def write_all(path: Path, store: SyntheticStore) -> None:
        """Writes the selection of every image with the label it has."""
        pieces = ((start, min(start + ROWS, len(store))) for start in range(0, len(store), ROWS))
        Chosen.write_parts(path, store, ((np.arange(a, b), store.compact_labels[a:b]) for a, b in pieces))

    @staticmethod
    def write_parts(
        path: Path, store: SyntheticStore, parts: Iterable[Part], heritage: Mapping[str, Any] | None = None
    ) -> None:
        """The same from parts, of which the first says whether there are soft labels.

        heritage: what those that labelled and chose carry, noted where there is any. UserError where there is not one
        image, and for rows that are no probabilities.
        """
        count = 0
        with atomic(path) as temporary:
            writer: pq.ParquetWriter | None = None
            try:
                for table in map(_table, parts):
                    noted = table.replace_schema_metadata({**_points_to(path, store), **_noted(heritage or {})})
                    writer = writer or pq.ParquetWriter(temporary, noted.schema, write_page_checksum=True)
                    require(noted.schema == writer.schema, "selection", f"parts like the first, {writer.schema}", noted)
                    writer.write_table(noted)
                    count += len(noted)
            finally:
                if writer is not None:
                    writer.close()
            require(count > 0, "selection", "at least one image; lower the bar, or label the images", "none")
        _write_columns(path)

    @staticmethod
    def open(path: Path, store: SyntheticStore | None = None) -> Chosen:
        """Opens a selection and the store that it points to, whose records are compared (`SyntheticStore.check`).

        store: the one to take in place of that, wherever it lies now; the same images, which nothing here compares.
        UserError for what is no selection, EnvironmentFault, naming the file, for a damaged one.
        """
        with _selection(path) as file, file.intact():
            noted = (file.schema_arrow.metadata or {}).get(b"store")
            if noted is None or not {"position", "label"} <= set(file.schema_arrow.names):
                raise UserError(
                    f"{path}: expected {_WANTED}, got something else ({', '.join(file.schema_arrow.names)}); give the "
                    "folder of the store, or that of a selection"
                )
            carries = dict(json.loads((file.schema_arrow.metadata or {}).get(HERITAGE, b"{}")))
            place = noted.decode()
            columns = [_column(file, path, name) for name in ("position", "label")]
            soft = _rows(file, path) if SOFT in file.schema_arrow.names else None
        found = store or SyntheticStore.open((path.parent / place).resolve()).check()
        return Chosen(found, columns[0], columns[1], soft, told(carries))

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all columns and the store's own: what makes two selections the same input of a stage."""
        state = hashlib.sha256(self.store.digest.encode())
        for column in (self.positions, self.compact_labels, *(() if self.soft is None else (self.soft,))):
            state.update(f"{column.dtype}{column.shape}".encode())
            for start in range(0, len(column), ROWS):
                state.update(np.ascontiguousarray(column[start : start + ROWS]).data)
        return state.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        return self.store.shape

    @property
    def heritage(self) -> dict[str, Any]:
        """What the store's images carry, and those that labelled and chose them."""
        own = {"name": "selection of synthetic images", "images": len(self)}
        both = united(self.store.heritage, self.carries)
        return {**self.store.heritage, **own, **{name: found for name, found in both.items() if found}}

    @property
    def labels(self) -> np.ndarray:
        """[N] int64: the selection's labels; eight bytes each, made anew at every call."""
        return self.compact_labels.astype(np.int64)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, C] and the selection's labels int64 [n]."""
        return self.store.read(self.positions[indices])[0], self.compact_labels[indices].astype(np.int64)

    def soft_rows(self, indices: np.ndarray) -> np.ndarray:
        """[n, K] float32: the probabilities of these images, which add up to 1. UserError without soft labels."""
        if self.soft is None:
            raise UserError("selection: expected one with soft labels (gambeson label --soft), got one without")
        rows = self.soft[indices].astype(np.float32)
        return rows / rows.sum(1, keepdims=True)

    def some(self, indices: np.ndarray) -> Chosen:
        """The selection of some of its images, with the labels that they have here."""
        soft = None if self.soft is None else self.soft[indices]
        return Chosen(self.store, self.positions[indices], self.compact_labels[indices], soft, self.carries)

    def parts(self) -> Iterator[Part]:
        """Its columns for `write_parts`, some rows at a time."""
        for start in range(0, len(self), ROWS):
            piece = slice(start, start + ROWS)
            both = (self.positions[piece], self.compact_labels[piece])
            yield both if self.soft is None else (*both, self.soft[piece])

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


_WANTED = "a selection from a store (chosen.parquet)"


def _selection(path: Path) -> Intact:
    """The file of a selection. UserError where there is none."""
    require(path.is_file(), f"{path}", _WANTED, "none there")
    return Intact(path, _WANTED, "copy it again, or remove its folder and start the command that made it again")


def _table(part: Part) -> pa.Table:
    """A part as a table. UserError for soft labels that are no probabilities."""
    columns: dict[str, Any] = {name: part[i].astype(np.int64) for i, name in enumerate(("position", "label"))}
    if len(part) == 3:
        rows = part[2].astype(np.float16)
        sums = rows.sum(1, dtype=np.float64)  # not a number where a row has one
        right = (
            rows.ndim == 2 and len(rows) == len(part[0]) and bool(((rows >= 0).all(1) & (abs(sums - 1) < _OFF)).all())
        )
        require(right, "soft labels", "a row of probabilities for each image, which add up to 1", rows[:1].tolist())
        columns[SOFT] = as_arrow(rows)
    return pa.table(columns)


def _points_to(path: Path, store: SyntheticStore) -> dict[str, str]:
    """A selection's note of where its store lies, seen from itself."""
    return {"store": os.path.relpath(store.root.resolve(), path.parent.resolve())}


def _noted(heritage: Mapping[str, Any]) -> dict[str, str]:
    """A selection's note of what it carries, where there is anything."""
    found = noted(heritage)
    return {HERITAGE.decode(): json.dumps(found, sort_keys=True)} if found else {}


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
    with _selection(path) as file:
        targets = {name: _column_file(path, name) for name in file.schema_arrow.names}
        for name, target in targets.items():
            with atomic(target) as temporary:
                if name == SOFT:
                    _write_rows(temporary, file)
                else:
                    write_column(temporary, lambda name=name: _pieces(file, name))
    for old in path.parent.glob(f"{path.stem}.{'[0-9a-f]' * 12}.*.npy"):
        if old not in targets.values():
            old.unlink(missing_ok=True)


def _write_rows(path: Path, file: pq.ParquetFile) -> None:
    """The soft labels as .npy, some rows at a time."""
    shape = (file.metadata.num_rows, file.schema_arrow.field(SOFT).type.list_size)
    with open(path, "wb") as handle:
        head = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, head)
        for rows in _soft_pieces(file):
            handle.write(np.ascontiguousarray(rows).data)


def _soft_pieces(file: pq.ParquetFile) -> Iterator[np.ndarray]:
    for batch in batches_of(file, ROWS // 16, [SOFT]):
        yield as_numpy(batch.column(0))


def _rows(file: pq.ParquetFile, path: Path) -> np.ndarray:
    """The soft labels [N, K] float16: mapped, else read."""
    shape = (file.metadata.num_rows, file.schema_arrow.field(SOFT).type.list_size)
    try:
        found = np.load(_column_file(path, SOFT), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        found = None
    right = found is not None and found.shape == shape and found.dtype == np.float16
    return found if right else np.concatenate(list(_soft_pieces(file)))  # type: ignore[return-value]


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
