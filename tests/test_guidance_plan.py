"""Guidance as planned: guided steps under churn, checks before a run, memory through a walk, determinism of walks."""

import math

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import ENCODER, LABELS, NOISE, WORLD, encoder, f64, randn, run, seeded

from gambeson.models.noise_conditioned import NoiseConditionedSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.sampling import (
    DDIM,
    DDPM,
    ClassifierGuidance,
    Contrastive,
    ContrastiveGuidance,
    Debiased,
    DenoisedFeatures,
    DPMSolverPP,
    Euler,
    GuidanceSum,
    HardNegative,
    Heun,
    InfoNCE,
    InfoNCEPaper,
    LinearStrength,
    PowerStrength,
    RealImages,
    RealNegatives,
    RealPositives,
    TowardsClass,
    Window,
    karras_sigmas,
)
from gambeson.types import Step

SIGMAS = karras_sigmas(8, 0.05, 20.0)
REAL = RealImages(randn(12, 1, 3, 3, seed=11).sigmoid(), torch.arange(12) % 3)
SAMPLERS = [
    DDIM(),
    DDIM(eta=1.0),
    DDPM(),
    DPMSolverPP(),
    Euler(churn=40.0),
    Heun(churn=40.0),
    Heun(churn=40.0, guide_second=True),
]


def guide(encode=ENCODER, **options):
    networks = {k: options.pop(k) for k in ("real", "micro_batch") if k in options}
    return ContrastiveGuidance(Contrastive(**({"strength": 3.0, "window": Window()} | options)), encode, **networks)


# --- the schedule decides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_guided_evaluations_are_those_of_the_plan(sampler):
    """Windows of one sigma each, which churn leaves; Heun's second evaluation belongs to its own, lower level."""
    second = getattr(sampler, "guide_second", False)
    for i, sigma in list(enumerate(SIGMAS[:-1].tolist()))[1:]:
        window = Window(sigma_min=sigma * 0.999, sigma_max=sigma * 1.001)
        contrastive = guide(window=window)
        run(sampler, SIGMAS, contrastive)
        assert contrastive.spec.guided_steps(SIGMAS) == 1
        # the second evaluation of step i - 1 is at level i too, but the first step is never guided
        assert contrastive.tally["guided"] / 6 == 1 + (second and i > 1)
        rival, acted = ClassifierGuidance(TowardsClass(window=window), ENCODER), []

        class Counting:
            def init(self, block, generator=None, rival=rival):
                return rival.init(block, generator)

            def __call__(self, state, step, rival=rival, acted=acted):
                shift, state = rival(state, step)
                acted.extend([step.level] if shift is not None else [])
                return shift, state

        run(sampler, SIGMAS, Counting())
        assert acted == [pytest.approx(sigma)] * (rival.spec.guided_steps(SIGMAS) + second)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_step_knows_its_level_in_the_schedule(sampler):
    steps = list(sampler(WORLD.denoiser, NOISE, SIGMAS, labels=LABELS, generator=seeded()))
    assert [s.scheduled for s in steps] == SIGMAS.tolist()
    churned = getattr(sampler, "churn", 0.0) > 0
    assert all((s.sigma > s.scheduled) == churned for s in steps[:-1])
    bare = Step(index=1, stage=0, x=NOISE, sigma=2.0, raw=NOISE, guided=NOISE, labels=None)
    assert bare.scheduled == 2.0


@pytest.mark.parametrize("make", [
    lambda profile: guide(strength_profile=profile),
    lambda profile: ClassifierGuidance(TowardsClass(strength_profile=profile), ENCODER),
])  # fmt: skip
def test_strength_follows_the_schedule_and_coordinates_the_state(make):
    """With churn the profile's factor is that of the level, while the shift's own scale is that of the raised sigma."""
    steps = list(Euler(churn=40.0)(WORLD.denoiser, NOISE, SIGMAS, labels=LABELS, generator=seeded()))
    step = steps[3]
    profile = PowerStrength(exponent=2.0)
    shaped, flat = make(profile), make(LinearStrength(low=1.0, high=1.0))
    one, other = (g(g.init(0, seeded()), step)[0] for g in (shaped, flat))
    torch.testing.assert_close(one, float(SIGMAS[3]) ** 2 * other)
    assert Contrastive(strength=2.0).multiple(5.0, 3.0) == -10.0
    towards = TowardsClass(strength=2.0, sigma_data=0.5)
    assert towards.multiple(5.0, 3.0) == pytest.approx(2 * 25 * 0.25 / 25.25)


# --- before a run ------------------------------------------------------------------------------------------------


def contrastive(pairs=None, **options):
    return guide(ENCODER, loss=InfoNCE(), **({"pairs": pairs, "real": REAL} if pairs else {}), **options)


def rival(classifier, labels=LABELS, shape=(1, 8, 8), classes=None):
    ClassifierGuidance(TowardsClass(), classifier.eval()).check(SIGMAS, labels, shape=shape, classes=classes)


STEEP = PowerStrength(exponent=400.0, reference=0.001)
GRAY = ResNetSpec(width=4).build(1, 3)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        # strengths that are no numbers
        (lambda: Contrastive(strength_profile=STEEP).check(SIGMAS), "finite strength.*reference"),
        (lambda: contrastive(strength_profile=STEEP).check(SIGMAS, LABELS), "finite strength"),
        (lambda: TowardsClass(strength_profile=STEEP).guided_steps(SIGMAS), "finite strength"),
        (
            lambda: ClassifierGuidance(TowardsClass(strength_profile=STEEP), ENCODER).check(SIGMAS, LABELS),
            "finite strength",
        ),
        (lambda: contrastive(strength=1e38).check(SIGMAS), "finite strength"),  # a number of float64 only
        # the rival's classifier
        (lambda: rival(ResNetSpec(width=4).build(3, 3)), "the classifier failed: .*channels.*number of channels"),
        (lambda: rival(NoiseConditionedSpec(width=8).build(1, 3)), "the classifier failed: .*sigma.*told a noise"),
        (lambda: rival(ResNetSpec(width=4).build(1, 2)), r"K above every label, 0 to 2, got shape \(2, 2\)"),
        (lambda: rival(GRAY, classes=5), "every label, 0 to 4"),
        (lambda: rival(GRAY, labels=torch.tensor([-1])), "every label, -1 to -1"),
        (lambda: rival(nn.Flatten(0)), r"got shape \(128,\)"),
        (lambda: rival(nn.LSTM(8, 8), shape=(8,)), "got a tuple"),
        # real images of every class that may be sampled
        (lambda: contrastive(RealPositives()).check(SIGMAS, LABELS[:2], classes=4), "got none of class 3"),
        (lambda: contrastive(RealPositives()).check(SIGMAS, LABELS[:2] + 5), "got none of class 5"),
        (lambda: GuidanceSum(contrastive(RealPositives())).check(SIGMAS, LABELS, classes=4), "none of class 3"),
        (lambda: guide(pairs=RealPositives()).check(SIGMAS, LABELS), "pass real=RealImages.*or generate by a recipe"),
    ],
)
def test_mistakes_are_named_before_the_run(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_check_lets_good_plans_pass():
    # too steep at the first step only, which contrastive guidance leaves alone: (20 / 1.9)^39, then 10.98
    steep = PowerStrength(exponent=39.0, reference=1.9)
    with pytest.raises(ValueError, match="finite strength"):
        TowardsClass(strength_profile=steep).guided_steps(SIGMAS)
    contrastive(strength_profile=steep).check(SIGMAS, LABELS)
    assert TowardsClass(strength_profile=steep, window=Window(sigma_max=11.0)).guided_steps(SIGMAS) == 7
    rival(GRAY)
    rival(GRAY, classes=3)
    for pairs in (RealPositives(), RealNegatives(count=12)):
        contrastive(pairs).check(SIGMAS, LABELS[:2], classes=3)
    contrastive(RealPositives()).check(SIGMAS, batch=4, classes=9)  # without labels any real image will do
    contrastive().check(SIGMAS, LABELS, classes=9)
    GuidanceSum(contrastive(), ClassifierGuidance(TowardsClass(), ENCODER)).check(
        SIGMAS, LABELS, shape=(1, 3, 3), classes=3
    )


# --- memory ------------------------------------------------------------------------------------------------------

GUIDANCES = {
    "contrastive": lambda: guide(),
    "real positives": lambda: guide(pairs=RealPositives(), real=REAL),
    "classifier": lambda: ClassifierGuidance(TowardsClass(), ENCODER),
    "sum": lambda: GuidanceSum(guide(), ClassifierGuidance(TowardsClass(), ENCODER)),
}


class Tensors(TorchDispatchMode):
    """Inside, notes the memory of every tensor that any operation gives, graphs of gradients included."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            reference = StorageWeakRef(tensor.untyped_storage())
            self.seen[reference.cdata] = reference
        return out

    def alive(self):
        self.seen = {k: reference for k, reference in self.seen.items() if not reference.expired()}
        return len(self.seen)


def most_alive(sampler, steps, guidance):
    """The largest number of tensors alive after any step of a walk from which the last step alone is kept."""
    sigmas, most = karras_sigmas(steps, 0.05, 20.0), 0
    with Tensors() as tensors:
        for step in sampler(WORLD.denoiser, NOISE, sigmas, guidance, labels=LABELS, generator=seeded()):
            assert step.raw is not None
            most = max(most, tensors.alive())
    return most


@pytest.mark.parametrize("kind", GUIDANCES)
@pytest.mark.parametrize("sampler", [DDIM(eta=1.0), Heun(churn=10.0, guide_second=True), DPMSolverPP()], ids=str)
def test_memory_does_not_grow_with_the_steps(sampler, kind):
    guidance = GUIDANCES[kind]()
    short = most_alive(sampler, 10, guidance)
    assert 3 < short < 40
    assert most_alive(sampler, 100, guidance) == short


def test_the_measure_of_memory_sees_what_is_kept():
    kept = []

    class Hoarder:
        def init(self, block, generator=None):
            return None

        def __call__(self, state, step):
            kept.append(step.x)
            return None, None

    assert most_alive(DDIM(), 100, Hoarder()) > most_alive(DDIM(), 100, None) + 90


# --- determinism -------------------------------------------------------------------------------------------------

WALKS = {
    "hard negatives, real positives": lambda: guide(pairs=RealPositives(), real=REAL),
    "InfoNCE of the paper": lambda: guide(loss=InfoNCEPaper(), strength=0.3),
    "debiased, real negatives": lambda: guide(loss=Debiased(), pairs=RealNegatives(count=5), real=REAL),
    "sum": lambda: GuidanceSum(
        guide(loss=InfoNCE(), pairs=RealPositives(), real=REAL, features=DenoisedFeatures()),
        guide(loss=HardNegative(), pairs=RealNegatives(count=5), real=REAL),
        ClassifierGuidance(TowardsClass(), encoder(seed=8)),
    ),
}


@pytest.mark.parametrize("kind", WALKS)
def test_a_guided_block_is_the_same_twice_and_the_global_stream_is_untouched(kind):
    """By one guidance used again, after another block, and by a new one; guidance does something."""
    guidance, sampler = WALKS[kind](), Heun(churn=10.0, guide_second=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = run(sampler, SIGMAS, guidance)
    other = run(sampler, SIGMAS, guidance, block=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, run(sampler, SIGMAS, guidance))
    assert torch.equal(first, run(sampler, SIGMAS, WALKS[kind]()))
    assert torch.equal(other, run(sampler, SIGMAS, WALKS[kind](), block=1))
    assert not torch.equal(first, run(sampler, SIGMAS))
    assert first.isfinite().all()
    assert first.dtype == f64
    assert math.isfinite(float(other.sum()))
