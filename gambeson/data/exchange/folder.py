"""Class folders of pictures: `CLASS/00000012.png`, the folders' names in the order of the labels."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from gambeson.data.exchange.incoming import About, Shape, block_size, whole
from gambeson.data.exchange.outgoing import Outgoing, digits, write_folder
from gambeson.data.exchange.pictures import ENDINGS, Picture, blocks_of, decoded, encoded
from gambeson.errors import UserError, require

PER_PIECE = 10_000
"""Pictures that are flushed to disk together."""


@dataclass(frozen=True)
class FolderImages:
    """A set in class folders; `files`: the pictures' places in each, sorted. About 70 bytes of memory a picture."""

    folders: tuple[Path, ...]
    class_names: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]
    shape: Shape
    assumed: str = ""

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def blocks(self, size: int = 8192, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images uint8 [n, H, W, C] and labels int64 [n], `size` at a time from block `first` on.

        By the pictures' names over all classes: an exported set comes back in its order. UserError for pictures that
        are damaged or of several sizes.
        """
        start = first * block_size(self.shape, size)
        yield from blocks_of(self._pictures(start), self.shape, size)

    def _pictures(self, start: int) -> Iterator[Picture]:
        for name, label in islice(heapq.merge(*map(_labelled, self.files, range(len(self.files)))), start, None):
            yield _picture(self.folders[label] / name, label)


def _labelled(names: tuple[str, ...], label: int) -> Iterator[tuple[str, int]]:
    return ((name, label) for name in names)


def _picture(path: Path, label: int) -> Picture:
    with whole(path):
        return Picture(str(path), path.read_bytes(), label)


def class_folders(path: Path) -> list[Path]:
    """The folders of the classes, in the order of their names: below `train` where that has folders of its own."""
    return _folders(path / "train") or _folders(path)


def _folders(root: Path) -> list[Path]:
    there = root.iterdir() if root.is_dir() else ()
    return sorted(p for p in there if p.is_dir() and not p.name.startswith((".", "__MACOSX")))


def class_names(path: Path) -> tuple[str, ...]:
    """The names of the classes in the order of the labels. UserError as `read`."""
    return _classes(path)[1]


def is_folder(path: Path) -> bool:
    """Whether a folder has a folder with a picture in it."""
    return any(name.lower().endswith(ENDINGS) for folder in class_folders(path) for name in os.listdir(folder))


def read(path: Path) -> FolderImages:
    """The set in class folders, of which the names are read and the first picture. UserError where there is none."""
    folders, names = _classes(path)
    files = tuple(_files(folder) for folder in folders)
    places = [(names[0], label) for label, names in enumerate(files) if names]
    if not places:
        raise UserError(f"{path}: expected pictures in class folders, found none")
    name, label = min(places)
    height, width, channels = decoded(_picture(folders[label] / name, label)).shape
    part = "" if folders[0].parent == path else "the images below train/ alone"
    return FolderImages(tuple(folders), names, files, (height, width, channels), part)


def _classes(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """A folder for each class in the order of the labels, and the classes' names.

    Where gambeson.json names the classes, folders belong to them by name, and one that is gone was empty. UserError for
    a folder that is none of them.
    """
    there, told = class_folders(path), About.beside(path).class_names
    if not told:
        return there, tuple(folder.name for folder in there)
    wanted = folder_names(told)
    strange = [folder.name for folder in there if folder.name not in wanted]
    known = f"the class folders that gambeson.json was written with, {', '.join(wanted[:10])}"
    require(not strange, f"{path}", f"{known}; remove that file if they were renamed on purpose", strange[:10])
    root = there[0].parent if there else path
    return [root / name for name in wanted], told


def _files(folder: Path) -> tuple[str, ...]:
    """All files below a class folder but hidden ones."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(place, folder)
        found += [name if inside == "." else f"{inside}/{name}" for name in names if not name.startswith(".")]
    return tuple(sorted(found))


def folder_names(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """The classes as names of folders that sort as the labels do: as they are, or with their number in front."""
    plain = all(name and not name.startswith(".") and not set(name) & set("/\\\0") for name in class_names)
    if plain and "train" not in class_names and list(class_names) == sorted(set(class_names)):
        return class_names
    width = len(str(len(class_names) - 1))
    safe = ("".join("_" if c in "/\\\0" else c for c in name) for name in class_names)
    return tuple(f"{label:0{width}d}-{name}" for label, name in enumerate(safe))


def write(out: Outgoing, path: Path) -> None:
    """Writes a folder for each class, also for one without images, and the pictures as PNG; stopped, it goes on.

    UserError for images generated without a class.
    """
    low = int(out.source.compact_labels.min())
    require(low >= 0, "export to class folders", "a class for every image; let a teacher label them first", low)
    names = folder_names(out.class_names)
    form = {"format": "folder", "classes": list(names)}
    write_folder(out, path, form, PER_PIECE, partial(_write, out, names))


def _write(out: Outgoing, names: tuple[str, ...], folder: Path, piece: int, start: int, stop: int) -> None:
    """The pictures of one piece. They are flushed together: one by one takes milliseconds for each."""
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    number, width = start, digits(len(out))
    for images, labels in out.blocks(start, stop):
        for image, label in zip(images, labels.tolist(), strict=True):
            (folder / names[label] / f"{number:0{width}d}.png").write_bytes(encoded(image))
            number += 1
    os.sync()
