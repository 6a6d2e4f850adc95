"""Sweeps over c, angles, n, d and epsilon for the page, and when a larger c stops helping: wrong pseudo-labels.

|mu| = 2 everywhere; epsilon is told as the share of |mu| that the attacker takes at 0 degrees, epsilon sqrt(d) / |mu|:
a half of it is the paper's choice for d = 2 as for d = 100.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gambeson.randomness import generator
from gambeson.theory.gaussian import best_accuracies, clean_accuracy, robust_accuracy
from gambeson.theory.means import mean_at, turned
from gambeson.theory.transfer import conditional_wasserstein, mean_robustness, total_variation, wrong_labels
from gambeson.theory.trials import Protocol, World, pseudo_labelled_sum, run_trials

LENGTH = 2.0
"""|mu| of the sweeps."""
AXES: dict[str, tuple[float, ...]] = {
    "degrees": (0, 30, 60),
    "d": (2, 10, 30, 100),
    "n": (5, 10, 20, 50, 100),
    "turn": (0, 15, 30, 45, 60, 75, 90),
    "c": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0),
}
"""The grid, the slowest axis first; `budget` is evaluated on each of its classifiers."""
BUDGETS = (0.0, 0.25, 0.5, 0.75, 1.0)
SERIES = ("real", "synthetic", "synthetic, true labels", "both")
"""What theta is trained on; n real images a class, and as many synthetic ones."""
TOLD = {
    "degrees": "angle of \u03bc to the diagonal (degrees)",
    "d": "dimension d",
    "n": "images a class n",
    "turn": "angle of \u03bc\u0303 to \u03bc (degrees)",
    "c": "c = |\u03bc\u0303| / |\u03bc|",
    "budget": "attacker's share \u03b5\u221ad / |\u03bc|",
}


def sweep(trials: int, seed: int = 0) -> dict[str, Any]:
    """JSON for the page: axes, and per series the mean accuracies in 1e-4, in the order of AXES, then of BUDGETS.

    Budget 0 is clean accuracy. The same draws are used for every c and turn, so that curves are smooth.
    """
    rows: list[Tensor] = []
    for degrees, d, n in product(AXES["degrees"], AXES["d"], AXES["n"]):
        rows += _plane(float(degrees), int(d), int(n), trials, seed)
    table = torch.stack(rows)  # [settings, series, budgets]
    values = {name: (table[:, i] * 1e4).round().long().flatten().tolist() for i, name in enumerate(SERIES)}
    axes = {**AXES, "budget": BUDGETS}
    best = [_optima(float(degrees), int(d)) for degrees, d in product(AXES["degrees"], AXES["d"])]
    optimum = [round(1e4 * a) for row in best for a in row]
    return {
        "optimum": optimum,
        "axes": axes,
        "told": TOLD,
        "series": SERIES,
        "values": values,
        "trials": trials,
        "length": LENGTH,
    }


def _plane(degrees: float, d: int, n: int, trials: int, seed: int) -> Iterator[Tensor]:
    """[series, budgets] for every turn and c, the slowest axis first."""
    mu = mean_at(d, degrees, LENGTH)
    m, base = 2 * n, ("sweep", str(degrees), d, n)
    first = generator(seed, *base)
    inter = mu + torch.randn((trials, d), generator=first, dtype=torch.float64) / math.sqrt(m)
    real, noise = _accuracies(inter, mu), torch.randn((trials, d), generator=first, dtype=torch.float64)
    for turn, c in product(AXES["turn"], AXES["c"]):
        other = turned(mu, float(turn), float(c), generator(seed, "direction", d))
        world = World(mean=tuple(mu.tolist()), synthetic=tuple(other.tolist()), epsilon=0.0)
        total = pseudo_labelled_sum(inter, world, m, generator(seed, *base, "labels"))
        ours = [total, m * other + math.sqrt(m) * noise, m * inter + total]
        yield torch.stack([real, *(_accuracies(theta, mu) for theta in ours)])


def _optima(degrees: float, d: int) -> list[float]:
    """[budgets] what no linear classifier exceeds."""
    mu = mean_at(d, degrees, LENGTH)
    return [float(best_accuracies(mu, share * LENGTH / math.sqrt(d))["robust"]) for share in BUDGETS]


def _accuracies(theta: Tensor, mu: Tensor) -> Tensor:
    """[budgets] mean robust accuracy over trials."""
    share = torch.tensor(BUDGETS, dtype=torch.float64)[:, None] * LENGTH / math.sqrt(len(mu))
    return robust_accuracy(theta, mu, share).mean(1)


GROWING = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0)
FEW = (1, 2, 4, 8, 16)
"""Real images in total behind theta_inter."""


def plateau(length: float, n: int) -> float:
    """Mean clean accuracy as c grows without bound, mu~ = c mu, sigma = 1, labels by theta_inter from n images in all.

    All labels are then right, or, where theta_inter points away from mu (probability p = Phi(-sqrt(n) |mu|)), all
    wrong: (1 - p) Phi(|mu|) + p Phi(-|mu|). No c undoes that: the images were only ever as good as their labels.
    """
    wrong, right = (0.5 * math.erfc(x / math.sqrt(2)) for x in (math.sqrt(n) * length, -length))
    return (1 - wrong) * right + wrong * (1 - right)


def stopping(d: int = 20, length: float = 1.0, synthetic: int = 100, trials: int = 4000, seed: int = 0) -> list[Any]:
    """When a larger c stops helping, for each n in FEW: mean accuracy over c, wrong labels, plateau, the c it takes.

    Trained on `synthetic` images in all, mu~ = c mu. `enough`: the least c of the grid from which all further gain is
    below half a point; None where even the largest falls short of that.
    """
    mu = mean_at(d, 0, length)
    rows = []
    for n in FEW:
        found, labels = [], []
        for c in GROWING:
            world = World(mean=tuple(mu.tolist()), synthetic=tuple((c * mu).tolist()), epsilon=0.0)
            protocol, draws = Protocol(counted="total"), generator(seed, "stopping", n)
            found.append(run_trials(world, protocol, n, synthetic, trials, draws).mean("clean"))
            inter = mu + torch.randn((trials, d), generator=generator(seed, "inter", n), dtype=torch.float64) / n**0.5
            labels.append(float(wrong_labels(inter, c * mu).mean()))
        end = plateau(length, n)
        enough = next((c for c, a in zip(GROWING, found, strict=True) if a > end - 0.005), None)
        rows.append({"n": n, "c": GROWING, "clean": found, "wrong": labels, "plateau": end, "enough": enough})
    return rows


def best_c(swept: dict[str, Any], degrees: int = 0, d: int = 100, budget: float = 0.0) -> list[dict[str, Any]]:
    """The c of the grid with the highest mean accuracy, for each turn of mu~, n, and what theta is trained on.

    `best` is None where it lies within .001 of another c's: there is no telling, or it does not matter.
    """
    axes, rows = swept["axes"], []
    shape = [len(values) for values in axes.values()]
    at = {"degrees": axes["degrees"].index(degrees), "d": axes["d"].index(d), "budget": axes["budget"].index(budget)}
    for name in ("synthetic", "both"):
        table = torch.tensor(swept["values"][name], dtype=torch.float64).view(shape)
        chosen = table[at["degrees"], at["d"], ..., at["budget"]] / 1e4  # [n, turn, c]
        for (i, n), (k, turn) in product(enumerate(axes["n"]), enumerate(axes["turn"])):
            over = chosen[i, k]
            top = int(over.argmax())
            near = int((over > over[top] - 0.001).sum()) > 1
            row = {"trained_on": name, "n": n, "turn": turn, "best": None if near else axes["c"][top]}
            rows.append({**row, "accuracy": float(over[top]), "at_1": float(over[axes["c"].index(1.0)])})
    return rows


def transfers(d: int = 100, length: float = 2.0, epsilon: float = 0.1) -> list[dict[str, float]]:
    """PORT's bound and IRGD's conditions over c in closed form, mu~ = c mu, theta = mu (linf robustness).

    gap: |mean robustness on real - on synthetic|; bound: conditional W1 with the linf ground norm, PORT's for this
    robustness; w1: the same in L2; variation: total variation of the class Gaussians; wrong: share of wrong labels by
    theta = mu; on_synthetic: robust accuracy of theta on the synthetic images; robust: on the real ones, whatever c.
    """
    mu = mean_at(d, 0, length)
    own = mean_robustness(mu, mu)
    return [
        {
            "c": c,
            "gap": float((own - mean_robustness(mu, c * mu)).abs()),
            "bound": float(conditional_wasserstein(mu, c * mu, norm="linf")),
            "w1": float(conditional_wasserstein(mu, c * mu)),
            "variation": float(total_variation(mu, c * mu)),
            "wrong": float(wrong_labels(mu, c * mu)),
            "on_synthetic": float(robust_accuracy(mu, c * mu, epsilon)),
            "robust": float(robust_accuracy(mu, mu, epsilon)),
            "clean": float(clean_accuracy(mu, mu)),
        }
        for c in GROWING
        if c <= 4
    ]
