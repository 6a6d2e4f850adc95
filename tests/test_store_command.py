"""`gambeson store`: what it says of a store, what it makes of stores, and what it refuses."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gambeson import cli
from gambeson.data import reading
from gambeson.data.exchange import inspect, outgoing, stores
from gambeson.data.exchange.export import FORMATS
from gambeson.data.scores import ScoreWriter
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore, open_synthetic
from gambeson.errors import EnvironmentFault, UserError
from gambeson.store_command import COMMANDS, USAGE, store


def pixels(n: int, side: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def make_store(
    root: Path, n: int = 60, classes: int = 3, seed: int = 0, facts: bool = False, size: int = 10, channels: int = 3,
    first: int = 0, **provenance: object,
) -> SyntheticStore:  # fmt: skip
    """Blocks of `size` in shards of two of them; the classes come in turn."""
    images, labels = pixels(n, channels=channels, seed=seed), first + np.arange(n) % classes
    writer = StoreWriter(root=root, blocks=-(-n // size), blocks_per_shard=2)
    for block in range(writer.blocks):
        here = slice(block * size, block * size + size)
        writer.put(block, images[here], labels[here], {"guided": block + seed / 10} if facts else None)
    writer.finish(dict(provenance))
    return SyntheticStore.open(root)


def call(*words: object) -> None:
    store([str(word) for word in words])


def images_of(source: SyntheticStore | Chosen) -> np.ndarray:
    return source.read(np.arange(len(source)))[0]


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = [line for line in capsys.readouterr().out.splitlines() if len(line) > 19]
    return {line[:18].strip(): line[19:] for line in lines}


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_a_whole_store_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = make_store(tmp_path / "stage/images")
    Chosen.write_all(tmp_path / "stage/chosen.parquet", own)
    for place in ("stage", "stage/images", "stage/chosen.parquet"):
        call("verify", tmp_path / place)
        assert f"whole: 3 shards with 60 images, {tmp_path}/stage/images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["00001.npy", "00001.parquet"])
def test_the_first_damaged_shard_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "VERIFIED_AT_ONCE", -1)  # as if it were too large to be compared whenever it is opened
    make_store(tmp_path / "store")
    for number in (name, name.replace("1", "2")):
        path = tmp_path / "store/shards" / number
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(EnvironmentFault, match=rf"{name}: expected SHA-256 .* got ") as caught:
        call("verify", tmp_path / "store")
    assert caught.value.code == 3
    for words in (("merge", tmp_path / "store", tmp_path / "store"), ("export", tmp_path / "store", "--format", "edm")):
        with pytest.raises(EnvironmentFault, match=name):
            call(*words, "--out", tmp_path / "made.npz")
    (tmp_path / "store/shards" / name).unlink()
    with pytest.raises(EnvironmentFault, match=rf"{name}: .* no file"):
        call("verify", tmp_path / "store")


def test_scores_beside_the_images_are_looked_at_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = make_store(tmp_path / "store")
    scores = ScoreWriter(store=own, digest="0123abcd", scorer={"kind": "any"}, against=None)
    for shard in range(2):
        scores.put(shard, {"value": np.arange(20.0)})
    call("verify", tmp_path / "store")
    assert "note: " in (out := capsys.readouterr().out)
    assert "none of [2]" in out
    scores.put(2, {"value": np.arange(20.0)})
    call("verify", tmp_path / "store")
    assert "note: " not in capsys.readouterr().out
    call("stats", tmp_path / "store")
    assert told(capsys)["scores"] == "0123abcd"
    os.truncate(tmp_path / "store/scores/0123abcd/00001.parquet", 50)
    with pytest.raises(EnvironmentFault, match=r"0123abcd/00001\.parquet"):
        call("verify", tmp_path / "store")


def test_a_selection_that_points_beyond_its_store_is_found(tmp_path: Path) -> None:
    Chosen.write(tmp_path / "c.parquet", make_store(tmp_path / "store"), np.array([3, 60]), np.array([0, 0]))
    with pytest.raises(EnvironmentFault, match=r"selected positions 0 to 59, got 3 to 60"):
        call("verify", tmp_path / "c.parquet")


# ---- stats and show --------------------------------------------------------------------------------------------------


def test_stats_are_those_of_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = make_store(tmp_path / "store", licence="mit", additional_data=["a", "b"], class_names=["x", "y", "z"], made=7)
    call("stats", tmp_path / "store")
    found, images = told(capsys), pixels(60) / 255
    assert found["images"] == "60, 6 x 6, RGB"
    assert found["classes"] == "x: 20, y: 20, z: 20"
    assert found["mean"] == f"{', '.join(f'{m:.4f}' for m in images.mean((0, 1, 2)))} (of all of them)"
    assert found["std"].startswith(", ".join(f"{s:.4f}" for s in images.std((0, 1, 2))))
    assert (found["licence"], found["other real images"], found["made"]) == ("mit", "a, b", "7")
    size = sum(p.stat().st_size for p in (tmp_path / "store").rglob("*") if p.is_file())
    assert found["on disk"] == f"{size:,} bytes, {size / 60:,.1f} an image"
    assert (found["shards"], found["digest"]) == ("3", own.digest)


def test_stats_of_some_images_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_store(tmp_path / "store")
    monkeypatch.setattr(inspect, "RUN", 4)
    call("stats", tmp_path / "store", "--images", 12)
    assert "(of 12 of them, evenly spread)" in told(capsys)["mean"]
    found = inspect.statistics(own, 12)
    looked = pixels(60)[[*range(4), *range(28, 32), *range(56, 60)]] / 255
    assert np.allclose(found.mean, looked.mean((0, 1, 2)))
    assert np.allclose(found.std, looked.std((0, 1, 2)))
    Chosen.write(tmp_path / "c.parquet", own, np.array([5, 6, 7]), np.array([-1, 2, 2]))
    call("stats", tmp_path / "c.parquet")
    found = told(capsys)
    assert found["images"] == "3 selected of 60, 6 x 6, RGB"
    assert (found["without class"], found["classes"]) == ("1", "0: 0, 1: 0, 2: 2")
    assert (found["licence"], found["other real images"]) == ("not known", "not known")


@pytest.mark.parametrize("channels", [1, 3])
def test_show_draws_a_row_for_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str], channels: int) -> None:
    own, labels = make_store(tmp_path / "store", channels=channels), np.array([2, 2, 0, -1, 2, 2])
    Chosen.write(tmp_path / "c.parquet", own, np.array([9, 8, 7, 6, 5, 4]), labels)
    call("show", tmp_path / "c.parquet", "--per-row", 3, "--out", tmp_path / "grid.png")
    assert "rows: without a class, 0, 2" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    times = 64 // 6
    step = 6 * times + 2
    for row, column, image in ((0, 0, 6), (1, 0, 7), (2, 0, 9), (2, 1, 8), (2, 2, 5)):
        top, left = row * step + 2, column * step + 2
        tile = picture[top : top + 6 * times : times, left : left + 6 * times : times]
        assert np.array_equal(tile, np.broadcast_to(pixels(60, channels=channels)[image], (6, 6, 3)))
    assert (picture[2 : step + 2, step + 2 :] == 255).all()  # a class with fewer images
    assert len(picture) == 3 * step + 2


# ---- merge -----------------------------------------------------------------------------------------------------------


def test_merge_keeps_images_blocks_facts_and_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [
        make_store(tmp_path / "a", 40, facts=True, licence="mit", additional_data=["x"], class_names=["p", "q", "r"]),
        make_store(tmp_path / "b", 25, seed=1, facts=True, licence="cc0", additional_data=["y", "x"]),
    ]
    call("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "ab")
    assert "store: 65 images in 4 shards" in capsys.readouterr().out
    made = SyntheticStore.open(tmp_path / "ab").verify()
    assert np.array_equal(images_of(made), np.concatenate([pixels(40), pixels(25, seed=1)]))
    assert made.labels.tolist() == [*parts[0].labels, *parts[1].labels]
    facts = [made.facts_of(shard).to_pydict() for shard in range(len(made.rows))]
    assert [b for f in facts for b in f["block"]] == [i // 10 for i in range(65)]
    assert [g for f in facts for g in f["guided"]] == [i // 10 if i < 40 else (i - 40) // 10 + 0.1 for i in range(65)]
    kept = made.provenance
    assert (kept["licence"], kept["additional_data"], kept["class_names"]) == ("cc0; mit", ["x", "y"], ["p", "q", "r"])
    assert [m["digest"] for m in kept["merged"]] == [part.digest for part in parts]
    assert [m["provenance"] for m in kept["merged"]] == [part.provenance for part in parts]


def test_facts_that_one_part_lacks_are_not_a_number(tmp_path: Path) -> None:
    parts = [make_store(tmp_path / "a", 20, facts=True), make_store(tmp_path / "b", 20)]
    made = stores.merge(parts, tmp_path / "ab")
    guided = [g for shard in range(2) for g in made.facts_of(shard)["guided"].to_pylist()]
    assert guided[:20] == [0.0] * 10 + [1.0] * 10
    assert np.isnan(guided[20:]).all()


@pytest.mark.parametrize("sizes", [(10, 7), (10, 10)])
def test_blocks_of_several_sizes_are_cut_anew(
    tmp_path: Path, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one that is not the last has a short block; and selections have no blocks."""
    monkeypatch.setattr(stores, "BLOCK", 16)
    first, second = (
        make_store(tmp_path / "a", 33, size=sizes[0], facts=True),
        make_store(tmp_path / "b", 20, 3, 1, size=sizes[1]),
    )
    Chosen.write(tmp_path / "c.parquet", first, np.array([4, 2, 30]), np.array([0, 2, 1]))
    made = stores.merge([first, second, Chosen.open(tmp_path / "c.parquet")], tmp_path / "made").verify()
    both = stores.merge([first, second], tmp_path / "both").verify()
    assert np.array_equal(images_of(both), np.concatenate([pixels(33), pixels(20, seed=1)]))
    assert both.facts_of(0).column_names == ["label", "block", "index"]
    expected = np.concatenate([pixels(33), pixels(20, seed=1), pixels(33)[[4, 2, 30]]])
    assert np.array_equal(images_of(made), expected)
    assert made.labels.tolist() == [*first.labels, *second.labels, 0, 2, 1]
    assert made.facts_of(0)["block"].to_pylist() == [i // 16 for i in range(56)]


def test_a_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [make_store(tmp_path / "a", 60), make_store(tmp_path / "b", 60, seed=1)]
    straight, put, written = stores.merge(parts, tmp_path / "straight"), StoreWriter.put, []

    def breaking(writer: StoreWriter, block: int, *rest: object) -> None:
        if len(written) == 5:
            written.append(-1)
            raise KeyboardInterrupt
        written.append(block)
        put(writer, block, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreWriter, "put", breaking)
    with pytest.raises(KeyboardInterrupt):
        stores.merge(parts, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    with pytest.raises(UserError, match="unfinished work of the same command"):
        stores.merge(parts[::-1], tmp_path / "made")
    made = stores.merge(parts, tmp_path / "made").verify()
    assert written == [*range(5), -1, *range(5, 12)]
    assert made.digest == straight.digest
    assert sorted(os.listdir(tmp_path / "made")) == sorted(os.listdir(tmp_path / "straight"))


def test_merge_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    make_store(tmp_path / "a")
    make_store(tmp_path / "grey", channels=1)
    make_store(tmp_path / "four", classes=4)
    make_store(tmp_path / "named", class_names=["x", "y", "z"])
    make_store(tmp_path / "others", class_names=["x", "z", "y"])
    for second, message in (
        ("grey", r"stores with images of one shape .* got \[\(6, 6, 3\), \(6, 6, 1\)\]"),
        ("four", r"same number of classes, got labels up to \[2, 3\]; .* --classes 4"),
    ):
        with pytest.raises(UserError, match=message):
            call("merge", tmp_path / "a", tmp_path / second, "--out", tmp_path / "made")
    with pytest.raises(UserError, match=r"the same classes, got 3 \(x, y, z\) and 3 \(x, z, y\)"):
        call("merge", tmp_path / "named", tmp_path / "others", "--out", tmp_path / "made")
    with pytest.raises(UserError, match=r"labels of 3 classes, got 'labels up to 3'"):
        call("merge", tmp_path / "named", tmp_path / "four", "--out", tmp_path / "made")
    with pytest.raises(UserError, match="two stores or more"):
        call("merge", tmp_path / "a", "--out", tmp_path / "made")
    assert not (tmp_path / "made").exists()
    call("merge", tmp_path / "a", tmp_path / "four", "--classes", 4, "--out", tmp_path / "made")
    call("merge", tmp_path / "a", tmp_path / "named", "--out", tmp_path / "made2")
    assert SyntheticStore.open(tmp_path / "made2").provenance["class_names"] == ["x", "y", "z"]


# ---- split and sample ------------------------------------------------------------------------------------------------


def test_split_is_stratified_disjoint_and_repeatable(tmp_path: Path) -> None:
    own = make_store(tmp_path / "store", 60)
    call("split", tmp_path / "store", "--parts", "0.8,0.2", "--out", tmp_path / "s")
    parts = [open_synthetic(tmp_path / f"s/part-{i}") for i in range(2)]
    assert [np.bincount(part.labels).tolist() for part in parts] == [[16] * 3, [4] * 3]
    positions = [part.positions.tolist() for part in parts if isinstance(part, Chosen)]
    assert sorted(np.concatenate(positions).tolist()) == list(range(60))
    assert positions == [sorted(p) for p in positions]
    assert np.array_equal(images_of(parts[1]), pixels(60)[positions[1]])
    assert parts[1].labels.tolist() == own.labels[positions[1]].tolist()
    assert not list((tmp_path / "s").rglob("store.json"))
    again = stores.split(own, [0.8, 0.2], 0)
    assert [p.tolist() for p in again] == positions
    assert stores.split(own, [0.8, 0.2], 1)[1].tolist() != positions[1]
    (tmp_path / "moved").mkdir()
    for name in ("store", "s"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert np.array_equal(images_of(open_synthetic(tmp_path / "moved/s/part-1")), pixels(60)[positions[1]])


def test_split_and_sample_of_a_selection_keep_its_labels_and_copies_are_stores(tmp_path: Path) -> None:
    own, places = make_store(tmp_path / "store"), np.arange(59, -1, -2)
    Chosen.write(tmp_path / "c.parquet", own, places, np.arange(30) % 2 - 1)
    call("split", tmp_path / "c.parquet", "--parts", "0.5,0.25", "--out", tmp_path / "s")
    call("split", tmp_path / "c.parquet", "--parts", "0.5,0.25", "--out", tmp_path / "copied", "--copy")
    for part, count in (("part-0", 15), ("part-1", 7)):
        index, copied = open_synthetic(tmp_path / "s" / part), open_synthetic(tmp_path / "copied" / part)
        assert isinstance(index, Chosen)
        assert isinstance(copied, SyntheticStore)
        assert abs(len(index) - count) <= 1
        assert set(index.positions.tolist()) <= set(places.tolist())
        assert np.array_equal(images_of(index), images_of(copied))
        assert index.labels.tolist() == copied.labels.tolist()
        label_of = dict(zip(places.tolist(), (np.arange(30) % 2 - 1).tolist(), strict=True))
        assert index.labels.tolist() == [label_of[p] for p in index.positions.tolist()]
        assert copied.provenance["copied"]["digest"]
    call("sample", tmp_path / "c.parquet", "--images", 9, "--out", tmp_path / "nine", "--copy")
    assert len(SyntheticStore.open(tmp_path / "nine").verify()) == 9


def test_sample_draws_every_image_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = make_store(tmp_path / "store")
    monkeypatch.setattr(stores, "ROWS", 16)  # the last part is smaller
    drawn = [stores.sample(own, 12, seed) for seed in range(500)]
    assert all(len(set(d.tolist())) == 12 and (np.diff(d.astype(int)) > 0).all() for d in drawn)
    often = np.bincount(np.concatenate(drawn), minlength=60)
    assert ((often - 100) ** 2 / 80).sum() < 100  # chi squared of 59 degrees: 100 has a p of 7e-4
    call("sample", tmp_path / "store", "--images", 5, "--per-class", "--seed", 3, "--out", tmp_path / "five")
    found = open_synthetic(tmp_path / "five")
    assert np.bincount(found.labels).tolist() == [5, 5, 5]
    assert stores.sample(own, 60, 0).tolist() == list(range(60))
    for words, message in (
        ((61,), r"--images: expected 1 to 60, as many as there are, got 61"),
        ((21, "--per-class"), "at most 20, as many as each class has, got 21"),
        ((0,), "a whole number above 0"),
    ):
        with pytest.raises(UserError, match=message):
            call("sample", tmp_path / "store", "--images", *words, "--out", tmp_path / "none")


@pytest.mark.parametrize("parts", ["", "0.5,x", "0.5,0.6", "-0.1,0.5", "0.001,0.5", "nan"])
def test_shares_that_are_none_are_refused(tmp_path: Path, parts: str) -> None:
    make_store(tmp_path / "store")
    with pytest.raises(UserError, match="--parts: expected shares"):
        call("split", tmp_path / "store", "--parts", parts, "--out", tmp_path / "s")
    assert os.listdir(tmp_path) == ["store"]


# ---- import and export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_out_and_in_again(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = make_store(tmp_path / "store", licence="mit")
    place = tmp_path / {"edm": "set.npz", "cdp": "set.npz", "port": "set.bin"}.get(form, "set")
    call("export", tmp_path / "store", "--format", form, "--out", place)
    assert f"{form}: 60 images, {place}" in capsys.readouterr().out
    call("import", place, "--out", tmp_path / "back", "--additional-data", "z, a,")
    assert f"store: 60 images in 1 shards, {tmp_path}/back" in capsys.readouterr().out
    back = SyntheticStore.open(tmp_path / "back").verify()
    assert np.array_equal(images_of(back), pixels(60))
    assert back.labels.tolist() == own.labels.tolist()
    assert (back.provenance["licence"], back.provenance["additional_data"]) == ("mit", ["a", "z"])
    assert sorted(os.listdir(tmp_path / "back")) == ["README.md", "labels.npy", "shards", "store.json"]
    for words in (("export", tmp_path / "store", "--format", form, "--out", place), ("import", place, "--out", place)):
        with pytest.raises(UserError, match="--out: expected a path where nothing lies yet"):
            call(*words)


def test_what_proves_wrong_on_the_way_in_leaves_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", image=pixels(30), label=np.repeat([0, -2], 15))
    with pytest.raises(UserError, match="expected labels 0 to"):
        call("import", tmp_path / "x.npz", "--out", tmp_path / "made")
    assert os.listdir(tmp_path) == ["x.npz"]


def test_import_takes_a_shape_and_a_licence(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(pixels(12).tobytes())
    np.save(tmp_path / "x.npy", np.zeros(12, int))
    words = ("import", tmp_path / "x.bin", "--out", tmp_path / "made", "--shape")
    for shape, message in (("9,6", "height, width and channels"), ("5,6,3", "of 5 x 6 x 3 bytes")):
        with pytest.raises(UserError, match=message):
            call(*words, shape)
    call(*words, "9,4,3", "--licence", "CC BY 4.0")
    made = SyntheticStore.open(tmp_path / "made")
    assert made.shape == (9, 4, 3)
    assert made.provenance["licence"] == "CC BY 4.0"
    assert "9 x 4 x 3" in made.provenance["assumed"]


# ---- words -----------------------------------------------------------------------------------------------------------


def test_help_and_odd_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "store")
    for words in ((), ("--help",), ("merge", "-h")):
        call(*words)
        assert capsys.readouterr().out == f"{USAGE}\n"
    assert all(f"  {name} " in USAGE for name in COMMANDS)
    for words, message in (
        (("verfy", "x"), r"unknown command of gambeson store: expected one of verify, .*got 'verfy'"),
        (("verify",), "expected one store .* got ''"),
        (("verify", tmp_path / "store", "more"), "expected one store"),
        (("verify", tmp_path / "none"), "got nothing there"),
        (("verify", tmp_path / "store", "--fast"), "options that gambeson store --help lists, got '--fast'"),
        (("export", tmp_path / "store", "--format", "zip", "--out", tmp_path / "o"), "unknown format: .* got 'zip'"),
        (("export", tmp_path / "store", "--out", tmp_path / "o"), "--format: expected one of edm"),
        (("merge", tmp_path / "store", tmp_path / "store"), "--out: expected where the result goes"),
        (("import", tmp_path / "store", "--out", tmp_path / "o"), r"synthetic.path: expected a file \(.npz or .bin"),
        (("split", tmp_path / "store", "--seed", "x", "--out", tmp_path / "o"), "--seed: expected a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            call(*words)
    np.savez(tmp_path / "x.npz", image=pixels(3), label=np.zeros(3, int))
    with pytest.raises(UserError, match=r"first: gambeson store import .*x\.npz"):
        call("stats", tmp_path / "x.npz")
    assert sorted(os.listdir(tmp_path)) == ["store", "x.npz"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    np.savez(tmp_path / "x.npz", image=pixels(3), label=np.zeros(3, int))
    out = ("--out", tmp_path / "x.npz/below")
    for words in (
        ("merge", tmp_path / "store", tmp_path / "store"),
        ("split", tmp_path / "store", "--parts", "0.5,0.5"),
        ("sample", tmp_path / "store", "--images", 3),
        ("import", tmp_path / "x.npz"),
        ("export", tmp_path / "store", "--format", "parquet"),
        ("show", tmp_path / "store"),
    ):
        with pytest.raises(EnvironmentFault, match=r"x\.npz.*expected (a folder I may write to|to write)"):
            call(*words, *out)


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "store", store)
    make_store(tmp_path / "store")
    assert cli.main(["store", "verify", str(tmp_path / "store")]) == 0
    assert cli.main(["store", "verify", str(tmp_path / "none")]) == 2
    os.truncate(tmp_path / "store/shards/00002.npy", 300)
    assert cli.main(["store", "verify", str(tmp_path / "store")]) == 3
    assert "00002.npy: expected" in capsys.readouterr().err


def test_selections_that_are_empty_are_refused(tmp_path: Path) -> None:
    own = make_store(tmp_path / "store")
    empty = Chosen(own, np.empty(0, np.int64), np.empty(0, np.int64))
    for work in (lambda: stores.merge([own, empty], tmp_path / "m"), lambda: outgoing.Outgoing(empty)):
        with pytest.raises(UserError, match="at least one"):
            work()
    assert json.loads((tmp_path / "store/store.json").read_text())["rows"] == [20, 20, 20]
