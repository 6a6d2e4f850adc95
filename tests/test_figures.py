"""The guidance figures: statistics worked by hand, an exact start and plain panel, calibrated strengths, same bytes."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from gambeson.cli import main
from gambeson.sampling.guidance import ContrastiveGuidance
from gambeson.sampling.levels import TimestepLevels
from gambeson.theory import guidance_figure as experiment
from gambeson.theory.findings import STATEMENTS, against_plain, paired_difference, summary, verdict
from gambeson.theory.guidance_figure import Batch, Probe, Result, Setting, Variant
from gambeson.theory.world import draw_balanced, expected, statistics

START = "N(0, I)"


def variant(name: str, images: int = 200) -> Variant:
    return next(v for v in experiment.variants(images) if v.name == name)


def test_statistics_of_four_points_by_hand() -> None:
    """Class 0 around (1, 0), class 1 around (5, 2), whose first point is nearer to class 0's mean."""
    points = torch.tensor([[0.5, 0.0], [1.5, 0.0], [2.5, 0.0], [7.5, 4.0]])
    numbers = statistics(points, torch.tensor([0, 0, 1, 1]))
    assert numbers["within"] == pytest.approx((0.25 + 10.25) / 4)
    assert numbers["between"] == pytest.approx(math.sqrt(20))
    assert numbers["separation"] == pytest.approx(math.sqrt(20 / 2.625))
    assert numbers["accuracy"] == 0.75
    assert numbers["agreement"] == 0.5
    assert numbers["core"] == 0
    assert numbers["lobes"] == pytest.approx(1)
    assert numbers["turn"] == pytest.approx(45 - math.degrees(math.atan2(2, 4)))


def test_statistics_need_both_classes() -> None:
    with pytest.raises(ValueError, match="classes 0 and 1"):
        statistics(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))


def test_core_and_lobes_tell_circle_gaussian_and_two_heaps_apart() -> None:
    classes = torch.arange(400) % 2
    angle = torch.arange(400) * (2 * math.pi / 400)
    circle = statistics(torch.stack([angle.cos(), angle.sin()], 1), classes)
    assert circle["core"] == 0
    assert circle["lobes"] < 1e-6
    heaps = statistics(torch.stack([angle.cos().sign() * 3 + angle.sin(), angle.cos()], 1), classes)
    assert heaps["core"] == 0
    assert heaps["lobes"] > 0.6


def test_the_worlds_own_statistics() -> None:
    numbers = statistics(*draw_balanced(40000, torch.Generator().manual_seed(0)))
    for name, exact in expected().items():
        assert numbers[name] == pytest.approx(exact, abs=1 if name == "turn" else 0.02), name


@pytest.mark.parametrize("start", experiment.STARTS)
def test_the_start_is_the_papers_and_the_unguided_samples_are_exact(start: str) -> None:
    """In VP coordinates the first state is N(0, scale^2 I); DDIM then maps it linearly, as `ddim_alone` says."""
    batch, scale, seen = Batch.of(0, 2000), experiment.STARTS[start], []

    class First:
        def init(self, block: int, generator: torch.Generator | None = None) -> None: ...

        def __call__(self, state: None, step: experiment.Step) -> tuple[None, None]:
            if step.index == 0:
                seen.append(step.x / math.hypot(1, step.sigma))
            return None, None

    points = experiment.sample(batch, scale, First())
    assert torch.allclose(seen[0], batch.noise * scale, rtol=1e-5)
    assert float(seen[0].std()) == pytest.approx(scale, rel=0.03)
    exact = experiment.ddim_alone(scale)
    mean = exact["between"] / math.sqrt(8) * (2 * batch.classes[:, None] - 1)
    assert torch.allclose(points, mean + math.sqrt(exact["within"]) * batch.noise, atol=1e-4)
    for name, value in statistics(points, batch.classes).items():
        assert value == pytest.approx(exact[name], rel=0.05, abs=4 if name == "turn" else 0.04), name


def test_the_plain_panel_is_the_world_but_for_eulers_steps() -> None:
    """From N(0, I) the variance is 7 % too small, all else right; from N(0, 4I) four times as large."""
    near, far = (experiment.ddim_alone(scale) for scale in experiment.STARTS.values())
    assert near["within"] == pytest.approx(1, abs=0.08)
    assert near["between"] == pytest.approx(expected()["between"], rel=0.01)
    assert far["within"] == pytest.approx(4 * near["within"])


@pytest.mark.parametrize("name", ["infonce", "hnm", "hnm-conditional", "hnm-real-negatives", "infonce-real-positives"])
def test_every_variant_is_as_strong_as_the_others(name: str) -> None:
    spec = variant(name).guidance
    assert spec is not None
    found = experiment.calibrate(spec, 1.0, 0.25, 100)
    batch = Batch.of(experiment.CALIBRATION, 100)
    probe = Probe(ContrastiveGuidance(replace(found, clip=None), experiment.coordinates, real=batch.real))
    plain = experiment.sample(batch, 1.0, None)
    assert torch.equal(experiment.sample(batch, 1.0, probe), plain)
    assert probe.change / probe.eps == pytest.approx(0.25, rel=1e-4)


@pytest.fixture(scope="module")
def figure_2() -> list[Result]:
    setting = Setting(seeds=5)
    return [experiment.measure(setting, variant(name), START, setting.ratio) for name in experiment.FIGURE_2]


def test_classes_separate_and_hard_negatives_alone_form_circles(figure_2: list[Result]) -> None:
    """What is measured: CDP's Figure 2 holds for the class-conditional loss, the opposite for the other one."""
    plain, hard, conditional = figure_2
    assert all(a < b for a, b in zip(hard.values["separation"], plain.values["separation"], strict=True))
    assert conditional.mean("separation") > 1.2 * plain.mean("separation")
    assert conditional.mean("within") < 0.8 * plain.mean("within") < plain.mean("within") < hard.mean("within")
    assert hard.mean("core") < 0.04 < 0.08 < min(plain.mean("core"), conditional.mean("core"))
    difference = against_plain(figure_2, START)["hnm-conditional"]["separation"]
    assert difference["mean"] > difference["half_width"] > 0


def test_results_are_the_same_again(figure_2: list[Result]) -> None:
    again = experiment.measure(Setting(seeds=5), variant("hnm-conditional"), START, 0.25)
    assert again.values == figure_2[2].values
    assert torch.equal(again.points, figure_2[2].points)


def test_paired_differences_by_hand() -> None:
    """1, 2, 3: mean 2, standard deviation 1; t with 2 degrees of freedom has 97.5 % below 4.30265."""
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found == pytest.approx({"mean": 2.0, "half_width": 4.302653 / math.sqrt(3)}, rel=1e-6)


@pytest.mark.parametrize(
    ("mean", "half", "lobes", "word"),
    [
        (-0.2, 0.1, 0.1, "holds"),
        (-0.2, 0.3, 0.1, "no clear difference"),
        (0.2, 0.1, 0.1, "opposite"),
        (-0.2, 0.1, 0.5, "hollow, but in two heaps"),
    ],
)
def test_verdicts(mean: float, half: float, lobes: float, word: str) -> None:
    assert verdict({"core": {"mean": mean, "half_width": half}}, "core", -1, lobes) == word


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders that the same command filled, walking ten steps instead of fifty."""
    folders = [tmp_path_factory.mktemp("figures") / "new" / name for name in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "LEVELS", TimestepLevels(kind="uniform", steps=10))
        for folder in folders:
            assert main(["figures", "guidance", "--images", "12", "--seeds=2", "--out", str(folder)]) == 0
    return folders


def test_the_command_writes_the_same_bytes_twice(written: list[Path]) -> None:
    names = ["guidance-conditional", "guidance-start-1", "guidance-start-4"]
    assert sorted(p.name for p in written[0].iterdir()) == sorted(
        ["guidance.json", *(f"{n}.{kind}" for n in names for kind in ("svg", "png"))]
    )
    for path in written[0].iterdir():
        assert path.read_bytes() == (written[1] / path.name).read_bytes(), path.name


def test_the_json_has_every_panel_with_numbers_seeds_and_spread(written: list[Path]) -> None:
    content = json.loads((written[0] / "guidance.json").read_text())
    names = [v.name for v in experiment.variants(12)]
    assert [(p["start"], p["variant"]) for p in content["panels"]] == [(s, n) for s in experiment.STARTS for n in names]
    for panel in content["panels"]:
        assert (panel["seeds"], panel["images_per_seed"]) == (2, 12)
        for name in ("within", "between", "separation", "accuracy", "agreement", "core", "lobes", "turn"):
            a, b = panel[name]["values"]
            assert panel[name]["mean"] == pytest.approx((a + b) / 2)
            assert panel[name]["std"] == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-9)
        guided = panel["variant"] != "plain"
        assert (panel["ratio"], panel["guidance"] is not None) == ((0.25 if guided else None), guided)
        assert (panel["difference"] is not None) == guided
    assert {p["ratio"] for p in content["other_ratios"]} == {0.1, 0.5}
    assert content["exact"]["world"]["between"] == pytest.approx(2 * math.sqrt(2))
    assert {"holds", "opposite", "no clear difference", "hollow, but in two heaps"} >= {
        f["verdict"] for f in content["findings"]
    }
    assert len(content["findings"]) == 2 * (2 + 2 + 1 + 8)


def test_the_pictures_say_what_they_show(written: list[Path]) -> None:
    root = ElementTree.parse(written[0] / "guidance-start-4.svg").getroot()
    text = " ".join(e.text or "" for e in root.iter() if e.tag.endswith("text"))
    assert "N(0, 4I)" in text
    for shown in experiment.variants(12):
        assert shown.title in text
    header = (written[0] / "guidance-start-4.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == 1200


def test_the_summary_tells_every_statement_at_every_start(written: list[Path]) -> None:
    lines = summary(json.loads((written[0] / "guidance.json").read_text())["findings"])
    for _, names, *_ in STATEMENTS:
        assert all(sum(name in line.replace(",", " ").split() for line in lines) >= 2 for name in names)
    assert not any("supervised" in line for line in lines)
    assert sum(line.startswith("CDP, ") for line in lines) == len(STATEMENTS)


def test_figure_1_shows_the_cases_with_their_numbers(tmp_path: Path) -> None:
    """Across mu is chance, c mu has the best clean accuracy, c (mu - epsilon 1) the best robust one where it may."""
    for name in "ab":
        assert main(["figures", "figure-1", "--out", str(tmp_path / name)]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    cases = json.loads((tmp_path / "a" / "figure-1.json").read_text())["cases"]
    across, scaled, shifted, below, threshold = cases
    assert across["clean"] == pytest.approx(0.5)
    assert scaled["clean"] == pytest.approx(scaled["optimum"]["clean"])
    assert shifted["robust"] == pytest.approx(shifted["optimum"]["robust"])
    assert below["robust"] == pytest.approx(0.5259, abs=1e-4)
    assert threshold["robust"] == pytest.approx(threshold["optimum"]["robust"])
    for case in cases:
        assert case["trials"]["clean"]["mean"] <= case["optimum"]["clean"]
    root = ElementTree.parse(tmp_path / "a" / "figure-1.svg").getroot()
    text = " ".join(e.text or "" for e in root.iter() if e.tag.endswith("text"))
    for case in cases:
        assert case["title"] in text


@pytest.mark.parametrize(("number", "start", "panels"), [(2, "N(0, I)", 3), (3, "N(0, I)", 11), (4, "N(0, 4I)", 11)])
def test_each_figure_has_its_command(
    number: int, start: str, panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "LEVELS", TimestepLevels(kind="uniform", steps=4))
    assert main(["figures", f"figure-{number}", "--images", "8", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"figure-{number}.{kind}" for kind in ("svg", "png", "json")}
    content = json.loads((tmp_path / f"figure-{number}.json").read_text())
    assert {p["start"] for p in content["panels"]} == {start}
    assert len(content["panels"]) == panels
    assert [p["difference"] is None for p in content["panels"]] == [True, *[False] * (panels - 1)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "guidance"),
        (["circles"], "expected one of figure-1"),
        (["guidance", "more"], "no further words, got more"),
        (["guidance", "--seeds", "1"], "at least 2"),
        (["guidance", "--seeds", "many"], "whole number"),
        (["guidance", "--images", "9"], "even number"),
        (["guidance", "--out"], "a value after it"),
        (["figure-1", "--seeds", "3"], "no option but --out, got --seeds"),
        (["figure-2", "--seeds", "1"], "at least 2"),
    ],
)
def test_mistakes_are_told_and_exit_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_exits_with_3(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert main(["figures", "guidance", "--out", str(tmp_path / "file" / "below")]) == 3


def test_help_names_the_figures_and_imports_nothing_heavy() -> None:
    code = "import sys; from gambeson.cli import main; main(['figures', '--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "guidance" in out.splitlines()[5]
    assert not {"torch", "numpy", "matplotlib", "scipy"} & set(out.split())
