"""Weights that were trained elsewhere as stages: read once, checked, and kept in our own format under their content."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from gambeson.data.exchange.incoming import About
from gambeson.disk import checksum
from gambeson.errors import UserError, require
from gambeson.heritage import carried, inherited, noted, told
from gambeson.models.classifiers import classifier_header, load_encoder
from gambeson.models.denoiser import EDM, VP, NetworkDenoiser, denoiser_header, load_denoiser
from gambeson.models.files import header_of, load_tensors, save_tensors
from gambeson.models.foreign import load_foreign
from gambeson.store import Workspace, stage
from gambeson.training.cards import imported_classifier_card, imported_denoiser_card

FILES = {".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".safetensors", ".yaml", ".yml"}
"""Endings of files: a name that ends so is no hub id."""


@dataclass(frozen=True, kw_only=True)
class ForeignDenoiser:
    """A diffusion model trained elsewhere: its weights, and what kind of file they are."""

    path: str = ""  # a file, a folder of diffusers, or a hub id (org/name)
    kind: Literal["auto", "gambeson", "edm", "ddim", "minimal-diffusion", "diffusers"] = "auto"  # who wrote it
    image_size: int | None = None  # side of the images, where the weights do not tell it
    classes: int | None = None  # number of classes, where the last label row of diffusers' weights is the null class
    preconditioning: EDM | VP | None = None  # what the network predicts, where its family or its file do not say it
    revision: str | None = None  # which revision of a hub id; none: the newest
    licence: str | None = field(
        default=None, metadata={"neutral": None}
    )  # the licence of the weights, where they do not state it: all that is made with them says so
    additional_data: tuple[str, ...] = field(
        default=(), metadata={"neutral": ()}
    )  # sets of real images, besides the training set, that the weights have seen, where they do not state them

    @property
    def source(self) -> Weights:
        """The weights as an input of a stage."""
        require(bool(self.path), "denoiser.path", "a file, a folder or a hub id (org/name) with weights", self.path)
        return Weights(self.path, self.revision, self.licence, self.additional_data)

    @property
    def reading(self) -> ForeignDenoiser:
        """How the weights are read, wherever they lie: what a stage depends on besides their content."""
        return replace(self, path="")


@dataclass(frozen=True)
class Weights:
    """A file, a folder or a hub id; its digest is that of the content, wherever it lies."""

    place: str
    revision: str | None = None
    licence: str | None = None  # as the user states it
    additional_data: tuple[str, ...] = ()

    @property
    def is_hub(self) -> bool:
        """Whether it is a name on the hub rather than a place on disk."""
        named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.place)
        return named is not None and not Path(self.place).exists() and Path(self.place).suffix not in FILES

    @property
    def heritage(self) -> dict[str, Any]:
        """Its name, and what the user states, a file of ours says that it carries, or a card in its folder."""
        path, stated = Path(self.place), {"licence": self.licence, "additional_data": list(self.additional_data)}
        if self.is_hub:
            return {"name": self.place, "hub": self.place, **carried(stated)}
        found = told(header_of(path)) if path.is_file() else told({"licence": About.beside(path).licence})
        return {"name": path.name, **carried(inherited(stated, found))}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the files' contents; of name and revision for a hub id. UserError where there is nothing."""
        path = Path(self.place)
        if path.is_file():
            return checksum(path)
        if path.is_dir():
            files = [(str(p.relative_to(path)), checksum(p)) for p in sorted(path.rglob("*")) if p.is_file()]
            return hashlib.sha256(repr(files).encode()).hexdigest()
        if self.is_hub:
            return hashlib.sha256(f"hub:{self.place}@{self.revision}".encode()).hexdigest()
        raise UserError(f"{self.place}: expected a file or folder with weights, or a hub id like org/name; found none")


@stage(revision=1, card=imported_denoiser_card)
def import_denoiser(work: Workspace, spec: ForeignDenoiser, source: Weights) -> None:
    """Writes denoiser.safetensors from the weights of other projects (or from ours)."""
    denoiser = _read(spec, source.place)
    header = {**denoiser_header(denoiser), "log": [], "source": source.place, **noted(work.heritage)}
    save_tensors(work.folder / "denoiser.safetensors", denoiser.network.state_dict(), header)


def _read(spec: ForeignDenoiser, place: str) -> NetworkDenoiser:
    path = Path(place)
    if spec.kind == "gambeson" or (spec.kind == "auto" and _is_ours(path)):
        require(path.is_file(), "denoiser.path", "a file that `gambeson train-diffusion` wrote", place)
        options = ("image_size", "classes", "preconditioning", "revision")
        given = [name for name in options if getattr(spec, name) is not None]
        require(not given, "denoiser", "no reading options for weights of our own, which say all of it", given)
        return load_denoiser(path)
    return load_foreign(
        place,
        kind=spec.kind,
        image_size=spec.image_size,
        classes=spec.classes,
        preconditioning=spec.preconditioning,
        revision=spec.revision,
    )


def _is_ours(path: Path) -> bool:
    """Whether a file is a denoiser of ours, whatever its name."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as handle:
            return "gambeson" in (handle.metadata() or {})
    except SafetensorError:
        return False


@stage(revision=1, card=imported_classifier_card)
def import_classifier(work: Workspace, kind: str, source: Weights) -> None:
    """Writes classifier.safetensors from the weights of a classifier of ours."""
    path = Path(source.place)
    model, shape = load_encoder(path), load_tensors(path)[1].get("shape")
    header = {**classifier_header(model, shape and tuple(shape)), "log": [], **noted(work.heritage)}
    save_tensors(work.folder / "classifier.safetensors", model.state_dict(), header)
