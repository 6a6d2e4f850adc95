"""Hugging Face's Parquet: a column `image` of PNG bytes, a column `label` whose classes are named in the schema.

Shards lie as data/train-00000-of-00003.parquet beside a README.md, the data card, as the hub and `datasets` read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.exchange.incoming import About, Shape, block_size, whole
from gambeson.data.exchange.outgoing import Outgoing, write_folder
from gambeson.data.exchange.pictures import Picture, blocks_of, decoded, encoded
from gambeson.data.parquet import IMAGES, LABELS, at_once
from gambeson.disk import atomic
from gambeson.errors import UserError, require

PER_SHARD, PER_GROUP = 100_000, 1000
"""Images of a shard and of a row group; fewer in a shard where they are large."""
SHARD_BYTES = 1 << 29
FILES = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]}
"""Where the hub finds the images, as its data card says it."""


@dataclass(frozen=True)
class ParquetImages:
    """A set in Parquet files; `counts`: rows of each; `columns`: those of image and label."""

    files: tuple[Path, ...]
    counts: tuple[int, ...]
    columns: tuple[str, str]
    shape: Shape
    class_names: tuple[str, ...] = ()
    assumed: str = ""

    def __len__(self) -> int:
        return sum(self.counts)

    def blocks(self, size: int = 8192, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images uint8 [n, H, W, C] and labels int64 [n], `size` at a time from block `first` on, in the files' order.

        UserError for damage, images of several sizes, rows without image or label.
        """
        yield from blocks_of(self._pictures(first * block_size(self.shape, size)), self.shape, size)

    def _pictures(self, start: int) -> Iterator[Picture]:
        """The rows from number `start` on."""
        for file, count in zip(self.files, self.counts, strict=True):
            if start < count:
                yield from _rows(file, self.columns, start, count)
            start = max(start - count, 0)


def _rows(file: Path, columns: tuple[str, str], start: int, count: int) -> Iterator[Picture]:
    """The rows of a file of `count` from number `start` on, some of a row group in memory. UserError for fewer."""
    number = 0
    with whole(file), pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
        for batch in opened.iter_batches(at_once(opened, 256), columns=list(columns)):
            if number + len(batch) > start:
                images, labels = (batch.column(name).to_pylist() for name in columns)
                for place in range(max(start - number, 0), len(batch)):
                    yield _picture(f"{file}, row {number + place}", images[place], labels[place])
            number += len(batch)
    require(number == count, str(file), f"{count:,} rows, as its end says", f"{number:,}; fetch it again")


def _picture(name: str, image: Any, label: Any) -> Picture:
    data = image.get("bytes") if isinstance(image, dict) else image
    if not data or label is None:
        what = "a label" if data else "the image's bytes (datasets: cast with Image(decode=False) and embed them)"
        raise UserError(f"{name}: expected {what}, got none")
    return Picture(name, data, label)


def shards_of(path: Path) -> tuple[Path, ...]:
    """The Parquet files of a set: the file itself; of a folder those in data/ or in it, `train` ones if any."""
    if path.is_file():
        return (path,)
    there = sorted((path / "data").glob("*.parquet")) or sorted(path.glob("*.parquet"))
    return tuple([p for p in there if p.name.startswith("train")] or there)


def read(path: Path) -> ParquetImages:
    """The set in a Parquet file or a folder of them, of which the ends are read, and the first image.

    UserError for other columns and types (saying which), and for what is damaged.
    """
    files = shards_of(path)
    require(bool(files), str(path), "a .parquet file or a folder of them", "none")
    schemas, counts = zip(*map(_end, files), strict=True)
    columns, names = _columns(files[0], schemas[0]), _class_names(schemas[0])
    for file, schema in zip(files, schemas, strict=True):
        if _columns(file, schema) != columns or _class_names(schema) != names:
            raise UserError(f"{file}: expected columns and classes as {files[0].name} has, got others")
    filled = [file for file, count in zip(files, counts, strict=True) if count]
    require(bool(filled), str(path), "at least one image", 0)
    height, width, channels = decoded(next(_rows(filled[0], columns, 0, 1))).shape
    part = "" if path.is_file() or len(files) == len(list(files[0].parent.glob("*.parquet"))) else "train's files alone"
    names = names or About.beside(path).class_names
    return ParquetImages(files, counts, columns, (height, width, channels), names, part)


def _end(file: Path) -> tuple[pa.Schema, int]:
    """Schema and number of rows, which stand at a file's end."""
    with whole(file), pq.ParquetFile(file) as opened:
        require(opened.metadata.num_rows >= 0, str(file), "rows from 0", opened.metadata.num_rows)
        return opened.schema_arrow, opened.metadata.num_rows


def _columns(file: Path, schema: pa.Schema) -> tuple[str, str]:
    """The names of the columns. UserError where they are missing or hold something else."""
    image, label = (next((name for name in known if name in schema.names), None) for known in (IMAGES, LABELS))
    if image is None or label is None:
        raise UserError(
            f"{file}: expected the columns {' or '.join(IMAGES)} and {' or '.join(LABELS)}, found "
            f"{', '.join(schema.names) or 'none'}"
        )
    kind = schema.field(image).type
    inside = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inside) or pa.types.is_large_binary(inside)):
        raise UserError(f"{file}, {image}: expected pictures (a struct with bytes, or binary), got {kind}")
    if not pa.types.is_integer(schema.field(label).type):
        raise UserError(f"{file}, {label}: expected whole numbers, got {schema.field(label).type}")
    return image, label


def _class_names(schema: pa.Schema) -> tuple[str, ...]:
    """The names that `datasets` keeps in the schema, where there are any."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"]
        names = next(features[name]["names"] for name in LABELS if name in features)
        return tuple(map(str, names))
    except (ValueError, KeyError, TypeError, StopIteration):  # others' metadata may say anything
        return ()


def schema_of(names: tuple[str, ...]) -> pa.Schema:
    """image: struct{bytes, path}, label: int64, and what `datasets` wants to know about them."""
    classes = {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": classes}
    picture = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    told = json.dumps({"info": {"features": features}})
    return pa.schema({"image": picture, "label": pa.int64()}, metadata={"huggingface": told})


def write(out: Outgoing, path: Path, per_shard: int | None = None) -> None:
    """Writes the folder PATH with data/train-NNNNN-of-NNNNN.parquet and README.md; stopped, it goes on."""
    height, width, channels = out.shape
    each = per_shard or max(min(PER_SHARD, SHARD_BYTES // (height * width * channels)), 1)
    count, form = -(-len(out) // each), {"format": "parquet", "classes": list(out.class_names)}
    write_folder(out, path, form, each, partial(_write, out, count), FILES)


def _write(out: Outgoing, count: int, folder: Path, piece: int, start: int, stop: int) -> None:
    """One shard, a row group at a time."""
    schema, number = schema_of(out.class_names), start
    file = folder / "data" / f"train-{piece:05d}-of-{count:05d}.parquet"
    with atomic(file) as temporary, pq.ParquetWriter(temporary, schema, compression="none") as writer:
        for images, labels in out.blocks(start, stop):
            for begin in range(0, len(images), PER_GROUP):
                group, classes = images[begin : begin + PER_GROUP], labels[begin : begin + PER_GROUP]
                pictures = [{"bytes": encoded(image), "path": f"{number + i:08d}.png"} for i, image in enumerate(group)]
                writer.write_table(pa.table({"image": pictures, "label": classes}, schema=schema))
                number += len(group)
