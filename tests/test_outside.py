"""Classifiers of others: every kind computes what its network does, and every mistake is named before it is run."""

import os
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gambeson.errors import UserError
from gambeson.models.export import save_onnx
from gambeson.models.memory import lacks_memory
from gambeson.models.outside import Outside, external_files, kind_of, outside_classifier
from gambeson.models.resnet import ResNetSpec
from gambeson.robustness import checks
from gambeson.threat import ThreatModel

SHAPE = (1, 8, 8)


def rand(number, seed=0):
    return torch.rand(number, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def net():
    return ResNetSpec(width=4).build(1, 5, seed=1).eval()


def graph(path, batch="b", shape=("b", 5), image=(1, 8, 8), outputs=("y",), kind=None, weight=1.0):
    """An ONNX file written by hand: the first five pixels of each image, times a weight."""
    from onnx import TensorProto, helper, save

    kind = kind or TensorProto.FLOAT
    numbers = lambda name, values: helper.make_tensor(name, TensorProto.INT64, [len(values)], values)  # noqa: E731
    flat = helper.make_node("Reshape", ["x", "to"], ["flat"])
    cut = helper.make_node("Slice", ["flat", "start", "end", "axis"], ["cut"])
    scaled = [helper.make_node("Mul", ["cut", "w"], [name]) for name in outputs]
    made = helper.make_graph(
        [flat, cut, *scaled],
        "g",
        [helper.make_tensor_value_info("x", kind, [batch, *image])],
        [helper.make_tensor_value_info(name, kind, shape) for name in outputs],
        [
            numbers("to", [0, -1]),
            numbers("start", [0]),
            numbers("end", [5]),
            numbers("axis", [1]),
            helper.make_tensor("w", kind, [], [weight]),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    save(model, path)
    return str(path)


# ---- what is what ----


def write_script(net, path, freeze=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(net, rand(2))
        torch.jit.save(torch.jit.freeze(script) if freeze else script, path)


def write_program(net, path):
    torch.export.save(torch.export.export(net, (rand(2),), dynamic_shapes=({0: torch.export.Dim("b")},)), path)


WRITERS = {
    "script.pt": (write_script, "TorchScript", True),
    "frozen.ts": (lambda net, path: write_script(net, path, freeze=True), "TorchScript", True),
    "program.pt2": (write_program, "torch.export", True),
    "net.onnx": (lambda net, path: save_onnx(net, path, SHAPE), "ONNX", False),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_computes_what_its_network_does(name, net, tmp_path):
    write, kind, gradients = WRITERS[name]
    write(net, tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        found = outside_classifier(str(tmp_path / name), SHAPE, trust=True, classes=5)
    assert (found.kind, found.classes, found.gradients) == (kind, 5, gradients)
    for number in (1, 2, 7):
        torch.testing.assert_close(found.model(rand(number)), net(rand(number)), rtol=1e-4, atol=1e-5)
    if gradients:
        x, y = rand(3).requires_grad_(), rand(3).requires_grad_()
        (ours,) = torch.autograd.grad(found.model(x).square().sum(), x)
        (theirs,) = torch.autograd.grad(net(y).square().sum(), y)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    else:
        assert not found.model(rand(3).requires_grad_()).requires_grad


def test_a_script_saved_while_training_is_put_into_eval_mode(tmp_path):
    layers = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 5))
    layers(rand(9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(layers.train()), tmp_path / "a.pt")
    found = outside_classifier(str(tmp_path / "a.pt"), SHAPE, trust=True)
    torch.testing.assert_close(found.model(rand(4)), layers.eval()(rand(4)))


def test_words_are_told_apart_by_what_they_hold(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_script(net, "a.bin")
    write_program(net, "b.pt2")
    torch.save(net.state_dict(), "weights.pt")
    (tmp_path / "text.pt").write_text("hello")
    kinds = {"a.bin": "TorchScript", "b.pt2": "torch.export", "none.onnx": "ONNX", "m:f": "module:function"}
    kinds |= {"a.b_1:make": "module:function", "weights.pt": None, "text.pt": None, "none.pt": None, "l2:0.5": None}
    kinds |= {"https://a:b": None, ".": None, "": None, "m:f()": None}
    assert {word: kind_of(word) for word in kinds} == kinds
    with pytest.raises(UserError, match=r"got 'weights\.pt', which holds no program.*load_zoo"):
        outside_classifier("weights.pt", SHAPE, trust=True)
    with pytest.raises(UserError, match=r"expected TorchScript .* got 'none\.pt', which is no file"):
        outside_classifier("none.pt", SHAPE, trust=True)


def test_programs_do_not_run_without_trust(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap_module.py").write_text("raise SystemError('it ran')")
    write_script(net, "a.pt")
    write_program(net, "b.pt2")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("it was loaded"))
    for word in ("trap_module:model", "a.pt", "b.pt2"):
        with pytest.raises(UserError, match=r"expected --trust .*runs with your rights.*ONNX"):
            outside_classifier(word, SHAPE, trust=False)
    assert "trap_module" not in sys.modules
    assert outside_classifier(graph("c.onnx"), SHAPE, trust=False).kind == "ONNX"


# ---- module:function ----

CODE = """
import numpy, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.norm, self.last = nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 5)
    def forward(self, x):
        return self.last(self.norm(self.flat(x)))

def model(): return Net()
def free(): return lambda x: torch.from_numpy(x.detach().numpy().reshape(len(x), -1)[:, :5].copy())
def numpys(): return lambda x: torch.from_numpy(numpy.array(x.numpy().reshape(len(x), -1)[:, :5]))
def needs(path): return Net()
def broken(): raise KeyError("no weights here")
def number(): return 3
def pair(): return lambda x: (x, x)
def features(): return lambda x: x
def summed(): return lambda x: x.flatten(1).sum(0, keepdim=True)
def single(): return lambda x: x.flatten(1)[:, :1]
def nan(): return lambda x: x.flatten(1) / 0 - x.flatten(1) / 0
def whole(): return lambda x: x.flatten(1).long()
def colour(): return nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())
model_name = "Net"
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "their_model.py").write_text(CODE)
    yield "their_model"
    sys.modules.pop("their_model", None)


def test_a_function_of_a_module_makes_the_classifier(code):
    found = outside_classifier(f"{code}:model", SHAPE, trust=True)
    assert isinstance(found.model, nn.Module)
    assert not any(module.training for module in found.model.modules())
    assert not any(p.requires_grad for p in found.model.parameters())
    assert (found.classes, found.gradients, found.kind) == (5, True, "module:function")
    free = outside_classifier(f"{code}:free", SHAPE, trust=True)
    assert not free.gradients
    assert not outside_classifier(f"{code}:numpys", SHAPE, trust=True).gradients
    torch.testing.assert_close(free.model(rand(4)), rand(4).flatten(1)[:, :5])


@pytest.mark.parametrize(
    ("function", "match"),
    [
        ("missing", r"expected a function missing in .*their_model\.py, which has Net, model, free, numpys, needs"),
        ("needs", r"needs\(\) to return a classifier, got TypeError: .*'path'"),
        ("broken", r"got KeyError: 'no weights here' \(.*their_model\.py, line \d+\)"),
        ("number", r"a callable from images to logits, got 3"),
        ("pair", r"one tensor of logits, got tuple"),
        ("features", r"logits \[3, classes\] for 3 images, got \[3, 1, 8, 8\]"),
        ("summed", r"logits \[3, classes\] for 3 images, got \[1, 64\].*dynamic"),
        ("single", r"got \[3, 1\]"),
        ("nan", r"finite floating-point logits, got torch.float32: \[nan"),
        ("whole", r"finite floating-point logits, got torch.int64"),
        ("colour", r"images \[B, 1, 8, 8\] for any B, got RuntimeError: .*channels"),
        ("model_name", r"got TypeError: 'str' object is not callable"),
    ],
)
def test_what_a_function_does_wrong_is_named(function, match, code):
    with pytest.raises(UserError, match=match):
        outside_classifier(f"{code}:{function}", SHAPE, trust=True)


def test_modules_that_cannot_be_imported_are_named(code, tmp_path):
    with pytest.raises(UserError, match=r"expected to import no_such_module .*ModuleNotFoundError"):
        outside_classifier("no_such_module:model", SHAPE, trust=True)
    (tmp_path / "half_a_module.py").write_text("x = (")
    with pytest.raises(UserError, match=r"expected to import half_a_module .*SyntaxError"):
        outside_classifier("half_a_module:model", SHAPE, trust=True)
    with pytest.raises(UserError, match="classes: expected 10, as the data has, got 5"):
        outside_classifier(f"{code}:model", SHAPE, trust=True, classes=10)


# ---- files ----


def test_damaged_files_are_named(net, tmp_path):
    write_script(net, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole.replace(b"code/", b"cobe/"))
    with pytest.raises(UserError, match="which holds no program"):
        outside_classifier(str(tmp_path / "a.pt"), SHAPE, trust=True)
    write_program(net, tmp_path / "b.pt2")
    whole = (tmp_path / "b.pt2").read_bytes()
    (tmp_path / "b.pt2").write_bytes(whole.replace(b"archive_format", b"archive_farmot"))
    with pytest.raises(UserError, match=r"expected a whole torch\.export file"):
        outside_classifier(str(tmp_path / "b.pt2"), SHAPE, trust=True)
    (tmp_path / "c.onnx").write_bytes(os.urandom(64))
    with pytest.raises(UserError, match="expected a whole ONNX file"):
        outside_classifier(str(tmp_path / "c.onnx"), SHAPE, trust=False)
    with pytest.raises(UserError, match=r"expected an ONNX file, got .*none\.onnx"):
        outside_classifier(str(tmp_path / "none.onnx"), SHAPE, trust=False)


def test_a_fixed_batch_is_filled_up(tmp_path):
    """4 images at a time: 1, 4, 6 and 8 of them give the first five pixels of each, twice."""
    found = outside_classifier(graph(tmp_path / "a.onnx", batch=4, shape=(4, 5), weight=2.0), SHAPE, trust=False)
    for number in (1, 4, 6, 8):
        torch.testing.assert_close(found.model(rand(number)), 2 * rand(number).flatten(1)[:, :5])


def test_half_precision_files_take_float32_images(tmp_path):
    from onnx import TensorProto

    found = outside_classifier(graph(tmp_path / "a.onnx", kind=TensorProto.FLOAT16), SHAPE, trust=False)
    logits = found.model(rand(2).double())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, rand(2).flatten(1)[:, :5], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image": (8, 8, 1)}, r"images: expected \[B, 1, 8, 8\], channels first, got \['b', 8, 8, 1\]"),
        ({"image": (64,), "shape": ("b", 5)}, r"channels first, got \['b', 64\]"),
        ({"outputs": ("y", "z")}, r"outputs: expected one, or one called logits, got \['y', 'z'\]"),
        ({"kind": 6}, r"images: expected of one type of tensor\(float\).*int32"),
    ],
)
def test_onnx_files_of_other_images_are_named(change, match, tmp_path):
    with pytest.raises(UserError, match=match):
        outside_classifier(graph(tmp_path / "a.onnx", **change), SHAPE, trust=False)


def test_the_output_called_logits_is_taken(tmp_path):
    found = outside_classifier(graph(tmp_path / "a.onnx", outputs=("y", "logits")), SHAPE, trust=False)
    assert found.classes == 5


def test_sides_that_a_file_leaves_open_are_taken(tmp_path):
    assert outside_classifier(graph(tmp_path / "a.onnx", image=(1, "h", "w")), SHAPE, trust=False).classes == 5


def test_a_missing_onnxruntime_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        outside_classifier(graph(tmp_path / "a.onnx"), SHAPE, trust=False)


def test_without_gradients_the_checks_say_so(tmp_path):
    """Evaluation that knows `gradients` runs Square alone; the checks would have found it out as well."""
    found: Outside = outside_classifier(graph(tmp_path / "a.onnx"), SHAPE, trust=False)
    labels = torch.from_numpy(np.asarray(found.model(rand(4)).argmax(1)))
    said = checks.run_checks(
        found.model, rand(4), labels, ThreatModel(epsilon=0.05), whitebox_robust=torch.zeros(4, dtype=torch.bool)
    )
    assert {c.name for c in said if "autograd" in c.detail} == {"gradients not zero", "gradients true", "reaches zero"}


@pytest.mark.parametrize("where", ["probe", "backward"])
def test_a_lack_of_memory_is_neither_a_mistake_nor_a_lack_of_gradients(where, code, tmp_path):
    """It is raised as it is: who lacks memory is not told that the classifier is wrong, or weak attacks suffice."""
    lines = {
        "probe": "raise torch.OutOfMemoryError('CUDA out of memory')",
        "backward": "if x.requires_grad: raise torch.OutOfMemoryError('CUDA out of memory')",
    }
    body = f"    {lines[where]}\n    return x.flatten(1)[:, :5]\n"
    (tmp_path / "their_model.py").write_text(f"import torch\ndef big(x):\n{body}def model(): return big\n")
    with pytest.raises(torch.OutOfMemoryError):
        outside_classifier(f"{code}:model", SHAPE, trust=True)


def test_lacks_of_memory_are_told_from_other_errors():
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"),
    ):
        assert lacks_memory(error), error
    for error in (RuntimeError("shapes cannot be multiplied"), KeyError("memory"), UserError("out of memory")):
        assert not lacks_memory(error), error


def test_files_beside_an_onnx_file_are_found(tmp_path):
    """With the package onnx's own writer; none outside the folder, where onnxruntime reads none either."""
    onnx = pytest.importorskip("onnx")
    inside = graph(tmp_path / "inside.onnx")
    assert external_files(tmp_path / "inside.onnx") == []
    (tmp_path / "sub").mkdir()
    for place in ("weights.bin", "sub/weights.bin"):
        whole = onnx.load(inside)
        (weight,) = (tensor for tensor in whole.graph.initializer if tensor.name == "w")
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), "w"))  # as raw bytes
        onnx.save_model(whole, tmp_path / "out.onnx", save_as_external_data=True, location=place, size_threshold=0)
        found = outside_classifier(str(tmp_path / "out.onnx"), SHAPE, trust=False)
        torch.testing.assert_close(found.model(rand(2)), rand(2).flatten(1)[:, :5])
        assert external_files(tmp_path / "out.onnx") == [tmp_path / place]
    head = (tmp_path / "out.onnx").read_bytes()
    (tmp_path / "out.onnx").write_bytes(head.replace(b"sub/weights.bin", b"../weights.bin2"))
    (tmp_path.parent / "weights.bin2").touch()
    assert external_files(tmp_path / "out.onnx") == []
    (tmp_path / "empty.onnx").touch()
    assert external_files(tmp_path / "empty.onnx") == []
