"""Feature spaces, samples of features, and the measured number."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gambeson.errors import UserError
from gambeson.quality.measured import Measured
from gambeson.quality.space import (
    FeatureSpace,
    Inception,
    Penultimate,
    Pixels,
    Sample,
    UserFeatures,
    comparable,
    embed,
    embed_source,
    wanted_positions,
)

IMAGES = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Halves(nn.Module):
    """A classifier of two classes whose features are the means of the upper and the lower half."""

    def features(self, images):
        return torch.stack([images[:, :, :2].mean((1, 2, 3)), images[:, :, 2:].mean((1, 2, 3))], 1)

    def forward(self, images):
        return self.features(images)


class Published(nn.Module):
    """Called as the published Inception file is: 8-bit pixels in three channels, features on demand."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        assert return_features
        return images.float().mean((2, 3))


class Disk:
    """Images as a store gives them, with a record of what was read."""

    def __init__(self, count, labels=None):
        self.images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
        self.labels, self.read = np.arange(count) % 3 if labels is None else labels, []

    def __len__(self):
        return len(self.images)

    def stretch(self, start, stop):
        self.read.append((start, stop))
        return self.images[start:stop], self.labels[start:stop]


def test_pixels_are_the_pixels_whatever_the_batch():
    found = embed(Pixels(), IMAGES, torch.arange(7), batch_size=3)
    assert torch.equal(found.features, IMAGES.flatten(1))
    assert found.space == "pixels"
    assert torch.equal(found.classes, torch.arange(7))
    assert isinstance(Pixels(), FeatureSpace)


def test_the_penultimate_layer_is_named_with_its_digest():
    space = Penultimate(Halves(), "teacher", "0123456789abcdef")
    assert space.name == "penultimate layer of teacher (0123456789ab)"
    assert space.digest == "0123456789abcdef"
    assert isinstance(space, FeatureSpace)
    assert torch.allclose(embed(space, IMAGES).features[:, 0], IMAGES[:, :, :2].mean((1, 2, 3)))


def test_a_source_on_disk_is_read_a_stretch_at_a_time():
    disk = Disk(10)
    found = embed_source(Pixels(), disk, batch_size=4)
    assert disk.read == [(0, 4), (4, 8), (8, 10)]
    assert torch.equal(found.features, torch.from_numpy(disk.images).permute(0, 3, 1, 2).float().flatten(1) / 255)
    assert found.labels.tolist() == (np.arange(10) % 3).tolist()


def test_a_limit_draws_by_seed_and_reads_little_more():
    disk = Disk(5000)
    found = embed_source(Pixels(), disk, limit=50, seed=3, batch_size=20)
    again = embed_source(Pixels(), disk, limit=50, seed=3, batch_size=7)
    other = embed_source(Pixels(), disk, limit=50, seed=4)
    assert len(found) == 50
    assert torch.equal(found.features, again.features)
    assert not torch.equal(found.features, other.features)
    whole = {tuple(row) for row in (torch.from_numpy(disk.images).flatten(1).float() / 255).tolist()}
    assert all(tuple(row) in whole for row in found.features.tolist())
    assert len({tuple(row) for row in found.features.tolist()}) == 50
    assert sum(b - a for a, b in disk.read[:50]) < 500


def test_sets_of_one_size_are_drawn_from_apart():
    """A copy and its original lie at one position of both: drawn together, all copies would show, or none."""
    whole = wanted_positions(100, 100, 0, "train")
    assert torch.equal(whole, torch.arange(100))
    drawn = {role: wanted_positions(400, 100, 0, role) for role in ("train", "validation", "synthetic")}
    for role, places in drawn.items():
        assert len(places.unique()) == 100
        assert torch.equal(embed_source(Pixels(), (disk := Disk(400)), limit=100, role=role).features,
                           embed_source(Pixels(), disk).features[places])  # fmt: skip
        for other in set(drawn) - {role}:
            assert torch.isin(places, drawn[other]).sum() < 50  # 25 on average
    assert torch.equal(embed_source(Pixels(), disk, limit=100).features,
                       embed_source(Pixels(), disk).features[drawn["synthetic"]])  # fmt: skip


def test_images_that_nobody_gave_a_class():
    assert embed_source(Pixels(), Disk(4, labels=np.full(4, -1))).labels is None
    some = embed_source(Pixels(), Disk(4, labels=np.array([0, -1, 1, -1])))
    with pytest.raises(UserError, match=r"labels in pixels: expected a class for every image.*got 2"):
        _ = some.classes
    with pytest.raises(UserError, match="got none"):
        _ = embed(Pixels(), IMAGES).classes


def test_features_that_are_not_finite_are_counted_and_the_space_named():
    broken = torch.ones(5, 3)
    broken[1, 2], broken[3, 0], broken[3, 1] = torch.nan, torch.inf, torch.nan
    with pytest.raises(UserError, match=r"features in layer X: .* NaN or infinity in 2 of 5 rows"):
        Sample(broken, None, "layer X")


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.ones(3), None),
        (torch.ones(3, 2).double(), None),
        (torch.ones(0, 2), None),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64)),
        (torch.ones(3, 2), torch.zeros(3)),
    ],
)
def test_samples_of_other_shapes_and_types_are_refused(features, labels):
    with pytest.raises(UserError, match="in pixels: expected"):
        Sample(features, labels, "pixels")


def test_samples_of_other_spaces_are_no_comparison():
    one = Sample(torch.ones(3, 2), None, "a")
    comparable(one, one)
    for other in (Sample(torch.ones(3, 2), None, "b"), Sample(torch.ones(3, 4), None, "a")):
        with pytest.raises(UserError, match="one space of one dimension"):
            comparable(one, other)


def test_a_draw_keeps_order_and_labels():
    sample = Sample(torch.arange(20.0)[:, None], torch.arange(20), "t")
    drawn = sample.drawn(5, 0, "x")
    assert drawn.features[:, 0].tolist() == sorted(drawn.features[:, 0].tolist()) == drawn.classes.tolist()
    assert sample.drawn(20, 0, "x") is sample


def test_a_users_program_needs_trust(tmp_path: Path):
    path = tmp_path / "features.pt"
    torch.jit.script(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(2))).save(path)
    with pytest.raises(UserError, match="expected --trust"):
        UserFeatures(path, trust=False)
    space = UserFeatures(path, trust=True)
    assert isinstance(space, FeatureSpace)
    assert space.name == f"features of features.pt ({space.digest[:12]})"
    assert torch.allclose(embed(space, IMAGES).features, torch.nn.functional.avg_pool2d(IMAGES, 2).flatten(1))


def test_what_is_no_program_is_refused(tmp_path: Path):
    (tmp_path / "text.pt").write_text("no program")
    with pytest.raises(UserError, match="expected a whole TorchScript file"):
        UserFeatures(tmp_path / "text.pt", trust=True)
    with pytest.raises(UserError, match="expected a TorchScript file"):
        UserFeatures(tmp_path / "missing.pt", trust=True)


def test_inception_gets_8_bit_pixels_and_grey_in_three_channels(tmp_path: Path):
    path = tmp_path / "inception.pt"
    torch.jit.script(Published()).save(path)
    space = Inception(path, trust=True)
    assert "Inception" in space.name
    grey = IMAGES[:, :1]
    found = embed(space, grey).features
    assert torch.allclose(found, (grey * 255).round().mean((2, 3)).expand(-1, 3), atol=1e-3)
    with pytest.raises(UserError, match="the published"):
        embed(space, IMAGES[:, :2])


def test_a_space_without_one_row_per_image_is_refused():
    class Lost:
        name, digest = "lost", "0"

        def __call__(self, images):
            return images.mean(0)[None]

    with pytest.raises(Exception, match=r"features in lost|expected|return"):  # beartype sees it first in tests
        embed(Lost(), IMAGES)
    with pytest.raises(UserError, match="at least one"):
        embed(Pixels(), IMAGES[:0])
    with pytest.raises(UserError, match="limit"):
        embed_source(Pixels(), Disk(3), limit=0)


ONE = Measured(
    name="FID", value=2.0, low=1.0, high=3.0, better="lower", ideal=0.0, space="pixels", real=5, synthetic=6,
    randomness="images",
)  # fmt: skip


def test_a_measured_number_survives_json():
    assert Measured(**json.loads(json.dumps(ONE.plain()))) == ONE


@pytest.mark.parametrize(
    "fields",
    [{"value": float("nan")}, {"high": float("inf")}, {"low": None}, {"low": 2.5}, {"low": None, "high": None}],
)
def test_a_measured_number_is_finite_and_inside_its_interval_or_says_why_there_is_none(fields):
    with pytest.raises(UserError, match="FID"):
        replace(ONE, **fields)
    assert replace(ONE, low=None, high=None, note="one training alone").low is None
