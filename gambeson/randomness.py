"""All randomness comes from here: named seeds, the noise of a block, and counter-based streams that belong to an image.

Nothing touches torch's global generator. A stream keyed by an image gives that image the same draws whatever batch,
order, shard or device it is attacked in (HOUSE rule 4, METHOD 6).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as signed 64 bit: the increment of splitmix64 (Steele et al. 2014)
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def derive(seed: int, *names: int | str) -> int:
    """A seed below 2**63 that depends on `seed` and every name, the same in any process."""
    text = "/".join([str(seed), *(f"{type(n).__name__}:{n}" for n in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: int | str, device: str | torch.device = "cpu") -> Generator:
    """A fresh generator for the named purpose."""
    return torch.Generator(device=device).manual_seed(derive(seed, *names))


@contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Inside, global draws on the CPU and `device` start from `seed`; outside, the global streams are as they were.

    For layers that take no generator: those that draw their weights, and dropout.
    """
    place = torch.device(device)
    cards = [torch.cuda.current_device() if place.index is None else place.index] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.default_generator.manual_seed(seed)
        for card in cards:
            torch.cuda.default_generators[card].manual_seed(seed)
        yield


def or_fresh(given: Generator | None, device: str | torch.device = "cpu") -> Generator:
    """The caller's generator, or a fresh one seeded 0: never the global stream (rule 4)."""
    return torch.Generator(device=device).manual_seed(0) if given is None else given


def block_generator(seed: int, block: int, purpose: str = "noise") -> Generator:
    """The generator of one block: depends on (run seed, block index, purpose) and on nothing else."""
    return generator(seed, "block", block, purpose)


def block_noise(seed: int, block: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of a block, drawn on the CPU so that every device gets the same."""
    return torch.randn(shape, generator=block_generator(seed, block), dtype=dtype)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed 64-bit tensor."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """A Python integer wrapped to a signed 64-bit word."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit words that passes BigCrush as a counter-based generator."""
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def image_keys(images: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    """[B] int64 keys from the seed, each image's float32 pixels and its label; independent of batch and device."""
    words = images.detach().float().flatten(1).contiguous().view(torch.int32).long()
    position = torch.arange(1, words.shape[1] + 1, device=images.device, dtype=torch.int64) * _GOLDEN
    content = _mix(words ^ position).sum(1)
    return _mix(_mix(content + labels.to(torch.int64) * _MIX1) ^ _signed(derive(seed, "image") * _GOLDEN))


def uniform(keys: Tensor, purpose: int | str, shape: tuple[int, ...], counter: int | Tensor = 0) -> Tensor:
    """Uniform [0, 1) draws [B, *shape] float64: draw `counter` of the stream (key, purpose).

    keys [B] int64 (from `image_keys`), counter one number or [B] int64; the same key, purpose and counter give the same
    numbers on every device.
    """
    start = _mix(keys + _signed(derive(0, purpose) * _GOLDEN))
    place = (counter + 1) * _MIX2 if isinstance(counter, Tensor) else _signed((counter + 1) * _MIX2)
    start = _mix(start ^ place)
    number = math.prod(shape)
    index = torch.arange(1, number + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    bits = _mix(start[:, None] + index[None, :])
    return (_shift_right(bits, 11).double() * 2.0**-53).reshape(-1, *shape)


def normal(keys: Tensor, purpose: int | str, shape: tuple[int, ...], counter: int | Tensor = 0) -> Tensor:
    """Standard normal draws [B, *shape] float64 by Box and Muller over two uniform draws."""
    radius = (-2 * torch.log1p(-uniform(keys, f"{purpose}/radius", shape, counter))).sqrt()
    return radius * torch.cos(2 * math.pi * uniform(keys, f"{purpose}/angle", shape, counter))


def _words(keys: Tensor, purpose: int | str, copies: Tensor, number: int) -> Tensor:
    """[B, number] 64-bit words, those behind `uniform(key, purpose, (number,), copy)`.

    In place: a pass over memory costs more here than the arithmetic does.
    """
    start = _mix(keys + _signed(derive(0, purpose) * _GOLDEN))
    start = _mix(start ^ (copies + 1) * _MIX2)
    words = start[:, None] + torch.arange(1, number + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    shifted = torch.empty_like(words)
    for bits, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):
        torch.bitwise_right_shift(words, bits, out=shifted)
        words.bitwise_xor_(shifted.bitwise_and_((1 << (64 - bits)) - 1))
        if factor != 1:
            words.mul_(factor)
    return words


def gaussian(keys: Tensor, purpose: int | str, shape: tuple[int, ...], copies: Tensor) -> Tensor:
    """Standard normal draws [B, *shape] float32; row i is draw number `copies[i]` of the stream (keys[i], purpose).

    Box and Muller in float32: of each 64-bit word one half gives the radius (up to 6.6), the other the angle, and both
    the cosine and the sine are used. That takes an eighth of the time of `normal`. The words are equal on
    every device; the logarithm and the cosine may differ in float32's last bit, as a network's own sums do.
    """
    number = math.prod(shape)
    halves = _words(keys, purpose, copies, (number + 1) // 2).view(torch.int32).unflatten(1, (-1, 2))
    radius = (halves[..., 0] & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = halves[..., 1].float().mul_(math.pi * 2.0**-31)
    drawn = radius.new_empty(len(keys), 2, radius.shape[1])
    torch.cos(angle, out=drawn[:, 0])
    torch.sin(angle, out=drawn[:, 1])
    return drawn.mul_(radius[:, None]).flatten(1)[:, :number].reshape(-1, *shape)
