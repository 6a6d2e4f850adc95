"""The step to real features: exact heads by hand, prediction against measurement where the world is Gaussian."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gambeson.data.synthetic import StoreWriter, SyntheticStore
from gambeson.errors import UserError
from gambeson.theory.feature_sets import halves, of_images, of_recipe, of_store
from gambeson.theory.features import (
    Features,
    Study,
    agreement,
    all_classes,
    budgets,
    geometry,
    heads,
    logistic,
    measured,
    pairs_of,
    predicted,
    study,
    summarise,
    verdict,
)
from gambeson.theory.gaussian import robust_accuracy


def made(
    means: Tensor, count: int, spread: float, seed: int, name: str = "set", stretch: Tensor | None = None
) -> Features:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(means)).repeat(count)
    noise = torch.randn((len(labels), means.shape[1]), generator=draws, dtype=torch.float64)
    return Features(
        name=name, values=means[labels] + spread * noise * (1 if stretch is None else stretch), labels=labels
    )


MEANS = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 1.0]], dtype=torch.float64)


def test_summaries_by_hand() -> None:
    features = Features(
        name="four", values=torch.tensor([[0.0, 0], [2, 0], [4, 1], [4, 3]]).double(), labels=torch.tensor([0, 0, 1, 1])
    )
    found = summarise(features)
    assert found.means.tolist() == [[1, 0], [4, 2]]
    assert found.covariance.tolist() == [[1, 0], [0, 1]]  # squares 2 and 2 over N - K = 2
    assert found.spread == 1
    theta, middle = heads(found.means)
    assert (theta.tolist(), middle.tolist()) == ([[-1.5, -1]], [[2.5, 1]])
    assert budgets(found, 0.5, "linf").tolist() == pytest.approx([0.5 * 3.25 / 2.5])
    assert budgets(found, 0.5, "l2").tolist() == pytest.approx([0.5 * math.sqrt(3.25)])


def test_measured_heads_by_hand() -> None:
    """theta = (1, 0), midpoint 0, epsilon .5: class 0 (at +1) has margins 1, .4, class 1 -2, -.6, .2."""
    means = torch.tensor([[1.0, 0], [-1.0, 0]]).double()
    values = torch.tensor([[1.0, 5], [0.4, 0], [-2.0, 1], [-0.6, 0], [0.2, 0]]).double()
    held = Features(name="held", values=values, labels=torch.tensor([0, 0, 1, 1, 1]))
    for norm in ("l2", "linf"):
        assert float(measured(held, means, torch.tensor([0.5]).double(), norm)) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert float(measured(held, means, torch.tensor([0.0]).double(), "l2")) == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_all_class_accuracy_is_exact(norm: str) -> None:
    """Images are robust just as far as the nearest other class: moved by a little less none is fooled, by more all."""
    held = made(MEANS, 200, 0.8, 3)
    weights, biases = MEANS, -MEANS.square().sum(1) / 2
    epsilon = 0.4
    logits, y = held.values @ weights.T + biases, held.labels
    fooled = torch.zeros(len(y), dtype=torch.bool)
    for j in range(3):
        w = weights[j] - weights[y]
        step = w.sign() if norm == "linf" else w / w.norm(dim=1, keepdim=True).clamp(min=1e-9)
        moved = (held.values + epsilon * step) @ weights.T + biases
        other = (y != j) & (moved[:, j] >= moved.gather(1, y[:, None])[:, 0])
        fooled |= other
    assert all_classes(held, weights, biases, epsilon, norm) == pytest.approx(1 - float(fooled.double().mean()))
    assert all_classes(held, weights, biases, 0.0, norm) == pytest.approx(
        float((logits.argmax(1) == y).double().mean())
    )


@pytest.mark.parametrize("kind", ["isotropic", "covariance"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_predictions_are_the_papers_formula_where_everything_is_known(kind: str, norm: str) -> None:
    """All images of a set: no noise in theta, and a symmetric pair: equation 7 with theta = mu~."""
    mean = torch.tensor([1.2, -0.4, 0.3]).double()
    real = summarise(made(torch.stack([mean, -mean]), 40_000, 0.9, 1))
    other = summarise(made(torch.stack([1.7 * mean, -1.7 * mean]) + 0.1, 2_000, 0.9, 2))
    shifted_real = real.__class__(
        means=torch.stack([mean, -mean]), covariance=0.81 * torch.eye(3).double(), counts=real.counts
    )
    centred = other.__class__(means=other.means - other.means.mean(0), covariance=other.covariance, counts=other.counts)
    epsilon = budgets(shifted_real, 0.5, norm)
    found = predicted(shifted_real, centred, 2_000, epsilon, norm, kind, 2, torch.Generator())
    told = robust_accuracy(heads(centred.means)[0], mean, epsilon, 0.9, norm)
    assert found.tolist() == pytest.approx(told.tolist(), abs=1e-9)


def test_prediction_meets_measurement_in_a_gaussian_world() -> None:
    """Sets that are nearer, farther and turned: means over pairs agree, differences of the right sign."""
    stretch = torch.tensor([1.5, 0.5, 1.0, 1.0]).double()
    turned = MEANS.roll(1, 1) * 0.5 + MEANS * 0.8
    sets = [made(m, 300, 0.9, i, n, stretch) for i, (m, n) in enumerate([(MEANS, "same"), (turned, "turned")])]
    spec = Study(counts=(5, 100), repeats=10, logistic=2, draws=200)
    found = study(made(MEANS, 2000, 0.9, 10, "world", stretch), made(MEANS, 2000, 0.9, 11, "held", stretch), sets, spec)
    assert len(found["results"]) == 2 * 2 * 2
    for result in found["results"]:
        for row in result["sets"]:
            error = 4 * row["deviation"] / math.sqrt(10) + 0.01
            assert row["covariance"]["predicted"] == pytest.approx(row["measured"], abs=error)
        (compared,) = result["comparisons"]
        assert (compared["a"], compared["b"]) == ("turned", "same")
        if result["count"] == 100:
            assert compared["measured"] < 0
            assert compared["covariance"]["predicted"] < 0
            assert compared["covariance"]["same_sign"] == 1
    assert found["verdict"]["clear"] >= 4
    assert found["verdict"]["covariance"]["right"] == found["verdict"]["clear"]


def test_geometry_of_known_sets() -> None:
    world = summarise(made(MEANS, 20_000, 1.0, 0))
    found = geometry(world, summarise(made(1.5 * MEANS, 20_000, 0.5, 1)))
    assert found["c"] == pytest.approx(1.5, abs=0.02)
    assert found["degrees"] < 1.5
    assert found["spread"] == pytest.approx(0.5, abs=0.01)


def test_agreement_by_hand() -> None:
    told, seen = torch.tensor([1.0, -1.0, 2.0]).double(), torch.tensor([0.5, 0.1, 0.9]).double()
    found = agreement(told, seen, 3)
    assert found["same_sign"] == pytest.approx(2 / 3)
    assert found["range"] == [0, 1]  # leaving out class 0, 1, 2 leaves pair 12, 02, 01
    assert found["spearman"] == pytest.approx(1)
    assert agreement(told, torch.ones(3).double(), 3)["spearman"] is None
    assert pairs_of(3)[0].tolist() == [0, 0, 1]


def test_a_verdict_counts_clear_differences() -> None:
    def compared(measured: float, predicted: float) -> dict:
        kinds = {k: {"predicted": predicted, "same_sign": 0.5} for k in ("isotropic", "covariance")}
        return {"measured": measured, "deviation": 0.01, **kinds}

    found = verdict([{"comparisons": [compared(0.03, 0.01), compared(-0.03, 0.01), compared(0.015, 0.01)]}])
    assert (found["comparisons"], found["clear"], found["isotropic"]["right"]) == (3, 2, 1)
    assert found["covariance"]["same_sign"] == pytest.approx(0.5)


def test_logistic_heads_of_two_classes_have_two_rows() -> None:
    features = made(MEANS[:2], 50, 0.5, 0)
    weights, biases = logistic(features, 30, torch.Generator().manual_seed(0))
    assert (weights.shape, biases.shape) == ((2, 4), (2,))
    assert all_classes(features, weights, biases, 0.0, "l2") > 0.95


class Halved:
    """A classifier of the digits whose features are its pixels, halved."""

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 2

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 3).float()


def test_features_of_images_and_halves() -> None:
    images, labels = torch.rand(1201, 1, 2, 2), torch.arange(1201) % 3
    found = of_images("test", Halved(), images, labels)
    assert torch.allclose(found.values, images.flatten(1).double() / 2)
    world, held = halves(found)
    assert len(world.values) + len(held.values) == 1201
    assert (world.counts - held.counts).abs().max() <= 1
    both = torch.cat([world.values, held.values])
    assert torch.equal(both.sum(1).sort().values, found.values.sum(1).sort().values)


def test_features_of_a_store_take_its_labels_or_the_models(tmp_path: Path) -> None:
    pixels = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2, 1)
    for name, labels in (("known", [0, 1, 0, 1, 0, 1]), ("unknown", [-1] * 6)):
        writer = StoreWriter(root=tmp_path / name, blocks=1, blocks_per_shard=1)
        writer.put(0, pixels, np.array(labels))
        writer.finish({})
        store = SyntheticStore.open(tmp_path / name)
        if name == "known":
            found = of_store(name, Halved(), store)
            assert found.labels.tolist() == labels
            assert torch.allclose(found.values, torch.from_numpy(pixels.reshape(6, 4)).double() / 510)
        else:  # the model calls everything class 0, and one class is no question
            with pytest.raises(UserError, match="two classes"):
                of_store(name, Halved(), store)


@pytest.mark.slow
def test_a_tiny_recipe_goes_all_the_way(tmp_path: Path) -> None:
    """The tiny recipe of the story's test: every stage made, every set compared."""
    from gambeson.store import Store
    from tests.tiny import tiny_recipe

    found = of_recipe(tiny_recipe(), Store(tmp_path).once)
    assert list(found["images"]) == ["real", "plain", "guided"]
    assert found["results"]
    assert np.isfinite([s["measured"] for r in found["results"] for s in r["sets"]]).all()


@pytest.mark.parametrize(
    ("values", "labels", "words"),
    [
        (torch.tensor([[math.nan, 0.0], [0, 0], [1, 1], [1, 1]]), [0, 0, 1, 1], "finite"),
        (torch.zeros(4, 2), [0, 0, 1], "label for each row"),
        (torch.zeros(4, 2), [0, 0, 0, 0], "two classes"),
        (torch.zeros(4, 2), [0, 0, 0, 1], "two images of each class"),
        (torch.zeros(4), [0, 0, 1, 1], "features [N, D]"),
    ],
)
def test_bad_features_are_told(values: Tensor, labels: list[int], words: str) -> None:
    with pytest.raises(UserError) as error:
        Features(name="broken", values=values.double(), labels=torch.tensor(labels))
    assert words in str(error.value)
    assert "broken" in str(error.value)


@pytest.mark.parametrize(
    "fields", [{"counts": ()}, {"counts": (0,)}, {"shares": (1.0,)}, {"shares": ()}, {"repeats": 1}, {"logistic": 1}]
)
def test_bad_studies_are_told(fields: dict) -> None:
    with pytest.raises(UserError):
        Study(**fields)


def test_sets_of_another_dimension_are_refused() -> None:
    with pytest.raises(UserError, match="dimension and classes"):
        study(made(MEANS, 5, 1, 0), made(MEANS, 5, 1, 1), [made(MEANS[:, :3], 5, 1, 2)])
