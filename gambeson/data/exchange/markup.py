"""Text of any origin in YAML and in Markdown, such that it comes back exactly, or is shown and means nothing.

Without a YAML library: a machine that trains may lack one. What is written is a subset of YAML 1.1 and 1.2.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SHORT = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_BARE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_RESERVED = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKS = set("\\`*_[]#|~$!{}")
_TURNING = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
"""Characters that turn the direction of all text after them."""


def quoted(text: str) -> str:
    """A text as a double-quoted YAML scalar on one line, which every reader gives back exactly."""
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(letter: str) -> str:
    code = ord(letter)
    if letter in _SHORT:
        return _SHORT[letter]
    if 0x20 <= code < 0x7F or _printable(code):
        return letter
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def _printable(code: int) -> bool:
    """Whether YAML lets a character beyond ASCII stand as it is; line ends and a byte order mark are left out."""
    inside = 0xA0 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or code >= 0x10000
    return inside and code not in (0x2028, 0x2029, 0xFEFF)


def scalar(value: Any) -> str:
    """A number, a truth value, None or a text in YAML; UTF-8 text bare where nothing else could be meant."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    return text if _BARE.fullmatch(text) and text.lower() not in _RESERVED else quoted(text)


def _number(value: float) -> str:
    """With a point in it: YAML 1.1 takes 1e-05 for text."""
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    head, mark, tail = repr(value).partition("e")
    return f"{head if '.' in head else f'{head}.0'}{mark}{tail}"


def yaml(value: Mapping[str, Any], indent: int = 0) -> Iterator[str]:
    """The lines of a tree of mappings, lists and scalars, in the order that it has; None in a mapping is written."""
    space = " " * indent
    for name, inside in value.items():
        if isinstance(inside, Mapping) and inside:
            yield f"{space}{scalar(name)}:"
            yield from yaml(inside, indent + 2)
        elif isinstance(inside, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in inside):
            yield f"{space}{scalar(name)}:"
            yield from _items(inside, indent)
        else:
            yield f"{space}{scalar(name)}: {_flow(inside)}"


def _items(items: Sequence[Any], indent: int) -> Iterator[str]:
    """The items of a list, mappings among them, each after a dash."""
    space = " " * indent
    for item in items:
        if isinstance(item, Mapping) and item:
            first, *rest = yaml(item, indent + 2)
            yield f"{space}- {first[indent + 2 :]}"
            yield from rest
        else:
            yield f"{space}- {_flow(item)}"


def _flow(value: Any) -> str:
    """A scalar, or a list or mapping on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{quoted(str(name))}: {_flow(inside)}" for name, inside in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flow, value))}]"
    return scalar(value)


def front(value: Mapping[str, Any]) -> str:
    """The front matter that the hub reads: what is None or empty is left out."""
    known = {name: inside for name, inside in value.items() if inside is not None and inside not in ([], {}, ())}
    return "\n".join(["---", *yaml(known), "---"])


def shown(text: str) -> str:
    """A text on one line: what ends lines, turns their direction or cannot be printed is shown by its number."""
    return "".join(letter if _harmless(letter) else _escaped_for_eyes(letter) for letter in text)


def _harmless(letter: str) -> bool:
    return unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") and letter not in _TURNING


def _escaped_for_eyes(letter: str) -> str:
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(letter, f"\\u{ord(letter):04x}")


def words(text: str) -> str:
    """A text of any origin in a line of Markdown, or in a cell of a table: read as it is, never as markup."""
    escaped = (_ENTITIES.get(letter, f"\\{letter}" if letter in _MARKS else letter) for letter in shown(text))
    return re.sub(r"(?<=[A-Za-z0-9])\\_(?=[A-Za-z0-9])", "_", "".join(escaped))  # within a word it marks nothing


def code(text: str) -> str:
    """A text of any origin as code in a line of Markdown. Not in a table, whose cells end at any bar."""
    text = shown(text)
    if not text:
        return "(empty)"
    fence = "`" * (_longest(text) + 1)
    space = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}"


def block(text: str, language: str = "") -> str:
    """A text of several lines as a block of code, whatever backticks it has."""
    fence = "`" * max(_longest(text) + 1, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest(text: str) -> int:
    """The longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown of cells that are Markdown already."""
    lines = (f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
    return "\n".join(lines)
