"""What results carry from all that they were made from: licences, and which real images were seen on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Heir(Protocol):
    """An input of a stage that knows where it comes from."""

    @property
    def heritage(self) -> Mapping[str, Any]:
        """Plain values: `licence` (text), `additional_data` and `real` (names of sets of real images: those beside the
        training set, and the training sets themselves), and words about itself (`name`, numbers of images)."""
        ...


def inherited(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """`licence` and `additional_data` of what was made from these parts: every licence that one has, every set.

    licence: the distinct ones in alphabetical order, joined by "; ", None where no part states one. additional_data:
    sets of real images, other than the training set, that a part has seen; sorted.
    """
    stated = {one for part in parts for one in (part.get("licence") or "").split("; ") if one}
    sets = {name for part in parts for name in part.get("additional_data") or ()}
    return {"licence": "; ".join(sorted(stated)) or None, "additional_data": sorted(sets)}


def heritage_of(inputs: Sequence[Any]) -> dict[str, Any]:
    """What a stage's result inherits from the stage's inputs: `inherited`, the sets of real images (`real`), and names
    of ancestors of which nobody told what they were trained on (`unknown`)."""
    known = [_known(given) for given in inputs if given is not None]
    silent = [
        str(part.get("name") or part.get("stage") or type(given).__name__)
        for given, part in zip((given for given in inputs if given is not None), known, strict=True)
        if not (part.get("real") or part.get("unknown"))
    ]
    return united(*known, {"unknown": silent})


def carried(heritage: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of it in its header: licences and additional sets, each where there is one; else nothing."""
    return {name: heritage[name] for name in ("licence", "additional_data") if heritage.get(name)}


def seen(heritage: Mapping[str, Any]) -> dict[str, Any]:
    """What a store or an exported classifier says of the training sets behind it: `real_sets`, those that are known,
    and `unknown_sources`, ancestors of which nobody told; each where there is one."""
    names = {"real_sets": heritage.get("real"), "unknown_sources": heritage.get("unknown")}
    return {name: sorted(found) for name, found in names.items() if found}


def noted(heritage: Mapping[str, Any]) -> dict[str, Any]:
    """All that a file says of its ancestors: `carried` and `seen`."""
    return {**carried(heritage), **seen(heritage)}


def united(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One heritage of several: every licence, every set, every ancestor of which nothing is known."""
    real, unknown = (sorted({name for part in parts for name in part.get(key) or ()}) for key in ("real", "unknown"))
    return {**inherited(*parts), "real": real, "unknown": unknown}


def told(found: Mapping[str, Any]) -> dict[str, Any]:
    """`carried` and `seen` of a header that a stranger may have written: what is no text there is left out."""
    licence = found.get("licence")
    stated = {"licence": licence if isinstance(licence, str) else None}
    known = carried({**stated, "additional_data": _texts(found.get("additional_data"))})
    names = {"real": _texts(found.get("real_sets")), "unknown": _texts(found.get("unknown_sources"))}
    return {**known, **{name: texts for name, texts in names.items() if texts}}


def _texts(names: Any) -> list[str]:
    return sorted(name for name in names if isinstance(name, str)) if isinstance(names, list) else []


def sources(work: Callable[..., Any], inputs: Sequence[Any]) -> list[dict[str, Any] | None]:
    """What the inputs of a stage's function are, in their order: role, kind, and what each knows of itself."""
    return [
        None if given is None else {"role": role, "kind": type(given).__name__, **_known(given)}
        for role, given in zip(_roles(work, len(inputs)), inputs, strict=True)
    ]


def _known(given: Any) -> dict[str, Any]:
    return dict(given.heritage) if isinstance(given, Heir) else {}


def _roles(work: Callable[..., Any], count: int) -> Iterator[str]:
    """Names of the function's parameters after the workspace and the recipe's part."""
    named = [p for p in inspect.signature(work).parameters.values() if p.kind is not p.KEYWORD_ONLY][2:]
    for place in range(count):
        parameter = named[min(place, len(named) - 1)] if named else None
        yield "input" if parameter is None else parameter.name
