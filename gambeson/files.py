"""Recipe files: readable YAML with the help of every field beside it, read back exactly and checked with care.

The command line is checked by the same functions (`build`, `from_text`): what is wrong in a file is wrong there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_origin

from gambeson import __version__
from gambeson.canonical import alternatives, components, field_help, hints, item_hint, name_of, plain, type_text
from gambeson.errors import EnvironmentFault, UserError, nearest, unknown

T = TypeVar("T")
LONGEST, MOST_VALUES = 200_000, 50_000
"""Characters of a recipe file, and values in it with aliases written out, at most; the longest known has 15,000."""
MOST_SHOWN = 500
"""Characters of a value in an error."""


@cache
def _adapter(hint: Any) -> Any:
    """pydantic's checker of one leaf type."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))


def _numbers(value: Any, hint: Any) -> Any:
    """The value with text like '1e-3' (which YAML takes for text) and '8/255' made a float where one is expected."""
    if isinstance(value, list):
        return [_numbers(item, item_hint(hint, i)) for i, item in enumerate(value)]
    kinds = alternatives(hint)
    if isinstance(value, str) and float in kinds and str not in kinds:
        with suppress(ValueError, ZeroDivisionError, OverflowError):
            return _number(value)
    return value


def _number(text: str) -> float:
    """The number that '1e-3' or '8/255' says; ValueError for another text, or one beyond a float."""
    if "/" in text:
        return float(Fraction(text))
    number = float(text)  # Fraction("1e999999999") would count out all its digits
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def leaf(value: Any, hint: Any, path: str) -> Any:
    """The value of a leaf field from its plain form (number, text, list ...); UserError naming the path if it is none.

    Types are strict: text is no int, 8.5 is no int, true is no number; 8, '1e-3' and '8/255' are floats.
    """
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_json(json.dumps(_numbers(value, hint)), strict=True)
    except (ValidationError, TypeError, ValueError):
        raise UserError(f"{path}: expected {type_text(hint)}, got {_shown(value)}") from None


def _shown(value: Any) -> str:
    """A value from outside, as it stands in the file; a long one is cut."""
    try:
        text = f"the text {value!r}" if isinstance(value, str) else json.dumps(value, default=str)
    except (TypeError, ValueError):  # keys that JSON has not
        text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def construct(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    """cls(**values); what its own checks refuse comes out as a UserError with the same message after the path."""
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error) if str(error).startswith(path) else f"{path}: {error}") from error


def _join(path: str, name: object) -> str:
    """'generation', 'sampler' -> 'generation.sampler'."""
    return f"{path}.{name}" if path else str(name)


def _pick(kinds: Sequence[type], value: Any, path: str, classes: Mapping[str, type]) -> tuple[type, dict[Any, Any]]:
    """The chosen component and the plain values of its fields; a bare name (or null) means its defaults."""
    named = {name_of(kind): kind for kind in kinds}
    given = {"class": value or "none"} if value is None or isinstance(value, str) else value
    if not isinstance(given, dict):
        raise UserError(f"{path or 'recipe'}: expected fields of {' or '.join(named)}, got {_shown(given)}")
    word = given.get("class", next(iter(named)) if len(named) == 1 else None)
    if word is None:
        raise UserError(
            f"{path}: expected `class:` with one of {', '.join(named)}, got only "
            f"{', '.join(map(str, given))[:MOST_SHOWN] or '{}'}"
        )
    if str(word) not in named:
        error = unknown("component", str(word)[:100], named)
        elsewhere = " (which exists, but does not fit here)" if str(word) in classes else ""
        raise UserError(f"{path or 'recipe'}: {error}{elsewhere}")
    return named[str(word)], {k: v for k, v in given.items() if k != "class"}


def _component(kinds: Sequence[type], value: Any, path: str, classes: Mapping[str, type]) -> Any:
    """One component from its plain form."""
    cls, given = _pick(kinds, value, path, classes)
    types = {} if cls is NoneType else hints(cls)
    for name in given:
        if name not in types:
            likely = nearest(str(name)[:100], types)[:3]
            raise UserError(
                f"{_join(path, str(name)[:100])}: {name_of(cls)} has no such field; "
                + (f"nearest: {', '.join(likely)}" if likely else "it has none")
            )
    values = {name: _field(given[name], types[name], _join(path, name), classes) for name in types if name in given}
    return None if cls is NoneType else construct(cls, values, path)


def _field(value: Any, hint: Any, path: str, classes: Mapping[str, type]) -> Any:
    """The value of one field from its plain form."""
    kinds, many = components(hint)
    if not kinds:
        return leaf(value, hint, path)
    if not many:
        return _component(kinds, value, path, classes)
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of {type_text(hint)}, got {_shown(value)}")
    return tuple(_component(kinds, item, f"{path}.{i}", classes) for i, item in enumerate(value))


def build(tree: Any, root: type[T], classes: Mapping[str, type] | None = None) -> T:
    """The recipe from its plain form (see canonical.plain); absent fields take their defaults.

    Raises UserError naming the path for an unknown field or class, a wrong type, or a value its class refuses.
    """
    if not isinstance(tree, dict):
        raise UserError(f"expected the fields of a {root.__name__} (name: value), got {_shown(tree)}")
    return _component([root], tree, "", classes or {})


def _scalar(value: Any) -> str:
    """A leaf in YAML on one line; text with characters that would not survive one (line ends of any kind) escaped."""
    import yaml

    def dumped(**style: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**9, **style)
        return text.removesuffix("\n").removesuffix("\n...")

    plainly = dumped(allow_unicode=True)
    return plainly if plainly.isprintable() else dumped(default_style='"')


def _note(hint: Any, help: str) -> str:
    """The comment after a field: its help and, for a component, what else could stand here."""
    kinds, _ = components(hint)
    choice = f"[{' | '.join(map(name_of, kinds))}]" if len(kinds) > 1 else ""
    return "  # " + " ".join(filter(None, (help, choice))) if help or choice else ""


def _block(value: Any, hint: Any, indent: str, note: str) -> Iterator[str]:
    """What follows 'name:' in the file, first the rest of that line."""
    kinds, many = components(hint)
    if not kinds or value is None or value == ():
        yield f" {_scalar(plain(value))}{note}"
    elif many:
        yield note
        for item in value:
            yield from (f"{indent}{'  ' if i else '- '}{line}" for i, line in enumerate(_lines(item, True)))
    else:
        yield note
        yield from (f"{indent}{line}" for line in _lines(value, len(kinds) > 1))


def _lines(obj: Any, named: bool) -> Iterator[str]:
    """The lines of one dataclass, without indentation."""
    if named:
        yield f"class: {type(obj).__name__}"
    helps = field_help(type(obj))
    for name, hint in hints(type(obj)).items():
        first, *rest = _block(getattr(obj, name), hint, "  ", _note(hint, helps.get(name, "")))
        yield f"{name}:{first}"
        yield from rest


def dump(recipe: Any, again: str = "gambeson run PATH") -> str:
    """The recipe as commented YAML; `again` is the command, named in the header, that runs it."""
    plain(recipe)  # refuses nan, inf and foreign objects, with their path
    header = f"# A gambeson recipe, written by gambeson {__version__}.\n# Run it again: {again}\n\n"
    return header + "\n".join(_lines(recipe, False)) + "\n"


def save(recipe: Any, path: str | os.PathLike[str]) -> None:
    """Write the recipe to `path` as readable YAML, whole or not at all.

    Raises EnvironmentFault if the place cannot be written.
    """
    from gambeson.disk import atomic

    with atomic(Path(path)) as draft:
        draft.write_text(dump(recipe, f"gambeson run {path}"), encoding="utf-8")


def parse_yaml(text: str, source: str = "recipe") -> Any:
    """Plain values from YAML text; UserError, naming source and line, if it is no YAML or names a field twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's safe loader, but a key given twice is an error instead of the last one winning."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.MarkedYAMLError(problem=f"{key.value!r} twice", problem_mark=key.start_mark)
                    seen.add(key.value)
                    if key.value == "<<" and isinstance(value, yaml.SequenceNode):  # of these a bomb can be made
                        raise yaml.MarkedYAMLError(problem="several mappings merged", problem_mark=key.start_mark)
            return super().construct_mapping(node, deep)

    if len(text) > LONGEST:
        raise UserError(f"{source}: expected at most {LONGEST:,} characters of YAML, got {len(text):,}")
    try:
        tree = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: expected YAML (name: value), got {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: expected YAML (name: value), got {error}") from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"  # yaml's own constructors, of dates and numbers that are none
        raise UserError(f"{source}: expected YAML (name: value), got what is none ({what[:MOST_SHOWN]})") from None
    _check_size(tree, source)
    return tree


def _check_size(tree: Any, source: str) -> None:
    """UserError for a tree that aliases make larger than a file can be, or endless, and for numbers beyond use."""
    left, count = [tree], 0
    while left:
        value = left.pop()
        if isinstance(value, dict | list | tuple | set):
            left += value
            left += value.values() if isinstance(value, dict) else ()
        if isinstance(value, int) and value.bit_length() > 1024:
            raise UserError(f"{source}: expected numbers of a computer's size, got one of {value.bit_length()} bits")
        if (count := count + 1) > MOST_VALUES:
            raise UserError(
                f"{source}: expected at most {MOST_VALUES:,} values, got more, or some that hold themselves"
            )


def load(path: str | os.PathLike[str], root: type[T], classes: Mapping[str, type] | None = None) -> T:
    """Read a recipe of type `root` from a file that `save` or a person wrote; exact inverse of `save`.

    `classes` (name -> dataclass) lets an error tell an unknown class from one that does not fit. Absent fields take
    their defaults. Raises UserError (names the field's path) for what the file says, EnvironmentFault if it cannot
    be read.
    """
    from gambeson.disk import read_bounded

    path = Path(path)
    try:
        text = read_bounded(path, 4 * LONGEST).decode()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"recipe file {path}: expected a YAML file saved by gambeson, got: {error}") from None
    except OSError as error:
        raise EnvironmentFault(f"recipe file {path}: expected a readable file, got: {error}") from error
    tree = parse_yaml(text, f"recipe file {path}")
    try:
        return build(tree, root, classes)
    except UserError as error:
        raise UserError(f"recipe file {path}: {error}") from None


def from_text(words: Sequence[str], hint: Any, path: str) -> Any:
    """The plain value of a leaf from words of a command line: none, then the text itself, then its YAML meaning.

    Raises UserError (named by `path`) if none of these fits the type.
    """
    several = any(get_origin(kind) is tuple for kind in alternatives(hint))
    if len(words) != 1 and not several:
        raise UserError(f"{path}: expected one {type_text(hint)}, got {' '.join(words) or 'nothing'}")
    for value in _readings(list(words), hint, several):
        with suppress(UserError):
            leaf(value, hint, path)
            return value
    raise UserError(f"{path}: expected {type_text(hint)}, got {' '.join(words)!r}")


def _readings(words: list[str], hint: Any, several: bool) -> Iterator[Any]:
    """What the words may mean for a type, the likeliest first."""
    if NoneType in alternatives(hint) and [w.lower() for w in words] in (["none"], ["null"]):
        yield None
    yield words if several else words[0]
    with suppress(UserError):
        meant = [parse_yaml(word) for word in words]
        yield meant if several else meant[0]
        yield from meant[:1]
