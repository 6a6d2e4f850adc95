"""Generates synthetic images in blocks: a block's noise comes from (run seed, block) alone, whatever else is going on.

Two generations with the same seed and count start from the same noise and labels, so that plain and guided images can
be laid side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gambeson.canonical import plain
from gambeson.data.datasets import ImageSet
from gambeson.data.mixture import to_uint8
from gambeson.data.synthetic import StoreWriter
from gambeson.errors import UserError
from gambeson.models.denoiser import NetworkDenoiser, load_denoiser
from gambeson.models.resnet import load_classifier
from gambeson.randomness import block_generator, block_noise, derive
from gambeson.sampling.guidance import ClassifierGuidance, Contrastive, ContrastiveGuidance, TowardsClass
from gambeson.sampling.samplers import DDIM, Heun
from gambeson.sampling.schedules import karras_sigmas
from gambeson.store import Artifact, Workspace, stage
from gambeson.types import Sampler


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """The noise levels that a sampler walks down (Karras et al. 2022, eq. 5)."""

    steps: int = 12  # number of steps; Heun calls the network 2 steps - 1 times
    sigma_min: float = 0.002  # lowest noise level before 0
    sigma_max: float = 80.0  # noise level of the start
    rho: float = 7.0  # how strongly the steps gather at low noise

    def sigmas(self) -> Tensor:
        """[steps + 1] float64, decreasing, the last one 0."""
        return karras_sigmas(self.steps, self.sigma_min, self.sigma_max, self.rho)


def _no_encoder(images: Tensor) -> Tensor:
    """Stands in for the encoder while a recipe is checked."""
    return images.flatten(1)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How synthetic images are generated."""

    count: int = 4000  # synthetic images to generate, over all classes in turn
    block: int = 100  # images per block: the unit of reproducibility and the batch that guidance contrasts
    blocks_per_shard: int = 10  # whole blocks per shard file
    sampler: Heun | DDIM = Heun()  # how the noise is walked down
    levels: NoiseLevels = NoiseLevels()  # the noise levels
    guidance: Contrastive | TowardsClass | None = Contrastive()  # what steers the sampler; none: plain diffusion

    def __post_init__(self) -> None:
        for name in ("count", "block", "blocks_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"generation.{name}: expected a whole number above 0, got {getattr(self, name)}")
        bound, sigmas = self.guide(_no_encoder), self.levels.sigmas()
        if bound is not None:
            bound.check(sigmas, torch.arange(self.block))  # what cannot work is said now, not in an hour

    def guide(self, encoder: Any) -> ContrastiveGuidance | ClassifierGuidance | None:
        """The guidance with its network: a classifier with .features, or any callable for the checks alone."""
        if self.guidance is None:
            return None
        if isinstance(self.guidance, TowardsClass):
            return ClassifierGuidance(self.guidance, encoder)
        return ContrastiveGuidance(self.guidance, getattr(encoder, "features", encoder))

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one is sampled in full and cut."""
        return -(-self.count // self.block)

    def labels(self, block: int, classes: int) -> Tensor:
        """[block] int64: the classes in turn, so that every block and every prefix is balanced."""
        return (torch.arange(self.block) + block * self.block) % classes


def sample_block(
    spec: Generation, denoiser: NetworkDenoiser, encoder: Any, shape: tuple[int, int, int], block: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Images [m, C, H, W] in [0, 1] and labels [m] of one block; `encoder`, a classifier, is used by guidance only."""
    labels = spec.labels(block, denoiser.classes)
    guidance = spec.guide(encoder)
    sampler: Sampler = spec.sampler
    noise = block_noise(seed, block, (spec.block, *shape))
    draws = block_generator(seed, block, "sampler")
    walk = sampler(denoiser, noise, spec.levels.sigmas(), guidance, labels=labels, generator=draws, block=block)
    *_, last = walk
    return ((last.x + 1) / 2).clamp(0, 1), labels


@stage(revision=1)
def generate(
    work: Workspace, spec: Generation, real: ImageSet, denoiser: Artifact, encoder: Artifact | None, *, seed: int
) -> None:
    """Writes images/, a SyntheticStore; finished blocks are never sampled again."""
    network = load_denoiser(denoiser.file("denoiser.safetensors"))
    guide = load_classifier(encoder.file("classifier.safetensors")) if encoder is not None else None
    writer = StoreWriter(root=work.folder / "images", blocks=spec.blocks, blocks_per_shard=spec.blocks_per_shard)
    for block in range(spec.blocks):
        if not writer.has(block):
            images, labels = sample_block(spec, network, guide, real.shape, block, derive(seed, "generation"))
            size = min(spec.block, spec.count - block * spec.block)
            writer.put(block, to_uint8(images[:size]), labels[:size].numpy())
        work.progress(block + 1, spec.blocks)
    origins = {"denoiser": denoiser.digest, "encoder": encoder.digest if encoder is not None else None}
    writer.finish({"generation": plain(spec), "seed": seed, **origins})
