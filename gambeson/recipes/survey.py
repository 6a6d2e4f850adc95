"""What lies at a path of one's own images (how many of each class, how large, grey or not), and the door for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from gambeson.data.datasets import Data, ImageFolder, NpzImages
from gambeson.data.folder import PARTS
from gambeson.data.imageset import spread
from gambeson.data.npz import LABELS, TEST_IMAGES, keys_of, read_arrays
from gambeson.data.pictures import DAMAGE, FORMATS
from gambeson.errors import UserError

LOOKED_AT = 1000
"""Pictures whose heads are read, at most, spread evenly."""
TEST, VALIDATION = 0.2, 0.1
"""Shares held out of small sets, the second one of what the first has left."""
MOST_TEST, MOST_VALIDATION = 2000, 500
"""Images held out of large ones: an accuracy of 50 % on 2,000 is known to 2.2 points."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found, without a picture decoded."""

    place: str  # where it lies
    counts: Mapping[str, int]  # images of each class, of the part that is trained on
    has_validation: bool = False  # whether validation images lie apart
    has_test: bool = False  # whether test images lie apart
    sides: tuple[int, ...] = ()  # shorter sides of the pictures looked at, ascending; none: one size, read with them
    grey: bool = False  # whether every picture looked at has one channel

    @property
    def total(self) -> int:
        """Images of the part that is trained on."""
        return sum(self.counts.values())

    @property
    def middle(self) -> int:
        """The median of the shorter sides; 0 where there are none."""
        return self.sides[len(self.sides) // 2] if self.sides else 0

    @property
    def least(self) -> int:
        """Images that a class needs: 5 to train on, and 2 and 3 to hold out where no validation and test part is."""
        return 5 + 2 * (not self.has_validation) + 3 * (not self.has_test)


def survey(data: Data) -> Survey | None:
    """What lies behind a door; None for sets that are known. UserError for a set that nothing can be learned from."""
    found = None
    if isinstance(data, ImageFolder):
        found = _folder(Path(data.path))
    elif isinstance(data, NpzImages):
        found = _archive(Path(data.path), bool(data.test_path))
    if found is not None:
        _check(found)
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _folder(root: Path) -> Survey:
    parts = {part: root / name for part, names in PARTS.items() for name in names if (root / name).is_dir()}
    parts = parts if "train" in parts else {"train": root}
    classes = [p for p in _visible(parts["train"]) if p.is_dir()]
    if not classes:
        loose = sum(p.is_file() for p in _visible(parts["train"]))
        raise UserError(
            f"{parts['train']}: expected a folder of images for each class (cat/, dog/, ...), found none"
            + (f" but {loose} files beside each other; sort them into such folders" if loose else "")
        )
    files = {p.name: [f for f in p.rglob("*") if f.is_file() and not f.name.startswith(".")] for p in classes}
    sides, grey = _heads(sorted(file for found in files.values() for file in found))
    return Survey(
        place=str(root),
        counts={name: len(found) for name, found in files.items()},
        has_validation="validation" in parts,
        has_test="test" in parts,
        sides=sides,
        grey=grey,
    )


def _heads(files: list[Path]) -> tuple[tuple[int, ...], bool]:
    """Shorter sides, and whether all are grey, of some of the pictures; those that are none are left to the door."""
    places = spread(len(files), LOOKED_AT)
    sides, modes = [], set()
    for place in places.tolist():
        try:
            with Image.open(files[place], formats=FORMATS) as picture:
                sides.append(min(picture.size))
                modes.add(picture.mode)
        except DAMAGE:
            continue
    return tuple(sorted(sides)), bool(modes) and modes <= {"1", "L"}


def _archive(path: Path, other_test: bool) -> Survey:
    labels = read_arrays(path, {"labels": LABELS})["labels"].ravel()
    numbered = labels.dtype.kind in "iu" and len(labels) > 0 and labels.min() >= 0
    classes, counts = np.unique(labels, return_counts=True) if numbered else (np.zeros(0), np.zeros(0))
    if not numbered:
        raise UserError(
            f"{path}: expected whole numbers from 0 as labels, one for each image, got {labels.dtype} {labels.shape}"
        )
    has_test = other_test or bool(set(TEST_IMAGES) & set(keys_of(path)))
    named = {str(k): int(n) for k, n in zip(classes, counts, strict=True)}
    return Survey(place=str(path), counts=named, has_test=has_test)


def _check(found: Survey) -> None:
    """UserError for one class, and for classes of too few images."""
    if len(found.counts) < 2:
        raise UserError(
            f"{found.place}: expected images of at least 2 classes, got {len(found.counts)}: {', '.join(found.counts)}"
        )
    few = {name: count for name, count in found.counts.items() if count < found.least}
    if few:
        named = ", ".join(f"{name} has {count}" for name, count in list(few.items())[:10])
        apart = [w for w, has in (("choose", found.has_validation), ("test", found.has_test)) if not has]
        raise UserError(
            f"{found.place}: expected at least {found.least} images of each class"
            f"{' (some are held out to ' + ' and to '.join(apart) + ')' if apart else ''}, got too few of {len(few)}: "
            f"{named}{' and others' if len(few) > 10 else ''}; add images, or take those classes out"
        )


def fitting(data: Data, found: Survey, largest: int) -> Data:
    """The door with image side, channels and shares that suit what was found; sides are at most `largest`."""
    share = min(TEST, MOST_TEST / found.total)
    few = min(found.counts.values())
    test = 0.0 if found.has_test else min(max(share, 3 / few), 0.5)  # of a class at least 3
    rest = found.total * (1 - test)
    validation = min(max(min(VALIDATION, MOST_VALIDATION / rest), 2 / (few * (1 - test))), 0.5)
    shares = {"validation_share": _rounded(validation)} | ({} if found.has_test else {"test_share": _rounded(test)})
    if isinstance(data, ImageFolder):
        return replace(data, size=side(found, largest), grey=found.grey, **shares)
    return replace(data, **shares) if isinstance(data, NpzImages) else data


def _rounded(share: float) -> float:
    """The share as one would write it, rounded up so that no class falls short."""
    return math.ceil(share * 1000 - 1e-9) / 1000


def side(found: Survey, largest: int) -> int:
    """The power of two nearest to the median shorter side, from 8 to `largest`: a U-Net can halve it."""
    near = 2 ** round(math.log2(found.middle)) if found.middle else largest
    return min(max(near, 8), largest)
