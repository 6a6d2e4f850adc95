"""Street View House Numbers (Netzer et al. 2011): digits of 32x32 in MATLAB files of version 5, label 10 for 0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gambeson.data.archives import DAMAGE, DEFLATION, damaged, first_there, is_damage, published
from gambeson.data.assembly import Part, assembled, check_counts, chosen
from gambeson.data.imageset import ImageSet, data_root
from gambeson.data.matlab import Variable, arrays, variables
from gambeson.data.npz import check_memory
from gambeson.errors import UserError, require

CLASSES = tuple(map(str, range(10)))


@dataclass(frozen=True, kw_only=True)
class Svhn:
    """99,289 photographs of digits in house numbers, 32x32; 26,032 of them are its test part. Never mirrored."""

    extra: bool = False  # adds the 531,131 easier images of `extra` to train
    side: int = 32  # pixels: 32, or 16 (each the mean of 2x2)
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_images: int = 1000  # images of train held out for curves and choices, stratified
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        require(self.side in (16, 32), "data.side", "32, or 16 (averaged)", self.side)
        check_counts(self.validation_images, self.train_images, 10, 60_000)

    def load(self) -> ImageSet:
        """The image set from the data root; UserError where it is not there, damaged, or of another version."""
        train, test = _part("train"), _part("test")
        if self.extra:
            train = _joined(train, _part("extra"))
        split = self.validation_images, self.train_images, self.split_seed
        where = chosen("svhn", train.labels, test.labels, CLASSES, *split)
        name = "svhn" + ("-extra" if self.extra else "") + (f"-{self.side}" if self.side < 32 else "")
        return assembled(name, train, test, CLASSES, where, self.side, flip_safe=False)


def _part(part: str) -> Part:
    roots = (data_root() / "svhn", data_root())
    path = first_there("svhn", [root / f"{part}_32x32.mat" for root in roots], roots)
    return Part.of(*read_mat(path))


def _joined(first: Part, second: Part) -> Part:
    """Both parts, the second after the first."""

    def read(places: np.ndarray) -> np.ndarray:
        """Places may be of both, in any order."""
        n = len(first.labels)
        early = places < n
        pixels = np.empty((len(places), 32, 32, 3), np.uint8)
        pixels[early], pixels[~early] = first.read(places[early]), second.read(places[~early] - n)
        return pixels

    return Part(np.concatenate([first.labels, second.labels]), read)


def read_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] from 0 to 9 of one of SVHN's files.

    Raises UserError for another version of MATLAB's format, other variables, shapes and labels, and a damaged file.
    """
    _check_version(published(path))
    try:
        there = variables(path)
        _check_variables(path, there)
        found = arrays(path, [variable for variable in there if variable.name in ("X", "y")])
        pixels, labels = found["X"], found["y"].reshape(-1)
    except UserError:
        raise
    except DAMAGE as error:
        if not is_damage(error):
            raise
        raise damaged(path, "a whole MATLAB file with X and y", f"{type(error).__name__}: {error}") from error
    right = pixels.dtype == np.uint8 and labels.dtype.kind in "iuf" and len(labels) == pixels.shape[3]
    require(right, str(path), "bytes in X and whole numbers in y", f"{pixels.dtype} and {labels.dtype} {labels.shape}")
    require(bool(np.isin(labels, range(11)).all()), f"{path}: labels", "1 to 10 (10 means 0)", np.unique(labels)[:20])
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), labels.astype(np.int64) % 10


def _check_version(path: Path) -> None:
    """UserError for what is no MATLAB file of version 5, which begins with that word and ends its head with 0x0100."""
    with path.open("rb") as file:
        head = file.read(128)
    five = head.startswith(b"MATLAB 5.0") and head[124:128] in (b"\x00\x01IM", b"\x01\x00MI")
    if not five:
        what = "version 7.3 (HDF5)" if b"HDF5" in head[:128] or b"7.3" in head[:20] else repr(head[:20])
        raise UserError(
            f"{path}: expected a MATLAB file of version 5, as SVHN's are, got {what}; download it again (`gambeson "
            "data get svhn`), or save it in MATLAB with -v7, which writes version 5 compressed"
        )


def _check_variables(path: Path, listed: list[Variable]) -> None:
    """UserError unless X is [32, 32, 3, N] bytes and y as many labels, and the file can hold them."""
    there = {variable.name: (variable.shape, variable.kind) for variable in listed}
    (shape, kind), (count, told) = (there.get(name, ((), "")) for name in "Xy")
    n = shape[3] if len(shape) == 4 else 0
    if shape != (32, 32, 3, n) or kind != "uint8" or n < 1 or sorted(count) != [1, n]:
        words = ", ".join(f"{name} {kind} {list(shape)}" for name, (shape, kind) in there.items())
        raise UserError(f"{path}: expected X uint8 [32, 32, 3, N] and y [N, 1], got {words[:500] or 'nothing'}")
    require(told != "other", f"{path}: y", "numbers", told)
    require(len(there) == len(listed), f"{path}: variables", "one of each name", [each.name for each in listed][:20])
    declared, most = 3072 * n, DEFLATION * path.stat().st_size
    require(declared <= most, f"{path}: X", f"at most the {most:,} bytes that the file can hold", f"{declared:,}")
    check_memory(path, 4 * declared)
