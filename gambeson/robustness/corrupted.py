"""Accuracy under common corruptions as a stage: one row per corruption, severity and test image."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.corruptions import CORRUPTIONS, SEVERITIES
from gambeson.data.imageset import ImageSet
from gambeson.disk import atomic
from gambeson.errors import require
from gambeson.randomness import derive
from gambeson.robustness.assess import Subject, spread
from gambeson.robustness.common_corruptions import corruption_accuracy
from gambeson.store import Workspace, stage

ROWS = "corruptions.parquet"
"""The file that the stage writes."""


@dataclass(frozen=True, kw_only=True)
class Corrupting:
    """Which corruptions, on which test images."""

    severities: tuple[int, ...] = SEVERITIES  # of 1 to 5
    images: int | None = None  # test images, spread evenly; none: all
    batch_size: int = 256  # images in the network at once

    def __post_init__(self) -> None:
        good = bool(self.severities) and set(self.severities) <= set(SEVERITIES)
        require(good, "corruptions, severities", "some of 1, 2, 3, 4, 5", self.severities)
        require(self.images is None or self.images >= 1, "corruptions, images", "none (all) or above 0", self.images)
        require(self.batch_size >= 1, "corruptions, batch_size", "above 0", self.batch_size)


@stage(revision=1, reads_test=True)
def corrupt(work: Workspace, spec: Corrupting, subject: Subject, real: ImageSet, *, seed: int) -> None:
    """Writes corruptions.parquet: corruption, severity, index (of the test image), right."""
    index = spread(len(real.test), spec.images or len(real.test))
    images, labels = (part[index].to(work.machine.device) for part in (real.test.images, real.test.labels))
    model, drawn = subject.open(work.machine.device), derive(seed, "corruptions")
    found = corruption_accuracy(model, images, labels, spec.severities, drawn, spec.batch_size, work.progress)
    with atomic(work.folder / ROWS) as temporary:
        pq.write_table(pa.table(found | {"index": index[found["index"]]}), temporary)


def counts(rows: pa.Table) -> dict[str, dict[int, tuple[int, int]]]:
    """Corruption -> severity -> (images right, images)."""
    grouped = rows.group_by(["corruption", "severity"]).aggregate([("right", "sum"), ("right", "count")])
    found: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in CORRUPTIONS}
    for line in sorted(grouped.to_pylist(), key=lambda line: line["severity"]):
        found[line["corruption"]][line["severity"]] = (line["right_sum"], line["right_count"])
    return {name: each for name, each in found.items() if each}
