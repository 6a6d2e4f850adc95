"""Golden facts of other projects' networks, and small weights in the layout of their files.

Golden files: keys, shapes and outputs of the published code for weights filled by a rule; no code and no weights of it.
The mistakes they were made to catch (order of sine and cosine, frequency exponent, epsilon of the norms, padding, order
of q, k and v, heads, label scale, skip scale) move the outputs by 4e-4 to 5.
"""

import json
import math
import os
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from gambeson.models.adm_unet import ADMUNetSpec
from gambeson.models.ddim_unet import DDIMUNetSpec
from gambeson.models.denoiser import EDM, VP, NetworkDenoiser
from gambeson.models.song_unet import SongUNetSpec

GOLDEN = {name: json.loads((Path(__file__).parent / f"golden/{name}.json").read_text()) for name in
          ("ddim_unet", "adm_unet", "song_unet")}  # fmt: skip
SMALL = {
    "ddim_unet": (DDIMUNetSpec(width=32), 0, VP(time="index")),
    "adm_unet": (ADMUNetSpec.small(), 43, VP(schedule="cosine", time="index")),
    "song_unet": (SongUNetSpec(width=32, blocks=1, augment=9), 10, EDM()),
}
REAL = {
    "ddim_unet": (DDIMUNetSpec(), 0, VP(time="index")),
    "adm_unet": (ADMUNetSpec(), 43, VP(schedule="cosine", time="index")),
    "song_unet": (SongUNetSpec(augment=9), 10, EDM()),
}


def published(name: str, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Our names as the published files have them: EDM's under `model.`, with the filters of resampling blocks."""
    if name != "song_unet":
        return shapes
    blocks = [k.removesuffix(".conv0.weight") for k in shapes if k.endswith(("_down.conv0.weight", "_up.conv0.weight"))]
    filters = {f"{block}.{layer}.resample_filter": [1, 1, 2, 2] for block in blocks for layer in ("conv0", "skip")}
    return {f"model.{k}": v for k, v in {**shapes, **filters}.items()}


def manifest(name: str, network: nn.Module) -> dict[str, list[int]]:
    return published(name, {k: list(v.shape) for k, v in network.state_dict().items()})


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """weights_rule of the golden files, float64."""
    tensors = {}
    for n, key in enumerate(sorted(shapes)):
        f = torch.sin(0.7 * torch.arange(math.prod(shapes[key]), dtype=torch.float64) + 1.3 * n).reshape(shapes[key])
        if key.endswith("resample_filter"):
            tensors[key] = torch.full_like(f, 0.25)
        elif f.ndim == 1:
            tensors[key] = 1 + 0.2 * f if key.endswith("weight") else 0.1 * f
        else:
            tensors[key] = f * math.sqrt(2 / f[0].numel())
    return tensors


def pattern(shape: list[int], dtype: torch.dtype) -> Tensor:
    """input_rule of the golden files."""
    return (0.5 + 0.4 * torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64))).reshape(shape).to(dtype)


def golden_denoiser(name: str, dtype: torch.dtype, sizes: dict = SMALL) -> NetworkDenoiser:
    spec, classes, preconditioning = sizes[name]
    network = spec.build(3, classes).to(dtype)
    weights = filled(manifest(name, network))
    network.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if "resample" not in k})
    return NetworkDenoiser(
        network, preconditioning, spec=spec, classes=classes, shape=(3, 32, 32), conditional_only=classes > 0
    ).eval()


@torch.no_grad()
def golden_output(name: str, denoiser: NetworkDenoiser, facts: dict, dtype: torch.dtype) -> Tensor:
    """The network's own output (eps, or EDM's F) for the golden input."""
    x = pattern(facts["input_shape"], dtype)
    if name == "song_unet":
        s = torch.tensor(facts["sigma"], dtype=dtype)
        return denoiser.network(x / (s**2 + 0.25).sqrt()[:, None, None, None], s.log() / 4, EDM_LABELS[: len(x)])
    t = torch.tensor(facts["t"], dtype=dtype)
    return denoiser.network(x, t, torch.tensor(facts["y"]) if "y" in facts else None)


EDM_LABELS = torch.tensor([3, 7])


def agrees(output: Tensor, expected: dict, relative: float) -> bool:
    """First eight numbers, sum and norm; the tolerance is relative to the largest, the norm for the sum."""
    first = torch.tensor(expected["first8"], dtype=torch.float64)
    close = (output.flatten()[:8].double() - first).abs().max() <= relative * max(first.abs().max(), 1.0)
    total, norm = output.double().sum().item(), output.double().norm().item()
    return (
        list(output.shape) == expected["shape"]
        and bool(close)
        and abs(total - expected["sum"]) <= relative * max(abs(expected["sum"]), expected["l2"])
        and abs(norm - expected["l2"]) <= relative * expected["l2"]
    )


TINY = {
    "ddim": DDIMUNetSpec(width=32, multipliers=(1, 2), blocks=1, attention=(0,)),
    "minimal-diffusion": ADMUNetSpec(
        width=32, multipliers=(1, 2), blocks=1, attention=(1,), embedding=2, head_width=32
    ),
    "edm": SongUNetSpec(resolution=16, width=16, multipliers=(1, 2, 2), blocks=2, attention=(8,), augment=9),
}
TINY_CLASSES = {"ddim": 0, "minimal-diffusion": 5, "edm": 5}


def tiny(kind: str) -> dict[str, Tensor]:
    network = TINY[kind].build(1, TINY_CLASSES[kind])
    shapes = manifest({"edm": "song_unet"}.get(kind, kind), network)
    return {k: v.float() for k, v in filled(shapes).items()}


class Replaced:
    """Unpickled it is an OrderedDict whose attributes, `items` and others, are those given."""

    def __init__(self, content: dict, **attributes: object) -> None:
        self.content, self.attributes = content, attributes

    def __reduce__(self):
        return OrderedDict, (), self.attributes, None, iter(self.content.items())


class Evil:
    """Unpickled by Python it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)
