"""What may be asked of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.evaluation import EvaluateSettings, Requests
from softdefend.evaluation.settings import check_requests, check_writable


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"attacks": ("pgd20",)}, "attacks"),
        ({"size": 0}, "evaluate.size"),
        ({"curve_size": -1}, "evaluate.curve_size"),
        ({"examples": -1}, "evaluate.examples"),
        ({"batch_size": 0}, "evaluate.batch_size"),
        ({"microbatch": 0}, "evaluate.microbatch"),
        ({"precision": "half"}, "evaluate.precision"),
        ({"seed": -1}, "evaluate.seed"),
    ],
    ids=str,
)
def test_values_out_of_range_name_their_setting(change, setting):
    with pytest.raises(SettingError) as caught:
        EvaluateSettings(**change)
    assert caught.value.setting == setting


def test_attacks_from_a_file_are_a_list():
    assert EvaluateSettings(attacks=["fgsm", "pgd-3"]).attacks == ("fgsm", "pgd-3")


def test_files_below_folders_that_are_to_be_made_can_be_written(tmp_path):
    check_writable("--log", tmp_path / "new" / "folder" / "log")
    (tmp_path / "file").write_text("")
    for path, given in ((tmp_path, "a directory"), (tmp_path / "file" / "x", "below the file")):
        with pytest.raises(SettingError, match=f"^--log: got {path}, {given}"):
            check_writable("--log", path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_model_info_is_asked_for_only_where_it_can_be_filled(tmp_path):
    settings, path = EvaluateSettings(attacks=("autoattack",)), tmp_path / "info.json"
    check_requests(settings, Requests(robustbench=path), 100)
    path.write_text(json.dumps({"name": "mine"}))
    check_requests(settings, Requests(robustbench=path), 100)
    with pytest.raises(SettingError, match="50 of 100 images"):
        check_requests(EvaluateSettings(attacks=("autoattack",), size=50), Requests(robustbench=path), 100)
    check_requests(EvaluateSettings(attacks=("autoattack",), size=500), Requests(robustbench=path), 100)
    path.write_text("[]")
    with pytest.raises(SettingError, match="holds no object"):
        check_requests(settings, Requests(robustbench=path), 100)


@pytest.mark.parametrize(
    "asked",
    [
        {"log": Path("log.txt")},
        {"audit": 10},
        {"optimality": ("fmn",)},
        {"surrogates": {"other": torch.nn.Flatten()}},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_about_any_wrong_class_is_refused_with_targets(asked):
    check_requests(EvaluateSettings(), Requests(**asked), 100)
    with pytest.raises(SettingError, match="any wrong class"):
        check_requests(EvaluateSettings(targeted="next"), Requests(**asked), 100)
