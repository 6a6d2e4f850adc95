"""A certificate of randomised smoothing that grows as one looks: `Smoothing.certify` of one image, step by step."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from gambeson.randomness import image_keys
from gambeson.robustness.smoothing import ABSTAIN, Smoothing
from gambeson.tryout.desk import Line, Work
from gambeson.tryout.subject import Tried
from gambeson.types import Images

_FIRST, _MOST = 16, 1000
"""Noisy copies in the network at once: at first, and at most."""
_SOON, _LONG = 0.05, 0.2
"""Seconds of one batch below which the next is twice as large, and above which half, so that attacks wait briefly."""
_KEPT = 64
"""Certificates that are remembered."""
Votes = Tensor
"""[1, K] int64 the classes that noisy copies were given."""


@dataclass(frozen=True, kw_only=True)
class SoFar:
    """A certificate, or what it looks like before all copies are drawn."""

    sigma: float
    copies: int  # of those that bound the probability
    of: int
    alpha: float
    select: int  # copies that chose the class
    candidate: int
    share: float  # of the copies that were given the candidate
    p_lower: float
    radius: float
    abstains: bool
    largest: float  # the radius where every one of `of` copies agrees

    @property
    def final(self) -> bool:
        """Whether all copies are drawn: before that, it is no certificate."""
        return self.copies == self.of


class Certifier:
    """Certifies images of one classifier; what was finished is remembered. For one thread."""

    def __init__(self, tried: Tried, smoothing: Smoothing, seed: int = 0) -> None:
        self.tried, self.smoothing, self.seed = tried, smoothing, seed
        self._known: OrderedDict[tuple[bytes, float], SoFar] = OrderedDict()

    def answer(self, image: Images, sigma: float) -> Work:
        """Lines {"certificate": ...} for [1, C, H, W], ten a second at most; the last one is final."""
        key = (image.numpy().tobytes(), sigma)
        if (found := self._known.get(key)) is None:
            told = 0.0
            for found in self.steps(image, sigma):
                now = time.monotonic()
                fresh = found is not None and not found.final and now - told > 0.1
                told = now if fresh else told
                yield self._line(found) if found is not None and fresh else None
            assert found is not None
            self._known[key] = found
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        yield self._line(found)

    def steps(self, image: Images, sigma: float) -> Generator[SoFar | None]:
        """The certificate after every batch of copies; the last is that of `Smoothing.certify`, with the same draws."""
        smoothing = replace(self.smoothing, sigma=sigma)
        image = image.to(self.tried.device)
        selection = image.new_zeros(1, self.tried.classes, dtype=torch.int64)
        votes, done = selection.clone(), 0
        for more, _ in self._batches(smoothing, image, "smoothing select", smoothing.samples_select):
            selection += more
            yield None
        for more, done in self._batches(smoothing, image, "smoothing estimate", smoothing.samples):
            votes += more
            yield _judged(smoothing, selection.cpu(), votes.cpu(), done)

    def _batches(self, smoothing: Smoothing, image: Images, purpose: str, number: int) -> Generator[tuple[Votes, int]]:
        """The votes of each batch of copies, and how many there are by then: the draws of `Smoothing.votes`."""
        key = image_keys(image, torch.zeros(1, dtype=torch.int64, device=image.device), self.seed)
        start, size = 0, _FIRST
        while start < number:
            begun = time.perf_counter()
            copies = torch.arange(start, min(start + size, number), device=image.device)
            several, keys = image.expand(len(copies), *image.shape[1:]), key.expand(len(copies))
            logits = smoothing.noisy_logits(self.tried.network, several, keys, purpose, copies)
            votes, start = torch.bincount(logits.argmax(1), minlength=logits.shape[1])[None], start + len(copies)
            seconds = time.perf_counter() - begun
            size = min(2 * size, _MOST) if seconds < _SOON else max(size // 2, 1) if seconds > _LONG else size
            yield votes, start

    def _line(self, found: SoFar) -> Line:
        told = asdict(found) | {"final": found.final, "candidate": self.tried.class_names[found.candidate]}
        return {"certificate": told | {"hint": self.hint(found.sigma)}}

    def hint(self, sigma: float) -> str:
        """What to expect of this classifier under this noise, in words; empty where it was trained with it."""
        trained = self.tried.noise
        if trained == sigma:
            return ""
        if trained is not None:
            return f"This classifier was trained with noise of σ {trained:g}; it is at its best with that."
        return "Nothing says that this classifier was trained with noise; a radius of 0 is then usual."


def _judged(smoothing: Smoothing, selection: Votes, votes: Votes, copies: int) -> SoFar:
    found = replace(smoothing, samples=copies).judge(selection, votes)
    candidate = int(found.candidate[0])
    return SoFar(
        sigma=smoothing.sigma,
        copies=copies,
        of=smoothing.samples,
        alpha=smoothing.alpha,
        select=smoothing.samples_select,
        candidate=candidate,
        share=int(votes[0, candidate]) / copies,
        p_lower=float(found.p_lower[0]),
        radius=float(found.radius[0]),
        abstains=int(found.predicted[0]) == ABSTAIN,
        largest=smoothing.largest_radius,
    )
