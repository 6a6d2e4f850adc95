"""Peers' inner loops re-stated from METHOD.md for peers.py, with no product code in them: CDP's guided DDIM sampling,
and the loader that keeps one .npz in memory. (EDM-AT's training is loops.Usual; AutoAttack is its authors' package.)"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encode = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] -> features [B, D]."""


def squared_timesteps(asked: int = 200, table: int = 1000) -> list[int]:
    """The authors' sub-sequence, ascending: int(linspace(0, sqrt(0.8 table), asked)^2); t = 0 comes 8 times."""
    return [int(root**2) for root in np.linspace(0, math.sqrt(0.8 * table), asked)]


def alpha_bars(table: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """[table] float64: products of 1 - beta, betas evenly spaced."""
    return torch.cumprod(1 - torch.linspace(first, last, table, dtype=torch.float64), 0)


def hard_negatives(z1: Tensor, z2: Tensor, temperature: float, tau_plus: float, beta: float) -> Tensor:
    """The authors' loss, a number, of embeddings [B, E] of unit length (METHOD 1.2)."""
    both = torch.cat([z1, z2])
    count = 2 * len(z1) - 2
    positive = ((z1 * z2).sum(1) / temperature).exp().repeat(2)
    other = ~torch.eye(len(z1), dtype=torch.bool, device=z1.device).repeat(2, 2)
    negative = (both @ both.T / temperature).exp()[other].reshape(len(both), count).clamp_min(1e-4)
    weight = negative**beta
    sum_of_negatives = (weight * negative).sum(1) / weight.mean(1)
    estimate = (sum_of_negatives - tau_plus * count * positive) / (1 - tau_plus)
    estimate = estimate.clamp_min(count * math.exp(-1 / temperature))
    return -(positive / (positive + estimate)).clamp_min(1e-4).log().mean()


@dataclass(frozen=True)
class GuidedDDIM:
    """CDP's sampling on CIFAR-10 as METHOD 1.2 describes its code, without the embedding network.

    Nothing is kept from step to step but the last state: both views are encoded anew in each guided step, and the
    backward pass goes into both and into the encoder's parameters. `network`: (x, t / table, labels) -> eps.
    """

    network: nn.Module
    encode: Encode
    owner: nn.Module  # the encoder's module, whose parameters get gradients
    timesteps: list[int]  # ascending
    strength: float = 100_000.0  # lambda; 0: no guidance
    first_guided: int = 400  # guided where t is at least this, never in the first step
    temperature: float = 10.0
    tau_plus: float = 0.1
    beta: float = 1.0
    table: int = 1000

    def guided(self) -> int:
        """How many steps are guided."""
        return sum(t >= self.first_guided for t in self.timesteps[:-1]) if self.strength else 0

    def __call__(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """x_0 [B, C, H, W] in [-1, 1] scale, not clamped, from x_T ~ N(0, I)."""
        power, x, before = alpha_bars(self.table), noise, None
        self.owner.requires_grad_(True)
        for index in reversed(range(len(self.timesteps))):
            t = self.timesteps[index]
            a, lower = float(power[t]), float(power[self.timesteps[index - 1]]) if index else 1.0
            with torch.no_grad():
                eps = self.network(x, torch.full((len(x),), t / self.table, dtype=x.dtype, device=x.device), labels)
            if self.strength and before is not None and t >= self.first_guided:
                eps = eps + self.strength * self._gradient(x, before)
            clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            before, x = x, math.sqrt(lower) * clean + math.sqrt(1 - lower) * eps
        self.owner.requires_grad_(False)
        return x

    def _gradient(self, x: Tensor, before: Tensor) -> Tensor:
        """[B, C, H, W]: of the loss, with respect to this step's state."""
        x, before = (view.detach().requires_grad_() for view in (x, before))
        with torch.enable_grad():
            z1, z2 = (F.normalize(self.encode(view), dim=1) for view in (x, before))
            hard_negatives(z1, z2, self.temperature, self.tau_plus, self.beta).backward()
        self.owner.zero_grad(set_to_none=True)
        assert x.grad is not None
        return x.grad


class NpzInMemory:
    """The plain loader of synthetic images: the whole .npz (image uint8 NHWC, label) in memory, shuffled each epoch."""

    def __init__(self, path: Path, batch: int) -> None:
        with np.load(path) as arrays:
            self.images, self.labels = arrays["image"], arrays["label"]
        self.batch = batch

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 NCHW in [0, 1] and labels, every image once."""
        order = np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(self), self.batch):
            rows = order[start : start + self.batch]
            images = torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2).float().div(255).contiguous()
            yield images, torch.from_numpy(self.labels[rows])
