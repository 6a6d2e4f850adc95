"""The whole story, tiny: from images to the page, killed and resumed, and every mistake answered."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import attempts, fingerprints, tiny_recipe

from gambeson import files
from gambeson.cli import main
from gambeson.engine import News
from gambeson.pipeline import tell
from gambeson.recipe import Arm, Recipe, class_table
from gambeson.recipes import named
from gambeson.report.found import find
from gambeson.run import Run, execute, folder_of
from gambeson.store import Store

COMMAND = [sys.executable, "-m", "gambeson"]


class Quiet:
    """A screen that remembers which stages it saw."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def show(self, news: News) -> None:
        self.seen.add(news.stage)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run in one process."""
    screen = Quiet()
    run = execute(tiny_recipe(), tmp_path_factory.mktemp("whole"), 1, screen, "test")
    every = {"train_denoiser", "train_classifier", "generate", "gaussian_control", "label", "select", "evaluate"}
    assert screen.seen == every
    return run


def test_every_arm_has_a_row_for_every_test_image(whole: Run) -> None:
    rows = whole.rows()
    assert len(rows) == 4 * 197
    assert set(rows["arm"].to_pylist()) == {a.value for a in Arm}
    labels = whole.recipe.data.load().test.labels.numpy()
    for arm in Arm:
        mine = rows.filter(np.array(rows["arm"].to_pylist()) == arm.value)
        assert mine["index"].to_pylist() == list(range(197))
        assert np.array_equal(mine["label"].to_numpy(), labels)
        clean = mine["prediction"].to_numpy() == labels
        apgd, ce, targeted, pgd = (np.array(mine[c].to_pylist()) for c in ("apgd", "apgd_ce", "apgd_t", "pgd"))
        assert np.array_equal(apgd, ce & targeted)
        assert not (apgd & ~clean).any()
        assert not (pgd & ~clean).any()
        assert sum(v is not None for v in mine["robust@0.1"].to_pylist()) == 30
        margins = mine["margin"].to_numpy()
        assert np.array_equal(margins > 0, clean)


def test_a_story_reads_its_images_once(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door, reads = type(whole.recipe.data), list[object]()
    load = door.load
    monkeypatch.setattr(door, "load", lambda self: reads.append(self) or load(self))
    for arm in Arm:
        tell(whole.recipe, arm, 0, Store(tmp_path).sought)
    assert len(reads) == len(Arm)
    reads.clear()
    shutil.copy(whole.folder / "recipe.yaml", tmp_path / "recipe.yaml")  # a run that has begun
    shutil.copy(whole.folder / "version.json", tmp_path / "version.json")
    assert len(find(tmp_path).chapters) == len(Arm)
    assert len(reads) == 1


def test_arms_share_what_they_share_and_nothing_else(whole: Run) -> None:
    told = {c.arm: c.artifacts for c in whole.chapters}
    assert told[Arm.GUIDED]["encoder"] == told[Arm.REAL]["student"]
    assert told[Arm.PLAIN]["denoiser"] == told[Arm.GUIDED]["denoiser"]
    assert len({t["student"].digest for t in told.values()}) == 4
    assert len({told[a]["synthetic"].digest for a in (Arm.GAUSSIAN, Arm.PLAIN, Arm.GUIDED)}) == 3
    assert set(attempts(whole.folder.parent).values()) == {1}


def test_a_finished_run_is_not_redone_and_its_file_repeats_it(whole: Run, tmp_path: Path) -> None:
    root = whole.folder.parent
    before, stamps = fingerprints(root), {p: p.stat().st_mtime_ns for p in root.rglob("done.json")}
    again = files.load(whole.folder / "recipe.yaml", Recipe, class_table())
    assert again == whole.recipe
    assert again.digest == whole.recipe.digest
    execute(again, root, 1, Quiet(), "test")
    assert fingerprints(root) == before
    assert {p: p.stat().st_mtime_ns for p in root.rglob("done.json")} == stamps


def test_two_processes_give_the_bits_of_one(whole: Run, tmp_path: Path) -> None:
    execute(tiny_recipe(), tmp_path, 2, Quiet(), "test")
    assert fingerprints(tmp_path) == fingerprints(whole.folder.parent)


def test_a_damaged_shard_is_named(whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole.folder.parent, tmp_path / "runs")
    chapter = next(c for c in whole.chapters if c.arm is Arm.PLAIN)
    (tmp_path / "runs/stages/train_classifier" / chapter.artifacts["student"].digest[:16] / "done.json").unlink()
    shard = tmp_path / "runs/stages/generate" / chapter.artifacts["synthetic"].digest[:16] / "images/shards/00001.npy"
    data = bytearray(shard.read_bytes())
    data[200] ^= 255
    shard.write_bytes(data)
    recipe = tmp_path / "runs" / whole.folder.name / "recipe.yaml"
    assert main(["run", str(recipe), "--runs", str(tmp_path / "runs"), "--workers", "1"]) == 3
    assert f"{shard}: expected SHA-256" in capfd.readouterr().err


def test_a_run_of_another_version_is_refused(whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    version = tmp_path / whole.folder.name / "version.json"
    version.write_text(json.dumps({"format": 99, "gambeson": "9.0"}))
    assert main(["show", str(tmp_path / whole.folder.name)]) == 2
    assert "got format 99 (gambeson 9.0)" in capfd.readouterr().err
    assert main(["run", str(version.with_name("recipe.yaml")), "--runs", str(tmp_path)]) == 2


def test_an_edited_recipe_is_not_taken_for_the_one_that_ran(
    whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.folder.parent, tmp_path / "runs")
    recipe = tmp_path / "runs" / whole.folder.name / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("epsilon: 0.15", "epsilon: 0.01", 1))
    assert main(["show", whole.folder.name, "--runs", str(tmp_path / "runs")]) == 2
    assert "got an edited one" in capfd.readouterr().err


def test_rows_are_read_from_checksummed_stages(whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole.folder.parent, tmp_path / "runs")
    rows = next((tmp_path / "runs/stages/evaluate").glob("*/rows.parquet"))
    rows.write_bytes(rows.read_bytes()[:-9])
    assert main(["show", whole.folder.name, "--runs", str(tmp_path / "runs")]) == 3
    assert f"{rows}: expected SHA-256" in capfd.readouterr().err


def test_a_raised_revision_makes_a_new_record_and_keeps_the_old(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole.folder.parent, tmp_path / "runs")
    import gambeson.pipeline

    monkeypatch.setattr(gambeson.pipeline, "evaluate", replace(gambeson.pipeline.evaluate, revision=99))
    again = execute(whole.recipe, tmp_path / "runs", 1, Quiet(), "test")
    records = [
        json.loads(a["rows"].folder.joinpath("done.json").read_text()) for c in again.chapters if (a := c.artifacts)
    ]
    assert {r["revision"] for r in records} == {99}
    assert len(list(again.folder.glob("run-until-*.json"))) == 1


def test_a_damaged_run_hides_no_other(whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole.folder.parent, tmp_path / "runs")
    for name, text in {"a-foreign": '{"format": 99}', "b-damaged": '{"for', "c-strange": "{}"}.items():
        shutil.copytree(whole.folder, tmp_path / "runs" / name)
        file = "run.json" if name == "c-strange" else "version.json"
        (tmp_path / "runs" / name / file).write_text(text)
    assert main(["runs", "--runs", str(tmp_path / "runs")]) == 0
    shown = capfd.readouterr().out
    assert shown.count("cannot be read") == 3
    assert f"{whole.folder.name} " in shown
    assert main(["show", "b-damaged", "--runs", str(tmp_path / "runs")]) == 3
    assert "version.json: expected JSON" in capfd.readouterr().err


def test_runs_show_and_report(whole: Run, capfd: pytest.CaptureFixture[str]) -> None:
    root, name = str(whole.folder.parent), whole.folder.name
    assert main(["runs", "--runs", root]) == 0
    assert f"{name} " in capfd.readouterr().out
    assert main(["show", name[:6], "--runs", root]) == 0
    shown = capfd.readouterr().out
    assert all(arm.title.split()[-1] in shown for arm in Arm)
    assert main(["report", name, "--runs", root]) == 0
    page = Path(capfd.readouterr().out.strip())
    assert page == (whole.folder / "report.html").resolve()
    html = page.read_text(encoding="utf-8")
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert main(["show", "nothing", "--runs", root]) == 2
    assert name in capfd.readouterr().err


MISTAKES = {
    "unknown recipe": (["run", "digist"], "digits", 2),
    "unknown command": (["rnu"], "run", 2),
    "unknown field": (["run", "digits", "--generation.cuont", "5"], "generation.count", 2),
    "wrong type": (["run", "digits", "--generation.count", "many"], "generation.count", 2),
    "eps 0": (["run", "digits", "--threat.epsilon", "0"], "above 0", 2),
    "count 0": (["run", "digits", "--generation.count", "0"], "above 0", 2),
    "a name that is a path": (["run", "digits", "--name", "a/b"], "letters", 2),
    "too few images": (["run", "digits", "--data.train_images", "10"], "from 20", 2),
    "label dropout 7": (["run", "digits", "--denoiser.label_dropout", "7"], "from 0 to below 1", 2),
    "window without a step": (["run", "digits", "--generation.guidance.window.sigma_min", "100"], "guided step", 2),
    "targeted steps 0": (["run", "digits", "--evaluation.targeted.steps", "0"], "at least 1", 2),
    "workers 0": (["run", "digits", "--workers", "0"], "above 0", 2),
    "no value": (["run", "digits", "--workers"], "value", 2),
    "no such file": (["run", "./no/such/recipe.yaml"], "recipe.yaml", 2),
    "not a run": (["show", "/tmp"], "run", 2),
    "no permission": (["run", "digits", "--runs", "/proc/nowhere"], "--runs", 3),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_in_one_paragraph(mistake: str, capfd: pytest.CaptureFixture[str]) -> None:
    argv, expected, code = MISTAKES[mistake]
    assert main(argv) == code
    said = capfd.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert "\n\n" not in said.strip()


def test_help_shows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    from gambeson.overrides import flat_fields

    with pytest.raises(SystemExit) as stopped:
        main(["run", "digits", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for path, _, _, text in flat_fields(named("digits")):
        assert f"--{path}" in shown
        assert text, f"{path} has no line of help"


def start(recipe: Path, runs: Path, workers: int = 1) -> subprocess.Popen[bytes]:
    """A run in a process group of its own, its state saved twenty times a second."""
    environment = {**os.environ, "GAMBESON_CHECKPOINT_SECONDS": "0.05", "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "run", str(recipe), "--runs", str(runs), "--workers", str(workers)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def unfinished(runs: Path) -> set[str]:
    """Stages that have begun and not ended."""
    begun = {p.parent for p in (runs / "stages").glob("*/*/attempts.json")}
    return {p.parent.name for p in begun if not (p / "done.json").exists()}


def kill(process: subprocess.Popen[bytes], runs: Path, stage: str, delay: float) -> set[str]:
    """SIGKILL `delay` seconds after the process began to work on the stage; the stages it died in."""

    def begun() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in runs.glob(f"stages/{stage}/*/attempts.json")}

    before = begun()
    while process.poll() is None and begun() == before:
        time.sleep(0.005)
    time.sleep(delay)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return unfinished(runs) if alive else set()


@pytest.mark.parametrize("times_each", [pytest.param((4, 3, 5), marks=pytest.mark.slow), (1, 1, 2)])
def test_killed_at_random_times_a_run_ends_in_the_same_bits(times_each: tuple[int, int, int], tmp_path: Path) -> None:
    """SIGKILL at 12 (4) random moments of training and generation; the bits are those of a run left alone."""
    recipe = replace(tiny_recipe(arms=(Arm.GUIDED,)), name="killed")
    recipe = replace(recipe, generation=replace(recipe.generation, count=800, blocks_per_shard=12))
    execute(recipe, tmp_path / "whole", 1, Quiet(), "test")
    file, runs = folder_of(recipe, tmp_path / "whole") / "recipe.yaml", tmp_path / "runs"
    times, hit = random.Random(0), list[str]()
    stages = ("train_denoiser", "train_classifier", "generate")
    for stage in [stage for stage, n in zip(stages, times_each, strict=True) for _ in range(n)]:
        hit += kill(start(file, runs), runs, stage, times.uniform(0, 0.25))
    assert len(hit) >= sum(times_each) - 2, hit
    assert "generate" in hit, hit
    assert sum(h.startswith("train") for h in hit) >= times_each[0] + times_each[1] - 3, hit
    last = start(file, runs)
    assert last.wait() == 0, last.stderr.read() if last.stderr else ""
    assert fingerprints(runs) == fingerprints(tmp_path / "whole")
    assert sum(attempts(runs).values()) - len(attempts(runs)) >= sum(times_each) - 2
    assert not list(runs.rglob("*.part"))


def test_workers_die_with_their_parent_and_leave_no_lock(whole: Run, tmp_path: Path) -> None:
    recipe, runs = whole.folder / "recipe.yaml", tmp_path / "runs"
    process = start(recipe, runs, workers=2)
    while not (runs / "stages/train_denoiser").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    assert kill(process, runs, "train_classifier", 0.05)
    time.sleep(1.0)
    assert not [c for c in children if Path(f"/proc/{c}").exists() and "Z" not in Path(f"/proc/{c}/stat").read_text()]
    finished = start(recipe, runs, workers=2)
    assert finished.wait(timeout=120) == 0
    assert fingerprints(runs) == fingerprints(whole.folder.parent)


def test_equal_recipes_have_equal_digests_and_folders() -> None:
    assert named("digits").digest == named("digits").digest
    assert folder_of(named("digits"), Path("runs")).name.startswith("digits-")
    changed = replace(named("digits"), seed=1)
    assert changed.digest != named("digits").digest


def test_seeds_share_the_data_and_vary_everything_else(tmp_path: Path) -> None:
    run = execute(tiny_recipe(arms=(Arm.PLAIN,), seeds=2), tmp_path, 2, Quiet(), "test")
    first, second = (c.artifacts for c in run.chapters)
    assert not {a.digest for a in first.values()} & {a.digest for a in second.values()}
    seeds = pq.read_table(run.folder / "rows.parquet")["seed"].to_pylist()
    assert seeds.count(0) == seeds.count(1) == 197
