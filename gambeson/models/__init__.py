"""Networks: classifiers (kept, loaded, exported) and denoisers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gambeson.models.card import Metric as Metric
    from gambeson.models.cifar_resnet import CifarResNetSpec as CifarResNetSpec
    from gambeson.models.classifiers import load_classifier as load_classifier
    from gambeson.models.export import load_robustbench as load_robustbench
    from gambeson.models.export import save_onnx as save_onnx
    from gambeson.models.export import save_robustbench as save_robustbench
    from gambeson.models.hub import from_pretrained as from_pretrained
    from gambeson.models.hub import save_pretrained as save_pretrained
    from gambeson.models.network import ClassifierNetwork as ClassifierNetwork
    from gambeson.models.preact_resnet import PreActResNetSpec as PreActResNetSpec
    from gambeson.models.resnet import ResNetSpec as ResNetSpec
    from gambeson.models.timm_model import TimmSpec as TimmSpec
    from gambeson.models.wideresnet import WideResNet as WideResNet
    from gambeson.models.wideresnet import WideResNetSpec as WideResNetSpec

_PLACES = {
    "Metric": "card",
    "CifarResNetSpec": "cifar_resnet",
    "load_classifier": "classifiers",
    "load_robustbench": "export",
    "save_onnx": "export",
    "save_robustbench": "export",
    "from_pretrained": "hub",
    "save_pretrained": "hub",
    "ClassifierNetwork": "network",
    "PreActResNetSpec": "preact_resnet",
    "ResNetSpec": "resnet",
    "TimmSpec": "timm_model",
    "WideResNet": "wideresnet",
    "WideResNetSpec": "wideresnet",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: one network must not wait for all the others."""
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(f"gambeson.models.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'gambeson.models' has no attribute {name!r}")
