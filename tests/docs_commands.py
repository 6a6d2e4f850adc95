"""The commands, snippets, files and edits of a documentation page, in order; what a command's options may be."""

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gambeson import overrides
from gambeson.certify import Certifying
from gambeson.cli import COMMANDS, main
from gambeson.commands import Sampling
from gambeson.data.datasets import DOORS, ImageFolder, NpzImages
from gambeson.errors import UserError
from gambeson.evaluate import Evaluating
from gambeson.quality_command import Assessing
from gambeson.recipes import RECIPES, named
from gambeson.recipes.presets import preset
from gambeson.recipes.training import training_preset
from gambeson.synthesis.select import Selection
from gambeson.tables.bases import base_of
from gambeson.tables.definitions import TABLES
from gambeson.train import Training
from gambeson.training.foreign import FILES as ENDINGS

ROOT = Path(__file__).parent.parent
PROGRAMS = ("gambeson", "make", "python", "torchrun", "pip")
"""What a line of a ```bash block may start with."""
Kind = Literal["command", "python", "file", "diff"]


@dataclass(frozen=True)
class Item:
    """One thing that a page has its reader do."""

    kind: Kind
    line: int
    text: str  # the command on one line (a heredoc keeps its lines), the snippet, the file's or the diff's content
    title: str = ""  # of a file or a diff: its path

    @property
    def words(self) -> list[str]:
        """A command's words; comments dropped."""
        return shlex.split(self.text.partition("\n")[0], comments=True)


FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<rest>.*)$")
INDENTED = re.compile(r"^ {4,}(?:\.venv/bin/)?(?=(?:gambeson|make|torchrun|python) [\w./-])(?P<text>.*)$")


def items(path: Path) -> list[Item]:
    """Everything that a page has its reader do, in order."""
    return list(_items(path.read_text(encoding="utf-8").splitlines()))


def _items(lines: list[str]) -> Iterator[Item]:
    number = 0
    while number < len(lines):
        opened = FENCE.match(lines[number])
        if opened is None:
            indented = INDENTED.match(lines[number])
            if indented is not None:
                yield from _commands([indented["text"]], number + 1)
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
        cut = len(opened["indent"])
        yield from _block(opened, [line[cut:] for line in lines[number + 1 : end]], number + 2)
        number = end + 1


def _block(opened: re.Match[str], body: list[str], line: int) -> Iterator[Item]:
    """The items of one fenced block."""
    title = re.search(r'title="([^"]+)"', opened["rest"])
    if opened["language"] in ("bash", "console", "sh", "shell"):
        yield from _commands(body, line)
    elif opened["language"] == "diff":
        assert title is not None, f"line {line}: a diff without a title"
        yield Item("diff", line, "\n".join(body) + "\n", title[1])
    elif opened["language"] == "python":
        kind: Kind = "python" if title is None else "file"
        yield Item(kind, line, "\n".join(body) + "\n", "" if title is None else title[1])


def _commands(body: list[str], line: int) -> Iterator[Item]:
    """The commands of a block; continued lines and heredocs belong to their command."""
    number = 0
    while number < len(body):
        start, text = number, body[number].removeprefix("$ ").strip()
        while text.endswith("\\"):
            number += 1
            text = text[:-1].rstrip() + " " + body[number].strip()
        document = re.search(r"<<'(\w+)'$", text)
        if document is not None:
            end = body.index(document[1], number)
            text = "\n".join([text, *body[number + 1 : end + 1]])
            number = end
        number += 1
        if text and not text.startswith("#"):
            yield Item("command", line + start, text.removeprefix(".venv/bin/"))


def own_names(path: Path) -> frozenset[str]:
    """The classes that the files of a page define."""
    return frozenset(n for i in items(path) if i.kind == "file" for n in re.findall(r"^class (\w+)", i.text, re.M))


def mentions(path: Path) -> list[Item]:
    """Commands that the prose names: `gambeson quality`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [(n, m) for n, line in enumerate(lines, 1) for m in re.findall(r"`(gambeson [a-z][^`]*)`", line)]
    return [Item("command", n, text) for n, text in found]


@cache
def help_of(command: str) -> str:
    """What `gambeson COMMAND --help` prints."""
    told = io.StringIO()
    with redirect_stdout(told):
        assert main([command, "--help"]) == 0
    return told.getvalue()


@cache
def short_options(command: str) -> frozenset[str]:
    """The options that a command's help names."""
    return frozenset(re.findall(r"--[A-Za-z][\w-]*", help_of(command)))


def fault(item: Item) -> str:
    """Why a command cannot be meant; nothing where it can: its program, its command and all its options are known."""
    words = item.words
    if words[0] == "make":
        rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return "" if set(words[1:]) <= rules else f"no such target: {words[1:]}"
    if words[0] == "pip":
        return _pip_fault(words)
    if words[0] == "python" and words[1:2] != ["-m"]:
        return _script_fault(words)
    if words[0] in ("python", "torchrun"):
        module = words.index("-m")
        if words[module + 1] == "pytest":
            return "" if (ROOT / words[module + 2]).is_file() else f"no such file: {words[module + 2]}"
        words = words[module + 1 :]
    return _command_fault(words[1:]) if words[0] == "gambeson" else f"unknown program {words[0]}"


def _pip_fault(words: list[str]) -> str:
    extras = re.findall(r"gambeson\[(\w+)\]", " ".join(words))
    text = (ROOT / "pyproject.toml").read_text()
    return "" if all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras) else f"no extra {extras}"


def _script_fault(words: list[str]) -> str:
    """Of `python SCRIPT --option`: the file must be there and name its options; a heredoc is read when it is run."""
    if words[1] == "-":
        return ""
    path = ROOT / words[1]
    if not path.is_file():
        return f"no such file: {words[1]}"
    text = path.read_text(encoding="utf-8")
    unknown = [w for w in words[2:] if w.startswith("--") and w not in text]
    return f"{words[1]} does not know {unknown}" if unknown else ""


def _command_fault(words: list[str]) -> str:
    if words[0].startswith("-"):
        return "" if words[0] in ("--help", "--version") else f"unknown option {words[0]}"
    if words[0] not in COMMANDS:
        return f"unknown command {words[0]}"
    try:
        asked(words)
    except (UserError, KeyError) as error:
        return f"{error}"
    return ""


def asked(words: list[str]) -> Any:
    """What the fields of a command's line make of its default; None where it names none. UserError, KeyError."""
    command, given = words[0], dict[str, list[str]]()
    for word in words[1:]:
        if re.match(r"--[A-Za-z]", word):
            name, _, value = word.partition("=")
            given[name] = [value] if value else []
        elif given:
            given[list(given)[-1]].append(word)
    fields = [w for name, values in given.items() if not _short(command, name) for w in (name, *values)]
    takes = command in FIELDS or command in ALONE or command in ("select", "data")
    if not fields and not takes:
        return None
    return overrides.parse(default_of(command, words[1:], given), fields, f"gambeson {command}")


def fields_of(words: list[str]) -> frozenset[str]:
    """The paths of all fields that a command's line could set."""
    line = words[words.index("gambeson") + 1 :]
    try:
        found = asked(line)
    except UserError:  # names a component that the page adds
        found = asked(line[:1])
    return frozenset() if found is None else frozenset(path for path, *_ in overrides.flat_fields(found))


def _short(command: str, name: str) -> bool:
    fields = command == "select" and name in ("--score", "--keep", "--per-class")
    return not fields and name in short_options(command)


FIELDS = ("run", "train-diffusion", "train-encoder", "generate", "sample-grid", "table", "theory")
"""Commands that take the fields of a recipe."""
ALONE = {"evaluate": Evaluating(), "certify": Certifying(), "quality": Assessing(), "train": Training()}


def default_of(command: str, words: list[str], given: dict[str, list[str]]) -> Any:
    """What the fields on a command's line are fields of. KeyError for a command that takes none."""
    word = words[0] if words and not words[0].startswith("--") else ""
    chosen = next(iter(given.get("--preset", [])), "fast")
    if command == "select":
        return Selection()
    if command in ALONE or command == "data":
        start = replace(ALONE.get(command, Training()), data=_door(given, word))
        return replace(start, classifier=training_preset(chosen).classifier) if isinstance(start, Training) else start
    if command not in FIELDS:
        raise KeyError(f"gambeson {command} takes no fields")
    weights = command in ("generate", "sample-grid") and (Path(word).suffix in ENDINGS or "/" in word)
    if command == "table" and word in TABLES:
        return base_of(next(iter(given.get("--tier", [])), "digits"), TABLES[word])
    start = Sampling() if weights else named(word if word in RECIPES else "digits")
    if command == "run" and word.startswith("./"):
        start = replace(start, data=_door(given, word))
    if "--preset" not in given:
        return start
    generation = preset(chosen).apply(start.generation)
    return replace(start, generation=generation)


def _door(given: dict[str, list[str]], word: str) -> Any:
    word = next(iter(given.get("--data", [])), word or "digits")
    if word in DOORS:
        return DOORS[word]
    return NpzImages() if word.endswith(".npz") else ImageFolder()
