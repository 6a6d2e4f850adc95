"""The door for Parquet files as Hugging Face lays them out: a column of encoded pictures or pixels, one of labels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gambeson.data.archives import DAMAGE
from gambeson.data.assembly import as_images
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.npz import check_memory, check_shares, divided, numbered
from gambeson.data.pictures import BadPicture, Rule, check_rule, read_pictures
from gambeson.errors import UserError, require

IMAGES = ("image", "img", "images", "picture", "pixels", "pixel_values")
LABELS = ("label", "labels", "fine_label", "class", "target", "y")
"""Names by which the columns are known, the first found wins; a column that is typed as an image comes before them."""
SPLITS = {"train": "train", "test": "test", "validation": "validation", "val": "validation", "valid": "validation"}
"""What files and folders are called -> the part that they are. Others beside `train` are left out."""


@dataclass(frozen=True, kw_only=True)
class ParquetImages:
    """A Parquet file, or a folder of them called train-*, test-* and validation-* (or in folders of these names)."""

    path: str = ""  # the file or folder
    config: str = ""  # which folder of a set that comes in several versions; none: the only one
    image_column: str = ""  # the column of images; none: the one typed so, or called image, img ...
    label_column: str = ""  # the column of classes; none: the one called label, labels, fine_label ...
    size: int = 32  # side of the images in pixels
    resize: Literal["crop", "squash"] = "crop"  # shorter side to size, then the centre; or both sides to size
    grey: bool = False  # one channel instead of three
    validation_share: float = 0.1  # share of train held out for curves and choices, stratified, where there is none
    test_share: float = 0.1  # share held out as test, stratified, where there is none
    flip_safe: bool = False  # whether a mirrored image keeps its class
    split_seed: int = 0  # seed of the split, the same for every run seed
    on_bad_image: Literal["fail", "skip"] = "fail"  # what cannot be read ends the reading, or is left out and listed

    def __post_init__(self) -> None:
        check_shares(self.validation_share, self.test_share)
        check_rule(self.size, self.resize, self.on_bad_image)

    def load(self) -> ImageSet:
        """The image set. Raises UserError naming file, columns and types for what is not known or damaged."""
        root = Path(self.path)
        require(bool(self.path) and root.exists(), "data.path", "a .parquet file or a folder of them", self.path)
        return self.from_files(root, root.resolve().stem if root.is_file() else root.resolve().name)

    def from_files(self, root: Path, name: str) -> ImageSet:
        """The image set of a file or folder under a name. Raises UserError as `load`."""
        tables = {part: Table.open(files, self) for part, files in parts_of(root, self.config).items()}
        names = tables["train"].class_names()
        rule = Rule(size=self.size, resize=self.resize, grey=self.grey, on_bad_image=self.on_bad_image)
        read = {part: table.split(rule, names) for part, table in tables.items()}
        return divided(
            name, read["train"], read.get("test"), names, self.flip_safe,
            (self.validation_share, self.test_share), self.split_seed, read.get("validation"),
        )  # fmt: skip


def has_parquet(folder: Path) -> bool:
    """Whether a folder is one of Parquet files: some lie in it, in its folders, or in theirs."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"))


def parts_of(root: Path, config: str = "") -> dict[str, list[Path]]:
    """The files of train and, where they are there, validation and test; all are train where no name says a part.

    Raises UserError where there are none, where only other parts are there, and for a set of several versions.
    """
    if root.is_file():
        return {"train": [root]}
    files = sorted(p for p in root.rglob("*.parquet") if not p.relative_to(root).parts[0].startswith("."))
    require(bool(files), str(root), "a folder with .parquet files", "none")
    where = {file: _place(root, file) for file in files}
    versions = sorted({version for version, _ in where.values()})
    if config or len(versions) > 1:
        require(config in versions, f"{root}: data.config", f"one of {', '.join(versions)}", config)
        files = [file for file in files if where[file][0] == config]
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(where[file][1], []).append(file)
    known = {part: files for part, files in found.items() if part in SPLITS.values()}
    require("train" in known or not known, str(root), "files called train-*, or in a folder train", sorted(found))
    return known or {"train": files}


def _place(root: Path, file: Path) -> tuple[str, str]:
    """The version and the part of a file, be it VERSION/data/train-00000-of-00002 or VERSION/train/0000."""
    inner = file.relative_to(root)
    folders, part = list(inner.parts[:-1]), re.split(r"[-_.]\d", inner.stem)[0].lower()
    if folders and (part.isdigit() or (part not in SPLITS and _part(folders[-1]) in SPLITS)):
        part = _part(folders.pop())
    return "/".join(name for name in folders if name != "data"), SPLITS.get(part, part)


def _part(folder: str) -> str:
    """The hub calls a part of which it converted a part only so."""
    return folder.lower().removeprefix("partial-")


@dataclass(frozen=True)
class Table:
    """The two columns of the Parquet files of one part."""

    files: list[Path]
    image: str
    label: str
    rows: list[int]  # of each file
    names: tuple[str, ...]  # of the classes, where the files say them
    labels: list[Any]  # of all rows, whole numbers or words

    @staticmethod
    def open(files: list[Path], spec: ParquetImages) -> Table:
        """Heads and labels; images are read later. Raises UserError for columns that are not there or not known."""
        from pyarrow.parquet import ParquetFile

        labels, rows, columns, names = [], [], ("", ""), ()
        for file in files:
            with _reading(file), ParquetFile(file) as opened:
                columns = _columns(file, opened.schema_arrow, spec)
                names = _names(opened.schema_arrow, columns[1])
                check_memory(file, 4 * opened.metadata.num_rows * spec.size**2 * (1 if spec.grey else 3))
                batches = opened.iter_batches(columns=[columns[1]])
                found = [label for batch in batches for label in batch.column(0).to_pylist()]
            rows.append(len(found))
            labels += found
        kinds = {type(value) for value in labels}
        if kinds not in ({int}, {str}):
            raise UserError(
                f"{files[0]}: expected whole numbers or words in the column {columns[1]}, none of them missing, got "
                f"{', '.join(sorted(kind.__name__ for kind in kinds)) or 'no rows'}"
            )
        return Table(files, *columns, rows, names, labels)

    def class_names(self) -> tuple[str, ...]:
        """The classes: as the files name them, the words that the labels are, or their numbers."""
        if self.names:
            return self.names
        values = sorted(set(self.labels))
        return tuple(values) if isinstance(values[0], str) else numbered(self.files[0], max(values[-1], 0))

    def split(self, rule: Rule, names: tuple[str, ...]) -> Split:
        """Images and labels. Raises UserError for labels that are no class, and as `read_pictures`."""
        where = f"{self.files[0]}{f' and {len(self.files) - 1} more files' if len(self.files) > 1 else ''}"
        label_of = {name: label for label, name in enumerate(names)}
        numbers = [label_of.get(value, -1) if isinstance(value, str) else value for value in self.labels]
        strange = sorted({self.labels[i] for i, number in enumerate(numbers) if not 0 <= number < len(names)})
        require(not strange, f"{where}: {self.label}", f"0 to {len(names) - 1}, or a class of train", strange[:5])
        stream = self._cells()
        pixels, kept = read_pictures(where, list(self._titles()), lambda _: picture_of(next(stream, None)), rule)
        return Split(as_images(pixels), torch.tensor(numbers)[torch.from_numpy(kept)])

    def _titles(self) -> Iterator[str]:
        """What each picture is called in errors."""
        return (f"{file.name} row {i}" for file, count in zip(self.files, self.rows, strict=True) for i in range(count))

    def _cells(self) -> Iterator[Any]:
        """The column of images, cell by cell, a few rows in memory at a time."""
        from pyarrow.parquet import ParquetFile

        for file in self.files:
            with _reading(file), ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=at_once(opened, 64), columns=[self.image]):
                    yield from batch.column(0)


AT_ONCE = 1 << 28
"""Bytes that the pictures of a few rows may take, if each is as large as its whole group of rows."""


def at_once(opened: Any, most: int) -> int:
    """Rows that are read at once: fewer where a picture may be large, as every row may hold the same one."""
    # the groups' sizes: pyarrow ends the process where a damaged file does not say its columns'
    sizes = [opened.metadata.row_group(i).total_byte_size for i in range(opened.num_row_groups)]
    return max(1, min(most, AT_ONCE // max([1, *sizes])))


def picture_of(cell: Any) -> bytes | np.ndarray:
    """An encoded picture or uint8 [H, W(, C)] from a cell of pyarrow. Raises BadPicture where it holds neither."""
    import pyarrow as pa

    if cell is None:
        raise BadPicture("no such row, though there is a label")
    if pa.types.is_struct(cell.type) and cell.type.get_field_index("bytes") < 0:
        raise BadPicture(f"expected a struct with bytes, got {cell.type}")
    value = cell["bytes"] if pa.types.is_struct(cell.type) else cell
    if not value.is_valid:
        raise BadPicture("no picture" if value is cell else "a path, but no bytes; save the set with its images in it")
    if isinstance(content := value.as_py(), bytes):
        return content
    try:
        pixels = np.array(content)
    except ValueError:
        raise BadPicture("rows of different lengths") from None
    return _laid_out(pixels)


def _laid_out(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W(, C)] from nested lists: [H, W], [H, W, C], [C, H, W], or the bytes of a square in either order."""
    if pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
        raise BadPicture(f"expected whole numbers from 0 to 255, got {pixels.dtype} {list(pixels.shape)}")
    pixels = pixels.astype(np.uint8)
    if pixels.ndim == 1:
        pixels = _square(pixels)
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3)):
        return np.ascontiguousarray(pixels)
    raise BadPicture(f"expected [H, W], [H, W, 1 or 3] or [1 or 3, H, W], got {list(pixels.shape)}")


def _square(pixels: np.ndarray) -> np.ndarray:
    """[side, side, C] of a flat row, pixel by pixel."""
    for channels in (1, 3):
        side = round((len(pixels) / channels) ** 0.5)
        if side * side * channels == len(pixels):
            return pixels.reshape(side, side, channels)
    raise BadPicture(f"expected the bytes of a square picture, grey or RGB, got {len(pixels):,}")


def _columns(file: Path, schema: Any, spec: ParquetImages) -> tuple[str, str]:
    """The columns of images and labels."""
    typed = [
        name for name, kind in _features(schema).items() if isinstance(kind, dict) and kind.get("_type") == "Image"
    ]
    image = _first(file, schema, spec.image_column, (*typed, *IMAGES), "image_column")
    return image, _first(file, schema, spec.label_column, LABELS, "label_column")


def _first(file: Path, schema: Any, wanted: str, known: tuple[str, ...], field: str) -> str:
    options = (wanted,) if wanted else known
    found = next((name for name in options if name in schema.names), None)
    if found is None:
        listed = ", ".join(f"{column.name} ({column.type})" for column in schema)
        raise UserError(
            f"{file}: expected a column {' or '.join(dict.fromkeys(options))}, found {listed or 'none'}; say which "
            f"with {field}"
        )
    return found


def _features(schema: Any) -> dict[str, Any]:
    """What the library `datasets` wrote about the columns."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(told["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}


def _names(schema: Any, label: str) -> tuple[str, ...]:
    """The classes' names of a label column where the file has them."""
    kind = _features(schema).get(label)
    names = kind.get("names") if isinstance(kind, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """pyarrow's errors as UserErrors that name the file."""
    from pyarrow import ArrowException

    try:
        yield
    except UserError:
        raise
    except (*DAMAGE, ArrowException) as error:
        raise UserError(
            f"{file}: expected a whole Parquet file, got a damaged or another one ({error}); get it again"
        ) from error
