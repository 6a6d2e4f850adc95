"""A classifier of noisy images that is told the noise level, for features at every step of a sampler.

The encoder half of a U-Net with a classifying head, as Dhariwal & Nichol (2021, section 4) guide diffusion with; the
blocks are those of `unet`, the pooling is the mean over the pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import require
from gambeson.models.unet import Residual
from gambeson.models.waves import waves
from gambeson.randomness import seeded
from gambeson.types import Features, Images, Logits


@dataclass(frozen=True, kw_only=True)
class NoiseConditionedSpec:
    """The architecture of a noise-conditioned classifier."""

    width: int = 32  # channels at full resolution
    multipliers: tuple[int, ...] = (1, 2)  # channels at each resolution, times width; each further one halves the image
    blocks: int = 1  # residual blocks per resolution
    attention: int = 1  # how many of the lowest resolutions have self-attention
    sigma_min: float = 0.02  # lowest noise level that it is trained on and told (images in [-1, 1]); lower: told this
    sigma_max: float = 80.0  # highest noise level that it is trained on and told; higher: told this

    def __post_init__(self) -> None:
        name = "noise-conditioned classifier"
        require(self.width >= 8 and self.width % 8 == 0, f"{name} width", "a positive multiple of 8", self.width)
        require(self.blocks >= 1, f"{name} blocks", "at least 1", self.blocks)
        fits = bool(self.multipliers) and min(self.multipliers, default=0) >= 1
        require(fits, f"{name} multipliers", "one or more of at least 1", self.multipliers)
        levels = len(self.multipliers)
        require(0 <= self.attention <= levels, f"{name} attention", f"0 to {levels}, the resolutions", self.attention)
        require(self.sigma_min > 0, f"{name} sigma_min", "a noise level above 0", self.sigma_min)
        require(self.sigma_max > self.sigma_min, f"{name} sigma_max", f"more than {self.sigma_min}", self.sigma_max)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError where images of (channels, height, width) are too small to be halved that often."""
        least = 2 ** (len(self.multipliers) - 1)
        expected = f"sides of {least} pixels or more for {len(self.multipliers)} resolutions; give fewer multipliers"
        require(min(shape[1:]) >= least, "noise-conditioned classifier", expected, shape)

    def build(self, channels: int, classes: int, seed: int = 0) -> NoiseConditionedClassifier:
        """The network with weights drawn from the seed (the global generator is left as it was)."""
        with seeded(seed):
            return NoiseConditionedClassifier(self, channels, classes)


class NoiseConditionedClassifier(nn.Module):
    """(x_vp [B, C, H, W], sigma) -> logits [B, classes]; `features` is the penultimate layer, [B, D].

    x_vp = (x0 + sigma n) / sqrt(1 + sigma^2) with x0 in [-1, 1]; sigma is one number for all images or [B], 0 for
    clean ones. The network is told ln(sigma) / 4 (Karras et al. 2022, table 1: c_noise), sigma held within the spec's
    range: ln 0 is no number, and below 0.02 no noise is to be seen. Not a `Classifier`: its images are not in [0, 1].
    Raises ValueError for a sigma below 0 or of another shape.
    """

    def __init__(self, spec: NoiseConditionedSpec, channels: int, classes: int) -> None:
        super().__init__()
        self.spec, self.channels, self.classes = spec, channels, classes
        widths = [spec.width * m for m in spec.multipliers]
        embedding = 4 * spec.width
        self.noise = nn.Sequential(nn.Linear(spec.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        before, lowest = widths[0], len(widths) - spec.attention  # the first level with attention
        for level, width in enumerate(widths):
            for _ in range(spec.blocks):
                self.down.append(Residual(before, width, embedding, attention=level >= lowest, dropout=0.0))
                before = width
        self.norm = nn.GroupNorm(before // 8, before)
        self.head = nn.Linear(before, classes)

    def features(self, x_vp: Images, sigma: float | Tensor) -> Features:
        """[B, D] activations before the last layer, averaged over the pixels."""
        self.spec.check((x_vp.shape[1], x_vp.shape[2], x_vp.shape[3]))
        told = 1000 * self._told(sigma, x_vp)  # the waves are made for times of 0 to 1000
        sines = torch.cat(waves(told, self.spec.width, x_vp.dtype, endpoint=True), dim=1)
        embedding = F.silu(self.noise(sines))
        x = self.enter(x_vp)
        for i, layer in enumerate(self.down):
            if i and i % self.spec.blocks == 0:
                x = F.avg_pool2d(x, 2)
            x = layer(x, embedding)
        return F.silu(self.norm(x)).mean(dim=(2, 3))

    def forward(self, x_vp: Images, sigma: float | Tensor) -> Logits:
        return self.head(self.features(x_vp, sigma))

    def _told(self, sigma: float | Tensor, x_vp: Tensor) -> Tensor:
        """[B] ln(sigma) / 4, computed in float64 so that a number and a tensor of it give the same."""
        given = torch.as_tensor(sigma, dtype=torch.float64)
        if given.shape not in ((), (len(x_vp),)) or not (given >= 0).all():
            raise ValueError(
                f"noise-conditioned classifier: expected sigma as one number or [{len(x_vp)}] of them, 0 or more, got "
                f"{sigma if given.dim() == 0 else f'{list(given.shape)} from {given.min().item():g}'}"
            )
        told = given.clamp(self.spec.sigma_min, self.spec.sigma_max).log() / 4
        return told.to(x_vp.device, torch.promote_types(x_vp.dtype, torch.float32)).expand(len(x_vp))
