"""gambeson: robust image classifiers from guided synthetic data (Contrastive-Guided Diffusion, end to end)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gambeson.data.datasets import load as load
    from gambeson.threat import ThreatModel as ThreatModel

_PLACES = {"load": "gambeson.data.datasets", "ThreatModel": "gambeson.threat"}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `gambeson --help` must not wait for torch."""
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'gambeson' has no attribute {name!r}")
