"""Which recipe reaches the robust accuracy of standard adversarial training in the least processor time?

    python dev/fast.py FOLDER QUEUE             trains every line of QUEUE in turn; waits for more until `stop`
    python dev/fast.py FOLDER --attack KEY ...  APGD-CE and targeted APGD on the kept weights of these runs
    python dev/fast.py FOLDER --table           means over seeds of all configurations

A line of QUEUE holds fields of `Plan` that differ from the standard preset (TRADES-10, beta 5, label smoothing .1, SGD
Nesterov .2, warm-up 2.5 % then cosine, weight decay 5e-4, average .995, crop): `seeds=0,1,2 inner=2 steps=300`.
FOLDER/runs.jsonl gets a line per run: plan, curve (seconds, clean and robust accuracy), seconds. Seconds are processor
time of one thread in training alone. Lines that are there already are skipped, so the command resumes.
`digits`: 300 images of train + validation, the other 150 held out (`fold` 0 to 2), linf .15; never a test image.
`cifar`: 1,000 class-balanced CIFAR-10 train images averaged to 16x16, 5,000 other train images held out, linf 8/255.
Results are in dev/LOG.md.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.data.datasets import Digits, Split
from gambeson.data.mixture import Mixture
from gambeson.models.resnet import ResNetSpec
from gambeson.randomness import derive, generator
from gambeson.robustness.attack_losses import Margin, frozen
from gambeson.robustness.attacks import APGD, PGD, TargetedAPGD
from gambeson.robustness.terms import kl_divergence
from gambeson.robustness.verdicts import robust_after
from gambeson.threat import ThreatModel
from gambeson.training.loop import Optimisation

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RADIUS = {"digits": 0.15, "cifar": 8 / 255}
PADDING = {"digits": 1, "cifar": 2}
NETWORK = {"digits": ResNetSpec(width=16), "cifar": ResNetSpec(width=32)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training; the defaults are the standard preset."""

    data: str = "cifar"  # digits or cifar
    fold: int = 0  # of digits: which third is held out
    seed: int = 0  # of weights, batches and attacks
    objective: str = "trades"  # trades, or pgd (cross-entropy on attacked images)
    beta: float = 5.0  # weight of the robust term of TRADES
    beta_first: float = -1.0  # at the start, rising linearly over the first half; below 0: beta
    smoothing: float = 0.1  # label smoothing
    steps: int = 600  # gradient steps
    batch: int = 128  # images per step
    rate: float = 0.2  # peak learning rate
    floor: float = 0.0  # the rate falls to this share of its peak
    decay: float = 5e-4  # weight decay
    average: float = 0.995  # of the weights, warmed up
    window: float = 0.0  # share at the end in which weights are averaged evenly instead; 0: the moving average
    inner: int = 10  # attack steps
    inner_first: int = 0  # at the start, rising linearly; 0: inner
    inner_until: float = 0.5  # share of the training in which they rise
    eps_first: float = 1.0  # share of the radius at the start, rising by half a cosine
    eps_until: float = 0.5  # share of the training in which it rises
    reach: float = 2.5  # attack steps * step size / radius
    cap: float = 1.25  # largest step size in radii
    start: str = "uniform"  # of the attack: uniform, clean (trades: a small normal one), kept (of the last epoch: ATTA)
    aim: str = "clean"  # what the attack of TRADES moves away from: the clean prediction, or the label (one pass less)
    replays: int = 1  # updates on a batch, each attacking on from the last one's images
    mode: str = "eval"  # of the network during the attack: eval or train
    precision: str = "bf16"  # bf16 (autocast, channels last) or f32 (as the package was: NCHW)
    points: int = 4  # how often it is measured (changes nothing)

    @property
    def key(self) -> str:
        """What is not standard, in words."""
        mine = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"{name}={value}" for name, value in mine.items() if name != "points") or "standard"

    @property
    def optimisation(self) -> Optimisation:
        """The schedule and optimiser."""
        return Optimisation(steps=self.steps, batch_size=self.batch, learning_rate=self.rate, weight_decay=self.decay)

    def learning_rate(self, step: int) -> float:
        """As the package, but down to `floor`."""
        rate = self.optimisation.rate(step)
        warm = step + 1 <= 0.025 * self.steps
        return rate if warm else self.rate * self.floor + (1 - self.floor) * rate

    def attack(self, step: int) -> tuple[int, float, float]:
        """Attack steps, radius and step size (pixels) of a step."""
        at, first = step / self.steps, self.inner_first or self.inner
        count = round(first + (self.inner - first) * min(at / self.inner_until, 1))
        grown = 0.5 - 0.5 * math.cos(math.pi * min(at / self.eps_until, 1))
        radius = RADIUS[self.data] * (self.eps_first + (1 - self.eps_first) * grown)
        return count, radius, radius * min(self.reach / max(count, 1), self.cap)

    def beta_at(self, step: int) -> float:
        """The weight of the robust term."""
        first = self.beta if self.beta_first < 0 else self.beta_first
        return first + (self.beta - first) * min(2 * step / self.steps, 1)


@lru_cache
def digits(fold: int) -> tuple[Split, Split]:
    """300 and 150 images of train + validation, as dev/tune_digits.py."""
    whole = Digits().load()
    images = torch.cat([whole.train.images, whole.validation.images])
    labels = torch.cat([whole.train.labels, whole.validation.labels])
    order = torch.cat([(labels == k).nonzero()[:, 0] for k in range(10)])
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[fold::3]] = True
    return Split(images[~held], labels[~held]), Split(images[held], labels[held])


@lru_cache
def cifar() -> tuple[Split, Split]:
    """1,000 and 5,000 CIFAR-10 train images, class-balanced, 16x16."""
    sys.path.insert(0, str(SHARED))
    from read_packed import load

    raw = load("cifar10_train")
    images = F.avg_pool2d(torch.from_numpy(raw["images"]).permute(0, 3, 1, 2).float() / 255, 2)
    labels, g = torch.from_numpy(raw["labels"]), torch.Generator().manual_seed(0)
    own = [(labels == k).nonzero()[:, 0] for k in range(10)]
    own = [places[torch.randperm(len(places), generator=g)] for places in own]
    train, held = (torch.stack([p[a:b] for p in own], 1).flatten() for a, b in ((0, 100), (100, 600)))
    return Split(images[train], labels[train]), Split(images[held], labels[held])


def parts(plan: Plan) -> tuple[Split, Split]:
    """Training and held-out images."""
    return digits(plan.fold) if plan.data == "digits" else cifar()


class Batches:
    """Cropped and mirrored batches, and what was last added to each image (on the padded canvas, not mirrored)."""

    def __init__(self, plan: Plan, train: Split) -> None:
        self.plan, self.pad, self.train = plan, PADDING[plan.data], train
        self.mixture = Mixture(train, None, 0.0, plan.batch, derive(plan.seed, "batches"))
        self.canvas = F.pad(train.images, [self.pad] * 4)
        noise = torch.rand(self.canvas.shape, generator=generator(plan.seed, "canvas")) * 2 - 1
        self.kept = noise * RADIUS[plan.data] * plan.eps_first

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a step."""
        g, (c, h, w) = generator(self.plan.seed, "augment", step), self.train.images.shape[1:]
        rows = self.mixture.real_indices(step)
        top, left = torch.randint(0, 2 * self.pad + 1, (2, len(rows)), generator=g)
        mirrored = (torch.rand(len(rows), generator=g) < 0.5) & (self.plan.data == "cifar")
        across = torch.where(mirrored[:, None], torch.arange(w - 1, -1, -1), torch.arange(w))
        self.place = (
            rows[:, None, None, None],
            torch.arange(c)[None, :, None, None],
            (top[:, None] + torch.arange(h))[:, None, :, None],
            (left[:, None] + across)[:, None, None, :],
        )
        return self.canvas[self.place], self.train.labels[rows]


def climb(plan: Plan, step: int, model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The inner attack on the KL (TRADES) or the cross-entropy (PGD), from `start`."""
    count, radius, size = plan.attack(step)
    ball = ThreatModel(epsilon=radius)
    adversarial = ball.project(start, x)
    with frozen(model):
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] if plan.mode == "train" else []
        for m in norms:
            m.training, m.momentum = True, 0.0
        if plan.objective == "trades" and plan.aim == "clean":
            with torch.no_grad():
                aim = model(x).float().softmax(1)
        else:
            aim = F.one_hot(y, 10).float()
        for _ in range(count):
            with torch.enable_grad():
                at = adversarial.detach().requires_grad_()
                z = model(at)
                (slope,) = torch.autograd.grad(z, at, (z.detach().float().softmax(1) - aim).to(z.dtype))
            adversarial = ball.project(adversarial + size * slope.float().sign(), x)
        for m in norms:
            m.momentum = 0.1
    return adversarial


def begin(plan: Plan, step: int, batches: Batches, x: Tensor, previous: Tensor | None) -> Tensor:
    """Where the attack starts."""
    g = generator(plan.seed, "start", step)
    radius = plan.attack(step)[1]
    if previous is not None:
        return previous
    if plan.start == "kept":
        return x + batches.kept[batches.place].clamp(-radius, radius)
    if plan.start == "clean":
        return x + 0.001 * torch.randn(x.shape, generator=g)
    return x + radius * (2 * torch.rand(x.shape, generator=g) - 1)


def losses(plan: Plan, step: int, model: nn.Module, x: Tensor, y: Tensor, adversarial: Tensor) -> Tensor:
    """[B] of the chosen objective."""
    if plan.objective == "pgd":
        return F.cross_entropy(model(adversarial).float(), y, reduction="none", label_smoothing=plan.smoothing)
    clean, moved = model(torch.cat([x, adversarial])).float().chunk(2)
    ce = F.cross_entropy(clean, y, reduction="none", label_smoothing=plan.smoothing)
    return ce + plan.beta_at(step) * kl_divergence(clean, moved)


@torch.no_grad()
def average(plan: Plan, step: int, averaged: nn.Module, model: nn.Module) -> None:
    """Moving average as the package's, or an even one over the last `window` of the training."""
    keep = min(plan.average, (1 + step) / (10 + step))
    begun = step - (1 - plan.window) * plan.steps
    if plan.window:
        keep = max(begun, 0) / (max(begun, 0) + 1)
    for old, new in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        old.lerp_(new, 1 - keep) if old.is_floating_point() else old.copy_(new)


def measure(plan: Plan, model: nn.Module, held: Split, final: bool) -> dict[str, float]:
    """Clean and robust accuracy (PGD on the margin) on held-out images: all at the end, 1,000 during the training."""
    part = held if final else Split(held.images[:1000], held.labels[:1000])
    steps = 40 if plan.data == "digits" else 20
    attack = PGD(threat=ThreatModel(epsilon=RADIUS[plan.data]), steps=steps, restarts=1, loss=Margin())
    model.eval()
    with torch.no_grad():
        clean = torch.cat([model(x).argmax(1) for x in part.images.split(250)]) == part.labels
    robust = robust_after(attack, model, part.images, part.labels, 250)
    return {"clean": 100 * clean.float().mean().item(), "robust": 100 * robust.float().mean().item()}


def train(plan: Plan, folder: Path) -> dict[str, Any]:
    """One run, its averaged weights kept in FOLDER/models."""
    data, held = parts(plan)
    model: Any = NETWORK[plan.data].build(data.images.shape[1], 10, derive(plan.seed, "classifier weights"))
    fast = plan.precision == "bf16"
    model = model.to(memory_format=torch.channels_last) if fast else model
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimiser, batches = plan.optimisation.optimiser(model), Batches(plan, data)
    spent, curve, previous = 0.0, [], None
    x, y = data.images[:1], data.labels[:1]
    marks = {round(plan.steps * k / plan.points) for k in range(1, plan.points + 1)} | {plan.steps}
    for step in range(plan.steps):
        began = time.process_time()
        if step % plan.replays == 0:
            (x, y), previous = batches.take(step // plan.replays), None
            x = x.contiguous(memory_format=torch.channels_last) if fast else x
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            adversarial = climb(plan, step, model, x, y, begin(plan, step, batches, x, previous))
            model.train()
            loss = losses(plan, step, model, x, y, adversarial).mean()
        if plan.start == "kept":
            batches.kept[batches.place] = adversarial - x
        previous = adversarial if plan.replays > 1 else None
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        average(plan, step + 1, averaged, model)
        spent += time.process_time() - began
        if step + 1 in marks:
            final = step + 1 == plan.steps
            curve.append(
                {"step": step + 1, "seconds": spent, "loss": loss.item(), **measure(plan, averaged, held, final)}
            )
    (folder / "models").mkdir(exist_ok=True)
    torch.save(averaged.state_dict(), folder / "models" / f"{plan.key}.pt")
    return {"key": plan.key, "plan": asdict(plan), "curve": curve, "seconds": spent, "held_out": len(held)}


def attacked(plan: Plan, folder: Path, count: int) -> dict[str, Any]:
    """Worst case of APGD-CE and targeted APGD on the kept weights, over the first `count` held-out images."""
    held = parts(plan)[1]
    model = NETWORK[plan.data].build(held.images.shape[1], 10).eval()
    model.load_state_dict(torch.load(folder / "models" / f"{plan.key}.pt"))
    part, threat = Split(held.images[:count], held.labels[:count]), ThreatModel(epsilon=RADIUS[plan.data])
    ce = robust_after(APGD(threat=threat, steps=50), model, part.images, part.labels)
    both = ce.clone()
    targeted = TargetedAPGD(threat=threat, steps=50, targets=4)
    both[ce] = robust_after(targeted, model, part.images[ce], part.labels[ce])
    return {
        "key": plan.key,
        "n": len(part),
        "apgd": 100 * ce.float().mean().item(),
        "worst": 100 * both.float().mean().item(),
    }


def read(line: str) -> list[Plan]:
    """The plans of a line of the queue: `seeds` and `folds` are lists, the rest are fields."""
    given = dict(word.split("=", 1) for word in line.split())
    seeds, folds = given.pop("seeds", "0"), given.pop("folds", "0")
    kinds = {name: type(value) for name, value in asdict(Plan()).items()}
    chosen: dict[str, Any] = {name: kinds[name](value) for name, value in given.items()}
    plan = Plan(**chosen)
    return [replace(plan, seed=int(s), fold=int(f)) for s in seeds.split(",") for f in folds.split(",")]


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    """One more line."""
    with path.open("a") as out:
        out.write(json.dumps(record) + "\n")
    print(time.strftime("%H:%M:%S"), {k: v for k, v in record.items() if k not in ("plan", "curve")}, flush=True)
    if "curve" in record:
        print(
            *[f"  {p['step']} {p['seconds']:.0f}s {p['clean']:.1f}/{p['robust']:.1f}" for p in record["curve"]],
            flush=True,
        )


def work(folder: Path, queue: Path) -> None:
    """The first plan of the queue that is not done, again and again."""
    while True:
        done = {r["key"] for r in lines(folder / "runs.jsonl")}
        asked = [line for line in queue.read_text().splitlines() if line.strip() and not line.startswith("#")]
        plans = [p for line in asked if line != "stop" for p in read(line) if p.key not in done]
        if plans:
            append(folder / "runs.jsonl", train(plans[0], folder))
        elif "stop" in asked:
            return
        else:
            time.sleep(3)


def table(folder: Path) -> None:
    """Mean and spread over seeds (digits: of the mean over the folds), a row per configuration."""
    rows: dict[str, dict[int, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for r in lines(folder / "runs.jsonl"):
        plan = Plan(**r["plan"])
        rows[replace(plan, seed=0, fold=0).key][plan.seed].append(
            {"seconds": r["seconds"], **r["curve"][-1]} | {"s": r["seconds"]}
        )
    for key, seeds in sorted(
        rows.items(), key=lambda kv: (kv[0].split()[0], -mean(x["robust"] for v in kv[1].values() for x in v))
    ):
        cells = []
        for name in ("s", "clean", "robust"):
            each = [mean(x[name] for x in runs) for runs in seeds.values()]
            cells.append(f"{mean(each):6.1f} ({stdev(each):.2f})" if len(each) > 1 else f"{each[0]:6.1f}       ")
        print(*cells, f"{len(seeds)}x{len(next(iter(seeds.values())))}", key, sep=" | ")


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("folder", type=Path)
    reader.add_argument("queue", type=Path, nargs="?")
    reader.add_argument("--attack", nargs="+", help="lines as in the queue", default=[])
    reader.add_argument("--count", type=int, default=2000, help="images that are attacked")
    reader.add_argument("--table", action="store_true")
    asked = reader.parse_args()
    torch.set_num_threads(1)
    if asked.queue is not None:
        work(asked.folder, asked.queue)
    for plan in [p for line in asked.attack for p in read(line)]:
        if plan.key not in {r["key"] for r in lines(asked.folder / "attacked.jsonl")}:
            append(asked.folder / "attacked.jsonl", attacked(plan, asked.folder, asked.count))
    if asked.table:
        table(asked.folder)


if __name__ == "__main__":
    main()
