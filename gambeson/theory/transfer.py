"""What PORT and IRGD say about proxy data, in closed form in the Gaussian world: here a bound is a bound.

PORT (Sehwag et al. 2022): mean robustness on real and on proxy data differ by at most E_y W1(real | y, proxy | y).
IRGD (Gowal et al. 2021): pseudo-labels right, distributions close, support covered; here as numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.theory.gaussian import Norm, Number, Vectors, clean_accuracy, density, dual, number, vectors


def mean_robustness(theta: Vectors, mu: Vectors, sigma: Number = 1.0, norm: Norm = "linf") -> Tensor:
    """[...] E of the smallest perturbation that changes a right answer, 0 for wrong ones (PORT's robustness), exact.

    The distance of x to the boundary is max(0, y theta.x) / |theta|_dual, and y theta.x is Gaussian. UserError for a
    zero theta or mu, other d, sigma <= 0.
    """
    theta, mu = vectors(theta, "theta", zero=False), vectors(mu, "mu", zero=False)
    require(theta.shape[-1] == mu.shape[-1], "theta and mu", "the same d", (theta.shape[-1], mu.shape[-1]))
    spread = number(sigma, "sigma", positive=True) * theta.norm(dim=-1)
    score = (theta * mu).sum(-1) / spread
    return spread * (score * torch.special.ndtr(score) + density(score)) / dual(theta, norm)


def conditional_wasserstein(mu: Vectors, synthetic: Vectors, sigma: Number = 1.0, norm: Norm = "l2") -> Tensor:
    """[...] E_y W1(N(y mu, sigma^2 I), N(y synthetic, sigma^2 I)), exact: the length of the shift in the ground norm.

    Of equal spread, so that one set is the other one shifted: no plan is cheaper than the distance of the means, and
    the shift reaches it. For other spreads see `conditional_wasserstein2`.
    """
    number(sigma, "sigma", positive=True)
    mu, synthetic = vectors(mu, "mu"), vectors(synthetic, "synthetic")
    require(mu.shape[-1] == synthetic.shape[-1], "mu and synthetic", "the same d", (mu.shape[-1], synthetic.shape[-1]))
    require(norm in ("linf", "l2"), "norm", "linf or l2", norm)
    return (mu - synthetic).abs().amax(-1) if norm == "linf" else (mu - synthetic).norm(dim=-1)


def conditional_wasserstein2(mu: Vectors, synthetic: Vectors, sigma: Number, synthetic_sigma: Number) -> Tensor:
    """[...] W2 under the L2 norm, exact: sqrt(|mu - synthetic|^2 + d (sigma - synthetic_sigma)^2); at least W1."""
    mu, synthetic = vectors(mu, "mu"), vectors(synthetic, "synthetic")
    require(mu.shape[-1] == synthetic.shape[-1], "mu and synthetic", "the same d", (mu.shape[-1], synthetic.shape[-1]))
    own, other = number(sigma, "sigma", positive=True), number(synthetic_sigma, "synthetic_sigma", positive=True)
    return ((mu - synthetic).square().sum(-1) + mu.shape[-1] * (own - other).square()).sqrt()


def total_variation(mu: Vectors, synthetic: Vectors, sigma: Number = 1.0) -> Tensor:
    """[...] E_y of the total variation of the class Gaussians: 2 Phi(|mu - synthetic| / (2 sigma)) - 1, exact.

    No event differs more in probability, the event of being fooled included: with labels wrong for a share w of the
    synthetic images, robust error on real <= robust error on synthetic images against their labels + w + this.
    """
    distance = conditional_wasserstein(mu, synthetic, sigma, "l2")
    return 2 * torch.special.ndtr(distance / (2 * number(sigma, "sigma", positive=True))) - 1


def wrong_labels(inter: Vectors, synthetic: Vectors, sigma: Number = 1.0) -> Tensor:
    """[...] share of synthetic images whose pseudo-label sign(inter . x) is not their own class (IRGD's first)."""
    return 1 - clean_accuracy(inter, synthetic, sigma)
