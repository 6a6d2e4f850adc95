"""Downloads: resumed where they were cut, checked before a file gets its name, from the next mirror where one fails.

A download grows as NAME.part beside its place; NAME.part.json says what it is a part of. Only `gambeson data get`
comes here: nothing else in the library touches the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout

import gambeson
from gambeson.data.catalogue import Published, check, digest_of
from gambeson.data.hub import REVISION, check_name
from gambeson.errors import EnvironmentFault, UserError, require

Progress = Callable[[int, int | None], None]
"""Is told how many bytes are here, and how many there will be, where that is known."""
PORTION = 1 << 18
"""Bytes read at once."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which it is worth asking again."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a download waits."""

    timeout: float = 30.0  # seconds without a byte after which a connection counts as cut
    attempts: int = 5  # tries of one address in a row that bring nothing new
    pause: float = 1.0  # seconds before the second of them; doubles each time, a minute at most


class _Cut(Exception):
    """An address did not give the whole file this time; `after`: the seconds that it asks for before the next try."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class _Useless(Exception):
    """An address does not give this file, however often it is asked."""


@dataclass(frozen=True)
class _Part:
    """A download that has begun."""

    file: Published
    path: Path  # where the file will lie

    @property
    def here(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def note(self) -> Path:
        """Says where the part comes from, and in what state the file was there."""
        return self.path.with_name(f"{self.path.name}.part.json")

    def size(self) -> int:
        """Bytes that are here."""
        with contextlib.suppress(OSError):
            return self.here.stat().st_size
        return 0

    def origin(self) -> dict[str, str]:
        """What the note says; nothing where it cannot be read."""
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(self.note.read_text(encoding="utf-8")))
        return {}

    def drop(self) -> None:
        """Removes the part and its note."""
        self.here.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def finish(self) -> Path:
        """The part gets the file's name."""
        os.replace(self.here, self.path)
        self.note.unlink(missing_ok=True)
        return self.path


def fetch(file: Published, root: Path, progress: Progress, patience: Patience = Patience()) -> Path:
    """The path of a published file below a data root: as it is there, or downloaded and checked.

    Of several processes that want it one downloads and the others wait. Raises UserError where another file lies in
    its place, and EnvironmentFault where no address gives it, the disk is full or the folder cannot be written.
    """
    path = file.path(root)
    with _writing(path), _alone(_Part(file, path), progress):
        if not path.exists():
            _download(_Part(file, path), progress, patience)
        check(path, [file])
    return path


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes the file's folder; what goes wrong on the disk is told with the file's name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (UserError, EnvironmentFault):
        raise
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: expected to write this file, got: {error.strerror or error}. What was downloaded is kept beside "
            "it; free some space or choose another folder (--data-root DIR), then start the same command again"
        ) from error


@contextlib.contextmanager
def _alone(part: _Part, progress: Progress) -> Iterator[None]:
    """Holds the file's lock; while another process has it, tells how far that one is."""
    lock = FileLock(part.path.with_name(f".{part.path.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            progress(part.size(), part.file.size)
    try:
        yield
    finally:
        lock.release()


def _download(part: _Part, progress: Progress, patience: Patience) -> None:
    """Tries one address after the other."""
    problems = []
    for url in part.file.urls:
        try:
            _whole(part, url, progress, patience)
            part.finish()
            return
        except (_Cut, _Useless) as error:
            problems.append(f"{url}: {error}")
    raise EnvironmentFault(
        f"{part.path}: expected to download {part.file.name}, got from {'; from '.join(problems)}. Is there a network? "
        "The same command again goes on from here; a file that you have may be put there by hand"
    )


def _whole(part: _Part, url: str, progress: Progress, patience: Patience) -> None:
    """The whole file from one address, checked; a part of which nothing good comes is loaded anew, once."""
    resumed = part.size() > 0
    _insist(part, url, progress, patience)
    wrong = _wrong(part)
    if wrong and resumed:
        part.drop()
        _insist(part, url, progress, patience)
        wrong = _wrong(part)
    if wrong:
        part.drop()
        raise _Useless(wrong)


def _wrong(part: _Part) -> str:
    """What is wrong with a part that should be whole; nothing where that cannot be told."""
    expected = part.file.checksum
    found = expected and digest_of(part.here, expected.partition(":")[0])
    return "" if found == expected else f"expected {expected}, got {found}; what came was removed"


def _insist(part: _Part, url: str, progress: Progress, patience: Patience) -> None:
    """Asks one address until it has given everything; gives up after some tries in a row that bring nothing new."""
    most, failed = part.size(), 0
    while part.file.size is None or part.size() != part.file.size:
        try:
            _ask(part, url, progress, patience.timeout)
            return
        except _Cut as cut:
            failed = 1 if part.size() > most else failed + 1
            most = max(most, part.size())
            if failed >= patience.attempts:
                raise
            time.sleep(min(max(patience.pause * 2 ** (failed - 1), cut.after), 60.0))


def _ask(part: _Part, url: str, progress: Progress, timeout: float) -> None:
    """One request: the rest of a part if it may be continued, otherwise all of the file."""
    start = _resumable(part, url)
    request = Request(url, headers={"User-Agent": f"gambeson/{gambeson.__version__}", **_range(part, url, start)})
    try:
        reply: Any = urlopen(request, timeout=timeout)
    except HTTPError as error:
        with error:
            _refused(part, error, start)
        return
    except (OSError, HTTPException) as error:
        raise _unreachable(error) from error
    with reply:
        _receive(part, url, reply, start, progress)


def _resumable(part: _Part, url: str) -> int:
    """How many bytes of a part can be built upon: all where a checksum will tell, or the note names this address."""
    size, origin = part.size(), part.origin()
    known = part.file.checksum is not None or (origin.get("url") == url and bool(origin.get("state")))
    fits = part.file.size is None or size < part.file.size
    return size if known and fits else 0


def _range(part: _Part, url: str, start: int) -> dict[str, str]:
    """The headers that ask for the rest, if the file is still the one that the part is of."""
    if not start:
        return {}
    origin = part.origin()
    state = origin.get("state", "") if origin.get("url") == url else ""
    return {"Range": f"bytes={start}-"} | ({"If-Range": state} if state else {})


def _refused(part: _Part, error: HTTPError, start: int) -> None:
    """Raises what an answer that is no file means; returns where the part was whole already (416)."""
    if error.code == 416 and start:
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(start):
            return
        part.drop()
        raise _Cut("it has no more of this file; it is loaded anew")
    told = f"HTTP {error.code} {error.reason}"
    if error.code not in BUSY:
        raise _Useless(told)
    after = error.headers.get("Retry-After", "")
    raise _Cut(told, float(after) if after.isdigit() else 0.0)


def _unreachable(error: Exception) -> _Cut | _Useless:
    """What a request that got no answer means: a file that is not there stays so, a network may come back."""
    reason = error.reason if isinstance(error, URLError) else error
    gone = isinstance(reason, FileNotFoundError | IsADirectoryError | PermissionError | str)
    told = _told(reason) if isinstance(reason, Exception) else str(reason)
    return _Useless(told) if gone else _Cut(told)


def _state(headers: Message) -> str:
    """What tells one version of a file from another: a strong ETag, else the time of its last change."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _receive(part: _Part, url: str, reply: Any, start: int, progress: Progress) -> None:
    """Writes what comes to the part. Raises _Cut where it ends early, and _Useless where it is another file."""
    partial, state = reply.status == 206, _state(reply.headers)
    first = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
    noted = part.origin().get("state", "") if part.origin().get("url") == url else ""
    fits = first is not None and int(first[1]) == start and (not state or not noted or state == noted)
    if partial and not fits:
        part.drop()
        raise _Cut("the file has changed there; it is loaded anew")
    offset, length = start if partial else 0, reply.headers.get("Content-Length")
    total = part.file.size if length is None else offset + int(length)
    if part.file.size not in (None, total):
        raise _Useless(f"expected a file of {part.file.size:,} bytes, got one of {total:,}")
    _room(part.path.parent, (total or 0) - offset)
    part.note.write_text(json.dumps({"url": url, "state": state}), encoding="utf-8")
    done = _write(part.here, reply, offset, total, progress)
    if total is not None and done < total:
        raise _Cut(f"cut after {done:,} of {total:,} bytes")


def _room(folder: Path, needed: int) -> None:
    """EnvironmentFault where the disk has less room than the rest of the file takes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFault(
            f"{folder}: expected {needed:,} bytes free for the download, got {free:,}; free some space or choose "
            "another folder (--data-root DIR)"
        )


def _write(here: Path, reply: Any, offset: int, total: int | None, progress: Progress) -> int:
    """Appends what comes after the first `offset` bytes; how many are here at the end. A kill loses no portion."""
    done = offset
    with open(here, "ab") as out:
        out.truncate(offset)
        progress(done, total)
        while portion := _portion(reply):
            done += len(portion)
            if total is not None and done > total:
                raise _Useless(f"expected {total:,} bytes, got more")
            out.write(portion)
            out.flush()
            progress(done, total)
        os.fsync(out.fileno())
    return done


def _portion(reply: Any) -> bytes:
    """The bytes that have come, none at the end."""
    try:
        return reply.read1(PORTION)
    except (OSError, HTTPException) as error:
        raise _Cut(_told(error)) from error


def fetch_hub(word: str) -> Path:
    """The folder with the Parquet files of a Hugging Face data set, `hf:org/name`, in the hub's own cache.

    They are those that the hub itself converts (refs/convert/parquet); what is there already is not loaded again.
    Raises UserError without the extra, for a data set that the hub does not give, or one that has no such files, and
    EnvironmentFault where the hub does not answer.
    """
    name = check_name(word)
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UserError(f"{word}: expected the library of the hub; pip install gambeson[hub]") from None
    refused = (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    patterns = ["*.parquet"]
    try:
        place = snapshot_download(name, repo_type="dataset", revision=REVISION, allow_patterns=patterns)
    except refused as error:
        raise UserError(
            f"{word}: expected a data set of the hub with Parquet files that you may read, got {_told(error)} (private "
            "and gated ones need `hf auth login`)"
        ) from error
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise EnvironmentFault(
            f"{word}: expected the hub to answer, got {_told(error)} Is there a network? The same command again goes "
            "on from here"
        ) from error
    folder = Path(place)
    require(any(folder.rglob("*.parquet")), word, "a data set of which the hub has Parquet files", str(folder))
    return folder


def _told(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
