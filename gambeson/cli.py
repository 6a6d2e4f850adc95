"""The command line. `gambeson --help` imports nothing heavy; each command imports what it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from gambeson.options import settle_runs, take_runs
from gambeson.terminal import console, say

USAGE = """gambeson: robust image classifiers from guided synthetic data.

usage: gambeson COMMAND [OPTIONS]

  run RECIPE|IMAGES        make a run: a recipe by name (digits) or from a file (recipe.yaml of a run repeats it); or
                           your own images, from which a recipe is derived
  runs                     list the runs
  show RUN                 print a run's table
  watch RUN                show a run that goes on elsewhere: progress, curves, failures, then the verdict
  report RUN               write a run's report again and print its path
  compare RUN RUN ...      compare runs on one page: paired differences, what differs between them, and why not
  train --data D           train a robust classifier alone: your images, a preset, synthetic images from anywhere
  evaluate CLASSIFIER      measure its robustness on test images: AutoAttack, rows, checks, a page
  certify CLASSIFIER       certify test images by randomised smoothing: L2 radii that provably hold
  try CLASSIFIER           a page on this machine: drop an image, move eps, see answer, attack and certificate live
  export CLASSIFIER        write a classifier as ONNX, or as RobustBench reads it
  train-diffusion RECIPE   train the recipe's diffusion model
  train-encoder RECIPE     train a classifier whose features steer guidance: robust, standard or noise-conditioned
  generate SOURCE          generate a store of images; SOURCE: a recipe, or the weights of a diffusion model
  sample-grid SOURCE       draw the first of these images as one picture
  label STORE              label synthetic images by classifiers: any, several, softly; say where they disagree
  select STORE             keep the best images of each class, by any selector
  table NAME               a table of comparisons beside the paper's, made resumably: cdp-2 to cdp-6, baselines, ...
  quality SYNTHETIC        measure synthetic images beside the real ones before anything is trained on them
  store WHAT STORE         verify, stats, show, merge, split, sample, import, export a set of synthetic images
  data WHAT NAME           list, get, check, show real image sets; the only command that touches the network
  theory                   the theory's tables, closed forms beside simulation, as a page
  figures NAME             draw a figure of the paper with the numbers behind it: figure-1 to figure-4, guidance

`gambeson COMMAND --help` says more, `gambeson run RECIPE --help` shows every field of a recipe. RUN is a folder, a
name, or the beginning of a name. --runs DIR says where runs live (default ./runs or $GAMBESON_RUNS).
Exit codes: 0 done, 2 a mistake in what was asked, 3 the machine could not (disk, permission, damaged file)."""


def _one_word(argv: list[str], what: str) -> str:
    from gambeson.errors import UserError

    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError(f"expected one word, {what}, got {' '.join(argv) or 'nothing'}; see gambeson --help")
    return argv[0]


def command_runs(argv: list[str]) -> None:
    """gambeson runs"""
    from gambeson.errors import UserError

    root = take_runs(argv)
    if argv:
        raise UserError(f"runs: expected no further words, got {' '.join(argv)}")
    folders = sorted(p.parent for p in root.glob("*/recipe.yaml"))
    for folder in folders:
        say(f"{folder.name:40} {_state(folder)}")
    if not folders:
        say(f"no runs in {root.resolve()}; `gambeson run digits` makes one")


def _state(folder: Path) -> str:
    """One line about a run: when it ended and what it holds."""
    from gambeson.run import open_run

    if not (folder / "run.json").exists():
        return f"unfinished; `gambeson run {folder / 'recipe.yaml'}` goes on"
    try:
        run = open_run(folder)
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    ended = str(run.facts.get("finished", ""))[:16].replace("T", " ")
    return f"complete {ended}, {len(run.recipe.arms)} arms, {run.recipe.seeds} seed(s)"


def command_show(argv: list[str]) -> None:
    """gambeson show RUN"""
    from gambeson.errors import reading
    from gambeson.run import find_run

    root = take_runs(argv)
    folder = find_run(_one_word(argv, "the run"), root)
    with reading(folder):
        _show(folder)


def _show(folder: Path) -> None:
    from gambeson.report import verdict
    from gambeson.report.gather import gather_folder

    material = gather_folder(folder, make=False)
    screen = console()
    screen.print(verdict.terminal_table(material))
    for sentence in verdict.judge(material).sentences:
        screen.print(sentence, markup=False)
    told = {part: why for part, why in material.missing.items() if part in ("run", "arms", "class_names")}
    for line in filter(None, (*told.values(), material.moved)):
        say(f"note: {line}")
    say(f"recipe: {folder / 'recipe.yaml'}\nreport: {folder / 'report.html'}")


def command_report(argv: list[str]) -> None:
    """gambeson report RUN"""
    from gambeson.errors import reading
    from gambeson.report import page
    from gambeson.report.gather import gather_folder
    from gambeson.run import find_run

    root = take_runs(argv)
    folder = find_run(_one_word(argv, "the run"), root)
    with reading(folder):
        say(page.write(gather_folder(folder), folder / "report.html").resolve())


def _elsewhere(module: str, function: str) -> Callable[[list[str]], None]:
    """A command of another module, imported when it is called."""
    return lambda argv: getattr(import_module(module), function)(argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": _elsewhere("gambeson.run_command", "run"),
    "runs": command_runs,
    "show": command_show,
    "report": command_report,
    "compare": _elsewhere("gambeson.compare_command", "compare"),
    "watch": _elsewhere("gambeson.watch_command", "watch"),
    "train": _elsewhere("gambeson.train", "train"),
    "train-diffusion": _elsewhere("gambeson.commands", "train_diffusion"),
    "train-encoder": _elsewhere("gambeson.commands", "train_encoder"),
    "evaluate": _elsewhere("gambeson.evaluate", "evaluate"),
    "certify": _elsewhere("gambeson.certify", "certify"),
    "try": _elsewhere("gambeson.try_command", "try_"),
    "export": _elsewhere("gambeson.commands", "export"),
    "generate": _elsewhere("gambeson.commands", "generate_images"),
    "sample-grid": _elsewhere("gambeson.commands", "sample_grid"),
    "label": _elsewhere("gambeson.label_command", "label"),
    "select": _elsewhere("gambeson.select_command", "select"),
    "table": _elsewhere("gambeson.table_command", "table"),
    "quality": _elsewhere("gambeson.quality_command", "quality"),
    "store": _elsewhere("gambeson.store_command", "store"),
    "data": _elsewhere("gambeson.data_command", "data"),
    "theory": _elsewhere("gambeson.theory.command", "theory"),
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
            _command(words[0], words[1:])
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


def _command(name: str, argv: list[str]) -> None:
    try:
        COMMANDS[name](argv)
    finally:
        settle_runs()


def _complain(error: Exception, code: int) -> int:
    if os.environ.get("GAMBESON_DEBUG"):
        raise error
    from gambeson.place import redacted

    say(f"gambeson: {redacted(str(error))}", file=sys.stderr)
    return code
