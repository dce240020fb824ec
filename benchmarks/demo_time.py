"""Seconds that `make demo` takes once installed: both trainings, evaluation and report, as JSON.

    python benchmarks/demo_time.py

Runs the command of the Makefile's target in a fresh folder, as a process of its own; the first run of all may
also decode data or compile bytecode, so the fastest of --repeats counts.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import RESULTS, make_parser, write_json
from softdefend.core.environment import environment

MAKEFILE = Path(__file__).parent.parent / "Makefile"


def words(folder: Path) -> list[str]:
    """The target's command, its folder replaced."""
    recipe = MAKEFILE.read_text().replace("\\\n", " ").partition("\ndemo: install\n")[2].splitlines()[0]
    command = shlex.split(re.sub(r"^\s*\$\(BIN\)/softdefend", "", recipe))
    command[command.index("--folder") + 1] = str(folder)
    return [sys.executable, "-m", "softdefend", *command]


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
            subprocess.run(words(Path(place) / "demo"), check=True, stdout=subprocess.DEVNULL)
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
