"""A run watched from outside: its record of progress, killed and resumed, torn and foreign lines, TensorBoard."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fingerprints, tiny_recipe

from gambeson import engine, files
from gambeson.cli import main
from gambeson.data.datasets import Digits
from gambeson.data.writing import StoreWriter
from gambeson.engine import Job, News, run_jobs
from gambeson.errors import UserError
from gambeson.progress import Record, this_process
from gambeson.recipe import Arm
from gambeson.run import Run, execute, folder_of, jobs_of
from gambeson.store import Artifact, Workspace, stage
from gambeson.watch_command import Watched
from gambeson.watching import boards
from gambeson.watching.curves import BARS, Curves, bars
from gambeson.watching.lines import Tail
from gambeson.watching.state import State, life
from gambeson.watching.telling import Story

COMMAND = [sys.executable, "-m", "gambeson"]
STAGE = "stages/train_classifier/0123456789abcdef"


class Quiet:
    def show(self, news: News) -> None: ...


def small_recipe():
    """The real-only arm: a training of some seconds and a short attack."""
    recipe = tiny_recipe(arms=(Arm.REAL,))
    fitted = replace(recipe.student.optimisation, steps=100, batch_size=16)
    student = replace(recipe.student, optimisation=fitted, validations=4, validation_steps=1)
    attack = replace(recipe.evaluation.pgd, steps=1)
    evaluation = replace(recipe.evaluation, pgd=attack, curve=(0.1,), curve_attack=attack, check_images=10)
    return replace(
        recipe,
        name="watched",
        data=Digits(train_images=100, validation_images=1600),
        student=student,
        evaluation=evaluation,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder of a run that kept no record, its stages finished: as an earlier version left it."""
    root, recipe = tmp_path_factory.mktemp("alone"), small_recipe()
    run_jobs(jobs_of(recipe), root, 1, Quiet())
    folder = folder_of(recipe, root)
    folder.mkdir()
    files.save(recipe, folder / "recipe.yaml")
    return root


@pytest.fixture(scope="module")
def whole(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, complete, with a record."""
    root = tmp_path_factory.mktemp("whole") / "runs"
    shutil.copytree(alone, root)
    return execute(small_recipe(), root, 1, Quiet(), "gambeson run watched")


# A real run, watched


def start(runs: Path) -> subprocess.Popen[bytes]:
    recipe = runs.parent / "recipe.yaml"
    if not recipe.exists():
        files.save(small_recipe(), recipe)
    environment = {**os.environ, "GAMBESON_CHECKPOINT_SECONDS": "0.05", "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "run", str(recipe), "--runs", str(runs), "--workers", "1"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def until(watched: Watched, wanted: str, process: subprocess.Popen[bytes]) -> str:
    """Looks until the words are there."""
    while True:
        told = "\n".join(watched.look())
        if re.search(wanted, told):
            return told
        assert process.poll() is None, f"ended before {wanted!r}: {told}\n{process.stderr and process.stderr.read()}"
        time.sleep(0.1)


@pytest.mark.timeout(900)  # three runs of some seconds each: much longer where others use the machine
def test_a_run_is_watched_killed_resumed_and_watched_on(
    alone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From waiting for it to its verdict; and the bits are those of a run without a record."""
    runs = tmp_path / "runs"
    folder = folder_of(small_recipe(), runs)
    follower = subprocess.Popen([*COMMAND, "watch", "watched", "--runs", str(runs)], stdout=subprocess.PIPE, text=True)
    process, watched = start(runs), Watched(folder)
    told = until(watched, r"train classifier \(student\), \d+ of 100 steps, \d+ %.*\n +loss .", process)
    assert told.startswith(f"{folder.name}: runs, 0 of 1 jobs done, started 20")
    assert ", 1 worker, cpu\n" in told
    process.send_signal(signal.SIGKILL)
    process.wait()
    told = "\n".join(watched.look())
    assert told.startswith(f"{folder.name}: ended unfinished, 0 of 1 jobs done")
    assert f"process {process.pid} on" in told
    assert "is gone" in told
    assert "was at train classifier" in told
    resume = re.search(r"to go on: (gambeson run .*)", told)
    assert resume is not None
    assert main(["watch", "watched", "--once", "--runs", str(runs)]) == 0
    assert resume[1] in capfd.readouterr().out
    process = subprocess.Popen([*COMMAND, *resume[1].split()[1:], "--workers", "1"], stderr=subprocess.PIPE)
    told = until(watched, r"runs, .* start 2 of this run", process)
    assert "is gone" not in told
    assert process.wait() == 0, process.stderr and process.stderr.read()
    said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    for words in ("waiting for it", ": runs, ", "is gone", f"to go on: {resume[1]}", ": complete, 20", "Worst case"):
        assert words in said, said
    assert fingerprints(runs) == fingerprints(alone) | {
        str(p.relative_to(runs)): found
        for p in folder.glob("*.parquet")
        if (found := fingerprints(runs)[str(p.relative_to(runs))])
    }


def test_the_verdict_is_that_of_show(whole: Run, capfd: pytest.CaptureFixture[str]) -> None:
    root, name = str(whole.folder.parent), whole.folder.name
    assert main(["show", name, "--runs", root]) == 0
    shown = capfd.readouterr().out.split("recipe: ")[0]
    assert main(["watch", name, "--runs", root]) == 0
    watched = capfd.readouterr().out
    assert shown.strip() in watched
    assert f"its report is being written: {whole.folder / 'report.html'}" in watched  # by this process


def test_watching_changes_nothing(whole: Run, capfd: pytest.CaptureFixture[str]) -> None:
    def found() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in whole.folder.parent.rglob("*")}

    before = found()
    assert main(["watch", str(whole.folder), "--once"]) == 0
    assert found() == before


def test_a_run_without_a_record_is_told_from_its_stages(
    alone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(alone, tmp_path / "runs")
    before = sorted((tmp_path / "runs").rglob("*"))
    assert main(["watch", "watched", "--once", "--runs", str(tmp_path / "runs")]) == 0
    told = capfd.readouterr().out
    assert "unfinished, 1 of 1 jobs done" in told
    assert "keeps no record" in told
    training = next((tmp_path / "runs/stages/train_classifier").iterdir())
    (training / "done.json").unlink()
    assert main(["watch", "watched", "--once", "--runs", str(tmp_path / "runs")]) == 0
    told = capfd.readouterr().out
    assert re.search(
        r"seed 0 real only +train classifier \(student\), begun and not finished, at least 100 steps done", told
    )
    assert "loss" in told
    assert f"gambeson run {folder_of(small_recipe(), tmp_path / 'runs')}" in told
    shutil.rmtree(training)
    assert main(["watch", "watched", "--once", "--runs", str(tmp_path / "runs")]) == 0
    assert "not begun: seed 0 real only" in capfd.readouterr().out
    assert set(before) > set((tmp_path / "runs").rglob("*"))


# What is written


@stage(revision=1)
def counts(work: Workspace, spec: int, *, seed: int) -> None:
    """Reports many steps at once, then says something."""
    for done in range(spec):
        work.progress(done + 1, spec)
    work.say("counts: done counting")
    (work.folder / "result.txt").write_text("x")


def counting(spec: int, once) -> None:
    once(counts, spec, seed=0)
    once(counts, spec, seed=0)


def breaking(once) -> None:
    raise RuntimeError("no such luck")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_short_whatever_is_reported(tmp_path: Path) -> None:
    path, began = tmp_path / "progress.jsonl", time.perf_counter()
    with Record(path, jobs=["a", "b"], workers=1) as record:
        run_jobs([Job("a", counting, (3_000,)), Job("b", counting, (3_000,))], tmp_path, 1, Quiet(), keep=record)
    lines = lines_of(path)
    events = [line["event"] for line in lines]
    assert events[0] == "start"
    assert events[-1] == "complete"
    once = ["asked", "begun", "made", "asked", "found", "finished"]
    assert [e for line, e in zip(lines, events, strict=True) if line.get("job") == "a" and e in once] == once
    assert len(lines) < 20 + 2 * (time.perf_counter() - began)
    assert lines[0] | this_process(os.getpid()) == lines[0]
    said = [line["line"] for line in lines if line["event"] == "said"]
    assert said == ["counts: done counting"]
    folders = {line["folder"] for line in lines if "folder" in line}
    assert all((tmp_path / folder / "done.json").exists() for folder in folders)
    state = State()
    assert len(state.fold(lines)) == len(lines)
    assert [(job.state, [s.state for s in job.stages.values()]) for job in state.jobs.values()] == [
        ("finished", ["found"])
    ] * 2


def test_a_line_costs_less_than_a_millisecond_and_is_rare(tmp_path: Path) -> None:
    with Record(tmp_path / "progress.jsonl") as record:
        began, own = time.perf_counter(), time.process_time()
        for done in range(1, 20_001):
            record(News("job", "stage", done, 30_000, folder=tmp_path / STAGE))
        each, seconds = (time.process_time() - own) / 20_000, time.perf_counter() - began
        own = time.process_time()
        for number in range(500):
            record(News("job", f"stage {number}", 1, 2, folder=tmp_path / STAGE))
        whole = (time.process_time() - own) / 500
    assert each < 1e-4
    assert whole < 1e-3
    assert len(lines_of(tmp_path / "progress.jsonl")) <= 3 + 2 * math.ceil(seconds) + 500


def test_a_failure_is_told_with_its_job(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    folder = root / "some"
    folder.mkdir(parents=True)
    jobs = [Job("seed 0 good", counting, (3,)), Job("seed 0 bad", breaking, ())]
    with (
        pytest.raises(RuntimeError, match="no such luck"),
        Record(folder / "progress.jsonl", jobs=["seed 0 good", "seed 0 bad"]) as record,
    ):
        run_jobs(jobs, root, 1, Quiet(), keep=record)
    files.save(small_recipe(), folder / "recipe.yaml")
    told = "\n".join(Watched(folder).look())
    assert told.startswith("some: stopped, 1 of 2 jobs done")
    assert "seed 0 bad                   FAILED: no such luck" in told
    assert "it was stopped: no such luck" in told


def talking(word: str, once: Callable[..., Artifact]) -> str:
    """More news than are on their way at the same time."""
    for number in range(20_000):
        engine._queue.put(News(word, "stage", 0, 0, "said", str(number)))
    return word


def test_a_job_ends_after_its_last_news(tmp_path: Path) -> None:
    heard: list[News] = []
    assert run_jobs([Job(w, talking, (w,)) for w in "abc"], tmp_path, 2, Quiet(), keep=heard.append) == list("abc")
    for word in "abc":
        own = [(news.event, news.line) for news in heard if news.job == word]
        assert own == [*(("said", str(number)) for number in range(20_000)), ("finished", "")]


def stopping(folder: Path, once: Callable[..., Artifact]) -> None:
    (folder / "stopped").touch()
    os.kill(os.getpid(), signal.SIGSTOP)


def failing(folder: Path, once: Callable[..., Artifact]) -> None:
    while not (folder / "stopped").exists():
        time.sleep(0.05)
    raise RuntimeError("no such luck")


def test_a_stopped_worker_does_not_hold_up_a_failure(tmp_path: Path) -> None:
    jobs = [Job("stops", stopping, (tmp_path,)), Job("fails", failing, (tmp_path,))]
    with pytest.raises(RuntimeError, match="no such luck"):
        run_jobs(jobs, tmp_path, 2, Quiet())
    assert not multiprocessing.active_children()


def test_workers_of_their_own_tell_too(tmp_path: Path) -> None:
    """Two processes; a failure in one is told with the name of its job."""
    heard: list[News] = []
    jobs = [Job("good", counting, (3,)), Job("bad", breaking, ())]
    with pytest.raises(RuntimeError, match="no such luck"):
        run_jobs(jobs, tmp_path, 2, Quiet(), keep=heard.append)
    assert ("bad", "no such luck") in {(n.job, n.line) for n in heard if n.event == "failed"}
    assert all(n.pid != os.getpid() for n in heard if n.event == "begun")


@pytest.mark.filterwarnings("error")
def test_a_record_that_cannot_be_written_is_said_once_and_harms_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "progress.jsonl").symlink_to(full)
    with Record(tmp_path / "progress.jsonl") as record:
        run_jobs([Job("a", counting, (3,))], tmp_path, 1, Quiet(), keep=record)
    told = capsys.readouterr().err
    assert "No space left" in told
    assert told.count("\n") == 1
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with Record(tmp_path / "no/such/folder/x") as record:
        run_jobs([Job("a", counting, (3,))], tmp_path, 1, Quiet(), keep=record)
    assert "the run goes on" in capsys.readouterr().err


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_machine_of_the_same_name_is_another_one(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").touch()
    elsewhere = this_process(os.getpid()) | {"boot": "another", "ticks": 1}
    assert life(elsewhere, tmp_path / "progress.jsonl", time.time()).lives
    assert not life(elsewhere, tmp_path / "progress.jsonl", time.time() + 3600).lives
    assert not life(this_process(os.getpid()) | {"ticks": 1}, tmp_path / "progress.jsonl", time.time()).lives


def test_a_torn_last_line_is_left_and_the_next_start_begins_a_line(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    with Record(path, jobs=["a"]) as record:
        record(News("a", "train_classifier", 0, 0, "begun", folder=tmp_path / STAGE))
    path.write_bytes(path.read_bytes() + b'{"time": 5.0, "event": "rea')
    with Record(path, jobs=["a"]):
        pass
    events = [line["event"] for line in Tail(path).lines()[1]]
    assert events == ["start", "begun", "complete", "start", "complete"]


# What is read

GARBAGE = st.one_of(
    st.binary(max_size=60),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {"event": st.sampled_from(["start", "asked", "begun", "reached", "made", "said", "failed", "stopped"])},
        optional={
            "time": st.integers() | st.floats() | st.just("noon"),
            "format": st.integers(0, 3) | st.text(max_size=3),
            "pid": st.integers(),
            "host": st.text(max_size=5),
            "jobs": st.lists(st.text(max_size=4) | st.integers(), max_size=3) | st.integers(),
            "job": st.sampled_from(["a", "b", "\x1b[2J", ""]) | st.integers(),
            "stage": st.sampled_from(["train_classifier", "generate"]) | st.integers(),
            "folder": st.sampled_from([STAGE, "stages/../../etc", "/etc"]) | st.integers(),
            "done": st.integers() | st.floats(),
            "total": st.integers(-1, 9) | st.floats(),
            "mb": st.none() | st.floats() | st.text(max_size=3),
            "inputs": st.none() | st.lists(st.none() | st.text(max_size=3), max_size=3),
            "line": st.text(max_size=10) | st.none(),
        },
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(GARBAGE, max_size=12), st.binary(max_size=5))
def test_garbage_is_never_more_than_skipped(tmp_path_factory: pytest.TempPathFactory, given: list, end: bytes) -> None:
    """Any lines in the record and in the journal: good lines count, and no cursor is moved."""
    folder = tmp_path_factory.mktemp("garbage") / "run"
    (folder.parent / STAGE).mkdir(parents=True)
    folder.mkdir()
    (folder / "recipe.yaml").write_text("no: recipe\n")
    good = [{"event": "start", "time": 1e9, "format": 1, "jobs": ["fine"], "pid": 1, "host": "elsewhere"},
            {"event": "begun", "time": 1e9, "job": "fine", "stage": "train_classifier", "folder": STAGE}]  # fmt: skip
    ours = [json.dumps(line).encode() for line in good]
    (folder / "progress.jsonl").write_bytes(b"\n".join([*given, *ours, b""]) + end)
    (folder.parent / STAGE / "log.jsonl").write_bytes(b"\n".join([*given, b'{"step": 3, "loss": 0.5}', b""]) + end)
    told = Watched(folder).look()
    assert all(line.isprintable() for line in told)
    assert any("fine" in line and "train classifier" in line for line in told)
    assert any("loss" in line for line in told)


def test_a_growing_file_is_read_once_and_a_replaced_one_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    assert tail.lines() == (False, [])
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.lines() == (True, [{"step": 1}, {"step": 2}])
    with open(path, "a") as handle:
        handle.write('ep": 3}\n')
    assert tail.lines() == (False, [{"step": 3}])
    (tmp_path / "new").write_text('{"step": 7}\n')
    os.replace(tmp_path / "new", path)
    assert tail.lines() == (True, [{"step": 7}])
    path.unlink()
    assert tail.lines() == (False, [])


def test_bars_by_hand() -> None:
    assert bars([0.0, 7.0]) == "▁█"
    assert bars([3.0] * 5) == BARS[0] * 5
    assert bars([]) == ""
    assert bars([math.nan, 1.0, 2.0]) == "▁█"
    assert bars([-1e308, 1e308]) == "▁█"
    assert bars([float(i) for i in range(64)], 8) == BARS


def test_curves_of_a_resumed_training_are_read_anew(tmp_path: Path) -> None:
    log, curves = tmp_path / "log.jsonl", Curves(tmp_path)
    log.write_text('{"step": 10, "loss": 2.0, "rate": 0.1}\n{"step": 20, "loss": 1.0, "clean": 0.5, "robust": 0.25}\n')
    curves.look()
    assert curves.told() == ["loss █▁ 1", "clean 50.0 % (step 20)", "robust 25.0 % (step 20)"]
    assert curves.told(drawn=False)[0] == "loss 1"
    (tmp_path / "new").write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "loss": NaN}\n')
    os.replace(tmp_path / "new", log)
    curves.look()
    assert curves.told() == ["loss ▁ nan"]


def line(event: str, at: float, job: str = "seed 0 real only", **more) -> dict:
    return {"event": event, "time": at, "job": job, "stage": "train_classifier", "folder": STAGE, **more}


def test_rates_and_time_left_by_hand() -> None:
    """10 steps in 5 s, 70 to go: 35 s, of which 2 have passed; a resumed stage is measured from where it went on."""
    state = State()
    state.fold(
        [line("begun", 90.0), line("reached", 100.0, done=20, total=100), line("reached", 105.0, done=30, total=100)]
    )
    found = state.jobs["seed 0 real only"].stages[STAGE]
    assert found.rate() == pytest.approx(2.0)
    assert found.left(107.0) == pytest.approx(33.0)
    assert found.left(1000.0) == 0.0
    state.fold([line("reached", 305.0, done=130, total=200), line("reached", 306.0, done=1, total=200)])
    assert found.rate() == pytest.approx(1 / (306 - 90))  # its first part took as long as it has been at work


def test_a_stage_that_another_job_makes_is_waited_for(tmp_path: Path) -> None:
    state = State()
    state.fold([line("asked", 1.0), line("begun", 1.0), line("asked", 2.0, "seed 0 + plain diffusion")])
    waiting = state.jobs["seed 0 + plain diffusion"].current
    assert waiting is not None
    assert Story(tmp_path).doing(waiting, state, 3.0) == "waits for train classifier, which seed 0 real only makes"
    state.fold([line("made", 4.0), line("found", 4.0, "seed 0 + plain diffusion")])
    assert state.maker(waiting) is None
    assert "the next stage is prepared" in Story(tmp_path).doing(waiting, state, 5.0)


def recorded(tmp_path: Path, **facts) -> Watched:
    """A run whose record says that it was started an hour ago, and nothing since."""
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    files.save(small_recipe(), folder / "recipe.yaml")
    begun = {"event": "start", "format": 1, "jobs": ["seed 0 real only"], **this_process(os.getpid()), **facts}
    lines = [begun | {"time": time.time() - 3600}, line("begun", time.time() - 3600)]
    (folder / "progress.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return Watched(folder)


def test_what_has_not_moved_for_long_is_said_alive_or_dead(tmp_path: Path) -> None:
    told = "\n".join(recorded(tmp_path).look())
    assert "nothing has moved for 60 min; process" in told
    assert f"process {os.getpid()} on" in told
    assert "lives" in told
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert "is gone" in "\n".join(recorded(tmp_path, pid=ended.pid).look())
    assert "is gone" in "\n".join(recorded(tmp_path, ticks=1).look())  # the number was given to another process


def test_a_process_elsewhere_is_known_by_its_touches(tmp_path: Path) -> None:
    watched = recorded(tmp_path, host="far-away")
    assert "on far-away gave a sign of life" in "\n".join(watched.look())
    os.utime(watched.record.path, (time.time() - 600,) * 2)
    told = "\n".join(watched.look())
    assert "on far-away has given no sign of life for 10 min" in told
    assert "to go on: gambeson run" in told


def test_a_record_of_another_format_is_refused_in_words(tmp_path: Path) -> None:
    told = "\n".join(recorded(tmp_path, format=2, gambeson="9.9").look())
    assert "of format 2" in told
    assert "gambeson 9.9" in told
    (tmp_path / "run/version.json").write_text('{"format": 99, "gambeson": "9.9"}')
    with pytest.raises(UserError, match="format 99"):
        Watched(tmp_path / "run").look()


def test_a_run_without_its_stages_and_one_that_goes_away(tmp_path: Path) -> None:
    watched = recorded(tmp_path)
    assert "its stages are not beside it" in "\n".join(watched.look())
    shutil.rmtree(watched.folder)
    assert "moved or removed" in "\n".join(watched.look())
    files.save(small_recipe(), watched.folder / "recipe.yaml")
    (watched.folder / "recipe.yaml").write_text("not a recipe")
    assert "cannot be read" in "\n".join(Watched(watched.folder).look())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "one run, got nothing"),
        (["a", "b"], "one run, got a b"),
        (["--wrong"], "one run, got --wrong"),
        (["nothing-like-it", "--once"], "unknown run"),
        (["a", "--once", "--tensorboard"], "got both"),
        (["a", "--tensorboard=x"], "port from 1 to 65535"),
        (["a", "--tensorboard", "99999"], "port from 1 to 65535"),
    ],
)
def test_mistakes(words: list[str], expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["watch", "--runs", str(tmp_path), *words])
    assert code == 2
    assert expected in capfd.readouterr().err


def test_tensorboard_missing_and_its_port_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="which is taken"):
            boards.check(taken.getsockname()[1])
    assert boards.check(None) > 1000
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        boards.check(None)


def test_links_have_readable_names(whole: Run, tmp_path: Path) -> None:
    links, watched = boards.Links(tmp_path, whole.folder.parent), Watched(whole.folder)
    watched.look()
    named = list(boards.trainings(watched.record.state, watched.story))
    assert named[0][0] == "seed 0/real only/student"
    assert links.add(named) == 1  # the attack has no curves
    assert list((tmp_path / "seed 0/real only/student").glob("events.out.tfevents.*"))
    assert links.add(named) == 1
    assert ("seed 0/real only/student", named[0][1]) in list(boards.finished_trainings(whole))
    other = boards.Links(tmp_path / "other", whole.folder.parent)
    assert other.add([("../../out/..", named[0][1])]) == 1
    assert all((tmp_path / "other") in p.parents for p in (tmp_path / "other").rglob("*"))


def test_synthetic_images_become_a_picture(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    images = np.random.default_rng(0).integers(0, 256, (25, 8, 8, 1), dtype=np.uint8)
    writer = StoreWriter(root=tmp_path / "runs/stages/generate/00112233/images", blocks=1, blocks_per_shard=1)
    writer.put(0, images, np.arange(25) % 10)
    writer.finish({})
    (tmp_path / "board").mkdir()
    links, named = boards.Links(tmp_path / "board", tmp_path / "runs"), ("seed 0/guided/x", "stages/generate/00112233")
    assert links.add([named, ("seed 0/plain/x", "stages/generate/unfinished")]) == 1
    events = event_accumulator.EventAccumulator(str(tmp_path / "board/seed 0/guided/x")).Reload()
    (drawn,) = events.Images("first images")
    assert (drawn.width, drawn.height) == (10 * 66 + 2, 3 * 66 + 2)


@pytest.mark.slow
def test_tensorboard_shows_the_curves(whole: Run) -> None:
    import urllib.request

    port, watched = boards.check(None), Watched(whole.folder)
    watched.look()
    with boards.served(whole.folder.parent, port) as links:
        assert links.add(boards.trainings(watched.record.state, watched.story)) == 1
        for _ in range(120):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags") as answer:
                tags = json.load(answer)
            if tags:
                break
            time.sleep(0.5)
    (name,) = tags
    assert name == "seed 0/real only/student"
    assert {"loss", "clean", "robust", "rate"} <= set(tags[name])
    assert not links.folder.exists()
    with socket.socket() as closed:
        assert closed.connect_ex(("127.0.0.1", port)) != 0
