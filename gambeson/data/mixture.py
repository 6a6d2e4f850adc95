"""Batches with an exact fraction of synthetic images: real without replacement, synthetic with (or block by block).

A batch depends on (seed, step) alone, so a resumed training needs no data position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gambeson.data.chosen import Chosen
from gambeson.data.compact import ByClass
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.reading import SyntheticStore
from gambeson.data.shuffle import BlockShuffle, Stretches
from gambeson.errors import UserError, require
from gambeson.randomness import derive, generator
from gambeson.types import Images


@runtime_checkable
class SyntheticSource(Protocol):
    """Synthetic images by position; a whole set in memory or a store on disk."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 NHWC and labels int64."""
        ...


@runtime_checkable
class LabelledSource(SyntheticSource, Protocol):
    """A source that can say all its labels, and what its images are, without reading one."""

    @property
    def compact_labels(self) -> np.ndarray:
        """[N], in the smallest integer type that holds them; -1: generated without a class."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        ...


@dataclass(frozen=True)
class Places:
    """What a batch is made of, in its order: positions int64 in the real and in the synthetic images."""

    real: Tensor
    synthetic: Tensor


SyntheticOrder = Literal["anywhere", "blocks"]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "real order", epoch))


ROUNDS = 256
"""Rounds through the classes whose order is drawn at once."""


@lru_cache(maxsize=4)
def _class_order(seed: int, group: int, classes: int) -> Tensor:
    """[ROUNDS * classes]: the classes, in a fresh order each round."""
    return torch.rand(ROUNDS, classes, generator=generator(seed, "class order", group)).argsort(1).flatten()


@lru_cache(maxsize=4096)
def _class_permutation(seed: int, label: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "real order of a class", label, epoch))


@dataclass(frozen=True)
class Mixture:
    """`batch_size` images of which round(fraction * batch_size) are synthetic (CDP eq. 3 with a fixed fraction).

    `balanced`: every class is equally likely, in the real and the synthetic part; synthetic classes without an image
    are left out. `real_repeats`: each real image that is drawn stands so often in the batch, for that many
    augmentations of it (IRGD's JAX code: 4). `synthetic_order`: "anywhere" draws each synthetic image from all of them,
    with replacement; "blocks" takes them as `BlockShuffle` does, without, which a disk serves at its full speed.
    """

    real: Split
    synthetic: SyntheticSource | None
    fraction: float
    batch_size: int
    seed: int
    balanced: bool = False
    real_repeats: int = 1
    synthetic_order: SyntheticOrder = "anywhere"

    def __post_init__(self) -> None:
        require(0 <= self.fraction <= 1, "fraction", "a share of synthetic images from 0 to 1", self.fraction)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(self.real_repeats >= 1, "real_repeats", "at least 1", self.real_repeats)
        if self.real_per_batch % self.real_repeats:
            raise UserError(
                f"real_repeats: expected a divisor of the {self.real_per_batch} real images of a batch of "
                f"{self.batch_size} at fraction {self.fraction}, got {self.real_repeats}; {self._near()} fits"
            )
        if self.real_per_batch and not len(self.real):
            raise UserError("fraction: expected 1.0 where there is no real image, got a batch that needs some")
        if self.synthetic_order == "blocks":
            require(not self.balanced, "synthetic_order", "anywhere, where classes are balanced", "blocks")
            stretches = self.synthetic is None or isinstance(self.synthetic, Stretches)
            require(stretches, "synthetic_order", "anywhere, for a source that is no store and no selection", "blocks")
        if self.synthetic_per_batch and not len(self.synthetic or ()):
            raise UserError("synthetic: expected at least one image, got an empty source; fraction 0 does without")

    def _near(self) -> str:
        """The fraction next to the one asked for that leaves whole repeats."""
        kept = round(self.real_per_batch / self.real_repeats) * self.real_repeats
        kept = kept if kept <= self.batch_size else kept - self.real_repeats
        return f"a fraction of {1 - kept / self.batch_size:.6g}"

    @property
    def synthetic_per_batch(self) -> int:
        """Synthetic images in every batch; 0 without a synthetic source."""
        return round(self.fraction * self.batch_size) if self.synthetic is not None else 0

    @property
    def real_per_batch(self) -> int:
        """Real images in every batch, repeats counted."""
        return self.batch_size - self.synthetic_per_batch

    def places(self, step: int) -> Places:
        """Where the images of this step's batch come from; the real ones stand first."""
        return Places(self.real_indices(step), self.synthetic_indices(step))

    def real_indices(self, step: int) -> Tensor:
        """Positions in `real` for this step: consecutive pieces of one random permutation per pass.

        Balanced: one image of each class a round, each class through permutations of its own.
        """
        each = self.real_per_batch // self.real_repeats
        turns = torch.arange(step * each, (step + 1) * each)
        return (self._balanced(turns) if self.balanced else self._natural(turns)).repeat(self.real_repeats)

    def _natural(self, turns: Tensor) -> Tensor:
        size = max(len(self.real), 1)
        passes = turns // size
        found = [_permutation(self.seed, int(p), size)[turns[passes == p] % size] for p in passes.unique()]
        return torch.cat(found) if found else turns

    def _balanced(self, turns: Tensor) -> Tensor:
        """Turn t is in round t // K, whose class order is drawn; a class gives its next image in every round."""
        if not len(turns):
            return turns
        classes = len(self._real_classes)
        group, inside = turns // (ROUNDS * classes), turns % (ROUNDS * classes)
        labels = torch.cat([_class_order(self.seed, int(g), classes)[inside[group == g]] for g in group.unique()])
        found, rounds = torch.empty_like(turns), turns // classes
        for label in labels.unique().tolist():
            here = labels == label
            found[here] = self._of_class(label, rounds[here])
        return found

    def _of_class(self, label: int, rounds: Tensor) -> Tensor:
        """Positions of the images that a class gives in these rounds."""
        members = self._real_classes[label]
        passes, inside = rounds // len(members), rounds % len(members)
        found = torch.empty_like(rounds)
        for p in passes.unique().tolist():
            order = _class_permutation(self.seed, label, p, len(members))
            found[passes == p] = members[order[inside[passes == p]]]
        return found

    @cached_property
    def _real_classes(self) -> list[Tensor]:
        """Positions of each class. UserError for a class without an image."""
        counts = self.real.labels.bincount()
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise UserError(
                f"balanced: expected real images of each of the {len(counts)} classes, got none of class "
                f"{', '.join(map(str, empty[:10]))}; add some, number the classes without gaps, or use balanced=False"
            )
        return list(self.real.labels.argsort(stable=True).split(counts.tolist()))

    def synthetic_indices(self, step: int) -> Tensor:
        """Positions in `synthetic` for this step: drawn independently, or the next ones of an order by blocks."""
        if self.synthetic is None or not self.synthetic_per_batch:
            return torch.empty(0, dtype=torch.int64)
        if self.synthetic_order == "blocks":
            first = step * self.synthetic_per_batch
            return torch.from_numpy(self._by_blocks.positions(first, first + self.synthetic_per_batch))
        draw, count = generator(self.seed, "synthetic draw", step), self.synthetic_per_batch
        if self.balanced:
            return torch.from_numpy(self._synthetic_classes.draw(count, draw))
        return torch.randint(len(self.synthetic), (count,), generator=draw)

    @cached_property
    def _by_blocks(self) -> BlockShuffle:
        assert isinstance(self.synthetic, Stretches)
        return BlockShuffle(self.synthetic, self.synthetic_per_batch, derive(self.seed, "synthetic order"))

    @cached_property
    def _synthetic_classes(self) -> ByClass:
        """Where the images of each class lie; made only when a balanced batch asks."""
        if not isinstance(self.synthetic, LabelledSource):
            raise UserError(
                "balanced: expected a synthetic source that says all its labels (a store, a selection), got "
                f"{type(self.synthetic).__name__}"
            )
        return ByClass.of(self.synthetic.compact_labels)

    @property
    def soft(self) -> Chosen | None:
        """The selection whose soft labels are trained on; None where labels are classes."""
        found = self.synthetic if isinstance(self.synthetic, Chosen) and self.synthetic.soft is not None else None
        return found if self.synthetic_per_batch else None

    def batch(self, step: int) -> tuple[Images, Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1], labels [B], and which are synthetic (bool [B]; the real ones stand first).

        With soft labels: rows of probabilities float32 [B, K], a one where the class of a real image is.
        """
        places, images, labels = self.places(step), [], []
        if len(places.real):
            images, labels = [self.real.images[places.real]], [self._rows(self.real.labels[places.real])]
        if self.synthetic is not None and len(places.synthetic):
            indices = places.synthetic.numpy()
            pixels, classes = self.synthetic.read(indices)
            images.append(from_uint8(pixels))
            labels.append(torch.from_numpy(classes if self.soft is None else self.soft.soft_rows(indices)))
        synthetic = torch.arange(self.batch_size) >= self.real_per_batch
        return torch.cat(images), torch.cat(labels), synthetic

    def _rows(self, labels: Tensor) -> Tensor:
        """The labels of real images, as those of the synthetic ones are: classes, or rows."""
        if self.soft is None or self.soft.soft is None:
            return labels
        return F.one_hot(labels, self.soft.soft.shape[1]).float()


def check_synthetic(source: LabelledSource, real: ImageSet) -> None:
    """UserError where synthetic images cannot stand beside the real ones: other size or channels, labels outside,
    classes of other names, soft labels for another number of them.

    Reads every label and no image.
    """
    check_images(source, real)
    low, high = int(source.compact_labels.min()), int(source.compact_labels.max())
    classes = len(real.class_names)
    if low < 0:
        raise UserError(
            f"synthetic labels: expected 0 to {classes - 1}, got {low}, which stands for images generated without a "
            "class; let a teacher label them first (gambeson label, or a recipe's labeling.by ByTeacher)"
        )
    if high >= classes:
        raise UserError(
            f"synthetic labels: expected 0 to {classes - 1} for the {classes} classes of {real.name}, got up to "
            f"{high}; the set was made for more classes: take the one made for these, or the real set it was made for"
        )
    width = source.soft.shape[1] if isinstance(source, Chosen) and source.soft is not None else classes
    if width != classes:
        raise UserError(
            f"soft labels: expected probabilities of the {classes} classes of {real.name}, got rows of {width}; label "
            "the images with a teacher of these classes"
        )


def check_images(source: LabelledSource, real: ImageSet) -> None:
    """UserError where synthetic images are no images of the real set, whatever their labels: other size or channels,
    classes of other names, not one image."""
    _check_names_of(source, real)
    channels, height, width = real.shape
    if source.shape != (height, width, channels):
        raise UserError(
            f"synthetic images: expected {height} x {width} pixels of {channels} channels, as {real.name} has, got "
            f"{source.shape[0]} x {source.shape[1]} of {source.shape[2]}; take another set, or load the real images at "
            "that size"
        )
    if not len(source):
        raise UserError("synthetic images: expected at least one, got an empty set; generate or import some")


def _check_names_of(source: LabelledSource, real: ImageSet) -> None:
    """UserError where both sets name their classes, and differently."""
    store = source.store if isinstance(source, Chosen) else source
    told = tuple(store.provenance.get("class_names") or ()) if isinstance(store, SyntheticStore) else ()
    fix = "Take the set made for these, or rename its class folders so that they sort like these and import it again"
    check_names(told, real.class_names, whose="synthetic images", wanted_by=real.name, fix=fix)


def check_names(told: tuple[str, ...], wanted: tuple[str, ...], *, whose: str, wanted_by: str, fix: str) -> None:
    """UserError where two sides name their classes, by label, and differently. Empty: a side names none.

    The first may name fewer. Numbers in order ("0", "1", ...) name nothing, unless the other side has numbers among its
    names, in another order. whose, wanted_by: the sides in words; fix: what to do.
    """
    if same_names(told, wanted):
        return
    pairs = enumerate(zip(told, wanted, strict=False))
    first = next((k for k, (a, b) in pairs if a != b), min(len(told), len(wanted)))
    raise UserError(
        f"{whose}: expected the classes of {wanted_by} in their order, {_listed(wanted)}; got {_listed(told)}, another "
        f"from class {first} on: labels would mean other classes. {fix}"
    )


def same_names(told: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether both may name the same classes, as `check_names` says."""
    if not told or not wanted or told == wanted[: len(told)]:
        return True
    plain = tuple(map(str, range(max(len(told), len(wanted)))))
    named = [names for names in (told, wanted) if names != plain[: len(names)]]
    return not named or (len(named) == 1 and not set(named[0]) & set(plain))


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def from_uint8(pixels: np.ndarray) -> Images:
    """uint8 NHWC -> float32 NCHW in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float().div_(255)


def to_uint8(images: Tensor) -> np.ndarray:
    """Float NCHW in [0, 1] -> uint8 NHWC, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
