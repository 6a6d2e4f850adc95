"""PORT's files: the images' raw bytes in a .bin, their labels in an .npy beside it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gambeson.data.exchange.columns import Column, Peer, head
from gambeson.data.exchange.incoming import About, Shape, whole
from gambeson.data.exchange.outgoing import Outgoing
from gambeson.disk import atomic
from gambeson.errors import UserError, require


def read(path: Path, shape: Shape | None = None) -> Peer:
    """The set in a .bin. It has no head: the layout is an assumption, the number of images that of the labels beside.

    `shape` of one image: as given, as the JSON of a set of ours says, otherwise squares of three channels. UserError
    where labels are missing and where the bytes do not fit.
    """
    with whole(path):
        beside = labels_beside(path)
    with whole(beside), beside.open("rb") as file:
        labels = head(beside, None, file)
    rows, size = labels.sides[0] if labels.sides else 0, path.stat().st_size
    shape = shape or About.beside(path).shape
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


def labels_beside(path: Path) -> Path:
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


def write(out: Outgoing, path: Path) -> None:
    """Writes PATH (.bin) and the labels beside it, STEM_labels.npy, both or neither."""
    beside = path.with_name(f"{path.stem}_labels.npy")
    for other in (beside, path.with_suffix(".npy")):  # read would take either
        require(not other.exists(), "--out", f"no {other.name} beside it", str(other))
    with atomic(path) as pixels, atomic(beside) as labels:
        with open(pixels, "wb") as file:
            for images, _ in out.blocks():
                file.write(np.ascontiguousarray(images).data)
        with open(labels, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (len(out),)})
            for part in out.labels():
                file.write(part.data)
