"""The data card of synthetic images, README.md as the Hugging Face hub reads it: what they are, and from where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gambeson.data.exchange.made import licence_front
from gambeson.data.exchange.markup import block, front, table, words

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"))  # fmt: skip
COPIES = (
    "Synthetic images may be copies of real train images, with all that is private or protected in them: `gambeson "
    "quality` looks for copies, and measures how far they are from real ones."
)
"""What every card of synthetic images says."""


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What is known about a set of synthetic images; None or empty: not known, and left out."""

    title: str
    what: str = ""  # where they come from, in words: "made by a diffusion model"
    images: int
    shape: tuple[int, int, int] | None  # (height, width, channels) of one image
    class_names: Sequence[str]  # of the labels; their numbers where they have no names
    counts: Sequence[int]  # images of each class
    without: int = 0  # images without a class
    named: bool = True  # whether the classes have names
    licence: str | None = None
    additional_data: Sequence[str] | None = None  # sets of real images that its models have seen; None: nobody said
    files: Mapping[str, Any] = field(default_factory=dict)  # front matter that says where the hub finds the images
    about: Sequence[str] = ()  # paragraphs: more of what it is
    provenance: Mapping[str, Any] | None = None  # of the store, as it is recorded there
    made: Sequence[str] = ()  # further sections, in Markdown
    terms: bool = True  # whether licence and seen sets are told here; no: in a further section

    @property
    def text(self) -> str:
        """README.md."""
        return "\n\n".join([self._front, *self._body()]) + "\n"

    @property
    def _front(self) -> str:
        """What the hub reads."""
        size = next((word for limit, word in SIZES if self.images < limit), "100B<n<1T")
        names = {str(label): word for label, word in enumerate(self.class_names)}
        kind: Any = {"class_label": {"names": names}} if names else "int64"
        features = [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": kind}]
        splits = [{"name": "train", "num_examples": self.images}]
        return front(
            {
                **licence_front(self.licence, several=True),
                "task_categories": ["image-classification"],
                "tags": ["synthetic"],
                "size_categories": [size],
                **self.files,
                "dataset_info": {"features": features, "splits": splits},
            }
        )

    def _body(self) -> Iterator[str]:
        """What a person reads."""
        yield f"# {words(self.title)}"
        what = f", {self.what}" if self.what else ""
        count = len(self.class_names)
        yield f"{self.images:,} synthetic images{self._shaped}, {count} classes{what}; written by gambeson."
        yield from self.about
        if self.terms:
            yield "\n".join(self._terms())
        if self.class_names:
            rows = [
                [str(label), words(name), f"{self.counts[label] if label < len(self.counts) else 0}"]
                for label, name in enumerate(self.class_names)
            ]
            yield table(["label", "class", "images"], rows)
        if self.without:
            yield f"{self.without} images were generated without a class; their label is -1."
        if not self.named:
            yield "The classes have no names here but their numbers."
        yield f"## Intended use\n\n{_USE}"
        yield f"## Limits\n\n- {COPIES}\n- {_WRONG}"
        yield from self.made
        if self.provenance is not None:
            told = json.dumps(self.provenance, indent=1, sort_keys=True, default=str, ensure_ascii=True)
            yield f"## Provenance\n\n{block(told, 'json')}"

    @property
    def _shaped(self) -> str:
        if self.shape is None:
            return ""
        height, width, channels = self.shape
        return f" of {height} x {width} pixels, {'RGB' if channels == 3 else 'grey'}"

    def _terms(self) -> Iterator[str]:
        """Licence, and what was seen."""
        yield f"- Licence: {words(self.licence) if self.licence else 'not known'}"
        seen = ", ".join(map(words, self.additional_data or ())) or "none that is known"
        yield f"- Real images besides the training set that its models have seen: {seen}"


_USE = "Training of classifiers beside the real images of the same classes, and research on synthetic data."
_WRONG = (
    "A label is what the image was made for, or what a classifier took it for: some are wrong. Do not test classifiers "
    "on these images, and do not take them for photographs of anything."
)
