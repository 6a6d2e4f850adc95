"""`gambeson theory --features RECIPE`: real, plain and guided images of a recipe through its teacher, and the study."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gambeson.data.synthetic import SyntheticStore
from gambeson.models.classifiers import load_classifier
from gambeson.theory.features import Features, Study, study

if TYPE_CHECKING:
    from gambeson.recipe import Recipe
    from gambeson.store import Artifact

MOST = 20_000
"""Synthetic images that are looked at, the first ones of a store."""
_BATCH = 500


def of_images(name: str, model: Any, images: Tensor, labels: Tensor) -> Features:
    """The model's penultimate features of images [N, C, H, W] in [0, 1]."""
    with torch.no_grad():
        values = torch.cat([model.features(part).double() for part in images.split(_BATCH)])
    return Features(name=name, values=values, labels=labels)


def of_store(name: str, model: Any, store: SyntheticStore) -> Features:
    """Features of the first images of a store; the label of one made without a class is the model's."""
    pixels, labels = store.stretch(0, min(len(store), MOST))
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    known = torch.from_numpy(np.asarray(labels)).long()
    if bool((known < 0).any()):
        with torch.no_grad():
            known = torch.cat([model(part).argmax(1) for part in images.split(_BATCH)])
    return of_images(name, model, images, known)


def halves(features: Features) -> tuple[Features, Features]:
    """Every second image of each class: what the theory is told of, and what heads are measured on."""
    place = torch.zeros(len(features.labels), dtype=torch.int64)
    for k in range(len(features.counts)):
        own = (features.labels == k).nonzero()[:, 0]
        place[own] = torch.arange(len(own))
    return tuple(  # type: ignore[return-value]
        Features(name=name, values=features.values[place % 2 == part], labels=features.labels[place % 2 == part])
        for part, name in enumerate(("world", "held out"))
    )


def of_recipe(recipe: Recipe, once: Callable[..., Artifact]) -> dict[str, Any]:
    """The study on a recipe's own stages (found in the store or made): teacher, plain and guided images; JSON.

    Real test images stand for the real world, one half for the theory, the other for the measurement; heads are learned
    from train, plain and guided images.
    """
    from gambeson.pipeline import diffuse
    from gambeson.recipe import Arm
    from gambeson.training.classifier import train_classifier

    recipe = recipe.with_threat_everywhere()
    real, seed = recipe.data.load(), recipe.seed
    teacher = once(train_classifier, recipe.teacher, real, None, seed=seed)
    model = load_classifier(teacher.file("classifier.safetensors"))
    sets = [of_images("real", model, real.train.images, real.train.labels)]
    for arm in (Arm.PLAIN, Arm.GUIDED):
        made = diffuse(recipe, arm, seed, once)["synthetic"]
        sets.append(of_store(str(arm.value), model, SyntheticStore.open(made.folder / "images")))
    world, held_out = halves(of_images("test", model, real.test.images, real.test.labels))
    found = study(world, held_out, sets, Study(seed=seed))
    return {"recipe": recipe.name, "recipe_digest": recipe.digest, "teacher": teacher.digest, **found}
