"""The doors: a name or a path becomes an ImageSet with train, validation and test, images float NCHW in [0, 1]."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gambeson.data.cifar import Cifar10
from gambeson.data.folder import ImageFolder
from gambeson.data.imageset import ImageSet, Split, largest_remainder
from gambeson.data.npz import NpzImages
from gambeson.errors import UserError, unknown
from gambeson.randomness import derive

__all__ = ["Cifar10", "Data", "Digits", "ImageFolder", "ImageSet", "NpzImages", "Split", "door", "largest_remainder"]
__all__ += ["load"]


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


Data = Digits | Cifar10 | NpzImages | ImageFolder
"""Every door, as the type of a recipe's field."""
DOORS: dict[str, Data] = {
    "digits": Digits(),
    "cifar10": Cifar10(),
    "cifar10-16": Cifar10(side=16, train_images=1000),
}
"""Data sets that have a name, and the door that it stands for."""


def door(name_or_path: str, **options: Any) -> Data:
    """The door that a name, a folder or an .npz file stands for, with options for its fields; nothing is loaded.

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
    if (path / "store.json").is_file():
        raise UserError(f"data: expected real images, got {place}, a store of synthetic ones (--synthetic takes it)")
    if path.is_dir():
        return ImageFolder(path=place)
    if path.is_file() and path.suffix == ".npz":
        return NpzImages(path=place)
    if path.exists():
        raise UserError(
            f"data: expected {', '.join(DOORS)}, a folder with a folder for each class, or an .npz file, got {place}"
        )
    raise unknown("data set (or folder, or .npz file)", place, list(DOORS))


def load(name_or_path: str, **options: Any) -> ImageSet:
    """An image set by name, folder or .npz file; options are the fields of its door. UserError as `door`."""
    return door(name_or_path, **options).load()
