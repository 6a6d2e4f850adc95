"""The small network on top of an encoder that CDP calls "with embedding", and the learner that fits it while sampling.

Fitted once on warm-up blocks and then frozen (METHOD 1.3), or, as the authors have it, learning through a whole run,
which makes every image depend on all before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gambeson.errors import require
from gambeson.randomness import generator
from gambeson.types import Features, PerImage

Embeddings = Float[Tensor, "b e"]
"""[B, E] unit vectors."""


class EmbeddingNetwork(nn.Module):
    """Features [B, inputs] -> unit vectors [B, outputs]: Linear, ReLU, Linear, L2-normalise (METHOD 1.2).

    640 inputs and the defaults are the authors' 98,560 parameters. Weights are torch's uniform ones, drawn from `seed`.
    """

    def __init__(self, inputs: int, width: int = 128, outputs: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.inputs = inputs
        self.first = nn.utils.skip_init(nn.Linear, inputs, width)
        self.second = nn.utils.skip_init(nn.Linear, width, outputs)
        draws = generator(seed, "embedding network")
        for layer, fan in ((self.first, inputs), (self.second, width)):
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -1 / math.sqrt(fan), 1 / math.sqrt(fan), generator=draws)
        self.eval()

    def forward(self, features: Features) -> Embeddings:
        if features.shape[1] != self.inputs:
            raise ValueError(
                f"embedding network: expected features of width {self.inputs}, got {features.shape[1]}; it was built "
                "for another encoder, so fit one for this"
            )
        return F.normalize(self.second(F.relu(self.first(features))), dim=1)


def _check_spec(name: str, width: int, outputs: int, learning_rate: float) -> None:
    require(width >= 1 and outputs >= 1, f"{name} width, outputs", "whole numbers above 0", (width, outputs))
    require(
        0 < learning_rate < math.inf, f"{name} learning_rate", "a number above 0 (the authors': 0.01)", learning_rate
    )


@dataclass(frozen=True, kw_only=True)
class FittedEmbedding:
    """An embedding network fitted on warm-up blocks, one Adam step per guided step, and frozen before generation."""

    width: int = 128  # hidden units
    outputs: int = 128  # size of the embedding
    learning_rate: float = 1e-2  # Adam's, while it is fitted
    warmup_blocks: int = 4  # blocks that it is fitted on; their images are thrown away

    def __post_init__(self) -> None:
        _check_spec("FittedEmbedding", self.width, self.outputs, self.learning_rate)
        require(self.warmup_blocks >= 1, "FittedEmbedding warmup_blocks", "a whole number above 0", self.warmup_blocks)

    def build(self, inputs: int, seed: int = 0) -> EmbeddingNetwork:
        """The network for encoder features of width `inputs`, before it is fitted."""
        return EmbeddingNetwork(inputs, self.width, self.outputs, seed)


@dataclass(frozen=True, kw_only=True)
class PerRunEmbedding:
    """The authors' embedding network: it learns on through a whole run, so images depend on the order of the blocks."""

    width: int = 128  # hidden units
    outputs: int = 128  # size of the embedding
    learning_rate: float = 1e-2  # Adam's, one step per guided step

    def __post_init__(self) -> None:
        _check_spec("PerRunEmbedding", self.width, self.outputs, self.learning_rate)

    def build(self, inputs: int, seed: int = 0) -> EmbeddingNetwork:
        """The network for encoder features of width `inputs`, before it has learnt."""
        return EmbeddingNetwork(inputs, self.width, self.outputs, seed)


class EmbeddingLearner:
    """An embedding network and its Adam, which takes one step for every guided step; can be saved between blocks."""

    def __init__(self, network: EmbeddingNetwork, learning_rate: float = 1e-2) -> None:
        self.network = network
        self.optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)

    def learn(self, losses: Callable[[EmbeddingNetwork], PerImage]) -> float:
        """One Adam step on the mean of the losses that the network gives, one per anchor; the mean before the step."""
        with torch.enable_grad():
            mean = losses(self.network).mean()
            gradients = torch.autograd.grad(mean, list(self.network.parameters()))
        for parameter, gradient in zip(self.network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        self.optimiser.zero_grad()
        return mean.item()

    def save(self) -> dict[str, Tensor]:
        """Copies of the weights and of Adam's moments: all that the next step depends on, on the CPU."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a saved state, bit for bit. ValueError where names or shapes are not this network's."""
        self._check(tensors)
        self.network.load_state_dict({n.removeprefix("network."): t for n, t in tensors.items() if "network." in n})
        state = self.optimiser.state_dict()
        state["state"] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                index, moment = name.split(".")[1:]
                state["state"].setdefault(int(index), {})[moment] = tensor.clone()
        self.optimiser.load_state_dict(state)

    def _check(self, tensors: dict[str, Tensor]) -> None:
        shapes = {f"network.{n}": t.shape for n, t in self.network.state_dict().items()}
        if any(name.startswith("adam.") for name in tensors):
            for index, parameter in enumerate(self.network.parameters()):
                moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.shape) | {"step": torch.Size()}
                shapes |= {f"adam.{index}.{moment}": shape for moment, shape in moments.items()}
        wrong = sorted(n for n in shapes.keys() & tensors.keys() if shapes[n] != tensors[n].shape)
        missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        if missing or extra or wrong:
            raise ValueError(
                "embedding learner: expected the saved state of a network of these sizes, got missing "
                f"{missing or 'none'}, unexpected {extra or 'none'}, of another shape {wrong or 'none'}"
            )
