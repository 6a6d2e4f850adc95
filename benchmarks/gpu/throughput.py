"""Entry 1, throughput of generation: DDIM of 200 steps, 18 Heun steps and 10 of DPM-Solver++, guided and not, bfloat16.

A U-Net of CIFAR-10's size (35.7M parameters) and a WRN-28-10 encoder, untrained (time does not depend on weights), by
the product's own path, at batch 512 and at the fastest batch. The share of the chip's bf16 peak is by operations that
are counted, over the rate of large matrix products measured in the same command (and the data sheet's beside it).

    python benchmarks/gpu/throughput.py [--rounds 3]          about 6 minutes on one H200-class card (not yet measured)
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from entry import Entry, machine_of, reader_of, run
from training import DATA_SHEET, Counted, peak_tflops, spread

from gambeson.models.denoiser import EDM, VP, NetworkDenoiser
from gambeson.models.unet import UNetSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.recipes.presets import preset
from gambeson.sampling.guidance import Contrastive
from gambeson.sampling.levels import NoiseLevels, TimestepLevels
from gambeson.sampling.samplers import DDIM, DPMSolverPP, Heun
from gambeson.synthesis.generation import Generation, Networks, sample_block

BATCHES = (256, 512, 1024, 2048, 4096)
"""Batches of which the fastest is looked for."""


def guidance_of(name: str) -> Contrastive:
    """A preset's guidance, without the embedding network that learns as it goes."""
    return replace(preset(name).generation["guidance"], embedding=None)


SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim_200": {
        "sampler": DDIM(vp_start=True),
        "levels": TimestepLevels(kind="quad", steps=200),
        "guidance": guidance_of("cdp-cifar10-hnm"),
    },
    "heun_18": {"sampler": Heun(), "levels": NoiseLevels(steps=18), "guidance": guidance_of("cdp-fast")},
    "dpm_solver_pp_10": {
        "sampler": DPMSolverPP(),
        "levels": NoiseLevels(steps=10),
        "guidance": guidance_of("cdp-fast"),
    },
}
WALKS = tuple(f"{n}/{k}/{b}" for n in SAMPLERS for k in ("plain", "guided") for b in ("512", "best"))
PLANNED = ("peak", "best_batch", *WALKS)


@dataclass(frozen=True)
class Scene:
    """The networks on the device, and how blocks are made of them."""

    entry: Entry
    networks: dict[str, Networks]  # vp for DDIM, edm for the others

    @staticmethod
    def build(entry: Entry) -> Scene:
        """CIFAR-10's sizes, or tiny ones."""
        spec, side = (UNetSpec(width=8), 8) if entry.tiny else (UNetSpec.cifar10(), 32)
        wide = WideResNetSpec(depth=10, width=1) if entry.tiny else WideResNetSpec()
        encoder = wide.build(3, 10).to(entry.device).eval().requires_grad_(False)
        network = spec.build(3, 10).to(entry.device)
        parts: dict[str, Any] = {"spec": spec, "classes": 10, "shape": (3, side, side), "conditional_only": True}
        made = {
            k: NetworkDenoiser(network, p, **parts).eval().requires_grad_(False)
            for k, p in (("vp", VP()), ("edm", EDM()))
        }
        return Scene(entry, {k: Networks(denoiser=d, encoder=encoder) for k, d in made.items()})

    def plan(self, name: str, guided: bool, batch: int) -> Generation:
        """Blocks of one sampler; few steps in the tiny form."""
        parts: dict[str, Any] = dict(SAMPLERS[name]) | ({} if guided else {"guidance": None})
        if self.entry.tiny:
            parts["levels"] = TimestepLevels(kind="quad", steps=8) if name == "ddim_200" else NoiseLevels(steps=8)
        return Generation(count=batch, block=batch, precision="bfloat16", **parts)

    def block(self, spec: Generation, number: int = 0) -> None:
        """Samples a block as the product does."""
        own = self.networks["vp" if isinstance(spec.levels, TimestepLevels) else "edm"]
        machine, denoiser = self.entry.machine, own.denoiser
        guidance, denoise = spec.bind(own, machine), spec.denoise(denoiser, machine)
        sample_block(spec, denoise, guidance, denoiser.shape, denoiser.classes, number, 0, self.entry.device)

    def call_rate(self, batch: int) -> float:
        """Images per second of the denoiser alone."""
        spec = self.plan("heun_18", False, batch)
        own = self.networks["edm"].denoiser
        denoise, x = spec.denoise(own, self.entry.machine), torch.randn(batch, *own.shape, device=self.entry.device)
        labels = (torch.arange(batch) % 10).to(self.entry.device)
        with torch.no_grad():
            denoise(x, 1.0, labels)
            begun = self.entry.wait()
            for _ in range(3):
                denoise(x, 1.0, labels)
        return 3 * batch / (self.entry.wait() - begun)


def best_batch(scene: Scene) -> dict[str, Any]:
    """The batch with which the denoiser alone is fastest; one that does not fit the memory ends the search."""
    rates: dict[str, float] = {}
    for batch in (4,) if scene.entry.tiny else BATCHES:
        try:
            rates[str(batch)] = round(scene.call_rate(batch), 1)
        except torch.cuda.OutOfMemoryError:
            break
    return {"batch": int(max(rates, key=lambda b: rates[b])), "denoiser_images_per_second": rates}


def operations(scene: Scene, name: str, guided: bool) -> float:
    """Floating-point operations of an image of a whole walk, counted on a block of 4."""
    with Counted() as counted:
        scene.block(scene.plan(name, guided, 4))
    return counted.flops / 4


def measured(scene: Scene, name: str, guided: bool, batch: int, rounds: int) -> dict[str, Any]:
    """Images per second of whole blocks, memory."""
    entry, spec = scene.entry, scene.plan(name, guided, batch)
    if entry.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    scene.block(spec)  # kernels are chosen
    rates = []
    for number in range(rounds):
        begun = entry.wait()
        scene.block(spec, number)
        rates.append(batch / (entry.wait() - begun))
    return {
        "batch": batch,
        "images_per_second": spread(rates),
        "rounds": rounds,
        "guided_steps": spec.guidance.guided_steps(spec.levels.sigmas()) if spec.guidance else 0,  # type: ignore[union-attr]
        "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if entry.on_gpu else None,
    }


def used(row: dict[str, Any], flops: float, peak: float | None) -> dict[str, Any]:
    """The row with its operations a second and their share of the peak."""
    tflops = row["images_per_second"]["median"] * flops / 1e12
    share = None if peak is None else round(tflops / peak, 3)
    return row | {"tflops": float(f"{tflops:.4g}"), "share_of_measured_peak": share}


def peaks(entry: Entry) -> dict[str, Any]:
    """The measured bf16 rate, and what the data sheet says; none in the tiny form, where it would take too long."""
    chip = machine_of(entry.device)
    sheet = next((rates["bfloat16"] for name, rates in DATA_SHEET.items() if name in chip), None)
    found = None if entry.tiny else round(peak_tflops(entry.device, "bfloat16"), 1)
    return {"measured_tflops": found, "data_sheet_tflops": sheet}


def needed(scene: Scene, spec: Generation, rounds: int, rates: dict[str, float]) -> float:
    """About how many seconds a row takes, from the denoiser's own pace."""
    calls = (len(spec.levels.sigmas()) - 1) * spec.sampler.order
    rate = rates.get(str(spec.block), math.inf)
    return 1.3 * (rounds + 1) * calls * spec.block / rate * (1 if spec.guidance is None else 2)


def work(entry: Entry, words: argparse.Namespace) -> dict[str, Any]:
    """All rows, the ones at batch 512 first."""
    scene, rounds = Scene.build(entry), 1 if entry.tiny else words.rounds
    peak = entry.row("peak", lambda: peaks(entry))["measured_tflops"]
    best = entry.row("best_batch", lambda: best_batch(scene))
    for walk in sorted(WALKS, key=lambda name: name.endswith("best")):
        name, kind, size = walk.split("/")
        guided, usual = kind == "guided", 4 if entry.tiny else 512
        batch = usual if size == "512" else best["batch"]
        counted = entry.row(
            f"operations/{name}/{kind}",
            lambda n=name, g=guided: {"flop_an_image": operations(scene, n, g)},
        )["flop_an_image"]
        needs = needed(scene, scene.plan(name, guided, batch), rounds, best["denoiser_images_per_second"])
        entry.row(
            walk,
            lambda n=name, g=guided, b=batch, f=counted: used(measured(scene, n, g, b, rounds), f, peak),
            needs,
        )
    return {"guided_over_plain": {f"{n}/{b}": ratio(entry.rows, n, b) for n in SAMPLERS for b in ("512", "best")}}


def ratio(rows: dict[str, Any], name: str, size: str) -> float:
    """How many times as long guided images take."""
    plain, guided = (rows[f"{name}/{kind}/{size}"]["images_per_second"]["median"] for kind in ("plain", "guided"))
    return round(plain / guided, 3)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The entry; returns its last line."""
    return run("throughput", reader_of(__doc__, rounds=3).parse_args(argv), work, PLANNED)


if __name__ == "__main__":
    main()
