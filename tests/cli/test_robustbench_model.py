"""``softdefend evaluate --robustbench_model``: checkpoints in RobustBench's formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli_tools import pictures, write_parquet

from softdefend.cli.main import main
from softdefend.data import DataSettings, load
from softdefend.models.robustbench import names_there
from softdefend.models.wide_resnet import WideResNet

Refused = Callable[..., str]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """An evaluation of a WRN-10-1 with random weights on 12 of 60 pictures of two classes."""
    torch.manual_seed(0)
    net = WideResNet(2, 1, 10, 1)
    names = names_there(net)
    state = {f"module.{names.get(name, name)}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "theirs.pt")
    data = write_parquet(tmp_path / "data.parquet", pictures(60), [i % 2 for i in range(60)])
    return [
        *("evaluate", "--robustbench_model", str(tmp_path / "theirs.pt")),
        *("--architecture", "WideResNet-10-1", "--output", str(tmp_path / "out")),
        *("--data.source", str(data), "--attacks", "fgsm", "--curve_size", "0", "--device", "cpu"),
    ]


def test_a_checkpoint_is_evaluated_like_any_network(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "took 'state_dict' from the file; removed the prefix 'module.'" in said
    assert "does not normalize" in said
    result = json.loads((tmp_path / "out" / "evaluation" / "last.json").read_text())
    torch.manual_seed(0)
    net = WideResNet(2, 1, 10, 1).eval()
    test = load(DataSettings(str(tmp_path / "data.parquet"), validation=1)).test
    with torch.no_grad():
        right = int((net(test.images / 255).argmax(1) == test.labels).sum())
    assert (result["clean"]["count"], result["n"]) == (right, 12)
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["net"]["name"] == "WideResNet-10-1"
    assert config["outside"]["model"] == "robustbench:WideResNet-10-1"


def test_statistics_can_be_given(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--mean", "0.5", "--std", "0.25"]) == 0
    assert "normalizes as told" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "setting", "given", "accepted"),
    [
        (["--architecture", "WRN"], "--architecture", "'WRN'", "WideResNet-DEPTH-WIDTH"),
        (["--architecture", "ResNet-18"], "FILE", "weights that do not fit", "weights by name"),
        (["--mean", "0.5"], "--mean", "1 numbers beside 0 of --std", "as many of both"),
        (["--mean", "0.5", "0.5", "--std", "1", "1"], "--mean", "2 numbers for 1 channels", "each channel"),
        (["--model", "small_cnn"], "--model", "model beside --robustbench_model", "one of them"),
        (["--robustbench_model", "missing.pt"], "missing.pt", "no such file", "safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_does_not_fit_is_refused(
    refused: Refused,
    words: list[str],
    tmp_path: Path,
    more: list[str],
    setting: str,
    given: str,
    accepted: str,
) -> None:
    kept = list(words)
    for flag in ("--architecture", "--robustbench_model"):
        if flag in more:
            at = kept.index(flag)
            del kept[at : at + 2]
    refused([*kept, *more], setting.replace("FILE", str(tmp_path / "theirs.pt")), given, accepted)
    assert not (tmp_path / "out").exists()


def test_its_flags_belong_together(refused: Refused, words: list[str], tmp_path: Path) -> None:
    for flag in ("--architecture", "--output"):
        at = words.index(flag)
        refused([*words[:at], *words[at + 2 :]], flag, "nothing", f"{flag} beside --robustbench_model")
    refused(
        ["evaluate", str(tmp_path), "--architecture", "x"], "--architecture", "without --robustbench_model"
    )
