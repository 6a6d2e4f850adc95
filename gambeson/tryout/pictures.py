"""A picture that somebody drops becomes what the network sees, and what was done to it is said; also the way back.

Unlike the doors of data sets, which refuse what they would have to change, this converts any mode, and tells.
"""

from __future__ import annotations

import base64
import io
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps

from gambeson.data.pictures import REASONS, resized, unlike
from gambeson.errors import UserError
from gambeson.report.images import uri
from gambeson.types import Images

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""What is tried: kinds of pictures that start no other program."""
MOST_BYTES, MOST_PIXELS, MOST_RATIO = 20_000_000, 40_000_000, 50
"""Size of a file, pixels of its picture, and longer by shorter side, above which nothing is decoded."""
_ONE = threading.Lock()
"""One picture is decoded at a time, so that many large ones together do not fill the memory."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the network is given, and how it came about."""

    image: Images  # [1, C, H, W] in [0, 1]
    told: tuple[str, ...]  # what was done to the picture, in words


def read_picture(content: bytes, shape: tuple[int, int, int]) -> Seen:
    """A picture file as the network's input of `shape` (C, H, W): centre, bicubic, as the doors of data sets do it.

    Raises UserError, in words for whoever dropped it, for what is no picture, damaged, or too large.
    """
    check_bytes(len(content))
    with _ONE, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about damage: what cannot be read is told, and the rest is seen
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                _check_size(*picture.size)
                return _seen(picture, shape)
        except UserError:
            raise
        except Image.UnidentifiedImageError:
            known = ", ".join(FORMATS)
            raise UserError(f"This file is no picture of a kind that is read here ({known}).") from None
        except Image.DecompressionBombError:
            raise UserError(f"This picture has too many pixels; at most {MOST_PIXELS:,} are read.") from None
        except Exception as error:  # damaged files make Pillow raise nearly anything
            told = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"This picture could not be read; it seems to be damaged ({told}).") from error


def check_bytes(size: int) -> None:
    """UserError for a file that is empty, or too large to be read."""
    if not 0 < size <= MOST_BYTES:
        raise UserError(
            f"Expected a picture of at most {MOST_BYTES // 1_000_000} MB, got {size / 1e6:,.1f} MB."
            if size
            else "Expected a picture, got an empty file."
        )


def _check_size(width: int, height: int) -> None:
    """UserError for a picture that would take too much memory."""
    if width * height > MOST_PIXELS:
        raise UserError(f"This picture has {width:,} × {height:,} pixels; at most {MOST_PIXELS:,} are read.")
    if max(width, height) > MOST_RATIO * max(min(width, height), 1):
        raise UserError(f"This picture is {width:,} × {height:,} pixels, too thin a strip to cut its centre out.")


def _seen(picture: Image.Image, shape: tuple[int, int, int]) -> Seen:
    size = f"{picture.width:,} × {picture.height:,} pixels"
    told = [f"{picture.format} of {size}"]
    if int(getattr(picture, "n_frames", 1)) > 1:
        told.append("the first of its several pictures")
    fault = unlike(picture)
    upright = ImageOps.exif_transpose(picture)
    if picture.getexif().get(0x0112, 1) not in (0, 1):
        told.append("turned as its EXIF note says")
    eight, changes = _eight_bits(upright, fault)
    told += changes
    if shape[0] == 1 and eight.mode not in ("1", "L"):
        told.append("colours made grey")
    if shape[0] == 3 and eight.mode in ("1", "L"):
        told.append("grey in all three channels")
    fitted = _fitted(eight.convert("L" if shape[0] == 1 else "RGB"), shape[2], shape[1])
    told.append(_fitting_words(eight.size, shape))
    pixels = np.asarray(fitted).reshape(shape[1], shape[2], shape[0])
    return Seen(image=from_pixels(pixels), told=tuple(told))


def _eight_bits(picture: Image.Image, fault: str | None) -> tuple[Image.Image, list[str]]:
    """Any mode as grey or RGB of 8 bits, and what that took."""
    if picture.mode == "F":
        raise UserError("This picture holds 32-bit numbers of unknown range; save it with 8 bits.")
    if picture.mode.startswith("I"):
        wide = np.asarray(picture).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise UserError("This picture holds 32-bit numbers of unknown range; save it with 8 bits.")
        return Image.fromarray(np.round(wide / 257).astype(np.uint8)), ["16 bits cut to 8"]
    if "A" in picture.mode.upper() or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        paper = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(paper, clear).convert("RGB"), ["transparency laid on white"]
    if picture.mode in REASONS:
        return picture.convert("RGB"), [f"{REASONS[picture.mode]} turned into RGB"]
    return picture, ["16 bits cut to 8"] if fault == "16 bits" else []


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    if picture.size == (width, height):
        return picture
    if width == height:
        return resized(picture, width, "crop")
    return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)


def _fitting_words(size: tuple[int, int], shape: tuple[int, int, int]) -> str:
    if size == (shape[2], shape[1]):
        return "its size is the network's, so no pixel was changed"
    larger = size[0] < shape[2] or size[1] < shape[1]
    cut = "" if size[0] * shape[1] == size[1] * shape[2] else ", after its centre was cut out"
    return f"{'enlarged' if larger else 'shrunk'} to {shape[2]} × {shape[1]} (bicubic){cut}"


def from_pixels(pixels: UInt8[np.ndarray, "h w c"]) -> Images:
    """[H, W, C] of 0 to 255 -> [1, C, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()[None] / 255


def unpacked(text: object, shape: tuple[int, int, int]) -> Images:
    """[1, C, H, W] out of what `packed` wrote. UserError for anything else."""
    count = int(np.prod(shape))
    try:
        content = base64.b64decode(str(text), validate=True)
    except ValueError:
        content = b""
    values = np.frombuffer(content, "<f4") if len(content) == 4 * count else np.full(1, np.nan)
    if not (values.min() >= 0 and values.max() <= 1):  # NaN passes neither
        raise UserError(f"Expected the {count:,} pixels of an image in [0, 1]; choose the image again.")
    return torch.from_numpy(values.astype(np.float32)).reshape(1, *shape)


def packed(image: Images) -> str:
    """[1, C, H, W] as base64 of float32, every bit kept."""
    return base64.b64encode(image.cpu().numpy().astype("<f4").tobytes()).decode()


def picture_of(image: Images) -> str:
    """[1, C, H, W] in [0, 1], rounded to 8 bits, as a PNG data URI."""
    pixels = (image[0] * 255).round().byte().cpu().permute(1, 2, 0).numpy()
    return uri(Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)))


def thumbnail(image: Images, side: int = 64) -> str:
    """The same, shrunk to `side` pixels where it is larger."""
    pixels = (image[0] * 255).round().byte().cpu().permute(1, 2, 0).numpy()
    small = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    small.thumbnail((side, side), Image.Resampling.BOX)
    return uri(small)


def magnified(image: Images, attacked: Images) -> tuple[str, float]:
    """What the attack added, grey where nothing: a PNG data URI, and how many times it is magnified."""
    delta = attacked - image
    largest = float(delta.abs().max())
    times = 0.5 / largest if largest > 0 else 1.0
    return picture_of((0.5 + times * delta).clamp(0, 1)), times


def lines_of(told: tuple[str, ...]) -> Iterator[str]:
    """Each remark as a sentence."""
    for each in told:
        yield each[0].upper() + each[1:] + "."
