"""Intervals of measures that are no means: jackknife and random halves, where the answer is known."""

import numpy as np
import pytest
import torch
from quality_worlds import gaussian, rng, sample

from gambeson.errors import UserError
from gambeson.quality import intervals


def test_groups_are_random_disjoint_and_of_one_size():
    parts = intervals.groups(23, 5, 0, "x")
    assert sorted(torch.cat(parts).tolist()) == list(range(23))
    assert sorted(map(len, parts)) == [4, 4, 5, 5, 5]
    assert torch.cat(parts).tolist() != torch.cat(intervals.groups(23, 5, 1, "x")).tolist()


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = np.array([1.0, 2.0, 4.0, 9.0])
    found = intervals.jackknife(x.mean(), [np.delete(x, i).mean() for i in range(4)])
    assert found.corrected == pytest.approx(4.0)
    assert found.error == pytest.approx(x.std(ddof=1) / 2)
    assert found.freedom == 3


def test_the_jackknife_makes_the_plug_in_variance_unbiased():
    """Quenouille's own example: sum of squares over N becomes that over N - 1."""
    x = np.random.default_rng(0).normal(size=12)
    found = intervals.jackknife(x.var(), [np.delete(x, i).var() for i in range(12)])
    assert found.corrected == pytest.approx(x.var(ddof=1))


def test_halves_give_the_standard_error_of_a_difference_of_means():
    one, other = gaussian(50, 1, rng(0)), gaussian(80, 1, rng(1), scale=3.0)
    (error,) = intervals.half_errors(
        [one, other], 2000, 0, lambda parts: [float(parts[0].features.mean() - parts[1].features.mean())]
    )
    expected = (one.features.var() / 50 + other.features.var() / 80).sqrt().item()
    assert error == pytest.approx(expected, rel=0.05)  # 2000 splits: 1.6 % of chance


def test_halves_share_no_image():
    seen = []

    def keep(parts):
        seen.append([set(p.features[:, 0].tolist()) for p in parts])
        return [0.0]

    intervals.half_errors([sample(torch.arange(9.0)), sample(torch.arange(4.0))], 3, 0, keep)
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        for a, b, whole in zip(one, other, (9, 4), strict=True):
            assert not a & b
            assert len(a | b) == whole


def test_students_interval_and_its_cuts():
    assert intervals.student(1.0, 0.5, 10) == pytest.approx((1 - 0.5 * 2.2281, 1 + 0.5 * 2.2281), abs=1e-4)
    assert intervals.around(0.5, 0.6, 1.2, 0.0, 1.0) == (0.5, 1.0)
    assert intervals.around(0.5, -0.6, 0.4, 0.0, 1.0) == (0.0, 0.5)
    assert intervals.around(2.0, 1.0, 3.0) == (1.0, 3.0)


def test_a_share_is_never_surer_than_its_count_allows():
    low, high = intervals.share(0, 20, 0.0, 10)
    assert (low, high) == pytest.approx((0, 0.1611), abs=1e-4)  # Wilson's of 0 of 20
    low, high = intervals.share(10, 20, 0.2, 10)
    assert (low, high) == pytest.approx((0.5 - 0.4456, 0.5 + 0.4456), abs=1e-4)
    assert intervals.share(19, 20, 0.2, 10)[1] == 1.0


def test_too_few_images_are_named():
    intervals.enough("FID, real", 5, 5, "why")
    with pytest.raises(UserError, match=r"FID, real: expected at least 5 images \(why\), got 4; give more images"):
        intervals.enough("FID, real", 4, 5, "why")
