"""Tools for test_fleet and test_cluster, in a module of their own, as workers import what they do."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gambeson.errors import UserError


def open_square(place: Path, pause: float = 0.0) -> Callable[[int], tuple[int, int]]:
    """Squares; notes each opening and each item in files of its own process."""
    with open(place / f"opened-{os.getpid()}", "a") as file:
        file.write("opened\n")

    def square(item: int) -> tuple[int, int]:
        time.sleep(pause)
        with open(place / f"did-{os.getpid()}", "a") as file:
            file.write(f"{item}\n")
        return item * item, os.getpid()

    return square


def open_mortal(place: Path, deadly: int, lives: int) -> Callable[[int], int]:
    """Squares; the process is killed in the middle of one item, so many times."""

    def square(item: int) -> int:
        deaths = len(list(place.glob("death-*")))
        if item == deadly and deaths < lives:
            (place / f"death-{deaths}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    return square


def open_failing(message: str) -> Callable[[Any], Any]:
    """Fails at the third item."""

    def fail(item: int) -> int:
        if item == 2:
            raise UserError(message)
        return item

    return fail
