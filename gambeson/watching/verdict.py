"""The verdict on a run that is complete, from its own folder: read from its rows, without the networks a page needs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import RenderableType
from rich.text import Text

from gambeson.report import verdict
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
    """The checks that the stages kept, and whether each was made in one environment; none where they are not here."""
    for chapter in run.chapters:
        where, mixed = {"arm": chapter.arm.value, "seed": chapter.seed}, list[str]()
        for role, artifact in chapter.artifacts.items():
            with contextlib.suppress(OSError):
                if role in ("rows", "autoattack"):
                    found = json.loads((artifact.folder / "checks.json").read_text(encoding="utf-8"))
                    yield from (CheckRecord(**where, **each) for each in found)
                mixed += [] if artifact.record["bit_identical"] else [role]
        detail = f"resumed with another torch, thread count or device: {', '.join(mixed) or 'none'}"
        yield CheckRecord(**where, name="repeatable to the bit", passed=not mixed, detail=detail)
