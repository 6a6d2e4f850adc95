"""Denoisers (EDM, VP, classifier-free), U-Net, small ResNet and their files."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from gambeson.errors import UserError
from gambeson.models.classifiers import classifier_header, load_classifier
from gambeson.models.ddim_unet import DDIMUNetSpec
from gambeson.models.denoiser import EDM, VP, ClassifierFree, NetworkDenoiser, denoiser_header, load_denoiser
from gambeson.models.files import load_weights, save_tensors
from gambeson.models.oracle import GaussianMixture
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import Attention, UNet, UNetSpec
from gambeson.models.waves import waves

LABELS = torch.tensor([0, 1, 2, 0])
SPEC = UNetSpec(width=8)


def wrap(network: nn.Module, preconditioning: EDM | VP, classes: int = 3, only: bool = True) -> NetworkDenoiser:
    """A denoiser of 1x8x8 images."""
    return NetworkDenoiser(
        network, preconditioning, spec=SPEC, classes=classes, shape=(1, 8, 8), conditional_only=only
    ).eval()


def small_denoiser(preconditioning: EDM | VP = EDM(), classes: int = 3, only: bool = True) -> NetworkDenoiser:
    """Every weight away from 0."""
    network, g = SPEC.build(1, classes), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return wrap(network, preconditioning, classes, only)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=dtype)


def test_edm_preconditioning_by_hand() -> None:
    """METHOD 5: c_skip .25/(s^2+.25), c_out .5 s/sqrt(s^2+.25), c_in 1/sqrt(.25+s^2), c_noise ln(s)/4; s = 2."""
    seen = {}

    def network(x: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        seen.update(x=x, noise=noise)
        return torch.full_like(x, 3.0)

    x, sigma = torch.full((1, 1, 1, 1), 4.25), torch.tensor([2.0])
    out = EDM(sigma_data=0.5).denoise(network, x, sigma, None)
    assert seen["x"].item() == pytest.approx(4.25 / 4.25**0.5)
    assert seen["noise"].item() == pytest.approx(0.17328679513998632)
    assert out.item() == pytest.approx(0.25 / 4.25 * 4.25 + 3 * 1.0 / 4.25**0.5)
    assert EDM(sigma_data=0.5).weight(sigma).item() == pytest.approx(4.25 / 1.0)


def test_training_noise_is_log_normal() -> None:
    logs = EDM().sigmas(20_000, torch.Generator().manual_seed(0)).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert logs.std().item() == pytest.approx(1.2, abs=0.03)


def test_a_fresh_network_denoises_to_the_best_linear_guess() -> None:
    """The last layer starts at zero: D(x) = c_skip x, so the loss at any sigma is that of shrinkage."""
    denoiser = wrap(SPEC.build(1, 3), EDM())
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(denoiser(x, 2.0, LABELS), x * 0.25 / 4.25, atol=1e-6)


def test_the_loss_is_per_image_and_scores_what_it_says() -> None:
    denoiser = small_denoiser()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    loss = denoiser.loss(images, LABELS, torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(7)
    sigma = (torch.randn(4, generator=g) * 1.2 - 1.2).exp()
    noisy = images + sigma[:, None, None, None] * torch.randn(images.shape, generator=g)
    error = (denoiser(noisy, sigma, LABELS) - images).square().mean((1, 2, 3))
    assert torch.allclose(loss, error * (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-4)


def test_labels_and_noise_level_matter_and_wrong_labels_are_refused() -> None:
    denoiser = small_denoiser()
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = denoiser(x, 1.0, LABELS)
    assert not torch.allclose(out[0], denoiser(x, 1.0, (LABELS + 1) % 3)[0], atol=1e-4)
    assert not torch.allclose(out, denoiser(x, 0.5, LABELS), atol=1e-3)
    with pytest.raises(ValueError, match="0 to 2"):
        denoiser(x, 1.0, LABELS + 1)
    with pytest.raises(ValueError, match="expected labels"):
        denoiser(x, 1.0)
    with pytest.raises(ValueError, match="one label for each of 4"):
        denoiser(x, 1.0, LABELS[:3])
    with pytest.raises(ValueError, match=r"expected images \[B, 1, 8, 8\], got \[4, 1, 16, 4\]"):
        denoiser(x.reshape(4, 1, 16, 4), 1.0, LABELS)
    with pytest.raises(ValueError, match="0 to 2"):
        denoiser.loss(x, LABELS + 1, Generator().manual_seed(0))


def test_an_unconditional_denoiser_takes_no_labels() -> None:
    denoiser = small_denoiser(classes=0, only=False)
    x = noise(4, 1, 8, 8)
    assert denoiser(x, 1.0).shape == x.shape
    assert denoiser.loss(x, None, Generator().manual_seed(0)).shape == (4,)
    with pytest.raises(ValueError, match="unconditional"):
        denoiser(x, 1.0, LABELS)
    with pytest.raises(ValueError, match="conditional_only"):
        small_denoiser(classes=0, only=True)


ABAR = {"linear": {0: 0.9999, 400: 0.1935720097, 999: 4.035829765e-05}, "cosine": {500: 0.4922851725}}  # METHOD 5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_vp_tables_are_the_published_ones(schedule: str) -> None:
    table = VP(schedule=schedule).table
    assert (table.diff() > 0).all()
    for t, abar in ABAR[schedule].items():
        assert (1 / (1 + table[t] ** 2)).item() == pytest.approx(abar, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_times_are_whole_at_the_table_and_interpolate_in_log_sigma(schedule: str, dtype: torch.dtype) -> None:
    vp = VP(schedule=schedule)
    assert torch.equal(vp.times(vp.table.to(dtype)), torch.arange(1000.0, dtype=torch.float64))
    between = (vp.table[:-1] ** 0.75 * vp.table[1:] ** 0.25).to(dtype)
    assert torch.allclose(vp.times(between), torch.arange(999.0, dtype=torch.float64) + 0.25, atol=1e-3)
    assert vp.times(torch.tensor([1e-9, 1e9], dtype=dtype)).tolist() == [0, 999]


def test_the_range_of_noise_levels_is_what_the_network_was_told() -> None:
    assert EDM().sigma_range() == (0.0, math.inf)
    smallest, largest = VP().sigma_range()
    assert smallest == pytest.approx((1 / 0.9999 - 1) ** 0.5, rel=1e-6)
    assert largest == pytest.approx((1 / 4.035829765e-05 - 1) ** 0.5, rel=1e-6)
    assert VP().times(torch.tensor([smallest, largest], dtype=torch.float64)).tolist() == [0, 999]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(("time", "told"), [("fraction", 0.4), ("index", 400.0)])
def test_vp_predictions_by_hand(prediction: str, time: str, told: float) -> None:
    """abar(400) = .1935720097: the network gets sqrt(abar) x; x0 = (x_vp - sqrt(1 - abar) e) / sqrt(abar), or
    sqrt(abar) x_vp - sqrt(1 - abar) v, or the prediction itself."""
    seen = {}

    def network(x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        seen.update(x=x, noise=noise, labels=labels)
        return torch.full_like(x, 0.25)

    abar = 0.1935720097
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    sigma = torch.tensor([((1 - abar) / abar) ** 0.5], dtype=torch.float64)
    out = VP(prediction=prediction, time=time).denoise(network, x, sigma, LABELS[:1])
    x_vp, noisy = 3 * 0.4399681917, 0.8980133575  # sqrt(abar), sqrt(1 - abar)
    expected = {"eps": (x_vp - noisy * 0.25) / 0.4399681917, "v": 0.4399681917 * x_vp - noisy * 0.25, "x0": 0.25}
    assert seen["x"].item() == pytest.approx(x_vp, rel=1e-8)
    assert seen["noise"].item() == pytest.approx(told, rel=1e-8)
    assert seen["labels"] is not None
    assert out.item() == pytest.approx(expected[prediction], rel=1e-8)


class Perfect(nn.Module):
    """The best network for an exact world, in VP coordinates: predicts from E[x0 | x_vp, t]."""

    def __init__(self, world: GaussianMixture, vp: VP) -> None:
        super().__init__()
        self.world, self.vp = world, vp

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        sigma = self.vp.table[(noise * (self.vp.steps if self.vp.time == "fraction" else 1)).round().long()]
        abar = (1 / (1 + sigma**2))[:, None, None, None]
        x0 = self.world.denoiser(x / abar.sqrt(), sigma, labels)
        eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        return {"eps": eps, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x0, "x0": x0}[self.vp.prediction]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("time", ["fraction", "index"])
def test_a_perfect_network_gives_the_posterior_mean(schedule: str, prediction: str, time: str) -> None:
    """Against the exact denoiser, float64, conditional and not, at levels over the whole table."""
    vp = VP(schedule=schedule, prediction=prediction, time=time)
    world = GaussianMixture(
        means=noise(3, 1, 8, 8, dtype=torch.float64),
        std=torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64),
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        classes=torch.tensor([0, 1, 2]),
    )
    denoiser = wrap(Perfect(world, vp), vp, only=False)
    sigma = vp.table[torch.tensor([0, 10, 400, 990])]
    x = world.means[LABELS] + sigma[:, None, None, None] * noise(4, 1, 8, 8, seed=1, dtype=torch.float64)
    for labels in (LABELS, None):
        assert torch.allclose(denoiser(x, sigma, labels), world.denoiser(x, sigma, labels), atol=1e-8)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_vp_losses_are_the_textbooks(schedule: str, prediction: str) -> None:
    """Ho et al. 2020, eq. 14; Salimans and Ho 2022: t uniform, the plain squared error of what is predicted."""
    vp = VP(schedule=schedule, prediction=prediction)
    denoiser = small_denoiser(vp).double()
    images = noise(4, 1, 8, 8, seed=2, dtype=torch.float64)
    found = denoiser.loss(images, LABELS, Generator().manual_seed(7))
    g = Generator().manual_seed(7)
    t = torch.randint(1000, (4,), generator=g)
    n = torch.randn(images.shape, generator=g).double()
    abar = (1 / (1 + vp.table[t] ** 2))[:, None, None, None]
    predicted = denoiser.network(abar.sqrt() * images + (1 - abar).sqrt() * n, t.double() / 1000, LABELS)
    wanted = {"eps": n, "v": abar.sqrt() * n - (1 - abar).sqrt() * images, "x0": images}[prediction]
    assert torch.allclose(found, (predicted - wanted).square().mean((1, 2, 3)), rtol=1e-6)


def test_training_times_are_uniform() -> None:
    vp = VP(steps=10)
    t = vp.times(vp.sigmas(20_000, Generator().manual_seed(0))).long()
    assert t.bincount(minlength=10).tolist() == pytest.approx([2000] * 10, rel=0.1)


@pytest.mark.parametrize("preconditioning", [EDM(), VP(schedule="cosine")])
def test_a_state_in_float64_keeps_its_precision_around_a_float32_network(preconditioning: EDM | VP) -> None:
    denoiser, x = small_denoiser(preconditioning), noise(4, 1, 8, 8, dtype=torch.float64)
    sigma = 3.0
    out = denoiser(x * sigma, sigma, LABELS)
    assert out.dtype == torch.float64
    assert torch.allclose(out, small_denoiser(preconditioning).double()(x * sigma, sigma, LABELS), atol=1e-5)
    assert torch.allclose(out.float(), denoiser((x * sigma).float(), sigma, LABELS), atol=1e-5)


class Listener(nn.Module):
    """Remembers the times it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.told = nn.Parameter(torch.zeros(1)), torch.empty(0)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        assert x.dtype == self.weight.dtype
        self.told = noise
        return x


@pytest.mark.parametrize("state", [torch.float64, torch.float32, torch.bfloat16])
def test_a_network_in_bfloat16_is_told_the_exact_time(state: torch.dtype) -> None:
    """bfloat16 has 8 bits: 999 would be 1000 and 401 would be 400."""
    vp = VP(time="index")
    heard = wrap(Listener().to(torch.bfloat16), vp)
    x = noise(1, 1, 8, 8).to(state)
    for t in (401, 999):
        assert heard(x, vp.table[t].item(), LABELS[:1]).dtype == state
        assert isinstance(heard.network, Listener)
        assert heard.network.told.item() == pytest.approx(t, abs=1e-3)


@pytest.mark.parametrize(
    "spec", [SPEC, DDIMUNetSpec(width=32, multipliers=(1, 2), attention=(1,))], ids=["own", "ddim"]
)
def test_networks_in_bfloat16_take_times_in_float32(spec: UNetSpec | DDIMUNetSpec) -> None:
    network = spec.build(1, 0).to(torch.bfloat16).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05)
    denoiser = NetworkDenoiser(network, VP(time="index"), spec=spec, classes=0, shape=(1, 8, 8), conditional_only=False)
    x = noise(2, 1, 8, 8)
    assert denoiser(x, 3.0).isfinite().all()


def test_waves_by_hand_and_both_ways_to_compute_them() -> None:
    """Frequencies 10000^(-j/n): 1, 1/10000 with the endpoint and 1, 1/100 without it."""
    time = torch.tensor([0.0, 2.0])
    sines, cosines = waves(time, 4, torch.float64, endpoint=True)
    assert sines[1].tolist() == pytest.approx([math.sin(2), math.sin(2e-4)])
    assert cosines[1].tolist() == pytest.approx([math.cos(2), math.cos(2e-4)])
    assert waves(time, 4, torch.float64, endpoint=False)[0][1].tolist() == pytest.approx([math.sin(2), math.sin(0.02)])
    usual = waves(time * 50, 64, torch.float64, endpoint=True)
    for way in (False, True):
        other = waves(time, 64, torch.float64, endpoint=True, scale=50.0, reciprocal=way)
        assert torch.allclose(torch.cat(other), torch.cat(usual), atol=1e-9)
    with pytest.raises(ValueError, match="even number"):
        waves(time, 5, torch.float32, endpoint=True)


def test_the_unets_own_waves_have_the_bits_that_its_weights_were_trained_with() -> None:
    """Before there was one function for all: float32, noise times (1/10000)^(j/n) times 1000, cosines first."""
    network, heard = SPEC.build(1, 0), []
    network.noise[0].register_forward_hook(lambda module, inputs, output: heard.append(inputs[0]))
    level = torch.linspace(-1.5, 1.5, 64)
    network(noise(64, 1, 8, 8), level)
    angles = level[:, None] * (1 / 10000) ** (torch.arange(4, dtype=torch.float32) / 3)[None, :] * 1000
    assert torch.equal(heard[0], torch.cat([angles.cos(), angles.sin()], dim=1))


def augmented_unet() -> UNet:
    """Told 9 numbers, every weight away from 0."""
    network = UNetSpec(width=8, augment=9).build(1, 3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05)
    return network


def test_a_unet_that_is_told_nothing_is_the_one_it_was() -> None:
    """The same weights but for one more, the same outputs for no augmentation, whether it is left out or zeros."""
    before, told = SPEC.build(1, 3, seed=4), UNetSpec(width=8, augment=9).build(1, 3, seed=4)
    assert told.state_dict().keys() - before.state_dict().keys() == {"augment.weight"}
    assert all(torch.equal(told.state_dict()[k], v) for k, v in before.state_dict().items())
    network, x = augmented_unet(), noise(4, 1, 8, 8)
    usual = network(x, torch.zeros(4), LABELS)
    assert torch.equal(usual, network(x, torch.zeros(4), LABELS, torch.zeros(4, 9)))
    labels = torch.eye(9)[[0, 3, 8, 0]]
    assert not torch.isclose(usual, network(x, torch.zeros(4), LABELS, labels)).all(dim=3).all(dim=2).any()
    bare = SPEC.build(1, 3)
    bare.load_state_dict({k: v for k, v in network.state_dict().items() if k != "augment.weight"})
    assert torch.equal(usual, bare(x, torch.zeros(4), LABELS))
    for net in (bare, network):
        with pytest.raises(ValueError, match="augmentation parameters per image"):
            net(x, torch.zeros(4), LABELS, torch.zeros(4, 2))


@pytest.mark.parametrize("preconditioning", [EDM(), VP(prediction="v")])
def test_the_loss_tells_the_augmentation_and_denoising_asks_for_none(preconditioning: EDM | VP) -> None:
    network, images = augmented_unet(), noise(4, 1, 8, 8)
    denoiser, told = wrap(network, preconditioning), torch.eye(9)[[1, 4, 5, 7]]

    def loss(augment: Tensor | None) -> Tensor:
        return denoiser.loss(images, LABELS, Generator().manual_seed(1), augment=augment)

    assert torch.equal(loss(None), loss(torch.zeros(4, 9)))
    assert not torch.isclose(loss(None), loss(told), rtol=1e-6).any()
    batch = denoiser.noised(images, LABELS, Generator().manual_seed(1), augment=told)
    in_parts = torch.cat([denoiser.errors(part) for part in batch.split(3)])
    assert torch.allclose(in_parts, loss(told), rtol=1e-4)
    swapped = batch._replace(augment=told.flip(0))
    assert not torch.isclose(denoiser.errors(swapped), loss(told), rtol=1e-6).any()
    with pytest.raises(ValueError, match="0 augmentation parameters"):
        small_denoiser(preconditioning).loss(images, LABELS, Generator().manual_seed(1), augment=told)


def test_a_denoiser_that_is_told_augmentations_round_trips(tmp_path: Path) -> None:
    network, x = augmented_unet(), noise(4, 1, 8, 8)
    denoiser = NetworkDenoiser(
        network, EDM(), spec=network.spec, classes=3, shape=(1, 8, 8), conditional_only=True
    ).eval()
    save_tensors(tmp_path / "d.safetensors", network.state_dict(), denoiser_header(denoiser))
    loaded = load_denoiser(tmp_path / "d.safetensors")
    assert loaded.spec == UNetSpec(width=8, augment=9)
    assert torch.equal(loaded(x, 1.0, LABELS), denoiser(x, 1.0, LABELS))
    older = {**denoiser_header(small_denoiser()), "network": {"class": "UNetSpec", "width": 8}}
    save_tensors(tmp_path / "old.safetensors", small_denoiser().network.state_dict(), older)
    assert load_denoiser(tmp_path / "old.safetensors").spec == SPEC  # a header from before there was augmentation


def test_dropped_labels_become_the_null_class_and_leave_the_noise_alone() -> None:
    denoiser = small_denoiser(only=False)
    images, labels = torch.zeros(3000, 1, 8, 8), torch.arange(3000) % 3
    kept = denoiser.noised(images, labels, Generator().manual_seed(0))
    dropped = denoiser.noised(images, labels, Generator().manual_seed(0), label_dropout=0.2)
    assert torch.equal(kept.noisy, dropped.noisy)
    assert torch.equal(kept.labels, labels)
    null = dropped.labels == 3
    assert null.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(dropped.labels[~null], labels[~null])
    x = noise(4, 1, 8, 8)
    by_index = denoiser.network(x, torch.zeros(4), torch.full((4,), 3))
    assert torch.equal(by_index, denoiser.network(x, torch.zeros(4), None))


def test_classifier_free_guidance_by_hand() -> None:
    """Unconditional 2, conditional 5: scale 0 -> 2, 1 -> 5, 2 -> 8; at scale 1 the network is asked once."""
    calls = []

    def denoiser(x: Tensor, sigma: float | Tensor, labels: Tensor | None = None) -> Tensor:
        calls.append(labels)
        return torch.full_like(x, 2.0 if labels is None else 5.0)

    x = torch.zeros(4, 1, 2, 2)
    for scale, expected in ((0.0, 2.0), (1.0, 5.0), (2.0, 8.0), (1.5, 6.5)):
        assert ClassifierFree(denoiser, scale)(x, 1.0, LABELS).unique().tolist() == [expected]
    assert len(calls) == 7
    with pytest.raises(ValueError, match="labels to guide towards"):
        ClassifierFree(denoiser, 2.0)(x, 1.0)
    with pytest.raises(ValueError, match="without label dropout"):
        ClassifierFree(small_denoiser(only=True), 2.0)(noise(4, 1, 8, 8), 1.0, LABELS)
    real = small_denoiser(only=False)
    assert torch.equal(ClassifierFree(real, 1.0)(noise(4, 1, 8, 8), 1.0, LABELS), real(noise(4, 1, 8, 8), 1.0, LABELS))


@pytest.mark.parametrize(("make", "size"), [(UNetSpec.cifar10, 35_669_523), (UNetSpec.cifar10_large, 56_219_523)])
def test_the_cifar10_sizes_are_those_of_ddim_and_ddpmpp(make: Callable[[], UNetSpec], size: int) -> None:
    """DDIM's U-Net has 35,746,307 parameters, EDM's DDPM++ 55.7M."""
    with torch.device("meta"):
        network = UNet(make(), 3, 10)
        assert network(torch.empty(2, 3, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.long)).shape[1:] == (
            3,
            32,
            32,
        )
    assert sum(p.numel() for p in network.parameters()) == size
    make().check((3, 32, 32))


def test_attention_stands_at_the_lowest_resolutions_only() -> None:
    found = {}
    for attention in range(4):
        network = UNetSpec(width=8, multipliers=(1, 1, 2), attention=attention).build(1, 3)
        found[attention] = [isinstance(block.attention, Attention) for block in [*network.down, *network.up]]
    assert found[0] == [False] * 6
    assert found[1] == [False, False, True, True, False, False]
    assert found[2] == [False, True, True, True, True, False]
    assert found[3] == [True] * 6


def test_channels_last_changes_nothing_but_the_rounding() -> None:
    network, x = small_denoiser().network, noise(4, 1, 8, 8)
    wide, y = UNetSpec(width=16, multipliers=(1, 2, 2), attention=2).build(3, 5), noise(2, 3, 16, 16)
    with torch.no_grad():
        for p in wide.parameters():
            p.add_(0.05)
        for net, images in ((network, x), (wide, y)):
            usual = net(images, torch.zeros(len(images)), LABELS[: len(images)])
            net.to(memory_format=torch.channels_last)
            other = net(
                images.contiguous(memory_format=torch.channels_last), torch.zeros(len(images)), LABELS[: len(images)]
            )
            assert torch.allclose(usual, other, rtol=1e-4, atol=1e-4 * usual.abs().max().item())


def test_dropout_acts_in_training_only_and_has_no_weights() -> None:
    plain, dropping = (UNetSpec(width=8, dropout=p).build(1, 3) for p in (0.0, 0.5))
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    dropping.load_state_dict(plain.state_dict())
    x = noise(4, 1, 8, 8)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for net in (plain, dropping):
            for p in net.parameters():
                p.add_(0.1)
        expected = plain(x, torch.zeros(4), LABELS)
        assert torch.equal(expected, dropping.eval()(x, torch.zeros(4), LABELS))
        assert not torch.equal(expected, dropping.train()(x, torch.zeros(4), LABELS))


@pytest.mark.parametrize(
    ("size", "multipliers", "blocks", "classes"),
    [(8, (1, 2), 1, 5), (16, (1, 2, 2), 2, 5), (16, (1, 2, 2), 2, 0), (32, (1, 1, 2, 2), 1, 5), (64, (1,) * 4, 1, 0)],
)
def test_unets_of_every_size_keep_the_shape_and_use_every_weight(
    size: int, multipliers: tuple, blocks: int, classes: int
) -> None:
    network = UNetSpec(width=8, multipliers=multipliers, blocks=blocks, attention=blocks).build(3, classes)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05)
    out = network(noise(2, 3, size, size), torch.zeros(2), torch.tensor([1, 5]) if classes else None)
    assert out.shape == (2, 3, size, size)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_building_leaves_the_global_generator_alone_and_follows_the_seed() -> None:
    before = torch.get_rng_state()
    a, b, c = (UNetSpec(width=8).build(1, 3, seed) for seed in (1, 1, 2))
    r = [ResNetSpec(width=4).build(1, 3, seed).enter.weight for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.enter.weight, b.enter.weight)
    assert not torch.equal(a.enter.weight, c.enter.weight)
    assert torch.equal(r[0], r[1])
    assert not torch.equal(r[0], r[2])


@pytest.mark.parametrize("preconditioning", [EDM(sigma_data=0.7), VP(prediction="v", schedule="cosine", steps=200)])
@pytest.mark.parametrize("classes", [3, 0])
def test_denoisers_round_trip_to_the_bit(tmp_path: Path, preconditioning: EDM | VP, classes: int) -> None:
    denoiser, x = small_denoiser(preconditioning, classes, only=False), noise(4, 1, 8, 8)
    labels = LABELS if classes else None
    save_tensors(tmp_path / "d.safetensors", denoiser.network.state_dict(), denoiser_header(denoiser))
    loaded = load_denoiser(tmp_path / "d.safetensors")
    assert torch.equal(loaded(x, 1.0, labels), denoiser(x, 1.0, labels))
    assert denoiser_header(loaded) == denoiser_header(denoiser)
    assert (loaded.spec, loaded.preconditioning, loaded.shape) == (SPEC, preconditioning, (1, 8, 8))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": {"class": "NoSpec"}}, "UNetSpec.*NoSpec"),
        ({"preconditioning": {"sigma_data": 0.5}}, "this version"),
        ({"network": {"class": "UNetSpec", "depth": 3}}, "this version.*depth"),
    ],
)
def test_headers_of_other_versions_are_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    denoiser = small_denoiser()
    save_tensors(tmp_path / "d.safetensors", denoiser.network.state_dict(), {**denoiser_header(denoiser), **change})
    with pytest.raises(UserError, match=message):
        load_denoiser(tmp_path / "d.safetensors")


def test_classifiers_round_trip_to_the_bit(tmp_path: Path) -> None:
    x = noise(4, 1, 8, 8)
    model = ResNetSpec(width=4).build(1, 3).eval()
    save_tensors(tmp_path / "c.safetensors", model.state_dict(), classifier_header(model))
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert torch.equal(loaded(x.abs()), model(x.abs()))
    assert torch.allclose(loaded.head(loaded.features(x)), loaded(x))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(UserError, match="expected the weights of a denoiser"):
        load_denoiser(tmp_path / "c.safetensors")


def test_a_mismatch_names_the_keys() -> None:
    tensors = ResNetSpec(width=4).build(1, 3).state_dict()
    tensors["extra"] = tensors.pop("head.bias")
    tensors["head.weight"] = tensors["head.weight"][:, :2]
    with pytest.raises(ValueError, match=r"missing \['head.bias'\], unexpected \['extra'\].*\['head.weight'\]"):
        load_weights(ResNetSpec(width=4).build(1, 3), tensors, "file")


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNetSpec(width=12),
        lambda: UNetSpec(multipliers=()),
        lambda: UNetSpec(attention=3),
        lambda: UNetSpec(dropout=1.0),
        lambda: UNetSpec(augment=-1),
        lambda: VP(steps=1),
        lambda: VP(beta_end=1.5),
        lambda: ResNetSpec(width=0),
    ],
)
def test_impossible_numbers_are_refused(make) -> None:
    with pytest.raises(UserError, match="expected"):
        make()
