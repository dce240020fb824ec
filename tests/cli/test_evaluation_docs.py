"""Every command and example of docs/evaluation.md runs as it stands, in a small world of its own."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from cli_tools import SMALL, pictures, write_parquet

from softdefend.cli.main import main

DOCS = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
BLOCKS = {
    language: re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL) for language in ("sh", "python")
}
COMMANDS = [shlex.split(line) for block in BLOCKS["sh"] for line in block.splitlines()]


@pytest.mark.slow
def test_the_commands_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    write_parquet(tmp_path / "data.parquet", pictures(60), [0, 1] * 30)
    small = ["--data.source", "data.parquet", "--data.validation", "12", "--data.train_size", "32"]
    for name, seed in (("mine", "0"), ("other", "1")):
        words = [
            "train",
            *SMALL,
            *small,
            "--evaluate.size",
            "null",
            "--evaluate.curve_size",
            "0",
            "--seed",
            seed,
        ]
        assert main([*words, "--folder", f"runs/{name}"]) == 0
    (tmp_path / "nets.py").write_text(BLOCKS["python"][0])
    made: dict = {}
    exec(BLOCKS["python"][0], made)
    torch.save({"state_dict": made["make"](2, 1).state_dict()}, "weights.pt")
    assert {command[0] for command in COMMANDS} == {"softdefend"}
    for command in COMMANDS:
        capsys.readouterr()
        assert main(command[1:]) == 0, command
        assert capsys.readouterr().err == "", command
    info = json.loads(Path("model_info.json").read_text())
    best = json.loads(Path("runs/mine/evaluation/best.json").read_text())
    assert info["autoattack_acc"] == str(round(100 * best["attacks"]["autoattack"]["rate"], 2))
    assert info["dataset"] == "data.parquet"
    lines = Path("autoattack.log").read_text().splitlines()
    assert lines[0] == "using standard version including apgd-ce, apgd-t, fab-t, square."
    assert lines[-1] == f"robust accuracy: {best['worst']['rate']:.2%}"
    assert "theirs" in Path("both.html").read_text()
    table = re.findall(r"^\| `([^`]+)` \|", DOCS, flags=re.MULTILINE)
    written = {path.name for path in Path("runs/mine/evaluation").iterdir()} | {"../report.html"}
    names = {name.replace("NAME", "best") for name in table} - {"best.state"}
    assert names <= written
    assert {name for name in written if name.startswith("best") and "linf" not in name} <= names


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = BLOCKS["python"][1]
    exec(compile(example, "evaluation.md", "exec"), {})
    assert "'count'" in capsys.readouterr().out
    page = Path("results/mine/report.html").read_text()
    assert "Robustness report" in page
    assert "Accuracy under common corruptions" in page
    assert "Learning curves" not in page
