"""Robustness transfer by hand on a threshold, and the classification accuracy score on sets of known worth."""

import numpy as np
import pytest
import torch
from torch import nn

from gambeson.data.augment import PadCrop
from gambeson.data.imageset import ImageSet, Split
from gambeson.errors import UserError
from gambeson.models.resnet import ResNetSpec
from gambeson.quality.discriminator import inside, pictures
from gambeson.quality.train_on_synthetic import TrainOnSynthetic
from gambeson.quality.transfer import RobustnessTransfer, newcombe
from gambeson.robustness.attacks import PGD
from gambeson.robustness.losses import Plain
from gambeson.store import Store, Workspace
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.loop import Optimisation


class Memory:
    """Synthetic images in memory: uint8 NHWC and labels."""

    def __init__(self, images, labels):
        self.images, self.compact_labels = images, labels
        self.shape = images.shape[1:]

    def __len__(self):
        return len(self.images)

    def read(self, indices):
        return self.images[indices], self.compact_labels[indices].astype(np.int64)


def threshold():
    """One pixel: class 1 above 0.5."""
    layer = nn.Linear(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
    return nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)


def pixels(values, labels):
    return Split(torch.tensor(values)[:, None, None, None], torch.tensor(labels))


def test_newcombe_agrees_with_the_paper():
    """Newcombe 1998, method 10: 56/70 - 48/80 and 9/10 - 3/10."""
    for a, b, low, high in (((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090)):
        found = newcombe(a, b)
        assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
        turned = newcombe(b, a)
        assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_a_threshold_withstands_what_its_margins_are():
    """Margins of real images .3, .3, .05 and one wrong, of synthetic ones .3, .05, .05, .05; epsilon is .1."""
    real = pixels([0.8, 0.2, 0.55, 0.9], [1, 0, 1, 0])
    made = pixels([0.8, 0.45, 0.55, 0.45], [1, 0, 1, 0])
    measure = RobustnessTransfer(threat=ThreatModel(epsilon=0.1), attack=PGD(steps=5, restarts=1))
    rows = measure(threshold(), real, made, seed=0, name="a threshold")
    assert [row.value for row in rows] == [0.75, 1.0, -0.25, 0.5, 0.25, 0.25]
    gap = newcombe((2, 4), (1, 4))
    assert (rows[5].low, rows[5].high, rows[5].ideal, rows[5].better) == (gap.low, gap.high, 0.0, "near")
    assert [(row.real, row.synthetic) for row in rows[:3]] == [(4, 0), (0, 4), (4, 4)]
    assert "a threshold" in rows[0].note
    assert "robust accuracy (linf eps 0.1)" in rows[5].name


def test_transfer_takes_a_store_draws_by_its_seed_and_names_other_shares_of_classes():
    values = np.linspace(0, 255, 200).astype(np.uint8).reshape(-1, 1, 1, 1)
    store = Memory(values, (values[:, 0, 0, 0] > 127).astype(np.int8))
    real = pixels([0.8] * 190 + [0.2] * 10, [1] * 190 + [0] * 10)
    measure = RobustnessTransfer(threat=ThreatModel(epsilon=0.1), attack=PGD(steps=2, restarts=1), images=80)
    rows = measure(threshold(), real, store, seed=0)
    assert (rows[2].real, rows[2].synthetic) == (80, 80)
    assert "classes' shares differ" in rows[2].note
    assert measure(threshold(), real, store, seed=0) == rows
    assert measure(threshold(), real, store, seed=1) != rows
    assert "shares" not in measure(threshold(), store, store, seed=0)[2].note


def test_transfer_wants_a_class_for_every_image():
    real, made = pixels([0.8, 0.2], [1, 0]), Memory(np.zeros((3, 1, 1, 1), np.uint8), np.array([0, -1, -1]))
    with pytest.raises(UserError, match="synthetic images: expected a class for each, got none for 2 of 3"):
        RobustnessTransfer()(threshold(), real, made, seed=0)


def world(n, seed):
    """Three classes of 1x4x4 images: a bright row each, under noise."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = 0.3 + 0.1 * torch.randn(n, 1, 4, 4, generator=stream)
    images[torch.arange(n), 0, labels] += 0.3
    return Split(images.clamp(0, 1), labels)


def stored(split, labels=None):
    images = (split.images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return Memory(images, (split.labels if labels is None else labels).numpy())


def real_set():
    parts = {"train": world(90, 0), "validation": world(12, 1), "test": world(12, 2)}
    return ImageSet(name="rows", class_names=("a", "b", "c"), flip_safe=False, **parts)


TRAINING = ClassifierTraining(
    network=ResNetSpec(width=4, multipliers=(1, 2)),
    loss=Plain(),
    optimisation=Optimisation(steps=40, batch_size=32, average=0.8),
    augment=PadCrop(padding=0, flip=False),
    validations=1,
    validation_steps=1,
    threat=ThreatModel(epsilon=0.01),
)


def test_a_good_set_trains_as_well_as_real_images_and_a_mislabelled_one_does_not(tmp_path):
    """Labels turned round teach the wrong class: accuracy 0 where the true ones give 1."""
    attack = PGD(threat=ThreatModel(epsilon=0.02), steps=2, restarts=1)
    measure = TrainOnSynthetic(training=TRAINING, attack=attack)
    made, held_out, told = world(150, 5), world(60, 6), []
    store = Store(tmp_path, report=lambda stage, done, total: told.append((done, total)))
    good = measure(real_set(), stored(made), held_out=held_out, once=store.once, seed=0)
    assert [row.value > 0.9 for row in good[:2]] == [True, True]
    assert good[2].low <= 0 <= good[2].high
    assert "90 training images" in good[2].note
    assert [(row.real, row.synthetic) for row in good[:3]] == [(60, 90), (150, 0), (150, 90)]
    assert good[3].name.startswith("robust accuracy")
    told.clear()
    assert measure(real_set(), stored(made), held_out=held_out, once=store.once, seed=0) == good
    assert set(told) == {(0, 0)}  # all found, none trained again
    bad = measure(real_set(), stored(made, (made.labels + 1) % 3), held_out=held_out, once=store.once, seed=0)
    assert bad[0].value < 0.1
    assert bad[2].high < -0.7
    assert bad[1] == good[1]


def test_several_seeds_are_in_the_interval_and_trainings_may_lie_inside_a_stage(tmp_path):
    measure = TrainOnSynthetic(training=TRAINING, seeds=2, images=30)
    once = inside(Workspace(tmp_path))
    rows = measure(real_set(), stored(world(40, 5)), held_out=world(30, 6), once=once, seed=0)
    assert "training (2 seeds)" in rows[2].randomness
    assert len(list(tmp_path.rglob("classifier.safetensors"))) == 4


def test_what_would_choose_weights_by_real_images_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep 'last' and no patience"):
        TrainOnSynthetic(training=ClassifierTraining(keep="best"))
    unlabelled = stored(world(9, 5), torch.full((9,), -1))
    with pytest.raises(UserError, match="generated without a class"):
        TrainOnSynthetic()(real_set(), unlabelled, held_out=world(9, 6), once=Store(tmp_path).once, seed=0)
    assert not list(tmp_path.iterdir())


def test_pictures_are_drawn_without_replacement_and_pass_through_eight_bits():
    split = Split(torch.linspace(0, 1, 50)[:, None, None, None], torch.arange(50))
    drawn = pictures(split, 20, 0, "real")
    assert drawn.labels.unique().tolist() == drawn.labels.tolist()
    assert torch.equal(drawn.images, (split.images[drawn.labels] * 255).round() / 255)
    assert torch.equal(pictures(split, 20, 0, "real").labels, drawn.labels)
    assert not torch.equal(pictures(split, 20, 1, "real").labels, drawn.labels)
    assert pictures(split, None, 0, "real").labels.tolist() == list(range(50))
