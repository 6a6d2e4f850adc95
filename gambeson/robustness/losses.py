"""The door to the training losses: TRADES, PGD-AT, MART, SCORE and plain (objectives), and what wraps them."""

from gambeson.robustness.awp import AWP
from gambeson.robustness.curriculum import Curriculum
from gambeson.robustness.inner import AdamSteps, AttackMode, Statistics, SteepestSteps, ascend
from gambeson.robustness.noise import GaussianNoise
from gambeson.robustness.objectives import MART, SCORE, TRADES, PGDAdversarial, Plain, TrainingLoss
from gambeson.robustness.terms import Targets, kl_divergence

__all__ = [
    "AWP",
    "MART",
    "SCORE",
    "TRADES",
    "AdamSteps",
    "AttackMode",
    "Curriculum",
    "GaussianNoise",
    "PGDAdversarial",
    "Plain",
    "Statistics",
    "SteepestSteps",
    "Targets",
    "TrainingLoss",
    "ascend",
    "kl_divergence",
]
