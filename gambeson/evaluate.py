"""`gambeson evaluate`: how often a classifier is right under attack, the number that people quote, and its page.

Stopped at any time, the same command goes on; under torchrun every process attacks its share of the images.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from gambeson import distributed
from gambeson.data.corruptions import SEVERITIES
from gambeson.data.datasets import Data, Digits, door
from gambeson.data.imageset import ImageSet
from gambeson.disk import open_folder
from gambeson.errors import UserError, require
from gambeson.machine import Machine
from gambeson.models.memory import memory_told
from gambeson.options import overridden, take, take_flag, take_machine, take_number, take_runs
from gambeson.processes import cores
from gambeson.report.delivery import free
from gambeson.report.evaluation_folder import ROWS, Board, deliver
from gambeson.robustness.assess import Assessment, assess
from gambeson.robustness.autoattack import ATTACKS, BLACK_BOX, VERSIONS, AutoAttack
from gambeson.robustness.corrupted import Corrupting, corrupt
from gambeson.robustness.subjects import Named, logits_wanted, subject_of, trained_threat
from gambeson.robustness.tested import tested_images, with_names
from gambeson.robustness.views import Precision
from gambeson.screen import shown
from gambeson.store import Artifact, Store
from gambeson.threat import ThreatModel

QUICK = {"steps": 20, "targets": 3, "queries": 500}
"""The budgets of --quick."""


@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """An evaluation alone."""

    data: Data = Digits()  # the labelled images; those of its test part are attacked
    seed: int = 0  # seed of the attacks' draws
    assessment: Assessment = Assessment()  # which attacks, on which images


USAGE = f"""usage: gambeson evaluate CLASSIFIER --data NAME|FOLDER|FILE.npz --threat linf:8/255 [OPTIONS]

Measures how often a classifier is right under attack, by AutoAttack (Croce & Hein 2020): a table, one row per image,
and a page. Stop it at any time; the same command goes on, and finds a finished result at once. On several GPUs:
torchrun --nproc-per-node N -m gambeson evaluate ... --device cuda

CLASSIFIER: a folder that `gambeson train` wrote, or a classifier.safetensors; a checkpoint file of RobustBench (.pt);
an .onnx file (no gradients, so black-box attacks only); with --trust a TorchScript file (.pt), a torch.export file
(.pt2) or module:function. Logits of images in [0, 1], with the normalisation inside.

options, besides every field (gambeson evaluate CLASSIFIER --data digits --help lists them):
  --data D         a named set (gambeson data list), a folder with a folder of images for each class, an .npz file with
                   x_test and y_test. One with images and labels alone: all of them; for a classifier of
                   `gambeson train` the share that training holds out, unless --all-images
  --data-root DIR  where named image sets lie (default ./data or $GAMBESON_DATA)
  --threat T       what the attacker may do: linf:8/255, l2:0.5, l1:12 (default: what a folder of `gambeson train` says
                   that it was trained to withstand, otherwise linf:8/255)
  --version V      {", ".join(VERSIONS)} (worst: standard and aa+mt)
  --attacks A,B    these attacks in this order instead: {", ".join(ATTACKS[:6])},
                   {", ".join(ATTACKS[6:])}
  --quick          fewer steps, targets and queries ({", ".join(f"{v} {k}" for k, v in QUICK.items())}): not AutoAttack
  --images N       so many test images, evenly spread (default all)
  --precision P    of the search: float32 (default) or bfloat16, faster on some GPUs, which may miss attacks
  --seed S         seed of the attacks' draws (default 0)
  --batch-size B   images in the network at once (default 256; halved where memory is short)
  --chunk N        images that one process attacks together (default 512); fewer let more workers work
  --corruptions [S,S]  accuracy under common corruptions as well, at these severities of 1 to 5 (default 1,2,3,4,5)
  --trust          run the program that CLASSIFIER is, with your rights
  --zoo NAME       the entry of RobustBench that a checkpoint file is, or WRN-28-10 and its kind (default: its name)
  --submission DIR a folder ready for RobustBench, with --name FirstauthorYEARWord_ARCH --title --authors --venue
                   --link, and --additional-data where other real images were trained on
  --out DIR        where rows, page and records go (default RUNS/evaluations/...)
  --runs DIR       where results live (default ./runs or $GAMBESON_RUNS)
  --device D       cpu (default), cuda, cuda:1, mps; also $GAMBESON_DEVICE
  --workers N      processes of one thread each (default: the cores of this machine; 1 on an accelerator)
  --compile        torch.compile: needs a C++ compiler on a CPU, pays off in long evaluations"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asked for."""

    word: str  # the classifier
    evaluating: Evaluating
    entry: str | None
    trust: bool
    everything: bool  # whether all images of an .npz file are test images
    corrupting: Corrupting | None
    board: Board
    runs: Path
    machine: Machine
    out: Path | None
    command: str


def read(argv: list[str]) -> Asked:
    """The words of the command. Raises UserError: what was expected, what came, the fix."""
    words = list(argv)
    data, root, out, entry = (take(words, f"--{name}") for name in ("data", "data-root", "out", "zoo"))
    trust, everything = take_flag(words, "--trust"), take_flag(words, "--all-images")
    board, corrupting = Board.taken(words), _corrupting(words)
    runs, machine, assessment = take_runs(words), take_machine(words), _assessment(words)
    first = words.pop(0) if words and not words[0].startswith("-") else None
    require(first is not None, "gambeson evaluate", "a classifier first (a folder, a file or module:function)", argv)
    require(data is not None, "--data", "an image set: a name, a folder or an .npz file", data)
    unused = "nothing: --batch-size is how many images are in the network at once"
    require(machine.micro_batch is None, "--micro-batch", unused, machine.micro_batch)
    assert first is not None
    assert data is not None
    if root is not None:
        os.environ["GAMBESON_DATA"] = root
    attack = assessment.autoattack
    attack = replace(attack, threat=attack.threat or trained_threat(first) or ThreatModel())
    default = Evaluating(data=door(data), assessment=replace(assessment, autoattack=attack))
    evaluating = overridden(default, words, f"gambeson evaluate {first} --data {data}")
    place = None if out is None else Path(out)
    require(place is None or free(place, ROWS), "--out", "a new folder, or one with this evaluation", out)
    assessment = evaluating.assessment
    files = {"runs": runs.resolve(), "out": place, "entry": entry, "trust": trust, "everything": everything}
    return Asked(
        word=first,
        evaluating=evaluating,
        corrupting=corrupting and replace(corrupting, images=assessment.images, batch_size=assessment.batch_size),
        board=board,
        machine=machine,
        command=shlex.join(["gambeson", "evaluate", *argv]),
        **files,
    )


def _assessment(words: list[str]) -> Assessment:
    """The assessment that the short options ask for; the threat stays out where none does."""
    names = ("threat", "version", "attacks", "precision")
    threat, version, attacks, precision = (take(words, f"--{name}") for name in names)
    images, batch, chunk = (take_number(words, f"--{name}") for name in ("images", "batch-size", "chunk"))
    quick = take_flag(words, "--quick")
    require(version is None or attacks is None, "--attacks", "no --version beside it: either says which", attacks)
    require(version is None or version in VERSIONS, "--version", ", ".join(VERSIONS), version)
    known = get_args(Precision)
    require(precision in (None, *known), "--precision", " or ".join(known), precision)
    chosen = () if attacks is None else tuple(filter(None, (name.strip() for name in attacks.split(","))))
    require(attacks is None or bool(chosen), "--attacks", f"names out of {', '.join(ATTACKS)}", attacks)
    said = {"version": "custom" if chosen else version, "precision": precision, **(QUICK if quick else {})}
    sizes = {"images": images, "batch_size": batch, "chunk": chunk}
    attack: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    whole: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    ball = ThreatModel.parse(threat) if threat else None
    return Assessment(autoattack=AutoAttack(threat=ball, attacks=chosen, **attack), **whole)


def _corrupting(words: list[str]) -> Corrupting | None:
    """What --corruptions asks for; severities may follow it. None without."""
    places = [i for i, word in enumerate(words) if word.partition("=")[0] == "--corruptions"]
    if not places:
        return None
    word, severities = words.pop(places[0]).partition("=")[2], SEVERITIES
    follows = words[places[0]] if places[0] < len(words) else ""
    if not word and follows[:1].isdigit():
        word = words.pop(places[0])
    if word:
        numbers = [int(part) if part.strip().isdigit() else 0 for part in word.split(",")]
        require(set(numbers) <= set(SEVERITIES), "--corruptions", "severities from 1 to 5, such as 1,3,5", word)
        severities = tuple(sorted(set(numbers)))
    return Corrupting(severities=severities)


def evaluate(argv: list[str]) -> None:
    """gambeson evaluate CLASSIFIER --data NAME|FOLDER|FILE.npz [OPTIONS]"""
    asks, named = {"--help", "-h"} & set(argv), any(word.startswith("--data") for word in argv)
    if not argv or (asks and not named):
        print(USAGE)
        return
    asked = read(argv)
    if asked.out is not None:
        open_folder(asked.out.parent)
    size = asked.evaluating.assessment.batch_size
    with memory_told(
        f"Start the command again with fewer images in the network at once (--batch-size, now {size}), or with fewer "
        f"--workers (now {asked.machine.workers}); with the same words it goes on from what was kept"
    ):
        _evaluate(asked)


def _evaluate(asked: Asked) -> None:
    """The evaluation, alone or as one process of several."""
    with distributed.joined(asked.machine.device) as device:
        asked = replace(asked, machine=replace(asked.machine, device=device))
        real, remarks = _images(asked)
        subject = subject_of(
            asked.word, real.shape, entry=asked.entry, trust=asked.trust, compiled=asked.machine.compile
        )
        real = _fitting(real, logits_wanted(subject, real, device), subject)
        spec = _possible(asked.evaluating.assessment, subject)
        asked.board.check(subject)
        threads = torch.get_num_threads()
        torch.set_num_threads(_threads(spec, real, asked.machine))
        try:
            made, corrupted = _make(asked, spec, subject, real)
        finally:
            torch.set_num_threads(threads)
        if distributed.leads():
            deliver(made, corrupted, subject, asked.board, asked.command, remarks, _place(asked, real, spec, made))


def _images(asked: Asked) -> tuple[ImageSet, list[str]]:
    """The images, and what a reader must know about where they come from."""
    ours = Path(asked.word).is_dir() or Path(asked.word).suffix == ".safetensors"
    return tested_images(asked.evaluating.data, ours, asked.everything)


def _fitting(real: ImageSet, classes: int, subject: Named) -> ImageSet:
    """The images with a name for every class of the classifier. UserError where it has others."""
    real = with_names(real, classes)
    have = len(real.class_names) or int(real.test.labels.max()) + 1
    if have != classes:
        raise UserError(
            f"{subject.title}: expected a classifier of {real.name}'s {have} classes, got one of {classes}; name the "
            "data that it was trained on"
        )
    return real


def _possible(spec: Assessment, subject: Named) -> Assessment:
    """The assessment with the attacks that the classifier allows: without gradients Square alone."""
    attack = spec.autoattack
    if subject.gradients:
        return spec
    if attack.version == "custom":
        blind = [name for name in attack.attacks if name not in BLACK_BOX]
        expected = f"{' or '.join(BLACK_BOX)} alone: {subject.title} has no gradients for the others"
        require(not blind, "--attacks", expected, ",".join(attack.attacks))
        return spec
    return replace(spec, autoattack=replace(attack, version="custom", attacks=BLACK_BOX))


def _threads(spec: Assessment, real: ImageSet, machine: Machine) -> int:
    """Threads of this process. Several chunks go to workers of one thread, so that their number changes no bit."""
    images = min(spec.images or len(real.test), len(real.test))
    if images > spec.chunk or machine.device != "cpu":
        if distributed.leads() and 1 < -(-images // spec.chunk) < machine.workers:
            print(
                f"hint: {machine.workers} workers share {-(-images // spec.chunk)} chunks of images; "
                f"--chunk {-(-images // machine.workers)} would give each one",
                file=sys.stderr,
            )
        return 1
    return max(min(machine.workers, cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def _make(asked: Asked, spec: Assessment, subject: Named, real: ImageSet) -> tuple[Artifact, Artifact | None]:
    """The stages: the attacks, and where asked for the corruptions."""
    seed = asked.evaluating.seed
    with shown("evaluate") as (report, say):
        once: Callable[..., Artifact] = Store(asked.runs, report, asked.machine, say=say).once
        made = once(assess, spec, subject, real, seed=seed)
        corrupting = asked.corrupting
        return made, None if corrupting is None else once(corrupt, corrupting, subject, real, seed=seed)


def _place(asked: Asked, real: ImageSet, spec: Assessment, made: Artifact) -> Path:
    """Where rows, page and records go."""
    name = f"{real.name}-{spec.autoattack.version}-{made.digest[:10]}"
    return asked.out or asked.runs / "evaluations" / name


def main() -> NoReturn:
    """`python -m gambeson.evaluate`: without overridden fields it needs neither tyro nor pydantic."""
    from gambeson.cli import main as command_line

    distributed.leave(command_line(["evaluate", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
