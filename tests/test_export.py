"""Classifiers that leave the house: RobustBench's files, ONNX, and folders in the hub's conventions."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gambeson
from gambeson.disk import checksum
from gambeson.errors import EnvironmentFault, UserError
from gambeson.models import card as card_module
from gambeson.models import hub
from gambeson.models.card import Metric
from gambeson.models.cifar_resnet import CifarResNet, CifarResNetSpec
from gambeson.models.classifiers import classifier_header
from gambeson.models.export import (
    load_robustbench,
    robustbench_entry,
    robustbench_state_dict,
    save_onnx,
    save_robustbench,
)
from gambeson.models.files import save_tensors
from gambeson.models.hub import from_pretrained, save_pretrained
from gambeson.models.network import ClassifierNetwork
from gambeson.models.noise_conditioned import NoiseConditionedSpec
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec, SmallResNet
from gambeson.models.wideresnet import WideResNet, WideResNetSpec
from gambeson.threat import ThreatModel

SMALL = {
    "small": ResNetSpec(width=4),
    "wide": WideResNetSpec(depth=10, width=1),
    "preact": PreActResNetSpec(width=4, activation="relu"),
    "cifar": CifarResNetSpec(width=4, blocks=(1, 1, 1, 1), mean=(0.5,), std=(0.3,)),
}
CARD: dict[str, Any] = {
    "shape": (3, 8, 8),
    "class_names": ("cat", "dog", "a: b"),
    "data": "cifar10-16: 1,000 images",
    "additional_data": "EDM's images, 1M",
    "datasets": ("uoft-cs/cifar10",),
    "threat": ThreatModel(norm="l2", epsilon=0.5),
    "recipe_digest": "12ab" * 16,
    "metrics": (
        Metric(name="clean accuracy", value=0.8125, n=800),
        Metric(name="robust | PGD-40", value=0.5, n=600, interval=(0.46, 0.54)),
    ),
    "licence": "apache-2.0",
    "limits": "Not for medical images.",
}


def trained(spec, classes: int = 3) -> ClassifierNetwork:
    """A network in eval mode whose batch-norm statistics are not the initial ones."""
    model = spec.build(3, classes, seed=4)
    model.train()(rand(32, seed=1) ** 2)
    return model.eval()


def rand(number: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def equal(one: ClassifierNetwork, other: ClassifierNetwork) -> bool:
    return torch.equal(one(rand(2)), other(rand(2)))


def zoos_loader(path: Path) -> dict[str, torch.Tensor]:
    """What RobustBench's loader makes of a file, in our words: wrapper `state_dict` opened, then two cuts.

    A cut takes the length of the text off the start of every name that has the text anywhere (dm_wide_resnet.json).
    """
    content = torch.load(path, weights_only=True)
    content = content.get("state_dict", content)
    for text in ("module.", "model."):
        content = {(name[len(text) :] if text in name else name): value for name, value in content.items()}
    return content


@pytest.mark.parametrize("spec", [SMALL["wide"], PreActResNetSpec(mean=(0.5, 0.4, 0.3)), PreActResNetSpec(depth=34)])
def test_robustbench_files_pass_the_zoos_loader_and_come_back(spec, tmp_path: Path) -> None:
    model, path = trained(spec), tmp_path / "zoo" / "NAME.pt"
    save_robustbench(model, path)
    names = zoos_loader(path)
    assert names.keys() == model.state_dict().keys()
    assert all(torch.equal(names[name], value) for name, value in model.state_dict().items())
    loaded = load_robustbench(path, spec)
    assert equal(loaded, model)
    assert not loaded.training
    assert [p.name for p in path.parent.iterdir()] == ["NAME.pt"]


def test_an_exported_state_dict_is_a_copy() -> None:
    model = trained(SMALL["wide"])
    exported = robustbench_state_dict(model)
    exported["logits.bias"].fill_(7.0)
    assert (model.state_dict()["logits.bias"] != 7).all()


def test_the_zoos_entry_says_what_the_file_does_not() -> None:
    wide = WideResNetSpec(depth=16, width=2, activation="relu", mean=(0.5,), std=(0.2,)).build(3, 7)
    assert robustbench_entry(wide) == (
        "DMWideResNet(num_classes=7, depth=16, width=2, activation_fn=nn.ReLU, mean=(0.5, 0.5, 0.5), "
        "std=(0.2, 0.2, 0.2), num_input_channels=3)"
    )
    with torch.device("meta"):
        preact = PreActResNetSpec(depth=34).build(3, 10)
    assert robustbench_entry(preact).startswith(
        "DMPreActResNet(num_classes=10, depth=34, width=0, activation_fn=nn.SiLU, mean=(0.4914, 0.4822, 0.4465), "
    )


@pytest.mark.parametrize("name", ["small", "preact", "cifar"])
def test_networks_that_the_zoo_has_no_class_for_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a WideResNet, or a PreActResNet of width 64"):
        save_robustbench(trained(SMALL[name]), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_zoo_files_of_something_else_are_refused_by_name(tmp_path: Path) -> None:
    path, wide = tmp_path / "a.pt", SMALL["wide"]
    save_robustbench(trained(wide), path)
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.pt: expected the weights of a PreActResNet .* got a WideResNet's"):
        load_robustbench(path, SMALL["preact"])
    with pytest.raises(UserError, match=r"WideResNet.*another shape.*width=2"):
        load_robustbench(path, WideResNetSpec(depth=10, width=2))
    for content in (torch.zeros(3), {"epoch": 3}, {}):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"a\.pt: expected weights"):
            load_robustbench(path, wide)
    with pytest.raises(UserError, match=r"b\.pt: expected weights"):
        load_robustbench(tmp_path / "b.pt", wide)
    path.write_bytes(whole[:-200])
    with pytest.raises(EnvironmentFault, match=r"a\.pt: expected a whole file"):
        load_robustbench(path, wide)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("preact", "cifar")]


@pytest.mark.parametrize("name", ["small", "wide", *SLOW])
def test_onnx_computes_the_same_for_any_batch(name: str, tmp_path: Path) -> None:
    """The largest difference to torch on random images, against the spread of the logits."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path, before = trained(SMALL[name]), tmp_path / "sub" / "m.onnx", torch.get_rng_state()
    save_onnx(model.train(), path, (3, 8, 8))
    assert model.training
    model.eval()
    assert torch.equal(before, torch.get_rng_state())
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]  # one file, the weights inside
    onnx.checker.check_model(str(path))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    for number in (1, 5):
        images = rand(number, seed=number)
        (logits,) = session.run(None, {"images": images.numpy()})
        own = model(images).detach().numpy()
        assert own.std() > 1e-2
        assert np.abs(logits - own).max() < 1e-4


@pytest.mark.slow
def test_onnx_of_one_image_at_a_time(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = trained(SMALL["wide"]), tmp_path / "m.onnx"
    save_onnx(model, path, (3, 8, 8), dynamic_batch=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 8, 8]
    (logits,) = session.run(None, {"images": rand(1).numpy()})
    assert np.abs(logits - model(rand(1)).detach().numpy()).max() < 1e-4


def test_what_onnx_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = trained(SMALL["wide"]), tmp_path / "m.onnx"
    with pytest.raises(UserError, match="as the network has"):
        save_onnx(model, path, (1, 8, 8))
    with pytest.raises(UserError, match=r"expected float32.*float64"):
        save_onnx(SMALL["wide"].build(3, 3).double(), path, (3, 8, 8))
    with torch.device("meta"):
        huge = WideResNetSpec(depth=94, width=20).build(3, 10)
    with pytest.raises(UserError, match="less than 2 GB"):
        save_onnx(huge, path, (3, 32, 32))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript.*gambeson\[onnx\]"):
        save_onnx(model, path, (3, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SMALL)
def test_pretrained_folders_round_trip_to_the_bit(name: str, tmp_path: Path) -> None:
    model, folder = trained(SMALL[name]), tmp_path / "deep" / "model"
    model.save_pretrained(folder, **CARD)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    for loaded in (from_pretrained(folder), type(model).from_pretrained(str(folder))):
        assert loaded.spec == model.spec
        assert equal(loaded, model)
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict())


def test_config_says_how_to_build_the_network_and_what_its_images_are(tmp_path: Path) -> None:
    trained(SMALL["small"]).save_pretrained(tmp_path / "m", **CARD)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["normalisation"].pop("where")
    assert config == {
        "library_name": "gambeson",
        "gambeson_version": gambeson.__version__,
        "architectures": ["SmallResNet"],
        "network": {"class": "ResNetSpec", "width": 4, "multipliers": [1, 2, 4], "blocks": 1},
        "channels": 3,
        "classes": 3,
        "normalisation": {"mean": [0.5], "std": [0.5]},
        "shape": [3, 8, 8],
        "class_names": ["cat", "dog", "a: b"],
        "threat": {"norm": "l2", "epsilon": 0.5},
        "recipe_digest": "12ab" * 16,
    }


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    trained(SMALL["wide"]).save_pretrained(tmp_path / "my-model", **CARD)
    _, front, body = (tmp_path / "my-model" / "README.md").read_text().split("---\n", 2)
    data = pytest.importorskip("yaml").safe_load(front)
    (index,) = data.pop("model-index")
    assert data == {
        "library_name": "gambeson",
        "pipeline_tag": "image-classification",
        "license": "apache-2.0",
        "tags": ["image-classification", "adversarial-robustness", "l2", "WideResNet"],
        "datasets": ["uoft-cs/cifar10"],
        "metrics": ["accuracy"],
    }
    assert index["name"] == "my-model"
    assert index["results"][0]["dataset"] == {"name": "cifar10-16: 1,000 images", "type": "uoft-cs/cifar10"}
    assert [m["value"] for m in index["results"][0]["metrics"]] == [0.8125, 0.5]
    for fact in (
        "# my-model",
        "cat, dog, a: b",
        "cifar10-16: 1,000 images",
        "Additional data: EDM's images, 1M",
        "l2 ball of radius 0.5 (127.5/255)",
        "| clean accuracy | 81.25 |  | 800 |",
        "| robust \\| PGD-40 | 50.00 | 46.00 to 54.00 | 600 |",
        "12ab" * 16,
        "of 8x8 pixels",
        "Not for medical images.",
    ):
        assert fact in body
    assert eval(re.search(r"^    (WideResNetSpec.*)$", body, re.M)[1]) == SMALL["wide"]  # the architecture, in full


def test_the_hubs_own_package_reads_the_card(tmp_path: Path) -> None:
    package = pytest.importorskip("huggingface_hub")
    trained(SMALL["wide"]).save_pretrained(tmp_path / "m", **CARD)
    data = package.ModelCard.load(tmp_path / "m" / "README.md").data
    assert (data.library_name, data.license, data.pipeline_tag) == ("gambeson", "apache-2.0", "image-classification")
    robust = data.eval_results[1]
    assert (robust.metric_name, robust.metric_value) == ("robust | PGD-40, n = 600", 0.5)


def test_an_unknown_fact_is_left_out(tmp_path: Path) -> None:
    model = trained(SMALL["wide"])
    save_pretrained(model, tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    for word in ("license", "datasets", "metrics", "model-index", "Threat", "Data", "Metrics", "Recipe", "None"):
        assert word not in text
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert not {"shape", "class_names", "threat", "recipe_digest"} & config.keys()
    assert equal(from_pretrained(tmp_path / "m"), model)


def test_the_loading_lines_of_the_card_are_true(tmp_path: Path) -> None:
    """The code block runs as it stands, with the place filled in, in a fresh process."""
    model = trained(SMALL["wide"])
    model.save_pretrained(tmp_path / "m")
    block = re.search(r"```python\n(.*?)```", (tmp_path / "m" / "README.md").read_text(), re.S)
    code = f"import torch; images = torch.full((1, 3, 8, 8), 0.25)\n{block[1]}\nprint(logits.tolist())"
    done = [sys.executable, "-c", code.replace("PLACE", str(tmp_path / "m"))]
    told = subprocess.run(done, capture_output=True, text=True, check=True).stdout
    assert json.loads(told)[0] == pytest.approx(model(torch.full((1, 3, 8, 8), 0.25))[0].tolist(), abs=1e-6)


def test_a_class_takes_its_own_architecture_only(tmp_path: Path) -> None:
    trained(SMALL["wide"]).save_pretrained(tmp_path / "m")
    assert isinstance(ClassifierNetwork.from_pretrained(tmp_path / "m"), WideResNet)
    with pytest.raises(UserError, match=r"expected the weights of a SmallResNet, got those of a WideResNet \(WideRes"):
        SmallResNet.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("broken", ["save_tensors", "write_json", "card_text", "replace"])
def test_nothing_half_written_stays(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    place = hub.os if broken == "replace" else hub
    monkeypatch.setattr(place, broken, fail)
    with pytest.raises(EnvironmentFault, match="No space left on device"):
        trained(SMALL["wide"]).save_pretrained(tmp_path / "m", **CARD)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept_and_wrong_facts_are_refused(tmp_path: Path) -> None:
    model, folder = trained(SMALL["wide"]), tmp_path / "m"
    folder.mkdir()
    model.save_pretrained(folder)  # an empty folder is taken
    with pytest.raises(UserError, match="expected a new or an empty folder"):
        trained(SMALL["cifar"]).save_pretrained(folder)
    assert equal(from_pretrained(folder), model)
    for facts, message in (
        ({"class_names": ("a", "b")}, "class_names: expected 3 of them"),
        ({"shape": (1, 8, 8)}, r"shape: expected \(3, height, width\)"),
    ):
        with pytest.raises(UserError, match=message):
            model.save_pretrained(tmp_path / "n", **facts)
    with pytest.raises(UserError, match="expected a share"):
        Metric(name="clean accuracy", value=81.25, n=800)
    with pytest.raises(TypeError, match="licens"):
        model.save_pretrained(tmp_path / "n", license="mit")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    folder, model = tmp_path / "m", trained(SMALL["wide"])
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())

    def refused(change: dict, error: type[Exception], message: str) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=message):
            from_pretrained(folder)

    wide, cifar = config["network"], {"class": "CifarResNetSpec", "width": 4}
    refused({"network": {**wide, "class": "Nope"}}, UserError, "nearest first.*'Nope'")
    refused({"network": {**wide, "dep": 3}}, UserError, "in this version of gambeson")
    refused({"network": {**wide, "depth": 16}}, UserError, "missing.*depth=16")
    refused({"network": cifar}, UserError, "of a CifarResNet .* got a WideResNet's")
    refused({"network": {"class": NoiseConditionedSpec.__name__}}, UserError, "images in .0, 1., got a Noise")
    (folder / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    with pytest.raises(UserError, match="that of another library"):
        from_pretrained(folder)
    (folder / "config.json").write_text('{"cut')
    with pytest.raises(EnvironmentFault, match=r"config\.json: expected JSON"):
        from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(EnvironmentFault, match="safetensors file, got a damaged one"):
        from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"with model\.safetensors, which is missing"):
        from_pretrained(folder)


def test_weights_must_fit_to_the_last_one(tmp_path: Path) -> None:
    model, folder = trained(SMALL["wide"]), tmp_path / "m"
    model.save_pretrained(folder)
    tensors = {**model.state_dict(), "extra.weight": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected \['extra.weight'\]"):
        from_pretrained(folder)


def test_a_hub_id_is_downloaded_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub's package: the call that it gets, and what its failures become."""
    model, calls = trained(SMALL["cifar"]), []
    model.save_pretrained(tmp_path / "snapshot")

    def snapshot(place: str, **options: object) -> str:
        calls.append((place, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot))
    assert equal(CifarResNet.from_pretrained("org/some-model", revision="v1"), model)
    assert calls == [
        ("org/some-model", {"revision": "v1", "allow_patterns": ["model.safetensors", "config.json"]}),
    ]

    def offline(place: str, **options: object) -> str:
        raise FileNotFoundError("cannot reach the hub")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=offline))
    with pytest.raises(EnvironmentFault, match=r"org/m: no such folder here.*cannot reach the hub; check the name"):
        from_pretrained("org/m")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub is needed .*gambeson\[hub\]"):
        from_pretrained("org/m")


def test_the_hubs_package_without_a_connection_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, told that there is no network."""
    package = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="gambeson-tests/no-such-model: no such folder here, and expected"):
        from_pretrained("gambeson-tests/no-such-model")


@pytest.mark.parametrize("place", ["no-such-folder", "a/b/c", "/nowhere/at/all", "weights.pt"])
def test_places_that_are_neither_folder_nor_hub_id_are_refused(place: str) -> None:
    with pytest.raises(UserError, match="expected a folder of save_pretrained or a hub id like org/name"):
        from_pretrained(place)


def test_a_revision_is_for_the_hub_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="revision: expected none"):
        from_pretrained(tmp_path, revision="main")


def test_the_public_names_come_when_they_are_used() -> None:
    """`import gambeson.models` is as cheap as nothing; every name it offers is there, and the card's too."""
    code = "import sys, gambeson.models as m; assert 'torch' not in sys.modules; print(*m._PLACES)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"from_pretrained", "save_onnx", "WideResNet"} <= set(names)
    assert all(getattr(gambeson.models, name).__module__.startswith("gambeson.models.") for name in names)
    assert gambeson.models.Metric is card_module.Metric
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = gambeson.models.nope


def test_the_export_command_writes_both_forms(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From a folder and from a weights file; what cannot be, and what is there already, is refused with 2."""
    from gambeson.cli import main

    model = WideResNetSpec(depth=10, width=1).build(3, 10, 0)
    model.save_pretrained(tmp_path / "wide", shape=(3, 32, 32))
    words = ["--robustbench", str(tmp_path / "zoo.pt"), "--onnx", str(tmp_path / "wide.onnx")]
    pytest.importorskip("onnxscript")
    assert main(["export", str(tmp_path / "wide"), *words]) == 0
    said, noise = capfd.readouterr()
    assert "RobustBench: " in said
    assert "torchvision" not in noise
    again = load_robustbench(tmp_path / "zoo.pt", WideResNetSpec(depth=10, width=1))
    assert torch.equal(again.logits.weight, model.logits.weight)  # type: ignore[union-attr]
    for name in ("zoo.pt", "wide.onnx"):
        card = (tmp_path / f"{name}.md").read_text()
        assert card.startswith((tmp_path / "wide" / "README.md").read_text().rstrip("\n"))
        assert f"SHA-256 {checksum(tmp_path / name)}" in card
    assert main(["export", str(tmp_path / "wide"), *words]) == 2
    assert "nothing lies yet" in capfd.readouterr().err
    small = tmp_path / "small.safetensors"
    net = ResNetSpec(width=4).build(1, 10, 0)
    save_tensors(small, net.state_dict(), classifier_header(net, (1, 8, 8)) | {"licence": "MIT", "real_sets": ["mine"]})
    (tmp_path / "README.md").write_text("of something else")
    assert main(["export", str(small), "--onnx", str(tmp_path / "small.onnx")]) == 0
    card = (tmp_path / "small.onnx.md").read_text()
    assert "licence: MIT" in card
    assert "mine" in card
    assert "something else" not in card
    assert main(["export", str(small), "--robustbench", str(tmp_path / "no.pt")]) == 2
    assert "WideResNet" in capfd.readouterr().err
    assert main(["export", str(small)]) == 2
