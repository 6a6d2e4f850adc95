"""Schedules against golden numbers, the exact world, and samplers against EDM's algorithm and the world's own law."""

import math

import pytest
import torch
from worlds import LABELS, NOISE, WORLD, f64, randn, run, seeded

from gambeson.models.oracle import GaussianMixture
from gambeson.sampling import (
    DDIM,
    Heun,
    alpha_bar_from_sigma,
    cosine_alpha_bar,
    ddim_sigmas,
    ddim_timesteps,
    karras_sigmas,
    linear_alpha_bar,
    sigma_from_alpha_bar,
)
from gambeson.types import Denoiser, Sampler

ABAR = linear_alpha_bar()


# --- schedules ---------------------------------------------------------------------------------------------------


def test_karras_sigmas_are_edms():
    edm = [80.0, 57.58598472124816, 40.78557379650796, 28.374584604156844, 19.35245298032523, 12.91008238075732]
    tail = [0.05994731123547159, 0.022934518372333384, 0.0075280199627840785, 0.002, 0.0]
    sigmas = karras_sigmas(18)
    assert sigmas.dtype == f64
    assert len(sigmas) == 19
    torch.testing.assert_close(
        torch.cat([sigmas[:6], sigmas[-5:]]), torch.tensor(edm + tail, dtype=f64), rtol=1e-13, atol=0
    )
    assert karras_sigmas(1).tolist() == pytest.approx([80, 0])


def test_alpha_bar_tables():
    linear, cosine = linear_alpha_bar(), cosine_alpha_bar()
    expected = {0: 0.9999, 400: 0.19357200966664662, 999: 4.035829765375676e-05}
    assert {t: float(linear[t]) for t in expected} == pytest.approx(expected, rel=1e-12)
    assert float(cosine[0]) == pytest.approx(0.999958715775178, rel=1e-12)
    assert float(cosine[500]) == pytest.approx(0.49228517244880304, rel=1e-12)
    assert float(1 - cosine[999] / cosine[998]) == pytest.approx(0.999)
    assert 1e4 < float(sigma_from_alpha_bar(cosine)[-1]) < 4e4
    torch.testing.assert_close(alpha_bar_from_sigma(sigma_from_alpha_bar(cosine)), cosine, rtol=1e-12, atol=0)


def test_ddim_timesteps():
    assert ddim_timesteps(10).tolist() == list(range(0, 1000, 100))
    assert ddim_timesteps(10, "quad").tolist() == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    every, distinct = ddim_timesteps(200, "quad", drop_repeats=False), ddim_timesteps(200, "quad")
    assert (len(every), int((every == 0).sum()), len(distinct)) == (200, 8, 187)
    sigmas = ddim_sigmas(ABAR, distinct)
    assert len(sigmas) == 188
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    torch.testing.assert_close(alpha_bar_from_sigma(sigmas[:-1].flip(0)), ABAR[distinct], rtol=1e-12, atol=0)


# --- the oracle --------------------------------------------------------------------------------------------------


def test_oracle_density_sums_to_one_and_samples_follow_it():
    line = GaussianMixture(
        means=torch.tensor([[-1.0], [2.0]], dtype=f64),
        std=torch.tensor([0.5, 0.2], dtype=f64),
        weights=torch.tensor([0.3, 0.7], dtype=f64),
        classes=torch.tensor([4, 9]),
    )
    grid = torch.linspace(-8, 8, 4001, dtype=f64)[:, None]
    for labels in (None, torch.full((4001,), 9)):
        assert float(line.log_density(grid, 0.3, labels).exp().sum() * 16 / 4000) == pytest.approx(1, abs=1e-6)
    x, labels = line.sample(20000)
    assert float((labels == 9).double().mean()) == pytest.approx(0.7, abs=0.015)
    assert float(x[labels == 4].mean()) == pytest.approx(-1, abs=0.03)
    assert float(x[labels == 4].std()) == pytest.approx(0.5, abs=0.02)
    per_image = torch.tensor([0.1, 3.0], dtype=f64)
    torch.testing.assert_close(line.denoiser(x[:2], per_image)[1:], line.denoiser(x[1:2], 3.0))
    with pytest.raises(ValueError, match=r"classes of \[4, 9\]"):
        line.denoiser(x[:1], 1.0, torch.tensor([3]))


# --- samplers ----------------------------------------------------------------------------------------------------


def test_samples_follow_the_world():
    line = GaussianMixture(
        means=torch.tensor([[-0.6], [0.4]], dtype=f64),
        std=torch.tensor([0.1, 0.2], dtype=f64),
        weights=torch.tensor([0.5, 0.5], dtype=f64),
        classes=torch.tensor([0, 1]),
    )
    noise, true = randn(4000, 1), line.sample(4000)[0].sort(0).values
    for sampler in (Heun(), Heun(churn=20.0), DDIM(eta=1.0), DDIM(eta=0.5)):
        x = run(sampler, karras_sigmas(60, 0.005, 20.0), noise=noise, labels=None, world=line).sort(0).values
        assert float((x - true).abs().mean()) < 0.03  # Wasserstein distance of the samples


def edm_algorithm_2(noise, t, churn, s_min, s_max, s_noise, generator):
    """Karras et al. 2022, Algorithm 2, line by line."""
    x = t[0] * noise
    for i in range(len(t) - 1):
        gamma = min(churn / (len(t) - 1), 2**0.5 - 1) if s_min <= t[i] <= s_max else 0.0
        eps = s_noise * torch.randn(x.shape, generator=generator, dtype=f64) if gamma > 0 else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + (t_hat**2 - t[i] ** 2) ** 0.5 * eps
        d = (x_hat - WORLD.denoiser(x_hat, t_hat, LABELS)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - WORLD.denoiser(x, t[i + 1], LABELS)) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
    return x


@pytest.mark.parametrize("churn", [(0.0, 0.0, math.inf, 1.0), (4.0, 0.05, 10.0, 1.007), (40.0, 0.0, 50.0, 1.0)])
def test_heun_is_edms_algorithm_2(churn):
    names = ("churn", "s_min", "s_max", "s_noise")
    sigmas = karras_sigmas(12)
    literal = edm_algorithm_2(NOISE, sigmas.tolist(), *churn, seeded(5))
    torch.testing.assert_close(run(Heun(**dict(zip(names, churn, strict=True))), sigmas), literal, rtol=0, atol=1e-9)


# --- errors ------------------------------------------------------------------------------------------------------


def test_protocols():
    assert isinstance(WORLD.denoiser, Denoiser)
    assert isinstance(Heun(), Sampler)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: karras_sigmas(0), "at least 1"),
        (lambda: karras_sigmas(4, 2.0, 1.0), "sigma_min < sigma_max"),
        (lambda: linear_alpha_bar(end=2.0), r"betas in \(0, 1\)"),
        (lambda: cosine_alpha_bar(0), "at least 1"),
        (lambda: ddim_timesteps(2000), "n <= steps"),
        (lambda: ddim_sigmas(ABAR, ddim_timesteps(200, "quad", drop_repeats=False)), "drop_repeats"),
        (lambda: ddim_sigmas(ABAR, torch.tensor([5, 1000])), r"0\.\.999"),
        (lambda: sigma_from_alpha_bar(torch.zeros(1, dtype=f64)), "cumprod"),
        (lambda: alpha_bar_from_sigma(-torch.ones(1, dtype=f64)), "at least 0"),
        (
            lambda: GaussianMixture(
                means=randn(2, 3), std=randn(2).abs(), weights=randn(2), classes=torch.zeros(2, dtype=torch.int64)
            ),
            "sum to 1",
        ),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()
