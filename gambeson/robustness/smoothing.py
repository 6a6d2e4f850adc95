"""Randomised smoothing (Cohen, Rosenfeld & Kolter 2019): predictions that provably hold in an L2 ball.

g(x) is the class that the network f gives most often to x + sigma n, n ~ N(0, 1). Where f gives it with probability
p_A > 1/2, g does not change within sigma Phi^-1(p_A) of x (theorem 1, with p_B = 1 - p_A).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.special import betainc, betaincinv, ndtri
from torch import Tensor

from gambeson.errors import require
from gambeson.randomness import gaussian, image_keys
from gambeson.robustness.attack_losses import Network
from gambeson.robustness.inputs import attack_input_checks, logits_of
from gambeson.types import Images, Labels

ABSTAIN = -1
"""The prediction where the votes do not suffice for one."""
Votes = Int64[Tensor, "b classes"]
"""[B, K] how many noisy copies of each image the network gave each class."""
Bounds = Float[Tensor, " b"]
"""[B] float64, one number per image."""


def lower_bound(successes: Labels, trials: int, alpha: float) -> Bounds:
    """[B] Clopper and Pearson's one-sided lower bounds (1934) of a probability, from `successes` out of `trials`.

    The bound exceeds the probability with probability alpha at most: the alpha quantile of Beta(k, n - k + 1); 0 for
    k = 0, alpha^(1/n) for k = n.
    """
    k = successes.double().cpu().numpy()
    bound = betaincinv(np.maximum(k, 1), trials - k + 1, alpha)
    return torch.from_numpy(np.where(k > 0, bound, 0.0))


def radius_of(p_lower: Bounds, sigma: float) -> Bounds:
    """[B] L2 radii sigma Phi^-1(p_A), in pixels of [0, 1]; 0 where p_A <= 1/2, where nothing is certified."""
    return torch.from_numpy(sigma * ndtri(p_lower.clamp_min(0.5).double().cpu().numpy()))


def two_sided(first: Labels, second: Labels) -> Bounds:
    """[B] p-values of the exact two-sided binomial test that two classes with these votes are equally likely.

    2 P(X >= max) for X ~ Binomial(first + second, 1/2), at most 1 (Hung & Fithian 2019: the runner-up's votes are those
    of the second class seen, whichever it is).
    """
    most, both = torch.maximum(first, second).double(), (first + second).double()
    tail = betainc(most.clamp_min(1).cpu().numpy(), (both - most + 1).cpu().numpy(), 0.5)
    return torch.from_numpy(np.where(most.cpu().numpy() > 0, np.minimum(2 * tail, 1.0), 1.0))


@dataclass(frozen=True)
class Certificates:
    """What `Smoothing.certify` found, a row per image, on the CPU."""

    predicted: Labels  # [B] the class that g has in the ball, or ABSTAIN
    radius: Bounds  # [B] its L2 radius, in pixels of [0, 1]; 0 where it abstained
    p_lower: Bounds  # [B] lower bound of the probability that f gives the candidate to a noisy copy
    candidate: Labels  # [B] the class that the selecting votes named
    selection: Votes  # [B, K] the votes that chose the candidate
    votes: Votes  # [B, K] the votes that the bound is from, of other copies


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """The smoothed classifier g of a network, by Monte Carlo: right with probability 1 - alpha for each image.

    A network is given x + sigma n as it is, not clamped to [0, 1]: a clamp would be a part of f, and one that neither
    Cohen et al. nor `GaussianNoise` train it with. The noise of a copy depends on the image's pixels, the seed and the
    copy's number alone, so batch size, order and sharding change no draw (the network's own rounding may differ between
    batch sizes). It does not depend on the label, which whoever predicts does not know. All copies are always drawn:
    the bound holds for a number of trials that was fixed beforehand. It holds for a network that knows nothing of the
    draws: certify one that others made with a seed chosen after its weights were fixed.
    """

    sigma: float = 0.25  # standard deviation of the noise, in pixels of [0, 1]
    samples_select: int = 100  # noisy copies that choose the class (the paper's n0)
    samples: int = 100_000  # further noisy copies that bound its probability (n), or predict
    alpha: float = 0.001  # probability that an answer other than to abstain is wrong
    batch_size: int = 1000  # noisy copies in the network at once, of one image or several

    def __post_init__(self) -> None:
        require(0 < self.sigma < math.inf, "sigma", "above 0, in pixels of [0, 1] (0.25 is usual)", self.sigma)
        require(0 < self.alpha < 1, "alpha", "a probability between 0 and 1 (0.001 is usual)", self.alpha)
        for name, usual in (("samples_select", "100"), ("samples", "100,000"), ("batch_size", "1,000")):
            require(getattr(self, name) >= 1, name, f"at least 1 ({usual} is usual)", getattr(self, name))

    @property
    def largest_radius(self) -> float:
        """The radius where every copy is given the same class: sigma Phi^-1(alpha^(1/n))."""
        return max(0.0, self.sigma * float(ndtri(self.alpha ** (1 / self.samples))))

    def predict(self, model: Network, images: Images, seed: int = 0) -> Labels:
        """[B] the class of g, or ABSTAIN where the two leading classes might be equally likely (the paper's PREDICT).

        With probability 1 - alpha or more it is g's class or ABSTAIN. Raises as `certify`.
        """
        votes = self.votes(model, images, _keys(images, seed), "smoothing predict", self.samples)
        first, second = votes.cpu().topk(2, dim=1).values.unbind(1)
        return torch.where(two_sided(first, second) <= self.alpha, votes.cpu().argmax(1), ABSTAIN)

    def certify(self, model: Network, images: Images, seed: int = 0) -> Certificates:
        """The class of g and the radius in which it holds, for each image (the paper's CERTIFY).

        A few copies choose the class, others bound its probability: the same ones could not do both. Raises ValueError
        for images that are not float [B, C, H, W] in [0, 1] with B >= 1, for a model in training mode and for logits
        that are not [B, K >= 2] or not finite.
        """
        keys = _keys(images, seed)
        selection = self.votes(model, images, keys, "smoothing select", self.samples_select).cpu()
        votes = self.votes(model, images, keys, "smoothing estimate", self.samples).cpu()
        return self.judge(selection, votes)

    def judge(self, selection: Votes, votes: Votes) -> Certificates:
        """The certificates that these votes give; of equal selecting votes the first class is the candidate."""
        candidate = selection.argmax(1)
        p_lower = lower_bound(votes.gather(1, candidate[:, None])[:, 0], self.samples, self.alpha)
        return Certificates(
            predicted=torch.where(p_lower > 0.5, candidate, ABSTAIN),
            radius=radius_of(p_lower, self.sigma),
            p_lower=p_lower,
            candidate=candidate,
            selection=selection,
            votes=votes,
        )

    def votes(self, model: Network, images: Images, keys: Labels, purpose: str, number: int) -> Votes:
        """[B, K] the classes that the network gives `number` noisy copies of each image, on the images' device.

        Batches are packed: many copies of an image, or copies of several, whichever fills them.
        """
        counts: Tensor | None = None
        for start in range(0, len(images) * number, self.batch_size):
            pair = torch.arange(start, min(start + self.batch_size, len(images) * number), device=images.device)
            row, copy = pair // number, pair % number
            logits = self.noisy_logits(model, images[row], keys[row], purpose, copy)
            if counts is None:
                counts = keys.new_zeros(len(images), logits.shape[1])
            counts.view(-1).add_(torch.bincount(row * counts.shape[1] + logits.argmax(1), minlength=counts.numel()))
        assert counts is not None
        return counts

    def noisy_logits(self, model: Network, images: Images, keys: Labels, purpose: str, copies: Labels) -> Tensor:
        """[B, K] for each image with the noise of its key's copy number `copies`."""
        noise = gaussian(keys, purpose, tuple(images.shape[1:]), copies).to(images.dtype)
        return logits_of(model, images + self.sigma * noise, len(images))


def _keys(images: Images, seed: int) -> Labels:
    """[B] the images' keys, after a check of the images."""
    no_labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    attack_input_checks(images, no_labels)
    return image_keys(images, no_labels, seed)
