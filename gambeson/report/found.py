"""The stages of a run that are there: of a finished run by its record, of an unfinished one by the digests they have.

The story of an unfinished run is told to somebody who makes nothing and only looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gambeson import files
from gambeson.data.imageset import ImageSet
from gambeson.disk import read_json
from gambeson.errors import UserError
from gambeson.mirror import brought
from gambeson.pipeline import Chapter, tell
from gambeson.recipe import Arm, Recipe, class_table
from gambeson.run import Run, check_format, open_run
from gambeson.store import Artifact, Store

UNFINISHED = "the run is not finished: the same `gambeson run` goes on with it"
UNREADABLE = (OSError, ValueError, ImportError, MemoryError)
"""What reading images, or weights from elsewhere, may raise."""


@dataclass(frozen=True)
class FoundRun:
    """A run folder, and every arm and seed with the artifacts it has or will have.

    facts: run.json of a finished run; `started` alone otherwise.
    """

    folder: Path
    recipe: Recipe
    chapters: tuple[Chapter, ...]
    facts: Mapping[str, Any]
    complete: bool

    def finished(self, chapter: Chapter) -> dict[str, Artifact]:
        """The artifacts of a chapter that can be read, by role."""
        return {role: made for role, made in chapter.artifacts.items() if made.finished}

    @property
    def moved(self) -> str:
        """Why stages of a finished run cannot be read, in words; empty where all of them are there."""
        if not self.complete:
            return ""
        gone = [(c, role) for c in self.chapters for role, made in c.artifacts.items() if not made.finished]
        if not gone:
            return ""
        place = self.folder.parent / "stages"
        if len(gone) == sum(len(c.artifacts) for c in self.chapters):
            return f"The run's stages are not at {place}: its folder was moved, or they were removed."
        roles = ", ".join(dict.fromkeys(f"{role} ({c.arm.title})" for c, role in gone))
        return f"Some of the run's stages are no longer at {place}: {roles}."

    def first(self, arm: Arm) -> Chapter | None:
        """The chapter of an arm with the recipe's first seed."""
        return next((c for c in self.chapters if c.arm is arm and c.seed == self.recipe.seed), None)


def find(folder: Path) -> FoundRun:
    """What there is of a run. Raises UserError for a folder that is none, or of another version, or edited."""
    if (folder / "run.json").exists():
        return of_run(open_run(folder))
    version = _version(folder)
    recipe = files.load(folder / "recipe.yaml", Recipe, class_table())
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    real = _images(recipe)
    chapters = tuple(look(recipe, arm, seed, folder.parent, real) for arm in recipe.arms for seed in seeds)
    return FoundRun(folder, recipe, chapters, version, complete=False)


def _version(folder: Path) -> dict[str, Any]:
    """Who began an unfinished run, and when. UserError for no run folder, and for one of another version."""
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder}: expected a run folder (with recipe.yaml), found none; `gambeson runs` lists them")
    check_format(folder)
    path = folder / "version.json"
    return read_json(path) if path.exists() else {}


def of_run(run: Run) -> FoundRun:
    """A finished run; its stages are fetched where they lie in an object store."""
    chapters = tuple(run.chapters)
    for made in {made.folder: made for chapter in chapters for made in chapter.artifacts.values()}.values():
        brought(made.folder)
    return FoundRun(run.folder, run.recipe, chapters, run.facts, complete=True)


def _images(recipe: Recipe) -> ImageSet | None:
    """The real images, read once for the whole story; None where they cannot be read."""
    try:
        return recipe.data.load()
    except UNREADABLE:
        return None


def look(recipe: Recipe, arm: Arm, seed: int, root: Path, real: ImageSet | None) -> Chapter:
    """The artifacts that an arm of a seed has or will have, as far as they can be foretold from what is there.

    None of them without the real images.
    """
    bare = replace(recipe, assessment=None)
    chapter = _told(bare, arm, seed, root, real)
    student = chapter.artifacts.get("student")
    if recipe.assessment is None or student is None or not student.finished:
        return chapter  # what AutoAttack is asked about is the content of a student that is not there yet
    whole = _told(recipe, arm, seed, root, real)
    return whole if whole.artifacts else chapter


def _told(recipe: Recipe, arm: Arm, seed: int, root: Path, real: ImageSet | None) -> Chapter:
    """The story without making anything; nothing of it where its images or weights from elsewhere cannot be read."""
    if real is None:
        return Chapter(arm, seed, {})
    try:
        return tell(recipe, arm, seed, Store(root).sought, real)
    except UNREADABLE:
        return Chapter(arm, seed, {})
