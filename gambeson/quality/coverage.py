"""IRGD's complementarity and coverage: whether generated images lie among the real ones as real ones do.

Gowal et al. 2021, "Improving Robustness using Generated Data": nearest neighbours among equally many images of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.quality import intervals
from gambeson.quality.measured import Measured
from gambeson.quality.neighbours import nearest_of, nearest_others
from gambeson.quality.space import Sample, comparable


def nearest_sources(queries: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Which set holds each query's nearest neighbour [B], and whether others held an equally near one [B].

    others: sets [N, D], counted 0, 1, ...; the queries themselves, each without itself, are one more, the last. The
    first set wins a tie. UserError for a lone query.
    """
    apart = [nearest_of(queries, other).distances[:, 0] for other in others]
    distances = torch.stack([*apart, nearest_others(queries).distances[:, 0]], 1)
    nearest = distances.min(1, keepdim=True).values
    return distances.argmin(1), (distances == nearest).sum(1) > 1


@dataclass(frozen=True, kw_only=True)
class Complementarity:
    """Share of generated images whose nearest neighbour lies in train, in the held-out part, or is generated itself.

    Equally many images of each are drawn, so a perfect set has a third each (an image is not its own neighbour). Train
    wins ties, so that copies show. Memorising many images of train shows in train's share; clumps, and images far from
    all real ones, in self's. The intervals count chance from all parts (`intervals.half_errors`).
    """

    most: int = 10000  # images of each kind, drawn by the seed
    splits: int = 10  # splits of the images into random halves, which give the intervals

    def __post_init__(self) -> None:
        _check("Complementarity", self.most, self.splits)

    def __call__(self, real: Sample, synthetic: Sample, *, held_out: Sample, seed: int) -> list[Measured]:
        """real: train. UserError for other spaces, and for fewer than 4 images of a kind."""
        drawn = _equal([real, held_out, synthetic], self.most, seed, "complementarity")
        n, (where, tied) = len(drawn[0]), _sources(drawn)
        errors = intervals.half_errors(drawn, self.splits, seed, lambda half: _shares(_sources(half)[0]))
        rows = _Rows(drawn, self.splits, seed, _note(n, int(tied.sum()), "train, then the held-out part"))
        return [
            rows.row(f"complementarity: {part}", int((where == i).sum()), errors[i], ideal / (3 * n - 1))
            for i, (part, ideal) in enumerate((("train", n), ("held-out", n), ("self", n - 1)))
        ]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Share of train images, and of held-out ones, whose nearest neighbour is generated, not another of their own part.

    Equally many images of both are drawn, so a perfect set has 50 %. Own images win ties. The held-out share says how
    well new images are covered; the train share is higher where train was memorised. Interval as Complementarity's.
    """

    most: int = 10000  # images of each kind, drawn by the seed
    splits: int = 10  # splits of the images into random halves, which give the intervals

    def __post_init__(self) -> None:
        _check("Coverage", self.most, self.splits)

    def __call__(self, real: Sample, synthetic: Sample, *, held_out: Sample, seed: int) -> list[Measured]:
        """real: train. UserError for other spaces, and for fewer than 4 images of a kind."""
        comparable(real, synthetic, held_out)
        return [self._of(part, name, synthetic, seed) for part, name in ((real, "train"), (held_out, "held-out"))]

    def _of(self, part: Sample, name: str, synthetic: Sample, seed: int) -> Measured:
        drawn = _equal([part, synthetic], self.most, seed, f"coverage/{name}")
        n, apart = len(drawn[0]), _ahead(drawn)
        (error,) = intervals.half_errors(drawn, self.splits, seed, lambda half: [_share(_ahead(half) < 0)])
        rows = _Rows(drawn, self.splits, seed, _note(n, int((apart == 0).sum()), "the other real image"))
        return rows.row(f"coverage of {name}", int((apart < 0).sum()), error, n / (2 * n - 1))


@dataclass(frozen=True)
class _Rows:
    """What the rows of one comparison have in common."""

    drawn: list[Sample]
    splits: int
    seed: int
    note: str

    def row(self, name: str, hits: int, error: float, ideal: float) -> Measured:
        """The share of `hits` among the images of each kind."""
        count = len(self.drawn[0])
        low, high = intervals.share(hits, count, error, self.splits)
        return Measured(
            name=name,
            value=hits / count,
            low=low,
            high=high,
            better="near",
            ideal=ideal,
            space=self.drawn[0].space,
            real=count * (len(self.drawn) - 1),
            synthetic=count,
            randomness=f"images of all parts; {self.splits} splits in halves, seed {self.seed}",
            note=self.note,
        )


def _sources(parts: list[Sample]) -> tuple[Tensor, Tensor]:
    """Whether each generated image's nearest lies in train (0), held-out (1) or generated (2), and whether by a tie."""
    train, held_out, generated = (part.features for part in parts)
    return nearest_sources(generated, [train, held_out])


def _shares(where: Tensor) -> list[float]:
    return [_share(where == source) for source in range(3)]


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _ahead(parts: list[Sample]) -> Tensor:
    """How much nearer the nearest generated image is than the nearest other real one: below 0 where it is [N]."""
    real, generated = (part.features for part in parts)
    return nearest_of(real, generated).distances[:, 0] - nearest_others(real).distances[:, 0]


def _check(name: str, most: int, splits: int) -> None:
    require(splits >= 5, f"{name} splits", "at least 5", splits)
    require(most >= 4, f"{name} most", "at least 4", most)


def _equal(samples: list[Sample], most: int, seed: int, purpose: str) -> list[Sample]:
    """Equally many images of each sample."""
    comparable(*samples)
    count = min(most, *map(len, samples))
    intervals.enough(purpose, count, 4, "of each kind, two in each half")
    return [sample.drawn(count, seed, f"quality/{purpose}/{i}") for i, sample in enumerate(samples)]


def _note(count: int, tied: int, winner: str) -> str:
    ties = f"; {tied} ties, counted for {winner}" if tied else ""
    return f"{count} images of each, so copies of images that were not drawn do not show{ties}"
