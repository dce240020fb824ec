"""``softdefend evaluate --optimality``: printed, drawn, and refused in time."""

from __future__ import annotations

import json
from pathlib import Path

from softdefend.cli.main import main


def test_attacks_are_compared_in_the_log_and_on_the_page(run_folder: Path, capsys) -> None:
    words = ["evaluate", str(run_folder), "--which", "last", "--optimality", "deepfool", "fgsm"]
    assert main([*words, "--optimality_size", "30"]) == 0
    said = capsys.readouterr().out
    result = json.loads((run_folder / "evaluation" / "last-optimality.json").read_text())
    assert result["n"] == 30
    for name, row in result["attacks"].items():
        assert f"{name:<8}  optimality {row['optimality']:.3f}" in said
    page = (run_folder / "report.html").read_text()
    assert "How good are the attacks?" in page
    assert "best known falls from" in page


def test_what_cannot_be_compared_is_refused_first(run_folder: Path, refused) -> None:
    words = ["evaluate", str(run_folder), "--which", "last", "--optimality"]
    before = sorted((run_folder / "evaluation").iterdir())
    refused([*words, "fmn", "cw-l2"], "threat.norm", "linf", "l2 under cw-l2")
    refused([*words, "fmn", "fmn"], "--optimality", "fmn, fmn", "different")
    refused([*words, "fmn", "--optimality_size", "0"], "--optimality_size", "0", ">= 1")
    assert sorted((run_folder / "evaluation").iterdir()) == before
