"""Imports flow downwards only, importing does nothing, and the command line answers at once."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "gambeson"
FLOORS = [
    ["errors", "options", "terminal", "types"],
    ["canonical", "distributed", "energy", "heritage", "processes", "randomness", "schedules", "threat"],
    ["fleet"],
    ["disk", "machine"],
    ["place"],
    ["mirror", "objects"],
    ["mirrored_runs"],
    ["cluster", "store"],
    ["files"],
    ["overrides"],
    ["data"],
    ["models"],
    ["sampling"],
    ["robustness"],
    ["training"],
    ["quality"],
    ["synthesis"],
    ["recipe"],
    ["theory"],
    ["recipes"],
    ["pipeline"],
    ["engine"],
    ["progress"],
    ["ownership"],
    ["run"],
    ["report"],
    ["tables"],
    ["screen"],
    ["watching"],
    ["tryout"],
    [
        "certify",
        "commands",
        "compare_command",
        "data_command",
        "evaluate",
        "label_command",
        "quality_command",
        "run_command",
        "select_command",
        "store_command",
        "table_command",
        "train",
        "watch_command",
        "try_command",
    ],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Modules of the house that a file imports when it is imported (not inside functions, not for types only)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gambeson"):
            names = [f"gambeson.{a.name}" for a in node.names] if node.module == "gambeson" else [node.module]
            found |= {n for n in names if n and room_of(n) in FLOOR}
    return found


@pytest.mark.parametrize("path", sorted(HOUSE.rglob("*.py")), ids=lambda p: str(p.relative_to(HOUSE)))
def test_imports_flow_downwards(path: Path) -> None:
    room = path.relative_to(HOUSE).with_suffix("").parts[0]
    if room == "__init__":
        return
    assert room in FLOOR, f"{room} has no floor: add it to FLOORS"
    for module in imports(path):
        other = room_of(module)
        assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}, which stands above or beside it"


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = "import sys; from gambeson.cli import main; main(['--help']); print(*sys.modules)"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        times.append(time.perf_counter() - start)
    heavy = {"torch", "numpy", "tyro", "pydantic", "matplotlib", "sklearn", "pyarrow", "rich", "yaml"}
    assert not heavy & set(out.split())
    assert min(times) < 0.5


def test_the_library_imports_without_the_command_lines_dependencies() -> None:
    """GPU machines may lack tyro, pydantic and beartype (DEPENDENCIES.md)."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['tyro', 'pydantic', 'beartype', 'yaml'])); "
        "import gambeson.pipeline, gambeson.recipes as r; print(r.named('digits').digest)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(out.strip()) == 64


def test_importing_leaves_the_world_alone() -> None:
    code = (
        "import torch, os; s = torch.get_rng_state(); f = set(os.listdir('.')); "
        "import gambeson.cli, gambeson.run, gambeson.report.gather, gambeson.recipes.digits; "
        "assert torch.equal(s, torch.get_rng_state()); assert set(os.listdir('.')) == f"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
