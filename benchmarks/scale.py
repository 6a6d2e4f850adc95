"""From one worker to a thousand: what is measured on this machine, and a simulation with those constants.

  efficiency   images a second of 1 and of 2 workers of the local engine, and of 2 processes that know nothing of each
               other, side by side in rounds; a small U-Net, so that a block takes about a second
  constants    spread of a block's seconds (standard deviation over mean), seconds until the first worker is at work
  overhead     seconds per item besides the work, of a fleet of workers that do nothing: local and, where installed, Ray
  write        seconds in which a block of images is put into a store
  memory       peak memory of the process that hands items out, at 10,000 and at 1,000,000 items, and of one that asks
               a store of 1 million to 1 billion images for its missing blocks
  simulate     1 to 1,024 workers, 1 million to 1 billion images: hours, worker-hours, blocks lost, files

    python benchmarks/scale.py [PART ...] [--rounds 3] [--rate 0.87] [--price 0.05] [--out FILE]

--rate: images a second of one worker, for the simulation (default: what a CPU core measured, benchmarks/guidance.py);
--price: dollars of a worker-hour. Each part appends a JSON line with date, commit and machine.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch

from gambeson.data.writing import StoreWriter
from gambeson.fleet import Fleet, Here, Local, Tool
from gambeson.models.denoiser import EDM, NetworkDenoiser
from gambeson.models.unet import UNetSpec
from gambeson.processes import cores, peak_memory_mb
from gambeson.sampling.levels import karras_sigmas
from gambeson.sampling.samplers import Heun
from gambeson.sampling.walk import final

BLOCK, SIDE = 32, 16
PARTS = ("efficiency", "constants", "overhead", "write", "memory", "simulate")
FAILURES = 0.01
"""Of a worker, in an hour."""
IMAGES_PER_BLOCK = 4096
"""Of a store of millions of images."""
DRIVER_MB, DRIVER_BYTES = 257.0, 61.0
"""Memory of the process that hands blocks out: without a block, and for each one that is missing (part memory)."""


def open_sampler(steps: int) -> Tool:
    """A small U-Net that makes a block in about a second."""
    torch.set_num_threads(1)
    spec = UNetSpec(width=32)
    denoiser = NetworkDenoiser(
        spec.build(3, 10), EDM(), spec=spec, classes=10, shape=(3, SIDE, SIDE), conditional_only=True
    )
    sigmas = karras_sigmas(steps, sigma_max=80.0)

    @torch.inference_mode()
    def make(block: int) -> int:
        noise = torch.randn(BLOCK, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(block))
        labels = torch.arange(BLOCK) % 10
        images = final(Heun()(denoiser, noise, sigmas, labels=labels)).x
        assert bool(images.isfinite().all())
        return block

    return make


def open_nothing() -> Tool:
    """A tool that does nothing."""
    return lambda item: item


def seconds_of(fleet: Fleet, open_tool: Callable[..., Tool], arguments: tuple[Any, ...], items: range) -> float:
    """From the first item that is done to the last: without what starting the workers takes."""
    began, first = 0.0, 0
    for place, _ in enumerate(fleet.each(open_tool, arguments, iter(items))):
        if place == warm(fleet) - 1:
            began, first = time.perf_counter(), place + 1
    return (time.perf_counter() - began) / (len(items) - first)


def warm(fleet: Fleet) -> int:
    """Items until every worker has done one."""
    return 2 * fleet.workers if isinstance(fleet, Local) else 2


def efficiency(asked: argparse.Namespace) -> dict[str, Any]:
    """Images a second, by round."""
    steps, blocks = (3, 8) if asked.quick else (18, 24)
    found: dict[str, list[float]] = {"one": [], "two": [], "apart": []}
    for _ in range(asked.rounds):
        found["one"].append(BLOCK / seconds_of(Here(), open_sampler, (steps,), range(blocks)))
        found["two"].append(BLOCK / seconds_of(Local(2), open_sampler, (steps,), range(2 * blocks)))
        found["apart"].append(apart(steps, blocks))
    over_one = [two / one for two, one in zip(found["two"], found["one"], strict=True)]
    over_apart = [two / both for two, both in zip(found["two"], found["apart"], strict=True)]
    return {"images_per_second": found, "two_over_one": over_one, "two_over_two_apart": over_apart}


def apart(steps: int, blocks: int) -> float:
    """Images a second of two processes that know nothing of each other, while both are at work."""
    words = [sys.executable, __file__, "--alone", str(steps), str(blocks)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [list(map(float, process.communicate()[0].split())) for process in both]
    first, last = max(times[0] for times in ends), min(times[-1] for times in ends)
    rates = []
    for times in ends:
        inside = [t for t in times if first <= t <= last]
        rates.append(BLOCK * (len(inside) - 1) / (inside[-1] - inside[0]))
    return sum(rates)


def overhead(asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per item, by engine."""
    fleets: dict[str, Fleet] = {"local, 2 workers": Local(2)}
    told: dict[str, list[float] | str] = {}
    try:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        from scale import open_nothing as importable  # by a name that Ray's workers know as well

        from gambeson.cluster import Ray, reached

        with reached(None, 2) as address:
            ray = Ray(address=address, workers=2)
            told = {"ray, 2 workers": [1e3 * seconds_of(ray, importable, (), range(1000)) for _ in range(asked.rounds)]}
    except (ImportError, ValueError) as error:
        told["ray"] = f"not measured: {error}"
    for name, fleet in fleets.items():
        told[name] = [1e3 * seconds_of(fleet, open_nothing, (), range(2000)) for _ in range(asked.rounds)]
    return {"milliseconds_per_item": told}


def constants(asked: argparse.Namespace) -> dict[str, Any]:
    """Of 2 workers of the local engine, by round."""
    spreads, starts = [], []
    for _ in range(asked.rounds):
        began = time.perf_counter()
        found = []
        for done in Local(2).each(open_sampler, (3 if asked.quick else 18,), iter(range(24))):
            found.append((time.perf_counter() - began, done.seconds))
        times = [seconds for _, seconds in found[2:]]
        spreads.append(stdev(times) / fmean(times))
        starts.append(found[0][0] - found[0][1])
    return {"spread": spreads, "start_seconds": starts}


def write(asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a block of so many images of 32 x 32 x 3 numbers."""
    return {"seconds_per_block": {f"{size:,} images": _written(size, asked.rounds) for size in (512, IMAGES_PER_BLOCK)}}


def _written(size: int, rounds: int) -> list[float]:
    images, found = np.random.default_rng(0).integers(0, 256, (size, 32, 32, 3), np.uint8), []
    labels = np.zeros(size, np.int64)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            writer, began = StoreWriter(root=Path(folder), blocks=8, blocks_per_shard=4), time.perf_counter()
            for block in range(8):
                writer.put(block, images, labels)
            found.append((time.perf_counter() - began) / 8)
    return found


def memory(asked: argparse.Namespace) -> dict[str, Any]:
    """Peak MB of a process that hands out so many items to 2 workers; of one that asks which blocks of a store are
    missing, by images."""
    items = (10_000, 1_000_000) if not asked.quick else (1_000, 10_000)
    images = (10**6, 10**8, 10**9) if not asked.quick else (10**6, 10**7)
    told = {f"{count:,} items handed out": peak_of("--hand-out", count) for count in items}
    told |= {f"missing blocks of {count:,} images": peak_of("--missing", count) for count in images}
    return {"peak_mb": told}


def peak_of(option: str, count: int) -> float:
    """What a process of its own prints."""
    words = [sys.executable, __file__, option, str(count)]
    return float(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)


def alone(asked: argparse.Namespace) -> bool:
    """What a process of its own does for the parts above; whether it was asked to."""
    if asked.alone is not None:
        make = open_sampler(asked.alone[0])
        for block in range(asked.alone[1]):
            make(block)
            print(time.time())
    elif asked.hand_out is not None:
        for _ in Local(2).each(open_nothing, (), iter(range(asked.hand_out))):
            pass
        print(peak_memory_mb())
    elif asked.missing is not None:
        blocks = math.ceil(asked.missing / IMAGES_PER_BLOCK)
        with tempfile.TemporaryDirectory() as folder:
            assert len(StoreWriter(root=Path(folder), blocks=blocks, blocks_per_shard=16).missing()) == blocks
        print(peak_memory_mb())
    return any(value is not None for value in (asked.alone, asked.hand_out, asked.missing))


def simulate(asked: argparse.Namespace) -> dict[str, Any]:
    """Rows: images, workers, hours, ..."""
    constants = {
        "seconds_per_block": IMAGES_PER_BLOCK / asked.rate,
        "spread": asked.spread,  # standard deviation over mean of a block's time
        "write_seconds": asked.write_seconds,
        "start_seconds": asked.start_seconds,
        "overhead_seconds": asked.overhead_seconds,
        "failures_per_hour": FAILURES,
    }
    rows = []
    for images in (10**6, 10**7, 10**8, 10**9):
        for workers in (1, 4, 16, 64, 256, 1024):
            rows.append({"images": images, "workers": workers, **simulated(images, workers, constants, asked.price)})
    return {"constants": constants, "rows": rows}


def simulated(images: int, workers: int, constants: dict[str, float], price: float) -> dict[str, Any]:
    """One fleet at work: blocks go to whoever is free, a failed worker loses its block and starts anew.

    Block times are lognormal, failures exponential; every event is drawn, none averaged.
    """
    draw, blocks = np.random.default_rng([images, workers]), math.ceil(images / IMAGES_PER_BLOCK)
    spread = math.sqrt(math.log1p(constants["spread"] ** 2))
    mean, rest = constants["seconds_per_block"], constants["write_seconds"] + constants["overhead_seconds"]
    times = iter(draw.lognormal(math.log(mean) - spread**2 / 2, spread, blocks + blocks // 2 + 100 * workers) + rest)
    lives = draw.exponential(3600 / constants["failures_per_hour"], workers)
    free = [(constants["start_seconds"], worker) for worker in range(min(workers, blocks))]
    heapq.heapify(free)
    ends, left, lost, busy = 0.0, blocks, 0, 0.0
    while left:
        now, worker = heapq.heappop(free)
        took = next(times)
        if now + took > lives[worker]:  # it fails on the way: the block is another's, it starts again
            lost += 1
            now = max(now, lives[worker]) + constants["start_seconds"]
            lives[worker] = now + draw.exponential(3600 / constants["failures_per_hour"])
            heapq.heappush(free, (now, worker))
            continue
        left, busy, ends = left - 1, busy + took, max(ends, now + took)
        heapq.heappush(free, (now + took, worker))
    paid = min(workers, blocks) * ends / 3600
    shards = math.ceil(blocks / (16 if images < 10**9 else 160))
    return {
        "hours": ends / 3600,
        "worker_hours": paid,
        "dollars": paid * price,
        "busy": busy / (min(workers, blocks) * ends),
        "blocks": blocks,
        "blocks_lost": lost,
        "files": 3 * shards + 2,
        "gigabytes": images * 3075 / 1e9,
        "driver_mb": DRIVER_MB + blocks * DRIVER_BYTES / 1e6,
    }


def lines(name: str, found: dict[str, Any]) -> Iterator[str]:
    """A part's result for a person."""
    if name == "efficiency":
        for ratio in ("two_over_one", "two_over_two_apart"):
            values = found[ratio]
            yield f"{ratio.replace('_', ' ')}: {median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    elif name == "simulate":
        yield "      images workers      hours  worker-h    busy   lost    files       GB   driver"
        for row in found["rows"]:
            yield (
                f"{row['images']:12,} {row['workers']:7,} {row['hours']:10,.2f} {row['worker_hours']:9,.0f} "
                f"{row['busy']:7.1%} {row['blocks_lost']:6,} {row['files']:8,} {row['gigabytes']:8,.0f} "
                f"{row['driver_mb']:5,.0f} MB"
            )
    else:
        yield f"{name}: {json.dumps(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.87)
    parser.add_argument("--price", type=float, default=0.05)
    parser.add_argument("--spread", type=float, default=0.11)
    parser.add_argument("--write-seconds", type=float, default=0.03)
    parser.add_argument("--start-seconds", type=float, default=30.0)
    parser.add_argument("--overhead-seconds", type=float, default=0.001)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.jsonl"))
    parser.add_argument("--alone", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--hand-out", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--missing", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if alone(asked):
        return
    unknown = sorted(set(asked.parts) - set(PARTS))
    if unknown:
        parser.error(f"parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    for name in asked.parts:
        found = globals()[name](asked)
        print(*lines(name, found), sep="\n", flush=True)
        machine = f"{platform.machine()}, {cores()} cores"
        about = {
            "part": name,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit,
            "machine": machine,
        }
        with open(asked.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({**about, **found}) + "\n")


if __name__ == "__main__":
    main()
