"""What contrastive guidance costs: guided over unguided time per image on networks of CIFAR-10 size, ratios in one run.

The number matters because generation is the longest stage of a run: a guidance that doubles it has to be worth twice
the images. Measured with the 36M-parameter U-Net and the WRN-28-10 encoder (time does not depend on their weights):
the authors' preset (quadratic 200-step DDIM, 58 of 187 steps guided), `cdp-fast` (18-step Heun), and beside the first
the authors' own scheme re-stated: both views encoded anew, backward into both and into the encoder's parameters.

    python benchmarks/guidance.py [--device cuda] [--batch N] [--whole]

Without --whole each schedule is thinned (every 8th step of the 187, guided or not as in the whole) and the time of
whole trajectories is put together from the medians of the guided, unguided and window-opening steps; with it, whole
trajectories are timed as they are. Then: images per second of the samplers, and peak memory against steps and blocks.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gambeson.models.denoiser import EDM, VP, NetworkDenoiser
from gambeson.models.unet import UNetSpec
from gambeson.models.wideresnet import WideResNet
from gambeson.recipes.presets import preset
from gambeson.sampling.guidance import Contrastive, ContrastiveGuidance
from gambeson.sampling.levels import NoiseLevels, TimestepLevels
from gambeson.sampling.samplers import DDIM, DPMSolverPP, Heun
from gambeson.store import peak_memory_mb, reset_peak_memory
from gambeson.synthesis.generation import Generation
from gambeson.types import Guidance, Sampler, Step

THIN = 8


class AuthorsScheme:
    """CDP's code as METHOD 1.2 describes it, for its cost: nothing is kept from step to step, nothing is frozen."""

    def __init__(self, spec: Contrastive, encoder: WideResNet) -> None:
        self.spec, self.encoder = spec, encoder

    def init(self, block: int, generator: torch.Generator | None = None) -> None:
        """Nothing to keep."""

    def __call__(self, state: None, step: Step) -> tuple[Tensor | None, None]:
        """The shift, by one backward through both views and into the encoder's parameters."""
        if step.previous is None or not self.spec.window.contains(step.scheduled):
            return None, None
        self.encoder.requires_grad_(True)
        views = [self.spec.features.variable(s).detach().requires_grad_() for s in (step, step.previous)]
        with torch.enable_grad():
            query, positive = (F.normalize(self.encoder.features(view), dim=1) for view in views)
            self.spec.losses(query, positive, None, None).mean().backward()
        self.encoder.zero_grad(set_to_none=True)
        self.encoder.requires_grad_(False)
        gradient = views[0].grad
        assert gradient is not None
        return self.spec.multiple(step.sigma, step.scheduled) * gradient, None


@dataclass(frozen=True)
class Bench:
    """Networks and batch, on their device."""

    device: str
    batch: int
    vp: NetworkDenoiser
    edm: NetworkDenoiser
    encoder: WideResNet

    @staticmethod
    def build(device: str, batch: int) -> Bench:
        """The 36M U-Net under both preconditionings, and the encoder."""
        spec = UNetSpec.cifar10()
        network = spec.build(3, 10).to(device)
        parts: dict[str, Any] = {"spec": spec, "classes": 10, "shape": (3, 32, 32), "conditional_only": True}
        vp, edm = (NetworkDenoiser(network, p, **parts).eval().requires_grad_(False) for p in (VP(), EDM()))
        return Bench(device, batch, vp, edm, WideResNet().to(device).eval().requires_grad_(False))

    def walk(
        self, sampler: Sampler, denoiser: NetworkDenoiser, sigmas: Tensor, guidance: Guidance | None
    ) -> Iterator[Step]:
        """One batch from noise to images."""
        noise = torch.randn(self.batch, *denoiser.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        labels = (torch.arange(self.batch) % 10).to(self.device)
        return sampler(denoiser, noise, sigmas, guidance, labels=labels)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def step_seconds(self, walk: Iterator[Step]) -> list[float]:
        """Seconds of each step of a walk, in order."""
        seconds, start = [], time.perf_counter()
        for _ in walk:
            self.wait()
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        return seconds[:-1]  # the last Step is the sample itself, at sigma 0


def thinned(sigmas: Tensor, every: int) -> Tensor:
    """Every n-th sigma, and the 0."""
    return torch.cat([sigmas[:-1][::every], sigmas[-1:]])


def kinds(spec: Contrastive, sigmas: Tensor) -> list[str]:
    """What each step of a schedule is: 'plain', 'opening' (its previous step is encoded too) or 'guided'."""
    inside = [i > 0 and spec.window.contains(s) for i, s in enumerate(sigmas[:-1].tolist())]
    return [
        "plain" if not now else "guided" if before else "opening"
        for before, now in zip([False, *inside[:-1]], inside, strict=True)
    ]


def trajectory(seconds: dict[str, list[float]], whole: list[str]) -> float:
    """Seconds of a whole trajectory, from the medians of its kinds of steps."""
    medians = {kind: statistics.median(values) for kind, values in seconds.items() if values}
    medians.setdefault("guided", medians.get("opening", 0.0))
    return sum(medians[kind] for kind in whole)


def compare(
    bench: Bench,
    sampler: Sampler,
    denoiser: NetworkDenoiser,
    sigmas: Tensor,
    every: int,
    guidances: dict[str, Any],
    rounds: int,
) -> dict[str, float]:
    """Seconds of a whole trajectory for each guidance (None: unguided), walked in turn, `rounds` times."""
    spec: Contrastive = next(g.spec for g in guidances.values() if g is not None)
    short, whole = thinned(sigmas, every), kinds(spec, sigmas)
    measured: dict[str, dict[str, list[float]]] = {
        n: {k: [] for k in ("plain", "opening", "guided")} for n in guidances
    }
    for _ in range(rounds):
        for name, guidance in guidances.items():
            for kind, seconds in zip(
                kinds(spec, short), bench.step_seconds(bench.walk(sampler, denoiser, short, guidance)), strict=True
            ):
                measured[name]["plain" if guidance is None else kind].append(seconds)
    return {
        n: trajectory(m, whole if guidances[n] is not None else ["plain"] * len(whole)) for n, m in measured.items()
    }


def peak_mb(device: str, work: Callable[[], None]) -> float:
    """Peak memory while working, MB: of the device, or of this process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20
    gc.collect()
    reset_peak_memory()
    work()
    return peak_memory_mb()


def memory(bench: Bench) -> dict[str, float]:
    """Peak memory of a guided walk over 6 steps, then over 24, then of two walks more: it must not grow."""
    chosen = preset("cdp-cifar10-infonce").generation
    guidance = ContrastiveGuidance(chosen["guidance"], bench.encoder.features)
    levels: TimestepLevels = chosen["levels"]

    def walk(steps: int, times: int) -> Callable[[], None]:
        sigmas = replace(levels, steps=steps).sigmas()
        return lambda: (
            [bench.step_seconds(bench.walk(DDIM(vp_start=True), bench.vp, sigmas, guidance)) for _ in range(times)]
            and None
        )

    return {
        "peak_mb_6_steps": peak_mb(bench.device, walk(6, 1)),
        "peak_mb_24_steps": peak_mb(bench.device, walk(24, 1)),
        "peak_mb_2_more_blocks": peak_mb(bench.device, walk(6, 2)),
    }


def rates(bench: Bench, every: int) -> dict[str, float]:
    """Unguided images per second of whole trajectories."""
    quad = TimestepLevels(kind="quad", steps=200).sigmas()
    plans = {
        "ddim_200": (DDIM(vp_start=True), bench.vp, quad, every),
        "heun_18": (Heun(), bench.edm, NoiseLevels(steps=18).sigmas(), 1),
        "dpm_solver_pp_10": (DPMSolverPP(), bench.edm, NoiseLevels(steps=10).sigmas(), 1),
    }
    found = {}
    for name, (sampler, denoiser, sigmas, thin) in plans.items():
        seconds = bench.step_seconds(bench.walk(sampler, denoiser, thinned(sigmas, thin), None))
        total = statistics.median(seconds) * (len(sigmas) - 1) if thin > 1 else sum(seconds)
        found[name] = bench.batch / total
    return found


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--device", default="cpu")
    reader.add_argument("--batch", type=int, default=0, help="default 16, on a GPU 512")
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--whole", action="store_true", help="time whole trajectories")
    asked = reader.parse_args()
    on_gpu = asked.device != "cpu"
    bench = Bench.build(asked.device, asked.batch or (512 if on_gpu else 16))
    every = 1 if asked.whole else THIN
    authors: Contrastive = preset("cdp-cifar10-infonce").generation["guidance"]
    authors = replace(
        authors, loss=preset("cdp-cifar10-hnm").generation["guidance"].loss
    )  # hard negatives, no embedding
    ours = ContrastiveGuidance(authors, bench.encoder.features)
    quad = preset("cdp-cifar10-hnm").generation["levels"].sigmas()
    list(bench.walk(DDIM(vp_start=True), bench.vp, thinned(quad, 64), ours))  # warm-up
    cost = compare(
        bench,
        DDIM(vp_start=True),
        bench.vp,
        quad,
        every,
        {"unguided": None, "guided": ours, "authors": AuthorsScheme(authors, bench.encoder)},
        asked.rounds,
    )
    fast = preset("cdp-fast").generation
    fast_generation = replace(Generation(guidance=None), **fast)
    fast_cost = compare(
        bench,
        fast_generation.sampler,
        bench.edm,
        fast_generation.levels.sigmas(),
        1,
        {"unguided": None, "guided": ContrastiveGuidance(fast["guidance"], bench.encoder.features)},
        asked.rounds,
    )
    added = (cost["guided"] - cost["unguided"]) / (cost["authors"] - cost["unguided"])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    facts = {
        "benchmark": "guidance",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": machine,
        "torch": torch.__version__,
        "batch": bench.batch,
        "whole": asked.whole,
        "ratio_authors_preset": cost["guided"] / cost["unguided"],
        "ratio_authors_scheme": cost["authors"] / cost["unguided"],
        "added_time_over_authors_scheme": added,
        "ratio_cdp_fast": fast_cost["guided"] / fast_cost["unguided"],
        "seconds": cost | {f"fast_{n}": s for n, s in fast_cost.items()},
        "images_per_second": rates(bench, every),
        "memory": memory(bench),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
