"""The two loops that training.py compares: the usual research loop, re-stated from its description (METHOD 2) with no
product code in it but the schedule, and ours as training.classifier runs it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.data.augment import PadCrop
from gambeson.data.datasets import ImageSet, Split
from gambeson.data.mixture import Mixture
from gambeson.data.synthetic import SyntheticStore
from gambeson.machine import Machine, make_repeatable
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.robustness.inner import step_size_of
from gambeson.robustness.losses import TRADES
from gambeson.store import Workspace
from gambeson.training.batches import Ahead, Batches
from gambeson.training.loop import Optimisation, TrainingState, fit

Steps = Iterator[int]
"""A training: each `next` is one gradient step."""


class Usual:
    """Float32, NCHW, two passes, an average entry by entry.

    Charitable where codes differ: images lie on the device and are cropped there in one gather, clean probabilities
    are computed once and without a graph, nothing waits for the device. Both ways of attacking that are in use go
    through the network in training mode with parameters that ask for gradients:
    `backward` calls loss.backward() and reads the gradient off the image. A forward pass, the gradient of activations
    and the gradient of weights cost about the same, so an image costs 1 (clean probabilities) + 10 x 3 (attack)
    + 2 x 3 (training on both images) = 37 forward-equivalents.
    Else torch.autograd.grad(loss, [image]), which leaves the weights' gradients out: 1 + 10 x 2 + 2 x 3 = 27, as many
    as ours. (TRADES's first code attacks so, but computes clean logits in every step and once more in the loss: 39.)
    """

    def __init__(
        self, model: nn.Module, plan: Optimisation, loss: TRADES, data: Split, flip: bool, backward: bool
    ) -> None:
        self.model, self.plan, self.loss, self.flip, self.backward = model, plan, loss, flip, backward
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        device = next(model.parameters()).device
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        assert loss.threat is not None
        self.epsilon, self.size = loss.threat.epsilon, step_size_of(loss)
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.optimiser = plan.optimiser(model)  # torch.optim.SGD with Nesterov momentum

    def steps(self, seed: int) -> Steps:
        """Trains, yielding the steps done."""
        g, order = torch.Generator(self.images.device).manual_seed(seed), torch.empty(0, dtype=torch.int64)
        for number in range(self.plan.steps):
            if len(order) < self.plan.batch_size:
                order = torch.randperm(len(self.images), generator=g, device=self.images.device)
            rows, order = order[: self.plan.batch_size], order[self.plan.batch_size :]
            self.step(number, self.augmented(self.images[rows], g), self.labels[rows], g)
            yield number + 1

    def augmented(self, x: Tensor, g: torch.Generator) -> Tensor:
        """Padded by 4 and cropped back (an eighth of the side), mirrored or not."""
        b, _, h, w = x.shape
        pad = h // 8
        top, left = torch.randint(0, 2 * pad + 1, (2, b), generator=g, device=x.device)
        mirrored = (torch.rand(b, generator=g, device=x.device) < 0.5) & self.flip
        down, across = (torch.arange(n, device=x.device) for n in (h, w))
        across = torch.where(mirrored[:, None], across.flip(0), across)
        rows, columns = (top[:, None] + down)[:, :, None], (left[:, None] + across)[:, None, :]
        padded, image = F.pad(x, [pad] * 4).permute(0, 2, 3, 1), torch.arange(b, device=x.device)[:, None, None]
        return padded[image, rows, columns].permute(0, 3, 1, 2).contiguous()

    def attack(self, x: Tensor, g: torch.Generator) -> Tensor:
        """Sign steps on the summed KL; running statistics are switched off meanwhile."""
        for norm in self.norms:
            norm.track_running_stats = False
        with torch.no_grad():
            p = self.model(x).softmax(1)
        noise = torch.rand(x.shape, generator=g, device=x.device)
        adversarial = (x + self.epsilon * (2 * noise - 1)).clamp(0, 1)
        for _ in range(self.loss.steps):
            adversarial = adversarial.detach().requires_grad_()
            kl = F.kl_div(F.log_softmax(self.model(adversarial), dim=1), p, reduction="sum")
            if self.backward:
                kl.backward()
                gradient = adversarial.grad
                assert gradient is not None
            else:
                (gradient,) = torch.autograd.grad(kl, [adversarial])
            adversarial = adversarial.detach() + self.size * gradient.sign()
            adversarial = torch.min(torch.max(adversarial, x - self.epsilon), x + self.epsilon).clamp(0, 1)
        for norm in self.norms:
            norm.track_running_stats = True
        return adversarial.detach()

    def step(self, number: int, x: Tensor, y: Tensor, g: torch.Generator) -> None:
        """One gradient step and one of the average."""
        self.model.train()
        adversarial = self.attack(x, g)
        self.plan.prepare(self.optimiser, number)
        self.optimiser.zero_grad()
        clean, moved = self.model(x), self.model(adversarial)
        kl = F.kl_div(F.log_softmax(moved, dim=1), F.softmax(clean, dim=1), reduction="sum") / len(x)
        (F.cross_entropy(clean, y, label_smoothing=self.loss.label_smoothing) + self.loss.beta * kl).backward()
        self.optimiser.step()
        share, now = self.plan.averaging(number + 1), self.model.state_dict()
        with torch.no_grad():
            for name, mean in self.average.state_dict().items():
                if mean.is_floating_point():
                    mean.mul_(1 - share).add_(now[name], alpha=share)
                else:
                    mean.copy_(now[name])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train; the defaults are ours."""

    precision: str = "bfloat16"  # of ours: float32 or bfloat16
    last: bool = True  # channels last
    as_usual: bool = False  # batch norms as the usual loop's: the batch's in the attack, clean and adversarial apart
    compiled: bool = False  # model.compile()
    repeatable: bool = True  # deterministic kernels, as stages ask for on CUDA
    usual: str = ""  # the re-stated loop instead: backward or grad


ROWS = {
    "usual": Row(usual="backward", precision="float32"),
    "usual_grad": Row(usual="grad", precision="float32"),
    "ours_float32": Row(precision="float32", last=False),
    "ours_bfloat16_nchw": Row(last=False),
    "ours": Row(),
    "ours_as_usual": Row(as_usual=True),  # what the edm-at preset asks for: the usual loop's mathematics
    "ours_unrepeatable": Row(repeatable=False),  # CUDA only: what deterministic kernels cost
    "ours_compiled": Row(compiled=True),
}


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    device: str
    network: WideResNetSpec
    plan: Optimisation
    loss: TRADES
    real: ImageSet
    synthetic: SyntheticStore | None
    folder: Path

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    @property
    def on_gpu(self) -> bool:
        """Whether the device is CUDA."""
        return self.device.startswith("cuda")

    def batches(self, seed: int) -> Batches:
        """The product's loader: 0.7 synthetic where there is a store, pad-crop and flip."""
        mixture = Mixture(self.real.train, self.synthetic, 0.7, self.plan.batch_size, seed)
        augment = PadCrop(padding=self.real.shape[1] // 8, flip=True)
        return Batches(
            mixture=mixture,
            real=self.real,
            seed=seed,
            augment=augment,
            augment_synthetic=None,
            mix=None,
            smooth_synthetic=0.0,
        )

    def settings(self, row: Row) -> None:
        """The backend's switches: torch's own for the usual loop with cudnn.benchmark, the product's for ours."""
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
        if not row.usual and row.repeatable:
            make_repeatable(Machine(device=self.device))

    def training(self, name: str, seed: int) -> tuple[nn.Module, Steps]:
        """The averaged network and the steps that train it."""
        row = ROWS[name]
        plan = Optimisation(**{**vars(self.plan), "precision": row.precision})
        layout = torch.channels_last if row.last and not row.usual else torch.contiguous_format
        channels, classes = self.real.shape[0], len(self.real.class_names)
        model: nn.Module = self.network.build(channels, classes, seed)
        model = model.to(device=torch.device(self.device), memory_format=layout)  # type: ignore[call-overload]
        if row.usual:
            loop = Usual(model, plan, self.loss, self.real.train, self.real.flip_safe, row.usual == "backward")
            return loop.average, loop.steps(seed)
        norms = {"attack_mode": "train", "statistics": "both"} if row.as_usual else {}
        loss = TRADES(**{**vars(self.loss), **norms})
        state = TrainingState.start(model, plan)
        if row.compiled:
            model.compile()
        return state.averaged, self._ours(name, state, plan, loss, layout, seed)

    def _ours(
        self, name: str, state: TrainingState, plan: Optimisation, loss: TRADES, layout: torch.memory_format, seed: int
    ) -> Steps:
        """training.classifier's steps, without its validations and its stage."""
        batches = self.batches(seed)
        ahead = Ahead(batches, plan.steps) if self.on_gpu else None

        def loss_of(step: int) -> Iterator[Tensor]:
            batch = (ahead or batches)(step)
            state.model.train()
            for images, labels in batch.parts(plan.accumulate, self.device, layout):
                yield loss(state.model, images, labels, batch.draw)

        folder = self.folder / f"{name}-{seed}"
        folder.mkdir()
        yield from fit(state, plan, loss_of, Workspace(folder, checkpoint_seconds=math.inf))
