"""mkdocs hook: one API page for each room, from the docstrings, and the executed notebook as a page.

Docstrings are read from the source without importing it. Nothing here needs a network.
"""

from __future__ import annotations

import ast
import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "gambeson"
NOTEBOOK = ROOT / "docs" / "notebooks" / "guiding-moons.ipynb"
ALONE = "core"
"""The page of the modules that lie in no room of their own."""


def commands() -> dict[str, str]:
    """Command -> the module behind it."""
    text = (HOUSE / "cli.py").read_text(encoding="utf-8")
    table = re.findall(r'"([\w-]+)": (?:_elsewhere\("([\w.]+)"|\w+)', text.split("COMMANDS")[1].split("\n}")[0])
    return {command: module or "gambeson.cli" for command, module in table}


def rooms() -> dict[str, list[str]]:
    """Room -> its modules, by name; modules without a room under ALONE. Those behind commands have a page of theirs."""
    behind = set(commands().values())
    found: dict[str, list[str]] = {}
    for path in sorted(HOUSE.rglob("*.py")):
        words = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(words[:-1] if words[-1] == "__init__" else words)
        if words[-1] != "__main__" and name not in behind:
            found.setdefault(words[1] if len(words) > 2 else ALONE, []).append(name)
    return found


def source_of(module: str) -> Path:
    """The file of a module."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def summary(module: str) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(source_of(module).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def has_names(module: str) -> bool:
    """Whether a module defines anything public with a docstring (a room's `__init__` often only gathers names)."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    body = ast.parse(source_of(module).read_text(encoding="utf-8")).body
    return any(isinstance(node, kinds) and not node.name.startswith("_") for node in body)


def api_page(room: str, modules: list[str]) -> str:
    """The Markdown of a room's page: what it is about, its modules, and their public names."""
    about = "Modules that lie in no room of their own." if room == ALONE else summary(f"gambeson.{room}")
    title = "gambeson" if room == ALONE else f"gambeson.{room}"
    lines = [f"# {title}", "", about, "", "| module | about |", "| --- | --- |"]
    lines += [f"| {_linked(name, title)} | {_cell(summary(name))} |" for name in modules if name != title]
    for name in filter(has_names, modules):
        lines += ["", f"::: {name}"]
    return "\n".join(lines) + "\n"


def _linked(module: str, room: str) -> str:
    """A module by its name inside the room, as a link to its place on the page where it has one."""
    name = module.removeprefix(f"{room}.")
    return f"[{name}](#{module})" if has_names(module) else name


HELP = """
import sys
from gambeson.cli import COMMANDS, main
for command in [None, *COMMANDS]:
    print(f"\\0{command or ''}\\0", end="")
    main([*filter(None, [command]), "--help"])
"""


def commands_page() -> str:
    """What `gambeson COMMAND --help` prints, for every command."""
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = ["# Commands", "", "`gambeson COMMAND --help` prints the same."]
    words = done.stdout.split("\0")[1:]
    for command, told in zip(words[::2], words[1::2], strict=True):
        lines += ["", f"## gambeson {command}".rstrip(), "", "```text", told.strip(), "```"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def notebook_page() -> tuple[str, dict[str, bytes]]:
    """The notebook, executed, as Markdown, and the pictures that it drew by their names."""
    from nbclient import NotebookClient

    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    pictures: dict[str, bytes] = {}
    return "\n\n".join(_cells(notebook.cells, pictures)) + "\n", pictures


def _cells(cells: list[Any], pictures: dict[str, bytes]) -> Iterator[str]:
    for cell in cells:
        if cell.cell_type == "markdown":
            yield cell.source
            continue
        yield f"```python\n{cell.source}\n```"
        for output in cell.outputs:
            yield from _output(output, pictures)


def _output(output: Any, pictures: dict[str, bytes]) -> Iterator[str]:
    """What a cell printed or drew, as Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"moons-{len(pictures)}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        about = output.metadata.get("alt") or data.get("text/plain", "figure").strip("'\"")
        yield f"![{about}]({name})"
    elif output.output_type == "stream" or "text/plain" in data:
        text = output.get("text") or data["text/plain"]
        yield f"```text\n{text.rstrip()}\n```"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the API pages to the navigation."""
    pages = [{room: f"api/{room}.md"} for room in rooms()]
    assert config.nav is not None
    config.nav.append({"Reference": [{"Commands": "commands.md"}, {"API": [{"Rooms": "api/index.md"}, *pages]}]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages themselves. GAMBESON_DOCS_QUICK=1 leaves API and notebook as stubs, for writing."""
    quick = bool(os.environ.get("GAMBESON_DOCS_QUICK"))
    found = rooms()
    about = "One page for each room, made from the docstrings. `tests/test_rooms.py` says which room may import which."
    index = ["# API reference", "", about, ""]
    index += ["| room | about |", "| --- | --- |"]
    for room, modules in found.items():
        about = "what lies in no room: types, stages, runs, commands" if room == ALONE else summary(f"gambeson.{room}")
        index.append(f"| [{room}]({room}.md) | {_cell(about)} |")
        text = f"# {room}\n" if quick else api_page(room, modules)
        files.append(File.generated(config, f"api/{room}.md", content=text))
    files.append(File.generated(config, "api/index.md", content="\n".join(index) + "\n"))
    files.append(File.generated(config, "commands.md", content="# Commands\n" if quick else commands_page()))
    text, pictures = ("# Moons\n", {}) if quick else notebook_page()
    files.append(File.generated(config, "notebooks/guiding-moons.md", content=text))
    for name, content in pictures.items():
        files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """A site that is opened from disk has no server to answer 404; its page would link to the disk's root."""
    (Path(config.site_dir) / "404.html").unlink(missing_ok=True)
