"""How fast adversarial training is: TRADES-10 on WRN-28-10, ours beside the usual research loop, interleaved, one run.

The number matters because training the classifier is the costliest thing that users repeat: what is gained here they
gain in every arm and seed. The rows change one thing at a time, from the usual loop to ours: the operations left out,
bfloat16, channels last, torch.compile. Forward-equivalents are counted, not claimed; utilisation is measured against
the fastest large products of the same precision; the loader is timed alone on a store on disk.

    python benchmarks/training.py [--device cuda] [--batch 1024] [--compile]
    python benchmarks/training.py --short-run [--device cuda] [--data-root DIR]    the same accuracy, both loops

Each section prints all that is known so far as one JSON object; the last line is the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from loops import ROWS, Bench, Steps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gambeson.data.datasets import ImageSet, Split, load
from gambeson.data.synthetic import StoreWriter, SyntheticStore
from gambeson.errors import UserError
from gambeson.models.wideresnet import WideResNet, WideResNetSpec
from gambeson.report.statistics import mean_accuracy, paired_difference
from gambeson.robustness.attacks import PGD
from gambeson.robustness.losses import TRADES
from gambeson.robustness.verdicts import robust_after
from gambeson.threat import ThreatModel
from gambeson.training.loop import Optimisation

STORED, REAL = 20_000, 10_000
"""Synthetic images on disk and real ones in memory."""
DATA_SHEET = {"H200": {"bfloat16": 989.5, "tf32": 494.7, "float32": 66.9}}
"""Dense TFLOP/s that NVIDIA's data sheet (H200 SXM) names; with sparsity it prints twice the first two."""


def random_set(count: int, side: int = 32) -> ImageSet:
    """Random images in memory; time does not depend on what they show."""
    g = torch.Generator().manual_seed(0)
    split = Split(torch.rand(count, 3, side, side, generator=g), torch.randint(10, (count,), generator=g))
    names = tuple(map(str, range(10)))
    return ImageSet(name="random", train=split, validation=split, test=split, class_names=names, flip_safe=True)


def random_store(folder: Path, count: int, side: int = 32) -> SyntheticStore:
    """Random images in a store on disk, two shards."""
    g, blocks = np.random.default_rng(0), 4
    writer = StoreWriter(root=folder, blocks=blocks, blocks_per_shard=2)
    (folder / "blocks").mkdir(parents=True)
    (folder / "shards").mkdir()
    for block in range(blocks):
        images = g.integers(0, 256, (count // blocks, side, side, 3), dtype=np.uint8)
        writer.put(block, images, g.integers(0, 10, count // blocks))
    writer.finish({"benchmark": "training"})
    return SyntheticStore.open(folder)


class Counted(TorchDispatchMode):
    """Counts what convolutions and matrix products do inside, by torch's own formulas, gradients included.

    torch's FlopCounterMode also tracks modules, which does not go with autograd.grad for an image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, formula = func(*args, **(kwargs or {})), flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def forward_flops(model: WideResNet, side: int) -> float:
    """Floating-point operations of one image's forward pass: 2 for each multiply-add of convolutions and matrices."""
    with Counted() as counted, torch.no_grad():
        model(torch.rand(1, model.channels, side, side))
    return counted.flops


def peak_tflops(device: str, kind: str) -> float:
    """TFLOP/s of a large product of random matrices, or of a large convolution where that is faster (CPU only).

    kind: float32, tf32 (CUDA) or bfloat16. torch's float32 products on AMD processors run at half the rate of oneDNN's
    direct convolutions (chosen where gradients are asked for), so that they would be no ceiling.
    """
    on_gpu = device.startswith("cuda")
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    dtype, side = torch.bfloat16 if kind == "bfloat16" else torch.float32, 8192 if on_gpu else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    maps, filters = torch.randn(16, 640, 8, 8).to(dtype), torch.randn(640, 640, 3, 3).to(dtype).requires_grad_()

    def rate(work: Callable[[], torch.Tensor], operations: float) -> float:
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        return operations / (time.perf_counter() - start) / 1e12

    found = [rate(lambda: torch.mm(a, b), 2 * side**3) for _ in range(8)]
    if not on_gpu:
        found += [rate(lambda: F.conv2d(maps, filters, padding=1), 2 * 16 * 64 * 9 * 640**2) for _ in range(8)]
    return max(found)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest, three digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.3g}") for name, value in found.items()}


@dataclass
class Timed:
    """A row under way."""

    steps: Steps
    equivalents: float
    first: float
    activations_mb: float | None  # largest growth of the device's memory in a step, above networks and momenta
    seconds: list[float]


def warmed(bench: Bench, name: str, unit: float) -> Timed:
    """A row after its first step, whose operations are counted; on a GPU after a second one, whose memory is."""
    bench.settings(ROWS[name])
    _, steps = bench.training(name, 0)
    start = time.perf_counter()
    with nullcontext(Counted()) if ROWS[name].compiled else Counted() as counter:
        next(steps)
    bench.wait()
    first, used = time.perf_counter() - start, None
    if bench.on_gpu:  # once more: cudnn.benchmark has chosen, the allocator has grown
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        next(steps)
        bench.wait()
        used = (torch.cuda.max_memory_allocated() - held) / 2**20
    return Timed(steps, counter.flops / unit / bench.plan.batch_size, first, used, [])


def interleave(bench: Bench, rows: dict[str, Timed], rounds: int, each: int) -> None:
    """Times `each` steps of every row in turn, `rounds` times; every second round backwards."""
    for turn in range(rounds):
        for name in list(rows)[:: -1 if turn % 2 else 1]:
            bench.settings(ROWS[name])
            bench.wait()
            start = time.perf_counter()
            for _ in range(each):
                next(rows[name].steps)
            bench.wait()
            rows[name].seconds.append((time.perf_counter() - start) / each)


def told(bench: Bench, rows: dict[str, Timed], unit: float, peaks: dict[str, float]) -> dict[str, Any]:
    """Images per second of each row, utilisation, ratios round by round."""
    found: dict[str, Any] = {}
    counted = rows["ours"].equivalents if "ours" in rows else 27.0
    for name, row in rows.items():
        half = ROWS[name].precision == "bfloat16"
        kind = "bfloat16" if half else "tf32" if ROWS[name].usual and bench.on_gpu else "float32"
        equivalents = row.equivalents or counted  # a compiled network is not counted: the same loop is
        rates = [bench.plan.batch_size / s for s in row.seconds]
        used = statistics.median(rates) * equivalents * unit / 1e12
        found[name] = {
            "images_per_second": spread(rates),
            "forward_equivalents": round(equivalents, 2),
            "tflops": float(f"{used:.3g}"),
            "utilisation": round(used / peaks[kind], 3),
            "of_peak": kind,
            "first_step_seconds": round(row.first, 1),
            "activations_mb": row.activations_mb and round(row.activations_mb),
        }
    return found


def ratios(rows: dict[str, Timed]) -> dict[str, dict[str, float]]:
    """How many times as fast as each usual loop each of ours is, round by round."""
    return {
        f"{name}/{base}": spread([b / s for b, s in zip(rows[base].seconds, row.seconds, strict=True)])
        for base in ("usual", "usual_grad", "ours")
        if base in rows
        for name, row in rows.items()
        if name not in (base, "usual") and (base != "ours" or ROWS[name].compiled)
    }


def loader(bench: Bench, trained: float) -> dict[str, float]:
    """Images per second of the batches alone, and how often that feeds `trained` images per second."""
    batches = bench.batches(0)
    for step in range(3):
        batches(step)
    rates = []
    for turn in range(5):
        start = time.perf_counter()
        count = max(8192 // bench.plan.batch_size, 1)
        for step in range(count):
            batches(100 + turn * count + step)
        rates.append(count * bench.plan.batch_size / (time.perf_counter() - start))
    return {**spread(rates), "ratio_to_training": round(statistics.median(rates) / trained, 1)}


def speed(asked: argparse.Namespace, folder: Path, facts: dict[str, Any]) -> None:
    """Fills `facts` section by section and prints them after each."""
    on_gpu = asked.device != "cpu"
    each, rounds = (4, asked.rounds or 6) if on_gpu else (1, asked.rounds or 3)
    plan = Optimisation(steps=100_000, batch_size=asked.batch or (1024 if on_gpu else 16), learning_rate=1e-4)
    network = WideResNetSpec(depth=asked.depth, width=asked.width)
    loss = TRADES(threat=ThreatModel(), steps=asked.inner, label_smoothing=0.1)
    store = random_store(folder / "store", STORED)
    bench = Bench(asked.device, network, plan, loss, random_set(REAL), store, folder)
    unit = forward_flops(network.build(3, 10), 32)
    kinds = ("float32", "bfloat16", *["tf32"] * on_gpu)
    peaks = {kind: peak_tflops(asked.device, kind) for kind in kinds}
    names = [n for n in asked.rows.split(",") if n] or [n for n, row in ROWS.items() if not row.compiled]
    rows = {n: warmed(bench, n, unit) for n in names if on_gpu or ROWS[n].repeatable}
    interleave(bench, rows, rounds, each)
    peaks = {kind: max(before, peak_tflops(asked.device, kind)) for kind, before in peaks.items()}
    sheet = next((rates for chip, rates in DATA_SHEET.items() if chip in facts["machine"]), None)
    facts |= {
        "batch": plan.batch_size,
        "network": f"WRN-{asked.depth}-{asked.width}",
        "inner_steps": asked.inner,
        "steps_timed": rounds * each,
        "forward_gflops": round(unit / 1e9, 3),
        "peak_tflops": {kind: round(value, 3) for kind, value in peaks.items()},
        "data_sheet_tflops": sheet,
        "rows": told(bench, rows, unit, peaks),
        "ratios": ratios(rows),
    }
    print(json.dumps(facts), flush=True)
    if "ours" in rows:
        facts["loader"] = loader(bench, facts["rows"]["ours"]["images_per_second"]["median"])
        print(json.dumps(facts), flush=True)
    if asked.compile:
        rows = {"ours": Timed(rows["ours"].steps, rows["ours"].equivalents, rows["ours"].first, None, [])}
        rows["ours_compiled"] = warmed(bench, "ours_compiled", unit)
        interleave(bench, rows, rounds, each)
        facts["compiled"] = {"rows": told(bench, rows, unit, peaks), "ratios": ratios(rows)}


def problem(asked: argparse.Namespace, folder: Path) -> Bench:
    """The short run's: CIFAR-10 and WRN-28-10 on a GPU; else 1,000 of its images at 16x16, or digits, and WRN-10-2."""
    on_gpu = asked.device != "cpu"
    if asked.data_root:
        os.environ["GAMBESON_DATA"] = asked.data_root
    try:
        data = load("cifar10", validation_images=2000) if on_gpu else load("cifar10-16", validation_images=4000)
        threat = ThreatModel()
    except UserError:  # it is not there
        data, threat = load("digits", train_images=300, validation_images=1400), ThreatModel(epsilon=0.15)
    small = WideResNetSpec(depth=10, width=2, mean=(0.5,), std=(0.25,))
    batch, steps = (256, 300) if on_gpu else (128, 150)
    plan = Optimisation(steps=asked.steps or steps, batch_size=asked.batch or batch, learning_rate=0.1)
    loss = TRADES(threat=threat, steps=asked.inner, step_size=threat.epsilon / 4, label_smoothing=0.1)
    return Bench(asked.device, WideResNetSpec() if on_gpu else small, plan, loss, data, None, folder)


def trained(bench: Bench, name: str, seed: int) -> tuple[np.ndarray, float]:
    """Which held-out images (the validation part) one training withstands PGD-20 on, and its seconds."""
    bench.settings(ROWS[name])
    model, training = bench.training(name, seed)
    start = time.perf_counter()
    for _ in training:
        pass
    bench.wait()
    seconds, held, threat = time.perf_counter() - start, bench.real.validation, bench.loss.threat
    attack = PGD(threat=threat, steps=20, restarts=1)
    robust = robust_after(attack, model, held.images.to(bench.device), held.labels.to(bench.device), batch_size=500)
    return robust.cpu().numpy(), seconds


def short_run(asked: argparse.Namespace, folder: Path, facts: dict[str, Any]) -> None:
    """Fills `facts` with both loops' robust accuracy on the same small problem, and the paired difference."""
    bench = problem(asked, folder)
    names = [n for n in asked.rows.split(",") if n] or ["usual_grad", "ours_as_usual"]
    found: dict[str, np.ndarray] = {}
    spec = bench.network
    facts |= {"data": bench.real.name, "network": f"WRN-{spec.depth}-{spec.width}", "seeds": asked.seeds, "rows": {}}
    facts |= {"batch": bench.plan.batch_size, "steps": bench.plan.steps, "inner_steps": asked.inner}
    for name in names:
        runs = [trained(bench, name, seed) for seed in range(asked.seeds)]
        found[name] = np.stack([robust for robust, _ in runs])
        each = {"each_seed": found[name].mean(1).tolist(), "seconds": [round(s, 1) for _, s in runs]}
        facts["rows"][name] = vars(mean_accuracy(found[name])) | each
        if name != names[0]:
            difference = paired_difference(found[name], found[names[0]])
            facts["rows"][name] |= {"minus_first": vars(difference), "shown": difference.shown}
        print(json.dumps(facts), flush=True)


def commit() -> str:
    """The commit that is measured; where there is no git, what GAMBESON_COMMIT says."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return found or os.environ.get("GAMBESON_COMMIT", "")


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--device", default="cpu")
    reader.add_argument("--batch", type=int, default=0, help="default 16, on a GPU 1024")
    reader.add_argument("--threads", type=int, default=2, help="on a CPU")
    reader.add_argument("--rounds", type=int, default=0, help="default 3 of one step each, on a GPU 6 of four")
    reader.add_argument("--rows", default="", help=f"some of {', '.join(ROWS)}; default all but the compiled one")
    reader.add_argument("--compile", action="store_true", help="then ours compiled beside ours")
    reader.add_argument("--depth", type=int, default=28)
    reader.add_argument("--width", type=int, default=10)
    reader.add_argument("--inner", type=int, default=10, help="steps of the inner attack")
    reader.add_argument("--short-run", action="store_true", help="robust accuracy of both loops in place of speed")
    reader.add_argument("--data-root", default="", help="where CIFAR-10 lies (default $GAMBESON_DATA or ./data)")
    reader.add_argument("--steps", type=int, default=0, help="of the short run: default 150, on a GPU 300")
    reader.add_argument("--seeds", type=int, default=2, help="of the short run")
    asked = reader.parse_args()
    on_gpu = asked.device != "cpu"
    if not on_gpu:
        torch.set_num_threads(asked.threads)
    facts: dict[str, Any] = {
        "benchmark": "training_short_run" if asked.short_run else "training",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {asked.threads} threads",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    with tempfile.TemporaryDirectory() as folder:
        (short_run if asked.short_run else speed)(asked, Path(folder), facts)
    print(json.dumps(facts | {"load_after": round(os.getloadavg()[0], 2)}))


if __name__ == "__main__":
    main()
