"""What is fuzzed: each target lays bytes before the readers of one format; only the two documented errors may come out.

The first byte of an input says how the rest is wrapped (an archive around a member, a header before its tensors), so
that checksums and lengths of the wrapping do not hide what is inside; 0: the file as it is.
"""

import gzip
import io
import json
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gambeson import files
from gambeson.data import parquet
from gambeson.data.archives import opened, tar_members
from gambeson.data.arrays import evaluation_images
from gambeson.data.chosen import Chosen
from gambeson.data.cifar import parse_batch
from gambeson.data.exchange import npz, pictures, webdataset
from gambeson.data.exchange import parquet as exchanged
from gambeson.data.exchange.incoming import ABOUT, About
from gambeson.data.gtsrb import test_frames, train_frames
from gambeson.data.idx import read_idx
from gambeson.data.npz import NpzImages
from gambeson.data.svhn import read_mat
from gambeson.errors import EnvironmentFault, UserError
from gambeson.models.classifiers import load_encoder
from gambeson.models.denoiser import load_denoiser
from gambeson.models.files import header_of, is_safetensors, load_tensors
from gambeson.models.hub import from_pretrained
from gambeson.models.pickles import read_pickle, read_torch
from gambeson.recipe import Recipe, class_table
from gambeson.synthesis.label import open_labels

SPLIT = b"\0SPLIT"
"""Stands between two members of a wrapped input."""
MOST = 1 << 16
"""Bytes of an input, at most."""

Target = Callable[[bytes, Path], None]
"""(input, an empty folder) -> nothing; UserError and EnvironmentFault are answers, anything else is a finding."""


def tried(*readers: Callable[[], object]) -> None:
    """Calls each; the documented errors are what it may answer with."""
    for reader in readers:
        with suppress(UserError, EnvironmentFault), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader()


def laid(folder: Path, name: str, content: bytes) -> Path:
    """A file of these bytes."""
    path = folder / name
    path.write_bytes(content)
    return path


def drained(blocks: object) -> None:
    """Reads all blocks."""
    for _ in blocks:  # type: ignore[attr-defined]
        pass


def zipped(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    """A tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            head = tarfile.TarInfo(name)
            head.size = len(content)
            archive.addfile(head, io.BytesIO(content))
    return file.getvalue()


def parts(data: bytes, *names: str) -> dict[str, bytes]:
    """The members of a wrapped input."""
    return dict(zip(names, [*data.split(SPLIT), *[b""] * len(names)], strict=False))


def npz_target(data: bytes, folder: Path) -> None:
    """Arrays of numpy: the door, the evaluation's door, the exchange's."""
    how, rest = data[:1] or b"\0", data[1:]
    if how[0] % 3:
        members = parts(rest, *(("images.npy", "labels.npy") if how[0] % 3 == 1 else ("x_test.npy", "y_test.npy")))
        rest = zipped(members, zipfile.ZIP_DEFLATED if how[0] > 127 else zipfile.ZIP_STORED)
    path = laid(folder, "set.npz", rest)
    tried(NpzImages(path=str(path)).load, lambda: evaluation_images(path), lambda: drained(npz.read(path).blocks()))


def idx_target(data: bytes, folder: Path) -> None:
    """MNIST's files, gzipped or not."""
    how, rest = data[:1] or b"\0", data[1:]
    sides = 3 if how[0] & 1 else 1
    if how[0] & 2:
        path = laid(folder, "images.gz", rest if how[0] & 4 else gzip.compress(rest, 1))
    else:
        path = laid(folder, "images", rest)
    tried(lambda: read_idx(path, sides))


def mat_target(data: bytes, folder: Path) -> None:
    """MATLAB's files as SVHN's."""
    tried(lambda: read_mat(laid(folder, "train.mat", data)))


def tar_target(data: bytes, folder: Path) -> None:
    """WebDataset's shards, and CIFAR's .tar.gz."""
    how, rest = data[:1] or b"\0", data[1:]
    if how[0] % 3 == 1:
        rest = tarred(parts(rest, "0.png", "0.cls", "1.npy", "1.cls"))
    path = laid(folder, "set.tar", rest)
    again = laid(folder, "set.tar.gz", rest if how[0] % 3 == 2 else gzip.compress(rest, 1))
    tried(lambda: drained(webdataset.read(path).blocks()), lambda: tar_members(again, ["test_batch", "0.png"]))


def zip_target(data: bytes, folder: Path) -> None:
    """GTSRB's archives."""
    how, rest = data[:1] or b"\0", data[1:]
    if how[0] % 3 == 1:
        rest = zipped(parts(rest, "a/00000/GT-00000.csv", "a/00000/00000_00000.ppm"))
    if how[0] % 3 == 2:
        rest = zipped(parts(rest, "GT-final_test.csv", "Images/00000.ppm"))
    path = laid(folder, "signs.zip", rest)

    def frames() -> None:
        with opened(path) as inside:
            tried(lambda: train_frames(inside), lambda: test_frames(inside, path))

    tried(frames)


def parquet_target(data: bytes, folder: Path) -> None:
    """Pictures in Parquet (the door, the exchange's reader), labels, a selection."""
    path = laid(folder, "train.parquet", data)
    tried(
        parquet.ParquetImages(path=str(path), size=4, on_bad_image="skip").load,
        lambda: drained(exchanged.read(path).blocks()),
        lambda: open_labels(path).read(),
        lambda: Chosen.open(path),
    )


def recipe_target(data: bytes, folder: Path) -> None:
    """A recipe's YAML."""
    path = laid(folder, "recipe.yaml", data)
    tried(lambda: files.load(path, Recipe, class_table()))


def checkpoint_target(data: bytes, folder: Path) -> None:
    """Our safetensors, whose header says what network to build, and a folder of save_pretrained."""
    how, rest = data[:1] or b"\0", data[1:]
    if how[0] % 2:
        rest = with_header(*parts(rest, "header", "numbers").values())
    path = laid(folder, "classifier.safetensors", rest)
    tried(
        lambda: is_safetensors(path),
        lambda: header_of(path),
        lambda: load_tensors(path),
        lambda: load_encoder(path),
        lambda: load_denoiser(path),
    )
    config, weights = parts(data[1:], CONFIG, WEIGHTS).values()
    laid(folder, CONFIG, config)
    laid(folder, WEIGHTS, with_header(b"{}", weights))
    tried(lambda: from_pretrained(folder))


CONFIG, WEIGHTS = "config.json", "model.safetensors"


def with_header(header: bytes, numbers: bytes) -> bytes:
    """A safetensors file of one tensor whose metadata says this of gambeson."""
    numbers = numbers[: len(numbers) // 4 * 4]
    entry = {"dtype": "F32", "shape": [len(numbers) // 4], "data_offsets": [0, len(numbers)]}
    told = json.dumps({"__metadata__": {"gambeson": header.decode("utf-8", "replace")}, "logits.bias": entry}).encode()
    return len(told).to_bytes(8, "little") + told + numbers


def pickle_target(data: bytes, folder: Path) -> None:
    """Weights and batches in pickles, of which nothing is run."""
    how, rest = data[:1] or b"\0", data[1:]
    if how[0] % 2:
        rest = zipped({"archive/data.pkl": rest, "archive/version": b"3\n", "archive/data/0": bytes(64)})
    path = laid(folder, "weights.pt", rest)
    tried(lambda: parse_batch(rest, "batch", b"labels"), lambda: read_pickle(path), lambda: read_torch(path))


def picture_target(data: bytes, folder: Path) -> None:
    """Single pictures, and what stands beside an exported set."""
    rule = parquet.Rule(size=4)
    picture = pictures.Picture("picture", data, 0)

    def fitted() -> None:
        with suppress(parquet.BadPicture):
            rule.image(data)

    tried(fitted, lambda: pictures.decoded(picture), lambda: pictures.decoded(picture, (4, 4, 3)))
    laid(folder, "README.md", b"---\n" + data + b"\n---\n")
    tried(lambda: About.beside(folder))
    laid(folder, ABOUT, data)
    tried(lambda: About.beside(folder))


TARGETS: dict[str, Target] = {
    "npz": npz_target,
    "idx": idx_target,
    "mat": mat_target,
    "tar": tar_target,
    "zip": zip_target,
    "parquet": parquet_target,
    "recipe": recipe_target,
    "checkpoint": checkpoint_target,
    "pickle": pickle_target,
    "picture": picture_target,
}
