"""A file or an object at a path or at an s3://, gs:// or file:// URL: whole or not there, and made by one of many.

Conditional creation is the store's own (S3: If-None-Match, GCS: ifGenerationMatch=0, files: a hard link), so that of
any number of machines exactly one makes an object; there are no locks and no leases. Credentials are the client's
business (environment, its configuration, the machine's role): a URL that carries some is refused and never shown.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from gambeson.disk import atomic, checksum, create
from gambeson.errors import EnvironmentFault, UserError

SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "memory": "memory"}
"""Object stores by the beginning of a URL; `memory` is one process's own, for tests."""
SECRET = re.compile(r"(?i)^(.*(key|token|secret|signature|credential|password|passwd|auth|sig).*)$")


class Missing(EnvironmentFault, FileNotFoundError):
    """There is nothing at a place."""


@dataclass(frozen=True)
class Entry:
    """What lies directly below a place."""

    name: str
    size: int | None  # bytes; None for a folder
    mark: str  # changes when its content does: S3's ETag, or a file's size and time


@runtime_checkable
class Keeper(Protocol):
    """What keeps files or objects, by path; every operation is whole or did not happen."""

    def exists(self, path: str) -> bool: ...

    def read(self, path: str) -> bytes: ...

    def write(self, path: str, data: bytes) -> None: ...

    def create(self, path: str, data: bytes) -> bool: ...

    def fetch(self, path: str, to: Path) -> None: ...

    def deliver(self, path: str, of: Path, replace: bool) -> bool: ...

    def entries(self, path: str) -> list[Entry]: ...

    def remove(self, path: str) -> None: ...


@dataclass(frozen=True)
class Place:
    """A file, an object, or a folder of them. A value: it can be pickled, compared, and opens nothing by itself.

    Every operation raises EnvironmentFault (naming the place, without secrets) where disk, network or permission fail;
    what passes - no connection, a server that is busy - is tried again for GAMBESON_PATIENCE seconds (300) first.
    """

    path: str  # an absolute path; for objects bucket/key
    scheme: str = ""  # "" for files, else s3, gs, memory

    @staticmethod
    def of(url: str | Path) -> Place:
        """The place of a path or URL. UserError for another scheme, or for a URL with credentials or a query in it."""
        return _parsed(str(url))

    def __truediv__(self, name: str) -> Place:
        """A place below this one; `name` may hold slashes."""
        return Place(f"{self.path.rstrip('/')}/{name.strip('/')}", self.scheme)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def local(self) -> Path | None:
        """Its path on this machine or a shared file system; None for objects."""
        return None if self.scheme else Path(self.path)

    @property
    def shown(self) -> str:
        """How it is named in messages, records and logs; opens the same place."""
        return f"{self.scheme}://{self.path}" if self.scheme else self.path

    def exists(self) -> bool:
        """Whether there is a file or object here, or any below it."""
        return self._keeper().exists(self.path)

    def read(self) -> bytes:
        """Its content. Raises Missing where there is none."""
        return self._keeper().read(self.path)

    def write(self, data: bytes) -> None:
        """Puts this content here, over what there was."""
        self._keeper().write(self.path, data)

    def create(self, data: bytes) -> bool:
        """Puts this content here if there is nothing yet; False where there is. Of many that try, one gets True.

        Where an answer was lost on the way, it is True if what lies here is this content: who needs to know that it
        was itself puts something of its own into it.
        """
        return self._keeper().create(self.path, data)

    def fetch(self, to: Path, sha256: str | None = None) -> Path:
        """Copies it into a file of this machine; `to`. Missing where there is none; EnvironmentFault for other bytes
        than those of the checksum."""
        with atomic(to) as temporary:
            self._keeper().fetch(self.path, temporary)
            if sha256 is not None and (found := checksum(temporary)) != sha256:
                raise damaged(self.shown, sha256, found)
        return to

    def check(self, sha256: str) -> None:
        """Reads all of it and compares. EnvironmentFault for other bytes than those of the checksum."""
        with tempfile.TemporaryDirectory() as folder:
            self.fetch(Path(folder) / "content", sha256)

    def deliver(self, of: Path, replace: bool = False) -> bool:
        """Copies a file of this machine here if there is nothing yet, or over it; whether it was this call's doing.
        Raises Missing, naming the file, where it is not there."""
        if not of.is_file():
            raise missing(str(of))  # a client's own error would read as a missing bucket
        return self._keeper().deliver(self.path, of, replace)

    def names(self) -> list[str]:
        """Names of what lies directly below, sorted; empty for what is not there. Half-written files do not count."""
        return [entry.name for entry in self.entries()]

    def entries(self) -> list[Entry]:
        """The same with their sizes, by name."""
        found = self._keeper().entries(self.path)
        return sorted((e for e in found if e.name and not e.name.startswith(".")), key=lambda e: e.name)

    def remove(self) -> None:
        """Removes the file or object; nothing happens where there is none. Folders stay."""
        self._keeper().remove(self.path)

    def _keeper(self) -> Keeper:
        if not self.scheme:
            return Files()
        from gambeson.objects import Objects

        return Objects(self.scheme)


def damaged(shown: str, expected: str, found: str) -> EnvironmentFault:
    """What is raised for an object whose bytes are not those that were written."""
    copies = " and what GAMBESON_SCRATCH has of it" if "://" in shown else ""
    return EnvironmentFault(
        f"{shown}: expected SHA-256 {expected[:16]}..., got {found[:16]}...: it was changed after it was written. Move "
        f"the folder it lies in{copies} away and start the same command again, which makes it anew"
    )


def redacted(text: str) -> str:
    """A text with whatever is secret in its URLs replaced by ***: user and password, values of a query."""
    text = re.sub(r"(?i)((?:s3a?|gs|gcs)://)[^/\s@:'\"]+:[^\s'\"]*@", r"\1***@", text)  # a bucket has no port
    text = re.sub(
        r"([a-zA-Z][a-zA-Z0-9+.-]*://)([^/\s'\"]*|[^/\s@:'\"]+:(?!\d+/)[^\s@'\"]*)@", r"\1***@", text
    )  # / in keys
    return re.sub(r"([a-zA-Z][a-zA-Z0-9+.-]*://[^\s?'\"]*\?)[^\s'\"#]*", _without_values, text)


def _without_values(found: re.Match[str]) -> str:
    query = found.group(0)[len(found.group(1)) :]
    pairs = [part.partition("=") for part in query.split("&")]
    return found.group(1) + "&".join(f"{name}={'***' if SECRET.match(name) else value}" for name, _, value in pairs)


def _parsed(text: str) -> Place:
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Place(os.path.abspath(text))
    scheme = scheme.lower()
    if scheme not in {*SCHEMES, "file"}:
        raise UserError(f"expected a folder, or a URL of s3://, gs:// or file://, got {redacted(text)!r}")
    if redacted(text) != text or "?" in rest or "#" in rest:
        raise UserError(
            f"{redacted(text)}: expected a URL of a bucket and a prefix alone, got one with credentials or a query in "
            "it. Put credentials into the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL "
            "for another server than Amazon's; GOOGLE_APPLICATION_CREDENTIALS), and the URL without them here"
        )
    if scheme == "file":
        return Place(os.path.abspath("/" + rest.lstrip("/")))
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise UserError(f"{redacted(text)}: expected {scheme}://BUCKET/PREFIX, without '..'")
    return Place("/".join(parts), SCHEMES[scheme])


class Files:
    """Files of this machine or of a file system that machines share."""

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def read(self, path: str) -> bytes:
        with _told(path):
            return Path(path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        with atomic(Path(path)) as temporary:
            temporary.write_bytes(data)

    def create(self, path: str, data: bytes) -> bool:
        return create(Path(path), lambda temporary: temporary.write_bytes(data))

    def fetch(self, path: str, to: Path) -> None:
        if not os.path.exists(path):
            raise missing(path)
        shutil.copyfile(path, to)

    def deliver(self, path: str, of: Path, replace: bool) -> bool:
        if not replace:
            return create(Path(path), lambda temporary: shutil.copyfile(of, temporary))
        with atomic(Path(path)) as temporary:
            shutil.copyfile(of, temporary)
        return True

    def entries(self, path: str) -> list[Entry]:
        if not os.path.isdir(path):
            return []
        with _told(path), os.scandir(path) as found:
            return [entry for one in found if (entry := _entry(one)) is not None]

    def remove(self, path: str) -> None:
        with _told(path):
            Path(path).unlink(missing_ok=True)


def _entry(one: os.DirEntry[str]) -> Entry | None:
    try:
        facts = one.stat()
    except FileNotFoundError:  # gone since
        return None
    return Entry(one.name, None if one.is_dir() else facts.st_size, f"{facts.st_size} {facts.st_mtime_ns}")


def missing(shown: str) -> Missing:
    """What is raised where there is nothing."""
    return Missing(f"{shown}: expected something here, found nothing")


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """EnvironmentFault, naming the file, for what the system refuses."""
    try:
        yield
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise EnvironmentFault(f"{path}: expected to read it, got: {error.strerror or error}") from error
