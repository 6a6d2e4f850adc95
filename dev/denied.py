"""Of the images that each cell of a kept table trains on, how many carry a label that the teacher denies, in percent.

    python dev/denied.py benchmarks/results/tables/cdp-6-digits RUNS

RUNS: the folder the table was made in, with its stages; a line for each cell: the seeds, their mean, and the pool's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def stage(runs: Path, made: dict[str, dict[str, str]], name: str) -> Path:
    """The folder of a stage of a kept row."""
    return runs / "stages" / made[name]["stage"] / made[name]["digest"][:16]


def denied(record: Path, runs: Path) -> tuple[float, float]:
    """Percent of the chosen images, and of all that were generated, that the teacher calls another class."""
    made = json.loads(record.read_text(encoding="utf-8"))["parts"]["test"]["stages"]
    labels = pq.read_table(stage(runs, made, "labelled") / "labels.parquet")
    wrong = np.stack(labels["logits"].to_numpy()).argmax(axis=1) != labels["condition"].to_numpy()
    positions = pq.read_table(stage(runs, made, "chosen") / "chosen.parquet")["position"].to_numpy()
    return 100 * float(wrong[positions].mean()), 100 * float(wrong.mean())


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    table, runs = (Path(word) for word in sys.argv[1:])
    for cell in sorted(path for path in (table / "rows").iterdir() if path.is_dir()):
        found = [denied(record, runs) for record in sorted(cell.glob("seed-?.json"))]
        chosen, pool = np.array(found).T
        each = ", ".join(f"{share:.1f}" for share in chosen)
        print(f"{cell.name}: {chosen.mean():.1f} % ({each}) of those kept, {pool.mean():.1f} % of all generated")


main()
