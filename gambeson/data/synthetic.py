"""The sharded store of synthetic images: raw uint8 shards that never change, Parquet beside them, checksums over both.

store.json                  what the store is: image shape, block size, blocks per shard, provenance, number of images
shards/00000.npy            images uint8 [N, H, W, C], readable with numpy alone, memory-mapped by training
shards/00000.parquet        label (-1: generated without a class), block, index within the block, facts of the block
shards/00000.json           rows and checksums: written last, a shard without it does not exist
blocks/000012.npz           finished blocks of the shard that is being filled
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson import distributed
from gambeson.data.compact import compact
from gambeson.errors import EnvironmentFault, UserError
from gambeson.store import atomic, checksum, read_json, write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class StoreWriter:
    """Writes blocks in any order; a block that is there is never written again, a crash loses one block at most."""

    root: Path
    blocks: int
    blocks_per_shard: int

    def has(self, block: int) -> bool:
        """Whether a block is finished, alone or inside a shard."""
        return self._shard_file(block // self.blocks_per_shard, "json").exists() or self._block_file(block).exists()

    def put(self, block: int, images: np.ndarray, labels: np.ndarray, facts: Mapping[str, float] | None = None) -> None:
        """Images uint8 [m, H, W, C] and labels int64 [m] of one block; packs its shard when that is full.

        `facts` about the block become columns beside the labels; every block of a store has the same ones.
        """
        columns = {f"fact_{name}": np.full(len(labels), float(value)) for name, value in (facts or {}).items()}
        with atomic(self._block_file(block)) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, images=images, labels=labels, **columns)  # type: ignore[arg-type]
        shard = block // self.blocks_per_shard
        if all(self._block_file(b).exists() for b in self._members(shard)):
            self._pack(shard)

    def finish(self, provenance: dict[str, Any]) -> None:
        """Declares the store whole. Every block must be there."""
        for shard in range(-(-self.blocks // self.blocks_per_shard)):
            if not self._shard_file(shard, "json").exists():
                self._pack(shard)
        with contextlib.suppress(OSError):  # empty by now; a stray block stays where it is
            (self.root / "blocks").rmdir()
        records = [read_json(p) for p in sorted((self.root / "shards").glob("*.json"))]
        header = {"format": FORMAT, "rows": [r["rows"] for r in records], "shape": records[0]["shape"]}
        write_json(self.root / "store.json", {**header, "provenance": provenance})

    def _members(self, shard: int) -> range:
        first = shard * self.blocks_per_shard
        return range(first, min(first + self.blocks_per_shard, self.blocks))

    def _block_file(self, block: int) -> Path:
        return self.root / "blocks" / f"{block:06d}.npz"

    def _shard_file(self, shard: int, ending: str) -> Path:
        return self.root / "shards" / f"{shard:05d}.{ending}"

    @contextlib.contextmanager
    def _opened(self, block: int) -> Iterator[np.lib.npyio.NpzFile]:
        """A finished block, its arrays read when asked for. Raises EnvironmentFault, naming it, for a damaged one."""
        path = self._block_file(block)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if not {"images", "labels"} <= set(arrays.files):
                    raise KeyError(f"it holds {sorted(arrays.files)}")
                yield arrays
        except (ValueError, KeyError, EOFError, BadZipFile) as error:
            raise EnvironmentFault(
                f"{path}: expected a finished block of images, got a damaged file ({error}). Remove it and start the "
                "same command again: that block alone is generated anew"
            ) from error

    def _columns(self, block: int) -> dict[str, np.ndarray]:
        """What stands beside the images of a block."""
        with self._opened(block) as arrays:
            labels = arrays["labels"]
            facts = {name.removeprefix("fact_"): arrays[name] for name in arrays.files if name.startswith("fact_")}
        places = {"block": np.full(len(labels), block), "index": np.arange(len(labels))}
        return {"label": labels, **places, **facts}

    def _images(self, block: int) -> np.ndarray:
        with self._opened(block) as arrays:
            return np.ascontiguousarray(arrays["images"])

    def _pack(self, shard: int) -> None:
        """One shard from its blocks, of whose images one block at a time is in memory."""
        members = self._members(shard)
        parts = [self._columns(b) for b in members]
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        shape = (len(columns["label"]), *self._images(members[0]).shape[1:])
        with atomic(self._shard_file(shard, "npy")) as temporary, open(temporary, "wb") as handle:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(handle, header)  # np.save's bytes, without all of them in memory
            for block in members:
                handle.write(self._images(block).data)
        with atomic(self._shard_file(shard, "parquet")) as temporary:
            pq.write_table(pa.table(columns), temporary)
        sums = {ending: checksum(self._shard_file(shard, ending)) for ending in ("npy", "parquet")}
        record = {"rows": shape[0], "shape": list(shape[1:]), "sha256": sums}
        write_json(self._shard_file(shard, "json"), record)
        for block in members:
            self._block_file(block).unlink()


@dataclass(frozen=True)
class SyntheticStore:
    """A finished store, read by position."""

    root: Path
    rows: tuple[int, ...]
    shape: tuple[int, int, int]
    provenance: dict[str, Any]

    @staticmethod
    def open(path: str | Path) -> SyntheticStore:
        """Opens a store. Raises UserError if there is none, or if another format wrote it."""
        root = Path(path)
        header = root / "store.json"
        if not header.is_file():
            raise UserError(f"{root}: expected a synthetic store (a folder with store.json), found none")
        found = read_json(header)
        if found.get("format") != FORMAT:
            raise UserError(
                f"{header}: expected store format {FORMAT}, got {found.get('format')!r}; "
                "it was written by another version of gambeson: generate it again or use that version"
            )
        return SyntheticStore(root, tuple(found["rows"]), tuple(found["shape"]), found["provenance"])

    def __len__(self) -> int:
        return sum(self.rows)

    def verify(self) -> SyntheticStore:
        """Compares every file with its checksum. Raises EnvironmentFault naming the first that differs.

        Of processes that train together the first compares for all.
        """
        if not distributed.leads():
            return self
        for shard in range(len(self.rows)):
            expected = read_json(self.root / "shards" / f"{shard:05d}.json")["sha256"]
            for ending, digest in expected.items():
                path = self.root / "shards" / f"{shard:05d}.{ending}"
                if not path.is_file() or checksum(path) != digest:
                    raise EnvironmentFault(
                        f"{path}: expected SHA-256 {digest[:16]}..., got "
                        f"{checksum(path)[:16] + '...' if path.is_file() else 'no file'}. The shard is damaged: move "
                        f"the folder {self.root.parent} away and start the same command again to generate it anew"
                    )
        return self

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.rows])

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.load(self.root / "shards" / f"{s:05d}.npy", mmap_mode="r") for s in range(len(self.rows))]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the checksums of the shards: what makes two stores the same input of a stage, at any place."""
        sums = [read_json(self.root / "shards" / f"{s:05d}.json")["sha256"] for s in range(len(self.rows))]
        return hashlib.sha256(repr([sorted(s.items()) for s in sums]).encode()).hexdigest()

    @cached_property
    def compact_labels(self) -> np.ndarray:
        """[N]: the class each image was generated for, one byte each where the classes allow it."""
        return compact(np.concatenate([self._shard_labels(s) for s in range(len(self.rows))]))

    def _shard_labels(self, shard: int) -> np.ndarray:
        table = pq.read_table(self.root / "shards" / f"{shard:05d}.parquet", columns=["label"])
        return compact(table["label"].to_numpy())

    @property
    def labels(self) -> np.ndarray:
        """[N] int64: the class each image was generated for; eight bytes each, made anew at every call."""
        return self.compact_labels.astype(np.int64)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, C] and labels int64 [n] at these positions, in the order asked."""
        indices = np.asarray(indices)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise UserError(f"store indices: expected 0 to {len(self) - 1}, got {indices.min()} to {indices.max()}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        images = np.empty((len(indices), *self.shape), np.uint8)
        for shard in np.unique(shards):
            here = shards == shard
            images[here] = self._maps[shard][indices[here] - self._starts[shard]]
        return images, self.compact_labels[indices].astype(np.int64)


@dataclass(frozen=True)
class Chosen:
    """A selection from a store: positions and labels, never a copy of the images."""

    store: SyntheticStore
    positions: np.ndarray
    compact_labels: np.ndarray

    @staticmethod
    def write(path: Path, store: SyntheticStore, positions: np.ndarray, labels: np.ndarray) -> None:
        """Writes positions and labels as Parquet; the store's place is kept relative to the file."""
        table = pa.table({"position": positions, "label": labels})
        with atomic(path) as temporary:
            pq.write_table(table.replace_schema_metadata(_points_to(path, store)), temporary)

    @staticmethod
    def write_all(path: Path, store: SyntheticStore) -> None:
        """Writes the selection of every image with the label it has; a shard at a time is in memory."""
        fields = {"position": pa.int64(), "label": pa.int64()}
        schema = pa.schema(fields.items(), metadata=_points_to(path, store))
        with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for shard, rows in enumerate(store.rows):
                positions = np.arange(rows) + store._starts[shard]
                labels = store._shard_labels(shard).astype(np.int64)
                writer.write_table(pa.table({"position": positions, "label": labels}, schema=schema))

    @staticmethod
    def open(path: Path) -> Chosen:
        """Opens a selection, and verifies the store that it points to."""
        try:
            with pq.ParquetFile(path) as file:
                place = (file.schema_arrow.metadata or {})[b"store"].decode()
                columns = [_compact_column(file, name) for name in ("position", "label")]
        except (pa.ArrowInvalid, KeyError) as error:
            raise UserError(
                f"{path}: expected a selection from a store (chosen.parquet), got something else ({error}); give the "
                "folder of the store, or that of a selection"
            ) from error
        store = SyntheticStore.open((path.parent / place).resolve()).verify()
        return Chosen(store, *columns)

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over positions, labels and the store's own: what makes two selections the same input of a stage."""
        state = hashlib.sha256(self.store.digest.encode())
        for column in (self.positions, self.compact_labels):
            state.update(f"{column.dtype}{column.shape}".encode() + np.ascontiguousarray(column).data)
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


def _points_to(path: Path, store: SyntheticStore) -> dict[str, str]:
    """A selection's note of where its store lies, seen from itself."""
    return {"store": os.path.relpath(store.root.resolve(), path.parent.resolve())}


def _compact_column(file: pq.ParquetFile, name: str) -> np.ndarray:
    """A column of whole numbers in the smallest type, read piece by piece."""
    pieces = [compact(b.column(0).to_numpy()) for b in file.iter_batches(1 << 20, columns=[name])]
    return compact(np.concatenate(pieces)) if pieces else np.empty(0, np.uint8)


def open_synthetic(path: str | Path) -> SyntheticStore | Chosen:
    """Synthetic images from a store, a stage's folder (its selection, else its store), or a selection's file.

    Checksums are compared. UserError for anything else; a file that others published is imported first (`is_peer`).
    """
    place = Path(path)
    for chosen in (place / "chosen.parquet", place):
        if chosen.is_file() and chosen.suffix == ".parquet":
            return Chosen.open(chosen)
    for store in (place, place / "images"):
        if (store / "store.json").is_file():
            return SyntheticStore.open(store).verify()
    raise UserError(
        f"{place}: expected a synthetic store (a folder with store.json), or a folder with chosen.parquet or "
        f"images/store.json, got {'something else' if place.exists() else 'nothing there'}; files that others "
        "published (.npz, .bin) become a store by import_images, which `gambeson train --synthetic` does by itself"
    )
