"""The shape of a recipe tree and its identity: field types, component choices, help, JSON-able form and digest.

A recipe is a frozen tree of dataclasses whose leaves are numbers, strings, booleans, None, enums and tuples of them.
Equal trees have equal digests in any process. Imports the standard library only.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import io
import json
import math
import textwrap
import tokenize
from collections.abc import Iterator
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gambeson.errors import UserError


@cache
def hints(cls: type) -> dict[str, Any]:
    """The resolved type of each field that the dataclass's constructor takes, in its order."""
    resolved = get_type_hints(cls)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls) if f.init}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def components(hint: Any) -> tuple[tuple[type, ...], bool]:
    """The dataclasses a field may hold (NoneType for None), and whether it holds a tuple of them; () for a leaf.

    Raises TypeError (our mistake, in the class) for a type that is neither, such as a protocol, for one that mixes
    components with leaves, and for a tuple of components of fixed length.
    """
    if get_origin(hint) is tuple:
        first, *rest = get_args(hint) or (None,)
        kinds, nested = components(first)
        if kinds and (nested or rest != [Ellipsis]):
            raise TypeError(f"recipe field: expected tuple[Component, ...], got {hint}")
        return kinds, bool(kinds)
    kinds = alternatives(hint)
    if all(map(_is_leaf, kinds)):
        return (), False
    if not all(k is NoneType or dataclasses.is_dataclass(k) for k in kinds):
        raise TypeError(f"recipe field: expected leaf types, or a union of dataclasses (and None), got {hint}")
    return kinds, False


def _is_leaf(kind: Any) -> bool:
    """Whether values of this type are a recipe's leaves."""
    if isinstance(kind, type) and get_origin(kind) is None:
        return kind in (NoneType, bool, int, float, str) or issubclass(kind, Enum)
    inner = [part for item in get_args(kind) for part in alternatives(item) if part is not Ellipsis]
    return get_origin(kind) is Literal or (get_origin(kind) is tuple and all(map(_is_leaf, inner)))


def name_of(kind: type) -> str:
    """The word that stands for a component in files, on the command line and in digests."""
    return "none" if kind is NoneType else kind.__name__


def type_text(hint: Any) -> str:
    """A field's type in words: 'int', 'float or none', 'linf or l2', 'Heun or DDIM', 'several of int'."""
    if get_origin(hint) is tuple:
        inner = [type_text(part) for part in get_args(hint) if part is not Ellipsis]
        several = get_args(hint)[-1] is Ellipsis
        return f"several of {inner[0]}" if several else f"{len(inner)} values: {', '.join(inner)}"
    return " or ".join(word for kind in alternatives(hint) for word in _words(kind))


def _words(kind: Any) -> list[str]:
    """The words for one member of a union."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    if get_origin(kind) is tuple:
        return [type_text(kind)]
    if issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    return {bool: ["true", "false"], str: ["text"]}.get(kind, [name_of(kind)])


def item_hint(hint: Any, index: int) -> Any:
    """The type of one item of a tuple field; Any if it is no tuple or has no such item."""
    parts: tuple[Any, ...] = next((get_args(kind) for kind in alternatives(hint) if get_origin(kind) is tuple), ())
    if parts[1:] == (Ellipsis,):
        return parts[0]
    return parts[index] if index < len(parts) else Any


def _number(value: int | float, hint: Any) -> int | float:
    """The number as its field means it: 1 in a float field is 1.0, -0.0 is 0.0; nan and inf are refused."""
    kinds = alternatives(hint)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"expected a finite number, got {value!r}")
    if isinstance(value, float) and float not in kinds and hint is not Any:
        raise UserError(f"expected {type_text(hint)}, got {value!r}")
    return float(value) + 0.0 if isinstance(value, float) or float in kinds else value


def _leaf(value: Any, hint: Any) -> Any:
    """The JSON-able form of a value that is no dataclass."""
    if isinstance(value, Enum):
        return _leaf(value.value, Any)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        return _number(value, hint)
    raise UserError(f"expected a number, text, enum, None, tuple or dataclass, got {type(value).__name__} {value!r}")


def _fields(obj: Any, drop_neutral: bool) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, type) of each field of a dataclass; without those at their neutral value if asked."""
    missing = object()
    types = hints(type(obj))
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        neutral = field.metadata.get("neutral", missing) if drop_neutral else missing
        if field.init and (neutral is missing or value != neutral):
            yield field.name, value, types[field.name]


def _plain(value: Any, hint: Any, drop_neutral: bool, path: str) -> Any:
    """`plain` below a field of type `hint`."""
    if dataclasses.is_dataclass(value):
        inside = {n: _plain(v, h, drop_neutral, f"{path}.{n}") for n, v, h in _fields(value, drop_neutral)}
        return {"class": type(value).__name__, **inside}
    if isinstance(value, (tuple, list)):
        return [_plain(v, item_hint(hint, i), drop_neutral, f"{path}.{i}") for i, v in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _plain(v, Any, drop_neutral, f"{path}.{k}") for k, v in value.items()}
    try:
        return _leaf(value, hint)
    except UserError as error:
        raise UserError(f"{path.lstrip('.') or 'value'}: {error}") from None


def plain(obj: Any, drop_neutral: bool = False) -> Any:
    """The JSON-able form of a recipe, a component, a leaf, or lists and dictionaries (text keys) of them.

    A dataclass becomes {"class": its name, field: ...}, enums their values, tuples lists; a whole number in a float
    field becomes a float. `drop_neutral` leaves out fields at the value of their metadata "neutral" (added later,
    meaning "as before"). Raises UserError, with the path, for nan, inf and anything that is not a recipe's leaf.
    """
    return _plain(obj, Any, drop_neutral, "")


def digest(*objs: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of the objects: the same in every process for equal recipes."""
    text = json.dumps(plain(list(objs), drop_neutral=True), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _own_help(cls: type) -> dict[str, str]:
    """The comments that follow the fields in the source of the class itself."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ").split("  #")[0] for t in tokens if t.type == tokenize.COMMENT}
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    found = ((s, [n for n in range(s.lineno, (s.end_lineno or s.lineno) + 1) if n in comments]) for s in body)
    return {
        s.target.id: comments[lines[0]]
        for s, lines in found
        if lines and isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
    }


@cache
def field_help(cls: type) -> dict[str, str]:
    """Field -> the one-line comment that follows it in the source, inherited ones too; {} if there is no source."""
    merged: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            try:
                merged |= _own_help(base)
            except (OSError, TypeError):
                continue
    return merged
