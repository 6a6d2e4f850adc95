"""A small exact world of images, a smooth encoder on it and seeded numbers, shared by the tests of sampling."""

import math

import torch
from torch import nn

from gambeson.models.oracle import GaussianMixture

f64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=f64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def images_world(classes=3, shape=(1, 3, 3)):
    """Three overlapping classes of 1x3x3 images, the last of two components."""
    k = classes + 1
    return GaussianMixture(
        means=0.6 * randn(k, *shape, seed=7),
        std=torch.linspace(0.2, 0.35, k, dtype=f64),
        weights=torch.full((k,), 1 / k, dtype=f64),
        classes=torch.arange(k).clamp_max(classes - 1),
    )


def encoder(width=9, out=4, seed=3):
    """A smooth random two-layer network on images of `width` numbers, float64, whose parameters want gradients."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, out)).double().eval()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(randn(*p.shape, seed=seed + i) / math.sqrt(p.shape[-1]))
    return net


WORLD, ENCODER = images_world(), encoder()
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
NOISE = randn(6, 1, 3, 3, seed=1)


def run(sampler, sigmas, guidance=None, noise=NOISE, labels=LABELS, seed=5, world=WORLD, block=0):
    *_, last = sampler(world.denoiser, noise, sigmas, guidance, labels=labels, generator=seeded(seed), block=block)
    return last.x
