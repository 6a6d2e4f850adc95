"""Pictures of any size become images of one size by a stated rule; what is no 8-bit picture is listed or left out.

Nothing is converted silently: 16 bits, palettes, CMYK and transparency would have to be changed to be read.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import error as StructError
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from gambeson.data.npz import check_memory
from gambeson.errors import UserError, require

MODES = ("1", "L", "RGB")
"""What Pillow calls 8-bit pictures without transparency."""
REASONS = {
    "P": "a palette",
    "PA": "a palette",
    "CMYK": "colours for print",
    "YCbCr": "another colour space",
    "LAB": "another colour space",
    "HSV": "another colour space",
    "RGBA": "transparency",
    "LA": "transparency",
    "RGBa": "transparency",
    "La": "transparency",
    "I": "32 bits",
    "F": "32-bit numbers",
}
"""Why a picture of another mode is not read as it is; all modes that begin with I;16 have 16 bits."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "GIF", "JPEG2000", "TGA", "PCX", "ICO")
"""Pillow's readers that are asked. Others hand files to programs (EPS to Ghostscript), or are hardly ever met."""
DAMAGE = (
    OSError, SyntaxError, ValueError, StructError, EOFError, Image.DecompressionBombError, LookupError, TypeError,
    AttributeError, ArithmeticError, RuntimeError, NotImplementedError,
)  # fmt: skip
"""What Pillow raises for files that are damaged or no pictures."""
Resize = Literal["crop", "squash"]
OnBadImage = Literal["fail", "skip"]
Opener = Callable[[int], Path | bytes | np.ndarray]
"""Number of a picture -> its file, the content of one, or its pixels uint8 [H, W] or [H, W, 1 or 3]."""


class SkippedPictures(UserWarning):
    """Pictures that could not be read were left out, as `on_bad_image: skip` says."""


class BadPicture(Exception):
    """Why one picture cannot be read as it is."""


def unlike(picture: Image.Image) -> str | None:
    """What keeps an opened picture from being 8-bit grey or RGB without transparency; None for one that is.

    Pillow's mode alone does not tell: colour of 16 bits is RGB to it, cut to 8 when it is read.
    """
    if picture.mode not in MODES:
        return REASONS.get(picture.mode, "16 bits")
    if any(";16" in str(part) for tile in getattr(picture, "tile", ()) for part in tile):
        return "16 bits"
    return "transparency" if "transparency" in picture.info else None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How pictures become images of one size."""

    size: int  # side in pixels
    resize: Resize = "crop"  # shorter side to size, then the centre; or both sides to size
    grey: bool = False  # one channel instead of three
    on_bad_image: OnBadImage = "fail"  # what cannot be read ends the reading, or is left out with a warning

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images."""
        return self.size, self.size, 1 if self.grey else 3

    def image(self, source: Path | bytes | np.ndarray) -> np.ndarray:
        """One picture as uint8 [size, size, C]. Raises BadPicture saying why it cannot be read as it is."""
        try:
            if isinstance(source, np.ndarray):
                return self._fitted(Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source))
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS) as picture:
                if (fault := unlike(picture)) is not None:
                    raise BadPicture(f"mode {picture.mode}: {fault}")
                return self._fitted(ImageOps.exif_transpose(picture))
        except DAMAGE as error:
            raise BadPicture(_reason(error, source)) from error

    def _fitted(self, picture: Image.Image) -> np.ndarray:
        upright = picture.convert("L" if self.grey else "RGB")
        return np.asarray(resized(upright, self.size, self.resize)).reshape(self.shape)


def check_rule(size: int, resize: str, on_bad_image: str) -> None:
    """UserError for fields of a door that no rule has."""
    require(size >= 4, "data.size", "at least 4 pixels", size)
    require(resize in ("crop", "squash"), "data.resize", "crop or squash", resize)
    require(on_bad_image in ("fail", "skip"), "data.on_bad_image", "fail or skip", on_bad_image)


def read_pictures(where: str, names: Sequence[str], open_one: Opener, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, size, size, C] of the pictures that can be read, and their places int64 [n] among the names.

    Raises UserError listing by name those that cannot (at most ten, then their number), unless the rule skips them,
    of which a SkippedPictures warning says how many and which; and where half of the free memory does not hold them.
    """
    check_memory(where, len(names) * int(np.prod(rule.shape)) * 4)
    pixels = np.empty((len(names), *rule.shape), np.uint8)
    kept, faults = [], []
    for i, name in enumerate(names):
        try:
            pixels[len(kept)] = rule.image(open_one(i))
            kept.append(i)
        except BadPicture as error:
            faults.append(f"{name} ({error})")
    if faults:
        _answer(where, faults, len(names), rule)
    return pixels[: len(kept)], np.array(kept, np.int64)


def _answer(where: str, faults: list[str], count: int, rule: Rule) -> None:
    """The error, or the warning, for pictures that cannot be read."""
    listed = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
    if rule.on_bad_image == "fail" or len(faults) == count:
        raise UserError(
            f"{where}: expected {count} readable pictures of 8 bits, grey or RGB, got {len(faults)} that are not: "
            f"{listed}. Convert or remove them, or leave them out with on_bad_image: skip"
        )
    warnings.warn(f"{where}: left out {len(faults)} of {count} pictures: {listed}", SkippedPictures, stacklevel=2)


def _reason(error: Exception, source: Path | bytes | np.ndarray) -> str:
    """What Pillow said, without the file's name, which stands beside it."""
    if isinstance(source, bytes) and isinstance(error, Image.UnidentifiedImageError):
        return "no picture that Pillow knows"
    return str(error).replace(repr(str(source)), "it") if isinstance(source, Path) else str(error)


def resized(picture: Image.Image, size: int, rule: Resize) -> Image.Image:
    """A picture of size x size, by Pillow's bicubic filter; one of that size stays as it is."""
    width, height = picture.size
    if rule == "squash":
        return picture.resize((size, size), Image.Resampling.BICUBIC)
    shorter = min(width, height)
    wide, tall = (max(round(side * size / shorter), size) for side in (width, height))
    left, top = (wide - size) // 2, (tall - size) // 2
    return picture.resize((wide, tall), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
