"""The data card of an exported set, README.md as the Hugging Face hub reads it: what the images are, and from where."""

from __future__ import annotations

import json

from gambeson.data.exchange.outgoing import Outgoing, class_counts

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip


def card(name: str, out: Outgoing, named: tuple[str, ...]) -> str:
    """The card's text; `named`: the classes' names, where they have any but their numbers."""
    return f"---\n{_front(out)}\n---\n\n{_body(name, out, named)}\n"


def _front(out: Outgoing) -> str:
    """What the hub reads, in YAML (of which JSON's texts are a part)."""
    size = next((word for limit, word in SIZES if len(out) < limit), "n>1B")
    names = [f"          '{label}': {json.dumps(word)}" for label, word in enumerate(out.class_names)]
    licences = [one for one in str(out.provenance.get("licence") or "").split("; ") if one]
    lines = [
        *([f"license: {json.dumps(licences[0] if len(licences) == 1 else licences)}"] if licences else []),
        "task_categories:",
        "- image-classification",
        "tags:",
        "- synthetic",
        "size_categories:",
        f"- {size}",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        "    path: data/train-*",
        "dataset_info:",
        "  features:",
        "  - name: image",
        "    dtype: image",
        "  - name: label",
        *(["    dtype:", "      class_label:", "        names:", *names] if names else ["    dtype: int64"]),
        "  splits:",
        "  - name: train",
        f"    num_examples: {len(out)}",
    ]
    return "\n".join(lines)


def _body(name: str, out: Outgoing, named: tuple[str, ...]) -> str:
    """What a person reads."""
    height, width, channels = out.shape
    none, counts = class_counts(out.source.compact_labels)
    every = [*counts.tolist(), *[0] * (len(out.class_names) - len(counts))]
    rows = [f"| {label} | {word} | {every[label]} |" for label, word in enumerate(out.class_names)]
    without = [f"\n{none} images were generated without a class; their label is -1."] if none else []
    others = out.provenance.get("additional_data") or []
    seen = ", ".join(others) if others else "none that is known"
    lines = [
        f"# {name}\n",
        f"{len(out):,} synthetic images of {height} x {width} pixels, {'RGB' if channels == 3 else 'grey'}, "
        f"{len(out.class_names)} classes, written by gambeson.\n",
        f"- Licence: {out.provenance.get('licence') or 'not known'}",
        f"- Real images besides the training set that its models have seen: {seen}\n",
        "| label | class | images |",
        "|---|---|---|",
        *rows,
        *without,
        *([] if named else ["\nThe classes have no names here but their numbers."]),
        "\n## Provenance\n",
        f"```json\n{json.dumps(out.provenance, indent=1, sort_keys=True, default=str)}\n```",
    ]
    return "\n".join(lines)
