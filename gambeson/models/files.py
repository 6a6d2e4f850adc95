"""Networks on disk: safetensors with the architecture in the header; nothing is executed on loading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gambeson.disk import atomic
from gambeson.errors import EnvironmentFault


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any] | None) -> None:
    """Writes tensors and a JSON header, atomically; without one as other libraries do (metadata `format`: `pt`)."""
    metadata = {"format": "pt"} if header is None else {"gambeson": json.dumps(header, sort_keys=True)}
    # not by save_file: it goes through a temporary file of its own, which a kill leaves behind and only we may read
    with atomic(path) as temporary:
        temporary.write_bytes(save(_unshared(tensors), metadata=metadata))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous on the CPU; those that share memory with one before are copied, as the format asks."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        own[name] = value.clone() if memory in seen else value
        seen.add(memory)
    return own


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def header_of(path: Path) -> dict[str, Any]:
    """The JSON header that `save_tensors` wrote, without the weights; {} for any other file."""
    try:
        with safe_open(path, framework="pt") as handle:
            found = json.loads((handle.metadata() or {}).get("gambeson", "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def numbers_in(path: Path) -> int:
    """How many numbers the tensors of a safetensors file have, read off its header."""
    with safe_open(path, framework="pt") as handle:
        return sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())  # noqa: SIM118


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. Raises EnvironmentFault, naming it, for a file that is damaged or no safetensors."""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
        return load_file(path), json.loads(metadata.get("gambeson", "{}"))
    except SafetensorError as error:
        raise EnvironmentFault(f"{path}: expected a safetensors file, got a damaged one or another: {error}") from error


def load_weights(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Fills a module strictly. Raises ValueError naming missing, unexpected and wrongly shaped keys."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{source}: expected the weights of {type(module).__name__}; missing {missing}, unexpected {unexpected}, "
            f"of another shape {sorted(shapes)}"
        )
    module.load_state_dict(tensors)
