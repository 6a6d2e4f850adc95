"""The command line. `gambeson --help` imports nothing heavy; each command imports what it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from gambeson.options import MACHINE_OPTIONS, take, take_machine, take_runs

if TYPE_CHECKING:
    from gambeson.recipe import Recipe
    from gambeson.store import Machine

USAGE = """gambeson: robust image classifiers from guided synthetic data.

usage: gambeson COMMAND [OPTIONS]

  run RECIPE               make a run: a recipe by name (digits) or a recipe file (recipe.yaml of a run repeats it)
  runs                     list the runs
  show RUN                 print a run's table
  report RUN               write a run's report again and print its path
  train --data D           train a robust classifier alone: your images, a preset, synthetic images from anywhere
  evaluate CLASSIFIER      measure its robustness on test images: AutoAttack, rows, checks, a page
  certify CLASSIFIER       certify test images by randomised smoothing: L2 radii that provably hold
  export CLASSIFIER        write a classifier as ONNX, or as RobustBench reads it
  train-diffusion RECIPE   train the recipe's diffusion model
  train-encoder RECIPE     train a classifier whose features steer guidance: robust, standard or noise-conditioned
  generate SOURCE          generate a store of images; SOURCE: a recipe, or the weights of a diffusion model
  sample-grid SOURCE       draw the first of these images as one picture
  figures NAME             draw a figure of the paper with the numbers behind it: guidance (its Figures 2 to 4)

`gambeson COMMAND --help` says more, `gambeson run RECIPE --help` shows every field of a recipe. RUN is a folder, a
name, or the beginning of a name. --runs DIR says where runs live (default ./runs or $GAMBESON_RUNS).
Exit codes: 0 done, 2 a mistake in what was asked, 3 the machine could not (disk, permission, damaged file)."""

RUN_OPTIONS = f"""options of the run, besides the recipe's fields below:
{MACHINE_OPTIONS}  --preset NAME    sampler, noise levels, guidance and encoder at once (gambeson generate --help)
  --print-recipe   print the recipe file with the overrides applied, and do nothing
"""


def _one_word(argv: list[str], what: str) -> str:
    from gambeson.errors import UserError

    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError(f"expected one word, {what}, got {' '.join(argv) or 'nothing'}; see gambeson --help")
    return argv[0]


def command_run(argv: list[str]) -> None:
    """gambeson run RECIPE [OPTIONS]"""
    from gambeson import files, overrides
    from gambeson.commands import load_recipe
    from gambeson.errors import UserError
    from gambeson.recipes import RECIPES
    from gambeson.recipes.presets import preset

    words = list(argv)
    if not argv or argv[0] in ("--help", "-h"):
        lines = [f"  {name:10} {what}" for name, what in RECIPES.items()]
        print("usage: gambeson run RECIPE [OPTIONS]\n\nrecipes:", *lines, "", RUN_OPTIONS, sep="\n")
        return
    word = argv.pop(0)
    if word.startswith("-"):
        raise UserError(f"expected the recipe first, got {word}; for example: gambeson run digits {word} ...")
    default = load_recipe(word)
    if "--help" in argv or "-h" in argv:
        print(RUN_OPTIONS)
    runs, machine, chosen = take_runs(argv), take_machine(argv), take(argv, "--preset")
    default = default if chosen is None else preset(chosen).into(default)
    only_print = "--print-recipe" in argv
    recipe = overrides.parse(default, [w for w in argv if w != "--print-recipe"], prog=f"gambeson run {word}")
    if only_print:
        print(files.dump(recipe))
        return
    _run(recipe, runs, machine, "gambeson run " + " ".join(words))


def _run(recipe: Recipe, runs: Path, machine: Machine, command: str) -> None:
    from dataclasses import replace

    from rich.console import Console

    from gambeson.run import execute
    from gambeson.screen import ProgressScreen

    console = Console()
    with ProgressScreen(console) as screen:
        run = execute(recipe, runs, machine.workers, screen, command, replace(machine, workers=1))
    _finish(run.folder, console)


def _finish(folder: Path, console: object) -> None:
    """The report and the table of a complete run."""
    from gambeson.report import page, verdict
    from gambeson.report.gather import gather
    from gambeson.run import open_run

    material = gather(open_run(folder))
    path = page.write(material, folder / "report.html")
    console.print(verdict.terminal_table(material))  # type: ignore[attr-defined]
    print(f"report: {path.resolve()}")


def command_runs(argv: list[str]) -> None:
    """gambeson runs"""
    from gambeson.errors import UserError

    root = take_runs(argv)
    if argv:
        raise UserError(f"runs: expected no further words, got {' '.join(argv)}")
    folders = sorted(p.parent for p in root.glob("*/recipe.yaml"))
    for folder in folders:
        print(f"{folder.name:40} {_state(folder)}")
    if not folders:
        print(f"no runs in {root.resolve()}; `gambeson run digits` makes one")


def _state(folder: Path) -> str:
    """One line about a run: when it ended and what it holds."""
    from gambeson.run import open_run

    if not (folder / "run.json").exists():
        return f"unfinished; `gambeson run {folder / 'recipe.yaml'}` goes on"
    try:
        run = open_run(folder)
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    ended = run.facts["finished"][:16].replace("T", " ")
    return f"complete {ended}, {len(run.recipe.arms)} arms, {run.recipe.seeds} seed(s)"


def command_show(argv: list[str]) -> None:
    """gambeson show RUN"""
    from rich.console import Console

    from gambeson.report import verdict
    from gambeson.report.gather import gather
    from gambeson.run import find_run, open_run

    root = take_runs(argv)
    folder = find_run(_one_word(argv, "the run"), root)
    material = gather(open_run(folder))
    console = Console()
    console.print(verdict.terminal_table(material))
    for sentence in verdict.judge(material).sentences:
        console.print(sentence, markup=False)
    print(f"recipe: {folder / 'recipe.yaml'}\nreport: {folder / 'report.html'}")


def command_report(argv: list[str]) -> None:
    """gambeson report RUN"""
    from gambeson.report import page
    from gambeson.report.gather import gather
    from gambeson.run import find_run, open_run

    root = take_runs(argv)
    folder = find_run(_one_word(argv, "the run"), root)
    print(page.write(gather(open_run(folder)), folder / "report.html").resolve())


def _elsewhere(module: str, function: str) -> Callable[[list[str]], None]:
    """A command of another module, imported when it is called."""
    return lambda argv: getattr(import_module(module), function)(argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": command_run,
    "runs": command_runs,
    "show": command_show,
    "report": command_report,
    "train": _elsewhere("gambeson.train", "train"),
    "train-diffusion": _elsewhere("gambeson.commands", "train_diffusion"),
    "train-encoder": _elsewhere("gambeson.commands", "train_encoder"),
    "evaluate": _elsewhere("gambeson.evaluate", "evaluate"),
    "certify": _elsewhere("gambeson.certify", "certify"),
    "export": _elsewhere("gambeson.commands", "export"),
    "generate": _elsewhere("gambeson.commands", "generate_images"),
    "sample-grid": _elsewhere("gambeson.commands", "sample_grid"),
    "figures": _elsewhere("gambeson.theory.command", "figures"),
}
WITHOUT_OWN_HELP = ("runs", "show", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code."""
    from gambeson.errors import EnvironmentFault, UserError, unknown

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        import gambeson

        print(gambeson.__version__)
        return 0
    try:
        if words[0] not in COMMANDS:
            raise unknown("command", words[0], COMMANDS)
        if words[0] in WITHOUT_OWN_HELP and {"--help", "-h"} & set(words[1:]):
            print(USAGE)
        else:
            COMMANDS[words[0]](words[1:])
    except BrokenPipeError:  # whoever read our output has seen enough: `gambeson runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("stopped; the same command again goes on from here", file=sys.stderr)
        return 130
    except (EnvironmentFault, OSError) as error:
        return _complain(error, EnvironmentFault.code)
    except ValueError as error:
        return _complain(error, UserError.code)
    return 0


def _complain(error: Exception, code: int) -> int:
    if os.environ.get("GAMBESON_DEBUG"):
        raise error
    print(f"gambeson: {error}", file=sys.stderr)
    return code
