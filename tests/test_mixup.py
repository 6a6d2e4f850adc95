"""The mixup control: mixtures of two train images, of the class that weighs more, the same for the same seed."""

from pathlib import Path

import pytest
import torch

from gambeson.data.datasets import Digits
from gambeson.data.imageset import Split
from gambeson.data.synthetic import SyntheticStore
from gambeson.errors import UserError
from gambeson.store import Store
from gambeson.synthesis.mixup import MixupControl, mixtures, mixup_control


def test_each_image_lies_between_two_train_images_nearer_to_that_of_its_class() -> None:
    corners = torch.eye(4)[:, None, :, None]  # images that no mixture of others gives
    images, labels = mixtures(MixupControl(count=500), Split(corners, torch.arange(4)), 0, seed=3)
    weights = images[:, 0, :, 0]
    assert torch.allclose(weights.sum(1), torch.ones(100), atol=1e-6)
    assert ((weights > 1e-6).sum(1) <= 2).all()
    assert (weights.argmax(1) == labels).all()
    assert labels.bincount(minlength=4).min() > 10


def test_small_alpha_leaves_images_nearly_alone() -> None:
    corners, spec = Split(torch.eye(4)[:, None, :, None], torch.arange(4)), MixupControl(count=400, block=400)
    sharp = mixtures(MixupControl(count=400, block=400, alpha=0.05), corners, 0, seed=0)[0].amax((1, 2, 3)).mean()
    even = mixtures(spec, corners, 0, seed=0)[0].amax((1, 2, 3)).mean()
    assert abs(even - (0.75 + 0.25 * 0.25)) < 0.03  # E max(w, 1 - w) = 3/4; one pair in four is an image with itself
    assert sharp > 0.95


def test_the_stage_writes_a_store_that_depends_on_the_seed_alone(tmp_path: Path) -> None:
    real, spec = Digits().load(), MixupControl(count=250)
    read = []
    for runs, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = Store(tmp_path / runs).once(mixup_control, spec, real, seed=seed)
        store = SyntheticStore.open(made.folder / "images")
        assert (len(store), store.provenance["class_names"]) == (250, [str(k) for k in range(10)])
        read.append(store.digest)
    assert read[0] == read[1] != read[2]


@pytest.mark.parametrize("fields", [{"count": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"block": 0}])
def test_numbers_without_meaning_are_refused(fields: dict) -> None:
    with pytest.raises(UserError, match="control"):
        MixupControl(**fields)
