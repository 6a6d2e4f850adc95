"""Minutes rather than seconds (`make slow`): many kills at any moment of a run with two workers; the real recipe."""

import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_story import Quiet, start
from tiny import fingerprints, tiny_recipe

from gambeson import files
from gambeson.recipe import Arm
from gambeson.recipes import named
from gambeson.run import execute

pytestmark = pytest.mark.slow


def test_forty_kills_at_any_moment_of_a_run_with_two_workers(tmp_path: Path) -> None:
    """Kills from start-up to evaluation, whatever is going on; the finished run has the bits of one left alone."""
    recipe = tiny_recipe()
    execute(recipe, tmp_path / "whole", 1, Quiet(), "test")
    files.save(recipe, tmp_path / "recipe.yaml")
    times, runs = random.Random(1), tmp_path / "runs"
    for _ in range(40):
        process = start(tmp_path / "recipe.yaml", runs, workers=2)
        time.sleep(times.uniform(1.0, 5.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = start(tmp_path / "recipe.yaml", runs, workers=2)
    assert last.wait() == 0, last.stderr.read() if last.stderr else ""
    assert fingerprints(runs) == fingerprints(tmp_path / "whole")


def test_the_digits_recipe_trains_students_that_hold(tmp_path: Path) -> None:
    """Two arms of the real recipe: clean and worst-case accuracy well above those of a standard classifier (near 0)."""
    run = execute(replace(named("digits"), arms=(Arm.REAL, Arm.PLAIN)), tmp_path, 2, Quiet(), "test")
    rows = run.rows()
    for arm in ("real", "plain"):
        mine = rows.filter(np.array(rows["arm"].to_pylist()) == arm)
        clean = mine["prediction"].to_numpy() == mine["label"].to_numpy()
        assert len(clean) == 897
        assert clean.mean() > 0.93
        assert 0.70 < np.mean(mine["apgd"].to_pylist()) < 0.9
