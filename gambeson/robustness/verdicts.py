"""Which images stand after an attack: every image that it calls fooled is looked at once more, in full precision."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from gambeson.robustness.attack_losses import HasThreat, Network, Verdicts, threat_of
from gambeson.robustness.inputs import clean_logits, logits_of
from gambeson.robustness.pursuit import Board, Pursuit, pursue
from gambeson.robustness.views import View
from gambeson.types import Images, Labels, Progress, silent


@runtime_checkable
class SeededAttack(HasThreat, Protocol):
    """An attack with a threat model whose draws come from a seed."""

    def __call__(self, model: Network, images: Tensor, labels: Tensor, seed: int = 0) -> Tensor: ...


def check_inside(attack: HasThreat, images: Images, adversarial: Images) -> None:
    """ValueError if an adversarial image lies outside the ball or [0, 1]."""
    threat = threat_of(attack)
    left = (threat.distance(adversarial, images) - threat.epsilon).max().item()
    if not (left <= 1e-5 * threat.epsilon + 1e-6 and adversarial.min() >= 0 and adversarial.max() <= 1):
        raise ValueError(
            f"{type(attack).__name__}: expected images within {threat} and [0, 1], got some {left:.3g} outside the "
            "ball or out of range; the attack must project its last step"
        )


def settled(attack: HasThreat, model: Network, board: Board, rows: Tensor, batch_size: int) -> Tensor:
    """[b] whether the best images of these rows, checked once more in full precision, are still classified right.

    Only what the attack called fooled is looked at again. Raises ValueError if such an image lies outside the ball or
    [0, 1].
    """
    right = board.right[rows].clone()
    fooled = rows[~right]
    if len(fooled):
        found = board.best[fooled]
        check_inside(attack, board.images[fooled], found)
        right[~right] = logits_of(model, found, batch_size).argmax(1) == board.labels[fooled]
    return right


def robust_after(
    attack: SeededAttack,
    model: Network,
    images: Images,
    labels: Labels,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = silent,
) -> Verdicts:
    """[B] True where the clean image is right and the attack's image, checked again in full precision, is too.

    Only images still right are attacked, in batches that stay full. Raises ValueError as the attack does, and if an
    adversarial image lies outside the ball or [0, 1].
    """
    threat_of(attack)
    board = Board(images, labels, clean_logits(model, images, labels, batch_size), seed)
    right = board.right.clone()
    rows = board.standing()
    if isinstance(attack, Pursuit):
        pursue(attack, View(model), board, batch_size, lambda chase: progress(len(images) - chase.left, len(images)))
    else:
        for part in rows.split(batch_size):
            board.best[part] = attack(model, images[part], labels[part], seed=seed)
            progress(int(part[-1]) + 1, len(images))
        board.right[rows] = False  # so that every image is looked at
    right[rows] = settled(attack, model, board, rows, batch_size)
    progress(len(images), len(images))
    return right
