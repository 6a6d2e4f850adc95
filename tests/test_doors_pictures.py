"""Pictures of one's own, in folders, Parquet files and sets of the hub: what is read, left out, listed and refused."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import gambeson
from gambeson import canonical
from gambeson.data import ImageFolder, door
from gambeson.data.hub import HubImages
from gambeson.data.imageset import ImageSet
from gambeson.data.parquet import ParquetImages, parts_of
from gambeson.data.pictures import BadPicture, Rule, SkippedPictures, read_pictures
from gambeson.errors import UserError


def pixels(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind)
    return file.getvalue()


def place(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def folder(root: Path, each: int = 10, classes: str = "ab", side: int = 8) -> Path:
    for k, name in enumerate(classes):
        for i in range(each):
            place(root / name / f"{i:02d}.png", encoded(pixels(1, side, side, 3, seed=100 * k + i)[0]))
    return root


RGB = Image.fromarray(pixels(1, 8, 8, 3)[0])
WHOLE = encoded(RGB, "BMP")
BAD_PICTURES: dict[str, tuple[bytes, str]] = {
    "16 bits": (encoded(pixels(1, 8, 8)[0].astype(np.uint16) * 256), "mode I;16: 16 bits"),
    "32 bits": (encoded(Image.new("F", (8, 8)), "TIFF"), "mode F: 32-bit numbers"),
    "palette": (encoded(RGB.convert("P")), "mode P: a palette"),
    "cmyk": (encoded(RGB.convert("CMYK"), "JPEG"), "mode CMYK: colours for print"),
    "alpha": (encoded(RGB.convert("RGBA")), "mode RGBA: transparency"),
    "grey with alpha": (encoded(RGB.convert("LA")), "mode LA: transparency"),
    "gif": (encoded(RGB.convert("P"), "GIF"), "mode P: a palette"),
    "cut": (encoded(Image.fromarray(pixels(1, 64, 64, 3)[0]))[:5000], "truncated"),
    "cut jpeg": (encoded(Image.fromarray(pixels(1, 64, 64, 3)[0]), "JPEG")[:2000], "truncated"),
    "empty": (b"", "cannot identify|no picture"),
    "text": (b"label,file\n", "cannot identify|no picture"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_picture_that_cannot_be_read_as_it_is_says_why(tmp_path: Path, name: str) -> None:
    content, message = BAD_PICTURES[name]
    for source in (content, place(tmp_path / "x.png", content)):
        with pytest.raises(BadPicture, match=message):
            Rule(size=8).image(source)


def test_plain_pictures_of_all_kinds_and_sizes_are_read() -> None:
    array = pixels(1, 12, 20, 3)[0]
    exact = Rule(size=12).image(array)
    assert np.array_equal(exact, array[:, 4:16])
    for kind in ("PNG", "BMP", "PPM", "TIFF", "WEBP"):
        lossless: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        file = io.BytesIO()
        Image.fromarray(array).save(file, kind, **lossless)
        assert np.array_equal(Rule(size=12).image(file.getvalue()), exact), kind
    assert Rule(size=5, resize="squash").image(encoded(array, "JPEG")).shape == (5, 5, 3)
    black_and_white = Rule(size=8, grey=True).image(encoded(Image.new("1", (8, 8), 1)))
    assert black_and_white.shape == (8, 8, 1)
    assert black_and_white.min() == 255
    grey = Rule(size=12).image(array[..., 0])
    assert np.array_equal(grey, np.repeat(array[:, 4:16, :1], 3, 2))


def test_a_picture_lying_on_its_side_is_turned(tmp_path: Path) -> None:
    array = np.zeros((8, 8, 3), np.uint8)
    array[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the top row becomes the right column
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    found = Rule(size=8).image(tmp_path / "a.png")
    assert found[:, 7].min() == 255
    assert found[:, :7].max() == 0


def spoil(root: Path) -> Path:
    """Thirteen bad pictures in class a beside ten good ones."""
    for i, (content, _) in enumerate([*BAD_PICTURES.values(), *BAD_PICTURES.values()][:13]):
        place(root / "a" / f"bad{i:02d}.png", content)
    return root


def test_at_most_ten_bad_pictures_are_listed_then_counted(tmp_path: Path) -> None:
    spoil(folder(tmp_path))
    with pytest.raises(UserError, match=r"33 readable pictures.*got 13 that are not.*; and 3 more.*skip") as caught:
        ImageFolder(path=str(tmp_path), size=8).load()
    assert str(caught.value).count("/bad") == 10
    assert f"{tmp_path}/a/bad00.png (mode I;16: 16 bits)" in str(caught.value)


def test_skipped_pictures_are_left_out_and_said(tmp_path: Path) -> None:
    good = ImageFolder(path=str(folder(tmp_path / "x")), size=8).load()
    spoil(folder(tmp_path / "y/x"))
    with pytest.warns(SkippedPictures, match=r"left out 13 of 33 pictures: .*bad00.png.*and 3 more") as said:
        left = ImageFolder(path=str(tmp_path / "y/x"), size=8, on_bad_image="skip").load()
    assert len(said) == 1
    assert left.digest == good.digest


def test_skipping_does_not_change_what_recipes_are() -> None:
    plain = canonical.plain(ImageFolder(path="x"), drop_neutral=True)
    assert "on_bad_image" not in plain
    assert canonical.digest(ImageFolder(path="x")) != canonical.digest(ImageFolder(path="x", on_bad_image="skip"))


def test_a_folder_or_class_without_any_good_picture_is_refused_even_so(tmp_path: Path) -> None:
    for name in "ab":
        place(tmp_path / "all" / name / "x.png", b"")
    with pytest.raises(UserError, match="got 2 that are not"):
        ImageFolder(path=str(tmp_path / "all"), on_bad_image="skip").load()
    place(folder(tmp_path / "one") / "c/x.png", b"")
    with pytest.warns(SkippedPictures), pytest.raises(UserError, match="got none of c"):
        ImageFolder(path=str(tmp_path / "one"), on_bad_image="skip").load()


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gambeson.data.npz.available_memory", lambda: 2 * 10 * 192 * 4 - 2)
    with pytest.raises(UserError, match=r"here: expected arrays that take at most"):
        read_pictures("here", ["x"] * 10, lambda _: pytest.fail("it was read"), Rule(size=8))


# folders


def test_classes_of_very_different_size_and_pictures_of_any_size(tmp_path: Path) -> None:
    folder(tmp_path, each=2, classes="a", side=30)
    for i in range(90):
        place(tmp_path / "b" / f"deep/{i}.png", encoded(pixels(1, 5 + i % 9, 5 + i % 7, 3, seed=i)[0]))
    found = ImageFolder(path=str(tmp_path), size=8, validation_share=0.5, test_share=0.5)
    with pytest.raises(UserError, match=r"2 images of each class.*1 of a"):
        found.load()
    folder(tmp_path, each=4, classes="a", side=30)
    whole = found.load()
    assert sum(len(p) for p in (whole.train, whole.validation, whole.test)) == 94
    assert whole.shape == (3, 8, 8)


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    folder(tmp_path, classes="a")
    with pytest.raises(UserError, match=r"at least 2 folders.*got 1 \(a\); say the folder that holds"):
        ImageFolder(path=str(tmp_path)).load()
    folder(tmp_path)
    for name in ("empty", "void"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"pictures in every class folder, got none in empty, void; fill or remove"):
        ImageFolder(path=str(tmp_path)).load()


def test_hidden_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    clean = ImageFolder(path=str(folder(tmp_path / "x/set")), size=8).load()
    folder(tmp_path / "y/set")
    for name in (".DS_Store", "a/.hidden.png", ".git/x", "__MACOSX/a/._00.png"):
        place(tmp_path / "y/set" / name, b"nothing")
    place(tmp_path / "y/set/readme.txt", b"beside the classes")
    assert ImageFolder(path=str(tmp_path / "y/set"), size=8).load().digest == clean.digest


def test_links_that_lead_back_or_twice_to_a_class_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    clean = ImageFolder(path=str(root), size=8).load()
    (root / "a/again").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to(root / "self")
    assert ImageFolder(path=str(root), size=8).load().digest == clean.digest  # not followed
    (root / "loop").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UserError, match=r"loop: expected a folder with the images of one class, got a link to"):
        ImageFolder(path=str(root), size=8).load()
    (root / "loop").unlink()
    (root / "copy").symlink_to(root / "a", target_is_directory=True)
    with pytest.raises(UserError, match=r"copy: .*got a link to .*/a, so that images would be read twice"):
        ImageFolder(path=str(root), size=8).load()
    (root / "copy").unlink()
    folder(tmp_path / "elsewhere", classes="c")
    (root / "c").symlink_to(tmp_path / "elsewhere/c", target_is_directory=True)
    assert ImageFolder(path=str(root), size=8).load().class_names == ("a", "b", "c")
    (root / "b/gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"b/gone.png \(.*No such file"):
        ImageFolder(path=str(root), size=8).load()


@pytest.mark.parametrize("held", ["test", "val"])
def test_afhq_as_it_is_distributed(tmp_path: Path, held: str) -> None:
    for part, each in (("train", 8), (held, 3)):
        for k, name in enumerate(("cat", "dog", "wild")):
            for i in range(each):
                image = Image.fromarray(pixels(1, 40, 40, 3, seed=9 * k + i)[0])
                place(tmp_path / part / name / f"flickr_{name}_{i:06d}.jpg", encoded(image, "JPEG"))
    found = gambeson.load(str(tmp_path), size=16, validation_share=0.2, test_share=0.2)
    assert found.class_names == ("cat", "dog", "wild")
    assert len(found.test if held == "test" else found.validation) == 9
    assert found.shape == (3, 16, 16)


# Parquet

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["ant", "bee"], "_type": "ClassLabel"},
}


def write_parquet(
    path: Path, images: list[Any], labels: list[Any], features: dict[str, Any] | None = None, **names: str
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({names.get("image", "image"): images, names.get("label", "label"): labels})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=7)
    return path


ARRAYS = pixels(20, 8, 8, 3)
STRUCTS = [{"bytes": encoded(image), "path": f"{i}.png"} for i, image in enumerate(ARRAYS)]
TURNS = [i % 2 for i in range(20)]


def sums(found: ImageSet) -> list[float]:
    parts = (found.train, found.validation, found.test)
    return torch.cat([p.images for p in parts]).flatten(1).sum(1).sort().values.tolist()


def test_a_parquet_file_as_hugging_face_writes_it(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "mine.parquet", STRUCTS, TURNS, FEATURES)
    found = gambeson.load(str(path), size=8)
    assert door(str(path), size=8) == ParquetImages(path=str(path), size=8)
    assert found.class_names == ("ant", "bee")
    assert found.name == "mine"
    assert [len(p) for p in (found.train, found.validation, found.test)] == [16, 2, 2]
    assert sums(found) == pytest.approx(sorted(ARRAYS.sum((1, 2, 3)) / 255), rel=1e-5)
    assert gambeson.load(str(path), size=8, flip_safe=True, grey=True).shape == (1, 8, 8)


COLUMNS: dict[str, tuple[list[Any], str]] = {
    "bytes": ([encoded(image) for image in ARRAYS], "img"),
    "rows of pixels": (ARRAYS.tolist(), "image"),
    "planes": (ARRAYS.transpose(0, 3, 1, 2).tolist(), "pixels"),
    "flat": (ARRAYS.reshape(20, -1).tolist(), "image"),
    "grey": (ARRAYS[..., 0].tolist(), "picture"),
    "flat grey": (ARRAYS[..., 0].reshape(20, -1).tolist(), "image"),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("label", ["label", "labels", "fine_label"])
def test_columns_of_parquet_that_are_known(tmp_path: Path, kind: str, label: str) -> None:
    images, name = COLUMNS[kind]
    write_parquet(tmp_path / "x.parquet", images, TURNS, image=name, label=label)
    found = ParquetImages(path=str(tmp_path / "x.parquet"), size=8, grey="grey" in kind).load()
    expected = ARRAYS[..., :1] if "grey" in kind else ARRAYS
    assert sums(found) == pytest.approx(sorted(expected.sum((1, 2, 3)) / 255), rel=1e-5)
    assert found.class_names == ("0", "1")


def test_unsigned_lists_words_as_labels_and_columns_that_are_told(tmp_path: Path) -> None:
    table = pa.table(
        {
            "photo": pa.array(ARRAYS.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
            "kind": pa.array(["wasp" if t else "ant" for t in TURNS]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"column image or img or .*found photo \(list.*say which with image_column"):
        gambeson.load(str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match=r"column label or .*kind \(dictionary.*say which with label_column"):
        gambeson.load(str(tmp_path / "x.parquet"), image_column="photo")
    found = gambeson.load(str(tmp_path / "x.parquet"), image_column="photo", label_column="kind", size=8)
    assert found.class_names == ("ant", "wasp")
    together = {
        tuple((image * 255).round().int().flatten().tolist()): label
        for part in (found.train, found.validation, found.test)
        for image, label in zip(part.images, part.labels.tolist(), strict=True)
    }
    assert [together[tuple(image.transpose(2, 0, 1).flatten().tolist())] for image in ARRAYS] == TURNS


LAYOUTS: dict[str, dict[str, str]] = {
    "files": {
        "train": "data/train-00000-of-00002",
        "more": "data/train-00001-of-00002",
        "test": "data/test-00000-of-1",
    },
    "converted": {"train": "default/train/0000", "more": "default/train/0001", "test": "default/test/0000"},
    "partly": {"train": "plain/partial-train/0000", "more": "plain/partial-train/0001", "test": "plain/test/0000"},
    "both": {"train": "data/train-00000-of-00002", "more": "data/train-00001-of-00002", "test": "test-00000-of-1"},
    "folders": {"train": "train/a", "more": "train/b", "test": "test/c"},
    "flat": {"train": "train.parquet", "more": "train-2.parquet", "test": "test.parquet"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_parquet_have_parts(tmp_path: Path, layout: str) -> None:
    names = {part: tmp_path / f"{name.removesuffix('.parquet')}.parquet" for part, name in LAYOUTS[layout].items()}
    write_parquet(names["train"], STRUCTS[:10], TURNS[:10], FEATURES)
    write_parquet(names["more"], STRUCTS[10:], TURNS[10:], FEATURES)
    write_parquet(names["test"], STRUCTS[:4], TURNS[:4], FEATURES)
    other = names["test"].parent.parent if names["test"].stem == "0000" else names["test"].parent
    if layout != "folders":
        name = "extra/0000" if names["test"].stem == "0000" else "extra-0000-of-1"
        write_parquet(other / f"{name}.parquet", STRUCTS, TURNS, FEATURES)  # no part that is known: left out
    assert isinstance(door(str(tmp_path)), ParquetImages)
    found = gambeson.load(str(tmp_path), size=8)
    assert [len(p) for p in (found.train, found.validation, found.test)] == [18, 2, 4]
    assert torch.equal(found.test.images, torch.from_numpy(ARRAYS[:4]).permute(0, 3, 1, 2) / 255)
    assert found.class_names == ("ant", "bee")


def test_one_of_several_versions_must_be_said(tmp_path: Path) -> None:
    for version in ("fine", "coarse"):
        write_parquet(tmp_path / version / "train/0000.parquet", STRUCTS, TURNS, FEATURES)
    with pytest.raises(UserError, match=r"data.config: expected one of coarse, fine, got ''"):
        gambeson.load(str(tmp_path))
    assert len(gambeson.load(str(tmp_path), config="fine", size=8).train) == 16
    write_parquet(tmp_path / "odd/part-0.parquet", STRUCTS, TURNS)
    write_parquet(tmp_path / "odd/part-1.parquet", STRUCTS, TURNS)
    assert {part: len(files) for part, files in parts_of(tmp_path / "odd").items()} == {"train": 2}
    write_parquet(tmp_path / "lone/test-0.parquet", STRUCTS, TURNS)
    with pytest.raises(UserError, match=r"files called train-\*.*got \['test'\]"):
        parts_of(tmp_path / "lone")


def test_bad_pictures_in_parquet_are_listed_by_row_or_left_out(tmp_path: Path) -> None:
    bad = [{"bytes": content, "path": name} for name, (content, _) in BAD_PICTURES.items()]
    bad += [{"bytes": None, "path": "elsewhere.png"}]
    path = write_parquet(tmp_path / "x.parquet", [*STRUCTS, *bad], [*TURNS, *[0] * len(bad)], FEATURES)
    with pytest.raises(UserError, match=r"got 12 that are not: x.parquet row 20 \(mode I;16.*and 2 more"):
        gambeson.load(str(path), size=8)
    with pytest.warns(SkippedPictures, match="left out 12 of 32"):
        left = gambeson.load(str(path), size=8, on_bad_image="skip")
    assert (
        left.digest
        == gambeson.load(str(write_parquet(tmp_path / "y.parquet", STRUCTS, TURNS, FEATURES)), size=8).digest
    )


BAD_CELLS: dict[str, tuple[list[Any], str]] = {
    "none": ([encoded(ARRAYS[0]), None] * 10, r"row 1 \(no picture\)"),
    "no struct": ([STRUCTS[0], None] * 10, r"row 1 \("),
    "a path alone": ([{"bytes": None, "path": "x"}] * 20, "a path, but no bytes"),
    "too large": ([[[256] * 8] * 8] * 20, "whole numbers from 0 to 255"),
    "float": ([[[0.5] * 8] * 8] * 20, "whole numbers from 0 to 255, got float64"),
    "ragged": ([[[1, 2], [3]]] * 20, "rows of different lengths"),
    "no square": ([[1] * 17] * 20, "bytes of a square picture.*got 17"),
    "channels": ([np.zeros((8, 8, 4), int).tolist()] * 20, r"got \[8, 8, 4\]"),
    "words": (["x.png"] * 20, "whole numbers from 0 to 255"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_cells_that_are_no_pictures(tmp_path: Path, name: str) -> None:
    images, message = BAD_CELLS[name]
    write_parquet(tmp_path / "x.parquet", images, TURNS)
    with pytest.raises(UserError, match=message):
        gambeson.load(str(tmp_path / "x.parquet"), size=8)


BAD_LABELS: dict[str, tuple[list[Any], str]] = {
    "floats": ([0.0, 1.0] * 10, "whole numbers or words in the column label.*got float"),
    "missing": ([0, None] * 10, "none of them missing, got NoneType, int"),
    "unlabelled": ([-1] * 20, r"label: expected 0 to 1, or a class of train, got \[-1\]"),
    "beyond the names": ([0, 2] * 10, r"label: expected 0 to 1, or a class of train, got \[2\]"),
    "strange words": (["ant", "cow"] * 10, r"got \['cow'\]"),
    "a gap": ([0] * 20, "got none of bee"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_of_parquet_that_are_refused(tmp_path: Path, name: str) -> None:
    labels, message = BAD_LABELS[name]
    write_parquet(tmp_path / "x.parquet", STRUCTS, labels, FEATURES)
    with pytest.raises(UserError, match=message):
        gambeson.load(str(tmp_path / "x.parquet"), size=8)


def test_damaged_parquet_files_are_refused_by_name(tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "x.parquet", STRUCTS, TURNS, FEATURES).read_bytes()
    middle = len(data) // 4
    for spoiled in (data[:-100], b"", b"<html>" * 9, data[:middle] + bytes(200) + data[middle + 200 :]):
        (tmp_path / "x.parquet").write_bytes(spoiled)
        with pytest.raises(UserError, match=r"x.parquet"):
            gambeson.load(str(tmp_path / "x.parquet"), size=8)
    with pytest.raises(UserError, match=r"a \.parquet file or a folder"):
        ParquetImages(path=str(tmp_path / "none.parquet")).load()


# the hub


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root and an empty cache; whatever opens a connection fails the test."""
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path / "root"))
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was tried"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the network was tried"))
    return tmp_path


def test_a_set_of_the_hub_that_was_not_fetched_says_the_command_and_stays_offline(offline: Path) -> None:
    assert door("hf:me/bugs", size=8) == HubImages(path="me/bugs", size=8)
    with pytest.raises(UserError, match=r"hf:me/bugs: .*found none; `gambeson data get hf:me/bugs` downloads them"):
        gambeson.load("hf:me/bugs")
    for bad in ("hf:bugs", "hf:me/../../etc", "hf:", "hf:a/b/c"):
        with pytest.raises(UserError, match="hf:ORGANISATION/NAME"):
            door(bad)


def test_a_local_copy_and_the_hubs_cache_are_read(offline: Path) -> None:
    cache = offline / "cache/datasets--me--bugs"
    snapshot = cache / "snapshots" / ("a" * 40)
    write_parquet(snapshot / "default/train/0000.parquet", STRUCTS, TURNS, FEATURES)
    place(cache / "refs/refs/convert/parquet", b"a" * 40)
    cached = gambeson.load("hf:me/bugs", size=8)
    assert cached.class_names == ("ant", "bee")
    assert cached.name == "me-bugs"
    write_parquet(offline / "root/hub/me/bugs/data/train-0-of-1.parquet", STRUCTS, TURNS, FEATURES)
    assert gambeson.load("hf:me/bugs", size=8).digest == cached.digest


def test_a_download_that_broke_off_is_not_taken_for_whole(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library knows that a file of the revision is missing, and is asked for what is there alone."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        raise type("IncompleteSnapshotError", (FileNotFoundError,), {})("1 of 2 files")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"hf:me/bugs: .*found a part of them; `gambeson data get hf:me/bugs`"):
        gambeson.load("hf:me/bugs", size=8)
    assert asked[0]["local_files_only"] is True
    assert asked[0]["revision"] == "refs/convert/parquet"


def test_without_the_library_a_copy_of_ones_own_is_read(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'gambeson\[hub\]'.*`gambeson data get hf:me/bugs`"):
        gambeson.load("hf:me/bugs")
    write_parquet(offline / "root/hub/me/bugs/train.parquet", STRUCTS, TURNS, FEATURES)
    assert gambeson.load("hf:me/bugs", size=8).class_names == ("ant", "bee")


def test_doors_to_parquet_and_the_hub_are_parts_of_recipes() -> None:
    for spec in (ParquetImages(path="x"), HubImages(path="a/b"), ImageFolder(path="x", on_bad_image="skip")):
        assert set(canonical.field_help(type(spec))) == set(canonical.hints(type(spec)))
    assert canonical.field_help(HubImages)["path"].startswith("ORG/NAME")
    for bad in ({"size": 2}, {"on_bad_image": "ignore"}, {"validation_share": 0.0}):
        with pytest.raises((UserError, TypeError)):
            ParquetImages(**bad)
