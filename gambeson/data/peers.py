"""Synthetic sets that others published, read block by block from their files into a store of ours.

EDM-AT's npz (image, label), CDP's and minimal-diffusion's npz (arr_0, arr_1), PORT's .bin (raw bytes) with .npy labels,
WebDataset's .tar, Hugging Face's .parquet, and class folders of pictures: told from each other by their path.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.exchange import folder, npz, parquet, port, webdataset
from gambeson.data.exchange.columns import Peer
from gambeson.data.exchange.incoming import About, Incoming, Shape, block_size, check_labels, whole
from gambeson.data.exchange.store_card import images_card
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore, open_synthetic
from gambeson.disk import checksum
from gambeson.errors import UserError, require
from gambeson.heritage import seen, told
from gambeson.store import Workspace, stage
from gambeson.types import Progress

__all__ = [
    "FilesSource",
    "Incoming",
    "Peer",
    "PeerImages",
    "import_images",
    "is_peer",
    "open_ours",
    "open_peer",
    "refuse_peer",
    "write_store",
]

ENDINGS = (".npz", ".bin", ".tar", ".parquet")
KNOWN = f"a file ({' or '.join(ENDINGS)}), or a folder of .tar, of .parquet or of class folders with pictures"


def open_ours(word: str) -> SyntheticStore | Chosen:
    """The store or selection that a word names. UserError where it is none, is a file of others, or has no image."""
    refuse_peer(word)
    source = open_synthetic(word)
    require(len(source) > 0, word, "at least one image", 0)
    return source


def refuse_peer(word: str) -> None:
    """UserError where a word names images that others published."""
    if is_peer(word):
        raise UserError(f"{word}: expected a store of ours, got images of others; first: gambeson store import {word}")


def _kind(place: Path) -> str:
    """The format that a path has: 'npz', 'bin', 'tar', 'parquet', 'folder'; nothing for another path, or ours."""
    if place.is_file():
        ours = place.suffix == ".parquet" and _is_selection(place)
        return place.suffix[1:] if place.suffix in ENDINGS and not ours else ""
    if not place.is_dir() or any(
        (place / name).exists() for name in ("store.json", "chosen.parquet", "images/store.json")
    ):
        return ""
    if any(place.glob("*.tar")):
        return "tar"
    if any(place.glob("*.parquet")) or any(place.glob("data/*.parquet")):
        return "parquet"
    return "folder" if folder.is_folder(place) else ""


def _is_selection(path: Path) -> bool:
    """Whether a Parquet file is a selection of ours, which names its store."""
    try:
        return b"store" in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):  # damaged: who opens it says so
        return path.name == "chosen.parquet"


def is_peer(path: str | Path) -> bool:
    """Whether a path is a file or folder of others that must be imported before it is trained on."""
    return bool(_kind(Path(path)))


def open_peer(path: str | Path, shape: Shape | None = None) -> Incoming:
    """A published set by its path; only heads are read. `shape` (H, W, C) of one image, where a .bin holds no squares.

    UserError for unknown keys and layouts, for images that are not uint8 and for labels that are no whole numbers.
    """
    place = Path(path)
    kind = _kind(place) or place.suffix[1:]
    if kind == "npz":
        return replace(npz.read(place, shape), class_names=About.beside(place).class_names)
    if kind == "bin":
        return replace(port.read(place, shape), class_names=About.beside(place).class_names)
    readers = {"tar": webdataset.read, "parquet": parquet.read, "folder": folder.read}
    if kind not in readers or not place.exists():
        raise UserError(f"{place}: expected {KNOWN}, got {'something else' if place.exists() else 'nothing there'}")
    found = readers[kind](place)
    if shape is not None and found.shape != tuple(shape):
        raise UserError(f"{place}: expected images of {list(shape)}, as asked, got {list(found.shape)}")
    return found


@dataclass(frozen=True, kw_only=True)
class PeerImages:
    """A published synthetic set, and how it becomes a store."""

    path: str = ""  # the .npz, .tar or .parquet, the .bin with its .npy beside it, or a folder of such or of classes
    shape: tuple[int, int, int] | None = None  # height, width, channels in a .bin; none: squares of 3 channels
    block_size: int = 8192  # images that are in memory at once
    blocks_per_shard: int = 16  # blocks in one file of the store

    def __post_init__(self) -> None:
        require(self.block_size >= 1, "synthetic.block_size", "at least 1", self.block_size)
        require(self.blocks_per_shard >= 1, "synthetic.blocks_per_shard", "at least 1", self.blocks_per_shard)

    @property
    def source(self) -> FilesSource:
        """The files as an input of a stage."""
        require(is_peer(self.path), "synthetic.path", KNOWN, self.path)
        return FilesSource(self.path)

    @property
    def reading(self) -> PeerImages:
        """How the files are read, wherever they lie: what a stage depends on besides their content."""
        return replace(self, path="")


@dataclass(frozen=True)
class FilesSource:
    """A published set's files; the digest is that of their content, wherever they lie."""

    place: str

    @property
    def heritage(self) -> dict[str, Any]:
        """What stands beside the files: licence, and sets of real images."""
        about = About.beside(Path(self.place))
        stated = {"licence": about.licence, "additional_data": list(about.additional_data)}
        return {"name": Path(self.place).name, **told({**(about.provenance or {}), **stated})}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, of a .bin and its labels, of all files of a set that has several.

        UserError where there is none.
        """
        path, kind = Path(self.place), _kind(Path(self.place))
        with whole(path):
            if kind == "bin" or path.suffix == ".bin":
                return hashlib.sha256(f"{checksum(path)} {checksum(port.labels_beside(path))}".encode()).hexdigest()
            if not path.is_dir():
                return checksum(path)
            return _digest(path, _files(path, kind), folder.class_names(path) if kind == "folder" else ())


def _files(path: Path, kind: str) -> Iterable[Path]:
    """The files of a set in a folder, sorted."""
    if kind == "tar":
        return sorted(path.glob("*.tar"))
    if kind == "parquet":
        return parquet.shards_of(path)
    return (p for root in folder.class_folders(path) for p in sorted(root.rglob("*")) if p.is_file())


def _digest(root: Path, files: Iterable[Path], classes: tuple[str, ...]) -> str:
    """Of all files; of class folders also of the classes in their order, which say what the labels are."""
    state = hashlib.sha256(repr(classes).encode() if classes else b"")
    for file in files:
        state.update(f"{file.relative_to(root)} {checksum(file)}\n".encode())
    return state.hexdigest()


def write_store(
    incoming: Incoming, root: Path, spec: PeerImages, provenance: dict[str, Any], progress: Progress, name: str
) -> None:
    """Writes a published set as a store; a start after a break goes on with the first block that is missing.

    UserError, by `name`, for labels out of range, and for a set of which fewer images can be read than it says.
    """
    size = block_size(incoming.shape, spec.block_size)
    writer = StoreWriter(root=root, blocks=math.ceil(len(incoming) / size), blocks_per_shard=spec.blocks_per_shard)
    missing = set(writer.missing())
    first = min(missing, default=writer.blocks)
    done = min(first * size, len(incoming))
    for number, (images, labels) in enumerate(incoming.blocks(size, first), first):
        check_labels(name, labels, incoming.class_names)
        if number in missing:
            writer.put(number, images, labels)
        done += len(labels)
        progress(done, len(incoming))
    require(done >= len(incoming), name, f"{len(incoming)} images, as were counted", done)
    writer.finish(provenance)


def origin(source: FilesSource, incoming: Incoming) -> dict[str, Any]:
    """Provenance of an imported store: the files, what was assumed, and what the set says about itself."""
    about = About.beside(Path(source.place))
    return {
        "imported": Path(source.place).name,
        "sha256": source.digest,
        "assumed": incoming.assumed,
        "licence": about.licence,
        "additional_data": list(about.additional_data),
        **({"class_names": list(incoming.class_names)} if incoming.class_names else {}),
        **seen(told(about.provenance or {})),
        **({"exported_from": about.provenance} if about.provenance is not None else {}),
    }


@stage(revision=1, card=images_card)
def import_images(work: Workspace, spec: PeerImages, source: FilesSource) -> None:
    """Writes images/ (a store) and chosen.parquet (all of it); a start after a break goes on with the next block."""
    incoming = open_peer(source.place, spec.shape)
    provenance, name = origin(source, incoming), Path(source.place).name
    write_store(incoming, work.folder / "images", spec, provenance, work.progress, name)
    Chosen.write_all(work.folder / "chosen.parquet", SyntheticStore.open(work.folder / "images"))
