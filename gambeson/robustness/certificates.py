"""Certifies test images by randomised smoothing: a row per image, written as it goes; certified accuracy by radius.

Each certificate is wrong with probability alpha at most, besides the interval over the images. Equal images share their
draws, and so their certificate.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from gambeson.data.imageset import ImageSet, Split, spread
from gambeson.disk import atomic, checksum, write_json
from gambeson.errors import UserError, require
from gambeson.machine import Machine, make_repeatable
from gambeson.models.classifiers import load_classifier
from gambeson.models.files import load_tensors
from gambeson.models.hub import WEIGHTS, config_of, from_pretrained
from gambeson.models.network import ClassifierNetwork
from gambeson.processes import pool
from gambeson.robustness.inputs import logits_of
from gambeson.robustness.intervals import Interval, wilson
from gambeson.robustness.kept import Held, Kept, Pictures, table_at
from gambeson.robustness.smoothing import ABSTAIN, Smoothing
from gambeson.store import Workspace, stage

ROWS, SUMMARY = "certificates.parquet", "summary.json"
"""The files that the stage writes."""
SECONDS = "seconds"
"""The only column of the rows that is not the same when they are made again: time of each image, shared evenly by those
that were certified together."""
_FULL = 16
"""Batches of noisy copies that images certified together fill at least, so that few are not full."""


@dataclass(frozen=True, kw_only=True)
class Certification:
    """Which images are certified, and how."""

    smoothing: Smoothing = Smoothing()  # noise, copies and confidence
    images: int = 500  # test images, evenly spread; all, where there are fewer

    def __post_init__(self) -> None:
        require(self.images >= 1, "images", "at least 1", self.images)

    @property
    def together(self) -> int:
        """Images that are certified and kept together; with many copies it is one."""
        return -(-_FULL * self.smoothing.batch_size // self.smoothing.samples)


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier where it lies: a folder that `gambeson train` wrote, or a classifier.safetensors.

    Raises UserError, as soon as it is looked at, for a place that holds none.
    """

    place: str

    @property
    def weights(self) -> Path:
        """The file with the weights."""
        path = Path(self.place)
        found = path / WEIGHTS if path.is_dir() else path
        expected = f"a folder that `gambeson train` wrote (with {WEIGHTS}), or a classifier.safetensors"
        require(found.is_file(), "classifier", expected, self.place)
        return found

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What its header or its config.json says: network, channels, classes, and where known shape and noise."""
        return config_of(self.place) if Path(self.place).is_dir() else load_tensors(self.weights)[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and of the network that they belong to."""
        network = {name: self.facts.get(name) for name in ("network", "channels", "classes")}
        return hashlib.sha256((checksum(self.weights) + json.dumps(network, sort_keys=True)).encode()).hexdigest()

    def load(self) -> ClassifierNetwork:
        """The network, frozen, in eval mode."""
        return from_pretrained(self.place) if Path(self.place).is_dir() else load_classifier(self.weights)

    def check_fit(self, real: ImageSet) -> None:
        """UserError, naming both, where it does not take these images or has other classes."""
        model = self.load()
        have = (model.channels, model.classes)
        shape, wanted = tuple(self.facts.get("shape") or real.shape), (real.shape[0], len(real.class_names))
        if have != wanted or shape != real.shape:
            raise UserError(
                f"{self.place}: expected a classifier of {real.name}'s images, {real.shape} in {wanted[1]} classes, "
                f"got one of {shape} with {have[0]} channels in {have[1]} classes; name the data that it was trained on"
            )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that a process needs to certify its share of the chunks. What workers are sent has no image in it."""

    folder: Path
    spec: Certification
    classifier: SavedClassifier
    pictures: Pictures  # the chosen images
    places: np.ndarray  # where they stand in the test images
    seed: int
    machine: Machine

    @property
    def chunks(self) -> range:
        return range(-(-len(self.places) // self.spec.together))

    def rows(self, chunk: int) -> np.ndarray:
        """Which of the chosen images a chunk has."""
        return np.arange(len(self.places))[chunk * self.spec.together : (chunk + 1) * self.spec.together]

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06}.parquet"

    def images(self, chunks: Iterable[int]) -> int:
        """How many images these chunks have."""
        return sum(len(self.rows(chunk)) for chunk in chunks)

    def certify(self, chunks: Sequence[int]) -> Iterator[int]:
        """Certifies these chunks one after another; yields each as it is written."""
        model = self.classifier.load().to(self.machine.device)
        smoothing = self.spec.smoothing
        if self.machine.micro_batch is not None:
            smoothing = replace(smoothing, batch_size=self.machine.micro_batch)
        for chunk in chunks:
            some = self.rows(chunk)
            part = self.pictures.some(some)
            part = Split(part.images.to(self.machine.device), part.labels)
            rows = certificate_rows(smoothing, model, part, self.places[some], self.seed)
            with atomic(self.path(chunk)) as temporary:
                pq.write_table(rows, temporary)
            yield chunk


def certificate_rows(
    smoothing: Smoothing, model: ClassifierNetwork, part: Split, places: np.ndarray, seed: int
) -> pa.Table:
    """One row per image: seed, index, label, clean prediction, smoothed prediction (-1: it abstained), L2 radius, lower
    bound of the candidate's probability, its votes, all votes of both rounds, and `SECONDS`.

    Raises ValueError for labels outside the network's classes, and as `Smoothing.certify`.
    """
    start = time.perf_counter()
    clean = logits_of(model, part.images, smoothing.batch_size).cpu()
    known = bool(((part.labels >= 0) & (part.labels < clean.shape[1])).all())
    expected = f"class indices from 0 to {clean.shape[1] - 1} (the network's logits)"
    require(known, "labels", expected, [int(part.labels.min()), int(part.labels.max())])
    found, size = smoothing.certify(model, part.images, seed), len(part)
    columns = {
        "seed": np.full(size, seed),
        "index": places,
        "label": part.labels.numpy(),
        "clean": clean.argmax(1).numpy(),
        "predicted": found.predicted.numpy(),
        "radius": found.radius.numpy(),
        "p_lower": found.p_lower.numpy(),
        "candidate": found.candidate.numpy(),
        "candidate_votes": found.votes.gather(1, found.candidate[:, None])[:, 0].numpy(),
        "selection_votes": list(found.selection.numpy()),
        "votes": list(found.votes.numpy()),
        SECONDS: np.full(size, (time.perf_counter() - start) / size),
    }
    return pa.table({name: pa.array(values) for name, values in columns.items()})


@stage(revision=1, reads_test=True)
def certify_images(
    work: Workspace, spec: Certification, classifier: SavedClassifier, real: ImageSet, *, seed: int
) -> None:
    """Writes certificates.parquet (a row per image, see `certificate_rows`) and summary.json (`summary`).

    What is finished lies in parts/ meanwhile and is not done again after a kill. Rows do not depend on the workers.
    """
    parts = work.folder / "parts"
    if not (work.folder / ROWS).exists():
        plan = _plan(work, parts, spec, classifier, real, seed)
        _certify_all(plan, work, real)
        with atomic(work.folder / ROWS) as temporary:
            pq.write_table(pa.concat_tables([table_at(plan.path(chunk)) for chunk in plan.chunks]), temporary)
    write_json(work.folder / SUMMARY, summary(pq.read_table(work.folder / ROWS), spec.smoothing))
    shutil.rmtree(parts, ignore_errors=True)


def _plan(
    work: Workspace, parts: Path, spec: Certification, classifier: SavedClassifier, real: ImageSet, seed: int
) -> _Plan:
    """The chosen images; UserError where the classifier does not fit them."""
    require(len(real.test) >= 1, f"{real.name}, test", "at least one image", 0)
    classifier.check_fit(real)
    places = spread(len(real.test), spec.images)
    return _Plan(
        folder=parts,
        spec=spec,
        classifier=classifier,
        pictures=Held(real.test, places),
        places=places,
        seed=seed,
        machine=work.machine,
    )


def _certify_all(plan: _Plan, work: Workspace, real: ImageSet) -> None:
    """Every chunk that is missing, here or in several processes."""
    missing = [chunk for chunk in plan.chunks if not plan.path(chunk).exists()]
    done, total = len(plan.places) - plan.images(missing), len(plan.places)
    work.progress(done, total)
    alone = work.machine.workers == 1 or len(missing) < 2
    if not alone:
        plan = replace(plan, pictures=Kept.written(real.test, plan.places, plan.folder))
    for chunk in plan.certify(missing) if alone else _side_by_side(plan, missing):
        done += plan.images([chunk])
        work.progress(done, total)


def _side_by_side(plan: _Plan, chunks: list[int]) -> Iterator[int]:
    """The chunks in several processes of one thread; yields each when its file is there."""
    count, waiting = plan.machine.workers, set(chunks)
    with pool(count) as workers:
        pending = {workers.submit(_share, plan, chunks[i::count]) for i in range(count) if chunks[i::count]}
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            made = sorted(chunk for chunk in waiting if plan.path(chunk).exists())
            waiting -= set(made)
            yield from made


def _share(plan: _Plan, chunks: list[int]) -> None:
    """One worker's chunks."""
    make_repeatable(plan.machine)
    for _ in plan.certify(chunks):
        pass


Right = Bool[np.ndarray, " n"]
"""[N] whether the smoothed classifier predicted the label (False where it abstained)."""
Radii = Float[np.ndarray, " n"]
"""[N] certified L2 radii, in pixels of [0, 1]."""


def certified_accuracy(right: Right, radius: Radii, at: float) -> Interval:
    """The share of images that are right and certified to a radius of `at` or more, with Wilson's 95 % interval.

    The interval is over the test images; that each certificate may be wrong (alpha) is not in it.
    """
    return wilson(int((right & (radius >= at)).sum()), len(right))


def average_radius(right: Right, radius: Radii) -> float:
    """The average certified radius (ACR, Zhai et al. 2020), 0 for images that are wrong or abstained."""
    return float(np.where(right, radius, 0.0).mean())


def summary(rows: pa.Table, smoothing: Smoothing) -> dict[str, Any]:
    """The numbers that people quote from rows of `certificate_rows`; intervals are Wilson's, 95 %, over the images.

    The curve goes in steps of sigma / 2 to the largest radius that so many copies can certify.
    """
    column = {name: np.asarray(rows[name]) for name in ("label", "clean", "predicted", "radius")}
    right, size = column["predicted"] == column["label"], len(rows)
    radii = [i * smoothing.sigma / 2 for i in range(int(2 * smoothing.largest_radius / smoothing.sigma) + 1)]
    return {
        "images": size,
        "smoothing": asdict(smoothing),
        "clean": asdict(wilson(int((column["clean"] == column["label"]).sum()), size)),
        "abstained": asdict(wilson(int((column["predicted"] == ABSTAIN).sum()), size)),
        "average_radius": average_radius(right, column["radius"]),
        "largest_radius": smoothing.largest_radius,
        "certified": [{"radius": r, **asdict(certified_accuracy(right, column["radius"], r))} for r in radii],
    }
