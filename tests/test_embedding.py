"""The embedding network: its size, its learner's steps by hand, resuming to the bit, the authors' per-run scheme."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from authors import ABAR, authors_hnm, authors_run
from worlds import ENCODER, LABELS, NOISE, f64, randn, run

from gambeson.sampling import (
    DDIM,
    Contrastive,
    ContrastiveGuidance,
    EmbeddingLearner,
    EmbeddingNetwork,
    FittedEmbedding,
    HardNegative,
    InfoNCE,
    PerRunEmbedding,
    RealImages,
    RealPositives,
    TimestepWindow,
    Window,
    ddim_sigmas,
    ddim_timesteps,
    karras_sigmas,
)


def network(seed=0):
    return PerRunEmbedding(width=8, outputs=5).build(4, seed).double()


def hnm(embed, shift=0):
    return HardNegative()(embed(randn(6, 4, seed=1 + shift)), embed(randn(6, 4, seed=2 + shift)))


def test_the_authors_network():
    net, state = FittedEmbedding().build(640), torch.get_rng_state()
    assert sum(p.numel() for p in net.parameters()) == 98_560
    again, other = EmbeddingNetwork(640, seed=0), EmbeddingNetwork(640, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not torch.equal(net.first.weight, other.first.weight)
    assert torch.equal(torch.get_rng_state(), state)  # drawn from the seed, not from the global stream
    assert float(net.first.weight.detach().abs().max()) == pytest.approx(640**-0.5, rel=1e-3)  # as torch draws them
    assert float(net.second.bias.detach().std()) == pytest.approx(1 / math.sqrt(3 * 128), rel=0.2)
    x = randn(3, 640, dtype=torch.float32)
    by_hand = (x @ net.first.weight.T + net.first.bias).clamp_min(0) @ net.second.weight.T + net.second.bias
    torch.testing.assert_close(net(x), by_hand / by_hand.norm(dim=1, keepdim=True))


def test_two_steps_of_the_learner_are_adam_by_hand():
    """Kingma and Ba 2015, algorithm 1, on the mean of the losses."""
    net = network()
    reference = copy.deepcopy(net)
    learner, m, v = EmbeddingLearner(net, learning_rate=0.01), {}, {}
    for t in (1, 2):
        mean = hnm(reference, t).mean()
        gradients = torch.autograd.grad(mean, list(reference.parameters()))
        for i, (p, g) in enumerate(zip(reference.parameters(), gradients, strict=True)):
            m[i], v[i] = 0.9 * m.get(i, 0) + 0.1 * g, 0.999 * v.get(i, 0) + 0.001 * g**2
            with torch.no_grad():
                p -= 0.01 * (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
        assert learner.learn(lambda embed, t=t: hnm(embed, t)) == pytest.approx(mean.item(), abs=1e-12)
        for ours, hand in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, hand, rtol=0, atol=1e-12)
            assert ours.grad is None


def test_a_resumed_learner_goes_on_to_the_bit():
    straight = EmbeddingLearner(network())
    fresh = EmbeddingLearner(network(seed=3))
    fresh.load(straight.save())  # before the first step, when Adam holds nothing
    for i in range(5):
        straight.learn(lambda embed, i=i: hnm(embed, i))
        if i == 2:
            saved = straight.save()
    held = {name: tensor.clone() for name, tensor in saved.items()}
    resumed = EmbeddingLearner(network(seed=9))
    resumed.learn(hnm)
    resumed.load(saved)
    for i in (3, 4):
        resumed.learn(lambda embed, i=i: hnm(embed, i))
    assert all(torch.equal(a, resumed.save()[name]) for name, a in straight.save().items())
    assert all(torch.equal(saved[name], tensor) for name, tensor in held.items())  # copies, not views
    for i in range(5):
        fresh.learn(lambda embed, i=i: hnm(embed, i))
    assert all(torch.equal(a, fresh.save()[name]) for name, a in straight.save().items())


def learning(learner, **options):
    options = {"loss": HardNegative(), "window": TimestepWindow(first=400), "embedding": PerRunEmbedding()} | options
    return ContrastiveGuidance(Contrastive(**options), ENCODER, learner=learner)


def test_the_authors_scheme_with_embedding():
    """One backward for image and network, one Adam step per guided step, one network through two blocks."""
    times, lam = ddim_timesteps(60, "quad"), 4000.0
    literal, learner = network(), EmbeddingLearner(network(), 1e-2)
    guidance = learning(learner, strength=lam, strength_convention="paper")
    adam = torch.optim.Adam(literal.parameters(), lr=1e-2)
    for block in range(2):
        noise = randn(6, 1, 3, 3, seed=20 + block)
        theirs, guided = authors_run(noise, LABELS, times, lam, literal, adam)
        ours = run(DDIM(vp_start=True), ddim_sigmas(ABAR, times), guidance, noise, block=block)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        assert guided == guidance.tally["guided"] / 6 > 10
    for a, b in zip(learner.network.parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    moved = (learner.network.first.weight - network().first.weight).abs().max()
    assert float(moved.detach()) > 0.05


def test_learning_lowers_the_loss_and_a_frozen_network_stays():
    learner, sigmas = EmbeddingLearner(network(), 1e-2), karras_sigmas(24, 0.05, 20.0)
    z1, z2 = ENCODER(NOISE).detach(), ENCODER(NOISE + 0.1 * randn(6, 1, 3, 3, seed=8)).detach()
    before = authors_hnm(learner.network(z1), learner.network(z2))
    for block in range(3):
        run(DDIM(), sigmas, learning(learner, window=Window(), strength=0.0), block=block)
    assert authors_hnm(learner.network(z1), learner.network(z2)) < before
    weights = learner.network.first.weight.clone()
    spec = Contrastive(loss=InfoNCE(), window=Window(), strength=1.0, embedding=FittedEmbedding())
    frozen = ContrastiveGuidance(spec, ENCODER, embedding=learner.network)
    frozen.check(sigmas, LABELS, shape=(1, 3, 3))
    first, again = run(DDIM(), sigmas, frozen), run(DDIM(), sigmas, frozen)
    assert torch.equal(first, again)
    assert torch.equal(learner.network.first.weight, weights)
    without = ContrastiveGuidance(Contrastive(loss=InfoNCE(), window=Window(), strength=1.0), ENCODER)
    assert not torch.equal(first, run(DDIM(), sigmas, without))


def test_a_learner_sees_real_images_through_its_network_of_the_moment():
    """Cached are the encoder's features; a step of the learner changes what all of them are embedded as."""
    real = RealImages(randn(12, 1, 3, 3, seed=2).sigmoid(), torch.arange(12) % 3)
    spec = Contrastive(
        loss=InfoNCE(), pairs=RealPositives(), window=Window(), strength=2.0, embedding=PerRunEmbedding()
    )
    learner, shifts = EmbeddingLearner(network(), 0.05), []
    guidance = ContrastiveGuidance(spec, ENCODER, real=real, learner=learner)
    state, sigmas = guidance.init(0), karras_sigmas(4, 0.5, 5.0)
    steps = list(DDIM()(lambda x, s, labels=None: 0.5 * x, NOISE, sigmas, labels=LABELS))
    for _ in range(2):
        before = copy.deepcopy(learner.network)
        shift, state = guidance(state, steps[1])
        leaf = (steps[1].x / math.sqrt(1 + steps[1].sigma ** 2)).requires_grad_()
        q, p = before(ENCODER(leaf)), before(state.reals.features)
        logits = torch.cat([(q * p).sum(1, keepdim=True), (q @ q.T).fill_diagonal_(-math.inf)], dim=1) / 0.1
        loss = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64), reduction="sum")
        expected = -steps[1].sigma * 2.0 * torch.autograd.grad(loss, leaf)[0]
        torch.testing.assert_close(shift, expected, rtol=0, atol=1e-10)
        shifts.append(shift)
    assert not torch.equal(*shifts)


NET = network()
SAVED = EmbeddingLearner(network()).save()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: NET(randn(3, 5)), "width 4, got 5"),
        (lambda: FittedEmbedding(warmup_blocks=0), "warmup_blocks"),
        (lambda: PerRunEmbedding(learning_rate=0.0), "learning_rate"),
        (lambda: FittedEmbedding(outputs=0), "width, outputs"),
        (lambda: EmbeddingLearner(NET).load(SAVED | {"network.third": NOISE}), "unexpected .*third"),
        (lambda: EmbeddingLearner(NET).load(SAVED | {"adam.0.step": NOISE}), "missing .*adam.0.exp_avg"),
        (lambda: EmbeddingLearner(NET).load(SAVED | {"network.first.bias": NOISE}), "another shape .*first.bias"),
        (
            lambda: ContrastiveGuidance(Contrastive(), ENCODER, embedding=NET).init(0),
            "no embedding network, got embedding",
        ),
        (lambda: ContrastiveGuidance(Contrastive(embedding=FittedEmbedding()), ENCODER).init(0), "got none; a Fitted"),
        (
            lambda: ContrastiveGuidance(Contrastive(embedding=PerRunEmbedding()), ENCODER, embedding=NET).check(
                karras_sigmas(9)
            ),
            "expected learner, got embedding",
        ),
        (
            lambda: ContrastiveGuidance(
                Contrastive(embedding=FittedEmbedding()), ENCODER, embedding=FittedEmbedding().build(7).double()
            ).check(karras_sigmas(9), shape=(1, 3, 3)),
            "width 7, got 4",
        ),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_dtype():
    assert network()(randn(2, 4)).dtype == f64
