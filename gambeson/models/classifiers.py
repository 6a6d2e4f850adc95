"""Classifiers on disk: which network a file holds stands in its header, and it comes back frozen, in eval mode."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from gambeson.errors import UserError, unknown
from gambeson.models.files import load_tensors, load_weights
from gambeson.models.noise_conditioned import NoiseConditionedClassifier, NoiseConditionedSpec
from gambeson.models.resnet import ResNetSpec, SmallResNet
from gambeson.models.wideresnet import WideResNet, WideResNetSpec

Spec = ResNetSpec | WideResNetSpec | NoiseConditionedSpec
CleanClassifier = SmallResNet | WideResNet
"""Networks that are a `Classifier`: images in [0, 1] -> logits."""

_SPECS: dict[str, type[Spec]] = {s.__name__: s for s in (ResNetSpec, WideResNetSpec, NoiseConditionedSpec)}


def classifier_header(
    model: CleanClassifier | NoiseConditionedClassifier, shape: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """What is needed besides the weights to build this classifier again.

    shape: (channels, height, width) of the images it was trained on. The networks average over the pixels and take any
    size, so nothing else would tell that they are given images of another.
    """
    network = {"class": type(model.spec).__name__, **asdict(model.spec)}
    header = {"kind": "classifier", "network": network, "channels": model.channels, "classes": model.classes}
    return header if shape is None else {**header, "shape": list(shape)}


def load_classifier(path: Path) -> CleanClassifier:
    """A classifier of clean images from its safetensors file, frozen, in eval mode.

    Raises UserError for the file of something else, a noise-conditioned classifier included (`load_encoder`).
    """
    model = load_encoder(path)
    if isinstance(model, NoiseConditionedClassifier):
        raise UserError(
            f"{path}: expected a classifier of images in [0, 1], got a noise-conditioned one, which has to be told a "
            "noise level. It serves as an encoder for guidance only"
        )
    return model


def load_encoder(path: Path, shape: tuple[int, int, int] | None = None) -> CleanClassifier | NoiseConditionedClassifier:
    """Any classifier from its safetensors file, frozen, in eval mode.

    Raises UserError for the file of something else and, with `shape`, for a classifier of images of another one (files
    that do not say theirs are taken).
    """
    tensors, header = load_tensors(path)
    if header.get("kind") != "classifier":
        raise UserError(f"{path}: expected the weights of a classifier, got {header.get('kind', 'a foreign file')!r}")
    made_for = tuple(header.get("shape") or shape or ())
    if shape is not None and made_for != tuple(shape):
        raise UserError(
            f"{path}: expected a classifier of images of shape {tuple(shape)}, got one that was trained on {made_for}; "
            "train or choose one for images of this size"
        )
    model = _spec_of(header["network"]).build(header["channels"], header["classes"])
    load_weights(model, tensors, str(path))
    return model.eval().requires_grad_(False)


def _spec_of(network: dict[str, Any]) -> Spec:
    """The spec that a header describes; the first files named no class, and were all small residual networks."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in network.items()
    }
    name = fields.pop("class", "ResNetSpec")
    if name not in _SPECS:
        raise unknown("classifier network", name, _SPECS)
    return _SPECS[name](**fields)
