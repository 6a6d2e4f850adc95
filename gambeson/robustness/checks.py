"""The evaluation doubts itself: signs that a robust accuracy is too good to be true (METHOD 6; Carlini et al. 2019).

Every check returns a `Check`; a failed one belongs into the report in red. Images float [B, C, H, W] in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from gambeson.randomness import image_keys, uniform
from gambeson.robustness.attack_losses import Margin, Network, NoGradient, Verdicts, frozen, loss_and_gradient
from gambeson.robustness.attacks import PGD, attack_input_checks, logits_of, robust_after
from gambeson.threat import ThreatModel
from gambeson.types import Images, Labels

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Check:
    """One doubt and its answer."""

    name: str  # what was checked
    passed: bool  # whether the doubt is unfounded
    detail: str  # the numbers


def logits_not_probabilities(model: Network, images: Images) -> Check:
    """Fails if every output row is a distribution: attacks on softmax outputs lose their gradients to saturation."""
    logits = logits_of(model, images, BATCH)
    off = (logits.sum(1) - 1).abs().max().item()
    is_distribution = bool(logits.min() >= 0) and off < 1e-3
    detail = f"outputs from {logits.min():.3g} to {logits.max():.3g}; rows sum to 1 within {off:.3g}"
    return Check(name="logits, not probabilities", passed=not is_distribution, detail=detail)


def deterministic(model: Network, images: Images) -> Check:
    """Fails if the same images give different logits twice (beyond 1e-4 of their size): attacks then chase noise."""
    first, second = logits_of(model, images, BATCH), logits_of(model, images, BATCH)
    apart = ((first - second).abs().max() / first.abs().max().clamp_min(1e-12)).item()
    detail = f"largest change of a logit between two passes: {apart:.3g} of the largest logit"
    return Check(name="deterministic", passed=apart <= 1e-4, detail=detail)


def _margin_gradients(model: Network, images: Tensor, labels: Tensor) -> Tensor:
    """[B] largest entry of each image's margin gradient."""
    sizes = []
    with frozen(model):
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            _, gradient, _ = loss_and_gradient(model, Margin(), x, y, y)
            sizes.append(gradient.abs().flatten(1).amax(1))
    return torch.cat(sizes)


def gradients_not_zero(model: Network, images: Images, labels: Labels) -> Check:
    """Fails if the margin of any image has a gradient of exactly zero, or none at all: gradient attacks are blind."""
    name = "gradients not zero"
    try:
        sizes = _margin_gradients(model, images, labels)
    except NoGradient as error:
        return Check(name=name, passed=False, detail=str(error))
    zero = int((sizes == 0).sum())
    return Check(name=name, passed=zero == 0, detail=f"{zero} of {len(images)} images have a margin gradient of zero")


def _guess(threat: ThreatModel, images: Tensor, keys: Tensor, attempt: int) -> Tensor:
    """A random corner of the ball, constant on square cells of 1, 2, 4 or all pixels (odd attempts: an inner point).

    Coarse cells are the stronger guesses: the effect of signs that change from pixel to pixel averages out.
    """
    _, channels, height, width = images.shape
    cell = (1, 2, 4, max(height, width))[attempt // 2 % 4]
    shape = (channels, math.ceil(height / cell), math.ceil(width / cell))
    draws = uniform(keys, "black box", shape, attempt)
    draws = draws if attempt % 2 else (draws > 0.5).double()
    tiled = draws.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return threat.random(images, tiled[:, :, :height, :width])


def blackbox_not_stronger(
    model: Network,
    images: Images,
    labels: Labels,
    threat: ThreatModel,
    whitebox_robust: Verdicts,
    seed: int = 0,
    tries: int = 50,
) -> Check:
    """Fails if blind guessing (`tries` random points per image) fools any image that the white box called robust."""
    _same_length(images, whitebox_robust)
    keys = image_keys(images, labels, seed)
    standing = whitebox_robust.nonzero().flatten()
    claimed = len(standing)
    for attempt in range(tries):
        if len(standing):
            guesses = _guess(threat, images[standing], keys[standing], attempt)
            standing = standing[logits_of(model, guesses, BATCH).argmax(1) == labels[standing]]
    fell = claimed - len(standing)
    detail = f"{fell} of {claimed} images called robust fell to {tries} random points of {threat}"
    return Check(name="black box not stronger", passed=fell == 0, detail=detail)


def slack(n: int) -> int:
    """How many of n images may disagree before a comparison of two attacks is suspicious: one in a hundred."""
    return n // 100


def accuracy_falls(accuracies: Sequence[tuple[float, float]], n: int) -> Check:
    """Fails if accuracy rises with epsilon (by more than 1 image in 100), or does not fall at all, though above 0.

    accuracies: (epsilon, accuracy in [0, 1]) on the same n images; raises ValueError for fewer than two.
    """
    if len(accuracies) < 2:
        raise ValueError(f"accuracy_falls: expected at least two (epsilon, accuracy) pairs, got {len(accuracies)}")
    counts = [round(accuracy * n) for _, accuracy in sorted(accuracies)]
    rise = max(later - earlier for earlier, later in pairwise(counts))
    falls = counts[-1] < counts[0] or counts[0] == 0
    shown = ", ".join(f"{accuracy:.1%} at {epsilon:.4g}" for epsilon, accuracy in sorted(accuracies))
    detail = f"{shown}; largest rise {max(rise, 0)} of {n} images"
    return Check(name="accuracy falls", passed=rise <= slack(n) and falls, detail=detail)


def reaches_zero(model: Network, images: Images, labels: Labels, threat: ThreatModel, seed: int = 0) -> Check:
    """Fails if any image survives PGD with the whole cube allowed (linf: epsilon 1; l2: the cube's diagonal)."""
    name = "reaches zero"
    everything = replace(threat, epsilon=1.0 if threat.norm == "linf" else math.sqrt(images[0].numel()))
    try:
        robust = robust_after(PGD(threat=everything), model, images, labels, BATCH, seed)
    except NoGradient as error:
        return Check(name=name, passed=False, detail=str(error))
    detail = f"{int(robust.sum())} of {len(images)} images survive {everything}"
    return Check(name=name, passed=not robust.any(), detail=detail)


def pgd_not_stronger_than_apgd(pgd_robust: Verdicts, apgd_robust: Verdicts) -> Check:
    """Fails if plain PGD leaves fewer images robust than AutoPGD, by more than 1 in 100: AutoPGD went wrong."""
    _same_length(pgd_robust, apgd_robust)
    pgd, apgd = int(pgd_robust.sum()), int(apgd_robust.sum())
    only = int((apgd_robust & ~pgd_robust).sum())
    detail = f"robust: {pgd} under PGD, {apgd} under AutoPGD, of {len(pgd_robust)}; {only} fell to PGD alone"
    return Check(name="PGD not stronger than AutoPGD", passed=apgd - pgd <= slack(len(pgd_robust)), detail=detail)


def _same_length(first: Tensor, second: Tensor) -> None:
    if len(first) != len(second):
        raise ValueError(f"checks: expected one verdict per image, got {len(first)} and {len(second)}")


def run_checks(
    model: Network,
    images: Images,
    labels: Labels,
    threat: ThreatModel,
    *,
    whitebox_robust: Verdicts,
    accuracies: Sequence[tuple[float, float]] = (),
    pgd_robust: Verdicts | None = None,
    apgd_robust: Verdicts | None = None,
    seed: int = 0,
) -> list[Check]:
    """Every check that the given verdicts allow: whitebox_robust [B] under `threat`, accuracies as (epsilon, accuracy)
    on these images, pgd_robust and apgd_robust [B]. Raises ValueError for inputs out of form."""
    attack_input_checks(images, labels)
    checks = [
        logits_not_probabilities(model, images),
        deterministic(model, images),
        gradients_not_zero(model, images, labels),
        blackbox_not_stronger(model, images, labels, threat, whitebox_robust, seed),
        reaches_zero(model, images, labels, threat, seed),
    ]
    if accuracies:
        checks.append(accuracy_falls(accuracies, len(images)))
    if pgd_robust is not None and apgd_robust is not None:
        checks.append(pgd_not_stronger_than_apgd(pgd_robust, apgd_robust))
    return checks
