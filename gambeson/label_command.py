"""`gambeson label`: labels synthetic images by one classifier or several, softly if asked; says where they disagree."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gambeson.data.chosen import Part
from gambeson.data.datasets import door
from gambeson.data.exchange.outgoing import class_names
from gambeson.data.exchange.store_card import deliver_card, exported
from gambeson.data.exchange.stores import Source
from gambeson.data.mixture import check_images
from gambeson.data.peers import open_ours
from gambeson.data.synthetic import Chosen
from gambeson.disk import open_folder, read_json
from gambeson.errors import UserError, require
from gambeson.machine import Machine
from gambeson.models.memory import memory_told
from gambeson.options import ENGINE_OPTIONS, take, take_flag, take_machine, take_number, take_runs
from gambeson.report import delivery
from gambeson.robustness.subjects import Named, subject_of
from gambeson.screen import shown
from gambeson.store import Artifact, Store
from gambeson.synthesis import label as labels
from gambeson.synthesis.label import LABELS, REPORT, ByCondition, ByTeacher, Labeling, Soft, labelled_parts, open_labels
from gambeson.synthesis.teachers import open_teachers
from gambeson.terminal import say

SELECTION = "chosen.parquet"
"""The labelled images as `gambeson train --synthetic` takes them."""
SHOWN = 100
"""Classes that the table has at most: those where condition and teacher agree least."""

USAGE = f"""usage: gambeson label STORE --teacher CLASSIFIER [--teacher CLASSIFIER ...] --out FOLDER [OPTIONS]

Labels synthetic images, and says how often condition and teacher agree, by class. Stop it at any time; the same command
goes on. FOLDER gets labels.parquet (label, condition and logits of every image), labels.json, and a selection of the
labelled images, which `gambeson train --data D --synthetic FOLDER` trains on.

STORE: the folder of a store, of a stage that made one (runs/stages/generate/...), or of a selection.

options
  --teacher C      a folder that `gambeson train` wrote, or a classifier.safetensors; a checkpoint file of RobustBench,
                   named after its entry (Carmon2019Unlabeled.pt) or its architecture (WRN-28-10.pt); an .onnx file;
                   with --trust a TorchScript file, a torch.export file (.pt2) or module:function. Of several the
                   probabilities are averaged
  --by W           whose class is the label: condition (default), what the image was generated for; or teacher
  --soft           train on the teacher's probabilities in place of classes; any loss but MART takes them
  --temperature T  of these probabilities: softmax(logits / T) (default 1); above 1 evens them out
  --disagreeing W  keep (default) or drop images of which the teacher says another class than the condition
  --trust          run the programs among the teachers, with your rights
  --data D         the real images that these will stand beside: their size and classes are compared
  --data-root DIR  where named image sets lie (default ./data or $GAMBESON_DATA)
  --batch-size B   images in a teacher at once (default 512; halved where memory is short)
  --out FOLDER     where the result goes: a new folder, or one with this result
  --runs DIR       where the work is kept (default ./runs or $GAMBESON_RUNS)
  --device D       cpu (default), cuda, cuda:1, mps; also $GAMBESON_DEVICE
  --workers N      processes of one thread each (default: the cores of this machine; 1 on an accelerator)
{ENGINE_OPTIONS}
Exit codes: 0 done, 2 a mistake in what was asked, 3 the machine could not (disk, permission, damaged file)."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asked for."""

    store: str
    teachers: tuple[str, ...]
    spec: Labeling
    trust: bool
    data: str | None
    out: Path
    runs: Path
    machine: Machine


def read(argv: list[str]) -> Asked:
    """The words of the command. Raises UserError: what was expected, what came, the fix."""
    words = list(argv)
    data, root, out = (take(words, f"--{word}") for word in ("data", "data-root", "out"))
    teachers, trust, spec = tuple(_every(words, "--teacher")), take_flag(words, "--trust"), _labeling(words)
    runs, machine = take_runs(words), take_machine(words, cluster=True)
    odd = [word for word in words if word.startswith("-")]
    require(not odd, "gambeson label", "options that gambeson label --help lists", " ".join(odd))
    require(len(words) == 1, "gambeson label", "one store", " ".join(words) or "none")
    require(bool(teachers), "--teacher", "a classifier (gambeson label --help says which)", "none")
    require(bool(out), "--out", "where the result goes", out)
    unused = "nothing: --batch-size is how many images are in a teacher at once"
    require(machine.micro_batch is None, "--micro-batch", unused, machine.micro_batch)
    require(not machine.compile, "--compile", "nothing: teachers are asked as they are", machine.compile)
    place = Path(out or "")
    require(delivery.free(place, LABELS), "--out", "a new folder, or one with this result", out)
    if root is not None:
        os.environ["GAMBESON_DATA"] = root
    return Asked(
        store=words[0],
        teachers=teachers,
        spec=spec,
        trust=trust,
        data=data,
        out=place,
        runs=runs.resolve(),
        machine=machine,
    )


def _every(words: list[str], name: str) -> Iterator[str]:
    """Removes all `--name VALUE` from the words; their values."""
    while (word := take(words, name)) is not None:
        yield word


def _labeling(words: list[str]) -> Labeling:
    """How the images are labelled."""
    by, disagreeing = take(words, "--by") or "condition", take(words, "--disagreeing") or "keep"
    soft, temperature, batch = (
        take_flag(words, "--soft"),
        take(words, "--temperature"),
        take_number(words, "--batch-size"),
    )
    require(by in ("condition", "teacher"), "--by", "condition or teacher", by)
    require(disagreeing in ("keep", "drop"), "--disagreeing", "keep or drop", disagreeing)
    require(soft or temperature is None, "--temperature", "--soft beside it, whose temperature it is", temperature)
    return Labeling(
        by=ByCondition() if by == "condition" else ByTeacher(),
        batch_size=batch or Labeling().batch_size,
        soft=Soft(temperature=_number(temperature or "1")) if soft else None,
        disagreeing=disagreeing,  # type: ignore[arg-type]
    )


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UserError(f"--temperature: expected a number above 0, such as 2, got {word!r}") from None


def label(argv: list[str]) -> None:
    """gambeson label STORE --teacher CLASSIFIER [--teacher ...] --out FOLDER [OPTIONS]"""
    if not argv or {"--help", "-h"} & set(argv):
        print(USAGE)
        return
    asked = read(argv)
    size, threads = asked.spec.batch_size, torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes beside this one: their number changes no bit
    try:
        with memory_told(
            f"Start the same command again with fewer images in a teacher at once (--batch-size, now {size})"
        ):
            _label(asked, argv)
    finally:
        torch.set_num_threads(threads)


def _label(asked: Asked, argv: list[str]) -> None:
    """The stage and what is shown of it."""
    source = open_ours(asked.store)
    channels = source.shape[2]
    shape = (channels, *source.shape[:2])
    subjects = [subject_of(word, shape, trust=asked.trust) for word in asked.teachers]
    if asked.data is not None:
        _check_real(asked, source, subjects)
    open_folder(asked.out.parent)
    with shown("label") as (report, say):
        once: Callable[..., Artifact] = Store(asked.runs, report, asked.machine, say=say).once
        made = once(labels.label, asked.spec, source, *subjects)
    _deliver(asked, source, made, argv)


def _check_real(asked: Asked, source: Source, subjects: list[Named]) -> None:
    """UserError, naming both, where images or teachers are not those of the real set."""
    assert asked.data is not None
    real = door(asked.data).load()
    check_images(source, real)  # type: ignore[arg-type]
    open_teachers(subjects, source, real.class_names, asked.machine.device)


def _deliver(asked: Asked, source: Source, made: Artifact, argv: list[str]) -> None:
    """The labels, what is told of them, and the selection that is trained on; the table on the screen."""
    rows, facts, out = made.file(LABELS), made.file(REPORT), asked.out
    delivery.claim(out, made, LABELS)
    for path in (rows, facts):
        delivery.copied(path, out)
    store = source.store if isinstance(source, Chosen) else source
    with open_labels(rows) as file:
        placed = (_placed(source, part) for part in labelled_parts(file))
        Chosen.write_parts(out / SELECTION, store, placed, made.heritage)
    deliver_card(exported(made, [labels.label], ["label", *argv]), out)
    found = read_json(facts)
    say("\n".join(table(found)))
    if found["empty"]:
        say(f"note: no image of {', '.join(found['empty'])} is left", file=sys.stderr)
    if not class_names(source) and asked.data is None:
        print("hint: the store names no classes; --data D compares it with the real images", file=sys.stderr)
    say(f"labels: {(out / LABELS).resolve()}\nreport: {(out / REPORT).resolve()}")
    say(f"selection: {(out / SELECTION).resolve()}; gambeson train --data {asked.data or 'D'} --synthetic {out}")


def _placed(source: Source, part: Part) -> Part:
    """Rows of the labels as positions in the store; a selection's rows are those of its images."""
    return (source.positions[part[0]], *part[1:]) if isinstance(source, Chosen) else part  # type: ignore[return-value]


def table(found: dict[str, Any]) -> list[str]:
    """The lines that show `labels.json`: agreements in percent with 95 % intervals, then a row for each class."""
    rows = found["classes"]
    shown = rows if len(rows) <= SHOWN else sorted(rows, key=_agreement)[:SHOWN]
    width = max(len("class"), *(len(row["class"]) for row in shown))
    several = len(found["teachers"]) > 1
    return [
        f"{found['images']:,} images, {found['labelled']:,} labelled, {found['dropped']:,} left out",
        f"teacher{'s' if several else ''} and condition agree: {percent(found['agreement'])}",
        *(f"  {told['title']}: {percent(told['agreement'])}" for told in found["teachers"] if several),
        *([f"all teachers agree: {percent(found['unanimous'])}"] if several else []),
        f"{'class':{width}} {'generated':>10} {'labelled':>10}   teacher agrees (95 % interval)",
        *(
            f"{row['class']:{width}} {row['generated']:>10,} {row['labelled']:>10,}   {percent(row['agreement'])}"
            for row in shown
        ),
        *([f"and {len(rows) - SHOWN} classes where they agree more often"] if len(rows) > SHOWN else []),
    ]


def _agreement(row: dict[str, Any]) -> float:
    """What classes are ordered by; those without images come last."""
    return 2.0 if row["agreement"] is None else row["agreement"]["estimate"]


def percent(found: dict[str, Any] | None) -> str:
    """A fraction of `labels.json` in words; '-' where there was nothing to count."""
    if found is None:
        return "-"
    estimate, low, high = (100 * found[name] for name in ("estimate", "low", "high"))
    return f"{estimate:5.1f} %  ({low:.1f} to {high:.1f})"
