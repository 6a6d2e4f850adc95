"""The recipes for CIFAR-10 and traffic signs, what a dry run says of them, and the images that the npz door gives."""

import re
from dataclasses import make_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gambeson import canonical, files
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.npz import NpzImages
from gambeson.data.portions import at_most, parted, twins
from gambeson.errors import UserError
from gambeson.models.resnet import ResNetSpec
from gambeson.pipeline import check_plan
from gambeson.recipe import Arm, Recipe, class_table
from gambeson.recipes import RECIPES, named
from gambeson.recipes.costs import SIDE_BY_SIDE, Rates, Sizes, makespan, stage_seconds
from gambeson.recipes.plan import (
    KNOWN,
    Card,
    Counted,
    cost,
    counted_classifier,
    counted_denoiser,
    counted_rates,
    equivalents,
    plan,
)
from gambeson.robustness.losses import TRADES, Plain
from gambeson.run_command import run
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.diffusion import DenoiserTraining

REAL = [name for name in RECIPES if name != "digits"]
RATES = Rates(denoiser_step=4.25e-3, denoised=1.52e-3, student_step=1.63e-3, teacher_step=3.8e-4, gradient=4.1e-4)
"""Timed on a busy core of two on 2026-11-21, bfloat16: the U-Net of 3.86M and ResNet-32 at 16x16."""
SMALLER = replace(RATES, denoiser_step=1.42e-3, denoised=5.3e-4, student_step=1.67e-3, gradient=4.3e-4)
"""The same with gtsrb-16's U-Net."""


def images(classes: int, each: int, side: int = 32) -> Split:
    """Noise of so many classes, a class after another in turn."""
    draw = torch.Generator().manual_seed(classes)
    return Split(torch.rand(classes * each, 3, side, side, generator=draw), torch.arange(classes * each) % classes)


def image_set(classes: int, each: int, side: int = 32) -> ImageSet:
    part, names = images(classes, each, side), tuple(map(str, range(classes)))
    return ImageSet(name="noise", train=part, validation=part, test=part, class_names=names, flip_safe=False)


def sized(name: str) -> ImageSet:
    """Noise of the sides and classes of a recipe's images."""
    return image_set(43 if name.startswith("gtsrb") else 10, 3, 16 if name.endswith("16") else 32)


def stand_ins(folder: Path) -> None:
    """Files as read_packed.py writes them, small: 10 classes, and 43 of 3 signs with 4 frames each."""
    draw = np.random.default_rng(0)
    for name, classes, each in (("cifar10", 10, 60), ("gtsrb", 43, 12)):
        labels = np.repeat(np.arange(classes), each)
        for part in ("train", "test"):
            pixels = draw.integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
            more: dict[str, Any] = (
                {"track": np.tile(np.repeat(np.arange(each // 4), 4), classes)} if part == "train" else {}
            )
            np.savez(folder / f"{name}_{part}.npz", images=pixels, labels=labels, **more)


# the recipes


@pytest.mark.parametrize("name", REAL)
def test_recipes_say_what_they_do_and_keep_what_they_say(name: str, tmp_path: Path) -> None:
    recipe, told = named(name), import_module(f"gambeson.recipes.{name.replace('-', '_')}").__doc__ or ""
    assert recipe.name == name
    assert f"`gambeson run {name}" in told
    assert "Expected: not yet measured" in told or re.search(
        r"Expected [^:]*\(n = .*95 %.*`gambeson table", told, re.DOTALL
    )
    assert re.search(r"Run time: not yet measured|Run time \d+ minutes", told)
    files.save(recipe, tmp_path / "recipe.yaml")
    assert files.load(tmp_path / "recipe.yaml", Recipe, class_table()).digest == recipe.digest
    assert recipe.student.keep == "best"  # the real-only arm at its own validation optimum
    assert recipe.teacher.keep == "last"  # by robust accuracy a standard classifier cannot be chosen
    assert isinstance(recipe.teacher.loss, Plain)
    if name.startswith("gtsrb"):  # a random split would show the same sign on both sides
        assert isinstance(recipe.data, NpzImages)
        assert (recipe.data.groups, recipe.data.drop_test_twins, recipe.data.flip_safe) == ("track", True, False)
    assert Arm.GAUSSIAN not in recipe.arms or recipe.control.count == recipe.generation.count


@pytest.mark.parametrize("name", REAL)
def test_networks_and_guidance_fit_the_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path)
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path))
    recipe = named(name)
    small: dict[str, Any] = {"validation_images": 20}
    if isinstance(recipe.data, NpzImages):
        each = 4 * len(sized(name).class_names) if recipe.data.train_images else 0
        small = {"train_images": each, "validation_images": 0, "test_images": 0, "validation_share": 0.2}
    recipe = replace(recipe, data=replace(recipe.data, **small))
    real = recipe.data.load()
    assert real.shape == sized(name).shape
    assert real.flip_safe == name.startswith("cifar10")
    check_plan(recipe, recipe.arms)
    assert plan(recipe, real)[0].startswith(name)


def test_budgets_of_the_small_recipes() -> None:
    for name, rates, train, test in (("cifar10-16", RATES, 1000, 2000), ("gtsrb-16", SMALLER, 3010, 1300)):
        recipe = named(name)
        sizes = Sizes(train=train, validation=500, test=test, classes=43 if "gtsrb" in name else 10, numbers=768)
        stages = stage_seconds(recipe, sizes, rates, KNOWN[name])
        assert stages["denoiser"] * SIDE_BY_SIDE <= 45 * 60
        for kind in ("control", "plain", "guided"):
            assert (stages[kind] + stages["student"] + stages["rows"]) * SIDE_BY_SIDE <= 6 * 60


def test_the_sweep_over_real_images() -> None:
    from gambeson.recipes import cifar10_16

    steps = []
    for count in (500, 1000, 5000):
        recipe = cifar10_16.recipe(count)
        assert isinstance(recipe.denoiser, DenoiserTraining)
        assert isinstance(recipe.data, NpzImages)
        assert recipe.data.train_images == count
        steps.append((recipe.denoiser.optimisation.steps, recipe.student.optimisation.steps))
    assert steps == [(1000, 400), (1950, 400), (4000, 1200)]  # 250 passes of 128; then 45 minutes


@pytest.mark.parametrize("name", ["cifar10", "cifar10-l2", "gtsrb"])
def test_budgets_of_the_card_at_the_assumed_speed(name: str) -> None:
    recipe, classes = named(name), 43 if name == "gtsrb" else 10
    sizes = Sizes(
        train=35_219 if name == "gtsrb" else 49_000, validation=1000, test=2000, classes=classes, numbers=3072
    )
    stages = stage_seconds(recipe, sizes, counted_rates(recipe, sized(name), Card()), KNOWN[name])
    assert makespan(recipe, stages, 1) <= 25 * 60


# counting and forecasts


def test_counts_are_those_of_torch_and_of_the_papers() -> None:
    real = image_set(10, 2)
    wide = counted_classifier(named("cifar10-full").student, real)
    assert wide.parameters == 36_479_194  # METHOD 2
    assert wide.forward == pytest.approx(10.49e9, rel=0.01)  # 5.2 billion multiplications and additions
    small = named("cifar10-16").denoiser
    assert isinstance(small, DenoiserTraining)
    assert counted_denoiser(small, image_set(10, 2, 16)).parameters == 3_856_035 + 9 * 192  # dev/LOG.md; told the warp
    assert str(Counted(1_500_000, 2e9)) == "1.50M parameters, 2 GFLOP an image"


def test_a_step_is_worth_as_many_forward_passes_as_the_log_says() -> None:
    real = image_set(10, 2, 16)
    training = ClassifierTraining(network=ResNetSpec(width=16), loss=Plain())
    threat = named("cifar10-16").threat
    assert equivalents(training, real) == pytest.approx(3, rel=0.02)
    for steps in (1, 10):  # two passes for each step of the attack, one for its aim, two of three for the loss
        trades = replace(training, loss=TRADES(steps=steps, threat=threat))
        assert equivalents(trades, real) == pytest.approx(2 * steps + 7, rel=0.02)


def test_a_day_of_this_cpu_is_timed_and_more_is_a_card() -> None:
    real, asked = sized("cifar10-16"), list[str]()

    def timing(recipe: Recipe, images: ImageSet, device: str = "cpu") -> Rates:
        asked.append(device)
        return RATES

    here = cost(named("cifar10-16"), real, timing, 2)
    assert asked == ["cpu"]
    assert "2 processes" in here[0]
    assert "dollars" not in here[0]
    assert "diffusion model 18 min" in here[1]
    assert here[-1].startswith("arm + Contrastive-DP: ")
    paid = cost(named("cifar10-16"), real, timing, 2, price=2.0)
    assert "dollars at 2 an hour" in paid[0]
    there = cost(named("cifar10-full"), sized("cifar10-full"), timing, 2)
    assert asked == ["cpu", "cpu"]  # nothing was timed for what a CPU cannot do
    assert "not yet measured" in there[0]
    assert "dollars at 4 an hour" in there[0]
    assert "AutoAttack" in there[-1]
    on_card = cost(named("cifar10"), sized("cifar10"), timing, 1, "cuda")
    assert asked[-1] == "cuda"
    assert "timing of these networks on cuda" in on_card[0]


def test_money_is_hours_times_price() -> None:
    recipe, real = named("cifar10-16"), sized("cifar10-16")
    line = cost(recipe, real, lambda *_: RATES, 1, price=1000.0)[0]
    hours = makespan(recipe, stage_seconds(recipe, Sizes.of(real), RATES, KNOWN[recipe.name]), 1) / 3600
    assert float(line.split(" dollars")[0].split()[-1].replace(",", "")) == pytest.approx(1000 * hours, rel=1e-3)


def test_a_card_takes_as_long_as_its_share_of_the_peak_says() -> None:
    card = Card(bfloat16=1e15, float32=1e14, reached=0.25)
    assert card.seconds(1e15, "bfloat16") == 4
    assert card.seconds(1e15, "float32") == 40
    recipe, real = named("cifar10-16"), sized("cifar10-16")
    rates, network = counted_rates(recipe, real, card), counted_classifier(recipe.student, real)
    assert rates.gradient == pytest.approx(2 * network.forward / 0.25e14)  # attacks search in float32
    assert rates.teacher_step == pytest.approx(3 * network.forward / 0.25e15, rel=0.02)
    assert isinstance(recipe.denoiser, DenoiserTraining)
    assert rates.denoiser_step == pytest.approx(3 * rates.denoised)
    assert rates.denoised == pytest.approx(counted_denoiser(recipe.denoiser, real).forward / 0.25e15)


def test_a_dry_run_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_ins(tmp_path)
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path))
    monkeypatch.setattr("gambeson.run_command.remembered", lambda path: lambda *_: RATES)
    words = ["--data.train_images", "40", "--data.validation_share", "0.2", "--data.validation_images", "0"]
    words += ["--data.test_images", "0", "--runs", str(tmp_path / "runs"), "--workers", "2", "--dry-run"]
    run(["cifar10-16", *words])
    said = capsys.readouterr().out
    assert "40 to train on" in said
    assert "23 network calls each (Heun); guided: 6 gradients besides" in said
    assert "arm real only: " in said
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="--price: expected dollars"):
        run(["cifar10-16", *words, "--price", "much"])
    with pytest.raises(UserError, match="U-Net"):
        run(["cifar10-16", *words, "--data.side", "2"])


def test_images_that_are_not_there_are_said_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"cifar10_train.npz: expected an .npz file, there or in the data root .*none"):
        run(["cifar10-16", "--dry-run", "--runs", str(tmp_path / "runs")])


# the npz door


def saved(path: Path, pixels: np.ndarray, labels: np.ndarray, **more: Any) -> str:
    np.savez(path, images=pixels, labels=labels, **more)
    return str(path)


def signs(tmp_path: Path) -> dict[str, Any]:
    """2 classes, each of 5 signs with 4 frames; a frame of sign 3 of class 1 is a test image."""
    draw = np.random.default_rng(1)
    pixels, labels = draw.integers(0, 256, (40, 8, 8, 3), np.uint8), np.repeat([0, 1], 20)
    track = np.tile(np.repeat(np.arange(5), 4), 2)
    test = draw.integers(0, 256, (10, 8, 8, 3), np.uint8)
    test[7] = pixels[20 + 3 * 4 + 1]
    train = saved(tmp_path / "train.npz", pixels, labels, track=track)
    return {"path": train, "test_path": saved(tmp_path / "test.npz", test, np.arange(10) % 2)}


def test_no_sign_is_in_two_parts(tmp_path: Path) -> None:
    found = NpzImages(**signs(tmp_path), groups="track", validation_share=0.2).load()
    assert (len(found.train), len(found.validation)) == (32, 8)  # one sign of five, four frames, of each class
    raw = np.load(tmp_path / "train.npz")
    sign = {p.tobytes(): (int(k), int(t)) for p, k, t in zip(raw["images"], raw["labels"], raw["track"], strict=True)}

    def shown(part: Split) -> set[tuple[int, int]]:
        return {sign[bytes((x.permute(1, 2, 0) * 255).round().byte().numpy().tobytes())] for x in part.images}

    assert len(shown(found.validation)) == 2
    assert not shown(found.train) & shown(found.validation)
    alone = NpzImages(path=str(tmp_path / "train.npz"), groups="track", validation_share=0.2, test_share=0.2).load()
    parts = [shown(part) for part in (alone.train, alone.validation, alone.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 10


def test_signs_that_test_shows_are_left_out_whole(tmp_path: Path) -> None:
    given = signs(tmp_path)
    every, without = (NpzImages(**given, groups="track", drop_test_twins=drop).load() for drop in (False, True))
    assert len(every.train) + len(every.validation) == 40
    assert len(without.train) + len(without.validation) == 36
    single = NpzImages(**given, drop_test_twins=True).load()
    assert len(single.train) + len(single.validation) == 39
    assert twins(np.eye(3), np.eye(3)[1:2]).tolist() == [False, True, False]


def test_sides_are_averaged(tmp_path: Path) -> None:
    given = signs(tmp_path)
    whole, half = (NpzImages(**given, side=side).load() for side in (0, 4))
    assert half.shape == (3, 4, 4)
    by_hand = whole.train.images.reshape(-1, 3, 4, 2, 4, 2).mean((3, 5))
    assert torch.allclose(half.train.images, by_hand, atol=1e-6)
    assert torch.equal(half.train.labels, whole.train.labels)
    with pytest.raises(UserError, match=r"data.side: expected a divisor of 8 x 8"):
        NpzImages(**given, side=3).load()


def test_parts_of_the_parts(tmp_path: Path) -> None:
    given = signs(tmp_path)
    whole = NpzImages(**given, validation_share=0.25).load()
    less = NpzImages(**given, validation_share=0.25, train_images=12, validation_images=4, test_images=6).load()
    least = NpzImages(**given, validation_share=0.25, train_images=6).load()
    assert [p.labels.bincount().tolist() for p in (less.train, less.validation, less.test)] == [[6, 6], [2, 2], [3, 3]]
    rows = [{x.numpy().tobytes() for x in s.train.images} for s in (whole, less, least)]
    assert rows[2] < rows[1] < rows[0]
    with pytest.raises(UserError, match=r"data.train_images: expected a multiple of 2"):
        NpzImages(**given, train_images=5).load()
    with pytest.raises(UserError, match=r"data.test_images: expected 0 or more, got -1"):
        NpzImages(test_images=-1)


def test_groups_that_cannot_be_used(tmp_path: Path) -> None:
    given = signs(tmp_path)
    with pytest.raises(UserError, match="groups: tracks; found images, labels, track"):
        NpzImages(**given, groups="tracks").load()
    raw = np.load(given["path"])
    saved(tmp_path / "short.npz", raw["images"], raw["labels"], track=raw["track"][:3])
    with pytest.raises(UserError, match=r"short.npz: track: expected one entry for each of 40 images, got \[3\]"):
        NpzImages(path=str(tmp_path / "short.npz"), groups="track").load()
    saved(tmp_path / "one.npz", raw["images"], raw["labels"], track=raw["labels"])
    with pytest.raises(UserError, match=r"data.test_share: expected at least 2 groups of images of 0, one to hold out"):
        NpzImages(path=str(tmp_path / "one.npz"), groups="track").load()


def test_recipes_from_before_keep_their_digests() -> None:
    old = [("path", str, ""), ("test_path", str, ""), ("validation_share", float, 0.1), ("test_share", float, 0.1)]
    before = make_dataclass("NpzImages", [*old, ("flip_safe", bool, False), ("split_seed", int, 0)], frozen=True)
    cases: list[dict[str, Any]] = [{"path": "a.npz"}, {"path": "a.npz", "validation_share": 0.2, "flip_safe": True}]
    for said in cases:
        assert canonical.digest(NpzImages(**said)) == canonical.digest(before(**said))
    assert canonical.digest(NpzImages(path="a.npz", side=4)) != canonical.digest(before(path="a.npz"))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(10, 30), st.integers(0, 1000), st.booleans())
def test_parts_are_a_partition(classes: int, each: int, seed: int, grouped: bool) -> None:
    labels, names = np.arange(classes * each) % classes, [str(k) for k in range(classes)]
    groups = np.arange(classes * each) // classes // 2 if grouped else None
    found = parted(labels, names, (0.3, 0.3), seed, groups)
    assert found.validation is not None
    assert found.test is not None
    together = np.concatenate([found.train, found.validation, found.test])
    assert np.array_equal(np.sort(together), np.arange(classes * each))
    for part in (found.train, found.validation, found.test):
        assert set(labels[part].tolist()) == set(range(classes))
    if groups is not None:
        owner = [
            {(int(labels[i]), int(groups[i])) for i in part} for part in (found.train, found.validation, found.test)
        ]
        assert not (owner[0] & owner[1]) | (owner[0] & owner[2]) | (owner[1] & owner[2])
    assert np.array_equal(at_most(labels, found.train, 0, seed, names, "f"), found.train)
