"""Objects in S3, Google Cloud Storage and their likes, through fsspec; what passes is waited for.

Every call is one request that happened or did not. The clients' own retries are off: only who retries knows whether an
object that is there already may be the one of the try before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gambeson.errors import EnvironmentFault, UserError
from gambeson.place import Entry, Missing, missing, redacted

PATIENCE = 300.0
"""Seconds for which a refusal that passes is waited for, if GAMBESON_PATIENCE says nothing."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0
PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP: timeout, conflict of requests at the same time, too many, the server's own faults."""
PASSING_CODES = {
    "RequestTimeout",
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
}
"""S3's own words for the same: some come with status 400, or after a 200."""
PASSING_KINDS = {
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.parsers.ResponseParserError",
    "aiohttp.client_exceptions.ClientError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.HTTPError",
    "google.auth.exceptions.TransportError",
}
"""What clients raise where there is no connection, or it breaks."""
EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
"""The package behind a scheme, and gambeson's extra that installs it."""
BUCKET = "make the bucket first, or correct its name"
CREDENTIALS = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
    "GOOGLE_APPLICATION_CREDENTIALS), from the client's own configuration, or from the machine's role"
)

T = TypeVar("T")


class Objects:
    """The objects of a scheme; a Keeper. Paths are bucket/key."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def exists(self, path: str) -> bool:
        return self._patiently(path, "ask for", lambda: self._system().exists(path))

    def read(self, path: str) -> bytes:
        return self._patiently(path, "read", lambda: self._whole(path))

    def write(self, path: str, data: bytes) -> None:
        self._patiently(path, "write", lambda: self._system().pipe_file(path, data))

    def create(self, path: str, data: bytes) -> bool:
        made, unsure = self._once(path, lambda: self._system().pipe_file(path, data, mode="create"))
        if made or not unsure:
            return made
        try:
            return self.read(path) == data
        except Missing:  # whoever made it has removed it since
            return False

    def fetch(self, path: str, to: Path) -> None:
        self._patiently(path, "fetch", lambda: self._system().get_file(path, str(to)), to)

    def deliver(self, path: str, of: Path, replace: bool) -> bool:
        if not replace:
            return self._once(path, lambda: self._system().put_file(str(of), path, mode="create"))[0]
        self._patiently(path, "write", lambda: self._system().put_file(str(of), path))
        return True

    def entries(self, path: str) -> list[Entry]:
        return self._patiently(path, "list", lambda: self._listed(path))

    def remove(self, path: str) -> None:
        self._patiently(path, "remove", lambda: self._removed(path))

    def _system(self) -> Any:
        """fsspec's file system, without memory of listings and without retries of its own; it keeps connections."""
        import fsspec

        if self.scheme == "memory":
            return fsspec.filesystem("memory")
        package, extra = EXTRAS[self.scheme]
        try:
            if self.scheme == "gs":
                return fsspec.filesystem("gs", use_listings_cache=False)
            patience = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}
            other = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            system = fsspec.filesystem("s3", endpoint_url=other, use_listings_cache=False, config_kwargs=patience)
        except ImportError as error:
            raise UserError(
                f"{self.scheme}://: expected the package {package}, which reads and writes there, got none ({error}); "
                f"pip install 'gambeson[{extra}]'"
            ) from None
        system.retries = 1
        return system

    def _whole(self, path: str) -> bytes:
        """In one request, which is whole or nothing."""
        more = {"max_concurrency": 1} if self.scheme == "s3" else {}
        return self._system().cat_file(path, **more)

    def _once(self, path: str, act: Callable[[], object]) -> tuple[bool, bool]:
        """Makes an object on condition that there is none; whether that happened, and whether it is not known: an
        answer was lost, and something is there now."""
        unsure = False

        def attempt() -> bool:
            nonlocal unsure
            try:
                act()
            except FileExistsError:
                return False
            except Exception as error:
                if status_of(error) == 412:
                    return False
                unsure = unsure or passes(error)
                raise
            return True

        made = self._patiently(path, "write", attempt)
        return made, unsure

    def _listed(self, path: str) -> list[Entry]:
        try:
            found = self._system().ls(path, detail=True, refresh=True)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return []
        below = [one for one in found if one["name"].strip("/") != path.strip("/")]
        return [_entry(one) for one in below]

    def _removed(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._system().rm_file(path)

    def _patiently(self, path: str, what: str, act: Callable[[], T], to: Path | None = None) -> T:
        """The result of `act`, tried again while it fails with what passes; other failures as EnvironmentFault.

        to: the file of this machine that it writes, whose own faults go on as they are.
        """
        shown, began, pause, told = f"{self.scheme}://{path}", time.monotonic(), FIRST_PAUSE, False
        while True:
            try:
                return act()
            except (EnvironmentFault, UserError):
                raise
            except Exception as error:
                if not passes(error):
                    if to is not None and status_of(error) is None and isinstance(error, OSError) and _of_disk(error):
                        raise
                    raise _final(shown, what, error) from error
                waited, fault = time.monotonic() - began, error
            if waited + pause > patience():
                raise EnvironmentFault(
                    f"{shown}: expected to {what} it within {patience():g} s (GAMBESON_PATIENCE), got no answer that "
                    f"would do: {_short(fault)}. Is the object store there? Start the same command again, which resumes"
                ) from fault
            if not told and pause >= 2:
                told = True
                print(f"{shown}: {_short(fault)}; trying again for up to {patience():g} s", file=sys.stderr, flush=True)
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1.5))  # workers do not all come back at once
            pause = min(2 * pause, LONGEST_PAUSE)


def patience() -> float:
    """Seconds for which what passes is waited for. UserError where GAMBESON_PATIENCE is no number of seconds."""
    word = os.environ.get("GAMBESON_PATIENCE") or PATIENCE
    try:
        seconds = float(word)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise UserError(f"GAMBESON_PATIENCE: expected seconds, such as 300, got {word!r}")
    return seconds


def passes(error: BaseException) -> bool:
    """Whether a failure may be over soon: no connection, a busy server."""
    status = status_of(error)
    if status is not None:
        return status in PASSING_STATUS or _code(error) in PASSING_CODES
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return bool(PASSING_KINDS & {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__})


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that a failure, or what it was made of, tells; None where there was no answer."""
    while error is not None:
        response = vars(error).get("response")
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        found = found if found is not None else vars(error).get("code")  # gcsfs
        if found is not None and str(found).isdigit():
            return int(found)
        error = error.__cause__
    return None


def _code(error: BaseException | None) -> str:
    """S3's own word for a failure."""
    while error is not None:
        response = vars(error).get("response")
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code", "")
        error = error.__cause__
    return ""


def _of_disk(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


def _final(shown: str, what: str, error: Exception) -> EnvironmentFault:
    """The fault for a failure that does not pass."""
    if isinstance(error, FileNotFoundError):
        if _code(error) != "NoSuchBucket" and what in ("read", "fetch"):
            return missing(shown)
        return EnvironmentFault(f"{shown}: expected to {what} it, got: there is no such bucket; {BUCKET}")
    fix = CREDENTIALS if isinstance(error, PermissionError) or "redentials" in type(error).__name__ else None
    return EnvironmentFault(f"{shown}: expected to {what} it, got: {_short(error)}" + (f"; {fix}" if fix else ""))


def _short(error: Exception) -> str:
    """What a client says, in one line and without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    return redacted(text)[:300]


def _entry(one: dict[str, Any]) -> Entry:
    folder = one.get("type") == "directory"
    mark = str(one.get("ETag") or one.get("etag") or one.get("md5Hash") or one.get("created") or "")
    return Entry(one["name"].rstrip("/").rpartition("/")[2], None if folder else one.get("size"), mark)
