"""The data cards of stores and selections: those that stages make, and those that commands write anywhere."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gambeson.data.exchange.card import DataCard
from gambeson.data.exchange.made import additional, command_line, made_by, sections, source
from gambeson.data.exchange.markup import code, words
from gambeson.data.exchange.outgoing import class_counts, class_names, numbered, store_of
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.disk import atomic, read_json
from gambeson.heritage import inherited
from gambeson.store import README, Artifact, Stage

Record = Mapping[str, Any]
Source = SyntheticStore | Chosen
TITLES = {
    "generate": "Generated images",
    "gaussian_control": "Gaussian control",
    "mixup_control": "Mixup control",
    "import_images": "Imported images",
}
KINDS = {
    "generate": "made by a diffusion model",
    "gaussian_control": "drawn from one normal distribution for each class (a control)",
    "mixup_control": "each a mixture of two real train images (a control)",
    "import_images": "published by others",
}


def images_card(folder: Path, record: Record) -> str:
    """The card of a stage that wrote a store."""
    store, stage = SyntheticStore.open(folder / "images"), record["stage"]
    return DataCard(
        title=f"{TITLES[stage]}, {record['digest'][:10]}",
        what=KINDS[stage],
        **_labels(store, store),
        about=tuple(_about(record)),
        **_terms(record, store.heritage),
    ).text


def _about(record: Record) -> Iterator[str]:
    """Where the images lie, and what guided them."""
    yield (
        "The images are raw uint8 in `shards/*.npy` of the store (`images/` in the folder of a stage), readable with "
        "numpy alone, their labels in `labels.npy`; `gambeson.data.synthetic.SyntheticStore` opens it, and `gambeson "
        "store export` writes it in the forms of others."
    )
    if record["stage"] == "generate":
        guidance = record["config"].get("guidance")
        yield "Not guided." if guidance is None else f"Guided by {code(guidance['class'])}, whose encoder is below."
    if record["stage"] == "mixup_control":
        yield "They are made of train images, which can be seen in them: the terms of those hold for these."


def _labels(source: Source, store: SyntheticStore) -> dict[str, Any]:
    """Number, shape, classes and counts of the images, for a card."""
    without, counts = class_counts(source.compact_labels)
    names = class_names(store)
    return {
        "images": len(source),
        "shape": source.shape,
        "class_names": names or numbered(len(counts)),
        "named": bool(names) or not len(counts),
        "counts": counts.tolist(),
        "without": without,
    }


def _terms(record: Record, images: Record) -> dict[str, Any]:
    """Licence, seen sets and the sections about a stage's work; its images may say more than its record."""
    known = record.get("heritage") or {}
    both = inherited(known, images)
    whole = {**record, "heritage": {**known, **both}}
    return {
        "licence": both["licence"],
        "additional_data": additional(whole),
        "terms": False,
        "made": tuple(sections(whole)),
    }


def labels_card(folder: Path, record: Record) -> str:
    """The card of a stage that labelled images: labels.parquet and labels.json."""
    told, images = read_json(folder / "labels.json"), _images(folder, record)
    rows = told["classes"]
    soft = "" if told["soft"] is None else f", with probabilities at temperature {told['soft']['temperature']:g}"
    by = {"ByCondition": "the class that the image was made for", "ByTeacher": "the class that the teacher says"}
    return DataCard(
        title=f"Labels of synthetic images, {record['digest'][:10]}",
        what="labelled",
        images=told["labelled"],
        shape=_shape(images),
        class_names=[row["class"] for row in rows],
        named=bool(images.get("class_names")),
        counts=[row["labelled"] for row in rows],
        about=(
            f"The labels of {told['images']:,} images, of which {told['dropped']:,} were left out (label -1): "
            f"{by.get(told['by'], words(told['by']))}{soft}. Label, condition and logits of every image are in "
            f"{code('labels.parquet')}, agreements by class in {code('labels.json')}. The images are in the store.",
        ),
        **_terms(record, images),
    ).text


def selection_card(folder: Path, record: Record) -> str:
    """The card of a stage that chose images: chosen.parquet and selection.json."""
    told, images = read_json(folder / "selection.json"), _images(folder, record)
    score = told["score"]["class"] if isinstance(told["score"], Mapping) else told["score"]
    removed, names = told["copies_removed"], images.get("class_names")
    copies = "" if removed is None else f" {sum(removed):,} copies of train images were left out."
    of = f"{images['images']:,} images" if "images" in images else "the images of a store"
    return DataCard(
        title=f"Selected synthetic images, {record['digest'][:10]}",
        what="selected",
        images=sum(told["kept"]),
        shape=_shape(images),
        class_names=names or numbered(len(told["kept"])),
        named=bool(names),
        counts=told["kept"],
        about=(
            f"Chosen from {of} by the score {code(score)}. Positions and labels are in {code('chosen.parquet')}, what "
            f"each class has in {code('selection.json')}; the images stay in their store.{copies}",
        ),
        **_terms(record, images),
    ).text


def _images(folder: Path, record: Record) -> Record:
    """What is known of the store that was labelled or chosen from, wherever it lies now."""
    made = made_by(folder, record, "synthetic")
    there = None if made is None else made / "images"
    if there is not None and (there / "store.json").is_file():
        return SyntheticStore.open(there).heritage
    return source(record, "synthetic") or {}


def _shape(images: Record) -> tuple[int, int, int] | None:
    """(height, width, channels) of one image, where it is known."""
    sides = images.get("shape")
    return None if sides is None else (sides[0], sides[1], sides[2])


def source_card(source: Source, title: str, files: Mapping[str, Any] | None = None, command: str | None = None) -> str:
    """The card of a store or a selection that no stage made: a command's, or one that is written in another format."""
    provenance = store_of(source).provenance
    known = inherited(source.heritage)
    parted = isinstance(source, Chosen)
    about = f"Chosen from {len(store_of(source)):,} images, which stay in their store." if parted else ""
    asked = () if command is None else ("## How it was made", f"The command:\n\n{command_line(command)}")
    return DataCard(
        title=title,
        **_labels(source, store_of(source)),
        about=[about] if about and files is None else [],
        licence=known["licence"],
        additional_data=known["additional_data"],
        files=files or {},
        made=asked,
        provenance=provenance,
    ).text


def card_file(path: Path) -> Path:
    """Where the card of a single file lies: beside it, NAME.md."""
    return path.with_name(f"{path.name}.md")


def write_card(folder: Path, text: str) -> None:
    """README.md in a folder, whole or not at all."""
    _write(folder / README, text)


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def exported(made: Artifact, stages: Sequence[Stage], words: Sequence[str]) -> str | None:
    """The card of a result that leaves its folder: with its time, and the words of the command that asked for it.

    `stages`: one of them made it. None for a result of an earlier version, which recorded too little for a card.
    """
    record, card = made.record, next(stage.card for stage in stages if stage.name == made.stage)
    if card is None or "heritage" not in record:
        return None
    return card(made.folder, {**record, "command": shlex.join(["gambeson", *words])})


def deliver_card(text: str | None, place: Path) -> None:
    """Writes a card, where there is one, into a folder or beside a file."""
    if text is not None:
        write_card(place, text) if place.is_dir() else _write(card_file(place), text)
