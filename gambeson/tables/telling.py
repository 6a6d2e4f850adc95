"""A sheet with what was measured so far, for people and programs: JSON with everything, Markdown, and the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import gambeson
from gambeson.disk import atomic, write_json
from gambeson.report.statistics import Difference, Interval
from gambeson.tables.cells import Cell, Printed
from gambeson.tables.results import AUTOATTACK, Beside, Effect, Line, effects, lines, robust_column
from gambeson.tables.sheet import FORMAT, Sheet

MISSING = "not yet measured"
PAPER = "shared/papers/001_8f5f7520547278dc.txt"
"""The paper's text, whose lines are named."""
HEAD = ("cell", "about", "synthetic : real", "seeds", "clean %", "robust %", "validation %", "paper %", "line")
BESIDE = ("cell", "minus", "seeds", "clean, points", "robust, points", "shown", "paper, clean", "paper, robust")


def deliver(sheet: Sheet) -> list[Line]:
    """Writes table.json and table.md into the sheet's folder; the lines."""
    found, squares = lines(sheet), effects(sheet)
    write_json(sheet.folder / "table.json", plain(sheet, found, squares))
    with atomic(sheet.folder / "table.md") as draft:
        draft.write_text(markdown(sheet, found, squares), encoding="utf-8")
    return found


def plain(sheet: Sheet, found: Sequence[Line], squares: Sequence[Effect]) -> dict[str, Any]:
    """Everything, JSON-able; fractions of 1 but for the paper's percent."""
    return {
        "format": FORMAT,
        "table": sheet.name,
        "tier": sheet.tier,
        "title": sheet.title,
        "source": sheet.source,
        "facts": sheet.facts,
        "seeds": sheet.seeds,
        "robust": _robust_words(sheet),
        "rows": [line.plain() for line in found],
        "effects": [asdict(effect) for effect in squares],
        "notes": sheet.notes,
        "paper": PAPER,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "gambeson": gambeson.__version__,
    }


def _robust_words(sheet: Sheet) -> str:
    rows = {cell.name: None if (s := sheet.chosen(cell)) is None else sheet.rows(s, "test") for cell in sheet.cells}
    if robust_column(rows) == AUTOATTACK:
        return "AutoAttack"
    return "worst case of APGD-CE and targeted APGD"


def markdown(sheet: Sheet, found: Sequence[Line], squares: Sequence[Effect]) -> str:
    """The tables as a page."""
    parts = [f"# {sheet.title}: `{sheet.name}`, tier {sheet.tier}", *_about(sheet, found)]
    parts.append(_table(HEAD, [_row(line) for line in found]))
    beside = [_beside_row(line.cell.name, each) for line in found for each in line.beside]
    if beside:
        parts += ["Paired differences, cell minus the other, same images and seeds:", _table(BESIDE, beside)]
    if squares:
        told = [(effect.name, difference(effect.robust)) for effect in squares]
        parts += ["Effects on robust accuracy:", _table(("effect", "robust, points"), told)]
    parts += [f"- {line}" for line in (*sheet.notes, *_remarks(found))]
    return "\n\n".join(parts) + "\n"


def _about(sheet: Sheet, found: Sequence[Line]) -> Iterator[str]:
    facts, done = sheet.facts, sum(line.clean is not None and len(line.seeds) == len(sheet.seeds) for line in found)
    yield (
        f"{sheet.source}. Base recipe `{facts['base']}` (digest {facts['base_digest'][:10]}), {facts['data']}, threat "
        f"{facts['threat']}. {done} of {len(found)} cells measured with all seeds (wanted: {len(sheet.seeds)})."
    )
    yield f"    {facts['command']}"
    yield (
        f"Robust: {_robust_words(sheet)}, percent of test images; validation: clean / robust under AutoPGD. In "
        "brackets 95 % intervals over test images and, with several seeds, training; each for itself, not for the "
        f"table as a whole. Settings are chosen on validation images, test images measure. Paper (at its own "
        f"size): {PAPER}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _row(line: Line) -> tuple[str, ...]:
    """What stands in each column of HEAD."""
    cell = line.cell
    name = f"{cell.name} [{line.choice}]" if line.choice else cell.name
    amount = "" if cell.amount is None else f"{cell.amount} : 1"
    judged = "" if line.validation is None else " / ".join(f"{100 * value:.1f}" for value in line.validation)
    paper = (_printed(cell.printed), "" if cell.printed is None else str(cell.printed.line))
    if line.clean is None or line.robust is None:
        return (name, cell.about, amount, str(line.judged or 0), MISSING, MISSING, judged or MISSING, *paper)
    return (
        name, cell.about, amount, str(len(line.seeds)), interval(line.clean), interval(line.robust), judged, *paper,
    )  # fmt: skip


def _printed(found: Printed | None) -> str:
    """`84.65 / 52.46`."""
    if found is None:
        return ""
    return " / ".join("?" if value is None else f"{value:.2f}" for value in (found.clean, found.robust))


def interval(found: Interval) -> str:
    """`78.6 (76.3 to 80.7)`, percent."""
    return f"{100 * found.estimate:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def difference(found: Difference) -> str:
    """`+2.0 (+0.9 to +3.2)`, points."""
    return f"{100 * found.estimate:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _beside_row(name: str, found: Beside) -> tuple[str, ...]:
    """What stands in each column of BESIDE."""
    paper = ("" if value is None else f"{value:+.2f}" for value in (found.printed_clean, found.printed_robust))
    shown = "yes" if found.robust.shown else "no"
    return (name, found.other, str(found.seeds), difference(found.clean), difference(found.robust), shown, *paper)


def _remarks(found: Sequence[Line]) -> Iterator[str]:
    """What a reader must know of single cells."""
    for line in found:
        yield from _cell_remarks(line.cell)
        if line.settings:
            told = ", ".join(f"{name} {100 * value:.1f}" for name, value in line.settings.items())
            yield f"{line.cell.name}: robust % on validation images of the settings chosen among: {told}"
        yield from (f"**{line.cell.name}: failed check: {check}**" for check in line.failed_checks)
        yield from (f"**failed: {reason}**" for reason in line.failures)


def _cell_remarks(cell: Cell) -> Iterator[str]:
    if cell.student_changes:
        yield f"{cell.name}: its student is trained otherwise: {' '.join(cell.student_changes)}"
    if cell.printed is not None and cell.printed.note:
        yield f"{cell.name}: {cell.printed.note}"


def terminal_table(sheet: Sheet, found: Sequence[Line]) -> Table:
    """The cells' numbers, one line each."""
    shown = Table(title=f"{sheet.title} ({sheet.name}, tier {sheet.tier})", box=SIMPLE_HEAD)
    for name in ("cell", "seeds", "clean %", "robust %", "validation %", "paper %"):
        shown.add_column(name, overflow="fold")
    places = [HEAD.index(name) for name in ("cell", "seeds", "clean %", "robust %", "validation %", "paper %")]
    for line in found:
        row = _row(line)
        shown.add_row(*(row[place].replace("[", "\\[") for place in places))
    return shown


def plan_lines(sheet: Sheet, changes: dict[str, list[str]]) -> Iterator[str]:
    """The cells with what makes each setting's recipe other than the base."""
    facts = sheet.facts
    yield f"{sheet.title} ({sheet.source}): {sheet.name}, tier {sheet.tier}"
    yield f"base recipe {facts['base']}, {facts['data']}, {len(sheet.seeds)} seed(s), rows kept in {_short(sheet)}"
    for cell in sheet.made:
        beside = f"; beside {', '.join(cell.against)}" if cell.against else ""
        yield f"  {cell.name}: {cell.about} (arm {cell.settings[0].arm.value}{beside})"
        for setting in cell.settings:
            kept = sum(sheet.has(setting, seed, "test") for seed in sheet.seeds)
            judged = sum(sheet.has(setting, seed, "validation") for seed in sheet.seeds)
            named = f"[{setting.choice}] " if setting.choice else ""
            words = " ".join(changes[setting.folder]) or "(the base recipe)"
            yield f"    {named}measured {kept}, judged {judged} of {len(sheet.seeds)}: {words}"
    yield from (f"note: {note}" for note in sheet.notes)


def _short(sheet: Sheet) -> str:
    return os.path.relpath(sheet.folder)
