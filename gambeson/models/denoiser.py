"""A network becomes a Denoiser, E[x0 | x0 + sigma n], by EDM's preconditioning or by a VP model's prediction.

EDM: Karras et al. 2022, Table 1. VP: eps-, v- or x0-prediction on a table of alpha-bar (Ho et al. 2020; Nichol and
Dhariwal 2021; Salimans and Ho 2022), in the sigma space of METHOD 1.3.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from gambeson.canonical import plain
from gambeson.errors import UserError, require, unknown
from gambeson.models.files import built, check_asked, check_shapes, load_tensors, load_weights
from gambeson.schedules import cosine_alpha_bar, linear_alpha_bar, sigma_from_alpha_bar
from gambeson.types import Denoiser, Features, Images, Labels, PerImage


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

    def sigma_range(self) -> tuple[float, float]:
        """The smallest and largest noise level that the network can be told: any above 0."""
        return 0.0, math.inf

    def weight(self, sigma: Tensor) -> Tensor:
        """The loss weight lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def denoise(self, network: Callable[..., Tensor], x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise); x [B, C, H, W], sigma [B]."""
        s, d = sigma[:, None, None, None], self.sigma_data
        norm = (s**2 + d**2).sqrt()
        c_skip, c_out, c_in, c_noise = d**2 / norm**2, s * d / norm, 1 / norm, sigma.log() / 4
        return c_skip * x + c_out * network(c_in * x, c_noise, labels)


@dataclass(frozen=True, kw_only=True)
class VP:
    """A DDPM-like model: the network sees x_vp = sqrt(abar_t) x0 + sqrt(1 - abar_t) n and the time t of a table.

    It predicts n (Ho et al. 2020), v = sqrt(abar_t) n - sqrt(1 - abar_t) x0 (Salimans and Ho 2022) or x0.
    Noise levels between the entries of the table are interpolated in ln(sigma). Those outside it are told as its ends
    though the state is at another level: keep within `sigma_range`.
    """

    prediction: Literal["eps", "v", "x0"] = "eps"  # what the network predicts: the noise n, v, or the clean image x0
    schedule: Literal["linear", "cosine"] = "linear"  # the table: betas evenly spaced, or abar a squared cosine
    steps: int = 1000  # entries of the table
    beta_start: float = 1e-4  # first beta of the linear table
    beta_end: float = 0.02  # last beta of the linear table
    time: Literal["fraction", "index"] = "fraction"  # what the network is told: t / steps, or the index t itself

    def __post_init__(self) -> None:
        require(self.prediction in ("eps", "v", "x0"), "prediction", "eps, v or x0", self.prediction)
        require(self.schedule in ("linear", "cosine"), "schedule", "linear or cosine", self.schedule)
        require(self.time in ("fraction", "index"), "time", "fraction or index", self.time)
        require(self.steps >= 2, "steps", "a table of at least 2 entries", self.steps)
        for name in ("beta_start", "beta_end"):
            require(0 < getattr(self, name) < 1, name, "a number between 0 and 1", getattr(self, name))

    @property
    def table(self) -> Tensor:
        """[steps] float64 sigma_t = sqrt((1 - abar_t) / abar_t), increasing."""
        return _vp_table(self.schedule, self.steps, self.beta_start, self.beta_end, torch.device("cpu"))

    def sigma_range(self) -> tuple[float, float]:
        """The smallest and largest noise level of the table: a network was told no other ones."""
        return self.table[0].item(), self.table[-1].item()

    def sigmas(self, count: int, generator: Generator) -> Tensor:
        """[count] float64 training noise levels: t uniform over the table."""
        return self.table[torch.randint(self.steps, (count,), generator=generator)]

    def weight(self, sigma: Tensor) -> Tensor:
        """The weight of the squared error of x0 that makes it the plain squared error of what is predicted.

        x0-hat is x - sigma eps-hat, or x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v-hat.
        """
        if self.prediction == "eps":
            return 1 / sigma**2
        return 1 + 1 / sigma**2 if self.prediction == "v" else torch.ones_like(sigma)

    def times(self, sigma: Tensor) -> Tensor:
        """[B] float64 t of noise levels [B], exactly whole at the table's entries (rounded to sigma's dtype)."""
        table = _vp_table(self.schedule, self.steps, self.beta_start, self.beta_end, sigma.device)
        logs = table.log()
        wanted = sigma.double().log().clamp(logs[0], logs[-1])
        left = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, self.steps - 2)
        t = left + (wanted - logs[left]) / (logs[left + 1] - logs[left])
        nearest = t.round()
        return torch.where(table.to(sigma.dtype)[nearest.long()] == sigma, nearest, t)

    def denoise(self, network: Callable[..., Tensor], x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """x0-hat of x [B, C, H, W] = x0 + sigma n, sigma [B], from what the network predicts."""
        s = sigma[:, None, None, None]
        norm = (1 + s**2).sqrt()  # sqrt(abar) = 1 / norm, sqrt(1 - abar) = s / norm
        t = self.times(sigma)
        told = (t / self.steps if self.time == "fraction" else t).to(_precise(x.dtype))
        predicted = network(x / norm, told, labels)
        if self.prediction == "eps":
            return x - s * predicted
        return x / norm**2 - s / norm * predicted if self.prediction == "v" else predicted


def _precise(dtype: torch.dtype) -> torch.dtype:
    """At least float32: in bfloat16 the time 999 is 1000."""
    return torch.promote_types(dtype, torch.float32)


@lru_cache(maxsize=16)
def _vp_table(schedule: str, steps: int, start: float, end: float, device: torch.device) -> Tensor:
    abar = linear_alpha_bar(steps, start, end) if schedule == "linear" else cosine_alpha_bar(steps)
    return sigma_from_alpha_bar(abar).to(device)


@runtime_checkable
class NetworkSpec(Protocol):
    """A frozen dataclass of plain numbers that describes a network."""

    def build(self, channels: int, classes: int, seed: int = 0) -> nn.Module: ...


class Noised(NamedTuple):
    """A batch as the training loss sees it: clean and noisy images [B, C, H, W], noise levels [B], labels [B].

    `augment` [B, A] says how the clean images were augmented; None: not at all.
    """

    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    labels: Tensor | None
    augment: Tensor | None = None

    def split(self, parts: int) -> list[Noised]:
        """Consecutive parts of about equal size."""
        clean, noisy, sigma = (t.tensor_split(parts) for t in self[:3])
        told = ([None] * parts if t is None else t.tensor_split(parts) for t in self[3:])
        return [Noised(*part) for part in zip(clean, noisy, sigma, *told, strict=True)]


class NetworkDenoiser(nn.Module):
    """A Denoiser: images in [-1, 1] plus sigma times normal noise -> the expected clean image.

    `network` is called as (x [B, C, H, W], noise [B], labels [B] or None), and with augment=[B, A] in the training of
    one that is told augmentations (`UNetSpec.augment`); sampling asks for images as they are. `spec` says how it is
    built again. classes 0: unconditional. `conditional_only`: it never learned to go without labels.
    """

    def __init__(
        self,
        network: nn.Module,
        preconditioning: EDM | VP,
        *,
        spec: NetworkSpec,
        classes: int,
        shape: tuple[int, int, int],
        conditional_only: bool,
    ) -> None:
        super().__init__()
        require(classes >= 0, "denoiser, classes", "0 (unconditional) or more", classes)
        require(classes > 0 or not conditional_only, "denoiser, conditional_only", "False with 0 classes", True)
        self.network, self.preconditioning, self.spec = network, preconditioning, spec
        self.classes, self.shape, self.conditional_only = classes, shape, conditional_only

    def forward(self, x: Tensor, sigma: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], sigma one number or [B] -> [B, C, H, W] in x's dtype; the network computes in its own.

        ValueError for images of another shape, and for labels that are missing, out of range or not wanted.
        """
        self._check(x, labels)
        levels = torch.as_tensor(sigma, dtype=_precise(x.dtype), device=x.device).expand(len(x))
        return self.preconditioning.denoise(self._call, x, levels, labels).to(x.dtype)

    def loss(
        self,
        images: Images,
        labels: Labels | None,
        generator: Generator,
        label_dropout: float = 0.0,
        augment: Features | None = None,
    ) -> PerImage:
        """The training loss, one number per image: EDM's (eq. 8), or a VP model's squared error of its prediction.

        images in [-1, 1]; a share `label_dropout` of the labels goes to the null class; `augment` [B, A] says how the
        images were augmented. ValueError as `forward`, and for augmentations that the network is not told.
        """
        return self.errors(self.noised(images, labels, generator, label_dropout, augment))

    def noised(
        self,
        images: Images,
        labels: Labels | None,
        generator: Generator,
        label_dropout: float = 0.0,
        augment: Features | None = None,
    ) -> Noised:
        """Draws noise levels, noise and dropped labels of a batch, on the CPU, and moves them to the images."""
        self._check(images, labels)
        sigma = self.preconditioning.sigmas(len(images), generator).to(images)
        noise = torch.randn(images.shape, generator=generator).to(images)
        if label_dropout and labels is not None:
            dropped = torch.rand(len(images), generator=generator) < label_dropout
            labels = labels.masked_fill(dropped.to(labels.device), self.classes)
        return Noised(images, images + sigma[:, None, None, None] * noise, sigma, labels, augment)

    def errors(self, batch: Noised) -> PerImage:
        """The weighted squared error of x0-hat, mean over pixels, one number per image."""
        call = self._call if batch.augment is None else partial(self._call, augment=batch.augment)
        clean = self.preconditioning.denoise(call, batch.noisy, batch.sigma, batch.labels)
        return self.preconditioning.weight(batch.sigma) * (clean - batch.clean).square().flatten(1).mean(1)

    def _call(self, x: Tensor, noise: Tensor, labels: Tensor | None, **told: Tensor) -> Tensor:
        """The network in the dtype of its weights, so that a sampler may keep its state in float64."""
        dtype = next(self.network.parameters(), x).dtype
        told = {name: value.to(dtype) for name, value in told.items()}
        return self.network(x.to(dtype), noise.to(_precise(dtype)), labels, **told).to(x.dtype)

    def _check(self, x: Tensor, labels: Tensor | None) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"denoiser: expected images [B, {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        if labels is None and self.conditional_only:
            raise ValueError("denoiser: expected labels, got none; it was trained without label dropout")
        if labels is None:
            return
        if not self.classes:
            raise ValueError("denoiser: expected no labels, it is unconditional; got labels: call it with labels=None")
        if len(labels) != len(x):
            raise ValueError(f"denoiser: expected one label for each of {len(x)} images, got {len(labels)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(f"denoiser: expected labels 0 to {self.classes - 1}, got {labels.unique().tolist()}")


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (Ho and Salimans 2022): x0 = uncond + scale (cond - uncond).

    Scale 1 is the conditional denoiser alone, in one call: no guidance; 0 the unconditional one; above 1 goes beyond.
    A Denoiser around a Denoiser. Two calls, not one of a doubled batch: any denoiser can be wrapped (the null class is
    its own affair), each call has the bits of an unguided one, memory stays, and full batches lose no speed by it.
    """

    denoiser: Denoiser
    scale: float

    def __call__(self, x: Tensor, sigma: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] -> x0-hat. ValueError without labels; the denoiser's own where it cannot go without."""
        if labels is None:
            raise ValueError("classifier-free guidance: expected labels to guide towards, got none")
        if self.scale == 1:
            return self.denoiser(x, sigma, labels)
        free = self.denoiser(x, sigma, None)
        return free + self.scale * (self.denoiser(x, sigma, labels) - free)


SPECS = {
    "UNetSpec": "gambeson.models.unet",
    "DDIMUNetSpec": "gambeson.models.ddim_unet",
    "ADMUNetSpec": "gambeson.models.adm_unet",
    "SongUNetSpec": "gambeson.models.song_unet",
    "DiffusersUNetSpec": "gambeson.models.diffusers_unet",
}
"""Class name of a network's spec -> the module that has it, imported when it is asked for."""


def denoiser_header(denoiser: NetworkDenoiser) -> dict[str, Any]:
    """What is needed besides the weights to build this denoiser again, JSON-able."""
    return {
        "kind": "denoiser",
        "network": plain(denoiser.spec),
        "preconditioning": plain(denoiser.preconditioning),
        "classes": denoiser.classes,
        "shape": list(denoiser.shape),
        "conditional_only": denoiser.conditional_only,
    }


def load_denoiser(path: Path) -> NetworkDenoiser:
    """A denoiser that `save_tensors(path, network.state_dict(), denoiser_header(...))` wrote, frozen, in eval mode.

    UserError for weights of another kind or of another version of gambeson, ValueError naming keys that do not fit.
    """
    tensors, header = load_tensors(path)
    if header.get("kind") != "denoiser":
        raise UserError(f"{path}: expected the weights of a denoiser, got {header.get('kind', 'a foreign file')!r}")
    try:
        shape, classes, only = tuple(header["shape"]), header["classes"], header["conditional_only"]
        spec = _rebuilt(header["network"], SPECS)
        preconditioning = _rebuilt(header["preconditioning"], {"EDM": __name__, "VP": __name__})
        sizes = [*shape, classes + 1]
        require(len(shape) == 3 and all(type(n) is int and n > 0 for n in sizes), "shape, classes", "numbers", sizes)
        check_asked({**header["network"], "shape": shape, "classes": classes}, tensors, str(path))
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path}: expected a header of this version of gambeson ({error}); train it again") from error
    network = built(lambda: spec.build(shape[0], classes), lambda m: check_shapes(m, tensors, str(path)), str(path))
    load_weights(network, tensors, str(path))
    denoiser = NetworkDenoiser(network, preconditioning, spec=spec, classes=classes, shape=shape, conditional_only=only)
    return denoiser.eval().requires_grad_(False)


def _rebuilt(described: Mapping[str, Any], modules: Mapping[str, str]) -> Any:
    """The dataclass that `canonical.plain` described; UserError for a class that the table does not have."""
    name = described["class"]
    if not isinstance(name, str) or name not in modules:
        raise unknown("part of a denoiser", str(name)[:100], modules)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items() if k != "class"}
    return getattr(importlib.import_module(modules[name]), name)(**fields)
