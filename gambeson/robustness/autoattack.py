"""AutoAttack (Croce & Hein 2020): a fixed set of attacks, each on the images that still stand; the worst case counts.

The draws of an image belong to it, so batch size, order and sharding change nothing; from 2 classes up; no state but
what `Journal` keeps, so that a killed evaluation goes on to the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gambeson.errors import require
from gambeson.randomness import derive, image_keys
from gambeson.robustness.attack_losses import DLR, Margin, Network, threat_of
from gambeson.robustness.attacks import APGD, TargetedAPGD
from gambeson.robustness.fab import FAB, TargetedFAB
from gambeson.robustness.inputs import clean_logits
from gambeson.robustness.multitargeted import MultiTargeted
from gambeson.robustness.pursuit import Board, Chase, pursue
from gambeson.robustness.square import Square
from gambeson.robustness.verdicts import settled
from gambeson.robustness.views import Precision, View
from gambeson.threat import ThreatModel
from gambeson.types import Logits

Version = Literal["standard", "plus", "rand", "aa+mt", "worst", "custom"]
"""standard, plus, rand: those of the reference. aa+mt: IRGD's AutoPGD and MultiTargeted. worst: standard and aa+mt,
the worst case of both (what CDP reports). custom: the `attacks` named."""
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": STANDARD,
    "plus": ("apgd-ce-x5", "apgd-dlr-x5", "fab-x5", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce-eot", "apgd-dlr-eot"),
    "aa+mt": ("apgd-ce-x5", "apgd-dlr-x5", "multitargeted"),
    "worst": (*STANDARD, "apgd-ce-x5", "apgd-dlr-x5", "multitargeted"),
}
BLACK_BOX = ("square",)
"""Attacks that need no gradients."""


Attack = APGD | TargetedAPGD | FAB | TargetedFAB | Square | MultiTargeted
"""What versions are made of."""


def attack_table(threat: ThreatModel, steps: int = 100, targets: int = 9, queries: int = 5000) -> dict[str, Attack]:
    """Every attack by name, with the budgets of the reference: 100 steps, 9 targets, 5,000 queries; under l1 it has 5
    starts for AutoPGD and at most 5 targets."""
    sparse = threat.norm == "l1"
    apgd, targets = APGD(threat=threat, steps=steps), min(targets, 5) if sparse else targets
    fab = FAB(threat=threat, steps=steps)
    return {
        "apgd-ce": replace(apgd, restarts=5 if sparse else 1),
        "apgd-dlr": replace(apgd, loss=DLR()),
        "apgd-t": TargetedAPGD(threat=threat, steps=steps, targets=targets),
        "fab": fab,
        "fab-t": TargetedFAB(threat=threat, steps=steps, targets=targets),
        "square": Square(threat=threat, queries=queries, horizon=2 * queries),  # the reference does not stretch it
        "apgd-ce-x5": replace(apgd, restarts=5),
        "apgd-dlr-x5": replace(apgd, loss=DLR(), restarts=5),
        "fab-x5": replace(fab, restarts=5),
        "apgd-ce-eot": replace(apgd, eot=20),
        "apgd-dlr-eot": replace(apgd, loss=DLR(), eot=20),
        "multitargeted": MultiTargeted(threat=threat, steps=2 * steps, restarts=10),
    }


ATTACKS = tuple(attack_table(ThreatModel()))
"""Names of all attacks."""


@runtime_checkable
class Journal(Protocol):
    """Where an evaluation's state is kept between starts."""

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None at first."""
        ...

    def due(self) -> bool:
        """Whether the state should be saved now."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Keeps plain tensors, numbers and strings."""
        ...


@dataclass(frozen=True)
class Standing:
    """How far an evaluation is, for whoever watches."""

    attack: str  # the attack at work
    left: int  # images that it still has to do
    images: int  # of so many in all
    robust: int  # images not fooled yet by anything
    share: float  # of the planned work, 0 to 1: attacks weighed by their cost for an image that stands


Watch = Callable[[Standing], None]


def unwatched(standing: Standing) -> None:
    """The watch that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """A set of attacks by the name of its version, and how they are carried out."""

    threat: ThreatModel | None = None  # the ball of the attacks; none: that of the recipe
    version: Version = "standard"  # standard, plus, rand, aa+mt, worst (standard and aa+mt) or custom
    attacks: tuple[str, ...] = ()  # the names, in order, of version custom
    seed: int = 0  # of the draws; every image has its own stream
    steps: int = 100  # of APGD and FAB; MultiTargeted takes twice as many
    targets: int = 9  # of the targeted attacks: the most likely other classes
    queries: int = 5000  # of Square
    precision: Precision = "float32"  # of the search: bfloat16 is faster, may miss attacks

    def __post_init__(self) -> None:
        known = ", ".join(VERSIONS)
        require(self.version in (*VERSIONS, "custom"), "AutoAttack version", f"{known} or custom", self.version)
        one = (self.version == "custom") == bool(self.attacks)
        require(one, "AutoAttack attacks", "names with version custom, and none without", list(self.attacks))
        unknown = [name for name in self.attacks if name not in ATTACKS]
        require(not unknown, "AutoAttack attacks", f"names out of {', '.join(ATTACKS)}", unknown)
        for name in ("steps", "targets", "queries"):
            require(getattr(self, name) >= 1, f"AutoAttack {name}", "at least 1", getattr(self, name))

    @property
    def names(self) -> tuple[str, ...]:
        """The attacks in their order. FAB has no l1 form here: it is left out of the versions."""
        names = self.attacks or VERSIONS[self.version]
        l1 = self.threat is not None and self.threat.norm == "l1" and self.version != "custom"
        return tuple(name for name in names if not (l1 and name.startswith("fab")))

    @property
    def official(self) -> bool:
        """Whether this is AutoAttack as RobustBench counts it: the whole standard version, its budgets, float32."""
        budgets = (self.steps, self.targets, self.queries) == (100, 9, 5000)
        return self.version == "standard" and self.names == STANDARD and self.precision == "float32" and budgets

    def chosen(self) -> dict[str, Attack]:
        """The attacks by name, in order."""
        table = attack_table(threat_of(self), self.steps, self.targets, self.queries)
        return {name: table[name] for name in self.names}

    def notes(self, classes: int) -> list[str]:
        """What a reader of the number must know, as sentences."""
        found = []
        dlr = [name for name in self.names if "dlr" in name] if classes < 3 else []
        targeted = [name for name in self.names if name == "apgd-t"] if classes < 4 else []
        if dlr or targeted:
            found.append(
                f"With {classes} classes the difference of logits ratio is undefined: the margin stands in for it in "
                f"{', '.join(dlr + targeted)}."
            )
        if self.targets > classes - 1 and any(name in ("apgd-t", "fab-t") for name in self.names):
            found.append(f"{classes} classes have {classes - 1} targets, not {self.targets}: all of them are attacked.")
        if self.precision != "float32":
            found.append(f"Searched in {self.precision}: may have missed attacks; successes hold in full precision.")
        if self.threat is not None and self.threat.norm == "l1" and self.version in ("standard", "plus", "worst"):
            found.append("FAB is left out: it has no l1 form here. APGD-CE has 5 starts, as in the reference.")
        return found

    def __call__(
        self,
        model: Network,
        images: Tensor,
        labels: Tensor,
        batch_size: int = 256,
        watch: Watch = unwatched,
        journal: Journal | None = None,
    ) -> AttackResult:
        """Attacks images [B, C, H, W] in [0, 1] with labels [B]; `batch_size` images are in the network at once.

        `journal` keeps the state, so that a killed call goes on. Raises ValueError for inputs out of form, a missing
        threat, a model in training mode or one whose logits are not finite, and for another evaluation's journal.
        """
        clean = clean_logits(model, images, labels, batch_size)
        images = images.detach()
        work = Assault(self.chosen(), model, images, labels, clean, self, batch_size, watch, journal)
        return work.carried_out()

    def run_standard_evaluation(
        self,
        model: Network,
        x: Tensor,
        y: Tensor,
        batch_size: int = 250,
        say: Callable[[str], None] = print,
        return_labels: bool = False,
        journal: Journal | None = None,
    ) -> Any:
        """As the reference's method of this name: tells the accuracy after each attack, and gives the adversarial
        images [B, C, H, W] (the clean one where no attack succeeded); with `return_labels` also the predictions [B]."""
        result = self(model, x, y, batch_size, journal=journal)
        count, right = len(y), result.column("broken_by") != "clean"
        say(f"initial accuracy: {right.mean():.2%}")
        for name in self.names:
            right = right & (result.column(name) != 0)
            say(f"robust accuracy after {name.upper()}: {right.mean():.2%} ({int(right.sum())} of {count})")
        if not return_labels:
            return result.images
        with torch.no_grad():
            return result.images, torch.cat([model(part).argmax(1) for part in result.images.split(batch_size)])


Columns = dict[str, np.ndarray]
"""Column name -> one value per image; a verdict is 1 (withstood), 0 (fooled) or -1 (not tried)."""


@dataclass(frozen=True)
class AttackResult:
    """What an AutoAttack found."""

    images: Tensor  # [B, C, H, W] adversarial where one was found, clean elsewhere
    robust: Tensor  # [B] bool: right, and not fooled by any attack
    columns: Columns  # of the rows

    def column(self, name: str) -> np.ndarray:
        """One column of the rows."""
        return self.columns[name]

    @property
    def rows(self) -> pa.Table:
        """One row per image: label, prediction, margin (clean), robust, broken_by, precision, and of every attack its
        verdict (null: not tried), smallest margin met, queries and seconds. Only seconds are not reproducible."""
        return table_of(self.columns)


def table_of(columns: Columns) -> pa.Table:
    """Columns as a table: verdicts of -1, and NaN, become null."""
    made = {}
    for name, values in columns.items():
        if values.dtype == np.int8:
            made[name] = pa.array([None if v < 0 else bool(v) for v in values], pa.bool_())
        elif values.dtype.kind == "f":
            made[name] = pa.array(values, from_pandas=True)
        else:
            made[name] = pa.array(values)
    return pa.table(made)


class Assault:
    """The attacks of one call, one after another, on the images that still stand."""

    def __init__(
        self,
        attacks: dict[str, Attack],
        model: Network,
        images: Tensor,
        labels: Tensor,
        clean: Logits,
        spec: AutoAttack,
        batch_size: int,
        watch: Watch,
        journal: Journal | None,
    ) -> None:
        self.attacks, self.model, self.images, self.labels, self.clean = attacks, model, images, labels, clean
        self.spec, self.batch_size, self.watch, self.journal = spec, batch_size, watch, journal
        self.view = View(model, spec.precision)
        self.standing = clean.argmax(1) == labels
        self.adversarial = images.clone()
        self.done: dict[str, dict[str, Tensor]] = {}  # of every finished attack
        self.costs = {name: expected_cost(attack, clean.shape[1]) for name, attack in attacks.items()}

    def carried_out(self) -> AttackResult:
        """All attacks, from where the journal left off."""
        saved = None if self.journal is None else self.journal.load()
        if saved is not None:
            self._check_journal(saved)
            self.standing, self.adversarial = (saved[k].to(self.labels.device) for k in ("standing", "adversarial"))
            self.done = saved["done"]
        for name in self.attacks:
            if name not in self.done:
                self._attack(name, saved["chase"] if saved is not None and saved["attack"] == name else None)
        return AttackResult(self.adversarial, self.standing, self._columns())

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what is attacked and how: the attacks, the images with their labels, and what was predicted."""
        state = hashlib.sha256(repr((self.spec, self.images.shape)).encode())
        for part in (image_keys(self.images, self.labels, 0), self.clean.argmax(1)):
            state.update(part.cpu().numpy().tobytes())
        return state.hexdigest()

    def _check_journal(self, saved: dict[str, Any]) -> None:
        """ValueError for the journal of another evaluation."""
        if saved.get("of") != self.identity:
            raise ValueError(
                "journal: expected the state of this evaluation, got that of other images, another model or other "
                "attacks; give every evaluation a journal of its own"
            )

    def _attack(self, name: str, saved: dict[str, Any] | None) -> None:
        board = Board(self.images, self.labels, self.clean, derive(self.spec.seed, name))
        board.right = self.standing.clone()
        rows = board.standing()
        if len(rows):
            pursue(self.attacks[name], self.view, board, self.batch_size, lambda c: self._each(name, c), saved)
        right = settled(self.attacks[name], self.model, board, rows, self.batch_size)
        fooled = rows[~right]
        self.adversarial[fooled] = board.best[fooled]
        verdict = torch.full_like(self.labels, -1, dtype=torch.int8)
        verdict[rows] = right.to(torch.int8)
        told = {"verdict": verdict, "margin": board.margin, "queries": board.queries, "seconds": board.seconds}
        self.done[name] = {key: value.cpu() for key, value in told.items()}
        self.standing = self.standing.clone()
        self.standing[fooled] = False
        self._save(name, None)

    def _each(self, name: str, chase: Chase) -> None:
        """After every step: tell whoever watches, and save where it is time."""
        robust = int((self.standing & chase.board.right).sum())
        self.watch(Standing(name, chase.left, len(self.labels), robust, self._share(name, chase)))
        if self.journal is not None and self.journal.due():
            self._save(name, chase.save())

    def _save(self, name: str, chase: dict[str, Any] | None) -> None:
        if self.journal is not None:
            state = {"standing": self.standing, "adversarial": self.adversarial, "done": self.done}
            self.journal.save(state | {"attack": name, "chase": chase, "of": self.identity})

    def _share(self, name: str, chase: Chase) -> float:
        """Work done of the work planned, as if every image that stands now would go on standing."""
        before = sum(self.costs[done] for done in self.done)
        begun = max(int(self.standing.sum()), 1)
        here = self.costs[name] * (1 - (chase.weight - walked(chase)) / begun)
        return min((before + here) / sum(self.costs.values()), 1.0)

    def _columns(self) -> Columns:
        prediction = self.clean.argmax(1)
        broken_by = np.full(len(self.labels), "", dtype=object)
        broken_by[(prediction != self.labels).cpu().numpy()] = "clean"
        columns = {
            "label": self.labels,
            "prediction": prediction,
            "margin": -Margin()(self.clean, self.labels).float(),
            "robust": self.standing,
        }
        found: Columns = {name: values.cpu().numpy() for name, values in columns.items()}
        for name, told in self.done.items():
            tried = told["verdict"].numpy() >= 0
            broken_by[told["verdict"].numpy() == 0] = name
            found[name] = told["verdict"].numpy()
            found[f"{name}_margin"] = np.where(tried, told["margin"].float().numpy(), np.float32(np.nan))
            found[f"{name}_queries"] = told["queries"].numpy()
            found[f"{name}_seconds"] = told["seconds"].float().numpy()
        found["broken_by"] = np.where(broken_by == "", None, broken_by)  # type: ignore[call-overload]
        found["precision"] = np.full(len(self.labels), self.spec.precision, dtype=object)
        return found


def walked(chase: Chase) -> float:
    """What the lanes have done of the climbs that they are in, in whole images."""
    if chase.lanes is None:
        return 0.0
    length = chase.attack.queries if isinstance(chase.attack, Square) else getattr(chase.attack, "steps", 100)
    return int(chase.lanes.step.sum()) / ((length + 1) * chase.attack.runs(chase.board.classes))


def expected_cost(attack: Attack, classes: int) -> float:
    """Forward-equivalents for an image that stands: a look with a gradient counts as three, one without as one."""
    if isinstance(attack, Square):
        return float(attack.queries * attack.restarts)
    looks = attack.eot if isinstance(attack, APGD) else 1
    return 3.0 * looks * attack.steps * attack.runs(classes)
