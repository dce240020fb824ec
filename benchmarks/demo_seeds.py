"""Does the demo's difference hold over seeds? PGD-AT and SGLR on digits, JSON out.

    python benchmarks/demo_seeds.py --seeds 0 1 2 3 4 --output benchmarks/results/demo_seeds.json

A seed changes everything that is drawn: the test split, the label noise, the initial weights, the order and
the attack's starts. ``--noise-rate 0`` is the control without label noise.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from collect import environment, figures
from common import RESULTS, make_parser, write_json
from softdefend.experiments import pipeline

PRESETS = ("pgd-at", "sglr-reference")


def measured(folder: Path) -> dict[str, Any]:
    """Figures of one finished run, and what training saw."""
    row = figures(folder)
    row["best_minus_last"] = round(row["best"]["pgd-20"] - row["last"]["pgd-20"], 2)
    final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    row["train_robust_last"] = round(100 * final["train_robust"], 2)
    row["environment"] = environment(folder)
    return row


def one(seed: int, noise_rate: float, folder: Path) -> dict[str, Any]:
    """Both recipes with one seed."""
    started = time.time()
    noise = ["--data.noise_rate", str(noise_rate)]
    if noise_rate == 0:
        noise = ["--data.noise", "none", "--data.noise_rate", "0"]
    words = [
        "--config",
        "digits_demo",
        "--data.split_seed",
        str(seed),
        "--data.noise_seed",
        str(seed),
        *noise,
    ]
    pipeline.compare(words, PRESETS, [seed], folder)
    pair = {preset: measured(folder / f"{preset}-seed{seed}") for preset in PRESETS}
    at, sglr = (pair[preset] for preset in PRESETS)
    gain = round(sglr["last"]["pgd-20"] - at["last"]["pgd-20"], 2)
    return {
        "seed": seed,
        **pair,
        "last_gain_pgd-20": gain,
        "seconds_for_both": round(time.time() - started, 1),
    }


def main() -> int:
    """Train every seed with both recipes and write what came out."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--noise-rate", type=float, default=0.3)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, each in a process of its own")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--output", type=Path, default=RESULTS / "demo_seeds.json")
    args = parser.parse_args()
    folder = args.folder / f"noise{args.noise_rate:g}"
    work = partial(one, noise_rate=args.noise_rate, folder=folder)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(work, args.seeds))
    gains = [run["last_gain_pgd-20"] for run in runs]
    summary = {
        "data": "scikit-learn digits",
        "protocol": "digits_demo",
        "noise_rate": args.noise_rate,
        "seeds_at_once": args.jobs,
        "seeds_where_sglr_ends_higher": sum(gain > 0 for gain in gains),
        "mean_last_gain_pgd-20": round(mean(gains), 2),
        "mean_best_minus_last": {
            preset: round(mean(run[preset]["best_minus_last"] for run in runs), 2) for preset in PRESETS
        },
        "mean_last_clean": {
            preset: round(mean(run[preset]["last"]["clean"] for run in runs), 2) for preset in PRESETS
        },
        "mean_last_pgd-20": {
            preset: round(mean(run[preset]["last"]["pgd-20"] for run in runs), 2) for preset in PRESETS
        },
        "runs": runs,
    }
    write_json(args.output, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
