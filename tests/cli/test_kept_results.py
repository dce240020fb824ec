"""Nothing that has been evaluated or trained is lost to a command that is given again or given otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import SMALL, contents

from softdefend.cli.main import main

Refused = Callable[..., str]


def evaluation(folder: Path, name: str = "last") -> dict:
    return json.loads((folder / "evaluation" / f"{name}.json").read_text())


def test_the_training_line_again_leaves_a_larger_evaluation_alone(run_folder: Path) -> None:
    asked = evaluation(run_folder)["settings"]
    attacks = [*asked["attacks"], "fgsm"]
    assert main(["evaluate", str(run_folder), "--which", "last", "--attacks", *attacks]) == 0
    before = contents(run_folder)
    assert main(["train", *SMALL, "--folder", str(run_folder)]) == 0
    after = contents(run_folder)
    for name in ("evaluation/last.json", "evaluation/last.parquet"):
        assert after[name] == before[name]


def test_fewer_images_or_other_settings_take_the_place_and_leave_a_copy(run_folder: Path) -> None:
    first = evaluation(run_folder)
    for number, words in enumerate(
        (["--attacks", "fgsm", "--size", "8"], ["--attacks", "fgsm", "--seed", "5"]), 1
    ):
        before = evaluation(run_folder)
        assert main(["evaluate", str(run_folder), "--which", "last", *words]) == 0
        assert evaluation(run_folder, f"earlier/last-{number}") == before
    assert evaluation(run_folder, "earlier/last-1") == first
    assert not (run_folder / "evaluation/earlier/last-3.json").exists()


def test_a_run_without_its_checkpoints_is_not_trained_again_over_its_weights(
    run_folder: Path, refused: Refused
) -> None:
    shutil.rmtree(run_folder / "checkpoints")
    before = contents(run_folder)
    said = "no checkpoint beside last.safetensors", "another --folder"
    refused(["train", *SMALL, "--folder", str(run_folder)], str(run_folder / "checkpoints"), *said)
    changed = {name for name, content in contents(run_folder).items() if content != before[name]}
    assert changed <= {"config.yaml"}  # says where the folder is


def test_checkpoints_without_their_settings_are_not_continued(run_folder: Path, refused: Refused) -> None:
    path = run_folder / "config.yaml"
    path.unlink()
    words = ["train", *SMALL, "--optim.lr", "0.2", "--folder", str(run_folder)]
    refused(words, str(path), "no such file beside checkpoints", "another --folder")


def test_a_start_that_got_nowhere_binds_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ["train", *SMALL, "--folder", str(folder)]
    assert main([*words, "--optim.lr", "1e9"]) == 3
    assert main([*words, "--resume", str(tmp_path / "nothing.ckpt"), "--optim.lr", "0.2"]) == 2
    capsys.readouterr()
    assert main(words) == 0


def test_best_and_last_of_other_images_are_not_subtracted(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attacks = [*evaluation(run_folder)["settings"]["attacks"], "fgsm"]
    words = ["evaluate", str(run_folder), "--which", "best", "--size", "8", "--attacks", *attacks]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["report", str(run_folder), "--output", str(run_folder / "x.html")]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run")]
    assert row.replace("|", " ").split()[4] == "–"


@pytest.mark.parametrize("seed", [2**63, 2**64, -(2**63) - 1])
def test_seeds_that_no_generator_takes(seed: int, refused: Refused, tmp_path: Path) -> None:
    refused(
        ["train", *SMALL, "--seed", str(seed), "--folder", str(tmp_path / "r")], "seed", str(seed), "2^63"
    )
    assert not (tmp_path / "r").exists()


def test_a_step_in_levels_of_255_is_refused(refused: Refused, tmp_path: Path) -> None:
    words = ["train", *SMALL, "--attack.step_size", "2", "--folder", str(tmp_path / "r")]
    refused(words, "attack.step_size", "2", "2/255")
