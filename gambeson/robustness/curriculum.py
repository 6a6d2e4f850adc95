"""A progressive inner attack: fewer steps, and if asked a smaller ball, while the network is young."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Generator

from gambeson.errors import require
from gambeson.robustness.attack_losses import Network, threat_of
from gambeson.robustness.awp import AWP
from gambeson.robustness.inner import step_size_of
from gambeson.robustness.objectives import MART, SCORE, TRADES, PGDAdversarial
from gambeson.robustness.terms import Targets
from gambeson.types import Images, PerImage


def _share(progress: float, until: float) -> float:
    """How far a rise that ends at `until` has come, 0 to 1."""
    return 1.0 if progress >= until else progress / until


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """The inner loss with an attack that grows: steps in a straight line, epsilon by half a cosine.

    The step size follows, so that steps x step_size / epsilon stays what it is at the end, but no step is longer than
    1.25 epsilon (Wong et al. 2020 find FGSM's best there), unless the loss's own is. AdamSteps keep their rates.
    """

    loss: TRADES | PGDAdversarial | MART | SCORE | AWP = TRADES()  # the loss at the end of the rise
    first_steps: int = 2  # steps of the first inner attacks
    steps_until: float = 0.5  # share of the training at which the loss's steps are reached
    first_epsilon: float = 1.0  # radius of the first balls, a share of the threat's
    epsilon_until: float = 0.5  # share of the training at which the threat's epsilon is reached

    def __post_init__(self) -> None:
        most = self._attacking.steps
        require(1 <= self.first_steps <= most, "Curriculum first_steps", f"1 to the loss's {most}", self.first_steps)
        shares = {"steps_until": self.steps_until, "epsilon_until": self.epsilon_until}
        for name, share in shares.items():
            require(0 <= share <= 1, f"Curriculum {name}", "a share of the training from 0 to 1", share)
        require(0 < self.first_epsilon <= 1, "Curriculum first_epsilon", "above 0, at most 1", self.first_epsilon)

    @property
    def _attacking(self) -> TRADES | PGDAdversarial | MART | SCORE:
        """The loss whose attack grows."""
        return self.loss.loss if isinstance(self.loss, AWP) else self.loss

    def __call__(self, model: Network, images: Images, labels: Targets, generator: Generator | None = None) -> PerImage:
        """[B] losses of the end of the rise (`at` gives the loss of a moment)."""
        return self.at(1.0)(model, images, labels, generator)

    def adversarial(
        self, model: Network, images: Images, labels: Targets, generator: Generator | None = None
    ) -> Images:
        """The adversarial images of the end of the rise."""
        return self.at(1.0).adversarial(model, images, labels, generator)

    def value(self, model: Network, images: Images, adversarial: Images, labels: Targets) -> PerImage:
        """[B] losses with the adversarial images given."""
        return self.at(1.0).value(model, images, adversarial, labels)

    def at(self, progress: float) -> TRADES | PGDAdversarial | MART | SCORE | AWP:
        """The loss at a share 0..1 of the training; while the attack grows, ValueError if no threat has been put in."""
        require(0 <= progress <= 1, "progress", "a share of the training from 0 to 1", progress)
        loss, eased = self.loss.at(progress), self._eased(progress)
        return replace(loss, loss=eased) if isinstance(loss, AWP) else eased

    def _eased(self, progress: float) -> TRADES | PGDAdversarial | MART | SCORE:
        """The attacking loss with the steps, the step size and the ball of this moment."""
        loss, risen = self._attacking, _share(progress, self.epsilon_until)
        steps = round(self.first_steps + (loss.steps - self.first_steps) * _share(progress, self.steps_until))
        grown = self.first_epsilon + (1 - self.first_epsilon) * (1 - math.cos(math.pi * risen)) / 2
        own = step_size_of(loss) if steps < loss.steps or grown < 1 else loss.step_size
        if own is None:
            return loss
        step_size = own * (loss.steps / steps)
        if step_size > own:
            step_size = max(own, min(step_size, 1.25 * threat_of(loss).epsilon))
        if grown < 1:
            threat = threat_of(loss)
            loss = replace(loss, threat=replace(threat, epsilon=threat.epsilon * grown))
        return replace(loss, steps=steps, step_size=step_size * grown)
