"""Sampling against the mathematics: golden schedules, orders of convergence, literal transcriptions, losses by hand."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gambeson.models.oracle import GaussianMixture
from gambeson.sampling import (
    DDIM,
    ClassifierGuidance,
    ConditionalHardNegative,
    Contrastive,
    ContrastiveGuidance,
    DenoisedFeatures,
    GuidanceSum,
    HardNegative,
    Heun,
    InfoNCE,
    InfoNCEPaper,
    NoisyFeatures,
    NotFiniteError,
    TowardsClass,
    Window,
    alpha_bar_from_sigma,
    cosine_alpha_bar,
    ddim_sigmas,
    ddim_timesteps,
    hard_negative,
    info_nce,
    info_nce_paper,
    karras_sigmas,
    linear_alpha_bar,
    sigma_from_alpha_bar,
)
from gambeson.types import ContrastiveLoss, Denoiser, Guidance, Sampler

f64 = torch.float64
ABAR = linear_alpha_bar()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=f64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def images_world(classes=3, shape=(1, 3, 3)):
    """Three overlapping classes of 1x3x3 images, the last of two components."""
    k = classes + 1
    means = 0.6 * randn(k, *shape, seed=7)
    labels = torch.arange(k).clamp_max(classes - 1)
    return GaussianMixture(
        means=means,
        std=torch.linspace(0.2, 0.35, k, dtype=f64),
        weights=torch.full((k,), 1 / k, dtype=f64),
        classes=labels,
    )


def encoder(width=9, out=4, seed=3):
    """A smooth random two-layer network on images of `width` numbers, float64, whose parameters want gradients."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, out)).double().eval()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(randn(*p.shape, seed=seed + i) / math.sqrt(p.shape[-1]))
    return net


WORLD, ENCODER = images_world(), encoder()
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
NOISE = randn(6, 1, 3, 3, seed=1)


def run(sampler, sigmas, guidance=None, noise=NOISE, labels=LABELS, seed=5, world=WORLD):
    *_, last = sampler(world.denoiser, noise, sigmas, guidance, labels=labels, generator=seeded(seed))
    return last.x


def everywhere(**options):
    options = {"strength": 3.0, "window": Window()} | options
    return ContrastiveGuidance(Contrastive(**options), ENCODER)


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
    window = Window.of_timesteps(ABAR, first=400)
    assert sum(window.contains(s) for s in ddim_sigmas(ABAR, distinct)[1:-1].tolist()) == 58  # CDP's guided steps
    sigmas = ddim_sigmas(ABAR, distinct)
    assert len(sigmas) == 188
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    torch.testing.assert_close(alpha_bar_from_sigma(sigmas[:-1].flip(0)), ABAR[distinct], rtol=1e-12, atol=0)


def test_window_of_timesteps():
    sigma = sigma_from_alpha_bar(cosine_alpha_bar()).tolist()
    window = Window.of_timesteps(cosine_alpha_bar(), first=51, last=149)
    assert [t for t, s in enumerate(sigma) if window.contains(s)] == list(range(51, 150))
    assert Window.of_timesteps(ABAR, first=0) == Window()


# --- the oracle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_tweedie(sigma, labels):
    x = (WORLD.sample(6, seeded())[0] + sigma * NOISE).requires_grad_()
    score = torch.autograd.grad(WORLD.log_density(x, sigma, labels).sum(), x)[0]
    torch.testing.assert_close(WORLD.score(x, sigma, labels), score)
    torch.testing.assert_close(WORLD.denoiser(x, sigma, labels), x + sigma**2 * score)


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


@pytest.mark.parametrize(("sampler", "order", "n"), [(DDIM(), 1, 128), (Heun(), 2, 64)])
def test_order_of_convergence(sampler, order, n):
    def solve(steps, method=sampler):
        return run(method, karras_sigmas(steps, 0.02, 20.0))

    truth = solve(1024, Heun())
    coarse, fine = ((solve(k) - truth).norm() for k in (n, 2 * n))
    assert float(torch.log2(coarse / fine)) == pytest.approx(order, abs=0.2)


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


def vp_ddim(noise, times, eta, lam, generator, window=lambda t: True, reduce=torch.sum):
    """CDP eq. 4 / Algorithm 1, word for word, in VP coordinates; with eta as in Song et al. 2021, eq. 16."""
    x, before, grads = noise, None, 0
    a = {-1: torch.tensor(1.0, dtype=f64)} | {int(t): ABAR[t] for t in times}
    for t, s in pairwise([*times.flip(0).tolist(), -1]):
        x0 = WORLD.denoiser(x / a[t].sqrt(), float(((1 - a[t]) / a[t]).sqrt()), LABELS)
        eps = (x - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
        if lam and before is not None and window(t):
            leaf = x.clone().requires_grad_()
            z, zp = F.normalize(ENCODER(leaf), dim=1), F.normalize(ENCODER(before), dim=1).detach()
            loss = hard_negative(z, zp, temperature=10.0, tau_plus=0.1, beta=1.0)
            eps = eps + lam * torch.autograd.grad(reduce(loss), leaf)[0]
            grads += 1
        spread = eta * ((1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s])).sqrt()
        x0, before = (x - (1 - a[t]).sqrt() * eps) / a[t].sqrt(), x
        x = a[s].sqrt() * x0 + (1 - a[s] - spread**2).sqrt() * eps
        if spread > 0:
            x = x + spread * torch.randn(x.shape, generator=generator, dtype=f64)
    return x, grads


@pytest.mark.parametrize("convention", ["sum", "paper"])
@pytest.mark.parametrize(("eta", "strength"), [(0.0, 0.0), (1.0, 0.0), (0.0, 3.0), (1.0, 3.0), (0.5, 3.0)])
def test_ddim_is_the_papers_algorithm_1(eta, strength, convention):
    times = ddim_timesteps(12, "quad")
    reduce = torch.sum if convention == "sum" else torch.mean
    literal, guided = vp_ddim(NOISE, times, eta, strength, seeded(5), lambda t: t >= 150, reduce)
    guidance = everywhere(
        loss=HardNegative(),
        strength=strength,
        strength_convention=convention,
        window=Window.of_timesteps(ABAR, first=150),
    )
    ours = run(DDIM(eta=eta, vp_start=True), ddim_sigmas(ABAR, times), guidance)
    torch.testing.assert_close(ours, literal, rtol=0, atol=1e-9)
    assert guided == (strength > 0) * int((times[:-1] >= 150).sum())
    if strength:
        assert (literal - vp_ddim(NOISE, times, eta, 0.0, seeded(5))[0]).abs().max() > 1e-3


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


def test_network_calls_and_steps():
    calls = []

    def counting(x, sigma, labels=None):
        calls.append(sigma)
        return WORLD.denoiser(x, sigma, labels)

    steps = list(Heun()(counting, NOISE, karras_sigmas(18), labels=LABELS))
    assert (len(calls), len(steps)) == (35, 19)
    assert [s.sigma for s in steps] == pytest.approx(karras_sigmas(18).tolist())
    assert [s.index for s in steps] == list(range(19))
    assert steps[0].previous is None
    assert all(s.previous is not None and s.previous.previous is None for s in steps[1:])  # memory stays constant
    assert all(torch.equal(s.previous.x, before.x) for before, s in pairwise(steps))
    assert torch.equal(steps[3].raw, steps[3].guided)


def test_single_precision_start_and_clamp():
    sigmas = ddim_sigmas(cosine_alpha_bar(), ddim_timesteps(20))
    single = run(DDIM(vp_start=True), sigmas, noise=NOISE.float())
    assert single.dtype == torch.float32
    seen = []
    list(DDIM()(lambda x, *_: seen.append(x.dtype) or x, NOISE.float(), sigmas))
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(single.double(), run(DDIM(vp_start=True), sigmas), rtol=0, atol=1e-3)
    first, *_ = DDIM(vp_start=True)(WORLD.denoiser, NOISE, sigmas)
    torch.testing.assert_close(first.x, (1 + sigmas[0] ** 2).sqrt() * NOISE)
    *_, last = DDIM(clip=0.1)(WORLD.denoiser, NOISE, karras_sigmas(5), everywhere(), labels=LABELS)
    assert float(last.x.abs().max()) == pytest.approx(0.1)


# --- losses ------------------------------------------------------------------------------------------------------


def golden_rows():
    i, j = torch.arange(4.0, dtype=f64)[:, None], torch.arange(3.0, dtype=f64)
    return F.normalize(torch.sin(1 + 3 * i + j), dim=1), F.normalize(torch.cos(1 + 3 * i + j), dim=1)


def test_golden_losses():
    a, b = golden_rows()
    numbers = {"temperature": 10.0, "tau_plus": 0.1, "beta": 1.0}
    assert float(hard_negative(a, b, **numbers).mean()) == pytest.approx(1.939642250197, abs=1e-9)
    assert float(hard_negative(a, b, **numbers, estimator="easy").mean()) == pytest.approx(1.936178630267, abs=1e-9)
    assert float(info_nce(a, b, temperature=0.1).mean()) == pytest.approx(3.192429932442, abs=1e-9)


def test_info_nce_by_hand():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=f64)
    p = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=f64)
    # q p^T = [[1, .6], [0, .8]]
    hand = [math.log(1 + math.exp(-0.4)), math.log(1 + math.exp(-0.8))]
    assert info_nce(q, p, temperature=1.0).tolist() == pytest.approx(hand, abs=1e-12)
    # the paper's form: q q^T is 0 off the diagonal, so log(e^0) - q.p
    assert info_nce_paper(q, p, temperature=1.0).tolist() == pytest.approx([-1.0, -0.8], abs=1e-12)
    n = torch.tensor([[0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]], dtype=f64)
    hand = [math.log(1 + (2 + math.exp(-1)) / math.e), math.log(1 + (2 * math.e + 1) / math.exp(0.8))]
    assert info_nce(q, p, n, temperature=1.0).tolist() == pytest.approx(hand, abs=1e-12)
    hand = [math.log(2 + math.exp(-1)) - 1, math.log(2 * math.e + 1) - 0.8]
    assert InfoNCEPaper(temperature=1.0)(q, p, n).tolist() == pytest.approx(hand, abs=1e-12)


def test_conditional_hard_negative_by_hand():
    """Five anchors, classes of 3 and 2, images of a class alike: 4 negatives for the three, 6 for the two."""
    labels = torch.tensor([0, 1, 0, 0, 1])
    z = F.one_hot(labels, 2).double()
    three, two = math.log(1 + 4 / math.e), math.log(1 + 6 / math.e)  # similarity 1 to the partner, 0 to the others
    hand = [two if label else three for label in labels.tolist()] * 2
    loss = hard_negative(z, z, temperature=1.0, tau_plus=0.0, beta=1.0, labels=labels)
    assert loss.tolist() == pytest.approx(hand, abs=1e-12)
    # one row twice as long breaks the tie: anchor 0 (2, 0) against 1 = (0, 1), 4 = (1, 1): g = 1, 1, e^2, e^2
    z = torch.tensor([[2.0, 0], [0, 1], [1, 0], [1, 0], [1, 1]], dtype=f64)
    g, n = torch.tensor([0.0, 0, 2, 2], dtype=f64).exp(), 4
    ng = float((g * g).sum() / g.mean())
    loss = hard_negative(z, z, temperature=1.0, tau_plus=0.0, beta=1.0, labels=labels)
    assert float(loss[0]) == pytest.approx(math.log(1 + ng / math.exp(4)), abs=1e-12)
    assert ng > n * math.exp(-1)


def plain_hard_negative(z1, z2, t, tau, beta, labels=None, floor=True):
    """METHOD 1.2 in plain loops, without logs."""
    z, b, out = torch.cat([z1, z2]), len(z1), []
    for a in range(2 * b):
        others = [k for k in range(2 * b) if k % b != a % b and (labels is None or labels[k % b] != labels[a % b])]
        pos = math.exp(float(z[a] @ z[(a + b) % (2 * b)]) / t)
        g = [math.exp(float(z[a] @ z[k]) / t) for k in others]
        n, weights = len(g), [v**beta for v in g]
        ng = (sum(w * v for w, v in zip(weights, g, strict=True)) / (sum(weights) / n) - tau * n * pos) / (1 - tau)
        out.append(-math.log(pos / (pos + max(ng, n * math.exp(-1 / t) if floor else 0.0))))
    return out


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(("t", "tau"), [(10.0, 0.1), (0.5, 0.0), (0.5, 0.3), (0.3, 0.9)])
def test_hard_negative_is_its_formula(t, tau, beta):
    z1 = F.normalize(randn(5, 3, seed=1), dim=1)
    z2 = F.normalize(torch.linspace(-1, 1, 5, dtype=f64)[:, None] * z1 + 0.5 * randn(5, 3, seed=2), dim=1)
    ours = hard_negative(z1, z2, temperature=t, tau_plus=tau, beta=beta)
    assert ours.tolist() == pytest.approx(plain_hard_negative(z1, z2, t, tau, beta), abs=1e-12)
    if tau == 0.9:  # some anchors sit on the floor, some do not
        free = plain_hard_negative(z1, z2, t, tau, beta, floor=False)
        assert 0 < sum(abs(f - o) > 1e-9 for f, o in zip(free, ours.tolist(), strict=True)) < 10
    if tau == 0:
        labels = torch.tensor([0, 0, 1, 0, 1])
        ours = ConditionalHardNegative(temperature=t, beta=beta)(z1, z2, labels=labels)
        assert ours.tolist() == pytest.approx(plain_hard_negative(z1, z2, t, tau, beta, labels), abs=1e-12)


def test_hard_negative_with_given_negatives():
    z = torch.tensor([[1.0, 0.0]], dtype=f64)
    n = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=f64)  # g = 1, e -> Ng = 2 (1 + e^2) / (1 + e)
    ng = 2 * (1 + math.e**2) / (1 + math.e)
    loss = HardNegative(temperature=1.0, tau_plus=0.0, beta=1.0)(z, z, n)
    assert loss.tolist() == pytest.approx([math.log(1 + ng / math.e)] * 2, abs=1e-12)


@pytest.mark.parametrize("batch", [8, 6000])
@pytest.mark.parametrize("temperature", [10.0, 0.01])
def test_losses_and_gradients_stay_finite(batch, temperature):
    """The authors' clamp of the ratio at 1e-4 kills every gradient from about 5,000 images on; logs do not."""
    z1 = F.normalize(randn(batch, 3, dtype=torch.float32), dim=1).requires_grad_()
    z2 = F.normalize(z1.detach() + 0.1, dim=1)
    rows = slice(0, 500) if batch > 500 else slice(None)  # a strip of the big batch: negatives for 500 anchors
    loss = HardNegative(temperature=temperature)(z1[rows], z2[rows], torch.cat([z1, z2]) if batch > 500 else None)
    gradient = torch.autograd.grad(loss.sum(), z1)[0][rows]
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    if temperature == 10:  # at .01 these pairs are long since solved
        assert (gradient.abs().sum(1) > 0).all()


# --- guidance ----------------------------------------------------------------------------------------------------

PARTS = [
    (InfoNCE(temperature=0.5), NoisyFeatures()),
    (InfoNCEPaper(temperature=0.5), NoisyFeatures()),
    (HardNegative(), DenoisedFeatures()),
    (ConditionalHardNegative(), NoisyFeatures()),
    (ConditionalHardNegative(), DenoisedFeatures()),
]


@pytest.mark.parametrize("top", [6.0, math.inf])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("loss", "features"), PARTS)
def test_shift_of_every_evaluation(loss, features, second, top):
    """shift = -sigma strength grad, encoding each image once, in the coordinate that METHOD 1.3 names."""
    encoded, seen = [], []

    def counting(images):
        encoded.append(images.detach())
        return ENCODER(images)

    class Watch(ContrastiveGuidance):
        def __call__(self, state, step):
            shift, state = super().__call__(state, step)
            seen.append((step, shift))
            return shift, state

    window = Window(sigma_min=0.3, sigma_max=top)
    guidance = Watch(Contrastive(loss=loss, features=features, strength=2.0, window=window), counting)
    sigmas = karras_sigmas(8, 0.05, 20.0)
    run(Heun(guide_second=second), sigmas, guidance)
    guided = [(step, shift) for step, shift in seen if shift is not None]
    assert {step.stage for step, _ in guided} == ({0, 1} if second else {0})
    assert all(window.contains(step.sigma) and step.index > 0 for step, _ in guided)  # never the first step
    if not second:
        assert len(guided) == sum(window.contains(s) for s in sigmas[1:-1].tolist())
    assert len(encoded) == len(guided) + 1  # one more for the positive from before the window
    for step, shift in guided:
        noisy = isinstance(features, NoisyFeatures)
        scale = math.sqrt(1 + step.sigma**2)
        leaf = (step.x / scale if noisy else step.raw).clone().requires_grad_()
        old = step.previous.x / math.sqrt(1 + step.previous.sigma**2) if noisy else (step.previous.raw + 1) / 2
        z = F.normalize(ENCODER(leaf if noisy else (leaf + 1) / 2), dim=1)
        losses = loss(z, F.normalize(ENCODER(old), dim=1).detach(), None, LABELS)
        torch.testing.assert_close(shift, -step.sigma * 2.0 * torch.autograd.grad(losses.sum(), leaf)[0])
    assert all(p.grad is None for p in ENCODER.parameters())


def test_strength_does_not_depend_on_the_batch():
    """With the negatives given, an image's shift is the same alone and among others; the paper's mean shrinks it."""
    negatives = F.normalize(randn(7, 4, seed=9), dim=1)
    sigmas = karras_sigmas(6, 0.05, 20.0)

    def sample(n, convention):
        spec = Contrastive(loss=InfoNCE(), strength=1.0, window=Window(), strength_convention=convention)
        return run(DDIM(), sigmas, ContrastiveGuidance(spec, ENCODER, negatives), noise=NOISE[:n], labels=None)

    torch.testing.assert_close(sample(1, "sum"), sample(6, "sum")[:1], rtol=0, atol=1e-12)
    torch.testing.assert_close(sample(1, "paper"), sample(1, "sum"), rtol=0, atol=1e-12)
    assert (sample(1, "paper") - sample(6, "paper")[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", [DDIM(), Heun(), Heun(guide_second=True)])
@pytest.mark.parametrize("features", [NoisyFeatures(), DenoisedFeatures()])
def test_guidance_separates_the_classes(sampler, features):
    """Lower loss and class centres further apart. Noisy features also spread each class, denoised ones less so."""
    labels, noise, sigmas = torch.arange(3).repeat(16), randn(48, 1, 3, 3, seed=2), karras_sigmas(12, 0.01, 20.0)

    def measure(strength):
        guidance = everywhere(strength=strength, features=features) if strength else None
        z = F.normalize(ENCODER(features.image(run(sampler, sigmas, guidance, noise, labels))), dim=1).detach()
        centres = torch.stack([z[labels == c].mean(0) for c in range(3)])
        between, within = torch.pdist(centres).mean(), (z - centres[labels]).norm(dim=1).mean()
        return float(ConditionalHardNegative()(z, z, None, labels).mean()), float(between), float(between / within)

    plain, guided, strong = measure(0.0), measure(8.0), measure(40.0)
    assert strong[0] < guided[0] < plain[0]
    assert strong[1] > guided[1] > plain[1]
    assert strong[1] > 1.1 * plain[1]
    if isinstance(features, DenoisedFeatures):
        assert strong[2] > guided[2] > plain[2]


def test_classifier_guidance_is_exact_for_gaussian_data():
    """One Gaussian, x0-hat linear in x: the shift is sigma^2 grad_x log p(label | x0-hat(x)), nothing dropped."""
    s, sigma = 0.5, 1.7
    world = GaussianMixture(
        means=torch.zeros(1, 1, 3, 3, dtype=f64),
        std=torch.tensor([s], dtype=f64),
        weights=torch.ones(1, dtype=f64),
        classes=torch.zeros(1, dtype=torch.int64),
    )
    guidance = ClassifierGuidance(TowardsClass(strength=1.5), ENCODER)
    first, *_ = DDIM()(world.denoiser, NOISE, torch.tensor([sigma, 0.0], dtype=f64))
    x = first.x.clone().requires_grad_()
    log_p = ENCODER((world.denoiser(x, sigma) + 1) / 2).log_softmax(1)[torch.arange(6), LABELS].sum()
    exact = 1.5 * sigma**2 * torch.autograd.grad(log_p, x)[0]
    step = next(
        iter(DDIM()(lambda x, s, labels=None: world.denoiser(x, s), NOISE, torch.tensor([sigma, 0.0]), labels=LABELS))
    )
    torch.testing.assert_close(guidance(None, step)[0], exact, rtol=1e-6, atol=1e-9)
    both = GuidanceSum(guidance, everywhere(), guidance)
    shift, _ = both(both.init(0), step)
    torch.testing.assert_close(shift, 2 * exact, rtol=1e-6, atol=1e-9)
    assert ClassifierGuidance(TowardsClass(window=Window(sigma_min=5.0)), ENCODER)(None, step)[0] is None


@pytest.mark.parametrize("sampler", [DDIM(eta=1.0), Heun(churn=10.0, guide_second=True)])
def test_a_block_is_the_same_twice_and_the_global_stream_is_untouched(sampler):
    guidance, sigmas = everywhere(), karras_sigmas(8, 0.05, 20.0)
    torch.manual_seed(0)
    before = torch.get_rng_state()

    def sample():
        return [s.x for s in sampler(WORLD.denoiser, NOISE, sigmas, guidance, labels=LABELS, block=3)]

    first = sample()
    WORLD.sample(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, sample(), strict=True))
    assert torch.is_grad_enabled()
    assert not torch.equal(first[-1], run(sampler, sigmas, guidance, seed=6))


def test_protocols():
    assert isinstance(WORLD.denoiser, Denoiser)
    assert isinstance(Heun(), Sampler)
    assert isinstance(everywhere(), Guidance)
    assert isinstance(GuidanceSum(), Guidance)
    assert all(isinstance(loss, ContrastiveLoss) for loss, _ in PARTS)
    assert eval(repr(Contrastive()), globals() | {"inf": math.inf}) == Contrastive()  # its repr is its record


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_broken_network_is_named():
    def broken(x, sigma, labels=None):
        return torch.where(torch.arange(len(x))[:, None, None, None] == 4, math.nan if sigma < 1 else 0.0, x)

    with pytest.raises(NotFiniteError, match=r"step 3 .*block 11.*1 of 6 images, the first is 4"):
        list(DDIM()(broken, NOISE, torch.tensor([9.0, 5.0, 2.0, 0.5, 0.0]), block=11))
    bad = ContrastiveGuidance(Contrastive(window=Window()), lambda x: x.flatten(1) * math.nan)
    with pytest.raises(NotFiniteError, match="the guidance at step 1"):
        run(DDIM(), karras_sigmas(4), bad)
    with pytest.raises(ValueError, match="expected the shape of x"):
        list(DDIM()(lambda x, sigma, labels=None: x.repeat(1, 2, 1, 1), NOISE, karras_sigmas(4)))


@pytest.mark.parametrize(
    "sigmas", [[1.0, 0.5], [0.0], [0.5, 1.0, 0.0], [1.0, 1.0, 0.0], [math.nan, 1.0, 0.0], []], ids=str
)
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match="strictly decreasing"):
        DDIM()(WORLD.denoiser, NOISE, torch.tensor(sigmas))  # at the call, not at the first step


Z = F.normalize(randn(4, 3), dim=1)
ONE = torch.zeros(4, dtype=torch.int64)
HNM = {"temperature": 1.0, "tau_plus": 0.1, "beta": 1.0}


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
        (lambda: DDIM(eta=2.0), "eta"),
        (lambda: DDIM(clip=0.0), "clip"),
        (lambda: Heun(churn=-1.0), "churn"),
        (lambda: DDIM()(WORLD.denoiser, NOISE, karras_sigmas(4), labels=LABELS[:5]), "one class per row"),
        (lambda: DDIM()(WORLD.denoiser, NOISE * math.inf, karras_sigmas(4)), "finite"),
        (lambda: info_nce(Z[:1], Z[:1], temperature=1.0), "at least 2 images"),
        (lambda: info_nce_paper(Z[:1], Z[:1], temperature=1.0), "at least 2 images"),
        (lambda: hard_negative(Z[:1], Z[:1], **HNM), "at least 2 images"),
        (lambda: info_nce(Z, Z, temperature=0.0), "temperature > 0"),
        (lambda: hard_negative(Z, Z, **HNM, labels=torch.arange(4)), "tau_plus=0"),
        (lambda: hard_negative(Z, Z, **(HNM | {"tau_plus": 1.0})), "tau_plus < 1"),
        (lambda: ConditionalHardNegative()(Z, Z, labels=ONE), "at least 2 classes"),
        (lambda: ConditionalHardNegative()(Z, Z), "expected labels"),
        (lambda: ConditionalHardNegative()(Z, Z, Z, torch.arange(4)), "no negatives"),
        (lambda: HardNegative(beta=-1.0), "beta >= 0"),
        (lambda: Window(sigma_min=2.0, sigma_max=1.0), "sigma_min <= sigma_max"),
        (lambda: Window.of_timesteps(ABAR, first=1000), "<= 999"),
        (lambda: Contrastive(strength=math.nan), "finite"),
        (lambda: ContrastiveGuidance(Contrastive(), nn.Linear(3, 3)), "eval"),
        (lambda: everywhere(window=Window(sigma_min=90.0)).check(karras_sigmas(9)), "at least one guided step"),
        (lambda: everywhere(window=Window(sigma_min=60.0)).check(karras_sigmas(9)), "at least one guided step"),
        (lambda: everywhere().check(karras_sigmas(9), ONE), "at least 2 classes"),
        (lambda: everywhere(loss=InfoNCE()).check(karras_sigmas(9), batch=1), "at least 2 images"),
        (
            lambda: next(DDIM()(WORLD.denoiser, NOISE, karras_sigmas(4), everywhere(window=Window(sigma_max=0.1)))),
            "labels",
        ),
        (lambda: ClassifierGuidance(TowardsClass(), ENCODER).check(karras_sigmas(4)), "labels"),
        (lambda: images_world().__class__(means=Z, std=Z[:, 0], weights=Z[:, 1], classes=ONE), "sum to 1"),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_check_lets_good_plans_pass():
    everywhere().check(karras_sigmas(9), LABELS)
    everywhere(loss=InfoNCE()).check(karras_sigmas(9), batch=2)
    real = ContrastiveGuidance(Contrastive(loss=InfoNCE(), window=Window()), ENCODER, Z)
    real.check(karras_sigmas(9), batch=1)
