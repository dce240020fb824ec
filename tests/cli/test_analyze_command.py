"""``softdefend analyze`` and ``softdefend labels``: words to files, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
from cli_tools import contents

from softdefend.cli.main import run
from softdefend.core.errors import SettingError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("RUN --parts nonsense", "--parts: got 'nonsense'"),
        ("RUN --which newest", "--which: got 'newest'"),
        ("RUN --probe 3", "--probe: got 3"),
        ("RUN --points 4", "--points: got 4"),
        ("RUN --span 0", "--span: got 0"),
        ("RUN --probe many", "probe: got many"),
        ("RUN --depth 3", "depth: got an unknown setting"),
        ("RUN --output RUN/analysis", "inside the run"),
        ("RUN --reference /no/such/run --parts gradients", "run folder: got /no/such/run"),
        ("/no/such/run", "run folder: got /no/such/run"),
        ("RUN --device tpu", "runtime.device: got 'tpu'"),
        ("", "run: got nothing"),
    ],
)
def test_analyze_refuses_in_one_line(words, message, finished):
    with pytest.raises(SettingError, match=re.escape(message)) as caught:
        run(["analyze", *words.replace("RUN", str(finished)).split()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("repair RUN", "labels: got 'repair'"),
        ("audit RUN --score luck", "--score: got 'luck'"),
        ("audit RUN --source luck", "--source: got 'luck'"),
        ("audit RUN --top 0", "--top: got 0"),
        ("audit RUN --at 0", "--at: got 0"),
        ("audit RUN --batch_size 0", "--batch_size: got 0"),
        ("audit RUN --output RUN", "inside the run"),
        ("audit", "run: got nothing"),
    ],
)
def test_the_audit_refuses_in_one_line(words, message, finished):
    with pytest.raises(SettingError, match=re.escape(message)):
        run(["labels", *words.replace("RUN", str(finished)).split()])


def test_a_run_without_a_memory_is_refused_and_nothing_written(finished, tmp_path):
    with pytest.raises(SettingError, match=r"holds no label memory \(Hard and PGDAT\)"):
        run(["labels", "audit", str(finished), "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert not (tmp_path / "out").exists()


def test_analyze_writes_files_and_prints_best_and_last(finished, tmp_path, capsys):
    before = contents(finished)
    words = f"analyze {finished} --output {tmp_path} --parts geometry overfitting --which last --probe 16"
    run([*words.split(), *["--points", "0", "--eigen_steps", "0", "--device", "cpu", "--progress", "false"]])
    content = json.loads((tmp_path / "analysis.json").read_text())
    assert [one["weights"] for one in content["geometry"]] == ["last"]
    assert content["settings"]["probe"] == 16
    (name, result), printed = next(iter(content["overfitting"].items())), capsys.readouterr().out
    accuracy = f"{100 * result['last']['val_robust']:.1f}% (epoch {result['last']['epoch']})"
    assert re.search(
        rf"^{name}: robust validation accuracy best .*, last {re.escape(accuracy)}$", printed, re.M
    )
    assert "Robust overfitting" in (tmp_path / "analysis.html").read_text()
    assert contents(finished) == before


def test_the_audit_writes_files_and_prints_what_it_believes(finished, tmp_path, capsys):
    words = f"labels audit {finished} --output {tmp_path} --source prediction --top 5 --device cpu"
    run(words.split())
    rows = (tmp_path / "labels.csv").read_text().splitlines()
    assert f"{len(rows) - 1} labels, another class believed for" in capsys.readouterr().out
    assert (tmp_path / "audit.html").read_text().count("Training image") == 5
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run(words.split())
    assert not (tmp_path / "earlier").exists()
    run([*words.split(), "--score", "margin"])
    assert (tmp_path / "labels.csv").read_bytes() != first["labels.csv"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier" / "1").iterdir()} == first
