"""Commands side by side: all of them run, no more at once than asked, and a failure is told."""

from __future__ import annotations

import sys

import pytest

from softdefend.core.errors import SettingError
from softdefend.experiments import parallel
from softdefend.experiments.parallel import Job, side_by_side

SCRIPT = """
import os, sys, time
from pathlib import Path
folder, name, code = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder / f"{name}.running").touch()
time.sleep(0.15)
print("seen", len(list(folder.glob("*.running"))))
(folder / f"{name}.running").unlink()
print("threads", os.environ["OMP_NUM_THREADS"])
print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES"))
print("last words of", name)
sys.exit(code)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function that makes a job out of a small script; it counts how many of its kind run beside it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    popen = parallel.subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(parallel.subprocess, "Popen", start)

    def make(name, code=0):
        return Job(name, (str(tmp_path), name, str(code)), tmp_path / f"{name}.log")

    return make


@pytest.mark.parametrize("at_once", [1, 2])
def test_every_job_runs_and_never_more_at_once_than_asked(job, at_once):
    jobs, said = [job(name) for name in "abcd"], []
    side_by_side(jobs, at_once, say=said.append)
    seen = [int(made.log.read_text().split()[1]) for made in jobs]
    assert max(seen) <= at_once
    assert sorted(line for line in said if line.endswith(": done")) == [f"{name}: done" for name in "abcd"]
    assert [line for line in said if "output" in line] == [
        f"{made.name}: its output goes to {made.log}" for made in jobs
    ]


@pytest.mark.parametrize(
    ("at_once", "given", "each"), [(1, None, "8"), (3, None, "2"), (20, None, "1"), (2, "5", "5")]
)
def test_the_cores_are_divided_unless_threads_are_given(job, monkeypatch, at_once, given, each):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    made = job("a")
    side_by_side([made], at_once, say=lambda _: None)
    assert f"threads {each}\n" in made.log.read_text()


@pytest.mark.parametrize(
    ("visible", "count", "seen"),
    [(None, 2, ["0", "0", "1", "1"]), ("4,7", 2, ["4", "4", "7", "7"]), ("5", 1, ["5"] * 4)],
)
def test_jobs_are_spread_over_the_gpus_that_are_visible(job, monkeypatch, visible, count, seen):
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    jobs = [job(name) for name in "abcd"]
    side_by_side(jobs, 4, say=lambda _: None)
    assert sorted(made.log.read_text().split("gpus ")[1].split()[0] for made in jobs) == seen


def test_jobs_that_name_their_device_see_all_gpus(job, monkeypatch):
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    made = job("a")
    side_by_side([Job("a", made.words, made.log, pinned=True)], 2, say=lambda _: None)
    assert "gpus 0,1\n" in made.log.read_text()


def test_a_failure_leaves_the_others_alone_and_is_told_at_the_end(job):
    jobs = [job("a", code=2), job("b"), job("c")]
    with pytest.raises(SettingError, match=r"a: got last words of a; accepted: a run that ends well.*a\.log"):
        side_by_side(jobs, 1, say=lambda _: None)
    assert all("last words" in made.log.read_text() for made in jobs)


def test_at_least_one_at_once(job):
    with pytest.raises(SettingError, match="--together: got 0"):
        side_by_side([job("a")], 0)
