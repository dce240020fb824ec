"""What the benchmark scripts read from a finished run folder; by itself, one run as JSON.

python benchmarks/collect.py runs/mine --output benchmarks/results/mine.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from common import make_parser, write_json
from softdefend.core.store import ResultStore

ENVIRONMENT = ("softdefend", "commit", "torch", "python", "device", "started")


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def seconds(folder: Path) -> list[float]:
    """Of every epoch; one that was begun twice counts as it ended."""
    return list({row["epoch"]: row["seconds"] for row in lines(folder, "timing.jsonl")}.values())


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


def read_row(path: Path) -> dict[str, Any]:
    """A row that ``softdefend reproduce`` wrote.

    Raises:
        SystemExit: it did not write this file, or the file was altered.
    """
    content = ResultStore(path.parent).read(path.stem)
    if content is None:
        sys.exit(f"{path}: no row that softdefend reproduce wrote")
    return content


def percent(found: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's accuracies in percent, and its epoch."""
    return {name: value if name == "epoch" else round(100 * value, 2) for name, value in found.items()}


def environment(folder: Path) -> dict[str, Any]:
    """Versions, device and commit, without what only concerns the machine's folders."""
    content = json.loads((folder / "environment.json").read_text())
    return {name: content[name] for name in ENVIRONMENT}


def main() -> None:
    """Figures, seconds of every epoch, curve and environment of one run."""
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    config = yaml.safe_load((args.run / "config.yaml").read_text())
    content = {"recipe": config["name"], "seed": config["seed"], "data": config["data"]["name"]}
    content |= figures(args.run) | {
        "environment": environment(args.run),
        "seconds_of_epochs": [round(row["seconds"], 3) for row in lines(args.run, "timing.jsonl")],
        "curve": lines(args.run, "metrics.jsonl"),
    }
    write_json(args.output, content)


if __name__ == "__main__":
    main()
