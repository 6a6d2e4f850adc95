"""Which arms of which runs can be compared, their differences, and the intervals when all are counted together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gambeson.report.compare_images import Sameness, same_images
from gambeson.report.compare_material import AUTOATTACK, CLEAN, COLUMNS, WORST, Contender, ContenderArm
from gambeson.report.compare_recipes import differing
from gambeson.report.compare_statistics import difference
from gambeson.report.rows import Cells
from gambeson.report.statistics import Difference

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """An arm of a run beside an arm of the reference run, in one column.

    found: the difference on its own; together: with all differences of the comparison counted (Bonferroni). Both None
    where `reason` says why they are not comparable. same: the classifiers are the same trainings.
    """

    contender: Contender
    arm: ContenderArm
    reference: Contender
    against: ContenderArm
    column: str
    found: Difference | None = None
    together: Difference | None = None
    images: int = 0
    seeds: int = 0  # in common
    same: bool = False
    reason: str = ""

    @property
    def outcome(self) -> str:
        """same, none, above, below (with all counted together), alone above, alone below, level."""
        if self.found is None:
            return "none"
        if self.same:
            return "same"
        for interval, word in ((self.together, ""), (self.found, "alone ")):
            if interval is not None and interval.shown:
                return word + ("above" if interval.estimate > 0 else "below")
        return "level"

    @property
    def title(self) -> str:
        """The arm, and what of the reference it is laid beside where that is another arm."""
        other = "" if self.arm.key == self.against.key else f" against {self.against.title}"
        return self.arm.title + other


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Runs beside a reference run: every pair of arms by column, what sameness of images rests on, how many tests.

    reference: None where nothing was measured in any run.
    """

    contenders: tuple[Contender, ...]
    reference: Contender | None
    pairs: tuple[Pair, ...]
    images: Mapping[int, Sameness]  # by the run's number, against the reference

    @property
    def tests(self) -> int:
        """Differences with an interval, those between the same classifiers left out."""
        return sum(pair.found is not None and not pair.same for pair in self.pairs)

    def of(self, contender: Contender, column: str | None = None) -> list[Pair]:
        """The pairs of a run: in that column, or in the headline's."""
        mine = [p for p in self.pairs if p.contender is contender]
        return [p for p in mine if (p.column == column if column else p.column != CLEAN)]


def compared(contenders: Sequence[Contender]) -> Comparison:
    """The runs beside the first of them that was measured."""
    reference = next((c for c in contenders if c.measured), None)
    if reference is None:
        return Comparison(contenders=tuple(contenders), reference=None, pairs=(), images={})
    others = [c for c in contenders if c is not reference]
    images = {c.number: same_images(c, reference) for c in others}
    pairs = [pair for c in others for pair in _pairs(c, reference, images[c.number])]
    made = Comparison(contenders=tuple(contenders), reference=reference, pairs=tuple(pairs), images=images)
    return replace(made, pairs=tuple(_counted(p, made.tests) for p in pairs)) if made.tests > 1 else made


def _pairs(contender: Contender, reference: Contender, images: Sameness) -> Iterator[Pair]:
    """Every measured arm beside the same one of the reference, or its first one where it has not got it."""
    by_key = {arm.key: arm for arm in reference.measured}
    for arm in contender.measured:
        against = by_key.get(arm.key, reference.measured[0])
        for column in _columns(arm, against):
            pair = Pair(contender=contender, arm=arm, reference=reference, against=against, column=column)
            yield _measured(pair, images)


def _columns(arm: ContenderArm, against: ContenderArm) -> list[str]:
    """The headline column that both have (or one of them), AutoAttack too where both have it, clean."""
    attacked = [column for column in (WORST, AUTOATTACK) if column in arm.measures and column in against.measures]
    return [*(attacked or [arm.headline or against.headline or WORST]), CLEAN]


def _measured(pair: Pair, images: Sameness) -> Pair:
    """The pair with its difference, or with the reason why there is none."""
    reason = why_not(pair, images)
    if reason:
        return replace(pair, reason=reason)
    a, b = _cells(pair)
    found = difference(a, b)
    if found is None:
        return replace(pair, reason=f"fewer than 2 test images in common ({len(a.indices)} and {len(b.indices)})")
    common = [int(s) for s in np.intersect1d(a.seeds, b.seeds)]
    same = bool(common) and _same_students(pair, common)
    return replace(pair, found=found[0], together=found[0], images=found[1], seeds=len(common), same=same)


def _cells(pair: Pair) -> tuple[Cells, Cells]:
    return pair.arm.measures[pair.column].cells, pair.against.measures[pair.column].cells


def _same_students(pair: Pair, seeds: list[int]) -> bool:
    """Whether the classifiers of these seeds are the same trainings, by their digests."""
    one, two = pair.arm.students, pair.against.students
    return all(seed in one and one[seed] == two.get(seed) for seed in seeds)


def why_not(pair: Pair, images: Sameness) -> str:
    """Why two arms cannot be compared in a column; empty where they can."""
    for who, arm in ((pair.contender, pair.arm), (pair.reference, pair.against)):
        if pair.column not in arm.measures:
            return f"{arm.title} of {who.label} was not measured by {COLUMNS[pair.column]}"
    if not images.same:
        return images.why
    return hows_differ(pair.arm.measures[pair.column].how, pair.against.measures[pair.column].how)


def hows_differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """In what two measurements differ, in words; empty where they do not. A revision that is not known differs from
    none."""
    if any(how and all(value is None for value in how.values()) for how in (a, b)):
        return "what attacked one of them is not known: its recipe was changed, and its stages are not beside it"
    threats = [_threat(how) for how in (a, b)]
    if threats[0] != threats[1]:
        return f"the threats differ: {threats[0]} against {threats[1]}"
    unknown = None in (a.get("revision"), b.get("revision"))
    one, two = ({k: v for k, v in how.items() if not (unknown and k == "revision")} for how in (a, b))
    fields = differing([one, two])
    if not fields:
        return ""
    if [field.path for field in fields] == ["revision"]:
        values = " against ".join(fields[0].values)
        return f"the evaluations are of different revisions ({values}): what an attack does was changed between them"
    told = ", ".join(f"{f.path} {f.values[0]} against {f.values[1]}" for f in fields[:3])
    return f"the attacks differ: {told}{', ...' if len(fields) > 3 else ''}"


def _threat(how: Mapping[str, Any]) -> str:
    """The threat inside a measurement, in words; empty for none."""
    if "norm" in how and "epsilon" in how:
        return f"{how['norm']} eps {how['epsilon']:.4g}"
    inside = (_threat(value) for value in how.values() if isinstance(value, Mapping))
    return next((told for told in inside if told), "")


def _counted(pair: Pair, tests: int) -> Pair:
    """The pair with the interval that holds for all of so many tests at once (Bonferroni)."""
    if pair.found is None or pair.same:
        return pair
    found = difference(*_cells(pair), 1 - (1 - CONFIDENCE) / tests)
    return pair if found is None else replace(pair, together=found[0])


@dataclass(frozen=True)
class ClassDifference:
    """One class: its test images, and the difference of each pair on them (None: fewer than 2 images)."""

    name: str
    images: int
    differences: tuple[Difference | None, ...]

    @property
    def size(self) -> float:
        """The largest difference, without its sign."""
        return max((abs(d.estimate) for d in self.differences if d), default=0.0)


def by_class(pairs: Sequence[Pair]) -> list[ClassDifference]:
    """A line for each class, in the order of the classes; none without pairs that can be compared."""
    pairs = [p for p in pairs if p.found is not None and p.arm.labels is not None]
    labels = [p.arm.labels for p in pairs if p.arm.labels is not None]
    if not pairs:
        return []
    names = pairs[0].contender.class_names or pairs[0].reference.class_names
    return [_class(int(k), names, pairs) for k in np.unique(np.concatenate(labels))]


def _class(k: int, names: tuple[str, ...], pairs: Sequence[Pair]) -> ClassDifference:
    found, images = [], 0
    for pair in pairs:
        assert pair.arm.labels is not None
        assert pair.arm.indices is not None
        mine = pair.arm.indices[pair.arm.labels == k]
        a, b = (_only(cells, mine) for cells in _cells(pair))
        images = max(images, len(np.intersect1d(a.indices, b.indices)))
        made = difference(a, b)
        found.append(None if made is None else made[0])
    return ClassDifference(names[k] if k < len(names) else f"class {k}", images, tuple(found))


def _only(cells: Cells, images: np.ndarray) -> Cells:
    """The verdicts on these images alone."""
    chosen = np.isin(cells.indices, images)
    return Cells(cells.seeds, cells.indices[chosen], cells.correct[:, chosen])
