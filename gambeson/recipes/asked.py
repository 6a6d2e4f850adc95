"""The words of `gambeson run PATH`: the images, the threat and the time; whatever is left are fields of the recipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path

from gambeson import files, overrides
from gambeson.data.celeba import CelebA
from gambeson.data.datasets import DOORS, Data, ImageFolder, NpzImages, door
from gambeson.data.hub import PREFIX
from gambeson.data.imagenet64 import ImageNet64
from gambeson.data.parquet import ParquetImages
from gambeson.errors import UserError
from gambeson.machine import Machine
from gambeson.options import take
from gambeson.recipe import Arm, Recipe, class_table
from gambeson.recipes import RECIPES, named
from gambeson.recipes.costs import Timing, forecast, remembered
from gambeson.recipes.own import Derived, Hardware, derive
from gambeson.recipes.survey import Survey, fitting, survey
from gambeson.threat import ThreatModel
from gambeson.training.diffusion import DenoiserTraining

OWN_OPTIONS = """options where images stand in place of a recipe:
  --threat T       what the attacker may do: linf:8/255 (default), l2:128/255 and their kind
  --minutes M      how long the run may take (default 30): steps and numbers of images follow from it
  --arms A ...     what is compared (default all): real, gaussian, plain, guided
  --seeds N        how often everything is repeated (default: as time allows)
  --data.FIELD V   how the images are read: size, resize, grey, flip_safe, validation_share, test_share, ...
  --data-root DIR  where data sets with a name lie (default ./data or $GAMBESON_DATA)
"""
TIMINGS = "timings.json"
"""Below the runs' folder: how fast networks were on this machine. Without it they are timed again."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Images to derive a recipe from, and what was said about them, the threat and the time."""

    data: Data
    found: Survey | None
    threat: ThreatModel
    hardware: Hardware
    arms: tuple[Arm, ...] | None
    seeds: int | None
    timing: Timing

    def derived(self) -> Derived:
        """The recipe for them. UserError for images that cannot be read."""
        return derive(
            self.data,
            self.data.load(),
            self.threat,
            self.hardware,
            arms=self.arms,
            seeds=self.seeds,
            found=self.found,
            timing=self.timing,
        )

    def forecast(self, recipe: Recipe) -> list[str]:
        """How long this recipe, with whatever was overridden, will take."""
        if not isinstance(recipe.denoiser, DenoiserTraining):
            return ["how long it takes is not estimated with a diffusion model from elsewhere"]
        real = recipe.data.load()
        rates = self.timing(recipe, real, self.hardware.device)
        return forecast(recipe, real, rates, self.hardware.cores, self.hardware.minutes)


def is_recipe(word: str) -> bool:
    """Whether a word names a recipe: a name, a .yaml file, a run's folder."""
    return word in RECIPES or word.endswith((".yaml", ".yml")) or (Path(word) / "recipe.yaml").exists()


def load_recipe(word: str) -> Recipe:
    """The recipe of that name, file or run's folder. Raises UserError listing the known ones."""
    own = Path(word) / "recipe.yaml"
    path = own if own.exists() else Path(word)
    return files.load(path, Recipe, class_table()) if path.suffix in (".yaml", ".yml") else named(word)


def is_images(word: str) -> bool:
    """Whether a word that names no recipe may name images: a data set, a file or folder that is there, hf:ORG/NAME."""
    return word in DOORS or word.startswith(PREFIX) or Path(word).suffix in (".npz", ".parquet") or Path(word).exists()


def ask(word: str, argv: list[str], machine: Machine, runs: Path) -> Asked:
    """Reads the images that `word` names and takes what is said about them out of `argv`. UserError for mistakes.

    Timings are remembered below `runs`; the fields of the recipe stay in `argv`.
    """
    prog = f"gambeson run {word}"
    threat, minutes, root = (take(argv, f"--{name}") for name in ("threat", "minutes", "data-root"))
    if root is not None:
        os.environ["GAMBESON_DATA"] = root
    hardware = Hardware.here(machine.device, machine.workers, None if minutes is None else _minutes(minutes))
    about, argv[:] = _apart(argv, lambda name: name.startswith("data."))
    wishes, _ = _apart(argv, lambda name: name in ("arms", "seeds") or name.startswith("threat."))
    wished = overrides.parse(Recipe(threat=ThreatModel.parse(threat or "linf:8/255")), wishes, prog=prog)
    said = {wish.partition("=")[0] for wish in wishes}
    data = _in_place(door(word), word)
    found = survey(data)
    if found is not None:
        data = fitting(data, found, hardware.largest_side(found.middle))
    elif isinstance(data, ParquetImages):
        data = replace(data, size=hardware.largest_side(0))
    whole = make_dataclass("Asked", [("data", type(data))], frozen=True)(data)  # errors name options as they were given
    return Asked(
        data=overrides.parse(whole, about, prog=prog).data,
        found=found,
        threat=wished.threat,
        hardware=hardware,
        arms=wished.arms if "--arms" in said else None,
        seeds=wished.seeds if "--seeds" in said else None,
        timing=remembered(runs / TIMINGS),
    )


def _in_place(data: Data, word: str) -> Data:
    """The door with the whole path of what it reads, so that the recipe's file repeats the run from anywhere."""
    if Path(word).exists() and isinstance(data, ImageFolder | NpzImages | ParquetImages | CelebA | ImageNet64):
        return replace(data, path=str(Path(word).resolve()))
    return data


def _minutes(word: str) -> float:
    try:
        minutes = float(word)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise UserError(f"--minutes: expected a number above 0, got {word!r}")
    return minutes


def _apart(argv: list[str], wanted: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The words of the options with such names, with their values, and the others."""
    taken, left, goes = list[str](), list[str](), False
    for word in argv:
        if word.startswith("--"):
            goes = wanted(word[2:].partition("=")[0].replace("-", "_"))
        (taken if goes else left).append(word)
    return taken, left
