"""`gambeson store`: looks at stores of synthetic images, joins and divides them, and brings them in and out.

STORE is everywhere a store's folder, the folder of a stage that made one, or a selection; nothing is changed in place.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gambeson.data.exchange import inspect, stores
from gambeson.data.exchange.export import FORMATS, export
from gambeson.data.exchange.outgoing import Outgoing, class_names, draft, numbered, store_of
from gambeson.data.exchange.store_card import source_card, write_card
from gambeson.data.peers import FilesSource, PeerImages, open_ours, open_peer, origin, write_store
from gambeson.data.scores import Scores
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.errors import EnvironmentFault, UserError, require, unknown
from gambeson.options import take, take_flag, take_number
from gambeson.terminal import console, say
from gambeson.types import Progress

Source = SyntheticStore | Chosen
LOOKED_AT, MOST_ROWS = 50_000, 50

USAGE = f"""usage: gambeson store COMMAND STORE [OPTIONS]

Looks at a set of synthetic images, joins and divides such sets, and brings them in and out of the formats of others.
STORE: the folder of a store, of a stage that made one (runs/stages/generate/...), or of a selection (chosen.parquet).

  verify STORE                 compare every file with its checksum; names the first that is damaged
  stats STORE                  images, classes, size, mean and spread of the channels, licence, provenance
      --images N               read so many for mean and spread, evenly spread (default {LOOKED_AT:,})
  show STORE                   draw the first images of each class as one picture
      --per-row N              images of a class (default 10); --out FILE: the picture (default store.png)
  merge STORE STORE ... --out DIR
      --classes N              how many classes there are, where some have no images in one of the stores
  split STORE --parts 0.9,0.1 --out DIR
                               DIR/part-0, DIR/part-1, ..., each with its share of every class
  sample STORE --images N --out DIR
      --per-class              N of every class
      --seed S                 of what is drawn, also for split (default 0)
      --copy                   write stores, also for split, instead of selections that point to STORE
  import PATH --out DIR        a store of a set that others published: .npz of EDM-AT (image, label) or CDP (arr_0,
                               arr_1), PORT's .bin with labels in an .npy beside, WebDataset's .tar, Hugging Face's
                               .parquet, or a folder of .tar, of .parquet, of class folders with pictures
      --shape H,W,C            what an image in a .bin is, where it is not square with three channels
      --licence L              its licence; --additional-data A,B: real images that its models have seen
  export STORE --format F --out PATH
      --format F               {", ".join(FORMATS)}
      --per-file N             images in a shard (webdataset, parquet)
      --images-as K            png (default) or npy (webdataset)

Existing files are never overwritten, but for the picture that show draws without --out. What takes long and is
stopped goes on with the same command.
Exit codes: 0 done, 2 a mistake in what was asked, 3 the machine could not (disk, permission, damaged file)."""


def store(argv: list[str]) -> None:
    """gambeson store COMMAND STORE [OPTIONS]. UserError and EnvironmentFault say what is wrong."""
    if not argv or {"--help", "-h"} & set(argv):
        print(USAGE)
        return
    command, *words = argv
    if command not in COMMANDS:
        raise unknown("command of gambeson store", command, COMMANDS)
    COMMANDS[command](words)


def _verify(words: list[str]) -> None:
    """gambeson store verify STORE"""
    path = _only(words, "verify")
    source = open_ours(path)
    own = store_of(source)
    if isinstance(source, Chosen):
        _check_selection(source)
    with _progress("verify") as report:
        own.verify(report)
    _check_scores(own)
    say(f"whole: {len(own.rows)} shards with {len(own):,} images, {own.root.resolve()}")


def _check_scores(own: SyntheticStore) -> None:
    """EnvironmentFault for damaged scores beside the images; unfinished ones are said to be."""
    for digest in _scores(own):
        try:
            scores = Scores.open(own, digest, "report")
        except UserError as error:
            say(f"note: {error}")
            continue
        for shard in range(len(own.rows)):
            scores.shard(shard)


def _scores(own: SyntheticStore) -> list[str]:
    """The digests of those that have scored a store's images."""
    return sorted(path.parent.name for path in (own.root / "scores").glob("*/meta.json"))


def _check_selection(chosen: Chosen) -> None:
    low, high = int(chosen.positions.min()), int(chosen.positions.max())
    if low < 0 or high >= len(chosen.store):
        raise EnvironmentFault(
            f"{chosen.store.root}: expected selected positions 0 to {len(chosen.store) - 1}, got {low} to {high}: "
            "made from another store; make it again"
        )


def _stats(words: list[str]) -> None:
    """gambeson store stats STORE [--images N]"""
    images = take_number(words, "--images") or LOOKED_AT
    source = open_ours(_only(words, "stats"))
    with _progress("stats") as report:
        found = inspect.statistics(source, images, report)
    say(_described(source, found))


def _described(source: Source, found: inspect.Statistics) -> str:
    """The statistics as lines."""
    own = store_of(source)
    height, width, channels = source.shape
    part = "" if isinstance(source, SyntheticStore) else f" selected of {len(own):,}"
    seen = "all of them" if found.looked_at == found.images else f"{found.looked_at:,} of them, evenly spread"
    lines = {
        "images": f"{found.images:,}{part}, {height} x {width}, {'RGB' if channels == 3 else 'grey'}",
        "classes": ", ".join(f"{name}: {count:,}" for name, count in found.per_class) or "none",
        "without class": f"{found.without_class:,}",
        "shards": f"{found.shards:,}",
        "on disk": f"{found.bytes_on_disk:,} bytes, {found.bytes_on_disk / len(own):,.1f} an image",
        "mean": f"{_numbers(found.mean)} (of {seen})",
        "std": f"{_numbers(found.std)} (pixels in [0, 1], by channel)",
        "licence": own.provenance.get("licence") or "not known",
        "other real images": _seen(own.provenance),
        "scores": ", ".join(_scores(own)) or "none",
        "digest": source.digest,
        **{f"  {name}": text for name, text in _lines(own.provenance)},
    }
    return "\n".join(f"{name:18} {text}" for name, text in lines.items())


def _seen(provenance: dict[str, Any]) -> str:
    """The sets of real images, besides the training set, that a store's models have seen."""
    seen = provenance.get("additional_data")
    return "not known" if seen is None else ", ".join(seen) or "none"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _lines(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a store is made of, a line each; long ones cut."""
    for name, value in sorted(provenance.items()):
        if name not in ("licence", "additional_data", "class_names"):
            text = str(value)
            yield name, text if len(text) <= 160 else f"{text[:157]}..."


def _show(words: list[str]) -> None:
    """gambeson store show STORE [--per-row N] [--out FILE]"""
    from gambeson.synthesis import grid

    per_row, asked = take_number(words, "--per-row") or 10, take(words, "--out")
    require(asked is None or not Path(asked).exists(), "--out", "a picture where nothing lies yet", asked)
    out = Path(asked or "store.png")
    source = open_ours(_only(words, "show"))
    places = inspect.first_of_each_class(source, per_row, MOST_ROWS)
    rows = []
    for label in places:
        images = source.read(places[label])[0]
        rows.append(np.concatenate([images, np.full((per_row - len(images), *images.shape[1:]), 255, np.uint8)]))
    grid.write(out, grid.picture(np.concatenate(rows), per_row))
    names = class_names(source) or numbered(max(places) + 1)
    say(f"rows: {', '.join('without a class' if label < 0 else names[label] for label in places)}")
    say(f"picture: {out.resolve()}")


def _merge(words: list[str]) -> None:
    """gambeson store merge STORE STORE ... --out DIR [--classes N]"""
    command, out, classes = _asked("merge", words), _out(words), take_number(words, "--classes")
    _check_words(words, "merge")
    require(len(words) >= 2, "merge", "two stores or more", " ".join(words))
    parts = [_verified(word) for word in words]
    with _progress("merge") as report:
        made = stores.merge(parts, out, classes, report, command)
    _deliver(made)


def _split(words: list[str]) -> None:
    """gambeson store split STORE --parts 0.9,0.1 --out DIR [--seed S] [--copy]"""
    command = _asked("split", words)
    out, seed, shares, copied = _out(words), _seed(words), _shares(take(words, "--parts")), take_flag(words, "--copy")
    source = (_verified if copied else open_ours)(_only(words, "split"))
    parts = stores.split(source, shares, seed)
    asked = {"split": source.digest, "shares": list(shares), "seed": seed, "copy": copied}
    with draft(out, asked) as folder:
        for number, positions in enumerate(parts):
            if not (folder / f"part-{number}").exists():  # a start before this one may have written it
                _write_part(source, positions, folder / f"part-{number}", copied, command)
    for number, positions in enumerate(parts):
        say(f"part-{number}: {len(positions):,} images, {(out / f'part-{number}').resolve()}")


def _sample(words: list[str]) -> None:
    """gambeson store sample STORE --images N --out DIR [--per-class] [--seed S] [--copy]"""
    command = _asked("sample", words)
    out, seed, images = _out(words), _seed(words), take_number(words, "--images")
    per_class, copied = take_flag(words, "--per-class"), take_flag(words, "--copy")
    source = (_verified if copied else open_ours)(_only(words, "sample"))
    require(images is not None, "--images", "how many images to draw", images)
    assert images is not None
    positions = stores.sample(source, images, seed, per_class)
    _write_part(source, positions, out, copied, command)
    say(f"{'store' if copied else 'selection'}: {len(positions):,} images, {out.resolve()}")


def _write_part(source: Source, positions: np.ndarray, folder: Path, copied: bool, command: str) -> None:
    """Some images as a selection, or as a store; one that is there, of a command that was stopped, is left."""
    chosen = stores.chosen_from(source, positions)
    if copied:
        with _progress("copy") as report:
            stores.copy(chosen, folder, report, command)
        return
    with draft(folder, {"select": source.digest, "images": len(positions)}) as unfinished:
        stores.write_chosen(unfinished / "chosen.parquet", chosen)
        write_card(unfinished, source_card(chosen, folder.name, command=command))


def _import(words: list[str]) -> None:
    """gambeson store import PATH --out DIR [--shape H,W,C] [--licence L] [--additional-data A,B]"""
    command = _asked("import", words)
    out, shape, licence = _out(words), _shape(take(words, "--shape")), take(words, "--licence")
    others = take(words, "--additional-data")
    word = _only(words, "import")
    spec = PeerImages(path=word, shape=shape)
    source: FilesSource = spec.source
    with _progress("import") as report:
        incoming = open_peer(word, shape)
        told = origin(source, incoming)
        told = {**told, **({} if licence is None else {"licence": licence})}
        told = {**told, **({} if others is None else {"additional_data": _names(others)})}
        with draft(out, {"import": source.digest, "shape": list(incoming.shape)}) as folder:
            write_store(incoming, folder, replace(spec, path=""), told, report, word)
            write_card(folder, source_card(SyntheticStore.open(folder), out.name, command=command))
    if incoming.assumed:
        say(f"assumed: {incoming.assumed}")
    _deliver(SyntheticStore.open(out))


def _export(words: list[str]) -> None:
    """gambeson store export STORE --format F --out PATH [--per-file N] [--images-as png|npy]"""
    form, out = take(words, "--format"), _out(words)
    per_file, images_as = take_number(words, "--per-file"), take(words, "--images-as") or "png"
    require(form is not None, "--format", f"one of {', '.join(FORMATS)}", form)
    assert form is not None
    source = _verified(_only(words, "export"))
    with _progress("export") as report:
        export(Outgoing(source, report), form, out, per_file, images_as)
    say(f"{form}: {len(source):,} images, {out.resolve()}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "verify": _verify,
    "stats": _stats,
    "show": _show,
    "merge": _merge,
    "split": _split,
    "sample": _sample,
    "import": _import,
    "export": _export,
}


def _verified(word: str) -> Source:
    """The same, its checksums compared: a copy of damaged images would get checksums of its own."""
    source = open_ours(word)
    with _progress("verify") as report:
        store_of(source).verify(report)
    return source


def _check_words(words: list[str], command: str) -> None:
    odd = [word for word in words if word.startswith("-")]
    require(not odd, f"gambeson store {command}", "options that gambeson store --help lists", " ".join(odd))


def _only(words: list[str], command: str) -> str:
    """The word that is left when the options are taken. UserError for none, or more."""
    _check_words(words, command)
    require(len(words) == 1, f"gambeson store {command}", "one store (or a path to import)", " ".join(words))
    return words[0]


def _out(words: list[str]) -> Path:
    word = take(words, "--out")
    require(bool(word), "--out", "where the result goes", word)
    assert word is not None
    require(not Path(word).exists(), "--out", "a path where nothing lies yet", word)
    return Path(word)


def _seed(words: list[str]) -> int:
    word = take(words, "--seed") or "0"
    require(word.isdigit(), "--seed", "a whole number from 0", word)
    return int(word)


def _shares(word: str | None) -> list[float]:
    try:
        return [float(part) for part in (word or "").split(",")]
    except ValueError:
        raise UserError(f"--parts: expected shares such as 0.9,0.1, got {word!r}") from None


def _shape(word: str | None) -> tuple[int, int, int] | None:
    if word is None:
        return None
    sides = [int(part) if part.strip().isdigit() else 0 for part in word.split(",")]
    require(len(sides) == 3 and min(sides) > 0, "--shape", "height, width and channels, such as 32,32,3", word)
    return sides[0], sides[1], sides[2]


def _asked(command: str, words: list[str]) -> str:
    """The command line, for a card."""
    return shlex.join(["gambeson", "store", command, *words])


def _names(word: str) -> list[str]:
    return sorted({part.strip() for part in word.split(",")} - {""})


def _deliver(made: SyntheticStore) -> None:
    say(f"store: {len(made):,} images in {len(made.rows)} shards, {made.root.resolve()}")


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """Shows how far a command is."""
    from gambeson.engine import News
    from gambeson.screen import ProgressScreen

    with ProgressScreen(console()) as screen:
        yield lambda done, total: screen.show(News("store", what, done, total))
