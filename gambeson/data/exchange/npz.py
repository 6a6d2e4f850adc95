"""EDM-AT's archives (image, label) and CDP's and minimal-diffusion's (arr_0, arr_1): .npz, either way in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from gambeson.data.exchange.columns import Column, Peer, head
from gambeson.data.exchange.incoming import Shape, whole
from gambeson.data.exchange.outgoing import Outgoing
from gambeson.disk import atomic
from gambeson.errors import UserError

KEYS = (("image", "label"), ("arr_0", "arr_1"), ("images", "labels"))
"""Keys of images and labels: EDM-AT's; CDP's and minimal-diffusion's; ours and packed sets'."""
_DEFLATION = 1032
"""Bytes that one byte of a deflated stream can stand for, at most."""


def read(path: Path, shape: Shape | None = None) -> Peer:
    """The set in an archive, of which heads are read. UserError for other keys, for what no store holds, for damage.

    `shape`: what an image must be, if anything.
    """
    with whole(path), ZipFile(path) as archive:
        there = {name.removesuffix(".npy") for name in archive.namelist()}
        keys = next((pair for pair in KEYS if set(pair) <= there), None)
        if keys is None:
            known = ", ".join(" and ".join(pair) for pair in KEYS)
            raise UserError(f"{path}: expected the keys {known}; found {', '.join(sorted(there)) or 'nothing'}")
        images, labels = (_member(path, archive, f"{key}.npy") for key in keys)
    peer = Peer(images, labels)
    if shape is not None and peer.shape != tuple(shape):
        raise UserError(f"{path}: expected images of {list(shape)}, as asked, got {list(peer.shape)}")
    return peer


def _member(path: Path, archive: ZipFile, member: str) -> Column:
    """An array's head. UserError unless what follows is as long as it says: nothing is read into memory before."""
    info = archive.getinfo(member)
    with archive.open(info) as file:
        column = head(path, member, file)
    there, declared = info.file_size - column.skip, column.kind.itemsize * math.prod(column.sides)
    if there < declared:
        raise column.cut()
    if there > declared:
        raise column.longer()
    if info.file_size > _DEFLATION * (info.compress_size + 1):
        raise UserError(
            f"{column.name}: expected at most {_DEFLATION} bytes out of each packed one, got {info.file_size:,} out of "
            f"{info.compress_size:,}; it is damaged, or was made to fill memory"
        )
    return column


def write(out: Outgoing, path: Path, keys: tuple[str, str]) -> None:
    """Writes one archive, whole or not at all; numpy.load reads it, and maps nothing twice: members are not packed."""
    images, labels = (f"{key}.npy" for key in keys)
    with atomic(path) as temporary, ZipFile(temporary, "w", ZIP_STORED) as archive:
        _write(archive, images, np.dtype(np.uint8), (len(out), *out.shape), (block for block, _ in out.blocks()))
        _write(archive, labels, np.dtype(np.int64), (len(out),), out.labels())


def _write(archive: ZipFile, member: str, kind: np.dtype, sides: tuple[int, ...], rows: Iterable[np.ndarray]) -> None:
    """np.savez's bytes, without all of them in memory."""
    with archive.open(ZipInfo(member), "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": sides}
        np.lib.format.write_array_header_1_0(file, header)
        for block in rows:
            file.write(np.ascontiguousarray(block).data)
