"""`gambeson compare`: several runs beside each other on one page, and as a table in the terminal."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from gambeson.errors import UserError, reading
from gambeson.options import take, take_runs
from gambeson.report import compare_page, compare_words
from gambeson.report.compare_images import settled
from gambeson.report.compare_material import Contender
from gambeson.report.compare_pairs import Comparison, compared
from gambeson.report.compare_read import read
from gambeson.run import find_run
from gambeson.terminal import console, say

MOST_RUNS = 40
"""Runs that one page can hold and still be read."""
USAGE = f"""usage: gambeson compare RUN RUN ... [--runs DIR] [--out FILE.html]

Compares runs on one self-contained page and in the terminal: the accuracies of all arms with their intervals, the
differences from the first run named, what differs between the recipes, curves, trainings, checks and costs. Differences
are paired by test image, and by seed where runs have common ones; with many of them, verdicts count them all together.
Runs of other test images, threats or attacks are laid beside each other, but no difference is taken: the page says why.

RUN: a run's folder, wherever it lies, its name, or the beginning of its name (2 to {MOST_RUNS}); unfinished and moved
ones too, as far as they go; or a folder that `gambeson evaluate` wrote.

options:
  --runs DIR       where runs live (default ./runs or $GAMBESON_RUNS)
  --out FILE.html  where the page goes (default RUNS/compare-....html)"""


def compare(argv: list[str]) -> None:
    """gambeson compare RUN RUN ..."""
    if not argv or {"--help", "-h"} & set(argv):
        print(USAGE)
        return
    words = list(argv)
    runs, out = take_runs(words), take(words, "--out")
    unknown = [word for word in words if word.startswith("-")]
    if unknown:
        raise UserError(f"compare: expected runs, --runs and --out, got {unknown[0]}; see gambeson compare --help")
    folders = found(words, runs)
    page = _place(out, runs, folders)
    with reading(", ".join(map(str, folders))):
        comparison = laid_beside(folders)
        _show(comparison)
        say(f"page: {compare_page.write(comparison, page).resolve()}")


def found(words: Sequence[str], runs: Path) -> list[Path]:
    """The folders of the runs. Raises UserError for fewer than 2, too many, the same one twice, and unknown ones."""
    folders = [_folder(word, runs) for word in words]
    if not 2 <= len(folders) <= MOST_RUNS:
        fix = {0: "name two runs", 1: "name another run; `gambeson report RUN` shows one alone"}
        raise UserError(f"compare: expected 2 to {MOST_RUNS} runs, got {len(folders)}; "
                        + fix.get(len(folders), "compare fewer at a time"))  # fmt: skip
    seen: dict[Path, str] = {}
    for word, folder in zip(words, folders, strict=True):
        place = folder.resolve()
        if place in seen:
            raise UserError(
                f"compare: expected different runs, got {seen[place]!r} and {word!r}, which are both {place}; name "
                "each once"
            )
        seen[place] = word
    return folders


def _folder(word: str, runs: Path) -> Path:
    """The folder that a word means: a path to one, else as `gambeson show` finds runs."""
    path = Path(word)
    if word and path.is_dir() and ("/" in word or (path / "facts.json").exists() or (path / "recipe.yaml").exists()):
        return path
    return find_run(word, runs)


def _place(out: str | None, runs: Path, folders: Sequence[Path]) -> Path:
    """Where the page goes. UserError for a folder, another kind of file, and a file that is no such page."""
    if out is None:
        digest = hashlib.sha256("\n".join(str(f.resolve()) for f in folders).encode()).hexdigest()[:8]
        rest = _plain(folders[1].resolve().name) if len(folders) == 2 else f"{len(folders) - 1}-others"
        return runs / f"compare-{_plain(folders[0].resolve().name)}-with-{rest}-{digest}.html"
    place = Path(out)
    if place.is_dir() or place.suffix.lower() not in (".html", ".htm"):
        what = "a folder" if place.is_dir() else f"{out!r}"
        raise UserError(f"--out: expected a file whose name ends in .html, got {what}; for example {_example(place)}")
    if place.exists() and not compare_page.is_ours(place):
        raise UserError(
            f"--out: expected a new file, or a page of gambeson compare to write anew, got {out!r}, which is something "
            "else; choose another name"
        )
    return place


def _example(place: Path) -> str:
    return str(place / "compare.html") if place.is_dir() else f"{place}.html"


def _plain(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:48] or "run"


def laid_beside(folders: Sequence[Path]) -> Comparison:
    """The runs in these folders, compared with the first of them that was measured."""
    names = _names(folders)
    contenders = [
        _read(folder, number, name) for number, (folder, name) in enumerate(zip(folders, names, strict=True), 1)
    ]
    return compared(settled(contenders))


def _read(folder: Path, number: int, name: str) -> Contender:
    with reading(folder):
        return read(folder, number, name)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; with where they lie for those that have one in common."""
    places = [folder.resolve() for folder in folders]
    own = [place.name for place in places]
    return [place.name if own.count(place.name) == 1 else f"{place.name} in {place.parent}" for place in places]


def _show(comparison: Comparison) -> None:
    """The table, the verdict and what is missing, in the terminal."""
    screen = console()
    for contender in comparison.contenders:
        screen.print(f"run {contender.number}: {contender.name}", markup=False, highlight=False, soft_wrap=True)
    screen.print(compare_words.terminal_table(comparison))
    for line in compare_words.terminal_lines(comparison):
        screen.print(line, soft_wrap=True)
