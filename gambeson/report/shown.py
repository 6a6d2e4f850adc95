"""The parts of a run's material that take images and networks: each made from the stages that are there, or as kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gambeson import canonical
from gambeson.data.imageset import ImageSet, Split
from gambeson.models.classifiers import load_classifier
from gambeson.models.network import ClassifierNetwork
from gambeson.pipeline import Chapter
from gambeson.recipe import Arm, Recipe
from gambeson.report import exhibits, samples
from gambeson.report.desk import Desk
from gambeson.report.energy import guidance_energy
from gambeson.report.exhibits import Student
from gambeson.report.found import FoundRun
from gambeson.report.material import (
    Adversarial,
    ArmMaterial,
    Confusion,
    FeatureSet,
    Grids,
    GuidanceEnergy,
    SelectionScores,
)
from gambeson.report.samples import Made
from gambeson.robustness.evaluate import spread
from gambeson.store import Artifact
from gambeson.synthesis.generate import Sources

SHOWN = 300
"""Images of each set in the embedding."""
REVISION = "1"
"""Raised when what is shown changes its meaning: kept pieces are then made anew."""


@dataclass(frozen=True)
class Shown:
    """Whoever makes these parts. real: the real images of the run, or `no_images` why they are not there."""

    found: FoundRun
    desk: Desk
    real: ImageSet | None
    no_images: str

    @property
    def recipe(self) -> Recipe:
        """With its threat everywhere."""
        return self.found.recipe.with_threat_everywhere()

    def parts(self, arms: tuple[ArmMaterial, ...]) -> dict[str, Any]:
        """Fields of RunMaterial."""
        students = [(Arm(arm.key), self._students(arm)) for arm in arms]
        return {
            "grids": self._grids(),
            "features": self._features(),
            "adversarial": _there(self._adversarial(*each) for each in students),
            "confusions": _there(self._confusion(*each) for each in students),
            "student_features": _there(self._student_features(arm) for arm in self.recipe.arms),
            "energy": self._energy(),
            "selections": _there(self._selection(arm) for arm in self.recipe.arms if arm is not Arm.REAL),
        }

    def _known(self, chapters: Iterable[Chapter | None], *roles: str, **more: str) -> dict[str, str]:
        """Digests of what a piece is made from: of stages that there are or were, and of files that are there."""
        known = {"revision": REVISION, **more}
        if self.real is not None:
            known["real"] = self.real.digest
        for chapter in (each for each in chapters if each is not None):
            for role in roles:
                made, place = chapter.artifacts.get(role), f"{role} {chapter.arm.value} {chapter.seed}"
                if made is not None:
                    known[place] = made.digest
                if made is not None and made.finished:
                    known[f"files of {place}"] = canonical.digest(made.record["files"])
        return known

    def _piece(
        self, name: str, part: str, known: dict[str, str], why: str, work: Callable[[], Any], arm: Arm | None = None
    ) -> Any:
        """`why`: what it cannot be made for now; empty where it can. arm: whose it is."""
        using = () if why else tuple(known)
        return self.desk.piece(name, part, known, using, work, why, "" if arm is None else arm.title)

    def _lacks(self, chapter: Chapter | None, *roles: str) -> str:
        """Why something cannot be made from these stages of a chapter; empty where all are there."""
        if self.real is None:
            return self.no_images
        done = {} if chapter is None else self.found.finished(chapter)
        gone = [role for role in dict.fromkeys(roles) if role not in done]
        if not gone:
            return ""
        return f"{' and '.join(gone)} {'no longer there, and not kept' if self.found.complete else 'not there yet'}"

    def _students(self, arm: ArmMaterial) -> list[Trained]:
        """The students of an arm that are there and were evaluated, the first seed first; with their rows."""
        if arm.rows is None:
            return []
        mine = [c for c in self.found.chapters if c.arm.value == arm.key and "student" in self.found.finished(c)]
        found = [Trained(c, arm.rows.filter(pc.field("seed") == c.seed)) for c in mine]
        return [one for one in found if one.rows.num_rows]

    def _why_no_student(self, arm: Arm, students: list[Trained]) -> str:
        return self._lacks(self.found.first(arm), "student") or ("" if students else "not evaluated yet")

    def _adversarial(self, arm: Arm, students: list[Trained]) -> Adversarial | None:
        spec, first = self.recipe.evaluation.pgd, self.found.first(arm)
        mine = [one for one in students if one.chapter == first]
        known = self._known([first], "student", "rows", attack=canonical.digest(spec))

        def work() -> Adversarial:
            return exhibits.adversarial(arm.value, spec, mine[0].open(self._test), self._test)

        return self._piece(f"adversarial {arm.value}", "adversarial", known, self._why_no_student(arm, mine), work, arm)

    def _confusion(self, arm: Arm, students: list[Trained]) -> Confusion | None:
        spec = self.recipe.evaluation.pgd
        known = self._known([one.chapter for one in students], "student", "rows", attack=canonical.digest(spec))
        why = self._why_no_student(arm, students)
        if not students:
            every = [c for c in self.found.chapters if c.arm is arm]
            known = self._known(every, "student", "rows", attack=canonical.digest(spec))

        def work() -> Confusion:
            opened = [one.open(self._test) for one in students]
            return exhibits.confusion(arm.value, spec, opened, self._test, len(self._images.class_names))

        return self._piece(f"confusion {arm.value}", "confusions", known, why, work, arm)

    def _student_features(self, arm: Arm) -> FeatureSet | None:
        first = self.found.first(arm)

        def work() -> FeatureSet:
            assert first is not None
            return exhibits.features(arm.title, _classifier(first.artifacts["student"]), self._test)

        known, why = self._known([first], "student"), self._lacks(first, "student")
        return self._piece(f"features of {arm.value}", "student_features", known, why, work, arm)

    def _made(self, arm: Arm, *roles: str) -> Made | None:
        """The synthetic images of an arm's first seed where all these stages are there."""
        first = self.found.first(arm)
        if first is None or self._lacks(first, "synthetic", "labelled", *roles):
            return None
        done = self.found.finished(first)
        return Made(done["synthetic"], done["labelled"], done.get("chosen"))

    def _grids(self) -> Grids | None:
        pair = [self.found.first(arm) for arm in (Arm.PLAIN, Arm.GUIDED)]
        if pair == [None, None]:
            return self._none("grids", "this run has no arm with images of a diffusion model")
        plain, guided = self._made(Arm.PLAIN), self._made(Arm.GUIDED)
        lacks = [self._lacks(c, "synthetic", "labelled") for c in pair if c is not None]
        whole = self._known(pair, "synthetic", "labelled", "chosen")
        why = "; ".join(dict.fromkeys(lack for lack in lacks if lack)) if plain is None and guided is None else ""

        def work() -> Grids:
            assert self.real is not None
            return samples.grids(plain, guided, self.recipe.selection, self.real)

        return self._piece("grids", "grids", whole, why, work)

    def _features(self) -> tuple[FeatureSet, ...]:
        firsts = [first for arm in self.recipe.arms if (first := self.found.first(arm)) is not None]
        teacher = next((c for c in firsts if "teacher" in c.artifacts), None)
        if all(arm is Arm.REAL for arm in self.recipe.arms):
            return self._none("features", "this run has no synthetic images") or ()
        arms = {arm: self._made(arm) for arm in (Arm.PLAIN, Arm.GUIDED)}
        pair = [self.found.first(arm) for arm in arms]
        known = self._known([teacher], "teacher") | self._known(pair, "synthetic", "labelled")
        why = self._lacks(teacher, "teacher")

        def work() -> tuple[FeatureSet, ...]:
            assert teacher is not None
            model, space = _classifier(teacher.artifacts["teacher"]), "standard teacher, penultimate layer"
            made = {arm.value: one for arm, one in arms.items() if one is not None}
            return tuple(_feature_sets(model, space, self._images, made))

        return self._piece("features", "features", known, why, work) or ()

    def _energy(self) -> GuidanceEnergy | None:
        guided, spec = self.found.first(Arm.GUIDED), self.recipe.generation
        if guided is None or spec.guidance is None:
            return self._none("energy", "this run has no guided images")
        roles = [role for role in ("denoiser", "encoder", "embedding") if role in guided.artifacts]
        why = self._lacks(guided, "denoiser", "encoder", *roles)

        def work() -> GuidanceEnergy:
            made = [self.found.finished(guided).get(role) for role in ("denoiser", "encoder", "embedding")]
            assert made[0] is not None
            sources = Sources.of(self._images.without_test(), made[0], made[1], made[2])
            return guidance_energy(spec, sources, guided.seed)

        known = self._known([guided], *roles, generation=canonical.digest(spec))
        return self._piece("energy", "energy", known, why, work)

    def _selection(self, arm: Arm) -> SelectionScores | None:
        first, made = self.found.first(arm), self._made(arm, "chosen")
        known = self._known([first], "synthetic", "labelled", "chosen")
        why = self._lacks(first, "synthetic", "labelled", "chosen")

        def work() -> SelectionScores:
            assert made is not None
            return samples.selection_scores(arm.value, self.recipe.seed, made, self.recipe.selection)

        return self._piece(f"selection {arm.value}", "selections", known, why, work, arm)

    @property
    def _images(self) -> ImageSet:
        assert self.real is not None
        return self.real

    @property
    def _test(self) -> Split:
        return self._images.test

    def _none(self, part: str, why: str) -> None:
        """A part that the run does not have."""
        self.desk.lack(part, why)


@dataclass(frozen=True)
class Trained:
    """A student that is there, with its rows."""

    chapter: Chapter
    rows: pa.Table

    def open(self, test: Split) -> Student:
        """With its network. UserError for rows of other test images."""
        model = _classifier(self.chapter.artifacts["student"])
        return Student(seed=self.chapter.seed, model=model, rows=exhibits.checked(self.rows, test))


def _classifier(made: Artifact) -> ClassifierNetwork:
    return load_classifier(made.file("classifier.safetensors")).to(exhibits.device())


def _feature_sets(model: ClassifierNetwork, space: str, real: ImageSet, made: dict[str, Made]) -> list[FeatureSet]:
    """Real train images, spread over a set in the order of its classes, too; and the first of each arm with a label."""
    some = spread(len(real.train), SHOWN)
    sets = [("real", real.train.images[some], real.train.labels[some].numpy())]
    for name, one in made.items():
        images, labels = samples.some_images(one, SHOWN)
        labelled = np.flatnonzero(labels >= 0)
        sets.append((name, images[labelled], labels[labelled]))
    found = [(name, exhibits.embedded(model, images), labels) for name, images, labels in sets]
    return exhibits.narrowed([FeatureSet(name=n, features=f, labels=k, space=space) for n, f, k in found])


def _there(found: Iterable[Any]) -> tuple[Any, ...]:
    """Those that are there."""
    return tuple(one for one in found if one is not None)
