"""The nouns of the house: array shapes, the step a sampler yields, and the protocols the rooms speak to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Generator, Tensor

Images = Float[Tensor, "b c h w"]
"""[B, C, H, W]; in [0, 1] at every public border, in [-1, 1] (plus noise) inside `models` and `sampling`."""
Labels = Int64[Tensor, " b"]
"""[B] class indices."""
Logits = Float[Tensor, "b k"]
"""[B, classes], unnormalised."""
PerImage = Float[Tensor, " b"]
"""[B], one number per image."""
Features = Float[Tensor, "b d"]
"""[B, D] embeddings."""
Sigmas = Float[Tensor, " n"]
"""[N + 1] decreasing noise levels, the last one 0."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a sampler yields after each step, and what a guidance may look at.

    x lives in the sigma space of Karras et al. 2022 (x = x0 + sigma n). `stage` counts the network evaluations within a
    step (Heun: 0 and 1). `raw` is the denoiser's x0-hat, `guided` the same after guidance.
    `previous` is the preceding step (None at the first one); its own `previous` is cut, so memory stays constant.
    sigma is that of x; `level` that of the schedule, which churn leaves behind (None: the same). Windows and strength
    profiles go by `scheduled`, so that the steps they pick are those of the plan whatever the sampler adds.
    """

    index: int
    stage: int
    x: Tensor
    sigma: float
    raw: Tensor
    guided: Tensor
    labels: Tensor | None
    previous: Step | None = None
    level: float | None = None

    @property
    def scheduled(self) -> float:
        """The schedule's noise level of this evaluation."""
        return self.sigma if self.level is None else self.level


@runtime_checkable
class Denoiser(Protocol):
    """E[x0 | x] for x = x0 + sigma n, images in [-1, 1]."""

    def __call__(self, x: Tensor, sigma: float | Tensor, labels: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class Guidance(Protocol):
    """Shifts the denoiser's x0-hat. `init` opens the state of one block; calling it returns (shift, state)."""

    def init(self, block: int, generator: Generator | None = None) -> Any: ...

    def __call__(self, state: Any, step: Step) -> tuple[Tensor | None, Any]: ...


@runtime_checkable
class Sampler(Protocol):
    """Walks noise down the sigmas; the last Step's x is the sample in [-1, 1] (`gambeson.sampling.final`)."""

    def __call__(
        self,
        denoise: Denoiser,
        noise: Tensor,
        sigmas: Tensor,
        guidance: Guidance | None = None,
        *,
        labels: Tensor | None = None,
        generator: Generator | None = None,
        block: int = 0,
    ) -> Iterator[Step]: ...


@runtime_checkable
class ContrastiveLoss(Protocol):
    """[B, D] queries and positives -> [B], one number per anchor; negatives None: the rest of the batch."""

    def __call__(
        self, query: Tensor, positive: Tensor, negatives: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor: ...


Encoder = Callable[..., Any]
"""Images in [0, 1] -> [B, D] embeddings; or (x_vp, sigma) -> [B, D], for encoders of noisy images."""


@runtime_checkable
class Classifier(Protocol):
    """Images in [0, 1] -> logits; normalisation lives inside."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def features(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class Labeler(Protocol):
    """The class each image was generated for [B] and a teacher's logits [B, K] -> labels [B]."""

    def __call__(self, condition: Tensor, logits: Tensor) -> Tensor: ...


@runtime_checkable
class Selector(Protocol):
    """Labels [B] and a teacher's logits [B, K] -> one score per image [B], larger is better."""

    def __call__(self, labels: Tensor, logits: Tensor) -> Tensor: ...


@runtime_checkable
class Attack(Protocol):
    """Adversarial images for a classifier, inside the threat's ball and [0, 1]."""

    def __call__(self, model: Classifier, images: Tensor, labels: Tensor) -> Tensor: ...


@runtime_checkable
class RobustLoss(Protocol):
    """One training loss per image."""

    def __call__(self, model: Any, images: Tensor, labels: Tensor, generator: Generator | None = None) -> Tensor: ...


Progress = Callable[[int, int], None]
"""Called with (done, total) as a stage advances."""


def silent(done: int, total: int) -> None:
    """The progress that shows nothing."""


def unheard(line: str) -> None:
    """Where lines for a person go when nobody listens."""
