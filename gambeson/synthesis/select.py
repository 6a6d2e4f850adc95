"""Chooses which synthetic images to train on: one score per image, the best K of each class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from gambeson import canonical
from gambeson.data.exchange.outgoing import class_names
from gambeson.data.exchange.store_card import selection_card
from gambeson.data.imageset import ImageSet
from gambeson.data.mixture import check_names
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.disk import open_folder, write_json
from gambeson.errors import UserError, require
from gambeson.models.network import ClassifierNetwork
from gambeson.quality.discriminator import inside
from gambeson.robustness.subjects import OURS, Named, Ours
from gambeson.store import Artifact, Workspace, stage
from gambeson.synthesis.kept_scores import KeptScores, keep_scores, scored
from gambeson.synthesis.label import softened
from gambeson.synthesis.pool import LABELS, TOGETHER, Context, LabelFile, Pool, Score, Scorer
from gambeson.synthesis.scorers import Confidence, Entropy, Scorers, TrainDistance

__all__ = ["Confidence", "Entropy", "Selection", "best_per_class", "select", "top_per_class"]

CHUNK = 1 << 20
"""Images whose scores are in memory at once."""
DIGIT = 11
"""Bits of a score that a pass of the selection decides: a table of 2,048 counts for each class."""
Given = Artifact | Named | ImageSet
"""What a scorer needs: classifiers by the stage that trained them or by where they lie, and real images."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which labelled images are kept."""

    score: Scorers = Confidence()  # what makes an image good
    keep: float = 1.0  # share of the images to keep, the same number for each class
    per_class: int | None = field(default=None, metadata={"neutral": None})  # that many of each class instead
    remove_copies: bool = field(
        default=False, metadata={"neutral": False}
    )  # leave out images nearer to a real train image, in pixels, than all but 1 % of held-out real ones are

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError(f"selection.keep: expected a share above 0 and up to 1, got {self.keep}")
        require(self.per_class is None or self.per_class >= 1, "selection.per_class", "at least 1", self.per_class)
        both = self.per_class is not None and self.keep < 1
        require(not both, "selection", "keep or per_class, not both", (self.keep, self.per_class))

    @property
    def needs(self) -> tuple[str, ...]:
        """What `select` is given besides images and labels, in this order: teacher, encoder, real."""
        copies = ("real",) if self.remove_copies and "real" not in self.score.needs else ()
        return (*self.score.needs, *copies)

    def quota(self, images: int, classes: int) -> int | None:
        """How many of each class, of so many labelled images; None: all there are."""
        if self.per_class is None and self.keep == 1:
            return None
        return max(round(self.keep * images / classes), 1) if self.per_class is None else self.per_class


def top_per_class(scores: np.ndarray, labels: np.ndarray, classes: int, quota: int) -> np.ndarray:
    """Positions of the `quota` best scores of each class, ascending; ties go to the earlier image, not-a-number last.

    scores [N] float, labels [N] (outside 0 to `classes` - 1: left out); both may be memory maps.
    """
    return np.concatenate([np.empty(0, np.int64), *best_per_class(scores, labels, classes, quota)])


def best_per_class(scores: np.ndarray, labels: np.ndarray, classes: int, quota: int) -> Iterator[np.ndarray]:
    """The same a part at a time, exact and without sorting: memory grows with the classes, not with the images."""
    if quota >= 1:
        yield from _above(_bars(scores, labels, classes, quota), scores, labels, classes)


@dataclass(frozen=True)
class _Bars:
    """The key of each class's K-th best score, how many images with that key are kept, and how many there are."""

    keys: np.ndarray
    places: np.ndarray
    level: np.ndarray

    @property
    def ties(self) -> np.ndarray:
        """[classes]: images left out that score exactly as the last kept one."""
        return np.maximum(self.level - self.places[:-1], 0)


def _above(bars: _Bars, scores: np.ndarray, labels: np.ndarray, classes: int) -> Iterator[np.ndarray]:
    """Positions above the bars, and of those at one the first, a part at a time."""
    places = bars.places.copy()
    for start, keys, kinds in _chunks(scores, labels, classes):
        inside = np.where(kinds < classes, keys > bars.keys[kinds], False)
        level = np.flatnonzero((kinds < classes) & (keys == bars.keys[kinds]))
        for kind in np.unique(kinds[level]).tolist():
            taken = level[kinds[level] == kind][: places[kind]]
            inside[taken] = True
            places[kind] -= len(taken)
        yield np.flatnonzero(inside) + start


def _bars(scores: np.ndarray, labels: np.ndarray, classes: int, quota: int) -> _Bars:
    """Radix selection: a key is found from its highest bits down, DIGIT bits in a pass over all scores."""
    bits = scores.dtype.itemsize * 8
    bar = np.zeros(classes + 1, np.uint64)  # one more than classes, for images without a class
    places, level = np.full(classes + 1, quota), np.zeros(classes, np.int64)
    for shift in range((bits - 1) // DIGIT * DIGIT, -1, -DIGIT):
        counts = np.zeros((classes, 1 << DIGIT), np.int64)
        for _, keys, kinds in _chunks(scores, labels, classes):
            high = keys >> np.uint64(shift)
            here = (kinds < classes) & ((high >> np.uint64(DIGIT)) == bar[kinds])
            cell = kinds[here] << DIGIT | (high[here] & np.uint64((1 << DIGIT) - 1)).astype(np.int64)
            counts += np.bincount(cell, minlength=counts.size).reshape(counts.shape)
        better = counts[:, ::-1].cumsum(1)[:, ::-1] - counts  # images above each digit, of those that share the bar
        digit = (better < places[:classes, None]).argmax(1)  # the lowest digit that is needed to fill the places
        places[:classes] -= better[np.arange(classes), digit]
        level = counts[np.arange(classes), digit]
        bar[:classes] = bar[:classes] << np.uint64(DIGIT) | digit.astype(np.uint64)
    return _Bars(bar, places, level)


def _chunks(scores: np.ndarray, labels: np.ndarray, classes: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first position, keys uint64 in the order of the scores, classes int64); no class is the number `classes`."""
    for start in range(0, len(scores), CHUNK):
        kinds = labels[start : start + CHUNK].astype(np.int64)
        kinds[(kinds < 0) | (kinds >= classes)] = classes
        yield start, _keys(np.asarray(scores[start : start + CHUNK])), kinds


def _keys(scores: np.ndarray) -> np.ndarray:
    """Whole numbers in the order of floating-point ones: IEEE 754 bits, all turned where the sign is set."""
    bits = scores.dtype.itemsize * 8
    plain = (scores + scores.dtype.type(0)).view(f"u{scores.dtype.itemsize}").astype(np.uint64)  # -0 becomes 0
    sign, every = np.uint64(1 << (bits - 1)), np.uint64((1 << bits) - 1)
    keys = np.where(plain & sign, plain ^ every, plain | sign)
    return np.where(np.isnan(scores), np.uint64(0), keys)


@stage(revision=1, card=selection_card)
def select(
    work: Workspace,
    spec: Selection,
    synthetic: Artifact | SyntheticStore,
    labelled: Artifact | LabelFile,
    *given: Given,
) -> None:
    """Writes chosen.parquet (positions, labels, soft labels where there are any) and selection.json.

    given: what `spec.needs` names, in that order. Scores that look at images are kept beside the store, shard by shard:
    a start after a break goes on, and another number of images finds them. The others lie on disk meanwhile, so that
    memory does not grow with the images. A class that holds too few fills what it has, and is reported (`short`).
    UserError for labels, classifiers or real images that do not fit the store or name its classes in another order,
    for scores that are not finite, and where no image is left.
    """
    pool = _pool(work, synthetic, labelled)
    context, digests = _context(work, spec, given, pool)
    score = _kept(spec.score, context, digests, work)
    with _Beside.open(work.folder, len(pool.store)) as beside:
        agreement = beside.fill(pool, score.bind(context))
        beside.check(spec)
        copies = _leave_out_copies(context, digests, work, beside) if spec.remove_copies else None
        facts = _choose(work, spec, pool, beside)
    told = {"score": canonical.plain(spec.score), "networks": digests, "teachers": pool.about[1].get("teachers")}
    scores = score.digest if isinstance(score, KeptScores) else None
    write_json(
        work.folder / "selection.json",
        {**facts, **told, "scores": scores, "copies_removed": copies, "teacher_agrees_with_condition": agreement},
    )


def _kept(score: Scorers | TrainDistance, context: Context, digests: Mapping[str, str], work: Workspace) -> Scorer:
    """The scorer; one that looks at images with its scores kept beside the store."""
    if not score.looks:
        return score
    return keep_scores(score, context, {name: digests[name] for name in score.needs}, work)


def _leave_out_copies(context: Context, digests: Mapping[str, str], work: Workspace, beside: _Beside) -> list[int]:
    """Takes the labels from copies of train images; how many of each class they were."""
    removed, test = np.zeros(context.pool.classes, np.int64), context.copies
    score = _kept(TrainDistance(), context, digests, work).bind(context)
    for piece in context.pool.pieces(looks=False):
        near = piece.inside[scored(score, piece) <= max(test.threshold, test.same)]
        beside.labels[near + piece.start] = -1
        removed += np.bincount(piece.labels[near], minlength=len(removed))
    if not any((beside.labels[i : i + CHUNK] >= 0).any() for i in range(0, len(beside.labels), CHUNK)):
        raise UserError(
            f"selection.remove_copies: expected images that are no copies of train images, got {removed.sum()} copies "
            "and no other; the real set seems to have been given as the synthetic one: give generated images"
        )
    return removed.tolist()


def _pool(work: Workspace, synthetic: Artifact | SyntheticStore, labelled: Artifact | LabelFile) -> Pool:
    """The images with their labels."""
    if isinstance(synthetic, Artifact):
        synthetic = SyntheticStore.open(synthetic.folder / "images").check()
    labels = LabelFile(labelled.file(LABELS)) if isinstance(labelled, Artifact) else labelled
    return Pool(synthetic, labels, work.machine.device, work.machine.micro_batch or TOGETHER)


def _context(work: Workspace, spec: Selection, given: Sequence[Given], pool: Pool) -> tuple[Context, dict[str, str]]:
    """What the scorer needs, opened, and the digest of each."""
    assert len(given) == len(spec.needs), f"select: expected {spec.needs} besides images and labels, got {len(given)}"
    opened: dict[str, Any] = {}
    digests: dict[str, str] = {}
    named = [("the synthetic images", class_names(pool.store))]
    for name, each in zip(spec.needs, given, strict=True):
        if isinstance(each, ImageSet):
            opened[name], digests[name] = _fitting(each, pool), each.digest
            named.append((f"the real images ({each.name})", each.class_names))
        else:
            subject = Ours(str(each.file(OURS))) if isinstance(each, Artifact) else each
            opened[name], digests[name] = _opened(subject, pool), subject.digest
            named.append((subject.title, subject.class_names if isinstance(subject, Ours) else ()))
    for (whose, told), (wanted_by, wanted) in combinations(named, 2):
        check_names(told, wanted, whose=whose, wanted_by=wanted_by, fix="Take those that were made for one another")
    return Context(pool, inside(work), **opened), digests


def _opened(subject: Named, pool: Pool) -> ClassifierNetwork:
    """The classifier. UserError for one of other classes or images, and for a program whose layers nobody knows."""
    model, (height, width, channels) = subject.network(), pool.store.shape
    if model is None:
        raise UserError(
            f"{subject.title}: expected a classifier whose layers are known (a folder of gambeson train, a checkpoint "
            "of RobustBench), since this score goes by its features or gradients; got a program"
        )
    told = subject.saved.facts.get("shape") if isinstance(subject, Ours) else None
    shape = tuple(told or (model.channels, height, width))
    if (model.classes, shape) != (pool.classes, (channels, height, width)):
        raise UserError(
            f"{subject.title}: expected a classifier of the labels' {pool.classes} classes and of images "
            f"{[channels, height, width]} (channels, height, width), got one of {model.classes} classes and images "
            f"{list(shape)}; take one that was trained on such images"
        )
    return model.to(pool.device).eval().requires_grad_(False)


def _fitting(real: ImageSet, pool: Pool) -> ImageSet:
    """The real images. UserError where they are of another shape or of other classes than the synthetic ones."""
    height, width, channels = pool.store.shape
    have, wanted = (real.shape, len(real.class_names)), ((channels, height, width), pool.classes)
    require(have == wanted, f"real images ({real.name})", f"shape and number of classes {wanted}", have)
    return real


@dataclass
class _Beside:
    """A score and a label int32 of each image, on disk for the time of the selection."""

    folder: Path
    labels: np.ndarray
    scores: np.ndarray | None = None

    @staticmethod
    @contextmanager
    def open(folder: Path, rows: int) -> Iterator[_Beside]:
        """Room for so many images; what a killed process left there goes first."""
        path = folder / ".scores"
        for left in (path, *folder.glob(".scores-*")):  # earlier versions gave each start another name
            rmtree(left, ignore_errors=True)
        open_folder(path)
        try:
            yield _Beside(path, np.memmap(path / "labels", np.int32, "w+", shape=(rows,)))
        finally:
            rmtree(path, ignore_errors=True)

    def fill(self, pool: Pool, score: Score) -> float | None:
        """Scores and labels of the pool; how often the teacher agrees with the condition (None without conditions)."""
        agreed, conditioned = 0, True
        for piece in pool.pieces(looks=False):
            found, part = scored(score, piece), slice(piece.start, piece.start + len(piece.labels))
            if self.scores is None and len(found):
                self.scores = np.memmap(self.folder / "scores", found.dtype, "w+", shape=self.labels.shape)
            if self.scores is not None:
                self.scores[part] = piece.spread(found)
            self.labels[part] = piece.labels
            agreed += int((piece.said == piece.conditions).sum())
            conditioned = conditioned and bool((piece.conditions >= 0).all())
        return agreed / len(self.labels) if conditioned else None

    def check(self, spec: Selection) -> None:
        """UserError where no image has a label, and for scores that are not finite, with how many."""
        if self.scores is None:
            raise UserError(
                f"selection: expected images with a label, got {len(self.labels)} that the labelling left out"
            )
        broken = [
            np.flatnonzero(~np.isfinite(self.scores[i : i + CHUNK])) + i for i in range(0, len(self.scores), CHUNK)
        ]
        places = np.concatenate(broken)
        if len(places):
            raise UserError(
                f"selection.score {type(spec.score).__name__}: expected a finite score of every image, got NaN or "
                f"infinity for {len(places)} of {len(self.labels)}, the first at position {places[0]}; usually a "
                "training diverged: take another classifier"
            )


def _choose(work: Workspace, spec: Selection, pool: Pool, beside: _Beside) -> dict[str, Any]:
    """Writes chosen.parquet; what is kept, missing and tied of each class."""
    scores, labels, classes = beside.scores, beside.labels, pool.classes
    assert scores is not None
    available = np.zeros(classes + 1, np.int64)
    for _, _, kinds in _chunks(scores, labels, classes):
        available += np.bincount(kinds, minlength=classes + 1)
    quota = spec.quota(int(available[:classes].sum()), classes)
    bars = _bars(scores, labels, classes, len(labels) if quota is None else quota)
    kept = np.zeros(classes, np.int64)
    counted = _counted(_above(bars, scores, labels, classes), labels, kept)
    with pool.open() as file:
        Chosen.write_parts(work.folder / "chosen.parquet", pool.store, softened(file, counted), work.heritage)
    short = {} if quota is None else {str(k): int(quota - n) for k, n in enumerate(kept) if n < quota}
    if short and spec.per_class is not None:
        work.say(f"select: {len(short)} of {classes} classes hold fewer than {quota} images; see selection.json")
    return {
        "quota": quota,
        "available": available[:classes].tolist(),
        "left_out": int(available[classes]),  # by the labelling, or as copies
        "kept": kept.tolist(),
        "short": short,
        "ties": {str(k): int(n) for k, n in enumerate(bars.ties) if n},
    }


def _counted(
    parts: Iterator[np.ndarray], labels: np.ndarray, kept: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions with their labels; counts what is kept of each class."""
    for positions in parts:
        chosen = labels[positions].astype(np.int64)
        kept += np.bincount(chosen, minlength=len(kept))
        if len(positions):
            yield positions, chosen
