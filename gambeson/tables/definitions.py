"""The tables by name: CDP's Tables 2 to 6, what they confound told apart, and ours. Data, no code."""

from __future__ import annotations

from dataclasses import replace

from gambeson.recipe import Arm
from gambeson.sampling.guidance import NoiseConditionedFeatures
from gambeson.synthesis.scorers import Entropy, ParameterGradientNorm, Random, Separability
from gambeson.tables.cells import Of, Row, Table
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
    SIGNS,
    guided,
    robust_gradient,
    strengths,
)
from gambeson.tables.ours import OURS
from gambeson.tables.printed import printed

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
    **OURS,
}
"""Every table by name."""
