"""`gambeson evaluate` as its users meet it: every kind of classifier, killed and resumed, mistaken, and its page."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from gambeson import ThreatModel, screen
from gambeson.cli import main
from gambeson.data.datasets import Digits
from gambeson.engine import News
from gambeson.errors import UserError
from gambeson.evaluate import read
from gambeson.models.classifiers import classifier_header
from gambeson.models.export import save_robustbench
from gambeson.models.files import save_tensors
from gambeson.models.hub import from_pretrained
from gambeson.models.resnet import ResNetSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.report import delivery, evaluation, evaluation_folder, evaluation_rows, evaluation_words
from gambeson.report.evaluation_words import CorruptionLine, Measured
from gambeson.robustness.checks import Check
from gambeson.robustness.intervals import wilson
from gambeson.robustness.subjects import Foreign, Ours, logits_wanted, subject_of

ROOT = Path(__file__).parent.parent
TINY = [
    *("--assessment.autoattack.steps", "4", "--assessment.autoattack.queries", "30"),
    *("--assessment.autoattack.targets", "2", "--assessment.curve", "0.5", "2.0", "--assessment.curve_attack.steps"),
    *("3", "--assessment.curve_images", "15", "--assessment.check_images", "12"),
]
SHORT = ["--data", "digits", "--threat", "linf:0.1", "--images", "24", "--chunk", "12", "--attacks", "apgd-ce,square"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GAMBESON_DATA", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of save_pretrained with a network that knows the digits a little."""
    part = Digits().load().train
    net = ResNetSpec(width=4).build(1, 10, seed=1).train()
    adam = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        adam.zero_grad()
        F.cross_entropy(net(part.images), part.labels).backward()
        adam.step()
    folder = tmp_path_factory.mktemp("models") / "net"
    net.eval().save_pretrained(folder, shape=(1, 8, 8))
    return folder


def run(*words: str) -> int:
    return main(["evaluate", *words])


def results(runs: str = "runs") -> Path:
    """The only folder of results below a runs folder."""
    (folder,) = Path(runs).glob("evaluations/*")
    return folder


def same_rows(a: Path, b: Path) -> bool:
    """Whether two folders hold the same rows, seconds apart."""
    one, two = (pq.read_table(folder / "rows.parquet") for folder in (a, b))
    names = [name for name in one.column_names if not name.endswith("_seconds")]
    return one.column_names == two.column_names and one.select(names).equals(two.select(names))


# ---- the command ----


def test_a_folder_comes_out_that_says_everything(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, folder and page agree with the rows; the same words again find the result at once."""
    words = [str(model), *SHORT, "--workers", "1", *TINY, "--out", "out", "--corruptions", "1,4"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    rows = pq.read_table("out/rows.parquet")
    right = np.asarray(rows["prediction"]) == np.asarray(rows["label"])
    robust = np.asarray(rows["robust"])
    assert len(rows) == 24
    assert 0 < robust.sum() < right.sum() < 24, "a test on a model that is neither perfect nor broken"
    interval = wilson(int(robust.sum()), 24)
    number = f"{100 * interval.estimate:.1f} % robust accuracy ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    page = Path("out/report.html").read_text()
    for text in (said, page):
        assert number in text
        assert f"{robust.sum()} of 24 test images of digits stand" in text
        assert "apgd-ce, square (not AutoAttack standard)" in text
    assert "standing so far" in said
    assert "common corruptions" in said
    assert "Line: AutoPGD on the margin, 3 steps from 1 start, each epsilon on its own, on 15 of the 24 images" in page
    assert "Right under AutoPGD, %" in page
    assert "accuracy under AutoPGD against epsilon" in page
    record = json.loads(Path("out/robustbench.json").read_text())
    assert record["autoattack_acc"] == f"{100 * robust.mean():.2f}"
    assert record["unreliable"]
    assert "no class for a SmallResNet" in record["footnote"]
    assert {"facts.json", "checks.json", "corruptions.parquet"} <= {p.name for p in Path("out").iterdir()}
    assert len(pq.read_table("out/corruptions.parquet")) == 15 * 2 * 24
    (stage,) = Path("runs/stages/assess").iterdir()
    made = (stage / "done.json").read_bytes()
    assert run(*words) == 0
    assert "there already" in capsys.readouterr().out
    assert (stage / "done.json").read_bytes() == made
    assert run(str(model), *SHORT, *TINY, "--seed", "1", "--workers", "1", "--out", "out") == 2
    assert "another result" in capsys.readouterr().err


# ---- the folder that it is delivered to ----


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_delivery_that_was_killed_goes_on(
    stop: int, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any file, or after some of them: the same command makes the folder whole; another one stays out."""
    words = [str(model), *QUICK, "--attacks", "apgd-ce"]
    copies, copied = [], delivery.shutil.copyfile

    def killed(source: Path, target: Path) -> None:
        """Half a file is all that there was time for."""
        copies.append(source)
        if len(copies) == stop:
            Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise KeyboardInterrupt
        copied(source, target)

    with monkeypatch.context() as patch:
        if stop == 4:
            patch.setattr(evaluation, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(delivery.shutil, "copyfile", killed)
        assert run(*words, "--out", "out") == 130
    (stage,) = Path("runs/stages/assess").iterdir()
    for name in evaluation_folder.KEPT:
        path = Path("out") / name
        assert not path.exists() or path.read_bytes() == (stage / name).read_bytes(), "half of it"
    (Path("out") / ".rows.parquet.4194303.part").touch()  # what SIGKILL leaves of a file
    assert run(*words, "--seed", "1", "--out", "out") == 2
    assert "another result" in capsys.readouterr().err
    assert run(*words, "--out", "out") == 0
    names = {"digest.json", "rows.parquet", "facts.json", "checks.json", "report.html", "robustbench.json"}
    assert {path.name for path in Path("out").iterdir()} == names
    assert (
        json.loads((stage / "done.json").read_text())["digest"]
        == json.loads(Path("out/digest.json").read_text())["digest"]
    )
    assert (stage / "rows.parquet").read_bytes() == Path("out/rows.parquet").read_bytes()


def test_the_same_evaluation_made_again_elsewhere_is_the_same(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its seconds are others. A folder without a mark, as older versions left it, is known by its rows."""
    words = [str(model), *QUICK, "--attacks", "apgd-ce", "--out", "out"]
    Path("out").mkdir()
    Path("out/.digest.json.4194303.part").touch()  # killed before the mark was there
    assert run(*words, "--runs", "one") == 0
    assert not Path("out/.digest.json.4194303.part").exists()
    first = Path("out/rows.parquet").read_bytes()
    assert run(*words, "--runs", "two") == 0, capsys.readouterr().err
    assert Path("out/rows.parquet").read_bytes() != first, "otherwise nothing is shown"
    Path("out/digest.json").unlink()
    assert run(*words, "--runs", "two") == 0
    Path("out/digest.json").unlink()
    assert run(*words, "--runs", "one") == 2
    assert "another result" in capsys.readouterr().err


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GAMBESON_CHECKPOINT_SECONDS": "-1", **more}


def _progress(runs: Path) -> tuple[int, int]:
    """How much an unfinished evaluation has kept: chunks, and the time of the last state."""
    states = [p.stat().st_mtime_ns for p in runs.glob("stages/assess/*/chunks/*.state.pt")]
    return len(list(runs.glob("stages/assess/*/chunks/*.parquet"))), max(states, default=0)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_evaluation_goes_on_to_the_same_rows(
    kills: int, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL on the way, each time a little further; then, with two workers, the rows of one worker left alone."""
    words = [str(model), *SHORT, *TINY, "--assessment.autoattack.queries", "150"]
    assert run(*words, "--workers", "1", "--runs", "alone") == 0
    command = [sys.executable, "-m", "gambeson", "evaluate", *words, "--workers", "1", "--runs", "killed"]
    for _ in range(kills):
        before, limit = _progress(Path("killed")), time.monotonic() + 60
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while _progress(Path("killed")) <= before and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.003)
        assert process.poll() is None, "killed before it was done"
        process.send_signal(signal.SIGKILL)
        process.wait()
    capsys.readouterr()
    assert run(*words, "--workers", "2", "--runs", "killed") == 0
    said = capsys.readouterr().out
    assert re.search(r"going on: \d+ of 24 images were begun", said)
    assert f"stopped {kills} time{'s' * (kills > 1)} and went on" in said
    assert same_rows(results("alone"), results("killed"))
    assert f"in {kills + 1} starts" in (results("killed") / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_rows_of_one(model: Path) -> None:
    words = [str(model), *SHORT, *TINY, "--workers", "1"]
    assert run(*words, "--runs", "alone") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29741"]
    command = [*launch, "-m", "gambeson.evaluate", *words, "--runs", "both"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("robust accuracy (") == 1
    assert same_rows(results("alone"), results("both"))


def test_a_stage_killed_before_its_record_is_not_redone(model: Path) -> None:
    """The rows are there, done.json is not, the chunks are gone: nothing is attacked again."""
    words = [str(model), *SHORT, *TINY, "--workers", "1"]
    assert run(*words) == 0
    (stage,) = Path("runs/stages/assess").iterdir()
    (stage / "done.json").unlink()
    rows = (stage / "rows.parquet").read_bytes()
    assert run(*words) == 0
    assert (stage / "rows.parquet").read_bytes() == rows
    assert not (stage / "chunks").exists()


# ---- every kind of classifier ----


def linear(classes: int = 10) -> nn.Module:
    """A linear classifier of 8x8 digits that is better than chance."""
    part, layer = Digits().load().train, nn.Linear(64, classes)
    centres = torch.stack([part.images[part.labels == k].mean(0).flatten() for k in range(classes)])
    with torch.no_grad():
        layer.weight.copy_(4 * centres)
        layer.bias.copy_(-2 * centres.square().sum(1))
    return nn.Sequential(nn.Flatten(), layer).eval()


CODE = """
import torch
from tests.test_evaluate import linear
def whole():
    return linear()
def seven():
    return linear(7)
def cut():
    net = linear()
    return lambda images: net(images.detach())
"""


def onnx_file(path: Path) -> None:
    from onnx import TensorProto, helper, save

    net: nn.Linear = linear()[1]  # type: ignore[index]
    weights = [
        helper.make_tensor("w", TensorProto.FLOAT, [10, 64], net.weight.detach().flatten().tolist()),
        helper.make_tensor("b", TensorProto.FLOAT, [10], net.bias.detach().tolist()),
    ]
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w", "b"], ["y"], transB=1)]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 1, 8, 8])]
    found = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 10])]
    graph = helper.make_graph(nodes, "g", given, found, weights)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    whole.ir_version = 9
    save(whole, path)


def script_file(path: Path) -> None:
    torch.jit.save(torch.jit.trace(linear(), torch.rand(2, 1, 8, 8)), path)


QUICK = ["--data", "digits", "--threat", "linf:0.1", "--images", "10", "--workers", "1", *TINY]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["file", "stage", "TorchScript", "module:function", "ONNX", "no gradients"])
def test_every_kind_of_classifier(kind: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("somewhere").mkdir()
    word = {
        "file": "mine.safetensors",
        "stage": "somewhere",
        "TorchScript": "net.pt",
        "module:function": "evaluated_by_test:whole",
        "ONNX": "net.onnx",
        "no gradients": "evaluated_by_test:cut",
    }[kind]
    net = ResNetSpec(width=4).build(1, 10, seed=1).eval()
    save_tensors(Path("mine.safetensors"), net.state_dict(), classifier_header(net, (1, 8, 8)))
    save_tensors(Path("somewhere/classifier.safetensors"), net.state_dict(), classifier_header(net, (1, 8, 8)))
    Path("evaluated_by_test.py").write_text(CODE)
    script_file(Path("net.pt"))
    onnx_file(Path("net.onnx"))
    sys.modules.pop("evaluated_by_test", None)
    blind = kind in ("ONNX", "no gradients")
    attacks = [] if blind else ["--attacks", "apgd-ce"]
    trust = ["--trust"] if kind in ("TorchScript", "module:function", "no gradients") else []
    assert run(word, *QUICK, *attacks, *trust) == 0, capsys.readouterr().err
    rows, page = pq.read_table(results() / "rows.parquet"), (results() / "report.html").read_text()
    assert ("square" in rows.column_names) == blind
    assert ("robust@0.05" in rows.column_names) == (not blind)
    assert ("This is not a robust accuracy" in page) == blind
    said = capsys.readouterr().out
    assert ("no gradients: black-box attacks only" in said) == blind
    if trust:
        assert run(word, *QUICK, *attacks) == 2
        assert "--trust" in capsys.readouterr().err


def test_the_digest_is_that_of_what_is_measured(model: Path) -> None:
    """Another weight, source or entry is another subject; the same one elsewhere is the same."""
    net = ResNetSpec(width=4).build(1, 10, seed=1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        other = ResNetSpec(width=4).build(1, 10, seed=seed)
        save_tensors(Path(f"{name}.safetensors"), other.state_dict(), classifier_header(net))
    a, b, c = (subject_of(f"{name}.safetensors", (1, 8, 8)).digest for name in "abc")
    assert a == b != c
    Path("weighted.py").write_text("import torch\ndef net():\n    return torch.load('w.pt', weights_only=False)\n")
    digests = []
    for scale in (1.0, 2.0):
        whole = linear()
        whole[1].weight.data *= scale  # type: ignore[index]
        torch.save(whole, "w.pt")
        digests.append(subject_of("weighted:net", (1, 8, 8), trust=True).digest)
    assert digests[0] != digests[1], "weights that the source loads count"


def test_the_digest_sees_the_files_that_a_program_reads(tmp_path: Path) -> None:
    """When it is made or when it is called; and knows it again with other threads, and where it draws at random."""
    text = "import numpy, torch\nfrom tests.test_evaluate import linear\nnet, stream = linear(), torch.Generator()\n"
    text += "def scale(): return float(open('scale.txt').read())\n"
    text += "def called(): return lambda x: scale() * net(x)\n"
    text += "def made(s=None):\n    s = scale()\n    return lambda x: s * net(x)\n"
    text += "def torchs(): return lambda x: scale() * net(x) + torch.rand(1)\n"
    text += "def numpys(): return lambda x: net(x) + numpy.random.rand()\n"
    text += "def threaded(): return lambda x: net(x) * torch.get_num_threads()\n"
    text += "def failing(): return lambda x: net(x) if len(x) < 8 else 1 / 0\n"
    Path("reading.py").write_text(text)

    def digest(name: str) -> str:
        return subject_of(f"reading:{name}", (1, 8, 8), trust=True).digest

    found = {}
    for content in ("1.0", "1.0001", "1.0"):
        Path("scale.txt").write_text(content)
        found[content] = [digest(name) for name in ("called", "made", "torchs", "numpys")]
        assert found[content] == [digest(name) for name in ("called", "made", "torchs", "numpys")]
    before, threads, alone = torch.get_rng_state(), torch.get_num_threads(), digest("threaded")
    torch.set_num_threads(2)
    assert digest("threaded") == alone
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    changed = [a != b for a, b in zip(found["1.0"], found["1.0001"], strict=True)]
    assert changed == [True, True, True, False], "what draws beside torch's generator is known by its source alone"
    with pytest.raises(UserError, match="expected logits of 8 images, got ZeroDivisionError"):
        assert Foreign("reading:failing", (1, 8, 8), trust=True).digest


def test_the_digest_sees_the_weights_beside_an_onnx_file() -> None:
    onnx = pytest.importorskip("onnx")
    onnx_file(Path("net.onnx"))
    whole, digests = onnx.load("net.onnx"), []
    for tensor in whole.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save_model(whole, "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    weights = np.fromfile("net.data", np.float32)
    for scale in (1.0, 1.5, 1.0):
        (scale * weights).astype(np.float32).tofile("net.data")
        digests.append(subject_of("net.onnx", (1, 8, 8)).digest)
    assert digests[0] == digests[2] != digests[1]
    (weights * 0).tofile("net.data")
    nothing = subject_of("net.onnx", (1, 8, 8)).digest
    Path("net.data").write_bytes(b"\0\0\0\x80" * len(weights))  # -0.0: other bytes, the same answers
    assert subject_of("net.onnx", (1, 8, 8)).digest != nothing


MEMORY = """
import torch
from tests.test_evaluate import linear
net = linear()
def always():
    def big(x): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\\nand more")
    return big
def later(seen=[]):
    def big(x):
        seen.append(x)
        if len(seen) > 40: raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return net(x)
    return big
"""


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("when", ["always", "later"])
def test_a_lack_of_memory_is_the_machines_fault(when: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the caller's, nor a traceback: the first line of what was said, and what to do."""
    Path("hungry.py").write_text(MEMORY)
    sys.modules.pop("hungry", None)
    assert run(f"hungry:{when}", "--trust", *QUICK, "--batch-size", "9", "--attacks", "apgd-ce") == 3
    said = capsys.readouterr().err
    assert re.search(r"expected enough memory, got: .* allocate.*--batch-size, now 9", said), said
    assert "and more" not in said


def test_a_lack_of_memory_at_the_first_look_is_no_other_classifier(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Ours, "open", lambda self, device: hungry)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        logits_wanted(subject_of(str(model), (1, 8, 8)), Digits().load(), "cpu")


def test_a_zoo_file_with_its_entry_and_a_submission(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test images alone in an .npz; the record and the submission say that these are no RobustBench numbers."""
    net = WideResNetSpec(depth=10, width=1).build(3, 10, seed=0).eval()
    save_robustbench(net, "weights.pt")
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        labels = net(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).argmax(1).numpy()
    np.savez("some.npz", images=images, labels=labels)
    words = ["weights.pt", "--zoo", "WRN-10-1", "--data", "some.npz", "--threat", "l2:0.5", "--attacks", "apgd-dlr"]
    words += ["--workers", "1", *TINY, "--submission", "sub", *PAPER]
    assert run(*words) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().out.split())
    assert "All images of some.npz were taken for test images" in said
    assert "not a RobustBench number: 6 images were attacked" in said
    record = json.loads(Path("sub/model_info/some/L2/Doe2026Test_WRN-10-1.json").read_text())
    assert (record["architecture"], record["clean_acc"]) == ("WideResNet-10-1", "100.00")
    assert run(*words) == 0, "the same words again find the submission"
    assert "there already" in capsys.readouterr().out
    (folder,) = Path("runs/evaluations").iterdir()
    assert json.loads((folder / "robustbench.json").read_text()) == record
    assert run(*("Another" if word == "T" else word for word in words)) == 2
    assert "with other numbers or words" in capsys.readouterr().err
    whole = {path: path.read_bytes() for path in Path("sub").rglob("*") if path.is_file()}
    shutil.rmtree("sub")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_folder.zoo, "_entry_lines", _killed)  # weights and record are written, no more
        assert run(*words) == 130
    assert run(*words) == 0, "killed in the middle of the submission, the same words make it"
    assert {path: path.read_bytes() for path in Path("sub").rglob("*") if path.is_file()} == whole
    assert not list(Path().glob(".sub*"))


def _killed(*_: object) -> str:
    raise KeyboardInterrupt


# ---- mistakes ----

PAPER = ["--name", "Doe2026Test_WRN-10-1", "--title", "T", "--authors", "A, B", "--venue", "V", "--link", "L"]
MISTAKES = {
    "no classifier": (["--data", "digits"], "a classifier first"),
    "no data": (["MODEL"], "--data"),
    "no such file": (["nowhere.pt", "--data", "digits"], "nothing here"),
    "no such data": (["MODEL", "--data", "digitz"], "digits"),
    "an unknown attack": (["MODEL", "--data", "digits", "--attacks", "pgd"], "apgd-ce"),
    "no attack": (["MODEL", "--data", "digits", "--attacks", ","], "names out of"),
    "attacks and a version": (["MODEL", "--data", "digits", "--attacks", "square", "--version", "plus"], "either"),
    "an unknown version": (["MODEL", "--data", "digits", "--version", "super"], "standard, plus"),
    "an unknown precision": (["MODEL", "--data", "digits", "--precision", "half"], "bfloat16"),
    "a threat without a norm": (["MODEL", "--data", "digits", "--threat", "8/255"], "NORM:EPSILON"),
    "a threat of nothing": (["MODEL", "--data", "digits", "--threat", "linf:0"], "above 0"),
    "no images": (["MODEL", "--data", "digits", "--images", "0"], "above 0"),
    "other classes": (["MODEL", "--data", "two.npz", "--all-images"], "classes"),
    "other images": (["MODEL", "--data", "large.npz", "--all-images"], "got one that was trained on images"),
    "images out of range": (["MODEL", "--data", "range.npz", "--all-images"], r"in \[0, 1\], got"),
    "labels of another shape": (["MODEL", "--data", "labels.npz", "--all-images"], "one whole number for each"),
    "an empty set": (["MODEL", "--data", "empty.npz", "--all-images"], "at least one"),
    "pickles": (["MODEL", "--data", "pickled.npz", "--all-images"], "expected"),
    "all images of what is no file": (["MODEL", "--data", "digits", "--all-images"], "npz"),
    "an entry for what is ours": (["MODEL", "--data", "digits", "--zoo", "WRN-10-1"], "bare weights"),
    "bare weights without an entry": (["bare.pt", "--data", "digits"], "entry of RobustBench"),
    "a white box for a black one": (["net.onnx", "--data", "digits", "--attacks", "apgd-ce"], "no gradients"),
    "a program without trust": (["nothing:here", "--data", "digits"], "--trust"),
    "a submission of nobody": (["MODEL", "--data", "digits", "--submission", "s"], "--authors"),
    "a submission of another network": (
        ["MODEL", "--data", "digits", "--submission", "s", *PAPER],
        "its zoo has classes for",
    ),
    "a full folder": (["MODEL", "--data", "digits", "--out", "full"], "new folder"),
    "severities": (["MODEL", "--data", "digits", "--corruptions", "1,7"], "1 to 5"),
    "micro-batch": (["MODEL", "--data", "digits", "--micro-batch", "3"], "--batch-size"),
    "no such option": (["MODEL", "--data", "digits", "--attakcs", "square"], "--attakcs"),
}


def files(model: Path) -> None:
    """What the mistakes need."""
    drawn = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    np.savez("two.npz", images=drawn, labels=np.arange(6) % 2, class_names=np.array(["a", "b"]))
    np.savez("large.npz", images=np.zeros((6, 16, 16, 1), np.uint8), labels=np.arange(6))
    np.savez("range.npz", images=np.full((6, 1, 8, 8), 1.5, np.float32), labels=np.arange(6))
    np.savez("labels.npz", images=drawn, labels=np.zeros((6, 2), int))
    np.savez("empty.npz", images=drawn[:0], labels=np.zeros(0, int))
    np.savez("pickled.npz", images=np.array([{}] * 6, dtype=object), labels=np.arange(6))
    torch.save({"a": torch.zeros(2)}, "bare.pt")
    onnx_file(Path("net.onnx"))
    Path("full").mkdir()
    Path("full/mine.txt").touch()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_to_the_caller(mistake: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(model)
    words, expected = MISTAKES[mistake]
    assert run(*(str(model) if word == "MODEL" else word for word in words), "--workers", "1") == 2
    said = capsys.readouterr().err
    assert re.search(expected, said), said
    assert "expected" in said
    assert not Path("runs/evaluations").exists()


def test_an_epsilon_is_a_number() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import gambeson; gambeson.ThreatModel(epsilon='8/255')"],  # types are checked here
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    assert re.search(r"ValueError: .*parse\('linf:8/255'\)", said)
    for text in ("linf:8/255", f"linf:{8 / 255}"):
        assert read(["m", "--data", "digits", "--threat", text]).evaluating.assessment.autoattack.threat == ThreatModel(
            epsilon=8 / 255
        )


def test_without_a_threat_it_is_that_of_the_training(model: Path, tmp_path: Path) -> None:
    """Where the folder says it; a threat that is said goes before, and without either it is linf 8/255."""
    net, words = from_pretrained(model), ["--data", "digits"]
    net.save_pretrained(tmp_path / "told", threat=ThreatModel(norm="l2", epsilon=0.7))
    asked = [read([str(place), *words]) for place in (tmp_path / "told", model)]
    asked.append(read([str(tmp_path / "told"), *words, "--threat", "linf:0.1"]))
    found = [one.evaluating.assessment.autoattack.threat for one in asked]
    assert found == [ThreatModel(norm="l2", epsilon=0.7), ThreatModel(), ThreatModel(epsilon=0.1)]


def test_words_become_an_evaluation() -> None:
    asked = read(["m", "--data", "digits", "--threat", "l1:12", "--quick", "--corruptions", "--images", "7"])
    spec = asked.evaluating.assessment
    assert (spec.autoattack.steps, spec.autoattack.queries, spec.autoattack.official) == (20, 500, False)
    assert asked.corrupting is not None
    assert (asked.corrupting.severities, asked.corrupting.images) == ((1, 2, 3, 4, 5), 7)
    assert asked.corrupting.batch_size == 256
    for size in (["--batch-size", "3"], ["--assessment.batch_size", "3"]):
        small = read(["m", "--data", "digits", "--corruptions", *size])
        assert small.corrupting is not None
        assert small.corrupting.batch_size == small.evaluating.assessment.batch_size == 3
    assert read(["m", "--data", "digits", "--threat", "l2:0.5"]).evaluating.assessment.autoattack.official
    assert not read(["m", "--data", "digits", "--threat", "l1:12"]).evaluating.assessment.autoattack.official
    assert read(["m", "--corruptions=3,1", "--data", "digits"]).corrupting.severities == (1, 3)  # type: ignore


def test_all_misclassified_is_a_robust_accuracy_of_zero(model: Path) -> None:
    labels = (Digits().load().test.labels[:10].numpy() + 5) % 10
    images = (Digits().load().test.images[:10, 0].numpy() * 255).round().astype(np.uint8)
    from gambeson.models import from_pretrained

    with torch.no_grad():
        wrong = from_pretrained(model)(torch.from_numpy(images)[:, None].float() / 255).argmax(1).numpy()
    labels = np.where(labels == wrong, (labels + 1) % 10, labels)
    np.savez("wrong.npz", x_test=images, y_test=labels)
    words = [str(model), "--data", "wrong.npz", "--threat", "linf:0.1", "--version", "plus", "--workers", "1", *TINY]
    assert run(*words) == 0
    page = (results() / "report.html").read_text()
    assert "0.0 % robust accuracy (0.0 to" in page
    assert "AutoAttack plus" in page


# ---- the page ----


def rows_by_hand() -> pa.Table:
    """Eight images of two classes: one wrong, two fall to a, one to b, one was never tried by b and fell to a."""
    label = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    broken = ["clean", "a", None, None, "a", "b", None, None]
    tried_b = [None, None, True, True, None, False, True, True]
    return pa.table(
        {
            "index": np.arange(8),
            "label": label,
            "prediction": [1, 0, 0, 0, 1, 1, 1, 1],
            "margin": np.array([-1, 2, 2, 2, 2, 2, 2, 5], np.float32),
            "robust": [who is None for who in broken],
            "broken_by": pa.array(broken, pa.string()),
            "precision": ["bfloat16"] * 8,
            "a": [None, False, True, True, False, True, True, True],
            "a_margin": pa.array([None, -0.5, 1, 1, -0.1, 0.5, 1, 4], pa.float32()),
            "a_queries": [0, 3, 10, 10, 5, 10, 10, 10],
            "a_seconds": np.array([0, 0.3, 1, 1, 0.5, 1, 1, 1], np.float32),
            "b": tried_b,
            "b_margin": pa.array([None, None, 0.2, 1, None, -2, 1, 3], pa.float32()),
            "b_queries": [0, 0, 100, 100, 0, 40, 100, 100],
            "b_seconds": np.zeros(8, np.float32),
            "robust@0.05": [False, None, True, None, True, None, True, None],
        }
    )


def by_hand(**changes: object) -> Measured:
    """The rows by hand as material of a page."""
    facts = {
        "version": "standard", "official": False, "attacks": {"a": "A()", "b": "B()"}, "norm": "linf",
        "epsilon": 8 / 255, "precision": "bfloat16", "gradients": True, "data": "hand", "class_names": ["cat", "<dog>"],
        "images": 8, "test_images": 9, "notes": ["Searched in bfloat16."],
    }  # fmt: skip
    attack = {"steps": 100, "targets": 9, "queries": 5000}
    curve = {"class": "PGD", "steps": 20, "restarts": 2, "loss": {"class": "CrossEntropy"}}
    record = {
        "config": {"autoattack": attack, "curve_attack": curve}, "finished": "2026-01-01T00:00",
        "digest": "d" * 64, "seconds": 3.0, "attempts": 1, "peak_mb": 100.0, "versions": {"torch": "2"},
        "execution": {"device": "cpu"},
    }  # fmt: skip
    checks = (Check(name="good", passed=True, detail="1"), Check(name="bad", passed=False, detail="<b>2</b>"))
    fields = {"rows": rows_by_hand(), "facts": facts, "record": record, "checks": checks, "subject": "<net>"}
    return Measured(**(fields | {"command": "gambeson evaluate x --data 'a b'"} | changes))  # type: ignore[arg-type]


def test_queries_over_rows_by_hand() -> None:
    rows = rows_by_hand()
    falls = [(f.name, f.seen, f.fell, f.standing.estimate) for f in evaluation_rows.cascade(rows)]
    assert falls == [("clean", 8, 1, 7 / 8), ("a", 7, 2, 5 / 8), ("b", 5, 1, 4 / 8)]
    cat, dog = evaluation_rows.by_class(rows, ["cat", "dog"])
    assert (cat.images, cat.clean.estimate, cat.robust.estimate, cat.broken) == (4, 0.75, 0.5, {"a": 1, "b": 0})
    assert (dog.clean.estimate, dog.robust, dog.broken) == (1.0, wilson(2, 4), {"a": 1, "b": 1})
    a, b, both = evaluation_rows.costs(rows)
    assert (a.robust.queries, a.broken.queries, a.broken.images) == (10.0, 4.0, 2)
    assert (b.robust.queries, b.broken.queries) == (100.0, 40.0)
    assert (both.robust.queries, both.broken.queries) == (110.0, pytest.approx((3 + 5 + 50) / 3))
    assert both.seconds == pytest.approx(5.8)
    _, met = evaluation_rows.margins(rows)
    assert met.tolist() == pytest.approx([-1, -0.5, 0.2, 1, -0.1, -2, 1, 3])
    points = [(p.epsilon, p.accuracy, p.images) for p in evaluation_rows.curve(rows)]
    assert points == [(0.0, wilson(3, 4), 4), (0.05, wilson(3, 4), 4)]


def test_the_page_says_it_all_and_escapes_what_it_is_given() -> None:
    found = by_hand(corruptions=(CorruptionLine("fog", {1: 6, 5: 2}, 8),))
    page = evaluation.render(found)
    assert page == evaluation.render(found)
    sentence = "50.0 % robust accuracy (21.5 to 78.5) under linf 8/255"
    assert f"{sentence}, changed AutoAttack (not AutoAttack standard), searched in bfloat16: 4 of 8" in page
    assert "Not AutoAttack standard:</strong> the search ran in bfloat16." in page
    assert "1 check of the evaluation failed" in page
    assert "&lt;b&gt;2&lt;/b&gt;" in page
    assert "&lt;dog&gt;" in page
    assert "<net>" not in page
    assert re.search(r"fog</th>.*75\.0.*25\.0.*50\.0", page)
    assert "gambeson evaluate x --data &#39;a b&#39;" in page
    assert "Line: PGD on cross-entropy, 20 steps from 2 starts, each" in page
    assert "Right under PGD, %" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    whole = by_hand(checks=(Check(name="good", passed=True, detail="1"),))
    assert "All 1 checks passed" in evaluation.render(whole)
    assert "Common corruptions" not in evaluation.render(whole)


def test_only_the_whole_standard_is_called_so() -> None:
    facts = by_hand().facts | {"precision": "float32", "official": True, "notes": []}
    found = by_hand(facts=facts)
    assert evaluation_words.name_of_version(found) == "AutoAttack standard"
    assert evaluation_words.shortfalls(found) == []
    assert "searched in" not in evaluation_words.headline(found)
    record = found.record | {"config": {"autoattack": {"steps": 20, "targets": 9, "queries": 500}}}
    short = by_hand(facts=facts | {"official": False}, record=record)
    assert evaluation_words.shortfalls(short) == ["other budgets: steps 20 (not 100), queries 500 (not 5,000)"]
    blind = by_hand(facts=facts | {"gradients": False, "official": False})
    assert "This is not a robust accuracy" in evaluation.render(blind)
    assert evaluation_words.name_of_version(blind) == "black-box attacks only"
    styles = {str(line.style) for line in evaluation_words.terminal_lines(by_hand())}
    assert "bold red" in styles


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """No script error, nothing wider than the window, and a click on a heading sorts the classes."""
    from tests.test_report import BROKEN

    binary = next((b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None)
    if binary is None:
        pytest.skip("no chromium or google-chrome on PATH, so the page was not opened in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = evaluation.write(by_hand(corruptions=(CorruptionLine("fog", {1: 6, 5: 2}, 8),)), tmp_path / "r.html")
    troubles: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=binary, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        tab = browser.new_page()
        tab.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: troubles.append(str(e)))
        for width, scheme in ((390, "light"), (1200, "dark")):
            tab.set_viewport_size({"width": width, "height": 900})
            tab.emulate_media(color_scheme=scheme)
            tab.goto(path.as_uri())
            troubles += tab.evaluate(BROKEN)
        first = lambda: tab.locator("#classes tbody tr th").first.inner_text()  # noqa: E731
        seen = [first()]
        for heading in ("Clean, %", "Clean, %", "Class"):
            tab.get_by_role("button", name=heading).click()
            seen.append(first())
        browser.close()
    assert troubles == []
    assert seen == ["cat", "<dog>", "cat", "<dog>"]


# ---- the screen ----


def test_lines_come_now_and_then_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a kind at once, the next of that kind after 20 seconds, another kind at once; with the time left."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock.now)
    console = Console(record=True, width=200, force_terminal=False, file=open(os.devnull, "w"))  # noqa: SIM115
    shown = screen.ProgressScreen(console)
    shown.show(News("e", "assess", 0, 100))
    for second in range(0, 46, 5):
        clock.now = float(second)
        shown.show(News("e", "assess", second, 100))
        shown.say(f"standing so far: {second}")
    shown.say("going on: 3 images")
    lines = console.export_text().splitlines()
    assert [re.sub(r"^\[ *(\d+) s\] ", r"\1 ", line) for line in lines] == [
        "0 standing so far: 0; 0 of 100",
        "20 standing so far: 20; 20 of 100, 80 s left",
        "40 standing so far: 40; 40 of 100, 60 s left",
        "45 going on: 3 images; 45 of 100, 55 s left",
    ]


def test_lines_live_below_the_bars_of_a_terminal() -> None:
    console = Console(record=True, width=100, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with screen.ProgressScreen(console) as shown:
        shown.show(News("e", "assess", 1, 4))
        shown.say("standing so far: 1 of 4")
        shown.say("standing so far: 2 of 4")
        assert list(shown.bars.said.values()) == ["standing so far: 2 of 4"]
    assert "standing so far: 2 of 4" in console.export_text()
