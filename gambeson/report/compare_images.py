"""Whether two runs were measured on the same test images, and how that is known."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from gambeson import canonical
from gambeson.data.datasets import Data
from gambeson.report.compare_material import PGD, WORST, Contender, ContenderArm
from gambeson.report.compare_recipes import differing
from gambeson.robustness.evaluate import evaluate


@dataclass(frozen=True)
class Sameness:
    """Whether the test images are the same; `why`: how that is known, or in what they differ."""

    same: bool
    why: str


def settled(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders, with the digest of the image set filled in where it can be proved, and of two of them the names
    of the classes where the images are at hand.

    A run that was moved away from its stages knows the digest of each evaluation, which is over the classifier, the
    attacks and the image set: an image set that gives the same digest is the one that was read.
    """
    contenders = [_named(c) if len(contenders) == 2 else c for c in contenders]
    known = dict.fromkeys(c.data_digest for c in contenders if c.data_digest is not None)
    found = []
    for contender in contenders:
        if contender.data_digest is None and contender.kind == "run":
            contender = _proved(contender, [*known, *_own(contender)])
        found.append(contender)
    return found


def _named(contender: Contender) -> Contender:
    """With the names of its classes, where its students do not tell them and its images are at hand."""
    if contender.class_names or contender.recipe is None or not contender.measured:
        return contender
    loaded = _loaded(contender.recipe.data)
    if loaded is None or contender.data_digest not in (None, loaded[0]):
        return contender
    return replace(contender, class_names=loaded[3])


def _own(contender: Contender) -> list[str]:
    """The digest of the images that the recipe names, where they are at hand."""
    if contender.recipe is None or not any(arm.evaluations for arm in contender.arms):
        return []
    loaded = _loaded(contender.recipe.data)
    return [] if loaded is None else [loaded[0]]


def _proved(contender: Contender, candidates: Sequence[str]) -> Contender:
    for data in dict.fromkeys(candidates):
        for revision in range(evaluate.revision, 0, -1):
            if all(_gives(contender, arm, data, revision) for arm in contender.measured) and contender.measured:
                arms = tuple(_with_revision(arm, revision) for arm in contender.arms)
                return replace(contender, data_digest=data, arms=arms)
    return contender


def _gives(contender: Contender, arm: ContenderArm, data: str, revision: int) -> bool:
    """Whether evaluations of these images have the digests that the run recorded."""
    common = arm.evaluations.keys() & arm.students.keys()
    return bool(common) and all(
        canonical.digest(
            {
                "stage": evaluate.name,
                "revision": revision,
                "config": dict(contender.evaluation),
                "inputs": [arm.students[seed], data],
                "seed": seed,
            }
        )
        == arm.evaluations[seed]
        for seed in common
    )


def _with_revision(arm: ContenderArm, revision: int) -> ContenderArm:
    measures = {
        column: replace(m, how={**m.how, "revision": revision}) if column in (PGD, WORST) else m
        for column, m in arm.measures.items()
    }
    return replace(arm, measures=measures)


def same_images(a: Contender, b: Contender) -> Sameness:
    """Whether both were measured on images of the same test set."""
    if a.class_names and b.class_names and a.class_names != b.class_names:
        return Sameness(False, _classes(a.class_names, b.class_names))
    labels = _labels_differ(a, b)
    if labels:
        return Sameness(False, labels)
    if a.data_digest and a.data_digest == b.data_digest:
        return Sameness(True, "the image sets have the same digest")
    if a.data_digest and b.data_digest:
        return _by_loading(a, b)
    if _same_source(a, b):
        return Sameness(True, "the recipes name the same images and labels agree image by image; no digest was kept")
    return _by_loading(a, b)


def _classes(a: tuple[str, ...], b: tuple[str, ...]) -> str:
    if len(a) != len(b):
        return f"the classes differ: {len(a)} against {len(b)}"
    first = next(k for k in range(len(a)) if a[k] != b[k])
    return f"the classes differ: class {first} is {a[first]!r} in one and {b[first]!r} in the other"


def _labels_differ(a: Contender, b: Contender) -> str:
    """In what the labels of the test images differ; empty where they agree."""
    one, two = (next((arm for arm in c.measured if arm.indices is not None), None) for c in (a, b))
    if one is None or two is None or one.indices is None or two.indices is None:
        return ""
    assert one.labels is not None
    assert two.labels is not None
    common, x, y = np.intersect1d(one.indices, two.indices, return_indices=True)
    wrong = int((one.labels[x] != two.labels[y]).sum())
    counts = f"{len(one.indices):,} against {len(two.indices):,}"
    if wrong:
        there = f"{wrong:,} of the {len(common):,} at the same places have other labels"
        return f"the test images differ: {counts}, and {there}"
    whole = a.kind == b.kind == "run"
    return f"the test images differ: {counts}" if whole and len(one.indices) != len(two.indices) else ""


def _same_source(a: Contender, b: Contender) -> bool:
    """Whether the recipes name the same images; an evaluation only knows a name."""
    if a.kind == b.kind:
        return bool(a.data) and not differing([a.data, b.data])
    run, alone = (a, b) if a.kind == "run" else (b, a)
    loaded = None if run.recipe is None else _loaded(run.recipe.data)
    return loaded is not None and loaded[2] == alone.data.get("name")


def _by_loading(a: Contender, b: Contender) -> Sameness:
    """By the test images themselves, where both recipes can be read, their images are at hand and the ones measured."""
    fields = ", ".join(f"data.{f.path} {f.values[0]} against {f.values[1]}" for f in differing([a.data, b.data])[:3])
    told = f"the images differ ({fields})" if fields else "the image sets have different digests"
    tests = [_test_images(c) for c in (a, b)]
    if None in tests:
        return Sameness(False, f"{told}, and whether the test images are the same cannot be told")
    if tests[0] == tests[1]:
        return Sameness(True, f"{told}, but the test images are the same: their pixels and labels were compared")
    return Sameness(False, f"the test images differ, {told}")


def _test_images(contender: Contender) -> str | None:
    """A digest of the test part; None where the images are not at hand, or not those that were measured."""
    loaded = None if contender.recipe is None else _loaded(contender.recipe.data)
    return None if loaded is None or contender.data_digest not in (None, loaded[0]) else loaded[1]


@cache
def _loaded(data: Data) -> tuple[str, str, str, tuple[str, ...]] | None:
    """Digests of an image set and of its test part, its name and its classes; None where it cannot be read."""
    try:
        real: Any = data.load()
    except (OSError, ValueError, ImportError, MemoryError):
        return None
    state = hashlib.sha256(np.ascontiguousarray(real.test.images.numpy()).data)
    state.update(np.ascontiguousarray(real.test.labels.numpy()).data)
    return real.digest, state.hexdigest(), real.name, real.class_names
