"""One command on several processes of this machine, started and watched by torch's own launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from softdefend.core.environment import COMMAND, command
from softdefend.core.errors import EXIT_LOST, LostProcessError, ReportedError
from softdefend.execution.launched import OWN

_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that torch's launcher handles, and leaves its handlers for."""


def run_on_processes(words: Sequence[str], size: int) -> None:
    """Run ``softdefend`` with these words as ``size`` processes that work together.

    The first one's output is shown. Where one ends by a fault the others are stopped.

    Raises:
        ReportedError: one ended by a fault of which it has said what it is.
        LostProcessError: one was killed.
    """
    with tempfile.TemporaryDirectory() as place, _restored():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=f"{OWN}{uuid.uuid4().hex}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # any free port
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(place, redirects=dict.fromkeys(range(1, size), Std.ALL)),
        )
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        try:
            elastic_launch(config, sys.executable)("-m", "softdefend", *words)
        except ChildFailedError as error:
            _report({rank: failure.exitcode for rank, failure in error.failures.items()}, size, Path(place))
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + error.sigval)


def _report(codes: Mapping[int, int], size: int, place: Path) -> NoReturn:
    """Say what ended a run, if it has not been said.

    Args:
        codes: of the processes that failed, by rank; negative is the signal that ended one.
        size: how many there were.
        place: of the output of all but the first.
    """
    causes = {rank: code for rank, code in sorted(codes.items()) if code not in (EXIT_LOST, -signal.SIGTERM)}
    rank, code = next(iter((causes or codes).items()))
    if code < 0 or not causes:
        how = f"by {signal.Signals(-code).name}" if code < 0 else "without a word"
        again = "the others were stopped; the same command continues where the last checkpoint stands"
        raise LostProcessError(f"process {rank} of {size} was ended {how}; {again}")
    if rank > 0:
        for path in sorted(place.rglob(f"{rank}/stderr.log")):
            print(path.read_text(errors="replace"), end="", file=sys.stderr)
    raise ReportedError(code)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Names this command to the processes that are started; afterwards this one is as before."""
    before: dict[Any, Any] = {number: signal.getsignal(number) for number in _CAUGHT}
    os.environ[COMMAND] = command()
    try:
        yield
    finally:
        del os.environ[COMMAND]
        for number, handler in before.items():
            signal.signal(number, handler)
