"""The door for image folders, a class per directory, read through Pillow and brought to one size by a stated rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from gambeson.data.assembly import as_images
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.npz import check_shares, divided
from gambeson.data.pictures import Rule, check_rule, read_pictures, resized
from gambeson.errors import UserError, require

__all__ = ["ImageFolder", "resized"]

PARTS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
"""Sub-folders that are parts of a set; without `train` the folders are classes."""


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
    on_bad_image: Literal["fail", "skip"] = field(
        default="fail", metadata={"neutral": "fail"}
    )  # pictures that cannot be read as they are end the reading, or are left out with a warning that lists them

    def __post_init__(self) -> None:
        check_shares(self.validation_share, self.test_share)
        check_rule(self.size, self.resize, self.on_bad_image)

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
        _check_classes(part, names, {label for _, label in files})
        rule = Rule(size=self.size, resize=self.resize, grey=self.grey, on_bad_image=self.on_bad_image)
        pixels, kept = read_pictures(str(part), [str(file) for file, _ in files], lambda i: files[i][0], rule)
        labels = torch.tensor([label for _, label in files])[torch.from_numpy(kept)]
        return Split(as_images(pixels), labels)


def _check_classes(part: Path, names: tuple[str, ...], full: set[int]) -> None:
    """UserError for a single class folder, and for empty ones where they are the classes' own."""
    if len(names) < 2:
        raise UserError(
            f"{part}: classes: expected at least 2 folders, one for each class, got 1 ({', '.join(names)}); say the "
            "folder that holds the class folders"
        )
    empty = [name for label, name in enumerate(names) if label not in full and (part / name).is_dir()]
    if empty:
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        raise UserError(
            f"{part}: expected pictures in every class folder, got none in {', '.join(empty[:10])}{more}; fill or "
            "remove the empty ones"
        )


def _folders(root: Path) -> list[Path]:
    """The class folders, by name. Raises UserError for a link that leads back, or to another class."""
    found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    there: dict[Path, Path] = {p.resolve(): p for p in found if not p.is_symlink()}
    for link in (p for p in found if p.is_symlink()):
        target = link.resolve()
        if root.resolve().is_relative_to(target) or target in there:
            raise UserError(
                f"{link}: expected a folder with the images of one class, got a link to "
                f"{there.get(target, target)}, so that images would be read twice, under two classes; remove it"
            )
        there[target] = link
    return found


def _files(folder: Path) -> list[Path]:
    """All files below a class folder but hidden ones, by name; links that lead nowhere are among them."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if not p.name.startswith(".") and (p.is_file() or not p.exists()))


def _parts(root: Path) -> dict[str, Path]:
    """The folders of train and, where they are there, validation and test."""
    found = {part: root / name for part, names in PARTS.items() for name in names if (root / name).is_dir()}
    return found if "train" in found and _folders(found["train"]) else {"train": root}
