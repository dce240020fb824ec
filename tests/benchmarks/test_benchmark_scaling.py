"""The benchmark of several processes: its output, arithmetic, messages and kills in miniature."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from softdefend.core.processes import Processes


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    yield importlib.import_module("scaling")
    for name in ("scaling", "scaling_messages", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def results(scaling, tmp_path):
    return scaling.Results(tmp_path / "scaling.json", {"commit": "a"})


def step(count, ms, batch=100, **more):
    row = {"net": "n", "recipe": "pgd-at", "batch_size": batch, "settings": "", "processes": count, "ms": ms}
    return row | more


def test_ratios_are_to_one_process_of_the_same_work_and_machine(scaling):
    rows = [
        step(1, 50.0, machine="a"),
        step(2, 20.0, machine="a"),
        step(1, 80.0, 400, machine="a"),
        step(2, 100.0, 400, machine="a"),
        step(4, 5.0, machine="b"),
    ]
    scaling.add_ratios({"steps": rows})
    found = [(row["images_per_second"], row.get("times_one")) for row in rows]
    assert found == [(2000.0, 1.0), (5000.0, 2.5), (5000.0, 1.0), (4000.0, 0.8), (20000.0, None)]


def test_rows_are_written_at_once_replace_the_same_work_and_keep_the_rest(scaling, results, tmp_path):
    results.add("kill", {"processes": 2, "seconds": 1.0})
    results.add("steps", step(2, 20.0))
    again = scaling.Results(tmp_path / "scaling.json", {"commit": "b"})
    again.fail("autoattack", 2, "too slow")
    again.add("steps", step(1, 30.0))
    again.add("steps", step(2, 10.0))
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert [(row["processes"], row["times_one"]) for row in content["steps"]] == [(1, 1.0), (2, 3.0)]
    assert content["kill"][0]["seconds"] == 1.0
    assert content["environment"] == {"kill": {"commit": "a"}, "steps": {"commit": "b"}}
    assert content["failed"] == {"autoattack": ["2 processes: too slow"]}
    again.begin("autoattack")
    again.add("kill", {"processes": 4})
    assert json.loads((tmp_path / "scaling.json").read_text())["failed"] == {}


def test_shares_are_of_what_the_recipe_sends(results):
    """SGLR makes a clean forward more, and has a memory; what was captured counts."""
    for recipe in ("pgd-at", "sglr-reference"):
        results.add("steps", step(2, 10.0, recipe=recipe))
        results.add("steps", step(2, 10.0, recipe=recipe, settings="--runtime.batch_norm per_process"))
    known = {"net": "n", "captured": True}
    for row in (
        {"what": "gradients", "ms": 9.0, "net": "n", "captured": False},
        {"what": "gradients", "ms": 1.0, **known},
        {"what": "statistics forward", "ms": 0.2, **known},
        {"what": "statistics backward", "ms": 0.3, **known},
        {"what": "memory", "batch_size": 100, "ms": 0.1, "captured": True},
    ):
        results.add("messages", {**row, "processes": 2})
        results.add("messages", {**row, "processes": 4, "ms": 7.0})
    pgd, apart, sglr, _ = results.content["steps"]
    assert apart["messages_share"] == 0.1
    assert (pgd["gradients_share"], pgd["statistics_share"], pgd["messages_share"]) == (0.1, 0.05, 0.15)
    assert "memory_share" not in pgd
    assert (sglr["gradients_ms"], sglr["statistics_ms"], sglr["memory_ms"]) == (1.0, 0.7, 0.1)
    assert sglr["memory_share"] == 0.01
    assert sglr["messages_share"] == 0.18


def test_records_are_compared_image_by_image(scaling, results, tmp_path):
    paths = []
    for name, robust, forwards in (("one", [True, False, True], 1), ("two", [True, True, True], 2)):
        table = pa.table({"index": [0, 1, 2], "autoattack/robust": robust, "forwards": [1, 1, forwards]})
        pq.write_table(table, tmp_path / name)
        paths.append(tmp_path / name)
    assert scaling.differences(*paths) == {"other_records": 2, "other_verdicts": 1}
    row = {"weights": "w", "precision": "exact", "n": 3}
    for count, path, seconds in ((1, paths[0], 9.0), (2, paths[0], 6.0), (4, paths[1], 3.0)):
        more = {"processes": count, "seconds": seconds, "records": scaling.digest(path)}
        results.add("autoattack", row | more)
    found = [(row["times_one"], row["same_records"]) for row in results.content["autoattack"]]
    assert found == [(1.0, True), (1.5, True), (3.0, False)]


def test_rows_of_a_command_are_kept_though_it_is_stopped(scaling, results, tmp_path):
    output = tmp_path / "rows.json"
    script = f"open({str(output)!r}, 'w').write('[{{\"a\": 1}}]'); import time; time.sleep(60)"
    seen, started = [], time.monotonic()
    with pytest.raises(scaling.FailedError, match="stopped after 1 s"):
        scaling.launch([sys.executable, "-c", script], 1, lambda: scaling.read_rows(output, [], seen.append))
    assert time.monotonic() - started < 20
    assert seen[-1] == {"a": 1}
    with pytest.raises(scaling.FailedError, match="exit code 3"):
        scaling.launch([sys.executable, "-c", "raise SystemExit(3)"], 30)


def test_one_bench_takes_all_networks_with_the_same_batches(scaling, results, tmp_path, monkeypatch):
    commands = []

    def launch(command, limit, look):
        commands.append(command)
        rows = [{"net": "n", "recipe": "pgd-at", "batch_size": 8, "ms": 1.0}]
        Path(command[command.index("--output") + 1]).write_text(json.dumps({"rows": rows}))
        look()

    monkeypatch.setattr(scaling, "launch", launch)
    words = ["--parts", "steps", "--work", "a:8", "b:8", "a:16", "b:16", "c:8", "--gpus", "4", "--shares"]
    args = scaling.read_arguments([*words, "--settings", "--runtime.compile", "false"])
    args.folder = tmp_path
    assert scaling.measure(args, results) == 0
    assert args.counts == [1, 2, 4]

    def between(command, start, end):
        return command[command.index(start) + 1 : command.index(end)]

    assert len(commands) == 6
    assert between(commands[0], "--nets", "--presets") == ["a", "b"]
    assert between(commands[0], "--batch_sizes", "--output") == ["2", "4", "8", "16"]
    assert between(commands[1], "--batch_sizes", "--output") == ["2", "4", "8"]
    assert between(commands[2], "--batch_sizes", "--output") == ["8", "16"]
    assert commands[2][-2:] == ["--runtime.compile", "false"]
    found = [(row["processes"], row["settings"]) for row in results.content["steps"]]
    assert found == [(count, "--runtime.compile false") for count in (1, 2, 4)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--parts", "autoattack"], "part autoattack needs --run"),
        (["--gpus", "1"], "part autoattack needs --run"),
        (
            ["--parts", "steps", "--work", "a:6", "b:8", "--gpus", "4"],
            "a:6 cannot be shared by each of [1, 2, 4]",
        ),
        (["--work", "a"], "invalid parse value: 'a'"),
        (["--gpus", "0"], "--gpus and --counts take whole numbers >= 1"),
        (["--counts", "2", "0"], "--gpus and --counts take whole numbers >= 1"),
        (["--limit", "0"], "--limit takes seconds > 0"),
        (["--steps", "0"], "--steps a whole number >= 1"),
        (["--n", "some"], "--n: some; accepted: all, or a whole number >= 1"),
        (["--device", "tpu"], "runtime.device: got 'tpu'"),
        (["--quick", "--settings", "--nope", "3"], "nope: got an unknown setting"),
    ],
    ids=[
        *("no run", "no run was made", "uneven", "no batch", "no processes", "none among others", "no time"),
        *("no steps", "no number", "no device", "no setting"),
    ],
)
def test_what_cannot_be_measured_is_refused(scaling, words, line, capsys):
    with pytest.raises(SystemExit) as refused:
        scaling.read_arguments(words)
    assert refused.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_numbers_of_processes_and_the_device_are_filled_in(scaling, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = scaling.read_arguments(["--parts", "kill", "--counts", "4", "2", "4"])
    assert args.counts == [2, 4]
    assert args.device == "cpu"  # whose steps are not captured


def test_bytes_of_messages_are_those_of_published_networks(scaling, monkeypatch):
    """ResNet-18 for CIFAR-10 has 11,173,962 parameters, of 20 layers of batch normalization."""
    made = importlib.import_module("scaling_messages")
    net = made.make_net("resnet18", device="meta")
    assert made.gradient_bytes(net) == 4 * 11_173_962
    assert made.channels(net) == [64] * 5 + [128, 128, 128, 128, 128] + [256] * 5 + [512] * 5
    forward, backward = made.statistics_bytes(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert (forward, backward) == ([36], [24])
    assert made.memory_bytes(100) == 100 * (8 + 40)
    assert [made.forwards(name) for name in ("pgd-at", "sglr-reference", "trades")] == [1, 2, 2]
    assert [made.remembers(name) for name in ("pgd-at", "sglr-reference")] == [False, True]


def test_messages_of_two_processes_are_timed(scaling, results, tmp_path):
    """Three starts of Python take some seconds."""
    args = scaling.read_arguments(["--quick", "--parts", "messages"])
    args.folder = tmp_path
    assert scaling.measure(args, results) == 0
    rows = results.content["messages"]
    statistics = {"statistics forward", "statistics backward"}
    assert {row["what"] for row in rows} == {"meters", "memory", "gradients", "sum", *statistics}
    assert all(row["ms"] > 0 and row["processes"] == 2 and not row["captured"] for row in rows)


def test_a_kill_is_timed_to_the_end_of_the_last_process(scaling, tmp_path, monkeypatch):
    """A launcher that ends its second process half a second after the first was killed."""
    script = """
import os, pathlib, subprocess, sys, time
folder = sys.argv[1]
ranks = [
    subprocess.Popen(["sleep", "60"], env={**os.environ, "RANK": str(rank)}) for rank in (1, 0)
]
pathlib.Path(folder, "metrics.jsonl").write_text("{}\\n" * 3)
ranks[0].wait()
time.sleep(0.5)
ranks[1].terminate(), ranks[1].wait()
sys.stderr.write("one line\\n")
sys.exit(4)
"""
    folder = tmp_path / "run"
    folder.mkdir()
    with open(f"{folder}.err", "wb") as errors:
        run = subprocess.Popen([sys.executable, "-c", script, str(folder)], stderr=errors)
    row = scaling.kill_one(run, folder, 2, 30)
    assert 0.5 <= row.pop("seconds") < 10
    assert row == {"processes": 2, "killed": 1, "exit": 4, "lines": 1, "said": ["one line"]}


def test_a_message_by_itself_is_timed_per_call(scaling):
    made, calls = importlib.import_module("scaling_messages"), []
    ms = made.milliseconds(lambda: calls.append(time.sleep(0.01)), 4, made.torch.device("cpu"))
    assert len(calls) == 5
    assert 10 <= ms < 100
    sent = made.messages([made.Work("small_cnn", 8)], Processes(), "cpu", channels_last=False)
    names = [row["what"] for row, _ in sent]
    assert len(set(names)) == len(names) == 6
