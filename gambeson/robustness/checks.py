"""The evaluation doubts itself: signs that a robust accuracy is too good to be true (METHOD 6; Carlini et al. 2019).

Every check returns a `Check`; a failed one belongs into the report in red. Images float [B, C, H, W] in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from gambeson.models.memory import lacks_memory
from gambeson.randomness import image_keys, uniform
from gambeson.robustness.attack_losses import (
    Margin,
    Network,
    NoGradient,
    Verdicts,
    frozen,
    loss_and_gradient,
    true_float32,
)
from gambeson.robustness.attacks import PGD
from gambeson.robustness.inputs import NotFinite, Portions, attack_input_checks, logits_of
from gambeson.robustness.verdicts import robust_after
from gambeson.threat import ThreatModel
from gambeson.types import Images, Labels

BATCH = 256
"""Images in the network at once, where nothing else is said."""
TINY = 5e-4
"""A move of every pixel that is an eighth of a grey level: what the slope of a loss speaks about."""
NOISE = 1e-5
"""Of the largest logit: what float32 arithmetic may change by itself, with a margin."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One doubt and its answer."""

    name: str  # what was checked
    passed: bool  # whether the doubt is unfounded
    detail: str  # the numbers


def logits_not_probabilities(model: Network, images: Images, batch_size: int = BATCH) -> Check:
    """Fails if every output row is a distribution: attacks on softmax outputs lose their gradients to saturation."""
    logits = logits_of(model, images, batch_size)
    off = (logits.sum(1) - 1).abs().max().item()
    is_distribution = bool(logits.min() >= 0) and off < 1e-3
    detail = f"outputs from {logits.min():.3g} to {logits.max():.3g}; rows sum to 1 within {off:.3g}"
    return Check(name="logits, not probabilities", passed=not is_distribution, detail=detail)


def deterministic(model: Network, images: Images, batch_size: int = BATCH) -> Check:
    """Fails if the same images give different logits twice (beyond 1e-4 of their size): attacks then chase noise."""
    first, second = (logits_of(model, images, batch_size) for _ in range(2))
    apart = ((first - second).abs().max() / first.abs().max().clamp_min(1e-12)).item()
    detail = f"largest change of a logit between two passes: {apart:.3g} of the largest logit"
    return Check(name="deterministic", passed=apart <= 1e-4, detail=detail)


def _margin_gradients(model: Network, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """[B, C, H, W] the gradient of each image's margin as autograd gives it, finite or not; `batch_size` at once."""

    def climb(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (loss_and_gradient(model, Margin(), x, y, y)[1],)

    with frozen(model), true_float32():
        return Portions(batch_size).each(climb, images, labels)[0]


def gradients_not_zero(model: Network, images: Images, labels: Labels, batch_size: int = BATCH) -> Check:
    """Fails if the margin of any image has a gradient of exactly zero, one that is not finite, or none at all: gradient
    attacks are blind."""
    name = "gradients not zero"
    try:
        gradient = _margin_gradients(model, images, labels, batch_size).flatten(1)
    except NoGradient as error:
        return Check(name=name, passed=False, detail=str(error))
    zero, broken = int((gradient == 0).all(1).sum()), int((~gradient.isfinite()).any(1).sum())
    detail = f"{zero} of {len(images)} images have a margin gradient of zero"
    detail += f", {broken} one that is not finite" if broken else ""
    return Check(name=name, passed=zero == broken == 0, detail=detail)


def batch_independent(model: Network, images: Images, batch_size: int = BATCH) -> Check:
    """Fails if the logits of an image (up to 8 are asked) depend on what else is in its batch, beyond 1e-3 of their
    size: batch statistics in place of learned ones, whatever the flags of the model say. Verdicts then depend on the
    batch size, and an attack on one image moves the others. A noisy model fails too. Batches have two images or more.
    """
    asked = images[: min(max(batch_size // 2, 1), 8)]
    company = logits_of(model, torch.cat([asked, 1 - asked]), 2 * len(asked))[: len(asked)]
    alone = torch.cat([logits_of(model, image.expand(2, -1, -1, -1), 2)[:1] for image in asked.split(1)])
    apart = ((alone - company).abs().max() / company.abs().max().clamp_min(1e-12)).item()
    detail = f"largest change of a logit between an image alone and in company: {apart:.3g} of the largest logit"
    return Check(name="batch independent", passed=apart <= 1e-3, detail=detail)


def _promise_and_change(
    model: Network, images: Tensor, labels: Tensor, batch_size: int = BATCH
) -> tuple[Tensor, Tensor, Tensor]:
    """[B] what the gradient says a step of TINY against each pixel's sign changes in the margin (NaN for a gradient
    that is not finite), what it does change (central difference), and the size below which neither can be told from
    rounding."""
    inside = TINY + (1 - 2 * TINY) * images  # so that no step leaves [0, 1], where a model may clip
    gradient = _margin_gradients(model, inside, labels, batch_size)
    promised = TINY * gradient.abs().flatten(1).sum(1)
    step = torch.where(gradient.isfinite(), TINY * gradient.sign(), 0)
    up, down = (logits_of(model, inside + way * step, batch_size) for way in (1, -1))
    change = (Margin()(up, labels) - Margin()(down, labels)) / 2
    return torch.where(promised.isfinite(), promised, math.nan), change, NOISE * up.abs().amax(1)


def gradients_true(model: Network, images: Images, labels: Labels, batch_size: int = BATCH) -> Check:
    """Fails if autograd's gradient is not the slope of the margin (Athalye et al. 2018, shattered gradients).

    Each image moves by an eighth of a grey level along the sign of its gradient. The margin must change by what the
    gradient promises, within half of it, on 9 of 10 images; and on half of them by enough to be told from rounding.
    Quantised inputs with a straight-through gradient promise much and change nothing; saturated ones promise nothing.
    """
    name, n = "gradients true", len(images)
    try:
        promised, changed, floor = _promise_and_change(model, images, labels, batch_size)
    except NoGradient as error:
        return Check(name=name, passed=False, detail=str(error))
    steep = promised > 10 * floor
    flat = int((steep & (changed.abs() <= floor)).sum())
    wrong = int((promised.isnan() | (steep & ((changed - promised).abs() > promised / 2))).sum())
    faint = n - int((steep | promised.isnan()).sum())
    detail = (
        f"moved by {TINY:g} along the gradient: {wrong} of {n} images change otherwise than it says, {flat} of them "
        f"not at all; {faint} have a gradient too small to see"
    )
    return Check(name=name, passed=10 * wrong <= n and 2 * faint <= n, detail=detail)


def _other_scales(images: Tensor) -> dict[str, Tensor]:
    """The images as a model might expect them that was not told of [0, 1]."""
    mean = images.mean((0, 2, 3), keepdim=True)
    std = images.std((0, 2, 3), keepdim=True, correction=0).clamp_min(1e-3)
    scales = {"times 255": images * 255, "in [-1, 1]": 2 * images - 1, "standardised": (images - mean) / std}
    return scales | ({"as BGR": images.flip(1)} if images.shape[1] == 3 else {})


def _right(model: Network, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """[B] whether each image is classified as its label; a model that refuses such images has none right."""
    try:
        return logits_of(model, images, batch_size).argmax(1) == labels
    except (ValueError, RuntimeError, AssertionError) as error:
        if lacks_memory(error):
            raise
        return torch.zeros_like(labels, dtype=torch.bool)


def preprocessing_inside(model: Network, images: Images, labels: Labels, batch_size: int = BATCH) -> Check:
    """Fails if the model is right more often, by over 10 points, on the images times 255, in [-1, 1], standardised or
    with red and blue swapped: its preprocessing was left outside, so attacks in [0, 1] search the wrong box.

    The surplus must also be over two standard deviations of the images on which the two disagree (McNemar).
    """
    given, beaten = logits_of(model, images, batch_size).argmax(1) == labels, []
    shown = [f"as given {given.float().mean():.1%}"]
    for name, scaled in _other_scales(images).items():
        right = _right(model, scaled, labels, batch_size)
        surplus, differ = int(right.sum() - given.sum()), int((right != given).sum())
        beaten.append(surplus > max(0.1 * len(images), 2 * math.sqrt(differ)))
        shown.append(f"{name} {right.float().mean():.1%}")
    detail = f"clean accuracy {', '.join(shown)}"
    return Check(name="preprocessing inside", passed=not any(beaten), detail=detail)


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
    batch_size: int = BATCH,
) -> Check:
    """Fails if blind guessing (`tries` random points per image) fools any image that the white box called robust."""
    _same_length(images, whitebox_robust)
    keys = image_keys(images, labels, seed)
    standing = whitebox_robust.nonzero().flatten()
    claimed = len(standing)
    for attempt in range(tries):
        if len(standing):
            guesses = _guess(threat, images[standing], keys[standing], attempt)
            standing = standing[logits_of(model, guesses, batch_size).argmax(1) == labels[standing]]
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


def reaches_zero(
    model: Network, images: Images, labels: Labels, threat: ThreatModel, seed: int = 0, batch_size: int = BATCH
) -> Check:
    """Fails if any image survives PGD with the whole cube allowed (l2: its diagonal; linf, and in l1's place: 1)."""
    name = "reaches zero"
    diagonal = replace(threat, epsilon=math.sqrt(images[0].numel()))
    everything = diagonal if threat.norm == "l2" else ThreatModel(epsilon=1.0)
    try:
        robust = robust_after(PGD(threat=everything), model, images, labels, batch_size, seed)
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


def square_not_stronger(fell: int, standing: int) -> Check:
    """Fails if Square fooled more than 1 in 100 (and more than 1) of the images that stood after the gradient attacks.

    Random search sees less than gradients do: where it finds more, gradients are masked (Carlini et al. 2019).
    """
    detail = f"Square, which sees no gradients, fooled {fell} of the {standing} images that stood after those that do"
    return Check(name="Square not stronger than gradients", passed=fell <= max(slack(standing), 1), detail=detail)


def _same_length(first: Tensor, second: Tensor) -> None:
    if len(first) != len(second):
        raise ValueError(f"checks: expected one verdict per image, got {len(first)} and {len(second)}")


def no_gradients() -> Check:
    """Stands in the place of the checks of gradients where a classifier came without: it never passes."""
    detail = "no: the classifier came without, so nobody can tell whether they are masked, or zero, or lead to 0 %"
    return Check(name="gradients can be checked", passed=False, detail=detail)


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
    batch_size: int = BATCH,
    gradients: bool = True,
) -> list[Check]:
    """Every check that the given verdicts allow: whitebox_robust [B] under `threat`, accuracies as (epsilon, accuracy)
    on these images, pgd_robust and apgd_robust [B]; of a model without gradients one line stands for those of them.

    `batch_size` images are in the network at once (two, where it is one: `batch_independent`). Raises ValueError for
    inputs out of form.
    """
    attack_input_checks(images, labels)
    made: list[Callable[[], Check]] = [
        lambda: logits_not_probabilities(model, images, batch_size),
        lambda: deterministic(model, images, batch_size),
        lambda: gradients_not_zero(model, images, labels, batch_size) if gradients else no_gradients(),
        lambda: blackbox_not_stronger(model, images, labels, threat, whitebox_robust, seed=seed, batch_size=batch_size),
        *([lambda: reaches_zero(model, images, labels, threat, seed, batch_size)] if gradients else []),
        lambda: batch_independent(model, images, batch_size),
        *([lambda: gradients_true(model, images, labels, batch_size)] if gradients else []),
        lambda: preprocessing_inside(model, images, labels, batch_size),
    ]
    if accuracies:
        made.append(lambda: accuracy_falls(accuracies, len(images)))
    checks = list(_answered(made))
    if pgd_robust is not None and apgd_robust is not None:
        checks.append(pgd_not_stronger_than_apgd(pgd_robust, apgd_robust))
    return checks


def _answered(made: Sequence[Callable[[], Check]]) -> Iterator[Check]:
    """The checks; one that met logits that are no numbers fails as such, and the others are made."""
    for check in made:
        try:
            yield check()
        except NotFinite as error:
            yield Check(name="finite logits", passed=False, detail=f"near the images: {error}")
