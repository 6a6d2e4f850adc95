"""Several processes under torchrun: a whole run from its recipe, trainings that go on with another number of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gambeson import files
from gambeson.models.files import load_tensors
from gambeson.recipe import Arm
from gambeson.store import RESUME
from tests.tiny import tiny_recipe

ROOT = Path(__file__).parent.parent
STEPS = 40
TRAINING = [
    *("--data", "digits", "--threat", "linf:0.15", "--workers", "1", "--preset", "edm-at"),
    *("--classifier.network", "ResNetSpec", "--classifier.network.width", "4", "--data.validation_images", "50"),
    *("--classifier.optimisation.steps", str(STEPS), "--classifier.optimisation.batch_size", "32"),
    *("--classifier.validations", "2", "--classifier.validation_steps", "2"),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GAMBESON_DATA", raising=False)


def torchrun(processes: int, *words: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *("-m", "gambeson", *words),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GAMBESON_CHECKPOINT_SECONDS": "-1"}


def done(command: list[str]) -> str:
    """What a command says that ends well."""
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def step(runs: Path) -> int:
    """The step of the state that a training has saved."""
    for path in runs.glob(f"stages/train_classifier/*/{RESUME}"):
        return int(load_tensors(path)[1]["step"])
    return 0


def stop_at(command: list[str], runs: Path, wanted: int) -> int:
    """Starts a command, kills all its processes once its state is that far, and gives the step that is kept."""
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    limit = time.monotonic() + 120
    while step(runs) < wanted and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # torchrun starts its processes in sessions of their own; they see that it is gone
    return step(runs)


def record(runs: Path, stage: str = "train_classifier") -> dict:
    (path,) = runs.glob(f"stages/{stage}/*/done.json")
    return json.loads(path.read_text())


def weights(runs: Path) -> dict[str, torch.Tensor]:
    (path,) = runs.glob("stages/train_classifier/*/classifier.safetensors")
    return load_tensors(path)[0]


@pytest.mark.slow
def test_a_training_of_two_processes_goes_on_with_one_and_with_three() -> None:
    """From the step that was saved, to a valid training whose record says who took part; the weights of one left alone
    up to rounding."""
    kept = stop_at(torchrun(2, "train", *TRAINING, "--runs", "two"), Path("two"), STEPS // 3)
    assert STEPS // 3 <= kept < STEPS
    done([sys.executable, "-m", "gambeson", "train", *TRAINING, "--runs", "alone"])
    for processes in (1, 3):
        runs = Path(f"then-{processes}")
        shutil.copytree("two", runs)
        said = done(torchrun(processes, "train", *TRAINING, "--runs", str(runs)))
        assert said.count("classifier: ") == 1, "only the first process talks"
        found = record(runs)
        assert found["processes"] == sorted({2, processes})
        assert found["execution"]["processes"] == processes
        assert (found["attempts"], found["bit_identical"]) == (2, False)
        (log,) = runs.glob("stages/train_classifier/*/log.jsonl")
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, STEPS + 1))
        for name, value in weights(Path("alone")).items():
            torch.testing.assert_close(weights(runs)[name], value, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one() -> None:
    """All stages, guided images among them: the first process makes, labels and selects them, both train; it talks
    alone. Weights are those of a run without torchrun up to rounding, and so are the images."""
    files.save(tiny_recipe((Arm.REAL, Arm.GUIDED)), "tiny.yaml")
    said = done(torchrun(2, "run", "tiny.yaml", "--runs", "two", "--workers", "1"))
    assert said.count("report: ") == 1
    assert said.count("generate images") == 1
    done([sys.executable, "-m", "gambeson", "run", "tiny.yaml", "--runs", "one", "--workers", "1"])
    for path in Path("one").glob("stages/*/*/done.json"):
        alone, together = (
            json.loads((root / path.relative_to("one")).read_text()) for root in (Path("one"), Path("two"))
        )
        shared = alone["stage"] in ("train_denoiser", "train_classifier")
        assert together["processes"] == ([2] if shared else [1]), alone["stage"]
        assert alone["processes"] == [1]
        for name in [name for name in alone["files"] if name.endswith(".safetensors")]:
            own, others = (
                load_tensors(root / path.relative_to("one").with_name(name))[0] for root in (Path("one"), Path("two"))
            )
            for key, value in own.items():
                torch.testing.assert_close(others[key], value, rtol=2e-3, atol=2e-3)
        for image in path.parent.glob("images/shards/*.npy"):
            own, others = (np.load(root / image.relative_to("one")).astype(int) for root in (Path("one"), Path("two")))
            assert abs(own - others).max() <= 1  # of a denoiser whose weights differ in their last digits
            assert (own != others).mean() < 1e-2
