"""Text of any origin on the terminal: what would move its cursor, name its window or turn its text becomes visible."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

_MOVING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but line end and tab, what turns the direction of text, and halves of characters, which no
terminal can show."""


def harmless(text: object) -> str:
    """The text with such characters written as Python writes them: ESC as \\x1b."""
    return _MOVING.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(*words: object, sep: str = " ", file: Any = None, flush: bool = False) -> None:
    """As `print`, harmless: for whatever has names, titles or words in it that a file or a folder brought along."""
    print(*map(harmless, words), sep=sep, file=file, flush=flush)


def console(width: int | None = None) -> Console:
    """rich's console, on which all text is harmless, whatever it stands in; its own colours and tables stay."""
    from rich.console import Console

    made, hook = Console(width=width), _Hook()
    made.push_render_hook(hook)  # type: ignore[arg-type]
    return made


class _Hook:
    """rich's RenderHook, without importing rich."""

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        return [_Harmless(each) for each in renderables]


class _Harmless:
    """What a console shows, its text harmless."""

    def __init__(self, inner: RenderableType) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))
