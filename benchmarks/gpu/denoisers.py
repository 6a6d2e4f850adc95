"""Entry 5, small denoisers for everybody: CIFAR-10 and GTSRB at 32x32, at most 6M parameters, 10 minutes of training.

One command for each set. The weights are written as bfloat16 safetensors of at most 12 MB and judged as they are read
back: FID of 10,000 images against train and test by a named encoder (a standard classifier trained in the entry),
nearest train images in pixels and in that encoder, a grid of every class, and a model card. What is handed over is
offered only after somebody has looked at the grid and the copies.

    python benchmarks/gpu/denoisers.py --set cifar10 [--train-seconds 300]
    python benchmarks/gpu/denoisers.py --set gtsrb

A command stops before 540 seconds with its state kept: start it again until it says whole. Quality: not yet measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from entry import NOT_YET, Entry, hand_over, pace, reader_of, run, seconds_of, steps_within
from PIL import Image
from torch import Tensor

from gambeson.data.augment import NonLeaking, PadCrop
from gambeson.data.imageset import ImageSet
from gambeson.data.mixture import to_uint8
from gambeson.disk import atomic
from gambeson.models.classifiers import load_classifier
from gambeson.models.denoiser import denoiser_header, load_denoiser
from gambeson.models.files import save_tensors
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.quality.frechet import FrechetDistance
from gambeson.quality.memorisation import Memorisation
from gambeson.quality.space import FeatureSpace, Penultimate, Pixels, Sample, embed
from gambeson.robustness.losses import Plain
from gambeson.sampling.levels import NoiseLevels
from gambeson.sampling.samplers import Heun
from gambeson.store import Artifact
from gambeson.synthesis.generation import Generation, Networks, sample_block
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, train_classifier
from gambeson.training.diffusion import DenoiserTraining, train_denoiser
from gambeson.training.loop import Optimisation

PARAMETERS, BYTES = 6_000_000, 12_000_000
"""The most that a small download may have."""
TERMS = {
    "cifar10": (
        "CIFAR-10 (Krizhevsky, Nair and Hinton 2009, technical report; no licence stated; derived from 80 Million Tiny "
        "Images, which its authors have withdrawn)"
    ),
    "gtsrb": (
        "GTSRB, the German Traffic Sign Recognition Benchmark (Stallkamp et al. 2011 and 2012, INI Bochum; free for "
        "research with citation), whole frames at 32x32"
    ),
}
"""What the images are, and under which terms they are given out."""
PLANNED = ("plan", "training", "encoder", "weights", "images", "quality")


def denoiser_of(entry: Entry, words: argparse.Namespace) -> DenoiserTraining:
    """A U-Net just below 6M parameters, EDM's loss and its augmentation, which mirrors only where that is safe."""
    fitted = Optimisation(
        steps=1, batch_size=16 if entry.tiny else words.batch, learning_rate=words.rate, momentum=0.0,
        weight_decay=0.0, average=0.999, precision="float32" if entry.tiny else "bfloat16", clip_norm=1.0,
    )  # fmt: skip
    network = UNetSpec(width=8) if entry.tiny else UNetSpec(width=72, multipliers=(1, 2, 2), blocks=2, attention=1)
    return DenoiserTraining(network=network, optimisation=fitted, non_leaking=NonLeaking() if words.augment else None)


def trained(entry: Entry, words: argparse.Namespace, real: ImageSet) -> Artifact:
    """The denoiser, as many steps as the seconds hold, planned once."""
    spec = denoiser_of(entry, words)

    def plan() -> dict[str, Any]:
        found = pace(entry, train_denoiser, spec, real, steps=(2, 4) if entry.tiny else (20, 80))
        return found | {"steps": steps_within(words.train_seconds, found, 6 if entry.tiny else 10**7)}

    steps = entry.row("plan", plan)["steps"]
    spec = replace(spec, optimisation=replace(spec.optimisation, steps=steps))
    made = entry.once(train_denoiser, spec, real, seed=0)
    entry.row("training", lambda: {"seconds": seconds_of(made), "steps": steps, "batch": spec.optimisation.batch_size})
    return made


def encoder(entry: Entry, words: argparse.Namespace, real: ImageSet) -> Artifact:
    """A standard classifier whose features measure the images, and its accuracy on test, which names it."""
    network = ResNetSpec(width=8) if entry.tiny else PreActResNetSpec(depth=18)
    batch, steps = (16, 4) if entry.tiny else (256, words.encoder_steps)
    fitted = Optimisation(steps=steps, batch_size=batch, precision="float32" if entry.tiny else "bfloat16")
    spec = ClassifierTraining(
        network=network, loss=Plain(), optimisation=fitted, augment=PadCrop(padding=real.shape[1] // 8),
        validations=1, threat=ThreatModel(), validation_steps=1,
    )  # fmt: skip
    made = entry.once(train_classifier, spec, real, None, seed=0)
    model = load_classifier(made.file("classifier.safetensors")).to(entry.device)

    def accuracy() -> dict[str, Any]:
        with torch.no_grad():
            parts = zip(real.test.images.split(500), real.test.labels.split(500), strict=True)
            right = sum(int((model(x.to(entry.device)).argmax(1).cpu() == y).sum()) for x, y in parts)
        return {"test_accuracy": round(right / len(real.test), 4), "n": len(real.test), "digest": made.digest}

    entry.row("encoder", accuracy)
    return made


def written(entry: Entry, made: Artifact, path: Path) -> dict[str, Any]:
    """Writes the averaged weights in bfloat16, small enough, and reads them back."""
    whole = load_denoiser(made.file("denoiser.safetensors"))
    tensors = {name: value.to(torch.bfloat16) for name, value in whole.network.state_dict().items()}
    save_tensors(path, tensors, denoiser_header(whole))
    again = load_denoiser(path)
    count, size = sum(p.numel() for p in again.network.parameters()), path.stat().st_size
    noise = torch.randn(8, *whole.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % max(whole.classes, 1)
    apart = (whole(noise, 1.0, labels) - again(noise, 1.0, labels)).norm() / whole(noise, 1.0, labels).norm()
    small = count <= PARAMETERS and size <= BYTES
    return {"parameters": count, "bytes": size, "small_enough": small, "rounding": float(f"{float(apart):.2g}")}


def generated(entry: Entry, words: argparse.Namespace, path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] in [0, 1] and their classes from the written weights, the classes in turn; kept in a file."""
    place = path.with_suffix(".images.pt")
    if place.is_file():
        kept = torch.load(place, weights_only=True)
        return kept["images"].float() / 255, kept["labels"]
    denoiser = load_denoiser(path).to(entry.device)
    block = 20 if entry.tiny else 500
    spec = Generation(
        count=40 if entry.tiny else words.images, block=block, sampler=Heun(),
        levels=NoiseLevels(steps=3 if entry.tiny else 18), guidance=None,
        precision="float32" if entry.tiny else "bfloat16",
    )  # fmt: skip
    spec.check(Networks(denoiser=denoiser), entry.machine)
    denoise = spec.denoise(denoiser, entry.machine)
    parts = [
        sample_block(spec, denoise, None, denoiser.shape, denoiser.classes, number, 0, entry.device)
        for number in range(spec.blocks)
    ]
    images = torch.from_numpy(np.concatenate([to_uint8(x) for x, _ in parts])).permute(0, 3, 1, 2).contiguous()
    labels = torch.cat([y for _, y in parts if y is not None])
    with atomic(place) as temporary:
        torch.save({"images": images, "labels": labels}, temporary)
    return images.float() / 255, labels


def grid(images: Tensor, labels: Tensor, path: Path, each: int = 12) -> None:
    """A PNG with a row for each class."""
    kinds = labels.unique().tolist()
    rows = [images[labels == k][:each] for k in kinds]
    _, channels, high, wide = images.shape
    canvas = np.zeros((len(kinds) * high, each * wide, 3), dtype=np.uint8)
    for place, row in enumerate(rows):
        pixels = np.broadcast_to(to_uint8(row), (len(row), high, wide, max(channels, 3)))
        for column, image in enumerate(pixels):
            canvas[place * high : (place + 1) * high, column * wide : (column + 1) * wide] = image
    with atomic(path) as temporary:
        Image.fromarray(canvas).save(temporary, format="PNG")


def quality(entry: Entry, real: ImageSet, made: Artifact, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """FID and copies; FID of as many train images against test beside it, the least that images can hope for."""
    model = load_classifier(made.file("classifier.safetensors")).to(entry.device)
    name = f"standard classifier of {real.name} trained in this entry"
    found: list[dict[str, Any]] = []
    for space in (Penultimate(model, name, made.digest), Pixels()):
        train, test, ours = (
            samples(entry, space, x, y)
            for x, y in ((real.train.images, real.train.labels), (real.test.images, real.test.labels), (images, labels))
        )
        copies = Memorisation(quantile=0.1 if entry.tiny else 0.01)
        found += [m.plain() for m in copies(train, ours, held_out=test, seed=0)]
        if isinstance(space, Pixels):
            continue
        for title, a, b in (("test", test, ours), ("train", train, ours), ("test (real train images)", test, train)):
            part = b.drawn(len(ours), 0, "denoisers/fid")
            found += [m.plain() | {"against": title} for m in FrechetDistance()(a, part, seed=0)]
    return {"measures": found}


def samples(entry: Entry, space: FeatureSpace, images: Tensor, labels: Tensor) -> Sample:
    """Features; a network's where the network is."""
    return embed(space, images, labels, device=entry.device)


def card(entry: Entry, words: argparse.Namespace, real: ImageSet) -> str:
    """The model card: facts of the rows, nothing else."""
    rows, told = entry.rows, []
    for m in rows.get("quality", {}).get("measures", []):
        name = f"{m['name']}{' against ' + m['against'] if 'against' in m else ''}"
        interval = "" if m["low"] is None else f" ({m['low']:.4g} to {m['high']:.4g})"
        told.append(f"| {name} | {m['value']:.4g}{interval} | {m['real']} / {m['synthetic']} | {m['space']} |")
    facts = {key: rows.get(key, NOT_YET) for key in ("training", "weights", "encoder")}
    lines = [
        f"# Small denoiser of {words.set} (bfloat16, EDM preconditioning)",
        f"Trained on {len(real.train):,} images of {TERMS[words.set]}. Whether generated images may be used as you "
        "wish depends on those terms. It was trained for minutes: its images are for experiments, not for looking at.",
        f"Classes: {', '.join(real.class_names)}.",
        "    from gambeson.models.denoiser import load_denoiser\n    denoiser = load_denoiser(Path('FILE'))",
        "| measure | value (95 % interval) | real / synthetic images | features |\n|---|---|---|---|\n"
        + "\n".join(told),
        f"```json\n{json.dumps(facts, indent=1)}\n```",
        "Copies of train images were looked for, as the table says. Nobody has looked at the grid unless this says so.",
    ]
    return "\n\n".join(lines) + "\n"


def work(entry: Entry, words: argparse.Namespace) -> dict[str, Any]:
    """Denoiser, encoder, images, numbers, card."""
    real = entry.images(words.set)
    made, judge = trained(entry, words, real), encoder(entry, words, real)
    path = entry.out / f"denoiser-{words.set}.safetensors"
    entry.row("weights", lambda: written(entry, made, path))
    if not path.is_file():
        written(entry, made, path)
    images, labels = generated(entry, words, path)
    entry.row("images", lambda: {"count": len(labels), "mean": float(images.mean()), "deviation": float(images.std())})
    grid(images, labels, path.with_suffix(".png"))
    entry.row("quality", lambda: quality(entry, real, judge, images, labels), 0.0 if entry.tiny else 60.0)
    with atomic(path.with_suffix(".md")) as temporary:
        temporary.write_text(card(entry, words, real), encoding="utf-8")
    hand_over(path, path.with_suffix(".png"), path.with_suffix(".md"))
    return {"terms": TERMS[words.set]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The entry; returns its last line."""
    numbers = {
        "train_seconds": 300.0,
        "batch": 512,
        "rate": 1e-3,
        "images": 10_000,
        "encoder_steps": 2000,
        "augment": 1,
    }
    reader = reader_of(__doc__, **numbers)
    reader.add_argument("--set", choices=list(TERMS), required=True)
    words = reader.parse_args(argv)
    return run(f"denoisers_{words.set}", words, work, PLANNED)


if __name__ == "__main__":
    main()
