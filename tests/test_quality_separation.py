"""Class separation: scatter by hand and in Gaussian worlds, nearest centroids across halves, bad input."""

import numpy as np
import pytest
import torch
from quality_worlds import covered, rng, sample

from gambeson.errors import UserError
from gambeson.quality.measured import Measure
from gambeson.quality.separation import ClassSeparation, alike_parts, centroid_hits, scatter
from gambeson.quality.space import Sample


def classes(count, means, g):
    """Images of unit variance about the means of their classes, in turn."""
    labels = torch.arange(count) % len(means)
    noise = torch.randn(count, means.shape[1], generator=g, dtype=torch.float64)
    return Sample((means[labels] + noise).float(), labels, "world")


def test_scatter_by_hand():
    """Classes {0, 2} and {10, 14}: centroids 1 and 12 about 6.5, spreads 1, 1 and 4, 4."""
    found = scatter(torch.tensor([[0.0], [2.0], [10.0], [14.0]]), torch.tensor([0, 0, 1, 1]))
    assert (found.between, found.within) == (5.5**2, 2.5)
    assert found.ratio == pytest.approx(12.1)


def test_scatter_weighs_classes_alike_about_the_mean_of_all_images():
    """Three images at 0, one at 4: the mean is 1, so (1 + 9) / 2."""
    found = scatter(torch.tensor([[0.0], [0.0], [0.0], [4.0]]), torch.tensor([3, 3, 3, 7]))
    assert (found.between, found.within) == (5.0, 0.0)


def test_centroids_of_the_other_half_by_hand():
    z = torch.tensor([[0.0], [10.0], [1.0], [3.0]])
    labels, half = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    # centroids of half 1 are 1 and 3: 0 -> 0, 10 -> 1; those of half 0 are 0 and 10: 1 -> 0, 3 -> 0, wrongly
    assert centroid_hits(z, labels, half).tolist() == [True, True, True, False]


def test_the_numbers_of_the_first_measurements():
    """dev/separation.py's own lines, from which this came: the same halves, the same numbers."""
    sample_ = classes(200, torch.randn(10, 6, generator=rng(5), dtype=torch.float64), rng(0))
    z, labels, half = sample_.features.double(), sample_.classes, torch.arange(200) // 10 % 2
    centres = torch.stack([z[labels == k].mean(0) for k in range(10)])
    right = []
    for part in (0, 1):
        theirs = torch.stack([z[(half != part) & (labels == k)].mean(0) for k in range(10)])
        right.append(torch.cdist(z[half == part], theirs).argmin(1) == labels[half == part])
    found = scatter(sample_.features, labels)
    assert found.within == pytest.approx((z - centres[labels]).square().sum(1).mean().item(), rel=1e-12)
    assert found.between == pytest.approx((centres - z.mean(0)).square().sum(1).mean().item(), rel=1e-12)
    hits = centroid_hits(sample_.features, labels, half)
    assert hits.double().mean().item() == torch.cat(right).double().mean().item()


def test_parts_are_alike_in_their_classes():
    labels = torch.randint(0, 4, (203,), generator=rng(0))
    part = alike_parts(labels, 5, 0)
    for k in range(4):
        sizes = torch.bincount(part[labels == k], minlength=5)
        assert sizes.max() - sizes.min() <= 1
    assert torch.equal(part, alike_parts(labels, 5, 0))
    assert not torch.equal(part, alike_parts(labels, 5, 1))


def test_separation_finds_the_closed_form_and_names_what_real_images_have():
    means = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    true = float((means - means.mean(0)).square().sum(1).mean()) / 2
    ratio, centroid = ClassSeparation()(classes(600, means, rng(0)), classes(900, 2 * means, rng(1)), seed=0)
    assert ratio.low < 4 * true < ratio.high
    assert ratio.ideal == pytest.approx(true, rel=0.15)
    assert (ratio.name, centroid.name) == ("class separation", "nearest centroid")
    assert (ratio.real, ratio.synthetic, ratio.better) == (600, 600, "higher")
    assert f"real images have {ratio.ideal:.4g}" in ratio.note
    assert centroid.ideal < centroid.value < 1
    assert isinstance(ClassSeparation(), Measure)


def test_classes_that_are_no_classes_are_not_separated():
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    ratio, centroid = ClassSeparation()(classes(400, nothing, rng(0)), classes(400, nothing, rng(1)), seed=0)
    assert ratio.low == 0
    assert ratio.high < 0.05
    assert centroid.low < 0.5 < centroid.high


def test_what_is_shown_is_what_the_interval_is_of():
    """Without the bias of 12 images of a class (the plain ratio of these has it), and not at an end of the interval."""
    means = 0.5 * torch.randn(10, 8, generator=rng(3), dtype=torch.float64)
    true = float((means - means.mean(0)).square().sum(1).mean()) / 8
    plain, rows = [], []
    for i in range(40):
        ours, theirs = classes(120, means, rng(i)), classes(120, means, rng(1000 + i))
        rows.append(ClassSeparation()(theirs, ours, seed=i)[0])
        plain.append(scatter(ours.features, ours.classes).ratio)
        assert rows[-1].low < rows[-1].value < rows[-1].high
        assert f"bias of order 1/N taken off: with it {plain[-1]:.4g}" in rows[-1].note
    for shown in ([r.value for r in rows], [r.ideal for r in rows]):
        assert abs(np.mean(shown) - true) < 3 * np.std(shown) / np.sqrt(40)
    assert np.mean(plain) - true > 6 * np.std(plain) / np.sqrt(40)


def test_intervals_cover_the_ratio_of_the_distributions():
    """60 repeats of 150 images; the plain ratio's bias, 3/4 of a class's (K - 1) / N, is more than a deviation."""
    means = torch.randn(4, 8, generator=rng(3), dtype=torch.float64)
    true = float((means - means.mean(0)).square().sum(1).mean()) / 8
    rows = [ClassSeparation()(s := classes(150, means, rng(i)), s, seed=i)[:1] for i in range(60)]
    shares = covered(rows, (true,))
    assert 0.88 <= shares["class separation"] <= 1
    assert np.mean([r[0].high - r[0].low for r in rows]) < 1.5 * 3.92 * np.std([r[0].value for r in rows])


def test_bad_input_is_refused():
    good = classes(60, torch.eye(3, dtype=torch.float64), rng(0))
    measure = ClassSeparation()
    with pytest.raises(UserError, match="got none; label the images"):
        measure(good, Sample(good.features, None, "world"), seed=0)
    lone = Sample(good.features, torch.cat([torch.zeros(58), torch.tensor([1.0, 2.0])]).long(), "world")
    with pytest.raises(UserError, match="at least 2 images of each class, got 1 of class 1, 2"):
        measure(good, lone, seed=0)
    with pytest.raises(UserError, match="at least 2 classes"):
        measure(Sample(good.features, torch.zeros(60).long(), "world"), good, seed=0)
    with pytest.raises(UserError, match="differ in their features"):
        measure(good, sample(torch.eye(3)[torch.arange(60) % 3], torch.arange(60) % 3), seed=0)
    with pytest.raises(UserError, match="images of all 2 classes in each half"):
        centroid_hits(torch.zeros(4, 1), torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(UserError, match="groups"):
        ClassSeparation(groups=1)


def test_two_images_of_a_class_are_enough():
    rows = ClassSeparation()(s := classes(6, 5 * torch.eye(3, dtype=torch.float64), rng(0)), s, seed=0)
    assert all(np.isfinite([r.value, r.low, r.high]).all() for r in rows)
