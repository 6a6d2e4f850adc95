"""L1: the projection onto ball and box against slow solvers, and AutoPGD's sparse steps against their authors'."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_digits import board_of, held_out, linear, trained
from torch import nn

from gambeson.robustness import l1
from gambeson.robustness.attack_losses import CrossEntropy, Margin, TargetedDLR
from gambeson.robustness.attacks import APGD, FGSM, PGD, TargetedAPGD, chase
from gambeson.robustness.l1 import SparseClimb
from gambeson.robustness.pursuit import Board, pursue
from gambeson.robustness.verdicts import robust_after
from gambeson.robustness.views import View
from gambeson.threat import ThreatModel, project_l1

L1 = ThreatModel(norm="l1", epsilon=2.0)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@dataclass(frozen=True, kw_only=True)
class Climbing:
    """The sparse climb as an attack of its own: so many restarts, or targets."""

    climb: SparseClimb
    restarts: int = 1

    @property
    def threat(self):
        return self.climb.threat

    def __call__(self, model, images, labels, seed=0):
        return chase(self, model, images, labels, seed).best

    def runs(self, classes):
        return min(self.restarts, classes - 1) if self.targeted else self.restarts

    @property
    def targeted(self):
        return isinstance(self.climb.loss, TargetedDLR)

    def aim(self, ranked, run):
        return ranked.gather(1, run[:, None]).squeeze(1) if self.targeted else ranked[:, 0]

    def begin(self, lanes):
        return self.climb.begin(lanes)

    def advance(self, view, lanes):
        return self.climb.advance(view, lanes)

    def finished(self, lanes):
        return self.climb.finished(lanes)


# ---- geometry ----


def test_projection_by_hand():
    """Moves .7, .4 and -.1 with room .5, .1 and .2, radius .5: a cut of .3 leaves .4, .1 (the box holds it) and 0."""
    threat = ThreatModel(norm="l1", epsilon=0.5)
    x, origin = double([[1.2, 1.3, 0.1]]), double([[0.5, 0.9, 0.2]])
    close(threat.project(x, origin), double([[0.9, 1.0, 0.2]]), 1e-12)
    assert threat.project(x, origin)[0, 2] == 0.2
    close(ThreatModel(norm="l1", epsilon=0.7).project(x, origin), double([[1.0, 1.0, 0.1]]), 1e-12)


def slowly(x, origin, radius):
    """The same cut found by 200 bisections, in float64."""
    x, origin = x.double(), origin.double()
    low, high = 0.0, (x - origin).abs().max().item()
    for _ in range(200):
        cut = (low + high) / 2
        moved = (origin + (x - origin).sign() * ((x - origin).abs() - cut).clamp_min(0)).clamp(0, 1)
        low, high = (cut, high) if (moved - origin).abs().sum() > radius else (low, cut)
    whole = x.clamp(0, 1)
    return whole if (whole - origin).abs().sum() <= radius else moved


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    st.sampled_from([1e-3, 0.05, 0.5, 3.0, 30.0]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 10_000),
)
def test_projection_is_the_nearest_point(number, spread, radius, precision, seed):
    """Against bisection; and <x - z, p - z> <= 0 for points p of the set, which only the nearest point z fulfils."""
    g = torch.Generator().manual_seed(seed)
    origin = torch.rand(6, number, generator=g, dtype=precision)
    origin = torch.where(torch.rand(6, number, generator=g) < 0.3, origin.round(), origin)
    x = origin + spread * torch.randn(6, number, generator=g, dtype=precision)
    threat = ThreatModel(norm="l1", epsilon=radius)
    z = threat.project(x, origin)
    fine = (2e-7 if precision == torch.float32 else 1e-14) * max(spread, 1)
    close(z.double(), torch.stack([slowly(*pair, radius) for pair in zip(x, origin, strict=True)]), 4 * fine)
    assert (threat.distance(z, origin) <= radius * (1 + 1e-5) + 1e-6).all()
    assert z.min() >= 0
    assert z.max() <= 1
    close(threat.project(z, origin), z, fine)
    others = torch.rand(50, 6, number, generator=g, dtype=precision)
    share = (radius / (others - origin).abs().sum(2, keepdim=True).clamp_min(1e-9)).clamp_max(1)
    others = origin + share * (others - origin)
    assert (((x - z) * (others - z)).sum(2) <= 1e-5 * max(spread, 1) * max(radius, 1)).all()


def test_every_image_has_its_own_radius_and_does_not_see_the_others():
    g = torch.Generator().manual_seed(1)
    origin, x = torch.rand(300, 3, 16, 16, generator=g), torch.randn(300, 3, 16, 16, generator=g)
    radius = torch.linspace(0.1, 300, 300)
    found = project_l1(x, origin, radius)
    close((found - origin).abs().flatten(1).sum(1)[:100], radius[:100], 1e-4)
    close(found[:7], torch.cat([project_l1(*(t[i : i + 1] for t in (x, origin, radius))) for i in range(7)]), 1e-7)
    assert project_l1(x[:0], origin[:0], radius[:0]).shape == (0, 3, 16, 16)


def test_the_l1_ball():
    threat = ThreatModel.parse("l1:12")
    assert (threat, str(threat)) == (ThreatModel(norm="l1", epsilon=12.0), "l1 eps 12")
    step = threat.steepest(double([[[[3.0, -4.0], [0.0, -12.0]]], [[[0.0, 0.0], [0.0, 0.0]]]]))
    assert step.flatten(1).tolist() == [[0, 0, 0, -1], [0, 0, 0, 0]]
    assert threat.distance(double([[0.5, 0.25]]), double([[0.25, 0.75]])).tolist() == [0.75]
    origin = torch.full((4, 3, 8, 8), 0.5)
    start = threat.random(origin, torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    close(threat.distance(start, origin), torch.full((4,), 12.0), 1e-4)
    with pytest.raises(ValueError, match="l1:12"):
        ThreatModel.parse("l3:1")


@pytest.mark.parametrize("attack", [FGSM(threat=L1), PGD(threat=L1, steps=20, restarts=1)], ids=["FGSM", "PGD"])
def test_single_coordinate_attacks_run(attack):
    """Weak under L1, but in the ball: `robust_after` looks."""
    model, (images, labels) = trained(), held_out(number=50)
    with torch.no_grad():
        clean = int((model(images).argmax(1) == labels).sum())
    assert robust_after(attack, model, images, labels).sum() < clean


# ---- the timetable and the steps, by hand ----


def test_stages_and_checks():
    """100 steps: 30 at 3 epsilon, 30 at 2, 40 at 1, each with a look at its start; a check after every step (4 %)."""
    assert l1.stages(100) == [30, 30, 40]
    assert l1.stages(7) == [3, 3, 1]
    assert [l1.stages(n) for n in (1, 2, 3)] == [[0, 0, 1], [0, 0, 2], [1, 1, 1]]
    table = l1.timetable(100)
    assert len(table) == 103
    assert table[:3] == ((3.0, 0, False), (3.0, 1, False), (3.0, 2, True))
    assert table[31:34] == ((2.0, 0, False), (2.0, 1, False), (2.0, 2, True))
    assert table[-1] == (1.0, 40, True)
    due = [made for radius, made, due in l1.timetable(1000) if due and radius == 1]
    assert due == [made for made in range(2, 401) if (made - 1) % 16 == 0]
    assert l1.timetable(2) == ((1.0, 0, False), (1.0, 1, False), (1.0, 2, True))


def test_sparse_directions_by_hand():
    gradient = double([[[1.0, -3.0], [0.5, 2.0]], [[1.0, -1.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]])
    found = l1.sparse_direction(gradient, torch.tensor([3, 1, 2]))
    close(found, double([[[1 / 3, -1 / 3], [0, 1 / 3]], [[0.5, -0.5], [0, 0]], [[0, 0], [0, 0]]]), 1e-15)


def test_two_thirds_are_rounded_up():
    assert l1._two_thirds(torch.tensor([0, 1, 2, 3, 4, 6])).tolist() == [1, 1, 2, 2, 3, 4]


# ---- the climb ----


def test_the_climb_takes_the_published_steps(monkeypatch):
    """pyautoattack 0.2.0, 60 steps from the same start, 6 images: the best loss and point to the last digits.

    Its projection runs in float32 and its count of moved coordinates sees rounding; both are put right for this.
    """
    reference = pytest.importorskip("pyautoattack.autopgd_base")
    monkeypatch.setattr(
        reference,
        "L1_projection",
        lambda x, move, eps: project_l1(x + move, x, x.new_full((len(x),), float(eps))) - (x + move),
    )
    monkeypatch.setattr(reference, "L0_norm", lambda move: (move.abs() > 1e-9).flatten(1).sum(-1) - 1e-6)
    g = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(96, 4)).double().eval()
    for weights in model.parameters():
        weights.data = torch.randn(weights.shape, generator=g, dtype=torch.float64) / 4
    x = (0.5 + 0.4 * torch.sin(0.37 * torch.arange(1152, dtype=torch.float64))).reshape(6, 3, 8, 8)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    attack = reference.APGDAttack(model, norm="L1", eps=3.0, device="cpu")
    attack.init_hyperparam(x)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        start = x + torch.randn_like(x)
        torch.manual_seed(7)
        best, _, loss, _ = attack.decr_eps_pgd(x, y, [9.0, 6.0, 3.0], [18, 18, 24])
    climb, rows = SparseClimb(threat=ThreatModel(norm="l1", epsilon=3.0), steps=60), torch.arange(6)
    board = Board(x, y, model(x).detach(), 0)
    lanes = climb.at(board.fresh(Climbing(climb=climb), rows, 0 * rows), start)
    for _ in range(63):
        assert not climb.finished(lanes).any()
        lanes = climb.advance(View(model), lanes)
    assert climb.finished(lanes).all()
    close(lanes.best_loss, loss)
    close(lanes.best_x, best, 1e-7)


def test_the_linear_optimum():
    """Two classes: best is to spend the ball on the pixels of largest weight, each up to the box; 99 % is reached."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(2, 48, generator=g, dtype=torch.float64)
    x = torch.rand(6, 3, 4, 4, generator=g, dtype=torch.float64)
    model, threat = linear(w, double([60.0, 0.0])), ThreatModel(norm="l1", epsilon=2.5)
    d, y = w[1] - w[0], torch.zeros(6, dtype=torch.int64)
    room = torch.where(d > 0, 1 - x.flatten(1), x.flatten(1))[:, d.abs().argsort(descending=True)]
    spent = torch.minimum(room, (2.5 - (room.cumsum(1) - room)).clamp_min(0))
    best = (spent * d.abs().sort(descending=True).values).sum(1)
    adversarial = Climbing(climb=SparseClimb(threat=threat, loss=Margin()))(model, x, y)
    rise = Margin()(model(adversarial), y) - Margin()(model(x), y)
    assert (rise <= best + 1e-5).all()
    assert (rise >= 0.99 * best).all()


def test_points_of_the_larger_balls_decide_nothing():
    """A network that 2.5 epsilon fool and epsilon does not: the image stands, and no point outside is kept."""
    model = linear(torch.cat([torch.zeros(1, 16), torch.ones(1, 16)]), torch.tensor([2.5 + 8.0, 0.0]))
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    board = board_of(model, x, y)
    attack = Climbing(climb=SparseClimb(threat=ThreatModel(norm="l1", epsilon=1.0), steps=20, loss=Margin()))
    seen = []
    pursue(attack, View(lambda z: seen.append((z - x).abs().flatten(1).sum(1)) or model(z)), board, 3)
    assert max(s.max() for s in seen) > 2.6
    assert board.right.all()
    close(board.margin, torch.full((3,), 1.5), 1e-4)
    assert attack.threat.distance(board.best, x).max() <= 1 + 1e-5


@pytest.mark.parametrize("loss", [CrossEntropy(), TargetedDLR()], ids=["CE", "targeted"])
def test_verdicts_do_not_depend_on_company(loss):
    model, (images, labels) = trained(3), held_out(3, number=64)
    attack = Climbing(climb=SparseClimb(threat=replace(L1, epsilon=4.0), steps=12, loss=loss), restarts=2)
    kept, state, found = images.clone(), torch.get_rng_state(), {}
    for size, count in ((64, 64), (7, 64), (1, 12)):
        board = board_of(model, images[:count], labels[:count])
        pursue(attack, View(model), board, size)
        found[size] = board.right.tolist()
    assert found[7] == found[64]
    assert found[1] == found[64][:12]
    assert 5 < sum(found[64]) < 50
    order = torch.arange(63, -1, -1)
    assert robust_after(attack, model, images[order], labels[order], 20)[order].tolist() == found[64]
    assert robust_after(attack, model, images, labels, 20, seed=1).tolist() != found[64] or loss == TargetedDLR()
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_impossible_climbs():
    with pytest.raises(ValueError, match="an l1 ball"):
        SparseClimb(threat=ThreatModel())
    with pytest.raises(ValueError, match="steps"):
        SparseClimb(threat=L1, steps=0)


def reference_robust(model, images, labels, epsilon, targets, seed):
    """How many images pyautoattack's APGD leaves under L1, with the larger radii of its standard version."""
    reference = pytest.importorskip("pyautoattack.autopgd_base")
    given = {"n_iter": 30, "norm": "L1", "eps": epsilon, "seed": seed, "device": "cpu", "use_largereps": True}
    if targets:
        attack = reference.APGDAttack_targeted(model, n_target_classes=targets, **given)
    else:
        attack = reference.APGDAttack(model, **given)
    with torch.random.fork_rng():
        adversarial = attack.perturb(images.clone(), labels)
    return int(((model(adversarial).argmax(1) == labels) & (model(images).argmax(1) == labels)).sum())


@pytest.mark.filterwarnings("ignore:there are")
@pytest.mark.parametrize(
    ("channels", "classes", "epsilon", "targets"),
    [(1, 10, 2.0, 0), (3, 10, 4.0, 0), (1, 3, 3.0, 0), (1, 2, 2.0, 0), (1, 10, 2.0, 2), (3, 10, 4.0, 2)],
)
def test_apgd_is_no_weaker_than_the_reference(channels, classes, epsilon, targets):
    """pyautoattack 0.2.0 at equal steps on 100 digits, 3 seeds: on average no more than its worst seed leaves."""
    model, (images, labels) = trained(channels, classes), held_out(channels, classes, 100)
    climb = SparseClimb(
        threat=ThreatModel(norm="l1", epsilon=epsilon), steps=30, loss=TargetedDLR() if targets else CrossEntropy()
    )
    attack = Climbing(climb=climb, restarts=targets or 1)
    ours = [int(robust_after(attack, model, images, labels, seed=s).sum()) for s in range(3)]
    theirs = [reference_robust(model, images, labels, epsilon, targets, s) for s in range(3)]
    assert 0 < sum(ours) / 3 <= max(theirs)


@pytest.mark.parametrize("classes", [2, 3])
def test_targets_of_few_classes(classes):
    """The reference crashes here; ours leaves about what two untargeted climbs do (measured 3, 3 and 7, 9 of 60)."""
    model, (images, labels) = trained(1, classes), held_out(1, classes, 60)
    plain, targeted = (
        robust_after(Climbing(climb=SparseClimb(threat=L1, steps=20, loss=loss), restarts=2), model, images, labels)
        for loss in (Margin(), TargetedDLR())
    )
    assert 0 < targeted.sum() <= plain.sum() + 3


@pytest.mark.parametrize("attack", [APGD(steps=12), APGD(steps=12, loss=Margin(), restarts=2), TargetedAPGD(steps=9)])
def test_apgd_takes_sparse_steps_under_l1(attack):
    """AutoPGD and its targeted form hand an l1 ball over to the sparse climb, draws and all."""
    attack = replace(attack, threat=L1)
    model, (images, labels) = trained(), held_out(number=40)
    targeted = isinstance(attack, TargetedAPGD)
    loss = TargetedDLR() if targeted else attack.loss
    same = Climbing(
        climb=SparseClimb(threat=L1, steps=attack.steps, loss=loss), restarts=9 if targeted else attack.restarts
    )
    assert torch.equal(attack(model, images, labels), same(model, images, labels))
