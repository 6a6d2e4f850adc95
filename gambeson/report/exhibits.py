"""What the trained students show: adversarial examples, confusion under attack, and their own features of test images.

Deterministic on one machine: the attack is the evaluation's PGD, whose draws belong to the image.
On CUDA where that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gambeson.data.imageset import Split
from gambeson.data.mixture import to_uint8
from gambeson.errors import require
from gambeson.models.network import ClassifierNetwork
from gambeson.report.material import Adversarial, Confusion, FeatureSet
from gambeson.robustness.attacks import PGD
from gambeson.robustness.evaluate import spread

EACH = 4
"""Adversarial examples of each kind, withstood and broken."""
FEATURED = 300
"""Test images whose features are shown."""
DIMENSIONS = 64
"""Principal components that are kept of wider features: t-SNE needs no more."""
SIDE = 56
"""Pixels on a side that adversarial examples are shown with at most."""
BUDGET = 2e12
"""Floating-point operations for the confusion of one arm: half a minute on one core; on CUDA 100 times as many."""
MOST = 2000
"""Test images for the confusion of one arm, over all its seeds: small networks cost time besides operations."""
FEWEST = 50
"""Test images below which a confusion says too little."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """A trained student with its rows of the test images, in their order."""

    seed: int
    model: ClassifierNetwork
    rows: pa.Table

    @property
    def predictions(self) -> np.ndarray:
        """[N] int64 on the clean images."""
        return self.rows["prediction"].to_numpy()

    @property
    def kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the images that withstood PGD, and of those that are right and were broken."""
        right = self.predictions == self.rows["label"].to_numpy()
        stood = self.rows["pgd"].to_numpy(zero_copy_only=False).astype(bool)
        return np.flatnonzero(right & stood), np.flatnonzero(right & ~stood)


def words(attack: PGD) -> str:
    """An attack in words: 'PGD, 40 steps, 3 restarts, margin loss'."""
    name = type(attack.loss).__name__
    loss = {"Margin": "margin", "CrossEntropy": "cross-entropy"}.get(name, name)
    return f"PGD, {attack.steps} steps, {attack.restarts} restart{'s' * (attack.restarts != 1)}, {loss} loss"


def device() -> str:
    """Where the page's networks compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def budget(on_cpu: float) -> float:
    """Floating-point operations that there are on this device."""
    return on_cpu if device() == "cpu" else 100 * on_cpu


def operations(model: nn.Module, image: Tensor) -> float:
    """Floating-point operations that a network takes for one image [1, C, H, W]."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return float(counter.get_total_flops())


def adversarial(arm: str, attack: PGD, student: Student, test: Split) -> Adversarial:
    """The first test images of each kind, by the evaluation's rows, attacked once more as the evaluation did it."""
    places = np.sort(np.concatenate([found[:EACH] for found in student.kinds]))
    images, labels = test.images[places], test.labels[places]
    attacked = _attacked(attack, student, images, labels)
    every = max(-(-max(images.shape[2:]) // SIDE), 1)
    size = f"{images.shape[3]} x {images.shape[2]} pixels"
    shrunk = f"Of the {size} only every {_ordinal(every)} row and column is shown, none averaged"
    return Adversarial(
        arm=arm,
        seed=student.seed,
        attack=words(attack),
        images=to_uint8(_thinned(images, every)),
        attacked=to_uint8(_thinned(attacked, every)),
        labels=labels.numpy(),
        predictions=_predicted(student.model, images),
        attacked_predictions=_predicted(student.model, attacked),
        indices=places,
        shrunk=shrunk if every > 1 else "",
    )


def confusion(arm: str, attack: PGD, students: Sequence[Student], test: Split, classes: int) -> Confusion:
    """Counts over all students and test images; over the first student and some images, evenly spread, where attacking
    all would take long.

    Only images that are right and that the evaluation broke are attacked again: the others' predictions are known.
    Raises ValueError where the budget is not enough for a useful number of images.
    """
    price = (
        3 * attack.steps * operations(students[0].model, test.images[:1].to(device()))
    )  # a gradient costs three passes
    affordable = min(int(2 * budget(BUDGET) / price), MOST)  # about half have to be attacked, each by about one climb
    if affordable < len(test) * len(students):
        students = students[:1]
    places = spread(len(test), affordable) if affordable else np.empty(0, int)
    if len(places) < min(FEWEST, len(test)):
        raise ValueError(f"attacking {FEWEST} test images again would take too long for a page ({price:.1e} "
                         "floating-point operations each)")  # fmt: skip
    clean, attacked = np.zeros((2, classes, classes), np.int64)
    for student in students:
        labels, told = test.labels[places].numpy(), student.predictions[places]
        found = told.copy()
        broken = np.isin(places, student.kinds[1])
        found[broken] = _broken(attack, student, test, places[broken])
        np.add.at(clean, (labels, told), 1)
        np.add.at(attacked, (labels, found), 1)
    seeds = tuple(student.seed for student in students)
    return Confusion(arm=arm, seeds=seeds, attack=words(attack), clean=clean, attacked=attacked)


def features(title: str, model: ClassifierNetwork, test: Split) -> FeatureSet:
    """Test images in a student's own features, before its last layer (CDP, Figure 6)."""
    places = spread(len(test), FEATURED)
    found, labels = embedded(model, test.images[places]), test.labels[places].numpy()
    space = f"the student of {title}, penultimate layer"
    return narrowed([FeatureSet(name=title, features=found, labels=labels, space=space)])[0]


def embedded(model: ClassifierNetwork, images: Tensor) -> np.ndarray:
    """[n, D] float32 activations before the last layer."""
    with torch.no_grad():
        return torch.cat([model.features(part.to(device())).float().cpu() for part in images.split(100)]).numpy()


def narrowed(sets: Sequence[FeatureSet]) -> list[FeatureSet]:
    """The same sets; wider ones in the first principal components of all of them together, which `space` then says."""
    if not sets or sets[0].features.shape[1] <= DIMENSIONS:
        return list(sets)
    together = np.concatenate([each.features for each in sets]).astype(np.float64)
    centred = together - together.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:DIMENSIONS] * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:DIMENSIONS, None]
    parts = np.split((centred @ axes.T).astype(np.float32), np.cumsum([len(each.labels) for each in sets])[:-1])
    space = f"{sets[0].space}, its first {len(axes)} principal components"
    return [FeatureSet(name=s.name, features=p, labels=s.labels, space=space) for s, p in zip(sets, parts, strict=True)]


def checked(rows: pa.Table, test: Split) -> pa.Table:
    """Rows of one seed in the order of the test images. UserError where they are those of other images."""
    ordered = rows.sort_by("index")
    fits = np.array_equal(ordered["index"].to_numpy(), np.arange(len(test)))
    fits = fits and np.array_equal(ordered["label"].to_numpy(), test.labels.numpy())
    require(fits, "rows", f"one for each of {len(test)} test images, with their labels", f"{len(rows)} others")
    return ordered


def _broken(attack: PGD, student: Student, test: Split, places: np.ndarray) -> np.ndarray:
    """Predictions under attack of these images."""
    found = [np.empty(0, np.int64)]
    for part in torch.from_numpy(places).split(256):
        images, labels = test.images[part], test.labels[part]
        found.append(_predicted(student.model, _attacked(attack, student, images, labels)))
    return np.concatenate(found)


def _attacked(attack: PGD, student: Student, images: Tensor, labels: Tensor) -> Tensor:
    """As the evaluation attacked them; none for no image."""
    if not len(images):
        return images
    return attack(student.model, images.to(device()), labels.to(device()), seed=student.seed).cpu()


def _predicted(model: ClassifierNetwork, images: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(images.to(device())).argmax(1).cpu().numpy() if len(images) else np.empty(0, np.int64)


def _thinned(images: Tensor, every: int) -> Tensor:
    """Every so many rows and columns: the pixels that are left are as they were."""
    return images[:, :, every // 2 :: every, every // 2 :: every]


def _ordinal(n: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(n, f"{n}th")
