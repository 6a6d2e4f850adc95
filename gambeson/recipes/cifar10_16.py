"""`gambeson run cifar10-16 --seeds 3`: CIFAR-10 at 16x16, linf 8/255, few real images, on two CPU cores.

The images: `python read_packed.py cifar10_train data/cifar10_train.npz`, the same for cifar10_test (../shared/data), or
any .npz of that name with uint8 images and labels. Where they lie: ./data, or GAMBESON_DATA=DIR.

Run time 44 minutes for one seed with `--workers 1`, the other core busy (2026-11-22): the diffusion model 30, once for
all seeds, four arms with images, students and attacks 14. Expected worst case of APGD-CE and targeted APGD, percent
(n = 2,000 test images, 3 trainings, 95 % intervals over both, `gambeson table cdp-2 --tier 16`): real only 19.4 (17.9
to 21.1), plain 18.4 (16.9 to 20.0), Contrastive-DP 17.9 (16.5 to 19.4); clean 37.1, 38.4, 38.9.

The sweep over real images: `recipe(500)`, `recipe(1000)`, `recipe(5000)`; from the command line

    gambeson run cifar10-16 --data.train_images 500 --denoiser.optimisation.steps 1000
    gambeson run cifar10-16 --data.train_images 5000 --denoiser.optimisation.steps 4000 \\
        --student.optimisation.steps 1200

Worst case with 500 real images (3 trainings): real only 16.2, plain 14.6, Contrastive-DP 14.9; with 5,000, one
synthetic image for each: 24.0, 22.4, 21.2 (intervals: docs/comparisons.md). `--student.fraction 0.3` instead of 0.7
brought plain images +0.7 (-0.8 to 2.2) with 1,000.
"""

from __future__ import annotations

from dataclasses import replace

from gambeson.data.augment import NonLeaking, PadCrop
from gambeson.data.npz import NpzImages
from gambeson.models.denoiser import EDM
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.recipe import Recipe
from gambeson.recipes.presets import cdp_fast
from gambeson.recipes.training import fast
from gambeson.robustness.attacks import APGD, PGD, TargetedAPGD
from gambeson.robustness.evaluate import Evaluation
from gambeson.robustness.losses import Plain
from gambeson.sampling.levels import NoiseLevels
from gambeson.synthesis.gaussian import GaussianControl
from gambeson.synthesis.generation import Generation
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.diffusion import DenoiserTraining
from gambeson.training.loop import Optimisation

PASSES, MOST_STEPS = 250, 4000
"""Passes of the diffusion model over the real images: on 300 digits 256 gave no copies and 425 gave 1 % (dev/LOG.md);
and steps that fit into 45 minutes of one core."""


def recipe(train_images: int = 1000) -> Recipe:
    """So many real images, four arms of equal training budget."""
    steps = min(50 * round(PASSES * train_images / 128 / 50), MOST_STEPS)
    # 51 passes over 1,000 images, 31 over 5,000: those alone are best after 720 steps and lose 2 points by 1,200 (LOG)
    trained = student(400 if train_images <= 2000 else 1200, padding=2)
    return Recipe(
        name="cifar10-16",
        data=NpzImages(
            path="cifar10_train.npz",
            test_path="cifar10_test.npz",
            side=16,
            flip_safe=True,
            train_images=train_images,
            validation_share=0.02,  # 1,000 of 50,000: what the diffusion model's held-out loss looks at, at most
            validation_images=500,  # choosing one of ten moments needs no more: a standard error of 1.8 points
            test_images=2000,  # a tie of two arms is known to about a point from one seed; 10,000 take 5 times as long
        ),
        threat=ThreatModel(epsilon=8 / 255),  # CDP, section 5
        denoiser=denoiser(UNetSpec(width=48, multipliers=(1, 2, 3), blocks=2), steps, sigma_data=0.5),
        teacher=teacher(student(400, padding=2)),
        generation=generation(3000, block=500),  # 3 for each real image; 500: the blocks of dev/separation.py
        control=GaussianControl(count=3000, block=50),  # 50 factors of 768 x 768 numbers: 236 MB
        student=trained,
        evaluation=evaluation(),
    )


def denoiser(network: UNetSpec, steps: int, sigma_data: float) -> DenoiserTraining:
    """Adam at 8e-4 with average .999, as the 16x16 model of dev/separation.py; sigma_data: the spread of the pixels.

    EDM's non-leaking augmentation, because so few images are copied otherwise: on 300 digits a crop kept the held-out
    loss at .394 after 1,000 steps, where it had risen to .552 without (dev/LOG.md), but that crop was generated, too.
    bfloat16: 1.9 times as fast on this project's CPUs in adversarial training, with no loss that shows (dev/LOG.md).
    """
    fitted = Optimisation(
        steps=steps, learning_rate=8e-4, momentum=0.0, weight_decay=0.0, average=0.999, precision="bfloat16"
    )
    return DenoiserTraining(
        network=network,
        preconditioning=EDM(sigma_data=sigma_data),
        optimisation=fitted,
        non_leaking=NonLeaking(),
        seed=0,  # one model for all seeds of a run: the longest stage, made once
    )


def student(steps: int, padding: int) -> ClassifierTraining:
    """The preset `fast` on the network it was measured with at 16x16 (ResNet of width 32; dev/LOG.md).

    Ten looks at validation images, the best kept: real images alone were best after 150 to 300 steps of 128 and had
    overfitted by 600 (46.0 / 16.0 against 40.2 / 16.7, dev/LOG.md), so every arm is given more steps than real images
    need, and none is measured after its optimum. The curves are in the log of each training and in the report.
    """
    preset = fast().classifier
    return replace(
        preset,
        network=ResNetSpec(width=32),
        optimisation=replace(preset.optimisation, steps=steps),
        augment=PadCrop(padding=padding, flip=True),  # an eighth of the side, as everywhere; flips where safe
        validation_steps=10,
        keep="best",
    )


def teacher(student: ClassifierTraining) -> ClassifierTraining:
    """The student's network and length without attacks; the end is kept, since `best` would mean robust accuracy."""
    return replace(student, loss=Plain(label_smoothing=0.0), validations=2, keep="last")


def generation(count: int, block: int) -> Generation:
    """Guided as `cdp-fast`, of the contrastive variants the one of lowest Frechet distance at 16x16 (dev/LOG.md).

    12 Heun steps instead of its 18: what METHOD 1.3's first evidence was made with, in two thirds of the time.
    """
    fields = {**cdp_fast().generation, "block": block, "levels": NoiseLevels(steps=12)}
    return Generation(count=count, blocks_per_shard=2, precision="bfloat16", **fields)


def evaluation() -> Evaluation:
    """PGD-20, AutoPGD and targeted AutoPGD of 25 steps: on digits its verdicts were those of 100 (dev/LOG.md)."""
    return Evaluation(
        pgd=PGD(steps=20, restarts=1),
        apgd=APGD(steps=25),
        targeted=TargetedAPGD(steps=25, targets=9),
        curve=tuple(round(k * 8 / 255 / 3, 6) for k in range(1, 7)),  # to twice the threat
        curve_attack=PGD(steps=10, restarts=1),
        curve_images=200,
        check_images=100,
    )
