"""`gambeson run gtsrb-16 --seeds 3`: traffic signs of all 43 classes at 16x16, linf 8/255, on two CPU cores.

The images: `python read_packed.py gtsrb_train data/gtsrb_train.npz`, the same for gtsrb_test (../shared/data): frames
of 32x32 pixels with `track`, the physical sign. Validation takes whole signs, never some frames of one; the sign of
which test holds equal frames is left out; nothing is mirrored. Where they lie: ./data, or GAMBESON_DATA=DIR. The
official archives instead: `--data Gtsrb --data.side 16 --data.train_images 3010` (all 12,630 test images: slower).

Run time 23 minutes on two quiet cores for all four arms of one seed (2026-11-22): the diffusion model 18, once for all
seeds, an arm with images, student and attacks 4 or less. Expected worst case of APGD-CE and targeted APGD, percent
(n = 1,300 test images, 3 trainings, 95 % intervals over both, `gambeson table cdp-3 --tier 16`): real only 21.3 (19.3
to 23.5), plain 19.9 (17.6 to 22.4), Contrastive-DP 19.7 (17.4 to 22.2); clean 52.4 each. With `--student.fraction 0.7`
plain 17.1 (15.3 to 19.1), guided 17.7 (15.8 to 19.7).
"""

from __future__ import annotations

from dataclasses import replace

from gambeson.data.npz import NpzImages
from gambeson.models.unet import UNetSpec
from gambeson.recipe import Recipe
from gambeson.recipes.cifar10_16 import PASSES, denoiser, evaluation, generation, student, teacher
from gambeson.synthesis.gaussian import GaussianControl
from gambeson.threat import ThreatModel

REAL = 43 * 70
"""Real images, 70 of each class; the fewest that a class has beside its held-out sign are 180."""
BLOCK = 43 * 12
"""12 of each class, about the 512 that `cdp-fast` contrasts."""


def recipe() -> Recipe:
    """Four arms of equal training budget."""
    # 26 passes; on 1,728 signs of 12 classes 600 steps had not overfitted (best minus last .5 at most, dev/LOG.md), so
    # no fewer here, and no more than six minutes of an arm allow
    trained = student(600, padding=2)
    # of half the width: that network's held-out loss was .209 beside .198 seen after 1,550 steps on 1,728 signs
    # (dev/LOG.md), and 250 passes over 3,010 images with cifar10-16's would take an hour
    network = UNetSpec(width=32, multipliers=(1, 2, 3), blocks=1)
    return Recipe(
        name="gtsrb-16",
        data=NpzImages(
            path="gtsrb_train.npz",
            test_path="gtsrb_test.npz",
            side=16,
            groups="track",
            drop_test_twins=True,
            train_images=REAL,
            validation_images=500,  # of the signs held out, a tenth of each class's; as cifar10-16
            test_images=1300,  # 6 of the rarest class; more do not fit into six minutes
        ),
        threat=ThreatModel(epsilon=8 / 255),  # CDP, appendix D.2: as for CIFAR-10
        # .53: the spread of the training pixels in [-1, 1]
        denoiser=denoiser(network, 50 * round(PASSES * REAL / 128 / 50), sigma_data=0.53),
        teacher=teacher(trained),
        generation=generation(8 * BLOCK, block=BLOCK),  # 4,128: 1.4 for each real image, what six minutes allow
        control=GaussianControl(count=8 * BLOCK, block=43),  # 43 factors of 768 x 768 numbers: 203 MB
        # 30 % of a batch: of the validation images 22.1 % hold with plain images, 19.1 with 70 % (3 trainings, LOG)
        student=replace(trained, fraction=0.3),
        evaluation=evaluation(),
    )
