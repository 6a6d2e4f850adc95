"""The sine waves by which diffusion networks read a time or noise level (Vaswani et al. 2017; Ho et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor


def waves(
    time: Tensor,
    channels: int,
    dtype: torch.dtype,
    *,
    endpoint: bool,
    scale: float = 1.0,
    reciprocal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sines and cosines, [B, channels / 2] each, of time [B] times the frequencies 10000^(-j / n).

    n is half - 1 with `endpoint` (the last frequency is 1/10000: Ho et al., EDM) and half without it
    (guided-diffusion). The angles are multiplied by `scale`. `reciprocal` computes (1/10000)^(j / n): the same but for
    the last bits, which networks trained with them keep. Computed in at least float32, whatever `dtype` is returned.
    ValueError for odd channels.
    """
    if channels % 2 or channels < 4:
        raise ValueError(f"waves, channels: expected an even number of at least 4, got {channels}")
    precise = torch.promote_types(dtype, torch.float32)
    half = channels // 2
    exponents = torch.arange(half, device=time.device, dtype=precise) / (half - endpoint)
    frequencies = (1 / 10000) ** exponents if reciprocal else 10000.0**-exponents
    angles = time.to(precise)[:, None] * frequencies * scale
    return angles.sin().to(dtype), angles.cos().to(dtype)
