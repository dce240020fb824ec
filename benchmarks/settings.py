"""Join the rows of ``softdefend reproduce settings`` into benchmarks/results/settings.json.

    softdefend reproduce settings --only tiny-imagenet --folder runs/settings --data.source DIR \\
        --data.name 'Tiny-ImageNet 32x32 (JPEG mirror)' --validate.precision fast --validate.every 2 \\
        --evaluate.precision fast --evaluate.curve_size 0 --evaluate.examples 0
    python benchmarks/settings.py runs/settings

Rows may come from several calls and machines: give the folders that hold their ``NAME-seedN.json`` and run
folders. Rows of other settings that the output has already stay. A row keeps which test images the last
checkpoint got right, so that a reader can compare two of them image by image.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from collect import ENVIRONMENT, percent, read_row, seconds
from common import RESULTS, make_parser, write_json
from softdefend.experiments.reproduce import compared, settings


def join(path: Path) -> dict[str, Any]:
    """One row, figures in percent."""
    content = read_row(path)
    protocol = content["inputs"]["protocol"]
    row = {name: content[name] for name in ("name", "setting", "recipe", "seed")}
    row |= {"data": protocol["data"]["name"], "net": protocol["net"]["name"], "epochs": protocol["epochs"]}
    row |= {which: percent(content[which]) for which in ("best", "last")}
    row |= {"hours": round(content["hours"], 3), "verdicts": content["verdicts"], "protocol": protocol}
    row["seconds_per_epoch"] = round(median(seconds(path.with_suffix(""))), 2)
    row["environment"] = {name: content["environment"][name] for name in (*ENVIRONMENT, "command")}
    return row | {"curve": content["curve"]}


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """SGLR against PGD-AT in each setting, image by image, in shares."""
    pairs = []
    for pair in compared(settings(), rows):
        found = {}
        for name, one in pair["differences"].items():
            values = {**asdict(one), "difference": one.value, "error": one.error}
            found[name] = {key: round(value, 6) for key, value in values.items()}
        pairs.append({**pair, "differences": found})
    return pairs


def main() -> int:
    """Every row found, in the order of the study."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=RESULTS / "settings.json")
    args = parser.parse_args()
    found = [join(path) for folder in args.folders for path in sorted(folder.glob("*-seed*.json"))]
    names = [(row["name"], row["seed"]) for row in found]
    if not found or len(set(names)) < len(names):
        print("no rows, or a row twice", file=sys.stderr)
        return 2
    earlier = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    rows = found + [row for row in earlier if (row["name"], row["seed"]) not in names]
    order = [run.name for run in settings().runs]
    rows.sort(key=lambda row: (order.index(row["name"]), row["seed"]))
    write_json(args.output, {"pairs": differences(rows), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
