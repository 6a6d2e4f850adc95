"""What attacks and certificates ask of images, labels and networks before they begin."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gambeson.errors import require
from gambeson.models.memory import lacks_memory
from gambeson.robustness.attack_losses import Network, true_float32
from gambeson.types import Images, Logits

T = TypeVar("T", bound=tuple[Tensor, ...])


class NotFinite(ValueError):
    """A classifier's logits are not numbers."""


@dataclass
class Portions:
    """Work on a batch in parts of at most `most` images (None: all at once); a lack of memory halves them for good, and
    says so."""

    most: int | None = None

    def each(self, work: Callable[..., T], *batch: Tensor) -> T:
        """The work on the parts, its tensors joined again along the images."""
        while True:
            try:
                if self.most is None or self.most >= len(batch[0]):
                    return work(*batch)
                parts = [work(*part) for part in zip(*(b.split(self.most) for b in batch), strict=True)]
                return tuple(map(torch.cat, zip(*parts, strict=True)))  # type: ignore[return-value]
            except RuntimeError as error:
                self._halve(error, len(batch[0]))

    def _halve(self, error: RuntimeError, size: int) -> None:
        """Raises the error again unless it is a lack of memory that a smaller part may cure."""
        most = min(self.most or size, size)
        if not lacks_memory(error) or most == 1:
            raise error
        self.most = most // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory with {most} images at once: going on with {self.most}", stacklevel=2)


def logits_of(model: Network, images: Images, batch_size: int = 256) -> Logits:
    """[B, K] logits in the images' dtype, without gradients, batch by batch; autocast off. A batch that does not fit
    the memory is halved.

    Raises ValueError if the model is in training mode, on another device or of another dtype, or if its output is not
    [B, K] or not finite.
    """
    if isinstance(model, nn.Module):
        _check_module(model, images)
    require(batch_size >= 1, "batch_size", "at least 1", batch_size)
    with torch.no_grad(), true_float32(), torch.autocast(images.device.type, enabled=False):
        (logits,) = Portions(batch_size).each(lambda part: (_tensor(model(part)).to(images.dtype),), images)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"classifier: expected logits [B, at least 2 classes], got shape {list(logits.shape)}")
    if not logits.isfinite().all():
        raise NotFinite("classifier: expected finite logits, got NaN or infinity; usually the training diverged")
    return logits


def _tensor(found: Any) -> Tensor:
    """A network's answer. ValueError for anything but a tensor."""
    if not isinstance(found, Tensor):
        raise ValueError(f"classifier: expected one tensor of logits, got {type(found).__name__}; return them alone")
    return found


def _check_module(model: nn.Module, images: Tensor) -> None:
    """ValueError for a model in training mode, elsewhere than the images, or of float32 for images that are not."""
    places = {str(p.device) for p in model.parameters()}
    if places and str(images.device) not in places:
        raise ValueError(
            f"attack: expected model and images on one device, got the model on {', '.join(sorted(places))} and "
            f"the images on {images.device}; call model.to({str(images.device)!r}), or move images and labels"
        )
    if any(module.training for module in model.modules()):
        raise ValueError("attack: expected a model in eval mode, got one in training mode; call model.eval() first")
    if {p.dtype for p in model.parameters()} == {torch.float32} and images.dtype != torch.float32:
        raise ValueError(f"attack: expected float32 images for a float32 model, got {images.dtype}; try images.float()")


def attack_input_checks(images: Tensor, labels: Tensor) -> None:
    """ValueError unless images are float [B, C, H, W] in [0, 1] with B >= 1, and labels int64 [B], none below 0."""
    if images.dtype == torch.uint8:
        raise ValueError("attack images: expected float in [0, 1], got uint8; divide first: images.float() / 255")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"attack images: expected float [B, C, H, W], got {images.dtype} {list(images.shape)}")
    if len(images) == 0:
        raise ValueError("attack images: expected at least one image, got none; usually a filter left nothing over")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"attack images: expected values in [0, 1], got {low:.4g} to {high:.4g}; "
            "normalisation belongs into the model"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"attack labels: expected int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}; "
            f"try {'labels.argmax(1)' if labels.numel() > len(images) else 'labels.long().flatten()'}"
        )
    if labels.device != images.device:
        raise ValueError(f"attack labels: expected on {images.device}, as the images, got {labels.device}")
    if labels.min() < 0:
        raise ValueError(f"attack labels: expected class indices from 0, got {int(labels.min())}")


def clean_logits(model: Network, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """Logits of the clean images, after every check of the inputs and of the model."""
    attack_input_checks(images, labels)
    clean = logits_of(model, images, batch_size)
    if labels.max() >= clean.shape[1]:
        raise ValueError(f"attack labels: expected below {clean.shape[1]} (the logits), got {int(labels.max())}")
    return clean
