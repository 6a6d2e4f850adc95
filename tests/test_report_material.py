"""What a run's page needs beyond rows: exhibits in worlds counted by hand, kept material, moved and unfinished runs."""

import json
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_recipe
from torch import Tensor, nn

from gambeson.cli import main
from gambeson.data.imageset import ImageSet, Split
from gambeson.data.mixture import from_uint8
from gambeson.data.scores import as_arrow
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.disk import checksum, write_json
from gambeson.engine import News
from gambeson.models.network import ClassifierNetwork
from gambeson.recipe import Arm
from gambeson.report import energy, exhibits, keeping, page_pictures, samples, shown
from gambeson.report.exhibits import Student
from gambeson.report.gather import _attacks, gather_folder
from gambeson.report.keeping import Piece
from gambeson.report.material import (
    Adversarial,
    ArmMaterial,
    AutoAttackMaterial,
    CheckRecord,
    Confusion,
    FeatureSet,
    Grids,
    GuidanceEnergy,
    RunMaterial,
    SelectionScores,
    StageRecord,
    TrainingCurve,
)
from gambeson.report.samples import Made
from gambeson.robustness.attacks import PGD, TargetedAPGD
from gambeson.robustness.evaluate import Evaluation
from gambeson.run import Run, execute
from gambeson.sampling.levels import NoiseLevels
from gambeson.sampling.samplers import Heun
from gambeson.store import Artifact
from gambeson.synthesis.generation import Generation
from gambeson.synthesis.scorers import Confidence, LabelMargin
from gambeson.synthesis.select import Selection
from gambeson.threat import ThreatModel

PGD_01 = PGD(threat=ThreatModel(epsilon=0.1), steps=10, restarts=1)
STRANGE = ('<b>"猫"</b>', "כלב & 'co'", "ẞ\u202e{{x}}")


def same(a: Any, b: Any) -> bool:
    """Equal in every field, arrays and tables too."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, pa.Table):
        return a.equals(b)
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b


class Brightest(ClassifierNetwork):
    """The class is the brightest of the first K pixels: logits are ten times these pixels."""

    spec = None

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.channels, self.classes = 1, classes
        self.logits = nn.Linear(classes, classes, bias=False)
        self.logits.weight.data = 10 * torch.eye(classes)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.classes]


def bright(true: int, best: int, second: int, lead: float) -> tuple[int, Tensor]:
    """A 2 x 2 image labelled `true` whose pixel `best` leads over `second` by so much, over the others by 0.5."""
    pixels = torch.full((4,), 0.2)
    pixels[best], pixels[second] = 0.7, 0.7 - lead
    return true, pixels.reshape(1, 2, 2)


def world() -> tuple[Split, Student, list[list[int]], list[list[int]]]:
    """Images of a linear classifier under linf eps 0.1, which takes 0.2 of a lead; counts clean and attacked by hand.

    Class 0: 5 stand, 3 fall to class 1. Class 1: 4 stand, 2 fall to class 2. Class 2: 1 stands, 3 are wrong already.
    """
    told = [bright(0, 0, 1, 0.5)] * 5 + [bright(0, 0, 1, 0.1)] * 3 + [bright(1, 1, 0, 0.5)] * 4
    told += [bright(1, 1, 2, 0.15)] * 2 + [bright(2, 2, 0, 0.3)] + [bright(2, 0, 1, 0.3)] * 3
    order = np.random.default_rng(0).permutation(len(told))
    labels = torch.tensor([told[i][0] for i in order])
    images = torch.stack([told[i][1] for i in order])
    model = Brightest()
    prediction, flat = model(images).argmax(1), images.flatten(1)[:, :3]
    top = flat.topk(2).values
    stood = (prediction == labels) & (top[:, 0] - top[:, 1] > 0.2)
    rows = pa.table({"index": np.arange(18), "label": labels.numpy(), "prediction": prediction.numpy(),
                     "pgd": stood.numpy()})  # fmt: skip
    clean, attacked = [[8, 0, 0], [0, 6, 0], [3, 0, 1]], [[5, 3, 0], [0, 4, 2], [3, 0, 1]]
    return Split(images, labels), Student(seed=0, model=model, rows=rows), clean, attacked


def test_confusion_of_a_linear_classifier_is_what_one_counts_by_hand() -> None:
    test, student, clean, attacked = world()
    found = exhibits.confusion("real", PGD_01, [student], test, 3)
    assert found.clean.tolist() == clean
    assert found.attacked.tolist() == attacked
    assert (found.images, found.seeds, found.attack) == (18, (0,), "PGD, 10 steps, 1 restart, margin loss")
    twice = exhibits.confusion("real", PGD_01, [student, replace(student, seed=7)], test, 3)
    assert twice.attacked.tolist() == (2 * np.array(attacked)).tolist()
    assert (twice.images, twice.seeds) == (18, (0, 7))


def test_confusion_of_many_images_is_that_of_some_with_the_first_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    test, student, _, _ = world()
    monkeypatch.setattr(exhibits, "MOST", 9)
    monkeypatch.setattr(exhibits, "FEWEST", 5)
    found = exhibits.confusion("real", PGD_01, [student, replace(student, seed=7)], test, 3)
    assert (found.images, found.seeds, int(found.attacked.sum())) == (9, (0,), 9)
    monkeypatch.setattr(exhibits, "BUDGET", 1.0)
    with pytest.raises(ValueError, match="attacking 5 test images again would take too long"):
        exhibits.confusion("real", PGD_01, [student], test, 3)


def test_adversarial_examples_are_the_first_of_each_kind_and_inside_the_ball() -> None:
    test, student, _, _ = world()
    found = exhibits.adversarial("real", PGD_01, student, test)
    stood, fell = student.kinds
    assert found.indices.tolist() == sorted([*stood[:4], *fell[:4]])
    assert (int(found.withstood.sum()), len(found.labels)) == (4, 8)
    assert np.array_equal(found.withstood, np.isin(found.indices, stood))
    assert (found.predictions == found.labels).all()
    apart = np.abs(found.images.astype(int) - found.attacked.astype(int)).max((1, 2, 3))
    assert (apart <= 26).all()  # 0.1 of 255, rounded
    assert (apart[~found.withstood] > 0).all()
    again = exhibits.adversarial("real", PGD_01, student, test)
    assert same(found, again)


def test_large_adversarial_examples_lose_rows_but_no_pixel_is_averaged() -> None:
    test, student, _, _ = world()
    large = Split(torch.nn.functional.pad(test.images, (0, 148, 0, 98), value=0.5), test.labels)

    class Corner(Brightest):
        def features(self, images: Tensor) -> Tensor:
            return images[:, :, :2, :2].flatten(1)[:, :3]

    found = exhibits.adversarial("real", PGD_01, replace(student, model=Corner()), large)
    assert found.images.shape == (8, 33, 50, 1)
    assert found.shrunk == "Of the 150 x 100 pixels only every 3rd row and column is shown, none averaged"
    assert set(np.unique(found.images)) <= set(np.round(255 * large.images.unique().numpy()).astype(int))


def test_rows_of_other_test_images_are_refused() -> None:
    test, student, _, _ = world()
    shuffled = student.rows.take(np.random.default_rng(1).permutation(18))
    assert exhibits.checked(shuffled, test)["index"].to_pylist() == list(range(18))
    for bad in (student.rows.slice(1), student.rows.set_column(1, "label", pa.array(np.zeros(18, np.int64)))):
        with pytest.raises(ValueError, match="one for each of 18 test images, with their labels"):
            exhibits.checked(bad, test)


def test_wide_features_keep_their_distances_in_the_components_that_matter() -> None:
    low = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    wide = low @ np.linalg.qr(np.random.default_rng(1).normal(size=(200, 5)))[0].T.astype(np.float32)
    sets = [FeatureSet(name=n, features=wide[p], labels=np.zeros(20, int), space="s")
            for n, p in (("a", slice(20)), ("b", slice(20, 40)))]  # fmt: skip
    found = exhibits.narrowed(sets)
    assert [each.features.shape for each in found] == [(20, 40), (20, 40)]  # no more than there are images
    assert found[0].space == found[1].space == "s, its first 40 principal components"
    both = np.concatenate([each.features for each in found])
    assert np.linalg.norm(both[3] - both[33]) == pytest.approx(np.linalg.norm(low[3] - low[33]), rel=1e-4)
    assert exhibits.narrowed([replace(sets[0], features=low[:20])])[0].features.shape == (20, 5)


class Pull:
    """A guidance that shifts every pixel of image i by 0.1 (i + 1) above sigma 1, and by nothing below."""

    def init(self, block: int, generator: torch.Generator | None = None) -> None:
        return None

    def __call__(self, state: None, step: Any) -> tuple[Tensor | None, None]:
        by = 0.1 * (torch.arange(len(step.x)) + 1.0)
        return (by[:, None, None, None].expand(step.x.shape) if step.sigma > 1 else None), state


def test_guidance_energy_is_the_shift_that_guidance_made() -> None:
    spec = Generation(count=4, block=4, levels=NoiseLevels(steps=6), sampler=Heun(), guidance=None)
    found = energy.walked(spec, lambda x, sigma, labels=None: 0 * x, Pull(), (1, 2, 2), 0, seed=3)
    high = found.sigma > 1
    assert 0 < high.sum() < len(found.sigma) == 6
    assert found.shift == pytest.approx(np.where(high, 0.25, 0.0), abs=1e-6)  # mean of 0.1, 0.2, 0.3, 0.4
    assert found.low[0] == pytest.approx(0.115)
    assert found.high[0] == pytest.approx(0.385)
    assert (found.low[~high] == 0).all()
    low = energy.walked(replace(spec, sampler=Heun(clip=0.2)), lambda x, sigma, labels=None: 0 * x - 0.3, Pull(),
                        (1, 2, 2), 0, seed=3)  # fmt: skip
    # -0.3 is clamped to -0.2; guided it is at -0.2, -0.1, 0 and 0.1
    assert low.shift[0] == pytest.approx((0 + 0.1 + 0.2 + 0.3) / 4, abs=1e-6)


def test_nearest_train_images_are_found_across_parts_and_a_copy_is_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), np.uint8)
    train = from_uint8(pixels)
    queries = torch.cat([train[[5]], from_uint8(np.clip(pixels[[2]].astype(int) + 3, 0, 255).astype(np.uint8))])
    by_hand = [(train - query).flatten(1).double().norm(dim=1) for query in queries]
    for together in (2, 4096):
        monkeypatch.setattr(samples, "_TOGETHER", together)
        places, apart = samples.nearest(queries, train)
        assert places.tolist() == [5, 2]
        assert apart[0] == 0
        assert apart.tolist() == pytest.approx([float(found.min()) for found in by_hand], abs=1e-6)
    large = torch.rand(3, 3, 90, 70, generator=torch.Generator().manual_seed(0))
    large = (large * 255).round() / 255
    places, apart = samples.nearest(large[[1]], large)
    assert (places[0], apart[0]) == (1, 0)
    assert samples._compared(large).shape == (3, 3 * 32 * 25)


def artifact(folder: Path, stage: str) -> Artifact:
    """A finished stage of the files that are there."""
    files = {p.name: checksum(p) for p in folder.iterdir() if p.is_file()}
    write_json(folder / "done.json", {"files": files})
    return Artifact(stage, "d" * 64, folder)


def made(
    root: Path,
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    kept: np.ndarray,
    asked: np.ndarray | None = None,
) -> Made:
    """Synthetic images with labels and a selection, as the stages leave them; asked: classes, where labels differ."""
    asked = labels if asked is None else asked
    writer = StoreWriter(root=root / "a/images", blocks=2, blocks_per_shard=1, origin={})
    for block, places in enumerate(np.array_split(np.arange(len(images)), 2)):
        writer.put(block, images[places], asked[places])
    writer.finish({})
    (root / "b").mkdir()
    columns = {"label": labels, "condition": asked, "logits": as_arrow(logits.astype(np.float32))}
    pq.write_table(pa.table(columns), root / "b/labels.parquet")
    store = SyntheticStore.open(root / "a/images")
    (root / "c").mkdir()
    Chosen.write_parts(root / "c/chosen.parquet", store, iter([(kept, labels[kept])]))
    write_json(root / "c/selection.json", {"scores": None})
    return Made(artifact(root / "a", "generate"), artifact(root / "b", "label"), artifact(root / "c", "select"))


def image_set(train: Tensor, labels: Tensor, names: tuple[str, ...]) -> ImageSet:
    part = Split(train, labels)
    return ImageSet(name="w", train=part, validation=part, test=part, class_names=names, flip_safe=False)


def test_grids_and_histograms_tell_scores_and_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (13, 4, 4, 1), np.uint8), np.arange(13) % 3
    labels[4] = -1  # left out by the labelling
    logits = np.zeros((13, 3))
    logits[np.arange(13), np.maximum(labels, 0)] = np.arange(13)  # the margin of image i is i
    kept = np.array([8, 9, 10, 11, 12])
    plain = made(tmp_path, images, labels, logits, kept, np.arange(13) % 3)
    train = from_uint8(np.concatenate([rng.integers(0, 256, (5, 4, 4, 1), np.uint8), images[[6]]]))
    real = image_set(train, torch.zeros(6, dtype=torch.int64), STRANGE)
    spec = Selection(score=LabelMargin(), keep=0.4)
    found = samples.grids(plain, None, spec, real)
    assert found.plain is not None
    assert found.plain_nearest is not None
    assert found.plain_scores is not None
    assert found.plain_distance is not None
    assert found.plain.shape == (3, 4, 4, 4, 1)
    # of class 1 images 1, 4, 7, 10, for which they were generated: 4 has no score
    assert np.array_equal(found.plain_scores, [[0, 3, 6, 9], [1, np.nan, 7, 10], [2, 5, 8, 11]], equal_nan=True)
    assert np.array_equal(found.plain[1, 1], images[4])
    assert found.plain_distance[0, 2] == 0
    assert np.array_equal(found.plain_nearest[0, 2], images[6])
    assert (found.plain_distance > 0).sum() == 11
    assert (found.score_name, found.space, found.guided) == ("LabelMargin", "L2 distance of pixels in [0, 1]", None)
    bins = samples.selection_scores("plain", 0, plain, spec)
    assert (int(bins.kept.sum()), int(bins.left.sum())) == (5, 7)
    middles = (bins.edges[:-1] + bins.edges[1:]) / 2
    assert middles[bins.kept > 0].min() > 7.5 > middles[bins.left > 0].max()  # images 0 to 7 were left


def test_many_classes_and_large_images_are_bounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (2000, 56, 56, 3), np.uint8), np.arange(2000) % 1000
    plain = made(tmp_path, images, labels, rng.normal(size=(2000, 1000)), np.arange(1000))
    names = tuple(f"class {k}" for k in range(1000))
    real = image_set(from_uint8(images[:30]), torch.zeros(30, dtype=torch.int64), names)
    found = samples.grids(plain, None, Selection(), real)
    assert found.plain is not None
    assert found.plain.shape == (20, 2, 48, 48, 3)
    assert found.shrunk == "Shrunk from 56 x 56 pixels"
    assert samples._each((224, 224, 3), 20, 2) == 3
    assert samples._each((8, 8, 1), 10, 2) == samples.PER_CLASS
    assert samples._each((10_000, 3, 3), 20, 2) >= 1


def test_a_class_without_images_has_no_row(tmp_path: Path) -> None:
    images, labels = np.zeros((6, 4, 4, 1), np.uint8), np.array([0, 2, 0, 2, 0, 2])
    plain = made(tmp_path / "some", images, labels, np.zeros((6, 3)), np.arange(6))
    real = image_set(from_uint8(images), torch.zeros(6, dtype=torch.int64), STRANGE)
    found = samples.grids(plain, None, Selection(score=Confidence()), real)
    assert found.plain is not None
    assert (found.classes, found.plain.shape[:2], found.sorted_by) == ((0, 2), (2, 3), "")
    rows = page_pictures.grid(found, STRANGE)
    assert [row.class_name for row in rows] == [STRANGE[0], STRANGE[2]]
    assert "no row" in page_pictures.grid_note(found)
    assert "no row" not in page_pictures.grid_note(replace(found, classes=(0, 1)))


def test_images_without_a_class_are_sorted_by_a_label_and_the_page_says_whose(tmp_path: Path) -> None:
    images, labels = np.zeros((6, 4, 4, 1), np.uint8), np.array([1, 1, 1, 0, 0, 1])
    plain = made(tmp_path, images, labels, np.eye(3)[labels], np.arange(6), asked=np.full(6, -1))
    real = image_set(from_uint8(images), torch.zeros(6, dtype=torch.int64), STRANGE)
    found = samples.grids(plain, None, Selection(score=Confidence()), real)
    assert (found.classes, found.sorted_by) == ((0, 1), "plain")
    assert "without a class: a row has those that the plain arm labels so" in page_pictures.grid_note(found)


def test_equal_scores_have_a_histogram_too(tmp_path: Path) -> None:
    images, labels = np.zeros((6, 4, 4, 1), np.uint8), np.array([0, 1, 0, 1, 0, 1])
    plain = made(tmp_path, images, labels, np.zeros((6, 2)), np.array([0, 1]))
    found = samples.selection_scores("plain", 0, plain, Selection(score=Confidence()))
    assert (int(found.kept.sum()), int(found.left.sum())) == (2, 4)
    assert (np.diff(found.edges) > 0).all()


def strange_material() -> RunMaterial:
    """Every part filled, with names that break what is not careful."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 4, 3), np.uint8)
    rows = pa.table({
        "seed": [0, 0], "index": [0, 1], "label": [0, 1], "prediction": [0, 2], "margin": [0.5, -0.25],
        "pgd": [True, False], "apgd_ce": [True, False], "apgd_t": [True, False], "apgd": [True, False],
        "robust@0.1": pa.array([None, False], pa.bool_()),
    })  # fmt: skip
    curve = TrainingCurve(seed=0, steps=[1, 2], loss=[0.5, 0.25], validation_steps=[2], validation_clean=[1.0],
                          validation_robust=[0.1])  # fmt: skip
    numbers, grid = np.arange(2), images.reshape(2, 1, 4, 4, 3)
    return RunMaterial(
        name='n<"', title="t", recipe_text="a: ß", digest="d", threat="linf", epsilon=0.1, class_names=STRANGE,
        counts={"train": 3, "validation": 2, "test": 2}, command="c", created="now", moved="moved",
        arms=(ArmMaterial(key="real", title="real only", rows=rows, curves=(curve,)),),
        grids=Grids(plain=grid, plain_scores=np.array([[0.5], [np.nan]]), plain_nearest=grid,
                    plain_distance=np.zeros((2, 1)), score_name="Confidence", space="pixels"),
        features=(FeatureSet(name="real", features=rng.normal(size=(2, 3)), labels=numbers, space="s"),),
        student_features=(FeatureSet(name="real only", features=np.ones((2, 3), np.float32), labels=numbers,
                                     space="s"),),
        stages=(StageRecord(stage="student", arm="real", seed=0, seconds=1.5, peak_mb=2.0, joules=3.5),),
        checks=(CheckRecord(arm="real", seed=0, name="x", passed=True, detail=""),),
        autoattack=(AutoAttackMaterial(arm="real only", seed=0, rows=rows, facts={"a": [1, None, {"b": 0.1}]}),),
        adversarial=(Adversarial(arm="real", seed=0, attack="PGD", images=images, attacked=images, labels=numbers,
                                 predictions=numbers, attacked_predictions=numbers, indices=numbers),),
        confusions=(Confusion(arm="real", seeds=(0, 1), attack="PGD", clean=np.eye(3, dtype=np.int64),
                              attacked=np.eye(3, dtype=np.int64)[:, [1, 0, 2]]),),
        energy=GuidanceEnergy(sigma=np.ones(2), shift=np.ones(2), low=np.zeros(2), high=np.ones(2), images=4, how="h"),
        selections=(SelectionScores(arm="plain", seed=0, score="Confidence", edges=np.arange(3.0),
                                    kept=np.array([1, 2]), left=np.array([0, 5])),),
        missing={"run": "why"}, synthetic={"real": 0}, licences={"denoiser": "licence: mit"}, versions={"torch": "2"},
    )  # fmt: skip


def test_kept_material_comes_back_equal(tmp_path: Path) -> None:
    material = strange_material()
    pieces = {"energy": Piece(made_of={"real": "x"}, value=material.energy), "told": Piece(
        made_of={}, value={"array": 1, "table": {"map": (1, [2])}, "rows": material.arms[0].rows})}  # fmt: skip
    keeping.keep(tmp_path, material, pieces)
    back = keeping.load(tmp_path)
    assert back is not None
    assert same(material, back.material)
    assert same(pieces, back.pieces)
    assert same(material, keeping.kept(tmp_path))
    assert not list(tmp_path.rglob("*.part"))
    before = keeping.path_of(tmp_path).stat().st_mtime_ns
    keeping.keep(tmp_path, material, pieces)
    assert keeping.path_of(tmp_path).stat().st_mtime_ns == before  # the same again is not written
    np.load(keeping.path_of(tmp_path), allow_pickle=False)["a0000"]


def test_kept_material_of_another_state_of_the_run_is_none(tmp_path: Path) -> None:
    material = strange_material()
    (tmp_path / "recipe.yaml").write_text("a")
    keeping.keep(tmp_path, material, {})
    assert keeping.kept(tmp_path) is not None
    (tmp_path / "run.json").write_text("{}")
    assert keeping.kept(tmp_path) is None
    table = material.arms[0].rows
    assert table is not None
    pq.write_table(table.add_column(0, "arm", pa.array(["real", "real"])), tmp_path / "rows.parquet")
    keeping.keep(tmp_path, material, {})
    assert same(material, keeping.kept(tmp_path))  # its rows are those of rows.parquet now


@pytest.mark.parametrize("harm", ["cut", "flipped", "garbage", "empty", "other format", "another class", "no about"])
def test_damaged_kept_material_is_as_good_as_none(harm: str, tmp_path: Path) -> None:
    keeping.keep(tmp_path, strange_material(), {})
    path = keeping.path_of(tmp_path)
    data = bytearray(path.read_bytes())
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(arrays["about"].tobytes())
    if harm == "other format":
        about["format"] = 99
    if harm == "another class":
        about["material"]["class"] = "Path"
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    if harm == "no about":
        del arrays["about"]
    if harm in ("other format", "another class", "no about"):
        np.savez_compressed(path, **arrays)
    else:
        data[len(data) // 2] ^= 255
        path.write_bytes({"cut": data[:-200], "flipped": data, "garbage": b"x" * 500, "empty": b""}[harm])
    assert keeping.load(tmp_path) is None
    assert keeping.kept(tmp_path) is None


@pytest.mark.parametrize("place", range(40))
def test_a_flipped_byte_anywhere_is_no_error(place: int, tmp_path: Path) -> None:
    keeping.keep(tmp_path, strange_material(), {})
    path = keeping.path_of(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) * place // 40] ^= 255
    path.write_bytes(data)
    keeping.load(tmp_path)
    keeping.keep(tmp_path, strange_material(), {})
    found = keeping.load(tmp_path)
    assert found is not None
    assert same(strange_material(), found.material)


def test_what_a_later_version_kept_is_left_to_it(tmp_path: Path) -> None:
    keeping.keep(tmp_path, strange_material(), {})
    path = keeping.path_of(tmp_path)
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(arrays["about"].tobytes()) | {"format": keeping.FORMAT + 1}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(path, **arrays)
    before = path.read_bytes()
    keeping.keep(tmp_path, strange_material(), {})
    assert path.read_bytes() == before


class Quiet:
    def show(self, news: News) -> None:
        pass


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, RunMaterial]:
    """A tiny run of two arms, and its material."""
    recipe = tiny_recipe((Arm.REAL, Arm.GUIDED))
    recipe = replace(recipe, generation=replace(recipe.generation, count=60))
    run = execute(recipe, tmp_path_factory.mktemp("runs"), 1, Quiet(), "test")
    return run, gather_folder(run.folder)


def copied(run: Run, place: Path) -> Path:
    """The run with its stages elsewhere; the folder of the run."""
    shutil.copytree(run.folder.parent, place)
    return place / run.folder.name


def test_a_run_tells_everything(told: tuple[Run, RunMaterial]) -> None:
    found = told[1]
    assert (dict(found.missing), found.moved) == ({}, "")
    assert found.synthetic == {"real": 0, "guided": 60}
    for arm, counts in zip(found.arms, found.confusions, strict=True):
        assert arm.rows is not None
        assert counts.arm == arm.key
        assert counts.images == 197 == len(arm.rows)
        right = np.array(arm.rows["prediction"].to_pylist()) == np.array(arm.rows["label"].to_pylist())
        assert counts.clean.trace() == right.sum()
        assert counts.attacked.trace() == sum(arm.rows["pgd"].to_pylist())  # the attack breaks again what it broke
    for one in found.adversarial:
        rows = next(arm.rows for arm in found.arms if arm.key == one.arm)
        assert rows is not None
        assert one.withstood.tolist() == rows["pgd"].take(one.indices).to_pylist()
    assert [each.name for each in found.student_features] == ["real only", "+ Contrastive-DP"]
    assert found.energy is not None
    assert found.energy.images == 20
    assert found.energy.how == "the first block of 20 images of seed 0, sampled once more"
    assert found.energy.shift.max() > 0
    assert [s.arm for s in found.selections] == ["guided"]
    assert found.selections[0].kept.sum() + found.selections[0].left.sum() == 60
    assert found.grids is not None
    assert found.grids.guided_scores is not None
    assert found.grids.plain is None
    assert np.isfinite(found.grids.guided_scores).all()


def test_kept_pieces_are_used_and_others_made_anew(
    told: tuple[Run, RunMaterial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found = told
    folder, calls = copied(run, tmp_path / "runs"), list[str]()
    original = exhibits.adversarial
    monkeypatch.setattr(exhibits, "adversarial", lambda arm, *rest: calls.append(arm) or original(arm, *rest))
    again = gather_folder(folder)
    assert calls == []
    assert same(found, again)
    assert same(found, keeping.kept(folder))
    student = next(c for c in run.chapters if c.arm is Arm.GUIDED).artifacts["student"]
    done = folder.parent / "stages/train_classifier" / student.digest[:16] / "done.json"
    record = json.loads(done.read_text())
    done.write_text(json.dumps({**record, "files": {**record["files"], "another": "x"}}))  # made again, other bits
    assert same(found.adversarial, gather_folder(folder).adversarial)
    assert calls == ["guided"]
    keeping.path_of(folder).write_bytes(b"damage")
    gather_folder(folder)
    assert calls == ["guided", "real", "guided"]
    monkeypatch.setattr(shown, "REVISION", "another")
    gather_folder(folder, make=False)
    assert len(calls) == 3
    assert "not made yet" in gather_folder(folder, make=False).missing["adversarial"]


def test_a_moved_run_tells_what_it_kept(told: tuple[Run, RunMaterial], tmp_path: Path, capfd: Any) -> None:
    run, found = told
    folder = tmp_path / "moved" / "renamed"
    shutil.copytree(run.folder, folder)
    moved = gather_folder(folder)
    assert (
        moved.moved
        == f"The run's stages are not at {folder.parent / 'stages'}: its folder was moved, or they were removed."
    )
    assert same(replace(moved, moved="", name=found.name), found)
    assert main(["show", str(folder)]) == 0
    assert "its folder was moved" in capfd.readouterr().out
    shutil.rmtree(folder / "material")
    bare = gather_folder(folder)
    assert same([arm.rows for arm in bare.arms], [arm.rows for arm in found.arms])
    assert bare.missing["adversarial"] == "real only, + Contrastive-DP: student no longer there, and not kept"
    assert {"grids", "features", "confusions", "student_features", "energy", "selections"} <= set(bare.missing)
    assert (bare.stages, bare.grids) == ((), None)
    assert main(["report", str(folder)]) == 0


def test_a_moved_run_without_its_rows_loses_nothing_else(told: tuple[Run, RunMaterial], tmp_path: Path) -> None:
    run, found = told
    folder = tmp_path / "moved"
    shutil.copytree(run.folder, folder)
    (folder / "rows.parquet").rename(folder / "elsewhere")
    assert main(["report", str(folder)]) == 0  # keeps what it gathers, too
    (folder / "elsewhere").rename(folder / "rows.parquet")
    assert same(replace(gather_folder(folder), moved="", name=found.name), found)


def test_attacks_are_told_with_the_numbers_that_there_were(told: tuple[Run, RunMaterial]) -> None:
    recipe = replace(told[0].recipe, evaluation=Evaluation(targeted=TargetedAPGD(targets=9), curve_images=500))
    assert "for every other class" in _attacks(recipe, 10, 97)["apgd"]
    assert _attacks(recipe, 10, 97)["curve"].endswith("on 97 test images")
    assert "each of the 9 most likely" in _attacks(recipe, 43, None)["apgd"]
    assert _attacks(recipe, 43, None)["curve"].endswith("on 500 test images")


def test_a_moved_run_whose_images_are_gone_is_told_by_its_rows(
    told: tuple[Run, RunMaterial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found = told
    folder = tmp_path / "moved"
    shutil.copytree(run.folder, folder)

    def gone(self: Any) -> ImageSet:
        raise FileNotFoundError("no such folder")

    monkeypatch.setattr(type(run.recipe.data), "load", gone)
    assert same(replace(gather_folder(folder), moved="", name=found.name), found)
    shutil.rmtree(folder / "material")
    bare = gather_folder(folder)
    assert bare.class_names == tuple(map(str, range(10)))
    assert bare.counts == {"test": 197}
    assert "the real images cannot be read: no such folder" in bare.missing["class_names"]
    assert main(["report", str(folder)]) == 0


def test_images_that_changed_since_are_not_shown_as_those_of_the_run(
    told: tuple[Run, RunMaterial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found = told
    folder, real = copied(run, tmp_path / "runs"), run.recipe.data.load()
    other = replace(real, test=Split(1 - real.test.images, real.test.labels))
    monkeypatch.setattr(type(run.recipe.data), "load", lambda self: other)
    assert same(found.adversarial, gather_folder(folder).adversarial)  # as they were kept
    shutil.rmtree(folder / "material")
    bare = gather_folder(folder)
    assert bare.adversarial == ()
    assert "others now than those that the run was made with" in bare.missing["adversarial"]


def test_an_unfinished_run_tells_what_there_is(told: tuple[Run, RunMaterial], tmp_path: Path, capfd: Any) -> None:
    run, found = told
    folder = copied(run, tmp_path / "runs")
    shutil.rmtree(folder / "material")
    (folder / "run.json").unlink()
    (folder / "rows.parquet").unlink()
    guided = next(c for c in run.chapters if c.arm is Arm.GUIDED).artifacts
    for role in ("rows", "student", "chosen"):
        shutil.rmtree(folder.parent / "stages" / guided[role].stage / guided[role].digest[:16])
    part = gather_folder(folder)
    assert same(part.arms[0], found.arms[0])
    assert part.arms[1].rows is None
    assert part.missing["arms"] == "+ Contrastive-DP: 0 of 1 seeds are evaluated"
    assert part.missing["adversarial"] == "+ Contrastive-DP: student not there yet"
    assert part.missing["selections"] == "+ Contrastive-DP: chosen not there yet"
    assert part.missing["run"] == "the run is not finished: the same `gambeson run` goes on with it"
    assert (part.created, part.moved, len(part.adversarial)) == ("", "", 1)
    assert same(part.energy, found.energy)
    assert part.grids is not None
    assert main(["show", str(folder)]) == 0
    assert "the run is not finished" in capfd.readouterr().out
    assert main(["report", str(folder)]) == 0
    made_before = {p: p.stat().st_mtime_ns for p in (folder.parent / "stages").rglob("*") if p.is_file()}
    gather_folder(folder)
    assert made_before == {p: p.stat().st_mtime_ns for p in (folder.parent / "stages").rglob("*") if p.is_file()}
    shutil.rmtree(folder.parent / "stages")
    assert same(gather_folder(folder).arms[0], found.arms[0])  # as it was kept


def test_a_recipe_alone_is_a_run_of_which_nothing_is_there(told: tuple[Run, RunMaterial], tmp_path: Path) -> None:
    run, _ = told
    (tmp_path / "new").mkdir()
    shutil.copy(run.folder / "recipe.yaml", tmp_path / "new")
    found = gather_folder(tmp_path / "new")
    assert [arm.rows for arm in found.arms] == [None, None]
    assert main(["report", str(tmp_path / "new")]) == 0
    with pytest.raises(ValueError, match="expected a run folder"):
        gather_folder(tmp_path)
    (tmp_path / "new/version.json").write_text('{"format": 99}')
    assert main(["report", str(tmp_path / "new")]) == 2


def test_a_run_with_its_evaluation_alone(told: tuple[Run, RunMaterial], tmp_path: Path) -> None:
    run, found = told
    folder = copied(run, tmp_path / "runs")
    shutil.rmtree(folder / "material")
    for stage in (folder.parent / "stages").iterdir():
        if stage.name != "evaluate":
            shutil.rmtree(stage)
    part = gather_folder(folder)
    assert same([arm.rows for arm in part.arms], [arm.rows for arm in found.arms])
    assert [c.name for c in part.checks if c.name != "repeatable to the bit"]
    assert part.moved.startswith(f"Some of the run's stages are no longer at {folder.parent / 'stages'}: student (real")
    assert main(["report", str(folder)]) == 0


def test_damaged_rows_of_a_moved_run_are_said_to_be(told: tuple[Run, RunMaterial], tmp_path: Path) -> None:
    run, _ = told
    folder = tmp_path / "moved"
    shutil.copytree(run.folder, folder)
    (folder / "rows.parquet").write_bytes(b"PAR1 no more")
    found = gather_folder(folder)
    assert [arm.rows for arm in found.arms] == [None, None]
    assert "rows.parquet of the run cannot be read" in found.missing["arms"]


def test_a_folder_that_cannot_be_written_to_is_told_of_all_the_same(
    told: tuple[Run, RunMaterial], tmp_path: Path
) -> None:
    run, found = told
    folder = copied(run, tmp_path / "runs")
    shutil.rmtree(folder / "material")
    (folder / "material").write_text("in the way")
    assert same(gather_folder(folder), found)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((), -1),
        (("recipe_digest",), True),
        (("finished",), None),
        (("started",), True),
        (("chapters",), "x"),
        (("chapters",), []),
        (("chapters", 0, "seed"), 10**30),
        (("chapters", 0, "artifacts"), "x"),
        (("chapters", 0, "artifacts", "student", "folder"), -1),
        (("chapters", 0, "artifacts", "student", "folder"), "../../etc"),
        (("chapters", 0, "artifacts", "student", "digest"), [["x"]]),
    ],
)
def test_a_strangers_record_of_a_run_is_answered_in_words(
    where: tuple[str | int, ...], value: object, told: tuple[Run, RunMaterial], tmp_path: Path, capfd: Any
) -> None:
    """Whatever stands in run.json: every command that looks at a run ends with one of its exit codes."""
    folder = tmp_path / "runs" / "mine\x1b[2J"
    shutil.copytree(told[0].folder, folder)
    facts: Any = json.loads((folder / "run.json").read_text())
    inner = facts
    for name in where[:-1]:
        inner = inner[name]
    if where:
        inner[where[-1]] = value
    write_json(folder / "run.json", facts if where else value)
    asked = (["show", str(folder)], ["watch", str(folder), "--once"], ["runs", "--runs", str(folder.parent)])
    assert all(main(words) in (0, 2, 3) for words in asked)
    out, err = capfd.readouterr()
    assert "\x1b" not in out + err
    assert "mine\\x1b[2J" in out
