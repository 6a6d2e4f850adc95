"""Writes the tables of docs/comparisons.md from the rows that are kept, so that no number there is typed.

python dev/comparisons.py           each benchmarks/results/tables/NAME-TIER has a pair of marks in the page
"""

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


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for folder in sorted(path.parent for path in RESULTS.glob("*/table.md")):
        begin, end = f"<!-- {folder.name} -->\n", "\n<!-- end -->"
        if begin not in text:
            raise SystemExit(f"{PAGE}: expected the mark {begin.strip()}, followed by <!-- end -->, for {folder}")
        before, rest = text.split(begin)
        text = before + begin + "\n" + section(folder) + "\n" + end + rest.split(end, 1)[1]
    PAGE.write_text(text, encoding="utf-8")


main()
