"""What a scorer said of a store's images, kept beside them: scores/DIGEST/00000.parquet for each shard, and meta.json.

A row belongs to an image by block and index. Scores that were made against test images are not given to selection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.reading import SyntheticStore
from gambeson.disk import atomic, read_json, write_json
from gambeson.errors import EnvironmentFault, UserError, require, unknown

Against = Literal["train", "test"]
"""The part of the real images that a scorer compared with; None: with none."""
_PLACE = ("block", "index")


def _folder(store: SyntheticStore, digest: str) -> Path:
    """Where the scores of a scorer lie. UserError for what is no digest, and could lead elsewhere."""
    require(re.fullmatch("[0-9a-f]{8,64}", digest) is not None, "scorer's digest", "8 to 64 hexadecimal digits", digest)
    return store.root / "scores" / digest


@dataclass(frozen=True, kw_only=True)
class ScoreWriter:
    """Writes the scores of one scorer, a shard at a time in any order; from several processes, each shard by any.

    digest: of the scorer, hexadecimal. scorer: what it is, JSON-able. against: which real images it compared with.
    """

    store: SyntheticStore
    digest: str
    scorer: Mapping[str, Any]
    against: Against | None

    def has(self, shard: int) -> bool:
        """Whether a shard's scores are there."""
        return (_folder(self.store, self.digest) / f"{shard:05d}.parquet").is_file()

    def missing(self) -> list[int]:
        """Shards that are to be scored still."""
        return [shard for shard in range(len(self.store.rows)) if not self.has(shard)]

    def put(self, shard: int, columns: Mapping[str, np.ndarray]) -> None:
        """The scores of a shard's images in their order: numbers [rows] or [rows, K] by name.

        UserError for another number of rows, and where this digest has stood for another scorer.
        """
        require(0 <= shard < len(self.store.rows), "shard", f"0 to {len(self.store.rows) - 1}", shard)
        require(len(columns) > 0 and not {*columns} & {*_PLACE}, "scores", "names beside block and index", [*columns])
        for name, column in columns.items():
            right = column.ndim in (1, 2) and len(column) == self.store.rows[shard]
            require(right, name, f"numbers [{self.store.rows[shard]}] or [{self.store.rows[shard]}, K]", column.shape)
        self._declare()
        places = self.store.facts_of(shard).select(_PLACE)
        table = pa.table({name: places[name] for name in _PLACE} | {n: as_arrow(c) for n, c in columns.items()})
        with atomic(_folder(self.store, self.digest) / f"{shard:05d}.parquet") as temporary:
            pq.write_table(table, temporary)

    def _declare(self) -> None:
        """meta.json, before the first score."""
        path = _folder(self.store, self.digest) / "meta.json"
        said = {"scorer": dict(self.scorer), "against": self.against, "store": self.store.digest}
        if not path.is_file():
            write_json(path, said)
        found = read_json(path)
        require(found == said, f"{path}", f"scores of {said}; another scorer needs another digest", found)


@dataclass(frozen=True)
class Scores:
    """Finished scores of a store's images."""

    store: SyntheticStore
    digest: str
    scorer: dict[str, Any]
    against: Against | None

    @staticmethod
    def open(store: SyntheticStore, digest: str, purpose: Literal["selection", "report"]) -> Scores:
        """The scores of a scorer. UserError where there are none, where shards are missing, or for another store.

        purpose: "selection" raises UserError for scores that were made against test images: what is trained must not
        know these, not even through the choice of its images.
        """
        folder = _folder(store, digest)
        require((folder / "meta.json").is_file(), f"{folder}", "scores with a meta.json", "none there")
        meta = read_json(folder / "meta.json")
        require(meta.get("store") == store.digest, f"{folder}", "scores of this store's images", "those of another")
        if purpose == "selection" and meta.get("against", "test") not in ("train", None):
            raise UserError(
                f"{folder}: expected scores for selection to be made against train images, got some made against "
                f"{meta.get('against', 'unknown')} images; score again with --against train (these may be reported)"
            )
        scores = Scores(store, digest, meta["scorer"], meta["against"])
        missing = ScoreWriter(store=store, digest=digest, scorer=scores.scorer, against=scores.against).missing()
        require(not missing, f"{folder}", f"scores of all {len(store.rows)} shards", f"none of {missing[:10]}")
        return scores

    def shard(self, shard: int) -> pa.Table:
        """block, index and the scores of a shard's images, in their order. EnvironmentFault for a damaged file."""
        path = _folder(self.store, self.digest) / f"{shard:05d}.parquet"
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise EnvironmentFault(
                f"{path}: expected Parquet, got damage ({error}); remove it and score again"
            ) from error
        require(table.num_rows == self.store.rows[shard], f"{path}", f"{self.store.rows[shard]} rows", table.num_rows)
        return table

    @cached_property
    def columns(self) -> list[str]:
        """Names of the scores."""
        return [name for name in self.shard(0).column_names if name not in _PLACE]

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """A score [rows] or [rows, K], a shard at a time in the store's order. UserError for an unknown name."""
        if name not in self.columns:
            raise unknown("score", name, self.columns)
        for shard in range(len(self.store.rows)):
            yield as_numpy(self.shard(shard)[name])


def as_arrow(column: np.ndarray) -> pa.Array:
    """Numbers [N], or [N, K] as lists of fixed length, which cost no memory besides the numbers."""
    flat = pa.array(np.ascontiguousarray(column).reshape(-1))
    return flat if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


def as_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The same back; also of lists whose length is equal only in fact."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if not (pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type)):
        return column.to_numpy(zero_copy_only=False)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1) if len(column) else flat.reshape(0, 0)
