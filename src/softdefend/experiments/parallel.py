"""Several commands at once, each a process of its own: runs that share a GPU, or the cores of a CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from softdefend.core.errors import SettingError


@dataclass(frozen=True)
class Job:
    """One ``softdefend`` command.

    Attributes:
        name: what messages call it.
        words: of the command line, without the program's name.
        pinned: whether it names its device itself.
        log: file that takes its output; appended to.
    """

    name: str
    words: tuple[str, ...]
    log: Path
    pinned: bool = False


def side_by_side(jobs: Sequence[Job], at_once: int, *, say: Callable[[str], None] = print) -> None:
    """Run every job, ``at_once`` of them at a time, in order.

    The cores of the CPU are divided among them, unless OMP_NUM_THREADS or a job's ``runtime.threads`` says
    otherwise: threads of several processes that wait for each other on one core make every step many times
    slower. Where several GPUs are visible, each job sees one of them, the one with the fewest jobs, unless a
    job names its device. A job that fails leaves the others alone. Interrupted, all of them are stopped.

    Raises:
        SettingError: ``at_once`` below 1; or, when all have ended, the last words of the first that failed.
    """
    if at_once < 1:
        raise SettingError("--together", at_once, "a whole number >= 1")
    # Without this a terminated parent would leave its runs behind; signals belong to the main thread.
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    waiting, failed = list(jobs), list[Job]()
    running: dict[Job, subprocess.Popen[bytes]] = {}
    gpus = _gpus() if not any(job.pinned for job in jobs) else []
    taken: dict[Job, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                say(f"{job.name}: its output goes to {job.log}")
                if len(gpus) > 1:
                    busy = [taken[other] for other in running]
                    taken[job] = min(gpus, key=busy.count)
                    environment["CUDA_VISIBLE_DEVICES"] = taken[job]
                running[job] = _start(job, environment)
            time.sleep(0.05)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    say(
                        f"{job.name}: "
                        + ("done" if process.returncode == 0 else f"code {process.returncode}")
                    )
                    failed += [job] if process.returncode else []
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if failed:
        text = failed[0].log.read_text(errors="replace").strip()
        last = text.splitlines()[-1] if text else "no output"
        raise SettingError(failed[0].name, last, f"a run that ends well; its output is in {failed[0].log}")


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them. Starts nothing on any of them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")][:count] if named else [*map(str, range(count))]


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        command = [sys.executable, "-m", "softdefend", *job.words]
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
