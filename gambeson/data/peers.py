"""Synthetic sets that others published, read block by block from their files into a store of ours.

EDM-AT's npz (image, label), CDP's and minimal-diffusion's npz (arr_0, arr_1), PORT's .bin (raw bytes) with .npy labels.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable
from zipfile import BadZipFile, ZipFile

import numpy as np

from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.errors import UserError, require
from gambeson.store import Workspace, checksum, stage

KEYS = (("image", "label"), ("arr_0", "arr_1"), ("images", "labels"))
"""Keys of images and labels: EDM-AT's; CDP's and minimal-diffusion's; ours and packed sets'."""
ENDINGS = (".npz", ".bin")
Shape = tuple[int, int, int]


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
    def opened(self) -> Iterator[Bytes]:
        """The file at the first row; of an archive's member, unpacked as it is read."""
        with ExitStack() as stack:
            if self.member is None:
                file = stack.enter_context(self.path.open("rb"))
                file.seek(self.skip)
            else:
                archive = stack.enter_context(ZipFile(self.path))
                file = stack.enter_context(archive.open(self.member))
                file.read(self.skip)
            yield file

    def take(self, file: Bytes, rows: int) -> np.ndarray:
        """The next rows. UserError where the file ends before."""
        wanted = rows * self.row_bytes
        data = file.read(wanted)
        if len(data) < wanted:
            raise UserError(f"{self.name}: expected {self.sides[0]} rows as its head says, got a file cut short")
        return np.frombuffer(data, self.kind).reshape(rows, *self.sides[1:])


@dataclass(frozen=True)
class Peer:
    """A published set: its images uint8 NHWC and its labels, still in their files. `assumed`: what no file says."""

    images: Column
    labels: Column
    assumed: str = ""

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

    def __len__(self) -> int:
        return self.images.sides[0]

    @property
    def shape(self) -> Shape:
        """(height, width, channels) of one image."""
        _, height, width, channels = self.images.sides
        return height, width, channels

    def blocks(self, size: int = 8192) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images uint8 [n, H, W, C] and labels int64 [n], `size` at a time in the files' order; the last has the rest.

        One block is in memory. UserError for a damaged or cut file.
        """
        with _whole(self.images.path), self.images.opened() as images, self.labels.opened() as labels:
            for start in range(0, len(self), size):
                rows = min(size, len(self) - start)
                yield self.images.take(images, rows), self.labels.take(labels, rows).astype(np.int64)
            for column, file in ((self.images, images), (self.labels, labels)):
                if file.read(1):  # which also brings an archive's member to its end, where its checksum is compared
                    raise UserError(f"{column.name}: expected {len(self)} rows as its head says, got more bytes")


def _float_fault(labels: Column) -> str:
    """What usually is wrong with labels that are not whole numbers."""
    if labels.kind.kind != "f" or len(labels.sides) != 1:
        return "; save them again as whole numbers, one for each image"
    with _whole(labels.path), labels.opened() as file:
        numbers = labels.take(file, min(labels.sides[0], 1_000_000))
    if np.isnan(numbers).any():
        return " with NaN among them: these images have no class; leave them out, or label them with a classifier"
    return "; save them again with labels.astype('int64')"


_DAMAGE = (BadZipFile, EOFError, zlib.error, ValueError, KeyError, NotImplementedError, RuntimeError)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """UserError where reading finds damage."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: expected a file with synthetic images, found none") from None
    except _DAMAGE as error:
        raise UserError(
            f"{path}: expected a whole file, got a damaged or cut one ({type(error).__name__}: {error}); fetch it again"
        ) from error


def is_peer(path: str | Path) -> bool:
    """Whether a path is a file (.npz, .bin) that must be imported before it is trained on."""
    return Path(path).is_file() and Path(path).suffix in ENDINGS


def open_peer(path: str | Path, shape: Shape | None = None) -> Peer:
    """A published set by its file; only heads are read. `shape` (H, W, C) of one image, where a .bin holds no squares.

    UserError for unknown keys and layouts, for images that are not uint8 and for labels that are no whole numbers.
    """
    place = Path(path)
    with _whole(place):
        if place.suffix == ".bin":
            return _raw(place, shape)
        peer = _archive(place)
    if shape is not None and peer.shape != tuple(shape):
        raise UserError(f"{place}: expected images of {list(shape)}, as asked, got {list(peer.shape)}")
    return peer


def _archive(path: Path) -> Peer:
    """EDM-AT's, CDP's or minimal-diffusion's npz."""
    with ZipFile(path) as archive:
        there = {name.removesuffix(".npy") for name in archive.namelist()}
        keys = next((pair for pair in KEYS if set(pair) <= there), None)
        if keys is None:
            known = ", ".join(" and ".join(pair) for pair in KEYS)
            raise UserError(f"{path}: expected the keys {known}; found {', '.join(sorted(there)) or 'nothing'}")
        images, labels = (_member(path, archive, f"{key}.npy") for key in keys)
        return Peer(images, labels)


def _member(path: Path, archive: ZipFile, member: str) -> Column:
    with archive.open(member) as file:
        return _head(path, member, file)


def _head(path: Path, member: str | None, file: Bytes) -> Column:
    """The column that numpy's head of a file describes."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise UserError(f"{path}: expected numpy's format 1.0 or 2.0, got {version}; save it again with numpy.savez")
    sides, by_columns, kind = readers[version](file)
    if (by_columns and len(sides) > 1) or kind.hasobject:
        raise UserError(f"{path}: expected a plain array by rows, got {kind} {'by columns' if by_columns else ''}")
    return Column(path, member, kind, sides, file.tell())


def _raw(path: Path, shape: Shape | None) -> Peer:
    """PORT's bytes: no head, so the layout is an assumption, the number of images that of the labels beside."""
    beside = _labels_beside(path)
    with _whole(beside), beside.open("rb") as file:
        labels = _head(beside, None, file)
    rows, size = labels.sides[0] if labels.sides else 0, path.stat().st_size
    if shape is None:
        side = math.isqrt(size // max(3 * rows, 1))
        shape = (side, side, 3)
    if size != rows * math.prod(shape) or not size:
        raise UserError(
            f"{path}: expected {rows} images (as {beside.name} has labels) of {' x '.join(map(str, shape))} bytes, "
            f"{rows * math.prod(shape)} in all, got {size}; say the shape (height, width, channels), or fetch the file "
            "again if it is cut"
        )
    assumed = f"bytes by image, row, column and channel (NHWC), {' x '.join(map(str, shape))}; labels of {beside.name}"
    return Peer(Column(path, None, np.dtype(np.uint8), (rows, *shape)), labels, assumed)


def _labels_beside(path: Path) -> Path:
    """The .npy of a .bin: of the same name, of that name with label(s) behind, or the only one in the folder."""
    stem = path.with_suffix("").name
    names = [f"{stem}.npy", *(f"{stem}{gap}{word}.npy" for gap in "_-." for word in ("labels", "label"))]
    there = sorted(path.parent.glob("*.npy")) if path.is_file() else []
    named = [path.parent / name for name in names if path.parent / name in there]
    if named or len(there) == 1:
        return (named or there)[0]
    if not path.is_file():
        raise FileNotFoundError(path)
    raise UserError(
        f"{path}: expected its labels beside it, as {names[0]} or {names[1]}, found "
        f"{', '.join(p.name for p in there) or 'no .npy'}"
    )


@dataclass(frozen=True, kw_only=True)
class PeerImages:
    """A published synthetic set, and how it becomes a store."""

    path: str = ""  # the .npz, or the .bin with its .npy beside it
    shape: tuple[int, int, int] | None = None  # height, width, channels in a .bin; none: squares of 3 channels
    block_size: int = 8192  # images that are in memory at once
    blocks_per_shard: int = 16  # blocks in one file of the store

    def __post_init__(self) -> None:
        require(self.block_size >= 1, "synthetic.block_size", "at least 1", self.block_size)
        require(self.blocks_per_shard >= 1, "synthetic.blocks_per_shard", "at least 1", self.blocks_per_shard)

    @property
    def source(self) -> FilesSource:
        """The files as an input of a stage."""
        require(is_peer(self.path), "synthetic.path", f"a file ({' or '.join(ENDINGS)})", self.path)
        return FilesSource(self.path)

    @property
    def reading(self) -> PeerImages:
        """How the files are read, wherever they lie: what a stage depends on besides their content."""
        return replace(self, path="")


@dataclass(frozen=True)
class FilesSource:
    """A published set's files; the digest is that of their content, wherever they lie."""

    place: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, for a .bin of it and its labels. UserError where there is none."""
        path = Path(self.place)
        with _whole(path):
            if path.suffix != ".bin":
                return checksum(path)
            return hashlib.sha256(f"{checksum(path)} {checksum(_labels_beside(path))}".encode()).hexdigest()


@stage(revision=1)
def import_images(work: Workspace, spec: PeerImages, source: FilesSource) -> None:
    """Writes images/ (a store) and chosen.parquet (all of it); a start after a break goes on with the next block."""
    peer = open_peer(source.place, spec.shape)
    count = math.ceil(len(peer) / spec.block_size)
    writer = StoreWriter(root=work.folder / "images", blocks=count, blocks_per_shard=spec.blocks_per_shard)
    for number, (images, labels) in enumerate(peer.blocks(spec.block_size)):
        if not writer.has(number):
            writer.put(number, images, labels)
        work.progress(min((number + 1) * spec.block_size, len(peer)), len(peer))
    writer.finish({"imported": Path(source.place).name, "sha256": source.digest, "assumed": peer.assumed})
    Chosen.write_all(work.folder / "chosen.parquet", SyntheticStore.open(work.folder / "images"))
