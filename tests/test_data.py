"""The digits door, mixtures, augmentation and the synthetic store."""

import math
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gambeson
from gambeson.data.augment import NonLeaking, PadCrop
from gambeson.data.compact import ByClass, compact
from gambeson.data.datasets import Digits, ImageSet, Split, largest_remainder
from gambeson.data.mixture import Mixture, check_synthetic, from_uint8, to_uint8
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore, open_synthetic
from gambeson.errors import EnvironmentFault, UserError


def test_digits_are_real_balanced_and_disjoint() -> None:
    digits = gambeson.load("digits")
    assert [len(p) for p in (digits.train, digits.validation, digits.test)] == [300, 150, 1347]
    assert digits.train.labels.bincount().tolist() == [30] * 10
    assert digits.validation.labels.bincount().min() >= 13
    everything = torch.cat([p.images.flatten(1) for p in (digits.train, digits.validation, digits.test)])
    assert len({tuple(row.tolist()) for row in everything}) == 1797
    assert everything.min() == 0
    assert everything.max() == 1
    assert not digits.flip_safe
    assert digits.shape == (1, 8, 8)


def test_the_split_follows_its_seed_and_nothing_else() -> None:
    assert gambeson.load("digits").digest == gambeson.load("digits").digest
    assert gambeson.load("digits", split_seed=1).digest != gambeson.load("digits").digest
    assert gambeson.load("digits").digest.startswith("f7b9425d2ea82b14")  # finished runs know it by this


@pytest.mark.parametrize("bad", [{"train_images": 305}, {"train_images": 0}, {"validation_images": 1600}])
def test_impossible_splits_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected"):
        Digits(**bad)


def test_unknown_data_set_lists_the_known() -> None:
    with pytest.raises(UserError, match="digits"):
        gambeson.load("digit")


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder(np.array([5, 3, 2]), 7).tolist() == [4, 2, 1]  # 3.5, 2.1, 1.4


def real_split(n: int = 10) -> Split:
    return Split(torch.arange(n).float().reshape(n, 1, 1, 1) / 255, torch.arange(n) % 2)


class Source:
    """A synthetic source whose pixels are all 200."""

    def __len__(self) -> int:
        return 50

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full((len(indices), 1, 1, 1), 200, np.uint8), np.asarray(indices) % 2


@pytest.mark.parametrize(("fraction", "synthetic"), [(0.0, 0), (0.5, 4), (0.7, 6), (1.0, 8)])
def test_every_batch_has_the_exact_fraction(fraction: float, synthetic: int) -> None:
    mixture = Mixture(real_split(), Source(), fraction, 8, seed=1)
    for step in range(5):
        images, labels, mask = mixture.batch(step)
        assert images.shape == (8, 1, 1, 1)
        assert labels.shape == (8,)
        assert int(mask.sum()) == synthetic == int((images * 255 == 200).sum())


def test_real_images_come_without_replacement_and_depend_on_the_step_alone() -> None:
    mixture = Mixture(real_split(10), Source(), 0.5, 8, seed=1)
    seen = torch.cat([mixture.real_indices(step) for step in range(5)])  # 20 draws: each image exactly twice
    assert seen.bincount().tolist() == [2] * 10
    assert seen[:10].sort().values.tolist() == list(range(10))
    assert torch.equal(Mixture(real_split(10), Source(), 0.5, 8, seed=1).batch(3)[0], mixture.batch(3)[0])


def test_fewer_images_than_a_batch_repeat_evenly() -> None:
    indices = Mixture(real_split(3), None, 0.7, 8, seed=0).real_indices(0)
    assert sorted(indices.bincount().tolist()) == [2, 3, 3]


class Labelled(Source):
    """A source that says its labels: 1 image of class 0, 2 of class 1, none of class 2, 47 of class 3."""

    compact_labels = np.array([0, 1, 1, *[3] * 47], np.uint8)
    shape = (1, 1, 1)


def classes_of_four(sizes: tuple[int, ...] = (5, 3, 9, 7)) -> Split:
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return Split(torch.arange(float(len(labels))).reshape(-1, 1, 1, 1) / 255, labels)


def test_batches_keep_their_bits() -> None:
    """What the code before balanced sampling drew."""
    places = Mixture(real_split(10), Source(), 0.7, 8, seed=3).places(5)
    assert places.real.tolist() == BITS[0]
    assert places.synthetic.tolist() == BITS[1]


BITS = ([3, 5], [10, 6, 1, 41, 0, 40])


def test_balanced_real_images_come_without_replacement_in_each_class() -> None:
    real = classes_of_four()
    mixture = Mixture(real, None, 0.0, 6, seed=2, balanced=True)
    seen = torch.cat([mixture.real_indices(step) for step in range(140)])  # 840 draws: 210 of each class
    labels = real.labels[seen]
    for turn in range(0, 840, 4):
        assert sorted(labels[turn : turn + 4].tolist()) == [0, 1, 2, 3]  # one of each class a round
    assert len({tuple(labels[turn : turn + 4].tolist()) for turn in range(0, 840, 4)}) == 24  # in any order
    for label, size in enumerate((5, 3, 9, 7)):
        own = seen[labels == label]
        passes = own[: len(own) // size * size].view(-1, size)
        members = (real.labels == label).nonzero().flatten().tolist()
        assert all(sorted(one.tolist()) == members for one in passes)
        assert len({tuple(one.tolist()) for one in passes}) > 3  # each pass in an order of its own


def test_a_balanced_batch_depends_on_seed_and_step_alone() -> None:
    def mixture(seed: int = 1) -> Mixture:
        return Mixture(classes_of_four(), Labelled(), 0.5, 8, seed, balanced=True)

    straight = mixture()
    for step in range(300):
        straight.places(step)
    for a, b in zip(mixture().batch(299), straight.batch(299), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(mixture(2).places(0).synthetic, mixture().places(0).synthetic)


def test_balanced_synthetic_classes_are_equally_likely_and_empty_ones_left_out() -> None:
    mixture = Mixture(real_split(), Labelled(), 1.0, 30, seed=1, balanced=True)
    drawn = torch.cat([mixture.synthetic_indices(step) for step in range(200)])
    shares = drawn.bincount(minlength=50) / len(drawn)
    assert shares[0].item() == pytest.approx(1 / 3, abs=0.02)
    assert shares[1:3].tolist() == pytest.approx([1 / 6] * 2, abs=0.02)
    assert shares[3:].tolist() == pytest.approx([1 / 141] * 47, abs=0.005)


def test_the_index_by_class_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.array([2, 0, -1, 2, 5, 0, 2, 2, 5, -1, 0], np.int8)
    expected = [1, 5, 10, 0, 3, 6, 7, 4, 8]
    for chunk in (100, 4, 1):
        monkeypatch.setattr("gambeson.data.compact.CHUNK", chunk)
        found = ByClass.of(labels)
        assert found.order.tolist() == expected
        assert found.starts.tolist() == [0, 3, 7, 9]
        assert found.order.dtype == np.uint32


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ([0, 255], np.uint8),
        ([-1, 9], np.int8),
        ([-1, 255], np.int16),
        ([0, 256], np.int16),
        ([0, 3 * 10**9], np.uint32),
        ([-1, 3 * 10**9], np.int64),
        ([], np.uint8),
    ],
)
def test_numbers_take_the_smallest_type(numbers: list[int], kind: type) -> None:
    found = compact(np.array(numbers, np.int64))
    assert found.dtype == kind
    assert found.tolist() == numbers


def test_real_images_repeat_within_the_batch() -> None:
    """IRGD: each real image that is drawn stands four times in the batch; a pass is as long as without."""
    mixture = Mixture(real_split(10), Source(), 0.5, 16, seed=1, real_repeats=4)
    for step in range(5):
        drawn = mixture.real_indices(step)
        assert sorted(drawn.bincount()[drawn.unique()].tolist()) == [4, 4]
        assert torch.equal(drawn, drawn[:2].repeat(4))
        assert mixture.batch(step)[0].shape[0] == 16
    seen = torch.cat([mixture.real_indices(step)[:2] for step in range(5)])
    assert sorted(seen.tolist()) == list(range(10))
    balanced = Mixture(classes_of_four(), None, 0.0, 16, seed=1, balanced=True, real_repeats=4)
    assert sorted(balanced.real.labels[balanced.real_indices(3)].tolist()) == sorted([0, 1, 2, 3] * 4)


def test_places_are_what_the_batch_is_made_of() -> None:
    store = Labelled()
    mixture = Mixture(real_split(10), store, 0.5, 8, seed=4)
    images, labels, synthetic = mixture.batch(2)
    places = mixture.places(2)
    assert torch.equal(images[~synthetic], mixture.real.images[places.real])
    assert labels[synthetic].tolist() == store.read(places.synthetic.numpy())[1].tolist()
    assert len(Mixture(real_split(10), None, 0.5, 8, seed=4).places(0).synthetic) == 0
    assert len(Mixture(real_split(10), store, 1.0, 8, seed=4).places(0).real) == 0


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("fraction", "size"), [(0.0, 50), (1.0, 50), (0.5, 101)])
def test_fewer_images_than_a_batch_and_whole_fractions_work(balanced: bool, fraction: float, size: int) -> None:
    mixture = Mixture(classes_of_four((1, 2, 1)), Labelled(), fraction, size, seed=0, balanced=balanced)
    images, labels, synthetic = mixture.batch(7)
    assert images.shape == (size, 1, 1, 1)
    assert labels.shape == (size,)
    assert int(synthetic.sum()) == round(fraction * size)


def test_mixtures_that_cannot_be_are_refused() -> None:
    real, empty = real_split(10), Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UserError, match=r"divisor of the 3 real images.*a fraction of 0\.5 fits"):
        Mixture(real, Source(), 0.6, 8, 0, real_repeats=4)
    with pytest.raises(UserError, match="fraction: expected a share"):
        Mixture(real, Source(), 1.1, 8, 0)
    with pytest.raises(UserError, match=r"fraction: expected 1\.0 where there is no real"):
        Mixture(empty, Source(), 0.5, 8, 0)
    assert len(Mixture(empty, Source(), 1.0, 8, 0).batch(0)[0]) == 8
    with pytest.raises(UserError, match="none of class 1"):
        Mixture(classes_of_four((3, 0, 2)), None, 0.0, 4, 0, balanced=True).batch(0)
    with pytest.raises(UserError, match="says all its labels"):
        Mixture(real, Source(), 0.5, 8, 0, balanced=True).batch(0)


def images_of(size: int = 1, classes: int = 4) -> ImageSet:
    part = Split(torch.zeros(classes, 1, size, size), torch.arange(classes))
    names = tuple("abcdefgh"[:classes])
    return ImageSet(name="letters", train=part, validation=part, test=part, class_names=names, flip_safe=False)


def test_synthetic_images_that_do_not_fit_are_refused_before_one_is_read() -> None:
    source = Labelled()
    check_synthetic(source, images_of())
    with pytest.raises(UserError, match="expected 2 x 2 pixels of 1 channels, as letters has, got 1 x 1"):
        check_synthetic(source, images_of(size=2))
    with pytest.raises(UserError, match="expected 0 to 2 for the 3 classes of letters, got up to 3"):
        check_synthetic(source, images_of(classes=3))
    source.compact_labels = np.array([0, -1], np.int8)
    with pytest.raises(UserError, match=r"got -1, .*without a class; let a teacher"):
        check_synthetic(source, images_of())


def test_pixels_round_trip() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(to_uint8(from_uint8(pixels)), pixels)


def test_crops_are_shifts_of_the_image_and_flips_need_leave() -> None:
    images = torch.rand(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    shifted = PadCrop(padding=1, flip=True)(images, torch.Generator().manual_seed(1), False)
    padded = torch.nn.functional.pad(images, [1] * 4)
    places = [(t, s) for t in range(3) for s in range(3)]
    found = [[torch.equal(shifted[i], padded[i, :, t : t + 4, s : s + 4]) for t, s in places] for i in range(64)]
    assert all(any(f) for f in found)
    assert all(any(f[k] for f in found) for k in range(9))
    flipped = PadCrop(padding=0, flip=True)(images, torch.Generator().manual_seed(1), True)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, images, strict=True)]
    assert 16 < sum(mirrored) < 48
    assert torch.equal(PadCrop(padding=0)(images, torch.Generator(), False), images)


def warped(image: list[list[float]], spec: NonLeaking = NonLeaking(), **label: float) -> torch.Tensor:
    """A single-channel image under one warp, its label written by name."""
    names = ["flip", "down", "zoom", "cos", "sin", "along", "across", "right", "below"]
    labels = torch.tensor([[label.get(name, 0.0) for name in names]])
    return spec.warp(torch.tensor(image)[None, None], labels)[0, 0]


GRID = [[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
BY_HAND = {
    "mirrored": ({"flip": 1}, [[4, 3, 2, 1], [8, 7, 6, 5], [12, 11, 10, 9], [16, 15, 14, 13]]),
    "upside down": ({"down": 1}, GRID[::-1]),
    "one pixel right": ({"right": 2.0}, [[1, 1, 2, 3], [5, 5, 6, 7], [9, 9, 10, 11], [13, 13, 14, 15]]),
    "two pixels up": ({"below": -4.0}, [GRID[2], GRID[3], GRID[3], GRID[2]]),
    "a quarter turn clockwise": (
        {"cos": -1, "sin": 1},
        [[13, 9, 5, 1], [14, 10, 6, 2], [15, 11, 7, 3], [16, 12, 8, 4]],
    ),
    "mirrored, then turned": (
        {"flip": 1, "cos": -1, "sin": 1},
        [[16, 12, 8, 4], [15, 11, 7, 3], [14, 10, 6, 2], [13, 9, 5, 1]],
    ),
    "turned, then one pixel right": (
        {"cos": -1, "sin": 1, "right": 2.0},
        [[13, 13, 9, 5], [14, 14, 10, 6], [15, 15, 11, 7], [16, 16, 12, 8]],
    ),
}
"""Shifts are in units of an eighth of 4 pixels; beyond the border the image is mirrored."""


@pytest.mark.parametrize("name", BY_HAND)
def test_warps_by_hand(name: str) -> None:
    label, expected = BY_HAND[name]
    assert torch.allclose(warped(GRID, **label), torch.tensor(expected, dtype=torch.float32), atol=1e-4)


def test_zoom_and_stretch_by_hand() -> None:
    """Scale 1, one unit: twice as large, so that pixel centres at -1.5, -.5, .5, 1.5 look at -.75, -.25, .25, .75.

    A stretch along x doubles x and halves y: rows look at -3, -1, 1, 3, which mirrored at -2 and 2 is -1, -1, 1, 1.
    """
    spec = NonLeaking(scale=1.0, anisotropy=1.0)
    ramp = [[0.0, 1, 2, 3]] * 4
    zoomed = [0.75, 1.25, 1.75, 2.25]
    assert torch.allclose(warped(ramp, spec, zoom=1), torch.tensor([zoomed] * 4), atol=1e-5)
    smaller = torch.tensor([0.5, 0.5, 2.5, 2.5])
    assert torch.allclose(warped(ramp, spec, zoom=-1), smaller.expand(4, 4), atol=1e-5)
    assert torch.allclose(warped(ramp, spec, along=1), torch.tensor([zoomed] * 4), atol=1e-5)
    assert torch.allclose(warped(ramp, spec, across=1), smaller.expand(4, 4), atol=1e-5)
    tall = torch.tensor(ramp).T.tolist()
    assert torch.allclose(warped(tall, spec, across=1), torch.tensor([zoomed] * 4).T, atol=1e-5)
    assert torch.allclose(warped(ramp, spec, along=-1), warped(ramp, spec, along=1), atol=1e-5)  # an axis has two ends


def test_warps_know_that_pixels_are_square() -> None:
    """On a wide image a half turn of 8x4 pixels is exact, and a shift counts shares of its own side."""
    wide = torch.rand(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(3, 9)
    label[0, 3], label[1, 7], label[2, 8] = -2, 1, 2  # a half turn; one eighth of 8 right; two eighths of 4 down
    turned, right, down = NonLeaking().warp(wide.expand(3, -1, -1, -1), label)
    assert torch.allclose(turned, wide[0].flip(1, 2), atol=1e-5)
    assert torch.allclose(right[:, :, 1:], wide[0, :, :, :-1], atol=1e-5)
    assert torch.allclose(down[:, 1:], wide[0, :, :-1], atol=1e-5)
    quarter = torch.tensor([[0, 0, 0, -1, 1, 0, 0, 0, 0.0]])
    middle = NonLeaking().warp(wide, quarter)[0, :, :, 2:6]
    assert torch.allclose(middle, wide[0, :, :, 2:6].rot90(-1, (1, 2)), atol=1e-5)


def test_an_image_is_unchanged_exactly_where_its_label_is_zero() -> None:
    images = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found, labels = NonLeaking()(images, torch.Generator().manual_seed(1), True)
    same = (found == images).flatten(1).all(1)
    assert torch.equal(same, (labels == 0).all(1))
    assert 0.25 < same.float().mean() < 0.37  # half are not mirrored, and .88^4 of those have none of the others
    assert found.shape == images.shape
    assert labels.shape == (400, NonLeaking().parameters)
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(NonLeaking().warp(images, labels), found)  # the label says it all
    again, told = NonLeaking()(images, torch.Generator().manual_seed(1), True)
    assert torch.equal(again, found)
    assert torch.equal(told, labels)


def test_warps_come_as_often_and_as_strong_as_said() -> None:
    """Karras et al. 2022, appendix F.2: each with probability A_prob, mirroring a coin for every image."""
    spec = NonLeaking(probability=0.3, flip_vertical=True)
    labels = spec.draw(20_000, (32, 16), torch.Generator().manual_seed(0), True)
    flip, down, zoom, cos, sin, along, across, right, below = labels.T
    stretch = torch.hypot(along, across)
    for warp, share in ((flip, 0.5), (down, 0.15), (zoom, 0.3), (cos, 0.3), (stretch, 0.3)):
        assert (warp != 0).float().mean().item() == pytest.approx(share, abs=0.012)
    pixels = torch.cat([right * 2, below * 4])  # an eighth of 16 and of 32
    assert torch.allclose(pixels, pixels.round(), atol=1e-5)
    assert pixels.unique().numel() > 10
    for strong in (zoom[zoom != 0].square(), stretch[stretch != 0].square(), below[below != 0].square()):
        assert strong.mean().item() == pytest.approx(1, rel=0.13)
    angle = torch.atan2(sin, cos + 1)[cos != 0]
    assert angle.square().mean().item() == pytest.approx(math.pi**2 / 3, rel=0.05)
    assert torch.allclose((cos + 1).square() + sin.square(), torch.ones(20_000), atol=1e-5)


def test_warps_can_be_switched_off_and_mirroring_needs_leave() -> None:
    off = NonLeaking(probability=1.0, flip=False, scale=0.0, rotate=0.0, anisotropy=0.0, translate=0.0)
    assert (off.draw(50, (8, 8), torch.Generator().manual_seed(0), True) == 0).all()
    g = [torch.Generator().manual_seed(0) for _ in range(3)]
    every = NonLeaking(probability=1.0, flip_vertical=True)
    safe, unsafe = every.draw(50, (8, 8), g[0], True), every.draw(50, (8, 8), g[1], False)
    assert (unsafe[:, :2] == 0).all()
    assert (safe[:, :2].mean(0) > 0.2).all()
    assert torch.equal(safe[:, 2:], unsafe[:, 2:])
    off.draw(50, (8, 8), g[2], True)
    assert len({bytes(x.get_state().tolist()) for x in g}) == 1
    for name, value in (("probability", 1.1), ("rotate", -0.1), ("translate", -0.1)):
        with pytest.raises(UserError, match=name):
            replace(off, **{name: value})


def block(number: int) -> tuple[np.ndarray, np.ndarray]:
    size = 3 if number == 4 else 5
    images = np.random.default_rng(number).integers(0, 256, (size, 2, 2, 1), dtype=np.uint8)
    return images, np.arange(size, dtype=np.int64)


def write_store(root: Path, order: list[int], writers: int = 1) -> SyntheticStore:
    for turn in range(writers):
        writer = StoreWriter(root=root, blocks=5, blocks_per_shard=2)
        for number in order[turn::writers]:
            if not writer.has(number):
                writer.put(number, *block(number))
    StoreWriter(root=root, blocks=5, blocks_per_shard=2).finish({"why": "test"})
    return SyntheticStore.open(root).verify()


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_store_is_the_same_whatever_the_order_or_the_restarts(tmp_path: Path) -> None:
    straight = write_store(tmp_path / "a", [0, 1, 2, 3, 4])
    write_store(tmp_path / "b", [4, 2, 0, 3, 1], writers=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not list((tmp_path / "a").rglob("*.npz"))
    assert len(straight) == 23
    images, labels = straight.read(np.array([22, 0, 7]))
    assert np.array_equal(images, [block(4)[0][2], block(0)[0][0], block(1)[0][2]])
    assert labels.tolist() == [2, 0, 2]


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [0, 1, 2, 3, 4])
    path = tmp_path / "s/shards/00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(EnvironmentFault, match=r"00001\.npy: expected SHA-256"):
        SyntheticStore.open(tmp_path / "s").verify()


def test_a_store_of_another_format_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        SyntheticStore.open(tmp_path)
    write_store(tmp_path / "s", [0, 1, 2, 3, 4])
    header = tmp_path / "s/store.json"
    header.write_text(header.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="another version"):
        SyntheticStore.open(tmp_path / "s")


def test_positions_outside_the_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 to 22"):
        write_store(tmp_path / "s", [0, 1, 2, 3, 4]).read(np.array([23]))


def test_a_selection_points_to_its_store_and_moves_with_it(tmp_path: Path) -> None:
    store = write_store(tmp_path / "old/s", [0, 1, 2, 3, 4])
    Chosen.write(tmp_path / "old/chosen.parquet", store, np.array([5, 1]), np.array([7, 8]))
    (tmp_path / "old").rename(tmp_path / "new")
    chosen = Chosen.open(tmp_path / "new/chosen.parquet")
    images, labels = chosen.read(np.array([1, 0, 0]))
    assert np.array_equal(images, SyntheticStore.open(tmp_path / "new/s").read(np.array([1, 5, 5]))[0])
    assert labels.tolist() == [8, 7, 7]


def test_labels_are_small_in_memory_and_whole_outside(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [0, 1, 2, 3, 4])
    assert store.compact_labels.dtype == np.uint8
    assert store.labels.dtype == np.int64
    assert store.read(np.array([3]))[1].dtype == np.int64
    Chosen.write(tmp_path / "chosen.parquet", store, np.array([5, 1]), np.array([-1, 300]))
    chosen = Chosen.open(tmp_path / "chosen.parquet")
    assert chosen.positions.dtype == np.uint8
    assert chosen.compact_labels.dtype == np.int16
    assert chosen.read(np.array([1, 0]))[1].tolist() == [300, -1]
    assert chosen.labels.tolist() == [-1, 300]
    assert chosen.shape == store.shape == (2, 2, 1)


def test_synthetic_images_are_found_in_every_folder_that_has_them(tmp_path: Path) -> None:
    store = write_store(tmp_path / "stage/images", [0, 1, 2, 3, 4])
    assert len(open_synthetic(tmp_path / "stage")) == len(open_synthetic(tmp_path / "stage/images")) == 23
    Chosen.write(tmp_path / "stage/chosen.parquet", store, np.array([5, 1]), np.array([1, 0]))
    assert len(open_synthetic(tmp_path / "stage")) == len(open_synthetic(tmp_path / "stage/chosen.parquet")) == 2
    Chosen.write_all(tmp_path / "all.parquet", store)
    everything = open_synthetic(tmp_path / "all.parquet")
    for ours, theirs in zip(everything.read(np.arange(23)), store.read(np.arange(23)), strict=True):
        assert np.array_equal(ours, theirs)
    with pytest.raises(UserError, match="nothing there"):
        open_synthetic(tmp_path / "nowhere")
    (tmp_path / "set.npz").write_bytes(b"")
    with pytest.raises(UserError, match="import_images"):
        open_synthetic(tmp_path / "set.npz")


def test_a_stores_digest_is_its_content(tmp_path: Path) -> None:
    first = write_store(tmp_path / "a", [0, 1, 2, 3, 4]).digest
    assert write_store(tmp_path / "b", [4, 3, 2, 1, 0]).digest == first
    writer = StoreWriter(root=tmp_path / "c", blocks=1, blocks_per_shard=2)
    writer.put(0, *block(0))
    writer.finish({})
    assert SyntheticStore.open(tmp_path / "c").digest != first


def run_limited(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process in which the kernel stops every write past 20,000 bytes of a file."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)


DISK_FULL = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from gambeson.data.synthetic import StoreWriter
writer = StoreWriter(root=Path(sys.argv[1]), blocks=2, blocks_per_shard=2)
for block in range(2):
    writer.put(block, np.zeros((200, 8, 8, 1), np.uint8), np.zeros(200, np.int64))
"""


def test_a_damaged_marker_counts_as_none(tmp_path: Path) -> None:
    writer = StoreWriter(root=tmp_path, blocks=2, blocks_per_shard=2)
    writer.put(0, *block(0))
    (tmp_path / "blocks/000000.npz").write_bytes(b"damaged")
    writer.put(1, *block(1))
    assert writer.missing() == [0]
    with pytest.raises(EnvironmentFault, match=r"1 are missing .*\(0\)"):
        writer.finish({})
    writer.put(0, *block(0))
    writer.finish({})
    assert np.array_equal(SyntheticStore.open(tmp_path).read(np.arange(5))[0], block(0)[0])


WEIGHTS = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from gambeson.models.files import save_tensors
save_tensors(Path(sys.argv[1]) / "state.safetensors", {"a": torch.zeros(20_000)}, {})
"""


def test_weights_that_cannot_be_written_are_an_environment_fault(tmp_path: Path) -> None:
    result = run_limited(WEIGHTS, tmp_path)
    assert result.returncode == 1
    assert "EnvironmentFault" in result.stderr
    assert "state.safetensors" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_in_the_middle_of_a_shard_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The kernel stops writes past 20,000 bytes, as a full disk would: one block fits, the shard of two does not."""
    result = run_limited(DISK_FULL, tmp_path)
    assert result.returncode == 1
    assert "EnvironmentFault" in result.stderr
    assert "00000.npy" in result.stderr
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["00000.npy.part", "000000.npz"]
    writer = StoreWriter(root=tmp_path, blocks=2, blocks_per_shard=2)
    assert writer.missing() == [1]
    writer.put(1, np.zeros((200, 8, 8, 1), np.uint8), np.zeros(200, np.int64))
    writer.finish({})
    assert len(SyntheticStore.open(tmp_path).verify()) == 400
