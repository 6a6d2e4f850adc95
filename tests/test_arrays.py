"""Test images out of an .npz: every layout that can be told, and nothing allocated on a head's word."""

import io
import zipfile

import numpy as np
import pytest
import torch

from gambeson.data.arrays import evaluation_images
from gambeson.data.npz import read_arrays
from gambeson.errors import UserError

KEYS = {"images": ("images",), "labels": ("labels",)}


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


LABELS = np.arange(6) % 3
COLOUR = pixels(6, 8, 7, 3)


@pytest.mark.parametrize(
    "images",
    [
        COLOUR,
        COLOUR.transpose(0, 3, 1, 2),
        (COLOUR / 255).astype(np.float32),
        (COLOUR / 255).transpose(0, 3, 1, 2),
        np.asfortranarray(COLOUR),
    ],
    ids=["uint8 NHWC", "uint8 NCHW", "float32 NHWC", "float64 NCHW", "by columns"],
)
def test_every_layout_gives_the_same_images(images, tmp_path):
    np.savez(tmp_path / "a.npz", images=images, labels=LABELS[:, None].astype(np.uint8))
    found = evaluation_images(tmp_path / "a.npz")
    torch.testing.assert_close(found.images, torch.from_numpy(COLOUR).permute(0, 3, 1, 2) / 255)
    assert found.labels.tolist() == LABELS.tolist()
    assert found.labels.dtype == torch.int64


def test_grey_images_and_a_single_class_are_taken(tmp_path):
    grey = pixels(6, 8, 7)
    np.savez_compressed(tmp_path / "a.npz", arr_0=grey, arr_1=np.full(6, 2))
    found = evaluation_images(tmp_path / "a.npz")
    assert found.images.shape == (6, 1, 8, 7)
    assert found.labels.tolist() == [2] * 6


def test_the_test_part_goes_first(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=COLOUR, y_train=LABELS, x_test=COLOUR[:2] // 2, y_test=LABELS[1:3])
    found = evaluation_images(tmp_path / "a.npz")
    assert found.labels.tolist() == [1, 2]
    torch.testing.assert_close(found.images[0], torch.from_numpy(COLOUR[0] // 2).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"images": COLOUR}, "labels: .*found images"),
        ({"x_test": COLOUR, "labels": LABELS}, "labels: y_test, .*found x_test, labels"),
        ({"pictures": COLOUR, "labels": LABELS}, "images: images, .*found pictures, labels"),
        ({"images": pixels(6, 3, 8, 3), "labels": LABELS}, r"got uint8 \[6, 3, 8, 3\]; which are the channels"),
        ({"images": pixels(6, 8, 8, 4), "labels": LABELS}, r"got uint8 \[6, 8, 8, 4\]"),
        ({"images": pixels(6, 64), "labels": LABELS}, r"got uint8 \[6, 64\]"),
        ({"images": COLOUR.astype(np.int64), "labels": LABELS}, "got int64"),
        ({"images": COLOUR.astype(np.uint16), "labels": LABELS}, "got uint16"),
        ({"images": COLOUR.astype(np.float32), "labels": LABELS}, r"in \[0, 1\], got 0 to 255; divide by 255"),
        ({"images": COLOUR / 255 - 0.1, "labels": LABELS}, r"in \[0, 1\], got -0\.1"),
        ({"images": np.full(COLOUR.shape, np.nan), "labels": LABELS}, r"in \[0, 1\], got nan"),
        ({"images": COLOUR, "labels": LABELS[:5]}, "whole number for each of 6 images"),
        ({"images": COLOUR, "labels": LABELS / 2}, "whole number for each of 6 images"),
        ({"images": COLOUR, "labels": LABELS - 1}, "classes from 0, got -1"),
        ({"images": COLOUR[:0], "labels": LABELS[:0]}, "at least one"),
    ],
)
def test_what_is_no_test_set_is_named(arrays, match, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=match):
        evaluation_images(tmp_path / "a.npz")


# ---- heads that lie ----


def member(shape, data=b"", kind="|u1", version=1):
    """An .npy that declares a shape and holds other bytes."""
    file = io.BytesIO()
    write = np.lib.format.write_array_header_1_0 if version == 1 else np.lib.format.write_array_header_2_0
    write(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def archive(path, images, compress=False):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as made:
        made.writestr("images.npy", images)
        made.writestr("labels.npy", member((2,), bytes(2)))
    return path


@pytest.mark.parametrize(
    ("shape", "data", "kind"),
    [
        ((50_000_000, 32, 32, 3), b"", "|u1"),
        ((2**62, 2**62, 4, 1), b"", "<f8"),
        ((2, 8, 8, 3), bytes(383), "|u1"),
        ((2, 8, 8, 3), bytes(385), "|u1"),
        ((-1, 8, 8, 3), bytes(384), "|u1"),
        ((-2, -8, 8, 3), bytes(384), "|u1"),
        ((2, 8, 8, 3), bytes(384), "<f4"),
    ],
)
def test_a_head_must_declare_what_is_there(shape, data, kind, tmp_path, monkeypatch):
    """Refused before a byte of it is allocated."""
    path = archive(tmp_path / "a.npz", member(shape, data, kind))
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("the array was read"))
    with pytest.raises(UserError, match=r"images: expected .* bytes that follow its head, got"):
        read_arrays(path, KEYS)


def test_honest_heads_of_both_versions_are_read(tmp_path):
    for version in (1, 2):
        path = archive(tmp_path / "a.npz", member((2, 2, 2, 3), bytes(range(24)), version=version))
        assert read_arrays(path, KEYS)["images"].flatten().tolist() == list(range(24))


def test_a_directory_that_lies_about_sizes_is_refused(tmp_path):
    """The zip's own directory says that 40 deflated bytes unpack to a gigabyte, and the head agrees with it."""
    head = member((2**28, 1, 1, 4))
    path = archive(tmp_path / "a.npz", head, compress=True)
    size, lie = (n.to_bytes(4, "little") for n in (len(head), len(head) + 2**30))
    data = path.read_bytes()
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(b"labels.npy"))
    start = data.rindex(b"PK\x01\x02", 0, data.rindex(b"images.npy"))
    assert data[start + 24 : start + 28] == size
    path.write_bytes(data[: start + 24] + lie + data[start + 28 :])
    assert place > start
    with pytest.raises(UserError, match="made to fill memory"):
        read_arrays(path, KEYS)


def test_arrays_that_take_more_than_half_of_the_free_memory_are_refused(tmp_path, monkeypatch):
    """Together, and as the float32 that bytes become: 4 x (384 + 2) bytes here."""
    path = archive(tmp_path / "a.npz", member((2, 8, 8, 3), bytes(384)))
    monkeypatch.setattr("gambeson.data.npz.available_memory", lambda: 2 * 4 * 386)
    assert read_arrays(path, KEYS)["images"].shape == (2, 8, 8, 3)
    monkeypatch.setattr("gambeson.data.npz.available_memory", lambda: 2 * 4 * 386 - 2)
    with pytest.raises(UserError, match=r"at most 1,543 bytes as float32, half of the memory .* got '1,544'"):
        read_arrays(path, KEYS)


def test_two_arrays_of_one_name_are_refused(tmp_path):
    path = archive(tmp_path / "a.npz", member((2, 8, 8, 3), bytes(384)))
    with zipfile.ZipFile(path, "a") as more:
        more.writestr("images", member((2, 8, 8, 3), bytes(384)))
    with pytest.raises(UserError, match="one of each name, got 'several called images'"):
        read_arrays(path, KEYS)


def test_images_without_pixels_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 0, 0, 3), dtype=np.uint8), labels=LABELS[:3])
    with pytest.raises(UserError, match="sides above 0"):
        evaluation_images(tmp_path / "a.npz")


def test_objects_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{1: 2}, None], dtype=object), labels=LABELS[:2])
    with pytest.raises(UserError, match=r"images: expected numbers or text, got Python objects"):
        evaluation_images(tmp_path / "a.npz")


def test_junk_is_named_without_unsafe_advice(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"a\.npz: expected an \.npz file, got a damaged or another one$"):
        evaluation_images(tmp_path / "a.npz")
