"""Files of strangers: none of them runs anything, leaves its folder or fills memory, whichever door they come through.

What is planted writes a file when it is run; nothing may have written it. Answers are UserError or EnvironmentFault.
"""

import ast
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text

from gambeson import files
from gambeson.data.archives import opened, tar_members
from gambeson.data.arrays import evaluation_images
from gambeson.data.cifar import parse_batch
from gambeson.data.datasets import ImageFolder, NpzImages
from gambeson.data.exchange import folder, npz, webdataset
from gambeson.data.exchange import parquet as exchanged
from gambeson.data.exchange.incoming import About
from gambeson.data.idx import read_idx
from gambeson.data.parquet import ParquetImages
from gambeson.data.svhn import read_mat
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.errors import EnvironmentFault, UserError
from gambeson.models.classifiers import load_encoder
from gambeson.models.denoiser import load_denoiser
from gambeson.models.files import load_tensors
from gambeson.models.foreign import load_foreign
from gambeson.models.hub import from_pretrained
from gambeson.models.outside import outside_classifier
from gambeson.models.pickles import read_pickle, read_torch
from gambeson.recipe import Recipe, class_table
from gambeson.robustness.chunks import StateFile
from gambeson.synthesis.label import open_labels
from tests.fuzz.targets import tarred, with_header, zipped

ROOT = Path(__file__).parent.parent


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def head(shape: tuple[int, ...], kind: str = "|u1", version: int = 1) -> bytes:
    """numpy's head of an array."""
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text


def png(size: tuple[int, int] = (4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


DOORS: dict[str, Callable[[Path], object]] = {
    "npz": lambda p: NpzImages(path=str(p)).load(),
    "evaluation": evaluation_images,
    "npz of synthetic images": lambda p: list(npz.read(p).blocks()),
    "idx": lambda p: read_idx(p, 3),
    "mat": read_mat,
    "tar of synthetic images": lambda p: list(webdataset.read(p).blocks()),
    "tar.gz": lambda p: tar_members(p, ["data_batch_1"]),
    "parquet": lambda p: ParquetImages(path=str(p)).load(),
    "parquet of synthetic images": lambda p: list(exchanged.read(p).blocks()),
    "labels": lambda p: open_labels(p).read(),
    "selection": lambda p: Chosen.open(p),
    "store": SyntheticStore.open,
    "class folders": lambda p: ImageFolder(path=str(p)).load(),
    "class folders of synthetic images": lambda p: list(folder.read(p).blocks()),
    "batch of CIFAR": lambda p: parse_batch(p.read_bytes(), str(p), b"labels"),
    "pickle": read_pickle,
    "torch": read_torch,
    "safetensors": load_tensors,
    "encoder": load_encoder,
    "denoiser": load_denoiser,
    "foreign": lambda p: load_foreign(str(p)),
    "folder of save_pretrained": from_pretrained,
    "program": lambda p: outside_classifier(str(p), (3, 8, 8), trust=False),
    "state of an evaluation": lambda p: StateFile(p, 1.0).load(),
    "recipe": lambda p: files.load(p, Recipe, class_table()),
    "card": About.beside,
}
"""Every way by which a file of others comes in: name -> what reads it."""


def planted(kind: str, trace: Path) -> bytes:
    """A file that runs code where it is read without care."""
    bad = Planted(trace)
    objects = npy(np.array([bad, bad], object))
    if kind == "pickle":
        return pickle.dumps(bad)
    if kind == "objects in npy":
        return objects
    if kind == "objects in npz":
        return zipped({f"{key}.npy": objects for key in ("images", "labels", "x_test", "y_test", "image", "label")})
    if kind == "pickle in npz":
        return zipped({f"{key}.npy": pickle.dumps(bad) for key in ("images", "labels", "image", "label")})
    if kind in ("torch", "torch before 1.6"):
        file = io.BytesIO()
        torch.save({"model": bad, "a": torch.zeros(2)}, file, _use_new_zipfile_serialization=kind == "torch")
        return file.getvalue()
    if kind == "yaml":
        return f"name: !!python/object/apply:builtins.exec [\"open('{trace}', 'w')\"]\n".encode()
    if kind == "yaml in front of a card":
        return b"---\nlicense: " + planted("yaml", trace).partition(b" ")[2] + b"---\n"
    if kind == "tar":
        return tarred({"data_batch_1": pickle.dumps(bad), "0.npy": objects, "0.cls": b"0"})
    if kind == "tar.gz":
        return gzip.compress(planted("tar", trace))
    if kind == "zip of a program":
        return zipped(
            {"a/data.pkl": pickle.dumps(bad), "a/code/x.py": b"raise SystemExit", "a/constants.pkl": pickle.dumps(bad)}
        )
    if kind == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.table({"image": [pickle.dumps(bad)] * 2, "label": [0, 1]}), file)
        return file.getvalue()
    assert kind == "postscript", kind
    return (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(" + str(trace).encode() + b") (w) file closefile\n%%EOF\n"
    )


KINDS = (
    "pickle", "objects in npy", "objects in npz", "pickle in npz", "torch", "torch before 1.6", "yaml",
    "yaml in front of a card", "tar", "tar.gz", "zip of a program", "parquet", "postscript",
)  # fmt: skip


PLAIN = {
    ("card", "yaml in front of a card"),  # which has no licence then
    ("tar.gz", "tar.gz"),  # its members are bytes
    ("labels", "parquet"),  # bytes as well
    ("pickle", "torch before 1.6"),  # begins with a number
}
"""(door, kind) that is read as the data that it is."""


IN_FOLDERS = ("class folders", "class folders of synthetic images", "folder of save_pretrained", "store", "card")


def laid(place: Path, content: bytes, door: str) -> Path:
    """The file as the door expects it, be it in a folder."""
    if door in ("class folders", "class folders of synthetic images"):
        for name in ("a", "b"):
            (place / "set" / name).mkdir(parents=True, exist_ok=True)
            (place / "set" / name / "0.png").write_bytes(content)
        return place / "set"
    if door in ("folder of save_pretrained", "store", "card"):
        names = ("config.json", "model.safetensors", "store.json", "README.md", "gambeson.json")
        (place / "set").mkdir(exist_ok=True)
        for name in names[:-1] if content[:3] == b"---" else names:
            (place / "set" / name).write_bytes(content)
        return place / "set"
    path = place / "file"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("door", DOORS)
def test_nothing_that_is_planted_runs(door: str, tmp_path: Path) -> None:
    """Every kind behind every door; what is not read as data is answered with one of the two errors, in words."""
    trace = tmp_path / "it ran"
    for number, kind in enumerate(KINDS):
        place = tmp_path / str(number)
        place.mkdir()
        path = laid(place, planted(kind, trace), door)
        if (door, kind) in PLAIN:
            DOORS[door](path)
        else:
            with pytest.raises((UserError, EnvironmentFault), match=r"expected|unknown") as caught:
                DOORS[door](path)
            assert len(str(caught.value)) < 3000
        assert not trace.exists(), (door, kind)


def test_what_is_planted_would_run(tmp_path: Path) -> None:
    """The proof that the plants are alive: each runs where it is read without care."""
    careless: dict[str, Callable[[bytes], object]] = {
        "pickle": pickle.loads,
        "objects in npy": lambda b: np.load(io.BytesIO(b), allow_pickle=True),
        "objects in npz": lambda b: np.load(io.BytesIO(b), allow_pickle=True)["images"],
        "torch": lambda b: torch.load(io.BytesIO(b), weights_only=False),
        "torch before 1.6": lambda b: torch.load(io.BytesIO(b), weights_only=False),
    }
    for number, (kind, read) in enumerate(careless.items()):
        trace = tmp_path / str(number)
        read(planted(kind, trace))
        assert trace.exists(), kind


OWN_WORKERS = ("cluster.py", "fleet.py")
"""What a driver and the workers that it started tell each other is pickled, as multiprocessing and ray do."""


def test_every_loader_in_the_source_is_a_safe_one() -> None:
    """torch.load with weights_only, np.load without pickle, yaml's safe loader; no eval, exec, pickle.load, shell."""
    found = []
    for path in sorted((ROOT / "gambeson").rglob("*.py")):
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            name, told = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            wrong = (
                (name == "torch.load" and told.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and told.get("allow_pickle") != "False")
                or (name == "yaml.load" and [ast.unparse(a) for a in call.args[1:]] != ["Loader"])
                or name in ("yaml.unsafe_load", "yaml.full_load", "pickle.load", "eval", "exec", "os.system")
                or (name == "pickle.loads" and path.name not in OWN_WORKERS)
                or name.endswith((".extractall", ".extract")) or told.get("shell") == "True"
                or (name.endswith("Image.open") and "formats" not in told and "corruptions" not in path.name)
            )  # fmt: skip
            found += [f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}"] if wrong else []
    assert found == []


HOSTILE_NAMES = (
    "/tmp/gambeson-was-here",
    "../../gambeson-was-here",
    "..",
    ".",
    "a/../../b",
    "C:\\x",
    "n" * 10_000,
    "\n\x1b[2J",
)


def tar_of(*heads: tarfile.TarInfo, content: bytes = b"") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for told in heads:
            told.size = len(content) if told.isreg() else 0
            archive.addfile(told, io.BytesIO(content))
    return file.getvalue()


def everything_below(place: Path) -> set[str]:
    return {str(p.relative_to(place)) for p in place.rglob("*")}


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_names_in_archives_lead_nowhere(name: str, tmp_path: Path) -> None:
    """Archives are never unpacked: whatever their members are called, no file is written, and none outside is read."""
    (tmp_path / "work").mkdir()
    kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    for number, kind in enumerate(kinds):
        told = tarfile.TarInfo(f"{name}/data_batch_1")
        told.type, told.linkname = kind, "/etc/passwd"
        path = tmp_path / "work" / f"{number}.tar.gz"
        path.write_bytes(gzip.compress(tar_of(told, told, content=b"content")))
        if kind == tarfile.REGTYPE:
            assert tar_members(path, ["data_batch_1"]) == {"data_batch_1": b"content"}
        else:
            with pytest.raises(UserError, match="data_batch_1"):
                tar_members(path, ["data_batch_1"])
    shard = tmp_path / "work" / "set.tar"
    for kind in kinds[1:]:
        images = [tarfile.TarInfo(f"{name}0.{ending}") for ending in ("png", "cls")]
        for told in images:
            told.type, told.linkname = kind, "/etc/passwd"
        shard.write_bytes(tar_of(*images))
        with pytest.raises(UserError, match="empty archive"):
            webdataset.read(shard)
    shard.write_bytes(tarred({f"{name}0.png": png(), f"{name}0.cls": b"1"}))
    hidden = name.startswith(".") and "/" not in name
    if hidden:
        with pytest.raises(UserError, match="empty archive"):
            webdataset.read(shard)
    else:
        assert [labels.tolist() for _, labels in webdataset.read(shard).blocks()] == [[1]]
    archive = tmp_path / "work" / "set.zip"
    archive.write_bytes(zipped({name: b"content"}))
    with opened(archive) as inside:
        for each in inside.names():
            assert inside.read(each) == b"content"
        with pytest.raises(UserError, match="expected"):
            inside.read("../../etc/passwd")
    assert everything_below(tmp_path) == {
        "work",
        *(f"work/{n}.tar.gz" for n in range(5)),
        "work/set.tar",
        "work/set.zip",
    }
    assert not Path("/tmp/gambeson-was-here").exists()


def bounded(code: str, path: Path, megabytes: int = 400, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    """Runs code on a file in a process that may take so much memory beyond what it has imported, and so long."""
    prelude = (
        "import io, resource, sys, warnings; from pathlib import Path; warnings.simplefilter('ignore')\n"
        "from tests.test_strangers import *\n"
        "have = int(Path('/proc/self/statm').read_text().split()[0]) * 4096\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (have + {megabytes << 20},) * 2)\n"
        "used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 1\n"
        f"resource.setrlimit(resource.RLIMIT_CPU, (used + {seconds},) * 2)\n"
        "def ask(name, door, path):\n"
        "    try:\n        door(path)\n"
        "    except (UserError, EnvironmentFault) as error:\n        print(name, '->', str(error)[:300])\n"
        "    else:\n        print(name, '-> read')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GAMBESON_DATA": str(path)}
    asked = [sys.executable, "-c", f"{prelude}place = Path({str(path)!r})\n{code}"]
    return subprocess.run(asked, capture_output=True, text=True, env=environment, timeout=600)


def bombs(place: Path) -> dict[str, str]:
    """File -> the door it stands before; each says, or unpacks to, far more than it is."""
    zeros = zlib.compressobj(1, zlib.DEFLATED, -15)
    flat = b"".join([*(zeros.compress(bytes(1 << 20)) for _ in range(2000)), zeros.flush()])
    gz = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + flat + struct.pack("<II", 0, (2000 << 20) & 0xFFFFFFFF)
    made: dict[str, tuple[str, bytes]] = {**array_bombs(flat), **tar_bombs(gz), **network_bombs(), **recipe_bombs()}
    made |= {
        "giant.png": ("class folders", picture_head(30_000, 30_000)),
        "giant-imported.png": ("class folders of synthetic images", picture_head(8_000, 8_000)),
        "text.png": ("class folders", png_with_text(200 << 20)),
        "rows.parquet": ("parquet", repeated_rows(100_000_000)),
        "rows-imported.parquet": ("parquet of synthetic images", repeated_rows(3_000_000)),
        "same.parquet": ("parquet", same_picture(40 << 20, 1000)),
        "same-imported.parquet": ("parquet of synthetic images", same_picture(40 << 20, 1000)),
    }
    for name, (door, content) in made.items():
        if door in IN_FOLDERS:
            (place / name).mkdir()
            laid(place / name, content, door)
        else:
            (place / name).write_bytes(content)
    return {name: door for name, (door, _) in made.items()}


def array_bombs(flat: bytes) -> dict[str, tuple[str, bytes]]:
    """Arrays; flat: 2 GB of zeros, deflated."""
    small, imported = npy(np.zeros(1, np.int64)), "npz of synthetic images"

    def pair(head: bytes, keys: tuple[str, str] = ("images", "labels")) -> bytes:
        return zipped({f"{keys[0]}.npy": head, f"{keys[1]}.npy": small})

    def zeros(keys: tuple[str, str]) -> bytes:
        return deflated({f"{keys[0]}.npy": head((1, 1000, 1 << 21, 1)), f"{keys[1]}.npy": small}, flat)

    labels = zipped({"images.npy": npy(np.zeros((1, 4, 4, 1), np.uint8)), "labels.npy": npy(np.array([1 << 40]))})
    deep = b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000
    return {
        "terabytes.npz": ("npz", pair(head((1 << 20, 1 << 10, 1 << 10, 1)))),
        "terabytes-evaluated.npz": ("evaluation", pair(head((1 << 40, 4, 4, 1)))),
        "terabytes-imported.npz": (imported, pair(head((1 << 40, 4, 4, 1)), ("image", "label"))),
        "overflow.npz": ("npz", pair(head((1 << 62, 1 << 62, 4, 1)))),
        "classes.npz": ("npz", labels),
        "deep.npz": ("npz", pair(deep)),
        "zeros.npz": ("npz", zeros(("images", "labels"))),
        "zeros-imported.npz": (imported, zeros(("image", "label"))),
        "terabytes": ("idx", bytes([0, 0, 8, 3]) + struct.pack(">III", 1 << 30, 1 << 10, 1)),
    }


def tar_bombs(gz: bytes) -> dict[str, tuple[str, bytes]]:
    """Archives; gz: 2 GB of zeros, packed."""
    imported, small = "tar of synthetic images", {"0.png": png(), "0.cls": b"0"}
    return {
        "zeros.tar.gz": ("tar.gz", gz),
        "zeros.gz": ("idx", gz),
        "huge-member.tar": (imported, with_size(tarred(small), 1 << 40)),
        "backwards.tar": (imported, with_size(tarred(small), -1024)),
        "backwards.tar.gz": ("tar.gz", gzip.compress(with_size(tarred(small), -1024))),
        "digits.tar": (imported, pax(b"9" * 400_000)),
        "digits.tar.gz": ("tar.gz", gzip.compress(pax(b"9" * 400_000))),
        "chain.tar": (imported, b"".join(tarred_head("L", 0) for _ in range(5000)) + bytes(1024)),
        "holes.tar": (imported, sparse(1 << 27)),
    }


def network_bombs() -> dict[str, tuple[str, bytes]]:
    """Weights, and pickles of them."""
    return {
        "memo.pkl": ("pickle", b"\x80\x02}r\xff\xff\xff\xff"),
        "memo-batch": ("batch of CIFAR", b"\x80\x02}r\xff\xff\xff\x7f."),
        "long.pkl": ("pickle", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40)),
        "strides.pt": ("foreign", expanded()),
        "wide.safetensors": ("encoder", with_header(header_of_network(width=1 << 20), bytes(8))),
        "deep.safetensors": ("encoder", with_header(header_of_network(blocks=1 << 40), bytes(8))),
        "nested": ("folder of save_pretrained", b"[" * 100_000),
        "nested-store": ("store", b"[" * 100_000),
        "nested-card": ("card", b"---\nlicense: " + b"[" * 50_000 + b"\n---\n"),
        "nested.safetensors": ("encoder", with_header(b"[" * 100_000, bytes(8))),
        "declared.safetensors": ("safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
    }


def recipe_bombs() -> dict[str, tuple[str, bytes]]:
    """YAML."""
    nine = [b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 115)]
    two = [b"%c: &%c {<<: [*%c, *%c]}\n" % (n, n, n - 1, n - 1) for n in range(98, 122)]
    texts = {
        "aliases": b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(nine) + b"name: *r\n",
        "merges": b"a: &a {x: 1}\n" + b"".join(two),
        "itself": b"name: &a [*a]\n",
        "nested": b"name: " + b"[" * 50_000,
        "power": b"student: {loss: {class: TRADES, beta: '1e999999999'}}\n",
        "long": b"name: " + b"x" * 10_000_000,
        "sixty": b"seed: " + b"1:" * 90_000 + b"1\n",
    }
    return {f"{name}.yaml": ("recipe", text) for name, text in texts.items()}


def deflated(members: dict[str, bytes], flat: bytes) -> bytes:
    """A zip whose first member goes on with 2 GB of zeros: its checksum is wrong, its size is right."""
    first, *others = members
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in others:
            archive.writestr(name, members[name])
        raw = zlib.compressobj(9, zlib.DEFLATED, -15)
        data = raw.compress(members[first]) + raw.flush(zlib.Z_FULL_FLUSH) + flat
        info = zipfile.ZipInfo(first)
        info.compress_type, info.header_offset = zipfile.ZIP_DEFLATED, file.tell()
        info.CRC, info.file_size, info.compress_size = 0, len(members[first]) + (2000 << 20), len(data)
        file.write(info.FileHeader() + data)
        archive.filelist.append(info)
        archive.NameToInfo[first] = info
        archive.start_dir = file.tell()
        archive._didModify = True  # type: ignore[attr-defined]
    return file.getvalue()


def with_size(content: bytes, size: int) -> bytes:
    """A tar whose first head says this size, in base 256 where it is below 0."""
    told = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    block = bytearray(content[:512])
    block[124:136] = told
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content[512:]


def tarred_head(kind: str, size: int) -> bytes:
    told = tarfile.TarInfo("x")
    told.type, told.size = kind.encode(), size
    return told.tobuf(tarfile.GNU_FORMAT)


def pax(records: bytes) -> bytes:
    """A tar with further records of a member, so many digits."""
    return (
        tarred_head("x", len(records)) + records + bytes(-len(records) % 512) + tarred({"0.png": png(), "0.cls": b"0"})
    )


def sparse(size: int) -> bytes:
    """A tar with a file of holes alone."""
    block = bytearray(tarred_head("S", 0))
    block[386:398], block[398:410] = b"%011o\0" % 0, b"%011o\0" % 0
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block).replace(b"x\0\0\0\0\0", b"0.png\0", 1) + tarred({"0.cls": b"0"})


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def picture_head(width: int, height: int) -> bytes:
    """A PNG of so many black pixels."""
    rows = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join([*(rows.compress(row) for _ in range(height)), rows.flush()])
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return start + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png_with_text(size: int) -> bytes:
    """A PNG with so many bytes of packed text."""
    whole = png()
    return whole[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(size), 9)) + whole[33:]


def expanded() -> bytes:
    """Weights that say to be a billion numbers, all one and the same."""
    file = io.BytesIO()
    torch.save({"conv_in.weight": torch.zeros(1).expand(1 << 15, 1 << 15)}, file)
    return file.getvalue()


def header_of_network(**changes: int) -> bytes:
    network = {"class": "ResNetSpec", "width": 4, "multipliers": [1, 2], "blocks": 1, **changes}
    told = {"kind": "classifier", "network": network, "channels": 3, "classes": 10, "shape": [3, 8, 8]}
    return json.dumps(told).encode()


def repeated_rows(count: int) -> bytes:
    """A Parquet of one picture and one label, so often."""
    file = io.BytesIO()
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        rows = min(count, 1_000_000)
        codes = pa.array(np.zeros(rows, np.int32))
        images = pa.DictionaryArray.from_arrays(codes, [b"no picture"]).cast(pa.binary())
        table = pa.table({"image": images, "label": np.zeros(rows, np.int64)}, schema=schema)
        for _ in range(min(count // rows, 3)):
            writer.write_table(table)
    return file.getvalue()


def same_picture(size: int, count: int) -> bytes:
    """A Parquet whose rows all hold one value of so many bytes, kept once."""
    file = io.BytesIO()
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), [bytes(size)])
    table = pa.table({"image": images, "label": np.zeros(count, np.int64)})
    pq.write_table(table, file, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
    return file.getvalue()


def test_bombs_take_neither_memory_nor_time(tmp_path: Path) -> None:
    """Each is answered with one of the two errors, in a process that may take 400 MB more and 60 s of CPU in all."""
    doors = bombs(tmp_path)
    code = f"for name, door in {doors!r}.items():\n"
    code += "    ask(name, DOORS[door], place / name / 'set' if door in IN_FOLDERS else place / name)\n"
    code += "try:\n    bytearray(1 << 30)\nexcept MemoryError:\n    print('the bound holds')\n"
    done = bounded(code, tmp_path)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-2000:])
    answers = dict(line.split(" -> ", 1) for line in done.stdout.splitlines() if " -> " in line)
    assert set(answers) == set(doors)
    assert "the bound holds" in done.stdout
    assert [name for name, answer in answers.items() if answer == "read"] == ["nested-card"]  # without its licence


def test_no_secret_is_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log-ins and keys in addresses that are given as data, runs or weights; a hub token of the environment."""
    from gambeson import run_command
    from gambeson.cli import main
    from gambeson.engine import News
    from gambeson.progress import Record

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    addresses = (
        "https://me:hunter2@host/x.npz",
        "https://host/x.npz?sig=hunter2&api_key=hunter2",
        "s3://k:hunter2@b/x",
    )
    for address in addresses:
        for words in (["run", address], ["run", "digits", "--runs", address], ["train", "--data", address]):
            assert main([*words, "--workers", "1"]) in (2, 3)
    commands: list[str] = []
    monkeypatch.setattr(run_command, "_make", lambda recipe, runs, machine, command, *_: commands.append(command))
    from gambeson.recipes import named

    monkeypatch.setattr(run_command, "_told", lambda *_: (named("digits"), []))
    assert main(["run", "digits", "--name", addresses[0]]) == 0
    assert commands == ["gambeson run digits --name https://***@host/x.npz"]
    with Record(tmp_path / "progress.jsonl", command=" ".join(addresses)) as record:
        record(News("job", "stage", 0, 0, "failed", f"could not read {addresses[1]}"))
    said = capsys.readouterr()
    written = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert any("failed" in text and "***" in text for text in written)
    assert not any("hunter2" in text for text in (*written, said.out, said.err))


def test_what_listens_listens_on_this_machine_alone() -> None:
    """Every address that the source binds or names; torchrun's and ray's are those of who starts them."""
    found = []
    for path in sorted((ROOT / "gambeson").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        words = [n.lineno for n in nodes if isinstance(n, ast.Constant) and n.value in ("0.0.0.0", "::", "--bind_all")]
        calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func).endswith(".bind")]
        sockets = [n for n in calls if len(n.args) == 1 and isinstance(n.args[0], ast.Tuple)]
        words += [n.lineno for n in sockets if "127.0.0.1" not in ast.unparse(n)]
        found += [f"{path.name}:{line}" for line in words]
    assert found == []
    from gambeson.tryout import server

    assert server.ADDRESS == "127.0.0.1"


def test_nothing_of_a_strangers_moves_the_terminals_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names out of files, in errors and in answers, plain and in tables, are shown with their escapes written out."""
    from gambeson import terminal
    from gambeson.cli import main

    wicked = "a\x1b]0;mine\x07\x9b2J\u202e\udcff\r"
    np.savez(tmp_path / "x.npz", **{f"a{wicked[:-3]}": np.zeros(3)})
    assert main(["data", "show", str(tmp_path / "x.npz")]) == 2
    terminal.say(wicked, "b\tc\nd", sep=";")
    terminal.console(200).print(Text(wicked, style="bold"))
    table = Table(title=Text(wicked))
    table.add_row(Text(wicked))
    terminal.console(200).print(table)
    said = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(said.out + said.err)
    assert "\\x1b]0;mine\\x07" in said.err
    assert said.out.count("a\\x1b]0;mine") == 4  # of a Text rich itself takes BEL and CR out
    assert "b\tc\nd" in said.out


def test_pipes_devices_and_endless_files_of_a_run_are_not_waited_for(tmp_path: Path) -> None:
    """A stranger's folder may hold links to what never ends: in a process that may take 400 MB more."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("recipe.yaml", "run.json", "progress.jsonl"):
        (tmp_path / f"a-{name}").mkdir()
        (tmp_path / f"a-{name}" / name).symlink_to(tmp_path / "zero")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "run" / "material").mkdir(parents=True)
    zeros = zlib.compressobj(1, zlib.DEFLATED, -15)
    flat = b"".join([*(zeros.compress(bytes(1 << 20)) for _ in range(2000)), zeros.flush()])
    content = deflated({"a0000.npy": head((1000, 1 << 21)), "about.npy": npy(np.zeros(1, np.uint8))}, flat)
    (tmp_path / "run" / "material" / "material.npz").write_bytes(content)
    code = """
from gambeson.disk import read_json
from gambeson.report import keeping
from gambeson.watching.lines import Tail
for name in ("pipe", "zero", "large.json"):
    ask(name, read_json, place / name)
    ask(name, lambda path: files.load(path, Recipe, class_table()), place / name)
    assert name == "large.json" or Tail(place / name).lines() == (False, [])
assert len(Tail(place / "large.json").lines()) == 2
assert keeping.load(place / "run") is None and not keeping._newer(place / "run" / "material" / "material.npz")
print("done")
"""
    done = bounded(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done" in done.stdout
    assert "read" not in [line.rpartition("-> ")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "facts",
    [{"shape": True}, {"shape": [1, 8, 1 << 40]}, {"class_names": 3}, {"noise": []}, {"log": {}}],
    ids=str,
)
def test_a_header_of_strange_facts_is_refused(facts: dict, tmp_path: Path) -> None:
    """A classifier's header says what is not of its kind: refused by whoever asks it."""
    from gambeson.models.classifiers import spec_of
    from gambeson.robustness.certificates import SavedClassifier

    told = {**json.loads(header_of_network()), **facts}
    path = tmp_path / "classifier.safetensors"
    path.write_bytes(with_header(json.dumps(told).encode(), bytes(8)))
    with pytest.raises((UserError, EnvironmentFault), match="expected"):
        spec_of(SavedClassifier(str(path)).facts["network"], str(path))
