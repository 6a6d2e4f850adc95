"""The networks that steer guidance: wide residual networks, noise-conditioned classifiers, their files and training."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gambeson.canonical import digest
from gambeson.data.datasets import Digits, ImageSet
from gambeson.errors import UserError
from gambeson.heritage import heritage_of
from gambeson.models.classifiers import classifier_header, load_classifier, load_encoder
from gambeson.models.files import load_tensors, load_weights, save_tensors
from gambeson.models.noise_conditioned import NoiseConditionedClassifier, NoiseConditionedSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.wideresnet import Block, WideResNet, WideResNetSpec, zoo_state_dict
from gambeson.robustness.losses import TRADES, Plain
from gambeson.store import Store, Workspace
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, train_classifier
from gambeson.training.loop import Optimisation
from gambeson.training.noise_conditioned import NoisyEncoderTraining, noised, train_noise_conditioned
from gambeson.types import Classifier

# Made by RobustBench's DMWideResNet (commit 78fcc9e) with weights and images of `fill` and `waves`: the logits of two
# images, in float64 with the means and deviations of the pixels rounded to float32. WRN-10-2 has blocks with a
# shortcut only, WRN-16-2 has both kinds; halving with another padding moves the latter's logits by up to 1488.
GOLDEN = {
    10: {
        "first": [-12.2799393054717, 4.559917667480526, 11.769228479937434, -6.114202112716629],
        "sum": -6.8576302671014915,
        "norm": 42.79828832652645,
    },
    16: {
        "first": [3017.651176511482, -106.12397028765622, -3004.068128253862, 494.0169777066704],
        "sum": 3931.9780699446706,
        "norm": 9741.296630147444,
    },
}
SHORT = Optimisation(steps=12, batch_size=16, learning_rate=1e-3, momentum=0.0)
NOISY = NoisyEncoderTraining(network=NoiseConditionedSpec(width=8), optimisation=SHORT, validations=3)
GRAY = WideResNetSpec(depth=10, width=1, mean=(0.5,), std=(0.5,))
WIDE = ClassifierTraining(
    network=GRAY, loss=Plain(), optimisation=SHORT, validations=1, threat=ThreatModel(epsilon=0.1)
)


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return Digits(train_images=300, validation_images=150).load()


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


def noise_conditioned(seed: int = 0, **spec: int) -> NoiseConditionedClassifier:
    """A network none of whose weights is zero."""
    network = NoiseConditionedSpec(width=8, **spec).build(1, 3, seed).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return network


def parameters(*architecture: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in WideResNet(*architecture).parameters())


def test_wide_resnets_have_the_published_numbers_of_parameters() -> None:
    """METHOD 2, counted in the authors' code."""
    assert parameters(28, 10, 10) == 36_479_194
    assert parameters(28, 10, 43) == 36_500_347
    assert parameters(28, 10, 100) == 36_536_884
    assert parameters(70, 16, 10) == 266_796_506


@pytest.mark.parametrize("depth", [10, 16])
def test_a_wide_resnet_computes_what_the_zoos_network_computes(depth: int) -> None:
    golden = GOLDEN[depth]
    model = fill(WideResNet(depth, 2).double())
    with torch.no_grad():
        logits = model(waves(2, 3, 32, 32)).flatten()
        single = fill(WideResNet(depth, 2))(waves(2, 3, 32, 32).float()).flatten()
    largest = logits.abs().max().item()
    assert logits[:4].tolist() == pytest.approx(golden["first"], rel=1e-9, abs=1e-9 * largest)
    assert logits.sum().item() == pytest.approx(golden["sum"], rel=1e-9)
    assert logits.norm().item() == pytest.approx(golden["norm"], rel=1e-9)
    assert single[:4].tolist() == pytest.approx(golden["first"], abs=1e-4 * largest)


def test_the_names_of_the_weights_are_the_zoos() -> None:
    """Written out from the layout of RobustBench's files; mean and std of the pixels are not among them."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"init_conv.weight", "logits.weight", "logits.bias", *(f"batchnorm.{n}" for n in norm)}
    for group, block in itertools.product(range(3), range(2)):
        here = f"layer.{group}.block.{block}"
        expected |= {f"{here}.conv_0.weight", f"{here}.conv_1.weight"}
        expected |= {f"{here}.batchnorm_{i}.{n}" for i in (0, 1) for n in norm}
        expected |= {f"{here}.shortcut.weight"} if block == 0 else set()
    assert set(WideResNet(16, 2).state_dict()) == expected


@pytest.mark.parametrize(("row", "column", "seen"), [(0, 0, [1.0, 3, 9, 11]), (2, 2, [11.0, 0, 0, 0])])
@torch.no_grad()
def test_a_halving_convolution_pads_below_and_right_only(row: int, column: int, seen: list[float]) -> None:
    """A kernel that picks its top left pixel reads rows and columns 0 and 2; one that picks its bottom right pixel
    reads 2 and 4, the latter beyond the image. With symmetric padding they would read -1 and 1, and 1 and 3."""
    block = Block(1, 2, 2, "relu").eval()
    for layer in (block.conv_0, block.conv_1, block.shortcut):
        nn.init.zeros_(layer.weight)
    block.conv_0.weight[0, 0, row, column] = 1
    block.conv_1.weight[0, 0, 1, 1] = 1
    block.batchnorm_0.eps = block.batchnorm_1.eps = 0.0
    assert block(torch.arange(1.0, 17).reshape(1, 1, 4, 4))[0, 0].flatten().tolist() == seen


def test_features_are_the_layer_before_the_logits_and_of_each_image_alone() -> None:
    model, images = fill(WideResNet(10, 2)), waves(3, 3, 32, 32).float()
    assert isinstance(model, Classifier)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (3, 128)
        assert torch.equal(model.logits(features), model(images))
        assert torch.allclose(model.features(images[1:2]), features[1:2], rtol=1e-4, atol=1e-5)
        model.batchnorm.running_mean += 1.0
        assert not torch.allclose(model.features(images), features)
        model.batchnorm.running_mean -= 1.0
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items() if "running_mean" not in n)
    model.train()(images)
    assert not torch.equal(model.state_dict()["batchnorm.running_var"], before["batchnorm.running_var"])


def test_pixels_are_normalised_inside() -> None:
    """A network told mean 0.5 and deviation 0.25 of images x is one told 0 and 1 of (x - 0.5) / 0.25."""
    given = WideResNetSpec(depth=10, width=1, mean=(0.5,), std=(0.25,)).build(3, 4, seed=1).eval()
    plain = WideResNetSpec(depth=10, width=1, mean=(0.0,), std=(1.0,)).build(3, 4, seed=1).eval()
    images = waves(1, 3, 8, 8).float()
    with torch.no_grad():
        assert torch.equal(given(images), plain((images - 0.5) / 0.25))
        assert not torch.allclose(given(images), plain(images), atol=1e-3)


def test_a_wide_resnet_takes_channels_last_and_gives_gradients_of_its_images() -> None:
    model, images = fill(WideResNet(10, 2)), waves(2, 3, 32, 32).float()
    expected = model(images)
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    logits = model.to(memory_format=torch.channels_last)(images)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(logits[0].sum(), images)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


def test_relu_and_silu_are_different_networks_of_the_same_weights() -> None:
    images = waves(1, 3, 8, 8).float()
    with torch.no_grad():
        silu, relu = (fill(WideResNet(10, 1, activation=a)).features(images) for a in ("silu", "relu"))
    assert relu.min() >= 0
    assert silu.min() < 0


def test_weights_follow_the_seed_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    specs = (GRAY, NoiseConditionedSpec(width=8), ResNetSpec(width=4))
    for spec in specs:
        one, same, other = (torch.cat([p.flatten() for p in spec.build(1, 3, seed).parameters()]) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    noise_conditioned().features(torch.zeros(1, 1, 8, 8), 1.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "make",
    [
        lambda: WideResNetSpec(depth=12),
        lambda: WideResNetSpec(depth=4),
        lambda: WideResNetSpec(width=0),
        lambda: WideResNetSpec(std=(0.5,)),
        lambda: WideResNetSpec(mean=(0.5,), std=(0.0,)),
        lambda: WideResNetSpec().build(1, 10),
        lambda: NoiseConditionedSpec(width=12),
        lambda: NoiseConditionedSpec(multipliers=()),
        lambda: NoiseConditionedSpec(attention=3),
        lambda: NoiseConditionedSpec(sigma_min=0.0),
        lambda: NoiseConditionedSpec(sigma_min=1.0, sigma_max=0.5),
        lambda: NoiseConditionedSpec(multipliers=(1, 1, 1)).check((1, 3, 3)),
        lambda: replace(NOISY, levels=()),
        lambda: replace(NOISY, levels=(-1.0,)),
        lambda: replace(NOISY, validations=0),
    ],
)
def test_impossible_encoders_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="expected"):
        make()


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 30, 32), (1, 3, 32, 30)])
def test_images_that_do_not_fit_a_wide_resnet_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sides divisible by 4, .* got|expected \[B, 3, H, W\], got"):
        WideResNet(10, 1)(torch.zeros(shape))


PREFIXES = ["", "module.", "model.", "module.0.", "module.1.", "module.model.", "0."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_every_wrapper_and_prefix_of_the_zoo_is_opened(prefix: str, wrapper: str | None) -> None:
    source, model = WideResNet(10, 1, seed=1), WideResNet(10, 1, seed=2)
    file: dict = {prefix + name: value for name, value in source.state_dict().items()}
    if wrapper is not None:
        file = {wrapper: file, "epoch": 3, "unaveraged_model_state_dict": model.state_dict()}
    load_weights(model, zoo_state_dict(file), "zoo file")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_what_does_not_fit_the_zoos_form_is_named() -> None:
    tensors = {f"module.{name}": value for name, value in WideResNet(10, 1).state_dict().items()}
    tensors["module.mu"] = tensors.pop("module.logits.bias")
    with pytest.raises(ValueError, match=r"missing \['logits.bias'\], unexpected \['mu'\]"):
        load_weights(WideResNet(10, 1), zoo_state_dict(tensors), "file")
    tensors["stray"] = torch.zeros(1)  # not every name has the prefix: none is cut
    assert zoo_state_dict(tensors).keys() == tensors.keys()
    with pytest.raises(ValueError, match=r"other things under \['epoch'\]"):
        zoo_state_dict({"epoch": 3, "weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="got nothing"):
        zoo_state_dict({"state_dict": {}})


@pytest.mark.parametrize("spec", [ResNetSpec(width=4, multipliers=(1, 3)), replace(GRAY, activation="relu")])
def test_classifier_files_round_trip_to_the_bit(spec: ResNetSpec | WideResNetSpec, tmp_path: Path) -> None:
    model, images = spec.build(1, 3, seed=5).eval(), waves(2, 1, 8, 8).float()
    save_tensors(tmp_path / "c.safetensors", model.state_dict(), classifier_header(model))
    for load in (load_classifier, load_encoder):
        loaded = load(tmp_path / "c.safetensors")
        assert loaded.spec == spec
        assert torch.equal(loaded(images), model(images))
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())


def test_noise_conditioned_files_round_trip_and_are_no_classifiers_of_images(tmp_path: Path) -> None:
    model, x = noise_conditioned(attention=0), waves(2, 1, 8, 8).float()
    save_tensors(tmp_path / "n.safetensors", model.state_dict(), classifier_header(model))
    loaded = load_encoder(tmp_path / "n.safetensors")
    assert isinstance(loaded, NoiseConditionedClassifier)
    assert loaded.spec == model.spec
    assert torch.equal(loaded.features(x, 0.5), model.features(x, 0.5))
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(UserError, match="got a noise-conditioned one"):
        load_classifier(tmp_path / "n.safetensors")


def test_an_encoder_for_images_of_another_size_is_refused(tmp_path: Path) -> None:
    """Its header says which images it was trained on; files without that, as the first ones, are taken."""
    model = ResNetSpec(width=4).build(1, 3)
    path, old = tmp_path / "c.safetensors", tmp_path / "old.safetensors"
    save_tensors(path, model.state_dict(), classifier_header(model, (1, 8, 8)))
    save_tensors(old, model.state_dict(), classifier_header(model))
    load_encoder(path)
    assert torch.equal(load_encoder(path, (1, 8, 8)).head.weight, model.head.weight)
    load_encoder(old, (1, 16, 16))
    load_encoder(old, (1, 8, 8))
    with pytest.raises(UserError, match=r"shape \(1, 16, 16\), got one that was trained on \(1, 8, 8\)"):
        load_encoder(path, (1, 16, 16))


@pytest.mark.parametrize(("stage", "spec"), [(train_classifier, WIDE), (train_noise_conditioned, NOISY)])
def test_a_trained_encoder_knows_its_images(stage, spec, real: ImageSet, tmp_path: Path) -> None:
    once = replace(spec, optimisation=replace(SHORT, steps=1), validations=1)
    inputs = (real, None) if stage is train_classifier else (real,)
    path = Store(tmp_path).once(stage, once, *inputs, seed=0).file("classifier.safetensors")
    load_encoder(path, real.shape)
    with pytest.raises(UserError, match="train or choose one for images of this size"):
        load_encoder(path, (1, 32, 32))


def test_files_of_something_else_are_refused_and_the_first_files_are_read(tmp_path: Path) -> None:
    path, model = tmp_path / "c.safetensors", ResNetSpec(width=4).build(1, 3)
    header = classifier_header(model)
    save_tensors(path, model.state_dict(), {**header, "kind": "denoiser"})
    with pytest.raises(UserError, match="expected the weights of a classifier, got 'denoiser'"):
        load_encoder(path)
    save_tensors(path, model.state_dict(), {**header, "network": {**header["network"], "class": "WideResnet"}})
    with pytest.raises(UserError, match=r"WideResNetSpec.*nearest first.*'WideResnet'"):
        load_encoder(path)
    del header["network"]["class"]  # as version 0.1 wrote them
    save_tensors(path, model.state_dict(), header)
    assert load_classifier(path).spec == ResNetSpec(width=4)


def test_noise_conditioned_features_have_the_promised_shape_and_lead_to_the_logits() -> None:
    for multipliers, size in (((1,), 8), ((1, 2), 8), ((1, 2, 3), 14)):
        network = NoiseConditionedSpec(width=8, multipliers=multipliers, blocks=2).build(3, 5).eval()
        x = waves(2, 3, size, size).float()
        assert network.features(x, 1.0).shape == (2, 8 * multipliers[-1])
        assert torch.equal(network.head(network.features(x, 1.0)), network(x, 1.0))


def test_every_weight_of_a_noise_conditioned_classifier_is_used() -> None:
    network = noise_conditioned(blocks=2)
    network(waves(2, 1, 8, 8).float(), 0.7).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_the_noise_level_may_be_a_number_or_a_tensor_and_matters() -> None:
    network, x = noise_conditioned(), waves(3, 1, 8, 8).float()
    one = network(x, 0.3)
    assert torch.equal(network(x, torch.tensor(0.3, dtype=torch.float64)), one)
    assert torch.equal(network(x, torch.full((3,), 0.3, dtype=torch.float64)), one)
    assert torch.allclose(network(x, torch.full((3,), 0.3)), one, atol=1e-4)
    each = network(x, torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64))
    assert torch.allclose(each[0], one[0], atol=1e-5)
    assert not torch.allclose(each[1], one[1], atol=1e-4)
    assert torch.allclose(each[2], network(x, 0.9)[2], atol=1e-5)


def test_noise_levels_outside_the_trained_range_are_told_as_its_ends() -> None:
    network, x = noise_conditioned(), waves(1, 1, 8, 8).float()
    assert torch.equal(network(x, 0.0), network(x, 0.02))
    assert torch.equal(network(x, 20_000.0), network(x, 80.0))
    assert not torch.allclose(network(x, 0.02), network(x, 0.03), atol=1e-5)
    for wrong in (-0.1, torch.tensor([1.0, 1.0]), torch.tensor([[1.0]]), math.nan):
        with pytest.raises(ValueError, match="expected sigma as one number"):
            network(x, wrong)


def test_a_noise_conditioned_classifier_works_in_float64() -> None:
    network, x = noise_conditioned(), waves(2, 1, 8, 8)
    single = network(x.float(), 0.3).double()
    assert torch.allclose(network.double()(x, 0.3), single, atol=1e-4)


def test_noised_images_have_the_variance_of_variance_preserving_noise() -> None:
    """x_vp of images that are 0.5 (x0 = 0): mean 0, variance s^2 / (1 + s^2); without noise x0 itself."""
    gray = torch.full((2, 1, 200, 200), 0.5)
    x = noised(gray, torch.tensor([0.5, 3.0]), torch.Generator().manual_seed(0))
    assert x.var((1, 2, 3)).tolist() == pytest.approx([0.2, 0.9], rel=0.03)
    assert x.mean((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=0.02)
    clean = noised(gray * 0.5, torch.zeros(2), torch.Generator().manual_seed(0))
    assert torch.equal(clean, torch.full_like(gray, -0.5))
    assert noised(gray[:1], torch.tensor([2.0]), torch.Generator().manual_seed(1)).std() < 1


def test_training_noise_is_log_uniform_over_the_range_that_is_told() -> None:
    logs = NOISY.sigmas(20_000, torch.Generator().manual_seed(0)).log()
    low, high = math.log(0.02), math.log(80)
    assert low <= logs.min() < low + 0.01
    assert high - 0.01 < logs.max() <= high
    shares = torch.histc(logs, 4, low, high) / len(logs)
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.015)


def test_a_noise_conditioned_classifier_learns_and_sees_less_in_more_noise(real: ImageSet, tmp_path: Path) -> None:
    spec = replace(
        NOISY,
        network=NoiseConditionedSpec(width=16),
        optimisation=replace(SHORT, steps=300, batch_size=64, learning_rate=3e-3, average=0.95),
        levels=(0.0, 0.5, 2.0, 80.0),
        validations=2,
    )
    artifact = Store(tmp_path).once(train_noise_conditioned, spec, real, seed=0)
    log = load_tensors(artifact.file("classifier.safetensors"))[1]["log"]
    json.dumps(log)
    assert [r["step"] for r in log] == [150, 300]
    assert log[1]["loss"] < log[0]["loss"]
    assert [level for level, _ in log[1]["accuracy"]] == [0.0, 0.5, 2.0, 80.0]
    clean, some, more, drowned = (accuracy for _, accuracy in log[1]["accuracy"])
    assert clean > 0.8
    assert clean > some > more > drowned
    assert drowned < 0.3  # chance is 0.1
    model = load_encoder(artifact.file("classifier.safetensors"))
    assert isinstance(model, NoiseConditionedClassifier)
    right = model(real.validation.images * 2 - 1, 0.0).argmax(1) == real.validation.labels
    assert right.float().mean().item() == pytest.approx(clean)


@pytest.mark.parametrize(("stage", "spec"), [(train_classifier, WIDE), (train_noise_conditioned, NOISY)])
def test_an_interrupted_encoder_training_ends_in_the_same_bits(stage, spec, real: ImageSet, tmp_path: Path) -> None:
    """Stopped in every fourth step, its work since the last saved state lost each time."""
    inputs = (real, None) if stage is train_classifier else (real,)
    before = torch.get_rng_state()
    whole = Store(tmp_path / "whole").once(stage, spec, *inputs, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    folder = tmp_path / "parts"
    folder.mkdir()

    class Stopped(Exception):
        pass

    def attempt() -> Callable[[int, int], None]:
        steps = itertools.count(1)

        def stop(done: int, total: int) -> None:
            if next(steps) == 4:
                raise Stopped

        return stop

    stops = 0
    while stops < 20:
        try:
            work = Workspace(folder, attempt(), checkpoint_seconds=-1.0, heritage=heritage_of(inputs))
            stage.work(work, spec, *inputs, seed=3)
            break
        except Stopped:
            stops += 1
    assert stops == 3
    name = "classifier.safetensors"
    assert (folder / name).read_bytes() == whole.file(name).read_bytes()
    assert load_encoder(folder / name).spec == spec.network


def test_a_batch_in_parts_trains_the_same_and_one_in_bfloat16_nearly(real: ImageSet, tmp_path: Path) -> None:
    def trained(**changes) -> tuple[float, dict[str, Tensor]]:
        spec = replace(NOISY, optimisation=replace(SHORT, **changes))
        file = Store(tmp_path).once(train_noise_conditioned, spec, real, seed=0).file("classifier.safetensors")
        tensors, header = load_tensors(file)
        return header["log"][-1]["loss"], tensors

    (whole, a), (parts, b), (short, c) = trained(), trained(accumulate=3), trained(precision="bfloat16")
    assert parts == pytest.approx(whole, rel=1e-4)
    assert short == pytest.approx(whole, rel=0.02)
    assert short != whole
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    assert {t.dtype for t in c.values()} == {torch.float32}


def test_a_robust_wide_resnet_trains_in_parts_and_in_bfloat16(real: ImageSet, tmp_path: Path) -> None:
    loss = TRADES(threat=WIDE.threat, steps=2, step_size=0.05)
    optimisation = replace(SHORT, steps=2, momentum=0.9, accumulate=3, precision="bfloat16")
    artifact = Store(tmp_path).once(
        train_classifier, replace(WIDE, loss=loss, optimisation=optimisation), real, None, seed=0
    )
    tensors, header = load_tensors(artifact.file("classifier.safetensors"))
    assert math.isfinite(header["log"][-1]["loss"])
    assert tensors["batchnorm.num_batches_tracked"].item() == 6  # batch norms see every part
    assert tensors["logits.weight"].dtype == torch.float32


def test_the_choice_of_networks_leaves_the_digests_of_old_recipes() -> None:
    """The digest of the default training before there were wide residual networks."""
    old = ClassifierTraining(loss=TRADES(step_size=2 / 255))  # its default then; in proportion to epsilon since
    assert digest(old) == "20a8ebee9024c301eb3cf8fd58d48d0d29dcd7769720588e197d8b4b35a55d85"
    assert digest(ClassifierTraining(network=WideResNetSpec())) != digest(ClassifierTraining())
