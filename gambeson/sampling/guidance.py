"""Contrastive guidance: the gradient of a contrastive loss shifts the denoiser's x0-hat inside a window.

The spec `Contrastive` is plain numbers for recipes; `ContrastiveGuidance(spec, encoder)` adds the networks. Moving eps
by delta moves x0-hat by -sigma delta: CDP's Algorithm 1 in sigma space (METHOD 1.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gambeson.randomness import derive, or_fresh
from gambeson.randomness import generator as named_generator
from gambeson.sampling.classifier_guidance import ClassifierGuidance, TowardsClass
from gambeson.sampling.contrastive import HardNegative, PairLoss
from gambeson.sampling.embedding import EmbeddingLearner, FittedEmbedding, PerRunEmbedding
from gambeson.sampling.features import (
    DenoisedFeatures,
    NoiseConditionedFeatures,
    NoisyFeatures,
    View,
    check_eval,
    checked,
    clean,
    trial,
    with_pullback,
    without_graph,
)
from gambeson.sampling.pairs import PairChoice, PreviousStep, RealImages, Reals
from gambeson.sampling.windows import (
    ConstantStrength,
    StrengthProfile,
    TimestepWindow,
    Window,
    check_strengths,
    guided_steps,
)
from gambeson.types import Encoder, Labels, Sigmas, Step

__all__ = [
    "CheckedGuidance",
    "ClassifierGuidance",
    "Contrastive",
    "ContrastiveGuidance",
    "DenoisedFeatures",
    "GuidanceSum",
    "NoiseConditionedFeatures",
    "NoisyFeatures",
    "TimestepWindow",
    "TowardsClass",
    "Window",
]

Embed = Callable[[Tensor], Tensor]
"""The encoder's features [B, D] -> what the loss compares [B, E], of length 1."""


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """What contrastive guidance does. The defaults are CDP's CIFAR-10 numbers, without its embedding network.

    Convention 'sum' adds up the anchors' losses, so that an image's shift does not depend on how many others it is
    reduced with; 'paper' is the authors' function, the mean with its clamps: lambda = 100k at B = 512 (1,024 anchors)
    is a strength of 97.7 here. The first step is never guided, whatever the pairs, as in the authors' code.
    """

    loss: PairLoss = HardNegative()  # the loss on embeddings that guidance descends
    pairs: PairChoice = field(
        default=PreviousStep(), metadata={"neutral": PreviousStep()}
    )  # what is a positive and what a negative
    strength: float = 97.65625  # multiple of the loss gradient that is added to eps
    strength_convention: Literal["sum", "paper"] = "sum"  # sum over the anchors' losses, or the paper's mean
    strength_profile: StrengthProfile = field(
        default=ConstantStrength(), metadata={"neutral": ConstantStrength()}
    )  # how the strength changes along the noise levels
    window: Window | TimestepWindow = Window(sigma_min=2.04)  # guided noise levels; 2.04 is t = 400, linear schedule
    features: View = NoisyFeatures()  # what the encoder sees
    embedding: FittedEmbedding | PerRunEmbedding | None = field(
        default=None, metadata={"neutral": None}
    )  # network on top of the encoder; none: its features, L2-normalised
    clip: float | None = field(
        default=None, metadata={"neutral": None}
    )  # bound of the norm of an image's change of eps, relative to eps; none: no bound

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"Contrastive strength: expected a finite number, got {self.strength}")
        if self.strength_convention not in ("sum", "paper"):
            raise ValueError(f"strength_convention: expected 'sum' or 'paper', got {self.strength_convention!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"Contrastive clip: expected None or a bound above 0 (0.5, say), got {self.clip}")

    def guided_steps(self, sigmas: Sigmas) -> int:
        """How many steps of a schedule are guided. ValueError where none is, or where the strength is not finite."""
        check_strengths(self.multiple, self.window, sigmas[1:])
        return guided_steps(self.window, sigmas, first=1)

    def check(self, sigmas: Sigmas, batch: int | None = None) -> None:
        """Raise what is wrong with the plan whatever the networks and classes.

        No step in the window, a strength that is not finite there, a batch of 1 image, a loss that does not go with the
        pairs (labels with tau_plus > 0).
        """
        self.guided_steps(sigmas)
        if batch is not None:
            self.dry_run(batch, torch.arange(batch))

    def dry_run(self, batch: int, labels: Labels | None) -> None:
        """Raise for this batch what the loss would raise at the first guided step."""
        device = None if labels is None else labels.device
        rows, real = torch.ones(batch, 1, device=device), self.pairs.reals(batch)
        reals = Reals(torch.ones(real, 1, device=device), torch.zeros(real, dtype=torch.int64, device=device))
        self.losses(rows, rows, reals, labels)

    def losses(self, query: Tensor, previous: Tensor | None, reals: Reals | None, labels: Tensor | None) -> Tensor:
        """One loss per anchor, [B] or [2B]: embeddings [B, E] of this step and of the one before, labels [B] if any."""
        known = labels if self.pairs.conditional or self.loss.supervised else None
        pairing = self.pairs.arrange(query, previous, reals, known)
        clamp = self.strength_convention == "paper"
        return self.loss(query, pairing.positive, pairing.negatives, known, allowed=pairing.allowed, clamp=clamp)

    def multiple(self, sigma: float, level: float | None = None) -> float:
        """The multiple of the gradient that x0-hat is shifted by: -sigma times the strength at the schedule's level.

        level: the schedule's sigma, where the sampler has raised its own.
        """
        return -sigma * self.strength * self.strength_profile.factor(sigma if level is None else level)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What contrastive guidance carries through a block: its seed, and features from before the embedding.

    seen [B, D]: of the step before, where that was guided; reals: of the block's real images, once drawn.
    """

    seed: int
    seen: Tensor | None = None
    reals: Reals | None = None


class ContrastiveGuidance:
    """CDP's guidance (Algorithm 1): pull each image towards its positive, push it from its negatives.

    shift = -sigma * strength * gradient of the reduced losses, in the view's coordinate. Each image is encoded once per
    guided step: the features of the previous step are kept in the state. The encoder's parameters receive no gradient.

    encoder: as the view calls it, images [B, ...] -> [B, D], for `NoiseConditionedFeatures` (x_vp, sigma) -> [B, D].
    real: what real pairs are drawn from. embedding: the fitted network of spec.embedding, or learner: one that takes an
    Adam step after each guided step. micro_batch: encode so many images at a time, for less memory; the
    result is the same to the error of floating-point numbers, not to the bit.
    `tally`, counted from the last `init`: guided images x evaluations, how many of them were clipped, and the largest
    change of eps relative to eps.
    """

    def __init__(
        self,
        spec: Contrastive,
        encoder: Encoder,
        *,
        real: RealImages | None = None,
        embedding: nn.Module | None = None,
        learner: EmbeddingLearner | None = None,
        micro_batch: int | None = None,
    ) -> None:
        check_eval(encoder, "encoder")
        if embedding is not None:
            check_eval(embedding, "embedding")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch: expected None or 1 or more images, got {micro_batch}")
        self.spec, self.encoder, self.real = spec, encoder, real
        self.embedding, self.learner, self.micro_batch = embedding, learner, micro_batch
        self.tally: dict[str, float] = _zero()

    def check(
        self,
        sigmas: Sigmas,
        labels: Labels | None = None,
        batch: int | None = None,
        shape: tuple[int, ...] | None = None,
        device: str | torch.device = "cpu",
        classes: int | None = None,
    ) -> None:
        """Raise the ValueErrors of a whole run before it starts.

        No step in the window; a strength that is not finite; a batch or labels that loss and pairs cannot use (1 image,
        1 class, none); real images or an embedding network that are missing; with `shape`, that of one image: an
        encoder that cannot take it, or gives no [B, D]. Give labels [B], or the batch size where sampling is without
        labels; `classes`, where other batches have labels that this one has not: 0 to classes - 1.
        """
        self.spec.guided_steps(sigmas)
        self._check_parts()
        size = len(labels) if labels is not None else batch
        if size is not None:
            self.spec.dry_run(size, labels)
            self._draw(size, labels, seed=0)
        if classes and labels is not None:  # as if every class were sampled once
            self._draw(classes, torch.arange(classes), seed=0)
        if shape is not None:
            self._check_encoder(trial(self.encoder, shape, device))

    def init(self, block: int, generator: Generator | None = None) -> State:
        """The state of a block, with nothing seen yet. ValueError where real images or an embedding are missing.

        The generator is read, not advanced, so that a guided and a plain block get the same noise from it.
        """
        self._check_parts()
        self.tally = _zero()
        source = or_fresh(generator).clone_state()
        seed = torch.randint(2**62, (), generator=source, device=source.device, dtype=torch.int64)
        return State(seed=derive(int(seed), "contrastive guidance", block))

    def __call__(self, state: State, step: Step) -> tuple[Tensor | None, State]:
        """(shift of x0-hat [B, ...] or None where it does not act, the state for the next evaluation)."""
        if step.index == 0 or step.previous is None:
            self.spec.dry_run(len(step.x), step.labels)
            return None, state
        if not self.spec.window.contains(step.scheduled):
            return None, replace(state, seen=None)
        previous = self._previous(state, step.previous)
        reals = self._reals(step, state.seed) if state.reals is None else state.reals
        gradient, anchor = self._gradient(step, previous, reals)
        if self.learner is not None:  # after the images' gradient, as in the authors' one backward pass for both
            self.learner.learn(lambda embed: self._losses(embed, anchor, previous, reals, step.labels))
        shift = self._limited(self.spec.multiple(step.sigma, step.scheduled) * gradient, step)
        # what comes next has the start of this step as its `previous`, whichever evaluation this is
        seen = anchor if step.stage == 0 else previous
        return shift, replace(state, seen=seen if self.spec.pairs.needs_previous else None, reals=reals)

    def _previous(self, state: State, before: Step) -> Tensor | None:
        """[B, D] features of the step before, encoded here where the window has only just opened."""
        if state.seen is not None or not self.spec.pairs.needs_previous:
            return state.seen
        return self._frozen(self.spec.features.variable(before), before.sigma)

    def _draw(self, batch: int, labels: Tensor | None, seed: int) -> Tensor | None:
        """[N] indices of a block's real images; None where the pairs take none."""
        if self.real is None or not self.spec.pairs.reals(batch):
            return None
        return self.spec.pairs.draw(self.real, batch, labels, named_generator(seed, "real pairs"))

    def _reals(self, step: Step, seed: int) -> Reals | None:
        """Features of a block's real images, which are clean: sigma 0."""
        drawn = self._draw(len(step.x), step.labels, seed)
        if drawn is None or self.real is None:
            return None
        drawn = drawn.to(self.real.images.device)
        images = self.real.images[drawn].to(step.x)
        return Reals(self._frozen(clean(images), 0.0), self.real.labels[drawn].to(step.x.device))

    def _gradient(self, step: Step, previous: Tensor | None, reals: Reals | None) -> tuple[Tensor, Tensor]:
        """Gradient of the reduced losses in the view's coordinate [B, ...], and the anchors' features [B, D]."""
        variable = self.spec.features.variable(step)
        anchor, pull_back = with_pullback(lambda v: self._encode(v, step.sigma), variable, self.micro_batch)
        leaf = anchor.clone().requires_grad_()
        with torch.enable_grad():
            losses = self._losses(self._embed, leaf, previous, reals, step.labels)
            total = losses.sum() if self.spec.strength_convention == "sum" else losses.mean()
        return pull_back(torch.autograd.grad(total, leaf)[0]), anchor

    def _losses(
        self, embed: Embed, anchor: Tensor, previous: Tensor | None, reals: Reals | None, labels: Tensor | None
    ) -> Tensor:
        """The spec's losses of features [B, D] under an embedding."""
        before = None if previous is None else embed(previous)
        real = None if reals is None else Reals(embed(reals.features), reals.labels)
        return self.spec.losses(embed(anchor), before, real, labels)

    def _limited(self, shift: Tensor, step: Step) -> Tensor:
        """The shift within `clip` of its step, image by image; counts. Changes of eps and of x0 share one ratio."""
        smallest = torch.finfo(shift.dtype).tiny
        length = (step.x - step.raw).flatten(1).norm(dim=1).clamp_min(smallest)
        ratio = shift.flatten(1).norm(dim=1) / length
        over = torch.zeros_like(ratio, dtype=torch.bool) if self.spec.clip is None else ratio > self.spec.clip
        count, largest = torch.stack([over.sum().to(ratio), ratio.max()]).tolist()
        self.tally = {
            "guided": self.tally["guided"] + len(shift),
            "clipped": self.tally["clipped"] + count,
            "largest_ratio": max(self.tally["largest_ratio"], largest),
        }
        if self.spec.clip is None or not count:
            return shift
        scale = torch.where(over, self.spec.clip / ratio, torch.ones_like(ratio))
        return shift * scale.reshape(-1, *[1] * (shift.dim() - 1))

    def _embed(self, features: Tensor) -> Tensor:
        network = self.embedding if self.learner is None else self.learner.network
        return _unit(features) if network is None else network(features)

    def _encode(self, variable: Tensor, sigma: float) -> Tensor:
        return checked(self.spec.features.encode(self.encoder, variable, sigma), variable)

    def _frozen(self, variable: Tensor, sigma: float) -> Tensor:
        return without_graph(lambda v: self._encode(v, sigma), variable, self.micro_batch)

    def _check_parts(self) -> None:
        if self.spec.pairs.reals(2) and self.real is None:
            raise ValueError(
                f"{type(self.spec.pairs).__name__}: expected real images, got none; pass real=RealImages(...), or "
                "generate by a recipe, whose data they are (a denoiser's weights alone have none)"
            )
        given = [n for n, part in (("embedding", self.embedding), ("learner", self.learner)) if part is not None]
        kind = self.spec.embedding
        allowed = {FittedEmbedding: (["embedding"], ["learner"]), PerRunEmbedding: (["learner"],), type(None): ([],)}
        if given not in allowed[type(kind)]:
            raise ValueError(
                f"contrastive guidance with embedding {type(kind).__name__}: expected "
                f"{' or '.join(' and '.join(names) or 'no embedding network' for names in allowed[type(kind)])}, got "
                f"{' and '.join(given) or 'none'}; a FittedEmbedding is fitted first and given as `embedding`"
            )

    def _check_encoder(self, images: Tensor) -> None:
        """Try the encoder on images of the right shape."""
        if self.real is not None and self.spec.pairs.reals(2) and self.real.images.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"real pairs: expected real images of the generated shape {tuple(images.shape[1:])}, got "
                f"{tuple(self.real.images.shape[1:])}; resize them"
            )
        try:
            with torch.no_grad():
                features: Any = self.spec.features.encode(self.encoder, images, 1.0)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"encoder: expected features [B, D] of images of shape {tuple(images.shape[1:])} under "
                f"{type(self.spec.features).__name__}, but it failed: {error}; use an encoder of images of this size, "
                "and NoiseConditionedFeatures for one that is told the noise level"
            ) from error
        self._embed(checked(features, images))


def _zero() -> dict[str, float]:
    return {"guided": 0.0, "clipped": 0.0, "largest_ratio": 0.0}


@runtime_checkable
class CheckedGuidance(Protocol):
    """A Guidance that can say before sampling what would not work: what `GuidanceSum` is made of."""

    def check(
        self,
        sigmas: Tensor,
        labels: Tensor | None = None,
        batch: int | None = None,
        shape: tuple[int, ...] | None = None,
        device: str | torch.device = "cpu",
        classes: int | None = None,
    ) -> None: ...

    def init(self, block: int, generator: Generator | None = None) -> Any: ...

    def __call__(self, state: Any, step: Step) -> tuple[Tensor | None, Any]: ...


class GuidanceSum:
    """Several guidances at once: their shifts are added, each keeps its own state."""

    def __init__(self, *parts: CheckedGuidance) -> None:
        self.parts = parts

    def check(
        self,
        sigmas: Sigmas,
        labels: Labels | None = None,
        batch: int | None = None,
        shape: tuple[int, ...] | None = None,
        device: str | torch.device = "cpu",
        classes: int | None = None,
    ) -> None:
        """Raise what any part raises."""
        for part in self.parts:
            part.check(sigmas, labels, batch, shape, device, classes)

    def init(self, block: int, generator: Generator | None = None) -> tuple[Any, ...]:
        """The states of the parts, in order."""
        return tuple(part.init(block, generator) for part in self.parts)

    def __call__(self, state: tuple[Any, ...], step: Step) -> tuple[Tensor | None, tuple[Any, ...]]:
        """(sum of the shifts, None where no part acts; states)."""
        results = [part(own, step) for part, own in zip(self.parts, state, strict=True)]
        shifts = [shift for shift, _ in results if shift is not None]
        return (torch.stack(shifts).sum(0) if shifts else None), tuple(own for _, own in results)
