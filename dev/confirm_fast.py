"""`fast` against the standard preset by the product itself, once, on test images (what chose `fast` never saw one).

    python dev/confirm_fast.py FOLDER digits|cifar10-16 [--seeds 3] [--images 1000] [--fast-steps N]

Standard: TRADES-10, label smoothing .1, float32, with the lengths that were its best on held-out train images (digits:
beta 5, 400 steps; cifar10-16: beta 6, 150). `fast`: the preset, with as many steps, or alone with others. Processor
seconds of one thread, one validation at the end included. Worst case of APGD-CE and targeted APGD, 50 steps each, on
the first test images. One JSON line per run; cifar10-16 needs GAMBESON_DATA. Results are in dev/LOG.md.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from gambeson.data.augment import PadCrop
from gambeson.data.datasets import load
from gambeson.data.imageset import ImageSet
from gambeson.models.classifiers import load_classifier
from gambeson.models.resnet import ResNetSpec
from gambeson.recipe import fill_threat
from gambeson.recipes.training import training_preset
from gambeson.robustness.attacks import APGD, TargetedAPGD
from gambeson.robustness.losses import TRADES
from gambeson.robustness.verdicts import robust_after
from gambeson.store import Workspace
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, train_classifier

SETTINGS = {"digits": (0.15, 5.0, 400, 16), "cifar10-16": (8 / 255, 6.0, 150, 32)}


def trainings(name: str, real: ImageSet) -> dict[str, ClassifierTraining]:
    """Both recipes at this set's threat."""
    epsilon, beta, steps, width = SETTINGS[name]
    threat = ThreatModel(epsilon=epsilon)
    fast = training_preset("fast").classifier
    fitted = replace(fast.optimisation, steps=steps)
    fast = replace(
        fast,
        network=ResNetSpec(width=width),
        augment=PadCrop(padding=real.shape[1] // 8),
        optimisation=fitted,
        validations=1,
    )
    usual = TRADES(beta=beta, label_smoothing=0.1)
    standard = replace(fast, loss=usual, optimisation=replace(fitted, precision="float32"))
    both = {"standard": standard, "standard bf16": replace(standard, optimisation=fitted), "fast": fast}
    return {recipe: fill_threat(spec, threat) for recipe, spec in both.items()}


def measure(spec: ClassifierTraining, folder: Path, real: ImageSet, seed: int, images: int) -> dict[str, float]:
    """Trains, then attacks."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    train_classifier.work(Workspace(folder, checkpoint_seconds=1e9), spec, real, None, seed=seed)
    seconds = time.process_time() - start
    model = load_classifier(folder / "classifier.safetensors")
    x, y = real.test.images[:images], real.test.labels[:images]
    with torch.no_grad():
        clean = (torch.cat([model(part) for part in x.split(500)]).argmax(1) == y).float().mean().item()
    robust = robust_after(APGD(threat=spec.threat, steps=50), model, x, y)
    left = robust.nonzero()[:, 0]
    robust[left] = robust_after(TargetedAPGD(threat=spec.threat, steps=50), model, x[left], y[left])
    return {"seconds": seconds, "clean": clean, "worst": robust.float().mean().item(), "images": len(y)}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("folder", type=Path)
    reader.add_argument("data", choices=SETTINGS)
    reader.add_argument("--seeds", type=int, default=3)
    reader.add_argument("--images", type=int, default=1000)
    reader.add_argument("--fast-steps", type=int)
    asked = reader.parse_args()
    torch.set_num_threads(1)
    real = load(asked.data)
    compared = trainings(asked.data, real)
    if asked.fast_steps:
        fast = compared["fast"]
        fitted = replace(fast.optimisation, steps=asked.fast_steps)
        compared = {f"fast, {asked.fast_steps} steps": replace(fast, optimisation=fitted)}
    for seed in range(asked.seeds):
        for name, spec in compared.items():
            found = measure(spec, asked.folder / f"{asked.data}-{name}-{seed}", real, seed, asked.images)
            print(json.dumps({"data": asked.data, "recipe": name, "seed": seed, **found}), flush=True)


if __name__ == "__main__":
    main()
