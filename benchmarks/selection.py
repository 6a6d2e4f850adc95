"""Which synthetic images are worth keeping, and which measure tells before training? Evidence, of small sets.

The number matters because every paper recommends another rule, each on a pool, a number of images and a training of its
own. Here they share all three. 300 real digits (8x8), no crop (where synthetic images help, dev/LOG.md), linf .15; for
each seed a denoiser, a teacher and a pool of 6,000 plain images of its own. Arms, each a student trained as all others:

  selectors     a quarter of the pool (150 of each class) by every rule; random is the rule to beat, real the floor
  irgd          the share of Gaussian samples, of mixup and of plain images in each batch swept (IRGD's experiment)
  generation    classes by condition, against an unconditional denoiser whose images the teacher labels (EDM-AT)

    python benchmarks/selection.py [--base digits|cifar10-16] [--seeds 3] [--runs DIR] [--workers 1] [--only ARM ...]

Robust accuracy: worst case of APGD-CE and APGD at the 3 likeliest other classes (50 steps), on 600 validation images,
which the measures are correlated with, and on 897 test images, which nothing is chosen by. Every student is a stage of
the runs folder: a stopped run goes on. The last line is one JSON object.

--base cifar10-16: that recipe's images, students and threat as they are, 4,000 images in a pool, 100 of each class
kept, 500 validation and 1,000 test images; --denoiser FILE: weights of a diffusion model in place of its training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import rankdata

from gambeson.data.datasets import ImageSet, Split
from gambeson.data.mixture import from_uint8
from gambeson.data.npz import NpzImages
from gambeson.data.synthetic import Chosen, SyntheticStore
from gambeson.disk import atomic, checksum, read_json, write_json
from gambeson.engine import Job, run_jobs
from gambeson.machine import execution, versions
from gambeson.models.classifiers import load_classifier
from gambeson.pipeline import Once, diffuse, prepare_encoder
from gambeson.quality.assess import Material, assess
from gambeson.quality.contrast import AdversarialContrast
from gambeson.quality.discriminator import Discrimination
from gambeson.quality.features import Embedding
from gambeson.quality.space import Penultimate
from gambeson.quality.table import Measures
from gambeson.quality.train_on_synthetic import TrainOnSynthetic
from gambeson.quality.transfer import RobustnessTransfer
from gambeson.recipe import Arm, Recipe, fill_threat
from gambeson.recipes import named
from gambeson.report.statistics import mean_accuracy, paired_difference
from gambeson.robustness.attacks import APGD, PGD, TargetedAPGD
from gambeson.robustness.losses import TRADES
from gambeson.robustness.subjects import Ours
from gambeson.robustness.verdicts import robust_after
from gambeson.store import Artifact, Workspace, stage
from gambeson.synthesis.gaussian import gaussian_control
from gambeson.synthesis.label import ByTeacher, label
from gambeson.synthesis.mixup import MixupControl, mixup_control
from gambeson.synthesis.scorers import (
    CentroidMargin,
    Confidence,
    Discriminator,
    Entropy,
    InputGradientNorm,
    LabelMargin,
    LastLayerGradientNorm,
    OwnCentroid,
    ParameterGradientNorm,
    Random,
    RobustGradientNorm,
    Scorers,
    Separability,
)
from gambeson.synthesis.select import Selection, select
from gambeson.tables.cells import changed
from gambeson.training.classifier import train_classifier
from gambeson.training.diffusion import DenoiserTraining
from gambeson.training.foreign import ForeignDenoiser
from gambeson.training.loop import Optimisation


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all arms share: a recipe by name and its numbers here."""

    name: str = "digits"
    denoiser: str = ""  # weights of a diffusion model in place of the recipe's own; none: trained as the recipe says
    pool: int = 6000  # images of a pool
    kept: int = 150  # of each class
    discriminator: float = 0.1  # linf radius that PORT's discriminators withstand
    step_size: float | None = 0.0375  # of the attack whose gradients are scored; none: in proportion to epsilon


BASES = {
    "digits": Base(),
    "cifar10-16": Base(name="cifar10-16", pool=4000, kept=100, discriminator=2 / 255, step_size=None),
}
base = Base()


def use(chosen: Base) -> None:
    """Takes another base, in this process."""
    global base
    base = chosen


def scorers() -> dict[str, Scorers]:
    """Every rule with the networks of the recipe; of PORT's one small discriminator for each half of the pool."""
    told_apart = Discrimination(epsilon=base.discriminator, optimisation=Optimisation(steps=200))
    return {
        "random": Random(),
        "confidence": Confidence(),
        "entropy": Entropy(),
        "margin": LabelMargin(),
        "separability": Separability(),
        "own centroid": OwnCentroid(),
        "centroid margin": CentroidMargin(),
        "last layer's gradient": LastLayerGradientNorm(),
        "parameters' gradient": ParameterGradientNorm(),
        "input's gradient": InputGradientNorm(),
        "robust gradient": RobustGradientNorm(loss=TRADES(beta=5.0, steps=10, step_size=base.step_size)),
        "discriminator": Discriminator(discrimination=told_apart),
    }


def recipe(conditional: bool = True) -> Recipe:
    """The base recipe with a pool of plain images; digits with the diffusion model of 2,000 steps (it copies)."""
    found = replace(named(base.name), name="selection")
    generation, control = (
        replace(found.generation, count=base.pool, guidance=None),
        replace(found.control, count=base.pool),
    )
    found = replace(found, generation=generation, control=control)
    if base.name == "digits":
        found = changed(found, {"denoiser.optimisation.steps": 2000})
    else:
        assert isinstance(found.data, NpzImages)
        found = replace(found, data=replace(found.data, test_images=1000))
    if base.denoiser:
        found = replace(found, denoiser=ForeignDenoiser(path=base.denoiser))
    if not conditional:
        assert isinstance(found.denoiser, DenoiserTraining)
        denoiser = replace(found.denoiser, conditional=False)
        found = replace(found, denoiser=denoiser, labeling=replace(found.labeling, by=ByTeacher()))
    return found.with_threat_everywhere()


@dataclass(frozen=True, kw_only=True)
class Judging:
    """The attacks of a student's measurement, the same on validation and test images."""

    apgd: APGD = APGD(steps=50)  # on cross-entropy
    targeted: TargetedAPGD = TargetedAPGD(steps=50, targets=3)  # on what that left


@stage(revision=1, reads_test=True)
def judge(work: Workspace, spec: Judging, student: Artifact, real: ImageSet, *, seed: int) -> None:
    """Writes rows.parquet: part, clean and robust verdict of every validation and test image."""
    model, tables = load_classifier(student.file("classifier.safetensors")), []
    for name, part in (("validation", real.validation), ("test", real.test)):
        robust = _stands(spec, model, part, seed)
        with torch.no_grad():
            clean = torch.cat([model(x).argmax(1) for x in part.images.split(256)]) == part.labels
        columns = {"part": [name] * len(part), "clean": clean.numpy(), "robust": robust.numpy()}
        tables.append(pa.table(columns))
    with atomic(work.folder / "rows.parquet") as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)


def _stands(spec: Judging, model: Any, part: Split, seed: int) -> torch.Tensor:
    robust = robust_after(spec.apgd, model, part.images, part.labels, 256, seed)
    left = robust.nonzero()[:, 0]
    if len(left):
        robust[left] = robust_after(spec.targeted, model, part.images[left], part.labels[left], 256, seed)
    return robust


Source = Callable[[int, Once], "Artifact | Chosen | None"]
"""(seed, once) -> the synthetic images of an arm."""


@dataclass(frozen=True)
class Setting:
    """One arm: where its synthetic images come from and what share of each batch they are."""

    group: str
    source: Source
    fraction: float = 0.7


def _all_of(made: Artifact, labelled: Artifact, out: Path) -> Chosen:
    """The selection of every image with the label it was given."""
    if not out.is_file():
        labels = pq.read_table(labelled.file("labels.parquet"), columns=["label"])["label"].to_numpy()
        Chosen.write(out, SyntheticStore.open(made.folder / "images"), np.arange(len(labels)), labels)
    return Chosen.open(out)


def _told(conditional: bool, seed: int, once: Once) -> dict[str, Artifact]:
    """The pool with its labels, and the classifiers that select."""
    asked = recipe(conditional)
    told = diffuse(asked, Arm.PLAIN, seed, once)
    told["teacher"] = prepare_encoder(asked, "standard", seed, once)
    told["encoder"] = prepare_encoder(asked, "robust", seed, once)
    told["labelled"] = once(label, asked.labeling, told["synthetic"], told["teacher"])
    return told


def nothing(seed: int, once: Once) -> None:
    """Real images alone."""


def whole_pool(conditional: bool) -> Source:
    """All plain images."""

    def source(seed: int, once: Once) -> Chosen:
        told = _told(conditional, seed, once)
        return _all_of(told["synthetic"], told["labelled"], told["labelled"].folder / ".all" / "chosen.parquet")

    return source


def selected(score: Scorers) -> Source:
    """The best of each class by a rule."""

    def source(seed: int, once: Once) -> Artifact:
        told, real = _told(True, seed, once), recipe().data.load()
        spec = fill_threat(Selection(score=score, per_class=base.kept), recipe().threat)
        given = [real if name == "real" else told[name] for name in spec.needs]
        return once(select, spec, told["synthetic"], told["labelled"], *given)

    return source


def control(kind: str) -> Source:
    """Gaussian samples or mixup, labelled by the teacher as IRGD's are."""

    def source(seed: int, once: Once) -> Chosen:
        asked = recipe()
        real, teacher = asked.data.load(), prepare_encoder(asked, "standard", seed, once)
        if kind == "gaussian":
            made = once(gaussian_control, asked.control, real, seed=seed)
        else:
            made = once(mixup_control, MixupControl(count=base.pool), real, seed=seed)
        labelled = once(label, replace(asked.labeling, by=ByTeacher()), made, teacher)
        return _all_of(made, labelled, labelled.folder / ".all" / "chosen.parquet")

    return source


def settings() -> dict[str, Setting]:
    """Every arm by name."""
    found = {"real": Setting("selectors", nothing), "all": Setting("selectors", whole_pool(True))}
    found |= {name: Setting("selectors", selected(score)) for name, score in scorers().items()}
    if not base.denoiser:
        found["unconditional"] = Setting("generation", whole_pool(False))
    for kind, fractions in (("gaussian", (0.3, 0.7, 0.9)), ("mixup", (0.3, 0.7))):
        for fraction in fractions:
            found[f"{kind} {fraction:g}"] = Setting("irgd", control(kind), fraction)
    found["plain 0.3"] = Setting("irgd", whole_pool(True), 0.3)  # 0.7 is `all`
    return found


def measure(name: str, seed: int, once: Once) -> dict[str, Any]:
    """The student of an arm, and how it stands."""
    setting, asked = settings()[name], recipe()
    real, chosen = asked.data.load(), _content(setting.source(seed, once))
    spec = replace(asked.student, fraction=setting.fraction) if chosen is not None else asked.student
    student = once(train_classifier, spec, real, chosen, seed=seed)
    rows = pq.read_table(once(judge, _judging(asked), student, real, seed=seed).file("rows.parquet"))
    verdicts = {}
    for part in ("validation", "test"):
        inside = rows.filter(pa.array(rows["part"].to_numpy(zero_copy_only=False) == part))
        verdicts[part] = {c: inside[c].to_numpy(zero_copy_only=False).tolist() for c in ("clean", "robust")}
    return {"arm": name, "seed": seed, "verdicts": verdicts}


def _content(made: Artifact | Chosen | None) -> Chosen | None:
    """A selection by its images and labels, whichever way it was made: a student is trained once for each."""
    return Chosen.open(made.file("chosen.parquet")) if isinstance(made, Artifact) else made


def _judging(asked: Recipe) -> Judging:
    apgd, targeted = Judging().apgd, Judging().targeted
    return Judging(apgd=replace(apgd, threat=asked.threat), targeted=replace(targeted, threat=asked.threat))


ORDER = ("fid", "kid", "wasserstein", "conditional_wasserstein", "precision_recall", "complementarity", "coverage")
ORDER += ("separation", "memorisation")
"""What is measured of every set that a student was trained on."""
TRAINED = ("transfer", "cas", "arc")
"""What trains or attacks networks, besides, of the sets of seed 0."""


def measures(name: str, seed: int, once: Once) -> dict[str, float]:
    """The measures of an arm's images in the teacher's feature space, beside the validation images; 1,500 of each."""
    asked = recipe()
    source = _content(settings()[name].source(seed, once))
    if source is None:
        return {}
    teacher, encoder = (prepare_encoder(asked, kind, seed, once) for kind in ("standard", "robust"))
    weights = teacher.file("classifier.safetensors")
    material = Material(
        real=asked.data.load(),
        source=source,
        space=Penultimate(load_classifier(weights), "the teacher", checksum(weights)),
        against="validation",
        embedding=Embedding(limit=base.kept * len(asked.data.load().class_names)),
        seed=seed,
        device="cpu",
        classifier=Ours(str(encoder.file("classifier.safetensors"))),
        once=once,
    )
    names = (*ORDER, *TRAINED) if seed == 0 and base.name == "digits" else ORDER
    lines = assess(material, _numbers(asked), names, named=False, begin=lambda measure: once)
    return {line.found.name: line.found.value for line in lines if line.found is not None}


def _numbers(asked: Recipe) -> Measures:
    """The measures with numbers for digits: the recipe's teacher for CAS, its threat's scale for ARC and transfer."""
    small = Discrimination(optimisation=Optimisation(steps=100))
    return Measures(
        transfer=RobustnessTransfer(threat=asked.threat, attack=PGD(steps=20)),
        arc=AdversarialContrast(discrimination=small, epsilons=(0.0, 0.15, 0.3), attack=APGD(steps=20)),
        cas=TrainOnSynthetic(training=asked.teacher, seeds=1),
    )


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """IRGD's sufficient conditions: what is asked of a set of generated images."""

    epsilon: float = 0.15  # radius of the ball in which random changes are drawn, linf
    draws: int = 10  # changes of each image
    images: int = 1500  # of the set, drawn by the seed


@stage(revision=1, reads_test=True)
def check_conditions(
    work: Workspace, spec: Conditions, chosen: Chosen, teacher: Artifact, oracle: Artifact, *, seed: int
) -> None:
    """Writes conditions.json: are labels right (to the oracle), do random changes of images flip the teacher's word?

    oracle: a classifier of all real images but the train ones, test included: it judges sets, nothing is chosen by it.
    """
    judge, model = (load_classifier(a.file("classifier.safetensors")) for a in (oracle, teacher))
    places = np.random.default_rng(seed).permutation(len(chosen))[: spec.images]
    pixels, labels = chosen.read(np.sort(places))
    images, given = from_uint8(pixels), torch.from_numpy(labels)
    draw, flipped = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        right = (judge(images).argmax(1) == given).double().mean()
        for _ in range(spec.draws):
            noise = (torch.rand(images.shape, generator=draw) * 2 - 1) * spec.epsilon
            flipped.append((model((images + noise).clamp(0, 1)).argmax(1) != given).double().mean())
    told = {"labels right": float(right), "flipped by random changes": float(torch.stack(flipped).mean())}
    write_json(work.folder / "conditions.json", told)


def conditions(name: str, seed: int, once: Once) -> dict[str, float]:
    """Of one set: the first two conditions; the third is IRGD's coverage of held-out images, among the measures."""
    asked = recipe()
    real, source = asked.data.load(), _content(settings()[name].source(seed, once))
    everything = Split(
        *(torch.cat([getattr(p, k) for p in (real.validation, real.test)]) for k in ("images", "labels"))
    )
    others = replace(real, train=everything, validation=real.train, test=real.train)
    oracle = once(train_classifier, asked.teacher, others, None, seed=7)
    teacher = prepare_encoder(asked, "standard", seed, once)
    made = once(check_conditions, Conditions(), source, teacher, oracle, seed=seed)
    return read_json(made.file("conditions.json"))


CONDITIONED = ("all", "unconditional", "gaussian 0.7", "mixup 0.7")
"""The sets whose conditions are checked."""


def student(chosen: Base, name: str, seed: int, once: Once) -> dict[str, Any]:
    """The student of an arm alone."""
    use(chosen)
    return measure(name, seed, once)


def agreement(name: str, seed: int, once: Once) -> float | None:
    """Share of a set's images whose label the teacher would give, too; None without images."""
    source = _content(settings()[name].source(seed, once))
    if source is None:
        return None
    teacher = prepare_encoder(recipe(), "standard", seed, once)
    model, right = load_classifier(teacher.file("classifier.safetensors")), 0
    for start in range(0, len(source), 500):
        pixels, labels = source.stretch(start, min(start + 500, len(source)))
        with torch.no_grad():
            right += int((model(from_uint8(pixels)).argmax(1) == torch.from_numpy(labels)).sum())
    return right / len(source)


def told(chosen: Base, name: str, seed: int, once: Once) -> dict[str, Any]:
    """Everything of one arm and seed."""
    use(chosen)
    found = measure(name, seed, once)
    found["measures"] = measures(name, seed, once)
    found["agreement"] = agreement(name, seed, once)
    found["conditions"] = conditions(name, seed, once) if name in CONDITIONED and base.name == "digits" else {}
    return found


class Lines:
    """A screen of lines: what was made."""

    def show(self, news: Any) -> None:
        if news.total == 0 and news.done and news.stage not in ("measure", "features"):
            print(f"{news.job}: {news.stage}", flush=True)


Verdicts = dict[str, np.ndarray]
"""Arm -> robust verdicts [seeds, images]."""


def stacked(found: list[dict[str, Any]], part: str, column: str) -> Verdicts:
    """The verdicts of every arm."""
    names = list(dict.fromkeys(each["arm"] for each in found))
    return {n: np.array([e["verdicts"][part][column] for e in found if e["arm"] == n]) for n in names}


def interval(low: float, high: float) -> list[float]:
    """In percent."""
    return [round(100 * low, 1), round(100 * high, 1)]


def accuracies(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every arm, in percent: clean and robust accuracy, and paired differences of the robust one (test)."""
    clean, robust = (stacked(found, "test", column) for column in ("clean", "robust"))
    chosen, rows = stacked(found, "validation", "robust"), []
    for name in robust:
        of_test = mean_accuracy(robust[name])
        shares = {"clean": clean[name], "validation": chosen[name], "test": robust[name]}
        row = {"arm": name, **{key: round(100 * float(value.mean()), 1) for key, value in shares.items()}}
        row["interval"] = interval(of_test.low, of_test.high)
        for other in ("random", "real", "all"):
            if other in robust and other != name:
                apart = paired_difference(robust[name], robust[other])
                row[f"minus {other}"] = [round(100 * apart.estimate, 1), *interval(apart.low, apart.high)]
        rows.append(row)
    return rows


def correlations(found: list[dict[str, Any]], names: list[str], seed: int = 0) -> list[dict[str, Any]]:
    """Spearman's rank correlation over these arms of each measure with robust accuracy, both means over the seeds that
    the measure was taken of (`TRAINED` of seed 0 alone).

    With that of validation images, its percentile bootstrap over arms and the p of a permutation of the arms
    (two-sided, 2,000); and that of test images, since measures and accuracy share the validation images' chance.
    """
    of_measure: dict[str, dict[str, dict[int, float]]] = {}
    for each in found:
        for key, value in each["measures"].items():
            of_measure.setdefault(key, {}).setdefault(each["arm"], {})[each["seed"]] = value
    rows = []
    for key, arms in of_measure.items():
        if all(name in arms for name in names):
            seeds = sorted(set.intersection(*(set(arms[name]) for name in names)))
            values = np.array([np.mean([arms[name][s] for s in seeds]) for name in names])
            chosen, tested = (_accuracy(found, names, seeds, part) for part in ("validation", "test"))
            told = _correlation(values, chosen, np.random.default_rng(seed))
            on_test = round(_rank(values, tested), 2) if np.ptp(values) else None
            rows.append({"measure": key, "seeds": len(seeds), **told, "rho on test": on_test})
    return rows


def _accuracy(found: list[dict[str, Any]], names: list[str], seeds: list[int], part: str) -> np.ndarray:
    """[arms] mean robust accuracy over these seeds."""
    of_arm = {(e["arm"], e["seed"]): float(np.mean(e["verdicts"][part]["robust"])) for e in found}
    return np.array([np.mean([of_arm[name, s] for s in seeds]) for name in names])


def _rank(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def _correlation(values: np.ndarray, means: np.ndarray, draw: np.random.Generator) -> dict[str, Any]:
    if np.ptp(values) == 0:
        return {"rho": None, "interval": None, "p": None}
    rho = _rank(values, means)
    shuffled = [abs(_rank(values, draw.permutation(means))) for _ in range(2000)]
    again = (draw.integers(0, len(means), len(means)) for _ in range(2000))
    boot = [_rank(values[i], means[i]) for i in again if np.ptp(values[i]) and np.ptp(means[i])]
    low, high = np.quantile(boot, [0.025, 0.975])
    p = (1 + sum(s >= abs(rho) - 1e-12 for s in shuffled)) / (1 + len(shuffled))
    return {"rho": round(rho, 2), "interval": [round(float(low), 2), round(float(high), 2)], "p": round(p, 3)}


def table(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that the last line says."""
    arms = settings()
    same = [n for n in scorers() if any(e["arm"] == n for e in found)]
    sets = [e for e in dict.fromkeys(e["arm"] for e in found) if arms[e].fraction == 0.7 and e != "real"]
    return {
        "benchmark": "selection",
        "base": asdict(base),
        "accuracies": accuracies(found),
        "same pool, same number": correlations(found, same),
        "all sets at fraction 0.7": correlations(found, sets),
        "conditions": {f"{e['arm']}, seed {e['seed']}": e["conditions"] for e in found if e["conditions"]},
        "measures": {f"{e['arm']}, seed {e['seed']}": e["measures"] for e in found},
        "agreement": {f"{e['arm']}, seed {e['seed']}": e["agreement"] for e in found},
        "execution": execution(),
        "versions": versions(),
    }


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--base", choices=list(BASES), default="digits")
    reader.add_argument("--denoiser", default="", help="weights of a diffusion model in place of the recipe's own")
    reader.add_argument("--seeds", type=int, default=3)
    reader.add_argument("--runs", type=Path, default=Path("runs-selection"))
    reader.add_argument("--workers", type=int, default=1)
    reader.add_argument("--only", nargs="*", default=None, metavar="ARM")
    reader.add_argument("--students", action="store_true", help="train and judge alone, without measures and table")
    asked = reader.parse_args()
    use(replace(BASES[asked.base], denoiser=asked.denoiser))
    names, work = asked.only or list(settings()), student if asked.students else told
    jobs = [Job(f"{name}, seed {s}", work, (base, name, s)) for s in range(asked.seeds) for name in names]
    found = run_jobs(jobs, asked.runs.resolve(), asked.workers, Lines())
    if not asked.students:
        result = table(found)
        for key in ("accuracies", "same pool, same number", "all sets at fraction 0.7"):
            print(key, *map(json.dumps, result[key]), sep="\n")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
