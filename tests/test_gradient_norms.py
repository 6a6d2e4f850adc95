"""Norms of per-image gradients: equal to those of plain autograd, image by image, for every architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import UserError
from gambeson.models.cifar_resnet import CifarResNetSpec
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.robustness.losses import TRADES, PGDAdversarial
from gambeson.synthesis import gradient_norms, layer_gradients
from gambeson.synthesis.gradient_norms import ParameterNorms, cross_entropy, input_norms, last_layer_norms
from gambeson.synthesis.layer_gradients import outer_squares

GREY = {"mean": (0.5,), "std": (0.25,)}
NETWORKS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "resnet": (ResNetSpec(width=4, blocks=2), (1, 8, 8)),
    "resnet, odd sides": (ResNetSpec(width=3), (3, 9, 11)),
    "wideresnet": (WideResNetSpec(depth=10, width=1), (3, 16, 16)),
    "wideresnet, relu": (WideResNetSpec(depth=10, width=2, activation="relu", **GREY), (1, 12, 8)),
    "preact": (PreActResNetSpec(width=4), (3, 16, 16)),
    "preact, odd sides": (PreActResNetSpec(width=3, **GREY), (1, 9, 13)),
    "cifar resnet": (CifarResNetSpec(width=4, blocks=(1, 1, 1, 1)), (3, 16, 16)),
}
LOSS = Callable[..., Tensor]


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode and double precision, its batch norms as after a training: other statistics, weights and biases."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=g))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=g) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=g))
                module.bias.copy_(torch.randn(module.bias.shape, generator=g))
    return model.double().eval()


def images_of(shape: tuple[int, ...], count: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, generator=g, dtype=torch.float64), torch.arange(count) % 3


def looped(model: nn.Module, loss: LOSS, *inputs: Tensor) -> dict[str, Tensor]:
    """The reference: the gradient of one image after another by autograd, parameter by parameter; squared norms."""
    model.requires_grad_(True)
    rows = []
    for i in range(len(inputs[0])):
        model.zero_grad()
        loss(model, *(t[i : i + 1] for t in inputs)).sum().backward()
        rows.append([0.0 if p.grad is None else float(p.grad.square().sum()) for p in model.parameters()])
    model.requires_grad_(False)
    table = torch.tensor(rows, dtype=torch.float64)
    return {name: table[:, j] for j, (name, _) in enumerate(model.named_parameters())}


def assert_exact(model: nn.Module, loss: LOSS, *inputs: Tensor, way: str = "ghost") -> None:
    norms = ParameterNorms(model, loss)
    found, wanted = norms.squares(*inputs), looped(model, loss, *inputs)
    assert (norms.way, set(found)) == (way, set(wanted)), norms.reason
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].sqrt(), value.sqrt(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norms(*inputs), sum(wanted.values()) ** 0.5, rtol=1e-10, atol=0)


def trades(model: Any, images: Tensor, moved: Tensor, labels: Tensor) -> Tensor:
    return TRADES(statistics="both", beta=3.0).value(model, images, moved, labels)


def attacked(model: Any, images: Tensor, moved: Tensor, labels: Tensor) -> Tensor:
    return PGDAdversarial().value(model, images, moved, labels)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_architecture_and_loss_equals_the_loop_over_images(name: str) -> None:
    """Parameter by parameter to 1e-10 in float64: cross-entropy, and the robust losses at attacked images."""
    spec, shape = NETWORKS[name]
    model = lively(spec.build(shape[0], 3, seed=2))
    images, labels = images_of(shape)
    moved = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    assert_exact(model, cross_entropy, images, labels)
    assert_exact(model, trades, images, moved, labels)
    assert_exact(model, attacked, images, moved, labels)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_layer_and_the_input_equal_the_loop(name: str) -> None:
    spec, shape = NETWORKS[name]
    model = lively(spec.build(shape[0], 3, seed=2))
    images, labels = images_of(shape)
    wanted = looped(model, cross_entropy, images, labels)
    last = {n for n, m in model.named_modules() if m is model.logits}.pop()
    expected = (wanted[f"{last}.weight"] + wanted[f"{last}.bias"]).sqrt()
    torch.testing.assert_close(last_layer_norms(model, images, labels), expected, rtol=1e-10, atol=0)
    found = input_norms(model, images, labels)
    for i, image in enumerate(images):
        x = image[None].clone().requires_grad_()
        cross_entropy(model, x, labels[i : i + 1]).sum().backward()
        assert float(found[i]) == pytest.approx(float(x.grad.norm()), rel=1e-10)  # type: ignore[union-attr]


class Layers(nn.Module):
    """Some layers, then pixels averaged and a linear layer on what is left."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.layers, self.last = nn.Sequential(*layers), nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layers(images).flatten(2).mean(2))


CONVOLUTIONS = {
    "stride": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "uneven stride and padding": nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(0, 2), bias=False),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, padding=1),
    "dilation": nn.Conv2d(4, 2, 3, dilation=2),
    "same": nn.Conv2d(4, 5, (3, 4), padding="same", dilation=(2, 1)),
    "valid": nn.Conv2d(4, 5, 3, padding="valid"),
    "pointwise": nn.Conv2d(4, 40, 1, stride=2),
    "whole image": nn.Conv2d(4, 40, 7),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_kind_of_convolution(name: str) -> None:
    layer = CONVOLUTIONS[name]
    model = lively(Layers(nn.Conv2d(2, 4, 2), nn.SiLU(), layer, nn.SiLU(), width=layer.out_channels))
    assert_exact(model, cross_entropy, *images_of((2, 8, 8)))


def test_norms_without_and_with_affine_parameters_and_linear_layers_on_pixels() -> None:
    layers = [
        nn.Conv2d(2, 6, 3),
        nn.GroupNorm(3, 6),
        nn.SiLU(),
        nn.LayerNorm([6, 5, 6]),
        nn.BatchNorm2d(6, affine=False),
    ]
    model = Layers(*layers, nn.LayerNorm(6), nn.Linear(6, 7), nn.Flatten(2), nn.BatchNorm1d(6), width=6)
    assert_exact(lively(model), cross_entropy, *images_of((2, 7, 8)))


class Twice(nn.Module):
    """One convolution and one norm called three times, a layer that is never used and a dead end."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.unused, self.dead, self.last = nn.Linear(3, 3), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.enter(images)
        for _ in range(3):
            x = x + self.conv(F.silu(self.norm(x)))
        self.dead(x.mean((2, 3)))
        return self.last(x.mean((2, 3)))


def test_layers_that_are_called_several_times_are_exact() -> None:
    """The norm of the sum of the calls' gradients, not the root of the sum of their squares."""
    assert_exact(lively(Twice()), cross_entropy, *images_of((1, 8, 8)))


class Positions(Layers):
    """A parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.SiLU(), width=4)
        self.shift = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, images: Tensor) -> Tensor:
        return self.last((self.layers[0](images) * self.shift).flatten(2).mean(2))


class Shared(Layers):
    """Two layers with the same weight."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), width=4)
        self.layers[3].weight = self.layers[1].weight


class Around(Layers):
    """A weight that is used past its layer."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + F.linear(images.flatten(1)[:, :4], self.last.weight)


class Merging(Layers):
    """A layer that is given the pixels as if they were images."""

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layers(images).permute(0, 2, 3, 1).flatten(0, 2)).unflatten(0, (len(images), -1)).mean(1)


class Own(nn.Conv2d):
    """Derived from a known layer, and another one."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


class Activated(nn.BatchNorm2d):
    """As in timm: a norm with an activation inside."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


STRANGE = {
    "parameter without a layer": lambda: Positions(),
    "shared parameters": lambda: Shared(),
    "weight used past its layer": lambda: Around(nn.Conv2d(1, 4, 3), width=4),
    "pixels as images": lambda: Merging(nn.Conv2d(1, 4, 3), width=4),
    "derived layer": lambda: Layers(Own(1, 4, 3), width=4),
    "norm with activation": lambda: Layers(nn.Conv2d(1, 4, 3), Activated(4), width=4),
    "unknown layer": lambda: Layers(nn.Conv2d(1, 4, 3), nn.PReLU(4), width=4),
    "circular padding": lambda: Layers(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), width=4),
    "normed weights": lambda: Layers(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), width=4),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_ghost_norms_cannot_follow_goes_the_slower_way_and_is_exact(name: str) -> None:
    torch.manual_seed(0)
    assert_exact(lively(STRANGE[name]()), cross_entropy, *images_of((1, 8, 8)), way="vmap")


def test_what_no_way_can_follow_is_refused() -> None:
    class Deciding(Positions):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * (1.0 if float(images.sum()) > 3 else 2.0)

    with pytest.raises(UserError, match="expected layers of the kinds Linear, Conv2d"):
        ParameterNorms(lively(Deciding()), cross_entropy)(*images_of((1, 8, 8)))


def test_models_whose_images_depend_on_each_other_are_refused() -> None:
    model = ResNetSpec(width=2).build(1, 3)
    with pytest.raises(UserError, match="eval mode"):
        ParameterNorms(model.train(), cross_entropy)
    mixing = Layers(nn.BatchNorm2d(1, track_running_stats=False), width=1)
    with pytest.raises(UserError, match="running statistics"):
        ParameterNorms(mixing.eval(), cross_entropy)


def test_the_batch_its_order_and_the_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(NETWORKS["wideresnet"][0].build(3, 3))
    images, labels = images_of((3, 16, 16), count=7)
    whole = ParameterNorms(model, cross_entropy)(images, labels)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ParameterNorms(model, cross_entropy)(images[order], labels[order]), whole[order])
    monkeypatch.setattr(layer_gradients, "ROOM", 1)
    torch.testing.assert_close(ParameterNorms(model, cross_entropy)(images, labels), whole, rtol=1e-12, atol=0)
    strange = lively(Positions())
    images, labels = images_of((1, 8, 8))
    norms = ParameterNorms(strange, cross_entropy)(images, labels)
    monkeypatch.setattr(gradient_norms, "ROOM", 1)
    torch.testing.assert_close(ParameterNorms(strange, cross_entropy)(images, labels), norms, rtol=1e-12, atol=0)


def test_both_ways_of_a_layer_are_equal() -> None:
    """Few places: by Gram matrices; many: the gradient itself."""
    g = torch.Generator().manual_seed(0)
    for d, o, t in ((30, 20, 3), (3, 2, 50), (30, 20, 1), (1, 1, 4)):
        a, b = (torch.randn(4, n, t, generator=g, dtype=torch.float64) for n in (d, o))
        expected = torch.einsum("ndt,not->ndo", a, b).square().sum((1, 2))
        torch.testing.assert_close(outer_squares(a, b), expected, rtol=1e-12, atol=0)


def test_the_model_is_left_as_it_was() -> None:
    model = lively(ResNetSpec(width=2).build(1, 3))
    flags = [bool(i % 2) for i, _ in enumerate(model.parameters())]
    for p, flag in zip(model.parameters(), flags, strict=True):
        p.requires_grad_(flag)
    images, labels = images_of((1, 8, 8))
    ParameterNorms(model, cross_entropy)(images, labels)
    input_norms(model, images, labels)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not images.requires_grad


def test_sure_networks_and_their_float32_norms() -> None:
    """A loss without a slope has norm 0 exactly, and float32 is near float64."""
    model = lively(WideResNetSpec(depth=10, width=1).build(3, 3))
    images, labels = images_of((3, 16, 16))
    exact = ParameterNorms(model, cross_entropy)(images, labels)
    near = ParameterNorms(model.float(), cross_entropy)(images.float(), labels)
    torch.testing.assert_close(near, exact, rtol=1e-4, atol=0)
    with torch.no_grad():
        model.logits.weight.mul_(1e6)
    sure = model(images.float()).argmax(1)
    assert ParameterNorms(model, cross_entropy)(images.float(), sure).tolist() == [0.0] * 5


def test_a_last_layer_that_is_not_linear_is_refused() -> None:
    model = WideResNetSpec(depth=10, width=1, **GREY).build(1, 3).eval()
    model.logits = nn.Sequential(model.logits)  # type: ignore[assignment]
    with pytest.raises(UserError, match="a linear last layer"):
        last_layer_norms(model, *images_of((1, 8, 8)))


def test_trades_at_its_own_point_has_the_clean_terms_gradient() -> None:
    """Where x' = x the KL is flat in every parameter: only the cross-entropy is left."""
    model = lively(ResNetSpec(width=3).build(1, 3))
    images, labels = images_of((1, 8, 8))
    clean = ParameterNorms(model, cross_entropy)(images, labels)
    torch.testing.assert_close(ParameterNorms(model, trades)(images, images, labels), clean, rtol=1e-9, atol=1e-12)
