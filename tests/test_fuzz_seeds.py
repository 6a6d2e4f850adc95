"""Every kept input of the fuzzer (tests/fuzz) is answered within bounds; what it once broke stays mended."""

from pathlib import Path

import pytest

from tests.fuzz.bounds import OutOfBounds, Trial
from tests.fuzz.run import NAMES, SEEDS
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_answered_within_bounds(name: str) -> None:
    trial, seeds = Trial(name), sorted((SEEDS / name).iterdir())
    assert len(seeds) >= 3
    for seed in seeds:
        try:
            trial(seed.read_bytes())
        except (Exception, OutOfBounds) as error:
            raise AssertionError(f"{seed.relative_to(SEEDS)}: {type(error).__name__}: {error}") from error
    trial.close()


def test_the_command_knows_the_targets_and_the_seeds_stay_small() -> None:
    assert tuple(TARGETS) == NAMES
    assert {path.name for path in SEEDS.iterdir()} == set(NAMES)
    assert sum(path.stat().st_size for path in SEEDS.rglob("*") if path.is_file()) < 200_000


def test_a_target_that_takes_too_much_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds can fail: an input that fills memory, and an error that is not documented."""
    import numpy as np

    def fills(data: bytes, folder: Path) -> None:
        np.ones(50_000_000)

    def breaks(data: bytes, folder: Path) -> None:
        raise KeyError(data)

    monkeypatch.setitem(TARGETS, "npz", fills)
    with pytest.raises(OutOfBounds, match="MB for 0 bytes"):
        Trial("npz")(b"")
    monkeypatch.setitem(TARGETS, "npz", breaks)
    with pytest.raises(KeyError):
        Trial("npz")(b"")
