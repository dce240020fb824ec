"""What the benchmark scripts share: which results are joined, and what is said of jobs that failed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from softdefend.experiments.parallel import Job, Scheduler

PATH = Path(__file__).parent.parent.parent / "benchmarks" / "common.py"


@pytest.fixture
def common():
    spec = importlib.util.spec_from_file_location("common", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_failed_job_is_shown_with_the_end_of_its_output(common, tmp_path, capsys):
    code = "print('reason'); raise SystemExit(3)"
    jobs = [
        Job("bad", lambda device: [sys.executable, "-c", code], tmp_path / "bad.log"),
        Job("needs it", lambda device: [], tmp_path / "needs.log", ("bad",)),
    ]
    made = Scheduler(["d0"])
    assert common.exit_code(made, made.run(jobs)) == 1
    error = capsys.readouterr().err
    assert "bad ended with code 3:\nreason" in error
    assert error.endswith("not finished: bad; needs it\n")
    assert common.exit_code(Scheduler(["d0"]), ["late"]) == 0
    assert capsys.readouterr().err == "not finished: late\n"


def test_results_of_other_data_or_another_seed_are_not_joined(common, tmp_path):
    path = tmp_path / "results.json"
    assert common.read_earlier(path, "digits", 0) == {}
    path.write_text('{"data": "digits", "seed": 0}')
    assert common.read_earlier(path, "digits", 0) == {"data": "digits", "seed": 0}
    for data, seed, named in (("CIFAR-10", 0, "data 'digits'"), ("digits", 1, "seed 0")):
        with pytest.raises(SystemExit, match=named):
            common.read_earlier(path, data, seed)
