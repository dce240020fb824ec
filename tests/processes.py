"""Several processes that train or evaluate together, each a Python program of a test's own.

Importing takes longer than most of these programs: one process has imported, and forks one for each program.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).parent
IMPORTED = [
    "pytest",
    "torch._dynamo",
    "lightning_fabric",
    "scipy.stats",
    "sklearn.datasets",
    "softdefend.cli.train",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(IMPORTED)


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


class Program:
    """``python WORDS`` in an environment, as a process of its own."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._texts = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115  # closed by kill
        places = [text.name for text in self._texts]
        self._process = CONTEXT.Process(target=_run, args=(list(words), dict(environment), places))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ended(self, seconds: float = 0) -> tuple[int | None, str]:
        """Exit code, None before there is one, and what it wrote to its standard error."""
        self._process.join(seconds)
        self._texts[1].seek(0)
        return self._process.exitcode, self._texts[1].read()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        for text in self._texts:
            text.close()


def _run(words: list[str], environment: dict[str, str], places: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, place in enumerate(places, 1):
        os.dup2(os.open(place, os.O_WRONLY | os.O_APPEND), number)
    added = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = words
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[:0] = added
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[:0] = [str(Path(words[0]).parent), *added]
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def start(size: int, *words: str, port: int | None = None, **more: str) -> list[Program]:
    """``python WORDS`` as so many processes, with further variables in their environment."""
    port = port or free_port()
    return [Program(words, {**environment(rank, size, port), **more}) for rank in range(size)]


def ended(programs: Sequence[Program], seconds: float = 120) -> list[tuple[int | None, str]]:
    """Exit code and what each wrote to its standard error. They are killed if they take too long."""
    deadline = time.monotonic() + seconds
    try:
        return [program.ended(max(1, deadline - time.monotonic())) for program in programs]
    finally:
        for program in programs:
            program.kill()
