"""Files of a store that several processes write: a shard's head, its labels, labels.npy, index.json."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.compact import write_column
from gambeson.disk import atomic
from gambeson.errors import EnvironmentFault

FORMAT = 1
"""What store.json says of the layout."""
INDEX = "index.json"
"""The records of all shards in one file, so that a store of ten thousand opens in seconds."""
WORTH_AN_INDEX = 100
"""Shards from which on a store has one."""


def head_of(rows: int, shape: tuple[int, ...]) -> bytes:
    """The head of a shard's .npy, as np.save writes it; its length does not depend on the number of rows."""
    head = io.BytesIO()
    layout = {"descr": "|u1", "fortran_order": False, "shape": (rows, *shape)}
    np.lib.format.write_array_header_1_0(head, layout)
    return head.getvalue()


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """EnvironmentFault, naming the file, where it cannot be written or read."""
    try:
        yield
    except EnvironmentFault:
        raise
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: expected to write this file, got: {error.strerror or error}. Finished blocks are kept and "
            "nothing half-written counts; free some space or choose another folder, then start the same command again, "
            "which resumes"
        ) from error


def shard_labels(root: Path, shard: int) -> np.ndarray:
    """[rows]: the labels of a shard. EnvironmentFault, naming it, for a damaged Parquet file."""
    path = root / "shards" / f"{shard:05d}.parquet"
    try:
        return pq.read_table(path, columns=["label"])["label"].to_numpy()
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise EnvironmentFault(f"{path}: expected labels of a shard, got a damaged file ({error})") from error


def write_labels(root: Path, shards: int) -> None:
    """labels.npy: the label of every image in the smallest type, a shard at a time in memory; for a memory map."""
    with atomic(root / "labels.npy") as temporary:
        write_column(temporary, lambda: (shard_labels(root, shard) for shard in range(shards)))


def write_index(root: Path, records: list[dict[str, Any]]) -> None:
    """index.json: what the shards' own records say, a line each."""
    with atomic(root / INDEX) as temporary:
        lines = ",\n".join(json.dumps(record, sort_keys=True) for record in records)
        temporary.write_text(f'{{"format": {FORMAT}, "shards": [\n{lines}\n]}}\n', encoding="utf-8")


def read_index(root: Path, shards: int) -> list[dict[str, Any]] | None:
    """The records of so many shards; None where there is no index of them, or a damaged one."""
    try:
        found = json.loads((root / INDEX).read_text(encoding="utf-8"))
        records = found["shards"] if found["format"] == FORMAT else []
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = isinstance(records, list) and len(records) == shards and all(isinstance(r, dict) for r in records)
    return records if whole else None


def batches_of(file: pq.ParquetFile, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """These columns, at most so many rows at a time. Asked for all row groups at once, pyarrow keeps what it read."""
    for group in range(file.num_row_groups):
        yield from file.iter_batches(rows, row_groups=[group], columns=columns)
