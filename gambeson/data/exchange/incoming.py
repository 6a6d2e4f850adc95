"""What the readers of every format share: what a set in somebody's files is, what stands beside it, what damage is.

A set of ours that is exported has a JSON beside it, with licence, class names and provenance; import reads it back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from gambeson.data.archives import DAMAGE, is_damage
from gambeson.data.npz import MOST_CLASSES
from gambeson.errors import EnvironmentFault, UserError, require

Shape = tuple[int, int, int]
MOST_PIXELS = 1 << 24
"""More in one picture are taken for a mistake, before memory is taken for them."""
BLOCK_BYTES = 128 << 20
"""Bytes of pixels that are in memory at once, at most; an image may have more."""
ABOUT = "gambeson.json"


@runtime_checkable
class Incoming(Protocol):
    """A set of labelled images in files of some format, of which only heads were read."""

    @property
    def shape(self) -> Shape:
        """(height, width, channels) of one image."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, where the files say them."""
        ...

    @property
    def assumed(self) -> str:
        """What no file says."""
        ...

    def __len__(self) -> int: ...

    def blocks(self, size: int = 8192, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images uint8 [n, H, W, C] and labels int64 [n], `size` at a time from block `first` on, in the files' order.

        One block is in memory. UserError for a damaged or cut file.
        """
        ...


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """UserError, naming the file, where reading finds damage or nothing."""
    try:
        yield
    except (UserError, EnvironmentFault):
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: expected a file with synthetic images, found none") from None
    except (*DAMAGE, pa.ArrowException) as error:
        if not is_damage(error):
            raise
        raise UserError(
            f"{path}: expected a whole file, got a damaged or cut one ({type(error).__name__}: {error}); fetch it again"
        ) from error


def block_size(shape: Shape, wanted: int) -> int:
    """Images in a block: as many as wanted, or fewer where they would take more than BLOCK_BYTES."""
    return max(min(wanted, BLOCK_BYTES // math.prod(shape)), 1)


def check_labels(name: str, labels: np.ndarray, class_names: tuple[str, ...]) -> None:
    """UserError for labels [n] below -1 (-1: generated without a class) or outside the classes."""
    if not len(labels):
        return
    low, high, most = int(labels.min()), int(labels.max()), len(class_names) or MOST_CLASSES
    if low < -1 or high >= most:
        what = f"the {most} classes that it names" if class_names else "classes numbered from 0"
        raise UserError(
            f"{name}: expected labels 0 to {most - 1} for {what} (or -1: no class), got {low} to {high}; number the "
            "classes 0, 1, 2, ... and save it again"
        )


@dataclass(frozen=True)
class About:
    """What a set says about itself beside its images."""

    shape: Shape | None = None
    class_names: tuple[str, ...] = ()
    licence: str | None = None
    additional_data: tuple[str, ...] = ()
    provenance: dict[str, Any] | None = None

    @staticmethod
    def beside(path: Path) -> About:
        """What was exported with a file or folder; where others wrote it, the licence of a hub's data card at most.

        UserError for a damaged file.
        """
        place = about_file(path)
        if not place.is_file():
            return About(licence=_card_licence(path / "README.md"))
        try:
            return _about(json.loads(place.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{place}: expected what stands beside an exported set, got damaged text ({error}); remove it to "
                "import the images without"
            ) from error


def _card_licence(path: Path) -> str | None:
    """The licences in the front of a card, joined by "; ": `license: NAME`, a list of names, or `other` with its
    `license_name`. None where there is none that can be read."""
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace")[: 1 << 16] if path.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        told = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):  # dates and numbers that are none
        return None
    if not isinstance(told, dict):
        return None
    found = told.get("license")
    found = told.get("license_name", found) if found == "other" else found
    names = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, str) and one]
    return "; ".join(sorted(names)) or None


def _about(found: dict[str, Any]) -> About:
    provenance = found.get("provenance")
    shape, names = found.get("shape"), found.get("class_names") or []
    licence, others = found.get("licence"), found.get("additional_data") or []
    texts = all(isinstance(word, str) for word in [*names, *others, *([] if licence is None else [licence])])
    sides = shape is None or (len(shape) == 3 and all(type(side) is int and side > 0 for side in shape))
    require(texts and sides and isinstance(provenance, dict | None), "it", "names and sides", "others")
    height_width_channels = None if shape is None else (shape[0], shape[1], shape[2])
    return About(height_width_channels, tuple(names), licence, tuple(others), provenance)


def about_file(path: Path) -> Path:
    """Where it stands what a set is: within a folder, beside a file."""
    return path / ABOUT if path.is_dir() else path.with_name(f"{path.name}.json")
