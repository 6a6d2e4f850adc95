"""A store that is being written in an object store: each block an object made once, each shard put together once.

blocks/000012.npz            a block with its images, made on condition that there is none; removed with its shard's end
shards/00000.npy, .parquet   a shard, sent by whoever saw all its blocks; made on condition too
shards/00000.json            its record, last: a shard without it does not exist
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gambeson.disk import checksum, read_json, write_json
from gambeson.errors import EnvironmentFault
from gambeson.mirror import Mirror, at_once
from gambeson.place import Missing


@dataclass
class RemoteStore:
    """What is known of it here; only ever less than there is, but for blocks that somebody removed."""

    mirror: Mirror
    root: Path
    sealed: set[int] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)
    surveyed: bool = False

    @staticmethod
    def of(root: Path) -> RemoteStore | None:
        """The store of a folder that mirrors one; None on other disks."""
        mirror = Mirror.of(root)
        return None if mirror is None else RemoteStore(mirror, root)

    def survey(self) -> None:
        """Asks which shards and blocks there are. Marks here of blocks that are not there go: others need them."""
        self.sealed = set(self._numbers("shards", ".json"))
        self.look()
        self.surveyed = True
        for path in (self.root / "blocks").glob("*.npz"):
            if path.stem.isdigit() and int(path.stem) not in self.blocks:
                path.unlink(missing_ok=True)

    def knows(self, shard: int, block: int) -> bool:
        """Whether a block is known to be there, in its shard or by itself."""
        if not self.surveyed:
            self.survey()
        return shard in self.sealed or block in self.blocks

    def look(self) -> None:
        """Asks which blocks there are now."""
        self.blocks = set(self._numbers("blocks", ".npz"))

    def is_sealed(self, shard: int) -> bool:
        """Whether a shard is final there, asked if it is not known."""
        if shard not in self.sealed and self.mirror.place(self._shard_file(shard, "json")).exists():
            self.sealed.add(shard)
        return shard in self.sealed

    def put(self, block: int, data: bytes) -> bool:
        """Makes a block's object; False where there is one already."""
        made = self.mirror.place(self._block_file(block)).create(data)
        self.blocks.add(block)
        return made

    @contextlib.contextmanager
    def fetched(self, block: int) -> Iterator[Path | None]:
        """A block's object as a temporary file; None where there is none (any more)."""
        path = self._block_file(block)
        temporary = path.with_name(f".{path.name}.fetched")
        with self.mirror.lock(path):
            try:
                self.mirror.place(path).fetch(temporary)
            except Missing:
                self.blocks.discard(block)
                yield None
                return
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    def forget(self, blocks: Iterable[int]) -> None:
        """Removes the objects of blocks."""
        blocks = list(blocks)
        at_once(lambda block: self.mirror.place(self._block_file(block)).remove(), blocks)
        self.blocks.difference_update(blocks)

    def hand_over(self, shard: int, blocks: Iterable[int]) -> None:
        """Sends a shard that is final here, its record last; then its blocks may go.

        Two that do so agree: what is there of the first stays, and the record is of what is there.
        """
        path = self._shard_file(shard, "json")
        record = read_json(path)
        for ending in ("npy", "parquet"):
            record["sha256"][ending] = self._agreed(self._shard_file(shard, ending), record["sha256"][ending])
        write_json(path, record)
        if not self.mirror.send(path, replace=False):
            self.mirror.fetch(path)
        self.sealed.add(shard)
        self.forget(blocks)

    def bring(self, names: Iterable[str]) -> None:
        """Fetches files of final shards that are not here, such as 00000.json. EnvironmentFault for a missing one."""

        def one(name: str) -> None:
            path = self.root / "shards" / name
            if not path.is_file():
                self.mirror.fetch(path)

        at_once(one, names)

    def finish(self, names: Iterable[str]) -> None:
        """Sends what makes the store whole, in this order, and removes blocks that came late."""
        for name in names:
            self.mirror.send(self.root / name)
        self.look()
        self.forget(list(self.blocks))

    def _agreed(self, path: Path, digest: str) -> str:
        """Sends a shard's file; the checksum of what is there then, which is here too.

        Pixels that are no block's (a broken start on a damaged disk) are overwritten; Parquet of another version of
        its writer stays.
        """
        if self.mirror.send(path, replace=False):
            return digest
        if path.suffix != ".npy":
            self.mirror.fetch(path)
            return checksum(path)
        try:
            self.mirror.fetch(path, digest)
        except Missing:
            raise
        except EnvironmentFault:
            self.mirror.send(path)
        return digest

    def _numbers(self, folder: str, ending: str) -> Iterator[int]:
        for name in self.mirror.place(self.root / folder).names():
            stem = name.removesuffix(ending)
            if stem != name and stem.isdigit():
                yield int(stem)

    def _block_file(self, block: int) -> Path:
        return self.root / "blocks" / f"{block:06d}.npz"

    def _shard_file(self, shard: int, ending: str) -> Path:
        return self.root / "shards" / f"{shard:05d}.{ending}"
