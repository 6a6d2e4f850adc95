"""Labels mean what they meant: class folders that were renamed or lost, sets of other classes, pictures of 16 bits."""

import io
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gambeson.cli import main
from gambeson.data.datasets import Digits, load
from gambeson.data.exchange.export import export
from gambeson.data.exchange.outgoing import Outgoing
from gambeson.data.mixture import check_synthetic
from gambeson.data.peers import FilesSource, open_peer
from gambeson.data.synthetic import StoreWriter, SyntheticStore
from gambeson.errors import EnvironmentFault, UserError

NAMES = ["ant", "bee", "cat", "dog"]


def store_at(root: Path, labels: list[int], names: list[str] | None) -> SyntheticStore:
    writer = StoreWriter(root=root, blocks=1, blocks_per_shard=1)
    images = np.stack([np.full((8, 8, 1), 10 * label, np.uint8) for label in labels])
    writer.put(0, images, np.array(labels))
    writer.finish({} if names is None else {"class_names": names})
    return SyntheticStore.open(root)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Class folders of four classes, the third of them without an image."""
    store = store_at(tmp_path / "store", [0, 1, 3, 3, 0, 1], NAMES)
    out = Outgoing(store, lambda done, total: None)
    export(out, "folder", tmp_path / "out")
    return tmp_path / "out"


def test_a_class_folder_that_was_lost_shifts_no_label(exported: Path) -> None:
    """Empty folders do not survive git, zip or an upload."""
    (exported / "cat").rmdir()
    images, labels = next(open_peer(exported).blocks())
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 3, 3]
    assert (images[:, 0, 0, 0] == 10 * labels).all()


def test_a_class_folder_that_was_renamed_is_named(exported: Path) -> None:
    (exported / "ant").rename(exported / "zebra")
    with pytest.raises(UserError, match=r"expected the class folders .* ant, bee, cat, dog.*got \['zebra'\]"):
        open_peer(exported)


def test_folders_with_other_classes_have_other_digests(exported: Path, tmp_path: Path) -> None:
    """The same files, but the empty folder and the list of names gone: their labels are others."""
    shutil.copytree(exported, tmp_path / "bare")
    (tmp_path / "bare/gambeson.json").unlink()
    shutil.copytree(tmp_path / "bare", tmp_path / "lost")
    (tmp_path / "lost/cat").rmdir()
    digests = {FilesSource(str(tmp_path / name)).digest for name in ("bare", "lost")}
    assert len(digests) == 2


def test_synthetic_images_of_other_classes_are_refused(tmp_path: Path) -> None:
    digits = Digits().load()
    pets = replace(digits, class_names=tuple(NAMES))
    for number, (names, real, fits) in enumerate(
        [
            (NAMES, pets, True),
            (NAMES[:3], pets, True),
            (None, pets, True),
            (["0", "1", "2", "3"], pets, True),  # numbers in order name nothing
            (NAMES, digits, True),  # and so of the real images
            (["ant", "bee", "dog"], pets, False),
            (["bee", "ant", "cat", "dog"], pets, False),
            (["0", "1", "10", "2"], digits, False),  # sorted as text
        ]
    ):
        store = store_at(tmp_path / str(number), [0, 1, 2], names)
        if fits:
            check_synthetic(store, real)
        else:
            with pytest.raises(UserError, match="labels would mean other classes"):
                check_synthetic(store, real)


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    for name in ("bus", "car", "train"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    assert load(str(tmp_path / "set"), size=8).class_names == ("bus", "car", "train")
    assert len(open_peer(tmp_path / "set")) == 36


def png_of_16_bits() -> bytes:
    """8 x 8 pixels of colour, 16 bits each: Pillow cannot write that, so by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"".join(b"\0" + bytes(8 * 3 * 2) for _ in range(8)))
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_with_a_transparent_colour() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", transparency=(0, 0, 0))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "why"), [(png_of_16_bits(), "16 bits"), (png_with_a_transparent_colour(), "transpar")]
)
def test_pictures_that_pillow_would_change_silently_are_listed(data: bytes, why: str, tmp_path: Path) -> None:
    assert Image.open(io.BytesIO(data)).mode == "RGB", "the test's own premise"
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "set/a/bad.png").write_bytes(data)
    with pytest.raises(UserError, match=rf"bad\.png.*{why}"):
        load(str(tmp_path / "set"), size=8)
    with pytest.raises(UserError, match=rf"bad\.png.*{why}"):
        list(open_peer(tmp_path / "set").blocks())


def test_what_lies_there_is_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store_at(tmp_path / "store", [0, 1], NAMES[:2])
    for name, words in (
        ("kept.png", ["show", str(tmp_path / "store"), "--out", str(tmp_path / "kept.png")]),
        ("k.npz.json", ["export", str(tmp_path / "store"), "--format", "edm", "--out", str(tmp_path / "k.npz")]),
    ):
        (tmp_path / name).write_text("precious")
        assert main(["store", *words]) == 2
        assert (tmp_path / name).read_text() == "precious"
        assert "where nothing lies yet" in capfd.readouterr().err


def test_a_store_json_without_its_fields_is_damage(tmp_path: Path) -> None:
    store_at(tmp_path / "store", [0, 1], None)
    (tmp_path / "store/store.json").write_text('{"format": 1}')
    with pytest.raises(EnvironmentFault, match="expected rows, shape and provenance"):
        SyntheticStore.open(tmp_path / "store")
