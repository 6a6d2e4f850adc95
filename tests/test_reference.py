"""Ours beside the reference package (pyautoattack 0.2): the same steps from the same start, and never weaker.

tests/equivalence keeps four networks and what the reference finds on 200 images of each, seed by seed (make.py there).
"""

import inspect
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from equivalence.subjects import SUBJECTS, images, reference
from torch.nn import functional as F

from gambeson.robustness import APGD, DLR, CrossEntropy, TargetedAPGD, TargetedDLR, robust_after
from gambeson.robustness.attacks import chase
from gambeson.robustness.autoattack import AutoAttack
from gambeson.robustness.fab import FAB, TargetedFAB, minimal_distance
from gambeson.robustness.square import Square

STEPS, FEW = 60, 12
SEEDS = 3
"""Of ours, where seeds differ and cost little."""
QUICK = [SUBJECTS["trades-linf"], SUBJECTS["pgd-l2"]]


@pytest.fixture
def theirs():
    return pytest.importorskip("equivalence.theirs", reason="the reference, pyautoattack, is not installed")


# ---- no weaker than the reference, whose verdicts are kept ----

SHORT = {
    "apgd-ce": APGD(),
    "apgd-dlr": APGD(loss=DLR()),
    "apgd-t-20": TargetedAPGD(steps=20),
    "fab-t-20": TargetedFAB(steps=20),
    "square-mended-500": Square(queries=500, horizon=10_000),
}
"""Attacks of seconds; the number is the reference's name for a smaller budget, here and there the same."""
FULL = {
    "apgd-t": TargetedAPGD(),
    "fab": FAB(),
    "fab-t": TargetedFAB(),
    "square-mended": Square(horizon=10_000),
    "standard": AutoAttack(),
}
"""AutoAttack's own budgets, and the whole."""


def kept(subject, name):
    """[seeds, 200] what the reference found: verdicts, or what is named after the attack."""
    return reference()[0][f"{subject.name}/{name}"]


def ours_on(subject, attack, seed):
    """How many images we leave; AutoAttack and `robust_after` check that every fooling one lies in the ball."""
    attack, model = replace(attack, threat=subject.threat), subject.model()
    if isinstance(attack, AutoAttack):
        return int(replace(attack, seed=seed)(model, *images(), batch_size=200).robust.sum())
    return int(robust_after(attack, model, *images(), batch_size=200, seed=seed).sum())


def check_range(subject, name, attack, seeds):
    """Ours leaves no more images, in the mean of our seeds, than the reference in the worst of its own."""
    found, range_of_theirs = [ours_on(subject, attack, seed) for seed in range(seeds)], kept(subject, name).sum(1)
    assert np.mean(found) <= range_of_theirs.max(), (found, range_of_theirs)
    assert min(found) > 0.9 * range_of_theirs.min(), "suspiciously strong"


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t-20"])
@pytest.mark.parametrize("subject", QUICK, ids=lambda s: s.name)
def test_no_weaker_than_the_reference(subject, name):
    check_range(subject, name, SHORT[name], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHORT, *FULL])
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_no_weaker_than_the_reference_with_every_attack_and_network(subject, name):
    check_range(subject, name, (SHORT | FULL)[name], SEEDS if name.startswith("apgd") or name in SHORT else 1)


@pytest.mark.parametrize("subject", QUICK, ids=lambda s: s.name)
def test_fab_finds_the_distances_of_the_reference(subject):
    """Nine in ten images to 1e-5, without the line search that is ours; FAB draws nothing in its first climb."""
    x, y = (part[:40] for part in images())
    attack = TargetedFAB(threat=subject.threat, steps=20)
    found = minimal_distance(attack, subject.model(), x, y, search=0).numpy()
    expected = kept(subject, "fab-t-20/distance")[0, :40]
    right = np.isfinite(expected)
    assert (found[~right] == 0).all()  # wrong from the start
    assert right.sum() > 30
    ratio = found[right] / expected[right]
    assert np.quantile(np.abs(ratio - 1), 0.9) < 1e-5
    assert 0.99 < ratio.mean() < 1.001
    searched = minimal_distance(attack, subject.model(), x, y).numpy()
    assert (searched <= found * (1 + 1e-6)).all()


@pytest.mark.parametrize("subject", QUICK, ids=lambda s: s.name)
def test_square_is_the_reference_with_its_last_row_and_column(subject):
    """500 queries: verdicts and the mean margin left (0 where fooled) are those of the reference whose windows reach
    the edges; as it is, it leaves a tenth more images."""
    found = chase(replace(SHORT["square-mended-500"], threat=subject.threat), subject.model(), *images())
    mended, as_it_is = (kept(subject, name).sum(1) for name in ("square-mended-500", "square-500"))
    assert mended.max() < as_it_is.min()
    assert 0.95 * mended.min() < found.right.sum() <= mended.max()
    left, expected = found.margin.clamp_min(0).mean(), kept(subject, "square-mended-500/margin").clip(0).mean()
    assert abs(left / expected - 1) < 0.05


@pytest.mark.slow
def test_the_reference_gives_the_kept_verdicts(theirs):
    """Seed 0 of every attack on one network, run again; another machine's rounding may turn an image in a hundred."""
    subject = SUBJECTS["trades-linf"]
    for name in theirs.RUNS:
        again = theirs.run(subject, name, 0).right
        assert (again != kept(subject, name)[0]).mean() <= 0.01, name


def test_what_is_kept():
    """Ten classes, 200 images, several seeds of every attack, in the ball that is attacked; 35 to 65 % stand."""
    facts = reference()[1]
    assert facts["pyautoattack"] == "0.2.0"
    assert sum(subject.path.stat().st_size for subject in SUBJECTS.values()) < 1_500_000
    for subject in SUBJECTS.values():
        assert facts["threats"][subject.name] == str(subject.threat)
        assert subject.model().classes == 10
        stands = kept(subject, "standard")
        assert stands.shape == (5, 200)
        assert 0.35 < stands.mean() < 0.65
        for name in (*SHORT, *FULL):
            assert kept(subject, name).shape[1] == 200
            assert kept(subject, name).sum(1).tolist() == facts["runs"][f"{subject.name}/{name}"]["stand"]


# ---- AutoPGD step by step ----


@dataclass
class Watched:
    """A network that notes where the reference looks, and with which step sizes it came there."""

    model: torch.nn.Module
    points: list = field(default_factory=list)
    sizes: list = field(default_factory=list)

    def __call__(self, x):
        caller = inspect.currentframe().f_back.f_locals
        if "step_size" in caller:
            self.sizes.append(caller["step_size"].flatten().clone())
        self.points.append(x.detach().clone())
        return self.model(x)


@pytest.fixture
def double():
    """What the reference makes for itself is float64 inside: it would compare losses in float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mended(attack, first):
    """The reference, counting the rises of the first window from the start.

    Its table of losses has no row for the start [`first`], so it looks one row before the first, which is the table's
    last: zeros. Algorithm 1 (Croce & Hein 2020) compares with the start. Cross-entropies are above 0 and rise in the
    first step, which hides the slip; a DLR loss is below 0 as long as the image stands, and that rise is lost.
    """
    count = attack.check_oscillation
    attack.check_oscillation = lambda losses, j, *rest, **more: count(
        torch.cat([losses[: j + 1], first]), j, *rest, **more
    )


@pytest.mark.parametrize(
    ("loss", "ours", "mend"),
    [("ce", CrossEntropy(), False), ("ce", CrossEntropy(), True), ("dlr", DLR(), True), ("t", TargetedDLR(), True)],
)
@pytest.mark.parametrize("name", ["trades-linf", "pgd-l2"])
def test_apgd_takes_the_reference_steps(name, loss, ours, mend, double, theirs):
    """Same start: every point, loss and step size of 60 steps, in float64; and the best loss at the end.

    An image is left out from where its DLR loss is 1 (the label's logit is the third): the gradient there is rounding.
    """
    subject = SUBJECTS[name]
    threat, model = subject.threat, subject.model().double()
    x, y = images()[0][:FEW].double(), images()[1][:FEW]
    start = threat.random(x, torch.rand(x.shape, generator=torch.Generator().manual_seed(1)))
    target = (y + 3) % 10
    climbs = list(APGD(threat=threat, steps=STEPS, loss=ours).trace(model, x, y, start, target))

    watched, attack = Watched(model), theirs.apgd(subject, 0, loss, STEPS)
    attack.model, attack.y_target = watched, target
    attack.init_hyperparam(x)
    if mend:
        mended(attack, climbs[0].loss[None])
    *_, best, _ = attack.attack_single_run(x, y, x_init=start)

    judged = {"ce": lambda z, y: F.cross_entropy(z, y, reduction="none"), "dlr": attack.dlr_loss}
    judged, live = judged.get(loss) or attack.dlr_loss_targeted, torch.ones(FEW, dtype=torch.bool)
    assert len(climbs) == len(watched.points) == STEPS + 1 == len(watched.sizes) + 1
    for climb, point, size in zip(climbs, watched.points, [climbs[0].step_size, *watched.sizes], strict=True):
        torch.testing.assert_close(climb.x[live], point[live], rtol=0, atol=1e-9)
        torch.testing.assert_close(climb.loss[live], judged(model(point).detach(), y)[live], rtol=0, atol=1e-8)
        torch.testing.assert_close(climb.step_size[live], size[live], rtol=1e-12, atol=0)
        live &= (climb.loss - 1).abs() > 1e-9
    assert live.sum() > FEW / 2
    assert len(torch.stack([c.step_size for c in climbs]).unique()) > 3
    torch.testing.assert_close(climbs[-1].best_loss[live], best[live], rtol=0, atol=1e-8)


def test_the_first_rise_is_what_the_reference_forgets(double, theirs):
    """Without the mend the step sizes of a DLR climb differ, and only from the first check on."""
    subject = SUBJECTS["trades-linf"]
    x, y = images()[0][:FEW].double(), images()[1][:FEW]
    start = subject.threat.project(x + 0.1, x)
    model = subject.model().double()
    climbs = list(APGD(threat=subject.threat, steps=STEPS, loss=DLR()).trace(model, x, y, start))
    watched, attack = Watched(model), theirs.apgd(subject, 0, "dlr", STEPS)
    attack.model = watched
    attack.init_hyperparam(x)
    attack.attack_single_run(x, y, x_init=start)
    differ = [bool((c.step_size - size).abs().max() > 1e-9) for c, size in zip(climbs[1:], watched.sizes, strict=True)]
    assert differ.index(True) == int(0.22 * STEPS)
