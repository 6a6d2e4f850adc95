"""A comparison in words and for the terminal: which run is above which, by how much, and what may not be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from gambeson.report.compare_material import CLEAN, COLUMNS, Contender, ContenderArm
from gambeson.report.compare_pairs import CONFIDENCE, Comparison, Pair
from gambeson.report.statistics import Difference, Interval, mean_accuracy, paired_difference
from gambeson.report.verdict import percent, points

SPOKEN = 6
"""Runs up to which each has sentences of its own."""
NAMES = {
    "clean": "clean accuracy",
    "pgd": "accuracy under PGD",
    "apgd": "worst-case accuracy",
    "autoattack": "accuracy under all attacks of the assessment",
}


def title(comparison: Comparison) -> str:
    """'digits-1 and digits-2 compared', or how many runs."""
    names = [c.name for c in comparison.contenders]
    return " and ".join(names) if len(names) == 2 else f"{names[0]} and {len(names) - 1} other runs"


def sentences(comparison: Comparison) -> list[str]:
    """The verdict, the most important sentence first."""
    if comparison.reference is None:
        return ["No classifier of these runs was measured, so nothing is said about accuracy; their recipes are below."]
    others = [c for c in comparison.contenders if c is not comparison.reference]
    first = [] if comparison.reference is comparison.contenders[0] else [_moved_reference(comparison)]
    if len(others) >= SPOKEN:
        return [*first, *_summary(comparison)]
    return [*first, *(sentence for other in others for sentence in _about(comparison, other))]


def _moved_reference(comparison: Comparison) -> str:
    named, used = comparison.contenders[0], comparison.reference
    assert used is not None
    return f"{_capital(named.label)} has no measured classifier, so the others are compared with {used.label}."


def _about(comparison: Comparison, other: Contender) -> Iterator[str]:
    """What is said of one run."""
    assert comparison.reference is not None
    if not other.measured:
        yield f"{_capital(other.label)} has no measured classifier{': ' + other.state if other.state else ''}."
        return
    headline, clean = comparison.of(other), comparison.of(other, CLEAN)
    against = f"{_capital(other.label)} against {comparison.reference.label}"
    reasons = dict.fromkeys(p.reason for p in (*headline, *clean) if p.found is None)
    if all(p.found is None for p in (*headline, *clean)):
        yield f"{against}: not comparable, because {'; '.join(reasons)}."
        return
    if all(p.same for p in (*headline, *clean)):
        yield f"{against}: every arm is the very same classifier in both, so there is nothing to tell apart."
        return
    for column in dict.fromkeys(p.column for p in (*headline, *clean)):
        yield f"{against}, {NAMES[column]}: {_clauses([p for p in (*headline, *clean) if p.column == column])}."


def _clauses(pairs: Sequence[Pair]) -> str:
    """Which arms are above, below, not shown to differ, the same, or not comparable."""
    groups: dict[str, list[str]] = {}
    for pair in pairs:
        key = f"none {pair.reason}" if pair.found is None else pair.outcome
        groups.setdefault(key, []).append(pair.title + (f" ({points_words(pair.found)})" if _told(pair) else ""))
    words = {
        "above": "{} {is} above",
        "below": "{} {is} below",
        "alone above": "{} {is} above taken alone, not with all differences on this page counted together",
        "alone below": "{} {is} below taken alone, not with all differences on this page counted together",
        "level": "no difference is shown for {}",
        "same": "{} {is} the very same in both runs",
    }
    ordered = [*(key for key in words if key in groups), *(key for key in groups if key.startswith("none "))]
    return "; ".join(
        words[key].format(listed(groups[key]), **{"is": "is" if len(groups[key]) == 1 else "are"})
        if key in words
        else f"{listed(groups[key])} cannot be compared, because {key.removeprefix('none ')}"
        for key in ordered
    )


def _told(pair: Pair) -> bool:
    return pair.found is not None and not pair.same


def _summary(comparison: Comparison) -> Iterator[str]:
    """Three sentences on many runs."""
    assert comparison.reference is not None
    mine = [p for p in comparison.pairs if p.column != CLEAN]
    ways = {way: [p for p in mine if p.outcome == way] for way in ("above", "below")}
    found = [p for p in mine if _told(p)]
    barred = [c.label for c in comparison.contenders if (own := comparison.of(c)) and all(p.found is None for p in own)]
    yield (
        f"Of {len(found)} arms of other runs compared with {comparison.reference.label} under attack, "
        f"{len(ways['above'])} {'is' if len(ways['above']) == 1 else 'are'} above and {len(ways['below'])} below with "
        "all differences on this page counted together."
    )
    if found:
        for word, pair in (("largest", max(found, key=_estimate)), ("smallest", min(found, key=_estimate))):
            yield (f"The {word} difference in {NAMES[pair.column]}: {pair.title} of {pair.contender.label}, "
                   f"{points_words(pair.found)}; {_outcome(pair)}.")  # fmt: skip
    if barred:
        yield f"Not comparable under attack: {listed(barred)}; the table says why."


def _estimate(pair: Pair) -> float:
    return 0.0 if pair.found is None else pair.found.estimate


OUTCOMES = {
    "above": "above",
    "below": "below",
    "alone above": "above alone, not with all counted",
    "alone below": "below alone, not with all counted",
    "level": "no difference shown",
    "same": "the same classifiers",
    "none": "not comparable",
}
"""A pair's outcome for a cell of a table."""


def _outcome(pair: Pair) -> str:
    return OUTCOMES[pair.outcome]


def caution(comparison: Comparison) -> str:
    """What the intervals are random over, how many there are, and what counting them together does."""
    found = [p for p in comparison.pairs if _told(p)]
    if not found:
        return "No difference between runs could be measured." if len(comparison.contenders) > 1 else ""
    over = listed(list(dict.fromkeys(p.found.randomness for p in found if p.found)), "or")
    images = sorted({p.images for p in found})
    said = f"Differences are paired by image over {listed([f'{n:,}' for n in images], 'or')} test images; intervals "
    said += f"are 95 %, over {over}."
    if comparison.tests > 1:
        each = 100 * (1 - (1 - CONFIDENCE) / comparison.tests)
        lost = sum(p.outcome.startswith("alone") for p in found)
        said += (
            f" {comparison.tests} differences are looked at; where nothing differed, 1 in 20 would still leave 0 out "
            f"taken alone. So the verdicts count them together (Bonferroni: each interval at {each:.4g} %)"
        )
        said += f", and {lost} of them {'is' if lost == 1 else 'are'} shown alone but not together." if lost else "."
    if any(p.found and p.found.randomness == "test images" for p in found):
        said += " One seed says nothing about another training run, which may move a number by more."
    return said


def points_words(found: Difference | None) -> str:
    """'+1.2 points, interval +0.3 to +2.1'."""
    assert found is not None
    return f"{points(found.estimate)} points, interval {points(found.low)} to {points(found.high)}"


def listed(words: Sequence[str], joint: str = "and") -> str:
    """'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joint} {words[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def score(arm: ContenderArm, column: str) -> Interval | None:
    """The accuracy of an arm in a column with its interval; None: not measured."""
    measure = arm.measures.get(column)
    return None if measure is None else mean_accuracy(measure.cells.correct)


def gain(contender: Contender, arm: ContenderArm) -> Difference | None:
    """An arm minus the first measured arm of its own run under attack, over the seeds both have; None for that arm."""
    base = contender.measured[0] if contender.measured else arm
    if arm is base or arm.headline is None or base.headline != arm.headline:
        return None
    a, b = (each.measures[arm.headline].cells for each in (arm, base))
    common = sorted({int(s) for s in a.seeds} & {int(s) for s in b.seeds})
    if not common or list(a.indices) != list(b.indices):
        return None
    x, y = (cells.correct[[list(cells.seeds).index(s) for s in common]] for cells in (a, b))
    return paired_difference(x, y)


def shown_columns(comparison: Comparison) -> list[str]:
    """The columns that some arm was measured in, in their order."""
    measured = {column for c in comparison.contenders for arm in c.arms for column in arm.measures}
    return [column for column in COLUMNS if column in measured]


def terminal_table(comparison: Comparison) -> Table:
    """Every arm of every run: its accuracies, and its difference from the reference run under attack."""
    columns = [c for c in shown_columns(comparison) if c != "pgd"]
    name = comparison.reference.name if comparison.reference else comparison.contenders[0].name
    table = Table(title=Text(f"compared with {name}"), caption=Text(caution(comparison)), min_width=60)
    for heading in ("Run", "Arm"):
        table.add_column(heading)
    for column in columns:
        table.add_column(f"{COLUMNS[column]} %", justify="right")
    table.add_column("Against run " + str(comparison.reference.number if comparison.reference else 1), justify="right")
    for contender in comparison.contenders:
        _add(table, comparison, contender, columns)
    return table


def _add(table: Table, comparison: Comparison, contender: Contender, columns: list[str]) -> None:
    name = Text(str(contender.number), style="bold red" if contender.failures else "")
    for arm in contender.measured:
        own = [p for p in comparison.of(contender) if p.arm is arm]
        scores = [score(arm, column) for column in columns]
        cells = [f"{percent(s.estimate)} ({percent(s.low)}–{percent(s.high)})" if s else "–" for s in scores]
        told = "–" if not own else cell(own[0])
        bold = bool(own) and own[0].outcome in ("above", "below")
        table.add_row(name, Text(arm.title), *map(Text, cells), Text(told, style="bold" if bold else ""))
        name = Text("")
    if not contender.measured:
        table.add_row(name, Text("not finished" if contender.state else "no rows"), *[Text("–")] * (len(columns) + 1))
    table.add_section()


def cell(pair: Pair) -> str:
    """A pair for a cell of a table."""
    if pair.found is None:
        return "not comparable"
    if pair.same:
        return "same classifiers"
    return f"{points(pair.found.estimate)} ({points(pair.found.low)} to {points(pair.found.high)})"


def terminal_lines(comparison: Comparison) -> Iterator[Text]:
    """What stands below the table: the verdict, failed checks in red, what is missing."""
    for sentence in sentences(comparison):
        yield Text(sentence)
    for contender in comparison.contenders:
        if contender.failures:
            names = ", ".join(dict.fromkeys(check.name for check in contender.failures))
            yield Text(f"{contender.label}: {len(contender.failures)} checks failed: {names}", style="bold red")
        for note in contender.notes:
            yield Text(f"{contender.label}: {note}", style="yellow")
