"""The verdict on a run that is complete, from its own folder: read from its rows, without the networks a page needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import RenderableType
from rich.text import Text

from gambeson.report import verdict
from gambeson.report.chapters import checks_of
from gambeson.report.material import ArmMaterial, CheckRecord, RunMaterial
from gambeson.run import Run


def told(run: Run) -> Iterator[RenderableType]:
    """What `gambeson show` prints: the table, and the verdict in sentences."""
    material = _material(run)
    yield verdict.terminal_table(material)
    yield from (Text(sentence) for sentence in verdict.judge(material).sentences)


def _material(run: Run) -> RunMaterial:
    recipe, rows = run.recipe, pq.read_table(run.folder / "rows.parquet")
    arms = [(arm, rows.filter(pc.field("arm") == arm.value).drop_columns(["arm"])) for arm in recipe.arms]
    return RunMaterial(
        name=run.folder.name,
        title=f"{recipe.name}: robustness from synthetic images",
        recipe_text="",
        digest=recipe.digest,
        threat=str(recipe.threat),
        epsilon=recipe.threat.epsilon,
        class_names=(),
        counts={},
        arms=tuple(ArmMaterial(key=a.value, title=a.title, rows=r if len(r) else None, curves=()) for a, r in arms),
        grids=None,
        features=(),
        stages=(),
        checks=tuple(_checks(run)),
        versions={},
        command="",
        created="",
    )


def _checks(run: Run) -> Iterator[CheckRecord]:
    """What `checks_of` tells of each arm and seed; nothing of those whose stages are damaged or not here."""
    for chapter in run.chapters:
        done = {role: made for role, made in chapter.artifacts.items() if made.finished}
        with contextlib.suppress(OSError):
            yield from checks_of(chapter, done)
