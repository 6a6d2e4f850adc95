"""One input to one target, within bounds: no other error than the documented ones, no hang, no memory over a bound."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gambeson.processes import peak_memory_mb, reset_peak_memory
from tests.fuzz.targets import TARGETS

SECONDS, MEGABYTES = 10.0, 300.0
"""What one input may take: CPU seconds, and memory on top of what the process had."""
MORE = {"parquet": 2200.0}
"""Targets that may take more: pyarrow takes what a page's head says, up to Parquet's own 2 GB, before it looks."""
FAST = Path("/dev/shm")


class OutOfBounds(BaseException):
    """An input took too long, or too much. No Exception: no reader may take it for damage."""


def resident_mb() -> float:
    """Memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@contextmanager
def bounded(size: int, megabytes: float = MEGABYTES) -> Iterator[None]:
    """Inside, CPU and memory are bounded; OutOfBounds says what was taken for an input of this size."""

    def late(*_: object) -> None:
        raise OutOfBounds(f"more than {SECONDS:g} s for {size} bytes")

    before, old = resident_mb(), signal.signal(signal.SIGPROF, late)
    reset_peak_memory()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    grown = peak_memory_mb() - before
    if grown > megabytes:
        raise OutOfBounds(f"{grown:.0f} MB for {size} bytes")


class Trial:
    """A target and a folder that its files are written to."""

    def __init__(self, target: str) -> None:
        self.target, self.megabytes = TARGETS[target], MORE.get(target, MEGABYTES)
        self.folder = Path(tempfile.mkdtemp(dir=FAST if FAST.is_dir() else None))

    def __call__(self, data: bytes) -> None:
        """Whatever the target raises, or OutOfBounds."""
        try:
            with bounded(len(data), self.megabytes):
                self.target(data, self.folder)
        finally:
            for path in self.folder.iterdir():
                path.unlink()

    def close(self) -> None:
        """Removes the folder."""
        with suppress(OSError):
            shutil.rmtree(self.folder)
