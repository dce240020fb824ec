"""How this process was started: alone, or as one of several by torchrun, srun or this package."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from softdefend.core.errors import EXIT_LOST, SettingError

OWN = "softdefend-"
"""What the identifiers of runs begin with whose processes this package has started."""


class Place(NamedTuple):
    """Where this process stands among those that were started together."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """How many there are."""
    local_rank: int
    """Number among those of this machine, which is that of its GPU."""
    local_size: int
    """How many there are on each machine."""

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.size // self.local_size


_RUN = "TORCHELASTIC_RUN_ID"
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")


def place_of_this_process(environment: Mapping[str, str] | None = None) -> Place | None:
    """The place that torchrun or srun say in the environment; None where there is one process.

    Raises:
        SettingError: what they say makes no sense, or machines have different numbers of processes.
    """
    environment = os.environ if environment is None else environment
    if _RUN in environment:
        rank, size, local_rank, local_size = _numbers(environment, _TORCHRUN)
    elif _SLURM[1] in environment:  # in a batch script that does not call srun there is no such variable
        rank, size, local_rank, nodes = _numbers(environment, _SLURM)
        local_size = size // max(nodes, 1)
    else:
        return None
    place = Place(rank, size, local_rank, local_size)
    if local_size < 1 or size % local_size or not (0 <= local_rank < local_size and 0 <= rank < size):
        raise SettingError("processes", place._asdict(), "as many processes on every machine")
    return place if size > 1 else None


def started_here() -> bool:
    """Whether a process of this package has started this one, and says what ends the run."""
    return os.environ.get(_RUN, "").startswith(OWN)


def end_with_parent() -> None:
    """End this process, from now on, once the one is gone that has started it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(EXIT_LOST)

    threading.Thread(target=watch, daemon=True).start()


def _numbers(environment: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    for name in names:
        if not environment.get(name, "").isdecimal():
            raise SettingError(name, repr(environment.get(name)), "a number, as torchrun and srun set it")
    return [int(environment[name]) for name in names]
