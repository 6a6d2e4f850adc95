"""Writes the tables of docs/which-images.md from benchmarks/results/selection.jsonl, so that no number there is typed.

python dev/which_images.py          the last line of each base counts; tables stand between marks in the page
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS, PAGE = Path("benchmarks/results/selection.jsonl"), Path("docs/which-images.md")
RULES = ["random", "confidence", "entropy", "margin", "separability", "own centroid", "centroid margin"]
RULES += ["last layer's gradient", "parameters' gradient", "input's gradient", "robust gradient", "discriminator"]
SHOWN = {"FID": "FID", "coverage": "coverage", "recall": "recall", "class separation": "separation"}
SHOWN |= {"copies of train": "copies", "complementarity: held-out": "compl. held-out"}
ROBUST = "transfer of robust accuracy (linf eps 0.15), real minus synthetic"
PREDICTING = ["FID", "KID", "conditional W1 (l2, exact plan)", "excess of conditional W1 (l2, exact plan)", "precision"]
PREDICTING += [
    "recall",
    "density",
    "coverage",
    "complementarity: held-out",
    "coverage of train",
    "coverage of held-out",
]
PREDICTING += ["class separation", "copies of train", "accuracy on real images, trained on synthetic", "ARC", ROBUST]


def of_arms(numbers: dict[str, Any]) -> dict[str, list[Any]]:
    """ "arm, seed" -> number becomes arm -> numbers of its seeds."""
    found: dict[str, list[Any]] = {}
    for key, value in numbers.items():
        found.setdefault(key.rpartition(", seed ")[0], []).append(value)
    return found


def difference(told: list[float] | None) -> str:
    """Estimate and interval in points."""
    return "–" if told is None else f"{told[0]:+.1f} ({told[1]:+.1f} to {told[2]:+.1f})"


def mean(values: list[Any], scale: float = 1.0, digits: int = 2) -> str:
    """Over seeds; a dash where nothing was measured."""
    known = [v for v in values if v is not None]
    return f"{scale * np.mean(known):.{digits}f}" if known else "–"


def sets(result: dict[str, Any], arms: list[str]) -> str:
    """A row for each arm that was trained on."""
    measures, agreed = of_arms(result["measures"]), of_arms(result["agreement"])
    rows = {row["arm"]: row for row in result["accuracies"]}
    head = ["set", "clean %", "robust %", "minus random", "minus real only", *SHOWN.values(), "teacher agrees %"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for arm in (a for a in arms if a in rows):
        row, (low, high) = rows[arm], rows[arm]["interval"]
        cells = [arm, str(row["clean"]), f"{row['test']} ({low}–{high})"]
        cells += [difference(row.get(f"minus {other}")) for other in ("random", "real")]
        cells += [mean([m.get(key) for m in measures[arm]]) for key in SHOWN]
        lines.append("| " + " | ".join([*cells, mean(agreed[arm], 100, 1)]) + " |")
    return "\n".join(lines)


def predictions(result: dict[str, Any]) -> str:
    """Rank correlations of measures with robust accuracy."""
    groups = ("same pool, same number", "all sets at fraction 0.7")
    counts = [len([r for r in result[g] if r["rho"] is not None]) for g in groups]
    small = [sum(r["p"] < 0.05 for r in result[g] if r["rho"] is not None) for g in groups]
    head = [f"selections of one pool ({small[0]} of {counts[0]} numbers with p < .05)"]
    head += [f"all sets at a fraction of .7 ({small[1]} of {counts[1]})"]
    lines = ["| measure | " + " | ".join(head) + " |", "|---|---:|---:|"]
    found = [{r["measure"]: r for r in result[group]} for group in groups]
    for key in (k for k in PREDICTING if all(f.get(k, {}).get("rho") is not None for f in found)):
        few = " (seed 0)" if found[0][key]["seeds"] < result["seeds"] else ""
        lines.append(f"| {key}{few} | " + " | ".join(rank(f[key]) for f in found) + " |")
    return "\n".join(lines)


def rank(row: dict[str, Any]) -> str:
    """rho with interval and p on validation images, and rho on test images."""
    low, high = row["interval"]
    return f"{row['rho']:+.2f} ({low:+.2f} to {high:+.2f}), p {row['p']:.3f}; test {row['rho on test']:+.2f}"


def conditions(result: dict[str, Any]) -> str:
    """IRGD's sufficient conditions."""
    rows, measures = {row["arm"]: row for row in result["accuracies"]}, of_arms(result["measures"])
    lines = ["| set | labels right % | flipped by random changes % | coverage of held-out | robust % at .7 |"]
    lines.append("|---|---:|---:|---:|---:|")
    for arm, found in of_arms(result["conditions"]).items():
        shares = [mean([f[key] for f in found], 100, 1) for key in ("labels right", "flipped by random changes")]
        covered = mean([m["coverage of held-out"] for m in measures[arm]])
        lines.append("| " + " | ".join([arm, *shares, covered, str(rows[arm]["test"])]) + " |")
    return "\n".join(lines)


def main() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    results = {line["base"]["name"]: line for line in lines}
    text = PAGE.read_text(encoding="utf-8")
    for base, result in results.items():
        others = [row["arm"] for row in result["accuracies"] if row["arm"] not in RULES]
        tables = {"rules": sets(result, RULES), "others": sets(result, others), "predicts": predictions(result)}
        tables |= {"conditions": conditions(result)} if result["conditions"] else {}
        for name, table in tables.items():
            begin, end = f"<!-- {base} {name} -->\n", "\n<!-- end -->"
            before, rest = text.split(begin)
            text = before + begin + "\n" + table + "\n" + end + rest.split(end, 1)[1]
    PAGE.write_text(text, encoding="utf-8")


main()
