"""Classifiers on disk: which network a file holds stands in its header, and it comes back frozen, in eval mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from gambeson.errors import UserError, unknown
from gambeson.models.cifar_resnet import CifarResNetSpec
from gambeson.models.files import built, check_asked, check_shapes, load_tensors, load_weights
from gambeson.models.network import ClassifierNetwork, ClassifierSpec
from gambeson.models.noise_conditioned import NoiseConditionedClassifier, NoiseConditionedSpec
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.timm_model import TimmSpec
from gambeson.models.wideresnet import WideResNetSpec

Spec = ResNetSpec | WideResNetSpec | PreActResNetSpec | CifarResNetSpec | TimmSpec | NoiseConditionedSpec
CleanClassifier = ClassifierNetwork
"""Networks that are a `Classifier`: images in [0, 1] -> logits."""
Model = TypeVar("Model", bound=ClassifierNetwork | NoiseConditionedClassifier)

_KINDS = (ResNetSpec, WideResNetSpec, PreActResNetSpec, CifarResNetSpec, TimmSpec, NoiseConditionedSpec)
_SPECS: dict[str, type[Spec]] = {kind.__name__: kind for kind in _KINDS}
_MARKS = {
    "layers.0.norm1.weight": "SmallResNet",
    "init_conv.weight": "WideResNet",
    "conv_2d.weight": "PreActResNet",
    "layer1.0.conv1.weight": "CifarResNet",
    "noise.0.weight": "NoiseConditionedClassifier",
}
"""A weight that only this network has -> its class."""


def classifier_header(
    model: ClassifierNetwork | NoiseConditionedClassifier, shape: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """What is needed besides the weights to build this classifier again.

    shape: (channels, height, width) of the images it was trained on. The networks average over the pixels and take any
    size, so nothing else would tell that they are given images of another.
    """
    header = {
        "kind": "classifier",
        "network": {"class": type(model.spec).__name__, **asdict(model.spec)},
        "channels": model.channels,
        "classes": model.classes,
    }
    return header if shape is None else {**header, "shape": list(shape)}


def load_classifier(path: Path, spec: ClassifierSpec | None = None) -> ClassifierNetwork:
    """A classifier of clean images from its safetensors file, frozen, in eval mode.

    Raises UserError for the file of something else, a noise-conditioned classifier included (`load_encoder`), and, with
    `spec`, for a network of another architecture, naming both.
    """
    model = load_encoder(path)
    if isinstance(model, NoiseConditionedClassifier):
        raise UserError(
            f"{path}: expected a classifier of images in [0, 1], got a noise-conditioned one, which has to be told a "
            "noise level. It serves as an encoder for guidance only"
        )
    if spec is not None and model.spec != spec:
        raise UserError(
            f"{path}: expected the weights of {spec}, got those of {model.spec}; give the architecture that they were "
            "trained with, or train this one"
        )
    return model


def load_encoder(
    path: Path, shape: tuple[int, int, int] | None = None
) -> ClassifierNetwork | NoiseConditionedClassifier:
    """Any classifier from its safetensors file, frozen, in eval mode.

    Raises UserError for the file of something else and, with `shape`, for a classifier of images of another one (files
    that do not say theirs are taken).
    """
    tensors, header = load_tensors(path)
    if header.get("kind") != "classifier":
        raise UserError(f"{path}: expected the weights of a classifier, got {header.get('kind', 'a foreign file')!r}")
    told = header.get("shape") or shape or ()
    made_for = tuple(told) if isinstance(told, list | tuple) else (told,)
    if shape is not None and made_for != tuple(shape):
        raise UserError(
            f"{path}: expected a classifier of images of shape {tuple(shape)}, got one that was trained on {made_for}; "
            "train or choose one for images of this size"
        )
    return described(header, tensors, str(path))


def described(
    told: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> ClassifierNetwork | NoiseConditionedClassifier:
    """The network that a header or config describes, with these weights, frozen, in eval mode.

    UserError for a description that is none, or asks for more than the weights fill: nothing of that is built.
    """
    sizes = [told.get(name) for name in ("channels", "classes")]
    if not isinstance(told.get("network"), dict) or not all(type(n) is int and n > 0 for n in sizes):
        expected = "a header that says network, channels and classes, as this version of gambeson writes it"
        raise UserError(f"{source}: expected {expected}, got {', '.join(map(str, told))[:300] or 'none'}")
    check_asked({**told["network"], "channels": sizes[0], "classes": sizes[1]}, tensors, source)
    spec = spec_of(told["network"], source)
    check = partial(_check_kind, tensors=tensors, source=source)
    return filled(built(lambda: unfilled(spec, told["channels"], told["classes"]), check, source), tensors, source)


def unfilled(spec: Spec, channels: int, classes: int) -> ClassifierNetwork | NoiseConditionedClassifier:
    """The network of a spec, its weights to be replaced: pretrained ones are not downloaded first."""
    if not isinstance(spec, TimmSpec):
        return spec.build(channels, classes)
    model = replace(spec, pretrained=False).build(channels, classes)
    model.spec = spec
    return model


def filled(model: Model, tensors: Mapping[str, Tensor], source: str) -> Model:
    """The network with these weights, frozen, in eval mode.

    Raises UserError for weights of another architecture, naming both, and for those of other sizes than the spec's.
    """
    _check_kind(model, tensors, source)
    load_weights(model, dict(tensors), source)
    return model.eval().requires_grad_(False)


def _check_kind(
    model: ClassifierNetwork | NoiseConditionedClassifier, tensors: Mapping[str, Tensor], source: str
) -> None:
    """UserError, naming both, for weights of another architecture than the model's, or of other sizes."""
    found = next((network for mark, network in _MARKS.items() if mark in tensors), None)
    if found not in (None, type(model).__name__):
        raise UserError(f"{source}: expected the weights of a {type(model).__name__} ({model.spec}), got a {found}'s")
    try:
        check_shapes(model, tensors, source)
    except UserError as error:
        raise UserError(
            f"{error}. They were asked for with {model.spec}, {model.channels} channels and {model.classes} classes"
        ) from error


def spec_of(network: Mapping[str, Any], source: str = "classifier") -> Spec:
    """The spec that a header describes; the first files named no class, and were all small residual networks.

    Raises UserError for an architecture, or a field of one, that this version does not have.
    """
    if not isinstance(network, Mapping):
        raise UserError(f"{source}: expected the description of a classifier, got {str(network)[:100]}")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in network.items()
    }
    name = fields.pop("class", "ResNetSpec")
    if not isinstance(name, str) or name not in _SPECS:
        raise unknown("classifier network", str(name)[:100], _SPECS)
    try:
        return _SPECS[name](**fields)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"{source}: expected the fields of {name} in this version of gambeson, got {', '.join(fields)} ({error})"
        ) from error
