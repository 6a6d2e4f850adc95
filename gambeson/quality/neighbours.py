"""Nearest neighbours in a feature space (L2): exact in chunks, or by faiss's index where that would take too long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gambeson.errors import UserError, require

EXACT_PAIRS = 4_000_000_000
"""Pairs of images up to which `nearest_of` compares every one: 40,000 images with 100,000 others."""
ROWS, COLUMNS = 512, 16384
"""A block of distances that is in memory at once: 64 MB of float64."""


@dataclass(frozen=True)
class Neighbours:
    """For each query the k nearest images, nearest first: distances float32 [B, k] and positions int64 [B, k]."""

    distances: Tensor
    positions: Tensor
    method: str  # how they were found, for the report


@runtime_checkable
class Index(Protocol):
    """Finds the k nearest of its images for each query [B, D]: (L2 distances float32, positions int64), both [B, k].

    UserError for fewer images than k, and for queries of another dimension.
    """

    def __len__(self) -> int: ...

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]: ...


def squared_distances(queries: Tensor, features: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, squared L2 distances of that block in float64), the columns of one stretch of rows in order."""
    for start in range(0, len(queries), ROWS):
        rows = slice(start, min(start + ROWS, len(queries)))
        q = queries[rows].double()
        for first in range(0, len(features), COLUMNS):
            columns = slice(first, min(first + COLUMNS, len(features)))
            f = features[columns].double()
            squares = q.square().sum(1)[:, None] + f.square().sum(1)[None, :]
            yield rows, columns, squares.sub_(q @ f.T, alpha=2).clamp_min_(0)


@dataclass(frozen=True)
class Exact:
    """Compares each query with every image, in float64, a block at a time; features float32 [N, D] on any device.

    Distances are those of the differences, so an equal image is at 0. Of equally near ones among the k the first come
    first; which of them are among the k, where there is no room for all, is not promised.
    """

    features: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        _check(self.features.shape[1], len(self), queries, k)
        kept: list[tuple[Tensor, Tensor]] = []
        best: tuple[Tensor, Tensor] | None = None
        for rows, columns, squares in squared_distances(queries, self.features):
            best = _merged(best if columns.start else None, squares, columns.start, k)
            if columns.stop == len(self):
                kept.append(refined(queries[rows], self.features, best[1]))
        return torch.cat([d for d, _ in kept]), torch.cat([p for _, p in kept])


class Approximate:
    """faiss's inverted file: each query looks into the `probes` nearest of `cells` cells (extra gambeson[index]).

    Its distances are those of the differences too, and an equal image is always found, since it lies in the same cell.
    The same features give the same index. Found of the nearest images of 500 queries: all in 64 of 979 cells of 60,000
    features about a surface of 12 dimensions, but 68 % in 32 of 256 of 10,000 Gaussian ones in 640, where all
    distances are alike. UserError where faiss is missing.
    """

    def __init__(self, features: Tensor, *, cells: int | None = None, probes: int = 64) -> None:
        """features float32 [N, D]. cells: none for 4 sqrt(N), of at least 39 images each."""
        faiss = _faiss()
        self.features = features.contiguous().cpu()
        count, dimensions = features.shape
        number = cells or max(1, min(int(4 * count**0.5), count // 39))
        quantizer = faiss.IndexFlatL2(dimensions)
        self.index = faiss.IndexIVFFlat(quantizer, dimensions, number)
        self.index.nprobe = min(probes, number)
        self.index.train(self.features[:: max(1, count // (256 * number))].numpy())
        self.index.add(self.features.numpy())

    def __len__(self) -> int:
        return len(self.features)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Missing neighbours, where the cells looked into hold fewer than k images, are searched for in all cells."""
        _check(self.features.shape[1], len(self), queries, k)
        kept = [self._nearest(part, k) for part in queries.cpu().split(ROWS)]
        return torch.cat([d for d, _ in kept]), torch.cat([p for _, p in kept])

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        positions = torch.from_numpy(self.index.search(queries.contiguous().numpy(), k)[1])
        short = (positions < 0).any(1)
        if short.any():
            positions[short] = Exact(self.features).nearest(queries[short], k)[1]
        return refined(queries, self.features, positions)


def index_of(features: Tensor, queries: int, exact_pairs: int = EXACT_PAIRS) -> Index:
    """An index for that many queries: exact where they make at most `exact_pairs` pairs, else approximate."""
    if len(features) * queries <= exact_pairs:
        return Exact(features)
    return Approximate(features)


def nearest_of(queries: Tensor, features: Tensor, k: int = 1, *, exact_pairs: int = EXACT_PAIRS) -> Neighbours:
    """The k nearest of `features` [N, D] for each query [B, D]: exact up to a number of pairs, by faiss beyond.

    UserError for fewer images than k, other dimensions, or where faiss is needed and missing.
    """
    index = index_of(features, len(queries), exact_pairs)
    return Neighbours(*index.nearest(queries, k), method=method_of(index))


def nearest_others(features: Tensor, k: int = 1, *, exact_pairs: int = EXACT_PAIRS) -> Neighbours:
    """The k nearest other images of the same set for each image [N, D]. UserError for fewer than k + 1 images."""
    found = nearest_of(features, features, k + 1, exact_pairs=exact_pairs)
    itself = found.positions == torch.arange(len(features), device=features.device)[:, None]
    itself[~itself.any(1), -1] = True  # so many equal images that it is not among its own neighbours
    kept = [part[~itself].reshape(-1, k) for part in (found.distances, found.positions)]
    return Neighbours(*kept, method=found.method)


def method_of(index: Index) -> str:
    """How an index finds neighbours, in words."""
    if isinstance(index, Approximate):
        return f"approximate (faiss, {index.index.nprobe} of {index.index.nlist} cells)"
    return "exact"


def refined(queries: Tensor, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Distances float32 of the differences at these positions [B, k], sorted, the first position first among equals."""
    positions = positions.sort(1).values
    apart = torch.stack([(features[p].double() - queries.double()).norm(dim=1) for p in positions.T], 1)
    distances, order = apart.sort(dim=1, stable=True)
    return distances.float(), positions.gather(1, order)


def _merged(best: tuple[Tensor, Tensor] | None, squares: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest squares so far and their positions, with a further block of columns."""
    values, places = squares.topk(min(k, squares.shape[1]), largest=False)
    places = places + start
    if best is not None:
        values, places = torch.cat([best[0], values], 1), torch.cat([best[1], places], 1)
        values, order = values.topk(min(k, values.shape[1]), largest=False)
        places = places.gather(1, order)
    return values, places


def _check(dimensions: int, count: int, queries: Tensor, k: int) -> None:
    require(k >= 1, "neighbours", "at least 1", k)
    if count < k:
        raise UserError(f"neighbours: expected at least {k} images to search, got {count}; give more, or ask for fewer")
    fits = queries.dim() == 2 and queries.shape[1] == dimensions
    require(fits, "queries", f"features [B, {dimensions}], as those searched", list(queries.shape))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"nearest neighbours of so many images: expected the package faiss, got {error}; pip install "
            "'gambeson[index]', or compare fewer images"
        ) from error
    return faiss
