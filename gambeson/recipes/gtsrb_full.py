"""`gambeson run gtsrb-full --device cuda`: traffic signs at the papers' size (CDP's Table 3). Never run here.

Images and how they are split: see `gtsrb`; all 12,630 test images. `--dry-run` checks the shapes and prints the cost.
Run time: not yet measured; GPU-days. Expected: not yet measured. (Published, clean / robust percent: none 78.41 /
46.03, DDPM 86.87 / 56.11, Contrastive-DP 86.94 / 56.27.)
"""

from __future__ import annotations

from dataclasses import replace

from gambeson.data.npz import NpzImages
from gambeson.models.denoiser import VP
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.recipe import Recipe
from gambeson.recipes import cifar10_full
from gambeson.recipes.gtsrb import EPOCHS, IMAGES
from gambeson.recipes.presets import cdp_traffic_signs
from gambeson.recipes.training import steps
from gambeson.synthesis.label import Labeling
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.diffusion import DenoiserTraining


def recipe() -> Recipe:
    """As `cifar10-full`, but 50 epochs and a diffusion model that knows the classes (CDP, appendix D.2).

    Table 3 does not print the number of images; here it is the 1M of Table 2.
    """
    base = cifar10_full.recipe()
    return cdp_traffic_signs().into(
        replace(
            base,
            name="gtsrb-full",
            data=NpzImages(
                path="gtsrb_train.npz",
                test_path="gtsrb_test.npz",
                groups="track",
                drop_test_twins=True,
                validation_images=1000,
            ),
            denoiser=denoiser(),
            teacher=_of_signs(base.teacher),
            generation=replace(base.generation, guidance=None),
            labeling=Labeling(),
            student=_of_signs(base.student),
        )
    )


def _of_signs(classifier: ClassifierTraining) -> ClassifierTraining:
    """The classifier for 50 epochs of signs, whose colours are not CIFAR's."""
    fitted = replace(classifier.optimisation, steps=steps(EPOCHS, 1024, IMAGES))
    network = WideResNetSpec(depth=28, width=10, activation="silu", mean=(0.5,), std=(0.25,))
    return replace(classifier, network=network, optimisation=fitted, epoch_images=IMAGES)


def denoiser() -> DenoiserTraining:
    """DDIM's U-Net with classes, cosine table (the authors' schedule), no mirroring.

    The authors took published weights of minimal-diffusion; trained here with as many passes (2,048) as Ho et al. 2020.
    """
    base = cifar10_full.denoiser()
    fitted = replace(base.optimisation, steps=steps(2048.0, 128, IMAGES))
    return replace(
        base, preconditioning=VP(schedule="cosine"), optimisation=fitted, augment=replace(base.augment, flip=False),
        conditional=True,
    )  # fmt: skip
