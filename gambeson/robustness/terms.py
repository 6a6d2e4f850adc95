"""The terms of training losses, from logits [B, K] in float32 or wider to one number per image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gambeson.errors import require
from gambeson.types import Labels, Logits, PerImage

Targets = Labels | Float[Tensor, "b targets"]
"""int64 [B] class indices, or float [B, K] soft targets whose rows sum to 1 (CutMix, smoothing)."""


def wide(logits: Tensor) -> Tensor:
    """The same in float32 where it came in half precision (autocast); gradients go back in the precision it came in."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _check_classes(labels: Tensor, classes: int) -> None:
    """UserError for soft targets of another width than the logits. Sums are not looked at: that would halt a GPU."""
    fits = labels.dim() == 1 or labels.shape[1] == classes
    require(fits, "soft targets", f"one column per class, [B, {classes}]", list(labels.shape))


def distribution(labels: Targets, logits: Logits, label_smoothing: float = 0.0) -> Logits:
    """[B, K] the targets as probabilities t, (1 - label_smoothing) t + label_smoothing / K, in the logits' dtype."""
    classes = logits.shape[1]
    _check_classes(labels, classes)
    hard = labels if labels.dim() == 2 else F.one_hot(labels, classes)
    return hard.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes


def cross_entropy(logits: Logits, labels: Targets, label_smoothing: float = 0.0) -> PerImage:
    """-sum_k t_k log p_k with t of `distribution`: logits [B, K] and targets -> [B], in nats."""
    _check_classes(labels, logits.shape[1])
    targets = labels.to(logits.dtype) if labels.dim() == 2 else labels
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def kl_divergence(p: Logits, q: Logits) -> PerImage:
    """KL(softmax(p) || softmax(q)) of each image: logits [B, K] twice -> [B], in nats."""
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def against_runner_up(logits: Logits, labels: Labels) -> PerImage:
    """-log(1 - max_{k != y} p_k): logits [B, K], labels [B] -> [B], the second half of MART's boosted cross-entropy.

    As the log of the sum of all other probabilities, so that it stays exact, and its gradient alive, however sure the
    network is of the wrong class.
    """
    log_p = logits.log_softmax(1)
    best = log_p.detach().scatter(1, labels[:, None], -math.inf).argmax(1, keepdim=True)
    return -log_p.scatter(1, best, -math.inf).logsumexp(1)


def unsure(logits: Logits, labels: Labels) -> PerImage:
    """1 - p_y: logits [B, K], labels [B] -> [B]."""
    return -torch.expm1(logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1))


def squared_distance(p: Logits, q: Logits) -> PerImage:
    """||p - q||^2 of each image: probabilities [B, K] twice -> [B]."""
    return (p - q).square().sum(1)


def squared_distance_slope(logits: Logits, q: Logits) -> Logits:
    """[B, K] the gradient of ||softmax(z) - q||^2 with respect to the logits z."""
    p = logits.softmax(1)
    pull = p * (p - q)
    return 2 * (pull - p * pull.sum(1, keepdim=True))
