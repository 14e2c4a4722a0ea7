"""The plan of the code in figures: circles of imports, folders, files, functions, and one command's way through it.

    python benchmarks/structure.py [--repo FOLDER] [--json]

Circles count every import that runs, inside functions too; `folders in circles` those of the first level. The way is
that of `mole compose --loras a,b,c --mode gated`, two steps: the files of which a function runs, the functions of
`molecli` on the stack between the command and the first gate's softmax in training, and the recipe's way: the files to
which functions it is given, and how often it comes back to one that it had left.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

PACKAGE = "molecli"
LONG = 60
COMMAND = [
    "compose",
    "--loras",
    "a,b,c",
    "--mode",
    "gated",
    "--steps",
    "2",
    "--batch-size",
    "4",
    "--limit",
    "16",
    "--eval-limit",
    "2",
    "--output",
    "run",
    "--json",
]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, tree: ast.Module, known: Mapping[str, Path]) -> set[str]:
    """The modules of the package that `tree` imports when it runs, wherever the import stands."""
    found = set()
    for node in _running(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module in known} - {name}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _running(child)


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The groups of nodes that reach one another (Tarjan's strongly connected components), of two nodes and more."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for after in graph.get(node, ()):
            if after not in order:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], order[after])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for node in graph:
        if node not in order:
            visit(node)
    return found


def room(module: str) -> str:
    """The first level below the package that a module lies in."""
    return ".".join(module.split(".")[:2])


def figures(root: Path) -> dict[str, Any]:
    """What can be counted without running anything."""
    found = modules(root)
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in found.items()}
    # A package's own file hands names on: whoever imports from it imports it.
    graph = {name: imports(name, tree, found) for name, tree in trees.items()}
    rooms: dict[str, set[str]] = {}
    for name, others in graph.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    lines = {name: path.read_text("utf-8").count("\n") for name, path in found.items()}
    total = sum(lines.values())
    folders = Counter[str]()
    for name, count in lines.items():
        if found[name].parent != root / PACKAGE:
            folders[found[name].relative_to(root / PACKAGE).parts[0]] += count
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    largest, count = folders.most_common(1)[0]
    shared = sorted(
        f"{name} imports {other}.{alias.name}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        for other in [node.module]
        if alias.name.startswith("_")
        and not alias.name.endswith("__")
        and other.startswith(PACKAGE)
        and room(other) != room(name)
    )
    return {
        "circles of files": circles(graph),
        "folders in circles": circles(rooms),
        "files": len(lines),
        "lines": total,
        "largest folder": f"{largest}, {100 * count / total:.1f}%",
        "folders": {name: round(100 * n / total, 1) for name, n in folders.most_common()},
        "median file": int(median(sorted(lines.values()))),
        "longest file": max(lines.values()),
        "functions": len(functions),
        "median function": int(median(functions)),
        f"functions over {LONG} lines": sum(length > LONG for length in functions),
        "private names across folders": shared,
    }


def way(root: Path) -> dict[str, int]:
    """How far one command goes, in a process of its own that imports the package in `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [sys.executable, str(Path(__file__).resolve()), "--trace"]
        done = subprocess.run(arguments, cwd=scratch, env=environment, capture_output=True, text=True, check=True)
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def trace() -> dict[str, int]:
    """Runs the command here and counts."""
    import contextlib
    import io
    import threading

    from molecli.cli.app import run

    entered: set[str] = set()
    depths: list[int] = []
    visits: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or f"/{PACKAGE}/" not in file or frame.f_code.co_name == "<module>":
            return
        entered.add(file)
        if _carries(frame) and visits[-1:] != [file]:
            visits.append(file)
        if not depths and file.endswith("functional/gating.py") and _training(frame):
            depths.append(_frames(frame))

    threading.setprofile(profile)
    sys.setprofile(profile)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run(COMMAND)
    sys.setprofile(None)
    if code:
        raise SystemExit(f"mole {' '.join(COMMAND)} exited with {code}")
    return {
        "files entered": len(entered),
        "frames to the softmax": depths[0] if depths else 0,
        "files that see the recipe": len(set(visits)),
        "returns of the recipe": len(visits) - len(set(visits)),
    }


def _carries(frame: Any) -> bool:
    """Whether the function is given the recipe itself, or what holds it."""
    count = frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
    given = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:count]]
    return any("ComposeRecipe" in (type(one).__name__, type(getattr(one, "recipe", None)).__name__) for one in given)


def _stack(frame: Any) -> Iterator[Any]:
    while frame is not None:
        if f"/{PACKAGE}/" in frame.f_code.co_filename:
            yield frame
        frame = frame.f_back


def _training(frame: Any) -> bool:
    return any(inner.f_code.co_filename.endswith("loop.py") for inner in _stack(frame))


def _frames(frame: Any) -> int:
    """Functions of the package between the command's own and this one."""
    names = [Path(inner.f_code.co_filename).parts[-2:] for inner in _stack(frame)]
    command = next(i for i, (folder, file) in enumerate(names) if folder == "cli" and file == "compose.py")
    return command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.trace:
        print(json.dumps(trace()))
        return 0
    found = {**figures(chosen.repo), **way(chosen.repo)}
    if chosen.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in found.items():
        if isinstance(value, list):
            print(f"{name:30} {len(value)}")
            for one in value:
                print(f"    {one if isinstance(one, str) else ', '.join(one)}")
        else:
            print(f"{name:30} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
