"""Classifiers that label synthetic images: ours, RobustBench's, somebody's program, or several together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gambeson.data.exchange.stores import Source
from gambeson.data.mixture import check_names, from_uint8
from gambeson.errors import UserError, require
from gambeson.models.classifiers import load_classifier
from gambeson.models.memory import lacks_memory
from gambeson.robustness.attack_losses import Network
from gambeson.robustness.inputs import NotFinite, logits_of
from gambeson.robustness.subjects import OURS, Named, Ours
from gambeson.store import Artifact
from gambeson.types import Images, Logits

TeacherFiles = Artifact | Named
"""A classifier that was trained by a stage, or any that `gambeson.robustness.subjects.subject_of` finds."""


@dataclass(frozen=True)
class Teacher:
    """One classifier, opened: what a reader is told that it is, the digest of its content, and its logits.

    names: of its classes, where its file has them.
    """

    title: str
    digest: str
    classes: int
    model: Network
    names: tuple[str, ...] = ()

    def logits(self, images: Images, first: int) -> Logits:
        """[B, K] float32 on the CPU. UserError for an answer that is not finite; first: the first image's position."""
        try:
            found = logits_of(self.model, images, len(images))
        except NotFinite as error:
            raise UserError(
                f"{self.title}: expected finite logits of every image, got NaN or infinity among those of images "
                f"{first} to {first + len(images) - 1}; usually its training diverged: take another teacher"
            ) from error
        require(found.shape[1] == self.classes, self.title, f"logits of {self.classes} classes", found.shape[1])
        return found.float().cpu()


def together(logits: Sequence[Logits]) -> Logits:
    """[B, K]: the logs of the mean of the teachers' probabilities; of one teacher its own logits, as they are."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))


def open_teachers(given: Sequence[TeacherFiles], source: Source, names: Sequence[str], device: str) -> list[Teacher]:
    """The teachers on the device, each tried on the first images.

    UserError, naming both, for one of other classes than `names` (empty: not known) or than the other teachers, or of
    the same in another order, for conditions beyond its classes, and for one that does not take these images.
    """
    require(len(given) > 0, "teachers", "at least one classifier", 0)
    require(len(source) > 0, "images to label", "at least one", 0)
    opened = [_opened(each, source, device) for each in given]
    top = int(source.compact_labels.max()) + 1
    for each in opened:
        _check_classes(each, opened[0], names, top)
        _check_names(each, tuple(names), "the images")
        _check_names(each, opened[0].names, opened[0].title)
    return opened


def _check_names(teacher: Teacher, names: tuple[str, ...], wanted_by: str) -> None:
    """UserError where the teacher's file names its classes otherwise."""
    fix = "Take one that was trained on these classes in this order"
    check_names(teacher.names, names, whose=teacher.title, wanted_by=wanted_by, fix=fix)


def _check_classes(teacher: Teacher, first: Teacher, names: Sequence[str], top: int) -> None:
    """UserError for a teacher of other classes than the images or the first teacher; top: the last condition + 1."""
    if names and teacher.classes != len(names):
        raise UserError(
            f"{teacher.title}: expected a classifier of the images' {len(names)} classes ({_shown(names)}), got one "
            f"of {teacher.classes}; take one that was trained on these classes"
        )
    if teacher.classes != first.classes:
        raise UserError(
            f"teachers: expected classifiers of the same classes, got {first.title} of {first.classes} and "
            f"{teacher.title} of {teacher.classes}"
        )
    if top > teacher.classes:
        raise UserError(
            f"{teacher.title}: expected a classifier of the {top} classes or more that the images were generated for, "
            f"got one of {teacher.classes}; take one that was trained on these classes"
        )


def _opened(given: TeacherFiles, source: Source, device: str) -> Teacher:
    """A teacher, tried on two images."""
    if isinstance(given, Artifact):
        subject = Ours(str(given.file(OURS)))
        title, model = f"the teacher ({given.stage} {given.digest[:12]})", load_classifier(given.file(OURS)).to(device)
    else:
        subject, title = given, given.title
        model = given.open(device)
    if isinstance(subject, Ours):
        _check_shape(subject, title, source)
    names = subject.class_names if isinstance(subject, Ours) else ()
    return Teacher(title, subject.digest, _classes(title, model, source, device), model, names)


def _check_shape(subject: Ours, title: str, source: Source) -> None:
    """UserError where the classifier's file says that it was trained on images of another size."""
    height, width, channels = source.shape
    made_for = tuple(subject.saved.facts.get("shape") or (channels, height, width))
    if made_for != (channels, height, width):
        raise UserError(
            f"{title}: expected a classifier of the images' {[channels, height, width]} (channels, height, width), got "
            f"one that was trained on {list(made_for)}; take one for images of this size"
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _classes(title: str, model: Network, source: Source, device: str) -> int:
    """How many classes it answers with. UserError for a classifier that does not take these images."""
    images = from_uint8(source.stretch(0, min(2, len(source)))[0])
    try:
        return logits_of(model, images.to(device)).shape[1]
    except NotFinite:
        raise UserError(
            f"{title}: expected finite logits, got NaN or infinity for the first images; take another teacher"
        ) from None
    except (RuntimeError, ValueError, TypeError) as error:
        if lacks_memory(error):
            raise
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{title}: expected a classifier that takes images {list(images.shape[1:])}, got: {told}. Take one that "
            "was trained on images of this size"
        ) from error
