"""Features of a part of the real images or of a synthetic set as the input of a stage: embedded once, then found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gambeson.canonical import digest as digest_of
from gambeson.disk import atomic
from gambeson.quality.sources import Part, Synthetic
from gambeson.quality.space import FeatureSpace, Pixels, Sample, embed_source
from gambeson.store import Artifact, Workspace, stage

SYNTHETIC = "synthetic"
"""What the synthetic images are called where a limit draws some of them; a part of the real ones has its own name."""
REVISION = 2
"""Of what `embedded` makes; 2: real images in 8 bits, and a draw of its own for every kind of images."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Which images go through an encoder."""

    limit: int | None = 50_000  # images at most, drawn without replacement; none: all of them
    batch_size: int = 500  # images in the encoder at once


def embedded(spec: Embedding, images: Part | Synthetic, space: FeatureSpace, seed: int, device: str) -> Sample:
    """The features, with labels. UserError for what `Sample` refuses (NaN, with the number of images that have it).

    Real images pass through 8 bits as the synthetic ones did, so that an exact copy has the features of its original.
    Of either kind a limit draws others: as many images of both are not the same positions.
    """
    return embed_source(
        space,
        images,
        limit=spec.limit,
        seed=seed,
        role=images.name if isinstance(images, Part) else SYNTHETIC,
        batch_size=spec.batch_size,
        device=device,
    )


def _write(work: Workspace, spec: Embedding, images: Part | Synthetic, space: FeatureSpace, *, seed: int) -> None:
    """Writes features.npy [N, D] float32 and, where there are any, labels.npy [N] int64."""
    sample = embedded(spec, images, space, seed, work.machine.device)
    _save(work.folder / "features.npy", sample.features)
    if sample.labels is not None:
        _save(work.folder / "labels.npy", sample.labels)


def _save(path: Path, values: torch.Tensor) -> None:
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values.numpy())


@stage(revision=REVISION)
def embed_images(work: Workspace, spec: Embedding, images: Part | Synthetic, space: FeatureSpace, *, seed: int) -> None:
    """Writes features.npy and labels.npy of synthetic images or of a part of the real ones that is not test."""
    _write(work, spec, images, space, seed=seed)


@stage(revision=REVISION, reads_test=True)
def embed_test_images(work: Workspace, spec: Embedding, images: Part, space: FeatureSpace, *, seed: int) -> None:
    """The same of test images."""
    _write(work, spec, images, space, seed=seed)


@dataclass(frozen=True, eq=False)
class Features:
    """Features that a measure asks for; equal digests have equal features."""

    digest: str
    make: Callable[[], Sample] = field(repr=False)

    @cached_property
    def sample(self) -> Sample:
        """Read, or in pixels made, when it is first asked for."""
        return self.make()


def features(
    images: Part | Synthetic, space: FeatureSpace, spec: Embedding, seed: int, device: str, once: Callable[..., Any]
) -> Features:
    """The features of these images: in pixels made in memory, through an encoder a stage that is made once."""
    if isinstance(space, Pixels):
        made = digest_of("pixels of", REVISION, images.digest, spec, seed)
        return Features(made, lambda: embedded(spec, images, space, seed, device))
    work = embed_test_images if isinstance(images, Part) and images.name == "test" else embed_images
    kept: Artifact = once(work, spec, images, space, seed=seed)
    return Features(kept.digest, lambda: _read(kept, space.name))


def _read(kept: Artifact, space: str) -> Sample:
    found = torch.from_numpy(np.load(kept.file("features.npy"), allow_pickle=False))
    labelled = "labels.npy" in kept.record["files"]
    labels = torch.from_numpy(np.load(kept.file("labels.npy"), allow_pickle=False)) if labelled else None
    return Sample(found, labels, space)
