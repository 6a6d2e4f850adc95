"""How an attack sees a network: its logits and slopes, in the precision of the search, in parts that fit the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gambeson.robustness.attack_losses import AttackLoss, Network, NoGradient, frozen, true_float32
from gambeson.robustness.inputs import Portions
from gambeson.types import Images, Labels, Logits, PerImage

Precision = Literal["float32", "bfloat16"]
"""Of the search; verdicts are always those of the network's own precision."""


@dataclass(frozen=True)
class Slope:
    """What a look with a gradient finds at x."""

    logits: Tensor  # [b, K]
    value: Tensor  # [b] the loss
    gradient: Tensor  # [b, C, H, W]


class View:
    """A network as attacks see it.

    Images go in in the caller's precision; with `precision` bfloat16 the search runs under autocast, and no image
    counts as fooled before the network has said so in full precision (`confirm`). Out of memory halves the part of a
    batch that goes through at once, and says so. `asked` counts looks of the whole batch.

    A slope that is not a number is taken for 0, so that the search goes on; the evaluation's checks tell of it.
    """

    def __init__(self, model: Network, precision: Precision = "float32", most: int | None = None) -> None:
        self.model, self.precision, self.portions, self.asked = model, precision, Portions(most), 0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the network is in eval mode, its parameters ask for no gradient, and float32 is float32."""
        with frozen(self.model), true_float32():
            yield

    def logits(self, x: Images) -> Logits:
        """[b, K] in the images' precision, without gradients."""
        self.asked += 1
        return self.portions.each(lambda part: (self._call(part),), x)[0]

    def slope(self, loss: AttackLoss, x: Images, labels: Labels, target: Labels, times: int = 1) -> Slope:
        """Logits, loss [b] and its gradient at x, the means of `times` looks (expectation over transformations, for
        networks that draw; Athalye et al. 2018). Raises NoGradient where autograd cannot follow the network."""
        self.asked += times
        found = [self.portions.each(lambda *part: self._climb(loss, *part), x, labels, target) for _ in range(times)]
        return Slope(*(found[0] if times == 1 else (torch.stack(each).mean(0) for each in zip(*found, strict=True))))

    def jacobian(self, x: Images) -> tuple[Logits, Tensor]:
        """Logits [b, K] and the gradients of each of them, [b, K, C, H, W]: K backward passes."""
        self.asked += 1
        logits, gradients = self.portions.each(self._all_slopes, x)
        return logits, gradients

    def confirm(self, x: Images, labels: Labels, right: Tensor) -> Tensor:
        """[b] `right`, but True again where a search in low precision was fooled and the network itself is not."""
        fooled = (~right).nonzero().flatten()
        if self.precision == "float32" or not len(fooled):
            return right
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            (held,) = self.portions.each(
                lambda part, own: (self.model(part).argmax(1) == own,), x[fooled], labels[fooled]
            )
        right = right.clone()
        right[fooled[held]] = True
        return right

    def _call(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._through(x)

    def _through(self, x: Tensor) -> Tensor:
        low = self.precision == "bfloat16"
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=low):
            return self.model(_channels_last(x)).to(x.dtype)

    def _climb(self, loss: AttackLoss, x: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, PerImage, Images]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self._through(x)
            value = loss(logits, labels, target)
            gradient = _gradient(value.sum(), x)
        return logits.detach(), value.detach(), gradient

    def _all_slopes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self._through(x)
            each = [_gradient(z.sum(), x, again=True) for z in logits.unbind(1)]
        return logits.detach(), torch.stack(each, 1)


def _gradient(value: Tensor, x: Tensor, again: bool = False) -> Tensor:
    found = torch.autograd.grad(value, x, allow_unused=True, retain_graph=again) if value.requires_grad else (None,)
    if found[0] is None:
        raise NoGradient(
            "attack: expected logits that depend on the images through autograd, got none. Usually the network "
            "detaches, rounds through numpy or runs under no_grad; give the attack the differentiable network"
        )
    return torch.where(found[0].isfinite(), found[0], 0)


def _channels_last(x: Tensor) -> Tensor:
    """Images as convolutions like them best: the same numbers, channels innermost."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
