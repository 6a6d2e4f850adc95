"""Recipes derived from images of one's own: valid for any number, size and machine, in time, and with their reasons."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gambeson import cli, files
from gambeson.data.datasets import Digits, ImageFolder, NpzImages
from gambeson.errors import EnvironmentFault, UserError
from gambeson.overrides import flat_fields
from gambeson.pipeline import check_plan
from gambeson.recipe import Arm, Recipe, class_table
from gambeson.recipes import named
from gambeson.recipes.costs import (
    SIDE_BY_SIDE,
    START,
    Rates,
    Sizes,
    forecast,
    jobs,
    makespan,
    measure,
    network_calls,
    remembered,
    stage_seconds,
    work,
)
from gambeson.recipes.own import Hardware, derive, steps_of
from gambeson.recipes.survey import Survey, fitting, side, survey
from gambeson.run import jobs_of
from gambeson.run_command import run
from gambeson.sampling.guidance import Contrastive
from gambeson.threat import ThreatModel
from gambeson.training.diffusion import DenoiserTraining

RATES = Rates(denoiser_step=1.4e-3, denoised=4e-4, student_step=1e-3, teacher_step=3e-4, gradient=3e-4)


def timing(recipe: Recipe, real: object, device: str = "cpu") -> Rates:
    """Rates of a machine with a fast bfloat16."""
    half = recipe.student.optimisation.precision == "bfloat16"
    return RATES if half else replace(RATES, denoiser_step=2e-3, student_step=2e-3)


def archive(path: Path, classes: int, each: int, side: int, channels: int = 3, width: int | None = None) -> str:
    """An .npz of random images, the same number of each class."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (classes * each, side, width or side, channels), np.uint8)
    np.savez(path, images=pixels, labels=np.arange(classes * each) % classes)
    return str(path)


def pictures(root: Path, classes: dict[str, int], grey: bool = False) -> Path:
    """A folder of pictures from 11 to 20 pixels a side."""
    draw = np.random.default_rng(0)
    for k, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            shape = (*draw.integers(11, 21, 2), *(() if grey else (3,)))
            pixels = (60 * k + draw.integers(0, 60, shape)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    return root


CPU, GPU = Hardware(cores=2), Hardware(device="cuda")
TABLE = {  # classes, images of each, side, channels, width (None: square), hardware
    "a few small grey images": (3, 12, 8, 1, None, CPU),
    "two classes": (2, 100, 16, 3, None, CPU),
    "odd sides, which cannot be halved": (4, 20, 25, 3, None, CPU),
    "MNIST's sides": (10, 30, 28, 1, None, CPU),
    "not square": (3, 20, 16, 3, 24, CPU),
    "one core, two minutes": (5, 60, 16, 3, None, Hardware(minutes=2.0)),
    "many cores, two hours": (5, 60, 32, 3, None, Hardware(cores=16, minutes=120.0)),
    "a hundred classes": (100, 12, 16, 3, None, CPU),
    "more classes than a block holds": (300, 10, 8, 1, None, CPU),
    "little memory": (20, 12, 32, 3, None, Hardware(cores=2, memory=2**30)),
    "a GPU": (10, 40, 32, 3, None, GPU),
    "a GPU, 64 pixels": (4, 20, 64, 3, None, replace(GPU, minutes=90.0)),
    "a GPU, tiny images": (4, 20, 6, 3, None, GPU),
}


@pytest.mark.parametrize("case", TABLE)
def test_derived_recipes_are_valid(case: str, tmp_path: Path) -> None:
    classes, each, side, channels, width, hardware = TABLE[case]
    data = NpzImages(path=archive(tmp_path / "own.npz", classes, each, side, channels, width))
    found = survey(data)
    assert found is not None
    data = fitting(data, found, 32)
    real = data.load()
    for part, least in ((real.train, 4), (real.validation, 1), (real.test, 2)):
        assert part.labels.bincount(minlength=classes).min() >= least
    derived = derive(data, real, ThreatModel(), hardware, timing=timing)
    recipe = derived.recipe
    check_plan(recipe, recipe.arms)
    assert recipe.data == data
    generation = recipe.generation
    assert generation.count % classes == generation.count % generation.block == generation.block % classes == 0
    assert recipe.control.count == generation.count
    assert (Arm.GUIDED in recipe.arms) == (classes <= 256)
    if isinstance(generation.guidance, Contrastive):
        generation.guidance.dry_run(generation.block, generation.labels(0, classes))
    assert isinstance(recipe.denoiser, DenoiserTraining)
    assert recipe.denoiser.optimisation.precision == recipe.student.optimisation.precision == "bfloat16"
    path = tmp_path / "recipe.yaml"
    files.save(recipe, path)
    assert files.load(path, Recipe, class_table()).digest == recipe.digest
    stages = stage_seconds(recipe, Sizes.of(real), RATES)
    fewest = steps_of("student", len(real.train), 0.0)
    in_time = makespan(recipe, stages, hardware.cores) <= 60 * hardware.minutes
    assert in_time or recipe.student.optimisation.steps == fewest
    assert recipe.student.fraction == (0.7 if hardware.accelerator else 0.3)
    assert f"{100 * recipe.student.fraction:.0f} % of a batch synthetic" in "\n".join(derived.reasons)


def test_the_reasons_name_the_numbers(tmp_path: Path) -> None:
    data = Digits()
    derived = derive(data, data.load(), ThreatModel(epsilon=0.15), Hardware(cores=2, minutes=8.0), timing=timing)
    recipe, text = derived.recipe, "\n".join(derived.reasons)
    assert all(reason and "\n" not in reason for reason in derived.reasons)
    assert isinstance(recipe.denoiser, DenoiserTraining)
    g, e = recipe.generation, recipe.evaluation
    for number in (
        1797,
        300,
        150,
        1347,
        g.count,
        recipe.denoiser.optimisation.steps,
        recipe.student.optimisation.steps,
    ):
        assert f"{number:,}" in text
    for words in (f"blocks of {g.block}", f"{g.levels.steps} Heun steps", f"PGD of {e.pgd.steps} steps"):
        assert words in text
    assert "38.2 of 255" in text
    assert "no image is mirrored" in text
    assert "bfloat16: bfloat16 takes 0.60 times" in text
    assert "2.7 points" in text  # 0.98 / sqrt(1,347)


def test_more_time_is_never_less_of_anything() -> None:
    data = Digits(train_images=1000)
    real, before = data.load(), (0, 0, 0, 0)
    for minutes in (1.0, 3.0, 8.0, 15.0, 30.0, 300.0):
        recipe = derive(data, real, ThreatModel(), Hardware(cores=2, minutes=minutes), timing=timing).recipe
        assert isinstance(recipe.denoiser, DenoiserTraining)
        steps = recipe.denoiser.optimisation.steps, recipe.student.optimisation.steps
        now = (*steps, recipe.generation.count, recipe.seeds)
        assert minutes in (15.0, 30.0) or all(a <= b for a, b in zip(before, now, strict=True)), (before, now)
        before = now  # at 20 minutes on two cores attacks and samplers take more steps, for which others may go
    assert recipe.seeds == 5
    asked = derive(data, real, ThreatModel(), Hardware(minutes=300.0), seeds=1, timing=timing).recipe
    assert asked.seeds == 1


def test_arms_that_make_no_sense_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    data = NpzImages(path=archive(tmp_path / "own.npz", 20, 12, 32))
    real, small = data.load(), Hardware(memory=2**30)
    derived = derive(data, real, ThreatModel(), small, timing=timing)
    assert derived.recipe.arms == (Arm.REAL, Arm.PLAIN, Arm.GUIDED)
    assert any("no Gaussian control: the covariances of 20 classes" in reason for reason in derived.reasons)
    asked = derive(data, real, ThreatModel(), small, arms=(Arm.REAL, Arm.GAUSSIAN), timing=timing)
    assert asked.recipe.arms == (Arm.REAL, Arm.GAUSSIAN)
    assert asked.recipe.control.block * (32 * 32 * 3) ** 2 * 8 <= 2**28


def test_the_curve_of_epsilons_stays_within_one() -> None:
    data = Digits()
    for threat in (ThreatModel(norm="l2", epsilon=0.9), ThreatModel(epsilon=0.01)):
        curve = derive(data, data.load(), threat, CPU, timing=timing).recipe.evaluation.curve
        assert all(0 < e <= 1 for e in curve)
        assert threat.epsilon in curve
    with pytest.raises(UserError, match="linf or l2"):
        derive(data, data.load(), ThreatModel(norm="l1", epsilon=12.0), CPU, timing=timing)


def hand_made(arms: tuple[Arm, ...], seeds: int = 1) -> Recipe:
    data = Digits()
    recipe = derive(data, data.load(), ThreatModel(), CPU, arms=arms, seeds=seeds, timing=timing).recipe
    assert recipe.seeds == seeds
    return recipe


STAGES = {
    "denoiser": 100.0,
    "teacher": 5.0,
    "student": 40.0,
    "rows": 10.0,
    "control": 1.0,
    "plain": 30.0,
    "guided": 60.0,
}


def test_the_time_of_a_run_counted_by_hand() -> None:
    whole = hand_made(tuple(Arm))
    # one process: 100; 40 + 10; 5 + 1 + 50; 30 + 50 (teacher and denoiser are there); 60 + 50
    assert makespan(whole, STAGES, 1) == pytest.approx(100 + 50 + 56 + 80 + 110 + 2 * START)
    # two: one makes the denoiser until 100, then plain until 180; the other real until 50, Gaussian until 106 and
    # guided, whose student of real images is there, until 216
    assert makespan(whole, STAGES, 2) == pytest.approx(216 * SIDE_BY_SIDE + 2 * START)
    # two, guided alone: the denoiser until 100, beside it teacher and then waiting; 40 (encoder) + 60 + 50 more
    assert makespan(hand_made((Arm.GUIDED,)), STAGES, 2) == pytest.approx(250 * SIDE_BY_SIDE + 2 * START)
    assert makespan(hand_made((Arm.REAL,), seeds=3), STAGES, 8) == pytest.approx(50 * SIDE_BY_SIDE + 2 * START)
    assert work(whole, STAGES) == {
        "denoiser": 100, "student": 160, "rows": 40, "teacher": 5, "control": 1, "plain": 30, "guided": 60,
    }  # fmt: skip


def test_jobs_are_those_of_a_run() -> None:
    for arms in (tuple(Arm), (Arm.REAL, Arm.GAUSSIAN), (Arm.GUIDED,)):
        recipe = hand_made(arms, seeds=2)
        assert len(jobs(recipe)) == len(jobs_of(recipe))


def test_costs_are_counted_from_the_recipe() -> None:
    recipe, sizes = hand_made(tuple(Arm)), Sizes(train=300, validation=150, test=1347, classes=10, numbers=64)
    stages = stage_seconds(recipe, sizes, RATES)
    assert isinstance(recipe.denoiser, DenoiserTraining)
    assert stages["denoiser"] == pytest.approx(recipe.denoiser.optimisation.steps * 128 * 1.4e-3)
    steps = recipe.generation.levels.steps
    assert network_calls(recipe.generation) == 2 * steps - 1
    assert stages["plain"] == pytest.approx(recipe.generation.count * (2 * steps - 1) * 4e-4)
    assert stages["plain"] < stages["guided"] < 1.5 * stages["plain"]
    twice = stage_seconds(recipe, sizes, replace(RATES, gradient=2 * RATES.gradient))
    assert twice["rows"] == pytest.approx(2 * stages["rows"])


def test_networks_are_timed_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, real = hand_made((Arm.REAL,)), Digits().load()
    monkeypatch.setattr("gambeson.recipes.costs.LONG_ENOUGH", 0.0)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    rates = measure(recipe, real)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert all(0 < seconds < 1 for seconds in asdict(rates).values())
    assert rates.student_step > rates.gradient  # ten gradients and a step: even under others' load


def test_timings_are_remembered(tmp_path: Path) -> None:
    asked, recipe, real = [], hand_made((Arm.REAL,)), Digits().load()

    def counted(recipe: Recipe, real: object, device: str = "cpu") -> Rates:
        asked.append(device)
        return RATES

    for _ in range(2):
        assert remembered(tmp_path / "timings.json", counted)(recipe, real, "cpu") == RATES
    longer = replace(
        recipe, student=replace(recipe.student, optimisation=replace(recipe.student.optimisation, steps=9))
    )
    remembered(tmp_path / "timings.json", counted)(longer, real, "cpu")
    assert len(asked) == 1
    wider = replace(recipe, student=replace(recipe.student, network=replace(recipe.student.network, width=8)))
    remembered(tmp_path / "timings.json", counted)(wider, real, "cpu")
    assert len(asked) == 2
    (tmp_path / "timings.json").write_text("{")
    with pytest.raises(EnvironmentFault, match=r"timings\.json"):
        remembered(tmp_path / "timings.json", counted)(recipe, real, "cpu")


def test_the_forecast_says_what_the_minutes_mean() -> None:
    recipe, real = hand_made(tuple(Arm)), Digits().load()
    seconds = makespan(recipe, stage_seconds(recipe, Sizes.of(real), RATES), 2)
    first, *more = forecast(recipe, real, RATES, 2, seconds / 60)
    assert first.startswith("about ")
    assert "diffusion model" in first
    assert more == []
    assert "more than the 0.1 minutes asked for" in forecast(recipe, real, RATES, 2, 0.1)[1]
    assert "would allow more" in forecast(recipe, real, RATES, 2, 1000.0)[1]


def test_what_lies_in_a_folder_decides_how_it_is_read(tmp_path: Path) -> None:
    root = pictures(tmp_path / "own", {"circle": 30, "cross": 10, "stripe": 14}, grey=True)
    found = survey(ImageFolder(path=str(root)))
    assert found is not None
    assert found.counts == {"circle": 30, "cross": 10, "stripe": 14}
    assert found.grey
    assert 11 <= found.sides[0] <= found.sides[-1] <= 20
    data = fitting(ImageFolder(path=str(root)), found, 32)
    assert isinstance(data, ImageFolder)
    assert (data.size, data.grey, data.flip_safe) == (16, True, False)
    real = data.load()
    assert real.shape == (1, 16, 16)
    assert real.test.labels.bincount().min() >= 3
    assert real.validation.labels.bincount().min() >= 2


def test_own_parts_are_kept_and_large_sets_hold_out_fewer(tmp_path: Path) -> None:
    for part in ("train", "test"):
        pictures(tmp_path / "own" / part, {"a": 8, "b": 8})
    found = survey(ImageFolder(path=str(tmp_path / "own")))
    assert found is not None
    assert (found.has_test, found.has_validation, found.least) == (True, False, 7)
    assert len(fitting(ImageFolder(path=str(tmp_path / "own")), found, 16).load().test) == 16
    large = Survey(place="", counts={"a": 50_000, "b": 50_000}, sides=(100,))
    data = fitting(ImageFolder(), large, 32)
    assert isinstance(data, ImageFolder)
    assert (data.test_share, data.validation_share, data.size) == (0.02, 0.006, 32)
    assert [side(replace(large, sides=(s,)), 64) for s in (3, 9, 11, 13, 43, 300)] == [8, 8, 8, 16, 32, 64]


TINY = """
--workers 1 --denoiser.network.width 8 --denoiser.optimisation.steps 4 --denoiser.optimisation.batch_size 16
--student.network.width 4 --student.optimisation.steps 4 --student.optimisation.batch_size 16
--student.loss.loss.steps 2 --student.validations 1 --teacher.network.width 4 --teacher.optimisation.steps 4
--generation.count 24 --generation.block 12 --generation.levels.steps 8 --control.count 24
--evaluation.pgd.steps 2 --evaluation.apgd.steps 3 --evaluation.targeted.steps 2 --evaluation.curve 0.01 0.05
--evaluation.curve_attack.steps 2 --evaluation.check_images 10
""".split()  # noqa: SIM905 a command line reads better whole


WORDS = ["--student.optimisation.steps", "300", "--print-recipe", "--runs"]


@pytest.fixture
def gambeson(monkeypatch: pytest.MonkeyPatch):
    """The command line, whose `run` is that of run_command; networks are timed as shortly as possible."""
    monkeypatch.setattr("gambeson.recipes.costs.LONG_ENOUGH", 0.0)
    monkeypatch.setitem(cli.COMMANDS, "run", run)
    return cli.main


def test_a_folder_of_pictures_runs_to_its_report(
    gambeson, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gambeson.recipes.asked.remembered", lambda path: timing)
    pictures(tmp_path / "my images", {"circle": 24, "cross": 20, "stripe": 20})
    monkeypatch.chdir(tmp_path)
    command = ["run", "my images", "--threat", "linf:8/255", "--minutes", "1", "--runs", "runs", *TINY]
    assert gambeson(command) == 0
    said = capfd.readouterr().out
    folder = next(p.parent for p in (tmp_path / "runs").glob("*/recipe.yaml"))
    assert re.fullmatch(r"my-images-\w{10}", folder.name)
    assert "- 64 images of 16x16 pixels and 3 channels in 3 classes" in said
    assert "- about " in said
    assert f"report: {folder / 'report.html'}" in said
    assert "8 of 255" in (folder / "reasons.txt").read_text()
    recipe = files.load(folder / "recipe.yaml", Recipe, class_table())
    assert recipe.data.path == str(tmp_path / "my images")  # type: ignore[union-attr]
    assert (recipe.generation.count, recipe.arms, recipe.threat) == (24, tuple(Arm), ThreatModel())
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("done.json")}
    monkeypatch.chdir("/")
    assert gambeson(["run", str(folder), "--workers", "1", "--runs", str(tmp_path / "runs")]) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("done.json")} == stamps
    capfd.readouterr()
    again = [str(tmp_path / "my images"), *command[2:6], *TINY, "--runs", str(tmp_path / "runs"), "--print-recipe"]
    assert gambeson(["run", *again]) == 0
    (tmp_path / "again.yaml").write_text(capfd.readouterr().out)
    assert files.load(tmp_path / "again.yaml", Recipe, class_table()).digest == recipe.digest


def test_the_recipe_can_be_printed_and_every_field_set(
    gambeson, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = pictures(tmp_path / "own", {"circle": 20, "cross": 20})
    (tmp_path / "runs").mkdir()
    words = "--threat l2:0.5 --arms real plain --seeds 2 --data.size=8 --data.flip_safe true"
    assert gambeson(["run", str(root), *words.split(), *WORDS, str(tmp_path / "runs")]) == 0
    said = capfd.readouterr().out
    assert said.startswith("# 40 images of 8x8 pixels")
    (tmp_path / "recipe.yaml").write_text(said)
    recipe = files.load(tmp_path / "recipe.yaml", Recipe, class_table())
    assert recipe.threat == ThreatModel(norm="l2", epsilon=0.5)
    assert (recipe.arms, recipe.seeds) == ((Arm.REAL, Arm.PLAIN), 2)
    assert isinstance(recipe.data, ImageFolder)
    assert (recipe.data.size, recipe.data.flip_safe) == (8, True)
    assert recipe.student.optimisation.steps == 300
    assert "images are mirrored" in said
    assert "guidance: cdp-fast" not in said  # the arm was not asked for
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs" / "timings.json"]
    assert len(json.loads((tmp_path / "runs" / "timings.json").read_text())) == 2


TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"


def test_the_commands_of_the_tutorial_work(
    gambeson, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    snippet = re.search(r"<<'END'\n(.*?)\nEND", text, re.DOTALL)
    assert snippet
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gambeson.recipes.asked.remembered", lambda path: timing)
    exec(snippet[1], {})
    commands = re.findall(r"^gambeson (run .*?) *(?:#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 5
    assert gambeson(["run", "my-images", "--print-recipe"]) == 0
    folder = tmp_path / "runs" / "my-images-0123456789"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(capfd.readouterr().out)
    for command in commands:
        assert gambeson([*command.split(), "--print-recipe"]) == 0, command
        (tmp_path / "recipe.yaml").write_text(capfd.readouterr().out)
        assert len(files.load(tmp_path / "recipe.yaml", Recipe, class_table()).data.load().class_names) == 10
    for option in re.findall(r"`(--[a-z][\w.-]*) ", text):
        assert option[2:] in (*dict.fromkeys(path for path, *_ in flat_fields(named("digits"))), *OWN), option


OWN = ("threat", "minutes", "data.on_bad_image", "data.size", "data.flip_safe")


def one_class(root: Path) -> Path:
    return pictures(root, {"cat": 12})


def too_few(root: Path) -> Path:
    return pictures(root, {"cat": 12, "dog": 4, "hen": 9})


def loose(root: Path) -> Path:
    return pictures(root, {".": 5})


def unreadable(root: Path) -> Path:
    pictures(root, {"cat": 12, "dog": 12})
    (root / "dog" / "000.png").write_bytes(b"no picture")
    return root


def strange_keys(root: Path) -> Path:
    root.mkdir()
    np.savez(root / "own.npz", pixels=np.zeros((20, 8, 8, 3), np.uint8), classes=np.zeros(20, np.int64))
    return root / "own.npz"


def text_labels(root: Path) -> Path:
    root.mkdir()
    np.savez(root / "own.npz", images=np.zeros((20, 8, 8, 3), np.uint8), labels=np.array(["a", "b"] * 10))
    return root / "own.npz"


def a_picture(root: Path) -> Path:
    return pictures(root, {"cat": 1}) / "cat" / "000.png"


MISTAKES = {
    "one class": (one_class, "", "at least 2 classes, got 1: cat"),
    "too few": (too_few, "", "at least 10 images of each class.*dog has 4, hen has 9"),
    "loose files": (loose, "", "found none but 5 files"),
    "unreadable": (unreadable, "", "dog/000.png"),
    "other keys": (strange_keys, "", "pixels, classes"),
    "labels that are text": (text_labels, "", "whole numbers from 0 as labels"),
    "a picture": (a_picture, "", "expected .*a folder with a folder for each class.*000.png"),
    "nothing there": (lambda root: root, "", "which is not there"),
    "minutes": (one_class, "--minutes soon", "--minutes: expected a number above 0, got 'soon'"),
    "threat": (one_class, "--threat linf", "NORM:EPSILON"),
    "l1": (lambda root: pictures(root, {"a": 12, "b": 12}), "--threat l1:12", "linf or l2"),
    "a field the images do not have": (lambda root: pictures(root, {"a": 12, "b": 12}), "--data.szie 8", "--data.size"),
    "a field the recipe does not have": (lambda root: pictures(root, {"a": 12, "b": 12}), "--gen 8", "--gen"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_in_one_paragraph(
    mistake: str, gambeson, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words, expected = MISTAKES[mistake]
    monkeypatch.setattr("gambeson.recipes.asked.remembered", lambda path: timing)
    assert gambeson(["run", str(make(tmp_path / "own")), *words.split(), "--runs", str(tmp_path / "runs")]) == 2
    said = capfd.readouterr().err
    assert re.search(expected, said), said
    assert "Traceback" not in said
    assert "\n\n" not in said.strip()
    assert not list((tmp_path / "runs").glob("*/recipe.yaml"))


def test_help_comes_without_images(gambeson, capsys: pytest.CaptureFixture[str]) -> None:
    assert gambeson(["run", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("digits", "--threat", "--minutes", "--data.FIELD", "--print-recipe", "--workers"):
        assert word in shown
