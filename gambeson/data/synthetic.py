"""The sharded store of synthetic images: raw uint8 shards that never change, Parquet beside them, checksums over both.

store.json                  what the store is: image shape, block size, blocks per shard, provenance, number of images
shards/00000.npy            images uint8 [N, H, W, C], readable with numpy alone, memory-mapped by training
shards/00000.parquet        label (-1: generated without a class), block, index within the block, facts of the block
shards/00000.json           rows and checksums: written last, a shard without it does not exist
blocks/000012.npz           finished blocks of the shard that is being filled
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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

    def _read(self, block: int) -> dict[str, np.ndarray]:
        path = self._block_file(block)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if not {"images", "labels"} <= set(arrays.files):
                    raise KeyError(f"it holds {sorted(arrays.files)}")
                return dict(arrays)
        except (ValueError, KeyError, EOFError, BadZipFile) as error:
            raise EnvironmentFault(
                f"{path}: expected a finished block of images, got a damaged file ({error}). Remove it and start the "
                "same command again: that block alone is generated anew"
            ) from error

    def _pack(self, shard: int) -> None:
        parts = [(b, self._read(b)) for b in self._members(shard)]
        images = np.concatenate([p["images"] for _, p in parts])
        columns = {
            "label": np.concatenate([p["labels"] for _, p in parts]),
            "block": np.concatenate([np.full(len(p["labels"]), b) for b, p in parts]),
            "index": np.concatenate([np.arange(len(p["labels"])) for _, p in parts]),
        }
        facts = [name for name in parts[0][1] if name.startswith("fact_")]
        columns |= {name.removeprefix("fact_"): np.concatenate([p[name] for _, p in parts]) for name in facts}
        with atomic(self._shard_file(shard, "npy")) as temporary, open(temporary, "wb") as handle:
            np.save(handle, images)
        with atomic(self._shard_file(shard, "parquet")) as temporary:
            pq.write_table(pa.table(columns), temporary)
        sums = {ending: checksum(self._shard_file(shard, ending)) for ending in ("npy", "parquet")}
        record = {"rows": len(images), "shape": list(images.shape[1:]), "sha256": sums}
        write_json(self._shard_file(shard, "json"), record)
        for block in self._members(shard):
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
        """Compares every file with its checksum. Raises EnvironmentFault naming the first that differs."""
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
    def labels(self) -> np.ndarray:
        """[N] int64: the class each image was generated for."""
        files = [self.root / "shards" / f"{s:05d}.parquet" for s in range(len(self.rows))]
        return np.concatenate([pq.read_table(f, columns=["label"])["label"].to_numpy() for f in files])

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
        return images, self.labels[indices]


@dataclass(frozen=True)
class Chosen:
    """A selection from a store: positions and labels, never a copy of the images."""

    store: SyntheticStore
    positions: np.ndarray
    labels: np.ndarray

    @staticmethod
    def write(path: Path, store: SyntheticStore, positions: np.ndarray, labels: np.ndarray) -> None:
        """Writes positions and labels as Parquet; the store's place is kept relative to the file."""
        place = os.path.relpath(store.root.resolve(), path.parent.resolve())
        table = pa.table({"position": positions, "label": labels}).replace_schema_metadata({"store": place})
        with atomic(path) as temporary:
            pq.write_table(table, temporary)

    @staticmethod
    def open(path: Path) -> Chosen:
        """Opens a selection, and verifies the store that it points to."""
        table = pq.read_table(path)
        place = (table.schema.metadata or {})[b"store"].decode()
        store = SyntheticStore.open((path.parent / place).resolve()).verify()
        return Chosen(store, table["position"].to_numpy(), table["label"].to_numpy())

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, C] and the selection's labels int64 [n]."""
        return self.store.read(self.positions[indices])[0], self.labels[indices]
