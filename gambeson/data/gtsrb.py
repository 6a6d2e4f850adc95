"""German traffic signs (Stallkamp et al. 2012) as distributed: frames of signs in zips or folders, split by sign.

A sign was filmed as it came closer, so its frames are almost alike: validation takes whole signs, never some frames.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from gambeson.data.archives import Files, Folder, absent, opened
from gambeson.data.assembly import Chosen, Part, assembled
from gambeson.data.imageset import ImageSet, balanced_part, data_root
from gambeson.data.npz import check_shares
from gambeson.data.pictures import DAMAGE, resized
from gambeson.data.portions import groups_held_out
from gambeson.errors import UserError, require
from gambeson.randomness import derive

CLASSES = (
    *(f"Speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80)),
    "End of speed limit 80",
    "Speed limit 100",
    "Speed limit 120",
    "No passing",
    "No passing for vehicles over 3.5 t",
    "Right-of-way at next intersection",
    "Priority road",
    "Yield",
    "Stop",
    "No vehicles",
    "Vehicles over 3.5 t prohibited",
    "No entry",
    "General caution",
    "Dangerous curve left",
    "Dangerous curve right",
    "Double curve",
    "Bumpy road",
    "Slippery road",
    "Road narrows on the right",
    "Road work",
    "Traffic signals",
    "Pedestrians",
    "Children crossing",
    "Bicycles crossing",
    "Beware of ice/snow",
    "Wild animals crossing",
    "End of all speed and passing limits",
    "Turn right ahead",
    "Turn left ahead",
    "Ahead only",
    "Go straight or right",
    "Go straight or left",
    "Keep right",
    "Keep left",
    "Roundabout mandatory",
    "End of no passing",
    "End of no passing for vehicles over 3.5 t",
)
TRAIN = ("GTSRB_Final_Training_Images.zip", "GTSRB-Training_fixed.zip")
TRAIN_FOLDERS = ("Final_Training/Images", "Training")
"""The final training part (39,209 images) is taken where it lies beside that of the contest's first stage (26,640)."""
TEST, TEST_FOLDERS = ("GTSRB_Final_Test_Images.zip",), ("Final_Test/Images",)
TRUTH, TRUTH_FILE = "GTSRB_Final_Test_GT.zip", "GT-final_test.csv"
COLUMNS = ("Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId")


class Frame(NamedTuple):
    """One picture: where it is, its class, the sign that it shows, and the sign's place in it."""

    file: str
    label: int
    sign: tuple[int, str]  # class and track; () of a test picture is its own
    roi: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, the last two outside


@dataclass(frozen=True, kw_only=True)
class Gtsrb:
    """German traffic signs of 43 classes, 25 to 243 pixels wide; 12,630 are its test part. Never mirrored."""

    side: int = 32  # side of the images in pixels, to which every picture is stretched
    crop_roi: bool = True  # the sign alone, without the border of about a tenth that the pictures have
    drop_test_twins: bool = True  # leaves out signs of train of which a frame is a picture of test, too
    train_images: int = 0  # real training images, the same number of each class; 0: all that are not held out
    validation_share: float = 0.1  # share of the signs (not the pictures) of each class held out, at least one
    split_seed: int = 0  # seed of the split, the same for every run seed

    def __post_init__(self) -> None:
        check_shares(self.validation_share, 0.5)
        require(8 <= self.side <= 128, "data.side", "8 to 128 pixels", self.side)
        fits = self.train_images % 43 == 0 and self.train_images >= 0
        require(fits, "data.train_images", "0 for all, or a multiple of the 43 classes", self.train_images)

    def load(self) -> ImageSet:
        """The image set from the data root; UserError where it is not there, damaged, or files and tables differ."""
        with opened(_place(TRAIN, TRAIN_FOLDERS)) as train_files, opened(_place(TEST, TEST_FOLDERS)) as test_files:
            train, test = train_frames(train_files), test_frames(test_files, _truth())
            if self.drop_test_twins:
                train = without_twins(train_files, train, test_files, test)
            parts = [self._part(files, frames) for files, frames in ((train_files, train), (test_files, test))]
            where = self._chosen(train, len(test))
            return assembled("gtsrb", parts[0], parts[1], CLASSES, where, self.side, flip_safe=False)

    def _chosen(self, train: Sequence[Frame], test: int) -> Chosen:
        labels, seed = np.array([frame.label for frame in train]), derive(self.split_seed, "gtsrb split")
        signs = np.array([frame.sign[1] for frame in train])
        held = groups_held_out(labels, signs, self.validation_share, seed, CLASSES, "data.validation_share")
        rest = np.flatnonzero(~held)
        if self.train_images:
            rest = balanced_part(labels, rest, self.train_images, seed, CLASSES, "data.train_images")
        return Chosen(train=rest, validation=np.flatnonzero(held), test=np.arange(test))

    def _part(self, files: Files, frames: Sequence[Frame]) -> Part:
        def read(places: np.ndarray) -> np.ndarray:
            pixels = np.empty((len(places), self.side, self.side, 3), np.uint8)
            for i, place in enumerate(places.tolist()):
                pixels[i] = self._image(files, frames[place])
            return pixels

        return Part(np.array([frame.label for frame in frames], np.int64), read)

    def _image(self, files: Files, frame: Frame) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(files.read(frame.file)), formats=("PPM",)) as picture:
                x1, y1, x2, y2 = frame.roi
                inside = 0 <= x1 < x2 <= picture.width and 0 <= y1 < y2 <= picture.height
                sizes = f"a sign inside {picture.width} x {picture.height} pixels"
                require(inside, f"{files.place}: {frame.file}", sizes, frame.roi)
                sign = picture.crop(frame.roi) if self.crop_roi else picture
                return np.asarray(resized(sign.convert("RGB"), self.side, "squash"))
        except UserError:
            raise
        except DAMAGE as error:
            raise UserError(f"{files.place}: {frame.file}: expected a picture, got a damaged one ({error})") from error


def train_frames(files: Files) -> list[Frame]:
    """The frames of the training part, by class, sign and time. Raises UserError where tables and files differ."""
    found = [name for name in files.names() if re.search(r"(?:^|/)\d{5}/[^/_]+_[^/]+\.ppm$", name)]
    require(bool(found), str(files.place), "folders 00000 to 00042 with files TRACK_FRAME.ppm", "none")
    by_class: dict[str, dict[str, str]] = {}
    for name in found:
        by_class.setdefault(str(PurePosixPath(name).parent), {})[PurePosixPath(name).name] = name
    frames = []
    for folder, names in sorted(by_class.items(), key=lambda item: item[0].rpartition("/")[2]):
        label = int(folder.rpartition("/")[2])
        table = read_table(files, f"{folder}/GT-{label:05d}.csv".removeprefix("./"), names)
        for name, (roi, told) in table.items():
            require(told == label < 43, f"{files.place}: {names[name]}", f"class {label}, of 0 to 42", told)
            frames.append(Frame(names[name], label, (label, name.partition("_")[0]), roi))
    return frames


def test_frames(files: Files, truth: Path) -> list[Frame]:
    """The pictures of the test part, in the order of their names. Raises UserError where table and files differ."""
    names = {PurePosixPath(name).name: name for name in files.names() if name.endswith(".ppm")}
    require(bool(names), str(files.place), "files 00000.ppm, 00001.ppm, ...", "none")
    if truth.suffix == ".csv":
        table = read_table(Folder(truth.parent), truth.name, names)
    else:
        with opened(truth) as tables:
            listed = [name for name in tables.names() if PurePosixPath(name).name == TRUTH_FILE]
            require(bool(listed), str(truth), f"{TRUTH_FILE} in it", "none")
            table = read_table(tables, listed[0], names)
    return [Frame(names[name], label, (label, name), roi) for name, (roi, label) in table.items()]


def read_table(files: Files, table: str, names: dict[str, str]) -> dict[str, tuple[tuple[int, int, int, int], int]]:
    """File name -> place of the sign and class, for every one of the names, sorted.

    Raises UserError for a table that is missing, has other columns, or lists other files than are there.
    """
    try:
        rows = list(csv.DictReader(files.read(table).decode("utf-8-sig").splitlines(), delimiter=";"))
        columns = list(rows[0]) if rows else []
        require(set(COLUMNS) <= set(columns), f"{files.place}: {table}", f"columns {';'.join(COLUMNS)}", columns)
        found = {row["Filename"]: [int(row[column]) for column in COLUMNS[3:]] for row in rows}
    except (UnicodeDecodeError, csv.Error, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{files.place}: {table}: expected whole numbers in each row, got {error}") from error
    without, lost = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if without or lost:
        raise UserError(
            f"{files.place}: {table}: expected a row for each of {len(names)} pictures, got {len(found)} rows; without "
            f"a row: {', '.join(without[:5]) or 'none'}; without a picture: {', '.join(lost[:5]) or 'none'}"
        )
    return {name: ((row[0], row[1], row[2], row[3]), row[4]) for name, row in sorted(found.items())}


def without_twins(train_files: Files, train: Sequence[Frame], test_files: Files, test: Sequence[Frame]) -> list[Frame]:
    """The training frames without the signs of which a frame is, byte for byte, a picture of the test part."""
    known = {hashlib.blake2b(test_files.read(frame.file)).digest() for frame in test}
    twins = {frame.sign for frame in train if hashlib.blake2b(train_files.read(frame.file)).digest() in known}
    kept = [frame for frame in train if frame.sign not in twins]
    if twins:
        signs = ", ".join(f"class {label} track {track}" for label, track in sorted(twins)[:10])
        warnings.warn(
            f"gtsrb: left out {len(train) - len(kept)} pictures of {len(twins)} signs of train that test shows as well "
            f"({signs})",
            stacklevel=2,
        )
    return kept


def _roots() -> list[Path]:
    return [root / inner for root in (data_root() / "gtsrb", data_root()) for inner in ("", "GTSRB")]


def _place(archives: Sequence[str], folders: Sequence[str]) -> Path:
    """The archive, or the folder that it unpacks to, the best first."""
    for archive, folder in zip(archives, folders, strict=True):
        for root in _roots():
            for place in (root / archive, root / folder):
                if place.exists():
                    return place
    raise absent("gtsrb", [*archives, *(f"the folder GTSRB/{folder}" for folder in folders)], _roots()[::2])


def _truth() -> Path:
    """The table of the test part's classes, or the archive with it."""
    for root in _roots():
        for place in (root / TRUTH, root / TRUTH_FILE, root / "Final_Test/Images" / TRUTH_FILE):
            if place.exists():
                return place
    raise absent("gtsrb", [TRUTH, TRUTH_FILE], _roots()[::2])
