"""`gambeson quality`: what a synthetic set is worth before anything is trained on it, in numbers with intervals.

Every measure is kept when it is finished; stopped at any time, the same command goes on with the others.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gambeson.canonical import digest, plain
from gambeson.data.datasets import Data, Digits, door
from gambeson.data.imageset import ImageSet
from gambeson.disk import atomic, open_folder, read_json, write_json
from gambeson.errors import UserError, require
from gambeson.machine import Machine, versions
from gambeson.models.memory import memory_told
from gambeson.options import overridden, take, take_flag, take_machine, take_number, take_runs
from gambeson.processes import cores
from gambeson.quality.assess import Material, assess, nearest
from gambeson.quality.features import Embedding
from gambeson.quality.sources import PARTS, Copies, PartName, Synthetic, count_copies, open_set, space_of
from gambeson.quality.table import Measures, chosen, described
from gambeson.quality.telling import Findings, markdown, terminal_table
from gambeson.robustness.subjects import Named, logits_wanted, subject_of
from gambeson.store import Artifact, Store
from gambeson.terminal import console, say
from gambeson.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Assessing:
    """An assessment of a synthetic set alone."""

    data: Data = Digits()  # the real images
    seed: int = 0  # seed of what is drawn, and of trainings
    embedding: Embedding = Embedding()  # how many images of either kind are compared in features
    measures: Measures = Measures()  # the measures and their numbers


USAGE = f"""usage: gambeson quality SYNTHETIC --data NAME|FOLDER|FILE.npz [OPTIONS]

Measures what a set of synthetic images is worth before anything is trained on it: a table, a JSON file with everything
and the table as Markdown. Every number has a 95 % interval where one can be had, and names its feature space.
Stop it at any time; the same command goes on with the measures that are missing. docs/quality.md says how to read it.

SYNTHETIC: a store, a selection (chosen.parquet or its folder), files that others published (.npz, .bin, .tar, .parquet,
a folder of these or of class folders), or an arm of a finished run: RUN:plain, of its second seed RUN:plain:1

options, besides every field (gambeson quality SYNTHETIC --data digits --help lists them):
  --data D         the real images: a named set (gambeson data list), a folder with a folder of images for each class,
                   an .npz or .parquet file. With the --data.FIELD options of the training, so that the parts are equal
  --data-root DIR  where named image sets lie (default ./data or $GAMBESON_DATA)
  --against PART   the real images that are compared: {", ".join(PARTS)} (default train). Measures that need a part
                   that nobody trained on take validation; with test they take test. Nothing is measured of test images
                   otherwise; they are always compared with the synthetic ones byte for byte, to find a set that holds
                   them
  --features F     the feature space: pixels (default); a classifier (a folder of `gambeson train`, a
                   classifier.safetensors, a checkpoint of RobustBench), whose penultimate layer it is; or, with
                   --trust, a TorchScript file that gives features (inception-2015-12-05.pt, for the FID of papers)
  --trust          run the program that --features names, with your rights
  --measures M     names with commas between, fast (default) or all (fast, and those that train networks)
  --limit N        images of either kind whose features are compared (default 50,000, drawn by the seed)
  --classifier C   the classifier that `transfer` looks at, as `gambeson evaluate` takes it
  --threat T       what the attacker of `transfer` may do, such as linf:8/255 (default)
  --seed S         seed of what is drawn, and of trainings (default 0)
  --allow-copies   measure a set although real images are in it, byte for byte
  --out FILE.json  where everything goes, with FILE.md beside it, and with `memorisation` FILE.nearest.parquet: the
                   nearest train image of every synthetic one (default RUNS/quality/...)
  --runs DIR       where results live (default ./runs or $GAMBESON_RUNS)
  --device D       cpu (default), cuda, cuda:1, mps; also $GAMBESON_DEVICE: of encoders, classifiers and trainings
  --workers N      threads on a CPU (default: its cores)
  --compile        classifiers in training go through torch.compile: needs a C++ compiler

measures:
{described()}"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asked for."""

    word: str  # the synthetic set
    assessing: Assessing
    against: PartName
    space: str
    trust: bool
    names: tuple[str, ...]
    named: bool  # whether the measures were named one by one
    classifier: str | None
    allow_copies: bool
    runs: Path
    machine: Machine
    out: Path | None
    command: str


def read(argv: list[str]) -> Asked:
    """The words of the command. Raises UserError: what was expected, what came, the fix."""
    words = list(argv)
    data, root, against, space = (take(words, f"--{name}") for name in ("data", "data-root", "against", "features"))
    measures, classifier, out = (take(words, f"--{name}") for name in ("measures", "classifier", "out"))
    threat, limit = take(words, "--threat"), take_number(words, "--limit")
    trust, copies = take_flag(words, "--trust"), take_flag(words, "--allow-copies")
    runs, machine = take_runs(words), take_machine(words)
    first = words.pop(0) if words and not words[0].startswith("-") else None
    require(first is not None, "gambeson quality", "synthetic images first (a store, a selection, RUN:plain)", argv)
    require(data is not None, "--data", "the real images: a name, a folder or an .npz file", data)
    unused = "nothing: --embedding.batch_size is how many images are in the encoder at once"
    require(machine.micro_batch is None, "--micro-batch", unused, machine.micro_batch)
    require(against in (None, *PARTS), "--against", ", ".join(PARTS), against)
    require(out is None or out.endswith(".json"), "--out", "the name of a .json file", out)
    names, named = chosen(measures or "fast")
    if root is not None:
        os.environ["GAMBESON_DATA"] = root
    default = Assessing(data=door(str(data)), measures=_measures(threat), embedding=_embedding(limit))
    assessing = overridden(default, words, f"gambeson quality {first} --data {data}")
    return Asked(
        word=str(first),
        assessing=assessing,
        against=next(part for part in PARTS if part == (against or "train")),
        space=space or "pixels",
        trust=trust,
        names=names,
        named=named,
        classifier=classifier,
        allow_copies=copies,
        runs=runs.resolve(),
        machine=machine,
        out=None if out is None else Path(out),
        command=shlex.join(["gambeson", "quality", *argv]),
    )


def _measures(threat: str | None) -> Measures:
    measures = Measures()
    if threat is None:
        return measures
    return replace(measures, transfer=replace(measures.transfer, threat=ThreatModel.parse(threat)))


def _embedding(limit: int | None) -> Embedding:
    return Embedding() if limit is None else Embedding(limit=limit)


def quality(argv: list[str]) -> None:
    """gambeson quality SYNTHETIC --data NAME|FOLDER|FILE.npz [OPTIONS]"""
    asks, named = {"--help", "-h"} & set(argv), any(word.startswith("--data") for word in argv)
    if not argv or (asks and not named):
        print(USAGE)
        return
    asked = read(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(min(asked.machine.workers, cores()), 1))
    try:
        with memory_told("Start the same command again with fewer images (--limit N): it goes on from what was kept"):
            _assess(asked)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _screen(asked: Asked) -> Iterator[Callable[[str], Callable[..., Artifact]]]:
    """A job's name -> the `once` that shows its stages under that name."""
    from gambeson.engine import News
    from gambeson.screen import ProgressScreen

    with ProgressScreen(console()) as screen:

        def begin(name: str) -> Callable[..., Artifact]:
            told = lambda stage, done, total: screen.show(News(name, stage, done, total))  # noqa: E731
            return Store(asked.runs, told, asked.machine, say=screen.say).once

        yield begin


def _assess(asked: Asked) -> None:
    """Everything, from the words to the files."""
    real = asked.assessing.data.load()
    with _screen(asked) as begin:
        source = _open(asked, real, begin("synthetic images"))
        copies = count_copies(source, real, asked.assessing.seed)
        if not asked.allow_copies:
            copies.refuse(asked.word, real)
        material = _material(asked, real, source, begin("features"))
        facts = _facts(asked, material, copies)
        path = asked.out or asked.runs / "quality" / f"{real.name}-{digest(_identity(facts))[:10]}.json"
        _free(path, facts)
        lines = assess(material, asked.assessing.measures, asked.names, asked.named, begin)
        compared = any(line.measure == "memorisation" and line.found is not None for line in lines)
        pairs = nearest(material, asked.assessing.measures, begin("memorisation")) if compared else None
    findings = Findings(lines=tuple(lines), facts=facts, notes=_notes(copies, material))
    _deliver(findings, path, pairs)


def _open(asked: Asked, real: ImageSet, once: Callable[..., Artifact]) -> Synthetic:
    """The synthetic set: of a run's arm, or what the word names."""
    run, _, arm = asked.word.partition(":")
    word = asked.word if not arm or Path(asked.word).exists() else _of_run(run, arm, asked.runs)
    return open_set(word, real, once)


def _of_run(run: str, arm: str, runs: Path) -> str:
    """The folder of the selection that an arm of a finished run was trained with."""
    from gambeson.run import find_run, open_run

    chapters = open_run(find_run(run, runs)).chapters
    made = {f"{c.arm.value}:{c.seed}": c.artifacts["chosen"] for c in chapters if "chosen" in c.artifacts}
    found = [name for name in made if name == arm or name.partition(":")[0] == arm]
    if not found:
        arms = ", ".join(made) or "it has none"
        raise UserError(f"{run}: expected an arm of this run with synthetic images ({arms}), got {arm!r}")
    return str(made[found[0]].folder)


def _material(asked: Asked, real: ImageSet, source: Synthetic, once: Callable[..., Artifact]) -> Material:
    """What the measures are given. UserError for a space or a classifier that does not fit the images."""
    device = asked.machine.device
    space = space_of(asked.space, real, asked.trust, device)
    classifier = None if asked.classifier is None else _classifier(asked, real)
    return Material(
        real=real,
        source=source,
        space=space,
        against=asked.against,
        embedding=asked.assessing.embedding,
        seed=asked.assessing.seed,
        device=device,
        classifier=classifier,
        once=once,
    )


def _classifier(asked: Asked, real: ImageSet) -> Named:
    """The classifier that `transfer` looks at. UserError for one of other images or classes."""
    subject = subject_of(str(asked.classifier), real.shape, trust=asked.trust)
    classes = logits_wanted(subject, replace(real, test=real.train), asked.machine.device)
    names = len(real.class_names)
    require(classes == names, "--classifier", f"a classifier of {real.name}'s {names} classes", classes)
    return subject


def _facts(asked: Asked, material: Material, copies: Copies) -> dict[str, Any]:
    """What the numbers are of, and how they were made."""
    real, source = material.real, material.source
    return {
        "title": f"{asked.word} beside {material.against} images of {real.name}",
        "data": {"name": real.name, "digest": real.digest, "door": plain(asked.assessing.data)},
        "parts": {"compared": material.against, "held_out": material.held},
        "synthetic": {"name": asked.word, "digest": source.digest, "images": len(source)},
        "space": {"name": material.space.name, "digest": material.space.digest},
        "classifier": None
        if material.classifier is None
        else {"name": material.classifier.title, "digest": material.classifier.digest},
        "copies": copies.plain(),
        "asked": {name: plain(part, drop_neutral=True) for name, part in _parts(asked).items()},
        "seed": material.seed,
        "device": asked.machine.device,
        "versions": versions(),
        "command": asked.command,
    }


def _notes(copies: Copies, material: Material) -> tuple[str, ...]:
    """What a reader must know besides the lines' own notes."""
    limit, notes = material.embedding.limit, list[str]()
    for what, count in (("synthetic", len(material.source)), ("train", len(material.real.train))):
        if limit is not None and count > limit:
            notes.append(f"Features are those of {limit:,} of {count:,} {what} images; copies of others do not show.")
    for part, count in copies.of_parts.items():
        if count:
            notes.append(f"{count:,} of {copies.looked_at:,} synthetic images are, byte for byte, {part} images.")
    if copies.repeated:
        notes.append(f"{copies.repeated:,} of {copies.looked_at:,} synthetic images repeat an earlier one of the set.")
    return tuple(notes)


def _parts(asked: Asked) -> dict[str, Any]:
    """What decides about the numbers, besides the images, the space and the classifier."""
    spec, measures = asked.assessing, {name: asked.assessing.measures.component(name) for name in asked.names}
    return {"against": asked.against, "embedding": spec.embedding, "seed": spec.seed, "measures": measures}


WIDTH = 120
"""Of the table where it does not go to a terminal."""
DIGESTED = ("data", "synthetic", "space", "classifier")


def _identity(facts: dict[str, Any]) -> Any:
    """What makes two results the same, whatever their sets are called and wherever they lie."""
    digests = [None if facts[name] is None else facts[name]["digest"] for name in DIGESTED]
    return json.loads(json.dumps([digests, facts["asked"]]))


def _free(path: Path, facts: dict[str, Any]) -> None:
    """UserError where a file lies that is not this command's result."""
    open_folder(path.parent)
    if not path.exists():
        return
    try:
        found = read_json(path)
    except OSError:  # no JSON
        found = None
    same = isinstance(found, dict) and set(facts) <= set(found) and _identity(found) == _identity(facts)
    require(same, "--out", "a path where nothing lies yet, or this command's own result", str(path))


def _deliver(findings: Findings, path: Path, pairs: Path | None) -> None:
    """The table on the terminal, the JSON and the Markdown; with pairs, the nearest train image of every image."""
    screen = console()
    screen = screen if screen.is_terminal else console(WIDTH)
    table, below = terminal_table(findings)
    screen.print(table)
    for line in below:
        screen.print(line, markup=False, highlight=False)
    write_json(path, findings.plain())
    beside = path.with_suffix(".md")
    with atomic(beside) as temporary:
        temporary.write_text(markdown(findings), encoding="utf-8")
    say(f"everything: {path}\ntable: {beside}")
    if pairs is not None:
        rows = path.with_suffix(".nearest.parquet")
        with atomic(rows) as temporary:
            shutil.copyfile(pairs, temporary)
        say(f"nearest train image of every synthetic one: {rows}")
