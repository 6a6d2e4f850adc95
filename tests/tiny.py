"""A whole run small enough for tests, and what its results weigh to the bit."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from gambeson.data.datasets import Digits
from gambeson.recipe import Arm, Recipe
from gambeson.recipes import named
from gambeson.robustness.attacks import APGD, PGD, TargetedAPGD
from gambeson.robustness.evaluate import Evaluation


def tiny_recipe(arms: tuple[Arm, ...] = tuple(Arm), seeds: int = 1) -> Recipe:
    """The digits recipe with small networks and few steps: the same stages in about ten seconds."""
    whole = named("digits")
    loss = replace(whole.student.loss, steps=2)  # type: ignore[type-var]
    network = replace(whole.student.network, width=4)
    fitted = replace(whole.student.optimisation, steps=16, batch_size=32)
    student = replace(whole.student, network=network, loss=loss, optimisation=fitted, validations=2, validation_steps=1)
    teacher = replace(whole.teacher, network=network, optimisation=fitted, validations=1, validation_steps=1)
    unet = replace(whole.denoiser.network, width=8)
    denoiser = replace(whole.denoiser, network=unet, optimisation=replace(whole.denoiser.optimisation, steps=40))
    generation = replace(whole.generation, count=240, block=20, blocks_per_shard=5)
    attack = PGD(steps=3, restarts=1)
    evaluation = Evaluation(
        pgd=attack,
        apgd=APGD(steps=4),
        targeted=TargetedAPGD(steps=3),
        curve=(0.1, 0.3),
        curve_attack=attack,
        curve_images=30,
        check_images=20,
    )
    return replace(
        whole,
        name="tiny",
        data=Digits(train_images=100, validation_images=1500),  # 197 test images
        arms=arms,
        seeds=seeds,
        denoiser=denoiser,
        teacher=teacher,
        student=student,
        generation=generation,
        control=replace(whole.control, count=240, block=20),
        evaluation=evaluation,
    )


RESULTS = ("*.npy", "*.parquet", "classifier.safetensors", "denoiser.safetensors", "checks.json", "selection.json")


def fingerprints(runs: Path) -> dict[str, str]:
    """SHA-256 of every image shard, weight file and table of rows below a runs folder."""
    found = {p for pattern in RESULTS for p in runs.rglob(pattern)}
    return {str(p.relative_to(runs)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found)}


def attempts(runs: Path) -> dict[str, int]:
    """How often each stage was started."""
    records = [json.loads(p.read_text()) for p in (runs / "stages").rglob("done.json")]
    return {f"{r['stage']}/{r['digest'][:16]}": r["attempts"] for r in records}
