"""One self-contained page that compares runs: no network, no script, every string from data escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gambeson.disk import atomic
from gambeson.report import compare_words as words
from gambeson.report.compare_charts import Line, lines_of, robustness, training
from gambeson.report.compare_material import CLEAN, COLUMNS, Contender, ContenderArm
from gambeson.report.compare_pairs import Comparison, Pair, by_class
from gambeson.report.compare_recipes import Field, differing, shortened
from gambeson.report.page import Bar, environment
from gambeson.report.statistics import Difference, Interval

MARK = "gambeson compare"
"""What the page says it was made by, so that a later one may replace it."""
MOST_CLASSES = 20
"""Classes whose differences are shown."""
FIRST_FIELDS, MOST_FIELDS = 30, 200
"""Fields of recipes that are shown at once, and that are shown at all."""
SIDE_BY_SIDE = 4
"""Runs up to which each has a column of its own."""
STORY = ("denoiser", "teacher", "encoder", "embedding", "synthetic", "labelled", "chosen", "student", "rows")
"""Roles of stages in the order of the story."""
LOUD = 8
"""Failing checks that are named at the top of the page."""


@dataclass(frozen=True)
class ScoreLine:
    """An arm in the table of accuracies."""

    arm: ContenderArm
    scores: list[Interval | None]
    gain: Difference | None


@dataclass(frozen=True)
class PairLine:
    """An arm beside one of the reference run: under attack and clean, with the bar of the interval under attack."""

    attacked: Pair
    clean: Pair | None
    bar: Bar | None
    barred: str = ""  # why nothing of the whole run can be compared


@dataclass(frozen=True)
class Failure:
    """A check that failed, with all arms and seeds of a run that it failed for."""

    contender: Contender
    name: str
    where: list[str]
    detail: str


@dataclass(frozen=True)
class Cost:
    """What a role in the story cost one run."""

    seconds: float
    peak_mb: float
    runs: int


def render(comparison: Comparison) -> str:
    """The whole page as HTML text. What is missing or cannot be compared is said."""
    contenders = comparison.contenders
    columns = words.shown_columns(comparison)
    lines = lines_of(contenders)
    classes, fields = by_class(_class_pairs(comparison)), _fields(contenders)
    return environment().get_template("compare.html.j2").render(
        mark=MARK,
        title=words.title(comparison),
        comparison=comparison,
        runs=contenders,
        sentences=words.sentences(comparison),
        caution=words.caution(comparison),
        columns=[COLUMNS[column] for column in columns],
        scores={c.number: _scores(c, columns) for c in contenders},
        pairs={c.number: _pair_lines(comparison, c) for c in contenders},
        outcomes=words.OUTCOMES,
        names=words.NAMES,
        failures=_failures(contenders),
        loud=LOUD,
        unchecked=[c for c in contenders if c.measured and not c.checked],
        check_lines=_check_lines(contenders),
        lines=lines,
        robustness=robustness(lines),
        curves=_curve_table(lines),
        training=training(lines),
        ends=_ends(lines),
        fields=fields[:FIRST_FIELDS],
        more_fields=fields[FIRST_FIELDS:MOST_FIELDS],
        left_out=max(len(fields) - MOST_FIELDS, 0),
        facts=_facts(contenders),
        side_by_side=len(contenders) <= SIDE_BY_SIDE,
        classes=sorted(classes, key=lambda c: -c.size)[:MOST_CLASSES],
        all_classes=len(classes),
        class_pairs=_class_pairs(comparison),
        costs=_costs(contenders),
        shortened=shortened,
    )  # fmt: skip


def write(comparison: Comparison, path: Path) -> Path:
    """Renders into `path`, whole or not at all. Raises EnvironmentFault where nothing may be written."""
    text = render(comparison)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def is_ours(path: Path) -> bool:
    """Whether a file is a page of a comparison."""
    with open(path, "rb") as file:
        return f'content="{MARK}"'.encode() in file.read(2000)


def _scores(contender: Contender, columns: Sequence[str]) -> list[ScoreLine]:
    return [
        ScoreLine(arm, [words.score(arm, column) for column in columns], words.gain(contender, arm))
        for arm in contender.arms
    ]


def _pair_lines(comparison: Comparison, contender: Contender) -> list[PairLine]:
    """The pairs of a run under attack, each with its clean one; bars of the whole page on one scale."""
    clean = {pair.arm.key: pair for pair in comparison.of(contender, CLEAN)}
    reach, all_of = _reach(comparison), [*comparison.of(contender), *clean.values()]
    reasons = {pair.reason for pair in all_of}
    if len(reasons) == 1 and "" not in reasons:
        return [PairLine(all_of[0], None, None, reasons.pop())]
    return [PairLine(pair, clean.pop(pair.arm.key, None), _bar(pair, reach)) for pair in comparison.of(contender)]


def _reach(comparison: Comparison) -> float:
    ends = [abs(end) for p in comparison.pairs if p.together and p.column != CLEAN
            for end in (p.together.low, p.together.high)]  # fmt: skip
    return max([0.01, *ends])


def _bar(pair: Pair, reach: float) -> Bar | None:
    """The interval on its own, drawn as shown where it holds with all counted together."""
    if pair.found is None or pair.same:
        return None
    low, high = pair.found.low / reach, pair.found.high / reach
    shown = pair.outcome in ("above", "below")
    return Bar(50 + 50 * low, 50 * (high - low), 50 + 50 * pair.found.estimate / reach, shown)


def _fields(contenders: Sequence[Contender]) -> list[Field]:
    """The fields of the recipes that differ."""
    partial = [place for place, c in enumerate(contenders) if c.recipe is None]
    return differing([c.tree for c in contenders], partial)


def _failures(contenders: Sequence[Contender]) -> list[Failure]:
    """Failing checks by run and name."""
    found: dict[tuple[int, str], Failure] = {}
    for contender in contenders:
        for check in contender.failures:
            key = (contender.number, check.name)
            made = found.setdefault(key, Failure(contender, check.name, [], check.detail))
            made.where.append(f"{check.arm}, seed {check.seed}")
    return list(found.values())


def _check_lines(contenders: Sequence[Contender]) -> list[tuple[str, list[str]]]:
    """Each check by name, and how many of each run's passed."""
    names = dict.fromkeys(check.name for c in contenders for check in c.checks)
    return [(name, [_passed(c, name) for c in contenders]) for name in names]


def _passed(contender: Contender, name: str) -> str:
    mine = [check.passed for check in contender.checks if check.name == name]
    return f"{sum(mine)} of {len(mine)}" if mine else "–"


def _curve_table(lines: Sequence[Line]) -> tuple[list[float], list[tuple[Line, dict[float, Interval]]]]:
    """The epsilons of all curves, and the accuracies of each line."""
    told = [(line, {p.epsilon: p.accuracy for p in line.arm.curve}) for line in lines if line.arm.curve]
    return sorted({epsilon for _, points in told for epsilon in points}), told


def _ends(lines: Sequence[Line]) -> list[tuple[Line, int, float, float, float]]:
    """(line, trainings, last clean, last robust, best minus last robust validation accuracy), means over trainings."""
    found = []
    for line in lines:
        curves = [c for c in line.arm.training if c.validation_robust and c.validation_clean]
        if curves:
            lost = [max(c.validation_robust) - c.validation_robust[-1] for c in curves]
            ends = [(c.validation_clean[-1], c.validation_robust[-1]) for c in curves]
            clean, robust = (sum(each) / len(ends) for each in zip(*ends, strict=True))
            found.append((line, len(curves), clean, robust, sum(lost) / len(lost)))
    return found


def _facts(contenders: Sequence[Contender]) -> tuple[list[Field], list[str]]:
    """Versions, machine and times: those that differ, and 'name value' of those that are the same in all runs."""
    names = dict.fromkeys(name for c in contenders for name in c.facts)
    found = [Field(name, tuple(c.facts.get(name, "–") for c in contenders)) for name in names]
    same = [f"{field.path} {field.values[0]}" for field in found if len(set(field.values)) == 1]
    return [field for field in found if len(set(field.values)) > 1], same


def _class_pairs(comparison: Comparison) -> list[Pair]:
    """The pairs under attack of a comparison of two runs that can be compared, the first column of each arm."""
    if len(comparison.contenders) != 2:
        return []
    pairs: dict[str, Pair] = {}
    for pair in comparison.pairs:
        if pair.column != CLEAN and pair.found is not None and not pair.same:
            pairs.setdefault(pair.arm.key, pair)
    return list(pairs.values())


def _costs(contenders: Sequence[Contender]) -> tuple[list[str], dict[int, dict[str, Cost]]]:
    """The roles in the story in their order, and what each cost each run ('' is all of it)."""
    found = dict.fromkeys(record.stage for c in contenders for record in c.stages)
    roles = sorted(found, key=lambda role: STORY.index(role) if role in STORY else len(STORY))
    told = {}
    for contender in contenders:
        mine = {role: [r for r in contender.stages if r.stage == role] for role in roles} | {"": contender.stages}
        told[contender.number] = {
            role: Cost(sum(r.seconds for r in records), max(r.peak_mb for r in records), len(records))
            for role, records in mine.items()
            if records
        }
    return roles, told
