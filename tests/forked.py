"""Runs a test's script as several processes that are forked from one, which has imported what they need.

Run as ``python forked.py SIZE SCRIPT WORDS``. Eight times ``import torch`` would take most of the time.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import scipy.stats  # noqa: F401 (an evaluation does when it needs it)

import processes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning_fabric  # noqa: F401 (several processes do when they join)


def run(rank: int, size: int, port: int, script: str) -> int:
    """The script as the process of this rank; its exit code."""
    os.environ.update(processes.environment(rank, size, port))
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(size: int, script: str) -> int:
    """Fork; 1 where a process failed."""
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="imported")
    port, children = processes.free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = run(rank, size, port, script)
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    size, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.exit(main(size, script))
