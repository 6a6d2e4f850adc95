"""Square: the published schedule and shapes, candidates against plain loops, promises, and the reference's strength."""

import math

import pytest
import torch
from small_digits import board_of, fresh_chase, held_out, linear, trained

from gambeson.randomness import uniform
from gambeson.robustness import square
from gambeson.robustness.pursuit import pursue
from gambeson.robustness.square import Square, Window
from gambeson.robustness.verdicts import robust_after
from gambeson.robustness.views import View
from gambeson.threat import ThreatModel

THREATS = [ThreatModel(epsilon=0.15), ThreatModel(norm="l2", epsilon=1.0), ThreatModel(norm="l1", epsilon=4.0)]
EVERY_NORM = pytest.mark.parametrize("threat", THREATS, ids=str)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---- schedule and shapes, by hand ----


def test_windows_shrink_as_published():
    """p halves once more than 10, 50, 200, .. of 10,000 queries are done (section 3.1 and the authors' code)."""
    asked = [0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2001, 4000, 4001, 6001, 8000, 8001, 9999]
    expected = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 9]
    assert square.halvings(torch.tensor(asked), 10_000).tolist() == expected
    assert square.halvings(torch.tensor([0, 1, 2, 3, 10, 11, 499]), 500).tolist() == [0, 1, 1, 2, 2, 3, 9]


@pytest.mark.parametrize(
    ("norm", "height", "width", "sides"),
    [
        ("linf", 32, 32, [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]),  # round sqrt(819.2 / 2^k) = 28.6, 20.2, 14.3, ..
        ("l2", 32, 32, [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]),
        ("l1", 28, 28, [25, 19, 13, 9, 7, 5, 3, 3, 3, 3]),
        ("linf", 4, 100, [4, 4, 4, 4, 4, 3, 2, 2, 1, 1]),
        ("l2", 2, 2, [2] * 10),
    ],
)
def test_sides_of_windows(norm, height, width, sides):
    assert square.window_sides(norm, height, width, 0.8) == sides


def test_eta_by_hand():
    """Side 3 under L2. The lower bump, centre in its second row: 1 + 1/4 there, 1/4 around; so is the upper one."""
    lower = torch.tensor([[1, 1, 1], [1, 5, 1]]).double() / math.sqrt(30)
    upper = torch.tensor([[1, 5, 1]]).double() / math.sqrt(27)
    close(square.bump(2, 3, 2), lower, 1e-12)
    close(square.eta(3, 2), torch.cat([upper, -lower]) / math.sqrt(2), 1e-12)
    close(square.bump(1, 3, 1), torch.tensor([[1, 17, 1]]).double() / 19, 1e-12)
    assert square.eta(1, 2).tolist() == [[-1.0]]


@pytest.mark.parametrize(("norm", "power"), [("L2", 2), ("L1", 1)])
def test_etas_are_those_of_the_reference(norm, power):
    attack = pytest.importorskip("pyautoattack.square").SquareAttack(None, norm=norm, eps=1.0, device="cpu")
    with torch.random.fork_rng():
        for side in (1, 2, 3, 4, 5, 8, 13, 29):
            ours, theirs = square.eta(side, power).float(), attack.eta(side)
            assert min((ours - theirs).abs().max(), (ours.mT - theirs).abs().max()) < 1e-6


# ---- windows of every image's own size ----


def test_windows_hold_what_a_slice_holds():
    """Sides 3, 1, 5 and 2 in one batch of 6 x 7 images, at the corners that the draws name."""
    images = torch.arange(4 * 2 * 6 * 7, dtype=torch.float64).reshape(4, 2, 6, 7)
    sides = torch.tensor([3, 1, 5, 2])
    draws = torch.tensor([[0.0, 0.999], [0.999, 0.999], [0.5, 0.4], [0.999, 0.0]], dtype=torch.float64)
    corners = [(0, 4), (5, 6), (1, 1), (4, 0)]  # floor(draw * (extent - side + 1))
    window = Window.at(draws, sides, 6, 7)
    emptied = images.clone()
    held = window.lift(emptied)
    for i, ((top, left), side) in enumerate(zip(corners, sides.tolist(), strict=True)):
        place = (slice(None), slice(top, top + side), slice(left, left + side))
        assert held[i].sum() == images[i][place].sum()
        assert window.inside[i].sum() == side**2
        images[i][place] = 0
    assert torch.equal(emptied, images)
    assert torch.equal(held, window.take(emptied + 1) * 0 + held)
    window.add(emptied, held)
    assert torch.equal(emptied, torch.arange(4 * 2 * 6 * 7, dtype=torch.float64).reshape(4, 2, 6, 7))


def test_windows_reach_every_pixel():
    """Also the last row and column, which the reference's draws leave out."""
    draws = uniform(torch.arange(500), "reach", (2,))
    covered = torch.zeros(500, 1, 5, 5)
    Window.at(draws, torch.full((500,), 2), 5, 5).add(covered, torch.ones(500, 1, 2, 2))
    times = covered.sum((0, 1))
    assert times.min() > 500 / 16 * 0.5
    assert times[0, 0] < times[2, 2]


def lanes_and_draw(threat, channels=2, height=7, width=6):
    """Eight lanes far into their climbs, at different levels, and what their next candidates are drawn from."""
    g = torch.Generator().manual_seed(3)
    images = torch.rand(8, channels, height, width, generator=g).double()
    images[:, :, ::3] = images[:, :, ::3].round()
    model = linear(torch.randn(3, channels * height * width, generator=g).double(), torch.zeros(3).double())
    chase = fresh_chase(Square(threat=threat, queries=10_000), model, images, model(images).argmax(1), 8)
    chase._fill()
    lanes = chase.lanes
    lanes = square.replace(lanes, step=torch.tensor([1, 5, 20, 80, 300, 700, 3000, 9000]))
    sides = tuple(square.window_sides(threat.norm, height, width, 0.8))
    return lanes, sides, chase.attack._draw(lanes, sides)


def corner(places, side, shape):
    return [int(p * (n - side + 1)) for p, n in zip(places.tolist(), shape, strict=True)]


def test_linf_candidates_against_a_loop():
    """The published move: 2 epsilon times a sign per channel in the window, then back into the ball and the box."""
    threat = ThreatModel(epsilon=0.1)
    lanes, sides, draw = lanes_and_draw(threat)
    found = square.flipped_window(threat, lanes, sides, draw)
    assert ((found != lanes.best_x).flatten(1).sum(1) > 0).sum() >= 6
    for i, side in enumerate(draw.side.tolist()):
        x, origin = lanes.best_x[i].clone(), lanes.origin[i]
        top, left = corner(draw.places[i, :2], side, (7, 6))
        x[:, top : top + side, left : left + side] += (
            0.2 * (draw.channels[i] >= 0.5).double().mul(2).sub(1)[:, None, None]
        )
        close(found[i], x.clamp(origin - 0.1, origin + 0.1).clamp(0, 1), 1e-12)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_mass_moves_against_a_loop(norm):
    """Algorithm 3, and its L1 form, image by image: windows V1 and V2, eta added to V1's direction, V2 emptied."""
    threat, power = ThreatModel(norm=norm, epsilon=1.5), {"l2": 2, "l1": 1}[norm]
    lanes, sides, draw = lanes_and_draw(threat)
    found = square.moved_mass(threat, lanes, sides, draw)
    for i, side in enumerate(draw.side.tolist()):
        delta = lanes.best_x[i] - lanes.origin[i]
        one, two = (
            (slice(None), slice(top, top + side), slice(left, left + side))
            for top, left in (corner(draw.places[i, j : j + 2], side, (7, 6)) for j in (0, 2))
        )
        union = torch.zeros_like(delta)
        union[one] = union[two] = 1
        norms = [(d.abs() ** power).sum((1, 2), keepdim=True) for d in (delta[one], delta * union)]
        shape = square.eta(side, power)
        shape = shape.mT if draw.turn[i] >= 0.5 else shape
        fresh = shape * (draw.channels[i] >= 0.5).double().mul(2).sub(1)[:, None, None]
        fresh = fresh + delta[one] / (norms[0] ** (1 / power) + 1e-12)
        left_over = max(threat.epsilon**power - (delta.abs() ** power).sum(), 0)
        goal = (left_over / 2 + norms[1]).sqrt() if power == 2 else (left_over / 2 + norms[1]) * 2
        fresh = fresh / (fresh.abs() ** power).sum((1, 2), keepdim=True) ** (1 / power) * goal
        delta = delta.clone()
        delta[two] = 0
        delta[one] = fresh
        close(found[i][None], threat.project((lanes.origin[i] + delta)[None], lanes.origin[i : i + 1]), 1e-9)


@EVERY_NORM
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9), (3, 3, 4), (2, 11, 3)], ids=str)
def test_starts_and_candidates_fill_the_ball_and_stay_inside(threat, shape):
    """From grey images no box is met at this radius: the whole ball is used, whatever the shape of the image."""
    threat = square.replace(threat, epsilon=0.3)
    images = torch.full((6, *shape), 0.5)
    model = linear(torch.ones(2, images[0].numel()) * torch.tensor([[1.0], [-1.0]]), torch.tensor([1e6, 0.0]))
    chase = fresh_chase(Square(threat=threat, queries=40), model, images, torch.zeros(6, dtype=torch.int64), 6)
    while chase.going:
        chase.advance()
        if chase.lanes.row.numel():
            reach = threat.distance(chase.lanes.x, images)
            close(reach, torch.full((6,), 0.3), 1e-5)


# ---- the climb ----


@EVERY_NORM
def test_the_loss_never_falls_and_the_best_point_has_it(threat):
    model, (images, labels) = trained(), held_out(number=40)
    chase = fresh_chase(Square(threat=square.replace(threat, epsilon=threat.epsilon / 5)), model, images, labels, 40)
    before = {}
    for _ in range(60):
        chase.advance()
        now = dict(zip(chase.lanes.row.tolist(), chase.lanes.best_loss.tolist(), strict=True))
        assert all(now[row] >= before.get(row, -math.inf) for row in now)
        before = now
    lanes = chase.lanes
    close(-board_of(model, lanes.best_x, lanes.labels).margin, lanes.best_loss, 1e-5)
    assert (lanes.best_loss > -chase.board.margin[lanes.row] - 1e-5).all()
    assert len(before) > 10


def test_a_linear_optimum_is_reached():
    """Two classes and one row of pixels, far from the box: the best corner has margin - eps |w|_1, as stripes of one
    pixel and windows of one find it."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1, 12, generator=g).double()
    model = linear(torch.cat([w, 0 * w]), torch.tensor([50.0, 0.0]).double())
    images, labels = torch.full((5, 3, 2, 2), 0.5).double(), torch.zeros(5, dtype=torch.int64)
    board = board_of(model, images, labels)
    clean = board.margin.clone()
    pursue(Square(threat=ThreatModel(epsilon=0.1), queries=400), View(model), board, 5)
    close(board.margin, clean - 0.1 * w.abs().sum(), 1e-9)


@EVERY_NORM
def test_verdicts_do_not_depend_on_company(threat):
    """Batches of 1, 7 and 64, and another order; queries are counted per image; nothing else moves."""
    model, (images, labels) = trained(3), held_out(3, number=64)
    threat = square.replace(threat, epsilon=1.2 * threat.epsilon)
    attack, kept, state = Square(threat=threat, queries=30, restarts=2), images.clone(), torch.get_rng_state()
    found = {}
    for size, count in ((64, 64), (7, 64), (1, 12)):
        board = board_of(model, images[:count], labels[:count])
        pursue(attack, View(model), board, size)
        found[size] = board
    whole = found[64]
    assert 5 < whole.right.sum() < 50
    assert set(whole.queries[whole.right].tolist()) == {60}
    for board in (found[7], found[1]):
        count = len(board.labels)
        assert torch.equal(board.right, whole.right[:count])
        assert torch.equal(board.queries, whole.queries[:count])
        close(board.best, whole.best[:count], 1e-5)
    order = torch.arange(63, -1, -1)
    assert torch.equal(robust_after(attack, model, images[order], labels[order], 20)[order], whole.right)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_restarts_draw_anew():
    """Two looks of two climbs under two seeds: eight different points."""
    model, (images, labels) = trained(), held_out(number=4)
    attack, seen = Square(threat=ThreatModel(epsilon=0.001), queries=2, restarts=2), []

    def watched(x):
        seen.append((x - images).double().flatten())
        return model(x)

    for seed in (0, 1):
        board = board_of(model, images, labels, seed)
        pursue(attack, View(watched), board, 4)
        assert board.right.all()
    apart = torch.cdist(torch.stack(seen), torch.stack(seen)) + torch.eye(8)
    assert apart.shape == (8, 8)
    assert apart.min() > 1e-3


def test_draws_follow_step_and_restart():
    """A candidate is number `step - 1` of the schedule; no look of any restart repeats the draws of another."""
    model, (images, labels) = trained(), held_out(number=1)
    attack = Square(threat=THREATS[0], queries=100, restarts=2, horizon=10_000)
    board = board_of(model, images, labels)
    rows = torch.zeros(200, dtype=torch.int64)
    lanes = board.fresh(attack, rows, torch.arange(200) // 100)
    lanes = square.replace(lanes, step=torch.arange(200) % 100)
    draw = attack._draw(lanes, tuple(square.window_sides("linf", 8, 8, 0.8)))
    assert draw.level[:53].tolist() == [0] * 12 + [1] * 40 + [2]
    assert draw.side[[0, 12, 52]].tolist() == [7, 5, 4]
    assert len(set(draw.turn.tolist())) == 200


def test_no_gradient_is_asked_for():
    """A network that autograd cannot follow, of two classes."""
    inner, (images, labels) = trained(1, 2), held_out(1, 2, number=60)
    robust = robust_after(
        Square(threat=ThreatModel(epsilon=0.3), queries=100),
        lambda x: inner(x.detach()).round(decimals=1),
        images,
        labels,
    )
    assert robust.sum() < 0.6 * 60


@pytest.mark.parametrize(
    ("field", "value"), [("queries", 0), ("restarts", 0), ("p_init", 0.0), ("p_init", 1.5), ("horizon", 0)]
)
def test_impossible_numbers(field, value):
    with pytest.raises(ValueError, match=field):
        Square(**{field: value})


def test_a_threat_is_needed():
    with pytest.raises(ValueError, match="replace"):
        Square()(trained(), *held_out(number=2))


# ---- strength ----


def reference_robust(model, images, labels, threat, queries, seed):
    """How many images pyautoattack's Square leaves."""
    attack = pytest.importorskip("pyautoattack.square").SquareAttack
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm]
    with torch.random.fork_rng():
        adversarial = attack(model, norm=norm, n_queries=queries, eps=threat.epsilon, seed=seed, device="cpu").perturb(
            images, labels
        )
    return int(((model(adversarial).argmax(1) == labels) & (model(images).argmax(1) == labels)).sum())


@EVERY_NORM
@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 10), (1, 3), (1, 2)])
def test_square_is_no_weaker_than_the_reference(threat, channels, classes):
    """pyautoattack 0.2.0 at equal queries on 100 digits, 3 seeds: on average no more than its worst seed leaves.

    The last row and column, which its windows never reach, are what makes ours stronger here: at 1,000 queries and 0.6
    of these radii 81 against 82.5 of 100 stand (linf), 64 against 71.5 (l2), 17 against 31 (l1); coloured 58.5 against
    62.5, 71 against 73.5. Only coloured L1 is level, 61.5 against 59.3, and a little behind at few queries.
    """
    model, (images, labels) = trained(channels, classes), held_out(channels, classes, 100)
    theirs = [reference_robust(model, images, labels, threat, 150, seed) for seed in range(3)]
    attack = Square(threat=threat, queries=150)
    ours = [int(robust_after(attack, model, images, labels, seed=s).sum()) for s in range(3)]
    behind = 4 if (channels, threat.norm) == (3, "l1") else 0
    assert 0 < sum(ours) / 3 <= max(theirs) + behind
