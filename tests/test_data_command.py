"""`gambeson data`: lists, downloads from a site of our own, checks and shows image sets."""

import dataclasses
import hashlib
import io
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from local_site import CONTENT, DIGEST, Site
from PIL import Image
from rich.console import Console

from gambeson import data_command
from gambeson.data.catalogue import CATALOGUE, Published
from gambeson.data.datasets import Digits
from gambeson.data.imageset import ImageSet, Split
from gambeson.data_command import Transfers, data, problems, table
from gambeson.errors import EnvironmentFault, UserError


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path))
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, site: Site, name: str = "cifar10") -> tuple[Published, ...]:
    """A catalogue whose set `name` has an usual file and a further one without checksum, both on our site."""
    held = CATALOGUE[name]
    files = tuple(
        dataclasses.replace(
            held.files[0], name=f"{i}.bin", urls=(site.url,), checksum=checksum, size=len(CONTENT), usual=i == 0
        )
        for i, checksum in enumerate((f"sha256:{DIGEST}", None))
    )
    monkeypatch.setitem(CATALOGUE, name, dataclasses.replace(held, files=files))
    return files


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    data(list(words))
    return capsys.readouterr().out


def test_the_list_says_what_is_here(
    root: Path, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = stand_in(monkeypatch, site)
    lines = said(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines[1:8]] == list(CATALOGUE)
    assert lines[1].split()[:4] == ["cifar10", "300", "kB", "no"]
    assert lines[5].split()[:4] == ["svhn", "246", "MB", "no"]
    assert f"data root: {root}" in lines
    (root / "mnist").mkdir()
    (root / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"anything")
    (root / "mnist" / "t10k-images-idx3-ubyte.gz.part").write_bytes(bytes(1_000_000))
    files[0].path(root).parent.mkdir()
    files[0].path(root).write_bytes(CONTENT)
    lines = said(capsys, "list").splitlines()
    assert lines[1].split()[:4] == ["cifar10", "300", "kB", "yes"]
    assert "1 of 4 files, 1.0 MB more" in said(capsys, "list")


def test_a_sets_own_list_has_checksums_sources_and_terms(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "list", "gtsrb", "svhn")
    for held in (CATALOGUE["gtsrb"], CATALOGUE["svhn"]):
        for known in (held.licence, held.citation, held.terms, held.homepage):
            assert known in text
        for file in held.files:
            assert f"    {file.checksum or 'no checksum is published'} (source: {file.source})" in text
            assert file.urls[0] in text
    assert "extra_32x32.mat: 1.3 GB, with --all; not here" in text


def test_get_downloads_once_and_says_what_vouches_for_it(
    root: Path, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, site)
    text = said(capsys, "get", "cifar10")
    assert "cifar10: licence: none stated" in text
    assert f"{root / 'cifar10' / '0.bin'} (sha256 as published)" in text
    assert (root / "cifar10" / "0.bin").read_bytes() == CONTENT
    assert not (root / "cifar10" / "1.bin").exists()
    assert said(capsys, "get", "cifar10") == text
    assert site.asked == [None]
    text = said(capsys, "get", "cifar10", "--all")
    assert (
        f"{root / 'cifar10' / '1.bin'} (no checksum is published, so it was not checked; it has sha256:{DIGEST}" in text
    )
    assert site.asked == [None, None]


def test_data_root_wins_over_the_environment(
    root: Path, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, site)
    elsewhere = root / "elsewhere"
    said(capsys, "get", "cifar10", "--data-root", str(elsewhere))
    assert (elsewhere / "cifar10" / "0.bin").read_bytes() == CONTENT


def test_a_file_in_the_root_itself_is_found_and_checked(
    root: Path, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, site)
    (root / "0.bin").write_bytes(CONTENT)
    assert f"{root / '0.bin'} (sha256 as published)" in said(capsys, "get", "cifar10")
    (root / "0.bin").write_bytes(CONTENT + b"!")
    with pytest.raises(UserError, match=r"0\.bin: expected 0\.bin of cifar10 with sha256"):
        data(["get", "cifar10"])
    assert site.asked == []
    (root / "t10k-labels-idx1-ubyte.gz").write_bytes(b"MNIST's or Fashion-MNIST's?")
    assert "1 of 4" not in said(capsys, "list")


def test_names_are_known_before_anything_is_downloaded(root: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, site)
    wrong = [
        (["get", "cifar10", "cifar11"], r"unknown data set to download: expected one of cifar10"),
        (["get", "digits", "cifar10"], "digits comes with scikit-learn"),
        (["get", "cifar10-16"], "others from their owners"),
        (["get", "cifar10", "--everything"], "--everything"),
        (["get"], "a name"),
        (["check"], "a name"),
        (["show"], "an image set first"),
        (["show", "--data.train_images", "3"], "an image set first"),
        (["gte", "cifar10"], "unknown action of gambeson data: expected one of get"),
        (["list", "nothing"], "unknown data set"),
        (["get", "hf:nothing"], "hf:ORGANISATION/NAME"),
    ]
    for words, message in wrong:
        with pytest.raises(UserError, match=message):
            data(words)
    assert site.asked == []


def test_check_computes_and_names_what_differs(
    root: Path, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, site)
    with pytest.raises(UserError, match="found none; `gambeson data get cifar10`"):
        data(["check", "cifar10"])
    said(capsys, "get", "cifar10", "--all")
    text = said(capsys, "check", "cifar10")
    assert "0.bin: sha256 as published" in text
    assert "1.bin: no checksum is published" in text
    place = root / "cifar10" / "0.bin"
    state = place.stat()
    place.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    os.utime(place, ns=(state.st_atime_ns, state.st_mtime_ns))  # what is kept beside the file would still say yes
    found = hashlib.sha256(place.read_bytes()).hexdigest()
    with pytest.raises(EnvironmentFault, match=rf"0\.bin.*sha256:{DIGEST}, got sha256:{found}"):
        data(["check", "cifar10"])
    assert "0.bin: DIFFERS" in capsys.readouterr().out


def test_only_get_touches_the_network(
    root: Path, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, site)
    said(capsys, "get", "cifar10")

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for words in (["list"], ["list", "svhn"], ["check", "cifar10"], ["show", "digits"], ["get", "cifar10"], []):
        assert said(capsys, *words)
    (root / "cifar10" / "0.bin").unlink()
    with pytest.raises(AssertionError, match="network"):
        data(["get", "cifar10"])


def imageset(train: list[int], test: list[int], **parts: Any) -> ImageSet:
    """Images of 2 x 2 pixels, all different, with these labels of two classes."""
    count = len(train) + len(test) + 2
    pixels = torch.arange(count * 4).reshape(count, 1, 2, 2).float() / 255
    ends = [len(train), len(train) + 2]
    whole = {
        "train": Split(pixels[: ends[0]], torch.tensor(train)),
        "validation": Split(pixels[ends[0] : ends[1]], torch.tensor([0, 1])),
        "test": Split(pixels[ends[1] :], torch.tensor(test)),
    }
    return ImageSet(name="small", **(whole | parts), class_names=("cat", "dog"), flip_safe=True)


def test_a_set_without_problems_has_none() -> None:
    assert problems(imageset([0, 0, 1], [0, 1])) == []


def test_problems_are_named_with_examples() -> None:
    good = imageset([0, 1, 1], [0, 1])
    images = good.train.images.clone()
    images[0] = images[2]
    assert problems(dataclasses.replace(good, train=Split(images, good.train.labels))) == [
        "train: images that are there already: 1",
        "train: images labelled in two ways: 1 (cat and dog)",
    ]
    leaking = Split(torch.cat([good.train.images[1:2], good.test.images[:1]]), good.test.labels)
    assert problems(dataclasses.replace(good, test=leaking)) == ["test: images that are in train too: 1 (0 = 1)"]
    again = dataclasses.replace(
        good, train=Split(images, torch.tensor([1, 0, 1])), test=Split(images[:1], leaking.labels[:1])
    )
    assert problems(again)[1] == "test: images that are in train too: 1 (0 = 0)"
    flat = Split(torch.stack([good.test.images[0], torch.full((1, 2, 2), 0.5)]), good.test.labels)
    assert problems(dataclasses.replace(good, test=flat)) == ["test: images of one brightness: 1 (number 1)"]
    assert problems(imageset([0] * 5, [0, 1])) == ["train: no image of dog"]
    assert problems(imageset([0] * 20 + [1] * 2, [0, 1])) == []
    assert problems(imageset([0] * 21 + [1] * 2, [0, 1])) == ["train: 21 images of cat, 2 of dog"]


def test_the_table_counts_every_class_in_every_part() -> None:
    lines = table(imageset([0, 0, 1], [1, 1]))
    assert lines[0] == "small: 7 images of 2 x 2 pixels, grey, 2 classes, mirrored images keep their class"
    assert [line.split() for line in lines[1:5]] == [
        ["class", "train", "valid.", "test"],
        ["cat", "2", "1", "0"],
        ["dog", "1", "1", "2"],
        ["all", "3", "2", "2"],
    ]
    many = dataclasses.replace(imageset([0, 1], [0, 1]), class_names=tuple(map(str, range(60))))
    assert "... and 10 more classes" in table(many)
    assert len(table(many)) == 2 + 50 + 3


def test_show_reads_a_folder_with_its_fields(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (root / "mine" / kind).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "mine" / kind / f"{i}.png")
    text = said(capsys, "show", str(root / "mine"), "--data.size", "8")
    assert "20 images of 8 x 8 pixels, colour, 2 classes" in text
    assert "nothing looks wrong" in text
    with pytest.raises(UserError, match=r"unknown option --data\.sizes"):
        data(["show", str(root / "mine"), "--data.sizes", "8"])
    with pytest.raises(UserError, match="nothing-here"):
        data(["show", str(root / "nothing-here")])


def test_show_lists_what_the_door_says(
    monkeypatch: pytest.MonkeyPatch, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Digits(train_images=20, validation_images=10).load()

    def load(_: Digits) -> ImageSet:
        warnings.warn("left out 1 of 7 pictures: x.png (palette)", UserWarning, stacklevel=1)
        return real

    monkeypatch.setattr(Digits, "load", load)
    text = said(capsys, "show", "digits")
    assert "looks wrong:\n  left out 1 of 7 pictures: x.png (palette)" in text


def test_downloads_are_shown_on_a_terminal_and_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Transfers(terminal) as screen:
        show = screen.of("file.bin")
        show(100_000, 300_000)
        show(300_000, 300_000)
    assert isinstance(terminal.file, io.StringIO)
    assert "300.0/300.0 kB" in terminal.file.getvalue()
    monkeypatch.setattr(data_command, "PATIENCE", 0.0)
    log = Console(file=io.StringIO(), force_terminal=False, width=40)
    with Transfers(log) as screen:
        show = screen.of("file.bin")
        show(100_000, 300_000)
        show(200_000, 300_000)
        show(200_000, None)
    assert isinstance(log.file, io.StringIO)
    lines = log.file.getvalue().splitlines()
    assert lines[0] == "file.bin: 100 kB of 300 kB, 0 B/s"
    assert lines[1].startswith("file.bin: 200 kB of 300 kB, ")
    assert lines[1].endswith(" s left")
    assert lines[2].startswith("file.bin: 200 kB of ?")


def test_usage_is_printed_without_an_action(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["get", "--help"], ["show", "--help"], ["list", "-h"]):
        assert said(capsys, *words).startswith("usage: gambeson data list")


def test_show_help_lists_the_fields_of_the_door() -> None:
    code = "from gambeson.data_command import data; data(['show', 'digits', '--help'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--data.train_images" in out
