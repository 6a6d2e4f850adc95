"""Chooses the digits recipe's numbers without ever reading the test images.

Three folds over the 450 images that are not test (300 train, 150 held out each); one robust accuracy per fold and seed,
PGD-40 with 2 restarts and margin loss, on the held-out images. `python dev/tune_digits.py NAME ARM SEEDS [OVERRIDES]`
takes any override of the recipe and prints one JSON line. Results are kept in dev/LOG.md.
"""

import json
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gambeson import overrides
from gambeson.data.datasets import Digits, ImageSet, Split
from gambeson.models.classifiers import load_classifier
from gambeson.pipeline import tell
from gambeson.recipe import Arm
from gambeson.recipes import named
from gambeson.robustness.attacks import PGD
from gambeson.robustness.verdicts import robust_after
from gambeson.store import Artifact, Store

torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class Fold(Digits):
    """Digits with another third of train + validation held out, and that third standing in for test."""

    fold: int = 0

    def load(self) -> ImageSet:
        whole = Digits().load()
        images = torch.cat([whole.train.images, whole.validation.images])
        labels = torch.cat([whole.train.labels, whole.validation.labels])
        order = torch.cat([(labels == k).nonzero()[:, 0] for k in range(10)])
        held = torch.zeros(len(labels), dtype=torch.bool)
        held[order[self.fold :: 3]] = True
        part = Split(images[held], labels[held])
        return replace(whole, train=Split(images[~held], labels[~held]), validation=part, test=part)


class NoRows(Exception):
    """Raised instead of evaluating: the tuner measures by itself."""


def main() -> None:
    name, arm, seeds, argv = sys.argv[1], Arm(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    recipe = overrides.parse(named("digits"), argv, prog="tune")
    store = Store(Path(tempfile.gettempdir()) / "gambeson-tune")
    clean, robust, start = [], [], time.time()

    def once(stage, *arguments, **options) -> Artifact:
        if stage.name == "evaluate":
            model = load_classifier(arguments[1].file("classifier.safetensors"))
            part = arguments[2].validation
            clean.append((model(part.images).argmax(1) == part.labels).float().mean().item())
            attack = PGD(threat=recipe.threat, steps=40, restarts=2)
            robust.append(robust_after(attack, model, part.images, part.labels).float().mean().item())
            raise NoRows
        return store.once(stage, *arguments, **options)

    for fold in range(3):
        for seed in range(seeds):
            with suppress(NoRows):
                tell(replace(recipe, data=Fold(fold=fold)), arm, seed, once)
    result = {"name": name, "arm": arm.value, "overrides": argv, "clean": clean, "robust": robust}
    means = {"mean_clean": sum(clean) / len(clean), "mean_robust": sum(robust) / len(robust)}
    print(json.dumps({**means, "seconds": round(time.time() - start), **result}), flush=True)


main()
