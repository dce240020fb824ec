"""A loss of one's own on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from softdefend.cli.main import main

LOSS = "import torch\n\ndef climb(logits, label):\n    return {}\n"
CROSS_ENTROPY = "torch.nn.functional.cross_entropy(logits, label, reduction='none')"


def test_a_function_is_climbed_and_one_that_changed_is_another_evaluation(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "pgd-5-command_losses:climb"
    words = ["evaluate", str(run_folder), "--which", "last", "--attacks", "pgd-5", name, "--curve_size", "0"]

    def evaluated(formula: str) -> dict:
        Path("command_losses.py").write_text(LOSS.format(formula))
        sys.modules.pop("command_losses", None)
        assert main(words) == 0
        return json.loads((run_folder / "evaluation" / "last.json").read_text())

    climbed, same, changed = map(evaluated, (CROSS_ENTROPY, CROSS_ENTROPY, f"-{CROSS_ENTROPY}"))
    assert climbed == same
    assert changed["key"] != climbed["key"]
    attacks = changed["attacks"]
    assert attacks[name]["forwards"] == attacks["pgd-5"]["forwards"]
    assert attacks[name]["count"] >= attacks["pgd-5"]["count"]


def test_a_function_that_does_not_fit_is_refused_before_anything_is_written(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other_losses.py").write_text(LOSS.format("logits.sum()"))
    before = sorted(path.name for path in (run_folder / "evaluation").iterdir())
    name = "fgsm-other_losses:climb"
    words = ["evaluate", str(run_folder), "--which", "last", "--attacks", name]
    refused(words, "attack.loss", "other_losses:climb, which returned float32 of shape []", "shape [b]")
    assert sorted(path.name for path in (run_folder / "evaluation").iterdir()) == before
