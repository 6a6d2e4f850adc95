"""Training losses: hand-worked values, the published steps written out, and what every one of them promises."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gambeson import canonical
from gambeson.errors import UserError
from gambeson.robustness import awp, inner, objectives, terms
from gambeson.robustness.losses import (
    AWP,
    MART,
    SCORE,
    TRADES,
    AdamSteps,
    Curriculum,
    PGDAdversarial,
    Plain,
    SteepestSteps,
    TrainingLoss,
)
from gambeson.threat import ThreatModel

LINF, L2 = ThreatModel(epsilon=0.1), ThreatModel(norm="l2", epsilon=0.6)
BASES = [TRADES(threat=LINF, steps=3), MART(threat=LINF, steps=3), SCORE(threat=LINF, steps=3)]
BASES = [replace(b, step_size=0.04) for b in BASES]
PGD_AT = PGDAdversarial(threat=LINF, steps=3, step_size=0.04)
WRAPPED = [AWP(loss=BASES[0]), AWP(loss=BASES[1]), Curriculum(loss=PGD_AT), Curriculum(loss=AWP(loss=BASES[2]))]
ALL = [*BASES, PGD_AT, Plain(), *WRAPPED]


def named(loss):
    inside = getattr(loss, "loss", None)
    return type(loss).__name__ + (f"-{named(inside)}" if inside else "")


def table(losses):
    return pytest.mark.parametrize("loss", losses, ids=named)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def network(seed=1):
    """Convolutions and batch norms on 1x8x8 images, 10 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 8, 8, generator=g), torch.randint(10, (12,), generator=g)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rebased(loss, **changes):
    """The loss with fields of its innermost loss changed; those that it lacks are left out."""
    if hasattr(loss, "loss"):
        return replace(loss, loss=rebased(loss.loss, **changes))
    return replace(loss, **{k: v for k, v in changes.items() if hasattr(loss, k)})


# ---- by hand: images that are logits, a network that passes them on ----

P, Q = [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]  # clean and adversarial probabilities
KL = 0.6 * math.log(3) + 0.3 * math.log(0.6) - 0.1 * math.log(3)  # .396058...


def at_hand(loss, label, p=P, q=Q):
    """The value of one image whose probabilities are p where clean and q where attacked."""
    clean, moved = (double(r).log().reshape(1, 1, 1, -1) for r in (p, q))
    return loss.value(nn.Flatten(), clean, moved, double([label]) if isinstance(label, list) else torch.tensor([label]))


@pytest.mark.parametrize(
    ("loss", "label", "expected"),
    [
        (MART(), 0, 3.094702007151),  # ln 10 + 5 x .396058457 x .4: the wrong class leads
        (MART(), 1, -math.log(0.5) - math.log(0.7) + 5 * KL * 0.7),  # the right one leads, .3 comes next
        (MART(beta=2.0), 2, -math.log(0.3) - math.log(0.5) + 2 * KL * 0.9),
        (MART(label_smoothing=0.3), 0, -0.8 * math.log(0.2) - 0.1 * math.log(0.15) - math.log(0.5) + 5 * KL * 0.4),
        (SCORE(), 0, 0.98),  # .16 + .09 + .01 + 3 (.16 + .04 + .04)
        (SCORE(), 2, 1.98),  # .36 + .09 + .81
        (SCORE(clip=0.2), 0, 0.38),
        (SCORE(clip=0.3), 0, 0.26),
        (SCORE(label_smoothing=0.1), 0, (0.1 + 0.064 + 0.004) / 0.9 + 0.72),  # t = (.9333, .0333, .0333)
        (TRADES(), 1, -math.log(0.3) + 6 * KL),
        (PGDAdversarial(), 1, -math.log(0.5)),
        (Plain(), 2, -math.log(0.3)),
        (Plain(label_smoothing=0.3), 2, -0.1 * math.log(0.2) - 0.1 * math.log(0.5) - 0.8 * math.log(0.3)),
    ],
    ids=repr,
)
def test_values_by_hand(loss, label, expected):
    close(at_hand(loss, label), double([expected]))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (TRADES(), -0.7 * math.log(0.6) - 0.3 * math.log(0.1) + 6 * KL),
        (TRADES(label_smoothing=0.3), -0.59 * math.log(0.6) - 0.1 * math.log(0.3) - 0.31 * math.log(0.1) + 6 * KL),
        (PGDAdversarial(), -0.7 * math.log(0.2) - 0.3 * math.log(0.3)),
        (SCORE(), 0.01 + 0.09 + 0.04 + 0.72),
        (SCORE(label_smoothing=0.3), 0.01**2 + 0.2**2 + 0.21**2 + 0.72),
        (Plain(), -0.7 * math.log(0.2) - 0.3 * math.log(0.3)),
    ],
    ids=repr,
)
def test_soft_values_by_hand(loss, expected):
    """Targets (.7, 0, .3); smoothing .3 makes them (.59, .1, .31)."""
    close(at_hand(loss, [0.7, 0.0, 0.3]), double([expected]))


def published_mart(clean, moved, y, beta):
    """The authors' formula with its clamps (YisenWang/MART), one number per image."""
    p, q = clean.softmax(1), moved.softmax(1)
    order = q.argsort(1)
    rival = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    bce = F.cross_entropy(moved, y, reduction="none") + F.nll_loss((1.0001 - q + 1e-12).log(), rival, reduction="none")
    kl = F.kl_div((q + 1e-12).log(), p, reduction="none").sum(1)
    return bce + beta * kl * (1.0000001 - p.gather(1, y[:, None]).squeeze(1))


def test_mart_is_the_published_one_but_for_its_clamps():
    """Values within 1e-3 and gradients within 1 %, also through the weight 1 - p_y."""
    logits = 2 * torch.randn(2, 40, 1, 1, 6, generator=seeded(), dtype=torch.float64)
    y = torch.randint(6, (40,), generator=seeded())
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a = MART().value(nn.Flatten(), *ours, y)
    b = published_mart(*theirs.flatten(2), y, 5.0)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    a.sum().backward(), b.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-3)


def test_mart_is_finite_and_falls_for_a_network_that_is_sure_and_wrong():
    """Logits (0, 200, 0), label 0: 200 - log p_y's other half, 200 - ln 2, where a clamp has no slope left."""
    moved = torch.tensor([0.0, 200.0, 0.0]).reshape(1, 1, 1, 3).requires_grad_()
    value = MART(beta=0.0).value(nn.Flatten(), moved.detach(), moved, torch.tensor([0]))
    close(value, torch.tensor([400 - math.log(2)]), 1e-3)
    value.sum().backward()
    close(moved.grad.flatten(), torch.tensor([-1.5, 2.0, -0.5]), 1e-5)


def test_score_smoothing_converts_to_the_authors():
    """Their e = .1 of 4 classes: .9 and .1/3; here label_smoothing e K / (K - 1)."""
    t = terms.distribution(torch.tensor([2]), torch.zeros(1, 4).double(), 0.1 * 4 / 3)
    close(t, double([[0.1 / 3, 0.1 / 3, 0.9, 0.1 / 3]]))


def test_squared_distance_slope():
    z = torch.randn(5, 4, generator=seeded(), dtype=torch.float64).requires_grad_()
    q = torch.randn(5, 4, generator=seeded(1), dtype=torch.float64).softmax(1)
    (slope,) = torch.autograd.grad(terms.squared_distance(z.softmax(1), q).sum(), z)
    close(terms.squared_distance_slope(z.detach(), q), slope, 1e-14)


# ---- the inner attack ----


def with_start(monkeypatch):
    """Starts that belong to the image: a fixed pattern instead of draws."""
    pattern = 0.05 * torch.sin(torch.arange(64.0)).reshape(1, 1, 8, 8)
    monkeypatch.setattr(objectives, "random_start", lambda _, images, __: (images + pattern.to(images)).clamp(0, 1))


OBJECTIVES = {
    "TRADES": lambda z, clean, y: F.kl_div(z.log_softmax(1), clean.softmax(1), reduction="none").sum(1),
    "SCORE": lambda z, clean, y: (z.softmax(1) - clean.softmax(1)).square().sum(1),
    "MART": lambda z, clean, y: F.cross_entropy(z, y, reduction="none"),
    "PGDAdversarial": lambda z, clean, y: F.cross_entropy(z, y, reduction="none"),
}


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@table([*BASES, PGD_AT])
def test_every_attack_climbs_its_objective(loss, threat, batch, monkeypatch):
    """Against autograd of the objective, Adam steps against torch.optim.Adam, both projected."""
    with_start(monkeypatch)
    (x, y), model = batch, network().double().eval()
    x = x.double()
    clean, objective = model(x).detach(), OBJECTIVES[named(loss)]
    for climb in (SteepestSteps(), AdamSteps(learning_rate=0.03, later_rate=0.004, later_from=2)):
        loss = replace(loss, threat=threat, climb=climb, steps=4)
        moving = objectives.random_start(threat, x, None).clone().requires_grad_()
        optimiser = torch.optim.Adam([moving], lr=0.03, eps=1e-9, maximize=True)
        for step in range(4):
            moving.grad = torch.autograd.grad(objective(model(moving), clean, y).sum(), moving)[0]
            with torch.no_grad():
                if isinstance(climb, AdamSteps):
                    optimiser.param_groups[0]["lr"] = 0.03 if step < 2 else 0.004
                    optimiser.step()
                else:
                    moving += 0.04 * threat.steepest(moving.grad)
                moving.copy_(threat.project(moving, x))
        close(loss.adversarial(model, x, y), moving.detach(), 1e-7)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("climb", [SteepestSteps(), AdamSteps()], ids=lambda c: type(c).__name__)
@table(ALL)
def test_adversarial_images_lie_in_the_ball(loss, climb, threat, batch):
    """Also under autocast, where they stay float32; the first Adam steps go past every wall."""
    (x, y), model = batch, network()
    loss = rebased(loss, threat=threat, climb=climb)
    with torch.autocast("cpu", torch.bfloat16):
        attacked = loss.adversarial(model, x, y, seeded())
    for found in (loss.adversarial(model, x, y, seeded()), attacked):
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert threat.distance(found, x).max() <= threat.epsilon * (1 + 1e-5)
        assert found.min() >= 0
        assert found.max() <= 1
        assert torch.equal(found, x) == (loss == Plain())


class Spy(nn.Module):
    """Notes what each pass is like."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.seen = inside, []

    def forward(self, x):
        asks = any(p.requires_grad for p in self.inside.parameters())
        self.seen.append((len(x), asks, self.inside[1].training))
        return self.inside(x)


@table([*BASES, PGD_AT])
def test_passes_are_counted(loss, batch):
    """3 steps without parameter gradients, one clean pass where p(x) is needed, one last pass that learns."""
    clean = [(12, False, False)] * (named(loss) in ("TRADES", "SCORE"))
    last = (12 if loss == PGD_AT else 24, True, True)
    spy = Spy(network())
    loss(spy, *batch)
    assert spy.seen == [*clean, *[(12, False, False)] * 3, last]


# ---- batch norms ----


def statistics_of(model):
    return [b.clone() for m in (model[1], model[4]) for b in (m.running_mean, m.running_var, m.num_batches_tracked)]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("statistics", ["together", "both", "clean", "adversarial"])
@table(BASES)
def test_statistics_move_as_promised(loss, statistics, mode, batch):
    """The first batch norm sees conv(x): its running mean tells which images passed, and how often."""
    (x, y), model = batch, network()
    model[0].bias.requires_grad_(False)
    model[4].eval()
    loss, before = replace(loss, statistics=statistics, attack_mode=mode), statistics_of(model)
    moved = loss.adversarial(model, x, y, seeded())
    assert all(map(torch.equal, statistics_of(model), before))
    loss(model, x, y, seeded())
    a, b = (model[0](images).mean((0, 2, 3)).detach() for images in (x, moved))
    mean, passes = {
        "together": (0.1 * (a + b) / 2, 1),
        "both": (0.09 * a + 0.1 * b, 2),
        "clean": (0.1 * a, 1),
        "adversarial": (0.1 * b, 1),
    }[statistics]
    close(model[1].running_mean, mean, 1e-6)
    assert not torch.allclose(a, b, atol=1e-4)
    assert model[1].num_batches_tracked == passes
    assert all(map(torch.equal, statistics_of(model)[3:], before[3:]))
    assert [m.training for m in model] == [True] * 4 + [False] + [True] * 3
    assert [m.track_running_stats for m in (model[1], model[4])] == [True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False] + [True] * 8


def test_two_passes_normalise_each_by_its_own(batch):
    (x, y), loss = batch, TRADES(threat=LINF, steps=2)
    moved = loss.adversarial(network(), x, y)
    clean, other = (network()(images) for images in (x, moved))
    ce, kl = F.cross_entropy(clean, y, reduction="none"), terms.kl_divergence(clean, other)
    for statistics in ("both", "clean", "adversarial"):
        value = replace(loss, statistics=statistics).value(network(), x, moved, y)
        assert torch.equal(value, ce + 6 * kl)
    assert not torch.allclose(loss.value(network(), x, moved, y), value, atol=1e-3)


@table([*BASES, PGD_AT])
def test_attack_mode_train_goes_by_the_batch(loss, batch):
    """As a network that never had running statistics; `eval` goes by those; a batch norm in eval mode stays there."""
    (x, y), model = batch, network()
    for norm in (model[1], model[4]):
        norm.running_mean += 0.5
    bare = copy.deepcopy(model)
    for norm in (bare[1], bare[4]):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    by_batch, by_running = (replace(loss, attack_mode=mode).adversarial(model, x, y) for mode in ("train", "eval"))
    assert torch.equal(by_batch, loss.adversarial(bare, x, y))
    assert not torch.equal(by_batch, by_running)
    assert torch.equal(replace(loss, attack_mode="train").adversarial(model.eval(), x, y), by_running)


def test_flags_come_back_after_a_failure():
    model = network()

    def inside():
        with inner.attacked(model, "train"):
            assert model[1].training
            assert not model[1].track_running_stats
            assert not model[2].training
            assert not any(p.requires_grad for p in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert all(m.training for m in model.modules())
    assert model[1].track_running_stats
    assert all(p.requires_grad for p in model.parameters())


# ---- what every loss promises ----


@table(ALL)
def test_promises_of_every_loss(loss, batch):
    """One number per image that is adversarial, then value; no generator means seed 0; the global stream is kept."""
    (x, y), model = batch, network()
    assert isinstance(loss, TrainingLoss)
    before = torch.get_rng_state()
    value = loss(model, x, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert value.shape == (12,)
    assert value.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())
    assert model[1].num_batches_tracked == 1
    value.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = network()
    assert torch.equal(loss.value(again, x, loss.adversarial(again, x, y, seeded()), y), value)
    assert torch.equal(loss(network(), x, y, seeded(1)), value) == (loss == Plain())


@table([loss for loss in ALL if "AWP" not in named(loss)])
def test_an_images_loss_is_its_own(loss, batch, monkeypatch):
    """In eval mode, one image at a time; AWP is left out: its perturbation is the batch's."""
    with_start(monkeypatch)
    (x, y), model = batch, network().double().eval()
    x = x.double()
    for climb in (SteepestSteps(), AdamSteps()):
        alone = rebased(loss, climb=climb)
        whole = alone(model, x, y)
        close(torch.cat([alone(model, x[i : i + 1], y[i : i + 1]) for i in range(12)]), whole, 1e-9)
        close(alone(model, x.flip(0), y.flip(0)).flip(0), whole, 1e-9)


@table([loss for loss in ALL if "MART" not in named(loss)])
def test_soft_one_hot_rows_are_labels(loss, batch):
    x, y = batch
    for smoothing in (0.0, 0.2):
        loss = rebased(loss, label_smoothing=smoothing)
        close(loss(network(), x, F.one_hot(y, 10).float()), loss(network(), x, y), 1e-5)


@table([loss for loss in ALL if "MART" in named(loss)])
def test_mart_refuses_soft_targets(loss, batch):
    x, y = batch
    soft = F.one_hot(y, 10).float()
    calls = (loss, loss.adversarial, lambda model, images, labels: loss.value(model, images, images, labels))
    for call in calls:
        with pytest.raises(UserError, match=r"one class per image.*TRADES"):
            call(network(), x, soft)


@table(ALL)
def test_autocast_costs_little(loss, batch):
    """bfloat16 networks, float32 losses: within 5 % and .1 of float32, gradients pointing the same way."""
    x, y = batch
    found = []
    for enabled in (False, True):
        model = network()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss.value(model, x, loss.adversarial(model, x, y), y)
            assert value.dtype == torch.float32
        value.mean().backward()
        found.append((value.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (value, gradient), (cast_value, cast_gradient) = found
    assert not torch.equal(value, cast_value)
    torch.testing.assert_close(cast_value, value, rtol=0.05, atol=0.1)
    assert F.cosine_similarity(gradient, cast_gradient, dim=0) > 0.95


@table([*BASES, PGD_AT, Plain()])
def test_nothing_is_computed_in_half_precision(loss, batch):
    """A network that ends in bfloat16 gives the bits of one whose bfloat16 logits were widened first."""
    x, y = batch
    model = network().eval()

    def rounded(images):
        return model(images).bfloat16()

    def widened(images):
        return rounded(images).float()

    with torch.autocast("cpu", torch.bfloat16):
        moved = loss.adversarial(rounded, x, y)
        assert torch.equal(moved, loss.adversarial(widened, x, y))
        value = loss.value(rounded, x, moved, y)
        assert torch.equal(value, loss.value(widened, x, moved, y))
    assert value.dtype == torch.float32


def test_new_fields_leave_old_digests():
    """A recipe from before this change keeps its name; another choice is another recipe."""
    plain = canonical.plain(TRADES(), drop_neutral=True)
    assert set(plain) == {"class", "threat", "beta", "steps", "step_size", "label_smoothing"}
    plain = canonical.plain(PGDAdversarial(), drop_neutral=True)
    assert set(plain) == {"class", "threat", "steps", "step_size", "label_smoothing"}
    others = [TRADES(), TRADES(statistics="both"), TRADES(attack_mode="train"), TRADES(climb=AdamSteps()), *ALL]
    assert len({canonical.digest(o) for o in others}) == len(others)
    for loss in ALL:
        assert set(canonical.field_help(type(loss))) == set(canonical.hints(type(loss)))
        for hint in canonical.hints(type(loss)).values():
            canonical.components(hint)


# ---- adversarial weight perturbation ----


def test_awp_by_hand():
    """W = diag(1, 2), x = (.5, 1), y = 0: g = p_1 (-x, x), so v = .1 sqrt 2 (-x, x) whatever p_1 is.

    ||W|| = sqrt 5 and ||(-x, x)|| = sqrt 2.5; the logits part by 2 x .1 sqrt 2 x 1.25 more, the biases are left alone.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, dtype=torch.float64))
    model[1].weight.data, model[1].bias.data = double([[1, 0], [0, 2]]), double([0.3, 0.2])
    x = double([0.5, 1.0]).reshape(1, 1, 1, 2)
    value = AWP(loss=PGDAdversarial(), gamma=0.1).value(model, x, x, torch.tensor([0]))
    gap = 1.5 - 0.1 + 0.25 * math.sqrt(2)
    close(value.detach(), double([1.913252267137]))
    close(value.detach(), double([math.log1p(math.exp(gap))]))
    value.sum().backward()
    wrong = 1 / (1 + math.exp(-gap))
    close(model[1].weight.grad, wrong * double([[-0.5, -1.0], [0.5, 1.0]]))
    close(model[1].bias.grad, wrong * double([-1.0, 1.0]))
    close(model[1].weight.data, double([[1, 0], [0, 2]]))


def perturbed_in_place(loss, gamma, model, x, moved, y):
    """The published steps: ascend a proxy, add the difference to the weights, backward, take it away again."""
    proxy = copy.deepcopy(model)
    loss.value(proxy, x, moved, y).mean().backward()
    weights = [(w, p.grad) for w, p in zip(model.parameters(), proxy.parameters(), strict=True) if w.dim() > 1]
    diffs = [gamma * w.detach().norm() / (g.norm() + 1e-20) * g for w, g in weights]
    with torch.no_grad():
        for (w, _), d in zip(weights, diffs, strict=True):
            w.add_(d)
    value = loss.value(model, x, moved, y)
    value.mean().backward()
    with torch.no_grad():
        for (w, _), d in zip(weights, diffs, strict=True):
            w.sub_(d)
    return value.detach()


@pytest.mark.parametrize("statistics", ["together", "adversarial"])
@table([*BASES, PGD_AT])
def test_awp_is_perturb_backward_restore(loss, statistics, batch):
    """Equal values, gradients and running statistics; weights are never touched and flags come back."""
    x, y = batch
    loss = rebased(loss, statistics=statistics)
    literal, model = network().double(), network().double()
    x, weights = x.double(), [p.detach().clone() for p in model.parameters()]
    moved = loss.adversarial(model, x, y)
    expected = perturbed_in_place(loss, 0.05, literal, x, moved, y)
    value = AWP(loss=loss, gamma=0.05).value(model, x, moved, y)
    value.mean().backward()
    close(value.detach(), expected)
    for a, b in zip(model.parameters(), literal.parameters(), strict=True):
        close(a.grad, b.grad)
    assert all(map(torch.equal, weights, model.parameters()))
    for a, b in zip(model.buffers(), literal.buffers(), strict=True):
        close(a, b)
    assert model[1].track_running_stats
    assert value.mean() > loss.value(network().double(), x, moved, y).mean()


def test_awp_goes_by_the_average_of_all_processes(batch, monkeypatch):
    """Another process's opposite gradient turns the perturbation round."""
    (x, y), model = batch, network().eval()
    one = AWP(loss=PGD_AT, gamma=0.05).value(model, x, x, y).mean()
    monkeypatch.setattr(awp.distributed, "average", lambda gradients: [g.neg_() for g in gradients])
    other = AWP(loss=PGD_AT, gamma=0.05).value(model, x, x, y).mean()
    assert other < PGD_AT.value(model, x, x, y).mean() < one


def test_awp_leaves_what_does_not_train_or_has_no_slope(batch):
    (x, y), model = batch, network()
    model[0].weight.requires_grad_(False)
    model.register_parameter("idle", nn.Parameter(torch.ones(2, 2)))
    nn.init.zeros_(model[7].weight)  # norm 0: no perturbation either
    AWP(loss=PGD_AT)(model, x, y).mean().backward()
    assert model.idle.grad is None
    assert model[0].weight.grad is None
    assert model[7].weight.grad.isfinite().all()


# ---- losses that change during the training ----


@table([*BASES, PGD_AT, Plain()])
def test_most_losses_stay(loss):
    assert all(loss.at(progress) is loss for progress in (0.0, 0.3, 1.0))


def test_awp_begins_after_its_warm_up():
    loss = AWP(loss=PGD_AT, warmup=0.25)
    assert [loss.at(p) for p in (0.0, 0.2499, 0.25, 1.0)] == [PGD_AT, PGD_AT, loss, loss]
    assert AWP(loss=PGD_AT).at(0.0) == AWP(loss=PGD_AT)


def test_a_curriculum_by_hand():
    """2 to 10 steps over half the training, a quarter of the ball to all of it over 80 % of it.

    At .1: 2 + 8 / 5 = 3.6 -> 4 steps; (1 - cos(pi / 8)) / 2 = .0380602 -> .2785452 of the ball.
    At .4: 8.4 -> 8 steps; half a cosine is half way: .625. Steps x step_size / epsilon = 2.5, at most 1.25 a step.
    """
    loss = Curriculum(loss=TRADES(threat=ThreatModel(epsilon=0.08), step_size=0.02), first_epsilon=0.25)
    loss = replace(loss, epsilon_until=0.8)
    for progress, steps, share, size in (
        (0.0, 2, 0.25, 1.25),
        (0.1, 4, 0.2785452, 0.625),
        (0.4, 8, 0.625, 0.3125),
        (0.6, 10, 0.25 + 0.75 * (1 - math.cos(0.75 * math.pi)) / 2, 0.25),
    ):
        now = loss.at(progress)
        assert now.steps == steps
        assert now.threat.epsilon == pytest.approx(0.08 * share, rel=1e-6)
        assert now.step_size / now.threat.epsilon == pytest.approx(size)
    assert loss.at(0.8) == loss.at(1.0) == loss.loss


def test_a_curriculum_caps_its_steps():
    """One step of 2.5 epsilon is cut to 1.25; a loss that takes 2 epsilon at the end does so throughout."""
    loss = TRADES(threat=ThreatModel(epsilon=0.08), step_size=0.02)
    assert Curriculum(loss=loss, first_steps=1).at(0.0).step_size == pytest.approx(0.1)
    assert Curriculum(loss=replace(loss, step_size=0.16)).at(0.0).step_size == pytest.approx(0.16)


@table([*BASES, PGD_AT, AWP(loss=BASES[1], warmup=0.3)])
def test_a_curriculum_ends_as_its_loss(loss, batch):
    """Whatever it holds; steps never fall; inside AWP it is the loss's attack that grows."""
    grown = Curriculum(loss=loss, first_steps=1, first_epsilon=0.5)
    assert grown.at(1.0) == loss
    bases = [now.loss if isinstance(now, AWP) else now for now in (grown.at(p / 20) for p in range(21))]
    for rising in ([b.steps for b in bases], [b.threat.epsilon for b in bases]):
        assert rising == sorted(rising)
        assert rising[0] < rising[-1]
    if isinstance(loss, AWP):
        assert [type(grown.at(p)) for p in (0.0, 0.29, 0.3, 1.0)] == [MART, MART, AWP, AWP]
    assert torch.equal(grown(network(), *batch), loss(network(), *batch))


def test_a_curriculum_needs_the_threat_only_while_it_grows():
    assert Curriculum().at(1.0) == TRADES()
    with pytest.raises(ValueError, match="threat"):
        Curriculum().at(0.0)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MART(beta=-1.0), "MART beta"),
        (lambda: MART(steps=0), "MART steps"),
        (lambda: SCORE(step_size=0.0), "SCORE step_size"),
        (lambda: SCORE(clip=2.0), "SCORE clip"),
        (lambda: SCORE(label_smoothing=1.0), "SCORE label_smoothing"),
        (lambda: AdamSteps(learning_rate=0.0), "learning_rate"),
        (lambda: AdamSteps(later_rate=-1.0), "later_rate"),
        (lambda: AdamSteps(later_from=-1), "later_from"),
        (lambda: AWP(gamma=0.0), "AWP gamma"),
        (lambda: AWP(warmup=1.5), "AWP warmup"),
        (lambda: AWP().at(1.5), "progress"),
        (lambda: Curriculum(first_steps=11), "first_steps: expected 1 to the loss's 10"),
        (lambda: Curriculum(steps_until=-0.1), "steps_until"),
        (lambda: Curriculum(epsilon_until=1.1), "epsilon_until"),
        (lambda: Curriculum(first_epsilon=0.0), "first_epsilon"),
        (lambda: Curriculum().at(-0.1), "progress"),
    ],
)
def test_impossible_numbers(make, match):
    with pytest.raises(UserError, match=match):
        make()


@table([loss for loss in ALL if loss != Plain()])
def test_a_loss_needs_a_threat(loss, batch):
    with pytest.raises(ValueError, match="threat"):
        rebased(loss, threat=None)(network(), *batch)


@table([loss for loss in ALL if "MART" not in named(loss)])
def test_soft_targets_have_a_column_per_class(loss, batch):
    with pytest.raises(UserError, match=r"one column per class, \[B, 10\]"):
        loss(network(), batch[0], torch.full((12, 9), 1 / 9))


@pytest.mark.parametrize("model", [lambda z: z.flatten(1), network().requires_grad_(False), nn.Flatten()])
def test_awp_needs_weights(model, batch):
    x, y = batch
    with pytest.raises(UserError, match="weights that train"):
        AWP(loss=PGD_AT).value(model, x, x, y)
