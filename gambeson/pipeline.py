"""The story of a run: real images, denoiser, teacher, synthetic images, labels, selection, student, rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gambeson.recipe import Arm, Recipe
from gambeson.robustness.evaluate import evaluate
from gambeson.store import Artifact
from gambeson.synthesis.gaussian import gaussian_control
from gambeson.synthesis.generate import generate
from gambeson.synthesis.label import label
from gambeson.synthesis.select import select
from gambeson.training.classifier import train_classifier
from gambeson.training.diffusion import train_denoiser

Once = Callable[..., Artifact]
"""(stage, its part of the recipe, *inputs, seed) -> the finished stage; made, resumed or found (store.Store.once)."""


@dataclass(frozen=True)
class Chapter:
    """One arm of one seed, told to its end: the artifacts by their role in the story."""

    arm: Arm
    seed: int
    artifacts: dict[str, Artifact]


def tell(recipe: Recipe, arm: Arm, seed: int, once: Once) -> Chapter:
    """One arm, from images to rows. Arms share what they share: each stage is made once, whoever asks first."""
    recipe = recipe.with_threat_everywhere()
    real = recipe.data.load()
    told: dict[str, Artifact] = {}
    chosen = None
    if arm is not Arm.REAL:
        told["teacher"] = once(train_classifier, recipe.teacher, real, None, seed=seed)
        if arm is Arm.GAUSSIAN:
            told["synthetic"] = once(gaussian_control, recipe.control, real, seed=seed)
        else:
            told["denoiser"] = once(train_denoiser, recipe.denoiser, real, seed=seed)
            told |= _diffused(recipe, arm, seed, once, told)
        told["labelled"] = once(label, recipe.labeling, told["synthetic"], told["teacher"])
        chosen = told["chosen"] = once(select, recipe.selection, told["synthetic"], told["labelled"])
    told["student"] = once(train_classifier, recipe.student, real, chosen, seed=seed)
    told["rows"] = once(evaluate, recipe.evaluation, told["student"], real, seed=seed)
    return Chapter(arm, seed, told)


def _diffused(recipe: Recipe, arm: Arm, seed: int, once: Once, told: dict[str, Artifact]) -> dict[str, Artifact]:
    """Plain or guided images from the denoiser, the same noise for both."""
    real = recipe.data.load()
    if arm is Arm.PLAIN:
        plain = replace(recipe.generation, guidance=None)
        return {"synthetic": once(generate, plain, real, told["denoiser"], None, seed=seed)}
    robust = recipe.encoder == "robust"
    encoder = once(train_classifier, recipe.student, real, None, seed=seed) if robust else told["teacher"]
    synthetic = once(generate, recipe.generation, real, told["denoiser"], encoder, seed=seed)
    return {"encoder": encoder, "synthetic": synthetic}


def prepare_denoiser(recipe: Recipe, seed: int, once: Once) -> None:
    """The longest stage that arms share, started beside the arms that do not need it."""
    once(train_denoiser, recipe.denoiser, recipe.data.load(), seed=seed)
