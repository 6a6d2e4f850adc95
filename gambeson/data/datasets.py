"""The doors: a name becomes an ImageSet with train, validation and test parts, images float NCHW in [0, 1]."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from gambeson.errors import UserError, unknown
from gambeson.randomness import derive
from gambeson.types import Images, Labels


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] float32 in [0, 1] and labels [N] int64."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A labelled image set. `test` is read by evaluation only; `flip_safe`: a mirrored image keeps its class."""

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    flip_safe: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return tuple(self.train.images.shape[1:])  # type: ignore[return-value]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over pixels, labels and split: what makes two data sets the same input of a stage."""
        state = hashlib.sha256(repr((self.class_names, self.flip_safe, self.shape)).encode())
        for part in (self.train, self.validation, self.test):
            state.update(part.images.numpy().tobytes() + b"|" + part.labels.numpy().tobytes())
        return state.hexdigest()


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


def largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
    """`total` split into whole numbers in proportion to `weights`, the largest remainders rounded up."""
    exact = weights / weights.sum() * total
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole


DOORS = {"digits": Digits}


def load(name_or_path: str, **options: int) -> ImageSet:
    """An image set by name; options are the fields of its door. Raises UserError for an unknown name."""
    if name_or_path not in DOORS:
        raise unknown("data set", name_or_path, list(DOORS))
    return DOORS[name_or_path](**options).load()
