"""Denoiser, U-Net, small ResNet and their files."""

from pathlib import Path

import pytest
import torch

from gambeson.errors import UserError
from gambeson.models.denoiser import EDM, NetworkDenoiser, denoiser_header, load_denoiser
from gambeson.models.files import load_weights, save_tensors
from gambeson.models.resnet import ResNetSpec, classifier_header, load_classifier
from gambeson.models.unet import UNetSpec

LABELS = torch.tensor([0, 1, 2, 0])


def small_denoiser(seed: int = 0) -> NetworkDenoiser:
    network = UNetSpec(width=8).build(1, 3, seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return NetworkDenoiser(network, EDM(sigma_data=0.5)).eval()


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
    denoiser = NetworkDenoiser(UNetSpec(width=8).build(1, 3), EDM())
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


@pytest.mark.parametrize(("size", "multipliers", "blocks"), [(8, (1, 2), 1), (16, (1, 2, 2), 2), (32, (1, 1, 2, 2), 1)])
def test_unets_of_every_size_keep_the_shape_and_use_every_weight(size: int, multipliers: tuple, blocks: int) -> None:
    network = UNetSpec(width=8, multipliers=multipliers, blocks=blocks).build(3, 5)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05)
    out = network(torch.randn(2, 3, size, size), torch.zeros(2), torch.tensor([1, 5]))
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


def test_files_round_trip_to_the_bit(tmp_path: Path) -> None:
    denoiser, x = small_denoiser(), torch.randn(4, 1, 8, 8)
    save_tensors(tmp_path / "d.safetensors", denoiser.network.state_dict(), denoiser_header(denoiser))
    assert torch.equal(load_denoiser(tmp_path / "d.safetensors")(x, 1.0, LABELS), denoiser(x, 1.0, LABELS))
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
    "make", [lambda: UNetSpec(width=12), lambda: UNetSpec(multipliers=()), lambda: ResNetSpec(width=0)]
)
def test_impossible_architectures_are_refused(make) -> None:
    with pytest.raises(UserError, match="expected"):
        make()
