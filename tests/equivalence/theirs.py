"""The reference package (pyautoattack 0.2) on the subjects: every attack alone on all images, and the whole."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor

from .subjects import IMAGES, Subject, images

NORMS: dict[str, Any] = {"linf": "Linf", "l2": "L2"}
RUNS = {
    "apgd-ce": 10,
    "apgd-dlr": 10,
    "apgd-t": 5,
    "apgd-t-20": 10,
    "fab": 3,
    "fab-t": 5,
    "fab-t-20": 5,
    "square": 5,
    "square-500": 10,
    "square-mended": 8,
    "square-mended-500": 10,
    "standard": 5,
}
"""Attack -> seeds. A number at the end is the budget: steps or queries; without one AutoAttack's own, 100 or 5000.

mended: Square's windows also reach the last row and column. The reference draws their place below side - window, the
end left out, so that small windows never touch the lower and right edge: on 8x8 images much weaker, no bar for an
attack without the slip."""


@dataclass
class Found:
    """What one run found, image by image."""

    right: np.ndarray  # [200] bool, True where the image stands
    seconds: float
    more: dict[str, np.ndarray] = field(default_factory=dict)  # distances of FAB, margins and queries of Square


def order_of(seed: int) -> Tensor:
    """In which order a seed attacks the images: FAB draws nothing, so only the order tells its seeds apart."""
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(IMAGES, generator=g) if seed else torch.arange(IMAGES)


def apgd(subject: Subject, seed: int, loss: str, steps: int = 100) -> APGDAttack:
    """AutoPGD as AutoAttack's standard version sets it up; loss: ce, dlr or t."""
    given = {"n_iter": steps, "norm": NORMS[subject.threat.norm], "eps": subject.threat.epsilon, "seed": seed}
    given |= {"n_restarts": 1, "eot_iter": 1, "rho": 0.75, "device": "cpu", "logger": logging.getLogger("theirs")}
    return (
        APGDAttack_targeted(subject.model(), **given)
        if loss == "t"
        else APGDAttack(subject.model(), **given, loss=loss)
    )


def suite(subject: Subject, seed: int) -> AutoAttack:
    """AutoAttack itself, version standard."""
    norm, epsilon = NORMS[subject.threat.norm], subject.threat.epsilon
    return AutoAttack(subject.model(), norm=norm, eps=epsilon, seed=seed, version="standard", device="cpu")


def run(subject: Subject, name: str, seed: int) -> Found:
    """One run of one attack on all images, one batch; verdicts are taken from the images that come back."""
    order = order_of(seed)
    x, y = (part[order] for part in images())
    work = {"apgd": _apgd, "fab": _fab, "square": _square, "standard": _standard}[name.split("-")[0]]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begun = time.perf_counter()
        adversarial, more = work(subject, name, seed, x, y)
        seconds = time.perf_counter() - begun
    _within(subject, adversarial, x)
    found = {"right": _right(subject, adversarial, y) & _right(subject, x, y), **more}
    back = order.argsort().numpy()
    found = {key: np.asarray(value)[back] for key, value in found.items()}
    return Found(right=found.pop("right"), seconds=seconds, more=found)


def _apgd(subject: Subject, name: str, seed: int, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
    _, loss, *steps = name.split("-")
    return apgd(subject, seed, loss, *map(int, steps)).perturb(x, y), {}


def _fab(subject: Subject, name: str, seed: int, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Every target of every image, none left out, so that the least distance is known; AutoAttack stops at epsilon."""
    fab, threat = suite(subject, seed).fab, subject.threat
    fab.n_iter = int(name.split("-")[2]) if name.count("-") == 2 else 100
    best, least = x.clone(), torch.full_like(y, torch.inf, dtype=torch.float32)
    for target in range(2, 11) if "-t" in name else [None]:
        fab.target_class = target
        found = fab.attack_single_run(x, y, is_targeted=target is not None)
        distance = threat.distance(found, x)
        better = ~_right(subject, found, y) & _right(subject, x, y) & (distance < least)
        least, best = torch.where(better, distance, least), torch.where(better[:, None, None, None], found, best)
    inside = (least <= threat.epsilon)[:, None, None, None]
    return torch.where(inside, best, x), {"distance": least.numpy()}


def _square(subject: Subject, name: str, seed: int, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """As SquareAttack.perturb, but the queries are kept; margins are those of the last image."""
    square, right = suite(subject, seed).square, _right(subject, x, y)
    last = name.split("-")[-1]
    square.n_queries = int(last) if last.isdecimal() else 5000
    if "mended" in name:
        place = square.random_int
        square.random_int = lambda low=0, high=1: place(low, high + 1)
    square.init_hyperparam(x)
    torch.manual_seed(seed)
    asked, found = square.attack_single_run(x[right], y[right])
    best, queries = x.clone(), torch.zeros(len(x))
    best[right], queries[right] = found, asked
    with torch.no_grad():
        margin = square.margin_and_loss(best, y)[0]
    return best, {"margin": margin.numpy(), "queries": queries.numpy().astype(np.int16)}


def _standard(subject: Subject, name: str, seed: int, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return suite(subject, seed).run_standard_evaluation(x, y, batch_size=IMAGES)[0], {}


def _right(subject: Subject, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return subject.model()(x).argmax(1) == y


def _within(subject: Subject, adversarial: Tensor, x: Tensor) -> None:
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert subject.threat.distance(adversarial, x).max() <= subject.threat.epsilon * (1 + 1e-5)
