"""Arrays of numbers out of MATLAB's files of version 5, packed or not; of anything else in them only names are read.

After MathWorks' description of the format. scipy's reader ends the process (a segmentation fault) on damaged files.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from gambeson.errors import require

STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""Type of an element -> how its numbers are stored."""
MATRIX, PACKED = 14, 15
KINDS = {
    6: "double", 7: "single", 8: "int8", 9: "uint8", 10: "int16", 11: "uint16", 12: "int32", 13: "uint32",
    14: "int64", 15: "uint64",
}  # fmt: skip
"""Class of an array -> its name in MATLAB; those of cells, structures, text and sparse arrays are left out."""
_HEAD, _LOOK = 128, 4096
"""Bytes of the file's head, and as many of a variable as its own head takes, at most."""


@dataclass(frozen=True)
class Variable:
    """A variable of which only the head was read."""

    name: str
    shape: tuple[int, ...]
    kind: str  # such as uint8 or double; "other" for what is no array of numbers
    size: int  # bytes that it says to be, unpacked
    place: int  # of its tag in the file
    data: int  # of its numbers' tag, unpacked


def variables(path: Path) -> list[Variable]:
    """The variables of a file. Raises ValueError, or zlib's error, for one that is damaged or cut short."""
    with path.open("rb") as file:
        return [_variable(place, content) for place, content in _elements(file, _order(file))]


def arrays(path: Path, wanted: Collection[Variable]) -> dict[str, np.ndarray]:
    """The numbers of these variables. Raises as `variables`, and where they are not as many as the shape says."""
    found = {}
    with path.open("rb") as file:
        order = _order(file)
        for variable in wanted:
            most = 8 * math.prod(variable.shape) + _LOOK
            _insist(variable.size <= most, f"at most {most:,} bytes, got {variable.size:,}")
            content = _Content(file, order, variable.place).all(variable.size)
            found[variable.name] = _array(content, order, variable)
    return found


def _order(file: IO[bytes]) -> str:
    """numpy's mark of the byte order, which the head ends with."""
    return {b"IM": "<", b"MI": ">"}[file.read(_HEAD)[126:128]]


class _Content:
    """A variable's bytes, unpacked as far as asked for."""

    def __init__(self, file: IO[bytes], order: str, place: int) -> None:
        file.seek(place)
        self.order, tag = order, file.read(8)
        kind, self.stored = _words(tag, 0, order)
        _insist(kind in (MATRIX, PACKED), f"a variable, got an element of type {kind}")
        self.packed = zlib.decompressobj() if kind == PACKED else None
        self.file, self.tag = file, tag

    def look(self) -> bytes:
        """The beginning: the tag, then at most _LOOK bytes."""
        if self.packed is None:
            return self.tag + self.file.read(min(self.stored, _LOOK))
        return self.packed.decompress(self.file.read(min(self.stored, _LOOK)), _LOOK)

    def all(self, size: int) -> bytes:
        """The tag and so many bytes."""
        raw = self.file.read(self.stored)
        content = self.tag + raw if self.packed is None else self.packed.decompress(raw, size + 8)
        _insist(len(content) == size + 8, f"{size:,} bytes, got {len(content) - 8:,}")
        return content


def _elements(file: IO[bytes], order: str) -> Iterator[tuple[int, bytes]]:
    """Place and beginning of each variable."""
    place, end = _HEAD, os.fstat(file.fileno()).st_size
    while place < end:
        content = _Content(file, order, place)
        _insist(place + 8 + content.stored <= end, "a whole variable, got one cut short")
        yield place, content.order.encode() + content.look()
        place += 8 + content.stored


def _variable(place: int, marked: bytes) -> Variable:
    """The head of a variable: flags, shape, name; then come its numbers."""
    order, content = marked[:1].decode(), marked[1:]
    kind, size = _words(content, 0, order)
    _insist(kind == MATRIX, f"a variable, got an element of type {kind}")
    _, start, length, following = _inner(content, 8, order)
    _insist(length == 8, "flags of 8 bytes")
    flags = _words(content, start, order)[0]
    stored, start, length, following = _inner(content, following, order)
    _insist(stored in (5, 6) and length % 4 == 0 and length <= 64, "a shape")
    shape = tuple(np.frombuffer(content, f"{order}i4", length // 4, start).tolist())
    _insist(min(shape, default=0) >= 0, "sides from 0")
    _, start, length, data = _inner(content, following, order)
    _insist(start + length <= len(content), "a name")
    name = content[start : start + length].decode("ascii", "replace")
    numeric = flags & 0xFF in KINDS and not flags & 0x0800  # which marks complex numbers
    return Variable(name, shape, KINDS[flags & 0xFF] if numeric else "other", size, place, data)


def _array(content: bytes, order: str, variable: Variable) -> np.ndarray:
    stored, start, length, _ = _inner(content, variable.data, order)
    require(stored in STORED and variable.kind != "other", variable.name, "numbers", f"type {stored}")
    kind, count = np.dtype(f"{order}{STORED[stored]}"), math.prod(variable.shape)
    fits = length == count * kind.itemsize and start + length <= len(content)
    _insist(fits, f"{count:,} numbers in {variable.name}, got {length:,} bytes")
    found = np.frombuffer(content, kind, count, start).reshape(variable.shape, order="F")
    return found.astype({"double": "f8", "single": "f4"}.get(variable.kind, variable.kind), copy=False)


def _inner(content: bytes, place: int, order: str) -> tuple[int, int, int, int]:
    """An element inside a variable: its type, where its bytes begin, how many there are, where the next one begins."""
    kind, size = _words(content, place, order)
    if kind >> 16:  # up to 4 bytes stand in the tag itself
        _insist(kind >> 16 <= 4, "at most 4 bytes in a tag")
        return kind & 0xFFFF, place + 4, kind >> 16, place + 8
    return kind, place + 8, size, place + 8 + size + -size % 8


def _words(content: bytes, place: int, order: str) -> tuple[int, int]:
    """Two whole numbers of 4 bytes."""
    _insist(place + 8 <= len(content), "a tag of 8 bytes, got the end")
    first, second = np.frombuffer(content, f"{order}u4", 2, place).tolist()
    return first, second


def _insist(holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"expected {expected}")
