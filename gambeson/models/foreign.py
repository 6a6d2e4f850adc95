"""Diffusion weights of other projects as Denoisers: EDM, DDIM, minimal-diffusion and the diffusers library.

A file's kind and sizes are read off its names and shapes, weights are filled strictly, and nothing in a file is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gambeson.errors import EnvironmentFault, UserError, require, unknown
from gambeson.models.adm_unet import ADMUNetSpec
from gambeson.models.ddim_unet import DDIMUNetSpec
from gambeson.models.denoiser import EDM, VP, NetworkDenoiser
from gambeson.models.diffusers_unet import DiffusersUNet, DiffusersUNetSpec, library
from gambeson.models.files import load_tensors, load_weights
from gambeson.models.pickles import DAMAGE, LEGACY, Record, plain, read_pickle, read_torch
from gambeson.models.shapes import Tensors, check_weights
from gambeson.models.song_unet import HALF_VARIANCE, SongUNetSpec

Kind = Literal["auto", "edm", "ddim", "minimal-diffusion", "diffusers"]
"""Whose weights they are."""


class Family(NamedTuple):
    """One project's files: names that tell them, how sizes are read, and what its networks predict."""

    marks: tuple[str, ...]  # names of tensors that only its files have together
    read: Callable[[Tensors], tuple[Any, int, int]]  # weights -> (spec, image channels, classes)
    preconditioning: EDM | VP


FAMILIES = {
    "ddim": Family(
        ("temb.dense.0.weight", "conv_in.weight", "mid.attn_1.q.weight"), DDIMUNetSpec.read, VP(time="index")
    ),
    "minimal-diffusion": Family(
        ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight"),
        ADMUNetSpec.read,
        VP(schedule="cosine", time="index"),
    ),
    "edm": Family(("map_layer0.weight", "map_layer1.weight"), SongUNetSpec.read, EDM()),
}


@dataclass(frozen=True)
class Found:
    """What a file held: weights by their bare names, and what EDM's pickle says besides."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def load_foreign(
    path: str | Path,
    *,
    kind: Kind = "auto",
    image_size: int | None = None,
    classes: int | None = None,
    preconditioning: EDM | VP | None = None,
    revision: str | None = None,
) -> NetworkDenoiser:
    """A Denoiser from weights of another project, float32, frozen, in eval mode.

    path: a file, a folder of diffusers, or (where no such path exists) a hub id org/name, whose `revision` is fetched.
    image_size: the image's side where the weights do not tell it (DDIM and minimal-diffusion in other sizes than the
    published ones).
    classes: one less than the label embedding's rows where the last row is the null class of classifier-free guidance
    (diffusers only). preconditioning: what the network predicts, where the published files of its family differ from
    it or, as a lone UNet2DModel, do not say. UserError for files of another or unknown kind and for weights that do
    not fit, naming them; EnvironmentFault for damaged files and a hub out of reach.
    """
    if kind not in ("auto", "diffusers", *FAMILIES):
        raise unknown("kind of weights", kind, ["auto", "diffusers", *FAMILIES])
    place = Path(path)
    if place.is_file() and kind != "diffusers":
        made = _from_file(place, kind, image_size, preconditioning)
    else:
        came = "a folder" if place.is_dir() else "no such file"
        if kind not in ("auto", "diffusers"):
            raise UserError(f"{path}: expected a file with the weights of {kind}, got {came}; name the file itself")
        require(not place.is_file(), str(path), "a folder that diffusers saved, or a hub id", "a file")
        made = _from_folder(_folder(str(path), revision), image_size, classes, preconditioning)
    require(classes in (None, made.classes), f"{path}, classes", f"{made.classes} as in the weights", classes)
    return made.eval().requires_grad_(False)


def _from_file(path: Path, kind: str, image_size: int | None, preconditioning: EDM | VP | None) -> NetworkDenoiser:
    found = _found(path)
    name = _family(found.tensors, kind, path)
    family = FAMILIES[name]
    try:
        spec, channels, classes = family.read(found.tensors)
        side = _side(spec, image_size)
        spec.check((channels, side, side))
        network = spec.build(channels, classes)
        load_weights(network, found.tensors, str(path))
        own = EDM(sigma_data=found.facts["sigma_data"]) if "sigma_data" in found.facts else family.preconditioning
    except ValueError as error:
        raise UserError(f"{path}, read as {name}: {str(error).removeprefix(f'{path}: ')}") from None
    return NetworkDenoiser(
        network,
        preconditioning or own,
        spec=spec,
        classes=classes,
        shape=(channels, side, side),
        conditional_only=classes > 0 and not found.facts.get("label_dropout"),
    )


def _side(spec: DDIMUNetSpec | ADMUNetSpec | SongUNetSpec, image_size: int | None) -> int:
    """The image's side. UserError where the weights do not tell it and it is not given, or where the two differ."""
    if isinstance(spec, SongUNetSpec):
        require(image_size in (None, spec.side), "image_size", f"{spec.side} as in the weights", image_size)
    side = image_size or spec.side
    if side is None:
        raise UserError(
            f"image_size: expected the side of the images in pixels, which the weights do not tell, got none; "
            f"{spec} is not one of the published sizes"
        )
    return side


def _found(path: Path) -> Found:
    """The weights of a file, whatever it was written with. UserError for one put together so as to mislead."""
    try:
        return _opened(path)
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{path}: expected tensors by name, got a file that cannot be read as such: {error}") from error


def _opened(path: Path) -> Found:
    """The weights of a file; the first bytes tell what it was written with."""
    with path.open("rb") as file:
        start = file.read(64)
    # safetensors begin with the length of a JSON header, which as bytes may look like the start of anything
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        tensors, header = load_tensors(path)
        require(not header, str(path), "weights of another project", f"a {header.get('kind')} of gambeson's own")
        return Found(_bare(tensors, path), {})
    if start[:2] == b"PK" or start.startswith(LEGACY):
        return Found(_bare(_state(read_torch(path), path), path), {})
    if start[:1] == b"\x80":
        return _edm(read_pickle(path), path)
    raise UserError(
        f"{path}: expected a file of torch.save (.pt, .pth, .ckpt), a pickle of EDM (.pkl) or safetensors, "
        f"got one that begins with {start[:8]!r}"
    )


def _state(content: Any, path: Path) -> Mapping[str, Any]:
    """The state_dict in what torch.save wrote: itself, under `model` or `state_dict`, or in DDIM's training list.

    That list is [state_dict, optimiser, epoch, step, EMA of the parameters]; the EMA is what samples well.
    """
    if isinstance(content, list) and content and isinstance(content[0], Mapping):
        content = content[4] if len(content) == 5 else content[0]
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected a state_dict (tensors by name), got a {type(content).__name__}")
    return plain(content)


def _bare(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Names without what wraps them (`module.` of data parallel, `model.` of EDM) and EDM's fixed filters, checked.

    UserError for anything but floating-point tensors of finite numbers.
    """
    others = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    require(not others, str(path), "tensors only", others[:5])
    check_weights(state, str(path))
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    filters = {name for name in state if name.endswith(".resample_filter")}
    for name in filters:
        box = torch.full((1, 1, 2, 2), 0.25)
        require(torch.equal(state[name].float(), box), f"{path}, {name}", "DDPM++'s 2x2 box filter", state[name].shape)
    return {name: value for name, value in state.items() if name not in filters}


def _family(tensors: Tensors, kind: str, path: Path) -> str:
    """Whose names these are. UserError listing what was looked for where it is nobody's, or another's than asked."""
    fitting = [name for name, family in FAMILIES.items() if all(mark in tensors for mark in family.marks)]
    if len(fitting) == 1 and kind in ("auto", fitting[0]):
        return fitting[0]
    wanted = {kind: FAMILIES[kind]} if kind in FAMILIES else FAMILIES
    looked = "; ".join(f"{name}: {', '.join(family.marks)}" for name, family in wanted.items())
    fits = f"those of {' and '.join(fitting)}" if fitting else f"{', '.join(list(tensors)[:5])}, ..."
    raise UserError(f"{path}: expected tensors named as in {looked}; got {fits}")


def _edm(content: Any, path: Path) -> Found:
    """EDM's network pickle: the EMA network under `ema`, an EDMPrecond around a SongUNet of the DDPM++ kind."""
    outer = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(outer, Record):
        held = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: expected EDM's network pickle with a network under 'ema', got {held}")
    require(outer.class_name == "EDMPrecond", f"{path}, ema", "an EDMPrecond (EDM's own kind)", outer.class_name)
    inner = outer.modules().get("model")
    name = inner.class_name if inner else "nothing"
    if inner is None or name != "SongUNet":
        raise UserError(f"{path}, ema.model: expected a SongUNet (DDPM++); {name} (ADM and others) is not read")
    wanted = {"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard"}
    given = inner.state.get("_init_kwargs", {})
    require(isinstance(given, dict), f"{path}, SongUNet's _init_kwargs", "a dict", given)
    for key, value in {**wanted, "channel_mult_noise": 1, "resample_filter": [1, 1]}.items():
        got = given.get(key, value)
        require(bool(got == value), f"{path}, SongUNet's {key}", f"{value!r} (DDPM++; NCSN++ is not read)", got)
    _check_blocks(inner, path)
    facts = {"sigma_data": outer.state.get("sigma_data", 0.5), "label_dropout": inner.state.get("label_dropout", 0)}
    numbers = all(isinstance(v, int | float) for v in facts.values())
    require(numbers, f"{path}, EDMPrecond and SongUNet", "numbers", facts)
    facts = {name: float(value) for name, value in facts.items()}
    require(0 < facts["sigma_data"] < math.inf, f"{path}, EDMPrecond's sigma_data", "a number above 0", facts)
    return Found(_bare(inner.tensors(), path), facts)


def _check_blocks(network: Record, path: Path) -> None:
    """UserError unless the blocks are put together as ours are, which no shape tells."""
    wanted = {"skip_scale": (HALF_VARIANCE,), "adaptive_scale": (False,), "num_heads": (0, 1)}
    parts = [part for name, part in network.modules().items() if name in ("enc", "dec")]
    blocks = [block for part in parts for block in part.modules().values()]
    for block in (b for b in blocks if b.class_name == "UNetBlock"):
        for key, values in wanted.items():
            got = block.state.get(key, values[0])
            fits = isinstance(got, int | float) and any(abs(got - value) < 1e-6 for value in values)
            require(fits, f"{path}, UNetBlock's {key}", " or ".join(map(str, values)), got)


def _from_folder(
    folder: Path, image_size: int | None, classes: int | None, preconditioning: EDM | VP | None
) -> NetworkDenoiser:
    """A DDPM-like pipeline's folder, or that of a UNet2DModel alone (whose preconditioning must be given)."""
    index = _json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    parts = {k for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and v[0]}
    beyond = sorted(parts - {"unet", "scheduler"})
    require(not beyond, str(folder), "a pipeline of unet and scheduler that works on pixels", f"also {beyond}")
    where = folder / "unet" if (folder / "unet").is_dir() else folder
    require((where / "config.json").is_file(), str(where), "diffusers' config.json of a UNet2DModel", "none")
    config = _json(where / "config.json")
    kind = config.get("_class_name")
    require(kind == "UNet2DModel", f"{where}/config.json, _class_name", "UNet2DModel", kind)
    spec = DiffusersUNetSpec.of(config)
    rows, side = spec.label_rows, image_size or config.get("sample_size")
    if not isinstance(side, int):
        raise UserError(f"{where}/config.json, sample_size: expected one number, got {side!r}; give image_size")
    require(classes in (None, rows, rows - 1), "classes", f"{rows}, or {rows - 1} and a null class", classes)
    count = rows if classes is None else classes
    shape = (spec.fields.get("in_channels", 3), side, side)
    spec.check(shape)
    return NetworkDenoiser(
        DiffusersUNet(spec, _pretrained(where), count),
        preconditioning or _scheduled(folder),
        spec=spec,
        classes=count,
        shape=shape,
        conditional_only=0 < rows == count,
    )


def _pretrained(where: Path) -> Any:
    """The library's network with the folder's weights. UserError naming keys that do not fit."""
    try:
        unet, info = library().UNet2DModel.from_pretrained(
            str(where), local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{where}: expected the weights of its UNet2DModel, got: {error}") from error
    wrong = {name: keys for name, keys in info.items() if keys}
    require(not wrong, str(where), "weights that fit config.json", wrong)
    check_weights(unet.state_dict(), str(where))
    return unet.float()


SCHEDULERS = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers of diffusers whose networks were trained as VP models on a table of betas."""


def _scheduled(folder: Path) -> VP:
    """What the network predicts and on which table, from the folder's scheduler_config.json.

    UserError, naming the setting, for one that our VP does not have.
    """
    places = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UserError(
            f"{folder}: expected {places[0]} (what the network predicts), got none; or give preconditioning"
        )
    config = _json(path)
    kind = config.get("_class_name")
    require(kind in SCHEDULERS, f"{path}, _class_name", f"one of {', '.join(SCHEDULERS)}", kind)
    for name in ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas"):
        require(not config.get(name), f"{path}, {name}", "none", config.get(name))
    prediction = _mapped(path, config, "prediction_type", {"epsilon": "eps", "v_prediction": "v", "sample": "x0"})
    schedule = _mapped(path, config, "beta_schedule", {"linear": "linear", "squaredcos_cap_v2": "cosine"})
    return VP(
        prediction=prediction,
        schedule=schedule,
        steps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 1e-4),
        beta_end=config.get("beta_end", 0.02),
        time="index",
    )


def _mapped(path: Path, config: Mapping[str, Any], name: str, words: Mapping[str, str]) -> Any:
    """Our word for a setting of diffusers, the first of `words` where it is absent; UserError for one we lack."""
    word = config.get(name, next(iter(words)))
    require(word in words, f"{path}, {name}", f"one of {', '.join(words)}", word)
    return words[word]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object, got: {error}") from error
    require(isinstance(content, dict), str(path), "a JSON object", type(content).__name__)
    return content


def _folder(path: str, revision: str | None) -> Path:
    """The folder on disk, or that of a hub id: from the hub's cache if it is whole, else fetched.

    EnvironmentFault where the hub cannot be reached; it is asked once and given ten seconds to answer.
    """
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1 or not all(path.split("/")) or Path(path).suffix in (".pkl", ".pt", ".pth", ".ckpt"):
        raise UserError(f"{path}: expected a file or folder with weights, or a hub id like org/name; found none")
    library()
    from huggingface_hub import snapshot_download

    wanted = [f"{part}{end}" for part in ("", "unet/", "scheduler/") for end in ("*.json", "diffusion_pytorch_model*")]
    asked = {"repo_id": path, "revision": revision, "allow_patterns": wanted, "ignore_patterns": ["*.fp16.*"]}
    try:
        cached = Path(snapshot_download(**asked, local_files_only=True))
        if any(cached.rglob("diffusion_pytorch_model*")):
            return cached
    except OSError:
        pass  # not in the cache: the hub is asked
    try:
        return Path(snapshot_download(**asked, etag_timeout=10))
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(f"{path}: no such file or folder, and the hub could not give it: {reason}") from error
