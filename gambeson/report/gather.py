"""Collects what the page of a run needs: of a finished run, an unfinished one, and one moved away from its stages.

What takes networks is made once and kept in the run folder (`keeping`), piece by piece with the digests of what it was
made from; a piece whose stages are gone is told from there, and what is neither there nor kept is said to be missing.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gambeson import canonical
from gambeson.data.imageset import ImageSet
from gambeson.errors import EnvironmentFault
from gambeson.pipeline import Chapter
from gambeson.recipe import Arm, Recipe
from gambeson.report import keeping
from gambeson.report.chapters import Told, rows_of, tell_of
from gambeson.report.desk import Desk
from gambeson.report.exhibits import words
from gambeson.report.found import UNFINISHED, FoundRun, find, of_run
from gambeson.report.material import ArmMaterial, RunMaterial, StageRecord
from gambeson.report.shown import Shown
from gambeson.run import Run


def gather(run: Run, make: bool = True) -> RunMaterial:
    """Everything that the page of a finished run shows. make: what takes networks is made now where it is not kept.

    EnvironmentFault, naming the file, where rows are damaged.
    """
    return Gathering(of_run(run), make).material()


def gather_folder(folder: Path, make: bool = True) -> RunMaterial:
    """The same of any run folder: unfinished, or moved away from its stages. UserError for a folder that is none."""
    return Gathering(find(folder), make).material()


class Gathering:
    """One run's material as it comes together."""

    def __init__(self, found: FoundRun, make: bool) -> None:
        old = keeping.load(found.folder)
        self.found, self.make = found, make
        self.desk = Desk({} if old is None else old.pieces, make)

    def material(self) -> RunMaterial:
        """All of it; with `make` kept for the next time."""
        whole = self._whole()
        if self.make:
            with suppress(EnvironmentFault):  # a folder that nobody may write to is told of all the same
                keeping.keep(self.found.folder, whole, self.desk.pieces)
        return whole

    def _whole(self) -> RunMaterial:
        recipe, folder, facts = self.found.recipe, self.found.folder, self.found.facts
        told = {(c.arm, c.seed): self._told(c) for c in self.found.chapters}
        arms = tuple(self._arm(arm, told) for arm in recipe.arms)
        names, counts = self._data(arms)
        parts = Shown(self.found, self.desk, self.real, self._why_no_images()).parts(arms)
        if not self.found.complete:
            self.desk.lack("run", UNFINISHED)
        return RunMaterial(
            name=folder.resolve().name,
            title=f"{recipe.name}: robustness from synthetic images",
            recipe_text=(folder / "recipe.yaml").read_text(encoding="utf-8"),
            digest=recipe.digest,
            threat=str(recipe.threat),
            epsilon=recipe.threat.epsilon,
            class_names=names,
            counts=counts,
            arms=arms,
            stages=_stages(told),
            checks=tuple(check for one in told.values() for check in one.get("checks", ())),
            autoattack=tuple(one["autoattack"] for one in told.values() if "autoattack" in one),
            versions=facts.get("versions", {}),
            command=facts.get("command", f"gambeson run {folder / 'recipe.yaml'}"),
            created=facts.get("finished", ""),
            attacks=_attacks(recipe, len(names), counts.get("test")),
            synthetic={arm.value: n for arm in recipe.arms if (n := _agreed(told, arm, "synthetic")) is not None},
            licences=_licences(told),
            missing=self.desk.missing,
            moved=self.found.moved,
            **parts,
        )

    @cached_property
    def _loaded(self) -> tuple[ImageSet | None, str]:
        """The real images, or why they cannot be shown."""
        try:
            real = self.found.recipe.data.load()
        except (OSError, ValueError, ImportError, MemoryError) as error:
            return None, f"the real images cannot be read: {str(error) or type(error).__name__}"
        recorded = self._recorded()
        if recorded is not None and recorded != real.digest:
            return None, "the real images are others now than those that the run was made with"
        return real, ""

    @property
    def real(self) -> ImageSet | None:
        """The real images that the run was made with, where they are there."""
        return self._loaded[0]

    def _why_no_images(self) -> str:
        return self._loaded[1]

    def _recorded(self) -> str | None:
        """The digest of the real images that the run was made with, by a stage or by what was kept."""
        for chapter in self.found.chapters:
            student = self.found.finished(chapter).get("student")
            if student is not None:
                return student.record["inputs"][0]
        kept = self.desk.kept("data", self._data_spec())
        return None if kept is None else kept.value["digest"]

    def _data_spec(self) -> dict[str, str]:
        return {"data": canonical.digest(self.found.recipe.data)}

    def _data(self, arms: tuple[ArmMaterial, ...]) -> tuple[tuple[str, ...], dict[str, int]]:
        """Names of the classes, numbers of images: of the images, as kept, or as far as the rows tell."""
        real, spec = self.real, self._data_spec()
        if real is not None:
            counts = {"train": len(real.train), "validation": len(real.validation), "test": len(real.test)}
            told = {"class_names": real.class_names, "counts": counts, "digest": real.digest}
            self.desk.add("data", spec, told)
            return real.class_names, counts
        kept = self.desk.kept("data", spec)
        if kept is not None:
            self.desk.pieces["data"] = kept
            return kept.value["class_names"], kept.value["counts"]
        self.desk.lack("class_names", self._why_no_images())
        return _numbered(arms)

    def _told(self, chapter: Chapter) -> Told:
        """What a chapter says; as kept where stages of it have gone since."""
        name, done = f"chapter {chapter.arm.value} {chapter.seed}", self.found.finished(chapter)
        kept = self.desk.kept(name, {role: made.digest for role, made in chapter.artifacts.items()}, done)
        if kept is not None and len(kept.made_of) > len(done):
            self.desk.pieces[name] = kept
            return kept.value
        if not done:
            return {}
        told = tell_of(chapter, done, self.found.facts.get("started", ""), with_rows=not self.found.complete)
        self.desk.add(name, {role: made.digest for role, made in done.items()}, told)
        return told

    def _arm(self, arm: Arm, told: dict[tuple[Arm, int], Told]) -> ArmMaterial:
        """An arm with the rows and curves of all its seeds that there are."""
        mine = [one for (each, _), one in told.items() if each is arm]
        curves = tuple(one["curve"] for one in mine if "curve" in one)
        rows, key, title = self._rows(arm, mine), arm.value, arm.title
        try:
            return ArmMaterial(key=key, title=title, rows=rows, curves=curves)
        except ValueError as error:
            self.desk.lack("arms", str(error))
            return ArmMaterial(key=key, title=title, curves=curves)

    def _rows(self, arm: Arm, mine: list[Told]) -> pa.Table | None:
        """Rows of all seeds: from the stages with their checksums compared, else as the run folder has them."""
        chapters = [c for c in self.found.chapters if c.arm is arm]
        made = [self.found.finished(c).get("rows") for c in chapters]
        if self.found.complete and None not in made:
            return _joined([rows_of(rows) for rows in made if rows is not None])
        if self.found.complete:
            return self._shared_rows.get(arm.value)
        found = [one["rows"] for one in mine if "rows" in one]
        if len(found) < self.found.recipe.seeds:
            unread = (
                "" if self.real is not None else f"which of its seeds are evaluated is not known: {self._loaded[1]}"
            )
            told = unread or f"{len(found)} of {self.found.recipe.seeds} seeds are evaluated"
            self.desk.lack("arms", told, arm.title)
        return _joined(found)

    @cached_property
    def _shared_rows(self) -> dict[str, pa.Table]:
        """Rows by arm of the run folder's own rows.parquet."""
        try:
            return keeping.rows_by_arm(self.found.folder / "rows.parquet")
        except (OSError, ValueError, KeyError) as error:
            self.desk.lack("arms", f"rows.parquet of the run cannot be read: {error}")
            return {}


def _joined(tables: list[pa.Table]) -> pa.Table | None:
    return pa.concat_tables(tables) if tables else None


def _numbered(arms: tuple[ArmMaterial, ...]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Classes by number and the number of test images, as far as rows tell."""
    rows = next((arm.rows for arm in arms if arm.rows is not None), None)
    if rows is None:
        return (), {}
    most = max(int(np.max(arm.rows[c].to_numpy())) for arm in arms if arm.rows for c in ("label", "prediction"))
    return tuple(map(str, range(most + 1))), {"test": len(rows["index"].unique())}


def _agreed(told: dict[tuple[Arm, int], Told], arm: Arm, name: str) -> Any:
    """What all seeds of an arm tell; None where they differ or none tells it."""
    found = {one[name] for (each, _), one in told.items() if each is arm and name in one}
    return found.pop() if len(found) == 1 else None


def _stages(told: dict[tuple[Arm, int], Told]) -> tuple[StageRecord, ...]:
    """Each stage once, under the arm that named it first."""
    seen: dict[str, StageRecord] = {}
    for one in told.values():
        for digest, record in one.get("stages", {}).items():
            seen.setdefault(digest, record)
    return tuple(seen.values())


def _licences(told: dict[tuple[Arm, int], Told]) -> dict[str, str]:
    """The terms that artifacts came with; of one role with several, each once."""
    found: dict[str, list[str]] = {}
    for one in told.values():
        for role, terms in one.get("licences", {}).items():
            if terms not in found.setdefault(role, []):
                found[role].append(terms)
    return {role: " / ".join(terms) for role, terms in found.items()}


def _attacks(recipe: Recipe, classes: int, test: int | None) -> dict[str, str]:
    """What the columns are of, with the numbers that there were: no more targets than classes, or images than test."""
    e = recipe.evaluation
    most = e.targeted.targets
    every = most is None or most >= classes - 1 > 0
    towards = "every other class" if every else f"each of the {most} most likely other classes"
    looked = min(e.curve_images, test) if test else e.curve_images
    return {
        "pgd": words(e.pgd).removeprefix("PGD, "),
        "apgd": f"APGD-CE ({e.apgd.steps} steps), then targeted APGD ({e.targeted.steps} steps for {towards})",
        "curve": f"PGD with {e.curve_attack.steps} steps on {looked} test images",
    }
