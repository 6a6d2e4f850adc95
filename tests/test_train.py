"""`gambeson train` as its users meet it: alone, with others' images, killed and resumed, in two processes, mistaken."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gambeson.cli import main
from gambeson.data.datasets import Digits
from gambeson.models import from_pretrained
from gambeson.models.files import load_tensors
from gambeson.store import RESUME

ROOT = Path(__file__).parent.parent
SHORT = [
    *(
        "--threat",
        "linf:0.15",
        "--workers",
        "1",
        "--classifier.network",
        "ResNetSpec",
        "--classifier.network.width",
        "4",
    ),
    *("--classifier.optimisation.steps", "6", "--classifier.optimisation.batch_size", "32"),
    *("--classifier.validations", "3", "--classifier.validation_steps", "2", "--data.validation_images", "50"),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GAMBESON_DATA", raising=False)


def run(*words: str) -> int:
    return main(["train", *words])


def weights(runs: Path) -> dict[str, torch.Tensor]:
    """The weights of the one training below a runs folder."""
    (path,) = runs.glob("stages/train_classifier/*/classifier.safetensors")
    return load_tensors(path)[0]


def peer_file(path: Path, side: int = 8, classes: int = 10, **changes) -> Path:
    """An npz as EDM-AT publishes them."""
    drawn = np.random.default_rng(0).integers(0, 256, (50, side, side, 1), dtype=np.uint8)
    np.savez_compressed(path, **{"image": drawn, "label": np.arange(50) % classes, **changes})
    return path


def test_a_classifier_comes_out_that_others_can_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained with somebody's npz; the folder holds weights, config and card; the same words again make nothing."""
    images = peer_file(tmp_path / "1m.npz")
    words = ["--data", "digits", "--synthetic", str(images), "--preset", "edm-at", *SHORT]
    assert run(*words, "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert re.search(r"step \d+: clean [\d.]+%, robust [\d.]+% on 50 images held out of train", said)
    model = from_pretrained(tmp_path / "out")
    digits = Digits(validation_images=50).load()
    assert model(digits.test.images[:3]).shape == (3, 10)
    for name, value in weights(Path("runs")).items():
        assert torch.equal(model.state_dict()[name], value)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(
        word in card for word in ("1m.npz", "linf ball of radius 0.15", "held out of train", "Digest of the recipe")
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["classes"] == 10
    assert run(*words) == 0
    assert "there already" in capsys.readouterr().out


def test_a_licence_told_later_reaches_a_training_that_is_found_again(tmp_path: Path) -> None:
    """The same images imported once more, with what is known of them: nothing is trained anew, the card tells it."""
    images = peer_file(tmp_path / "1m.npz")
    told = ["--licence", "CC-BY-4.0", "--additional-data", "ImageNet"]
    for name, words in (("bare", []), ("noted", told)):
        assert main(["store", "import", str(images), "--out", name, *words]) == 0
        assert run("--data", "digits", "--synthetic", name, "--preset", "edm-at", *SHORT) == 0
        (folder,) = Path("runs/models").iterdir()
        config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
        assert config.get("licence") == ("CC-BY-4.0" if words else None)
        assert ("ImageNet" in card, "ImageNet" in config.get("additional_data", ())) == (bool(words), bool(words))
        assert "Nothing is known of the real images behind" in card  # whose images are the pretended model's?
    assert len(list(Path("runs/stages/train_classifier").iterdir())) == 1
    assert from_pretrained(folder).classes == 10


def test_a_store_and_a_folder_of_images_and_small_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One's own images as a folder; the synthetic ones in a store of gambeson; the small network is taken by itself."""
    from PIL import Image

    from tests.test_robust_training import store_of

    digits = Digits().load()
    for place, (image, label) in enumerate(zip(digits.train.images[:120], digits.train.labels[:120], strict=True)):
        folder = tmp_path / "mine" / str(int(label) % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0].numpy() * 255).astype(np.uint8)).save(folder / f"{place}.png")
    store = store_of(tmp_path / "store", labels=np.arange(40) % 2)
    words = ["--threat", "linf:0.15", "--workers", "1", "--classifier.optimisation.batch_size", "32"]
    options = ["--data.size", "8", "--data.grey", "true", "--epochs", "0.01", "--classifier.epoch_images", "8000"]
    assert run("--data", str(tmp_path / "mine"), "--synthetic", str(store.root), *words, *options) == 0
    (folder,) = Path("runs/models").iterdir()
    model = from_pretrained(folder)
    assert type(model).__name__ == "SmallResNet"
    assert (model.channels, model.classes) == (1, 2)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "gambeson", "train", "--data", "digits", *SHORT, *words]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GAMBESON_CHECKPOINT_SECONDS": "-1", **more}


@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_to_the_same_bits(kills: int, tmp_path: Path) -> None:
    """SIGKILL at 2 (6) random moments of training, after as many resumes the weights of one left alone."""
    long = ["--classifier.optimisation.steps", "60", "--classifier.validations", "6", "--classifier.keep", "best"]
    alone = subprocess.run(command(*long, "--runs", "alone"), env=environment(), capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    moment, killed = random.Random(3), 0
    while killed < kills:
        process = subprocess.Popen(command(*long, "--runs", "killed"), env=environment(), stdout=subprocess.DEVNULL)
        before, limit = _step(Path("killed")), time.monotonic() + 120
        while _step(Path("killed")) <= before and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)  # it has come further than the last one
        time.sleep(moment.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    finished = subprocess.run(command(*long, "--runs", "killed"), env=environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (record,) = Path("killed").glob("stages/train_classifier/*/done.json")
    assert json.loads(record.read_text())["attempts"] >= kills
    for name, value in weights(Path("alone")).items():
        assert torch.equal(weights(Path("killed"))[name], value)


def _step(runs: Path) -> int:
    """Steps in the saved state below a runs folder."""
    for path in runs.glob(f"stages/train_classifier/*/{RESUME}"):
        return load_tensors(path)[1]["step"]
    return 0


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """Two processes of one thread."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(start, env=environment(), capture_output=True, text=True, timeout=250)


def test_what_two_processes_do_together() -> None:
    done = torchrun(str(ROOT / "tests" / "shared_work.py"))
    assert done.returncode == 0, done.stderr[-3000:]


PERTURBED = [
    "--classifier.loss",
    "AWP",
    "--classifier.loss.loss",
    "TRADES",
    "--classifier.loss.loss.statistics",
    "both",
]


@pytest.mark.parametrize(
    "loss",
    [pytest.param([], id="preset"), pytest.param(PERTURBED, id="weight perturbation", marks=pytest.mark.slow)],
)
def test_two_processes_train_what_one_does(loss: list[str]) -> None:
    """The same global batch, batch norm over all of it: equal up to rounding, and further from where they began."""
    words = [*loss, "--preset", "edm-at", "--classifier.optimisation.batch_size", "33"]
    one = subprocess.run(command(*words, "--runs", "one"), env=environment(), capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    if not loss:  # what one process began, two finish
        began = subprocess.Popen(command(*words, "--runs", "two"), env=environment(), stdout=subprocess.DEVNULL)
        while _step(Path("two")) < 2 and began.poll() is None:
            time.sleep(0.01)
        began.kill()
        began.wait()
    prefix = ["-m", "gambeson", "train", "--data", "digits", *SHORT, *words]
    two = torchrun(*prefix, "--runs", "two")
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("held out of train") == 1, "only the first process talks"
    for name, value in weights(Path("one")).items():
        torch.testing.assert_close(weights(Path("two"))[name], value, rtol=2e-3, atol=2e-3)
    (record,) = Path("two").glob("stages/train_classifier/*/done.json")
    assert json.loads(record.read_text())["execution"]["processes"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data: expected an image set"),
        (["--data", "digitz"], "digits"),
        (["--data", "digits", "--preset", "edm"], "edm-at"),
        (["--data", "digits", "--threat", "8/255"], "NORM:EPSILON"),
        (["--data", "digits", "--epochs", "none"], "--epochs: expected a number above 0"),
        (["--data", "digits", "--epochs", "2", "--classifier.optimisation.steps", "9"], "either says how long"),
        (["--data", "digits", "--micro-batch", "9"], "accumulate"),
        (["--data", "digits", "--from", "nowhere"], "--from: expected"),
        (["--data", "digits", "--synthetic", __file__.replace(".py", ".parquet")], "--synthetic: expected a store"),
        (["--data", "digits", "--synthetic", "nowhere.npz"], "--synthetic: expected a store"),
        (["--data", "digits", "--classifier.fraction", "2"], "fraction"),
        (["--data", "digits", "--classifier.network", "WideResNetSpec", "--classifier.network.depth", "9"], "depth"),
        (["--data", "cifar10"], "cifar10"),
    ],
)
def test_mistakes_are_answered(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words, "--runs", "r") == 2
    assert message in capsys.readouterr().err
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"side": 16}, "8 x 8 pixels"), ({"classes": 12}, "up to"), ({"label": np.full(50, np.nan)}, "whole numbers")],
)
def test_others_images_that_do_not_fit(
    changes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = peer_file(tmp_path / "theirs.npz", **changes)
    assert run("--data", "digits", "--synthetic", str(images), *SHORT) == 2
    assert message in capsys.readouterr().err
    assert not list(Path("runs").rglob("classifier.safetensors"))


def test_help_lists_presets_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("irgd", "edm-at", "cdp", "port", "fast", "--synthetic", "torchrun"))
    with pytest.raises(SystemExit):
        run("--data", "digits", "--help")
    assert "--classifier.optimisation.learning_rate" in capsys.readouterr().out


def asked(*words: str):
    """What `fitting` makes of a command, on digits."""
    from gambeson.train import fitting, read

    found = read(["--data", "digits", *words])
    return fitting(found, found.training.data.load())


def test_epochs_count_with_what_was_overridden() -> None:
    """10 epochs of 50,000 at batch 128; of 1,000 at the preset's 512, whose one-cycle rate then holds for 2 steps."""
    assert asked("--epochs", "10", "--classifier.optimisation.batch_size", "128").classifier.optimisation.steps == 3910
    fitted = asked("--preset", "edm-at", "--epochs", "10", "--classifier.epoch_images", "1000").classifier.optimisation
    assert (fitted.steps, fitted.schedule.held) == (20, 2)  # type: ignore[union-attr]


def test_what_was_asked_for_stays_and_what_was_not_is_made_to_fit() -> None:
    """8x8 images: the small network and a crop of 1 pixel, unless said otherwise, even in the preset's own words."""
    small = asked("--preset", "cdp").classifier
    assert (type(small.network).__name__, small.augment.padding) == ("ResNetSpec", 1)  # type: ignore[union-attr]
    words = [
        "--classifier.network",
        "WideResNetSpec",
        "--classifier.network.depth",
        "28",
        "--classifier.augment.padding",
        "4",
    ]
    wide = asked("--preset", "cdp", *words).classifier
    assert (type(wide.network).__name__, wide.augment.padding) == ("WideResNetSpec", 4)  # type: ignore[union-attr]


def test_a_card_says_what_was_done(tmp_path: Path) -> None:
    """No threat where none was trained for; the validation's own threat; how many looks the best was picked from."""
    plain = ["--classifier.loss", "Plain", "--classifier.keep", "best", "--classifier.threat", "ThreatModel"]
    assert run("--data", "digits", *SHORT, *plain, "--classifier.threat.epsilon", "0.25", "--out", "out") == 0
    card = Path("out/README.md").read_text()
    assert "Threat model" not in card
    assert "adversarial-robustness" not in card
    assert "PGD-2, linf eps 0.25" in card
    assert "the best of up to 3 looks" in card


def test_curves_survive_a_resume(tmp_path: Path) -> None:
    """Lines up to the saved state stay; one cut short and those after it are written anew."""
    from gambeson.training.journal import Journal

    lines = [json.dumps({"step": n, "loss": 1.0}) for n in (1, 2, 3, 4)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    journal = Journal(tmp_path, 4)
    journal.write({"step": 4, "loss": 2.0})
    journal.close()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
