"""Small networks trained on digits in a second, grey or coloured, of any number of classes, for attacks to try."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn

from gambeson.robustness.losses import TRADES
from gambeson.robustness.pursuit import Board, Chase
from gambeson.robustness.views import View
from gambeson.threat import ThreatModel


@cache
def digits(channels: int = 1, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """All digits [1797, C, 8, 8] and labels; three channels show each in a colour of its own, classes count modulo."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    if channels > 1:
        images = images * (
            0.4 + 0.6 * torch.rand(len(images), channels, 1, 1, generator=torch.Generator().manual_seed(5))
        )
    return images, torch.tensor(data.target) % classes


@cache
def trained(channels: int = 1, classes: int = 10) -> nn.Module:
    """A convolutional network after a few epochs of TRADES on 1,400 digits."""
    images, labels = digits(channels, classes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(channels, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(384, classes),
        )
    stream, loss = torch.Generator().manual_seed(0), TRADES(threat=ThreatModel(epsilon=0.1), beta=3.0, steps=2)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for rows in torch.randperm(1400, generator=stream).split(128):
            optimiser.zero_grad()
            loss(model, images[rows], labels[rows], generator=stream).mean().backward()
            optimiser.step()
    return model.eval().requires_grad_(False)


def held_out(channels: int = 1, classes: int = 10, number: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that `trained` has not seen, and their labels."""
    images, labels = digits(channels, classes)
    return images[1400 : 1400 + number], labels[1400 : 1400 + number]


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    """logits = flatten(x) W^T + b."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data, layer.bias.data = weight, bias
    return nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)


def board_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> Board:
    """The images on a board."""
    return Board(images, labels, model(images), seed)


def fresh_chase(attack, model, images, labels, batch_size: int, seed: int = 0) -> Chase:
    """A pursuit of the images before its first step."""
    return Chase.start(attack, View(model), board_of(model, images, labels, seed), batch_size)
