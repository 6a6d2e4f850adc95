"""The door for numpy's archives: a few known keys, uint8 NHWC or float NCHW; anything else is refused by name."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from gambeson.data.archives import DAMAGE, is_damage
from gambeson.data.imageset import ImageSet, Split, data_root
from gambeson.data.portions import Places, Portions, at_most, balanced, parted, twins
from gambeson.errors import UserError, require
from gambeson.types import Images

IMAGES = ("images", "image", "arr_0", "x_train", "train_images", "data")
LABELS = ("labels", "label", "arr_1", "y_train", "train_labels")
TEST_IMAGES = ("x_test", "test_images")
TEST_LABELS = ("y_test", "test_labels")
"""Keys by which images and labels are known; the test part may lie in the same file. `data`: see `unrolled`."""

MOST_CLASSES = 100_000
"""Labels from here on are taken for damage: a name, and an index, take memory for each class below."""
Keys = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class NpzImages:
    """Images and labels of one's own in .npz files: uint8 [N, H, W(, C)], or float [N, C, H, W] in [0, 1].

    The batches of downsampled ImageNet (`data` uint8 [N, 3 * side * side], labels from 1) are known as well.
    """

    path: str = ""  # the file with images and labels, where it lies or in the data root
    test_path: str = ""  # the file with the test part; none: x_test in the same file, or a share of it
    validation_share: float = 0.1  # share of the training images held out for curves and choices, stratified
    test_share: float = 0.1  # share held out as test, stratified, where no test part is given
    flip_safe: bool = False  # whether a mirrored image keeps its class
    split_seed: int = 0  # seed of the split, the same for every run seed
    side: int = field(default=0, metadata={"neutral": 0})  # pixels that sides are averaged down to; 0: as they are
    groups: str = field(
        default="", metadata={"neutral": ""}
    )  # name of an array that says which thing an image shows: shares are of the things, so that none is in two parts
    drop_test_twins: bool = field(
        default=False, metadata={"neutral": False}
    )  # leaves out training images (with their groups) that are, byte for byte, test images as well
    train_images: int = field(
        default=0, metadata={"neutral": 0}
    )  # real training images, the same number of each class; 0: all that are not held out
    validation_images: int = field(
        default=0, metadata={"neutral": 0}
    )  # most of the held-out images, stratified, that are measured on; 0: all
    test_images: int = field(default=0, metadata={"neutral": 0})  # most test images, stratified; 0: all

    def __post_init__(self) -> None:
        check_shares(self.validation_share, self.test_share)
        for name in ("side", "train_images", "validation_images", "test_images"):
            require(getattr(self, name) >= 0, f"data.{name}", "0 or more", getattr(self, name))

    def load(self) -> ImageSet:
        """The image set; UserError naming keys and shapes for what is not known, and for what cannot be split."""
        require(bool(self.path), "data.path", "an .npz file with images and labels", self.path)
        names = _class_names(Path(self.path))
        train, test = _read(Path(self.path), IMAGES, LABELS, self.groups), self._test()
        names = names or numbered(self.path, int(train.labels.max()))
        _check_labels(Path(self.path).stem, [train.labels, *(() if test is None else (test.labels,))], names)
        if self.drop_test_twins and test is not None:
            train = train.without(test)
        shares = (self.validation_share, self.test_share if test is None else None)
        where = parted(train.labels, names, shares, self.split_seed, train.groups)
        return self._kept(train, train if test is None else test, where, names)

    def _kept(self, train: _Raw, test: _Raw, where: Portions, names: tuple[str, ...]) -> ImageSet:
        """The image set of what is kept: only that is turned into numbers."""
        held, tested = where.validation, np.arange(len(test.labels)) if where.test is None else where.test
        assert held is not None
        seed = self.split_seed
        held = at_most(train.labels, held, self.validation_images, seed, names, "data.validation_images")
        tested = at_most(test.labels, tested, self.test_images, seed, names, "data.test_images")
        return _assembled(
            Path(self.path).stem,
            (
                train.split(balanced(train.labels, where.train, self.train_images, seed, names), self.side),
                train.split(held, self.side),
                test.split(tested, self.side),
            ),
            names,
            self.flip_safe,
        )

    def _test(self) -> _Raw | None:
        if self.test_path:
            return _read(Path(self.test_path), TEST_IMAGES + IMAGES, TEST_LABELS + LABELS)
        if set(TEST_IMAGES) & set(keys_of(Path(self.path))):
            return _read(Path(self.path), TEST_IMAGES, TEST_LABELS)
        return None


@dataclass(frozen=True, kw_only=True)
class _Raw:
    """A part as its file has it."""

    path: Path
    pixels: np.ndarray  # [N, ...]
    labels: np.ndarray  # int64 [N]
    groups: np.ndarray | None = None  # [N]

    def split(self, places: Places, side: int = 0) -> Split:
        """The images of these places as numbers, averaged down to `side` pixels (0: as they are)."""
        from gambeson.data.assembly import shrunk  # which imports this file

        images = _recognised(self.path, self.pixels[places])
        return Split(shrunk(images, side) if side else images, torch.from_numpy(self.labels[places]))

    def without(self, test: _Raw) -> _Raw:
        """The part without images that the test part holds too, and without their groups."""
        kept = ~twins(self.pixels, test.pixels, self.labels, self.groups)
        groups = None if self.groups is None else self.groups[kept]
        return replace(self, pixels=self.pixels[kept], labels=self.labels[kept], groups=groups)


def numbered(source: object, highest: int) -> tuple[str, ...]:
    """Names of classes that have numbers alone, up to the highest label. UserError for one beyond reason."""
    require(highest < MOST_CLASSES, f"{source}: labels", f"below {MOST_CLASSES:,}, numbered 0, 1, 2, ...", highest)
    return tuple(map(str, range(highest + 1)))


def check_shares(validation: float, test: float) -> None:
    """UserError where shares leave nothing to train on."""
    for name, share in (("validation_share", validation), ("test_share", test)):
        require(0 < share < 1, f"data.{name}", "a share between 0 and 1", share)


def divided(
    name: str,
    train: Split,
    test: Split | None,
    names: tuple[str, ...],
    flip_safe: bool,
    shares: tuple[float, float],
    seed: int,
    validation: Split | None = None,
) -> ImageSet:
    """The image set with the parts that are missing split off train: shares (validation, test), stratified."""
    _check_labels(name, [p.labels.numpy() for p in (train, validation, test) if p is not None], names)
    wanted = (shares[0] if validation is None else None, shares[1] if test is None else None)
    where = parted(train.labels.numpy(), names, wanted, seed)
    test = _take(train, where.test) if test is None else test
    validation = _take(train, where.validation) if validation is None else validation
    return _assembled(name, (_take(train, where.train), validation, test), names, flip_safe)


def _assembled(name: str, parts: tuple[Split, Split, Split], names: tuple[str, ...], flip_safe: bool) -> ImageSet:
    """The image set of train, validation and test; UserError for parts of different shapes."""
    train, validation, test = parts
    if len({part.images.shape[1:] for part in parts}) > 1:
        raise UserError(
            f"{name}: expected test and validation images of the training images' shape "
            f"{list(train.images.shape[1:])}, got {list(test.images.shape[1:])} and {list(validation.images.shape[1:])}"
        )
    return ImageSet(name=name, train=train, validation=validation, test=test, class_names=names, flip_safe=flip_safe)


def _take(split: Split, places: Places | None) -> Split:
    assert places is not None
    where = torch.from_numpy(places)
    return Split(split.images[where], split.labels[where])


def _check_labels(name: str, parts: list[np.ndarray], names: tuple[str, ...]) -> None:
    """UserError for a set of fewer than two classes, for labels outside them, and for gaps in train."""
    require(len(names) >= 2, f"{name}: classes", "at least 2", len(names))
    for labels in parts:
        low, high = int(labels.min()), int(labels.max())
        require(low >= 0 and high < len(names), f"{name}: labels", f"0 to {len(names) - 1}", f"{low} to {high}")
    empty = [names[k] for k, n in enumerate(np.bincount(parts[0], minlength=len(names)).tolist()) if not n]
    if empty:
        raise UserError(
            f"{name}: expected training images of each of the {len(names)} classes, got none of "
            f"{', '.join(empty[:10])}; number the classes 0, 1, 2, ... without gaps"
        )


def _class_names(path: Path) -> tuple[str, ...]:
    """The classes' names where the file has them."""
    if "class_names" not in keys_of(path):
        return ()
    return tuple(map(str, read_arrays(path, {"names": ("class_names",)})["names"].tolist()))


def _read(path: Path, images: tuple[str, ...], labels: tuple[str, ...], groups: str = "") -> _Raw:
    """One part of an archive."""
    wanted = {"images": images, "labels": labels} | ({"groups": (groups,)} if groups else {})
    arrays = read_arrays(path, wanted)
    pixels, classes = unrolled(arrays["images"], arrays["labels"])
    require(len(classes) > 0, f"{path}: images", "at least one", 0)
    classes = classes[:, 0] if classes.ndim == 2 and classes.shape[1] == 1 else classes
    if classes.dtype.kind not in "iu" or classes.ndim != 1 or len(classes) != len(pixels) or not len(classes):
        raise UserError(
            f"{path}: expected one whole number for each of {len(pixels)} images as labels, got {classes.dtype} "
            f"{list(classes.shape)}"
        )
    _in_bytes(path, pixels)
    named = arrays.get("groups", classes)
    each = f"one entry for each of {len(classes)} images"
    require(named.shape == classes.shape, f"{path}: {groups}", each, list(named.shape))
    return _Raw(path=path, pixels=pixels, labels=classes.astype(np.int64), groups=arrays.get("groups"))


def unrolled(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of bytes as downsampled ImageNet has them (Chrabaszcz et al. 2017) -> [N, side, side, 3], labels from 0.

    A row holds the planes of red, green and blue; the labels there count from 1. Anything else stays as it is.
    """
    side = math.isqrt(pixels.shape[1] // 3) if pixels.ndim == 2 else 0
    if pixels.dtype != np.uint8 or side < 4 or pixels.shape[1] != 3 * side * side:
        return pixels, labels
    from_one = labels.dtype.kind in "iu" and labels.size > 0 and int(labels.min()) >= 1
    return pixels.reshape(-1, 3, side, side).transpose(0, 2, 3, 1), labels - 1 if from_one else labels


def _in_bytes(path: Path, pixels: np.ndarray) -> bool:
    """True for uint8 [N, H, W(, C)], False for float [N(, C), H, W] in [0, 1]; UserError for anything else."""
    grey = pixels.ndim == 3
    if pixels.dtype == np.uint8 and (grey or (pixels.ndim == 4 and pixels.shape[3] in (1, 3))):
        return True
    if pixels.dtype.kind == "f" and (grey or (pixels.ndim == 4 and pixels.shape[1] in (1, 3))):
        low, high = float(pixels.min()), float(pixels.max())  # NaN makes both NaN, which no comparison passes
        if low >= 0 and high <= 1:
            return False
        raise UserError(f"{path}: expected float images in [0, 1], got {low:.4g} to {high:.4g}")
    raise UserError(
        f"{path}: expected images as uint8 [N, H, W, 1 or 3] (or [N, H, W]), or as float [N, 1 or 3, H, W] (or "
        f"[N, H, W]) in [0, 1], got {pixels.dtype} {list(pixels.shape)}"
    )


def _recognised(path: Path, pixels: np.ndarray) -> Images:
    """float32 NCHW from the two layouts that are known; UserError as `_in_bytes`."""
    grey = pixels.ndim == 3
    if _in_bytes(path, pixels):
        last = pixels[..., None] if grey else pixels
        return torch.from_numpy(np.ascontiguousarray(last.transpose(0, 3, 1, 2))).float().div_(255)
    return torch.from_numpy((pixels[:, None] if grey else pixels).astype(np.float32))


def keys_of(path: Path) -> list[str]:
    """The names of the arrays in an .npz file; UserError where there is none."""
    return list(_opened(path).keys())


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    """The archive, where it lies or in the data root; UserError where there is none. Nothing is unpickled."""
    rooted = data_root() / path
    place = rooted if rooted.is_file() and not path.exists() else path
    try:
        opened = np.load(place, allow_pickle=False)
    except (FileNotFoundError, IsADirectoryError):
        beside = "" if rooted == path else f", there or in the data root ({data_root()}; GAMBESON_DATA names another)"
        raise UserError(f"{path}: expected an .npz file{beside}, found none") from None
    except DAMAGE as error:
        if not is_damage(error):
            raise
        why = "" if "pickle" in str(error) else f" ({error})"  # numpy advises to read what it does not know unsafely
        raise UserError(f"{path}: expected an .npz file, got a damaged or another one{why}") from error
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: expected an .npz file with images and labels, got a single array")
    return opened


def read_arrays(path: Path, wanted: Keys) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by the first of their known keys. UserError says what is there and what is known.

    Nothing is unpickled, and no more memory is taken than a file of its size can fill: heads are read first.
    """
    with _opened(path) as archive:
        chosen = {name: next((k for k in keys if k in archive.files), None) for name, keys in wanted.items()}
        missing = [name for name, key in chosen.items() if key is None]
        if missing:
            known = "; ".join(f"{name}: {', '.join(wanted[name])}" for name in missing)
            raise UserError(
                f"{path}: expected the keys {known}; found {', '.join(archive.files) or 'nothing'}. Save it again with "
                "numpy.savez(path, images=..., labels=...)"
            )
        twice = {name for name in archive.files if archive.files.count(name) > 1}
        require(not twice, f"{path}: arrays", "one of each name", f"several called {', '.join(sorted(twice))}")
        try:
            declared = sum(_declared(path, archive, str(key)) for key in chosen.values())
            check_memory(path, declared)
            return {name: archive[key] for name, key in chosen.items() if key is not None}
        except DAMAGE as error:
            if not is_damage(error):
                raise
            raise UserError(f"{path}: expected whole arrays, got a damaged archive ({error})") from error


_HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DEFLATION = 1032
"""Bytes that one byte of a deflated stream can stand for, at most."""


def _declared(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> int:
    """Bytes that an array takes, as float32 if it is bytes; UserError unless its head declares as many as there are:
    numpy takes the memory before it looks."""
    assert archive.zip is not None
    member = archive.zip.getinfo(f"{key}.npy" if f"{key}.npy" in archive.zip.namelist() else key)
    with archive.zip.open(member) as file:
        version = np.lib.format.read_magic(file)
        require(version in _HEADS, f"{path}, {key}", "numpy's format 1.0 or 2.0", version)
        shape, _, kind = _HEADS[version](file)
        there = member.file_size - file.tell()
    if kind.hasobject:
        raise UserError(
            f"{path}, {key}: expected numbers or text, got Python objects, which are not read: they run code"
        )
    declared = math.prod(shape) * kind.itemsize
    if min(shape, default=0) < 0 or declared != there or member.file_size > _DEFLATION * (member.compress_size + 1):
        raise UserError(
            f"{path}, {key}: expected {kind} {list(shape)} to be the {max(there, 0):,} bytes that follow its head, got "
            f"{declared:,} out of {member.compress_size:,} in the archive; it is damaged, or was made to fill memory"
        )
    return declared * (4 if kind.itemsize == 1 else 1)


def check_memory(path: Path | str, declared: int) -> None:
    """UserError for arrays that do not fit: reading, and changing their layout, takes each of them twice."""
    memory = available_memory()
    most = f"arrays that take at most {memory // 2:,} bytes as float32, half of the memory that is free"
    require(declared <= memory // 2, str(path), most, f"{declared:,}")


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping; where the system does not say, all that there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
