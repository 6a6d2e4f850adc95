"""The measures by name: what each tells, where it comes from, what it needs, and with which numbers it is taken.

The command's help and fields, the documentation and the tests are made from this one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gambeson.errors import unknown
from gambeson.quality.contrast import AdversarialContrast
from gambeson.quality.coverage import Complementarity, Coverage
from gambeson.quality.frechet import FrechetDistance
from gambeson.quality.kernel import KernelDistance
from gambeson.quality.manifold import PrecisionRecall
from gambeson.quality.memorisation import Memorisation
from gambeson.quality.separation import ClassSeparation
from gambeson.quality.train_on_synthetic import TrainOnSynthetic
from gambeson.quality.transfer import RobustnessTransfer
from gambeson.quality.transport import ConditionalWasserstein, Wasserstein

Group = Literal["distance", "coverage", "classes", "copying", "training"]
GROUPS: tuple[Group, ...] = ("distance", "coverage", "classes", "copying", "training")
Needs = Literal["features", "held out", "images", "classifier", "training"]
"""Features of real and synthetic images; of train, synthetic and held-out real ones; images of both; a classifier and
images; a training on either."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A measure of the table."""

    group: Group  # which kind of question it answers
    tells: str  # in one sentence
    source: str  # where it comes from
    needs: Needs = "features"  # what it is given
    fast: bool = True  # whether it belongs to `fast`: nothing is trained, no classifier is asked for
    revision: int = 1  # rises when its numbers change meaning: kept ones are then measured again


TABLE: dict[str, Entry] = {
    "fid": Entry(
        group="distance",
        tells="How far Gaussians fitted to the features of both sets lie apart.",
        source="Heusel et al. 2017; without its bias: Chong and Forsyth 2020",
    ),
    "kid": Entry(
        group="distance",
        tells="How far the sets lie apart to a cubic kernel; unbiased at any number of images.",
        source="Binkowski et al. 2018",
    ),
    "wasserstein": Entry(
        group="distance",
        tells="What it costs to move the synthetic images onto the real ones, whatever the classes.",
        source="POT (exact plan); Sehwag et al. 2022 for its use",
    ),
    "conditional_wasserstein": Entry(
        group="distance",
        tells="The same within each class, weighted as the real classes are; an estimate, never a bound.",
        source="Sehwag et al. 2022 (PORT)",
    ),
    "precision_recall": Entry(
        group="coverage",
        tells="How many synthetic images lie where real ones do (precision, density), and how many real images are "
        "reached (recall, coverage).",
        source="Kynkaanniemi et al. 2019; Naeem et al. 2020",
    ),
    "complementarity": Entry(
        group="coverage",
        tells="Whether the image nearest to a synthetic one is a train, a held-out or a synthetic image: a third each.",
        source="Gowal et al. 2021 (IRGD)",
        needs="held out",
    ),
    "coverage": Entry(
        group="coverage",
        tells="How often the image nearest to a real one is synthetic: half of the time, for train and held-out alike.",
        source="Gowal et al. 2021 (IRGD)",
        needs="held out",
    ),
    "separation": Entry(
        group="classes",
        tells="How far the classes lie apart, beside how far those of real images do; what contrastive guidance is "
        "meant to raise.",
        source="trace ratio of Fisher's scatters; nearest centroid across halves",
        revision=2,
    ),
    "memorisation": Entry(
        group="copying",
        tells="How many synthetic images copy train images (held-out images are the yardstick), or repeat each other.",
        source="nearest neighbours of train, held-out images beside",
        needs="held out",
        revision=2,
    ),
    "transfer": Entry(
        group="training",
        tells="Whether a classifier is as accurate and as robust on synthetic images as on real ones.",
        source="Sehwag et al. 2022 (PORT)",
        needs="classifier",
        fast=False,
    ),
    "arc": Entry(
        group="training",
        tells="How long networks trained to tell real from synthetic still can when images are attacked.",
        source="Sehwag et al. 2022 (PORT)",
        needs="images",
        fast=False,
        revision=2,
    ),
    "cas": Entry(
        group="training",
        tells="How accurate on real images a classifier is that saw synthetic ones alone, beside as many real ones.",
        source="Ravuri and Vinyals 2019",
        needs="training",
        fast=False,
    ),
}
"""Name -> entry, in the order in which they are measured and shown."""
FAST = tuple(name for name, entry in TABLE.items() if entry.fast)
"""What is measured unless something else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Every measure of the table with its numbers."""

    fid: FrechetDistance = FrechetDistance()  # Frechet distance
    kid: KernelDistance = KernelDistance()  # kernel distance
    wasserstein: Wasserstein = Wasserstein()  # optimal transport
    conditional_wasserstein: ConditionalWasserstein = ConditionalWasserstein()  # optimal transport within classes
    precision_recall: PrecisionRecall = PrecisionRecall()  # balls of nearest neighbours
    complementarity: Complementarity = Complementarity()  # nearest neighbours of synthetic images
    coverage: Coverage = Coverage()  # nearest neighbours of real images
    separation: ClassSeparation = ClassSeparation()  # scatter between and within classes
    memorisation: Memorisation = Memorisation()  # copies of train images
    transfer: RobustnessTransfer = RobustnessTransfer()  # a classifier on both sets
    arc: AdversarialContrast = AdversarialContrast()  # discriminators under attack
    cas: TrainOnSynthetic = TrainOnSynthetic()  # trained on synthetic, tested on real

    def component(self, name: str) -> Any:
        """The measure of that name in the table."""
        return getattr(self, name)


def chosen(words: str) -> tuple[tuple[str, ...], bool]:
    """The names that 'fid,kid', 'fast' or 'all' stand for, in the table's order, and whether each was named.

    UserError listing the known names.
    """
    if words in ("fast", "all"):
        return (FAST if words == "fast" else tuple(TABLE)), False
    names = [word.strip().replace("-", "_") for word in words.split(",") if word.strip()]
    for name in names or [words]:
        if name not in TABLE:
            raise unknown("measure", name, [*TABLE, "fast", "all"])
    return tuple(name for name in TABLE if name in names), True


def described() -> str:
    """A line for each measure, for the help."""
    width = max(map(len, TABLE))
    return "\n".join(f"  {name:{width}}  {entry.tells}" for name, entry in TABLE.items())
