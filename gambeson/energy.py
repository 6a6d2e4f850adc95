"""What a card has used since its driver was loaded, where it reports that (NVIDIA's management library, NVML).

A processor's counters are not read: they count everything on the machine, and stages run side by side on it.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

LIBRARY = "libnvidia-ml.so.1"


def joules_so_far(device: str, library: Any = None) -> float | None:
    """The card's count in joules, of everything that runs on it; None on a CPU and for a card that does not report.

    library: NVML; None loads it. Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption (millijoules).
    """
    if not device.startswith("cuda"):
        return None
    try:
        nvml = library or ctypes.CDLL(LIBRARY)
        handle, count = ctypes.c_void_p(), ctypes.c_ulonglong()
        uuid = f"GPU-{_uuid(device)}".encode()
        for failed in (
            nvml.nvmlInit_v2(),
            nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)),
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(count)),
        ):
            if failed:
                return None
    except (OSError, AttributeError):  # no such library, or an old one
        return None
    return count.value / 1000


def _uuid(device: str) -> str:
    """What NVML knows the card by, whatever CUDA_VISIBLE_DEVICES calls it."""
    torch = importlib.import_module("torch")
    return str(torch.cuda.get_device_properties(device).uuid)


def used(device: str, before: float | None) -> dict[str, float]:
    """`joules` since that count, for a stage's record; empty where either is not known."""
    now = joules_so_far(device)
    return {} if now is None or before is None else {"joules": now - before}
