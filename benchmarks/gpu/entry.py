"""What the queue's entries share: rows that are kept, a clock that ends a command in time, the images, the last line.

An entry keeps each finished row in OUT/ENTRY.json and its trainings below OUT/stages, so that the same command started
again goes on; what has no row is listed as not yet measured. On a machine whose disk is lost, carry OUT's json back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # gambeson, where it is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))  # the other benchmarks

import numpy as np
import pyarrow.parquet as pq
import torch
from training import commit

from gambeson.data.datasets import Digits, ImageSet, load
from gambeson.data.npz import NpzImages
from gambeson.disk import read_json, write_json
from gambeson.errors import UserError, require
from gambeson.machine import Machine
from gambeson.robustness.assess import Assessment, assess
from gambeson.robustness.autoattack import AutoAttack
from gambeson.robustness.intervals import wilson
from gambeson.robustness.subjects import Ours
from gambeson.store import Artifact, Stage, Store
from gambeson.threat import ThreatModel

SECONDS = 500
"""Seconds of a command by default: with start and saving it stays below 540."""
NOT_YET = "not yet measured"


class OutOfTime(Exception):
    """The command's time is over; what it was doing is kept as far as it got."""


@dataclass
class Entry:
    """One entry of the queue under way."""

    name: str
    device: str
    tiny: bool  # so small that the CPU does it in seconds: shows that the script works, no number for a table
    out: Path
    data: Path  # where unpack.py put the images
    ends: float  # time.monotonic() at which it stops
    options: dict[str, Any] = field(default_factory=dict)  # what the rows depend on
    rows: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is CUDA."""
        return self.device.startswith("cuda")

    @property
    def machine(self) -> Machine:
        """Where stages compute."""
        return Machine(device=self.device)

    @property
    def left(self) -> float:
        """Seconds until the command stops."""
        return self.ends - time.monotonic()

    @property
    def file(self) -> Path:
        """Where the rows are kept."""
        return self.out / f"{self.name}.json"

    def wait(self) -> float:
        """Now, when the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def row(self, key: str, work: Callable[[], dict[str, Any]], needs: float = 0.0) -> dict[str, Any]:
        """The row of that name: kept from before, or made now and kept. OutOfTime where fewer than `needs` seconds are
        left."""
        if key in self.rows:
            return self.rows[key]
        if self.left < needs:
            raise OutOfTime(f"{key} needs about {needs:.0f} s, {max(self.left, 0):.0f} s are left")
        begun = self.wait()
        found = work()
        made = {"took_seconds": round(self.wait() - begun, 2), "commit": commit(), "machine": machine_of(self.device)}
        self.rows[key] = found | made
        write_json(self.file, {"options": self.options, "rows": self.rows})
        print(json.dumps({"row": key, **self.rows[key]}), flush=True)
        return self.rows[key]

    def once(self, stage: Stage, spec: Any, *inputs: Any, seed: int | None = None) -> Artifact:
        """A stage of the product: found, resumed or made. OutOfTime, its state kept, where the time ends before it."""
        return Store(self.out, self._watch, self.machine).once(stage, spec, *inputs, seed=seed)

    def _watch(self, stage: str, done: int, total: int) -> None:
        if total and done < total and self.left < 0:
            raise OutOfTime(f"{stage}: {done} of {total} done")

    def images(self, name: str = "cifar10") -> ImageSet:
        """cifar10 or gtsrb as unpack.py left them; digits in the tiny form. UserError where they are not there."""
        if self.tiny:
            return Digits(train_images=100, validation_images=60).load()
        os.environ["GAMBESON_DATA"] = str(self.data)
        return traffic_signs(self.data) if name == "gtsrb" else load(name)


def machine_of(device: str) -> str:
    """The card, or the processor."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()}, CPU"


def reader_of(words: str | None, **numbers: float) -> argparse.ArgumentParser:
    """The words that all entries understand, and options of their own with a number as default."""
    reader = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--device", default="cuda")
    reader.add_argument("--tiny", action="store_true", help="seconds on a CPU, to see that it works")
    reader.add_argument("--out", type=Path, default=Path("runs/gpu"), help="rows and trainings, kept between commands")
    reader.add_argument("--data", type=Path, default=Path("runs/gpu/data"), help="where unpack.py put the images")
    reader.add_argument("--seconds", type=float, default=SECONDS, help="when this command stops; start it again")
    for name, value in numbers.items():
        reader.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return reader


def run(
    name: str,
    words: argparse.Namespace,
    work: Callable[[Entry, argparse.Namespace], dict[str, Any]],
    planned: Sequence[str],
    concluded: Callable[[Entry], dict[str, Any]] = lambda entry: {},
) -> dict[str, Any]:
    """Does an entry as far as the time goes; prints and returns its last line, and hands its json over to $OUT.

    work: fills rows, returns what is concluded from them all. planned: the names of the rows that make it whole.
    concluded: what can be said of the rows there are, also where the time ended.
    UserError where rows of other options lie in OUT.
    """
    common = ("device", "tiny", "out", "data", "seconds")
    options = {key: value for key, value in vars(words).items() if key not in common} | {"tiny": words.tiny}
    entry = Entry(
        name=name,
        device=words.device,
        tiny=words.tiny,
        out=words.out,
        data=words.data,
        ends=time.monotonic() + words.seconds,
        options=options,
    )
    if entry.file.is_file():
        kept = read_json(entry.file)
        require(kept["options"] == options, str(entry.file), f"rows of {options} (another --out)", kept["options"])
        entry.rows = kept["rows"]
    found: dict[str, Any] = {"stopped": None}
    try:
        found |= work(entry, words)
    except OutOfTime as told:
        found["stopped"] = str(told)
    found |= concluded(entry)
    missing = {key: NOT_YET for key in planned if key not in entry.rows}
    last = facts(entry) | found | {"rows": entry.rows | missing, "whole": not missing and found["stopped"] is None}
    write_json(entry.out / f"{name}-last.json", last)
    hand_over(entry.file, entry.out / f"{name}-last.json")
    print(json.dumps(last), flush=True)
    return last


def facts(entry: Entry) -> dict[str, Any]:
    """Machine, commit, versions."""
    return {
        "benchmark": f"gpu_{entry.name}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine_of(entry.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "options": entry.options,
    }


def hand_over(*files: Path) -> None:
    """Copies files to the folder $OUT, where there is one: what comes back from a lent machine."""
    place = os.environ.get("OUT")
    if place:
        for path in files:
            if path.is_file():
                shutil.copy(path, Path(place) / path.name)


def traffic_signs(root: Path, share: float = 0.1) -> ImageSet:
    """GTSRB from unpack.py's files: whole physical signs (tracks) are held out, a share of each class; at least one.

    Frames of a sign look alike: a split by frame would make the validation number a lie. The sign whose frames are test
    images too is left out.
    """
    train, test = (str(root / f"gtsrb_{part}.npz") for part in ("train", "test"))
    return NpzImages(
        path=train, test_path=test, groups="tracks", drop_test_twins=True, validation_share=share, flip_safe=False
    ).load()


def attack_of(tiny: bool, threat: ThreatModel) -> AutoAttack:
    """AutoAttack standard; a few steps of two attacks in the tiny form."""
    if tiny:
        return AutoAttack(threat=threat, version="custom", attacks=("apgd-ce", "square"), steps=2, queries=3)
    return AutoAttack(threat=threat)


def assessment_of(tiny: bool, threat: ThreatModel, images: int) -> Assessment:
    """AutoAttack on so many test images, spread evenly, without a curve."""
    spec = Assessment(autoattack=attack_of(tiny, threat), images=images, curve=())
    return replace(spec, images=6, check_images=4, curve_images=6) if tiny else spec


def clean_and_robust(made: Artifact) -> dict[str, Any]:
    """Accuracies of a finished assessment with their intervals, and whether it is the official AutoAttack."""
    rows, about = pq.read_table(made.file("rows.parquet")), read_json(made.file("facts.json"))
    right = np.asarray(rows["prediction"]) == np.asarray(rows["label"])
    found: dict[str, Any] = {"n": len(rows), "official_autoattack": about["official"], "threat": about["threat"]}
    for name, column in (("clean", right), ("robust", np.asarray(rows["robust"]))):
        at = wilson(int(column.sum()), len(column))
        found |= {name: round(at.estimate, 4), f"{name}_interval": [round(at.low, 4), round(at.high, 4)]}
    return found


def assessed(entry: Entry, student: Artifact, real: ImageSet, threat: ThreatModel, images: int) -> dict[str, Any]:
    """AutoAttack on a trained classifier, chunk by chunk, going on where it was stopped."""
    subject = Ours(str(student.file("classifier.safetensors")))
    return clean_and_robust(entry.once(assess, assessment_of(entry.tiny, threat, images), subject, real, seed=0))


def seconds_of(*made: Artifact) -> float:
    """Seconds that stages took together, over all their starts, by their own records."""
    return round(sum(each.record["seconds"] for each in made), 1)


def pace(entry: Entry, stage: Stage, spec: Any, *inputs: Any, steps: tuple[int, int] = (20, 80)) -> dict[str, float]:
    """Seconds of a training's step, and of all that is not steps: from two short trainings that are thrown away.

    `spec` has an `optimisation`; a first training warms the kernels up.
    """
    took, place = [], entry.out / f"pace-{os.getpid()}"
    try:
        for number, count in enumerate((steps[0], *steps)):
            short = replace(spec, optimisation=replace(spec.optimisation, steps=count))
            begun = entry.wait()
            Store(place / str(number), entry._watch, entry.machine).once(stage, short, *inputs, seed=0)
            took.append(entry.wait() - begun)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    each = max(took[2] - took[1], 1e-6) / (steps[1] - steps[0])
    return {"seconds_a_step": each, "seconds_besides": max(took[1] - steps[0] * each, 0.0)}


def steps_within(seconds: float, found: dict[str, Any], most: int = 10**7) -> int:
    """How many steps fit, with a twentieth to spare."""
    if seconds <= found["seconds_besides"]:
        raise UserError(f"--seconds: expected more than {found['seconds_besides']:.0f} s for a training, got {seconds}")
    return max(1, min(most, int((0.95 * seconds - found["seconds_besides"]) / found["seconds_a_step"])))
