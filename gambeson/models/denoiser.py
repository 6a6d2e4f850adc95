"""A network becomes a Denoiser, E[x0 | x0 + sigma n], by the preconditioning of Karras et al. 2022 (EDM, Table 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from gambeson.errors import UserError, require
from gambeson.models.files import load_tensors, load_weights
from gambeson.models.unet import UNet, UNetSpec
from gambeson.types import Images, Labels, PerImage


@dataclass(frozen=True, kw_only=True)
class EDM:
    """EDM's preconditioning and the distribution of noise levels in training (Karras et al. 2022, Table 1)."""

    sigma_data: float = 0.5  # standard deviation of the images in [-1, 1]
    p_mean: float = -1.2  # mean of ln(sigma) in training
    p_std: float = 1.2  # standard deviation of ln(sigma) in training

    def __post_init__(self) -> None:
        require(self.sigma_data > 0, "sigma_data", "a number above 0", self.sigma_data)
        require(self.p_std > 0, "p_std", "a number above 0", self.p_std)

    def sigmas(self, count: int, generator: Generator) -> Tensor:
        """[count] training noise levels, log-normal."""
        return (torch.randn(count, generator=generator) * self.p_std + self.p_mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        """The loss weight lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def denoise(self, network: Callable[..., Tensor], x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise); x [B, C, H, W], sigma [B]."""
        s, d = sigma[:, None, None, None], self.sigma_data
        norm = (s**2 + d**2).sqrt()
        c_skip, c_out, c_in, c_noise = d**2 / norm**2, s * d / norm, 1 / norm, sigma.log() / 4
        return c_skip * x + c_out * network(c_in * x, c_noise, labels)


class NetworkDenoiser(nn.Module):
    """A Denoiser: images in [-1, 1] plus sigma times normal noise -> the expected clean image."""

    def __init__(self, network: UNet, preconditioning: EDM, conditional_only: bool = True) -> None:
        super().__init__()
        self.network, self.preconditioning, self.conditional_only = network, preconditioning, conditional_only

    def forward(self, x: Tensor, sigma: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], sigma one number or [B] -> [B, C, H, W]. ValueError for missing or wrong labels."""
        if labels is None and self.conditional_only:
            raise ValueError("denoiser: expected labels, got none; it was trained without label dropout")
        if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(f"denoiser: expected labels 0 to {self.classes - 1}, got {labels.unique().tolist()}")
        levels = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        return self.preconditioning.denoise(self.network, x, levels, labels)

    @property
    def classes(self) -> int:
        """Number of classes it is conditioned on."""
        return self.network.classes

    def loss(self, images: Images, labels: Labels, generator: Generator, label_dropout: float = 0.0) -> PerImage:
        """EDM's training loss (eq. 8), one number per image: images in [-1, 1], labels dropped to the null class."""
        edm = self.preconditioning
        sigma = edm.sigmas(len(images), generator).to(images.device)
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        if label_dropout:
            dropped = torch.rand(len(images), generator=generator) < label_dropout
            labels = labels.masked_fill(dropped.to(labels.device), self.classes)
        clean = edm.denoise(self.network, images + sigma[:, None, None, None] * noise, sigma, labels)
        return edm.weight(sigma) * (clean - images).square().flatten(1).mean(1)


def denoiser_header(denoiser: NetworkDenoiser) -> dict[str, object]:
    """What is needed besides the weights to build this denoiser again."""
    return {
        "kind": "denoiser",
        "network": asdict(denoiser.network.spec),
        "preconditioning": asdict(denoiser.preconditioning),
        "channels": denoiser.network.channels,
        "classes": denoiser.classes,
        "conditional_only": denoiser.conditional_only,
    }


def load_denoiser(path: Path) -> NetworkDenoiser:
    """A denoiser that `save_tensors(path, network.state_dict(), denoiser_header(...))` wrote, frozen, in eval mode."""
    tensors, header = load_tensors(path)
    if header.get("kind") != "denoiser":
        raise UserError(f"{path}: expected the weights of a denoiser, got {header.get('kind', 'a foreign file')!r}")
    spec = UNetSpec(**{**header["network"], "multipliers": tuple(header["network"]["multipliers"])})
    network = spec.build(header["channels"], header["classes"])
    load_weights(network, tensors, str(path))
    denoiser = NetworkDenoiser(network, EDM(**header["preconditioning"]), header["conditional_only"])
    return denoiser.eval().requires_grad_(False)
