"""`gambeson run gtsrb --device cuda`: traffic signs at 32x32, linf 8/255, all real images, on one GPU.

The images: `python read_packed.py gtsrb_train data/gtsrb_train.npz`, the same for gtsrb_test (../shared/data): whole
frames of 32x32 pixels with `track`, the physical sign; see `gtsrb-16` for how they are split. Where they lie: ./data,
or GAMBESON_DATA=DIR. The official archives, cropped to the signs: `--data Gtsrb` (all 12,630 test images: slower).

Run time: not yet measured; meant for at most 25 minutes on one H200-class card (`--dry-run`: a forecast at an assumed
speed). Expected: not yet measured. (Published, WRN-28-10, clean / robust percent: CDP's Table 3, none 78.41 / 46.03,
DDPM 86.87 / 56.11, Contrastive-DP 86.94 / 56.27.)
"""

from __future__ import annotations

from dataclasses import replace

from gambeson.data.npz import NpzImages
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.recipe import Recipe
from gambeson.recipes import cifar10
from gambeson.recipes.gtsrb_16 import BLOCK
from gambeson.recipes.training import steps

IMAGES = 35_219
"""Real images to train on, beside a tenth of each class's signs and the one that test shows, too."""
EPOCHS = 50.0
"""CDP, appendix D.2: 50 epochs; 400 were not better there."""


def recipe() -> Recipe:
    """Real images alone, with plain and with guided ones; no Gaussian control, as in `cifar10`."""
    base = cifar10.recipe()
    network = PreActResNetSpec(depth=18, mean=(0.5,), std=(0.25,))  # CIFAR's colours are not those of signs
    student = replace(
        base.student,
        network=network,
        optimisation=replace(base.student.optimisation, steps=steps(EPOCHS, 512, IMAGES)),
        epoch_images=IMAGES,
    )
    return replace(
        base,
        name="gtsrb",
        data=NpzImages(
            path="gtsrb_train.npz",
            test_path="gtsrb_test.npz",
            groups="track",
            drop_test_twins=True,
            validation_images=1000,  # of 3,960: as in `cifar10`
            test_images=2000,  # as in `cifar10`; 9 of the rarest class
        ),
        denoiser=cifar10.denoiser(sigma_data=0.53),  # the spread of the training pixels in [-1, 1]
        teacher=replace(base.teacher, network=network, optimisation=student.optimisation, epoch_images=IMAGES),
        generation=cifar10.generation(BLOCK),
        student=student,
    )
