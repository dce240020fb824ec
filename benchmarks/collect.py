"""What the benchmark scripts read from a finished run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ENVIRONMENT = ("softdefend", "commit", "torch", "python", "device", "started")


def figures(folder: Path) -> dict[str, Any]:
    """Clean and PGD-20 accuracy in percent at ``best`` and ``last``."""
    row: dict[str, Any] = {}
    for which in ("best", "last"):
        result = json.loads((folder / "evaluation" / f"{which}.json").read_text())
        row[which] = {
            "epoch": result["epoch"],
            "clean": round(100 * result["clean"]["rate"], 2),
            "pgd-20": round(100 * result["attacks"]["pgd-20"]["rate"], 2),
            "n": result["n"],
        }
    return row


def environment(folder: Path) -> dict[str, Any]:
    """Versions, device and commit, without what only concerns the machine's folders."""
    content = json.loads((folder / "environment.json").read_text())
    return {name: content[name] for name in ENVIRONMENT}
