"""What attacks and certificates ask of images, labels and networks before they begin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gambeson.robustness.attack_losses import Network, true_float32
from gambeson.types import Images, Logits


class NotFinite(ValueError):
    """A classifier's logits are not numbers."""


def logits_of(model: Network, images: Images, batch_size: int = 256) -> Logits:
    """[B, K] logits without gradients, batch by batch, in the images' own precision (autocast off).

    Raises ValueError if the model is in training mode or on another device, or its output not [B, K] or not finite.
    """
    if isinstance(model, nn.Module):
        places = {str(p.device) for p in model.parameters()}
        if places and str(images.device) not in places:
            raise ValueError(
                f"attack: expected model and images on one device, got the model on {', '.join(sorted(places))} and "
                f"the images on {images.device}; call model.to({str(images.device)!r}), or move images and labels"
            )
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise ValueError("attack: expected a model in eval mode, got one in training mode; call model.eval() first")
    with torch.no_grad(), true_float32(), torch.autocast(images.device.type, enabled=False):
        logits = torch.cat([model(part) for part in images.split(batch_size)])
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"classifier: expected logits [B, at least 2 classes], got shape {list(logits.shape)}")
    if not logits.isfinite().all():
        raise NotFinite("classifier: expected finite logits, got NaN or infinity; usually the training diverged")
    return logits


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
            "try labels.long().flatten()"
        )
    if labels.min() < 0:
        raise ValueError(f"attack labels: expected class indices from 0, got {int(labels.min())}")


def clean_logits(model: Network, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """Logits of the clean images, after every check of the inputs and of the model."""
    attack_input_checks(images, labels)
    clean = logits_of(model, images, batch_size)
    if labels.max() >= clean.shape[1]:
        raise ValueError(f"attack labels: expected below {clean.shape[1]} (the logits), got {int(labels.max())}")
    return clean
