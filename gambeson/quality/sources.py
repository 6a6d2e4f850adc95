"""What `gambeson quality` compares: parts of the real images, a synthetic set that fits them, and a feature space.

A synthetic set that holds the real images themselves is found by its bytes, and refused unless that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from gambeson.canonical import digest as digest_of
from gambeson.data.exchange.outgoing import store_of
from gambeson.data.imageset import ImageSet, Split, Withheld
from gambeson.data.mixture import check_synthetic, to_uint8
from gambeson.data.peers import PeerImages, import_images, is_peer, open_peer
from gambeson.data.synthetic import Chosen, SyntheticStore, open_synthetic
from gambeson.errors import UserError, require
from gambeson.models.outside import kind_of
from gambeson.quality.space import FeatureSpace, Inception, Penultimate, Pixels, UserFeatures, wanted_positions
from gambeson.robustness.subjects import logits_wanted, subject_of

Synthetic = SyntheticStore | Chosen
PartName = Literal["train", "validation", "test"]
PARTS: tuple[PartName, ...] = get_args(PartName)
LOOKED_AT = 50_000
"""Synthetic images, at most, that are compared with the real ones byte by byte."""
MOST_COPIES = 0.05
"""Share of exact copies of real images up to which a set passes for a synthetic one."""
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Part:
    """One part of the real images, as the input of a stage; one that does not say `reads_test` cannot read test."""

    name: PartName
    split: Split
    digest: str

    @staticmethod
    def of(real: ImageSet, name: PartName) -> Part:
        """A part of the image set. UserError where it has no image."""
        split: Split = getattr(real, name)
        require(len(split) > 0, f"{real.name}: {name} images", "at least one; hold some out (--data.FIELD)", 0)
        return Part(name, split, digest_of(real.digest, name))

    def __len__(self) -> int:
        return len(self.split)

    def without_test(self) -> Part:
        """Itself, or the test part with images that raise UserError when they are read."""
        return replace(self, split=Withheld(len(self.split))) if self.name == "test" else self

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Images in 8 bits, uint8 [N, H, W, C], and labels int64 [N], as a store of synthetic images gives them."""
        return to_uint8(self.split.images[start:stop]), self.split.labels[start:stop].cpu().numpy()


def open_set(word: str, real: ImageSet, once: Callable[..., Any]) -> Synthetic:
    """The synthetic images of a store, a selection or files that others published, which become a store first.

    UserError for a word that names none, and for a set that does not fit the real images (`check_fits`).
    """
    if not is_peer(word):
        source = open_synthetic(word)
    else:
        shape = (*real.shape[1:], real.shape[0]) if word.endswith(".bin") else None
        images = PeerImages(path=word, shape=shape)
        _check_size(open_peer(word, shape).shape, real)  # before anything is read
        source = open_synthetic(once(import_images, images.reading, images.source).folder)
    check_fits(source, real)
    return source


def _check_size(shape: tuple[int, ...], real: ImageSet) -> None:
    channels, height, width = real.shape
    expected = f"{height} x {width} pixels of {channels} channels, as {real.name} has"
    require(shape == (height, width, channels), "synthetic images", expected, shape)


def check_fits(source: Synthetic, real: ImageSet) -> None:
    """UserError for images of another size, channels or classes than the real ones; images without a class may pass.

    The labels are read, and no image.
    """
    require(len(source) > 0, "synthetic images", "at least one", 0)
    highest = max(int(source.compact_labels.max()), 0)
    check_synthetic(Chosen(store_of(source), np.zeros(1, np.int64), np.array([highest])), real)


@dataclass(frozen=True)
class Copies:
    """How many of the synthetic images looked at are, byte for byte, real images of each part, or repeat each other."""

    looked_at: int
    of_parts: dict[str, int]
    repeated: int  # images that an earlier one of the set already was

    @property
    def share(self) -> float:
        """Of the images looked at: the largest share that one part of the real images has."""
        return max(self.of_parts.values(), default=0) / self.looked_at

    def plain(self) -> dict[str, Any]:
        """Whole numbers by name."""
        return {
            "looked_at": self.looked_at,
            **{f"of_{k}": n for k, n in self.of_parts.items()},
            "repeated": self.repeated,
        }

    def refuse(self, word: str, real: ImageSet) -> None:
        """UserError where so many are copies that the set must be the real one, given by mistake."""
        if self.share <= MOST_COPIES:
            return
        part = max(self.of_parts, key=lambda name: self.of_parts[name])
        raise UserError(
            f"{word}: expected synthetic images, got {self.of_parts[part]:,} of {self.looked_at:,} "
            f"({100 * self.share:.1f} %) that are byte for byte {part} images of {real.name}. Give the synthetic set; "
            "or, where copies are what is to be measured, say --allow-copies"
        )


def count_copies(source: Synthetic, real: ImageSet, seed: int) -> Copies:
    """Compares the bytes of at most 50,000 synthetic images, drawn by `seed`, with those of every real image.

    By 64-bit sums of products with odd random numbers over the bytes two by two (two images that differ have the same
    one with probability 2^-48 at most). The test images are compared and nothing else is made of them: a synthetic set
    that holds them would spoil every number that comes later.
    """
    positions = wanted_positions(len(source), LOOKED_AT, seed, "copies").numpy()
    places = [positions[start : start + _ROWS] for start in range(0, len(positions), _ROWS)]
    marks = np.concatenate([_marks(source.read(part)[0]) for part in places])
    found = {name: int(np.isin(marks, _of_part(getattr(real, name))).sum()) for name in PARTS}
    return Copies(len(marks), found, len(marks) - len(np.unique(marks)))


def _of_part(split: Split) -> np.ndarray:
    parts: list[np.ndarray] = [_marks(to_uint8(images)) for images in _batches(split.images)]
    return np.concatenate([np.empty(0, np.uint64), *parts])


def _batches(images: Tensor) -> Iterator[Tensor]:
    return (images[start : start + _ROWS] for start in range(0, len(images), _ROWS))


def _marks(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] -> uint64 [N]: equal for equal images."""
    rows = pixels.reshape(len(pixels), -1)
    rows = np.ascontiguousarray(np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))))
    words = rows.view(np.uint16).astype(np.uint64)
    keys = np.random.default_rng(0).integers(0, 1 << 64, words.shape[1], np.uint64) | np.uint64(1)
    return words @ keys


def space_of(word: str, real: ImageSet, trust: bool, device: str) -> FeatureSpace:
    """The feature space that --features names: pixels, a classifier's penultimate layer, a TorchScript file.

    UserError for what is none of them, for a program without trust, and for a classifier of other images.
    """
    if word == "pixels":
        return Pixels()
    if kind_of(word) == "TorchScript":
        kind = Inception if Path(word).name.startswith("inception-2015") else UserFeatures
        return kind(word, trust=trust, device=device)
    subject = subject_of(word, real.shape, trust=trust)
    network = subject.network()
    if network is None:
        raise UserError(
            f"--features: expected pixels, a classifier whose layers can be read (a folder of `gambeson train`, a "
            f"classifier.safetensors, a checkpoint of RobustBench) or a TorchScript file that gives features, got "
            f"{subject.title}"
        )
    logits_wanted(subject, replace(real, test=real.train), device)  # whether it takes these images
    return Penultimate(network.to(device), subject.title, subject.digest)
