"""`gambeson run cifar10 --device cuda`: CIFAR-10 at 32x32, linf 8/255, all real images, on one GPU.

The images: `python read_packed.py cifar10_train data/cifar10_train.npz`, the same for cifar10_test (../shared/data).
Where they lie: ./data, or GAMBESON_DATA=DIR. The official archives instead: `--data Cifar10` (all 10,000 test images:
the attacks take five times as long).

Run time: not yet measured; meant for at most 25 minutes on one H200-class card. `--dry-run` prints a forecast from
counted operations, at a share of the card's peak that is assumed. Expected: not yet measured.
"""

from __future__ import annotations

from dataclasses import replace

from gambeson.data.augment import NonLeaking, PadCrop
from gambeson.data.npz import NpzImages
from gambeson.models.denoiser import EDM
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.recipe import Arm, Recipe
from gambeson.recipes.presets import cdp_fast
from gambeson.recipes.training import fast, steps
from gambeson.robustness.attacks import APGD, PGD, TargetedAPGD
from gambeson.robustness.evaluate import Evaluation
from gambeson.robustness.losses import Plain
from gambeson.synthesis.generation import Generation
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.diffusion import DenoiserTraining
from gambeson.training.loop import Optimisation

COUNT = 50_000
"""Synthetic images: the second column of CDP's Table 2."""
EPOCHS = 40.0
"""Of 50,000 images: what 25 minutes allow three students at the assumed speed."""


def recipe() -> Recipe:
    """Real images alone, with plain and with guided ones.

    No Gaussian control: at 3,072 numbers it costs 58 ms of a CPU for each image, 48 minutes in all (`--arms` has it).
    """
    trained = student(steps(EPOCHS, 512))
    return Recipe(
        name="cifar10",
        data=NpzImages(
            path="cifar10_train.npz",
            test_path="cifar10_test.npz",
            flip_safe=True,
            validation_share=0.02,  # 1,000 of 50,000
            test_images=2000,  # two arms are told apart to about a point; `cifar10-full` takes all
        ),
        threat=ThreatModel(epsilon=8 / 255),  # CDP, section 5
        arms=(Arm.REAL, Arm.PLAIN, Arm.GUIDED),
        denoiser=denoiser(sigma_data=0.5),
        teacher=replace(trained, loss=Plain(label_smoothing=0.0), validations=2, keep="last"),
        generation=generation(512),
        student=trained,
        evaluation=evaluation(),
    )


def denoiser(sigma_data: float) -> DenoiserTraining:
    """At most 6M parameters, so that its weights can be given away as a small file; EDM's non-leaking augmentation.

    20,000 steps of 256 are 104 passes over 49,000 images: far from where copies began on digits (250, dev/LOG.md).
    Adam at 8e-4 as at 16x16 (dev/separation.py); the average is ten times as long, as there are six times the steps.
    """
    fitted = Optimisation(
        steps=20_000,
        batch_size=256,
        learning_rate=8e-4,
        momentum=0.0,
        weight_decay=0.0,
        average=0.9999,
        precision="bfloat16",
    )
    return DenoiserTraining(
        network=UNetSpec(width=56, multipliers=(1, 2, 2, 2), blocks=2, attention=2),
        preconditioning=EDM(sigma_data=sigma_data),
        optimisation=fitted,
        non_leaking=NonLeaking(),
        seed=0,  # one model for all seeds of a run
    )


def student(steps: int) -> ClassifierTraining:
    """PreActResNet-18 by the preset `fast`, batch 512 at rate .2 (METHOD 2), the best of 20 validations kept."""
    preset = fast().classifier
    return replace(
        preset,
        network=PreActResNetSpec(depth=18),
        optimisation=replace(preset.optimisation, steps=steps, batch_size=512, learning_rate=0.2),
        augment=PadCrop(padding=4, flip=True),  # METHOD 2
        validations=20,  # a look every second epoch, so that robust overfitting is seen where it begins
        keep="best",
    )


def generation(block: int) -> Generation:
    """`cdp-fast` whole: 18 Heun steps (EDM), supervised contrastive in 4 of them (dev/LOG.md, 2026-11-21)."""
    fields = {**cdp_fast().generation, "block": block}
    return Generation(count=COUNT, precision="bfloat16", **fields)


def evaluation() -> Evaluation:
    """PGD-40, AutoPGD and targeted AutoPGD of 50 steps, as `digits` (dev/LOG.md); epsilons of linf 8/255."""
    return Evaluation(
        pgd=PGD(steps=40, restarts=1),
        apgd=APGD(steps=50),
        targeted=TargetedAPGD(steps=50, targets=9),
        curve=tuple(round(k * 8 / 255 / 3, 6) for k in range(1, 7)),
        batch_size=500,
    )
