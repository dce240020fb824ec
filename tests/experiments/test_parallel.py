"""Jobs side by side: order, slots, failures, deadlines, and what a stopped scheduler leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from softdefend.core.errors import SettingError
from softdefend.core.store import ResultStore
from softdefend.experiments import parallel
from softdefend.experiments.parallel import Job, Scheduler, run_all

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


@pytest.fixture(autouse=True)
def _lines(caplog):
    caplog.set_level("INFO", logger="softdefend")


@pytest.fixture
def job(tmp_path):
    """A function that makes a job out of a small script; it counts how many of its kind run beside it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def make(name, code=0):
        words = [sys.executable, str(script), str(tmp_path), name, str(code)]
        return Job(name, lambda device: words, tmp_path / f"{name}.log")

    return make


@pytest.fixture
def coded(tmp_path):
    """A function that makes a job of Python code, which is given the kind of its device."""

    def make(name, code, after=()):
        return Job(
            name,
            lambda device: [sys.executable, "-c", code, device],
            tmp_path / "logs" / f"{name}.log",
            after,
        )

    return make


def appends(path, name):
    return f"import sys; open({str(path)!r}, 'a').write({name!r} + '@' + sys.argv[1] + '\\n')"


@pytest.mark.parametrize("at_once", [1, 2])
def test_every_job_runs_and_never_more_at_once_than_asked(job, at_once, caplog):
    jobs = [job(name) for name in "abcd"]
    run_all(jobs, at_once)
    seen = [int(made.log.read_text().split()[1]) for made in jobs]
    assert max(seen) <= at_once
    said = caplog.messages
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
    run_all([made], at_once)
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
    run_all(jobs, 4)
    assert sorted(made.log.read_text().split("gpus ")[1].split()[0] for made in jobs) == seen


def test_the_next_job_goes_to_the_gpu_with_the_fewest(coded, tmp_path, monkeypatch):
    """GPU 0 has two slots and a long job; the two short ones that follow run on GPU 1."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = tmp_path / "seen"
    write = f"import os; open({str(seen)!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [coded("a", f"import time; time.sleep(1); {write}"), coded("b", write), coded("c", write, ("b",))]
    assert Scheduler(["cuda:0", "cuda:0", "cuda:1"]).run(jobs) == []
    assert seen.read_text() == "110"


def test_jobs_that_name_their_device_see_all_gpus(job, monkeypatch):
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    made = job("a")
    run_all([made], 2, spread=False)
    assert "gpus 0,1\n" in made.log.read_text()


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1"]), ("3,5", ["3", "5"])])
def test_a_job_on_a_numbered_gpu_sees_it_alone(coded, tmp_path, monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.chdir(tmp_path)
    code = "import os, sys; open(sys.argv[1] + os.environ['CUDA_VISIBLE_DEVICES'], 'w').close()"
    Scheduler(["cuda:0", "cuda:1"]).run([coded(name, code) for name in "ab"])
    assert sorted(path.name for path in tmp_path.glob("cuda*")) == [f"cuda{number}" for number in expected]


@pytest.mark.parametrize("device", ["cuda:2", "cuda:x"])
def test_a_gpu_that_is_not_there_is_refused(coded, monkeypatch, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(SettingError, match=f"device: got {device}"):
        Scheduler([device]).run([coded("a", "")])


def test_a_failure_leaves_the_others_alone_and_is_told_at_the_end(job):
    jobs = [job("a", code=2), job("b"), job("c")]
    with pytest.raises(SettingError, match=r"a: got last words of a; accepted: a run that ends well.*a\.log"):
        run_all(jobs, 1)
    assert all("last words" in made.log.read_text() for made in jobs)


def test_at_least_one_and_not_a_milliard_at_once(job):
    for count in (0, 1025, 99999999999):
        with pytest.raises(SettingError, match=f"--parallel: got {count}; accepted: .* from 1 to 1024"):
            run_all([job("a")], count)


def test_jobs_wait_for_what_they_need_and_run_on_the_devices_given(coded, tmp_path):
    seen, told = tmp_path / "seen", []
    jobs = [
        coded("last", appends(seen, "last"), after=("first", "before")),
        coded("first", appends(seen, "first")),
        coded("known", "raise SystemExit(9)"),
    ]
    made = Scheduler(["d0"])
    assert made.run(jobs, done=["before", "known"], finished=told.append) == []
    assert seen.read_text().splitlines() == ["first@d0", "last@d0"]
    assert told == ["first", "last"]
    assert made.failed == {}


def test_a_failed_job_holds_up_only_what_needs_it(coded):
    jobs = [coded("bad", "raise SystemExit(3)"), coded("needs it", "", after=("bad",)), coded("free", "")]
    made = Scheduler(["d0", "d0"])
    assert made.run(jobs) == ["bad", "needs it"]
    assert made.failed == {jobs[0]: 3}


def test_at_the_deadline_a_job_is_stopped_with_all_that_it_started(coded, tmp_path):
    child = "import time; time.sleep(1.5); open({!r}, 'w').write('late')"
    late = tmp_path / "late"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child.format(str(late))!r}])"
    made = Scheduler(["d0"], seconds=0.5)
    assert made.run([coded("long", code), coded("waiting", "")]) == ["long", "waiting"]
    time.sleep(1.6)
    assert not late.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_scheduler_stops_its_jobs_with_all_that_they_started(tmp_path, number):
    """A scheduler in a process of its own, which is sent the signal once a job's child runs."""
    started, late = tmp_path / "started", tmp_path / "late"
    tell = f"open({str(started)!r}, 'w').write(str(os.getpid()))"
    child = f"import os, time; {tell}; time.sleep(1.5); open({str(late)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    script = (
        "import sys; from pathlib import Path; from softdefend.experiments.parallel import Job, run_all\n"
        f"run_all([Job('a', lambda _: [sys.executable, '-c', {code!r}], Path({str(tmp_path / 'log')!r}))], 1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # background jobs ignore some
    )
    while not (started.exists() and started.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert code == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    while runs(int(started.read_text())):
        time.sleep(0.01)
    assert not late.exists()


def runs(pid: int) -> bool:
    """Whether a process is there and does something; one that has ended may wait for its parent to look."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_the_handlers_of_signals_are_put_back(coded):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    Scheduler(["auto"]).run([coded("a", "")])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_scheduler_runs_outside_the_main_thread_too(coded):
    left = []
    thread = threading.Thread(target=lambda: left.append(Scheduler(["auto"]).run([coded("a", "")])))
    thread.start()
    thread.join()
    assert left == [[]]


def test_what_ended_well_is_not_run_again_where_it_is_recorded(coded, tmp_path):
    seen, results = tmp_path / "seen", ResultStore(tmp_path / "results")
    jobs = [coded("good", appends(seen, "good")), coded("bad", "raise SystemExit(1)")]
    for store, lines in ((None, 1), (results, 2), (results, 2)):
        assert Scheduler(["d0"], results=store).run(jobs) == ["bad"]
        assert len(seen.read_text().splitlines()) == lines
    jobs[0] = coded("good", appends(seen, "other words"))
    Scheduler(["d0"], results=results).run(jobs)
    assert seen.read_text().splitlines()[2:] == ["other words@d0"]
