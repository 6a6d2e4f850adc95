"""A table as data: rows that say how a cell's recipe differs from the base, and the cells that come of them.

A cell is trained as every other one but for what its row changes; `student_changes` names a student that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal

from gambeson import canonical
from gambeson.errors import require, unknown
from gambeson.overrides import flat_fields
from gambeson.pipeline import (
    evaluate,
    fit_embedding,
    gaussian_control,
    generate,
    label,
    select,
    train_classifier,
    train_denoiser,
    train_noise_conditioned,
)
from gambeson.recipe import Arm, Recipe

STAGES = (train_denoiser, train_classifier, train_noise_conditioned, fit_embedding, generate, gaussian_control)
STAGES += (label, select, evaluate)
"""The stages whose meaning a cell's rows depend on."""


@dataclass(frozen=True)
class Of:
    """A value that depends on the base recipe."""

    recipe: Callable[[Recipe], Any]


Changes = dict[str, Any]
"""Path of a field (`generation.guidance`) -> its value, or `Of` the recipe that is changed."""


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What a paper prints for a cell, percent; None where our text of it is not legible."""

    clean: float | None
    robust: float | None
    line: int  # of the paper's text
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: an arm, what differs from the base recipe, and what the result is laid beside.

    Rows with synthetic images stand once for each amount. choices: settings of which the validation images choose one,
    which alone sees the test images. pool: images that are generated for each one kept.
    """

    name: str
    about: str
    arm: Arm = Arm.GUIDED
    changes: Changes = field(default_factory=dict)
    choices: Mapping[str, Changes] = field(default_factory=dict)
    pool: int = 1
    against: tuple[str, ...] = ()

    @property
    def synthetic(self) -> bool:
        """Whether it has synthetic images."""
        return self.arm is not Arm.REAL


Images = Literal["objects", "signs"]
"""What kind of images a table is of, where its tier has both."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: its rows, and what its paper prints by (row, amount)."""

    title: str
    source: str  # where the question comes from
    rows: tuple[Row, ...]
    images: Images = "objects"
    amounts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # tier -> amounts; one of 4 where not said
    printed: Mapping[tuple[str, int], Printed] = field(default_factory=dict)
    square: tuple[str, str, str, str] | None = None  # the rows (neither, first, second, both) of a 2 x 2
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One recipe that is trained and measured: a cell, or one of the settings that it chooses among."""

    cell: str
    choice: str  # the name of the setting; empty where there is nothing to choose
    arm: Arm
    recipe: Recipe

    @property
    def title(self) -> str:
        """`plain-4x`, or `classifier-4x [32]`."""
        return f"{self.cell} [{self.choice}]" if self.choice else self.cell

    @property
    def folder(self) -> str:
        """Where its rows lie: by name and by everything that they depend on besides the images."""
        return f"{self.cell}{'_' if self.choice else ''}{self.choice}-{self.key}"

    @cached_property
    def key(self) -> str:
        """10 hexadecimal digits of the recipe, the arm and the stages' revisions."""
        recipe = replace(self.recipe, name="cell", arms=(self.arm,), seed=0, seeds=1)
        parts = {"recipe": recipe.digest, "revisions": {stage.name: stage.revision for stage in STAGES}}
        return canonical.digest(parts)[:10]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row at one amount, resolved against a base recipe."""

    name: str
    about: str
    amount: int | None  # synthetic images that are kept for each real one
    settings: tuple[Setting, ...]
    against: tuple[str, ...]
    printed: Printed | None
    student_changes: tuple[str, ...]  # where its student is not trained as the base's

    @property
    def chooses(self) -> bool:
        """Whether validation chooses among several settings."""
        return len(self.settings) > 1


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with these fields, all put in at once, so that parts that need each other never stand alone.

    Raises UserError for a path that is none, and whatever the components raise.
    """
    tree: dict[str, Any] = {}
    for path, value in changes.items():
        *above, name = path.split(".")
        branch = tree
        for step in above:
            branch = branch.setdefault(step, {})
        branch[name] = value.recipe(recipe) if isinstance(value, Of) else value
    return _put(recipe, tree, "recipe")


def _put(component: Any, tree: Mapping[str, Any], path: str) -> Any:
    """The component with a tree of values put in."""
    require(is_dataclass(component), path, "a component that has fields", component)
    known = canonical.hints(type(component))
    for name in tree:
        if name not in known:
            raise unknown(f"field of {path}", name, known)
    put = {n: _put(getattr(component, n), v, f"{path}.{n}") if isinstance(v, dict) else v for n, v in tree.items()}
    return replace(component, **put)


def expand(table: Table, base: Recipe, amounts: tuple[int, ...], train: int | None) -> tuple[Cell, ...]:
    """The cells of a table: its rows without synthetic images, then the others at each amount.

    train: real images to train on; None where they are not there: numbers of synthetic images are then left as the base
    has them, which is enough to look at. Raises UserError for amounts below 1.
    """
    require(bool(amounts) and min(amounts) >= 1, "--amounts", "whole numbers above 0", amounts)
    plain = [row for row in table.rows if not row.synthetic]
    many = [row for row in table.rows if row.synthetic]
    cells = [_cell(table, row, base, None, train) for row in plain]
    return tuple(cells + [_cell(table, row, base, amount, train) for amount in amounts for row in many])


def squares(table: Table, amounts: tuple[int, ...]) -> tuple[tuple[str, str, str, str], ...]:
    """The cells of a table's 2 x 2 at each amount; none where it has none."""
    if table.square is None:
        return ()
    a, b, c, d = table.square
    return tuple((f"{a}-{n}x", f"{b}-{n}x", f"{c}-{n}x", f"{d}-{n}x") for n in amounts)


def _cell(table: Table, row: Row, base: Recipe, amount: int | None, train: int | None) -> Cell:
    name = row.name if amount is None else f"{row.name}-{amount}x"
    recipe = changed(_with_amount(base, row, amount, train), row.changes)
    choices = row.choices or {"": {}}
    settings = [Setting(cell=name, choice=c, arm=row.arm, recipe=changed(recipe, v)) for c, v in choices.items()]
    synthetic = {each.name for each in table.rows if each.synthetic}
    return Cell(
        name=name,
        about=row.about,
        amount=amount,
        settings=tuple(settings),
        against=tuple(f"{other}-{amount}x" if other in synthetic else other for other in row.against),
        printed=table.printed.get((row.name, amount or 0)),
        student_changes=_student_changes(base, [setting.recipe for setting in settings]),
    )


def _student_changes(base: Recipe, others: list[Recipe]) -> tuple[str, ...]:
    found = [words for other in others if other.student != base.student for words in differences(base, other)]
    return tuple(dict.fromkeys(words for words in found if words.startswith("--student.")))


def _with_amount(base: Recipe, row: Row, amount: int | None, train: int | None) -> Recipe:
    """The base with the numbers of images: so many generated, and the share of them that is kept."""
    if amount is None or train is None:
        return base
    count = amount * row.pool * train
    found = changed(base, {"generation.count": count, "control.count": count})
    return changed(found, {"selection.keep": 1 / row.pool, "selection.per_class": None}) if row.pool > 1 else found


def differences(base: Recipe, other: Recipe) -> list[str]:
    """What one would type to get `other` from `base`: `--generation.guidance.strength 39.0625` and so on."""
    before = {path: value for path, _, value, _ in flat_fields(base)}
    after = [(path, value) for path, _, value, _ in flat_fields(other)]
    return [f"--{path} {value}" for path, value in after if before.get(path) != value]


def told(base: Recipe, setting: Setting) -> list[str]:
    """The differences that matter to the setting's arm."""
    unused = "--generation." if setting.arm is Arm.GAUSSIAN else "--control."
    return [words for words in differences(base, setting.recipe) if not words.startswith(unused)]
