"""Folders that results are copied to: claimed first and filled file by file, so that a delivery that was killed goes on
and no other result is overwritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gambeson.disk import atomic, checksum, open_folder, read_json, sweep, write_json
from gambeson.errors import UserError
from gambeson.store import Artifact

MARK = "digest.json"
"""The file of such a folder that is written first: whose result it holds."""


def free(folder: Path, rows: str) -> bool:
    """Whether a result may go there: nothing lies there, or a result does (whose, `claim` asks), whole or not.

    rows: the file that a folder without a mark is known by.
    """
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    unfinished = all(name.startswith(".") and name.endswith(".part") for name in names)
    return unfinished or MARK in names or rows in names


def claim(folder: Path, made: Artifact, rows: str) -> None:
    """Makes the folder that of this result. UserError where it is that of another one."""
    open_folder(folder)
    sweep(folder)
    mark, own = folder / MARK, {"stage": made.stage, "digest": made.digest}
    if mark.is_file():
        same = read_json(mark) == own
    else:
        same = not (folder / rows).is_file() or checksum(folder / rows) == made.record["files"][rows]
    if not same:
        raise UserError(
            f"{folder}: expected a new folder, or one with the result of this command, got another result's. Nothing "
            "is lost: give another --out to the same command, which finds its result at once"
        )
    write_json(mark, own)


def copied(source: Path, folder: Path) -> Path:
    """The file in that folder, copied there whole or not at all. Raises EnvironmentFault where the disk is full."""
    with atomic(folder / source.name) as temporary:
        shutil.copyfile(source, temporary)
    return folder / source.name


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`, which takes that name when the block ends well; otherwise nothing is left,
    and after a kill a hidden folder that the next time removes."""
    target = folder.absolute()
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        open_folder(draft)
        yield draft
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
