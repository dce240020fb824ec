"""Seconds that `softdefend demo` takes: both trainings, evaluation and report, as JSON.

    python benchmarks/demo_time.py

Runs the command in a fresh folder, as a process of its own; the first run of all may also decode data or
compile bytecode, so the fastest of --repeats counts.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import RESULTS, make_parser, write_json
from softdefend.core.environment import environment


def main() -> None:
    """Time it and write the file."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "demo_time.json")
    args = parser.parse_args()
    seconds = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as place:
            started = time.perf_counter()
            command = [sys.executable, "-m", "softdefend", "demo", "--folder", f"{place}/demo"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(round(time.perf_counter() - started, 1))
    content = {
        "seconds": min(seconds),
        "every": seconds,
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "environment": environment(torch.device("cpu")),
    }
    write_json(args.output, content)
    print(json.dumps(content, indent=1))


def _processor() -> str:
    """What Linux calls it; elsewhere its architecture."""
    information = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    return named[1].strip() if named else platform.machine()


if __name__ == "__main__":
    main()
