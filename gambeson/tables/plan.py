"""How long a sheet will take: the story is told to a bookkeeper that makes nothing, each stage priced once.

Prices are those of `recipes.costs`, from the cells' own networks timed on this machine; what is finished costs nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gambeson.data.imageset import ImageSet
from gambeson.pipeline import (
    evaluate,
    fit_embedding,
    gaussian_control,
    generate,
    label,
    select,
    tell,
    train_classifier,
    train_denoiser,
    train_noise_conditioned,
)
from gambeson.recipe import Recipe
from gambeson.recipes.costs import Rates, Shares, Sizes, Timing, gradients, guided_calls, network_calls, stage_seconds
from gambeson.recipes.plan import KNOWN
from gambeson.robustness.evaluate import Evaluation
from gambeson.store import Artifact, Stage, Store
from gambeson.tables.running import Todo, judge_validation, judging, missing, without_test
from gambeson.tables.sheet import Sheet

SIDE_BY_SIDE = 1.15
"""How much longer two jobs take beside each other (recipes/costs.py)."""
Price = Callable[[Stage, Any], float]
"""(stage, its part of the recipe) -> seconds."""
LOOKS = {"ParameterGradientNorm": 4, "RobustGradientNorm": 14, "InputGradientNorm": 1}
"""Gradients that a rule of selection takes for an image, about: a guess; 1 for others that look at images."""


@dataclass
class Bookkeeper:
    """An `Once` that makes nothing: what each job would make, with the digests that the store would give."""

    runs: Path
    price: Price
    made: set[str] = field(default_factory=set)
    spent: list[tuple[str, str, float]] = field(default_factory=list)  # stage, its folder, seconds

    def once(self, stage: Stage, config: Any, *inputs: Any, seed: int | None = None) -> Artifact:
        """The artifact that there will be; what is not there yet, and was not asked for before, is written down."""
        artifact = Store(self.runs).sought(stage, config, *inputs, seed=seed)
        if artifact.digest not in self.made and not artifact.finished:
            self.spent.append((stage.name, artifact.folder.name, self.price(stage, config)))
        self.made.add(artifact.digest)
        return artifact


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of one process: in all, by stage, and with so many processes beside each other."""

    seconds: float
    stages: dict[str, float]
    elapsed: float
    jobs: int


def forecast(sheet: Sheet, real: ImageSet, runs: Path, timing: Timing, workers: int, device: str = "cpu") -> Forecast:
    """What is still to be made of a sheet.

    For cells that choose, the test of a setting that is not known yet counts with the first one's price.
    """
    keeper, costs, stages = Bookkeeper(runs.resolve(), _nothing), list[float](), dict[str, float]()
    for todo in missing(sheet, test=True):
        before = len(keeper.spent)
        _note(keeper, sheet, todo, real, timing, device)
        costs.append(sum((seconds for _, _, seconds in keeper.spent[before:]), 0.0))
        for name, _, seconds in keeper.spent[before:]:
            stages[name] = stages.get(name, 0.0) + seconds
    return Forecast(seconds=sum(costs), stages=stages, elapsed=_elapsed(costs, workers), jobs=len(costs))


def _note(keeper: Bookkeeper, sheet: Sheet, todo: Todo, real: ImageSet, timing: Timing, device: str) -> None:
    """Writes down what is to be made for a setting and seed."""
    setting, seed, parts = todo
    undecided = {cell.settings[0].folder for cell in sheet.made if cell.chooses and sheet.chosen(cell) is None}
    tested, recipe = "test" in parts or setting.folder in undecided, setting.recipe.with_threat_everywhere()
    keeper.price = price_of(recipe, Sizes.of(real), timing(recipe, real, device))
    made = tell(recipe, setting.arm, seed, keeper.once if tested else without_test(keeper.once), real)
    if "validation" in parts:
        keeper.once(judge_validation, judging(recipe.evaluation), made.artifacts["student"], real, seed=seed)


def _nothing(stage: Stage, config: Any) -> float:
    return 0.0


def _elapsed(costs: list[float], workers: int) -> float:
    """Seconds until the last job is done, each taken by the process that is free first."""
    free, slower = [0.0] * workers, SIDE_BY_SIDE if workers > 1 else 1.0
    for seconds in costs:
        heapq.heapreplace(free, free[0] + slower * seconds)
    return max(free)


def price_of(recipe: Recipe, sizes: Sizes, rates: Rates) -> Price:
    """Seconds of the stages of a recipe whose threat is filled in."""
    shares = KNOWN.get(recipe.name, Shares())
    told = stage_seconds(recipe, sizes, rates, shares)
    noisy, looks = recipe.noisy_encoder.optimisation, LOOKS.get(type(recipe.selection.score).__name__, 1)
    seen = recipe.generation.count * rates.gradient
    prices = {
        train_denoiser.name: told["denoiser"],
        train_noise_conditioned.name: noisy.steps * noisy.batch_size * rates.teacher_step,  # a guess: as the teacher's
        fit_embedding.name: _warm_up(recipe, rates),
        gaussian_control.name: told["control"],
        label.name: seen / 3,
        select.name: seen * looks if recipe.selection.score.looks or recipe.selection.remove_copies else 0.0,
        evaluate.name: told["rows"],
    }

    def price(stage: Stage, config: Any) -> float:
        if stage.name == train_classifier.name:
            return told["teacher" if config == recipe.teacher else "student"]
        if stage.name == generate.name:
            return told["plain" if config.guidance is None else "guided"]
        if isinstance(config, Evaluation) and stage.name == judge_validation.name:
            return sizes.validation / max(sizes.test, 1) * gradients(config, sizes, shares) * rates.gradient
        return prices.get(stage.name, 0.0)

    return price


def _warm_up(recipe: Recipe, rates: Rates) -> float:
    """The blocks that a fitted embedding is fitted on."""
    generation, embedding = recipe.generation, getattr(recipe.generation.guidance, "embedding", None)
    blocks = getattr(embedding, "warmup_blocks", 0)
    each = network_calls(generation) * rates.denoised + guided_calls(generation) * rates.gradient
    return blocks * generation.block * each
