"""The options that commands share, read before a recipe's own: --runs, --workers, --device and their kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from gambeson.machine import Machine


def take(argv: list[str], name: str) -> str | None:
    """Removes `--name VALUE` or `--name=VALUE` from argv; the value, or None if it is not there."""
    for i, word in enumerate(argv):
        if word == name:
            from gambeson.errors import UserError

            if i + 1 == len(argv):
                raise UserError(f"{name}: expected a value after it, got nothing")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if word.startswith(name + "="):
            return argv.pop(i).partition("=")[2]
    return None


def take_number(argv: list[str], name: str) -> int | None:
    """The same for a whole number above 0."""
    from gambeson.errors import UserError

    word = take(argv, name)
    if word is not None and (not word.isdigit() or int(word) < 1):
        raise UserError(f"{name}: expected a whole number above 0, got {word!r}")
    return None if word is None else int(word)


def take_flag(argv: list[str], name: str) -> bool:
    """Removes `--name` from argv; whether it was there."""
    found = name in argv
    argv[:] = [word for word in argv if word != name]
    return found


def take_runs(argv: list[str]) -> Path:
    """Where runs and stages live."""
    return Path(take(argv, "--runs") or os.environ.get("GAMBESON_RUNS") or "runs")


def take_machine(argv: list[str]) -> Machine:
    """--device, --micro-batch, --workers, --compile; as many workers as cores if nothing is said, one on a GPU."""
    from gambeson.machine import Machine
    from gambeson.processes import cores

    device = take(argv, "--device") or os.environ.get("GAMBESON_DEVICE") or "cpu"
    micro_batch, workers = take_number(argv, "--micro-batch"), take_number(argv, "--workers")
    workers, compiled = workers or (cores() if device == "cpu" else 1), take_flag(argv, "--compile")
    return Machine(device=device, micro_batch=micro_batch, workers=workers, compile=compiled)


MACHINE_OPTIONS = """  --runs DIR       where runs and stages live (default ./runs or $GAMBESON_RUNS)
  --workers N      processes of one thread each (default: the cores of this machine; 1 on an accelerator)
  --device D       cpu (default), cuda, cuda:1, mps; also $GAMBESON_DEVICE
  --micro-batch N  images of a block in the networks at once, where a whole block does not fit in memory
  --compile        classifiers in training go through torch.compile: needs a C++ compiler, pays off in long runs
"""


T = TypeVar("T")


def overridden(default: T, words: list[str], prog: str) -> T:
    """The component with the fields that words set; without words, what reads them (tyro, pydantic) is not needed."""
    if not words:
        return default
    from gambeson import overrides

    return overrides.parse(default, words, prog=prog)
