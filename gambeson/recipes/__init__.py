"""Ready recipes by name; each file opens with its command, its run time and the number to expect."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gambeson.errors import unknown

if TYPE_CHECKING:
    from gambeson.recipe import Recipe

RECIPES = {"digits": "8x8 handwritten digits, 300 real training images: the whole story in minutes on two CPU cores"}


def named(name: str) -> Recipe:
    """The recipe of that name. Raises UserError listing the known ones, the nearest first."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return import_module(f"gambeson.recipes.{name}").recipe()
