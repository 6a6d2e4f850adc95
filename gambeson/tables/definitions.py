"""The tables by name: CDP's Tables 2 to 6, our ablations, and the rivals that guidance has to beat. Data, no code."""

from __future__ import annotations

from dataclasses import replace

from gambeson.data.label_safe import CutMix
from gambeson.recipe import Arm
from gambeson.sampling.contrastive import HardNegative
from gambeson.sampling.guidance import DenoisedFeatures, NoiseConditionedFeatures, Window
from gambeson.sampling.pairs import OtherClasses, PreviousStep, RealPositives
from gambeson.synthesis.scorers import Entropy, ParameterGradientNorm, Random, Separability
from gambeson.tables.cells import Of, Row, Table
from gambeson.tables.ingredients import (
    HNM,
    HNM_EMBEDDING,
    INFO_NCE,
    LAMBDA_100K,
    POOL,
    SIGNS,
    SUPERVISED,
    against_real,
    crop,
    cut_out,
    guided,
    half_the_steps,
    robust_gradient,
    strengths,
    towards_class,
    with_null_class,
)
from gambeson.tables.printed import printed

NONE = Row(name="none", about="real images only", arm=Arm.REAL)
PLAIN = Row(name="plain", about="+ plain diffusion", arm=Arm.PLAIN, against=("none",))
CDP = Row(
    name="cdp", about="+ Contrastive-DP (HNM, embedding)", changes=guided(HNM_EMBEDDING), against=("plain", "none")
)
BOTH = ("plain", "none")
CONFOUNDED = (
    "The paper's rows at 200K and 1M equal its entropy-selected rows of Table 6, so guidance and selection are not "
    "told apart there (METHOD 3); here nothing is selected: see guidance-selection"
)
CONDITIONAL = (
    "The paper's CIFAR-10 model is unconditional and LaNet labels its images; here the base recipe's denoiser is used, "
    "and its labels"
)

TABLES: dict[str, Table] = {
    "cdp-2": Table(
        title="Amount of synthetic data",
        source="CDP, Table 2 (CIFAR-10, WRN-28-10)",
        rows=(NONE, PLAIN, CDP),
        amounts={"digits": (1, 4, 20), "gpu": (1, 4)},
        printed=printed("cdp-2"),
        notes=(CONFOUNDED, CONDITIONAL),
    ),
    "cdp-3": Table(
        title="Another data set: traffic signs",
        source="CDP, Table 3 (Traffic Signs, WRN-28-10; about 1.3 synthetic images for each real one)",
        images="signs",
        rows=(
            NONE,
            PLAIN,
            replace(CDP, changes=guided(SIGNS), about="+ Contrastive-DP (HNM, embedding, 50 < t < 150)"),
        ),
        amounts={"digits": (1,), "16": (1,), "gpu": (1,)},
        printed=printed("cdp-3"),
    ),
    "cdp-4": Table(
        title="Strength of guidance",
        source="CDP, Table 4",
        rows=(
            NONE,
            PLAIN,
            *(
                Row(
                    name=f"lambda-{k}k",
                    about=f"lambda = {k}k (strength {LAMBDA_100K * k / 100:.4g})",
                    changes=guided(replace(HNM_EMBEDDING, strength=LAMBDA_100K * k / 100)),
                    against=BOTH,
                )
                for k in (50, 100, 200)
            ),
        ),
        printed=printed("cdp-4"),
        notes=(CONDITIONAL,),
    ),
    "cdp-5": Table(
        title="Loss and embedding network",
        source="CDP, Table 5 (its students saw batches of 256 there, 1,024 elsewhere)",
        rows=(
            NONE,
            PLAIN,
            Row(name="infonce", about="InfoNCE, lambda 20k", changes=guided(INFO_NCE), against=BOTH),
            Row(name="hnm-embedding", about="HNM with embedding", changes=guided(HNM_EMBEDDING), against=BOTH),
            Row(name="hnm", about="HNM without embedding", changes=guided(HNM), against=("hnm-embedding", *BOTH)),
        ),
        printed=printed("cdp-5"),
        notes=(CONDITIONAL,),
    ),
    "cdp-6": Table(
        title="Which images are kept",
        source="CDP, Table 6 and appendix D.3",
        rows=tuple(
            replace(row, pool=POOL)
            for row in (
                Row(
                    name="plain-random",
                    about="plain, kept at random",
                    arm=Arm.PLAIN,
                    changes={"selection.score": Random()},
                ),
                Row(
                    name="plain-separability",
                    about="plain, separability",
                    arm=Arm.PLAIN,
                    changes={"selection.score": Separability()},
                    against=("plain-random",),
                ),
                Row(
                    name="cdp-random",
                    about="Contrastive-DP, kept at random",
                    changes=guided(HNM_EMBEDDING) | {"selection.score": Random()},
                    against=("plain-random",),
                ),
                Row(
                    name="cdp-gradient-norm",
                    about="Contrastive-DP, gradient norm",
                    changes=guided(HNM_EMBEDDING) | {"selection.score": ParameterGradientNorm()},
                    against=("cdp-random", "plain-random"),
                ),
                Row(
                    name="cdp-gradient-norm-rob",
                    about="Contrastive-DP, gradient norm-rob",
                    changes=guided(HNM_EMBEDDING) | {"selection.score": Of(robust_gradient)},
                    against=("cdp-random", "plain-random"),
                ),
                Row(
                    name="cdp-entropy",
                    about="Contrastive-DP, entropy",
                    changes=guided(HNM_EMBEDDING) | {"selection.score": Entropy()},
                    against=("cdp-random", "plain-random"),
                ),
            )
        ),
        printed=printed("cdp-6"),
        notes=(f"{POOL} images are generated for each one kept; the paper names no number", CONDITIONAL),
    ),
    "guidance-selection": Table(
        title="Guidance and selection, told apart",
        source="ours: what CDP's Tables 2 and 6 confound",
        rows=tuple(
            replace(row, pool=POOL)
            for row in (
                Row(name="plain", about="neither", arm=Arm.PLAIN, changes={"selection.score": Random()}),
                Row(
                    name="guided",
                    about="guidance",
                    changes=guided(HNM_EMBEDDING) | {"selection.score": Random()},
                    against=("plain",),
                ),
                Row(
                    name="selected",
                    about="selection (entropy)",
                    arm=Arm.PLAIN,
                    changes={"selection.score": Entropy()},
                    against=("plain",),
                ),
                Row(
                    name="guided-selected",
                    about="both",
                    changes=guided(HNM_EMBEDDING) | {"selection.score": Entropy()},
                    against=("plain", "selected", "guided"),
                ),
            )
        ),
        square=("plain", "guided", "selected", "guided-selected"),
        notes=(f"{POOL} images are generated for each one kept in all four cells; without selection, at random",),
    ),
    "encoders": Table(
        title="What guidance looks through",
        source="ours: METHOD 1.3, to be settled before anything is tuned",
        rows=(
            NONE,
            PLAIN,
            Row(
                name="robust",
                about="robust encoder",
                changes=guided(HNM),
                choices=strengths(LAMBDA_100K, LAMBDA_100K / 10),
                against=BOTH,
            ),
            Row(
                name="standard",
                about="standard encoder",
                changes=guided(HNM) | {"encoder": "standard"},
                choices=strengths(LAMBDA_100K, LAMBDA_100K / 10),
                against=("robust", *BOTH),
            ),
            Row(
                name="noise-conditioned",
                about="noise-conditioned encoder",
                changes=guided(replace(HNM, features=NoiseConditionedFeatures())) | {"encoder": "noise-conditioned"},
                choices=strengths(LAMBDA_100K, LAMBDA_100K / 10),
                against=("robust", *BOTH),
            ),
        ),
        notes=("Encoders differ in the length of their gradients: each has its better strength of two",),
    ),
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
                changes=guided(replace(HNM, window=Window(sigma_min=0.5, sigma_max=4.0))),
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
                changes=guided(replace(HNM, window=Window())),
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
}
"""Every table by name."""
