"""Noise to images: schedules, samplers in one sigma space, contrastive losses, and the guidance that joins them."""

from gambeson.sampling.contrastive import (
    ConditionalHardNegative,
    HardNegative,
    InfoNCE,
    InfoNCEPaper,
    hard_negative,
    info_nce,
    info_nce_paper,
)
from gambeson.sampling.guidance import (
    ClassifierGuidance,
    Contrastive,
    ContrastiveGuidance,
    DenoisedFeatures,
    GuidanceSum,
    NoisyFeatures,
    TowardsClass,
    Window,
)
from gambeson.sampling.samplers import DDIM, Heun, NotFiniteError
from gambeson.sampling.schedules import (
    alpha_bar_from_sigma,
    cosine_alpha_bar,
    ddim_sigmas,
    ddim_timesteps,
    karras_sigmas,
    linear_alpha_bar,
    sigma_from_alpha_bar,
)

__all__ = [
    "DDIM",
    "ClassifierGuidance",
    "ConditionalHardNegative",
    "Contrastive",
    "ContrastiveGuidance",
    "DenoisedFeatures",
    "GuidanceSum",
    "HardNegative",
    "Heun",
    "InfoNCE",
    "InfoNCEPaper",
    "NoisyFeatures",
    "NotFiniteError",
    "TowardsClass",
    "Window",
    "alpha_bar_from_sigma",
    "cosine_alpha_bar",
    "ddim_sigmas",
    "ddim_timesteps",
    "hard_negative",
    "info_nce",
    "info_nce_paper",
    "karras_sigmas",
    "linear_alpha_bar",
    "sigma_from_alpha_bar",
]
