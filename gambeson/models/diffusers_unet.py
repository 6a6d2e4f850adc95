"""The diffusers library's UNet2DModel as a denoising network; needs `pip install gambeson[diffusers]`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gambeson.errors import UserError, require
from gambeson.models.shapes import check_sides
from gambeson.randomness import seeded


def library() -> Any:
    """The diffusers package; UserError saying how to install it where it is not."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"weights of diffusers: expected the diffusers library, got {error}; pip install gambeson[diffusers]"
        ) from error
    return diffusers


@dataclass(frozen=True, kw_only=True)
class DiffusersUNetSpec:
    """A UNet2DModel, described by its config as JSON text."""

    config: str = "{}"  # the UNet2DModel's config: a JSON object with sorted keys, those beginning with _ left out

    @classmethod
    def of(cls, config: dict[str, Any]) -> DiffusersUNetSpec:
        """The spec of a config. UserError, naming it, for a setting under which it is no plain VP network."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}
        for name, wanted in (
            ("time_embedding_type", "positional"), ("center_input_sample", False), ("class_embed_type", None),
        ):  # fmt: skip
            require(plain.get(name, wanted) == wanted, f"UNet2DModel, {name}", repr(wanted), plain.get(name))
        inside, outside = plain.get("in_channels", 3), plain.get("out_channels", 3)
        require(
            inside == outside, "UNet2DModel, out_channels", f"{inside} as in_channels (no learned variance)", outside
        )
        return cls(config=json.dumps(plain, sort_keys=True))

    @property
    def fields(self) -> dict[str, Any]:
        """The config as a dict."""
        return json.loads(self.config)

    @property
    def label_rows(self) -> int:
        """Rows of the class embedding; 0: unconditional."""
        return self.fields.get("num_class_embeds") or 0

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError where images of (channels, height, width) cannot be halved at every resolution."""
        check_sides("UNet2DModel", len(self.fields.get("block_out_channels", (224, 448, 672, 896))), shape)

    def build(self, channels: int, classes: int, seed: int = 0) -> DiffusersUNet:
        """The network with weights drawn from the seed.

        UserError where channels or classes contradict the config; one embedding beyond `classes` is the null class.
        """
        own = self.fields.get("in_channels", 3)
        require(channels == own, "UNet2DModel, image channels", f"{own}, as its config says", channels)
        known = {self.label_rows, max(self.label_rows - 1, 0)}
        require(classes in known, "UNet2DModel, classes", f"one of {sorted(known)}, as its config says", classes)
        with seeded(seed):
            return DiffusersUNet(self, library().UNet2DModel.from_config(self.fields), classes)


class DiffusersUNet(nn.Module):
    """(x [B, C, H, W], noise [B] = index t of the table, labels [B] or None) -> what the network predicts.

    The label `classes` is the null class where the embedding has a row for it; no labels mean it. The library computes
    the sine waves of t in float32 whatever the dtype of the weights.
    """

    def __init__(self, spec: DiffusersUNetSpec, unet: nn.Module, classes: int) -> None:
        super().__init__()
        self.spec, self.unet, self.classes = spec, unet, classes
        self.has_null = spec.label_rows == classes + 1

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None and self.spec.label_rows:
            if not self.has_null:
                raise ValueError(f"UNet2DModel: expected labels 0 to {self.classes - 1}, got none")
            labels = noise.new_full((len(noise),), self.classes, dtype=torch.int64)
        if labels is not None and not self.spec.label_rows:
            raise ValueError("UNet2DModel: expected no labels, got some; the network is unconditional")
        return self.unet(x, noise, class_labels=labels, return_dict=False)[0]
