"""Generation in blocks, the Gaussian control, labels and selection."""

import json
import weakref
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gambeson.canonical import digest
from gambeson.data.datasets import Digits, ImageSet
from gambeson.data.mixture import to_uint8
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.errors import UserError
from gambeson.machine import Machine
from gambeson.models.denoiser import VP, load_denoiser
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.robustness.losses import Plain
from gambeson.sampling.contrastive import Debiased, HardNegative, InfoNCE, InfoNCEPaper, SupervisedContrastive
from gambeson.sampling.embedding import FittedEmbedding, PerRunEmbedding
from gambeson.sampling.guidance import Contrastive, DenoisedFeatures, NoisyFeatures, TowardsClass, Window
from gambeson.sampling.levels import NoiseLevels, TimestepLevels
from gambeson.sampling.pairs import OtherClasses, RealNegatives, RealPositives
from gambeson.sampling.samplers import DDIM, DDPM, DPMSolverPP, Euler, Heun
from gambeson.store import Artifact, Store
from gambeson.synthesis.gaussian import GaussianControl, fit_classes, gaussian_control
from gambeson.synthesis.generate import Maker, Sources, fit_embedding, generate
from gambeson.synthesis.generation import Generation, Networks, sample_block
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
    "infonce of the paper": Contrastive(loss=InfoNCEPaper(), strength=1.0, window=WINDOW),
    "debiased": Contrastive(loss=Debiased(), strength=10.0, window=WINDOW, features=DenoisedFeatures()),
    "conditional hnm": Contrastive(
        loss=HardNegative(temperature=0.5, tau_plus=0.0),
        pairs=OtherClasses(),
        strength=1.0,
        window=WINDOW,
        features=DenoisedFeatures(),
    ),
    "real positives": Contrastive(loss=InfoNCE(), pairs=RealPositives(), strength=1.0, window=WINDOW),
    "real negatives, clipped": Contrastive(
        loss=HardNegative(), pairs=RealNegatives(count=30), strength=300.0, window=WINDOW, clip=0.1
    ),
    "supervised": Contrastive(loss=SupervisedContrastive(), pairs=OtherClasses(), strength=1.0, window=WINDOW),
    "embedding": Contrastive(strength=300.0, window=WINDOW, embedding=FittedEmbedding(warmup_blocks=1)),
    "classifier": TowardsClass(strength=1.0, window=WINDOW),
}
SAMPLERS = {
    "heun": Heun(),
    "heun churn": Heun(churn=5.0, guide_second=True),
    "ddim": DDIM(),
    "ddim eta": DDIM(eta=1.0),
    "ddpm small": DDPM(variance="small"),
    "ddpm large": DDPM(variance="large", clip=1.0),
    "euler": Euler(),
    "dpm-solver++": DPMSolverPP(),
}
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


def maker(spec: Generation, real: ImageSet, made, root: Path, seed: int = 5, machine: Machine = Machine()) -> Maker:
    """What samples single blocks of a generation, on networks read from their files."""
    store, denoiser, teacher = made
    guidance = spec.guidance
    fitted = isinstance(guidance, Contrastive) and isinstance(guidance.embedding, FittedEmbedding)
    embedding = store.once(fit_embedding, spec.warm_up, real, denoiser, teacher, seed=0) if fitted else None
    sources = Sources.of(real, denoiser, teacher if guidance is not None else None, embedding)
    writer = StoreWriter(root=root, blocks=99, blocks_per_shard=1)
    return Maker.start(spec, sources.open(spec, machine.device, seed), writer, machine, seed)


class Stopped(Exception):
    """The end of a run at a chosen moment."""


def stop_after(blocks: int):
    def report(stage: str, done: int, total: int) -> None:
        if total and done == blocks:
            raise Stopped

    return report


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_block_is_the_same_whatever_else_is_sampled(
    sampler: str, guidance: str, real: ImageSet, made, tmp_path: Path
) -> None:
    """Bit-identical for every sampler x guidance, alone or after other blocks; the global generator stands still."""
    spec = replace(TINY, sampler=SAMPLERS[sampler], guidance=GUIDANCES[guidance])
    before = torch.get_rng_state()
    alone, labels = maker(spec, real, made, tmp_path).sample(2)
    other = maker(spec, real, made, tmp_path)
    first = other.sample(0)[0]
    again, _ = other.sample(2)
    assert torch.equal(alone, again)
    assert not torch.equal(alone, first)
    assert torch.equal(before, torch.get_rng_state())
    assert 0 <= alone.min() <= alone.max() <= 1
    assert labels is not None
    assert labels.bincount().tolist() == [1] * 10
    if guidance != "none":
        plain, _ = maker(replace(spec, guidance=None), real, made, tmp_path).sample(2)
        assert not torch.equal(plain, alone)


BY_DEFAULT = set(zip(cycle(SAMPLERS), GUIDANCES))
PAIRS = [pytest.param(*p, marks=[] if p in BY_DEFAULT else pytest.mark.slow) for p in product(SAMPLERS, GUIDANCES)]


@pytest.mark.parametrize(("sampler", "guidance"), PAIRS)
def test_a_generation_broken_off_ends_in_the_same_images(
    sampler: str, guidance: str, real: ImageSet, made, tmp_path: Path
) -> None:
    """In shards of different size, the images of blocks sampled alone: every sampler and every guidance (each pair)."""
    spec = replace(TINY, sampler=SAMPLERS[sampler], guidance=GUIDANCES[guidance])
    store, denoiser, teacher = made
    fitted = isinstance(spec.guidance, Contrastive) and spec.guidance.embedding is not None
    embedding = store.once(fit_embedding, spec.warm_up, real, denoiser, teacher, seed=0) if fitted else None
    inputs = (real, denoiser, teacher if spec.guidance is not None else None, embedding)
    for shard, stopped in ((1, 1), (3, 2)):  # broken off after some blocks, in shards of different size, and resumed
        sharded = replace(spec, blocks_per_shard=shard)
        with pytest.raises(Stopped):
            Store(tmp_path, stop_after(stopped)).once(generate, sharded, *inputs, seed=5)
        whole = Store(tmp_path).once(generate, sharded, *inputs, seed=5)
        stored = SyntheticStore.open(whole.folder / "images").verify().read(np.arange(25))[0]
        own = maker(spec, real, made, tmp_path)
        assert np.array_equal(stored, to_uint8(torch.cat([own.sample(b)[0] for b in (0, 1, 2)])[:25]))


@pytest.mark.parametrize(("shard", "workers"), [(1, 1), (2, 1), (5, 1), (1, 2), (2, 3)])
def test_generation_does_not_depend_on_shards_workers_or_interruptions(
    shard: int, workers: int, real: ImageSet, made, tmp_path: Path
) -> None:
    _, denoiser, teacher = made
    store, spec = Store(tmp_path), replace(TINY, guidance=GUIDANCES["hnm"])
    whole = store.once(generate, spec, real, denoiser, teacher, seed=1)
    images, labels = SyntheticStore.open(whole.folder / "images").verify().read(np.arange(25))
    one = maker(spec, real, made, tmp_path / "by hand", seed=1)
    by_hand = [one.sample(b)[0] for b in range(3)]
    assert np.array_equal(images, to_uint8(torch.cat(by_hand)[:25]))
    assert labels.tolist() == [i % 10 for i in range(25)]
    others = Store(tmp_path / "other", machine=Machine(workers=workers))
    other = others.once(generate, replace(spec, blocks_per_shard=shard), real, denoiser, teacher, seed=1)
    assert np.array_equal(SyntheticStore.open(other.folder / "images").verify().read(np.arange(25))[0], images)


PER_RUN = replace(TINY, guidance=Contrastive(strength=300.0, window=WINDOW, embedding=PerRunEmbedding()))


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_authors_embedding_learns_through_a_run_and_resumes_to_the_bit(
    blocks: int, real: ImageSet, made, tmp_path: Path
) -> None:
    """Order-dependent and marked so: block 1 differs from block 1 sampled alone; a broken run goes on as it was."""
    _, denoiser, teacher = made
    whole = Store(tmp_path / "whole").once(generate, PER_RUN, real, denoiser, teacher, seed=1)
    images = SyntheticStore.open(whole.folder / "images").verify()
    assert images.provenance["order_dependent"] is True
    broken = Store(tmp_path / "broken", stop_after(blocks))
    with pytest.raises(Stopped):
        broken.once(generate, PER_RUN, real, denoiser, teacher, seed=1)
    again = Store(tmp_path / "broken").once(generate, PER_RUN, real, denoiser, teacher, seed=1)
    pixels = images.read(np.arange(25))[0]
    assert np.array_equal(SyntheticStore.open(again.folder / "images").read(np.arange(25))[0], pixels)
    assert again.record["attempts"] == 2
    alone = to_uint8(maker(PER_RUN, real, made, tmp_path / "alone", seed=1).sample(1)[0])
    assert not np.array_equal(alone, pixels[10:20])


def test_an_embedding_is_fitted_once_and_frozen(real: ImageSet, made, tmp_path: Path) -> None:
    """Its fit moves the weights, resumes to the bit, and the images that it steers do not depend on their order."""
    _, denoiser, teacher = made
    spec = replace(
        TINY, guidance=Contrastive(strength=300.0, window=WINDOW, embedding=FittedEmbedding(warmup_blocks=2))
    )
    first = Store(tmp_path / "a").once(fit_embedding, spec.warm_up, real, denoiser, teacher, seed=1)
    with pytest.raises(Stopped):
        Store(tmp_path / "b", stop_after(1)).once(fit_embedding, spec.warm_up, real, denoiser, teacher, seed=1)
    second = Store(tmp_path / "b").once(fit_embedding, spec.warm_up, real, denoiser, teacher, seed=1)
    read = [a.file("embedding.safetensors").read_bytes() for a in (first, second)]
    assert read[0] == read[1]
    untouched = replace(spec, guidance=replace(spec.guidance, embedding=FittedEmbedding(warmup_blocks=1)))
    shorter = Store(tmp_path / "a").once(fit_embedding, untouched.warm_up, real, denoiser, teacher, seed=1)
    assert shorter.file("embedding.safetensors").read_bytes() != read[0]
    images = Store(tmp_path / "a").once(generate, spec, real, denoiser, teacher, first, seed=1)
    assert SyntheticStore.open(images.folder / "images").provenance["embedding"] == first.digest


def test_an_embedding_that_was_not_fitted_is_refused(real: ImageSet, made, tmp_path: Path) -> None:
    """Else it would learn on while images are made, and these would depend on the workers."""
    _, denoiser, teacher = made
    spec = replace(TINY, guidance=GUIDANCES["embedding"])
    with pytest.raises(UserError, match="fitted embedding network"):
        Store(tmp_path).once(generate, spec, real, denoiser, teacher, seed=1)
    fitted = Store(tmp_path).once(fit_embedding, spec.warm_up, real, denoiser, teacher, seed=1)
    with pytest.raises(UserError, match="none otherwise"):
        Store(tmp_path).once(generate, PER_RUN, real, denoiser, teacher, fitted, seed=1)


def test_warm_up_images_are_not_those_that_are_kept(real: ImageSet, made, tmp_path: Path, monkeypatch) -> None:
    from gambeson.synthesis import generate as module

    seeds, original = [], module.sample_block

    def watched(*arguments):
        seeds.append(arguments[6])
        return original(*arguments)

    monkeypatch.setattr(module, "sample_block", watched)
    _, denoiser, teacher = made
    spec = replace(TINY, guidance=GUIDANCES["embedding"])
    fitted = Store(tmp_path).once(fit_embedding, spec.warm_up, real, denoiser, teacher, seed=1)
    warm = set(seeds)
    Store(tmp_path).once(generate, spec, real, denoiser, teacher, fitted, seed=1)
    assert len(warm) == 1
    assert not warm & set(seeds[1:])


def test_a_store_finished_under_other_conditions_is_marked(real: ImageSet, made, tmp_path: Path) -> None:
    """METHOD 1.3: micro-batch, threads and device are no part of the recipe, but of what its bits depend on."""
    _, denoiser, _ = made
    with pytest.raises(Stopped):
        Store(tmp_path, stop_after(1)).once(generate, TINY, real, denoiser, None, seed=1)
    mixed = Store(tmp_path, machine=Machine(micro_batch=3)).once(generate, TINY, real, denoiser, None, seed=1)
    assert mixed.record["bit_identical"] is False
    low = replace(TINY, precision="bfloat16")
    assert Store(tmp_path).once(generate, low, real, denoiser, None, seed=1).record["execution"]["dtype"] == "bfloat16"
    whole = Store(tmp_path).once(generate, replace(TINY, count=10), real, denoiser, None, seed=1).record
    assert (whole["bit_identical"], whole["execution"]["dtype"]) == (True, "float32")


def test_portions_reach_every_network(real: ImageSet, made, tmp_path: Path) -> None:
    """No network sees more images at once than --micro-batch says."""
    sizes: list[int] = []
    for guidance in ("hnm", "classifier"):
        one = maker(replace(TINY, guidance=GUIDANCES[guidance]), real, made, tmp_path, machine=Machine(micro_batch=3))
        for network in (one.networks.denoiser, one.networks.encoder):
            first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
            first.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
        one.sample(0)
    assert max(sizes) == 3


def test_classifier_free_guidance_and_precision_act(real: ImageSet, tmp_path: Path) -> None:
    """Scale 1 is the conditional model, others are not; bfloat16 reaches the encoder too."""
    store, fitted = Store(tmp_path), Optimisation(steps=40, batch_size=32, learning_rate=2e-3, momentum=0.0)
    training = DenoiserTraining(network=UNetSpec(width=8), optimisation=fitted, label_dropout=0.3)
    denoiser = load_denoiser(store.once(train_denoiser, training, real, seed=0).file("denoiser.safetensors"))
    x, labels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    scaled = {s: replace(TINY, classifier_free=s).denoise(denoiser)(x, 1.0, labels) for s in (0.0, 1.0, 3.0)}
    assert torch.equal(scaled[1.0], denoiser(x, 1.0, labels))
    assert torch.allclose(scaled[3.0], scaled[0.0] + 3 * (scaled[1.0] - scaled[0.0]), atol=1e-5)
    dtypes = []
    encoder = ResNetSpec(width=4).build(1, 10).eval().requires_grad_(False)
    encoder.norm.register_forward_hook(lambda module, given, out: dtypes.append(given[0].dtype))
    low = replace(TINY, guidance=GUIDANCES["hnm"], precision="bfloat16")
    low.check(Networks(denoiser=denoiser, encoder=encoder))
    assert dtypes == [torch.bfloat16]


def test_levels_beyond_the_training_of_a_model_are_refused(real: ImageSet, tmp_path: Path) -> None:
    fitted = Optimisation(steps=2, batch_size=8, momentum=0.0)
    training = DenoiserTraining(network=UNetSpec(width=8), preconditioning=VP(), optimisation=fitted)
    denoiser = load_denoiser(Store(tmp_path).once(train_denoiser, training, real, seed=0).file("denoiser.safetensors"))
    replace(TINY, levels=TimestepLevels(kind="even", steps=9)).check(Networks(denoiser=denoiser))
    churned = replace(TINY, sampler=Heun(churn=40.0), levels=TimestepLevels(kind="even", steps=9))
    with pytest.raises(UserError, match="highest noise"):
        churned.check(Networks(denoiser=denoiser))
    cosine = replace(TINY, levels=TimestepLevels(kind="even", schedule="cosine", steps=9))
    with pytest.raises(UserError, match="highest noise"):
        cosine.check(Networks(denoiser=denoiser))


def test_memory_does_not_grow_with_steps() -> None:
    """However long the walk, no more than a few of the denoised images are alive at once."""
    alive: dict[int, int] = {}
    for steps in (6, 24):
        spec = replace(TINY, sampler=DDIM(), levels=NoiseLevels(steps=steps))
        made: list[weakref.ref] = []

        def denoise(x, sigma, labels=None, made=made, steps=steps):
            out = x / (1 + sigma**2)
            made.append(weakref.ref(out))
            alive[steps] = max(alive.get(steps, 0), sum(r() is not None for r in made))
            return out

        sample_block(spec, denoise, None, (1, 8, 8), 10, 0, 0)
        assert len(made) == steps
    assert alive[6] == alive[24] <= 4


def test_clipped_guidance_is_counted_in_the_store(real: ImageSet, made, tmp_path: Path) -> None:
    _, denoiser, teacher = made
    spec = replace(TINY, guidance=GUIDANCES["real negatives, clipped"])
    artifact = Store(tmp_path).once(generate, spec, real, denoiser, teacher, seed=1)
    table = pq.read_table(artifact.folder / "images" / "shards" / "00000.parquet")
    assert min(table["guidance_largest_ratio"].to_pylist()) > 0.1
    assert 0 < min(table["guidance_clipped"].to_pylist()) <= max(table["guidance_guided"].to_pylist())
    assert "label" in table.column_names


@pytest.mark.parametrize("guidance", ["none", "hnm", "conditional hnm", "classifier"])
def test_portions_and_precision_change_last_bits_only(guidance: str, real: ImageSet, made, tmp_path: Path) -> None:
    """Micro-batches are the same images to float error; bfloat16 is near, and is part of the recipe's identity."""
    spec = replace(TINY, sampler=DDIM(), levels=TimestepLevels(kind="even", steps=12), guidance=GUIDANCES[guidance])
    whole = maker(spec, real, made, tmp_path).sample(0)[0]
    parts = maker(spec, real, made, tmp_path, machine=Machine(micro_batch=3)).sample(0)[0]
    assert torch.allclose(whole, parts, atol=2e-3)
    low = maker(replace(spec, precision="bfloat16"), real, made, tmp_path).sample(0)[0]
    assert 0 < (whole - low).abs().mean() < 0.05
    assert digest(spec) != digest(replace(spec, precision="bfloat16"))
    assert digest(spec) == digest(replace(spec, precision="float32", classifier_free=None))


def test_classifier_free_guidance_needs_the_null_class(real: ImageSet, made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="label dropout"):
        maker(replace(TINY, classifier_free=2.0), real, made, tmp_path)


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
