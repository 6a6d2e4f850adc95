"""What the page shows of images: samples with their scores and nearest train images, and adversarial examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from gambeson.report.images import pictures, smaller, sparser
from gambeson.report.material import Adversarial, Grids, RunMaterial

MOST_CLASSES, MOST_IMAGES, SAMPLE_SIDE = 20, 10, 48
MOST_PICTURES = 400
"""Samples and nearest images together."""
MOST_SETS, MOST_EXAMPLES, EXAMPLE_SIDE = 6, 8, 56
MOST_MAGNIFIED = 100


@dataclass(frozen=True)
class Sample:
    """One sample: its picture, its score, and the nearest train image with its distance, in words ('': not known)."""

    source: str
    score: str
    nearest: str
    distance: str


@dataclass(frozen=True)
class GridRow:
    """The samples of one class; None where a set of samples is missing."""

    class_name: str
    plain: list[Sample] | None
    guided: list[Sample] | None


@dataclass(frozen=True)
class Example:
    """An adversarial example: three pictures, and the label and predictions as names."""

    index: int
    image: str
    change: str
    attacked: str
    label: str
    before: str
    after: str
    withstood: bool
    largest: int  # change of a pixel, of 255


@dataclass(frozen=True)
class ExampleSet:
    """What one attack made of some test images of one student, the change `factor` times as large as it is."""

    arm: str
    seed: int
    attack: str
    factor: int
    left_out: int
    shrunk: str
    examples: list[Example]


def grid(grids: Grids | None, class_names: Sequence[str]) -> list[GridRow]:
    """A row for each class shown (at most 20, and at most 400 pictures in all); none without samples."""
    if grids is None or _shape(grids) is None:
        return []
    classes, k = _shown(grids)
    groups = [_group(each, classes, k) for each in _parts(grids)]
    plain, plain_nearest, guided, guided_nearest = pictures(groups)
    sets = [
        _samples(plain, plain_nearest, grids.plain_scores, grids.plain_distance, classes, k),
        _samples(guided, guided_nearest, grids.guided_scores, grids.guided_distance, classes, k),
    ]
    names = [class_names[c] for c in (grids.classes or range(len(class_names)))[:classes]]
    return [GridRow(name, sets[0][place], sets[1][place]) for place, name in enumerate(names)]


def grid_note(grids: Grids | None) -> str:
    """How the grid is to be read, and what it leaves out."""
    shape = _shape(grids)
    if grids is None or shape is None:
        return ""
    both = grids.plain is not None and grids.guided is not None
    note = "Each guided image stands at the place of the plain image drawn from the same noise. " if both else ""
    shown = _shown(grids)
    if shown[0] < shape[0] or shown[1] < shape[1]:
        note += f"Shown: the first {shown[0]} of {shape[0]} classes, {shown[1]} of {shape[1]} images per class. "
    if grids.sorted_by:
        note += f"The images were generated without a class: a row has those that the {grids.sorted_by} arm labels so. "
    if grids.sorted_by or (grids.classes and len(grids.classes) <= max(grids.classes)):
        note += "A class without a synthetic image has no row. "
    if grids.score_name:
        note += f"Below each image: its {grids.score_name} score, which selection goes by. "
    if grids.plain_nearest is not None or grids.guided_nearest is not None:
        space = f" ({grids.space})" if grids.space else ""
        note += f"Point at an image, tap it or reach it by Tab for the nearest train image and its distance{space}. "
    note += f"{grids.shrunk.rstrip('. ')}. " if grids.shrunk else ""
    return note + "The first samples, not chosen ones; before labelling and selection."


def example_sets(material: RunMaterial, names: Sequence[str]) -> list[ExampleSet]:
    """The adversarial examples, at most six sets of eight; `names` are those of the classes."""
    titles = {arm.key: arm.title for arm in material.arms}
    some = [each for each in material.adversarial if len(each.images)]
    return [_example_set(each, titles.get(each.arm, each.arm), names) for each in some[:MOST_SETS]]


def magnified(
    images: UInt8[np.ndarray, "n h w c"], attacked: UInt8[np.ndarray, "n h w c"]
) -> tuple[int, UInt8[np.ndarray, "n h w c"]]:
    """(factor, pictures): attacked minus image times the largest whole factor that stays in range, around middle grey.

    One factor for all of them (at most 100), so that they can be compared; 1 where nothing was changed.
    """
    change = attacked.astype(np.int16) - images.astype(np.int16)
    largest = int(np.abs(change).max(initial=0))
    factor = min(MOST_MAGNIFIED, max(1, 127 // largest)) if largest else 1
    return factor, np.clip(128 + factor * change.astype(np.int32), 0, 255).astype(np.uint8)


def _example_set(found: Adversarial, title: str, names: Sequence[str]) -> ExampleSet:
    chosen = _some(found.withstood)
    images, attacked = found.images[chosen], found.attacked[chosen]
    factor, change = magnified(images, attacked)
    largest = np.abs(attacked.astype(int) - images).reshape(len(chosen), -1).max(1, initial=0)
    drawn = pictures([sparser(part, EXAMPLE_SIDE) for part in (images, change, attacked)])
    examples = []
    for place, i in enumerate(chosen):
        label, before, after = _called(found, i, names)
        example = Example(
            index=int(found.indices[i]),
            image=drawn[0][place],
            change=drawn[1][place],
            attacked=drawn[2][place],
            label=label,
            before=before,
            after=after,
            withstood=bool(found.withstood[i]),
            largest=int(largest[place]),
        )
        examples.append(example)
    shrunk = found.shrunk
    if not shrunk and max(images.shape[1:3]) > EXAMPLE_SIDE:
        shrunk = f"Of the {images.shape[2]}x{images.shape[1]} pixels only every few are shown, none averaged"
    return ExampleSet(title, found.seed, found.attack, factor, len(found.images) - len(chosen), shrunk, examples)


def _called(found: Adversarial, place: int, names: Sequence[str]) -> tuple[str, str, str]:
    classes = (found.labels[place], found.predictions[place], found.attacked_predictions[place])
    label, before, after = (names[int(k)] if 0 <= k < len(names) else f"class {k}" for k in classes)
    return label, before, after


def _some(withstood: np.ndarray) -> list[int]:
    """At most eight places, broken first: four of each kind, more of one where the other has fewer."""
    broken, held = np.flatnonzero(~withstood), np.flatnonzero(withstood)
    half = MOST_EXAMPLES // 2
    of_broken = broken[: max(half, MOST_EXAMPLES - len(held))]
    return [int(i) for i in (*of_broken, *held[: MOST_EXAMPLES - len(of_broken)])]


def _shape(grids: Grids | None) -> tuple[int, ...] | None:
    images = None if grids is None else grids.plain if grids.plain is not None else grids.guided
    return None if images is None or not images.size else images.shape


def _parts(grids: Grids) -> tuple[np.ndarray | None, ...]:
    return grids.plain, grids.plain_nearest, grids.guided, grids.guided_nearest


def _shown(grids: Grids) -> tuple[int, int]:
    """How many classes, and images of each, go onto the page."""
    shape = _shape(grids)
    assert shape is not None
    classes = min(shape[0], MOST_CLASSES)
    most = MOST_PICTURES // max(1, classes * sum(each is not None for each in _parts(grids)))
    return classes, max(1, min(shape[1], MOST_IMAGES, most))


def _group(
    images: UInt8[np.ndarray, "classes k h w c"] | None, classes: int, k: int
) -> UInt8[np.ndarray, "n h2 w2 c2"]:
    if images is None:
        return np.zeros((0, 1, 1, 1), np.uint8)
    return smaller(images[:classes, :k].reshape(-1, *images.shape[2:]), SAMPLE_SIDE)


def _samples(
    drawn: list[str],
    nearest: list[str],
    scores: Float[np.ndarray, "classes k"] | None,
    distance: Float[np.ndarray, "classes k"] | None,
    classes: int,
    k: int,
) -> list[list[Sample] | None]:
    """[classes][k] samples; None for each class without pictures."""
    if not drawn:
        return [None] * classes
    told = [_numbers(values, classes, k) for values in (scores, distance)]
    near = nearest or [""] * len(drawn)
    flat = [Sample(*each) for each in zip(drawn, told[0], near, told[1], strict=True)]
    return [flat[place * k : (place + 1) * k] for place in range(classes)]


def _numbers(values: Float[np.ndarray, "classes k"] | None, classes: int, k: int) -> list[str]:
    if values is None:
        return [""] * (classes * k)
    return [_short(float(value)) for value in values[:classes, :k].ravel()]


def _short(value: float) -> str:
    """A number in at most seven characters: '0.935', '12.3', '1e-05', an en dash for none."""
    text = f"{value:.3g}"
    return "–" if not np.isfinite(value) else f"{value:.0e}" if "e" in text or len(text) > 7 else text
