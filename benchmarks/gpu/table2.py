"""Entry 6, CDP's Table 2 on CIFAR-10 at 32x32, its first two columns: no additional data, and 50K synthetic images.

The paper's method with less compute: its guidance (hard negatives, embedding learnt per run, lambda 100k, t >= 400,
200-step DDIM, robust encoder), but a small U-Net, a PreAct-ResNet-18 and as many steps as are asked for. Each of the
three cells is made of the product's own stages, which go on where a command was stopped; AutoAttack standard on 1,000
test images. The paper's numbers stand beside ours: they are of a WRN-28-10 trained for 400 epochs, so only the order of
rows may be compared.

    python benchmarks/gpu/table2.py [--seed 0] [--only real plain guided]      several commands; time not yet measured
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from entry import Entry, assessed, reader_of, run, seconds_of

from gambeson.data.augment import PadCrop
from gambeson.data.datasets import Cifar10, Digits
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.pipeline import check_plan, diffuse, label_images, select_images
from gambeson.recipe import Arm, Recipe
from gambeson.recipes.presets import preset
from gambeson.recipes.training import training_preset
from gambeson.robustness.losses import Plain
from gambeson.sampling.levels import TimestepLevels
from gambeson.store import Artifact
from gambeson.synthesis.generation import Generation
from gambeson.threat import ThreatModel
from gambeson.training.classifier import train_classifier
from gambeson.training.diffusion import DenoiserTraining
from gambeson.training.loop import Optimisation

ARMS = {"real": Arm.REAL, "plain": Arm.PLAIN, "guided": Arm.GUIDED}
PAPER = {
    "real": {"row": "no additional data", "clean": 0.8109, "robust": 0.4954},
    "plain": {"row": "DDIM, 50K", "clean": 0.8465, "robust": 0.5246},
    "guided": {"row": "Contrastive-DP, 50K", "clean": 0.8366, "robust": 0.5391},
}
"""Ouyang et al., Table 2 (lines 189 to 191 of its text), WRN-28-10, the worst of AutoAttack and AA+MT."""


def recipe_of(words: argparse.Namespace, tiny: bool) -> Recipe:
    """One recipe for all cells, so that they share what they share."""
    threat = ThreatModel(epsilon=8 / 255)
    base = training_preset("fast").classifier
    fitted = replace(base.optimisation, steps=words.steps, batch_size=words.batch)
    student = replace(base, network=PreActResNetSpec(depth=18), optimisation=fitted, validations=4)
    unet = UNetSpec(width=64, multipliers=(1, 2, 2), blocks=2, attention=2)
    diffusion = Optimisation(
        steps=words.denoiser_steps, batch_size=512, learning_rate=1e-3, momentum=0.0, weight_decay=0.0, average=0.999,
        precision="bfloat16", clip_norm=1.0,
    )  # fmt: skip
    generation = preset("cdp-cifar10-hnm").apply(Generation(count=words.count, precision="bfloat16"))
    whole = Recipe(
        name="table2",
        data=Cifar10(),
        threat=threat,
        arms=tuple(ARMS[name] for name in words.only),
        denoiser=DenoiserTraining(network=unet, optimisation=diffusion),
        teacher=replace(student, loss=Plain(), validations=1),
        encoder="robust",
        generation=generation,
        student=student,
    )
    return tiny_of(whole) if tiny else whole


def tiny_of(whole: Recipe) -> Recipe:
    """The same with digits, the smallest networks and a few steps."""
    fitted = Optimisation(steps=3, batch_size=16)
    small = {"network": ResNetSpec(width=8), "optimisation": fitted, "augment": PadCrop(padding=1), "validations": 1}
    small["validation_steps"] = 1
    levels = TimestepLevels(kind="quad", steps=6)
    denoiser = replace(whole.denoiser.optimisation, steps=3, batch_size=16, precision="float32")  # type: ignore[union-attr]
    return replace(
        whole,
        data=Digits(train_images=1500, validation_images=200),
        denoiser=DenoiserTraining(network=UNetSpec(width=8), optimisation=denoiser),
        teacher=replace(whole.teacher, **small),
        student=replace(whole.student, **small),
        generation=replace(whole.generation, count=20, block=20, levels=levels, precision="float32"),
    )


def cell(entry: Entry, recipe: Recipe, arm: Arm, words: argparse.Namespace) -> dict[str, Any]:
    """One arm from images to AutoAttack; stages that are made already are found."""
    real, seed, told = recipe.data.load(), words.seed, {}
    chosen: Artifact | None = None
    if arm is not Arm.REAL:
        told["teacher"] = entry.once(train_classifier, recipe.teacher, real, None, seed=seed)
        told |= diffuse(recipe, arm, seed, entry.once)
        told["labelled"] = label_images(recipe, told, entry.once)
        chosen = told["chosen"] = select_images(recipe, told, seed, entry.once)
    told["student"] = entry.once(train_classifier, recipe.student, real, chosen, seed=seed)
    found = assessed(entry, told["student"], real, recipe.threat, words.images)
    stages = {role: seconds_of(made) for role, made in told.items()}
    return found | {"paper": PAPER[arm.value], "stage_seconds": stages}


def work(entry: Entry, words: argparse.Namespace) -> dict[str, Any]:
    """The cells in order."""
    entry.images()  # says where images have to lie
    recipe = recipe_of(words, entry.tiny).with_threat_everywhere()
    check_plan(recipe, recipe.arms)
    for arm in words.only:
        entry.row(arm, lambda a=arm: cell(entry, recipe, ARMS[a], words))
    return {"recipe_digest": recipe.digest}


def gains(entry: Entry) -> dict[str, Any]:
    """Robust accuracy of each cell minus that of real only, ours and the paper's, in points."""
    rows = {arm: entry.rows[arm] for arm in ARMS if arm in entry.rows}
    if "real" not in rows:
        return {}
    base = rows["real"]
    return {
        "robust_gain_points": {
            arm: {
                "ours": round(100 * (row["robust"] - base["robust"]), 2),
                "paper": round(100 * (PAPER[arm]["robust"] - PAPER["real"]["robust"]), 2),  # type: ignore[operator]
            }
            for arm, row in rows.items()
            if arm != "real"
        }
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The entry; returns its last line."""
    reader = reader_of(__doc__, seed=0, steps=6000, batch=512, denoiser_steps=15_000, count=50_000, images=1000)
    reader.add_argument("--only", nargs="*", choices=list(ARMS), default=list(ARMS))
    words = reader.parse_args(argv)
    return run("table2", words, work, words.only, gains)


if __name__ == "__main__":
    main()
