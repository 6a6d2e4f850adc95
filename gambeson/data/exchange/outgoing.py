"""What the writers of every format share: images of a store or a selection in pieces, and a folder with a draft's name.

A draft stands beside the place it is for until it is whole; stopped, the same command goes on with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from gambeson.data.exchange.incoming import ABOUT, block_size
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.disk import open_folder, read_json, write_json
from gambeson.errors import EnvironmentFault, UserError, require
from gambeson.types import Progress, silent

RECORD = "unfinished.json"
BLOCK = 4096


@dataclass(frozen=True)
class Outgoing:
    """Images on their way into files of another format; `report` is told (done, total) images."""

    source: SyntheticStore | Chosen
    report: Progress = silent
    block: int = BLOCK

    def __post_init__(self) -> None:
        require(len(self.source) > 0, "images to write", "at least one", 0)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        return self.source.shape

    @property
    def provenance(self) -> dict[str, Any]:
        """That of the store."""
        return store_of(self.source).provenance

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The store's names of its classes, otherwise their numbers."""
        classes, names = int(self.source.compact_labels.max()) + 1, class_names(self.source)
        require(
            not names or len(names) >= classes, "class names of the store", f"one for {classes} classes", len(names)
        )
        return names or numbered(classes)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images uint8 [n, H, W, C] and labels int64 [n] from `start` up to `stop`, a block in memory."""
        stop, size = len(self) if stop is None else stop, block_size(self.shape, self.block)
        for begin in range(start, stop, size):
            end = min(begin + size, stop)
            yield self.source.stretch(begin, end)
            self.report(end, len(self))

    def labels(self) -> Iterator[np.ndarray]:
        """All labels int64, some at a time."""
        labels = self.source.compact_labels
        for begin in range(0, len(self), 1 << 20):
            yield labels[begin : begin + (1 << 20)].astype(np.int64)

    @property
    def about(self) -> dict[str, Any]:
        """What stands beside the images, for `About.beside` to read."""
        inherited = {name: self.provenance.get(name) for name in ("licence", "additional_data")}
        known = {"images": len(self), "shape": list(self.shape), "class_names": list(self.class_names)}
        return {"written_by": "gambeson", **known, **inherited, "provenance": self.provenance}


def store_of(source: SyntheticStore | Chosen) -> SyntheticStore:
    """The store itself, or the one that a selection is from."""
    return source.store if isinstance(source, Chosen) else source


def class_names(source: SyntheticStore | Chosen) -> tuple[str, ...]:
    """The names of the classes, where the store's provenance has them."""
    return tuple(store_of(source).provenance.get("class_names") or ())


def class_counts(labels: np.ndarray) -> tuple[int, np.ndarray]:
    """Of labels [N] from -1 on: how many are -1, and how many each class has [K]; some at a time in memory."""
    counts = np.zeros((int(labels.max()) if len(labels) else -1) + 2, np.int64)
    for begin in range(0, len(labels), 1 << 20):
        counts += np.bincount(labels[begin : begin + (1 << 20)].astype(np.int64) + 1, minlength=len(counts))
    return int(counts[0]), counts[1:]


def numbered(classes: int) -> tuple[str, ...]:
    """'00', '01', ...: names that sort as the labels do."""
    width = len(str(max(classes - 1, 0)))
    return tuple(f"{label:0{width}d}" for label in range(classes))


def digits(images: int) -> int:
    """Digits of an image's number in a name: names then sort as the numbers do."""
    return max(len(str(images - 1)), 8)


def free(out: Path) -> None:
    """UserError where something lies already; EnvironmentFault where nothing may be written."""
    require(not out.exists(), "--out", "a path where nothing lies yet", str(out))
    open_folder(out.parent)


@contextmanager
def draft(out: Path, asked: dict[str, Any]) -> Iterator[Path]:
    """A folder to fill, which gets the name `out` at the end of the block.

    After a break it stays, and the next draft for the same `asked` (plain values) goes on with it; after a UserError,
    which the same command would meet again, it goes. UserError where `out` is there, where a draft for something else
    is, and where another process is at it.
    """
    free(out)
    folder = out.with_name(f".{out.name}.part")
    open_folder(folder)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _claim(folder, asked, out)
            with _cleared(folder):
                yield folder
            for name in (RECORD, ".lock"):
                (folder / name).unlink(missing_ok=True)
            os.replace(folder, out)
    except Timeout:
        raise UserError(
            f"{out}: expected to write it alone, but another process is at it; wait, or choose another"
        ) from None
    except EnvironmentFault:
        raise
    except OSError as error:
        raise EnvironmentFault(
            f"{out}: expected to write there, got: {error}. Free some space or choose another --out; "
            "the same command goes on from what is written"
        ) from error


@contextmanager
def _cleared(folder: Path) -> Iterator[None]:
    """Removes the folder where what goes into it proves to be wrong."""
    try:
        yield
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _claim(folder: Path, asked: dict[str, Any], out: Path) -> None:
    """UserError where the folder holds a draft of something else."""
    record = folder / RECORD
    if record.exists() and read_json(record)["asked"] != asked:
        raise UserError(
            f"{folder}: expected unfinished work of the same command, found that of another one for {out.name}; "
            "remove the folder, or choose another --out"
        )
    if not record.exists():
        write_json(record, {"asked": asked, "pieces": 0})


def write_folder(
    out: Outgoing,
    path: Path,
    form: dict[str, Any],
    per_piece: int,
    write: Callable[[Path, int, int, int], None],
    files: dict[str, Any] | None = None,
) -> None:
    """Fills a folder piece by piece by `write(folder, piece, start, stop)`; a start after a break goes on.

    `form` says what is written, for a draft of another form to be told from this one; `files` tells the hub, in the
    data card, where the images are.
    """
    from gambeson.data.exchange.store_card import source_card, write_card  # which counts labels as done here

    asked = {**form, "images": out.source.digest, "per_piece": per_piece}
    with draft(path, asked) as folder:
        done = read_json(folder / RECORD)["pieces"]
        for piece in range(done, -(-len(out) // per_piece)):
            write(folder, piece, piece * per_piece, min((piece + 1) * per_piece, len(out)))
            write_json(folder / RECORD, {"asked": asked, "pieces": piece + 1})
        write_card(folder, source_card(out.source, path.name, files or {}))
        write_json(folder / ABOUT, out.about)
