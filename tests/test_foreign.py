"""Foreign diffusion weights as Denoisers: wrappings, sizes, refusals, and the diffusers library."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from foreign_files import TINY, TINY_CLASSES, Evil, Replaced, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from gambeson.errors import EnvironmentFault, UserError
from gambeson.models.adm_unet import ADMUNetSpec
from gambeson.models.ddim_unet import DDIMUNetSpec
from gambeson.models.denoiser import VP, denoiser_header, load_denoiser
from gambeson.models.files import save_tensors
from gambeson.models.foreign import load_foreign


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"model": s, "epoch": 3},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
])  # fmt: skip
@pytest.mark.parametrize("kind", TINY)
def test_state_dicts_are_found_in_all_their_wrappings(tmp_path: Path, kind: str, wrap) -> None:
    path, tensors = tmp_path / "weights.pt", tiny(kind)
    torch.save(wrap(tensors), path)
    size = None if kind == "edm" else 16
    denoiser = load_foreign(path, image_size=size)
    assert (denoiser.spec, denoiser.shape, denoiser.classes) == (TINY[kind], (1, 16, 16), TINY_CLASSES[kind])
    ours = denoiser.network.state_dict()
    assert all(torch.equal(ours[k.removeprefix("model.")], v) for k, v in tensors.items() if "resample" not in k)
    with pytest.raises(UserError, match="expected"):
        load_foreign(path, image_size=size, kind="edm" if kind == "ddim" else "ddim")


@pytest.mark.parametrize("kind", TINY)
def test_a_foreign_denoiser_survives_our_own_files(tmp_path: Path, kind: str) -> None:
    torch.save(tiny(kind), tmp_path / "weights.pt")
    denoiser = load_foreign(tmp_path / "weights.pt", image_size=16)
    path = tmp_path / "ours.safetensors"
    save_tensors(path, denoiser.network.state_dict(), denoiser_header(denoiser))
    again = load_denoiser(path)
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 4]) if denoiser.classes else None
    assert torch.equal(again(x, 1.3, labels), denoiser(x, 1.3, labels))
    assert (again.spec, again.preconditioning) == (denoiser.spec, denoiser.preconditioning)
    with pytest.raises(UserError, match=r"gambeson's own"):
        load_foreign(path)


def test_ddims_training_checkpoint_gives_the_ema_and_old_torch_files_are_read(tmp_path: Path) -> None:
    ema = tiny("ddim")
    raw = {f"module.{k}": torch.zeros_like(v) for k, v in ema.items()}
    torch.save([raw, {"state": {}, "param_groups": []}, 3, 1000, ema], tmp_path / "ckpt.pth")
    old = tmp_path / "old.ckpt"
    torch.save(ema, old, _use_new_zipfile_serialization=False)
    for path in (tmp_path / "ckpt.pth", old):
        denoiser = load_foreign(path, image_size=32)
        assert torch.equal(denoiser.network.state_dict()["conv_in.weight"], ema["conv_in.weight"])
        assert denoiser.preconditioning == VP(time="index")
        assert denoiser.shape == (1, 32, 32)
    torch.save([raw, {"state": {}, "param_groups": []}, 3, 1000], tmp_path / "ckpt.pth")
    plain = load_foreign(tmp_path / "ckpt.pth", image_size=32)
    assert plain.network.state_dict()["conv_in.weight"].abs().sum() == 0


def test_the_side_of_the_images_is_read_off_published_sizes_only(tmp_path: Path) -> None:
    """DDIM's configurations and minimal-diffusion's multipliers by side; for others it has to be given."""
    ddim = [DDIMUNetSpec(), DDIMUNetSpec(multipliers=(1, 2, 2, 2, 4), attention=(2,))]
    adm = [ADMUNetSpec(), ADMUNetSpec.small(), ADMUNetSpec(multipliers=(1, 2, 3, 4), attention=(1, 2, 3))]
    assert [spec.side for spec in ddim + adm] == [32, 64, 32, 32, 64]
    others = [DDIMUNetSpec(width=64), DDIMUNetSpec(attention=(2,)), ADMUNetSpec(blocks=2), ADMUNetSpec(attention=(0,))]
    assert [spec.side for spec in others] == [None] * 4
    for kind in ("ddim", "minimal-diffusion"):
        torch.save(tiny(kind), tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"image_size: expected the side of the images.*got none"):
            load_foreign(tmp_path / "w.pt")
    small = ADMUNetSpec.small().build(1, 3)  # GTSRB's network in one colour
    torch.save(small.state_dict(), tmp_path / "w.pt")
    assert load_foreign(tmp_path / "w.pt").shape == (1, 32, 32)
    assert load_foreign(tmp_path / "w.pt", image_size=64).shape == (1, 64, 64)  # trained on others than its authors'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.long(), "floating-point weights, got torch.int64"),
        (lambda t: torch.where(t == t.max(), torch.nan, t), "finite weights, got '1 of 32 are NaN or infinite'"),
        (lambda t: t / 0, "finite weights, got '32 of 32"),
        (lambda t: t[:1].clone().expand(32), "at most the 4 bytes stored for it"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_none_are_refused_by_name(tmp_path: Path, suffix: str, change, message: str) -> None:
    tensors, path = tiny("ddim"), tmp_path / f"w.{suffix}"
    tensors["norm_out.bias"] = change(tensors["norm_out.bias"])
    if suffix == "pt":
        torch.save({k: v.clone() if v.stride() != (0,) else v for k, v in tensors.items()}, path)
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        if "bytes stored" in message:  # there each tensor is written out
            assert load_foreign(path, image_size=16).classes == 0
            return
    with pytest.raises(UserError, match=rf"w\.{suffix}(, norm_out\.bias)?: expected.*{message}"):
        load_foreign(path, image_size=16)


def test_a_few_bytes_that_ask_for_a_giant_are_refused_before_it_is_built(tmp_path: Path) -> None:
    tensors = tiny("ddim")
    tensors["conv_in.weight"] = torch.zeros(1).expand(1 << 40, 1, 3, 3)
    torch.save(tensors, tmp_path / "w.pt")
    with pytest.raises(
        UserError, match=r"w\.pt: expected a tensor of at most the 4 bytes stored for it, got \[1099511627776, "
    ):
        load_foreign(tmp_path / "w.pt", image_size=16)


def test_a_dict_with_methods_of_its_own_is_read_as_the_dict_it_is(tmp_path: Path) -> None:
    """A file can replace an OrderedDict's attributes; nothing of them is called, and what breaks is a UserError."""
    torch.save(Replaced(tiny("ddim"), items=5, keys=5), tmp_path / "w.pt")
    assert load_foreign(tmp_path / "w.pt", image_size=16).spec == TINY["ddim"]
    torch.save(Replaced(tiny("ddim"), get=5), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt: expected tensors by name"):
        load_foreign(tmp_path / "w.pt", image_size=16)


def test_the_callers_preconditioning_wins(tmp_path: Path) -> None:
    torch.save(tiny("ddim"), tmp_path / "weights.pt")
    mine = VP(prediction="v", schedule="cosine", time="index")
    assert load_foreign(tmp_path / "weights.pt", image_size=32, preconditioning=mine).preconditioning == mine


@pytest.mark.parametrize("kind", TINY)
def test_safetensors_are_known_whatever_their_first_bytes(tmp_path: Path, kind: str) -> None:
    """They begin with the length of their header, which may look like a pickle (0x80) or a zip file (PK)."""
    path, tensors, starts = tmp_path / "w.safetensors", tiny(kind), set()
    for padding in range(0, 257, 8):
        save_file(tensors, path, metadata={"note": "a" * padding})
        start = path.read_bytes()[:1]
        if start in (b"\x80", b"P", b"\x00"):
            starts.add(start)
            assert load_foreign(path, image_size=16).spec == TINY[kind]
    assert b"\x80" in starts


def test_files_of_no_known_kind_say_what_was_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"layer.weight": torch.zeros(2)}, path)
    with pytest.raises(
        UserError, match=r"ddim: temb.*minimal-diffusion: time_embed.*edm: map_layer0.*got layer\.weight"
    ):
        load_foreign(path)
    torch.save({"layer.weight": torch.zeros(2), "epoch": 3}, path)
    with pytest.raises(UserError, match=r"tensors only.*epoch"):
        load_foreign(path)
    torch.save({**tiny("ddim"), **tiny("minimal-diffusion")}, path)
    with pytest.raises(UserError, match="got those of ddim and minimal-diffusion"):
        load_foreign(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="expected a state_dict"):
        load_foreign(path)
    path.write_bytes(pickle.dumps({"G": 1}))
    with pytest.raises(UserError, match=r"under 'ema', got \['G'\]"):
        load_foreign(path)
    path.write_bytes(b"PNG and so on")
    with pytest.raises(UserError, match="begins with b'PNG"):
        load_foreign(path)
    with pytest.raises(UserError, match="a folder that diffusers saved"):
        load_foreign(path, kind="diffusers")
    with pytest.raises(Exception, match="kind"):  # UserError; under the types' check theirs
        load_foreign(path, kind="adm")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"none\.pkl: expected a file or folder"):
        load_foreign(tmp_path / "none.pkl")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights.pt", tiny("ddim")
    tensors["logvar"] = tensors.pop("norm_out.bias")
    tensors["up.0.block.1.conv1.weight"] = tensors["up.0.block.1.conv1.weight"][:, 1:]
    torch.save(tensors, path)
    with pytest.raises(UserError, match=r"ddim.*missing \['norm_out.bias'\], unexpected \['logvar'\].*up\.0\.block\.1"):
        load_foreign(path, image_size=16)
    tensors = tiny("ddim")
    del tensors["down.1.block.0.conv1.weight"]
    torch.save(tensors, path)
    with pytest.raises(UserError, match=r"read as ddim.*down\.1\.block\.0\.conv1\.weight, which is missing"):
        load_foreign(path)
    learned = tiny("minimal-diffusion")
    learned["out.2.weight"] = learned["out.2.weight"].repeat(2, 1, 1, 1)
    torch.save(learned, path)
    with pytest.raises(UserError, match="learned variance"):
        load_foreign(path)
    edm = tiny("edm")
    edm["model.enc.8x8_down.conv0.resample_filter"] = torch.ones(1, 1, 4, 4)
    torch.save(edm, path)
    with pytest.raises(UserError, match="2x2 box filter"):
        load_foreign(path)
    torch.save(tiny("edm"), path)
    with pytest.raises(UserError, match="image_size: expected 16"):
        load_foreign(path, image_size=32)
    with pytest.raises(UserError, match="classes: expected 5"):
        load_foreign(path, classes=4)


# ---- the diffusers library -------------------------------------------------------------------------------------------


def library_unet(embeddings: int | None = None, **changed: object):
    diffusers = pytest.importorskip("diffusers")
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16),
              "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
              "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": embeddings, **changed}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(**config).eval()


def save_pipeline(folder: Path, unet, **scheduler: object) -> Path:
    diffusers = pytest.importorskip("diffusers")
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


X8 = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("embeddings", "classes"), [(None, 0), (4, 4), (5, 4)])
def test_a_library_pipeline_denoises_as_the_library(tmp_path: Path, embeddings: int | None, classes: int) -> None:
    unet = library_unet(embeddings)
    folder = save_pipeline(tmp_path / "pipeline", unet)
    denoiser = load_foreign(folder, classes=4) if embeddings == 5 else load_foreign(folder)
    assert (denoiser.classes, denoiser.shape, denoiser.conditional_only) == (classes, (1, 8, 8), embeddings == 4)
    assert denoiser.preconditioning == VP(time="index")
    sigma = denoiser.preconditioning.table[[10, 700]].float()
    labels = torch.tensor([3, 0]) if classes else None
    s = sigma[:, None, None, None]

    def expected(labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            return X8 - s * unet(X8 / (1 + s**2).sqrt(), torch.tensor([10, 700]), class_labels=labels).sample

    assert torch.allclose(denoiser(X8, sigma, labels), expected(labels), atol=1e-5)
    if embeddings == 5:
        assert torch.allclose(denoiser(X8, sigma), expected(torch.tensor([4, 4])), atol=1e-5)
    save_tensors(tmp_path / "ours.safetensors", denoiser.network.state_dict(), denoiser_header(denoiser))
    assert torch.equal(load_denoiser(tmp_path / "ours.safetensors")(X8, 1.0, labels), denoiser(X8, 1.0, labels))


def test_a_lone_library_network_needs_its_preconditioning(tmp_path: Path) -> None:
    unet = library_unet()
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=r"scheduler_config\.json.*or give preconditioning"):
        load_foreign(tmp_path / "unet")
    mine = VP(prediction="x0", time="index")
    denoiser = load_foreign(tmp_path / "unet", kind="diffusers", preconditioning=mine)
    sigma = mine.table[[20, 20]].float()
    with torch.no_grad():
        expected = unet(X8 / (1 + sigma[0] ** 2).sqrt(), 20).sample
    assert torch.allclose(denoiser(X8, sigma), expected, atol=1e-5)


def test_the_librarys_schedules_are_ours(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    changes = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "num_train_timesteps": 100}
    cosine = load_foreign(save_pipeline(tmp_path / "a", library_unet(), **changes)).preconditioning
    assert cosine == VP(prediction="v", schedule="cosine", steps=100, time="index")
    for vp, theirs in [
        (cosine, diffusers.DDPMScheduler(**changes)),
        (VP(beta_end=0.03, time="index"), diffusers.DDPMScheduler(beta_end=0.03)),
    ]:
        abar = 1 / (1 + vp.table**2)
        assert torch.allclose(abar.float(), theirs.alphas_cumprod, rtol=1e-4)
    sample = load_foreign(save_pipeline(tmp_path / "b", library_unet(), prediction_type="sample", beta_end=0.03))
    assert sample.preconditioning == VP(prediction="x0", beta_end=0.03, time="index")


@pytest.mark.parametrize(
    ("scheduler", "unet", "message"),
    [
        ({"beta_schedule": "scaled_linear"}, {}, "beta_schedule.*'scaled_linear'"),
        ({"beta_schedule": "sigmoid"}, {}, "beta_schedule.*'sigmoid'"),
        ({"trained_betas": [0.1, 0.2]}, {}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, {}, "rescale_betas_zero_snr"),
        ({}, {"center_input_sample": True}, "center_input_sample"),
        ({}, {"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({}, {"class_embed_type": "timestep"}, "class_embed_type"),
        ({}, {"out_channels": 2}, "learned variance"),
        ({}, {"sample_size": None}, "give image_size"),
    ],
)
def test_settings_we_do_not_have_are_refused_by_name(tmp_path: Path, scheduler: dict, unet: dict, message: str) -> None:
    folder = save_pipeline(tmp_path / "pipeline", library_unet(**unet), **scheduler)
    with pytest.raises(UserError, match=message):
        load_foreign(folder)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_foreign(tmp_path)
    folder = save_pipeline(tmp_path / "pipeline", library_unet())
    for kind in ("edm", "ddim", "minimal-diffusion"):
        with pytest.raises(UserError, match=f"a file with the weights of {kind}, got a folder; name the file itself"):
            load_foreign(folder, kind=kind)
    with pytest.raises(UserError, match="weights of edm, got no such file"):
        load_foreign(tmp_path / "none", kind="edm")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(UserError, match=r"works on pixels.*vqvae"):
        load_foreign(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    with pytest.raises(UserError, match=r"_class_name.*EDMEulerScheduler"):
        load_foreign(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(UserError, match=r"UNet2DModel, got 'UNet2DConditionModel'"):
        load_foreign(folder)
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(UserError, match="size mismatch for up_blocks"):
        load_foreign(folder)
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    tensors["extra"] = tensors.pop("conv_in.bias")
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"missing_keys.*conv_in\.bias.*unexpected_keys.*extra"):
        load_foreign(folder)
    bias = tensors.pop("extra")
    for wrong, message in ((bias.long(), "floating point"), (bias / 0, "finite")):
        tensors["conv_in.bias"] = wrong
        save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match=rf"(?s)conv_in\.bias.*{message}"):
            load_foreign(folder)


def test_a_hub_out_of_reach_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(**question: object) -> str:
        asked.append(question)
        raise hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(EnvironmentFault, match=r"org/name: no such file or folder.*no connection"):
        load_foreign("org/name", revision="abc")
    assert [q.get("local_files_only", False) for q in asked] == [True, False]
    assert all(q["revision"] == "abc" for q in asked)
    folder = save_pipeline(tmp_path / "pipeline", library_unet())
    monkeypatch.setattr(hub, "snapshot_download", lambda **_: str(folder))
    assert load_foreign("org/name").shape == (1, 8, 8)


def test_without_the_library_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_pipeline(tmp_path / "pipeline", library_unet())
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install gambeson\[diffusers\]"):
        load_foreign(folder)


def test_a_hostile_file_in_a_library_folder_is_not_run(tmp_path: Path) -> None:
    folder, marker = save_pipeline(tmp_path / "pipeline", library_unet()), tmp_path / "executed"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Evil(marker)}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="expected the weights of its UNet2DModel"):
        load_foreign(folder)
    assert not marker.exists()
