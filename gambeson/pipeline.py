"""The story of a run: real images, denoiser, teacher, synthetic images, labels, selection, student, rows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from gambeson.data.imageset import ImageSet
from gambeson.models.denoiser import load_denoiser
from gambeson.recipe import Arm, EncoderKind, Recipe
from gambeson.robustness.assess import assess
from gambeson.robustness.evaluate import evaluate
from gambeson.robustness.subjects import Ours
from gambeson.sampling.embedding import FittedEmbedding
from gambeson.sampling.guidance import Contrastive
from gambeson.store import Artifact
from gambeson.synthesis.gaussian import gaussian_control
from gambeson.synthesis.generate import check_fit, fit_embedding, generate
from gambeson.synthesis.label import label
from gambeson.synthesis.select import select
from gambeson.training.classifier import check_network, train_classifier
from gambeson.training.diffusion import DenoiserTraining, train_denoiser
from gambeson.training.foreign import ForeignDenoiser, import_denoiser
from gambeson.training.noise_conditioned import train_noise_conditioned

Once = Callable[..., Artifact]
"""(stage, its part of the recipe, *inputs, seed) -> the finished stage; made, resumed or found (store.Store.once)."""


@dataclass(frozen=True)
class Chapter:
    """One arm of one seed, told to its end: the artifacts by their role in the story."""

    arm: Arm
    seed: int
    artifacts: dict[str, Artifact]


def tell(recipe: Recipe, arm: Arm, seed: int, once: Once, real: ImageSet | None = None) -> Chapter:
    """One arm, from images to rows. Arms share what they share: each stage is made once, whoever asks first.

    real: the recipe's images, where they have been read already; here as below, reading a large file takes seconds.
    """
    recipe = recipe.with_threat_everywhere()
    real = _images(recipe, real)
    told: dict[str, Artifact] = {}
    chosen = None
    if arm in (Arm.PLAIN, Arm.GUIDED) and isinstance(recipe.denoiser, ForeignDenoiser):
        prepare_denoiser(recipe, seed, once, real)  # what foreign weights cannot do is said before anything is trained
    if arm is not Arm.REAL:
        told["teacher"] = once(train_classifier, recipe.teacher, real, None, seed=seed)
        if arm is Arm.GAUSSIAN:
            told["synthetic"] = once(gaussian_control, recipe.control, real, seed=seed)
        else:
            told |= diffuse(recipe, arm, seed, once, real)
        told["labelled"] = label_images(recipe, told, once, real)
        chosen = told["chosen"] = select_images(recipe, told, seed, once, real)
    told["student"] = once(train_classifier, recipe.student, real, chosen, seed=seed)
    told["rows"] = once(evaluate, recipe.evaluation, told["student"], real, seed=seed)
    if recipe.assessment is not None:
        student = Ours(str(told["student"].file("classifier.safetensors")))
        told["autoattack"] = once(assess, recipe.assessment, student, real, seed=seed)
    return Chapter(arm, seed, told)


def _images(recipe: Recipe, real: ImageSet | None) -> ImageSet:
    return recipe.data.load() if real is None else real


def label_images(recipe: Recipe, told: dict[str, Artifact], once: Once, real: ImageSet | None = None) -> Artifact:
    """Labels of the synthetic images, by their condition or by the teacher and whoever is asked besides."""
    others = recipe.labeling.others(_images(recipe, real).shape)
    return once(label, recipe.labeling.reading, told["synthetic"], told["teacher"], *others)


def select_images(
    recipe: Recipe, told: dict[str, Artifact], seed: int, once: Once, real: ImageSet | None = None
) -> Artifact:
    """The images that are kept; the selection is given what its score needs, and nothing else."""
    given = {
        "teacher": lambda: told["teacher"],
        "encoder": lambda: prepare_encoder(recipe, "robust", seed, once, real),
        "real": lambda: _images(recipe, real),
    }
    spec = recipe.with_threat_everywhere().selection
    return once(select, spec, told["synthetic"], told["labelled"], *(given[name]() for name in spec.needs))


def check_plan(recipe: Recipe, arms: Collection[Arm], real: ImageSet | None = None) -> None:
    """Raises UserError for networks and numbers that the data cannot be used with, before any stage is made.

    Only what these arms use is looked at.
    """
    real, generation = _images(recipe, real), recipe.generation
    classes = len(real.class_names)
    for spec in (recipe.teacher.network, recipe.student.network):
        check_network(spec, real)
    own = recipe.denoiser if isinstance(recipe.denoiser, DenoiserTraining) else None
    if own and {Arm.PLAIN, Arm.GUIDED} & set(arms):
        own.network.check(real.shape)
    if Arm.GUIDED in arms and recipe.encoder == "noise-conditioned":
        recipe.noisy_encoder.network.check(real.shape)
    if own and Arm.GUIDED in arms and isinstance(generation.guidance, Contrastive):
        generation.check_real(real, classes if own.conditional else 0)


def diffuse(recipe: Recipe, arm: Arm, seed: int, once: Once, real: ImageSet | None = None) -> dict[str, Artifact]:
    """Plain or guided images from the denoiser, the same noise for both; with what they were made of."""
    real = _images(recipe, real)
    networks = prepare_networks(recipe, arm, seed, once, real)
    spec = recipe.generation if arm is Arm.GUIDED else replace(recipe.generation, guidance=None)
    inputs = [networks.get(role) for role in ("denoiser", "encoder", "embedding")]
    return networks | {"synthetic": once(generate, spec, real, *inputs, seed=seed)}


def prepare_networks(
    recipe: Recipe, arm: Arm, seed: int, once: Once, real: ImageSet | None = None
) -> dict[str, Artifact]:
    """The denoiser; for guidance its encoder too, and the embedding fitted for it."""
    recipe, real = recipe.with_threat_everywhere(), _images(recipe, real)
    networks = {"denoiser": prepare_denoiser(recipe, seed, once, real)}
    guidance = recipe.generation.guidance
    if arm is Arm.GUIDED and guidance is not None:
        networks["encoder"] = prepare_encoder(recipe, recipe.encoder, seed, once, real)
        if isinstance(guidance, Contrastive) and isinstance(guidance.embedding, FittedEmbedding):
            inputs = networks["denoiser"], networks["encoder"]
            networks["embedding"] = once(fit_embedding, recipe.generation.warm_up, real, *inputs, seed=seed)
    return networks


def prepare_denoiser(recipe: Recipe, seed: int, once: Once, real: ImageSet | None = None) -> Artifact:
    """The diffusion model, trained here or read from elsewhere: the longest stage that arms share."""
    real = _images(recipe, real)
    if isinstance(recipe.denoiser, ForeignDenoiser):
        made = once(import_denoiser, recipe.denoiser.reading, recipe.denoiser.source)
        denoiser = load_denoiser(made.file("denoiser.safetensors"))
        check_fit(denoiser.shape, denoiser.classes, real)
        recipe.check_classes(denoiser.classes)
        recipe.generation.check_denoiser(denoiser)
        return made
    own = recipe.denoiser.seed
    return once(train_denoiser, recipe.denoiser, real, seed=seed if own is None else own)


def prepare_encoder(recipe: Recipe, kind: EncoderKind, seed: int, once: Once, real: ImageSet | None = None) -> Artifact:
    """The classifier whose features steer guidance: robust (the real-only student), standard, or noise-conditioned."""
    recipe, real = recipe.with_threat_everywhere(), _images(recipe, real)
    if kind == "noise-conditioned":
        return once(train_noise_conditioned, recipe.noisy_encoder, real, seed=seed)
    return once(train_classifier, recipe.student if kind == "robust" else recipe.teacher, real, None, seed=seed)
