"""Copies: thresholds by hand, shares in Gaussian worlds, real sets given as synthetic, removal."""

import numpy as np
import pytest
import torch
from quality_worlds import covered, gaussian, rng, sample

from gambeson.data.datasets import Digits
from gambeson.errors import UserError
from gambeson.quality.measured import HeldOutMeasure
from gambeson.quality.memorisation import CopyTest, Memorisation, _below, repeated
from gambeson.quality.space import Pixels, Sample, embed

TRAIN = sample([0.0, 10.0, 20.0])
HELD = sample([1.0, 12.0, 23.0, 24.0])  # 1, 2, 3, 4 from their nearest train image


def test_a_copy_lies_nearer_than_the_quantile_of_held_out_images():
    test = CopyTest.against(TRAIN, HELD, quantile=0.4)
    assert test.yardstick.tolist() == [1, 2, 3, 4]
    assert test.threshold == 2.0  # 0.4 (4 + 1): the second
    made = sample([0.0, 11.9, 8.1, 16.0, 12.1])
    assert test(made.features).tolist() == [True, True, True, False, False]
    distances, positions = test.nearest(made.features)
    assert positions.tolist() == [0, 1, 1, 2, 1]
    assert distances.tolist() == pytest.approx([0, 1.9, 1.9, 4, 2.1], abs=1e-5)


def test_a_batch_at_a_time_finds_the_same_copies():
    train, held, made = gaussian(200, 4, rng(0)), gaussian(200, 4, rng(1)), gaussian(300, 4, rng(2), scale=0.5)
    test = CopyTest.against(train, held, quantile=0.1)
    parts = torch.cat([test(part) for part in made.features.split(37)])
    assert torch.equal(parts, test(made.features))
    assert 30 < int(parts.sum()) < 299


def test_honest_images_are_called_copies_as_often_as_the_quantile_says():
    """Weibull's plotting positions: right on average for any number of held-out images, 20 of them here."""
    shares = []
    for s in range(150):
        train, held, made = (
            gaussian(100, 3, rng(3 * s)),
            gaussian(20, 3, rng(3 * s + 1)),
            gaussian(60, 3, rng(3 * s + 2)),
        )
        test = CopyTest.against(train, held, quantile=0.1)
        shares.append(test(made.features).double().mean().item())
    assert abs(np.mean(shares) - 0.1) < 3 * np.std(shares, ddof=1) / np.sqrt(150)


def test_memorisation_counts_copies_equal_images_and_repetitions():
    g = rng(0)
    train, held = gaussian(300, 6, g), gaussian(200, 6, g)
    fresh = gaussian(100, 6, g).features
    made = sample(torch.cat([fresh, train.features[:50], train.features[:20] + 1e-3, fresh[:10]]))
    near, same, again = Memorisation()(train, made, held_out=held, seed=0)
    assert (near.name, same.name, again.name) == ("copies of train", "exact copies of train", "repeated images")
    assert 70 / 180 <= near.value <= 74 / 180
    assert same.value == 50 / 180
    assert again.value == 10 / 180
    assert (near.ideal, same.ideal, again.ideal) == (0.01, 0.0, 0.0)
    assert "nearest neighbours exact" in same.note
    assert (near.real, near.synthetic) == (500, 180)
    assert isinstance(Memorisation(), HeldOutMeasure)


def test_no_copy_is_no_certainty():
    train, held = gaussian(100, 3, rng(0)), gaussian(100, 3, rng(1))
    near, same, _ = Memorisation()(train, gaussian(50, 3, rng(2), 100.0), held_out=held, seed=0)
    assert near.value == same.value == 0
    assert near.high >= same.high == pytest.approx(0.0713, abs=1e-3)  # Wilson's of 0 of 50


def test_intervals_cover_the_quantile():
    rows = []
    for s in range(60):
        g = rng(s)
        parts = [gaussian(n, 5, g) for n in (200, 199, 200)]
        rows.append(Memorisation(quantile=0.05)(parts[0], parts[2], held_out=parts[1], seed=s)[:1])
    assert 0.88 <= covered(rows, (0.05,))["copies of train"] <= 1  # over 200: 0.965
    assert np.mean([r[0].high - r[0].low for r in rows]) < 0.12


def test_copies_are_copies_however_few_held_out_images_there_are():
    """Of 150 none marks a level below 1/151: exact copies, far below all their distances, are no less certain."""
    train, held = gaussian(300, 6, rng(0)), gaussian(150, 6, rng(1))
    near = Memorisation()(train, train, held_out=held, seed=0)[0]
    assert (near.value, near.high) == (1.0, 1.0)
    assert near.low == pytest.approx(0.9874, abs=1e-3)  # Wilson's of 300 of 300


def test_the_share_below_what_held_out_images_mark_by_hand():
    """Distances 4, 5, ... of 99: at the level 1/100 it is 4. At half that level 0 and 1 count in full, 3 by half."""
    test = CopyTest.against(sample([0.0]), sample(torch.arange(4.0, 103.0)), quantile=0.01)
    apart = torch.tensor([0.0, 1.0, 3.0, 4.5])
    assert [_below(apart, test, level) for level in (0.01, 0.005, 0.0)] == [0.75, 0.625, 0.5]
    assert _below(apart, test, 0.02) == 0.75 + 0.25


@pytest.mark.parametrize(("part", "noise"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.01)])
def test_intervals_cover_the_share_where_the_yardstick_is_short(part, noise):
    """150 held-out images and the 1 % point; exact copies, and copies with noise, among honest images."""
    rows, true = [], part + (1 - part) * 0.01
    for s in range(60):
        g = rng(s)
        train, held, made = gaussian(200, 5, g), gaussian(150, 5, g), gaussian(300, 5, g).features
        count = int((torch.rand(300, generator=g) < part).sum())
        made[:count] = train.features[torch.randint(200, (count,), generator=g)]
        made[:count] += noise * torch.randn(count, 5, generator=g)
        rows.append(Memorisation()(train, sample(made), held_out=held, seed=s)[:1])
    assert covered(rows, (true,))["copies of train"] >= 0.9
    assert np.mean([r[0].high - r[0].low for r in rows]) < 0.14


def test_later_equal_images_are_repetitions():
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    assert repeated(z).tolist() == [False, False, True, False, True, True]
    assert not repeated(gaussian(5000, 2, rng(0)).features).any()


def test_one_level_of_one_pixel_is_no_exact_copy():
    real = Digits(train_images=400, validation_images=300).load()
    train, held = embed(Pixels(), real.train.images), embed(Pixels(), real.validation.images)
    changed = train.features.clone()
    changed[:, 27] = (changed[:, 27] - 1 / 255).abs()
    near, same, _ = Memorisation()(train, Sample(changed, None, "pixels"), held_out=held, seed=0)
    assert (near.value, same.value) == (1.0, 0.0)


def test_bad_input_is_refused():
    train, held = gaussian(50, 3, rng(0)), gaussian(99, 3, rng(1))
    assert CopyTest.against(train, held)(train.features).all()
    with pytest.raises(UserError, match=r"at least 99 images \(for the 0.01 quantile of their distances\), got 98"):
        CopyTest.against(train, held.take(torch.arange(98)))
    with pytest.raises(UserError, match="not in train"):
        CopyTest.against(held, held)
    with pytest.raises(UserError, match="one space of one dimension"):
        Memorisation()(train, gaussian(9, 4, rng(0)), held_out=held, seed=0)
    with pytest.raises(UserError, match="quantile"):
        Memorisation(quantile=1.0)
    with pytest.raises(UserError, match="quantile"):
        CopyTest.against(train, held, quantile=0.0)
