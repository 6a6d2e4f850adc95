"""Presets of robust training: the authors' settings as published, and ours. `gambeson train --preset NAME`.

Every field says whose choice it is (METHOD 2): the codes differ in inner steps, batch-norm statistics, smoothing and
schedule. Inner steps are in proportion to epsilon (2/255 for linf 8/255), Adam's excepted. Numbers in `published` are
clean / AutoAttack accuracy in percent as their papers print them. What is only remembered of a code, not read, is
marked so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gambeson.data.augment import PadCrop
from gambeson.errors import unknown
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.robustness.losses import TRADES, AdamSteps, Curriculum
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.loop import Optimisation
from gambeson.training.schedule import OneCycle

EPOCH = 50_000
"""Images that the papers call an epoch: CIFAR-10's train set, however many synthetic images there are."""


@dataclass(frozen=True, kw_only=True)
class TrainingPreset:
    """A classifier's training, and what its authors reached with it."""

    about: str
    published: str
    classifier: ClassifierTraining


def steps(epochs: float, batch_size: int, images: int = EPOCH) -> int:
    """Gradient steps of so many epochs; a started batch counts."""
    return max(round(epochs * -(-images // batch_size)), 1)


_CROP = PadCrop(padding=4, flip=True)
_SGD = Optimisation(momentum=0.9, weight_decay=5e-4, warmup=0.025, average=0.995)


def _selected(classifier: ClassifierTraining) -> ClassifierTraining:
    """Kept: the best of a hundred looks at held-out train images under PGD-40 with the margin loss."""
    return replace(classifier, validations=100, validation_steps=40, keep="best")


def irgd() -> TrainingPreset:
    """Gowal et al. 2021, their JAX code: Adam in the attack, statistics of adversarial images, extra data smoothed.

    Each real image stands four times in its batch, so the share of synthetic images is 720 of 1,024, not 0.7 exactly.
    """
    classifier = ClassifierTraining(
        network=WideResNetSpec(depth=28, width=10, activation="silu"),
        loss=TRADES(beta=6.0, steps=10, climb=AdamSteps(), statistics="adversarial", attack_mode="train"),
        optimisation=replace(_SGD, steps=steps(400.0, 1024), batch_size=1024, learning_rate=0.4),
        fraction=720 / 1024,
        augment=_CROP,
        smooth_synthetic=0.1,
        real_repeats=4,
    )
    return TrainingPreset(
        about="Gowal et al. 2021 (JAX code): TRADES, Adam inner steps, 400 epochs of batch 1,024",
        published="CIFAR-10 linf 8/255, DDPM 1M: WRN-28-10 85.97 / 60.73, WRN-70-16 86.94 / 63.58",
        classifier=_selected(classifier),
    )


def edm_at() -> TrainingPreset:
    """Wang et al. 2023, README recipe: sign steps, statistics of both, all smoothed, one-cycle rate held for an epoch.

    Fraction 0.7 is for 1M images; 0.8 from 5M on. Their 20M rows had batch 2,048 and 2,400 epochs (remembered).
    """
    classifier = ClassifierTraining(
        network=WideResNetSpec(depth=28, width=10, activation="silu"),
        loss=TRADES(beta=5.0, steps=10, label_smoothing=0.1, statistics="both", attack_mode="train"),
        optimisation=replace(
            _SGD, steps=steps(400.0, 512), batch_size=512, learning_rate=0.2, schedule=OneCycle(held=steps(1.0, 512))
        ),
        fraction=0.7,
        augment=_CROP,
    )
    return TrainingPreset(
        about="Wang et al. 2023: TRADES, beta 5, one-cycle per epoch, 400 epochs of batch 512",
        published="CIFAR-10 linf 8/255, EDM 20M, longer training: WRN-28-10 92.44 / 67.31",
        classifier=_selected(classifier),
    )


def cdp() -> TrainingPreset:
    """Ouyang et al. 2022: as Gowal et al.'s text, with the attack of their code in eval mode; average of the text."""
    classifier = ClassifierTraining(
        network=WideResNetSpec(depth=28, width=10, activation="silu"),
        loss=TRADES(beta=6.0, steps=10, label_smoothing=0.1, statistics="both", attack_mode="eval"),
        optimisation=replace(_SGD, steps=steps(400.0, 1024), batch_size=1024, learning_rate=0.4),
        fraction=0.7,
        augment=_CROP,
    )
    return TrainingPreset(
        about="Ouyang et al. 2022: TRADES, attack in eval mode, 400 epochs of batch 1,024 (Traffic Signs: 50)",
        published="CIFAR-10 linf 8/255: WRN-28-10, none 81.09 / 49.54, DDIM 1M 85.37 / 56.61, CDP 1M 86.30 / 56.84",
        classifier=_selected(classifier),
    )


def port() -> TrainingPreset:
    """Sehwag et al. 2021: WRN-34-10, half of the images synthetic. Batch, rate and epochs are remembered, not read.

    Its 200 epochs count real images alone: 400 of `--epochs`, which counts the synthetic ones too.
    """
    classifier = ClassifierTraining(
        network=WideResNetSpec(depth=34, width=10, activation="relu"),
        loss=TRADES(beta=6.0, steps=10, statistics="both", attack_mode="eval"),
        optimisation=Optimisation(steps=steps(200.0, 128), batch_size=256, learning_rate=0.1, warmup=0.0, average=0.0),
        fraction=0.5,
        augment=_CROP,
    )
    return TrainingPreset(
        about="Sehwag et al. 2021: WRN-34-10, 128 real and 128 synthetic images a step, cosine from 0.1",
        published="CIFAR-10: WRN-34-10, linf 8/255 86.68 / 60.27, L2 128/255 90.93 / 77.24",
        classifier=_selected(classifier),
    )


def fast() -> TrainingPreset:
    """Ours: as robust as the standard preset in half of its work or less, on small sets (dev/LOG.md, 2026-11-21).

    The attack's steps rise from 1 to 5 over the whole training, 3 on average where others take 10; bfloat16. 400 steps
    are for some hundred to a few thousand images; on more, set --epochs. Not measured at CIFAR-10's full size.
    """
    attack = TRADES(beta=8.0, steps=5, label_smoothing=0.1)
    classifier = ClassifierTraining(
        network=PreActResNetSpec(depth=18),
        loss=Curriculum(loss=attack, first_steps=1, steps_until=1.0, first_epsilon=1.0),
        optimisation=replace(_SGD, steps=400, batch_size=128, learning_rate=0.2, precision="bfloat16"),
        fraction=0.7,
        augment=_CROP,
        validations=10,
        validation_steps=20,
    )
    return TrainingPreset(
        about="ours: TRADES, beta 8, 1 to 5 attack steps, bfloat16, 400 steps of batch 128",
        published="none: see README for what was measured",
        classifier=classifier,
    )


TRAININGS: dict[str, Callable[[], TrainingPreset]] = {
    "irgd": irgd,
    "edm-at": edm_at,
    "cdp": cdp,
    "port": port,
    "fast": fast,
}


def training_preset(name: str) -> TrainingPreset:
    """The preset of that name. Raises UserError listing the known ones, the nearest first."""
    if name not in TRAININGS:
        raise unknown("training preset", name, TRAININGS)
    return TRAININGS[name]()
