"""Scores beside a store, and labels and selections that never hold all of them: exact, resumable, guarded."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gambeson.data.scores import Scores, ScoreWriter, as_arrow, as_numpy
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.disk import checksum, write_json
from gambeson.errors import EnvironmentFault, UserError
from gambeson.models.classifiers import classifier_header, load_classifier
from gambeson.models.files import save_tensors
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.store import Artifact, Workspace
from gambeson.synthesis import label as labelling
from gambeson.synthesis import select as selecting
from gambeson.synthesis.label import ByTeacher, Labeling, label
from gambeson.synthesis.select import Confidence, Entropy, Selection, best_per_class, select, top_per_class

SCORER = "ab12cd34"


@pytest.fixture
def store(tmp_path: Path) -> SyntheticStore:
    """70 images of 8 x 8 in shards of 30, 30 and 10."""
    writer = StoreWriter(root=tmp_path / "made/images", blocks=7, blocks_per_shard=3)
    for number in range(7):
        images = np.random.default_rng(number).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
        writer.put(number, images, np.arange(10, dtype=np.int64))
    writer.finish({})
    return SyntheticStore.open(tmp_path / "made/images")


def writer_of(store: SyntheticStore, **changed) -> ScoreWriter:
    return ScoreWriter(**{"store": store, "digest": SCORER, "scorer": {"name": "x"}, "against": "train"} | changed)


def scored(store: SyntheticStore, shards=(2, 0, 1), **changed) -> None:
    for shard in shards:
        rows = np.arange(store.rows[shard], dtype=np.float32) + 100 * shard
        writer_of(store, **changed).put(shard, {"score": rows, "pair": np.stack([rows, -rows], 1)})


def test_scores_are_kept_by_block_and_index_and_written_in_any_order(store: SyntheticStore) -> None:
    scored(store, [2, 0])
    assert writer_of(store).missing() == [1]
    with pytest.raises(UserError, match=r"expected scores of all 3 shards, got 'none of \[1\]'"):
        Scores.open(store, SCORER, "selection")
    scored(store, [1])
    scores = Scores.open(store, SCORER, "selection")
    assert (scores.columns, scores.scorer, scores.against) == (["score", "pair"], {"name": "x"}, "train")
    table = scores.shard(1)
    assert table["block"].to_pylist() == [3] * 10 + [4] * 10 + [5] * 10
    assert table["index"].to_pylist() == [*range(10)] * 3
    assert table.schema.field("pair").type == pa.list_(pa.float32(), 2)
    expected = np.concatenate([np.arange(rows) + 100 * s for s, rows in enumerate(store.rows)])
    assert np.concatenate(list(scores.parts("score"))).tolist() == expected.tolist()
    assert np.concatenate(list(scores.parts("pair")))[:, 1].tolist() == (-expected).tolist()
    with pytest.raises(UserError, match="unknown score: expected one of score, pair"):
        next(scores.parts("scores"))
    path = store.root / "scores" / SCORER / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(EnvironmentFault, match=r"00001\.parquet: expected Parquet"):
        scores.shard(1)


@pytest.mark.parametrize("against", ["train", "test", None])
def test_what_was_compared_with_test_images_selects_nothing(store: SyntheticStore, against: str | None) -> None:
    scored(store, against=against)
    assert Scores.open(store, SCORER, "report").against == against
    if against == "test":
        with pytest.raises(UserError, match="made against train images, got some made against test images"):
            Scores.open(store, SCORER, "selection")
    else:
        assert Scores.open(store, SCORER, "selection").against == against


def test_scores_that_do_not_say_what_they_were_compared_with_select_nothing(store: SyntheticStore) -> None:
    scored(store)
    meta = store.root / "scores" / SCORER / "meta.json"
    said = json.loads(meta.read_text())
    meta.write_text(json.dumps({k: v for k, v in said.items() if k != "against"}))
    with pytest.raises(UserError, match="against unknown images"):
        Scores.open(store, SCORER, "selection")
    meta.write_text(json.dumps(said | {"store": "0" * 64}))
    with pytest.raises(UserError, match="expected scores of this store's images, got 'those of another'"):
        Scores.open(store, SCORER, "report")


def test_scores_that_do_not_fit_are_refused(store: SyntheticStore) -> None:
    scored(store, [0])
    rows = np.zeros(30, np.float32)
    with pytest.raises(UserError, match="another scorer needs another digest"):
        writer_of(store, scorer={"name": "y"}).put(1, {"score": rows})
    with pytest.raises(UserError, match="another scorer needs another digest"):
        writer_of(store, against="test").put(1, {"score": rows})
    with pytest.raises(UserError, match=r"score: expected numbers \[10\] or \[10, K\]"):
        writer_of(store).put(2, {"score": rows})
    for bad in ({"block": rows}, {}):
        with pytest.raises(UserError, match="names beside block and index"):
            writer_of(store).put(1, bad)
    with pytest.raises(UserError, match="shard: expected 0 to 2"):
        writer_of(store).put(3, {"score": rows})
    for digest in ("../../x", "ab", "AB12CD34"):
        with pytest.raises(UserError, match="hexadecimal"):
            writer_of(store, digest=digest).put(0, {"score": rows})
    with pytest.raises(UserError, match="expected scores with a meta"):
        Scores.open(store, "0" * 8, "report")


def test_numbers_go_to_arrow_and_back() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert as_numpy(as_arrow(rows)).tolist() == rows.tolist()
    assert as_numpy(pa.chunked_array([as_arrow(rows), as_arrow(rows)]).slice(3, 2)).tolist() == rows[[3, 0]].tolist()
    assert as_numpy(pa.array(rows.tolist())).tolist() == rows.tolist()
    assert as_numpy(as_arrow(rows[:, 0])).tolist() == rows[:, 0].tolist()


def sorted_top(scores: np.ndarray, labels: np.ndarray, classes: int, quota: int) -> np.ndarray:
    """What the first version of the selection did: sorts everything."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    return np.sort(np.concatenate([order[labels[order] == k][:quota] for k in range(classes)]))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_best_of_each_class_are_those_of_a_sort(kind: type, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many ties, both zeros, infinities, what is no number, classes without images, images without a class."""
    monkeypatch.setattr(selecting, "CHUNK", chunk)
    draw = np.random.default_rng(0)
    for turn in range(12):
        scores = draw.choice([*draw.normal(size=8) * 10.0 ** draw.integers(-30, 30, 8), 0.0, -0.0], 200).astype(kind)
        if turn % 3 == 0:
            scores = draw.normal(size=200).astype(kind)
        if turn % 2:
            scores[draw.integers(0, 200, 9)] = [np.inf, -np.inf, np.nan] * 3
        labels = draw.choice([-1, 0, 1, 3, 9], 200)
        for quota in (1, 2, 13, 39, 200):
            expected = sorted_top(scores, labels, 5, quota)
            assert top_per_class(scores, labels, 5, quota).tolist() == expected.tolist()


def test_choosing_needs_no_memory_for_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "CHUNK", 1000)

    def peak(images: int) -> int:
        scores, labels = np.random.default_rng(0).random(images, np.float32), np.arange(images, dtype=np.int32) % 10
        tracemalloc.start()
        kept = sum(len(part) for part in best_per_class(scores, labels, 10, images // 20))
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kept == images // 2
        return held

    assert peak(80_000) < 1.05 * peak(20_000)


def made(folder: Path) -> Artifact:
    """A folder as a finished stage."""
    write_json(folder / "done.json", {"files": {p.name: checksum(p) for p in folder.iterdir() if p.is_file()}})
    return Artifact("by hand", "0" * 64, folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    model = WideResNetSpec(depth=10, width=1).build(3, 10, 0)
    save_tensors(folder / "classifier.safetensors", model.state_dict(), classifier_header(model, (3, 8, 8)))
    return folder


def labelled(folder: Path, store: SyntheticStore, teacher: Path, spec: Labeling, progress=lambda *_: None) -> Path:
    folder.mkdir(exist_ok=True)
    label.work(Workspace(folder, progress), spec, made(store.root.parent), made(teacher))
    return folder / "labels.parquet"


def test_labels_are_the_teachers_and_lie_as_float32(store: SyntheticStore, teacher: Path, tmp_path: Path) -> None:
    spec = Labeling(by=ByTeacher(), batch_size=16)
    table = pq.read_table(labelled(tmp_path / "l", store, teacher, spec))
    model = load_classifier(teacher / "classifier.safetensors")
    with torch.no_grad():
        pixels = torch.from_numpy(store.read(np.arange(70))[0].transpose(0, 3, 1, 2).copy()).float() / 255
        logits = torch.cat([model(part) for part in pixels.split(16)])
    assert table.schema.field("logits").type == pa.list_(pa.float32(), 10)
    assert np.array_equal(as_numpy(table["logits"]), logits.numpy())
    assert table["label"].to_pylist() == logits.argmax(1).tolist()
    assert table["condition"].to_pylist() == [*range(10)] * 7
    assert sorted(p.name for p in (tmp_path / "l").iterdir()) == ["labels.json", "labels.parquet"]


def test_labelling_goes_on_where_it_broke_with_the_same_batches(
    store: SyntheticStore, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelling, "PART", 20)
    spec = Labeling(batch_size=8)  # parts of 16
    straight = labelled(tmp_path / "straight", store, teacher, spec).read_bytes()

    def breaking(done: int, total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labelled(tmp_path / "l", store, teacher, spec, breaking)
    assert len(list((tmp_path / "l/parts").iterdir())) == 2
    told: list[int] = []
    again = labelled(tmp_path / "l", store, teacher, spec, lambda done, total: told.append(done))
    assert told[0] == 40  # the 32 images that were kept are not labelled again
    assert again.read_bytes() == straight


def chosen(folder: Path, store: SyntheticStore, table: Path, spec: Selection) -> Chosen:
    folder.mkdir(exist_ok=True)
    select.work(Workspace(folder), spec, made(store.root.parent), made(table.parent))
    return Chosen.open(folder / "chosen.parquet")


@pytest.mark.parametrize("score", [Confidence(), Entropy()])
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_a_selection_is_that_of_all_logits_at_once(
    score, keep: float, store: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from labels as earlier versions wrote them: logits as lists of float64."""
    monkeypatch.setattr(selecting, "CHUNK", 16 * 9)
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(70, 10, generator=draw)
    logits[40:] = logits[:30]  # ties
    labels = logits.argmax(1)
    found = []
    for kind, column in (("new", as_arrow(logits.numpy())), ("old", pa.array(logits.tolist()))):
        (tmp_path / kind).mkdir()
        columns = {"label": labels.numpy(), "condition": np.arange(70) % 10, "logits": column}
        pq.write_table(pa.table(columns), tmp_path / kind / "labels.parquet")
        mine = chosen(
            tmp_path / kind / "s", store, tmp_path / kind / "labels.parquet", Selection(score=score, keep=keep)
        )
        found.append(mine)
        facts = json.loads((tmp_path / kind / "s/selection.json").read_text())
        assert facts["quota"] == (2 if keep < 1 else None)
        assert facts["kept"] == np.bincount(mine.labels, minlength=10).tolist()
        assert facts["teacher_agrees_with_condition"] == float((labels.numpy() == np.arange(70) % 10).mean())
        assert not [p for p in (tmp_path / kind / "s").iterdir() if p.name.startswith(".scores")]
    expected = sorted_top(score(labels, logits).numpy(), labels.numpy(), 10, 2 if keep < 1 else 70)
    for mine in found:
        assert mine.positions.tolist() == expected.tolist()
        assert mine.labels.tolist() == labels[expected].tolist()


@pytest.mark.parametrize("score", [Confidence(), Entropy()])
def test_labels_that_the_teacher_does_not_know_are_refused(score, store: SyntheticStore, tmp_path: Path) -> None:
    columns = {
        "label": np.full(70, 10),
        "condition": np.arange(70) % 10,
        "logits": as_arrow(np.zeros((70, 10), np.float32)),
    }
    (tmp_path / "l").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "l/labels.parquet")
    with pytest.raises(UserError, match=r"labels\.parquet: expected labels from -1 \(left out\) to 9, got '10 to 10'"):
        chosen(tmp_path / "s", store, tmp_path / "l/labels.parquet", Selection(score=score))
    assert not list((tmp_path / "s").iterdir())
