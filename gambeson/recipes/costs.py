"""What a recipe costs on this machine: its own networks, timed for a moment, times how often they are called.

Nothing here is remembered from another machine but SIDE_BY_SIDE and START; the rest is counted or measured.
"""

from __future__ import annotations

import heapq
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gambeson import canonical
from gambeson.data.imageset import ImageSet
from gambeson.disk import read_json, write_json
from gambeson.randomness import generator
from gambeson.recipe import Arm, Recipe
from gambeson.robustness.attack_losses import frozen
from gambeson.robustness.evaluate import Evaluation
from gambeson.sampling.samplers import Heun
from gambeson.synthesis.generation import Generation
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.diffusion import DenoiserTraining

PROBE = 64
"""Images that a network is timed on."""
WARM_UP, LONG_ENOUGH = 2, 0.4
"""Calls that are not counted, and seconds after which a network has been timed for long enough."""
SIDE_BY_SIDE = 1.15
"""How much longer two jobs take beside each other: others' load added 5 to 20 % (dev/LOG.md, `fast`)."""
START = 4.0
"""Seconds until a worker process has imported torch, and again for the report."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How many of the test images attacks have to do with; where nothing is known, a guess."""

    right: float = 0.8  # are attacked at all
    standing: float = 0.4  # stand when targeted attacks begin


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds for one image, on one thread or on the accelerator."""

    denoiser_step: float  # in one step of the diffusion model's training
    denoised: float  # in one call of the diffusion model, generating
    student_step: float  # in one step of the student's training, its inner attack included
    teacher_step: float  # in one step of the teacher's training
    gradient: float  # in one gradient of an attack, float32


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much there is of the real images."""

    train: int
    validation: int
    test: int
    classes: int
    numbers: int  # pixels times channels of an image

    @staticmethod
    def of(real: ImageSet) -> Sizes:
        """Those of an image set."""
        parts = (len(part.labels) for part in (real.train, real.validation, real.test))
        train, validation, test = parts
        return Sizes(
            train=train,
            validation=validation,
            test=test,
            classes=len(real.class_names),
            numbers=real.train.images[0].numel(),
        )


def measure(recipe: Recipe, real: ImageSet, device: str = "cpu") -> Rates:
    """Times the recipe's own networks for a few seconds, on one thread as its jobs have; no global draw is made."""
    recipe = recipe.with_threat_everywhere()
    assert isinstance(recipe.denoiser, DenoiserTraining)
    places = torch.arange(PROBE) % len(real.train)
    images, labels = real.train.images[places].to(device), real.train.labels[places].to(device)
    work = {
        "denoiser_step": _denoiser_step(recipe.denoiser, images, labels, len(real.class_names)),
        "denoised": _denoised(recipe, images, labels, len(real.class_names)),
        "student_step": _classifier_step(recipe.student, images, labels, len(real.class_names)),
        "teacher_step": _classifier_step(recipe.teacher, images, labels, len(real.class_names)),
        "gradient": _gradient(recipe.student, images, labels, len(real.class_names)),
    }
    with _one_thread():
        return Rates(**{name: _timed(once, device) / PROBE for name, once in work.items()})


Timing = Callable[[Recipe, ImageSet, str], Rates]
"""(recipe, real images, device) -> the rates of the recipe's networks."""


def remembered(path: Path, timing: Timing = measure) -> Timing:
    """The timing, each machine's first one of the same networks written to a JSON file and read from there after.

    So the same command derives the same recipe again, and goes on where it was stopped.
    """

    def looked_up(recipe: Recipe, real: ImageSet, device: str = "cpu") -> Rates:
        key = canonical.digest(_timed_parts(recipe, real, device))
        known: dict[str, Any] = read_json(path) if path.exists() else {}
        if key not in known:
            known[key] = asdict(timing(recipe, real, device))
            write_json(path, known)
        return Rates(**known[key])

    return looked_up


def _timed_parts(recipe: Recipe, real: ImageSet, device: str) -> dict[str, Any]:
    """All that a timing depends on: the machine, and of the recipe what is called, not how often."""
    assert isinstance(recipe.denoiser, DenoiserTraining)
    trained = {"denoiser": recipe.denoiser, "student": recipe.student, "teacher": recipe.teacher}
    parts = {k: [canonical.plain(v.network), v.optimisation.precision] for k, v in trained.items()}
    losses = [canonical.plain(loss) for loss in (recipe.student.loss, recipe.teacher.loss)]
    generation = [recipe.generation.precision, recipe.generation.classifier_free, recipe.denoiser.conditional]
    images = [list(real.shape), len(real.class_names), device, torch.__version__, _processor(device)]
    return {"networks": parts, "losses": losses, "generation": generation, "images": images}


def _processor(device: str) -> str:
    """What computes, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _timed(once: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of three calls or more, after two that warm up.

    On a CPU processor time, which others' load lengthens little: what is remembered should hold tomorrow too.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    taken: list[float] = []
    while len(taken) < WARM_UP + 3 or (sum(taken[WARM_UP:]) < LONG_ENOUGH and len(taken) < 40):
        began = clock()
        once()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(clock() - began)
    return min(taken[WARM_UP:])


def _denoiser_step(spec: DenoiserTraining, images: Tensor, labels: Tensor, classes: int) -> Callable[[], object]:
    denoiser = spec.build(_shape(images), classes, 0).to(images.device)
    told, lower = labels if spec.conditional else None, spec.optimisation.precision == "bfloat16"

    def once() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=lower):
            losses = denoiser.loss(images * 2 - 1, told, generator(0, "timing"))
        losses.mean().backward()

    return once


def _denoised(recipe: Recipe, images: Tensor, labels: Tensor, classes: int) -> Callable[[], object]:
    assert isinstance(recipe.denoiser, DenoiserTraining)
    denoiser = recipe.denoiser.build(_shape(images), classes, 0).to(images.device).eval()
    call, told = recipe.generation.denoise(denoiser), labels if recipe.denoiser.conditional else None

    @torch.no_grad()
    def once() -> Tensor:
        return call(images.double(), 1.0, told)

    return once


def _classifier_step(spec: ClassifierTraining, images: Tensor, labels: Tensor, classes: int) -> Callable[[], object]:
    model = spec.network.build(images.shape[1], classes, 0).to(images.device)
    model = model.to(memory_format=spec.layout).train()  # type: ignore[call-overload]
    loss, lower = spec.loss.at(0.5), spec.optimisation.precision == "bfloat16"
    images = images.contiguous(memory_format=spec.layout)

    def once() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=lower):
            losses = loss(model, images, labels, generator(0, "timing"))
        losses.mean().backward()

    return once


def _gradient(spec: ClassifierTraining, images: Tensor, labels: Tensor, classes: int) -> Callable[[], object]:
    model = spec.network.build(images.shape[1], classes, 0).to(images.device).eval()

    def once() -> object:
        with frozen(model):
            variable = images.clone().requires_grad_(True)
            return torch.autograd.grad(model(variable).logsumexp(1).sum(), variable)

    return once


def _shape(images: Tensor) -> tuple[int, int, int]:
    return tuple(images.shape[1:])  # type: ignore[return-value]


Stages = dict[str, float]
"""Stage -> seconds: denoiser, teacher, student, rows, control, plain, guided; a student and its rows of each arm."""


def stage_seconds(recipe: Recipe, sizes: Sizes, rates: Rates, shares: Shares = Shares()) -> Stages:
    """Seconds of each stage that the recipe's arms need, once."""
    generation, denoiser = recipe.generation, recipe.denoiser
    steps = denoiser.optimisation if isinstance(denoiser, DenoiserTraining) else None
    plain = generation.count * network_calls(generation) * rates.denoised
    return {
        "denoiser": 0.0 if steps is None else steps.steps * steps.batch_size * rates.denoiser_step,
        "teacher": _training(recipe.teacher, sizes, rates.teacher_step, rates),
        "student": _training(recipe.student, sizes, rates.student_step, rates),
        "rows": gradients(recipe.evaluation, sizes, shares) * rates.gradient,
        "control": _control(recipe.control.count, sizes),
        "plain": plain,
        "guided": plain + generation.count * guided_calls(generation) * rates.gradient,
    }


def network_calls(generation: Generation) -> int:
    """How often an image goes through the diffusion model."""
    steps = len(generation.levels.sigmas()) - 1
    once = 2 * steps - 1 if isinstance(generation.sampler, Heun) else steps
    return once * (1 if generation.classifier_free in (None, 1.0) else 2)


def guided_calls(generation: Generation) -> int:
    """How many of these are guided: a gradient through the encoder each."""
    if generation.guidance is None:
        return 0
    guided = int(generation.guidance.guided_steps(generation.levels.sigmas()))
    return 2 * guided if isinstance(generation.sampler, Heun) else guided


def _training(spec: ClassifierTraining, sizes: Sizes, step: float, rates: Rates) -> float:
    trained = spec.optimisation.steps * spec.optimisation.batch_size * step
    return trained + spec.validations * sizes.validation * (spec.validation_steps + 2) * rates.gradient


def gradients(evaluation: Evaluation, sizes: Sizes, shares: Shares = Shares()) -> float:
    """Gradients of an evaluation, all test images together."""
    e, curve = evaluation, min(evaluation.curve_images, sizes.test)
    targets = min(sizes.classes - 1, e.targeted.targets or sizes.classes)
    whole = shares.right * (e.pgd.steps * e.pgd.restarts + e.apgd.steps * e.apgd.restarts)
    left = shares.standing * e.targeted.steps * targets
    drawn = len(e.curve) * e.curve_attack.steps * e.curve_attack.restarts * shares.right * curve
    return sizes.test * (whole + left) + drawn + 100 * min(e.check_images, curve)


def _control(count: int, sizes: Sizes) -> float:
    """A factor of each class's covariance (15 Gflop/s in float64), and for each image one copied and read (1.3 GB/s).

    A guess but for the last: 7,308 images of 768 numbers took about 30 s of processor time.
    """
    return sizes.classes * sizes.numbers**3 / 1.5e10 + count * sizes.numbers**2 * 8 / 1.3e9


Job = list[tuple[str, str]]
"""Stages of a job in order, as (name of the result, kind): results of one name are made once."""


def jobs(recipe: Recipe) -> list[Job]:
    """The jobs that run.jobs_of makes, as the stages that pipeline.tell goes through."""
    found: list[Job] = []
    for seed in range(recipe.seeds):
        told = [_stages(recipe, arm) for arm in recipe.arms]
        if {Arm.PLAIN, Arm.GUIDED} & set(recipe.arms):
            told.insert(0, [("denoiser", "denoiser")])
        found += [[(_named(recipe, name, kind, seed), kind) for name, kind in job] for job in told]
    return found


def _named(recipe: Recipe, name: str, kind: str, seed: int) -> str:
    """The result's name, without the seed where all seeds share it."""
    denoiser = recipe.denoiser
    shared = kind == "denoiser" and isinstance(denoiser, DenoiserTraining) and denoiser.seed is not None
    return name if shared else f"{name}, seed {seed}"


def _stages(recipe: Recipe, arm: Arm) -> Job:
    own = [(f"student {arm.value}", "student"), (f"rows {arm.value}", "rows")]
    if arm is Arm.REAL:
        return own
    if arm is Arm.GAUSSIAN:
        return [("teacher", "teacher"), ("control", "control"), *own]
    networks = [("teacher", "teacher"), ("denoiser", "denoiser")]
    if arm is Arm.GUIDED and recipe.encoder == "robust":
        networks.append((f"student {Arm.REAL.value}", "student"))
    return [*networks, ("guided", "guided") if arm is Arm.GUIDED else ("plain", "plain"), *own]


def makespan(recipe: Recipe, stages: Stages, workers: int) -> float:
    """Seconds from start to report with so many processes, each taking the next job when it is free.

    A stage that another process makes is waited for, as store.Store.once does.
    """
    waiting, made = jobs(recipe), dict[str, float]()
    slower = SIDE_BY_SIDE if workers > 1 else 1.0
    free: list[tuple[float, int, Job]] = [(START, worker, []) for worker in range(workers)]
    end = START
    while free:
        now, worker, left = heapq.heappop(free)
        end = max(end, now)
        left = left or (waiting.pop(0) if waiting else [])
        if left:
            (name, kind), *rest = left
            made.setdefault(name, now + slower * stages[kind])
            heapq.heappush(free, (max(now, made[name]), worker, rest))
    return end + START


KINDS = {
    "denoiser": "diffusion model",
    "teacher": "teacher",
    "student": "students",
    "rows": "attacks",
    "control": "Gaussian images",
    "plain": "plain images",
    "guided": "guided images",
}
"""Kinds of stages in words."""


def forecast(recipe: Recipe, real: ImageSet, rates: Rates, workers: int, minutes: float) -> list[str]:
    """How long the run will take, in words: the whole, its parts, and what the time asked for means."""
    stages = stage_seconds(recipe, Sizes.of(real), rates)
    whole, parts = makespan(recipe, stages, workers), work(recipe, stages)
    named = ", ".join(f"{KINDS[kind]} {span(t)}" for kind, t in sorted(parts.items(), key=lambda p: -p[1]) if t >= 1)
    side = f"{workers} processes beside each other on free cores" if workers > 1 else "one process"
    lines = [f"about {span(whole)} in {side}, from a short timing of these networks on this machine; work: {named}"]
    if whole > 66 * minutes:
        lines.append(
            f"that is more than the {minutes:g} minutes asked for: with fewer steps nothing would be learned; smaller "
            "images, fewer arms (--arms real plain) or fewer test images are faster"
        )
    elif whole < 40 * minutes:
        lines.append(f"{minutes:g} minutes would allow more: --seeds repeats everything for intervals that say more")
    if recipe.assessment is not None:
        lines.append("AutoAttack comes on top of that; its time is not estimated")
    return lines


def span(seconds: float) -> str:
    """'45 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def work(recipe: Recipe, stages: Stages) -> Stages:
    """Processor seconds of each kind of stage, over all arms and seeds."""
    kinds = {name: kind for job in jobs(recipe) for name, kind in job}
    found: Stages = {}
    for kind in kinds.values():
        found[kind] = found.get(kind, 0.0) + stages[kind]
    return found
