"""The contrastive losses as components of a recipe, and the functions behind them (`gambeson.sampling.losses`).

A component is called with embeddings [B, D] of anchors and their positives, negatives [M, D] (None: the rest of the
batch) and labels [B] (negatives of other classes only), and gives one loss per anchor: [B], or [2B] where the positives
are anchors too. `allowed` [B, M] says which negatives count; `clamp` asks for the authors' clamps, where there are any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gambeson.sampling.losses import (
    Allowed,
    Anchors,
    Negatives,
    check_numbers,
    debiased,
    hard_negative,
    info_nce,
    info_nce_paper,
    supervised_contrastive,
)
from gambeson.types import Features, Labels, PerImage

__all__ = [
    "Debiased",
    "HardNegative",
    "InfoNCE",
    "InfoNCEPaper",
    "PairLoss",
    "SupervisedContrastive",
    "debiased",
    "hard_negative",
    "info_nce",
    "info_nce_paper",
    "supervised_contrastive",
]


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """`info_nce` as a component: [B] losses (CDP's code, CIFAR-10: temperature .1)."""

    supervised: ClassVar[bool] = False
    temperature: float = 0.1  # softmax temperature

    def __post_init__(self) -> None:
        check_numbers(self.temperature)

    def __call__(
        self,
        query: Features,
        positive: Features,
        negatives: Negatives | None = None,
        labels: Labels | None = None,
        *,
        allowed: Allowed | None = None,
        clamp: bool = False,
    ) -> PerImage:
        """[B, D] queries and positives -> [B]; there is nothing to clamp."""
        return info_nce(query, positive, negatives, temperature=self.temperature, labels=labels, allowed=allowed)


@dataclass(frozen=True, kw_only=True)
class InfoNCEPaper:
    """`info_nce_paper` as a component: [B] losses."""

    supervised: ClassVar[bool] = False
    temperature: float = 0.1  # softmax temperature

    def __post_init__(self) -> None:
        check_numbers(self.temperature)

    def __call__(
        self,
        query: Features,
        positive: Features,
        negatives: Negatives | None = None,
        labels: Labels | None = None,
        *,
        allowed: Allowed | None = None,
        clamp: bool = False,
    ) -> PerImage:
        """[B, D] queries and positives -> [B]; there is nothing to clamp."""
        return info_nce_paper(query, positive, negatives, temperature=self.temperature, labels=labels, allowed=allowed)


@dataclass(frozen=True, kw_only=True)
class Debiased:
    """`debiased` as a component: [2B] losses; with labels (pairs OtherClasses) tau_plus has to be 0."""

    supervised: ClassVar[bool] = False
    temperature: float = 10.0  # softmax temperature
    tau_plus: float = 0.1  # assumed share of a batch that has the anchor's class

    def __post_init__(self) -> None:
        check_numbers(self.temperature, self.tau_plus)

    def __call__(
        self,
        query: Features,
        positive: Features,
        negatives: Negatives | None = None,
        labels: Labels | None = None,
        *,
        allowed: Allowed | None = None,
        clamp: bool = False,
    ) -> Anchors:
        """[B, D] queries and positives -> [2B]."""
        return debiased(
            query,
            positive,
            temperature=self.temperature,
            tau_plus=self.tau_plus,
            labels=labels,
            negatives=negatives,
            allowed=allowed,
            clamp=clamp,
        )


@dataclass(frozen=True, kw_only=True)
class HardNegative:
    """`hard_negative` as a component: [2B] losses, the queries' then the positives' (CDP: these numbers).

    The class-conditional form (CDP appendix C.1, fourth choice) is HardNegative(tau_plus=0.) with pairs=OtherClasses().
    """

    supervised: ClassVar[bool] = False
    temperature: float = 10.0  # softmax temperature
    tau_plus: float = 0.1  # assumed share of a batch that has the anchor's class; 0 with pairs OtherClasses
    beta: float = 1.0  # weight on hard negatives; 0: all alike
    estimator: Literal["hard", "easy"] = field(
        default="hard",  # 'easy': the plain sum of the negatives, which ignores tau_plus and beta
        metadata={"neutral": "hard"},
    )

    def __post_init__(self) -> None:
        check_numbers(self.temperature, self.tau_plus, self.beta)
        if self.estimator not in ("hard", "easy"):
            raise ValueError(f"HardNegative estimator: expected 'hard' or 'easy', got {self.estimator!r}")

    def __call__(
        self,
        query: Features,
        positive: Features,
        negatives: Negatives | None = None,
        labels: Labels | None = None,
        *,
        allowed: Allowed | None = None,
        clamp: bool = False,
    ) -> Anchors:
        """[B, D] queries and positives -> [2B]."""
        return hard_negative(
            query,
            positive,
            temperature=self.temperature,
            tau_plus=self.tau_plus,
            beta=self.beta,
            estimator=self.estimator,
            labels=labels,
            negatives=negatives,
            allowed=allowed,
            clamp=clamp,
        )


@dataclass(frozen=True, kw_only=True)
class SupervisedContrastive:
    """`supervised_contrastive` as a component: [2B] losses; labels are required, whatever the pairs."""

    supervised: ClassVar[bool] = True
    temperature: float = 0.1  # softmax temperature (Khosla et al. 2020 train with .1)

    def __post_init__(self) -> None:
        check_numbers(self.temperature)

    def __call__(
        self,
        query: Features,
        positive: Features,
        negatives: Negatives | None = None,
        labels: Labels | None = None,
        *,
        allowed: Allowed | None = None,
        clamp: bool = False,
    ) -> Anchors:
        """[B, D] queries and positives, [B] labels -> [2B]; there is nothing to clamp. ValueError without labels."""
        if labels is None:
            raise ValueError(
                "supervised contrastive loss: expected labels, got None; sample with labels, or choose a loss that "
                "needs none, such as HardNegative"
            )
        return supervised_contrastive(
            query, positive, temperature=self.temperature, labels=labels, negatives=negatives, allowed=allowed
        )


PairLoss = InfoNCE | InfoNCEPaper | Debiased | HardNegative | SupervisedContrastive
"""The contrastive losses that a recipe can name."""
