"""What makes a synthetic image worth keeping: one score per image, larger is better, by every rule of the papers.

Centroids and gradients are those of a classifier: the teacher's, or the encoder's (the robust classifier of a recipe).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gambeson.errors import require
from gambeson.models.network import ClassifierNetwork
from gambeson.quality.discriminator import CrossFitted, Discrimination, DiscriminatorScore
from gambeson.quality.memorisation import CopyTest
from gambeson.randomness import image_keys, uniform
from gambeson.robustness.attack_losses import Network, threat_of
from gambeson.robustness.inner import last
from gambeson.robustness.losses import TRADES, PGDAdversarial
from gambeson.synthesis.centroids import Centroids, features_of, pool_centroids, real_centroids
from gambeson.synthesis.gradient_norms import ParameterNorms, cross_entropy, input_norms, last_layer_norms
from gambeson.synthesis.kept_scores import KeptScores
from gambeson.synthesis.pool import Context, Role, Rows, Score, TrainedScore
from gambeson.types import Images, Labels, Logits, PerImage


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """The teacher's log-probability of the image's label (EDM-AT keeps the largest)."""

    looks: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def __call__(self, labels: Labels, logits: Logits) -> PerImage:
        """Labels [B] and logits [B, K] -> scores [B], larger is better."""
        return -F.cross_entropy(logits, labels, reduction="none")

    def bind(self, context: Context) -> Score:
        """Of the labelling's logits."""
        return lambda rows: self(rows.labels, rows.logits)


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Minus the entropy of the teacher's prediction (CDP keeps the smallest entropies)."""

    looks: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def __call__(self, labels: Labels, logits: Logits) -> PerImage:
        """Labels [B] and logits [B, K] -> scores [B], larger is better."""
        return (logits.softmax(1) * logits.log_softmax(1)).sum(1)

    def bind(self, context: Context) -> Score:
        """Of the labelling's logits."""
        return lambda rows: self(rows.labels, rows.logits)


@dataclass(frozen=True, kw_only=True)
class LabelMargin:
    """The teacher's logit of the image's label minus the largest other one: how far the label is from changing."""

    looks: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def __call__(self, labels: Labels, logits: Logits) -> PerImage:
        """Labels [B] and logits [B, K] -> scores [B], larger is better. UserError for a single class."""
        require(logits.shape[1] > 1, "LabelMargin", "logits of at least 2 classes", logits.shape[1])
        others = logits.scatter(1, labels[:, None], -torch.inf).max(1).values
        return logits.gather(1, labels[:, None]).squeeze(1) - others

    def bind(self, context: Context) -> Score:
        """Of the labelling's logits."""
        return lambda rows: self(rows.labels, rows.logits)


@dataclass(frozen=True, kw_only=True)
class Random:
    """A draw for each position of the store: the rule that others have to beat."""

    looks: ClassVar[bool] = False

    seed: int = 0  # another seed chooses others

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def bind(self, context: Context) -> Score:
        """Uniform numbers in [0, 1), float64, of a counter-based stream."""
        return lambda rows: uniform(rows.positions, f"selection/{self.seed}", (1,))[:, 0]


def _needed(network: Role, of: str = "synthetic") -> tuple[str, ...]:
    return (network, "real") if of == "real" else (network,)


def _centroids(network: Role, of: str, context: Context) -> tuple[ClassifierNetwork, Centroids]:
    model = context.network(network)
    return model, context.ahead or _prepared(network, of, context)


def _prepared(network: Role, of: str, context: Context) -> Centroids:
    model = context.network(network)
    if of == "real":
        return real_centroids(model, context.real_set().train, context.pool)
    return pool_centroids(model, context.pool)


@dataclass(frozen=True, kw_only=True)
class Separability:
    """CDP's rule as its appendix words it: the smallest sum of L2 distances to the centroids of ALL classes.

    Read literally it prefers what lies in the middle of all classes, which `OwnCentroid` and `CentroidMargin` do not.
    A centroid is the mean feature of a class's images in the pool ("all samples in this class"); classes without
    images are left out of the sum.
    """

    looks: ClassVar[bool] = True

    network: Role = "teacher"  # whose features, before its last layer
    of: Literal["synthetic", "real"] = "synthetic"  # whose centroids: the pool's, or those of real train images

    @property
    def needs(self) -> tuple[str, ...]:
        """The network; real images for their centroids."""
        return _needed(self.network, self.of)

    def prepared(self, context: Context) -> Centroids:
        """The centroids."""
        return _prepared(self.network, self.of, context)

    def bind(self, context: Context) -> Score:
        """Minus the sum of distances."""
        model, centroids = _centroids(self.network, self.of, context)
        return lambda rows: -centroids.distances(features_of(model, rows.images)).sum(1).float()


@dataclass(frozen=True, kw_only=True)
class OwnCentroid:
    """Separability corrected: the smallest distance to the centroid of the image's own class."""

    looks: ClassVar[bool] = True

    network: Role = "teacher"  # whose features, before its last layer
    of: Literal["synthetic", "real"] = "synthetic"  # whose centroids: the pool's, or those of real train images

    @property
    def needs(self) -> tuple[str, ...]:
        """The network; real images for their centroids."""
        return _needed(self.network, self.of)

    def prepared(self, context: Context) -> Centroids:
        """The centroids."""
        return _prepared(self.network, self.of, context)

    def bind(self, context: Context) -> Score:
        """Minus the distance."""
        model, centroids = _centroids(self.network, self.of, context)
        return lambda rows: -centroids.own(features_of(model, rows.images), rows.labels).float()


@dataclass(frozen=True, kw_only=True)
class CentroidMargin:
    """Separability as its name says: the distance to the nearest other class's centroid minus that to one's own."""

    looks: ClassVar[bool] = True

    network: Role = "teacher"  # whose features, before its last layer
    of: Literal["synthetic", "real"] = "synthetic"  # whose centroids: the pool's, or those of real train images

    @property
    def needs(self) -> tuple[str, ...]:
        """The network; real images for their centroids."""
        return _needed(self.network, self.of)

    def prepared(self, context: Context) -> Centroids:
        """The centroids."""
        return _prepared(self.network, self.of, context)

    def bind(self, context: Context) -> Score:
        """The difference. UserError where one class alone has images."""
        model, centroids = _centroids(self.network, self.of, context)

        def score(rows: Rows) -> PerImage:
            features = features_of(model, rows.images)
            return (centroids.others(features, rows.labels) - centroids.own(features, rows.labels)).float()

        return score


@dataclass(frozen=True, kw_only=True)
class LastLayerGradientNorm:
    """The norm of the cross-entropy's gradient with respect to the last layer: ||p - onehot|| sqrt(||phi||^2 + 1)."""

    looks: ClassVar[bool] = True

    network: Role = "teacher"  # whose last layer

    @property
    def needs(self) -> tuple[str, ...]:
        """The network."""
        return _needed(self.network)

    def bind(self, context: Context) -> Score:
        """In closed form."""
        model = context.network(self.network)
        return lambda rows: last_layer_norms(model, rows.images, rows.labels)


@dataclass(frozen=True, kw_only=True)
class ParameterGradientNorm:
    """CDP's gradient norm: that of the classifier's loss with respect to all parameters (it keeps the largest)."""

    looks: ClassVar[bool] = True

    network: Role = "teacher"  # whose loss and parameters

    @property
    def needs(self) -> tuple[str, ...]:
        """The network."""
        return _needed(self.network)

    def bind(self, context: Context) -> Score:
        """Exact, by ghost norms."""
        norms = ParameterNorms(context.network(self.network), cross_entropy)
        return lambda rows: norms(rows.images, rows.labels).float()


@dataclass(frozen=True, kw_only=True)
class InputGradientNorm:
    """The norm of the cross-entropy's gradient with respect to the image's pixels."""

    looks: ClassVar[bool] = True

    network: Role = "teacher"  # whose loss

    @property
    def needs(self) -> tuple[str, ...]:
        """The network."""
        return _needed(self.network)

    def bind(self, context: Context) -> Score:
        """L2, pixels in [0, 1]."""
        model = context.network(self.network)
        return lambda rows: input_norms(model, rows.images, rows.labels)


@dataclass(frozen=True, kw_only=True)
class RobustGradientNorm:
    """CDP's "gradient norm-rob": that of the robust loss at the attacked image, with respect to all parameters.

    Gradients flow through every term of the loss; the attacked image is held still. Its random start is drawn from the
    image itself, so that other images do not change it.
    """

    looks: ClassVar[bool] = True

    network: Role = "encoder"  # whose loss and parameters; a standard classifier falls to any attack
    loss: TRADES | PGDAdversarial = TRADES()  # the robust loss and its attack
    seed: int = 0  # of the attack's random start

    @property
    def needs(self) -> tuple[str, ...]:
        """The network."""
        return _needed(self.network)

    def bind(self, context: Context) -> Score:
        """Exact, by ghost norms. ValueError without a threat."""
        model, attack = context.network(self.network), _attack(self.loss)
        norms, threat = ParameterNorms(model, _terms(self.loss)), threat_of(self.loss)

        def score(rows: Rows) -> PerImage:
            keys = image_keys(rows.images, rows.labels, self.seed)
            start = threat.random(rows.images, uniform(keys, "start", tuple(rows.images.shape[1:])))
            return norms(rows.images, attack(model, rows.images, rows.labels, start), rows.labels).float()

        return score


def _attack(loss: TRADES | PGDAdversarial) -> Callable[[ClassifierNetwork, Images, Labels, Images], Images]:
    """(model, images, labels, start) -> the attacked images."""
    if isinstance(loss, TRADES):
        return lambda model, images, labels, start: last(loss.attack(model, images, start))
    return lambda model, images, labels, start: last(loss.attack(model, images, labels, start))


def _terms(loss: TRADES | PGDAdversarial) -> Callable[..., Tensor]:
    """(model, images, attacked, labels) -> [B]; clean and attacked images pass one after the other."""
    return (replace(loss, statistics="both") if isinstance(loss, TRADES) else loss).value


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """PORT's rule: how real an image looks to an adversarially trained discriminator that has not seen it."""

    looks: ClassVar[bool] = True

    discrimination: Discrimination = Discrimination()  # how the two discriminators are trained, on half the pool each
    seed: int = 0  # of the halves and the trainings

    @property
    def needs(self) -> tuple[str, ...]:
        """Real images."""
        return ("real",)

    def bind(self, context: Context) -> Score:
        """Trains them, or finds them trained; larger looks more real."""
        return self.trained(context)

    def trained(self, context: Context) -> TrainedScore:
        """The same; the digest is that of both networks' weights."""
        score, pool = DiscriminatorScore(discrimination=self.discrimination), context.pool
        judged = score.fit(context.once, context.real_set().train, pool.store, seed=self.seed, device=pool.device)
        digest = weights_digest([judge.model for judge in judged.judges])
        return TrainedScore(_Judged(judged), digest)


@dataclass(frozen=True)
class _Judged:
    """The score by these discriminators, which travels to other processes."""

    judged: CrossFitted

    def __call__(self, rows: Rows) -> PerImage:
        return self.judged(rows.positions, rows.images)


def weights_digest(models: Sequence[Network]) -> str:
    """SHA-256 of the weights and buffers of networks, in this order, wherever and on whatever device they are."""
    state = hashlib.sha256()
    for model in models:
        assert isinstance(model, nn.Module)
        for name, value in model.state_dict().items():
            state.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


@dataclass(frozen=True, kw_only=True)
class TrainDistance:
    """The L2 distance in pixels to the nearest real train image: what copies are told by."""

    looks: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        """Real images."""
        return ("real",)

    def prepared(self, context: Context) -> CopyTest:
        """The train images with their yardstick."""
        return context.copies

    def bind(self, context: Context) -> Score:
        """The distance."""
        test: CopyTest = context.ahead or context.copies
        return lambda rows: test.nearest(rows.images.flatten(1).cpu())[0]


Scorers = (
    Confidence
    | Entropy
    | LabelMargin
    | Random
    | Separability
    | OwnCentroid
    | CentroidMargin
    | LastLayerGradientNorm
    | ParameterGradientNorm
    | InputGradientNorm
    | RobustGradientNorm
    | Discriminator
    | KeptScores
)
"""Every scorer, as the type of a recipe's field."""
