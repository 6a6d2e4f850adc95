"""Writing a store: each block has its own place in its shard's file, so that any process writes any block, unasked.

shards/00000.npy.part   a shard that is being filled; a block's pixels are written where they will stay
blocks/000012.npz       marker of a block: shape, labels, facts, CRC-32 of its pixels; written after them, atomically
Whoever sees all markers of a shard finalises it; two that do so at once write the same bytes. There are no locks.
In the mirror of an object store a block is an object there first (remote.py), and this folder where shards are made.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.remote import RemoteStore
from gambeson.data.shards import FORMAT, INDEX, WORTH_AN_INDEX, disk, head_of, write_index, write_labels
from gambeson.disk import atomic, checksum, read_json, write_json
from gambeson.errors import EnvironmentFault, UserError, require
from gambeson.heritage import inherited as inherited

PIECE = 1 << 22
"""Bytes of a shard that are in memory at once while it is checked."""
DAMAGED = (ValueError, KeyError, EOFError, RuntimeError, BadZipFile, zlib.error)  # RuntimeError: "it is encrypted"
PROVENANCE = b"gambeson.provenance"
"""Where a shard's Parquet keeps, as JSON, what its images were made of."""


@dataclass(frozen=True)
class Marker:
    """What is known of a written block besides its pixels; `images` only where its place was not known yet."""

    shape: tuple[int, ...]  # rows, height, width, channels
    labels: np.ndarray
    facts: dict[str, np.ndarray]
    crc: int
    images: np.ndarray | None = None

    @staticmethod
    def of(images: np.ndarray, labels: np.ndarray, facts: Mapping[str, float], carry: bool) -> Marker:
        """The marker of a block; with its images in it if it has to carry them."""
        columns = {name: np.full(len(labels), float(value)) for name, value in facts.items()}
        return Marker(images.shape, labels, columns, zlib.crc32(images.data), images if carry else None)

    @staticmethod
    def read(path: Path) -> Marker | None:
        """The marker in a file; None where it is not there or damaged, which is the same: the block is written anew."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            images, labels = found.get("images"), found["labels"]
            if images is not None and "shape" not in found:  # a whole block, as the first versions of this store had it
                found |= {"shape": np.array(images.shape), "crc": np.array(zlib.crc32(images))}
            facts = {name.removeprefix("fact_"): found[name] for name in found if name.startswith("fact_")}
            return Marker(tuple(found["shape"].tolist()), labels, facts, int(found["crc"]), images)
        except (FileNotFoundError, NotADirectoryError, *DAMAGED):
            return None

    def write(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        with atomic(path) as temporary:
            temporary.write_bytes(self.packed())

    def packed(self) -> bytes:
        """The content of its file: npz, each array with its own checksum."""
        arrays = {f"fact_{name}": column for name, column in self.facts.items()}
        carried = {} if self.images is None else {"images": self.images}
        own = {"shape": np.array(self.shape), "labels": self.labels, "crc": np.array(self.crc)}
        file = io.BytesIO()
        np.savez(file, **arrays, **carried, **own)  # type: ignore[arg-type]  # a cut list of them lacks the last
        return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class StoreWriter:
    """Writes blocks in any order, from any number of processes and machines that share a folder.

    A block that is there is never written again; a process that is killed loses the block that it was writing. All
    blocks have the same number of images but the last. Two writers of one block should bring the same pixels; where
    they do not, its checksum fails and it is written anew. `origin`: what the images are made of, kept as JSON in each
    shard's Parquet (and not part of the store's digest: equal images stay equal, whoever made them).
    """

    root: Path
    blocks: int
    blocks_per_shard: int
    origin: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        require(self.blocks >= 1, "blocks", "at least 1", self.blocks)
        require(self.blocks_per_shard >= 1, "blocks_per_shard", "at least 1", self.blocks_per_shard)

    def has(self, block: int) -> bool:
        """Whether a block is written, in a finished shard or in one that is being filled."""
        shard = block // self.blocks_per_shard
        if self._shard_file(shard, "json").exists() or self._marker(block).exists():
            return True
        return self._remote is not None and self._remote.knows(shard, block)

    def missing(self) -> list[int]:
        """Blocks that are to be written still; finalises shards of which all are there, and finds torn blocks."""
        if self._remote is not None:
            self._remote.survey()
        for shard in range(self._shards):
            self.complete(shard)
        return [block for block in range(self.blocks) if not self.has(block)]

    def put(self, block: int, images: np.ndarray, labels: np.ndarray, facts: Mapping[str, float] | None = None) -> None:
        """Images uint8 [m, H, W, C] and labels int [m] of one block; finalises its shard when that is full.

        `facts` about the block become columns beside the labels; every block of a store has the same ones. UserError
        for another type or shape than the other blocks have.
        """
        require(0 <= block < self.blocks, "block", f"0 to {self.blocks - 1}", block)
        _check(images, labels)
        if self.has(block):
            return
        images, facts = np.ascontiguousarray(images), facts or {}
        whole = Marker.of(images, labels, {name: float(value) for name, value in facts.items()}, carry=True)
        if self._remote is None or self._remote.put(block, whole.packed()):
            self._place(block, whole)
        self.complete(block // self.blocks_per_shard)

    def finish(self, provenance: dict[str, Any]) -> None:
        """Declares the store whole: labels.npy, then store.json. Any process may, also after another did.

        EnvironmentFault naming the blocks that are missing; those that a loss of power tore are among them.
        """
        missing = self.missing()
        if missing:
            raise EnvironmentFault(
                f"{self.root}: expected all {self.blocks} blocks, {len(missing)} are missing or were damaged before "
                f"they reached the disk ({', '.join(map(str, missing[:10]))}); start the same command again: they "
                "alone are made anew"
            )
        if self._remote is not None:
            self._remote.bring(f"{shard:05d}.{e}" for shard in range(self._shards) for e in ("json", "parquet"))
        records = [read_json(self._shard_file(shard, "json")) for shard in range(self._shards)]
        shapes = sorted({tuple(record["shape"]) for record in records})
        require(len(shapes) == 1, "images of a store", "one shape", shapes)
        rows = [record["rows"] for record in records]
        write_labels(self.root, len(rows))
        large = len(rows) >= WORTH_AN_INDEX
        if large:
            write_index(self.root, records)
        header = {"format": FORMAT, "rows": rows, "shape": records[0]["shape"]}
        write_json(self.root / "store.json", {**header, "provenance": provenance})
        if self._remote is not None:
            self._remote.finish(("labels.npy", *([INDEX] if large else []), "store.json"))
        self._tidy()

    def complete(self, shard: int) -> bool:
        """Finalises a shard if all its blocks are there and whole; whether it is final. A torn block's marker goes.

        May be called by several processes at once, and again after a crash at any point.
        """
        return self._complete(shard) if self._remote is None else self._complete_there(shard, self._remote)

    def _complete_there(self, shard: int, remote: RemoteStore) -> bool:
        """The same of a shard in an object store, by way of this folder."""
        if shard in remote.sealed:
            return True
        members = self._members(shard)
        if not self._shard_file(shard, "json").exists() and not remote.blocks.issuperset(members):
            remote.look()
            if not remote.blocks.issuperset(members):
                return not remote.blocks.intersection(members) and remote.is_sealed(shard)
        with remote.mirror.lock(self._shard_file(shard, "json")):  # one process of this machine is enough
            if remote.is_sealed(shard):
                return True
            for _ in range(2):  # a block that is torn in this folder is fetched again
                if not min(self._gather(block, remote) for block in members):  # all are looked at
                    return remote.is_sealed(shard)
                if self._complete(shard):
                    remote.hand_over(shard, members)
                    return True
        return False

    def _gather(self, block: int, remote: RemoteStore) -> bool:
        """Fetches a block into this folder if it is not here; False where there is none. A damaged one is removed."""
        shard = block // self.blocks_per_shard
        if self._marker(block).exists() or self._shard_file(shard, "json").exists():
            return True
        with remote.fetched(block) as path:
            found = None if path is None else Marker.read(path)
            if found is None or found.images is None:
                remote.forget([] if path is None else [block])
                return False
            self._place(block, found)
        return True

    def _complete(self, shard: int) -> bool:
        record = self._shard_file(shard, "json")
        if record.exists():
            return True
        members = self._members(shard)
        if not all(self._marker(block).exists() for block in members):
            return record.exists()  # another process may have come to the end in between
        markers = {block: Marker.read(self._marker(block)) for block in members}
        whole = {block: marker for block, marker in markers.items() if marker is not None}
        if len(whole) < len(markers):  # damaged, or removed by one that has finalised the shard
            self._forget([block for block in members if block not in whole])
            return record.exists()
        _check_alike(whole, self.blocks - 1)
        digest = self._settle(shard, whole)
        if digest is None:
            return record.exists()
        self._seal(shard, whole, digest)
        return True

    @cached_property
    def _remote(self) -> RemoteStore | None:
        return RemoteStore.of(self.root)

    @property
    def _shards(self) -> int:
        return math.ceil(self.blocks / self.blocks_per_shard)

    def _members(self, shard: int) -> range:
        first = shard * self.blocks_per_shard
        return range(first, min(first + self.blocks_per_shard, self.blocks))

    def _marker(self, block: int) -> Path:
        return self.root / "blocks" / f"{block:06d}.npz"

    def _shard_file(self, shard: int, ending: str) -> Path:
        return self.root / "shards" / f"{shard:05d}.{ending}"

    def _place(self, block: int, marker: Marker) -> None:
        """Writes a block's pixels where they will stay, then its marker."""
        assert marker.images is not None
        offset = self._offset(block, marker.shape, list(marker.facts))
        if offset is not None:
            self._write(block // self.blocks_per_shard, offset, marker.images)
            marker = replace(marker, images=None)
        marker.write(self._marker(block))

    def _offset(self, block: int, shape: tuple[int, ...], facts: list[str]) -> int | None:
        """Where the pixels of a block begin in its shard; None for a last block where no other tells its place."""
        inside, known = block % self.blocks_per_shard, self._known(block)
        if known is not None:
            sides, names = known
            last = block == self.blocks - 1
            fits = shape[1:] == sides[1:] and (shape[0] == sides[0] or last)
            require(fits, f"block {block}", f"images {list(sides)}, as the other blocks have", list(shape))
            require(names is None or names == facts, f"block {block}", f"the facts {names}", facts)
        elif block == self.blocks - 1 and inside:
            return None
        rows = shape[0] if known is None or not inside else known[0][0]
        return len(head_of(0, shape[1:])) + inside * rows * math.prod(shape[1:])

    def _known(self, block: int) -> tuple[tuple[int, ...], list[str] | None] | None:
        """Shape of a block that is not the last, and names of its facts, from a block or a shard that is there."""
        shard = block // self.blocks_per_shard
        for other in self._members(shard):
            if other not in (block, self.blocks - 1) and (found := Marker.read(self._marker(other))) is not None:
                return found.shape, list(found.facts)
        for other in (shard - 1, 0):
            path = self._shard_file(max(other, 0), "json")
            if max(other, 0) < self._shards - 1 and path.exists():
                record = read_json(path)
                return (record["rows"] // self.blocks_per_shard, *record["shape"]), None
        return None

    @contextlib.contextmanager
    def _opened(self, shard: int) -> Iterator[int]:
        """The shard's file for reading and writing, under the name that it has; closed, so that others see it."""
        part, final = self._shard_file(shard, "npy.part"), self._shard_file(shard, "npy")
        with disk(final):
            part.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(part, os.O_RDWR)
            except FileNotFoundError:
                name, flags = (final, 0) if final.exists() else (part, os.O_CREAT)
                handle = os.open(name, os.O_RDWR | flags, 0o666)
            try:
                yield handle
            finally:
                os.close(handle)

    def _write(self, shard: int, offset: int, images: np.ndarray) -> None:
        with self._opened(shard) as handle:
            _write_all(handle, images.reshape(-1).data, offset)

    def _settle(self, shard: int, markers: dict[int, Marker]) -> str | None:
        """SHA-256 of the shard's file, made whole and checked against the markers; None where a block is torn."""
        shape = next(iter(markers.values())).shape[1:]
        head = head_of(sum(marker.shape[0] for marker in markers.values()), shape)
        with self._opened(shard) as handle:
            sizes = {block: math.prod(marker.shape) for block, marker in markers.items()}
            os.ftruncate(handle, len(head) + sum(sizes.values()))
            _write_all(handle, head, 0)
            state, offset, torn = hashlib.sha256(head), len(head), []
            for block, marker in markers.items():
                if marker.images is not None:
                    _write_all(handle, np.ascontiguousarray(marker.images).reshape(-1).data, offset)
                if _checked(handle, offset, sizes[block], state) != marker.crc:
                    torn.append(block)
                offset += sizes[block]
            os.fsync(handle)
        self._forget(torn)
        return None if torn else state.hexdigest()

    def _seal(self, shard: int, markers: dict[int, Marker], digest: str) -> None:
        """Parquet, the final name, the record, in this order; then the markers may go."""
        table, parquet = _table(markers), self._shard_file(shard, "parquet")
        bare = pa.BufferOutputStream()
        pq.write_table(table, bare)
        content = hashlib.sha256(bare.getvalue()).hexdigest()
        noted = None if self.origin is None else {PROVENANCE: json.dumps(dict(self.origin), sort_keys=True).encode()}
        with atomic(parquet) as temporary:
            pq.write_table(table.replace_schema_metadata(noted), temporary)
        final = self._shard_file(shard, "npy")
        with disk(final), contextlib.suppress(FileNotFoundError):  # another was faster
            if not final.exists():
                os.replace(self._shard_file(shard, "npy.part"), final)
        record = {"rows": table.num_rows, "shape": list(next(iter(markers.values())).shape[1:])}
        sums = {"npy": digest, "parquet": checksum(parquet)}
        without = {} if self.origin is None else {"content": {"npy": digest, "parquet": content}}
        write_json(self._shard_file(shard, "json"), {**record, "sha256": sums, **without})
        for block in markers:
            self._marker(block).unlink(missing_ok=True)

    def _forget(self, blocks: list[int]) -> None:
        """Lets blocks be written again."""
        for block in blocks:
            self._marker(block).unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Removes what a process left that wrote a block while another finished the store with it."""
        markers = [path for path in (self.root / "blocks").glob("*.npz") if not path.name.startswith(".")]
        for path in [*markers, *(self.root / "shards").glob("*.npy.part")]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # empty by now; a stray file stays where it is
            (self.root / "blocks").rmdir()


def _check(images: np.ndarray, labels: np.ndarray) -> None:
    """UserError for what is no block of images."""
    kind = f"{images.dtype} {list(images.shape)}"
    right = images.dtype == np.uint8 and images.ndim == 4 and len(images) > 0
    require(right, "images of a block", "uint8 [m, height, width, channels] with m above 0", kind)
    right = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    require(right, "labels of a block", f"{len(images)} whole numbers [m]", f"{labels.dtype} {list(labels.shape)}")


def _check_alike(markers: dict[int, Marker], last: int) -> None:
    """UserError where blocks of a shard do not fit each other: two processes put the first ones at the same time."""
    blocks = list(markers)
    first = markers[blocks[0]]
    for block in blocks[1:]:
        marker = markers[block]
        alike = marker.shape[1:] == first.shape[1:] and (marker.shape[0] == first.shape[0] or block == last)
        expected, found = (first.shape, list(first.facts)), (marker.shape, list(marker.facts))
        if not alike or expected[1] != found[1]:
            raise UserError(
                f"block {block}: expected shape and facts of block {blocks[0]}, {expected}, got {found}; write all "
                "blocks of a store with the same settings, into an empty folder"
            )


def _table(markers: dict[int, Marker]) -> pa.Table:
    """What stands beside the images of a shard."""
    parts = [
        {"label": m.labels, "block": np.full(len(m.labels), block), "index": np.arange(len(m.labels)), **m.facts}
        for block, m in markers.items()
    ]
    return pa.table({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _write_all(handle: int, data: Any, offset: int) -> None:
    """All of the bytes at their place; a full disk writes some of them, then fails."""
    left = memoryview(data)
    while left:
        written = os.pwrite(handle, left, offset)
        left, offset = left[written:], offset + written


def _checked(handle: int, offset: int, size: int, state: Any) -> int:
    """CRC-32 of a block's bytes in the file, which go into the state of the file's own checksum too."""
    crc = 0
    for start in range(offset, offset + size, PIECE):
        piece = os.pread(handle, min(PIECE, offset + size - start), start)
        crc = zlib.crc32(piece, crc)
        state.update(piece)
    return crc
