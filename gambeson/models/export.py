"""Classifiers for others: state dicts that RobustBench's loader accepts (and its files read), and ONNX files."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gambeson.disk import atomic
from gambeson.errors import UserError, require
from gambeson.models.classifiers import filled
from gambeson.models.network import ClassifierNetwork
from gambeson.models.pickles import DAMAGE, read_torch
from gambeson.models.preact_resnet import PreActResNet, PreActResNetSpec
from gambeson.models.wideresnet import WideResNet, WideResNetSpec, zoo_state_dict

_PROTOBUF_LIMIT = 2**31 - 2**20


def robustbench_entry(model: ClassifierNetwork) -> str:
    """How RobustBench's model zoo builds this network, as an expression of its own classes.

    The zoo's files hold no normalisation: an entry that says another mean or std computes something else. Its networks
    pool 8x8 or 4x4 pixels at the end, so it runs them on 32x32 images only. Raises UserError for a network that the zoo
    has no class for.
    """
    if isinstance(model, WideResNet):
        name, depth, width = "DMWideResNet", model.spec.depth, model.spec.width
    elif isinstance(model, PreActResNet) and model.spec.width == 64:
        name, depth, width = "DMPreActResNet", model.spec.depth, 0
    else:
        raise UserError(
            f"RobustBench: expected a WideResNet, or a PreActResNet of width 64, which its zoo has classes for, got a "
            f"{type(model).__name__} ({model.spec}); its users can load the ONNX file, or gambeson itself"
        )
    activation = {"silu": "nn.SiLU", "relu": "nn.ReLU"}[model.spec.activation]
    mean, std = (values * (model.channels if len(values) == 1 else 1) for values in model.normalisation)
    return (
        f"{name}(num_classes={model.classes}, depth={depth}, width={width}, activation_fn={activation}, "
        f"mean={mean}, std={std}, num_input_channels={model.channels})"
    )


def robustbench_state_dict(model: ClassifierNetwork) -> dict[str, Tensor]:
    """The weights under the zoo's names, on the CPU, in memory of their own, for the class of `robustbench_entry`.

    The zoo's loader takes a bare dict like this one. It cuts `module.` and `model.` off the start of every name that
    has them anywhere: none here has. Raises UserError for a network that the zoo has no class for.
    """
    robustbench_entry(model)
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def save_robustbench(model: ClassifierNetwork, path: str | Path) -> None:
    """Writes the weights as a file (.pt) that RobustBench's loader takes, whole or not at all.

    Put it where the zoo looks, models/DATA/THREAT/NAME.pt, with NAME an entry that builds `robustbench_entry(model)`.
    Raises UserError for a network that the zoo has no class for, EnvironmentFault where nothing can be written.
    """
    tensors = robustbench_state_dict(model)
    with atomic(Path(path)) as temporary, open(temporary, "wb") as handle:
        torch.save(tensors, handle)  # into a file without a name: torch writes the name into it


def load_robustbench(path: str | Path, spec: WideResNetSpec | PreActResNetSpec) -> ClassifierNetwork:
    """The network in a file of RobustBench's zoo, or of the codes that train for it, frozen, in eval mode.

    The architecture is the caller's to say: the file holds neither activation nor mean and std of the pixels, and names
    and shapes do not show them. Nothing in the file is executed. Raises UserError, naming it, for a file that holds
    something else or another architecture.
    """
    path = Path(path)
    try:
        tensors = zoo_state_dict(read_torch(path))
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError, *DAMAGE) as error:
        raise UserError(f"{path}: expected weights as torch.save writes them, got: {error}") from error
    first = "init_conv.weight" if isinstance(spec, WideResNetSpec) else "conv_2d.weight"
    channels = tensors[first].shape[1] if first in tensors else len(spec.mean)
    classes = len(tensors["logits.bias"]) if "logits.bias" in tensors else 1
    return filled(spec.build(channels, classes), tensors, str(path))


def save_onnx(
    model: ClassifierNetwork, path: str | Path, shape: tuple[int, int, int], dynamic_batch: bool = True
) -> None:
    """Writes the network in eval mode as one ONNX file: `images` [B, C, H, W] float32 in [0, 1] -> `logits` [B, K].

    shape: (channels, height, width) of the images. With dynamic_batch B is any number, otherwise 1. The opset is the
    library's choice. Raises UserError where `onnx` or `onnxscript` is missing (pip install gambeson[onnx]), where the
    weights are not float32, or where they are beyond the 2 GB of one file.
    """
    _need_onnx()
    _check_onnx(model, shape)
    batch = 2 if dynamic_batch else 1  # 1 would be taken for a constant
    images = torch.full((batch, *shape), 0.5, device=next(model.parameters()).device)
    with _quiet():
        program: Any = torch.onnx.export(
            deepcopy(model).eval(),
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}} if dynamic_batch else None,
            dynamo=True,
            verbose=False,
        )
    with atomic(Path(path)) as temporary:
        program.save(str(temporary), external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about packages that are not needed, and about itself."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _need_onnx() -> None:
    """UserError unless the packages that torch exports with are there."""
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"ONNX: expected the packages onnx and onnxscript, got {error}; pip install gambeson[onnx]"
            ) from error


def _check_onnx(model: ClassifierNetwork, shape: tuple[int, int, int]) -> None:
    """UserError for images that the network does not take and weights that one file does not hold."""
    require(shape[0] == model.channels, "ONNX shape", f"({model.channels}, height, width), as the network has", shape)
    kinds = {p.dtype for p in model.parameters()}
    require(kinds == {torch.float32}, "ONNX weights", "float32; call model.float() first", kinds)
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    require(size < _PROTOBUF_LIMIT, "ONNX weights", "less than 2 GB, the most that one file holds", f"{size} bytes")
