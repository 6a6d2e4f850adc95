"""An epoch over a whole store in shuffled order, without replacement, at the disk's speed and in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from gambeson.errors import require
from gambeson.randomness import generator


@runtime_checkable
class Stretches(Protocol):
    """Images that are read from front to back: a store, or a selection from one."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        ...

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 NHWC and labels int64 from `start` to before `stop`."""
        ...


@dataclass(frozen=True)
class _Order:
    """One process's epoch: its chunks in their order, and after how many images each of them begins."""

    chunks: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class BlockShuffle:
    """Batches of a source in an order that is drawn: chunks in random order, `window` of them mixed at a time.

    Each epoch has every image once. The order depends on (seed, epoch, rank, world) alone, so that a run resumes at
    any batch, and is another in every epoch. `chunk` neighbours in the store are read at once; `rank` of `world`
    processes has its own share, disjoint from the others and the same size up to a chunk; images that do not fill a
    chunk are the last process's. In memory are at most three windows (one is read ahead, in a thread) and a batch.

    How well it mixes: where a chunk lands in the epoch is uniform over all places, and so is an image in its window.
    What a full shuffle has not: neighbours in the store land in one window. An image then meets on average
    (chunk - 1)(B - 1) / (W - 1) of its chunk in its batch of B, for windows of W = window * chunk images: at the
    defaults 16 of 1,023, where a full shuffle of millions has none. Generated images are independent and their classes
    take turns, so that nothing is lost; a store sorted by class should be read with more, smaller chunks, since a batch
    holds no more than `window` of them.
    """

    source: Stretches
    batch_size: int
    seed: int
    window: int = 64
    chunk: int = 512
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "window", "chunk", "world"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(0 <= self.rank < self.world, "rank", f"0 to {self.world - 1}", self.rank)
        require(len(self.source) > 0, "source", "at least one image", len(self.source))
        require(self.share > 0, "world", f"at most {len(self.source)} / {self.chunk} processes", self.world)

    @property
    def share(self) -> int:
        """Images of this process in every epoch."""
        own = len(range(self.rank, len(self.source) // self.chunk, self.world))
        return own * self.chunk + (self._rest if self._has_rest else 0)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of `epoch`, of which the last may be smaller."""
        return -(-self.share // self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images uint8 [b, H, W, C] and labels int64 [b] of an epoch from batch `start` on; the last has the rest."""
        require(number >= 0 and start >= 0, "epoch and start", "0 or more", (number, start))
        first = number * self.share
        return self._batches(first + start * self.batch_size, first + self.share)

    def endless(self, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of exactly `batch_size`, one epoch after another, from batch `start` of them all on."""
        require(start >= 0, "start", "0 or more", start)
        return self._batches(start * self.batch_size, None)

    def positions(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: which images stand at these places of the endless order; reads none."""
        found, place = [np.empty(0, np.int64)], first
        while place < last:
            number, inside = divmod(place, self.share)
            window, skip = self._window_at(number, inside)
            part = self._mixed(number, window)[skip : skip + last - place]
            found.append(part)
            place += len(part)
        return np.concatenate(found)

    @property
    def _rest(self) -> int:
        return len(self.source) % self.chunk

    @property
    def _has_rest(self) -> bool:
        """The chunk that is not full belongs to the last process, so that shares are the same in every epoch."""
        return self._rest > 0 and self.rank == self.world - 1

    def _order(self, number: int) -> _Order:
        return _drawn(len(self.source), self.chunk, self.seed, number, self.rank, self.world)

    def _window_at(self, number: int, inside: int) -> tuple[int, int]:
        """Which window of an epoch has this place, and how far inside it is."""
        starts = self._order(number).starts[:: self.window]
        window = int(np.searchsorted(starts, inside, side="right")) - 1
        return window, inside - int(starts[window])

    def _chunks(self, number: int, window: int) -> np.ndarray:
        return self._order(number).chunks[window * self.window : (window + 1) * self.window]

    def _bounds(self, chunk: int) -> tuple[int, int]:
        return chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.source))

    def _shuffled(self, number: int, window: int, size: int) -> np.ndarray:
        """The order of a window's images."""
        draw = generator(self.seed, "window order", number, self.rank, self.world, window)
        return torch.randperm(size, generator=draw).numpy()

    def _mixed(self, number: int, window: int) -> np.ndarray:
        """Positions of a window's images in their order."""
        places = np.concatenate([np.arange(*self._bounds(c)) for c in self._chunks(number, window).tolist()])
        return places[self._shuffled(number, window, len(places))]

    def _read(self, number: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A window's images and labels as they stand in the store, and the order in which they leave."""
        bounds = [self._bounds(chunk) for chunk in self._chunks(number, window).tolist()]
        ends = np.cumsum([stop - start for start, stop in bounds]).tolist()
        images, labels = np.empty((ends[-1], *self.source.shape), np.uint8), np.empty(ends[-1], np.int64)
        for (start, stop), end in zip(bounds, ends, strict=True):
            here = slice(end - (stop - start), end)
            images[here], labels[here] = self.source.stretch(start, stop)
        return images, labels, self._shuffled(number, window, ends[-1])

    def _windows(self, first: int, last: int | None) -> Iterator[tuple[int, int]]:
        """(epoch, window) of those that have the places from `first` to before `last`, or without end."""
        number, inside = divmod(first, self.share)
        window = self._window_at(number, inside)[0]
        for epoch in count(number):
            starts = self._order(epoch).starts[:: self.window] + epoch * self.share
            for each in range(window if epoch == number else 0, len(starts)):
                if last is not None and starts[each] >= last:
                    return
                yield epoch, each

    def _ahead(self, first: int, last: int | None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Windows with these places; the next one is read while this one is used."""
        with ThreadPoolExecutor(1) as thread:
            reading: Future | None = None
            for number, window in self._windows(first, last):
                following = thread.submit(self._read, number, window)
                if reading is not None:
                    yield reading.result()
                reading = following
            if reading is not None:
                yield reading.result()

    def _batches(self, first: int, last: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of the places from `first` to before `last`."""
        if last is not None and first >= last:
            return
        windows, skip = self._ahead(first, last), self._window_at(*divmod(first, self.share))[1]
        try:
            images, labels, order = next(windows)
            order = order[skip:]
            while last is None or first < last:
                size = self.batch_size if last is None else min(self.batch_size, last - first)
                batch, classes, filled = np.empty((size, *self.source.shape), np.uint8), np.empty(size, np.int64), 0
                while filled < size:
                    if not len(order):
                        images, labels, order = next(windows)
                    now, order = order[: size - filled], order[size - filled :]
                    np.take(images, now, axis=0, out=batch[filled : filled + len(now)], mode="clip")
                    classes[filled : filled + len(now)] = labels[now]
                    filled += len(now)
                yield batch, classes
                first += size
        finally:
            windows.close()  # type: ignore[attr-defined]


@lru_cache(maxsize=4)
def _drawn(images: int, chunk: int, seed: int, number: int, rank: int, world: int) -> _Order:
    """The epoch's order of the full chunks, dealt to the processes in turn; the last one puts the rest anywhere."""
    full, rest = divmod(images, chunk)
    draw = generator(seed, "chunk order", number)
    chunks = torch.randperm(full, generator=draw).numpy()[rank::world]
    if rest and rank == world - 1:
        place = int(torch.randint(len(chunks) + 1, (), generator=draw))
        chunks = np.insert(chunks, place, full)
    sizes = np.where(chunks == full, rest, chunk)
    return _Order(chunks, np.cumsum(sizes) - sizes)
