"""The commands that make one thing: a diffusion model, an encoder, a store of images, a grid of samples.

They take a recipe, as `gambeson run` does, or the weights of a diffusion model alone (a file, a folder, a hub id).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq

from gambeson import distributed, overrides
from gambeson.data.exchange.markup import words as plainly
from gambeson.data.exchange.store_card import card_file, deliver_card, exported
from gambeson.disk import checksum
from gambeson.engine import Job, run_jobs
from gambeson.errors import UserError, require, unknown
from gambeson.heritage import told
from gambeson.machine import Machine
from gambeson.models.classifiers import load_classifier
from gambeson.models.export import robustbench_entry, save_onnx, save_robustbench
from gambeson.models.files import header_of, is_safetensors, load_tensors
from gambeson.models.hub import README, config_of, from_pretrained
from gambeson.models.network import ClassifierNetwork
from gambeson.options import ENGINE_OPTIONS, MACHINE_OPTIONS, take, take_machine, take_number, take_runs
from gambeson.pipeline import Once, check_plan, diffuse, prepare_denoiser, prepare_encoder, prepare_networks
from gambeson.recipe import Arm, EncoderKind, Recipe
from gambeson.recipes import RECIPES
from gambeson.recipes.asked import is_recipe, load_recipe
from gambeson.recipes.presets import PRESETS, preset
from gambeson.sampling.embedding import FittedEmbedding
from gambeson.sampling.guidance import Contrastive
from gambeson.store import Artifact
from gambeson.synthesis import grid
from gambeson.synthesis.generate import Sources, fit_embedding, generate
from gambeson.synthesis.generation import Generation
from gambeson.terminal import say
from gambeson.training.classifier import train_classifier
from gambeson.training.diffusion import train_denoiser
from gambeson.training.foreign import ForeignDenoiser, Weights, import_classifier, import_denoiser
from gambeson.training.noise_conditioned import train_noise_conditioned


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Images from the weights of a diffusion model alone."""

    denoiser: ForeignDenoiser = ForeignDenoiser()  # the weights
    encoder: str = ""  # classifier.safetensors whose features steer guidance, as train-encoder writes it
    seed: int = 0  # seed of the noise
    generation: Generation = Generation(guidance=None)  # what is generated and how


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asked for."""

    source: Recipe | Sampling
    runs: Path
    machine: Machine
    out: Path | None

    @property
    def recipe(self) -> Recipe:
        """The recipe, where only a recipe was possible."""
        assert isinstance(self.source, Recipe)
        return self.source

    def make(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Runs `work(*arguments, once)` in this process, its progress on the screen; under torchrun with the others, of
        which all but the first end here."""
        from gambeson.screen import following

        with distributed.joined(self.machine.device) as device, following() as screen:
            leads, machine = distributed.leads(), replace(self.machine, device=device)
            (made,) = run_jobs([Job(name, work, arguments)], self.runs.resolve(), 1, screen, machine)
        if not leads:
            distributed.leave(0)
        return made


def _source(word: str, weights: bool) -> Recipe | Sampling:
    """A recipe, or the weights that a word names."""
    source = ForeignDenoiser(path=word)
    if is_recipe(word) or not weights:
        return load_recipe(word)
    if Path(word).exists() or source.source.is_hub:
        return Sampling(denoiser=source)
    raise UserError(
        f"expected a recipe ({', '.join(RECIPES)} or a .yaml file), or the weights of a diffusion model (a file, a "
        f"folder, a hub id like org/name), got {word!r}, which is none of them"
    )


def ask(argv: list[str], command: str, weights: bool = True) -> Asked:
    """Reads the words of a command: the source, the machine, a preset, and any field of the source."""
    words = list(argv)
    if not words or words[0].startswith("-"):
        what = "a recipe or the weights of a diffusion model" if weights else "a recipe"
        raise UserError(f"expected {what} first, got {words[0] if words else 'nothing'}; see gambeson {command} --help")
    word = words.pop(0)
    source = _source(word, weights)
    runs, machine = take_runs(words), take_machine(words, cluster=command == "generate")
    out, chosen = take(words, "--out"), take(words, "--preset")
    if chosen is not None:
        source = _with_preset(source, chosen)
    source = overrides.parse(source, words, prog=f"gambeson {command} {word}")
    if out is not None and command != "sample-grid":  # a picture may be drawn anew, results are never overwritten
        require(not Path(out).exists(), "--out", "a path where nothing lies yet", out)
        require(not card_file(Path(out)).exists(), "--out", "a path without a card beside it", card_file(Path(out)))
    _check(source)
    return Asked(source=source, runs=runs, machine=machine, out=None if out is None else Path(out))


def _check(source: Recipe | Sampling) -> None:
    """Raises UserError, before anything is made, for what cannot work."""
    if isinstance(source, Recipe):
        check_plan(source, (_arm(source),))
        return
    guidance = source.generation.guidance
    if guidance is not None:
        found, wanted = Path(source.encoder).is_file(), "the weights of a classifier for guidance to look through"
        require(found, "encoder", f"{wanted} (--encoder FILE)", source.encoder)
        require(is_safetensors(Path(source.encoder)), "encoder", f"{wanted}, a .safetensors file", source.encoder)
    if isinstance(guidance, Contrastive) and guidance.pairs.reals(source.generation.block):
        raise UserError(
            f"generation.guidance.pairs: expected pairs without real images, since weights alone come with none, got "
            f"{type(guidance.pairs).__name__}; name a recipe, and the weights with --denoiser ForeignDenoiser "
            "--denoiser.path"
        )


def _with_preset(source: Recipe | Sampling, name: str) -> Recipe | Sampling:
    chosen = preset(name)
    if isinstance(source, Recipe):
        return chosen.into(source)
    return replace(source, generation=chosen.apply(source.generation))


USAGE = """usage: gambeson {command} {what} [OPTIONS]

{about}

options, besides every field of the recipe (gambeson {command} {example} --help lists them):
{own}  --out PATH       {out}
{machine}"""

PRESET_OPTION = f"  --preset NAME    sampler, noise levels, guidance and encoder at once: {', '.join(PRESETS)}\n"


def _usage(command: str, what: str, about: str, out: str, own: str = "") -> str:
    example = "digits"
    return USAGE.format(
        command=command, what=what, about=about, out=out, own=own, machine=MACHINE_OPTIONS, example=example
    )


def _wants_help(argv: list[str], text: str) -> bool:
    """Prints the usage where help is asked for without a source."""
    if argv and argv[0] not in ("--help", "-h"):
        return False
    print(text)
    return True


def _deliver(path: Path, out: Path | None, what: str, made: Artifact, words: list[str]) -> None:
    """Says where a result lies; a copy of it goes to `out`, with its card."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        path = Path((shutil.copytree if path.is_dir() else shutil.copyfile)(path, out))
        deliver_card(exported(made, MADE, words), path)
    say(f"{what}: {path.resolve()}")


MADE = (train_denoiser, import_denoiser, train_classifier, train_noise_conditioned, generate)
"""The stages that make what these commands deliver."""


def _deliver_weights(path: Path, out: Path | None, made: Artifact, words: list[str]) -> None:
    """The last line of a training's log, and where its weights lie."""
    for record in load_tensors(path)[1]["log"][-1:]:
        first = {"step": record["step"], **record}
        say("  ".join(f"{name} {_shown(value)}" for name, value in first.items()))
    _deliver(path, out, "weights", made, words)


def _shown(value: Any) -> str:
    """A number, or a list of (noise level, number)."""
    if isinstance(value, list):
        return ", ".join(f"{number:.3g} at {level:g}" for level, number in value)
    return f"{value:.4g}"


def train_diffusion(argv: list[str]) -> None:
    """gambeson train-diffusion RECIPE [OPTIONS]"""
    about = "Trains the recipe's diffusion model (or finds it trained) and prints where its weights are."
    if _wants_help(
        argv,
        _usage("train-diffusion", "RECIPE", about, "copy the weights there, a .safetensors file, and its card beside"),
    ):
        return
    asked = ask(argv, "train-diffusion", weights=False)
    made: Artifact = asked.make("diffusion model", prepare_denoiser, asked.recipe, asked.recipe.seed)
    _deliver_weights(made.file("denoiser.safetensors"), asked.out, made, ["train-diffusion", *argv])


def train_encoder(argv: list[str]) -> None:
    """gambeson train-encoder RECIPE [--kind KIND] [OPTIONS]"""
    about = (
        "Trains the classifier whose features steer guidance (or finds it trained) and prints where its weights are."
    )
    own = f"  --kind KIND      {', '.join(get_args(EncoderKind))} (default: the recipe's encoder)\n"
    if _wants_help(argv, _usage("train-encoder", "RECIPE", about, "copy the weights there, a .safetensors file", own)):
        return
    words = list(argv)
    kind = take(words, "--kind")
    asked = ask(words, "train-encoder", weights=False)
    if kind is not None and kind not in get_args(EncoderKind):
        raise unknown("encoder", kind, get_args(EncoderKind))
    kind = kind or asked.recipe.encoder
    made: Artifact = asked.make(f"{kind} encoder", prepare_encoder, asked.recipe, kind, asked.recipe.seed)
    _deliver_weights(made.file("classifier.safetensors"), asked.out, made, ["train-encoder", *argv])


def generate_images(argv: list[str]) -> None:
    """gambeson generate RECIPE|WEIGHTS [OPTIONS]"""
    about = "Generates the recipe's synthetic images, training what they need; or images from weights alone."
    out = "copy the store of images there, a folder"
    if _wants_help(argv, _usage("generate", "RECIPE|WEIGHTS", about, out, PRESET_OPTION + ENGINE_OPTIONS)):
        return
    asked = ask(argv, "generate")
    made: Artifact = asked.make("images", _images, asked.source)
    record = made.record
    count = asked.source.generation.count
    print(f"{count} images in {record['seconds']:.0f} s; bit-identical over its restarts: {record['bit_identical']}")
    _print_clipping(made.folder / "images", asked.source.generation)
    _deliver(made.folder / "images", asked.out, "store", made, ["generate", *argv])


def _print_clipping(store: Path, spec: Generation) -> None:
    """How often guidance had to be clipped, where it may be."""
    if not isinstance(spec.guidance, Contrastive) or spec.guidance.clip is None:
        return
    names = ["block", "guidance_guided", "guidance_clipped", "guidance_largest_ratio"]
    tables = [pq.read_table(path, columns=names) for path in sorted((store / "shards").glob("*.parquet"))]
    blocks = {row[0]: row[1:] for t in tables for row in zip(*(t[n].to_pylist() for n in names), strict=True)}
    guided, clipped, ratios = zip(*blocks.values(), strict=True)
    share, largest = sum(clipped) / max(sum(guided), 1), max(ratios)
    print(f"guidance clipped at {spec.guidance.clip:g} in {share:.1%} of image steps (largest ratio {largest:.3g})")


def _arm(recipe: Recipe) -> Arm:
    return Arm.PLAIN if recipe.generation.guidance is None else Arm.GUIDED


def _images(source: Recipe | Sampling, once: Once) -> Artifact:
    if isinstance(source, Recipe):
        return diffuse(source, _arm(source), source.seed, once)["synthetic"]
    made = _networks(source, once)
    inputs = [made.get(role) for role in ("denoiser", "encoder", "embedding")]
    return once(generate, source.generation, None, *inputs, seed=source.seed)


def _networks(source: Recipe | Sampling, once: Once) -> dict[str, Artifact]:
    """Everything that images of this source are made with."""
    if isinstance(source, Recipe):
        return prepare_networks(source, _arm(source), source.seed, once)
    made = {"denoiser": once(import_denoiser, source.denoiser.reading, source.denoiser.source)}
    guidance = source.generation.guidance
    if guidance is None:
        return made
    made["encoder"] = once(import_classifier, "gambeson", Weights(source.encoder))
    if isinstance(guidance, Contrastive) and isinstance(guidance.embedding, FittedEmbedding):
        inputs = (None, made["denoiser"], made["encoder"])
        made["embedding"] = once(fit_embedding, source.generation.warm_up, *inputs, seed=source.seed)
    return made


def sample_grid(argv: list[str]) -> None:
    """gambeson sample-grid RECIPE|WEIGHTS [--per-row N] [OPTIONS]"""
    about = "Draws the first images that `generate` would store as one picture, a row for each class."
    own = "  --per-row N      images in a row (default 8)\n" + PRESET_OPTION
    if _wants_help(argv, _usage("sample-grid", "RECIPE|WEIGHTS", about, "the picture (default samples.png)", own)):
        return
    words = list(argv)
    per_row = take_number(words, "--per-row") or 8
    asked = ask(words, "sample-grid")
    path = asked.out or Path("samples.png")
    asked.make("samples", _draw, asked.source, asked.machine, per_row, path)
    say(f"picture: {path.resolve()}")


def _draw(source: Recipe | Sampling, machine: Machine, per_row: int, path: Path, once: Once) -> None:
    made = _networks(source, once)
    real = source.data.load() if isinstance(source, Recipe) else None
    sources = Sources.of(real, made["denoiser"], made.get("encoder"), made.get("embedding"))
    networks = sources.open(source.generation, machine.device, source.seed)
    images = grid.samples(source.generation, networks, machine, source.seed, per_row)
    grid.write(path, grid.picture(images, per_row))


EXPORT = """usage: gambeson export CLASSIFIER [--onnx FILE] [--robustbench FILE]

Writes a classifier in the forms that others read. CLASSIFIER: a folder that `gambeson train` wrote, a hub id, or a
classifier.safetensors of ours.

  --onnx FILE         ONNX, any number of images at a time (needs `pip install gambeson[onnx]`)
  --robustbench FILE  a .pt that RobustBench's loader accepts (WideResNet and PreActResNet)"""


def export(argv: list[str]) -> None:
    """gambeson export CLASSIFIER [--onnx FILE] [--robustbench FILE]"""
    if _wants_help(argv, EXPORT) or {"--help", "-h"} & set(argv):
        return
    words = list(argv)
    forms = {name: take(words, f"--{name}") for name in ("onnx", "robustbench")}
    require(len(words) == 1 and not words[0].startswith("-"), "export", "one classifier", " ".join(words))
    require(any(forms.values()), "export", "--onnx FILE or --robustbench FILE", "neither")
    for name, place in forms.items():
        require(place is None or not Path(place).exists(), f"--{name}", "a path where nothing lies yet", place)
    model, shape = _classifier(words[0])
    if forms["robustbench"] is not None:
        save_robustbench(model, forms["robustbench"])
        _deliver_export(words[0], Path(forms["robustbench"]), "a checkpoint as RobustBench reads them")
        say(f"RobustBench: {Path(forms['robustbench']).resolve()}\n{robustbench_entry(model)}")
    if forms["onnx"] is not None:
        require(shape is not None, "export --onnx", "a classifier that says which images it was trained on", words[0])
        assert shape is not None
        save_onnx(model, forms["onnx"], shape)
        _deliver_export(words[0], Path(forms["onnx"]), "ONNX, for any number of images at a time")
        say(f"ONNX: {Path(forms['onnx']).resolve()}")


def _deliver_export(word: str, place: Path, form: str) -> None:
    """The classifier's card beside a file of another form, with what that is; without a card, what its weights say."""
    source = Path(word)
    stages = (source.with_name(README),) if source.with_name("done.json").is_file() else ()
    cards = (source / README, card_file(source), *stages)
    found = next((path for path in cards if path.is_file()), None)
    if found is None:
        facts = told(header_of(source) if source.is_file() else config_of(word))
        said = [f"- {name.replace('_', ' ')}: {plainly(str(value))}" for name, value in sorted(facts.items())]
        text = "\n".join(["# A classifier", "", *(said or ["Nothing is known of what it was made from."])])
    else:
        text = found.read_text(encoding="utf-8").rstrip("\n")
    about = f"`{place.name}`: the classifier as {form}. Images [B, C, H, W] in [0, 1] go in, logits come out."
    end = f"Written by `gambeson export`; SHA-256 {checksum(place)}"
    deliver_card("\n".join([text, "", "## This file", "", about, end, ""]), place)


def _classifier(word: str) -> tuple[ClassifierNetwork, tuple[int, int, int] | None]:
    """A classifier and the shape of the images it was trained on, where it says so."""
    path = Path(word)
    if path.is_file():
        shape = load_tensors(path)[1].get("shape")
        return load_classifier(path), None if shape is None else tuple(shape)
    shape = config_of(word).get("shape")
    return from_pretrained(word), None if shape is None else tuple(shape)
