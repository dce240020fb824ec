"""Commands that run side by side, each a process of its own: runs that share GPUs, or the cores of a CPU."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from softdefend.core.errors import SettingError
from softdefend.core.store import ResultStore

_log = logging.getLogger(__name__)

_MOST = 1024
"""Slots: more than any machine has cores for."""


def command_line(*words: str) -> list[str]:
    """A command of this package, in the interpreter that runs now."""
    return [sys.executable, "-m", "softdefend", *words]


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: what messages and other jobs call it.
        command: makes its words when it starts, for the kind of its device: ``auto``, ``cpu`` or ``cuda``.
        log: file that takes its output; appended to.
        after: names of jobs that must have ended well before it starts.
    """

    name: str
    command: Callable[[str], Sequence[str]]
    log: Path
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Running:
    """A job whose process has been started."""

    job: Job
    words: list[str]
    device: str
    process: subprocess.Popen[bytes]


class Scheduler:
    """Runs jobs on device slots, each as soon as a slot is free and the jobs before it are done.

    The cores of the CPU are divided among the slots, unless OMP_NUM_THREADS or a job's ``runtime.threads``
    says otherwise: threads of several processes that wait for each other on one core make every step many
    times slower. A job that fails leaves the others alone. Interrupted or terminated, the scheduler stops all
    jobs with what they have started.

    Args:
        devices: one slot each; a device named twice takes two jobs. A job on ``cuda:N`` sees that GPU alone.
            The next job goes to the device that has the fewest.
        seconds: after which jobs that still run are stopped.
        results: records the jobs that ended well. A later scheduler with the same store does not run a job
            again whose words are the same.
    """

    def __init__(
        self, devices: Sequence[str], *, seconds: float | None = None, results: ResultStore | None = None
    ) -> None:
        self.failed: dict[Job, int] = {}
        """Jobs that failed, and their exit codes."""
        self._devices, self._results = tuple(devices), results
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._running: dict[Future[int], _Running] = {}

    def run(
        self, jobs: Sequence[Job], done: Iterable[str] = (), finished: Callable[[str], None] | None = None
    ) -> list[str]:
        """Run the jobs that are not done.

        Args:
            jobs: in the order in which they are preferred.
            done: names that count as done.
            finished: called with the name of each job that has ended well.

        Returns:
            Names of the jobs that were not finished.
        """
        ended = set(done)
        waiting = [job for job in jobs if job.name not in ended]
        with _exit_on_termination(), ThreadPoolExecutor(len(self._devices)) as pool:
            try:
                while self._seconds_left() != 0:
                    self._start_ready(waiting, ended, pool)
                    if not self._running:
                        break
                    for name in self._wait():
                        ended.add(name)
                        if finished is not None:
                            finished(name)
            finally:
                self._stop()
        return [job.name for job in jobs if job.name not in ended]

    def _seconds_left(self) -> float | None:
        """Seconds to the deadline; None without one."""
        if self._deadline is None:
            return None
        return min(max(0.0, self._deadline - time.monotonic()), threading.TIMEOUT_MAX)

    def _start_ready(self, waiting: list[Job], ended: set[str], pool: ThreadPoolExecutor) -> None:
        """Start what can be started now, and move recorded jobs to those that have ended."""
        while len(self._running) < len(self._devices):
            job = next((job for job in waiting if ended.issuperset(job.after)), None)
            if job is None:
                return
            waiting.remove(job)
            device = self._next_device()
            words = list(job.command(device.partition(":")[0]))
            if self._results is not None and self._results.find(job.name, {"words": words}) is not None:
                ended.add(job.name)
                continue
            _log.info("%s: its output goes to %s", job.name, job.log)
            process = _start(words, job.log, _environment(device, len(self._devices)))
            self._running[pool.submit(process.wait)] = _Running(job, words, device, process)

    def _next_device(self) -> str:
        """Of the devices with a free slot, the one with the fewest jobs."""
        taken = [running.device for running in self._running.values()]
        free = [device for device in self._devices if taken.count(device) < self._devices.count(device)]
        return min(free, key=taken.count)

    def _wait(self) -> list[str]:
        """Wait until a job ends or the deadline comes; the names of jobs that have ended well."""
        over, _ = wait(self._running, self._seconds_left(), FIRST_COMPLETED)
        names = []
        for future in over:
            running, code = self._running.pop(future), future.result()
            _log.info("%s: %s", running.job.name, f"code {code}" if code else "done")
            if code:
                self.failed[running.job] = code
                continue
            if self._results is not None:
                self._results.write(running.job.name, {"words": running.words}, {})
            names.append(running.job.name)
        return names

    def _stop(self) -> None:
        """Terminate what still runs, and wait for it."""
        for running in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGTERM)
        wait(self._running)
        self._running.clear()


def run_all(jobs: Sequence[Job], parallel: int, *, spread: bool = True) -> None:
    """Run every job, ``parallel`` of them at a time, in order.

    Args:
        jobs: what to run.
        parallel: number of slots.
        spread: where several GPUs are visible, give each slot one of them; False if a job names one.

    Raises:
        SettingError: ``parallel`` below 1 or above 1024; or, when all have ended, the last words of the first
            that failed.
    """
    if not 1 <= parallel <= _MOST:
        raise SettingError("--parallel", parallel, f"a whole number from 1 to {_MOST}")
    gpus = torch.cuda.device_count() if spread else 0  # starts nothing on any of them
    devices = [f"cuda:{slot % gpus}" for slot in range(parallel)] if gpus > 1 else ["auto"] * parallel
    scheduler = Scheduler(devices)
    scheduler.run(jobs)
    for job in scheduler.failed:
        text = job.log.read_text(errors="replace").strip()
        last = text.splitlines()[-1] if text else "no output"
        raise SettingError(job.name, last, f"a run that ends well; its output is in {job.log}")


@contextlib.contextmanager
def _exit_on_termination() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit: a process that they kill at once leaves its jobs behind."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # others may not handle signals
        # What is ignored stays so: nohup wants the jobs to go on.
        numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, _exit) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _environment(device: str, slots: int) -> dict[str, str]:
    """What a job in one of so many slots sees: its share of the cores, and its GPU alone.

    Raises:
        SettingError: a GPU that is not visible.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // slots)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    kind, _, number = device.partition(":")
    if kind == "cuda" and number:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if not number.isdigit() or (visible != [""] and int(number) >= len(visible)):
            raise SettingError("device", device, "cuda:N, N below the number of visible GPUs")
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(number)].strip() if visible != [""] else number
    return environment


def _start(words: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own: what it starts can be stopped with it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
