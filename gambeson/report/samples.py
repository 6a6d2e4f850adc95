"""Synthetic images for the page: the first of each class with score and nearest train image, and what was selected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from gambeson.data.imageset import ImageSet
from gambeson.data.mixture import from_uint8, to_uint8
from gambeson.data.shards import batches_of
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.disk import read_json
from gambeson.errors import UserError, require
from gambeson.quality.neighbours import Exact
from gambeson.report.material import Grids, SelectionScores
from gambeson.store import Artifact
from gambeson.synthesis.kept_scores import KeptScores, scored
from gambeson.synthesis.pool import LABELS, READ, Context, LabelFile, Pool, Score
from gambeson.synthesis.select import Selection

CLASSES, PER_CLASS = 20, 6
"""Classes in the grids, the first ones, and images of each, at most."""
SIDE = 48
"""Pixels on a side that samples are shown with at most."""
BYTES = 1_800_000
"""Of all pixels of the grids together; fewer images of each class where they would be more."""
COMPARED = 64
"""Pixels on a side up to which images are compared as they are; larger ones shrunk to half of that."""
BINS = 40
"""Of a histogram of scores."""
_LOOKED_AT = 200_000
_TOGETHER = 4096


@dataclass(frozen=True)
class Made:
    """The synthetic images of an arm with the labels and the selection that its student was given."""

    synthetic: Artifact
    labelled: Artifact
    chosen: Artifact | None = None

    @cached_property
    def store(self) -> SyntheticStore:
        """The images."""
        return SyntheticStore.open(self.synthetic.folder / "images")

    @cached_property
    def pool(self) -> Pool:
        """The images with their labels, as selection reads them."""
        return Pool(self.store, LabelFile(self.labelled.file(LABELS)))

    def labels(self, places: np.ndarray) -> np.ndarray:
        """Labels [n] at these positions, ascending; -1 for images that the labelling left out."""
        return _at(self._column("label"), places)

    def places(self, classes: int, each: int) -> list[np.ndarray]:
        """Positions of the first images of each of the first classes: as they were generated for, else as labelled."""
        return _first(self._column("condition" if self.conditional else "label"), classes, each)

    @property
    def conditional(self) -> bool:
        """Whether each image was generated for a class."""
        asked = self.store.compact_labels[:1]
        return bool(len(asked) and asked[0] >= 0)

    def score(self, spec: Selection) -> Score:
        """What selection scored an image with. UserError where the scores were not kept."""
        assert self.chosen is not None
        context = Context(self.pool, _nothing)
        if not spec.score.looks:
            return spec.score.bind(context)
        digest = read_json(self.chosen.file("selection.json")).get("scores")
        require(bool(digest), "selection.json", "the digest of the scores, which earlier versions did not note", digest)
        return KeptScores(digest=str(digest), other_teacher=True).bind(context)

    def scores(self, spec: Selection, stop: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, scores float64) of the images that have a label, some at a time, up to position `stop`."""
        score = self.score(spec)
        for piece in self.pool.pieces(looks=False):
            if stop is not None and piece.start >= stop:
                return
            yield piece.inside + piece.start, scored(score, piece).astype(np.float64)

    def _column(self, name: str) -> Iterator[np.ndarray]:
        """A column of the labels, some rows at a time."""
        with self.pool.open() as file:
            for batch in batches_of(file, READ, [name]):
                yield batch.column(0).to_numpy()


def _nothing(*arguments: Any, **named: Any) -> Artifact:
    raise UserError("report: expected scores that are there, got a score that would train networks")


def _at(parts: Iterator[np.ndarray], places: np.ndarray) -> np.ndarray:
    """Values at ascending positions of a column that comes in parts; what is behind them is not read."""
    found, start = [np.empty(0, np.int64)], 0
    for part in parts:
        low, high = np.searchsorted(places, [start, start + len(part)])
        found.append(part[places[low:high] - start].astype(np.int64))
        start += len(part)
        if high == len(places):
            break
    return np.concatenate(found)


def _first(parts: Iterator[np.ndarray], classes: int, each: int) -> list[np.ndarray]:
    """Positions of the first `each` rows of every class below `classes`; what is behind them is not read."""
    places, start = [np.empty(0, np.int64) for _ in range(classes)], 0
    for part in parts:
        for k in range(classes):
            found = np.flatnonzero(part == k)[: each - len(places[k])] + start
            places[k] = np.concatenate([places[k], found])
        start += len(part)
        if all(len(found) == each for found in places):
            break
    return places


def grids(plain: Made | None, guided: Made | None, spec: Selection, real: ImageSet) -> Grids:
    """The first images of each class, plain and guided at the same places, which have the same noise.

    The classes are those the images were generated for; of images without, as the first arm's labels say.
    A class without an image has no row. UserError where none has any.
    """
    made = {name: one for name, one in (("plain", plain), ("guided", guided)) if one is not None}
    first = next(iter(made.values()))
    classes = min(CLASSES, len(real.class_names))
    rows, places = _places(first, classes, _each(first.store.shape, classes, len(made)))
    told: dict[str, Any] = {}
    for name, one in made.items():
        told |= _shown(name, one, places, spec, real)
    height, width, _ = first.store.shape
    shrunk = f"Shrunk from {width} x {height} pixels" if max(height, width) > SIDE else ""
    space = f"L2 distance of {_space(first.store.shape)}"
    scored = any(f"{name}_scores" in told for name in made)
    told |= {"classes": rows, "sorted_by": "" if first.conditional else next(iter(made))}
    return Grids(**told, score_name=type(spec.score).__name__ if scored else "", space=space, shrunk=shrunk)


def _each(shape: tuple[int, int, int], classes: int, sets: int) -> int:
    """How many images of each class, with their neighbours beside them."""
    height, width, channels = shape
    shrink = max(height, width, SIDE) / SIDE
    return int(np.clip(BYTES / (classes * sets * 2 * height * width * channels / shrink**2), 1, PER_CLASS))


def _places(made: Made, classes: int, each: int) -> tuple[tuple[int, ...], np.ndarray]:
    """The classes that have images, and [classes, k] positions, as many of each as the smallest of them has."""
    found = {k: places for k, places in enumerate(made.places(classes, each)) if len(places)}
    if not found:
        raise UserError(f"no synthetic image of the first {classes} classes")
    fewest = min(map(len, found.values()))
    return tuple(found), np.stack([places[:fewest] for places in found.values()])


def _shown(name: str, made: Made, places: np.ndarray, spec: Selection, real: ImageSet) -> dict[str, Any]:
    """An arm's fields of the grids."""
    images = from_uint8(made.store.read(places.ravel())[0])
    positions, apart = nearest(images, real.train.images)

    def squares(shown: Tensor) -> np.ndarray:
        small = to_uint8(_shrunk(shown, SIDE))
        return small.reshape(*places.shape, *small.shape[1:])

    told = {name: squares(images), f"{name}_nearest": squares(real.train.images[positions])}
    told[f"{name}_distance"] = apart.reshape(places.shape)
    scores = scores_at(made, spec, places.ravel())
    return told if scores is None else {**told, f"{name}_scores": scores.reshape(places.shape)}


def scores_at(made: Made, spec: Selection, places: np.ndarray) -> np.ndarray | None:
    """Scores [n] float64 at these positions, not a number where the labelling left an image out; None without any."""
    if made.chosen is None:
        return None
    found = np.full(len(places), np.nan)
    try:
        for positions, scores in made.scores(spec, int(places.max()) + 1):
            inside = np.isin(places, positions)
            found[inside] = scores[np.searchsorted(positions, places[inside])]
    except UserError:  # the histogram, which is made of the same scores, says why there are none
        return None
    return found


def nearest(images: Tensor, train: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Position and L2 distance (float64) of the nearest train image of each of `images`, pixels in 8 bits.

    A part of the train images at a time is in memory besides; of equally near ones it is the first.
    """
    queries = _compared(images)
    best, places = np.full(len(images), np.inf), np.zeros(len(images), np.int64)
    for start in range(0, len(train), _TOGETHER):
        part = _compared(from_uint8(to_uint8(train[start : start + _TOGETHER])))
        apart, position = (found[:, 0].numpy() for found in Exact(part).nearest(queries, 1))
        nearer = apart < best
        best[nearer], places[nearer] = apart[nearer], position[nearer] + start
    return places, best


def _compared(images: Tensor) -> Tensor:
    """[n, D] what images are compared by."""
    return (images if max(images.shape[2:]) <= COMPARED else _shrunk(images, COMPARED // 2)).flatten(1)


def _space(shape: tuple[int, int, int]) -> str:
    large = max(shape[:2]) > COMPARED
    return f"pixels in [0, 1], shrunk to {COMPARED // 2} on the longer side" if large else "pixels in [0, 1]"


def _shrunk(images: Tensor, side: int) -> Tensor:
    """Images [n, C, H, W] averaged over areas until their longer side is `side`; smaller ones as they are."""
    height, width = images.shape[2:]
    if max(height, width) <= side:
        return images
    scale = side / max(height, width)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    return torch.cat([F.interpolate(part, size=size, mode="area") for part in images.split(64)])


def selection_scores(arm: str, seed: int, made: Made, spec: Selection) -> SelectionScores:
    """Histograms of the scores of kept and left images, whatever their number a part at a time in memory.

    Bins are equally wide between the 1 and 99 % points; the first and the last also hold what lies beyond.
    UserError where selection did not keep its scores.
    """
    assert made.chosen is not None
    positions = np.sort(Chosen.open(made.chosen.file("chosen.parquet"), made.store).positions.astype(np.int64))
    edges = _edges(made, spec)
    counts = np.zeros((2, BINS), np.int64)
    for places, scores in made.scores(spec):
        bins = np.searchsorted(edges[1:-1], scores, side="right")
        spot = np.minimum(np.searchsorted(positions, places), len(positions) - 1)
        left = positions[spot] != places
        np.add.at(counts, (left.astype(int), bins), 1)
    name = type(spec.score).__name__
    return SelectionScores(arm=arm, seed=seed, score=name, edges=edges, kept=counts[0], left=counts[1])


def _edges(made: Made, spec: Selection) -> np.ndarray:
    """Of the bins, by some of the scores evenly over the store."""
    every = max(len(made.store) // _LOOKED_AT, 1)
    some = np.concatenate([scores[places % every == 0] for places, scores in made.scores(spec)])
    low, high = np.quantile(some, [0.01, 0.99])
    if not high > low:
        low, high = low - 0.5, low + 0.5
    return np.linspace(low, high, BINS + 1)


def kept_images(chosen: Artifact) -> int:
    """How many synthetic images a selection kept."""
    return pq.read_metadata(chosen.file("chosen.parquet")).num_rows


def some_images(made: Made, count: int) -> tuple[Tensor, np.ndarray]:
    """The first images [n, C, H, W] in [0, 1] and the labels that the student was given with them."""
    places = np.arange(min(count, len(made.store)))
    return from_uint8(made.store.read(places)[0]), made.labels(places)
