"""Guidance in its parts: windows, strength along sigma, clipping, micro-batches, classifier guidance, early errors."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from worlds import ENCODER, LABELS, NOISE, WORLD, encoder, f64, randn, run, seeded

from gambeson.canonical import digest
from gambeson.models.oracle import GaussianMixture
from gambeson.sampling import (
    DDIM,
    ClassifierGuidance,
    ConstantStrength,
    Contrastive,
    ContrastiveGuidance,
    Debiased,
    DenoisedFeatures,
    GuidanceSum,
    HardNegative,
    Heun,
    InfoNCE,
    LinearStrength,
    NoiseConditionedFeatures,
    NoisyFeatures,
    NotFiniteError,
    OtherClasses,
    PowerStrength,
    PreviousStep,
    RealImages,
    RealNegatives,
    RealPositives,
    SupervisedContrastive,
    TimestepWindow,
    TowardsClass,
    Window,
    cosine_alpha_bar,
    ddim_sigmas,
    ddim_timesteps,
    karras_sigmas,
    linear_alpha_bar,
    sigma_from_alpha_bar,
)
from gambeson.sampling.features import FeatureView
from gambeson.sampling.guidance import CheckedGuidance
from gambeson.sampling.pairs import Pairs
from gambeson.types import Guidance

SIGMAS = karras_sigmas(8, 0.05, 20.0)
REAL = RealImages(randn(12, 1, 3, 3, seed=11).sigmoid(), torch.arange(12) % 3)
ABAR = linear_alpha_bar()


def guide(encode=ENCODER, **options):
    networks = {k: options.pop(k) for k in ("real", "micro_batch") if k in options}
    return ContrastiveGuidance(Contrastive(**({"strength": 3.0, "window": Window()} | options)), encode, **networks)


def one_shift(guidance, index=3):
    """The shift of one step of an unguided walk."""
    steps = list(DDIM()(WORLD.denoiser, NOISE, SIGMAS, labels=LABELS))
    return guidance(guidance.init(0, seeded()), steps[index])[0]


# --- windows and strength ----------------------------------------------------------------------------------------


def test_windows():
    sigma = sigma_from_alpha_bar(cosine_alpha_bar()).tolist()
    window = Window.of_timesteps(cosine_alpha_bar(), first=51, last=149)
    signs = TimestepWindow(first=51, last=149, schedule="cosine")
    assert signs.in_sigma() == window
    assert [t for t, s in enumerate(sigma) if signs.contains(s)] == list(range(51, 150))
    assert Window.of_timesteps(ABAR, first=0) == Window() == TimestepWindow(first=0).in_sigma()
    assert TimestepWindow(first=3, table_steps=10, beta_end=0.5).in_sigma() == Window.of_timesteps(
        linear_alpha_bar(10, 1e-4, 0.5), 3
    )
    sigmas = ddim_sigmas(ABAR, ddim_timesteps(200, "quad"))
    assert Contrastive(window=TimestepWindow()).guided_steps(sigmas) == 58  # CDP's, of 187
    assert Contrastive().guided_steps(sigmas) == 58
    assert TowardsClass(window=TimestepWindow()).guided_steps(sigmas) == 59  # this one acts at the first step too


@pytest.mark.parametrize(
    ("profile", "hand"),
    [
        (ConstantStrength(), {0.5: 1.0, 7.0: 1.0}),
        (PowerStrength(exponent=2.0, reference=5.0), {5.0: 1.0, 10.0: 4.0, 2.5: 0.25}),
        (PowerStrength(exponent=-1.0), {4.0: 0.25}),
        # half way from 0.1 to 10 in log sigma is 1
        (LinearStrength(low=3.0, high=1.0, sigma_min=0.1, sigma_max=10.0), {0.01: 3.0, 0.1: 3.0, 1.0: 2.0, 80.0: 1.0}),
    ],
    ids=str,
)
def test_strength_along_sigma(profile, hand):
    assert {s: profile.factor(s) for s in hand} == pytest.approx(hand)
    sigma = float(SIGMAS[3])
    shaped, flat = (one_shift(guide(strength_profile=p)) for p in (profile, ConstantStrength()))
    torch.testing.assert_close(shaped, profile.factor(sigma) * flat)
    shaped, flat = (
        one_shift(ClassifierGuidance(TowardsClass(strength_profile=p), ENCODER)) for p in (profile, ConstantStrength())
    )
    torch.testing.assert_close(shaped, profile.factor(sigma) * flat)


def test_clipping_bounds_the_change_of_eps_and_is_counted():
    steps = list(DDIM()(WORLD.denoiser, NOISE, SIGMAS, labels=LABELS))
    step = steps[3]
    eps = (step.x - step.raw) / step.sigma
    free = guide(strength=40.0)
    shift = free(free.init(0), step)[0]
    ratio = (shift / step.sigma).flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1)  # of eps' to eps
    assert free.tally == {"guided": 6, "clipped": 0, "largest_ratio": pytest.approx(float(ratio.max()))}
    bound = float(ratio.sort().values[2:4].mean())  # three images above, three below
    clipped = guide(strength=40.0, clip=bound)
    state = clipped.init(0)
    held, state = clipped(state, step)
    below = ratio <= bound
    assert torch.equal(held[below], shift[below])
    torch.testing.assert_close(held[~below], shift[~below] * (bound / ratio[~below])[:, None, None, None])
    assert clipped.tally == {"guided": 6, "clipped": 3, "largest_ratio": pytest.approx(float(ratio.max()))}
    clipped(state, steps[4])
    assert clipped.tally["guided"] == 12
    clipped.init(1)
    assert clipped.tally == {"guided": 0, "clipped": 0, "largest_ratio": 0}
    still = guide(strength=0.0, clip=0.1)
    run(DDIM(), SIGMAS, still)
    assert (still.tally["clipped"], still.tally["guided"]) == (0, 6 * still.spec.guided_steps(SIGMAS))


# --- micro-batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 6, 9])
@pytest.mark.parametrize(
    ("view", "pairs"),
    product([NoisyFeatures(), DenoisedFeatures(), NoiseConditionedFeatures()], [PreviousStep(), RealPositives()]),
    ids=str,
)
def test_micro_batches_change_memory_only(view, pairs, size):
    """The loss sees the whole block; the encoder never sees more than a micro-batch, twice per image with a graph."""
    calls = []

    def encode(images, sigma=0.0):
        calls.append((len(images), torch.is_grad_enabled()))
        return ENCODER(images) * (1 + sigma)

    options = {"features": view, "pairs": pairs, "real": REAL}
    whole = run(Heun(guide_second=True), SIGMAS, guide(encode, **options))
    calls.clear()
    parts = guide(encode, **options, micro_batch=size)
    torch.testing.assert_close(run(Heun(guide_second=True), SIGMAS, parts), whole, rtol=0, atol=1e-11)
    assert max(n for n, _ in calls) == min(size, 6)
    encoded = [sum(n for n, graph in calls if graph is wanted) for wanted in (True, False)]
    guided = int(parts.tally["guided"])
    assert encoded == ([guided, 6] if size >= 6 else [guided, guided + 6])  # 6: the first positives, or the real ones


# --- the rival, and sums -----------------------------------------------------------------------------------------


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
    sigmas = torch.tensor([sigma, 0.0], dtype=f64)
    step, *_ = DDIM()(lambda x, s, labels=None: world.denoiser(x, s), NOISE, sigmas, labels=LABELS)
    x = step.x.clone().requires_grad_()
    log_p = ENCODER((world.denoiser(x, sigma) + 1) / 2).log_softmax(1)[torch.arange(6), LABELS].sum()
    exact = 1.5 * sigma**2 * torch.autograd.grad(log_p, x)[0]
    torch.testing.assert_close(guidance(None, step)[0], exact, rtol=1e-9, atol=1e-12)
    pieces = ClassifierGuidance(TowardsClass(strength=1.5), ENCODER, micro_batch=4)
    torch.testing.assert_close(pieces(None, step)[0], exact, rtol=1e-9, atol=1e-12)
    both = GuidanceSum(guidance, guide(), guidance)
    shift, _ = both(both.init(0), step)  # at the first step contrastive guidance does not act
    torch.testing.assert_close(shift, 2 * exact, rtol=1e-9, atol=1e-12)
    assert ClassifierGuidance(TowardsClass(window=Window(sigma_min=5.0)), ENCODER)(None, step)[0] is None
    off = GuidanceSum(guide())
    assert off(off.init(0), step)[0] is None


def test_a_sum_adds_shifts_and_checks_all_parts():
    first, second = guide(loss=InfoNCE(), features=DenoisedFeatures()), guide(clip=0.5)
    torch.testing.assert_close(one_shift(GuidanceSum(first, second)), one_shift(first) + one_shift(second))
    rival = ClassifierGuidance(TowardsClass(), ENCODER)
    GuidanceSum(first, rival).check(SIGMAS, LABELS, shape=(1, 3, 3))
    with pytest.raises(ValueError, match="classifier guidance: expected labels"):
        GuidanceSum(first, rival).check(SIGMAS, batch=4)
    with pytest.raises(ValueError, match="at least 2 images"):
        GuidanceSum(rival, first).check(SIGMAS, LABELS[:1])


def test_equal_cost_of_the_rival():
    """In the same window, below the first sigma, both see one forward and one backward per guided step."""
    calls = []

    def counting(images):
        calls.append(len(images))
        return ENCODER(images)

    window = Window(sigma_min=0.3, sigma_max=6.0)
    contrastive = guide(counting, window=window)
    rival = ClassifierGuidance(TowardsClass(window=window), counting)
    cost = []
    for guidance in (contrastive, rival):
        assert guidance.spec.guided_steps(SIGMAS) == contrastive.spec.guided_steps(SIGMAS)
        calls.clear()
        run(DDIM(), SIGMAS, guidance)
        cost.append(len(calls))
    assert cost[0] == cost[1] + 1  # the positive from before the window


# --- records -----------------------------------------------------------------------------------------------------


def test_protocols_and_records():
    assert isinstance(guide(), Guidance)
    assert isinstance(GuidanceSum(guide()), Guidance)
    assert isinstance(ClassifierGuidance(TowardsClass(), ENCODER), CheckedGuidance)
    assert all(isinstance(p, Pairs) for p in (PreviousStep(), OtherClasses(), RealPositives(), RealNegatives()))
    assert all(isinstance(v, FeatureView) for v in (NoisyFeatures(), DenoisedFeatures(), NoiseConditionedFeatures()))
    assert eval(repr(Contrastive())) == Contrastive()  # its repr is its record


def test_fields_added_later_leave_old_digests_alone():
    old = Contrastive(
        loss=HardNegative(temperature=10.0, tau_plus=0.1, beta=1.0),
        strength=97.65625,
        window=Window(sigma_min=2.04),
        features=NoisyFeatures(),
    )
    assert digest(old) == "835998c371e2fa0d39c1b8d45c70b8ce3d13326368bd93c85e817a43a95c9f1b"
    assert digest(TowardsClass()) == "9003d3ef705a60bd7ecb20929ac10887076ae53a0760d48cabbb2d61a5052c9f"
    changed = [{"clip": 1.0}, {"pairs": RealPositives()}, {"strength_profile": PowerStrength()}]
    assert len({digest(Contrastive(**c)) for c in [{}, *changed]}) == 4
    assert digest(HardNegative(estimator="easy")) != digest(HardNegative())


def test_a_block_is_the_same_twice_and_the_global_stream_is_untouched():
    real = RealImages(randn(40, 1, 3, 3, seed=11).sigmoid(), torch.arange(40) % 3)
    guidance, sampler = guide(pairs=RealPositives(), real=real), Heun(churn=10.0, guide_second=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = run(sampler, SIGMAS, guidance)
    run(sampler, SIGMAS, guidance, block=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, run(sampler, SIGMAS, guidance))
    assert torch.is_grad_enabled()
    assert not torch.equal(first, run(sampler, SIGMAS, guidance, block=1))


# --- errors ------------------------------------------------------------------------------------------------------

ONE = torch.zeros(4, dtype=torch.int64)
NHW = (1, 3, 3)
FLAT = nn.Flatten(0).eval()
POOLED = nn.Sequential(nn.Conv2d(1, 10, 3, padding=1), nn.MaxPool2d(2)).eval()


def check(spec, labels=None, batch=None, encode=ENCODER, shape=None, real=None):
    ContrastiveGuidance(spec, encode, real=real).check(karras_sigmas(9), labels, batch=batch, shape=shape)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        # the window
        (lambda: check(Contrastive(window=Window(sigma_min=90.0))), "at least one guided step"),
        (lambda: check(Contrastive(window=Window(sigma_min=60.0))), "after its first step"),
        (lambda: Contrastive(window=Window(sigma_min=60.0)).check(karras_sigmas(9)), "at least one guided step"),
        (lambda: Window(sigma_min=2.0, sigma_max=1.0), "sigma_min <= sigma_max"),
        (lambda: Window.of_timesteps(ABAR, first=1000), "<= 999"),
        (lambda: TimestepWindow(first=1000), "<= 999"),
        (lambda: TimestepWindow(first=5, last=4), "first <= last"),
        # batches and labels
        (lambda: check(Contrastive(loss=InfoNCE()), batch=1), "at least 2 images"),
        (lambda: check(Contrastive(), ONE[:1]), "at least 2 images"),
        (lambda: check(Contrastive(pairs=RealPositives()), batch=1, real=REAL), "at least 2 images"),
        (lambda: Contrastive().check(karras_sigmas(9), batch=1), "at least 2 images"),
        (lambda: check(Contrastive(loss=InfoNCE(), pairs=OtherClasses()), ONE), "at least 2 classes"),
        (lambda: check(Contrastive(loss=InfoNCE(), pairs=OtherClasses()), batch=4), "expected labels"),
        (lambda: check(Contrastive(loss=SupervisedContrastive()), ONE), "at least 2 classes"),
        (lambda: check(Contrastive(loss=SupervisedContrastive()), batch=4), "expected labels"),
        (lambda: check(Contrastive(pairs=OtherClasses()), LABELS), "tau_plus=0"),
        (lambda: Contrastive(pairs=OtherClasses()).check(karras_sigmas(9), batch=4), "tau_plus=0"),
        (lambda: Contrastive(loss=Debiased(), pairs=OtherClasses()).check(karras_sigmas(9), batch=4), "tau_plus=0"),
        (
            lambda: run(DDIM(), SIGMAS, guide(loss=InfoNCE(), pairs=OtherClasses()), labels=None),
            "class-conditional pairs: expected labels",
        ),
        (lambda: next(DDIM()(WORLD.denoiser, NOISE[:1], SIGMAS, guide())), "at least 2 images"),  # at the first step
        # real images
        (lambda: check(Contrastive(pairs=RealPositives())), "RealPositives: expected real images, got none"),
        (lambda: run(DDIM(), SIGMAS, guide(pairs=RealNegatives(count=2))), "RealNegatives: expected real images"),
        (lambda: check(Contrastive(pairs=RealPositives()), ONE + LABELS[:4] * 5, real=REAL), "got none of class 5"),
        (lambda: check(Contrastive(pairs=RealNegatives(count=13)), LABELS, real=REAL), "count=13 real images"),
        (lambda: check(Contrastive(pairs=RealPositives()), shape=(1, 4, 4), real=REAL), r"shape \(1, 4, 4\), got"),
        (lambda: RealNegatives(count=0), "1 or more real images"),
        (lambda: RealImages(REAL.images * 255, REAL.labels), "divide 8-bit images by 255"),
        (lambda: RealImages((REAL.images * 255).byte(), REAL.labels), "floating-point"),
        (lambda: RealImages(REAL.images, REAL.labels[:3]), "as many labels"),
        # the encoder
        (lambda: check(Contrastive(), encode=nn.Linear(3, 3)), "eval"),
        (lambda: check(Contrastive(), encode=nn.Linear(3, 3).forward), "eval"),
        (lambda: check(Contrastive(), shape=(1, 4, 4)), "it failed: mat1 and mat2"),
        (lambda: check(Contrastive(), shape=(1, 8, 8), encode=POOLED), r"features \[B, D\].*got shape \(2, 10, 4, 4\)"),
        (lambda: check(Contrastive(), shape=NHW, encode=FLAT), r"row for each of the 2 images.*got shape \(18,\)"),
        (lambda: check(Contrastive(), shape=NHW, encode=lambda x: (x, x)), "got a tuple"),
        (lambda: check(Contrastive(features=NoiseConditionedFeatures()), shape=NHW), "NoiseConditionedFeatures"),
        (lambda: one_shift(guide(lambda x: ENCODER(x).detach())), "depend differentiably"),
        (lambda: one_shift(guide(lambda x: x)), r"expected features \[B, D\]"),
        # numbers
        (lambda: Contrastive(strength=math.nan), "finite"),
        (lambda: Contrastive(clip=0.0), "above 0"),
        (lambda: guide(micro_batch=0), "1 or more images"),
        (lambda: PowerStrength(reference=0.0), "above 0"),
        (lambda: PowerStrength(exponent=math.inf), "finite"),
        (lambda: LinearStrength(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        # the rival
        (lambda: TowardsClass(sigma_data=0.0), "sigma_data"),
        (lambda: ClassifierGuidance(TowardsClass(), ENCODER).check(karras_sigmas(4)), "labels"),
        (lambda: ClassifierGuidance(TowardsClass(), nn.Linear(3, 3)), "eval"),
        (
            lambda: ClassifierGuidance(TowardsClass(), encoder(out=2)).check(karras_sigmas(4), LABELS, shape=NHW),
            "above every label, 0 to 2",
        ),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_a_guidance_that_breaks_is_named():
    with pytest.raises(NotFiniteError, match="the guidance at step 1"):
        run(DDIM(), SIGMAS, guide(lambda x: x.flatten(1) * math.nan))


def test_check_lets_good_plans_pass():
    check(Contrastive(), LABELS, shape=NHW)
    check(Contrastive(loss=InfoNCE()), batch=2)
    check(Contrastive(pairs=RealNegatives(count=12)), batch=1, real=REAL, shape=NHW)
    check(Contrastive(pairs=RealPositives()), LABELS, real=REAL)
    check(Contrastive(loss=SupervisedContrastive(), pairs=RealNegatives(count=3)), LABELS, real=REAL)
    check(Contrastive(loss=HardNegative(tau_plus=0.0), pairs=OtherClasses()), torch.tensor([0, 1]))
    for pairs in (RealPositives(), RealNegatives(), PreviousStep()):
        Contrastive(loss=SupervisedContrastive(), pairs=pairs).check(karras_sigmas(9), batch=8)
