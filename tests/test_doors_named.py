"""The doors of published sets, on small archives laid out as their makers do: what is read, split and refused."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import gambeson
from gambeson import canonical
from gambeson.data import cifar100, datasets, door, gtsrb
from gambeson.data.archives import opened, tar_members
from gambeson.data.arrays import evaluation_images
from gambeson.data.celeba import CelebA
from gambeson.data.cifar import Cifar10, parse_batch
from gambeson.data.gtsrb import CLASSES, Gtsrb
from gambeson.data.idx import FashionMnist, Mnist, read_idx
from gambeson.data.imagenet64 import ImageNet64
from gambeson.data.matlab import Variable
from gambeson.data.portions import groups_held_out
from gambeson.data.svhn import Svhn, read_mat
from gambeson.data.tiny_imagenet import TinyImageNet
from gambeson.errors import UserError


def pixels(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def turns(n: int, classes: int = 10) -> np.ndarray:
    return np.arange(n) % classes


def floats(images: np.ndarray) -> torch.Tensor:
    """uint8 NHWC -> what a door gives out."""
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root whose small archives are taken for the published ones."""
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path))
    monkeypatch.setattr("gambeson.data.catalogue.check_published", lambda path: None)
    return tmp_path


def tar(place: Path, members: dict[str, bytes]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w:gz") as made:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return place


def zipped(place: Path, members: dict[str, bytes]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return place


def unpack(place: Path, members: dict[str, bytes]) -> None:
    for name, content in members.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


def encoded(image: np.ndarray, kind: str = "PPM") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


# CIFAR

EVERY = pixels(60, 32, 32, 3, seed=1)
FLAT = np.ascontiguousarray(EVERY.transpose(0, 3, 1, 2)).reshape(60, -1)


def cifar10_python() -> dict[str, bytes]:
    """Five batches of ten images and ten of test."""
    names = [f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    return {
        name: pickle.dumps({b"labels": turns(10).tolist(), b"data": FLAT[10 * i : 10 * i + 10]}, protocol=2)
        for i, name in enumerate(names)
    }


def cifar10_binary() -> dict[str, bytes]:
    names = [f"cifar-10-batches-bin/{n}" for n in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")]
    return {name: b"".join(bytes([k]) + FLAT[10 * i + k].tobytes() for k in range(10)) for i, name in enumerate(names)}


CIFAR10_FORMS: dict[str, Callable[[Path], object]] = {
    "python archive": lambda root: tar(root / "cifar10/cifar-10-python.tar.gz", cifar10_python()),
    "binary archive": lambda root: tar(root / "cifar10/cifar-10-binary.tar.gz", cifar10_binary()),
    "python folder": lambda root: unpack(root, cifar10_python()),
    "binary folder": lambda root: unpack(root / "cifar10", cifar10_binary()),
    "archive in the root": lambda root: tar(root / "cifar-10-python.tar.gz", cifar10_python()),
}


@pytest.mark.parametrize("form", CIFAR10_FORMS)
def test_cifar10_in_every_form_is_the_same(root: Path, form: str) -> None:
    CIFAR10_FORMS[form](root)
    found = Cifar10(validation_images=10).load()
    assert torch.equal(found.test.images, floats(EVERY[50:]))
    assert found.test.labels.tolist() == list(range(10))
    assert len(found.train) == 40
    together = torch.cat([found.train.images, found.validation.images]).flatten(1).sum(1).sort().values
    assert torch.allclose(together, floats(EVERY[:50]).flatten(1).sum(1).sort().values)


N = 300
HUNDRED = np.ascontiguousarray(pixels(N, 3072, seed=2))


def cifar100_python(n: int = N) -> dict[str, bytes]:
    parts = {"train": slice(0, n), "test": slice(0, 100)}
    return {
        f"cifar-100-python/{part}": pickle.dumps(
            {
                b"fine_labels": turns(n, 100)[where].tolist(),
                b"coarse_labels": (turns(n, 100)[where] // 5).tolist(),
                b"data": HUNDRED[where],
            },
            protocol=2,
        )
        for part, where in parts.items()
    }


def cifar100_binary() -> dict[str, bytes]:
    def records(where: slice) -> bytes:
        fine = turns(N, 100)[where]
        return np.concatenate([(fine // 5)[:, None], fine[:, None], HUNDRED[where]], 1).astype(np.uint8).tobytes()

    return {"cifar-100-binary/train.bin": records(slice(0, N)), "cifar-100-binary/test.bin": records(slice(0, 100))}


def test_cifar100_has_fine_and_coarse_classes_in_both_archives(root: Path) -> None:
    archive = tar(root / "cifar100/cifar-100-python.tar.gz", cifar100_python())
    first = {coarse: gambeson.load("cifar100", validation_images=100, coarse=coarse) for coarse in (False, True)}
    archive.unlink()
    tar(root / "cifar100/cifar-100-binary.tar.gz", cifar100_binary())
    for coarse, found in first.items():
        again = gambeson.load("cifar100", validation_images=100, coarse=coarse)
        assert found.digest == again.digest
        expected = turns(100, 100) // 5 if coarse else turns(100, 100)
        assert found.test.labels.tolist() == expected.tolist()
        assert len(found.class_names) == (20 if coarse else 100)
        assert found.flip_safe
    assert torch.equal(first[False].test.images, torch.from_numpy(HUNDRED[:100].reshape(-1, 3, 32, 32)) / 255)
    assert first[False].class_names[:2] == ("apple", "aquarium_fish")
    assert first[True].class_names[14] == "people"
    assert [list(names) for names in (cifar100.FINE, cifar100.COARSE)] == [
        sorted(cifar100.FINE),
        sorted(cifar100.COARSE),
    ]


def test_damaged_archives_of_cifar_are_refused_by_name(root: Path) -> None:
    whole = tar(root / "cifar10/cifar-10-python.tar.gz", cifar10_python())
    data = whole.read_bytes()
    for cut in (len(data) // 2, 100, 0):
        whole.write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: expected .*gambeson data get"):
            Cifar10().load()
    whole.write_bytes(b"<html>not found</html>" * 20)
    with pytest.raises(UserError, match=r"python.tar.gz: expected a whole .tar.gz"):
        Cifar10().load()
    members = cifar10_python()
    members.pop("cifar-10-batches-py/data_batch_3")
    tar(whole, members)
    with pytest.raises(UserError, match=r"none of data_batch_3"):
        Cifar10().load()
    whole.unlink()
    tar(root / "cifar10/cifar-10-binary.tar.gz", {k: v[:-1] for k, v in cifar10_binary().items()})
    with pytest.raises(UserError, match=r"batch_1.bin: expected records of 1 \+ 3,072 bytes each, got '30,729 bytes"):
        Cifar10().load()


def test_a_smaller_train_part_takes_nothing_that_is_held_out(root: Path) -> None:
    unpack(root, cifar10_binary())
    for seed in range(5):
        found = Cifar10(validation_images=20, train_images=30, split_seed=seed).load()
        marks = [set(part.images.flatten(1).sum(1).tolist()) for part in (found.train, found.validation)]
        assert [len(part) for part in marks] == [30, 20]
        assert not marks[0] & marks[1]


def test_labels_that_are_no_class_are_refused(root: Path) -> None:
    members = {name: bytes([10]) + content[1:] for name, content in cifar10_binary().items()}
    unpack(root, members)
    with pytest.raises(UserError, match="labels from 0 to 9"):
        Cifar10(validation_images=10).load()


def test_a_tar_that_declares_more_than_any_batch_holds_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x/test_batch")
    info.size = 2**40
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(info.tobuf() + bytes(1024)))
    with pytest.raises(UserError, match="made to fill memory"):
        tar_members(tmp_path / "a.tar.gz", ["test_batch"])


def test_a_pickle_with_a_length_that_nothing_bears_out_takes_no_memory() -> None:
    lie = b"\x80\x04}\x8e" + (2**62).to_bytes(8, "little") + b"abc"
    with pytest.raises(UserError, match="damaged or another"):
        parse_batch(lie, "batch", b"labels")


def test_an_archive_with_another_checksum_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path))
    tar(tmp_path / "cifar10/cifar-10-python.tar.gz", cifar10_python())
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz.*6d958be074577803.*gambeson data get cifar10"):
        Cifar10(validation_images=10).load()
    idx(tmp_path / "mnist/train-images-idx3-ubyte.gz", pixels(40, 28, 28))
    idx(tmp_path / "mnist/train-labels-idx1-ubyte.gz", turns(40).astype(np.uint8))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz: expected"):
        Mnist().load()
    zipped(tmp_path / "tiny-imagenet/tiny-imagenet-200.zip", {"a": b""})
    with pytest.raises(UserError, match=r"tiny-imagenet-200.zip: expected .*md5:90528d7"):
        TinyImageNet().load()


# idx


def idx(place: Path, array: np.ndarray, head: bytes | None = None) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    shape = b"".join(side.to_bytes(4, "big") for side in array.shape)
    content = (bytes((0, 0, 8, array.ndim)) + shape if head is None else head) + array.tobytes()
    place.write_bytes(gzip.compress(content) if place.suffix == ".gz" else content)
    return place


def write_mnist(folder: Path, end: str = "-idx{}-ubyte.gz", seed: int = 0) -> None:
    for part, n in (("train", 60), ("t10k", 20)):
        idx(folder / f"{part}-images{end.format(3)}", pixels(n, 28, 28, seed=n + seed))
        idx(folder / f"{part}-labels{end.format(1)}", turns(n).astype(np.uint8))


@pytest.mark.parametrize("end", ["-idx{}-ubyte.gz", "-idx{}-ubyte", ".idx{}-ubyte"])
def test_mnist_gzipped_or_unpacked(root: Path, end: str) -> None:
    write_mnist(root / "mnist", end)
    write_mnist(root / "FashionMNIST/raw", end, seed=9)
    digits, clothes = gambeson.load("mnist", validation_images=20), gambeson.load("fashion-mnist", validation_images=20)
    assert digits.shape == clothes.shape == (1, 28, 28)
    assert torch.equal(digits.test.images, floats(pixels(20, 28, 28, seed=20)[..., None]))
    assert torch.equal(clothes.test.images, floats(pixels(20, 28, 28, seed=29)[..., None]))
    assert digits.test.labels.tolist() == turns(20).tolist()
    assert [digits.flip_safe, clothes.flip_safe] == [False, True]
    assert clothes.class_names[9] == "ankle boot"
    small = Mnist(side=14, train_images=20, validation_images=20).load()
    assert small.shape == (1, 14, 14)
    assert small.train.labels.bincount().tolist() == [2] * 10
    assert small.test.images[3, 0, 5, 6].item() == pytest.approx(
        pixels(20, 28, 28, seed=20)[3, 10:12, 12:14].mean() / 255, abs=1e-6
    )
    assert FashionMnist(validation_images=20).load().digest == clothes.digest


BAD_IDX: dict[str, tuple[Callable[[Path], object], str]] = {
    "labels for images": (lambda p: idx(p, turns(9).astype(np.uint8)), "magic number 0x00000803, got 0x00000801"),
    "a web page": (lambda p: p.write_bytes(gzip.compress(b"<html>" * 9)), "0x00000803, got 0x3c68746d"),
    "no gzip": (lambda p: p.write_bytes(b"<html>" * 9), "expected a whole idx file.*[Nn]ot a gzipped"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:300]), "expected a whole idx file"),
    "a head alone": (lambda p: p.write_bytes(gzip.compress(bytes((0, 0, 8, 3)))), "magic number 0x00000803"),
    "more in the head": (
        lambda p: idx(p, pixels(3, 28, 28), bytes((0, 0, 8, 3)) + b"\0\0\0\4" + b"\0\0\0\x1c" * 2),
        r"3,136 bytes that its head declares \[4, 28, 28\].*2,352 follow",
    ),
    "less in the head": (
        lambda p: idx(p, pixels(3, 28, 28), bytes((0, 0, 8, 3)) + b"\0\0\0\2" + b"\0\0\0\x1c" * 2),
        "more follow it",
    ),
    "petabytes in the head": (
        lambda p: idx(p, pixels(3, 28, 28), bytes((0, 0, 8, 3)) + b"\xff" * 12),
        "at most the .* bytes that the file can hold",
    ),
    "fewer than labels": (lambda p: idx(p, pixels(59, 28, 28)), r"as many labels, got \[59, 28, 28\] and \[60\]"),
    "another size": (lambda p: idx(p, pixels(60, 27, 28)), r"28 x 28 pixels.*\[60, 27, 28\]"),
}


@pytest.mark.parametrize("name", BAD_IDX)
def test_idx_files_that_are_refused(root: Path, name: str) -> None:
    write_mnist(root / "mnist")
    spoil, message = BAD_IDX[name]
    spoil(root / "mnist/train-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=message) as caught:
        Mnist(validation_images=20).load()
    assert "train-images-idx3-ubyte.gz" in str(caught.value)


def test_an_idx_head_is_checked_before_it_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = idx(tmp_path / "a-ubyte", pixels(3, 28, 28), bytes((0, 0, 8, 3)) + b"\x7f" + b"\xff" * 11)
    monkeypatch.setattr("numpy.frombuffer", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"at most the 2,368 bytes"):
        read_idx(path, 3)


# SVHN


def mat(place: Path, n: int = 40, seed: int = 0, **changes: object) -> np.ndarray:
    place.parent.mkdir(parents=True, exist_ok=True)
    images = pixels(n, 32, 32, 3, seed=seed)
    y = np.where(turns(n) == 0, 10, turns(n)).astype(np.uint8)[:, None]
    savemat(place, {"X": images.transpose(1, 2, 3, 0), "y": y, **changes}, do_compression=True)
    return images


def test_svhn_counts_ten_as_zero_and_is_never_mirrored(root: Path) -> None:
    train = mat(root / "svhn/train_32x32.mat")
    test = mat(root / "svhn/test_32x32.mat", 20, seed=1)
    found = gambeson.load("svhn", validation_images=10)
    assert torch.equal(found.test.images, floats(test))
    assert found.test.labels.tolist() == turns(20).tolist()
    assert not found.flip_safe
    assert found.class_names == tuple("0123456789")
    extra = mat(root / "svhn/extra_32x32.mat", 30, seed=2)
    more = Svhn(extra=True, validation_images=10).load()
    assert len(more.train) == 60
    everything = torch.cat([more.train.images, more.validation.images]).flatten(1).sum(1).sort().values
    assert torch.allclose(everything, floats(np.concatenate([train, extra])).flatten(1).sum(1).sort().values)
    assert Svhn(side=16, train_images=20, validation_images=10).load().shape == (3, 16, 16)


def spoiled_mat(path: Path, place: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(data)


BAD_MATS: dict[str, tuple[Callable[[Path], object], str]] = {
    "version 7.3": (
        lambda p: p.write_bytes(b"MATLAB 7.3 MAT-file, HDF5 schema 1.00 .".ljust(124) + b"\0\2IM" + bytes(400)),
        "version 5, as SVHN's are, got version 7.3",
    ),
    "version 4": (lambda p: savemat(p, {"X": np.zeros((2, 2))}, format="4"), "version 5, as SVHN's are, got"),
    "no mat": (lambda p: p.write_bytes(b"<html>"), "got b'<html>'"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:5000]), "expected a whole MATLAB file|expected X uint8"),
    "flipped": (lambda p: spoiled_mat(p, 9000, b"\xff" * 40), "expected a whole MATLAB file"),
    "other variables": (lambda p: savemat(p, {"images": np.zeros(3)}), r"y \[N, 1\], got images double \[1, 3\]"),
    "other shape": (lambda p: mat(p, X=np.zeros((28, 28, 3, 40), np.uint8)), r"got X uint8 \[28, 28, 3, 40\]"),
    "float": (lambda p: mat(p, X=np.zeros((32, 32, 3, 40))), r"got X double"),
    "fewer labels": (lambda p: mat(p, y=np.ones((39, 1), np.uint8)), r"y uint8 \[39, 1\]"),
    "labels": (lambda p: mat(p, y=np.full((40, 1), 11, np.uint8)), "labels: expected 1 to 10"),
    "a gap": (lambda p: mat(p, y=np.ones((40, 1), np.uint8)), "0 of 0"),
}


@pytest.mark.parametrize("name", BAD_MATS)
def test_mat_files_that_are_refused(root: Path, name: str) -> None:
    for part in ("train", "test"):
        mat(root / f"svhn/{part}_32x32.mat")
    spoil, message = BAD_MATS[name]
    spoil(root / "svhn/train_32x32.mat")
    with pytest.raises(UserError, match=message) as caught:
        Svhn(validation_images=10).load()
    assert "train_32x32.mat" in str(caught.value) or name == "a gap"


def test_a_mat_that_declares_gigabytes_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mat(tmp_path / "a.mat", 4)
    huge = [Variable(name, shape, "uint8", 0, 0, 0) for name, shape in (("X", (32, 32, 3, 10**9)), ("y", (10**9, 1)))]
    monkeypatch.setattr("gambeson.data.svhn.variables", lambda _: huge)
    monkeypatch.setattr("gambeson.data.svhn.arrays", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match="bytes that the file can hold"):
        read_mat(tmp_path / "a.mat")


# GTSRB

HEAD = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
TRACKS, FRAMES = 3, 2


def sign(label: int, track: int, frame: int) -> np.ndarray:
    """12 x 10 pixels: a border of 255 around a plane that says which one it is."""
    image = np.full((10, 12, 3), 255, np.uint8)
    image[2:8, 3:9] = (label, 10 * track, frame)
    return image


def gtsrb_train(base: str = "GTSRB/Training") -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for label in range(43):
        rows = HEAD
        for track in range(TRACKS):
            for frame in range(FRAMES):
                name = f"{track:05d}_{frame:05d}.ppm"
                rows += f"{name};12;10;3;2;9;8;{label}\n"
                members[f"{base}/{label:05d}/{name}"] = encoded(sign(label, track, frame))
        members[f"{base}/{label:05d}/GT-{label:05d}.csv"] = rows.encode()
    return members


def gtsrb_test(n: int = 50, base: str = "GTSRB/Final_Test/Images") -> tuple[dict[str, bytes], bytes]:
    members = {f"{base}/{i:05d}.ppm": encoded(sign(i % 43, 20, i)) for i in range(n)}
    rows = HEAD + "".join(f"{i:05d}.ppm;12;10;3;2;9;8;{i % 43}\n" for i in range(n))
    without = "\n".join(row.rpartition(";")[0] for row in rows.splitlines())
    return {**members, f"{base}/GT-final_test.test.csv": without.encode()}, rows.encode()


def write_gtsrb(root: Path, train: dict[str, bytes] | None = None, test: dict[str, bytes] | None = None) -> None:
    members, truth = gtsrb_test()
    zipped(root / "gtsrb/GTSRB-Training_fixed.zip", train or gtsrb_train())
    zipped(root / "gtsrb/GTSRB_Final_Test_Images.zip", test or members)
    zipped(root / "gtsrb/GTSRB_Final_Test_GT.zip", {"GT-final_test.csv": truth})


def test_gtsrb_from_its_zips_cut_to_the_sign(root: Path) -> None:
    write_gtsrb(root)
    found = gambeson.load("gtsrb")
    assert found.shape == (3, 32, 32)
    assert len(found.class_names) == 43
    assert found.class_names[14] == "Stop"
    assert not found.flip_safe
    assert found.test.labels.tolist() == turns(50, 43).tolist()
    assert torch.equal(found.test.images[47] * 255, torch.tensor([4.0, 200, 47]).view(3, 1, 1).expand(3, 32, 32))
    assert gambeson.load("gtsrb", crop_roi=False, side=16).test.images[:, :, 0, 0].min() == 1  # the border


def test_gtsrb_never_splits_a_sign(root: Path) -> None:
    """The frames of a sign are either all held out or all trained on, and each class has both."""
    write_gtsrb(root)
    for seed in (0, 1):
        found = Gtsrb(split_seed=seed, side=8).load()
        marks = [{tuple((i[:2, 4, 4] * 255).int().tolist()) for i in p.images} for p in (found.train, found.validation)]
        assert not marks[0] & marks[1]
        assert {label for label, _ in marks[0]} == {label for label, _ in marks[1]} == set(range(43))
        assert len(found.validation) == 43 * FRAMES
        assert len(found.train) == 43 * FRAMES * (TRACKS - 1)
    assert Gtsrb(split_seed=0, side=8).load().digest != Gtsrb(split_seed=1, side=8).load().digest
    assert Gtsrb(side=8, train_images=43).load().train.labels.bincount().tolist() == [1] * 43


def test_a_share_of_the_signs_of_each_class_is_held_out() -> None:
    signs = [(label, track) for label, tracks in ((0, 10), (1, 30), (2, 2)) for track in range(tracks)] * 3
    labels, tracks = (np.array([sign[i] for sign in signs]) for i in (0, 1))
    held = groups_held_out(labels, tracks, 0.2, 0, CLASSES, "data.validation_share")
    counts = [len({s for s, h in zip(signs, held, strict=True) if h and s[0] == label}) for label in range(3)]
    assert counts == [2, 6, 1]
    with pytest.raises(UserError, match="at least 2 groups of images of Speed limit 20"):
        groups_held_out(np.array([0]), np.array([0]), 0.2, 0, CLASSES, "data.validation_share")


def test_unpacked_folders_of_gtsrb_and_the_final_training_part(root: Path) -> None:
    test, truth = gtsrb_test()
    unpack(root / "gtsrb", {**gtsrb_train(), **test, "GTSRB/Final_Test/Images/GT-final_test.csv": truth})
    unpacked = Gtsrb(side=8).load()
    write_gtsrb(root)
    assert unpacked.digest == Gtsrb(side=8).load().digest
    final = {k: v for k, v in gtsrb_train("GTSRB/Final_Training/Images").items() if "00002_" not in k}
    for name in [name for name in final if name.endswith(".csv")]:
        final[name] = b"\n".join(row for row in final[name].splitlines() if not row.startswith(b"00002_"))
    zipped(root / "gtsrb/GTSRB_Final_Training_Images.zip", final)
    assert len(Gtsrb(side=8).load().train) == 43 * FRAMES  # the final part wins


def test_signs_of_train_that_test_shows_are_left_out_and_said(root: Path) -> None:
    members, _ = gtsrb_test()
    members["GTSRB/Final_Test/Images/00003.ppm"] = encoded(sign(3, 1, 0))
    write_gtsrb(root, test=members)
    with pytest.warns(UserWarning, match=r"left out 2 pictures of 1 signs .*class 3 track 00001"):
        found = Gtsrb(side=8).load()
    assert len(found.train) + len(found.validation) == 43 * TRACKS * FRAMES - FRAMES
    whole = Gtsrb(side=8, drop_test_twins=False).load()
    assert len(whole.train) + len(whole.validation) == 43 * TRACKS * FRAMES


def gtsrb_changed(change: Callable[[dict[str, bytes]], object]) -> dict[str, bytes]:
    members = gtsrb_train()
    change(members)
    return members


TABLE_5 = "GTSRB/Training/00005/GT-00005.csv"
BAD_GTSRB: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "no table": (lambda m: m.pop(TABLE_5), "expected GTSRB/Training/00005/GT-00005.csv in it"),
    "no picture": (
        lambda m: m.pop("GTSRB/Training/00005/00001_00001.ppm"),
        "a row for each of 5 pictures, got 6 rows.*without a picture: 00001_00001.ppm",
    ),
    "no row": (
        lambda m: m.update({TABLE_5: b"\n".join(m[TABLE_5].splitlines()[:-1])}),
        "each of 6 pictures, got 5 rows; without a row: 00002_00001.ppm",
    ),
    "other class": (lambda m: m.update({TABLE_5: m[TABLE_5].replace(b"8;5\n", b"8;6\n")}), "expected class 5.*got 6"),
    "commas": (lambda m: m.update({TABLE_5: m[TABLE_5].replace(b";", b",")}), "expected columns Filename;Width"),
    "words": (lambda m: m.update({TABLE_5: m[TABLE_5].replace(b";3;2;", b";x;2;")}), "whole numbers in each row"),
    "a sign outside": (
        lambda m: m.update({TABLE_5: m[TABLE_5].replace(b";9;8;", b";13;8;")}),
        r"a sign inside 12 x 10 pixels, got \(3, 2, 13, 8\)",
    ),
    "a cut picture": (
        lambda m: m.update({"GTSRB/Training/00005/00001_00001.ppm": encoded(sign(5, 1, 1))[:100]}),
        r"00005/00001_00001.ppm: expected a picture, got a damaged one",
    ),
    "nothing": (lambda m: m.clear() or m.update({"readme.txt": b""}), "folders 00000 to 00042"),
}


@pytest.mark.parametrize("name", BAD_GTSRB)
def test_gtsrb_that_is_refused(root: Path, name: str) -> None:
    change, message = BAD_GTSRB[name]
    write_gtsrb(root, train=gtsrb_changed(change))
    with pytest.raises(UserError, match=message) as caught:
        Gtsrb(side=8).load()
    assert "GTSRB-Training_fixed.zip" in str(caught.value)


def test_damaged_and_missing_zips_of_gtsrb(root: Path) -> None:
    with pytest.raises(UserError, match=r"GTSRB-Training_fixed.zip or the folder.*gambeson data get gtsrb"):
        Gtsrb().load()
    write_gtsrb(root)
    place = root / "gtsrb/GTSRB-Training_fixed.zip"
    data = place.read_bytes()
    place.write_bytes(data[:-50])
    with pytest.raises(UserError, match=r"GTSRB-Training_fixed.zip: expected a zip archive, got a damaged"):
        Gtsrb().load()
    broken = bytearray(data)
    broken[2000:2200] = bytes(200)
    place.write_bytes(broken)
    with pytest.raises(UserError, match=r"GTSRB-Training_fixed.zip: expected whole files"):
        Gtsrb().load()
    place.write_bytes(data)
    (root / "gtsrb/GTSRB_Final_Test_GT.zip").unlink()
    with pytest.raises(UserError, match=r"GTSRB_Final_Test_GT.zip or GT-final_test.csv"):
        Gtsrb().load()


def test_a_zip_that_declares_more_than_a_member_can_hold_is_refused(tmp_path: Path) -> None:
    """Its own directory says that a few deflated bytes unpack to 200 million."""
    path = zipped(tmp_path / "a.zip", {"x.ppm": b"hello"})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = (200_000_000).to_bytes(4, "little")
    path.write_bytes(data)
    with opened(path) as files, pytest.raises(UserError, match=r"a.zip: .*200,000,000 declared for x.ppm"):
        files.read("x.ppm")


# Tiny ImageNet

WNIDS = [f"n{k:08d}" for k in range(200)]


def tiny(side: int = 64) -> dict[str, bytes]:
    """Two images of each class to train on and one to test on; every fifth is grey."""
    base, members = "tiny-imagenet-200", {}
    for k, wnid in enumerate(WNIDS):
        for i in range(3):
            image = np.full((side, side, 3), (k, i * 50, 7), np.uint8)
            if i == 2:
                members[f"{base}/val/images/val_{k}.JPEG"] = encoded(image, "PNG")
            else:
                members[f"{base}/train/{wnid}/images/{wnid}_{i}.JPEG"] = encoded(image, "PNG")
    members[f"{base}/val/val_annotations.txt"] = "".join(
        f"val_{k}.JPEG\t{wnid}\t0\t0\t9\t9\n" for k, wnid in enumerate(WNIDS)
    ).encode()
    members[f"{base}/wnids.txt"] = "\n".join(reversed(WNIDS)).encode()
    titles = ["crane, a bird", "crane, a machine", *(f"thing {k}, same" for k in range(2, 200))]
    members[f"{base}/words.txt"] = "".join(f"{w}\t{t}\n" for w, t in zip(WNIDS, titles, strict=True)).encode()
    members[f"{base}/test/images/test_0.JPEG"] = b"no labels, never read"
    return members


def test_tiny_imagenet_is_tested_on_its_val_part(root: Path) -> None:
    zipped(root / "tiny-imagenet/tiny-imagenet-200.zip", tiny())
    found = gambeson.load("tiny-imagenet", validation_images=200, side=16)
    assert [len(p) for p in (found.train, found.validation, found.test)] == [200, 200, 200]
    assert found.shape == (3, 16, 16)
    for part in (found.train, found.test):
        assert (part.images[:, 0, 3, 3] * 255).round().int().tolist() == part.labels.tolist()
    assert (found.test.images[:, 1] * 255).round().unique().tolist() == [100]
    assert found.test.labels.tolist() == list(range(200))  # val_2 before val_10
    assert found.class_names[:3] == ("crane (n00000000)", "crane (n00000001)", "thing 2")


BAD_TINY: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "no words": (lambda m: m.pop("tiny-imagenet-200/words.txt"), "expected words.txt in it"),
    "a class less": (
        lambda m: m.update({"tiny-imagenet-200/wnids.txt": b"n00000000\n"}),
        "wnids.txt: expected 200 classes, got 1",
    ),
    "no annotation": (
        lambda m: m.update({"tiny-imagenet-200/val/val_annotations.txt": b"val_0.JPEG\tn00000000\n"}),
        "each of 200 images, got 1 such rows; val_1.JPEG",
    ),
    "strange class": (
        lambda m: m.update({"tiny-imagenet-200/train/n99999999/images/n99999999_0.JPEG": b""}),
        "classes that wnids.txt lists, got .*n99999999",
    ),
    "empty class": (
        lambda m: [m.pop(k) for k in list(m) if "train/n00000007" in k],
        "images of all classes in train, got 'none of n00000007'",
    ),
    "no picture": (
        lambda m: m.update({"tiny-imagenet-200/val/images/val_5.JPEG": b"x"}),
        "val_5.JPEG: expected a picture",
    ),
}


@pytest.mark.parametrize("name", BAD_TINY)
def test_tiny_imagenet_that_is_refused(root: Path, name: str) -> None:
    members = tiny(8)
    change, message = BAD_TINY[name]
    change(members)
    unpack(root, members)
    with pytest.raises(UserError, match=message):
        TinyImageNet(validation_images=200, side=16).load()


# CelebA


def write_celeba(root: Path, n: int = 24, partition: bool = True) -> Path:
    for i in range(n):
        image = np.full((30, 20, 3), i * 10, np.uint8)
        unpack(root, {f"img_align_celeba/{i + 1:06d}.jpg": encoded(image, "PNG")})
    rows = "".join(f"{i + 1:06d}.jpg {' 1' if i % 2 else '-1'} -1\n" for i in range(n))
    (root / "list_attr_celeba.txt").write_text(f"{n}\nMale Young\n{rows}")
    if partition:
        lines = "".join(f"{i + 1:06d}.jpg {0 if i < n // 2 else 1 + i % 4 // 2}\n" for i in range(n))
        (root / "list_eval_partition.txt").write_text(lines)
    return root


def test_an_attribute_of_celeba_is_the_class(root: Path) -> None:
    write_celeba(root / "celeba")
    found = gambeson.load("celeba", side=8)
    assert [len(p) for p in (found.train, found.validation, found.test)] == [12, 6, 6]
    assert found.class_names == ("not Male", "Male")
    assert found.test.labels.tolist() == [0, 1] * 3
    assert (found.test.images[:, 0, 0, 0] * 255).round().int().tolist() == [140, 150, 180, 190, 220, 230]
    assert door(str(root / "celeba"), attribute="Young") == CelebA(path=str(root / "celeba"), attribute="Young")
    assert CelebA(side=8, train_images=4).load().train.labels.bincount().tolist() == [2, 2]
    shared = CelebA(path=str(write_celeba(root / "other", partition=False)), side=8, test_share=0.25).load()
    assert [len(p) for p in (shared.train, shared.validation, shared.test)] == [16, 2, 6]


def test_celeba_that_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"expected list_attr_celeba.txt"):
        CelebA().load()
    place = write_celeba(root / "celeba")
    with pytest.raises(UserError, match=r"unknown attribute.*Male.*got 'male'"):
        CelebA(attribute="male").load()
    table = (place / "list_attr_celeba.txt").read_text()
    (place / "list_attr_celeba.txt").write_text(table.replace("24\n", "25\n", 1))
    with pytest.raises(UserError, match="25 rows, as line 1 says, got 24"):
        CelebA().load()
    (place / "list_attr_celeba.txt").write_text(table.replace("000003.jpg -1 -1", "000003.jpg -1"))
    with pytest.raises(UserError, match=r"2 values of 1 or -1 in each row, got .*000003.jpg"):
        CelebA().load()
    (place / "list_attr_celeba.txt").write_text(table)
    (place / "img_align_celeba/000007.jpg").unlink()
    with pytest.raises(UserError, match=r"the 24 images of list_attr_celeba.*000007.jpg"):
        CelebA().load()


# ImageNet-64


def write_imagenet(root: Path, kind: str, each: int = 300, side: int = 8) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(11):
        name = "val_data" if i == 10 else f"train_data_batch_{i + 1}"
        n = 1000 if i == 10 else each
        labels = (np.arange(n) + (0 if i == 10 else i * each)) % 1000 + 1
        content = {"data": pixels(n, 3 * side * side, seed=i), "labels": labels.tolist(), "mean": np.zeros(3)}
        if kind == "npz":
            np.savez(root / f"{name}.npz", **{k: np.asarray(v) for k, v in content.items()})
        else:
            (root / name).write_bytes(pickle.dumps(content, protocol=2 if i % 2 else 4))


def test_downsampled_imagenet_from_npz_and_pickles(root: Path) -> None:
    write_imagenet(root / "imagenet64", "npz")
    write_imagenet(root / "pickles", "pickle")
    found = gambeson.load("imagenet64", validation_images=1000)
    assert found.name == "imagenet8"
    assert [len(p) for p in (found.train, found.validation, found.test)] == [2000, 1000, 1000]
    expected = torch.from_numpy(pixels(1000, 192, seed=10)).view(-1, 3, 8, 8) / 255
    assert torch.equal(found.test.images, expected)
    assert found.test.labels.tolist() == list(range(1000))
    assert door(str(root / "pickles")) == ImageNet64(path=str(root / "pickles"))
    assert gambeson.load(str(root / "pickles"), validation_images=1000).digest == found.digest
    first = evaluation_images(root / "imagenet64/val_data.npz")
    assert torch.equal(first.images, expected)
    assert first.labels.tolist() == list(range(1000))


def test_one_batch_of_downsampled_imagenet_is_an_npz_like_others(root: Path) -> None:
    np.savez(root / "mini.npz", data=pixels(60, 192), labels=turns(60, 3) + 1)
    found = gambeson.load(str(root / "mini.npz"))
    assert found.shape == (3, 8, 8)
    assert found.train.labels.unique().tolist() == [0, 1, 2]
    everything = torch.cat([p.images for p in (found.train, found.validation, found.test)]).flatten(1)
    first = torch.from_numpy(pixels(60, 192)[7]) / 255
    assert (everything == first).all(1).any()


def test_batches_that_are_refused(root: Path) -> None:
    write_imagenet(root / "imagenet64", "npz", each=100)
    (root / "imagenet64/train_data_batch_4.npz").unlink()
    with pytest.raises(UserError, match=r"train_data_batch_4.npz or train_data_batch_4") as caught:
        ImageNet64(validation_images=1000).load()
    assert "gambeson data get" not in str(caught.value)  # it is not in the catalogue
    np.savez(root / "imagenet64/train_data_batch_4.npz", data=pixels(100, 192), labels=np.zeros(100, int))
    with pytest.raises(UserError, match=r"batch_4.npz: labels: expected 1 to 1000, got '0 to 0'"):
        ImageNet64(validation_images=1000).load()


# names


def test_every_name_is_a_part_of_recipes_with_help() -> None:
    for name, spec in datasets.DOORS.items():
        assert set(canonical.field_help(type(spec))) == set(canonical.hints(type(spec))), name
        assert canonical.digest(spec)
    assert canonical.digest(Cifar10()) == "8890bc55c9cd80ae93b75abe5caf9b1459fc8548d787fc382725d1c253cedcc4"


def test_an_unknown_name_lists_the_names_and_the_kinds_of_paths() -> None:
    with pytest.raises(UserError) as caught:
        door("cifar1000")
    for expected in (*datasets.DOORS, ".npz", ".parquet", "hf:ORG/NAME", "folder with a folder for each class"):
        assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["cifar100", "mnist", "fashion-mnist", "svhn", "gtsrb", "tiny-imagenet"])
def test_what_is_not_there_says_the_command_that_gets_it(root: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: expected .*found none; `gambeson data get {name}`.*GAMBESON_DATA"):
        gambeson.load(name)


def test_more_than_the_memory_holds_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar(root / "cifar10/cifar-10-binary.tar.gz", cifar10_binary())
    monkeypatch.setattr("gambeson.data.npz.available_memory", lambda: 2 * 60 * 3072 * 4 - 2)
    with pytest.raises(UserError, match="choose fewer train_images, or a smaller side"):
        Cifar10(validation_images=10).load()
    assert len(Cifar10(validation_images=10, train_images=10).load().train) == 10


def test_classes_of_gtsrb() -> None:
    assert len(set(gtsrb.CLASSES)) == 43
    assert gtsrb.CLASSES[33:35] == ("Turn right ahead", "Turn left ahead")
