"""The Gaussian theory: hand-worked numbers, closed forms against simulated images, exact sampling, its bad input."""

import math
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gambeson.errors import UserError
from gambeson.theory.gaussian import (
    ZeroOptimum,
    best_accuracies,
    best_robust_theta,
    clean_accuracy,
    dual,
    pseudo_labelled_theta,
    robust_accuracy,
)
from gambeson.theory.means import any_direction, mean_at, orthogonal, scaled, shifted, thresholded, turned
from gambeson.theory.transfer import (
    conditional_wasserstein,
    conditional_wasserstein2,
    mean_robustness,
    total_variation,
    wrong_labels,
)
from gambeson.theory.trials import Protocol, World, draw_theta, pseudo_labelled_sum, run_trials


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def world(mean: Tensor, synthetic: Tensor, **fields: float) -> World:
    return World(mean=tuple(mean.tolist()), synthetic=tuple(synthetic.tolist()), **{"epsilon": 0.1, **fields})


@pytest.mark.parametrize(
    ("d", "length", "epsilon", "clean", "robust"),
    [(2, math.sqrt(2), 0.5, 0.92135, 0.76025), (100, 2.0, 0.1, 0.97725, 0.84134)],
)
def test_the_optima_of_the_papers_worlds(d: int, length: float, epsilon: float, clean: float, robust: float) -> None:
    """METHOD, section 4."""
    mu = mean_at(d, 0, length)
    best = best_robust_theta(mu, epsilon)
    assert float(clean_accuracy(best, mu)) == pytest.approx(clean, abs=5e-6)
    assert float(robust_accuracy(best, mu, epsilon)) == pytest.approx(robust, abs=5e-6)
    assert {k: float(v) for k, v in best_accuracies(mu, epsilon).items()} == pytest.approx(
        {"clean": clean, "robust": robust}, abs=5e-6
    )


def test_by_hand() -> None:
    """theta = (3, -4), mu = (1, -.5), sigma = 2: mu.theta = 5, |theta| = 5, |theta|_1 = 7; epsilon .5."""
    theta, mu = [3, -4], np.array([1.0, -0.5])
    phi = torch.special.ndtr
    assert float(clean_accuracy(theta, mu, 2)) == pytest.approx(float(phi(torch.tensor(0.5))), rel=1e-6)
    assert float(robust_accuracy(theta, mu, 0.5, 2)) == pytest.approx(float(phi(torch.tensor(0.15))), rel=1e-6)
    l2 = robust_accuracy(theta, mu, 0.5, 2, norm="l2")
    assert float(l2) == pytest.approx(float(phi(torch.tensor(0.25))), rel=1e-6)
    assert best_robust_theta([1.0, -0.5, 0.3], 0.4).tolist() == pytest.approx([0.6, -0.1, 0.0])
    assert best_robust_theta([3.0, 4.0], 2.5, norm="l2").tolist() == pytest.approx([1.5, 2.0])


def test_leading_dimensions_broadcast() -> None:
    theta, mu = normal(4, 1, 3), normal(5, 3, seed=1)
    together = robust_accuracy(theta, mu, torch.linspace(0, 1, 5), 1.5)
    assert together.shape == (4, 5)
    alone = robust_accuracy(theta[2, 0], mu[3], 0.75, 1.5)
    assert float(together[2, 3]) == pytest.approx(float(alone))


SIMULATED = 4000
GRID = list(product((1, 2, 5, 20), (0.0, 0.05, 0.3), (0.5, 1.0, 3.0), ("linf", "l2"), (0, 1, 2)))


def test_closed_forms_agree_with_attacked_images_on_a_grid() -> None:
    """Over 200 settings: draw images, move each by the worst step of the ball, count; within 4 standard errors.

    mu has mixed signs and entries below epsilon; theta is random, so that some classifiers are worse than chance.
    """
    assert len(GRID) >= 200
    far = []
    for i, (d, epsilon, sigma, norm, seed) in enumerate(GRID):
        mu, theta, draws = normal(d, seed=seed) * 0.6, normal(d, seed=100 + seed) * 2, generator(i)
        y = torch.randint(0, 2, (SIMULATED, 1), generator=draws) * 2 - 1
        x = y * mu + sigma * torch.randn((SIMULATED, d), generator=draws, dtype=torch.float64)
        step = theta.sign() if norm == "linf" else theta / theta.norm()
        attacked = x - epsilon * y * step
        for images, told in (
            (x, clean_accuracy(theta, mu, sigma)),
            (attacked, robust_accuracy(theta, mu, epsilon, sigma, norm)),
        ):
            share = float(((images @ theta).sign() == y[:, 0]).double().mean())
            error = math.sqrt(float(told * (1 - told)) / SIMULATED)
            far.append(abs(share - float(told)) / max(error, 1 / SIMULATED))
    assert max(far) < 4
    assert 0.8 < math.sqrt(sum(z * z for z in far) / len(far)) < 1.15  # and not by being vague


vector = st.lists(st.floats(-3, 3).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=6)


@given(mu=vector, epsilon=st.floats(0, 2), seed=st.integers(0, 1000), norm=st.sampled_from(["linf", "l2"]))
@settings(max_examples=200, deadline=None)
def test_nothing_beats_the_best_robust_theta(mu: list[float], epsilon: float, seed: int, norm: str) -> None:
    """Not random directions, not the neighbours of the optimum, not mu; where it is zero none beats 1/2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroOptimum)
        best = best_robust_theta(mu, epsilon, norm)
    others = torch.cat(
        [normal(50, len(mu), seed=seed), best + 0.1 * normal(50, len(mu), seed=seed + 1), torch.tensor([mu])]
    )
    top = float(robust_accuracy(best, mu, epsilon, 1.0, norm))
    assert float(robust_accuracy(others, mu, epsilon, 1.0, norm).max()) <= top + 1e-12
    if not best.any():
        assert top == 0.5


@given(mu=vector, factor=st.floats(0.01, 100), epsilon=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_accuracies_know_directions_and_units_only(mu: list[float], factor: float, epsilon: float, seed: int) -> None:
    theta = normal(len(mu), seed=seed)
    accuracy = float(robust_accuracy(theta, mu, epsilon, 1.0))
    assert float(robust_accuracy(theta * factor, mu, epsilon, 1.0)) == pytest.approx(accuracy, abs=1e-9)
    scaled_all = robust_accuracy(theta, torch.tensor(mu, dtype=torch.float64) * factor, epsilon * factor, factor)
    assert float(scaled_all) == pytest.approx(accuracy, abs=1e-9)
    assert accuracy <= float(clean_accuracy(theta, mu)) + 1e-12
    assert float(clean_accuracy(-theta, mu)) == pytest.approx(1 - float(clean_accuracy(theta, mu)), abs=1e-9)


def test_the_papers_short_form_fails_where_an_entry_is_below_epsilon() -> None:
    """Table 8's own world, 30 degrees: mu = (cos 15, sin 15); mu - epsilon 1 is worse than mu, the threshold best."""
    mu = mean_at(2, 30, 1.0)
    assert mu.tolist() == pytest.approx([math.cos(math.pi / 12), math.sin(math.pi / 12)])
    robust = {
        "short": float(robust_accuracy(shifted(mu, 0.5, 1.0), mu, 0.5)),
        "mu": float(robust_accuracy(mu, mu, 0.5)),
        "threshold": float(robust_accuracy(thresholded(mu, 0.5, 1.0), mu, 0.5)),
    }
    assert robust == pytest.approx({"short": 0.5259, "mu": 0.65085, "threshold": 0.67937}, abs=5e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_budget_beyond_mu_has_the_zero_vector_as_optimum_and_says_so(norm: str) -> None:
    with pytest.warns(ZeroOptimum, match="zero vector"):
        best = best_robust_theta([0.3, -0.2], 0.5, norm)
    assert best.tolist() == [0, 0]
    assert float(robust_accuracy(best, [0.3, -0.2], 0.5)) == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best_robust_theta([0.3, -0.2], 0.1, norm)


def test_pseudo_labelled_means_have_their_limit_in_closed_form() -> None:
    """500,000 images labelled by a theta_inter that points somewhere else; the paper's proof has gamma mu~ alone."""
    inter, other, count = torch.tensor([1.0, 0.5, -0.2]).double(), torch.tensor([0.4, -0.6, 0.3]).double(), 500_000
    y = torch.randint(0, 2, (count, 1), generator=generator()) * 2 - 1
    x = y * other + 0.8 * normal(count, 3, seed=1)
    mean = ((x @ inter).sign()[:, None] * x).mean(0)
    limit = pseudo_labelled_theta(inter, other, 0.8)
    assert torch.allclose(mean, limit, atol=4 * 0.9 / math.sqrt(count))
    gamma = 1 - 2 * float(wrong_labels(inter, other, 0.8))
    assert float((limit - gamma * other).norm()) > 0.1


def brute_sums(inter: Tensor, now: World, images: int, draws: torch.Generator) -> Tensor:
    """Sums of y~ x~ over drawn images, as the paper words it."""
    mean, trials = torch.tensor(now.synthetic).double(), len(inter)
    y = torch.randint(0, 2, (trials, images, 1), generator=draws) * 2 - 1
    noise = torch.randn((trials, images, len(mean)), generator=draws, dtype=torch.float64)
    x = y * mean + now.synthetic_sigma * noise
    return ((x * inter[:, None]).sum(2, keepdim=True).sign() * x).sum(1)


def test_sums_of_pseudo_labelled_images_are_sampled_exactly() -> None:
    """Their means, covariances and third moments are those of sums over drawn images (20,000 trials of 12 each)."""
    mean, trials = mean_at(3, 20, 1.2), 20_000
    now = world(mean, 0.7 * turned(mean, 40, 1.0, generator(3)), synthetic_sigma=0.8)
    inter = mean + normal(1, 3) / 3
    ours = pseudo_labelled_sum(inter.expand(trials, 3), now, 12, generator(1))
    theirs = brute_sums(inter.expand(trials, 3), now, 12, generator(2))
    scale = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)) / scale).abs().max() < 4 * math.sqrt(2 / trials)
    relative = (torch.cov(ours.T) - torch.cov(theirs.T)) / scale.outer(scale)
    assert relative.abs().max() < 4 * math.sqrt(4 / trials)
    third = [((s - theirs.mean(0)) / scale).pow(3).mean(0) for s in (ours, theirs)]
    assert (third[0] - third[1]).abs().max() < 4 * math.sqrt(2 * 15 / trials)


@given(
    d=st.integers(1, 6), n=st.integers(1, 20), m=st.integers(1, 20), seed=st.integers(0, 10_000),
    trained=st.sampled_from(["real", "synthetic", "both"]), labels=st.sampled_from(["true", "inter"]),
    counted=st.sampled_from(["class", "total"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_trials_agree_with_drawn_images(
    d: int, n: int, m: int, seed: int, trained: str, labels: str, counted: str
) -> None:
    """Formula and simulation: mean clean accuracy of 400 trials, and of 400 with every image drawn."""
    mean = normal(d, seed=seed) * 0.5
    now, trials, draws = world(mean, normal(d, seed=seed + 1) * 0.7), 400, generator(seed)
    protocol = Protocol(trained_on=trained, labels=labels, counted=counted)
    ours = run_trials(now, protocol, n, m, trials, generator(seed + 2))
    n, m = (2 * n, 2 * m) if counted == "class" else (n, m)
    real = (mean + torch.randn((trials, n, d), generator=draws, dtype=torch.float64)).mean(1)
    if labels == "inter":
        total = brute_sums(real, now, m, draws)
    else:
        other = torch.tensor(now.synthetic).double()
        total = (other + torch.randn((trials, m, d), generator=draws, dtype=torch.float64)).sum(1)
    theta = {"real": real, "synthetic": total, "both": n * real + total}[trained]
    theirs = clean_accuracy(theta, mean)
    error = math.sqrt((float(theirs.var()) + float(ours.clean.var())) / trials) + 1e-12
    assert abs(ours.mean("clean") - float(theirs.mean())) < 5 * error


def test_large_counts_are_drawn_in_chunks_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = mean_at(2, 0, 1.0)
    inter = mean + normal(50, 2)
    whole = pseudo_labelled_sum(inter, world(mean, mean), 300, generator())
    monkeypatch.setattr("gambeson.theory.trials.CHUNK", 1000)
    assert torch.allclose(
        pseudo_labelled_sum(inter, world(mean, mean), 300, generator()).mean(0), whole.mean(0), rtol=0.05
    )


def test_no_public_call_moves_the_global_stream() -> None:
    before, mean = torch.get_rng_state(), mean_at(2, 0, 1.0)
    first = draw_theta(world(mean, mean), Protocol(), 3, 3, 5)
    assert torch.equal(first, draw_theta(world(mean, mean), Protocol(), 3, 3, 5))
    orthogonal(mean, 1.0)
    any_direction(mean, 1.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("d", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("degrees", [0, 30, 90])
def test_means_at_an_angle(d: int, degrees: int) -> None:
    if d == 1 and degrees:
        with pytest.raises(UserError, match="degrees"):
            mean_at(d, degrees, 2.0)
        return
    mu = mean_at(d, degrees, 2.0)
    assert float(mu.norm()) == pytest.approx(2)
    assert float(mu.sum()) / math.sqrt(d) == pytest.approx(2 * math.cos(math.radians(degrees)), abs=1e-9)


@given(mu=vector.filter(lambda v: len(v) > 1), c=st.floats(0.1, 5), degrees=st.floats(1, 179), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_synthetic_means_have_their_lengths_and_angles(mu: list[float], c: float, degrees: float, seed: int) -> None:
    own = torch.tensor(mu, dtype=torch.float64)
    across, free = orthogonal(mu, c, generator(seed)), any_direction(mu, c, generator(seed))
    assert float(across @ own) == pytest.approx(0, abs=1e-9)
    for found in (across, free, turned(mu, degrees, c, generator(seed)), scaled(mu, c)):
        assert float(found.norm()) == pytest.approx(c * float(own.norm()))
    cosine = float(turned(mu, degrees, c, generator(seed)) @ own) / float(own @ own) / c
    assert cosine == pytest.approx(math.cos(math.radians(degrees)), abs=1e-9)


def test_mean_robustness_is_the_mean_distance_to_the_boundary() -> None:
    mu, theta = torch.tensor([0.8, -0.3, 0.1]).double(), torch.tensor([1.0, 0.5, -2.0]).double()
    x = mu + 1.3 * normal(200_000, 3)
    for norm in ("linf", "l2"):
        distance = (x @ theta).clamp(min=0) / dual(theta, norm)
        told = float(mean_robustness(theta, mu, 1.3, norm))
        assert abs(float(distance.mean()) - told) < 4 * float(distance.std()) / math.sqrt(len(x))


@given(mu=vector, seed=st.integers(0, 500), sigma=st.floats(0.2, 3), norm=st.sampled_from(["linf", "l2"]))
@settings(max_examples=200, deadline=None)
def test_ports_bound_holds_and_a_shift_along_theta_meets_it(
    mu: list[float], seed: int, sigma: float, norm: str
) -> None:
    """|mean robustness on real - on synthetic| <= conditional W1 in the attacker's norm, whatever the classifier."""
    theta, other = normal(20, len(mu), seed=seed), normal(len(mu), seed=seed + 1)
    gap = (mean_robustness(theta, mu, sigma, norm) - mean_robustness(theta, other, sigma, norm)).abs()
    assert float(gap.max()) <= float(conditional_wasserstein(mu, other, sigma, norm)) + 1e-9


def test_ports_bound_is_met_far_from_the_boundary() -> None:
    mu = mean_at(4, 0, 20.0)
    gap = float((mean_robustness(mu, mu, 1.0, "l2") - mean_robustness(mu, 1.5 * mu, 1.0, "l2")).abs())
    assert gap == pytest.approx(10.0)
    assert float(conditional_wasserstein(mu, 1.5 * mu)) == pytest.approx(10.0)


def test_wasserstein_and_total_variation_in_one_dimension() -> None:
    """d = 1: W1 and W2 from quantiles, total variation by integration."""
    level = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    quantile = torch.special.ndtri(level)
    assert float(conditional_wasserstein([0.4], [1.1], 0.7)) == pytest.approx(0.7)
    own, other = 0.4 + 0.7 * quantile, 1.1 + 0.2 * quantile
    w2 = float((own - other).square().mean().sqrt())
    assert float(conditional_wasserstein2([0.4], [1.1], 0.7, 0.2)) == pytest.approx(w2, rel=1e-3)
    grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    p, q = (torch.exp(-((grid - m) ** 2) / (2 * 0.7**2)) for m in (0.4, 1.1))
    variation = float((p - q).abs().sum() / (p + q).sum())
    assert float(total_variation([0.4], [1.1], 0.7)) == pytest.approx(variation, rel=1e-5)


def test_the_variation_bounds_robust_error() -> None:
    """IRGD's conditions as an inequality: error on real <= error on synthetic + wrong labels + total variation."""
    mu, other = mean_at(5, 20, 1.5), turned(mean_at(5, 20, 1.5), 25, 1.3)
    theta = normal(200, 5)
    real, proxy = (1 - robust_accuracy(theta, m, 0.1) for m in (mu, other))
    assert bool((real <= proxy + total_variation(mu, other) + 1e-12).all())
    assert float((real - proxy).max()) > 0.1


BAD = [
    (lambda: clean_accuracy([1.0, 0.0], [0.0, 0.0]), "mu: expected vectors other than zero"),
    (lambda: clean_accuracy([1.0, 0.0], [1.0, 0.0], 0.0), "sigma: expected a finite number above 0"),
    (lambda: clean_accuracy([1.0, 0.0], [1.0, 0.0], -1.0), "sigma"),
    (lambda: robust_accuracy([1.0, 0.0], [1.0, 0.0], -0.1), "epsilon: expected a finite number from 0 on"),
    (lambda: robust_accuracy([1.0, 0.0], [1.0, 0.0], math.nan), "epsilon"),
    (lambda: robust_accuracy([1.0, math.inf], [1.0, 0.0], 0.1), "theta: expected finite entries, got '1 that are not"),
    (lambda: clean_accuracy([1.0, 0.0, 0.0], [1.0, 0.0]), "same length d, got (3, 2)"),
    (lambda: clean_accuracy(torch.tensor(1.0), [1.0]), "theta: expected vectors"),
    (lambda: best_robust_theta([0.0, 0.0], 0.1), "mu"),
    (lambda: best_robust_theta([1.0, 0.0], -0.1), "epsilon"),
    (lambda: best_robust_theta([math.nan, 0.0], 0.1), "finite"),
    (lambda: scaled([1.0, 0.0], 0.0), "c: expected a finite number above 0, got 0.0"),
    (lambda: shifted([1.0, 0.0], 0.1, -1.0), "c"),
    (lambda: turned([1.0, 0.0], 10, math.inf), "c"),
    (lambda: orthogonal([1.0], 1.0), "two dimensions"),
    (lambda: mean_at(2, 0, 0.0), "length"),
    (lambda: mean_at(0, 0, 1.0), "dimension"),
    (lambda: World(mean=(0.0, 0.0), synthetic=(1.0, 0.0), epsilon=0.1), "mean"),
    (lambda: World(mean=(1.0, 0.0), synthetic=(1.0,), epsilon=0.1), "synthetic: expected a mean of 2 entries"),
    (lambda: World(mean=(1.0,), synthetic=(math.nan,), epsilon=0.1), "synthetic"),
    (lambda: World(mean=(1.0,), synthetic=(1.0,), epsilon=-0.1), "epsilon"),
    (lambda: World(mean=(1.0,), synthetic=(1.0,), epsilon=0.1, sigma=0.0), "sigma"),
    (lambda: draw_theta(world(mean_at(2, 0, 1.0), mean_at(2, 0, 1.0)), Protocol(), 0, 5, 5), "real: expected a whole"),
    (lambda: draw_theta(world(mean_at(2, 0, 1.0), mean_at(2, 0, 1.0)), Protocol(), 5, 0, 5), "synthetic"),
    (lambda: draw_theta(world(mean_at(2, 0, 1.0), mean_at(2, 0, 1.0)), Protocol(), 5, 5, 0), "trials"),
    (lambda: mean_robustness([0.0, 0.0], [1.0, 0.0]), "theta"),
    (lambda: conditional_wasserstein([1.0, 0.0], [1.0]), "same d"),
    (lambda: total_variation([1.0, 0.0], [1.0, 0.0], 0.0), "sigma"),
    (lambda: pseudo_labelled_theta([0.0, 0.0], [1.0, 0.0]), "inter"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD, ids=range(len(BAD)))
def test_bad_input_is_told(call, words: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value)
