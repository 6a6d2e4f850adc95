"""Labels of synthetic images: by condition or by any teachers, agreement, soft labels all the way into training."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from gambeson import canonical, cli
from gambeson.data.augment import PadCrop
from gambeson.data.chosen import SOFT
from gambeson.data.datasets import Digits
from gambeson.data.imageset import ImageSet
from gambeson.data.label_safe import CutMix
from gambeson.data.mixture import Mixture, check_synthetic, same_names
from gambeson.data.scores import as_numpy
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.disk import checksum, write_json
from gambeson.errors import EnvironmentFault, UserError
from gambeson.heritage import heritage_of
from gambeson.label_command import USAGE, percent, table
from gambeson.models.classifiers import classifier_header
from gambeson.models.export import save_onnx
from gambeson.models.files import load_tensors, save_tensors
from gambeson.models.resnet import ResNetSpec
from gambeson.recipe import Recipe
from gambeson.robustness.losses import MART, TRADES, PGDAdversarial, Plain
from gambeson.robustness.subjects import subject_of
from gambeson.store import Artifact, Store, Workspace
from gambeson.synthesis import label as labelling
from gambeson.synthesis.label import (
    ByTeacher,
    Labeling,
    OtherTeacher,
    Soft,
    about_labels,
    label,
    labelled_parts,
    open_labels,
    softened,
)
from gambeson.synthesis.pool import LabelFile, Piece, Pool
from gambeson.synthesis.teachers import together
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, batches_of, train_classifier
from gambeson.training.loop import Optimisation

NAMES = ("cat", "dog", "eel")
SIDE = 4


@dataclass(frozen=True)
class Reader:
    """A teacher that reads its answer off a pixel: class c for a value of 10 c in this row; 0.9 for that class."""

    row: int
    classes: int = 3
    breaks_at: int = -1

    title = property(lambda self: f"reader {self.row}")
    digest = property(lambda self: f"{self.row}{self.classes}" * 8)
    gradients = False

    def network(self) -> None:
        return None

    def open(self, device: str) -> Callable[[Tensor], Tensor]:
        return self.answer

    def answer(self, images: Tensor) -> Tensor:
        said = (images[:, 0, self.row, 0] * 255 / 10).round().long()
        number = (images[:, 0, 3, 3] * 255).round()
        logits = torch.full((len(images), self.classes), 0.1 / (self.classes - 1))
        logits[torch.arange(len(images)), said] = 0.9
        return torch.where((number == self.breaks_at)[:, None], torch.nan, logits.log())


def made_store(root: Path, conditions: list[int], *opinions: list[int], names: tuple = NAMES) -> SyntheticStore:
    """Images that say what readers answer: row r of the first column for reader r; the last pixel is the number."""
    images = np.zeros((len(conditions), SIDE, SIDE, 1), np.uint8)
    images[:, 3, 3, 0] = np.arange(len(conditions))
    for row, said in enumerate(opinions):
        images[:, row, 0, 0] = 10 * np.array(said)
    writer = StoreWriter(root=root, blocks=1, blocks_per_shard=1)
    writer.put(0, images, np.array(conditions))
    writer.finish({"class_names": list(names)} if names else {})
    return SyntheticStore.open(root)


CONDITIONS = [0, 0, 0, 1, 1, 1, 2, 2]
FIRST = [0, 0, 1, 1, 1, 2, 0, 1]  # agrees on 2 of 3, 2 of 3, 0 of 2
SECOND = [0, 1, 1, 1, 1, 1, 0, 2]


@pytest.fixture
def store(tmp_path: Path) -> SyntheticStore:
    return made_store(tmp_path / "store", CONDITIONS, FIRST, SECOND)


def labelled(folder: Path, spec: Labeling, source, *teachers, progress=lambda *_: None) -> tuple[Path, dict]:
    folder.mkdir(exist_ok=True)
    label.work(Workspace(folder, progress), spec, source, *teachers)
    return folder / "labels.parquet", json.loads((folder / "labels.json").read_text())


def column(path: Path, name: str) -> list:
    return pq.read_table(path)[name].to_pylist()


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_an_ensemble_by_hand() -> None:
    """Means of probabilities: (.7 + .1) / 2 = .4 and .6; one teacher's logits stay as they are."""
    first, second = torch.tensor([[0.7, 0.3]]).log() + 5, torch.tensor([[0.1, 0.9]]).log()
    assert together([first, second]).exp().tolist()[0] == pytest.approx([0.4, 0.6])
    assert together([first]) is first


def test_soft_labels_by_hand() -> None:
    """exp(log .8 / 2) : exp(log .2 / 2) = 2 : 1."""
    logits = torch.tensor([[0.8, 0.2]]).log()
    assert Soft()(logits).tolist()[0] == pytest.approx([0.8, 0.2])
    assert Soft(temperature=2.0)(logits).tolist()[0] == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(UserError, match="temperature"):
        Soft(temperature=0.0)


def test_recipes_of_before_keep_their_digests() -> None:
    before = {"class": "Labeling", "by": {"class": "ByCondition"}, "batch_size": 512}
    assert canonical.plain(Labeling(), drop_neutral=True) == before
    assert label.revision == 1


# ---- the stage -------------------------------------------------------------------------------------------------------


def test_agreement_is_counted_by_class(store: SyntheticStore, tmp_path: Path) -> None:
    path, told = labelled(tmp_path / "l", Labeling(batch_size=3), store, Reader(0))
    assert column(path, "label") == column(path, "condition") == CONDITIONS
    assert as_numpy(pq.read_table(path)["logits"]).argmax(1).tolist() == FIRST
    counts = [(row["class"], row["generated"], row["agreement"]["count"]) for row in told["classes"]]
    assert counts == [("cat", 3, 2), ("dog", 3, 2), ("eel", 2, 0)]
    assert (told["agreement"]["count"], told["agreement"]["of"]) == (4, 8)
    assert told["agreement"]["low"] < 0.5 < told["agreement"]["high"]
    assert told["images"] == told["labelled"] == 8
    assert told["empty"] == []
    assert told["unanimous"] is None


def test_images_that_disagree_are_left_out(store: SyntheticStore, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "l").mkdir()
    work = Workspace(tmp_path / "l", say=said.append)
    label.work(work, Labeling(disagreeing="drop", batch_size=3), store, Reader(0))
    assert column(tmp_path / "l/labels.parquet", "label") == [0, 0, -1, 1, 1, -1, -1, -1]
    told = json.loads((tmp_path / "l/labels.json").read_text())
    assert [row["labelled"] for row in told["classes"]] == [2, 2, 0]
    assert (told["labelled"], told["dropped"], told["empty"]) == (4, 4, ["eel"])
    assert said == ["label: no image of eel is left"]
    with pq.ParquetFile(tmp_path / "l/labels.parquet") as file:
        ((positions, labels),) = labelled_parts(file)
    assert (positions.tolist(), labels.tolist()) == ([0, 1, 3, 4], [0, 0, 1, 1])


def test_two_teachers_speak_with_the_mean_of_their_probabilities(store: SyntheticStore, tmp_path: Path) -> None:
    path, told = labelled(tmp_path / "l", Labeling(by=ByTeacher()), store, Reader(0), Reader(1))
    probabilities = np.exp(as_numpy(pq.read_table(path)["logits"]))
    assert probabilities[0] == pytest.approx([0.9, 0.05, 0.05])
    assert probabilities[1] == pytest.approx([0.475, 0.475, 0.05])
    assert [each["agreement"]["count"] for each in told["teachers"]] == [4, 5]
    assert told["unanimous"]["count"] == sum(a == b for a, b in zip(FIRST, SECOND, strict=True))
    with pq.ParquetFile(path) as file:
        assert about_labels(file)["teachers"] == [Reader(0).digest, Reader(1).digest]
        assert about_labels(file)["images"] == store.digest


def test_images_without_a_class_are_labelled_by_the_teacher(tmp_path: Path) -> None:
    source = made_store(tmp_path / "s", [-1] * 4, [0, 1, 2, 2])
    path, told = labelled(tmp_path / "l", Labeling(by=ByTeacher()), source, Reader(0))
    assert column(path, "label") == [0, 1, 2, 2]
    assert told["agreement"] is None
    assert told["without_condition"] == 4
    assert "teacher and condition agree: -" in table(told)


def test_labelling_stopped_anywhere_ends_in_the_same_bytes(
    store: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the counts of the parts that were done before."""
    monkeypatch.setattr(labelling, "PART", 2)
    spec, teachers = Labeling(batch_size=2, disagreeing="drop", soft=Soft()), (Reader(0), Reader(1))
    straight, counted = labelled(tmp_path / "straight", spec, store, *teachers)
    for stop in (2, 4, 6, 8):

        def breaking(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            labelled(tmp_path / "l", spec, store, *teachers, progress=breaking)
    again, told = labelled(tmp_path / "l", spec, store, *teachers)
    assert again.read_bytes() == straight.read_bytes()
    assert told == counted


def saved(
    folder: Path, classes: int = 3, channels: int = 1, side: int = SIDE, weight: float | None = None, names: tuple = ()
) -> Path:
    """A classifier of ours on disk."""
    folder.mkdir(exist_ok=True)
    model = ResNetSpec(width=4).build(channels, classes, 0)
    if weight is not None:
        model.load_state_dict({name: value * weight for name, value in model.state_dict().items()})
    header = classifier_header(model, (channels, side, side)) | ({"class_names": list(names)} if names else {})
    save_tensors(folder / "classifier.safetensors", model.state_dict(), header)
    return folder


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of `saved` as a graph."""
    path = tmp_path_factory.mktemp("graph") / "net.onnx"
    save_onnx(ResNetSpec(width=4).build(1, 3, 0).eval(), path, (1, SIDE, SIDE))
    return path


def test_stages_folders_and_onnx_files_label_alike(store: SyntheticStore, graph: Path, tmp_path: Path) -> None:
    """The same network as a finished stage, by its folder, and as a graph."""
    folder = saved(tmp_path / "teacher")
    write_json(folder / "done.json", {"files": {p.name: checksum(p) for p in folder.iterdir()}})
    given = {
        "stage": Artifact("train_classifier", "0" * 64, folder),
        "ours": subject_of(str(folder), (1, SIDE, SIDE)),
        "onnx": OtherTeacher(path=str(graph)),
    }
    spec = Labeling(teachers=(given.pop("onnx"),))
    found = [labelled(tmp_path / name, spec.reading, store, each)[0] for name, each in given.items()]
    found.append(labelled(tmp_path / "onnx", spec.reading, store, *spec.others((1, SIDE, SIDE)))[0])
    logits = [as_numpy(pq.read_table(path)["logits"]) for path in found]
    for each in logits[1:]:
        np.testing.assert_allclose(each, logits[0], atol=1e-4)
    with pq.ParquetFile(found[0]) as one, pq.ParquetFile(found[1]) as two, pq.ParquetFile(found[2]) as three:
        assert about_labels(one) == about_labels(two) != about_labels(three)


def mistaken(tmp_path: Path) -> dict[str, tuple[Labeling, SyntheticStore, tuple, str]]:
    """Labelling that is refused: how, of what, by whom, and what is said."""
    store = made_store(tmp_path / "s", CONDITIONS, FIRST, SECOND)
    unnamed = made_store(tmp_path / "unnamed", CONDITIONS, FIRST, names=())
    without = made_store(tmp_path / "without", [-1, -1], [0, 1])
    wrong = made_store(tmp_path / "wrong", [0, 1], [1, 0])
    empty = SyntheticStore(store.root, (), (SIDE, SIDE, 1), {})
    by, drop = Labeling(by=ByTeacher()), Labeling(disagreeing="drop")
    five = subject_of(str(saved(tmp_path / "five", classes=5)), (1, SIDE, SIDE))
    large = subject_of(str(saved(tmp_path / "large", side=8)), (1, SIDE, SIDE))
    colour = subject_of(str(saved(tmp_path / "colour", channels=3)), (1, SIDE, SIDE))
    ill = subject_of(str(saved(tmp_path / "ill", weight=float("nan"))), (1, SIDE, SIDE))
    return {
        "classes": (by, store, (five,), r"images' 3 classes \(cat, dog, eel\), got one of 5"),
        "two teachers": (by, unnamed, (Reader(0), five), r"reader 0 of 3 and ResNet of .*five.* of 5"),
        "conditions beyond": (by, unnamed, (Reader(0, classes=2),), "the 3 classes or more .* got one of 2"),
        "larger images": (by, store, (large,), r"images' \[1, 4, 4\] .* trained on \[1, 8, 8\]"),
        "other channels": (by, store, (colour,), r"images' \[1, 4, 4\] .* trained on \[3, 4, 4\]"),
        "no numbers": (by, store, (ill,), "expected finite logits, got NaN"),
        "no number later": (replace(by, batch_size=2), store, (Reader(0, breaks_at=5),), "those of images 4 to 5"),
        "no image": (by, empty, (Reader(0),), "images to label: expected at least one"),
        "no teacher": (by, store, (), "teachers: expected at least one classifier"),
        "no condition": (Labeling(), without, (Reader(0),), "expected ByTeacher .*without a class"),
        "nothing to disagree with": (replace(by, disagreeing="drop"), without, (Reader(0),), "nothing to disagree"),
        "nothing left": (drop, wrong, (Reader(0),), "at least one of 2 images, but the teacher says another"),
        "not opened": (replace(by, teachers=(OtherTeacher(path="x"),)), store, (Reader(0),), "given as inputs"),
    }


def test_what_cannot_be_labelled_is_refused_by_name(tmp_path: Path) -> None:
    for name, (spec, source, teachers, told) in mistaken(tmp_path).items():
        with pytest.raises(UserError, match=told):
            labelled(tmp_path / name, spec, source, *teachers)
        assert not (tmp_path / name / "labels.parquet").exists(), name


def test_a_classifier_of_classes_with_other_names_is_refused(store: SyntheticStore, tmp_path: Path) -> None:
    model = ResNetSpec(width=4).build(1, 3, 0)
    model.save_pretrained(tmp_path / "c", shape=(1, SIDE, SIDE), class_names=("dog", "cat", "eel"))
    subject = subject_of(str(tmp_path / "c"), (1, SIDE, SIDE))
    with pytest.raises(
        UserError, match=r"the images in their order, cat, dog, eel; got dog, cat, eel, another from class 0"
    ):
        labelled(tmp_path / "l", Labeling(), store, subject)


def test_numbers_in_another_order_are_other_classes(tmp_path: Path) -> None:
    """A teacher of classes 0, 1, 2 does not label a store of 2, 1, 0; as a stage, too; one that names none does."""
    numbers = ("0", "1", "2")
    folder = saved(tmp_path / "teacher", names=numbers)
    write_json(folder / "done.json", {"files": {p.name: checksum(p) for p in folder.iterdir()}})
    stage, plain = Artifact("train_classifier", "0" * 64, folder), saved(tmp_path / "plain")
    turned = made_store(tmp_path / "turned", CONDITIONS, FIRST, names=numbers[::-1])
    for each in (stage, subject_of(str(folder), (1, SIDE, SIDE))):
        with pytest.raises(UserError, match=r"order, 2, 1, 0; got 0, 1, 2, another from class 0 on"):
            labelled(tmp_path / "l", Labeling(), turned, each)
    labelled(tmp_path / "l", Labeling(), turned, subject_of(str(plain), (1, SIDE, SIDE)))
    straight = made_store(tmp_path / "straight", CONDITIONS, FIRST, names=numbers)
    labelled(tmp_path / "m", Labeling(), straight, stage)
    unnamed, other = made_store(tmp_path / "u", CONDITIONS, FIRST, names=()), saved(tmp_path / "o", names=numbers[::-1])
    with pytest.raises(UserError, match="another from class 0 on"):  # of two teachers
        labelled(tmp_path / "n", Labeling(), unnamed, stage, subject_of(str(other), (1, SIDE, SIDE)))


@pytest.mark.parametrize(
    ("told", "wanted", "fits"),
    [
        ("", "abc", True),
        ("abc", "", True),
        ("abc", "abc", True),
        ("ab", "abc", True),
        ("012", "abc", True),
        ("abc", "012", True),
        ("0123", "012", True),
        ("acb", "abc", False),
        ("abcd", "abc", False),
        ("210", "012", False),
        ("012", "210", False),
        ("021", "210", False),
    ],
)
def test_names_that_agree(told: str, wanted: str, fits: bool) -> None:
    assert same_names(tuple(told), tuple(wanted)) == fits


def test_a_trained_classifier_names_its_classes(real: ImageSet, tmp_path: Path) -> None:
    spec = replace(TINY, optimisation=replace(TINY.optimisation, steps=1), validations=1)
    folder = Store(tmp_path).once(train_classifier, spec, real, None, seed=3).folder
    assert subject_of(str(folder / "classifier.safetensors"), (1, 8, 8)).class_names == real.class_names


# ---- damage ----------------------------------------------------------------------------------------------------------


def spoilt(path: Path) -> None:
    """A hundred zero bytes in the middle."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 50 : middle + 50] = bytes(100)
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def pieces_of(store: SyntheticStore, path: Path) -> list[Piece]:
    return list(Pool(store, LabelFile(path)).pieces())


def soft_rows_of(path: Path) -> list:
    with open_labels(path) as file:
        return list(labelled_parts(file))


@pytest.mark.parametrize("damage", [spoilt, cut])
def test_damage_is_noticed_and_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    many = made_store(tmp_path / "s", [0] * 200, draw.integers(0, 3, 200).tolist())
    path, _ = labelled(tmp_path / "l", Labeling(soft=Soft()), many, Reader(0))
    Chosen.write(tmp_path / "chosen.parquet", many, np.arange(200), many.labels, draw.dirichlet([1, 1, 1], 200))
    damage(path)
    with pytest.raises(EnvironmentFault, match=r"labels\.parquet: expected .*got a damaged file .* label again"):
        pieces_of(many, path)
    with pytest.raises(EnvironmentFault, match=r"labels\.parquet: expected .*got a damaged file"):
        soft_rows_of(path)
    damage(tmp_path / "chosen.parquet")
    for column in tmp_path.glob("*.npy"):
        column.unlink()
    with pytest.raises(EnvironmentFault, match=r"chosen\.parquet: expected .*got a damaged file .*copy it again"):
        Chosen.open(tmp_path / "chosen.parquet")


def test_files_of_earlier_versions_are_read(store: SyntheticStore, tmp_path: Path) -> None:
    """Pages without a checksum."""
    path, _ = labelled(tmp_path / "l", Labeling(), store, Reader(0))
    Chosen.write(tmp_path / "chosen.parquet", store, np.arange(3), np.arange(3))
    for each in (path, tmp_path / "chosen.parquet"):
        pq.write_table(pq.read_table(each), each, write_page_checksum=False)
    assert sum(len(piece.labels) for piece in pieces_of(store, path)) == 8
    assert Chosen.open(tmp_path / "chosen.parquet").labels.tolist() == [0, 1, 2]


def test_what_is_no_selection_is_the_caller_s_mistake(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no Parquet")
    pq.write_table(pa.table({"position": [1]}), tmp_path / "other.parquet")
    for name in ("text", "other", "nowhere"):
        with pytest.raises(UserError, match=rf"{name}\.parquet: expected a selection from a store"):
            Chosen.open(tmp_path / f"{name}.parquet")


def test_a_part_that_was_damaged_is_labelled_again(store: SyntheticStore, tmp_path: Path) -> None:
    straight, _ = labelled(tmp_path / "straight", Labeling(), store, Reader(0))
    part = tmp_path / "l" / "parts" / f"{0:012d}.parquet"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"PAR1 and no more")
    assert labelled(tmp_path / "l", Labeling(), store, Reader(0))[0].read_bytes() == straight.read_bytes()


# ---- soft labels on their way ----------------------------------------------------------------------------------------


def test_soft_labels_of_any_rows_are_those_of_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, over row groups and reads that do not end together."""
    monkeypatch.setattr(labelling, "PART", 6)
    monkeypatch.setattr(labelling, "_READ", 4)
    draw = np.random.default_rng(0)
    opinions = draw.integers(0, 3, (2, 20)).tolist()
    source = made_store(tmp_path / "s", [0] * 20, *opinions)
    spec = Labeling(by=ByTeacher(), soft=Soft(temperature=2.0), batch_size=3)
    path, told = labelled(tmp_path / "l", spec, source, Reader(0), Reader(1))
    assert told["soft"] == {"temperature": 2.0}
    expected = (torch.tensor(as_numpy(pq.read_table(path)["logits"])) / 2).softmax(1).numpy()
    with pq.ParquetFile(path) as file:
        assert file.num_row_groups > 2
        for positions in (np.arange(20), np.array([17, 3, 3, 11]), np.array([19]), np.empty(0, np.int64)):
            ((places, labels, soft),) = softened(file, iter([(positions, positions)]))
            assert soft.dtype == np.float16
            assert places is labels is positions
            np.testing.assert_allclose(soft, expected[positions], atol=5e-4)


def test_hard_labels_pass_as_they_come(store: SyntheticStore, tmp_path: Path) -> None:
    path, _ = labelled(tmp_path / "l", Labeling(), store, Reader(0))
    parts = [(np.arange(3), np.arange(3))]
    with pq.ParquetFile(path) as file:
        assert list(softened(file, iter(parts))) == parts


ROWS = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5], [0.1, 0.1, 0.8]])


def soft_chosen(folder: Path, store: SyntheticStore, rows: np.ndarray = ROWS) -> Chosen:
    labels = rows.argmax(1)
    Chosen.write(folder / "chosen.parquet", store, np.array([1, 3, 4, 7]), labels, rows)
    return Chosen.open(folder / "chosen.parquet")


def test_a_selection_carries_soft_labels(store: SyntheticStore, tmp_path: Path) -> None:
    found = soft_chosen(tmp_path, store)
    assert isinstance(found.soft, np.memmap)
    assert found.soft.dtype == np.float16
    rows = found.soft_rows(np.array([2, 0]))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, ROWS[[2, 0]], atol=5e-4)
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)
    assert found.read(np.array([2, 0]))[1].tolist() == [2, 0]
    hard = Chosen(found.store, found.positions, found.compact_labels)
    other = Chosen(found.store, found.positions, found.compact_labels, found.soft[::-1])
    assert len({found.digest, hard.digest, other.digest}) == 3
    Chosen.write_parts(tmp_path / "again.parquet", store, found.parts())
    assert Chosen.open(tmp_path / "again.parquet").digest == found.digest
    part = found.some(np.array([3, 1]))
    assert part.positions.tolist() == [7, 3]
    np.testing.assert_array_equal(part.soft, found.soft[[3, 1]])
    with pytest.raises(UserError, match="expected one with soft labels"):
        hard.soft_rows(np.array([0]))


def test_without_its_columns_the_parquet_is_read_and_old_columns_go(store: SyntheticStore, tmp_path: Path) -> None:
    found = soft_chosen(tmp_path, store)
    for path in tmp_path.glob("*.npy"):
        path.unlink()
    read = Chosen.open(tmp_path / "chosen.parquet")
    assert not isinstance(read.soft, np.memmap)
    assert read.digest == found.digest
    soft_chosen(tmp_path, store)
    Chosen.write(tmp_path / "chosen.parquet", store, np.array([1, 3]), np.array([0, 1]))
    assert Chosen.open(tmp_path / "chosen.parquet").soft is None
    assert not list(tmp_path.glob(f"*.{SOFT}.npy"))


@pytest.mark.parametrize("bad", [np.nan, -0.1, 2.0])
def test_rows_that_are_no_probabilities_are_refused(bad: float, store: SyntheticStore, tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[1, 0] = bad
    with pytest.raises(UserError, match="soft labels: expected a row of probabilities"):
        soft_chosen(tmp_path, store, rows)
    assert not (tmp_path / "chosen.parquet").exists()


# ---- training on them ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return Digits(train_images=100, validation_images=50).load()


@pytest.fixture(scope="module")
def digits(real: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[SyntheticStore, np.ndarray]:
    """Training images as a store of 64, and soft labels for them."""
    folder = tmp_path_factory.mktemp("digits")
    writer = StoreWriter(root=folder / "store", blocks=1, blocks_per_shard=1)
    pixels = (real.train.images[:64] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    writer.put(0, pixels, real.train.labels[:64].numpy())
    writer.finish({})
    rows = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).softmax(1).numpy()
    return SyntheticStore.open(folder / "store"), rows


def softly(folder: Path, digits: tuple[SyntheticStore, np.ndarray], rows: np.ndarray | None = None) -> Chosen:
    store, own = digits
    soft = own if rows is None else rows
    Chosen.write(folder / "chosen.parquet", store, np.arange(64), store.labels, soft)
    return Chosen.open(folder / "chosen.parquet")


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"synthetic_order": "blocks"}])
def test_a_batch_has_one_hot_rows_for_real_images_and_soft_ones_for_synthetic(
    options: dict, real: ImageSet, digits, tmp_path: Path
) -> None:
    source = softly(tmp_path, digits)
    soft, hard = (Mixture(real.train, s, 0.5, 16, 3, **options) for s in (source, digits[0]))
    for step in (0, 9):
        images, rows, synthetic = soft.batch(step)
        plain, labels, _ = hard.batch(step)
        assert torch.equal(images, plain)
        assert rows.dtype == torch.float32
        assert torch.equal(rows[:8], torch.nn.functional.one_hot(labels[:8], 10).float())
        expected = digits[1][soft.places(step).synthetic.numpy()]
        np.testing.assert_allclose(rows[synthetic], expected, atol=1e-3)
    assert Mixture(real.train, source, 0.0, 16, 3).batch(0)[1].dtype == torch.int64


TINY = ClassifierTraining(
    network=ResNetSpec(width=4),
    loss=TRADES(threat=ThreatModel(epsilon=0.1), steps=1),
    optimisation=Optimisation(steps=6, batch_size=16, learning_rate=1e-2),
    fraction=0.5,
    augment=PadCrop(padding=0, flip=False),
    validations=2,
    validation_steps=1,
    threat=ThreatModel(epsilon=0.1),
)


def test_a_sample_of_a_selection_keeps_its_soft_labels_and_no_store_loses_them(
    store: SyntheticStore, tmp_path: Path
) -> None:
    found = soft_chosen(tmp_path / "soft", store)
    words = ["sample", str(tmp_path / "soft"), "--images", "2", "--out"]
    assert cli.main(["store", *words, str(tmp_path / "part")]) == 0
    part = Chosen.open(tmp_path / "part" / "chosen.parquet")
    of_its_image = {int(p): row for p, row in zip(found.positions, found.soft, strict=True)}
    np.testing.assert_array_equal(part.soft, np.stack([of_its_image[int(p)] for p in part.positions]))
    assert cli.main(["store", *words, str(tmp_path / "copy"), "--copy"]) == 2
    assert not (tmp_path / "copy").exists()


def test_a_recipe_with_soft_labels_and_a_loss_without_is_refused_at_once() -> None:
    student = ClassifierTraining(loss=MART())
    with pytest.raises(UserError, match=r"labeling\.soft: expected a student's loss that takes soft labels"):
        Recipe(labeling=Labeling(soft=Soft()), student=student)


def test_smoothing_and_cutmix_take_soft_labels(real: ImageSet, digits, tmp_path: Path) -> None:
    """A share of .2 goes to all classes; mixed rows lie between those of the two images."""
    source = softly(tmp_path, digits)
    smoothed = batches_of(replace(TINY, smooth_synthetic=0.2), real, source, 5)
    rows = smoothed.mixture.batch(1)[1]
    torch.testing.assert_close(smoothed(1).labels[8:], 0.8 * rows[8:] + 0.02)
    assert torch.equal(smoothed(1).labels[:8], rows[:8])
    mixed = batches_of(replace(TINY, mix=CutMix(probability=1.0)), real, source, 5)(1).labels
    torch.testing.assert_close(mixed.sum(1), torch.ones(16))
    assert not torch.equal(mixed, rows)


def weights(folder: Path, spec: ClassifierTraining, real: ImageSet, source) -> bytes:
    made = Store(folder).once(train_classifier, spec, real, source, seed=3)
    return made.file("classifier.safetensors").read_bytes()


def tensors(folder: Path, spec: ClassifierTraining, real: ImageSet, source) -> Tensor:
    made = Store(folder).once(train_classifier, spec, real, source, seed=3)
    return load_tensors(made.file("classifier.safetensors"))[0]["head.weight"]


@pytest.mark.parametrize("loss", [TRADES, PGDAdversarial, Plain])
def test_soft_labels_reach_the_loss(loss, real: ImageSet, digits, tmp_path: Path) -> None:
    """Rows with a one train as classes do; the teacher's rows do not."""
    spec = replace(TINY, loss=Plain() if loss is Plain else loss(threat=ThreatModel(epsilon=0.1), steps=1))
    (tmp_path / "one").mkdir()
    (tmp_path / "soft").mkdir()
    one_hot = softly(tmp_path / "one", digits, np.eye(10)[digits[0].labels])
    hard = tensors(tmp_path / "runs", spec, real, digits[0])
    torch.testing.assert_close(tensors(tmp_path / "runs", spec, real, one_hot), hard, atol=1e-5, rtol=0)
    other = tensors(tmp_path / "runs", spec, real, softly(tmp_path / "soft", digits))
    assert (other - hard).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"synthetic_order": "blocks", "mix": CutMix()}, {"balanced": True}])
def test_training_on_soft_labels_goes_on_to_the_same_bits(
    options: dict, real: ImageSet, digits, tmp_path: Path
) -> None:
    """Stopped at every third report, its work since the last saved state lost each time."""
    spec, source = replace(TINY, **options), softly(tmp_path, digits)
    straight = weights(tmp_path / "straight", spec, real, source)
    folder, stops = tmp_path / "parts", 0
    folder.mkdir()
    while stops < 20:
        count = itertools.count(1)

        def stop(done: int, total: int, count=count) -> None:
            if next(count) == 3:
                raise KeyboardInterrupt

        try:
            work = Workspace(folder, stop, checkpoint_seconds=-1.0, heritage=heritage_of((real, source)))
            train_classifier.work(work, spec, real, source, seed=3)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 2
    assert (folder / "classifier.safetensors").read_bytes() == straight


def test_mart_and_rows_of_another_width_are_refused(real: ImageSet, digits, tmp_path: Path) -> None:
    source = softly(tmp_path, digits)
    mart = replace(TINY, loss=MART(threat=ThreatModel(epsilon=0.1), steps=1))
    with pytest.raises(UserError, match=r"takes soft labels .*got MART"):
        weights(tmp_path / "a", mart, real, source)
    weights(tmp_path / "b", replace(mart, optimisation=replace(TINY.optimisation, steps=1)), real, digits[0])
    wide = softly(tmp_path, digits, np.full((64, 12), 1 / 12))
    with pytest.raises(UserError, match=r"probabilities of the 10 classes of .*, got rows of 12"):
        check_synthetic(wide, real)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*words: object) -> int:
    return cli.main(["label", *map(str, words)])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a store of 30 images in 3 classes and a classifier of them."""
    monkeypatch.chdir(tmp_path)
    made_store(tmp_path / "store", [0, 1, 2] * 10, [0] * 30)
    saved(tmp_path / "one")
    return tmp_path


def test_the_command_labels_and_delivers(place: Path, graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("store", "--teacher", "one", "--teacher", str(graph), "--soft", "--temperature", "2", "--out", "out")
    assert command(*words) == 0
    printed = capsys.readouterr().out
    assert "30 images, 30 labelled, 0 left out" in printed
    assert all(f"{name:3}" in printed for name in NAMES)
    chosen = Chosen.open(place / "out/chosen.parquet")
    assert chosen.labels.tolist() == [0, 1, 2] * 10
    logits = torch.tensor(as_numpy(pq.read_table("out/labels.parquet")["logits"]))
    np.testing.assert_allclose(chosen.soft_rows(np.arange(30)), (logits / 2).softmax(1), atol=1e-3)
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("labels.parquet")}
    assert command(*words) == 0  # found, and delivered to the same place
    assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("labels.parquet")} == before
    assert command(*words[:3], "--out", "out") == 2  # another result's folder
    assert "another result's" in capsys.readouterr().err


def test_a_store_that_moved_is_labelled_again_at_its_new_place(place: Path) -> None:
    assert command("store", "--teacher", "one", "--out", "out") == 0
    Path("store").rename("moved")
    assert command("moved", "--teacher", "one", "--out", "out") == 0
    assert Chosen.open(Path("out/chosen.parquet")).store.root.resolve() == (place / "moved").resolve()


def test_a_selection_is_labelled_and_points_to_its_store(place: Path) -> None:
    own = SyntheticStore.open("store")
    Chosen.write(Path("some.parquet"), own, np.array([4, 7, 20]), np.array([1, 1, 2]))
    assert command("some.parquet", "--teacher", "one", "--by", "teacher", "--out", "out") == 0
    found = Chosen.open(Path("out/chosen.parquet"))
    assert found.positions.tolist() == [4, 7, 20]
    assert column(Path("out/labels.parquet"), "condition") == [1, 1, 2]


MISTAKES = {
    "no teacher": (("store", "--out", "o"), "--teacher: expected a classifier"),
    "no store": (("--teacher", "one", "--out", "o"), "expected one store"),
    "no place": (("store", "--teacher", "one"), "--out: expected where"),
    "unknown option": (("store", "--teacher", "one", "--out", "o", "--hard"), "options that gambeson label --help"),
    "unknown word": (("store", "--teacher", "one", "--out", "o", "--by", "me"), "condition or teacher"),
    "maybe": (("store", "--teacher", "one", "--out", "o", "--disagreeing", "maybe"), "expected keep or drop"),
    "temperature alone": (("store", "--teacher", "one", "--out", "o", "--temperature", "2"), "--soft beside it"),
    "no temperature": (("store", "--teacher", "one", "--out", "o", "--soft", "--temperature", "x"), "a number above 0"),
    "no classifier": (("store", "--teacher", "nowhere", "--out", "o"), "which is nothing here"),
    "no images": (("one", "--teacher", "one", "--out", "o"), "expected a synthetic store"),
    "taken": (("store", "--teacher", "one", "--out", "store"), "--out: expected a new folder"),
    "another set": (("store", "--teacher", "one", "--out", "o", "--data", "digits"), "expected 8 x 8 pixels"),
    "all dropped": (("few", "--teacher", "one", "--out", "o", "--disagreeing", "drop"), "another class than the cond"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_with_exit_code_2(mistake: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if mistake == "all dropped":
        folder = place / "probe"
        found = labelled(folder, Labeling(by=ByTeacher()), SyntheticStore.open("store"), subject_of("one", (1, 4, 4)))[
            0
        ]
        said = column(found, "label")[0]
        made_store(place / "few", [(said + 1) % 3], [0])
    words, told = MISTAKES[mistake]
    assert command(*words) == 2
    assert told in capsys.readouterr().err
    assert not Path("o").exists()


def test_programs_ask_for_trust(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Sums(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :3]

    torch.jit.trace(Sums().eval(), torch.rand(2, 1, SIDE, SIDE)).save("net.pt")
    assert command("store", "--teacher", "net.pt", "--out", "o") == 2
    assert "--trust" in capsys.readouterr().err
    assert command("store", "--teacher", "net.pt", "--trust", "--out", "o", "--by", "teacher") == 0


def test_help_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    assert capsys.readouterr().out.strip() == USAGE
    assert max(map(len, USAGE.splitlines())) <= 120
    whole = {"count": 1, "of": 1, "estimate": 1.0, "low": 0.2, "high": 1.0}
    assert percent(whole) == "100.0 %  (20.0 to 100.0)"
    rows = [{"class": f"c{k}", "generated": 1, "labelled": 1, "agreement": whole} for k in range(150)]
    rows[140]["agreement"] = {**whole, "estimate": 0.25}
    told = {"images": 150, "labelled": 150, "dropped": 0, "teachers": [1], "agreement": whole, "classes": rows}
    lines = table(told)
    assert lines[3].startswith("c140")
    assert lines[-1] == "and 50 classes where they agree more often"
