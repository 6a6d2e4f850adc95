"""Augmentation that keeps or mixes classes: by hand, against Pillow, and what all of them promise."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from gambeson.data.augment import NonLeaking, PadCrop
from gambeson.data.label_safe import Chain, CutMix, Cutout, mixed
from gambeson.data.rand_augment import TONES, WARPS, RandAugment, operate, warp
from gambeson.errors import UserError


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(b: int = 8, c: int = 3, h: int = 12, w: int = 10, seed: int = 0) -> Tensor:
    """Images of whole 255ths, as they come from files."""
    return torch.randint(256, (b, c, h, w), generator=dice(seed)) / 255


LABEL_SAFE = {
    "pad and crop": PadCrop(padding=2),
    "cutout": Cutout(),
    "no cutout": Cutout(probability=0.0),
    "rand augment": RandAugment(),
    "rand augment, strongest": RandAugment(layers=3, magnitude=30.0, fill=0.5),
    "rand augment, tones": RandAugment(geometric=False),
    "nothing": Chain(parts=()),
    "chain": Chain(parts=(PadCrop(padding=2), RandAugment(), Cutout())),
}


@pytest.mark.parametrize("name", LABEL_SAFE)
@pytest.mark.parametrize("shape", [(40, 3, 12, 10), (40, 1, 8, 8), (1, 3, 5, 5), (3, 2, 6, 6)])
def test_augmentations_keep_what_they_promise(name: str, shape: tuple[int, int, int, int]) -> None:
    """Shape, range, type and the caller's images stay; draws are the generator's alone; all is said by its seed."""
    augment, images = LABEL_SAFE[name], pixels(*shape)
    before, world = images.clone(), torch.get_rng_state()
    found = augment(images, dice(1), True)
    assert found.shape == images.shape
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(images, before)
    assert torch.equal(world, torch.get_rng_state())
    assert torch.equal(found, augment(images, dice(1), True))


@pytest.mark.parametrize("name", ["cutout", "rand augment", "rand augment, tones", "chain"])
def test_augmentations_change_images_and_follow_the_seed(name: str) -> None:
    images, augment = pixels(64), LABEL_SAFE[name]
    first, second = augment(images, dice(1), True), augment(images, dice(2), True)
    assert not torch.equal(first, second)
    assert (first != images).flatten(1).any(1).sum() > 32


def test_pad_and_crop_keeps_its_bits() -> None:
    """Sums over a weighted batch, from the code before windows were read through a view."""
    images = pixels(16, 3, 8, 8)
    weights = torch.linspace(-1, 1, images.numel(), dtype=torch.float64).view_as(images)
    found = PadCrop(padding=2)(images, dice(5), True)
    assert (found.double() * weights).sum().item() == pytest.approx(PAD_CROP_SUM, abs=1e-9)
    assert found.is_contiguous()


PAD_CROP_SUM = -19.87256575573569


@pytest.mark.parametrize("size", [0.25, 0.5, 0.3])
def test_cutout_is_a_square_whose_centre_lies_in_the_image(size: float) -> None:
    cut = Cutout(size=size, fill=0.25)(torch.ones(4000, 1, 8, 8), dice(), False)[:, 0] == 0.25
    side = round(size * 8)
    rows, columns = cut.any(2).sum(1), cut.any(1).sum(1)
    assert torch.equal(cut.flatten(1).sum(1), rows * columns)  # a box
    assert int(rows.max()) == int(columns.max()) == side
    assert int(rows.min()) == side - side // 2  # a centre on the last row leaves what lies before it and its own
    whole = cut[(rows == side) & (columns == side)]
    share = len(whole) / 4000
    assert share == pytest.approx(((8 - side + 1) / 8) ** 2, abs=0.03)
    centre_hit = cut.float().mean(0)
    assert centre_hit[4, 4].item() == pytest.approx((side / 8) ** 2, abs=0.03)


def test_cutout_comes_as_often_as_said() -> None:
    cut = Cutout(probability=0.3)(torch.ones(4000, 1, 8, 8), dice(), False)
    assert (cut != 1).flatten(1).any(1).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_cutmix_weights_by_hand() -> None:
    """A box of 2 x 3 of 4 x 4 pixels weighs 6/16; one of a single pixel 1/16."""
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 4, 4) / 2
    targets = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.5, 0, 0.5]])
    box = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    box[0, 0, 1:3, :3] = box[1, 0, 3, 3] = True
    found, shares = mixed(images, targets, box, torch.tensor([2, 0, 1]))
    assert found[0, 0].tolist() == [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert found[1, 0, 3].tolist() == [0.5, 0.5, 0.5, 0]
    assert torch.equal(found[2], images[2])
    expected = torch.tensor([[1 - 3 / 16, 0, 3 / 16], [1 / 16, 15 / 16, 0], [0.5, 0, 0.5]])
    assert torch.allclose(shares, expected, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_cutmix_says_of_every_image_what_is_in_it(alpha: float) -> None:
    """Image i is a flat one of value i: the pixels tell the partner and its share."""
    b = 60
    images = torch.arange(float(b))[:, None, None, None].expand(b, 1, 9, 7) / b
    world = torch.get_rng_state()
    found, shares = CutMix(alpha=alpha, probability=0.7)(images, torch.eye(b), dice(3))
    assert torch.equal(world, torch.get_rng_state())
    counted = torch.stack([(found - k / b).abs().lt(1e-6).flatten(1).float().mean(1) for k in range(b)], dim=1)
    assert torch.allclose(shares, counted, atol=1e-6)
    assert torch.allclose(shares.sum(1), torch.ones(b))
    assert 20 < int((shares.amax(1) < 1).sum()) < 50
    assert len((shares.diagonal() < 1).unique()) == 2


def test_cutmix_never_and_always() -> None:
    images, targets = pixels(200, 1, 8, 8), torch.eye(200)
    same, still = CutMix(probability=0.0)(images, targets, dice())
    assert torch.equal(same, images)
    assert torch.equal(still, targets)
    _, shares = CutMix(alpha=1.0, probability=1.0)(torch.zeros(1000, 1, 64, 64), torch.eye(1000), dice())
    kept = shares.diagonal()
    assert (kept < 1).float().mean() > 0.95
    # a box of sides s = sqrt(u) about a place in the image covers s - s^2/4 of each: E[u - u^1.5 / 2 + u^2 / 16]
    assert kept.mean().item() == pytest.approx(1 - (1 / 2 - 1 / 5 + 1 / 48), abs=0.03)


@pytest.mark.parametrize(
    ("good", "field", "value"),
    [
        (Cutout(), "size", 1.5),
        (Cutout(), "fill", -0.1),
        (Cutout(), "probability", 2.0),
        (CutMix(), "alpha", 0.0),
        (CutMix(), "probability", -1.0),
        (RandAugment(), "layers", -1),
        (RandAugment(), "magnitude", 31.0),
        (RandAugment(), "fill", 2.0),
    ],
)
def test_impossible_augmentations_are_refused(good: object, field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}: expected"):
        replace(good, **{field: value})  # type: ignore[type-var]


def to_pillow(image: Tensor) -> Image.Image:
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])


def from_pillow(picture: Image.Image) -> Tensor:
    array = np.asarray(picture)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1).copy()).permute(2, 0, 1) / 255


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda p, s: p,
    "autocontrast": lambda p, s: ImageOps.autocontrast(p),
    "equalize": lambda p, s: ImageOps.equalize(p),
    "solarize": lambda p, s: ImageOps.solarize(p, int(np.ceil(256 * (1 - abs(s))))),
    "posterize": lambda p, s: ImageOps.posterize(p, 8 - round(4 * abs(s))),
    "colour": lambda p, s: ImageEnhance.Color(p).enhance(1 + 0.9 * s),
    "contrast": lambda p, s: ImageEnhance.Contrast(p).enhance(1 + 0.9 * s),
    "brightness": lambda p, s: ImageEnhance.Brightness(p).enhance(1 + 0.9 * s),
    "sharpness": lambda p, s: ImageEnhance.Sharpness(p).enhance(1 + 0.9 * s),
}
EXACT = {"identity", "equalize", "solarize", "posterize"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", TONES)
def test_tones_are_pillows(name: str, channels: int) -> None:
    """To the step where only whole numbers count, else within Pillow's own rounding (up to two at each stage)."""
    images = torch.cat(
        [pixels(4, channels, 32, 32), (pixels(2, channels, 32, 32) * 0.3 * 255).round() / 255 + 51 / 255]
    )
    images[0, 0] = 0.4  # a channel of one value
    for level in (0.0, 0.3, -0.3, 0.5, 1.0, -1.0):
        found = operate(name, images, torch.full((len(images),), level))
        expected = torch.stack([from_pillow(PILLOW[name](to_pillow(i), level)) for i in images])
        steps = ((found - expected) * 255).abs().max().item()
        assert steps < (0.01 if name in EXACT else 2.6), (level, steps)


def picture(name: str, rows: list[list[float]], strength: float, fill: float = 0.0) -> list[list[float]]:
    """One operation on one grey picture."""
    found = operate(name, torch.tensor(rows)[None, None], torch.tensor([strength]), fill)[0, 0]
    return [[round(x, 4) + 0.0 for x in row] for row in found.tolist()]


RAMP = [[0.1, 0.2, 0.3, 0.4]] * 2 + [[0.5, 0.6, 0.7, 0.8]] * 2
BY_HAND = [
    ("autocontrast", [[0.2, 0.4], [0.6, 0.2]], 0.3, [[0, 0.5], [1, 0]]),
    ("brightness", [[0.2, 0.4], [0.6, 0.9]], 0.5, [[0.29, 0.58], [0.87, 1]]),
    ("contrast", [[0.2, 0.4], [0.6, 0.8]], -1.0, [[0.47, 0.49], [0.51, 0.53]]),
    ("contrast", [[0.2, 0.4], [0.6, 0.8]], 1.0, [[0, 0.31], [0.69, 1]]),
    ("colour", [[0.2, 0.4], [0.6, 0.8]], 1.0, [[0.2, 0.4], [0.6, 0.8]]),
    ("solarize", [[0.2, 0.4], [0.6, 1.0]], 0.5, [[0.2, 0.4], [0.4, 0]]),
    ("translate x", RAMP, 0.6, [[0.2, 0.3, 0.4, 0]] * 2 + [[0.6, 0.7, 0.8, 0]] * 2),  # .6 * 150/331 * 4 = 1.09
    ("translate x", RAMP, -0.6, [[0, 0.1, 0.2, 0.3]] * 2 + [[0, 0.5, 0.6, 0.7]] * 2),
    ("translate x", RAMP, 0.5, RAMP),  # .91 pixels: whole ones only
    ("translate y", RAMP, 0.6, [RAMP[1], RAMP[2], RAMP[3], [0, 0, 0, 0]]),
    ("shear x", RAMP, 0.5, [[0.1075, 0.2075, 0.3075, 0.37], [0.1225, 0.2225, 0.3225, 0.31]]),  # .15 * .5, .15 * 1.5
    ("shear y", RAMP, -1.0, [[0.085, 0.11, 0.075, 0]]),  # column 1 looks .45 above the middle of row 0: .55 of it
    ("rotate", [[0.3] * 9] * 9, 0.7, [[0.3] * 9]),
]


@pytest.mark.parametrize("case", BY_HAND, ids=lambda c: f"{c[0]} {c[2]}")
def test_operations_by_hand(case: tuple[str, list[list[float]], float, list[list[float]]]) -> None:
    name, rows, strength, expected = case
    found = picture(name, rows, strength)
    if name == "rotate":
        assert found[4][1:8] == expected[0][1:8]  # inside, a flat picture stays flat
        assert found[0][0] < 0.3
        return
    for got, wanted in zip(found, expected, strict=False):
        assert got == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("name", WARPS)
@pytest.mark.parametrize("strength", [0.3, -0.3, 1.0, -1.0])
def test_warps_are_pillows_inside(name: str, strength: float) -> None:
    """Pillow's bilinear transform, where neither reads beyond the border; 13 x 17 pixels, so that axes differ."""
    image = pixels(1, 1, 13, 17)
    sources = WARPS[name](torch.tensor([strength]), 13, 17)
    found = warp(image, sources)
    values = sources[0].flatten().tolist()
    picture = Image.fromarray((image[0, 0] * 255).numpy(), mode="F")
    expected = np.asarray(picture.transform((17, 13), Image.Transform.AFFINE, values, Image.Resampling.BILINEAR)) / 255
    y, x = torch.meshgrid(torch.arange(13) + 0.5, torch.arange(17) + 0.5, indexing="ij")
    places = (sources[0, :, :2] @ torch.stack([x.flatten(), y.flatten()]) + sources[0, :, 2:]).view(2, 13, 17)
    inside = (places[0] > 0.51) & (places[0] < 16.49) & (places[1] > 0.51) & (places[1] < 12.49)
    assert inside.sum() > 60
    assert np.abs(found[0, 0].numpy() - expected)[inside.numpy()].max() < 1e-4
    assert not torch.allclose(found[0, 0][inside], image[0, 0][inside], atol=1e-3)


def test_turns_are_of_30_degrees_about_the_middle() -> None:
    """A quarter turn is three of them: the picture's middle stays where it is."""
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = image[0, 0, 4, 7] = 1.0
    found = operate("rotate", image, torch.ones(1))[0, 0]
    assert found[4, 4] == pytest.approx(1.0, abs=1e-5)
    angle = np.radians(30)
    place = {round(4 - 3 * np.sin(angle)), round(4 + 3 * np.sin(angle))}
    column = round(4 + 3 * np.cos(angle))
    assert max(found[row, column].item() for row in place) > 0.3


def test_what_comes_in_has_the_fill() -> None:
    assert picture("translate x", RAMP, -0.6, 0.5)[0] == pytest.approx([0.5, 0.1, 0.2, 0.3])
    assert min(picture("rotate", [[1.0] * 4] * 4, 1.0, 1.0)[0]) == 1.0


def test_every_image_draws_its_own_operations_evenly() -> None:
    """One picture 5,600 times, one layer: as many results as operations and ways, each as often as it should be."""
    image = pixels(1, 3, 20, 20, seed=4)
    found = RandAugment(layers=1, magnitude=20.0)(image.expand(5_600, -1, -1, -1), dice(), True)
    kinds = {
        (name, way): operate(name, image, torch.tensor([way * 20 / 30]))[0]
        for name in [*TONES, *WARPS]
        for way in (1, -1)
    }
    shares = {key: (found - one).abs().flatten(1).amax(1).lt(1e-6).float().mean().item() for key, one in kinds.items()}
    for (name, way), share in shares.items():
        both = torch.allclose(kinds[name, way], kinds[name, -way])
        assert share == pytest.approx((2 if both else 1) / 28, abs=0.01), (name, way)
    assert (found - image.flip(3)).abs().flatten(1).amax(1).min() > 1e-3  # nothing mirrors


def test_two_layers_are_one_after_the_other() -> None:
    images, g = pixels(50), dice(7)
    once = RandAugment(layers=1)
    assert torch.equal(once(once(images, g, True), g, True), RandAugment(layers=2)(images, dice(7), True))


def test_an_image_gets_the_same_whatever_stands_beside_it() -> None:
    """Sorting by operation puts every image back in its place."""
    images = pixels(30)
    other = images.clone()
    other[7] = 0.5
    first, second = (RandAugment(layers=1)(each, dice(2), True) for each in (images, other))
    kept = torch.arange(30) != 7  # one layer: after two, what was put back mirrored would stand right again
    assert torch.allclose(first[kept], second[kept], atol=1e-6)


def test_a_chain_is_its_parts_in_order() -> None:
    images, g = pixels(), dice(3)
    by_hand = Cutout()(PadCrop(padding=2)(images, g, False), g, False)
    assert torch.equal(by_hand, Chain(parts=(PadCrop(padding=2), Cutout()))(images, dice(3), False))


def test_told_warps_stay_what_they_were() -> None:
    """NonLeaking is the diffusion model's: it says what it did, and is no part of a chain."""
    images, labels = NonLeaking()(pixels(), dice(), False)
    assert labels.shape == (8, 9)
    assert images.shape == (8, 3, 12, 10)
