"""Which images of a labelled set become train, validation and test: by class, by group, at most so many, no twins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gambeson.data.imageset import balanced_part, held_out
from gambeson.errors import require
from gambeson.randomness import derive

Places = np.ndarray
"""int64 [n]: which images of a part, ascending."""


@dataclass(frozen=True)
class Portions:
    """Places in the one part that was given: what is left to train on, and what was split off (None: nothing was)."""

    train: Places
    validation: Places | None
    test: Places | None


def parted(
    labels: np.ndarray,
    names: Sequence[str],
    shares: tuple[float | None, float | None],
    seed: int,
    groups: np.ndarray | None = None,
) -> Portions:
    """Test and then validation split off by their shares (validation, test; None: that part is there already).

    labels int64 [N]. Stratified; with `groups` [N] whole groups of a class go, a share of the groups and not of the
    images. UserError where a class would be empty in a part.
    """
    rest, found = np.arange(len(labels)), dict[str, Places]()
    for kind, share in (("test", shares[1]), ("validation", shares[0])):
        if share is None:
            continue
        seeded, field = derive(seed, f"{kind} split"), f"data.{kind}_share"
        if groups is None:
            found[kind], rest = held_out(labels, rest, round(share * len(rest)), seeded, names, field)
        else:
            held = groups_held_out(labels[rest], groups[rest], share, seeded, names, field)
            found[kind], rest = rest[held], rest[~held]
    return Portions(rest, found.get("validation"), found.get("test"))


def groups_held_out(
    labels: np.ndarray, groups: np.ndarray, share: float, seed: int, names: Sequence[str], field: str
) -> np.ndarray:
    """bool [N]: whether an image's group is of the `share` of its class's groups (at least one) that are held out.

    A group is what has the same class and the same entry of `groups` [N]: one thing that several pictures show.
    UserError naming `field` for a class with a single group.
    """
    generator, held = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels).tolist():
        own = labels == label
        members = np.unique(groups[own])
        require(len(members) > 1, field, f"at least 2 groups of images of {names[label]}, one to hold out", 1)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held |= own & np.isin(groups, members[generator.permutation(len(members))[:count]])
    return held


def twins(
    pixels: np.ndarray, others: np.ndarray, labels: np.ndarray | None = None, groups: np.ndarray | None = None
) -> np.ndarray:
    """bool [N]: which of the images [N, ...] are, byte for byte, among the others.

    With labels and groups [N] it is all images of a group that holds such a one.
    """
    known = {image.tobytes() for image in others}
    found = np.array([image.tobytes() in known for image in pixels], bool)
    if groups is None or labels is None:
        return found
    shown = np.zeros(len(found), bool)
    for label in np.unique(labels[found]).tolist():
        own = labels == label
        shown |= own & np.isin(groups, np.unique(groups[found & own]))
    return shown


def balanced(labels: np.ndarray, places: Places, count: int, seed: int, names: Sequence[str]) -> Places:
    """`count` of the places, the same number of each class (0: all). A smaller part lies in a larger one."""
    seeded = derive(seed, "train part")
    return balanced_part(labels, places, count, seeded, names, "data.train_images") if count else places


def at_most(labels: np.ndarray, places: Places, count: int, seed: int, names: Sequence[str], field: str) -> Places:
    """`count` of the places, stratified (0, or no fewer than there are: all). UserError where a class would be lost."""
    if not count or count >= len(places):
        return places
    return held_out(labels, places, count, derive(seed, f"{field} part"), names, field)[0]
