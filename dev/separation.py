"""How far guidance drives classes apart, at what cost: presets and variants on one model of real images.

    python dev/separation.py train FOLDER [NAME ...]          denoiser, robust, standard, judge, noise-conditioned
    python dev/separation.py measure FOLDER VARIANT [...]     one JSON line each; --count N, --block N, --seed N

CIFAR-10 from ../shared at 16x16 (train --side 32 --steps N --device cuda: 32x32 with a 36M denoiser), the train images,
5,000 of them held out, never a test image. `judge` is a standard classifier of another seed that no guidance sees.
Every variant starts from the noise of its plain twin. In the judge's penultimate features: between-class over
within-class scatter (trace ratio), nearest-centroid accuracy (each half of the images by the other's centroids), the
Frechet distance to held-out real images; the judge's agreement with the condition; RMS distance to the plain twin.
FOLDER keeps models, plain images and held-out features.
Results are in dev/LOG.md.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gambeson.canonical import digest
from gambeson.data.augment import PadCrop
from gambeson.data.datasets import ImageSet, Split
from gambeson.machine import Machine
from gambeson.models.classifiers import load_classifier, load_encoder
from gambeson.models.denoiser import load_denoiser
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.quality.frechet import frechet
from gambeson.quality.separation import centroid_hits, scatter
from gambeson.recipes.presets import PRESETS, preset
from gambeson.robustness.losses import TRADES, Plain
from gambeson.sampling import (
    Contrastive,
    DenoisedFeatures,
    HardNegative,
    Heun,
    NoiseConditionedFeatures,  # noqa: F401  (for variants as words)
    NoiseLevels,
    NoisyFeatures,  # noqa: F401
    OtherClasses,
    SupervisedContrastive,
    TowardsClass,  # noqa: F401
    Window,
)
from gambeson.sampling.embedding import EmbeddingLearner
from gambeson.store import Workspace
from gambeson.synthesis.generation import Generation, Networks, sample_block
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, train_classifier
from gambeson.training.diffusion import DenoiserTraining, train_denoiser
from gambeson.training.loop import Optimisation
from gambeson.training.noise_conditioned import NoiseConditionedSpec, NoisyEncoderTraining, train_noise_conditioned

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = {"denoiser": "denoiser", "noise-conditioned": "noise_conditioned"}


def cifar(side: int) -> ImageSet:
    """CIFAR-10 at 16x16 or 32x32; `validation` is the held-out part of train, and stands in for `test` too."""
    sys.path.insert(0, str(SHARED))
    from read_packed import load

    raw = load("cifar10_train")
    images = F.avg_pool2d(torch.from_numpy(raw["images"]).permute(0, 3, 1, 2).float() / 255, 32 // side)
    labels, g = torch.from_numpy(raw["labels"]), torch.Generator().manual_seed(0)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(10):
        own = (labels == k).nonzero()[:, 0]
        held[own[torch.randperm(len(own), generator=g)[:500]]] = True
    train, rest = Split(images[~held], labels[~held]), Split(images[held], labels[held])
    names = tuple(str(n) for n in raw["class_names"])
    return ImageSet(name=f"cifar{side}", train=train, validation=rest, test=rest, class_names=names, flip_safe=True)


def train(folder: Path, name: str, real: ImageSet, steps: int, device: str) -> None:
    """One of the models, into FOLDER/NAME.safetensors; resumes. At 32x32 the denoiser is the 36M one."""
    machine = Machine(device=device)
    work = Workspace(folder / name, lambda done, total: print(f"\r{name} {done}/{total}", end="", flush=True), machine)
    work.folder.mkdir(parents=True, exist_ok=True)
    fitted = Optimisation(steps=1500, learning_rate=0.2, precision="bfloat16")
    spec = ClassifierTraining(
        network=ResNetSpec(width=32, blocks=2),
        loss=Plain(label_smoothing=0.0),
        optimisation=fitted,
        augment=PadCrop(padding=2),
        validations=1,
        threat=ThreatModel(epsilon=8 / 255),
    )
    adam = replace(fitted, steps=steps, learning_rate=8e-4, momentum=0.0, weight_decay=0.0, average=0.999)
    if name == "denoiser":
        small = UNetSpec(width=48, multipliers=(1, 2, 3), blocks=2)
        unet = small if real.shape[1] == 16 else UNetSpec.cifar10()
        train_denoiser.work(work, DenoiserTraining(network=unet, optimisation=adam), real, seed=5)
    elif name == "noise-conditioned":
        noisy = NoisyEncoderTraining(
            network=NoiseConditionedSpec(width=48, multipliers=(1, 2, 3)),
            optimisation=replace(adam, steps=1200, average=0.995),
        )
        train_noise_conditioned.work(work, noisy, real, seed=6)
    else:
        robust = replace(spec, loss=TRADES(beta=5.0, steps=3, step_size=8 / 255 / 3, threat=spec.threat))
        seed = {"judge": 1, "standard": 2, "robust": 3}[name]
        train_classifier.work(work, robust if name == "robust" else spec, real, None, seed=seed)
    (made,) = [p for p in work.folder.glob("*.safetensors") if p.name != "state.safetensors"]
    made.rename(folder / f"{name}.safetensors")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A generation, and the encoder that its guidance looks through."""

    generation: dict[str, Any]
    encoder: str = "robust"


def fast(encoder: str = "robust", **fields: Any) -> Variant:
    """18-step Heun under some contrastive guidance."""
    return Variant(generation={**HEUN, "guidance": Contrastive(**fields)}, encoder=encoder)


HEUN = {"sampler": Heun(), "levels": NoiseLevels(steps=18)}
HNM = HardNegative(temperature=10.0, tau_plus=0.1, beta=1.0)
OTHERS = {"loss": HardNegative(temperature=0.5, tau_plus=0.0), "pairs": OtherClasses(), "features": DenoisedFeatures()}
SUPCON = {"loss": SupervisedContrastive(temperature=0.5), "pairs": OtherClasses(), "features": DenoisedFeatures()}
FOUR = Window(sigma_min=0.5, sigma_max=4.0)  # 4 of the 18 steps
HIGHER, LOWER = Window(sigma_min=1.5, sigma_max=9.0), Window(sigma_min=0.2, sigma_max=2.5)  # 4 each
VARIANTS: dict[str, Variant] = {
    name: Variant(generation={k: v for k, v in preset(name).generation.items() if k != "block"}) for name in PRESETS
}


def variant(word: str) -> Variant:
    """A preset by name, or a Python expression over the names of this file: fast(**OTHERS, window=FOUR, strength=1)."""
    return VARIANTS[word] if word in VARIANTS else eval(word)


def judge_side(folder: Path) -> int:
    """Side of the images that the models were trained on."""
    return load_denoiser(folder / "denoiser.safetensors").shape[1]


def held_out(folder: Path) -> torch.Tensor:
    """The judge's features of the held-out real images, kept in FOLDER."""
    path = folder / "held_out.pt"
    if not path.exists():
        judge = load_classifier(folder / "judge.safetensors")
        with torch.no_grad():
            torch.save(
                torch.cat([judge.features(x) for x in cifar(judge_side(folder)).validation.images.split(500)]), path
            )
    return torch.load(path)


def images_of(spec: Generation, networks: Networks, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All blocks of a generation, [N, C, H, W] and labels [N]."""
    machine = Machine(device=str(next(networks.denoiser.parameters()).device))
    spec.check(networks, machine)
    guidance, denoise, own = spec.bind(networks, machine), spec.denoise(networks.denoiser), networks.denoiser
    device = machine.device
    made = [sample_block(spec, denoise, guidance, own.shape, own.classes, b, seed, device) for b in range(spec.blocks)]
    return torch.cat([m[0] for m in made])[: spec.count], torch.cat([m[1] for m in made])[: spec.count]


def _plain(folder: Path, spec: Generation, networks: Networks, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain twin's images, kept in FOLDER/plain."""
    path = folder / "plain" / f"{digest(spec, seed)[:16]}.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        torch.save(images_of(spec, networks, seed), path)
    return torch.load(path)


def measure(folder: Path, word: str, count: int, block: int, seed: int, device: str) -> dict[str, Any]:
    """The numbers of a variant beside those of its plain twin."""
    chosen, judge = variant(word), load_classifier(folder / "judge.safetensors")
    encoder = load_encoder(folder / f"{chosen.encoder}.safetensors").to(device)
    spec = replace(Generation(guidance=None), **{**chosen.generation, "count": count, "block": block})
    networks = Networks(denoiser=load_denoiser(folder / "denoiser.safetensors").to(device), encoder=encoder)
    if spec.in_order:
        embedding = spec.guidance.embedding  # type: ignore[union-attr]
        learner = EmbeddingLearner(embedding.build(128, seed).to(device), embedding.learning_rate)
        networks = replace(networks, learner=learner)
    result: dict[str, Any] = {"variant": word, "count": count, "block": block, "seed": seed}
    kept = {}
    for name, one in (("plain", replace(spec, guidance=None)), ("guided", spec)):
        start = time.perf_counter()
        if one.guidance is None:
            images, labels = _plain(folder, one, networks, seed)
        else:
            images, labels = images_of(one, networks, seed)
        result[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
        with torch.no_grad():
            z, agreed = judge.features(images), (judge(images).argmax(1) == labels).float().mean().item()
        apart, half = scatter(z, labels), torch.arange(len(z)) // 10 % 2
        accuracy = centroid_hits(z, labels, half).float().mean().item()
        kept[name] = images
        result[name] = {"ratio": apart.ratio, "centroid": accuracy, "agreement": agreed, "within": apart.within}
        result[name]["frechet_to_held_out"] = frechet(z, held_out(folder))
        if one.guidance is None and spec.guidance is None:
            break
    if spec.guidance is not None:
        result["guided_steps"] = spec.guidance.guided_steps(spec.levels.sigmas())
        result["rms_change"] = (kept["guided"] - kept["plain"]).square().mean().sqrt().item()
        result["gain"] = result["guided"]["ratio"] / result["plain"]["ratio"] - 1
    return result


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("task", choices=("train", "measure"))
    reader.add_argument("folder", type=Path)
    reader.add_argument("names", nargs="*")
    reader.add_argument("--count", type=int, default=1000)
    reader.add_argument("--block", type=int, default=500)
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--device", default="cpu")
    reader.add_argument("--side", type=int, default=16, choices=(16, 32))
    reader.add_argument("--steps", type=int, default=3300, help="of the denoiser's training")
    asked = reader.parse_intermixed_args()
    torch.set_num_threads(1)
    if asked.task == "train":
        real = cifar(asked.side)
        for name in asked.names or ("judge", "standard", "denoiser", "robust", "noise-conditioned"):
            train(asked.folder, name, real, asked.steps, asked.device)
        return
    for name in asked.names:
        print(json.dumps(measure(asked.folder, name, asked.count, asked.block, asked.seed, asked.device)), flush=True)


if __name__ == "__main__":
    main()
