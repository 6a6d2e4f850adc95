"""A run without a record of progress: what its stages tell, found by asking for them in the order in which it would."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gambeson.progress import made_of
from gambeson.recipe import Recipe
from gambeson.run import jobs_of
from gambeson.store import Artifact, Digested, Store
from gambeson.store import Stage as Work
from gambeson.training.journal import LOG
from gambeson.watching.lines import number, parsed, whole
from gambeson.watching.state import Job, Stage, State


class NotMade(Exception):
    """A stage is not finished, so what comes after it cannot be known."""


@dataclass
class Looking:
    """Finds stages as `Store.once` does, and makes none."""

    store: Store
    seen: list[tuple[Artifact, dict[str, Any]]] = field(default_factory=list)

    def once(self, stage: Work, config: Any, *inputs: Digested | None, seed: int | None = None) -> Artifact:
        """The finished stage. Raises NotMade where it is not."""
        asked = self.store.asked(stage, config, *inputs, seed=seed)
        artifact = self.store.artifact(asked)
        self.seen.append((artifact, asked))
        if not artifact.finished:
            raise NotMade
        return artifact


def state_of(recipe: Recipe, root: Path) -> State:
    """What the stages below `root` say of a run. Reads the images: their digest is in every stage's.

    Raises what reading them raises where they are not on this machine.
    """
    state = State()
    for job in jobs_of(recipe):
        looking, told = Looking(Store(root)), Job(job.name)
        try:
            job.work(*job.arguments, looking.once)
            told.state = "finished"
        except NotMade:
            pass
        for artifact, asked in looking.seen:
            stage = _stage(job.name, artifact, made_of(asked), root)
            told.stages[stage.folder] = stage
            state.moved = max(state.moved, stage.since)
        if told.current is not None and told.current.state == "asked" and len(told.stages) == 1:
            told.stages.clear()  # nothing of it was ever begun
        state.jobs[job.name] = told
    return state


def _stage(job: str, artifact: Artifact, of: dict[str, Any], root: Path) -> Stage:
    stage = Stage(job, artifact.stage, artifact.folder.relative_to(root).as_posix(), 0.0)
    stage.config, stage.inputs = of["config"], tuple(digest or "" for digest in of["inputs"])
    if artifact.finished:
        stage.state = "found"
    elif (artifact.folder / "attempts.json").exists():
        stage.state, stage.since, stage.done = "unfinished", last_written(artifact.folder), _steps(artifact.folder)
    return stage


def last_written(folder: Path) -> float:
    """When a file of a folder was last written; 0 where there is none."""
    times = [0.0]
    for path in folder.rglob("*"):
        try:
            times.append(path.stat().st_mtime if path.name != ".lock" else 0.0)
        except OSError:
            continue  # gone since it was listed
    return max(times)


def _steps(folder: Path) -> int:
    """The last step in a training's journal; 0 where there is none."""
    try:
        lines = (folder / LOG).read_bytes().split(b"\n")[:-1]
    except OSError:
        return 0
    steps = [number(found.get("step")) for line in lines if (found := parsed(line)) is not None]
    return max((whole(int(step)) for step in steps if step is not None), default=0)
