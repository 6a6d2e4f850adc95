"""Downsampled ImageNet (Chrabaszcz et al. 2017): ten batches of train and one of val, as npz files or pickles.

The pickles are read like CIFAR's: nothing in them is run. Batches are read one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gambeson.data.archives import absent
from gambeson.data.assembly import Part, assembled, check_counts, chosen
from gambeson.data.cifar import Labelled, read_batch
from gambeson.data.imageset import ImageSet, data_root
from gambeson.data.npz import check_memory, read_arrays, unrolled
from gambeson.errors import UserError, require

TRAIN = tuple(f"train_data_batch_{i}" for i in range(1, 11))
NAMES = "map_clsloc.txt"


@dataclass(frozen=True, kw_only=True)
class ImageNet64:
    """1,281,167 photographs of 1,000 classes at 64x64 (or 32, 16, 8, whichever is there); 50,000 more are tested on."""

    path: str = ""  # the folder with train_data_batch_1 .. 10 and val_data; none: imagenet64 in the data root
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_images: int = 10_000  # images of train held out for curves and choices, stratified
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        check_counts(self.validation_images, self.train_images, 1000, 1_000_000)

    def load(self) -> ImageSet:
        """The image set; UserError where batches miss or are damaged, and where memory does not hold what is chosen."""
        root = Path(self.path) if self.path else data_root() / "imagenet64"
        train, test = _part([_file(root, name) for name in TRAIN]), _part([_file(root, "val_data")])
        names = _names(root)
        split = self.validation_images, self.train_images, self.split_seed
        where = chosen("imagenet64", train.labels, test.labels, names, *split)
        side = train.read(where.train[:1]).shape[1]
        return assembled(f"imagenet{side}", train, test, names, where, side, flip_safe=True)


def is_downsampled(root: Path) -> bool:
    """Whether a folder holds the batches."""
    return any((root / f"{TRAIN[0]}{suffix}").is_file() for suffix in ("", ".npz"))


def _file(root: Path, name: str) -> Path:
    for path in (root / f"{name}.npz", root / name):
        if path.is_file():
            return path
    raise absent("imagenet64", [f"{name}.npz", name], [root])


def _batch(path: Path) -> Labelled:
    """Pixels uint8 [N, side, side, 3] and labels int64 [N] from 0 of one file."""
    if path.suffix == ".npz":
        arrays = read_arrays(path, {"images": ("data",), "labels": ("labels",)})
        pixels, labels = arrays["images"], arrays["labels"]
    else:
        check_memory(path, path.stat().st_size)
        pixels, labels = read_batch(path, b"labels")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or unrolled(pixels, labels)[0].ndim != 4:
        raise UserError(
            f"{path}: expected data uint8 [N, 3 * side * side] and as many labels, got {pixels.dtype} "
            f"{list(pixels.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    return unrolled(pixels, np.zeros(len(labels), np.int64))[0], _from_zero(path, labels)


def _labels(path: Path) -> np.ndarray:
    """The labels of a file, from 0; of an npz file nothing else is read."""
    if path.suffix == ".npz":
        return _from_zero(path, read_arrays(path, {"labels": ("labels",)})["labels"])
    return _batch(path)[1]


def _from_zero(path: Path, labels: np.ndarray) -> np.ndarray:
    """The classes 1 to 1000 as int64 from 0. Raises UserError for others."""
    right = labels.dtype.kind in "iu" and labels.size > 0
    inside = right and int(labels.min()) >= 1 and int(labels.max()) <= 1000
    told = f"{labels.min()} to {labels.max()}" if right else f"{labels.dtype} {list(labels.shape)}"
    require(inside, f"{path}: labels", "1 to 1000", told)
    return labels.astype(np.int64) - 1


def _part(paths: Sequence[Path]) -> Part:
    """The images of some files, one after the other."""
    labels = [_labels(path) for path in paths]
    starts = np.cumsum([0, *map(len, labels)])

    def read(places: np.ndarray) -> np.ndarray:
        """In the order of the places, a file at a time."""
        images: np.ndarray | None = None
        for path, start, end in zip(paths, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            here = (places >= start) & (places < end)
            if here.any():
                pixels = _batch(path)[0]
                images = np.empty((len(places), *pixels.shape[1:]), np.uint8) if images is None else images
                sizes = f"images of {images.shape[1]} pixels a side, as the batches before"
                require(images.shape[1:] == pixels.shape[1:], str(path), sizes, list(pixels.shape))
                images[here] = pixels[places[here] - start]
        assert images is not None, "places lie in the files"
        return images

    return Part(np.concatenate(labels), read)


def _names(root: Path) -> tuple[str, ...]:
    """The classes' names from map_clsloc.txt ('n02119789 1 kit_fox') where it is there, otherwise their numbers."""
    if not (root / NAMES).is_file():
        return tuple(str(k + 1) for k in range(1000))
    rows = [line.split() for line in (root / NAMES).read_text(encoding="utf-8", errors="replace").splitlines()]
    found = {row[1]: f"{row[2]} ({row[0]})" for row in rows if len(row) == 3}
    missing = [str(k + 1) for k in range(1000) if str(k + 1) not in found]
    require(not missing, str(root / NAMES), "a name for each of 1 to 1000", f"none for {', '.join(missing[:5])}")
    return tuple(found[str(k + 1)] for k in range(1000))
