"""Entry 3, evaluation: standard AutoAttack on WRN-28-10 and CIFAR-10 beside the reference, slice by slice.

The network is trained first (PGD with 2 steps, 1,600 steps; kept below --out), verdicts are compared image by image,
and robust accuracy stands beside every time. A slice of ours and the same slice of the reference are rows of their own:
any number of them is a result, started again the command goes on with the next.

    python benchmarks/gpu/autoattack.py [--images 1000] [--slice 125]       needs unpack.py's cifar10 and pyautoattack
    python benchmarks/gpu/autoattack.py --rows ours,ours_bfloat16           without the reference's package
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

import numpy as np
import torch
from entry import Entry, reader_of, run
from evaluation import ROWS, Problem, training
from training import spread

from gambeson.models.classifiers import load_classifier
from gambeson.recipe import fill_threat
from gambeson.robustness.intervals import wilson
from gambeson.threat import ThreatModel
from gambeson.training.classifier import train_classifier

TRAINED, ATTACKED = ThreatModel(epsilon=8 / 255), ThreatModel(epsilon=4 / 255)
"""What the network is trained for, and attacked with: about half of the images stand after a short training."""


def problem(entry: Entry, words: argparse.Namespace) -> Problem:
    """The trained network and the images, evenly spread over the test part."""
    if entry.tiny:
        from peers import linear_problem

        return linear_problem(entry.device, words.images)
    data = entry.images("cifar10")
    spec = fill_threat(training(data, TRAINED, True, words.steps), TRAINED)
    made = entry.once(train_classifier, spec, data, None, seed=0)
    model = load_classifier(made.file("classifier.safetensors")).to(entry.device)
    torch.use_deterministic_algorithms(False)
    rows = torch.linspace(0, len(data.test) - 1, words.images).round().long()
    images, labels = (part[rows].to(entry.device) for part in (data.test.images, data.test.labels))
    return Problem(model, images, labels, ATTACKED, 0)


def attacked(at: Problem, name: str, start: int, size: int, short: bool) -> dict[str, Any]:
    """One slice by one row of benchmarks/evaluation.py."""
    part = Problem(at.model, at.images[start : start + size], at.labels[start : start + size], at.threat, at.seed)
    found = ROWS[name](part, len(part.labels), short)
    return {"seconds": round(found.seconds, 2), "robust": found.robust.astype(int).tolist(), "attacks": found.attacks}


def concluded(entry: Entry, names: list[str], starts: range) -> dict[str, Any]:
    """Each row over the slices that it has: seconds, accuracy; beside the reference on the slices that both have."""
    told: dict[str, Any] = {}
    for name in names:
        have = [s for s in starts if f"{name}/{s}" in entry.rows]
        if not have:
            continue
        robust = np.concatenate([entry.rows[f"{name}/{s}"]["robust"] for s in have])
        at = wilson(int(robust.sum()), len(robust))
        told[name] = {
            "images": len(robust),
            "seconds": round(sum(entry.rows[f"{name}/{s}"]["seconds"] for s in have), 1),
            "robust": round(at.estimate, 4),
            "interval": [round(at.low, 4), round(at.high, 4)],
        }
        both = [s for s in have if name != "reference" and f"reference/{s}" in entry.rows]
        if both:
            pairs = [(entry.rows[f"reference/{s}"], entry.rows[f"{name}/{s}"]) for s in both]
            same = np.concatenate([np.equal(a["robust"], b["robust"]) for a, b in pairs])
            told[name] |= {"agreement": round(float(same.mean()), 4), "compared": len(same)}
            told[name] |= {"times_as_fast": spread([a["seconds"] / b["seconds"] for a, b in pairs])}
    return {"by_row": told, "network": "linear" if entry.tiny else "WRN-28-10", "threat": str(ATTACKED)}


def planned(words: argparse.Namespace) -> tuple[list[str], range]:
    """The rows that are asked for, and where slices begin."""
    names = [name for name in words.rows.split(",") if name]
    return names, range(0, words.images, words.slice)


def work(entry: Entry, words: argparse.Namespace) -> dict[str, Any]:
    """Slice after slice, every row of it before the next."""
    names, starts = planned(words)
    if importlib.util.find_spec("pyautoattack") is None and "reference" in names:
        print("reference: pyautoattack is not installed, left out", flush=True)
        names.remove("reference")
    at = problem(entry, words)
    for start in starts:
        for name in names:
            known = [r["seconds"] for key, r in entry.rows.items() if key.startswith(f"{name}/")]
            first = 250.0 if name == "reference" else 120.0
            needs = 0.0 if entry.tiny else max((1.3 * seconds for seconds in known), default=first)
            entry.row(f"{name}/{start}", lambda n=name, s=start: attacked(at, n, s, words.slice, entry.tiny), needs)
    return {}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The entry; returns its last line."""
    reader = reader_of(__doc__, images=1000, slice=125, steps=0)
    reader.add_argument("--rows", default="reference,ours,ours_bfloat16", help=f"some of {', '.join(ROWS)}")
    words = reader.parse_args(argv)
    names, starts = planned(words)
    keys = [f"{name}/{start}" for name in names for start in starts]
    return run("autoattack", words, work, keys, lambda entry: concluded(entry, names, starts))


if __name__ == "__main__":
    main()
