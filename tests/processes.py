"""Several processes that train or evaluate together, each a Python program of a test's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would tell the process of this rank."""
    own = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "SOFTDEFEND_COMMIT": "none",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": 0,
    }
    return {**os.environ, **own, **{name: str(number) for name, number in numbers.items()}}


def start(size: int, *words: str, port: int | None = None, **more: str) -> list[subprocess.Popen[str]]:
    """``python WORDS`` as so many processes, with further variables in their environment."""
    port = port or free_port()
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**environment(rank, size, port), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def start_forked(size: int, *words: str) -> subprocess.Popen[str]:
    """As :func:`start`, for many: one process, which imports what a script needs and is forked."""
    command = [sys.executable, str(TESTS / "forked.py"), str(size), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(0, 1, 0), stdout=pipe, stderr=pipe, text=True)


def ended(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit code and what each wrote to its standard error. They are killed if they take too long."""
    deadline = time.monotonic() + seconds
    try:
        return [
            (process.returncode, errors)
            for process in processes
            for _, errors in [process.communicate(timeout=max(1, deadline - time.monotonic()))]
        ]
    finally:
        for process in processes:
            process.kill()
