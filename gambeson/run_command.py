"""`gambeson run`: a recipe by name or from a file, or one derived from images of one's own; ends with the report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gambeson import distributed, files, overrides
from gambeson.data.datasets import DOORS
from gambeson.disk import atomic
from gambeson.errors import UserError, nearest
from gambeson.machine import Machine
from gambeson.options import ENGINE_OPTIONS, MACHINE_OPTIONS, take, take_flag, take_machine, take_runs
from gambeson.pipeline import check_plan
from gambeson.place import redacted
from gambeson.recipe import Recipe
from gambeson.recipes import RECIPES
from gambeson.recipes.asked import OWN_OPTIONS, TIMINGS, Asked, ask, is_images, is_recipe, load_recipe
from gambeson.recipes.costs import remembered
from gambeson.recipes.presets import PRESETS, preset
from gambeson.run import execute, take_part
from gambeson.terminal import console, say

RUN = """usage: gambeson run RECIPE|IMAGES [OPTIONS]

Makes a run and ends with its report. Stop it at any time; the same command goes on.

RECIPE: a name, a recipe file, or a run's folder (repeats it)
{recipes}

IMAGES: a folder with a folder for each class, an .npz or .parquet file, hf:ORG/NAME, or a data set; a recipe is
derived from them and from this machine, and its reasons are printed
  {sets}
"""
RUN_OPTIONS = f"""options of the run, besides the recipe's fields (gambeson run digits --help lists them):
{MACHINE_OPTIONS + ENGINE_OPTIONS}  --preset NAME    noise levels, sampler, guidance and encoder: {", ".join(PRESETS)}
  --print-recipe   print the recipe file with the overrides applied, and do nothing
  --dry-run        check images, shapes and numbers, print the plan and what it costs, and make nothing
  --take-over      go on with a run that a machine which is dead by now has begun
  --price D        dollars that an hour of the machine costs, for --dry-run
{OWN_OPTIONS}"""


def run(argv: list[str]) -> None:
    """gambeson run RECIPE|IMAGES [OPTIONS]"""
    if not argv or argv[0] in ("--help", "-h"):
        recipes = "\n".join(f"  {name:12} {what}" for name, what in RECIPES.items())
        print(RUN.format(recipes=recipes, sets=", ".join(_sets())), RUN_OPTIONS, sep="\n")
        return
    words = list(argv)
    word = words.pop(0)
    if word.startswith("-"):
        raise UserError(f"expected the recipe or the images first, got {word}; for example: gambeson run digits {word}")
    if {"--help", "-h"} & set(words):
        print(RUN_OPTIONS)
    runs, machine, only_print = take_runs(words), take_machine(words, cluster=True), take_flag(words, "--print-recipe")
    dry, price, take_over = take_flag(words, "--dry-run"), _price(words), take_flag(words, "--take-over")
    with distributed.joined(machine.device) as device:  # under torchrun the processes are a group; by hand, one alone
        machine, leads = replace(machine, device=device), distributed.leads()
        recipe, reasons = distributed.told(_told(word, words, machine, runs.resolve()) if leads else None)
        if leads:
            command = redacted("gambeson run " + " ".join(argv))
            asked = Asks(only_print=only_print, dry=dry, price=price, take_over=take_over)
            _lead(recipe, reasons, runs, machine, command, asked)
        elif not (only_print or dry):
            from gambeson.screen import following

            with following() as screen:
                take_part(recipe, runs, screen, machine)


@dataclass(frozen=True, kw_only=True)
class Asks:
    """What is asked for besides a recipe and a machine."""

    only_print: bool
    dry: bool
    price: float | None
    take_over: bool


def _lead(recipe: Recipe, reasons: list[str], runs: Path, machine: Machine, command: str, asked: Asks) -> None:
    """What was asked for, by the only process or the first of several."""
    if reasons:
        say(*(f"{'#' if asked.only_print else '-'} {reason}" for reason in reasons), sep="\n", flush=True)
    if asked.only_print:
        print(files.dump(recipe))
        return
    if asked.dry:
        _foretell(recipe, runs.resolve(), machine, asked.price)
        return
    made = _make(recipe, runs, machine, command, asked.take_over)
    if reasons:
        with atomic(made / "reasons.txt") as draft:
            draft.write_text("\n".join(reasons) + "\n", encoding="utf-8")


def _told(word: str, words: list[str], machine: Machine, runs: Path) -> tuple[Recipe, list[str]]:
    """The recipe with the overrides in it; where it was derived, the reasons and how long it will take."""
    chosen, images, reasons = take(words, "--preset"), _images(word, words, machine, runs), list[str]()
    if images is None:
        default = load_recipe(word)
    else:
        derived = images.derived()
        default, reasons = derived.recipe, derived.reasons
    default = default if chosen is None else preset(chosen).into(default)
    recipe = overrides.parse(default, words, prog=f"gambeson run {word}")
    if images is not None:
        check_plan(recipe, recipe.arms)
        reasons = [*reasons, *images.forecast(recipe)]
    return recipe, reasons


def _price(words: list[str]) -> float | None:
    word = take(words, "--price")
    try:
        price = None if word is None else float(word)
    except ValueError:
        price = -1.0
    if price is not None and not 0 <= price < 1e6:
        raise UserError(f"--price: expected dollars an hour, got {word!r}")
    return price


def _foretell(recipe: Recipe, runs: Path, machine: Machine, price: float | None) -> None:
    """Prints what the run would do and cost. Raises UserError as the run itself would before its first stage."""
    from gambeson.recipes.plan import cost, disk, plan

    check_plan(recipe, recipe.arms)
    real, timing = recipe.data.load(), remembered(runs / TIMINGS)
    say(*plan(recipe, real), sep="\n", flush=True)
    say(*cost(recipe, real, timing, machine.workers, machine.device, price), sep="\n")
    say(disk(recipe, real, runs))


def _sets() -> list[str]:
    """Data sets with a name that is no recipe's."""
    return [name for name in DOORS if name not in RECIPES]


def _images(word: str, words: list[str], machine: Machine, runs: Path) -> Asked | None:
    """The images that a word names; None for a recipe. UserError where it names neither."""
    if is_recipe(word):
        return None
    if is_images(word):
        return ask(word, words, machine, runs)
    known = ", ".join(nearest(word, [*RECIPES, *_sets()]))
    raise UserError(
        f"run: expected a recipe or a data set ({known}; nearest first), a recipe file (.yaml), a folder with a folder "
        f"of images for each class, an .npz or .parquet file, or hf:ORG/NAME; got {word!r}, which is not there"
    )


def _make(recipe: Recipe, runs: Path, machine: Machine, command: str, take_over: bool) -> Path:
    """Makes the run, writes its report and prints its table; the run's folder."""
    from gambeson.report import page, verdict
    from gambeson.report.gather import gather
    from gambeson.screen import ProgressScreen

    out, workers = console(), machine.workers
    if distributed.together():  # all go through the same stages in one order: no jobs side by side
        workers = 1
    else:
        machine = replace(machine, workers=1)
    with ProgressScreen(out) as screen:
        made = execute(recipe, runs, workers, screen, command, machine, take_over)
    print("making the page; what it shows is kept for the next time", flush=True)
    with distributed.apart():
        material = gather(made)
        path = page.write(material, made.folder / "report.html")
    out.print(verdict.terminal_table(material))
    for sentence in verdict.judge(material).headlines[:1]:
        out.print(sentence, markup=False, highlight=False)
    say(f"report: {path.resolve()}")
    return made.folder
