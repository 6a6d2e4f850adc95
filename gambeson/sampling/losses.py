"""Contrastive losses as functions: one number per anchor, each of the form -log(pos / (pos + Ng)) or close to it.

Embeddings are used as given (normalise them first). Everything is computed in logs, so no batch size and no temperature
underflows; the authors' clamps at 1e-4 are left out unless asked for (`clamp`), their floor on Ng is kept.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gambeson.types import Features, Labels, PerImage

Negatives = Float[Tensor, "m d"]
"""[M, D] embeddings that anchors take as negatives, in place of their batch."""
Allowed = Bool[Tensor, "b m"]
"""[B, M] which of the negatives count for which anchor; None where all do."""
Anchors = Float[Tensor, " a"]
"""[2B] one number per anchor, the queries' then the positives'."""
Estimator = Literal["hard", "easy"]


def check_numbers(temperature: float, tau_plus: float = 0.0, beta: float = 0.0) -> None:
    """ValueError unless temperature > 0, 0 <= tau_plus < 1 and beta >= 0."""
    if not (temperature > 0 and 0 <= tau_plus < 1 and beta >= 0):
        raise ValueError(
            "contrastive loss: expected temperature > 0, 0 <= tau_plus < 1 and beta >= 0, "
            f"got temperature={temperature}, tau_plus={tau_plus}, beta={beta}"
        )


def others(batch: int, labels: Labels | None, device: torch.device) -> Bool[Tensor, "b b"]:
    """[B, B]: which images of a batch are negatives of which: all others, or with labels those of other classes.

    Raises ValueError for a batch of 1, or of one class: no negatives are left.
    """
    if batch < 2:
        raise ValueError(
            f"contrastive loss: expected at least 2 images, got a batch of {batch}, which leaves no negatives; "
            "generate larger blocks, or take real images as negatives"
        )
    if labels is not None and bool((labels == labels[0]).all()):
        raise ValueError(
            f"class-conditional loss: expected at least 2 classes in a batch, got only class {int(labels[0])}, which "
            "leaves no negatives; mix the classes within a block"
        )
    group = torch.arange(batch, device=device) if labels is None else labels
    return group[:, None] != group[None, :]


def _given(anchors: int, negatives: Tensor, allowed: Tensor | None) -> Tensor:
    """[A, M]: which of the given negatives count for which anchor; those of z1 and z2 are alike."""
    if allowed is None:
        return torch.ones(anchors, len(negatives), dtype=torch.bool, device=negatives.device)
    return allowed if len(allowed) == anchors else allowed.repeat(2, 1)


def _candidates(
    anchors: Tensor,
    rows: Tensor,
    batch: int,
    negatives: Tensor | None,
    labels: Tensor | None,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Negatives [K, D] and [A, K] which of them count: the given ones, or those of `rows` that are other images."""
    if negatives is None:
        if allowed is not None:
            raise ValueError("contrastive loss: expected negatives together with `allowed`, got None; use labels")
        mask = others(batch, labels, anchors.device)
        return rows, mask.repeat(len(anchors) // batch, len(rows) // batch)
    if labels is not None:
        raise ValueError(
            "contrastive loss with labels: expected no negatives, since their classes are not known, got "
            f"{len(negatives)}; say by `allowed` which of them count"
        )
    mask = _given(len(anchors), negatives, allowed)
    if not bool(mask.any(1).all()):
        raise ValueError(
            "contrastive loss: expected at least 1 negative for every anchor, got none for anchor "
            f"{int((~mask.any(1)).nonzero()[0])} of {len(anchors)}; give more negatives, or allow more of them"
        )
    return negatives, mask


def _log_sum(logits: Tensor, mask: Tensor) -> Tensor:
    """[A]: log of the sum of the exponentials of what the mask lets through."""
    return logits.masked_fill(~mask, -math.inf).logsumexp(1)


def info_nce(
    query: Features,
    positive: Features,
    negatives: Negatives | None = None,
    *,
    temperature: float,
    labels: Labels | None = None,
    allowed: Allowed | None = None,
) -> PerImage:
    """InfoNCE, the form of CDP's code: cross-entropy of picking the own positive among all rows of `positive`.

    query, positive [B, D] -> [B]. With labels [B]: among the own and those of other classes; with negatives [M, D]:
    among the own and these. The positive is in the denominator, so every value is above 0. ValueError for a temperature
    <= 0, no negative left (a batch of 1, of one class), or labels and negatives at once.
    """
    check_numbers(temperature)
    rows, mask = _candidates(query, positive, len(query), negatives, labels, allowed)
    own = (query * positive).sum(1) / temperature
    return F.softplus(_log_sum(query @ rows.T / temperature, mask) - own)


def info_nce_paper(
    query: Features,
    positive: Features,
    negatives: Negatives | None = None,
    *,
    temperature: float,
    labels: Labels | None = None,
    allowed: Allowed | None = None,
) -> PerImage:
    """InfoNCE as CDP section 4.2 prints it: the negatives are the other rows of `query`, at the same noise level.

    query, positive [B, D] -> [B]. Neither the anchor nor its positive is in the denominator, so values may be negative.
    labels, negatives, errors: as `info_nce`.
    """
    check_numbers(temperature)
    rows, mask = _candidates(query, query, len(query), negatives, labels, allowed)
    return _log_sum(query @ rows.T / temperature, mask) - (query * positive).sum(1) / temperature


def _log_hard_negatives(
    log_g: Float[Tensor, "a k"],
    log_pos: Anchors,
    mask: Bool[Tensor, "a k"],
    temperature: float,
    tau_plus: float,
    beta: float,
) -> Anchors:
    """log Ng = log max[(sum(g^beta g) / mean(g^beta) - tau+ N pos) / (1 - tau+), N e^(-1/T)] (Robinson et al. 2021)."""
    n = mask.sum(1).to(log_g.dtype)
    log_all = _log_sum((1 + beta) * log_g, mask) - _log_sum(beta * log_g, mask) + n.log()
    log_false = (tau_plus * n).log() + log_pos - log_all  # the share taken off as false negatives
    log_rest = math.log1p(-tau_plus)
    floor = n.log() - 1 / temperature
    with torch.no_grad():
        floored = log_all + (-torch.expm1(log_false.clamp_max(0))).log() - log_rest <= floor
    kept = log_all + (-torch.expm1(log_false.masked_fill(floored, -1.0))).log() - log_rest
    return torch.where(floored, floor, kept)


def _clamped_loss(
    log_g: Float[Tensor, "a k"],
    log_pos: Anchors,
    mask: Bool[Tensor, "a k"],
    temperature: float,
    tau_plus: float,
    beta: float,
    estimator: Estimator,
) -> Anchors:
    """The authors' function to the letter (METHOD 1.2): every clamp stops the gradient of what it holds."""
    n, pos = mask.sum(1).to(log_pos.dtype), log_pos.exp()
    g = log_g.exp().clamp_min(1e-4)
    if estimator == "easy":
        ng = (g * mask).sum(1)
    else:
        importance = g**beta * mask
        reweighted = (importance * g).sum(1) / (importance.sum(1) / n)
        ng = ((reweighted - tau_plus * n * pos) / (1 - tau_plus)).maximum(n * math.exp(-1 / temperature))
    return -(pos / (pos + ng)).clamp_min(1e-4).log()


def hard_negative(
    z1: Features,
    z2: Features,
    *,
    temperature: float,
    tau_plus: float,
    beta: float,
    estimator: Estimator = "hard",
    labels: Labels | None = None,
    negatives: Negatives | None = None,
    allowed: Allowed | None = None,
    clamp: bool = False,
) -> Anchors:
    """Contrastive loss with hard negative mining (Robinson et al. 2021, eq. 4; CDP section 4.2; METHOD 1.2).

    z1, z2 [B, D]: row i of each is the other's positive -> [2B], z1's anchors then z2's: -log(pos / (pos + Ng)).
    The negatives are the 2B - 2 other rows; with labels [B] only those of other classes, as many as there are; with
    negatives [M, D] these. tau_plus is the share of false negatives that is corrected for, beta the weight put on
    similar ones; 'easy' is the plain sum, which ignores both. clamp: the authors' code, with its clamps at 1e-4, which
    stop an anchor's gradient where pos / (pos + Ng) falls below (from about B = 5,000 on).
    Raises ValueError for numbers out of range, no negative left (a batch of 1, of one class), labels with tau_plus > 0
    (rows known to be of other classes hold no false negatives), or labels and negatives at once.
    """
    check_numbers(temperature, tau_plus, beta)
    if estimator not in ("hard", "easy"):
        raise ValueError(f"hard_negative, estimator: expected 'hard' or 'easy', got {estimator!r}")
    if labels is not None and tau_plus != 0:
        raise ValueError(
            "hard_negative with labels: expected tau_plus=0, since rows of other classes are no false negatives, "
            f"got tau_plus={tau_plus}; set it to 0, or choose pairs that ignore the classes"
        )
    anchors = torch.cat([z1, z2])
    rows, mask = _candidates(anchors, anchors, len(z1), negatives, labels, allowed)
    log_pos = (anchors * torch.cat([z2, z1])).sum(1) / temperature
    log_g = anchors @ rows.T / temperature
    if clamp:
        return _clamped_loss(log_g, log_pos, mask, temperature, tau_plus, beta, estimator)
    easy = estimator == "easy"
    log_ng = _log_sum(log_g, mask) if easy else _log_hard_negatives(log_g, log_pos, mask, temperature, tau_plus, beta)
    return F.softplus(log_ng - log_pos)


def debiased(
    z1: Features,
    z2: Features,
    *,
    temperature: float,
    tau_plus: float,
    labels: Labels | None = None,
    negatives: Negatives | None = None,
    allowed: Allowed | None = None,
    clamp: bool = False,
) -> Anchors:
    """Debiased contrastive loss (Chuang et al. 2020, eq. 8): `hard_negative` with all negatives alike, beta = 0."""
    return hard_negative(
        z1,
        z2,
        temperature=temperature,
        tau_plus=tau_plus,
        beta=0.0,
        labels=labels,
        negatives=negatives,
        allowed=allowed,
        clamp=clamp,
    )


def supervised_contrastive(
    z1: Features,
    z2: Features,
    *,
    temperature: float,
    labels: Labels,
    negatives: Negatives | None = None,
    allowed: Allowed | None = None,
) -> Anchors:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2, L_out).

    z1, z2 [B, D], labels [B] -> [2B], z1's anchors then z2's: the mean over an anchor's positives, its partner and
    all rows of its class, of -log(pos / sum over all other rows). With negatives [M, D] these stand in the sum in place
    of the rows of other classes. ValueError for a temperature <= 0, or a batch of 1 or of one class without negatives.
    """
    check_numbers(temperature)
    anchors = torch.cat([z1, z2])
    logits = anchors @ anchors.T / temperature
    classes = labels.repeat(2)
    same = (classes[:, None] == classes) & ~torch.eye(len(anchors), dtype=torch.bool, device=z1.device)
    if negatives is None:
        mask = others(len(z1), labels, z1.device).repeat(2, 2)
        log_all = _log_sum(logits, same | mask)
    else:
        against = (anchors @ negatives.T / temperature).masked_fill(
            ~_given(len(anchors), negatives, allowed), -math.inf
        )
        log_all = torch.cat([logits.masked_fill(~same, -math.inf), against], dim=1).logsumexp(1)
    return log_all - (logits * same).sum(1) / same.sum(1)
