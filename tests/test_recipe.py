"""Recipes as files, digests and command lines: exact, the same in every process, and with errors that teach."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gambeson import canonical, files, overrides
from gambeson.errors import EnvironmentFault, UserError, nearest, unknown
from gambeson.threat import ThreatModel


class Mode(Enum):
    FAST = "fast"
    OFF = "off"  # which YAML 1.1 reads as false unless it is quoted


@dataclass(frozen=True, kw_only=True)
class Heun:
    steps: int = 12  # network steps
    churn: float = 0.0  # noise added back


@dataclass(frozen=True, kw_only=True)
class DDIM:
    steps: int = 50  # network steps of DDIM
    eta: float = 0.0  # 0 deterministic, 1 ancestral


@dataclass(frozen=True, kw_only=True)
class Window:
    start: float = 0.2  # first guided time
    stop: float = 0.8  # last guided time

    def __post_init__(self) -> None:
        if self.start >= self.stop:
            raise ValueError(f"window: expected start < stop, got {self.start} and {self.stop}")


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    strength: float = 0.5  # how hard it pushes
    window: Window = Window()  # when it acts


@dataclass(frozen=True, kw_only=True)
class PGD:
    steps: int = 40  # iterations


@dataclass(frozen=True, kw_only=True)
class APGD:
    loss: Literal["ce", "dlr"] = "ce"  # what is climbed
    inner: Heun | DDIM | None = None  # a choice inside a choice


@dataclass(frozen=True, kw_only=True)
class Generation:
    count: int = 4000  # images to generate
    sampler: Heun | DDIM = Heun()  # how noise is walked down
    guidance: Contrastive | None = None  # what steers; none: nothing
    mode: Mode = Mode.FAST  # which mode
    limit: int | None = None  # at most so many
    widths: tuple[int, ...] = (32, 64)  # channels per level
    later: float = field(default=1.0, metadata={"neutral": 1.0})  # added in a later version


@dataclass(frozen=True, kw_only=True)
class Tree:
    name: str = "digits"  # name of the run
    flip: bool = True  # whether to mirror
    threat: ThreatModel = ThreatModel()  # what the attacker may do
    generation: Generation = Generation()  # synthetic images
    attacks: tuple[PGD | APGD, ...] = (PGD(), APGD())  # the evaluation
    radii: tuple[float, ...] = (0.1, 0.2)  # of the curve
    tags: tuple[str, ...] = ("a", "none")  # words


CLASSES: dict[str, type] = {
    c.__name__: c for c in (Heun, DDIM, Window, Contrastive, PGD, APGD, Generation, ThreatModel)
}
GUIDED = Tree(generation=Generation(guidance=Contrastive()))
SAMPLE = Tree(
    name="it's: a # name\nin two lines ",
    threat=ThreatModel(norm="l2", epsilon=0.1 + 0.2),
    generation=Generation(sampler=DDIM(eta=1e-300), guidance=Contrastive(strength=1e22), mode=Mode.OFF, widths=()),
    attacks=(APGD(loss="dlr", inner=DDIM()), PGD(steps=3), APGD(inner=Heun(churn=1 / 3))),
    radii=(1e-5, 5e-324, 1.7976931348623157e308),
)


def cli(*argv: str, default: Tree = GUIDED) -> Tree:
    return overrides.parse(default, list(argv), "gambeson run digits")


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


# canonical


def test_plain_is_json_with_class_names() -> None:
    tree = canonical.plain(SAMPLE)
    assert tree["class"] == "Tree"
    assert tree["generation"]["sampler"] == {"class": "DDIM", "steps": 50, "eta": 1e-300}
    assert tree["generation"]["mode"] == "off"
    assert tree["generation"]["widths"] == []
    assert [a["class"] for a in tree["attacks"]] == ["APGD", "PGD", "APGD"]


def test_equal_recipes_have_equal_digests() -> None:
    assert canonical.digest(Heun(churn=1)) == canonical.digest(Heun(churn=1.0))
    assert canonical.digest(Heun(churn=-0.0)) == canonical.digest(Heun())
    assert canonical.digest(Tree(radii=(1, 2))) == canonical.digest(Tree(radii=(1.0, 2.0)))
    assert canonical.digest(Tree(), "a", 1) != canonical.digest(Tree(), "a", 2)
    assert canonical.digest(Heun(steps=50)) != canonical.digest(DDIM(steps=50))
    assert canonical.digest("1") != canonical.digest(1)
    assert re.fullmatch("[0-9a-f]{64}", canonical.digest(Tree()))


def test_every_field_counts_in_the_digest() -> None:
    for path, *_ in overrides.flat_fields(GUIDED):
        if path.startswith("generation.guidance.window"):
            continue
        words = {"attacks": ["PGD"], "threat.norm": ["l2"], "flip": ["false"], "generation.mode": ["off"]}.get(path)
        words = words or {"sampler": ["DDIM"], "guidance": ["none"], "loss": ["dlr"], "inner": ["Heun"]}.get(
            path.rpartition(".")[2], ["7"]
        )
        assert canonical.digest(cli(f"--{path}", *words)) != canonical.digest(GUIDED), path


def test_a_field_at_its_neutral_value_is_left_out_of_the_digest() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Before:
        count: int = 1

    @dataclass(frozen=True, kw_only=True)
    class After:
        count: int = 1
        later: float = field(default=2.0, metadata={"neutral": 2.0})

    After.__name__ = "Before"
    assert canonical.digest(After()) == canonical.digest(Before())
    assert canonical.digest(After(later=3.0)) != canonical.digest(Before())
    assert canonical.plain(After())["later"] == 2.0


def test_another_process_computes_the_same_digest() -> None:
    code = "import test_recipe as t; print(t.canonical.digest(t.SAMPLE, {'b': 1, 'a': (2.5, None)}))"
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": f"{root}{os.pathsep}{root.parent}"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert out.stdout.strip() == canonical.digest(SAMPLE, {"a": (2.5, None), "b": 1})


def test_what_is_no_recipe_value_is_refused_with_its_path() -> None:
    assert "sampler.churn: expected a finite number, got nan" in refused(
        lambda: canonical.digest(Generation(sampler=Heun(churn=float("nan"))))
    )
    assert "count: expected int, got 8000.0" in refused(lambda: canonical.digest(Generation(count=8000.0)))  # type: ignore[arg-type]
    assert "limit: expected a number" in refused(lambda: canonical.digest(Generation(limit=object())))  # type: ignore[arg-type]


def test_canonical_and_errors_import_nothing_heavy() -> None:
    code = (
        "import sys, gambeson.canonical, gambeson.files, gambeson.overrides, gambeson.errors;"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'tyro', 'yaml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_type_that_is_neither_leaf_nor_component_is_our_mistake() -> None:
    for hint in (Callable[[], int], dict, Heun | int, tuple[Heun, DDIM]):
        with pytest.raises(TypeError, match="recipe field"):
            canonical.components(hint)


# files


@pytest.mark.parametrize("recipe", [Tree(), SAMPLE, GUIDED, Tree(attacks=(), radii=())], ids=repr)
def test_a_file_gives_the_recipe_back_exactly(recipe: Tree, tmp_path: Path) -> None:
    files.save(recipe, tmp_path / "recipe.yaml")
    again = files.load(tmp_path / "recipe.yaml", Tree, CLASSES)
    assert again == recipe
    assert repr(again) == repr(recipe)
    assert canonical.digest(again) == canonical.digest(recipe)


@settings(max_examples=30, deadline=None)
@example(number=-0.0, count=-1, text="\x85")
@example(number=0.1, count=0, text="one\ntwo\u2028three\ufeff é 🛡")
@given(
    number=st.floats(allow_nan=False, allow_infinity=False),
    count=st.integers(),
    text=st.text(st.characters(blacklist_categories=["Cs"])),
)
def test_any_leaf_survives_a_file_and_the_command_line(number: float, count: int, text: str) -> None:
    number += 0.0  # -0.0 equals 0.0 and is written as 0.0
    recipe = Tree(name=text, tags=(text, "x"), radii=(number,), generation=Generation(count=count, later=number))
    assert repr(files.build(files.parse_yaml(files.dump(recipe)), Tree)) == repr(recipe)
    assert canonical.digest(files.build(files.parse_yaml(files.dump(recipe)), Tree)) == canonical.digest(recipe)
    recipe = replace(recipe, tags=("a", "none"))
    words = [f"--radii={number}", f"--generation.later={number}", f"--generation.count={count}", f"--name={text}"]
    assert repr(cli(*words, default=Tree())) == repr(recipe)


def test_yaml_may_share_and_merge_parts() -> None:
    text = "generation: {sampler: {class: DDIM, <<: &a {steps: 7}}}\nattacks: [{class: PGD, <<: *a, steps: 8}]"
    recipe = files.build(files.parse_yaml(text), Tree)
    assert recipe == Tree(generation=Generation(sampler=DDIM(steps=7)), attacks=(PGD(steps=8),))


def test_the_file_reads_well(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    files.save(GUIDED, path)
    text = path.read_text()
    assert text.startswith("# A gambeson recipe, written by gambeson 0.")
    assert f"gambeson run {path}" in text
    for line in (
        "name: digits  # name of the run",
        "threat:  # what the attacker may do",
        "  norm: linf  # which norm bounds the perturbation: linf, l2 or l1",
        "  sampler:  # how noise is walked down [Heun | DDIM]",
        "    class: Heun",
        "  guidance:  # what steers; none: nothing [Contrastive | none]",
        "    window:  # when it acts",
        "  widths: [32, 64]  # channels per level",
        "  - class: PGD",
        "    steps: 40  # iterations",
    ):
        assert line in text.splitlines()
    names = [f.name for f in fields(Tree)]
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == names
    assert list(tmp_path.iterdir()) == [path]


def test_a_short_file_is_enough() -> None:
    text = "threat: {epsilon: 1e-3}\ngeneration: {sampler: DDIM, guidance: none, later: 3}\nradii: [8/255, 1]"
    recipe = files.build(files.parse_yaml(text), Tree)
    assert recipe == Tree(
        threat=ThreatModel(epsilon=1e-3), generation=Generation(sampler=DDIM(), later=3.0), radii=(8 / 255, 1.0)
    )
    assert isinstance(recipe.radii[1], float)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("generation: {count: abc}", ["generation.count", "expected int", "'abc'"]),
        ("generation: {count: 8.5}", ["generation.count", "expected int", "8.5"]),
        ("generation: {count: '8'}", ["generation.count", "expected int", "text '8'"]),
        ("generation: {count: true}", ["generation.count", "expected int", "true"]),
        ("threat: {epsilon: true}", ["threat.epsilon", "expected float"]),
        ("threat: {epsilon: .nan}", ["threat.epsilon", "expected float", "NaN"]),
        ("threat: {epsilon: 8/0}", ["threat.epsilon", "expected float", "8/0"]),
        ("threat: {epsilon: 0}", ["threat epsilon: expected a finite number above 0", "8/255"]),
        ("threat: {norm: l0}", ["threat.norm", "expected linf or l2 or l1", "'l0'"]),
        ("name: 5", ["name", "expected text", "5"]),
        ("name: 2020-01-01", ["name", "expected text", "2020-01-01"]),
        ("radii: 0.1", ["radii", "expected several of float"]),
        ("radii: [0.1, x]", ["radii", "expected several of float", "x"]),
        ("generation: {mode: slow}", ["generation.mode", "expected fast or off"]),
        ("generation: {sampler: {class: DIM}}", ["generation.sampler", "expected one of DDIM, Heun", "'DIM'"]),
        ("generation: {sampler: {class: PGD}}", ["generation.sampler", "does not fit here"]),
        ("generation: {sampler: {steps: 3}}", ["generation.sampler", "`class:`", "Heun, DDIM"]),
        ("generation: {sampler: {class: Heun, stepz: 3}}", ["generation.sampler.stepz", "nearest: steps"]),
        ("generation: {sampler: 3}", ["generation.sampler", "expected fields of Heun or DDIM"]),
        ("generation: {guidance: {class: none, strength: 3}}", ["generation.guidance.strength"]),
        ("attacks: [{class: PGD}, {class: APGD, loss: x}]", ["attacks.1.loss", "ce or dlr"]),
        ("attacks: {class: PGD}", ["attacks", "expected a list of"]),
        ("generatoin: {count: 3}", ["generatoin", "nearest: generation"]),
        ("3: 4", ["3", "no such field"]),
        ("generation: {sampler: {class: [DDIM]}}", ["generation.sampler", "['DDIM']"]),
        ("? [a]\n: 4", ["expected YAML"]),
        (
            "generation: {guidance: {class: Contrastive, window: {start: 1}}}",
            ["generation.guidance.window", "start < stop"],
        ),
        ("name: a\nname: b", ["line 2", "'name' twice"]),
        ("name: [", ["line 1", "expected YAML"]),
        ("[1, 2]", ["expected the fields of a Tree"]),
        ("", ["expected the fields of a Tree"]),
        ("a: !!python/object:os.system x", ["expected YAML"]),
    ],
)
def test_what_a_file_has_wrong_is_named(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    message = refused(lambda: files.load(tmp_path / "r.yaml", Tree, CLASSES))
    for part in [str(tmp_path / "r.yaml"), *parts]:
        assert part in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    assert "No such file" in refused(lambda: files.load(tmp_path / "absent.yaml", Tree))
    assert "recipe file" in refused(lambda: files.load(tmp_path, Tree))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "recipe file" in refused(lambda: files.load(tmp_path / "binary.yaml", Tree))
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentFault):
        files.save(Tree(), tmp_path / "file" / "recipe.yaml")


# command line


def test_no_words_no_change() -> None:
    assert cli() is GUIDED


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--generation.count 8000", replace(GUIDED, generation=replace(GUIDED.generation, count=8000))),
        ("--generation.count=8000", replace(GUIDED, generation=replace(GUIDED.generation, count=8000))),
        ("--threat.epsilon 8/255 --threat.norm l2", replace(GUIDED, threat=ThreatModel(norm="l2", epsilon=8 / 255))),
        ("--threat.epsilon 1e-3", replace(GUIDED, threat=ThreatModel(epsilon=1e-3))),
        ("--flip false", replace(GUIDED, flip=False)),
        ("--flip", GUIDED),
        ("--name 5", replace(GUIDED, name="5")),
        ("--radii 1 2e-1 8/255", replace(GUIDED, radii=(1.0, 0.2, 8 / 255))),
        ("--radii [1,2]", replace(GUIDED, radii=(1.0, 2.0))),
        ("--radii", replace(GUIDED, radii=())),
        ("--generation.limit 7", replace(GUIDED, generation=replace(GUIDED.generation, limit=7))),
        ("--generation.limit none", GUIDED),
        ("--generation.mode off", replace(GUIDED, generation=replace(GUIDED.generation, mode=Mode.OFF))),
        ("--generation.guidance none", replace(GUIDED, generation=Generation())),
        (
            "--generation.sampler.eta .5 --generation.sampler DDIM",
            replace(GUIDED, generation=replace(GUIDED.generation, sampler=DDIM(eta=0.5))),
        ),
        ("--attacks", replace(GUIDED, attacks=())),
        ("--attacks.0.steps 3", replace(GUIDED, attacks=(PGD(steps=3), APGD()))),
        (
            "--attacks APGD PGD --attacks.0.inner DDIM --attacks.0.inner.eta 1 --attacks.1.steps 2",
            replace(GUIDED, attacks=(APGD(inner=DDIM(eta=1.0)), PGD(steps=2))),
        ),
        (  # each alone would be refused by the window, together they are right
            "--generation.guidance.window.start 2 --generation.guidance.window.stop 3",
            replace(GUIDED, generation=Generation(guidance=Contrastive(window=Window(start=2.0, stop=3.0)))),
        ),
    ],
)
def test_overrides(line: str, expected: Tree) -> None:
    assert repr(cli(*line.split())) == repr(expected)


def test_naming_the_component_that_is_there_keeps_its_values() -> None:
    default = Tree(generation=Generation(sampler=Heun(steps=3)), attacks=(PGD(steps=3),))
    assert cli("--generation.sampler", "Heun", default=default) == default
    assert cli("--attacks", "PGD", "PGD", default=default).attacks == (PGD(steps=3), PGD())


def test_the_words_a_file_would_have_said_give_the_same_digest() -> None:
    recipe = files.build(files.parse_yaml("generation: {count: 80, sampler: {class: DDIM, eta: 1}}"), Tree)
    words = ["--generation.count", "80", "--generation.sampler", "DDIM", "--generation.sampler.eta", "1"]
    assert canonical.digest(cli(*words, default=Tree())) == canonical.digest(recipe)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--generation.count abc", ["--generation.count: expected int, got 'abc'", "images to generate", "4000"]),
        ("--generation.count 1 2", ["expected one int", "1 2"]),
        ("--generation.count", ["expected one int", "nothing"]),
        ("--generation.count 8.5", ["expected int", "8.5"]),
        ("--threat.epsilon nan", ["--threat.epsilon", "expected float"]),
        ("--threat.epsilon 0", ["threat epsilon: expected a finite number above 0", "8/255"]),
        ("--threat.epsilon -0.5", ["threat epsilon: expected a finite number above 0", "-0.5"]),
        ("--threat.norm l0", ["--threat.norm", "expected linf or l2"]),
        ("--flip maybe", ["--flip", "expected true or false"]),
        ("--generation.guidance.window.start 3", ["generation.guidance.window: window: expected start < stop"]),
        ("--generation.sampler DIM", ["--generation.sampler", "expected one of DDIM, Heun"]),
        ("--generation.sampler", ["--generation.sampler: expected one of Heun, DDIM", "nothing"]),
        ("--generation.sampler none", ["--generation.sampler", "'none'"]),
        ("--generation.sampler.eta 1", ["eta is a field of DDIM: add --generation.sampler DDIM"]),
        ("--generation.cuont 5", ["unknown option --generation.cuont", "nearest: --generation.count,"]),
        ("--count 5", ["unknown option --count", "nearest: --generation.count,"]),
        ("--attacks.7.steps 5", ["unknown option", "--attacks.0.steps"]),
        ("--attacks FGSM", ["--attacks", "'FGSM'"]),
        ("fast", ["expected options", "'fast'"]),
    ],
)
def test_what_a_command_line_has_wrong_is_named(line: str, parts: list[str]) -> None:
    message = refused(lambda: cli(*line.split()))
    for part in parts:
        assert part in message
    assert "\n" not in message


def helped(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli(*argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_every_field_with_default_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r"[\s│]+", " ", helped(capsys, "--help"))
    rows = overrides.flat_fields(GUIDED)
    assert len(rows) == 22
    for path, _, default, help in rows:
        assert re.search(rf"--{re.escape(path)} .{{1,40}}{re.escape(help)} \(default: {re.escape(default)}\)", text), (
            path
        )
    assert "--generation.sampler Heun|DDIM" in text
    assert "--generation.sampler DDIM --help" in text


def test_help_follows_the_chosen_components(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys, "--generation.sampler", "DDIM", "-h")
    assert "--generation.sampler.eta" in text
    assert "--generation.sampler.churn" not in text


def test_flat_fields_say_type_default_and_help() -> None:
    rows = {path: rest for path, *rest in overrides.flat_fields(GUIDED)}
    assert rows["generation.count"] == ["int", "4000", "images to generate"]
    assert rows["generation.guidance"] == ["Contrastive or none", "Contrastive", "what steers; none: nothing"]
    assert rows["generation.limit"] == ["int or none", "none", "at most so many"]
    assert rows["attacks"] == ["several of PGD or APGD", "PGD APGD", "the evaluation"]
    assert rows["flip"] == ["true or false", "true", "whether to mirror"]
    assert rows["threat.norm"] == ["linf or l2 or l1", "linf", "which norm bounds the perturbation: linf, l2 or l1"]


def test_help_of_fields_comes_from_comments_also_inherited_and_over_several_lines() -> None:
    class Plain:
        other: int = 0  # not a field

    @dataclass(frozen=True, kw_only=True)
    class Child(Heun):
        steps: int = 3
        text: str = field(
            default="#",
            metadata={},
        )  # after the bracket
        bare: int = 0

    assert canonical.field_help(Child) == {
        "steps": "network steps",
        "churn": "noise added back",
        "text": "after the bracket",
    }
    assert not is_dataclass(Plain)


def test_parsing_takes_less_than_a_second() -> None:
    start = time.process_time()
    cli("--generation.sampler", "DDIM", "--generation.sampler.eta", "1", "--generation.count", "5")
    assert time.process_time() - start < 1


# errors


def test_errors_know_their_exit_codes_and_the_nearest_word() -> None:
    assert (UserError.code, EnvironmentFault.code) == (2, 3)
    assert issubclass(UserError, ValueError)
    assert issubclass(EnvironmentFault, OSError)
    assert nearest("digts", ["cifar10", "digits", "svhn"])[0] == "digits"
    assert nearest("count", ["generation.counter.a", "generation.count"])[0] == "generation.count"
    message = str(unknown("recipe", "digts", ["cifar10", "digits"]))
    assert message == "unknown recipe: expected one of digits, cifar10 (nearest first); got 'digts'"
    assert "none are known" in str(unknown("recipe", "x", []))
