"""``--runtime.devices``: one run on processes that the command starts, watches and stops together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import yaml

import processes
from softdefend.cli.main import main
from softdefend.core.errors import EXIT_LOST, LostProcessError, ReportedError
from softdefend.experiments.launch import _report

RUN = [
    *(
        "--config",
        "digits_demo",
        "--preset",
        "sglr-ema",
        "--data.train_size",
        "96",
        "--data.validation",
        "48",
    ),
    *("--optim.epochs", "12", "--optim.batch_size", "32", "--net.width", "8", "--attack.steps", "2"),
    *(
        "--label.start",
        "0.2",
        "--validate.test_size",
        "0",
        "--save.every_steps",
        "2",
        "--evaluate.size",
        "32",
    ),
    *("--evaluate.curve_size", "0", "--evaluate.examples", "0", "--evaluate.attacks", "[fgsm]"),
    *("--runtime.threads", "1", "--runtime.device", "cpu", "--progress", "false"),
]


ALONE = {"OMP_NUM_THREADS": "1", "SOFTDEFEND_COMMIT": "none"}


def start(folder: Path, *more: str) -> processes.Program:
    """The command on two processes."""
    words = ["train", *RUN, "--folder", str(folder), "--runtime.devices", "2", *more]
    return processes.Program(["-m", "softdefend", *words], {**os.environ, **ALONE})


def rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(run: processes.Program, folder: Path, epochs: int) -> list[int]:
    """Wait until a run has come so far; the processes that train it, in the order of their start."""
    while len(rows(folder)) < epochs:
        assert run.ended()[0] is None, run.ended()
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return sorted(map(int, children))


FILES = ("metrics.jsonl", "best.safetensors", "last.safetensors", "evaluation/last.parquet")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_leaves_no_trace(tmp_path, capsys):
    """Three starts of a command that starts two processes take more than some seconds.

    What nobody disturbs is trained by two that torchrun would have started, and by this one.
    """
    whole = ("-m", "softdefend", "train", *RUN, "--folder", str(tmp_path / "whole"))
    assert [code for code, _ in processes.ended(processes.start(2, *whole))] == [0, 0]
    run = start(tmp_path / "killed")
    _, second = wait_for(run, tmp_path / "killed", 2)
    killed = time.monotonic()
    os.kill(second, signal.SIGKILL)
    ((code, errors),) = processes.ended([run], 60)
    assert time.monotonic() - killed < 60
    assert code == EXIT_LOST
    lines = [line for line in errors.splitlines() if not line.startswith("softdefend: warning")]
    assert len(lines) == 1, errors
    assert lines[0].startswith("softdefend: stopped: process 1 of 2 was ended by SIGKILL; the others were")
    shutil.copytree(tmp_path / "killed", tmp_path / "other")

    run = start(tmp_path / "killed")  # and now the one that started them
    trained = wait_for(run, tmp_path / "killed", 6)
    run.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{one}").exists() for one in trained):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ((code, errors),) = processes.ended([start(tmp_path / "killed")])
    assert code == 0, errors
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    known = yaml.safe_load((tmp_path / "killed" / "config.yaml").read_text())
    assert known["runtime"]["devices"] == 2
    command = json.loads((tmp_path / "killed" / "environment.json").read_text())["command"]
    assert command.endswith("--runtime.devices 2")

    capsys.readouterr()
    assert main(["train", *RUN, "--folder", str(tmp_path / "other"), "--runtime.devices", "1"]) == 0
    said = capsys.readouterr().out
    assert "continues on 1 process(es), before on 2: sums are added in another order" in said
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "other"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.05)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--runtime.devices", "0"],
            "runtime.devices: got 0; accepted: a whole number from 1 to 1024, or auto",
        ),
        (
            ["--runtime.devices", "two"],
            "runtime.devices: got two; accepted: a whole number or auto",
        ),
        (
            ["--runtime.device", "cuda", "--runtime.devices", "2"],
            "runtime.devices: got 2; accepted: at most the 0 CUDA device(s) present, or auto",
        ),
        (
            ["--runtime.device", "cuda:0", "--runtime.devices", "2"],
            "runtime.devices: got 2 on cuda:0; accepted: 1, or auto, cpu or cuda as the device",
        ),
        (
            ["--runtime.batch_norm", "none"],
            "runtime.batch_norm: got none; accepted: synchronized or per_process",
        ),
    ],
    ids=["none", "a word", "no GPU", "one GPU for two", "unknown normalization"],
)
def test_processes_that_cannot_be_are_refused_in_one_line(words, line, capsys, tmp_path):
    assert main(["train", *RUN, "--folder", str(tmp_path / "run"), *words]) == 2
    assert capsys.readouterr().err == f"softdefend: error: {line}\n"
    assert not (tmp_path / "run").exists()


def test_runs_side_by_side_have_one_process_each(capsys, tmp_path):
    words = ["--presets", "pgd-at", "--folder", str(tmp_path), "--parallel", "2", "--runtime.devices", "2"]
    assert main(["compare", "--config", "digits_demo", *words]) == 2
    assert capsys.readouterr().err.startswith(
        "softdefend: error: --parallel: got 2; accepted: 1 with runtime"
    )


def test_what_all_processes_refuse_is_said_once(tmp_path):
    """Here the last batch of an epoch, which only the data tell."""
    odd = ["--data.train_size", "97", "--optim.drop_last", "false"]
    ((code, errors),) = processes.ended([start(tmp_path / "run", *odd)])
    given = "optim.drop_last: got false with a last batch of 1 images on 2 processes"
    assert code == 2
    assert errors == f"softdefend: error: {given}; accepted: true, or another optim.batch_size\n"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_processes_with_other_settings_are_refused_in_all_of_them(tmp_path):
    """As torchrun would start them: there is nobody else to say so."""
    port, words = (
        processes.free_port(),
        ["-m", "softdefend", "train", *RUN, "--folder", str(tmp_path / "run")],
    )
    group = [
        processes.Program([*words, "--optim.lr", lr], processes.environment(rank, 2, port))
        for rank, lr in enumerate(("0.1", "0.2"))
    ]
    for (code, errors), who in zip(processes.ended(group), ("", " (process 1)"), strict=True):
        assert code == 2, errors
        assert errors.startswith(f"softdefend{who}: error: processes: got settings ")
        assert errors.endswith("in process 0; accepted: the same settings everywhere\n")
        assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = ["-m", "softdefend", "train", *RUN, "--folder", str(tmp_path / "run")]
        first = processes.Program(words, processes.environment(0, 2, port))
        ((code, errors),) = processes.ended([first])
    assert code == 2
    assert errors.splitlines()[-1].startswith(
        f"softdefend: error: MASTER_ADDR, MASTER_PORT: got 127.0.0.1:{port} ("
    )
    assert errors.endswith("accepted: a free port of the first machine\n")


@pytest.mark.parametrize("command", ["compare", "report", "analyze"])
def test_commands_for_one_process_are_refused_where_several_were_started(monkeypatch, capsys, command):
    for name, value in processes.environment(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    assert main([command, "x"]) == 2
    line = f"softdefend (process 1): error: {command}: got several processes; accepted: one, or train, "
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("codes", "error"),
    [
        ({0: 2, 1: 2}, ReportedError(2)),
        ({0: EXIT_LOST, 1: 3}, ReportedError(3)),
        ({0: EXIT_LOST, 1: -9}, LostProcessError("process 1 of 2 was ended by SIGKILL")),
        ({0: -15, 1: -11}, LostProcessError("process 1 of 2 was ended by SIGSEGV")),
        ({0: EXIT_LOST}, LostProcessError("process 0 of 2 was ended without a word")),
    ],
    ids=str,
)
def test_the_cause_is_told_from_what_followed(codes, error, tmp_path, capsys):
    (tmp_path / "0" / "1").mkdir(parents=True)
    (tmp_path / "0" / "1" / "stderr.log").write_text("what it said\n")
    with pytest.raises(type(error)) as raised:
        _report(codes, 2, tmp_path)
    assert str(raised.value).startswith(str(error))
    assert capsys.readouterr().err == ("what it said\n" if codes == {0: EXIT_LOST, 1: 3} else "")
