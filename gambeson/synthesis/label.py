"""Labels synthetic images: by the class each was generated for, or by teachers; the teachers' logits are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gambeson.data.chosen import Part
from gambeson.data.exchange.outgoing import class_names
from gambeson.data.exchange.store_card import labels_card
from gambeson.data.exchange.stores import Source
from gambeson.data.intact import Intact
from gambeson.data.mixture import from_uint8
from gambeson.data.scores import as_arrow, as_numpy
from gambeson.data.shards import batches_of
from gambeson.data.synthetic import SyntheticStore
from gambeson.disk import atomic, write_json
from gambeson.errors import UserError, require
from gambeson.fleet import Nearby, Tool
from gambeson.heritage import noted
from gambeson.machine import Machine, make_repeatable
from gambeson.mirror import brought
from gambeson.robustness.subjects import Named, subject_of
from gambeson.store import Artifact, Workspace, stage
from gambeson.synthesis.agreement import Tally, report
from gambeson.synthesis.pace import Pace
from gambeson.synthesis.teachers import Teacher, TeacherFiles, open_teachers, together
from gambeson.types import Labels, Logits, Progress

LABELS, REPORT = "labels.parquet", "labels.json"
"""The files that the stage writes."""
DROPPED = -1
"""The label of an image that is left out: no selection takes it."""
PART = 1 << 16
"""Images, about, of a row group of the labels: what is in memory at once while they are joined."""
PIECE = 1 << 12
"""Images, about, that a worker labels before their labels are kept: what a break loses."""
_READ = 1 << 14
"""Images whose logits are read at once, for their soft labels."""


@dataclass(frozen=True, kw_only=True)
class ByCondition:
    """The label is the class that the image was generated for."""

    def __call__(self, condition: Labels, logits: Logits) -> Labels:
        """Classes [B] and the teacher's logits [B, K] -> labels [B]. UserError for images generated without one."""
        if bool((condition < 0).any()):
            raise UserError(
                "labeling.by: expected ByTeacher (--by teacher), since these images were generated without a class; "
                "got ByCondition"
            )
        return condition


@dataclass(frozen=True, kw_only=True)
class ByTeacher:
    """The label is the teacher's prediction (a pseudo-label): the second step where the denoiser is unconditional."""

    def __call__(self, condition: Labels, logits: Logits) -> Labels:
        """Classes [B] and the teacher's logits [B, K] -> labels [B]."""
        return logits.argmax(1)


@dataclass(frozen=True, kw_only=True)
class Soft:
    """The student is trained on the teacher's probabilities, softmax(logits / temperature) (Hinton et al. 2015, eq. 1).

    Labels stay classes beside them: what an image counts for in selection and in balanced batches.
    """

    temperature: float = 1.0  # above 1 evens the probabilities out, below 1 sharpens them

    def __post_init__(self) -> None:
        require(self.temperature > 0, "labeling.soft.temperature", "above 0", self.temperature)

    def __call__(self, logits: Logits) -> Logits:
        """Logits [B, K] -> probabilities [B, K]."""
        return (logits / self.temperature).softmax(1)


@dataclass(frozen=True, kw_only=True)
class OtherTeacher:
    """A classifier from elsewhere: a folder of `gambeson train`, a classifier.safetensors, a checkpoint file of
    RobustBench, an .onnx file. Programs, which run with one's rights, are for the command (--trust) alone."""

    path: str = ""  # the folder or the file
    entry: str | None = None  # RobustBench's name of a file of bare weights; none: the file's name


@dataclass(frozen=True, kw_only=True)
class Labeling:
    """Where labels come from."""

    by: ByCondition | ByTeacher = ByCondition()  # whose word counts
    batch_size: int = 512  # images per teacher call
    teachers: tuple[OtherTeacher, ...] = field(
        default=(), metadata={"neutral": ()}
    )  # classifiers besides the recipe's own: their probabilities are averaged
    soft: Soft | None = field(default=None, metadata={"neutral": None})  # train on the teacher's probabilities
    disagreeing: Literal["keep", "drop"] = field(
        default="keep", metadata={"neutral": "keep"}
    )  # images of which the teacher says another class than they were generated for

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "labeling.batch_size", "at least 1", self.batch_size)
        require(self.disagreeing in ("keep", "drop"), "labeling.disagreeing", "keep or drop", self.disagreeing)

    def others(self, shape: tuple[int, int, int]) -> tuple[Named, ...]:
        """The further teachers as inputs of a stage, for images of `shape` (channels, height, width)."""
        return tuple(subject_of(each.path, shape, entry=each.entry) for each in self.teachers)

    @property
    def reading(self) -> Labeling:
        """How images are labelled, wherever teachers lie: what a stage depends on besides their content."""
        return replace(self, teachers=())


@stage(revision=1, card=labels_card)
def label(work: Workspace, spec: Labeling, synthetic: Artifact | Source, *teachers: TeacherFiles) -> None:
    """Writes labels.parquet: label (-1: left out), condition and the teachers' logits (float32) of every image; and
    labels.json: how often condition and teachers agree, by class, and which classes have no image left.

    The logits of several teachers are the logs of their mean probabilities. A part of the images at a time is in
    memory; a start after a break goes on with the next part. UserError for teachers of other classes or images, for
    logits that are not finite, for no image, and where every one is left out.
    """
    require(not spec.teachers, "labeling.teachers", "to be given as inputs (Labeling.others)", len(spec.teachers))
    source = _images(synthetic)
    opened = open_teachers(teachers, source, class_names(source), work.machine.device)
    _check_conditions(spec, source)
    pieces = {rows: _piece(work.folder, rows) for rows in _pieces(len(source), spec.batch_size)}
    missing = [rows for rows, path in pieces.items() if not _whole(path, rows)]
    given = (spec, source, teachers if work.machine.aside else opened, work.machine, Nearby(work.progress))
    done = len(source) - sum(map(len, missing))
    pace = Pace("label", len(source), done, work.machine.unit, work.say)
    with closing(work.machine.fleet.each(open_labeller, given, missing, work.say)) as labelled:
        for piece in pace.watch(labelled, lambda piece: len(piece.item)):
            with atomic(pieces[piece.item]) as temporary:
                pq.write_table(piece.result, temporary, write_page_checksum=True)
            done += len(piece.item)
            work.progress(done, len(source))
    _finish(work, spec, source, opened, pieces)


def _pieces(count: int, batch: int) -> Iterator[range]:
    """The images in parts, and these in pieces, of whole batches: always the same, whatever was done before."""
    part, piece = (max(size // batch, 1) * batch for size in (PART, min(PIECE, PART)))
    for first in range(0, count, part):
        for start in range(first, min(first + part, count), piece):
            yield range(start, min(start + piece, first + part, count))


def _piece(folder: Path, rows: range) -> Path:
    """Where the labels of these images are kept until all are there."""
    return folder / "parts" / f"{rows.start:012d}.parquet"


def _whole(path: Path, rows: range) -> bool:
    """Whether these images' labels are there, counted; what an earlier version cut otherwise is made anew."""
    return path.is_file() and Tally.noted(path) and pq.read_metadata(path).num_rows == len(rows)


def open_labeller(
    spec: Labeling,
    source: Source,
    teachers: Sequence[TeacherFiles] | list[Teacher],
    machine: Machine,
    progress: Nearby,
) -> Tool:
    """What labels a range of the images, its teachers opened: once in each worker."""
    make_repeatable(machine)
    for each in teachers:
        if isinstance(each, Artifact):
            brought(each.folder)  # on another machine than the one that asked
    opened = [each for each in teachers if isinstance(each, Teacher)]
    opened = opened or open_teachers(teachers, source, class_names(source), machine.device)  # type: ignore[arg-type]
    return lambda rows: _labelled(spec, source, opened, rows, machine.device, progress)


def _images(synthetic: Artifact | Source) -> Source:
    if isinstance(synthetic, Artifact):
        return SyntheticStore.open(synthetic.folder / "images").check()
    return synthetic


def _check_conditions(spec: Labeling, source: Source) -> None:
    """UserError, before anything is labelled, where classes are asked for that images were generated without."""
    without = int(source.compact_labels.min()) < 0
    if without and isinstance(spec.by, ByCondition):
        spec.by(torch.tensor([-1]), torch.zeros(1, 2))
    require(
        not (without and spec.disagreeing == "drop"),
        "labeling.disagreeing",
        "keep: images that were generated without a class have nothing to disagree with",
        spec.disagreeing,
    )


def _labelled(
    spec: Labeling, source: Source, teachers: list[Teacher], rows: range, device: str, progress: Progress
) -> pa.Table:
    """Labels, conditions and logits of these images, batch by batch; what was counted stands in the metadata."""
    labels, conditions, logits = [], [], []
    tally = Tally.empty(teachers[0].classes, len(teachers))
    for start in rows[:: spec.batch_size]:
        stop = min(start + spec.batch_size, rows.stop)
        pixels, told = source.stretch(start, stop)
        images, condition = from_uint8(pixels).to(device), torch.from_numpy(told)
        each = [teacher.logits(images, start) for teacher in teachers]
        logits.append(together(each))
        labels.append(_kept(spec, condition, logits[-1]))
        conditions.append(condition)
        tally += Tally.of(condition, labels[-1], logits[-1], each)
        progress(stop, len(source))
    columns = {"label": torch.cat(labels).numpy(), "condition": torch.cat(conditions).numpy()}
    table = pa.table({**columns, "logits": as_arrow(torch.cat(logits).numpy())})
    return table.replace_schema_metadata(tally.note())


def _kept(spec: Labeling, condition: Labels, logits: Logits) -> Labels:
    """Labels [B], DROPPED where condition and teacher disagree and that was asked for."""
    labels = spec.by(condition, logits)
    return labels if spec.disagreeing == "keep" else labels.where(logits.argmax(1) == condition, DROPPED)


def _finish(
    work: Workspace, spec: Labeling, source: Source, teachers: list[Teacher], pieces: dict[range, Path]
) -> None:
    """The results, out of the pieces, which go."""
    tally = sum(map(Tally.read, pieces.values()), Tally.empty(teachers[0].classes, len(teachers)))
    if not tally.kept.sum():
        raise UserError(
            f"labeling.disagreeing: expected to keep at least one of {len(source)} images, but the teacher says "
            "another class than the condition of every one; take another teacher, keep them, or label by teacher"
        )
    soft = None if spec.soft is None else {"temperature": spec.soft.temperature}
    origins = {"images": source.digest, "teachers": [teacher.digest for teacher in teachers]}
    about = {**origins, "soft": soft, **noted(work.heritage)}
    with atomic(work.folder / LABELS) as temporary:
        _join(_parts(pieces, spec.batch_size), temporary, about)
    names = class_names(source) or tuple(map(str, range(teachers[0].classes)))
    found = report(tally, names, teachers)
    told = {"by": type(spec.by).__name__, "disagreeing": spec.disagreeing, "soft": soft}
    write_json(work.folder / REPORT, {**told, **found})
    if found["empty"]:
        work.say(f"label: no image of {', '.join(found['empty'])} is left")
    for path in pieces.values():
        path.unlink()
    (work.folder / "parts").rmdir()


def _parts(pieces: dict[range, Path], batch: int) -> list[list[Path]]:
    """The files of each part."""
    size = max(PART // batch, 1) * batch
    return [[path for _, path in group] for _, group in groupby(pieces.items(), lambda piece: piece[0].start // size)]


def _join(parts: list[list[Path]], path: Path, about: dict[str, Any]) -> None:
    """One file of several, a part at a time in memory; `about` stands in its schema's metadata."""
    metadata = {"labeling": json.dumps(about, sort_keys=True)}
    schema = pq.read_schema(parts[0][0]).with_metadata(metadata)
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for part in parts:
            tables = [_read_piece(piece).replace_schema_metadata(metadata) for piece in part]
            writer.write_table(pa.concat_tables(tables).combine_chunks())


def _read_piece(path: Path) -> pa.Table:
    with open_labels(path) as file:
        return file.read()


def open_labels(path: Path) -> Intact:
    """A labels.parquet. UserError for something else, EnvironmentFault, naming it, for a damaged one."""
    return Intact(path, "labels.parquet of a labelling", "remove it and label again (gambeson label), or copy it again")


def about_labels(file: pq.ParquetFile) -> dict[str, Any]:
    """What a labels.parquet says of itself: digest of the images, digests of the teachers, soft (None, or its
    temperature), licence and additional_data where those that labelled carry any; {} of one that an earlier version
    wrote."""
    told = (file.schema_arrow.metadata or {}).get(b"labeling")
    return {} if told is None else json.loads(told)


def softened(file: pq.ParquetFile, parts: Iterator[Part]) -> Iterator[Part]:
    """The parts of a selection with the soft labels that their images have in this labels.parquet; without any, as they
    come. Positions count the rows of the file."""
    told = about_labels(file).get("soft")
    if told is None:
        yield from parts
        return
    soft = Soft(temperature=float(told["temperature"]))
    for part in parts:
        yield part[0], part[1], _probabilities(file, part[0], soft)


def _probabilities(file: pq.ParquetFile, positions: np.ndarray, soft: Soft) -> np.ndarray:
    """[n, K] float16 of these rows. Only row groups that have one of them are read."""
    order, end = np.argsort(positions, kind="stable"), 0
    ascending = positions[order]
    found = np.empty((len(positions), file.schema_arrow.field("logits").type.list_size), np.float16)
    for group in range(file.num_row_groups):
        start, end = end, end + file.metadata.row_group(group).num_rows
        if np.searchsorted(ascending, start) == np.searchsorted(ascending, end):
            continue
        for batch in file.iter_batches(_READ, row_groups=[group], columns=["logits"]):
            here = slice(*np.searchsorted(ascending, [start, start + len(batch)]))
            logits = torch.from_numpy(as_numpy(batch["logits"])[ascending[here] - start].astype(np.float32))
            found[order[here]] = soft(logits).numpy()
            start += len(batch)
    return found


def labelled_parts(file: pq.ParquetFile) -> Iterator[Part]:
    """The rows of a labels.parquet and their labels, with soft ones where there are any; without what was left out."""
    return softened(file, _with_label(file))


def _with_label(file: pq.ParquetFile) -> Iterator[Part]:
    start = 0
    for batch in batches_of(file, PART, ["label"]):
        labels = batch.column(0).to_numpy()
        inside = np.flatnonzero(labels >= 0)
        if len(inside):
            yield inside + start, labels[inside]
        start += len(labels)
