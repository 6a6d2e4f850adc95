"""Randomised smoothing: bounds by hand and by exact sums, radii against linear networks, draws, resuming, command."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import binom, binomtest, kstest, norm
from torch import nn

from gambeson import randomness
from gambeson.certify import certify
from gambeson.data.datasets import Digits
from gambeson.errors import EnvironmentFault, UserError
from gambeson.models.classifiers import classifier_header
from gambeson.models.files import load_tensors, save_tensors
from gambeson.models.resnet import ResNetSpec
from gambeson.processes import pool
from gambeson.randomness import gaussian, generator, image_keys, uniform
from gambeson.report import delivery
from gambeson.robustness.certificates import (
    ROWS,
    SECONDS,
    SUMMARY,
    Certification,
    SavedClassifier,
    average_radius,
    certified_accuracy,
)
from gambeson.robustness.losses import GaussianNoise, Plain
from gambeson.robustness.smoothing import ABSTAIN, Smoothing, lower_bound, radius_of, two_sided
from gambeson.store import Store
from gambeson.training.classifier import ClassifierTraining, train_classifier
from gambeson.training.loop import Optimisation

ROOT = Path(__file__).parent.parent


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    """Images -> W x + b."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return nn.Sequential(nn.Flatten(), layer).eval()


def half_space(direction: torch.Tensor, through: torch.Tensor) -> nn.Module:
    """Two classes, 1 on the side of the boundary through a point to which `direction` points."""
    return linear(torch.stack([-direction, direction]), torch.stack([direction @ through, -direction @ through]))


def draws(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *shape, generator=generator(seed, "test"))


# The statistics


def test_bounds_by_hand() -> None:
    """n = 2: one of two, P(X >= 1) = 1 - (1 - p)^2 = alpha; two of two, p^2 = alpha; none, 0. And the paper's n."""
    found = lower_bound(torch.tensor([0, 1, 2]), 2, 0.19)
    torch.testing.assert_close(found, double(0.0, 0.1, math.sqrt(0.19)), rtol=0, atol=1e-12)
    all_of_them = lower_bound(torch.tensor([100_000]), 100_000, 0.001)
    assert all_of_them.item() == pytest.approx(0.99993092, abs=1e-8)
    assert radius_of(all_of_them, 0.25).item() == pytest.approx(Smoothing().largest_radius)
    assert Smoothing().largest_radius == pytest.approx(0.25 * 3.8115, abs=1e-4)


def test_radius_by_hand() -> None:
    """Phi(1) = .8413447 and Phi(2) = .9772499 lie one and two sigmas from the boundary; up to 1/2 there is nothing."""
    found = radius_of(double(0.0, 0.3, 0.5, 0.8413447460685429, 0.9772498680518208), 0.5)
    torch.testing.assert_close(found, double(0.0, 0.0, 0.0, 0.5, 1.0), rtol=0, atol=1e-12)


def test_a_certificate_by_hand() -> None:
    """n = 1, alpha = .16: a vote for the candidate bounds p_A by .16, too little; alpha = .84: by .84, .9945 sigma."""
    smoothing = Smoothing(sigma=2.0, samples_select=3, samples=1, alpha=0.84)
    selection = torch.tensor([[1, 2, 0], [1, 2, 0], [0, 0, 3]])
    found = smoothing.judge(selection, torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]]))
    assert found.predicted.tolist() == [1, ABSTAIN, 2]
    assert found.candidate.tolist() == [1, 1, 2]
    torch.testing.assert_close(found.p_lower, double(0.84, 0.0, 0.84))
    torch.testing.assert_close(found.radius, double(*(2 * x for x in (0.994457883, 0.0, 0.994457883))))
    assert (replace(smoothing, alpha=0.16).judge(selection, found.votes).predicted == ABSTAIN).all()


@pytest.mark.parametrize("n", [1, 7, 100])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_the_bound_errs_as_often_as_promised(n: int, alpha: float) -> None:
    """Exactly, by summing over all outcomes, for probabilities on a grid; and it is the largest such bound."""
    bounds = lower_bound(torch.arange(n + 1), n, alpha).numpy()
    assert (np.diff(bounds) > 0).all()
    for p in np.linspace(0.01, 0.99, 99):
        assert binom.pmf(np.flatnonzero(bounds > p), n, p).sum() <= alpha * (1 + 1e-9)
    exceeded = [binom.sf(k - 1, n, bounds[k]) for k in range(1, n + 1)]  # at its own value it errs with alpha
    np.testing.assert_allclose(exceeded, alpha, rtol=1e-8)


def test_the_binomial_test_is_scipys() -> None:
    pairs = [(0, 0), (3, 3), (9, 1), (1, 9), (60, 40), (0, 7), (99_000, 500)]
    first, second = torch.tensor(pairs).unbind(1)
    expected = [1.0 if a + b == 0 else binomtest(a, a + b).pvalue for a, b in pairs]
    np.testing.assert_allclose(two_sided(first, second).numpy(), expected, rtol=1e-9, atol=1e-300)


def test_coverage_over_repeated_runs() -> None:
    """One image whose probability is known, 2,000 runs with noise of their own, one error in 20 allowed."""
    smoothing = Smoothing(sigma=0.3, samples_select=1, samples=200, alpha=0.05)
    image, true = torch.full((1, 1, 1, 2), 0.5), norm.cdf(0.2 / 0.3)
    model = half_space(torch.tensor([0.6, 0.8]), image.flatten() - 0.2 * torch.tensor([0.6, 0.8]))
    keys = torch.arange(2000) * 977
    votes = smoothing.votes(model, image.expand(2000, 1, 1, 2), keys, "coverage", 200)
    wrong = int((lower_bound(votes[:, 1], 200, 0.05) > true).sum())
    expected = binom.sf(np.flatnonzero(lower_bound(torch.arange(201), 200, 0.05).numpy() > true)[0] - 1, 200, true)
    assert 0.02 < expected <= 0.05
    assert binom.ppf(0.0005, 2000, expected) <= wrong <= binom.ppf(0.9995, 2000, expected)


# The smoothed classifier


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_radii_against_linear_networks(classes: int, alpha: float) -> None:
    """No certified radius exceeds the distance to the boundary, but for one image in 1 / alpha.

    With several classes the region of one is a polytope, which the half-space of its nearest face contains: the
    distance to that face bounds the radius. With two there is nothing else, and the radius comes close to it.
    """
    smoothing = Smoothing(sigma=0.25, samples_select=20, samples=400, alpha=alpha)
    images = draws(1000, 1, 2, 2)
    weight = draws(classes, 4, seed=1) - 0.5
    bias = -weight @ torch.full((4,), 0.5)
    found = smoothing.certify(linear(weight, bias), images)
    scores = images.flatten(1).double() @ weight.double().T + bias.double()
    clear = found.predicted != ABSTAIN
    gap = scores.gather(1, found.candidate[:, None]) - scores
    apart = (weight.double()[found.candidate][:, None] - weight.double()).norm(dim=2)
    faces = torch.where(apart > 0, gap / apart.clamp_min(1e-12), math.inf)
    distance = faces.amin(1)  # below 0 where the candidate is another class than the network's
    exceeding = int((clear & (found.radius > distance)).sum())
    assert exceeding <= binom.ppf(0.999, 1000, alpha)
    assert clear.float().mean() > 0.4
    if classes == 2:
        assert exceeding >= binom.ppf(0.001, int(clear.sum()), alpha / 3), "a bound that never errs is too small"
        sure = clear & (distance > 0.1) & (distance < 0.4)
        assert (found.radius[sure] / distance[sure]).median() > 0.7


def test_it_abstains_where_no_class_has_half() -> None:
    """On the boundary of two classes, at the corner of three; predictions too, but for one in 1 / alpha."""
    smoothing = Smoothing(samples_select=50, samples=300, alpha=0.01)
    centre = torch.full((1, 1, 1, 2), 0.5)
    angles = torch.tensor([0.0, 1.0, 2.0]) * 2 * math.pi / 3
    corner = torch.stack([angles.cos(), angles.sin()], 1)
    three = linear(corner, -corner @ torch.full((2,), 0.5))
    two = half_space(torch.tensor([1.0, 0.0]), torch.full((2,), 0.5))
    for model, never in ((two, False), (three, True)):
        found = [smoothing.certify(model, centre, seed) for seed in range(60)]
        certified = sum(int(f.predicted != ABSTAIN) for f in found)
        assert certified <= (0 if never else binom.ppf(0.999, 60, 0.01))
        assert all(f.radius == 0 for f in found if f.predicted == ABSTAIN)
        assert all((f.predicted == ABSTAIN) == (f.p_lower <= 0.5) for f in found)
        said = sum(int(smoothing.predict(model, centre, seed) != ABSTAIN) for seed in range(60))
        assert said <= binom.ppf(0.999, 60, 0.01)
    right = torch.tensor([0.9, 0.5]).reshape(1, 1, 1, 2)
    assert smoothing.predict(three, right).tolist() == [0]
    assert smoothing.predict(two, right).tolist() == [1]


def small_network() -> nn.Module:
    """Untrained, its bias such that all classes get votes under noise."""
    model = ResNetSpec(width=4).build(1, 10, seed=3).eval().requires_grad_(False)
    model.logits.bias -= model(draws(200, 1, 8, 8)).mean(0)  # type: ignore[operator]
    return model


def test_votes_do_not_depend_on_batches_order_or_company() -> None:
    """Batches of 1, 7, 64 and 1,000 copies; the images the other way round; one alone."""
    smoothing, images = Smoothing(samples_select=5, samples=30, alpha=0.05), draws(5, 1, 8, 8)
    model = small_network()
    whole = smoothing.certify(model, images, 4)
    assert ((whole.votes > 0).sum(1) >= 2).all(), "votes that agree would show nothing"
    for size in (1, 7, 64):
        found = replace(smoothing, batch_size=size).certify(model, images, 4)
        assert torch.equal(found.votes, whole.votes)
        assert torch.equal(found.selection, whole.selection)
        assert torch.equal(found.radius, whole.radius)
    assert torch.equal(smoothing.certify(model, images.flip(0), 4).votes.flip(0), whole.votes)
    assert torch.equal(smoothing.certify(model, images[2:3], 4).votes[0], whole.votes[2])
    assert torch.equal(smoothing.predict(model, images, 4), replace(smoothing, batch_size=7).predict(model, images, 4))


def test_each_round_and_each_seed_has_draws_of_its_own() -> None:
    """The copies that choose the class are not among those that bound its probability."""
    seen: list[torch.Tensor] = []

    def watching(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.flatten(1))
        return torch.zeros(len(x), 2)

    smoothing, images = Smoothing(sigma=0.5, samples_select=20, samples=20), draws(2, 1, 3, 3)
    for seed in (0, 1):
        smoothing.certify(watching, images, seed)
        smoothing.predict(watching, images, seed)
    copies = torch.cat(seen)
    assert len(copies) == len(copies.unique(dim=0)) == 2 * 3 * 40
    assert copies.min() < 0, "the noise is not clamped"
    assert copies.max() > 1
    noise_alone = torch.cat([seen[0][:20] - images[0].flatten(), seen[0][20:] - images[1].flatten()])
    assert noise_alone.std().item() == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Smoothing(sigma=0.0), "sigma: expected above 0"),
        (lambda: Smoothing(sigma=math.nan), "sigma"),
        (lambda: Smoothing(samples_select=0), "samples_select: expected at least 1"),
        (lambda: Smoothing(samples=0), "samples: expected at least 1"),
        (lambda: Smoothing(alpha=0.0), "alpha: expected a probability"),
        (lambda: Smoothing(alpha=1.0), "alpha: expected a probability"),
        (lambda: Smoothing(batch_size=0), "batch_size"),
        (lambda: Certification(images=0), "images: expected at least 1"),
        (lambda: GaussianNoise(sigma=-0.1), "GaussianNoise sigma: expected above 0"),
        (lambda: Smoothing().certify(small_network(), draws(2, 1, 8, 8) * 255), r"expected values in \[0, 1\]"),
        (lambda: Smoothing().predict(small_network(), draws(2, 1, 8, 8) - 0.5), r"expected values in \[0, 1\]"),
        (lambda: Smoothing().certify(small_network(), draws(2, 1, 8, 8)[:0]), "at least one image"),
        (lambda: Smoothing().certify(small_network().train(), draws(2, 1, 8, 8)), "eval mode"),
        (lambda: Smoothing().certify(lambda x: x.sum((1, 2, 3))[:, None], draws(2, 1, 8, 8)), "2 classes"),
        (lambda: Smoothing().certify(lambda x: x.flatten(1) / 0, draws(2, 1, 8, 8)), "finite"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# The draws


def test_the_words_are_those_of_the_uniform_draws() -> None:
    keys, copies = torch.tensor([5, -7, 2**62, 5]), torch.tensor([0, 3, 3, 99_999])
    words = randomness._words(keys, "purpose", copies, 9)
    for i in range(4):
        expected = uniform(keys[i : i + 1], "purpose", (9,), int(copies[i]))[0]
        assert torch.equal(((words[i] >> 11) & (2**53 - 1)).double() * 2.0**-53, expected)


def test_the_draws_are_normal_and_independent() -> None:
    """Neighbours in a word (cosine and sine), pixels, copies and keys."""
    x = gaussian(torch.arange(400), "normal", (3, 5, 7), torch.arange(400) % 20).flatten(1)
    assert x.shape == (400, 105)
    assert kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest((x * x).sum(1).numpy(), "chi2", args=(105,)).pvalue > 1e-3
    count = x.numel()
    for other in (x.roll(1, 0), x.roll(1, 1), x.roll(53, 1), x.flip(1)):
        assert abs(float((x * other).mean())) < 4.5 / math.sqrt(count / 2)
        assert abs(float(((x * x - 1) * (other * other - 1)).mean()) / 2) < 4.5 / math.sqrt(count / 2)


def test_a_draw_belongs_to_its_image_purpose_and_number() -> None:
    images = draws(3, 1, 2, 3)
    keys = image_keys(images, torch.zeros(3, dtype=torch.int64))
    one = gaussian(keys, "a", (1, 2, 3), torch.tensor([4, 4, 4]))
    assert torch.equal(gaussian(keys[[2, 0]], "a", (1, 2, 3), torch.tensor([4, 4])), one[[2, 0]])
    for other in (gaussian(keys, "b", (1, 2, 3), torch.tensor([4, 4, 4])), gaussian(keys, "a", (1, 2, 3), keys * 0)):
        assert not (one == other).any()


# Certified accuracy


def test_certified_accuracy_by_hand() -> None:
    right, radius = np.array([True, True, False, True]), np.array([0.0, 0.3, 0.9, 0.5])
    shares = [certified_accuracy(right, radius, r).estimate for r in (0.0, 0.3, 0.31, 0.5, 0.6)]
    assert shares == [0.75, 0.5, 0.25, 0.25, 0.0]
    interval = certified_accuracy(right, radius, 0.3)  # Wilson, 2 of 4: .5 +- z / (1 + z^2/4) sqrt(1/16 + z^2/64)
    assert (interval.low, interval.high) == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert average_radius(right, radius) == pytest.approx(0.2)


# The training


def test_the_loss_is_that_of_images_with_noise() -> None:
    images, labels, model = draws(40, 1, 8, 8), torch.arange(40) % 10, small_network()
    loss = GaussianNoise(loss=Plain(label_smoothing=0.1), sigma=0.5)
    noisy = loss.adversarial(model, images, labels, generator(7, "noise"))
    drawn = ((noisy - images) / 0.5).flatten()
    assert kstest(drawn.numpy(), "norm").pvalue > 1e-3
    expected = Plain(label_smoothing=0.1)(model, noisy, labels)
    assert torch.equal(loss(model, images, labels, generator(7, "noise")), expected)
    assert torch.equal(loss(model, images, labels), loss(model, images, labels, torch.Generator().manual_seed(0)))
    assert loss.at(0.3) == loss


def test_processes_that_share_a_batch_draw_the_same_noise() -> None:
    """The second process skips one uniform draw for every pixel before its own, as batches do."""
    images, labels, loss = draws(5, 1, 3, 3), torch.zeros(5, dtype=torch.int64), GaussianNoise()
    whole = loss.adversarial(nn.Identity(), images, labels, generator(1, "shared"))
    given = generator(1, "shared")
    torch.rand(3 * 9, generator=given)
    assert torch.equal(loss.adversarial(nn.Identity(), images[3:], labels[3:], given), whole[3:])


def test_the_noise_is_finite_at_the_ends_of_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0.0, 1 - 2.0**-24, 0.5]).reshape(1, 1, 1, 3)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: ends)
    found = GaussianNoise(sigma=1.0).adversarial(nn.Identity(), torch.zeros(1, 1, 1, 3), torch.tensor([0])).flatten()
    assert found[:2].tolist() == pytest.approx([norm.ppf(2.0**-25), norm.isf(2.0**-25)], rel=1e-5)
    assert abs(float(found[2])) < 1e-6


def test_training_with_noise_says_so(tmp_path: Path) -> None:
    """In its header; validation measures accuracy under noise too. Without noise nothing is said."""
    real = Digits(train_images=100, validation_images=50).load()
    fitted = Optimisation(steps=4, batch_size=32)
    spec = ClassifierTraining(
        network=ResNetSpec(width=4), loss=GaussianNoise(sigma=0.3), optimisation=fitted, validations=2
    )
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="threat"):
        store.once(train_classifier, spec, real, None, seed=0)  # the validation's attack needs one
    from gambeson.recipe import fill_threat
    from gambeson.threat import ThreatModel

    headers = []
    for loss in (spec.loss, Plain()):
        filled = fill_threat(replace(spec, loss=loss), ThreatModel(epsilon=0.1))
        made = store.once(train_classifier, filled, real, None, seed=0)
        headers.append(load_tensors(made.file("classifier.safetensors"))[1])
    assert headers[0]["noise"] == 0.3
    assert all(0 <= record["noisy"] <= 1 for record in headers[0]["log"])
    assert "noise" not in headers[1]
    assert "noisy" not in headers[1]["log"][0]


# The command


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A classifier.safetensors of digits, in the folder that the test works in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GAMBESON_DATA", raising=False)
    monkeypatch.delenv("GAMBESON_RUNS", raising=False)
    model = small_network()
    save_tensors(tmp_path / "net.safetensors", model.state_dict(), classifier_header(model, (1, 8, 8)))  # type: ignore[arg-type]
    return "net.safetensors"


def rows(runs: Path) -> dict[str, list]:
    """The reproducible columns of the one certification below a runs folder."""
    (path,) = runs.glob(f"stages/certify_images/*/{ROWS}")
    return pq.read_table(path).drop_columns([SECONDS]).to_pydict()


def test_the_command(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, rows, summary, hint; asked again it is there already."""
    words = [saved, "--data", "digits", "--n", "200", "--n0=10", "--images", "20", "--sigma", "0.5", "--workers", "1"]
    certify([*words, "--seed", "3", "--out", "out/here"])
    told = capsys.readouterr()
    assert "20 test images of digits, sigma 0.5, n 200, n0 10, alpha 0.001" in told.out
    assert "nothing says that net.safetensors was trained with noise" in told.err
    table, facts = pq.read_table(f"out/here/{ROWS}"), json.loads(Path("out/here/summary.json").read_text())
    part = Digits().load().test
    at = table["index"].to_pylist()
    assert (len(at), at[0], at[-1]) == (20, 0, len(part) - 1)
    assert table["label"].to_pylist() == part.labels[at].tolist()
    assert table["clean"].to_pylist() == small_network()(part.images[at]).argmax(1).tolist()
    whole = Smoothing(sigma=0.5, samples=200, samples_select=10).certify(small_network(), part.images[at], 3)
    assert table["votes"].to_pylist() == whole.votes.tolist()
    assert table["radius"].to_pylist() == whole.radius.tolist()
    assert all(s > 0 for s in table[SECONDS].to_pylist())
    right = (whole.predicted == part.labels[at]).numpy()
    for point in facts["certified"]:
        assert point["estimate"] == (right & (whole.radius.numpy() >= point["radius"])).mean()
    assert [p["radius"] for p in facts["certified"]][:3] == [0.0, 0.25, 0.5]
    assert facts["abstained"]["estimate"] == (whole.predicted == ABSTAIN).double().mean().item()
    certify([*words, "--seed", "3"])
    assert "there already" in capsys.readouterr().out
    certify([*words, "--seed", "3", "--out", "out/here"])
    assert "there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"out/here: expected a new folder, .*got another result's"):
        certify([*words, "--seed", "4", "--out", "out/here"])


def test_a_delivery_that_was_killed_goes_on(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rows, with half a summary; made again elsewhere it is the same, though its seconds are others."""
    words = [saved, "--data", "digits", "--n", "20", "--n0", "5", "--images", "4", "--workers", "1", "--out", "out"]
    copied = delivery.shutil.copyfile

    def killed(source: Path, target: Path) -> None:
        if source.name == SUMMARY:
            target.write_text("{")
            raise KeyboardInterrupt
        copied(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(delivery.shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            certify(words)
    Path("out/.summary.json.4194303.part").touch()  # what SIGKILL leaves of a file
    for runs in ("runs", "elsewhere"):
        certify([*words, "--runs", runs])
        assert {path.name for path in Path("out").iterdir()} == {"digest.json", ROWS, SUMMARY}
        assert json.loads(Path("out", SUMMARY).read_text())["images"] == 4
        (made,) = Path(runs).glob(f"stages/*/*/{ROWS}")
        assert made.read_bytes() == Path("out", ROWS).read_bytes()


def test_an_archive_of_test_images_alone(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As `gambeson evaluate` takes it: bytes or fractions, [N, H, W] too; all images of another with --all-images."""
    part = Digits().load().test
    pixels, labels = part.images[:9, 0].numpy(), part.labels[:9].numpy()
    np.savez("float.npz", x_test=pixels, y_test=labels)
    np.savez("bytes.npz", x_test=(pixels * 255).round().astype(np.uint8), y_test=labels)
    np.savez("all.npz", images=pixels, labels=labels)
    few = ["--n", "20", "--n0", "5", "--workers", "1"]
    for name, more in (("float", []), ("bytes", []), ("all", ["--all-images"])):
        certify([saved, "--data", f"{name}.npz", *more, *few, "--runs", name])
        assert f"9 test images of {name}" in capsys.readouterr().out
        assert rows(Path(name))["label"] == labels.tolist()
    with pytest.raises(UserError, match=r"--all-images: expected an \.npz file"):
        certify([saved, "--data", "digits", "--all-images", *few])
    np.savez("large.npz", x_test=np.zeros((4, 16, 16)), y_test=np.arange(4))
    with pytest.raises(UserError, match=r"expected a classifier of large's images, \(1, 16, 16\) in 10 classes, got"):
        certify([saved, "--data", "large.npz", *few])


def test_a_lack_of_memory_is_the_machines_fault(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Smoothing, "votes", hungry)
    words = [saved, "--data", "digits", "--n", "20", "--images", "4", "--workers", "1", "--micro-batch", "9"]
    with pytest.raises(EnvironmentFault, match=r"enough memory, got: MemoryError.*--micro-batch, now 9"):
        certify(words)


def test_a_damaged_part_is_named(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that were finished before; removed, it alone is made again."""
    words = [saved, "--data", "digits", "--n", "20000", "--images", "3", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "gambeson.robustness.certificates.table_at", lambda path: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            certify(words)
    (part,) = Path("runs").glob("stages/*/*/parts/000001.parquet")
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(EnvironmentFault, match=r"000001\.parquet: expected a Parquet table .*damaged.*Remove it"):
        certify(words)
    part.unlink()
    certify(words)


def test_workers_are_sent_no_image(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They map a file: a tensor would take a descriptor and shared memory of each."""
    sent = []

    @contextmanager
    def watched(workers: int) -> Iterator[Any]:
        with pool(workers) as executor:
            submit = executor.submit
            executor.submit = lambda work, *given: sent.append((work, given)) or submit(work, *given)  # type: ignore
            yield executor

    monkeypatch.setattr("gambeson.robustness.certificates.pool", watched)
    certify([saved, "--data", "digits", "--n", "20000", "--images", "4", "--workers", "2"])
    assert len(sent) == 2
    for each in sent:
        assert b"torch._utils" not in pickle.dumps(each), "a tensor"
        assert len(pickle.dumps(each)) < 5000


def test_the_hint_knows_the_noise_of_the_training(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the file's header, or by a folder's config."""
    model = small_network()
    header = {**classifier_header(model, (1, 8, 8)), "noise": 0.25}  # type: ignore[arg-type]
    trained = tmp_path / "trained" / "classifier.safetensors"
    save_tensors(trained, model.state_dict(), header)
    model.save_pretrained(tmp_path / "folder", shape=(1, 8, 8), noise=0.25)  # type: ignore[operator]
    few = ["--data", "digits", "--n", "20", "--images", "2", "--workers", "1"]
    for place in (str(trained), "folder"):
        certify([place, *few])
        assert capsys.readouterr().err == ""
    certify(["folder", *few, "--sigma", "0.5"])
    assert "trained with noise of sigma 0.25; certify it with --sigma 0.25" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "digits"], "expected a classifier first"),
        (["net.safetensors"], "--data: expected an image set"),
        (["net.safetensors", "--data", "digitz"], "digits"),
        (["nowhere", "--data", "digits"], "classifier: expected a folder that `gambeson train` wrote"),
        (["net.safetensors", "--data", "digits", "--sigma", "0"], "sigma: expected above 0"),
        (["net.safetensors", "--data", "digits", "--sigma", "x"], "--sigma: expected a number"),
        (["net.safetensors", "--data", "digits", "--n", "0"], "--n: expected a whole number above 0"),
        (["net.safetensors", "--data", "digits", "--n0", "-1"], "--n0: expected a whole number above 0"),
        (["net.safetensors", "--data", "digits", "--alpha", "1"], "alpha: expected a probability"),
        (["net.safetensors", "--data", "digits", "--images", "0"], "--images: expected a whole number above 0"),
        (["net.safetensors", "--data", "digits", "--out", "net.safetensors"], "--out: expected a path where nothing"),
        (["net.safetensors", "--data", "digits", "--compile"], "--compile"),
        (["net.safetensors", "--data", "digits", "--epochs", "3"], "epochs"),
        (["net.safetensors", "--data", "colour.npz"], "expected a classifier of"),
    ],
)
def test_a_mistake_in_the_words_is_named(saved: str, words: list[str], message: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(Path("colour.npz"), image=pixels, label=np.arange(60) % 3)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        certify(words)
    assert not Path("runs").exists()


def test_labels_that_the_network_does_not_know(saved: str) -> None:
    from gambeson.data.imageset import Split
    from gambeson.robustness.certificates import certificate_rows

    part = Split(draws(2, 1, 8, 8), torch.tensor([3, 10]))
    with pytest.raises(UserError, match="labels: expected class indices from 0 to 9"):
        certificate_rows(Smoothing(samples=10), SavedClassifier(saved).load(), part, np.arange(2), 0)


def test_killed_and_resumed_by_two_workers_it_ends_in_the_same_rows(
    saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL after some images; what was finished is not done again; one process, undisturbed, gets the same rows."""
    words = [saved, "--data", "digits", "--n", "32000", "--images", "8"]
    certify([*words, "--workers", "1", "--runs", "whole"])
    assert all(np.count_nonzero(votes) >= 2 for votes in rows(Path("whole"))["votes"])
    code = "import sys; from gambeson.certify import certify; certify(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--workers", "1", "--runs", "killed"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(finished := sorted(Path("killed").glob("stages/*/*/parts/0*.parquet"))) < 2 and begun.poll() is None:
        time.sleep(0.005)
    begun.send_signal(signal.SIGKILL)
    assert begun.wait() == -signal.SIGKILL
    finished = sorted(Path("killed").glob("stages/*/*/parts/0*.parquet"))
    assert 2 <= len(finished) < 8
    kept = [pq.read_table(path).to_pylist()[0] for path in finished]
    told: list[tuple[int, int]] = []
    show = nullcontext((lambda stage, done, total: told.append((done, total)), lambda line: None))
    monkeypatch.setattr("gambeson.certify.shown", lambda job: show)
    certify([*words, "--workers", "2", "--runs", "killed"])
    assert told == [(done, 8) for done in range(len(finished), 9)] + [(1, 0)]
    assert rows(Path("killed")) == rows(Path("whole"))
    (made,) = Path("killed").glob(f"stages/*/*/{ROWS}")
    assert pq.read_table(made).to_pylist()[: len(kept)] == kept, "their seconds too: they were not done again"
    assert not list(Path("killed").rglob("parts"))
    (record,) = Path("killed").glob("stages/*/*/done.json")
    assert json.loads(record.read_text())["attempts"] == 2
