"""The sharded store of synthetic images: raw uint8 shards that never change, Parquet beside them, checksums over both.

store.json                  what the store is: image shape, images per shard, provenance
labels.npy                  the label of every image, memory-mapped; made from the shards' Parquet, and again if missing
index.json                  of a store of many shards: what their records say, in one file; made from them, and again
shards/00000.npy            images uint8 [N, H, W, C], readable with numpy alone, memory-mapped by training
shards/00000.parquet        label (-1: generated without a class), block, index within the block, facts of the block
shards/00000.json           rows and checksums: written last, a shard without it does not exist
scores/DIGEST/00000.parquet what a scorer computed later (scores.py)
blocks/, shards/*.part      a store that is being written (writing.py; in an object store remote.py)
Written by writing.py, read by reading.py; selections from it by chosen.py. All their names are here too.
"""

from __future__ import annotations

from pathlib import Path

from gambeson.data.chosen import Chosen
from gambeson.data.reading import SyntheticStore
from gambeson.data.shards import FORMAT
from gambeson.data.writing import StoreWriter, inherited
from gambeson.errors import UserError
from gambeson.mirror import have, local

__all__ = ["FORMAT", "Chosen", "StoreWriter", "SyntheticStore", "inherited", "open_synthetic"]


def open_synthetic(path: str | Path) -> SyntheticStore | Chosen:
    """Synthetic images from a store, a stage's folder (its selection, else its store), or a selection's file.

    Sizes and records are compared, checksums too where that is quick (`check`). UserError for anything else; a file
    that others published is imported first (`is_peer`).
    """
    place = local(path)
    for chosen in (place / "chosen.parquet", place):
        if have(chosen) and chosen.suffix == ".parquet":
            return Chosen.open(chosen)
    for store in (place, place / "images"):
        if have(store / "store.json"):
            return SyntheticStore.open(store).check()
    raise UserError(
        f"{place}: expected a synthetic store (a folder with store.json), or a folder with chosen.parquet or "
        f"images/store.json, got {'something else' if place.exists() else 'nothing there'}; files that others "
        "published (.npz, .bin, .tar, .parquet, folders of these or of classes) become a store by import_images, which "
        "`gambeson train --synthetic` does by itself"
    )
