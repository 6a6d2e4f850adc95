"""A run whose recipe asks for AutoAttack: rows of every arm, the check beside them, and the table on the page."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import tiny_recipe

from gambeson import files
from gambeson.recipe import Arm, Recipe, class_table
from gambeson.report.gather import gather
from gambeson.report.page import render
from gambeson.robustness.assess import Assessment
from gambeson.robustness.autoattack import AutoAttack
from gambeson.run import Run, execute


class Quiet:
    def show(self, news: object) -> None:
        pass


@pytest.fixture(scope="module")
def assessed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    attack = AutoAttack(version="custom", attacks=("apgd-ce", "square"), steps=4, queries=20)
    asked = Assessment(autoattack=attack, images=40, curve=(0.5,), curve_images=20, check_images=12)
    recipe = replace(tiny_recipe((Arm.REAL,), seeds=2), assessment=asked)
    longer = replace(recipe.student, optimisation=replace(recipe.student.optimisation, steps=60))
    return execute(replace(recipe, student=longer), tmp_path_factory.mktemp("assessed"), 1, Quiet(), "test")


def test_every_student_is_attacked_within_the_threat_of_the_recipe(assessed: Run) -> None:
    assert len(assessed.chapters) == 2
    for chapter in assessed.chapters:
        made = chapter.artifacts["autoattack"]
        rows, facts = pq.read_table(made.file("rows.parquet")), json.loads(made.file("facts.json").read_text())
        assert facts["threat"] == str(assessed.recipe.threat)
        assert rows.num_rows == 40
        robust, right = np.asarray(rows["robust"]), np.asarray(rows["prediction"]) == np.asarray(rows["label"])
        assert 0 < robust.sum() < right.sum()


def test_the_page_says_what_the_rows_say(assessed: Run) -> None:
    page = render(gather(assessed))
    section = re.search(r'<section id="autoattack">.*?</section>', page, re.DOTALL)
    assert section is not None
    assert "not AutoAttack standard as it is quoted" in section[0]
    for chapter in assessed.chapters:
        rows = pq.read_table(chapter.artifacts["autoattack"].file("rows.parquet"))
        assert f'<span class="value">{100 * np.asarray(rows["robust"]).mean():.1f}</span>' in section[0]


def test_recipes_with_and_without_it_are_written_and_read_again(assessed: Run, tmp_path: Path) -> None:
    again = files.load(assessed.folder / "recipe.yaml", Recipe, class_table())
    assert again == assessed.recipe
    assert again.digest == assessed.recipe.digest
    tiny = tiny_recipe()
    assert replace(tiny, assessment=None).digest == tiny.digest != replace(tiny, assessment=Assessment()).digest
