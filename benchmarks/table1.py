"""Join the rows of ``softdefend reproduce table1`` into benchmarks/results/table1.json.

    softdefend reproduce table1 --folder runs/table1 --data.source DIR --data.name 'CIFAR-10 (JPEG mirror)' \\
        --validate.precision fast --evaluate.precision fast --validate.every 2 --validate.test_size 1000 \\
        --validate.subset first
    python benchmarks/table1.py runs/table1

Rows may come from several calls and machines: give the folders that hold their ``NAME-seedN.json`` and run
folders. Rows of the same protocol that the output has already stay, unless they are given again. Where a
checkpoint was audited for gradient masking (``softdefend evaluate RUN --which last --audit``) the row says
what that found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from collect import ENVIRONMENT, percent, read_row, seconds
from common import RESULTS, make_parser, write_json

PUBLISHED = {
    "pgd-at": {"clean": 82.4, "robust": 41.4, "autoattack": 40.2},
    "sglr-reference": {"clean": 83.0, "robust": 55.9, "autoattack": 50.2},
    "trades": {"clean": 82.5, "robust": 50.2, "autoattack": 46.8},
    "trades-sglr": {"clean": 83.3, "robust": 55.4, "autoattack": 50.1},
}
"""Last checkpoint on original CIFAR-10, by the README of the authors' code (attack of "robust" not named)."""


def audited(folder: Path) -> dict[str, dict[str, Any]]:
    """What audits of a run's checkpoints found, by checkpoint."""
    found = {}
    for path in sorted(folder.glob("evaluation/*-audit.json")):
        content = json.loads(path.read_text())
        verdicts = [finding["verdict"] for finding in content["findings"]]
        found[content["which"]] = {
            "n": content["n"],
            "checks": len(verdicts),
            "made": sum(verdict != "not measured" for verdict in verdicts),
            "verdict": content["verdict"],
        }
    return found


def join(path: Path) -> dict[str, Any]:
    """One row, figures in percent."""
    content, folder = read_row(path), path.with_suffix("")
    row: dict[str, Any] = {name: content[name] for name in ("name", "recipe", "seed")}
    row["protocol"] = content["inputs"]["protocol"]
    for which in ("best", "last"):
        row[which] = percent(content[which])
        evaluation = json.loads((folder / "evaluation" / f"{which}.json").read_text())
        ensemble = evaluation["attacks"]["autoattack"]
        row[which]["autoattack_seconds"] = round(ensemble["seconds"], 1)
        row[which]["robust_after"] = {member["name"]: member["count"] for member in ensemble["members"]}
    row["hours"] = round(content["hours"], 3)
    row["seconds_per_epoch"] = round(median(seconds(folder)), 2)
    if audits := audited(folder):
        row["audit"] = audits
    if content["name"] in PUBLISHED:
        row["published_last"] = PUBLISHED[content["name"]]
    row["environment"] = {name: content["environment"][name] for name in ENVIRONMENT}
    return row | {"curve": content["curve"]}


def main() -> int:
    """Every row found, in the order of the table."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=RESULTS / "table1.json")
    args = parser.parse_args()
    found = [join(path) for folder in args.folders for path in sorted(folder.glob("*-seed*.json"))]
    content = json.loads(args.output.read_text()) if args.output.exists() else {}
    protocols = [row.pop("protocol") for row in found]
    protocols += [content["protocol"]] if content else []
    names = [(row["name"], row["seed"]) for row in found]
    if not found or len(set(names)) < len(names) or any(one != protocols[0] for one in protocols):
        print("no rows, a row twice, or rows of different protocols", file=sys.stderr)
        return 2
    rows = found + [row for row in content.get("rows", []) if (row["name"], row["seed"]) not in names]
    rows.sort(key=lambda row: (("trades" in row["name"]), ("sglr" in row["name"]), row["name"], row["seed"]))
    content = {"data": protocols[0]["data"]["name"], "protocol": protocols[0], "rows": rows}
    write_json(args.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
