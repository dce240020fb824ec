"""The rooms of docs/architecture.md: every module is in one, and imports only from those above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "softdefend"


def rooms() -> dict[str, int]:
    """The row of the table that names a module or package, counted from the top."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name.rstrip("/"): row for row, cell in enumerate(cells) for name in re.findall("`([^`]+)`", cell)}


def room_of(module: str) -> str:
    return module.removeprefix("softdefend.").partition(".")[0]


def imported(path: Path) -> set[str]:
    """Rooms that a module imports from when it is imported itself, type annotations included."""
    found = set[str]()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softdefend"):
            # ``from softdefend import rng`` names rooms, ``from softdefend.rng import key`` is of one.
            names = [alias.name for alias in node.names] if node.module == "softdefend" else [node.module]
            found |= {room_of(str(name)) for name in names}
    return found


def test_every_module_is_in_a_room_and_imports_from_none_below():
    rows = rooms()
    faults = []
    for path in sorted(SOURCE.rglob("*.py")):
        own = path.relative_to(SOURCE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        if own not in rows:
            faults.append(f"{own} is in no room")
            continue
        for other in imported(path) - {own}:
            if rows.get(other, -1) > rows[own]:
                faults.append(f"{path.relative_to(SOURCE)} imports {other}")
    assert faults == []
