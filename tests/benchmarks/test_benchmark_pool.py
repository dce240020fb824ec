"""The benchmarks' pool of jobs: order, places, failures, and what a deadline leaves."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent.parent / "benchmarks" / "pool.py"


@pytest.fixture
def pool(monkeypatch):
    spec = importlib.util.spec_from_file_location("pool", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pool", module)
    spec.loader.exec_module(module)
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)


def job(pool, name, code, after=()):
    return pool.Job(name, lambda device: [sys.executable, "-c", code, device], after)


def appends(path, name):
    return f"import sys; open({str(path)!r}, 'a').write({name!r} + '@' + sys.argv[1] + '\\n')"


def test_jobs_wait_for_what_they_need_and_run_on_the_devices_given(pool, tmp_path):
    seen, told = tmp_path / "seen", []
    jobs = [
        job(pool, "last", appends(seen, "last"), after=("first", "before")),
        job(pool, "first", appends(seen, "first")),
        job(pool, "known", "raise SystemExit(9)"),
    ]
    made = pool.Pool(["d0"], tmp_path / "logs")
    assert made(jobs, done=["before", "known"], finished=told.append) == []
    assert seen.read_text().splitlines() == ["first@d0", "last@d0"]
    assert told == ["first", "last"]
    assert made.failed == []


def test_a_failed_job_holds_up_only_what_needs_it(pool, tmp_path, capsys):
    jobs = [
        job(pool, "bad", "print('reason'); raise SystemExit(3)"),
        job(pool, "needs it", "", after=("bad",)),
        job(pool, "free", ""),
    ]
    made = pool.Pool(["d0", "d0"], tmp_path)
    assert made(jobs) == ["bad", "needs it"]
    assert made.failed == ["bad"]
    assert "bad ended with code 3:\nreason" in capsys.readouterr().err


def test_at_the_deadline_a_job_is_stopped_with_all_that_it_started(pool, tmp_path):
    child = "import time; time.sleep(1.5); open({!r}, 'w').write('late')"
    late = tmp_path / "late"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child.format(str(late))!r}])"
    made = pool.Pool(["d0"], tmp_path, seconds=0.5)
    assert made([job(pool, "long", code), job(pool, "waiting", "")]) == ["long", "waiting"]
    time.sleep(1.6)
    assert not late.exists()


def test_what_ended_well_is_not_started_again_where_it_is_remembered(pool, tmp_path):
    seen = tmp_path / "seen"
    jobs = [job(pool, "good", appends(seen, "good")), job(pool, "bad", "raise SystemExit(1)")]
    for remember, lines in ((False, 1), (True, 2), (True, 2)):
        made = pool.Pool(["d0"], tmp_path / "logs", remember=remember)
        assert made(jobs) == ["bad"]
        assert len(seen.read_text().splitlines()) == lines
    jobs[0] = job(pool, "good", appends(seen, "other words"))
    pool.Pool(["d0"], tmp_path / "logs", remember=True)(jobs)
    assert seen.read_text().splitlines()[2:] == ["other words@d0"]


def test_results_of_other_data_or_another_seed_are_not_joined(pool, tmp_path):
    path = tmp_path / "results.json"
    assert pool.earlier(path, "digits", 0) == {}
    path.write_text('{"data": "digits", "seed": 0}')
    assert pool.earlier(path, "digits", 0) == {"data": "digits", "seed": 0}
    for data, seed, named in (("CIFAR-10", 0, "data 'digits'"), ("digits", 1, "seed 0")):
        with pytest.raises(SystemExit, match=named):
            pool.earlier(path, data, seed)


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1"]), ("3,5", ["3", "5"])])
def test_a_job_sees_its_own_gpu_alone(pool, tmp_path, monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.chdir(tmp_path)
    code = "import os, sys; open(sys.argv[1] + os.environ['CUDA_VISIBLE_DEVICES'], 'w').close()"
    pool.Pool(["cuda:0", "cuda:1"], tmp_path / "logs")([job(pool, name, code) for name in "ab"])
    assert sorted(path.name for path in tmp_path.glob("cuda*")) == [f"cuda{number}" for number in expected]
