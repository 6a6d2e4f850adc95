"""The doors: a name or a path becomes an ImageSet with train, validation and test, images float NCHW in [0, 1]."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gambeson.data.celeba import CelebA
from gambeson.data.cifar import Cifar10
from gambeson.data.cifar100 import Cifar100
from gambeson.data.folder import ImageFolder
from gambeson.data.gtsrb import Gtsrb
from gambeson.data.hub import PREFIX, HubImages, check_name
from gambeson.data.idx import FashionMnist, Mnist
from gambeson.data.imagenet64 import ImageNet64, is_downsampled
from gambeson.data.imageset import ImageSet, Split, largest_remainder
from gambeson.data.npz import NpzImages
from gambeson.data.parquet import ParquetImages, has_parquet
from gambeson.data.svhn import Svhn
from gambeson.data.tiny_imagenet import TinyImageNet
from gambeson.errors import UserError, unknown
from gambeson.randomness import derive

__all__ = ["CelebA", "Cifar10", "Cifar100", "Data", "Digits", "FashionMnist", "Gtsrb", "HubImages", "ImageFolder"]
__all__ += ["ImageNet64", "ImageSet", "Mnist", "NpzImages", "ParquetImages", "Split", "Svhn", "TinyImageNet"]
__all__ += ["door", "largest_remainder", "load"]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, part of that library (UCI, Alpaydin 1998)."""

    train_images: int = 300  # real training images, the same number of each class
    validation_images: int = 150  # held-out images for curves and choices, stratified; all the rest is test
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        if self.train_images < 20 or self.train_images % 10 or self.train_images > 1500:
            raise UserError(f"data.train_images: expected a multiple of 10 from 20 to 1500, got {self.train_images}")
        if self.validation_images < 10 or self.train_images + self.validation_images > 1700:
            raise UserError(
                "data.validation_images: expected at least 10, and at least 97 of the 1,797 images left for test, got "
                f"{self.validation_images} beside {self.train_images} training images"
            )

    def load(self) -> ImageSet:
        """The image set, the same for the same fields."""
        from sklearn.datasets import load_digits

        raw: Any = load_digits()
        images = torch.from_numpy(raw.images[:, None] / 16).float()
        labels = torch.from_numpy(raw.target).long()
        parts = _split(raw.target, self.train_images, self.validation_images, derive(self.split_seed, "digits split"))
        train, validation, test = (Split(images[part], labels[part]) for part in map(torch.from_numpy, parts))
        names = tuple(str(n) for n in range(10))
        return ImageSet(
            name="digits", train=train, validation=validation, test=test, class_names=names, flip_safe=False
        )


def _split(labels: np.ndarray, train: int, validation: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of a class-balanced train part, a stratified validation part and the rest."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = [order[labels[order] == k] for k in np.unique(labels)]
    each = train // len(by_class)
    pools = [members[each:] for members in by_class]
    quotas = largest_remainder(np.array([len(p) for p in pools]), validation)
    chosen = np.concatenate([members[:each] for members in by_class])
    held = np.concatenate([p[:q] for p, q in zip(pools, quotas, strict=True)])
    rest = np.concatenate([p[q:] for p, q in zip(pools, quotas, strict=True)])
    return np.sort(chosen), np.sort(held), np.sort(rest)


Data = (
    Digits
    | Cifar10
    | NpzImages
    | ImageFolder
    | Cifar100
    | Mnist
    | FashionMnist
    | Svhn
    | Gtsrb
    | TinyImageNet
    | CelebA
    | ImageNet64
    | ParquetImages
    | HubImages
)
"""Every door, as the type of a recipe's field."""
DOORS: dict[str, Data] = {
    "digits": Digits(),
    "cifar10": Cifar10(),
    "cifar10-16": Cifar10(side=16, train_images=1000),
    "cifar100": Cifar100(),
    "mnist": Mnist(),
    "fashion-mnist": FashionMnist(),
    "svhn": Svhn(),
    "gtsrb": Gtsrb(),
    "tiny-imagenet": TinyImageNet(),
    "celeba": CelebA(),
    "imagenet64": ImageNet64(),
}
"""Data sets that have a name, and the door that it stands for."""
PATHS = "a folder with a folder for each class, a .parquet file or a folder of them, hf:ORG/NAME, or an .npz file"
"""What else a door can be told, in words."""


def door(name_or_path: str, **options: Any) -> Data:
    """The door that a name, folder, file or hf:ORG/NAME stands for, with options for its fields; no image is read.

    Raises UserError for a name or path that is none of them, and for an option that the door does not have.
    """
    found = DOORS.get(name_or_path) or _by_path(name_or_path)
    names = [field.name for field in dataclasses.fields(found) if field.name != "path"]
    for option in options:
        if option not in names:
            raise unknown(f"option of {type(found).__name__}", option, names)
    return dataclasses.replace(found, **options)


def _by_path(place: str) -> Data:
    path = Path(place)
    if place.startswith(PREFIX):
        return HubImages(path=check_name(place))
    if (path / "store.json").is_file():
        raise UserError(f"data: expected real images, got {place}, a store of synthetic ones (--synthetic takes it)")
    if path.is_dir():
        return _by_folder(path, place)
    if path.is_file() and path.suffix in (".npz", ".parquet"):
        return NpzImages(path=place) if path.suffix == ".npz" else ParquetImages(path=place)
    if path.exists():
        raise UserError(f"data: expected {', '.join(DOORS)}, {PATHS}, got {place}")
    raise unknown(f"data set (or {PATHS.removeprefix('a ')})", place, list(DOORS))


def _by_folder(path: Path, place: str) -> Data:
    """The door of a folder, by what lies in it."""
    if any((path / f"list_attr_celeba{suffix}").is_file() for suffix in (".txt", ".csv")):
        return CelebA(path=place)
    if is_downsampled(path):
        return ImageNet64(path=place)
    return ParquetImages(path=place) if has_parquet(path) else ImageFolder(path=place)


def load(name_or_path: str, **options: Any) -> ImageSet:
    """An image set by name or path (see `door`); options are the fields of its door. UserError as `door`."""
    return door(name_or_path, **options).load()
