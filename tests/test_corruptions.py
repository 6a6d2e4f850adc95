"""Common corruptions: the same promises from all fifteen, and each against what can be worked out by hand."""

import colorsys
import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torch.nn import functional as F

from gambeson.data import corruptions
from gambeson.data.corruptions import CORRUPTIONS, corrupted, poisson_quantile
from gambeson.errors import UserError
from gambeson.randomness import image_keys, uniform
from gambeson.robustness.common_corruptions import corruption_accuracy, mean_accuracies

EVERY = pytest.mark.parametrize("name", CORRUPTIONS)
f64 = torch.float64


def smooth(number, channels=3, height=32, width=32, seed=0):
    """Images with structure: random blobs of an eighth of a side."""
    coarse = torch.rand(number, channels, 10, 10, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height + 8, width + 8), mode="bicubic")[:, :, 4:-4, 4:-4].clamp(0, 1)


def keys(images, seed=0):
    return image_keys(images, torch.zeros(len(images), dtype=torch.int64), seed)


def point(side=33):
    """One bright pixel in the middle."""
    image = torch.zeros(1, 1, side, side)
    image[0, 0, side // 2, side // 2] = 1
    return image


# ---- the same promises from all ----


@EVERY
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (1, 32, 32), (3, 9, 14), (3, 48, 40)], ids=str)
def test_every_corruption_gives_other_images_of_the_same_kind(name, shape):
    images = smooth(4, *shape)
    labels = torch.arange(4)
    before, state = images.clone(), torch.get_rng_state()
    for severity in (1, 5):
        found = corrupted(name, images, labels, severity)
        assert found.shape == images.shape
        assert found.dtype == torch.float32
        assert found.min() >= 0
        assert found.max() <= 1
        changed = (found - images).flatten(1).abs().amax(1) > 1e-3
        # one in a hundred of 64 values is often none
        assert changed.all() or (name == "impulse_noise" and changed.any()), "an image stayed as it was"
        assert torch.equal(found, corrupted(name, images, labels, severity))
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert corrupted(name, images.double(), labels, 1).dtype == f64


@EVERY
def test_an_image_goes_bad_the_same_way_in_any_company(name):
    images, labels = smooth(7), torch.arange(7)
    whole = corrupted(name, images, labels, 3)
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    torch.testing.assert_close(corrupted(name, images[order], labels[order], 3), whole[order], rtol=0, atol=1e-6)
    for i in (0, 5):
        alone = corrupted(name, images[i : i + 1], labels[i : i + 1], 3)
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-6)


RANDOM = set(CORRUPTIONS) - {
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression",
}  # fmt: skip


@EVERY
def test_draws_are_the_seeds_and_the_images(name):
    images, labels = smooth(2), torch.tensor([0, 1])
    once, other = corrupted(name, images, labels, 5, seed=0), corrupted(name, images, labels, 5, seed=1)
    assert torch.equal(once, other) == (name not in RANDOM)


@EVERY
@pytest.mark.parametrize("side", [8, 32])
def test_a_higher_severity_is_further_away(name, side):
    """On average, as far as CIFAR-10-C's settings make it so: its elastic transform tilts less where it bends more, and
    single steps of frost and glass go back a little."""
    images = smooth(24, 3, side, side)
    far = [(corrupted(name, images, torch.arange(24), s) - images).square().mean().sqrt().item() for s in range(1, 6)]
    if name != "elastic_transform":
        assert all(later > 0.85 * earlier for earlier, later in pairwise(far)), far
        assert far[4] > 1.15 * far[0], far


SAME_GREY = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate")


@pytest.mark.parametrize("name", SAME_GREY)
def test_what_only_moves_or_mixes_pixels_keeps_a_grey_image(name):
    grey = torch.full((2, 3, 32, 32), 0.3)
    torch.testing.assert_close(corrupted(name, grey, torch.tensor([0, 1]), 5), grey, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "snow", "fog", "frost", "elastic_transform"]
)
def test_lengths_grow_with_the_side(name):
    """An image of twice the side is as far from its clean one: on images without detail, within a half."""
    far = []
    for side in (32, 64):
        images = smooth(24, 3, side, side)
        far.append((corrupted(name, images, torch.arange(24), 4) - images).square().mean().sqrt().item())
    assert 2 / 3 < far[1] / far[0] < 3 / 2, far


def test_what_cannot_be_corrupted_is_named():
    images, labels = smooth(2), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"unknown corruption: expected one of gaussian_noise, .*got 'gausian_noise'"):
        corrupted("gausian_noise", images, labels, 1)
    for severity in (0, 6):
        with pytest.raises(UserError, match="severity: expected 1, 2, 3, 4 or 5"):
            corrupted("fog", images, labels, severity)
    for bad in (images[:, :2], images[..., :7], torch.cat([images, images[:, :1]], 1)):
        with pytest.raises(UserError, match=r"\[B, 1 or 3, 8 or more"):
            corrupted("fog", bad, labels, 1)
    for bad in (images * 255, images - 0.5, images * math.nan):
        with pytest.raises(UserError, match=r"values in \[0, 1\]"):
            corrupted("fog", bad, labels, 1)


# ---- each by hand ----


def test_poissons_quantiles_are_scipys():
    stream = torch.Generator().manual_seed(0)
    for most in (0.3, 5.0, 500.0):
        share = torch.rand(4000, generator=stream, dtype=f64).clamp_min(2.0**-53)
        mean = most * torch.rand(4000, generator=stream, dtype=f64).clamp_min(1e-12)
        found = poisson_quantile(share, mean)
        np.testing.assert_array_equal(found.numpy(), stats.poisson.ppf(share.numpy(), mean.numpy()))
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=f64)
    for mean in (1e-12, 0.5, 500.0):
        found = poisson_quantile(ends, torch.full_like(ends, mean))
        np.testing.assert_array_equal(found.numpy(), stats.poisson.ppf(ends.numpy(), mean))


def test_noise_has_the_moments_of_its_law():
    """100,000 values: means within 5 standard errors."""
    grey = torch.full((33, 3, 32, 32), 0.5)
    n, settings = grey.numel(), {name: c.settings for name, c in CORRUPTIONS.items()}
    x = corruptions.gaussian_noise(grey, torch.arange(33), settings["gaussian_noise"][4]) - grey
    assert abs(x.mean().item()) < 5 * 0.1 / math.sqrt(n)
    assert x.std().item() == pytest.approx(0.1, rel=0.02)
    x = corruptions.shot_noise(grey, torch.arange(33), settings["shot_noise"][4])
    assert abs(x.mean().item() - 0.5) < 5 * 0.1 / math.sqrt(n)
    assert x.var().item() == pytest.approx(0.5 / 50, rel=0.03)
    torch.testing.assert_close(x * 50, (x * 50).round(), rtol=0, atol=1e-4)
    x = corruptions.impulse_noise(grey, torch.arange(33), settings["impulse_noise"][4])
    for value in (0, 1):
        assert (x == value).float().mean().item() == pytest.approx(0.035, abs=5 * math.sqrt(0.035 / n))
    assert set(x.unique().tolist()) == {0.0, 0.5, 1.0}


def test_shot_noise_leaves_black_black():
    assert corrupted("shot_noise", torch.zeros(1, 1, 8, 8), torch.tensor([0]), 5).max() == 0


def test_disks_are_cifar_10_cs_at_32_pixels():
    """Radius 1: a cross of fifths (its smoothing is next to nothing). Radius 0.3: a point smoothed over 3x3 cells."""
    cross = corruptions.defocus_blur(point(32), torch.arange(1), (1.0, 0.2))[0, 0, 14:19, 14:19]
    expected = torch.zeros(5, 5)
    expected[2, 1:4] = expected[1:4, 2] = 0.2
    torch.testing.assert_close(cross, expected, rtol=0, atol=1e-4)
    smoothed = corruptions.defocus_blur(point(32), torch.arange(1), (0.3, 0.4))[0, 0, 15:18, 15:18]
    bell = torch.tensor([math.exp(-1 / 0.32), 1, math.exp(-1 / 0.32)])
    torch.testing.assert_close(smoothed, torch.outer(bell, bell) / bell.sum() ** 2, rtol=0, atol=1e-5)


def test_a_disk_at_a_quarter_of_the_size_is_read_between_pixels():
    """Radius 1 at 32 pixels is a quarter of a pixel at 8: the point keeps 1/5 + 4/5 3/4, 1/20 goes each way."""
    found = corruptions.defocus_blur(point(8), torch.arange(1), (1.0, 0.01))[0, 0, 3:6, 3:6]
    expected = torch.tensor([[0, 0.05, 0], [0.05, 0.8, 0.05], [0, 0.05, 0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_larger_images_get_finer_kernels_not_sparser_ones():
    """At 96 pixels a disk of radius 1 covers every pixel within 3, and a line of 6 has no gaps."""
    disk = corruptions.defocus_blur(point(96), torch.arange(1), (1.0, 0.1))[0, 0, 45:52, 45:52]
    near = torch.arange(-3, 4)
    assert torch.equal(disk > 0.01, near[:, None] ** 2 + near**2 <= 9)
    line = corruptions._dragged(point(96), (6.0, 1.0), torch.zeros(1))[0, 0, 48]
    assert (line[41:49].diff() > 0).all()


def test_motion_draws_a_point_out_to_one_side():
    """Along a row, to the left: half a Gaussian of deviation 1."""
    weights = torch.tensor([math.exp(-(k**2) / 2) for k in range(5)])
    found = corruptions._dragged(point(32), (6.0, 1.0), torch.zeros(1))[0, 0, 16]
    torch.testing.assert_close(found[12:17].flip(0), weights / weights.sum(), rtol=0, atol=1e-4)
    assert found[17:].max() < 1e-6
    down = corruptions._dragged(point(32), (6.0, 1.0), torch.full((1,), -math.pi / 2))[0, 0, :, 16]
    torch.testing.assert_close(down[16:21], weights / weights.sum(), rtol=0, atol=1e-4)


def test_glass_replaces_pixels_by_near_ones():
    """Each of the values of a ramp comes from its own place or one above, left, or both."""
    ramp = (torch.arange(1024.0) / 1024).reshape(1, 1, 32, 32)
    draws = uniform(keys(ramp), "glass blur", (2, 32, 32), 0)
    found = corruptions._scattered(ramp, draws, 1)[0, 0]
    for i, j in ((5, 7), (20, 31), (31, 2)):
        up, left = (int(draws[0, k, i, j] < 0.5) for k in (0, 1))
        assert found[i, j] == ramp[0, 0, i - up, j - left]
    assert found[0, 0] == 0


def test_zooming_enlarges_about_the_middle():
    """Of a row 0, 1, ..., 8 the doubled image shows 2 to 6 in halves."""
    row = torch.arange(9.0).expand(1, 1, 9, 9)
    torch.testing.assert_close(corruptions._zoomed(row, 2.0)[0, 0, 3], torch.arange(2, 6.1, 0.5), rtol=0, atol=1e-5)
    # means of the image and of its enlargements by 0 and 1 per cent, 4 from the middle: 4, 4 and 4 / 1.01
    found = corruptions.zoom_blur(row, torch.arange(1), 2)[0, 0, 0, 8].item()
    assert found == pytest.approx(4 + (4 + 4 + 4 / 1.01) / 3, abs=1e-5)


def test_clouds_by_hand():
    """Two by two cells, periodic: the corner is 0, the middle its own draw, the edges half the middle and their own."""
    one = torch.tensor([12345])
    middle, above, left = (2 * uniform(one, "x", (3, 1, 1)) - 1).flatten().tolist()
    raw = torch.tensor([[0, middle / 2 + above], [middle / 2 + left, middle]], dtype=f64)
    expected = (raw - raw.min()) / (raw.max() - raw.min())
    torch.testing.assert_close(corruptions._plasma(one, "x", 2, 3.0)[0], expected)
    clouds = corruptions._plasma(torch.arange(40), "x", 32, 1.75)
    assert clouds.amin((1, 2)).max() == 0
    assert clouds.amax((1, 2)).min() == 1
    rough = (clouds - clouds.roll(1, 2)).square().mean() / clouds.var()
    fine = corruptions._plasma(torch.arange(40), "x", 32, 3.0)
    assert (fine - fine.roll(1, 2)).square().mean() / fine.var() < 0.75 * rough


def test_clouds_by_an_account_of_single_points():
    """Eight by eight: every point is the mean of its four neighbours (periodic) of the grid so far, plus its draw."""
    one, side, decay = torch.tensor([777]), 8, 1.5
    raw, step, level = {(0, 0): 0.0}, side, 0
    while step > 1:
        half, count, size = step // 2, side // step, decay ** (-2 * level)
        draws = size * (2 * uniform(one, "x", (3, count, count), level)[0] - 1)
        corners = [(i, j) for i in range(0, side, step) for j in range(0, side, step)]
        for kind, down, right in ((0, half, half), (1, 0, half), (2, half, 0)):
            ways = [(half, half), (half, -half), (-half, half), (-half, -half)]
            ways = ways if kind == 0 else [(half, 0), (-half, 0), (0, half), (0, -half)]
            made = {}
            for i, j in corners:
                near = [raw[(i + down + a) % side, (j + right + b) % side] for a, b in ways]
                made[i + down, j + right] = sum(near) / 4 + draws[kind, i // step, j // step].item()
            raw |= made
        step, level = half, level + 1
    low, high = min(raw.values()), max(raw.values())
    expected = [[(raw[i, j] - low) / (high - low) for j in range(side)] for i in range(side)]
    torch.testing.assert_close(corruptions._plasma(one, "x", side, decay)[0], torch.tensor(expected, dtype=f64))


def test_fog_keeps_the_brightest_value():
    """(x + w p) m / (m + w): where the cloud is 1 the brightest value m stays."""
    grey = torch.full((3, 1, 32, 32), 0.6)
    found = corruptions.fog(grey, keys(grey), (1.5, 1.75))
    assert found.max().item() == pytest.approx(0.6, abs=1e-6)
    assert found.min().item() == pytest.approx(0.6 * 0.6 / 2.1, abs=1e-6)


def test_snow_whitens_what_lies_between_the_flakes():
    """A threshold that no flake reaches: 0.8 x + 0.2 max(x, 1.5 luma + 0.5); luma of (0.1, 0.2, 0.3) is 0.1815."""
    image = torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    found = corruptions.snow(image, torch.arange(1), (0.1, 0.2, 1.0, 99.0, 8.0, 3.0, 0.8))[0, :, 4, 4]
    white = 1.5 * 0.1815 + 0.5
    torch.testing.assert_close(found, 0.8 * torch.tensor([0.1, 0.2, 0.3]) + 0.2 * white)
    black = torch.zeros(1, 1, 32, 32)
    flakes = corruptions.snow(black, keys(black), (0.3, 0.3, 1.25, 0.65, 14.0, 12.0, 1.0))
    assert flakes.max() > 0.1
    torch.testing.assert_close(flakes, flakes.flip(2, 3))


def test_frost_adds_a_share_of_bluish_ice():
    ice = corruptions.frost(torch.zeros(4, 3, 32, 32), torch.arange(4), (1.0, 1.0))
    torch.testing.assert_close(ice[:, 0] / 0.85, ice[:, 2])
    assert ice[:, 2].min() >= 0.3 * 0.999
    assert ice.max() <= 1.001
    image = smooth(4)
    found = corruptions.frost(image, torch.arange(4), (0.75, 0.45))
    torch.testing.assert_close(found, 0.75 * image + 0.45 * ice)


def test_brightness_is_the_value_of_hsv():
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0, :, 0, 0] = 0
    found = corruptions.brightness(images, torch.arange(1), 0.3)
    for i, j in ((0, 0), (1, 2), (5, 7), (7, 3)):
        hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, i, j].tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.3))
        assert found[0, :, i, j].tolist() == pytest.approx(expected, abs=1e-6)


def test_contrast_by_hand():
    image = torch.tensor([0.0, 1.0]).repeat(32).reshape(1, 1, 8, 8)
    assert corruptions.contrast(image, torch.arange(1), 0.75).unique().tolist() == [0.125, 0.875]


def test_pixels_are_means_over_cells():
    torch.testing.assert_close(corruptions._average(3, 2), torch.tensor([[2, 1, 0], [0, 1, 2]], dtype=f64) / 3)
    row = torch.arange(8.0).expand(1, 1, 8, 8)
    found = corruptions.pixelate(row, torch.arange(1), 0.5)[0, 0]
    torch.testing.assert_close(found[3], torch.tensor([0.5, 0.5, 2.5, 2.5, 4.5, 4.5, 6.5, 6.5]))
    corner = torch.zeros(1, 1, 8, 8)
    corner[0, 0, 0, 0] = 1
    assert corruptions.pixelate(corner, torch.arange(1), 0.5)[0, 0, :3, :3].tolist() == [[0.25] * 2 + [0]] * 2 + [
        [0] * 3
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels):
    levels = (smooth(1, channels) * 255).round()
    file = io.BytesIO()
    pixels = levels[0].permute(1, 2, 0).byte().numpy()
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(file, "JPEG", quality=40)
    expected = torch.from_numpy(np.asarray(Image.open(file)).reshape(32, 32, channels)).permute(2, 0, 1) / 255
    torch.testing.assert_close(corruptions.jpeg(levels / 255, torch.arange(1), 40)[0], expected)


def test_elastic_maps_lead_back_from_the_moved_corners():
    three = torch.arange(3)
    back = corruptions._affine(three, 2.5, 32, 32)
    arm, middle = 32 / 3, 15.5
    corners = middle + arm * torch.tensor([[1.0, 1], [1, -1], [-1, -1]], dtype=f64)
    moved = corners + 2.5 * (2 * uniform(three, "elastic, corners", (3, 2)) - 1)
    returned = moved @ back[:, :, :2].mT + back[:, None, :, 2]
    torch.testing.assert_close(returned, corners.expand(3, -1, -1))
    images = smooth(3)
    torch.testing.assert_close(corruptions.elastic(images, three, (0.0, 0.0, 0.0)), images, rtol=0, atol=1e-5)
    bent = [corruptions.elastic(images, three, (*bend, 0.0)) for bend in ((0.05, 0.2), (0.08, 0.06), (0.1, 0.03))]
    far = [(b - images).square().mean().item() for b in bent]
    assert far[0] < far[1] < far[2]


# ---- accuracy ----


class Bright(nn.Module):
    """Class 1 where the mean is above one half."""

    def forward(self, x):
        return (x.mean((1, 2, 3)) - 0.5)[:, None] * torch.tensor([-1.0, 1.0])


def test_accuracy_has_a_row_for_each_corruption_severity_and_image():
    images = smooth(10, 1, 8, 8)
    labels = (images.mean((1, 2, 3)) > 0.5).long()
    told = []
    rows = corruption_accuracy(
        Bright().eval(), images, labels, severities=(2, 5), batch_size=4, progress=lambda done, total: told.append(done)
    )
    assert told == list(range(1, 31))
    assert {name: len(column) for name, column in rows.items()} == dict.fromkeys(rows, 15 * 2 * 10)
    assert rows["index"].tolist() == list(range(10)) * 30
    assert rows["severity"].tolist() == ([2] * 10 + [5] * 10) * 15
    assert list(dict.fromkeys(rows["corruption"].tolist())) == list(CORRUPTIONS)
    place = list(CORRUPTIONS).index("brightness") * 20 + 10
    expected = Bright()(corrupted("brightness", images, labels, 5)).argmax(1) == labels
    assert rows["right"][place : place + 10].tolist() == expected.tolist()
    assert 0 < expected.sum() < 10, "a corruption that changes some verdicts, not all"
    again = corruption_accuracy(Bright().eval(), images, labels, severities=(2, 5), batch_size=3)
    np.testing.assert_array_equal(again["right"], rows["right"])


def test_means_by_hand():
    rows = {
        "corruption": np.array(["fog"] * 4 + ["snow"] * 4),
        "severity": np.array([1, 1, 2, 2] * 2),
        "index": np.array([0, 1] * 4),
        "right": np.array([True, True, True, False, False, False, True, False]),
    }
    assert mean_accuracies(rows) == {"fog": 0.75, "snow": 0.25, "mean": 0.5}


def test_inputs_of_the_accuracy_are_checked():
    images, labels = smooth(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="eval mode"):
        corruption_accuracy(Bright().train(), images, labels)
    with pytest.raises(UserError, match="severities: expected at least one"):
        corruption_accuracy(Bright().eval(), images, labels, severities=())
    with pytest.raises(UserError, match="severity: expected 1, 2, 3, 4 or 5"):
        corruption_accuracy(Bright().eval(), images, labels, severities=(7,))
    with pytest.raises(ValueError, match="class indices from 0"):
        corruption_accuracy(Bright().eval(), images, labels - 1)
