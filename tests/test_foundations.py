"""Seeds and streams, the threat model's geometry, the store of stages."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gambeson import randomness
from gambeson.errors import EnvironmentFault, UserError, reading
from gambeson.robustness.attack_losses import CrossEntropy
from gambeson.store import Store, Workspace, stage
from gambeson.threat import ThreatModel

IMAGES = torch.linspace(0, 1, 6 * 2 * 9).reshape(6, 2, 3, 3)
LABELS = torch.arange(6)


def test_seeds_are_the_same_in_any_process() -> None:
    code = "from gambeson.randomness import derive; print(derive(3, 'block', 7), derive(3, 'block', '7'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [int(o) for o in other] == [randomness.derive(3, "block", 7), randomness.derive(3, "block", "7")]
    assert other[0] != other[1]


def test_block_noise_depends_on_seed_and_block_alone() -> None:
    first = randomness.block_noise(1, 5, (4, 1, 2, 2))
    torch.rand(100, generator=randomness.block_generator(1, 4))
    assert torch.equal(first, randomness.block_noise(1, 5, (4, 1, 2, 2)))
    assert not torch.equal(first, randomness.block_noise(1, 6, (4, 1, 2, 2)))
    assert not torch.equal(first, randomness.block_noise(2, 5, (4, 1, 2, 2)))


def test_an_image_keeps_its_stream_in_any_batch() -> None:
    keys = randomness.image_keys(IMAGES, LABELS, seed=4)
    order = torch.tensor([4, 0, 3])
    assert torch.equal(randomness.image_keys(IMAGES[order], LABELS[order], seed=4), keys[order])
    assert len({*keys.tolist(), *randomness.image_keys(IMAGES, LABELS + 1, seed=4).tolist()}) == 12
    together, alone = randomness.uniform(keys, "start", (2, 3)), randomness.uniform(keys[2:3], "start", (2, 3))
    assert torch.equal(together[2:3], alone)


@pytest.mark.parametrize(("draw", "mean", "variance"), [("uniform", 0.5, 1 / 12), ("normal", 0.0, 1.0)])
def test_streams_have_the_moments_of_their_law(draw: str, mean: float, variance: float) -> None:
    x = getattr(randomness, draw)(torch.arange(20_000), "moments", (20,))
    assert x.mean().item() == pytest.approx(mean, abs=5 * (variance / x.numel()) ** 0.5)
    assert x.var().item() == pytest.approx(variance, rel=0.01)
    assert torch.corrcoef(x.T).fill_diagonal_(0).abs().max() < 0.04
    again = getattr(randomness, draw)(torch.arange(20_000), "moments", (20,), counter=1)
    assert torch.corrcoef(torch.stack([x.flatten(), again.flatten()]))[0, 1].abs() < 0.01


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["linf", "l2"]), st.floats(0.01, 2.0), st.integers(0, 10_000))
def test_projection_is_idempotent_and_inside(norm: str, epsilon: float, seed: int) -> None:
    threat = ThreatModel(norm=norm, epsilon=epsilon)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    origin, far = torch.rand(3, 1, 2, 2, generator=g), 3 * torch.randn(3, 1, 2, 2, generator=g)
    inside = threat.project(far, origin)
    assert (threat.distance(inside, origin) <= epsilon * (1 + 1e-5)).all()
    assert inside.min() >= 0
    assert inside.max() <= 1
    assert torch.allclose(threat.project(inside, origin), inside, atol=1e-6)
    start = threat.random(origin, torch.rand(3, 1, 2, 2, generator=g))
    assert (threat.distance(start, origin) <= epsilon * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steepest_step_attains_the_dual_norm(norm: str) -> None:
    g = torch.tensor([[[[3.0, -4.0], [0.0, 12.0]]]])
    step = ThreatModel(norm=norm, epsilon=0.1).steepest(g)  # type: ignore[arg-type]
    assert (step * g).sum().item() == pytest.approx({"linf": 19.0, "l2": 13.0}[norm])


def test_linf_projection_by_hand() -> None:
    threat = ThreatModel(epsilon=0.25)
    x, origin = torch.tensor([[-1.0, 0.6, 0.9]]), torch.tensor([[0.1, 0.5, 0.5]])
    assert threat.project(x, origin).tolist() == [[0.0, pytest.approx(0.6), 0.75]]


@pytest.mark.parametrize("bad", ["linf", "linf:", "linf:0", "l3:0.1", "linf:-1", "linf:1/0", "linf:nan"])
def test_a_bad_threat_says_what_was_expected(bad: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        ThreatModel.parse(bad)
    assert ThreatModel.parse("linf:8/255") == ThreatModel(epsilon=8 / 255)


@stage(revision=1)
def count_up(work: Workspace, config: int, *, seed: int) -> None:
    """A stage that leaves a trace of every time it runs."""
    with open(work.folder.parent / "runs.txt", "a") as log:
        log.write("x")
    (work.folder / "number.txt").write_text(str(config + seed))


def _in_a_process(root: Path) -> None:
    Store(root).once(count_up, 1, seed=2)


def test_a_stage_runs_once_even_for_several_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_in_a_process, args=(tmp_path,)) for _ in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    artifact = Store(tmp_path).once(count_up, 1, seed=2)
    assert artifact.file("number.txt").read_text() == "3"
    assert (tmp_path / "stages/count_up/runs.txt").read_text() == "x"
    assert Store(tmp_path).once(count_up, 1, seed=3).digest != artifact.digest


def test_a_stage_that_failed_is_not_finished(tmp_path: Path) -> None:
    @stage(revision=1)
    def breaks(work: Workspace, config: int) -> None:
        (work.folder / "half.txt").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Store(tmp_path).once(breaks, 1)
    assert not list(tmp_path.rglob("done.json"))


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    artifact = Store(tmp_path).once(count_up, 1, seed=2)
    (artifact.folder / "number.txt").write_text("4")
    with pytest.raises(EnvironmentFault, match=r"number\.txt: expected SHA-256"):
        artifact.file("number.txt")
    record = json.loads((artifact.folder / "done.json").read_text())
    assert record["execution"]["threads"] == 1
    assert record["bit_identical"] is True
    assert record["peak_mb"] > 1


def test_time_spent_before_a_kill_counts_and_its_leftovers_go(tmp_path: Path) -> None:
    @stage(revision=1)
    def works_half(work: Workspace, config: int) -> None:
        if not (work.folder / "half.txt").exists():
            (work.folder / f".other.txt.{os.getpid()}.part").write_text("a living process's")
            (work.folder / ".half.txt.999999999.part").write_text("a dead process's")
            time.sleep(0.3)
            (work.folder / "half.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).once(works_half, 1)
    artifact = Store(tmp_path).once(works_half, 1)
    assert artifact.record["attempts"] == 2
    assert 0.25 < artifact.record["seconds"] < 2
    assert len(list(artifact.folder.glob(".*.part"))) == 1


def test_what_a_killed_worker_left_goes_when_the_others_are_done(tmp_path: Path) -> None:
    @stage(revision=1)
    def loses_a_worker(work: Workspace, config: int) -> None:
        (work.folder / "shards").mkdir()
        (work.folder / "shards" / ".00000.parquet.0f.999999999.part").write_text("a dead process's")

    assert not list(Store(tmp_path).once(loses_a_worker, 1).folder.rglob("*.part"))


def test_damaged_json_is_named(tmp_path: Path) -> None:
    artifact = Store(tmp_path).once(count_up, 1, seed=2)
    (artifact.folder / "done.json").write_text('{"half')
    with pytest.raises(EnvironmentFault, match=r"done\.json: expected JSON"):
        artifact.file("number.txt")


def test_no_permission_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(EnvironmentFault, match="--runs"):
        Store(tmp_path / "file").once(count_up, 1, seed=0)


@pytest.mark.parametrize("error", [KeyError("clean"), TypeError("a text"), RecursionError("deep"), IndexError(3)])
def test_what_is_wrong_with_records_is_told_as_the_folders(error: Exception) -> None:
    told = rf"runs/x: expected what gambeson wrote.*{type(error).__name__}"
    with pytest.raises(EnvironmentFault, match=told), reading("runs/x"):
        raise error


@pytest.mark.parametrize(
    "error",
    [UserError("his"), OSError("disk"), MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("a bug")],
)
def test_what_is_not_wrong_with_records_passes_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, reading("runs/x"):
        raise error
    assert caught.value is error


def test_calls_with_other_shapes_and_types_are_caught_here() -> None:
    """What the tests lean on: wrong types, wrong numbers of axes, and sizes that do not agree with one another."""
    loss, logits = CrossEntropy(), torch.zeros(5, 10)
    assert loss(logits, LABELS[:5]).shape == (5,)
    for wrong in (LABELS, LABELS[:5, None], torch.zeros(5)):
        with pytest.raises(TypeError, match="labels"):
            loss(logits, wrong)
    with pytest.raises(TypeError, match="epsilon"):
        ThreatModel(epsilon="0.1")  # type: ignore[arg-type]
