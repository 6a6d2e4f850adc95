"""Noise to images: schedules, samplers in one sigma space, contrastive losses, and the guidance that joins them."""

from gambeson.sampling.contrastive import (
    Debiased,
    HardNegative,
    InfoNCE,
    InfoNCEPaper,
    SupervisedContrastive,
    debiased,
    hard_negative,
    info_nce,
    info_nce_paper,
    supervised_contrastive,
)
from gambeson.sampling.embedding import (
    EmbeddingLearner,
    EmbeddingNetwork,
    FittedEmbedding,
    PerRunEmbedding,
)
from gambeson.sampling.guidance import (
    ClassifierGuidance,
    Contrastive,
    ContrastiveGuidance,
    DenoisedFeatures,
    GuidanceSum,
    NoiseConditionedFeatures,
    NoisyFeatures,
    TimestepWindow,
    TowardsClass,
    Window,
)
from gambeson.sampling.levels import (
    NoiseLevels,
    TimestepLevels,
)
from gambeson.sampling.pairs import (
    OtherClasses,
    PreviousStep,
    RealImages,
    RealNegatives,
    RealPositives,
)
from gambeson.sampling.samplers import (
    DDIM,
    DDPM,
    DPMSolverPP,
    Euler,
    Heun,
    NotFiniteError,
)
from gambeson.sampling.schedules import (
    alpha_bar_from_sigma,
    cosine_alpha_bar,
    ddim_sigmas,
    ddim_timesteps,
    karras_sigmas,
    linear_alpha_bar,
    sigma_from_alpha_bar,
)
from gambeson.sampling.walk import (
    final,
)
from gambeson.sampling.windows import (
    ConstantStrength,
    LinearStrength,
    PowerStrength,
)

__all__ = [
    "DDIM",
    "DDPM",
    "ClassifierGuidance",
    "ConstantStrength",
    "Contrastive",
    "ContrastiveGuidance",
    "DPMSolverPP",
    "Debiased",
    "DenoisedFeatures",
    "EmbeddingLearner",
    "EmbeddingNetwork",
    "Euler",
    "FittedEmbedding",
    "GuidanceSum",
    "HardNegative",
    "Heun",
    "InfoNCE",
    "InfoNCEPaper",
    "LinearStrength",
    "NoiseConditionedFeatures",
    "NoiseLevels",
    "NoisyFeatures",
    "NotFiniteError",
    "OtherClasses",
    "PerRunEmbedding",
    "PowerStrength",
    "PreviousStep",
    "RealImages",
    "RealNegatives",
    "RealPositives",
    "SupervisedContrastive",
    "TimestepLevels",
    "TimestepWindow",
    "TowardsClass",
    "Window",
    "alpha_bar_from_sigma",
    "cosine_alpha_bar",
    "ddim_sigmas",
    "ddim_timesteps",
    "debiased",
    "final",
    "hard_negative",
    "info_nce",
    "info_nce_paper",
    "karras_sigmas",
    "linear_alpha_bar",
    "sigma_from_alpha_bar",
    "supervised_contrastive",
]
