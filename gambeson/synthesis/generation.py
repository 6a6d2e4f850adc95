"""What is generated and how, and one block of it: its noise comes from (run seed, block) alone, whatever else goes on.

Two generations with the same seed and block size start from the same noise and labels, so that plain and guided images
can be laid side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gambeson.data.datasets import ImageSet
from gambeson.errors import UserError, require
from gambeson.machine import Machine
from gambeson.models.denoiser import ClassifierFree, NetworkDenoiser
from gambeson.randomness import block_generator, block_noise
from gambeson.sampling.embedding import EmbeddingLearner, EmbeddingNetwork, PerRunEmbedding
from gambeson.sampling.guidance import ClassifierGuidance, Contrastive, ContrastiveGuidance, TowardsClass
from gambeson.sampling.levels import NoiseLevels, TimestepLevels
from gambeson.sampling.pairs import RealImages
from gambeson.sampling.samplers import DDIM, DDPM, DPMSolverPP, Euler, Heun
from gambeson.sampling.walk import final
from gambeson.types import Denoiser, Sampler

Bound = ContrastiveGuidance | ClassifierGuidance | None
"""A guidance with its networks."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What a block is sampled with, besides numbers: the denoiser, and what its guidance looks through."""

    denoiser: NetworkDenoiser
    encoder: Any = None
    real: ImageSet | None = None
    embedding: EmbeddingNetwork | None = None
    learner: EmbeddingLearner | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How synthetic images are generated."""

    count: int = 4000  # synthetic images to generate, over all classes in turn
    block: int = 100  # images per block: the unit of reproducibility and the batch that guidance contrasts
    blocks_per_shard: int = 10  # whole blocks per shard file
    sampler: Heun | DDIM | DDPM | Euler | DPMSolverPP = Heun()  # how the noise is walked down
    levels: NoiseLevels | TimestepLevels = NoiseLevels()  # the noise levels
    guidance: Contrastive | TowardsClass | None = Contrastive()  # what steers the sampler; none: plain diffusion
    classifier_free: float | None = field(
        default=None, metadata={"neutral": None}
    )  # scale of classifier-free guidance, 1 is conditional only; needs a denoiser trained with label dropout
    precision: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"neutral": "float32"}
    )  # arithmetic of denoiser and encoder; the state stays in float64

    def __post_init__(self) -> None:
        for name in ("count", "block", "blocks_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"generation.{name}: expected a whole number above 0, got {getattr(self, name)}")
        require(self.precision in ("float32", "bfloat16"), "precision", "'float32' or 'bfloat16'", self.precision)
        sigmas = self.levels.sigmas()
        if not self.sampler.repeats and bool((sigmas.diff() == 0).any()):
            raise UserError(
                f"generation: expected noise levels without repeats for {type(self.sampler).__name__}, got "
                "levels.keep_repeats true; set it to false, or take DDIM"
            )
        if isinstance(self.guidance, TowardsClass):
            self.guidance.guided_steps(sigmas)
        elif self.guidance is not None:  # what cannot work is said now, not in an hour
            self.guidance.check(sigmas, batch=self.block)

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one is sampled in full and cut."""
        return -(-self.count // self.block)

    def size(self, block: int) -> int:
        """How many images of a block are kept."""
        return min(self.block, self.count - block * self.block)

    @property
    def in_order(self) -> bool:
        """Whether blocks must be made one after another (the authors' embedding, which learns as it goes)."""
        return isinstance(self.guidance, Contrastive) and isinstance(self.guidance.embedding, PerRunEmbedding)

    @property
    def warm_up(self) -> Generation:
        """The generation without what a fitted embedding does not depend on, so that more images need no new one."""
        return replace(self, count=self.block, blocks_per_shard=1)

    def labels(self, block: int, classes: int) -> Tensor | None:
        """[block] int64: the classes in turn, so that every prefix is balanced; None for an unconditional denoiser."""
        return (torch.arange(self.block) + block * self.block) % classes if classes else None

    def bind(self, networks: Networks, machine: Machine = Machine()) -> Bound:
        """The guidance with its networks. Raises UserError where a network that it needs is missing."""
        if self.guidance is None:
            return None
        encoder = networks.encoder
        if encoder is None:
            raise UserError("generation.guidance: expected an encoder (a classifier's weights) to steer by, got none")
        if isinstance(self.guidance, TowardsClass):
            return ClassifierGuidance(self.guidance, self._in_precision(encoder), micro_batch=machine.micro_batch)
        return ContrastiveGuidance(
            self.guidance,
            self._in_precision(encoder.features),
            real=self._real_images(networks.real, machine.device),
            embedding=networks.embedding,
            learner=networks.learner,
            micro_batch=machine.micro_batch,
        )

    def denoise(self, denoiser: NetworkDenoiser, machine: Machine = Machine()) -> Denoiser:
        """The denoiser as the sampler calls it: with classifier-free guidance, precision and portions applied."""
        call: Denoiser = denoiser if self.classifier_free is None else ClassifierFree(denoiser, self.classifier_free)
        call = self._in_precision(call)
        return call if machine.micro_batch is None else in_portions(call, machine.micro_batch)

    def check(self, networks: Networks, machine: Machine = Machine()) -> None:
        """Raises the errors of a whole generation before it starts: networks and numbers that do not fit."""
        denoiser = networks.denoiser
        self.check_denoiser(denoiser)
        guidance, labels = self.bind(networks, machine), self.labels(0, denoiser.classes)
        on_device = None if labels is None else labels.to(machine.device)
        fit: dict[str, Any] = {"shape": denoiser.shape, "device": machine.device}
        if isinstance(guidance, ContrastiveGuidance):
            classes = denoiser.classes or None
            guidance.check(self.levels.sigmas(), on_device, batch=self.block, classes=classes, **fit)
        elif guidance is not None:
            guidance.check(self.levels.sigmas(), on_device, **fit)

    def check_denoiser(self, denoiser: NetworkDenoiser) -> None:
        """Raises UserError for a denoiser that cannot do what is asked, whatever the encoder."""
        if self.classifier_free is not None and (denoiser.conditional_only or not denoiser.classes):
            raise UserError(
                "generation.classifier_free: expected a conditional denoiser that also knows the null class, got one "
                f"{'without classes' if not denoiser.classes else 'trained without label dropout'}; train it with "
                "denoiser.label_dropout 0.1"
            )
        if self.needs_classes and not denoiser.classes:
            raise UserError(
                "generation.guidance: expected guidance without classes for an unconditional denoiser, got "
                f"{type(self.guidance).__name__} by class; take PreviousStep pairs, or a conditional denoiser"
            )
        start, (_, highest) = self._highest_sigma(), denoiser.preconditioning.sigma_range()
        if start > 1.01 * highest:
            raise UserError(
                f"generation.levels: expected a start at or below the highest noise the denoiser was trained on, sigma "
                f"{highest:.4g}, got {start:.4g}; take levels of its own schedule, or a lower sigma_max"
            )

    def _highest_sigma(self) -> float:
        """The highest noise level that the network is asked about: the start, raised where there is churn."""
        sigmas, sampler = self.levels.sigmas()[:-1], self.sampler
        if not isinstance(sampler, Heun | Euler) or not sampler.churn:
            return float(sigmas[0])
        churned = (sigmas >= sampler.s_min) & (sigmas <= (math.inf if sampler.s_max is None else sampler.s_max))
        gamma = min(sampler.churn / len(sigmas), math.sqrt(2) - 1)
        return float(torch.where(churned, sigmas * (1 + gamma), sigmas).max())

    def check_real(self, real: ImageSet, classes: int) -> None:
        """Raises UserError where the pairs need real images that are not there: too few, or none of some class.

        `classes`: those that the denoiser is conditioned on, 0 for none.
        """
        assert isinstance(self.guidance, Contrastive)
        images = self._real_images(real, "cpu")
        if images is not None:
            plan = ContrastiveGuidance(replace(self.guidance, embedding=None), torch.flatten, real=images)
            plan.check(self.levels.sigmas(), self.labels(0, classes), batch=self.block, classes=classes or None)

    @property
    def needs_classes(self) -> bool:
        """Whether the guidance looks at the classes that images are generated for."""
        if isinstance(self.guidance, Contrastive):
            return self.guidance.pairs.conditional or self.guidance.loss.supervised
        return self.guidance is not None

    def _real_images(self, real: ImageSet | None, device: str) -> RealImages | None:
        """The real images on the device, where the pairs need them."""
        assert isinstance(self.guidance, Contrastive)
        if real is None or not self.guidance.pairs.reals(self.block):
            return None
        return RealImages(real.train.images.to(device), real.train.labels.to(device))

    def _in_precision(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The network under autocast, its result in the dtype of its input."""
        if self.precision == "float32":
            return call

        def lowered(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return call(x, *arguments, **named).to(x.dtype)

        return lowered


def in_portions(denoise: Denoiser, size: int) -> Denoiser:
    """The same denoiser, `size` images at a time: for less memory, at the price of other last bits."""

    def portioned(x: Tensor, sigma: float | Tensor, labels: Tensor | None = None) -> Tensor:
        pieces = range(0, len(x), size)
        given: list[Any] = [None if labels is None else labels[i : i + size] for i in pieces]
        return torch.cat([denoise(x[i : i + size], sigma, own) for i, own in zip(pieces, given, strict=True)])

    return portioned


def sample_block(
    spec: Generation,
    denoise: Denoiser,
    guidance: Bound,
    shape: tuple[int, int, int],
    classes: int,
    block: int,
    seed: int,
    device: str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """Images [m, C, H, W] in [0, 1] and labels [m] (None without classes) of one block, on the CPU."""
    labels = spec.labels(block, classes)
    sampler: Sampler = spec.sampler
    noise = block_noise(seed, block, (spec.block, *shape)).to(device)
    draws = block_generator(seed, block, "sampler")
    given = None if labels is None else labels.to(device)
    walk = sampler(denoise, noise, spec.levels.sigmas(), guidance, labels=given, generator=draws, block=block)
    return ((final(walk).x + 1) / 2).clamp(0, 1).cpu(), labels
