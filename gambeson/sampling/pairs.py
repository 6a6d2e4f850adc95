"""What is a positive and what a negative: the four choices of CDP appendix C.1, whatever the loss.

Real images are an argument of the guidance; which of them a block uses is drawn once, from the block's own generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from gambeson.sampling.losses import others


@dataclass(frozen=True, eq=False)
class RealImages:
    """Labelled real images [N, C, H, W] in [0, 1] (or points [N, D] of a toy world, in any range), labels [N].

    Raises ValueError for none at all, another number of labels, or images that are not floats in [0, 1].
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) == 0 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"RealImages: expected 1 or more images and as many labels, got {tuple(self.images.shape)} and "
                f"{tuple(self.labels.shape)}"
            )
        flat = self.images.dim() < 3
        if not self.images.is_floating_point() or not (flat or (self.images.min() >= 0 and self.images.max() <= 1)):
            raise ValueError(
                f"RealImages: expected floating-point images in [0, 1], got {self.images.dtype} from "
                f"{self.images.min().item():.4g} to {self.images.max().item():.4g}; divide 8-bit images by 255"
            )

    def of_class(self, label: int) -> Tensor:
        """Indices of the images of a class. ValueError where there is none."""
        found = (self.labels == label).nonzero()[:, 0]
        if not len(found):
            raise ValueError(
                f"real pairs: expected a real image of every class that is sampled, got none of class {label}; the "
                f"real images have {sorted(set(self.labels.tolist()))[:12]}"
            )
        return found


@dataclass(frozen=True, eq=False)
class Reals:
    """The real images of a block as features [N, D], with their labels [N]."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairing:
    """What a loss is given besides the anchors: positive [B, D], negatives [M, D] and which [B, M] of them count."""

    positive: Tensor
    negatives: Tensor | None = None
    allowed: Tensor | None = None


@runtime_checkable
class Pairs(Protocol):
    """A choice of pairs. `conditional`: negatives are of other classes only, so the loss is given the labels.

    `needs_previous`: the image's own previous step is its positive, so its features are needed.
    """

    conditional: ClassVar[bool]
    needs_previous: ClassVar[bool]

    def reals(self, batch: int) -> int:
        """How many real images a block of `batch` images needs."""
        ...

    def draw(self, real: RealImages, batch: int, labels: Tensor | None, generator: Generator) -> Tensor:
        """[reals(batch)] int64: the real images of a block; the generator lives on the CPU."""
        ...

    def arrange(self, query: Tensor, previous: Tensor | None, reals: Reals | None, labels: Tensor | None) -> Pairing:
        """Positives and negatives of the anchors `query` [B, D]; labels [B] as the loss gets them, often None."""
        ...


def _previous(previous: Tensor | None) -> Tensor:
    assert previous is not None
    return previous


@dataclass(frozen=True, kw_only=True)
class PreviousStep:
    """CDP C.1, first choice: an image's positive is its own previous step, its negatives the rest of the batch."""

    conditional: ClassVar[bool] = False
    needs_previous: ClassVar[bool] = True

    def reals(self, batch: int) -> int:
        """0."""
        return 0

    def draw(self, real: RealImages, batch: int, labels: Tensor | None, generator: Generator) -> Tensor:
        """No real images."""
        return torch.zeros(0, dtype=torch.int64)

    def arrange(self, query: Tensor, previous: Tensor | None, reals: Reals | None, labels: Tensor | None) -> Pairing:
        """The previous features."""
        return Pairing(positive=_previous(previous))


@dataclass(frozen=True, kw_only=True)
class OtherClasses:
    """CDP C.1, fourth choice: the positive is the previous step, the negatives are the batch's other classes only.

    The one whose samples do not repel others of their own class (CDP C.2). Losses with tau_plus need it at 0 here.
    """

    conditional: ClassVar[bool] = True
    needs_previous: ClassVar[bool] = True

    def reals(self, batch: int) -> int:
        """0."""
        return 0

    def draw(self, real: RealImages, batch: int, labels: Tensor | None, generator: Generator) -> Tensor:
        """No real images."""
        return torch.zeros(0, dtype=torch.int64)

    def arrange(self, query: Tensor, previous: Tensor | None, reals: Reals | None, labels: Tensor | None) -> Pairing:
        """The previous features; ValueError without labels."""
        if labels is None:
            raise ValueError(
                "class-conditional pairs: expected labels, got None; sample with labels, or choose PreviousStep, which "
                "needs none"
            )
        return Pairing(positive=_previous(previous))


@dataclass(frozen=True, kw_only=True)
class RealPositives:
    """CDP C.1, second choice: the positive is a real image of the anchor's class, drawn once per block.

    Any real image where sampling is without labels. The negatives are the other generated images of the batch, of any
    class (CDP's caption of Figure 3), for the real anchors of a two-sided loss too; a supervised loss takes those of
    other classes.
    """

    conditional: ClassVar[bool] = False
    needs_previous: ClassVar[bool] = False

    def reals(self, batch: int) -> int:
        """One for each image."""
        return batch

    def draw(self, real: RealImages, batch: int, labels: Tensor | None, generator: Generator) -> Tensor:
        """[B]: with replacement, each from its own class. ValueError where a class has no real image."""
        place = torch.rand(batch, generator=generator, dtype=torch.float64)
        if labels is None:
            return (place * len(real.labels)).long()
        drawn = torch.zeros(batch, dtype=torch.int64)
        for label in labels.unique().tolist():
            own, found = (labels == label).cpu(), real.of_class(label).cpu()
            drawn[own] = found[(place[own] * len(found)).long()]
        return drawn

    def arrange(self, query: Tensor, previous: Tensor | None, reals: Reals | None, labels: Tensor | None) -> Pairing:
        """The real features, and the anchors themselves as one another's negatives."""
        assert reals is not None
        mask = others(len(query), labels, query.device)
        return Pairing(positive=reals.features, negatives=query, allowed=mask)


@dataclass(frozen=True, kw_only=True)
class RealNegatives:
    """CDP C.1, third choice: the positive is the previous step, the negatives are real images drawn once per block.

    They are of any class, and the same for every anchor; a supervised loss takes those of other classes.
    """

    conditional: ClassVar[bool] = False
    needs_previous: ClassVar[bool] = True
    count: int = 512  # how many real images a block's anchors are contrasted with

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"RealNegatives count: expected 1 or more real images, got {self.count}")

    def reals(self, batch: int) -> int:
        """`count`, whatever the batch."""
        return self.count

    def draw(self, real: RealImages, batch: int, labels: Tensor | None, generator: Generator) -> Tensor:
        """[count]: without replacement. ValueError where there are fewer real images."""
        if len(real.labels) < self.count:
            raise ValueError(
                f"RealNegatives: expected at least count={self.count} real images to draw from, got "
                f"{len(real.labels)}; lower count"
            )
        return torch.randperm(len(real.labels), generator=generator)[: self.count]

    def arrange(self, query: Tensor, previous: Tensor | None, reals: Reals | None, labels: Tensor | None) -> Pairing:
        """The previous features, and the real ones as negatives."""
        assert reals is not None
        mask = None if labels is None else labels[:, None] != reals.labels
        return Pairing(positive=_previous(previous), negatives=reals.features, allowed=mask)


PairChoice = PreviousStep | RealPositives | RealNegatives | OtherClasses
"""The choices of pairs that a recipe can name."""
