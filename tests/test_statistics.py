"""Intervals: worked by hand, at their edges, and by simulated coverage."""

import math

import numpy as np
import pytest
from scipy.special import ndtr

from gambeson.report.statistics import (
    Difference,
    mean_accuracy,
    paired_difference,
    randomness,
    two_way_mean,
    wilson,
)


def test_wilson_by_hand():
    # n = 10, 8 right, z = 1.959964: centre (0.8 + 0.192073) / 1.384146, half 1.4160 sqrt(0.016 + 0.0096036) ...
    found = wilson(8, 10)
    assert found.estimate == 0.8
    assert found.low == pytest.approx(0.490162, abs=1e-6)
    assert found.high == pytest.approx(0.943318, abs=1e-6)


def test_wilson_at_the_edges():
    # 0 of n: [0, z^2 / (n + z^2)], and the mirror image for n of n.
    z2 = 1.9599639845**2
    assert (wilson(0, 20).low, wilson(0, 20).high) == (0.0, pytest.approx(z2 / (20 + z2)))
    assert (wilson(20, 20).low, wilson(20, 20).high) == (pytest.approx(20 / (20 + z2)), 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_count(successes, n):
    with pytest.raises(ValueError, match="wilson: expected"):
        wilson(successes, n)


def test_confidence_is_a_probability():
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, confidence=95.0)


def test_one_seed_is_agresti_and_min_by_hand():
    # 20 images: a alone right 5, b alone right 1. Half a count per cell: n* = 22, 5.5 against 1.5.
    a, b = np.ones((1, 20), bool), np.ones((1, 20), bool)
    b[0, :5] = False
    a[0, 5] = False
    centre = 4 / 22
    half = 1.9599639845 * math.sqrt((7 / 22 - centre**2) / 22)
    found = paired_difference(a, b)
    assert found.estimate == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert found.randomness == "test images"
    assert not found.shown


def test_equal_arms_keep_a_width():
    for seeds in (1, 4):
        same = np.ones((seeds, 200), bool)
        found = paired_difference(same, same)
        assert found.estimate == 0
        assert found.low < -0.005
        assert found.high > 0.005
        accuracy = mean_accuracy(same)
        assert accuracy.estimate == accuracy.high == 1
        assert 0.95 < accuracy.low < 0.995


def test_an_arm_is_minus_its_opposite():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 50)) < 0.8, rng.random((3, 50)) < 0.6
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))


def test_two_way_mean_by_hand():
    # Rows 1 3 5 and 3 5 13: mean 5, row means 3 7, column means 2 4 9. MS_s = 3 * 8 = 24, MS_i = 2 * 13 = 26,
    # rest +-(1, 1, -2): MS_e = 12 / 2 = 6. Variance (24 + 26 - 6) / 6, freedom 44^2 / (24^2/1 + 26^2/2 + 6^2/2).
    found = two_way_mean(np.array([[1.0, 3, 5], [3, 5, 13]]))
    assert found.mean == 5
    assert found.variance == pytest.approx(44 / 6)
    assert found.freedom == pytest.approx(44**2 / (576 + 338 + 18))


def test_two_way_mean_drops_a_negative_component():
    # Equal row means: MS_s = 0 < MS_e, so the variance is that of the images alone: MS_i / (S I), freedom I - 1.
    found = two_way_mean(np.array([[1.0, 2, 6], [0, 3, 6]]))
    assert found.variance == pytest.approx(2 * np.var([0.5, 2.5, 6], ddof=1) / 6)
    assert (found.mean, found.freedom) == (3.0, 2.0)


def test_training_noise_widens_the_interval():
    # Seeds that differ as wholes: five seeds are worth little more than five numbers.
    level = np.array([0.2, 0.9, 0.5, 0.7, 0.4])
    right = np.arange(100)[None, :] < (100 * level)[:, None]
    found = mean_accuracy(right)
    assert found.high - found.low > 0.5
    assert found.estimate == pytest.approx(level.mean())


def test_several_seeds_are_named():
    rng = np.random.default_rng(1)
    found = paired_difference(rng.random((5, 40)) < 0.5, rng.random((5, 40)) < 0.5)
    assert found.randomness == randomness(5) == "test images and training (5 seeds)"


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_arrays_are_refused(shape):
    with pytest.raises(ValueError, match="non-empty"):
        mean_accuracy(np.ones(shape, bool))


def test_shapes_must_agree():
    # The house's type checks may speak first; without them it is the function's own ValueError.
    with pytest.raises(Exception, match=r"shape|images"):
        paired_difference(np.ones((1, 4), bool), np.ones((1, 5), bool))


def test_difference_shown():
    assert Difference(0.1, 0.01, 0.2, "").shown
    assert Difference(-0.1, -0.2, -0.01, "").shown
    assert not Difference(0.0, -0.1, 0.1, "").shown


@pytest.mark.parametrize(("seeds", "training"), [(1, 0.0), (3, 0.1), (5, 0.05), (5, 0.2)])
def test_coverage(seeds, training):
    """95 % intervals hold the truth in about 95 % of simulated evaluations (probit model, arms share hard images)."""
    rng, repeats, images = np.random.default_rng(7), 400, 250
    spread = math.sqrt(1.5**2 + 0.5**2 + training**2 + 0.25)
    truth = ndtr(1.3 / spread) - ndtr(1.1 / spread), ndtr(1.3 / spread)
    held = np.zeros(2)
    for _ in range(repeats):
        shared = rng.normal(0, 1.5, images)
        a, b = (
            level + shared + rng.normal(0, 0.5, images) + rng.normal(0, training, (seeds, 1))
            + rng.normal(0, 0.5, (seeds, images)) > 0
            for level in (1.3, 1.1)
        )  # fmt: skip
        found = paired_difference(a, b), mean_accuracy(a)
        held += [each.low <= true <= each.high for each, true in zip(found, truth, strict=True)]
    assert (held / repeats >= 0.915).all(), held / repeats
    assert (held / repeats <= 0.99).all(), held / repeats
