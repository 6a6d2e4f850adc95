"""The model card of a classifier: what is known about it, as the hub shows it. Nothing is invented."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from gambeson.errors import require
from gambeson.models.network import ClassifierNetwork
from gambeson.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured number: a share of images, with how many there were."""

    name: str  # what was measured, such as "robust accuracy (AutoAttack)"
    value: float  # a share, 0 to 1
    n: int  # number of images that it was measured on
    interval: tuple[float, float] | None = None  # its 95 % interval, where there is one
    kind: str = "accuracy"  # the hub's name of this metric

    def __post_init__(self) -> None:
        require(0 <= self.value <= 1, f"metric {self.name}", "a share from 0 to 1", self.value)
        require(self.n >= 1, f"metric {self.name}, n", "at least 1 image", self.n)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about a classifier besides its architecture; None or empty: not known, and left out."""

    shape: tuple[int, int, int] | None = None  # (channels, height, width) of the images that it was trained on
    class_names: tuple[str, ...] | None = None  # what the logits stand for, in their order
    data: str | None = None  # the data set that it was trained on and measured on, in words
    additional_data: str | None = None  # synthetic or other images beside it, in words
    datasets: tuple[str, ...] = ()  # names of data sets on the hub
    threat: ThreatModel | None = None  # what it was trained to withstand
    noise: float | None = None  # standard deviation of the Gaussian noise that it was trained under
    recipe_digest: str | None = None  # digest of the recipe that made it
    metrics: tuple[Metric, ...] = ()  # what was measured
    licence: str | None = None  # identifier of the licence on the hub, such as apache-2.0
    limits: str | None = None  # what else a user should know, in words


def card_text(model: ClassifierNetwork, card: Card, title: str) -> str:
    """README.md: the front matter that the hub reads, then what a person reads. `title` is the model's name."""
    front = "\n".join(["---", *_front(model, card, title), "---"])
    return "\n\n".join([front, f"# {title}", *_body(model, card)]) + "\n"


def _front(model: ClassifierNetwork, card: Card, title: str) -> Iterator[str]:
    """The lines of the front matter: YAML, its texts written as JSON, which is YAML too."""
    yield "library_name: gambeson"
    yield "pipeline_tag: image-classification"
    if card.licence is not None:
        yield f"license: {json.dumps(card.licence)}"
    threat = [] if card.threat is None else ["adversarial-robustness", card.threat.norm]
    yield from _listed("tags", ["image-classification", *threat, type(model).__name__])
    yield from _listed("datasets", card.datasets)
    yield from _listed("metrics", dict.fromkeys(metric.kind for metric in card.metrics))
    if card.metrics and card.data is not None:
        yield from _index(card, title)


def _listed(name: str, values: tuple[str, ...] | list[str] | dict[str, None]) -> Iterator[str]:
    """A list in YAML, left out where it is empty."""
    if values:
        yield f"{name}:"
        yield from (f"- {json.dumps(value)}" for value in values)


def _index(card: Card, title: str) -> Iterator[str]:
    """The results as the hub's tables take them (model-index)."""
    kind = card.datasets[0] if card.datasets else card.data
    task, data = {"type": "image-classification"}, {"name": card.data, "type": kind}
    metrics = [{"type": m.kind, "name": f"{m.name}, n = {m.n}", "value": m.value} for m in card.metrics]
    yield "model-index:"
    yield f"- name: {json.dumps(title)}"
    yield "  results:"
    yield f"  - task: {json.dumps(task)}"
    yield f"    dataset: {json.dumps(data)}"
    yield f"    metrics: {json.dumps(metrics)}"


def _body(model: ClassifierNetwork, card: Card) -> Iterator[str]:
    """The paragraphs of the card."""
    count = sum(p.numel() for p in model.parameters())
    yield f"A {type(model).__name__} with {count:,} parameters for {model.classes} classes, made with gambeson."
    yield f"    {model.spec}"
    if card.class_names is not None:
        yield f"Classes: {', '.join(card.class_names)}."
    if card.data is not None or card.additional_data is not None:
        yield "## Data"
        yield from filter(None, (card.data, card.additional_data and f"Additional data: {card.additional_data}"))
    if card.threat is not None:
        yield f"## Threat model\n\n{_threat(card.threat)}"
    if card.noise is not None:
        yield f"## Noise\n\nTrained on images with Gaussian noise of standard deviation {card.noise:g} added."
    if card.metrics:
        yield f"## Metrics\n\n{_table(card.metrics)}"
    if card.recipe_digest is not None:
        yield f"## Recipe\n\nDigest of the recipe that made it: `{card.recipe_digest}`."
    yield f"## How to load it\n\n{_LOADING}"
    yield f"## Limits\n\n{' '.join(_limits(model, card))}"


_LOADING = """```python
from gambeson.models import from_pretrained

model = from_pretrained("PLACE")  # this folder, or its name on the hub: frozen, in eval mode
logits = model(images)            # float images [B, C, H, W] in [0, 1]; the normalisation is inside
```"""


def _threat(threat: ThreatModel) -> str:
    """The ball in words."""
    radius = f"{threat.epsilon:.6g} ({threat.epsilon * 255:.4g}/255)"
    return f"Perturbations within the {threat.norm} ball of radius {radius} around an image, pixels in [0, 1]."


def _table(metrics: tuple[Metric, ...]) -> str:
    """The metrics as a table, in percent."""
    rows = ["| metric | percent | 95 % interval | n |", "|---|---|---|---|"]
    for m in metrics:
        interval = "" if m.interval is None else " to ".join(f"{100 * end:.2f}" for end in m.interval)
        name = m.name.replace("|", "\\|")
        rows.append(f"| {name} | {100 * m.value:.2f} | {interval} | {m.n} |")
    return "\n".join(rows)


def _limits(model: ClassifierNetwork, card: Card) -> Iterator[str]:
    """What follows from the facts alone, then the caller's words."""
    size = "" if card.shape is None else f" of {card.shape[1]}x{card.shape[2]} pixels"
    yield f"It takes images of {model.channels} channel{'s' * (model.channels > 1)}{size} in [0, 1]."
    if card.threat is not None:
        yield "It was trained for the threat model above; nothing is said about other perturbations."
    if card.limits is not None:
        yield card.limits
