"""The norm of each image's loss gradient, exact, a whole batch at once: of all parameters, the last layer, the input.

Of parameters by ghost norms (`layer_gradients`), from one backward pass that forms no gradient of a parameter. Whatever
a network does that these cannot follow is found out beforehand, and goes the slower way of torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from gambeson.errors import UserError, require
from gambeson.models.network import ClassifierNetwork
from gambeson.robustness.attack_losses import frozen
from gambeson.synthesis.layer_gradients import KINDS, Squares, Use, is_known, squared, wide_type
from gambeson.types import Images, Labels, PerImage

Loss = Callable[..., Tensor]
"""(model, *inputs) -> [B], a number for each image; whenever it calls the model, then with B images in their order."""


ROOM = 1 << 26
"""Numbers in the gradients of images that the slower way holds at once: 256 MiB of float32."""


class _Unsuited(UserError):
    """A network that ghost norms cannot follow."""


def cross_entropy(model: Any, images: Images, labels: Labels) -> PerImage:
    """-log p_y of each image: the classifier's loss."""
    return F.cross_entropy(model(images), labels, reduction="none")


def input_norms(model: Any, images: Images, labels: Labels) -> PerImage:
    """[B] L2 norms of the cross-entropy's gradient with respect to the pixels in [0, 1]."""
    with frozen(model), torch.enable_grad():
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model, images, labels).sum(), images)
    return gradient.flatten(1).norm(dim=1)


@torch.no_grad()
def last_layer_norms(model: ClassifierNetwork, images: Images, labels: Labels) -> PerImage:
    """[B] norms of the cross-entropy's gradient with respect to the last layer: ||p - onehot(y)|| sqrt(||phi||^2 + 1).

    phi are the features before it; without a bias the 1 is left out. UserError for a last layer that is not linear.
    """
    layer = model.logits
    require(type(layer) is nn.Linear, "last layer's gradient norm", "a linear last layer", type(layer).__name__)
    phi = model.features(images)
    logits = layer(phi)
    slope = logits.softmax(1) - F.one_hot(labels, logits.shape[1]).to(logits)
    return slope.norm(dim=1) * (phi.square().sum(1) + int(layer.bias is not None)).sqrt()


@dataclass
class ParameterNorms:
    """[B] L2 norms of each image's gradient with respect to all parameters, frozen ones included, of a loss.

    Called with the loss's inputs, each with one row per image. The model is in eval mode. Before the first batch the
    ghost norms of two images of noise are compared, parameter by parameter, with plain autograd: what differs, and
    layers of unknown kind, parameters that several layers share or that no layer owns, take the slower way (`way`).
    Layers that are called several times are exact in either. Raises UserError for a model in training mode, for batch
    norms without running statistics, and where no way is left.
    """

    model: nn.Module
    loss: Loss
    way: Literal["ghost", "vmap"] | None = field(default=None, init=False)
    reason: str = field(default="", init=False)

    def __post_init__(self) -> None:
        _check_mode(self.model)

    def __call__(self, *inputs: Tensor) -> PerImage:
        """Inputs [B, ...] -> [B]."""
        return torch.stack(list(self.squares(*inputs).values())).sum(0).sqrt()

    def squares(self, *inputs: Tensor) -> Squares:
        """The squared norms of every parameter by its name."""
        if self.way is None:
            self._choose(inputs)
        if self.way == "ghost":
            return self._ghost(self.loss, inputs)
        return _one_by_one(self.model, self.loss, inputs)

    @cached_property
    def _layers(self) -> dict[str, nn.Module]:
        return _layers_of(self.model)

    def _ghost(self, loss: Loss, inputs: Sequence[Tensor]) -> Squares:
        count = len(inputs[0])
        with frozen(self.model), torch.enable_grad(), _watched(self._layers, count) as watch:
            given = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
            moving = [t for t in given if t.requires_grad]
            torch.autograd.grad(loss(self.model, *given).sum(), moving, allow_unused=True)
            return watch.finished(inputs[0])

    def _choose(self, inputs: Sequence[Tensor]) -> None:
        """Ghost norms where they are right for this network."""
        samples = [t for t in map(_noise_like, inputs) if t is not None]
        try:
            found, wanted = self._ghost(_probe, samples), _looped(self.model, _probe, samples)
            wrong = _different(found, wanted)
            self.way, self.reason = ("vmap", f"other gradients of {wrong[0]}") if wrong else ("ghost", "")
        except _Unsuited as error:
            self.way, self.reason = "vmap", str(error)


def _check_mode(model: nn.Module) -> None:
    """UserError where an image's loss depends on the others of its batch, or on draws."""
    training = [name for name, module in model.named_modules() if module.training]
    require(not training, "gradient norms", "a model in eval mode (model.eval())", training[:1])
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    require(not norms, "gradient norms", "batch norms with running statistics, one image not to mix with others", norms)


def _probe(model: Any, *images: Tensor) -> Tensor:
    """A sum of logits with fixed weights: no probability is so sure that its gradient is gone, as a loss's may be."""
    logits = [model(each) for each in images]
    weights = torch.arange(1, logits[0].shape[1] + 1).to(logits[0]).cos()
    return torch.stack(logits).sum(0) @ weights


def _noise_like(given: Tensor) -> Tensor | None:
    """Two images of noise for an input that has images."""
    if not given.is_floating_point():
        return None
    stream = torch.Generator().manual_seed(0)
    return torch.rand(2, *given.shape[1:], generator=stream, dtype=given.dtype).to(given.device)


def _different(found: Squares, wanted: Squares) -> list[str]:
    """Parameters whose norms are not those of autograd."""
    total = torch.stack(list(wanted.values())).sum(0).sqrt()
    zero = torch.zeros_like(total)
    gaps = {name: (found.get(name, zero).sqrt() - value.sqrt()).abs() for name, value in wanted.items()}
    far = [name for name, gap in gaps.items() if not bool((gap <= 1e-3 * wanted[name].sqrt() + 1e-6 * total).all())]
    return far + [name for name in found if name not in wanted]


def _looped(model: nn.Module, loss: Loss, inputs: Sequence[Tensor]) -> Squares:
    """By plain autograd, image by image: for two images only."""
    named, rows = dict(model.named_parameters()), []
    with _trainable(named.values()), torch.enable_grad():
        for i in range(len(inputs[0])):
            one = loss(model, *(t[i : i + 1] for t in inputs)).sum()
            found = torch.autograd.grad(one, list(named.values()), allow_unused=True)
            rows.append([one.new_zeros(()) if g is None else squared(g[None])[0] for g in found])
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(named)}


@contextmanager
def _trainable(parameters: Any) -> Iterator[None]:
    """Inside, these parameters have gradients."""
    before = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in before:
            p.requires_grad_(True)
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)


def _one_by_one(model: nn.Module, loss: Loss, inputs: Sequence[Tensor]) -> Squares:
    """Every image's gradient itself, several at a time (torch.func): for any network that torch.func follows."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def of_one(parameters: dict[str, Tensor], *one: Tensor) -> Tensor:
        def call(images: Tensor) -> Tensor:
            return functional_call(model, (parameters, buffers), (images,))

        return loss(call, *(t[None] for t in one))[0]

    size = max(ROOM // max(sum(p.numel() for p in parameters.values()), 1), 1)
    each = vmap(grad(of_one), in_dims=(None, *(0 for _ in inputs)))
    found: list[Squares] = []
    for part in zip(*(t.detach().split(size) for t in inputs), strict=True):
        try:
            found.append({name: squared(g) for name, g in each(parameters, *part).items()})
        except RuntimeError as error:
            raise UserError(
                f"gradient norms: expected layers of the kinds {', '.join(k.__name__ for k in KINDS)}, each parameter "
                f"in one of them, or a network that torch.func follows; got {type(model).__name__} ({error}). Score by "
                "another network, or by LastLayerGradientNorm"
            ) from error
    return {name: torch.cat([squares[name] for squares in found]) for name in parameters}


@dataclass(eq=False)
class _Call:
    """One call of a layer; g: the loss's gradient with respect to what came out, once it is there."""

    x: Tensor
    g: Tensor | None = None


class _Watch:
    """The calls of each layer; a layer's norms are computed as soon as the gradients of all its calls are there."""

    def __init__(self, layers: dict[str, nn.Module], count: int) -> None:
        self.layers, self.count = layers, count
        self.calls: dict[str, list[_Call]] = {name: [] for name in layers}
        self.found: Squares = {}

    def seen(self, name: str, given: tuple[Any, ...], out: Any) -> None:
        """Notes a call (forward hook)."""
        if not given or not isinstance(out, Tensor) or not out.requires_grad:
            return  # what is missed so is told by the comparison with autograd
        call = _Call(given[0].detach())
        self.calls[name].append(call)
        out.register_hook(lambda gradient: self._arrived(name, call, gradient))

    def _arrived(self, name: str, call: _Call, gradient: Tensor) -> None:
        call.g = gradient
        if all(each.g is not None for each in self.calls[name]):
            self._finish(name)

    def _finish(self, name: str) -> None:
        uses = [Use(call.x, call.g) for call in self.calls[name] if call.g is not None]
        self.calls[name] = []
        odd = [list(use.x.shape) for use in uses if not len(use.x) == len(use.g) == self.count]
        if odd:
            raise _Unsuited(f"{name} is given {odd[0]} for {self.count} images")
        layer = self.layers[name]
        for parameter, squares in KINDS[type(layer)](layer, uses) if uses else ():
            self.found[_named(name, parameter)] = squares

    def finished(self, like: Tensor) -> Squares:
        """All norms; 0 where the loss does not depend on a layer."""
        for name in self.layers:
            self._finish(name)
        nothing = torch.zeros(len(like), device=like.device, dtype=wide_type(like))
        names = [_named(n, p) for n, m in self.layers.items() for p, _ in m.named_parameters(recurse=False)]
        return {name: self.found.get(name, nothing) for name in names}


def _named(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that own the parameters, by name. _Unsuited for kinds that are not known, and shared parameters."""
    owners = {n: m for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    strange = [f"{name} ({type(m).__name__})" for name, m in owners.items() if not is_known(m)]
    if strange:
        raise _Unsuited(f"{strange[0]} is no layer of the kinds {', '.join(k.__name__ for k in KINDS)}")
    owned = [id(p) for m in owners.values() for p in m.parameters(recurse=False)]
    if len(set(owned)) < len(owned):
        raise _Unsuited("layers share a parameter")
    return owners


@contextmanager
def _watched(layers: dict[str, nn.Module], count: int) -> Iterator[_Watch]:
    """Inside, every call of a layer is noted."""
    watch = _Watch(layers, count)
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(lambda module, given, out, name=name: watch.seen(name, given, out))
            stack.callback(hook.remove)
        yield watch
