"""Archives as their makers distribute them (zip, tar.gz) and unpacked folders, read alike and never unpacked to disk.

A file with a published checksum must have it; what an archive declares is checked before memory is taken.
"""

from __future__ import annotations

import errno
import lzma
import re
import struct
import tarfile
import tokenize
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tarfile import ReadError, TarFile, TarInfo
from typing import Any, NoReturn, Protocol, runtime_checkable
from zipfile import BadZipFile, ZipFile

from gambeson.errors import UserError, require

DEFLATION = 1032
"""Bytes that one byte of a deflated stream can stand for, at most."""
_LONGEST_HEAD = 1 << 16
"""Bytes of what a tar says of a member beside its head, at most."""
LARGEST = 2**28
"""Bytes of the largest member that is read out of an archive; CIFAR's batches, the largest known, take 154 million."""
DAMAGE = (
    BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError, EOFError, OSError,
    SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError,
)  # fmt: skip
"""What Python's readers of archives, numpy's and scipy's raise for files that are damaged or of another kind."""


def is_damage(error: Exception) -> bool:
    """Whether one of DAMAGE tells of the file rather than of the disk: of OSErrors only those without the system's
    number, and EINVAL, with which a place before the file's beginning is refused."""
    return not isinstance(error, OSError) or error.errno in (None, errno.EINVAL)


@runtime_checkable
class Files(Protocol):
    """Files with names, in a folder or an archive; names are relative, with slashes."""

    @property
    def place(self) -> Path:
        """The folder or archive."""
        ...

    def names(self) -> list[str]:
        """All of them but hidden ones, sorted."""
        ...

    def read(self, name: str) -> bytes:
        """The content of one. Raises UserError where it is missing or damaged."""
        ...


class Folder:
    """The files below a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def names(self) -> list[str]:
        """Relative names of all files but hidden ones, sorted."""
        return sorted(_shown(p.relative_to(self.place).as_posix() for p in self.place.rglob("*") if p.is_file()))

    def read(self, name: str) -> bytes:
        """The content of a file. Raises UserError where there is none."""
        try:
            return (self.place / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.place / name}: expected a file, got: {error.strerror or error}") from None


class Zipped:
    """The members of a zip archive that is open."""

    def __init__(self, place: Path, archive: ZipFile) -> None:
        self.place, self._archive = place, archive

    def names(self) -> list[str]:
        """Names of all members but folders and hidden ones, sorted."""
        return sorted(_shown(name for name in self._archive.namelist() if not name.endswith("/")))

    def read(self, name: str) -> bytes:
        """The content of a member. Raises UserError where it is missing, damaged, or lies about its size."""
        try:
            member = self._archive.getinfo(name)
            if member.file_size > min(LARGEST, DEFLATION * (member.compress_size + 1)):
                _too_large(self.place, name, member.file_size)
            return self._archive.read(member)
        except KeyError:
            raise UserError(f"{self.place}: expected {name} in it, found none; {AGAIN}") from None
        except UserError:
            raise
        except DAMAGE as error:
            raise damaged(self.place, f"whole files, {name} among them", error) from error


AGAIN = "download it again (`gambeson data get NAME`)"
"""How a damaged archive is mended."""


def damaged(place: Path, expected: str, error: object) -> UserError:
    """The error for a file that is damaged or of another kind."""
    return UserError(f"{place}: expected {expected}, got a damaged or another file ({error or 'cut short'}); {AGAIN}")


@contextmanager
def opened(place: Path) -> Iterator[Files]:
    """The files of a folder or of a zip archive, whose checksum must be the published one if there is one.

    Raises UserError where it is neither.
    """
    if place.is_dir():
        yield Folder(place)
        return
    published(place)
    try:
        archive = ZipFile(place)
    except DAMAGE as error:
        raise damaged(place, "a zip archive", error) from error
    with archive:
        yield Zipped(place, archive)


class Member(TarInfo):
    """A tar's head whose further records are looked at before tarfile searches them: its search of many digits in a row
    takes their number squared (CVE-2024-6232)."""

    def _proc_pax(self, archive: TarFile) -> TarInfo:
        held: Any = archive.fileobj
        blocks = -(-self.size // tarfile.BLOCKSIZE)
        ahead = held.read(blocks * tarfile.BLOCKSIZE) if 0 <= self.size <= _LONGEST_HEAD else b"0" * 100
        if re.search(rb"\d{100}", ahead):
            raise ReadError(f"expected records of at most {_LONGEST_HEAD:,} bytes without long numbers")
        archive.fileobj = _Again(ahead, held)  # type: ignore[assignment]
        try:
            return super()._proc_pax(archive)  # type: ignore[misc]
        finally:
            archive.fileobj = held


class _Again:
    """A file of which the next bytes have been read."""

    def __init__(self, ahead: bytes, held: Any) -> None:
        self.ahead, self.held = ahead, held

    def read(self, size: int) -> bytes:
        """The next bytes."""
        given, self.ahead = self.ahead[:size], self.ahead[size:]
        return given or self.held.read(size)

    def tell(self) -> int:
        """Where they are."""
        return self.held.tell() - len(self.ahead)


def members(archive: TarFile) -> Iterator[TarInfo]:
    """The heads of an archive's members, not kept in memory. ReadError where they lead back (CVE-2025-8194).

    Only those of plain files have a content that may be asked for: a link's, a device's, a sparse file's is none.
    """
    here = -1
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        if member.size < 0 or archive.offset <= here:  # type: ignore[attr-defined]
            raise ReadError("expected members one after another, got sizes below 0")
        here = archive.offset  # type: ignore[attr-defined]
        yield member


def is_plain(member: TarInfo) -> bool:
    """Whether a member is a file with a content of its own: no link, no device, no holes."""
    return member.isfile() and not member.issparse()


def tar_members(place: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """The wanted members of a .tar.gz by the last part of their names. Raises UserError naming those not in it."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(published(place), "r|gz", tarinfo=Member) as archive:
            for member in members(archive):
                name = PurePosixPath(member.name).name
                if is_plain(member) and name in wanted:
                    if member.size > LARGEST:
                        _too_large(place, name, member.size)
                    content = archive.extractfile(member)
                    assert content is not None, "a file has content"
                    found[name] = content.read()
    except UserError:
        raise
    except DAMAGE as error:
        raise damaged(place, "a whole .tar.gz archive", error) from error
    missing = sorted(set(wanted) - set(found))
    require(not missing, str(place), f"{', '.join(sorted(wanted))} in it", f"none of {', '.join(missing)}")
    return found


def published(path: Path) -> Path:
    """The path. Raises UserError if a checksum was published for a file of this name and this one has another."""
    from gambeson.data.catalogue import check_published

    check_published(path)
    return path


def first_there(name: str, places: Sequence[Path], roots: Sequence[Path]) -> Path:
    """The first of the places that exists. Raises UserError naming what was looked for and the command that gets it."""
    for place in places:
        if place.exists():
            return place
    raise absent(name, list(dict.fromkeys(place.name for place in places)), roots)


def absent(name: str, wanted: Sequence[str], roots: Sequence[Path]) -> UserError:
    """The error for a set of which nothing is there."""
    from gambeson.data.catalogue import CATALOGUE

    folders = " or ".join(str(root.resolve()) for root in roots)
    command = f"`gambeson data get {name}` downloads it, and " if name in CATALOGUE else ""
    return UserError(
        f"{name}: expected {' or '.join(wanted)} in {folders}, found none; {command}the environment's GAMBESON_DATA "
        "says where data lie"
    )


def _shown(names: Iterator[str]) -> Iterator[str]:
    """Without hidden files, and those that some systems add to archives."""
    return (n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/")))


def _too_large(place: Path, name: str, size: int) -> NoReturn:
    raise UserError(
        f"{place}: expected files of at most {LARGEST:,} bytes, none larger than its compressed part can hold, got "
        f"{size:,} declared for {name}; it is damaged, or was made to fill memory"
    )
