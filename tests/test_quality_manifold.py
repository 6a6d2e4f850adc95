"""Precision, recall, density, coverage, and IRGD's complementarity and coverage, in worlds where they are known."""

import numpy as np
import pytest
import torch
from quality_worlds import covered, gaussian, rng, sample, widths

from gambeson.errors import UserError
from gambeson.quality import neighbours
from gambeson.quality.coverage import Complementarity, Coverage, nearest_sources
from gambeson.quality.manifold import PrecisionRecall, expected_coverage, manifold
from gambeson.quality.measured import HeldOutMeasure, Measure


def values(rows):
    return [row.value for row in rows]


def test_four_points_on_a_line_by_hand():
    """k = 1. Real 0, 1, 3, 10 have radii 1, 1, 2, 7; synthetic 1.5, 4.5, 20 have 3, 3, 15.5.

    1.5 lies in the balls of 1 and 3, 4.5 in those of 3 and 10, 20 in none; 0, 1, 3 lie in that of 1.5, 3 in that of
    4.5, 10 in that of 20. The balls of 1 and 3 and 10 have a synthetic image in them, that of 0 has none.
    """
    found = manifold(torch.tensor([[0.0], [1.0], [3.0], [10.0]]), torch.tensor([[1.5], [4.5], [20.0]]), 1)
    assert found.precise.tolist() == [True, True, False]
    assert found.recalled.tolist() == [True, True, True, True]
    assert found.balls.tolist() == [2, 2, 0]
    assert found.covered.tolist() == [False, True, True, True]
    assert found.numbers == pytest.approx((2 / 3, 1, 4 / 3, 3 / 4))


def test_what_lies_on_a_ball_lies_in_it():
    """The k-th neighbour itself, as a synthetic copy: Kynkaanniemi's balls are closed."""
    real = gaussian(60, 5, rng(0)).features
    found = manifold(real, real.clone(), 1)
    assert found.balls.double().mean() == 2  # its twin's ball and, once on average, the bound of another's
    assert found.precise.all()
    assert found.recalled.all()
    assert found.covered.all()


def test_balls_of_radius_0_hold_their_copies():
    """Of squares near 6,000 a product of matrices leaves 4e-11, where the difference is 0."""
    real = gaussian(67, 640, rng(0), shift=3.0).features.repeat(3, 1)
    found = manifold(real, real[:37].clone(), 1)
    assert found.balls.tolist() == [3] * 37
    assert int(found.covered.sum()) == 111


def test_blocks_change_nothing(monkeypatch):
    real, synthetic = gaussian(70, 3, rng(0)).features, gaussian(50, 3, rng(1), 0.5).features
    whole = manifold(real, synthetic, 3)
    monkeypatch.setattr(neighbours, "ROWS", 8)
    monkeypatch.setattr(neighbours, "COLUMNS", 16)
    parts = manifold(real, synthetic, 3)
    for name in ("precise", "recalled", "balls", "covered"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_disjoint_sets_have_none_and_a_copied_train_has_all():
    real = gaussian(100, 4, rng(0))
    apart = PrecisionRecall()(real, gaussian(100, 4, rng(1), 1000.0), seed=0)
    assert values(apart) == [0, 0, 0, 0]
    assert [r.high for r in apart if r.name != "density"] == pytest.approx([0.037] * 3, abs=1e-3)  # Wilson's of 0
    copied = PrecisionRecall()(real, sample(real.features), seed=0)
    assert [r.value for r in copied if r.name != "density"] == [1, 1, 1]
    assert copied[2].value > 1
    assert [r.name for r in copied] == ["precision", "recall", "density", "coverage"]


def test_coverage_of_one_distribution_is_the_closed_form():
    """Naeem et al.'s expectation at unequal numbers, and density's of 1, over 60 draws."""
    expected = expected_coverage(50, 30, 3)
    assert expected == pytest.approx(1 - (49 * 48 * 47) / (79 * 78 * 77))
    drawn = [manifold(gaussian(50, 3, g := rng(s)).features, gaussian(30, 3, g).features, 3) for s in range(60)]
    for found, true in (([d.coverage for d in drawn], expected), ([d.density for d in drawn], 1.0)):
        assert abs(np.mean(found) - true) < 3 * np.std(found, ddof=1) / np.sqrt(60)
    row = PrecisionRecall(k=3)(gaussian(50, 3, rng(0)), gaussian(30, 3, rng(1)), seed=0)[3]
    assert row.ideal == pytest.approx(expected)


def test_fewer_images_draw_by_seed():
    real, synthetic = gaussian(300, 2, rng(0)), gaussian(300, 2, rng(1))
    rows = PrecisionRecall(most=100)(real, synthetic, seed=0)
    assert (rows[0].real, rows[0].synthetic) == (100, 100)
    assert values(rows) == values(PrecisionRecall(most=100)(real, synthetic, seed=0))
    assert values(rows) != values(PrecisionRecall(most=100)(real, synthetic, seed=1))


def test_a_third_of_each_where_all_come_from_one_distribution():
    shares = [
        values(
            Complementarity(splits=5)(*(gaussian(60, 3, g), gaussian(60, 3, g)), held_out=gaussian(60, 3, g), seed=0)
        )
        for g in map(rng, range(40))
    ]
    spread = np.std(shares, axis=0, ddof=1) / np.sqrt(40)
    assert np.abs(np.mean(shares, axis=0) - [60 / 179, 60 / 179, 59 / 179]).max() < 3 * spread.max()
    assert np.sum(shares, axis=1) == pytest.approx(1)


def test_disjoint_images_are_nearest_to_themselves():
    train, held, far = gaussian(80, 3, rng(0)), gaussian(80, 3, rng(1)), gaussian(80, 3, rng(2), 100.0)
    rows = Complementarity()(train, far, held_out=held, seed=0)
    assert values(rows) == [0, 0, 1]
    assert rows[0].high == pytest.approx(0.0458, abs=1e-3)
    assert values(Coverage()(train, far, held_out=held, seed=0)) == [0, 0]


def test_a_copied_train_is_nearest_to_train():
    train, held = gaussian(80, 3, rng(0)), gaussian(80, 3, rng(1))
    copied = sample(train.features)
    rows = Complementarity()(train, copied, held_out=held, seed=0)
    assert values(rows) == [1, 0, 0]
    assert [row.ideal for row in rows] == pytest.approx([80 / 239, 80 / 239, 79 / 239])
    cover = Coverage()(train, copied, held_out=held, seed=0)
    assert cover[0].value == 1
    assert 0.3 < cover[1].value < 0.7


def test_ties_are_counted_for_train_and_said():
    """Every image of train twice among the generated: a twin in train and one beside it, both at 0."""
    train, held = gaussian(40, 3, rng(0)), gaussian(40, 3, rng(1))
    twice = sample(torch.cat([train.features[:20], train.features[:20]]))
    rows = Complementarity()(train, twice, held_out=held, seed=0)
    assert values(rows) == [1, 0, 0]
    assert "40 ties, counted for train" in rows[0].note
    where, tied = nearest_sources(torch.tensor([[0.0], [5.0]]), [torch.tensor([[1.0]]), torch.tensor([[-1.0]])])
    assert where.tolist() == [0, 0]
    assert tied.tolist() == [True, False]


def test_a_real_image_between_its_own_kind_and_a_generated_one_is_not_covered():
    real, synthetic = sample([0.0, 2.0, 10.0, 20.0]), sample([-2.0, 11.0, 100.0, 200.0])
    rows = Coverage()(real, synthetic, held_out=real, seed=0)
    assert rows[0].value == 2 / 4  # 10 and 20 have 11 nearer; 0 has 2 and -2 equally near
    assert "1 ties, counted for the other real image" in rows[0].note
    assert (rows[0].name, rows[0].better, rows[0].ideal) == ("coverage of train", "near", pytest.approx(4 / 7))


def test_equal_numbers_are_drawn():
    g = rng(0)
    train, held, made = gaussian(90, 2, g), gaussian(50, 2, g), gaussian(70, 2, g)
    rows = Complementarity()(train, made, held_out=held, seed=0)
    assert (rows[0].real, rows[0].synthetic) == (100, 50)
    cover = Coverage(most=60)(train, made, held_out=held, seed=0)
    assert [(r.real, r.synthetic) for r in cover] == [(60, 60), (50, 50)]
    assert "50 images of each" in rows[0].note


def repeated(count, d, times, shift=0.0, scale=1.0):
    rows = []
    for s in range(times):
        g = rng(s)
        train, held, made = gaussian(count, d, g), gaussian(count, d, g), gaussian(count, d, g, shift, scale)
        rows.append(
            [
                *PrecisionRecall()(train, made, seed=s),
                *Complementarity()(train, made, held_out=held, seed=s),
                *Coverage()(train, made, held_out=held, seed=s),
            ]
        )
    return rows


def truths(n):
    """Of one distribution, in the order of `repeated`; none: its mean."""
    third = n / (3 * n - 1)
    return (None, None, 1.0, expected_coverage(n, n, 5), third, third, (n - 1) / (3 * n - 1), *[n / (2 * n - 1)] * 2)


def test_intervals_cover_the_closed_forms():
    """30 repeats of 120 images in 8 dimensions; `slow` has 150 in four worlds."""
    rows = repeated(120, 8, 30)
    shares = covered(rows, truths(120))
    assert len(shares) == 9
    assert all(share >= 0.85 for share in shares.values()), shares
    assert all(0.75 < width < 1.6 for width in widths(rows).values()), widths(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "d", "shift", "scale"), [(300, 2, 0, 1), (300, 16, 0, 1), (200, 64, 0, 1), (300, 8, 0, 0.8)]
)
def test_intervals_over_many_repeats(count, d, shift, scale):
    rows = repeated(count, d, 150, shift, scale)
    known = truths(count) if scale == 1 else [None] * 9
    shares = covered(rows, known)
    assert all(0.87 <= share <= 1 for share in shares.values()), shares
    assert all(0.7 < width < 1.6 for width in widths(rows).values()), widths(rows)


def test_bad_input_is_refused():
    good = gaussian(50, 3, rng(0))
    with pytest.raises(
        UserError, match=r"synthetic: expected at least 12 images \(5 neighbours in each half\), got 11"
    ):
        PrecisionRecall()(good, gaussian(11, 3, rng(1)), seed=0)
    with pytest.raises(UserError, match="at least 4 images"):
        Complementarity()(good, good, held_out=gaussian(3, 3, rng(1)), seed=0)
    for measure in (Complementarity(), Coverage()):
        assert isinstance(measure, HeldOutMeasure)
        with pytest.raises(UserError, match="one space of one dimension"):
            measure(good, good, held_out=gaussian(50, 2, rng(1)), seed=0)
    assert isinstance(PrecisionRecall(), Measure)
    for make in (
        lambda: PrecisionRecall(k=0),
        lambda: PrecisionRecall(most=9),
        lambda: PrecisionRecall(splits=1),
        lambda: Complementarity(splits=1),
        lambda: Coverage(most=2),
    ):
        with pytest.raises(UserError, match="expected at least"):
            make()
