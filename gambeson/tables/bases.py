"""The base recipes of the tiers, and how much synthetic data each table has there where nothing is said."""

from __future__ import annotations

from gambeson.errors import unknown
from gambeson.recipe import Recipe
from gambeson.recipes import named
from gambeson.tables.cells import Images, Table
from gambeson.tables.definitions import TABLES

AMOUNT = (4,)
"""Synthetic images for each real one, where a table says nothing else: the paper's 200K."""


TIERS: dict[str, dict[Images, str]] = {
    "digits": {"objects": "digits", "signs": "digits"},
    "16": {"objects": "cifar10-16", "signs": "gtsrb-16"},
    "gpu": {"objects": "cifar10", "signs": "gtsrb"},
}
"""Tier -> the recipe that stands for CDP's CIFAR-10 and for its traffic signs; only `digits` has one set for both."""
SEEDS = {"digits": 5, "16": 3, "gpu": 1}
"""Seeds of a table, where nothing is said."""


def table_named(name: str) -> Table:
    """The table of that name. UserError listing the known ones, the nearest first."""
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    return TABLES[name]


def base_of(tier: str, table: Table) -> Recipe:
    """The recipe that a table's cells change at a tier. UserError for another tier, or a recipe that is not there."""
    if tier not in TIERS:
        raise unknown("tier", tier, TIERS)
    return named(TIERS[tier][table.images])


def amounts_of(tier: str, table: Table) -> tuple[int, ...]:
    """Synthetic images for each real one in a table's cells, where nothing is said."""
    return table.amounts.get(tier, AMOUNT)
