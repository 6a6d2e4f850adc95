"""What the tables' cells are made of: guidances with the papers' numbers, and values that follow from the base recipe.

The authors' lambda of a mean over anchors is a strength of lambda / 1024 for each anchor of HNM (two for each of their
512 images) and of lambda / 512 for InfoNCE (METHOD 1.2); noise levels are those of their timesteps.
"""

from __future__ import annotations

from dataclasses import replace

from gambeson.data.augment import PadCrop
from gambeson.data.label_safe import Augmentation, Chain, Cutout
from gambeson.models.denoiser import EDM
from gambeson.recipe import Arm, Recipe
from gambeson.robustness.losses import TRADES, PGDAdversarial
from gambeson.sampling.contrastive import HardNegative, InfoNCE, SupervisedContrastive
from gambeson.sampling.embedding import FittedEmbedding
from gambeson.sampling.guidance import (
    Contrastive,
    DenoisedFeatures,
    NoisyFeatures,
    TimestepWindow,
    TowardsClass,
    Window,
)
from gambeson.sampling.pairs import OtherClasses, RealNegatives
from gambeson.synthesis.scorers import RobustGradientNorm
from gambeson.tables.cells import Changes, Of, Row
from gambeson.training.diffusion import DenoiserTraining

POOL = 4
"""Images that are generated for each one kept, where rules of selection are compared."""
LAMBDA_100K = 100_000 / 1024
HNM = Contrastive(
    loss=HardNegative(temperature=10.0, tau_plus=0.1, beta=1.0),
    strength=LAMBDA_100K,
    window=Window(sigma_min=2.04),
    features=NoisyFeatures(),
)
"""CDP's CIFAR-10 numbers without its embedding network; sigma 2.04 is timestep 400."""
HNM_EMBEDDING = replace(HNM, embedding=FittedEmbedding())
"""With it: fitted once and frozen (METHOD 1.3), where the authors' learns as it generates."""
INFO_NCE = replace(HNM, loss=InfoNCE(temperature=0.1), strength=20_000 / 512)
SIGNS = replace(HNM_EMBEDDING, strength=19.53125, window=TimestepWindow(first=51, last=149, schedule="cosine"))
"""CDP's traffic signs (appendix D.2 and METHOD 1.2)."""
SUPERVISED = Contrastive(
    loss=SupervisedContrastive(temperature=0.5),
    pairs=OtherClasses(),
    strength=16.0,
    window=Window(sigma_min=0.5, sigma_max=4.0),
    features=DenoisedFeatures(),
)
"""Ours, as in the preset cdp-fast."""


def guided(guidance: Contrastive | TowardsClass) -> Changes:
    """A guidance by the robust encoder."""
    return {"generation.guidance": guidance, "encoder": "robust"}


def strengths(*values: float) -> dict[str, Changes]:
    """Strengths among which validation chooses."""
    return {f"{value:g}": {"generation.guidance.strength": value} for value in values}


def denoiser_steps(times: float) -> Changes:
    """A diffusion model trained so many times as long, where it is trained here."""

    def longer(recipe: Recipe) -> object:
        own = recipe.denoiser
        if not isinstance(own, DenoiserTraining):
            return own
        return replace(own, optimisation=replace(own.optimisation, steps=round(times * own.optimisation.steps)))

    return {"denoiser": Of(longer)}


def epsilon(times: float) -> Changes:
    """A threat so many times as large, for training and attack."""
    return {"threat.epsilon": Of(lambda recipe: round(times * recipe.threat.epsilon, 9))}


def robust_gradient(recipe: Recipe) -> RobustGradientNorm:
    """CDP's "gradient norm-rob" by the attack that the student is trained with."""
    loss = recipe.student.loss
    return RobustGradientNorm(loss=loss) if isinstance(loss, TRADES | PGDAdversarial) else RobustGradientNorm()


def crop(recipe: Recipe) -> PadCrop:
    """The student's own crop, or one of 1 pixel where it has none."""
    own = recipe.student.augment
    return own if isinstance(own, PadCrop) and own.padding else PadCrop(padding=1, flip=True)


def cut_out(recipe: Recipe) -> Augmentation:
    """A crop and a grey square."""
    return Chain(parts=(crop(recipe), Cutout()))


def half_the_steps(recipe: Recipe) -> int:
    """Steps that cost as much where each calls the network twice."""
    return max((recipe.generation.levels.steps + 1) // 2, 2)


def with_null_class(recipe: Recipe) -> object:
    """The denoiser also taught without classes, where it is trained here and has not been."""
    own = recipe.denoiser
    return replace(own, label_dropout=own.label_dropout or 0.1) if isinstance(own, DenoiserTraining) else own


def towards_class(recipe: Recipe) -> TowardsClass:
    """Classifier guidance in the window where it was best (dev/LOG.md): fewer guided steps than the authors'."""
    own = recipe.denoiser
    edm = own.preconditioning if isinstance(own, DenoiserTraining) else None
    spread = edm.sigma_data if isinstance(edm, EDM) else 0.5
    return TowardsClass(window=Window(sigma_min=0.5, sigma_max=4.0), sigma_data=spread)


def against_real(recipe: Recipe) -> Contrastive:
    """HNM against as many real images as a block has."""
    return replace(HNM, pairs=RealNegatives(count=recipe.generation.block))


NONE = Row(name="none", about="real images only", arm=Arm.REAL)
PLAIN = Row(name="plain", about="+ plain diffusion", arm=Arm.PLAIN, against=("none",))
CDP = Row(
    name="cdp", about="+ Contrastive-DP (HNM, embedding)", changes=guided(HNM_EMBEDDING), against=("plain", "none")
)
BOTH = ("plain", "none")
