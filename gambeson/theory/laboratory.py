"""`gambeson theory`: everything computed and written: tables.json, tables.md, theory.json and the page theory.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gambeson.disk import atomic, open_folder, write_json
from gambeson.errors import require, unknown
from gambeson.machine import execution, versions
from gambeson.theory import proposition, sweeps, tables
from gambeson.theory.printed import EPSILONS, LENGTHS, TABLES, TRIALS
from gambeson.theory.tables import Line, copied
from gambeson.theory.trials import Protocol

Told = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Laboratory:
    """How much is computed."""

    tables: tuple[int, ...] = TABLES  # CDP's tables to set ours beside: 1, 7, 8, 9
    trials: int = 10_000  # trials per cell; the paper has 50
    sweep_trials: int = 300  # trials per setting of the sweeps
    protocol: Protocol = field(default_factory=Protocol)  # what the paper leaves open
    seed: int = 0  # seed of all draws

    def __post_init__(self) -> None:
        """UserError for unknown tables, none, or trials below 2."""
        require(len(self.tables) > 0, "tables", f"one or more of {', '.join(map(str, TABLES))}", self.tables)
        for table in self.tables:
            if table not in TABLES:
                raise unknown("table", str(table), map(str, TABLES))
        require(self.trials >= 2, "trials", "2 or more, so that there is a deviation", self.trials)
        require(self.sweep_trials >= 2, "sweep_trials", "2 or more", self.sweep_trials)


def tables_record(spec: Laboratory, lines: Sequence[Line]) -> dict[str, Any]:
    """The content of tables.json: protocol, verdicts per table, every cell, and how other readings fare."""
    per_table = {table: [x for x in lines if x.cell.table == table] for table in spec.tables}
    scored = tuple(t for t in spec.tables if t != 1) or spec.tables
    return {
        "protocol": asdict(spec.protocol),
        "trials": spec.trials,
        "paper_trials": TRIALS,
        "seed": spec.seed,
        "worlds": [
            {"d": d, "degrees": a, "mu_length": length, "epsilon": EPSILONS[d], "sigma": 1.0}
            for (d, a), length in LENGTHS.items()
        ],
        "verdicts": tables.WORDS,
        "tables": {table: _table_summary(own) for table, own in per_table.items()},
        "implied_test_images": tables.implied_test_images([x for x in lines if x.cell.table != 1] or lines),
        "cells": [line.plain() for line in lines],
        "protocols": {t: tables.protocol_scores((t,), min(spec.trials, 1000), spec.seed) for t in scored},
        "execution": execution(),
        "versions": versions(),
    }


def _table_summary(lines: Sequence[Line]) -> dict[str, Any]:
    counted = [x for x in lines if not copied(x.cell)]
    return {
        "cells": len(lines),
        "verdicts": tables.tally(lines),
        "largest_in_deviations": max((abs(x.in_deviations) for x in counted), default=0.0),
    }


def numbers(spec: Laboratory, told: Told = lambda line: None) -> dict[str, Any]:
    """Everything but figures and features: `tables` for tables.json, the rest for theory.json."""
    told(f"tables {', '.join(map(str, spec.tables))}: {spec.trials} trials per cell")
    lines = tables.compare(spec.tables, spec.protocol, spec.trials, spec.seed)
    record = tables_record(spec, lines)
    told(f"sweeps: {spec.sweep_trials} trials per setting")
    swept = sweeps.sweep(spec.sweep_trials, spec.seed)
    return {
        "tables": record,
        "statements": [asdict(s) for s in proposition.statements(spec.seed)],
        "sweep": swept,
        "best_c": sweeps.best_c(swept),
        "stopping": sweeps.stopping(trials=min(spec.trials, 4000), seed=spec.seed),
        "transfers": sweeps.transfers(),
    }


FIGURE_NAMES = ("figure-1", "figure-2", "figure-3", "figure-4")


def write(
    spec: Laboratory, out: Path, *, figures: Sequence[Path] = (), features: Any = None, told: Told = lambda line: None
) -> list[Path]:
    """Computes and writes tables.json, tables.md, theory.json and theory.html into `out`; their paths.

    figures: SVG files that the page shows; features: the record of feature_sets.of_recipe. EnvironmentFault where
    `out` cannot be written.
    """
    from gambeson.theory.page import render

    open_folder(out)
    found = numbers(spec, told)
    found["features"] = features
    paths = [out / name for name in ("tables.json", "tables.md", "theory.json", "theory.html")]
    write_json(paths[0], found["tables"])
    _write_text(paths[1], markdown(found["tables"]))
    write_json(paths[2], {name: value for name, value in found.items() if name != "tables"})
    _write_text(paths[3], render(found, figures))
    return paths


def _write_text(path: Path, text: str) -> None:
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def markdown(record: dict[str, Any]) -> str:
    """The tables as Markdown: a line per printed number, with verdict and reasons."""
    parts = [f"# Contrastive-DP's tables beside {record['trials']:,} trials\n", f"Protocol: {protocol_words(record)}\n"]
    parts += [f"- **{word}**: {meaning}" for word, meaning in tables.WORDS.items()]
    for table, summary in record["tables"].items():
        parts += [f"\n## Table {table}\n", f"{verdict_words(summary['verdicts'])}\n", _HEAD]
        parts += [_markdown_row(cell) for cell in record["cells"] if cell["cell"]["table"] == int(table)]
    return "\n".join(parts) + "\n"


_HEAD = (
    "| line | d | angle | trained on | n | accuracy | paper | ours | difference (deviations) | (standard errors) "
    "| verdict | reasons |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def _markdown_row(row: dict[str, Any]) -> str:
    cell = row["cell"]
    printed = "-" if cell["deviation"] is None else f"{cell['deviation']:.4f}"
    values = [
        cell["line"], cell["dimension"], cell["degrees"], cell["source"], cell["count"], cell["measure"],
        f"{cell['mean']:.4f} ({printed})", f"{row['mean']:.4f} ({row['deviation']:.4f})",
        f"{row['in_deviations']:+.2f}", f"{row['in_errors']:+.1f}", row["verdict"], "; ".join(row["reasons"]),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, values)) + " |"


def protocol_words(record: dict[str, Any]) -> str:
    """The protocol as a sentence."""
    p = record["protocol"]
    trained = {"synthetic": "from the synthetic images alone", "both": "from both (equation 5)", "real": "from real"}
    labels = {"inter": "theta_inter, learned from the real ones", "true": "the class that they were drawn from"}
    counted = {"class": "of each class", "total": "of both classes together"}
    return (
        f"n real images {counted[p['counted']]}, as many synthetic ones; synthetic images labelled by "
        f"{labels[p['labels']]}; theta_final learned {trained[p['trained_on']]}; accuracies exact, on infinitely many "
        "images."
    )


def verdict_words(verdicts: dict[str, int]) -> str:
    """'28 met, 4 finite test set'; what no cell has is left out."""
    return ", ".join(f"{verdicts[word]} {word}" for word in tables.WORDS if verdicts[word])


def summary(record: dict[str, Any]) -> list[str]:
    """Lines for the screen: a verdict per table, and the size of test set that would explain the rest."""
    lines = [f"Table {table}: {verdict_words(s['verdicts'])}" for table, s in record["tables"].items()]
    size = record["implied_test_images"]
    if size is not None:
        lines.append(f"a test set of about {size:,.0f} images, shared by the trials, would explain the differences")
    return lines


def as_script(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
