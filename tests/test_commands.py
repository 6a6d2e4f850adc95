"""The commands that make one thing: diffusion models, encoders, images and grids, from recipes or weights alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_files import tiny
from PIL import Image
from test_pickles import persistence, write_edm  # noqa: F401
from tiny import tiny_recipe

from gambeson import files
from gambeson.cli import main
from gambeson.data.synthetic import SyntheticStore
from gambeson.models.classifiers import load_encoder
from gambeson.models.denoiser import load_denoiser
from gambeson.recipe import Arm, Recipe
from gambeson.recipes.presets import PRESETS, preset
from gambeson.synthesis.grid import picture

SMALL = ["--generation.count", "30", "--generation.block", "20"]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    files.save(tiny_recipe(arms=(Arm.GUIDED,)), path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def call(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """A command that must succeed; what it printed."""
    code = main([str(w) for w in words])
    out, err = capfd.readouterr()
    assert code == 0, err
    return out


def path_in(out: str, what: str) -> Path:
    return Path(next(line for line in out.splitlines() if line.startswith(f"{what}: ")).partition(": ")[2])


def test_train_diffusion_then_generate_from_its_weights(
    recipe_file: Path, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Weights that one command wrote give, alone, the images that the recipe's own plain generation gives."""
    words = ("--runs", runs, "--workers", "1")
    weights = path_in(
        call(capfd, "train-diffusion", recipe_file, *words, "--out", tmp_path / "d.safetensors"), "weights"
    )
    assert weights == tmp_path / "d.safetensors"
    assert load_denoiser(weights).classes == 10
    assert "there already" in call(capfd, "train-diffusion", recipe_file, *words)
    alone = path_in(call(capfd, "generate", weights, *words, *SMALL, "--generation.levels.steps", "4"), "store")
    plain = ("--generation.guidance", "none", "--generation.levels.steps", "4")
    whole = path_in(call(capfd, "generate", recipe_file, *words, *SMALL, *plain, "--out", tmp_path / "store"), "store")
    assert whole == tmp_path / "store"
    first, second = (SyntheticStore.open(p).verify().read(np.arange(30)) for p in (alone, whole))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_sample_grid_shows_the_first_images_of_the_store(
    recipe_file: Path, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--runs", runs, "--workers", "1", *SMALL, "--generation.levels.steps", "4")
    store = SyntheticStore.open(path_in(call(capfd, "generate", recipe_file, *words), "store"))
    out = tmp_path / "grid.png"
    call(capfd, "sample-grid", recipe_file, *words, "--per-row", "3", "--out", out)
    images = np.concatenate([store.read(np.flatnonzero(store.labels == k)[:3])[0] for k in range(10)])
    with Image.open(out) as shown:
        assert np.array_equal(np.asarray(shown), picture(images, 3))
        assert shown.size == (3 * (64 + 2) + 2, 10 * (64 + 2) + 2)


@pytest.mark.parametrize("kind", ["robust", "standard", "noise-conditioned"])
def test_train_encoder(kind: str, recipe_file: Path, runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fast = ("--noisy_encoder.optimisation.steps", "8", "--noisy_encoder.network.width", "8")
    out = call(capfd, "train-encoder", recipe_file, "--kind", kind, *fast, "--runs", runs, "--workers", "1")
    model = load_encoder(path_in(out, "weights"))
    images = torch.zeros(2, 1, 8, 8)
    given = (images, 1.0) if kind == "noise-conditioned" else (images,)
    assert model(*given).shape == (2, 10)
    assert len(model.features(*given)) == 2


def test_an_unconditional_model_is_labelled_by_the_teacher(
    recipe_file: Path, runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two steps: images without a class, then pseudo-labels; the whole run goes through."""
    words = ("--denoiser.conditional", "false", "--labeling.by", "ByTeacher", "--runs", runs, "--workers", "1")
    store = SyntheticStore.open(path_in(call(capfd, "generate", recipe_file, *words, *SMALL), "store"))
    assert set(store.labels) == {-1}
    assert "report" in call(capfd, "run", recipe_file, *words)


def test_presets_hold_the_authors_numbers() -> None:
    """METHOD 1.1 and 1.2: 58 of 187 steps guided on CIFAR-10; 250 steps, 50 < t < 150 on traffic signs."""
    for name in ("cdp-cifar10-hnm", "cdp-cifar10-infonce"):
        generation = preset(name).generation
        sigmas = generation["levels"].sigmas()
        assert (len(sigmas) - 1, generation["guidance"].guided_steps(sigmas)) == (187, 58)
        assert generation["block"] == 512
    signs = preset("cdp-traffic-signs").generation
    sigmas = signs["levels"].sigmas()[:-1].tolist()
    times = torch.linspace(0, 999, 250, dtype=torch.float64).long().flip(0).tolist()
    assert [signs["guidance"].window.contains(s) for s in sigmas] == [50 < t < 150 for t in times]
    strengths = {name: preset(name).generation["guidance"].strength for name in list(PRESETS)[:3]}
    fast = preset("cdp-fast").generation
    assert fast["guidance"].guided_steps(fast["levels"].sigmas()) == 4
    assert strengths == {"cdp-cifar10-hnm": 100e3, "cdp-cifar10-infonce": 20e3, "cdp-traffic-signs": 5e3}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_on_any_recipe(
    name: str, recipe_file: Path, runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fewer = () if name == "cdp-fast" else ("--generation.levels.steps", "20")
    out = call(capfd, "generate", recipe_file, "--preset", name, *SMALL, *fewer, "--runs", runs, "--workers", "1")
    assert len(SyntheticStore.open(path_in(out, "store")).verify()) == 30


def test_presets_make_whole_recipes() -> None:
    for name in PRESETS:
        recipe = preset(name).into(tiny_recipe())
        assert isinstance(recipe, Recipe)
        assert recipe.generation.count == tiny_recipe().generation.count
        assert files.build(files.plain(recipe), Recipe) == recipe


MISTAKES = {
    "nothing": (["generate"], "a recipe or the weights"),
    "neither recipe nor weights": (["generate", "no-such-thing"], "which is none of them"),
    "not weights": (["generate", "pyproject.toml"], "expected a file of torch.save"),
    "unknown preset": (["generate", "digits", "--preset", "cdp-cifar10"], "cdp-cifar10-hnm"),
    "unknown encoder": (["train-encoder", "digits", "--kind", "robst"], "robust"),
    "no such device": (["generate", "digits", "--device", "cuda:77"], "device"),
    "micro-batch 0": (["generate", "digits", "--micro-batch", "0"], "above 0"),
    "unknown figure": (["figures", "gidance"], "guidance"),
    "batch of 1": (["generate", "digits", "--generation.block", "1"], "at least 2 images"),
    "window without a step": (["generate", "digits", "--generation.guidance.window.sigma_min", "100"], "guided step"),
    "tau+ with labels": (["generate", "digits", "--generation.guidance.pairs", "OtherClasses"], "tau_plus"),
    "classes of an unconditional model": (
        [
            *("generate", "digits", "--denoiser.conditional", "false", "--labeling.by", "ByTeacher"),
            *("--generation.guidance", "TowardsClass"),
        ],
        "without classes",
    ),
    "an unconditional model's own labels": (["run", "digits", "--denoiser.conditional", "false"], "ByTeacher"),
    "classifier-free without dropout": (["generate", "digits", "--generation.classifier_free", "2"], "label_dropout"),
    "noisy encoder, clean features": (
        ["generate", "digits", "--encoder", "noise-conditioned"],
        "NoiseConditionedFeatures",
    ),
    "clean encoder, noisy features": (
        ["generate", "digits", "--generation.guidance.features", "NoiseConditionedFeatures"],
        "noise-conditioned",
    ),
    "per-row x": (["sample-grid", "digits", "--per-row", "x"], "above 0"),
    "out is there": (["generate", "digits", "--out", "tests"], "nothing lies yet"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_before_anything_runs(
    mistake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv, expected = MISTAKES[mistake]
    assert main([*argv, "--runs", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert "\n\n" not in said.strip()
    assert not list(tmp_path.glob("stages/*/*/done.json"))


@pytest.mark.parametrize("command", ["train-diffusion", "train-encoder", "generate", "sample-grid", "figures"])
def test_every_command_explains_itself(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: gambeson {command}" in capfd.readouterr().out


def test_a_fitted_embedding_goes_through_recipe_and_weights(
    recipe_file: Path, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--runs", runs, "--workers", "1", *SMALL)
    fitted = (
        "--generation.guidance.embedding",
        "FittedEmbedding",
        "--generation.guidance.embedding.warmup_blocks",
        "1",
    )
    store = SyntheticStore.open(path_in(call(capfd, "generate", recipe_file, *words, *fitted), "store"))
    assert store.provenance["embedding"] is not None
    weights, encoder = tmp_path / "d.safetensors", tmp_path / "e.safetensors"
    call(capfd, "train-diffusion", recipe_file, *words[:4], "--out", weights)
    call(capfd, "train-encoder", recipe_file, *words[:4], "--out", encoder)
    alone = (
        "--encoder",
        encoder,
        "--generation.guidance",
        "Contrastive",
        "--generation.guidance.clip",
        "0.01",
        *fitted,
    )
    out = call(capfd, "generate", weights, *words, *alone)
    assert SyntheticStore.open(path_in(out, "store")).provenance["embedding"] is not None
    assert "guidance clipped at 0.01" in out


@pytest.mark.usefixtures("persistence")
@pytest.mark.parametrize("kind", ["ddim", "minimal-diffusion", "edm", "diffusers"])
def test_weights_of_other_projects_generate(
    kind: str, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, shape, options = foreign(kind, tmp_path)
    words = ("--runs", runs, "--workers", "1", "--generation.count", "6", "--generation.block", "4")
    steps = ("--generation.levels.steps", "3", "--generation.sampler", "DPMSolverPP")
    store = SyntheticStore.open(path_in(call(capfd, "generate", path, *words, *steps, *options), "store")).verify()
    assert (len(store), store.shape) == (6, shape)
    call(capfd, "sample-grid", path, *words, *steps, *options, "--per-row", "2", "--out", tmp_path / "grid.png")


def foreign(kind: str, folder: Path) -> tuple[Path, tuple[int, int, int], tuple[str, ...]]:
    """Small weights in the files of another project, the shape of their images, and what has to be said of them."""
    if kind == "diffusers":
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(8, 1, 1, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, **blocks)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "pipeline")
        return folder / "pipeline", (8, 8, 1), ()
    if kind == "edm":
        return write_edm(folder / "network.pkl", tiny("edm")), (16, 16, 1), ()
    from gambeson.models.adm_unet import ADMUNetSpec
    from gambeson.models.ddim_unet import DDIMUNetSpec

    spec = DDIMUNetSpec(width=32) if kind == "ddim" else ADMUNetSpec.small()
    torch.save(spec.build(3, 0 if kind == "ddim" else 43).state_dict(), folder / "weights.pt")
    return folder / "weights.pt", (32, 32, 3), ("--denoiser.image_size", "32")


def test_mistakes_with_weights_are_answered_before_anything_is_made(
    recipe_file: Path, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--runs", runs, "--workers", "1")
    weights = tmp_path / "weights"  # without an ending: known by its header
    call(capfd, "train-diffusion", recipe_file, *words, "--out", weights)
    unconditional = tmp_path / "u.safetensors"
    call(
        capfd,
        "train-diffusion",
        recipe_file,
        *words,
        "--denoiser.conditional",
        "false",
        *TEACHER,
        "--out",
        unconditional,
    )
    noisy = tmp_path / "noisy.safetensors"
    call(capfd, "train-encoder", recipe_file, "--kind", "noise-conditioned", *FAST_NOISY, *words, "--out", noisy)
    guided, towards = ("--generation.guidance", "Contrastive"), ("--generation.guidance", "TowardsClass")
    foreign_words = ("--denoiser", "ForeignDenoiser", "--denoiser.path")
    mistakes = {
        "no encoder": ((weights, *guided), "--encoder FILE"),
        "no weights as encoder": ((weights, *guided, "--encoder", recipe_file), "a .safetensors file"),
        "no such encoder": ((weights, *guided, "--encoder", "nowhere"), "--encoder FILE"),
        "real pairs": ((weights, *guided, "--encoder", noisy, *PAIRS, "RealPositives"), "without real images"),
        "noisy encoder": ((weights, *guided, "--encoder", noisy), "encoder"),
        "noisy classifier": ((weights, *towards, "--encoder", noisy), "classifier"),
        "another's options": ((weights, "--denoiser.image_size", "32"), "no reading options"),
        "unconditional by class": ((recipe_file, *foreign_words, unconditional, *towards), "unconditional"),
        "unconditional, own labels": ((recipe_file, *foreign_words, unconditional), "ByTeacher"),
        "too few real images": ((recipe_file, *PAIRS, "RealNegatives"), "count"),
        "repeats": ((recipe_file, *REPEATS, "--generation.sampler", "DPMSolverPP"), "keep_repeats"),
        "one channel": ((recipe_file, "--student.network", "WideResNetSpec"), "channel"),
    }
    for mistake, (argv, expected) in mistakes.items():
        place = tmp_path / mistake.replace(" ", "-")
        assert main(["generate", *map(str, argv), "--runs", str(place), "--workers", "1"]) == 2, mistake
        said = capfd.readouterr().err
        assert expected in said, mistake
        assert "Traceback" not in said
        made = {p.parent.parent.name for p in place.glob("stages/*/*/done.json")}
        assert made <= {"import_denoiser", "import_classifier"}, mistake


TEACHER = ("--labeling.by", "ByTeacher")
FAST_NOISY = ("--noisy_encoder.optimisation.steps", "8", "--noisy_encoder.network.width", "8")
PAIRS = ("--generation.guidance.pairs",)
REPEATS = ("--generation.levels", "TimestepLevels", "--generation.levels.keep_repeats", "true")


def test_weights_of_another_shape_are_refused(
    recipe_file: Path, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from gambeson.models.denoiser import EDM, NetworkDenoiser, denoiser_header
    from gambeson.models.files import save_tensors
    from gambeson.models.unet import UNetSpec

    spec = UNetSpec(width=8)
    network = spec.build(3, 4)
    denoiser = NetworkDenoiser(network, EDM(), spec=spec, classes=4, shape=(3, 16, 16), conditional_only=True)
    save_tensors(tmp_path / "other.safetensors", network.state_dict(), {**denoiser_header(denoiser), "log": []})
    foreign = ("--denoiser", "ForeignDenoiser", "--denoiser.path", str(tmp_path / "other.safetensors"))
    assert main(["generate", str(recipe_file), *foreign, "--runs", str(runs), "--workers", "1"]) == 2
    said = capfd.readouterr().err
    assert "(1, 8, 8)" in said
    assert "(3, 16, 16)" in said


def test_a_plan_is_checked_for_the_arms_that_it_has() -> None:
    """Too few real images for guidance stop a guided arm, and no other."""
    from gambeson.errors import UserError
    from gambeson.pipeline import check_plan
    from gambeson.sampling.pairs import RealNegatives

    recipe = tiny_recipe()
    guidance = replace(recipe.generation.guidance, pairs=RealNegatives())
    recipe = replace(recipe, generation=replace(recipe.generation, guidance=guidance))
    check_plan(recipe, (Arm.REAL, Arm.PLAIN))
    with pytest.raises((UserError, ValueError), match="count=512"):
        check_plan(recipe, (Arm.GUIDED,))


def test_the_tiny_recipe_is_what_it_was(recipe_file: Path) -> None:
    """Fields added since keep old digests: the recipe as file is the recipe."""
    assert files.load(recipe_file, Recipe).digest == tiny_recipe(arms=(Arm.GUIDED,)).digest
    assert replace(tiny_recipe(), encoder="standard").digest != tiny_recipe().digest
