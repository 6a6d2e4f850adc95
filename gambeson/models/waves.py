"""The sine waves by which diffusion networks read a time or noise level (Vaswani et al. 2017; Ho et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor


def waves(time: Tensor, channels: int, dtype: torch.dtype, *, endpoint: bool) -> tuple[Tensor, Tensor]:
    """Sines and cosines, [B, channels / 2] each, of time [B] times the frequencies 10000^(-j / n).

    n is half - 1 with `endpoint` (the last frequency is 1/10000: Ho et al., EDM) and half without it
    (guided-diffusion). Computed in at least float32, whatever `dtype` is returned; ValueError for odd channels.
    """
    if channels % 2 or channels < 4:
        raise ValueError(f"waves, channels: expected an even number of at least 4, got {channels}")
    precise = torch.promote_types(dtype, torch.float32)
    half = channels // 2
    exponents = torch.arange(half, device=time.device, dtype=precise) / (half - endpoint)
    angles = time.to(precise)[:, None] * 10000.0**-exponents
    return angles.sin().to(dtype), angles.cos().to(dtype)
