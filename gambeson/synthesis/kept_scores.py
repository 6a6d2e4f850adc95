"""Scores that lie beside a store: kept shard by shard as they are computed, found again for another selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from gambeson import canonical
from gambeson.data.scores import Scores, ScoreWriter, as_numpy
from gambeson.data.synthetic import SyntheticStore
from gambeson.disk import read_json
from gambeson.errors import UserError, require, unknown
from gambeson.synthesis.pool import Context, Piece, Pool, Rows, Score, Scorer, TrainingScorer
from gambeson.types import PerImage, Progress

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


def keep_scores(score: Scorer, context: Context, digests: Mapping[str, str], progress: Progress) -> KeptScores:
    """Computes the scores of the shards that have none, and says where they are.

    digests: of what the scorer needs. The scorer's own digest is taken over it, these, the labels, and the weights of
    networks that it trains itself: scores that a break left are gone on with by the same networks only, while those of
    all images serve whoever trained for them. progress: told (images scored, images).
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
        _write(writer, bound or score.bind(context), pool, frozenset(missing), progress)
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


def _write(writer: ScoreWriter, score: Score, pool: Pool, missing: frozenset[int], progress: Progress) -> None:
    """Scores the missing shards; each is kept when it is whole."""
    done, parts = frozenset(range(len(pool.store.rows))) - missing, list[np.ndarray]()
    seen = sum(pool.store.rows[shard] for shard in done)
    for piece in pool.pieces(but=done):
        parts.append(piece.spread(scored(score, piece)))
        seen += len(piece.labels)
        progress(seen, len(pool.store))
        if sum(map(len, parts)) == pool.store.rows[piece.shard]:
            writer.put(piece.shard, {COLUMN: np.concatenate(parts)})
            parts.clear()


def scored(score: Score, piece: Piece) -> np.ndarray:
    """[n] scores of a piece's rows, in the scorer's own precision."""
    if not len(piece.inside):
        return np.empty(0, np.float32)
    return score(piece.rows).detach().cpu().numpy()
