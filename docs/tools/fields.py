"""griffe extension: the trailing comment of a dataclass field, which is its help in recipes, stands in the API, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from griffe import Attribute, Class, Docstring, Extension


class Fields(Extension):
    """Lists the fields that say what they are below the docstring of their class."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Adds the list to a class whose fields have trailing comments."""
        told = [_told(m) for m in cls.members.values() if isinstance(m, Attribute) and not m.name.startswith("_")]
        lines = [line for line in told if line]
        if lines and cls.docstring is not None:
            cls.docstring = Docstring(
                cls.docstring.value + "\n\n" + "\n".join(lines), lineno=cls.docstring.lineno, parent=cls
            )


def _told(field: Attribute) -> str:
    """`name`: its comment; nothing where it has none."""
    if field.lineno is None or field.endlineno is None or not isinstance(field.filepath, Path):
        return ""
    lines = field.lines_collection[field.filepath][field.lineno - 1 : field.endlineno]
    comment = " ".join(line.partition("  # ")[2].strip() for line in lines if "  # " in line)
    text = comment.replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[").replace("_", "\\_")
    return f"- `{field.name}`: {text}" if comment and "type: ignore" not in comment else ""
