"""Data sets that others published: their files, where they lie, the checksums they must have, and on what terms.

Nothing here was invented: `source` says where a checksum and a size were read. Files lie below data_root()/NAME/.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gambeson.disk import write_json
from gambeson.errors import EnvironmentFault, UserError, unknown


@dataclass(frozen=True, kw_only=True)
class Published:
    """One file as it is distributed."""

    folder: str  # the data set, and the folder below the data root
    name: str  # the file's name
    urls: tuple[str, ...]  # the data set's own site first, then mirrors
    checksum: str | None  # "sha256:..." or "md5:...", None where none is published
    size: int | None  # bytes
    source: str  # where the checksum and the size were found
    usual: bool = True  # whether `gambeson data get NAME` fetches it without --all

    def path(self, root: Path) -> Path:
        """Where it lies below a data root."""
        return root / self.folder / self.name


@dataclass(frozen=True, kw_only=True)
class Catalogued:
    """A data set that has a name."""

    about: str  # what is in it, one line
    homepage: str
    licence: str  # as its authors state it
    citation: str
    terms: str  # what else one should know before using it
    files: tuple[Published, ...]


_TORCHVISION = "torchvision/datasets"
_TFDS = "tensorflow/datasets: url_checksums"


def _cifar(folder: str, dashed: str, form: str, checksum: str, size: int, source: str, usual: bool) -> Published:
    """An archive of CIFAR; the site forwards to its second address."""
    name = f"{dashed}-{form}.tar.gz"
    places = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
    urls = tuple(place + name for place in places)
    return Published(folder=folder, name=name, urls=urls, checksum=checksum, size=size, source=source, usual=usual)


def _krizhevsky(about: str, *files: Published) -> Catalogued:
    return Catalogued(
        about=about,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; its page asks to cite the report",
        citation="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, 2009",
        terms="A labelled part of the 80 Million Tiny Images, which their authors have since withdrawn.",
        files=files,
    )


CIFAR10 = _krizhevsky(
    "50,000 + 10,000 colour photographs of 32x32, 10 classes",
    _cifar(
        "cifar10",
        "cifar-10",
        "python",
        "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        170_498_071,
        "keras/src/datasets/cifar10.py; huggingface/datasets: datasets/cifar10/dataset_infos.json",
        True,
    ),
    _cifar(
        "cifar10",
        "cifar-10",
        "binary",
        "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        170_052_171,
        f"{_TFDS}/cifar10.txt",
        False,
    ),
)

CIFAR100 = _krizhevsky(
    "50,000 + 10,000 colour photographs of 32x32, 100 classes",
    _cifar(
        "cifar100",
        "cifar-100",
        "python",
        "sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        169_001_437,
        "keras/src/datasets/cifar100.py; huggingface/datasets: datasets/cifar100/dataset_infos.json",
        True,
    ),
    _cifar(
        "cifar100",
        "cifar-100",
        "binary",
        "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        168_513_733,
        f"{_TFDS}/cifar100.txt",
        False,
    ),
)


def _idx(folder: str, places: tuple[str, ...], found: dict[str, tuple[int, str]], source: str) -> tuple[Published, ...]:
    """The four files of a set in MNIST's form: NAME -> (bytes, SHA-256)."""
    return tuple(
        Published(
            folder=folder,
            name=f"{stem}-ubyte.gz",
            urls=tuple(f"{place}{stem}-ubyte.gz" for place in places),
            checksum=f"sha256:{digest}",
            size=size,
            source=source,
        )
        for stem, (size, digest) in found.items()
    )


MNIST = Catalogued(
    about="60,000 + 10,000 handwritten digits, grey, 28x28, 10 classes",
    homepage="http://yann.lecun.com/exdb/mnist/",
    licence="CC BY-SA 3.0 (as the documentation of Keras has it)",
    citation="Y. LeCun et al., Gradient-based learning applied to document recognition, Proc. IEEE 86, 1998",
    terms="Its own site has often refused downloads, so mirrors that others keep come first.",
    files=_idx(
        "mnist",
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        {
            "train-images-idx3": (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            "train-labels-idx1": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            "t10k-images-idx3": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            "t10k-labels-idx1": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        },
        f"{_TFDS}/mnist.txt; addresses: {_TORCHVISION}/mnist.py",
    ),
)

FASHION_MNIST = Catalogued(
    about="60,000 + 10,000 pictures of clothes, grey, 28x28, 10 classes",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
    licence="MIT",
    citation="H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a novel image dataset, arXiv:1708.07747, 2017",
    terms="Copyright Zalando SE.",
    files=_idx(
        "fashion-mnist",
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        {
            "train-images-idx3": (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            "train-labels-idx1": (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            "t10k-images-idx3": (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            "t10k-labels-idx1": (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        },
        f"{_TFDS}/fashion_mnist.txt; addresses: zalandoresearch/fashion-mnist: README.md",
    ),
)


def _svhn(part: str, checksum: str, size: int, usual: bool = True) -> Published:
    name = f"{part}_32x32.mat"
    return Published(
        folder="svhn",
        name=name,
        urls=(f"http://ufldl.stanford.edu/housenumbers/{name}",),
        checksum=checksum,
        size=size,
        source=f"{_TFDS}/svhn_cropped.txt; address: {_TORCHVISION}/svhn.py",
        usual=usual,
    )


SVHN = Catalogued(
    about="73,257 + 26,032 digits of house numbers, colour, 32x32, 10 classes; 531,131 easier ones more in extra",
    homepage="http://ufldl.stanford.edu/housenumbers/",
    licence="non-commercial use only, as its page says of the pictures",
    citation="Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011",
    terms="Cut from Google Street View.",
    files=(
        _svhn("train", "sha256:435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8", 182_040_794),
        _svhn("test", "sha256:cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b", 64_275_384),
        _svhn("extra", "sha256:a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3", 1_329_278_602, False),
    ),
)


def _gtsrb(name: str, checksum: str | None, size: int, source: str, usual: bool = True) -> Published:
    url = f"https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/{name}"
    return Published(folder="gtsrb", name=name, urls=(url,), checksum=checksum, size=size, source=source, usual=usual)


_SIZES = f"{_TORCHVISION}/gtsrb.py (MD5); the server's length in public logs of downloads"
GTSRB = Catalogued(
    about="39,209 + 12,630 photographs of German traffic signs, colour, 25 to 243 pixels wide, 43 classes",
    homepage="https://benchmark.ini.rub.de/",
    licence="none found with the files; cite the paper",
    citation="J. Stallkamp et al., Man vs. computer, Neural Networks 32, 2012",
    terms="Of the training archive no checksum is published, only its length. That of the contest's first part, "
    "26,640 images with a published checksum, comes with --all, and is read where the final one is not.",
    files=(
        _gtsrb("GTSRB_Final_Test_Images.zip", "md5:c7e4e6327067d32654124b0fe9e82185", 88_978_620, _SIZES),
        _gtsrb("GTSRB_Final_Test_GT.zip", "md5:fe31e9c9270bbcd7b84b7f21a9d9d9e5", 99_620, _SIZES),
        _gtsrb(
            "GTSRB_Final_Training_Images.zip",
            None,
            276_294_756,
            "no checksum published; the server's length in public logs of downloads",
        ),
        _gtsrb("GTSRB-Training_fixed.zip", "md5:513f3c79a4c5141765e10e952eaa2478", 187_490_228, _SIZES, usual=False),
    ),
)

TINY_IMAGENET = Catalogued(
    about="100,000 + 10,000 colour photographs of 64x64, 200 classes (and 10,000 without labels)",
    homepage="http://cs231n.stanford.edu/",
    licence="none stated; the pictures are ImageNet's, whose terms say non-commercial research and education only",
    citation="Y. Le, X. Yang, Tiny ImageNet Visual Recognition Challenge, CS 231N, Stanford, 2015",
    terms="Its test part has no labels, so its val part is what is tested on.",
    files=(
        Published(
            folder="tiny-imagenet",
            name="tiny-imagenet-200.zip",
            urls=("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
            checksum="md5:90528d7ca1a48142e341f4ef8d21d0de",
            size=248_100_043,
            source="avalanche: benchmarks/datasets/tiny_imagenet.py (MD5); the size in public logs of downloads",
        ),
    ),
)

CATALOGUE: dict[str, Catalogued] = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "mnist": MNIST,
    "fashion-mnist": FASHION_MNIST,
    "svhn": SVHN,
    "gtsrb": GTSRB,
    "tiny-imagenet": TINY_IMAGENET,
}
"""Data sets that `gambeson data get NAME` downloads."""


def catalogued(name: str) -> Catalogued:
    """The data set of that name. Raises UserError listing the known ones, the nearest first."""
    if name not in CATALOGUE:
        raise unknown("data set to download", name, CATALOGUE)
    return CATALOGUE[name]


def published(path: Path) -> list[Published]:
    """What the catalogue knows under this file name; MNIST and Fashion-MNIST share names, the folder tells which."""
    same = [file for held in CATALOGUE.values() for file in held.files if file.name == path.name]
    return [file for file in same if file.folder == path.absolute().parent.name] or same


def digest_of(path: Path, kind: str) -> str:
    """'sha256:...' or 'md5:...' of a file. Raises EnvironmentFault where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"
    except OSError as error:
        raise EnvironmentFault(f"{path}: expected to read this file, got: {error.strerror or error}") from error


def matches(path: Path, *expected: str) -> bool:
    """Whether a file has one of these digests; a yes is kept beside it as NAME.checked until its size or time changes.

    Raises UserError where there is no such file.
    """
    note = path.with_name(f"{path.name}.checked")
    passing = {checksum: _state(path, checksum) for checksum in expected}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(note.read_text(encoding="utf-8")) in passing.values():
            return True
    found = {digest_of(path, kind) for kind in {checksum.partition(":")[0] for checksum in expected}}
    right = found & set(expected)
    with contextlib.suppress(OSError):  # a data root may be read-only
        if right:
            write_json(note, passing[next(iter(right))])
        else:
            note.unlink(missing_ok=True)
    return bool(right)


def _state(path: Path, checksum: str) -> dict[str, str | int]:
    """What must not have changed for a check to hold."""
    try:
        facts = path.stat()
    except OSError as error:
        raise UserError(f"{path}: expected a file, got: {error.strerror}; `gambeson data get` downloads it") from None
    return {"checksum": checksum, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def check_published(path: Path) -> None:
    """UserError naming the file, the expected and the found digest where it is not the one that was published.

    A file whose name is not in the catalogue passes, and so does one of the right size without a published checksum.
    """
    known = published(path)
    if known:
        check(path, known)


def check(path: Path, known: Sequence[Published]) -> None:
    """The same for a file that must be one of these."""
    checksums = [file.checksum for file in known if file.checksum is not None]
    size = int(_state(path, "")["size"])
    if checksums and matches(path, *checksums):
        return
    if not any(file.checksum is None and file.size in (None, size) for file in known):
        raise UserError(refusal(path, known[0], size))


def refusal(path: Path, file: Published, size: int) -> str:
    """What is said of a file that is not the published one."""
    fix = f"move it away and say `gambeson data get {file.folder}{'' if file.usual else ' --all'}`"
    lengths = f"{size:,} bytes where {file.size:,} were published" if file.size not in (None, size) else ""
    if file.checksum is None:
        return f"{path}: expected {file.name} of {file.folder}, got {lengths}; {fix}"
    found = digest_of(path, file.checksum.partition(":")[0])
    told = f" ({lengths})" if lengths else ""
    return f"{path}: expected {file.name} of {file.folder} with {file.checksum}, got {found}{told}; {fix}"
