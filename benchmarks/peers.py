"""Side by side with the published systems: their inner loops and ours on equal inputs, in one run on one machine.

The numbers matter because a package that is slower than the scripts it replaces will not be taken up, and one that is
faster because it does something else deserves no trust: equal results are checked first, and a row whose results differ
has no ratio. The peers are re-stated from METHOD.md (restated.py, loops.py) or, for AutoAttack, their own package.

  guidance     CDP: DDIM of the quadratic sub-sequence, hard negatives, t >= 400, without embedding network
  training     EDM-AT: TRADES-10, batch norms of each view, one average of the weights per step
  autoattack   the reference (pyautoattack), standard version
  loader       all images of one .npz in memory, against our store on disk

    python benchmarks/peers.py [--device cuda] [--only ROW ...] [--rounds 3] [--quick] [--profile]

Ratios are peer's seconds over ours, round by round (above 1: ours is faster): median, least and largest. --quick takes
small networks and finishes in seconds: it shows that all works, its ratios say nothing. --profile adds the costliest
operations of ours. Each row prints all that is known so far; the last line is the whole as one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import evaluation
import numpy as np
import torch
from guidance import thinned
from loops import ROWS as LOOPS
from loops import Bench, Usual
from restated import GuidedDDIM, NpzInMemory, squared_timesteps
from torch import Tensor, nn
from training import commit as commit_of
from training import interleave, random_set, random_store, ratios, spread, warmed

from gambeson.data.datasets import Digits
from gambeson.data.mixture import from_uint8
from gambeson.data.shuffle import BlockShuffle
from gambeson.models.denoiser import VP, NetworkDenoiser
from gambeson.models.unet import UNetSpec
from gambeson.models.wideresnet import WideResNet, WideResNetSpec
from gambeson.recipes.presets import preset
from gambeson.robustness.losses import TRADES
from gambeson.sampling.guidance import Contrastive, ContrastiveGuidance
from gambeson.sampling.levels import TimestepLevels
from gambeson.sampling.samplers import DDIM
from gambeson.sampling.walk import final
from gambeson.threat import ThreatModel
from gambeson.training.loop import Optimisation, TrainingState

TOLERANCE = 1e-4
"""Largest relative difference at which float32 results count as equal; float64 ones: a millionth of it."""


@dataclass(frozen=True)
class Asked:
    """What every row is told."""

    device: str
    quick: bool
    rounds: int
    profile: bool
    folder: Path  # for files that the run makes

    @property
    def on_gpu(self) -> bool:
        """Whether the device is CUDA."""
        return self.device.startswith("cuda")

    def wait(self) -> float:
        """Now, when the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over that of the peer's."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def side_by_side(asked: Asked, theirs: Callable[[], Any], ours: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of both, in turn, every second round ours first; ratios round by round."""
    seconds: dict[str, list[float]] = {"peer": [], "ours": []}
    work = {"peer": theirs, "ours": ours}
    for each in work.values():
        each()  # warm-up
    for turn in range(asked.rounds):
        for name in list(work)[:: -1 if turn % 2 else 1]:
            begun = asked.wait()
            work[name]()
            seconds[name].append(asked.wait() - begun)
    faster = [peer / own for peer, own in zip(seconds["peer"], seconds["ours"], strict=True)]
    return {"seconds": {name: spread(each) for name, each in seconds.items()}, "times_as_fast": spread(faster)}


def costs(asked: Asked, work: Callable[[], Any], count: int = 3) -> list[dict[str, Any]]:
    """The operations that take most of a piece of work, their own time alone: the first to look at."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * asked.on_gpu]
    with profile(activities=kinds) as found:
        work()
        asked.wait()
    name = "self_device_time_total" if asked.on_gpu else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: getattr(row, name), reverse=True)
    whole = sum(getattr(row, name) for row in rows)
    return [{"operation": r.key, "share": round(getattr(r, name) / whole, 3), "calls": r.count} for r in rows[:count]]


def with_costs(asked: Asked, row: dict[str, Any], work: Callable[[], Any]) -> dict[str, Any]:
    """The row, and where asked what ours spends its time on."""
    return row | ({"costs_of_ours": costs(asked, work)} if asked.profile else {})


def student(quick: bool, on_gpu: bool) -> WideResNetSpec:
    """WRN-28-10; on a CPU WRN-16-4, since a step of the former takes minutes there; quick: the smallest."""
    if quick:
        return WideResNetSpec(depth=10, width=1)
    return WideResNetSpec() if on_gpu else WideResNetSpec(depth=16, width=4)


# ---- guidance ----


@dataclass(frozen=True)
class Sampling:
    """Both samplers on the same networks, noise and classes."""

    denoiser: NetworkDenoiser
    encoder: WideResNet
    noise: Tensor  # [B, C, H, W]
    labels: Tensor  # [B]
    every: int  # each so many-th timestep is walked

    @staticmethod
    def build(device: str, quick: bool, dtype: torch.dtype = torch.float32, batch: int = 0) -> Sampling:
        """CIFAR-10's sizes, or tiny ones. What an untrained network starts with as zeros is drawn: results must show
        every weight."""
        spec, side = (UNetSpec(width=8), 8) if quick else (UNetSpec.cifar10(), 32)
        shape, on_gpu = (3, side, side), device != "cpu"
        network, g = spec.build(3, 10), torch.Generator().manual_seed(1)
        for p in network.parameters():
            if not p.any():
                nn.init.normal_(p, 0.0, 0.02, generator=g)
        denoiser = NetworkDenoiser(network, VP(), spec=spec, classes=10, shape=shape, conditional_only=True)
        encoder = student(quick, on_gpu)
        parts = [part.to(device, dtype).eval() for part in (denoiser, encoder.build(3, 10))]
        parts = [part.requires_grad_(False) for part in parts]
        count = batch or (6 if quick else 512 if on_gpu else 8)
        noise = torch.randn(count, *shape, generator=g, dtype=torch.float64).to(device, dtype)
        labels = (torch.arange(count) % 10).to(device)
        return Sampling(*parts, noise, labels, 24 if quick else 1 if on_gpu else 16)  # type: ignore[arg-type]

    def theirs(self) -> Tensor:
        """x_0 by the re-stated sampler. The last timestep's repeats, which do not move, are left out of both."""
        steps = sorted(set(squared_timesteps()), reverse=True)[:: self.every][::-1]
        peer = GuidedDDIM(self.denoiser.network, self.encoder.features, self.encoder, steps)
        return peer(self.noise, self.labels)

    def guidance(self) -> ContrastiveGuidance:
        """The authors' hard negatives without their embedding network."""
        spec: Contrastive = replace(preset("cdp-cifar10-hnm").generation["guidance"], embedding=None)
        return ContrastiveGuidance(spec, self.encoder.features)

    def ours(self) -> Tensor:
        """x_0 by the product."""
        sigmas = thinned(TimestepLevels(kind="quad", steps=200).sigmas(), self.every)
        walk = DDIM(vp_start=True)(self.denoiser, self.noise, sigmas, self.guidance(), labels=self.labels)
        return final(walk).x

    def difference(self) -> float:
        """Of the sampled images."""
        return difference(self.ours(), self.theirs())


def guidance(asked: Asked) -> dict[str, Any]:
    """CDP's guided DDIM. Equal in float64, where rounding cannot hide a difference."""
    exact = Sampling.build(asked.device, asked.quick, torch.float64, batch=4)
    exact = exact if asked.quick else replace(exact, every=24)
    apart = exact.difference()
    row: dict[str, Any] = {"difference": apart, "equal": apart < TOLERANCE * 1e-6}
    if not row["equal"]:
        return row
    both = Sampling.build(asked.device, asked.quick)
    steps, repeats = len(set(squared_timesteps())), len(squared_timesteps())
    row |= {
        "encoder": repr(student(asked.quick, asked.on_gpu)),
        "batch": len(both.noise),
        "timed_steps": -(-steps // both.every),
        "steps": steps,
    }
    row |= {"calls_of_the_authors_with_repeats": repeats} | side_by_side(asked, both.theirs, both.ours)
    return with_costs(asked, row, both.ours)


# ---- training ----


def one_step(network: WideResNetSpec, loss: TRADES, backward: bool = True, side: int = 8) -> float:
    """How far one training step of ours is from the usual one's, over all averaged weights: same start and draws."""
    plan = Optimisation(steps=10, batch_size=6, learning_rate=0.1, warmup=0.0)
    data = random_set(6, side=side).train
    peer = Usual(network.build(3, 10, 1), plan, loss, data, True, backward)
    peer.step(0, data.images, data.labels, torch.Generator().manual_seed(3))
    state = TrainingState.start(network.build(3, 10, 1), plan)
    state.model.train()
    plan.prepare(state.optimiser, 0)
    loss(state.model, data.images, data.labels, torch.Generator().manual_seed(3)).mean().backward()
    state.optimiser.step()
    state.average(plan.averaging(1))
    theirs = peer.average.state_dict()
    return max(
        difference(value, theirs[name])
        for name, value in state.averaged.state_dict().items()
        if value.is_floating_point() and theirs[name].any()
    )


def training(asked: Asked) -> dict[str, Any]:
    """EDM-AT's step. `usual` attacks by loss.backward(), as most codes do; `usual_grad` by autograd.grad."""
    loss = TRADES(threat=ThreatModel(), steps=3, label_smoothing=0.1, attack_mode="train", statistics="both")
    apart = one_step(WideResNetSpec(depth=10, width=1), loss)
    row: dict[str, Any] = {"difference": apart, "equal": apart < TOLERANCE}
    if not row["equal"]:
        return row
    batch = 8 if asked.quick else 1024 if asked.on_gpu else 16
    network = student(asked.quick, asked.on_gpu)
    plan = Optimisation(steps=100_000, batch_size=batch, learning_rate=1e-4)
    inner = replace(loss, steps=2 if asked.quick else 10, attack_mode="eval", statistics="together")
    side = 8 if asked.quick else 32
    store = random_store(asked.folder / "training", 80 if asked.quick else 20_000, side=side)
    bench = Bench(asked.device, network, plan, inner, random_set(batch * 2, side=side), store, asked.folder)
    rows = {name: warmed(bench, name, 1.0) for name in ("usual", "usual_grad", "ours_as_usual", "ours")}
    interleave(bench, rows, asked.rounds, 1 if asked.quick or not asked.on_gpu else 4)
    row |= {
        "network": repr(network),
        "batch": batch,
        "inner_steps": inner.steps,
        "precisions": {n: LOOPS[n].precision for n in rows},
    }
    rates = {name: spread([batch / s for s in each.seconds]) for name, each in rows.items()}
    row |= {"images_per_second": rates, "times_as_fast": ratios(rows)}
    return with_costs(asked, row, partial(next, rows["ours"].steps))


# ---- AutoAttack ----


def linear_problem(device: str, count: int = 20) -> evaluation.Problem:
    """Digits and a linear classifier, fitted in a moment: an attack on it has no luck to hope for."""
    data = Digits(train_images=300).load()
    layer = nn.Linear(64, 10)
    for p in layer.parameters():
        nn.init.zeros_(p)
    model = nn.Sequential(nn.Flatten(), layer)
    fitting = torch.optim.LBFGS(model.parameters(), max_iter=30)

    def loss() -> Tensor:
        fitting.zero_grad()
        found = nn.functional.cross_entropy(model(data.train.images), data.train.labels)
        found.backward()
        return found

    fitting.step(loss)  # type: ignore[arg-type]
    model = model.to(device).eval().requires_grad_(False)
    images, labels = data.test.images[:count].to(device), data.test.labels[:count].to(device)
    return evaluation.Problem(model, images, labels, ThreatModel(epsilon=0.08), 0)


def autoattack(asked: Asked) -> dict[str, Any]:
    """The reference. Both draw at random, so verdicts are compared, image by image: at most 2 % may differ."""
    if asked.quick:
        at, facts = linear_problem(asked.device), {}
    else:
        words = argparse.Namespace(device=asked.device, images=100, skip=0, steps=0, epsilon=0.0, seed=0, runs="runs")
        at, facts = evaluation.problem(words)
    size = len(at.labels)
    found = {n: [evaluation.ROWS[n](at, size, asked.quick)] for n in ("reference", "ours")}
    same = found["reference"][0].robust == found["ours"][0].robust
    row: dict[str, Any] = facts | {"images": size, "agreement": float(same.mean()), "equal": bool(same.mean() >= 0.98)}
    row |= {"robust": {name: float(first[0].robust.mean()) for name, first in found.items()}}
    if not row["equal"]:
        return row
    for turn in range(asked.rounds - 1):
        for name in list(found)[:: -1 if turn % 2 else 1]:
            found[name].append(evaluation.ROWS[name](at, size, asked.quick))
    seconds = {name: [each.seconds for each in rounds] for name, rounds in found.items()}
    faster = [peer / own for peer, own in zip(seconds["reference"], seconds["ours"], strict=True)]
    row |= {"seconds": {n: spread(each) for n, each in seconds.items()}, "times_as_fast": spread(faster)}
    return with_costs(asked, row, lambda: evaluation.ROWS["ours"](at, size, True))


# ---- loader ----


def contents(batches: Iterator[tuple[Tensor, Tensor]]) -> list[bytes]:
    """Digests of image and label of each row, sorted: what an epoch gave, whatever the order."""
    return sorted(
        hashlib.blake2b(image.numpy().tobytes() + bytes([int(label)]), digest_size=16).digest()
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    )


def loader(asked: Asked) -> dict[str, Any]:
    """A shuffled epoch as float images: each image once with its label, from both."""
    count, side, batch = (120, 8, 16) if asked.quick else (100_000, 32, 1024)
    store = random_store(asked.folder / "loader", count, side=side)
    images, labels = store.read(np.arange(len(store)))
    np.savez(asked.folder / "plain.npz", image=images, label=labels)
    peer = NpzInMemory(asked.folder / "plain.npz", batch)

    def ours() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, classes in BlockShuffle(store, batch, 0).epoch(0):
            yield from_uint8(pixels), torch.from_numpy(classes)

    row: dict[str, Any] = {"images": count, "equal": contents(ours()) == contents(peer.epoch(0))}
    if not row["equal"]:
        return row

    def drained(make: Callable[[], Iterator[Any]]) -> int:
        return sum(len(labels) for _, labels in make())

    row |= side_by_side(asked, partial(drained, partial(peer.epoch, 0)), partial(drained, ours))
    rates = {name: round(count / each["median"]) for name, each in row["seconds"].items()}
    return with_costs(asked, row | {"images_per_second": rates}, partial(drained, ours))


ROWS: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "guidance": guidance,
    "training": training,
    "autoattack": autoattack,
    "loader": loader,
}


def facts_of(asked: Asked) -> dict[str, Any]:
    """Machine, commit, versions."""
    return {
        "benchmark": "peers",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit_of(),
        "machine": torch.cuda.get_device_name() if asked.on_gpu else f"{platform.machine()}, CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "quick": asked.quick,
        "rounds": asked.rounds,
        "load_before": round(os.getloadavg()[0], 2),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the rows; returns what the last line says."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--device", default="cpu")
    reader.add_argument("--threads", type=int, default=0, help="on a CPU; default: as torch has it")
    reader.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    reader.add_argument("--rounds", type=int, default=0, help="default 3, quick 2")
    reader.add_argument("--quick", action="store_true", help="small networks, seconds; no number for a table")
    reader.add_argument("--profile", action="store_true", help="also the costliest operations of ours")
    words = reader.parse_args(argv)
    if words.threads:
        torch.set_num_threads(words.threads)
    with tempfile.TemporaryDirectory() as folder:
        rounds = words.rounds or (2 if words.quick else 3)
        asked = Asked(words.device, words.quick, rounds, words.profile, Path(folder))
        facts: dict[str, Any] = facts_of(asked) | {"rows": {}}
        for name in words.only:
            facts["rows"][name] = ROWS[name](asked)
            print(json.dumps(facts), flush=True)
    facts["load_after"] = round(os.getloadavg()[0], 2)
    print(json.dumps(facts), flush=True)
    return facts


if __name__ == "__main__":
    main()
