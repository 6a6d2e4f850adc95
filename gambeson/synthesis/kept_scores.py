"""Scores that lie beside a store: kept shard by shard as they are computed, found again for another selection."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from gambeson import canonical
from gambeson.data.scores import Scores, ScoreWriter, as_numpy
from gambeson.data.synthetic import SyntheticStore
from gambeson.disk import read_json
from gambeson.errors import UserError, require, unknown
from gambeson.fleet import Nearby, Tool
from gambeson.store import Artifact, Workspace
from gambeson.synthesis.centroids import Centroids, kept_centroids, save_centroids
from gambeson.synthesis.pace import Pace
from gambeson.synthesis.pool import Context, Piece, Pool, PreparingScorer, Rows, Score, Scorer, TrainingScorer
from gambeson.types import PerImage

REVISION = 2
"""Raised when a scorer's meaning changes."""
TRAINED = "trained"
"""What a scorer says of the weights of its own networks."""
COLUMN = "score"
"""The name of the scores that a selection keeps."""


@dataclass(frozen=True, kw_only=True)
class KeptScores:
    """Scores that lie beside the store already, of an earlier selection or of somebody's ScoreWriter.

    UserError for scores that were made against test images, with other labels, or, unless that is asked for, by a
    teacher that is none of the labels' teachers.
    """

    looks: ClassVar[bool] = False

    digest: str = ""  # of the scorer: the name of a folder in the store's scores/
    column: str = COLUMN  # which of its numbers; larger is better
    other_teacher: bool = False  # take them even from a teacher that did not label these images

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def bind(self, context: Context) -> Score:
        """They are read, a shard at a time in memory."""
        kept = Scores.open(context.pool.store, self.digest, "selection")
        _check_origin(kept, context.pool, self.other_teacher)
        if self.column not in kept.columns:
            raise unknown("score", self.column, kept.columns)
        starts = np.cumsum([0, *context.pool.store.rows])

        @lru_cache(maxsize=1)
        def column(shard: int) -> np.ndarray:
            found = as_numpy(kept.shard(shard)[self.column])
            require(found.ndim == 1, f"scores {self.digest}, {self.column}", "one number per image", found.shape)
            return found if found.dtype in (np.float32, np.float64) else found.astype(np.float64)

        def score(rows: Rows) -> PerImage:
            positions = rows.positions.cpu().numpy()
            shard = int(np.searchsorted(starts, positions[0], side="right")) - 1
            return torch.from_numpy(column(shard)[positions - starts[shard]])

        return score


def _check_origin(kept: Scores, pool: Pool, other_teacher: bool) -> None:
    """UserError for scores of other labels, or of a teacher that did not label; what does not say is taken."""
    place, scorer = f"scores {kept.digest} of {pool.store.root}", kept.scorer
    if scorer.get("labels", pool.labels.digest) != pool.labels.digest:
        raise UserError(
            f"{place}: expected scores of images with the labels of {pool.labels.path}, got some made with other "
            "labels; give those, or score again (--score)"
        )
    teacher, labelled_by = dict(scorer.get("networks", {})).get("teacher"), pool.about[1].get("teachers", [])
    if teacher is not None and labelled_by and teacher not in labelled_by and not other_teacher:
        raise UserError(
            f"{place}: expected scores of a teacher that labelled these images ({_short(labelled_by)}), got those of "
            f"{_short([teacher])}; score again with the labels' teacher, or ask for these (--other-teacher)"
        )


def _short(digests: list[str]) -> str:
    return ", ".join(digest[:12] for digest in digests)


def keep_scores(score: Scorer, context: Context, digests: Mapping[str, str], work: Workspace) -> KeptScores:
    """Computes the scores of the shards that have none, and says where they are.

    digests: of what the scorer needs. The scorer's own digest is taken over it, these, the labels, and the weights of
    networks that it trains itself: scores that a break left are gone on with by the same networks only, while those of
    all images serve whoever trained for them. work: whose progress is told (images scored, images), and whose fleet
    scores, a shard at a time.
    """
    pool, bound = context.pool, None
    about = _about(score, pool, digests)
    if isinstance(score, TrainingScorer):
        if (whole := _whole(pool.store, about)) is not None:
            return KeptScores(digest=whole, other_teacher=True)
        bound = score.trained(context)
        about[TRAINED] = bound.digest
    against = "train" if "real" in digests else None
    writer = ScoreWriter(store=pool.store, digest=canonical.digest(about), scorer=about, against=against)
    missing = writer.missing()
    if missing:
        _write(writer, bound or _prepared(score, context, writer), context, missing, work)
    return KeptScores(digest=writer.digest, other_teacher=True)


def _whole(store: SyntheticStore, about: dict[str, Any]) -> str | None:
    """The digest of scores of all images by such a scorer, whatever networks it trained; None where there are none."""
    for path in sorted(store.root.glob("scores/*/meta.json")):
        meta, digest = read_json(path), path.parent.name
        scorer = meta.get("scorer")
        if not isinstance(scorer, dict) or meta.get("store") != store.digest or TRAINED not in scorer:
            continue
        writer = ScoreWriter(store=store, digest=digest, scorer=scorer, against="train")
        if scorer == {**about, TRAINED: scorer[TRAINED]} and not writer.missing():
            return digest
    return None


def _about(score: Scorer, pool: Pool, digests: Mapping[str, str]) -> dict[str, Any]:
    networks = {role: digest for role, digest in digests.items() if role != "real"}
    about = {"score": canonical.plain(score, drop_neutral=True), "networks": networks, "labels": pool.labels.digest}
    return {**about, "real": digests.get("real"), "revision": REVISION}


def _prepared(score: Scorer, context: Context, writer: ScoreWriter) -> tuple[Scorer, Context]:
    """The scorer with what it needs in every worker: what takes a pass over all images is made now, once.

    Centroids are kept beside the scores, and found there after a break.
    """
    if not isinstance(score, PreparingScorer):
        return score, context
    path = context.pool.store.root / "scores" / writer.digest / "centroids.safetensors"
    if path.is_file():
        return score, replace(context, ahead=kept_centroids(path, context.pool.device))
    made = score.prepared(context)
    if isinstance(made, Centroids):
        save_centroids(path, made)
    return score, replace(context, ahead=made)


def _write(
    writer: ScoreWriter,
    score: Score | tuple[Scorer, Context],
    context: Context,
    missing: list[int],
    work: Workspace,
) -> None:
    """Scores the missing shards; each is kept when it is whole."""
    pool, rows = context.pool, context.pool.store.rows
    done = len(pool.store) - sum(rows[shard] for shard in missing)
    given = (_sent(score) if work.machine.aside else score, pool, Nearby(work.progress), done)
    pace = Pace("score", len(pool.store), done, work.machine.unit, work.say)
    with closing(work.machine.fleet.each(open_scorer, given, missing, work.say)) as shards:
        for shard in pace.watch(shards, lambda shard: rows[shard.item]):
            writer.put(shard.item, {COLUMN: shard.result})
            done += rows[shard.item]
            work.progress(done, len(pool.store))


def _sent(score: Score | tuple[Scorer, Context]) -> Score | tuple[Scorer, Context]:
    """The same for workers elsewhere, without what only this process has or needs."""
    if not isinstance(score, tuple):
        return score
    scorer, context = score
    return scorer, replace(context, once=_elsewhere, real=None if context.ahead is not None else context.real)


def _elsewhere(*arguments: Any, **named: Any) -> Artifact:
    raise AssertionError("a scorer's worker trains nothing")


def open_scorer(score: Score | tuple[Scorer, Context], pool: Pool, progress: Nearby, done: int) -> Tool:
    """What scores a shard, its networks opened: once in each worker. done: images that were scored before."""
    bound = score[0].bind(score[1]) if isinstance(score, tuple) else score
    seen = done

    def scorer(shard: int) -> np.ndarray:
        nonlocal seen
        parts = []
        for piece in pool.pieces(shard=shard):
            parts.append(piece.spread(scored(bound, piece)))
            seen += len(piece.labels)
            progress(seen, len(pool.store))
        return np.concatenate(parts)

    return scorer


def scored(score: Score, piece: Piece) -> np.ndarray:
    """[n] scores of a piece's rows, in the scorer's own precision."""
    if not len(piece.inside):
        return np.empty(0, np.float32)
    return score(piece.rows).detach().cpu().numpy()
