"""Commands side by side on devices, each as soon as a place is free and what it needs is done."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


def softdefend(*words: str) -> list[str]:
    """A command of the package."""
    return [sys.executable, "-m", "softdefend", *words]


def compare(folder: Path, words: Sequence[str]) -> None:
    """``softdefend compare`` into a folder, its output beside it.

    Raises:
        subprocess.CalledProcessError: it did not end well.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "wb") as log:
        command = softdefend("compare", *words, "--folder", str(folder))
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: of its log file.
        command: the words, for a device.
        after: names of jobs that must be done before.
    """

    name: str
    command: Callable[[str], list[str]]
    after: tuple[str, ...] = ()


class Pool:
    """Keeps every device busy until the jobs or the seconds are used up.

    Args:
        devices: one place each; a device named twice takes two jobs at once. A job on ``cuda:N`` sees that
            GPU alone, as ``cuda``.
        logs: folder of the jobs' outputs.
        seconds: after which what still runs is stopped.
        remember: note in ``logs`` which jobs ended well; a later pool does not start these again.
    """

    def __init__(
        self, devices: Sequence[str], logs: Path, seconds: float = float("inf"), *, remember: bool = False
    ) -> None:
        self._free, self._logs, self._deadline = list(devices), logs, time.monotonic() + seconds
        self._remember = remember
        self._running: dict[str, tuple[Job, str, subprocess.Popen[bytes]]] = {}
        self.failed: list[str] = []

    def __call__(
        self, jobs: Sequence[Job], done: Sequence[str] = (), finished: Callable[[str], None] | None = None
    ) -> list[str]:
        """Do the jobs that are not done, and return the names of those that were not finished.

        Args:
            jobs: in the order in which they are preferred.
            done: names that count as done.
            finished: told of each job that ended well.
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the jobs are stopped too
        over = {*done, *(mark.stem for mark in self._logs.glob("*.done"))}
        waiting = [job for job in jobs if job.name not in over]
        try:
            while time.monotonic() < self._deadline:
                for job in [job for job in waiting if over.issuperset(job.after)][: len(self._free)]:
                    waiting.remove(job)
                    self._start(job)
                if not self._running:
                    break
                time.sleep(0.2)
                for name in self._ended():
                    over.add(name)
                    if finished is not None:
                        finished(name)
        finally:
            self._stop()
        return [job.name for job in jobs if job.name not in over]

    def _start(self, job: Job) -> None:
        device, environment = self._free.pop(0), dict(os.environ)
        kind, _, number = device.partition(":")
        if kind == "cuda" and number:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible != [""] else number
        self._logs.mkdir(parents=True, exist_ok=True)
        with open(self._logs / f"{job.name}.log", "ab") as log:
            # A group of its own: what a command has started is stopped with it.
            process = subprocess.Popen(
                job.command(kind),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self._running[job.name] = job, device, process

    def _ended(self) -> list[str]:
        """Names of jobs that have ended well since."""
        well = []
        for name, (_, device, process) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[name]
            self._free.append(device)
            if process.returncode:
                self.failed.append(name)
                print(f"{name} ended with code {process.returncode}:", file=sys.stderr)
                print((self._logs / f"{name}.log").read_text()[-1500:], file=sys.stderr)
            else:
                if self._remember:
                    (self._logs / f"{name}.done").touch()
                well.append(name)
        return well

    def _stop(self) -> None:
        for _, _, process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for _, _, process in self._running.values():
            process.wait()
        self._running.clear()
