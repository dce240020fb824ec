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


@pytest.fixture
def theirs(run_folder: Path, tmp_path: Path) -> list[str]:
    """Words that evaluate the run's network as one from outside, into ``theirs``."""
    words = ["evaluate", "--model", "small_cnn", "--net.width", "4", "--output", str(tmp_path / "theirs")]
    words += ["--weights", str(run_folder / "best.safetensors"), "--size", "16", "--curve_size", "0"]
    return [*words, "--examples", "0", "--attacks", "fgsm", "--device", "cpu"]


def test_a_network_from_outside_keeps_what_it_did_under_each_threat(
    theirs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs"
    assert main([*theirs, "--eps", "4/255", "--corruptions"]) == 0
    before = contents(folder / "evaluation")
    threats = {
        "last": ("linf", "4/255"),
        "last-linf-8_255": ("linf", "8/255"),
        "last-l2-0.5": ("l2", "0.5"),
        "last-l2-0.5-targeted-next": ("l2", "0.5"),
    }
    for name, threat in threats.items():
        targeted = ["--targeted", "next"] if "targeted" in name else []
        assert main([*theirs, "--norm", threat[0], "--eps", threat[1], *targeted]) == 0
        found = evaluation(folder, name)
        assert (found["norm"], found["eps"]) == threat
    after = contents(folder / "evaluation")
    assert {name: after[name] for name in before} == before
    assert not (folder / "evaluation" / "earlier").exists()
    assert {f"{name}.json" for name in threats} <= after.keys()
    page = (folder / "report.html").read_text()
    for shown in ("linf 4/255", "linf 8/255", "l2 0.5"):
        assert shown in page
    capsys.readouterr()
    assert main(["report", str(folder), "--output", str(tmp_path / "x.html")]) == 0
    row = capsys.readouterr().out
    assert f"{100 * evaluation(folder)['worst']['rate']:.2f}" in row


def test_another_network_in_the_folder_leaves_a_copy_and_has_a_threat_of_its_own(
    theirs: list[str], run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    assert main([*theirs, "--eps", "4/255", "--corruptions"]) == 0
    assert main([*theirs, "--eps", "2/255"]) == 0
    first, corruptions = evaluation(folder), evaluation(folder, "last-corruptions")
    other = [*theirs, "--weights", str(run_folder / "last.safetensors"), "--eps", "8/255", "--corruptions"]
    assert main(other) == 0
    assert evaluation(folder)["eps"] == "8/255"
    assert evaluation(folder)["weights"] != first["weights"]
    assert evaluation(folder, "earlier/last-1") == first
    assert evaluation(folder, "earlier/last-corruptions-1") == corruptions
    assert evaluation(folder, "last-linf-2_255")["weights"] == first["weights"]
    assert "linf 2/255" not in (folder / "report.html").read_text()  # of the other network


def test_another_measurement_of_a_checkpoint_leaves_a_copy(run_folder: Path) -> None:
    words = ["evaluate", str(run_folder), "--which", "last", "--size", "64", "--save_adversarial"]
    measured = ["--audit", "--audit_size", "8", "--optimality", "fgsm", "--optimality_size", "4"]
    assert main([*words, *measured]) == 0
    certified = ["certify", str(run_folder), "--which", "last", "--samples", "20", "--size", "4"]
    certified += ["--attack_draws", "0"]
    assert main([*certified, "--sigma", "0.25"]) == 0
    names = ("last-audit", "last-optimality", "last-certificate", "last")
    before = {name: evaluation(run_folder, name) for name in names}
    images = contents(run_folder)["evaluation/last-adversarial-pgd-20.safetensors"]
    again = [*words, "--seed", "5", "--attacks", "fgsm", "--audit", "--audit_size", "6"]
    assert main([*again, "--optimality", "fgsm", "pgd-2", "--optimality_size", "4"]) == 0
    assert main([*certified, "--sigma", "0.5"]) == 0
    for name in names:
        number = 2 if name == "last" else 1  # without images it was evaluated before
        kept = evaluation(run_folder, f"earlier/{name}-{number}")
        assert kept == before[name] != evaluation(run_folder, name)
    kept = contents(run_folder)
    assert kept["evaluation/earlier/last-2-adversarial-pgd-20.safetensors"] == images
    for name in ("last-optimality", "last-certificate"):
        assert f"evaluation/earlier/{name}-1.parquet" in kept
