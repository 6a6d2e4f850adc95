"""Wasserstein distances against closed forms, brute force and hand-worked classes; their intervals against chance."""

import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gambeson.errors import UserError
from gambeson.quality.frechet import frechet_gaussians
from gambeson.quality.measured import Measure, Measured
from gambeson.quality.space import Sample
from gambeson.quality.transport import (
    ConditionalWasserstein,
    Cost,
    ExactTransport,
    SlicedTransport,
    Wasserstein,
)
from gambeson.theory.transfer import conditional_wasserstein2


def normal(n, d, seed, shift=0.0, scale=1.0):
    """Points of N(shift e, scale^2 I), where e is the unit vector of equal coordinates."""
    stream = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, d, generator=stream) + shift / math.sqrt(d)).float()


def sample(features, labels=None, space="a plane"):
    return Sample(features, labels, space)


def two_classes(n, seed, d=3):
    """Two classes of N(+-4 e, I), n each."""
    points = torch.cat([normal(n, d, seed, -4.0), normal(n, d, seed + 1, 4.0)])
    return sample(points, torch.arange(2).repeat_interleave(n))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=12), st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_on_a_line_the_plan_is_that_of_the_sorted_points(pairs, power):
    a, b = (np.array(column)[:, None] for column in zip(*pairs, strict=True))
    expected = (np.abs(np.sort(a[:, 0]) - np.sort(b[:, 0])) ** power).mean()
    for solver in (ExactTransport(), ExactTransport(norm="linf"), SlicedTransport(projections=2)):
        assert solver.cost(a, b, power, 0).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("power", [1, 2])
def test_the_exact_plan_is_the_best_of_all_pairings(norm, power):
    a, b = (normal(5, 3, seed).double().numpy() for seed in (1, 2))
    order = {"l2": 2, "linf": np.inf}[norm]
    every = [
        np.mean([np.linalg.norm(a[i] - b[j], order) ** power for i, j in enumerate(pairing)])
        for pairing in itertools.permutations(range(5))
    ]
    assert ExactTransport(norm=norm).cost(a, b, power, 0).value == pytest.approx(min(every), rel=1e-9)


@pytest.mark.parametrize("power", [1, 2])
def test_moved_points_are_as_far_as_they_were_moved(power):
    a = normal(40, 3, 0).double().numpy()
    shift = np.array([1.0, -2.0, 2.0])  # of length 3 and largest coordinate 2
    assert ExactTransport().cost(a, a + shift, power, 0).root(power).value == pytest.approx(3.0)
    assert ExactTransport(norm="linf").cost(a, a + shift, power, 0).root(power).value == pytest.approx(2.0)


def test_slices_of_a_shift_are_its_length_over_the_root_of_the_dimensions():
    a = normal(50, 16, 0).double().numpy()
    found = SlicedTransport(projections=4000).cost(a, a + 0.5, 2, 0)  # of length 2
    assert found.value == pytest.approx(4 / 16, rel=0.08)
    assert abs(found.value - 0.25) < 3 * math.sqrt(found.variance)


def test_directions_are_an_unbiased_choice():
    """The mean over many seeds of a few slices is what many slices give, and its variance is the one that is told."""
    a, b = (normal(30, 4, seed, shift).double().numpy() for seed, shift in ((1, 0.0), (2, 2.0)))
    true = SlicedTransport(projections=20000).cost(a, b, 2, 0).value
    few = [SlicedTransport(projections=10).cost(a, b, 2, seed).value for seed in range(80)]
    assert np.mean(few) == pytest.approx(true, abs=3 * np.std(few) / math.sqrt(80))


@pytest.mark.parametrize("solver", [ExactTransport(images=700), SlicedTransport(images=2000, projections=60)])
def test_scaled_gaussians_have_their_closed_form(solver):
    """N(0, 1) and N(0, 9): W_2 = 2, on a line and, by slices, in any dimension."""
    d = 1 if isinstance(solver, ExactTransport) else 8
    real, made = sample(normal(4000, d, 0)), sample(normal(4000, d, 1, scale=3.0))
    distance, floor, _ = Wasserstein(power=2, solver=solver)(real, made, seed=0)
    assert distance.value == pytest.approx(2.0, abs=0.15)
    assert distance.low < 2.0 < distance.high
    assert floor.value < 0.2


def test_translated_gaussians_have_their_closed_form():
    real, made = sample(normal(1600, 2, 0)), sample(normal(1600, 2, 1, shift=3.0))
    for power in (1, 2):
        distance, floor, _ = Wasserstein(power=power)(real, made, seed=0)
        assert distance.low < 3.0 < distance.high
        assert floor.high < 0.3
    assert (distance.real, distance.synthetic, floor.real, floor.synthetic) == (800, 800, 1600, 0)


def test_equal_distributions_lie_at_the_floor_which_sinks_with_the_images():
    floors = []
    for n in (40, 400):
        distance, floor, _ = Wasserstein()(sample(normal(2 * n, 4, 0)), sample(normal(n, 4, 1)), seed=0)
        assert distance.low < floor.high
        assert floor.low < distance.high
        assert distance.ideal == floor.value
        floors.append(floor.value)
    assert floors[1] < 0.75 * floors[0]


def test_a_set_that_is_too_narrow_lies_below_the_floor_and_its_excess_shows_it():
    """N(0, I / 4) against N(0, I) in 50 dimensions: few draws of it lie closer to real images than those do."""
    distance, floor, excess = Wasserstein(power=2)(
        sample(normal(200, 50, 0)), sample(normal(200, 50, 1, 0, 0.5)), seed=0
    )
    assert distance.high < floor.low
    assert excess.low > 0
    assert excess.real == excess.synthetic == 200


def test_the_excess_of_equal_sets_is_nothing():
    """In the mean over worlds, and within its interval more often than 95 times in 100."""
    worlds = [
        Wasserstein()(sample(normal(100, 5, 2 * s)), sample(normal(100, 5, 2 * s + 1)), seed=s) for s in range(60)
    ]
    found = [rows[2] for rows in worlds]
    assert np.mean([row.value for row in found]) == pytest.approx(
        0.0, abs=3 * np.std([r.value for r in found]) / 60**0.5
    )
    assert np.mean([row.low <= 0 <= row.high for row in found]) > 0.93


@pytest.mark.parametrize("solver", [ExactTransport(), SlicedTransport(projections=30)])
def test_permuted_labels_are_seen_within_classes_alone(solver):
    real, made = two_classes(200, 0), two_classes(100, 10)
    wrong = sample(made.features, 1 - made.labels)
    measure, whole = ConditionalWasserstein(solver=solver), Wasserstein(solver=solver)
    assert whole(real, wrong, seed=0) == whole(real, made, seed=0)
    right, mistaken = (measure(real, each, seed=0)[0].value for each in (made, wrong))
    assert mistaken > 3 * right
    if isinstance(solver, ExactTransport):
        assert mistaken == pytest.approx(8.0, abs=0.5)  # the distance of the two means


def test_classes_count_as_often_as_they_are_real():
    """Class 0 (3 of 4 real images) is hit, class 1 is missed by 2: W_1 = W_2 = 1/4 * 2; the synthetic shares and a
    class that the real set lacks play no part."""
    real = sample(torch.tensor([[0.0]] * 12 + [[1.0]] * 4), torch.tensor([0] * 12 + [1] * 4))
    made = sample(torch.tensor([[0.0]] * 4 + [[3.0]] * 6 + [[9.0]]), torch.tensor([0] * 4 + [1] * 6 + [2]))
    for power in (1, 2):
        distance, floor, excess = ConditionalWasserstein(power=power)(real, made, seed=0)
        assert distance.value == excess.value == pytest.approx(0.5)
        assert floor.value == 0.0
    assert "2 of a class and a sample" in distance.randomness


@pytest.mark.parametrize("solver", [ExactTransport(), SlicedTransport(projections=30)])
def test_the_interval_is_as_wide_as_chance(solver):
    """The spread of the estimate over 60 worlds is what each of them tells of itself."""
    found = [
        Wasserstein(solver=solver)(sample(normal(160, 3, 2 * s)), sample(normal(80, 3, 2 * s + 1, 2.0)), seed=s)[0]
        for s in range(60)
    ]
    told = np.mean([(row.high - row.low) / 3.92 for row in found])
    assert 0.7 < told / np.std([row.value for row in found]) < 1.5


def test_measures_say_what_they_are_and_draw_by_their_seed():
    real, made = two_classes(60, 0), two_classes(60, 10)
    measure = ConditionalWasserstein(power=2, solver=ExactTransport(images=20, norm="linf"))
    assert isinstance(measure, Measure)
    rows = measure(real, made, seed=0)
    distance, floor, excess = rows
    assert distance.name == "conditional W2 (linf, exact plan)"
    assert [floor.name, excess.name] == [f"{what} of {distance.name}" for what in ("floor", "excess")]
    assert "not a bound" in distance.note
    assert (distance.real, floor.real, distance.space) == (40, 80, "a plane")
    assert Measured(**distance.plain()) == distance
    assert measure(real, made, seed=0) == rows
    assert measure(real, made, seed=1)[0].value != distance.value


def test_what_cannot_be_measured_is_refused():
    real, made = two_classes(20, 0), two_classes(20, 10)
    with pytest.raises(UserError, match=r"at least 4 synthetic images of each class.*class 1"):
        ConditionalWasserstein()(real, made.take(torch.arange(20)), seed=0)
    with pytest.raises(UserError, match=r"at least 4 real images of each class.*class 1"):
        ConditionalWasserstein()(real.take(torch.arange(23)), made, seed=0)
    with pytest.raises(UserError, match="a class for every image"):
        ConditionalWasserstein()(real, sample(made.features), seed=0)
    with pytest.raises(UserError, match="one space"):
        Wasserstein()(real, sample(made.features, made.labels, "another plane"), seed=0)
    with pytest.raises(UserError, match="power: expected 1 or 2"):
        ConditionalWasserstein(power=3)


def test_a_distance_of_nothing_has_no_spread():
    assert Cost(0.0, 1.0).root(2) == Cost(0.0, 0.0)
    assert Cost(4.0, 1.6).root(2) == Cost(2.0, 0.1)


def wasserstein(*gaussians):
    """W2 of two Gaussians, from means and covariances."""
    return math.sqrt(frechet_gaussians(*gaussians))


def covariance(d, seed):
    root = normal(d, d, seed).double()
    return root @ root.T


def test_gaussians_on_a_line_differ_by_means_and_deviations():
    one = torch.tensor([[4.0]]), torch.tensor([[25.0]])
    found = wasserstein(torch.tensor([1.0]), one[0], torch.tensor([5.0]), one[1])
    assert found == pytest.approx(5.0)  # sqrt(4^2 + (2 - 5)^2)


@pytest.mark.parametrize("seed", range(3))
def test_gaussians_agree_with_pot_and_are_symmetric(seed):
    m, n, a, b = torch.randn(4).double(), torch.randn(4).double(), covariance(4, seed), covariance(4, seed + 10)
    found = wasserstein(m, a, n, b)
    assert found == pytest.approx(float(ot.gaussian.bures_wasserstein_distance(m, n, a, b)))
    assert found == pytest.approx(wasserstein(n, b, m, a))
    assert wasserstein(m, a, m + 2.0, a) == pytest.approx(4.0, rel=1e-6)  # a shift of length 4


def test_flat_gaussians_are_allowed():
    zero, flat = torch.zeros(2), torch.diag(torch.tensor([9.0, 0.0]))
    assert wasserstein(zero, flat, zero, torch.zeros(2, 2)) == pytest.approx(3.0)


@pytest.mark.parametrize(("own", "other"), [(0.7, 0.2), (1.0, 1.0)])
def test_the_theory_s_isotropic_case_is_the_same_number(own, other):
    m, n = normal(5, 1, 0)[:, 0].double(), normal(5, 1, 1)[:, 0].double()
    found = wasserstein(m, own**2 * torch.eye(5), n, other**2 * torch.eye(5))
    assert float(conditional_wasserstein2(m, n, own, other)) == pytest.approx(found)
