"""WebDataset's shards: plain .tar files of samples: `00000012.png` (or `.npy`), the class as text in `00000012.cls`.

Read and written by Python's tarfile; https://github.com/webdataset/webdataset describes the format.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from tarfile import BLOCKSIZE, TarFile, TarInfo

import numpy as np

from gambeson.data.archives import Member, is_plain, members
from gambeson.data.exchange.incoming import About, Shape, block_size, whole
from gambeson.data.exchange.outgoing import Outgoing, digits, write_folder
from gambeson.data.exchange.pictures import ENDINGS, Picture, as_array, blocks_of, decoded, encoded
from gambeson.disk import atomic
from gambeson.errors import UserError, require

IMAGES = (*(ending[1:] for ending in ENDINGS), "npy")
LABEL = "cls"
LARGEST = 1 << 28
"""Bytes of a member; more are taken for a mistake, before memory is taken for them."""
PER_SHARD = 10_000
FORMS: dict[str, Callable[[np.ndarray], bytes]] = {"png": encoded, "npy": as_array}


@dataclass(frozen=True)
class Sample:
    """The members of a shard that have one key."""

    key: str
    members: dict[str, TarInfo]

    def image(self, shard: Path) -> TarInfo:
        """The member with the image. UserError without exactly one, or without a class."""
        images = [member for ending, member in self.members.items() if ending in IMAGES]
        if len(images) != 1 or LABEL not in self.members:
            raise UserError(
                f"{shard}, sample {self.key}: expected one image ({', '.join(IMAGES)}) and its class ({LABEL}), found "
                f"{', '.join(self.members)}"
            )
        return images[0]


@dataclass(frozen=True)
class TarImages:
    """A set in shards; `counts`: samples of each."""

    shards: tuple[Path, ...]
    counts: tuple[int, ...]
    shape: Shape
    class_names: tuple[str, ...]
    assumed: str = ""

    def __len__(self) -> int:
        return sum(self.counts)

    def blocks(self, size: int = 8192, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images uint8 [n, H, W, C] and labels int64 [n], `size` at a time from block `first` on, in the shards' order.

        UserError for damage, images of several sizes, classes that are no numbers.
        """
        yield from blocks_of(self._pictures(first * block_size(self.shape, size)), self.shape, size)

    def _pictures(self, start: int) -> Iterator[Picture]:
        """The samples from number `start` on."""
        for shard, count in zip(self.shards, self.counts, strict=True):
            if start < count:
                with whole(shard), _opened(shard) as archive:
                    for number, sample in enumerate(_samples(shard, archive)):
                        if number >= start:
                            yield _picture(shard, archive, sample)
            start = max(start - count, 0)


def read(path: Path) -> TarImages:
    """The set in a .tar or in a folder of them, whose heads are all read. UserError for what is no WebDataset."""
    shards = (path,) if path.is_file() else tuple(sorted(path.glob("*.tar")))
    require(bool(shards), str(path), "a .tar or a folder of them", "none")
    counts, first = [], None
    for shard in shards:
        with whole(shard), _opened(shard) as archive:
            count = 0
            for sample in _samples(shard, archive):
                if first is None:
                    first = _picture(shard, archive, sample)
                count += 1
            counts.append(count)
    if first is None:
        raise UserError(f"{path}: expected at least one image, got an empty archive")
    height, width, channels = decoded(first).shape
    return TarImages(shards, tuple(counts), (height, width, channels), About.beside(path).class_names)


def _opened(shard: Path) -> TarFile:
    return tarfile.open(shard, "r:", tarinfo=Member)


def _samples(shard: Path, archive: TarFile) -> Iterator[Sample]:
    """The samples of a shard, each checked. UserError where it does not end as a .tar does."""
    key, members = "", {}
    for member in _members(shard, archive):
        place = PurePosixPath(member.name)
        stem, _, ending = place.name.partition(".")
        named = str(place.with_name(stem or place.name))
        if named != key and members:
            yield _checked(shard, Sample(key, members))
            members = {}
        key, members = named, {**members, ending.lower(): member}
    if members:
        yield _checked(shard, Sample(key, members))


def _checked(shard: Path, sample: Sample) -> Sample:
    sample.image(shard)
    return sample


def _members(shard: Path, archive: TarFile) -> Iterator[TarInfo]:
    """The files in a shard, not kept in memory. tarfile takes a head that is damaged for the end; here it is none."""
    for member in members(archive):
        if is_plain(member) and not PurePosixPath(member.name).name.startswith("."):
            require(member.size <= LARGEST, f"{shard}, {member.name}", f"at most {LARGEST:,} bytes", member.size)
            yield member
    with shard.open("rb") as file:
        file.seek(archive.offset)
        if file.read(BLOCKSIZE) != bytes(BLOCKSIZE):
            raise UserError(f"{shard}: expected a whole .tar, got a damaged or cut one; fetch it again")


def _picture(shard: Path, archive: TarFile, sample: Sample) -> Picture:
    member, name = sample.image(shard), f"{shard}, {sample.key}"
    word = _content(archive, sample.members[LABEL]).decode("ascii", "replace").strip()
    digits = word.removeprefix("-")
    if not (digits.isdigit() and len(digits) < 10):
        raise UserError(f"{name}.{LABEL}: expected a class as a whole number, got {word[:40]!r}")
    return Picture(name, _content(archive, member), int(word))


def _content(archive: TarFile, member: TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # only regular files come here
    return file.read()


def write(out: Outgoing, path: Path, per_shard: int = PER_SHARD, form: str = "png") -> None:
    """Writes the folder PATH with NAME-000000.tar and so on; stopped, it goes on. `form`: png, or npy."""
    require(form in FORMS, "--images-as", " or ".join(FORMS), form)
    asked = {"format": "webdataset", "form": form, "name": path.name}
    write_folder(out, path, asked, per_shard, partial(_write, out, path.name, form))


def _write(out: Outgoing, name: str, form: str, folder: Path, piece: int, start: int, stop: int) -> None:
    """One shard; the same images give the same bytes."""
    number, encode, width = start, FORMS[form], digits(len(out))
    with atomic(folder / f"{name}-{piece:06d}.tar") as temporary, TarFile.open(temporary, "w") as archive:
        for images, labels in out.blocks(start, stop):
            for image, label in zip(images, labels.tolist(), strict=True):
                _add(archive, f"{number:0{width}d}.{form}", encode(image))
                _add(archive, f"{number:0{width}d}.{LABEL}", str(label).encode())
                number += 1


def _add(archive: TarFile, name: str, content: bytes) -> None:
    member = TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
    archive.members.clear()  # type: ignore[attr-defined]
