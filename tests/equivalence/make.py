"""Makes what tests/test_reference.py compares with: the subjects' weights and what the reference package finds.

    cd tests && OMP_NUM_THREADS=1 ../.venv/bin/python -m equivalence.make [--train] [SUBJECT ...]

Training takes 2 minutes, the reference's runs 30 on one core. Weights are kept, not re-made: another machine would
train other ones. `make slow` repeats one seed of each attack and wants the kept verdicts back.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gambeson.models.files import load_tensors, save_tensors
from gambeson.recipe import fill_threat
from gambeson.store import Workspace
from gambeson.training.classifier import train_classifier

from .subjects import DATA, HERE, SUBJECTS, Subject, reference
from .theirs import RUNS, run


def train(subject: Subject) -> None:
    """Fills models/ with one subject's weights, by gambeson's own training."""
    with tempfile.TemporaryDirectory() as folder:
        training = fill_threat(subject.training, subject.threat)
        train_classifier.work(Workspace(Path(folder)), training, DATA.load(), None, seed=0)
        tensors, header = load_tensors(Path(folder) / "classifier.safetensors")
    subject.path.parent.mkdir(exist_ok=True)
    save_tensors(subject.path, tensors, {k: v for k, v in header.items() if k not in ("log", "selection")})


def attack(subject: Subject, names: list[str], arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Adds every seed of these attacks on one subject."""
    for name in names:
        found = [run(subject, name, seed) for seed in range(RUNS[name])]
        place = f"{subject.name}/{name}"
        arrays[place] = np.stack([f.right for f in found])
        for more in found[0].more:
            arrays[f"{place}/{more}"] = np.stack([f.more[more] for f in found])
        stands = arrays[place].sum(1).tolist()
        facts["runs"][place] = {"stand": stands, "seconds": [round(f.seconds, 2) for f in found]}
        print(place, facts["runs"][place], flush=True)


def save(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """The two fixtures."""
    np.savez_compressed(HERE / "reference.npz", **arrays)
    (HERE / "reference.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("subjects", nargs="*", default=list(SUBJECTS))
    reader.add_argument("--train", action="store_true", help="new weights first")
    reader.add_argument("--attacks", default=",".join(RUNS), help="only these; the others stay as they are")
    asked = reader.parse_args()
    torch.set_num_threads(1)
    arrays, facts = reference() if (HERE / "reference.json").exists() else ({}, {"runs": {}})
    facts |= {name: version(name) for name in ("pyautoattack", "torch", "numpy")}
    facts |= {"machine": platform.machine(), "threads": 1, "date": time.strftime("%Y-%m-%d")}
    for name in asked.subjects:
        subject = SUBJECTS[name]
        if asked.train:
            train(subject)
        facts.setdefault("threats", {})[name] = str(subject.threat)
        attack(subject, asked.attacks.split(","), arrays, facts)
        save(arrays, facts)


if __name__ == "__main__":
    main()
