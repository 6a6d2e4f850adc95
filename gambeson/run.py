"""A run: its folder, its jobs side by side, its rows, its report; and the list of runs there are.

RUNS/NAME-DIGEST/recipe.yaml    the whole recipe: `gambeson run` on this file repeats the run
RUNS/NAME-DIGEST/run.json       what ran, when, and which finished stages it is made of; written when complete
RUNS/NAME-DIGEST/owner/         which process makes it
RUNS/NAME-DIGEST/progress.jsonl what its jobs did and do, a line per news; not needed once it is complete
RUNS/NAME-DIGEST/rows.parquet   one row per arm, seed and test image
RUNS/NAME-DIGEST/report.html    the page
RUNS/stages/STAGE/DIGEST/       the store that all runs share
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import gambeson
from gambeson import distributed, files
from gambeson.disk import atomic, open_folder, read_json, sweep, write_json
from gambeson.engine import Job, News, Screen, run_jobs
from gambeson.errors import EnvironmentFault, UserError, reading, unknown
from gambeson.machine import Machine, versions
from gambeson.mirror import caught_up, place_of
from gambeson.ownership import own
from gambeson.pipeline import Chapter, check_plan, prepare_denoiser, tell
from gambeson.progress import NAME, Record
from gambeson.recipe import Arm, Recipe, class_table
from gambeson.store import Artifact

FORMAT = 1
STAGE = re.compile(r"stages/\w{1,80}/[0-9a-f]{8,64}")
"""Where a stage lies, from the folder of runs."""


@dataclass(frozen=True)
class Run:
    """A run that is complete."""

    folder: Path
    recipe: Recipe
    facts: dict[str, Any]

    @property
    def chapters(self) -> list[Chapter]:
        """Every arm and seed with its artifacts."""
        return [Chapter(Arm(c["arm"]), c["seed"], artifacts_of(c, self.folder.parent)) for c in self.facts["chapters"]]

    def rows(self) -> pa.Table:
        """One row per arm, seed and test image, read from the stages with their checksums verified."""
        return _all_rows(self.chapters)


def folder_of(recipe: Recipe, root: Path) -> Path:
    """Where a run of this recipe lives."""
    return root / f"{recipe.name}-{recipe.digest[:10]}"


def jobs_of(recipe: Recipe) -> list[Job]:
    """The jobs of a run, the shared denoiser of each seed beside the arms that do not need it."""
    jobs = []
    for seed in range(recipe.seed, recipe.seed + recipe.seeds):
        if {Arm.PLAIN, Arm.GUIDED} & set(recipe.arms):
            jobs.append(Job(f"seed {seed} shared", prepare_denoiser, (recipe, seed)))
        jobs += [Job(f"seed {seed} {arm.title}", tell, (recipe, arm, seed)) for arm in recipe.arms]
    return jobs


def execute(
    recipe: Recipe,
    root: Path,
    workers: int,
    screen: Screen,
    command: str,
    machine: Machine = Machine(),
    take_over: bool = False,
) -> Run:
    """Makes or finishes the run of a recipe below `root`; what is finished is not redone.

    Raises RunTaken where another process makes it; `take_over`: not for one on another machine, which is dead then.
    """
    root = root.resolve()
    check_plan(recipe, recipe.arms)
    folder = folder_of(recipe, root)
    open_folder(folder)
    check_format(folder)
    with own(place_of(folder), command, take_over) as owner:
        started, jobs = _claim(folder, recipe), jobs_of(recipe)
        told = {"command": command, "workers": workers, "device": machine.device, "jobs": [job.name for job in jobs]}
        caught_up(folder / NAME)  # of another machine: its lines stay
        with Record(folder / NAME, **told, gambeson=gambeson.__version__) as record:

            def keep(news: News) -> None:
                record(news)
                owner.watch(news)

            results = run_jobs(jobs, root, workers, screen, machine, keep)
            facts = _facts(recipe, results, root, started, command, workers)
            owner.check()
            _conclude(folder, facts, [r for r in results if isinstance(r, Chapter)])
    return open_run(folder)


def take_part(recipe: Recipe, root: Path, screen: Screen, machine: Machine) -> None:
    """What every process but the first does of a run that several train together (torchrun): the same stages in the
    same order. It trains and evaluates its share, waits for what the first makes alone, and writes and says nothing.
    """
    assert not distributed.leads(), "the first one executes the run"
    check_plan(recipe, recipe.arms)
    run_jobs(jobs_of(recipe), root.resolve(), 1, screen, machine)


def _facts(recipe: Recipe, results: list[Any], root: Path, started: str, command: str, workers: int) -> dict[str, Any]:
    """The record of a run that is complete."""
    chapters = [r for r in results if isinstance(r, Chapter)]
    return {
        "format": FORMAT,
        "recipe_digest": recipe.digest,
        "started": started,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "workers": workers,
        "versions": versions(),
        "chapters": [_chapter_facts(c, root) for c in chapters],
    }


def _conclude(folder: Path, facts: dict[str, Any], chapters: list[Chapter]) -> None:
    """Writes the run's record; one that was made of other stages is kept under another name."""
    path = folder / "run.json"
    if path.exists():
        old = read_json(path)
        if old.get("chapters") == facts["chapters"]:
            return
        os.replace(path, folder / f"run-until-{facts['finished'].replace(':', '')}.json")
    with atomic(folder / "rows.parquet") as temporary:
        pq.write_table(_all_rows(chapters), temporary)
    write_json(path, facts)


def _claim(folder: Path, recipe: Recipe) -> str:
    """When the run was first started; refuses a folder with an edited recipe."""
    sweep(folder)
    path = folder / "version.json"
    if not path.exists():
        started = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(path, {"format": FORMAT, "gambeson": gambeson.__version__, "started": started})
    if not (folder / "recipe.yaml").exists():
        files.save(recipe, folder / "recipe.yaml")
    _check_recipe(folder, files.load(folder / "recipe.yaml", Recipe, class_table()), recipe.digest)
    return read_json(path)["started"]


def _check_recipe(folder: Path, found: Recipe, digest: str) -> None:
    if found.digest != digest:
        raise UserError(
            f"{folder / 'recipe.yaml'}: expected the recipe that the run was made with (digest {digest[:10]}), got an "
            f"edited one ({found.digest[:10]}). Copy the file elsewhere to edit it, and restore this one"
        )


def check_format(folder: Path) -> None:
    """UserError for a run folder of another version."""
    path = folder / "version.json"
    found = read_json(path) if path.exists() else {"format": FORMAT}
    if found.get("format") != FORMAT:
        raise UserError(
            f"{folder}: expected a run folder of format {FORMAT} (gambeson {gambeson.__version__}), got format "
            f"{found.get('format')!r} (gambeson {found.get('gambeson', 'unknown')}). Use that version, or choose "
            "another folder with --runs DIR"
        )


def _chapter_facts(chapter: Chapter, root: Path) -> dict[str, Any]:
    artifacts = {
        role: {"stage": a.stage, "digest": a.digest, "folder": os.path.relpath(a.folder, root)}
        for role, a in chapter.artifacts.items()
    }
    return {"arm": chapter.arm.value, "seed": chapter.seed, "artifacts": artifacts}


def artifacts_of(chapter: Mapping[str, Any], root: Path) -> dict[str, Artifact]:
    """The artifacts, by role, that a run's record names for an arm and seed. EnvironmentFault for one that would lie
    elsewhere than among the stages of `root`: the record may be a stranger's."""
    made = {r: Artifact(a["stage"], a["digest"], root / a["folder"]) for r, a in chapter["artifacts"].items()}
    astray = [a["folder"] for a in chapter["artifacts"].values() if not STAGE.fullmatch(a["folder"])]
    if astray:
        raise EnvironmentFault(f"run.json: expected stages below {root / 'stages'}, got one in {astray[0]!r}")
    return made


def _all_rows(chapters: list[Chapter]) -> pa.Table:
    tables = []
    for chapter in chapters:
        rows = pq.read_table(chapter.artifacts["rows"].file("rows.parquet"))
        tables.append(rows.add_column(0, "arm", pa.array([chapter.arm.value] * len(rows))))
    return pa.concat_tables(tables)


def open_run(folder: Path) -> Run:
    """A complete run. Raises UserError for a folder that is none, is incomplete, or came from another version."""
    with reading(folder):
        return _opened(folder)


def _opened(folder: Path) -> Run:
    check_format(folder)
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder}: expected a run folder (with recipe.yaml), found none; `gambeson runs` lists them")
    if not (folder / "run.json").exists():
        raise UserError(
            f"{folder}: this run is not complete. Start `gambeson run {folder / 'recipe.yaml'}` again: it resumes"
        )
    facts = read_json(folder / "run.json")
    if facts.get("format") != FORMAT or not {"recipe_digest", "chapters", "started", "versions"} <= facts.keys():
        raise UserError(f"{folder / 'run.json'}: expected the record of a run of format {FORMAT}, got something else")
    recipe = files.load(folder / "recipe.yaml", Recipe, class_table())
    _check_recipe(folder, recipe, facts["recipe_digest"])
    run = Run(folder, recipe, facts)
    if not run.chapters:
        raise EnvironmentFault(f"{folder / 'run.json'}: expected the arms of a run, got none")
    return run


def list_runs(root: Path) -> list[Path]:
    """The run folders below `root`, complete or not, by name."""
    return sorted(p.parent for p in root.glob("*/recipe.yaml"))


def find_run(word: str, root: Path) -> Path:
    """The run folder of that path, name, or beginning of a name. Raises UserError listing those there are."""
    if (Path(word) / "recipe.yaml").exists():
        return Path(word)
    known = {p.name: p for p in list_runs(root)}
    matches = [name for name in known if name.startswith(word)]
    if len(matches) != 1:
        raise unknown("run", word, matches or known)
    return known[matches[0]]
