"""Classifiers in a folder as the hub's libraries keep them: model.safetensors, config.json and a model card.

The hub's own package is needed to download one, and imported only then.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gambeson
from gambeson.disk import atomic, read_json, write_json
from gambeson.errors import EnvironmentFault, UserError, require
from gambeson.heritage import carried, seen
from gambeson.models.card import Card, card_text
from gambeson.models.classifiers import described
from gambeson.models.files import checked, load_tensors, save_tensors
from gambeson.models.network import ClassifierNetwork
from gambeson.models.noise_conditioned import NoiseConditionedSpec

WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"
"""The files of such a folder."""


def save_pretrained(model: ClassifierNetwork, folder: str | Path, **card: Any) -> None:
    """Writes weights, config.json and a model card (README.md) into a new folder, all of it or nothing.

    The keywords are the fields of `gambeson.models.card.Card`: what is not known is left out of the card. Raises
    UserError for a folder that holds something, and for class names or a shape that the network does not have,
    EnvironmentFault where nothing can be written.
    """
    folder, facts = Path(folder), Card(**card)
    if facts.class_names is not None:
        expected = f"{model.classes} of them, as the network has"
        require(len(facts.class_names) == model.classes, "class_names", expected, len(facts.class_names))
    if facts.shape is not None:
        expected = f"({model.channels}, height, width), as the network has"
        require(facts.shape[0] == model.channels, "shape", expected, facts.shape)
    with _whole(folder) as draft:
        save_tensors(draft / WEIGHTS, model.state_dict(), None)
        write_json(draft / CONFIG, _config(model, facts))
        with atomic(draft / README) as temporary:
            temporary.write_text(card_text(model, facts, folder.absolute().name), encoding="utf-8")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yields a folder beside `folder`, which is given that name when the block ends well, and removed otherwise."""
    draft = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}.draft")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: expected a new or an empty folder, got one with files in it; choose another")
        shutil.rmtree(draft, ignore_errors=True)  # of an ended process with our number
        draft.mkdir(parents=True)
        yield draft
        os.replace(draft, folder)
    except EnvironmentFault:
        raise
    except OSError as error:
        raise EnvironmentFault(
            f"{folder}: expected a folder I may write to, got: {error.strerror or error}. Nothing half-written was "
            "kept; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _config(model: ClassifierNetwork, facts: Card) -> dict[str, Any]:
    """What config.json says: all that is needed to build the network, and what is known about its images."""
    mean, std = model.normalisation
    config = {
        "library_name": "gambeson",
        "gambeson_version": gambeson.__version__,
        "architectures": [type(model).__name__],
        "network": {"class": type(model.spec).__name__, **asdict(model.spec)},
        "channels": model.channels,
        "classes": model.classes,
        "normalisation": {"mean": mean, "std": std, "where": "inside the network, which takes pixels in [0, 1]"},
        "shape": facts.shape,
        "class_names": facts.class_names,
        "threat": None if facts.threat is None else asdict(facts.threat),
        "noise": facts.noise,
        "recipe_digest": facts.recipe_digest,
        **carried(facts.heritage),
        **seen(facts.heritage),
    }
    return {name: value for name, value in config.items() if value is not None}


def from_pretrained(place: str | Path, revision: str | None = None) -> ClassifierNetwork:
    """The network of a folder that `save_pretrained` made, or of a hub id (org/name), frozen, in eval mode.

    revision: which state of a hub id; None: the newest. Raises UserError for a place that holds no such network, or
    weights of another architecture than its config.json says, EnvironmentFault for what cannot be downloaded or is
    damaged.
    """
    folder = _folder(place, revision)
    config = _read_config(folder, place)
    source = str(place)
    network = config["network"]
    if isinstance(network, dict) and network.get("class") == NoiseConditionedSpec.__name__:
        raise UserError(f"{place}: expected a classifier of images in [0, 1], got a NoiseConditionedClassifier")
    model = described(config, load_tensors(folder / WEIGHTS)[0], source)
    assert isinstance(model, ClassifierNetwork), "the other kind was refused"
    return model


def config_of(place: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What config.json of a folder or a hub id says: network, channels, classes, and where known shape, class names...

    Raises as `from_pretrained` does.
    """
    return _read_config(_folder(place, revision), place)


def _read_config(folder: Path, place: str | Path) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{place}: expected a folder of save_pretrained with {name}, which is missing")
    config = read_json(folder / CONFIG)
    wanted = ("network", "channels", "classes")
    if not (isinstance(config, dict) and all(name in config for name in wanted)):
        raise UserError(
            f"{place}: expected a {CONFIG} of gambeson's with {', '.join(wanted)}, got that of another library; a "
            "file of RobustBench's zoo is read by gambeson.models.load_robustbench"
        )
    return checked(config, str(place))


def _folder(place: str | Path, revision: str | None) -> Path:
    """The local folder, or that of a downloaded hub id. UserError for what is neither."""
    local = Path(place)
    if local.is_dir():
        require(revision is None, f"{place}, revision", "none: it is a folder on this machine", revision)
        return local
    if local.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(place)):
        raise UserError(f"{place}: expected a folder of save_pretrained or a hub id like org/name; found neither")
    return _download(str(place), revision)


def _download(place: str, revision: str | None) -> Path:
    """The folder in the hub's cache with the weights and the config of a hub id."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            f"{place}: no such folder here; to load it from the hub, the package huggingface_hub is needed ({error}); "
            "pip install gambeson[hub]"
        ) from error
    try:
        return Path(hub.snapshot_download(place, revision=revision, allow_patterns=[WEIGHTS, CONFIG]))
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"{place}: no such folder here, and expected to download it from the hub, got {type(error).__name__}: "
            f"{error}; check the name, the connection and (for a private one) the log-in"
        ) from error
