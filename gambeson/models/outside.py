"""Classifiers of others: a TorchScript or torch.export file, `module:function`, or an ONNX file.

The first three are programs and run with the rights of whoever opens them: they ask for trust. An ONNX file is a graph
of onnxruntime's own operators, and no library of custom ones is ever registered here: it runs nothing of its author's.
"""

from __future__ import annotations

import importlib
import mmap
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from gambeson.errors import UserError, require
from gambeson.models.memory import lacks_memory
from gambeson.types import Images, Logits

Kind = Literal["TorchScript", "torch.export", "module:function", "ONNX"]
_NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PROBES = 3
_FORMATS = "TorchScript (.pt, .ts), torch.export (.pt2), ONNX (.onnx), or module:function"


@dataclass(frozen=True, kw_only=True)
class Outside:
    """Somebody else's classifier and what can be done with it."""

    model: Callable[[Tensor], Tensor]  # images [B, C, H, W] in [0, 1] -> logits [B, classes]; a module is in eval mode
    kind: Kind  # what it came as
    classes: int  # columns of the logits
    gradients: bool  # whether autograd can follow it; without, only attacks that ask for logits mean anything


def kind_of(word: str) -> Kind | None:
    """What a word names, by its form and the first bytes of the file; None for what is no classifier of others.

    A .pt file of bare weights is None: its architecture has to be said (`gambeson.robustness.zoo.load_zoo`).
    """
    path = Path(word)
    if path.suffix == ".onnx":
        return "ONNX"
    if path.is_file():
        return _archive(path)
    return "module:function" if _NAMED.fullmatch(word) else None


def _archive(path: Path) -> Kind | None:
    """Which of torch's two kinds of programs a file is; both are zip archives, as weights are."""
    try:
        with ZipFile(path) as archive:
            inside = {name.partition("/")[2] for name in archive.namelist()}
    except (BadZipFile, OSError):
        return None
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return "TorchScript"
    return "torch.export" if any(name.startswith("models/") for name in inside) else None


def outside_classifier(
    word: str,
    shape: tuple[int, int, int],
    *,
    trust: bool,
    classes: int | None = None,
    device: str | torch.device = "cpu",
) -> Outside:
    """The classifier that a file or `module:function` holds, tried on a few grey noise images of `shape` (C, H, W).

    module:function is imported with the working directory first; the function is called without arguments and returns
    an nn.Module or any callable from images in [0, 1] to logits. `classes`: how many there must be. Raises UserError
    for what needs trust and has none, for what is not there or is something else, and for outputs that are no logits.
    """
    kind = kind_of(word)
    if kind is None:
        raise UserError(f"classifier: expected {_FORMATS}, got {word!r}{_why(Path(word))}")
    _ask_trust(word, kind, trust)
    place = torch.device(device)
    model = {"TorchScript": _scripted, "torch.export": _exported, "module:function": _named, "ONNX": _onnx}[kind](
        word, shape, place
    )
    images = torch.rand(_PROBES, *shape, generator=torch.Generator().manual_seed(0)).to(place)
    logits = _probe(word, model, images)
    require(classes in (None, logits.shape[1]), f"{word}: classes", f"{classes}, as the data has", logits.shape[1])
    return Outside(model=model, kind=kind, classes=logits.shape[1], gradients=_followed(model, images))


def _why(path: Path) -> str:
    """What a file that is no program is."""
    if not path.exists():
        return ", which is no file"
    return (
        ", which holds no program. A file of bare weights needs its architecture said: an entry of RobustBench, or "
        "WRN-28-10 (gambeson.robustness.zoo.load_zoo)"
    )


def _ask_trust(word: str, kind: Kind, trust: bool) -> None:
    """UserError for a program that the caller has not said to trust."""
    if kind != "ONNX" and not trust:
        what = "imports and calls Python code" if kind == "module:function" else "is a program"
        raise UserError(
            f"{word}: expected --trust (trust=True), since {kind} {what}, which runs with your rights and may read, "
            "write and send what you may. Say so if you know where it comes from; otherwise ask its author for an ONNX "
            "file or for the bare weights, which run nothing"
        )


@contextmanager
def failing(expected: str) -> Iterator[None]:
    """Somebody else's code may raise anything: inside, it becomes the caller's mistake, with its place."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
        lines = str(error).strip().splitlines() or [""]
        raise UserError(f"{expected}, got {type(error).__name__}: {lines[0][:300]} ({where})") from error


def _probe(word: str, model: Callable[[Tensor], Tensor], images: Images) -> Logits:
    """The logits of a few images; UserError for whatever they are not."""
    made_for = f"{word}: expected a classifier of images [B, {', '.join(map(str, images.shape[1:]))}] for any B"
    with failing(made_for), torch.no_grad():
        logits: Any = model(images)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{word}: expected one tensor of logits, got {type(logits).__name__}; return the logits alone, before any "
            "softmax"
        )
    if logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise UserError(
            f"{word}: expected logits [{len(images)}, classes] for {len(images)} images, got {list(logits.shape)}; a "
            "network of features needs its last layer, one exported for a fixed batch a dynamic one"
        )
    if not (logits.is_floating_point() and logits.isfinite().all()):
        raise UserError(
            f"{word}: expected finite floating-point logits, got {logits.dtype}: {logits.flatten()[:3].tolist()}, ..."
        )
    return logits


def _followed(model: Callable[[Tensor], Tensor], images: Images) -> bool:
    """Whether autograd finds a way from the logits back to the images. A lack of memory is no answer: it is raised."""
    try:
        with torch.enable_grad():
            asked = images.clone().requires_grad_()
            total = model(asked).sum()
            return total.requires_grad and torch.autograd.grad(total, asked, allow_unused=True)[0] is not None
    except Exception as error:  # such as an operator without a backward pass, or Tensor.numpy
        if lacks_memory(error):
            raise
        return False


def _scripted(word: str, shape: tuple[int, int, int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """A TorchScript file, in eval mode; behind a function, since frozen ones lack what a module has."""
    with failing(f"{word}: expected a whole TorchScript file"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.load(word, map_location=device)
    for parameter in script.parameters():
        parameter.requires_grad_(False)
    with suppress(AttributeError):  # a frozen one was in eval mode before, and has no mode any more
        script.eval()
    return lambda images: script(images)


def _exported(word: str, shape: tuple[int, int, int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """A torch.export file, moved to the device."""
    from torch.export.passes import move_to_device_pass

    with failing(f"{word}: expected a whole torch.export file (.pt2)"):
        program = move_to_device_pass(torch.export.load(word), device).module()
    for parameter in program.parameters():
        parameter.requires_grad_(False)
    return lambda images: program(images)


def _named(word: str, shape: tuple[int, int, int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """What the function of a module returns: a module in eval mode on the device, or any other callable as it is."""
    place, _, name = word.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # and it stays, as with python -m: a model may import when it is called
    with failing(f"{word}: expected to import {place} (the working directory is searched first)"):
        module = importlib.import_module(place)
    if name not in vars(module):
        functions = ", ".join(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise UserError(f"{word}: expected a function {name} in {module.__file__}, which has {functions or 'none'}")
    with failing(f"{word}: expected {name}() to return a classifier"):
        model = vars(module)[name]()
    require(callable(model), word, "a function that returns an nn.Module, or a callable from images to logits", model)
    return model.eval().requires_grad_(False).to(device) if isinstance(model, nn.Module) else model


def _onnx(word: str, shape: tuple[int, int, int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """An ONNX file on the CPU, whatever the device of the images."""
    return OnnxClassifier(word, shape)


_LOCATION = re.compile(rb"\n\x08location\x12")
"""The key of an entry of external data as it stands in an ONNX file (protobuf: field 1, 8 bytes); its value follows."""


def external_files(path: Path) -> list[Path]:
    """The files beside an ONNX file that hold some of its weights, sorted; onnxruntime reads none outside its folder.

    Found in the bytes of the file, so that the package onnx is not needed; bytes that only look so name no file.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            named = {_text(content, found.end()) for found in _LOCATION.finditer(content)}
    places = {os.path.normpath(name) for name in named if name and "\0" not in name}
    inside = {place for place in places if not os.path.isabs(place) and not place.startswith("..")}
    return sorted(path.parent / place for place in inside if (path.parent / place).is_file())


def _text(content: mmap.mmap, at: int) -> str:
    """The protobuf text at this place: its length as a varint, then UTF-8; '' for what is none."""
    length = shift = 0
    for byte in content[at : at + 3]:
        length, shift, at = length | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            break
    try:
        return content[at : at + length].decode()
    except UnicodeDecodeError:
        return ""


_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


class OnnxClassifier:
    """Images [B, C, H, W] in [0, 1] -> logits [B, classes] float32 on the images' device, without gradients.

    onnxruntime computes them on the CPU. A file made for a fixed batch is given chunks of that size, the last one
    filled up. Raises UserError where onnxruntime is missing, and for a file that is none, that takes other images than
    those of `shape` (C, H, W), or that has several outputs none of which is called logits.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int, int]) -> None:
        self.session = _session(Path(path))
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        require(len(inputs) == 1, f"{path}: inputs", "one, the images", [i.name for i in inputs])
        taken = inputs[0]
        fits = len(taken.shape) == 4 and all(
            not isinstance(has, int) or has == wanted for has, wanted in zip(taken.shape[1:], shape, strict=True)
        )
        require(fits, f"{path}: images", f"[B, {', '.join(map(str, shape))}], channels first", taken.shape)
        require(taken.type in _TYPES, f"{path}: images", f"of one type of {', '.join(_TYPES)}", taken.type)
        names = [output.name for output in outputs]
        require(len(names) == 1 or "logits" in names, f"{path}: outputs", "one, or one called logits", names)
        self.output = names[0] if len(names) == 1 else "logits"
        self.input, self.dtype = taken.name, _TYPES[taken.type]
        self.batch = taken.shape[0] if isinstance(taken.shape[0], int) else None

    def __call__(self, images: Images) -> Logits:
        given = images.detach().to("cpu", self.dtype)
        parts = [self._run(part) for part in given.split(self.batch or max(len(given), 1))]
        return torch.cat(parts).float().to(images.device)

    def _run(self, part: Tensor) -> Tensor:
        """One chunk; the last image is repeated where the file wants more."""
        missing = (self.batch or len(part)) - len(part)
        filled = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
        found = self.session.run([self.output], {self.input: filled.contiguous().numpy()})[0]
        return torch.from_numpy(found)[: len(part)]


def _session(path: Path) -> Any:
    """onnxruntime's session of a file, with as many threads as torch has."""
    require(path.is_file(), "classifier", "an ONNX file", str(path))
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: expected the package onnxruntime, got {error}; pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with failing(f"{path}: expected a whole ONNX file of known operators"):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
