"""The paired difference of two cells of different tables, over the seeds that both have, from the rows that are kept.

    python dev/paired.py benchmarks/results/tables/A/rows/CELL benchmarks/results/tables/B/rows/CELL

Robust points (worst case of APGD-CE and targeted APGD), first minus second, with the tables' 95 % interval. It means
something only where both are of the same test images: their indices and labels must be equal.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gambeson.report.statistics import paired_difference


def rows(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Seed -> index, label and verdict of each test image."""
    found = {}
    for path in sorted(folder.glob("seed-*-test.parquet")):
        table = pq.read_table(path).sort_by("index")
        found[int(path.name.split("-")[1])] = {name: table[name].to_numpy() for name in ("index", "label", "apgd")}
    return found


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    first, second = (rows(Path(word)) for word in sys.argv[1:])
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise SystemExit(f"expected a seed that both have, got {sorted(first)} and {sorted(second)}")
    for seed in seeds:
        if any(not np.array_equal(first[seed][name], second[seed][name]) for name in ("index", "label")):
            raise SystemExit(f"seed {seed}: expected the same test images, got others")
    a, b = (np.stack([one[seed]["apgd"] for seed in seeds]) for one in (first, second))
    found = paired_difference(a, b)
    estimate, low, high = (f"{100 * each:+.1f}" for each in (found.estimate, found.low, found.high))
    levels = f"{100 * a.mean():.1f} and {100 * b.mean():.1f} %"
    print(f"{estimate} ({low} to {high}), {levels}, seeds {seeds}, {a.shape[1]} images, {found.randomness}")


main()
