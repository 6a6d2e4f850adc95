"""Writes the tables of docs/comparisons.md and README.md from the rows that are kept, so that no number there is typed.

python dev/comparisons.py           each benchmarks/results/tables/NAME-TIER has a pair of marks in the page
"""

import json
import re
from pathlib import Path

RESULTS, PAGE = Path("benchmarks/results/tables"), Path("docs/comparisons.md")
FOLDERS = re.compile(r" --report| --(?:runs|out|workers) \S+")
"""Of a command, what belongs to the machine it ran on."""


def section(folder: Path) -> str:
    """The table as a part of the page: its title one level lower, its command without the folders of its machine."""
    lines = (folder / "table.md").read_text(encoding="utf-8").rstrip().splitlines()
    lines[0] = "#" + lines[0]
    return "\n".join(FOLDERS.sub("", line) if line.startswith("    gambeson ") else line for line in lines)


README = Path("README.md")
BEGIN, END = "<!-- from dev/comparisons.py -->\n", "<!-- end -->"
SHOWN = ("cdp-2-digits", "cdp-2-16", "cdp-3-16")
"""The tables of which README has a line for each amount of synthetic data, as far as they are kept."""


def summary() -> list[str]:
    """Robust accuracy by arm, and the two differences that matter, a line for each amount of synthetic data."""
    lines = [
        "| Real images, threat | synthetic : real | real only % | + plain diffusion % | + Contrastive-DP % | plain "
        "minus real | guided minus plain | trainings |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in SHOWN:
        if not (path := RESULTS / name / "table.json").is_file():
            continue
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["cell"]: row for row in table["rows"]}
        real = next(row for row in table["rows"] if row["amount"] is None)
        for plain in (row for cell, row in rows.items() if cell.startswith("plain-")):
            guided = rows[plain["cell"].replace("plain-", "cdp-")]
            threat = table["facts"]["threat"].replace("0.03137", "8/255")
            about = f"{table['facts']['base']}: {table['facts']['train']:,}, {threat}"
            levels = (f"{100 * row['robust']['estimate']:.1f}" for row in (real, plain, guided))
            gains = (beside(plain, real["cell"]), beside(guided, plain["cell"]))
            parts = [about, f"{plain['amount']} : 1", *levels, *gains, str(len(plain["seeds"]))]
            lines.append(f"| {' | '.join(parts)} |")
    return lines


def beside(row: dict, other: str) -> str:
    """The paired difference of a row from another in points, with its interval."""
    found = next(each for each in row["beside"] if each["other"] == other)["robust"]
    estimate, low, high = (f"{100 * found[name]:+.1f}".replace("-", "−") for name in ("estimate", "low", "high"))
    return f"{estimate} ({low} to {high})"


def main() -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    table = "\n".join(summary())
    README.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    for folder in sorted(path.parent for path in RESULTS.glob("*/table.md")):
        begin, end = f"<!-- {folder.name} -->\n", "\n<!-- end -->"
        if begin not in text:
            raise SystemExit(f"{PAGE}: expected the mark {begin.strip()}, followed by <!-- end -->, for {folder}")
        before, rest = text.split(begin)
        text = before + begin + "\n" + section(folder) + "\n" + end + rest.split(end, 1)[1]
    PAGE.write_text(text, encoding="utf-8")


main()
