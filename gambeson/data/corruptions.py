"""The 15 common corruptions of Hendrycks & Dietterich 2019 at severities 1 to 5, made here.

Settings are those of CIFAR-10-C; lengths among them belong to images of 32 pixels and grow with the shorter side. These
are not CIFAR-10-C's files: draws and resampling are our own, frost is drawn (there: photographs), values stay floats.
Accuracies belong beside others on images made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from gambeson.errors import require, unknown
from gambeson.randomness import image_keys, normal, uniform
from gambeson.types import Images, Labels

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One way in which images go bad: a function of images, keys and a setting, and its setting at each severity."""

    apply: Callable[[Tensor, Tensor, Any], Tensor]  # images [B, C, H, W], keys [B], setting -> images
    settings: tuple[Any, ...]  # CIFAR-10-C's, severity 1 first

    def __call__(self, images: Images, keys: Tensor, severity: int) -> Images:
        """The images [B, C, H, W] gone bad, in [0, 1]; the same key gives the same draws at every severity.

        keys int64 [B] from `gambeson.randomness.image_keys`. Raises UserError for images that are not in [0, 1], not
        of 1 or 3 channels or smaller than 8x8, and for a severity that is not 1 to 5.
        """
        require(severity in SEVERITIES, "severity", "1, 2, 3, 4 or 5", severity)
        sides = list(images.shape)
        require(sides[1] in (1, 3) and min(sides[2:]) >= 8, "corruption, images", "[B, 1 or 3, 8 or more, ...]", sides)
        low, high = images.min().item(), images.max().item()
        require(low >= 0 and high <= 1, "corruption, images", "values in [0, 1]", f"{low:.4g} to {high:.4g}")
        return self.apply(images.float(), keys, self.settings[severity - 1]).clamp(0, 1).to(images)


def corrupted(name: str, images: Images, labels: Labels, severity: int, seed: int = 0) -> Images:
    """The images under a corruption of `CORRUPTIONS`; UserError for another name. Draws depend on the image alone."""
    if name not in CORRUPTIONS:
        raise unknown("corruption", name, CORRUPTIONS)
    return CORRUPTIONS[name](images, image_keys(images, labels, seed), severity)


def _scale(images: Tensor) -> float:
    """Pixels of the images for one pixel of an image of 32."""
    return min(images.shape[2:]) / 32


# ---- noise ----


def gaussian_noise(images: Images, keys: Tensor, deviation: float) -> Images:
    """Each value plus a normal number."""
    return images + deviation * normal(keys, "gaussian noise", tuple(images.shape[1:])).to(images)


def poisson_quantile(share: Tensor, mean: Tensor) -> Tensor:
    """The least count that a Poisson number of this mean stays at or below with probability `share`; float64.

    share in (0, 1), mean above 0, of one shape. From the expansion of Cornish & Fisher (1938), then one by one.
    """
    bell = torch.special.ndtri(share)
    count = (mean + mean.sqrt() * bell + (bell.square() - 1) / 6).floor().clamp_min(0)
    below = torch.special.gammaincc(count + 1, mean)  # P(N <= count)
    mass = torch.exp(torch.special.xlogy(count, mean) - mean - torch.lgamma(count + 1))  # P(N = count)
    for _ in range(40):  # two or three rounds, a dozen in the last bits of the tails
        up, down = below < share, (below - mass >= share) & (count > 0)
        if not (up | down).any():
            break
        below = torch.where(down, below - mass, below)
        mass = torch.where(up, mass * mean / (count + 1), torch.where(down, mass * count / mean, mass))
        count = count + up.double() - down.double()
        below = torch.where(up, below + mass, below)
    return count


def shot_noise(images: Images, keys: Tensor, photons: float) -> Images:
    """Each value is a count of photons, Poisson with a mean of `photons` where the image is 1."""
    draws = uniform(keys, "shot noise", tuple(images.shape[1:])).clamp_min(2.0**-53)
    return (poisson_quantile(draws, (photons * images.double()).clamp_min(1e-12)) / photons).to(images)


def impulse_noise(images: Images, keys: Tensor, share: float) -> Images:
    """A share of the values becomes 0 or 1."""
    draws = uniform(keys, "impulse noise", tuple(images.shape[1:])).to(images)
    return torch.where(draws < share, (draws < share / 2).to(images), images)


# ---- blur ----


def _moved(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The images read between pixels: value (i, j) comes from (rows, columns) [B or 1, H, W], mirrored beyond edges."""
    _, _, height, width = images.shape
    grid = torch.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], -1)
    grid = grid.to(images).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def _places(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each pixel, [1, H, W]."""
    rows, columns = (torch.arange(n, dtype=torch.float64, device=images.device) for n in images.shape[2:])
    return rows[None, :, None].expand(1, -1, len(columns)), columns[None, None].expand(1, len(rows), -1)


def _gaussian(values: Tensor, deviation: float, reach: float = 4.0) -> Tensor:
    """[..., H, W] blurred by a Gaussian of so many pixels, mirrored beyond edges."""
    blurred = ndimage.gaussian_filter(values.cpu().numpy(), deviation, axes=(-2, -1), truncate=reach, mode="reflect")
    return torch.from_numpy(blurred).to(values)


def _disk(radius: float, blur: float) -> np.ndarray:
    """[2 r + 3, 2 r + 3] weights of a disk of whole pixels, smoothed by a 3x3 (beyond 8: 5x5) Gaussian; sum 1."""
    reach = math.ceil(radius) + 2
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    near = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    bell = np.exp(-(near**2) / (2 * blur**2))
    smooth = ndimage.convolve(disk, np.outer(bell, bell), mode="constant")
    return smooth / smooth.sum()


def defocus_blur(images: Images, keys: Tensor, setting: tuple[float, float]) -> Images:
    """A disk of (radius, smoothing) at 32 pixels; at other sizes the same disk in steps of at most a pixel."""
    scale = _scale(images)
    fine = max(1, math.ceil(scale))
    disk = _disk(setting[0] * fine, setting[1] * fine)
    rows, columns = _places(images)
    reach, total = len(disk) // 2, torch.zeros_like(images)
    for i, j in zip(*np.nonzero(disk > 1e-6), strict=True):
        down, right = ((k - reach) * scale / fine for k in (int(i), int(j)))
        total += float(disk[i, j]) * _moved(images, rows + down, columns + right)
    return total


def _scattered(images: Tensor, draws: Tensor, reach: int) -> Tensor:
    """Each pixel from one up to `reach` above and left of it, up to reach - 1 below and right: draws [B, 2, H, W]."""
    rows, columns = (
        (place + (2 * reach * draws[:, k]).floor() - reach).clamp(0, side - 1).long()
        for k, (place, side) in enumerate(zip(_places(images), images.shape[2:], strict=True))
    )
    every = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[every, rows, columns].permute(0, 3, 1, 2)


def glass_blur(images: Images, keys: Tensor, setting: tuple[float, int, int]) -> Images:
    """Blurred, each pixel replaced by a near one, and blurred again: (deviation, how near, rounds).

    CIFAR-10-C means to swap pixels, but its exchange keeps one of the two: pixels are replaced, which is done here.
    """
    deviation, reach, rounds = setting
    far = max(1, round(reach * _scale(images)))
    found = _gaussian(images, deviation * _scale(images))
    for turn in range(rounds):
        found = _scattered(found, uniform(keys, "glass blur", (2, *images.shape[2:]), turn), far)
    return _gaussian(found, deviation * _scale(images))


def _dragged(images: Tensor, setting: tuple[float, float], angle: Tensor) -> Tensor:
    """Drawn out along an angle [B] (radians): weights of half a Gaussian, (radius, deviation) at 32 pixels."""
    radius, deviation = setting
    scale = _scale(images)
    fine = max(1, math.ceil(scale))
    rows, columns = _places(images)
    down, right = (way.reshape(-1, 1, 1).to(rows) * scale / fine for way in (angle.sin(), angle.cos()))
    weights = [math.exp(-((k / fine / deviation) ** 2) / 2) for k in range(round(2 * radius * fine) + 1)]
    weights = [w for w in weights if w > 1e-4]
    total = sum(w * _moved(images, rows + k * down, columns + k * right) for k, w in enumerate(weights))
    return torch.as_tensor(total) / sum(weights)


def motion_blur(images: Images, keys: Tensor, setting: tuple[float, float]) -> Images:
    """Drawn out along a line of -45 to 45 degrees: (radius, deviation)."""
    return _dragged(images, setting, (uniform(keys, "motion blur", ()) - 0.5) * math.pi / 2)


def _zoomed(images: Tensor, factor: float) -> Tensor:
    """The middle of the images, enlarged to the whole."""
    rows, columns = _places(images)
    middle = [(n - 1) / 2 for n in images.shape[2:]]
    return _moved(images, middle[0] + (rows - middle[0]) / factor, middle[1] + (columns - middle[1]) / factor)


def zoom_blur(images: Images, keys: Tensor, steps: int) -> Images:
    """The mean of the image and of its enlargements by 0, 1, ... per cent, so many of them."""
    return sum((_zoomed(images, 1 + k / 100) for k in range(steps)), images) / (steps + 1)


# ---- weather ----


def _plasma(keys: Tensor, purpose: str, side: int, decay: float) -> Tensor:
    """[B, side, side] random clouds in [0, 1] by the diamond-square algorithm (Fournier et al. 1982), periodic.

    side: a power of two. Each halving divides the random part by decay^2, as CIFAR-10-C's does.
    """
    clouds, step, size, level = torch.zeros(len(keys), side, side, dtype=torch.float64).to(keys.device), side, 1.0, 0
    while step >= 2:
        half, count = step // 2, side // step
        draws = size * (2 * uniform(keys, purpose, (3, count, count), level) - 1)
        corner = clouds[:, ::step, ::step].clone()
        beside = corner + corner.roll(-1, 2)
        middle = (beside + beside.roll(-1, 1)) / 4 + draws[:, 0]
        clouds[:, half::step, half::step] = middle
        clouds[:, ::step, half::step] = (beside + middle + middle.roll(1, 1)) / 4 + draws[:, 1]
        clouds[:, half::step, ::step] = (corner + corner.roll(-1, 1) + middle + middle.roll(1, 2)) / 4 + draws[:, 2]
        step, size, level = half, size / decay**2, level + 1
    low, high = clouds.amin((1, 2), keepdim=True), clouds.amax((1, 2), keepdim=True)
    return (clouds - low) / (high - low)


def _clouds(images: Tensor, keys: Tensor, purpose: str, decay: float) -> Tensor:
    """[B, 1, H, W] clouds of the images' size."""
    _, _, height, width = images.shape
    side = 2 ** math.ceil(math.log2(max(height, width)))
    return _plasma(keys, purpose, side, decay)[:, None, :height, :width].to(images)


def snow(images: Images, keys: Tensor, setting: tuple[float, ...]) -> Images:
    """Whitened, and flakes over it that the wind has drawn out, twice: the second time turned by half a circle.

    setting: mean, deviation, size and threshold of flakes, (radius, deviation) of their motion, share of the image.
    """
    mean, deviation, size, threshold, radius, drawn, kept = setting
    flakes = mean + deviation * normal(keys, "snow", (1, *images.shape[2:])).to(images)
    flakes = _zoomed(flakes, max(1.0, size * _scale(images)))
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    flakes = _dragged(flakes, (radius, drawn), -(0.25 + 0.5 * uniform(keys, "snow, wind", ())) * math.pi)
    luma = images.new_tensor([0.299, 0.587, 0.114] if images.shape[1] == 3 else [1.0]).reshape(1, -1, 1, 1)
    white = torch.maximum(images, 1.5 * (images * luma).sum(1, keepdim=True) + 0.5)
    return kept * images + (1 - kept) * white + flakes + flakes.flip(2, 3)


def frost(images: Images, keys: Tensor, setting: tuple[float, float]) -> Images:
    """Ice on the glass: (share of the image, share of the ice). The ice is drawn, bluish ridges of random clouds."""
    ridges = 1 - (2 * _clouds(images, keys, "frost", 1.6) - 1).abs()
    tint = images.new_tensor([0.85, 0.95, 1.0] if images.shape[1] == 3 else [0.93]).reshape(1, -1, 1, 1)
    return setting[0] * images + setting[1] * tint * (0.3 + 0.7 * ridges.square())


def fog(images: Images, keys: Tensor, setting: tuple[float, float]) -> Images:
    """Clouds of (weight, decay) over the image, its brightest value kept."""
    weight, decay = setting
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + weight * _clouds(images, keys, "fog", decay)) * brightest / (brightest + weight)


# ---- light and form ----


def brightness(images: Images, keys: Tensor, amount: float) -> Images:
    """The value of hue, saturation and value goes up: all channels by the factor of the largest."""
    value = images.amax(1, keepdim=True)
    raised = (value + amount).clamp(0, 1)
    return torch.where(value > 0, images * raised / value.clamp_min(1e-12), raised)


def contrast(images: Images, keys: Tensor, share: float) -> Images:
    """Each channel nearer to its mean."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + share * (images - mean)


def _affine(keys: Tensor, amount: float, height: int, width: int) -> Tensor:
    """[B, 2, 3] maps that take three points about the middle, each moved by up to `amount`, back to where they were."""
    middle, arm = torch.tensor([(height - 1) / 2, (width - 1) / 2], dtype=torch.float64), min(height, width) / 3
    corners = middle + arm * torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float64)
    corners = corners.to(keys.device).expand(len(keys), -1, -1)
    moved = corners + amount * (2 * uniform(keys, "elastic, corners", (3, 2)) - 1)
    return torch.linalg.solve(torch.cat([moved, torch.ones_like(moved[..., :1])], 2), corners).mT


def elastic(images: Images, keys: Tensor, setting: tuple[float, float, float]) -> Images:
    """Bent: (strength, smoothness, tilt), all in sides of the image. A random affine map and a smooth displacement."""
    _, _, height, width = images.shape
    strength, smoothness, tilt = (part * min(height, width) for part in setting)
    noise = 2 * uniform(keys, "elastic", (2, height, width)) - 1
    bend = strength * _gaussian(noise, smoothness, reach=3.0)
    rows, columns = (place + bend[:, k] for k, place in enumerate(_places(images)))
    places = torch.stack([rows, columns, torch.ones_like(rows)], -1)
    back = torch.einsum("bij,bhwj->bihw", _affine(keys, tilt, height, width), places)
    return _moved(images, back[:, 0], back[:, 1])


def _average(inside: int, outside: int) -> Tensor:
    """[outside, inside] weights of means over equal cells of a line."""
    edges = torch.arange(outside + 1, dtype=torch.float64) * inside / outside
    start = torch.arange(inside, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return overlap.clamp_min(0) * outside / inside


def pixelate(images: Images, keys: Tensor, share: float) -> Images:
    """Averaged over a coarser grid and enlarged again without smoothing."""
    down, up = [], []
    for side in images.shape[2:]:
        cells = max(1, int(side * share))
        down.append(_average(side, cells).to(images))
        up.append(((torch.arange(side, device=images.device) + 0.5) * cells / side).long())
    small = down[0] @ images @ down[1].mT
    return small[:, :, up[0]][..., up[1]]


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """One uint8 [H, W] or [H, W, 3], compressed and read again."""
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def jpeg(images: Images, keys: Tensor, quality: int) -> Images:
    """Compressed by Pillow as JPEG of this quality, from 256 levels."""
    levels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    levels = levels[..., 0] if images.shape[1] == 1 else levels
    found = torch.from_numpy(np.stack([_jpeg(level, quality) for level in levels]))
    found = found[:, None] if images.shape[1] == 1 else found.permute(0, 3, 1, 2)
    return found.to(images) / 255


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(apply=gaussian_noise, settings=(0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(apply=shot_noise, settings=(500.0, 250.0, 100.0, 75.0, 50.0)),
    "impulse_noise": Corruption(apply=impulse_noise, settings=(0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(
        apply=defocus_blur, settings=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))
    ),
    "glass_blur": Corruption(
        apply=glass_blur, settings=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    ),
    "motion_blur": Corruption(apply=motion_blur, settings=((6.0, 1.0), (6.0, 1.5), (6.0, 2.0), (8.0, 2.0), (9.0, 2.5))),
    "zoom_blur": Corruption(
        apply=zoom_blur, settings=(7, 12, 16, 21, 26)
    ),  # lengths of numpy.arange(1, 1.06, 0.01), ...
    "snow": Corruption(
        apply=snow,
        settings=(
            (0.1, 0.2, 1.0, 0.6, 8.0, 3.0, 0.95),
            (0.1, 0.2, 1.0, 0.5, 10.0, 4.0, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10.0, 4.0, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12.0, 6.0, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14.0, 12.0, 0.8),
        ),
    ),
    "frost": Corruption(apply=frost, settings=((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(apply=fog, settings=((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": Corruption(apply=brightness, settings=(0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(apply=contrast, settings=(0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        apply=elastic,
        settings=((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Corruption(apply=pixelate, settings=(0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(apply=jpeg, settings=(80, 65, 58, 50, 40)),
}
"""CIFAR-10-C's 15 names -> the corruption."""
