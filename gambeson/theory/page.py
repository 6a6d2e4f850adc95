"""The laboratory's page: one self-contained HTML file with a hand-written script and precomputed numbers."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gambeson.theory.laboratory import as_script, protocol_words, verdict_words

MARKS = {"met": "\u2713", "finite test set": "\u25d0", "copied row": "=", "not met": "\u2717"}
"""A sign for each verdict, so that colour is not needed."""
FIGURE_WORDS = {
    "figure-1": "Figure 1: the cases of Proposition 1, with exact and finite-sample accuracies.",
    "figure-2": "Figure 2: contrastive guidance without and with classes.",
    "figure-3": "Figure 3: every contrastive loss, started from N(0, I).",
    "figure-4": "Figure 4: every contrastive loss, started from N(0, 4 I).",
}


def render(found: dict[str, Any], figures: Sequence[Path] = ()) -> str:
    """The page as HTML text; `found` is laboratory.numbers with `features` (None: that part is said to be missing)."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=_percent, greek=greek, signed=lambda value: f"{value:+.2f}")
    record = found["tables"]
    return environment.get_template("theory.html.j2").render(
        style=Markup(_style(here)),
        script=Markup((here / "theory.js").read_text(encoding="utf-8")),
        data=Markup(as_script({name: found[name] for name in ("sweep", "stopping", "transfers")})),
        record=record,
        protocol=protocol_words(record),
        words=verdict_words,
        marks=MARKS,
        rows={table: _rows(record["cells"], int(table)) for table in record["tables"]},
        reasons={table: _reasons(record["cells"], int(table)) for table in record["tables"]},
        statements=found["statements"],
        stopping=found["stopping"],
        transfers=found["transfers"],
        turning=_turning(found["best_c"]),
        figures=[(path.stem, FIGURE_WORDS.get(path.stem, path.stem), _data_uri(path)) for path in figures],
        features=found["features"],
    )


def _style(here: Path) -> str:
    """The report's style sheet, so that the pages of the house look alike, and what this page adds."""
    own = (here / "theory.css").read_text(encoding="utf-8")
    return (files("gambeson.report") / "page.css").read_text(encoding="utf-8") + own


_LETTERS = {
    "mu~": "\u03bc\u0303",
    "mu_j": "\u03bc\u2c7c",
    "mu": "\u03bc",
    "epsilon": "\u03b5",
    "sigma": "\u03c3",
    "gamma": "\u03b3",
    "phi": "\u03c6",
    "n~": "\u00f1",
    "theta_inter": "\u03b8_inter",
    "theta_final": "\u03b8_final",
    "theta": "\u03b8",
}


def greek(text: str) -> str:
    """The letters of formulae in place of their names."""
    names = "|".join(map(re.escape, _LETTERS))
    return re.sub(rf"\b(?:{names})(?![A-Za-z_])", lambda found: _LETTERS[found[0]], text)


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def _data_uri(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def _rows(cells: Sequence[dict[str, Any]], table: int) -> list[dict[str, Any]]:
    """Clean and robust side by side: one entry per world, source and n, in the order of print."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in cells:
        cell = row["cell"]
        if cell["table"] == table:
            key = (cell["dimension"], cell["degrees"], cell["source"], cell["count"])
            found.setdefault(key, {"key": key, "line": cell["line"]})[cell["measure"]] = row
    return sorted(found.values(), key=lambda entry: (entry["key"][:2], entry["line"]))


def _reasons(cells: Sequence[dict[str, Any]], table: int) -> list[tuple[str, int]]:
    """Each reason with the number of cells that it is said of, numbers in it left out."""
    found: dict[str, int] = {}
    for row in cells:
        if row["cell"]["table"] == table:
            for reason in row["reasons"]:
                short = "the paper's deviation is far from ours" if "times ours" in reason else reason
                found[short] = found.get(short, 0) + 1
    return sorted(found.items(), key=lambda item: -item[1])


def _turning(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best c at n = 10, by the angle of mu~ to mu: one entry per angle, both ways of training."""
    turns = sorted({row["turn"] for row in rows})
    at = {(row["trained_on"], row["turn"]): row for row in rows if row["n"] == 10}
    return [{"turn": t, "synthetic": at["synthetic", t], "both": at["both", t]} for t in turns]
