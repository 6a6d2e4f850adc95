"""What makes an image worth keeping, and the selection that keeps the best of each class."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from gambeson import canonical
from gambeson.data.datasets import Digits, ImageSet
from gambeson.data.imageset import Split
from gambeson.data.mixture import to_uint8
from gambeson.data.scores import ScoreWriter, as_arrow
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.errors import UserError
from gambeson.files import build
from gambeson.models.classifiers import classifier_header
from gambeson.models.files import save_tensors
from gambeson.models.network import ClassifierNetwork
from gambeson.models.resnet import ResNetSpec
from gambeson.quality import discriminator
from gambeson.quality.discriminator import Discrimination
from gambeson.quality.memorisation import CopyTest
from gambeson.randomness import image_keys, uniform
from gambeson.recipe import Recipe, class_table, fill_threat
from gambeson.robustness.losses import TRADES, PGDAdversarial
from gambeson.robustness.subjects import Ours
from gambeson.store import Store, Workspace
from gambeson.synthesis import pool as pools
from gambeson.synthesis import scorers
from gambeson.synthesis.centroids import Centroids, class_means, features_of, pool_centroids
from gambeson.synthesis.kept_scores import KeptScores
from gambeson.synthesis.pool import Context, LabelFile, Pool, Rows
from gambeson.synthesis.select import Selection, _Beside, select
from gambeson.threat import ThreatModel
from gambeson.training.loop import Optimisation

COUNT, CLASSES = 90, 10
FEW = Optimisation(steps=12, batch_size=16, momentum=0.0)
NEAR = ThreatModel(epsilon=0.1)
SCORERS: dict[str, Any] = {
    "confidence": scorers.Confidence(),
    "entropy": scorers.Entropy(),
    "margin": scorers.LabelMargin(),
    "random": scorers.Random(seed=3),
    "separability": scorers.Separability(),
    "separability, real": scorers.Separability(of="real"),
    "own centroid": scorers.OwnCentroid(),
    "own centroid, encoder, real": scorers.OwnCentroid(network="encoder", of="real"),
    "centroid margin": scorers.CentroidMargin(),
    "last layer": scorers.LastLayerGradientNorm(),
    "parameters": scorers.ParameterGradientNorm(),
    "input": scorers.InputGradientNorm(network="encoder"),
    "robust, trades": scorers.RobustGradientNorm(loss=TRADES(threat=NEAR, steps=2)),
    "robust, pgd": scorers.RobustGradientNorm(loss=PGDAdversarial(threat=NEAR, steps=2)),
    "discriminator": scorers.Discriminator(
        discrimination=Discrimination(network=ResNetSpec(width=2), optimisation=FEW, steps=1, images=40)
    ),
}


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return Digits(train_images=60, validation_images=200).load()


def store_of(images: Tensor, labels: np.ndarray, root: Path, block: int = 20, names: tuple = ()) -> SyntheticStore:
    """A store of these images, in shards of two blocks."""
    pixels = to_uint8(images)
    writer = StoreWriter(root=root, blocks=-(-len(images) // block), blocks_per_shard=2)
    for i, start in enumerate(range(0, len(images), block)):
        writer.put(i, pixels[start : start + block], labels[start : start + block], {})
    writer.finish({"source": "test"} | ({"class_names": list(names)} if names else {}))
    return SyntheticStore.open(root)


@pytest.fixture(scope="module")
def store(real: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    """Noisy digits: the first images of a test's pool."""
    noise = torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images, labels = real.validation.images[:COUNT], real.validation.labels[:COUNT]
    return store_of((images + 0.3 * noise) / 1.3, labels.numpy(), tmp_path_factory.mktemp("store") / "images")


def classifier(
    folder: Path, seed: int, classes: int = CLASSES, shape: tuple[int, int, int] = (1, 8, 8), names: tuple = ()
) -> Ours:
    """A network that was never trained, with batch norms that do something."""
    model = ResNetSpec(width=4).build(shape[0], classes, seed)
    draw = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
    folder.mkdir(parents=True, exist_ok=True)
    header = classifier_header(model, shape) | ({"class_names": list(names)} if names else {})
    save_tensors(folder / "classifier.safetensors", model.state_dict(), header)
    return Ours(str(folder / "classifier.safetensors"))


@pytest.fixture(scope="module")
def given_by_name(real: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("networks")
    return {"teacher": classifier(root / "t", 1), "encoder": classifier(root / "e", 2), "real": real.without_test()}


def logits_of(store: SyntheticStore, subject: Ours) -> np.ndarray:
    with torch.no_grad():
        images = torch.from_numpy(store.read(np.arange(len(store)))[0]).permute(0, 3, 1, 2).float() / 255
        return subject.network()(images).numpy()


def label_file(
    path: Path,
    store: SyntheticStore,
    logits: np.ndarray,
    labels: np.ndarray | None = None,
    about: dict | None = None,
    groups: int = 1 << 20,
) -> LabelFile:
    """A labels.parquet; `groups` rows in each row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"label": store.labels if labels is None else labels, "condition": store.labels}
    table = pa.table({**columns, "logits": as_arrow(logits.astype(np.float32))})
    if about is not None:
        table = table.replace_schema_metadata({"labeling": json.dumps(about)})
    pq.write_table(table, path, row_group_size=groups)
    return LabelFile(path)


@pytest.fixture(scope="module")
def labels(store: SyntheticStore, given_by_name: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> LabelFile:
    """By the teacher; three images were left out."""
    teacher, given = given_by_name["teacher"], store.labels.copy()
    given[[5, 41, 88]] = -1
    about = {"images": store.digest, "teachers": [teacher.digest], "soft": None}
    path = tmp_path_factory.mktemp("labels") / "labels.parquet"
    return label_file(path, store, logits_of(store, teacher), given, about)


def context_of(pool: Pool, given_by_name: dict[str, Any], root: Path) -> Context:
    networks = {name: given_by_name[name].network().eval() for name in ("teacher", "encoder")}
    return Context(pool, Store(root).once, real=given_by_name["real"], **networks)


def rows_at(pool: Pool, positions: np.ndarray) -> Rows:
    """Rows of any images in any order."""
    table = pq.read_table(pool.labels.path)
    columns = [np.array(table[name].to_pylist()) for name in ("label", "logits")]
    images = torch.from_numpy(pool.store.read(positions)[0]).permute(0, 3, 1, 2).float() / 255
    given, logits = torch.from_numpy(columns[0][positions]), torch.from_numpy(columns[1][positions]).float()
    return Rows(given, logits, torch.from_numpy(positions), read=lambda: images)


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_belongs_to_its_image(
    name: str, store: SyntheticStore, labels: LabelFile, given_by_name: dict[str, Any], tmp_path: Path
) -> None:
    """One table over every scorer: batch size, order and company change nothing; finite; not constant; repeatable."""
    pool, scorer = Pool(store, labels), SCORERS[name]
    score = scorer.bind(context_of(pool, given_by_name, tmp_path))
    places = np.flatnonzero(np.array(pq.read_table(labels.path)["label"].to_pylist()) >= 0)
    whole = score(rows_at(pool, places))
    assert whole.shape == (len(places),)
    assert whole.dtype in (torch.float32, torch.float64)
    assert bool(whole.isfinite().all())
    assert len(whole.unique()) > len(whole) // 2
    assert torch.equal(score(rows_at(pool, places)), whole)
    scale = float(whole.abs().max())
    order = np.random.default_rng(0).permutation(len(places))
    close = {"rtol": 2e-4, "atol": 1e-5 * scale}
    torch.testing.assert_close(score(rows_at(pool, places[order])), whole[torch.from_numpy(order)], **close)
    for size in (1, 7):
        starts = range(0, 14, size)
        parts = torch.cat([score(rows_at(pool, places[start : start + size])) for start in starts])
        torch.testing.assert_close(parts, whole[: len(parts)], **close)
    again = scorer.bind(context_of(pool, given_by_name, tmp_path / "again"))
    assert torch.equal(again(rows_at(pool, places)), whole)


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_is_a_recipe_s_component(name: str) -> None:
    """It round-trips through its plain form, and says what it needs in the pipeline's order."""
    scorer = SCORERS[name]
    assert build(canonical.plain(Selection(score=scorer)), Selection) == Selection(score=scorer)
    assert class_table()[type(scorer).__name__] is type(scorer)  # one name, one class
    assert list(scorer.needs) == [need for need in ("teacher", "encoder", "real") if need in scorer.needs]


def test_the_digests_of_earlier_selections_stay() -> None:
    """Computed at commit 139c160, before there were other scores and fields."""
    expected = {"class": "Selection", "keep": 0.4, "score": {"class": "Entropy"}}
    text = json.dumps([expected], sort_keys=True, separators=(",", ":"))
    found = canonical.digest(Selection(score=scorers.Entropy(), keep=0.4))
    assert found == hashlib.sha256(text.encode()).hexdigest()
    assert found != canonical.digest(Selection(score=scorers.Entropy(), keep=0.4, per_class=None, remove_copies=True))


def test_the_recipe_s_threat_reaches_the_robust_score() -> None:
    spec = fill_threat(Selection(score=scorers.RobustGradientNorm()), NEAR)
    assert isinstance(spec.score, scorers.RobustGradientNorm)
    assert spec.score.loss.threat == NEAR
    assert Recipe(selection=Selection(score=scorers.RobustGradientNorm())).with_threat_everywhere().selection != spec


def test_margin_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 1.0]])
    assert scorers.LabelMargin()(torch.tensor([0, 2]), logits).tolist() == [0.5, -3.0]
    with pytest.raises(UserError, match="at least 2 classes"):
        scorers.LabelMargin()(torch.tensor([0]), logits[:1, :1])


def test_random_is_uniform_and_of_its_seed(store: SyntheticStore, labels: LabelFile) -> None:
    rows = Rows(torch.zeros(20_000).long(), torch.zeros(20_000, 2), torch.arange(20_000), read=lambda: torch.zeros(0))
    context = Context(Pool(store, labels), lambda *a: pytest.fail("nothing is trained"))
    first, second = (scorers.Random(seed=s).bind(context)(rows) for s in (0, 1))
    assert np.histogram(first, 10, (0, 1))[0] == pytest.approx(2000, abs=200)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_the_three_separabilities_by_hand() -> None:
    """Centroids (0, 0), (4, 0), and none of the third class; an image of class 0 at (3, 4)."""
    means, present = torch.tensor([[0.0, 0.0], [4.0, 0.0], [9.0, 9.0]]).double(), torch.tensor([True, True, False])
    centroids, x, y = Centroids(means, present), torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([0, 0])
    assert centroids.own(x, y).tolist() == [5.0, 0.0]
    assert centroids.distances(x).sum(1).tolist() == pytest.approx([5 + 17**0.5, 4.0])
    assert centroids.others(x, y).tolist() == pytest.approx([17**0.5, 4.0])
    with pytest.raises(UserError, match="at least 2 classes"):
        Centroids(means, torch.tensor([True, False, False])).others(x, y)


def test_the_paper_s_separability_prefers_the_middle_and_the_corrected_ones_do_not() -> None:
    """Two classes around (0, 0) and (4, 0): (-1, 0) lies on its own side, (2, 0) on the border."""
    centroids = Centroids(torch.tensor([[0.0, 0.0], [4.0, 0.0]]).double(), torch.tensor([True, True]))
    x, y = torch.tensor([[-1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0])
    paper, own = -centroids.distances(x).sum(1), -centroids.own(x, y)
    margin = centroids.others(x, y) - centroids.own(x, y)
    assert paper[1] > paper[0]
    assert own[0] > own[1]
    assert margin[0] > margin[1] == 0


def test_the_separabilities_of_a_pool_are_those_of_plain_torch(
    store: SyntheticStore, labels: LabelFile, given_by_name: dict[str, Any], real: ImageSet, tmp_path: Path
) -> None:
    """Signs and centroids: the pool's means by label, or the real train images'."""
    pool = Pool(store, labels)
    context = context_of(pool, given_by_name, tmp_path)
    places = np.flatnonzero(np.array(pq.read_table(labels.path)["label"].to_pylist()) >= 0)
    rows = rows_at(pool, places)
    with torch.no_grad():
        own, train = (context.network("teacher").features(x).double() for x in (rows.images, real.train.images))
    for of, features, kinds in (("synthetic", own, rows.labels), ("real", train, real.train.labels)):
        means = torch.stack([features[kinds == k].mean(0) for k in range(CLASSES)])
        apart = (own[:, None] - means).norm(dim=2)
        mine = apart[torch.arange(len(own)), rows.labels]
        others = apart.masked_fill(torch.nn.functional.one_hot(rows.labels, CLASSES).bool(), torch.inf).min(1).values
        expected = {
            scorers.Separability: -apart.sum(1),
            scorers.OwnCentroid: -mine,
            scorers.CentroidMargin: others - mine,
        }
        for kind, wanted in expected.items():
            torch.testing.assert_close(kind(of=of).bind(context)(rows), wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [TRADES(threat=NEAR, steps=3, beta=2.0), PGDAdversarial(threat=NEAR, steps=3)])
def test_the_robust_norm_is_that_of_the_training_loss_at_the_attacked_image(
    loss: Any, store: SyntheticStore, labels: LabelFile, given_by_name: dict[str, Any], tmp_path: Path
) -> None:
    """Both terms of TRADES flow; the attacked image lies in the ball, climbs, and is held still."""
    pool = Pool(store, labels)
    context, rows = context_of(pool, given_by_name, tmp_path), rows_at(pool, np.arange(4))
    scorer = scorers.RobustGradientNorm(loss=loss, seed=5)
    found, model, seen = scorer.bind(context)(rows), context.network("encoder"), []
    attack = scorers._attack(loss)
    start = NEAR.random(rows.images, uniform(image_keys(rows.images, rows.labels, 5), "start", (1, 8, 8)))
    moved = attack(model, rows.images, rows.labels, start)
    assert float((moved - rows.images).abs().max()) <= NEAR.epsilon + 1e-6
    model.requires_grad_(True)
    for i in range(4):
        part = slice(i, i + 1)
        value = loss.value(model, rows.images[part], moved[part], rows.labels[part])
        gradients = torch.autograd.grad(value.sum(), list(model.parameters()))
        seen.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    assert found.tolist() == pytest.approx(seen, rel=1e-3)


def test_centroids_are_means_whatever_the_parts(store: SyntheticStore, labels: LabelFile, given_by_name) -> None:
    features, kinds = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 4
    whole = class_means([(features, kinds)], 5)
    parts = class_means(zip(features.split(7), kinds.split(7), strict=True), 5)
    torch.testing.assert_close(parts.means, whole.means, rtol=1e-12, atol=1e-12)
    assert whole.present.tolist() == [True] * 4 + [False]
    torch.testing.assert_close(whole.means[1], features[kinds == 1].double().mean(0))
    with pytest.raises(UserError, match="at least one image"):
        class_means([], 3)


def test_the_pool_s_centroids_leave_out_images_without_a_label(
    store: SyntheticStore, labels: LabelFile, given_by_name: dict[str, Any]
) -> None:
    model, table = given_by_name["teacher"].network(), pq.read_table(labels.path)
    found = pool_centroids(model, Pool(store, labels, together=8))
    kinds = torch.tensor(table["label"].to_pylist())
    with torch.no_grad():
        pixels = torch.from_numpy(store.read(np.arange(COUNT))[0]).permute(0, 3, 1, 2).float() / 255
        features = model.features(pixels)
    for k in range(CLASSES):
        torch.testing.assert_close(found.means[k], features[kinds == k].double().mean(0), rtol=1e-5, atol=1e-6)


class Broken(ClassifierNetwork):
    """Features that are no number where the first pixel is 0."""

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1) / images.flatten(1)[:, :1]


def test_features_that_are_not_finite_are_counted() -> None:
    images = torch.ones(4, 1, 1, 2)
    images[[1, 3], 0, 0, 0] = 0
    with pytest.raises(UserError, match="NaN or infinity for 2 of 4 images"):
        features_of(Broken(), images)


def test_gradient_norms_are_largest_where_the_network_is_most_wrong(
    store: SyntheticStore, labels: LabelFile, given_by_name: dict[str, Any], tmp_path: Path
) -> None:
    """Larger is better is what CDP keeps: the scores fall with the probability of the label."""
    pool = Pool(store, labels)
    context, rows = context_of(pool, given_by_name, tmp_path), rows_at(pool, np.arange(5))
    sure = Rows(rows.logits.argmax(1), rows.logits, rows.positions, read=lambda: rows.images)
    wrong = Rows(rows.logits.argmin(1), rows.logits, rows.positions, read=lambda: rows.images)
    for scorer in (scorers.LastLayerGradientNorm(), scorers.ParameterGradientNorm()):
        score = scorer.bind(context)
        assert bool((score(wrong) > score(sure)).all())


Chooser = Callable[..., Any]


@pytest.fixture
def choose(store: SyntheticStore, labels: LabelFile, given_by_name: dict[str, Any], tmp_path: Path) -> Chooser:
    """(spec, ...) -> (chosen, selection.json), made in a folder of its own."""

    def chosen(spec: Selection, at: LabelFile = labels, of: SyntheticStore = store, progress=None, **other: Any):
        folder = tmp_path / canonical.digest(spec, str(at.path))[:12]
        folder.mkdir(exist_ok=True)
        given_now = [(given_by_name | other)[name] for name in spec.needs]
        select.work(Workspace(folder, progress or (lambda done, total: None)), spec, of, at, *given_now)
        return Chosen.open(folder / "chosen.parquet"), json.loads((folder / "selection.json").read_text())

    return chosen


@pytest.mark.parametrize("name", SCORERS)
def test_the_best_of_each_class_are_kept(
    name: str, choose: Chooser, store: SyntheticStore, labels: LabelFile, given_by_name: dict[str, Any], tmp_path: Path
) -> None:
    """Against a sort of the scores; what has no label is left out; the report says what happened."""
    pool = Pool(store, labels)
    chosen, facts = choose(Selection(score=SCORERS[name], per_class=4))
    kinds = np.array(pq.read_table(labels.path)["label"].to_pylist())
    places = np.flatnonzero(kinds >= 0)
    scores = SCORERS[name].bind(context_of(pool, given_by_name, tmp_path / "x"))(rows_at(pool, places)).numpy()
    for k in range(CLASSES):
        mine, rest = (
            scores[np.isin(places, chosen.positions) & (kinds[places] == k)],
            scores[~np.isin(places, chosen.positions) & (kinds[places] == k)],
        )
        assert len(mine) == 4
        assert mine.min() >= rest.max() - 1e-5 * np.abs(scores).max()
    assert chosen.labels.tolist() == kinds[chosen.positions].tolist()
    assert facts["kept"] == [4] * CLASSES
    assert facts["left_out"] == 3
    assert facts["available"] == np.bincount(kinds[places], minlength=CLASSES).tolist()
    assert facts["score"]["class"] == type(SCORERS[name]).__name__


def test_more_than_a_class_holds_fills_what_there_is_and_says_so(choose: Chooser, labels: LabelFile) -> None:
    counts = np.bincount(np.array(pq.read_table(labels.path)["label"].to_pylist()) + 1, minlength=11)[1:]
    chosen, facts = choose(Selection(score=scorers.LabelMargin(), per_class=9))
    assert facts["kept"] == np.minimum(counts, 9).tolist()
    assert facts["short"] == {str(k): int(9 - n) for k, n in enumerate(counts) if n < 9} != {}
    assert np.bincount(chosen.labels, minlength=10).tolist() == facts["kept"]


def test_ties_go_to_the_earlier_image_and_are_counted(choose: Chooser, store: SyntheticStore, tmp_path: Path) -> None:
    logits = np.zeros((COUNT, CLASSES), np.float32)
    logits[np.arange(0, COUNT, 2), store.labels[::2]] = 1
    at = label_file(tmp_path / "l" / "labels.parquet", store, logits, groups=13)
    chosen, facts = choose(Selection(per_class=6), at)
    for k in range(CLASSES):
        own = np.flatnonzero(store.labels == k)
        even, odd = own[own % 2 == 0], own[own % 2 == 1]
        expected = np.sort(np.concatenate([even, odd])[:6]) if len(even) <= 6 else even[:6]
        assert chosen.positions[chosen.labels == k].tolist() == expected.tolist()
        tied = len(even) - 6 if len(even) >= 6 else max(len(own) - 6, 0)
        assert facts["ties"].get(str(k), 0) == tied


@settings(max_examples=25, deadline=None)
@given(
    scores=hnp.arrays(np.float64, COUNT, elements=st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])),
    quota=st.integers(1, 12),
)
def test_a_selection_by_kept_scores_is_a_stable_sort(
    scores: np.ndarray, quota: int, store: SyntheticStore, labels: LabelFile, tmp_path_factory
) -> None:
    """Property: for any scores and any number, of each class the first of the best."""
    folder = tmp_path_factory.mktemp("kept")
    digest = hashlib.sha256(scores.tobytes()).hexdigest()
    writer = ScoreWriter(store=store, digest=digest, scorer={"by": "hand"}, against=None)
    start = 0
    for shard, rows in enumerate(store.rows):
        writer.put(shard, {"score": scores[start : start + rows]})
        start += rows
    select.work(Workspace(folder), Selection(score=KeptScores(digest=digest), per_class=quota), store, labels)
    chosen = Chosen.open(folder / "chosen.parquet")
    kinds = np.array(pq.read_table(labels.path)["label"].to_pylist())
    order = np.lexsort((np.arange(COUNT), -scores))
    expected = [p for k in range(CLASSES) for p in order[kinds[order] == k][:quota]]
    assert chosen.positions.tolist() == sorted(expected)


def test_scores_are_kept_found_again_and_resumed(
    choose: Chooser, store: SyntheticStore, labels: LabelFile, given_by_name: dict[str, Any], monkeypatch
) -> None:
    """Broken in the second shard, the first is not scored again; another number of images scores nothing."""
    monkeypatch.setattr(pools, "TOGETHER", 16)
    spec = Selection(score=scorers.InputGradientNorm(), per_class=2)
    whole = store.rows

    def breaking(done: int, total: int) -> None:
        if done > whole[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose(spec, progress=breaking)
    told: list[int] = []
    _, facts = choose(spec, progress=lambda done, total: told.append(done))
    assert told[0] > whole[0]
    assert told[-1] == COUNT
    kept = store.root / "scores" / facts["scores"]
    resumed = [pq.read_table(path) for path in sorted(kept.glob("*.parquet"))]
    shutil.rmtree(kept)
    choose(replace(spec, per_class=1))
    assert [pq.read_table(path) for path in sorted(kept.glob("*.parquet"))] == resumed
    assert len(resumed) == len(whole)
    told.clear()
    chosen, again = choose(replace(spec, per_class=3), progress=lambda done, total: told.append(done))
    assert (told, again["scores"], len(chosen)) == ([], facts["scores"], 30)
    meta = json.loads((store.root / "scores" / facts["scores"] / "meta.json").read_text())
    assert meta["scorer"]["networks"] == {"teacher": given_by_name["teacher"].digest} == facts["networks"]
    assert (meta["scorer"]["labels"], meta["against"]) == (labels.digest, None)
    _, other = choose(Selection(score=scorers.InputGradientNorm(network="encoder")))
    assert other["scores"] != facts["scores"]
    _, against = choose(Selection(score=scorers.Separability(of="real")))
    meta = json.loads((store.root / "scores" / against["scores"] / "meta.json").read_text())
    assert meta["against"] == "train"


def test_scores_of_two_trainings_are_never_mixed(
    choose: Chooser, store: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken in the second shard, and gone on with where the networks come out otherwise: all are the new ones'."""
    monkeypatch.setattr(pools, "TOGETHER", 16)
    score = replace(SCORERS["discriminator"], seed=11)
    train, shift = discriminator.train_discriminator, 0

    def breaking(done: int, total: int) -> None:
        if done > store.rows[0]:
            raise KeyboardInterrupt

    def elsewhere(once: Any, spec: Any, pair: Any, *, seed: int) -> Any:
        assert shift is not None, "nothing is trained"
        return train(once, spec, pair, seed=seed + shift)

    monkeypatch.setattr(discriminator, "train_discriminator", elsewhere)
    before = {*(store.root / "scores").glob("*")}
    with pytest.raises(KeyboardInterrupt):
        choose(Selection(score=score, per_class=1), progress=breaking)
    (partial,) = {*(store.root / "scores").glob("*")} - before
    shift = 1
    facts = choose(Selection(score=score, per_class=2))[1]
    assert facts["scores"] != partial.name
    folder = store.root / "scores" / facts["scores"]
    found = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    shutil.rmtree(partial)
    shutil.rmtree(folder)
    assert choose(Selection(score=score, per_class=3))[1]["scores"] == facts["scores"]
    assert [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))] == found
    shift = None  # found whole
    assert choose(Selection(score=score, per_class=4))[1]["scores"] == facts["scores"]


def test_what_a_killed_selection_left_goes(choose: Chooser, tmp_path: Path) -> None:
    spec = Selection(score=scorers.LabelMargin(), per_class=2)
    choose(spec)
    (folder,) = (path for path in tmp_path.iterdir() if (path / "selection.json").is_file())
    for name in (".scores", ".scores-x1y2"):
        (folder / name).mkdir()
        (folder / name / "labels").write_bytes(bytes(3))
    choose(spec)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []
    with _Beside.open(folder, 3):  # always the same name, so that the next start finds it
        assert [path.name for path in folder.iterdir() if path.is_dir()] == [".scores"]
    assert not (folder / ".scores").exists()


def test_all_that_is_there_is_no_quota(choose: Chooser) -> None:
    chosen, facts = choose(Selection(score=scorers.LabelMargin()))
    assert (facts["quota"], facts["short"], len(chosen)) == (None, {}, COUNT - 3)
    assert facts["kept"] == facts["available"]


def test_classes_in_another_order_are_refused(
    choose: Chooser, real: ImageSet, given_by_name: dict[str, Any], tmp_path: Path
) -> None:
    """Of store and real images, store and classifier, and, where the store names none, classifier and real images."""
    names = tuple(map(str, range(9, -1, -1)))
    stranger = classifier(tmp_path / "stranger", 1, names=names)
    images, kinds = real.validation.images[:20], real.validation.labels[:20].numpy()
    turned = store_of(images, kinds, tmp_path / "turned" / "images", names=names)
    unnamed = store_of(images, kinds, tmp_path / "unnamed" / "images")
    at = {s.root: label_file(s.root.parent / "labels.parquet", s, np.zeros((20, 10))) for s in (turned, unnamed)}
    own, of_real = Selection(score=scorers.OwnCentroid()), Selection(score=scorers.OwnCentroid(of="real"))
    with pytest.raises(UserError, match=r"the synthetic images: expected the classes of the real images .*class 0 on"):
        choose(of_real, at[turned.root], turned)
    with pytest.raises(UserError, match=r"ResNet of .*: expected the classes of the real images"):
        choose(of_real, at[unnamed.root], unnamed, teacher=stranger)
    choose(of_real, at[unnamed.root], unnamed)
    choose(own, at[turned.root], turned, teacher=stranger)
    straight = classifier(tmp_path / "straight", 1, names=real.class_names)
    with pytest.raises(UserError, match=r"the synthetic images: expected the classes of ResNet of"):
        choose(own, at[turned.root], turned, teacher=straight)


def test_scores_of_another_teacher_are_refused_unless_asked(
    choose: Chooser, store: SyntheticStore, labels: LabelFile, tmp_path: Path, given_by_name: dict[str, Any]
) -> None:
    own = choose(Selection(score=scorers.InputGradientNorm()))[1]["scores"]
    stranger = classifier(tmp_path / "stranger", 9)
    foreign = choose(Selection(score=scorers.InputGradientNorm(), per_class=1), teacher=stranger)[1]["scores"]
    assert foreign != own
    choose(Selection(score=KeptScores(digest=own)))
    with pytest.raises(UserError, match=rf"labelled these images \({given_by_name['teacher'].digest[:12]}\)"):
        choose(Selection(score=KeptScores(digest=foreign)))
    choose(Selection(score=KeptScores(digest=foreign, other_teacher=True)))
    other = label_file(tmp_path / "o" / "labels.parquet", store, np.zeros((COUNT, CLASSES)))
    with pytest.raises(UserError, match="made with other labels"):
        choose(Selection(score=KeptScores(digest=own)), other)
    with pytest.raises(UserError, match="unknown score"):
        choose(Selection(score=KeptScores(digest=own, column="other")))
    with pytest.raises(UserError, match="hexadecimal"):
        choose(Selection(score=KeptScores()))


def test_scores_that_are_not_finite_are_refused_with_how_many(
    choose: Chooser, store: SyntheticStore, tmp_path: Path
) -> None:
    logits = np.random.default_rng(0).normal(size=(COUNT, CLASSES)).astype(np.float32)
    logits[[7, 50]] = np.nan
    logits[60, 0] = np.inf
    at = label_file(tmp_path / "l" / "labels.parquet", store, logits)
    with pytest.raises(UserError, match=r"Entropy: .* NaN or infinity for 3 of 90, the first at position 7"):
        choose(Selection(score=scorers.Entropy()), at)
    kinds = store.labels.copy()
    kinds[[7, 50, 60]] = -1  # left out: their scores do not matter
    at = label_file(tmp_path / "k" / "labels.parquet", store, logits, kinds)
    assert choose(Selection(score=scorers.Entropy()), at)[1]["left_out"] == 3


def test_labels_of_other_images_are_refused(choose: Chooser, store: SyntheticStore, tmp_path: Path) -> None:
    logits = np.zeros((COUNT, CLASSES), np.float32)
    shorter = store_of(torch.zeros(40, 1, 8, 8), store.labels[:40], tmp_path / "shorter" / "images")
    of_shorter = label_file(tmp_path / "a" / "labels.parquet", shorter, logits[:40])
    with pytest.raises(UserError, match=r"expected labels of the 90 images .*, got those of 40 others"):
        choose(Selection(), of_shorter)
    turned = store_of(torch.zeros(COUNT, 1, 8, 8), store.labels[::-1].copy(), tmp_path / "turned" / "images")
    with pytest.raises(UserError, match="got those of others"):
        choose(Selection(), label_file(tmp_path / "b" / "labels.parquet", turned, logits))
    same = store_of(torch.zeros(COUNT, 1, 8, 8), store.labels, tmp_path / "same" / "images")
    about = {"images": same.digest, "teachers": [], "soft": None}
    with pytest.raises(UserError, match="got those of 90 others"):
        choose(Selection(), label_file(tmp_path / "c" / "labels.parquet", same, logits, about=about))
    high = store.labels.copy()
    high[3] = 10
    with pytest.raises(UserError, match=r"labels from -1 \(left out\) to 9, got '0 to 10'"):
        choose(Selection(), label_file(tmp_path / "d" / "labels.parquet", store, logits, high))
    with pytest.raises(UserError, match="90 that the labelling left out"):
        choose(Selection(), label_file(tmp_path / "e" / "labels.parquet", store, logits, np.full(COUNT, -1)))
    pq.write_table(pa.table({"label": [1]}), tmp_path / "f.parquet")
    with pytest.raises(UserError, match="columns label, condition and logits"):
        choose(Selection(), LabelFile(tmp_path / "f.parquet"))
    (tmp_path / "g.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match=r"g\.parquet: expected labels\.parquet"):
        choose(Selection(), LabelFile(tmp_path / "g.parquet"))


def test_classifiers_and_real_images_that_do_not_fit_are_refused(
    choose: Chooser, real: ImageSet, tmp_path: Path
) -> None:
    spec = Selection(score=scorers.InputGradientNorm())
    with pytest.raises(UserError, match=r"a classifier of the labels' 10 classes .* got one of 3 classes"):
        choose(spec, teacher=classifier(tmp_path / "few", 0, classes=3))
    with pytest.raises(UserError, match=r"images \[1, 8, 8\] .* got one of 10 classes and images \[3, 8, 8\]"):
        choose(spec, teacher=classifier(tmp_path / "rgb", 0, shape=(3, 8, 8)))
    with pytest.raises(UserError, match=r"images \[1, 12, 12\]"):
        choose(spec, teacher=classifier(tmp_path / "large", 0, shape=(1, 12, 12)))
    fewer = replace(real, class_names=real.class_names[:5])
    with pytest.raises(UserError, match="real images"):
        choose(Selection(score=scorers.Separability(of="real")), real=fewer)


def test_copies_of_train_images_are_left_out_and_counted(
    real: ImageSet, tmp_path: Path, given_by_name: dict[str, Any]
) -> None:
    """Ten train images among noisy ones: they go, the next best take their places, and other images stay."""
    noise = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first = torch.stack([torch.where(real.train.labels == k)[0][0] for k in range(10)])
    images, kinds = torch.cat([real.train.images[first], noise]), np.array([*range(10)] * 5)
    pool = store_of(images, kinds, tmp_path / "images")
    logits = np.zeros((50, CLASSES), np.float32)
    logits[np.arange(10), np.arange(10)] = 5  # the copies score best
    at = label_file(tmp_path / "l" / "labels.parquet", pool, logits)
    kept = {}
    for remove in (False, True):
        spec = Selection(per_class=2, remove_copies=remove)
        given_now = [given_by_name[name] for name in spec.needs]
        folder = tmp_path / str(remove)
        folder.mkdir()
        select.work(Workspace(folder), spec, pool, at, *given_now)
        facts = json.loads((folder / "selection.json").read_text())
        kept[remove] = Chosen.open(folder / "chosen.parquet").positions.tolist()
        assert facts["copies_removed"] == ([1] * 10 if remove else None)
    assert kept == {False: list(range(20)), True: list(range(10, 30))}
    only = store_of(real.train.images[:20], real.train.labels[:20].numpy(), tmp_path / "only" / "images")
    at = label_file(tmp_path / "o" / "labels.parquet", only, logits[:20])
    with pytest.raises(UserError, match="got 20 copies and no other; the real set seems"):
        select.work(Workspace(tmp_path), Selection(remove_copies=True), only, at, given_by_name["real"])


def test_exact_copies_are_at_no_distance_and_the_yardstick_is_made_once(
    real: ImageSet, tmp_path: Path, given_by_name: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real images are compared as 8 bits hold them; these are sixteenths, which 8 bits round."""
    noise = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images, kinds = torch.cat([real.train.images[:20], noise]), real.train.labels[:20].repeat(2).numpy()
    pool = store_of(images, kinds, tmp_path / "images")
    at = label_file(tmp_path / "l" / "labels.parquet", pool, np.zeros((40, CLASSES)))
    made, against = [], CopyTest.against

    def counted(*args: Any, **options: Any) -> CopyTest:
        made.append(1)
        return against(*args, **options)

    monkeypatch.setattr(CopyTest, "against", counted)
    context = context_of(Pool(pool, at), given_by_name, tmp_path)
    score = scorers.TrainDistance().bind(context)
    rows = rows_at(context.pool, np.arange(40))
    assert score(rows)[:20].tolist() == [0.0] * 20
    assert bool((score(rows)[20:] > context.copies.same).all())
    made.clear()
    select.work(Workspace(tmp_path), Selection(remove_copies=True), pool, at, given_by_name["real"])
    assert len(made) == 1


def test_selections_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(UserError, match="keep or per_class, not both"):
        Selection(keep=0.5, per_class=3)
    with pytest.raises(UserError, match="at least 1"):
        Selection(per_class=0)
    assert Selection(score=scorers.Discriminator(), remove_copies=True).needs == ("real",)
    assert Selection(score=scorers.ParameterGradientNorm(), remove_copies=True).needs == ("teacher", "real")
    assert Selection(score=scorers.RobustGradientNorm()).needs == ("encoder",)


def test_as_a_stage_it_is_made_once_by_content(
    store: SyntheticStore, labels: LabelFile, given_by_name: dict[str, Any], tmp_path: Path
) -> None:
    """Test images are withheld from it, and equal inputs at another place are the same."""
    spec = Selection(score=scorers.Separability(of="real"), per_class=2)
    given_now = [given_by_name[name] for name in spec.needs]
    first = Store(tmp_path).once(select, spec, store, labels, *given_now)
    copy = LabelFile(tmp_path / "copy.parquet")
    copy.path.write_bytes(labels.path.read_bytes())
    assert Store(tmp_path).once(select, spec, store, copy, *given_now).digest == first.digest
    assert isinstance(given_by_name["real"].train, Split)


def test_a_pool_is_cut_alike_whatever_is_left_out(store: SyntheticStore, labels: LabelFile, monkeypatch) -> None:
    """Row groups and shards do not move a row; pieces never cross a shard."""
    monkeypatch.setattr(pools, "READ", 7)
    pool = Pool(store, labels, together=6)
    pieces = list(pool.pieces())
    assert [p.start for p in pieces] == np.cumsum([0, *(len(p.labels) for p in pieces)])[:-1].tolist()
    assert sum(len(p.labels) for p in pieces) == COUNT
    bounds = np.cumsum([0, *store.rows])
    for p in pieces:
        assert bounds[p.shard] <= p.start < p.start + len(p.labels) <= bounds[p.shard + 1]
        assert len(p.labels) <= 6
    some = [p for shard in range(1, len(store.rows)) for p in pool.pieces(shard=shard)]
    assert [p.start for p in some] == [p.start for p in pieces if p.shard != 0]
    assert torch.equal(some[0].rows.images, rows_at(pool, some[0].rows.positions.numpy()).images)
