"""What a result was computed with: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from softdefend.core.version import VERSION

COMMAND = "SOFTDEFEND_COMMAND"
"""The variable by which a process says for which command it has started others."""


def versions(device: torch.device) -> dict[str, str]:
    """What a rerun would have to share to find the same bits."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "softdefend": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": gpu or f"CPU, {torch.get_num_threads()} threads",
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit of this process."""
    return {
        **versions(device),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": os.environ.get(COMMAND) or command(),
    }


def command() -> str:
    """The words of this process's command."""
    return " ".join(Path(word).name if not number else word for number, word in enumerate(sys.argv))


def _commit() -> str | None:
    """The commit of the source tree that is running: the variable SOFTDEFEND_COMMIT, else git's word. A tree
    exported from its repository may lie inside another."""
    if named := os.environ.get("SOFTDEFEND_COMMIT"):
        return named
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
