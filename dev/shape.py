"""The size of the house against its tripwires: function lines, file lines, typed public surface (`make size`).

Wanted: functions with a median of at most 8 lines and a 90th percentile of at most 25, none over 60; no file over 400;
every parameter and result of public functions typed. Fails on a breach; --all lists the longest.
"""

import ast
import sys
from pathlib import Path
from statistics import median, quantiles


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without decorators and docstring."""
    first = node.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def untyped(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a public function lacks an annotation."""
    a = node.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return node.returns is None or any(g.annotation is None and g.arg not in ("self", "cls") for g in given)


def main() -> int:
    functions, files, bare = [], [], []
    for path in sorted(Path("gambeson").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        files.append((len(text.splitlines()), str(path)))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{path}:{node.lineno} {node.name}"
                functions.append((body_lines(node), place))
                if not node.name.startswith("_") and untyped(node):
                    bare.append(place)
    lengths = [n for n, _ in functions]
    p90 = quantiles(lengths, n=10)[-1]
    print(f"{len(files)} files of {sum(n for n, _ in files)} lines, the longest {max(files)}; {len(bare)} untyped")
    print(f"{len(functions)} functions: median {median(lengths):g}, 90th percentile {p90:g}, longest {max(functions)}")
    if "--all" in sys.argv:
        print(*sorted(functions)[-12:], *sorted(files)[-6:], *bare, sep="\n")
    broken = [median(lengths) > 8, p90 > 25, max(lengths) > 60, max(files)[0] > 400, bool(bare)]
    if any(broken):
        long = [f for f in functions if f[0] > 60] + [f for f in files if f[0] > 400]
        print("over a tripwire:", *bare, *long, sep="\n")
    return int(any(broken))


sys.exit(main())
