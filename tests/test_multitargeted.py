"""MultiTargeted: the order of its climbs, its steps by hand, the linear optimum, and the promises of every attack."""

from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from gambeson.errors import UserError
from gambeson.robustness.attack_losses import CrossEntropy, Margin
from gambeson.robustness.attacks import PGD, TargetedAPGD
from gambeson.robustness.multitargeted import MultiTargeted, TargetedMargin
from gambeson.robustness.verdicts import robust_after
from gambeson.threat import ThreatModel

LINF, L2 = ThreatModel(epsilon=0.1), ThreatModel(norm="l2", epsilon=0.6)
THREATS = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


def linear(weight, bias):
    """logits = flatten(x) W^T + b."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data, layer.bias.data = weight, bias
    return nn.Sequential(nn.Flatten(), layer).eval()


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@pytest.fixture(scope="module")
def net(digits):
    """A small network of two layers, 2 s of plain training with noise on 1,400 digits."""
    images, labels = digits[0][:1400], digits[1][:1400]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
    stream = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(images), generator=stream).split(128):
            noisy = images[rows] + 0.15 * torch.randn(images[rows].shape, generator=stream)
            optimiser.zero_grad()
            CrossEntropy()(model(noisy), labels[rows]).mean().backward()
            optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(scope="module")
def held_out(digits):
    return digits[0][1400:1500], digits[1][1400:1500]


def test_targeted_margin_by_hand():
    """z = (2, 1, .5): towards 2 from 0 it is -1.5, towards 1 from 2 it is .5; the slope is +1 and -1."""
    z = torch.tensor([[2.0, 1.0, 0.5]] * 2, requires_grad=True)
    loss = TargetedMargin()(z, torch.tensor([0, 2]), torch.tensor([2, 1]))
    assert loss.tolist() == [-1.5, 0.5]
    (slope,) = torch.autograd.grad(loss.sum(), z)
    assert slope.tolist() == [[-1, 0, 1], [0, 1, -1]]


def test_every_class_once_before_any_again():
    ranked = torch.tensor([[7, 3, 5], [1, 2, 0]])
    for targets, order in ((None, [7, 3, 5, 7, 3, 5]), (2, [7, 3, 7, 3]), (9, [7, 3, 5, 7, 3, 5])):
        attack = MultiTargeted(restarts=2, targets=targets)
        assert attack.runs(4) == len(order)
        assert [attack.aim(ranked, torch.full((2,), run))[0].item() for run in range(len(order))] == order
    assert MultiTargeted().runs(10) == 90
    assert MultiTargeted().runs(2) == 10


@pytest.mark.parametrize(("step_size", "first"), [(None, 0.1), (0.04, 0.04)])
def test_steps_shrink_to_nothing(step_size, first):
    """A constant slope: steps of first (1 - k/4) for k = 0 .. 3 from the random start, stopped at the wall."""
    model, seen = linear(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), torch.tensor([5.0, 0.0])), []

    class Watched(nn.Module):
        def forward(self, images):
            seen.append(images.detach().clone().flatten())
            return model(images)

    x, y = torch.tensor([0.5, 0.5]).reshape(1, 1, 1, 2), torch.tensor([0])
    MultiTargeted(threat=LINF, steps=4, restarts=1, step_size=step_size)(Watched().eval(), x, y)
    at = seen[1]
    assert (at - 0.5).abs().max() <= 0.1
    assert len(seen) == 1 + 1 + 4
    for k in range(4):
        at = (at + first * (1 - k / 4) * torch.tensor([1.0, -1.0])).clamp(0.4, 0.6)
        torch.testing.assert_close(seen[2 + k], at)


@THREATS
def test_linear_optimum(threat):
    """Two classes, far from the edges of [0, 1]: the margin rises by eps times the dual norm of w1 - w0, no further."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(2, 12, generator=g, dtype=torch.float64)
    model = linear(w, torch.tensor([8.0, 0.0], dtype=torch.float64))
    x = 0.5 + 0.02 * (torch.rand(5, 3, 2, 2, generator=g, dtype=torch.float64) - 0.5)
    threat, y, d = replace(threat, epsilon=0.07), torch.zeros(5, dtype=torch.int64), w[1] - w[0]
    dual = d.abs().sum() if threat.norm == "linf" else d.norm()
    reached = Margin()(model(MultiTargeted(threat=threat, steps=30, restarts=1)(model, x, y)), y)
    torch.testing.assert_close(reached, Margin()(model(x), y) + 0.07 * dual, rtol=0, atol=1e-4)


def test_a_class_that_only_the_last_target_reaches():
    """z_2 is the least likely at first, and the only one that rises with the pixels: two targets miss it."""
    weight = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    model, x = linear(weight, torch.tensor([1.0, 0.9, -0.8, 0.5])), torch.full((1, 1, 1, 2), 0.5)
    y, attack = torch.tensor([0]), MultiTargeted(threat=ThreatModel(epsilon=0.45), steps=8, restarts=1)
    assert robust_after(replace(attack, targets=2), model, x, y).item()
    assert not robust_after(attack, model, x, y).item()


@THREATS
def test_promises(threat, net, held_out):
    """In the ball and the box; inputs, network and the global stream untouched; no image back from wrong to right."""
    attack, (x, y) = MultiTargeted(threat=threat, steps=6, restarts=2, targets=3), held_out
    before, kept, state = torch.get_rng_state(), x.clone(), {k: v.clone() for k, v in net.state_dict().items()}
    adversarial = attack(net, x, y, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, kept)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert threat.distance(adversarial, x).max() <= threat.epsilon * (1 + 1e-5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    with torch.no_grad():
        clean, attacked = net(x).argmax(1) == y, net(adversarial).argmax(1) == y
    assert not (attacked & ~clean).any()
    assert torch.equal(adversarial[~clean], x[~clean])


def test_verdicts_belong_to_the_image(net, held_out):
    """Batches of 1, 7 and 64 and a permutation give the same verdicts; another seed other starts."""
    attack, (x, y) = MultiTargeted(threat=LINF, steps=5, restarts=2, targets=3), held_out
    verdicts = robust_after(attack, net, x, y, batch_size=64)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    assert 5 < verdicts.sum() < 95
    assert torch.equal(robust_after(attack, net, x, y, batch_size=7), verdicts)
    assert torch.equal(robust_after(attack, net, x[:12], y[:12], batch_size=1), verdicts[:12])
    assert torch.equal(robust_after(attack, net, x[order], y[order], batch_size=64), verdicts[order])
    assert not torch.equal(attack(net, x, y, seed=0), attack(net, x, y, seed=1))


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes, held_out):
    g = torch.Generator().manual_seed(classes)
    model, x = linear(torch.randn(classes, 64, generator=g), torch.zeros(classes)), held_out[0][:40]
    y = model(x).argmax(1)
    attack = MultiTargeted(steps=10, restarts=1)
    small, large = (robust_after(replace(attack, threat=ThreatModel(epsilon=e)), model, x, y) for e in (0.01, 0.9))
    assert small.any()
    assert large.sum() < small.sum()


@THREATS
def test_no_weaker_than_its_neighbours(threat, net, held_out):
    """At 20 steps: no more left than by PGD on the margin, nor than by targeted AutoPGD."""
    left, pgd, targeted = (
        int(robust_after(attack, net, *held_out).sum())
        for attack in (
            MultiTargeted(threat=threat, steps=20, restarts=1),
            PGD(threat=threat, steps=20, restarts=1),
            TargetedAPGD(threat=threat, steps=20),
        )
    )
    assert 5 < left <= min(pgd, targeted)


@pytest.mark.parametrize("mistake", [{"steps": 0}, {"restarts": 0}, {"targets": 0}, {"step_size": 0.0}])
def test_mistakes_are_named(mistake):
    (name,) = mistake
    with pytest.raises(UserError, match=f"MultiTargeted {name}: expected"):
        MultiTargeted(**mistake)
    with pytest.raises(ValueError, match="expected a threat model, got None"):
        MultiTargeted()(nn.Flatten().eval(), torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))
