"""Lanes: refilled batches, draws that belong to images, states that go on to the bit, precision, lack of memory."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from gambeson.randomness import image_keys, normal, uniform
from gambeson.robustness.attacks import APGD, PGD, TargetedAPGD
from gambeson.robustness.inputs import clean_logits
from gambeson.robustness.pursuit import Board, Chase, looked_up, pursue
from gambeson.robustness.square import Square
from gambeson.robustness.verdicts import robust_after
from gambeson.robustness.views import View
from gambeson.threat import ThreatModel

THREAT = ThreatModel(epsilon=0.02)
ATTACKS = pytest.mark.parametrize(
    "attack",
    [
        PGD(threat=THREAT, steps=6, restarts=3),
        APGD(threat=THREAT, steps=9, restarts=2),
        TargetedAPGD(threat=THREAT, steps=7, targets=3),
    ],
    ids=lambda a: type(a).__name__,
)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 36, 5)).double()
    return layers.eval()


@pytest.fixture(scope="module")
def batch(net):
    """Images that the network gets right by definition, three wrong ones among them."""
    images = torch.rand(37, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = net(images).argmax(1)
    labels[[3, 11, 30]] = (labels[[3, 11, 30]] + 1) % 5
    return images, labels


def board_of(net, batch, seed=0):
    return Board(*batch, clean_logits(net, *batch, 64), seed)


def pursued(net, batch, attack, size, seed=0):
    board = board_of(net, batch, seed)
    pursue(attack, View(net), board, size)
    return board


@ATTACKS
def test_batch_size_and_order_change_nothing(net, batch, attack):
    """Verdicts, margins, queries and images are those of one image at a time; some stand and some fall."""
    alone = pursued(net, batch, attack, 1)
    fooled = int((~alone.right).sum())
    assert 6 < fooled < 37
    for size in (7, 64):
        together = pursued(net, batch, attack, size)
        assert torch.equal(alone.right, together.right)
        assert torch.equal(alone.queries, together.queries)
        torch.testing.assert_close(alone.margin, together.margin, rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.best, together.best, rtol=0, atol=1e-9)
    turned = pursued(net, tuple(part.flip(0) for part in batch), attack, 7)
    assert torch.equal(turned.right.flip(0), alone.right)
    assert torch.equal(turned.queries.flip(0), alone.queries)


@ATTACKS
def test_a_lane_that_ends_is_taken_at_once(net, batch, attack):
    """While images wait, every look has a full batch; nobody is looked at more often than the budget says."""
    sizes = []
    board = board_of(net, batch)
    pursue(attack, View(net), board, 8, lambda c: sizes.append((len(c.lanes.row), len(c.waiting))))
    counting = []
    hooked = net[0].register_forward_hook(lambda module, given, found: counting.append(len(given[0])))
    board = board_of(net, batch)
    counting.clear()
    pursue(attack, View(net), board, 8)
    hooked.remove()
    first_idle = next(i for i, (_, waiting) in enumerate(sizes) if waiting == 0)
    assert set(counting[:first_idle]) == {8}
    runs = attack.runs(5)
    assert int(board.queries.max()) == runs * (attack.steps + 1)
    stood = board.right
    assert (board.queries[stood] == runs * (attack.steps + 1)).all()
    assert (board.queries[[3, 11, 30]] == 0).all()
    assert sum(counting) == int(board.queries.sum())


@ATTACKS
def test_a_saved_chase_goes_on_to_the_bit(net, batch, attack, tmp_path):
    """Saved after every step, through a file, and gone on from there: the same board."""
    whole = pursued(net, batch, attack, 7)
    stop, states = 9, []

    def keep(chase):
        torch.save(chase.save(), tmp_path / "state.pt")
        states.append(chase.left)
        if len(states) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pursue(attack, View(net), board_of(net, batch), 7, keep)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    board = board_of(net, batch)
    pursue(attack, View(net), board, 7, saved=saved)
    for name in ("right", "margin", "best", "queries"):
        assert torch.equal(getattr(whole, name), getattr(board, name)), name


def test_restarts_have_their_own_starts(net, batch):
    """The draws of an image depend on seed, climb and content, and on nothing else."""
    attack = PGD(threat=THREAT, steps=1, restarts=4)
    board = board_of(net, batch)
    rows = torch.tensor([5, 5, 9])
    starts = board.fresh(attack, rows, torch.tensor([0, 1, 0])).x - board.images[rows]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    again = board.fresh(attack, torch.tensor([5]), torch.tensor([1])).x - board.images[5]
    assert torch.equal(again[0], starts[1])
    other = board_of(net, batch, seed=1).fresh(attack, torch.tensor([5]), torch.tensor([1])).x - board.images[5]
    assert not torch.equal(other[0], starts[1])


def test_counters_may_differ_within_a_batch():
    """One counter for each image gives what single calls give."""
    keys = image_keys(torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4))
    counters = torch.tensor([0, 5, 2, 5])
    for draw in (uniform, normal):
        together = draw(keys, "x", (3,), counters)
        for i in range(4):
            assert torch.equal(together[i], draw(keys[i : i + 1], "x", (3,), int(counters[i]))[0])


def test_the_best_image_is_the_one_of_smallest_margin(net, batch):
    """And lies in the ball; the recorded margin is the network's at that image."""
    board = pursued(net, batch, APGD(threat=ThreatModel(epsilon=0.01), steps=10), 16)
    z = net(board.best)
    own = z.gather(1, batch[1][:, None])[:, 0]
    others = z.scatter(1, batch[1][:, None], -torch.inf).amax(1)
    torch.testing.assert_close(board.margin, own - others, rtol=0, atol=1e-9)
    stood = board.right
    assert stood.any()
    clean = board_of(net, batch).margin
    assert (board.margin[stood] < clean[stood]).all()
    assert (board.best - batch[0]).abs().max() <= 0.01 + 1e-9


class Deaf(nn.Module):
    """Right in full precision, wrong under autocast."""

    def forward(self, x):
        rough = torch.mm(x.flatten(1), torch.eye(x[0].numel())).dtype == torch.bfloat16
        z = x.flatten(1)[:, :2] * 0.001
        return z + torch.tensor([0.0, 1.0] if rough else [1.0, 0.0])


def test_what_low_precision_calls_fooled_is_confirmed():
    """A network that is only wrong in bfloat16 stands, in every lane, after the whole budget."""
    x, y = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(5, dtype=torch.int64)
    model = Deaf().eval()
    attack = PGD(threat=THREAT, steps=3, restarts=1)
    board = Board(x, y, clean_logits(model, x, y, 8), 0)
    pursue(attack, View(model, "bfloat16"), board, 8)
    assert board.right.all()
    assert (board.queries == 4).all()


class Greedy(nn.Module):
    """Needs the memory of at most three images."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.sizes = inner, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(x)


def test_a_batch_too_large_for_the_memory_is_halved_and_said_once(net, batch):
    """8 -> 4 -> 2: two warnings, the same verdicts, and no further attempt at the larger sizes."""
    attack = APGD(threat=THREAT, steps=5)
    board, greedy = board_of(net, batch), Greedy(net).eval()
    with pytest.warns(UserWarning, match="out of memory with . images at once: going on with") as caught:
        pursue(attack, View(greedy), board, 8)
    assert len(caught) == 2
    assert [s for s in greedy.sizes if s > 3] == [8, 4]
    expected = pursued(net, batch, attack, 8)
    assert torch.equal(expected.right, board.right)


def test_an_error_that_is_not_about_memory_is_raised(net, batch):
    """And one image that does not fit is the caller's to know."""

    def broken(x):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        pursue(PGD(threat=THREAT), View(broken), board_of(net, batch), 8)

    def never(x):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory with 4 images"):
        pursue(PGD(threat=THREAT), View(never), board_of(net, batch), 4)


def test_looks_can_be_averaged(batch):
    """A network with an alternating sign has no slope on average: 2 looks see it, 1 does not."""
    signs = []

    def flips(x):
        signs.append(1.0 if len(signs) % 2 else -1.0)
        z = signs[-1] * x.flatten(1).sum(1)
        return torch.stack([z, torch.zeros_like(z)], 1)

    from gambeson.robustness.attack_losses import Margin

    x, y = batch[0][:2], torch.zeros(2, dtype=torch.int64)
    assert (View(flips).slope(Margin(), x, y, y).gradient.abs() == 1).all()
    view = View(flips)
    assert (view.slope(Margin(), x, y, y, times=2).gradient == 0).all()
    assert view.asked == 2


def test_slopes_of_all_classes(net, batch):
    """The jacobian's rows are the slopes of the logits."""
    x = batch[0][:3]
    logits, rows = View(net).jacobian(x)
    assert rows.shape == (3, 5, 2, 6, 6)
    for k in range(5):
        moved = x.clone().requires_grad_()
        expected = torch.autograd.grad(net(moved)[:, k].sum(), moved)[0]
        torch.testing.assert_close(rows[:, k], expected)
    torch.testing.assert_close(logits, net(x).detach())


def test_small_tables():
    """Entries by index."""
    assert looked_up((0, 3, 5), torch.tensor([2, 0, 1, 1])).tolist() == [5, 0, 3, 3]


def test_eot_leaves_the_digest_alone_by_default():
    """A field added later is neutral."""
    from gambeson import canonical

    plain = canonical.plain(APGD(), drop_neutral=True)
    assert "eot" not in str(plain)
    assert "eot" in str(canonical.plain(replace(APGD(), eot=2), drop_neutral=True))


def test_robust_after_takes_any_attack(net, batch):
    """Also one that is no pursuit: its images are all looked at."""

    class Nothing:
        threat = THREAT

        def __call__(self, model, images, labels, seed=0):
            return images

    verdict = robust_after(Nothing(), net, *batch, batch_size=5)
    assert verdict.sum() == 34
    assert Chase.start(PGD(threat=THREAT), View(net), board_of(net, batch), 5).left == 34


@pytest.fixture
def drawing():
    """A linear network that draws: its margin is the mean grey plus noise, so chance fools it before the attack."""
    generator = torch.Generator().manual_seed(5)

    def call(x):
        margin = 4 * (x.mean((1, 2, 3)) - 0.45)
        return torch.stack([margin + 0.1 * torch.randn(len(x), generator=generator, dtype=x.dtype), 0 * margin], 1)

    return call


def test_networks_that_draw_are_climbed_to_the_end(drawing):
    """Expected margin 0.2, at the ball's corner 0.12: chance alone fools about one image in forty at each look. With
    several looks at a point (eot), an image that was fooled early still ends at the corner, as in the reference."""
    x, y = torch.full((40, 1, 4, 4), 0.5, dtype=torch.float64), torch.zeros(40, dtype=torch.int64)
    patient = APGD(threat=THREAT, steps=20, eot=4)
    for attack, all_at_the_corner in ((patient, True), (replace(patient, eot=1), False)):
        board = Board(x, y, torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(40, 2), 0)
        pursue(attack, View(drawing), board, 7)
        assert (~board.right).sum() > 3
        there = (board.best - (x - 0.02)).abs().amax((1, 2, 3)) < 1e-9
        assert bool(there[~board.right].all()) is all_at_the_corner


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_slopes_that_are_no_numbers_do_not_stop_an_attack(net, norm):
    """The slope of a root is not a number at black pixels: those entries count as 0, and images fall as before."""
    images = torch.rand(12, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).clamp_min(0.2)
    images[:, 0, :2] = 0
    labels, threat = net(images).argmax(1), ThreatModel(norm=norm, epsilon=0.1 if norm == "linf" else 1.0)

    def rooted(x):
        return net(x) + 0 * x.clamp_min(0).sqrt().sum((1, 2, 3))[:, None]

    sought = torch.autograd.grad(rooted(leaf := images.clone().requires_grad_()).sum(), leaf)[0]
    assert sought.isnan().any(), "the test's own premise"
    for attack in (
        PGD(threat=threat, steps=15, restarts=1),
        APGD(threat=threat, steps=15),
        TargetedAPGD(threat=threat),
    ):
        right = robust_after(attack, rooted, images, labels)
        assert torch.equal(right, robust_after(attack, net, images, labels))
        assert not right.any()


def test_points_whose_logits_are_no_numbers_neither_fool_nor_count(net, batch):
    """Only brighter images have such logits: what falls has finite logits, and lies in the ball."""
    images, labels = batch[0].clamp(0.05, 0.95), batch[1]

    def spoilt(x):
        return torch.where(x.mean((1, 2, 3), keepdim=True).flatten(1) > 0.51, math.nan, net(x))

    kept = images.mean((1, 2, 3)) <= 0.5
    images, labels = images[kept], labels[kept]
    threat = ThreatModel(epsilon=0.03)
    assert spoilt(images + 0.03).isnan().any(), "the test's own premise"
    for attack in (
        PGD(threat=threat),
        APGD(threat=threat),
        TargetedAPGD(threat=threat),
        Square(threat=threat, queries=99),
    ):
        board = Board(images, labels, clean_logits(spoilt, images, labels, 64), 0)
        pursue(attack, View(spoilt), board, 64)
        fooled = ~board.right
        assert fooled.sum() > 3
        logits = spoilt(board.best[fooled])
        assert logits.isfinite().all()
        assert (logits.argmax(1) != labels[fooled]).all()
        assert board.margin.isfinite().all()


def test_memory_that_does_not_suffice_halves_plain_looks_too(net, batch):
    """Clean logits and the last look at what was fooled, as everything else."""

    def small(x):
        if len(x) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return net(x)

    with pytest.warns(UserWarning, match="out of memory"):
        found = robust_after(PGD(threat=THREAT, steps=6, restarts=1), small, *batch, batch_size=37)
    assert torch.equal(found, robust_after(PGD(threat=THREAT, steps=6, restarts=1), net, *batch, batch_size=37))


def test_the_work_left_is_counted_as_it_is(net, batch):
    """`weight` keeps a sum; it must be that of everyone who waits, also after a restore."""
    board, attack = board_of(net, batch), PGD(threat=THREAT, steps=2, restarts=3)
    chase = Chase.start(attack, View(net), board, 5)
    while chase.going:
        chase.advance()
        assert chase.climbed == sum(run for _, run in chase.waiting)
        again = Chase.start(attack, View(net), board_of(net, batch), 5)
        again.restore(chase.save())
        assert again.weight == chase.weight
