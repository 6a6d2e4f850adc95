"""How a classifier in training is measured: clean and robust accuracy on the part of train that is held out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gambeson import distributed
from gambeson.data.imageset import ImageSet, Split
from gambeson.errors import UserError
from gambeson.randomness import gaussian, image_keys
from gambeson.robustness.attacks import PGD
from gambeson.threat import ThreatModel


def check_validation(real: ImageSet) -> None:
    """Raises UserError where a class has no validation image: a choice by such images would not see that class."""
    present = set(real.validation.labels.tolist())
    missing = [name for k, name in enumerate(real.class_names) if k not in present]
    if missing:
        raise UserError(
            f"validation images of {real.name}: expected at least one of each of the {len(real.class_names)} classes, "
            f"got none of {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}. Hold more images out of train "
            "(the data set's validation option), or give these classes more images"
        )


def validate(
    model: nn.Module, part: Split, threat: ThreatModel | None, steps: int, batch_size: int
) -> dict[str, float]:
    """Clean and PGD accuracy of a model in eval mode on these images (margin loss, one start).

    As many images at a time as a training batch has: what fits there fits here. Processes that train together share
    the images out; the verdict of an image does not depend on where it is attacked.
    """
    model.eval()
    attack, device = PGD(threat=threat, steps=steps, restarts=1), next(model.parameters()).device
    right = {"clean": 0, "robust": 0}
    images, labels = (t.tensor_split(distributed.world())[distributed.rank()] for t in (part.images, part.labels))
    with distributed.apart():
        for some, own in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            if not len(some):
                continue  # more processes than images
            some, own = some.to(device), own.to(device)
            attacked = attack(model, some, own)
            with torch.no_grad():
                right["clean"] += int((model(some).argmax(1) == own).sum())
                right["robust"] += int((model(attacked).argmax(1) == own).sum())
    return {name: distributed.total(float(count)) / len(part) for name, count in right.items()}


def noisy_accuracy(model: nn.Module, part: Split, sigma: float, batch_size: int) -> float:
    """Accuracy of a model in eval mode under one draw of Gaussian noise, the same for an image whenever it is asked.

    The share of noisy copies that a smoothed classifier's network gets right: what its certificates are made of.
    """
    model.eval()
    device, right = next(model.parameters()).device, 0
    images, labels = (t.tensor_split(distributed.world())[distributed.rank()] for t in (part.images, part.labels))
    with distributed.apart(), torch.no_grad():
        for some, own in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            if not len(some):
                continue  # more processes than images
            keys = image_keys(some, torch.zeros_like(own))
            noise = gaussian(keys, "validation", tuple(some.shape[1:]), torch.zeros_like(own))
            found = model((some + sigma * noise).to(device)).argmax(1)
            right += int((found == own.to(device)).sum())
    return distributed.total(float(right)) / len(part)


def best_of(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The record with the highest `score_of`; of equal ones the first."""
    return max(log, key=score_of)


def score_of(record: dict[str, Any]) -> float:
    """What a validation is judged by: robust accuracy, or accuracy under noise where that was trained against."""
    return record.get("noisy", record["robust"])
