"""The evaluation's further doubts, each with a model built to be caught; an honest small network passes them all."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from gambeson.robustness import checks
from gambeson.robustness.attacks import PGD
from gambeson.robustness.verdicts import robust_after
from gambeson.threat import ThreatModel

LINF = ThreatModel(epsilon=0.1)


def network(tracked=True, normed=True):
    norm = nn.BatchNorm2d(16, track_running_stats=tracked) if normed else nn.Identity()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
        )


def fitted(model, images, labels, epochs=12):
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    stream = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=stream).split(128):
            optimiser.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@pytest.fixture(scope="module")
def net(digits):
    return fitted(network(), digits[0][:1400], digits[1][:1400])


@pytest.fixture(scope="module")
def held_out(digits):
    return digits[0][1400:1500], digits[1][1400:1500]


def straight_through(model, levels):
    """Rounds its input to grey levels and lets the gradient pass as if it had not."""
    return lambda x: model(x + ((x * levels).round() / levels - x).detach())


def standardised(images):
    return (images - images.mean()) / images.std()


DOUBTS = {
    "batch independent": lambda model, x, y: checks.batch_independent(model, x),
    "gradients true": checks.gradients_true,
    "preprocessing inside": checks.preprocessing_inside,
}


@pytest.mark.parametrize("name", DOUBTS)
def test_an_honest_network_passes(name, net, held_out):
    before = torch.get_rng_state()
    found = DOUBTS[name](net, *held_out)
    assert found.name == name
    assert found.passed, found
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DOUBTS)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_no_doubt_depends_on_the_size_of_the_logits(name, scale, net, held_out):
    assert DOUBTS[name](lambda x: scale * net(x), *held_out).passed


def test_run_checks_asks_them_all(net, held_out):
    x, y = held_out[0][:40], held_out[1][:40]
    robust = robust_after(PGD(threat=LINF, steps=20, restarts=1), net, x, y)
    found = {check.name: check.passed for check in checks.run_checks(net, x, y, LINF, whitebox_robust=robust)}
    assert found.keys() >= DOUBTS.keys()
    assert all(found[name] for name in DOUBTS), found


@pytest.mark.parametrize("tracked", [True, False])
def test_batch_statistics_are_found_whatever_the_flags_say(tracked, digits, held_out):
    """An untracked batch norm is in eval mode and still takes the batch's; a wrapped one hides that it is training."""
    model = fitted(network(tracked), *digits, epochs=2)
    if tracked:
        model.train()
    found = checks.batch_independent(lambda x: model(x), held_out[0])
    assert not found.passed
    assert "in company" in found.detail
    assert checks.batch_independent(model.eval(), held_out[0]).passed == tracked


def test_a_single_image_is_asked_too(net, digits, held_out):
    assert checks.batch_independent(net, held_out[0][:1]).passed
    untracked = fitted(network(tracked=False), *digits, epochs=2)
    assert not checks.batch_independent(untracked, held_out[0][:1]).passed


@pytest.mark.parametrize("levels", [255, 16, 3])
def test_a_straight_through_gradient_promises_what_does_not_happen(levels, net, held_out):
    """On images that lie on the levels nothing happens at all."""
    on_levels = (held_out[0] * levels).round() / levels
    found = checks.gradients_true(straight_through(net, levels), on_levels, held_out[1])
    assert not found.passed
    assert "100 of 100 images change otherwise than it says, 100 of them not at all" in found.detail
    off_levels = held_out[0] * 0.93 + 0.011
    assert not checks.gradients_true(straight_through(net, levels), off_levels, held_out[1]).passed
    assert checks.gradients_not_zero(straight_through(net, levels), on_levels, held_out[1]).passed


def test_gradients_without_promise_are_found_out(net, held_out):
    """A step with a slope too faint to see, a detached input, and a gradient of the wrong sign."""
    faint = checks.gradients_true(lambda x: net((x * 3).round() / 3 + 1e-5 * x), *held_out)
    assert not faint.passed
    assert faint.detail.endswith("100 have a gradient too small to see")
    assert "autograd" in checks.gradients_true(lambda x: net(x.detach()), *held_out).detail
    turned = checks.gradients_true(lambda x: net(2 * x.detach() - x), *held_out)
    assert turned.detail.startswith("moved by 0.0005 along the gradient: 100 of 100")
    assert "0 of them not at all" in turned.detail


def test_a_network_that_clips_its_input_is_honest(net, held_out):
    """Of black and white images half of every step would be cut off, so they are greyed by a little first."""
    black_and_white = (held_out[0] > 0.5).float()
    assert checks.gradients_true(lambda x: net(x.clamp(0, 1)), black_and_white, held_out[1]).passed


def test_the_slope_of_a_plane_is_taken_exactly():
    """Two classes, margin z1 - z0 = 3 x1 - x2: a step of h promises h (3 + 1)."""
    plane = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double().eval()
    with torch.no_grad():
        plane[1].weight.copy_(torch.tensor([[0.0, 1.0], [3.0, 0.0]]))
    images = torch.tensor([[0.0, 1.0], [0.5, 0.25]], dtype=torch.float64).reshape(2, 1, 1, 2)
    promised, changed, floor = checks._promise_and_change(plane, images, torch.tensor([0, 0]))
    torch.testing.assert_close(promised, torch.full((2,), 4 * checks.TINY, dtype=torch.float64))
    torch.testing.assert_close(changed, promised)
    assert floor.max() < promised.min()


@pytest.mark.parametrize(
    ("seen", "threshold", "shown"),
    [
        (lambda x: x * 255, 127.5, "times 255"),
        (lambda x: 2 * x - 1, 0.0, "in [-1, 1]"),
        (standardised, 0.0, "standard"),
    ],
)
def test_preprocessing_left_outside_is_found(seen, threshold, shown):
    """Dark and bright images, told apart by a threshold that belongs to pixels of another scale."""
    labels = torch.arange(40) % 2
    images = 0.2 + 0.4 * labels.reshape(-1, 1, 1, 1) + 0.2 * torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)

    def model(x):
        return (x.mean((1, 2, 3)) - threshold)[:, None] * torch.tensor([-1.0, 1.0])

    found = checks.preprocessing_inside(model, images, labels)
    assert not found.passed
    assert "as given 50.0%" in found.detail
    assert "100.0%" in found.detail.partition(shown)[2].partition(",")[0]
    assert checks.preprocessing_inside(lambda x: model(seen(x)), images, labels).passed


def test_red_and_blue_swapped_are_found():
    """Class 0 is red, class 1 blue, and the network was trained on BGR."""
    labels = torch.arange(40) % 2
    images = torch.full((40, 3, 8, 8), 0.3)
    images[labels == 0, 0], images[labels == 1, 2] = 0.9, 0.9
    bgr = lambda x: torch.stack([x[:, 2].mean((1, 2)), x[:, 0].mean((1, 2))], 1)  # noqa: E731
    found = checks.preprocessing_inside(bgr, images, labels)
    assert not found.passed
    assert "as BGR 100.0%" in found.detail
    assert checks.preprocessing_inside(lambda x: bgr(x.flip(1)), images, labels).passed


def test_a_model_that_refuses_other_pixels_is_honest(net, held_out):
    def strict(x):
        assert x.min() >= 0
        if x.max() > 1:
            raise ValueError("images beyond 1")
        return net(x)

    found = checks.preprocessing_inside(strict, *held_out)
    assert found.passed
    assert "times 255 0.0%" in found.detail


def test_a_small_surplus_is_chance(held_out):
    """Four images more of twenty are beyond 10 points; with 12 disagreements they are within two deviations."""
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(20, dtype=torch.int64)

    def model(lucky, unlucky):
        def logits(z):
            wrong = torch.zeros(20)
            wrong[: lucky if z.max() <= 1 and z.min() >= 0 else 0] = 1
            wrong[lucky : lucky + (0 if z.max() <= 1 and z.min() >= 0 else unlucky)] = 1
            return torch.stack([1 - wrong, wrong], 1)

        return logits

    assert checks.preprocessing_inside(model(8, 4), x, y).passed
    assert not checks.preprocessing_inside(model(8, 1), x, y).passed


class Counting:
    """A network that notes how many images it was given at once, with gradients and in all."""

    def __init__(self, net):
        self.net, self.climbed, self.seen = net, [], []

    def __call__(self, x):
        self.seen.append(len(x))
        if x.requires_grad:
            self.climbed.append(len(x))
        return self.net(x)


@pytest.mark.parametrize("size", [1, 7])
def test_no_check_gives_the_network_more_than_a_batch(size, net, held_out):
    """One at a time too; but two without gradients, to see whether an image depends on its company."""
    x, y = held_out[0][:20], held_out[1][:20]
    robust = robust_after(PGD(threat=LINF, steps=20, restarts=1), net, x, y)
    counting = Counting(net)
    found = checks.run_checks(counting, x, y, LINF, whitebox_robust=robust, batch_size=size)
    whole = checks.run_checks(net, x, y, LINF, whitebox_robust=robust)
    assert max(counting.climbed) == size
    assert max(counting.seen) == max(size, 2)
    assert [(c.name, c.passed) for c in found] == [(c.name, c.passed) for c in whole]


def test_gradients_that_are_no_numbers_are_found(net, held_out):
    """The root of 0 has an infinite slope, and 0 times that is none."""
    x, y = held_out[0][:20], held_out[1][:20]

    def root(z):
        return net(z) + 0 * (z - z.detach()).abs().sqrt().sum((1, 2, 3))[:, None]

    found = checks.gradients_not_zero(root, x, y)
    assert not found.passed
    assert found.detail == "0 of 20 images have a margin gradient of zero, 20 one that is not finite"
    true = checks.gradients_true(root, x, y)
    assert not true.passed
    assert "20 of 20 images change otherwise" in true.detail


def test_logits_that_are_no_numbers_near_the_images_fail_and_do_not_stop(net, held_out):
    """On the images themselves all is well; a random point of the ball gives NaN."""
    x, y = held_out[0][:20], held_out[1][:20]
    x, robust = x * 0.9, torch.ones(20, dtype=torch.bool)
    brittle = lambda z: torch.where(z.amax((1, 2, 3))[:, None] > x.max(), torch.nan, net(z))  # noqa: E731
    found = {c.name: c for c in checks.run_checks(brittle, x, y, LINF, whitebox_robust=robust)}
    assert not found["finite logits"].passed
    assert "NaN" in found["finite logits"].detail
    assert found["deterministic"].passed


def test_without_gradients_one_line_takes_the_place_of_three(net, held_out):
    x, y = held_out[0][:20], held_out[1][:20]
    robust = torch.zeros(20, dtype=torch.bool)
    all_of_them = [c.name for c in checks.run_checks(net, x, y, LINF, whitebox_robust=robust)]
    found = checks.run_checks(net, x, y, LINF, whitebox_robust=robust, gradients=False)
    of_gradients = {"gradients not zero", "gradients true", "reaches zero"}
    assert of_gradients < set(all_of_them)
    assert {c.name for c in found} == set(all_of_them) - of_gradients | {"gradients can be checked"}
    assert not next(c for c in found if c.name == "gradients can be checked").passed


def test_a_lack_of_memory_is_no_refusal(net, held_out):
    """A model that refuses images times 255 has none right there; one that lacks memory has said nothing."""

    def short(z):
        if z.max() > 1:
            raise MemoryError
        return net(z)

    with pytest.raises(MemoryError):
        checks.preprocessing_inside(short, *held_out)
