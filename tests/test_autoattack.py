"""AutoAttack: versions, worst case, rows, batch sizes, class counts, resuming; the stage that writes rows in chunks."""

import io
import json
import pickle
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from gambeson.data.imageset import ImageSet, Split
from gambeson.disk import read_json
from gambeson.errors import EnvironmentFault
from gambeson.machine import Machine
from gambeson.processes import pool
from gambeson.robustness import autoattack
from gambeson.robustness.assess import Assessment, assess, chunks_of, stood_white_box
from gambeson.robustness.attacks import PGD
from gambeson.robustness.autoattack import ATTACKS, VERSIONS, AutoAttack, attack_table
from gambeson.robustness.chunks import CHUNKS, StateFile
from gambeson.robustness.kept import Held, Kept
from gambeson.store import Store, Workspace
from gambeson.threat import ThreatModel

assess_stage = sys.modules["gambeson.robustness.assess"]  # the module: the package has the stage under its name
THREATS = [ThreatModel(epsilon=0.12), ThreatModel(norm="l2", epsilon=0.7), ThreatModel(norm="l1", epsilon=1.2)]
LITTLE = {"steps": 8, "queries": 40, "targets": 9}


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def trained(images, labels, classes, steps=150):
    """A small smooth network, standard training on these classes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, classes)
    )
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(steps):
        pick = torch.randint(len(images), (128,))
        optimiser.zero_grad()
        F.cross_entropy(net(images[pick]), labels[pick]).backward()
        optimiser.step()
    return net.eval()


@pytest.fixture(scope="module")
def net(digits):
    with torch.random.fork_rng():
        return trained(digits[0][400:], digits[1][400:], 10)


@pytest.fixture(scope="module")
def batch(digits):
    return digits[0][:48], digits[1][:48]


def same_rows(first, second):
    """All columns but seconds."""
    names = [n for n in first.column_names if not n.endswith("_seconds")]
    assert first.column_names == second.column_names
    return all(first[n].to_pylist() == second[n].to_pylist() for n in names)


# ---- versions ----


def test_versions_and_budgets():
    """The standard version is the published one; the others are made of known attacks."""
    standard = AutoAttack(threat=THREATS[0]).chosen()
    assert list(standard) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (standard["apgd-ce"].steps, standard["apgd-ce"].restarts) == (100, 1)
    assert (standard["apgd-t"].steps, standard["apgd-t"].runs(10)) == (100, 9)
    assert (standard["fab-t"].steps, standard["fab-t"].runs(10)) == (100, 9)
    assert (standard["square"].queries, standard["square"].horizon) == (5000, 10000)
    table = attack_table(THREATS[0])
    assert table["apgd-ce-x5"].runs(10) == table["apgd-dlr-x5"].runs(10) == 5
    assert table["multitargeted"].runs(10) == 90
    assert table["multitargeted"].steps == 200
    assert table["apgd-ce-eot"].eot == 20
    assert all(set(names) <= set(ATTACKS) for names in VERSIONS.values())
    assert VERSIONS["worst"] == (*VERSIONS["standard"], *VERSIONS["aa+mt"])
    assert "fab-t" not in AutoAttack(threat=THREATS[2]).names


def test_what_may_be_called_autoattack():
    """The standard version at its budgets in float32, and nothing else."""
    whole = AutoAttack(threat=THREATS[0])
    assert whole.official
    for change in ({"steps": 99}, {"queries": 4999}, {"targets": 3}, {"precision": "bfloat16"}, {"version": "plus"}):
        assert not replace(whole, **change).official


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"version": "custom"}, "AutoAttack attacks: expected names with version custom"),
        ({"attacks": ("apgd-ce",)}, "none without"),
        ({"version": "custom", "attacks": ("apgd",)}, "names out of apgd-ce"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"queries": 0}, "queries: expected at least 1"),
    ],
)
def test_mistakes_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        AutoAttack(**wrong)


# ---- the verdicts ----


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_worst_case_counts(net, batch, threat):
    """Robust = right and withstood everything; an attack sees what stands; fooling images fool, inside the ball."""
    attack = AutoAttack(threat=threat, **LITTLE)
    result = attack(net, *batch, batch_size=16)
    rows, robust = result.rows.to_pydict(), result.robust
    assert 3 < int(robust.sum()) < 45
    names = attack.names
    standing = np.array(rows["prediction"]) == np.array(rows["label"])
    for name in names:
        tried = np.array([v is not None for v in rows[name]])
        assert (tried == standing).all(), name
        assert (np.array(rows[f"{name}_queries"])[~tried] == 0).all()
        assert (np.array(rows[f"{name}_queries"])[tried] > 0).all()
        fell = np.array([v is False for v in rows[name]])
        assert (fell == np.array([b == name for b in rows["broken_by"]])).all()
        margins = np.array([np.nan if m is None else m for m in rows[f"{name}_margin"]])
        assert (margins[fell] <= 0).all()
        assert (margins[tried & ~fell] > 0).all()
        standing &= ~fell
    assert (standing == robust.numpy()).all()
    with torch.no_grad():
        assert ((net(result.images).argmax(1) == batch[1]) == robust).all()
    moved = threat.distance(result.images, batch[0])
    assert (moved <= threat.epsilon * (1 + 1e-5) + 1e-6).all()
    assert (moved[robust] == 0).all()
    assert result.images.min() >= 0
    assert result.images.max() <= 1


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_rows_do_not_depend_on_the_batch(net, batch, threat):
    """Sizes 1, 7 and 64, and another order: the same verdict and the same attack for every image."""
    attack = AutoAttack(threat=threat, **LITTLE)
    x, y = batch[0][:12], batch[1][:12]
    alone = attack(net, x, y, batch_size=1).columns
    for size in (7, 64):
        together = attack(net, x, y, batch_size=size).columns
        for name in ("robust", "broken_by", *attack.names):
            assert (alone[name] == together[name]).all(), (name, size)
    turned = attack(net, x.flip(0), y.flip(0), batch_size=7).columns
    assert (turned["robust"][::-1] == alone["robust"]).all()


def test_attacks_have_their_own_draws(net, batch):
    """The same attack under two names begins elsewhere; the seed changes all."""
    rows = {}
    for name, seed in (("apgd-dlr", 0), ("apgd-dlr-x5", 0), ("apgd-dlr", 1)):
        spec = AutoAttack(threat=ThreatModel(epsilon=0.02), version="custom", attacks=(name,), steps=2, seed=seed)
        rows[name, seed] = spec(net, *batch).columns[f"{name}_margin"]
    assert not np.array_equal(rows["apgd-dlr", 0], rows["apgd-dlr", 1], equal_nan=True)
    assert not np.array_equal(rows["apgd-dlr", 0], rows["apgd-dlr-x5", 0], equal_nan=True)


@pytest.mark.parametrize("classes", [2, 3, 8])
@pytest.mark.parametrize("version", ["standard", "plus", "worst"])
def test_few_classes(digits, classes, version):
    """From 2 classes up; what stands in for the DLR is said."""
    keep = digits[1] < classes
    images, labels = digits[0][keep], digits[1][keep]
    with torch.random.fork_rng():
        net = trained(images[100:], labels[100:], classes, 40)
    attack = AutoAttack(threat=THREATS[0], version=version, steps=3, queries=10)
    result = attack(net, images[:20], labels[:20])
    assert result.robust.shape == (20,)
    notes = " ".join(attack.notes(classes))
    assert ("margin stands in" in notes) == (classes < 4)
    assert (f"{classes} classes have {classes - 1} targets" in notes) == (version in ("standard", "plus", "worst"))


def test_all_misclassified(net, batch):
    """Nothing to attack: robust accuracy 0, no queries."""
    wrong = (batch[1] + 1) % 10
    wrong = torch.where(net(batch[0]).argmax(1) == wrong, (wrong + 1) % 10, wrong)
    result = AutoAttack(threat=THREATS[0])(net, batch[0], wrong)
    assert not result.robust.any()
    assert set(result.columns["broken_by"]) == {"clean"}
    assert torch.equal(result.images, batch[0])


def test_as_users_of_the_reference_know_it(net, batch):
    """The accuracy after each attack is told; adversarial images come back, with predictions if asked."""
    said = []
    attack = AutoAttack(threat=THREATS[0], **LITTLE)
    images, predicted = attack.run_standard_evaluation(net, *batch, batch_size=20, say=said.append, return_labels=True)
    assert said[0].startswith("initial accuracy:")
    assert [line.split(":")[0] for line in said[1:]] == [f"robust accuracy after {n.upper()}" for n in attack.names]
    robust = (predicted == batch[1]).sum().item()
    assert said[-1].endswith(f"({robust} of 48)")
    assert torch.equal(attack.run_standard_evaluation(net, *batch, 48, lambda line: None), images)


def test_search_in_low_precision_is_said_and_verified(net, batch):
    """Every image called fooled fools in float32; each row says how it was searched."""
    attack = AutoAttack(threat=THREATS[0], precision="bfloat16", **LITTLE)
    result = attack(net, *batch)
    with torch.no_grad():
        assert ((net(result.images).argmax(1) == batch[1]) == result.robust).all()
    assert set(result.columns["precision"]) == {"bfloat16"}
    assert any("bfloat16" in note for note in attack.notes(10))
    exact = replace(attack, precision="float32")(net, *batch)
    assert abs(int(result.robust.sum()) - int(exact.robust.sum())) <= 3


def test_the_global_generator_stays(net, batch):
    before = torch.get_rng_state()
    AutoAttack(threat=THREATS[0], version="plus", **LITTLE)(net, batch[0][:8], batch[1][:8])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(3, 1, 8, 8, dtype=torch.uint8),
            torch.zeros(3).long(),
            r"got uint8; divide first: images.float\(\) / 255",
        ),
        (torch.full((3, 1, 8, 8), 1.5), torch.zeros(3).long(), "expected values in"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(4).long(), r"expected int64 \[3\]"),
        (torch.zeros(3, 1, 8, 8), torch.full((3,), 10), "expected below 10"),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0).long(), "at least one image"),
    ],
)
def test_bad_input_is_named(net, images, labels, message):
    with pytest.raises(ValueError, match=message):
        AutoAttack(threat=THREATS[0])(net, images, labels)
    with pytest.raises(ValueError, match="expected a threat model"):
        AutoAttack()(net, torch.zeros(1, 1, 8, 8), torch.zeros(1).long())


class Memory:
    """A journal that is due after every step, and stops the evaluation at the n-th."""

    def __init__(self, stop, path):
        self.stop, self.path, self.saved = stop, path, 0

    def load(self):
        return torch.load(self.path, weights_only=True) if self.path.exists() else None

    def due(self):
        return True

    def save(self, state):
        torch.save(state, self.path)
        self.saved += 1
        if self.saved == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 12, 60])
def test_a_stopped_evaluation_goes_on_to_the_bit(net, batch, tmp_path, stop):
    """Wherever it was stopped, in any attack and between them: the same rows and images."""
    attack = AutoAttack(threat=THREATS[0], **LITTLE)
    whole = attack(net, *batch, batch_size=10)
    with pytest.raises(KeyboardInterrupt):
        attack(net, *batch, batch_size=10, journal=Memory(stop, tmp_path / "state"))
    again = attack(net, *batch, batch_size=10, journal=Memory(-1, tmp_path / "state"))
    assert same_rows(whole.rows, again.rows)
    assert torch.equal(whole.images, again.images)


def test_progress_rises_and_tells_what_stands(net, batch):
    seen = []
    attack = AutoAttack(threat=THREATS[0], **LITTLE)
    result = attack(net, *batch, batch_size=10, watch=seen.append)
    shares = [s.share for s in seen]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(shares))
    assert shares[0] < 0.1
    assert shares[-1] > 0.9
    assert seen[-1].robust == int(result.robust.sum())
    assert next(s.attack for s in seen if s.left) == "apgd-ce"


# ---- the stage ----


@dataclass(frozen=True)
class Weights:
    """A subject for tests: the weights of the small network in a file."""

    path: str
    digest: str = "0" * 64
    gradients: bool = True

    def open(self, device):
        net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
        net.load_state_dict(torch.load(self.path, weights_only=True))
        return net.eval()


@pytest.fixture(scope="module")
def subject(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.pt"
    torch.save(net.state_dict(), path)
    return Weights(str(path))


@pytest.fixture(scope="module")
def real(digits):
    names = tuple(str(c) for c in range(10))
    parts = [Split(digits[0][a:b], digits[1][a:b]) for a, b in ((400, 500), (500, 540), (0, 64))]
    return ImageSet(
        name="digits", train=parts[0], validation=parts[1], test=parts[2], class_names=names, flip_safe=False
    )


SPEC = Assessment(
    autoattack=AutoAttack(threat=THREATS[0], **LITTLE),
    images=48,
    curve=(0.5, 3.0),
    curve_attack=PGD(steps=5, restarts=1),
    curve_images=24,
    check_images=12,
    batch_size=16,
    chunk=20,
)


def made(root, subject, real, workers=1, spec=SPEC):
    store = Store(root, machine=Machine(workers=workers))
    return store.once(assess, spec, subject, real, seed=0)


def test_the_stage_writes_rows_checks_and_facts(subject, real, tmp_path):
    """Rows for the images asked for, the curve on some of them, all doubts answered, nothing left of the chunks."""
    artifact = made(tmp_path, subject, real)
    table = pq.read_table(artifact.file("rows.parquet"))
    assert table["index"].to_pylist() == [round(i) for i in np.linspace(0, 63, 48).astype(int)]
    assert table["label"].to_pylist() == real.test.labels[table["index"].to_numpy()].tolist()
    assert sum(v is not None for v in table["robust@0.06"].to_pylist()) == 24
    robust = table["robust"].to_numpy().mean()
    curve = {e: np.mean([v for v in table[f"robust@{e}"].to_pylist() if v is not None]) for e in (0.06, 0.36)}
    assert curve[0.06] >= robust - 0.15
    assert curve[0.36] <= robust
    checks = {c["name"]: c["passed"] for c in read_json(artifact.file("checks.json"))}
    assert len(checks) >= 8
    facts = read_json(artifact.file("facts.json"))
    assert facts["images"] == 48
    assert facts["test_images"] == 64
    assert not facts["official"]
    assert any("48 of 64" in note for note in facts["notes"])
    assert not (artifact.folder / CHUNKS).exists()


def test_workers_change_nothing(subject, real, tmp_path):
    tables = []
    for workers in (1, 2):
        artifact = made(tmp_path / str(workers), subject, real, workers)
        tables.append(pq.read_table(artifact.file("rows.parquet")))
    assert same_rows(*tables)


def test_chunks_are_a_share_of_the_images(real, tmp_path):
    """Fixed by the plan, not by the processes; on disk as in memory."""
    chunks = chunks_of(SPEC, real, tmp_path)
    assert [len(c.index) for c in chunks] == [20, 20, 8]
    places = np.concatenate([c.index for c in chunks])
    for pictures in (Held(real.test, places), Kept.written(real.test, places, tmp_path)):
        for chunk in chunks:
            part = pictures.some(chunk.which)
            assert torch.equal(part.images, real.test.images[chunk.index])
            assert torch.equal(part.labels, real.test.labels[chunk.index])


def test_a_stopped_stage_goes_on(subject, real, tmp_path, monkeypatch):
    """Stopped in the second chunk: the first is kept, the second goes on from its state, the rows are the same."""
    calls, original, stop = [], autoattack.Chase.advance, [0]

    def counted(chase):
        calls.append(1)
        if len(calls) == stop[0]:
            raise KeyboardInterrupt
        original(chase)

    monkeypatch.setattr(autoattack.Chase, "advance", counted)
    whole = pq.read_table(made(tmp_path / "whole", subject, real).file("rows.parquet"))
    stop[0] = len(calls) + int(0.6 * len(calls))
    monkeypatch.setenv("GAMBESON_CHECKPOINT_SECONDS", "0")
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", subject, real)
    left = sorted(p.name for p in next((tmp_path / "cut").rglob(CHUNKS)).iterdir())
    assert "000000.rows.parquet" in left
    assert "000001.state.pt" in left
    monkeypatch.setattr(autoattack.Chase, "advance", original)
    again = pq.read_table(made(tmp_path / "cut", subject, real).file("rows.parquet"))
    assert same_rows(whole, again)


def test_what_stands_is_told_on_the_way(subject, real, tmp_path):
    said, progress = [], []
    work = Workspace(tmp_path, lambda done, total: progress.append((done, total)), say=said.append)
    assess.work(work, SPEC, subject, real, seed=0)
    assert progress[-1] == (48, 48)
    robust = pq.read_table(tmp_path / "rows.parquet")["robust"].to_numpy().sum()
    assert f"standing so far: {robust} of 48 images begun" in said[-3]
    assert json.loads((tmp_path / "checks.json").read_text())
    assert said[-2:] == ["curve: 2 of 2 epsilons measured", "checks: the evaluation doubts itself"]
    assert [b for a, b in progress] == [48] * len(progress)
    assert [a for a, b in progress] == sorted(a for a, b in progress)


class Tensors(pickle.Pickler):
    """Notes the tensors in what it pickles."""

    def __init__(self):
        self.file, self.found = io.BytesIO(), []
        super().__init__(self.file)

    def persistent_id(self, thing):
        if isinstance(thing, torch.Tensor):
            self.found.append(thing.shape)


def test_workers_are_sent_no_image(subject, real, tmp_path, monkeypatch):
    """Neither as tensors, which take descriptors and shared memory, nor as arrays: they map a file."""
    sent = []

    @contextmanager
    def watched(workers):
        with pool(workers) as executor:
            submit = executor.submit
            executor.submit = lambda work, *given: sent.append((work, given)) or submit(work, *given)
            yield executor

    monkeypatch.setattr(assess_stage, "pool", watched)
    artifact = made(tmp_path, subject, real, 2)
    assert len(sent) == 2
    for each in sent:
        pickler = Tensors()
        pickler.dump(each)
        assert pickler.found == []
        assert len(pickler.file.getvalue()) < 5000 < 4 * real.test.images[:20].numel()
    assert not (artifact.folder / CHUNKS).exists()


def interrupted(monkeypatch, place, stop):
    """Lets a function of the stage be interrupted at its n-th call; the calls."""
    calls, original = [], getattr(assess_stage, place)

    def counted(*given):
        calls.append(given)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(assess_stage, place, counted)
    return calls


def test_a_curve_goes_on_at_its_next_epsilon(subject, real, tmp_path, monkeypatch):
    whole = pq.read_table(made(tmp_path / "whole", subject, real).file("rows.parquet"))
    with monkeypatch.context() as patch:
        calls = interrupted(patch, "robust_after", 2)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "cut", subject, real)
    left = sorted(p.name for p in next((tmp_path / "cut").rglob(CHUNKS)).glob("*.parquet"))
    assert left == [f"00000{k}.rows.parquet" for k in range(3)] + ["curve-000.rows.parquet"]
    calls = interrupted(monkeypatch, "robust_after", -1)
    again = pq.read_table(made(tmp_path / "cut", subject, real).file("rows.parquet"))
    assert [round(call[0].threat.epsilon, 6) for call in calls] == [0.36]
    assert same_rows(whole, again)


def test_killed_before_its_record_it_leaves_no_chunks(subject, real, tmp_path, monkeypatch):
    """All files are there, and so are still the chunks: the next start removes them and makes nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(assess_stage.shutil, "rmtree", lambda folder, ignore_errors: None)
        artifact = made(tmp_path, subject, real)
    (artifact.folder / "done.json").unlink()
    assert (artifact.folder / CHUNKS).exists()
    rows = artifact.folder / "rows.parquet"
    written = rows.stat().st_mtime_ns
    assert not (made(tmp_path, subject, real).folder / CHUNKS).exists()
    assert rows.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["000000.state.pt", "000000.rows.parquet", "curve-000.rows.parquet"])
@pytest.mark.parametrize("content", [b"", b"PK\3\4 and no more", b"PAR1 and no more PAR1"])
def test_a_damaged_file_of_the_chunks_is_named(name, content, subject, real, tmp_path):
    work = Workspace(tmp_path)
    (tmp_path / CHUNKS).mkdir()
    (tmp_path / CHUNKS / name).write_bytes(content)
    spec = replace(SPEC, autoattack=replace(SPEC.autoattack, steps=1, queries=1), images=6, curve_images=6)
    with pytest.raises(EnvironmentFault, match=rf"{name}: expected .* damaged .*Remove it and start the same command"):
        assess.work(work, spec, subject, real, seed=0)
    (tmp_path / CHUNKS / name).unlink()
    assess.work(work, spec, subject, real, seed=0)


def test_news_that_were_cut_off_are_no_news(subject, real, tmp_path):
    """Of a chunk that another process begins, after a power cut."""
    (tmp_path / CHUNKS).mkdir()
    (tmp_path / CHUNKS / "000001.standing.json").write_text("")
    assess.work(Workspace(tmp_path), replace(SPEC, images=24, curve=()), subject, real, seed=0)
    assert (tmp_path / "facts.json").exists()


@dataclass(frozen=True)
class Counted:
    """A subject that notes how many images its network was given at once."""

    subject: Weights
    seen: list
    digest: str = "1" * 64
    gradients: bool = True

    def open(self, device):
        net = self.subject.open(device)
        return lambda x: self.seen.append(len(x)) or net(x)


def test_the_network_never_gets_more_than_a_batch(subject, real, tmp_path):
    """Neither in the attacks, nor on the curve, nor in the doubts."""
    seen = []
    spec = replace(SPEC, images=30, curve=(2.0,), check_images=24, batch_size=5)
    assess.work(Workspace(tmp_path), spec, Counted(subject, seen), real, seed=0)
    assert max(seen) == 5


def test_a_full_disk_is_the_machines_fault(tmp_path):
    """Files may not grow beyond 64 KiB: the state is refused, the one before it stays, nothing is half-written."""
    journal, state = StateFile(tmp_path / "state.pt", 0.0), {"a": torch.zeros(9), "b": [1, 2]}
    journal.save(state)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
        with pytest.raises(EnvironmentFault, match=r"state\.pt: expected to write this file, got: File too large"):
            journal.save({"a": torch.zeros(300_000), "b": [1, 2]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert torch.equal(journal.load()["a"], state["a"])


def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    """A state that takes 3 s is saved every minute, though one every 10 s was asked for."""
    clock, journal = [100.0], StateFile(tmp_path / "state.pt", 10.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    journal.last = 100.0
    monkeypatch.setattr(torch, "save", lambda state, file: clock.__setitem__(0, clock[0] + 3))
    due = []
    for clock[0] in (109.0, 110.0):
        due.append(journal.due())
    journal.save({})
    for clock[0] in (123.0, 172.9, 173.0):
        due.append(journal.due())
    assert due == [False, True, False, False, True]


# ---- the doubts of the stage ----


def doubts_of(subject, real, folder, *attacks):
    """Check -> whether it passed, and the rows, of an evaluation with these attacks."""
    attack = AutoAttack(threat=THREATS[0], version="custom", attacks=attacks, steps=8, queries=40)
    assess.work(Workspace(folder), replace(SPEC, autoattack=attack), subject, real, seed=0)
    checks = {check["name"]: check for check in json.loads((folder / "checks.json").read_text())}
    return checks, pq.read_table(folder / "rows.parquet")


def test_what_square_did_first_tells_nothing_of_gradients(subject, real, tmp_path):
    """Alone, or before the attacks with gradients, it is not compared with them; only behind them it is."""
    by_hand = pa.table({"robust": [True, False, False], "broken_by": [None, "square", "apgd-ce"]})
    custom = replace(SPEC.autoattack, version="custom", attacks=("square",))
    for attacks, compared in {
        ("square",): False,
        ("square", "apgd-ce"): False,
        ("apgd-ce", "square"): True,
        ("apgd-ce", "square", "apgd-t"): True,
    }.items():
        spec = replace(SPEC, autoattack=replace(custom, attacks=attacks))
        assert stood_white_box(spec, by_hand).tolist() == [True, compared, False]
    checks, rows = doubts_of(subject, real, tmp_path, "square", "apgd-ce")
    assert "Square not stronger than gradients" not in checks
    places = [i for i, robust in enumerate(rows["robust@0.06"].to_pylist()) if robust is not None]
    some = [places[i] for i in np.unique(np.linspace(0, 23, 12).astype(int))]
    claimed = sum(rows["robust"].to_pylist()[i] for i in some)
    assert "square" in [rows["broken_by"].to_pylist()[i] for i in some], "otherwise nothing is shown"
    assert f"of {claimed} images called robust" in checks["black box not stronger"]["detail"]
    assert f"{claimed / 12:.1%} at 0.12" in checks["accuracy falls"]["detail"]


def test_without_gradients_one_line_stands_for_their_checks(subject, real, tmp_path):
    checks, rows = doubts_of(replace(subject, gradients=False), real, tmp_path, "square")
    assert not any(name.startswith("robust@") for name in rows.column_names)
    assert [name for name in checks if "gradient" in name or "zero" in name] == ["gradients can be checked"]
    assert not checks["gradients can be checked"]["passed"]
    others = ("logits, not probabilities", "deterministic", "batch independent", "preprocessing inside")
    assert all(checks[name]["passed"] for name in others)
