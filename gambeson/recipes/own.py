"""A whole recipe for images of one's own, from their number, size and classes and from the machine; with its reasons.

Sizes follow from the images and the kind of machine. Steps and numbers of images grow together until the recipe's own
networks, timed on this machine, fill the minutes asked for. Choices that were measured name their place in dev/LOG.md.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gambeson.data.augment import PadCrop
from gambeson.data.datasets import Data, ImageFolder
from gambeson.data.imageset import ImageSet
from gambeson.data.parquet import ParquetImages
from gambeson.errors import require
from gambeson.models.denoiser import EDM
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.recipe import Arm, Recipe
from gambeson.recipes.costs import Rates, Sizes, Timing, makespan, measure, stage_seconds
from gambeson.recipes.presets import cdp_fast
from gambeson.recipes.survey import Survey
from gambeson.recipes.training import fast
from gambeson.robustness.attacks import APGD, PGD, TargetedAPGD
from gambeson.robustness.evaluate import Evaluation
from gambeson.robustness.losses import Plain
from gambeson.sampling.levels import NoiseLevels
from gambeson.synthesis.gaussian import GaussianControl
from gambeson.synthesis.generation import Generation
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, Networks
from gambeson.training.diffusion import DenoiserTraining
from gambeson.training.loop import Optimisation

MINUTES = 30.0
"""How long a run may take where nothing is said."""
BUSY = 4
"""Processes that a run of four arms keeps busy: the denoiser and its arms wait for each other."""
LARGER = 120
"""Minutes times busy cores from which a CPU works at 32 pixels instead of 16: a step costs four times as much."""
THOROUGH = 40
"""Minutes times busy cores from which students are 32 wide (at 12 to 23 pixels) and attacks and samplers take their
full number of steps."""
BATCH = 128
"""Images of a training step."""
PASSES = {"denoiser": 250, "student": 100}
"""Passes over the real images, at most. On 300 digits 256 passes of the denoiser gave no copies and 425 gave 1 %; more
passes of the student changed nothing (dev/LOG.md)."""
STEPS = {"denoiser": (300, 500, 20_000), "student": (200, 400, 6_000)}
"""Steps: the fewest of all, the most for the smallest sets, the most of all."""
RATIO = (4, 20)
"""Synthetic images for each real one, where time allows."""
BLOCK = 256
"""About how many images are sampled, and contrasted, at once."""
SHARE = 0.3
"""Of a student's batch, how much is synthetic on a CPU: beside the 70 % of the preset, which is for large sets of good
images, it gave +0.5 points on digits, +0.7 on CIFAR-10 and +2.8 on traffic signs at 16x16 (dev/LOG.md, 2026-11-22)."""
MOST_CLASSES = 256
"""Classes up to which a block of guided images can hold two of each."""
SCALES = tuple(0.8**k for k in range(28))
"""How much of the full recipe is tried, the whole first."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The facts of a machine that a recipe depends on."""

    cores: int = 1  # processes of one thread side by side; on an accelerator 1
    memory: int = 8 * 2**30  # bytes of it
    device: str = "cpu"  # torch's name of the device
    minutes: float = 30.0  # how long the run may take

    def __post_init__(self) -> None:
        require(self.minutes > 0, "--minutes", "a number above 0", self.minutes)
        require(self.cores >= 1 and self.memory > 0, "hardware", "at least 1 core and some memory", self)

    @staticmethod
    def here(device: str, workers: int, minutes: float | None) -> Hardware:
        """Those of this machine, of which the run may use so many processes."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Hardware(cores=workers, memory=memory, device=device, minutes=MINUTES if minutes is None else minutes)

    @property
    def accelerator(self) -> bool:
        """Whether networks run elsewhere than on the CPU."""
        return self.device != "cpu"

    @property
    def work(self) -> float:
        """Minutes times the cores that a run can keep busy."""
        return self.minutes * min(self.cores, BUSY)

    @property
    def thorough(self) -> bool:
        """Whether there is time for the full number of steps of attacks and samplers."""
        return self.accelerator or self.work >= THOROUGH

    def largest_side(self, middle: int) -> int:
        """The largest image side for pictures of this median shorter side."""
        if self.accelerator:
            return 64 if self.minutes >= 60 and middle >= 64 else 32
        return 32 if self.work >= LARGER else 16


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A recipe and why it is as it is, a line for each choice."""

    recipe: Recipe
    reasons: list[str]


def derive(
    data: Data,
    real: ImageSet,
    threat: ThreatModel,
    hardware: Hardware,
    *,
    arms: tuple[Arm, ...] | None = None,
    seeds: int | None = None,
    found: Survey | None = None,
    timing: Timing = measure,
) -> Derived:
    """The recipe for these images, which the door `data` has loaded.

    arms: what is compared; None: the four arms, or those of them that make sense. seeds: None: as many as there is time
    for once more steps would bring little, 5 at most. found: what lies where the images come from, for the reasons.
    Raises UserError for a threat that training does not withstand (l1).
    """
    require(threat.norm in ("linf", "l2"), "--threat", "linf or l2, which training withstands", str(threat))
    sizes = Sizes.of(real)
    chosen, why_not = sensible_arms(sizes, hardware) if arms is None else (arms, [])
    recipe = Recipe(
        name=folder_name(real.name),
        data=data,
        threat=threat,
        arms=chosen,
        seeds=seeds or 1,
        denoiser=DenoiserTraining(network=unet(real.shape, hardware), preconditioning=EDM(sigma_data=spread(real))),
        evaluation=evaluation(threat, hardware.thorough),
    )
    recipe = with_classifiers(recipe, classifier(real.shape, hardware), max(min(real.shape[1:]) // 8, 1), hardware)
    recipe, rates, arithmetic = _faster(recipe, real, hardware, timing)
    recipe = fill(recipe, sizes, rates, hardware)
    if seeds is None:
        recipe = with_seeds(recipe, sizes, rates, hardware)
    about = [_about_images(real, sizes), _about_reading(recipe, real, hardware, found), _about_threat(recipe)]
    about += [_about_networks(recipe, real, sizes), why_not, [arithmetic], _about_end(recipe, hardware)]
    return Derived(recipe=recipe, reasons=[line for lines in about for line in lines])


def folder_name(name: str) -> str:
    """A name that a run may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "own"


def spread(real: ImageSet) -> float:
    """The standard deviation of the pixels in [-1, 1], which EDM's preconditioning is told."""
    return max(round(float((real.train.images * 2 - 1).std()), 2), 0.05)


def unet(shape: tuple[int, int, int], hardware: Hardware) -> UNetSpec:
    """A U-Net down to 4 pixels where sides can be halved as often, four resolutions at most."""
    shorter = min(shape[1:])
    halvings = next(k for k in range(64) if shape[1] % 2 ** (k + 1) or shape[2] % 2 ** (k + 1))
    levels = 1 + min(halvings, max(int(math.log2(max(shorter, 4) / 4)), 0), 3)
    lowest = shape[1] * shape[2] // 4 ** (levels - 1)
    size = {"width": 96, "blocks": 2} if hardware.accelerator else {"width": 32, "blocks": 1}
    return UNetSpec(multipliers=(1, *[2] * (levels - 1)), attention=int(lowest <= 1024), **size)


def classifier(shape: tuple[int, int, int], hardware: Hardware) -> Networks:
    """A small network on a CPU, PreActResNet-18 on an accelerator (from 8 pixels on)."""
    shorter = min(shape[1:])
    if hardware.accelerator and shorter >= 8:
        return PreActResNetSpec(depth=18, mean=(0.5,), std=(0.25,))
    if shorter >= 24:
        return ResNetSpec(width=16, multipliers=(1, 2, 4, 8))
    return ResNetSpec(width=32 if hardware.thorough and shorter >= 12 else 16)


def with_classifiers(recipe: Recipe, network: Networks, crop: int, hardware: Hardware) -> Recipe:
    """The recipe with a student that is trained as the preset `fast` does, and a teacher of its kind."""
    preset = fast().classifier
    student = replace(preset, network=network, augment=PadCrop(padding=crop, flip=True), validations=5)
    student = replace(student, validation_steps=10, fraction=student.fraction if hardware.accelerator else SHARE)
    teacher = replace(student, loss=Plain(label_smoothing=0.0))
    return replace(recipe, student=student, teacher=teacher)


def evaluation(threat: ThreatModel, thorough: bool) -> Evaluation:
    """The attacks. With 25 steps of AutoPGD the verdicts on four students were those of 100 (dev/LOG.md)."""
    curve = tuple(e for k in range(1, 7) if (e := round(threat.epsilon * k / 3, 6)) <= 1)
    if thorough:
        apgd, targeted = APGD(steps=50), TargetedAPGD(steps=50, targets=9)
        return Evaluation(pgd=PGD(steps=40, restarts=2), apgd=apgd, targeted=targeted, curve=curve)
    return Evaluation(
        pgd=PGD(steps=20, restarts=1),
        apgd=APGD(steps=25),
        targeted=TargetedAPGD(steps=25, targets=9),
        curve=curve,
        curve_attack=PGD(steps=10, restarts=1),
        curve_images=200,
        check_images=100,
    )


def sensible_arms(sizes: Sizes, hardware: Hardware) -> tuple[tuple[Arm, ...], list[str]]:
    """The arms that these images allow, and why others are left out."""
    needed, left_out = 4 * sizes.classes * sizes.numbers**2 * 8, {}
    if needed > hardware.memory // 4:
        left_out[Arm.GAUSSIAN] = (
            f"no Gaussian control: the covariances of {sizes.classes} classes in {sizes.numbers:,} numbers would take "
            f"{needed / 2**30:.0f} of {hardware.memory / 2**30:.0f} GB"
        )
    if sizes.classes > MOST_CLASSES:
        left_out[Arm.GUIDED] = f"no Contrastive-DP: a block cannot hold two images of each of {sizes.classes} classes"
    return tuple(arm for arm in Arm if arm not in left_out), list(left_out.values())


def _faster(recipe: Recipe, real: ImageSet, hardware: Hardware, timing: Timing) -> tuple[Recipe, Rates, str]:
    """The recipe in the arithmetic that is faster here for the student's and the denoiser's steps, and why."""
    both = {p: in_precision(recipe, p) for p in ("float32", "bfloat16")}
    rates = {p: timing(each, real, hardware.device) for p, each in both.items()}
    full, half = (rates[p].student_step + rates[p].denoiser_step for p in both)
    best = "bfloat16" if half < full else "float32"
    why = f"{best}: bfloat16 takes {half / full:.2f} times as long as float32 for a step of each network here"
    return both[best], rates[best], why


def in_precision(recipe: Recipe, precision: str) -> Recipe:
    """The recipe with this arithmetic in training and generation; attacks and evaluation stay in float32."""

    def lower(training: ClassifierTraining) -> ClassifierTraining:
        return replace(training, optimisation=replace(training.optimisation, precision=precision))

    assert isinstance(recipe.denoiser, DenoiserTraining)
    fitted = replace(recipe.denoiser.optimisation, precision=precision)
    return replace(
        recipe,
        denoiser=replace(recipe.denoiser, optimisation=fitted),
        student=lower(recipe.student),
        teacher=lower(recipe.teacher),
        generation=replace(recipe.generation, precision=precision),  # type: ignore[arg-type]
    )


def fill(recipe: Recipe, sizes: Sizes, rates: Rates, hardware: Hardware) -> Recipe:
    """The recipe with the most steps and images that the minutes allow; the least there is, where they allow none."""
    for scale in SCALES:
        filled = with_amounts(recipe, sizes, scale, hardware)
        if makespan(filled, stage_seconds(filled, sizes, rates), hardware.cores) <= 60 * hardware.minutes:
            return filled
    return with_amounts(recipe, sizes, 0.0, hardware)


def with_seeds(recipe: Recipe, sizes: Sizes, rates: Rates, hardware: Hardware) -> Recipe:
    """The recipe with as many seeds as fit into the minutes beside all the steps that are useful, 5 at most."""
    if recipe != with_amounts(recipe, sizes, 1.0, hardware):
        return recipe
    stages, longest = stage_seconds(recipe, sizes, rates), 60 * hardware.minutes
    several = [replace(recipe, seeds=seeds) for seeds in range(2, 6)]
    return next((r for r in reversed(several) if makespan(r, stages, hardware.cores) <= longest), recipe)


def with_amounts(recipe: Recipe, sizes: Sizes, scale: float, hardware: Hardware) -> Recipe:
    """The recipe at a share of the full amounts: images go with the share, steps with its root."""
    trained = {kind: steps_of(kind, sizes.train, scale) for kind in PASSES}
    seen = recipe.student.fraction * BATCH * trained["student"]  # more images than that would never be looked at
    wanted = min(sizes.train * max(RATIO[0], RATIO[1] * scale), seen)
    block = sizes.classes * max(round(min(BLOCK, wanted / 2) / sizes.classes), 2)
    count = block * max(math.ceil(wanted / block), 1)
    generation = replace(
        Generation(guidance=None, precision=recipe.generation.precision),
        **cdp_fast().generation | {"block": block, "levels": NoiseLevels(steps=18 if hardware.thorough else 12)},
        count=count,
    )
    held = max(2**28 // (sizes.numbers**2 * 8), 1)  # images of the control whose factors fill 256 MB
    assert isinstance(recipe.denoiser, DenoiserTraining)
    return replace(
        recipe,
        denoiser=replace(recipe.denoiser, optimisation=_fitted(recipe.denoiser.optimisation, trained["denoiser"])),
        student=replace(recipe.student, optimisation=_fitted(recipe.student.optimisation, trained["student"])),
        teacher=replace(recipe.teacher, optimisation=_fitted(recipe.teacher.optimisation, trained["student"])),
        generation=generation,
        control=GaussianControl(count=count, block=min(held, 100)),
    )


def steps_of(kind: str, images: int, scale: float) -> int:
    """Steps at a share of the full amounts, in fifties."""
    fewest, small, most = STEPS[kind]
    full = min(max(PASSES[kind] * images / BATCH, small), most)
    return 50 * round(max(full * math.sqrt(scale), fewest) / 50)


def _fitted(optimisation: Optimisation, steps: int) -> Optimisation:
    return replace(optimisation, steps=steps, batch_size=BATCH)


def _about_images(real: ImageSet, sizes: Sizes) -> Iterator[str]:
    total = sizes.train + sizes.validation + sizes.test
    counts = real.train.labels.bincount(minlength=sizes.classes)
    channels, height, width = real.shape
    each = f"{int(counts.min())}" + (f" to {int(counts.max())}" if counts.min() < counts.max() else "")
    yield (
        f"{total:,} images of {width}x{height} pixels and {channels} channel{'s' * (channels > 1)} in {sizes.classes} "
        f"classes: {sizes.train:,} to train on ({each} of a class), {sizes.validation:,} to watch training, "
        f"{sizes.test:,} to test"
    )
    known = 98 / math.sqrt(sizes.test)
    yield f"{sizes.test:,} test images: an accuracy of 50 % is known to about {known:.1f} points either way"


def _about_reading(recipe: Recipe, real: ImageSet, hardware: Hardware, found: Survey | None) -> Iterator[str]:
    """How pictures became images, and what may not be done to them."""
    data, shorter = recipe.data, min(real.shape[1:])
    if isinstance(data, ImageFolder | ParquetImages):
        rule = "the middle cut out" if data.resize == "crop" else "both sides squashed to it"
        yield f"pictures are scaled to {data.size} pixels, {rule} (--data.size, --data.resize crop or squash)"
    if found is not None and found.sides:
        least, most, bound = found.sides[0], found.sides[-1], hardware.largest_side(found.middle)
        why = "" if hardware.accelerator else f": {hardware.work:g} minutes times cores, 32 pixels from {LARGER} on"
        sides = f"{least} pixels" if least == most else f"{least} to {most} pixels, half of them below {found.middle}"
        yield f"their shorter sides are {sides}; at most {bound} here{why}"
    if found is not None and not found.has_test:
        yield (
            "test images are drawn at random: where several pictures show one object, sort them into train/ and test/ "
            "yourself, or the numbers flatter"
        )
    if real.flip_safe:
        yield "training images are mirrored, since that was said to keep their class"
    else:
        yield "no image is mirrored: that may change its class (--data.flip_safe true where it does not)"
    assert isinstance(recipe.student.augment, PadCrop)
    yield f"training images are shifted by up to {recipe.student.augment.padding} of {shorter} pixels"


def _about_threat(recipe: Recipe) -> Iterator[str]:
    yield f"threat {recipe.threat}: an attacker may change {_attacker(recipe.threat)}"


def _attacker(threat: ThreatModel) -> str:
    if threat.norm == "linf":
        return f"every pixel by {255 * threat.epsilon:.3g} of 255"
    return f"an image by a distance of {threat.epsilon:.3g} in all, pixels from 0 to 1"


def _about_networks(recipe: Recipe, real: ImageSet, sizes: Sizes) -> Iterator[str]:
    assert isinstance(recipe.denoiser, DenoiserTraining)
    fitted, network, generation = recipe.denoiser.optimisation, recipe.denoiser.network, recipe.generation
    sides = " to ".join(str(min(real.shape[1:]) // 2**k) for k in sorted({0, len(network.multipliers) - 1}))
    passes, most = fitted.steps * BATCH / sizes.train, PASSES["denoiser"]
    why = (
        f"at most {most}: then it begins to copy them, dev/LOG.md"
        if passes <= most + 10
        else "it needs as many steps to learn"
    )
    yield (
        f"diffusion model: a U-Net of width {network.width} at {sides} pixels, {fitted.steps:,} steps of {BATCH}: "
        f"{passes:.0f} passes over the real images ({why})"
    )
    yield (
        f"{generation.count:,} synthetic images, {generation.count / sizes.train:.1f} for each real one, in blocks of "
        f"{generation.block} ({generation.block // sizes.classes} of each class), {generation.levels.steps} Heun steps"
    )
    if Arm.GUIDED in recipe.arms:
        yield "guidance: cdp-fast, of the contrastive ones tried the one of lowest Frechet distance (dev/LOG.md)"
    steps = recipe.student.optimisation.steps
    network = recipe.student.network
    assert isinstance(network, ResNetSpec | PreActResNetSpec)
    yield (
        f"students: {type(network).__name__.removesuffix('Spec')} of width {network.width}, {steps:,} steps of {BATCH} "
        f"as the preset fast trains (half of the standard's time or less, dev/LOG.md), "
        f"{steps * BATCH / sizes.train:.0f} passes; {100 * recipe.student.fraction:.0f} % of a batch synthetic in the "
        "arms that have such images"
    )


def _about_end(recipe: Recipe, hardware: Hardware) -> Iterator[str]:
    e, seeds = recipe.evaluation, recipe.seeds
    yield f"{seeds} seed{'s' * (seeds > 1)}: " + (
        "so the intervals cover training as well as test images"
        if seeds > 1
        else "the intervals cover the choice of test images, not training (--seeds 3 and more do)"
    )
    yield (
        f"attacks: PGD of {e.pgd.steps} steps, AutoPGD of {e.apgd.steps}, towards up to {e.targeted.targets} other "
        f"classes too" + ("" if hardware.thorough else f"; more from {THOROUGH} minutes times cores on")
    )
