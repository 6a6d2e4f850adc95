"""What tier 16 would gain from another order of pixels in memory, or from batch norms folded into convolutions.

Networks of `cifar10-16`, batch 128, one thread; rows of a measure take turns. `folded` puts each block's second batch
norm into the convolution before it, as the passes of an attack in eval mode allow.

    python benchmarks/layouts.py [--rounds 20]         milliseconds: median, least and largest; a JSON object
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import commit, spread

from gambeson.models.resnet import Block
from gambeson.recipes import named
from gambeson.training.diffusion import DenoiserTraining
from gambeson.training.loop import TrainingState

BATCH, SHAPE = 128, (3, 16, 16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Rows = dict[str, Callable[[], Any]]


def cast(lower: bool) -> torch.autocast:
    """bfloat16 in the networks, or not."""
    return torch.autocast("cpu", torch.bfloat16, enabled=lower)


class Folded(nn.Module):
    """A block whose first convolution has the second batch norm in it; for eval mode."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, norm = block, block.norm2
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.weight = nn.Parameter(block.conv1.weight * scale[:, None, None, None], requires_grad=False)
        self.bias = nn.Parameter(norm.bias - norm.running_mean * scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.block.norm1(x))
        skip = x if self.block.skip is None else self.block.skip(h)
        inner = F.conv2d(h, self.weight, self.bias, stride=self.block.conv1.stride, padding=1)
        return skip + self.block.conv2(F.silu(inner))


def gradients() -> Rows:
    """A gradient by the images, as in an attack, with the student's network in bfloat16 and channels last."""
    plain = named("cifar10-16").student.network.build(3, 10, 1).to(memory_format=torch.channels_last)  # type: ignore
    plain = plain.eval().requires_grad_(False)
    folded = copy.deepcopy(plain)
    folded.layers = nn.Sequential(*map(Folded, folded.layers))  # type: ignore[arg-type]
    images, labels = torch.rand(BATCH, *SHAPE).contiguous(memory_format=torch.channels_last), torch.arange(BATCH) % 10

    def gradient(model: nn.Module) -> Tensor:
        moved = images.detach().requires_grad_(True)
        with cast(True):
            loss = F.cross_entropy(model(moved), labels)
        return torch.autograd.grad(loss, moved)[0]

    apart = (gradient(plain) - gradient(folded)).norm() / gradient(plain).norm()
    assert apart < 0.02, f"the folded network is another one: {apart}"
    return {"as it is": partial(gradient, plain), "folded": partial(gradient, folded)}


def denoisers() -> tuple[Rows, Rows]:
    """(one call in sampling, one training step) of the diffusion model, in each layout and precision."""
    spec = named("cifar10-16").denoiser
    assert isinstance(spec, DenoiserTraining)
    called, trained = Rows(), Rows()
    noise, labels, sigma = torch.randn(BATCH, *SHAPE), torch.arange(BATCH) % 10, torch.ones(BATCH)

    def call(model: nn.Module, x: Tensor, lower: bool) -> Tensor:
        with torch.no_grad(), cast(lower):
            return model(x, sigma, labels)

    def step(state: TrainingState, x: Tensor, lower: bool) -> None:
        state.optimiser.zero_grad()
        with cast(lower):
            loss = state.model.loss(x, labels, torch.Generator().manual_seed(1)).mean()  # type: ignore[operator]
        loss.backward()
        state.optimiser.step()

    for name, layout in LAYOUTS.items():
        model = spec.build(SHAPE, 10, 0)
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, 0.0, 0.02, generator=torch.Generator().manual_seed(2))
        model = model.to(memory_format=layout)  # type: ignore[call-overload]
        state, x = TrainingState.start(copy.deepcopy(model), spec.optimisation), noise.contiguous(memory_format=layout)
        for precision, lower in (("float32", False), ("bfloat16", True)):
            called[f"{precision}, {name}"] = partial(call, model.eval(), x, lower)
            trained[f"{precision}, {name}"] = partial(step, state, x, lower)
    return called, trained


def timed(rows: Rows, rounds: int) -> dict[str, Any]:
    """Milliseconds of each row, which take turns; the first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds + 1):
        for name, work in rows.items():
            begun = time.perf_counter()
            work()
            seconds[name].append(1e3 * (time.perf_counter() - begun))
    return {name: spread(each[1:]) for name, each in seconds.items()}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--rounds", type=int, default=20)
    rounds = reader.parse_args().rounds
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"benchmark": "layouts", "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    called, trained = denoisers()
    for name, rows in (("gradient", gradients()), ("sampling", called), ("denoiser step", trained)):
        facts[name] = timed(rows, rounds)
    print(json.dumps(facts | {"rounds": rounds, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
