"""CIFAR-10 (Krizhevsky 2009) as distributed: python archives, of which nothing is run, binary ones, or packed npz."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from gambeson.data.archives import DAMAGE, absent, tar_members
from gambeson.data.assembly import Part, assembled, check_counts, chosen
from gambeson.data.imageset import ImageSet, data_root
from gambeson.data.npz import read_arrays
from gambeson.errors import UserError, require

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
Labelled = tuple[np.ndarray, np.ndarray]
"""Pixels uint8 [N, 3072], planes of red, green and blue, and labels int64 [N]."""


@dataclass(frozen=True, kw_only=True)
class Cifar10:
    """60,000 photographs of 10 kinds of things, 32x32; 10,000 of them are its test part."""

    side: int = 32  # pixels: 32, or 16 (each the mean of 2x2)
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_images: int = 1000  # images of train held out for curves and choices, stratified
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        require(self.side in (16, 32), "data.side", "32, or 16 (averaged)", self.side)
        check_counts(self.validation_images, self.train_images, 10, 40_000)

    def load(self) -> ImageSet:
        """The image set from the data root; UserError where it is not there.

        The validation part depends on the seed and its own size alone, and a smaller train part lies in a larger one.
        """
        train, test = (_part(data_root(), name) for name in ("train", "test"))
        split = self.validation_images, self.train_images, self.split_seed
        where = chosen("cifar10", train.labels, test.labels, CLASSES, *split)
        name = "cifar10" if self.side == 32 else f"cifar10-{self.side}"
        return assembled(name, train, test, CLASSES, where, self.side, flip_safe=True)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form that CIFAR is distributed in: an archive, or the folder that it unpacks to."""

    folder: str  # the unpacked archive
    archive: str  # the archive
    files: dict[str, tuple[str, ...]]  # part -> names of its files in both
    read: Callable[[bytes, str], Labelled]  # content of a file and its name for errors -> pixels and labels


FORMS = (
    Form(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        read=lambda content, where: parse_batch(content, where, b"labels"),
    ),
    Form(
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        read=lambda content, where: parse_records(content, where, 1, 0),
    ),
)


def _part(root: Path, name: str) -> Part:
    """Train or test, from whichever files are there."""
    packed = root / f"cifar10_{name}.npz"
    if packed.is_file():
        arrays = read_arrays(packed, {"images": ("images",), "labels": ("labels",)})
        return _checked(packed, arrays["images"], arrays["labels"], 10)
    return distributed("cifar10", FORMS, name, 10, packed.name)


def distributed(name: str, forms: tuple[Form, ...], part: str, classes: int, *others: str) -> Part:
    """One part of a CIFAR from the first of its forms that lies in the data root or its folder `name`.

    Raises UserError where none is there (`others` are further files that would do), and for a damaged one.
    """
    roots = (data_root(), data_root() / name)
    for root in roots:
        for form in forms:
            source = next((root / word for word in (form.folder, form.archive) if (root / word).exists()), None)
            if source is not None:
                pixels, labels = _read(source, form, part)
                images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                return _checked(source, images, labels, classes)
    words = [f"the folder {forms[0].folder}", *(form.archive for form in forms)]
    raise absent(name, [*others, *words], roots)


def _read(source: Path, form: Form, part: str) -> Labelled:
    """The files of one part, joined."""
    names = form.files[part]
    contents = {name: _content(source / name) for name in names} if source.is_dir() else tar_members(source, names)
    batches = [form.read(contents[name], str(source / name)) for name in names]
    return np.concatenate([pixels for pixels, _ in batches]), np.concatenate([labels for _, labels in batches])


def _checked(source: Path, pixels: np.ndarray, labels: np.ndarray, classes: int) -> Part:
    right = pixels.shape[1:] == (32, 32, 3) and pixels.dtype == np.uint8 and labels.shape == pixels.shape[:1]
    if not right or labels.dtype.kind not in "iu" or not set(np.unique(labels)) <= set(range(classes)):
        raise UserError(
            f"{source}: expected uint8 [N, 32, 32, 3] images and as many labels from 0 to {classes - 1}, got "
            f"{pixels.dtype} {list(pixels.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    return Part.of(pixels, labels)


def parse_records(content: bytes, where: str, labels: int, which: int) -> Labelled:
    """Pixels uint8 [N, 3072] and label number `which` int64 [N] of records that are `labels` bytes and an image."""
    size = labels + 3072
    whole = len(content) > 0 and len(content) % size == 0
    require(whole, where, f"records of {labels} + 3,072 bytes each", f"{len(content):,} bytes; download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, labels:], records[:, which].astype(np.int64)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise UserError(f"{path}: expected this file of CIFAR's archive, found none; unpack it again") from None


def read_batch(path: Path, label_key: bytes) -> Labelled:
    """`parse_batch` of a file."""
    return parse_batch(_content(path), str(path), label_key)


def parse_batch(content: bytes, where: str, label_key: bytes) -> Labelled:
    """Pixels uint8 [N, D] and labels int64 [N] of one file of CIFAR's python archives, or of ImageNet's like them.

    They are pickles: only the array of bytes in them is understood, any other name ends the reading with a UserError.
    """
    try:
        found = _Reader(BytesIO(content), encoding="bytes").load()
        named = {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}
        pixels, labels = named[b"data"].content(), np.array(named[label_key], dtype=np.int64)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except _DAMAGE as error:
        raise UserError(
            f"{where}: expected a file of CIFAR's python archive, got a damaged or another one "
            f"({type(error).__name__}: {error}); download and unpack it again"
        ) from error
    if len(pixels) != len(labels):
        raise UserError(f"{where}: expected as many labels as images, got {len(labels)} for {len(pixels)}")
    return pixels, labels


_DAMAGE = (pickle.UnpicklingError, *DAMAGE)


class _Bytes:
    """Stands for numpy's array while a pickle is read: gives out 2-D arrays of bytes and nothing else."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.sides, self.kind, self.by_columns, self.raw = state

    def content(self) -> np.ndarray:
        """The array, uint8. Raises UserError for another array."""
        plain = isinstance(self.raw, bytes) and isinstance(self.kind, _Kind) and not self.by_columns
        if not plain or self.kind.name not in (b"u1", "u1") or len(self.sides) != 2:
            raise UserError("pickle: expected a 2-D array of bytes by rows, got another array")
        return np.frombuffer(self.raw, np.uint8).reshape(self.sides)


class _Kind:
    """Stands for numpy's dtype."""

    def __init__(self, name: bytes | str, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and such, which bytes do not have."""


def _rebuild(*_: object) -> _Bytes:
    return _Bytes()


def _encode(text: str, encoding: bytes | str) -> bytes:
    """Bytes as Python 3 writes them in protocol 2."""
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _rebuild,
    ("numpy._core.multiarray", "_reconstruct"): _rebuild,
    ("numpy", "ndarray"): _Bytes,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}
"""The names that CIFAR's archives use -> what stands for them here."""


class _Reader(pickle._Unpickler):
    """An unpickler that knows `ALLOWED` and nothing else.

    Python's own: the one in C takes memory for as many entries as a file of a few bytes says.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(
                f"pickle: expected the {len(ALLOWED)} names that CIFAR's archives use, got {module}."
                f"{name}; a pickle that asks for it could run anything, so it is not read"
            )
        return ALLOWED[module, name]
