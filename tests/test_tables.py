"""Tables: cells are the base recipe and their changes, rows are kept and resumed, choices see validation alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_recipe

from gambeson import table_command
from gambeson.data.datasets import Digits
from gambeson.data.imageset import ImageSet
from gambeson.errors import EnvironmentFault, UserError
from gambeson.pipeline import tell
from gambeson.recipe import Arm
from gambeson.recipes import named
from gambeson.recipes.costs import Rates
from gambeson.report.statistics import paired_difference
from gambeson.robustness.attacks import APGD, TargetedAPGD
from gambeson.store import Store
from gambeson.tables import bases, running
from gambeson.tables.cells import Of, Row, Table, changed, differences, expand
from gambeson.tables.definitions import TABLES
from gambeson.tables.plan import Bookkeeper, forecast
from gambeson.tables.printed import printed
from gambeson.tables.results import contrast, effects, lines, square_effects
from gambeson.tables.running import make, missing, publish
from gambeson.tables.sheet import Sheet
from gambeson.tables.telling import markdown

PAPER = Path("/work/shared/papers/001_8f5f7520547278dc.txt")


def base():
    """A recipe of which a cell is made in about a second."""
    found = tiny_recipe()
    few = replace(found.student.optimisation, steps=4)
    student = replace(found.student, optimisation=few, validations=1, validation_steps=1)
    optimisation = replace(found.denoiser.optimisation, steps=4)
    return replace(
        found,
        data=Digits(train_images=100, validation_images=100),
        student=student,
        teacher=replace(found.teacher, optimisation=few, validation_steps=1),
        denoiser=replace(found.denoiser, optimisation=optimisation),
        generation=replace(found.generation, levels=replace(found.generation.levels, steps=4)),
        evaluation=replace(found.evaluation, apgd=APGD(steps=2), targeted=TargetedAPGD(steps=2, targets=1)),
    )


SMALL = Table(
    title="Small",
    source="tests",
    rows=(
        Row(name="none", about="real", arm=Arm.REAL),
        Row(name="plain", about="plain", arm=Arm.PLAIN, against=("none",)),
        Row(
            name="rate",
            about="a choice",
            arm=Arm.REAL,
            choices={
                "low": {"student.optimisation.learning_rate": 1e-6},
                "high": {"student.optimisation.learning_rate": 0.2},
            },
            against=("none",),
        ),
    ),
)


def sheet_of(table, recipe, folder, seeds=(0,), digest=None):
    """A sheet of a table, with or without the images' digest."""
    facts = {"base": recipe.name, "base_digest": recipe.digest, "data": "digits", "data_digest": digest}
    return Sheet(
        name="small",
        tier="digits",
        title=table.title,
        source=table.source,
        notes=table.notes,
        cells=expand(table, recipe, (1,), 100),
        squares=(),
        seeds=seeds,
        facts=facts | {"train": 100, "threat": "linf", "command": "gambeson table small"},
        folder=folder,
    )


class Quiet:
    def show(self, news):
        pass


# -- the definitions


@pytest.mark.parametrize("tier", bases.TIERS)
@pytest.mark.parametrize("name", TABLES)
def test_every_table_makes_recipes_that_can_be_told(name: str, tier: str) -> None:
    """And their students are trained alike, but for rivals, which are named."""
    table = TABLES[name]
    recipe = bases.base_of(tier, table)
    amounts = (1, 4) if tier == "digits" else (1,)
    cells = expand(table, recipe, amounts, 300)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) == sum(len(amounts) if row.synthetic else 1 for row in table.rows)
    for cell in cells:
        assert set(cell.against) <= set(names) - {cell.name}
        assert len({setting.key for setting in cell.settings}) == len(cell.settings)
        if cell.amount is not None:  # so many are kept for each real one, whatever the pool
            kept = {s.recipe.generation.count * s.recipe.selection.keep for s in cell.settings}
            assert kept == {300.0 * cell.amount}
    for corners in table_command.squares(table, amounts):
        assert set(corners) <= set(names)
    rivals = {cell.name for cell in cells if cell.student_changes}
    wanted = {"none-best", "crop", "cutout", "cutmix"} if name == "baselines" else set()
    assert rivals == (wanted if tier == "digits" else wanted - {"crop"})  # elsewhere every student crops
    assert all(s.recipe.student == recipe.student for c in cells if c.name not in rivals for s in c.settings)


def test_regimes_change_one_thing_and_are_compared_with_themselves() -> None:
    recipe = bases.base_of("digits", TABLES["regimes"])
    cells = {cell.name: cell for cell in expand(TABLES["regimes"], recipe, (4,), 300)}
    for name, steps, radius in (
        ("weak", 125, 0.15),
        ("strong", 1500, 0.15),
        ("easy", 500, 0.075),
        ("hard", 500, 0.225),
    ):
        real = "none" if radius == 0.15 else f"none-{name}"
        plain, cdp = cells[f"plain-{name}-4x"], cells[f"cdp-{name}-4x"]
        assert plain.against == ((real, "plain-4x") if real == "none" else (real,))
        assert cdp.against == (plain.name, real)
        for cell in (plain, cdp, cells[real]):
            found = cell.settings[0].recipe.with_threat_everywhere()
            assert found.student.loss.threat.epsilon == found.evaluation.pgd.threat.epsilon == radius
        assert plain.settings[0].recipe.denoiser.optimisation.steps == steps


def test_printed_numbers_belong_to_rows() -> None:
    for name, table in TABLES.items():
        rows = {row.name for row in table.rows}
        assert {row for row, _ in table.printed} <= rows
        assert (not table.printed) == (not name.startswith("cdp-"))
    assert printed("cdp-2")["cdp", 1].robust == 53.91  # METHOD 3
    assert printed("cdp-3")["none", 0].clean == 78.41
    assert printed("cdp-6")["cdp-gradient-norm-rob", 20].robust == 57.18
    assert printed("cdp-4")["lambda-100k", 4].robust is None


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not on this machine")
def test_printed_numbers_stand_in_their_lines() -> None:
    text = PAPER.read_text().splitlines()
    found = [each for name in TABLES for each in printed(name).values()]
    assert len(found) == 3 + 4 + 3 + 9 + 9 + 12
    for each in found:
        for number in (each.clean, each.robust):
            assert number is None or f"{number:.2f}" in text[each.line - 1]


# -- cells


def test_changes_are_put_in_together_and_unknown_paths_are_named() -> None:
    row = next(row for row in TABLES["encoders"].rows if row.name == "noise-conditioned")
    found = changed(named("digits"), row.changes)  # one without the other would be refused
    assert found.encoder == "noise-conditioned"
    doubled = changed(found, {"student.optimisation.steps": Of(lambda r: 2 * r.student.optimisation.steps)})
    assert differences(found, doubled) == ["--student.optimisation.steps 800"]
    with pytest.raises(UserError, match=r"field of recipe.generation.*guidance"):
        changed(found, {"generation.guidence": None})


def test_keys_change_with_what_rows_depend_on_and_nothing_else() -> None:
    cell = expand(SMALL, base(), (1,), 100)[0]
    (setting,) = cell.settings
    renamed = replace(setting, recipe=replace(setting.recipe, name="other", seeds=7, seed=3))
    longer = replace(setting, recipe=changed(setting.recipe, {"student.optimisation.steps": 5}))
    assert renamed.key == setting.key != longer.key
    assert replace(setting, arm=Arm.PLAIN).key != setting.key


# -- numbers


def hand_made(seed, right):
    """Rows whose images are all classified rightly, and withstand the attacks where `right` says so."""
    size = len(right)
    columns = {"seed": [seed] * size, "index": list(range(size)), "label": [0] * size, "prediction": [0] * size}
    return pa.table(columns | {"apgd": list(right)})


def kept_sheet(tmp_path, verdicts, seeds=(0, 1), digest=None):
    """A sheet of a 2 x 2 whose rows are written by hand: cell -> [seeds, images] verdicts."""
    rows = tuple(Row(name=n, about=n, arm=Arm.REAL, against=("a",) if n != "a" else ()) for n in verdicts)
    sheet = sheet_of(Table(title="t", source="s", rows=rows), base(), tmp_path, seeds, digest)
    for cell in sheet.cells:
        for seed, right in zip(seeds, verdicts[cell.name], strict=True):
            for part in ("validation", "test"):
                sheet.keep(cell.settings[0], seed, part, hand_made(seed, right), {"failed_checks": []})
    return replace(sheet, squares=(tuple(verdicts),)) if len(verdicts) == 4 else sheet


def random_verdicts(names="abcd"):
    draws = np.random.default_rng(0)
    return {n: draws.random((2, 40)) < 0.3 + 0.1 * i for i, n in enumerate(names)}


def test_lines_and_effects_are_queries_over_kept_rows(tmp_path: Path) -> None:
    verdicts = random_verdicts()
    sheet = kept_sheet(tmp_path, verdicts)
    found = {line.cell.name: line for line in lines(sheet)}
    assert found["b"].robust.estimate == verdicts["b"].mean()
    assert found["b"].beside[0].robust == paired_difference(verdicts["b"], verdicts["a"])
    a, b, c, d = (verdicts[n].astype(float) for n in "abcd")
    first, second, both = effects(sheet)
    assert first.robust.estimate == pytest.approx(((b - a) + (d - c)).mean() / 2)
    assert second.robust.estimate == pytest.approx(((c - a) + (d - b)).mean() / 2)
    assert both.robust.estimate == pytest.approx((d - c - b + a).mean())
    assert both.robust.low < both.robust.estimate < both.robust.high


@pytest.mark.parametrize("seeds", [1, 3])
def test_contrast_of_two_cells_is_the_paired_difference(seeds: int) -> None:
    draws = np.random.default_rng(1)
    a, b = (draws.random((seeds, 50)) < p for p in (0.6, 0.5))
    ours, theirs = contrast(a.astype(float) - b), paired_difference(a, b)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.randomness == theirs.randomness


def test_an_interaction_by_hand() -> None:
    """Both helps on every image, each alone on none: main effects of a half, an interaction of 1."""
    no, yes = np.zeros((2, 10), bool), np.ones((2, 10), bool)
    values = [effect.robust.estimate for effect in square_effects(("o", "a", "b", "ab"), [no, no, no, yes])]
    assert values == [0.5, 0.5, 1.0]


def test_rows_of_other_images_are_not_compared(tmp_path: Path) -> None:
    sheet = kept_sheet(tmp_path, random_verdicts("ab"), digest="first")
    other = replace(sheet, facts=sheet.facts | {"data_digest": "second"})
    assert not other.has(sheet.cells[0].settings[0], 0, "test")
    assert len(missing(other, test=True)) == 4
    record = sheet.place(sheet.cells[0].settings[0], 0)
    record.write_text(record.read_text().replace('"first"', '"third"'))
    with pytest.raises(EnvironmentFault, match="one image set"):
        lines(replace(sheet, facts=sheet.facts | {"data_digest": None}))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    sheet = kept_sheet(tmp_path, random_verdicts("ab"))
    sheet.place(sheet.cells[1].settings[0], 0).unlink()
    sheet.place(sheet.cells[1].settings[0], 1).unlink()
    found = lines(sheet)
    assert found[1].robust is None
    assert not found[1].plain()["measured"]
    text = markdown(sheet, found, [])
    assert text.count("not yet measured") == 3  # clean, robust and validation of one cell
    assert "1 of 2 cells measured with all seeds (wanted: 2)" in text


# -- making


def test_a_table_is_made_chosen_on_validation_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, runs = base(), tmp_path / "runs"
    real = recipe.data.load()
    sheet = sheet_of(SMALL, recipe, tmp_path / "table", digest=real.digest)
    assert make(sheet, runs, 1, Quiet(), test=False) == []
    assert not (runs / "stages" / "evaluate").exists()  # nothing has read a test image
    assert [line.robust for line in lines(sheet)] == [None] * 3

    assert make(sheet, runs, 1, Quiet()) == []
    _, rate, plain = lines(sheet)
    assert plain.images == 1597
    assert plain.beside[0].seeds == 1
    assert rate.settings["high"] >= rate.settings["low"]
    assert rate.choice == max(rate.settings, key=rate.settings.get)
    low, high = sheet.cells[1].settings  # rows without synthetic images come first
    tested = {s.choice: sheet.rows_at(s, 0, "test").exists() for s in (low, high)}
    assert tested == {"low": rate.choice == "low", "high": rate.choice == "high"}
    assert set(pq.read_schema(sheet.rows_at(high, 0, "validation")).names) >= {"seed", "index", "apgd", "prediction"}

    written = json.loads((sheet.folder / "table.json").read_text())
    assert [row["measured"] for row in written["rows"]] == [True] * 3
    alike = [row["student_changes"] for row in written["rows"]]
    assert alike == [[], ["--student.optimisation.learning_rate 1e-06"], []]
    monkeypatch.setattr(running, "run_jobs", lambda *_: pytest.fail("everything is there"))
    make(sheet, runs, 1, Quiet())

    plainly = sheet.cells[2].settings[0].recipe.with_threat_everywhere()
    keeper = Bookkeeper(runs.resolve(), lambda *_: 1.0)  # its digests are the store's: all of it is found
    asked = [tell(plainly, Arm.PLAIN, 0, once).artifacts for once in (keeper.once, Store(runs.resolve()).once)]
    assert asked[0] == asked[1]
    assert keeper.spent == []

    rates = Rates(denoiser_step=1.0, denoised=1.0, student_step=1.0, teacher_step=1.0, gradient=1.0)
    again = replace(sheet, folder=tmp_path / "other")  # no rows, but every stage
    found = forecast(again, real, runs, lambda *_: rates, workers=2)
    assert found.jobs == 4
    assert found.seconds == found.stages.get("evaluate", 0.0)
    fresh = forecast(replace(again, seeds=(5, 6)), real, runs, lambda *_: rates, workers=2)
    assert fresh.jobs == 8
    assert fresh.stages["train_denoiser"] == 2 * 4 * recipe.denoiser.optimisation.batch_size
    some = forecast(replace(again, seeds=(5, 0)), real, runs, lambda *_: rates, workers=2)
    assert some.stages["train_denoiser"] * 2 == fresh.stages["train_denoiser"]  # the stages of seed 0 are there
    shared = replace(recipe, denoiser=replace(recipe.denoiser, seed=9))
    once = forecast(sheet_of(SMALL, shared, tmp_path / "shared"), real, runs, lambda *_: rates, workers=1)
    assert once.stages["train_denoiser"] * 2 == fresh.stages["train_denoiser"]
    twice = replace(sheet_of(SMALL, shared, tmp_path / "shared"), seeds=(5, 6))
    assert (
        forecast(twice, real, runs, lambda *_: rates, workers=1).stages["train_denoiser"]
        == once.stages["train_denoiser"]
    )


def test_a_cell_that_cannot_be_made_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = sheet_of(replace(SMALL, rows=SMALL.rows[:1] + SMALL.rows[2:]), base(), tmp_path / "table")
    able = ["low"]

    def broken(sheet, setting, seed, parts, once):
        if setting.choice and setting.choice not in able:
            raise ValueError("not finite")
        for part in parts:
            sheet.keep(setting, seed, part, hand_made(seed, [True, setting.choice == "high"]), {"failed_checks": []})

    monkeypatch.setattr(running, "_study", broken)
    failed = make(sheet, tmp_path / "runs", 1, Quiet())
    assert failed == ["rate [high], seed 0: not finite"]
    none, rate = lines(sheet)
    assert none.robust is not None
    assert rate.choice == "low"
    assert rate.robust is not None
    assert "**failed: rate [high], seed 0: not finite**" in (sheet.folder / "table.md").read_text()

    able.append("high")
    assert make(sheet, tmp_path / "runs", 1, Quiet()) == []
    assert not lines(sheet)[1].failures
    assert lines(sheet)[1].choice == "high"


# -- the command


def test_the_command_plans_and_names_what_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table_command, "_forecast", lambda *_: "forecast: soon")
    words = ["cdp-5", "--plan", "--only", "hnm*", "infonce-4x", "--runs", str(tmp_path), "--seeds", "2"]
    table_command.table(words)
    out = capsys.readouterr().out
    assert "--generation.guidance.loss InfoNCE" in out
    assert "forecast: soon" in out
    assert "plain-4x:" not in out
    for wrong in (
        ["cdp-7"],
        ["cdp-2", "--tier", "17"],
        ["cdp-2", "--only", "x", "--plan"],
        ["cdp-2", "--amounts", "0"],
    ):
        with pytest.raises(UserError, match=r"expected"):
            table_command.table([*wrong, "--runs", str(tmp_path)])
    with pytest.raises(UserError, match="begun"):
        table_command.table(["cdp-2", "--report", "--runs", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []  # a plan leaves nothing behind


def test_a_kept_table_is_written_anew_without_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = table_command.read(["cdp-3", "--out", str(tmp_path), "--seeds", "1"], "gambeson table cdp-3")
    real = asked.base.data.load()
    publish(table_command.sheet_of(asked, table_command.Images.of(real)))
    first = json.loads((tmp_path / "cdp-3-digits" / "table.json").read_text())
    monkeypatch.setattr(ImageSet, "digest", property(lambda self: pytest.fail("images were read")))
    table_command.table(["cdp-3", "--report", "--out", str(tmp_path), "--seeds", "1"])
    again = json.loads((tmp_path / "cdp-3-digits" / "table.json").read_text())
    assert again["rows"] == first["rows"]
    assert again["rows"][2]["paper"]["robust"] == 56.27
    assert "not yet measured" in capsys.readouterr().out


def test_another_base_has_a_folder_of_its_own(tmp_path: Path) -> None:
    plain, altered = (
        table_command.folder_of(table_command.read(["cdp-2", "--out", str(tmp_path), *more], ""))
        for more in ([], ["--student.augment.padding", "1"])
    )
    assert plain.name == "cdp-2-digits"
    assert altered.name.startswith("cdp-2-digits-")
