"""How many bytes a store of synthetic images will take, and whether the disk has them."""

from __future__ import annotations

import math
import shutil
import stat
from pathlib import Path

from gambeson.data.shards import head_of
from gambeson.errors import EnvironmentFault

TABLE = 24
"""Bytes of an image in the tables beside it, at most: label, block, index and facts, compressed."""
RECORDS = 16_384
"""Bytes of a shard's records and of its table's frame."""


def store_bytes(count: int, block: int, blocks_per_shard: int, shape: tuple[int, int, int]) -> int:
    """Bytes of a store of `count` images of `shape` [C, H, W]: pixels to the byte, tables at most."""
    channels, height, width = shape
    shards = math.ceil(count / (block * blocks_per_shard))
    pixels = count * channels * height * width + shards * len(head_of(0, (height, width, channels)))
    return pixels + count * TABLE + shards * RECORDS


def taken(folder: Path) -> int:
    """Bytes that files below a folder occupy on the disk already; holes in a file that is being filled do not count."""
    return sum(map(_blocks, folder.rglob("*"))) * 512


def _blocks(path: Path) -> int:
    try:
        facts = path.stat()
    except FileNotFoundError:  # gone since: a worker of an earlier start may still be ending
        return 0
    return facts.st_blocks if stat.S_ISREG(facts.st_mode) else 0


def existing(folder: Path) -> Path:
    """The folder, or the one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_room(folder: Path, need: int, what: str) -> None:
    """EnvironmentFault where the disk of a folder has fewer free bytes than are still to come of `need`."""
    missing, free = max(need - taken(folder), 0), shutil.disk_usage(existing(folder)).free
    if missing > free:
        raise EnvironmentFault(
            f"{folder}: expected {told(missing)} free for {what}, got {told(free)}. Nothing was started; free some "
            "space, choose another folder (--runs DIR), or fewer images (--generation.count)"
        )


def told(size: int) -> str:
    """'3.1 GB'; powers of 1,000."""
    power = min(max(int(math.log10(max(size, 1)) // 3), 0), 5)
    return f"{size / 1000**power:.4g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
