"""The doors images come through, and sets that others published: what is read, split and refused, in what memory."""

import io
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gambeson
from gambeson import canonical
from gambeson.data import Cifar10, Digits, ImageFolder, NpzImages, door
from gambeson.data.cifar import read_batch
from gambeson.data.folder import resized
from gambeson.data.imageset import balanced_part, held_out
from gambeson.data.peers import FilesSource, PeerImages, import_images, is_peer, open_peer
from gambeson.data.synthetic import StoreWriter, open_synthetic
from gambeson.errors import UserError
from gambeson.store import Store


def pixels(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def turns(n: int, classes: int = 10) -> np.ndarray:
    return np.arange(n) % classes


# splits


def test_what_is_held_out_is_stratified_and_disjoint() -> None:
    labels = np.array([0] * 10 + [1] * 6 + [2] * 4)
    held, rest = held_out(labels, np.arange(20), 5, 0, ("a", "b", "c"), "data.validation")
    assert np.bincount(labels[held]).tolist() == [3, 1, 1]  # 2.5, 1.5, 1: the largest remainder, then the first
    assert sorted([*held, *rest]) == list(range(20))
    for seed in (0, 1):
        again, _ = held_out(labels, np.arange(20), 5, seed, ("a", "b", "c"), "data.validation")
        assert (again.tolist() == held.tolist()) == (seed == 0)


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        ((10, 10, 2), 2, "0 of c of 2; hold out more"),
        ((10, 10, 1), 5, "at least 2 images of each class.*1 of c"),
        ((2, 2, 2), 6, "1 to 5 of 6 images"),
        ((2, 2, 20), 21, "2 of a, 2 of b of 2, 2; hold out fewer"),
    ],
)
def test_a_class_that_would_be_empty_in_a_part_is_refused(sizes: tuple[int, ...], count: int, message: str) -> None:
    labels = np.repeat(np.arange(3), sizes)
    with pytest.raises(UserError, match=f"data.validation: .*{message}"):
        held_out(labels, np.arange(len(labels)), count, 0, "abc", "data.validation")


def test_a_smaller_balanced_part_lies_in_a_larger_one() -> None:
    labels = turns(40, 4)
    small, large = (balanced_part(labels, np.arange(40), n, 0, "abcd", "data.train") for n in (8, 20))
    assert set(small) < set(large)
    assert np.bincount(labels[small]).tolist() == [2] * 4
    for count in (9, 44):
        with pytest.raises(UserError, match="multiple of 4 from 4 to 40"):
            balanced_part(labels, np.arange(40), count, 0, "abcd", "data.train")


# CIFAR-10


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with a CIFAR-10 of 200 and 50 images."""
    for name, n in (("train", 200), ("test", 50)):
        np.savez_compressed(
            tmp_path / f"cifar10_{name}.npz", images=pixels(n, 32, 32, 3, seed=n), labels=turns(n), class_names=["x"]
        )
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path))
    return tmp_path


def test_cifar_from_packed_files(packed: Path) -> None:
    cifar = Cifar10(validation_images=20).load()
    assert [len(p) for p in (cifar.train, cifar.validation, cifar.test)] == [180, 20, 50]
    assert cifar.validation.labels.bincount().tolist() == [2] * 10
    assert cifar.shape == (3, 32, 32)
    assert cifar.flip_safe
    assert cifar.class_names[3] == "cat"
    expected = torch.from_numpy(pixels(50, 32, 32, 3, seed=50)).permute(0, 3, 1, 2) / 255
    assert torch.equal(cifar.test.images, expected)
    everything = torch.cat([cifar.train.images, cifar.validation.images]).flatten(1).sum(1)
    assert len(everything.unique()) == 200


def test_cifar_at_16_pixels_is_averaged(packed: Path) -> None:
    small = Cifar10(side=16, validation_images=20, train_images=50).load()
    assert small.train.labels.bincount().tolist() == [5] * 10
    source = pixels(50, 32, 32, 3, seed=50)[7, 2:4, 4:6, 1]
    assert small.test.images[7, 1, 1, 2].item() == pytest.approx(source.mean() / 255, abs=1e-6)
    held = [Cifar10(side=16, validation_images=20, train_images=n).load().validation for n in (50, 100)]
    assert torch.equal(held[0].images, held[1].images)  # whatever is trained on
    assert small.name == "cifar10-16"


def test_the_same_fields_give_the_same_split_in_any_process(packed: Path) -> None:
    code = "import gambeson; print(gambeson.load('cifar10', validation_images=20, split_seed=3).digest)"
    environment = {**os.environ, "GAMBESON_DATA": str(packed), "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = gambeson.load("cifar10", validation_images=20, split_seed=3)
    assert found.stdout.strip() == here.digest
    assert here.digest != gambeson.load("cifar10", validation_images=20, split_seed=4).digest


def archive(root: Path, pixels_of: dict[str, np.ndarray], protocol: int) -> None:
    """CIFAR's python archive as its authors lay it out: planes of red, green and blue, keys of bytes."""
    (root / "cifar-10-batches-py").mkdir()
    for name, images in pixels_of.items():
        flat = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
        content = {b"batch_label": b"x", b"labels": turns(len(images)).tolist(), b"data": flat, b"filenames": [b"a"]}
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_from_the_python_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path))
    every = pixels(50, 32, 32, 3, seed=1)
    parts = {f"data_batch_{i + 1}": every[10 * i : 10 * i + 10] for i in range(5)}
    archive(tmp_path, {**parts, "test_batch": every[:10]}, protocol)
    cifar = Cifar10(validation_images=10).load()
    assert torch.equal(cifar.test.images, torch.from_numpy(every[:10]).permute(0, 3, 1, 2) / 255)
    assert len(cifar.train) == 40
    assert cifar.test.labels.tolist() == list(range(10))


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/gambeson_was_here",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Evil(), b"labels": []}), "posix.system; a pickle that asks for it could run anything"),
        (pickle.dumps({b"data": np.zeros((2, 3)), b"labels": [0, 1]}, protocol=2), "expected a 2-D array of bytes"),
        (pickle.dumps({b"labels": [0, 1]}), "damaged or another"),
        (pickle.dumps({b"data": 1, b"labels": [0]}), "damaged or another"),
        (b"\x80\x02}q\x00", "damaged or another"),
        (b"", "damaged or another"),
    ],
)
def test_pickles_that_are_no_archive_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_batch(tmp_path / "batch", b"labels")
    assert not Path("/tmp/gambeson_was_here").exists()


def test_cifar_that_is_not_there_or_is_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"cifar10_train\.npz or the folder cifar-10-batches-py.*GAMBESON_DATA"):
        Cifar10().load()
    np.savez(tmp_path / "cifar10_train.npz", images=pixels(20, 28, 28, 3), labels=turns(20))
    with pytest.raises(UserError, match=r"expected uint8 \[N, 32, 32, 3\].*\[20, 28, 28, 3\]"):
        Cifar10().load()
    np.savez(tmp_path / "cifar10_train.npz", images=pixels(20, 32, 32, 3), labels=turns(20, 11))
    with pytest.raises(UserError, match="0 to 9"):
        Cifar10().load()


@pytest.mark.parametrize("bad", [{"side": 24}, {"train_images": 15}, {"train_images": -10}, {"validation_images": 5}])
def test_impossible_cifars_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected"):
        Cifar10(**bad)


# numpy's archives


def test_an_npz_of_bytes(tmp_path: Path) -> None:
    images = pixels(60, 8, 6, 3)
    np.savez(tmp_path / "mine.npz", images=images, labels=turns(60, 3), class_names=["ant", "bee", "cow"])
    found = gambeson.load(str(tmp_path / "mine.npz"))
    assert [len(p) for p in (found.train, found.validation, found.test)] == [49, 5, 6]
    assert found.class_names == ("ant", "bee", "cow")
    assert found.shape == (3, 8, 6)
    assert not found.flip_safe
    assert found.name == "mine"
    assert gambeson.load(str(tmp_path / "mine.npz"), flip_safe=True).flip_safe
    together = torch.cat([p.images for p in (found.train, found.validation, found.test)]).flatten(1).sum(1)
    assert together.sort().values.tolist() == pytest.approx(np.sort(images.sum((1, 2, 3)) / 255), rel=1e-4)


@pytest.mark.parametrize(
    "keys", [("image", "label"), ("arr_0", "arr_1"), ("x_train", "y_train"), ("train_images", "train_labels")]
)
def test_npz_layouts_that_are_known(tmp_path: Path, keys: tuple[str, str]) -> None:
    as_float = pixels(40, 3, 5, 5).astype(np.float32) / 255
    grey = pixels(40, 5, 5)
    for n, images in enumerate((as_float, as_float.astype(np.float64), grey, grey[..., None])):
        np.savez(tmp_path / f"{n}.npz", **{keys[0]: images, keys[1]: turns(40, 2)[:, None]})
        shape = NpzImages(path=str(tmp_path / f"{n}.npz")).load().shape
        assert shape == ((3, 5, 5) if n < 2 else (1, 5, 5))


def test_npz_test_parts_stay_whole(tmp_path: Path) -> None:
    test = {"x_test": pixels(7, 5, 5, seed=1), "y_test": turns(7, 2)}
    np.savez(tmp_path / "a.npz", x_train=pixels(40, 5, 5), y_train=turns(40, 2), **test)
    np.savez(tmp_path / "b.npz", images=test["x_test"], labels=test["y_test"])
    inside = NpzImages(path=str(tmp_path / "a.npz"), validation_share=0.25).load()
    beside = NpzImages(path=str(tmp_path / "a.npz"), test_path=str(tmp_path / "b.npz")).load()
    expected = torch.from_numpy(test["x_test"])[:, None] / 255
    assert torch.equal(inside.test.images, expected)
    assert torch.equal(beside.test.images, expected)
    assert len(inside.train) == 30


BAD_NPZ: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "keys": ({"pictures": pixels(4, 5, 5), "labels": turns(4)}, "images, image, arr_0.*found pictures, labels"),
    "no labels": ({"images": pixels(4, 5, 5)}, "labels: labels, label, arr_1.*found images"),
    "channels first bytes": ({"images": pixels(40, 3, 8, 8), "labels": turns(40)}, r"got uint8 \[40, 3, 8, 8\]"),
    "beyond one": ({"images": np.full((4, 1, 5, 5), 1.5), "labels": turns(4)}, r"in \[0, 1\], got 1.5 to 1.5"),
    "nan": ({"images": np.full((4, 1, 5, 5), np.nan), "labels": turns(4)}, r"in \[0, 1\], got nan"),
    "float labels": ({"images": pixels(4, 5, 5), "labels": turns(4) / 2}, "one whole number for each of 4"),
    "too few labels": ({"images": pixels(4, 5, 5), "labels": turns(3)}, "one whole number for each of 4"),
    "a gap": ({"images": pixels(40, 5, 5), "labels": turns(40, 2) * 2}, "got none of 1; number the classes"),
    "negative": ({"images": pixels(40, 5, 5), "labels": turns(40, 3) - 1}, "expected 0 to 1, got '-1 to 1'"),
    "one class": ({"images": pixels(40, 5, 5), "labels": turns(40, 1)}, "classes: expected at least 2"),
    "a lonely image": ({"images": pixels(40, 5, 5), "labels": np.minimum(turns(40, 40), 1)}, "data.test_share.*1 of 0"),
    "few for a share": (
        {"images": pixels(60, 5, 5), "labels": np.repeat([0, 1], (58, 2))},
        "data.test_share.*0 of 1 of 2; hold out more",
    ),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_npz_files_that_are_refused(tmp_path: Path, name: str) -> None:
    arrays, message = BAD_NPZ[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        NpzImages(path=str(tmp_path / "bad.npz")).load()


def test_damaged_npz_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", images=pixels(40, 5, 5), labels=turns(40, 2))
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:-100])
    flipped = bytearray(data)
    flipped[data.index(pixels(40, 5, 5).tobytes()) + 500] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    for name in ("cut", "flipped"):
        with pytest.raises(UserError, match="damaged"):
            NpzImages(path=str(tmp_path / f"{name}.npz")).load()
    with pytest.raises(UserError, match="found none"):
        NpzImages(path=str(tmp_path / "none.npz")).load()
    with pytest.raises(UserError, match=r"data.path"):
        NpzImages().load()


# folders of images


def picture(place: Path, array: np.ndarray, **options: object) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(place, **options)


def folder(root: Path, each: int = 10, classes: str = "ab", side: int = 8) -> Path:
    for k, name in enumerate(classes):
        for i in range(each):
            picture(root / name / f"{i:02d}.png", pixels(1, side, side, 3, seed=100 * k + i)[0])
    return root


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    found = gambeson.load(str(folder(tmp_path)), size=8)
    assert [len(p) for p in (found.train, found.validation, found.test)] == [16, 2, 2]
    assert found.class_names == ("a", "b")
    assert found.shape == (3, 8, 8)
    sums = torch.cat([p.images for p in (found.train, found.validation, found.test)]).sum((1, 2, 3))
    expected = [pixels(1, 8, 8, 3, seed=100 * k + i).sum() / 255 for k in range(2) for i in range(10)]
    assert sorted(sums.tolist()) == pytest.approx(sorted(expected), rel=1e-5)  # of that size already: not touched


def test_folders_for_the_parts_are_kept(tmp_path: Path) -> None:
    for part, each in (("train", 5), ("val", 2), ("test", 3)):
        folder(tmp_path / part, each)
    found = ImageFolder(path=str(tmp_path), size=8).load()
    assert [len(p) for p in (found.train, found.validation, found.test)] == [10, 4, 6]
    folder(tmp_path / "test", 1, "c")
    with pytest.raises(UserError, match=r"test: classes: expected those of train \(a, b\), got \['c'\]"):
        ImageFolder(path=str(tmp_path), size=8).load()


def test_the_resize_rules() -> None:
    """A picture twice as wide as high, left half black, right half white, with a red middle column pair."""
    array = np.zeros((8, 16, 3), np.uint8)
    array[:, 8:] = 255
    wide = Image.fromarray(array)
    crop, squash = (np.asarray(resized(wide, 4, rule))[..., 0] for rule in ("crop", "squash"))
    assert crop.shape == squash.shape == (4, 4)
    half = np.asarray(wide.resize((8, 4), Image.Resampling.BICUBIC))[..., 0]
    assert np.array_equal(crop, half[:, 2:6])
    assert crop[0, 0] < 10
    assert squash[0, 0] < 10
    tall = np.asarray(resized(Image.fromarray(array.transpose(1, 0, 2)), 4, "crop"))[..., 0]
    assert np.array_equal(tall, crop.T)
    assert resized(Image.fromarray(array[:5, :3]), 7, "crop").size == (7, 7)


def test_grey_folders_have_one_channel(tmp_path: Path) -> None:
    for name in "ab":
        for i in range(10):
            picture(tmp_path / name / f"{i}.png", pixels(1, 6, 9, seed=i)[0])
    assert ImageFolder(path=str(tmp_path), size=5, grey=True, resize="squash").load().shape == (1, 5, 5)
    assert ImageFolder(path=str(tmp_path), size=5).load().shape == (3, 5, 5)


def test_pictures_that_cannot_be_read_as_they_are_are_listed(tmp_path: Path) -> None:
    folder(tmp_path)
    picture(tmp_path / "a/deep.png", pixels(1, 8, 8)[0].astype(np.uint16) * 256)
    picture(tmp_path / "a/clear.png", pixels(1, 8, 8, 4)[0])
    (tmp_path / "b/notes.csv").write_text("not an image")
    whole = (tmp_path / "b/00.png").read_bytes()
    (tmp_path / "b/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b/.hidden").write_text("left alone")
    with pytest.raises(UserError) as caught:
        ImageFolder(path=str(tmp_path), size=8).load()
    for expected in ("4 that are not", "a/deep.png (mode I;16", "a/clear.png (mode RGBA", "b/notes.csv", "b/cut.png"):
        assert expected in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder with a folder for each class"):
        ImageFolder(path=str(tmp_path / "nowhere")).load()
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="images in class folders"):
        ImageFolder(path=str(tmp_path)).load()
    folder(tmp_path / "one", classes="a")
    with pytest.raises(UserError, match="classes: expected at least 2"):
        ImageFolder(path=str(tmp_path / "one")).load()
    for bad in ({"size": 2}, {"validation_share": 0.0}, {"test_share": 1.0}, {"resize": "stretch"}):
        with pytest.raises((UserError, TypeError)):
            ImageFolder(**bad)


# names


def test_doors_by_name_and_path(tmp_path: Path) -> None:
    folder(tmp_path / "pictures")
    np.savez(tmp_path / "set.npz", images=pixels(4, 5, 5), labels=turns(4))
    assert door("digits", train_images=100) == Digits(train_images=100)
    assert door("cifar10") == Cifar10()
    assert door("cifar10-16", split_seed=2) == Cifar10(side=16, train_images=1000, split_seed=2)
    assert door(str(tmp_path / "pictures"), size=8) == ImageFolder(path=str(tmp_path / "pictures"), size=8)
    assert door(str(tmp_path / "set.npz")) == NpzImages(path=str(tmp_path / "set.npz"))
    with pytest.raises(UserError, match=r"unknown option of Cifar10: expected one of side"):
        door("cifar10", sides=16)
    with pytest.raises(UserError, match=r"cifar10.*got 'cifar'"):
        door("cifar")
    (tmp_path / "set.txt").write_text("")
    with pytest.raises(UserError, match=r"or an .npz file, got"):
        door(str(tmp_path / "set.txt"))
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(UserError, match="a store of synthetic ones"):
        door(str(tmp_path))


@pytest.mark.parametrize("spec", [Digits(), Cifar10(), NpzImages(), ImageFolder()])
def test_doors_are_parts_of_recipes(spec: object) -> None:
    assert canonical.plain(spec)["class"] == type(spec).__name__
    helps = canonical.field_help(type(spec))
    assert set(helps) == set(canonical.hints(type(spec)))


# sets that others published


def write_peer(place: Path, n: int = 25, keys: tuple[str, str] = ("image", "label"), compress: bool = False) -> Path:
    save = np.savez_compressed if compress else np.savez
    save(place, **{keys[0]: pixels(n, 4, 4, 3), keys[1]: turns(n)})
    return place


def write_port(place: Path, n: int = 25, labels: str = "ddpm.npy", side: int = 4) -> Path:
    place.mkdir(exist_ok=True)
    (place / "ddpm.bin").write_bytes(pixels(n, side, side, 3).tobytes())
    np.save(place / labels, turns(n))
    return place / "ddpm.bin"


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keys", [("image", "label"), ("arr_0", "arr_1"), ("images", "labels")])
def test_published_archives_are_read_in_blocks(tmp_path: Path, keys: tuple[str, str], compress: bool) -> None:
    peer = open_peer(write_peer(tmp_path / "set.npz", keys=keys, compress=compress))
    assert len(peer) == 25
    assert peer.shape == (4, 4, 3)
    blocks = list(peer.blocks(10))
    assert [len(labels) for _, labels in blocks] == [10, 10, 5]
    assert np.array_equal(np.concatenate([images for images, _ in blocks]), pixels(25, 4, 4, 3))
    assert np.concatenate([labels for _, labels in blocks]).tolist() == turns(25).tolist()
    assert is_peer(tmp_path / "set.npz")
    assert not is_peer(tmp_path)
    assert not peer.assumed


@pytest.mark.parametrize("labels", ["ddpm.npy", "ddpm_labels.npy", "y.npy"])
def test_ports_bytes_are_read_with_the_labels_beside_them(tmp_path: Path, labels: str) -> None:
    path = write_port(tmp_path / "port", labels=labels)
    for shape in (None, (4, 4, 3)):
        peer = open_peer(path, shape)
        assert np.array_equal(np.concatenate([images for images, _ in peer.blocks(7)]), pixels(25, 4, 4, 3))
    assert "NHWC" in peer.assumed
    assert labels in peer.assumed
    assert open_peer(path, (2, 8, 3)).shape == (2, 8, 3)


def test_ports_bytes_that_cannot_be_told(tmp_path: Path) -> None:
    path = write_port(tmp_path / "port")
    with pytest.raises(UserError, match=r"expected 25 images .*of 5 x 4 x 3 bytes, 1500 in all, got 1200"):
        open_peer(path, (5, 4, 3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="got 1199"):
        open_peer(path)
    (path.parent / "ddpm.npy").rename(path.parent / "x.npy")
    np.save(path.parent / "y.npy", turns(25))
    with pytest.raises(UserError, match=r"ddpm.npy or ddpm_labels.npy, found x.npy, y.npy"):
        open_peer(path)
    with pytest.raises(UserError, match="found none"):
        open_peer(tmp_path / "none.bin")
    with pytest.raises(UserError, match="found none"):
        open_peer(tmp_path / "none.npz")


BAD_PEERS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "keys": ({"x": pixels(3, 4, 4, 3), "y": turns(3)}, "image and label, arr_0 and arr_1.*found x, y"),
    "float images": ({"image": np.zeros((3, 4, 4, 3)), "label": turns(3)}, "expected images uint8.*got float64"),
    "planes": ({"image": pixels(3, 3, 4, 4), "label": turns(3)}, r"got uint8 \[3, 3, 4, 4\]; save them again"),
    "float labels": ({"image": pixels(3, 4, 4, 3), "label": turns(3) / 1}, r"got float64 \[3\]; .*astype"),
    "nan labels": ({"image": pixels(3, 4, 4, 3), "label": np.array([0, np.nan, 1])}, "NaN among them"),
    "one hot": ({"image": pixels(3, 4, 4, 3), "label": np.eye(3)}, r"got float64 \[3, 3\]; save them again as whole"),
    "too few labels": ({"image": pixels(3, 4, 4, 3), "label": turns(2)}, r"expected 3 whole numbers .*int64 \[2\]"),
    "none": ({"image": pixels(0, 4, 4, 3), "label": turns(0)}, "at least one image"),
    "objects": ({"image": pixels(1, 4, 4, 3), "label": np.array([None])}, "expected a plain array"),
}


@pytest.mark.parametrize("name", BAD_PEERS)
def test_published_sets_that_are_refused(tmp_path: Path, name: str) -> None:
    arrays, message = BAD_PEERS[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_peer(tmp_path / "bad.npz")


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    data = write_peer(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut"):
        open_peer(tmp_path / "cut.npz")
    for compress in (False, True):
        data = bytearray(write_peer(tmp_path / "whole.npz", compress=compress).read_bytes())
        with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
            told = archive.getinfo("image.npy").CRC.to_bytes(4, "little")
        data[data.rindex(told)] ^= 1  # every byte can be read, but the checksum is of others
        (tmp_path / "flipped.npz").write_bytes(data)
        for size in (5, 10):
            with pytest.raises(UserError, match="damaged or cut"):
                list(open_peer(tmp_path / "flipped.npz").blocks(size))
    image, label = io.BytesIO(), io.BytesIO()
    np.save(image, pixels(25, 4, 4, 3))
    np.save(label, turns(25))
    for content in (image.getvalue()[:-10], image.getvalue() + b"x"):
        with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
            archive.writestr("image.npy", content)
            archive.writestr("label.npy", label.getvalue())
        with pytest.raises(UserError, match="expected 25 rows as its head says"):
            list(open_peer(tmp_path / "other.npz").blocks(10))
    with pytest.raises(UserError, match="as asked"):
        open_peer(tmp_path / "whole.npz", (8, 8, 3))


SPEC = PeerImages(block_size=10, blocks_per_shard=2)


@pytest.mark.parametrize("kind", ["npz", "bin"])
def test_a_published_set_becomes_a_store(tmp_path: Path, kind: str) -> None:
    path = write_peer(tmp_path / "set.npz") if kind == "npz" else write_port(tmp_path / "port")
    source = replace(SPEC, path=str(path)).source
    made = Store(tmp_path / "runs").once(import_images, SPEC.reading, source)
    found = open_synthetic(made.folder)
    assert len(found) == 25
    images, labels = found.read(np.arange(25))
    assert np.array_equal(images, pixels(25, 4, 4, 3))
    assert labels.tolist() == turns(25).tolist()
    moved = path.parent.rename(tmp_path / "moved") if kind == "bin" else tmp_path
    again = Store(tmp_path / "runs").once(import_images, SPEC.reading, FilesSource(str(moved / path.name)))
    assert again.digest == made.digest  # the content counts, not the place


def test_an_import_goes_on_where_it_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FilesSource(str(write_peer(tmp_path / "set.npz")))
    straight = Store(tmp_path / "straight").once(import_images, SPEC, source)
    put, done = StoreWriter.put, []

    def breaking(writer: StoreWriter, block: int, *rest: np.ndarray) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(block)
        put(writer, block, *rest)

    monkeypatch.setattr(StoreWriter, "put", breaking)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path / "broken").once(import_images, SPEC, source)
    written: list[int] = []

    def counting(writer: StoreWriter, block: int, *rest: np.ndarray) -> None:
        written.append(block)
        put(writer, block, *rest)

    monkeypatch.setattr(StoreWriter, "put", counting)
    resumed = Store(tmp_path / "broken").once(import_images, SPEC, source)
    assert written == [1, 2]
    for name in ("images/shards/00000.npy", "images/shards/00001.parquet", "images/store.json", "chosen.parquet"):
        assert (resumed.folder / name).read_bytes() == (straight.folder / name).read_bytes()


def peak_of_import(place: Path, images: int, compress: bool) -> int:
    """Bytes that python and numpy held at most while a published set was read into a store."""
    save = np.savez_compressed if compress else np.savez
    place.mkdir()
    save(place / "set.npz", image=pixels(images, 32, 32, 3), label=turns(images))
    spec = PeerImages(block_size=1000, blocks_per_shard=20)
    tracemalloc.start()
    made = Store(place / "runs").once(import_images, spec, FilesSource(str(place / "set.npz")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(open_synthetic(made.folder)) == images
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("compress", [False, True])
def test_an_import_needs_memory_for_a_block_only(tmp_path: Path, compress: bool) -> None:
    """200 MB of images in under 20 MB, hardly more than 20 MB of them need; a block of 1,000 is 3 MB."""
    peak_of_import(tmp_path / "first", 100, compress)  # what is imported and looked up once
    small, large = (peak_of_import(tmp_path / str(n), n, compress) for n in (6_600, 66_000))
    assert large < 20e6
    assert large < small + 4e6
