"""Classifiers to be measured, by where they lie: ours, RobustBench's, or somebody's program; any process can open them.

A subject is a few words and numbers; what it opens is on the device, frozen, in eval mode, channels innermost.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from gambeson.data.imageset import ImageSet
from gambeson.disk import checksum
from gambeson.errors import UserError, require
from gambeson.heritage import told
from gambeson.models.classifiers import spec_of
from gambeson.models.files import is_safetensors
from gambeson.models.hub import CONFIG, WEIGHTS, config_of
from gambeson.models.memory import lacks_memory
from gambeson.models.network import ClassifierNetwork
from gambeson.models.outside import Outside, external_files, failing, kind_of, outside_classifier
from gambeson.robustness.assess import Subject
from gambeson.robustness.attack_losses import Network
from gambeson.robustness.certificates import SavedClassifier
from gambeson.robustness.inputs import logits_of
from gambeson.robustness.zoo import ENTRIES, load_zoo
from gambeson.threat import ThreatModel

OURS = "classifier.safetensors"
"""The file of weights in the folder of a finished training."""
_BATCH, _BATCHES = 8, 4
"""Images of noise at once that a program is known by, and how many times."""


@runtime_checkable
class Named(Subject, Protocol):
    """A subject that can say what it is."""

    @property
    def title(self) -> str:
        """What a reader is told that was measured."""
        ...

    def network(self) -> ClassifierNetwork | None:
        """The network on the CPU where its architecture is one of ours; None for somebody's program."""
        ...


def _readied(model: Network, device: str, compiled: bool) -> Network:
    """The model on the device, its weights as convolutions like them best; compiled where that was asked for."""
    if not isinstance(model, nn.Module):
        return model
    model = model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return torch.compile(model) if compiled else model  # type: ignore[return-value]


@dataclass(frozen=True)
class Ours:
    """A classifier that this package wrote: a folder of `gambeson train`, or a classifier.safetensors."""

    place: str  # the folder or the file
    compiled: bool = False  # whether it goes through torch.compile

    @cached_property
    def saved(self) -> SavedClassifier:
        """Where its files are."""
        return SavedClassifier(self.place)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and of the network that they belong to."""
        return self.saved.digest

    @property
    def gradients(self) -> bool:
        """True."""
        return True

    @property
    def title(self) -> str:
        """The network and where it lies."""
        spec = spec_of(self.saved.facts["network"], self.place)
        return f"{type(spec).__name__.removesuffix('Spec')} of {self.place}"

    @property
    def heritage(self) -> dict[str, Any]:
        """What its files say that it carries."""
        return {"name": Path(self.place).name, **told(self.saved.facts)}

    @property
    def class_names(self) -> tuple[str, ...]:
        """What its logits stand for, in their order, where its files say so; empty: they do not."""
        return tuple(map(str, self.saved.facts.get("class_names") or ()))

    def network(self) -> ClassifierNetwork:
        """The network on the CPU."""
        return self.saved.load()

    def open(self, device: str) -> Network:
        """Images [B, C, H, W] in [0, 1] -> logits."""
        return _readied(self.network(), device, self.compiled)


def trained_threat(word: str) -> ThreatModel | None:
    """What a folder of `gambeson train` says that its classifier was trained to withstand; None where nothing does."""
    told = config_of(word).get("threat") if (Path(word) / CONFIG).is_file() else None
    if not isinstance(told, dict) or not {"norm", "epsilon"} <= set(told):
        return None
    return ThreatModel(norm=told["norm"], epsilon=told["epsilon"])


@dataclass(frozen=True)
class FromZoo:
    """A checkpoint file of RobustBench's zoo, read as `load_zoo` does."""

    place: str  # the file
    entry: str | None = None  # the name of the entry, or an architecture by hand; none: the file's name
    compiled: bool = False  # whether it goes through torch.compile

    @property
    def digest(self) -> str:
        """SHA-256 of the file and of the architecture that it was read as."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256((checksum(Path(self.place)) + repr(self.network().spec)).encode()).hexdigest()

    @property
    def gradients(self) -> bool:
        """True."""
        return True

    @property
    def title(self) -> str:
        """The entry and where it lies."""
        return f"{self.entry or Path(self.place).stem} of {self.place}"

    @property
    def heritage(self) -> dict[str, Any]:
        """Its name, and whether RobustBench says that it has seen further real images; which ones it does not say."""
        name = self.entry or Path(self.place).stem
        extra = any(entry.name == name and entry.additional_data for entry in ENTRIES)
        return {"name": name, **({"additional_data": [f"further real images of {name}, not named"]} if extra else {})}

    def network(self) -> ClassifierNetwork:
        """The network on the CPU. UserError for a name that is none of the zoo's."""
        return load_zoo(self.place, self.entry)

    def tried(self) -> FromZoo:
        """Itself, opened once. UserError for a name that is none of the zoo's, and for weights of something else."""
        assert self.digest
        return self

    def open(self, device: str) -> Network:
        """Images [B, C, H, W] in [0, 1] -> logits."""
        return _readied(self.network(), device, self.compiled)


@dataclass(frozen=True)
class Foreign:
    """Somebody's program: a TorchScript or torch.export file, `module:function`, or an ONNX file."""

    word: str  # the file, or module:function
    shape: tuple[int, int, int]  # (channels, height, width) of the images
    trust: bool = False  # whether it may run with our rights
    compiled: bool = False  # whether a module goes through torch.compile

    @property
    def digest(self) -> str:
        """SHA-256 of the file, with those that an ONNX file names; for module:function of its source and of the weights
        of the module that it returns; and of what it answers to a few dozen images of noise, on one thread of the CPU.

        The answers tell of other files that it reads. Those of a program that draws at random tell nothing, and do not
        count.
        """
        return self._digest

    @property
    def gradients(self) -> bool:
        """Whether autograd can follow it; an ONNX file it cannot."""
        return self._gradients

    @cached_property
    def _digest(self) -> str:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as many for everybody: the last bits of the answers depend on it
        try:
            model = self._found("cpu").model
            written = self._source(model) if kind_of(self.word) == "module:function" else self._files()
            return hashlib.sha256(written + _answers(self.word, model, self.shape)).hexdigest()
        finally:
            torch.set_num_threads(threads)

    def _files(self) -> bytes:
        """Checksums of the file and of those that it names."""
        path = Path(self.word)
        beside = external_files(path) if kind_of(self.word) == "ONNX" else []
        return "".join(checksum(each) for each in (path, *beside)).encode()

    def _source(self, model: Network) -> bytes:
        """Checksum of a module's source and of the weights that its function returned."""
        state = hashlib.sha256(self.word.encode())
        source = sys.modules[self.word.partition(":")[0]].__file__
        state.update(b"" if source is None else Path(source).read_bytes())
        for name, value in _weights(model).items():
            state.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return state.digest()

    @cached_property
    def _gradients(self) -> bool:
        return self._found("cpu").gradients

    @property
    def title(self) -> str:
        """What it came as and where it lies."""
        return f"{kind_of(self.word)} {self.word}"

    def network(self) -> None:
        """None: the architecture is somebody else's."""
        return None

    def open(self, device: str) -> Network:
        """Images [B, C, H, W] in [0, 1] -> logits."""
        return _readied(self._found(device).model, device, self.compiled)

    def tried(self) -> Foreign:
        """Itself, opened once. UserError for a program without trust, and for what is no classifier of these images."""
        assert self.gradients in (True, False)
        return self

    def _found(self, device: str) -> Outside:
        return outside_classifier(self.word, self.shape, trust=self.trust, device=device)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict()) if isinstance(model, nn.Module) else {}


def _answers(word: str, model: Network, shape: tuple[int, int, int]) -> bytes:
    """The float32 logits of images of noise as bytes; none where the same images are answered otherwise again."""
    stream = torch.Generator().manual_seed(0)
    batches = [torch.rand(_BATCH, *shape, generator=stream) for _ in range(_BATCHES)]
    with failing(f"{word}: expected logits of {_BATCH} images"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = [model(batch).float().cpu().contiguous().numpy().tobytes() for batch in batches]
        torch.manual_seed(0)
        again = model(batches[0]).float().cpu().contiguous().numpy().tobytes()
    return b"".join(found) if again == found[0] else b""


def subject_of(
    word: str, shape: tuple[int, int, int], *, entry: str | None = None, trust: bool = False, compiled: bool = False
) -> Named:
    """The classifier that a word of the command line names, for images of `shape`.

    entry: the zoo's name of a file of bare weights. Raises UserError, saying what can be given, for what is not there,
    for a program without trust, and for an entry where none is needed.
    """
    path, kind = Path(word), kind_of(word)
    ours = path.is_dir() or (path.is_file() and is_safetensors(path))
    unneeded = ours or kind is not None
    require(entry is None or not unneeded, "--zoo", "a file of bare weights as classifier", word)
    if path.is_dir() and not (path / WEIGHTS).is_file() and (path / OURS).is_file():
        path = path / OURS
    if ours:
        return Ours(str(path), compiled)
    if kind is not None:
        return Foreign(word, shape, trust, compiled).tried()
    if path.is_file():
        return FromZoo(word, entry, compiled).tried()
    raise UserError(
        f"classifier: expected a folder that `gambeson train` wrote, a classifier.safetensors, a checkpoint file of "
        f"RobustBench (.pt), an .onnx file, or with --trust a TorchScript file or module:function; got {word!r}, which "
        "is nothing here; check the path"
    )


def logits_wanted(subject: Named, real: ImageSet, device: str) -> int:
    """How many classes the subject answers to images of this set; UserError where it does not take them."""
    if isinstance(subject, Ours):
        _check_shape(subject, real)
    images = (real.test if len(real.test) else real.train).images[:2].to(device)
    try:
        return logits_of(subject.open(device), images).shape[1]
    except (RuntimeError, ValueError, TypeError) as error:
        if lacks_memory(error):
            raise
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{subject.title}: expected a classifier that takes {real.name}'s images {list(real.shape)}, got: {told}. "
            "Name the data that it was trained on"
        ) from error


def _check_shape(subject: Ours, real: ImageSet) -> None:
    made_for = tuple(subject.saved.facts.get("shape") or real.shape)
    if made_for != real.shape:
        raise UserError(
            f"{subject.place}: expected a classifier of {real.name}'s images {list(real.shape)}, got one that was "
            f"trained on images {list(made_for)}; name the data that it was trained on"
        )
