"""The layers of docs/architecture.md, from the code itself: what imports what, and no circles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "softdefend"
MODULES = {
    ".".join(("softdefend", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
OPTIONAL = {"softdefend.execution.fused.kernels"}
"""Modules that need a package which is not there on every machine: they are imported where they are used."""


def layers() -> list[str]:
    """Folders in the order of the document's table: each may import from those before it."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Layers")[2].partition("\n\n#")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [name.rstrip("/") for cell in cells for name in re.findall("`([^`]+)`", cell)]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of the package that a module imports, and whether it does so inside a function."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softdefend"):
            # ``from softdefend.core import rng`` imports a module, not a name.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in whole]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("softdefend")]
        yield from ((name, id(node) in inside) for name in names)


def test_the_root_holds_folders_and_its_two_files():
    assert {path.name for path in SOURCE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_every_folder_is_a_layer_and_imports_only_from_those_above():
    order, faults = layers(), []
    assert sorted(order) == sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file())
    for module, path in MODULES.items():
        own = module.split(".")[1] if "." in module else ""
        for name, _ in imports(path) if own in order else ():
            other = name.split(".")[1] if "." in name else "the root"
            if other not in order or order.index(other) > order.index(own):
                faults.append(f"{module} imports {name}")
    assert faults == []


def test_no_import_hides_in_a_function():
    hidden = {
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name, inside in imports(path)
        if inside and name not in OPTIONAL
    }
    assert hidden == set()


def test_modules_import_each_other_in_no_circle():
    graph = {module: {name for name, _ in imports(path)} - OPTIONAL for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            # A folder's __init__ gathers names of its modules; they reach each other directly.
            pytest.fail(" -> ".join((*trail[trail.index(module) :], module)))
        if module in done:
            return
        for other in graph.get(module, ()):
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())
