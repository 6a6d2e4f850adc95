"""The recipe: a frozen tree of plain dataclasses that says everything a run does; equal recipes have equal digests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any, Literal, TypeVar

from gambeson import canonical
from gambeson.data.datasets import Data, Digits
from gambeson.errors import UserError, require
from gambeson.robustness.assess import Assessment
from gambeson.robustness.evaluate import Evaluation
from gambeson.sampling.guidance import Contrastive, NoiseConditionedFeatures
from gambeson.synthesis.gaussian import GaussianControl
from gambeson.synthesis.generation import Generation
from gambeson.synthesis.label import ByCondition, Labeling
from gambeson.synthesis.select import Selection
from gambeson.threat import ThreatModel
from gambeson.training.classifier import ClassifierTraining
from gambeson.training.diffusion import DenoiserTraining
from gambeson.training.foreign import ForeignDenoiser
from gambeson.training.noise_conditioned import NoisyEncoderTraining

T = TypeVar("T")
EncoderKind = Literal["robust", "standard", "noise-conditioned"]


class Arm(Enum):
    """What the student is trained on besides the real images."""

    REAL = "real"
    GAUSSIAN = "gaussian"
    PLAIN = "plain"
    GUIDED = "guided"

    @property
    def title(self) -> str:
        """The arm in words."""
        return {
            "real": "real only",
            "gaussian": "+ Gaussian control",
            "plain": "+ plain diffusion",
            "guided": "+ Contrastive-DP",
        }[self.value]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: data and threat in, robust classifiers, synthetic images and a report out."""

    name: str = "run"  # name of the run folder
    data: Data = Digits()  # the labelled images
    threat: ThreatModel = ThreatModel()  # what the attacker may do
    arms: tuple[Arm, ...] = tuple(Arm)  # what is compared
    seed: int = 0  # first seed of networks, sampling and training; the split of the data has its own
    seeds: int = 1  # how many seeds, counted up from the first
    denoiser: DenoiserTraining | ForeignDenoiser = DenoiserTraining()  # the diffusion model, trained here or elsewhere
    teacher: ClassifierTraining = ClassifierTraining()  # standard classifier, for labels and selection
    encoder: EncoderKind = "robust"  # features that steer guidance: the real-only student's, teacher's, noisy_encoder's
    noisy_encoder: NoisyEncoderTraining = field(
        default=NoisyEncoderTraining(), metadata={"neutral": NoisyEncoderTraining()}
    )  # the encoder of noisy images, where encoder is noise-conditioned
    generation: Generation = Generation()  # synthetic images of the arms plain and guided
    control: GaussianControl = GaussianControl()  # synthetic images of the arm gaussian
    labeling: Labeling = Labeling()  # who labels synthetic images
    selection: Selection = Selection()  # which synthetic images are kept
    student: ClassifierTraining = ClassifierTraining()  # the robust classifier, one for each arm
    evaluation: Evaluation = Evaluation()  # how the students are measured
    assessment: Assessment | None = field(
        default=None, metadata={"neutral": None}
    )  # AutoAttack on the students besides; none: left out, since it takes long

    def __post_init__(self) -> None:
        plain_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name)
        require(plain_name is not None, "name", "letters, digits, '.', '_' and '-' (it names a folder)", self.name)
        if self.seeds < 1 or not self.arms or len(set(self.arms)) < len(self.arms):
            raise UserError(
                f"recipe: expected at least 1 seed and one or more different arms, got seeds={self.seeds}, "
                f"arms={[a.value for a in self.arms]}"
            )
        if self.labeling.soft is not None and not self.student.takes_soft_labels:
            raise UserError(
                "labeling.soft: expected a student's loss that takes soft labels (TRADES, PGDAdversarial, SCORE), got "
                "MART, whose margin needs one class for each image; or leave labeling.soft out"
            )
        self._check_guidance()

    def _check_guidance(self) -> None:
        """Raises UserError for parts that cannot work together."""
        guidance = self.generation.guidance
        noisy = isinstance(guidance, Contrastive) and isinstance(guidance.features, NoiseConditionedFeatures)
        if guidance is not None and noisy != (self.encoder == "noise-conditioned"):
            raise UserError(
                "encoder: expected 'noise-conditioned' together with generation.guidance.features "
                f"NoiseConditionedFeatures, and neither without the other; got {self.encoder!r} with "
                f"{type(getattr(guidance, 'features', guidance)).__name__}"
            )
        if not isinstance(self.denoiser, DenoiserTraining):
            return  # what weights from elsewhere can do is seen when they are read
        if self.generation.classifier_free is not None and not self.denoiser.label_dropout:
            raise UserError(
                "generation.classifier_free: expected denoiser.label_dropout above 0 (0.1 is usual), so that the "
                "denoiser also learns the null class; got 0"
            )
        self.check_classes(int(self.denoiser.conditional))

    def check_classes(self, classes: int) -> None:
        """Raises UserError where labels or guidance need the classes of a denoiser that has none (`classes` 0)."""
        guidance, synthetic = self.generation.guidance, {Arm.PLAIN, Arm.GUIDED} & set(self.arms)
        by_class = self.generation.needs_classes and Arm.GUIDED in self.arms
        if not classes and (by_class or (synthetic and isinstance(self.labeling.by, ByCondition))):
            raise UserError(
                "unconditional denoiser: expected guidance without classes (not TowardsClass, not OtherClasses) "
                f"and labeling.by ByTeacher, which labels the images afterwards; got {type(guidance).__name__} and "
                f"{type(self.labeling.by).__name__}"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, the same in any process."""
        return canonical.digest(self)

    def with_threat_everywhere(self) -> Recipe:
        """The recipe with its threat filled in wherever a component leaves it open (`threat: none`)."""
        return fill_threat(self, self.threat)


def fill_threat(component: T, threat: ThreatModel) -> T:
    """The component with the threat put in wherever it, or a part of it, leaves it open."""
    changes: dict[str, Any] = {}
    for each in fields(component):  # type: ignore[arg-type]
        value = getattr(component, each.name)
        if each.name == "threat" and value is None:
            changes["threat"] = threat
        elif is_dataclass(value):
            changes[each.name] = fill_threat(value, threat)
    return replace(component, **changes)  # type: ignore[type-var]


def _classes(cls: type) -> Iterator[type]:
    """Every dataclass that can stand in a tree of this type."""
    yield cls
    for hint in canonical.hints(cls).values():
        for part in canonical.components(hint)[0]:
            if is_dataclass(part):
                yield from _classes(part)  # type: ignore[arg-type]


def class_table() -> dict[str, type]:
    """Class name -> dataclass: the one table that recipe files and the command line share."""
    return {cls.__name__: cls for cls in _classes(Recipe)}
