"""Documentation that keeps its word: every command of README.md and docs/ is known; `make slow` runs each, page by
page, in a folder of its own, with small networks and few steps where the page means hours.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import PIPE, STDOUT

import nbformat
import numpy as np
import pytest
import torch
from docs_commands import PROGRAMS, ROOT, Item, fault, fields_of, items, mentions, own_names, short_options
from PIL import Image

from gambeson import overrides, table_command
from gambeson.cli import COMMANDS, main
from gambeson.models.classifiers import classifier_header
from gambeson.models.export import save_robustbench
from gambeson.models.files import save_tensors
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.recipe import Arm
from gambeson.recipes import named
from gambeson.run import execute

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)

# --- fast: everything that a page names is there -----------------------------------------------------------------


@page
def test_every_command_of_a_page_is_known(path: Path) -> None:
    """Programs, commands, files, targets and options; in blocks and in the prose."""
    found = [item for item in items(path) if item.kind == "command"]
    strange = [f"line {i.line}: {i.text}" for i in found if not i.words or i.words[0] not in PROGRAMS]
    assert not strange, f"a ```bash block may hold {', '.join(PROGRAMS)} alone; use ```text for what is not run"
    own = own_names(path)  # components that the page has its reader write: nobody knows them before it is run
    known = [item for item in [*found, *mentions(path)] if not own & set(item.words)]
    faults = [(item, said) for item in known if (said := fault(item))]
    assert not faults, "\n".join(f"{path.name}:{item.line}: {item.text}\n    {said}" for item, said in faults)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("gambeson rum digits", "unknown command rum"),
        ("gambeson run digits --generation.cuont 3", "generation.cuont"),
        ("gambeson run digits --generation.sampler Hoin", "Hoin"),
        ("gambeson evaluate m --data digits --imagess 3", "imagess"),
        ("gambeson store stats x --pictures 3", "takes no fields"),
        ("gambeson select s --labels l --score Sharp --out o", "Sharp"),
        ("make demos", "demos"),
        ("python benchmarks/selection.py --sedes 3", "--sedes"),
        ("python benchmarks/nothing.py", "no such file"),
        ("torchrun --nproc-per-node 8 -m gambeson train --data cifar10 --presett irgd", "presett"),
        ("ls -l", "unknown program"),
    ],
)
def test_commands_that_do_not_exist_are_found(command: str, said: str) -> None:
    assert said in fault(Item("command", 1, command))


def test_blocks_are_read_as_a_reader_would(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "text `gambeson runs`\n```bash\n# first\n$ gambeson run digits \\\n    --seeds 3   # five\npython - <<'END'\n"
        "print('x')\nEND\n```\n"
        '```python\nx = 1\n```\n```python title="a/b.py"\ny = 2\n```\n```text\ngambeson x\n```\n'
        "    .venv/bin/gambeson --help      # said\n    something else\n"
    )
    found = items(tmp_path / "page.md")
    assert [(i.kind, i.line) for i in found] == [
        ("command", 4),
        ("command", 6),
        ("python", 11),
        ("file", 14),
        ("command", 19),
    ]
    assert found[0].words == ["gambeson", "run", "digits", "--seeds", "3"]
    assert found[1].text == "python - <<'END'\nprint('x')\nEND"
    assert found[4].words == ["gambeson", "--help"]
    assert [i.text for i in mentions(tmp_path / "page.md")] == ["gambeson runs"]


def test_every_command_of_gambeson_is_explained() -> None:
    """A command that no page shows is one that nobody finds."""
    shown = {i.words[1] for path in PAGES for i in items(path) if i.kind == "command" and i.words[0] == "gambeson"}
    assert set(COMMANDS) <= shown


# --- slow: everything is run -------------------------------------------------------------------------------------

FITTED = (
    "--{0}.optimisation.steps 8 --{0}.optimisation.batch_size 16 --{0}.network.width 4"
    " --{0}.validations 1 --{0}.validation_steps 2"
)
ASSESSED = (
    "--assessment.images 6 --assessment.autoattack.steps 3 --assessment.autoattack.queries 20"
    " --assessment.autoattack.targets 2"
)
TINY = " ".join(
    [
        "--data.train_images 60 --data.validation_images 1600",
        FITTED.format("teacher"),
        FITTED.format("student"),
        "--student.loss.steps 2 --noisy_encoder.optimisation.steps 8 --noisy_encoder.network.width 8",
        "--denoiser.optimisation.steps 20 --denoiser.network.width 8",
        "--generation.count 60 --generation.block 20 --generation.levels.steps 8 --control.count 60 --control.block 20",
        "--generation.warm_up.blocks 1",
        "--evaluation.pgd.steps 2 --evaluation.pgd.restarts 1 --evaluation.apgd.steps 3 --evaluation.targeted.steps 2",
        "--evaluation.targeted.targets 2 --evaluation.curve 0.1 --evaluation.curve_attack.steps 2",
        "--evaluation.curve_images 20 --evaluation.check_images 20",
        ASSESSED,
    ]
)
"""Fields that make any recipe a matter of seconds; what a command sets itself, or has not, is left out."""
TRAINED = (
    FITTED.format("classifier")
    + " --classifier.network ResNetSpec --classifier.loss.steps 2 --classifier.loss.loss.steps 2"
)
PASSES = TRAINED.replace("--classifier.optimisation.steps 8", "")
ATTACKED = "--images 6 --quick --assessment.autoattack.queries 20 --assessment.autoattack.steps 3"
"""The same for trainings and evaluations."""


@dataclass(frozen=True)
class Smoke:
    """How commands that match are run in a test: words put behind them, words replaced, or why they are not run."""

    pattern: str
    extra: str = ""
    instead: dict[str, str] = field(default_factory=dict)
    unrun: str = ""  # why it cannot be run here; its program, command and options are checked all the same
    until: str = ""  # a command that goes on: what it prints when it is ready; then it is stopped by Ctrl-C


HOURS, SETS_UP = "hours; `make bench` and benchmarks/results", "sets up the environment that this runs in"
STORE, TEACHER = "runs/stages/generate/...", "runs/stages/train_classifier/..."
ENTRY = "Rebuffi2021Fixing_28_10_cutmix_ddpm"
MADE = {"synthetic": "guided-store", "2000": "20"}
OWN = "--student.loss TRADES --teacher.loss Plain"
SMOKES = [
    Smoke(r"^make (demo|test|docs|check|slow|bench)", unrun=SETS_UP),
    Smoke(r"^pip ", unrun="the network"),
    Smoke(r"^python benchmarks/", unrun=HOURS),
    Smoke(r"^python -m pytest tests/test_", extra="-q -p no:xdist -p no:cacheprovider -o addopts="),
    Smoke(r"data get ", unrun="the network"),
    Smoke(r"--runs (s3|gs)://", unrun="a bucket; tests/test_mirror.py runs in one"),
    Smoke(r"--address ", unrun="a cluster of other machines; tests/test_cluster.py starts one"),
    Smoke(r"data show \./my-images", instead={"32": "8"}),
    Smoke(r"run (cifar10|gtsrb)\S* .*--dry-run", unrun="the data set is not here"),
    Smoke(r"run cifar10 --device", unrun="a GPU and the data set"),
    Smoke(
        r"train --data \./my-images --data.size 32",
        TRAINED + " --data.grey true",
        {"32": "8", "runs/.../images": "guided-store"},
    ),
    Smoke(r"run \./my-images.*--print-recipe", "--data.size 8", {"8": "1"}),
    Smoke(r"run \./my-images", f"{OWN} {TINY} --data.size 8", {"120": "1", "8": "1"}),
    Smoke(r"run runs/", ASSESSED, {"3": "2"}),  # small already
    Smoke(r"run digits", TINY, {"8000": "80", "5": "2", "3": "2", "4": "2"}),
    Smoke(r"(train-diffusion|train-encoder|sample-grid|generate) digits($| )", TINY, MADE),
    Smoke(r"(generate|sample-grid) digits.safetensors", "--generation.count 20 --generation.block 10"),
    Smoke(
        r"(generate|sample-grid) ema_cifar10.ckpt",
        "--denoiser.image_size 32 --generation.levels TimestepLevels --generation.levels.steps 6"
        " --generation.count 4 --generation.block 4",
        {"50000": "4", "512": "4", "20": "6"},
    ),
    Smoke(
        r"^gambeson table (?!.*--plan)", unrun="many runs of the whole recipe; tests/test_tables.py makes small ones"
    ),
    Smoke(
        r"python dev/comparisons.py", unrun="writes the page it stands on, and README, from the rows in the repository"
    ),
    Smoke(r"theory --features", f"--trials 40 --sweep-trials 20 --no-figures {TINY}"),
    Smoke(r"theory", "--trials 40 --sweep-trials 20 --no-figures"),
    Smoke(r"figures figure-1"),
    Smoke(r"figures ", "--seeds 2 --images 8"),
    Smoke(r"label ", "", {STORE: "guided-store", TEACHER: "robust", "cifar10": "real.npz"}),
    Smoke(r"select ", "", {STORE: "guided-store", "...": "robust"}),
    Smoke(r"store (stats|export) runs", "", {STORE: "first-store"}),
    Smoke(r"quality imported", "--measures kid", {"cifar10": "real.npz", "10000": "60"}),
    Smoke(r"quality ", "--limit 60 --measures.arc.epsilons 0 0.05", {"800": "60", "150": "4", "200": "4"}),
    Smoke(r" train .*--synthetic best --out robust", TRAINED, {"robust": "robust-2"}),
    Smoke(r" train .*--preset irgd", TRAINED + " --classifier.real_repeats 1", {"cifar10": "real.npz", "cuda": "cpu"}),
    Smoke(r" train .*--epochs", PASSES, {"cifar10": "real.npz", "2": "0.001"}),
    Smoke(r" train ", TRAINED, {"cifar10": "real.npz", "DIR": "data", "cuda": "cpu", "200": "8"}),
    Smoke(r"certify ", "", {"10000": "50", "100": "4", "runs/models/...": "robust"}),
    Smoke(r"evaluate \S+ --zoo", ATTACKED, {"cifar10": "real.npz", "cuda": "cpu", ENTRY: "WRN-10-1"}),
    Smoke(r"evaluate ", ATTACKED, {"cifar10": "real.npz", "cuda": "cpu", "100": "6", "runs/models/...": "robust"}),
    Smoke(r"export runs/models", "", {"runs/models/...": "wrn.safetensors", "model.pt": "exported.pt"}),
    Smoke(r"gambeson try", "--no-browser", {"CLASSIFIER": "robust"}, until=r"http://127\.0\.0\.1:\d+"),
    Smoke(r"gambeson watch", "--once", {"RUN": "runs/digits-..."}),
    Smoke(r"(show|report) RUN", "", {"RUN": "runs/digits-..."}),
    Smoke(r"compare RUN OTHER-RUN", "", {"RUN": "runs/digits-...", "OTHER-RUN": "runs/more-..."}),
]


def smoke_of(text: str) -> Smoke:
    """The first entry that matches; none: it is run as it stands."""
    return next((smoke for smoke in SMOKES if re.search(smoke.pattern, text)), Smoke(""))


def with_extra(words: list[str], extra: str) -> list[str]:
    """The words and those options of `extra` that the command has and that are not among them."""
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    added = re.findall(r"--?\S+(?: (?!-)\S+)*", extra)
    new = [option.split() for option in added if option.split()[0] not in given]
    if words[0] != "gambeson":
        return words + [word for option in new for word in option]
    known = fields_of([*words, *(w for o in new for w in o if o[0].count(".") <= 1 and o[1:2] and o[1][0].isupper())])
    command = words[1]
    return words + [w for o in new if o[0][2:] in known or o[0] in short_options(command) for w in o]


@dataclass
class Reader:
    """Somebody who follows a page in a folder of their own."""

    folder: Path
    house: Path  # the repository, or a copy of it that the page edits
    names: dict[str, object] = field(default_factory=dict)  # what the page's Python snippets have defined

    def follow(self, item: Item) -> None:
        """Does what the item says. AssertionError where it does not work."""
        getattr(self, f"_{item.kind}")(item)

    def _file(self, item: Item) -> None:
        path = (self.house if item.title.startswith(("gambeson/", "tests/")) else self.folder) / item.title
        assert not path.exists(), f"{item.title} is there already"
        path.write_text(item.text, encoding="utf-8")

    def _diff(self, item: Item) -> None:
        """Each hunk's context and removed lines stand in the file once."""
        path = self.house / item.title
        text = path.read_text(encoding="utf-8")
        for hunk in re.split(r"^@@.*\n", item.text, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert text.count(old) == 1, f"{item.title}: expected once, found {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")

    def _python(self, item: Item) -> None:
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            text = re.sub(r"runs/[\w-]*0123456789", lambda found: self._said(found[0]), item.text)
            exec(compile(text, f"line {item.line}", "exec"), self.names)
        finally:
            os.chdir(before)

    def _command(self, item: Item) -> None:
        smoke = smoke_of(item.text)
        if smoke.unrun:
            assert not fault(item)
            return
        words = item.words
        if words[0] == "torchrun":  # alone: tests/test_train.py has several processes
            words = words[words.index("gambeson") :]
        words = with_extra([self._said(smoke.instead.get(w, w)) for w in words], smoke.extra)
        if smoke.until:
            self.interrupt(words, smoke.until)
            return
        script = item.text.partition("\n")[2].rpartition("\n")[0] or None
        self.call([w for w in words if w != "<<END"], script)

    def _said(self, word: str) -> str:
        """A word with what a page cannot know filled in: `runs/my-images-0123456789`, `.../...`."""
        if not re.search(r"0123456789|\.\.\.", word):
            return word
        found = sorted(self.folder.glob(re.sub(r"0123456789|\.\.\.", "*", word)))
        assert found, f"nothing here is {word}"
        return str(found[-1].relative_to(self.folder))

    def call(self, words: list[str], script: str | None = None) -> None:
        """Runs a program that must succeed."""
        program, *rest = words
        if program == "gambeson":
            rest = [*rest, *(["--workers", "1"] * self._one_worker(rest))]
            if self.house == ROOT:
                assert self._here(rest) == 0, " ".join(words)
                return
            rest = ["-m", "gambeson", *rest]
        inside = self.house if rest[:2] == ["-m", "pytest"] else self.folder
        env = {**os.environ, "PYTHONPATH": str(self.house), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *rest]
        done = subprocess.run(command, cwd=inside, env=env, input=script, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def interrupt(self, words: list[str], until: str) -> None:
        """Starts a program that goes on, waits for what it prints, and stops it as a user does."""
        env = {**os.environ, "PYTHONPATH": str(self.house), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", *words]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=env,
            stdout=PIPE,
            stderr=STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's `&`
        )
        assert process.stdout is not None
        told = ""
        for line in process.stdout:
            told += line
            if re.search(until, line):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130), told
        assert re.search(until, told), told

    def _here(self, words: list[str]) -> int:
        """The exit code of a command in this process, which spares the import of torch."""
        before, told = Path.cwd(), dict(os.environ)
        os.chdir(self.folder)
        try:
            return main(words)
        except SystemExit as left:  # a recipe's --help
            return int(left.code or 0)
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(told)

    def _one_worker(self, words: list[str]) -> bool:
        return words[0] in COMMANDS and "--workers" in short_options(words[0]) and "--workers" not in words


@page
@pytest.mark.slow
def test_every_command_of_a_page_runs(path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = items(path)
    edits = any(item.kind == "diff" for item in found)
    reader = Reader(tmp_path, copy_of_the_house(tmp_path / "house") if edits else ROOT)
    stages = tmp_path_factory.getbasetemp() / "docs-stages"  # shared: made once for all pages
    stages.mkdir(exist_ok=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "stages").symlink_to(stages)
    FIXTURES.get(path.stem, lambda folder: None)(tmp_path)
    for item in found:
        print(f"{path.name}:{item.line}: {item.kind} {item.title or item.text.splitlines()[0]}", flush=True)
        reader.follow(item)


def copy_of_the_house(place: Path) -> Path:
    """Package and tests, to be edited."""
    for name in ("gambeson", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


class Quiet:
    """A screen that shows nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *words, **more: None


def pictures(place: Path, classes: int = 10, each: int = 14, side: int = 12) -> None:
    """Class folders of noisy pictures, named as digits are, each class a grey level of its own."""
    draw = np.random.default_rng(0)
    for k in range(classes):
        (place / f"{k}").mkdir(parents=True)
        for i in range(each):
            pixels = np.clip(20 * k + 20 + draw.integers(0, 40, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{k}" / f"{i}.png")


def arrays(path: Path, names: tuple[str, str], count: int = 200, shape: tuple[int, ...] = (32, 32, 3)) -> None:
    """An .npz of noise in ten classes under these names."""
    images = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
    np.savez(path, **{names[0]: images, names[1]: np.arange(count) % 10})


def split(path: Path, shape: tuple[int, ...] = (32, 32, 3)) -> None:
    """An .npz of train and test images."""
    draw = np.random.default_rng(1)
    parts = {f"x_{p}": draw.integers(0, 256, (n, *shape), dtype=np.uint8) for p, n in (("train", 120), ("test", 20))}
    np.savez(path, **parts, y_train=np.arange(120) % 10, y_test=np.arange(20) % 10)


def network(path: Path, channels: int = 3, side: int = 32) -> None:
    """A classifier of ours that was never trained."""
    model = WideResNetSpec(depth=10, width=1).build(channels, 10, 0)
    save_tensors(path, model.state_dict(), classifier_header(model, (channels, side, side)))


def diffusion(folder: Path) -> None:
    """A DDIM checkpoint of 32x32 images, and a folder of diffusers of 8x8 ones."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from gambeson.models.ddim_unet import DDIMUNetSpec

    torch.save(DDIMUNetSpec(width=32).build(3, 0).state_dict(), folder / "ema_cifar10.ckpt")
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "my-pipeline")


def zoo(path: Path) -> None:
    """A checkpoint as RobustBench's zoo keeps them, of a small network."""
    save_robustbench(WideResNetSpec(depth=10, width=1).build(3, 10, 0), path)


def trained(folder: Path) -> None:
    """`robust`, a folder of `gambeson train` on digits."""
    words = f"train --data digits --threat linf:0.15 --out {folder / 'robust'} --runs {folder / 'runs'} --workers 1"
    assert main(with_extra(["gambeson", *words.split()], TRAINED)[1:]) == 0


def finished(folder: Path) -> None:
    """Two runs of digits, `digits-...` and `more-...`."""
    words = with_extra(["gambeson", "run", "digits"], TINY)[3:]
    small = replace(overrides.parse(named("digits"), words, "digits"), arms=(Arm.REAL, Arm.PLAIN))
    for name, seeds in (("digits", 1), ("more", 2)):
        execute(replace(small, name=name, seeds=seeds), folder / "runs", 1, Quiet(), "test")


def for_readme(folder: Path) -> None:
    trained(folder)
    finished(folder)
    pictures(folder / "my-images")


def for_tour(folder: Path) -> None:
    trained(folder)
    finished(folder)
    pictures(folder / "my-images")
    arrays(folder / "1m.npz", ("image", "label"))
    split(folder / "real.npz")
    split(folder / "test.npz", (8, 8, 1))
    network(folder / "wrn.safetensors")
    diffusion(folder)
    zoo(folder / "model.pt")
    (folder / "their_code.py").write_text(
        "from torch import nn\ndef model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()\n"
    )
    first = f"generate digits --generation.guidance none --out {folder / 'first-store'} --runs {folder / 'runs'}"
    assert main(with_extra(["gambeson", *first.split(), "--workers", "1"], TINY)[1:]) == 0


def for_edm_at(folder: Path) -> None:
    arrays(folder / "1m.npz", ("image", "label"))
    split(folder / "real.npz")


def for_evaluate(folder: Path) -> None:
    trained(folder)
    zoo(folder / "zoo.pt")
    network(folder / "wide.safetensors")
    split(folder / "test.npz")


def for_scale(folder: Path) -> None:
    (folder / "robust").mkdir()
    network(folder / "robust" / "classifier.safetensors")
    split(folder / "real.npz")


FIXTURES: dict[str, Callable[[Path], None]] = {
    "README": for_readme,
    "diffusion-model": diffusion,
    "edm-at": for_edm_at,
    "evaluate": for_evaluate,
    "report": finished,
    "scale": for_scale,
    "tour": for_tour,
}


# --- the notebook and the site -----------------------------------------------------------------------------------

NOTEBOOK = ROOT / "docs" / "notebooks" / "guiding-moons.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_the_notebook_runs() -> None:
    """Its last cell checks what its text says; its figures have alternative texts."""
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(ROOT)}}).execute()
    drawn = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(drawn) == 2
    assert all(output.metadata["alt"] for output in drawn)


def test_what_the_pages_point_to_is_there() -> None:
    """Files of the repository, and entries of the log, that a page gives as evidence."""
    log = (ROOT / "dev" / "LOG.md").read_text(encoding="utf-8")
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"`((?:tests|dev|benchmarks|gambeson|docs)/[\w./-]+)`", text)
        gone = [n for n in named if not (ROOT / n).exists() and f'title="{n}"' not in text and "timings" not in n]
        assert not gone, f"{path.name}: {gone}"
        titles = re.findall(r'LOG (\d{4}-\d\d-\d\d), "([^"]+)"', text)
        assert not [t for t in titles if not re.search(f"## {t[0]}: .*{re.escape(t[1].rstrip('?'))}", log)], path.name


TABLES = sorted((ROOT / "benchmarks/results/tables").glob("*/table.json"))


@pytest.mark.parametrize("kept", TABLES, ids=lambda path: path.parent.name)
def test_a_kept_table_is_of_the_recipe_that_its_command_names(kept: Path) -> None:
    """A recipe that changes makes its old tables another command's; the page shows each as it is kept."""
    facts = json.loads(kept.read_text())["facts"]
    words = shlex.split(facts["command"])
    assert words[:2] == ["gambeson", "table"]
    assert table_command.read(words[2:], facts["command"]).base.digest == facts["base_digest"]
    shown = (ROOT / "docs/comparisons.md").read_text().split(f"<!-- {kept.parent.name} -->")
    assert len(shown) == 2
    of_it = shown[1].partition("<!-- end -->")[0]
    rows = [line for line in kept.with_name("table.md").read_text().splitlines() if line.startswith("|")]
    assert rows
    assert [line for line in of_it.splitlines() if line.startswith("|")] == rows


@pytest.mark.slow
def test_the_site_is_built_and_its_links_hold(tmp_path: Path) -> None:
    """As `make docs` does: strict, without a network, nothing loaded from outside."""
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    checked = subprocess.run(
        [sys.executable, "docs/tools/links.py", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert (tmp_path / "site" / "api" / "sampling.html").read_text().count("doc-heading") > 50


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top">x</h1><a href="b.html">1</a><a href="a.html#top">2</a><a href="#gone">3</a><a href="/b">4</a>'
        '<img src="c.png"><script src="https://cdn.example/x.js"></script><a href="https://example.org">5</a>'
    )
    (tmp_path / "s.css").write_text("@import 'https://fonts.example/f.css'; a { background: url(data:x) }")
    words = [sys.executable, str(ROOT / "docs/tools/links.py"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    for said in ("b.html", "#gone", "absolute", "c.png", "cdn.example", "fonts.example", "7 links, 6 broken"):
        assert said in done.stdout + done.stderr
    assert "a.html#top" not in done.stderr
