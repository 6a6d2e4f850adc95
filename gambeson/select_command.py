"""`gambeson select`: keeps the best images of each class by any score, from a store and the labels of its images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, get_args

import torch

from gambeson import overrides
from gambeson.data.datasets import door
from gambeson.data.exchange.outgoing import class_names
from gambeson.data.exchange.store_card import deliver_card, exported
from gambeson.data.imageset import ImageSet
from gambeson.data.peers import refuse_peer
from gambeson.data.synthetic import Chosen, SyntheticStore, open_synthetic
from gambeson.disk import open_folder, read_json
from gambeson.errors import UserError, require
from gambeson.machine import Machine
from gambeson.models.memory import memory_told
from gambeson.options import ENGINE_OPTIONS, take, take_flag, take_machine, take_runs
from gambeson.recipe import fill_threat
from gambeson.report import delivery
from gambeson.robustness.subjects import Named, subject_of, trained_threat
from gambeson.screen import shown
from gambeson.store import Artifact, Store
from gambeson.synthesis import select as selecting
from gambeson.synthesis.kept_scores import KeptScores
from gambeson.synthesis.pool import LABELS, TOGETHER, LabelFile
from gambeson.synthesis.scorers import Scorers
from gambeson.synthesis.select import Selection
from gambeson.terminal import say
from gambeson.threat import ThreatModel

SELECTION, REPORT = "chosen.parquet", "selection.json"
"""The files that the folder gets."""
SHOWN = 100
"""Classes that the table has at most."""

USAGE = """usage: gambeson select STORE --labels LABELS --score NAME --keep SHARE|--per-class K --out FOLDER [OPTIONS]

Keeps the best images of each class. Stop it at any time; the same command goes on. FOLDER gets chosen.parquet, which
`gambeson train --data D --synthetic FOLDER` trains on, and selection.json: how many of each class were there and are
kept, which classes hold too few (nothing is taken from others), how many images tie with the last kept one.

STORE: the folder of a store, or of a stage that made one (runs/stages/generate/...).

options, besides every field (gambeson select STORE --score NAME --help lists them)
  --labels L       labels.parquet of `gambeson label`, or its folder
  --score NAME     what makes an image good:
{scores}
  --score.FIELD X  a field of the score
  --keep SHARE     share of the images that are kept, as many of each class (default 1.0: all)
  --per-class K    that many of each class instead; where a class holds fewer, all of it
  --remove-copies  leave out images that lie nearer to a train image, in pixels, than all but 1 % of held-out ones
  --model C        the classifier whose features or gradients count: a folder that `gambeson train` wrote, a
                   classifier.safetensors, a checkpoint file of RobustBench
  --data D         the real images, where the score or --remove-copies needs them: a named set, a folder, a file
  --data-root DIR  where named image sets lie (default ./data or $GAMBESON_DATA)
  --threat T       of RobustGradientNorm's attack, such as linf:8/255 (default: what the classifier withstands)
  --scores DIGEST  take scores that lie beside the store already (gambeson store stats STORE lists them)
  --other-teacher  even if they are those of a classifier that did not label these images
  --out FOLDER     where the result goes: a new folder, or one with this result
  --runs DIR       where the work is kept (default ./runs or $GAMBESON_RUNS)
  --device D       cpu (default), cuda, cuda:1, mps; also $GAMBESON_DEVICE
  --micro-batch N  images in a network at once (default {together})
  --workers N      processes of one thread each (default: the cores of this machine; 1 on an accelerator)
{engine}
Scores that look at images are kept beside the store: another --keep, --per-class or --out finds them.
Exit codes: 0 done, 2 a mistake in what was asked, 3 the machine could not (disk, permission, damaged file)."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asked for."""

    store: str
    labels: Path
    spec: Selection
    model: str | None
    data: str | None
    out: Path
    runs: Path
    machine: Machine


def read(argv: list[str]) -> Asked:
    """The words of the command. Raises UserError: what was expected, what came, the fix."""
    words = list(argv)
    told = {name: take(words, f"--{name}") for name in ("labels", "model", "data", "data-root", "out", "threat")}
    runs, machine, default = take_runs(words), take_machine(words, cluster=True), _default(words)
    first = words.pop(0) if words and not words[0].startswith("-") else None
    require(first is not None, "gambeson select", "a store first", " ".join(words) or "nothing")
    require(not machine.compile, "--compile", "nothing: networks are asked as they are", machine.compile)
    assert first is not None
    spec = overrides.parse(default, words, prog=f"gambeson select {first}")
    require(bool(told["out"]), "--out", "where the result goes", told["out"])
    require(delivery.free(Path(told["out"] or ""), SELECTION), "--out", "a new folder, or one with this", told["out"])
    if told["data-root"] is not None:
        os.environ["GAMBESON_DATA"] = told["data-root"]
    return Asked(
        store=first,
        labels=_labels(told["labels"]),
        spec=fill_threat(spec, _threat(told["threat"], told["model"])),
        model=told["model"],
        data=told["data"],
        out=Path(told["out"] or ""),
        runs=runs.resolve(),
        machine=machine,
    )


def _default(words: list[str]) -> Selection:
    """The selection before --score and its fields. UserError where nothing says what is good, or two things do."""
    digest, other = take(words, "--scores"), take_flag(words, "--other-teacher")
    scored = any(word.split("=")[0] == "--score" for word in words)
    require(digest is None or not scored, "--scores", "no --score beside it: either says what is good", digest)
    require(digest is not None or not other, "--other-teacher", "--scores beside it", other)
    asks = bool({"--help", "-h"} & set(words))
    expected = f"one of {', '.join(kind.__name__ for kind in get_args(Scorers))}; or --scores"
    require(digest is not None or scored or asks, "--score", expected, "nothing")
    return Selection() if digest is None else Selection(score=KeptScores(digest=digest, other_teacher=other))


def _labels(word: str | None) -> Path:
    """The file with the labels."""
    path = Path(word or "")
    found = path / LABELS if word and path.is_dir() else path
    require(bool(word) and found.is_file(), "--labels", "labels.parquet of gambeson label, or its folder", word)
    return found


def _threat(word: str | None, model: str | None) -> ThreatModel:
    if word is not None:
        return ThreatModel.parse(word)
    return (trained_threat(model) if model is not None else None) or ThreatModel()


def select(argv: list[str]) -> None:
    """gambeson select STORE --labels LABELS --score NAME [OPTIONS]"""
    asks, named = {"--help", "-h"} & set(argv), bool(argv) and not argv[0].startswith("-")
    if not argv or (asks and not named):
        scores = "\n".join(map(_described, get_args(Scorers)))
        print(USAGE.format(scores=scores, together=TOGETHER, engine=ENGINE_OPTIONS))
        return
    asked, threads = read(argv), torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes beside this one: their number changes no bit
    size = asked.machine.micro_batch or TOGETHER
    try:
        with memory_told(f"Start the same command again with fewer images in a network at once (--micro-batch {size})"):
            _select(asked, argv)
    finally:
        torch.set_num_threads(threads)


def _described(kind: type) -> str:
    """A score's lines of the help: its name and the first line of what it is."""
    about = (kind.__doc__ or "").strip().splitlines()[0]
    return fill(f"{kind.__name__}: {about}", 120, initial_indent=" " * 19, subsequent_indent=" " * 21)


def _select(asked: Asked, argv: list[str]) -> None:
    """The stage and what is shown of it."""
    store = _opened(asked.store)
    given = _given(asked, store)
    open_folder(asked.out.parent)
    with shown("select") as (report, say):
        once: Callable[..., Artifact] = Store(asked.runs, report, asked.machine, say=say).once
        made = once(selecting.select, asked.spec, store, LabelFile(asked.labels.resolve()), *given)
    _deliver(asked, store, made, argv)


def _opened(word: str) -> SyntheticStore:
    """The store that a word names. UserError where it is none."""
    refuse_peer(word)
    stage = Path(word) / "images" / "store.json"
    found = SyntheticStore.open(Path(word) / "images").check() if stage.is_file() else open_synthetic(word)
    if isinstance(found, Chosen):
        raise UserError(
            f"{word}: expected a store, got a selection from {found.store.root}; select from that one, with labels of "
            "all its images (those that are left out have label -1), or copy the selection (gambeson store merge)"
        )
    return found


def _given(asked: Asked, store: SyntheticStore) -> list[Named | ImageSet]:
    """What the score needs, in its order. UserError where an option is missing, or one that nothing needs is there."""
    needs, name = asked.spec.needs, type(asked.spec.score).__name__
    networks = [need for need in needs if need != "real"]
    require(asked.model is not None or not networks, "--model", f"a classifier, which {name} goes by", asked.model)
    require(asked.model is None or bool(networks), "--model", f"nothing: {name} goes by no classifier", asked.model)
    require(asked.data is not None or "real" not in needs, "--data", "the real images, which are needed", asked.data)
    unused = f"nothing: {name} compares with no real images"
    require(asked.data is None or "real" in needs, "--data", unused, asked.data)
    height, width, channels = store.shape
    found: list[Named | ImageSet] = [subject_of(asked.model or "", (channels, height, width)) for _ in networks]
    return [*found, door(asked.data or "").load()] if "real" in needs else found


def _deliver(asked: Asked, store: SyntheticStore, made: Artifact, argv: list[str]) -> None:
    """The selection, which points to the store from its new place, and what is told of it."""
    chosen, facts, out = Chosen.open(made.file(SELECTION), store), made.file(REPORT), asked.out
    delivery.claim(out, made, SELECTION)
    Chosen.write_parts(out / SELECTION, store, chosen.parts(), chosen.carries)
    deliver_card(exported(made, [selecting.select], ["select", *argv]), out)
    delivery.copied(facts, out)
    found = read_json(facts)
    say("\n".join(table(found, class_names(store))))
    if found["scores"]:
        say(f"scores: {store.root.resolve() / 'scores' / found['scores']}")
    if found["short"]:
        print(f"note: {len(found['short'])} classes hold fewer images than were asked for", file=sys.stderr)
    say(f"selection: {(out / SELECTION).resolve()}; gambeson train --data D --synthetic {out}")


def table(found: dict[str, Any], names: Sequence[str] | None) -> list[str]:
    """The lines that show `selection.json`: a row for each class."""
    classes = len(found["kept"])
    shown = (list(names) if names and len(names) == classes else [str(k) for k in range(classes)])[:SHOWN]
    width = max(5, *map(len, shown))
    removed = "" if found["copies_removed"] is None else f", {sum(found['copies_removed']):,} of them copies"
    asked = "all that have a label" if found["quota"] is None else f"{found['quota']:,} of each class asked for"
    return [
        f"{sum(found['kept']):,} images kept, {asked}; {found['left_out']:,} left out{removed}",
        f"{'class':{width}} {'there':>10} {'kept':>10} {'short':>8} {'tied':>8}",
        *(
            f"{name:{width}} {found['available'][k]:>10,} {found['kept'][k]:>10,} "
            f"{found['short'].get(str(k), 0):>8,} {found['ties'].get(str(k), 0):>8,}"
            for k, name in enumerate(shown)
        ),
        *([f"and {classes - SHOWN} classes more, in selection.json"] if classes > SHOWN else []),
    ]
