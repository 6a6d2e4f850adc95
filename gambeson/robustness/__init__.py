"""Attacks, robust losses, and an evaluation that doubts itself."""

from gambeson.robustness.attacks import (
    APGD,
    FGSM,
    PGD,
    TargetedAPGD,
    attack_input_checks,
    checkpoints,
    logits_of,
    robust_after,
)
from gambeson.robustness.checks import Check, run_checks
from gambeson.robustness.losses import (
    DLR,
    TRADES,
    AttackLoss,
    CrossEntropy,
    Margin,
    Network,
    NoGradient,
    PGDAdversarial,
    Plain,
    TargetedDLR,
    Verdicts,
)

__all__ = [
    "APGD",
    "DLR",
    "FGSM",
    "PGD",
    "TRADES",
    "AttackLoss",
    "Check",
    "CrossEntropy",
    "Margin",
    "Network",
    "NoGradient",
    "PGDAdversarial",
    "Plain",
    "TargetedAPGD",
    "TargetedDLR",
    "Verdicts",
    "attack_input_checks",
    "checkpoints",
    "logits_of",
    "robust_after",
    "run_checks",
]
