"""The classifiers: every architecture computes what its published form does, and keeps the promises of their base."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import UserError
from gambeson.models import cifar_resnet, preact_resnet
from gambeson.models.cifar_resnet import CifarResNetSpec
from gambeson.models.classifiers import classifier_header, load_classifier, load_encoder, spec_of
from gambeson.models.files import save_tensors
from gambeson.models.network import ClassifierNetwork, ClassifierSpec
from gambeson.models.noise_conditioned import NoiseConditionedSpec
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.timm_model import TimmSpec, library
from gambeson.models.wideresnet import WideResNet, WideResNetSpec
from gambeson.types import Classifier

GOLDEN = json.loads((Path(__file__).parent / "golden" / "preact_resnet18.json").read_text())
SMALL = {
    "small": ResNetSpec(width=4, multipliers=(1, 3)),
    "wide": WideResNetSpec(depth=10, width=1, activation="relu"),
    "preact": PreActResNetSpec(width=4, mean=(0.4,), std=(0.3,)),
    "cifar": CifarResNetSpec(width=4, blocks=(1, 2, 1, 1), activation="silu"),
}
FEATURES = {"small": 12, "wide": 64, "preact": 32, "cifar": 32}


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Weights that depend on the names' alphabetical order and nothing else (float64 sines)."""
    tensors = model.state_dict()
    for place, name in enumerate(sorted(tensors)):
        value = tensors[name]
        if value.is_floating_point():
            f = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + 1.3 * place).reshape(value.shape)
            scales = 1 + (0.3 if name.endswith("running_var") else 0.2) * f
            weights = f * math.sqrt(2 / value[0].numel()) if value.dim() > 1 else 0.1 * f
            one = value.dim() == 1 and name.endswith(("weight", "running_var"))
            value.copy_(scales if one else weights)
    return model.eval()


def waves(*shape: int) -> Tensor:
    return (0.5 + 0.4 * torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64))).reshape(shape)


def on_meta(spec: ClassifierSpec, classes: int = 10) -> ClassifierNetwork:
    with torch.device("meta"):
        return spec.build(3, classes)


def count(spec: ClassifierSpec, classes: int = 10) -> int:
    return sum(p.numel() for p in on_meta(spec, classes).parameters())


def timm_here() -> None:
    """Skips a test where timm, or a torchvision that fits this torch, is missing."""
    try:
        library()
    except UserError as error:
        pytest.skip(str(error))


def test_networks_have_the_published_numbers_of_parameters() -> None:
    """METHOD 2 and dm_preact_resnet18.json, counted in the authors' codes; ResNet-18 as for CIFAR commonly counted."""
    for activation in ("silu", "relu"):
        assert count(WideResNetSpec(activation=activation)) == 36_479_194
        assert count(WideResNetSpec(activation=activation), 43) == 36_500_347
        assert count(WideResNetSpec(activation=activation), 100) == 36_536_884
        assert count(WideResNetSpec(depth=70, width=16, activation=activation)) == 266_796_506
        assert count(PreActResNetSpec(activation=activation)) == GOLDEN["parameters"] == 12_548_426
        assert count(CifarResNetSpec(activation=activation)) == 11_173_962
    assert count(CifarResNetSpec(blocks=(3, 4, 6, 3))) == 21_282_122


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (22, 3), (34, 20), (94, 16)])
def test_a_wide_resnet_of_any_depth_and_width_has_the_parameters_counted_by_hand(depth: int, width: int) -> None:
    """Convolutions, norms and shortcuts of (depth - 4) / 6 blocks in each of three groups, added up one by one."""
    before, expected = 16, 3 * 16 * 9
    for channels in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            expected += 9 * channels * (before + channels) + 2 * (before + channels)
            expected += before * channels if before != channels else 0
            before = channels
    assert count(WideResNetSpec(depth=depth, width=width)) == expected + 2 * before + 10 * before + 10


def test_a_preact_resnet_computes_what_the_zoos_network_computes() -> None:
    """RobustBench's DMPreActResNet-18; the float64 numbers are with mean and std rounded to float32, as here."""
    spec = PreActResNetSpec()
    with torch.no_grad():
        logits = fill(spec.build(3, 10).double())(waves(2, 3, 32, 32)).flatten()
        single = fill(spec.build(3, 10))(waves(2, 3, 32, 32).float()).flatten()
    expected = GOLDEN["float64"]
    assert logits[:8].tolist() == pytest.approx(expected["first8"], rel=1e-9)
    assert logits.sum().item() == pytest.approx(expected["sum"], rel=1e-9)
    assert logits.norm().item() == pytest.approx(expected["l2"], rel=1e-9)
    assert single[:8].tolist() == pytest.approx(GOLDEN["float32"]["first8"], abs=1e-4 * logits.abs().max().item())


def test_the_names_and_shapes_of_a_preact_resnets_weights_are_the_zoos() -> None:
    own = [[name, list(value.shape)] for name, value in on_meta(PreActResNetSpec()).state_dict().items()]
    assert own == GOLDEN["state_dict"]


@pytest.mark.parametrize(("row", "column", "seen"), [(0, 0, [1.0, 3, 9, 11]), (2, 2, [11.0, 0, 0, 0])])
@pytest.mark.parametrize("branch", ["first convolution", "shortcut"])
@torch.no_grad()
def test_a_halving_preact_block_pads_below_and_right_only(
    row: int, column: int, seen: list[float], branch: str
) -> None:
    """A kernel that picks its top left pixel reads rows and columns 0 and 2; one that picks its bottom right pixel
    reads 2 and 4, the latter beyond the image. The shortcut is a 3x3 kernel with the same padding."""
    block = preact_resnet.Block(1, 1, 2, "relu").eval()
    for layer in (block.conv_2d_1, block.conv_2d_2, block.shortcut):
        nn.init.zeros_(layer.weight)
    (block.conv_2d_1 if branch == "first convolution" else block.shortcut).weight[0, 0, row, column] = 1
    block.conv_2d_2.weight[0, 0, 1, 1] = 1
    block.batchnorm_0.eps = block.batchnorm_1.eps = 0.0
    assert block(torch.arange(1.0, 17).reshape(1, 1, 4, 4))[0, 0].flatten().tolist() == seen


@torch.no_grad()
def test_a_preact_shortcut_sees_its_input_as_it_came() -> None:
    """Negative pixels pass the shortcut; after norm and ReLU they would be zero."""
    block = preact_resnet.Block(1, 2, 1, "relu").eval()
    for layer in (block.conv_2d_1, block.conv_2d_2, block.shortcut):
        nn.init.zeros_(layer.weight)
    block.shortcut.weight[:, 0, 1, 1] = torch.tensor([1.0, 10.0])
    assert block(torch.full((1, 1, 1, 1), -3.0)).flatten().tolist() == [-3.0, -30.0]


@torch.no_grad()
def test_a_cifar_block_is_post_activation() -> None:
    """relu(bn2(conv2(relu(bn1(conv1 x)))) + x), worked by hand for 1x1 images: conv1 = -2, conv2 = 3, norms given."""
    block = cifar_resnet.Block(1, 1, 1, "relu").eval()
    for layer, weight in ((block.conv1, -2.0), (block.conv2, 3.0)):
        nn.init.zeros_(layer.weight)
        layer.weight[0, 0, 1, 1] = weight
    block.bn1.eps = block.bn2.eps = 0.0
    block.bn1.bias.fill_(1.0)
    block.bn2.running_mean.fill_(0.5)
    images = torch.tensor([-4.0, 2.0, 0.25]).reshape(3, 1, 1, 1)
    # -4: relu(8 + 1) = 9, 27 - .5 - 4 = 22.5; 2: relu(-4 + 1) = 0, -.5 + 2 = 1.5; .25: relu(.5) * 3 - .5 + .25 = 1.25
    assert block(images).flatten().tolist() == [22.5, 1.5, 1.25]
    block.bn2.bias.fill_(-100.0)
    assert block(images).flatten().tolist() == [0.0, 0.0, 0.0]


def test_the_names_of_a_cifar_resnets_weights_are_the_usual_ones() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{n}" for n in norm)}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            here = f"layer{stage}.{block}"
            expected |= {f"{here}.conv1.weight", f"{here}.conv2.weight"}
            expected |= {f"{here}.bn{i}.{n}" for i in (1, 2) for n in norm}
            if stage > 1 and block == 0:
                expected |= {f"{here}.shortcut.0.weight", *(f"{here}.shortcut.1.{n}" for n in norm)}
    assert set(on_meta(CifarResNetSpec()).state_dict()) == expected


@pytest.mark.parametrize("name", SMALL)
def test_every_network_keeps_the_promises_of_the_base(name: str) -> None:
    spec, images, before = SMALL[name], waves(3, 3, 16, 16).float(), torch.get_rng_state()
    model = fill(spec.build(3, 5, seed=1))
    assert isinstance(model, ClassifierNetwork)
    assert isinstance(model, Classifier)
    assert isinstance(spec, ClassifierSpec)
    assert (model.spec, model.channels, model.classes) == (spec, 3, 5)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (3, FEATURES[name])
        assert torch.equal(model.logits(features), model(images))
        assert torch.allclose(model(images[1:2]), model(images)[1:2], rtol=1e-3, atol=1e-4)
        assert model(images).std() > 0
    one, same, other = (torch.cat([p.flatten() for p in spec.build(3, 5, s).parameters()]) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    model.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", SMALL)
def test_pixels_are_normalised_inside(name: str) -> None:
    """The first convolution sees (x - mean) / std of the pixels that the network is given, as `normalisation` says."""
    model, images, seen = SMALL[name].build(3, 5).eval(), waves(2, 3, 8, 8).float(), []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in model.normalisation)
    assert torch.allclose(seen[0], (images - mean) / std, atol=1e-6)
    assert not torch.allclose(seen[0], images, atol=0.1)


@pytest.mark.parametrize(("name", "calls"), [("wide", 7), ("preact", 17), ("cifar", 11)])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_every_activation_is_the_specs(name: str, calls: int, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in each block and one at the end (ResNet: at the start), and none of the other kind."""
    counted = {"relu": 0, "silu": 0}

    def counting(kind: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def counts(x: Tensor) -> Tensor:
            counted[kind] += 1
            return function(x)

        return counts

    for kind, function in (("relu", F.relu), ("silu", F.silu)):
        monkeypatch.setattr(F, kind, counting(kind, function))
    replace(SMALL[name], activation=activation).build(3, 5)(waves(2, 3, 8, 8).float())
    assert counted == {"relu": 0, "silu": 0, activation: calls}


@pytest.mark.parametrize("name", SMALL)
def test_files_round_trip_to_the_bit_and_bring_their_architecture(name: str, tmp_path: Path) -> None:
    model, images = fill(SMALL[name].build(3, 5)), waves(2, 3, 8, 8).float()
    path = tmp_path / "c.safetensors"
    save_tensors(path, model.state_dict(), classifier_header(model, (3, 8, 8)))
    for loaded in (load_classifier(path), load_classifier(path, SMALL[name]), load_encoder(path, (3, 8, 8))):
        assert loaded.spec == SMALL[name]
        assert torch.equal(loaded(images), model(images))
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoint_of_another_architecture_is_refused_naming_both(name: str, tmp_path: Path) -> None:
    path, model = tmp_path / "c.safetensors", SMALL[name].build(3, 5)
    wanted = SMALL["preact" if name == "wide" else "wide"]
    save_tensors(path, model.state_dict(), classifier_header(model))
    with pytest.raises(
        UserError, match=rf"expected the weights of {type(wanted).__name__}.*{type(model.spec).__name__}"
    ):
        load_classifier(path, wanted)
    save_tensors(path, model.state_dict(), classifier_header(wanted.build(3, 5)))  # a header that is not the weights'
    with pytest.raises(UserError, match=rf"of a {wanted.__class__.__name__[:-4]}.*got a {type(model).__name__}'s"):
        load_classifier(path)


def test_weights_of_other_sizes_and_headers_of_other_versions_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "c.safetensors", WideResNet(10, 1, 5)
    header = classifier_header(model)
    save_tensors(path, model.state_dict(), {**header, "network": {**header["network"], "depth": 16}})
    with pytest.raises(UserError, match=r"missing \['layer.0.block.1.*asked for with WideResNetSpec\(depth=16"):
        load_classifier(path)
    save_tensors(path, model.state_dict(), {**header, "classes": 4})
    with pytest.raises(UserError, match=r"another shape \['logits.bias', 'logits.weight'\].*4 classes"):
        load_classifier(path)
    with pytest.raises(UserError, match="in this version of gambeson, got depth, groups"):
        spec_of({"class": "WideResNetSpec", "depth": 10, "groups": 2})


@pytest.mark.parametrize(
    "make",
    [
        lambda: PreActResNetSpec(depth=18, width=0),
        lambda: PreActResNetSpec(mean=(0.5,)),
        lambda: PreActResNetSpec().build(1, 10),
        lambda: PreActResNetSpec(width=2, mean=(0.5,), std=(1.0,)).build(1, 3)(torch.zeros(1, 1, 7, 8)),
        lambda: PreActResNetSpec(width=2).build(3, 3)(torch.zeros(1, 1, 8, 8)),
        lambda: CifarResNetSpec(width=0),
        lambda: CifarResNetSpec(blocks=(2, 2, 0, 2)),
        lambda: CifarResNetSpec(std=(0.1, 0.1, 0.0)),
        lambda: CifarResNetSpec().build(4, 10),
        lambda: CifarResNetSpec(width=2).build(3, 3)(torch.zeros(1, 4, 8, 8)),
        lambda: TimmSpec(name=""),
        lambda: TimmSpec(options="[1]"),
        lambda: TimmSpec(options="img_size=32").build(3, 10),
        lambda: TimmSpec(options='{"num_classes": 3}'),
        lambda: TimmSpec(std=(0.5,)),
    ],
)
def test_impossible_networks_and_images_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="expected"):
        make()


def test_unknown_architectures_and_noise_conditioned_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"CifarResNetSpec.*nearest first.*'CifarResnet'"):
        spec_of({"class": "CifarResnet"})
    path, model = tmp_path / "n.safetensors", NoiseConditionedSpec(width=8).build(1, 3)
    save_tensors(path, model.state_dict(), classifier_header(model))
    assert load_encoder(path).spec == model.spec
    with pytest.raises(UserError, match="noise-conditioned"):
        load_classifier(path)


def test_odd_image_sizes_pass_where_nothing_forbids_them() -> None:
    for name, side in (("preact", 28), ("preact", 9), ("cifar", 7), ("small", 9)):
        assert SMALL[name].build(3, 5)(waves(2, 3, side, side).float()).shape == (2, 5)


def test_a_missing_or_broken_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"expected the timm library with a torchvision.*gambeson\[timm\]"):
        TimmSpec().build(3, 10)


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("resnet18", "{}", 32),
        ("vit_tiny_patch16_224", '{"img_size": 32, "patch_size": 8}', 32),
        ("mobilenetv3_small_050", "{}", 32),
        ("resnetv2_50", "{}", 32),  # its last layer is a convolution
    ],
)
def test_timms_models_keep_the_promises_of_the_base(name: str, options: str, side: int, tmp_path: Path) -> None:
    timm_here()
    spec = TimmSpec(name=name, options=options, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images, before = waves(2, 3, side, side).float(), torch.get_rng_state()
    model = spec.build(3, 5, seed=1).eval()
    assert torch.equal(before, torch.get_rng_state())
    normal = (images - torch.tensor(spec.mean).reshape(3, 1, 1)) / torch.tensor(spec.std).reshape(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(model(images), model.net(normal), atol=1e-5)
        assert torch.equal(model.logits(model.features(images)), model(images))
        assert model(images).std() > 0
    assert next(on_meta(TimmSpec(name=name, options=options, pretrained=True), 5).parameters()).is_meta
    path = tmp_path / "c.safetensors"
    model.spec = TimmSpec(name=name, options=options, mean=spec.mean, std=spec.std, pretrained=True)
    save_tensors(path, model.state_dict(), classifier_header(model))
    loaded = load_classifier(path)  # nothing is downloaded for weights that are in the file
    assert loaded.spec == model.spec
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TimmSpec(name="resnet181"), "nearest resnet18"),
        (TimmSpec(name="resnet18", options='{"img_size": 32}'), "img_size"),
        (TimmSpec(name="resnet18.nope"), "nope"),
        (TimmSpec(name="deit_tiny_distilled_patch16_224"), "one last layer"),
        (TimmSpec(name="volo_d1_224"), "its last layer of its pre-logits"),
    ],
)
def test_what_timm_does_not_have_is_refused(spec: TimmSpec, message: str) -> None:
    timm_here()
    with pytest.raises(UserError, match=message):
        spec.build(3, 5)


def test_images_of_another_size_than_a_timm_model_is_made_for_are_refused() -> None:
    timm_here()
    model = TimmSpec(name="vit_tiny_patch16_224", options='{"img_size": [32, 64]}').build(3, 5).eval()
    assert model(torch.zeros(1, 3, 32, 64)).shape == (1, 5)
    with pytest.raises(UserError, match="expected 32x64 pixels"):
        model(torch.zeros(1, 3, 32, 32))


def test_a_networks_last_layer_may_be_replaced() -> None:
    """`logits` is not a second copy of the layer: who changes one changes the other."""
    for name, layer in (("small", "head"), ("cifar", "linear")):
        model, images = SMALL[name].build(3, 5).eval(), waves(2, 3, 8, 8).float()
        setattr(model, layer, nn.Linear(FEATURES[name], 2))
        assert model(images).shape == (2, 2)
        assert torch.equal(model(images), F.linear(model.features(images), *getattr(model, layer).parameters()))
        assert not any(key.startswith("logits") for key in model.state_dict())
