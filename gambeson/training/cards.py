"""The model cards of what stages train and bring in, written from their files and records; beside each README.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gambeson.data.exchange.made import HUB, additional, made_by, own_sets, sections, source
from gambeson.data.exchange.markup import block, code, table, words
from gambeson.disk import read_json
from gambeson.models.card import USE, Front, Metric, classes, joined, metric_table, threat_words
from gambeson.models.files import header_of, numbers_in
from gambeson.threat import ThreatModel

CLASSIFIER, DENOISER, EMBEDDING = "classifier.safetensors", "denoiser.safetensors", "embedding.safetensors"
"""The files that these cards are about."""
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What the card of one kind of network says, besides what all cards say."""

    title: str
    task: str | None  # the hub's name of what it does
    tags: tuple[str, ...]
    what: tuple[str, ...]  # paragraphs: what it is
    use: str  # what it is for
    limits: tuple[str, ...]
    loading: str  # lines of Python
    measured: tuple[str, ...] = ()  # paragraphs
    metrics: tuple[Metric, ...] = ()
    base: str | None = None  # the model on the hub that it is a copy of

    def text(self, record: Record) -> str:
        """The card."""
        real = next(iter(own_sets(record)), None)
        name = None if real is None else real["name"]
        matter = Front(
            title=self.title,
            task=self.task,
            tags=self.tags,
            licence=(record.get("heritage") or {}).get("licence"),
            datasets=[HUB[name]] if name in HUB else [],
            metrics=self.metrics,
            data=name,
            split="validation",
            base=self.base,
        )
        numbers = ["## Measured while it was trained", *self.measured] if self.measured else []
        return joined(
            [
                matter.text,
                f"# {words(self.title)}",
                *self.what,
                f"## Intended use\n\n{self.use}",
                "## Limits",
                "\n".join(f"- {limit}" for limit in self.limits),
                *numbers,
                f"## How to load it\n\n{block(self.loading, 'python')}",
                *sections(record),
            ]
        )


def classifier_card(folder: Path, record: Record) -> str:
    """The card of a stage that trained a classifier on real images, alone or with synthetic ones."""
    header, real = header_of(folder / CLASSIFIER), own_sets(record)[0]
    telling = real["name"] == "two sources"
    threat, metrics = trained_threat(record["config"]), _validated(header, record, real)
    robust = [] if threat is None else ["adversarial-robustness", threat.norm]
    kind = f"A classifier ({words(_network(header))})"
    return Sheet(
        title=f"Classifier of {real['name']}, {record['digest'][:10]}",
        task="image-classification",
        tags=("image-classification", *robust, *(["discriminator"] if telling else []), _network(header)),
        what=(
            f"{kind} that tells real from synthetic images."
            if telling
            else f"{kind} of images of {words(real['name'])}.",
            *_shape(header, folder / CLASSIFIER),
            *_trained_on(folder, record, real),
            *([f"Trained to withstand: {threat_words(threat)}"] if threat else []),
            *([f"Trained under Gaussian noise, standard deviation {header['noise']:g}."] if "noise" in header else []),
        ),
        use=_USE_DISCRIMINATOR if telling else USE,
        limits=tuple(_classifier_limits(record, threat)),
        loading=_LOAD_CLASSIFIER,
        measured=() if not metrics else (_kept(header, real), metric_table(metrics)),
        metrics=metrics,
    ).text(record)


def encoder_card(folder: Path, record: Record) -> str:
    """The card of a stage that trained a noise-conditioned classifier."""
    header, real = header_of(folder / CLASSIFIER), own_sets(record)[0]
    last = (header.get("log") or [{}])[-1]
    rows = [[f"{level:g}", f"{100 * share:.2f}", str(real["validation"])] for level, share in last.get("accuracy", [])]
    measured = (
        f"Accuracy on {real['validation']:,} validation images, held out of train, at the end (step {last['step']}), "
        "by the noise level that was added:",
        table(["noise level", "percent", "n"], rows),
    )
    return Sheet(
        title=f"Noise-conditioned classifier of {real['name']}, {record['digest'][:10]}",
        task="image-feature-extraction",
        tags=("noise-conditioned", "diffusion-guidance", _network(header)),
        what=(
            f"A classifier ({words(_network(header))}) of noisy images of {words(real['name'])}, told the noise level.",
            *_shape(header, folder / CLASSIFIER),
            *_trained_on(folder, record, real),
        ),
        use="The encoder whose features guide a diffusion model on its way, from noise to image.",
        limits=(
            "It needs a noise level beside the image, and is no classifier for clean images.",
            "It was not trained against an attack.",
            *_FROM_TRAINING,
        ),
        loading=_LOAD_ENCODER,
        measured=measured if rows else (),
    ).text(record)


def denoiser_card(folder: Path, record: Record, held_out: int) -> str:
    """The card of a stage that trained a diffusion model; `held_out`: most images that its loss was measured on."""
    header, real = header_of(folder / DENOISER), own_sets(record)[0]
    count = min(real["validation"], real["train"], held_out)
    looks = [line for line in header.get("log") or [] if "held_out" in line]
    own = [line for line in looks if line["step"] == header.get("kept")] or looks[-1:]  # of the weights in the file
    kept = " These weights are those of the least loss on validation images." if "kept" in header else ""
    measured = (
        ()
        if not own
        else (
            f"The denoising loss of the averaged weights at step {own[0]['step']}, with the same noise on either part: "
            f"{own[0]['held_out']:.4g} on {count:,} validation images, held out of train, and {own[0]['seen']:.4g} on "
            f"as many train images. Where the first rises and the second falls, the model copies.{kept}",
        )
    )
    return Sheet(
        title=f"Diffusion model of {real['name']}, {record['digest'][:10]}",
        what=(*_denoiser(header, folder), *_trained_on(folder, record, real)),
        measured=measured,
        **_diffusion(header),
    ).text(record)


def imported_denoiser_card(folder: Path, record: Record) -> str:
    """The card of a stage that brought in the weights of a diffusion model from elsewhere."""
    header, given = header_of(folder / DENOISER), source(record, "source") or {}
    return Sheet(
        title=f"Diffusion model from {given.get('name', 'elsewhere')}, {record['digest'][:10]}",
        what=(*_denoiser(header, folder), _FOREIGN),
        base=given.get("hub"),
        **_diffusion(header),
    ).text(record)


def imported_classifier_card(folder: Path, record: Record) -> str:
    """The card of a stage that brought in a classifier from a file."""
    header, given = header_of(folder / CLASSIFIER), source(record, "source") or {}
    return Sheet(
        title=f"Classifier from {given.get('name', 'elsewhere')}, {record['digest'][:10]}",
        task="image-classification",
        tags=("image-classification", _network(header)),
        what=(f"A classifier ({words(_network(header))}).", *_shape(header, folder / CLASSIFIER), _FOREIGN),
        use="The encoder whose features guide a diffusion model, or a classifier of the images it was trained on.",
        limits=("What it withstands is not known here; `gambeson evaluate` measures it.",),
        loading=_LOAD_ENCODER,
    ).text(record)


def embedding_card(folder: Path, record: Record) -> str:
    """The card of a stage that fitted the small network on top of an encoder."""
    return Sheet(
        title=f"Embedding network, {record['digest'][:10]}",
        task="feature-extraction",
        tags=("embedding", "contrastive-guidance", "EmbeddingNetwork"),
        what=(
            "Two linear layers with a ReLU between, from the features of an encoder to unit vectors "
            f"({numbers_in(folder / EMBEDDING):,} numbers in {code(EMBEDDING)}), fitted while warm-up images were "
            "sampled under its own guidance, then frozen.",
        ),
        use="Contrastive guidance, with the very encoder and diffusion model that it was fitted for (digests below).",
        limits=("With any other encoder its vectors mean nothing.",),
        loading=_LOAD_EMBEDDING,
    ).text(record)


def trained_threat(config: Mapping[str, Any]) -> ThreatModel | None:
    """What a classifier's training withstands, by the plain form of its settings; None for one without an attack."""
    loss = config["loss"]
    while "loss" in loss:
        loss = loss["loss"]
    known = {field.name for field in fields(ThreatModel)}
    told = loss.get("threat")
    return None if told is None else ThreatModel(**{name: value for name, value in told.items() if name in known})


def _network(header: Record) -> str:
    """The class of its architecture's description, without that word."""
    return str((header.get("network") or {}).get("class", "ResNetSpec")).removesuffix("Spec")


def _shape(header: Record, path: Path) -> Iterator[str]:
    """What goes in and what comes out."""
    sides = header.get("shape")
    size = "any size" if sides is None else f"{sides[1]} x {sides[2]} pixels"
    yield (
        f"In: images of {header['channels']} channel{'s' * (header['channels'] > 1)} and {size}, float in [0, 1]. Out: "
        f"{header['classes']} logits. {numbers_in(path):,} numbers in {code(path.name)}."
    )
    if header.get("class_names"):
        yield classes(tuple(map(str, header["class_names"])))


def _trained_on(folder: Path, record: Record, real: Record) -> Iterator[str]:
    """The real images, and synthetic ones beside them."""
    yield f"Trained on {real['train']:,} images of {words(real['name'])} (digest {code(_digest(record, 'real'))})."
    chosen = source(record, "chosen")
    if chosen is None:
        return
    share = record["config"].get("fraction")
    part = "" if share is None else f"; {100 * share:g} % of each batch is synthetic"
    count = chosen.get("images") or _chosen(folder, record)
    images = "synthetic images" if count is None else f"{count:,} synthetic images"
    yield f"And on {images} (digest {code(_digest(record, 'chosen'))}){part}."
    seen = additional(record)
    if seen:
        yield (
            "These images, or the networks behind them, come from real images besides that set, which this classifier "
            f"so has seen at second hand: {', '.join(map(words, seen))}."
        )


def _digest(record: Record, role: str) -> str:
    pairs = zip(record.get("sources") or (), record["inputs"], strict=False)
    return next((digest[:16] for each, digest in pairs if each and each["role"] == role), "not recorded")


def _chosen(folder: Path, record: Record) -> int | None:
    """How many images the selection kept, where its folder lies beside."""
    made = made_by(folder, record, "chosen")
    path = None if made is None else made / "selection.json"
    return sum(read_json(path)["kept"]) if path is not None and path.is_file() else None


def _validated(header: Record, record: Record, real: Record) -> tuple[Metric, ...]:
    """What the kept weights reached on validation images, as the training's log has it."""
    kept = next((line for line in header.get("log") or () if line["step"] == header["selection"]["kept"]), None)
    if kept is None or not real["validation"]:
        return ()
    threat = record["config"].get("threat")
    ball = "" if threat is None else f", {ThreatModel(**_fields(threat))}"
    attack = f"PGD-{record['config'].get('validation_steps', 10)}{ball}"
    names = {
        "clean": "clean accuracy, validation images",
        "robust": f"robust accuracy ({attack}), validation images",
        "noisy": "accuracy under the noise of the training, validation images",
    }
    return tuple(Metric(name=name, value=kept[key], n=real["validation"]) for key, name in names.items() if key in kept)


def _fields(component: Record) -> dict[str, Any]:
    return {name: value for name, value in component.items() if name != "class"}


def _kept(header: Record, real: Record) -> str:
    """What the numbers are."""
    chosen = header["selection"]
    picked = ""
    if chosen["kept"] != header["log"][-1]["step"] or chosen["best"] != chosen["last"]:
        gap = 100 * chosen["best_minus_last"]
        picked = f" The best of all looks was {100 * chosen['best']:.2f} %, the last {100 * chosen['last']:.2f} %"
        picked += f" ({gap:.2f} points between)."
    return (
        f"On the {real['validation']:,} validation images, held out of train; the weights are those of step "
        f"{chosen['kept']}.{picked} This is no test result: a short attack, and images that choices may go by."
    )


def _classifier_limits(record: Record, threat: ThreatModel | None) -> Iterator[str]:
    if threat is None:
        yield "It was trained without an attack: small changes that nobody sees will fool it."
    else:
        yield _ONLY
    yield _UNVERIFIED
    if source(record, "chosen") is not None:
        yield _COPIES
    yield from _FROM_TRAINING


def _denoiser(header: Record, folder: Path) -> Iterator[str]:
    """What goes in and what comes out of a diffusion model."""
    channels, height, width = header["shape"]
    count = header["classes"]
    told = f"told one of {count} classes" if count else "without classes"
    yield (
        f"A diffusion model ({words(_network(header))}), {told}: a denoiser of images of {channels} channel"
        f"{'s' * (channels > 1)} and {height} x {width} pixels, in [-1, 1]. "
        f"{numbers_in(folder / DENOISER):,} numbers in {code(DENOISER)}."
    )


def _diffusion(header: Record) -> dict[str, Any]:
    """What the cards of diffusion models have in common."""
    return {
        "task": None if header["classes"] else "unconditional-image-generation",
        "tags": ("diffusion", "class-conditional" if header["classes"] else "unconditional", _network(header)),
        "use": "Synthetic images to train classifiers with (`gambeson generate`).",
        "limits": (_COPIES, "What it makes looks like its training images at best, with their gaps and their bias."),
        "loading": _LOAD_DENOISER,
    }


_USE_DISCRIMINATOR = "A measure of synthetic images and a score to choose them by. It does not say what they show."
_ONLY = (
    "It was trained to withstand the perturbations above and no others: another norm, a larger radius, blur, weather, "
    "another camera or a patch in the picture are not covered."
)
_UNVERIFIED = (
    "Its robustness is unverified until `gambeson evaluate` has attacked it on test images: what training measures is "
    "an upper bound of what a strong attack leaves."
)
_COPIES = (
    "Synthetic images may be copies of train images, with all that is private or protected in them: `gambeson quality` "
    "looks for copies."
)
_FROM_TRAINING = ("It is as good as its training images: what they lack or have wrong, it does not know or has wrong.",)
_FOREIGN = (
    "It was trained elsewhere. On which images, and how, its file does not tell; nor does this card. The terms of its "
    "authors hold."
)
_LOAD_CLASSIFIER = """from pathlib import Path
from gambeson.models.classifiers import load_classifier

model = load_classifier(Path("classifier.safetensors"))  # frozen, in eval mode
logits = model(images)  # float images [B, C, H, W] in [0, 1]"""
_LOAD_ENCODER = """from pathlib import Path
from gambeson.models.classifiers import load_encoder

model = load_encoder(Path("classifier.safetensors"))  # frozen, in eval mode"""
_LOAD_DENOISER = """from pathlib import Path
from gambeson.models.denoiser import load_denoiser

denoiser = load_denoiser(Path("denoiser.safetensors"))  # frozen, in eval mode
clean = denoiser(noisy, sigma, labels)  # images in [-1, 1] plus sigma times normal noise"""
_LOAD_EMBEDDING = """from pathlib import Path
from gambeson.models.files import load_tensors

tensors, header = load_tensors(Path("embedding.safetensors"))"""
