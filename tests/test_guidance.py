"""Contrastive guidance: every loss with every choice of pairs against loops, the authors' scheme to the letter."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from authors import ABAR, authors_run
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import ENCODER, LABELS, NOISE, WORLD, f64, randn, run, seeded

from gambeson.sampling import (
    DDIM,
    Contrastive,
    ContrastiveGuidance,
    Debiased,
    DenoisedFeatures,
    HardNegative,
    Heun,
    InfoNCE,
    InfoNCEPaper,
    NoiseConditionedFeatures,
    NoisyFeatures,
    OtherClasses,
    PreviousStep,
    RealImages,
    RealNegatives,
    RealPositives,
    SupervisedContrastive,
    TimestepWindow,
    Window,
    ddim_sigmas,
    ddim_timesteps,
    karras_sigmas,
)
from gambeson.types import Step

T = 0.5
LOSSES = [
    InfoNCE(temperature=T),
    InfoNCEPaper(temperature=T),
    Debiased(temperature=T, tau_plus=0.2),
    HardNegative(temperature=T, tau_plus=0.2, beta=1.5),
    HardNegative(temperature=T, estimator="easy"),
    SupervisedContrastive(temperature=T),
]
PAIRS = [PreviousStep(), RealPositives(), RealNegatives(count=5), OtherClasses()]
REAL = RealImages(randn(40, 1, 3, 3, seed=11).sigmoid(), torch.arange(40) % 3)


def classless(loss):
    """The loss as it goes with pairs of other classes: without false negatives."""
    return type(loss)(**(vars(loss) | {"tau_plus": 0.0})) if "tau_plus" in vars(loss) else loss


COMBINATIONS = [(classless(o) if isinstance(p, OtherClasses) else o, p) for o, p in product(LOSSES, PAIRS)]


def guide(encode=ENCODER, **options):
    networks = {k: options.pop(k) for k in ("real", "embedding", "learner", "micro_batch") if k in options}
    options = {"strength": 3.0, "window": Window()} | options
    return ContrastiveGuidance(Contrastive(**options), encode, **networks)


class Watch:
    """A guidance that notes (state, step, shift, state after) of every evaluation."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def init(self, block, generator=None):
        return self.inner.init(block, generator)

    def __call__(self, state, step):
        shift, after = self.inner(state, step)
        self.seen.append((state, step, shift, after))
        return shift, after

    @property
    def guided(self):
        return [(step, shift, after) for _, step, shift, after in self.seen if shift is not None]


# --- every loss x pairs x sampler --------------------------------------------------------------------------------


def rows_against(loss, pairs, q, p, reals, labels, a):
    """The negatives of anchor a of (q; p), by the words of CDP appendix C.1."""
    own, b, supervised = a % len(q), len(q), isinstance(loss, SupervisedContrastive)
    differ = supervised or isinstance(pairs, OtherClasses)
    if isinstance(pairs, RealNegatives):
        return [z for z, y in zip(reals.features, reals.labels, strict=True) if not supervised or y != labels[own]]
    one_sided = isinstance(pairs, RealPositives) or isinstance(loss, InfoNCEPaper)
    rows = q if one_sided else p if isinstance(loss, InfoNCE) else torch.cat([q, p])
    return [z for k, z in enumerate(rows) if k % b != own and (not differ or labels[k % b] != labels[own])]


def by_loops(loss, pairs, q, p, reals, labels):
    """The sum of all anchors' losses, one similarity at a time."""
    z, b, total = torch.cat([q, p]), len(q), 0.0
    for a in range(b if isinstance(loss, InfoNCE | InfoNCEPaper) else 2 * b):
        pos = (z[a] @ z[(a + b) % (2 * b)] / T).exp()
        g = [(z[a] @ n / T).exp() for n in rows_against(loss, pairs, q, p, reals, labels, a)]
        if isinstance(loss, SupervisedContrastive):
            alike = [(z[a] @ z[k] / T).exp() for k in range(2 * b) if k != a and labels[k % b] == labels[a % b]]
            total += sum((sum(alike) + sum(g)).log() - s.log() for s in alike) / len(alike)
        elif isinstance(loss, InfoNCEPaper):
            total += (sum(g) / pos).log()
        elif isinstance(loss, InfoNCE) or getattr(loss, "estimator", "") == "easy":
            total += (1 + sum(g) / pos).log()
        else:
            tau, beta, n = loss.tau_plus, getattr(loss, "beta", 0.0), len(g)
            ng = (n * sum(v ** (1 + beta) for v in g) / sum(v**beta for v in g) - tau * n * pos) / (1 - tau)
            total += (1 + ng.clamp_min(n * math.exp(-1 / T)) / pos).log()
    return total


@pytest.mark.parametrize("sampler", [DDIM(), Heun(guide_second=True)], ids=["ddim", "heun"])
@pytest.mark.parametrize(("loss", "pairs"), COMBINATIONS, ids=str)
def test_shift_is_the_gradient(loss, pairs, sampler):
    """shift = -sigma strength grad of the summed losses, for every loss with every choice of pairs."""
    noisy = isinstance(sampler, DDIM)
    view = NoisyFeatures() if noisy else DenoisedFeatures()
    window = Window(sigma_min=0.3, sigma_max=6.0)
    inner = guide(loss=loss, pairs=pairs, features=view, strength=2.0, window=window, real=REAL)
    watch, sigmas = Watch(inner), karras_sigmas(8, 0.05, 20.0)
    inner.check(sigmas, LABELS, shape=(1, 3, 3), batch=6) if noisy else inner.check(sigmas, LABELS)
    run(sampler, sigmas, watch)
    assert len([s for s, *_ in watch.guided if s.stage == 0]) == inner.spec.guided_steps(sigmas)
    for step, shift, after in watch.guided:
        leaf = (step.x / math.sqrt(1 + step.sigma**2) if noisy else step.raw).clone().requires_grad_()
        before = step.previous.x / math.sqrt(1 + step.previous.sigma**2) if noisy else (step.previous.raw + 1) / 2
        reals = after.reals
        if reals is not None:
            reals = type(reals)(F.normalize(reals.features, dim=1), reals.labels)
        q, p = (F.normalize(ENCODER(v), dim=1) for v in (leaf if noisy else (leaf + 1) / 2, before))
        p = (reals.features if isinstance(pairs, RealPositives) else p).detach()
        total = by_loops(loss, pairs, q, p, reals, LABELS)
        expected = -step.sigma * 2.0 * torch.autograd.grad(total, leaf)[0]
        torch.testing.assert_close(shift, expected, rtol=0, atol=1e-10)
        assert expected.abs().max() > 1e-3
    assert all(parameter.grad is None for parameter in ENCODER.parameters())


@pytest.mark.parametrize("top", [6.0, None])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("view", [NoisyFeatures(), DenoisedFeatures(), NoiseConditionedFeatures()], ids=str)
def test_each_image_is_encoded_once_per_guided_evaluation(view, second, top):
    """One more time for the positive from before the window; never at the first step; constant state."""
    calls = []

    def counting(images, *sigma):
        calls.append((len(images), *sigma))
        return ENCODER(images)

    window = Window(sigma_min=0.3, sigma_max=top)
    watch, sigmas = Watch(guide(counting, features=view, window=window)), karras_sigmas(8, 0.05, 20.0)
    run(Heun(guide_second=second), sigmas, watch)
    assert {step.stage for step, *_ in watch.guided} == ({0, 1} if second else {0})
    assert all(window.contains(step.sigma) and step.index > 0 for step, *_ in watch.guided)
    assert len(calls) == len(watch.guided) + 1
    if isinstance(view, NoiseConditionedFeatures):
        first = watch.guided[0][0]
        assert [s for _, s in calls] == [first.previous.sigma, *(step.sigma for step, *_ in watch.guided)]
    assert all(after.seen is None or after.seen.shape == (6, 4) for *_, after in watch.seen)
    assert all(after.reals is None for *_, after in watch.seen)


def test_real_images_of_a_block():
    """Clean, in the view's scale, of the anchor's class, drawn once per block, whatever the sampler's own noise."""
    sigmas = karras_sigmas(6, 0.05, 20.0)
    for view, scale in ((NoisyFeatures(), lambda im: 2 * im - 1), (DenoisedFeatures(), lambda im: im)):
        known = ENCODER(scale(REAL.images)).detach()
        drawn = []
        for block in (3, 3, 4):
            watch = Watch(guide(InfoNCE and ENCODER, pairs=RealPositives(), features=view, real=REAL))
            run(DDIM(eta=1.0), sigmas, watch, block=block)
            reals = watch.guided[0][2].reals
            assert all(after.reals is reals for *_, after in watch.guided)
            which = torch.cdist(reals.features, known).argmin(1)
            torch.testing.assert_close(reals.features, known[which])
            assert REAL.labels[which].tolist() == reals.labels.tolist() == LABELS.tolist()
            drawn.append(which.tolist())
        assert drawn[0] == drawn[1] != drawn[2]
    watch = Watch(guide(pairs=RealNegatives(count=40), features=DenoisedFeatures(), real=REAL))
    run(DDIM(), sigmas, watch, labels=None)
    which = torch.cdist(watch.guided[0][2].reals.features, known).argmin(1)
    assert sorted(which.tolist()) == list(range(40))  # without replacement
    anyone = RealPositives().draw(REAL, 3000, None, seeded())
    assert (anyone.bincount(minlength=40) > 30).all()
    seen = []
    conditioned = guide(
        lambda x, s: seen.append((len(x), s)) or ENCODER(x),
        features=NoiseConditionedFeatures(),
        pairs=RealNegatives(count=7),
        real=REAL,
    )
    run(DDIM(), sigmas, conditioned)
    assert [s for n, s in seen if n == 7] == [0.0]


def test_guidance_leaves_the_samplers_noise_alone():
    """Real images are drawn beside the generator: plain and guided blocks get the same fresh noise."""
    sigmas = karras_sigmas(6, 0.05, 20.0)
    off = guide(pairs=RealNegatives(count=5), real=REAL, strength=0.0)
    assert torch.equal(run(DDIM(eta=1.0), sigmas, off), run(DDIM(eta=1.0), sigmas))


@settings(deadline=None, max_examples=40)
@given(
    order=st.permutations(range(6)),
    choice=st.sampled_from([c for c in COMBINATIONS if not isinstance(c[1], RealPositives)]),
    sigma=st.floats(0.1, 20.0),
)
def test_permuting_the_batch_permutes_the_shift(order, choice, sigma):
    loss, pairs = choice
    guidance, order = guide(loss=loss, pairs=pairs, real=REAL), torch.tensor(order)

    def shift(x, labels):
        first, *_ = DDIM()(WORLD.denoiser, x, torch.tensor([1.5 * sigma, 0.0], dtype=f64), labels=labels)
        raw = WORLD.denoiser(first.x / 1.5, sigma, labels)
        step = Step(index=1, stage=0, x=first.x / 1.5, sigma=sigma, raw=raw, guided=raw, labels=labels, previous=first)
        return guidance(guidance.init(0, seeded()), step)[0]

    torch.testing.assert_close(shift(NOISE[order], LABELS[order]), shift(NOISE, LABELS)[order], rtol=1e-9, atol=1e-10)


# --- the authors' scheme -----------------------------------------------------------------------------------------


def cdp(strength, **options):
    return {"loss": HardNegative(), "window": TimestepWindow(first=400), "strength": strength} | options


def test_the_authors_scheme_on_their_schedule():
    """200 quadratic steps, 58 of 187 guided, lambda as at B = 512: 'paper' to the letter, 'sum' with lambda / 2B."""
    times = ddim_timesteps(200, "quad")
    sigmas, lam = ddim_sigmas(ABAR, times), 97.65625 * 12
    literal, guided = authors_run(NOISE, LABELS, times, lam)
    paper, total = guide(**cdp(lam, strength_convention="paper")), guide(**cdp(lam / 12))
    assert guided == paper.spec.guided_steps(sigmas) == 58
    sampler = DDIM(vp_start=True)
    torch.testing.assert_close(run(sampler, sigmas, paper), literal, rtol=0, atol=1e-9)
    torch.testing.assert_close(run(sampler, sigmas, total), literal, rtol=0, atol=1e-9)
    assert (literal - run(sampler, sigmas)).abs().max() > 1e-2


def test_lambda_100k_at_512_images_is_97_7_per_anchor():
    times, noise, labels = ddim_timesteps(10, "quad"), randn(512, 1, 3, 3, seed=4), torch.arange(512) % 3
    literal, guided = authors_run(noise, labels, times, 100_000.0)
    assert guided == 2
    total = run(DDIM(vp_start=True), ddim_sigmas(ABAR, times), guide(**cdp(100_000 / 1024)), noise, labels)
    torch.testing.assert_close(total, literal, rtol=0, atol=1e-9)


def test_strength_does_not_depend_on_the_batch():
    """With the same real negatives an image's shift is the same alone and among others; the paper's mean shrinks it."""
    sigmas = karras_sigmas(6, 0.05, 20.0)

    def sample(n, convention, loss):
        guidance = guide(
            loss=loss, strength=1.0, strength_convention=convention, pairs=RealNegatives(count=7), real=REAL
        )
        return run(DDIM(), sigmas, guidance, noise=NOISE[:n], labels=None)

    for loss in (InfoNCE(), HardNegative(temperature=1.0)):
        torch.testing.assert_close(sample(1, "sum", loss), sample(6, "sum", loss)[:1], rtol=0, atol=1e-12)
        assert (sample(1, "paper", loss) - sample(6, "paper", loss)[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", [DDIM(), Heun(), Heun(guide_second=True)], ids=["ddim", "heun", "heun second"])
@pytest.mark.parametrize("features", [NoisyFeatures(), DenoisedFeatures()], ids=str)
def test_separation_grows_with_strength(sampler, features):
    """Lower loss and class centres further apart. Noisy features also spread each class, denoised ones less so."""
    labels, noise, sigmas = torch.arange(3).repeat(16), randn(48, 1, 3, 3, seed=2), karras_sigmas(12, 0.01, 20.0)
    plan = {"loss": HardNegative(tau_plus=0.0), "pairs": OtherClasses(), "features": features}

    def measure(strength):
        images = run(sampler, sigmas, guide(**plan, strength=strength) if strength else None, noise, labels)
        z = F.normalize(features.encode(ENCODER, images, 0.0), dim=1).detach()
        centres = torch.stack([z[labels == c].mean(0) for c in range(3)])
        between, within = torch.pdist(centres).mean(), (z - centres[labels]).norm(dim=1).mean()
        return float(HardNegative(tau_plus=0.0)(z, z, None, labels).mean()), float(between), float(between / within)

    plain, guided, strong = measure(0.0), measure(8.0), measure(40.0)
    assert strong[0] < guided[0] < plain[0]
    assert strong[1] > guided[1] > plain[1]
    assert strong[1] > 1.1 * plain[1]
    if isinstance(features, DenoisedFeatures):
        assert strong[2] > guided[2] > plain[2]
