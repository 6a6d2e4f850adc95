"""What a page shows, kept in the run folder: RUN/material/material.npz, for a run that was moved away from its stages.

One file of arrays that numpy alone can read, written whole or not at all; its member `about` is JSON that says what
they are, and each piece names the digests of what it was made from. Nothing in it is executed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gambeson.data.archives import DAMAGE
from gambeson.disk import atomic, checksum
from gambeson.report import material
from gambeson.report.material import RunMaterial

FORMAT = 1
"""Raised when the file, or what its pieces mean, changes: a file of another format is made anew."""
LARGEST = 2**29
"""Bytes that a file's arrays may take, unpacked: more is a stranger's, made to fill memory."""
STATE = ("recipe.yaml", "run.json", "rows.parquet")
"""The files of a run folder that the kept material belongs to."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of the material, and the digests of what it was made from."""

    made_of: Mapping[str, str]
    value: Any


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a run folder keeps."""

    state: Mapping[str, str | None]
    material: RunMaterial
    pieces: Mapping[str, Piece] = field(default_factory=dict)


def path_of(folder: Path) -> Path:
    """Where a run folder keeps its material."""
    return folder / "material" / "material.npz"


def state_of(folder: Path) -> dict[str, str | None]:
    """Checksums of the files that the kept material belongs to; None for one that is not there."""
    return {name: checksum(folder / name) if (folder / name).is_file() else None for name in STATE}


def kept(folder: Path) -> RunMaterial | None:
    """The material of a run folder as it was gathered last; None without any, and where the run has changed since.

    What is damaged is as good as none: it is made again from the stages.
    """
    found = load(folder)
    return found.material if found is not None and found.state == state_of(folder) else None


def keep(folder: Path, found: RunMaterial, pieces: Mapping[str, Piece]) -> None:
    """Writes the material with its pieces, unless the same is kept. Raises EnvironmentFault where it cannot be written.

    The pieces consist of what `material` defines, tuples, lists, mappings, arrays, tables and plain values.
    """
    state, packer = state_of(folder), Packer()
    shared = state["rows.parquet"] is not None
    about = {
        "format": FORMAT,
        "state": state,
        "shared": shared,
        "material": packer.pack(_without_rows(found) if shared else found),
        "pieces": {n: {"made_of": dict(p.made_of), "value": packer.pack(p.value)} for n, p in sorted(pieces.items())},
    }
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    made, path = io.BytesIO(), path_of(folder)
    arrays: Any = {"about": text, **packer.arrays}  # numpy's stubs take these names for its own options
    np.savez_compressed(made, **arrays)
    if path.is_file() and (path.read_bytes() == made.getvalue() or _newer(path)):
        return
    with atomic(path) as temporary:
        temporary.write_bytes(made.getvalue())


def _newer(path: Path) -> bool:
    """Whether a later version wrote the file, which may hold what cannot be made again."""
    try:
        with _opened(path) as file:
            return json.loads(file["about"].tobytes())["format"] > FORMAT
    except DAMAGE:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The archive. ValueError for a pipe, which would be waited for, and for one that unpacks to too much."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: no file")
    with np.load(path, allow_pickle=False) as file:
        if sum(member.file_size for member in file.zip.infolist()) > LARGEST:
            raise ValueError(f"{path}: more than {LARGEST:,} bytes")
        yield file


def load(folder: Path) -> Kept | None:
    """What `keep` wrote; None for nothing, for another format, and for a damaged file."""
    path = path_of(folder)
    try:
        with _opened(path) as file:
            arrays = {name: file[name] for name in file.files}  # the archive's own checksums are compared
        about = json.loads(arrays["about"].tobytes())
        if about["format"] != FORMAT:
            return None
        unpack = Unpacker(arrays).unpack
        found = unpack(about["material"])
        pieces = {n: Piece(made_of=p["made_of"], value=unpack(p["value"])) for n, p in about["pieces"].items()}
        whole = found
        if about["shared"]:
            with suppress(OSError, ValueError, KeyError):  # without rows: what else is kept is true all the same
                whole = with_rows(found, folder / "rows.parquet")
        return Kept(state=about["state"], material=whole, pieces=pieces)
    except DAMAGE:
        return None


def _without_rows(found: RunMaterial) -> RunMaterial:
    """The material without the rows that the run folder has in rows.parquet."""
    return replace(found, arms=tuple(replace(arm, rows=None) for arm in found.arms))


def with_rows(found: RunMaterial, path: Path) -> RunMaterial:
    """The material with the rows of a run's rows.parquet. ValueError or OSError for a file that is none."""
    rows = rows_by_arm(path)
    return replace(found, arms=tuple(replace(arm, rows=rows.get(arm.key)) for arm in found.arms))


def rows_by_arm(path: Path) -> dict[str, pa.Table]:
    """Rows by the arm's key, of a run's rows.parquet."""
    table = pq.read_table(path)
    keys = table["arm"].unique().to_pylist()
    return {key: table.filter(pc.field("arm") == key).drop_columns(["arm"]) for key in keys}


_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in vars(material).values()
    if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == material.__name__
}


class Packer:
    """Turns dataclasses, tuples, mappings, arrays and tables into JSON and arrays, each array once."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._places: dict[int, tuple[str, Any]] = {}

    def pack(self, value: Any) -> Any:
        """JSON, with names of arrays in place of them."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.ndarray):
            return {"array": self._put(value, value)}
        if isinstance(value, pa.Table):
            return {"table": self._put(value, _bytes(value))}
        if isinstance(value, tuple):
            return {"tuple": [self.pack(each) for each in value]}
        if isinstance(value, list):
            return [self.pack(each) for each in value]
        if isinstance(value, Mapping):
            return {"map": {key: self.pack(each) for key, each in value.items()}}
        told = {each.name: self.pack(getattr(value, each.name)) for each in fields(value)}
        return {"class": type(value).__name__, "fields": told}

    def _put(self, owner: Any, array: np.ndarray) -> str:
        if id(owner) not in self._places:
            name = f"a{len(self.arrays):04d}"
            self.arrays[name], self._places[id(owner)] = array, (name, owner)  # held, so that no id comes twice
        return self._places[id(owner)][0]


class Unpacker:
    """The way back; KeyError, TypeError or ValueError for what `Packer` did not write."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays
        self._tables: dict[str, pa.Table] = {}

    def unpack(self, value: Any) -> Any:
        """Dataclasses, checked again by their own constructors."""
        if isinstance(value, list):
            return [self.unpack(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "array" in value:
            return self.arrays[value["array"]]
        if "table" in value:
            return self._table(value["table"])
        if "tuple" in value:
            return tuple(self.unpack(each) for each in value["tuple"])
        if "map" in value:
            return {key: self.unpack(each) for key, each in value["map"].items()}
        told = {name: self.unpack(each) for name, each in value["fields"].items()}
        return _CLASSES[value["class"]](**told)

    def _table(self, name: str) -> pa.Table:
        if name not in self._tables:
            self._tables[name] = pq.read_table(pa.BufferReader(self.arrays[name].tobytes()))
        return self._tables[name]


def _bytes(table: pa.Table) -> np.ndarray:
    """A table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return np.frombuffer(buffer.getvalue(), np.uint8)
