"""Ready recipes by name; each file opens with its command, its run time and the number to expect."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gambeson.errors import unknown

if TYPE_CHECKING:
    from gambeson.recipe import Recipe

RECIPES = {
    "digits": "8x8 handwritten digits, 300 real training images: the whole story in minutes on two CPU cores",
    "cifar10-16": "CIFAR-10 at 16x16, 1,000 real training images: under an hour on two CPU cores, the first time",
    "gtsrb-16": "traffic signs of 43 classes at 16x16, 3,010 real training images: about as long",
    "cifar10": "CIFAR-10 at 32x32, all real images: one GPU, meant for 25 minutes",
    "cifar10-l2": "the same against L2 perturbations of 128/255",
    "gtsrb": "traffic signs at 32x32, all real images: one GPU, meant for 25 minutes",
    "cifar10-full": "CIFAR-10 at the papers' size, WRN-28-10 and 1M images: GPU-days (--dry-run prints the cost)",
    "gtsrb-full": "traffic signs at the papers' size: GPU-days (--dry-run prints the cost)",
}
"""Name -> what it is; the recipe is made by the module of that name, with _ for -."""


def named(name: str) -> Recipe:
    """The recipe of that name. Raises UserError listing the known ones, the nearest first."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return import_module(f"gambeson.recipes.{name.replace('-', '_')}").recipe()
