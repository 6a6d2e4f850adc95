"""Accuracy under common corruptions: a row for each corruption, severity and image, and the means of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gambeson.data.corruptions import CORRUPTIONS, SEVERITIES
from gambeson.errors import require
from gambeson.randomness import image_keys
from gambeson.robustness.attack_losses import Network
from gambeson.robustness.inputs import attack_input_checks, logits_of
from gambeson.types import Images, Labels, Progress, silent

Columns = dict[str, np.ndarray]
"""Rows by column: corruption, severity, index (of the image), right (whether it is classified as its label)."""


def corruption_accuracy(
    model: Network,
    images: Images,
    labels: Labels,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress = silent,
) -> Columns:
    """One row for each corruption of `CORRUPTIONS`, severity and image, in this order.

    An image goes bad in the same way whatever the batch size, order and device. progress is told (corruptions and
    severities done, all of them). Raises ValueError for a model in training mode and for inputs out of form, UserError
    for images that cannot be corrupted and for no severity.
    """
    attack_input_checks(images, labels)
    require(len(severities) > 0, "severities", "at least one of 1 to 5", list(severities))
    keys = image_keys(images, labels, seed)
    plan = [(name, severity) for name in CORRUPTIONS for severity in severities]
    verdicts = []
    for done, (name, severity) in enumerate(plan):
        for x, y, k in zip(*(part.split(batch_size) for part in (images, labels, keys)), strict=True):
            verdicts.append((logits_of(model, CORRUPTIONS[name](x, k, severity), batch_size).argmax(1) == y).cpu())
        progress(done + 1, len(plan))
    n = len(images)
    return {
        "corruption": np.repeat([name for name, _ in plan], n),
        "severity": np.repeat([severity for _, severity in plan], n),
        "index": np.tile(np.arange(n), len(plan)),
        "right": torch.cat(verdicts).numpy(),
    }


def mean_accuracies(rows: Columns) -> dict[str, float]:
    """Accuracy under each corruption, over its severities, and as `mean` the mean over the corruptions.

    1 - mean is the unnormalised mean corruption error: without the division by AlexNet's errors of Hendrycks &
    Dietterich 2019, section 4.2, as is usual for CIFAR-10-C.
    """
    names = dict.fromkeys(rows["corruption"].tolist())
    found = {name: float(rows["right"][rows["corruption"] == name].mean()) for name in names}
    return found | {"mean": sum(found.values()) / len(found)}
