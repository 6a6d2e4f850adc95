"""Pieces of a run's material as they come together: kept ones that are still true, new ones, and reasons of others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from gambeson.report.keeping import Piece

NOT_MADE = "not made yet: `gambeson report` of the run makes it"


@dataclass
class Desk:
    """old: the pieces that the run folder keeps. make: whether pieces that are not kept are made now."""

    old: Mapping[str, Piece]
    make: bool
    pieces: dict[str, Piece] = field(default_factory=dict)
    lacking: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # part -> why -> of what

    def kept(self, name: str, known: Mapping[str, str], using: Collection[str] = ()) -> Piece | None:
        """The kept piece where nothing that is known contradicts what it was made from, and it was made from all that
        it would be made from now."""
        old = self.old.get(name)
        if old is None or not set(using) <= set(old.made_of):
            return None
        return old if all(known.get(key, digest) == digest for key, digest in old.made_of.items()) else None

    def piece(
        self,
        name: str,
        part: str,
        known: Mapping[str, str],
        using: Collection[str],
        work: Callable[[], Any],
        why: str,
        who: str = "",
    ) -> Any:
        """A piece, kept or made now; None where it cannot be, with the reason under its part.

        known: digests of all that belongs to it, whether it can be read or not. using: names of those that it would be
        made from now; none where it cannot be made, and `why` says so. who: of what it is a piece, in words.
        """
        old = self.kept(name, known, using)
        if old is not None:
            self.pieces[name] = old
            return old.value
        if not using or not self.make:
            self.lack(part, NOT_MADE if using else why, who)
            return None
        try:
            value = work()
        except (OSError, ValueError) as error:
            self.lack(part, str(error), who)
            return None
        self.add(name, {key: known[key] for key in using}, value)
        return value

    def add(self, name: str, made_of: Mapping[str, str], value: Any) -> None:
        """A new piece."""
        self.pieces[name] = Piece(made_of=made_of, value=value)

    def lack(self, part: str, why: str, who: str = "") -> None:
        """Notes why a part, or some of it, is not here."""
        same = self.lacking.setdefault(part, {}).setdefault(why, [])
        if who and who not in same:
            same.append(who)

    @property
    def missing(self) -> dict[str, str]:
        """Part -> why it, or some of it, is not here: 'real only, + plain diffusion: not evaluated yet'."""
        return {
            part: "; ".join(f"{', '.join(who)}: {why}" if who else why for why, who in reasons.items())
            for part, reasons in self.lacking.items()
        }
