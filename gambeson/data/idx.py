"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017): idx files, gzipped as distributed or unpacked."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gambeson.data.archives import DAMAGE, DEFLATION, damaged, first_there, published
from gambeson.data.assembly import Part, assembled, check_counts, chosen
from gambeson.data.imageset import ImageSet, data_root
from gambeson.data.npz import check_memory
from gambeson.errors import UserError, require

CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""Fashion-MNIST's classes in the order of their labels."""


@dataclass(frozen=True, kw_only=True)
class Mnist:
    """70,000 handwritten digits, grey, 28x28; 10,000 of them are its test part."""

    side: int = 28  # pixels: 28, or 14 (each the mean of 2x2)
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_images: int = 1000  # images of train held out for curves and choices, stratified
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        _check(self)

    def load(self) -> ImageSet:
        """The image set from the data root; UserError where it is not there or damaged."""
        return _load(self, "mnist", tuple(map(str, range(10))), "MNIST", flip_safe=False)


@dataclass(frozen=True, kw_only=True)
class FashionMnist:
    """70,000 pictures of clothes, grey, 28x28; 10,000 of them are its test part."""

    side: int = 28  # pixels: 28, or 14 (each the mean of 2x2)
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_images: int = 1000  # images of train held out for curves and choices, stratified
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        _check(self)

    def load(self) -> ImageSet:
        """The image set from the data root; UserError where it is not there or damaged."""
        return _load(self, "fashion-mnist", CLOTHES, "FashionMNIST", flip_safe=True)


def _check(spec: Mnist | FashionMnist) -> None:
    require(spec.side in (14, 28), "data.side", "28, or 14 (averaged)", spec.side)
    check_counts(spec.validation_images, spec.train_images, 10, 50_000)


def _load(spec: Mnist | FashionMnist, name: str, names: tuple[str, ...], elsewhere: str, flip_safe: bool) -> ImageSet:
    """Either set; `elsewhere` is the folder that torchvision puts it in."""
    roots = (data_root() / name, data_root() / elsewhere / "raw")
    train, test = (_part(name, roots, part) for part in ("train", "t10k"))
    where = chosen(name, train.labels, test.labels, names, spec.validation_images, spec.train_images, spec.split_seed)
    title = name if spec.side == 28 else f"{name}-{spec.side}"
    return assembled(title, train, test, names, where, spec.side, flip_safe=flip_safe)


def _part(name: str, roots: tuple[Path, ...], part: str) -> Part:
    """Train or test ('t10k')."""
    paths = [_path(name, roots, f"{part}-{kind}") for kind in ("images-idx3", "labels-idx1")]
    pixels, labels = (read_idx(path, sides) for path, sides in zip(paths, (3, 1), strict=True))
    if len(pixels) != len(labels) or pixels.shape[1:] != (28, 28):
        raise UserError(
            f"{paths[0]} and {paths[1].name}: expected images of 28 x 28 pixels and as many labels, got "
            f"{list(pixels.shape)} and {list(labels.shape)}; they belong to different parts, or to other sets"
        )
    return Part.of(pixels[..., None], labels)


def _path(name: str, roots: tuple[Path, ...], stem: str) -> Path:
    """The first of the names that a file has in the wild: gzipped or not, with a point where some unpackers put one."""
    words = (f"{stem}-ubyte.gz", f"{stem}-ubyte", f"{stem.replace('-idx', '.idx')}-ubyte")
    return first_there(name, [root / word for root in roots for word in words], roots)


def read_idx(path: Path, sides: int) -> np.ndarray:
    """The array of bytes with so many sides in an idx file, gzipped if it is called .gz: uint8.

    Raises UserError for another magic number, and for a head that declares anything but the bytes that follow it,
    before memory is taken for them.
    """
    published(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _head(path, file.read(4 + 4 * sides), sides)
            _check_head(path, shape)
            content = file.read(math.prod(shape) + 1)
    except UserError:
        raise
    except DAMAGE as error:
        raise damaged(path, "a whole idx file", error) from error
    if len(content) != math.prod(shape):
        more = "more" if len(content) > math.prod(shape) else f"{len(content):,}"
        raise damaged(path, f"the {math.prod(shape):,} bytes that its head declares {list(shape)}", f"{more} follow it")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _head(path: Path, head: bytes, sides: int) -> tuple[int, ...]:
    """The shape: 0, 0, type 8 (bytes), number of sides, then each as a big-endian number of 4 bytes."""
    magic = bytes((0, 0, 8, sides))
    if head[:4] != magic or len(head) < 4 + 4 * sides:
        raise UserError(
            f"{path}: expected an idx file of bytes with {sides} sides, magic number 0x{magic.hex()}, got 0x"
            f"{head[:4].hex()}; images and labels may be swapped, or it is another file"
        )
    return tuple(int.from_bytes(head[at : at + 4], "big") for at in range(4, 4 + 4 * sides, 4))


def _check_head(path: Path, shape: tuple[int, ...]) -> None:
    """UserError for more bytes than a file of this size can hold."""
    size = path.stat().st_size
    most = DEFLATION * size if path.suffix == ".gz" else size
    declared = math.prod(shape)
    if declared > most:
        raise UserError(
            f"{path}: expected a head that declares at most the {most:,} bytes that the file can hold, got "
            f"{declared:,} {list(shape)}; it is damaged, or was made to fill memory"
        )
    check_memory(path, declared * 4)
