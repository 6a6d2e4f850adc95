"""Diffusion training with augmentation that the network is told: neutral when off, resumable, and it does not leak."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from gambeson.canonical import digest
from gambeson.data.augment import NonLeaking, PadCrop
from gambeson.data.datasets import ImageSet, Split
from gambeson.errors import UserError
from gambeson.heritage import heritage_of
from gambeson.models.denoiser import EDM, VP, NetworkDenoiser, load_denoiser
from gambeson.models.files import load_tensors
from gambeson.models.unet import UNetSpec
from gambeson.randomness import generator
from gambeson.store import Store, Workspace
from gambeson.training.diffusion import DenoiserTraining, mean_loss, train_denoiser
from gambeson.training.loop import Optimisation

FITTED = Optimisation(steps=10, batch_size=32, learning_rate=5e-3, momentum=0.0, weight_decay=0.0, average=0.9)
PLAIN = DenoiserTraining(network=UNetSpec(width=8), optimisation=FITTED)
TOLD = replace(PLAIN, non_leaking=NonLeaking(probability=0.5))
SHIFTS = NonLeaking(probability=0.6, flip=False, scale=0.0, rotate=0.0, anisotropy=0.0, translate=0.125)

NOISY = EDM(p_mean=1.0, p_std=1.0)  # trained where images are all but drowned: there a leak is plain to see


def bars(count: int, seed: int) -> Split:
    """Two classes of 8x8 images: a bright bar of two pixels in the very middle, upright or lying, at any contrast."""
    bright = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=Generator().manual_seed(seed))
    bar = torch.zeros(8, 8)
    bar[1:7, 3:5] = 1
    labels = torch.arange(count) % 2
    return Split(bright * torch.stack([bar, bar.T])[labels][:, None], labels)


@pytest.fixture(scope="module")
def world() -> ImageSet:
    train, validation, test = (bars(n, seed) for seed, n in enumerate((256, 64, 2)))
    names = ("upright", "lying")
    return ImageSet(name="bars", train=train, validation=validation, test=test, class_names=names, flip_safe=True)


def trained(spec: DenoiserTraining, real: ImageSet, folder: Path) -> Path:
    return Store(folder).once(train_denoiser, spec, real, seed=0).file("denoiser.safetensors")


def weights(path: Path) -> Tensor:
    tensors, _ = load_tensors(path)
    return torch.cat([tensors[k].flatten() for k in sorted(tensors)])


class Stopped(Exception):
    pass


def stop_at(step: int) -> Callable[[int, int], None]:
    """Progress that breaks a training off after a step."""

    def stop(done: int, total: int) -> None:
        if done == step:
            raise Stopped

    return stop


def test_off_it_leaves_digests_and_weights_alone(world: ImageSet, tmp_path: Path) -> None:
    """The digest of the digits' training from before the field; one training step draws the same noise."""
    assert (
        digest(DenoiserTraining(preconditioning=EDM(sigma_data=0.7)))
        == "df02f52e6211c55d0d5455d19cdebb989caac277efa8341474a06582fd870771"
    )
    assert digest(PLAIN) != digest(TOLD) != digest(replace(TOLD, non_leaking=NonLeaking()))
    with pytest.raises(UserError, match=r"network\.augment"):
        replace(PLAIN, network=UNetSpec(width=8, augment=9))
    idle = NonLeaking(probability=0.0, flip=False)
    off, on = (load_tensors(trained(replace(PLAIN, non_leaking=n), world, tmp_path))[0] for n in (None, idle))
    assert on.keys() - off.keys() == {"augment.weight"}
    assert all(torch.equal(on[k], v) for k, v in off.items())  # told zeros only: the same training to the bit


def test_the_header_says_how_much_the_network_is_told(world: ImageSet, tmp_path: Path) -> None:
    path = trained(TOLD, world, tmp_path)
    assert load_tensors(path)[1]["network"]["augment"] == 9
    loaded = load_denoiser(path)
    assert loaded.spec == UNetSpec(width=8, augment=9)
    assert loaded.network.augment.weight.abs().sum() > 0  # type: ignore[union-attr, operator]
    assert not torch.equal(weights(path), weights(trained(replace(TOLD, non_leaking=NonLeaking()), world, tmp_path)))


def test_an_interrupted_training_with_warps_ends_in_the_same_bits(world: ImageSet, tmp_path: Path) -> None:
    spec = replace(TOLD, preconditioning=VP(), optimisation=replace(FITTED, accumulate=3))
    whole = trained(spec, world, tmp_path / "whole")

    folder = tmp_path / "parts"
    folder.mkdir()
    work = Workspace(folder, checkpoint_seconds=-1.0, heritage=heritage_of((world,)))
    with pytest.raises(Stopped):
        train_denoiser.work(replace(work, progress=stop_at(5)), spec, world, seed=0)
    assert list(folder.iterdir())
    train_denoiser.work(work, spec, world, seed=0)
    assert (folder / "denoiser.safetensors").read_bytes() == whole.read_bytes()


def test_the_best_is_what_was_kept(world: ImageSet, tmp_path: Path) -> None:
    """Few images, seen over and over: the held-out loss of the weights in the file is the least of the curve, not its
    last; also where the training was broken off after that look."""
    drawn = torch.rand(40, 1, 8, 8, generator=Generator().manual_seed(1))  # nothing to learn but these very images
    few = replace(world, train=Split(drawn[:8], torch.arange(8) % 2), validation=Split(drawn[8:], torch.arange(32) % 2))
    fitted = replace(FITTED, steps=160, batch_size=32, learning_rate=2e-2)
    last = replace(PLAIN, optimisation=fitted)
    best = replace(last, keep="best")
    assert digest(last) == digest(replace(last, keep="last")) != digest(best)
    path = trained(best, few, tmp_path)
    header = load_tensors(path)[1]
    curve = {line["step"]: line["held_out"] for line in header["log"] if "held_out" in line}
    assert curve[header["kept"]] == min(curve.values()) < curve[160]
    found = mean_loss(load_denoiser(path), few.validation, 8, 8, generator(0, "denoiser curves"))
    assert found == pytest.approx(min(curve.values()), rel=1e-6)
    assert "kept" not in load_tensors(trained(last, few, tmp_path))[1]

    folder = tmp_path / "parts"
    folder.mkdir()
    work = Workspace(folder, checkpoint_seconds=-1.0, heritage=heritage_of((few,)))
    with pytest.raises(Stopped):
        train_denoiser.work(replace(work, progress=stop_at(159)), best, few, seed=0)
    train_denoiser.work(work, best, few, seed=0)
    assert (folder / "denoiser.safetensors").read_bytes() == path.read_bytes()

    nothing = Split(few.train.images[:0], few.train.labels[:0])
    with pytest.raises(UserError, match="expected validation images, got none"):
        trained(best, replace(few, validation=nothing), tmp_path)


def guess(denoiser: NetworkDenoiser, labels: Tensor, augment: Tensor | None = None) -> Tensor:
    """[B, 1, 8, 8] x0-hat from almost nothing but noise: what the model believes its images to be on average."""
    x, sigma = torch.randn(len(labels), 1, 8, 8, generator=Generator().manual_seed(9)), torch.full((len(labels),), 10.0)

    def call(x: Tensor, noise: Tensor, told: Tensor | None) -> Tensor:
        return denoiser.network(x, noise, told, augment)

    return denoiser.preconditioning.denoise(call, 10 * x, sigma, labels)


def test_shifts_that_are_told_do_not_leak(world: ImageSet, tmp_path: Path) -> None:
    """Every bar stands in the middle. A model trained on shifted copies smears it; one that is told the shifts does
    not, is better on held-out images as they are, and puts the bar where it is told."""
    fitted = replace(FITTED, steps=250, average=0.95)
    told = replace(PLAIN, network=UNetSpec(width=16), preconditioning=NOISY, optimisation=fitted, non_leaking=SHIFTS)
    leaking = replace(told, non_leaking=None, augment=PadCrop(padding=1, flip=False))
    labels = torch.arange(2).repeat(16)
    means = torch.stack([bars(64, 5).images[c::2].mean(0) * 2 - 1 for c in range(2)])[labels]
    found = {}
    for name, spec in (("told", told), ("leaking", leaking)):
        path = trained(spec, world, tmp_path)
        denoiser = load_denoiser(path)
        held_out = [r["held_out"] for r in load_tensors(path)[1]["log"] if "held_out" in r][-1]
        found[name] = (held_out, (guess(denoiser, labels) - means).square().mean().item())
        if name == "told":
            right = torch.zeros(32, 9)
            right[:, 7] = 1  # one pixel
            moved = guess(denoiser, labels, right)
            shifted = SHIFTS.warp(means, right)
            assert (moved - shifted).square().mean() < 0.5 * (moved - means).square().mean()
    assert found["told"][0] < 0.5 * found["leaking"][0]
    assert found["told"][1] < 0.5 * found["leaking"][1]
