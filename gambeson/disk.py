"""Files that are whole or not there: written beside and renamed, JSON, checksums, what dead processes left."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gambeson.errors import EnvironmentFault

REDO = "It was changed after it was written: move its folder away and start the same command again to redo the stage"
LARGEST_JSON = 2**25
"""Bytes of a JSON file that are read, at most: in memory it can take twenty times as many."""
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}
"""What a file system says that has no hard links."""


def alive(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def sweep(folder: Path) -> None:
    """Removes what processes that are dead left half-written below a folder."""
    for path in folder.rglob(".*.part"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not alive(int(pid)):
            path.unlink(missing_ok=True)


def read_bounded(path: Path, most: int = LARGEST_JSON) -> bytes:
    """The content of a small file. EnvironmentFault, naming it, for a longer one, and for a pipe or a device (a link
    in a stranger's folder may lead to one): those may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise EnvironmentFault(f"{path}: expected a plain file, got a pipe or a device, which is not read")
    with open(path, "rb") as handle:
        content = handle.read(most + 1)
    if len(content) > most:
        raise EnvironmentFault(f"{path}: expected at most {most:,} bytes, got more; it is damaged, or none of ours")
    return content


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours. Raises EnvironmentFault, naming it, where it is damaged."""
    try:
        return json.loads(read_bounded(path).decode())
    except (ValueError, RecursionError) as error:
        raise EnvironmentFault(f"{path}: expected JSON, got damaged text ({error}). {REDO}") from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed.

    No two processes share it, on this machine or on any other: process ids alone repeat among containers and machines
    that share a folder. Raises EnvironmentFault, naming the file, when the disk is full or nothing may be written.
    """
    with _beside(path) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)


def create(path: Path, fill: Callable[[Path], object]) -> bool:
    """Makes a file whole, `fill` being given a temporary path, unless there is one; whether it was this call's doing.

    Of many processes that try, on any machines that share the folder, one gets True. Faults as in `atomic`.
    """
    if path.exists():
        return False
    with _beside(path) as temporary:
        fill(temporary)
        _flush(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _exclusive(temporary, path)
    return True


def _exclusive(whole: Path, path: Path) -> bool:
    """The same on a file system without hard links (exFAT): one wins, but its content comes after its name."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    os.close(handle)
    os.replace(whole, path)
    return True


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary path beside a file, removed at the end; EnvironmentFault, naming it, where disk or rights fail."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except EnvironmentFault:
        raise
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: expected to write this file, got: {error.strerror or error}. Nothing half-written was kept; free "
            "some space or choose another folder (--runs DIR, --out PATH), then start the same command again, which "
            "resumes"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def open_folder(folder: Path) -> None:
    """Makes a folder. Raises EnvironmentFault, naming it, where nothing may be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{folder}: expected a folder I may write to, got: {error.strerror}. Choose another with --runs DIR "
            "(or --out PATH)"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
