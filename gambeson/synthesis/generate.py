"""Generates a store of synthetic images, block by block, by any fleet of workers; and fits embedding networks.

A finished block is never sampled again, and is the same for any number of workers, shard size, order and restart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gambeson.canonical import digest, plain
from gambeson.data.datasets import ImageSet, Split
from gambeson.data.exchange.store_card import images_card
from gambeson.data.mixture import to_uint8
from gambeson.data.synthetic import StoreWriter, inherited
from gambeson.errors import UserError
from gambeson.fleet import Tool
from gambeson.heritage import carried, seen
from gambeson.machine import Machine, make_repeatable
from gambeson.mirror import Mirror, have
from gambeson.models.classifiers import load_encoder
from gambeson.models.denoiser import NetworkDenoiser, load_denoiser
from gambeson.models.files import load_tensors, load_weights, save_tensors
from gambeson.randomness import derive
from gambeson.sampling.embedding import EmbeddingLearner, FittedEmbedding
from gambeson.sampling.guidance import Contrastive, ContrastiveGuidance
from gambeson.sampling.pairs import PreviousStep
from gambeson.store import RESUME, Artifact, Workspace, stage
from gambeson.synthesis.generation import Bound, Generation, Networks, sample_block
from gambeson.synthesis.pace import Pace
from gambeson.synthesis.room import check_room, store_bytes
from gambeson.training.cards import embedding_card

UNCONDITIONED = -1
"""The label in a store of images that were generated without a class."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the networks of a generation lie, so that any process can open them."""

    denoiser: Path
    encoder: Path | None = None
    embedding: Path | None = None
    real: ImageSet | None = None

    @staticmethod
    def of(
        real: ImageSet | None, denoiser: Artifact, encoder: Artifact | None, embedding: Artifact | None = None
    ) -> Sources:
        """The files of these stages."""
        return Sources(
            denoiser=denoiser.file("denoiser.safetensors"),
            encoder=None if encoder is None else encoder.file("classifier.safetensors"),
            embedding=None if embedding is None else embedding.file("embedding.safetensors"),
            real=real,
        )

    def open(self, spec: Generation, device: str, seed: int, fitting: bool = False) -> Networks:
        """The networks on a device, checked against the real images; the run's seed draws an embedding's weights.

        `fitting`: the embedding network is to be fitted now. Raises UserError where it should be there and is not.
        """
        for path in filter(None, (self.denoiser, self.encoder, self.embedding)):
            have(path)  # on another machine than the one that asked
        denoiser = load_denoiser(self.denoiser).to(device)
        check_fit(denoiser.shape, denoiser.classes, self.real)
        encoder = None if self.encoder is None else load_encoder(self.encoder, denoiser.shape).to(device)
        networks = Networks(denoiser=denoiser, encoder=encoder, real=self.real)
        embedding = spec.guidance.embedding if isinstance(spec.guidance, Contrastive) else None
        if (isinstance(embedding, FittedEmbedding) and not fitting) != (self.embedding is not None):
            raise UserError(
                "generate: expected a fitted embedding network (fit_embedding makes it) with guidance.embedding "
                f"FittedEmbedding, and none otherwise; got {self.embedding or 'none'} with {type(embedding).__name__}"
            )
        if embedding is None or encoder is None:
            return networks
        weights = derive(seed, "embedding weights")
        network = embedding.build(_features(encoder, denoiser, device, spec), weights).to(device)
        if self.embedding is None:
            return replace(networks, learner=EmbeddingLearner(network, embedding.learning_rate))
        load_weights(network, load_tensors(self.embedding)[0], str(self.embedding))
        return replace(networks, embedding=network.eval().requires_grad_(False))

    def to_send(self, spec: Generation) -> Sources:
        """The same for workers elsewhere: real images only where guidance draws some, and of them the train part alone.

        Raises UserError, as `open` does, for a denoiser of other images than the real ones.
        """
        header, real = _header(self.denoiser), self.real
        check_fit(tuple(header["shape"]), header["classes"], real)
        if real is None or not (isinstance(spec.guidance, Contrastive) and spec.guidance.pairs.reals(spec.block)):
            return replace(self, real=None)
        none = Split(real.train.images[:0].clone(), real.train.labels[:0].clone())
        return replace(self, real=replace(real, validation=none, test=none))


def check_fit(shape: tuple[int, int, int], classes: int, real: ImageSet | None) -> None:
    """Raises UserError for a denoiser of other images than the real ones."""
    if real is not None and (shape != real.shape or classes not in (0, len(real.class_names))):
        raise UserError(
            f"generate: expected a denoiser of the data's images, {real.shape} in {len(real.class_names)} classes, got "
            f"one of {shape} in {classes or 'no'} classes; name the data it was trained on"
        )


def _features(encoder: torch.nn.Module, denoiser: NetworkDenoiser, device: str, spec: Generation) -> int:
    """The width of the encoder's features for images of this shape."""
    assert isinstance(spec.guidance, Contrastive)
    unembedded = replace(spec, guidance=replace(spec.guidance, embedding=None, pairs=PreviousStep()))
    guidance = unembedded.bind(Networks(denoiser=denoiser, encoder=encoder))
    assert isinstance(guidance, ContrastiveGuidance)
    guidance.check(spec.levels.sigmas(), shape=denoiser.shape, device=device)  # an encoder that does not fit is named
    with torch.no_grad():
        image = torch.zeros(1, *denoiser.shape, device=device)
        return spec.guidance.features.encode(encoder.features, image, 1.0).shape[1]  # type: ignore[arg-type]


@stage(revision=1, card=embedding_card)
def fit_embedding(
    work: Workspace, spec: Generation, real: ImageSet | None, denoiser: Artifact, encoder: Artifact, *, seed: int
) -> None:
    """Writes embedding.safetensors: fitted while warm-up blocks are sampled under its own guidance, then frozen."""
    assert isinstance(spec.guidance, Contrastive)
    assert isinstance(spec.guidance.embedding, FittedEmbedding)
    machine = work.machine
    networks = Sources.of(real, denoiser, encoder).open(spec, machine.device, seed, fitting=True)
    assert networks.learner is not None
    spec.check(networks, machine)
    guidance, denoise = spec.bind(networks, machine), spec.denoise(networks.denoiser, machine)
    total, warm = spec.guidance.embedding.warmup_blocks, derive(seed, "embedding warm-up")
    for block in range(_resume(networks.learner, work.folder), total):
        own = networks.denoiser
        sample_block(spec, denoise, guidance, own.shape, own.classes, block, warm, machine.device)
        _save(networks.learner, work.folder, block + 1)
        work.progress(block + 1, total)
    header = {"kind": "embedding", **carried(work.heritage)}
    save_tensors(work.folder / "embedding.safetensors", networks.learner.network.state_dict(), header)


def _save(learner: EmbeddingLearner, folder: Path, blocks: int) -> None:
    save_tensors(folder / RESUME, learner.save(), {"kind": "learner", "blocks": blocks})


def _header(path: Path) -> dict[str, Any]:
    """What a file of weights says of itself; of weights from elsewhere licence and sets only if they were named."""
    with safe_open(path, framework="pt") as handle:
        return json.loads((handle.metadata() or {}).get("gambeson", "{}"))


def _seen(folder: Path) -> int:
    """Number of blocks that the learner of a broken run has seen."""
    return _header(folder / RESUME)["blocks"] if (folder / RESUME).exists() else 0


def _resume(learner: EmbeddingLearner, folder: Path) -> int:
    """Number of blocks that the learner has seen; takes up its saved state."""
    if not (folder / RESUME).exists():
        return 0
    tensors, header = load_tensors(folder / RESUME)
    learner.load(tensors)
    return header["blocks"]


@stage(revision=2, card=images_card)
def generate(
    work: Workspace,
    spec: Generation,
    real: ImageSet | None,
    denoiser: Artifact,
    encoder: Artifact | None,
    embedding: Artifact | None = None,
    *,
    seed: int,
) -> None:
    """Writes images/, a SyntheticStore; finished blocks are never sampled again."""
    sources = Sources.of(real, denoiser, encoder, embedding)
    inputs = {"denoiser": denoiser, "encoder": encoder, "embedding": embedding}
    origin = _origin(spec, sources, inputs, seed, work.heritage)
    writer = StoreWriter(
        root=work.folder / "images", blocks=spec.blocks, blocks_per_shard=spec.blocks_per_shard, origin=origin
    )
    _check_disk(work, spec, sources)
    if spec.in_order:
        _in_order(work, spec, sources, writer, seed)
    else:
        _in_any_order(work, spec, sources, writer, seed)
    writer.finish(origin)


def _check_disk(work: Workspace, spec: Generation, sources: Sources) -> None:
    """EnvironmentFault, before anything is made, where the disk will not hold the images."""
    shape = _header(sources.denoiser).get("shape")
    if shape is not None and Mirror.of(work.folder) is None:  # an object store has room
        need = store_bytes(spec.count, spec.block, spec.blocks_per_shard, tuple(shape))
        check_room(work.folder / "images", need, f"{spec.count:,} images of {' x '.join(map(str, shape))} numbers")


def _origin(
    spec: Generation, sources: Sources, inputs: dict[str, Artifact | None], seed: int, heritage: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """What the images are made of: recipe part, guidance, digests of the networks, licences and sets they bring."""
    digests = {name: None if made is None else made.digest for name, made in inputs.items()}
    guidance = None if spec.guidance is None else digest(spec.guidance)
    recipe = {"generation": plain(spec), "guidance": guidance, "seed": seed, "order_dependent": spec.in_order}
    files = [path for path in (sources.denoiser, sources.encoder, sources.embedding) if path is not None]
    names = {} if sources.real is None else {"class_names": list(sources.real.class_names)}
    return {**recipe, **digests, **names, **inherited(heritage, *(_header(path) for path in files)), **seen(heritage)}


def _in_order(work: Workspace, spec: Generation, sources: Sources, writer: StoreWriter, seed: int) -> None:
    """One block after another, the embedding learning on: every image depends on all before it (METHOD 1.2)."""
    networks = sources.open(spec, work.machine.device, seed)
    assert networks.learner is not None
    maker = Maker.start(spec, networks, writer, work.machine, seed)
    if any(not writer.has(block) for block in range(_seen(work.folder))):
        (work.folder / RESUME).unlink()  # a loss of power tore a block: the learner has to come past it again
    for block in range(_resume(networks.learner, work.folder), spec.blocks):
        maker.make(block)  # a block whose state was not saved is sampled again for the learner's sake, to the same bits
        _save(networks.learner, work.folder, block + 1)
        work.progress(block + 1, spec.blocks)


def _in_any_order(work: Workspace, spec: Generation, sources: Sources, writer: StoreWriter, seed: int) -> None:
    """Twice at most: blocks that turn out torn when their shard is full, after a loss of power, are made again."""
    given = (spec, sources.to_send(spec) if work.machine.aside else sources, writer, work.machine, seed)
    for _ in range(2):
        missing = writer.missing()
        done = spec.blocks - len(missing)
        pace = Pace("generate", spec.count, done * spec.block, work.machine.unit, work.say)
        with closing(work.machine.fleet.each(open_maker, given, missing, work.say)) as blocks:
            for _ in pace.watch(blocks, lambda block: spec.size(block.item)):
                done += 1
                work.progress(done, spec.blocks)


def open_maker(spec: Generation, sources: Sources, writer: StoreWriter, machine: Machine, seed: int) -> Tool:
    """What makes a block, its networks opened: once in each worker."""
    make_repeatable(machine)
    return Maker.start(spec, sources.open(spec, machine.device, seed), writer, machine, seed).make


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes blocks one at a time and hands them to the store."""

    spec: Generation
    networks: Networks
    guidance: Bound
    writer: StoreWriter
    machine: Machine
    seed: int

    @staticmethod
    def start(spec: Generation, networks: Networks, writer: StoreWriter, machine: Machine, seed: int) -> Maker:
        """Checks first that all fits."""
        spec.check(networks, machine)
        return Maker(
            spec=spec,
            networks=networks,
            guidance=spec.bind(networks, machine),
            writer=writer,
            machine=machine,
            seed=derive(seed, "generation"),
        )

    def sample(self, block: int) -> tuple[Tensor, Tensor | None]:
        """Images [m, C, H, W] in [0, 1] and labels [m] (None without classes) of a block."""
        spec, network = self.spec, self.networks.denoiser
        denoise = spec.denoise(network, self.machine)
        return sample_block(
            spec, denoise, self.guidance, network.shape, network.classes, block, self.seed, self.machine.device
        )

    def make(self, block: int) -> int:
        """Samples a block and stores it, unless it is there; the block."""
        spec, size = self.spec, self.spec.size(block)
        images, labels = self.sample(block)
        labels = torch.full((spec.block,), UNCONDITIONED) if labels is None else labels
        if not self.writer.has(block):
            self.writer.put(block, to_uint8(images[:size]), labels[:size].numpy(), self._facts())
        return block

    def _facts(self) -> dict[str, float]:
        """What the guidance had to clip in this block, where it may."""
        if isinstance(self.guidance, ContrastiveGuidance) and self.guidance.spec.clip is not None:
            return {f"guidance_{name}": value for name, value in self.guidance.tally.items()}
        return {}
