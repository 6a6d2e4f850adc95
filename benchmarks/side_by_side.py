"""Why arms run side by side in processes of one thread: images per second of TRADES-10 training, both ways, one run.

The number matters because a run is many independent trainings of small networks on few cores. Compared: two processes
of one thread each, and one process of two threads (one after the other, alternating, three rounds each, best of each).
The last line is one JSON object; `ratio` above 1 means side by side is faster.
"""

import json
import multiprocessing
import platform
import subprocess
import time

import torch

from gambeson.recipes import named
from gambeson.threat import ThreatModel

STEPS = 40


def train(threads: int) -> float:
    """Seconds for STEPS TRADES steps of the digits student on random images."""
    from dataclasses import replace

    torch.set_num_threads(threads)
    spec = named("digits").student
    model = spec.network.build(1, 10)
    loss = replace(spec.loss, threat=ThreatModel(epsilon=0.15))
    g = torch.Generator().manual_seed(0)
    images, labels = torch.rand(128, 1, 8, 8, generator=g), torch.randint(10, (128,), generator=g)
    loss(model, images, labels).mean().backward()
    start = time.perf_counter()
    for _ in range(STEPS):
        loss(model, images, labels).mean().backward()
    return time.perf_counter() - start


def main() -> None:
    context = multiprocessing.get_context("spawn")
    apart, together = [], []
    with context.Pool(2) as two, context.Pool(1) as one:
        for _ in range(3):
            apart.append(max(two.map(train, [1, 1], chunksize=1)))
            together.append(one.apply(train, (2,)))
    images = STEPS * 128
    rates = {"two_processes": 2 * images / min(apart), "one_process_two_threads": images / min(together)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()} {multiprocessing.cpu_count()} cores"
    facts = {"benchmark": "side_by_side", "commit": commit, "machine": machine, "date": time.strftime("%Y-%m-%d")}
    ratio = rates["two_processes"] / rates["one_process_two_threads"]
    print(json.dumps({**facts, **{k: round(v) for k, v in rates.items()}, "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    main()
