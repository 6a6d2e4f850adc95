"""Every field of a recipe from the command line: `--generation.count 8000`, `--generation.sampler DDIM`.

The recipe becomes its plain tree, the words edit that tree, and files.build checks the result: the command line is
an edited file. tyro reads the words and writes the help, one flat option per field; types and errors are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from gambeson.canonical import components, field_help, hints, name_of, plain, type_text

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spot:
    """One place of a recipe that an option can set: a leaf, or a choice of components."""

    path: str
    hint: Any
    value: Any  # plain form
    help: str
    kinds: tuple[type, ...] = ()  # the components that may stand here; none for a leaf
    many: bool = False  # whether it holds several components

    @property
    def type_text(self) -> str:
        """The type in words: 'int', 'Heun or DDIM', 'several of PGD or APGD'."""
        return type_text(self.hint)

    @property
    def default_text(self) -> str:
        """What one would type to get the value that stands here."""
        return " ".join(_typed(v) for v in self.value) if isinstance(self.value, list) else _typed(self.value)


def _typed(value: Any) -> str:
    """A plain value as one would type it."""
    if isinstance(value, dict):
        return value["class"]
    return (
        {None: "none", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def _spots(tree: Mapping[str, Any], cls: type, prefix: str = "") -> Iterator[Spot]:
    """The spots of a plain tree whose root is a `cls`, in the order of its fields."""
    for name, hint in hints(cls).items():
        spot = Spot(path=prefix + name, hint=hint, value=tree[name], help=field_help(cls).get(name, ""))
        kinds, many = components(hint)
        if not kinds or many or len(kinds) > 1:
            yield dataclasses.replace(spot, kinds=kinds, many=many)
        inside = enumerate(spot.value) if many else [("", spot.value)]
        for index, child in inside if kinds else ():
            yield from _below(child, kinds, f"{spot.path}.{index}." if many else f"{spot.path}.")


def _below(child: Mapping[str, Any] | None, kinds: Sequence[type], prefix: str) -> Iterator[Spot]:
    """The spots inside one component."""
    if child is not None:
        cls = next(kind for kind in kinds if name_of(kind) == child["class"])
        yield from _spots(child, cls, prefix)


def flat_fields(recipe: Any) -> list[tuple[str, str, str, str]]:
    """(path, type, default, help) in words for every field and every choice of components of the recipe."""
    return [(s.path, s.type_text, s.default_text, s.help) for s in _spots(plain(recipe), type(recipe))]
