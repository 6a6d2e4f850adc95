"""How fast standard AutoAttack is: ours beside the reference package, the same network and images, one run.

The number matters because a robust accuracy that people quote takes AutoAttack, and that takes hours: some ten thousand
forward passes for every image that stands. Faster is worth nothing where it is weaker, so verdicts are compared image
by image and robust accuracy stands beside every time. The reference runs at the best of several batch sizes, found by a
short trial of its attacks; ours likewise. Every further row of ours takes one measure away, or changes the precision.

    python benchmarks/evaluation.py [--images 500] [--threads 1] [--rows reference,ours] [--data-root DIR]
    python benchmarks/evaluation.py --threads 2 --rows reference,ours_side_by_side,ours_side_by_side_bfloat16
    python benchmarks/evaluation.py --device cuda [--skip N]       WRN-28-10 on CIFAR-10, a slice of the test images

The network (48 MFLOP: WRN-10-3 at 16x16) is trained first, 8 minutes on one thread, and kept below --runs. Each row
prints all that is known so far as one JSON object; the last line is the whole. Seconds of an image are its share of its
batches' time; the reference keeps no such account: its attacks' times are shared out evenly among those attacked.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from training import commit, forward_flops

from gambeson.data.augment import PadCrop
from gambeson.data.datasets import ImageSet, Split, load
from gambeson.errors import UserError
from gambeson.machine import Machine
from gambeson.models.classifiers import load_classifier
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.processes import pool
from gambeson.recipe import fill_threat
from gambeson.robustness import views
from gambeson.robustness.autoattack import AutoAttack
from gambeson.robustness.intervals import wilson
from gambeson.robustness.losses import PGDAdversarial
from gambeson.robustness.pursuit import Board, Chase
from gambeson.robustness.square import Square
from gambeson.store import Store
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, train_classifier
from gambeson.training.loop import Optimisation

SIZES = (32, 64, 128, 250, 500)
"""Batch sizes that are tried."""
NORMS: dict[str, Any] = {"linf": "Linf", "l2": "L2"}
"""The reference's names."""
STEPS, QUERIES = 3, 60
"""Of a trial: AutoPGD, its targets and FAB; Square."""


@dataclass(frozen=True)
class Problem:
    """What every row attacks."""

    model: nn.Module
    images: Tensor  # [B, C, H, W]
    labels: Tensor  # [B]
    threat: ThreatModel
    seed: int

    def part(self, count: int) -> Problem:
        """The first images alone."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])


@dataclass
class Found:
    """What a row found."""

    robust: np.ndarray  # [B] bool
    seconds: float
    cpu_seconds: float  # of this process: what other work on the machine disturbs less
    attacks: dict[str, float]  # seconds of each
    per_robust: float  # mean seconds of an image that stands at the end
    per_broken: float  # and of one that does not, those wrong from the start left out


# ---- the network ----


def enlarged(split: Split) -> Split:
    """8x8 digits at 16x16, each pixel four times."""
    return replace(split, images=split.images.repeat_interleave(2, 2).repeat_interleave(2, 3))


def image_set(on_gpu: bool) -> tuple[ImageSet, ThreatModel, ThreatModel]:
    """The images, the ball of the training, and that of the attack; digits where CIFAR-10 is not there."""
    try:
        data = load("cifar10" if on_gpu else "cifar10-16", train_images=40_000)
        trained, attacked = (8, 4) if on_gpu else (4, 3)
        return data, ThreatModel(epsilon=trained / 255), ThreatModel(epsilon=attacked / 255)
    except UserError:
        data = load("digits", train_images=1000, validation_images=150)
        parts = {name: enlarged(getattr(data, name)) for name in ("train", "validation", "test")}
        data = replace(data, name="digits-16", **parts)
        return data, ThreatModel(epsilon=0.15), ThreatModel(epsilon=0.2)


def training(data: ImageSet, threat: ThreatModel, on_gpu: bool, steps: int) -> ClassifierTraining:
    """PGD training with two inner steps: about half of the images stand after minutes."""
    depth, width = (28, 10) if on_gpu else (10, 3)
    usual = 1600 if data.shape[0] == 3 else 200
    return ClassifierTraining(
        network=WideResNetSpec(depth=depth, width=width, mean=(0.5,), std=(0.25,)),
        loss=PGDAdversarial(threat=threat, steps=2, step_size=0.75 * threat.epsilon),
        optimisation=Optimisation(
            steps=steps or usual, batch_size=128, learning_rate=0.2, average=0.99, precision="bfloat16"
        ),
        augment=PadCrop(padding=data.shape[1] // 8, flip=data.flip_safe),
        validations=4,
        threat=threat,
    )


def problem(asked: argparse.Namespace) -> tuple[Problem, dict[str, Any]]:
    """The trained network, the images (evenly spread over the test part), and what is told of them."""
    on_gpu = asked.device != "cpu"
    data, trained, attacked = image_set(on_gpu)
    spec = fill_threat(training(data, trained, on_gpu, asked.steps), trained)
    made = Store(Path(asked.runs), machine=Machine(device=asked.device)).once(
        train_classifier, spec, data, None, seed=0
    )
    model = load_classifier(made.file("classifier.safetensors"))
    flops = forward_flops(model, data.shape[1])  # type: ignore[arg-type]
    torch.use_deterministic_algorithms(False)
    count = asked.skip + asked.images
    rows = torch.linspace(0, len(data.test.labels) - 1, count).round().long()[asked.skip :]
    if asked.epsilon:
        attacked = replace(attacked, epsilon=asked.epsilon / 255)
    x, y = (part[rows].to(asked.device) for part in (data.test.images, data.test.labels))
    network = f"WRN-{spec.network.depth}-{spec.network.width}"  # type: ignore[union-attr]
    facts = {"data": data.name, "network": network, "forward_mflop": round(flops / 1e6, 1)}
    facts |= {"threat": str(attacked), "trained": str(trained), "images": len(y), "skip": asked.skip}
    return Problem(model.to(asked.device), x, y, attacked, asked.seed), facts


# ---- the reference ----


class Notes(logging.Handler):
    """What the reference tells after each attack: how many stand, and the seconds so far."""

    def __init__(self) -> None:
        super().__init__()
        self.after: list[tuple[str, float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line.startswith("robust accuracy after "):
            name, rest = line.removeprefix("robust accuracy after ").split(": ")
            share, seconds = rest.split("% (total time ")
            self.after.append((name.lower(), float(share) / 100, float(seconds.split()[0])))


def reference(at: Problem, batch_size: int, short: bool = False) -> Found:
    """pyautoattack's standard version; `short`: each of its attacks with a few steps."""
    from pyautoattack import AutoAttack as Theirs
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    norm, device = NORMS[at.threat.norm], str(at.images.device)
    suite = Theirs(at.model, norm=norm, eps=at.threat.epsilon, seed=at.seed, version="standard", device=device)
    if short:
        given: dict[str, Any] = {"norm": norm, "eps": at.threat.epsilon, "device": device, "logger": suite.logger}
        suite.apgd = APGDAttack(at.model, n_iter=STEPS, **given)
        suite.apgd_targeted = APGDAttack_targeted(at.model, n_iter=STEPS, **given)
        suite.fab.n_iter, suite.square.n_queries = STEPS, QUERIES
    notes = Notes()
    suite.logger.setLevel(logging.DEBUG)
    suite.logger.propagate = False
    suite.logger.addHandler(notes)
    begun, cpu = wait(at), time.process_time()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, _ = suite.run_standard_evaluation(at.images, at.labels, batch_size=batch_size)
    seconds, cpu = wait(at) - begun, time.process_time() - cpu
    suite.logger.removeHandler(notes)
    robust, right = standing(at, found) & standing(at, at.images), standing(at, at.images)
    return Found(robust, seconds, cpu, *shared_out(notes.after, int(right.sum()), len(right)))


def shared_out(after: list[tuple[str, float, float]], right: int, count: int) -> tuple[dict[str, float], float, float]:
    """Seconds of each attack, and the mean share of an image that stands and of one that was broken."""
    attacks, spent, stand, before, broken = {}, 0.0, right, 0.0, 0.0
    for name, share, total in after:
        left = round(share * count)
        attacks[name], before = round(total - before, 2), total
        spent += attacks[name] / max(stand, 1)
        broken += spent * (stand - left)
        stand = left
    return attacks, spent, broken / max(right - stand, 1)


def standing(at: Problem, images: Tensor) -> np.ndarray:
    """[B] whether these images are classified right."""
    with torch.no_grad():
        right = [at.model(x).argmax(1) == y for x, y in zip(images.split(250), at.labels.split(250), strict=True)]
    return torch.cat(right).cpu().numpy()


def wait(at: Problem) -> float:
    """Now, when the device has done what it was given."""
    if at.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- ours ----


def ours(at: Problem, batch_size: int, short: bool = False, precision: str = "float32") -> Found:
    """gambeson's AutoAttack, version standard."""
    budget: dict[str, Any] = {"steps": STEPS, "queries": QUERIES} if short else {}
    suite = AutoAttack(threat=at.threat, seed=at.seed, precision=precision, **budget)  # type: ignore[arg-type]
    begun, cpu = wait(at), time.process_time()
    result = suite(at.model, at.images, at.labels, batch_size=batch_size)
    seconds, cpu, robust = wait(at) - begun, time.process_time() - cpu, result.robust.cpu().numpy()
    each = {name: result.column(f"{name}_seconds") for name in suite.names}
    spent = np.sum(list(each.values()), axis=0)
    broken = ~robust & (result.column("broken_by") != "clean")
    attacks = {name: round(float(values.sum()), 2) for name, values in each.items()}
    return Found(robust, seconds, cpu, attacks, mean(spent[robust]), mean(spent[broken]))


def mean(values: np.ndarray) -> float:
    """The mean, 0 of nothing."""
    return float(values.mean()) if len(values) else 0.0


@contextmanager
def without_refill() -> Iterator[None]:
    """Batches are filled only when they are empty: waiting images do not take the lanes of those that end."""
    fill = Chase._fill

    def only_when_empty(self: Chase) -> None:
        if self.lanes is None or not len(self.lanes.row):
            fill(self)

    with patch.object(Chase, "_fill", only_when_empty):
        yield


@contextmanager
def without_dropping() -> Iterator[None]:
    """Fooled images climb on to the end of their climb, as in the reference; Square drops them there, too."""
    note, leave = Board.note, Chase._leave

    def keep(self: Board, lanes: Any) -> None:
        stood = self.right[lanes.row]
        note(self, lanes.only(stood))

    def only_at_the_end(self: Chase, lanes: Any) -> Any:
        if isinstance(self.attack, Square):
            return leave(self, lanes)
        ended = self.attack.finished(lanes)
        stands, last = self.board.right[lanes.row], self.attack.runs(self.board.classes) - 1
        again = zip(lanes.row[ended & stands].tolist(), lanes.run[ended & stands].tolist(), strict=True)
        self.waiting.extendleft(reversed([(row, run + 1) for row, run in again if run < last]))
        return lanes.only(~ended)

    with patch.object(Board, "note", keep), patch.object(Chase, "_leave", only_at_the_end):
        yield


def under(context: Callable[[], Any], work: Callable[..., Found]) -> Callable[..., Found]:
    """The row with something taken away."""

    def changed(at: Problem, batch_size: int, short: bool = False) -> Found:
        with context():
            return work(at, batch_size, short)

    return changed


@contextmanager
def without_both() -> Iterator[None]:
    """Neither."""
    with without_refill(), without_dropping():
        yield


def in_bfloat16(at: Problem, batch_size: int, short: bool = False) -> Found:
    """Ours, searching in bfloat16; successes are verified in float32."""
    return ours(at, batch_size, short, "bfloat16")


def side_by_side(at: Problem, batch_size: int, short: bool = False, precision: str = "float32") -> Found:
    """Ours as `gambeson evaluate` uses a CPU: a process of one thread on each core, each with its share of the images.

    CPU seconds are those of the processes together.
    """
    count, begun = torch.get_num_threads(), wait(at)
    with pool(count) as workers:
        parts = [replace(at, images=at.images[i::count], labels=at.labels[i::count]) for i in range(count)]
        found = [f.result() for f in [workers.submit(ours, part, batch_size, short, precision) for part in parts]]
    robust = np.zeros(len(at.labels), dtype=bool)
    for i, one in enumerate(found):
        robust[i::count] = one.robust
    attacks = {name: round(sum(one.attacks[name] for one in found), 2) for name in found[0].attacks}
    costs = (float(np.mean([getattr(one, name) for one in found])) for name in ("per_robust", "per_broken"))
    return Found(robust, wait(at) - begun, sum(one.cpu_seconds for one in found), attacks, *costs)


def side_by_side_in_bfloat16(at: Problem, batch_size: int, short: bool = False) -> Found:
    """The same, searching in bfloat16."""
    return side_by_side(at, batch_size, short, "bfloat16")


@contextmanager
def without_channels_last() -> Iterator[None]:
    """Images go into the network with channels outermost, as the reference gives them."""
    with patch.object(views, "_channels_last", lambda x: x):
        yield


ROWS: dict[str, Callable[..., Found]] = {
    "reference": reference,
    "ours": ours,
    "ours_bfloat16": in_bfloat16,
    "ours_no_channels_last": under(without_channels_last, ours),
    "ours_side_by_side": side_by_side,
    "ours_side_by_side_bfloat16": side_by_side_in_bfloat16,
    "ours_no_refill": under(without_refill, ours),
    "ours_no_dropping": under(without_dropping, ours),
    "ours_neither": under(without_both, ours),
}
OWN_TRIAL = ("reference", "ours", "ours_bfloat16")
"""Rows whose batch size is tried; the others take that of `ours`."""


def best_size(work: Callable[..., Found], at: Problem, sizes: list[int]) -> tuple[int, dict[int, float]]:
    """The batch size that a short trial is fastest with, and the seconds of each: AutoAttack's own weights of its
    attacks (100 steps, 5,000 queries), so that a trial stands for the whole."""
    found = {}
    for size in sizes:
        done = work(at, size, True).attacks
        found[size] = sum(s * (5000 / QUERIES if name == "square" else 100 / STEPS) for name, s in done.items())
    return min(found, key=lambda size: found[size]), {size: round(s, 1) for size, s in found.items()}


def told(found: Found, first: Found | None, batch_size: int, tried: dict[int, float]) -> dict[str, Any]:
    """A row as JSON; `first` is the reference's, if it ran."""
    stands, count = int(found.robust.sum()), len(found.robust)
    interval = wilson(stands, count)
    row: dict[str, Any] = {
        "seconds": round(found.seconds, 1),
        "cpu_seconds": round(found.cpu_seconds, 1),
        "seconds_per_robust": round(found.per_robust, 3),
        "seconds_per_broken": round(found.per_broken, 3),
        "robust": round(stands / count, 4),
        "interval": [round(interval.low, 4), round(interval.high, 4)],
        "batch_size": batch_size,
        "tried": tried,
        "attacks": found.attacks,
    }
    if first is not None and first is not found:
        broken = {"only_ours_broke": first.robust & ~found.robust, "only_theirs_broke": ~first.robust & found.robust}
        row |= {"times_as_fast": round(first.seconds / found.seconds, 2)}
        row |= {"times_as_fast_by_cpu": round(first.cpu_seconds / found.cpu_seconds, 2)}
        row |= {"agreement": round(float((first.robust == found.robust).mean()), 4)}
        row |= {name: int(which.sum()) for name, which in broken.items()}
    return row


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--images", type=int, default=500)
    reader.add_argument("--skip", type=int, default=0, help="images left out before them, for runs in slices")
    reader.add_argument("--threads", type=int, default=1, help="on a CPU; the same for every row")
    reader.add_argument("--device", default="cpu")
    reader.add_argument("--precision", default="", help="float32 or bfloat16: only that row of ours")
    reader.add_argument("--rows", default="", help=f"some of {', '.join(ROWS)}")
    reader.add_argument("--sizes", default=",".join(map(str, SIZES)), help="batch sizes to try; one: no trial")
    reader.add_argument("--trial", type=int, default=500, help="images of the trials")
    reader.add_argument("--epsilon", type=float, default=0.0, help="of the attack, in 255ths")
    reader.add_argument("--steps", type=int, default=0, help="of the training")
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--data-root", default="", help="where CIFAR-10 lies (default $GAMBESON_DATA or ./data)")
    reader.add_argument("--runs", default="runs", help="where the trained network is kept")
    asked = reader.parse_args()
    if asked.data_root:
        os.environ["GAMBESON_DATA"] = asked.data_root
    torch.set_num_threads(asked.threads)
    names = [n for n in asked.rows.split(",") if n] or list(ROWS)
    if asked.precision:
        names = ["reference", "ours" if asked.precision == "float32" else "ours_bfloat16"]
    on_gpu, sizes = asked.device != "cpu", [min(int(s), asked.images) for s in asked.sizes.split(",")]
    at, known = problem(asked)
    facts: dict[str, Any] = {
        "benchmark": "evaluation",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {asked.threads} threads",
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),
        **known,
        "rows": {},
    }
    results, chosen = {}, {}
    for name in names:
        work, tried = ROWS[name], {}
        size = chosen.get("ours", sizes[0])
        if name in OWN_TRIAL and len(sizes) > 1:
            size, tried = best_size(work, at.part(asked.trial), list(dict.fromkeys(sizes)))
        chosen[name] = size
        results[name] = work(at, size)
        facts["rows"][name] = told(results[name], results.get("reference"), size, tried)
        print(json.dumps(facts), flush=True)
    print(json.dumps(facts | {"load_after": round(os.getloadavg()[0], 2)}))


if __name__ == "__main__":
    main()
