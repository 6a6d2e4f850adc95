"""A run's state in lines of words: who makes it, every job, what it does and how fast, curves, failures, what to do."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gambeson import canonical, files
from gambeson.recipe import Recipe, class_table
from gambeson.screen import WORDS, span
from gambeson.watching.curves import Curves
from gambeson.watching.lines import text, whole
from gambeson.watching.state import Job, Life, Record, Stage, State

QUIET = 120.0
"""Seconds without news after which that is said."""
MANY = 12
"""Jobs that have ended, or not begun, are told one by one up to this number."""
UNITS = {"generate": "blocks", "gaussian_control": "blocks", "label": "images", "fit_embedding": "blocks"}
UNNAMED = {"train_noise_conditioned": "train noise-conditioned encoder", "import_denoiser": "read diffusion model"}
PARTS = {"denoiser": "diffusion model", "teacher": "teacher", "student": "student", "noisy_encoder": "encoder"}
"""Parts of a recipe that are trained, and what they are called."""


def words(command: str, folder: Path) -> str:
    """A command of a run, to be copied."""
    return f"gambeson {command} {shlex.quote(str(folder))} --runs {shlex.quote(str(folder.parent))}"


@dataclass
class Story:
    """Tells of a run below `folder`. `drawn`: with curves as bars, where the terminal can show them."""

    folder: Path
    drawn: bool = True
    curves: dict[str, Curves] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe | None:
        """The run's recipe; None where this version cannot read it."""
        try:
            return files.load(self.folder / "recipe.yaml", Recipe, class_table())
        except (OSError, ValueError):
            return None

    @cached_property
    def _parts(self) -> dict[str, str]:
        """What is trained, by the digest of its part of the recipe."""
        if self.recipe is None:
            return {}
        recipe = self.recipe.with_threat_everywhere()
        return {canonical.digest(getattr(recipe, name))[:16]: told for name, told in PARTS.items()}

    @property
    def resume(self) -> str:
        """The command that goes on."""
        return words("run", self.folder)

    def role(self, stage: Stage) -> str:
        """What a training makes: 'teacher', 'student', ...; '' where that is not known."""
        return self._parts.get(stage.config, "") if stage.name.startswith("train_") else ""

    def title(self, stage: Stage) -> str:
        """'train classifier (teacher)'."""
        name, role = WORDS.get(stage.name) or UNNAMED.get(stage.name) or stage.name.replace("_", " "), self.role(stage)
        return f"{name} ({role})" if role and role not in name else name

    def lines(self, record: Record) -> list[str]:
        """All there is to say of a run with a record."""
        state, now, life = record.state, time.time(), record.life()
        if state.foreign:
            return [f"{self.folder.name}: {state.foreign}"]
        going = state.end is None and life.lives
        jobs = list(state.jobs.values())
        return [
            *self.heading(state, life, now),
            *self.ending(state, life),
            *self.elsewhere(jobs),
            *(line for job in jobs for line in self.job(job, state, going, now)),
            *self.others([job.name for job in jobs if job.state == "finished"], "done"),
            *self.others([job.name for job in jobs if job.state == "going" and not job.stages], "not begun"),
        ]

    def heading(self, state: State, life: Life, now: float) -> Iterator[str]:
        """How it stands with the run as a whole."""
        facts = state.facts
        ended = state.end.time if state.end is not None else now
        done = sum(job.state == "finished" for job in state.jobs.values())
        how = "complete" if state.end is not None and state.end.event == "complete" else "stopped"
        stands = "runs" if state.end is None and life.lives else how if state.end is not None else "ended unfinished"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.began))
        told = [f"{self.folder.name}: {stands}", f"{done} of {len(state.jobs)} jobs done"]
        told += [f"started {since}", f"{span(max(ended - state.began, 0.0))} ago" if stands == "runs" else ""]
        told += [f"start {state.starts} of this run" if state.starts > 1 else ""]
        workers = whole(facts.get("workers"))
        told += [f"{workers} worker{'s' if workers > 1 else ''}" if workers else "", text(facts.get("device"))]
        yield ", ".join(word for word in told if word)
        silent = now - state.moved
        if stands == "runs" and silent > QUIET:
            yield f"nothing has moved for {span(silent)}; {life.words}"

    def job(self, job: Job, state: State, going: bool, now: float) -> Iterator[str]:
        """A job that has begun and is not done: what it does, its curves, what it said, why it failed."""
        stage = job.current
        if job.state == "finished" or (stage is None and job.state == "going"):
            return
        name = f"  {job.name:28}"
        if job.state == "failed":
            yield f"{name} FAILED{f' in {self.title(stage)}' if stage else ''}: {job.line}"
        elif stage is not None:
            yield f"{name} {self.doing(stage, state, now) if going else self.left_at(stage)}"
        if stage is not None and stage.state in ("begun", "unfinished"):
            yield from self._curves(stage)
        if job.said:
            yield f"      said: {job.said}"

    def doing(self, stage: Stage, state: State, now: float) -> str:
        """'train classifier (student), 120 of 400 steps, 30 %, 3.2 steps/s, 2 min left, 612 MB'."""
        title = self.title(stage)
        if stage.state == "asked":
            maker = state.maker(stage)
            return f"waits for {title}, which {maker.job if maker else 'another process'} makes"
        if stage.state in ("made", "found"):
            return f"{title} done, the next stage is prepared"
        if stage.state == "unfinished":
            steps = f", at least {stage.done} steps done" if stage.done else ""
            return f"{title}, begun and not finished{steps}; a file was last written {span(now - stage.since)} ago"
        if not stage.total:
            return f"{title}, begun {span(max(now - stage.since, 0.0))} ago"
        return ", ".join([title, *self.pace(stage, now)])

    def left_at(self, stage: Stage) -> str:
        """The same of a run that does not go on: 'was at train classifier (student), 120 of 400 steps, 30 %'."""
        if stage.state == "asked":
            return f"waited for {self.title(stage)}"
        reached = list(self.reached(stage)) if stage.total and stage.state == "begun" else []
        return ", ".join([f"was at {self.title(stage)}", *reached])

    def reached(self, stage: Stage) -> Iterator[str]:
        """How far."""
        unit = self.unit(stage)
        yield f"{stage.done} of {stage.total}{f' {unit}' if unit else ''}"
        yield f"{100 * min(stage.done / stage.total, 1):.0f} %"

    @staticmethod
    def unit(stage: Stage) -> str:
        """What its parts are; '' where they have no name."""
        return UNITS.get(stage.name, "steps" if stage.name.startswith("train_") else "")

    def pace(self, stage: Stage, now: float) -> Iterator[str]:
        """How far, how fast, how long still, in how much memory."""
        yield from self.reached(stage)
        rate, left, images = stage.rate(), stage.left(now), self._images(stage)
        if rate is not None:
            yield f"{rate * images:.3g} images/s" if images else _speed(rate, self.unit(stage) or "parts")
        if left:
            yield f"{span(left)} left"
        if stage.mb is not None:
            yield f"{stage.mb:.0f} MB"

    def _images(self, stage: Stage) -> int:
        """Images in each part of a stage that makes images; 0 for another stage."""
        part = {"generate": "generation", "gaussian_control": "control", "label": ""}.get(stage.name)
        if not part or self.recipe is None:
            return int(part == "")
        return getattr(self.recipe, part).block

    def _curves(self, stage: Stage) -> Iterator[str]:
        curves = self.curves.setdefault(stage.folder, Curves(self.folder.parent / stage.folder))
        curves.look()
        told = curves.told(self.drawn)
        if told:
            yield f"      {(' · ' if self.drawn else '; ').join(told)}"

    def elsewhere(self, jobs: list[Job]) -> Iterator[str]:
        """That the stages that are at work are not here, where that is so."""
        working = [job.current for job in jobs if job.current is not None and job.current.state == "begun"]
        if any(not (self.folder.parent / stage.folder).exists() for stage in working):
            yield f"  its stages are not beside it ({self.folder.parent / 'stages'}), no curves: was it moved?"

    @staticmethod
    def others(names: list[str], what: str) -> Iterator[str]:
        """Jobs of which there is nothing else to say."""
        if names:
            more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
            yield f"  {what}: {', '.join(names[:MANY])}{more}"

    def ending(self, state: State, life: Life) -> Iterator[str]:
        """Why it does not go on, and what to do."""
        if state.end is None and life.lives:
            return
        if state.end is not None and state.end.event == "complete":
            return
        why = f"it was stopped: {state.end.line}" if state.end is not None else life.words
        yield f"  {why}"
        yield f"  finished stages and saved states are kept; to go on: {self.resume}"

    def unrecorded(self, state: State, now: float) -> list[str]:
        """What the stages say of a run that keeps no record."""
        done = sum(job.state == "finished" for job in state.jobs.values())
        jobs = list(state.jobs.values())
        return [
            f"{self.folder.name}: unfinished, {done} of {len(jobs)} jobs done",
            "  it keeps no record of its progress (an earlier version made it), so this is what its stages tell",
            f"  whether its process lives is not recorded; if it does not, to go on: {self.resume}",
            *(line for job in jobs for line in self.job(job, state, True, now)),
            *self.others([job.name for job in jobs if job.state == "finished"], "done"),
            *self.others([job.name for job in jobs if job.state == "going" and not job.stages], "not begun"),
        ]


def _speed(rate: float, unit: str) -> str:
    """'3.2 steps/s', or '13 s a step' where it is slow."""
    return f"{rate:.3g} {unit}/s" if rate >= 0.5 else f"{span(1 / rate)} a {unit.removesuffix('s')}"
