"""Stores and selections out of stores and selections: merged, copied, split, sampled; none of it holds the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gambeson.data.compact import compact
from gambeson.data.exchange.incoming import block_size
from gambeson.data.exchange.outgoing import class_counts, class_names, draft, store_of
from gambeson.data.exchange.store_card import source_card, write_card
from gambeson.data.imageset import largest_remainder
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.errors import UserError, require
from gambeson.heritage import heritage_of, inherited, seen
from gambeson.randomness import derive
from gambeson.types import Progress, silent

Source = SyntheticStore | Chosen
BLOCK, PER_SHARD = 8192, 16
"""Images of a block and blocks of a shard, where those of the parts cannot be kept."""
ROWS = 1 << 20
"""Labels that are looked at together."""


@dataclass(frozen=True)
class Span:
    """Positions from `start` up to `stop` in the parts one after another, a block of a store; `facts` about it."""

    parts: tuple[Source, ...]
    start: int
    stop: int
    facts: dict[str, float]


def merge(
    parts: Sequence[Source],
    out: Path,
    classes: int | None = None,
    report: Progress = silent,
    command: str | None = None,
) -> SyntheticStore:
    """One store of the images of all parts in their order, with the provenance of each; stopped, it goes on.

    Blocks keep their facts where all parts have blocks of one size; otherwise they are cut anew, without facts.
    `classes`: how many there are, where parts do not say and have images of different ones. `command`: for the card.
    UserError for parts of
    different shapes or classes.
    """
    require(len(parts) >= 2, "merge", "two stores or more", len(parts))
    require(min(map(len, parts)) > 0, "merge", "at least one image in each store", 0)
    _check_alike(parts, classes)
    _check_hard(parts)
    origins = [_origin(part) for part in parts]
    known = {class_names(part) for part in parts} - {()}
    provenance = {"merged": origins, **_names(known), **_inherited(parts)}
    return _write(parts, out, {"merge": [part.digest for part in parts]}, provenance, report, command)


def copy(source: Source, out: Path, report: Progress = silent, command: str | None = None) -> SyntheticStore:
    """A store of a selection's images with its labels; stopped, it goes on."""
    _check_hard([source])
    provenance = {"copied": _origin(source), **_names({class_names(source)} - {()}), **_inherited([source])}
    return _write([source], out, {"copy": source.digest}, provenance, report, command)


def _inherited(parts: Sequence[Source]) -> dict[str, Any]:
    """Licences, and sets of real images, of all parts."""
    whole = heritage_of(parts)
    return {**inherited(whole), **seen(whole)}


def _names(known: set[tuple[str, ...]]) -> dict[str, Any]:
    return {"class_names": list(min(known))} if known else {}


def _origin(part: Source) -> dict[str, Any]:
    """What a part was, for the provenance of what is made of it."""
    return {"images": len(part), "digest": part.digest, "provenance": store_of(part).provenance}


def _check_hard(parts: Sequence[Source]) -> None:
    """UserError for soft labels, which a selection has and a store cannot hold."""
    soft = [f"{part.store.root}" for part in parts if isinstance(part, Chosen) and part.soft is not None]
    if soft:
        raise UserError(
            f"store: expected one class for each image, got a selection from {soft[0]} with soft labels, which a store "
            "cannot hold; split and sample without --copy keep them, and label the new store otherwise"
        )


def _check_alike(parts: Sequence[Source], classes: int | None) -> None:
    """UserError for parts that do not go together."""
    shapes = [part.shape for part in parts]
    require(len(set(shapes)) == 1, "merge", "stores with images of one shape (height, width, channels)", shapes)
    names = [class_names(part) for part in parts]
    if len(set(names) - {()}) > 1:
        raise UserError(f"merge: expected stores with the same classes, got {' and '.join(map(_shown, names))}")
    counts = [int(part.compact_labels.max()) + 1 for part in parts]
    told = len(next(filter(None, names), ())) or classes
    if told is None and len(set(counts)) > 1:
        raise UserError(
            f"merge: expected stores with the same number of classes, got labels up to {[n - 1 for n in counts]}; "
            f"where some classes have no images in one, say how many there are: --classes {max(counts)}"
        )
    require(
        told is None or max(counts) <= told, "merge", f"labels of {told} classes", f"labels up to {max(counts) - 1}"
    )


def _shown(names: tuple[str, ...]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _write(
    parts: Sequence[Source],
    out: Path,
    asked: dict[str, Any],
    provenance: dict[str, Any],
    report: Progress,
    command: str | None,
) -> SyntheticStore:
    """The store of all images of all parts."""
    spans, per_shard = _spans(parts)
    total, done = sum(map(len, parts)), 0
    with draft(out, asked) as folder:
        writer = StoreWriter(root=folder, blocks=len(spans), blocks_per_shard=per_shard)
        missing = set(writer.missing())
        for number, span in enumerate(spans):
            if number in missing:
                writer.put(number, *_read(span), span.facts)
            done += span.stop - span.start
            report(done, total)
        writer.finish(provenance)
        write_card(folder, source_card(SyntheticStore.open(folder), out.name, command=command))
    return SyntheticStore.open(out)


def _spans(parts: Sequence[Source]) -> tuple[list[Span], int]:
    """The blocks of the new store, and how many a shard has. A store's blocks have one size, but for the last."""
    kept = [span for part in parts for span in (_blocks(part) if isinstance(part, SyntheticStore) else ())]
    sizes = {span.stop - span.start for span in kept[:-1]}
    together = sum(span.stop - span.start for span in kept) == sum(map(len, parts))
    if together and len(sizes) <= 1 and kept[-1].stop - kept[-1].start <= max(sizes, default=len(parts[0])):
        return _with_all_facts(kept), _per_shard(parts[0])
    size, total = block_size(parts[0].shape, BLOCK), sum(map(len, parts))
    return [Span(tuple(parts), start, min(start + size, total), {}) for start in range(0, total, size)], PER_SHARD


def _per_shard(part: Source) -> int:
    """Blocks of the first shard of a store."""
    assert isinstance(part, SyntheticStore)
    return len(np.unique(part.facts_of(0)["block"].to_numpy()))


def _blocks(store: SyntheticStore) -> Iterator[Span]:
    """The blocks of a store, with the numbers that stand beside all images of a block alike."""
    first = 0
    for shard, rows in enumerate(store.rows):
        table = store.facts_of(shard)
        edges = [0, *(np.flatnonzero(np.diff(table["block"].to_numpy())) + 1).tolist(), rows]
        facts = {f.name: table[f.name].to_numpy() for f in table.schema if _is_fact(f)}
        for start, stop in pairwise(edges):
            yield Span((store,), first + start, first + stop, {name: float(v[start]) for name, v in facts.items()})
        first += rows


def _is_fact(column: pa.Field) -> bool:
    return pa.types.is_floating(column.type) and column.name not in ("label", "block", "index")


def _with_all_facts(spans: list[Span]) -> list[Span]:
    """Every block with the facts that any has; NaN where it has not."""
    names = sorted({name for span in spans for name in span.facts})
    nothing = dict.fromkeys(names, float("nan"))
    return [Span(span.parts, span.start, span.stop, {**nothing, **span.facts}) for span in spans]


def _read(span: Span) -> tuple[np.ndarray, np.ndarray]:
    """A block's images and labels; one that was cut anew may begin in one part and end in another."""
    found, first = [], 0
    for part in span.parts:
        start, stop = max(span.start - first, 0), min(span.stop - first, len(part))
        if start < stop:
            found.append(part.stretch(start, stop))
        first += len(part)
    return np.concatenate([images for images, _ in found]), np.concatenate([labels for _, labels in found])


def split(source: Source, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Positions of disjoint parts, ascending, each with its share of every class; what shares leave is left out.

    UserError for shares that are none, and for a part without images.
    """
    fair = len(shares) >= 1 and all(share > 0 for share in shares) and sum(shares) <= 1 + 1e-9
    require(fair, "--parts", "shares above 0 that add up to 1 at most, such as 0.9,0.1", list(shares))
    weights = np.array([*shares, max(1 - sum(shares), 0.0)])
    owner = np.full(len(source), len(shares), np.uint8)
    draw = np.random.default_rng(derive(seed, "split"))
    for members in _by_class(source.compact_labels):
        sizes = largest_remainder(weights, len(members))
        owner[draw.permutation(members)] = np.repeat(np.arange(len(weights), dtype=np.uint8), sizes)
    parts = [_places(owner, part) for part in range(len(shares))]
    empty = [share for share, part in zip(shares, parts, strict=True) if not len(part)]
    require(not empty, "--parts", f"shares of {len(source)} images that leave one for each part", empty)
    return parts


def sample(source: Source, images: int, seed: int, per_class: bool = False) -> np.ndarray:
    """Positions of so many images, drawn without replacement, ascending; `per_class`: so many of every class.

    UserError where there are not as many.
    """
    labels, draw = source.compact_labels, np.random.default_rng(derive(seed, "sample"))
    if not per_class:
        require(1 <= images <= len(labels), "--images", f"1 to {len(labels)}, as many as there are", images)
        return compact(_drawn(len(labels), images, draw))
    none, counts = class_counts(labels)
    require(not none, "--per-class", "a class for every image", f"{none} images without")
    short = {int(label): int(counts[label]) for label in np.flatnonzero((counts < images) & (counts > 0))}
    require(not short, "--images", f"at most {min(short.values(), default=0)}, as many as each class has", images)
    chosen = [members[_drawn(len(members), images, draw)] for members in _by_class(labels)]
    return np.sort(np.concatenate(chosen))


def _drawn(count: int, images: int, draw: np.random.Generator) -> np.ndarray:
    """`images` of the numbers below `count`, ascending, every set of them equally likely; memory for the result."""
    sizes = [min(ROWS, count - start) for start in range(0, count, ROWS)]
    each = draw.multivariate_hypergeometric(sizes, images, method="marginals")
    parts = [
        np.sort(draw.choice(size, n, replace=False)) + i * ROWS
        for i, (size, n) in enumerate(zip(sizes, each.tolist(), strict=True))
    ]
    return np.concatenate(parts)


def _by_class(labels: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of each class that has images, of those without a class first."""
    none, counts = class_counts(labels)
    there = [*([-1] if none else []), *np.flatnonzero(counts).tolist()]
    return (_places(labels, label) for label in there)


def _places(numbers: np.ndarray, wanted: int) -> np.ndarray:
    """Where a number stands, ascending, in the smallest type; what it takes besides is for some at a time."""
    starts = range(0, len(numbers), ROWS)
    count = sum(np.count_nonzero(numbers[start : start + ROWS] == wanted) for start in starts)
    places, done = np.empty(count, compact(np.array([len(numbers)])).dtype), 0
    for start in starts:
        found = np.flatnonzero(numbers[start : start + ROWS] == wanted) + start
        places[done : done + len(found)] = found
        done += len(found)
    return places


def chosen_from(source: Source, positions: np.ndarray) -> Chosen:
    """Some images of a store or a selection, with the labels that they have there."""
    if isinstance(source, Chosen):
        return source.some(positions)
    return Chosen(source, positions, source.compact_labels[positions])


def write_chosen(path: Path, chosen: Chosen) -> None:
    """Writes a selection, some of its positions at a time."""
    Chosen.write_parts(path, chosen.store, chosen.parts(), chosen.carries)
