"""The two ways a command can fail that are not our bug, and how unknown words are answered.

Every message is one paragraph: what was expected, what came, and what usually fixes it (HOUSE rule 9).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher


class UserError(ValueError):
    """The caller's mistake: an unknown name, a wrong type, a value out of range. The command line exits with `code`."""

    code = 2


class EnvironmentFault(OSError):
    """The machine's fault: no permission, a full disk, a damaged file. The command line exits with `code`."""

    code = 3


def require(holds: bool, name: str, expected: str, value: object) -> None:
    """UserError naming the field, what it should have been and what came."""
    if not holds:
        raise UserError(f"{name}: expected {expected}, got {value!r}")


@contextmanager
def reading(place: object) -> Iterator[None]:
    """Inside, what a folder makes readers stumble over that another version, damage or a stranger has written into its
    records (a name that is missing, a text for a number) becomes EnvironmentFault, naming it.

    For commands that only look at what is there; GAMBESON_DEBUG shows where it was. What the machine or our own code
    does (out of memory, a bug's RuntimeError) is nobody's record and passes.
    """
    try:
        yield
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
            raise
        told = (str(error).splitlines() or [""])[0][:200]
        raise EnvironmentFault(
            f"{place}: expected what gambeson wrote there, got records that cannot be read ({type(error).__name__}: "
            f"{told}); they are damaged, of another version, or a stranger's. Copy the folder anew, or leave it out"
        ) from error


def _likeness(word: str, known: str) -> float:
    """1 for equal words, 0 for unrelated ones; a dotted path is also compared by its last name."""
    pairs = ((word, known), (word.rpartition(".")[2], known.rpartition(".")[2]))
    whole, last = (SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs)
    return whole + last


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """All the known words, the one most like `word` first (equally like ones in the order given)."""
    return sorted(known, key=lambda k: -_likeness(word, k))


def unknown(kind: str, word: str, known: Iterable[str]) -> UserError:
    """The error for a word that names nothing: 'unknown recipe: expected one of ..., nearest first; got ...'."""
    options = ", ".join(nearest(word, known)) or "nothing (none are known)"
    return UserError(f"unknown {kind}: expected one of {options} (nearest first); got {word!r}")
