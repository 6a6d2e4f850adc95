"""Architectures read off the names and shapes of weights, and the checks that the U-Nets of other projects share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gambeson.errors import UserError, require

Tensors = Mapping[str, Tensor]
"""Weights by name."""


def shape_of(tensors: Tensors, name: str) -> tuple[int, ...]:
    """The shape of a tensor of at least two dimensions; UserError, naming it, where there is none."""
    if name not in tensors:
        raise UserError(f"weights: expected a tensor {name}, which is missing; got {', '.join(list(tensors)[:4])}, ...")
    shape = tuple(tensors[name].shape)
    require(len(shape) >= 2 and min(shape) > 0, f"weights, {name}", "two dimensions or more, none of them 0", shape)
    return shape


def numbered(tensors: Tensors, prefix: str) -> int:
    """How many of prefix.format(0), prefix.format(1), ... begin the name of a tensor, counted up to the first gap."""
    count = 0
    while any(name.startswith(prefix.format(count)) for name in tensors):
        count += 1
    return count


def check_levels(name: str, multipliers: Iterable[int], blocks: int, attention: Iterable[int]) -> None:
    """UserError unless there are resolutions and blocks, and attention names resolutions that exist."""
    levels = list(multipliers)
    require(bool(levels) and min(levels) >= 1, f"{name}, multipliers", "at least one, each of at least 1", levels)
    require(blocks >= 1, f"{name}, blocks", "at least 1", blocks)
    known = range(len(levels))
    require(set(attention) <= set(known), f"{name}, attention", f"resolutions 0 to {len(levels) - 1}", attention)


def check_sides(name: str, levels: int, shape: tuple[int, int, int]) -> None:
    """UserError unless both sides of an image (channels, height, width) can be halved at each further resolution."""
    factor = 2 ** (levels - 1)
    if shape[1] % factor or shape[2] % factor:
        raise UserError(
            f"{name}: expected image sides divisible by {factor}, to be halved {levels - 1} times, got "
            f"{shape[1]}x{shape[2]} pixels; pad or resize them, or take a network of fewer resolutions"
        )


def check_weights(tensors: Tensors, source: str) -> None:
    """UserError, naming the first, unless all are floating-point tensors that hold as many numbers as they have places.

    (A tensor of stride 0 may be as large as it likes in a file of a few bytes.)
    """
    for name, value in tensors.items():
        require(value.is_floating_point(), f"{source}, {name}", "floating-point weights", value.dtype)
        dense = value.layout == torch.strided
        stored = dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        require(stored, f"{source}, {name}", "a tensor whose numbers are all in the file", tuple(value.shape))
        wrong = int((~value.float().isfinite()).sum())
        require(wrong == 0, f"{source}, {name}", "finite weights", f"{wrong} of {value.numel()} are NaN or infinite")
