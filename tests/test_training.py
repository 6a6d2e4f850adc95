"""The loop and what it trains: averages, schedules, resume to the bit, and a denoiser that learns."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gambeson.data.augment import PadCrop
from gambeson.data.datasets import Digits, ImageSet
from gambeson.models.denoiser import load_denoiser
from gambeson.models.files import load_tensors
from gambeson.models.resnet import ResNetSpec, load_classifier
from gambeson.models.unet import UNetSpec
from gambeson.robustness.losses import TRADES, Plain
from gambeson.store import Store, Workspace
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, train_classifier
from gambeson.training.diffusion import DenoiserTraining, train_denoiser
from gambeson.training.loop import Optimisation, TrainingState, fit

THREAT = ThreatModel(epsilon=0.15)
SHORT = Optimisation(steps=12, batch_size=16, learning_rate=0.1)
CLASSIFIER = ClassifierTraining(
    network=ResNetSpec(width=4),
    loss=TRADES(threat=THREAT, beta=5.0, steps=2, step_size=0.05),
    optimisation=SHORT,
    validations=3,
    threat=THREAT,
)
DENOISER = DenoiserTraining(network=UNetSpec(width=8), optimisation=replace(SHORT, momentum=0.0, learning_rate=1e-3))


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return Digits(train_images=100, validation_images=50).load()


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    o = Optimisation(steps=100, learning_rate=0.2, warmup=0.1)
    assert [o.rate(s) for s in (0, 4, 9, 10)] == pytest.approx([0.02, 0.1, 0.2, 0.2])
    assert o.rate(55) == pytest.approx(0.1)
    assert o.rate(99) < 1e-3
    rates = [o.rate(s) for s in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_the_average_follows_its_formula_and_counts_batches() -> None:
    """Weights 1 at the start, then w_t = t: decays min(.9, (1+t)/(10+t)) for t = 1, 2, 3."""
    state = TrainingState.start(nn.BatchNorm1d(1), Optimisation())
    expected = 1.0
    for t in (1, 2, 3):
        state.step = t
        with torch.no_grad():
            state.model.weight.fill_(float(t))  # type: ignore[union-attr, operator]
            state.model.num_batches_tracked.fill_(t)  # type: ignore[union-attr, operator]
        state.average(0.9)
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * t
    assert state.averaged.weight.item() == pytest.approx(expected)  # type: ignore[union-attr, operator]
    assert state.averaged.num_batches_tracked.item() == 3  # type: ignore[union-attr, operator]


def test_the_step_is_yielded_after_its_update() -> None:
    model = nn.Linear(1, 1, bias=False)
    state = TrainingState.start(model, Optimisation(steps=2))
    before = model.weight.item()
    walk = fit(state, Optimisation(steps=2), lambda step: model(torch.ones(1, 1))[:, 0], Workspace(Path()))
    assert next(walk) == 1
    assert model.weight.item() != before
    assert len(state.losses) == 1


def test_weight_decay_spares_norms_and_biases() -> None:
    for momentum in (0.9, 0.0):
        groups = Optimisation(momentum=momentum, weight_decay=0.1).optimiser(
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        )
        decays = [(g["weight_decay"], [p.dim() for p in g["params"]]) for g in groups.param_groups]
        assert decays == [(0.1, [2]), (0.0, [1, 1, 1])]


@pytest.mark.parametrize(("stage", "spec"), [(train_classifier, CLASSIFIER), (train_denoiser, DENOISER)])
def test_an_interrupted_training_ends_in_the_same_bits(stage, spec, real: ImageSet, tmp_path: Path) -> None:
    """Stopped in every fourth step, its work since the last saved state lost each time."""
    inputs = (real, None) if stage is train_classifier else (real,)
    whole = Store(tmp_path / "whole").once(stage, spec, *inputs, seed=3)

    class Stopped(Exception):
        pass

    def attempt() -> Callable[[int, int], None]:
        steps = itertools.count(1)

        def stop(done: int, total: int) -> None:
            if next(steps) == 4:  # three steps of each attempt were saved, the fourth is lost
                raise Stopped

        return stop

    folder = tmp_path / "parts"
    folder.mkdir()
    stops = 0
    while stops < 20:
        try:
            stage.work(Workspace(folder, attempt(), checkpoint_seconds=-1.0), spec, *inputs, seed=3)
            break
        except Stopped:
            stops += 1
    assert stops == 3
    name = "classifier.safetensors" if stage is train_classifier else "denoiser.safetensors"
    assert (folder / name).read_bytes() == whole.file(name).read_bytes()


def test_training_moves_no_global_state(real: ImageSet, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    Store(tmp_path).once(train_classifier, CLASSIFIER, real, None, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_state(real: ImageSet, tmp_path: Path) -> None:
    wild = replace(DENOISER, optimisation=replace(DENOISER.optimisation, learning_rate=1e30, warmup=0.0))
    with pytest.raises(ValueError, match="loss of step"):
        Store(tmp_path).once(train_denoiser, wild, real, seed=0)
    assert not list(tmp_path.rglob("done.json"))


def test_a_classifier_learns_digits(real: ImageSet, tmp_path: Path) -> None:
    spec = replace(
        CLASSIFIER,
        network=ResNetSpec(width=8),
        loss=Plain(),
        optimisation=replace(SHORT, steps=120, batch_size=64, average=0.9),
        augment=PadCrop(padding=0),
    )
    artifact = Store(tmp_path).once(train_classifier, spec, real, None, seed=0)
    model = load_classifier(artifact.file("classifier.safetensors"))
    assert (model(real.validation.images).argmax(1) == real.validation.labels).float().mean() > 0.8
    log = load_tensors(artifact.file("classifier.safetensors"))[1]["log"]
    assert [r["step"] for r in log] == [40, 80, 120]
    assert log[0]["loss"] > log[-1]["loss"]
    json.dumps(log)


def test_a_denoiser_learns_to_denoise(real: ImageSet, tmp_path: Path) -> None:
    """After a short training it beats the best linear guess (an untrained network) on held-out images."""
    spec = replace(DENOISER, optimisation=replace(DENOISER.optimisation, steps=150, batch_size=64, learning_rate=3e-3))
    denoiser = load_denoiser(Store(tmp_path).once(train_denoiser, spec, real, seed=0).file("denoiser.safetensors"))
    clean = real.validation.images * 2 - 1
    noisy = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    error = (denoiser(noisy, 1.0, real.validation.labels) - clean).square().mean()
    shrunk = (noisy * 0.25 / 1.25 - clean).square().mean()
    assert error < 0.6 * shrunk


def test_fractions_zero_and_one_and_small_sets_are_fine(real: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fraction"):
        replace(CLASSIFIER, fraction=1.5)
    with pytest.raises(ValueError, match="steps"):
        replace(SHORT, steps=0)
    large = replace(CLASSIFIER, optimisation=replace(SHORT, steps=1, batch_size=256))
    Store(tmp_path).once(train_classifier, large, real, None, seed=0)
