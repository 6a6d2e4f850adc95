"""A labelled image set and how its parts are split off: stratified, from train, the same for the same seed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gambeson.errors import UserError
from gambeson.types import Images, Labels


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] float32 in [0, 1] and labels [N] int64."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


class Withheld(Split):
    """Test images that are there and may not be read: where something is trained, generated or chosen."""

    def __init__(self, count: int) -> None:
        object.__setattr__(self, "count", count)

    def __len__(self) -> int:
        return self.__dict__["count"]

    def __getattribute__(self, name: str) -> Any:
        if name in ("images", "labels"):
            raise UserError(
                f"test {name}: expected to be read by evaluation alone (a stage that says reads_test), not by what "
                "trains, generates or chooses; take the validation part"
            )
        return super().__getattribute__(name)


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
            state.update(np.ascontiguousarray(part.images.numpy()).data)
            state.update(b"|")
            state.update(np.ascontiguousarray(part.labels.numpy()).data)
        return state.hexdigest()

    @property
    def heritage(self) -> dict[str, Any]:
        """What a card says of it; its terms stand in the catalogue, where it has any."""
        sizes = {"train": len(self.train), "validation": len(self.validation), "classes": len(self.class_names)}
        return {"name": self.name, "real": [self.name], **sizes}

    def without_test(self) -> ImageSet:
        """The same set, with the same digest, whose test images raise UserError when they are read."""
        guarded = replace(self, test=Withheld(len(self.test)))
        guarded.__dict__["digest"] = self.digest
        return guarded


def data_root() -> Path:
    """Where data sets lie: the environment's GAMBESON_DATA, else ./data. A place is no part of a recipe."""
    return Path(os.environ.get("GAMBESON_DATA") or "data")


def largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
    """`total` split into whole numbers in proportion to `weights`, the largest remainders rounded up."""
    exact = weights / weights.sum() * total
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole


def held_out(
    labels: np.ndarray, places: np.ndarray, count: int, seed: int, names: Sequence[str], field: str
) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the places, stratified by their labels, and the others; both ascending.

    UserError naming `field` where a class would be empty in either part.
    """
    order = np.random.default_rng(seed).permutation(places)
    members = [order[labels[order] == k] for k in range(len(names))]
    sizes = np.array([len(m) for m in members])
    if (sizes < 2).any():
        raise UserError(
            f"{field}: expected at least 2 images of each class, one to hold out, got "
            f"{_named(names, sizes, sizes < 2)}; add images, or leave the class out"
        )
    if not 0 < count < len(places):
        raise UserError(f"{field}: expected to hold out 1 to {len(places) - 1} of {len(places)} images, got {count}")
    quotas = largest_remainder(sizes, count)
    empty = (quotas == 0) | (quotas == sizes)
    if empty.any():
        raise UserError(
            f"{field}: expected images of each class both held out and left, got {count} of {len(places)} images held "
            f"out and so {_named(names, quotas, empty)} of "
            f"{', '.join(map(str, sizes[empty][:5]))}; hold out {'more' if (quotas == 0).any() else 'fewer'}, or add "
            "images of those classes"
        )
    chosen = np.concatenate([m[:q] for m, q in zip(members, quotas, strict=True)])
    rest = np.concatenate([m[q:] for m, q in zip(members, quotas, strict=True)])
    return np.sort(chosen), np.sort(rest)


def balanced_part(
    labels: np.ndarray, places: np.ndarray, count: int, seed: int, names: Sequence[str], field: str
) -> np.ndarray:
    """`count` of the places, the same number of each class, ascending; a smaller part lies inside a larger one."""
    order = np.random.default_rng(seed).permutation(places)
    members = [order[labels[order] == k] for k in range(len(names))]
    each, most = count // len(names), min(map(len, members))
    if count % len(names) or not 1 <= each <= most:
        raise UserError(
            f"{field}: expected a multiple of {len(names)} from {len(names)} to {most * len(names)} (the same number "
            f"of each class), or 0 for all, got {count}"
        )
    return np.sort(np.concatenate([m[:each] for m in members]))


def spread(total: int, wanted: int) -> np.ndarray:
    """Up to `wanted` positions, evenly spread over 0 .. total - 1."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(int))


def _named(names: Sequence[str], counts: np.ndarray, which: np.ndarray) -> str:
    """'0 of cat, 1 of dog', the first five."""
    found = [f"{counts[k]} of {names[k]}" for k in np.flatnonzero(which).tolist()]
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more classes" if len(found) > 5 else "")
