"""One training loop, a generator: gradient step, schedule, weight averaging, and a state that resumes to the bit.

Every step's randomness is drawn from (seed, step), so the state is weights, averaged weights, optimiser and step.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gambeson import distributed
from gambeson.disk import write_json
from gambeson.errors import require
from gambeson.models.files import load_tensors, save_tensors
from gambeson.store import RESUME, Workspace
from gambeson.training.schedule import SWA, Cosine, OneCycle

RECENT = 1000
"""How many of the last losses are kept."""
SHARE_OF_SAVING = 1 / 20
"""Largest share of the time that goes into saving the state."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a network is fitted: SGD with Nesterov momentum, or AdamW where `momentum` is 0."""

    steps: int = 400  # gradient steps
    batch_size: int = 128  # images per step
    learning_rate: float = 0.1  # peak learning rate
    momentum: float = 0.9  # Nesterov momentum of SGD; 0 means AdamW
    weight_decay: float = 5e-4  # on matrices and filters; none on norms and biases
    warmup: float = 0.025  # share of the steps in which the rate rises linearly; then cosine to 0
    average: float = 0.995  # decay of the averaged weights, warmed up as min(decay, (1 + t) / (10 + t))
    precision: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"neutral": "float32"}
    )  # bfloat16: autocast in the networks; weights, averages, optimiser and loss stay float32
    accumulate: int = field(default=1, metadata={"neutral": 1})  # parts in which a batch goes through the network
    clip_norm: float | None = field(default=None, metadata={"neutral": None})  # largest norm of a gradient; none: any
    schedule: Cosine | OneCycle = field(default=Cosine(), metadata={"neutral": Cosine()})  # how the rate goes
    swa: SWA | None = field(default=None, metadata={"neutral": None})  # plain mean of late weights, not `average`

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            require(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))
        for name in ("momentum", "warmup", "average"):
            require(0 <= getattr(self, name) < 1, name, "a share from 0 to below 1", getattr(self, name))
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        require(self.precision in ("float32", "bfloat16"), "precision", "float32 or bfloat16", self.precision)
        parts = f"1 to the batch's {self.batch_size} images"
        require(1 <= self.accumulate <= self.batch_size, "accumulate", parts, self.accumulate)
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "a number above 0, or none", self.clip_norm)

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        return self.learning_rate * self.schedule.factor(step, self.steps, self.warmup)

    def prepare(self, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Sets the rate (and SGD's momentum) of step 0, 1, ..."""
        for group in optimiser.param_groups:
            group["lr"] = self.rate(step)
            if self.momentum:
                group["momentum"] = self.schedule.momentum(step, self.steps, self.warmup, self.momentum)

    def averaging(self, step: int) -> float:
        """How far the average moves towards the network after step 1, 2, ..."""
        if self.swa is not None:
            return self.swa.weight(step, self.steps)
        return 1 - min(self.average, (1 + step) / (10 + step))

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """Weight decay on tensors of two dimensions and more only."""
        decayed = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        if self.momentum:
            return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.learning_rate)


@dataclass
class TrainingState:
    """Everything that a resumed training needs; `losses` are those of the last steps, `log` is for the caller.

    `best` holds the averaged weights that `remember` was told to keep.
    """

    model: nn.Module
    averaged: nn.Module
    optimiser: torch.optim.Optimizer
    step: int = 0
    losses: list[float] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def start(model: nn.Module, optimisation: Optimisation) -> TrainingState:
        """The state before the first step."""
        averaged = copy.deepcopy(model).requires_grad_(False).eval()
        return TrainingState(model, averaged, optimisation.optimiser(model))

    def save(self, path: Path) -> None:
        """Writes the state atomically."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"averaged/{k}": v for k, v in self.averaged.state_dict().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{index}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        save_tensors(path, tensors, {"kind": "training", "step": self.step, "losses": self.losses, "log": self.log})

    def load(self, path: Path) -> None:
        """Takes up a state that `save` wrote."""
        tensors, header = load_tensors(path)
        part: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimiser": {}, "best": {}}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            part[kind][name] = value
        self.model.load_state_dict(part["model"])
        self.averaged.load_state_dict(part["averaged"])
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in part["optimiser"].items():
            index, _, key = name.partition("/")
            states.setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": states})
        self.best = part["best"]
        self.step, self.losses, self.log = header["step"], header["losses"], header["log"]

    def remember(self) -> None:
        """Keeps the averaged weights of now as the best, on the CPU."""
        self.best = {name: value.detach().cpu().clone() for name, value in self.averaged.state_dict().items()}

    def recent_loss(self, steps: int) -> float:
        """Mean loss of the last steps, of which at most `RECENT` are known."""
        recent = self.losses[-steps:]
        return sum(recent) / len(recent)

    @torch.no_grad()
    def average(self, weight: float) -> None:
        """Moves the averaged weights and batch-norm statistics by that share to the model's; counters are copied."""
        pairs = list(zip(self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True))
        moved = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in moved], [value for _, value in moved], weight)  # type: ignore[attr-defined]
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)


Losses = Callable[[int], Tensor | Iterable[Tensor]]
"""Step -> [b] losses of the batch, or those of its parts one after another (`Optimisation.accumulate`).

Of several processes that train together each gives those of its share of the batch."""
Blame = Callable[[int], dict[str, Any]]
"""Step -> what its batch was made of, written down where its loss is not finite."""


def fit(
    state: TrainingState,
    optimisation: Optimisation,
    loss_of: Losses,
    work: Workspace,
    blame: Blame = lambda step: {},
) -> Iterator[int]:
    """Trains until `optimisation.steps`, yielding the steps done *after* each update; resumes from the workspace.

    loss_of(step) -> [b] losses, or an iterable of such for consecutive parts of a batch: the gradient is that of the
    mean over the whole batch, and one part's network activations are in memory at a time.
    The state is saved every `work.checkpoint_seconds`, or as seldom as saving takes a twentieth of the time.
    Raises ValueError naming the step when the loss is not finite; the last good state stays on disk, and beside it
    not_finite.json says which batch it was.
    """
    path = work.folder / RESUME
    if distributed.told(path.exists()):
        state.load(path)
    saved, wait = time.monotonic(), work.checkpoint_seconds
    while state.step < optimisation.steps:
        state.losses = [*state.losses[1 - RECENT :], _update(state, optimisation, loss_of, work, blame)]
        yield state.step
        work.progress(state.step, optimisation.steps)
        if distributed.leads() and time.monotonic() - saved > wait:
            began = time.monotonic()
            state.save(path)
            saved = time.monotonic()
            wait = _wait(work.checkpoint_seconds, saved - began)


def _wait(seconds: float, duration: float) -> float:
    """Seconds until the next save after one that took `duration`; below 0, none at all (a save at every step)."""
    return seconds if seconds < 0 else max(seconds, duration / SHARE_OF_SAVING)


def _update(state: TrainingState, optimisation: Optimisation, loss_of: Losses, work: Workspace, blame: Blame) -> float:
    """One step of the optimiser and of the average; the batch's mean loss before it."""
    optimisation.prepare(state.optimiser, state.step)
    state.optimiser.zero_grad(set_to_none=True)
    total = 0.0
    for loss in _means(state, optimisation, loss_of):
        total += loss.item()
        loss.backward()  # of any loss: processes that share batch norms have to stay in step
    distributed.add(p.grad for p in state.model.parameters() if p.grad is not None)
    total, norm = distributed.total(total), _clipped(state.model, optimisation.clip_norm)
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise not_finite(state.step, total if math.isfinite(norm) else norm, work, blame)
    state.optimiser.step()
    state.step += 1
    state.average(optimisation.averaging(state.step))
    return total


def _clipped(model: nn.Module, largest: float | None) -> float:
    """The norm of the gradient, which is then at most `largest`."""
    given = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(given)
    if largest is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return norm.item()


def not_finite(step: int, loss: float, work: Workspace, blame: Blame) -> ValueError:
    """The error of a loss, a gradient or logits that are not numbers; what the batch was made of is written down."""
    path, kept = work.folder / "not_finite.json", (work.folder / RESUME).exists()
    if distributed.leads():
        write_json(path, {"step": step, "loss": str(loss), **blame(step)})
    return ValueError(
        f"training: the loss of step {step} (or its gradient) is {loss}, expected a finite number. The usual fix is a "
        f"smaller learning rate. The last good state is kept ({work.folder / RESUME if kept else 'none yet'}); "
        f"a classifier's training can start from it (gambeson train --from). {path} says what the batch was made of"
    )


def _means(state: TrainingState, optimisation: Optimisation, loss_of: Losses) -> Iterator[Tensor]:
    """Each part's share of the batch's mean loss, made under autocast where asked (the backward pass runs outside)."""
    device = next(state.model.parameters()).device.type
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=optimisation.precision == "bfloat16")
    with autocast:
        given = loss_of(state.step)
    if isinstance(given, Tensor):
        whole = "1 in a training that takes its batches whole"
        require(optimisation.accumulate == 1, "accumulate", whole, optimisation.accumulate)
        yield given.mean()
        return
    parts, seen = iter(given), 0
    while True:
        with autocast:  # not around the yield: it would hold for the caller
            part = next(parts, None)
        if part is None:
            break
        seen += len(part)
        yield part.mean() * (len(part) / optimisation.batch_size)
    whole = seen == optimisation.batch_size or distributed.together()
    assert whole, f"parts of {seen} images in all, for a batch of {optimisation.batch_size}"
