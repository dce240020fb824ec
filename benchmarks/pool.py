"""Commands side by side on devices, each as soon as a place is free and what it needs is done."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


def study_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The arguments that studies of many runs share.

    Args:
        description: of the script.
        name: of the study's folder below ``runs``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="Parquet folder of CIFAR-10 in hub layout")
    parser.add_argument("--data-name", default="", help="what to call the data in the results")
    parser.add_argument("--folder", type=Path, help=f"runs/{name}, or runs/{name}-quick")
    parser.add_argument("--devices", nargs="+", default=["auto"], help="one named twice takes two jobs")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop what still runs after these"
    )
    parser.add_argument("--quick", action="store_true", help="in miniature, on digits")
    parser.add_argument("--output", type=Path, help="below benchmarks/results; with --quick, in the folder")
    return parser


def study_arguments(parser: argparse.ArgumentParser, name: str, output: str) -> argparse.Namespace:
    """What was given, with folder and output filled in, and ``named``: what results call the data."""
    args = parser.parse_args()
    args.folder = args.folder or Path("runs", f"{name}-quick" if args.quick else name)
    args.output = args.output or (args.folder if args.quick else Path("benchmarks/results")) / output
    args.named = "digits" if args.quick else args.data_name
    return args


def data_words(args: argparse.Namespace) -> list[str]:
    """The words of ``softdefend train`` for the data that were named; none where the protocol has its own."""
    return ["--data.source", str(args.data), "--data.name", args.data_name] if args.data else []


def earlier(path: Path, data: str, seed: int | None = None, protocol: str | None = None) -> dict[str, Any]:
    """What a result file holds already; empty without one.

    Raises:
        SystemExit: it holds results on other data, of another seed or protocol, which new ones must not join.
    """
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, given in (("data", data), ("seed", seed), ("protocol", protocol)):
        if name in content and given is not None and content[name] != given:
            sys.exit(
                f"{path}: holds results with {name} {content[name]!r}, not {given!r}; name another --output"
            )
    return content


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
        remember: note in ``logs`` which jobs ended well; a later pool does not start these again, unless
            their words have changed.
    """

    def __init__(
        self, devices: Sequence[str], logs: Path, seconds: float = float("inf"), *, remember: bool = False
    ) -> None:
        self._free, self._logs, self._deadline = list(devices), logs, time.monotonic() + seconds
        self._remember = remember
        self._running: dict[str, tuple[Sequence[str], str, subprocess.Popen[bytes]]] = {}
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
        over, waiting = set(done), [job for job in jobs if job.name not in done]
        try:
            while time.monotonic() < self._deadline:
                ready = [job for job in waiting if over.issuperset(job.after)][: len(self._free)]
                for job in ready:
                    waiting.remove(job)
                    if self._start(job):
                        over.add(job.name)
                if not self._running and not ready:
                    break
                if self._running:
                    time.sleep(0.2)
                for name in self._ended():
                    over.add(name)
                    if finished is not None:
                        finished(name)
        finally:
            self._stop()
        return [job.name for job in jobs if job.name not in over]

    def _start(self, job: Job) -> bool:
        """Start it in the first free place, unless it is known to have ended well before."""
        device, environment = self._free[0], dict(os.environ)
        kind, _, number = device.partition(":")
        words = job.command(kind)
        if self._remember and self._mark(job.name, words).exists():
            return True
        self._free.pop(0)
        if kind == "cuda" and number:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible != [""] else number
        self._logs.mkdir(parents=True, exist_ok=True)
        with open(self._logs / f"{job.name}.log", "ab") as log:
            # A group of its own: what a command has started is stopped with it.
            process = subprocess.Popen(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self._running[job.name] = words, device, process
        return False

    def _mark(self, name: str, words: Sequence[str]) -> Path:
        """The file that says that these words ended well."""
        return self._logs / f"{name}-{hashlib.sha256(repr(words).encode()).hexdigest()[:12]}.done"

    def _ended(self) -> list[str]:
        """Names of jobs that have ended well since."""
        well = []
        for name, (words, device, process) in list(self._running.items()):
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
                    self._mark(name, words).touch()
                well.append(name)
        return well

    def _stop(self) -> None:
        for _, _, process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for _, _, process in self._running.values():
            process.wait()
        self._running.clear()
