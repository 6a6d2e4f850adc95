"""`gambeson certify`: how far, in L2, a classifier smoothed by Gaussian noise provably holds, image by image."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gambeson.data.datasets import Data, Digits, door
from gambeson.disk import open_folder, read_json
from gambeson.errors import UserError, require
from gambeson.machine import Machine
from gambeson.models.memory import memory_told
from gambeson.options import overridden, take, take_flag, take_machine, take_number, take_runs
from gambeson.report import delivery
from gambeson.robustness.certificates import ROWS, SUMMARY, Certification, SavedClassifier, certify_images
from gambeson.robustness.smoothing import Smoothing
from gambeson.robustness.tested import tested_images, with_names
from gambeson.screen import shown
from gambeson.store import Artifact, Store
from gambeson.terminal import say


@dataclass(frozen=True, kw_only=True)
class Certifying:
    """A certification alone."""

    data: Data = Digits()  # the labelled images; those of its test part are certified
    seed: int = 0  # seed of the noise
    certification: Certification = Certification()  # which images, and how


USAGE = """usage: gambeson certify CLASSIFIER --data NAME|FOLDER|FILE.npz [OPTIONS]

Certifies a classifier by randomised smoothing (Cohen, Rosenfeld & Kolter 2019): for each test image the class that the
network gives most often under Gaussian noise, and the L2 radius in which that provably does not change. Train with the
same noise first: gambeson train ... --classifier.loss GaussianNoise --classifier.loss.sigma 0.25
Stop it at any time; the same command goes on.

CLASSIFIER: a folder that `gambeson train` wrote, or a classifier.safetensors.

options, besides every field (gambeson certify CLASSIFIER --data digits --help lists them):
  --data D         a named set (gambeson data list), a folder with a folder of images for each class, an .npz file: its
                   x_test, or the share of its images that training holds out, or all of them with --all-images. With
                   the --data.FIELD options of its training, if there were any, so that the test images are the same
  --data-root DIR  where named image sets lie (default ./data or $GAMBESON_DATA)
  --sigma S        standard deviation of the noise, in pixels of [0, 1] (default 0.25)
  --n N            noisy copies that bound the probability of the class (default 100,000); the largest radius grows
                   with it, the time too
  --n0 N           noisy copies that choose the class (default 100)
  --alpha A        probability that an image's certificate is wrong (default 0.001)
  --images N       test images, evenly spread (default 500)
  --seed S         seed of the noise (default 0). For a network that others made choose one that they did not know: a
                   certificate holds for draws that the weights do not depend on
  --out DIR        copy the rows and the summary there, a new folder or one with this certification
  --runs DIR       where results live (default ./runs or $GAMBESON_RUNS)
  --device D       cpu (default), cuda, cuda:1, mps; also $GAMBESON_DEVICE
  --workers N      processes of one thread each (default: the cores of this machine; 1 on an accelerator)
  --micro-batch N  noisy copies in the network at once (default 1,000)"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asked for."""

    classifier: SavedClassifier
    certifying: Certifying
    everything: bool  # whether all images of an .npz file are test images
    runs: Path
    machine: Machine
    out: Path | None


def read(argv: list[str]) -> Asked:
    """The words of the command. Raises UserError: what was expected, what came, the fix."""
    words = list(argv)
    data, root, out = (take(words, f"--{word}") for word in ("data", "data-root", "out"))
    runs, machine, certification = take_runs(words), take_machine(words), _certification(words)
    everything = take_flag(words, "--all-images")
    first = words.pop(0) if words and not words[0].startswith("-") else None
    require(first is not None, "gambeson certify", "a classifier first (a folder or a file)", " ".join(argv))
    require(data is not None, "--data", "an image set: a name, a folder or an .npz file", data)
    require(not machine.compile, "--compile", "nothing: networks are certified as they are", machine.compile)
    assert first is not None
    assert data is not None
    if root is not None:
        os.environ["GAMBESON_DATA"] = root
    default = Certifying(data=door(data), certification=certification)
    certifying = overridden(default, words, f"gambeson certify {first} --data {data}")
    place = None if out is None else Path(out)
    free = place is None or delivery.free(place, ROWS)
    require(free, "--out", "a path where nothing lies yet, or a folder with this certification", out)
    return Asked(
        classifier=SavedClassifier(first),
        certifying=certifying,
        everything=everything,
        runs=runs.resolve(),
        machine=machine,
        out=place,
    )


def _certification(words: list[str]) -> Certification:
    """The certification with what the short options say."""
    found: dict[str, Any] = {
        "sigma": _take_float(words, "--sigma"),
        "alpha": _take_float(words, "--alpha"),
        "samples": take_number(words, "--n"),
        "samples_select": take_number(words, "--n0"),
    }
    images = take_number(words, "--images")
    whole = Certification(smoothing=Smoothing(**{name: v for name, v in found.items() if v is not None}))
    return whole if images is None else replace(whole, images=images)


def _take_float(words: list[str], name: str) -> float | None:
    """Removes `--name VALUE` from the words. UserError for a value that is no number."""
    word = take(words, name)
    try:
        return None if word is None else float(word)
    except ValueError:
        raise UserError(f"{name}: expected a number such as 0.25, got {word!r}") from None


def certify(argv: list[str]) -> None:
    """gambeson certify CLASSIFIER --data NAME|FOLDER|FILE.npz [OPTIONS]"""
    asks, named = {"--help", "-h"} & set(argv), any(word.startswith("--data") for word in argv)
    if not argv or (asks and not named):
        print(USAGE)
        return
    asked = read(argv)
    size = asked.machine.micro_batch or asked.certifying.certification.smoothing.batch_size
    with memory_told(
        f"Start the same command again with fewer noisy copies in the network at once (--micro-batch, now {size}) or "
        f"with fewer --workers (now {asked.machine.workers}): it goes on from what was kept"
    ):
        _certify(asked)


def _certify(asked: Asked) -> None:
    """The certification and what is shown of it."""
    real, remarks = tested_images(asked.certifying.data, True, asked.everything)
    real = with_names(real, asked.classifier.load().classes)
    asked.classifier.check_fit(real)
    for remark in remarks:
        say(remark, file=sys.stderr)
    if asked.out is not None:
        open_folder(asked.out.parent)
    if hint := _hint(asked):
        say(f"hint: {hint}", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in workers, so that their number changes nothing
    try:
        with shown("certify") as (report, _):
            once: Callable[..., Artifact] = Store(asked.runs, report, asked.machine).once
            spec, seed = asked.certifying.certification, asked.certifying.seed
            made = once(certify_images, spec, asked.classifier, real, seed=seed)
    finally:
        torch.set_num_threads(threads)
    _deliver(made, asked.out, real.name)


def _hint(asked: Asked) -> str | None:
    """What to expect of this classifier under this noise; None where it was trained with it."""
    sigma, trained = asked.certifying.certification.smoothing.sigma, asked.classifier.facts.get("noise")
    if trained == sigma:
        return None
    if trained is not None:
        return (
            f"this classifier was trained with noise of sigma {trained:g}; certify it with --sigma {trained:g} as well"
        )
    return (
        f"nothing says that {asked.classifier.place} was trained with noise, so expect low certified accuracy; train "
        f"with `gambeson train ... --classifier.loss GaussianNoise --classifier.loss.sigma {sigma:g}`"
    )


def _deliver(made: Artifact, out: Path | None, data: str) -> None:
    """The table on the screen; rows and summary where they were asked for."""
    rows, facts = made.file(ROWS), made.file(SUMMARY)
    say("\n".join(table(read_json(facts), data)))
    if out is not None:
        delivery.claim(out, made, ROWS)
        rows, facts = (delivery.copied(path, out) for path in (rows, facts))
    say(f"rows: {rows.resolve()}\nsummary: {facts.resolve()}")


def table(facts: dict[str, Any], data: str) -> list[str]:
    """The lines that show `gambeson.robustness.certificates.summary`, in percent with 95 % intervals."""
    smoothing = Smoothing(**facts["smoothing"])
    head = (
        f"{facts['images']} test images of {data}, sigma {smoothing.sigma:g}, n {smoothing.samples:,}, n0 "
        f"{smoothing.samples_select:,}, alpha {smoothing.alpha:g}; 95 % intervals over the images"
    )
    curve = [f"{row['radius']:9.4g}   {_percent(row)}" for row in facts["certified"]]
    return [
        head,
        "L2 radius   certified accuracy",
        *curve,
        f"abstained {_percent(facts['abstained'])}",
        f"average certified radius {facts['average_radius']:.3f} (0 where wrong; at most "
        f"{facts['largest_radius']:.3f} with so many copies)",
        f"clean accuracy of the network alone {_percent(facts['clean'])}",
    ]


def _percent(interval: dict[str, Any]) -> str:
    estimate, low, high = (100 * interval[name] for name in ("estimate", "low", "high"))
    return f"{estimate:5.1f} %  ({low:.1f} to {high:.1f})"
