"""`gambeson data`: image sets by name. What there is, download it, check it, look at it.

`get` is the only command that uses the network: checked, resumed after a stop, into the folder where the doors look.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gambeson.data import fetch
from gambeson.data.catalogue import CATALOGUE, Catalogued, Published, catalogued, digest_of, published, refusal
from gambeson.data.catalogue import check as check_file
from gambeson.data.datasets import DOORS, Data, Digits, door
from gambeson.data.imageset import ImageSet, Split, data_root
from gambeson.errors import EnvironmentFault, UserError, require, unknown
from gambeson.options import take, take_flag
from gambeson.screen import PATIENCE, WithBars
from gambeson.terminal import console, say
from gambeson.types import Images

USAGE = f"""usage: gambeson data list [NAME...]
       gambeson data get NAME... [--all]
       gambeson data check NAME...
       gambeson data show NAME|FOLDER|FILE [--data.FIELD VALUE ...]

list    the image sets that can be downloaded: size, licence, whether they are here; with names every file, its
        checksum, where that was published, and on what terms the set may be used
get     download them from their own sites or mirrors, with progress. Stop it at any time: the same command goes on,
        and what is here already is only checked. hf:org/name: Parquet files of the Hugging Face hub, into its cache
check   compute the checksums of what is here and compare them with the published ones
show    load an image set as `gambeson train --data` would: images of each class in every part, size, names, and
        what looks wrong. `gambeson data show NAME --help` lists its fields

NAME: {", ".join(CATALOGUE)}

options:
  --data-root DIR  where image sets lie, each in a folder of its name (default ./data or $GAMBESON_DATA)
  --all            get: what is not needed as well, such as the further images of svhn or CIFAR's binary archives

Nothing else than `gambeson data get` touches the network."""
SHOWN = 5
"""Examples of each problem that are listed."""
CLASSES = 50
"""Classes that have a line of their own."""
COUNTS = {"train": "train", "validation": "valid.", "test": "test"}
"""Parts of an image set and the heads of their columns."""


@dataclass(frozen=True, kw_only=True)
class Showing:
    """An image set to look at."""

    data: Data = Digits()  # the image set


def data(argv: list[str]) -> None:
    """gambeson data list|get|check|show ..."""
    words = list(argv)
    action = words.pop(0) if words else "--help"
    asks = action in ("--help", "-h", "help") or (action != "show" and bool({"--help", "-h"} & set(words)))
    if asks or (action == "show" and words in (["--help"], ["-h"])):
        print(USAGE)
        return
    if action not in ACTIONS:
        raise unknown("action of gambeson data", action, ACTIONS)
    root = take(words, "--data-root")
    if root is not None:
        os.environ["GAMBESON_DATA"] = root
    ACTIONS[action](words)


def _names(words: list[str], action: str) -> list[str]:
    """The words, which must be names. Raises UserError for options that are not known."""
    for word in words:
        require(not word.startswith("-"), f"gambeson data {action}", "names, --data-root and (for get) --all", word)
    return words


def _held(name: str) -> Catalogued:
    """A data set of the catalogue. Raises UserError for another name."""
    by_hand = name in DOORS and name not in CATALOGUE
    expected = f"one to download ({', '.join(CATALOGUE)}); digits comes with scikit-learn, others from their owners"
    require(not by_hand, "data set", expected, name)
    return catalogued(name)


def _here(file: Published, root: Path) -> Path | None:
    """Where a file lies: in the folder of its set, or in the data root itself if its name belongs to one set only."""
    places = [file.path(root), root / file.name]
    alone = len(published(root / file.name)) == 1
    return next((place for place in places[: 1 + alone] if place.is_file()), None)


def _bytes(count: int | None) -> str:
    """'29 kB', '170 MB', '1.3 GB'."""
    if count is None:
        return "?"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"


def list_sets(words: list[str]) -> None:
    """gambeson data list [NAME...]"""
    root = data_root()
    for name in _names(words, "list"):
        print("\n".join(_details(name, _held(name), root)))
    if words:
        return
    print(f"{'name':14}{'size':>8}  {'here':16}licence")
    for name, held in CATALOGUE.items():
        usual = [file for file in held.files if file.usual]
        size = sum(file.size or 0 for file in usual)
        print(f"{name:14}{_bytes(size):>8}  {_presence(usual, root):16}{held.licence}{_unchecked(usual)}")
    print(f"\ndata root: {root.resolve()}\n`gambeson data list NAME` says more, `gambeson data get NAME` downloads")


def _presence(files: Sequence[Published], root: Path) -> str:
    """How much of a set is here."""
    there = sum(_here(file, root) is not None for file in files)
    if there == len(files):
        return "yes"
    begun = sum(_begun(file, root) for file in files)
    part = f", {_bytes(begun)} more" if begun else ""
    return f"{there} of {len(files)} files{part}" if there or begun else "no"


def _begun(file: Published, root: Path) -> int:
    """Bytes of a download that was stopped."""
    part = file.path(root).with_name(f"{file.name}.part")
    return part.stat().st_size if part.is_file() else 0


def _unchecked(files: Sequence[Published]) -> str:
    """Says which files cannot be checked."""
    without = [file.name for file in files if file.checksum is None]
    return f" (no checksum is published of {', '.join(without)})" if without else ""


def _details(name: str, held: Catalogued, root: Path) -> Iterator[str]:
    """All that is known of a data set."""
    yield f"{name}: {held.about}"
    about = {"homepage": held.homepage, "licence": held.licence, "cite": held.citation, "note": held.terms}
    yield from (f"  {label:9} {text}" for label, text in about.items())
    for file in held.files:
        place, begun = _here(file, root), _begun(file, root)
        state = f"here: {place}" if place else f"{_bytes(begun)} here" if begun else "not here"
        only = "" if file.usual else ", with --all"
        yield f"  {file.name}: {_bytes(file.size)}{only}; {state}"
        yield f"    {file.checksum or 'no checksum is published'} (source: {file.source})"
        yield from (f"    {url}" for url in file.urls)


class Transfers(WithBars):
    """A context manager that shows downloads: on a terminal bars, elsewhere a line every now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
        left = TimeRemainingColumn(compact=True)
        self.bars = Progress(*columns, TextColumn("left"), left, console=console, disable=not console.is_terminal)

    def of(self, name: str) -> fetch.Progress:
        """What a download of this name tells how far it is."""
        return Transfer(self, name).show


class Transfer:
    """One download on the screen."""

    def __init__(self, screen: Transfers, name: str) -> None:
        self.screen, self.name = screen, name
        self.task = screen.bars.add_task(name, total=None, start=False)
        self.first: int | None = None
        self.since = self.told = time.monotonic()

    def show(self, done: int, total: int | None) -> None:
        """Moves the bar; the speed counts from what was here at the start."""
        bars = self.screen.bars
        if self.first is None:
            self.first = done
            bars.reset(self.task, total=total, completed=done, start=True)
        bars.update(self.task, completed=done, total=total)
        now = time.monotonic()
        if self.screen.console.is_terminal or now - self.told < PATIENCE:
            return
        self.told, speed = now, max(done - self.first, 0) / max(now - self.since, 1e-9)
        left = f", {(total - done) / speed:.0f} s left" if total and speed else ""
        line = f"{self.name}: {_bytes(done)} of {_bytes(total)}, {_bytes(round(speed))}/s{left}"
        self.screen.console.print(line, markup=False, highlight=False, soft_wrap=True)


def get(words: list[str]) -> None:
    """gambeson data get NAME... [--all]"""
    everything = take_flag(words, "--all")
    names, root = _names(words, "get"), data_root()
    require(bool(names), "gambeson data get", f"a name: {', '.join(CATALOGUE)} or hf:org/name", "nothing")
    wanted = {name: None if name.startswith("hf:") else _held(name) for name in names}
    for name, held in wanted.items():
        if held is None:
            say(f"{name}: {fetch.fetch_hub(name)}; load it with --data {name}")
            continue
        print(f"{name}: licence: {held.licence}; cite {held.citation}")
        with Transfers(console()) as screen:
            places = [(file, _get_one(file, root, screen)) for file in held.files if file.usual or everything]
        for file, place in places:
            say(f"{place} ({_vouched(file, place)})")


def _get_one(file: Published, root: Path, screen: Transfers) -> Path:
    """A file as it is here, checked, or downloaded."""
    place = _here(file, root)
    if place is not None and place != file.path(root):
        check_file(place, [file])
        return place
    return fetch.fetch(file, root, screen.of(file.name))


def _vouched(file: Published, place: Path) -> str:
    """Whether a file that is here can be said to be the published one."""
    if file.checksum is not None:
        return f"{file.checksum.partition(':')[0]} as published"
    return f"no checksum is published, so it was not checked; it has {digest_of(place, 'sha256')}"


def check(words: list[str]) -> None:
    """gambeson data check NAME..."""
    names, root = _names(words, "check"), data_root()
    require(bool(names), "gambeson data check", f"a name: {', '.join(CATALOGUE)}", "nothing")
    wrong = []
    for name in names:
        here = [(file, place) for file in _held(name).files if (place := _here(file, root)) is not None]
        if not here:
            raise UserError(
                f"{name}: expected published files in {(root / name).resolve()}, found none; `gambeson data get "
                f"{name}` downloads them"
            )
        for file, place in here:
            right = file.checksum is None or digest_of(place, file.checksum.partition(":")[0]) == file.checksum
            say(f"{place}: {_vouched(file, place) if right else 'DIFFERS'}")
            wrong += [] if right else [refusal(place, file, place.stat().st_size)]
    if wrong:
        raise EnvironmentFault("; ".join(wrong))


def show(words: list[str]) -> None:
    """gambeson data show NAME|FOLDER|FILE [--data.FIELD VALUE ...]"""
    first = words.pop(0) if words and not words[0].startswith("-") else None
    require(first is not None, "gambeson data show", "an image set first: a name, a folder or a file", " ".join(words))
    assert first is not None
    showing = Showing(data=door(first))
    if words:
        from gambeson import overrides

        showing = overrides.parse(showing, words, prog=f"gambeson data show {first}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        real = showing.data.load()
    left_out = [str(warning.message) for warning in said if issubclass(warning.category, UserWarning)]
    say("\n".join([*table(real), *_listed([*left_out, *problems(real)])]))


def _listed(found: list[str]) -> list[str]:
    """The problems as lines."""
    return ["looks wrong:", *(f"  {line}" for line in found)] if found else ["nothing looks wrong"]


def _parts(real: ImageSet) -> dict[str, Split]:
    return {part: getattr(real, part) for part in COUNTS}


def table(real: ImageSet) -> list[str]:
    """Size, classes and how many images of each are in every part."""
    channels, height, width = real.shape
    names = real.class_names
    counts = {part: torch.bincount(split.labels, minlength=len(names)).tolist() for part, split in _parts(real).items()}
    colour = {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")
    flips = "mirrored images keep their class" if real.flip_safe else "never mirrored"
    total = sum(map(len, _parts(real).values()))
    head = f"{real.name}: {total:,} images of {height} x {width} pixels, {colour}, {len(names)} classes, {flips}"
    columns = "".join(f"{column:>9}" for column in COUNTS.values())
    rows = [_row(name, [counts[part][k] for part in COUNTS]) for k, name in enumerate(names)]
    more = [f"... and {len(rows) - CLASSES} more classes"] if len(rows) > CLASSES else []
    every = _row("all", [sum(counts[part]) for part in COUNTS])
    return [head, f"{'class':32}{columns}", *rows[:CLASSES], *more, every, f"digest: {real.digest}"]


def _row(name: str, counts: list[int]) -> str:
    return f"{name[:31]:32}" + "".join(f"{count:>9,}" for count in counts)


def problems(real: ImageSet) -> list[str]:
    """What a person should look at before training on these images, the first examples of each kind."""
    prints = {part: list(_prints(split.images)) for part, split in _parts(real).items()}
    return [*_uneven(real), *_plain(real), *_twice(prints), *_disagreeing(prints["train"], real)]


def _prints(images: Images) -> Iterator[bytes]:
    """A digest of the pixels of every image, in 8 bits: equal for equal images."""
    for some in images.split(1024):
        pixels = (some * 255).round().to(torch.uint8).numpy()
        yield from (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels)


def _some(examples: Sequence[object]) -> str:
    """The first examples."""
    more = f" and {len(examples) - SHOWN:,} more" if len(examples) > SHOWN else ""
    return ", ".join(map(str, examples[:SHOWN])) + more


def _uneven(real: ImageSet) -> Iterator[str]:
    """Classes that a part lacks, and classes that are rare."""
    names = real.class_names
    for part, split in _parts(real).items():
        counts = torch.bincount(split.labels, minlength=len(names))
        missing = [names[k] for k in torch.nonzero(counts == 0).flatten().tolist()]
        if missing:
            yield f"{part}: no image of {_some(missing)}"
        elif part == "train" and counts.max() > 10 * counts.min():
            least, most = int(counts.argmin()), int(counts.argmax())
            yield f"train: {counts[most]:,} images of {names[most]}, {counts[least]:,} of {names[least]}"


def _plain(real: ImageSet) -> Iterator[str]:
    """Images in which all pixels are the same."""
    for part, split in _parts(real).items():
        flat = split.images.flatten(1)
        places = torch.nonzero(flat.amax(1) == flat.amin(1)).flatten().tolist()
        if places:
            yield f"{part}: images of one brightness: {len(places):,} (number {_some(places)})"


def _twice(prints: dict[str, list[bytes]]) -> Iterator[str]:
    """Images that are in two parts, or more than once in one."""
    first = {part: {image: i for i, image in reversed(list(enumerate(images)))} for part, images in prints.items()}
    for other, part in (("train", "validation"), ("train", "test"), ("validation", "test")):
        pairs = [f"{i} = {first[other][image]}" for i, image in enumerate(prints[part]) if image in first[other]]
        if pairs:
            yield f"{part}: images that are in {other} too: {len(pairs):,} ({_some(pairs)})"
    for part, images in prints.items():
        if extra := len(images) - len(first[part]):
            yield f"{part}: images that are there already: {extra:,}"


def _disagreeing(images: list[bytes], real: ImageSet) -> Iterator[str]:
    """Equal train images with different labels."""
    labels: dict[bytes, Counter[int]] = {}
    for image, label in zip(images, real.train.labels.tolist(), strict=True):
        labels.setdefault(image, Counter())[label] += 1
    found = [" and ".join(real.class_names[k] for k in sorted(seen)) for seen in labels.values() if len(seen) > 1]
    if found:
        yield f"train: images labelled in two ways: {len(found):,} ({_some(found)})"


ACTIONS = {"list": list_sets, "get": get, "check": check, "show": show}
"""Words after `gambeson data`."""
