"""CIFAR-10 (Krizhevsky 2009) from the data root: packed npz files, or the python archives, of which nothing is run."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gambeson.data.imageset import ImageSet, Split, balanced_part, data_root, held_out
from gambeson.data.npz import read_arrays
from gambeson.errors import UserError, require
from gambeson.randomness import derive
from gambeson.types import Images

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class Cifar10:
    """60,000 photographs of 10 kinds of things, 32x32; 10,000 of them are its test part."""

    side: int = 32  # pixels: 32, or 16 (each the mean of 2x2)
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_images: int = 1000  # images of train held out for curves and choices, stratified
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        require(self.side in (16, 32), "data.side", "32, or 16 (averaged)", self.side)
        held = 10 <= self.validation_images <= 40_000
        require(held, "data.validation_images", "10 to 40000, some of each class", self.validation_images)
        fits = self.train_images % 10 == 0 and self.train_images >= 0
        require(fits, "data.train_images", "0 for all, or a multiple of the 10 classes", self.train_images)

    def load(self) -> ImageSet:
        """The image set from the data root; UserError where it is not there.

        The validation part depends on the seed and its own size alone, and a smaller train part lies in a larger one.
        """
        (pixels, labels), (test_pixels, test_labels) = (_part(data_root(), name) for name in ("train", "test"))
        everything = np.arange(len(labels))
        seed = derive(self.split_seed, "cifar10 split")
        held, rest = held_out(labels, everything, self.validation_images, seed, CLASSES, "data.validation_images")
        if self.train_images:
            rest = balanced_part(labels, rest, self.train_images, seed, CLASSES, "data.train_images")
        return ImageSet(
            name="cifar10" if self.side == 32 else f"cifar10-{self.side}",
            train=self._split(pixels[rest], labels[rest]),
            validation=self._split(pixels[held], labels[held]),
            test=self._split(test_pixels, test_labels),
            class_names=CLASSES,
            flip_safe=True,
        )

    def _split(self, pixels: np.ndarray, labels: np.ndarray) -> Split:
        return Split(self._sized(as_images(pixels)), torch.from_numpy(labels))

    def _sized(self, images: Images) -> Tensor:
        return F.avg_pool2d(images, 32 // self.side) if self.side < 32 else images


def as_images(pixels: np.ndarray) -> Images:
    """uint8 NHWC -> float32 NCHW in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float().div_(255)


def _part(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 32, 32, 3] and labels int64 [N] of train or test, from whichever files are there."""
    packed, archive = root / f"cifar10_{name}.npz", root / "cifar-10-batches-py"
    if packed.is_file():
        arrays = read_arrays(packed, {"images": ("images",), "labels": ("labels",)})
        pixels, labels = arrays["images"], arrays["labels"]
        source = packed
    elif archive.is_dir():
        pixels, labels = _batches(archive, name)
        source = archive
    else:
        raise UserError(
            f"cifar10: expected {packed.name} or the folder {archive.name} (the python version from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html, unpacked) in {root.resolve()}, found neither; say where the "
            "data lies with the environment's GAMBESON_DATA"
        )
    right = pixels.shape[1:] == (32, 32, 3) and pixels.dtype == np.uint8 and labels.shape == pixels.shape[:1]
    if not right or labels.dtype.kind not in "iu" or not set(np.unique(labels)) <= set(range(10)):
        raise UserError(
            f"{source}: expected uint8 [N, 32, 32, 3] images and as many labels from 0 to 9, got {pixels.dtype} "
            f"{list(pixels.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    return pixels, labels.astype(np.int64)


def _batches(archive: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    files = [f"data_batch_{i}" for i in range(1, 6)] if name == "train" else ["test_batch"]
    parts = [read_batch(archive / file, b"labels") for file in files]
    pixels = np.concatenate([p for p, _ in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), np.concatenate([labels for _, labels in parts])


def read_batch(path: Path, label_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 3072] and labels int64 [N] of one file of CIFAR's python archives.

    They are pickles: only the array of bytes in them is understood, any other name ends the reading with a UserError.
    """
    try:
        with path.open("rb") as file:
            found = _Reader(file, encoding="bytes").load()
        pixels, labels = found[b"data"].content(), np.array(found[label_key], dtype=np.int64)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: expected this file of CIFAR's python archive, found none; unpack it again") from None
    except _DAMAGE as error:
        raise UserError(
            f"{path}: expected a file of CIFAR's python archive, got a damaged or another one "
            f"({type(error).__name__}: {error}); download and unpack it again"
        ) from error
    if len(pixels) != len(labels):
        raise UserError(f"{path}: expected as many labels as images, got {len(labels)} for {len(pixels)}")
    return pixels, labels


_DAMAGE = (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError)


class _Bytes:
    """Stands for numpy's array while a pickle is read: takes 2-D arrays of bytes and nothing else."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.sides, kind, by_columns, self.raw = state
        plain = isinstance(self.raw, bytes) and isinstance(kind, _Kind) and not by_columns
        if not plain or kind.name not in (b"u1", "u1") or len(self.sides) != 2:
            raise UserError("pickle: expected a 2-D array of bytes by rows, got another array")

    def content(self) -> np.ndarray:
        """The array, uint8."""
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


class _Reader(pickle.Unpickler):
    """An unpickler that knows `ALLOWED` and nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in ALLOWED:
            raise UserError(
                f"pickle: expected the {len(ALLOWED)} names that CIFAR's archives use, got {module_name}."
                f"{global_name}; a pickle that asks for it could run anything, so it is not read"
            )
        return ALLOWED[module_name, global_name]
