"""Networks on disk: safetensors with the architecture in the header; nothing is executed on loading."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gambeson.disk import atomic
from gambeson.errors import EnvironmentFault, UserError

Network = TypeVar("Network", bound=nn.Module)


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
    except (SafetensorError, OSError):
        return False


def header_of(path: Path) -> dict[str, Any]:
    """The JSON header that `save_tensors` wrote, without the weights; {} for any other file."""
    try:
        with safe_open(path, framework="pt") as handle:
            found = json.loads((handle.metadata() or {}).get("gambeson", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
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
        header = json.loads(metadata.get("gambeson", "{}"))
        if not isinstance(header, dict):
            raise ValueError(f"a header that is a {type(header).__name__}")
        return load_file(path), checked(header, str(path))
    except (SafetensorError, ValueError, RecursionError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise EnvironmentFault(f"{path}: expected a safetensors file, got a damaged one or another: {error}") from error


_FACTS: dict[str, Callable[[Any], bool]] = {
    "shape": lambda v: isinstance(v, list) and len(v) == 3 and all(type(n) is int and 0 < n < 2**20 for n in v),
    "class_names": lambda v: isinstance(v, list) and all(isinstance(name, str | int) for name in v),
    "noise": lambda v: type(v) in (int, float) and 0 <= v < 1e6,
    "log": lambda v: isinstance(v, list) and all(isinstance(line, dict) for line in v),
}
"""What a header may say of a network's images and training, and what such a word has to be."""


def checked(facts: dict[str, Any], source: str) -> dict[str, Any]:
    """The same facts. UserError for one of another kind than its name says: a header may be a stranger's."""
    for name, fits in _FACTS.items():
        if facts.get(name) is not None and not fits(facts[name]):
            raise UserError(f"{source}: expected a header as gambeson writes it, got {name}: {str(facts[name])[:100]}")
    return facts


_REPEATS = ("depth", "depths", "blocks", "layers", "num_layers", "layers_per_block")
"""Names of settings that say how often something is repeated, in ours and in others' networks."""
MOST_LAYERS = 4
"""Layers that a header may ask for, at most, for each tensor that came with it."""


def check_asked(described: object, tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError for a description of a network with more or wider layers than its weights can fill.

    A stranger's header is believed in what it says only as far as its file is large: to build is to take memory.
    """
    described = _opened(described)
    numbers, layers = sum(t.numel() for t in tensors.values()), MOST_LAYERS * len(tensors) + 64
    wrong = [n for n in _numbers(described) if not -1_000_000 <= n <= max(numbers, 1000)]
    if wrong or _count(described) > layers:
        raise UserError(
            f"{source}: expected the description of a network that its {len(tensors)} tensors of {numbers:,} numbers "
            f"fill, got {str(described)[:300]}; it is damaged, or was made to fill memory"
        )


def _opened(described: object) -> object:
    """The description with the JSON opened that some libraries' settings are kept in."""
    if isinstance(described, str) and described.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(described)
    if isinstance(described, Mapping):
        return {name: _opened(value) for name, value in described.items()}
    return described


def _numbers(described: object) -> list[int | float]:
    """All numbers in what JSON can say."""
    if isinstance(described, Mapping):
        described = list(described.values())
    if isinstance(described, list | tuple):
        return [number for item in described for number in _numbers(item)]
    return [described] if isinstance(described, int | float) else []


def _count(described: object) -> int | float:
    """About how many layers a description asks for: its depth or its blocks, for each of its resolutions."""
    if not isinstance(described, Mapping):
        return 0
    each = [sum(_numbers(described[name])) for name in _REPEATS if name in described]
    stages = [len(value) for value in described.values() if isinstance(value, list | tuple)]
    inner = [_count(value) for value in described.values()]
    return max([0, *inner, max([1, *each]) * max([1, *stages])])


def built(build: Callable[[], Network], check: Callable[[Network], None], source: str) -> Network:
    """The network, built once one that takes no memory has passed the check. UserError for what cannot be built."""
    try:
        with torch.device("meta"):
            check(build())
        return build()
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError, AssertionError) as error:
        raise UserError(f"{source}: expected the description of a network, got one that fails: {error}") from error


def load_weights(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Fills a module strictly. Raises UserError naming missing, unexpected and wrongly shaped keys."""
    check_shapes(module, tensors, source)
    module.load_state_dict(tensors)


def check_shapes(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError naming keys of a module that are missing, unexpected or of another shape."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if missing or unexpected or shapes:
        raise UserError(
            f"{source}: expected the weights of {type(module).__name__}; missing {missing}, unexpected {unexpected}, "
            f"of another shape {sorted(shapes)}"
        )
