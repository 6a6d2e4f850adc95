"""Squared norms of each image's gradient with respect to one layer's parameters, from what went in and what came back.

With a_t and g_t at the places t of a layer z_t = W a_t the squared norm of sum_t g_t a_t^T is
sum_ts (a_t . a_s)(g_t . g_s) (Goodfellow 2015, 1510.01799): cheaper than the sum where there are few places (Bu, Mao &
Xu 2022, 2205.10683).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Squares = dict[str, Tensor]
"""Name of a parameter -> [B] squared norm of each image's gradient with respect to it."""
ROOM, ROOM_ELSEWHERE = 1 << 22, 1 << 28
"""Numbers that a step holds besides the network's own, about, on a CPU and on other devices.

16 MiB of float32 stay near a CPU's cache; six sizes were tried once, on a core that others used too, and this was the
fastest (WRN-16-2 at 32x32).
"""


@dataclass(eq=False)
class Use:
    """One call of a layer: what went in, and the loss's gradient with respect to what came out; images first."""

    x: Tensor
    g: Tensor


Split = Callable[[Tensor], Tensor]
"""A layer's input or output [N, ...] -> its columns [N, D or O, T]."""


def wide_type(like: Tensor) -> torch.dtype:
    """The type that squares are summed in: float64, but on a device that has none."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def squared(t: Tensor) -> Tensor:
    """[N, ...] -> [N] sums of squares."""
    return t.flatten(1).square().sum(1, dtype=wide_type(t))


def outer_squares(a: Tensor, g: Tensor) -> Tensor:
    """||sum_t g_t a_t^T||^2: a [N, D, T], g [N, O, T] -> [N]; by whichever of the two ways multiplies less."""
    (_, d, t), o = a.shape, g.shape[1]
    if t * (d + o) < d * o:
        return ((a.mT @ a) * (g.mT @ g)).sum((1, 2), dtype=wide_type(a)).clamp_min(0)
    return squared(g @ a.mT)


def _weight(weight: Tensor, uses: Sequence[Use], inward: Split, outward: Split, groups: int = 1) -> Tensor:
    """The squares of a weight [O, D, ...], some images at a time; places of all calls stand beside each other."""
    (o, d), t = weight.flatten(1).shape, sum(outward(use.g[:1]).shape[2] for use in uses)
    room = ROOM if weight.device.type == "cpu" else ROOM_ELSEWHERE
    size = max(room // (d * groups * t + min(d * o, 2 * groups * t * t)), 1)
    found = []
    for start in range(0, len(uses[0].x), size):
        part = slice(start, start + size)
        a = _beside([inward(use.x[part]) for use in uses]).unflatten(1, (groups, -1))
        g = _beside([outward(use.g[part]) for use in uses]).unflatten(1, (groups, -1))
        found.append(outer_squares(a.flatten(0, 1), g.flatten(0, 1)).unflatten(0, (-1, groups)).sum(1))
    return torch.cat(found)


def _beside(columns: list[Tensor]) -> Tensor:
    """The columns of all calls; those of one alone are not copied."""
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=2)


def _bias(uses: Sequence[Use], outward: Split) -> Tensor:
    return squared(torch.stack([outward(use.g).sum(2) for use in uses]).sum(0))


def _linear(layer: nn.Linear, uses: Sequence[Use]) -> Iterator[tuple[str, Tensor]]:
    """Features last; whatever lies between them and the images are places."""

    def columns(t: Tensor) -> Tensor:
        return t.reshape(len(t), -1, t.shape[-1]).mT

    yield "weight", _weight(layer.weight, uses, columns, columns)
    if layer.bias is not None:
        yield "bias", _bias(uses, columns)


def _conv(layer: nn.Conv2d, uses: Sequence[Use]) -> Iterator[tuple[str, Tensor]]:
    """The columns are the patches that the kernel sees; groups are layers beside each other."""
    padding, steps = _padding(layer), {"dilation": layer.dilation, "stride": layer.stride}

    def patches(x: Tensor) -> Tensor:
        return F.unfold(F.pad(x, padding), layer.weight.shape[2:], **steps)

    def pixels(g: Tensor) -> Tensor:
        return g.flatten(2)

    yield "weight", _weight(layer.weight, uses, patches, pixels, layer.groups)
    if layer.bias is not None:
        yield "bias", _bias(uses, pixels)


def _padding(layer: nn.Conv2d) -> list[int]:
    """(left, right, above, below) of a convolution; "same" has the odd one on the right and below."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        (above, left), (height, width) = (t // 2 for t in total), total
        return [left, width - left, above, height - above]
    height, width = (int(p) for p in layer.padding)
    return [width, width, height, height]


def _batch_norm(layer: Any, uses: Sequence[Use]) -> Iterator[tuple[str, Tensor]]:
    """In eval mode: by the running statistics."""
    return _affine(uses, lambda x: F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps), layer, 1, 2)


def _group_norm(layer: nn.GroupNorm, uses: Sequence[Use]) -> Iterator[tuple[str, Tensor]]:
    return _affine(uses, lambda x: F.group_norm(x, layer.num_groups, eps=layer.eps), layer, 1, 2)


def _layer_norm(layer: nn.LayerNorm, uses: Sequence[Use]) -> Iterator[tuple[str, Tensor]]:
    own = len(layer.normalized_shape)
    shape, last = list(layer.normalized_shape), uses[0].x.dim()
    return _affine(uses, lambda x: F.layer_norm(x, shape, eps=layer.eps), layer, last - own, last)


def _affine(
    uses: Sequence[Use], normal: Callable[[Tensor], Tensor], layer: Any, start: int, stop: int
) -> Iterator[tuple[str, Tensor]]:
    """weight and bias of w n(x) + b, which have the axes from `start` to before `stop`: sums over the others."""
    places = [axis for axis in range(1, uses[0].x.dim()) if not start <= axis < stop]

    def total(t: Tensor) -> Tensor:
        return t.sum(places) if places else t

    if layer.weight is not None:
        yield "weight", squared(torch.stack([total(use.g * normal(use.x)) for use in uses]).sum(0))
    if layer.bias is not None:
        yield "bias", squared(torch.stack([total(use.g) for use in uses]).sum(0))


KINDS: dict[type[nn.Module], Callable[[Any, Sequence[Use]], Iterator[tuple[str, Tensor]]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}
"""Kind of a layer -> (layer, calls) -> each of its parameters with the squares [B]."""


def is_known(layer: nn.Module) -> bool:
    """Whether `KINDS` says it all: by the exact class, since what is derived from one may compute something else."""
    return type(layer) in KINDS and not (isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros")
