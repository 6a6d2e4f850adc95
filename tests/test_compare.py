"""`gambeson compare`: paired and unpaired differences worked by hand, what may not be compared, and the page itself."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_recipe

from gambeson import canonical, compare_command, files
from gambeson.cli import main
from gambeson.data.datasets import Digits
from gambeson.disk import checksum, write_json
from gambeson.errors import UserError
from gambeson.models.files import save_tensors
from gambeson.recipe import Arm
from gambeson.report import compare_page, compare_words
from gambeson.report.compare_charts import MOST_LINES, lines_of, mean_curve
from gambeson.report.compare_images import same_images, settled
from gambeson.report.compare_pairs import by_class, hows_differ
from gambeson.report.compare_read import read
from gambeson.report.compare_recipes import differing, flat, said, shortened
from gambeson.report.compare_statistics import apart_difference, difference
from gambeson.report.material import TrainingCurve
from gambeson.report.rows import Cells
from gambeson.robustness.evaluate import evaluate
from gambeson.threat import ThreatModel

NASTY = "<b>\"x'"
IMAGES = 60
REAL, PLAIN = Arm.REAL, Arm.PLAIN


# --- runs that look finished, without a network having been trained ----------------------------------------------


def stage(root, name, digest, contents, **record):
    """A finished stage with these files (a function of the path writes each)."""
    folder = root / "stages" / name / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for file, write in contents.items():
        write(folder / file)
    record = {"seconds": 2.5, "peak_mb": 100.0, "execution": {"device": "cpu", "threads": 1}, "inputs": []} | record
    write_json(folder / "done.json", record | {"files": {f: checksum(folder / f) for f in contents}})
    return {"stage": name, "digest": digest, "folder": f"stages/{name}/{folder.name}"}


def rows_of(seed, right, labels, clean=None):
    """Rows of one seed: `right` under every attack, `clean` (all of the images) without one."""
    n = len(labels)
    clean = np.ones(n, bool) if clean is None else np.asarray(clean)
    right = np.asarray(right, bool) & clean
    columns = {
        "seed": np.full(n, seed), "index": np.arange(n), "label": labels,
        "prediction": np.where(clean, labels, (labels + 1) % (labels.max() + 2)), "margin": np.zeros(n),
        "pgd": right, "apgd_ce": right, "apgd_t": right, "apgd": right, "robust@0.1": right, "robust@0.3": right,
    }  # fmt: skip
    return pa.table(columns)


def run(
    root, name, verdicts, *, recipe=None, labels=None, data="d" * 64, revision=None, names=None, checks=(), stages=None
):
    """A run folder. verdicts: arm -> seed -> right under attack [n] (or a pair with right without one)."""
    recipe = recipe or replace(tiny_recipe(arms=tuple(verdicts)), name="tiny", seeds=1)
    first = next(iter(next(iter(verdicts.values())).values()))
    n = len(first[0] if isinstance(first, tuple) else first)
    labels = np.arange(n) % 10 if labels is None else labels
    config = canonical.plain(recipe.with_threat_everywhere().evaluation, drop_neutral=True)
    revision, chapters, folder = revision or evaluate.revision, [], root / name
    log = [{"step": s, "loss": 2.0 / s, "clean": 0.5 + s / 100, "robust": 0.3 + s / 100} for s in (1, 8, 16)]
    header = {"class_names": list(names or map(str, range(10))), "log": log}
    for arm, seeds in verdicts.items():
        for seed, right in seeds.items():
            right, clean = right if isinstance(right, tuple) else (right, None)
            key = (name if stages is None else stages, arm.value, seed)
            student = canonical.digest([*key, "student"])
            asked = {
                "stage": "evaluate", "revision": revision, "config": config, "inputs": [student, data], "seed": seed
            }  # fmt: skip
            digest = canonical.digest(asked)
            table = rows_of(seed, right, labels, clean)
            weights = {"classifier.safetensors": lambda p: save_tensors(p, {"w": torch.zeros(1)}, header)}
            found = [{"name": "deterministic", "passed": True, "detail": "as expected"}, *checks]
            contents = {
                "rows.parquet": lambda p, t=table: pq.write_table(t, p),
                "checks.json": lambda p, f=found: write_json(p, f),
            }
            made = {
                "student": stage(root, "train_classifier", student, weights),
                "rows": stage(root, "evaluate", digest, contents, **asked),
            }
            chapters.append({"arm": arm.value, "seed": seed, "artifacts": made})
    folder.mkdir()
    files.save(recipe, folder / "recipe.yaml")
    tables = [
        pq.read_table(root / c["artifacts"]["rows"]["folder"] / "rows.parquet").add_column(
            0, "arm", pa.array([c["arm"]] * n)
        )
        for c in chapters
    ]
    pq.write_table(pa.concat_tables(tables), folder / "rows.parquet")
    facts = {"format": 1, "recipe_digest": recipe.digest, "started": "2026-01-01T00:00:00+00:00",
             "finished": "2026-01-01T00:03:00+00:00", "command": "gambeson run tiny", "workers": 1,
             "versions": {"gambeson": "0.1.0", "torch": "2"}, "chapters": chapters}  # fmt: skip
    write_json(folder / "run.json", facts)
    return folder


def drawn(seed, lift, n=IMAGES):
    """Verdicts that share hard images."""
    hard = np.random.default_rng(0).normal(size=n)
    return hard + lift + np.random.default_rng([seed, 7]).normal(scale=0.4, size=n) > 0


def laid(*folders):
    return compare_command.laid_beside(list(folders))


# --- numbers worked by hand --------------------------------------------------------------------------------------


def test_paired_by_hand(tmp_path):
    """d = 0, 1, 0, 1: Agresti and Min's centre 2/6, variance 7/18, half width 1.96 sqrt(7/108); for two tests at once
    (worst case and clean) 97.5 %, that is 2.2414 in place of 1.96."""
    a = run(tmp_path, "a", {REAL: {0: [True, False, False, False]}})
    b = run(tmp_path, "b", {REAL: {0: [True, True, False, True]}})
    found = laid(a, b)
    worst, clean = found.pairs
    assert (worst.column, clean.column, found.tests) == ("apgd", "clean", 2)
    root = (7 / 108) ** 0.5
    assert worst.found.estimate == 0.5
    assert (worst.found.low, worst.found.high) == pytest.approx((1 / 3 - 1.959964 * root, 1 / 3 + 1.959964 * root))
    assert worst.together.low == pytest.approx(1 / 3 - 2.241403 * root)
    assert (worst.images, worst.seeds, worst.outcome, clean.found.estimate) == (4, 1, "level", 0.0)


def test_seeds_apart_by_hand():
    """Two trainings, right on both images and on none, beside one that is right on the second alone.

    With the pseudo-images: image means minus the other's .5, -.5, +-r, variance .5 / 4 with 3 degrees of freedom; seeds
    MS .5 / 8 with 1, rest -1/6 / 8 with 3; together 1/6 with 3 degrees of freedom; t(.75, 3) = .764892.
    """
    a, b = np.array([[True, True], [False, False]]), np.array([[False, True]])
    found = apart_difference(a, b, 0.5)
    half = 0.7648923 * (1 / 6) ** 0.5
    assert (found.estimate, found.low, found.high) == pytest.approx((0.0, -half, half), abs=1e-6)
    assert "2 and 1 seeds, none in common" in found.randomness
    assert "hides how much its training varies" in found.randomness


def test_seeds_that_agree_add_nothing():
    """Both trainings are right on one of two images: the images alone, .5 / 4 with 3 degrees of freedom."""
    found = apart_difference(np.array([[True, False], [False, True]]), np.array([[False, True]]), 0.5)
    half = 0.7648923 * (0.5 / 4) ** 0.5
    assert (found.estimate, found.low, found.high) == pytest.approx((0.0, -half, half), abs=1e-6)


def test_one_seed_each_is_paired_over_images():
    a, b = (np.array([[True, False, True]]), np.array([[True, True, True]]))
    x, y = Cells(np.array([0]), np.arange(3), a), Cells(np.array([5]), np.arange(3), b)
    found, images = difference(x, y)
    assert (found.randomness, images) == ("test images", 3)
    assert found.estimate == pytest.approx(-1 / 3)


def test_intervals_of_seeds_apart_cover():
    """3 against 4 trainings of one accuracy, images and seeds random: about 95 % of the intervals hold 0."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        hard = rng.normal(size=80)
        a, b = (hard + rng.normal(scale=0.3, size=(s, 1)) + rng.normal(scale=0.6, size=(s, 80)) > 0 for s in (3, 4))
        found = apart_difference(a, b)
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 300 <= 0.995


def test_only_common_seeds_and_images_are_paired():
    x = Cells(np.array([0, 1]), np.array([0, 1, 2]), np.array([[1, 1, 1], [0, 0, 0]], bool))
    y = Cells(np.array([1, 2]), np.array([1, 2, 9]), np.array([[1, 0, 1], [1, 1, 1]], bool))
    found, images = difference(x, y)
    assert (found.estimate, images) == (-0.5, 2)
    assert difference(x, Cells(np.array([0]), np.array([2, 7]), np.ones((1, 2), bool))) is None


def test_by_class_is_the_difference_on_its_images(tmp_path):
    labels = np.array([0, 0, 1, 1, 1])
    a = run(tmp_path, "a", {REAL: {0: [True, True, False, False, False]}}, labels=labels, names=["cat", "dog"])
    b = run(tmp_path, "b", {REAL: {0: [True, False, True, True, False]}}, labels=labels, names=["cat", "dog"])
    found = laid(a, b)
    lines = by_class([found.pairs[0]])
    assert [(c.name, c.images, round(c.differences[0].estimate, 4)) for c in lines] == [
        ("cat", 2, -0.5),
        ("dog", 3, 0.6667),
    ]


# --- what may and may not be compared ----------------------------------------------------------------------------


def pair_of(*folders, column="apgd"):
    return next(p for p in laid(*folders).pairs if p.column == column)


def test_other_threats_are_not_compared_but_clean_accuracy_is(tmp_path):
    other = replace(tiny_recipe(arms=(REAL,)), threat=ThreatModel(norm="linf", epsilon=0.3))
    a = run(tmp_path, "a", {REAL: {0: drawn(0, 1.0)}})
    b = run(tmp_path, "b", {REAL: {0: drawn(0, 0.0)}}, recipe=other)
    assert pair_of(a, b).reason == "the threats differ: linf eps 0.3 against linf eps 0.15"
    assert pair_of(a, b).found is None
    assert pair_of(a, b, column="clean").found is not None
    words = " ".join(compare_words.sentences(laid(a, b)))
    assert "real only cannot be compared, because the threats differ: linf eps 0.3 against linf eps 0.15" in words
    text = compare_page.render(laid(a, b))
    assert "not comparable: the threats differ" in text
    assert text.count('<svg class="chart"') == 2 + 3  # a chart for each threat, and three of the training


def test_other_attacks_and_revisions_are_not_compared(tmp_path):
    whole = tiny_recipe(arms=(REAL,))
    more = replace(whole, evaluation=replace(whole.evaluation, apgd=replace(whole.evaluation.apgd, steps=7)))
    a = run(tmp_path, "a", {REAL: {0: drawn(0, 1.0)}})
    b = run(tmp_path, "b", {REAL: {0: drawn(0, 1.0)}}, recipe=more)
    c = run(tmp_path, "c", {REAL: {0: drawn(0, 1.0)}}, revision=1)
    assert pair_of(a, b).reason == "the attacks differ: apgd.steps 7 against 4"
    assert "different revisions (1 against 2)" in pair_of(a, c).reason
    assert "not known" in hows_differ({"apgd": None, "revision": None}, {"apgd": {"steps": 4}, "revision": 2})
    assert hows_differ({"steps": 4, "revision": None}, {"steps": 4, "revision": 2}) == ""


def test_other_test_images_are_never_compared(tmp_path):
    small = replace(tiny_recipe(arms=(REAL,)), data=Digits(train_images=200, validation_images=1400))
    a = run(tmp_path, "a", {REAL: {0: drawn(0, 1.0)}})
    fewer = run(tmp_path, "b", {REAL: {0: drawn(0, 1.0, 40)}}, recipe=small, data="e" * 64)
    shuffled = run(tmp_path, "c", {REAL: {0: drawn(0, 1.0)}}, labels=np.arange(IMAGES)[::-1] % 10, data="f" * 64)
    others = run(tmp_path, "d", {REAL: {0: drawn(0, 1.0)}}, names=["zero", *map(str, range(1, 10))])
    many = run(tmp_path, "e", {REAL: {0: drawn(0, 1.0)}}, names=[*map(str, range(11))])
    digests = run(tmp_path, "f", {REAL: {0: drawn(0, 1.0)}}, data="a" * 64)
    for folder, why in ((fewer, "the test images differ: 40 against 60"), (shuffled, "60 of the 60 at the same places"),
                        (others, "class 0 is 'zero' in one"), (many, "the classes differ: 11 against 10"),
                        (digests, "whether the test images are the same cannot be told")):  # fmt: skip
        for column in ("apgd", "clean"):
            assert why in pair_of(a, folder, column=column).reason
    sentences = compare_words.sentences(laid(a, fewer))
    assert len(sentences) == 1
    assert "not comparable, because the test images differ" in sentences[0]
    assert laid(a, fewer).tests == 0


def test_test_images_are_read_where_only_the_rest_differs(tmp_path, monkeypatch):
    """Two image sets with the same test part and other training images."""
    one = Digits(train_images=100, validation_images=1500)
    real = one.load()
    digest = real.digest
    n = len(real.test)
    other = replace(real, train=real.validation, validation=real.train)
    monkeypatch.setattr(Digits, "load", lambda self: other if self.train_images == 200 else real, raising=True)
    compare_command_images()
    recipe = replace(tiny_recipe(arms=(REAL,)), data=Digits(train_images=200, validation_images=1500))
    labels = real.test.labels.numpy()
    a = run(tmp_path, "a", {REAL: {0: drawn(0, 1.0, n)}}, labels=labels, data=digest)
    b = run(tmp_path, "b", {REAL: {0: drawn(0, 0.5, n)}}, labels=labels, data=other.digest, recipe=recipe)
    found = laid(a, b)
    assert "train_images 200 against 100" in found.images[2].why
    assert "but the test images are the same" in found.images[2].why
    assert all(pair.found is not None for pair in found.pairs)
    compare_command_images()


def compare_command_images():
    """Forgets the images that were read."""
    from gambeson.report import compare_images

    compare_images._loaded.cache_clear()


def test_a_moved_run_proves_its_images(tmp_path):
    """Away from its stages it has no digest of the images; one that gives its evaluation's digest is the right one."""
    right = {REAL: {0: drawn(0, 1.0), 1: drawn(1, 1.0)}}
    a, b = run(tmp_path, "a", {REAL: {0: drawn(0, 0.0)}}), run(tmp_path, "b", right, revision=1)
    away = tmp_path / "away"
    away.mkdir()
    moved = shutil.copytree(b, away / "b")
    one, two = read(a, 1, "a"), read(moved, 2, "b")
    assert two.data_digest is None
    assert two.arms[0].measures["apgd"].how["revision"] is None
    assert any("rows are the run's own copy" in note for note in two.notes)
    _, proved = settled([one, two])
    assert proved.data_digest == "d" * 64
    assert proved.arms[0].measures["apgd"].how["revision"] == 1
    elsewhere = replace(one, data_digest="9" * 64)
    assert settled([elsewhere, two])[1].data_digest is None
    same = same_images(one, two)
    assert same.same
    assert "no digest was kept" in same.why


def test_an_edited_recipe_is_not_believed(tmp_path):
    a, b = (run(tmp_path, name, {REAL: {0: drawn(0, 1.0)}}) for name in "ab")
    away = tmp_path / "away"
    away.mkdir()
    moved = shutil.copytree(b, away / "b")
    path = moved / "recipe.yaml"
    path.write_text(path.read_text().replace("steps: 4", "steps: 40", 1))
    found = laid(a, moved)
    assert "not the one it was made with" in " ".join(found.contenders[1].notes)
    assert "what attacked one of them is not known" in pair_of(a, moved).reason


def test_shared_trainings_are_no_difference_and_no_test(tmp_path):
    verdicts = {REAL: {0: drawn(0, 1.0)}}
    a = run(tmp_path, "a", verdicts, stages="shared")
    b = run(tmp_path, "b", verdicts | {PLAIN: {0: drawn(3, 1.5)}}, stages="shared")
    found = laid(a, b)
    assert next(p.outcome for p in found.of(found.contenders[1])) == "same"
    assert found.tests == 2  # plain against real only, under attack and clean
    assert "real only is the very same in both runs" in " ".join(compare_words.sentences(found))
    assert "+ plain diffusion against real only" in compare_page.render(found)


def test_many_differences_are_counted_together(tmp_path):
    """A lift that an interval alone shows (z = 2.55) and that 20 differences do not let stand (z = 3.02)."""
    base, lifted = np.arange(100) < 60, np.arange(100) < 67
    folders = [run(tmp_path, "base", {REAL: {0: base}})]
    folders += [run(tmp_path, f"r{k}", {REAL: {0: lifted if k == 0 else base}}) for k in range(10)]
    two, many = laid(*folders[:2]), laid(*folders)
    assert (two.pairs[0].outcome, many.pairs[0].outcome) == ("above", "alone above")
    assert many.tests == 20
    caution = compare_words.caution(many)
    assert "20 differences are looked at" in caution
    assert "each interval at 99.75 %" in caution
    assert "1 of them is shown alone but not together" in caution
    assert "0 are above and 0 below" in compare_words.sentences(many)[0]
    assert compare_words.OUTCOMES[many.pairs[0].outcome] == "above alone, not with all counted"


def test_a_gain_and_a_loss_are_said(tmp_path):
    a = run(tmp_path, "a", {REAL: {0: np.arange(100) < 50}, PLAIN: {0: np.arange(100) < 50}})
    b = run(tmp_path, "b", {REAL: {0: np.arange(100) < 80}, PLAIN: {0: np.arange(100) < 20}})
    said = compare_words.sentences(laid(a, b))[0]
    assert said.startswith("Run 2 (b) against run 1 (a), worst-case accuracy: real only (+30.0 points, interval +")
    assert "is above; + plain diffusion (−30.0 points" in said


# --- reading runs as they are found ------------------------------------------------------------------------------


def test_an_unfinished_run_and_one_without_rows(tmp_path):
    a = run(tmp_path, "a", {REAL: {0: drawn(0, 1.0)}})
    begun = tmp_path / "begun"
    begun.mkdir()
    files.save(tiny_recipe(arms=(REAL,)), begun / "recipe.yaml")
    bare = shutil.copytree(a, tmp_path / "away" / "bare")
    (bare / "rows.parquet").unlink()
    found = laid(begun, a, bare)
    assert found.reference is found.contenders[1]
    text = compare_page.render(found)
    said = " ".join(compare_words.sentences(found))
    assert "Run 1 (begun) has no measured classifier, so the others are compared with run 2 (a)." in said
    assert "not finished" in text
    assert text.count("Nothing was measured.") == 2
    assert "No classifier of these runs was measured" in compare_words.sentences(laid(begun, bare))[0]
    assert "The recipes are the same" in compare_page.render(laid(begun, bare))


def test_a_recipe_of_another_version_is_read_as_it_stands(tmp_path):
    a, b = (run(tmp_path, name, {REAL: {0: drawn(0, 1.0)}}) for name in "ab")
    path = b / "recipe.yaml"
    path.write_text(re.sub(r"  class: Digits\n", "", path.read_text()) + "a_field_of_old: 3\n")
    found = laid(a, b)
    old = found.contenders[1]
    assert old.recipe is None
    assert "of another version" in old.notes[0]
    assert (old.threat, old.epsilon) == ("linf eps 0.15", 0.15)
    assert pair_of(a, b).found is not None  # the stages tell what was done
    fields = {f.path: f.values for f in differing([c.tree for c in found.contenders], partial=[1])}
    assert fields == {"a_field_of_old": ("–", "3")}


def test_rows_of_another_kind_are_named(tmp_path):
    a, b = (run(tmp_path, name, {REAL: {0: drawn(0, 1.0)}}) for name in "ab")
    away = shutil.copytree(b, tmp_path / "away" / "b")
    table = pq.read_table(away / "rows.parquet").drop_columns(["apgd_t"])
    pq.write_table(table, away / "rows.parquet")
    found = laid(a, away)
    assert any("rows of real only cannot be used" in note for note in found.contenders[1].notes)
    assert not found.pairs
    (away / "rows.parquet").write_bytes(b"PAR1")
    assert main(["compare", str(a), str(away), "--out", str(tmp_path / "x.html")]) == 3


def test_an_evaluation_is_compared_with_its_like(tmp_path):
    attacks = {"apgd-ce": "APGD(steps=5)", "square": "Square(queries=9, seed={})"}
    for name, right in (("one", [1, 0, 1, 1]), ("two", [1, 1, 1, 1])):
        folder = tmp_path / name
        folder.mkdir()
        right = np.array(right, bool)
        rows = {
            "index": np.arange(4), "label": np.arange(4), "prediction": np.arange(4), "margin": np.ones(4),
            "robust": right, "broken_by": [None if r else "square" for r in right], "robust@0.1": right,
        }  # fmt: skip
        pq.write_table(pa.table(rows).take(np.array([3, 1, 0, 2])), folder / "rows.parquet")
        facts = {
            "attacks": {k: v.format(ord(name[0])) for k, v in attacks.items()}, "norm": "linf", "epsilon": 0.1,
            "precision": "float32", "gradients": True, "threat": "linf eps 0.1", "data": "mine",
            "class_names": list("abcd"), "notes": ["Measured."],
        }  # fmt: skip
        write_json(folder / "facts.json", facts)
    found = laid(tmp_path / "one", tmp_path / "two")
    assert found.pairs[0].column == "autoattack"
    assert found.pairs[0].found.estimate == 0.25
    text = compare_page.render(found)
    assert "an evaluation alone" in text
    assert "Fewer than two of these have a recipe" in text


# --- recipes -----------------------------------------------------------------------------------------------------


def test_fields_that_differ():
    one = {"class": "Recipe", "a": 1, "b": {"class": "Heun", "steps": 3}, "c": [1, 2], "d": [{"class": "X", "k": 1}]}
    two = {"class": "Recipe", "a": 1.0, "b": {"class": "DDIM"}, "c": [1, 3], "d": [{"class": "X", "k": True}]}
    assert flat(one)["b"] == "Heun"
    assert [(f.path, f.values) for f in differing([one, two])] == [
        ("b", ("Heun", "DDIM")),
        ("b.steps", ("3", "–")),
        ("c", ("1, 2", "1, 3")),
        ("d.0.k", ("1", "true")),
    ]
    assert differing([one, {}, one]) == []
    assert differing([one, {}, two])[0].groups == [("Heun", (0,)), ("DDIM", (2,))]
    assert (said(None), said(""), said([])) == ("none", "empty text", "none")
    assert shortened("x" * 99, 11) == "xxxxx…xxxxx"


def test_the_mean_of_trainings_is_over_common_steps():
    def curve(steps, robust):
        return TrainingCurve(seed=0, steps=steps, loss=[1.0] * len(steps), validation_steps=steps,
                             validation_clean=robust, validation_robust=robust)  # fmt: skip

    mean = mean_curve([curve([1, 2, 3], [0.1, 0.2, 0.3]), curve([1, 2], [0.3, 0.6])])
    assert mean is not None
    assert (mean.validation_steps, mean.validation_robust) == ([1, 2], pytest.approx([0.2, 0.4]))
    assert mean_curve([curve([1], [0.1]), curve([2], [0.1])]) is None


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    return [
        run(tmp_path, n, {REAL: {0: drawn(0, k)}, PLAIN: {0: drawn(1, k)}}) for k, n in enumerate(("a1", "a2", "b"))
    ]


def test_the_command_finds_runs_and_says_where_the_page_is(three, tmp_path, capsys):
    assert main(["compare", "a1", "b", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    page = Path(re.search(r"page: (.*)", out)[1])
    assert page.parent == tmp_path
    assert page.name.startswith("compare-a1-with-b-")
    assert "<!doctype html>" in page.read_text()[:300]
    assert "run 2: b" in out
    assert (
        main(["compare", "a1", str(three[2]), "--runs", str(tmp_path), "--out", str(page)]) == 0
    )  # its own page again


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["a1"], "expected 2 to 40 runs, got 1; name another run"),
        (["--out", "x.html"], "got 0; name two runs"),
        (["a1", "a1"], "expected different runs"),
        (["a1", "a"], "unknown run"),
        (["a1", "zzz"], "unknown run"),
        (["a1", "b", "--out", "page.txt"], "ends in .html"),
        (["a1", "b", "--out", "."], "got a folder"),
        (["a1", "b", "--fast"], "got --fast"),
    ],
)
def test_mistakes_are_answered(three, tmp_path, capsys, monkeypatch, words, why):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words, "--runs", str(tmp_path)]) == 2
    assert why in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_nothing_else_is_overwritten_and_folders_that_are_no_runs_are_named(three, tmp_path):
    report = three[0] / "report.html"
    report.write_text("a report")
    with pytest.raises(UserError, match="something else"):
        compare_command.compare(["a1", "b", "--runs", str(tmp_path), "--out", str(report)])
    assert report.read_text() == "a report"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found neither"):
        compare_command.compare(["a1", str(tmp_path / "empty"), "--runs", str(tmp_path)])
    same = shutil.copytree(three[0], tmp_path / "copies" / "a1")
    assert [c.name for c in laid(three[0], same).contenders][1] == f"a1 in {same.parent}"


# --- the page ----------------------------------------------------------------------------------------------------


def nasty_run(root, name):
    """A run whose every string is hostile."""
    check = {"name": NASTY, "passed": False, "detail": NASTY}
    folder = run(
        root, name, {REAL: {0: drawn(0, 1.0)}}, names=[NASTY + "</b>", *map(str, range(1, 10))], checks=[check]
    )
    facts = json.loads((folder / "run.json").read_text())
    facts |= {"command": NASTY, "versions": {NASTY: NASTY + name}}
    write_json(folder / "run.json", facts)
    return folder


def test_every_string_is_escaped(tmp_path):
    text = compare_page.render(laid(nasty_run(tmp_path, NASTY), nasty_run(tmp_path, "other" + NASTY)))
    assert "<b>" not in text
    assert "x'" not in text
    assert "&lt;b&gt;" in text


def test_failures_stand_at_the_top(tmp_path):
    found = laid(nasty_run(tmp_path, "a"), run(tmp_path, "b", {REAL: {0: drawn(0, 1.0)}}))
    text = compare_page.render(found)
    assert text.index('class="alarm"') < text.index('id="verdict"')
    assert "run 1 (a): &lt;b&gt;" in text
    assert [line.style for line in compare_words.terminal_lines(found) if "failed" in line.plain] == ["bold red"]


def test_the_page_is_the_same_for_the_same_runs_and_its_ids_are_its_own(three):
    text = compare_page.render(laid(*three))
    assert text == compare_page.render(laid(*three))
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    looks = [(line.look.colour, line.look.marker, str(line.look.line)) for line in lines_of(laid(*three).contenders)]
    assert len(looks) == 6 <= MOST_LINES
    assert len(set(looks)) == 6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_forty_runs_of_a_thousand_classes_stay_small(tmp_path):
    labels, names = np.arange(2000) % 1000, [f"a class with a long name, number {k}" for k in range(1000)]
    arms = (REAL, Arm.GAUSSIAN, PLAIN, Arm.GUIDED)
    folders = [
        run(tmp_path, f"run-{k}", {arm: {0: drawn(k, 0.5, 2000)} for arm in arms}, labels=labels, names=names)
        for k in range(compare_command.MOST_RUNS)
    ]
    text = compare_page.render(laid(*folders))
    assert len(text.encode()) < 5_000_000
    two = compare_page.render(laid(*folders[:2]))
    assert "20 of 1000 classes" in two
    assert len(two.encode()) < 1_000_000


BROKEN = """() => {
  const bad = [];
  for (const each of document.querySelectorAll('svg, .track')) {
    const style = getComputedStyle(each.closest('td') || each), box = each.getBoundingClientRect();
    const open = each.checkVisibility ? each.checkVisibility() : true;
    if (open && style.display !== 'none' && (box.width < 1 || box.height < 1)) bad.push(each.outerHTML.slice(0, 90));
  }
  const over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (over > 0) bad.push('wider than the window by ' + over);
  return bad;
}"""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [2, pytest.param(9, marks=pytest.mark.slow)])
def test_in_a_real_browser(tmp_path, count):
    binary = next((b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None)
    if binary is None:
        pytest.skip("no chromium or google-chrome on PATH, so the page was not opened in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    arms = (REAL, Arm.GAUSSIAN, PLAIN, Arm.GUIDED)
    folders = [nasty_run(tmp_path, NASTY * 9)]
    folders += [run(tmp_path, f"run-{k}", {arm: {0: drawn(k, 0.5)} for arm in arms}) for k in range(count - 1)]
    path = compare_page.write(laid(*folders), tmp_path / "compare.html")
    troubles, asked = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: troubles.append(str(e)))
        tab.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
        for width, scheme in ((375, "light"), (820, "dark"), (1280, "light")):
            tab.set_viewport_size({"width": width, "height": 900})
            tab.emulate_media(color_scheme=scheme)
            tab.goto(path.as_uri())
            troubles += tab.evaluate(BROKEN)
        charts = tab.locator("svg.chart").count()
        browser.close()
    assert troubles == []
    assert set(asked) == {path.as_uri()}
    assert charts == (1 + 3 if count == 2 else 9)
