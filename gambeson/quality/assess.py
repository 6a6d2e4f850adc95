"""Measures one after another, each a stage that is made once: a killed command goes on with those that are missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.imageset import ImageSet
from gambeson.disk import atomic, read_json, write_json
from gambeson.errors import UserError, require
from gambeson.quality.features import SYNTHETIC, Embedding, Features, features
from gambeson.quality.measured import Measured
from gambeson.quality.memorisation import CopyTest
from gambeson.quality.sources import Part, PartName, Synthetic
from gambeson.quality.space import FeatureSpace, wanted_positions
from gambeson.quality.table import TABLE, Measures
from gambeson.quality.telling import Line
from gambeson.robustness.subjects import Named
from gambeson.store import Artifact, Stage, Workspace, stage

Once = Callable[..., Artifact]
Begin = Callable[[str], Once]
"""The name of a measure -> the `once` that its stages go through, so that they can be shown under that name."""
FILE, NEAREST = "measured.json", "nearest.parquet"


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """A stage's part: the measure, and the revision of its meaning."""

    measure: Any
    revision: int


@dataclass(frozen=True)
class Trainings:
    """The `once` of trainings that a measure needs, so that other sets' measures find those on the same images."""

    once: Once

    @property
    def digest(self) -> str:
        """The same for all: where trainings are kept changes no number."""
        return "trainings"


@dataclass(frozen=True, eq=False, kw_only=True)
class Material:
    """What measures are given, made when the first one asks for it."""

    real: ImageSet
    source: Synthetic
    space: FeatureSpace
    against: PartName
    embedding: Embedding
    seed: int
    device: str
    classifier: Named | None
    once: Once  # for features

    @property
    def held(self) -> PartName:
        """The part that nobody trained on: validation, or test where the comparison is with test."""
        return "test" if self.against == "test" else "validation"

    def part(self, name: PartName) -> Part:
        """A part of the real images. UserError where it has none."""
        return Part.of(self.real, name)

    def features(self, name: PartName | None) -> Features:
        """Features of a part of the real images; of the synthetic ones without a name."""
        images = self.source if name is None else self.part(name)
        return features(images, self.space, self.embedding, self.seed, self.device, self.once)

    @cached_property
    def reference(self) -> Features:
        """Of the real images that are compared."""
        return self.features(self.against)

    @cached_property
    def synthetic(self) -> Features:
        """Of the synthetic images."""
        return self.features(None)

    def embed(self) -> None:
        """Puts real and synthetic images through the encoder. UserError for broken features, whichever measure asks."""
        _ = self.reference, self.synthetic

    @cached_property
    def train(self) -> Features:
        """Of the train images."""
        return self.reference if self.against == "train" else self.features("train")

    @cached_property
    def held_out(self) -> Features:
        """Of the part that nobody trained on."""
        return self.reference if self.against == self.held else self.features(self.held)


def _save(work: Workspace, found: list[Measured]) -> None:
    write_json(work.folder / FILE, [each.plain() for each in found])


def measure_features(work: Workspace, spec: Measuring, real: Features, synthetic: Features, *, seed: int) -> None:
    """Writes measured.json: a measure of real and synthetic features."""
    _save(work, spec.measure(real.sample, synthetic.sample, seed=seed))


def measure_held_out(
    work: Workspace, spec: Measuring, real: Features, synthetic: Features, held: Features, *, seed: int
) -> None:
    """Writes measured.json: a measure of train, synthetic and held-out features."""
    _save(work, spec.measure(real.sample, synthetic.sample, held_out=held.sample, seed=seed))


def measure_images(
    work: Workspace, spec: Measuring, real: Part, synthetic: Synthetic, trainings: Trainings, *, seed: int
) -> None:
    """Writes measured.json: a measure that trains networks on images of both."""
    _save(work, spec.measure(real.split, synthetic, once=trainings.once, seed=seed))


def measure_classifier(
    work: Workspace, spec: Measuring, held: Part, synthetic: Synthetic, model: Named, *, seed: int
) -> None:
    """Writes measured.json: a measure of a classifier on held-out and synthetic images."""
    device = work.machine.device
    opened = model.open(device)
    _save(work, spec.measure(opened, held.split, synthetic, seed=seed, name=model.title, device=device))


def measure_training(
    work: Workspace, spec: Measuring, real: ImageSet, held: Part, synthetic: Synthetic, trainings: Trainings,
    *, seed: int,
) -> None:  # fmt: skip
    """Writes measured.json: a measure that trains on either source and is tried on held-out images."""
    given = {"held_out": held.split, "once": trainings.once, "device": work.machine.device}
    _save(work, spec.measure(real, synthetic, seed=seed, **given))


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Which images the rows of `list_nearest` are: features may be of some images only."""

    quantile: float  # what a copy is (`Memorisation`)
    images: int  # of the synthetic set
    train: int  # train images
    limit: int | None  # images whose features there are


@stage(revision=2)
def list_nearest(
    work: Workspace, spec: Nearest, real: Features, synthetic: Features, held: Features, *, seed: int
) -> None:
    """Writes nearest.parquet, a row for each synthetic image: its position in the set, the position of its nearest
    train image, their L2 distance in the feature space, and whether that makes it a copy."""
    test = CopyTest.against(real.sample, held.sample, quantile=spec.quantile, queries=len(synthetic.sample))
    apart, places = test.nearest(synthetic.sample.features)
    columns = {
        "position": wanted_positions(spec.images, spec.limit, seed, SYNTHETIC).numpy(),
        "train": wanted_positions(spec.train, spec.limit, seed, "train")[places].numpy(),
        "distance": apart.numpy(),
        "copy": (apart <= max(test.threshold, test.same)).numpy(),
    }
    with atomic(work.folder / NEAREST) as temporary:
        pq.write_table(pa.table(columns), temporary)


def nearest(material: Material, measures: Measures, once: Once) -> Path:
    """The file of `list_nearest`. UserError as `CopyTest.against`."""
    spec = Nearest(
        quantile=measures.memorisation.quantile,
        images=len(material.source),
        train=len(material.real.train),
        limit=material.embedding.limit,
    )
    made = once(list_nearest, spec, material.train, material.synthetic, material.held_out, seed=material.seed)
    return made.file(NEAREST)


WORK = {
    "features": measure_features,
    "held out": measure_held_out,
    "images": measure_images,
    "classifier": measure_classifier,
    "training": measure_training,
}
"""What a measure needs -> the work of its stage."""


def _given(material: Material, needs: str, once: Once) -> tuple[Any, ...]:
    """The inputs of such a measure. UserError where the real images have no such part, or no classifier is given."""
    source = material.source
    if needs == "features":
        return material.reference, material.synthetic
    if needs == "held out":
        return material.train, material.synthetic, material.held_out
    if needs == "images":
        return material.part(material.against), source, Trainings(once)
    if needs == "training":
        return material.real, material.part(material.held), source, Trainings(once)
    require(material.classifier is not None, "--classifier", "a classifier whose robustness is compared", None)
    return material.part(material.held), source, material.classifier


def _stage(needs: str, reads_test: bool) -> Stage:
    """The stage of such a measure, which reads test images only where the comparison is with them."""
    return Stage("measure", 1, WORK[needs], reads_test=reads_test)


def measure(material: Material, name: str, measures: Measures, once: Once) -> Artifact:
    """The finished stage of one measure of the table: made, resumed or found. UserError for what cannot be measured."""
    entry = TABLE[name]
    spec = Measuring(measure=measures.component(name), revision=entry.revision)
    inputs = _given(material, entry.needs, once)
    return once(_stage(entry.needs, material.against == "test"), spec, *inputs, seed=material.seed)


def lines_of(made: Artifact, name: str) -> list[Line]:
    """The numbers that a finished measure has written."""
    return [Line(measure=name, found=Measured(**row)) for row in read_json(made.file(FILE))]


def assess(material: Material, measures: Measures, names: tuple[str, ...], named: bool, begin: Begin) -> list[Line]:
    """The lines of these measures, in this order.

    What cannot be measured is an error where the measure was `named`, and a line that says why otherwise.
    """
    if any(TABLE[name].needs in ("features", "held out") for name in names):
        material.embed()
    lines: list[Line] = []
    for name in names:
        try:
            lines += lines_of(measure(material, name, measures, begin(name)), name)
        except UserError as error:
            if named:
                raise UserError(f"{name}: {error}") from error
            lines.append(Line(measure=name, found=None, reason=str(error)))
    return lines
