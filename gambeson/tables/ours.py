"""Our own tables: what of guidance matters, the rivals that it has to beat, and when it helps. Data, no code."""

from __future__ import annotations

from dataclasses import replace

from gambeson.data.label_safe import CutMix
from gambeson.recipe import Arm
from gambeson.sampling.contrastive import HardNegative
from gambeson.sampling.guidance import Contrastive, DenoisedFeatures, Window
from gambeson.sampling.pairs import OtherClasses, PreviousStep, RealPositives
from gambeson.synthesis.scorers import Entropy
from gambeson.tables.cells import Changes, Of, Row, Table
from gambeson.tables.ingredients import (
    BOTH,
    CDP,
    HNM,
    HNM_EMBEDDING,
    INFO_NCE,
    LAMBDA_100K,
    NONE,
    PLAIN,
    POOL,
    SUPERVISED,
    against_real,
    crop,
    cut_out,
    denoiser_steps,
    epsilon,
    guided,
    half_the_steps,
    strengths,
    towards_class,
    with_null_class,
)

REGIMES: dict[str, tuple[str, Changes]] = {
    "weak": ("denoiser of a quarter of the steps", denoiser_steps(0.25)),
    "strong": ("denoiser of 3 times the steps", denoiser_steps(3.0)),
    "easy": ("eps halved", epsilon(0.5)),
    "hard": ("eps times 1.5", epsilon(1.5)),
}


def in_regime(name: str) -> tuple[Row, ...]:
    """What is asked of the base recipe (nothing, plain, guided) under other circumstances."""
    about, changes = REGIMES[name]
    none = Row(name=f"none-{name}", about=f"real images only, {about}", arm=Arm.REAL, changes=changes)
    own = ("threat.epsilon" in changes) * (none,)  # else real images alone are what they are in the base recipe
    real = own[0].name if own else "none"
    beside = (real, *("plain",) * (not own))  # equal students and attacks: the denoisers can be compared, too
    plain = Row(
        name=f"plain-{name}", about=f"+ plain diffusion, {about}", arm=Arm.PLAIN, changes=changes, against=beside
    )
    cdp = Row(
        name=f"cdp-{name}",
        about=f"+ Contrastive-DP, {about}",
        changes=guided(HNM_EMBEDDING) | changes,
        against=(plain.name, real),
    )
    return *own, plain, cdp


EARLY, MIDDLE, ALWAYS = Window(sigma_min=2.04), Window(sigma_min=0.5, sigma_max=4.0), Window()
DENOISED = replace(HNM, features=DenoisedFeatures())
SEARCHED: dict[str, Contrastive] = {
    "hard-200k": replace(HNM, strength=2 * LAMBDA_100K),
    "hard-400k": replace(HNM, strength=4 * LAMBDA_100K),
    "hard-100k-always": replace(HNM, window=ALWAYS),
    "hard-200k-always": replace(HNM, window=ALWAYS, strength=2 * LAMBDA_100K),
    "hard-denoised-100k": DENOISED,
    "hard-denoised-400k": replace(DENOISED, strength=4 * LAMBDA_100K),
    "infonce-40k": replace(INFO_NCE, strength=2 * INFO_NCE.strength),
    "infonce-20k-always": replace(INFO_NCE, window=ALWAYS),
    "supervised-16": SUPERVISED,
    "supervised-64": replace(SUPERVISED, strength=64.0),
    "supervised-16-always": replace(SUPERVISED, window=ALWAYS),
    "supervised-16-early": replace(SUPERVISED, window=EARLY),
}
"""Stronger, longer or otherwise guided than the authors, who use hard negatives at 100k (INFO_NCE: 20k) and early."""


OURS: dict[str, Table] = {
    "window": Table(
        title="When guidance acts",
        source="ours",
        rows=(
            NONE,
            PLAIN,
            Row(name="early", about="sigma >= 2.04 (t >= 400, the authors')", changes=guided(HNM), against=BOTH),
            Row(
                name="middle",
                about="sigma 0.5 to 4",
                changes=guided(replace(HNM, window=MIDDLE)),
                against=("early", *BOTH),
            ),
            Row(
                name="late",
                about="sigma <= 2.04",
                changes=guided(replace(HNM, window=Window(sigma_max=2.04))),
                against=("early", *BOTH),
            ),
            Row(
                name="always",
                about="every step but the first",
                changes=guided(replace(HNM, window=ALWAYS)),
                against=("early", *BOTH),
            ),
        ),
        notes=("Windows hold different numbers of guided steps at equal strength",),
    ),
    "features": Table(
        title="Noisy or denoised images in the encoder",
        source="ours (METHOD 1.3)",
        rows=(
            NONE,
            PLAIN,
            Row(
                name="noisy",
                about="noisy images (the authors')",
                changes=guided(HNM),
                choices=strengths(LAMBDA_100K, LAMBDA_100K / 10),
                against=BOTH,
            ),
            Row(
                name="denoised",
                about="denoised images",
                changes=guided(replace(HNM, features=DenoisedFeatures())),
                choices=strengths(LAMBDA_100K, LAMBDA_100K / 10),
                against=("noisy", *BOTH),
            ),
        ),
        notes=("Gradients are taken in different coordinates: each view has its better strength of two",),
    ),
    "pairs": Table(
        title="Positives and negatives",
        source="CDP, appendix C.1, which prints no numbers",
        rows=(
            NONE,
            PLAIN,
            Row(
                name="previous",
                about="previous step; the rest of the batch",
                changes=guided(replace(HNM, pairs=PreviousStep())),
                against=BOTH,
            ),
            Row(
                name="real-positives",
                about="real positives",
                changes=guided(replace(HNM, pairs=RealPositives())),
                against=("previous", *BOTH),
            ),
            Row(
                name="real-negatives",
                about="real negatives",
                changes={
                    "generation.guidance": Of(against_real),
                    "encoder": "robust",
                },
                against=("previous", *BOTH),
            ),
            Row(
                name="other-classes",
                about="negatives of other classes only (tau+ 0)",
                changes=guided(
                    replace(HNM, pairs=OtherClasses(), loss=HardNegative(temperature=10.0, tau_plus=0.0, beta=1.0))
                ),
                against=("previous", *BOTH),
            ),
            Row(
                name="supervised",
                about="supervised contrastive (cdp-fast)",
                changes=guided(SUPERVISED),
                against=("other-classes", *BOTH),
            ),
        ),
    ),
    "baselines": Table(
        title="What guidance has to beat",
        source="ours",
        rows=(
            NONE,
            Row(
                name="none-best",
                about="real only, at its validation optimum",
                arm=Arm.REAL,
                changes={"student.keep": "best"},
                choices={
                    f"{times}x-steps": {
                        "student.optimisation.steps": Of(lambda r, n=times: n * r.student.optimisation.steps)
                    }
                    for times in (1, 2)
                },
                against=("none",),
            ),
            Row(
                name="crop",
                about="real only, with crop",
                arm=Arm.REAL,
                changes={"student.augment": Of(crop)},
                against=("none",),
            ),
            Row(
                name="cutout",
                about="real only, crop and Cutout",
                arm=Arm.REAL,
                changes={"student.augment": Of(cut_out)},
                against=("none",),
            ),
            Row(
                name="cutmix",
                about="real only, crop and CutMix",
                arm=Arm.REAL,
                changes={"student.augment": Of(crop), "student.mix": CutMix()},
                against=("none",),
            ),
            Row(name="gaussian", about="+ Gaussian control", arm=Arm.GAUSSIAN, against=("none",)),
            PLAIN,
            Row(
                name="plain-entropy",
                about=f"+ plain diffusion, the lowest entropy of {POOL} times as many",
                arm=Arm.PLAIN,
                pool=POOL,
                changes={"selection.score": Entropy()},
                against=BOTH,
            ),
            Row(
                name="classifier-free",
                about="+ classifier-free guidance, half the steps",
                arm=Arm.PLAIN,
                changes={
                    "denoiser": Of(with_null_class),
                    "generation.levels.steps": Of(half_the_steps),
                    "generation.classifier_free": 1.5,
                },
                choices={f"{s:g}": {"generation.classifier_free": s} for s in (1.5, 2.0, 3.0)},
                against=BOTH,
            ),
            Row(
                name="classifier",
                about="+ classifier guidance, robust classifier",
                changes={"generation.guidance": Of(towards_class), "encoder": "robust"},
                choices=strengths(4.0, 32.0, 128.0),
                against=BOTH,
            ),
            Row(
                name="cdp",
                about="+ Contrastive-DP (HNM, embedding)",
                changes=guided(HNM_EMBEDDING),
                against=("classifier", "classifier-free", "gaussian", *BOTH, "cutmix", "crop"),
            ),
            Row(
                name="supervised",
                about="+ supervised contrastive guidance",
                changes=guided(SUPERVISED),
                choices=strengths(4.0, 16.0),
                against=("classifier", "classifier-free", "gaussian", *BOTH, "cutmix", "crop"),
            ),
        ),
        notes=(
            "Classifier-free guidance calls the network twice a step, so it has half the steps; its denoiser is taught "
            "the null class besides. Classifier and supervised guidance share their window and their cost per step",
        ),
    ),
    "search": Table(
        title="The setting of guidance that validation prefers",
        source="ours",
        rows=(
            NONE,
            PLAIN,
            CDP,
            Row(
                name="searched",
                about=f"+ guidance, the best of {len(SEARCHED)} settings",
                arm=Arm.GUIDED,
                changes=guided(HNM),
                choices={name: {"generation.guidance": guidance} for name, guidance in SEARCHED.items()},
                against=("cdp", *BOTH),
            ),
        ),
        notes=(
            "The setting is chosen with the trainings that are measured, on other images: ask other seeds for a "
            "confirmation",
        ),
    ),
    "regimes": Table(
        title="When guidance helps",
        source="ours",
        rows=(NONE, PLAIN, CDP, *(row for name in REGIMES for row in in_regime(name))),
        notes=(
            "Each regime is compared with itself. Little data or much: cdp-2, by --data.train_images and amounts; few "
            "classes or many: cdp-2 and cdp-3",
        ),
    ),
}
"""By name."""
