"""`gambeson train`: a robust classifier from a labelled image set, alone or with synthetic images that lie somewhere.

Under torchrun every process runs this; the first one reads, writes and talks.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from gambeson import distributed
from gambeson.data.augment import PadCrop
from gambeson.data.datasets import Data, Digits, door
from gambeson.data.exchange.made import HUB, additional, sections
from gambeson.data.imageset import ImageSet
from gambeson.data.peers import FilesSource, PeerImages, import_images, is_peer, open_peer
from gambeson.data.synthetic import Chosen, SyntheticStore, open_synthetic
from gambeson.disk import open_folder
from gambeson.errors import require
from gambeson.heritage import heritage_of, noted, told, united
from gambeson.machine import Machine
from gambeson.models.card import Metric
from gambeson.models.classifiers import load_classifier
from gambeson.models.files import load_tensors
from gambeson.models.hub import CONFIG, README, config_of
from gambeson.models.network import ClassifierNetwork
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.options import overridden, take, take_machine, take_runs
from gambeson.processes import cores
from gambeson.recipe import fill_threat
from gambeson.recipes.training import TRAININGS, steps, training_preset
from gambeson.screen import shown
from gambeson.store import Artifact, Store
from gambeson.terminal import say
from gambeson.threat import ThreatModel
from gambeson.training.classifier import Checkpoint, ClassifierTraining, Networks, check_network, train_classifier
from gambeson.training.schedule import OneCycle
from gambeson.training.validation import score_of

DEFAULT = "fast"
"""The preset, where none is named."""
TINY = 12
"""Images with shorter sides get half of the small network's width."""
SMALL = 24
"""Images with shorter sides get the small network, unless another is asked for."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A classifier's training alone."""

    data: Data = Digits()  # the labelled images
    threat: ThreatModel = ThreatModel()  # what the attacker may do
    seed: int = 0  # seed of weights, batches and attacks
    classifier: ClassifierTraining = ClassifierTraining()  # the network and how it is trained


USAGE = """usage: gambeson train --data NAME|FOLDER|FILE.npz [OPTIONS]

Trains a robust classifier on a labelled image set, alone or with synthetic images. Stop it at any time; the same
command goes on. On several GPUs: torchrun --nproc-per-node N -m gambeson train ... --device cuda

options, besides every field of the training (gambeson train --data digits --help lists them):
  --data D         a named set (gambeson data list), a folder with a folder of images for each class, an .npz or
                   .parquet file, hf:ORG/NAME
  --data-root DIR  where named image sets lie (default ./data or $GAMBESON_DATA)
  --synthetic S    images to mix in: a store of `gambeson generate` or a selection; .npz files of EDM-AT (image, label)
                   or CDP (arr_0, arr_1); a .bin with labels in an .npy beside it (PORT); WebDataset .tar or Hugging
                   Face .parquet files or folders of them; a folder with a folder of images for each class
  --from C         a classifier to start from: a folder of this command, or a classifier.safetensors
  --preset NAME    whose training (default {default}): {presets}
  --threat T       what the attacker may do, such as linf:8/255 (default) or l2:128/255; the inner steps keep
                   their proportion to it (irgd's Adam excepted)
  --epochs E       length, in passes of --classifier.epoch_images images (50,000), synthetic ones counted
  --out DIR        where the classifier goes, a folder with weights, config and model card (default RUNS/models/...)
  --runs DIR       where trainings live (default ./runs or $GAMBESON_RUNS)
  --device D       cpu (default), cuda, cuda:1, mps; also $GAMBESON_DEVICE
  --workers N      threads on a CPU (default: its cores; more than are free make it many times slower)
  --compile        torch.compile: needs a C++ compiler on a CPU, pays off in long runs"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asked for; `said`: the fields of the classifier that it named."""

    training: Training
    preset: str
    said: frozenset[str]
    synthetic: Path | None
    start: Path | None
    runs: Path
    machine: Machine
    out: Path | None


def read(argv: list[str]) -> Asked:
    """The words of the command. Raises UserError: what was expected, what came, the fix."""
    words = list(argv)
    data, root = take(words, "--data"), take(words, "--data-root")
    synthetic, start = take(words, "--synthetic"), take(words, "--from")
    name, threat, epochs, out = (take(words, f"--{word}") for word in ("preset", "threat", "epochs", "out"))
    runs, machine = take_runs(words), take_machine(words)
    require(data is not None, "--data", "an image set: a name, a folder or an .npz file", data)
    assert data is not None
    if root is not None:
        os.environ["GAMBESON_DATA"] = root
    default = Training(
        data=door(data),
        classifier=training_preset(name or DEFAULT).classifier,
        threat=ThreatModel.parse(threat) if threat else ThreatModel(),
    )
    training = overridden(default, words, f"gambeson train --data {data}")
    training = replace(training, classifier=_as_long(training.classifier, epochs, words))
    where, begin = (None if word is None else Path(word) for word in (synthetic, start))
    require(where is None or where.exists(), "--synthetic", "a store of images or a file with them", synthetic)
    require(begin is None or begin.exists(), "--from", "a folder or a file with a classifier's weights", start)
    place = None if out is None else Path(out)
    empty = place is None or not place.exists() or (place.is_dir() and not any(place.iterdir()))
    require(empty, "--out", "a path where nothing lies yet", out)
    if place is not None:
        open_folder(place.parent)
    accumulate = "nothing: --classifier.optimisation.accumulate is in how many parts a batch goes through the network"
    require(machine.micro_batch is None, "--micro-batch", accumulate, machine.micro_batch)
    said = frozenset(word.split(".")[1].partition("=")[0] for word in words if word.startswith("--classifier."))
    files = {"synthetic": where, "start": begin, "out": place}
    return Asked(training=training, preset=name or DEFAULT, said=said, runs=runs, machine=machine, **files)


def _as_long(classifier: ClassifierTraining, epochs: str | None, words: list[str]) -> ClassifierTraining:
    """The training with as many steps as these epochs have; a one-cycle rate holds for one of them."""
    fitted = classifier.optimisation
    if epochs is None:
        return classifier
    try:
        length = float(epochs)
    except ValueError:
        length = 0.0
    require(0 < length < float("inf"), "--epochs", "a number above 0", epochs)
    both = any(word.startswith("--classifier.optimisation.steps") for word in words)
    require(not both, "--epochs", "no --classifier.optimisation.steps beside it: either says how long", epochs)
    each = steps(1.0, fitted.batch_size, classifier.epoch_images)
    if isinstance(fitted.schedule, OneCycle):
        fitted = replace(fitted, schedule=replace(fitted.schedule, held=each))
    count = steps(length, fitted.batch_size, classifier.epoch_images)
    return replace(classifier, optimisation=replace(fitted, steps=count))


def fitting(asked: Asked, real: ImageSet) -> Training:
    """The preset's network and crop made to fit the images; what was asked for stays as it is.

    Images below `SMALL` pixels get the small network, images of one channel one mean; the crop's padding is an eighth
    of the side, as 4 is of 32.
    """
    training, side = asked.training, min(real.shape[1:])
    classifier = training.classifier
    if "augment" not in asked.said and classifier.augment == PadCrop(padding=4):
        classifier = replace(classifier, augment=PadCrop(padding=max(side // 8, 1)))
    if "network" not in asked.said:
        classifier = replace(classifier, network=_network_for(classifier.network, real.shape[0], side))
    return replace(training, classifier=classifier)


def _network_for(given: Networks, channels: int, side: int) -> Networks:
    if side < SMALL:
        return ResNetSpec(width=16 if side < TINY else 32)
    if channels == 1 and isinstance(given, WideResNetSpec | PreActResNetSpec):
        return replace(given, mean=(0.5,), std=(0.25,))
    return given


def _threads(machine: Machine) -> int:
    """Threads of this process: the cores there are, shared by the processes of this machine."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(min(machine.workers, cores()) // local, 1)


def train(argv: list[str]) -> None:
    """gambeson train --data NAME|FOLDER|FILE.npz [OPTIONS]"""
    asks, named = {"--help", "-h"} & set(argv), any(word.startswith("--data") for word in argv)
    if not argv or (asks and not named):
        presets = "".join(map(_described, TRAININGS))
        print(USAGE.format(presets=presets, default=DEFAULT))
        return
    asked = read(argv)
    with distributed.joined(asked.machine.device) as device:
        asked = replace(asked, machine=replace(asked.machine, device=device))
        torch.set_num_threads(_threads(asked.machine))
        real = asked.training.data.load()
        training = fitting(asked, real)
        if training.classifier.network != asked.training.classifier.network and distributed.leads():
            print(f"images of {real.shape[1]} x {real.shape[2]} pixels: the network is {training.classifier.network}")
        made, line = _make(asked, training, real)
        if distributed.leads():
            _deliver(asked, training, real, made, _origin(made, line, argv))


def _described(name: str) -> str:
    """A preset's lines of the help."""
    preset = training_preset(name)
    return f"\n{'':19}{name:7} {preset.about}\n{'':27}published: {preset.published}"


def _make(asked: Asked, training: Training, real: ImageSet) -> tuple[Artifact, dict[str, Any]]:
    """The stages: images of others become a store, then the training. With it what its inputs, as they are now, carry:
    a licence may have been told after the training was made."""
    spec, runs = fill_threat(training.classifier, training.threat), asked.runs.resolve()
    check_network(spec.network, real)
    start = () if asked.start is None else (Checkpoint(str(asked.start)),)
    for each in start:
        each.fitting(spec.network.build(real.shape[0], len(real.class_names)))
    with shown("train") as (report, _):
        once: Callable[..., Artifact] = Store(runs, report, asked.machine).once
        chosen: Artifact | SyntheticStore | Chosen | None = None
        files: tuple[FilesSource, ...] = ()
        if asked.synthetic is not None and is_peer(asked.synthetic):
            images = _others(asked.synthetic, real)
            chosen, files = once(import_images, images.reading, images.source), (images.source,)
        elif asked.synthetic is not None:
            chosen = open_synthetic(asked.synthetic)
        made = once(train_classifier, spec, real, chosen, *start, seed=training.seed)
        return made, heritage_of([each for each in (real, chosen, *start, *files) if each is not None])


def _others(path: Path, real: ImageSet) -> PeerImages:
    """A published set's file. UserError, before it is read, for images of another size."""
    wanted = (*real.shape[1:], real.shape[0])
    images = PeerImages(path=str(path), shape=wanted if path.suffix == ".bin" else None)
    found = open_peer(path, images.shape).shape
    have = f"{wanted[0]} x {wanted[1]} pixels of {wanted[2]} channels, as {real.name} has"
    require(found == wanted, "--synthetic", f"images of {have}", found)
    return images


def _deliver(asked: Asked, training: Training, real: ImageSet, made: Artifact, origin: dict[str, Any]) -> None:
    """What came out, on the screen and as a folder that others can load."""
    path = made.file("classifier.safetensors")
    header = load_tensors(path)[1]
    kept = next(record for record in header["log"] if record["step"] == header["selection"]["kept"])
    folder = asked.out or asked.runs / "models" / f"{real.name}-{asked.preset}-{made.digest[:10]}"
    card = {**_card(asked, training, real, kept, made), **origin}
    if not (folder.is_dir() and any(folder.iterdir())):
        load_classifier(path).save_pretrained(folder, **card)
    elif told(config_of(folder)) != told(noted(origin.get("heritage") or {})):
        _tell_anew(folder, load_classifier(path), card)
    _tell(header, kept, len(real.validation))
    say(f"classifier: {folder.resolve()}\ncurves: {(made.folder / 'log.jsonl').resolve()}")
    say(f"        tensorboard --logdir {made.folder.resolve()}")


def _tell_anew(folder: Path, model: ClassifierNetwork, card: dict[str, Any]) -> None:
    """What a folder says of its classifier, once more is known of its ancestors; the weights stay."""
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        model.save_pretrained(draft, **card)
        for name in (CONFIG, README):
            os.replace(draft / name, folder / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


LIMITS = (
    "Its robustness was measured in training only, by a short PGD on images held out of the training set{picked}; that "
    "number is an upper bound of what AutoAttack leaves. Measure it on test images (gambeson evaluate) before you "
    "rely on it."
)
COPIES = " Synthetic images may be copies of train images: gambeson quality looks for copies."


def _card(asked: Asked, training: Training, real: ImageSet, kept: dict[str, Any], made: Artifact) -> dict[str, Any]:
    """What the model card says: what was done, as it was done."""
    spec, count = fill_threat(training.classifier, training.threat), len(real.validation)
    attack = f"PGD-{spec.validation_steps}, {spec.threat}"
    metrics = (
        Metric(name="clean accuracy, images held out of train", value=kept["clean"], n=count),
        Metric(name=f"robust accuracy ({attack}), images held out of train", value=kept["robust"], n=count),
    )
    picked = f", the best of up to {spec.validations} looks at them" if spec.keep == "best" else ""
    return {
        "shape": real.shape,
        "class_names": real.class_names,
        "data": real.name,
        "datasets": (HUB[real.name],) if real.name in HUB else (),
        "additional_data": None if asked.synthetic is None else asked.synthetic.name,
        "threat": spec.trained_threat,
        "noise": spec.noise,
        "recipe_digest": made.digest,
        "metrics": metrics,
        "limits": LIMITS.format(picked=picked) + (COPIES if asked.synthetic is not None else ""),
    }


def _origin(made: Artifact, line: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """What the card says of its ancestors (those in the record, and the `line` of its inputs as they are now) and of
    how it was made; nothing of a training by an earlier version."""
    record = made.record
    if "heritage" not in record:
        return {}
    whole = {**united(record["heritage"], line), "unknown": line["unknown"]}  # what is told now is unknown no longer
    record = {**record, "heritage": whole}
    heritage = {**record["heritage"], "additional_data": additional(record)}
    command = {"command": shlex.join(["gambeson", "train", *argv])}
    return {"heritage": heritage, "made": tuple(sections({**record, **command}))}


def _tell(header: dict[str, Any], kept: dict[str, Any], count: int) -> None:
    selection = header["selection"]
    judged, overfitting = ("under noise", "overfitting") if "noisy" in kept else ("robust", "robust overfitting")
    say(
        f"step {kept['step']}: clean {kept['clean']:.1%}, {judged} {score_of(kept):.1%} on {count} images held out of "
        f"train; best {selection['best']:.1%}, last {selection['last']:.1%}: {overfitting} "
        f"{100 * selection['best_minus_last']:.1f} points"
    )


def main() -> NoReturn:
    """`python -m gambeson.train`: without overridden fields it needs neither tyro nor pydantic."""
    from gambeson.cli import main as command_line

    distributed.leave(command_line(["train", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
