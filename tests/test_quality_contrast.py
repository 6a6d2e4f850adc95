"""Discriminators and ARC in worlds of Gaussian pixels, whose best accuracies are known, and the score's halves."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from gambeson.data.augment import PadCrop
from gambeson.data.imageset import Split
from gambeson.errors import UserError
from gambeson.models.resnet import ResNetSpec
from gambeson.quality.contrast import AdversarialContrast, Contrast, area_over_chance
from gambeson.quality.discriminator import (
    REAL,
    SYNTHETIC,
    CrossFitted,
    Discrimination,
    DiscriminatorScore,
    Judge,
    discriminator_scores,
    fold_of,
    inside,
    pictures,
    two_sources,
)
from gambeson.robustness.attacks import PGD
from gambeson.robustness.losses import PGDAdversarial, Plain
from gambeson.store import Store, Workspace
from gambeson.training.loop import Optimisation

SMALL = Discrimination(
    network=ResNetSpec(width=4, multipliers=(1, 2)),
    steps=3,
    optimisation=Optimisation(steps=50, batch_size=64, average=0.9),
    augment=PadCrop(padding=0, flip=False),
    images=700,
)
SIGMA = 0.1
"""Deviation of every pixel."""


def gaussian(n, mean, seed):
    """n images of 64 independent pixels N(mean, SIGMA^2)."""
    noise = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Split((mean + SIGMA * noise).clamp(0, 1), torch.zeros(n, dtype=torch.int64))


def contrast(epsilons, steps=50):
    spec = replace(SMALL, optimisation=replace(SMALL.optimisation, steps=steps))
    return AdversarialContrast(discrimination=spec, epsilons=epsilons, attack=PGD(steps=8, restarts=1))


def best(shift, epsilons):
    """The best robust accuracy of two Gaussians whose every pixel lies `shift` apart: that of the mean pixel's sign,
    Phi(sqrt(64) (shift / 2 - eps) / SIGMA), and chance at the least (Bhagoji et al. 2019)."""
    return np.array([max(norm.cdf(8 * (shift / 2 - e) / SIGMA), 0.5) for e in epsilons])


def test_gaussians_come_near_their_closed_form_and_never_lie_above_it(tmp_path):
    epsilons, shift, told = (0.0, 0.0125, 0.025), 0.05, []
    measure = contrast(epsilons)
    sources = gaussian(700, 0.5 - shift / 2, 0), gaussian(700, 0.5 + shift / 2, 1)
    store = Store(tmp_path, report=lambda stage, done, total: told.append((stage, done, total)))
    rows = measure(*sources, once=store.once, seed=0)
    found, true = np.array([row.value for row in rows[1:]]), best(shift, epsilons)
    assert true == pytest.approx([0.97725, 0.84134, 0.5], abs=1e-5)
    above = 3 * np.sqrt(true * (1 - true) / 420)
    assert (found < true + above).all()
    assert (found > true - 0.12).all()
    limit = float(area_over_chance(epsilons, true))
    assert 0.7 * limit < rows[0].value < 1.1 * limit
    assert rows[0].low < rows[0].value < rows[0].high
    assert (rows[0].real, rows[0].synthetic, rows[0].better) == (210, 210, "lower")
    told.clear()
    assert measure(*sources, once=store.once, seed=0) == rows
    assert all(done == 0 for _, done, _ in told)  # nothing was trained or tried again


def test_equal_sources_have_no_area_and_distant_ones_all_there_is(tmp_path):
    epsilons, once = (0.0, 0.02), Store(tmp_path).once
    equal = contrast(epsilons)(gaussian(700, 0.5, 0), gaussian(700, 0.5, 1), once=once, seed=0)
    apart = contrast(epsilons, 20)(gaussian(200, 0.25, 0), gaussian(200, 0.75, 1), once=once, seed=0)
    largest = 0.5 * 0.02
    assert equal[0].value < 0.08 * largest
    assert apart[0].value == pytest.approx(largest)
    assert apart[0].low < largest  # a width, where every image is told rightly
    assert "goes on beyond" in apart[0].note
    assert "goes on beyond" not in equal[0].note


class Killed(Exception):
    """What ends a run."""


def test_a_break_costs_the_training_that_it_met(tmp_path):
    measure, store = contrast((0.0, 0.02), 6), Store(tmp_path)
    sources, made = (gaussian(60, 0.4, 0), gaussian(60, 0.6, 1)), []

    def breaking(stage, *given, **named):
        if len(made) == 3:
            raise Killed
        made.append(store.once(stage, *given, **named))
        return made[-1]

    with pytest.raises(Killed):
        measure(*sources, once=breaking, seed=0)
    before = {a.folder: (a.folder / "done.json").stat().st_mtime_ns for a in made}
    rows = measure(*sources, once=store.once, seed=0)
    assert {f: (f / "done.json").stat().st_mtime_ns for f in before} == before
    assert rows == measure(*sources, once=inside(Workspace(tmp_path / "elsewhere")), seed=0)


def test_the_area_is_what_lies_above_chance():
    """Accuracies 1, .75, .25 at 0, .1, .3: trapezoids of heights .5, .25, 0."""
    assert area_over_chance((0.0, 0.1, 0.3), np.array([1.0, 0.75, 0.25])) == pytest.approx(0.0375 + 0.025)
    assert area_over_chance((0.0, 0.1, 0.3), np.array([[0.5, 0.4, 0.0], [1.0, 1.0, 1.0]])) == pytest.approx([0, 0.15])


def curve(accuracies, n, seed):
    """Verdicts that fall with epsilon, as they do: an image has one threshold for the whole curve."""
    threshold = np.random.default_rng(seed).random(2 * n)
    right = threshold[None] < np.array(accuracies)[:, None]
    return Contrast((0.0, 0.1, 0.2), right, np.arange(2 * n) < n)


def test_the_interval_of_the_area_covers_it():
    true = float(area_over_chance((0.0, 0.1, 0.2), np.array([0.95, 0.8, 0.65])))
    found = [curve((0.95, 0.8, 0.65), 150, seed).interval(seed, 300) for seed in range(100)]
    assert 0.88 <= np.mean([i.low <= true <= i.high for i in found]) <= 1
    spread = np.std([i.estimate for i in found])
    assert np.mean([(i.high - i.low) / 3.92 for i in found]) == pytest.approx(spread, rel=0.25)


def apart(accuracies, n, seed):
    """Verdicts of networks that err independently: an image has a threshold for every epsilon."""
    right = np.random.default_rng(seed).random((len(accuracies), 2 * n)) < np.array(accuracies)[:, None]
    return Contrast(tuple(0.1 * k for k in range(len(accuracies))), right, np.arange(2 * n) < n)


@pytest.mark.parametrize("accuracies", [(0.5,) * 6, (0.9, 0.7, 0.5, 0.5, 0.5, 0.4)])
def test_the_interval_covers_the_area_where_the_curve_is_at_chance(accuracies):
    """... though six accuracies above and below chance, of networks that err apart, have an area above it."""
    found = [apart(accuracies, 150, seed).interval(seed, 200) for seed in range(60)]
    true = float(area_over_chance(tuple(0.1 * k for k in range(6)), np.array(accuracies)))
    assert np.mean([i.estimate for i in found]) > true + 1e-3
    assert np.mean([i.low <= true <= i.high for i in found]) >= 0.9
    if true:
        assert min(i.low for i in found) > 0.3 * true
    else:
        assert np.mean([i.low == 0 for i in found]) >= 0.9


def test_an_accuracy_is_above_chance_only_if_it_is_for_that_many():
    """120 of 200 has a Wilson's end of 0.531; for six of them at once (z = 2.638), of 0.507; 118 has 0.497."""
    right = np.arange(200) < np.array([200, 120, 118, 100, 60, 118])[:, None]
    curve_ = Contrast((0.0, 0.1, 0.2, 0.3, 0.4, 0.5), right, np.arange(200) % 2 == 0)
    assert curve_.above().tolist() == [True, True, False, False, False, False]
    assert Contrast((0.0,), right[2:3], curve_.real).above().tolist() == [True]


def test_the_curve_is_kept_with_its_intervals():
    plain = curve((0.9, 0.7, 0.5), 100, 0).plain()
    assert plain["epsilon"] == [0.0, 0.1, 0.2]
    assert all(a < b < c for a, b, c in zip(plain["low"], plain["accuracy"], plain["high"], strict=True))


def numbered(first, count):
    """Images that are told by their pixel."""
    return (torch.arange(first, first + count) / 255.0)[:, None, None, None]


def test_the_two_sources_are_split_evenly_and_no_image_is_in_two_parts():
    pair = two_sources(replace(SMALL, images=50, held_out=0.3), numbered(0, 100), numbered(100, 60), 0)
    for part, size in ((pair.train, 32), (pair.validation, 3), (pair.test, 15)):
        assert (part.labels == REAL).sum() == (part.labels == SYNTHETIC).sum() == size
        assert torch.equal(part.images[:, 0, 0, 0] * 255 < 99.5, part.labels == REAL)
    every = torch.cat([part.images.flatten() for part in (pair.train, pair.validation, pair.test)])
    assert len(every.unique()) == 100
    assert pair.class_names == ("synthetic", "real")
    with pytest.raises(UserError, match="of the shape"):
        two_sources(SMALL, numbered(0, 20), numbered(0, 20).expand(-1, 3, -1, -1), 0)
    with pytest.raises(UserError, match="at least 8, got 5"):
        two_sources(SMALL, numbered(0, 20), numbered(0, 5), 0)


def test_without_epsilon_the_training_is_plain():
    assert isinstance(replace(SMALL, epsilon=0.0).training.loss, Plain)
    robust = replace(SMALL, norm="l2", epsilon=0.5).training
    assert isinstance(robust.loss, PGDAdversarial)
    assert robust.trained_threat == robust.threat
    for wrong in ((0.1, 0.2), (0.0,), (0.0, 0.2, 0.2)):
        with pytest.raises(UserError, match=r"contrast\.epsilons"):
            AdversarialContrast(epsilons=wrong)


class Logits(nn.Module):
    """Logits (0, slope * the first pixel)."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, images):
        first = images[:, 0, 0, 0]
        return torch.stack([torch.zeros_like(first), self.slope * first], 1)


def test_the_score_is_the_log_odds_of_real():
    images = numbered(0, 4)
    odds = discriminator_scores(Logits(3.0).eval(), images)
    assert odds == pytest.approx((3 * images.flatten()).tolist())
    with pytest.raises(UserError, match="two logits"):
        discriminator_scores(nn.Sequential(nn.Flatten(), nn.Linear(1, 3)).eval(), images)


def test_folds_are_halves_that_a_position_alone_decides():
    folds = fold_of(torch.arange(4000), 0)
    assert sorted(folds.unique().tolist()) == [0, 1]
    for k in range(10):  # classes that come in turn are halved too
        assert abs(folds[k::10].double().mean() - 0.5) < 4 * 0.5 / math.sqrt(400)
    assert torch.equal(fold_of(torch.tensor([7, 3999, 0]), 0), folds[[7, 3999, 0]])
    assert not torch.equal(fold_of(torch.arange(4000), 1), folds)


def test_each_image_is_scored_by_the_network_of_the_other_half():
    judges = Judge(Logits(1.0).eval(), 0.0, 1.0, 0.5), Judge(Logits(-1.0).eval(), 0.5, 2.0, 0.5)
    scores = CrossFitted(judges, 0, "")(torch.arange(100), numbered(1, 100))
    pixel, fold = numbered(1, 100).flatten(), fold_of(torch.arange(100), 0)
    expected = torch.where(fold == 1, pixel, (-pixel - 0.5) / 2)
    assert scores == pytest.approx(expected.tolist())


class Memory:
    """Synthetic images in memory, which remembers what was read of it."""

    def __init__(self, images):
        self.pixels, self.seen = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy(), []

    def __len__(self):
        return len(self.pixels)

    def read(self, indices):
        self.seen.append(indices)
        return self.pixels[indices], np.zeros(len(indices), np.int64)


def test_the_most_real_images_score_highest_though_no_network_was_trained_on_them(tmp_path):
    """Half of the synthetic images are drawn as the real ones are, half are brighter by a deviation."""
    good, bad = gaussian(200, 0.45, 1).images, gaussian(200, 0.55, 2).images
    source, real = Memory(torch.stack([good, bad], 1).flatten(0, 1)), gaussian(300, 0.45, 3)
    spec = DiscriminatorScore(
        discrimination=replace(SMALL, epsilon=0.005, optimisation=replace(SMALL.optimisation, steps=25))
    )
    once = Store(tmp_path).once
    fitted = spec.fit(once, real, source, seed=0)
    for places, fold in zip(source.seen, (0, 1), strict=True):
        assert (fold_of(torch.from_numpy(places), 0) == fold).all()
    scores = fitted(torch.arange(400), pictures(source, None, 0, "all").images).numpy()
    better = (scores[::2, None] > scores[None, 1::2]).mean()  # the area under the ROC curve
    assert better > 0.95
    halves = [scores[fold_of(torch.arange(400), 0).numpy() == fold] for fold in (0, 1)]
    for half in halves:
        assert (half.mean(), half.std(ddof=1)) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))
    assert 0.6 < fitted.judges[0].accuracy < 0.95  # half of the synthetic images cannot be told
    assert spec.fit(once, real, source, seed=0).digest == fitted.digest
    assert len(list(tmp_path.rglob("done.json"))) == 2


def test_a_half_of_few_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 8 synthetic images in each of 2 halves"):
        DiscriminatorScore().fit(Store(tmp_path).once, gaussian(20, 0.5, 0), Memory(numbered(0, 10)), seed=0)
