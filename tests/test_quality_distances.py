"""FID and KID against closed forms, scipy, brute force and repeated draws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_worlds import covered, gaussian, rng, sample, widths
from scipy import linalg

from gambeson.errors import UserError
from gambeson.quality.frechet import FrechetDistance, frechet, frechet_gaussians
from gambeson.quality.kernel import KernelDistance, kid, u_variance
from gambeson.quality.measured import Measure

f64 = torch.float64


def covariance(d, seed, rank=None):
    root = torch.randn(d, rank or d, generator=rng(seed), dtype=f64)
    return root @ root.T


def test_frechet_of_lines_and_planes_by_hand():
    one = torch.ones(1, dtype=f64)
    # N(0, 4) and N(3, 1): 3^2 + (2 - 1)^2
    assert frechet_gaussians(0 * one, 4 * one[:, None], 3 * one, one[:, None]) == pytest.approx(10)
    # commuting covariances diag(1, 4), diag(9, 16): (3 - 1)^2 + (4 - 2)^2, means (1, 0) apart
    a, b = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 16.0]))
    assert frechet_gaussians(torch.zeros(2), a, torch.tensor([1.0, 0.0]), b) == pytest.approx(9)
    # not commuting: A = [[2, 1], [1, 2]], B = diag(1, 4); AB has determinant 12 and trace 10
    skew = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    root = np.sqrt(10 + 2 * np.sqrt(12))  # tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) in two dimensions
    assert frechet_gaussians(torch.zeros(2), skew, torch.zeros(2), a) == pytest.approx(4 + 5 - 2 * root, rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(0, 999))
def test_frechet_equals_scipys_square_root(d, seed):
    a, b = covariance(d, seed), covariance(d, seed + 1)
    mean = torch.randn(d, generator=rng(seed), dtype=f64)
    root = np.trace(linalg.sqrtm((a @ b).numpy())).real
    expected = float(mean.square().sum() + a.trace() + b.trace()) - 2 * root
    assert frechet_gaussians(mean, a, torch.zeros(d, dtype=f64), b) == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_frechet_of_singular_covariances():
    zero, a = torch.zeros(5, dtype=f64), covariance(5, 0, rank=2)
    assert frechet_gaussians(zero, a, zero, a) == pytest.approx(0, abs=1e-6)
    assert frechet_gaussians(zero, a, zero, 0 * a) == pytest.approx(a.trace().item())


def test_frechet_of_features_is_that_of_their_moments():
    x, y = gaussian(80, 6, rng(1), shift=100.0).features, gaussian(50, 6, rng(2), 100.3, 1.4).features
    moments = [m for z in (x, y) for m in (z.double().mean(0), torch.cov(z.double().T))]
    assert frechet(x, y) == pytest.approx(frechet_gaussians(*moments), rel=1e-9)
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-9)


def test_fid_of_one_distribution_shrinks_as_one_over_n():
    """Plug-in bias of equal Gaussians: FID N is constant, and the extrapolated value is around 0 all the time."""
    scaled = []
    for count in (100, 400, 1600):
        rows = [FrechetDistance()(*(gaussian(count, 8, rng(s + i)) for i in (0, 500)), seed=s) for s in range(12)]
        scaled.append(count * np.mean([r[0].value for r in rows]))
        extrapolated = np.array([r[1].value for r in rows])
        assert abs(extrapolated.mean()) < 4 * extrapolated.std(ddof=1) / np.sqrt(12)
    assert scaled == pytest.approx([scaled[-1]] * 3, rel=0.15)


def test_fid_finds_the_closed_form():
    true = 8 * (0.3**2 + 0.2**2)
    plain, extrapolated = FrechetDistance()(gaussian(4000, 8, rng(0)), gaussian(4000, 8, rng(1), 0.3, 1.2), seed=0)
    assert (plain.name, extrapolated.name) == ("FID", "FID extrapolated")
    assert extrapolated.low < true < extrapolated.high
    assert extrapolated.high - extrapolated.low < 0.25 * true
    assert plain.value > extrapolated.value
    assert (plain.space, plain.real, plain.ideal, plain.better) == ("world", 4000, 0.0, "lower")
    assert isinstance(FrechetDistance(), Measure)
    assert isinstance(KernelDistance(), Measure)


def test_fid_with_fewer_images_than_dimensions_says_so_and_extrapolates_nothing():
    (row,) = FrechetDistance()(gaussian(40, 60, rng(0)), gaussian(90, 60, rng(1)), seed=0)
    assert "40 images in 60 dimensions" in row.note
    assert "singular" in row.note
    assert len(FrechetDistance(extrapolate=False)(gaussian(90, 3, rng(0)), gaussian(90, 3, rng(1)), seed=0)) == 1


@pytest.mark.parametrize("measure", [FrechetDistance(), KernelDistance()])
def test_distances_refuse_what_they_cannot_compare(measure):
    good = gaussian(100, 3, rng(0))
    with pytest.raises(UserError, match="at least 40 images"):
        measure(good, gaussian(39, 3, rng(1)), seed=0)
    with pytest.raises(UserError, match="one space of one dimension"):
        measure(good, gaussian(100, 4, rng(1)), seed=0)


def test_settings_out_of_range_are_refused():
    for make in (lambda: FrechetDistance(groups=2), lambda: KernelDistance(groups=2), lambda: KernelDistance(most=3)):
        with pytest.raises(UserError, match="expected at least"):
            make()


def test_distances_are_the_same_for_the_same_seed_and_in_any_order_nearly():
    x, y = gaussian(100, 4, rng(0)), gaussian(90, 4, rng(1), 0.5)
    for measure in (FrechetDistance(), KernelDistance()):
        assert measure(x, y, seed=1) == measure(x, y, seed=1)
        turned = measure(x.take(torch.randperm(100, generator=rng(2))), y, seed=1)
        assert turned[0].value == pytest.approx(measure(x, y, seed=1)[0].value, rel=1e-9)


def brute_kid(x, y):
    def k(a, b):
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within = [sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) for z in (x, y)]
    between = sum(k(a, b) for a in x for b in y)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * between / (n * m)


def test_kid_equals_the_double_sums():
    x, y = gaussian(7, 3, rng(0)).features, gaussian(5, 3, rng(1), 0.5).features
    assert kid(x, y) == pytest.approx(brute_kid(x, y), rel=1e-9)
    whole = [gaussian(n, 3, rng(n), 0.1) for n in (43, 51)]  # groups of unequal sizes change nothing
    (row,) = KernelDistance()(*whole, seed=5)
    assert row.value == pytest.approx(brute_kid(*(s.features for s in whole)), rel=1e-9)


def test_kid_by_hand():
    # x = {1, 2}, y = {0, 3}: k(1, 2) = 27, k(0, 3) = 1; crossed: 1, 4^3, 1, 7^3
    assert kid(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])) == pytest.approx(
        27 + 1 - 2 * (1 + 64 + 1 + 343) / 4
    )


def cubic_moment(d, shift, scale, other_shift, other_scale):
    """E (x.y / d + 1)^3 of x ~ N(shift, scale^2 I), y likewise, by the cumulants of x.y / d."""
    raw = [(m, m * m + s * s, m**3 + 3 * m * s * s) for m, s in ((shift, scale), (other_shift, other_scale))]
    p = [a * b for a, b in zip(*raw, strict=True)]
    mean, variance = p[0], (p[1] - p[0] ** 2) / d
    third = (p[2] - 3 * p[1] * p[0] + 2 * p[0] ** 3) / d**2
    return third + 3 * variance * (mean + 1) + (mean + 1) ** 3


def true_kid(d, shift, scale):
    return cubic_moment(d, 0, 1, 0, 1) + cubic_moment(d, shift, scale, shift, scale) - 2 * cubic_moment(
        d, 0, 1, shift, scale
    )  # fmt: skip


def repeated(count, d, shift, scale, times):
    return [
        [
            *FrechetDistance()(a := gaussian(count, d, g := rng(s)), b := gaussian(count, d, g, shift, scale), seed=s),
            *KernelDistance()(a, b, seed=s),
        ]
        for s in range(times)
    ]


def test_intervals_of_distances_cover_what_they_say():
    """60 repeats, 8 dimensions: FID's covers its own mean, the others the closed form (seen: 0.95 to 0.975)."""
    rows = repeated(150, 8, 0.3, 1.2, 60)
    shares = covered(rows, (None, 8 * (0.3**2 + 0.2**2), true_kid(8, 0.3, 1.2)))
    assert all(0.88 <= share <= 1 for share in shares.values()), shares
    assert all(0.8 < width < 1.4 for width in widths(rows).values())


def test_distances_of_one_distribution_are_unbiased_about_0():
    rows = repeated(120, 6, 0.0, 1.0, 60)
    for i in (1, 2):
        values = np.array([row[i].value for row in rows])
        assert abs(values.mean()) < 3 * values.std(ddof=1) / np.sqrt(len(values))
    assert all(share >= 0.88 for share in covered(rows, (None, 0.0, 0.0)).values())
    assert all(width < 1.8 for width in widths(rows).values())


@pytest.mark.slow
@pytest.mark.parametrize(("count", "d", "shift", "scale"), [(400, 8, 0, 1), (400, 8, 0.3, 1.2), (200, 16, 0.3, 1.2)])
def test_intervals_of_distances_over_many_repeats(count, d, shift, scale):
    rows = repeated(count, d, shift, scale, 300)
    truths = (None, d * (shift**2 + (scale - 1) ** 2), true_kid(d, shift, scale))
    assert all(0.91 <= share <= 0.999 for share in covered(rows, truths).values())


def test_the_variance_of_a_u_statistic_is_unbiased():
    """h(i, j) = (a_i + a_j) + b_i b_j of standard normals: Var of its mean is 4/G + 2/(G (G - 1))."""
    g, number, found, means = rng(0), 8, [], []
    for _ in range(2000):
        a, b = torch.randn(2, number, generator=g, dtype=f64)
        h = a[:, None] + a[None, :] + torch.outer(b, b)
        off = ~torch.eye(number, dtype=torch.bool)
        found.append(u_variance(h))
        means.append(h[off].mean().item())
    true = 4 / number + 2 / (number * (number - 1))
    assert np.var(means) == pytest.approx(true, rel=0.1)
    assert np.mean(found) == pytest.approx(true, rel=0.05)


def test_far_sets_are_far():
    near, far = (KernelDistance()(sample(torch.zeros(50)), sample(torch.full((50,), v)), seed=0)[0] for v in (0, 9))
    assert near.value == pytest.approx(0, abs=1e-12)
    assert far.value == pytest.approx(1 + 82**3 - 2, rel=1e-9)
    assert far.low == pytest.approx(far.high)
