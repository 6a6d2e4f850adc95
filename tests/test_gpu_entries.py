"""The scripts of benchmarks/gpu in their tiny form on a CPU: they finish, keep their rows, and stop in time."""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "gpu"))

import autoattack
import denoisers
import entry
import table2
import ten_minutes
import throughput
import trades
import unpack

from gambeson.errors import UserError
from gambeson.models.denoiser import load_denoiser
from gambeson.models.files import load_tensors
from gambeson.models.unet import UNetSpec
from gambeson.store import RESUME
from gambeson.training.diffusion import train_denoiser

ENTRIES = {
    "throughput": (throughput, []),
    "trades": (trades, []),
    "autoattack": (autoattack, ["--images", "4", "--slice", "2", "--rows", "reference,ours"]),
    "ten_minutes": (ten_minutes, ["--arm", "both"]),
    "denoisers": (denoisers, ["--set", "cifar10"]),
    "table2": (table2, ["--only", "real", "guided"]),
}


def _tiny(name, out, *words):
    module, more = ENTRIES[name]
    return module.main(["--tiny", "--device", "cpu", "--out", str(out), *more, *words])


@pytest.mark.parametrize("name", list(ENTRIES))
def test_an_entry_ends_with_its_last_line_and_does_nothing_twice(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "back"))
    (tmp_path / "back").mkdir()
    told = _tiny(name, tmp_path / "out")
    assert told["whole"], told["stopped"]
    assert entry.NOT_YET not in told["rows"].values()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(told))
    begun = time.process_time()
    assert _tiny(name, tmp_path / "out")["rows"] == told["rows"]  # seconds and all: kept, not made
    assert time.process_time() - begun < 3
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {name for name in names if name.endswith("-last.json")}
    if name == "denoisers":
        _check_denoiser(tmp_path / "back", told["rows"])
    if name == "ten_minutes":
        assert set(told["rows"]["training"]["seconds"]) == {"train_denoiser", "generate", "train_classifier"}
        assert told["rows"]["training"]["within"]


def _check_denoiser(folder, rows):
    path = folder / "denoiser-cifar10.safetensors"
    assert path.stat().st_size == rows["weights"]["bytes"]
    assert 0 < rows["weights"]["rounding"] < 0.02
    assert load_denoiser(path).shape == (1, 8, 8)
    card = (folder / "denoiser-cifar10.md").read_text()
    assert denoisers.TERMS["cifar10"] in card
    assert "copies of train" in card
    with Image.open(folder / "denoiser-cifar10.png") as grid:
        assert grid.size == (12 * 8, 10 * 8)


def test_time_that_is_over_is_said_and_leaves_a_table(tmp_path):
    told = _tiny("table2", tmp_path, "--seconds", "-1")
    assert (told["whole"], told["rows"]) == (False, dict.fromkeys(("real", "guided"), entry.NOT_YET))
    words = Namespace(device="cpu", tiny=True, out=tmp_path, data=tmp_path, seconds=5.0)
    stopped = entry.run("none", words, lambda e, w: e.row("long", dict, needs=60.0), ["long"])
    assert (stopped["stopped"][:14], stopped["rows"]) == ("long needs abo", {"long": entry.NOT_YET})


def test_a_training_goes_on_where_the_time_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("GAMBESON_CHECKPOINT_SECONDS", "-1")  # the state is kept after every step
    given = {"name": "some", "device": "cpu", "tiny": True, "out": tmp_path, "data": tmp_path}
    left = iter([1.0, 1.0])

    class Hurried(entry.Entry):
        left = property(lambda self: next(left, -1.0))

    whole, words = entry.Entry(**given, ends=time.monotonic() + 600), Namespace(batch=512, rate=1e-3, augment=0)
    spec = denoisers.denoiser_of(whole, words)
    spec = ten_minutes.with_steps(spec, 6)
    with pytest.raises(entry.OutOfTime, match="train_denoiser: 3 of 6 done"):
        Hurried(**given, ends=0.0).once(train_denoiser, spec, whole.images(), seed=0)
    (kept,) = tmp_path.rglob(RESUME)
    assert load_tensors(kept)[1]["step"] == 2
    made = whole.once(train_denoiser, spec, whole.images(), seed=0)
    assert made.record["attempts"] == 2
    assert entry.seconds_of(made, made) >= entry.seconds_of(made) > 0


def test_rows_of_other_options_are_not_taken_over(tmp_path):
    def one(e, w):
        return e.row("a", lambda: {"value": w.value})

    words = {"device": "cpu", "tiny": True, "out": tmp_path, "data": tmp_path, "seconds": 60.0}
    assert entry.run("some", Namespace(**words, value=1), one, ["a"])["rows"]["a"]["value"] == 1
    with pytest.raises(UserError, match="another --out"):
        entry.run("some", Namespace(**words, value=2), one, ["a"])


def test_steps_fill_the_seconds_with_some_to_spare():
    assert entry.steps_within(100.0, {"seconds_a_step": 0.5, "seconds_besides": 5.0}) == 180
    assert entry.steps_within(100.0, {"seconds_a_step": 0.5, "seconds_besides": 5.0}, most=7) == 7
    with pytest.raises(UserError, match="more than 5 s"):
        entry.steps_within(4.0, {"seconds_a_step": 0.5, "seconds_besides": 5.0})


def test_the_denoisers_are_small_enough_to_give_away():
    class Big:
        tiny = False

    words = Namespace(batch=512, rate=1e-3, augment=1)
    for classes in (10, 43):
        spec = denoisers.denoiser_of(Big(), words)
        with torch.device("meta"):
            count = sum(p.numel() for p in spec._network.build(3, classes).parameters())
        assert count <= denoisers.PARAMETERS
        assert 2 * count + 20_000 <= denoisers.BYTES  # beside the header
    assert isinstance(spec.network, UNetSpec)


def test_shards_add_up_whatever_call_they_came_with(tmp_path):
    draw, data = np.random.default_rng(0), tmp_path / "data"
    images = draw.integers(0, 256, (1200, 32, 32, 3), dtype=np.uint8)
    labels, tracks = np.repeat([0, 1, 14], 400).astype(np.uint8), np.repeat(np.arange(24), 50).astype(np.uint8)
    meta = {"labels": labels, "track": tracks, "class_names": np.array([f"sign {k}" for k in range(15)])}
    for call, shards in enumerate([[2], [0, 1]]):
        folder = tmp_path / f"call{call}" / "gtsrb_train"
        folder.mkdir(parents=True)
        np.savez(folder / "meta.npz", **meta)
        for shard in shards:
            part = images[500 * shard : 500 * shard + 500]
            Image.fromarray(part.reshape(-1, 32, 3)).save(folder / f"{shard:03d}.webp", lossless=True)
        counts = unpack.main([str(tmp_path / f"call{call}"), str(data)])
        rows = np.arange(1000, 1200) if call == 0 else np.arange(1200)
        assert counts == {"gtsrb_train": len(rows)}
        with np.load(data / "gtsrb_train.npz") as found:
            np.testing.assert_array_equal(found["images"], images[rows])
            np.testing.assert_array_equal(found["labels"], labels[rows])
            np.testing.assert_array_equal(found["tracks"], tracks[rows])


def test_traffic_signs_are_held_out_sign_by_sign(tmp_path):
    labels = np.repeat(np.arange(15), 60)
    tracks = np.tile(np.repeat(np.arange(4), 15), 15)
    tracks[(labels == 14) & (tracks == 3)] = 23  # the sign that is in the test part too
    images = np.zeros((900, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = labels, tracks
    names = np.array([f"sign {k}" for k in range(15)])
    np.savez(tmp_path / "gtsrb_train.npz", images=images, labels=labels, tracks=tracks, class_names=names)
    shown = images[::60].copy()
    shown[:, 1, 1] = 9
    shown[14] = images[(labels == 14) & (tracks == 23)][0]
    np.savez(tmp_path / "gtsrb_test.npz", images=shown, labels=labels[::60])
    found = entry.traffic_signs(tmp_path)
    signs = {}
    for name in ("train", "validation"):
        part = getattr(found, name)
        marks = (255 * part.images[:, :2, 0, 0]).round().long()
        assert torch.equal(marks[:, 0], part.labels)
        signs[name] = {tuple(mark) for mark in marks.tolist()}
    assert not signs["train"] & signs["validation"]
    assert (14, 23) not in signs["train"] | signs["validation"]
    assert {label for label, _ in signs["validation"]} == set(range(15))
    assert (found.flip_safe, len(found.class_names), len(found.test)) == (False, 15, 15)
