"""The report: queries over rows, the verdict's honesty, escaping, missing parts, and the page in a real browser."""

import base64
import dataclasses
import io
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from gambeson.errors import EnvironmentFault
from gambeson.report import charts, page, page_classes, page_curves, page_pictures, rows, verdict
from gambeson.report.embedding import embed
from gambeson.report.images import pictures, smaller, sparser
from gambeson.report.material import (
    Adversarial,
    ArmMaterial,
    CheckRecord,
    Confusion,
    FeatureSet,
    Grids,
    GuidanceEnergy,
    RunMaterial,
    SelectionScores,
    StageRecord,
    TrainingCurve,
)

IMAGES, CLASSES = 200, 10
ARMS = {"real": ("Real only", 0.0), "gaussian": ("Gaussian control", 0.02), "plain": ("Plain diffusion", 0.25),
        "guided": ("Contrastive-DP", 0.26)}  # fmt: skip
NASTY = "<b>\"x'</b>"


def table(seeds, lift, rng_seed=0):
    """Rows whose margins share hard images; a larger lift is a more robust arm. Each seed has its own row order."""
    hard, label = np.random.default_rng(0).normal(0, 1, IMAGES), np.arange(IMAGES) % CLASSES
    parts = []
    for seed in range(seeds):
        rng = np.random.default_rng([rng_seed, seed])
        margin = 1.6 + lift + hard + rng.normal(0, 0.1) + rng.normal(0, 0.3, IMAGES)
        ce, t, order = margin > 0.62, margin > 0.66, rng.permutation(IMAGES)
        columns = {
            "seed": np.full(IMAGES, seed), "index": np.arange(IMAGES), "label": label,
            "prediction": np.where(margin > 0, label, (label + 1) % CLASSES), "margin": margin,
            "pgd": margin > 0.6, "apgd_ce": ce, "apgd_t": t, "apgd": ce & t,
        }  # fmt: skip
        outside = np.arange(IMAGES) >= 120
        columns |= {f"robust@{e:g}": pa.array(margin > 4 * e, mask=outside) for e in (0.05, 0.1, 0.15, 0.2, 0.3)}
        parts.append(pa.table(columns).take(order))
    return pa.concat_tables(parts)


def training(seed, lift):
    rng = np.random.default_rng(seed)
    steps, every = list(range(400)), list(range(0, 401, 40))
    rise = 1 - np.exp(-np.arange(11) / 3)
    return TrainingCurve(
        seed=seed,
        steps=steps,
        loss=[float(v) for v in 2.3 * np.exp(-np.array(steps) / 150) + 0.5 + rng.normal(0, 0.08, 400)],
        validation_steps=every,
        validation_clean=[float(v) for v in 0.1 + 0.83 * rise],
        validation_robust=[float(v) for v in 0.1 + (0.65 + lift / 5) * rise],
    )


def material(seeds=1, arms=tuple(ARMS), **changes):
    """A run like the digits recipe, from seeded numpy."""
    rng = np.random.default_rng(0)
    built = tuple(
        ArmMaterial(
            key=key, title=ARMS[key][0], rows=table(seeds, ARMS[key][1], place),
            curves=tuple(training(seed, ARMS[key][1]) for seed in range(seeds)),
        )
        for place, key in enumerate(arms)
    )  # fmt: skip
    centres = rng.normal(0, 4, (CLASSES, 16))
    labels = np.arange(60) % CLASSES
    sets = tuple(
        FeatureSet(name=name, features=centres[labels] + rng.normal(0, 1 + 0.2 * k, (60, 16)), labels=labels,
                   space="teacher features")
        for k, name in enumerate(("real", "plain", "guided"))
    )  # fmt: skip
    samples = rng.integers(0, 256, (CLASSES, 8, 8, 8, 1), dtype=np.uint8)
    stages = [("denoiser", "", 61.2, 810.0), ("teacher", "", 14.0, 600.0)]
    stages += [("generate", key, 88.1, 900.0) for key in ("plain", "guided")]
    stages += [(stage, key, t, 700.0) for key in arms for stage, t in (("student", 71.5), ("evaluate", 33.3))]
    fields = {
        "name": "digits", "title": "Handwritten digits, 300 training images", "digest": "3f9a" * 16,
        "recipe_text": "threat:\n  norm: linf\n  epsilon: 0.15\nstudent:\n  steps: 400\n  loss: {beta: 5.0}\n",
        "threat": "linf eps 0.15", "epsilon": 0.15, "class_names": tuple("0123456789"),
        "counts": {"train": 300, "validation": 150, "test": 1347}, "arms": built, "command": "gambeson run digits",
        "created": "2025-03-01 12:00 UTC", "features": sets,
        "grids": Grids(plain=samples, guided=255 - samples),
        "stages": tuple(StageRecord(stage=s, arm=a, seed=i, seconds=t, peak_mb=mb, reused=s == "teacher")
                        for s, a, t, mb in stages for i in range(seeds)),
        "checks": tuple(CheckRecord(arm=key, seed=i, name=name, passed=True, detail="as expected") for key in arms
                        for i in range(seeds) for name in ("outputs are logits", "gradients are not zero",
                                                           "accuracy reaches 0 as epsilon grows")),
        "versions": {"gambeson": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.2"},
        "attacks": {"pgd": "40 steps", "apgd": "100 steps each", "curve": "20 steps"},
    }  # fmt: skip
    return RunMaterial(**(fields | changes))


def adversarial(arm="guided", n=6, shape=(8, 8, 1), classes=CLASSES, noise=20):
    """Images with a pattern and changes of at most `noise`; every other one is broken."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 200, (n, *shape), dtype=np.uint8)
    change = rng.integers(-noise, noise + 1, images.shape)
    labels = np.arange(n) % classes
    return Adversarial(
        arm=arm, seed=0, attack="PGD, 40 steps", images=images, labels=labels, indices=np.arange(n) * 7,
        attacked=np.clip(images + change, 0, 255).astype(np.uint8), predictions=labels,
        attacked_predictions=np.where(np.arange(n) % 2, labels, (labels + 1) % classes),
    )  # fmt: skip


def confusion(arm, classes=CLASSES, each=40):
    """Most images right clean, two thirds under attack; the others are taken for a neighbour."""
    clean, attacked = (np.eye(classes, dtype=np.int64) * right for right in (each - 4, 2 * each // 3))
    for counts in (clean, attacked):
        counts[np.arange(classes), (np.arange(classes) + 1) % classes] += each - counts.sum(1)
    return Confusion(arm=arm, seeds=(0, 1, 2), attack="APGD-CE, then targeted APGD", clean=clean, attacked=attacked)


def energy(steps=18):
    sigma = np.append(np.geomspace(80.0, 0.02, steps - 1), 0.0)
    shift = 0.3 * np.exp(-((np.log(sigma.clip(1e-3)) + 0.5) ** 2))
    return GuidanceEnergy(sigma=sigma, shift=shift, low=shift * 0.6, high=shift * 1.5, images=64, how="seed 0")


def selection(arm, seed=0):
    rng = np.random.default_rng(4)
    edges = np.linspace(0, 1, 31)
    left, kept = (np.histogram(rng.beta(a, 2, n), edges)[0].astype(np.int64) for a, n in ((3, 3000), (8, 1000)))
    return SelectionScores(arm=arm, seed=seed, score="confidence", edges=edges, kept=kept, left=left)


def scored(plain, guided):
    """Grids with scores, nearest images and distances."""
    rng = np.random.default_rng(5)
    numbers = {f"{name}_{what}": rng.random(plain.shape[:2]) * 9
               for name in ("plain", "guided") for what in ("scores", "distance")}  # fmt: skip
    return Grids(plain=plain, guided=guided, plain_nearest=guided, guided_nearest=plain, score_name="confidence",
                 space="pixels", **numbers)  # fmt: skip


def rich(seeds=3, **changes):
    """A run with every part that a page can show."""
    plain = material(seeds)
    students = tuple(dataclasses.replace(plain.features[0], name=title, space="its own penultimate layer")
                     for title, _ in ARMS.values())  # fmt: skip
    grids = plain.grids
    assert grids is not None
    assert grids.plain is not None
    assert grids.guided is not None
    fields = {
        "grids": scored(grids.plain, grids.guided), "adversarial": (adversarial("real"), adversarial()),
        "confusions": tuple(confusion(arm) for arm in ("real", "guided")), "student_features": students,
        "energy": energy(), "selections": (selection("plain"), selection("guided")),
        "synthetic": {"real": 0, "gaussian": 4000, "plain": 4000, "guided": 4000},
        "licences": {"data": "CC BY 4.0", "denoiser": "trained here"},
        "stages": (*plain.stages, StageRecord(stage="l", arm="plain", seed=0, seconds=3.0, peak_mb=9.0, joules=5e4)),
    }  # fmt: skip
    return dataclasses.replace(plain, **(fields | changes))


@pytest.fixture(scope="module")
def whole():
    return material(3)


@pytest.fixture(scope="module")
def full():
    return rich()


@pytest.fixture(scope="module")
def full_html(full):
    return page.render(full)


@pytest.fixture(scope="module")
def html(whole):
    return page.render(whole)


# --- queries over rows -------------------------------------------------------------------------------------------


def small(**columns):
    """Two seeds x three images; images 0 and 1 are right in seed 0, only image 0 in seed 1."""
    fields = {
        "seed": [0, 1, 0, 1, 0, 1], "index": [2, 0, 0, 1, 1, 2], "label": [1, 1, 1, 1, 1, 1],
        "prediction": [0, 1, 1, 0, 1, 0], "margin": [0.0] * 6, "pgd": [False, True, True, False, False, False],
        "apgd_ce": [False, True, False, False, False, False], "apgd_t": [False, True, True, False, False, False],
        "apgd": [False, True, False, False, False, False], "robust@0.1": [None, True, True, False, False, None],
    }  # fmt: skip
    return pa.table(fields | columns)


def test_cells_are_sorted_by_seed_and_image():
    found = rows.cells(small(), "clean")
    assert found.seeds.tolist() == [0, 1]
    assert found.indices.tolist() == [0, 1, 2]
    assert found.correct.tolist() == [[True, True, False], [True, False, False]]


def test_curve_uses_its_subset_of_images():
    points = rows.curve(ArmMaterial(key="a", title="A", rows=small()))
    assert [(p.epsilon, p.images, p.accuracy.estimate) for p in points] == [(0.0, 2, 0.75), (0.1, 2, 0.5)]


def test_cells_refuse_seeds_with_different_images():
    with pytest.raises(ValueError, match="seed 0: 4"):
        rows.cells(small(seed=[0, 1, 0, 1, 0, 0]), "clean")
    with pytest.raises(ValueError, match="each image once"):
        rows.cells(small(index=[2, 0, 0, 1, 1, 3]), "clean")


def test_arms_must_share_their_images():
    a = ArmMaterial(key="a", title="A", rows=small())
    b = ArmMaterial(key="b", title="B", rows=small(index=[5, 0, 0, 1, 1, 5]))
    with pytest.raises(ValueError, match="same test images"):
        rows.difference(a, b, "clean")


def test_arms_are_paired_over_common_seeds():
    a = ArmMaterial(key="a", title="A", rows=small())
    b = ArmMaterial(key="b", title="B", rows=small(seed=[1, 2, 1, 2, 1, 2]))
    c = ArmMaterial(key="c", title="C", rows=small(seed=[8, 9, 8, 9, 8, 9]))
    found = rows.difference(a, b, "clean")
    assert found is not None
    assert found.randomness == "test images"
    assert rows.difference(a, c, "clean") is None


def test_rows_that_contradict_themselves_fail_a_check():
    broken = small(apgd=[True, True, False, False, False, False])
    (check,) = rows.row_checks(
        material(arms=(), arms_=None) if False else _run(ArmMaterial(key="a", title="A", rows=broken))
    )
    assert (check.arm, check.seed, check.passed) == ("a", 0, False)
    assert check.detail == "1 images: apgd is not apgd_ce and apgd_t"


def _run(*arms):
    return dataclasses.replace(material(arms=()), arms=arms)


def test_rows_need_their_columns():
    with pytest.raises(ValueError, match="pgd bool"):
        ArmMaterial(key="a", title="A", rows=small().drop_columns(["pgd"]))
    with pytest.raises(ValueError, match="without nulls"):
        ArmMaterial(key="a", title="A", rows=small(pgd=[None, True, True, False, False, False]))


# --- the verdict -------------------------------------------------------------------------------------------------


def test_overlapping_arms_are_not_bold(whole):
    found = verdict.judge(whole)
    assert not any(score.bold for arm in found.arms for score in arm.scores.values())
    between = found.comparisons[-1]
    assert (between.arm, between.baseline) == ("Contrastive-DP", "Plain diffusion")
    assert "no difference is shown between Plain diffusion and Contrastive-DP" in found.sentences[1]


def test_a_clear_lead_is_bold_and_said():
    run = _run(
        ArmMaterial(key="real", title="Real only", rows=table(1, 0.0)),
        ArmMaterial(key="plain", title="Plain", rows=table(1, 0.8)),
    )
    found = verdict.judge(run)
    assert [arm.scores["apgd"].bold for arm in found.arms] == [False, True]
    assert found.sentences[0].startswith("Worst-case accuracy: Plain (+")
    assert "is above Real only" in found.sentences[0]
    markdown = verdict.markdown_table(run)
    assert re.search(r"\| Plain \|.*\*\*\d\d\.\d \(\d\d\.\d–\d\d\.\d\)\*\*", markdown)


def test_a_loss_is_said_too():
    run = _run(
        ArmMaterial(key="real", title="Real only", rows=table(1, 0.8)),
        ArmMaterial(key="plain", title="Plain", rows=table(1, 0.0)),
    )
    assert "is below Real only" in verdict.judge(run).sentences[0]


def test_randomness_is_named():
    one, three = verdict.judge(material(1)), verdict.judge(material(3))
    assert "over test images;" in one.caution
    assert "One seed says nothing about another training run" in one.caution
    assert "test images and training (3 seeds)" in three.caution
    assert "One seed" not in three.caution


def test_few_arms_are_spoken_of_truly():
    assert "nothing to say" in verdict.judge(_run()).sentences[0]
    alone = verdict.judge(material(arms=("plain",)))
    assert "nothing is compared" in alone.sentences[0]
    assert not alone.arms[0].scores["apgd"].bold
    unevaluated = _run(ArmMaterial(key="real", title="Real only"))
    assert verdict.judge(unevaluated).arms[0].scores == {}


def test_unpaired_arms_are_said_to_be():
    late = table(1, 0.5)
    late = late.set_column(0, "seed", pa.array(np.full(len(late), 7)))
    run = _run(
        ArmMaterial(key="real", title="Real only", rows=table(1, 0.0)),
        ArmMaterial(key="plain", title="Plain", rows=late),
    )
    assert "no seed in common" in verdict.judge(run).sentences[0]
    assert not any(s.bold for arm in verdict.judge(run).arms for s in arm.scores.values())
    assert "no common seed" in page.render(run)


def test_the_terminal_shows_the_same_numbers(whole):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(verdict.terminal_table(dataclasses.replace(whole, title="[red]not markup[/red]")))
    text = console.export_text()
    assert "[red]not markup[/red]" in text
    for arm in verdict.judge(whole).arms:
        assert verdict.percent(arm.scores["apgd"].accuracy.estimate) in text
        assert verdict.percent(arm.scores["apgd"].accuracy.estimate) in verdict.markdown_table(whole)


def test_markdown_escapes_titles():
    run = _run(ArmMaterial(key="a", title="a|b*c", rows=small()))
    assert "a\\|b\\*c" in verdict.markdown_table(run)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "+1.2"), (-0.0123, "−1.2"), (0.0001, "0.0"), (-0.0001, "0.0"), (0.0, "0.0")]
)
def test_points(value, text):
    assert verdict.points(value) == text


# --- the page ----------------------------------------------------------------------------------------------------


def test_page_is_whole_small_and_self_contained(html):
    for heading in (
        "Verdict",
        "What was asked",
        "Robust accuracy against epsilon",
        "Samples",
        "Feature space",
        "Training",
    ):
        assert f">{heading}</h2>" in html
    assert len(html.encode()) < 3_000_000
    assert not re.search(r'(src|href)="(?!#|data:)', html)
    assert "<script" not in html
    levels = [int(level) for level in re.findall(r"<h([1-6])", html)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_page_says_what_robust_overfitting_cost():
    """Two runs of an arm whose best look at the validation images was 4 and 2 points above the last: 3.0."""
    curves = [
        dataclasses.replace(training(n, 0.0), validation_robust=[0.2, 0.5, 0.5 - lost])
        for n, lost in ((0, 0.04), (1, 0.02))
    ]
    arms = (ArmMaterial(key="real", title="real only", rows=None, curves=tuple(curves)),)
    assert page_curves.overfitting(arms) == "Robust overfitting, best minus last in points: real only 3.0."


def test_ids_are_unique_and_links_arrive(html):
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_every_string_is_escaped():
    names = (NASTY, "$\\frac{1}{$", *"23456789")
    run = material(
        title=NASTY, name=NASTY, recipe_text=NASTY, threat=NASTY, digest=NASTY, command=NASTY, created=NASTY,
        class_names=names, versions={NASTY: NASTY}, counts={NASTY: 3},
        attacks=dict.fromkeys(("pgd", "apgd", "curve"), NASTY),
        checks=(CheckRecord(arm=NASTY, seed=0, name=NASTY, passed=False, detail=NASTY),),
        stages=(StageRecord(stage=NASTY, arm=NASTY, seed=0, seconds=1.0, peak_mb=1.0),),
        arms=(),
        features=tuple(dataclasses.replace(each, name=NASTY, space=NASTY) for each in material().features),
    )  # fmt: skip
    arm = ArmMaterial(key=NASTY, title=NASTY, rows=table(1, 0.0), curves=(training(0, 0.0),))
    text = page.render(dataclasses.replace(run, arms=(arm, dataclasses.replace(arm, key="b", title=NASTY * 2))))
    assert "<b>" not in text
    assert "x'" not in text
    assert "&lt;b&gt;" in text


def test_missing_parts_are_said_to_be_missing():
    run = material(arms=(), grids=None, features=(), stages=(), checks=(), versions={})
    text = page.render(run)
    assert "No arm has been evaluated" in text
    assert text.count('class="missing"') >= 7
    assert "<svg" not in text


def test_a_run_without_guidance_shows_only_plain():
    grids = Grids(plain=np.zeros((CLASSES, 3, 8, 8, 3), np.uint8))
    text = page.render(material(arms=("real", "plain"), grids=grids, features=()))
    assert "No guided samples here" in text
    assert "same noise" not in text


def test_failures_come_first_and_in_red(whole):
    bad = CheckRecord(arm="plain", seed=2, name="gradients are not zero", passed=False, detail="12 % of images")
    text = page.render(dataclasses.replace(whole, checks=(*whole.checks, bad), features=()))
    assert "1 check of the evaluation failed" in text
    assert text.index("Failed: gradients are not zero") < text.index('<th scope="row">outputs are logits<')
    assert "Plain diffusion, seed 2" in text
    assert "that failed: 1" in verdict.markdown_table(dataclasses.replace(whole, checks=(bad,)))
    assert "that failed" not in verdict.markdown_table(whole)


def test_the_same_run_gives_the_same_bytes():
    run = material(arms=("real", "plain"))
    assert page.render(run) == page.render(run)


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    run = material(arms=("real",), features=())
    assert page.write(run, path) == path
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(EnvironmentFault, match="disk full"):
        page.write(dataclasses.replace(run, title="other"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_large_runs_stay_small():
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (30, 12, 96, 96, 3), dtype=np.uint8)
    names = tuple(f"class {k}" for k in range(30))
    text = page.render(
        material(5, class_names=names, grids=Grids(plain=samples[:, :, ::3, ::3], guided=samples[:, :, ::3, ::3]))
    )
    assert len(text.encode()) < 3_000_000
    assert "first 20 of 30 classes, 10 of 12 images" in text


SECTIONS = ("verdict", "asked", "robustness", "broken", "classes", "confusion", "examples", "samples", "features",
            "students", "energy", "selection", "training", "checks", "cost", "repeat")  # fmt: skip
PART_OF = {"confusion": "confusions", "examples": "adversarial", "samples": "grids", "features": "features",
           "students": "student_features", "energy": "energy", "selection": "selections", "training": "curves",
           "checks": "checks", "cost": "stages", "repeat": "versions", "robustness": "arms", "broken": "arms",
           "classes": "arms"}  # fmt: skip


def section(text, name):
    found = re.search(rf'<section id="{name}".*?</section>', text, re.DOTALL)
    assert found is not None, name
    return found.group()


def test_every_section_is_there_with_material(full_html):
    for name in SECTIONS:
        assert 'class="missing"' not in section(full_html, name), name
    for name in ("robustness", "features", "students", "energy", "selection", "training"):
        assert "<svg" in section(full_html, name)
    assert section(full_html, "confusion").count('<table class="heat">') == 2
    assert section(full_html, "examples").count("<li>") == 12
    assert section(full_html, "samples").count('class="near') == 160
    assert "50.0 kJ" in section(full_html, "cost")
    assert "CC BY 4.0" in section(full_html, "repeat")
    assert "4,000 synthetic images" in section(full_html, "asked")
    assert full_html.index('href="#verdict">Skip to the verdict') < full_html.index("<header")
    levels = [int(level) for level in re.findall(r"<h([1-6])", full_html)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = re.findall(r'\sid="([^"]+)"', full_html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', full_html)) <= set(ids)


def test_without_material_every_section_says_so_and_why():
    why = {part: f"because of {part} & <more>" for part in (*PART_OF.values(), "run", "odd")}
    run = material(arms=(), grids=None, features=(), stages=(), checks=(), versions={}, missing=why, moved="It moved.")
    text = page.render(run)
    for name, part in PART_OF.items():
        assert f"because of {part} &amp; &lt;more&gt;" in section(text, name), name
    assert "This run is not finished." in text
    assert "It moved." in text
    assert "because of odd" in section(text, "repeat")


def test_a_part_that_is_here_in_part_says_what_is_not(full):
    run = dataclasses.replace(full, features=(), student_features=(), missing={"confusions": "Plain: student gone"})
    found = section(page.render(run), "confusion")
    assert "Not all is here. Plain: student gone" in found
    assert 'class="heat"' in found


def test_the_headline_stands_alone(full):
    found = verdict.judge(full)
    first = found.comparisons[2].differences["apgd"]
    assert first is not None
    assert found.headlines[0] == (
        f"{verdict.points(first.estimate)} points robust accuracy from 4,000 synthetic images: Contrastive-DP against "
        f"Real only under linf eps 0.15, 95 % interval "
        f"{verdict.points(first.low)} to {verdict.points(first.high)} over "
        "test images and 3 trainings."
    )
    assert found.headlines[1].startswith("No difference shown in robust accuracy from 4,000 synthetic images each: ")
    assert "Contrastive-DP against Plain diffusion" in found.headlines[1]
    assert len(found.headlines) == len(found.comparisons)


def test_headlines_of_few_arms():
    assert "nothing to say" in verdict.judge(_run()).headlines[0]
    alone = verdict.judge(material(arms=("plain",), synthetic={"plain": 1})).headlines
    assert len(alone) == 1
    assert "from 1 synthetic image: Plain diffusion" in alone[0]
    assert alone[0].endswith(
        "over test images alone (one training). No other arm was evaluated, so nothing is compared."
    )
    unknown = verdict.judge(material(arms=("real", "plain"))).headlines
    assert "synthetic" not in unknown[0]
    half = verdict.judge(material(synthetic={"real": 0, "guided": 4000})).headlines
    assert "from 4,000" in half[0]
    assert all("synthetic" not in line for line in half if "plain diffusion" in line)  # its number is not known
    late = table(1, 0.5)
    late = late.set_column(0, "seed", pa.array(np.full(len(late), 7)))
    pair = _run(ArmMaterial(key="a", title="A", rows=table(1, 0.0)), ArmMaterial(key="b", title="B", rows=late))
    (told,) = verdict.judge(pair).headlines
    assert told == "Nothing can be said of B against A under linf eps 0.15: they have no seed in common."


SCRIPTS = ("ملفوف أحمر", "חתול", "猫" * 30, "ねこ", "Кошка", "बिल्ली", "\"><b>x'</b>&", "x" * 200)


def extreme(classes, seeds, side, channels, arms, per_class=10):
    """A run as large as they come; images are noise, which nothing can compress."""
    rng = np.random.default_rng(0)
    names = tuple(f"{SCRIPTS[k % len(SCRIPTS)]} {k}" for k in range(classes))
    base = material(1, arms=())
    found = []
    for place in range(arms):
        rows_of = table(seeds, 0.1 * place, place)
        label = rows_of["index"].to_numpy() * 7 % classes
        right = rows_of["margin"].to_numpy() > 0
        for name, values in (("label", label), ("prediction", np.where(right, label, (label + 1) % classes))):
            rows_of = rows_of.set_column(rows_of.column_names.index(name), name, pa.array(values))
        curves = tuple(training(seed, 0.0) for seed in range(seeds))
        found.append(ArmMaterial(key=f"arm{place}", title=f"Arm {place}", rows=rows_of, curves=curves))
    shape = (min(classes, 20), per_class, min(side, 64), min(side, 64), channels)
    plain = rng.integers(0, 256, shape, dtype=np.uint8)
    keys = [arm.key for arm in found]
    counts = tuple(confusion(key, classes) for key in keys)
    return dataclasses.replace(
        base, class_names=names, arms=tuple(found), grids=scored(plain, plain), features=(), confusions=counts,
        adversarial=tuple(adversarial(key, 10, (side, side, channels), classes) for key in keys), energy=energy(),
        selections=tuple(selection(key, seed) for key in keys for seed in range(seeds)),
        checks=tuple(CheckRecord(arm=key, seed=seed, name=f"check {n}", passed=True, detail="fine " * 20)
                     for key in keys for seed in range(seeds) for n in range(10)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "seeds", "side", "channels", "arms"),
    [(2, 1, 8, 1, 1), (100, 2, 32, 3, 2), (1000, 20, 224, 3, 6)],
)
def test_extremes_stay_small_and_true(classes, seeds, side, channels, arms):
    text = page.render(extreme(classes, seeds, side, channels, arms))
    assert len(text.encode()) < 5_000_000
    assert "<b>" not in text
    assert "x" * 50 not in text
    assert text.count('<bdi dir="auto">') > 2
    assert ('class="heat"' in text) == (classes <= 20)
    assert "and 900 more" in text or classes < 1000


# --- its parts ---------------------------------------------------------------------------------------------------


def opened(source):
    """The pixels behind a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def test_few_pictures_keep_every_pixel_and_many_are_compressed(monkeypatch):
    rng = np.random.default_rng(0)
    grey, rgb = (rng.integers(0, 256, (2, 8, 8, c), dtype=np.uint8) for c in (1, 3))
    found = pictures([grey, rgb])
    assert np.array_equal(opened(found[0][1]), grey[1, :, :, 0])
    assert np.array_equal(opened(found[1][0]), rgb[0])
    monkeypatch.setattr("gambeson.report.images.LOSSLESS", 100)
    assert pictures([grey])[0][0].startswith("data:image/webp")
    with pytest.raises(ValueError, match="1 or 3 channels"):
        pictures([np.zeros((1, 4, 4, 2), np.uint8)])


def test_large_images_are_averaged_or_thinned():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) * 10
    assert sparser(image, 2)[0, :, :, 0].tolist() == [[0, 20], [80, 100]]
    assert smaller(image, 2)[0, :, :, 0].tolist() == [[25, 45], [105, 125]]
    assert smaller(image, 4) is image


def test_a_change_is_magnified_by_one_factor_that_stays_in_range():
    image = np.full((2, 1, 2, 1), 100, np.uint8)
    attacked = image.copy()
    attacked[0, 0, 0] += 30
    attacked[1, 0, 1] -= 7
    factor, change = page_pictures.magnified(image, attacked)
    assert factor == 4  # 127 // 30
    assert change.reshape(2, 2).tolist() == [[128 + 120, 128], [128, 128 - 28]]
    assert page_pictures.magnified(image, image)[0] == 1


def test_examples_name_classes_and_keep_both_kinds(full):
    found = page_pictures.example_sets(full, list("abcdefghij"))
    assert [each.arm for each in found] == ["Real only", "Contrastive-DP"]
    assert [it.index for it in found[0].examples] == [0, 14, 28, 7, 21, 35]
    first = found[0].examples[0]
    assert (first.label, first.before, first.after, first.withstood) == ("a", "a", "b", False)
    many = dataclasses.replace(full, adversarial=(adversarial(n=40),) * 9)
    sets = page_pictures.example_sets(many, list("abcdefghij"))
    assert [len(each.examples) for each in sets] == [8] * 6
    assert [it.withstood for it in sets[0].examples] == [False] * 4 + [True] * 4


def test_what_each_attack_broke_by_hand():
    """Six images, right clean but the last: one falls to PGD alone, one to APGD-CE, one to the targeted APGD alone."""
    columns = {
        "seed": [0] * 6, "index": list(range(6)), "label": [0] * 6, "prediction": [0, 0, 0, 0, 0, 1],
        "margin": [0.0] * 6, "pgd": [True, False, True, True, False, False],
        "apgd_ce": [True, True, False, True, False, False],
        "apgd_t": [True, True, False, False, False, False], "apgd": [True, True, False, False, False, False],
    }  # fmt: skip
    (line,) = page_classes.broken(_run(ArmMaterial(key="a", title="A", rows=pa.table(columns))))
    assert [round(6 * of.estimate) for of in line.standing] == [5, 3, 3, 2, 1]
    assert (line.alone, line.right, line.tried) == ([1, 1, 1], 5, 6)
    assert (round(6 * line.held), round(6 * line.several)) == (1, 1)


def test_accuracy_by_class_by_hand():
    rows_of = small(label=[2, 0, 0, 0, 0, 2], prediction=[1, 0, 0, 1, 0, 1])
    run = dataclasses.replace(
        _run(ArmMaterial(key="a", title="A", rows=rows_of)), class_names=("x", "y", "z"), features=()
    )
    table_of = page_classes.class_table(run, run.class_names)
    assert table_of is not None
    assert [(line.name, line.images) for line in table_of.lines] == [("x", 2), ("z", 1)]
    assert table_of.empty == 1
    x = table_of.lines[0].cells[0]
    assert (x.clean.estimate, x.worst.estimate) == (0.75, 0.25)


def test_many_classes_show_the_ends():
    label = np.arange(300)
    columns = {name: pa.array(label >= 150) for name in ("pgd", "apgd_ce", "apgd_t", "apgd")}
    rows_of = pa.table({"seed": np.zeros(300, int), "index": label, "label": label, "prediction": label,
                        "margin": np.zeros(300), **columns})  # fmt: skip
    names = tuple(f"k{k}" for k in label)
    run = dataclasses.replace(_run(ArmMaterial(key="a", title="A", rows=rows_of)), class_names=names, features=())
    found = page_classes.class_table(run, names)
    assert found is not None
    assert [line.name for line in found.lines] == [*(f"k{k}" for k in range(40)), *(f"k{k}" for k in range(290, 300))]
    assert found.left_out == 250


def test_confusions_are_shares_or_the_most_frequent_pairs():
    run = dataclasses.replace(material(arms=("real",), features=()), confusions=(confusion("real", each=40),))
    (few,) = page_classes.confusions(run, list("abcdefghij"))
    name, cells = few.heat[9]
    assert name == "j"
    assert [(cell.text, cell.right) for cell in (cells[9], cells[0], cells[4])] == [
        ("65", True),
        ("35", False),
        ("", False),
    ]
    names = tuple(f"k{k}" for k in range(30))
    many = dataclasses.replace(run, class_names=names, confusions=(confusion("real", classes=30, each=40),))
    (view,) = page_classes.confusions(many, names)
    assert (view.heat, len(view.pairs)) == ([], 20)
    assert (view.pairs[0].true, view.pairs[0].taken, view.pairs[0].attacked, view.pairs[0].clean) == ("k0", "k1", 14, 4)


def test_class_names_are_shown_safely_and_signed():
    shown = page_classes.shown(("a\u202eb\n c", "", "猫", "x" * 200))
    assert shown[:3] == ["a b c", "(no name)", "猫"]
    assert len(shown[3]) == 48
    assert page_curves.signs(["cat", "dog"]) == ["cat", "dog"]
    assert page_curves.signs(["cat", "猫"]) == ["1", "2"]
    assert set(page_curves.signs([f"k{k}" for k in range(21)])) == {""}


def luminance(colour):
    return charts.luminance(np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def mixed(a, b, share):
    """color-mix(in srgb, a share, b)."""
    parts = [(int(a[p : p + 2], 16), int(b[p : p + 2], 16)) for p in (1, 3, 5)]
    return "#" + "".join(f"{round(share * x + (1 - share) * y):02x}" for x, y in parts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_palette_can_be_read(scheme):
    """WCAG 2.2 AA: text stands out by 4.5 to 1, marks of charts by 3 to 1."""
    css = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = (
        re.search(rf"{start} {{\s+:?r?o?o?t?.*?}}", css, re.DOTALL) for start in (":root", r"scheme: dark\)")
    )
    assert light is not None
    assert dark is not None
    of = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light.group()))
    if scheme == "dark":
        of |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark.group()))
        assert of["paper"] == "#16181c"
    papers = ("paper", "card", "track", "code")
    for text in ("ink", "soft", "accent"):
        assert all(contrast(of[text], of[on]) >= 4.5 for on in papers), text
    for text, on in (("bad", "bad-paper"), ("bad", "paper"), ("good", "paper")):
        assert contrast(of[text], of[on]) >= 4.5, text
    for mark in ("axis", *(f"arm-{place}" for place in range(6))):
        assert all(contrast(of[mark], of[on]) >= 3 for on in ("paper", "card")), mark
    assert all(contrast(colour, of["card"]) >= 3 for n in (10, 40) for colour in charts.class_colours(n))
    for share in np.linspace(0, 1, 21):
        assert contrast(of["ink"], mixed(of["wrong"], of["track"], 0.65 * share)) >= 4.5
        assert contrast(of["ink"], mixed(of["right"], of["track"], 0.55 * share)) >= 4.5
    assert [of[f"arm-{place}"] for place in range(6)] == list(charts.ARM_COLOURS) or scheme == "dark"


def test_embedding_is_seeded_and_bounded():
    rng = np.random.default_rng(0)
    sets = [
        FeatureSet(name=n, features=rng.normal(size=(70, 5)), labels=np.arange(70) % 3, space="s") for n in ("a", "b")
    ]
    one, two = embed(sets), embed(sets)
    assert all(np.array_equal(x.points, y.points) for x, y in zip(one, two, strict=True))
    constant = [dataclasses.replace(each, features=np.ones((70, 5))) for each in sets]
    assert all(np.isfinite(each.points).all() for each in embed(constant))
    with pytest.raises(ValueError, match="finite"):
        embed([dataclasses.replace(sets[0], features=np.full((70, 5), np.nan))])
    with pytest.raises(ValueError, match="one space"):
        embed([sets[0], dataclasses.replace(sets[1], space="t")])


def test_features_need_labels_of_the_classes():
    bad = FeatureSet(name="real", features=np.zeros((3, 2)), labels=np.array([0, 1, 10]), space="s")
    with pytest.raises(ValueError, match="labels of the 10 classes"):
        material(features=(bad,))


def test_charts_do_not_touch_matplotlibs_globals():
    import matplotlib

    before = dict(matplotlib.rcParams)
    charts.training_loss([(charts.look(0), (training(0, 0.0),))], "loss")
    assert dict(matplotlib.rcParams) == before


# --- in a browser ------------------------------------------------------------------------------------------------

BROKEN = """() => {
  const bad = [];
  for (const each of document.querySelectorAll('svg.chart, img, .track, .amount, .heat td, .stack, .lane')) {
    if (each.closest('details:not([open])')) continue;
    const style = getComputedStyle(each.closest('td') || each), box = each.getBoundingClientRect();
    const seen = style.display !== 'none';
    if (seen && (box.width < 1 || box.height < 1)) bad.push('empty: ' + each.outerHTML.slice(0, 90));
    if (each.tagName === 'IMG' && (!each.complete || !each.naturalWidth)) bad.push('broken image: ' + each.alt);
  }
  const over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (over > 0) bad.push('wider than the window by ' + over);
  return bad;
}"""


@pytest.fixture(scope="module")
def browser():
    binary = next((b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None)
    if binary is None:
        pytest.skip("no chromium or google-chrome on PATH, so the page was not opened in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=binary, args=flags)
        yield found
        found.close()


def test_page_in_a_browser(full_html, tmp_path, browser):
    path = Path(tmp_path / "report.html")
    path.write_text(full_html, encoding="utf-8")
    troubles, asked, tab = [], [], browser.new_page()
    tab.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: troubles.append(str(e)))
    tab.on("requestfailed", lambda r: troubles.append(r.url))
    tab.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
    papers = []
    for width, scheme in ((375, "light"), (820, "dark"), (1280, "light")):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        tab.goto(path.as_uri())
        troubles += tab.evaluate(BROKEN)
        papers.append(tab.evaluate("[getComputedStyle(document.body).backgroundColor, "
                                   "getComputedStyle(document.querySelector('svg.chart text')).fill]"))  # fmt: skip
    charts_seen = tab.locator("svg.chart").count()
    tab.close()
    assert troubles == []
    assert set(asked) == {path.as_uri()}
    assert charts_seen == 14
    assert papers == [["rgb(251, 250, 248)", "rgb(93, 100, 110)"], ["rgb(22, 24, 28)", "rgb(160, 166, 175)"],
                      ["rgb(251, 250, 248)", "rgb(93, 100, 110)"]]  # fmt: skip


def test_the_nearest_image_comes_by_pointer_and_by_keyboard_and_in_print(full_html, tmp_path, browser):
    path = Path(tmp_path / "report.html")
    path.write_text(full_html, encoding="utf-8")
    tab = browser.new_page(viewport={"width": 375, "height": 800})
    tab.goto(path.as_uri())
    tab.keyboard.press("Tab")
    at = "document.activeElement"
    assert tab.evaluate(f"[{at}.className, {at}.getBoundingClientRect().top > 0]") == ["skip", True]
    pics = tab.locator(".pic")
    assert not pics.nth(7).locator(".near").is_visible()
    pics.nth(7).hover()
    assert pics.nth(7).locator(".near").is_visible()
    box = pics.nth(7).locator(".near").bounding_box()
    assert box is not None
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 375
    pics.nth(2).focus()
    assert pics.nth(2).locator(".near img").is_visible()
    tab.keyboard.press("Tab")
    assert pics.nth(3).evaluate("each => each === document.activeElement")
    assert "nearest train image at distance" in pics.nth(3).get_attribute("aria-label")
    tab.emulate_media(media="print", color_scheme="dark")
    assert pics.nth(5).locator(".near").is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    inside = tab.locator("details:not([open]) td").first
    assert inside.evaluate("each => each.getBoundingClientRect().height") > 0
    tab.close()
