"""A finished store, read by position or from front to back; it opens at once, whatever its size."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson import distributed
from gambeson.data.compact import compact, open_column
from gambeson.data.shards import (
    FORMAT,
    INDEX,
    WORTH_AN_INDEX,
    head_of,
    read_index,
    shard_labels,
    write_index,
    write_labels,
)
from gambeson.disk import checksum, read_json
from gambeson.errors import EnvironmentFault, UserError, require
from gambeson.heritage import told
from gambeson.mirror import Mirror, at_once, have, local, place_of, url_of
from gambeson.processes import cores
from gambeson.types import Progress, silent

VERIFIED_AT_ONCE = 1 << 29
"""Bytes of images up to which a store's checksums are compared whenever it is used: a third of a second."""


@dataclass(frozen=True)
class SyntheticStore:
    """A finished store, read by position. Opening it costs the same for any number of images in a shard."""

    root: Path
    rows: tuple[int, ...]
    shape: tuple[int, int, int]
    provenance: dict[str, Any]

    @staticmethod
    def open(path: str | Path) -> SyntheticStore:
        """Opens a store at a path or URL; compares records and sizes of its shards, and no image (`verify` does).

        Of a store in an object store what is read is fetched when it is first read, and compared with its checksum.

        Raises UserError if there is none, or if another format wrote it; EnvironmentFault naming a shard that is
        missing or cut.
        """
        root = local(path)
        header = root / "store.json"
        if not have(header):
            raise UserError(f"{root}: expected a synthetic store (a folder with store.json), found none")
        found = read_json(header)
        if found.get("format") != FORMAT:
            raise UserError(
                f"{header}: expected store format {FORMAT}, got {found.get('format')!r}; "
                "it was written by another version of gambeson: generate it again or use that version"
            )
        if not {"rows", "shape", "provenance"} <= set(found):
            raise EnvironmentFault(
                f"{header}: expected rows, shape and provenance, got {', '.join(found)}; it is damaged: copy or make "
                "the store again"
            )
        store = SyntheticStore(root, tuple(found["rows"]), tuple(found["shape"]), found["provenance"])
        store._look()
        return store

    def __len__(self) -> int:
        return sum(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return SyntheticStore, (self.root, self.rows, self.shape, self.provenance)  # without what was read or mapped

    @property
    def heritage(self) -> dict[str, Any]:
        """Licences and sets of real images that its provenance names."""
        own = {"name": "store of synthetic images", "images": len(self), "shape": list(self.shape)}
        own["class_names"] = list(self.provenance.get("class_names") or ())
        return {**own, **told(self.provenance)}

    def verify(self, progress: Progress = silent) -> SyntheticStore:
        """Compares every file with its checksum, on all cores. Raises EnvironmentFault naming the first that differs.

        Of a store in an object store both what is there and the copies here, which are all fetched.

        progress: told (shards compared, shards). Of processes that train together the first compares for all.
        """
        return self._verify(progress, there=self._mirrored)

    def _verify(self, progress: Progress, there: bool) -> SyntheticStore:
        """there: what lies in the object store too, whatever copy is here."""
        if not distributed.leads():
            return self
        with ThreadPoolExecutor(cores()) as threads:
            waiting = [threads.submit(self._verify_shard, shard, there) for shard in range(len(self.rows))]
            try:
                for shard, future in enumerate(waiting):
                    future.result()
                    progress(shard + 1, len(waiting))
            finally:
                for future in waiting:
                    future.cancel()
        self._verify_labels()
        return self

    def check(self) -> SyntheticStore:
        """`verify` where that takes less than a second; a larger store was looked over when it was opened."""
        small = len(self) * int(np.prod(self.shape)) <= VERIFIED_AT_ONCE
        return self._verify(silent, there=False) if small else self

    def _look(self) -> None:
        """The shards' records, and the sizes of the files that are here, from one listing. EnvironmentFault naming the
        file that is missing or cut."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / "shards") as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if not entry.name.startswith(".")}
            for shard in range(len(self.rows)):
                self._look_at(shard, sizes)
            return
        self._look_at(0, {})

    @cached_property
    def _layout(self) -> tuple[int, int]:
        """Bytes before the first image of a shard, and of each."""
        return len(head_of(0, self.shape)), int(np.prod(self.shape))

    def _look_at(self, shard: int, sizes: Mapping[str, int]) -> None:
        expected = {"rows": self.rows[shard], "shape": list(self.shape)}
        record = self._records[shard]
        if {name: record.get(name) for name in expected} != expected:
            self._damaged(self._file(shard, "json"), f"a record of {expected}", f"{record.get('rows')} rows")
        head, image = self._layout
        pixels = head + self.rows[shard] * image
        for ending, wanted in (("json", None), ("npy", pixels), ("parquet", None)):
            found = sizes.get(f"{shard:05d}.{ending}")
            if found is None and self._mirrored:
                continue
            if not found or (wanted is not None and found != wanted):
                what = "a file" if wanted is None else f"{wanted} bytes"
                self._damaged(self._file(shard, ending), what, "no file" if found is None else f"{found} bytes")

    def _verify_shard(self, shard: int, there: bool) -> None:
        record = self._records[shard]
        for ending, digest in record["sha256"].items():
            path = self._here(shard, ending)
            found = f"{checksum(path)[:16]}..." if path.is_file() else "no file"
            if found != f"{digest[:16]}...":
                self._damaged(path, f"SHA-256 {digest[:16]}...", found)
            if there:
                place_of(path).check(digest)
        own = self._file(shard, "json")
        if own.is_file() and read_json(own) != record:
            self._damaged(own, f"the record that {INDEX} has", "another")

    def _verify_labels(self) -> None:
        """labels.npy says what the shards say."""
        for shard, start in enumerate(self._starts[:-1]):
            self._here(shard, "parquet")
            if not np.array_equal(
                self.compact_labels[start : start + self.rows[shard]], shard_labels(self.root, shard)
            ):
                raise EnvironmentFault(
                    f"{self.root / 'labels.npy'}: expected the labels of the shards, got others in shard {shard}; "
                    "remove the file: it is made anew from the shards"
                )

    def _damaged(self, path: Path, expected: str, found: str) -> None:
        stage = self.root.parent if (self.root.parent / "done.json").is_file() else self.root
        told = f"{path}: expected {expected}, got {found}."
        if self._mirrored:
            raise EnvironmentFault(
                f"{told} It is the copy of {url_of(path)} on this machine: remove it, and it is fetched again; if that "
                f"is no better, move {url_of(stage)} away and start the command that made it again"
            )
        raise EnvironmentFault(
            f"{told} The shard is damaged: move the folder {stage} away and start the command that made it again, or "
            "fetch it again"
        )

    def _file(self, shard: int, ending: str) -> Path:
        return self.root / "shards" / f"{shard:05d}.{ending}"

    def _here(self, shard: int, ending: str) -> Path:
        """A shard's file, fetched where only the object store has it. EnvironmentFault for changed bytes."""
        path = self._file(shard, ending)
        if self._mirrored and not have(path, self._records[shard]["sha256"].get(ending)):
            self._damaged(path, "a file in the object store", "none")
        return path

    @cached_property
    def _mirrored(self) -> bool:
        return Mirror.of(self.root) is not None

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        """What each shard says of itself; of a large store its index, which one of an earlier version gets now."""
        large = len(self.rows) >= WORTH_AN_INDEX
        if large and have(self.root / INDEX) and (found := read_index(self.root, len(self.rows))) is not None:
            return found
        paths = [self._file(shard, "json") for shard in range(len(self.rows))]
        for path, there in zip(
            paths, at_once(have, paths) if self._mirrored else map(Path.is_file, paths), strict=True
        ):
            if not there:
                self._damaged(path, "a shard's record", "no file")
        records = [read_json(path) for path in paths]
        if large:
            with contextlib.suppress(EnvironmentFault):
                write_index(self.root, records)
        return records

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.rows])

    @cached_property
    def _maps(self) -> dict[int, np.ndarray]:
        return {}

    def _map(self, shard: int) -> np.ndarray:
        """A memory map of a shard's images, made when it is first asked for."""
        if shard not in self._maps:
            self._maps[shard] = np.load(self._here(shard, "npy"), mmap_mode="r", allow_pickle=False)
        return self._maps[shard]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the checksums of the shards: what makes two stores the same input of a stage, at any place.

        A Parquet counts without its note of provenance: equal images with equal labels are equal, whoever made them.
        """
        sums = [record.get("content", record["sha256"]) for record in self._records]
        return hashlib.sha256(repr([sorted(s.items()) for s in sums]).encode()).hexdigest()

    @cached_property
    def compact_labels(self) -> np.ndarray:
        """[N]: the class each image was generated for, in the smallest type; a memory map of labels.npy.

        A store without that file gets it now; where nothing may be written, the labels are read into memory.
        """
        path = self.root / "labels.npy"
        have(path)
        found = open_column(path, len(self))
        if found is None:
            for shard in range(len(self.rows)):
                self._here(shard, "parquet")
            with contextlib.suppress(EnvironmentFault):
                write_labels(self.root, len(self.rows))
                found = open_column(path, len(self))
        if found is None:
            found = compact(np.concatenate([compact(shard_labels(self.root, s)) for s in range(len(self.rows))]))
        return found

    @property
    def labels(self) -> np.ndarray:
        """[N] int64: the class each image was generated for; eight bytes each, made anew at every call."""
        return self.compact_labels.astype(np.int64)

    def facts_of(self, shard: int) -> pa.Table:
        """A shard's Parquet: label, block, index and the facts of its blocks; provenance in its schema's metadata."""
        require(0 <= shard < len(self.rows), "shard", f"0 to {len(self.rows) - 1}", shard)
        try:
            return pq.read_table(self._here(shard, "parquet"))
        except (pa.ArrowInvalid, OSError) as error:
            raise EnvironmentFault(f"{self._file(shard, 'parquet')}: expected Parquet, got damage ({error})") from error

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, C] and labels int64 [n] at these positions, in the order asked.

        Memory-mapped: what was read counts as memory of the process as long as the system keeps it, and is its to take
        back; `stretch` and `BlockShuffle` hold no more than they say.
        """
        indices = np.asarray(indices)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise UserError(f"store indices: expected 0 to {len(self) - 1}, got {indices.min()} to {indices.max()}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        images = np.empty((len(indices), *self.shape), np.uint8)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            images[here] = self._map(shard)[indices[here] - self._starts[shard]]
        return images, self.compact_labels[indices].astype(np.int64)

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, C] and labels int64 [n] from `start` to before `stop`.

        Read, not mapped: the memory of the process stays that of the result, however much of a store it goes through.
        """
        require(0 <= start <= stop <= len(self), "store positions", f"0 to {len(self)}", (start, stop))
        images = np.empty((stop - start, *self.shape), np.uint8)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        position = start
        while position < stop:
            first = int(self._starts[shard])
            end = min(stop, first + self.rows[shard])
            self._fill(images[position - start : end - start], shard, position - first)
            position, shard = end, shard + 1
        return images, self.compact_labels[start:stop].astype(np.int64)

    def _fill(self, images: np.ndarray, shard: int, row: int) -> None:
        """Reads images of a shard, from this row on, into an array. EnvironmentFault for a shard that is cut."""
        path = self._here(shard, "npy")
        with open(path, "rb", buffering=0) as file:
            head, image = self._layout
            file.seek(head + row * image)
            left = memoryview(images.reshape(-1).data)
            while left:
                count = file.readinto(left)
                if not count:
                    self._damaged(path, f"{self.rows[shard]} images", "a file cut short")
                left = left[count:]
