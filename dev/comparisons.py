"""Writes the tables of docs/comparisons.md and README.md from the rows that are kept, so that no number there is typed.

python dev/comparisons.py           each benchmarks/results/tables/NAME-TIER has a pair of marks in the page, as has
                                    benchmarks/results/peers.jsonl
"""

import json
import re
from pathlib import Path

RESULTS, PAGE = Path("benchmarks/results/tables"), Path("docs/comparisons.md")
FOLDERS = re.compile(r" --report| --(?:runs|out|workers) \S+")
"""Of a command, what belongs to the machine it ran on."""


def section(folder: Path) -> str:
    """The table as a part of the page, with what its folder says beside NAME-TIER: its title two levels lower, its
    command without the folders of its machine.
    """
    lines = (folder / "table.md").read_text(encoding="utf-8").rstrip().splitlines()
    tier = lines[0].rpartition(" tier ")[2]
    other = folder.name.partition(f"-{tier}")[2].removeprefix("-").replace("-", " ")
    lines[0] = f"##{lines[0]}{other and f' ({other})'}"
    return "\n".join(FOLDERS.sub("", line) if line.startswith("    gambeson ") else line for line in lines)


README = Path("README.md")
BEGIN, END = "<!-- from dev/comparisons.py -->\n", "<!-- end -->"
SHOWN = {
    "cdp-2-digits-100-images": "{:,} digits",
    "cdp-2-digits": "{:,} digits",
    "cdp-2-digits-900-images": "{:,} digits",
    "cdp-2-16-500-images": "{:,} of CIFAR-10 at 16x16",
    "cdp-2-16": "{:,} of CIFAR-10 at 16x16",
    "cdp-2-16-5000-images": "{:,} of CIFAR-10 at 16x16",
    "cdp-3-16-70-percent": "{:,} traffic signs at 16x16",
    "cdp-3-16": "{:,} traffic signs at 16x16, 30 % of a batch",
}
"""The tables of which README has a line for each amount of synthetic data, as far as they are kept, and their words."""


def summary() -> list[str]:
    """Robust accuracy by arm, and the two differences that matter, a line for each amount of synthetic data."""
    lines = [
        "| Real images, threat | synthetic : real | real only % | + plain diffusion % | + Contrastive-DP % | plain "
        "minus real | guided minus plain | trainings |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, words in SHOWN.items():
        if not (path := RESULTS / name / "table.json").is_file():
            continue
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["cell"]: row for row in table["rows"]}
        real = next(row for row in table["rows"] if row["amount"] is None)
        for plain in (row for cell, row in rows.items() if cell.startswith("plain-")):
            guided = rows[plain["cell"].replace("plain-", "cdp-")]
            threat = table["facts"]["threat"].replace("0.03137", "8/255")
            about = f"{words.format(table['facts']['train'])}, {threat}"
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


PEERS = Path("benchmarks/results/peers.jsonl")
PEER_ROWS = {
    "guidance": ("CDP's guided DDIM (hard negatives, t >= 400)", "times_as_fast"),
    "training": ("EDM-AT's TRADES-10 step, attacked by loss.backward()", "ours/usual"),
    "autoattack": ("the reference AutoAttack, standard", "times_as_fast"),
    "loader": ("all images of an .npz in memory", "times_as_fast"),
}
"""Row of benchmarks/peers.py -> the peer, and the ratio that is shown."""


def side_by_side() -> str:
    """The peers' loops and ours: of each row the last line that has it."""
    rows: dict[str, tuple[dict, dict]] = {}
    for line in PEERS.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        rows |= {name: (found, row) for name, row in found["rows"].items()}
    lines = [
        "",
        "Above 1: ours is faster; median, least and largest of the rounds.",
        "",
        "| peer | equal results | times as fast | rounds | what ours spends its time on | measured |",
        "| --- | --- | --- | ---: | --- | --- |",
    ]
    for name, (peer, ratio) in PEER_ROWS.items():
        if name not in rows:
            lines.append(f"| {peer} | | not yet measured | | | |")
            continue
        found, row = rows[name]
        where = f"{found['machine']}, threads: {found['threads']}, {found['date']}, commit {found['commit'][:7]}"
        if not row["equal"]:
            lines.append(f"| {peer} | **no** | not measured: results differ | | | {where} |")
            continue
        speed = row["times_as_fast"] if ratio == "times_as_fast" else row["times_as_fast"][ratio]
        equal = f"to {row['difference']:.0e}" if "difference" in row else f"{row.get('agreement', 1):.0%}"
        taken = row.get("costs_of_ours", [])  # of a run with --profile
        costs = ", ".join(f"{cost['operation'].removeprefix('aten::')} {cost['share']:.0%}" for cost in taken)
        ratio_words = f"{speed['median']} ({speed['min']} to {speed['max']})"
        lines.append(f"| {peer} | {equal} | {ratio_words} | {found['rounds']} | {costs} | {where} |")
    return "\n".join(lines) + "\n"


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
    begin, end = "<!-- peers -->\n", "\n<!-- end -->"
    before, rest = text.split(begin)
    text = before + begin + side_by_side() + end + rest.split(end, 1)[1]
    PAGE.write_text(text, encoding="utf-8")


main()
