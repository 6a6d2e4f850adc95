"""Carried shards become the files that the entries read: FOLDER/SET/NNN.webp and meta.npz -> DATA/SET.npz.

Image sets are larger than a call may carry: unpack what came, and once more what comes with the next call to the same
machine; the .npz has all that is there by then. Images of a lossless webp are 500 in one column.

    mkdir -p .carry/cifar10_train && cp /work/shared/data/cifar10_train/{meta.npz,0[0-4]*.webp} .carry/cifar10_train/
    python benchmarks/gpu/unpack.py .carry runs/gpu/data      # on the machine, with .carry in `carry`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

SHARD = 500
"""Images of a shard."""
SETS = ("cifar10_train", "cifar10_test", "gtsrb_train", "gtsrb_test")


def unpack(folder: Path, data: Path, name: str) -> int:
    """Takes up the shards of a set, and writes all that were ever taken up as one .npz; how many images it has."""
    kept = data / name
    kept.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.webp")):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)
        np.save(kept / f"{path.stem}.npy", pixels)
    if (folder / "meta.npz").is_file():
        (kept / "meta.npz").write_bytes((folder / "meta.npz").read_bytes())
    shards = sorted(kept.glob("*.npy"))
    if not shards:
        return 0
    with np.load(kept / "meta.npz", allow_pickle=False) as found:
        meta = dict(found)
    parts = [np.load(path) for path in shards]
    rows = np.concatenate([int(p.stem) * SHARD + np.arange(len(a)) for p, a in zip(shards, parts, strict=True)])
    arrays = {"images": np.concatenate(parts), "labels": meta["labels"][rows].astype(np.int64)}
    if "track" in meta:
        arrays["tracks"] = meta["track"][rows].astype(np.int64)
    np.savez(data / f"{name}.npz", class_names=meta["class_names"], **arrays)
    return len(rows)


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Every set of the folder; prints and returns how many images each has now."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("folder", type=Path)
    reader.add_argument("data", type=Path, nargs="?", default=Path("runs/gpu/data"))
    words = reader.parse_args(argv)
    found = {name: unpack(words.folder / name, words.data, name) for name in SETS if (words.folder / name).is_dir()}
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
