"""The report: queries over rows, the verdict's honesty, escaping, missing parts, and the page in a real browser."""

import dataclasses
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from gambeson.report import charts, page, rows, verdict
from gambeson.report.embedding import embed
from gambeson.report.images import strip
from gambeson.report.material import (
    ArmMaterial,
    CheckRecord,
    FeatureSet,
    Grids,
    RunMaterial,
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


@pytest.fixture(scope="module")
def whole():
    return material(3)


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
    assert page._overfitting(arms) == "Robust overfitting, best minus last in points: real only 3.0."


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
    assert "No guided samples in this run" in text
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
    monkeypatch.setattr(page.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
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


# --- its parts ---------------------------------------------------------------------------------------------------


def test_strips_keep_every_pixel():
    import base64
    import io

    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(strip(images).split(",")[1]))))
    assert picture.shape == (48, 3 * 48 + 2 * 4, 4)
    assert np.array_equal(picture[::6, 52:100:6, 0], images[1, :, :, 0])
    assert (picture[:, 48:52, 3] == 0).all()


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
  for (const each of document.querySelectorAll('svg.chart, img, .track, .amount')) {
    const style = getComputedStyle(each.closest('td') || each), box = each.getBoundingClientRect();
    const seen = style.display !== 'none';
    if (seen && (box.width < 1 || box.height < 1)) bad.push('empty: ' + each.outerHTML.slice(0, 90));
    if (each.tagName === 'IMG' && (!each.complete || !each.naturalWidth)) bad.push('broken image: ' + each.alt);
  }
  const over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (over > 0) bad.push('wider than the window by ' + over);
  return bad;
}"""


def test_page_in_a_browser(html, tmp_path):
    binary = next((b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None)
    if binary is None:
        pytest.skip("no chromium or google-chrome on PATH, so the page was not opened in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = Path(tmp_path / "report.html")
    path.write_text(html, encoding="utf-8")
    troubles, asked = [], []
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=flags)
        tab = browser.new_page()
        tab.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: troubles.append(str(e)))
        tab.on("requestfailed", lambda r: troubles.append(r.url))
        tab.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
        for width, scheme in ((390, "light"), (800, "dark"), (1400, "light")):
            tab.set_viewport_size({"width": width, "height": 900})
            tab.emulate_media(color_scheme=scheme)
            tab.goto(path.as_uri())
            troubles += tab.evaluate(BROKEN)
        charts_seen = tab.locator("svg.chart").count()
        browser.close()
    assert troubles == []
    assert set(asked) == {path.as_uri()}
    assert charts_seen == 7
