"""RobustBench in and out: entries by name, files as the zoo has them, and a submission that its own loader takes."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from gambeson.errors import UserError
from gambeson.models.export import load_robustbench
from gambeson.models.preact_resnet import PreActResNetSpec
from gambeson.models.resnet import ResNetSpec
from gambeson.models.wideresnet import WideResNetSpec
from gambeson.robustness import zoo
from gambeson.robustness.zoo import ENTRIES, Measurement, Paper, by_hand, load_zoo, write_submission
from gambeson.threat import ThreatModel

RIGHT = Measurement(clean=0.92444, autoattack=0.673125, n=10_000, dataset="cifar10", threat=ThreatModel())
PAPER = Paper(
    link="https://arxiv.org/abs/2302.04638",
    name="Better",
    authors="A, B",
    venue="ICML 2023",
    additional_data=False,
    footnote="It uses additional 20M synthetic images in training.",
)


def rand(number):
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(spec, classes=10):
    """A network in eval mode whose batch-norm statistics are not the initial ones."""
    model = spec.build(3, classes, seed=4)
    with torch.no_grad():
        model.train()(rand(8))
    return model.eval()


def small(**fields):
    return trained(WideResNetSpec(depth=10, width=1, **fields))


# ---- in ----


def test_every_entry_is_what_its_name_says():
    """Where the name says depth and width; the rest as their lines in the zoo (all of them with SiLU)."""
    unsaid = {"Gowal2020Uncovering": (70, 16), "Rade2021Helper_ddpm": (28, 10), "Rade2021Helper_extra": (34, 10)}
    unsaid |= {f"Gowal2020Uncovering{end}": (70, 16) for end in ("_extra", "_Linf", "_extra_Linf")}
    for entry in ENTRIES:
        numbers = re.search(r"_(?:WRN-?)?(\d+)[-_](\d+)", entry.name)
        preact = re.search("_R(18)", entry.name)
        said = (int(numbers[1]), int(numbers[2])) if numbers else (int(preact[1]), 0) if preact else unsaid[entry.name]
        assert (entry.depth, entry.width) == said, entry
        assert entry.spec.activation == "silu"
        assert entry.spec.mean == ((0.4914, 0.4822, 0.4465) if entry.dataset == "cifar10" else (0.5071, 0.4865, 0.4409))
        assert entry.paper.startswith("https://")
        assert entry.additional_data == ("extra" in entry.name)
    assert len({(e.dataset, e.board, e.name) for e in ENTRIES}) == len(ENTRIES) == 48
    assert [e.name for e in ENTRIES if not e.checked] == ["Bartoldson2024Adversarial_WRN-82-8"]


def test_one_name_is_one_architecture_wherever_it_stands():
    """What the file does not say (the board) must not matter; what it says (the classes) may."""
    for entry in ENTRIES:
        same = {(e.depth, e.width) for e in ENTRIES if e.name == entry.name and e.dataset == entry.dataset}
        assert len(same) == 1


def test_sizes_are_the_papers():
    """Gowal et al. 2020: 36 and 267 million parameters."""
    sizes = {}
    for name in ("Wang2023Better_WRN-28-10", "Wang2023Better_WRN-70-16"):
        entry = next(e for e in ENTRIES if e.name == name)
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in entry.spec.build(3, 10).parameters()) / 1e6
    assert list(sizes.values()) == [pytest.approx(36.48, abs=0.01), pytest.approx(266.8, abs=0.1)]


@pytest.mark.parametrize("classes", [10, 100])
def test_an_entry_loads_by_the_name_of_its_file(classes, tmp_path):
    """The classes in the file tell which data set's pixels it was trained on."""
    mean, std = zoo.PIXELS[classes]
    model, path = trained(PreActResNetSpec(mean=mean, std=std), classes), tmp_path / "Rade2021Helper_R18_ddpm.pt"
    torch.save(model.state_dict(), path)
    loaded = load_zoo(path)
    torch.testing.assert_close(loaded(rand(2)), model(rand(2)), rtol=0, atol=0)
    assert loaded.normalisation == (mean, std)
    assert not loaded.training
    path.rename(tmp_path / "best.pt")
    torch.testing.assert_close(load_zoo(tmp_path / "best.pt", path.stem)(rand(2)), model(rand(2)), rtol=0, atol=0)


def test_files_saved_from_the_zoos_own_classes_load(tmp_path):
    """They have mean and std in them, and wrappers and prefixes around the names."""
    model = small()
    pixels = {"mean": torch.tensor(model.spec.mean).view(3, 1, 1), "std": torch.tensor(model.spec.std).view(3, 1, 1)}
    named = {f"module.{name}": value for name, value in {**pixels, **model.state_dict()}.items()}
    torch.save({"state_dict": named, "epoch": 3}, tmp_path / "a.pt")
    torch.testing.assert_close(load_zoo(tmp_path / "a.pt", "WRN-10-1")(rand(2)), model(rand(2)), rtol=0, atol=0)
    torch.save({**model.state_dict(), "mean": torch.full((3, 1, 1), 0.5)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"b\.pt: expected pixels with mean .*0\.4914.* got a file with \[0\.5"):
        load_zoo(tmp_path / "b.pt", "WRN-10-1")


def test_an_architecture_by_hand(tmp_path):
    model = small(activation="relu")
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    torch.testing.assert_close(load_zoo(tmp_path / "mine.pt", "wrn-10-1-relu")(rand(2)), model(rand(2)))
    assert not torch.allclose(load_zoo(tmp_path / "mine.pt", "WRN-10-1")(rand(2)), model(rand(2)))
    assert by_hand("PreActResNet-34", 100) == PreActResNetSpec(
        depth=34, mean=zoo.PIXELS[100][0], std=zoo.PIXELS[100][1]
    )
    for text in ("WRN-28", "ResNet-18", "WRN-28-10-gelu", ""):
        with pytest.raises(UserError, match="architecture: expected WRN-DEPTH-WIDTH"):
            by_hand(text, 10)
    for text, match in (("WRN-29-10", "depth"), ("PreActResNet-50", "18 or 34"), ("WRN-28-0", "width")):
        with pytest.raises(UserError, match=match):
            by_hand(text, 10)
    with pytest.raises(UserError, match="10 or 100"):
        by_hand("WRN-28-10", 7)


def test_what_is_no_entry_is_answered_with_the_nearest(tmp_path):
    path = tmp_path / "Wang2023Better_WRN-28-11.pt"
    torch.save(small().state_dict(), path)
    with pytest.raises(UserError, match=r"such as Wang2023Better_WRN-28-10, .*got 'Wang2023Better_WRN-28-11'.*ONNX"):
        load_zoo(path)
    with pytest.raises(UserError, match="WRN-28-10 or PreActResNet-18"):
        load_zoo(path, "Carmon2019Unlabeled")
    torch.save(trained(WideResNetSpec(depth=10, width=1), 7).state_dict(), path)
    with pytest.raises(UserError, match=r"classes: expected 10, as Xu2023Exploring_WRN-28-10 has, got 7"):
        load_zoo(path, "Xu2023Exploring_WRN-28-10")
    with pytest.raises(UserError, match="expected weights as torch"):
        load_zoo(tmp_path / "Wang2023Better_WRN-28-10.pt")
    torch.save({"lr": 0.1}, path)
    with pytest.raises(UserError, match="expected weights"):
        load_zoo(path, "WRN-10-1")
    torch.save(small().state_dict(), path)
    with pytest.raises(UserError, match="another shape"):
        load_zoo(path, "WRN-10-2")
    with pytest.raises(UserError, match="expected the weights of a PreActResNet"):
        load_zoo(path, "PreActResNet-18")


# ---- out ----


def test_the_record_has_the_boards_keys_and_formats():
    """model_info/cifar10/Linf/Wang2023Better_WRN-28-10.json, key by key."""
    wide = WideResNetSpec(depth=28, width=10)
    with torch.device("meta"):
        record = zoo.leaderboard(wide.build(3, 10), RIGHT, PAPER)
    assert json.loads(json.dumps(record)) == {
        "link": "https://arxiv.org/abs/2302.04638",
        "name": "Better",
        "authors": "A, B",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "ICML 2023",
        "architecture": "WideResNet-28-10",
        "eps": "8/255",
        "clean_acc": "92.44",
        "reported": "67.31",
        "autoattack_acc": "67.31",
        "footnote": "It uses additional 20M synthetic images in training.",
        "unreliable": False,
    }
    with torch.device("meta"):
        preact = PreActResNetSpec().build(3, 10)
    half = replace(RIGHT, threat=ThreatModel(norm="l2", epsilon=0.5), reported=0.7)
    record = zoo.leaderboard(preact, half, replace(PAPER, footnote=""))
    assert (record["architecture"], record["eps"], record["reported"]) == ("PreActResNet-18", "0.5", "70.00")
    assert "footnote" not in record
    assert not record["unreliable"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dataset": "cifar100"}, None),
        ({"n": 1000}, "1,000 images were attacked, not all 10,000"),
        ({"version": "plus"}, "plus, not standard"),
        ({"precision": "bfloat16"}, "bfloat16, not float32"),
        ({"dataset": "digits"}, "no board of digits"),
        ({"threat": ThreatModel(epsilon=4 / 255)}, "no board of cifar10 under linf"),
        ({"threat": ThreatModel(norm="l1", epsilon=12.0)}, "no board of cifar10 under l1"),
        ({"dataset": "cifar100", "threat": ThreatModel(norm="l2", epsilon=0.5)}, "no board of cifar100"),
    ],
)
def test_numbers_that_are_not_robustbenchs_say_so(change, reason):
    found = replace(RIGHT, **change)
    record = zoo.leaderboard(small(), found, PAPER)
    assert record["unreliable"] == (reason is not None)
    if reason is None:
        assert zoo.shortfalls(found) == []
        assert record["footnote"] == PAPER.footnote
    else:
        assert len(zoo.shortfalls(found)) == 1
        assert record["footnote"].startswith("Not a RobustBench number: ")
        assert reason in record["footnote"]
        assert record["footnote"].endswith(PAPER.footnote)


def test_a_radius_reads_as_on_the_board():
    assert zoo.radius(ThreatModel(epsilon=0.1)) == "0.1"
    assert zoo.radius(ThreatModel(epsilon=16 / 255)) == "16/255"
    assert zoo.radius(ThreatModel(norm="l2", epsilon=128 / 255)) == "0.501961"
    assert zoo.radius(ThreatModel(norm="l2", epsilon=1.0)) == "1"


def test_a_submission_is_laid_out_as_the_zoo_and_comes_back(tmp_path):
    model, folder = small(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.25)), tmp_path / "out"
    found = replace(RIGHT, n=500, version="plus")
    reasons = write_submission(folder, model, "Doe2026Padding_WRN-10-1", found, PAPER)
    assert len(reasons) == 2
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "README.md",
        "entry.py",
        "model_info/cifar10/Linf/Doe2026Padding_WRN-10-1.json",
        "models/cifar10/Linf/Doe2026Padding_WRN-10-1.pt",
    ]
    weights = folder / "models/cifar10/Linf/Doe2026Padding_WRN-10-1.pt"
    assert json.loads((folder / "model_info/cifar10/Linf/Doe2026Padding_WRN-10-1.json").read_text())["unreliable"]
    torch.testing.assert_close(load_robustbench(weights, model.spec)(rand(2)), model(rand(2)), rtol=0, atol=0)
    readme = (folder / "README.md").read_text()
    assert readme.count("**Not a RobustBench number: ") == 2
    assert "500 images were attacked" in readme
    assert "92.44%" in readme
    built = []
    entry = eval(  # the lines are Python: a pair of the name and how the zoo builds it
        "".join(line for line in (folder / "entry.py").read_text().splitlines() if not line.startswith("#")).rstrip(
            ","
        ),
        {"DMWideResNet": lambda **fields: built.append(fields), "nn": nn},
    )
    assert entry[0] == "Doe2026Padding_WRN-10-1"
    entry[1]["model"]()
    assert built == [
        {
            "num_classes": 10,
            "depth": 10,
            "width": 1,
            "activation_fn": nn.SiLU,
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.2, 0.25),
            "num_input_channels": 3,
        }
    ]


def test_the_readmes_code_is_code_and_loads_the_network(tmp_path, monkeypatch):
    """The first lines of 'Verify with gambeson' run; those of RobustBench compile."""
    model = small()
    write_submission(tmp_path, model, "Doe2026Padding", RIGHT, PAPER)
    theirs, ours = re.findall("```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)
    compile(theirs, "theirs", "exec")
    compile(ours, "ours", "exec")
    monkeypatch.chdir(tmp_path)
    lines = [
        line for line in ours.splitlines() if "AutoAttack" not in line and "print" not in line and "test" not in line
    ]
    space = {}
    exec("\n".join(lines), space)
    torch.testing.assert_close(space["model"](rand(2)), model(rand(2)), rtol=0, atol=0)
    assert "Not a RobustBench number" not in (tmp_path / "README.md").read_text()


def test_submissions_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="which its zoo has classes for, got a SmallResNet"):
        write_submission(folder, ResNetSpec(width=4).build(3, 10), "Doe2026Padding", RIGHT, PAPER)
    for name in ("padding", "Doe2026", "Doe2026Padding/x", "doe2026Padding", "../Doe2026Padding", "Doe2026Padding_'"):
        with pytest.raises(UserError, match="FirstauthorYEARWord"):
            write_submission(folder, small(), name, RIGHT, PAPER)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="a new or empty folder"):
        write_submission(folder, small(), "Doe2026Padding", RIGHT, PAPER)
    for change in ({"clean": 1.2}, {"autoattack": 0.95}, {"n": 0}):
        with pytest.raises(UserError, match="measurement"):
            replace(RIGHT, **change)
