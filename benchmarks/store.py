"""How fast a synthetic store is written and read in shuffled order, what it needs, and how soon it opens.

The number matters because training reads the store for as long as it runs: a loader below the accelerator's pace is
paid for in every epoch, and one that needs the whole set in memory ends at some millions of images. Random 32 x 32 x 3
images; ours beside the plain way (one .npz in memory) and a streaming library (litdata), in one run. Every row is a
process of its own, so that its peak memory is its own; memory is shown at a quarter, a half and all of the images.

    python benchmarks/store.py [--images 1000000] [--root /tmp/DIR] [--library DIR]

litdata is no dependency; torch and numpy stay ours, so it is installed without dependencies into a folder of its own,
else its row is left out:
    pip install --no-deps --target DIR litdata lightning-utilities tifffile requests urllib3 certifi idna \\
        charset_normalizer obstore boto3 botocore jmespath python-dateutil six s3transfer
Needs about 6.2 kB of disk for each image and 0.9 GB for an index of 100 million rows, below --root, removed afterwards.
Bars: a shuffled epoch of at least 100,000 images/s on 2 cores, a start in
less than 2 s, memory constant. Each row is printed as it comes; the last line is all of it as one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

SHAPE, BATCH = (32, 32, 3), 1024
BLOCK, BLOCKS_PER_SHARD = 4096, 16
"""A shard has 65,536 images, 201 MB."""
INDEX_SHARD = 100_000
"""Images in a shard of the index of 100 million rows; their pixels are holes in the files."""
WINDOWS = 4 * 64 * 512
"""Images in more windows than a shuffled epoch holds at once."""
GOAL_PACE, GOAL_START, GOAL_GROWTH = 100_000, 2.0, 50.0
"""Images/s, seconds, and MB of memory that 750,000 more images may cost."""


def pool() -> list[np.ndarray]:
    """Blocks of random images, made before the clock starts."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (BLOCK, *SHAPE), dtype=np.uint8) for _ in range(4)]


def blocks(count: int, made: list[np.ndarray]) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
    """(block, images, labels) of so many images."""
    for number in range(-(-count // BLOCK)):
        rows = min(BLOCK, count - number * BLOCK)
        yield number, made[number % 4][:rows], (np.arange(rows, dtype=np.int64) + number) % 10


def on_disk(folder: Path) -> int:
    """Bytes that a folder's files take."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())


def forget_pages(folder: Path) -> None:
    """Takes a folder's files out of the page cache, so that they come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Images that the work says it did, by the second of the clock and of the processor."""
    clock, cpu = time.perf_counter(), time.process_time()
    count = work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {"images": count, "seconds": clock, "cpu_seconds": cpu, "images_per_second": count / clock}


def write(root: Path, images: int, **_: Any) -> dict[str, Any]:
    """A store of ours, checksums and all."""
    from gambeson.data.synthetic import StoreWriter

    made = pool()
    writer = StoreWriter(root=root / "store", blocks=-(-images // BLOCK), blocks_per_shard=BLOCKS_PER_SHARD)

    def work() -> int:
        for number, pixels, labels in blocks(images, made):
            writer.put(number, pixels, labels)
        writer.finish({})
        return images

    found = timed(work)
    return {**found, "bytes_per_image": on_disk(root / "store") / images}


def epoch(root: Path, images: int, cold: bool = False) -> dict[str, Any]:
    """A shuffled epoch over it, read ahead by one thread."""
    from gambeson.data.shuffle import BlockShuffle
    from gambeson.data.synthetic import SyntheticStore

    store = SyntheticStore.open(root / "store")
    if cold:
        forget_pages(root / "store")
    return timed(lambda: sum(len(labels) for _, labels in BlockShuffle(store, BATCH, 0).epoch(0)))


def anywhere(root: Path, images: int, **_: Any) -> dict[str, Any]:
    """Single images at random through memory maps, which training does without `blocks`."""
    from gambeson.data.synthetic import SyntheticStore

    store, draw = SyntheticStore.open(root / "store"), np.random.default_rng(0)

    def work() -> int:
        for _ in range(min(images, 200_000) // BATCH):
            store.read(draw.integers(len(store), size=BATCH))
        return min(images, 200_000) // BATCH * BATCH

    return timed(work)


def verify(root: Path, images: int, **_: Any) -> dict[str, Any]:
    """All checksums, on the cores that are free."""
    from gambeson.data.synthetic import SyntheticStore

    return timed(lambda: len(SyntheticStore.open(root / "store").verify()))


def npz(root: Path, images: int, **_: Any) -> dict[str, Any]:
    """The plain way: all of one .npz in memory, any order from there."""
    pixels, labels = np.empty((images, *SHAPE), np.uint8), np.empty(images, np.int64)
    for number, some, classes in blocks(images, pool()):
        pixels[number * BLOCK :][: len(some)], labels[number * BLOCK :][: len(some)] = some, classes

    def saved() -> int:
        np.savez(root / "plain.npz", image=pixels, label=labels)
        return images

    return {**timed(saved), "bytes_per_image": (root / "plain.npz").stat().st_size / images}


def npz_epoch(root: Path, images: int, **_: Any) -> dict[str, Any]:
    """A shuffled epoch from memory; reading the file is the start."""
    begun = time.perf_counter()
    with np.load(root / "plain.npz") as arrays:
        pixels, labels = arrays["image"], arrays["label"]
    start = time.perf_counter() - begun

    def work() -> int:
        order = np.random.default_rng(0).permutation(images)
        return sum(len(pixels[part]) + 0 * len(labels[part]) for part in np.split(order, range(BATCH, images, BATCH)))

    return {"start_seconds": start, **timed(work)}


def litdata(root: Path, images: int, **_: Any) -> dict[str, Any]:
    """The library's own format, written by its writer in one process; images as raw bytes."""
    from litdata.streaming.writer import BinaryWriter

    made, writer = pool(), BinaryWriter(str(root / "litdata"), chunk_bytes=64 << 20)

    def work() -> int:
        place = 0
        for _, pixels, labels in blocks(images, made):
            for image, label in zip(pixels, labels.tolist(), strict=True):
                writer.add_item(place, (image.tobytes(), label))
                place += 1
        writer.done()
        writer.merge()
        return images

    return {**timed(work), "bytes_per_image": on_disk(root / "litdata") / images}


def litdata_epoch(root: Path, images: int, **_: Any) -> dict[str, Any]:
    """A shuffled epoch with its loader and two workers; bytes become arrays, as a training would need them."""
    from litdata import StreamingDataLoader, StreamingDataset

    def collate(items: list) -> tuple[np.ndarray, np.ndarray]:
        pixels = b"".join(pixels for pixels, _ in items)
        return np.frombuffer(pixels, np.uint8).reshape(-1, *SHAPE), np.array([label for _, label in items])

    begun = time.perf_counter()
    dataset = StreamingDataset(str(root / "litdata"), shuffle=True, seed=0)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=2, collate_fn=collate)
    start = time.perf_counter() - begun
    return {"start_seconds": start, **timed(lambda: sum(len(labels) for _, labels in loader))}


def index(root: Path, images: int, **_: Any) -> dict[str, Any]:
    """Makes an index of so many rows: shards whose pixels are holes, labels, and a selection of all of it."""
    from gambeson.data.synthetic import Chosen, SyntheticStore
    from gambeson.data.writing import head_of

    shards, folder = images // INDEX_SHARD, root / "index"
    (folder / "shards").mkdir(parents=True)
    record = {"rows": INDEX_SHARD, "shape": list(SHAPE), "sha256": {"npy": "0" * 64, "parquet": "0" * 64}}
    for shard in range(shards):
        with open(folder / f"shards/{shard:05d}.npy", "wb") as file:
            file.write(head_of(INDEX_SHARD, SHAPE))
            file.truncate(file.tell() + INDEX_SHARD * int(np.prod(SHAPE)))
        (folder / f"shards/{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"shards/{shard:05d}.json").write_text(json.dumps(record))
    labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint8, (shards * INDEX_SHARD,))
    for shard in range(shards):
        labels[shard * INDEX_SHARD :][:INDEX_SHARD] = np.arange(INDEX_SHARD) % 10
    labels.flush()
    header = {"format": 1, "rows": [INDEX_SHARD] * shards, "shape": list(SHAPE), "provenance": {}}
    (folder / "store.json").write_text(json.dumps(header))
    return timed(lambda: Chosen.write_all(root / "chosen.parquet", SyntheticStore.open(folder)) or images)


def start(root: Path, images: int, cold: bool = False) -> dict[str, Any]:
    """Opens that store and its selection, as training does, and takes the first single images from both."""
    begun = time.perf_counter()
    from gambeson.data.synthetic import Chosen, SyntheticStore, open_synthetic

    imported = time.perf_counter() - begun
    if cold:
        forget_pages(root / "index")
    times: dict[str, Any] = {"import_seconds": imported}
    for name, place in (("store", root / "index"), ("selection", root / "chosen.parquet")):
        begun = time.perf_counter()
        found = open_synthetic(place)
        assert isinstance(found, SyntheticStore | Chosen)
        assert len(found) == images
        assert found.read(np.array([images - 1, 0]))[1].tolist() == [9, 0]
        times[f"{name}_seconds"] = time.perf_counter() - begun
    return times


ROWS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (write, epoch, anywhere, verify, npz, npz_epoch, litdata, litdata_epoch, index, start)
}


def alone(name: str, options: argparse.Namespace, images: int, *more: str) -> dict[str, Any] | None:
    """A row in a process of its own; prints and returns it, None where it failed."""
    command = [sys.executable, __file__, "--row", name, "--root", str(options.root), "--images", str(images), *more]
    if options.library:
        command += ["--library", str(options.library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    row = json.loads(done.stdout.splitlines()[-1])
    shown = {key: round(value, 3) if value < 1000 else round(value) for key, value in row.items()}
    print(f"{' '.join((name, *more)):16} {images:>11,} images: {json.dumps(shown)}", flush=True)
    return row


def one(options: argparse.Namespace) -> None:
    """A row here; its peak memory includes the interpreter and the libraries, as in a training."""
    from gambeson.store import peak_memory_mb

    more = {"cold": True} if options.cold else {}
    row = ROWS[options.row](options.root, options.images, **more)
    print(json.dumps({**row, "peak_mb": peak_memory_mb()}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows; ours at three sizes."""
    found: dict[str, Any] = {}
    for share in (4, 2, 1):
        images = options.images // share
        shutil.rmtree(options.root / "store", ignore_errors=True)
        found[f"{images}"] = {
            "write": alone("write", options, images),
            "epoch": alone("epoch", options, images),
            "epoch_cold": alone("epoch", options, images, "--cold"),
        }
    found["anywhere"], found["verify"] = (alone(name, options, options.images) for name in ("anywhere", "verify"))
    found["npz"], found["npz_epoch"] = (alone(name, options, options.images) for name in ("npz", "npz_epoch"))
    if importlib.util.find_spec("litdata") is None:
        print("litdata: not importable, left out (see the head of this file)", flush=True)
    else:
        fewer = min(options.images, options.library_images)
        found["litdata"], found["litdata_epoch"] = (alone(n, options, fewer) for n in ("litdata", "litdata_epoch"))
    found["index"] = alone("index", options, options.index)
    found["start"], found["start_cold"] = (alone("start", options, options.index, *cold) for cold in ((), ("--cold",)))
    return found


def judged(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The bars, and what 100 million and a billion images would take at this machine's pace."""
    sizes = [options.images // share for share in (4, 2, 1)]
    peaks = {row: [found[f"{n}"][row]["peak_mb"] for n in sizes] for row in ("write", "epoch")}
    slopes = {row: float(np.polyfit(np.array(sizes) / 1e6, mb, 1)[0]) for row, mb in peaks.items()}
    whole, opened = found[f"{sizes[-1]}"], found["start"]
    starts = [opened["store_seconds"], opened["selection_seconds"]]
    plan = {
        f"{count:.0e}": {
            "terabytes": count * whole["write"]["bytes_per_image"] / 1e12,
            "hours_to_write": count / whole["write"]["images_per_second"] / 3600,
            "hours_an_epoch": count / whole["epoch"]["images_per_second"] / 3600,
            "hours_to_verify": count / found["verify"]["images_per_second"] / 3600,
            "start_seconds": max(starts) * count / options.index,
        }
        for count in (1e8, 1e9)
    }
    enough = True if sizes[0] >= WINDOWS else None  # fewer images all fit into the windows of the shuffle
    bars = {
        "epoch_at_least_100k_images_per_second": whole["epoch"]["images_per_second"] >= GOAL_PACE,
        "start_under_2_seconds": max(starts) < GOAL_START,
        "memory_constant": enough and all(max(mb) - min(mb) < GOAL_GROWTH for mb in peaks.values()),
    }
    return {"bars": bars, "peak_mb": peaks, "mb_per_million_images": slopes, "plan": plan}


def main() -> None:
    """All rows, or the one that a parent asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="images in the largest store")
    parser.add_argument("--index", type=int, default=100_000_000, help="rows of the index that is opened")
    parser.add_argument("--library-images", type=int, default=100_000, help="images that the library gets, at most")
    parser.add_argument("--root", type=Path, default=Path("/tmp/gambeson-store-benchmark"), help="removed afterwards")
    parser.add_argument("--library", type=Path, help="where litdata was installed to, with pip's --target")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        sys.path.append(str(options.library))  # last: torch and numpy stay ours
    if options.row:
        return one(options)
    options.root.mkdir(parents=True)  # an existing folder is not ours to remove
    try:
        found = measure(options)
        found |= judged(found, options)
    finally:
        shutil.rmtree(options.root, ignore_errors=True)
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "images": options.images}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "numpy": np.__version__, "commit": commit}
    print(json.dumps({"benchmark": "store", "batch": BATCH, **machine, **versions, **found}))


if __name__ == "__main__":
    main()
