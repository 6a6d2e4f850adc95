"""The loop and what it trains: averages, schedules, resume to the bit, and a denoiser that learns."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gambeson.data.augment import PadCrop
from gambeson.data.datasets import Digits, ImageSet, Split
from gambeson.errors import UserError
from gambeson.heritage import heritage_of
from gambeson.models.classifiers import load_classifier
from gambeson.models.denoiser import EDM, VP, load_denoiser
from gambeson.models.files import load_tensors, save_tensors
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.randomness import generator, seeded
from gambeson.robustness.losses import TRADES, Plain
from gambeson.store import Store, Workspace
from gambeson.threat import ThreatModel
from gambeson.training import loop
from gambeson.training.classifier import ClassifierTraining, train_classifier
from gambeson.training.diffusion import DenoiserTraining, mean_loss, train_denoiser
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
DENOISERS = {
    "edm": DENOISER,
    "bfloat16": replace(DENOISER, optimisation=replace(DENOISER.optimisation, precision="bfloat16")),
    "accumulated with dropout": replace(
        DENOISER,
        network=UNetSpec(width=8, dropout=0.3),
        label_dropout=0.2,
        optimisation=replace(DENOISER.optimisation, accumulate=3),
    ),
    "v-prediction without classes": replace(
        DENOISER, preconditioning=VP(prediction="v", schedule="cosine"), conditional=False
    ),
}


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
        with torch.no_grad():
            state.model.weight.fill_(float(t))  # type: ignore[union-attr, operator]
            state.model.num_batches_tracked.fill_(t)  # type: ignore[union-attr, operator]
        state.average(Optimisation(average=0.9).averaging(t))
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


@pytest.mark.parametrize(
    ("stage", "spec"),
    [(train_classifier, CLASSIFIER), *((train_denoiser, spec) for spec in DENOISERS.values())],
    ids=["classifier", *DENOISERS],
)
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
            work = Workspace(folder, attempt(), checkpoint_seconds=-1.0, heritage=heritage_of(inputs))
            stage.work(work, spec, *inputs, seed=3)
            break
        except Stopped:
            stops += 1
    assert stops == 3
    name = "classifier.safetensors" if stage is train_classifier else "denoiser.safetensors"
    assert (folder / name).read_bytes() == whole.file(name).read_bytes()


def test_saving_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of 3 s is followed by none for 60 s, however often one is asked for; steps of 1 s."""
    clock, saves, model = [0.0], [], nn.Linear(1, 1)

    def step(step: int) -> Tensor:
        clock[0] += 1.0
        return model(torch.ones(1, 1))[:, 0].square()

    def save(self: TrainingState, path: Path) -> None:
        clock[0] += 3.0
        saves.append(self.step)

    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(TrainingState, "save", save)
    for seconds, expected in [(10.5, [11, 72, 133, 194]), (90.5, [91, 182]), (-1.0, list(range(1, 201)))]:
        saves.clear()
        o = Optimisation(steps=200, learning_rate=1e-3)
        list(fit(TrainingState.start(model, o), o, step, Workspace(tmp_path, checkpoint_seconds=seconds)))
        assert saves == expected


def test_the_state_on_disk_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    model, o = nn.Linear(1, 1, bias=False), Optimisation(steps=1500, learning_rate=1e-4)
    state = TrainingState.start(model, o)
    losses = []
    for step in fit(state, o, lambda step: model(torch.ones(1, 1))[:, 0] + step, Workspace(tmp_path)):
        losses.append(state.losses[-1])
        if step in (10, 1000):
            assert state.losses == losses
    assert state.losses == losses[-1000:]
    assert state.recent_loss(7) == pytest.approx(sum(losses[-7:]) / 7)
    assert state.recent_loss(2000) == pytest.approx(sum(losses[-1000:]) / 1000)
    state.save(tmp_path / "state")
    again = TrainingState.start(nn.Linear(1, 1, bias=False), o)
    again.load(tmp_path / "state")
    assert again.losses == state.losses


def test_weights_that_share_memory_are_written_and_the_file_has_the_usual_rights(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": base, "b": base.T, "c": base[1], "again": base, "empty": torch.zeros(0, 2)}
    save_tensors(tmp_path / "w.safetensors", tensors, {})
    loaded, _ = load_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items())
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors", "other"}


def test_training_moves_no_global_state(real: ImageSet, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    Store(tmp_path).once(train_classifier, CLASSIFIER, real, None, seed=0)
    Store(tmp_path).once(train_denoiser, DENOISERS["accumulated with dropout"], real, seed=0)
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


def stripes(count: int, seed: int) -> Split:
    """Two classes of 8x8 images: stripes that run down or across, at any phase and contrast."""
    g = torch.Generator().manual_seed(seed)
    phase, contrast = torch.rand(2, count, 1, 1, 1, generator=g)
    wave = 0.5 + (0.3 + 0.2 * contrast) * torch.sin(torch.arange(8) * 1.6 + 6.3 * phase).expand(-1, 1, 8, 8)
    labels = torch.arange(count) % 2
    return Split(torch.where(labels[:, None, None, None] == 0, wave, wave.transpose(2, 3)).contiguous(), labels)


@pytest.fixture(scope="module")
def world() -> ImageSet:
    train, validation, test = (stripes(n, seed) for seed, n in enumerate((256, 64, 2)))
    names = ("down", "across")
    return ImageSet(name="stripes", train=train, validation=validation, test=test, class_names=names, flip_safe=True)


def curves(spec: DenoiserTraining, real: ImageSet, folder: Path) -> list[dict[str, float]]:
    """The log of a training."""
    artifact = Store(folder).once(train_denoiser, spec, real, seed=0)
    return load_tensors(artifact.file("denoiser.safetensors"))[1]["log"]


@pytest.mark.parametrize(
    ("preconditioning", "share"),
    [
        (EDM(), 0.35),
        (VP(), 0.1),
        (VP(schedule="cosine"), 0.15),
        (VP(prediction="v", schedule="cosine"), 0.4),
        (VP(prediction="x0"), 0.7),  # most of it cannot be had: what noise hides at t near 1,000
    ],
    ids=["edm", "eps linear", "eps cosine", "v cosine", "x0 linear"],
)
def test_every_kind_of_model_learns_what_it_has_not_seen(
    preconditioning: EDM | VP, share: float, world: ImageSet, tmp_path: Path
) -> None:
    """The held-out loss falls well below that of an untrained network, which predicts 0."""
    fitted = Optimisation(steps=100, batch_size=32, learning_rate=5e-3, momentum=0.0, weight_decay=0.0, average=0.9)
    spec = DenoiserTraining(network=UNetSpec(width=16), preconditioning=preconditioning, optimisation=fitted)
    log = curves(spec, world, tmp_path)
    start = mean_loss(spec.build(world.shape, 2, 0), world.validation, 64, 32, generator(0, "denoiser curves"))
    held_out = [record["held_out"] for record in log if "held_out" in record]
    assert len(held_out) == 8
    assert held_out[-1] < share * start
    assert held_out[-1] < held_out[1] < held_out[0]


def test_the_curves_show_a_model_that_copies(world: ImageSet, tmp_path: Path) -> None:
    """4 training images, many steps: the loss on what it has seen falls, on what it has not it rises again."""
    few = replace(world, train=Split(world.train.images[:4], world.train.labels[:4]))
    fitted = Optimisation(steps=200, batch_size=8, learning_rate=5e-3, momentum=0.0, weight_decay=0.0, average=0.9)
    log = curves(DenoiserTraining(network=UNetSpec(width=16), optimisation=fitted), few, tmp_path)
    held_out, seen = ([record[name] for record in log if name in record] for name in ("held_out", "seen"))
    assert held_out[-1] > 1.5 * min(held_out)
    assert held_out[-1] > 4 * seen[-1]
    assert seen[-1] == min(seen)


def test_measuring_the_curves_changes_no_weight(world: ImageSet, tmp_path: Path) -> None:
    blind = replace(world, validation=Split(world.validation.images[:0], world.validation.labels[:0]))
    files = [
        Store(tmp_path).once(train_denoiser, DENOISER, real, seed=0).file("denoiser.safetensors")
        for real in (world, blind)
    ]
    (seen, header), (unseen, other) = map(load_tensors, files)
    assert all(torch.equal(seen[k], unseen[k]) for k in seen)
    assert "held_out" in header["log"][-1]
    assert "held_out" not in other["log"][-1]


def weights(spec: DenoiserTraining, real: ImageSet, folder: Path) -> Tensor:
    """All weights of the trained denoiser in a row."""
    artifact = Store(folder).once(train_denoiser, spec, real, seed=0)
    tensors, _ = load_tensors(artifact.file("denoiser.safetensors"))
    assert all(t.dtype == torch.float32 for t in tensors.values())
    return torch.cat([tensors[k].flatten() for k in sorted(tensors)])


def test_bfloat16_stays_close_to_float32(world: ImageSet, tmp_path: Path) -> None:
    specs = [
        replace(s, optimisation=replace(s.optimisation, steps=40)) for s in map(DENOISERS.get, ("edm", "bfloat16"))
    ]
    exact, rounded = (curves(spec, world, tmp_path)[-1]["loss"] for spec in specs)
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)
    assert weights(specs[1], world, tmp_path).isfinite().all()


def test_a_batch_in_parts_gives_the_same_step_of_a_denoiser(world: ImageSet, tmp_path: Path) -> None:
    """Two steps of SGD, 16 images at once, in 4 and in 3 parts: the same draws, the same weights but for rounding."""
    one = replace(DENOISER, optimisation=Optimisation(steps=2, batch_size=16, learning_rate=0.1, average=0.0))
    whole = weights(one, world, tmp_path)
    for parts in (4, 3):
        split = weights(replace(one, optimisation=replace(one.optimisation, accumulate=parts)), world, tmp_path)
        assert not torch.equal(split, whole)
        assert torch.allclose(split, whole, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 4, 10])
def test_the_gradient_of_parts_is_that_of_the_whole(parts: int) -> None:
    """loss_i = (w x_i)^2, w = 1, plain gradient step: w' = w - rate * 2 mean(x_i^2), whatever the parts."""
    x = torch.arange(10.0, dtype=torch.float64)

    def step(loss_of: Callable[[nn.Linear], object], optimisation: Optimisation) -> tuple[float, float]:
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(model.weight)
        state = TrainingState.start(model, optimisation)
        list(fit(state, optimisation, lambda step: loss_of(model), Workspace(Path())))  # type: ignore[arg-type]
        return model.weight.item(), state.losses[0]

    def in_parts(model: nn.Linear) -> Iterator[Tensor]:
        return (model(some[:, None])[:, 0].square() for some in x.tensor_split(parts))

    o = Optimisation(steps=1, batch_size=10, learning_rate=1e-3, warmup=0.0, weight_decay=0.0, momentum=1e-9)
    accumulated = replace(o, accumulate=parts)
    weight, loss = step(in_parts, accumulated)
    assert weight == pytest.approx(1 - 1e-3 * 2 * 28.5)
    assert loss == pytest.approx(28.5)
    assert step(in_parts, replace(accumulated, clip_norm=3.0))[0] == pytest.approx(1 - 1e-3 * 3)
    if parts > 1:
        with pytest.raises(UserError, match="accumulate: expected 1"):
            step(lambda model: model(x[:, None])[:, 0].square(), accumulated)


def test_dropout_belongs_to_the_seed_and_the_step(world: ImageSet, tmp_path: Path) -> None:
    """Whatever the global stream; and it does something."""
    spec = DENOISERS["accumulated with dropout"]
    with torch.random.fork_rng(devices=[]):
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(weights(spec, world, tmp_path / str(seed)))
    assert torch.equal(*found)
    assert not torch.equal(found[0], weights(replace(spec, network=UNetSpec(width=8)), world, tmp_path))
    drawn = []
    for seed in (5, 5, 6):
        with seeded(seed):
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_without_classes_labels_play_no_part(world: ImageSet, tmp_path: Path) -> None:
    spec = DENOISERS["v-prediction without classes"]
    turned = replace(world, train=Split(world.train.images, 1 - world.train.labels))
    assert torch.equal(weights(spec, world, tmp_path), weights(spec, turned, tmp_path))
    loaded = load_denoiser(Store(tmp_path).once(train_denoiser, spec, world, seed=0).file("denoiser.safetensors"))
    assert (loaded.classes, loaded.conditional_only) == (0, False)
    with pytest.raises(UserError, match="label_dropout"):
        replace(spec, label_dropout=0.1)


@pytest.mark.parametrize(
    "change", [{"precision": "float16"}, {"accumulate": 0}, {"accumulate": 17}, {"clip_norm": 0.0}]
)
def test_impossible_ways_to_fit_are_refused(change: dict) -> None:
    with pytest.raises(Exception, match=next(iter(change))):
        replace(SHORT, **change)


def test_fractions_zero_and_one_and_small_sets_are_fine(real: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fraction"):
        replace(CLASSIFIER, fraction=1.5)
    with pytest.raises(ValueError, match="steps"):
        replace(SHORT, steps=0)
    large = replace(CLASSIFIER, optimisation=replace(SHORT, steps=1, batch_size=256))
    Store(tmp_path).once(train_classifier, large, real, None, seed=0)
