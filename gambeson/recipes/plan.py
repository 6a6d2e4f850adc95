"""What a run would do and cost, before it does anything: its plan in words, and a forecast of hours and money.

Where this machine's CPU could do it within a day its networks are timed (costs.measure). Otherwise their operations are
counted, without weights, and divided by what a card is assumed to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gambeson.data.imageset import ImageSet
from gambeson.models.resnet import ResNetSpec
from gambeson.randomness import generator
from gambeson.recipe import Arm, Recipe
from gambeson.recipes.costs import (
    Rates,
    Shares,
    Sizes,
    Stages,
    Timing,
    guided_calls,
    makespan,
    network_calls,
    span,
    stage_seconds,
)
from gambeson.synthesis import room
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.diffusion import DenoiserTraining


@dataclass(frozen=True, kw_only=True)
class Card:
    """What an accelerator is assumed to do; its price is an assumption as well (--price)."""

    name: str = "H200-class card"
    bfloat16: float = 989e12  # operations a second at its best, dense (data sheet)
    float32: float = 67e12  # the same in float32 (data sheet)
    reached: float = 0.2  # share of these that our loops reach: assumed, not yet measured (benchmarks/gpu/QUEUE.md)
    dollars: float = 4.0  # an hour

    def seconds(self, operations: float, precision: str) -> float:
        """How long so many operations take."""
        return operations / (self.reached * (self.float32 if precision == "float32" else self.bfloat16))


CORE = Card(name="core", bfloat16=5e11, float32=2.25e11, reached=1.0, dollars=0.0)
"""A core of the machine of dev/LOG.md (convolutions at 225 GFLOP/s), to tell what a CPU can do at all."""
DAY = 86_400.0
KNOWN = {
    "cifar10-16": Shares(right=0.45, standing=0.25),  # 39 to 46 clean, 17 to 20 robust (dev/LOG.md, `fast`)
    "gtsrb-16": Shares(right=0.8, standing=0.5),  # 81 and 53 with 12 classes (dev/LOG.md), 78 and 46 in CDP's Table 3
    "cifar10": Shares(right=0.85, standing=0.55),  # CDP's Table 2
    "cifar10-l2": Shares(right=0.9, standing=0.75),  # METHOD 3
    "gtsrb": Shares(right=0.85, standing=0.55),  # CDP's Table 3
    "cifar10-full": Shares(right=0.86, standing=0.6),
    "gtsrb-full": Shares(right=0.87, standing=0.6),
}
"""Recipe -> the shares that its forecast expects, from what was measured or published."""


@dataclass(frozen=True)
class Counted:
    """A network without weights: how large it is, and the operations of one image."""

    parameters: int
    forward: float  # operations of a forward pass, a multiplication and an addition being two

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.2f}M parameters, {self.forward / 1e9:.3g} GFLOP an image"


def counted_denoiser(spec: DenoiserTraining, real: ImageSet) -> Counted:
    """The diffusion model of these images."""
    with torch.device("meta"):
        network = spec.build(real.shape, len(real.class_names), 0).network
        told = torch.zeros(2, dtype=torch.long) if spec.conditional else None
        return _counted(network, lambda: network(torch.zeros(2, *real.shape), torch.zeros(2), told))


def counted_classifier(spec: ClassifierTraining, real: ImageSet) -> Counted:
    """A classifier of these images."""
    with torch.device("meta"):
        network = spec.network.build(real.shape[0], len(real.class_names), 0).eval()
        return _counted(network, lambda: network(torch.zeros(2, *real.shape)))


def _counted(network: nn.Module, of_two: Callable[[], Tensor]) -> Counted:
    return Counted(sum(p.numel() for p in network.parameters()), _operations(of_two) / 2)


class _Operations(TorchDispatchMode):
    """Counts what convolutions and matrix products do inside, by torch's own formulas, gradients included.

    torch's FlopCounterMode also tracks modules, which does not go with autograd.grad for an image.
    """

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, formula = func(*args, **(kwargs or {})), flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _operations(work: Callable[[], object]) -> float:
    with _Operations() as counted:
        work()
    return float(counted.total)


def equivalents(spec: ClassifierTraining, real: ImageSet) -> float:
    """Forward passes that an image's share of a training step is worth, half-way: TRADES-10 27, plain training 3.

    Counted on a small network, through which corners of two images are taken. The threat must be filled in.
    """
    model = ResNetSpec(width=16, blocks=2).build(real.shape[0], len(real.class_names), 0)
    images, labels, loss = real.train.images[:2, :, :8, :8], real.train.labels[:2], spec.loss.at(0.5)

    def step() -> None:
        loss(model.train(), images, labels, generator(0, "counting")).mean().backward()

    return _operations(step) / _operations(lambda: model.eval()(images))


def counted_rates(recipe: Recipe, real: ImageSet, card: Card) -> Rates:
    """Seconds for one image by counted operations; a backward pass is two forward ones, one to the image alone one."""
    recipe = recipe.with_threat_everywhere()
    assert isinstance(recipe.denoiser, DenoiserTraining)
    denoiser, generated = counted_denoiser(recipe.denoiser, real).forward, recipe.generation.precision
    student, teacher = (counted_classifier(spec, real).forward for spec in (recipe.student, recipe.teacher))
    return Rates(
        denoiser_step=card.seconds(3 * denoiser, recipe.denoiser.optimisation.precision),
        denoised=card.seconds(denoiser, generated),
        student_step=_step(recipe.student, student, real, card),
        teacher_step=_step(recipe.teacher, teacher, real, card),
        gradient=card.seconds(2 * student, "float32"),
    )


def _step(spec: ClassifierTraining, forward: float, real: ImageSet, card: Card) -> float:
    return card.seconds(equivalents(spec, real) * forward, spec.optimisation.precision)


def plan(recipe: Recipe, real: ImageSet) -> list[str]:
    """What would be made of these images, a line for each stage."""
    sizes, arms = Sizes.of(real), ", ".join(arm.value for arm in recipe.arms)
    lines = [
        f"{recipe.name} (digest {recipe.digest[:10]}): arms {arms}; {recipe.seeds} seed{'s' * (recipe.seeds > 1)}; "
        f"threat {recipe.threat}",
        f"images {real.name}: {sizes.train:,} to train on, {sizes.validation:,} for validation, {sizes.test:,} to "
        f"test; {sizes.classes} classes; {real.shape[2]}x{real.shape[1]} pixels, {real.shape[0]} channels",
    ]
    if {Arm.PLAIN, Arm.GUIDED} & set(recipe.arms):
        lines += [_about_denoiser(recipe, real, sizes), _about_generation(recipe)]
    named = {"teacher": recipe.teacher, "student": recipe.student}
    lines += [f"{name}: {_about_training(spec, real, sizes)}" for name, spec in named.items()]
    return [*lines, _about_attacks(recipe)]


def _about_denoiser(recipe: Recipe, real: ImageSet, sizes: Sizes) -> str:
    spec = recipe.denoiser
    if not isinstance(spec, DenoiserTraining):
        return "diffusion model: from elsewhere; its shapes are checked when it is read"
    fitted = spec.optimisation
    passes = fitted.steps * fitted.batch_size / sizes.train
    how_often = "for each seed" if spec.seed is None else "for all seeds"
    return (
        f"diffusion model: {counted_denoiser(spec, real)}; {fitted.steps:,} steps of {fitted.batch_size}, "
        f"{passes:,.0f} passes, {fitted.precision}; trained once {how_often}"
    )


def _about_generation(recipe: Recipe) -> str:
    g = recipe.generation
    guided = f"; guided: {guided_calls(g)} gradients besides" if Arm.GUIDED in recipe.arms else ""
    kept = (
        f"{recipe.selection.per_class} of each class" if recipe.selection.per_class else f"{recipe.selection.keep:.0%}"
    )
    return (
        f"synthetic images: {g.count:,} an arm in blocks of {g.block}, {network_calls(g)} network calls each "
        f"({type(g.sampler).__name__}){guided}; {kept} kept by {type(recipe.selection.score).__name__}"
    )


def _about_training(spec: ClassifierTraining, real: ImageSet, sizes: Sizes) -> str:
    fitted = spec.optimisation
    passes = fitted.steps * fitted.batch_size / sizes.train
    return (
        f"{type(spec.network).__name__}, {counted_classifier(spec, real)}; {type(spec.loss).__name__}, "
        f"{fitted.steps:,} steps of {fitted.batch_size}, {passes:,.0f} times as many images as are real, "
        f"{fitted.precision}; {spec.validations} validations, the {spec.keep} kept"
    )


def _about_attacks(recipe: Recipe) -> str:
    e, besides = recipe.evaluation, recipe.assessment
    more = "" if besides is None else f"; AutoAttack ({besides.autoattack.version}) besides"
    return f"attacks: PGD-{e.pgd.steps}, AutoPGD-{e.apgd.steps}, targeted AutoPGD-{e.targeted.steps}{more}"


def cost(
    recipe: Recipe, real: ImageSet, timing: Timing, workers: int, device: str = "cpu", price: float | None = None
) -> list[str]:
    """How long it takes and, at a price of dollars an hour, what it costs; a line for each part.

    timing: costs.measure or what remembers it. On a CPU that would need more than a day nothing is timed: a Card's
    forecast is given, with what it assumes.
    """
    if not isinstance(recipe.denoiser, DenoiserTraining):
        return ["how long it takes is not estimated with a diffusion model from elsewhere"]
    sizes, shares = Sizes.of(real), KNOWN.get(recipe.name, Shares())
    slow = stage_seconds(recipe, sizes, counted_rates(recipe, real, CORE), shares)
    card = Card() if price is None else Card(dollars=price)
    if device == "cpu" and makespan(recipe, slow, workers) > DAY:
        stages, workers = stage_seconds(recipe, sizes, counted_rates(recipe, real, card), shares), 1
        where = (
            f"on one {card.name}, at an assumed {card.reached:.0%} of its peak (not yet measured; with --device cuda "
            "there its networks are timed); this machine's CPU would need days"
        )
    else:
        stages, where = stage_seconds(recipe, sizes, timing(recipe, real, device), shares), _here(workers, device)
    seconds, paid = makespan(recipe, stages, workers), price is not None or "assumed" in where
    money = f", {card.dollars * seconds / 3600:,.2f} dollars at {card.dollars:g} an hour" if paid else ""
    return [f"about {span(seconds)}{money}: {where}", *_parts(recipe, stages), *_left_out(recipe)]


def _here(workers: int, device: str) -> str:
    if device != "cpu":
        return f"by a short timing of these networks on {device}"
    side = f"in {workers} processes side by side on free cores" if workers > 1 else "in one process"
    return f"{side}, by a short timing of these networks on this machine"


def _parts(recipe: Recipe, stages: Stages) -> list[str]:
    """What is made once a seed, and each arm from its images to its rows."""
    made = {Arm.REAL: 0.0, Arm.GAUSSIAN: stages["control"], Arm.PLAIN: stages["plain"], Arm.GUIDED: stages["guided"]}
    lines = []
    if {Arm.PLAIN, Arm.GUIDED} & set(recipe.arms):
        shared = isinstance(recipe.denoiser, DenoiserTraining) and recipe.denoiser.seed is not None
        lines.append(f"once{'' if shared else ' a seed'}: diffusion model {span(stages['denoiser'])}")
    if set(recipe.arms) - {Arm.REAL}:
        lines.append(f"once a seed: teacher {span(stages['teacher'])}")
    for arm in recipe.arms:
        parts = {"images": made[arm], "student": stages["student"], "attacks": stages["rows"]}
        told = ", ".join(f"{name} {span(seconds)}" for name, seconds in parts.items() if seconds)
        lines.append(f"arm {arm.title}: {span(sum(parts.values()))} ({told})")
    return lines


def _left_out(recipe: Recipe) -> list[str]:
    """What the forecast does not cover."""
    return [] if recipe.assessment is None else ["AutoAttack comes on top of that; its time is not estimated"]


def disk(recipe: Recipe, real: ImageSet, runs: Path) -> str:
    """How many bytes the synthetic images of all arms and seeds take, and how many are free below `runs`."""
    g, control = recipe.generation, recipe.control
    sizes = {
        Arm.PLAIN: room.store_bytes(g.count, g.block, g.blocks_per_shard, real.shape),
        Arm.GUIDED: room.store_bytes(g.count, g.block, g.blocks_per_shard, real.shape),
        Arm.GAUSSIAN: room.store_bytes(control.count, control.block, control.blocks_per_shard, real.shape),
    }
    need = recipe.seeds * sum(sizes.get(arm, 0) for arm in recipe.arms)
    free = shutil.disk_usage(room.existing(runs)).free
    short = "" if need < free else ": that is not enough"
    return f"disk: {room.told(need)} for synthetic images, {room.told(free)} free{short}"
