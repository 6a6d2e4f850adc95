"""Test images are read by what evaluates, and by nothing that trains, generates or chooses."""

import pickle
from pathlib import Path

import pytest
import torch

from gambeson import pipeline
from gambeson.data.datasets import Digits
from gambeson.data.imageset import ImageSet
from gambeson.errors import UserError
from gambeson.store import Stage, Store, Workspace, stage

REAL = Digits(train_images=100, validation_images=50).load()


@stage(revision=1)
def peek(work: Workspace, spec: int, real: ImageSet) -> None:
    (work.folder / "seen").write_text(str(real.test.images.mean().item()))


@stage(revision=1, reads_test=True)
def look(work: Workspace, spec: int, real: ImageSet) -> None:
    (work.folder / "seen").write_text(str(real.test.images.mean().item()))


def test_a_stage_that_does_not_evaluate_cannot_read_test_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test images: expected to be read by evaluation alone"):
        Store(tmp_path).once(peek, 1, REAL)
    assert not list(tmp_path.rglob("done.json"))
    seen = Store(tmp_path).once(look, 1, REAL).file("seen").read_text()
    assert float(seen) == REAL.test.images.mean().item()


def test_the_withheld_part_says_how_many_it_has_and_changes_no_digest() -> None:
    """In any process: it goes through a pickle."""
    for guarded in (REAL.without_test(), pickle.loads(pickle.dumps(REAL.without_test()))):
        assert guarded.digest == REAL.digest
        assert len(guarded.test) == len(REAL.test)
        assert torch.equal(guarded.train.images, REAL.train.images)
        for part in ("images", "labels"):
            with pytest.raises(UserError, match="validation part"):
                getattr(guarded.test, part)
    assert len(pickle.dumps(REAL.without_test())) < len(pickle.dumps(REAL)) / 2


def test_of_all_stages_of_the_story_only_evaluations_read_test_images() -> None:
    stages = {name: value for name, value in vars(pipeline).items() if isinstance(value, Stage)}
    assert len(stages) >= 8
    assert {name for name, value in stages.items() if value.reads_test} == {"evaluate", "assess"}
