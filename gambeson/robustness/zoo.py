"""RobustBench in and out: the zoo's DeepMind-style checkpoints by the name of their entry, and a folder to submit.

What was checked against the zoo's own source (robustbench/model_zoo, as far as it is public up to early 2024) and what
only against descriptions of it says `Entry.checked`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gambeson.disk import atomic
from gambeson.errors import UserError, nearest, require
from gambeson.models.classifiers import filled
from gambeson.models.export import robustbench_entry, save_robustbench
from gambeson.models.network import CIFAR_MEAN, CIFAR_STD, ClassifierNetwork
from gambeson.models.pickles import DAMAGE, read_torch
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.wideresnet import WideResNet, WideResNetSpec, zoo_state_dict
from gambeson.threat import ThreatModel

CLASSES = {"cifar10": 10, "cifar100": 100}
"""The zoo's data sets that its DeepMind-style networks were trained on, and their classes."""
PIXELS = {
    10: (CIFAR_MEAN, CIFAR_STD),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Classes -> what the zoo takes off the pixels in [0, 1], and what it then divides by."""
BOARDS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""The zoo's names of threats; it keeps boards of the first two."""
PAPERS = {
    "Gowal2020Uncovering": "https://arxiv.org/abs/2010.03593",
    "Rebuffi2021Fixing": "https://arxiv.org/abs/2103.01946",
    "Gowal2021Improving": "https://arxiv.org/abs/2110.09468",
    "Rade2021Helper": "https://openreview.net/forum?id=BuD2LmNaU3a",
    "Pang2022Robustness": "https://arxiv.org/abs/2202.10103",
    "Wang2023Better": "https://arxiv.org/abs/2302.04638",
    "Xu2023Exploring": "https://arxiv.org/abs/2302.03015",
    "Cui2023Decoupled": "https://arxiv.org/abs/2305.13948",
    "Bartoldson2024Adversarial": "https://arxiv.org/abs/2404.09349",
}
"""The first word of an entry's name -> where its paper is."""
_TABLE: dict[tuple[str, str], dict[str, tuple[int, int]]] = {
    ("cifar10", "Linf"): {
        "Gowal2020Uncovering_28_10_extra": (28, 10),
        "Gowal2020Uncovering_34_20": (34, 20),
        "Gowal2020Uncovering_70_16": (70, 16),
        "Gowal2020Uncovering_70_16_extra": (70, 16),
        "Rebuffi2021Fixing_R18_ddpm": (18, 0),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": (28, 10),
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": (70, 16),
        "Rebuffi2021Fixing_70_16_cutmix_extra": (70, 16),
        "Rebuffi2021Fixing_106_16_cutmix_ddpm": (106, 16),
        "Gowal2021Improving_R18_ddpm_100m": (18, 0),
        "Gowal2021Improving_28_10_ddpm_100m": (28, 10),
        "Gowal2021Improving_70_16_ddpm_100m": (70, 16),
        "Rade2021Helper_R18_ddpm": (18, 0),
        "Rade2021Helper_R18_extra": (18, 0),
        "Rade2021Helper_ddpm": (28, 10),
        "Rade2021Helper_extra": (34, 10),
        "Pang2022Robustness_WRN28_10": (28, 10),
        "Pang2022Robustness_WRN70_16": (70, 16),
        "Wang2023Better_WRN-28-10": (28, 10),
        "Wang2023Better_WRN-70-16": (70, 16),
        "Xu2023Exploring_WRN-28-10": (28, 10),
        "Cui2023Decoupled_WRN-28-10": (28, 10),
        "Bartoldson2024Adversarial_WRN-82-8": (82, 8),
        "Bartoldson2024Adversarial_WRN-94-16": (94, 16),
    },
    ("cifar10", "L2"): {
        "Gowal2020Uncovering": (70, 16),
        "Gowal2020Uncovering_extra": (70, 16),
        "Rebuffi2021Fixing_R18_cutmix_ddpm": (18, 0),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": (28, 10),
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": (70, 16),
        "Rebuffi2021Fixing_70_16_cutmix_extra": (70, 16),
        "Rade2021Helper_R18_ddpm": (18, 0),
        "Wang2023Better_WRN-28-10": (28, 10),
        "Wang2023Better_WRN-70-16": (70, 16),
    },
    ("cifar10", "corruptions"): {
        "Rebuffi2021Fixing_70_16_cutmix_extra_Linf": (70, 16),
        "Rebuffi2021Fixing_70_16_cutmix_extra_L2": (70, 16),
    },
    ("cifar100", "Linf"): {
        "Gowal2020Uncovering": (70, 16),
        "Gowal2020Uncovering_extra": (70, 16),
        "Rebuffi2021Fixing_R18_ddpm": (18, 0),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": (28, 10),
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": (70, 16),
        "Rade2021Helper_R18_ddpm": (18, 0),
        "Pang2022Robustness_WRN28_10": (28, 10),
        "Pang2022Robustness_WRN70_16": (70, 16),
        "Wang2023Better_WRN-28-10": (28, 10),
        "Wang2023Better_WRN-70-16": (70, 16),
        "Cui2023Decoupled_WRN-28-10": (28, 10),
    },
    ("cifar100", "corruptions"): {"Gowal2020Uncovering_Linf": (70, 16), "Gowal2020Uncovering_extra_Linf": (70, 16)},
}
_UNCHECKED = ("Bartoldson2024Adversarial_WRN-82-8",)
_BY_HAND = re.compile(r"(?P<kind>WRN-(?P<depth>\d+)-(?P<width>\d+)|PreActResNet-(?P<layers>\d+))(?P<relu>-relu)?", re.I)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of RobustBench's zoo that is a DeepMind-style network: what its file does not say."""

    name: str  # FirstauthorYEARWord_ARCH, as the zoo has it
    dataset: str  # cifar10 or cifar100
    board: str  # Linf, L2 or corruptions
    depth: int  # of a wide residual network; 18 for a PreActResNet
    width: int  # of a wide residual network; 0 for a PreActResNet

    @property
    def spec(self) -> WideResNetSpec | PreActResNetSpec:
        """The architecture: SiLU everywhere, as in all of them, and the mean and deviation of the data set."""
        mean, std = PIXELS[CLASSES[self.dataset]]
        if self.width:
            return WideResNetSpec(depth=self.depth, width=self.width, mean=mean, std=std)
        return PreActResNetSpec(mean=mean, std=std)

    @property
    def paper(self) -> str:
        """Where the paper is."""
        return PAPERS[self.name.partition("_")[0]]

    @property
    def additional_data(self) -> bool:
        """Whether real images beside the data set were trained on; generated ones do not count, as on the board."""
        return "extra" in self.name.split("_")

    @property
    def checked(self) -> bool:
        """Whether the architecture was read in source code that loads this entry (else: in its description)."""
        return self.name not in _UNCHECKED


ENTRIES = tuple(
    Entry(name=name, dataset=dataset, board=board, depth=depth, width=width)
    for (dataset, board), names in _TABLE.items()
    for name, (depth, width) in names.items()
)
"""Every entry that can be loaded; the same name may stand on several boards."""


def load_zoo(path: str | Path, name: str | None = None) -> ClassifierNetwork:
    """The network in a checkpoint file of RobustBench's zoo, frozen, in eval mode; nothing in the file is executed.

    name: an entry of the zoo, by default the file's name without its ending; or an architecture by hand, WRN-28-10 or
    PreActResNet-18 with -relu for that activation, on the pixels of CIFAR-10 or CIFAR-100 (by the number of classes).
    Raises UserError for another name, listing the nearest, and for a file that holds something else.
    """
    path = Path(path)
    tensors = _weights(path)
    classes = len(tensors["logits.bias"]) if "logits.bias" in tensors else 0
    spec = _spec(name or path.stem, classes, path)
    return filled(spec.build(3, classes or 10), _without_pixels(tensors, spec, path), str(path))


def _spec(name: str, classes: int, path: Path) -> WideResNetSpec | PreActResNetSpec:
    """The architecture that a name stands for, with the pixels of the data set that has so many classes."""
    if _BY_HAND.fullmatch(name) is not None:
        return by_hand(name, classes or 10)
    known = {CLASSES[e.dataset]: e for e in ENTRIES if e.name == name}
    if not known:
        raise UserError(f"{path}: {_unknown(name)}")
    require(classes in known, f"{path}: classes", f"{' or '.join(map(str, known))}, as {name} has", classes)
    return known[classes].spec


def _unknown(name: str) -> str:
    """What to say to a name that is none of the zoo's."""
    close = ", ".join(nearest(name, dict.fromkeys(e.name for e in ENTRIES))[:5])
    return (
        f"expected the name of a DeepMind-style entry of RobustBench, such as {close}; got {name!r}. Say the "
        "architecture instead, WRN-28-10 or PreActResNet-18 (with -relu for that activation), or in Python "
        "gambeson.models.export.load_robustbench(path, WideResNetSpec(depth=..., width=..., mean=..., std=...)). "
        "Entries of other networks come as an ONNX or TorchScript file, or as module:function"
    )


def by_hand(text: str, classes: int) -> WideResNetSpec | PreActResNetSpec:
    """'WRN-28-10', 'PreActResNet-18' or either with '-relu' -> the architecture on CIFAR's pixels.

    Raises UserError for another text, for a depth that there is not, and for classes that are neither 10 nor 100.
    """
    found = _BY_HAND.fullmatch(text)
    require(found is not None, "architecture", "WRN-DEPTH-WIDTH or PreActResNet-18 or -34, or with -relu", text)
    assert found is not None
    require(classes in PIXELS, "zoo file, classes", "10 or 100, whose mean and std are known", classes)
    mean, std = PIXELS[classes]
    activation = "relu" if found["relu"] else "silu"
    if found["width"]:
        depth, width = int(found["depth"]), int(found["width"])
        return WideResNetSpec(depth=depth, width=width, activation=activation, mean=mean, std=std)
    layers = int(found["layers"])
    require(layers in (18, 34), "PreActResNet depth", "18 or 34", layers)
    return PreActResNetSpec(depth=18 if layers == 18 else 34, activation=activation, mean=mean, std=std)


def _weights(path: Path) -> dict[str, Tensor]:
    """The named tensors in a file, wrappers opened and prefixes cut."""
    try:
        return zoo_state_dict(read_torch(path))
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError, *DAMAGE) as error:
        raise UserError(f"{path}: expected weights as torch.save writes them, got: {error}") from error


def _without_pixels(
    tensors: Mapping[str, Tensor], spec: WideResNetSpec | PreActResNetSpec, path: Path
) -> dict[str, Tensor]:
    """The weights without `mean` and `std`, which a file has that was saved from the zoo's own classes.

    UserError where they are others than the architecture's: the network would compute something else.
    """
    for key, wanted in (("mean", spec.mean), ("std", spec.std)):
        held = tensors.get(key)
        if held is not None and not torch.allclose(held.flatten().float(), torch.tensor(wanted), atol=1e-4):
            raise UserError(
                f"{path}: expected pixels with {key} {wanted}, as this entry has, got a file with "
                f"{held.flatten().tolist()}; load it with gambeson.models.export.load_robustbench and a spec of its own"
            )
    return {name: value for name, value in tensors.items() if name not in ("mean", "std")}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What an evaluation found, and on what: enough to say whether it is a RobustBench number."""

    clean: float  # share of images classified right, 0 to 1
    autoattack: float  # share that stays right under AutoAttack, 0 to 1
    n: int  # number of test images
    dataset: str  # cifar10, cifar100 or another
    threat: ThreatModel  # the ball that was searched
    version: str = "standard"  # of AutoAttack
    precision: str = "float32"  # of the search
    reported: float | None = None  # share that the paper reports; none: the AutoAttack one

    def __post_init__(self) -> None:
        for name, share in (("clean", self.clean), ("autoattack", self.autoattack)):
            require(0 <= share <= 1, f"measurement {name}", "a share from 0 to 1", share)
        require(self.autoattack <= self.clean, "measurement autoattack", "at most clean", self.autoattack)
        require(self.n >= 1, "measurement n", "at least 1 image", self.n)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What RobustBench's board says of a model besides its numbers."""

    link: str  # where the paper is
    name: str  # its title
    authors: str  # with commas between
    venue: str  # such as ICML 2023, or arXiv, Feb 2023
    additional_data: bool  # whether real images beside the data set were trained on; generated ones do not count
    footnote: str = ""  # such as: It uses additional 1M synthetic images in training.


def shortfalls(found: Measurement) -> list[str]:
    """Why these are no RobustBench numbers; empty where they are.

    The board's are those of the standard AutoAttack in float32 on the 10,000 test images of CIFAR-10 or CIFAR-100,
    linf 8/255, or on CIFAR-10 L2 0.5.
    """
    boards = {("cifar10", "linf", "8/255"), ("cifar10", "l2", "0.5"), ("cifar100", "linf", "8/255")}
    where = (found.dataset, found.threat.norm, radius(found.threat))
    reasons = {
        f"RobustBench has no board of {found.dataset} under {found.threat}": where not in boards,
        f"{found.n:,} images were attacked, not all 10,000 test images": found.n != 10_000,
        f"the version of AutoAttack was {found.version}, not standard": found.version != "standard",
        f"the search ran in {found.precision}, not float32": found.precision != "float32",
    }
    return [reason for reason, holds in reasons.items() if holds]


def radius(threat: ThreatModel) -> str:
    """The radius as the board writes it: 8/255, 0.5."""
    levels = threat.epsilon * 255
    whole = threat.norm == "linf" and abs(levels - round(levels)) < 1e-6
    return f"{round(levels)}/255" if whole else f"{threat.epsilon:g}"


def leaderboard(model: ClassifierNetwork, found: Measurement, paper: Paper) -> dict[str, Any]:
    """`board_record` of a network; raises UserError for one that the zoo has no class for."""
    robustbench_entry(model)
    return board_record(architecture(model), found, paper)


def board_record(network: str, found: Measurement, paper: Paper, why: Sequence[str] = ()) -> dict[str, Any]:
    """RobustBench's record of a model, keys and formats as in its model_info files: percent as text, two decimals.

    Numbers that are none of RobustBench's (`shortfalls`, and `why`) say so in the footnote and are marked unreliable.
    """
    short = [*why, *shortfalls(found)]
    warning = f"Not a RobustBench number: {'; '.join(short)}." if short else ""
    record: dict[str, Any] = {
        "link": paper.link,
        "name": paper.name,
        "authors": paper.authors,
        "additional_data": paper.additional_data,
        "number_forward_passes": 1,
        "dataset": found.dataset,
        "venue": paper.venue,
        "architecture": network,
        "eps": radius(found.threat),
        "clean_acc": f"{100 * found.clean:.2f}",
        "reported": f"{100 * (found.autoattack if found.reported is None else found.reported):.2f}",
        "autoattack_acc": f"{100 * found.autoattack:.2f}",
    }
    footnote = " ".join(part for part in (warning, paper.footnote) if part)
    return record | ({"footnote": footnote} if footnote else {}) | {"unreliable": bool(short)}


def architecture(model: ClassifierNetwork) -> str:
    """The board's word for a network: WideResNet-28-10, PreActResNet-18."""
    spec = model.spec
    return f"WideResNet-{spec.depth}-{spec.width}" if isinstance(model, WideResNet) else f"PreActResNet-{spec.depth}"


def check_entry_name(name: str) -> None:
    """UserError for a name that the zoo would not give an entry."""
    named = re.fullmatch(r"[A-Z][A-Za-z-]*\d{4}[A-Za-z-]+([_-][A-Za-z0-9]+)*", name) is not None
    form = "FirstauthorYEARWord or FirstauthorYEARWord_ARCH, such as Wang2023Better_WRN-28-10"
    require(named, "entry name", form, name)


def write_submission(
    folder: str | Path, model: ClassifierNetwork, name: str, found: Measurement, paper: Paper
) -> list[str]:
    """Writes all that RobustBench asks for into a new folder, laid out as its repository; returns the `shortfalls`.

    model_info/DATA/THREAT/NAME.json, models/DATA/THREAT/NAME.pt, entry.py with the lines for its model zoo, README.md
    with how to verify the number. name: FirstauthorYEARWord, and _ARCH where there are several. Raises UserError for a
    name of another form, a folder that is not empty, and a network that the zoo has no class for.
    """
    folder = Path(folder)
    check_entry_name(name)
    require(not folder.exists() or not any(folder.iterdir()), "submission", "a new or empty folder", str(folder))
    record = leaderboard(model, found, paper)  # first: it refuses networks that the zoo has no class for
    place = f"{found.dataset}/{BOARDS[found.threat.norm]}/{name}"
    save_robustbench(model, folder / f"models/{place}.pt")
    digest = hashlib.sha256((folder / f"models/{place}.pt").read_bytes()).hexdigest()
    _write(folder / f"model_info/{place}.json", json.dumps(record, indent=2) + "\n")
    _write(folder / "entry.py", _entry_lines(model, name, found))
    _write(folder / "README.md", "\n".join(_readme(model, name, found, place, digest)))
    return shortfalls(found)


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)


def _entry_lines(model: ClassifierNetwork, name: str, found: Measurement) -> str:
    """The lines for the dict of the threat in robustbench/model_zoo/DATA.py."""
    return (
        f"# into the dict of {BOARDS[found.threat.norm]} models in robustbench/model_zoo/{found.dataset}.py; gdrive_id "
        f"is what you upload the .pt file as\n('{name}', {{\n    'model': lambda: {robustbench_entry(model)},\n"
        f"    'gdrive_id': None,\n}}),\n"
    )


def _readme(model: ClassifierNetwork, name: str, found: Measurement, place: str, digest: str) -> Iterator[str]:
    """How to verify the number, with RobustBench's own code and with ours."""
    yield f"# {name}\n"
    for reason in shortfalls(found):
        yield f"**Not a RobustBench number: {reason}.**\n"
    yield (
        f"Clean accuracy {found.clean:.2%}, robust accuracy {found.autoattack:.2%} under AutoAttack ({found.version}, "
        f"search in {found.precision}) at {found.threat}, on {found.n:,} test images of {found.dataset}.\n\n"
        f"`models/{place}.pt` has the SHA-256 `{digest}`.\n\n## Verify with RobustBench\n\n```python\n"
        "import torch\nfrom robustbench.eval import benchmark\n"
        f"from robustbench.model_zoo.architectures.dm_wide_resnet import {robustbench_entry(model).partition('(')[0]}\n"
        f"from torch import nn\n\nmodel = {robustbench_entry(model)}\n"
        f'weights = torch.load("models/{place}.pt", weights_only=True)\n'
        "missing, unexpected = model.load_state_dict(weights, strict=False)\n"
        'assert set(missing) <= {"mean", "std"} and not unexpected  # the class brings those two itself\n'
        f'benchmark(model.eval(), dataset="{found.dataset}", threat_model="{BOARDS[found.threat.norm]}", '
        f"eps={found.threat.epsilon!r}, n_examples={found.n})\n```\n\n## Verify with gambeson\n\n"
        "```python\nimport gambeson\nfrom gambeson.models.export import load_robustbench\n"
        f"from {type(model.spec).__module__} import {type(model.spec).__name__}\n"
        f"from gambeson.robustness import AutoAttack\n\nspec = {model.spec!r}\n"
        f'model = load_robustbench("models/{place}.pt", spec)\ntest = gambeson.load("{found.dataset}").test\n'
        f"attack = AutoAttack(threat=gambeson.{found.threat!r}, version={found.version!r})\n"
        "print(attack(model, test.images, test.labels).robust.float().mean())\n```\n\n"
        "The file is a bare state dict: the entry in `entry.py` says activation, mean and std of the pixels, and "
        "networks with others compute something else.\n\n## Submit\n\n"
        "Open an issue 'New Model(s)' at https://github.com/RobustBench/robustbench, or a pull request with "
        f"`model_info/{place}.json` and the lines of `entry.py`."
    )
