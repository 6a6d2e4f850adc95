"""gambeson select: from a store and labels to a selection that trainings take."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gambeson.cli import main
from gambeson.data.datasets import Digits
from gambeson.data.mixture import to_uint8
from gambeson.data.scores import as_arrow
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore, open_synthetic
from gambeson.models.classifiers import classifier_header
from gambeson.models.files import save_tensors
from gambeson.models.resnet import ResNetSpec
from gambeson.robustness.subjects import Ours
from gambeson.synthesis.scorers import Scorers

COUNT = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of digits, a classifier, and the labels that it gives."""
    root, real = tmp_path_factory.mktemp("select"), Digits(train_images=60, validation_images=200).load()
    images, labels = real.validation.images[:COUNT].clone(), real.validation.labels[:COUNT].numpy()
    images[20:] = (images[20:] + torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))) / 2
    writer = StoreWriter(root=root / "store", blocks=3, blocks_per_shard=2)
    for block in range(3):
        part = slice(20 * block, 20 * block + 20)
        writer.put(block, to_uint8(images)[part], labels[part], {})
    writer.finish({"source": "test", "class_names": [f"digit {k}" for k in range(10)]})
    for name, seed in (("teacher", 1), ("other", 2)):
        model = ResNetSpec(width=4).build(1, 10, seed)
        (root / name).mkdir()
        save_tensors(root / name / "classifier.safetensors", model.state_dict(), classifier_header(model, (1, 8, 8)))
    teacher = Ours(str(root / "teacher" / "classifier.safetensors"))
    with torch.no_grad():
        logits = teacher.network()(torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).float() / 255).numpy()
    store = SyntheticStore.open(root / "store")
    about = {"images": store.digest, "teachers": [teacher.digest], "soft": None}
    table = pa.table({"label": labels, "condition": labels, "logits": as_arrow(logits)})
    (root / "labels").mkdir()
    pq.write_table(table.replace_schema_metadata({"labeling": json.dumps(about)}), root / "labels" / "labels.parquet")
    return root


@pytest.fixture
def run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """(words, ...) -> (exit code, what was printed, what was complained of); --out is `out` unless said."""

    def ran(*words: str, out: str = "out", labels: bool = True) -> tuple[int, str, str]:
        given = ["--labels", str(place / "labels")] if labels else []
        where = ["--out", str(tmp_path / out), "--runs", str(tmp_path / "runs"), "--workers", "1"]
        code = main(["select", str(place / "store"), *words, *given, *where])
        told = capsys.readouterr()
        return code, told.out, told.err

    return ran


def test_help_names_every_score_and_its_fields(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert main(["select", "--help"]) == 0
    told = capsys.readouterr().out
    for name in (*(kind.__name__ for kind in get_args(Scorers)), "--remove-copies", "Exit codes"):
        assert name in told
    assert max(map(len, told.splitlines())) <= 120
    with pytest.raises(SystemExit) as stopped:
        main(["select", str(place / "store"), "--score", "RobustGradientNorm", "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "--score.loss.steps" in told
    assert "--per-class" in told or "--per_class" in told


def test_a_selection_is_delivered_and_found_again(run: Any, place: Path, tmp_path: Path) -> None:
    """By logits alone; the folder is what trainings take, and the same command finds the result."""
    code, told, complaint = run("--score", "LabelMargin", "--per-class", "3")
    assert (code, complaint) == (0, "")
    assert "30 images kept, 3 of each class asked for" in told
    assert "digit 7" in told
    chosen = open_synthetic(tmp_path / "out")
    assert isinstance(chosen, Chosen)
    assert np.bincount(chosen.labels).tolist() == [3] * 10
    assert chosen.store.root.resolve() == (place / "store").resolve()
    before = (tmp_path / "out" / "chosen.parquet").read_bytes()
    assert run("--score", "LabelMargin", "--per-class", "3")[0] == 0
    assert (tmp_path / "out" / "chosen.parquet").read_bytes() == before
    code, _, complaint = run("--score", "LabelMargin", "--per-class", "4")
    assert code == 2
    assert "got another result's" in complaint


def test_a_store_that_moved_is_selected_from_at_its_new_place(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The finished selection points to where the store was."""
    shutil.copytree(place / "store", tmp_path / "store")
    words = ["--labels", str(place / "labels"), "--score", "LabelMargin", "--per-class", "3"]
    where = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--workers", "1"]
    assert main(["select", str(tmp_path / "store"), *words, *where]) == 0
    (tmp_path / "store").rename(tmp_path / "moved")
    assert main(["select", str(tmp_path / "moved"), *words, *where]) == 0, capsys.readouterr().err
    chosen = open_synthetic(tmp_path / "out")
    assert isinstance(chosen, Chosen)
    assert chosen.store.root.resolve() == (tmp_path / "moved").resolve()


def test_all_images_kept_is_said_as_it_is(run: Any, tmp_path: Path) -> None:
    code, told, complaint = run("--score", "LabelMargin")
    assert (code, complaint) == (0, "")
    assert "60 images kept, all that have a label; 0 left out" in told
    facts = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert (facts["quota"], facts["short"], sum(facts["kept"])) == (None, {}, COUNT)


def test_scores_by_a_classifier_are_kept_and_taken_again(run: Any, place: Path, tmp_path: Path) -> None:
    teacher, other = (str(place / name / "classifier.safetensors") for name in ("teacher", "other"))
    code, told, _ = run("--score", "ParameterGradientNorm", "--keep", "0.5", "--model", teacher)
    assert code == 0
    digest = json.loads((tmp_path / "out" / "selection.json").read_text())["scores"]
    assert digest in told
    assert run("--scores", digest, "--keep", "0.5", out="again")[0] == 0
    first, second = (open_synthetic(tmp_path / name) for name in ("out", "again"))
    assert np.array_equal(first.positions, second.positions)  # type: ignore[union-attr]
    assert run("--score", "InputGradientNorm", "--model", other, out="o")[0] == 0
    foreign = json.loads((tmp_path / "o" / "selection.json").read_text())["scores"]
    code, _, complaint = run("--scores", foreign, out="f")
    assert code == 2
    assert "--other-teacher" in complaint
    assert not (tmp_path / "f").exists()
    assert run("--scores", foreign, "--other-teacher", out="f")[0] == 0


def test_real_images_copies_and_a_threat(run: Any, place: Path, tmp_path: Path) -> None:
    model = ("--model", str(place / "teacher" / "classifier.safetensors"))
    real = ("--data", "digits", "--remove-copies")
    robust = ("--score", "RobustGradientNorm", "--score.loss.steps", "1", "--threat", "l2:0.3")
    code, told, _ = run(*robust, *model, *real, "--per-class", "2")
    assert code == 0
    facts = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert facts["score"]["loss"]["threat"] == {"class": "ThreatModel", "norm": "l2", "epsilon": 0.3}
    assert sum(facts["copies_removed"]) == facts["left_out"] > 0  # some of these digits are train images here
    assert f"{sum(facts['copies_removed'])} of them copies" in told


def test_too_many_asked_for_is_said(run: Any, tmp_path: Path) -> None:
    code, told, complaint = run("--score", "Entropy", "--per-class", "50")
    assert code == 0
    assert "10 classes hold fewer images" in complaint
    assert "60 images kept" in told
    assert len(json.loads((tmp_path / "out" / "selection.json").read_text())["short"]) == 10


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no score": ([], "--score: expected one of Confidence, Entropy"),
    "unknown score": (["--score", "Margn"], "LabelMargin"),
    "field of another score": (["--score", "LabelMargin", "--score.seed", "3"], "add --score Random"),
    "two words for how many": (["--score", "LabelMargin", "--keep", "0.5", "--per-class", "3"], "not both"),
    "share": (["--score", "LabelMargin", "--keep", "2"], "share above 0 and up to 1"),
    "score and scores": (["--score", "LabelMargin", "--scores", "0" * 64], "no --score beside it"),
    "other teacher": (["--score", "LabelMargin", "--other-teacher"], "--scores beside it"),
    "no such scores": (["--scores", "0" * 64], "expected scores with a meta.json"),
    "no model": (["--score", "OwnCentroid"], "--model: expected a classifier, which OwnCentroid goes by"),
    "model for nothing": (["--score", "LabelMargin", "--model", "x"], "goes by no classifier"),
    "data for nothing": (["--score", "LabelMargin", "--data", "digits"], "--data: expected nothing: LabelMargin"),
    "no such model": (["--score", "OwnCentroid", "--model", "nowhere"], "nothing here"),
    "no data": (["--score", "Discriminator"], "--data: expected the real images"),
    "compile": (["--score", "LabelMargin", "--compile"], "--compile"),
    "stray word": (["--score", "LabelMargin", "another"], ""),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_with_code_2(name: str, run: Any, tmp_path: Path) -> None:
    words, expected = MISTAKES[name]
    code, told, complaint = run(*words)
    assert code == 2, told
    assert expected in complaint
    assert not (tmp_path / "out").exists()


def test_places_that_are_wrong_are_told(run: Any, place: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, complaint = run("--score", "LabelMargin", labels=False)
    assert (code, "--labels: expected labels.parquet" in complaint) == (2, True)
    labels = ["--labels", str(place / "labels"), "--score", "LabelMargin"]
    assert main(["select", *labels, "--out", str(tmp_path / "x")]) == 2
    assert "a store first" in capsys.readouterr().err
    assert main(["select", str(place / "store"), *labels]) == 2
    assert "--out" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert run("--score", "LabelMargin", out="full")[0] == 2
    assert run("--score", "LabelMargin")[0] == 0
    assert main(["select", str(tmp_path / "out"), *labels, "--out", str(tmp_path / "y")]) == 2
    assert "got a selection from" in capsys.readouterr().err


def test_a_damaged_score_is_the_machine_s_fault(run: Any, place: Path, tmp_path: Path) -> None:
    model = str(place / "other" / "classifier.safetensors")
    assert run("--score", "LastLayerGradientNorm", "--model", model)[0] == 0
    digest = json.loads((tmp_path / "out" / "selection.json").read_text())["scores"]
    (place / "store" / "scores" / digest / "00000.parquet").write_bytes(b"no")
    shutil.rmtree(tmp_path / "runs")
    code, _, complaint = run("--score", "LastLayerGradientNorm", "--model", model, "--keep", "0.5", out="other")
    assert code == 3
    assert "remove it and score again" in complaint
    assert not list((tmp_path / "runs").rglob("done.json"))
