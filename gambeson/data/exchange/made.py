"""The part that model cards and data cards share: how a stage made a thing, of what, with what, and under which terms.

It is read off a stage's record (done.json) alone. A card that lies beside the record has no clock in it, so that equal
work gives equal bytes; one that leaves says when, and how long it took.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gambeson.data.catalogue import CATALOGUE
from gambeson.data.exchange.markup import block, code, table, words, yaml

HUB = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "mnist": "ylecun/mnist",
    "svhn": "ufldl-stanford/svhn",
}
"""Names on the hub of the sets that have one there."""
LICENCES = frozenset(
    (
        "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
        "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
        "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m", "ecl-2.0",
        "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1",
        "lgpl-3.0", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++",
        "osl-3.0", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
    )
)  # fmt: skip
"""Identifiers that the hub has for licences."""
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_KEY = re.compile(r"([?&][^=&\s]*(?:key|pass|secret|sig|token)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)


def licence_front(licence: str | None, several: bool = False) -> dict[str, Any]:
    """`license` as the hub takes it; for one that it has no identifier of: other, with the words (license_name).

    `several`: whether it takes a list, as it does for data. What is not known is left out.
    """
    stated = [one for one in (licence or "").split("; ") if one]
    known = [re.sub(r"[\s_]+", "-", one.strip().lower()) for one in stated]
    if not stated:
        return {}
    if set(known) <= LICENCES and (len(known) == 1 or several):
        return {"license": known[0] if len(known) == 1 else known}
    return {"license": "other", "license_name": "; ".join(stated)}


def command_line(command: str) -> str:
    """A command in a block of code, without log-ins and keys that stand in its addresses."""
    return block(_KEY.sub(r"\1***", _LOGIN.sub("***", command)), "sh")


def own_sets(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sets of real images that the stage itself was given."""
    return [each for each in record.get("sources") or () if each and each["kind"] == "ImageSet"]


def source(record: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """What the record knows of the input with this role."""
    return next((each for each in record.get("sources") or () if each and each["role"] == role), None)


def made_by(folder: Path, record: Mapping[str, Any], role: str) -> Path | None:
    """The folder of the stage that made the input with this role, where it lies beside this one's."""
    for each, digest in zip(record.get("sources") or (), record["inputs"], strict=False):
        if each and each["role"] == role and "stage" in each:
            there = folder.parent.parent / each["stage"] / digest[:16]
            return there if there.is_dir() else None
    return None


def additional(record: Mapping[str, Any]) -> list[str]:
    """Sets of real images besides the training set that the thing or any of its ancestors has seen, as far as known."""
    heritage, own = record.get("heritage") or {}, {each["name"] for each in own_sets(record)}
    beyond = set(heritage.get("real") or ()) - own if own else set()
    return sorted({*(heritage.get("additional_data") or ()), *beyond})


def sections(record: Mapping[str, Any]) -> Iterator[str]:
    """The sections about a stage's work, in Markdown; with the `command` that asked for it where the record has one."""
    yield "## Licences and the real images behind it"
    yield "\n".join(_terms(record))
    yield "## How it was made"
    yield _work(record)
    if "command" in record:
        yield f"The command:\n\n{command_line(record['command'])}"
    config = record["config"] if isinstance(record["config"], Mapping) else {"asked": record["config"]}
    settings = block("\n".join(yaml(_ordered(config))), "yaml")
    yield f"The settings, without those at their neutral value:\n\n{settings}"
    if any(record["inputs"]):
        yield "## What it was made from"
        yield _inputs(record)
    yield "## What computed it"
    yield "\n".join(_machine(record))


def _ordered(value: Any) -> Any:
    """Settings with each component's name first, in the order of the alphabet, as a record keeps them."""
    if isinstance(value, Mapping):
        return {name: _ordered(value[name]) for name in sorted(value, key=lambda name: (name != "class", name))}
    return [_ordered(item) for item in value] if isinstance(value, list | tuple) else value


def _terms(record: Mapping[str, Any]) -> Iterator[str]:
    """Licences of all ancestors, the sets that they have seen, and the terms of the training set."""
    heritage = record.get("heritage")
    if heritage is None:
        yield "Not recorded: it was made by a version of gambeson that kept no record of it."
        return
    stated = heritage.get("licence")
    yield f"- Licence: {words(stated)}" if stated else "- Licence: not known; nothing that it was made from states one"
    if stated:
        yield "  (every licence that anything in its line of ancestors states; what states none is not in it)"
    seen = additional(record)
    told = ", ".join(map(words, seen)) if seen else "none that is known"
    yield f"- Real images besides the training set that it or an ancestor has seen: {told}"
    if heritage.get("unknown"):
        yield f"- Nothing is known of the real images behind: {', '.join(map(words, heritage['unknown']))}"
    for name in sorted(set(heritage.get("real") or ()) - set(seen)):
        held = CATALOGUE.get(re.sub(r"(-extra|-coarse)?(-\d+)?$", "", name))
        terms = "not known here" if held is None else f"{words(held.licence)}; cite {words(held.citation)}"
        told = "" if held is None else " (as the catalogue has them for that name)"
        yield f"- Terms of the real set {words(name)}{told}: {terms}"


def _work(record: Mapping[str, Any]) -> str:
    seed = "" if record.get("seed") is None else f", seed {record['seed']}"
    return (
        f"By the stage {code(record['stage'])}, revision {record['revision']}{seed}, of gambeson "
        f"{record['versions']['gambeson']}. Settings, seed and inputs have the digest {code(record['digest'])}: the "
        "same ones on an equal machine give the same bytes."
    )


def _inputs(record: Mapping[str, Any]) -> str:
    """A row for each input."""
    known = record.get("sources") or [{"role": "input", "kind": ""} if digest else None for digest in record["inputs"]]
    rows = [
        [each["role"], _what(each), f"{digest}", words(each.get("licence") or "not known"), _seen(each)]
        for each, digest in zip(known, record["inputs"], strict=True)
        if each is not None
    ]
    return table(["role", "what", "digest", "licence", "real images that it has seen"], rows)


def _what(each: Mapping[str, Any]) -> str:
    """An input in words."""
    name = words(str(each.get("name") or each.get("stage") or each["kind"]))
    counted = [f"{each[part]:,} {part}" for part in ("images", "train", "validation", "classes") if part in each]
    kind = "stage " if "stage" in each else "set of real images " if each["kind"] == "ImageSet" else ""
    told = f" ({', '.join(counted)})" if counted else ""
    return f"{kind}{name}{told}"


def _seen(each: Mapping[str, Any]) -> str:
    names = sorted({*(each.get("real") or ()), *(each.get("additional_data") or ())})
    return ", ".join(map(words, names)) or "not known"


def _machine(record: Mapping[str, Any]) -> Iterator[str]:
    """Device, versions, and in a card that leaves its record, time."""
    run = record["execution"]
    together = f", {run['processes']} processes" if run.get("processes", 1) > 1 else ""
    portions = f", {run['micro_batch']} images at a time" if run.get("micro_batch") else ""
    plural = "s" * (run["threads"] != 1)
    compiled = ", compiled" if run.get("compiled") else ""
    device = f"{words(str(run['device']))} ({words(str(run['machine']))})"
    yield f"- Device: {device}, {run['dtype']}, {run['threads']} thread{plural}{together}{portions}{compiled}"
    yield f"- Versions: {', '.join(f'{name} {words(str(v))}' for name, v in sorted(record['versions'].items()))}"
    if "finished" in record:
        peak = record.get("peak_mb")
        memory = "" if peak is None else f", {peak:,.0f} MB of memory at most"
        yield f"- Time: {record['seconds']:,.1f} s{memory}; finished {words(str(record['finished']))}"
        if record.get("attempts", 1) > 1:
            same = "on the same machine and versions" if record.get("bit_identical") else "not all on equal machines"
            yield f"- It was stopped and went on: {record['attempts']} starts, {same}"
    else:
        yield "- Time and memory: in done.json beside this file, which also has the checksum of every file"
