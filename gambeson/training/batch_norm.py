"""Batch normalisation over a batch that several processes share: as one process would see it, on CPU and CUDA.

torch's own SyncBatchNorm takes CUDA tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gambeson import distributed


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SharedBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose batch is that of all processes together; alone, or in eval mode, nn.BatchNorm2d itself."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> SharedBatchNorm:
        """The same layer, sharing parameters and buffers with `norm`."""
        shared = cls(norm.num_features, norm.eps, norm.momentum, norm.affine)
        shared.weight, shared.bias = norm.weight, norm.bias
        shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
        shared.num_batches_tracked = norm.num_batches_tracked
        return shared.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not distributed.together():
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        each = torch.ones_like(x[:, :1]).sum()  # values of a channel here
        counted = _Sum.apply(torch.cat([x.sum(dim=(0, 2, 3)), each[None]]))
        count, mean = counted[-1].detach(), counted[:-1] / counted[-1].detach()
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics as nn.BatchNorm2d does; the variance is the unbiased one."""
        momentum = self.momentum
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def share_batch_norm(model: nn.Module) -> None:
    """Replaces every nn.BatchNorm2d below `model` by a SharedBatchNorm; names and tensors stay."""
    for name, child in list(model.named_children()):
        if type(child) is nn.BatchNorm2d:
            setattr(model, name, SharedBatchNorm.of(child))
        else:
            share_batch_norm(child)


def average_statistics(model: nn.Module) -> None:
    """Running statistics that each process took of its own part of the batches become their mean."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    distributed.average(b for m in norms for b in (m.running_mean, m.running_var) if b is not None)
