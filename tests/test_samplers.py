"""Every sampler against the mathematics, literal transcriptions in VP coordinates, and another library step by step."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gambeson.canonical import digest
from gambeson.models.oracle import GaussianMixture
from gambeson.sampling import walk
from gambeson.sampling.levels import NoiseLevels, TimestepLevels
from gambeson.sampling.samplers import DDIM, DDPM, DPMSolverPP, Euler, Heun, NotFiniteError
from gambeson.sampling.walk import dynamic_threshold, state_dtype
from gambeson.schedules import (
    cosine_alpha_bar,
    ddim_sigmas,
    ddim_timesteps,
    karras_sigmas,
    linear_alpha_bar,
    sigma_from_alpha_bar,
)
from gambeson.types import Sampler

f64 = torch.float64
EXACT = {"rtol": 0, "atol": 1e-9}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=f64)


WORLD = GaussianMixture(  # three overlapping classes of images, the last of two components
    means=0.6 * randn(4, 1, 2, 2, seed=7),
    std=torch.linspace(0.2, 0.35, 4, dtype=f64),
    weights=torch.full((4,), 0.25, dtype=f64),
    classes=torch.tensor([0, 1, 2, 2]),
)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
NOISE = randn(6, 1, 2, 2, seed=1)

ODE = [DDIM(), Euler(), Heun(), DPMSolverPP()]
SDE = [DDIM(eta=0.5), DDIM(eta=1.0), DDPM(), DDPM(variance="large"), Euler(churn=20.0), Heun(churn=20.0)]


def name(sampler):
    """The sampler in short, for the names of tests: its class and what differs from the defaults."""
    changed = [f"{f.name}={getattr(sampler, f.name)}" for f in fields(sampler) if getattr(sampler, f.name) != f.default]
    return " ".join([type(sampler).__name__, *changed])


every = pytest.mark.parametrize("sampler", ODE + SDE, ids=name)


class Pull:
    """An analytic guidance: eps moves by strength times the gradient of sum log cosh(x_vp), which is tanh(x_vp)."""

    def __init__(self, strength=0.05):
        self.strength = strength

    def init(self, block, generator=None):
        return 0

    def __call__(self, state, step):
        x_vp = step.x / math.sqrt(1 + step.sigma**2)
        return -step.sigma * self.strength * x_vp.tanh(), state + 1


def steps_of(sampler, sigmas, guidance=None, noise=NOISE, denoise=WORLD.denoiser, labels=LABELS, seed=5):
    return list(sampler(denoise, noise, sigmas, guidance, labels=labels, generator=seeded(seed)))


def final(*args, **options):
    return steps_of(*args, **options)[-1].x


# --- order of convergence and distribution -----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ODE, ids=name)
@pytest.mark.parametrize("guidance", [None, Pull()])
def test_order_of_convergence(sampler, guidance):
    """The error against a fine solution of the same ODE (guided too) falls as the declared power of the step."""

    def solve(steps, method=sampler):
        return final(method, karras_sigmas(steps, 0.02, 20.0), guidance)

    truth = solve(1024, Heun(guide_second=True))
    sampler = Heun(guide_second=True) if isinstance(sampler, Heun) else sampler
    n = 128 if sampler.order == 1 else 64
    coarse, fine = ((solve(k, sampler) - truth).norm() for k in (n, 2 * n))
    assert float(torch.log2(coarse / fine)) == pytest.approx(sampler.order, abs=0.2)


def test_second_order_is_closer_at_equal_cost():
    """At 40 network calls: error of Heun below half of Euler's, of DPM-Solver++ an eighth (measured: .43, .10)."""
    truth = final(Heun(), karras_sigmas(1024, 0.02, 20.0))
    steps = {DDIM(): 40, Euler(): 40, Heun(): 20, DPMSolverPP(): 40}
    error = {s: float((final(s, karras_sigmas(n, 0.02, 20.0)) - truth).norm()) for s, n in steps.items()}
    assert error[Heun()] < error[Euler()] / 2
    assert error[DPMSolverPP()] < error[Euler()] / 8
    assert error[Euler()] == pytest.approx(error[DDIM()], rel=1e-9)  # one method under two names


@pytest.mark.parametrize("sampler", SDE, ids=name)
def test_stochastic_samplers_keep_the_distribution(sampler):
    """Mean, variance and quantiles of a line with two modes; the start is N(0, 1) in VP coordinates."""
    line = GaussianMixture(
        means=torch.tensor([[-0.6], [0.4]], dtype=f64),
        std=torch.tensor([0.1, 0.2], dtype=f64),
        weights=torch.tensor([0.5, 0.5], dtype=f64),
        classes=torch.tensor([0, 1]),
    )
    vp = isinstance(sampler, (DDIM, DDPM))
    sigmas = TimestepLevels(kind="uniform", steps=250).sigmas() if vp else karras_sigmas(80, 0.005, 80.0)
    x = final(sampler, sigmas, noise=randn(4000, 1), denoise=line.denoiser, labels=None).sort(0).values
    true = line.sample(4000)[0].sort(0).values
    assert float((x - true).abs().mean()) < 0.03  # Wasserstein distance; two exact samples are about .02 apart
    assert float(x.mean()) == pytest.approx(-0.1, abs=0.03)
    assert float(x.var()) == pytest.approx((0.01 + 0.04) / 2 + 0.25, abs=0.02)


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_tweedie(sigma, labels):
    """The oracle is what the orders above are measured against: E[x0 | x] = x + sigma^2 grad log p(x; sigma)."""
    x = (WORLD.sample(6, seeded())[0] + sigma * NOISE).requires_grad_()
    score = torch.autograd.grad(WORLD.log_density(x, sigma, labels).sum(), x)[0]
    torch.testing.assert_close(WORLD.denoiser(x, sigma, labels), x + sigma**2 * score)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    st.sampled_from([*ODE, DDIM(eta=1.0), DDPM(vp_start=False), Heun(churn=3.0)]),
    st.integers(-5, 5),
    st.integers(1, 9),
)
def test_a_world_k_times_as_large_gives_images_k_times_as_large(sampler, power, steps):
    """Images and sigmas in other units: D_k(x, sigma) = k D(x / k, sigma / k). Bit for bit where k is a power of 2."""
    k, sigmas = 2.0**power, karras_sigmas(steps, 0.1, 30.0)

    def larger(x, sigma, labels=None):
        return k * WORLD.denoiser(x / k, sigma / k, labels)

    assert torch.equal(final(sampler, k * sigmas, denoise=larger), k * final(sampler, sigmas))


# --- literal transcriptions in VP coordinates --------------------------------------------------------------------


def vp_model(abar):
    """The world as an eps network of (x_vp, t), and that network as a denoiser in sigma space (METHOD 1.3)."""
    sigmas = sigma_from_alpha_bar(abar)

    def eps(x, t):
        a = abar[t]
        return (x - a.sqrt() * WORLD.denoiser(x / a.sqrt(), float(sigmas[t]), LABELS)) / (1 - a).sqrt()

    def denoise(x, sigma, labels=None):
        t = int((sigmas - sigma).abs().argmin())
        return x - sigma * eps(x / math.sqrt(1 + sigma**2), t)

    return eps, denoise


def literal_ddim(x, eps, abar, times, eta, clip, generator):
    """CDP eq. 4 and Algorithm 1 (Song et al. 2021, eq. 12 and 16 for eta > 0), every x_t of it."""
    a, states = torch.cat([abar, torch.ones(1, dtype=f64)]), [x]  # a[-1] is 1
    for t, s in pairwise([*times.flip(0).tolist(), -1]):
        e = eps(x, t)
        x0 = (x - (1 - a[t]).sqrt() * e) / a[t].sqrt()
        if clip is not None:  # eps is that of the clamped x0, as in the posterior that minimal-diffusion samples from
            x0 = x0.clamp(-clip, clip)
            e = (x - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
        spread = eta * ((1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s])).sqrt()
        x = a[s].sqrt() * x0 + (1 - a[s] - spread**2).sqrt() * e
        x = x + spread * torch.randn(x.shape, generator=generator, dtype=f64) if spread > 0 else x
        states.append(x)
    return states


def literal_ddpm(x, eps, abar, times, variance, clip, generator):
    """The ancestral formula of CDP section 2.2, alpha_t that between two neighbours of the sub-sequence."""
    a, states = torch.cat([abar, torch.ones(1, dtype=f64)]), [x]
    for t, s in pairwise([*times.flip(0).tolist(), -1]):
        alpha = a[t] / a[s]
        e = eps(x, t)
        if clip is None:
            x = (x - (1 - alpha) / (1 - a[t]).sqrt() * e) / alpha.sqrt()
        else:  # Ho et al. 2020, eq. 7: the mean of q(x_s | x_t, x0) at the clamped x0
            x0 = ((x - (1 - a[t]).sqrt() * e) / a[t].sqrt()).clamp(-clip, clip)
            x = (a[s].sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a[s]) * x) / (1 - a[t])
        if s >= 0 and s != t:
            v = 1 - alpha if variance == "large" else (1 - a[s]) / (1 - a[t]) * (1 - alpha)
            x = x + v.sqrt() * torch.randn(x.shape, generator=generator, dtype=f64)
        states.append(x)
    return states


QUAD, REPEATED = TimestepLevels(), TimestepLevels(keep_repeats=True)
EVEN = TimestepLevels(schedule="cosine", kind="even", steps=250)


@pytest.mark.parametrize("strength", [0.0, 0.05], ids=["plain", "guided"])
@pytest.mark.parametrize(("levels", "clip", "calls"), [(QUAD, None, 187), (REPEATED, None, 200), (EVEN, 1.0, 250)])
@pytest.mark.parametrize("method", [0.0, 0.5, 1.0, "small", "large"])
def test_ddim_and_ddpm_are_the_papers_formulas(method, levels, clip, calls, strength):
    """Every x_t, not the last alone: CDP's CIFAR-10 schedule without and with its repeats, minimal-diffusion's with."""
    abar, times = levels.alpha_bar(), levels.timesteps()
    eps, denoise = vp_model(abar)

    def guided(x, t):
        return eps(x, t) + strength * x.tanh()

    literal = literal_ddpm if isinstance(method, str) else literal_ddim
    expected = literal(NOISE, guided, abar, times, method, clip, seeded(5))
    sampler = (
        DDPM(variance=method, clip=clip) if isinstance(method, str) else DDIM(eta=method, vp_start=True, clip=clip)
    )
    steps = steps_of(sampler, levels.sigmas(), Pull(strength) if strength else None, denoise=denoise)
    assert len(steps) == calls + 1
    ours = torch.stack([step.x / math.sqrt(1 + step.sigma**2) for step in steps])
    torch.testing.assert_close(ours, torch.stack(expected), **EXACT)


def test_small_variance_is_ddim_with_eta_1():
    sigmas = QUAD.sigmas()
    torch.testing.assert_close(final(DDPM(), sigmas), final(DDIM(eta=1.0, vp_start=True), sigmas), **EXACT)
    assert (final(DDPM(variance="large"), sigmas) - final(DDPM(), sigmas)).abs().max() > 1e-3


def literal_churned_euler(noise, t, churn, s_min, s_max, s_noise, generator):
    """Karras et al. 2022, Algorithm 2, lines 2 to 8: without the correction of lines 9 to 11."""
    x = t[0] * noise
    for i in range(len(t) - 1):
        gamma = min(churn / (len(t) - 1), 2**0.5 - 1) if s_min <= t[i] <= s_max else 0.0
        eps = s_noise * torch.randn(x.shape, generator=generator, dtype=f64) if gamma > 0 else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + (t_hat**2 - t[i] ** 2) ** 0.5 * eps
        d = (x_hat - WORLD.denoiser(x_hat, t_hat, LABELS)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
    return x


@pytest.mark.parametrize("churn", [(0.0, 0.0, 80.0, 1.0), (4.0, 0.05, 10.0, 1.007), (40.0, 0.0, 50.0, 1.0)])
def test_euler_with_churn_is_edms_algorithm_2_without_correction(churn):
    sigmas = karras_sigmas(12)
    options = dict(zip(("churn", "s_min", "s_max", "s_noise"), churn, strict=True))
    expected = literal_churned_euler(NOISE, sigmas.tolist(), *churn, seeded(5))
    torch.testing.assert_close(final(Euler(**options), sigmas), expected, **EXACT)


# --- another library's schedulers, on the same fake network ------------------------------------------------------

WEIGHT = randn(4, 4, seed=11) / 2


def fake(x, level):
    """An untrained network of (input, what it is told of the noise), the same for both libraries."""
    return (x.flatten(1) @ WEIGHT + level).tanh().reshape(x.shape)


def library_states(scheduler, network, x, **options):
    """Every latent of the library's own loop."""
    states = [x]
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **options).prev_sample
        states.append(x)
    return torch.stack(states)


def vp_fake(abar):
    sigmas = sigma_from_alpha_bar(abar)

    def denoise(x, sigma, labels=None):
        t = (sigmas - sigma).abs().argmin()
        return x - sigma * fake(x / math.sqrt(1 + sigma**2), t / 1000)

    return denoise


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("levels", [TimestepLevels(steps=40), TimestepLevels(schedule="cosine", kind="even", steps=50)])
def test_ddpm_is_diffusers_step_by_step(levels, variance, clip):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(variance_type=f"fixed_{variance}", clip_sample=clip is not None)
    theirs.alphas_cumprod = levels.alpha_bar()  # its own tables are float32 roundings of these
    theirs.set_timesteps(timesteps=levels.timesteps().flip(0).tolist())
    states = library_states(theirs, lambda x, t: fake(x, t / 1000), NOISE, generator=seeded(5))
    steps = steps_of(DDPM(variance=variance, clip=clip), levels.sigmas(), denoise=vp_fake(levels.alpha_bar()))
    ours = torch.stack([s.x / math.sqrt(1 + s.sigma**2) for s in steps])
    torch.testing.assert_close(ours, states, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_is_diffusers_step_by_step(schedule, eta, clip):
    from diffusers import DDIMScheduler

    levels = TimestepLevels(schedule=schedule, kind="uniform", steps=20)
    theirs = DDIMScheduler(clip_sample=clip is not None)  # set_alpha_to_one, its default: the last step goes to abar 1
    theirs.alphas_cumprod = levels.alpha_bar()
    theirs.set_timesteps(20)
    options = {"eta": eta, "use_clipped_model_output": True, "generator": seeded(5)}  # eps of the clamped x0, as ours
    states = library_states(theirs, lambda x, t: fake(x, t / 1000), NOISE, **options)
    sampler = DDIM(eta=eta, vp_start=True, clip=clip)
    steps = steps_of(sampler, levels.sigmas(), denoise=vp_fake(levels.alpha_bar()))
    ours = torch.stack([s.x / math.sqrt(1 + s.sigma**2) for s in steps])
    torch.testing.assert_close(ours, states, rtol=1e-9, atol=1e-9)


def edm_fake(x, sigma, labels=None):
    """The fake network behind EDM's preconditioning with sigma_data .5 (Karras et al. 2022, Table 1)."""
    norm = math.sqrt(sigma**2 + 0.25)
    return 0.25 / norm**2 * x + sigma * 0.5 / norm * fake(x / norm, math.log(sigma) / 4)


@pytest.mark.parametrize("n", [2, 10, 18])
def test_euler_is_diffusers_step_by_step(n):
    from diffusers import EDMEulerScheduler

    theirs, sigmas = EDMEulerScheduler(), karras_sigmas(n)
    theirs.set_timesteps(n)
    torch.testing.assert_close(theirs.sigmas.double(), sigmas, rtol=1e-6, atol=0)
    theirs.sigmas = sigmas
    states = library_states(theirs, fake, sigmas[0] * NOISE)  # it would start at sqrt(sigma_max^2 + 1)
    ours = torch.stack([s.x for s in steps_of(Euler(), sigmas, denoise=edm_fake)])
    torch.testing.assert_close(ours, states, rtol=1e-5, atol=1e-5)  # it rounds its state to float32 at every step


@pytest.mark.parametrize("quantile", [None, 0.9])
@pytest.mark.parametrize("n", [2, 10, 20])
def test_dpm_solver_is_diffusers_step_by_step(n, quantile):
    from diffusers import EDMDPMSolverMultistepScheduler

    options = {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
    }  # (2M); 'heun' is not in it
    thresholding = {"dynamic_thresholding_ratio": quantile or 0.995, "sample_max_value": 1e9}
    theirs = EDMDPMSolverMultistepScheduler(
        **options, **thresholding, thresholding=quantile is not None, final_sigmas_type="zero", lower_order_final=True
    )
    sigmas = karras_sigmas(n)
    theirs.set_timesteps(n)
    torch.testing.assert_close(theirs.sigmas.double(), sigmas, rtol=1e-5, atol=0)
    # in float64 for a sharp comparison; it tells the network ln(sigma) / 4, by which it also finds its place
    theirs.sigmas, theirs.timesteps = sigmas, sigmas[:-1].log() / 4
    states = library_states(theirs, fake, sigmas[0] * NOISE)
    ours = torch.stack([s.x for s in steps_of(DPMSolverPP(quantile=quantile), sigmas, denoise=edm_fake)])
    torch.testing.assert_close(ours, states, rtol=1e-9, atol=1e-9)


# --- the contract of a sampler -----------------------------------------------------------------------------------


@every
def test_steps_calls_and_memory(sampler):
    calls, sigmas = [], karras_sigmas(18)

    def counting(x, sigma, labels=None):
        calls.append(sigma)
        return WORLD.denoiser(x, sigma, labels)

    guidance = Pull()
    steps = list(sampler(counting, NOISE, sigmas, guidance, labels=LABELS, generator=seeded()))
    assert isinstance(sampler, Sampler)
    assert len(calls) == (35 if isinstance(sampler, Heun) else 18)
    assert [s.index for s in steps] == list(range(19))
    assert steps[-1].sigma == 0
    if getattr(sampler, "churn", 0) == 0:
        assert [s.sigma for s in steps] == pytest.approx(sigmas.tolist())
    assert steps[0].previous is None
    assert all(s.previous is not None and s.previous.previous is None for s in steps[1:])  # memory stays constant
    assert all(torch.equal(s.previous.x, before.x) for before, s in pairwise(steps))
    assert torch.equal(steps[3].guided, steps[3].raw + guidance(0, steps[3])[0])
    assert not torch.equal(steps[3].guided, steps[3].raw)


@every
def test_a_block_is_the_same_twice_and_the_global_stream_is_untouched(sampler):
    sigmas = karras_sigmas(8, 0.05, 20.0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = final(sampler, sigmas, Pull())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, final(sampler, sigmas, Pull()))
    assert torch.is_grad_enabled()
    assert torch.equal(first, final(sampler, sigmas, Pull(), seed=6)) == (sampler in ODE)
    default = [list(sampler(WORLD.denoiser, NOISE, sigmas, labels=LABELS))[-1].x for _ in range(2)]
    assert torch.equal(*default)


@every
def test_single_precision(sampler, monkeypatch):
    """A float32 network is fed float32 and its state kept in float64, or in float32 on a device that has no float64."""
    seen, sigmas = set(), karras_sigmas(12, 0.02, 20.0)

    def watching(x, sigma, labels=None):
        seen.add(x.dtype)
        return WORLD.denoiser(x, sigma, labels)

    double = final(sampler, sigmas, noise=NOISE.float().double()) if sampler in ODE else None  # other draws otherwise
    single = final(sampler, sigmas, noise=NOISE.float(), denoise=watching)
    assert seen == {single.dtype} == {torch.float32}
    if double is not None:
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)
    monkeypatch.setattr(walk, "_WITHOUT_FLOAT64", {"cpu"})
    without = final(sampler, sigmas, noise=NOISE.float())
    torch.testing.assert_close(without, single, rtol=0, atol=1e-4)
    assert not torch.equal(without, single)


def test_dtype_of_the_state():
    assert [state_dtype(torch.device(d)) for d in ("cpu", "cuda", "mps")] == [f64, f64, torch.float32]


@pytest.mark.parametrize("sampler", [*ODE, *SDE[:4]], ids=name)
def test_repeated_timesteps_call_the_network_and_do_not_move(sampler):
    calls = []

    def counting(x, sigma, labels=None):
        calls.append(sigma)
        return WORLD.denoiser(x, sigma, labels)

    if not sampler.repeats:
        with pytest.raises(ValueError, match=r"DPMSolverPP: .*twice in a row.*keep_repeats=False"):
            final(sampler, REPEATED.sigmas())
        return
    repeated = final(sampler, REPEATED.sigmas(), denoise=counting)
    wasted = 13
    assert len(calls) - wasted == len(QUAD.sigmas()) - 1 + (186 if isinstance(sampler, Heun) else 0)
    assert torch.equal(repeated, final(sampler, QUAD.sigmas()))


def test_start():
    sigmas = QUAD.sigmas()
    for sampler in (DDPM(), DDIM(vp_start=True), DPMSolverPP(vp_start=True)):
        assert torch.equal(steps_of(sampler, sigmas)[0].x, (1 + sigmas[0] ** 2).sqrt() * NOISE)
    for sampler in (*ODE, DDPM(vp_start=False)):
        assert torch.equal(steps_of(sampler, sigmas)[0].x, sigmas[0] * NOISE)


# --- bounding x0-hat ---------------------------------------------------------------------------------------------


def test_dynamic_thresholding_by_hand():
    x0 = torch.tensor([[0.5, -1.0, 2.0, 4.0], [0.1, -0.2, 0.3, 0.9], [8.0, -8.0, 8.0, 0.0]], dtype=f64)
    # medians of |x0|: (1 + 2) / 2 = 1.5; .25, so s = 1 and nothing moves; 8
    hand = torch.tensor([[1 / 3, -2 / 3, 1, 1], [0.1, -0.2, 0.3, 0.9], [1, -1, 1, 0]], dtype=f64)
    torch.testing.assert_close(dynamic_threshold(x0.reshape(3, 1, 2, 2), 0.5), hand.reshape(3, 1, 2, 2))
    torch.testing.assert_close(dynamic_threshold(x0, 1.0)[0], x0[0] / 4)
    assert dynamic_threshold(x0.half(), 0.5).dtype == torch.float16


@every
@pytest.mark.parametrize("bound", [{"clip": 0.3}, {"quantile": 0.5}], ids=str)
def test_the_guided_x0_is_bounded_after_guidance(sampler, bound):
    """x0-hat is bounded in every step and thus in the sample, which is the last x0-hat."""
    bounded = replace(sampler, **bound)

    def far(x, sigma, labels=None):
        return 3 * WORLD.denoiser(x, sigma, labels)

    steps = steps_of(bounded, karras_sigmas(6), Pull(), denoise=far)
    for step in steps[:-1]:
        moved = step.raw + Pull()(0, step)[0]
        expected = moved.clamp(-0.3, 0.3) if "clip" in bound else dynamic_threshold(moved, 0.5)
        assert torch.equal(step.guided, expected)
        assert not torch.equal(step.guided, moved)
    limit = bound.get("clip", 1.0)
    assert float(steps[-1].x.abs().max()) == pytest.approx(limit)


def test_fields_added_later_leave_old_digests_alone():
    """Digests of the samplers of the first release, before dynamic thresholding."""
    assert digest(Heun())[:12] == "c3c745652dc1"
    assert digest(DDIM())[:12] == "02be9d3b2241"
    assert digest(Heun(churn=2.0, s_max=5.0, clip=1.0))[:12] == "4492eaa92bd3"
    assert digest(DDIM(eta=0.5, vp_start=True))[:12] == "d81314900870"
    assert digest(Heun(quantile=0.995)) != digest(Heun())


# --- levels ------------------------------------------------------------------------------------------------------


def test_levels_are_the_schedules():
    assert torch.equal(NoiseLevels(steps=18).sigmas(), karras_sigmas(18))
    assert [len(v.sigmas()) - 1 for v in (QUAD, REPEATED, EVEN)] == [187, 200, 250]
    assert torch.equal(QUAD.sigmas(), ddim_sigmas(linear_alpha_bar(), ddim_timesteps(200, "quad")))
    even = EVEN.timesteps().tolist()
    assert even[:5] + even[-5:] == [0, 4, 8, 12, 16, 982, 986, 990, 994, 999]  # minimal-diffusion's own list
    assert torch.equal(EVEN.sigmas()[:-1].flip(0), sigma_from_alpha_bar(cosine_alpha_bar()[even]))
    assert 1e4 < float(EVEN.sigmas()[0]) < 4e4
    repeated = REPEATED.sigmas()
    assert (repeated.diff() <= 0).all()
    assert torch.equal(repeated.unique(), QUAD.sigmas().flip(0))
    assert int((repeated == repeated[-2]).sum()) == 8  # t = 0 eight times
    short = TimestepLevels(table_steps=100, beta_end=0.2, kind="uniform", steps=10)
    assert torch.equal(short.sigmas(), ddim_sigmas(linear_alpha_bar(100, 1e-4, 0.2), torch.arange(0, 100, 10)))


@pytest.mark.parametrize("n", [1, 2, 7, 250, 999, 1000])
def test_even_timesteps_are_distinct_and_reach_both_ends(n):
    times = ddim_timesteps(n, "even", drop_repeats=False)
    assert len(times.unique()) == n
    assert times[0] == 0
    assert n == 1 or times[-1] == 999


# --- errors ------------------------------------------------------------------------------------------------------


@every
def test_a_broken_network_or_guidance_is_named(sampler):
    sigmas = torch.tensor([9.0, 5.0, 2.0, 0.5, 0.0], dtype=f64)

    def broken(x, sigma, labels=None):
        bad = (torch.arange(len(x)) == 4)[:, None, None, None]
        return torch.where(bad, math.nan if sigma < 1 else 0.0, x)

    with pytest.raises(
        NotFiniteError, match=r"denoiser at step [23] .*sigma 0\.\d+\) of block 11.*1 of 6 .*first is 4"
    ):
        list(sampler(broken, NOISE, sigmas, block=11))
    with pytest.raises(NotFiniteError, match=r"the guidance at step 0 \(stage 0, sigma \d.*block 3"):
        list(sampler(WORLD.denoiser, NOISE, sigmas, Pull(math.inf), block=3))
    with pytest.raises(ValueError, match="expected the shape of x"):
        list(sampler(lambda x, sigma, labels=None: x.repeat(1, 2, 1, 1), NOISE, sigmas))


BAD = [
    [1.0, 0.5],
    [0.0],
    [0.5, 1.0, 0.0],
    [1.0, 0.0, 0.0],
    [math.nan, 1.0, 0.0],
    [math.inf, 1.0, 0.0],
    [],
    [1.0, -1.0, 0],
]


@every
def test_bad_inputs_are_named_at_the_call(sampler):
    for sigmas in BAD:
        with pytest.raises(ValueError, match="strictly decreasing"):
            sampler(WORLD.denoiser, NOISE, torch.tensor(sigmas))  # at the call, not at the first step
    with pytest.raises(ValueError, match="one class per row"):
        sampler(WORLD.denoiser, NOISE, karras_sigmas(4), labels=LABELS[:5])
    for noise in (NOISE * math.inf, torch.zeros(2, 1, 2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="finite"):
            sampler(WORLD.denoiser, noise, karras_sigmas(4))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: DDIM(eta=1.5), "eta: expected 0"),
        (lambda: DDIM(eta=-0.1), "eta"),
        (lambda: Euler(churn=-1.0), "Euler: expected churn >= 0"),
        (lambda: Heun(s_min=2.0, s_max=1.0), "s_min <= s_max"),
        (lambda: DPMSolverPP(clip=0.0), "clip: expected none or a bound above 0"),
        (lambda: DDPM(quantile=1.5), "quantile: expected none or a share"),
        (lambda: DDPM(quantile=0.9, clip=1.0), "use one"),
        (lambda: NoiseLevels(steps=0), r"levels\.steps"),
        (lambda: NoiseLevels(sigma_min=0.0), "sigma_min < sigma_max"),
        (lambda: NoiseLevels(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: NoiseLevels(rho=0.0), r"levels\.rho"),
        (lambda: TimestepLevels(steps=0), r"levels\.steps: expected 1 to 1000"),
        (lambda: TimestepLevels(steps=101, table_steps=100), "1 to 100"),
        (lambda: TimestepLevels(table_steps=0), "table_steps"),
        (lambda: TimestepLevels(beta_start=0.03), "beta_start <= beta_end"),
        (lambda: TimestepLevels(beta_end=1.0), "< 1"),
        (lambda: ddim_sigmas(linear_alpha_bar(), REPEATED.timesteps()), "drop_repeats"),
        (lambda: ddim_sigmas(linear_alpha_bar(), torch.tensor([3, 2]), repeats=True), "ascending"),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()
