"""Tiny ImageNet (Le & Yang 2015): 200 classes of 64x64, zipped or not; its val part is the test part."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from gambeson.data.archives import Files, first_there, opened
from gambeson.data.assembly import Part, assembled, check_counts, chosen
from gambeson.data.imageset import ImageSet, data_root
from gambeson.data.pictures import BadPicture, Rule
from gambeson.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class TinyImageNet:
    """110,000 labelled photographs of 200 classes, 64x64; the 10,000 of its val part are the test part here."""

    side: int = 64  # pixels: 64, 32 or 16 (each the mean of a square)
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_images: int = 2000  # images of train held out for curves and choices, stratified
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        require(self.side in (16, 32, 64), "data.side", "64, or 32 or 16 (averaged)", self.side)
        check_counts(self.validation_images, self.train_images, 200, 80_000)

    def load(self) -> ImageSet:
        """The image set from the data root; UserError where it is not there, damaged, or tables and files differ."""
        roots = (data_root() / "tiny-imagenet", data_root())
        words = ("tiny-imagenet-200.zip", "tiny-imagenet-200")
        with opened(first_there("tiny-imagenet", [root / word for root in roots for word in words], roots)) as files:
            names = files.names()
            classes = _classes(files, names)
            train, test = _train(files, names, classes), _test(files, names, classes)
            titles = _titles(files, names, classes)
            split = self.validation_images, self.train_images, self.split_seed
            where = chosen("tiny-imagenet", train.labels, test.labels, titles, *split)
            name = "tiny-imagenet" if self.side == 64 else f"tiny-imagenet-{self.side}"
            return assembled(name, train, test, titles, where, self.side, flip_safe=True)


def _one(files: Files, names: list[str], wanted: str) -> list[str]:
    """The lines of a text file by the end of its name. Raises UserError where it is missing or no text."""
    found = next((name for name in names if f"/{name}".endswith(f"/{wanted}")), None)
    if found is None:
        raise UserError(f"{files.place}: expected {wanted} in it, found none; `gambeson data get tiny-imagenet`")
    try:
        return files.read(found).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{files.place}: {found}: expected text, got {error}") from None


def _classes(files: Files, names: list[str]) -> list[str]:
    """The 200 WordNet ids, sorted: a class's label is its place among them."""
    classes = sorted({line.strip() for line in _one(files, names, "wnids.txt")} - {""})
    require(len(classes) == 200, f"{files.place}: wnids.txt", "200 classes", len(classes))
    return classes


def _train(files: Files, names: list[str], classes: list[str]) -> Part:
    """train/ID/images/ID_n.JPEG."""
    found = [(name, m[1]) for name in names if (m := re.search(r"(?:^|/)train/(n\d+)/images/[^/]+\.JPEG$", name))]
    missing = sorted(set(classes) - {wnid for _, wnid in found})
    told = f"none of {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    require(not missing, str(files.place), "images of all classes in train", told)
    return _part(files, found, classes)


def _test(files: Files, names: list[str], classes: list[str]) -> Part:
    """val/images/val_n.JPEG, whose classes val/val_annotations.txt lists."""
    there = {m[1]: name for name in names if (m := re.search(r"(?:^|/)val/images/([^/]+\.JPEG)$", name))}
    rows = [line.split("\t") for line in _one(files, names, "val/val_annotations.txt") if line.strip()]
    told = {row[0]: row[1] for row in rows if len(row) > 1}
    odd = sorted(set(told) ^ set(there))
    if odd or len(told) < len(rows):
        raise UserError(
            f"{files.place}: val_annotations.txt: expected a row with the class of each of {len(there)} images, got "
            f"{len(told)} such rows; {', '.join(odd[:5])} {'is' if len(odd) == 1 else 'are'} in one of both only"
        )
    ordered = sorted(there, key=lambda name: (len(name), name))  # val_2 before val_10
    return _part(files, [(there[name], told[name]) for name in ordered], classes)


def _part(files: Files, found: list[tuple[str, str]], classes: list[str]) -> Part:
    """Images by their names and WordNet ids."""
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    strange = sorted({wnid for _, wnid in found} - set(label_of))
    require(not strange, str(files.place), "classes that wnids.txt lists", strange[:5])
    rule = Rule(size=64)

    def read(places: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(places), 64, 64, 3), np.uint8)
        for i, place in enumerate(places.tolist()):
            try:
                pixels[i] = rule.image(files.read(found[place][0]))
            except BadPicture as error:
                raise UserError(f"{files.place}: {found[place][0]}: expected a picture, got {error}") from error
        return pixels

    return Part(np.array([label_of[wnid] for _, wnid in found], np.int64), read)


def _titles(files: Files, names: list[str], classes: list[str]) -> tuple[str, ...]:
    """The first word for each class in words.txt, with its id where two have the same one."""
    words = dict(line.split("\t", 1) for line in _one(files, names, "words.txt") if "\t" in line)
    missing = [wnid for wnid in classes if wnid not in words]
    require(not missing, f"{files.place}: words.txt", "a name for each class", f"none of {', '.join(missing[:5])}")
    first = [words[wnid].split(",")[0].strip() for wnid in classes]
    count = Counter(first)
    return tuple(
        title if count[title] == 1 else f"{title} ({wnid})" for title, wnid in zip(first, classes, strict=True)
    )
