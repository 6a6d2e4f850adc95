"""What ours and the reference attack in tests/test_reference.py: four networks on digits, and 200 test images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gambeson.data.datasets import Digits
from gambeson.models.classifiers import load_classifier
from gambeson.models.network import ClassifierNetwork
from gambeson.models.resnet import ResNetSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.robustness.losses import TRADES, PGDAdversarial, Plain
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.loop import Optimisation

HERE = Path(__file__).parent
DATA = Digits(train_images=1000, validation_images=150)
"""Leaves 647 test images."""
IMAGES = 200
"""Of them are attacked, evenly spread."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network, how it was trained, and the ball in which it is attacked."""

    name: str
    training: ClassifierTraining
    threat: ThreatModel  # of the attack, chosen so that 40 to 60 % of the images stand

    @property
    def path(self) -> Path:
        """The weights."""
        return HERE / "models" / f"{self.name}.safetensors"

    def model(self) -> ClassifierNetwork:
        """The trained network, frozen, in eval mode."""
        return load_classifier(self.path, self.training.network)


def _linf(epsilon: float) -> ThreatModel:
    return ThreatModel(norm="linf", epsilon=epsilon)


def _l2(epsilon: float) -> ThreatModel:
    return ThreatModel(norm="l2", epsilon=epsilon)


_SMALL = ResNetSpec(width=8, multipliers=(1, 2, 4))
_WIDE = WideResNetSpec(depth=10, width=1, activation="relu", mean=(0.5,), std=(0.25,))
_FIT = Optimisation(steps=400, batch_size=128, learning_rate=0.2)


def _trained(loss: Any, network: Any = _SMALL) -> ClassifierTraining:
    return ClassifierTraining(network=network, loss=loss, optimisation=_FIT, validations=1)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(name="standard", training=_trained(Plain()), threat=_linf(0.08)),
        Subject(name="trades-linf", training=_trained(TRADES(threat=_linf(0.15))), threat=_linf(0.2)),
        Subject(name="pgd-l2", training=_trained(PGDAdversarial(threat=_l2(1.0))), threat=_l2(0.7)),
        Subject(name="wide-relu", training=_trained(PGDAdversarial(threat=_linf(0.15)), _WIDE), threat=_linf(0.18)),
    )
}


@cache
def images() -> tuple[Tensor, Tensor]:
    """The 200 images [200, 1, 8, 8] and their labels."""
    test = DATA.load().test
    rows = torch.linspace(0, len(test.labels) - 1, IMAGES).round().long()
    return test.images[rows], test.labels[rows]


def reference() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What make.py kept: arrays `subject/attack` with one row per seed, and the facts beside them."""
    with np.load(HERE / "reference.npz", allow_pickle=False) as arrays:
        return dict(arrays), json.loads((HERE / "reference.json").read_text(encoding="utf-8"))
