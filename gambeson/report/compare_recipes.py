"""Where recipes differ, field by field, from their plain forms."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST = 60
"""Characters of a value that are shown."""
ABSENT = "–"
"""What stands for a field that a recipe has not."""


@dataclass(frozen=True)
class Field:
    """A field that differs: its path, and its value in each run in words ('': the run has no recipe)."""

    path: str
    values: tuple[str, ...]

    @property
    def groups(self) -> list[tuple[str, tuple[int, ...]]]:
        """Each value once with the places (from 0) of the runs that have it, in the order they came."""
        return [
            (value, tuple(i for i, v in enumerate(self.values) if v == value))
            for value in dict.fromkeys(self.values)
            if value
        ]


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """A plain tree as path -> leaf; a component is the name of its class at its own path."""
    if isinstance(tree, Mapping):
        own = {path: tree["class"]} if path and "class" in tree else {}
        inside = ((f"{path}.{name}" if path else str(name), value) for name, value in tree.items() if name != "class")
        return own | {place: leaf for name, value in inside for place, leaf in flat(value, name).items()}
    if isinstance(tree, list | tuple) and any(isinstance(each, Mapping) for each in tree):
        return {place: leaf for i, each in enumerate(tree) for place, leaf in flat(each, f"{path}.{i}").items()}
    return {path: tree}


def differing(trees: Sequence[Mapping[str, Any]], partial: Collection[int] = ()) -> list[Field]:
    """The fields that are not the same in all trees, in the order of the recipes.

    Empty trees are left out of it. partial: places of trees in which a field that is absent says nothing, such as a
    recipe of an older version.
    """
    flats = [flat(tree) for tree in trees]
    paths = dict.fromkeys(path for each in flats for path in each)
    return [
        Field(path, tuple(_value(f, path, i in partial) for i, f in enumerate(flats)))
        for path in paths
        if _several([f.get(path, _NONE) for i, f in enumerate(flats) if f and (path in f or i not in partial)])
    ]


_NONE = object()
"""In place of a field that a tree has not."""


def _value(tree: Mapping[str, Any], path: str, partial: bool) -> str:
    if not tree:
        return ""
    return said(tree[path]) if path in tree else "not said" if partial else ABSENT


def _several(values: Sequence[Any]) -> bool:
    """Whether the leaves do not all mean the same."""
    return any(_differs(value, values[0]) for value in values)


def _differs(a: Any, b: Any) -> bool:
    """Whether two leaves mean different things; 1 and 1.0 are the same number."""
    return (type(a) is not type(b) and not {type(a), type(b)} <= {int, float}) or a != b


def said(value: Any) -> str:
    """A leaf as a recipe file would have it."""
    if value is None:
        return "none"
    if value == "":
        return "empty text"
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value)) or "none"
    return json.dumps(value, ensure_ascii=False, default=str)


def shortened(text: str, longest: int = LONGEST) -> str:
    """At most so many characters, the middle left out."""
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
