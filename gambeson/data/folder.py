"""The door for image folders, a class per directory, read through Pillow and brought to one size by a stated rule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from struct import error as StructError
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from gambeson.data.imageset import ImageSet, Split
from gambeson.data.npz import check_shares, divided
from gambeson.errors import UserError, require

PARTS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
"""Sub-folders that are parts of a set; without `train` the folders are classes."""
MODES = ("1", "L", "RGB")
"""What Pillow calls 8-bit pictures without transparency; the others would have to be changed to be read."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """A folder of class folders, or of train/, test/ and perhaps val/ with class folders in each."""

    path: str = ""  # the folder
    size: int = 32  # side of the images in pixels
    resize: Literal["crop", "squash"] = "crop"  # shorter side to size, then the centre; or both sides to size
    grey: bool = False  # one channel instead of three
    validation_share: float = 0.1  # share of train held out for curves and choices, stratified, where there is no val/
    test_share: float = 0.1  # share held out as test, stratified, where there is no test/
    flip_safe: bool = False  # whether a mirrored image keeps its class
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        check_shares(self.validation_share, self.test_share)
        require(self.size >= 4, "data.size", "at least 4 pixels", self.size)
        require(self.resize in ("crop", "squash"), "data.resize", "crop or squash", self.resize)

    def load(self) -> ImageSet:
        """The image set; UserError listing every file that is no 8-bit picture, and for what cannot be split."""
        root = Path(self.path)
        require(bool(self.path) and root.is_dir(), "data.path", "a folder with a folder for each class", self.path)
        parts = _parts(root)
        names = tuple(p.name for p in _folders(parts["train"]))
        read = {name: self._read(folder, names) for name, folder in parts.items()}
        return divided(
            root.resolve().name, read["train"], read.get("test"), names, self.flip_safe,
            (self.validation_share, self.test_share), self.split_seed, read.get("validation"),
        )  # fmt: skip

    def _read(self, part: Path, names: tuple[str, ...]) -> Split:
        strange = [p.name for p in _folders(part) if p.name not in names]
        require(not strange, f"{part}: classes", f"those of train ({', '.join(names[:10])})", strange[:10])
        files = [(file, label) for label, name in enumerate(names) for file in _files(part / name)]
        require(bool(files), str(part), "images in class folders", "none")
        pixels = np.empty((len(files), self.size, self.size, 1 if self.grey else 3), np.uint8)
        faults = [fault for i, (file, _) in enumerate(files) if (fault := self._into(pixels[i], file))]
        if faults:
            more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
            raise UserError(
                f"{part}: expected {len(files)} readable pictures of 8 bits, grey or RGB, got "
                f"{len(faults)} that are not: {'; '.join(faults[:10])}{more}. Convert or remove them"
            )
        images = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).contiguous().float().div_(255)
        return Split(images, torch.tensor([label for _, label in files]))

    def _into(self, pixels: np.ndarray, file: Path) -> str:
        """Writes one picture; what is wrong with it, or nothing."""
        try:
            with Image.open(file) as picture:
                if picture.mode not in MODES:
                    return f"{file} (mode {picture.mode})"
                upright = ImageOps.exif_transpose(picture).convert("L" if self.grey else "RGB")
                pixels[:] = np.asarray(resized(upright, self.size, self.resize)).reshape(pixels.shape)
        except (OSError, SyntaxError, ValueError, StructError, Image.DecompressionBombError) as error:
            return f"{file} ({str(error).replace(repr(str(file)), 'it')})"
        return ""


def resized(picture: Image.Image, size: int, rule: Literal["crop", "squash"]) -> Image.Image:
    """A picture of size x size, by Pillow's bicubic filter; one of that size stays as it is."""
    width, height = picture.size
    if rule == "squash":
        return picture.resize((size, size), Image.Resampling.BICUBIC)
    shorter = min(width, height)
    wide, tall = (max(round(side * size / shorter), size) for side in (width, height))
    left, top = (wide - size) // 2, (tall - size) // 2
    return picture.resize((wide, tall), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    """All files below a class folder but hidden ones, in the order of their names."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")) if folder.is_dir() else []


def _parts(root: Path) -> dict[str, Path]:
    """The folders of train and, where they are there, validation and test."""
    found = {part: root / name for part, names in PARTS.items() for name in names if (root / name).is_dir()}
    return found if "train" in found else {"train": root}
