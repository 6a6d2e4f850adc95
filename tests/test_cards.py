"""Model cards and data cards: every checkpoint and every store has one, which tells the truth about its ancestors."""

import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import gambeson.data.peers
import gambeson.synthesis.gaussian
import gambeson.synthesis.generate
import gambeson.synthesis.label
import gambeson.synthesis.mixup
import gambeson.synthesis.select
import gambeson.training.classifier
import gambeson.training.diffusion
import gambeson.training.foreign
import gambeson.training.noise_conditioned
from gambeson import commands, label_command, select_command, store_command
from gambeson.data.datasets import Digits
from gambeson.data.exchange.export import FILES, FORMATS, export
from gambeson.data.exchange.made import command_line, licence_front
from gambeson.data.exchange.markup import block, code, front, quoted, table, words
from gambeson.data.exchange.outgoing import Outgoing
from gambeson.data.exchange.store_card import exported
from gambeson.data.exchange.stores import copy as copy_store
from gambeson.data.imageset import ImageSet
from gambeson.data.peers import PeerImages, import_images
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.errors import EnvironmentFault
from gambeson.heritage import carried, heritage_of, told
from gambeson.models.card import Card, card_text
from gambeson.models.files import header_of, load_tensors, save_tensors
from gambeson.models.noise_conditioned import NoiseConditionedSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.unet import UNetSpec
from gambeson.quality.discriminator import Discrimination, train_discriminator, two_sources
from gambeson.robustness.losses import TRADES, Plain
from gambeson.robustness.subjects import FromZoo, Ours
from gambeson.sampling.contrastive import InfoNCE
from gambeson.sampling.embedding import FittedEmbedding
from gambeson.sampling.guidance import Contrastive
from gambeson.sampling.levels import NoiseLevels
from gambeson.store import Artifact, Stage, Store, stage
from gambeson.synthesis.gaussian import GaussianControl, gaussian_control
from gambeson.synthesis.generate import fit_embedding, generate
from gambeson.synthesis.generation import Generation
from gambeson.synthesis.label import Labeling, label
from gambeson.synthesis.mixup import MixupControl, mixup_control
from gambeson.synthesis.select import Selection, select
from gambeson.threat import ThreatModel
from gambeson.training.classifier import Checkpoint, ClassifierTraining, train_classifier
from gambeson.training.diffusion import DenoiserTraining, train_denoiser
from gambeson.training.foreign import ForeignDenoiser, Weights, import_classifier, import_denoiser
from gambeson.training.loop import Optimisation
from gambeson.training.noise_conditioned import NoisyEncoderTraining, train_noise_conditioned

NASTY = (
    'a "quoted" one', "a: b", "<script>alert(1)</script>", "two\nlines", "`code` ``two``", "pipe | bar", "a, b", "no",
    "null", "1e-05", "- dash", "# head", "{x}", "[l](http://x)", "*bold* _it_", "back\\slash", "\ttab", " led", "led ",
    "", "猫", "עברית", "हिन्दी", "😀 astral", "\u202eturned", "\u2028line", "\x85next", "\x00nul", "\x7fdel",
    "\ufeffbom", "'single'", "&amp;", "--- front", "...", "%percent", "@at", "!tag", "~", "\ud800half",
)  # fmt: skip


# ---- text of any origin ----------------------------------------------------------------------------------------------


def matter(text: str) -> dict[str, Any]:
    """The front matter of a card."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(text)


def visible(page: str) -> str:
    """What a reader sees of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def test_front_matter_gives_nasty_names_back_exactly() -> None:
    tree = {
        "names": {str(i): name for i, name in enumerate(NASTY)},
        "tags": list(NASTY),
        "it": [{"a": n} for n in NASTY],
    }
    assert yaml.safe_load(front(tree).removeprefix("---\n").removesuffix("\n---")) == tree


@given(st.text(st.characters(), max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_from_yaml_and_says_itself_in_markdown(text: str) -> None:
    assert "\n" not in quoted(text)
    assert yaml.safe_load(f"x: {quoted(text)}\n") == {"x": text}
    assert yaml.safe_load(front({"x": [text], "y": {text or "k": text}})[4:-4])["x"] == [text]
    page = rendered(f"a {words(text)} b\n\n{table(['h'], [[words(text)]])}")
    assert set(re.findall(r"<(/?\w+)", page)) <= {
        f"{end}{tag}" for tag in ("p", "table", "thead", "tbody", "tr", "th", "td") for end in ("", "/")
    }
    assert page.count("<td>") == 1


@pytest.mark.parametrize(
    "value", [1e-5, 1e16, 0.1, 1.0, -2.5e-300, 3, True, False, None, [], {}, "1", [1.5, "x", None]]
)
def test_values_come_back_with_their_types(value: object) -> None:
    found = yaml.safe_load(front({"keep": 1, "inner": {"x": value}})[4:-4])["inner"]["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "name", ["<b>x</b>", "a|b", "`x`", "*x* _y_ [l](u) ![i](u)", "&lt;", "x_y_z", "$a$", "~~no~~", "猫 😀"]
)
def test_a_name_in_a_table_is_read_as_it_is(name: str) -> None:
    cell = re.findall(r"<td>(.*?)</td>", rendered(table(["h"], [[words(name)]])), re.DOTALL)
    assert [html.unescape(text) for text in cell] == [name]
    assert visible(rendered(f"a {code(name)} b")).strip() == f"a {name} b"


def test_what_cannot_be_seen_is_shown_by_its_number() -> None:
    assert words("a\nb\u202ec\ud800") == "a\\\\nb\\\\u202ec\\\\ud800"
    words("a\nb\u202ec\ud800").encode()
    assert visible(rendered(block("x\n```\n</code><b>y"))).strip() == "x\n```\n</code><b>y"


def test_a_licence_is_the_hubs_or_other_with_its_name() -> None:
    assert licence_front("CC BY 4.0") == {"license": "cc-by-4.0"}
    assert licence_front("my own; words") == {"license": "other", "license_name": "my own; words"}
    assert licence_front("MIT; cc-by-4.0") == {"license": "other", "license_name": "MIT; cc-by-4.0"}
    assert licence_front("MIT; cc-by-4.0", several=True) == {"license": ["mit", "cc-by-4.0"]}
    assert licence_front(None) == {}


def test_a_command_is_told_without_its_secrets() -> None:
    text = command_line("gambeson run r.yaml --runs s3://me:hush@bucket/x --u 'http://h/p?api_key=hush&n=1'")
    assert "hush" not in text
    assert "s3://***@bucket/x" in text
    assert "&n=1" in text


def test_the_card_of_a_saved_classifier_survives_any_class_name() -> None:
    model = ResNetSpec(width=2).build(1, len(NASTY))
    card = Card(
        class_names=NASTY, data="<i>d</i> | `x`", licence="odd: 'one'", limits="<b>", heritage={"licence": "no"}
    )
    text = card_text(model, card, 'my "model": <x>')
    assert matter(text)["license_name"] == "odd: 'one'"
    assert "<i>" not in rendered(text)
    assert "<b>" not in rendered(text)
    text.encode()


# ---- every stage that makes a checkpoint or a store ------------------------------------------------------------------

SHORT = Optimisation(steps=2, batch_size=8)
BALL = ThreatModel(norm="linf", epsilon=0.125)
CLASSIFIER = ClassifierTraining(
    network=ResNetSpec(width=2), loss=Plain(), optimisation=SHORT, validations=1, validation_steps=1, threat=BALL
)
ROBUST = replace(CLASSIFIER, loss=TRADES(threat=BALL, steps=1, step_size=0.1))
DENOISER = DenoiserTraining(network=UNetSpec(width=8, blocks=1), optimisation=replace(SHORT, momentum=0.0))
NOISY = NoisyEncoderTraining(
    network=NoiseConditionedSpec(width=8), optimisation=replace(SHORT, momentum=0.0), validations=1
)
GUIDED = Generation(count=20, block=10, levels=NoiseLevels(steps=6), guidance=Contrastive(loss=InfoNCE()))
TINY = "80 Million Tiny Images"


def real_images() -> ImageSet:
    return Digits(train_images=20, validation_images=20).load()


def stamped(path: Path, place: Path, **told: Any) -> Path:
    """A copy of weights whose header says more."""
    tensors, header = load_tensors(path)
    save_tensors(place, tensors, {**header, **told})
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """All kinds of checkpoints and stores; of a line of ancestors two state licences and one saw more data."""
    root, real = tmp_path_factory.mktemp("cards"), real_images()
    once, found = Store(root / "runs").once, {}
    found["teacher"] = once(train_classifier, CLASSIFIER, real, None, seed=0)
    found["denoiser"] = once(train_denoiser, DENOISER, real, seed=0)
    found["noisy"] = once(train_noise_conditioned, NOISY, real, seed=0)
    files = found["denoiser"].file("denoiser.safetensors"), found["teacher"].file("classifier.safetensors")
    weights = stamped(files[0], root / "theirs.safetensors", licence="CC BY-NC-SA 4.0")
    encoder = stamped(files[1], root / "robust.safetensors", licence="MIT", additional_data=[TINY])
    found["foreign"] = once(import_denoiser, ForeignDenoiser(), Weights(str(weights)))
    found["encoder"] = once(import_classifier, "gambeson", Weights(str(encoder)))
    networks = (real, found["foreign"], found["encoder"])
    fitted = replace(
        GUIDED, guidance=Contrastive(loss=InfoNCE(), embedding=FittedEmbedding(width=4, outputs=4, warmup_blocks=1))
    )
    found["embedding"] = once(fit_embedding, fitted, *networks, seed=0)
    found["images"] = once(generate, fitted, *networks, found["embedding"], seed=0)
    found["gaussian"] = once(gaussian_control, GaussianControl(count=20), real, seed=0)
    found["mixup"] = once(mixup_control, MixupControl(count=20), real, seed=0)
    found["labels"] = once(label, Labeling(), found["images"], found["teacher"])
    found["chosen"] = once(select, Selection(), found["images"], found["labels"])
    found["student"] = once(train_classifier, ROBUST, real, found["chosen"], seed=0)
    source = SyntheticStore.open(found["gaussian"].folder / "images")
    export(Outgoing(source), "edm", root / "theirs.npz")
    found["imported"] = once(import_images, PeerImages().reading, PeerImages(path=str(root / "theirs.npz")).source)
    spec = Discrimination(network=ResNetSpec(width=2), optimisation=SHORT, steps=1)
    found["judge"] = train_discriminator(
        once, spec, two_sources(spec, real.train.images, real.validation.images, 0), seed=0
    )
    return found


KINDS = {
    "teacher": "train_classifier",
    "denoiser": "train_denoiser",
    "noisy": "train_noise_conditioned",
    "foreign": "import_denoiser",
    "encoder": "import_classifier",
    "embedding": "fit_embedding",
    "images": "generate",
    "gaussian": "gaussian_control",
    "mixup": "mixup_control",
    "labels": "label",
    "chosen": "select",
    "student": "train_classifier",
    "imported": "import_images",
    "judge": "train_classifier",
}
MODULES: tuple[ModuleType, ...] = (
    gambeson.data.peers,
    gambeson.synthesis.gaussian,
    gambeson.synthesis.generate,
    gambeson.synthesis.label,
    gambeson.synthesis.mixup,
    gambeson.synthesis.select,
    gambeson.training.classifier,
    gambeson.training.diffusion,
    gambeson.training.foreign,
    gambeson.training.noise_conditioned,
)


def text_of(artifact: Artifact) -> str:
    return artifact.file("README.md").read_text(encoding="utf-8")


def test_no_stage_of_these_rooms_is_forgotten() -> None:
    stages = {each for module in MODULES for each in vars(module).values() if isinstance(each, Stage)}
    assert {each.name for each in stages} == set(KINDS.values())
    assert all(each.card is not None for each in stages)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_card_that_parses_and_says_how_it_was_made(made: dict[str, Artifact], kind: str) -> None:
    artifact = made[kind]
    assert artifact.stage == KINDS[kind]
    text, record = text_of(artifact), artifact.record
    found = matter(text)
    data = KINDS[kind] in ("generate", "gaussian_control", "mixup_control", "import_images", "label", "select")
    if data:
        assert found["task_categories"] == ["image-classification"]
        assert found["size_categories"] == ["n<1K"]
        assert found["dataset_info"]["splits"] == [{"name": "train", "num_examples": 20}]
        names = found["dataset_info"]["features"][1]["dtype"]["class_label"]["names"]
        assert names == {str(k): str(k) for k in range(10)} or kind == "imported"
        assert "8 x 8 pixels, grey" in text
        assert "`gambeson quality`" in text
    else:
        assert found["library_name"] == "gambeson"
        assert found["tags"]
    (settings,) = re.findall(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    config = record["config"] if isinstance(record["config"], dict) else {"asked": record["config"]}
    assert yaml.safe_load(settings) == json.loads(json.dumps(config))
    assert record["digest"] in text
    assert all(digest in text for digest in record["inputs"] if digest)
    assert record["versions"]["torch"] in text
    assert record["finished"] not in text  # no clock: it is in the record, and in what leaves the folder
    assert "None" not in text
    page = rendered(text[text.index("\n---\n") + 5 :])
    assert page.count("<h1>") == 1
    assert page.index("<h1>") < page.index("<h2>")


def test_numbers_are_those_of_the_log_named_as_validation(made: dict[str, Artifact]) -> None:
    found, header = matter(text_of(made["student"])), header_of(made["student"].file("classifier.safetensors"))
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "validation"}
    assert [m["value"] for m in result["metrics"]] == [header["log"][-1]["clean"], header["log"][-1]["robust"]]
    assert [m["name"] for m in result["metrics"]] == [
        "clean accuracy, validation images, n = 20",
        "robust accuracy (PGD-1, linf eps 0.125), validation images, n = 20",
    ]
    text = text_of(made["student"])
    assert "Perturbations within the linf ball of radius 0.125" in text
    assert "unverified until `gambeson evaluate`" in text
    assert "And on 20 synthetic images" in text
    assert "trained without an attack" in text_of(made["teacher"])
    assert "held_out" not in text_of(made["denoiser"])
    log = header_of(made["denoiser"].file("denoiser.safetensors"))["log"][-1]
    assert f"{log['held_out']:.4g} on 20 validation images" in text_of(made["denoiser"])
    for level, share in header_of(made["noisy"].file("classifier.safetensors"))["log"][-1]["accuracy"]:
        assert f"| {level:g} | {100 * share:.2f} | 20 |" in text_of(made["noisy"])
    assert "model-index" not in matter(text_of(made["noisy"]))
    assert "tells real from synthetic" in text_of(made["judge"])
    assert "trained elsewhere" in text_of(made["foreign"])


def test_licences_and_seen_sets_travel_through_images_into_the_student(made: dict[str, Artifact]) -> None:
    """By hand: the diffusion model states a licence, the encoder another and a set; what comes of both has all."""
    both, theirs, own = (
        "CC BY-NC-SA 4.0; MIT",
        {"licence": "CC BY-NC-SA 4.0"},
        {"licence": "MIT", "additional_data": [TINY]},
    )
    everything = {"licence": both, "additional_data": [TINY]}
    wanted = {
        "teacher": {}, "denoiser": {}, "gaussian": {}, "imported": {}, "judge": {}, "foreign": theirs, "encoder": own,
        "embedding": everything, "images": everything, "labels": everything, "chosen": everything,
        "student": everything,
    }  # fmt: skip
    for kind, parts in wanted.items():
        record = made[kind].record
        assert carried(record["heritage"]) == parts, kind
        stated = matter(text_of(made[kind])).get("license_name", matter(text_of(made[kind])).get("license"))
        assert stated == {None: None, both: both, "MIT": "mit", "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0"}[
            parts.get("licence")
        ] or (stated == ["cc-by-nc-sa-4.0", "mit"])
        assert (TINY in text_of(made[kind])) == ("additional_data" in parts), kind
    for kind, name in {
        "foreign": "denoiser",
        "encoder": "classifier",
        "student": "classifier",
        "embedding": "embedding",
    }.items():
        alone = told(header_of(made[kind].file(f"{name}.safetensors")))  # where the file goes without its record
        assert carried({"licence": None, **alone}) == wanted[kind], kind
    store = SyntheticStore.open(made["images"].folder / "images")
    behind = {"real": ["digits"], "unknown": ["robust.safetensors", "theirs.safetensors"]}
    assert told(store.provenance) == {**everything, **behind}
    assert "seen at second hand: 80 Million Tiny Images" in text_of(made["student"])
    assert made["student"].record["heritage"]["real"] == ["digits"]
    assert made["student"].record["heritage"]["unknown"] == ["robust.safetensors", "theirs.safetensors"]
    assert "Nothing is known of the real images behind: robust.safetensors, theirs" in text_of(made["student"])
    assert made["teacher"].record["heritage"]["unknown"] == []
    assert "Nothing is known" not in text_of(made["gaussian"])
    student = str(made["student"].file("classifier.safetensors"))
    for heir in (
        Ours(student),
        Checkpoint(student),
        Weights(student),
        Chosen.open(made["chosen"].file("chosen.parquet")),
    ):
        assert carried(heritage_of([heir])) == everything


def test_who_labels_and_who_chooses_counts_too(made: dict[str, Artifact], tmp_path: Path) -> None:
    once, images = Store(tmp_path / "runs").once, SyntheticStore.open(made["gaussian"].folder / "images")
    labelled = once(label, Labeling(), images, Ours(str(made["student"].file("classifier.safetensors"))))
    chosen = once(select, Selection(), images, labelled)
    assert carried(chosen.heritage) == carried(made["student"].heritage)
    assert carried(Chosen.open(chosen.file("chosen.parquet")).heritage) == carried(made["student"].heritage)
    assert chosen.heritage["real"] == ["digits"]  # by what the store says of itself
    alone = Chosen.open(chosen.file("chosen.parquet")).heritage  # as a stranger finds it, without the stage's record
    assert alone["unknown"] == made["student"].heritage["unknown"] == ["robust.safetensors", "theirs.safetensors"]
    assert alone["real"] == ["digits"]
    copied = copy_store(Chosen.open(chosen.file("chosen.parquet")), tmp_path / "copied")
    assert (copied.heritage["unknown"], copied.heritage["real"]) == (alone["unknown"], ["digits"])
    some = Chosen.open(chosen.file("chosen.parquet")).some(np.arange(3))
    assert carried(some.heritage) == carried(made["student"].heritage)


def test_robustbenchs_extra_data_is_told(tmp_path: Path) -> None:
    assert FromZoo("Rebuffi2021Fixing_70_16_cutmix_extra.pt").heritage["additional_data"]
    assert "additional_data" not in FromZoo("Rice2020Overfitting.pt").heritage


def test_the_terms_of_foreign_weights_can_be_stated(made: dict[str, Artifact], tmp_path: Path) -> None:
    """What the user states adds to what the file says, changes the digest, and is left out of it where nothing is."""
    path = str(made["foreign"].file("denoiser.safetensors"))
    spec = ForeignDenoiser(path=path, licence="odd terms", additional_data=("faces",))
    assert carried(heritage_of([spec.source])) == {
        "licence": "CC BY-NC-SA 4.0; odd terms",
        "additional_data": ["faces"],
    }
    once = Store(tmp_path).once
    stated = once(import_denoiser, spec.reading, spec.source)
    plain = once(import_denoiser, ForeignDenoiser(), Weights(path))
    assert stated.digest != plain.digest
    assert not {"licence", "additional_data"} & set(plain.record["config"])
    assert told(header_of(stated.file("denoiser.safetensors")))["additional_data"] == ["faces"]
    assert matter(text_of(stated))["license_name"] == "CC BY-NC-SA 4.0; odd terms"


def test_strangers_headers_are_no_texts_of_ours() -> None:
    assert told({"licence": 3, "additional_data": "x", "real_sets": {"a": 1}}) == {}
    assert told({"licence": ["a"], "additional_data": [1, "b"]}) == {"additional_data": ["b"]}


def test_equal_work_gives_equal_cards(made: dict[str, Artifact], tmp_path: Path) -> None:
    once, real = Store(tmp_path / "elsewhere").once, real_images()
    assert text_of(once(gaussian_control, GaussianControl(count=20), real, seed=0)) == text_of(made["gaussian"])
    assert text_of(once(train_classifier, CLASSIFIER, real, None, seed=0)) == text_of(made["teacher"])


def test_a_card_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the card is written: no card, no record; the next start writes both."""
    stops = [True]

    def card(folder: Path, record: dict[str, Any]) -> str:
        if stops:
            stops.pop()
            raise KeyboardInterrupt
        return f"card of {record['stage']}"

    @stage(revision=1, card=card)
    def work(work: Any, spec: Any) -> None:
        (work.folder / "result").write_text("done")

    once: Callable[..., Artifact] = Store(tmp_path).once
    with pytest.raises(KeyboardInterrupt):
        once(work, {})
    (folder,) = (tmp_path / "stages" / "work").iterdir()
    assert {path.name for path in folder.iterdir()} == {".lock", "attempts.json", "result"}
    with monkeypatch.context() as full:

        def no_space(handle: int) -> None:
            raise OSError(28, "No space left on device")

        full.setattr("os.fsync", no_space)
        with pytest.raises(EnvironmentFault, match="No space left"):
            once(work, {})
    assert not {path.name for path in folder.iterdir()} & {"README.md", "done.json"}
    artifact = once(work, {})
    assert artifact.file("README.md").read_text() == "card of work"
    assert artifact.record["attempts"] >= 2


def test_a_fault_in_a_card_fails_no_finished_work(tmp_path: Path) -> None:
    def card(folder: Path, record: dict[str, Any]) -> str:
        raise KeyError("no such thing")

    @stage(revision=1, card=card)
    def work(work: Any, spec: Any) -> None:
        (work.folder / "result").write_text("done")

    said: list[str] = []
    artifact = Store(tmp_path, say=said.append).once(work, {})
    assert artifact.file("result").read_text() == "done"
    assert "README.md" not in artifact.record["files"]
    assert said == ["work: its card could not be written (KeyError: 'no such thing')"]


def test_images_of_earlier_versions_tell_what_they_say_of_themselves(made: dict[str, Artifact], tmp_path: Path) -> None:
    """Their stage's record knows of no heritage; the store does."""
    old = tmp_path / "stages" / "generate" / made["images"].folder.name
    shutil.copytree(made["images"].folder, old)
    record = {name: value for name, value in made["images"].record.items() if name != "heritage"}
    (old / "done.json").write_text(json.dumps(record))
    found = Artifact("generate", made["images"].digest, old).heritage
    assert found == {"stage": "generate", **told(SyntheticStore.open(old / "images").provenance)}
    assert found["additional_data"] == [TINY]


def test_stages_of_earlier_versions_need_no_card(made: dict[str, Artifact], tmp_path: Path) -> None:
    """Their records say nothing of ancestors; what is made of them says that it does not know, and goes on."""
    old = tmp_path / "stages" / "select" / made["chosen"].folder.name
    shutil.copytree(made["chosen"].folder, old)
    shutil.copytree(made["images"].folder, tmp_path / "stages" / "generate" / made["images"].folder.name)
    record = {name: value for name, value in made["chosen"].record.items() if name not in ("heritage", "sources")}
    record["files"].pop("README.md")
    (old / "done.json").write_text(json.dumps(record))
    (old / "README.md").unlink()
    artifact = Artifact("select", made["chosen"].digest, old)
    assert artifact.heritage == {"stage": "select"}
    assert exported(artifact, [select], ["select"]) is None
    student = Store(tmp_path).once(train_classifier, CLASSIFIER, real_images(), artifact, seed=0)
    assert "stage select" in text_of(student)


def test_digests_do_not_know_of_cards(made: dict[str, Artifact]) -> None:
    """The digest is over what it always was over."""
    from gambeson.canonical import digest

    for artifact in made.values():
        asked = {name: artifact.record[name] for name in ("stage", "revision", "config", "inputs", "seed")}
        assert digest(asked) == artifact.digest


def test_the_hubs_own_package_reads_them(made: dict[str, Artifact]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    for kind, artifact in made.items():
        data = KINDS[kind] in ("generate", "gaussian_control", "mixup_control", "import_images", "label", "select")
        loaded = (hub.DatasetCard if data else hub.ModelCard).load(artifact.folder / "README.md")
        assert loaded.data.to_dict() == matter(text_of(artifact))
        if kind == "student":
            assert [each.dataset_split for each in loaded.data.eval_results] == ["validation", "validation"]
            assert loaded.data.eval_results[0].metric_type == "accuracy"


# ---- what leaves its folder ------------------------------------------------------------------------------------------


def small_store(root: Path, names: tuple[str, ...], **provenance: Any) -> SyntheticStore:
    writer = StoreWriter(root=root, blocks=1, blocks_per_shard=1)
    labels = np.arange(2 * len(names)) % len(names)
    writer.put(0, np.arange(len(labels) * 12, dtype=np.uint8).reshape(-1, 2, 2, 3) % 251, labels)
    writer.finish({"class_names": list(names), **provenance})
    return SyntheticStore.open(root)


@pytest.mark.parametrize("form", FORMATS)
def test_exports_have_a_card_with_any_class_names(tmp_path: Path, form: str) -> None:
    names = tuple(name for name in NASTY if name.strip() and "\ud800" not in name and "\x00" not in name)
    own = small_store(tmp_path / "store", names, licence="a: 'b'", additional_data=["<x>"])
    out = tmp_path / f"set{FILES[form][0] if form in FILES else ''}"
    export(Outgoing(own), form, out)
    text = (out.with_name(f"{out.name}.md") if form in FILES else out / "README.md").read_text(encoding="utf-8")
    found = matter(text)
    assert tuple(found["dataset_info"]["features"][1]["dtype"]["class_label"]["names"].values()) == names
    assert (found["license"], found["license_name"]) == ("other", "a: 'b'")
    assert ("configs" in found) == (form == "parquet")
    page = rendered(text[text.index("\n---\n") + 5 :])
    assert "<script>" not in page
    assert page.count("<tr>") == len(names) + 1
    assert "have seen: &lt;x&gt;" in text


def test_store_commands_write_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_store(tmp_path / "a", ("cat", "dog"), licence="mit")
    small_store(tmp_path / "b", ("cat", "dog"), licence="cc0-1.0", additional_data=["faces"])
    store_command.store(["merge", "a", "b", "--out", "both"])
    store_command.store(["sample", "both", "--images", "3", "--out", "few", "--seed", "7"])
    store_command.store(["sample", "both", "--images", "3", "--out", "copied", "--copy"])
    store_command.store(["split", "both", "--parts", "0.5,0.5", "--out", "parts"])
    store_command.store(["export", "a", "--format", "parquet", "--out", "hub"])
    store_command.store(["import", "hub", "--out", "back"])
    for place, count in {
        "both": 8,
        "few": 3,
        "copied": 3,
        "parts/part-0": 4,
        "parts/part-1": 4,
        "hub": 4,
        "back": 4,
    }.items():
        text = Path(place, "README.md").read_text()
        found = matter(text)
        assert found["license"] == ("mit" if place in ("hub", "back") else ["cc0-1.0", "mit"])
        assert found["dataset_info"]["splits"][0]["num_examples"] == count
        assert ("have seen: faces" in text) == (place not in ("hub", "back"))
    assert "gambeson store sample both --images 3 --out few --seed 7" in Path("few/README.md").read_text()


def test_label_and_select_deliver_cards(
    made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images, teacher = str(made["images"].folder), str(made["student"].file("classifier.safetensors"))
    label_command.label([images, "--teacher", teacher, "--out", "labelled", "--runs", "runs", "--workers", "1"])
    words = [images, "--labels", "labelled", "--score", "Confidence", "--out", "picked", "--runs", "runs"]
    select_command.select(words)
    for place, word in {"labelled": "gambeson label", "picked": "gambeson select"}.items():
        text = Path(place, "README.md").read_text()
        assert matter(text)["license"] == ["cc-by-nc-sa-4.0", "mit"]
        assert word in text
        assert "finished 20" in text  # what leaves the record says when
        assert carried(Chosen.open(Path(place, "chosen.parquet")).heritage)["additional_data"] == [TINY]


def test_weights_and_images_that_leave_take_their_card_along(
    made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(made["foreign"].file("denoiser.safetensors"), "w.safetensors")
    words = ["--generation.count", "4", "--generation.block", "4", "--generation.levels.steps", "2", "--runs", "runs"]
    commands.generate_images(["w.safetensors", *words, "--out", "set"])
    text = Path("set/README.md").read_text()
    assert matter(text)["license"] == "cc-by-nc-sa-4.0"
    assert "gambeson generate w.safetensors --generation.count 4" in text
    assert "Time: " in text
    commands._deliver(
        made["student"].file("classifier.safetensors"), Path("mine.safetensors"), "weights", made["student"], ["x"]
    )
    assert TINY in Path("mine.safetensors.md").read_text()
