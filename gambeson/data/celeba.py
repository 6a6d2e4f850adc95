"""CelebA (Liu et al. 2015): faces in one folder or zip, an attribute of list_attr_celeba.txt as the class."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from gambeson.data.archives import Files, absent, opened
from gambeson.data.assembly import Chosen, Part, assembled
from gambeson.data.imageset import ImageSet, balanced_part, data_root, held_out
from gambeson.data.npz import check_shares
from gambeson.data.pictures import BadPicture, Rule, check_rule
from gambeson.errors import UserError, require, unknown
from gambeson.randomness import derive

TABLE, PARTITION = "list_attr_celeba", "list_eval_partition"
IMAGES = ("img_align_celeba", "img_align_celeba.zip", "images")


@dataclass(frozen=True, kw_only=True)
class CelebA:
    """202,599 photographs of faces; the class is whether one of 40 attributes holds."""

    path: str = ""  # the folder with img_align_celeba and list_attr_celeba.txt; none: celeba in the data root
    attribute: str = "Male"  # the attribute that is the class, as list_attr_celeba.txt names it
    side: int = 64  # side of the images in pixels
    resize: Literal["crop", "squash"] = "crop"  # shorter side to size, then the centre; or both sides to size
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_share: float = 0.1  # share of train held out, stratified, where list_eval_partition.txt is missing
    test_share: float = 0.1  # share held out as test, stratified, where list_eval_partition.txt is missing
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        check_shares(self.validation_share, self.test_share)
        check_rule(self.side, self.resize, "fail")
        fits = self.train_images % 2 == 0 and self.train_images >= 0
        require(fits, "data.train_images", "0 for all, or a multiple of the 2 classes", self.train_images)

    def load(self) -> ImageSet:
        """The image set; only images that are kept are read. UserError where files, tables or the attribute miss."""
        root = Path(self.path) if self.path else data_root() / "celeba"
        holds = read_attribute(_table(root, TABLE), self.attribute)
        names, labels = list(holds), np.array(list(holds.values()), np.int64)
        classes = (f"not {self.attribute}", self.attribute)
        where = self._chosen(root, names, labels, classes)
        with ExitStack() as stack:
            part = self._part(_images(root, stack), names, labels)
            tested = where.test  # every part lies in the one folder
            test = Part(labels[tested], lambda places: part.read(tested[places]))
            where = Chosen(train=where.train, validation=where.validation, test=np.arange(len(tested)))
            name = f"celeba-{self.attribute}-{self.side}"
            return assembled(name, part, test, classes, where, self.side, flip_safe=True)

    def _chosen(self, root: Path, names: list[str], labels: np.ndarray, classes: tuple[str, str]) -> Chosen:
        """Train, validation and test as CelebA's own partition has them, or stratified shares."""
        if (partition := _found(root, PARTITION)) is not None:
            parts = np.array(_partition(partition, names))
            train, validation, test = (np.flatnonzero(parts == part) for part in range(3))
        else:
            train, validation, test = self._shares(labels, classes)
        sizes = [len(part) for part in (train, validation, test)]
        require(min(sizes) > 0, f"{root}: {PARTITION}", "images in train, validation and test (0, 1, 2)", sizes)
        if self.train_images:
            seed = derive(self.split_seed, "celeba split")
            train = balanced_part(labels, train, self.train_images, seed, classes, "data.train_images")
        return Chosen(train=train, validation=validation, test=test)

    def _shares(self, labels: np.ndarray, classes: tuple[str, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rest, held = np.arange(len(labels)), []
        for part, share in (("test", self.test_share), ("validation", self.validation_share)):
            seed, count = derive(self.split_seed, f"{part} split"), round(share * len(rest))
            taken, rest = held_out(labels, rest, count, seed, classes, f"data.{part}_share")
            held.append(taken)
        return rest, held[1], held[0]

    def _part(self, files: Files, names: list[str], labels: np.ndarray) -> Part:
        """All images of the table."""
        rule = Rule(size=self.side, resize=self.resize)
        there = {PurePosixPath(name).name: name for name in files.names()}
        missing = [name for name in names if name not in there]
        require(not missing, str(files.place), f"the {len(names)} images of {TABLE}", f"none called {missing[:5]}")

        def read(places: np.ndarray) -> np.ndarray:
            pixels = np.empty((len(places), *rule.shape), np.uint8)
            for i, place in enumerate(places.tolist()):
                try:
                    pixels[i] = rule.image(files.read(there[names[place]]))
                except BadPicture as error:
                    raise UserError(f"{files.place}: {names[place]}: expected a picture, got {error}") from error
            return pixels

        return Part(labels, read)


def _found(root: Path, stem: str) -> Path | None:
    """A table as its authors (.txt) or later copies (.csv) distribute it."""
    return next((p for suffix in (".txt", ".csv") if (p := root / f"{stem}{suffix}").is_file()), None)


def _table(root: Path, stem: str) -> Path:
    found = _found(root, stem)
    if found is None:
        raise UserError(
            f"celeba: expected {stem}.txt (or .csv) beside the images in {root.resolve()}, found none; it is part of "
            "CelebA's download (mmlab.ie.cuhk.edu.hk/projects/CelebA.html)"
        )
    return found


def _images(root: Path, stack: ExitStack) -> Files:
    """The images: a folder (with another of the same name in it, as some copies have), a zip, or beside the tables."""
    for name in IMAGES:
        if (root / name).exists():
            return stack.enter_context(opened(root / name))
    if any(root.glob("*.jpg")):
        return stack.enter_context(opened(root))
    raise absent("celeba", IMAGES, [root])


def read_attribute(table: Path, attribute: str) -> dict[str, int]:
    """File name -> 1 where the attribute holds, 0 where not. Raises UserError for another attribute or table."""
    rows = _rows(table)
    if table.suffix == ".txt":
        require(rows[0][0].isdigit() and len(rows) > 1, str(table), "the number of images in line 1", rows[0][:3])
        count, header, rows = int(rows[0][0]), rows[1], rows[2:]
        require(len(rows) == count, str(table), f"{count} rows, as line 1 says", len(rows))
    else:
        header, rows = rows[0][1:], rows[1:]
    if attribute not in header:
        raise unknown(f"attribute of {table}", attribute, header)
    column = header.index(attribute) + 1
    short = [row[0] for row in rows if len(row) != len(header) + 1 or row[column] not in ("1", "-1", "0")]
    require(
        bool(rows) and not short, str(table), f"{len(header)} values of 1 or -1 in each row", short[:5] or "no rows"
    )
    return {row[0]: int(row[column] == "1") for row in rows}


def _partition(table: Path, names: list[str]) -> list[int]:
    """0, 1 or 2 for each of the names."""
    parts = {row[0]: row[1] for row in _rows(table) if len(row) == 2}
    odd = [name for name in names if parts.get(name) not in ("0", "1", "2")]
    require(not odd, str(table), "0, 1 or 2 for each image", f"something else for {', '.join(odd[:5])}")
    return [int(parts[name]) for name in names]


def _rows(table: Path) -> list[list[str]]:
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table}: expected a table of text, got: {error}") from None
    rows = list(csv.reader(lines)) if table.suffix == ".csv" else [line.split() for line in lines]
    rows = [row for row in rows if row]
    require(bool(rows), str(table), "a table", "an empty file")
    return rows
