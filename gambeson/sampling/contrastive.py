"""Contrastive losses on embeddings: InfoNCE in two forms and hard negative mining, unsupervised or class-conditional.

One number per anchor; embeddings are used as given (normalise them first). Everything is computed in logs, so no
batch size and no temperature underflows; the authors' clamps at 1e-4 are left out, their floor on Ng is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gambeson.types import Features, Labels, PerImage

Negatives = Float[Tensor, "m d"]
"""[M, D] embeddings that every anchor takes as negatives."""
Estimator = Literal["hard", "easy"]


def _check_numbers(temperature: float, tau_plus: float = 0.0, beta: float = 0.0) -> None:
    if not (temperature > 0 and 0 <= tau_plus < 1 and beta >= 0):
        raise ValueError(
            "contrastive loss: expected temperature > 0, 0 <= tau_plus < 1 and beta >= 0, "
            f"got temperature={temperature}, tau_plus={tau_plus}, beta={beta}"
        )


def _check_batch(batch: int) -> None:
    if batch < 2:
        raise ValueError(
            f"contrastive loss: expected at least 2 images, got a batch of {batch}, which leaves no negatives; "
            "generate larger blocks, or pass negatives"
        )


def info_nce(
    query: Features, positive: Features, negatives: Negatives | None = None, *, temperature: float
) -> PerImage:
    """InfoNCE, the form of CDP's code: cross-entropy of picking the own positive among all rows of `positive`.

    query, positive [B, D] -> [B]. With negatives [M, D]: among the own positive and these. The positive is in the
    denominator, so every value is above 0. ValueError for a batch of 1 without negatives, or a temperature <= 0.
    """
    _check_numbers(temperature)
    if negatives is not None:
        own = (query * positive).sum(1, keepdim=True)
        logits = torch.cat([own, query @ negatives.T], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64), reduction="none")
    _check_batch(len(query))
    logits = query @ positive.T / temperature
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device), reduction="none")


def info_nce_paper(
    query: Features, positive: Features, negatives: Negatives | None = None, *, temperature: float
) -> PerImage:
    """InfoNCE as CDP section 4.2 prints it: the negatives are the other rows of `query`, at the same noise level.

    query, positive [B, D] -> [B]. Neither the anchor nor its positive is in the denominator, so values may be negative.
    With negatives [M, D]: these instead. ValueError for a batch of 1 without negatives, or a temperature <= 0.
    """
    _check_numbers(temperature)
    own = (query * positive).sum(1) / temperature
    if negatives is not None:
        return (query @ negatives.T / temperature).logsumexp(1) - own
    _check_batch(len(query))
    itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
    return (query @ query.T / temperature).masked_fill(itself, -math.inf).logsumexp(1) - own


def _allowed(batch: int, labels: Labels | None, device: torch.device) -> Bool[Tensor, "a a"]:
    """[2B, 2B]: which rows of (z1; z2) are negatives of which anchor: other images, or images of other classes."""
    _check_batch(batch)
    group = torch.arange(batch, device=device) if labels is None else labels
    if labels is not None and bool((labels == labels[0]).all()):
        raise ValueError(
            f"class-conditional loss: expected at least 2 classes in a batch, got only class {int(labels[0])}, which "
            "leaves no negatives; mix the classes within a block"
        )
    group = group.repeat(2)
    return group[:, None] != group[None, :]


def _log_hard_negatives(
    log_g: Float[Tensor, "a k"],
    log_pos: Float[Tensor, " a"],
    allowed: Bool[Tensor, "a k"],
    temperature: float,
    tau_plus: float,
    beta: float,
) -> Float[Tensor, " a"]:
    """log Ng = log max[(sum(g^beta g) / mean(g^beta) - tau+ N pos) / (1 - tau+), N e^(-1/T)] (Robinson et al. 2021)."""
    n = allowed.sum(1).to(log_g.dtype)

    def log_sum(power: float) -> Tensor:
        return (power * log_g).masked_fill(~allowed, -math.inf).logsumexp(1)

    log_all = log_sum(1 + beta) - log_sum(beta) + n.log()
    log_false = (tau_plus * n).log() + log_pos - log_all  # the share taken off as false negatives
    log_rest = math.log1p(-tau_plus)
    floor = n.log() - 1 / temperature
    with torch.no_grad():
        floored = log_all + (-torch.expm1(log_false.clamp_max(0))).log() - log_rest <= floor
    kept = log_all + (-torch.expm1(log_false.masked_fill(floored, -1.0))).log() - log_rest
    return torch.where(floored, floor, kept)


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
) -> Float[Tensor, " a"]:
    """Contrastive loss with hard negative mining (Robinson et al. 2021, eq. 4; CDP section 4.2; METHOD 1.2).

    z1, z2 [B, D]: row i of each is the other's positive -> [2B], z1's anchors then z2's: -log(pos / (pos + Ng)).
    The negatives are the 2B - 2 other rows; with labels [B] only those of other classes, as many as there are; with
    negatives [M, D] these. tau_plus is the share of false negatives that is corrected for, beta the weight put on
    similar ones; 'easy' is the plain sum, which ignores both.
    Raises ValueError for numbers out of range, a batch of 1 or of one class, or labels with tau_plus > 0 (negatives
    known to be of other classes hold no false ones) or with negatives (whose classes are not known).
    """
    _check_numbers(temperature, tau_plus, beta)
    if estimator not in ("hard", "easy"):
        raise ValueError(f"hard_negative, estimator: expected 'hard' or 'easy', got {estimator!r}")
    if labels is not None and (tau_plus != 0 or negatives is not None):
        raise ValueError(
            "hard_negative with labels: expected tau_plus=0 and no negatives, since rows of other classes are no false "
            f"negatives; got tau_plus={tau_plus} and {'some' if negatives is not None else 'no'} negatives"
        )
    anchors = torch.cat([z1, z2])
    log_pos = (anchors * torch.cat([z2, z1])).sum(1) / temperature
    log_g = anchors @ (anchors if negatives is None else negatives).T / temperature
    allowed = (
        torch.ones_like(log_g, dtype=torch.bool) if negatives is not None else _allowed(len(z1), labels, z1.device)
    )
    if estimator == "easy":
        log_ng = log_g.masked_fill(~allowed, -math.inf).logsumexp(1)
    else:
        log_ng = _log_hard_negatives(log_g, log_pos, allowed, temperature, tau_plus, beta)
    return -F.logsigmoid(log_pos - log_ng)


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """`info_nce` as a component: [B] losses; labels are ignored (CDP's code, CIFAR-10: temperature .1)."""

    temperature: float = 0.1  # softmax temperature

    def __post_init__(self) -> None:
        _check_numbers(self.temperature)

    def __call__(
        self, query: Features, positive: Features, negatives: Negatives | None = None, labels: Labels | None = None
    ) -> PerImage:
        """[B, D] queries and positives -> [B]."""
        return info_nce(query, positive, negatives, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class InfoNCEPaper:
    """`info_nce_paper` as a component: [B] losses; labels are ignored."""

    temperature: float = 0.1  # softmax temperature

    def __post_init__(self) -> None:
        _check_numbers(self.temperature)

    def __call__(
        self, query: Features, positive: Features, negatives: Negatives | None = None, labels: Labels | None = None
    ) -> PerImage:
        """[B, D] queries and positives -> [B]."""
        return info_nce_paper(query, positive, negatives, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class HardNegative:
    """`hard_negative` as a component: [2B] losses, the queries' then the positives'; labels are ignored."""

    temperature: float = 10.0  # softmax temperature
    tau_plus: float = 0.1  # assumed share of a batch that has the anchor's class
    beta: float = 1.0  # weight on hard negatives; 0: all alike

    def __post_init__(self) -> None:
        _check_numbers(self.temperature, self.tau_plus, self.beta)

    def __call__(
        self, query: Features, positive: Features, negatives: Negatives | None = None, labels: Labels | None = None
    ) -> Float[Tensor, " a"]:
        """[B, D] queries and positives -> [2B]."""
        t, tau_plus, beta = self.temperature, self.tau_plus, self.beta
        return hard_negative(query, positive, temperature=t, tau_plus=tau_plus, beta=beta, negatives=negatives)


@dataclass(frozen=True, kw_only=True)
class ConditionalHardNegative:
    """`hard_negative` against other classes only: [2B] losses, the queries' then the positives'; labels are required.

    CDP appendix C.1, fourth choice of pairs: the one whose samples do not repel others of their own class (its C.2).
    """

    temperature: float = 10.0  # softmax temperature
    beta: float = 1.0  # weight on hard negatives; 0: all alike

    def __post_init__(self) -> None:
        _check_numbers(self.temperature, 0.0, self.beta)

    def __call__(
        self, query: Features, positive: Features, negatives: Negatives | None = None, labels: Labels | None = None
    ) -> Float[Tensor, " a"]:
        """[B, D] queries and positives, [B] labels -> [2B]. ValueError without labels, with negatives, or one class."""
        if labels is None:
            raise ValueError(
                "class-conditional loss: expected labels, got None; sample with labels, or use HardNegative, "
                "which needs none"
            )
        t, beta = self.temperature, self.beta
        return hard_negative(
            query, positive, temperature=t, tau_plus=0.0, beta=beta, labels=labels, negatives=negatives
        )
