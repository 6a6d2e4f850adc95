"""The model card of a network: what is known about it, as the hub shows it. Nothing is invented."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gambeson.data.exchange.made import licence_front
from gambeson.data.exchange.markup import code, front, shown, table, words
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
    made: tuple[str, ...] = ()  # further sections, in Markdown: how it was made, and of what
    heritage: Mapping[str, Any] = field(default_factory=dict)  # licence and additional_data of all its ancestors


@dataclass(frozen=True, kw_only=True)
class Front:
    """The front matter of a model card; None or empty: not known, and left out."""

    title: str  # the model's name
    task: str | None  # the hub's name of what it does; None: the hub has none for it
    tags: Sequence[str]
    licence: str | None = None
    datasets: Sequence[str] = ()  # on the hub
    metrics: Sequence[Metric] = ()
    data: str | None = None  # what the metrics were measured on
    split: str | None = None  # which part of it
    base: str | None = None  # the model on the hub that it is a copy of

    @property
    def text(self) -> str:
        """As YAML between its lines."""
        return front(
            {
                "library_name": "gambeson",
                "pipeline_tag": self.task,
                **licence_front(self.licence),
                "base_model": self.base,
                "tags": list(dict.fromkeys(self.tags)),
                "datasets": list(self.datasets),
                "metrics": list(dict.fromkeys(metric.kind for metric in self.metrics)),
                "model-index": self._index() if self.metrics and self.data is not None else None,
            }
        )

    def _index(self) -> list[dict[str, object]]:
        """The results as the hub's tables take them."""
        kind = self.datasets[0] if self.datasets else self.data
        split = {} if self.split is None else {"split": self.split}
        metrics = [{"type": m.kind, "name": f"{m.name}, n = {m.n}", "value": m.value} for m in self.metrics]
        result = {
            "task": {"type": self.task or "other"},
            "dataset": {"name": self.data, "type": kind, **split},
            "metrics": metrics,
        }
        return [{"name": self.title, "results": [result]}]


def card_text(model: ClassifierNetwork, card: Card, title: str) -> str:
    """README.md: the front matter that the hub reads, then what a person reads. `title` is the model's name."""
    threat = [] if card.threat is None else ["adversarial-robustness", card.threat.norm]
    matter = Front(
        title=title,
        task="image-classification",
        tags=["image-classification", *threat, type(model).__name__],
        licence=card.licence or card.heritage.get("licence"),
        datasets=card.datasets,
        metrics=card.metrics,
        data=card.data,
    )
    return joined([matter.text, f"# {words(title)}", *_body(model, card), *card.made])


def joined(parts: Sequence[str]) -> str:
    """Front matter and paragraphs as a file."""
    return "\n\n".join(parts) + "\n"


def _body(model: ClassifierNetwork, card: Card) -> Iterator[str]:
    """The paragraphs of the card."""
    count = sum(p.numel() for p in model.parameters())
    yield f"A {type(model).__name__} with {count:,} parameters for {model.classes} classes, made with gambeson."
    yield f"    {shown(str(model.spec))}"
    if card.class_names is not None:
        yield classes(card.class_names)
    if card.data is not None or card.additional_data is not None:
        yield "## Data"
        told = (card.data, card.additional_data and f"Additional data: {card.additional_data}")
        yield from (words(text) for text in told if text)
    if card.threat is not None:
        yield f"## Threat model\n\n{threat_words(card.threat)}"
    if card.noise is not None:
        yield f"## Noise\n\nTrained on images with Gaussian noise of standard deviation {card.noise:g} added."
    if card.metrics:
        yield f"## Metrics\n\n{metric_table(card.metrics)}"
    if card.recipe_digest is not None:
        yield f"## Recipe\n\nDigest of the recipe that made it: {code(card.recipe_digest)}."
    yield f"## Intended use\n\n{USE}"
    yield f"## How to load it\n\n{_LOADING}"
    yield f"## Limits\n\n{' '.join(_limits(model, card))}"


USE = (
    "Classification of images like those it was trained on; research on robustness; the encoder whose features guide a "
    "diffusion model, or the teacher that labels what it made."
)
"""What a classifier is for."""
_LOADING = """```python
from gambeson.models import from_pretrained

model = from_pretrained("PLACE")  # this folder, or its name on the hub: frozen, in eval mode
logits = model(images)            # float images [B, C, H, W] in [0, 1]; the normalisation is inside
```"""


def classes(names: Sequence[str]) -> str:
    """What the logits stand for, in their order; a name that has a comma in it is set off as code."""
    return f"Classes: {', '.join(code(name) if ',' in name or not name.strip() else words(name) for name in names)}."


def threat_words(threat: ThreatModel) -> str:
    """The ball in words."""
    radius = f"{threat.epsilon:.6g} ({threat.epsilon * 255:.4g}/255)"
    return f"Perturbations within the {threat.norm} ball of radius {radius} around an image, pixels in [0, 1]."


def metric_table(metrics: Sequence[Metric]) -> str:
    """The metrics as a table, in percent."""
    rows = []
    for m in metrics:
        interval = "" if m.interval is None else " to ".join(f"{100 * end:.2f}" for end in m.interval)
        rows.append([words(m.name), f"{100 * m.value:.2f}", interval, f"{m.n}"])
    return table(["metric", "percent", "95 % interval", "n"], rows)


def _limits(model: ClassifierNetwork, card: Card) -> Iterator[str]:
    """What follows from the facts alone, then the caller's words."""
    size = "" if card.shape is None else f" of {card.shape[1]}x{card.shape[2]} pixels"
    yield f"It takes images of {model.channels} channel{'s' * (model.channels > 1)}{size} in [0, 1]."
    if card.threat is not None:
        yield "It was trained for the threat model above; nothing is said about other perturbations."
    if card.limits is not None:
        yield words(card.limits)
