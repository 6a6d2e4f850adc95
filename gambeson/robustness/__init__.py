"""Attacks, robust losses, certificates, and an evaluation that doubts itself."""

from gambeson.robustness.assess import Assessment, assess
from gambeson.robustness.attack_losses import (
    DLR,
    AttackLoss,
    CrossEntropy,
    Margin,
    Network,
    NoGradient,
    TargetedDLR,
    Verdicts,
)
from gambeson.robustness.attacks import APGD, FGSM, PGD, TargetedAPGD, checkpoints
from gambeson.robustness.autoattack import AttackResult, AutoAttack
from gambeson.robustness.checks import Check, run_checks
from gambeson.robustness.fab import FAB, TargetedFAB, minimal_distance
from gambeson.robustness.inputs import attack_input_checks, logits_of
from gambeson.robustness.intervals import Interval, wilson
from gambeson.robustness.losses import (
    AWP,
    MART,
    SCORE,
    TRADES,
    AdamSteps,
    Curriculum,
    GaussianNoise,
    PGDAdversarial,
    Plain,
    SteepestSteps,
    Targets,
    TrainingLoss,
)
from gambeson.robustness.multitargeted import MultiTargeted, TargetedMargin
from gambeson.robustness.smoothing import Certificates, Smoothing
from gambeson.robustness.square import Square
from gambeson.robustness.verdicts import robust_after
from gambeson.robustness.zoo import load_zoo

__all__ = [
    "APGD",
    "AWP",
    "DLR",
    "FAB",
    "FGSM",
    "MART",
    "PGD",
    "SCORE",
    "TRADES",
    "AdamSteps",
    "Assessment",
    "AttackLoss",
    "AttackResult",
    "AutoAttack",
    "Certificates",
    "Check",
    "CrossEntropy",
    "Curriculum",
    "GaussianNoise",
    "Interval",
    "Margin",
    "MultiTargeted",
    "Network",
    "NoGradient",
    "PGDAdversarial",
    "Plain",
    "Smoothing",
    "Square",
    "SteepestSteps",
    "TargetedAPGD",
    "TargetedDLR",
    "TargetedFAB",
    "TargetedMargin",
    "Targets",
    "TrainingLoss",
    "Verdicts",
    "assess",
    "attack_input_checks",
    "checkpoints",
    "load_zoo",
    "logits_of",
    "minimal_distance",
    "robust_after",
    "run_checks",
    "wilson",
]
