"""MATLAB's files of version 5: numbers as scipy reads them, and damage answered at every byte."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from gambeson.data.archives import DAMAGE
from gambeson.data.matlab import arrays, variables

KINDS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


@pytest.mark.parametrize("packed", [False, True])
def test_numbers_are_as_scipy_reads_them(packed: bool, tmp_path: Path) -> None:
    """All ten kinds, of two and four sides; short ones stand in their tags; cells and text are listed, not read."""
    drawn = np.random.default_rng(0)
    numbers = {f"n{kind}": drawn.integers(0, 100, (3, 2, 2, 2)).astype(kind) for kind in KINDS}
    numbers |= {f"s{kind}": np.array([[7]], kind) for kind in KINDS}
    others = {"text": "hello", "cells": np.array([{"a": 1}], object), "imaginary": np.array([1j])}
    savemat(tmp_path / "a.mat", {**others, **numbers}, do_compression=packed)
    there = {variable.name: variable for variable in variables(tmp_path / "a.mat")}
    assert set(there) == {*numbers, *others}
    assert {there[name].kind for name in others} == {"other"}
    found = arrays(tmp_path / "a.mat", [there[name] for name in numbers])
    expected = loadmat(tmp_path / "a.mat")
    for name, array in numbers.items():
        assert np.array_equal(found[name], expected[name])
        assert np.array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def element(order: str, kind: int, content: bytes) -> bytes:
    return struct.pack(f"{order}II", kind, len(content)) + content + bytes(-len(content) % 8)


@pytest.mark.parametrize(("order", "mark"), [("<", b"IM"), (">", b"MI")])
@pytest.mark.parametrize("packed", [False, True])
def test_either_byte_order_by_hand(order: str, mark: bytes, packed: bool, tmp_path: Path) -> None:
    """A 2 x 2 double kept in bytes, as MATLAB does with whole numbers: 1 2 / 3 4, column after column."""
    parts = [
        (6, struct.pack(f"{order}II", 6, 0)),
        (5, struct.pack(f"{order}ii", 2, 2)),
        (1, b"y"),
        (2, bytes([1, 3, 2, 4])),
    ]
    whole = element(order, 14, b"".join(element(order, kind, content) for kind, content in parts))
    if packed:
        content = zlib.compress(whole)
        whole = struct.pack(f"{order}II", 15, len(content)) + content
    path = tmp_path / "a.mat"
    path.write_bytes(bytes(126) + mark + whole)
    (found,) = variables(path)
    assert (found.name, found.shape, found.kind) == ("y", (2, 2), "double")
    assert arrays(path, [found])["y"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert arrays(path, [found])["y"].dtype == np.float64


def test_every_cut_and_many_flips_are_damage_or_data(tmp_path: Path) -> None:
    """Cut anywhere but after a variable: one of the errors that doors answer. A flipped byte: that, or other data."""
    savemat(tmp_path / "a.mat", {"X": np.zeros((2, 2, 3, 1), np.uint8), "y": np.ones((1, 1))})
    whole, path = (tmp_path / "a.mat").read_bytes(), tmp_path / "b.mat"
    first = 128 + 8 + struct.unpack("<I", whole[132:136])[0]
    for cut in range(128, len(whole)):
        path.write_bytes(whole[:cut])
        if cut in (128, first):
            assert len(variables(path)) == (cut == first)
        else:
            with pytest.raises(DAMAGE):
                variables(path)
    for place in range(128, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            arrays(path, variables(path))
        except DAMAGE:
            continue


def test_more_than_the_shape_says_is_not_unpacked(tmp_path: Path) -> None:
    """A variable of one number that unpacks to 100 MB."""
    head = [(6, struct.pack("<II", 9, 0)), (5, struct.pack("<ii", 1, 1)), (1, b"y")]
    inner = b"".join(element("<", kind, content) for kind, content in head) + struct.pack("<II", 2, 100 << 20)
    content = zlib.compress(struct.pack("<II", 14, len(inner) + (100 << 20)) + inner + bytes(100 << 20))
    path = tmp_path / "a.mat"
    path.write_bytes(bytes(126) + b"IM" + struct.pack("<II", 15, len(content)) + content)
    with pytest.raises(ValueError, match="at most"):
        arrays(path, variables(path))
