"""Weights out of pickles without running anything that is in them.

A pickle names functions to call; here a name is looked up in a short list of harmless stand-ins, and any other ends the
reading. EDM's network pickles hold whole Python objects with their source text: they become passive records.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from gambeson.errors import EnvironmentFault, UserError

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save before 1.6 begin: the pickled number 0x1950a86a20f9469cfc6c."""
DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, OverflowError,
    MemoryError, AssertionError, struct.error,
)  # fmt: skip
"""What a damaged pickle can raise while it is read."""


def plain(table: dict[Any, Any]) -> dict[Any, Any]:
    """A dict of what a dict of any kind holds, whatever a file has made of the object's own `items` or `get`."""
    return dict(dict.items(table))


class Record:
    """An object of a class that is not ours: the name of its class and its attributes, nothing to call."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __setstate__(self, state: object) -> None:
        raise UserError(f"pickle: expected an object of class {self.class_name} as it was stored, got a change to it")

    def modules(self) -> dict[str, Record]:
        """The submodules of a torch module, those that are None left out. UserError for an object that is none."""
        return {str(k): v for k, v in self._table("_modules").items() if isinstance(v, Record)}

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The state_dict of a torch module. UserError for an object that is none or holds itself."""
        if prefix.count(".") > 50:
            raise UserError(f"pickle: expected modules within modules, got some that hold themselves: {prefix[:80]}...")
        transient = self.state.get("_non_persistent_buffers_set") or ()
        own = {**self._table("_parameters"), **self._table("_buffers")}
        found = {prefix + k: v for k, v in own.items() if isinstance(v, Tensor) and k not in transient}
        for name, module in self.modules().items():
            found |= module.tensors(f"{prefix}{name}.")
        return found

    def _table(self, name: str) -> dict[str, Any]:
        table = self.state.get(name)
        if not isinstance(table, dict):
            raise UserError(f"pickle: expected a torch module with {name}, got an object of class {self.class_name!r}")
        return plain(table)


class _Allowed:
    """An allowed global: can be called, cannot be changed (the pickle's BUILD ends here), shows nothing else."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise UserError("pickle: expected weights, got instructions that change a function; such a file is not read")


class _ModuleDict(Record):
    """Stands for torch.nn.ModuleDict, which a pickle makes empty and then gives its state."""

    def __new__(cls) -> _ModuleDict:
        made = super().__new__(cls)
        made.class_name, made.state = "ModuleDict", {}
        return made

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise UserError(f"pickle: expected the attributes of a ModuleDict, got {type(state).__name__}")
        self.state = state


class _Dtype:
    """Stands for numpy.dtype: the letter and size of a number, and its byte order."""

    def __init__(self, kind: str, *_: object) -> None:
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = {"<": "<", ">": ">", "|": "<", "=": "<"}[state[1]]


class _Ordered(OrderedDict[Any, Any]):
    """Stands for collections.OrderedDict, whose attributes a pickle could replace."""

    def __setstate__(self, state: object) -> NoReturn:
        raise UserError("pickle: expected a plain OrderedDict, got one with a state of its own")


class _EasyDict(dict[str, Any]):
    """Stands for dnnlib.util.EasyDict."""

    def __setstate__(self, state: object) -> NoReturn:
        raise UserError("pickle: expected a plain EasyDict, got one with a state of its own")


def _scalar(dtype: _Dtype, data: bytes) -> float | int | bool:
    """A numpy number as Python's."""
    letters = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "u8": "Q", "u4": "I", "b1": "?"}
    return struct.unpack(dtype.order + letters[dtype.kind], data)[0]


def _record(meta: dict[str, Any]) -> Record:
    """EDM's persistent object; its source text (module_src) is dropped unread."""
    state = meta["state"]
    if not isinstance(state, dict):
        raise UserError(f"pickle: expected the attributes of a {meta['class_name']}, got {type(state).__name__}")
    return Record(str(meta["class_name"]), state)


def _storage(data: bytes) -> torch.TypedStorage:
    """A storage that torch.save wrote into the pickle; torch reads it with weights only."""
    value = _weights_only(io.BytesIO(data))
    if not isinstance(value, torch.TypedStorage):
        raise UserError(f"pickle: expected the numbers of a tensor, got {type(value).__name__}")
    return value


def _tensor(
    storage: torch.TypedStorage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """Part of a storage, not copied; RuntimeError by torch where it lies outside.

    UserError for more numbers than the storage holds: with a stride of 0 a file of a few bytes could ask for any size.
    """
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    if math.prod(size) > flat.numel():
        raise UserError(f"pickle: expected a tensor of at most the {flat.numel()} numbers stored for it, got {size}")
    return flat.as_strided(size, stride, offset)


def _weights_only(source: Path | io.BytesIO) -> Any:
    """torch.load that makes tensors and plain values only; UserError, naming it, for a global beyond its own list."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"^.*\bunsupported (global|class|operand).*$", str(error), re.IGNORECASE | re.MULTILINE)
        if not refused:
            raise
        raise UserError(
            f"expected weights (a state_dict), got objects or instructions that could run anything "
            f"({refused[0].strip()[:200]}); load it where it was made and save model.state_dict()"
        ) from None


def _check_expanded(content: Any) -> None:
    """UserError for a tensor of more numbers than are stored for it: to use it would be to take memory for them all."""
    left, seen = [content], set[int]()
    while left:
        value = left.pop()
        if isinstance(value, Tensor) and not value.is_sparse and not value.is_quantized:
            stored = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > stored:
                raise UserError(
                    f"expected a tensor of at most the {stored} bytes stored for it, got {list(value.shape)}"
                )
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as protocol 2 writes them."""
    if encoding != "latin1":
        raise UserError(f"pickle: expected bytes written as latin1, got {encoding!r}")
    return text.encode("latin1")


GLOBALS: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Allowed(_record),
    ("collections", "OrderedDict"): _Ordered,
    ("torch._utils", "_rebuild_parameter"): _Allowed(lambda data, *_: data),
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(_tensor),
    ("torch.storage", "_load_from_bytes"): _Allowed(_storage),
    ("torch.nn.modules.container", "ModuleDict"): _ModuleDict,
    ("numpy", "dtype"): _Allowed(_Dtype),
    ("numpy.core.multiarray", "scalar"): _Allowed(_scalar),
    ("numpy._core.multiarray", "scalar"): _Allowed(_scalar),
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): _Allowed(_encode),
    ("dnnlib.util", "EasyDict"): _EasyDict,
}
"""The globals an EDM network pickle needs -> what stands for them here."""


class _Reader(pickle._Unpickler):
    """An unpickler that knows `GLOBALS` and nothing else.

    Python's own: the one in C takes memory for as many entries as a file of a few bytes says.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise UserError(
                f"pickle: expected weights and the {len(GLOBALS)} names that EDM's files use, got "
                f"{module}.{name}; a pickle that asks for it could run anything, so it is not read"
            )
        return GLOBALS[module, name]


def read_pickle(path: Path) -> Any:
    """The content of a plain pickle, of dicts, lists, numbers, tensors and `Record`s; nothing in it is executed.

    UserError, naming it, for any global beyond `GLOBALS`; EnvironmentFault for a damaged or cut file.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except DAMAGE as error:
        raise EnvironmentFault(f"{path}: expected a whole pickle, got a damaged or cut one: {error}") from error


def read_torch(path: Path) -> Any:
    """What torch.save wrote (new or old format), with weights only, on the CPU.

    UserError where it holds more than weights and plain values; EnvironmentFault for a damaged or cut file.
    """
    try:
        found = _weights_only(path)
        _check_expanded(found)
        return found
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except DAMAGE as error:
        raise EnvironmentFault(f"{path}: expected a whole file of torch.save, got a damaged one: {error}") from error
