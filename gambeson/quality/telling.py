"""What was measured, for people and programs: a table for the terminal, one in Markdown, and everything as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gambeson.quality.measured import Measured
from gambeson.quality.table import GROUPS, TABLE

FORMAT = 1
SHORT = 16
"""Letters of a feature space's name up to which the terminal shows it in the table."""
COLUMNS = ("measure", "value", "95 % interval", "better (ideal)", "feature space", "real", "synthetic", "note")
SHOWN = ("measure", "value", "95 % interval", "better", "space", "images")
"""The terminal's columns; images: real / synthetic."""
NARROW = ("95 % interval", "better", "images")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One number of one measure, or why there is none."""

    measure: str  # its name in the table of measures
    found: Measured | None  # the number; none: not measured
    reason: str = ""  # why it was not measured

    @property
    def group(self) -> str:
        """The group that the measure belongs to."""
        return TABLE[self.measure].group

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands in each of `COLUMNS`."""
        if self.found is None:
            return (self.measure, "not measured", *[""] * 5, self.reason)
        found = self.found
        interval = "none" if found.low is None or found.high is None else f"{number(found.low)} to {number(found.high)}"
        counts = (f"{found.real:,}", f"{found.synthetic:,}")
        return (found.name, number(found.value), interval, _better(found), found.space or "images", *counts, found.note)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        told = {"measured": self.found.plain()} if self.found is not None else {"not_measured": self.reason}
        return {"measure": self.measure, "group": self.group, **told}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All lines of one command, what they are of, and how they were made."""

    lines: tuple[Line, ...]
    facts: dict[str, Any]  # data, synthetic set, space, seed, versions, command: plain values
    notes: tuple[str, ...] = ()  # what a reader must know besides the lines' own notes

    def grouped(self) -> Iterator[tuple[str, list[Line]]]:
        """The groups that have lines, in their order, each with its lines."""
        for group in GROUPS:
            lines = [line for line in self.lines if line.group == group]
            if lines:
                yield group, lines

    def plain(self) -> dict[str, Any]:
        """Everything, for JSON."""
        lines = [line.plain() for line in self.lines]
        return {"format": FORMAT, "kind": "gambeson quality", **self.facts, "notes": list(self.notes), "lines": lines}


def number(value: float) -> str:
    """Four digits that count: 0.03127, 12.35, 1,234."""
    if value and abs(value) < 1e-4:
        return f"{value:.3e}"
    digits = 0 if not value else max(3 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{min(digits, 4)}f}"


def _better(found: Measured) -> str:
    """'lower (0)', 'near 0.3333': which way, and where a perfect set would be."""
    if found.ideal is None:
        return found.better
    return f"near {found.ideal:.4g}" if found.better == "near" else f"{found.better} ({found.ideal:.4g})"


def terminal_table(findings: Findings) -> tuple[Table, list[str]]:
    """The table without notes, and the lines that stand below it: notes by number, long names of spaces by letter."""
    table = Table(title=findings.facts.get("title"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in SHOWN:
        right, narrow = column in ("value", "images"), column in NARROW
        table.add_column(column, justify="right" if right else "left", no_wrap=narrow, overflow="fold")
    spaces: dict[str, str] = {}
    notes: dict[str, int] = {}
    for group, lines in findings.grouped():
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]")
        for line in lines:
            table.add_row(*_shown(line.cells, spaces, notes))
    legend = [f"{mark}: {name}" for name, mark in spaces.items()]
    return table, [*legend, *(f"[{index}] {note}" for note, index in notes.items()), *findings.notes]


def _shown(cells: tuple[str, ...], spaces: dict[str, str], notes: dict[str, int]) -> list[str]:
    """A line's cells, its note and the long name of its space as marks that are new where they have to be."""
    name, value, interval, better, space, real, synthetic, note = cells
    if note:
        name += f" \\[{notes.setdefault(note, len(notes) + 1)}]"
    if len(space) > SHORT:
        space = spaces.setdefault(space, f"space {chr(ord('A') + len(spaces))}")
    return [name, value, interval, better, space, f"{real} / {synthetic}" if real else ""]


def markdown(findings: Findings) -> str:
    """Title, one table for each group, notes and the command."""
    parts = [f"# {findings.facts.get('title', 'Quality')}\n"]
    for group, lines in findings.grouped():
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line.cells) + " |" for line in lines]
        head = ["| " + " | ".join(COLUMNS) + " |", "| --- | ---: | --- | --- | --- | ---: | ---: | --- |"]
        parts.append("\n".join([f"## {group.capitalize()}\n", *head, *rows, ""]))
    parts += [f"- {note}" for note in findings.notes]
    return "\n".join([*parts, "", f"`{findings.facts['command']}`", ""])
