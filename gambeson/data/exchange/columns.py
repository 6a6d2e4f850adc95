"""Arrays that are read from front to back out of their files, and a set made of two of them: images and labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from zipfile import ZipFile

import numpy as np

from gambeson.data.exchange.incoming import MOST_PIXELS, Shape, block_size, whole
from gambeson.errors import UserError, require

_CHUNK = 1 << 20


@runtime_checkable
class Bytes(Protocol):
    """A file that is read from front to back, alone or within an archive."""

    def read(self, size: int = -1, /) -> bytes: ...

    def tell(self) -> int: ...


@dataclass(frozen=True)
class Column:
    """An array in a file, of which only the head was read: `kind` its type, `sides` its shape, rows first."""

    path: Path
    member: str | None
    kind: np.dtype
    sides: tuple[int, ...]
    skip: int = 0

    @property
    def name(self) -> str:
        """The file, and the array within it."""
        return f"{self.path}, {self.member.removesuffix('.npy')}" if self.member else str(self.path)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.kind.itemsize * math.prod(self.sides[1:])

    @contextmanager
    def opened(self, row: int = 0) -> Iterator[Bytes]:
        """The file at this row; an archive's member is unpacked as it is read."""
        begin = self.skip + row * self.row_bytes
        with ExitStack() as stack:
            if self.member is None:
                file = stack.enter_context(self.path.open("rb"))
                file.seek(begin)
            else:
                file = stack.enter_context(stack.enter_context(ZipFile(self.path)).open(self.member))
                for left in range(begin, 0, -_CHUNK):  # a seek would end the comparison with the checksum
                    file.read(min(left, _CHUNK))
            yield file

    def take(self, file: Bytes, rows: int) -> np.ndarray:
        """The next rows. UserError where the file ends before."""
        wanted = rows * self.row_bytes
        data = file.read(wanted)
        if len(data) < wanted:
            raise self.cut()
        return np.frombuffer(data, self.kind).reshape(rows, *self.sides[1:])

    def cut(self) -> UserError:
        """The error for a file that is shorter than its head says."""
        return UserError(f"{self.name}: expected {self.sides[0]} rows as its head says, got a file cut short")

    def longer(self) -> UserError:
        """The error for a file that is longer than its head says."""
        return UserError(f"{self.name}: expected {self.sides[0]} rows as its head says, got more bytes")


@dataclass(frozen=True)
class Peer:
    """A published set: its images uint8 NHWC and its labels, still in their files. `assumed`: what no file says."""

    images: Column
    labels: Column
    assumed: str = ""
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """UserError for images and labels that are not what a store holds."""
        kind, sides = self.images.kind, self.images.sides
        if kind != np.uint8 or len(sides) != 4 or sides[3] not in (1, 3):
            raise UserError(
                f"{self.images.name}: expected images uint8 [N, H, W, 1 or 3], got {kind} {list(sides)}; save them "
                "again in that layout (numpy: images.transpose(0, 2, 3, 1), (images * 255).round().astype('uint8'))"
            )
        kind, rows = self.labels.kind, self.labels.sides
        if kind.kind not in "iu" or rows != sides[:1]:
            raise UserError(
                f"{self.labels.name}: expected {sides[0]} whole numbers as labels [N], got {kind} {list(rows)}"
                f"{_float_fault(self.labels)}"
            )
        require(sides[0] > 0, self.images.name, "at least one image", 0)
        require(min(sides) > 0, self.images.name, "sides above 0", list(sides))
        few = f"images of at most {MOST_PIXELS:,} pixels"
        require(sides[1] * sides[2] <= MOST_PIXELS, self.images.name, few, list(sides))

    def __len__(self) -> int:
        return self.images.sides[0]

    @property
    def shape(self) -> Shape:
        """(height, width, channels) of one image."""
        _, height, width, channels = self.images.sides
        return height, width, channels

    def blocks(self, size: int = 8192, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images uint8 [n, H, W, C] and labels int64 [n], `size` at a time from block `first` on, in the files' order.

        The last has the rest, one is in memory. UserError for a damaged or cut file.
        """
        size, start = block_size(self.shape, size), first * block_size(self.shape, size)
        with whole(self.images.path), self.images.opened(start) as images, self.labels.opened(start) as labels:
            for begin in range(start, len(self), size):
                rows = min(size, len(self) - begin)
                yield self.images.take(images, rows), self.labels.take(labels, rows).astype(np.int64)
            for column, file in ((self.images, images), (self.labels, labels)):
                if file.read(1):  # which also brings an archive's member to its end, where its checksum is compared
                    raise column.longer()


def _float_fault(labels: Column) -> str:
    """What usually is wrong with labels that are not whole numbers."""
    if labels.kind.kind != "f" or len(labels.sides) != 1:
        return "; save them again as whole numbers, one for each image"
    with whole(labels.path), labels.opened() as file:
        numbers = labels.take(file, min(labels.sides[0], 1_000_000))
    if np.isnan(numbers).any():
        return " with NaN among them: these images have no class; leave them out, or label them with a classifier"
    return "; save them again with labels.astype('int64')"


_HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def head(path: Path, member: str | None, file: Bytes) -> Column:
    """The column that numpy's head of a file describes. UserError for Python objects and columns first."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADS:
        raise UserError(f"{path}: expected numpy's format 1.0 or 2.0, got {version}; save it again with numpy.savez")
    sides, by_columns, kind = _HEADS[version](file)
    if (by_columns and len(sides) > 1) or kind.hasobject:
        raise UserError(f"{path}: expected a plain array by rows, got {kind} {'by columns' if by_columns else ''}")
    if min(sides, default=0) < 0:
        raise UserError(f"{path}: expected sides from 0, got {list(sides)}")
    return Column(path, member, kind, sides, file.tell())
