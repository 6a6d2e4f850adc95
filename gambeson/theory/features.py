"""The step beyond: does the Gaussian theory say which images train the more robust linear head on real features?

Class means and within-class spreads of several sets of features (real, plain, guided) go into the theory; what it
predicts, pair of classes by pair of classes, stands beside heads that are trained and attacked. Arrays in, numbers out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from gambeson.errors import require
from gambeson.randomness import generator
from gambeson.theory.gaussian import Norm, dual

Kind = Literal["isotropic", "covariance"]
"""The theory as printed (one spread in every direction), or with the measured within-class covariance."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Labelled features: values [N, D] float64, labels [N] int64 from 0 on, at least two of each class."""

    name: str
    values: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        """UserError for non-finite features, other lengths, classes of fewer than two images."""
        require(self.values.ndim == 2, self.name, "features [N, D]", tuple(self.values.shape))
        require(len(self.values) == len(self.labels), self.name, "a label for each row", len(self.labels))
        bad = int((~self.values.isfinite()).any(1).sum())
        require(bad == 0, self.name, "finite features", f"{bad} rows that are not")
        counts = self.counts
        require(len(counts) >= 2, self.name, "two classes or more", len(counts))
        require(int(counts.min()) >= 2, self.name, "two images of each class or more", counts.tolist())

    @property
    def counts(self) -> Tensor:
        """[K] images of each class."""
        return self.labels.bincount()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the theory is told of a set: class means [K, D], pooled within-class covariance [D, D], class sizes [K]."""

    means: Tensor
    covariance: Tensor
    counts: Tensor

    @property
    def spread(self) -> float:
        """Standard deviation of a coordinate within a class, the theory's sigma."""
        return float(self.covariance.diagonal().mean().sqrt())

    def within(self, kind: Kind) -> Tensor:
        """[D, D] the covariance that this kind of theory takes."""
        same = torch.eye(len(self.covariance), dtype=torch.float64) * self.spread**2
        return same if kind == "isotropic" else self.covariance


def summarise(features: Features) -> Summary:
    """Class means and pooled within-class covariance (n - K)."""
    x, y = features.values.double(), features.labels
    means = torch.stack([x[y == k].mean(0) for k in range(len(features.counts))])
    rest = x - means[y]
    return Summary(means=means, covariance=rest.T @ rest / (len(x) - len(means)), counts=features.counts)


def pairs_of(classes: int) -> tuple[Tensor, Tensor]:
    """The classes of all pairs i < j, two tensors [P]."""
    first, second = zip(*combinations(range(classes), 2), strict=True)
    return torch.tensor(first), torch.tensor(second)


def budgets(world: Summary, share: float, norm: Norm) -> Tensor:
    """[P] epsilon of each pair: the attacker takes this share of the margin of theta = mu at a real class mean."""
    i, j = pairs_of(len(world.means))
    mu = (world.means[i] - world.means[j]) / 2
    return share * mu.square().sum(1) / dual(mu, norm)


def heads(means: Tensor) -> tuple[Tensor, Tensor]:
    """(theta [..., P, D], midpoint [..., P, D]) of class means [..., K, D]: theta = half their difference."""
    i, j = pairs_of(means.shape[-2])
    return (means[..., i, :] - means[..., j, :]) / 2, (means[..., i, :] + means[..., j, :]) / 2


def predicted(
    world: Summary,
    learned: Summary,
    count: int,
    epsilon: Tensor,
    norm: Norm,
    kind: Kind,
    draws: int,
    stream: Generator,
) -> Tensor:
    """[P] robust accuracy that the theory expects of heads from `count` images a class of the learned set.

    Class means are drawn as means of `count` of the set's images without replacement; each head then meets Gaussian
    real classes of `world`, in closed form (CDP, equation 7, with the midpoint in place of the origin).
    """
    within = learned.within(kind)
    left = (1 / count - 1 / learned.counts.double()).clamp(min=0).sqrt()[:, None]
    values, axes = torch.linalg.eigh(within)
    root = axes * values.clamp(min=0).sqrt()
    noise = torch.randn((draws, *learned.means.shape), generator=stream, dtype=torch.float64) @ root.T
    theta, middle = heads(learned.means + left * noise)
    spread = ((theta @ world.within(kind)) * theta).sum(-1).clamp(min=1e-30).sqrt()
    i, j = pairs_of(len(world.means))
    lost = epsilon * dual(theta, norm)
    first = ((world.means[i] - middle) * theta).sum(-1) - lost
    second = ((middle - world.means[j]) * theta).sum(-1) - lost
    return ((torch.special.ndtr(first / spread) + torch.special.ndtr(second / spread)) / 2).mean(0)


def subset_means(features: Features, count: int, stream: Generator) -> Tensor:
    """[K, D] means of `count` images of each class, drawn without replacement."""
    means = []
    for k in range(len(features.counts)):
        own = (features.labels == k).nonzero()[:, 0]
        chosen = own[torch.randperm(len(own), generator=stream)[:count]]
        means.append(features.values[chosen].double().mean(0))
    return torch.stack(means)


def measured(held_out: Features, means: Tensor, epsilon: Tensor, norm: Norm) -> Tensor:
    """[P] robust accuracy of the heads of class means [K, D] on held-out real features, exact for linear heads.

    An image is robust where its margin exceeds epsilon |theta|_dual; the mean of both classes' shares.
    """
    theta, middle = heads(means)
    x = held_out.values.double()
    margin, lost = x @ theta.T - (middle * theta).sum(1), epsilon * dual(theta, norm)
    i, j = pairs_of(len(means))
    one = torch.nn.functional.one_hot(held_out.labels, len(means)).double()
    one = one / one.sum(0)
    first, second = one.T @ (margin > lost).double(), one.T @ (-margin > lost).double()
    place = torch.arange(len(i))
    return (first[i, place] + second[j, place]) / 2


def all_classes(held_out: Features, weights: Tensor, biases: Tensor, epsilon: float, norm: Norm) -> float:
    """Robust accuracy of one linear head over all classes, exact: every other class must stay epsilon away.

    weights [K, D], biases [K]; an image's distance to class j's region is its margin over |w_y - w_j|_dual.
    """
    x, y = held_out.values.double(), held_out.labels
    logits = x @ weights.T + biases
    margin = logits.gather(1, y[:, None]) - logits
    apart = dual(weights[y][:, None] - weights, norm)
    other = torch.arange(len(weights)) != y[:, None]
    return float(((margin > epsilon * apart) | ~other).all(1).double().mean())


def logistic(features: Features, count: int, stream: Generator) -> tuple[Tensor, Tensor]:
    """(weights [K, D], biases [K]) of a logistic regression on `count` images of each class (scikit-learn, C = 1)."""
    from sklearn.linear_model import LogisticRegression

    rows = []
    for k in range(len(features.counts)):
        own = (features.labels == k).nonzero()[:, 0]
        rows.append(own[torch.randperm(len(own), generator=stream)[:count]])
    chosen = torch.cat(rows)
    fitted = LogisticRegression(max_iter=500).fit(features.values[chosen].numpy(), features.labels[chosen].numpy())
    coefficients, intercepts = torch.from_numpy(fitted.coef_).double(), torch.from_numpy(fitted.intercept_).double()
    if len(features.counts) == 2:  # scikit-learn keeps one row for two classes
        half = torch.tensor([[-0.5], [0.5]], dtype=torch.float64)
        return half * coefficients, half[:, 0] * intercepts
    return coefficients, intercepts


def geometry(world: Summary, learned: Summary) -> dict[str, float]:
    """Where a set stands in the theory's terms, means over pairs: c, the angle of mu~ to mu in degrees, sigma~ / sigma.

    c is the length of mu~ along mu over |mu|; separation is |mu~| / sigma~; shift: how far the midpoint of the two
    classes has moved along mu, over |mu| (0 in the paper's world, whose classes lie on both sides of the origin).
    """
    (mu, origin), (other, middle) = heads(world.means), heads(learned.means)
    along = (mu * other).sum(1)
    cosine = along / (mu.norm(dim=1) * other.norm(dim=1))
    return {
        "c": float((along / mu.square().sum(1)).mean()),
        "degrees": float(torch.rad2deg(cosine.clamp(-1, 1).acos()).mean()),
        "spread": learned.spread / world.spread,
        "shift": float((((middle - origin) * mu).sum(1) / mu.square().sum(1)).abs().mean()),
        "separation": float(other.norm(dim=1).mean()) / learned.spread,
    }


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Rank correlation; None where one of them is constant."""
    from scipy.stats import spearmanr

    if len(a) < 3 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    found: Any = spearmanr(a.numpy(), b.numpy())
    return float(found.statistic)


def agreement(told: Tensor, found: Tensor, classes: int) -> dict[str, Any]:
    """How well predicted differences [P] match measured ones: share of equal signs, rank correlation, predicted mean.

    range: of the share, leaving out each class in turn (pairs share classes, so they are not independent).
    """
    same = (told * found > 0).double()
    i, j = pairs_of(classes)
    left = [float(same[(i != k) & (j != k)].mean()) for k in range(classes)] if classes > 2 else []
    return {
        "pairs": len(told),
        "same_sign": float(same.mean()),
        "range": [min(left), max(left)] if left else None,
        "spearman": spearman(told, found),
        "predicted": float(told.mean()),
    }


@dataclass(frozen=True, kw_only=True)
class Study:
    """How the question is asked."""

    counts: tuple[int, ...] = (5, 10, 30, 100)  # images of a class that heads are learned from
    shares: tuple[float, ...] = (0.5, 0.8)  # what the attacker takes of the margin of theta = mu
    repeats: int = 20  # subsets per set and count
    logistic: int = 5  # of these, the ones that a logistic regression is fitted to
    draws: int = 200  # draws of the theory's class means
    seed: int = 0  # seed of subsets and draws

    def __post_init__(self) -> None:
        """UserError for numbers out of range."""
        require(min(self.counts, default=0) >= 1, "counts", "numbers from 1 on", self.counts)
        shares = len(self.shares) > 0 and all(0 <= share < 1 for share in self.shares)
        require(shares, "shares", "one or more numbers from 0 to below 1", self.shares)
        require(self.repeats >= 2 and self.draws >= 2, "repeats and draws", "2 or more", (self.repeats, self.draws))
        fits = 2 <= self.logistic <= self.repeats
        require(fits, "logistic", "a number from 2 to that of the repeats", self.logistic)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A set's heads from subsets of one size: class means of each subset, and all-class heads of the first ones."""

    summary: Summary
    means: list[Tensor]
    heads: dict[str, list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The attacker: norm, the share of the margin, and the epsilons [P] which that is."""

    norm: Norm
    share: float
    epsilon: Tensor


NORMS: tuple[Norm, ...] = ("l2", "linf")
KINDS: tuple[Kind, ...] = ("isotropic", "covariance")


def study(world: Features, held_out: Features, sets: Sequence[Features], spec: Study = Study()) -> dict[str, Any]:
    """Prediction beside measurement for every set, count, norm, share and kind of theory; JSON.

    world: real features that the theory is told of; held_out: other real features where heads are measured; sets: what
    heads are learned from. UserError where dimensions or classes differ.
    """
    for each in (held_out, *sets):
        same = each.values.shape[1] == world.values.shape[1] and len(each.counts) == len(world.counts)
        require(same, each.name, "the dimension and classes of the real features", tuple(each.values.shape))
    told = summarise(world)
    attacks = [Attack(norm=n, share=s, epsilon=budgets(told, s, n)) for s in spec.shares for n in NORMS]
    results = []
    for count in spec.counts:
        learned = {each.name: _learn(each, count, spec) for each in sets if int(each.counts.min()) >= count}
        results += [_result(told, held_out, learned, count, attack, spec) for attack in attacks if learned]
    return {
        "classes": len(told.means),
        "dimension": world.values.shape[1],
        "world": len(world.values),
        "held_out": len(held_out.values),
        "spec": asdict(spec),
        "geometry": {each.name: geometry(told, summarise(each)) for each in sets},
        "images": {each.name: len(each.values) for each in sets},
        "results": results,
        "verdict": verdict(results),
    }


def _stream(spec: Study, name: str, count: int) -> Generator:
    return generator(spec.seed, "features", name, count)


def _learn(each: Features, count: int, spec: Study) -> Learned:
    draws = _stream(spec, each.name, count)
    means = [subset_means(each, count, draws) for _ in range(spec.repeats)]
    fitted = [logistic(each, count, draws) for _ in range(spec.logistic)]
    centroid = [(m, -m.square().sum(1) / 2) for m in means]
    return Learned(summary=summarise(each), means=means, heads={"centroid": centroid, "logistic": fitted})


def _result(
    world: Summary, held_out: Features, learned: Mapping[str, Learned], count: int, attack: Attack, spec: Study
) -> dict[str, Any]:
    """One count and attack: every set that has as many images of each class, and all comparisons of two of them."""
    found = {
        name: torch.stack([measured(held_out, means, attack.epsilon, attack.norm) for means in each.means])
        for name, each in learned.items()
    }
    told: dict[tuple[str, Kind], Tensor] = {
        (name, kind): predicted(
            world, each.summary, count, attack.epsilon, attack.norm, kind, spec.draws, _stream(spec, kind, count)
        )
        for name, each in learned.items()
        for kind in KINDS
    }
    size = float(attack.epsilon.median())
    rows = [
        {
            "set": name,
            "measured": float(found[name].mean()),
            "deviation": float(found[name].mean(1).std()),
            **{kind: _beside(told[name, kind], found[name]) for kind in KINDS},
            **{head: _over(held_out, fitted, size, attack.norm) for head, fitted in each.heads.items()},
        }
        for name, each in learned.items()
    ]
    pairs = [(b, a) for a, b in combinations(learned, 2)]
    return {
        "norm": attack.norm,
        "share": attack.share,
        "count": count,
        "epsilon": size,
        "sets": rows,
        "comparisons": [_compared(told, found, a, b, len(world.means)) for a, b in pairs],
    }


def _beside(told: Tensor, found: Tensor) -> dict[str, Any]:
    """The mean prediction, and its rank correlation with the measured accuracy over pairs."""
    return {"predicted": float(told.mean()), "spearman": spearman(told, found.mean(0))}


def _over(held_out: Features, fitted: Sequence[tuple[Tensor, Tensor]], size: float, norm: Norm) -> dict[str, float]:
    """Mean and deviation over subsets of the robust accuracy of a head over all classes."""
    found = torch.tensor([all_classes(held_out, *head, size, norm) for head in fitted], dtype=torch.float64)
    return {"mean": float(found.mean()), "deviation": float(found.std())}


def _compared(
    told: Mapping[tuple[str, Kind], Tensor], found: Mapping[str, Tensor], a: str, b: str, classes: int
) -> dict[str, Any]:
    """a minus b: measured, with its deviation over subsets, and what each kind of theory predicts."""
    difference = found[a] - found[b]
    kinds = {kind: agreement(told[a, kind] - told[b, kind], difference.mean(0), classes) for kind in KINDS}
    return {"a": a, "b": b, "measured": float(difference.mean()), "deviation": float(difference.mean(1).std()), **kinds}


def verdict(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all comparisons: how many differences are clear, and how often each kind of theory has the sign right.

    clear: measured means that differ by more than twice their deviation over subsets. right: of these, those whose
    predicted mean has the measured sign. same_sign: mean share of pairs of classes of equal sign, in all comparisons
    (a half is chance). Comparisons share images, classes and the teacher: no test is claimed.
    """
    every = [c for r in results for c in r["comparisons"]]
    clear = [c for c in every if abs(c["measured"]) > 2 * c["deviation"]]
    kinds = {
        kind: {
            "right": sum(c[kind]["predicted"] * c["measured"] > 0 for c in clear),
            "same_sign": sum(c[kind]["same_sign"] for c in every) / len(every) if every else None,
        }
        for kind in KINDS
    }
    return {"comparisons": len(every), "clear": len(clear), **kinds}
