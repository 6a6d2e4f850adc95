"""The classifier's trainer: presets, schedules, averages, batches by source, selection, resume, and what stops it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gambeson import distributed
from gambeson.data.augment import PadCrop
from gambeson.data.datasets import Digits
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.label_safe import Chain, CutMix, Cutout
from gambeson.data.synthetic import StoreWriter, SyntheticStore
from gambeson.errors import UserError
from gambeson.heritage import heritage_of
from gambeson.models.classifiers import load_classifier
from gambeson.models.files import load_tensors
from gambeson.models.resnet import ResNetSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.recipes.training import TRAININGS, steps, training_preset
from gambeson.robustness.inner import step_size_of
from gambeson.robustness.losses import AWP, MART, SCORE, TRADES, Curriculum, PGDAdversarial
from gambeson.store import RESUME, Store, Workspace
from gambeson.threat import ThreatModel
from gambeson.training import classifier
from gambeson.training.batches import Ahead, Batches
from gambeson.training.classifier import Checkpoint, ClassifierTraining, train_classifier
from gambeson.training.loop import Optimisation, TrainingState, fit
from gambeson.training.schedule import SWA, Cosine, OneCycle
from gambeson.training.validation import best_of

THREAT = ThreatModel(epsilon=0.15)
TINY = ClassifierTraining(
    network=ResNetSpec(width=4),
    loss=TRADES(threat=THREAT, steps=2, step_size=0.05),
    optimisation=Optimisation(steps=8, batch_size=16),
    validations=4,
    validation_steps=2,
    threat=THREAT,
)


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return real_digits()


def real_digits() -> ImageSet:
    return Digits(train_images=100, validation_images=50).load()


def store_of(folder: Path, count: int = 40, side: int = 8, labels: np.ndarray | None = None) -> SyntheticStore:
    """A store of random grey images, class = position modulo 10."""
    drawn = np.random.default_rng(0).integers(0, 256, (count, side, side, 1), dtype=np.uint8)
    writer = StoreWriter(root=folder, blocks=1, blocks_per_shard=1)
    writer.put(0, drawn, np.arange(count) % 10 if labels is None else labels)
    writer.finish({})
    return SyntheticStore.open(folder)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return store_of(tmp_path_factory.mktemp("images") / "store")


def trained(folder: Path, spec: ClassifierTraining, real: ImageSet, images=None, seed: int = 0):
    """Weights and header after training into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    train_classifier.work(Workspace(folder), spec, real, images, seed=seed)
    return load_tensors(folder / "classifier.safetensors")


def test_the_one_cycle_rate_and_momentum_are_torchs() -> None:
    """EDM-AT steps torch's OneCycleLR once an epoch; ours holds each of its values for an epoch of 5 steps."""
    epochs, held = 40, 5
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9, nesterov=True)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.2, pct_start=0.1, total_steps=epochs)
    o = Optimisation(steps=epochs * held, learning_rate=0.2, warmup=0.1, schedule=OneCycle(held=held))
    ours = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.5)
    for epoch in range(epochs):
        expected = [optimiser.param_groups[0][key] for key in ("lr", "momentum")]
        for step in (epoch * held, epoch * held + held - 1):
            o.prepare(ours, step)
            assert [ours.param_groups[0][key] for key in ("lr", "momentum")] == pytest.approx(expected)
        optimiser.step()
        if epoch + 1 < epochs:
            theirs.step()


def test_the_cosine_keeps_the_momentum() -> None:
    assert Cosine().momentum(3, 10, 0.1, 0.7) == 0.7


def test_a_short_one_cycle_still_rises_and_falls() -> None:
    """Shorter than an epoch, where torch's would stay at its end: the rate is held for a fortieth of the training."""
    o = Optimisation(steps=90, learning_rate=1.0, warmup=0.1, schedule=OneCycle(held=98))
    rates = [o.rate(step) for step in range(90)]
    assert max(rates) == pytest.approx(1.0, rel=0.01)
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[-1] < 1e-3


def test_swa_is_the_plain_mean_of_late_weights() -> None:
    """8 steps, from half of them, every second: weights after steps 4, 6 and 8; before that the network itself."""
    o = Optimisation(steps=8, swa=SWA(start=0.5, every=2))
    model = nn.Linear(1, 1, bias=False)
    state = TrainingState.start(model, o)
    seen = []
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.fill_(float(step * step))
        state.average(o.averaging(step))
        seen.append(state.averaged.weight.item())  # type: ignore[union-attr, operator]
    assert seen == [1, 4, 9, 16, 16, 26, 26, pytest.approx((16 + 36 + 64) / 3)]


@pytest.mark.parametrize(
    ("name", "count", "batch"),
    [("irgd", 19_600, 1024), ("edm-at", 39_200, 512), ("cdp", 19_600, 1024), ("port", 78_200, 256)],
)
def test_presets_have_their_published_length(name: str, count: int, batch: int) -> None:
    fitted = training_preset(name).classifier.optimisation
    assert (fitted.steps, fitted.batch_size) == (count, batch)
    assert steps(1.0, 512) == 98


def test_presets_name_whose_choice_is_whose() -> None:
    """METHOD 2, where the codes differ."""
    irgd, edm, cdp = (training_preset(n).classifier for n in ("irgd", "edm-at", "cdp"))
    assert [p.loss.statistics for p in (irgd, edm, cdp)] == ["adversarial", "both", "both"]  # type: ignore[union-attr]
    assert [p.loss.label_smoothing for p in (irgd, edm, cdp)] == [0.0, 0.1, 0.1]  # type: ignore[union-attr]
    assert (irgd.smooth_synthetic, irgd.real_repeats, cdp.loss.attack_mode) == (0.1, 4, "eval")  # type: ignore[union-attr]
    assert edm.optimisation.schedule == OneCycle(held=98)
    for p in (irgd, edm, cdp):
        assert p.network == WideResNetSpec(depth=28, width=10, activation="silu")


def test_inner_steps_without_a_size_are_in_proportion_to_the_threat() -> None:
    """10 of a quarter of epsilon at linf (2 of 8), of 15 / 128 at L2; 5 of twice that; a single one of 1.25 epsilon."""
    for loss, expected in (
        (TRADES(threat=ThreatModel(epsilon=8 / 255)), 2 / 255),
        (MART(threat=ThreatModel(epsilon=0.16)), 0.04),
        (PGDAdversarial(threat=ThreatModel(norm="l2", epsilon=0.5)), 0.5 * 15 / 128),
        (SCORE(threat=ThreatModel(epsilon=0.16), steps=5), 0.08),
        (TRADES(threat=ThreatModel(epsilon=0.16), steps=1), 0.2),
        (TRADES(threat=ThreatModel(epsilon=0.16), step_size=0.01), 0.01),
    ):
        assert step_size_of(loss) == pytest.approx(expected)
    growing = Curriculum(loss=TRADES(threat=ThreatModel(epsilon=0.16), steps=5), first_steps=1, steps_until=1.0)
    assert [growing.at(p).steps for p in (0.0, 0.5, 1.0)] == [1, 3, 5]
    assert [step_size_of(growing.at(p)) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.4 / 3, 0.08])


@pytest.mark.parametrize("name", TRAININGS)
def test_every_preset_trains(name: str, real: ImageSet, synthetic: SyntheticStore, tmp_path: Path) -> None:
    """Its loss, schedule, mixture and selection as they are; a small network, a few steps."""
    given = training_preset(name).classifier
    fitted = replace(given.optimisation, steps=3, batch_size=64)
    fraction = 40 / 64 if name == "irgd" else given.fraction
    spec = replace(given, network=ResNetSpec(width=4), optimisation=fitted, fraction=fraction, validation_steps=2)
    spec = replace(spec, threat=THREAT, loss=_at_threat(spec.loss))
    _, header = trained(tmp_path, spec, real, synthetic)
    assert header["log"][-1]["step"] == 3
    assert all(np.isfinite(record["loss"]) for record in header["log"])


def _at_threat(loss):
    """The loss with the threat in, wrapped or not."""
    return (
        replace(loss, loss=_at_threat(loss.loss))
        if isinstance(loss, (AWP, Curriculum))
        else replace(loss, threat=THREAT)
    )


LOSS = TRADES(threat=THREAT, steps=2, step_size=0.05)
VARIANTS = {
    "everything": replace(
        TINY,
        loss=Curriculum(loss=AWP(loss=LOSS, warmup=0.3), first_steps=1, first_epsilon=0.5),
        optimisation=replace(TINY.optimisation, swa=SWA(start=0.5, every=2), accumulate=3, clip_norm=1.0),
        augment=Chain(parts=(PadCrop(padding=1), Cutout())),
        augment_synthetic=PadCrop(padding=0),
        mix=CutMix(),
        smooth_synthetic=0.1,
        balanced=True,
        keep="best",
    ),
    "bfloat16, channels last": replace(TINY, optimisation=replace(TINY.optimisation, precision="bfloat16")),
    "one cycle": replace(TINY, optimisation=replace(TINY.optimisation, schedule=OneCycle(held=2), warmup=0.5)),
    "MART": replace(TINY, loss=MART(threat=THREAT, steps=2, step_size=0.05, statistics="both", attack_mode="train")),
    "SCORE with AdamW": replace(
        TINY, loss=SCORE(threat=THREAT, steps=2, step_size=0.05), optimisation=replace(TINY.optimisation, momentum=0.0)
    ),
    "PGD-AT, repeats": replace(
        TINY, loss=PGDAdversarial(threat=THREAT, steps=2, step_size=0.05), real_repeats=2, fraction=0.5
    ),
    "synthetic images by blocks": replace(TINY, synthetic_order="blocks"),
}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", VARIANTS)
def test_an_interrupted_training_ends_in_the_same_bits(
    name: str, real: ImageSet, synthetic: SyntheticStore, tmp_path: Path
) -> None:
    """Stopped in every third step, its work since the last saved state lost each time."""
    spec = VARIANTS[name]
    whole = Store(tmp_path / "whole").once(train_classifier, spec, real, synthetic, seed=3)

    def attempt() -> Callable[[int, int], None]:
        count = itertools.count(1)

        def stop(done: int, total: int) -> None:
            if next(count) == 3:
                raise Stopped

        return stop

    folder, stops = tmp_path / "parts", 0
    folder.mkdir()
    while stops < 20:
        try:
            carried = heritage_of((real, synthetic))
            work = Workspace(folder, attempt(), checkpoint_seconds=-1.0, heritage=carried)
            train_classifier.work(work, spec, real, synthetic, seed=3)
            break
        except Stopped:
            stops += 1
    assert stops == 3
    assert (folder / "classifier.safetensors").read_bytes() == whole.file("classifier.safetensors").read_bytes()
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "robust" in r] == [2, 4, 6, 8]


def test_the_best_weights_are_kept_and_a_stale_training_ends(
    real: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Robust .2, .5, .4, .3 at steps 2, 4, 6, 8: kept is step 4; with a patience of 1 the end is step 6."""
    robust = {2: 0.2, 4: 0.5, 6: 0.4, 8: 0.3}
    seen: dict[int, torch.Tensor] = {}
    counts = itertools.count(2, 2)

    def measure(model: nn.Module, *rest: object) -> dict[str, float]:
        step = next(counts)
        seen[step] = model.state_dict()["head.weight"].clone()
        return {"clean": 0.9, "robust": robust[step]}

    monkeypatch.setattr(classifier, "validate", measure)
    tensors, header = trained(tmp_path / "best", replace(TINY, keep="best"), real)
    assert torch.equal(tensors["head.weight"], seen[4])
    assert header["selection"] == {"kept": 4, "best": 0.5, "last": 0.3, "best_minus_last": pytest.approx(0.2)}
    counts = itertools.count(2, 2)
    tensors, header = trained(tmp_path / "patient", replace(TINY, keep="best", patience=1), real)
    assert [record["step"] for record in header["log"]] == [2, 4, 6]
    assert torch.equal(tensors["head.weight"], seen[4])
    counts = itertools.count(2, 2)
    tensors, header = trained(tmp_path / "last", TINY, real)
    assert torch.equal(tensors["head.weight"], seen[8])
    assert best_of(header["log"])["step"] == 4


def test_the_best_under_noise_is_kept_where_noise_is_trained_against() -> None:
    log = [{"step": 1, "robust": 0.5, "noisy": 0.6}, {"step": 2, "robust": 0.4, "noisy": 0.7}]
    assert best_of(log)["step"] == 2


def test_tensorboard_and_json_lines_tell_the_same(real: ImageSet, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained(tmp_path, TINY, real)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {e.step: e.value for e in events.Scalars("robust")}
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert found == {r["step"]: pytest.approx(r["robust"]) for r in records if "robust" in r}
    assert {e.step for e in events.Scalars("loss")} == set(range(1, 9))


def test_a_loss_that_is_not_finite_names_its_images(
    real: ImageSet, synthetic: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real image that is not a number is met: step, positions of the batch and the last state are kept."""
    images = real.train.images.clone()
    images[17] = torch.nan
    broken = replace(real, train=Split(images, real.train.labels))
    work = Workspace(tmp_path, checkpoint_seconds=-1.0)
    spec = replace(TINY, optimisation=Optimisation(steps=40, batch_size=8))
    with pytest.raises(ValueError, match="loss of step") as caught:
        train_classifier.work(work, spec, broken, synthetic, seed=1)
    told = json.loads((tmp_path / "not_finite.json").read_text())
    assert 17 in told["real"]
    assert len(told["real"]) + len(told["synthetic"]) == 8
    assert f"step {told['step']} " in str(caught.value)
    state = load_tensors(tmp_path / RESUME)
    assert state[1]["step"] == told["step"] > 0
    assert all(t.isfinite().all() for name, t in state[0].items() if name.startswith("averaged"))


def test_a_gradient_that_is_not_finite_touches_no_weight(tmp_path: Path) -> None:
    """The loss is 0 where its gradient is infinite (the root of 0)."""
    model = nn.Linear(1, 1, bias=False)
    state, before = TrainingState.start(model, Optimisation()), model.weight.item()
    loss = lambda step: (model(torch.ones(1, 1))[:, 0] * 0).sqrt()  # noqa: E731
    with pytest.raises(ValueError, match="or its gradient"):
        list(fit(state, Optimisation(steps=2), loss, Workspace(tmp_path)))
    assert (state.step, model.weight.item()) == (0, before)


def test_a_network_that_diverged_before_a_validation_is_told_as_such(real: ImageSet, tmp_path: Path) -> None:
    wild = Optimisation(steps=8, batch_size=16, learning_rate=1e12, warmup=0.0, average=0.0)
    with pytest.raises(ValueError, match="loss of step"):
        trained(tmp_path, replace(TINY, optimisation=wild, validations=8), real)
    assert (tmp_path / "not_finite.json").exists()


def test_training_starts_from_the_state_of_another(real: ImageSet, tmp_path: Path) -> None:
    """The averaged weights in a kept state: what a diverged training goes on from with a smaller rate."""
    state = TrainingState.start(TINY.network.build(1, 10, 4), TINY.optimisation)
    state.save(tmp_path / "state.safetensors")
    start = Checkpoint(str(tmp_path / "state.safetensors"))
    found = start.fitting(TINY.network.build(1, 10, 5)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.averaged.state_dict().items())
    with pytest.raises(UserError):
        start.fitting(ResNetSpec(width=8).build(1, 10, 5))


def test_a_class_without_validation_images_is_refused(real: ImageSet, tmp_path: Path) -> None:
    kept = real.validation.labels != 3
    part = Split(real.validation.images[kept], real.validation.labels[kept])
    with pytest.raises(UserError, match="got none of 3"):
        trained(tmp_path, TINY, replace(real, validation=part))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 16}, "8 x 8 pixels"),
        ({"labels": np.arange(40) % 12}, "got up to 11"),
        ({"labels": np.full(40, -1)}, "without a class"),
    ],
)
def test_synthetic_images_that_do_not_fit_are_refused(options, message: str, real: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        trained(tmp_path / "out", TINY, real, store_of(tmp_path / "store", **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 1.2}, "fraction"),
        ({"patience": 0}, "patience"),
        ({"smooth_synthetic": 1.0}, "smooth_synthetic"),
        ({"validation_steps": 0}, "validation_steps"),
        ({"loss": MART(), "mix": CutMix()}, "one class for each image"),
        ({"loss": AWP(loss=MART()), "smooth_synthetic": 0.1}, "one class for each image"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)


def test_weight_perturbation_is_not_compiled(real: ImageSet, tmp_path: Path) -> None:
    from gambeson.machine import Machine

    work = Workspace(tmp_path, machine=Machine(compile=True))
    for loss in (AWP(loss=LOSS), Curriculum(loss=AWP(loss=LOSS))):
        with pytest.raises(UserError, match="without AWP"):
            train_classifier.work(work, replace(TINY, loss=loss), real, None, seed=0)


def test_training_starts_from_given_weights_of_the_same_architecture(real: ImageSet, tmp_path: Path) -> None:
    """Without a step of any size, what comes out is what went in, from a file and from a folder; others are refused."""
    trained(tmp_path / "first", TINY, real)
    first = load_classifier(tmp_path / "first" / "classifier.safetensors")
    first.save_pretrained(tmp_path / "folder")
    still = replace(TINY, optimisation=Optimisation(steps=1, batch_size=8, learning_rate=1e-12, average=0.0))
    for number, place in enumerate((tmp_path / "first" / "classifier.safetensors", tmp_path / "folder")):
        work = Workspace(tmp_path / str(number))
        work.folder.mkdir()
        train_classifier.work(work, still, real, None, Checkpoint(str(place)), seed=9)
        tensors = load_tensors(work.folder / "classifier.safetensors")[0]
        torch.testing.assert_close(tensors["enter.weight"], first.state_dict()["enter.weight"])
    other = replace(TINY, network=ResNetSpec(width=8))
    with pytest.raises(UserError, match=r"width=8.*width=4"):
        train_classifier.work(
            Workspace(tmp_path / "0"), other, real, None, Checkpoint(str(tmp_path / "folder")), seed=0
        )


def batches_of(real: ImageSet, source, **changes) -> Batches:
    return classifier.batches_of(replace(TINY, **changes), real, source, 5)


def test_each_source_has_its_own_augmentation_and_smoothing(real: ImageSet, synthetic: SyntheticStore) -> None:
    """Real images are cut out to grey, synthetic ones stand as they are; of their labels .2 is spread over 10."""
    batches = batches_of(
        real,
        synthetic,
        augment=Cutout(size=1.0, fill=0.5),
        augment_synthetic=PadCrop(padding=0, flip=False),
        smooth_synthetic=0.2,
        fraction=0.25,
    )
    plain, labels, made = batches.mixture.batch(4)
    batch = batches(4)
    assert made.tolist() == [False] * 12 + [True] * 4
    assert torch.equal(batch.images[12:], plain[12:])
    assert ((batch.images[:12] == 0.5).flatten(1).sum(1) > 15).all()
    expected = torch.full((4, 10), 0.02)
    expected[torch.arange(4), labels[12:]] = 0.82
    torch.testing.assert_close(batch.labels[12:], expected)
    assert torch.equal(batch.labels[:12].argmax(1), labels[:12])
    assert set(batch.labels[:12].flatten().tolist()) == {0.0, 1.0}


def test_the_shares_of_processes_make_the_whole_batch(
    real: ImageSet, synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes: images, labels, and random starts that go on where the last one's end."""
    batches = batches_of(real, synthetic, mix=CutMix(probability=1.0))
    whole = batches(2)
    starts = torch.rand(whole.images.shape, generator=whole.draw)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "world", lambda: 3)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        share = batches(2)
        shares.append((share.images, share.labels, torch.rand(share.images.shape, generator=share.draw)))
    for ours, expected in zip(zip(*shares, strict=True), (whole.images, whole.labels, starts), strict=True):
        assert torch.equal(torch.cat(ours), expected)


def test_a_batch_smaller_than_the_processes_is_refused(real: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_of(real, None, optimisation=Optimisation(batch_size=2))
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(UserError, match="one for each process"):
        batches(0)


def test_batches_made_ahead_are_the_same(real: ImageSet, synthetic: SyntheticStore) -> None:
    batches = batches_of(real, synthetic)
    ahead = Ahead(batches, 6)
    for step in (0, 1, 2, 4, 5):  # a jump, as after a resume
        ours, expected = ahead(step), batches(step)
        assert torch.equal(ours.images, expected.images)
        assert torch.equal(ours.draw.get_state(), expected.draw.get_state())
    ahead.close()


def test_a_batch_larger_than_the_set_and_both_fractions(
    real: ImageSet, synthetic: SyntheticStore, tmp_path: Path
) -> None:
    few = replace(real, train=Split(real.train.images[:7], real.train.labels[:7]))
    for fraction in (0.0, 1.0):
        spec = replace(TINY, fraction=fraction, optimisation=Optimisation(steps=2, batch_size=16))
        _, header = trained(tmp_path / str(fraction), spec, few, synthetic)
        assert header["log"][-1]["step"] == 2


def test_bfloat16_trains_as_float32_does(real: ImageSet, tmp_path: Path) -> None:
    """The same 30 steps: the losses stay within 5 %, and weights, averages and momenta are float32 in either."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        spec = replace(TINY, optimisation=Optimisation(steps=30, batch_size=32, precision=precision))  # type: ignore[arg-type]
        tensors, header = trained(tmp_path / precision, spec, real)
        losses[precision] = header["log"][-1]["loss"]
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]


COMPILED = """
import sys
from pathlib import Path
from tests.test_robust_training import TINY, real_digits
from dataclasses import replace
import torch
from gambeson.models.files import load_tensors
from gambeson.machine import Machine
from gambeson.store import Workspace
from gambeson.training.classifier import train_classifier
from gambeson.training.loop import Optimisation

ends, real = [], real_digits()
for compiled in (False, True):
    folder = Path(sys.argv[1]) / str(compiled)
    folder.mkdir()
    spec = replace(TINY, optimisation=Optimisation(steps=2, batch_size=8), validations=1)
    train_classifier.work(Workspace(folder, machine=Machine(compile=compiled)), spec, real, None, seed=0)
    ends.append(load_tensors(folder / "classifier.safetensors")[0])
assert any(not torch.equal(ends[0][k], ends[1][k]) for k in ends[0]), "compiled kernels round differently"
for name, value in ends[0].items():
    torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-3)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_is_the_same_up_to_rounding(tmp_path: Path) -> None:
    """In a process of its own: the type checks of the tests cannot be compiled."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = [sys.executable, "-c", COMPILED, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


def test_accumulated_parts_give_the_gradient_of_the_batch(real: ImageSet, tmp_path: Path) -> None:
    """Without batch norm in the way (a linear network) 1 part and 3 parts train the same weights."""
    ends = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with torch.no_grad():
            model[1].weight.fill_(0.01)
            model[1].bias.zero_()
        o = Optimisation(steps=3, batch_size=16, accumulate=parts)
        state = TrainingState.start(model, o)
        batches = batches_of(real, None)

        def loss_of(step: int, batches=batches, model=model, parts=parts):
            batch = batches(step)
            for images, labels in batch.parts(parts, "cpu", torch.contiguous_format):
                yield LOSS(model, images, labels, batch.draw)

        list(fit(state, o, loss_of, Workspace(tmp_path / str(parts))))
        ends.append(model[1].weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=0, atol=3e-4)  # rounding turns the sign of a few pixels' steps
    assert (ends[0] - 0.01).abs().max() > 0.02
