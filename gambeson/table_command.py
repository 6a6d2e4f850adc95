"""`gambeson table`: a table of comparisons, made cell by cell, resumably, and laid beside the paper's."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from gambeson import overrides
from gambeson.data.imageset import ImageSet
from gambeson.disk import read_json
from gambeson.errors import UserError, unknown
from gambeson.machine import Machine
from gambeson.options import MACHINE_OPTIONS, take, take_flag, take_machine, take_number, take_runs
from gambeson.pipeline import check_plan
from gambeson.recipe import Recipe
from gambeson.recipes.asked import TIMINGS
from gambeson.recipes.costs import Rates, remembered, span
from gambeson.recipes.plan import Card, counted_rates
from gambeson.tables.bases import SEEDS, amounts_of, base_of, table_named
from gambeson.tables.cells import Table, expand, squares, told
from gambeson.tables.definitions import TABLES
from gambeson.tables.plan import forecast
from gambeson.tables.results import lines
from gambeson.tables.running import make, publish
from gambeson.tables.sheet import Sheet
from gambeson.tables.telling import plan_lines, terminal_table
from gambeson.terminal import console, say
from gambeson.training.diffusion import DenoiserTraining

_LIST = "\n".join(f"  {name:20} {table.title} ({table.source})" for name, table in TABLES.items())
USAGE = f"""usage: gambeson table NAME [--tier digits|16|gpu] [OPTIONS]

Makes a table of comparisons: every cell is the tier's base recipe with a few changes, its student trained as all
others, repeated over seeds. Rows of finished cells are kept and the table is written anew after each, so stop it at any
time; the same command goes on. Settings are chosen on validation images; test images only measure.

NAME:
{_LIST}

options, besides the base recipe's fields (gambeson table NAME --tier T --help lists them; they change every cell):
  --tier T         digits (8x8, minutes a cell on a core; default), 16 (CIFAR-10, traffic signs at 16x16), gpu (32x32)
  --seeds N        how often every cell is repeated (default: {", ".join(f"{n} at {t}" for t, n in SEEDS.items())})
  --amounts N ...  synthetic images for each real one, as many rows each (default: the table's own)
  --only CELL ...  these cells alone, by name or pattern ('cdp-*'); others keep what they have
  --plan           print the cells, what makes each other than the base, and how long it will take; make nothing
  --report         write the table from the rows that are kept; make nothing, read no images
  --validation     judge students on validation images alone: for trying settings out
  --out DIR        where tables are kept, a folder each (default RUNS/tables); it can be committed
{MACHINE_OPTIONS}"""


WIDTH = 120
"""Of the table where it does not go to a terminal."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a table has to know of its images."""

    train: int  # real images to train on
    digest: str
    about: str

    @staticmethod
    def of(real: ImageSet) -> Images:
        """Those of an image set."""
        sizes = f"{len(real.train):,} real train, {len(real.validation):,} validation, {len(real.test):,} test images"
        return Images(train=len(real.train), digest=real.digest, about=f"{real.name}: {sizes}")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asked for."""

    name: str
    table: Table
    tier: str
    base: Recipe
    altered: bool  # whether the base has fields of the command line
    seeds: int
    amounts: tuple[int, ...]
    only: tuple[str, ...]
    runs: Path
    out: Path
    machine: Machine
    command: str


def table(argv: list[str]) -> None:
    """gambeson table NAME"""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE)
        return
    words = list(argv)
    plan, report, validation = (take_flag(words, f"--{name}") for name in ("plan", "report", "validation"))
    asked = read(words, "gambeson table " + shlex.join(argv))
    if report:
        _show(sheet_of(asked, _as_kept(asked)))
        return
    real = _images(asked.base, needed=not plan)
    sheet = sheet_of(asked, Images.of(real) if real else None)
    if plan:
        _plan(asked, sheet, real)
        return
    failed = _make(asked, sheet, test=not validation)
    _show(sheet)
    if failed:
        raise UserError("table: expected every cell to be made, got " + "; ".join(failed))


def read(words: list[str], command: str) -> Asked:
    """The words of the command. Raises UserError: what was expected, what came, the fix."""
    name = words.pop(0)
    found, tier = table_named(name), take(words, "--tier") or "digits"
    runs, machine = take_runs(words), take_machine(words)
    seeds, out = take_number(words, "--seeds"), take(words, "--out")
    amounts, only = take_several(words, "--amounts"), take_several(words, "--only")
    if wrong := [word for word in amounts if not word.isdigit() or int(word) < 1]:
        raise UserError(f"--amounts: expected whole numbers above 0, got {' '.join(wrong)}")
    default = base_of(tier, found)
    base = overrides.parse(default, words, prog=f"gambeson table {name} --tier {tier}")
    return Asked(
        name=name,
        table=found,
        tier=tier,
        base=base,
        altered=base != default,
        seeds=seeds or SEEDS[tier],
        amounts=tuple(map(int, amounts)) or amounts_of(tier, found),
        only=tuple(only),
        runs=runs,
        out=Path(out) if out else runs / "tables",
        machine=machine,
        command=command,
    )


def take_several(words: list[str], name: str) -> list[str]:
    """Removes `--name A B ...`, up to the next option, from the words; A, B, ... UserError for the name alone."""
    if name not in words:
        return []
    start = words.index(name)
    end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
    found = words[start + 1 : end]
    if not found:
        raise UserError(f"{name}: expected one or more values after it, got nothing")
    del words[start:end]
    return found


def _images(base: Recipe, needed: bool) -> ImageSet | None:
    """The images; None where they are not there and a look at the cells does without them."""
    try:
        return base.data.load()
    except UserError as error:
        if needed:
            raise
        say(f"no numbers of images and no forecast: {error}\n")
        return None


def folder_of(asked: Asked) -> Path:
    """Where the table is kept: by its name, its tier, and the base where the command line changes that."""
    altered = f"-{asked.base.digest[:8]}" if asked.altered else ""
    return (asked.out / f"{asked.name}-{asked.tier}{altered}").resolve()


def _as_kept(asked: Asked) -> Images:
    """The images that a kept table was made of. UserError where there is none."""
    path = folder_of(asked) / "table.json"
    if not path.exists():
        raise UserError(f"--report: expected a table that was begun, {path}, found none; leave --report out to make it")
    facts = read_json(path)["facts"]
    return Images(train=facts["train"], digest=facts["data_digest"], about=facts["data"])


def sheet_of(asked: Asked, images: Images | None) -> Sheet:
    """The table at its tier. UserError for a pattern of --only that matches no cell.

    images: None where they are not there, which is enough to look at the cells.
    """
    base = asked.base
    cells = expand(asked.table, base, asked.amounts, images.train if images else None)
    return Sheet(
        name=asked.name,
        tier=asked.tier,
        title=asked.table.title,
        source=asked.table.source,
        notes=asked.table.notes,
        cells=cells,
        squares=squares(asked.table, asked.amounts),
        seeds=tuple(range(base.seed, base.seed + asked.seeds)),
        facts={
            "base": base.name,
            "base_digest": base.digest,
            "data": images.about if images else "images not there",
            "data_digest": images.digest if images else None,
            "train": images.train if images else None,
            "threat": str(base.threat),
            "command": asked.command,
        },
        folder=folder_of(asked),
        only=_matching([cell.name for cell in cells], asked.only),
    )


def _matching(names: list[str], patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The names that match a pattern. UserError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unknown("cell", pattern, names)
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def _make(asked: Asked, sheet: Sheet, test: bool) -> list[str]:
    """Makes what is missing; the reasons of what cannot be made."""
    from gambeson.screen import ProgressScreen

    with ProgressScreen() as screen:
        alone = replace(asked.machine, workers=1)
        return make(sheet, asked.runs, asked.machine.workers, screen, alone, test=test)


def _show(sheet: Sheet) -> None:
    """Writes the table anew and prints it."""
    publish(sheet)
    screen = console()
    screen = screen if screen.is_terminal else console(WIDTH)
    screen.print(terminal_table(sheet, lines(sheet)))
    say(f"everything: {sheet.folder / 'table.json'}\ntable: {sheet.folder / 'table.md'}")


def _plan(asked: Asked, sheet: Sheet, real: ImageSet | None) -> None:
    """Prints the cells and, where they can be timed, how long they will take."""
    settings = [setting for cell in sheet.made for setting in cell.settings]
    changes = {setting.folder: told(asked.base, setting) for setting in settings}
    say(*plan_lines(sheet, changes), sep="\n")
    if real is None:
        return
    for setting in settings:
        check_plan(setting.recipe, (setting.arm,), real)
    say(_forecast(asked, sheet, real))


def counted_on_a_card(recipe: Recipe, real: ImageSet, device: str) -> Rates:
    """The rates of a recipe's networks on an assumed card, by their operations."""
    return counted_rates(recipe, real, Card())


def _forecast(asked: Asked, sheet: Sheet, real: ImageSet) -> str:
    """How long the rest will take, in words."""
    device, workers = asked.machine.device, asked.machine.workers
    if not isinstance(asked.base.denoiser, DenoiserTraining):
        return "no forecast: a diffusion model from elsewhere is not timed"
    counted = asked.tier == "gpu" and device == "cpu"
    timing = counted_on_a_card if counted else remembered(asked.runs / TIMINGS)
    found = forecast(sheet, real, asked.runs, timing, workers, device)
    card = f"operations counted, on one {Card().name} at an assumed {Card().reached:.0%} of its peak"
    how = card if counted else "a short timing of these networks on this machine"
    parts = ", ".join(f"{n} {span(s)}" for n, s in sorted(found.stages.items(), key=lambda p: -p[1]) if s >= 1)
    return (
        f"forecast: {found.jobs} runs to make, about {span(found.seconds)} of work by {how} "
        f"({parts or 'nothing'}); about {span(found.elapsed)} with {workers} process(es)"
    )
