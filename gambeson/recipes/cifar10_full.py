"""`gambeson run cifar10-full --device cuda`: CIFAR-10 at the papers' size (CDP's Table 2, 1M images). Never run here.

The images: CIFAR-10's official archive, or cifar10_train.npz and cifar10_test.npz of read_packed.py, in ./data or
GAMBESON_DATA=DIR. `--dry-run` checks the shapes and prints what it costs. Better with published weights of a diffusion
model than with weeks of training one: `--denoiser ForeignDenoiser --denoiser.path FILE`.

Run time: not yet measured; GPU-days. Expected: not yet measured. (Published, clean / robust percent: none 81.09 /
49.54, DDIM 85.37 / 56.61, Contrastive-DP 86.30 / 56.84.)
"""

from __future__ import annotations

from dataclasses import replace

from gambeson.data.augment import PadCrop
from gambeson.data.cifar import Cifar10
from gambeson.models.denoiser import VP
from gambeson.models.unet import UNetSpec
from gambeson.recipe import Arm, Recipe
from gambeson.recipes.presets import cdp_cifar10_hnm
from gambeson.recipes.training import cdp, steps
from gambeson.robustness.assess import Assessment
from gambeson.robustness.autoattack import AutoAttack
from gambeson.robustness.evaluate import Evaluation
from gambeson.robustness.losses import Plain
from gambeson.synthesis.generation import Generation
from gambeson.synthesis.label import ByTeacher, Labeling
from gambeson.threat import ThreatModel
from gambeson.training.diffusion import DenoiserTraining
from gambeson.training.loop import Optimisation


def recipe() -> Recipe:
    """Real images alone, with plain DDIM images, with Contrastive-DP's. Every image is kept: compare selections apart.

    Labels by the teacher, a WRN-28-10 trained for 200 epochs, where the authors had LaNet (METHOD 2): the diffusion
    model knows no classes. Their encoder was IRGD's published network; here it is the real-only student.
    """
    preset = cdp().classifier  # 400 epochs of batch 1,024, the best of 100 looks under PGD-40 kept (METHOD 2)
    # bfloat16 is ours: three times as fast with no loss of accuracy that showed (dev/LOG.md)
    fitted = replace(preset.optimisation, precision="bfloat16")
    student = replace(preset, optimisation=fitted)
    taught = replace(fitted, steps=steps(200.0, 1024))
    return cdp_cifar10_hnm().into(
        Recipe(
            name="cifar10-full",
            data=Cifar10(),
            threat=ThreatModel(epsilon=8 / 255),
            arms=(Arm.REAL, Arm.PLAIN, Arm.GUIDED),
            denoiser=denoiser(),
            teacher=replace(student, loss=Plain(label_smoothing=0.0), optimisation=taught, validations=4, keep="last"),
            generation=Generation(count=1_000_000, guidance=None, precision="bfloat16"),
            labeling=Labeling(by=ByTeacher()),
            student=student,
            evaluation=Evaluation(curve=tuple(round(k * 8 / 255 / 3, 6) for k in range(1, 7)), batch_size=500),
            assessment=Assessment(autoattack=AutoAttack(version="worst")),  # Table 2: the worse of AutoAttack, AA+MT
        )
    )


def denoiser() -> DenoiserTraining:
    """DDIM's model of CIFAR-10: without classes, 35.7M parameters, trained as Ho et al. 2020 (appendix B) say.

    800,000 steps of 128 at rate 2e-4 after 5,000 of warm-up, average .9999, mirrored images. Ours: the rate falls as a
    cosine, and bfloat16.
    """
    fitted = Optimisation(
        steps=800_000,
        learning_rate=2e-4,
        momentum=0.0,
        weight_decay=0.0,
        warmup=5_000 / 800_000,
        average=0.9999,
        precision="bfloat16",
    )
    return DenoiserTraining(
        network=UNetSpec.cifar10(),
        preconditioning=VP(),
        optimisation=fitted,
        augment=PadCrop(padding=0, flip=True),
        conditional=False,
    )
