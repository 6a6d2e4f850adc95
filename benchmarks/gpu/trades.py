"""Entry 2, training: TRADES-10 on WRN-28-10 at batch 1,024, ours beside the re-stated research loop, interleaved.

Images per second, utilisation, memory, ratios round by round (benchmarks/training.py's rows and its way to measure), in
parts that a command finishes one after another: the loops, what deterministic kernels cost, torch.compile, the loader.

    python benchmarks/gpu/trades.py [--batch 1024] [--rounds 6]       3 to 8 minutes on one card (not yet measured)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from entry import Entry, reader_of, run
from loops import ROWS, Bench
from training import (
    DATA_SHEET,
    REAL,
    STORED,
    forward_flops,
    interleave,
    loader,
    peak_tflops,
    random_set,
    random_store,
    ratios,
    told,
    warmed,
)

from gambeson.models.wideresnet import WideResNetSpec
from gambeson.robustness.losses import TRADES
from gambeson.threat import ThreatModel
from gambeson.training.loop import Optimisation

PARTS: dict[str, tuple[str, ...]] = {
    "loops": ("usual", "usual_grad", "ours_as_usual", "ours"),
    "float32": ("usual_grad", "ours_float32"),
    "deterministic": ("ours", "ours_unrepeatable"),
    "compiled": ("ours", "ours_compiled"),
}
"""Rows that are timed in turn."""
PLANNED = ("peak", *PARTS, "loader")


def bench_of(entry: Entry, batch: int, folder: Path) -> Bench:
    """Random images, a store on disk, the network."""
    side, stored, real = (8, 40, 16) if entry.tiny else (32, STORED, REAL)
    network = WideResNetSpec(depth=10, width=1) if entry.tiny else WideResNetSpec()
    plan = Optimisation(steps=100_000, batch_size=8 if entry.tiny else batch, learning_rate=1e-4)
    loss = TRADES(threat=ThreatModel(), steps=2 if entry.tiny else 10, label_smoothing=0.1)
    store = random_store(folder / "store", stored, side=side)
    return Bench(entry.device, network, plan, loss, random_set(real, side=side), store, folder)


def peaks(entry: Entry) -> dict[str, Any]:
    """TFLOP/s of large products; 1 in the tiny form, whose shares say nothing."""
    kinds = ("float32", "bfloat16", *["tf32"] * entry.on_gpu)
    return {"tflops": {kind: 1.0 if entry.tiny else round(peak_tflops(entry.device, kind), 1) for kind in kinds}}


def part(entry: Entry, names: tuple[str, ...], words: argparse.Namespace, tflops: dict[str, float]) -> dict[str, Any]:
    """Rows timed in turn."""
    with tempfile.TemporaryDirectory() as place:
        bench = bench_of(entry, words.batch, Path(place))
        unit = forward_flops(bench.network.build(3, 10), bench.real.shape[1])
        rows = {name: warmed(bench, name, unit) for name in names if entry.on_gpu or ROWS[name].repeatable}
        rounds, each = (1, 1) if entry.tiny else (words.rounds, 4)
        interleave(bench, rows, rounds, each)
        return {"rows": told(bench, rows, unit, tflops), "ratios": ratios(rows), "batch": bench.plan.batch_size}


def feeding(entry: Entry, words: argparse.Namespace, trained: float) -> dict[str, Any]:
    """The loader alone."""
    with tempfile.TemporaryDirectory() as place:
        bench = bench_of(entry, words.batch, Path(place))
        return {"images_per_second": loader(bench, trained)}


def work(entry: Entry, words: argparse.Namespace) -> dict[str, Any]:
    """All parts, as far as the time goes."""
    tflops = entry.row("peak", lambda: peaks(entry))["tflops"]
    for key, names in PARTS.items():
        if entry.tiny and key != "loops":
            continue  # torch.compile alone takes a minute
        known = [entry.rows[k]["took_seconds"] for k in PARTS if k in entry.rows]
        needs = 0.0 if entry.tiny else max(known, default=60.0)
        entry.row(key, lambda n=names: part(entry, n, words, tflops), needs)
    ours = entry.rows["loops"]["rows"]["ours"]["images_per_second"]["median"]
    entry.row("loader", lambda: feeding(entry, words, ours))
    return {"network": "WRN-28-10", "data_sheet_tflops": DATA_SHEET, "ours_over_usual": entry.rows["loops"]["ratios"]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The entry; returns its last line."""
    words = reader_of(__doc__, batch=1024, rounds=6).parse_args(argv)
    return run("trades", words, work, ("peak", "loops", "loader") if words.tiny else PLANNED)


if __name__ == "__main__":
    main()
