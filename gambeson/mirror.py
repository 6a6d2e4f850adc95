"""An object store as a folder of this machine: what lies in the store is fetched when it is needed, what is made sent.

SCRATCH/s3-BUCKET-1234abcd/remote.json    what the folder mirrors; whoever finds it above a path knows the store
SCRATCH/s3-BUCKET-1234abcd/KEY            the copy of s3://BUCKET/KEY
SCRATCH is GAMBESON_SCRATCH or ~/.cache/gambeson/scratch. It may be lost at any time: it is fetched again. For a path
that is in no mirror the functions here do nothing, and say what is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from gambeson.disk import atomic, checksum, open_folder, read_json, write_json
from gambeson.errors import EnvironmentFault
from gambeson.place import Missing, Place

REMOTE = "remote.json"
ROOT = re.compile(r"(s3|gs|memory)-.+-[0-9a-f]{8}")
"""Names of mirrors (`local`): a remote.json in a folder of another name is somebody else's."""
DONE, DELIVERED = "done.json", ".delivered"
"""Of a stage's folder: its record, and that the store has it."""
AT_ONCE = 16
"""Files that are on their way at the same time."""
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL", "STORAGE_EMULATOR_HOST")
"""What makes equal URLs mean different stores."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Mirror:
    """A folder of this machine, and the place in an object store whose copy it is."""

    root: Path
    remote: Place

    @staticmethod
    def of(path: Path) -> Mirror | None:
        """The mirror that a path lies in; None on other disks."""
        path = Path(os.path.abspath(path))
        for folder in (path, *path.parents):
            if ROOT.fullmatch(folder.name) and (folder / REMOTE).is_file():
                return Mirror(folder, Place.of(read_json(folder / REMOTE)["url"]))
        return None

    def place(self, path: Path) -> Place:
        """Where a file or folder of the mirror lies in the store."""
        inside = Path(os.path.abspath(path)).relative_to(self.root).as_posix()
        return self.remote if inside == "." else self.remote / inside

    def fetch(self, path: Path, sha256: str | None = None) -> None:
        """Fetches a file into the mirror. Missing where the store has none, EnvironmentFault for changed bytes."""
        self.place(path).fetch(path, sha256)

    def send(self, path: Path, replace: bool = True) -> bool:
        """Sends a file; whether it was this call's doing (`Place.deliver`)."""
        return self.place(path).deliver(path, replace)

    def lock(self, path: Path) -> FileLock:
        """A lock among the processes of this machine that fetch or send the same."""
        name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
        open_folder(self.root / ".locks")
        return FileLock(self.root / ".locks" / name)

    def prove(self) -> None:
        """Sees once, and writes down, that the store makes objects on condition that there is none.

        EnvironmentFault for one that does not: two machines would overwrite each other's work there.
        """
        path = self.root / REMOTE
        if read_json(path).get("conditional"):
            return
        trial = self.remote / f"trial-{uuid.uuid4().hex}"
        try:
            first, second = trial.create(b"1"), trial.create(b"2")
        finally:
            trial.remove()
        if not first or second:
            raise EnvironmentFault(
                f"{self.remote.shown}: expected an object store that makes an object only where there is none "
                "(If-None-Match: *), got one that overwrote it; a newer version of the server may, others are S3, "
                "Google Cloud Storage, MinIO"
            )
        write_json(path, {"url": self.remote.shown, "conditional": True})


def scratch() -> Path:
    """Where mirrors lie."""
    return Path(os.environ.get("GAMBESON_SCRATCH") or Path.home() / ".cache" / "gambeson" / "scratch")


def local(word: str | Path) -> Path:
    """The path on this machine for a path or a URL: of s3:// and gs:// in the mirror of the bucket, which is opened.

    Nothing is fetched. UserError for other URLs, and for such with credentials in them.
    """
    if "://" not in str(word):
        return Path(word)
    place = Place.of(word)
    if place.local is not None:
        return place.local
    bucket, _, key = place.path.partition("/")
    endpoints = "".join(os.environ.get(name, "") for name in ENDPOINTS)
    known = hashlib.sha256(f"{place.scheme} {endpoints} {bucket}".encode()).hexdigest()[:8]
    root = scratch().resolve() / f"{place.scheme}-{bucket}-{known}"
    if not (root / REMOTE).is_file():
        write_json(root / REMOTE, {"url": f"{place.scheme}://{bucket}"})
    return root / key


def place_of(path: Path) -> Place:
    """Where what is made at a path is kept for all machines: in the object store, or at the path itself."""
    mirror = Mirror.of(path)
    return Place.of(path) if mirror is None else mirror.place(path)


def url_of(path: Path) -> str:
    """How another machine finds it: the URL in the object store (`local` is the way back), or the path itself."""
    return place_of(path).shown


def have(path: Path, sha256: str | None = None) -> bool:
    """Whether a file is here, after fetching it where it is in a mirror's store.

    What is fetched is compared with the checksum: EnvironmentFault, naming the object, for other bytes.
    """
    if path.is_file():
        return True
    mirror = Mirror.of(path)
    if mirror is None:
        return False
    with mirror.lock(path):
        try:
            if not path.is_file():
                mirror.fetch(path, sha256)
        except Missing:
            return False
    return True


def caught_up(path: Path) -> None:
    """Fetches a file that is only ever appended to, where the store's is longer than the one here."""
    mirror = Mirror.of(path)
    if mirror is None:
        return
    with mirror.lock(path):
        sizes = {entry.name: entry.size for entry in mirror.place(path.parent).entries()}
        if (sizes.get(path.name) or 0) > (path.stat().st_size if path.is_file() else 0):
            mirror.fetch(path)


def sent(path: Path) -> None:
    """Sends a file over what the store may have there."""
    mirror = Mirror.of(path)
    if mirror is not None:
        mirror.send(path)


def brought(folder: Path) -> bool:
    """Whether a finished stage is here, after fetching it where it is in a mirror's store: its record, its files.

    The shards of its images stay there until they are read. EnvironmentFault, naming it, for a changed file.
    """
    done = folder / DONE
    if done.exists():
        return True
    mirror = Mirror.of(folder)
    record = None if mirror is None else _record(mirror, folder)
    if mirror is None or record is None:
        return False
    _adopt(mirror, folder, record)
    return True


def delivered(folder: Path) -> None:
    """Sends a finished stage to the mirror's store, its record last; nothing is sent twice.

    Where another machine was first, its result is the stage's, and is fetched over the one here.
    """
    done = folder / DONE
    mirror = Mirror.of(folder)
    if mirror is None or not done.exists() or (folder / DELIVERED).exists():
        return
    own, theirs = read_json(done), _record(mirror, folder)
    if theirs is None:
        at_once(lambda name: mirror.send(folder / name), own["files"])
        if not mirror.send(done, replace=False):
            theirs = _record(mirror, folder)
            if theirs is not None and theirs["files"] != own["files"] and not _whole(mirror, folder, theirs):
                at_once(lambda name: mirror.send(folder / name), own["files"])  # ours went over theirs: ours it is
                mirror.send(done)
                theirs = own
    if theirs is not None and theirs != own:
        _adopt(mirror, folder, theirs)
    write_json(folder / DELIVERED, {"to": mirror.place(folder).shown})


def ready(folder: Path) -> None:
    """Called before work on a stage begins: its store must do what several machines rely on."""
    mirror = Mirror.of(folder)
    if mirror is not None:
        mirror.prove()


def at_once(act: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results in order, a few calls at the same time; the first failure is raised."""
    items = list(items)
    if len(items) < 2:
        return [act(item) for item in items]
    with ThreadPoolExecutor(min(AT_ONCE, len(items))) as threads:
        waiting = [threads.submit(act, item) for item in items]
        try:
            return [future.result() for future in waiting]
        finally:
            for future in waiting:
                future.cancel()


def _record(mirror: Mirror, folder: Path) -> dict[str, Any] | None:
    """The record of a stage that the store has; None where it has none, EnvironmentFault for no record of ours."""
    place = mirror.place(folder) / DONE
    try:
        found = json.loads(place.read())
    except Missing:
        return None
    except ValueError as error:
        raise EnvironmentFault(f"{place.shown}: expected JSON, got damaged text ({error})") from error
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict) or any(Path(name).name != name or name.startswith(".") for name in files):
        raise EnvironmentFault(f"{place.shown}: expected the record of a stage, got something else")
    return found


def _whole(mirror: Mirror, folder: Path, record: dict[str, Any]) -> bool:
    """Whether the store's files of a stage are those of this record: two machines may have sent theirs at once."""
    try:
        at_once(lambda name: mirror.place(folder / name).check(record["files"][name]), record["files"])
    except EnvironmentFault:
        return False
    return True


def _adopt(mirror: Mirror, folder: Path, record: dict[str, Any]) -> None:
    """Makes the stage here the one that the store has; its record last."""

    def bring(name: str) -> None:
        path, digest = folder / name, record["files"][name]
        if not path.is_file() or checksum(path) != digest:
            mirror.fetch(path, digest)

    at_once(bring, record["files"])
    write_json(folder / DELIVERED, {"to": mirror.place(folder).shown})
    with atomic(folder / DONE) as temporary:
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
