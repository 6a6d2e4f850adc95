"""How often teachers say the class that an image was generated for: counts that add up, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.robustness.intervals import wilson
from gambeson.synthesis.teachers import Teacher
from gambeson.types import Labels, Logits

_NOTE = b"tally"


@dataclass(frozen=True)
class Tally:
    """Counts over images, by class [K]: int64.

    generated: images of the condition; kept: of the label; agreed: of the condition, that the teachers together say
    too; each [teachers, K]: the same of every teacher; without: images generated without a class; unanimous: images of
    which all teachers say the same class.
    """

    generated: np.ndarray
    kept: np.ndarray
    agreed: np.ndarray
    each: np.ndarray
    without: int
    unanimous: int

    @staticmethod
    def empty(classes: int, teachers: int) -> Tally:
        """Nothing counted."""
        none = np.zeros(classes, np.int64)
        return Tally(none, none, none, np.zeros((teachers, classes), np.int64), 0, 0)

    @staticmethod
    def of(condition: Labels, labels: Labels, logits: Logits, each: Sequence[Logits]) -> Tally:
        """The counts of a batch: conditions and labels [B] (-1: none), logits [B, K] of all and of each teacher."""
        classes, given = logits.shape[1], condition.numpy()

        def counted(numbers: np.ndarray) -> np.ndarray:
            return np.bincount(numbers[numbers >= 0], minlength=classes)

        said = [one.argmax(1).numpy() for one in each]
        same = np.all([one == said[0] for one in said], axis=0)
        agreed = [counted(given[one == given]) for one in (logits.argmax(1).numpy(), *said)]
        without, unanimous = int((given < 0).sum()), int(same.sum())
        return Tally(counted(given), counted(labels.numpy()), agreed[0], np.stack(agreed[1:]), without, unanimous)

    def __add__(self, other: Tally) -> Tally:
        """The counts of both."""
        return Tally(
            self.generated + other.generated,
            self.kept + other.kept,
            self.agreed + other.agreed,
            self.each + other.each,
            self.without + other.without,
            self.unanimous + other.unanimous,
        )

    def note(self) -> dict[bytes, bytes]:
        """The counts as the metadata of a part's Parquet."""
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}
        return {_NOTE: json.dumps(plain).encode()}

    @staticmethod
    def noted(path: Path) -> bool:
        """Whether a part has its counts: those of earlier versions, and what is no Parquet any more, are made again."""
        try:
            return _NOTE in (pq.read_schema(path).metadata or {})
        except (pa.ArrowException, OSError):
            return False

    @staticmethod
    def read(path: Path) -> Tally:
        """The counts of a part."""
        plain: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {})[_NOTE])
        counts: dict[str, Any] = {name: np.array(v, np.int64) for name, v in plain.items() if isinstance(v, list)}
        return Tally(**{**plain, **counts})


def report(tally: Tally, names: Sequence[str], teachers: Sequence[Teacher]) -> dict[str, Any]:
    """What is told of labelled images: JSON-able; agreements as fractions with 95 % intervals (Wilson)."""
    total = int(tally.generated.sum()) + tally.without
    labelled = int(tally.kept.sum())
    told = [
        {"title": t.title, "digest": t.digest, "agreement": _rate(tally.each[i], tally)} for i, t in enumerate(teachers)
    ]
    rows = [
        {
            "class": name,
            "generated": int(tally.generated[k]),
            "labelled": int(tally.kept[k]),
            "agreement": _fraction(int(tally.agreed[k]), int(tally.generated[k])),
        }
        for k, name in enumerate(names)
    ]
    return {
        "images": total,
        "labelled": labelled,
        "dropped": total - labelled,
        "without_condition": tally.without,
        "teachers": told,
        "agreement": _rate(tally.agreed, tally),
        "unanimous": _fraction(tally.unanimous, total) if len(teachers) > 1 else None,
        "classes": rows,
        "empty": [name for k, name in enumerate(names) if not tally.kept[k]],
    }


def _rate(agreed: np.ndarray, tally: Tally) -> dict[str, Any] | None:
    """The share of the images generated for a class of which that class is said; None where there are none."""
    return _fraction(int(agreed.sum()), int(tally.generated.sum()))


def _fraction(count: int, of: int) -> dict[str, Any] | None:
    if not of:
        return None
    found = wilson(count, of)
    return {"count": count, "of": of, "estimate": found.estimate, "low": found.low, "high": found.high}
