"""The classifier that is tried: what the word of the command line names, opened, with all that is known about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gambeson.data.datasets import Data
from gambeson.data.imageset import ImageSet, Split
from gambeson.disk import read_json
from gambeson.errors import EnvironmentFault, UserError, require, unknown
from gambeson.models.outside import failing, kind_of
from gambeson.robustness.attack_losses import Network
from gambeson.robustness.inputs import logits_of
from gambeson.robustness.subjects import OURS, Ours, subject_of, trained_threat
from gambeson.robustness.tested import tested_images
from gambeson.run import Run, find_run, list_runs, open_run
from gambeson.threat import ThreatModel

SAMPLES = 24
"""Test images to click on, at most: the first of each class, as many of each."""
Shape = tuple[int, int, int]
"""(channels, height, width)."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An opened classifier and what is known about it."""

    title: str
    network: Network  # images [B, C, H, W] in [0, 1] on the device -> logits
    shape: Shape
    class_names: tuple[str, ...]  # one for each logit
    threat: ThreatModel  # where the slider starts
    trained: ThreatModel | None  # what it says that it was trained to withstand
    noise: float | None  # sigma of the Gaussian noise that it says it was trained with
    gradients: bool
    device: str = "cpu"
    samples: Split | None = None  # test images to click on
    places: tuple[int, ...] = ()  # where they stand among the test images
    source: str = ""  # where the samples are from
    remarks: tuple[str, ...] = ()  # what a reader should know besides

    @property
    def classes(self) -> int:
        """How many logits."""
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says about the classifier."""

    word: str
    runs: Path = Path("runs")
    arm: str | None = None  # of a run: whose student; none: the last of its arms
    run_seed: int | None = None  # of a run: which training; none: its first
    data: Data | None = None  # whose test images can be clicked on
    everything: bool = False  # whether all images of an .npz file are test images
    shape: Shape | None = None
    threat: ThreatModel | None = None
    entry: str | None = None  # of RobustBench's zoo
    trust: bool = False
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A checkpoint, and what whoever made it says."""

    place: str
    title: str = ""
    data: Data | None = None
    threat: ThreatModel | None = None


def opened(asked: Asked) -> Tried:
    """The classifier, opened and asked once. Raises UserError for what is none, for images that it does not take, and
    where nothing says the size of its images."""
    found = _found(asked)
    real, remarks = _images(asked, found)
    subject = subject_of(found.place, _shape(asked, found, real), entry=asked.entry, trust=asked.trust)
    facts = dict(subject.saved.facts) if isinstance(subject, Ours) else {}
    shape: Any = tuple(facts.get("shape") or _shape(asked, found, real))
    for name, other in (("--data", real and real.shape), ("--shape", asked.shape)):
        require(other in (None, shape), name, f"images of {list(shape)}, which {found.place} was trained on", other)
    title = found.title or subject.title
    network = subject.open(asked.device)
    classes = _probed(network, shape, title, asked.device)
    samples, places = _samples(real, classes)
    trained = trained_threat(found.place) or _stage_threat(Path(found.place))
    return Tried(
        title=title,
        network=network,
        shape=shape,
        class_names=_names(facts, real, classes, title),
        threat=asked.threat or trained or found.threat or ThreatModel(),
        trained=trained,
        noise=facts.get("noise"),
        gradients=subject.gradients,
        device=asked.device,
        samples=samples,
        places=places,
        source="" if real is None else real.name,
        remarks=tuple(remarks),
    )


def _found(asked: Asked) -> _Found:
    """Where the word's checkpoint lies: a run's student, or the word itself."""
    path = Path(asked.word)
    is_run = (path / "recipe.yaml").is_file() or not (path.exists() or kind_of(asked.word))
    if not is_run:
        require(asked.arm is None and asked.run_seed is None, "--arm, --run-seed", "a run as CLASSIFIER", asked.word)
        return _Found(place=asked.word)
    return _student(open_run(_run_folder(asked)), asked)


def _run_folder(asked: Asked) -> Path:
    try:
        return find_run(asked.word, asked.runs)
    except UserError:
        runs = [path.name for path in list_runs(asked.runs)]
        raise UserError(
            f"classifier: expected a run or a checkpoint. {unknown('run', asked.word, runs)}, and nothing of this name "
            "lies here: check the path, or --runs. `gambeson try --help` says what can be given"
        ) from None


def _student(run: Run, asked: Asked) -> _Found:
    """The classifier that an arm of a run ended with."""
    arms = list(dict.fromkeys(chapter.arm.value for chapter in run.chapters))
    arm = asked.arm or arms[-1]
    require(arm in arms, "--arm", f"an arm of {run.folder.name}: {', '.join(arms)}", asked.arm)
    chapters = {c.seed: c for c in run.chapters if c.arm.value == arm}
    seed = min(chapters) if asked.run_seed is None else asked.run_seed
    require(seed in chapters, "--run-seed", f"a seed of that arm: {', '.join(map(str, sorted(chapters)))}", seed)
    student = chapters[seed].artifacts.get("student")
    if student is None or not student.folder.is_dir():
        raise EnvironmentFault(
            f"{run.folder}: expected the classifier of its arm {arm} in stages/ beside the run, found none; if the run "
            "was moved, move its stages folder along, or give the classifier.safetensors itself"
        )
    return _Found(
        place=str(student.file(OURS)),
        title=f"{run.folder.name}, arm {arm}, seed {seed}",
        data=run.recipe.data,
        threat=run.recipe.threat,
    )


def _images(asked: Asked, found: _Found) -> tuple[ImageSet | None, list[str]]:
    """The images to click on. Those of a run's recipe are left out with a remark where they are not here."""
    if asked.data is not None:
        ours = Path(found.place).is_dir() or Path(found.place).suffix == ".safetensors"
        return tested_images(asked.data, ours, asked.everything)
    if found.data is None:
        return None, []
    try:
        return found.data.load(), []
    except (OSError, ValueError) as error:
        told = str(error).splitlines()[0]
        return None, [f"The run's images could not be read, so there are none to click on ({told})."]


def _shape(asked: Asked, found: _Found, real: ImageSet | None) -> Shape:
    """The size of the images, before the classifier is opened: asked for, or that of the data, or of the checkpoint."""
    if asked.shape is not None:
        return asked.shape
    if real is not None:
        return real.shape
    path = Path(found.place)
    ours = path / OURS if (path / OURS).is_file() else path
    if ours.is_dir() or ours.suffix == ".safetensors":
        told = Ours(str(ours)).saved.facts.get("shape")
        if told:
            return tuple(told)
    raise UserError(
        f"--shape: expected the size of the images, since {found.place} does not say it, got nothing; give --shape "
        "3x32x32 (channels, height, width), or --data with images that it was trained for"
    )


def _probed(network: Network, shape: Shape, title: str, device: str) -> int:
    """How many classes it answers to images of this shape. UserError where it does not take them."""
    with failing(f"{title}: expected a classifier of images {list(shape)} in [0, 1]"):
        return logits_of(network, torch.full((2, *shape), 0.5, device=device)).shape[1]


def _names(facts: Mapping[str, Any], real: ImageSet | None, classes: int, title: str) -> tuple[str, ...]:
    """What the logits stand for: as the checkpoint says, or the data, or numbers."""
    told = tuple(map(str, facts.get("class_names") or ()))
    if len(told) == classes:
        return told
    names = () if real is None else real.class_names
    if names and len(names) != classes:
        raise UserError(
            f"--data: expected images of the {classes} classes of {title}, got {real and real.name} with {len(names)}; "
            "name the data that it was trained on"
        )
    return names or tuple(f"class {k}" for k in range(classes))


def _samples(real: ImageSet | None, classes: int) -> tuple[Split | None, tuple[int, ...]]:
    """The first test images of each class, class by class: the same number of each, spread over the classes where
    there are more of those than places."""
    if real is None or not len(real.test):
        return None, ()
    labels, each = real.test.labels, max(SAMPLES // classes, 1)
    chosen = torch.linspace(0, classes - 1, min(classes, SAMPLES)).round().long().tolist()
    rows = torch.cat([(labels == k).nonzero().flatten()[:each] for k in chosen])
    if not len(rows):
        return None, ()
    return Split(real.test.images[rows].clone(), labels[rows].clone()), tuple(rows.tolist())


def _stage_threat(place: Path) -> ThreatModel | None:
    """What the record beside a stage's classifier says that its loss attacks with; None where nothing does."""
    record = (place if place.is_dir() else place.parent) / "done.json"
    config = read_json(record).get("config") if record.is_file() else None
    for told in _threats(config.get("loss")) if isinstance(config, dict) else ():
        return ThreatModel(norm=told["norm"], epsilon=told["epsilon"])
    return None


def _threats(loss: object) -> Iterator[dict[str, Any]]:
    """Every threat model inside the record of a loss, outermost first."""
    if not isinstance(loss, dict):
        return
    told = loss.get("threat")
    if isinstance(told, dict) and {"norm", "epsilon"} <= set(told):
        yield told
    for part in loss.values():
        yield from _threats(part)
