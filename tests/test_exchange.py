"""Sets in the formats of others, out and in again: equal bits, other readers, damage, breaks, memory."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from gambeson.data.exchange import folder as class_folders
from gambeson.data.exchange import outgoing, parquet, pictures, webdataset
from gambeson.data.exchange.export import FORMATS, export
from gambeson.data.exchange.incoming import _card_licence
from gambeson.data.exchange.outgoing import Outgoing, class_counts
from gambeson.data.folder import ImageFolder
from gambeson.data.peers import FilesSource, PeerImages, import_images, is_peer, open_peer
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore, open_synthetic
from gambeson.errors import EnvironmentFault, UserError
from gambeson.store import Store

MADE = {"licence": "cc-by-4.0", "additional_data": ["tiny"], "class_names": ["cat", "dog", "eel", "fox"], "seed": 3}


def pixels(n: int, side: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Not square, so that sides cannot be taken for each other."""
    return np.random.default_rng(seed).integers(0, 256, (n, side, side - 1, channels), dtype=np.uint8)


def make_store(
    root: Path, n: int = 47, labels: np.ndarray | None = None, channels: int = 3, provenance: dict | None = None
) -> SyntheticStore:
    """Blocks of 10 in shards of 20; class 2 has no image."""
    images, labels = pixels(n, channels=channels), np.array([0, 1, 3])[np.arange(n) % 3] if labels is None else labels
    writer = StoreWriter(root=root, blocks=-(-n // 10), blocks_per_shard=2)
    for block in range(writer.blocks):
        writer.put(block, images[block * 10 : block * 10 + 10], labels[block * 10 : block * 10 + 10].astype(np.int64))
    writer.finish(MADE if provenance is None else provenance)
    return SyntheticStore.open(root)


def place_of(form: str, folder: Path) -> Path:
    return folder / {"edm": "set.npz", "cdp": "set.npz", "port": "set.bin"}.get(form, "set")


def written(source: SyntheticStore | Chosen, form: str, folder: Path, **options: object) -> Path:
    place = place_of(form, folder)
    export(Outgoing(source, block=7), form, place, **options)  # type: ignore[arg-type]
    return place


SPEC = PeerImages(block_size=8, blocks_per_shard=3)


def imported(place: Path, runs: Path) -> SyntheticStore | Chosen:
    return open_synthetic(Store(runs).once(import_images, SPEC, FilesSource(str(place))).folder)


def content(source: SyntheticStore | Chosen) -> tuple[list, list]:
    images, labels = source.read(np.arange(len(source)))
    return images.tolist(), labels.tolist()


# ---- out and in again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("form", FORMATS)
def test_a_set_comes_back_as_it_was(tmp_path: Path, form: str, channels: int) -> None:
    store = make_store(tmp_path / "store", channels=channels)
    place = written(store, form, tmp_path / "out")
    assert is_peer(place)
    peer = open_peer(place)
    assert (len(peer), peer.shape, peer.class_names) == (47, (6, 5, channels), ("cat", "dog", "eel", "fox"))
    back = imported(place, tmp_path / "runs")
    assert content(back) == content(store)
    kept = outgoing.store_of(back).provenance
    assert {name: kept[name] for name in ("licence", "additional_data", "class_names")} == {
        name: MADE[name] for name in ("licence", "additional_data", "class_names")
    }
    assert kept["exported_from"] == MADE


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "folder"])
def test_a_selection_goes_out_in_its_order_with_its_labels(tmp_path: Path, form: str) -> None:
    store, places = make_store(tmp_path / "store", provenance={}), np.array([40, 2, 17, 3, 3])
    Chosen.write(tmp_path / "chosen.parquet", store, places, np.array([2, -1, 0, 1, 0]))
    chosen = Chosen.open(tmp_path / "chosen.parquet")
    back = imported(written(chosen, form, tmp_path / "out"), tmp_path / "runs")
    assert content(back) == (store.read(places)[0].tolist(), [2, -1, 0, 1, 0])
    assert not is_peer(tmp_path / "chosen.parquet")


@pytest.mark.parametrize("form", FORMATS)
def test_an_import_is_known_by_content_not_by_place(tmp_path: Path, form: str) -> None:
    place = written(make_store(tmp_path / "store"), form, tmp_path / "out")
    digest = FilesSource(str(place)).digest
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = place_of(form, tmp_path / "moved")
    assert FilesSource(str(moved)).digest == digest
    other = written(make_store(tmp_path / "other", labels=np.zeros(47, int)), form, tmp_path / "other-out")
    assert FilesSource(str(other)).digest != digest


def test_several_shards_come_back_in_order(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    for form, options in (("webdataset", {"images_as": "npy"}), ("parquet", {}), ("webdataset", {})):
        place = written(store, form, tmp_path / f"{form}{len(options)}", per_file=20, **options)
        assert content(imported(place, tmp_path / "runs")) == content(store)
        for first in range(6):  # in the first shard, at and behind the beginning of others
            later = np.concatenate([images for images, _ in open_peer(place).blocks(8, first)])
            assert np.array_equal(later, pixels(47)[8 * first :])
        if form == "webdataset":
            assert [p.name for p in sorted(place.glob("*.tar"))] == [f"set-{i:06d}.tar" for i in range(3)]
            assert content(imported(place / "set-000001.tar", tmp_path / "runs"))[1] == store.labels[20:40].tolist()
        else:
            names = [p.name for p in sorted(place.glob("data/*"))]
            assert names == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
            assert content(imported(place / "data" / names[2], tmp_path / "runs"))[1] == store.labels[40:].tolist()


def test_of_a_hub_folder_with_a_test_part_train_alone_is_read(tmp_path: Path) -> None:
    place = written(make_store(tmp_path / "store"), "parquet", tmp_path, per_file=20)
    (place / "data/train-00001-of-00003.parquet").rename(place / "data/test-00000-of-00001.parquet")
    assert len(open_peer(place)) == 27
    assert "train" in open_peer(place).assumed
    (place / "gambeson.json").unlink()
    assert open_peer(place).class_names == ("cat", "dog", "eel", "fox")  # the schema says it too
    assert (
        outgoing.store_of(imported(place, tmp_path / "runs")).provenance["licence"] == "cc-by-4.0"
    )  # so does the card


def test_blocks_are_smaller_where_images_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store")
    monkeypatch.setattr("gambeson.data.exchange.incoming.BLOCK_BYTES", 5 * 90)
    for form in ("edm", "webdataset"):
        place = written(store, form, tmp_path / form)
        assert [len(labels) for _, labels in open_peer(place).blocks(8192)] == [5] * 9 + [2]
        assert np.array_equal(next(open_peer(place).blocks(8192, 3))[0], store.read(np.arange(15, 20))[0])
        assert content(imported(place, tmp_path / "runs")) == content(store)


# ---- as others read them ---------------------------------------------------------------------------------------------


def test_numpy_reads_the_archives(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    for form, keys in (("edm", ["image", "label"]), ("cdp", ["arr_0", "arr_1"])):
        with np.load(written(store, form, tmp_path / form), allow_pickle=False) as found:
            assert found.files == keys
            assert np.array_equal(found[keys[0]], pixels(47))
            assert np.array_equal(found[keys[1]], store.labels)
            assert (found[keys[0]].dtype, found[keys[1]].dtype) == (np.uint8, np.int64)
    place = written(store, "port", tmp_path / "port")
    assert np.array_equal(np.fromfile(place, np.uint8).reshape(47, 6, 5, 3), pixels(47))
    assert np.array_equal(np.load(place.with_name("set_labels.npy")), store.labels)


def test_tarfile_and_pillow_read_the_shards(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    place = written(store, "webdataset", tmp_path)
    with tarfile.open(place / "set-000000.tar") as archive:
        names = archive.getnames()
        assert names[:3] == ["00000000.png", "00000000.cls", "00000001.png"]
        for number in (0, 46):
            with Image.open(archive.extractfile(f"{number:08d}.png")) as picture:  # type: ignore[arg-type]
                assert np.array_equal(np.asarray(picture), pixels(47)[number])
            assert int(archive.extractfile(f"{number:08d}.cls").read()) == store.labels[number]  # type: ignore[union-attr]
    assert len(names) == 94


def test_pillow_and_the_folder_door_read_the_folders(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", labels=np.arange(47) % 4)
    place = written(store, "folder", tmp_path)
    assert sorted(p.name for p in place.iterdir()) == ["README.md", "cat", "dog", "eel", "fox", "gambeson.json"]
    with Image.open(place / "dog/00000001.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels(47)[1])
    found = ImageFolder(path=str(place), size=6, validation_share=0.2, test_share=0.2).load()
    assert found.class_names == ("cat", "dog", "eel", "fox")


def test_pyarrow_reads_the_parquet_and_the_card_says_what_it_is(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    place = written(store, "parquet", tmp_path, per_file=30)
    table = pq.read_table(place / "data")
    assert table["label"].to_pylist() == store.labels.tolist()
    assert table["image"][46].as_py()["path"] == "00000046.png"
    with Image.open(io.BytesIO(table["image"][46].as_py()["bytes"])) as picture:
        assert np.array_equal(np.asarray(picture), pixels(47)[46])
    features = json.loads(pq.read_schema(place / "data/train-00000-of-00002.parquet").metadata[b"huggingface"])["info"]
    assert features["features"]["label"] == {"names": MADE["class_names"], "_type": "ClassLabel"}
    _, front, text = (place / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["license"] == "cc-by-4.0"
    assert card["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert card["dataset_info"]["splits"] == [{"name": "train", "num_examples": 47}]
    assert card["dataset_info"]["features"][1]["dtype"]["class_label"]["names"] == dict(
        zip("0123", MADE["class_names"], strict=True)
    )
    assert "| 2 | eel | 0 |" in text
    assert "have seen: tiny" in text


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    library = pytest.importorskip("webdataset")
    store = make_store(tmp_path / "store")
    place = written(store, "webdataset", tmp_path, per_file=20)
    shards = f"{place}/set-{{000000..000002}}.tar"
    found = list(library.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert [label for _, label in found] == store.labels.tolist()
    assert np.array_equal(np.stack([image for image, _ in found]), pixels(47))


def test_datasets_reads_the_parquet(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    store = make_store(tmp_path / "store")
    place = written(store, "parquet", tmp_path, per_file=20)
    found = library.load_dataset(str(place), cache_dir=str(tmp_path / "cache"), split="train")
    assert found.features["label"].names == MADE["class_names"]
    assert list(found["label"]) == store.labels.tolist()
    assert all(np.array_equal(np.asarray(row["image"]), pixels(47)[i]) for i, row in enumerate(found))


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "folder"])
def test_images_without_any_class_go_out_too(tmp_path: Path, form: str) -> None:
    store = make_store(tmp_path / "store", labels=np.full(47, -1), provenance={})
    place = written(store, form, tmp_path)
    assert content(imported(place, tmp_path / "runs")) == content(store)
    if form == "parquet":
        card = yaml.safe_load((place / "README.md").read_text().split("---\n", 2)[1])
        assert card["dataset_info"]["features"][1] == {"name": "label", "dtype": "int64"}
        assert "license" not in card


def test_names_of_classes_become_folders_that_sort_as_the_labels() -> None:
    assert class_folders.folder_names(("cat", "dog")) == ("cat", "dog")
    assert class_folders.folder_names(("dog", "cat")) == ("0-dog", "1-cat")
    assert class_folders.folder_names(("../x", "b", ".c", "")) == ("0-.._x", "1-b", "2-.c", "3-")
    assert class_folders.folder_names(("test", "train")) == ("0-test", "1-train")
    assert outgoing.numbered(11)[9:] == ("09", "10")
    assert class_counts(np.array([-1, 2, 2, -1, 0]))[1].tolist() == [1, 0, 2]


# ---- breaks ----------------------------------------------------------------------------------------------------------


def stopping(monkeypatch: pytest.MonkeyPatch, module: object, after: int) -> list[int]:
    """Encoding of pictures ends the program after so many; the list counts them."""
    encode, counted = pictures.encoded, []

    def counting(image: np.ndarray) -> bytes:
        if len(counted) == after:
            raise KeyboardInterrupt
        counted.append(1)
        return encode(image)

    target = "FORMS" if module is webdataset else "encoded"
    monkeypatch.setattr(module, target, {"png": counting} if module is webdataset else counting)
    return counted


@pytest.mark.parametrize("form", ["webdataset", "folder", "parquet"])
def test_an_export_of_many_files_goes_on(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, module = make_store(tmp_path / "store"), {"folder": class_folders, "parquet": parquet}.get(form, webdataset)
    monkeypatch.setattr(class_folders, "PER_PIECE", 20)
    options = {} if form == "folder" else {"per_file": 20}
    straight = written(store, form, tmp_path / "straight", **options)
    with monkeypatch.context() as patched:
        stopping(patched, module, 33)
        with pytest.raises(KeyboardInterrupt):
            written(store, form, tmp_path / "broken", **options)
    assert os.listdir(tmp_path / "broken") == [".set.part"]  # nothing that looks whole
    with pytest.raises(UserError, match=r"unfinished work of the same command"):
        written(make_store(tmp_path / "other", 30), form, tmp_path / "broken", **options)
    with monkeypatch.context() as patched:
        counted = stopping(patched, module, 1000)
        resumed = written(store, form, tmp_path / "broken", **options)
    assert len(counted) == 27  # the first twenty were there
    files = sorted(p.relative_to(straight) for p in straight.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(resumed) for p in resumed.rglob("*") if p.is_file())
    assert all((straight / file).read_bytes() == (resumed / file).read_bytes() for file in files)
    assert os.listdir(tmp_path / "broken") == ["set"]


@pytest.mark.parametrize("form", ["edm", "port"])
def test_an_export_to_one_file_that_fails_leaves_none(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store")
    read = SyntheticStore.stretch

    def full(store: SyntheticStore, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        if start:
            raise OSError(28, "No space left on device")
        return read(store, start, stop)

    monkeypatch.setattr(SyntheticStore, "stretch", full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        written(store, form, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".json"] == []


KILLED = """
import os, signal, sys
from pathlib import Path
from gambeson.data.exchange import folder
from gambeson.data.exchange.export import export
from gambeson.data.exchange.outgoing import Outgoing
from gambeson.data.synthetic import SyntheticStore
encode, left = folder.encoded, [33]
def dying(image):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(image)
folder.encoded = dying
folder.PER_PIECE = 20
export(Outgoing(SyntheticStore.open(sys.argv[1])), "folder", Path(sys.argv[2]))
"""


def test_an_export_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(tmp_path / "set")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    monkeypatch.setattr(class_folders, "PER_PIECE", 20)
    place = written(store, "folder", tmp_path)
    assert content(imported(place, tmp_path / "runs")) == content(store)


def test_an_import_of_pictures_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store")
    for form in ("webdataset", "parquet", "folder"):
        place, runs = written(store, form, tmp_path / form), tmp_path / f"runs-{form}"
        decode, seen = pictures.decoded, []

        def counting(
            picture: pictures.Picture, wanted: tuple[int, int, int] | None = None, seen=seen, decode=decode
        ) -> np.ndarray:
            if len(seen) == 30:
                seen.append("stop")
                raise KeyboardInterrupt
            seen.append(picture.name)
            return decode(picture, wanted)

        with monkeypatch.context() as patched:
            patched.setattr(pictures, "decoded", counting)
            with pytest.raises(KeyboardInterrupt):
                imported(place, runs)
            assert content(imported(place, runs)) == content(store)
        assert len(seen) - seen.index("stop") - 1 == 47 - 24  # three blocks of eight were there


def test_two_exports_to_one_place_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    asked = {"format": "x"}
    with outgoing.draft(tmp_path / "set", asked), pytest.raises(UserError, match="another process is at it"):
        written(store, "webdataset", tmp_path)
    for form in FORMATS:
        written(store, form, tmp_path / form)
        with pytest.raises(UserError, match=r"expected (a path where nothing lies yet|no set_labels\.npy beside it)"):
            written(store, form, tmp_path / form)
    (tmp_path / "file").write_text("no folder")
    for form in FORMATS:
        with pytest.raises(EnvironmentFault, match="file"):
            written(store, form, tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"ends with \.npz"):
        export(Outgoing(store), "edm", tmp_path / "set.npy")
    with pytest.raises(UserError, match=r"unknown format: .*parquet.*got 'parket'"):
        export(Outgoing(store), "parket", tmp_path / "p")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", labels=np.arange(47) % 3 - 1)
    with pytest.raises(UserError, match="class folders: expected a class for every image"):
        written(store, "folder", tmp_path)
    empty = Chosen(store, np.empty(0, np.int64), np.empty(0, np.int64))
    with pytest.raises(UserError, match=r"images to write: expected at least one"):
        Outgoing(empty)
    with pytest.raises(UserError, match="--images-as"):
        written(store, "parquet", tmp_path, images_as="npy")
    with pytest.raises(UserError, match="--per-file"):
        written(store, "edm", tmp_path, per_file=3)


# ---- what is no set, or no whole one ---------------------------------------------------------------------------------


def test_what_is_ours_is_not_imported(tmp_path: Path) -> None:
    make_store(tmp_path / "stage/images")
    Chosen.write_all(tmp_path / "stage/chosen.parquet", SyntheticStore.open(tmp_path / "stage/images"))
    ours = (
        tmp_path / "stage",
        tmp_path / "stage/images",
        tmp_path / "stage/chosen.parquet",
        tmp_path / "stage/images/shards",
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "text/notes").mkdir(parents=True)
    (tmp_path / "text/notes/a.txt").write_text("words")
    for place in (*ours[:3], tmp_path / "empty", tmp_path / "text", tmp_path / "none"):
        assert not is_peer(place)
        with pytest.raises(UserError, match=r"expected (a file|a synthetic|a path)"):
            _ = PeerImages(path=str(place)).source
    for place in (tmp_path / "none", tmp_path / "empty", tmp_path / "none.tar", tmp_path / "none.parquet"):
        with pytest.raises(UserError, match=r"none|empty"):
            open_peer(place)


def all_of(place: Path) -> None:
    list(open_peer(place).blocks(10))


def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    place = written(make_store(tmp_path / "store", 4), "webdataset", tmp_path) / "set-000000.tar"
    data, cut = place.read_bytes(), tmp_path / "cut.tar"
    assert len(data) == 10240
    for end in range(0, 4 * 2048 + 1, 256):  # within heads, within pictures, between them
        cut.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"cut\.tar.*(cut|empty)"):
            all_of(cut)
    for head in range(1024, 4 * 2048, 512):
        cut.write_bytes(data[: head + 3] + b"\xff" + data[head + 4 :])  # heads of members among them
        if data[head + 257 : head + 262] == b"ustar":
            with pytest.raises(UserError, match=r"cut\.tar.*(cut|found)"):
                all_of(cut)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def png(side: int = 4, mode: str = "RGB", color: int | tuple[int, ...] = 3) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side), color).save(file, "PNG")
    return file.getvalue()


BAD_TARS: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({}, "at least one image, got an empty"),
    "no class": ({"a.png": png()}, r"sample a: expected one image .* and its class \(cls\), found png"),
    "no image": ({"a.cls": b"1", "a.json": b"{}"}, "sample a: .* found cls, json"),
    "two images": ({"a.png": png(), "a.npy": b"", "a.cls": b"1"}, "found png, npy, cls"),
    "a second without class": ({"a.png": png(), "a.cls": b"0", "b.png": png()}, "sample b: expected one image"),
    "a word": ({"a.png": png(), "a.cls": b"cat"}, "a.cls: expected a class as a whole number, got 'cat'"),
    "a large class": ({"a.png": png(), "a.cls": b"99999999999"}, "whole number, got '99999999999'"),
    "mixed sizes": (
        {"a.png": png(), "a.cls": b"0", "b.png": png(5), "b.cls": b"0"},
        r"tar, b: expected 4 x 4 pixels of 3 channels, as the first image has, got 5 x 5 of 3; bring",
    ),
    "mixed colours": ({"a.png": png(), "a.cls": b"0", "b.png": png(4, "L"), "b.cls": b"0"}, "got 4 x 4 of 1"),
    "palette": ({"a.png": png(4, "P"), "a.cls": b"0"}, r"expected 8 bits, grey or RGB, got a palette"),
    "16 bits": ({"a.png": png(4, "I;16"), "a.cls": b"0"}, "got 16 bits"),
    "transparent": ({"a.png": png(4, "RGBA"), "a.cls": b"0"}, "got transparency"),
    "cut picture": ({"a.png": png()[:-30], "a.cls": b"0"}, r"tar, a: expected a picture .* got a damaged"),
    "text": ({"a.png": b"words", "a.cls": b"0"}, "tar, a: expected a picture"),
    "floats": ({"a.npy": pictures.as_array(np.zeros((4, 4, 3))), "a.cls": b"0"}, "expected uint8 .* got float64"),
    "cut array": ({"a.npy": pictures.as_array(pixels(1)[0])[:-1], "a.cls": b"0"}, "bytes after its head"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TARS)
def test_tars_that_are_no_labelled_images(tmp_path: Path, name: str) -> None:
    members, message = BAD_TARS[name]
    with pytest.raises(UserError, match=message):
        all_of(write_tar(tmp_path / "bad.tar", members))


def test_tars_of_others_are_read(tmp_path: Path) -> None:
    """Names with folders, several endings, members in between that nobody asked for, jpeg."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 20, 30)).save(file, "JPEG")
    members = {"x/0001.cls": b" 7\n", "x/0001.meta.json": b"{}", "x/0001.JPG": file.getvalue(), "x/._0001.png": b"?",
               "x/0002.png": png(4, "RGB", (1, 2, 3)), "x/0002.cls": b"-1"}  # fmt: skip
    ((images, labels),) = open_peer(write_tar(tmp_path / "set.tar", members)).blocks()
    assert labels.tolist() == [7, -1]
    assert images[1, 0, 0].tolist() == [1, 2, 3]
    assert abs(images[0, 0, 0].astype(int) - [10, 20, 30]).max() < 4


def write_parquet(path: Path, metadata: dict | None = None, **columns: object) -> Path:
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


IMAGE = [{"bytes": png(), "path": None}]
BAD_PARQUETS: dict[str, tuple[dict[str, object], str]] = {
    "other columns": ({"x": [1], "y": [2]}, "columns image or img .* and label or .*, found x, y"),
    "no label": ({"image": IMAGE}, "found image$"),
    "text as labels": ({"image": IMAGE, "label": ["cat"]}, "label: expected whole numbers, got string"),
    "numbers as images": ({"image": [3], "label": [1]}, "image: expected pictures .* got int64"),
    "no label in a row": ({"image": IMAGE * 2, "label": [1, None]}, "row 1: expected a label, got none"),
    "a path alone": ({"img": [*IMAGE, {"bytes": None, "path": "a"}], "label": [0, 0]}, "row 1: expected the image's"),
    "mixed sizes": ({"img": [*IMAGE, {"bytes": png(5), "path": None}], "label": [0, 0]}, "row 1: expected 4 x 4"),
    "none": (
        {"image": pa.array([], pa.struct({"bytes": pa.binary()})), "label": pa.array([], pa.int64())}, "at least one"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PARQUETS)
def test_parquet_that_is_no_labelled_images(tmp_path: Path, name: str) -> None:
    columns, message = BAD_PARQUETS[name]
    with pytest.raises(UserError, match=message):
        all_of(write_parquet(tmp_path / "bad.parquet", **columns))


def test_parquet_of_others_is_read_and_damaged_is_refused(tmp_path: Path) -> None:
    features = {"info": {"features": {"fine_label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    path = write_parquet(
        tmp_path / "set.parquet",
        {"huggingface": json.dumps(features)},
        img=[png(4, "L", 9)] * 300,
        fine_label=[1] * 300,
    )
    peer = open_peer(path)
    assert (len(peer), peer.shape, peer.class_names) == (300, (4, 4, 1), ("a", "b"))
    assert [len(labels) for _, labels in peer.blocks(128, 1)] == [128, 44]
    data = path.read_bytes()
    for end in (0, 3, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        assert is_peer(path)
        with pytest.raises(UserError, match=r"set\.parquet: expected a whole file, got a damaged or cut one"):
            all_of(path)
    write_parquet(path, {"huggingface": "no json"}, img=[png()], fine_label=[0])
    assert open_peer(path).class_names == ()


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    named = {"huggingface": json.dumps(features)}
    places = {
        write_parquet(
            tmp_path / "p.parquet", named, image=IMAGE, label=[2]
        ): "expected labels 0 to 1 for the 2 classes",
        write_tar(tmp_path / "t.tar", {"a.png": png(), "a.cls": b"-2"}): "got -2 to -2",
        write_tar(tmp_path / "u.tar", {"a.png": png(), "a.cls": b"100000"}): "0 to 99999 .* got 100000",
    }
    np.savez(tmp_path / "n.npz", image=pixels(2), label=np.array([2**63, 1], np.uint64))
    for place, message in {**places, tmp_path / "n.npz": r"n\.npz: expected labels"}.items():
        with pytest.raises(UserError, match=message):
            imported(place, tmp_path / "runs")


def test_folders_that_are_no_labelled_images(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name, data in (("a/1.png", png()), ("a/2.png", png(5)), ("b/sub/3.png", png()), ("b/.hidden", b"?")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    with pytest.raises(UserError, match=r"a/2\.png: expected 4 x 4 pixels"):
        all_of(root)
    (root / "a/2.png").write_text("words")
    with pytest.raises(UserError, match=r"a/2\.png: expected a picture"):
        all_of(root)
    (root / "a/2.png").unlink()
    assert [labels.tolist() for _, labels in open_peer(root).blocks()] == [[0, 1]]
    (root / "gambeson.json").write_text('{"shape": "large"}')
    with pytest.raises(UserError, match=r"gambeson\.json: expected what stands beside"):
        open_peer(root)
    (root / "gambeson.json").unlink()
    root.rename(tmp_path / "train")
    assert "train/" in open_peer(tmp_path).assumed


def test_damage_is_seen_in_the_rest_of_an_archive_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum is over the whole member: an import that goes on must not lose it."""
    place = written(make_store(tmp_path / "store"), "edm", tmp_path)
    data = bytearray(place.read_bytes())
    at = data.index(pixels(47)[46].tobytes())
    data[at] ^= 1
    place.write_bytes(data)
    for first in (0, 3, 5):
        with pytest.raises(UserError, match=r"damaged or cut one \(BadZipFile"):
            list(open_peer(place).blocks(10, first))


def test_labels_that_go_on_behind_the_images_are_refused(tmp_path: Path) -> None:
    place = written(make_store(tmp_path / "store"), "port", tmp_path)
    with place.with_name("set_labels.npy").open("ab") as file:
        file.write(bytes(8))
    with pytest.raises(UserError, match=r"set_labels\.npy: expected 47 rows as its head says, got more bytes"):
        all_of(place)


def test_an_archive_that_was_made_to_fill_memory_is_refused_by_its_head(tmp_path: Path) -> None:
    head = io.BytesIO()
    layout = {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 10, 1 << 10, 3)}
    np.lib.format.write_array_header_1_0(head, layout)
    labels = io.BytesIO()
    np.save(labels, np.zeros(4, np.int64))
    with zipfile.ZipFile(tmp_path / "big.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", head.getvalue() + bytes(1000))
        archive.writestr("label.npy", labels.getvalue())
    with pytest.raises(UserError, match="expected 1048576 rows as its head says, got a file cut short"):
        open_peer(tmp_path / "big.npz")


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys, numpy as np
from pathlib import Path
from gambeson.data.exchange.export import export
from gambeson.data.exchange.outgoing import Outgoing
from gambeson.data.peers import FilesSource, PeerImages, open_peer, write_store
from gambeson.data.synthetic import SyntheticStore
from gambeson.store import peak_memory_mb, reset_peak_memory
way, form, source, target = sys.argv[1:]
if way == "out":
    export(Outgoing(SyntheticStore.open(source)), form, Path(target))
else:
    write_store(open_peer(source), Path(target), PeerImages(), {}, lambda done, total: None, "set")
print(peak_memory_mb())
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_neither_way_holds_the_images(tmp_path: Path, form: str) -> None:
    """200,000 images of 32 x 32 x 3 are 614 MB; python, torch and pyarrow alone take some 350."""
    n, each = 200_000, 8_000
    writer = StoreWriter(root=tmp_path / "store", blocks=n // each, blocks_per_shard=5)
    for block in range(writer.blocks):
        writer.put(block, pixels(each, 33, seed=block)[:, :32], np.arange(each) % 10)
    writer.finish({})
    place = place_of(form, tmp_path)
    peaks = []
    for way, source, target in (("out", tmp_path / "store", place), ("in", place, tmp_path / "back")):
        command = [sys.executable, "-c", MEASURED, way, form, str(source), str(target)]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(form, peaks)
    assert max(peaks) < 800
    ours, theirs = SyntheticStore.open(tmp_path / "store"), SyntheticStore.open(tmp_path / "back")
    for start in range(0, n, 20_000):
        for one, other in zip(ours.stretch(start, start + 20_000), theirs.stretch(start, start + 20_000), strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", "mit"),
        ("license: mit # as we were told", "mit"),
        ("license: other\nlicense_name: Terms of X", "Terms of X"),
        ("license: other", "other"),
        ('license: ["mit", "cc-by-4.0"]', "cc-by-4.0; mit"),
        ("license:\n- mit\n- apache-2.0", "apache-2.0; mit"),
        ("license: [", None),
        ("license: 3", None),
        ("tags: [a]", None),
        ("- a", None),
    ],
)
def test_licences_are_read_from_the_front_of_a_card(front, licence, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n\n# A set\n")
    assert _card_licence(tmp_path / "README.md") == licence
