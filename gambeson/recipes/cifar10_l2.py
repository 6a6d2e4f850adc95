"""`gambeson run cifar10-l2 --device cuda`: the recipe `cifar10` against L2 perturbations of 128/255.

Images and options: see `cifar10`. Run time: not yet measured, meant for at most 25 minutes on one H200-class card.
Expected: not yet measured. (Published, WRN-28-10, clean / AutoAttack percent: IRGD 90.24 / 77.37, EDM-AT 95.16 /
83.63; METHOD 3.)
"""

from __future__ import annotations

from dataclasses import replace

from gambeson.recipe import Recipe
from gambeson.recipes import cifar10
from gambeson.threat import ThreatModel

EPSILON = 128 / 255
"""METHOD 2: the radius of IRGD's, EDM-AT's and PORT's L2 rows."""


def recipe() -> Recipe:
    """All else as `cifar10`: the losses' inner steps follow epsilon, not pixels (dev/LOG.md)."""
    base = cifar10.recipe()
    curve = tuple(round(k * EPSILON / 3, 6) for k in range(1, 7) if k * EPSILON / 3 <= 1)
    return replace(
        base,
        name="cifar10-l2",
        threat=ThreatModel(norm="l2", epsilon=EPSILON),
        evaluation=replace(base.evaluation, curve=curve),
    )
