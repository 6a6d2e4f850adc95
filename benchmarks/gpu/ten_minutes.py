"""Entry 4, robust CIFAR-10 in 10 minutes: the highest AutoAttack accuracy from scratch within 9 minutes of one card.

Two arms of 540 seconds each. `real`: a classifier on real images for all of it. `both`: a small denoiser, images of it
and a classifier on both, each its share of the same time. What counts is the seconds that the stages record: reading
images, building networks, every step, saving. Not counted: the pace trainings before (kernels are chosen, steps are
planned from them), imports, the attack afterwards. An arm whose record says more than 540 is marked as not within.

    python benchmarks/gpu/ten_minutes.py --arm real
    python benchmarks/gpu/ten_minutes.py --arm both [--denoiser-share 0.3] [--generation-share 0.15]

A command stops before 540 seconds with its state kept: start it again until it says whole (two to three times an arm).
The recipe is a first guess (`fast` preset, PreAct-ResNet-18, batch 512): not yet measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from entry import Entry, assessed, pace, reader_of, run, seconds_of, steps_within

from gambeson.data.augment import PadCrop
from gambeson.data.imageset import ImageSet
from gambeson.data.synthetic import SyntheticStore
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.recipe import fill_threat
from gambeson.recipes.training import training_preset
from gambeson.sampling.levels import NoiseLevels
from gambeson.sampling.samplers import DPMSolverPP
from gambeson.store import Artifact
from gambeson.synthesis.generate import generate
from gambeson.synthesis.generation import Generation
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, train_classifier
from gambeson.training.diffusion import DenoiserTraining, train_denoiser
from gambeson.training.loop import Optimisation

BUDGET = 540.0
"""Seconds of timed training."""
THREAT = ThreatModel(epsilon=8 / 255)


def classifier_of(entry: Entry, words: argparse.Namespace) -> ClassifierTraining:
    """The robust classifier's training but for its number of steps; one look at the validation images, at the end."""
    base = training_preset("fast").classifier
    fitted = replace(base.optimisation, batch_size=words.batch, learning_rate=words.rate)
    spec = replace(
        base, network=PreActResNetSpec(depth=18), optimisation=fitted, fraction=words.fraction, validations=1
    )
    if entry.tiny:
        fitted = replace(fitted, batch_size=16, precision="float32")
        spec = replace(
            spec, network=ResNetSpec(width=8), optimisation=fitted, augment=PadCrop(padding=1), validation_steps=1
        )
    return fill_threat(spec, THREAT)


def denoiser_of(entry: Entry, words: argparse.Namespace) -> DenoiserTraining:
    """A U-Net of 4.7M parameters; weights are averaged over some hundred steps, since there are few."""
    fitted = Optimisation(
        steps=1, batch_size=16 if entry.tiny else words.denoiser_batch, learning_rate=1e-3, momentum=0.0,
        weight_decay=0.0, average=0.998, precision="float32" if entry.tiny else "bfloat16", clip_norm=1.0,
    )  # fmt: skip
    network = UNetSpec(width=8) if entry.tiny else UNetSpec(width=64, multipliers=(1, 2, 2), blocks=2, attention=2)
    return DenoiserTraining(network=network, optimisation=fitted)


def generation_of(entry: Entry, count: int) -> Generation:
    """Plain images by class, 10 network calls each."""
    block = 20 if entry.tiny else 1000
    return Generation(
        count=count, block=block, sampler=DPMSolverPP(), levels=NoiseLevels(steps=4 if entry.tiny else 10),
        guidance=None, precision="float32" if entry.tiny else "bfloat16",
    )  # fmt: skip


def with_steps(spec: Any, steps: int) -> Any:
    """The training with so many steps."""
    return replace(spec, optimisation=replace(spec.optimisation, steps=steps))


def planned_steps(entry: Entry, key: str, stage: Any, spec: Any, real: ImageSet, seconds: float, *given: Any) -> int:
    """How many steps fill the seconds, planned once and kept."""

    def plan() -> dict[str, Any]:
        found = pace(entry, stage, spec, real, *given, steps=(2, 4) if entry.tiny else (20, 80))
        return found | {"steps": steps_within(seconds, found, 6 if entry.tiny else 10**7), "planned_seconds": seconds}

    return entry.row(f"plan/{key}", plan, 0.0 if entry.tiny else 60.0)["steps"]


def diffused(entry: Entry, words: argparse.Namespace, real: ImageSet) -> tuple[list[Artifact], SyntheticStore]:
    """The denoiser and its images, made within their shares."""
    spec = denoiser_of(entry, words)
    steps = planned_steps(entry, "denoiser", train_denoiser, spec, real, BUDGET * words.denoiser_share)
    denoiser = entry.once(train_denoiser, with_steps(spec, steps), real, seed=0)
    count = entry.row("plan/generation", lambda: generation_plan(entry, words, real, denoiser), 0.0)["count"]
    images = entry.once(generate, generation_of(entry, count), real, denoiser, None, seed=0)
    return [denoiser, images], SyntheticStore.open(images.folder / "images")


def generation_plan(entry: Entry, words: argparse.Namespace, real: ImageSet, denoiser: Artifact) -> dict[str, Any]:
    """How many images fill their share: from the second of two short generations of other seeds, thrown away."""
    took, block = [], generation_of(entry, 1).block
    for seed in (101, 102):
        made = entry.once(generate, generation_of(entry, block * 3), real, denoiser, None, seed=seed)
        took.append(made.record["seconds"])
    rate = 3 * block / took[1]
    blocks = 2 if entry.tiny else max(int(0.95 * BUDGET * words.generation_share * rate / block), 1)
    return {"images_per_second": round(rate, 1), "count": blocks * block}


def arm(entry: Entry, words: argparse.Namespace) -> dict[str, Any]:
    """All of an arm but the attack: seconds of its stages, and the student's own record."""
    real = entry.images("cifar10")
    before, source = diffused(entry, words, real) if words.arm == "both" else ([], None)
    left = BUDGET - seconds_of(*before)
    spec = classifier_of(entry, words)
    steps = planned_steps(entry, "classifier", train_classifier, spec, real, left, source)
    student = entry.once(train_classifier, with_steps(spec, steps), real, source, seed=0)
    trained = {made.stage: seconds_of(made) for made in (*before, student)}
    total = round(sum(trained.values()), 1)
    images = 0 if source is None else len(source)
    row = {"seconds": trained, "total_seconds": total, "within": total <= BUDGET, "budget": BUDGET}
    row |= {"steps": steps, "batch": spec.optimisation.batch_size, "synthetic_images": images}
    entry.row("training", lambda: row)
    entry.row("autoattack", lambda: assessed(entry, student, real, THREAT, words.images), 0.0)
    return {"recipe": repr(spec), "arm": words.arm}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The entry; returns its last line."""
    reader = reader_of(
        __doc__, batch=512, rate=0.2, fraction=0.7, denoiser_share=0.3, generation_share=0.15, denoiser_batch=512,
        images=1000,
    )  # fmt: skip
    reader.add_argument("--arm", choices=("real", "both"), required=True)
    words = reader.parse_args(argv)
    plans = ("plan/denoiser", "plan/generation") if words.arm == "both" else ()
    planned = (*plans, "plan/classifier", "training", "autoattack")
    return run(f"ten_minutes_{words.arm}", words, arm, planned)


if __name__ == "__main__":
    main()
