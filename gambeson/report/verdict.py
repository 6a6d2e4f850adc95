"""What the rows say: scores, paired comparisons, which cells may be bold, and the verdict in words.

A cell is bold only if its arm's paired interval against every other arm lies above 0; where an interval holds 0 the
words are "no difference shown".
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from gambeson.report import rows
from gambeson.report.material import ArmMaterial, RunMaterial
from gambeson.report.statistics import Difference, Interval, randomness

COLUMNS = {"clean": "Clean", "pgd": "PGD", "apgd": "Worst case"}
"""The scored columns and their headings; the worst case is that of APGD-CE and targeted APGD."""
HEADLINE = "apgd"
SPOKEN = ("apgd", "clean")
REAL = "real"
"""The key of the arm without synthetic images."""


@dataclass(frozen=True)
class Score:
    """One cell of the table: an accuracy, and whether it may be set in bold."""

    accuracy: Interval
    bold: bool


@dataclass(frozen=True)
class ScoredArm:
    """One line of the table: an arm's scores by column (none: not evaluated), its seeds and number of test images."""

    key: str
    title: str
    scores: dict[str, Score]
    seeds: tuple[int, ...]
    images: int


@dataclass(frozen=True)
class Comparison:
    """Arm minus baseline by column (fractions of 1; None where they share no seed)."""

    arm: str
    baseline: str
    differences: dict[str, Difference | None]


@dataclass(frozen=True)
class Verdict:
    """Everything that a run shows in numbers: the table, the comparisons, and words that a reader may quote.

    headlines: one for each comparison in the worst case, that of the method first, each able to stand alone.
    """

    arms: tuple[ScoredArm, ...]
    comparisons: tuple[Comparison, ...]
    headlines: tuple[str, ...]
    sentences: tuple[str, ...]
    caution: str


def judge(material: RunMaterial) -> Verdict:
    """The verdict on a run; arms without rows stand in the table without scores and in no comparison."""
    evaluated = [arm for arm in material.arms if arm.rows is not None]
    comparisons = tuple(_compare(a, b) for a, b in _pairs(evaluated))
    return Verdict(
        arms=tuple(_scored(arm, evaluated) for arm in material.arms),
        comparisons=comparisons,
        headlines=_headlines(material, evaluated),
        sentences=_sentences(material, evaluated, comparisons),
        caution=_caution(material, evaluated),
    )


def percent(fraction: float) -> str:
    """0.7853 -> '78.5'."""
    return f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    """A signed number of percentage points with a true minus sign: -0.0123 -> '−1.2'."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def terminal_table(material: RunMaterial) -> Table:
    """The verdict table for the terminal; its caption names what the intervals are random over."""
    verdict = judge(material)
    table = Table(title=Text(f"{material.title} · {material.threat}"), caption=Text(verdict.caution), min_width=60)
    table.add_column("Arm")
    for heading in _headings(verdict):
        table.add_column(heading, justify="right")
    for arm in verdict.arms:
        bold = [arm.scores[c].bold if c in arm.scores else False for c in COLUMNS] + [False]
        styled = [Text(text, style="bold" if b else "") for text, b in zip(_line(arm, verdict), bold, strict=False)]
        table.add_row(Text(arm.title), *styled)
    return table


def markdown_table(material: RunMaterial) -> str:
    """The same table in Markdown, for a README: a heading, a rule, a line per arm, and what the intervals mean."""
    verdict = judge(material)
    headings = ["Arm", *_headings(verdict)]
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1)]
    for arm in verdict.arms:
        bold = [arm.scores[c].bold if c in arm.scores else False for c in COLUMNS] + [False]
        cells = [f"**{text}**" if b else text for text, b in zip(_line(arm, verdict), bold, strict=False)]
        lines.append([_plain_markdown(arm.title), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{verdict.caution}\n"


def _headings(verdict: Verdict) -> list[str]:
    baseline = _baseline(verdict)
    return [f"{h} %" for h in COLUMNS.values()] + ([f"{COLUMNS[HEADLINE]} against {baseline}"] if baseline else [])


def _baseline(verdict: Verdict) -> str | None:
    return verdict.comparisons[0].baseline if verdict.comparisons else None


def _line(arm: ScoredArm, verdict: Verdict) -> list[str]:
    """The cells of an arm's line: each score with its interval, then its difference from the baseline."""
    texts = [_score_text(arm.scores[c].accuracy) if c in arm.scores else "not evaluated" for c in COLUMNS]
    if not verdict.comparisons:
        return texts
    mine = [c for c in verdict.comparisons if (c.arm, c.baseline) == (arm.title, _baseline(verdict))]
    found = mine[0].differences[HEADLINE] if mine else None
    return [*texts, _difference_text(found) if found else "–"]


def _score_text(interval: Interval) -> str:
    return f"{percent(interval.estimate)} ({percent(interval.low)}–{percent(interval.high)})"


def _difference_text(difference: Difference) -> str:
    return f"{points(difference.estimate)} ({points(difference.low)} to {points(difference.high)})"


def _plain_markdown(text: str) -> str:
    return "".join("\\" + c if c in "\\|*_`<[]#" else " " if c in "\r\n" else c for c in text)


def _pairs(arms: list[ArmMaterial]) -> list[tuple[ArmMaterial, ArmMaterial]]:
    """Every arm against the first, then guided against plain."""
    pairs = [(arm, arms[0]) for arm in arms[1:]]
    by_key = {arm.key: arm for arm in arms}
    if {"guided", "plain"} <= set(by_key) and (by_key["guided"], by_key["plain"]) not in pairs:
        pairs.append((by_key["guided"], by_key["plain"]))
    return pairs


def _compare(a: ArmMaterial, b: ArmMaterial) -> Comparison:
    return Comparison(a.title, b.title, {column: rows.difference(a, b, column) for column in COLUMNS})


def _scored(arm: ArmMaterial, evaluated: list[ArmMaterial]) -> ScoredArm:
    if arm.rows is None:
        return ScoredArm(arm.key, arm.title, {}, (), 0)
    scores = {column: Score(_accuracy(arm, column), _leads(arm, evaluated, column)) for column in COLUMNS}
    return ScoredArm(arm.key, arm.title, scores, tuple(rows.seeds(arm)), rows.cells(arm.rows, "clean").indices.size)


def _accuracy(arm: ArmMaterial, column: str) -> Interval:
    found = rows.accuracy(arm, column)
    assert found is not None
    return found


def _leads(arm: ArmMaterial, evaluated: list[ArmMaterial], column: str) -> bool:
    """Whether the arm's paired interval against every other arm lies above 0 (False when it is alone)."""
    others = [rows.difference(arm, other, column) for other in evaluated if other is not arm]
    return bool(others) and all(d is not None and d.low > 0 for d in others)


def _headlines(material: RunMaterial, evaluated: list[ArmMaterial]) -> tuple[str, ...]:
    """The result in words: Contrastive-DP (else the last arm) against the first arm, then every other comparison."""
    if len(evaluated) < 2:
        return (_alone(material, evaluated[0]) if evaluated else _NOTHING,)
    pairs = _pairs(evaluated)
    against_first = [pair for pair in pairs if pair[1] is evaluated[0]]
    method = next((pair for pair in against_first if pair[0].key == "guided"), against_first[-1])
    ordered = [method, *(p for p in pairs if p not in against_first), *(p for p in against_first if p is not method)]
    return tuple(_headline(material, a, b) for a, b in ordered)


_NOTHING = "No arm has been evaluated, so there is nothing to say about accuracy."


def _alone(material: RunMaterial, arm: ArmMaterial) -> str:
    found = _accuracy(arm, HEADLINE)
    given = f" from {_images(material.synthetic[arm.key])}" if material.synthetic.get(arm.key) else ""
    return (f"{percent(found.estimate)} % robust accuracy{given}: {_bare(arm)} under {material.threat}, 95 % interval "
            f"{percent(found.low)} to {percent(found.high)} over {_over(len(rows.seeds(arm)))}. No other arm was "
            "evaluated, so nothing is compared.")  # fmt: skip


def _headline(material: RunMaterial, a: ArmMaterial, b: ArmMaterial) -> str:
    """'+3.6 points robust accuracy from 4,000 synthetic images: A against B under ..., 95 % interval ... over ...'."""
    found = rows.difference(a, b, HEADLINE)
    who = f"{_bare(a)} against {_bare(b)} under {material.threat}"
    if found is None:
        return f"Nothing can be said of {who}: they have no seed in common."
    given, common = _given(material, a, b), len(set(rows.seeds(a)) & set(rows.seeds(b)))
    interval = f"95 % interval {points(found.low)} to {points(found.high)} over {_over(common)}"
    if found.shown:
        return f"{points(found.estimate)} points robust accuracy{given}: {who}, {interval}."
    return f"No difference shown in robust accuracy{given}: {points(found.estimate)} points for {who}, {interval}."


def _bare(arm: ArmMaterial) -> str:
    """'+ plain diffusion' -> 'plain diffusion': beside a number with a sign the plus of a title misleads."""
    return arm.title.removeprefix("+ ")


def _given(material: RunMaterial, a: ArmMaterial, b: ArmMaterial) -> str:
    """How many synthetic images the first arm was given, and the second where it was given any; '' where unknown."""
    mine, others = (material.synthetic.get(arm.key, 0 if arm.key == REAL else None) for arm in (a, b))
    if mine is None or others is None or (not mine and not others):
        return ""
    if not others:
        return f" from {_images(mine)}"
    return f" from {_images(mine)} each" if mine == others else f" from {_images(mine)} (against {others:,})"


def _images(n: int) -> str:
    return f"{n:,} synthetic image{'' if n == 1 else 's'}"


def _over(trainings: int) -> str:
    """'test images and 5 trainings', or that one training tells nothing about another."""
    return f"test images and {trainings} trainings" if trainings > 1 else "test images alone (one training)"


def _sentences(
    material: RunMaterial, evaluated: list[ArmMaterial], comparisons: tuple[Comparison, ...]
) -> tuple[str, ...]:
    if not evaluated:
        return (_NOTHING,)
    if not comparisons:
        found = _accuracy(evaluated[0], HEADLINE)
        return (f"Only {evaluated[0].title} has been evaluated, so nothing is compared: its worst-case accuracy "
                f"({material.threat}) is {_percent_words(found)}.",)  # fmt: skip
    first = comparisons[0].baseline
    against_first = [c for c in comparisons if c.baseline == first]
    between = [_between(c) for c in comparisons if c.baseline != first]
    by_column = [_against(column, first, against_first) for column in SPOKEN]
    return (by_column[0], *between, *by_column[1:])


def _against(column: str, baseline: str, comparisons: list[Comparison]) -> str:
    """One sentence: which arms are above, below, or not shown to differ from the baseline in a column."""
    groups: dict[str, list[str]] = {}
    for comparison in comparisons:
        found = comparison.differences[column]
        groups.setdefault(_outcome(found), []).append(comparison.arm + (f" ({_points_words(found)})" if found else ""))
    clauses = {
        way: f"{_list(names)} {'is' if len(names) == 1 else 'are'} {way} {baseline}" for way, names in groups.items()
    }
    if "level" in groups:
        clauses["level"] = f"no difference from {baseline} is shown for {_list(groups['level'])}"
    if "unpaired" in groups:
        clauses["unpaired"] = f"{_list(groups['unpaired'])} cannot be paired with {baseline} (no seed in common)"
    ordered = [clauses[way] for way in ("above", "below", "level", "unpaired") if way in clauses]
    return f"{_NAMES[column]}: {'; '.join(ordered)}."


_NAMES = {"apgd": "Worst-case accuracy", "clean": "Clean accuracy"}


def _between(comparison: Comparison) -> str:
    """One sentence on two arms in the headline column."""
    found = comparison.differences[HEADLINE]
    if found is None:
        return f"{comparison.arm} cannot be paired with {comparison.baseline} (no seed in common)."
    words = {"above": f"{comparison.arm} is above {comparison.baseline}",
             "below": f"{comparison.arm} is below {comparison.baseline}",
             "level": f"no difference is shown between {comparison.baseline} and {comparison.arm}"}  # fmt: skip
    return f"{_NAMES[HEADLINE]}, head to head: {words[_outcome(found)]} ({_points_words(found)})."


def _outcome(difference: Difference | None) -> str:
    if difference is None:
        return "unpaired"
    return "above" if difference.low > 0 else "below" if difference.high < 0 else "level"


def _points_words(difference: Difference) -> str:
    return f"{points(difference.estimate)} points, interval {points(difference.low)} to {points(difference.high)}"


def _percent_words(interval: Interval) -> str:
    return f"{percent(interval.estimate)} % (interval {percent(interval.low)} to {percent(interval.high)})"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _caution(material: RunMaterial, evaluated: list[ArmMaterial]) -> str:
    """What the intervals are random over, and whether checks failed, in a few sentences."""
    failed = sum(not check.passed for check in (*rows.row_checks(material), *material.checks))
    alarm = (
        f" Checks of the evaluation that failed: {failed}; see the report before quoting a number." if failed else ""
    )
    numbers = sorted({len(rows.seeds(arm)) for arm in evaluated})
    if not numbers:
        return f"Nothing was evaluated.{alarm}"
    over = " or ".join(randomness(n) for n in numbers)
    common = f"Intervals are 95 %, each on its own, over {over}; differences are paired by image."
    if numbers[0] > 1:
        return common + alarm
    return f"{common} One seed says nothing about another training run, which may move every number by more.{alarm}"
