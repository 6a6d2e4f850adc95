"""Feature spaces by name and digest, and the samples of features that the measures compare.

Pixels, the penultimate layer of a classifier, or whatever a user's TorchScript file computes (Inception's among them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from gambeson.canonical import digest as digest_of
from gambeson.disk import checksum
from gambeson.errors import UserError, require
from gambeson.models.outside import failing
from gambeson.randomness import generator
from gambeson.types import Classifier, Features, Images, Labels

GAP = 8
"""Images between two wanted ones up to which reading on is cheaper than going there."""


@runtime_checkable
class FeatureSpace(Protocol):
    """Images [B, C, H, W] in [0, 1] -> features [B, D]; `name` is for people, `digest` for caches."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def __call__(self, images: Images) -> Features: ...


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves, channel after channel."""

    name: str = "pixels"
    digest: str = digest_of("pixels")

    def __call__(self, images: Images) -> Features:
        return images.flatten(1)


class Penultimate:
    """The features of a classifier, before its last layer.

    `digest` is that of its file or stage; the space is called "penultimate layer of NAME (first 12 of digest)". The
    model stays on the device it is on.
    """

    def __init__(self, model: Classifier, name: str, digest: str) -> None:
        self.model, self.digest = model, digest
        self.name = f"penultimate layer of {name} ({digest[:12]})"

    def __call__(self, images: Images) -> Features:
        return self.model.features(images)


class UserFeatures:
    """Whatever a user's TorchScript file makes of images in [0, 1]: [B, D], or more dimensions, which are flattened."""

    kind = "features"

    def __init__(self, path: str | Path, *, trust: bool, device: str | torch.device = "cpu") -> None:
        """Opens the file, in eval mode. UserError without `trust`, since it is a program, and for what is no such file.

        trust: that it may run with the caller's rights.
        """
        place = Path(path)
        require(place.is_file(), self.kind, "a TorchScript file", str(path))
        if not trust:
            raise UserError(
                f"{path}: expected --trust (trust=True), since TorchScript is a program, which runs with your rights "
                "and may read, write and send what you may; say so if you know where it comes from"
            )
        with failing(f"{path}: expected a whole TorchScript file"):
            script = torch.jit.load(str(place), map_location=device)
        with suppress(AttributeError):  # a frozen one was in eval mode before, and has no mode any more
            script.eval()
        self.script: Callable[..., Any] = script
        self.digest = checksum(place)
        self.name = f"{self.kind} of {place.name} ({self.digest[:12]})"

    def __call__(self, images: Images) -> Features:
        with failing(f"{self.name}: expected a program of images {list(images.shape)}"):
            return self.script(images).flatten(1)


class Inception(UserFeatures):
    """The Inception network of FID as StyleGAN's authors publish it (inception-2015-12-05.pt), if the user has it.

    It takes 8-bit pixels and resizes by itself; grey images are repeated in its three channels.
    """

    kind = "Inception features"

    def __call__(self, images: Images) -> Features:
        pixels = (images * 255).round().clamp(0, 255).to(torch.uint8)
        with failing(f"{self.name}: expected the published inception-2015-12-05.pt"):
            return self.script(pixels.expand(-1, 3, -1, -1), return_features=True).flatten(1)


@dataclass(frozen=True)
class Sample:
    """Features float32 [N, D] of images, their labels int64 [N] (-1: none) where known, and the space they lie in.

    UserError, naming the space, for features that are not finite (how many rows), of other types or sizes.
    """

    features: Tensor
    labels: Tensor | None
    space: str

    def __post_init__(self) -> None:
        f, labels, where = self.features, self.labels, f"features in {self.space}"
        require(f.dim() == 2 and f.dtype == torch.float32, where, "float32 [N, D]", f"{f.dtype} {list(f.shape)}")
        require(len(f) > 0 and f.shape[1] > 0, where, "at least one image and one feature", list(f.shape))
        if labels is not None:
            fits = labels.dtype == torch.int64 and labels.shape == f.shape[:1]
            require(fits, f"labels in {self.space}", f"int64 [{len(f)}]", f"{labels.dtype} {list(labels.shape)}")
        broken = int((~f.isfinite()).any(1).sum())
        if broken:
            raise UserError(
                f"{where}: expected finite numbers, got NaN or infinity in {broken} of {len(f)} rows; look at those "
                "images, or at the encoder's weights"
            )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def dimensions(self) -> int:
        """D."""
        return self.features.shape[1]

    @property
    def classes(self) -> Labels:
        """The labels [N], each from 0 on. UserError where there are none, or where some images have none (-1)."""
        if self.labels is None:
            raise UserError(f"labels in {self.space}: expected a class for every image, got none; label the images")
        missing = int((self.labels < 0).sum())
        require(missing == 0, f"labels in {self.space}", "a class for every image; leave the others out", missing)
        return self.labels

    def take(self, positions: Tensor) -> Sample:
        """These images (positions or a mask), in this order."""
        return Sample(self.features[positions], None if self.labels is None else self.labels[positions], self.space)

    def drawn(self, count: int, seed: int, purpose: str) -> Sample:
        """`count` of the images without replacement, in their order; all of them where there are no more."""
        if count >= len(self):
            return self
        return self.take(torch.randperm(len(self), generator=generator(seed, purpose))[:count].sort().values)


def comparable(*samples: Sample) -> None:
    """UserError unless all samples lie in one space of one dimension."""
    spaces = sorted({(sample.space, sample.dimensions) for sample in samples})
    require(len(spaces) == 1, "features", "one space of one dimension for all images", spaces)


def embed(
    space: FeatureSpace,
    images: Images,
    labels: Labels | None = None,
    *,
    batch_size: int = 500,
    device: str | torch.device = "cpu",
) -> Sample:
    """Features of images [N, C, H, W] in [0, 1], on the CPU. device: where the space's network is.

    UserError for what `Sample` refuses.
    """
    require(len(images) > 0, "images", "at least one", 0)
    parts = [_embedded(space, batch, device) for batch in images.split(batch_size)]
    return Sample(torch.cat(parts), labels, space.name)


@runtime_checkable
class Source(Protocol):
    """Images in 8 bits that are read a stretch at a time (SyntheticStore, Chosen; `Part`, of real ones)."""

    def __len__(self) -> int: ...

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]: ...


def embed_source(
    space: FeatureSpace,
    source: Source,
    *,
    limit: int | None = None,
    seed: int = 0,
    role: str = "synthetic",
    batch_size: int = 500,
    device: str | torch.device = "cpu",
) -> Sample:
    """Features of images uint8 [N, H, W, C], on disk or elsewhere, a batch in memory at a time.

    limit: that many at most, drawn without replacement by `seed` and `role`, in their order. Images that nobody gave a
    class have label -1; where none has one, there are no labels. UserError for what `Sample` refuses and for limits
    below 1.
    """
    require(limit is None or limit >= 1, "limit", "at least 1", limit)
    require(len(source) > 0, "images", "at least one", 0)
    features, labels = [], []
    for part in wanted_positions(len(source), limit, seed, role).split(batch_size):
        images, classes = _read(source, part)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        features.append(_embedded(space, pixels, device))
        labels.append(torch.from_numpy(classes))
    known = torch.cat(labels)
    return Sample(torch.cat(features), None if bool((known < 0).all()) else known, space.name)


def wanted_positions(count: int, limit: int | None, seed: int, role: str) -> Tensor:
    """Which of `count` images `embed_source` reads, ascending.

    role: what the images are ("train", "synthetic"): sets of one size are drawn from apart, since images at the same
    positions of both may belong together (a copy and its original).
    """
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator(seed, "quality/limit", role))[:limit].sort().values


def _read(source: Source, positions: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels at ascending positions, by stretches of what lies close."""
    images, labels = zip(*_stretches(source, positions.numpy()), strict=True)
    return np.concatenate(images), np.concatenate(labels).astype(np.int64)


def _stretches(source: Source, positions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for near in np.split(positions, np.flatnonzero(np.diff(positions) > GAP) + 1):
        images, labels = source.stretch(int(near[0]), int(near[-1]) + 1)
        yield images[near - near[0]], labels[near - near[0]]


def _embedded(space: FeatureSpace, images: Images, device: str | torch.device) -> Tensor:
    """Features float32 on the CPU. UserError for what is no [B, D]."""
    with torch.no_grad():
        found = space(images.to(device))
    fits = found.dim() == 2 and len(found) == len(images)
    require(fits, f"features in {space.name}", f"[{len(images)}, D]", list(found.shape))
    return found.float().cpu()
