"""The options that commands share, read before a recipe's own: --runs, --workers, --device and their kind."""

from __future__ import annotations

import os
import sys
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
    """Where runs and stages live; for an s3:// or gs:// URL the folder that mirrors it (mirrored_runs.py)."""
    word = take(argv, "--runs") or os.environ.get("GAMBESON_RUNS") or "runs"
    if "://" not in word:
        return Path(word)
    from gambeson.mirrored_runs import open_runs

    return open_runs(word, argv)


def settle_runs() -> None:
    """Sends to an object store what a command has changed of its runs; called at its end, however it ended."""
    opened = sys.modules.get("gambeson.mirrored_runs")
    if opened is not None:
        opened.settle()


def take_machine(argv: list[str], cluster: bool = False) -> Machine:
    """--device, --micro-batch, --workers, --compile; as many workers as cores if nothing is said, one on a GPU.

    cluster: --engine and --address too; --workers are the cluster's then, all that it has if nothing is said.
    """
    from gambeson.machine import Machine
    from gambeson.processes import cores

    device = take(argv, "--device") or os.environ.get("GAMBESON_DEVICE") or "cpu"
    micro_batch, workers = take_number(argv, "--micro-batch"), take_number(argv, "--workers")
    engine, address = (take(argv, "--engine"), take(argv, "--address")) if cluster else (None, None)
    compiled = take_flag(argv, "--compile")
    own = None if engine == "ray" else workers
    return Machine(
        device=device,
        micro_batch=micro_batch,
        workers=own or (cores() if device == "cpu" else 1),
        compile=compiled,
        engine=engine or "local",
        address=address,
        cluster_workers=workers if engine == "ray" else None,
    )


MACHINE_OPTIONS = """\
  --runs DIR       where runs and stages live: a folder, or s3://BUCKET/PREFIX or gs:// (default ./runs or
                   $GAMBESON_RUNS)
  --workers N      processes of one thread each (default: the cores of this machine; 1 on an accelerator)
  --device D       cpu (default), cuda, cuda:1, mps; also $GAMBESON_DEVICE
  --micro-batch N  images of a block in the networks at once, where a whole block does not fit in memory
  --compile        classifiers in training go through torch.compile: needs a C++ compiler, pays off in long runs
"""

ENGINE_OPTIONS = """\
  --engine E       whose workers generate, label and score: local (default), this machine's; ray, a cluster's, of
                   which --workers takes N (default: all); needs `pip install gambeson[cluster]`
  --address A      of the cluster, HOST:PORT or auto; without it --engine ray starts one on this machine
"""


T = TypeVar("T")


def overridden(default: T, words: list[str], prog: str) -> T:
    """The component with the fields that words set; without words, what reads them (tyro, pydantic) is not needed."""
    if not words:
        return default
    from gambeson import overrides

    return overrides.parse(default, words, prog=prog)
