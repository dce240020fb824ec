"""Which rows join the committed table 1."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from softdefend.core.store import ResultStore, plain
from softdefend.experiments.config import resolve
from softdefend.experiments.reproduce import _arguments, _protocol, table1
from softdefend.training.plain import plain_config

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
COMMITTED = json.loads((BENCHMARKS / "results" / "table1.json").read_text())
PROTOCOL = {
    "data": {"name": "digits", "validation": 64},
    "epochs": 200,
    "optim": {"lr": 0.1, "schedule": {"warmup": 0.0}},
    "attack": {"steps": 10},
}


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield runpy.run_path(str(BENCHMARKS / "table1.py"))["main"]
    for name in ("collect", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def write_row(tmp_path):
    """A function that writes a run's row and what the script reads of its folder."""

    def write(name, protocol):
        figures = {"epoch": 3, "clean": 0.5, "autoattack": 0.25}
        stem = f"{name}-seed0"
        evaluation = {"attacks": {"autoattack": {"seconds": 1.0, "members": [{"name": "apgd", "count": 5}]}}}
        (tmp_path / stem / "evaluation").mkdir(parents=True)
        for which in ("best", "last"):
            (tmp_path / stem / "evaluation" / f"{which}.json").write_text(json.dumps(evaluation))
        (tmp_path / stem / "timing.jsonl").write_text('{"epoch": 1, "seconds": 2.0}\n')
        row = {"name": name, "recipe": name.upper(), "seed": 0, "best": figures, "last": figures}
        row |= {"hours": 1.0, "curve": [], "environment": COMMITTED["rows"][0]["environment"]}
        inputs = {"name": name, "seed": 0, "protocol": protocol}
        ResultStore(tmp_path).write(stem, inputs, row)

    return write


def run(main, monkeypatch, tmp_path):
    output = tmp_path / "results" / "table.json"
    monkeypatch.setattr(sys, "argv", ["table1.py", str(tmp_path), "--output", str(output)])
    return main(), output


def test_rows_of_one_protocol_are_joined_in_the_order_of_the_table(main, write_row, monkeypatch, tmp_path):
    for name in ("trades", "sglr-reference", "pgd-at"):
        write_row(name, PROTOCOL)
    code, output = run(main, monkeypatch, tmp_path)
    content = json.loads(output.read_text())
    assert code == 0
    assert (content["data"], content["protocol"]) == ("digits", PROTOCOL)
    assert [row["name"] for row in content["rows"]] == ["pgd-at", "sglr-reference", "trades"]
    assert content["rows"][0]["last"]["autoattack"] == 25.0
    assert "protocol" not in content["rows"][0]


@pytest.mark.parametrize(
    "other",
    [
        {"epochs": 200},
        PROTOCOL | {"epochs": 100},
        PROTOCOL | {"attack": {"steps": 7}},
        PROTOCOL | {"optim": {"lr": 0.1, "schedule": {"warmup": 0.05}}},
        {},
    ],
)
def test_rows_are_compared_by_their_whole_protocol(main, write_row, monkeypatch, tmp_path, other):
    write_row("pgd-at", PROTOCOL)
    write_row("trades", other)
    code, output = run(main, monkeypatch, tmp_path)
    assert code == 2
    assert not output.exists()


def test_an_altered_row_is_refused(main, write_row, monkeypatch, tmp_path):
    write_row("pgd-at", PROTOCOL)
    path = tmp_path / "pgd-at-seed0.json"
    path.write_text(path.read_text().replace('"epochs": 200', '"epochs": 100'))
    with pytest.raises(SystemExit, match="no row that softdefend reproduce wrote"):
        run(main, monkeypatch, tmp_path)


def test_a_row_made_now_joins_the_committed_ones():
    """By the command in the script's docstring."""
    own = ["--data.name", COMMITTED["data"], "--validate.precision", "fast", "--evaluate.precision", "fast"]
    own += ["--validate.every", "2", "--validate.test_size", "1000"]
    study = table1()
    for made in study.runs:
        experiment = resolve(_arguments(study, made, 0, Path("folder"), own))
        assert plain(_protocol(plain(plain_config(experiment)))) == COMMITTED["protocol"]
