"""Generation in blocks, the Gaussian control, labels and selection."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gambeson.data.datasets import Digits, ImageSet
from gambeson.data.mixture import to_uint8
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.errors import UserError
from gambeson.models.denoiser import NetworkDenoiser, load_denoiser
from gambeson.models.resnet import ResNetSpec, load_classifier
from gambeson.models.unet import UNetSpec
from gambeson.randomness import derive
from gambeson.robustness.losses import Plain
from gambeson.sampling.contrastive import ConditionalHardNegative, HardNegative, InfoNCE
from gambeson.sampling.guidance import Contrastive, DenoisedFeatures, NoisyFeatures, TowardsClass, Window
from gambeson.sampling.samplers import DDIM, Heun
from gambeson.store import Artifact, Store
from gambeson.synthesis.gaussian import GaussianControl, fit_classes, gaussian_control
from gambeson.synthesis.generate import Generation, NoiseLevels, generate, sample_block
from gambeson.synthesis.label import ByCondition, ByTeacher, Labeling, label
from gambeson.synthesis.select import Confidence, Entropy, Selection, select, top_per_class
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining, train_classifier
from gambeson.training.diffusion import DenoiserTraining, train_denoiser
from gambeson.training.loop import Optimisation

WINDOW = Window(sigma_min=0.1, sigma_max=5.0)
GUIDANCES = {
    "none": None,
    "infonce": Contrastive(loss=InfoNCE(temperature=0.1), strength=1.0, window=WINDOW, features=NoisyFeatures()),
    "hnm": Contrastive(loss=HardNegative(), strength=10.0, window=WINDOW, features=NoisyFeatures()),
    "conditional hnm": Contrastive(
        loss=ConditionalHardNegative(temperature=0.5), strength=1.0, window=WINDOW, features=DenoisedFeatures()
    ),
    "classifier": TowardsClass(strength=1.0, window=WINDOW),
}
SAMPLERS = {"heun": Heun(), "heun churn": Heun(churn=5.0), "ddim": DDIM(), "ancestral": DDIM(eta=1.0)}
TINY = Generation(count=25, block=10, blocks_per_shard=2, levels=NoiseLevels(steps=4), guidance=None)


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return Digits(train_images=100, validation_images=50).load()


@pytest.fixture(scope="module")
def made(real: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artifact, Artifact]:
    """A store with a briefly trained denoiser and teacher."""
    store = Store(tmp_path_factory.mktemp("synthesis"))
    fitted = Optimisation(steps=40, batch_size=32, learning_rate=2e-3, momentum=0.0)
    denoiser = store.once(
        train_denoiser, DenoiserTraining(network=UNetSpec(width=8), optimisation=fitted), real, seed=0
    )
    spec = ClassifierTraining(
        network=ResNetSpec(width=4), loss=Plain(), optimisation=fitted, validations=1, threat=ThreatModel(epsilon=0.1)
    )
    return store, denoiser, store.once(train_classifier, spec, real, None, seed=0)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_block_is_the_same_whatever_else_is_sampled(sampler: str, guidance: str, real: ImageSet, made) -> None:
    """Bit-identical for every sampler x guidance, alone or after other blocks; the global generator stands still."""
    _, denoiser, teacher = made
    network: NetworkDenoiser = load_denoiser(denoiser.file("denoiser.safetensors"))
    encoder = load_classifier(teacher.file("classifier.safetensors"))
    spec = replace(TINY, sampler=SAMPLERS[sampler], guidance=GUIDANCES[guidance])
    before = torch.get_rng_state()
    alone, labels = sample_block(spec, network, encoder, real.shape, 2, seed=5)
    sample_block(spec, network, encoder, real.shape, 0, seed=5)
    again, _ = sample_block(spec, network, encoder, real.shape, 2, seed=5)
    assert torch.equal(alone, again)
    assert torch.equal(before, torch.get_rng_state())
    assert 0 <= alone.min() <= alone.max() <= 1
    assert labels.bincount().tolist() == [1] * 10
    if guidance != "none":
        plain, _ = sample_block(replace(spec, guidance=None), network, None, real.shape, 2, seed=5)
        assert not torch.equal(plain, alone)


@pytest.mark.parametrize("shard", [1, 2, 5])
def test_generation_does_not_depend_on_shards_or_interruptions(
    shard: int, real: ImageSet, made, tmp_path: Path
) -> None:
    _, denoiser, _ = made
    store = Store(tmp_path)
    whole = store.once(generate, TINY, real, denoiser, None, seed=1)
    images, labels = SyntheticStore.open(whole.folder / "images").verify().read(np.arange(25))
    network = load_denoiser(denoiser.file("denoiser.safetensors"))
    by_hand = [sample_block(TINY, network, None, real.shape, b, derive(1, "generation"))[0] for b in range(3)]
    assert np.array_equal(images, to_uint8(torch.cat(by_hand)[:25]))
    assert labels.tolist() == [i % 10 for i in range(25)]
    other = store.once(generate, replace(TINY, blocks_per_shard=shard), real, denoiser, None, seed=1)
    assert np.array_equal(SyntheticStore.open(other.folder / "images").read(np.arange(25))[0], images)


def test_guidance_that_cannot_act_is_refused_when_the_recipe_is_made() -> None:
    nowhere = replace(GUIDANCES["conditional hnm"], window=Window(sigma_min=1e3, sigma_max=1e4))
    with pytest.raises(ValueError, match="expected at least one guided step"):
        replace(TINY, guidance=nowhere)
    with pytest.raises(ValueError, match="at least 2 images"):
        replace(TINY, block=1, guidance=GUIDANCES["conditional hnm"])
    with pytest.raises(UserError, match=r"generation\.count"):
        replace(TINY, count=0)


def test_gaussian_images_have_each_class_s_moments() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    images = (
        torch.randn(4000, 1, 1, 2, generator=g) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]]) + labels[:, None, None, None]
    )
    means, factors = fit_classes(images, labels, 2, shrinkage=0.0)
    assert torch.allclose(means, torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double(), atol=0.1)
    expected = torch.tensor([[1.0, 0.5], [0.5, 1.25]]).double()
    assert torch.allclose(factors[1] @ factors[1].T, expected, atol=0.1)
    shrunk = fit_classes(images, labels, 2, shrinkage=1.0)[1][1]
    assert torch.allclose(shrunk @ shrunk.T, torch.eye(2).double() * 1.125, atol=0.1)


def test_the_gaussian_control_is_balanced_and_repeats(real: ImageSet, tmp_path: Path) -> None:
    spec = GaussianControl(count=205, block=50, blocks_per_shard=2)
    stores = [
        SyntheticStore.open(
            Store(tmp_path / name).once(gaussian_control, spec, real, seed=s).folder / "images"
        ).verify()
        for name, s in [("a", 1), ("b", 1), ("c", 2)]
    ]
    pixels = [s.read(np.arange(205))[0] for s in stores]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    assert np.bincount(stores[0].labels).tolist() == [21] * 5 + [20] * 5


def test_scores_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]]))
    labels = torch.tensor([0, 2])
    assert Confidence()(labels, logits).exp().tolist() == pytest.approx([0.7, 0.3])
    entropies = [-(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1)), 1.0296530140645737]
    assert (-Entropy()(labels, logits)).tolist() == pytest.approx(entropies)
    assert ByCondition()(labels, logits).tolist() == [0, 2]
    assert ByTeacher()(labels, logits).tolist() == [0, 1]


def test_top_per_class_by_hand_with_ties() -> None:
    scores, labels = np.array([1.0, 3.0, 3.0, 2.0, 9.0, 0.0]), np.array([0, 0, 0, 1, 1, 1])
    assert top_per_class(scores, labels, 2, 1).tolist() == [1, 4]
    assert top_per_class(scores, labels, 2, 2).tolist() == [1, 2, 3, 4]
    assert top_per_class(scores, labels, 3, 5).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("score", "keep"), [(Confidence(), 0.4), (Entropy(), 0.4), (Confidence(), 1.0)])
def test_selection_keeps_the_best_of_each_class(score, keep: float, real: ImageSet, made) -> None:
    store, denoiser, teacher = made
    synthetic = store.once(generate, replace(TINY, count=100), real, denoiser, None, seed=1)
    labelled = store.once(label, Labeling(), synthetic, teacher)
    chosen = store.once(select, Selection(score=score, keep=keep), synthetic, labelled)
    table = pq.read_table(labelled.file("labels.parquet"))
    logits, labels = torch.tensor(table["logits"].to_pylist()), torch.from_numpy(table["label"].to_numpy().copy())
    kept = Chosen.open(chosen.file("chosen.parquet"))
    assert np.bincount(kept.labels, minlength=10).tolist() == [round(keep * 10)] * 10
    scores = score(labels, logits).numpy()
    left = np.setdiff1d(np.arange(100), kept.positions)
    for k in range(10):
        best = scores[kept.positions[kept.labels == k]]
        rest = scores[left[labels[left].numpy() == k]]
        assert not len(rest) or best.min() >= rest.max()
    facts = json.loads(chosen.file("selection.json").read_text())
    assert facts["short"] == {}
    assert 0 <= facts["teacher_agrees_with_condition"] <= 1


def test_a_quota_that_cannot_be_filled_is_reported(real: ImageSet, made) -> None:
    """A teacher's labels are not balanced: classes with too few images are named."""
    store, denoiser, teacher = made
    synthetic = store.once(generate, replace(TINY, count=100), real, denoiser, None, seed=1)
    labelled = store.once(label, Labeling(by=ByTeacher()), synthetic, teacher)
    facts = json.loads(store.once(select, Selection(keep=0.9), synthetic, labelled).file("selection.json").read_text())
    counts = np.bincount(pq.read_table(labelled.file("labels.parquet"))["label"].to_numpy(), minlength=10)
    assert facts["short"] == {str(k): 9 - int(n) for k, n in enumerate(counts) if n < 9}
