"""Epochs in shuffled order: every image once, the same for the same seed, resumable, disjoint shares, read ahead."""

import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import Source, real_split

from gambeson.data.imageset import Split
from gambeson.data.mixture import Mixture
from gambeson.data.shuffle import BlockShuffle
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.errors import UserError


class Numbers:
    """A source whose images show their position in 4 bytes, and that counts what is read."""

    shape = (2, 2, 1)

    def __init__(self, size: int) -> None:
        self.size, self.read_from = size, []

    def __len__(self) -> int:
        return self.size

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        self.read_from.append((start, threading.current_thread().name))
        positions = np.arange(start, stop, dtype="<u4")
        return positions.view(np.uint8).reshape(-1, 2, 2, 1), positions.astype(np.int64) % 10


def shown(images: np.ndarray) -> list[int]:
    return images.reshape(-1, 4).view("<u4").ravel().tolist()


def shuffle(size: int = 103, **more) -> BlockShuffle:
    return BlockShuffle(Numbers(size), 8, **{"seed": 1, "window": 3, "chunk": 5} | more)


@pytest.mark.parametrize("size", [1, 4, 5, 8, 60, 103])
def test_every_image_comes_once_an_epoch_and_each_epoch_is_another(size: int) -> None:
    orders = []
    for number in range(3):
        batches = list(shuffle(size).epoch(number))
        order = [place for images, _ in batches for place in shown(images)]
        assert sorted(order) == list(range(size))
        assert [len(labels) for _, labels in batches[:-1]] == [8] * (len(batches) - 1)
        assert all((labels == np.array(shown(images)) % 10).all() for images, labels in batches)
        assert len(batches) == shuffle(size).batches_per_epoch
        orders.append(tuple(order))
    assert len(set(orders)) == (3 if size > 5 else len(set(orders)))
    assert orders[2] == tuple(place for images, _ in shuffle(size).epoch(2) for place in shown(images))
    if size > 5:
        assert orders[0] != tuple(place for images, _ in shuffle(size, seed=2).epoch(0) for place in shown(images))


@pytest.mark.parametrize("size", [7, 40, 103])
def test_an_epoch_goes_on_at_any_batch(size: int) -> None:
    whole = [shown(images) for images, _ in shuffle(size).epoch(1)]
    for start in range(len(whole) + 2):
        source = Numbers(size)
        rest = [shown(images) for images, _ in BlockShuffle(source, 8, 1, 3, 5).epoch(1, start)]
        assert rest == whole[start:]
        assert len(source.read_from) <= -(-size // 5) - start * 8 // 15 * 3 + 3  # nothing before is read


def test_endless_batches_are_full_and_go_through_the_epochs() -> None:
    endless = shuffle(30).endless()
    batches = [shown(next(endless)[0]) for _ in range(15)]  # 120 images: 4 epochs
    endless.close()
    assert {len(batch) for batch in batches} == {8}
    flat = [place for batch in batches for place in batch]
    for epoch in range(4):
        assert sorted(flat[30 * epoch : 30 * epoch + 30]) == list(range(30))
        assert flat[30 * epoch : 30 * epoch + 30] == [p for i, _ in shuffle(30).epoch(epoch) for p in shown(i)]
    for start in (1, 3, 4, 11):
        again = shuffle(30).endless(start)
        assert shown(next(again)[0]) == batches[start]
        again.close()
    assert shuffle(30).positions(0, 120).tolist() == flat
    assert shuffle(30).positions(37, 91).tolist() == flat[37:91]
    assert shuffle(30).positions(4, 4).tolist() == []


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_an_epoch(world: int) -> None:
    for number in (0, 1):
        shares = []
        for rank in range(world):
            mine = shuffle(103, rank=rank, world=world)
            shares.append([place for images, _ in mine.epoch(number) for place in shown(images)])
            assert len(shares[-1]) == mine.share
        assert sorted(place for share in shares for place in share) == list(range(103))
        assert max(map(len, shares)) - min(map(len, shares)) <= 5 + 3
    firsts = {tuple(sorted(shown(np.concatenate([i for i, _ in shuffle(103, world=2).epoch(n)])))) for n in range(3)}
    assert len(firsts) == 3  # a process has other images in every epoch


def test_the_mixing_is_as_good_as_said() -> None:
    """Chunk-mates in a batch: (chunk - 1)(B - 1) / (W - 1). Places in the epoch: uniform for every image."""
    size, batch, chunk, window = 6400, 64, 16, 10
    one = BlockShuffle(Numbers(size), batch, 3, window, chunk)
    found, first = [], []
    for number in range(8):
        order = one.positions(number * size, (number + 1) * size)
        chunks = order.reshape(-1, batch) // chunk
        same = (chunks[:, :, None] == chunks[:, None, :]).sum(2) - 1
        found.append(same.mean())
        first.append(np.argsort(order)[:160].mean() / size)
    # batches of 64 do not divide windows of 160: one in 2.5 lies in two windows, and has fewer
    within = (chunk - 1) * (batch - 1) / (window * chunk - 1)
    assert 0.75 * within < np.mean(found) < within
    assert np.mean(first) == pytest.approx(0.5, abs=0.12)
    assert np.std(first) < 0.2
    whole = BlockShuffle(Numbers(size), batch, 3, 400, chunk).positions(0, size).reshape(-1, batch) // chunk
    mates = ((whole[:, :, None] == whole[:, None, :]).sum(2) - 1).mean()
    assert mates == pytest.approx(15 * 63 / 6399, rel=0.1)  # one window over everything is a full shuffle


def test_windows_are_read_ahead_in_a_thread_and_never_more_than_one() -> None:
    source = Numbers(60)
    batches = BlockShuffle(source, 15, 1, 3, 5).epoch(0)
    next(batches)
    deadline = time.monotonic() + 5
    while len(source.read_from) < 6 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(source.read_from) == 6  # the window in use and the next one
    assert threading.current_thread().name not in {name for _, name in source.read_from}
    batches.close()
    assert len(source.read_from) <= 9


class Blank(Numbers):
    """Grey images of 3 kB."""

    shape = (32, 32, 3)

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((stop - start, *self.shape), 128, np.uint8), np.zeros(stop - start, np.int64)


def test_memory_is_that_of_the_windows() -> None:
    """Three windows of 512 images, a chunk and some batches, however many images there are."""

    def peak(size: int) -> int:
        tracemalloc.start()
        for _ in BlockShuffle(Blank(size), 64, 1, 4, 128).epoch(0):
            pass
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    assert peak(12_000) < (3 * 512 + 128 + 3 * 64) * 3072 + 500_000
    assert peak(24_000) < 1.1 * peak(6_000)


def test_a_fault_while_reading_ahead_reaches_the_reader() -> None:
    class Broken(Numbers):
        def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            if start >= 30:
                raise OSError("damaged")
            return super().stretch(start, stop)

    with pytest.raises(OSError, match="damaged"):
        list(BlockShuffle(Broken(60), 8, 1, 2, 5).epoch(0))


def test_numbers_that_cannot_be_are_refused() -> None:
    for bad in (
        {"window": 0},
        {"chunk": 0},
        {"rank": 1},
        {"rank": 2, "world": 2},
        {"rank": 2, "world": 30, "chunk": 50},
    ):
        with pytest.raises(UserError, match="expected"):
            shuffle(**bad)
    with pytest.raises(UserError, match="source: expected at least one image"):
        shuffle(0)
    with pytest.raises(UserError, match="epoch and start"):
        shuffle().epoch(-1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    root = tmp_path_factory.mktemp("shuffled") / "s"
    writer = StoreWriter(root=root, blocks=6, blocks_per_shard=2)
    for number in range(6):
        positions = np.arange(20 * number, 20 * number + 20, dtype="<u4")
        writer.put(number, positions.view(np.uint8).reshape(-1, 2, 2, 1), positions.astype(np.int64) % 2)
    writer.finish({})
    return SyntheticStore.open(root)


def test_stores_and_selections_are_shuffled(store: SyntheticStore, tmp_path: Path) -> None:
    batches = list(BlockShuffle(store, 32, 0, 4, 7).epoch(0))
    assert sorted(place for images, _ in batches for place in shown(images)) == list(range(120))
    assert all((labels == np.array(shown(images)) % 2).all() for images, labels in batches)
    kept = np.array([3, 4, 119, 60, 61, 62, 5])
    Chosen.write(tmp_path / "chosen.parquet", store, kept, np.arange(7) % 2)
    chosen = list(BlockShuffle(Chosen.open(tmp_path / "chosen.parquet"), 4, 0, 2, 2).epoch(0))
    pairs = {place: int(label) for images, labels in chosen for place, label in zip(shown(images), labels, strict=True)}
    assert pairs == {int(place): i % 2 for i, place in enumerate(kept)}


def test_training_takes_synthetic_images_by_blocks_where_asked(store: SyntheticStore) -> None:
    def mixture(seed: int = 1) -> Mixture:
        return Mixture(real_split(10), store, 0.5, 8, seed, synthetic_order="blocks")

    drawn = [mixture().synthetic_indices(step).tolist() for step in range(60)]  # 240 places: two epochs
    for epoch in (drawn[:30], drawn[30:]):
        assert sorted(place for batch in epoch for place in batch) == list(range(120))
    assert drawn[:30] != drawn[30:]
    assert mixture(2).synthetic_indices(0).tolist() != drawn[0]
    real = Split(torch.zeros(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64))
    images, labels, synthetic = Mixture(real, store, 0.5, 8, 1, synthetic_order="blocks").batch(7)
    assert labels[synthetic].tolist() == [place % 2 for place in drawn[7]]
    assert len(images) == 8
    with pytest.raises(UserError, match="synthetic_order: expected anywhere, where classes are balanced"):
        Mixture(real_split(10), store, 0.5, 8, 1, balanced=True, synthetic_order="blocks")
    with pytest.raises(UserError, match="synthetic_order: expected anywhere, for a source that is no store"):
        Mixture(real_split(10), Source(), 0.5, 8, 1, synthetic_order="blocks")
