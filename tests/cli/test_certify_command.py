"""``softdefend certify``, and the page about it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_tools import SMALL

from softdefend.cli.main import main
from softdefend.evaluation import certify as certify_module

PAGE = (Path(__file__).parents[2] / "docs" / "certificates.md").read_text()
QUICK = ["--which", "last", "--size", "30", "--samples", "60", "--selection", "20", "--attack_draws", "2"]


def certificate(folder: Path) -> dict:
    content: dict = json.loads((folder / "evaluation" / "last-certificate.json").read_text())
    return content


def test_a_run_is_certified_once_and_shown(run_folder: Path, capsys, monkeypatch) -> None:
    words = ["certify", str(run_folder), *QUICK, "--sigma", "0.1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    result = certificate(run_folder)
    table = pq.read_table(run_folder / "evaluation" / "last-certificate.parquet").to_pydict()
    right = [p == y for p, y in zip(table["prediction"], table["label"], strict=True)]
    assert result["n"] == len(right) == 30
    assert result["abstained"] == table["prediction"].count(-1)
    for point in result["curve"]:
        wanted = sum(r >= point["radius"] and ok for r, ok in zip(table["radius"], right, strict=True))
        assert point["count"] == wanted
        assert f"l2 radius {point['radius']:.3f}: certified {100 * wanted / 30:.1f}%" in said
    certified, attacked = ([point["radius"] for point in result[name]] for name in ("curve", "empirical"))
    assert certified == attacked
    assert result["curve"][-1]["count"] == 0
    page = (run_folder / "report.html").read_text()
    assert "Certified accuracy" in page
    assert "0.1" in page
    assert not list((run_folder / "evaluation").glob("*.state"))
    monkeypatch.setattr(certify_module, "_certify", None)  # nothing is counted anew
    assert main([*words, "--batch_size", "7"]) == 0
    assert certificate(run_folder) == result


def test_noise_that_is_not_known_has_to_be_said(run_folder: Path, refused) -> None:
    refused(["certify", str(run_folder)], "--sigma", "not trained with noise", "such as 0.25")
    refused(["certify", str(run_folder), "--sigma", "0"], "certify.sigma", "0", "positive")
    refused(
        ["certify", str(run_folder), "--sigma", "1", "--which", "first"], "--which", "first", "best or last"
    )
    refused(["certify", str(run_folder), "--sigma", "1", "--size", "0"], "certify.size", "0", ">= 1")
    refused(["certify"], "run", "nothing")
    assert not list((run_folder / "evaluation").glob("*certificate*"))


def test_the_pages_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    train, certify = (shlex.split(line)[1:] for line in block.splitlines())
    assert main([*train, *SMALL]) == 0
    assert main([*certify, "--samples", "50", "--size", "10", "--attack_draws", "0"]) == 0
    result = certificate(Path("runs/noise"))
    assert result["settings"]["sigma"] == 0.25
    assert result["empirical"] == []


def test_the_pages_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(block, "certificates.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out
