"""How far guidance moves the denoised image at each step: one block of the guided arm, walked once more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gambeson.machine import Machine
from gambeson.randomness import block_generator, block_noise, derive
from gambeson.report.exhibits import budget, device, operations
from gambeson.report.material import GuidanceEnergy
from gambeson.sampling.samplers import Heun
from gambeson.sampling.walk import Walk
from gambeson.synthesis.generate import Sources
from gambeson.synthesis.generation import Generation, Networks
from gambeson.types import Denoiser, Guidance

IMAGES = 128
"""Of the block that is walked; of smaller blocks all."""
FEWEST = 8
"""Images of a block below which guidance has nothing to contrast."""
BUDGET = 4e12
"""Floating-point operations of the denoiser: about a minute on two cores."""


def guidance_energy(spec: Generation, sources: Sources, seed: int) -> GuidanceEnergy:
    """The first block of a guided generation, or as many images as the budget allows as a block of their own.

    Raises ValueError where that is too few, or where a network does not fit.
    """
    networks = sources.open(spec, device(), seed)
    smaller = replace(spec, block=min(spec.block, _affordable(spec, networks)))
    machine = Machine(device=device())
    smaller.check(networks, machine)
    own = networks.denoiser
    found = walked(
        smaller, smaller.denoise(own, machine), smaller.bind(networks, machine), own.shape, own.classes, seed
    )
    return replace(found, how=_how(spec, smaller, seed))


def _how(spec: Generation, walked: Generation, seed: int) -> str:
    if walked.block == spec.block:
        return f"the first block of {spec.block} images of seed {seed}, sampled once more"
    return f"{walked.block} images of seed {seed} as a block of their own, sampled for this; blocks have {spec.block}"


def _affordable(spec: Generation, networks: Networks) -> int:
    """Images that the budget allows; ValueError for too few."""
    own = networks.denoiser
    labels = spec.labels(0, own.classes)
    image = torch.zeros(1, *own.shape, device=device())
    given = None if labels is None else labels[:1].to(device())
    looks = (len(spec.levels.sigmas()) - 1) * (2 if isinstance(spec.sampler, Heun) else 1)
    price = looks * operations(_Asked(own, given), image)
    count = min(IMAGES, int(budget(BUDGET) / price))
    if count < min(FEWEST, spec.block):
        raise ValueError(f"sampling one block again would take too long for a page ({price:.1e} floating-point "
                         "operations for each image)")  # fmt: skip
    return count


class _Asked(torch.nn.Module):
    """A denoiser at noise level 1."""

    def __init__(self, denoiser: torch.nn.Module, labels: Tensor | None) -> None:
        super().__init__()
        self.denoiser, self.labels = denoiser, labels

    def forward(self, images: Tensor) -> Tensor:
        return self.denoiser(images, 1.0, self.labels)


def walked(
    spec: Generation,
    denoise: Denoiser,
    guidance: Guidance | None,
    shape: tuple[int, int, int],
    classes: int,
    seed: int,
) -> GuidanceEnergy:
    """Root mean squares of guidance's shift of block 0, after the sampler's clamp where it has one; step by step.

    Noise, labels and draws are those of `generate` for this seed (`sample_block`).
    """
    seed, sampler = derive(seed, "generation"), spec.sampler
    assert isinstance(sampler, Walk)
    noise, draws = block_noise(seed, 0, (spec.block, *shape)).to(device()), block_generator(seed, 0, "sampler")
    labels = spec.labels(0, classes)
    given = None if labels is None else labels.to(device())
    walk = sampler(denoise, noise, spec.levels.sigmas(), guidance, labels=given, generator=draws)
    sigmas, shifts = [], []
    for step in walk:
        if step.sigma > 0:
            sigmas.append(float(step.sigma))
            shifts.append(
                (step.guided - sampler.bound(step.raw)).double().flatten(1).square().mean(1).sqrt().cpu().numpy()
            )
    each = np.stack(shifts)
    low, high = np.quantile(each, [0.05, 0.95], axis=1)
    return GuidanceEnergy(sigma=np.array(sigmas), shift=each.mean(1), low=low, high=high, images=spec.block)
