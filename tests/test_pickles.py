"""EDM's network pickles are read without running what is in them, and hostile files end the reading."""

import io
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_files import EDM_LABELS, GOLDEN, SMALL, TINY, Evil, Replaced, agrees, filled, manifest, pattern, tiny
from torch import Tensor, nn

from gambeson.errors import EnvironmentFault, UserError
from gambeson.models.denoiser import EDM
from gambeson.models.foreign import load_foreign
from gambeson.models.pickles import read_pickle


class Persistent(nn.Module):
    """Pickles as EDM's decorated classes do: a call of one function with one dict."""

    SOURCE = "raise SystemExit('source text was executed')"

    def __init__(self, class_name: str, **attributes: object) -> None:
        super().__init__()
        self.__dict__.update(attributes)
        self._class_name = class_name

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.SOURCE, "class_name": self._class_name}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({**meta, "state": self.__dict__},)


def edm_object(tensors: dict[str, Tensor], **changed: dict) -> Persistent:
    """The object tree of an EDM network with these tensors; changed: attributes by class name."""
    wanted = {"_init_args": (), "_init_kwargs": {"gain": np.sqrt(0.2), "resample_filter": [1, 1]}}
    block = {"skip_scale": np.sqrt(0.5), "num_heads": 1, "adaptive_scale": False, "filter": None}
    attributes = {"UNetBlock": block, "EDMPrecond": {"sigma_data": 0.4}, "SongUNet": {"label_dropout": 0}}

    def made(name: str) -> Persistent:
        return Persistent(**{"class_name": name, **wanted, **attributes.get(name, {}), **changed.get(name, {})})

    root = made("EDMPrecond")
    for name, tensor in tensors.items():
        node, *path, leaf = root, *name.split(".")
        for depth, part in enumerate(path):
            if part not in node._modules:
                kinds = {"model": "SongUNet", "enc": "", "dec": ""} if depth < 2 else {}
                kind = kinds.get(part, "UNetBlock" if depth == 2 else "Conv2d")
                node.add_module(part, made(kind) if kind else nn.ModuleDict())
            node = node._modules[part]
        if leaf == "resample_filter":
            node.register_buffer(leaf, tensor)
        else:
            node.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root.eval()


@pytest.fixture
def persistence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that EDM's pickles name, for writing them; calling its function is what a careless reader does."""

    def _reconstruct_persistent_obj(meta: dict) -> None:
        exec(meta["module_src"], {})

    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def write_edm(path: Path, tensors: dict[str, Tensor], protocol: int = 4, **changed: dict) -> Path:
    content = {"ema": edm_object(tensors, **changed), "loss_fn": Persistent("EDMLoss", P_mean=-1.2), "tags": {"a"},
               "augment_pipe": None, "dataset_kwargs": {"path": "x.zip"}}  # fmt: skip
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_edms_network_pickle_is_read_without_running_it(tmp_path: Path, persistence: None, protocol: int) -> None:
    tensors = tiny("edm")
    denoiser = load_foreign(write_edm(tmp_path / "net.pkl", tensors, protocol))
    assert (denoiser.spec, denoiser.shape, denoiser.classes) == (TINY["edm"], (1, 16, 16), 5)
    assert denoiser.preconditioning == EDM(sigma_data=0.4)
    assert denoiser.conditional_only
    ours = denoiser.network.state_dict()
    assert all(torch.equal(ours[k.removeprefix("model.")], v) for k, v in tensors.items() if "resample" not in k)
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_edm_through_its_pickle_denoises_as_published(tmp_path: Path, persistence: None) -> None:
    facts = GOLDEN["song_unet"]["small"]
    spec, classes, _ = SMALL["song_unet"]
    tensors = {k: v.float() for k, v in filled(manifest("song_unet", spec.build(3, classes))).items()}
    path = write_edm(tmp_path / "net.pkl", tensors, EDMPrecond={"sigma_data": 0.5}, SongUNet={"label_dropout": 0.1})
    denoiser = load_foreign(path, kind="edm")
    x, sigma = pattern(facts["input_shape"], torch.float32), torch.tensor(facts["sigma"])
    assert agrees(denoiser(x, sigma, EDM_LABELS), facts["float32"]["D"], 1e-4)
    assert agrees(denoiser(x, sigma), facts["float32"]["D_with_class_labels_None"], 1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SongUNet": {"_init_kwargs": {"embedding_type": "fourier"}}}, "embedding_type.*'positional'.*'fourier'"),
        ({"UNetBlock": {"skip_scale": 1.0}}, "skip_scale"),
        ({"EDMPrecond": {"class_name": "VPPrecond"}}, "EDMPrecond.*VPPrecond"),
        ({"SongUNet": {"class_name": "DhariwalUNet"}}, "DhariwalUNet .*is not read"),
    ],
)
def test_other_networks_of_edm_are_refused_by_name(
    tmp_path: Path, persistence: None, changed: dict, message: str
) -> None:
    path = write_edm(tmp_path / "net.pkl", tiny("edm"), **changed)
    with pytest.raises(UserError, match=message):
        load_foreign(path)


class Call:
    """Unpickled it is the call of an allowed function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile(marker: Path) -> dict[str, bytes]:
    plain = pickle.dumps({"ema": Evil(marker)})
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"ema": Evil(marker)}, zipped)
    torch.save(Evil(marker), legacy, _use_new_zipfile_serialization=False)
    inner = legacy.getvalue()
    return {
        "plain pickle": plain,
        "torch.save": zipped.getvalue(),
        "old torch.save": inner,
        "nested torch.save": pickle.dumps({"ema": Call(torch.storage._load_from_bytes, inner)}),
        "nested pickle": pickle.dumps({"ema": Call(torch.storage._load_from_bytes, pickle.dumps(Evil(marker)))}),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", hostile(Path("unused")))
def test_hostile_files_are_refused_and_nothing_runs(tmp_path: Path, how: str) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "net.pkl"
    path.write_bytes(hostile(marker)[how])
    reason = "operand" if how == "nested pickle" else r"(posix|nt)\.system"
    with pytest.raises(UserError, match=rf"net\.pkl: .*{reason}"):
        load_foreign(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))  # the threat is real: Python's own reader does run it
    assert marker.exists()


def test_source_text_in_a_pickle_is_never_executed(
    tmp_path: Path, persistence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    monkeypatch.setattr(Persistent, "SOURCE", f"open({str(marker)!r}, 'w').close()")
    path = write_edm(tmp_path / "net.pkl", tiny("edm"))
    assert load_foreign(path).classes == 5
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the threat is real: calling what the file names runs it
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n}b.",  # BUILD on a function
        b"\x80\x02ctorch._utils\n_rebuild_parameter.__call__\n.",  # a way through attributes
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02cgambeson.models.pickles\nGLOBALS\n.",
        pickle.dumps(Call(torch.storage._load_from_bytes, b"nothing")),
        pickle.dumps(
            Call(torch._utils._rebuild_tensor_v2, torch.zeros(2)._typed_storage(), 0, (9,), (1,), False, OrderedDict())
        ),
    ],
)
def test_tricks_with_allowed_names_end_the_reading(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.pkl").write_bytes(content)
    with pytest.raises((UserError, EnvironmentFault), match="expected"):
        read_pickle(tmp_path / "net.pkl")
    with pytest.raises((UserError, EnvironmentFault), match="expected"):
        load_foreign(tmp_path / "net.pkl")


HUGE = (torch._utils._rebuild_tensor_v2, torch.zeros(2)._typed_storage(), 0, (1 << 20, 1 << 20), (0, 0), False, {})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"_parameters": Replaced({"a": 1}, items=5)}, "plain OrderedDict"),
        ({"_modules": Replaced({}, get=5)}, "plain OrderedDict"),
        ({"_parameters": OrderedDict(weight=Call(*HUGE))}, "at most the 2 numbers stored"),
        ({"_init_kwargs": {"channel_mult_noise": torch.zeros(2)}}, "cannot be read as such: Boolean value"),
        ({"label_dropout": 10**400}, "cannot be read as such: int too large"),
        ({"_modules": {}}, "weights|tensor"),
    ],
)
def test_tricks_inside_a_network_are_user_errors(tmp_path: Path, persistence: None, tables: dict, message: str) -> None:
    path = write_edm(tmp_path / "net.pkl", tiny("edm"))
    network = edm_object(tiny("edm"))
    network._modules["model"].__dict__.update(tables)
    path.write_bytes(pickle.dumps({"ema": network}))
    with pytest.raises(UserError, match=message):
        load_foreign(path)


@pytest.mark.parametrize("sigma_data", [float("nan"), 0.0, float("inf")])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, persistence: None, sigma_data: float) -> None:
    path = write_edm(tmp_path / "net.pkl", tiny("edm"), EDMPrecond={"sigma_data": sigma_data})
    with pytest.raises(UserError, match="sigma_data: expected a number above 0"):
        load_foreign(path)


def test_many_tensors_of_one_storage_share_it(tmp_path: Path) -> None:
    """A file of a few bytes per tensor cannot ask for a copy of the storage each time."""
    storage = torch.zeros(100_000)._typed_storage()
    views = [Call(torch._utils._rebuild_tensor_v2, storage, 0, (100_000,), (1,), False, {}) for _ in range(50)]
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(views))
    assert len({view.data_ptr() for view in read_pickle(tmp_path / "net.pkl")}) == 1


def test_cut_files_are_named_as_damaged(tmp_path: Path, persistence: None) -> None:
    whole = write_edm(tmp_path / "net.pkl", tiny("edm"))
    torch.save(tiny("ddim"), tmp_path / "new.pt")
    torch.save(tiny("ddim"), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in (whole, tmp_path / "new.pt", tmp_path / "old.pt"):
        data = path.read_bytes()
        for part in (len(data) // 3, len(data) - 40):
            path.write_bytes(data[:part])
            with pytest.raises(EnvironmentFault, match=rf"{path.name}: expected a whole.*damaged"):
                load_foreign(path)
